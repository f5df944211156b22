package release_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/verify"
)

// TestAdmit: what judges the compiled policy can refuse it for good, or put it off.
func TestAdmit(t *testing.T) {
	w := newWorld(t)
	var verdict error
	w.admit = func(_ context.Context, p *prepared.Program) error {
		if p.Bundle().Ref() != "p@1.0.0" {
			t.Errorf("asked about %s", p.Bundle().Ref())
		}
		return verdict
	}
	w.start()
	w.publish(3, nil)
	verdict = fmt.Errorf("the machine was busy: %w", prepared.ErrBudget)
	if err := w.poller.Poll(t.Context()); !errors.Is(err, prepared.ErrBudget) || w.slots.Current() != nil {
		t.Fatalf("put off: %v", err)
	}
	verdict = nil
	w.poll()
	if w.slots.Current() == nil || len(w.poller.State().Refused) != 0 {
		t.Fatal("it did not come into force when it could be judged")
	}
	for i, tt := range []struct {
		err  error
		code string
	}{
		{fmt.Errorf("%w: deny.json: /params/path", prepared.ErrFailOpen), "policy_fails_open"},
		{errors.New("a sample call is no call"), "activation_failed"},
	} {
		w.drain()
		w.publish(uint64(4+i), nil)
		verdict = tt.err
		w.poll()
		r := w.poller.State().Refused
		if len(r) != i+1 || r[i].Code != tt.code || r[i].Detail != tt.err.Error() {
			t.Errorf("refused %+v, want %s", r, tt.code)
		}
		if e := w.drain(); e[len(e)-1] != event.ReleaseRefused || w.slots.Current().Meta.ReleaseID != "stable-3" {
			t.Errorf("events %q, in force %s", e, w.slots.Current().Meta.ReleaseID)
		}
	}
}

// TestShadow: a release waits in shadow, then comes into force; the first one
// does not wait.
func TestShadow(t *testing.T) {
	w := newWorld(t)
	w.shadow = time.Hour
	w.start()
	w.publish(3, nil)
	w.poll()
	if e := w.drain(); !slices.Equal(e, passedEvents) || w.slots.Current().Meta.ReleaseID != "stable-3" {
		t.Fatalf("the first release: %q", e)
	}
	inShadow := func(id string) {
		t.Helper()
		c := w.slots.Status().Candidate
		if c == nil || c.ReleaseID != id || w.slots.Current().Meta.ReleaseID != "stable-3" || w.poller.Active().ReleaseID != "stable-3" {
			t.Fatalf("candidate %+v, in force %s", c, w.slots.Current().Meta.ReleaseID)
		}
	}
	w.publish(4, nil)
	w.poll()
	inShadow("stable-4")
	shadowed := append(slices.Clone(passedEvents[:5]), event.ReleaseShadow)
	if e := w.drain(); !slices.Equal(e, shadowed) {
		t.Errorf("events %q, want %q", e, shadowed)
	}
	w.now = w.now.Add(time.Hour - time.Second)
	w.poll()
	inShadow("stable-4")

	// A newer one takes its place and waits anew.
	w.publish(5, nil)
	w.poll()
	inShadow("stable-5")
	w.drain()
	w.now = w.now.Add(2 * time.Second)
	w.poll()
	inShadow("stable-5")

	// A restart forgets the shadow; the release is fetched and staged again.
	w.start()
	if w.slots.Status().Candidate != nil {
		t.Fatal("a candidate outlived the process")
	}
	w.poll()
	inShadow("stable-5")
	w.drain()

	// The end of the shadow needs no control plane.
	w.cp.Close()
	w.now = w.now.Add(time.Hour)
	if err := w.poller.Poll(t.Context()); err == nil {
		t.Error("a poll of nobody succeeded")
	}
	if e := w.drain(); !slices.Equal(e, []string{event.ReleaseActivated}) {
		t.Errorf("events %q", e)
	}
	if a := w.slots.Current(); a.Meta.ReleaseID != "stable-5" || w.poller.Active().ReleaseID != "stable-5" || w.slots.Status().Candidate != nil {
		t.Errorf("in force %+v", a.Meta)
	}
}

// TestShadowEndsOtherwise: a release that expires in shadow is refused, and one
// whose candidate was taken away does not come into force.
func TestShadowEndsOtherwise(t *testing.T) {
	w := newWorld(t)
	w.shadow = 30 * time.Hour // the releases expire after 24
	w.start()
	w.publish(3, nil)
	w.poll()
	w.publish(4, nil)
	w.poll()
	w.now = w.now.Add(w.shadow)
	w.poll()
	if r := w.poller.State().Refused; len(r) != 1 || r[0].Code != verify.CodeExpired || w.slots.Status().Candidate != nil {
		t.Errorf("refused %+v", r)
	}
	w.now = now
	w.publish(5, nil)
	w.poll()
	w.slots.Discard()
	w.now = w.now.Add(w.shadow)
	w.poll()
	if a := w.slots.Current(); a.Meta.ReleaseID != "stable-3" || w.poller.Active().ReleaseID != "stable-3" {
		t.Errorf("in force %+v", a.Meta)
	}
}

// TestShadowMends: the release whose slot is damaged comes back at once: it was in
// force before.
func TestShadowMends(t *testing.T) {
	w := newWorld(t)
	w.publish(1, nil)
	w.poll()
	w.publish(2, nil)
	w.poll()
	if err := os.WriteFile(filepath.Join(w.dir, "policy", "active", "bundle.tar.gz"), []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.shadow = time.Hour
	w.start()
	if a := w.slots.Current(); a == nil || a.Meta.Sequence != 1 {
		t.Fatalf("the last known good policy is not in force: %+v", a)
	}
	w.poll()
	if st := w.slots.Status(); st.Serving != prepared.ServingActive || st.Active.Sequence != 2 || st.Candidate != nil {
		t.Errorf("not mended: %+v", st)
	}
}
