//go:build !race

// The race detector makes sync.Pool drop items at random.

package call_test

import (
	"encoding/json"
	"testing"

	"github.com/autonomyops/autonomy/node/call"
)

// What one denied call may allocate, from the body's bytes to the answer's,
// besides what the policy evaluator takes: kind, session, the policy's name and
// the audit id are strings of the answer and of the caller. One to spare.
const denyAllocations = 5

// TestDenyAllocations gates the deny path: a real log, policy and registry. What
// the evaluator allocates is measured apart, on the same input, and taken off.
func TestDenyAllocations(t *testing.T) {
	r := newRig(t, policy, func(o *call.Options) { o.Batched = true })
	body := []byte(`{"kind":"tool.shell","params":{"command":"id"},"session":"s-1"}`)
	var input []byte
	var out []byte
	run := func() {
		req := call.NewRequest()
		if err := call.Decode(body, req); err != nil {
			t.Fatal(err)
		}
		req.Caller = call.Caller{Type: "anonymous", ID: "loopback"}
		a := r.p.Do(t.Context(), req, call.Execute)
		if a.Status != 403 || a.Layer != call.LayerPolicy {
			t.Fatalf("%+v", a)
		}
		out = a.AppendJSON(out[:0])
		req.Free()
	}
	run()
	input = inputOf(t, r)
	program := r.policy.a.Load().Program
	evaluator := testing.AllocsPerRun(200, func() {
		if _, err := program.Eval(t.Context(), input); err != nil {
			t.Fatal(err)
		}
	})
	all := testing.AllocsPerRun(200, run)
	t.Logf("%.0f allocations, %.0f of them in the policy evaluator", all, evaluator)
	if all-evaluator > denyAllocations {
		t.Errorf("a denied call allocates %.0f times beside the evaluator's %.0f, at most %d", all-evaluator, evaluator, denyAllocations)
	}
}

// inputOf is the policy input of the log's first decision.
func inputOf(t *testing.T, r *rig) []byte {
	t.Helper()
	var body struct{ Input json.RawMessage }
	if err := json.Unmarshal(r.records()[0].Body, &body); err != nil {
		t.Fatal(err)
	}
	return body.Input
}
