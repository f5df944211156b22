package prepared

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// judging is a policy that answers as rego says, under a version.
func judging(t testing.TB, version, rego string) (*Bundle, *Program) {
	t.Helper()
	b := policyBundle(t, version, "package autonomy\n\n"+rego)
	return b, compiled(t, b)
}

func openWith(t testing.TB, dir string, o SlotsOptions) *Slots {
	t.Helper()
	s, faults, err := OpenSlots(context.Background(), dir, o)
	if err != nil || len(faults) > 0 {
		t.Fatal(err, faults)
	}
	return s
}

// TestShadow: a candidate answers beside the policy in force, is counted, and
// changes no answer.
func TestShadow(t *testing.T) {
	const active = `decision := {"allow": input.n > 0, "constraints": {"timeout_ms": 10}}`
	for _, tt := range []struct {
		name, rego string
		n          int
		want       ShadowStats
	}{
		{"same", active, 1, ShadowStats{Sampled: 1, Same: 1}},
		{"same deny, other limits", `decision := {"allow": false, "constraints": {"timeout_ms": 5}}`, 0, ShadowStats{Sampled: 1, Same: 1}},
		{"looser", `decision := true`, 0, ShadowStats{Sampled: 1, Looser: 1}},
		{"stricter", `decision := false`, 1, ShadowStats{Sampled: 1, Stricter: 1}},
		{"asks a human", `decision := {"allow": true, "approval": {"by": "x"}}`, 1, ShadowStats{Sampled: 1, Stricter: 1}},
		{"human instead of deny", `decision := {"allow": true, "approval": {"by": "x"}}`, 0, ShadowStats{Sampled: 1, Looser: 1}},
		{"other limits", `decision := {"allow": true, "constraints": {"timeout_ms": 5}}`, 1, ShadowStats{Sampled: 1, Other: 1}},
		{"other reasons", `decision := {"allow": true, "reasons": ["r"], "constraints": {"timeout_ms": 10}}`, 1, ShadowStats{Sampled: 1, Same: 1}},
		{"undefined", `decision := true if input.m`, 1, ShadowStats{Sampled: 1, Stricter: 1, Failed: 1}},
		{"fails where the other denies", `decision := {"allow": 1}`, 0, ShadowStats{Sampled: 1, Same: 1, Failed: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := openWith(t, t.TempDir(), SlotsOptions{ShadowEvery: 1})
			b, p := judging(t, "2.0.0", tt.rego)
			if err := s.Stage(b, p, Meta{}); err == nil || !strings.Contains(err.Error(), "no policy is in force") {
				t.Errorf("staged beside nothing: %v", err)
			}
			ab, ap := judging(t, "1.0.0", active)
			if err := s.Activate(t.Context(), ab, ap, Meta{Source: SourceRelease}); err != nil {
				t.Fatal(err)
			}
			if err := s.Stage(b, p, Meta{Source: SourceRelease, ReleaseID: "r-2", Sequence: 2}); err != nil {
				t.Fatal(err)
			}
			d, err := s.Current().Eval(t.Context(), fmt.Appendf(nil, `{"n": %d}`, tt.n))
			if err != nil || d.Allow != (tt.n > 0) || d.Constraints.TimeoutMS != 10 {
				t.Errorf("answer %+v, %v: not that of the policy in force", d, err)
			}
			s.running.Wait()
			st := s.Status()
			if st.Serving != "active" || st.Active.Ref != "p@1.0.0" || st.Candidate == nil || st.Candidate.Ref != "p@2.0.0" || st.Candidate.ReleaseID != "r-2" {
				t.Fatalf("status %+v", st)
			}
			if st.Candidate.Shadow != tt.want {
				t.Errorf("counted %+v, want %+v", st.Candidate.Shadow, tt.want)
			}
			s.Close()
		})
	}
}

