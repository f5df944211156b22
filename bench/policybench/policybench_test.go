package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/bench/internal/results"
	"github.com/autonomyops/autonomy/bench/policybench/leg"
	"github.com/autonomyops/autonomy/prepared"
)

// TestMain makes the test binary our side and its own peers.
func TestMain(m *testing.M) {
	switch arg := append(os.Args, "")[1]; {
	case arg == legCommand:
		os.Exit(leg.Main(os.Args[2:], own))
	case strings.HasPrefix(arg, "{"):
		os.Exit(leg.Main(os.Args[1:], map[string]leg.Open{namePlain: openOurs, nameBest: openOurs, nameCedar: openOurs}))
	}
	os.Exit(m.Run())
}

// small is what a test has time for.
func small() []block {
	return slices.DeleteFunc(plan(), func(b block) bool { return b.policy != "desk" })
}

func quickOptions(t *testing.T) *options {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	o, err := parse([]string{"-peers", self, "-work", t.TempDir(), "-out", t.TempDir(), "-reps", "2", "-duration", "80ms", "-warmup", "5ms"})
	if err != nil {
		t.Fatal(err)
	}
	o.plan = small()
	return o
}

// TestRun measures for real, with ours in the place of the peers.
func TestRun(t *testing.T) {
	o := quickOptions(t)
	var stdout bytes.Buffer
	if err := run(t.Context(), o, &stdout); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(o.out, "latest.json"))
	if err != nil {
		t.Fatal(err)
	}
	var rows []results.Row
	if err := json.Unmarshal(raw, &rows); err != nil {
		t.Fatal(err)
	}
	targets := 0
	for _, r := range rows {
		if r.Area != area || r.Unit == "" && !strings.HasSuffix(r.Name, mSwaps.name) {
			t.Errorf("%+v", r)
		}
		if r.Target != nil {
			targets++
		}
		if r.Value < 0 || r.Ours <= 0 && !strings.Contains(r.Name, "alloc") {
			t.Errorf("nothing was measured: %+v", r)
		}
	}
	if targets != 5+1+1 {
		t.Errorf("%d targets", targets)
	}
	page, err := os.ReadFile(filepath.Join(o.out, "latest.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"### Decision, desk policy, one goroutine", "| cedar-go |", "### Swap under load, desk policy", "| figure | ours |"} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page has no %q", want)
		}
	}
	if left, err := os.ReadDir(o.work); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestTargets: the targets are judged as they are meant.
func TestTargets(t *testing.T) {
	at := func(rate, allocs float64) leg.Result {
		return leg.Result{Decisions: int64(rate), Took: time.Second, Allocs: allocs}
	}
	r := &report{options: &options{plan: plan(), reps: 1}, data: map[string]int64{"large": 10 << 20}, legs: map[cell][]leg.Result{}}
	for i, b := range r.options.plan {
		for _, s := range b.sides {
			switch {
			case b.mode == leg.Load:
				r.legs[cell{i, s}] = []leg.Result{{Open: time.Second, RSS: 80 << 20}}
			case b.mode == leg.Swap:
				r.legs[cell{i, s}] = []leg.Result{{P99: 100, SwapP99: 124}}
			default:
				r.legs[cell{i, s}] = []leg.Result{at(map[string]float64{nameOurs: 300_000 * float64(b.goroutines), nameTopdown: 14_500,
					namePlain: 10_000, nameBest: 15_000, nameCedar: 120_000}[s], 0.01)}
			}
		}
	}
	for _, row := range r.targetRows() {
		if !*row.Met {
			t.Errorf("not met: %s beside %s, %v", row.Name, row.Peer, row.Ratio)
		}
	}
	for i, b := range r.options.plan {
		for _, s := range b.sides {
			switch {
			case b.mode == leg.Load:
				r.legs[cell{i, s}] = []leg.Result{{Open: 2001 * time.Millisecond, RSS: 81 << 20}}
			case b.mode == leg.Swap:
				r.legs[cell{i, s}] = []leg.Result{{P99: 100, SwapP99: 127}}
			case s == nameOurs:
				r.legs[cell{i, s}] = []leg.Result{at(299_000+239_000*float64(b.goroutines-1), 1)}
			case s == nameTopdown:
				r.legs[cell{i, s}] = []leg.Result{at(14_000, 0)}
			}
		}
	}
	for _, row := range r.targetRows() {
		if *row.Met {
			t.Errorf("met: %s beside %s, %v", row.Name, row.Peer, row.Ratio)
		}
	}
}

