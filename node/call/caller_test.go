package call_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/node/call"
)

// TestLimits: a call over its caller's limit is refused before anything is
// evaluated, and the log tells once of it.
func TestLimits(t *testing.T) {
	state := filepath.Join(t.TempDir(), "budget.json")
	callers, err := auth.ParseCallers([]byte("principals: {loopback: {limits: {per_day: 2}}}"))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 1, 1, 23, 0, 0, 0, time.UTC)
	r := newRig(t, policy, func(o *call.Options) {
		if o.Limits, err = auth.NewLimits(func() *auth.Callers { return callers }, state, func() time.Time { return now }); err != nil {
			t.Fatal(err)
		}
	})
	for range 2 {
		if a := r.do(`{"kind":"tool.echo"}`); a.Status != 200 {
			t.Fatalf("%+v", a)
		}
	}
	for range 3 {
		a := r.do(`{"kind":"tool.echo"}`)
		if a.Status != 429 || a.Layer != "request" || a.Code != "limit_budget" || a.RetryAfter != time.Hour {
			t.Errorf("%+v", a)
		}
	}
	recs := r.wantRecords("decision allow", "action allow ok", "decision allow", "action allow ok", "caller.limited")
	if body := string(recs[4].Body); !strings.Contains(body, `"caller_id":"loopback"`) || !strings.Contains(body, `"limit":"budget"`) {
		t.Error(body)
	}
	// A restart gives nothing back.
	r.reopen()
	if a := r.do(`{"kind":"tool.echo"}`); a.Status != 429 {
		t.Errorf("after a restart: %+v", a)
	}
	// What cannot be counted is not done.
	now = now.Add(2 * time.Hour)
	if err := errors.Join(os.Remove(state), os.MkdirAll(filepath.Join(state, "x"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if a := r.do(`{"kind":"tool.echo"}`); a.Status != 503 || a.Code != "budget_unavailable" {
		t.Errorf("%+v", a)
	}
}