// TestShadowSample: one in N calls is evaluated, one at a time; what comes
// meanwhile is counted, and a call that was cut short says nothing.
func TestShadowSample(t *testing.T) {
	s := openWith(t, t.TempDir(), SlotsOptions{ShadowEvery: 4})
	activate(t, s, "1.0.0")
	b, p := answering(t, "2.0.0")
	if err := s.Stage(b, p, Meta{}); err != nil {
		t.Fatal(err)
	}
	a := s.Current()
	for range 12 {
		if _, err := a.Eval(t.Context(), []byte(`{}`)); err != nil {
			t.Fatal(err)
		}
		s.running.Wait()
	}
	if st := s.Status().Candidate.Shadow; st.Sampled != 3 || st.Same != 3 {
		t.Errorf("12 calls, one in 4: %+v", st)
	}
	a.shadow.busy.Store(true)
	for range 8 {
		a.Eval(t.Context(), []byte(`{}`))
	}
	a.shadow.busy.Store(false)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for range 4 {
		if _, err := a.Eval(gone, []byte(`{}`)); !errors.Is(err, ErrBudget) {
			t.Fatal(err)
		}
	}
	s.running.Wait()
	if st := s.Status().Candidate.Shadow; st.Skipped != 2 || st.Sampled != 3 {
		t.Errorf("busy for 8 calls, then 4 that were cut: %+v", st)
	}
	s.Close()
}

// TestPromote: the candidate's way into force, and what ends it.
func TestPromote(t *testing.T) {
	dir := t.TempDir()
	s := openWith(t, dir, SlotsOptions{})
	if err := s.Promote(t.Context()); !errors.Is(err, ErrNoCandidate) {
		t.Errorf("promoted nothing: %v", err)
	}
	activate(t, s, "1.0.0")
	stage := func(version string) {
		t.Helper()
		b, p := answering(t, version)
		if err := s.Stage(b, p, Meta{Source: SourceRelease, ReleaseID: "r-" + version, Sequence: 7}); err != nil {
			t.Fatal(err)
		}
	}
	stage("2.0.0")
	wantServing(t, s, "1.0.0 1.0.0 -")
	s.opt.step = func(string) error { return errors.New("the disk is on fire") }
	if err := s.Promote(t.Context()); err == nil || s.Status().Candidate == nil {
		t.Errorf("promoted with a broken disk: %v, %+v", err, s.Status())
	}
	s.opt.step = func(string) error { return nil }
	if err := s.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantServing(t, s, "2.0.0 2.0.0 1.0.0")
	if st := s.Status(); st.Candidate != nil || st.Active.ReleaseID != "r-2.0.0" {
		t.Errorf("%+v", st)
	}
	stage("3.0.0")
	s.Discard()
	s.Discard()
	if st := s.Status(); st.Candidate != nil || s.Current().shadow != nil {
		t.Errorf("discarded: %+v", st)
	}
	for name, change := range map[string]func() error{
		"activation": func() error { activate(t, s, "4.0.0"); return nil },
		"rollback":   func() error { return s.Rollback(t.Context()) },
	} {
		stage("3.0.0")
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if s.Status().Candidate != nil || s.Current().shadow != nil {
			t.Errorf("the candidate outlived an %s", name)
		}
	}
	stage("5.0.0")
	re, _ := open(t, dir)
	if re.Status().Candidate != nil {
		t.Error("a candidate was found on disk")
	}
	// A candidate in the shadow of the LKG, which serves for a damaged active slot.
	re.state.Store(&slotSet{current: re.state.Load().lkg, lkg: re.state.Load().lkg})
	b, p := answering(t, "6.0.0")
	if err := re.Stage(b, p, Meta{}); err != nil {
		t.Fatal(err)
	}
	if st := re.Status(); st.Serving != "lkg" || st.Candidate == nil {
		t.Errorf("%+v", st)
	}
	if err := re.Promote(t.Context()); err != nil || re.state.Load().lkg.shadow != nil {
		t.Error(err)
	}
}