// TestConformance reads what the conformance test prints.
func TestConformance(t *testing.T) {
	name := filepath.Join(t.TempDir(), "out")
	for text, want := range map[string]string{
		"    x_test.go:81: conformance: 2400 cases: 2390 passed compiled, 10 fell back, 0 failed\n":  "yes yes",
		"    x_test.go:81: conformance: 2400 cases: 2000 passed compiled, 399 fell back, 1 failed\n": "no no",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		o, err := parse([]string{"-peers", "x", "-conformance", name})
		if err != nil {
			t.Fatal(err)
		}
		o.plan = nil
		var met []string
		for _, row := range (&report{options: o}).targetRows() {
			met = append(met, map[bool]string{true: "yes", false: "no"}[*row.Met])
		}
		if got := strings.Join(met, " "); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
	if err := os.WriteFile(name, []byte("PASS\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{name, name + ".absent"} {
		if _, err := parse([]string{"-peers", "x", "-conformance", file}); err == nil {
			t.Errorf("%s was taken", file)
		}
	}
}

// TestCases: the policies are the same in every run, of the size that they are
// meant to have, and what a node would take.
func TestCases(t *testing.T) {
	for name, size := range map[string][2]int64{"desk": {200 << 10, 260 << 10}, "mail": {200 << 10, 260 << 10}} {
		var sums []string
		for range 2 {
			dir := t.TempDir()
			c := cases[name]()
			if err := c.write(dir); err != nil {
				t.Fatal(err)
			}
			sum := sha256.New()
			err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				data, err := os.ReadFile(path)
				fmt.Fprintf(sum, "%s %d\n", d.Name(), len(data))
				sum.Write(data)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			sums = append(sums, fmt.Sprintf("%x", sum.Sum(nil)))
			info, err := os.Stat(filepath.Join(dir, "data.json"))
			if err != nil {
				t.Fatal(err)
			}
			if info.Size() < size[0] || info.Size() > size[1] {
				t.Errorf("%s has %d bytes of data", name, info.Size())
			}
			b, err := prepared.ReadBundleFile(filepath.Join(dir, "bundle.tar.gz"), prepared.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if found := prepared.LintBundle(b); len(found) > 0 {
				t.Errorf("%s: %v", name, found)
			}
			p, err := prepared.Compile(t.Context(), b)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range c.calls {
				input, err := json.Marshal(s.input)
				if err != nil {
					t.Fatal(err)
				}
				d, err := p.Eval(t.Context(), input)
				if err != nil || d.Allow != strings.HasPrefix(s.name, "allow_") || len(input) < 500 || len(input) > 1200 {
					t.Errorf("%s, %s (%d bytes): %+v, %v", name, s.name, len(input), d, err)
				}
			}
		}
		if sums[0] != sums[1] {
			t.Errorf("%s is another one each time", name)
		}
	}
}

// TestLegs: what a leg refuses.
func TestLegs(t *testing.T) {
	dir := t.TempDir()
	if err := desk().write(dir); err != nil {
		t.Fatal(err)
	}
	wrong := func(string) (leg.Policy, error) { return always(`{"allow":true,"reasons":[]}`), nil }
	nonsense := func(string) (leg.Policy, error) { return always(`{"reasons":[]}`), nil }
	for _, tt := range []struct {
		spec leg.Spec
		open leg.Open
		want string
	}{
		{leg.Spec{Mode: leg.Eval, Dir: dir, Goroutines: 1}, wrong, "deny_host.json: the answer is"},
		{leg.Spec{Mode: leg.Eval, Dir: dir, Goroutines: 1}, nonsense, "is no decision"},
		{leg.Spec{Mode: leg.Eval, Dir: dir}, openOurs, "0 goroutines"},
		{leg.Spec{Mode: leg.Swap, Dir: dir}, openOurs, "cannot be swapped"},
		{leg.Spec{Mode: "other", Dir: dir}, openOurs, "no mode"},
		{leg.Spec{Mode: leg.Load, Dir: t.TempDir()}, openOurs, "no sample calls"},
		{leg.Spec{Mode: leg.Load, Dir: dir}, wrong, "the answer is"},
	} {
		if _, err := leg.Run(tt.spec, tt.open); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.spec, err, tt.want)
		}
	}
	for _, args := range [][]string{{}, {"-peers", "x", "-reps", "0"}, {"-peers", "x", "more"}} {
		if _, err := parse(args); err == nil {
			t.Errorf("%q was taken", args)
		}
	}
	o := quickOptions(t)
	o.peers = "/bin/false"
	if err := run(context.Background(), o, io.Discard); err == nil || !strings.Contains(err.Error(), "false") {
		t.Errorf("with a peer that fails: %v", err)
	}
}

type always string

func (a always) Decider() leg.Decider {
	return func(dst, _ []byte) ([]byte, error) { return append(dst, a...), nil }
}
