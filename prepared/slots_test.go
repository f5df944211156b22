package prepared

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("PREPARED_KILL_DIR"); dir != "" {
		killedChild(dir)
	}
	os.Exit(m.Run())
}

// answering is a bundle whose policy allows and gives its version as reason.
func answering(t testing.TB, version string) (*Bundle, *Program) {
	t.Helper()
	b := policyBundle(t, version, "package autonomy\n\ndecision := {\"allow\": true, \"reasons\": [\""+version+"\"]}\n")
	return b, compiled(t, b)
}

func open(t testing.TB, dir string) (*Slots, []Fallback) {
	t.Helper()
	s, faults, err := OpenSlots(context.Background(), dir, SlotsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s, faults
}

func activate(t testing.TB, s *Slots, version string) {
	t.Helper()
	b, p := answering(t, version)
	if err := s.Activate(context.Background(), b, p, Meta{Source: SourceRelease, ReleaseID: "r-" + version, Sequence: 7}); err != nil {
		t.Fatal(err)
	}
}

// serving is "current active lkg" as versions, with - for none; it asks the
// program rather than its meta.
func serving(t testing.TB, s *Slots) string {
	t.Helper()
	current, st := "-", s.Status()
	if a := s.Current(); a != nil {
		d, err := a.Program.Eval(context.Background(), []byte(`{}`))
		if err != nil {
			t.Fatal(err)
		}
		current = d.Reasons[0].Message
		if a.Meta.Ref != "p@"+current {
			t.Errorf("the program answers %s, its meta says %s", current, a.Meta.Ref)
		}
	}
	name := func(i *SlotInfo) string {
		if i == nil {
			return "-"
		}
		return strings.TrimPrefix(i.Ref, "p@")
	}
	return current + " " + name(st.Active) + " " + name(st.LKG)
}

func wantServing(t testing.TB, s *Slots, want string) {
	t.Helper()
	if have := serving(t, s); have != want {
		t.Errorf("serving %s, want %s", have, want)
	}
}

// tree is every file below dir with its content.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			out[rel] = "directory"
			return nil
		}
		data, err := os.ReadFile(path)
		out[rel] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestSlots(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "policy")
	s, faults := open(t, dir)
	if len(faults) > 0 {
		t.Errorf("a new directory has faults: %v", faults)
	}
	wantServing(t, s, "- - -")
	if st := s.Status(); st.Serving != "none" {
		t.Errorf("%+v", st)
	}
	if err := s.Rollback(t.Context()); !errors.Is(err, ErrNoLKG) {
		t.Errorf("rollback of nothing: %v", err)
	}

	activate(t, s, "1.0.0")
	wantServing(t, s, "1.0.0 1.0.0 -")
	held := s.Current()
	activate(t, s, "2.0.0")
	wantServing(t, s, "2.0.0 2.0.0 1.0.0")
	if held.Meta.Version != "1.0.0" {
		t.Error("what a caller holds was changed")
	}
	activate(t, s, "2.0.0") // again: the LKG stays
	wantServing(t, s, "2.0.0 2.0.0 1.0.0")
	activate(t, s, "3.0.0")
	wantServing(t, s, "3.0.0 3.0.0 2.0.0")

	s, faults = open(t, dir)
	if len(faults) > 0 {
		t.Errorf("faults after a clean start: %v", faults)
	}
	wantServing(t, s, "3.0.0 3.0.0 2.0.0")
	if m := s.Current().Meta; m.ReleaseID != "r-3.0.0" || m.Sequence != 7 || m.Source != SourceRelease || time.Since(m.ActivatedAt) > time.Minute {
		t.Errorf("meta %+v", m)
	}
	if got := slices.Sorted(maps.Keys(tree(t, dir))); !slices.Equal(got, []string{".", "active", "active/bundle.tar.gz", "active/meta.json", "lkg", "lkg/bundle.tar.gz", "lkg/meta.json"}) {
		t.Errorf("left on disk: %v", got)
	}

	if err := s.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantServing(t, s, "2.0.0 2.0.0 2.0.0")
	s, _ = open(t, dir)
	wantServing(t, s, "2.0.0 2.0.0 2.0.0")

	raw, err := json.Marshal(s.Status())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"serving":"active"`, `"ref":"p@2.0.0"`, `"digest":"sha256:`, `"source":"release"`, `"sequence":7`, `"release_id":"r-2.0.0"`, `"evaluator":"`} {
		if !bytes.Contains(raw, []byte(want)) {
			t.Errorf("status %s lacks %s", raw, want)
		}
	}
}

func TestActivateRefuses(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir)
	activate(t, s, "1.0.0")
	before := tree(t, dir)
	b1, _ := answering(t, "2.0.0")
	b2, p2 := answering(t, "3.0.0")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	changed := *b2
	changed.Raw = append(bytes.Clone(b2.Raw), 0)
	for name, err := range map[string]error{
		"program of another bundle": s.Activate(t.Context(), b1, p2, Meta{}),
		"no program":                s.Activate(t.Context(), b1, nil, Meta{}),
		"changed bytes":             s.Activate(t.Context(), &changed, p2, Meta{}),
		"another digest":            s.Activate(t.Context(), b2, p2, Meta{Digest: b1.Digest}),
		"cancelled":                 s.Activate(cancelled, b2, p2, Meta{}),
		"huge meta":                 s.Activate(t.Context(), b2, p2, Meta{ReleaseID: strings.Repeat("r", maxMetaBytes)}),
	} {
		if err == nil {
			t.Errorf("%s: activated", name)
		}
	}
	wantServing(t, s, "1.0.0 1.0.0 -")
	if after := tree(t, dir); !maps.Equal(before, after) {
		t.Errorf("the disk changed: %v", slices.Sorted(maps.Keys(after)))
	}
}

// TestDamagedSlots damages what lies on disk in every way and starts again.
func TestDamagedSlots(t *testing.T) {
	flip := func(file string, at func(size int) int) func(t *testing.T, slot string) {
		return func(t *testing.T, slot string) {
			name := filepath.Join(slot, file)
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			data[at(len(data))] ^= 0x10
			if err := os.WriteFile(name, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	write := func(file, content string) func(t *testing.T, slot string) {
		return func(t *testing.T, slot string) {
			if err := os.WriteFile(filepath.Join(slot, file), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	cut := func(file string) func(t *testing.T, slot string) {
		return func(t *testing.T, slot string) {
			name := filepath.Join(slot, file)
			info, err := os.Stat(name)
			if err == nil {
				err = os.Truncate(name, info.Size()/2)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(file string) func(t *testing.T, slot string) {
		return func(t *testing.T, slot string) {
			if err := os.Remove(filepath.Join(slot, file)); err != nil {
				t.Fatal(err)
			}
		}
	}
	forged := func(change func(*Meta)) func(t *testing.T, slot string) {
		return func(t *testing.T, slot string) {
			data, err := os.ReadFile(filepath.Join(slot, metaFile))
			if err != nil {
				t.Fatal(err)
			}
			m, err := decodeMeta(data)
			if err != nil {
				t.Fatal(err)
			}
			change(&m)
			if data, err = encodeMeta(m); err != nil {
				t.Fatal(err)
			}
			write(metaFile, string(data))(t, slot)
		}
	}
	tests := []struct {
		name   string
		damage func(t *testing.T, slot string)
		why    string
	}{
		{"bundle: first byte", flip(bundleFile, func(int) int { return 0 }), "bundle.tar.gz has digest"},
		{"bundle: gzip time", flip(bundleFile, func(int) int { return 5 }), "bundle.tar.gz has digest"},
		{"bundle: middle", flip(bundleFile, func(n int) int { return n / 2 }), "bundle.tar.gz has digest"},
		{"bundle: last byte", flip(bundleFile, func(n int) int { return n - 1 }), "bundle.tar.gz has digest"},
		{"bundle: cut", cut(bundleFile), "bundle.tar.gz has digest"},
		{"bundle: empty", write(bundleFile, ""), "bundle.tar.gz has digest"},
		{"bundle: missing", remove(bundleFile), "no such file"},
		{"meta: first byte", flip(metaFile, func(int) int { return 0 }), "meta.json: "},
		{"meta: middle", flip(metaFile, func(n int) int { return n / 2 }), "meta.json: "},
		{"meta: last byte", flip(metaFile, func(n int) int { return n - 1 }), "meta.json: "},
		{"meta: cut", cut(metaFile), "meta.json: "},
		{"meta: empty", write(metaFile, ""), "meta.json: "},
		{"meta: missing", remove(metaFile), "no such file"},
		{"meta: unknown key", write(metaFile, `{"digest":"x","more":1}`), `unknown key "more"`},
		{"meta: duplicate key", write(metaFile, `{"digest":"x","digest":"y"}`), `duplicate key "digest"`},
		{"meta: oversized", write(metaFile, `{"digest":"`+strings.Repeat("x", maxMetaBytes)+`"}`), "meta.json: "},
		{"meta: another digest", forged(func(m *Meta) { m.Digest = Digest([]byte("x")) }), "bundle.tar.gz has digest"},
		{"meta: another ref", forged(func(m *Meta) { m.Ref = "p@9.9.9" }), "meta.json says p@9.9.9"},
		{"both missing", func(t *testing.T, slot string) { remove(metaFile)(t, slot); remove(bundleFile)(t, slot) }, "no such file"},
		{"a file in its place", func(t *testing.T, slot string) {
			if err := errors.Join(os.RemoveAll(slot), os.WriteFile(slot, nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		}, "not a directory"},
		{"slot missing", func(t *testing.T, slot string) {
			if err := os.RemoveAll(slot); err != nil {
				t.Fatal(err)
			}
		}, "no such file"},
		{"a whole bundle that does not compile", func(t *testing.T, slot string) {
			b := policyBundle(t, "2.0.0", "package autonomy\n\nallow if http.send({}).x\n")
			write(bundleFile, string(b.Raw))(t, slot)
			forged(func(m *Meta) { m.Digest = b.Digest })(t, slot)
		}, "http.send is not available"},
		{"whole, but no bundle", func(t *testing.T, slot string) {
			write(bundleFile, "x")(t, slot)
			forged(func(m *Meta) { m.Digest = Digest([]byte("x")) })(t, slot)
		}, "policy bundle refused"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s, _ := open(t, dir)
			activate(t, s, "1.0.0")
			activate(t, s, "2.0.0")

			// The active slot: the LKG takes its place.
			tt.damage(t, filepath.Join(dir, slotActive))
			s, faults := open(t, dir)
			wantServing(t, s, "1.0.0 - 1.0.0")
			if len(faults) != 1 || faults[0].Slot != "active" || faults[0].Replacement != "p@1.0.0" || !strings.Contains(faults[0].Why, tt.why) {
				t.Errorf("faults %+v, want one of active with %q", faults, tt.why)
			}
			if st := s.Status(); st.Serving != "lkg" || len(st.Fallbacks) != 1 {
				t.Errorf("status %+v", st)
			}
			again, faults := open(t, dir) // the evidence stays, and so does the answer
			wantServing(t, again, "1.0.0 - 1.0.0")
			if len(faults) != 1 {
				t.Errorf("second start: %+v", faults)
			}

			// The next activation mends it and does not make an LKG of the damage.
			activate(t, again, "3.0.0")
			wantServing(t, again, "3.0.0 3.0.0 1.0.0")
			if f := again.Status().Fallbacks; len(f) != 0 {
				t.Errorf("still told: %v", f)
			}
			s, faults = open(t, dir)
			wantServing(t, s, "3.0.0 3.0.0 1.0.0")
			if len(faults) != 0 {
				t.Errorf("after mending: %+v", faults)
			}

			// Only the LKG: the active one serves on, and it is told.
			if tt.name != "slot missing" {
				tt.damage(t, filepath.Join(dir, slotLKG))
				s, faults = open(t, dir)
				wantServing(t, s, "3.0.0 3.0.0 -")
				if len(faults) != 1 || faults[0].Slot != "lkg" || faults[0].Replacement != "none" {
					t.Errorf("faults %+v, want one of lkg", faults)
				}
				// Both: deny all.
				if err := os.Remove(filepath.Join(dir, slotActive, bundleFile)); err != nil {
					t.Fatal(err)
				}
				s, faults = open(t, dir)
				wantServing(t, s, "- - -")
				if len(faults) != 2 || faults[0].Replacement != "none" || s.Status().Serving != "none" {
					t.Errorf("faults %+v", faults)
				}
				if err := s.Rollback(t.Context()); !errors.Is(err, ErrNoLKG) {
					t.Errorf("rollback: %v", err)
				}
				activate(t, s, "4.0.0")
				wantServing(t, s, "4.0.0 4.0.0 -")
			}
		})
	}
}

// TestMetaBits: no bit of meta.json can be flipped unseen.
func TestMetaBits(t *testing.T) {
	data, err := encodeMeta(Meta{Digest: Digest(nil), Ref: "p@1.0.0", Version: "1.0.0", Source: SourceRelease, ReleaseID: "r", Sequence: 12, ActivatedAt: time.Unix(1, 0).UTC()})
	if err != nil {
		t.Fatal(err)
	}
	for i := range data {
		for bit := range 8 {
			flipped := bytes.Clone(data)
			flipped[i] ^= 1 << bit
			if m, err := decodeMeta(flipped); err == nil {
				t.Errorf("byte %d bit %d: %+v", i, bit, m)
			}
		}
	}
}

// TestActiveDamagedWhileRunning: a slot that went bad on disk does not become
// the LKG.
func TestActiveDamagedWhileRunning(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir)
	activate(t, s, "1.0.0")
	activate(t, s, "2.0.0")
	if err := os.WriteFile(filepath.Join(dir, slotActive, bundleFile), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	activate(t, s, "3.0.0")
	wantServing(t, s, "3.0.0 3.0.0 1.0.0")
	s, faults := open(t, dir)
	wantServing(t, s, "3.0.0 3.0.0 1.0.0")
	if len(faults) != 0 {
		t.Error(faults)
	}
}

// steps are the names of all steps of an operation, in order.
func steps(t *testing.T, setUp, op func(s *Slots) error) []string {
	t.Helper()
	s, _ := open(t, t.TempDir())
	if err := setUp(s); err != nil {
		t.Fatal(err)
	}
	var names []string
	s.opt.step = func(name string) error { names = append(names, name); return nil }
	if err := op(s); err != nil {
		t.Fatal(err)
	}
	return names
}

// scenarios are the operations that are cut short, each with what serves before
// and after. They run in this process (errors) and in a child (kill).
var scenarios = []struct {
	name          string
	versions      []string // activated before
	op            string   // version to activate, "early" before one that comes within the health window, or "rollback"
	before, after string
}{
	{"first", nil, "1.0.0", "- - -", "1.0.0 1.0.0 -"},
	{"second", []string{"1.0.0"}, "2.0.0", "1.0.0 1.0.0 -", "2.0.0 2.0.0 1.0.0"},
	{"third", []string{"1.0.0", "2.0.0"}, "3.0.0", "2.0.0 2.0.0 1.0.0", "3.0.0 3.0.0 2.0.0"},
	{"again", []string{"1.0.0", "2.0.0"}, "2.0.0", "2.0.0 2.0.0 1.0.0", "2.0.0 2.0.0 1.0.0"},
	{"rollback", []string{"1.0.0", "2.0.0"}, "rollback", "2.0.0 2.0.0 1.0.0", "1.0.0 1.0.0 1.0.0"},
	{"unproven", []string{"1.0.0", "2.0.0"}, "early 3.0.0", "2.0.0 2.0.0 1.0.0", "3.0.0 3.0.0 1.0.0"},
}

func doOp(t testing.TB, s *Slots, op string) error {
	if op == "rollback" {
		return s.Rollback(context.Background())
	}
	op, early := strings.CutPrefix(op, "early ") // the policy before was not in force for long
	if early {
		s.opt.HealthWindow = time.Hour
	}
	b, p := answering(t, op)
	return s.Activate(context.Background(), b, p, Meta{Source: SourceRelease, ReleaseID: "r-" + op, Sequence: 7})
}

// TestStepFails: each step of each operation fails in turn. Nothing has changed
// then, in memory or after a start, and the operation can be done again. The
// removal of what is left over is no part of it: its failure is not the caller's.
func TestStepFails(t *testing.T) {
	for _, sc := range scenarios {
		setUp := func(s *Slots) error {
			for _, v := range sc.versions {
				activate(t, s, v)
			}
			return nil
		}
		names := steps(t, setUp, func(s *Slots) error { return doOp(t, s, sc.op) })
		for i, name := range names {
			t.Run(fmt.Sprintf("%s/%d %s", sc.name, i, name), func(t *testing.T) {
				dir := t.TempDir()
				s, _ := open(t, dir)
				if err := setUp(s); err != nil {
					t.Fatal(err)
				}
				n, boom := 0, errors.New("the disk is on fire")
				s.opt.step = func(string) error {
					if n++; n == i+1 {
						return boom
					}
					return nil
				}
				err := doOp(t, s, sc.op)
				want := sc.before
				if strings.HasPrefix(name, "remove ") {
					want = sc.after
					if err != nil {
						t.Errorf("the operation failed for what is left over: %v", err)
					}
				} else if !errors.Is(err, boom) {
					t.Errorf("error %v", err)
				}
				wantServing(t, s, want)
				re, _ := open(t, dir)
				wantServing(t, re, want)
				s.opt.step = func(string) error { return nil }
				if err := doOp(t, re, sc.op); err != nil && want == sc.before {
					t.Errorf("again: %v", err)
				} else if want == sc.before {
					wantServing(t, re, sc.after)
				}
			})
		}
	}
}

// TestStepFailsWithoutActive: the active slot's directory is gone and the LKG
// serves. A failing activation then leaves the LKG where it is.
func TestStepFailsWithoutActive(t *testing.T) {
	for n := 1; ; n++ {
		dir := t.TempDir()
		s, _ := open(t, dir)
		activate(t, s, "1.0.0")
		activate(t, s, "2.0.0")
		if err := os.RemoveAll(filepath.Join(dir, slotActive)); err != nil {
			t.Fatal(err)
		}
		s, _ = open(t, dir)
		wantServing(t, s, "1.0.0 - 1.0.0")
		before := tree(t, dir)
		i := 0
		s.opt.step = func(string) error {
			if i++; i == n {
				return errors.New("the disk is on fire")
			}
			return nil
		}
		if err := doOp(t, s, "3.0.0"); err == nil {
			wantServing(t, s, "3.0.0 3.0.0 1.0.0")
			if n < 5 {
				t.Errorf("only %d steps", n)
			}
			return
		}
		wantServing(t, s, "1.0.0 - 1.0.0")
		if after := tree(t, dir); !maps.Equal(before, after) {
			t.Errorf("step %d: the disk changed: %v", n, slices.Sorted(maps.Keys(after)))
		}
	}
}

// TestKilledAtEachStep kills a child process at each step of each operation,
// starts again, and finds what was before or what comes after: never a mixture,
// never nothing, never a fault other than the interruption. What was started
// again can be killed in its own recovery, too.
func TestKilledAtEachStep(t *testing.T) {
	for i, sc := range scenarios {
		setUp := func(s *Slots) error {
			for _, v := range sc.versions {
				activate(t, s, v)
			}
			return nil
		}
		names := steps(t, setUp, func(s *Slots) error { return doOp(t, s, sc.op) })
		committed := slices.Index(names, "sync committed")
		for k, name := range names {
			t.Run(fmt.Sprintf("%s/%d %s", sc.name, k, name), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				s, _ := open(t, dir)
				if err := setUp(s); err != nil {
					t.Fatal(err)
				}
				killed(t, dir, i, k+1)
				want := sc.before
				if k >= committed { // the rename was made before this step
					want = sc.after
				}
				// Where directories were moved, the recovery is killed as well, at each
				// of its steps in turn.
				moved := strings.Contains(name, " to ") || strings.HasPrefix(name, "sync ")
				for r := 1; moved && (sc.name == "third" || sc.name == "rollback" || sc.name == "unproven") && killed(t, dir, -1, r); r++ {
					if r > 20 {
						t.Fatal("recovery does not end")
					}
				}
				re, faults := open(t, dir)
				wantServing(t, re, want)
				for _, f := range faults {
					if !strings.Contains(f.Why, "was interrupted") {
						t.Errorf("fault %+v", f)
					}
				}
				if err := doOp(t, re, sc.op); err != nil {
					t.Errorf("again: %v", err)
				}
			})
		}
	}
}

// killed runs a child that opens dir and does scenario's operation (-1: only
// opens), killed before its n-th step. False: it ended before that.
func killed(t *testing.T, dir string, scenario, n int) bool {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^$")
	cmd.Env = append(os.Environ(), "PREPARED_KILL_DIR="+dir, "PREPARED_KILL_OP="+strconv.Itoa(scenario), "PREPARED_KILL_STEP="+strconv.Itoa(n))
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child was not killed: %v\n%s", err, out)
	}
	return true
}

func killedChild(dir string) {
	left, _ := strconv.Atoi(os.Getenv("PREPARED_KILL_STEP"))
	op, _ := strconv.Atoi(os.Getenv("PREPARED_KILL_OP"))
	step := func(string) error {
		if left--; left == 0 {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	}
	o := SlotsOptions{step: step}
	if op >= 0 {
		o.step = nil
	}
	s, _, err := OpenSlots(context.Background(), dir, o)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	if op >= 0 {
		s.opt.step = step
		if err := doOp(&childTB{}, s, scenarios[op].op); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	os.Exit(0)
}

// childTB lets the helpers run outside of a test.
type childTB struct{ testing.TB }

func (childTB) Helper() {}
func (childTB) Fatal(args ...any) {
	fmt.Println(args...)
	os.Exit(1)
}

// TestActivateUnderLoad is TestSwapsUnderLoad with everything on disk.
func TestActivateUnderLoad(t *testing.T) {
	s, _ := open(t, t.TempDir())
	activate(t, s, "1.0.0")
	var done atomic.Bool
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for !done.Load() {
				a := s.Current()
				d, err := a.Program.Eval(context.Background(), []byte(`{}`))
				if err != nil || "p@"+d.Reasons[0].Message != a.Meta.Ref {
					t.Errorf("held %s, answer %+v, %v", a.Meta.Ref, d, err)
					return
				}
				s.Status()
			}
		})
	}
	for i := range 20 {
		activate(t, s, fmt.Sprintf("%d.0.0", i%3+1))
		if i%5 == 4 {
			if err := s.Rollback(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
	done.Store(true)
	wg.Wait()
}

func BenchmarkActivate(b *testing.B) {
	s, _ := open(b, b.TempDir())
	var bundles [2]*Bundle
	var programs [2]*Program
	for i, v := range []string{"1.0.0", "2.0.0"} {
		bundles[i], programs[i] = answering(b, v)
	}
	for i := 0; b.Loop(); i++ {
		if err := s.Activate(context.Background(), bundles[i%2], programs[i%2], Meta{Source: SourceLocal}); err != nil {
			b.Fatal(err)
		}
	}
}