// TestHealthWindow: only a policy that was in force long enough, and answers,
// displaces an LKG.
func TestHealthWindow(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	dir := t.TempDir()
	o := SlotsOptions{HealthWindow: time.Hour, now: func() time.Time { return now }}
	s := openWith(t, dir, o)
	activate(t, s, "1.0.0")
	activate(t, s, "2.0.0") // at once, but better than no LKG
	wantServing(t, s, "2.0.0 2.0.0 1.0.0")
	now = now.Add(time.Hour - time.Second)
	activate(t, s, "3.0.0") // 2.0.0 was not in force for an hour
	wantServing(t, s, "3.0.0 3.0.0 1.0.0")
	now = now.Add(30 * time.Minute)
	s = openWith(t, dir, o)
	wantServing(t, s, "3.0.0 3.0.0 1.0.0")
	now = now.Add(30 * time.Minute) // the window goes on across a start
	activate(t, s, "4.0.0")
	wantServing(t, s, "4.0.0 4.0.0 3.0.0")
	now = now.Add(-24 * time.Hour) // a clock that was set back proves nothing
	activate(t, s, "5.0.0")
	wantServing(t, s, "5.0.0 5.0.0 3.0.0")

	// One that answers nobody is not known good, however long it is in force.
	b, p := judging(t, "6.0.0", `decision := {"allow": 1 / input.n > 0}`)
	if err := s.Activate(t.Context(), b, p, Meta{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Current().Eval(t.Context(), []byte(`{"n": 0}`)); !errors.Is(err, ErrEvaluation) {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Hour)
	activate(t, s, "7.0.0")
	wantServing(t, s, "7.0.0 7.0.0 3.0.0")
	// A caller who sends what it fails on does not make it bad.
	if err := s.Activate(t.Context(), b, p, Meta{}); err != nil {
		t.Fatal(err)
	}
	for _, in := range []string{`{"n": 0}`, `{"n": 1}`, `{"n": 0}`} {
		s.Current().Eval(t.Context(), []byte(in))
	}
	now = now.Add(2 * time.Hour)
	activate(t, s, "8.0.0")
	if st := s.Status(); st.LKG.Ref != "p@6.0.0" {
		t.Errorf("LKG %+v", st.LKG)
	}
}

// TestIncompatibleSlot: a slot that this program cannot serve counts as one that
// cannot be read.
func TestIncompatibleSlot(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir)
	activate(t, s, "1.0.0")
	activate(t, s, "2.0.0")
	for _, tt := range []struct {
		refused  string
		serving  string
		replaced []string
	}{
		{"2", "1.0.0 - 1.0.0", []string{"p@1.0.0"}},
		{"1", "2.0.0 2.0.0 -", []string{"none"}},
		{"12", "- - -", []string{"none", "none"}},
	} {
		s, faults, err := OpenSlots(t.Context(), dir, SlotsOptions{Compatible: func(b *Bundle) error {
			if strings.Contains(tt.refused, b.Version[:1]) {
				return errors.New("it needs runtime 9")
			}
			return nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		wantServing(t, s, tt.serving)
		for i, f := range faults {
			if i >= len(tt.replaced) || f.Replacement != tt.replaced[i] || !strings.Contains(f.Why, "not compatible with this program: it needs runtime 9") {
				t.Errorf("refused %s: faults %+v", tt.refused, faults)
			}
		}
		if len(faults) != len(tt.replaced) {
			t.Errorf("refused %s: %d faults, want %d", tt.refused, len(faults), len(tt.replaced))
		}
	}
}

// TestOldProgramsAreFreed: what was replaced is garbage once the last evaluation
// with it has returned, and not before.
func TestOldProgramsAreFreed(t *testing.T) {
	s := openWith(t, t.TempDir(), SlotsOptions{ShadowEvery: 1})
	var freed atomic.Int64
	put := func(version string) {
		b, p := answering(t, version)
		runtime.AddCleanup(p, func(int) { freed.Add(1) }, 0)
		if err := s.Activate(t.Context(), b, p, Meta{}); err != nil {
			t.Fatal(err)
		}
		b, p = answering(t, version)
		runtime.AddCleanup(p, func(int) { freed.Add(1) }, 0)
		if err := s.Stage(b, p, Meta{}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Current().Eval(t.Context(), []byte(`{}`)); err != nil {
			t.Fatal(err)
		}
		s.running.Wait()
	}
	collected := func(want int64) bool {
		for range 200 {
			runtime.GC()
			if freed.Load() >= want {
				return true
			}
			time.Sleep(10 * time.Millisecond) // cleanups run in their own goroutine
		}
		return false
	}
	put("1.0.0")
	held := s.Current() // a call that takes long
	for i := range 5 {
		put(fmt.Sprintf("%d.0.0", i+2))
	}
	// 12 were made. Active, LKG, candidate and the held one with its shadow live.
	if !collected(12 - 5) {
		t.Errorf("%d of 12 programs were freed, want 7", freed.Load())
	}
	if d, err := held.Eval(t.Context(), []byte(`{}`)); err != nil || d.Reasons[0].Message != "1.0.0" {
		t.Errorf("the held one answers %+v, %v", d, err)
	}
	if n := freed.Load(); n != 7 {
		t.Errorf("%d were freed, one of them in use", n)
	}
	held = nil
	s.running.Wait()
	if !collected(12 - 3) {
		t.Errorf("%d of 12 programs were freed, want 9: only active, LKG and candidate are left", freed.Load())
	}
	runtime.KeepAlive(s)
}

// TestSwapsUnderLoad swaps the whole set 10,000 times by all the ways there are
// while others ask it. Every decision belongs to exactly one version, which the
// caller holds with it.
func TestSwapsUnderLoad(t *testing.T) {
	const swaps = 10_000
	s := openWith(t, t.TempDir(), SlotsOptions{ShadowEvery: 1})
	type pair struct {
		b *Bundle
		p *Program
	}
	var pairs [3]pair
	for i := range pairs {
		pairs[i].b, pairs[i].p = answering(t, fmt.Sprintf("%d.0.0", i+1))
	}
	if err := s.Activate(t.Context(), pairs[0].b, pairs[0].p, Meta{}); err != nil {
		t.Fatal(err)
	}
	var done atomic.Bool
	var evals [len(pairs)]atomic.Int64
	var asking sync.WaitGroup
	for range 3 {
		asking.Go(func() {
			for !done.Load() {
				a := s.Current()
				d, err := a.Eval(context.Background(), []byte(`{"kind":"tool.echo"}`))
				if err != nil || !d.Allow || len(d.Reasons) != 1 || d.Reasons[0].Message != a.Meta.Version {
					t.Errorf("held %s, answer %+v, %v", a.Meta.Version, d, err)
					return
				}
				evals[d.Reasons[0].Message[0]-'1'].Add(1)
			}
		})
	}
	var seen [len(pairs)]int64
	for i := range swaps {
		next := pairs[i%len(pairs)]
		var err error
		switch {
		case i%1000 == 999: // through the disk
			err = s.Promote(t.Context())
		case i%4 == 3:
			s.Discard()
		case i%4 == 2: // in memory, as activate does once the disk has it
			a, aerr := s.newActive(next.b, next.p, Meta{})
			s.mu.Lock()
			s.state.Store(&slotSet{current: a, active: a, lkg: s.state.Load().active.alone()})
			s.mu.Unlock()
			err = aerr
		default:
			err = s.Stage(next.b, next.p, Meta{})
		}
		if err != nil && !errors.Is(err, ErrNoCandidate) {
			t.Fatal(err)
		}
		if i%64 == 0 { // wait until somebody has asked the set that is there
			at := s.Current().Meta.Version[0] - '1'
			for seen[at] = evals[at].Load(); evals[at].Load() == seen[at] && !t.Failed(); {
				runtime.Gosched()
			}
		}
	}
	done.Store(true)
	asking.Wait()
	s.Close()
	for i := range evals {
		if evals[i].Load() == 0 {
			t.Errorf("version %d never answered", i+1)
		}
	}
	t.Logf("%d swaps, answers by version: %d %d %d", swaps, evals[0].Load(), evals[1].Load(), evals[2].Load())
}
