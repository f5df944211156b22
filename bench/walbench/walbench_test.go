package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/bench/internal/results"
	"github.com/autonomyops/autonomy/bench/walbench/leg"
)

// TestMain makes the test binary the two leg programs: this one, and the
// peers', whose logs are all plain files here.
func TestMain(m *testing.M) {
	switch arg := append(os.Args, "")[1]; {
	case arg == legCommand:
		os.Exit(leg.Main(os.Args[2:], own))
	case strings.HasPrefix(arg, "{"):
		fakes := map[string]leg.Open{"broken": func(string, leg.Spec) (leg.Log, error) { return nil, os.ErrPermission }}
		for _, name := range everyone {
			fakes[name] = openPlain
		}
		os.Exit(leg.Main(os.Args[1:], fakes))
	}
	os.Exit(m.Run())
}

// plain is a log in one file, with records of one size.
type plain struct {
	file *os.File
	spec leg.Spec
}

func openPlain(dir string, s leg.Spec) (leg.Log, error) {
	f, err := os.OpenFile(filepath.Join(dir, "log"), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	return &plain{f, s}, err
}

func (p *plain) Append(b []byte) error { return p.AppendBatch([][]byte{b}) }

func (p *plain) AppendBatch(ps [][]byte) error {
	for _, b := range ps {
		if _, err := p.file.Write(b); err != nil {
			return err
		}
	}
	if p.spec.Sync() {
		return p.file.Sync()
	}
	return nil
}

func (p *plain) Drain(fn func([]byte)) error {
	data, err := os.ReadFile(p.file.Name())
	for b := range slices.Chunk(data, p.spec.Size) {
		fn(b)
	}
	return err
}

func (p *plain) Close() error { return p.file.Close() }

// small is a plan of every kind that takes seconds.
func small(t *testing.T) *options {
	t.Setenv("GORACE", "atexit_sleep_ms=0") // otherwise every leg sleeps for a second at its end
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &options{
		peers: self, work: t.TempDir(), out: filepath.Join(t.TempDir(), "results"), version: "1.2.3", reps: 2,
		scale: scale{warmup: 5 * time.Millisecond, measure: 30 * time.Millisecond, segment: 1 << 20},
		plan: []block{
			{kind: kindDurable, size: 300, waiters: 1, sides: all(sides(false, nameFdatasync, nameTidwall))},
			{kind: kindDurable, size: 300, waiters: 64, sides: all(sides(false, nameTidwall, nameBbolt), sides(true, nameTidwall, nameBbolt))},
			{kind: kindDurable, size: 300, waiters: 1024, sides: all(sides(true, namePebble))},
			{kind: kindNoWait, size: 300, records: 2000, sides: all(sides(false, namePebble))},
			{kind: kindDrain, size: 1024, records: 4000, sides: all(sides(false, namePebble))},
			{kind: kindFrame, size: 300, records: 2000, sides: all(sides(false, nameMarshal))},
			{kind: kindOpen, size: 1024, records: 1000, sides: all()},
			{kind: kindOpen, size: 1024, records: 2000, sides: all(sides(false, nameTidwall))},
		},
	}
}

// TestRun measures our log beside plain files and reads what was written.
func TestRun(t *testing.T) {
	o := small(t)
	var stdout bytes.Buffer
	if err := run(t.Context(), o, &stdout); err != nil {
		t.Fatalf("%v\n%s", err, stdout.String())
	}
	data, err := os.ReadFile(filepath.Join(o.out, "latest.json"))
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var rows []results.Row
	if err := dec.Decode(&rows); err != nil {
		t.Fatal(err)
	}
	want := 0
	for _, b := range o.plan {
		want += len(b.metrics()) * (len(b.sides) - 1)
	}
	targets := 0
	for _, r := range rows {
		target := strings.HasPrefix(r.Name, "target: ")
		if target {
			targets++
		}
		if r.Area != area || r.Ours < 0 || r.Value < 0 || target != (r.Target != nil) || target != (r.Met != nil) {
			t.Errorf("row %+v", r)
		}
		if (r.Unit == "records/s" || r.Unit == "ns" || r.Unit == "ms" || r.Unit == "GB/s") && (r.Ours == 0 || r.Value == 0 || r.Ratio == 0) {
			t.Errorf("nothing was measured in %+v", r)
		}
	}
	if len(rows)-targets != want {
		t.Errorf("%d rows beside the targets, want %d", len(rows)-targets, want)
	}
	for _, name := range []string{
		"durable append, 300 B, 1 waiter: p50", "durable append, 300 B, 64 waiters: throughput, best peer",
		"durable append, 300 B, 1024 waiters: records in a sync", "append without waiting, 300 B: p99", "drain, 1024 B: allocations",
	} {
		if !slices.ContainsFunc(rows, func(r results.Row) bool { return r.Name == "target: "+name }) {
			t.Errorf("no target for %s", name)
		}
	}
	page, err := os.ReadFile(filepath.Join(o.out, "latest.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"2 repetitions", "wal of 1.2.3", "### Durable append, 300 B, 64 waiters\n", "| tidwall/wal, batched | ", "| " + nameFdatasync + " | "} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page does not say %q:\n%s", want, page)
		}
	}
	// The first repetition goes one way, the second the other.
	var order []string
	for line := range strings.Lines(stdout.String()) {
		for _, s := range o.plan[0].sides {
			if strings.Contains(line, "1 waiter ") && strings.Contains(line, " "+s.name+" ") {
				order = append(order, s.name)
			}
		}
	}
	if want := []string{nameOurs, nameFdatasync, nameTidwall, nameTidwall, nameFdatasync, nameOurs}; !slices.Equal(order, want) {
		t.Errorf("sides were measured in the order %q", order)
	}
	if left, err := os.ReadDir(o.work); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A leg that fails ends the run, and nothing is written.
func TestRunRefuses(t *testing.T) {
	for name, want := range map[string]string{
		"broken": "durable append, 300 B, 1 waiter, broken, repetition 1: walbench.test: exit status 1\nbroken, durable: permission denied",
		"absent": `there is no side "absent"`,
	} {
		t.Run(name, func(t *testing.T) {
			o := small(t)
			o.plan = []block{{kind: kindDurable, size: 300, waiters: 1, sides: sides(false, name)}}
			err := run(t.Context(), o, io.Discard)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got  %v\nwant %s", err, want)
			}
			if _, err := os.Stat(o.out); err == nil {
				t.Error("results were written")
			}
		})
	}
}

// A side that cannot do what a leg asks, or that loses records, is refused.
func TestLegRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		spec leg.Spec
		want string
	}{
		{"mode", leg.Spec{Size: 1, Mode: "x"}, `there is no mode "x"`},
		{"size", leg.Spec{Mode: leg.NoWait}, "record size 0"},
		{"waiters", leg.Spec{Size: 1, Mode: leg.Durable}, "0 waiters"},
		{"batch", leg.Spec{Size: 300, Mode: leg.Durable, Waiters: 1, Batch: true}, "it takes no batches"},
		{"loss", leg.Spec{Size: 300, Mode: leg.Read, Records: 5}, "0 records were read, 5 were written"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.spec.Side, tt.spec.Dir, tt.spec.Segment = nameOurs, t.TempDir(), 1<<20
			if _, err := leg.Run(tt.spec, openOurs); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

func TestLogRecord(t *testing.T) {
	for _, b := range append(full(), quick()...) {
		if b.kind != kindFrame {
			continue
		}
		if r, err := logRecord(b.size); err != nil || r.Size() != b.size {
			t.Errorf("%v: %d bytes, %v", b, r.Size(), err)
		}
	}
	if _, err := logRecord(20); err == nil {
		t.Error("a decision in 20 bytes passed")
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, "-peers is needed"},
		{[]string{"-peers", "p", "extra"}, `unknown argument "extra"`},
		{[]string{"-peers", "p", "-reps", "0"}, "must be positive"},
		{[]string{"-peers", "p", "-duration", "0s"}, "must be positive"},
	} {
		if _, err := parse(tt.args); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("parse(%q) = %v, want %s", tt.args, err, tt.want)
		}
	}
}

// The plans ask nobody what he cannot do, and quick asks nothing that full does
// not.
func TestPlans(t *testing.T) {
	for name, plan := range map[string][]block{"full": full(), "quick": quick()} {
		for _, b := range plan {
			if b.sides[0] != sideOurs {
				t.Errorf("%s: %v does not begin with ours", name, b)
			}
			for i, s := range b.sides {
				_, mine := own[s.name]
				if !mine && !slices.Contains(everyone, s.name) || s.batch && !slices.Contains(append([]string{nameFdatasync, nameDirect}, batchable...), s.name) || slices.Contains(b.sides[:i], s) {
					t.Errorf("%s: %v: side %v", name, b, s)
				}
			}
			if b.bytes() > minFree/2 {
				t.Errorf("%s: %v takes too much disk", name, b)
			}
		}
	}
}

func TestCheck(t *testing.T) {
	if err := check(filepath.Join(t.TempDir(), "absent")); err == nil {
		t.Error("a directory that is not there passed")
	}
	var fs unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &fs); err == nil && fs.Type == unix.TMPFS_MAGIC {
		if err := check("/dev/shm"); err == nil || !strings.Contains(err.Error(), "nothing is durable") {
			t.Errorf("memory passed: %v", err)
		}
	}
}
