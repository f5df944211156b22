package prepared

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// FailOpen is a field of a call without which the policy allows what it denies
// with it.
type FailOpen struct {
	Call   string `json:"call"`   // which sample call: an example's name, or "recorded call N", the newest is 1
	Field  string `json:"field"`  // JSON Pointer, /params/path
	Change string `json:"change"` // removed, null, other type
	// Rules are those that held with the field and do not without it, or where
	// there is none, those that hold only without it. The first is the nearest
	// to the entrypoint.
	Rules []RuleTrace `json:"rules"`
	// Override says who has allowed it: OverrideBundle, OverrideOperator; empty:
	// nobody, and the policy is refused.
	Override string `json:"override,omitempty"`
}

func (f FailOpen) String() string {
	s := fmt.Sprintf("%s: denied as it stands, allowed with %s %s", f.Call, f.Field, f.Change)
	for i, r := range f.Rules {
		if i == maxNamedRules {
			break
		}
		s += fmt.Sprintf("; rule %s at %s", r.Rule, r.At())
	}
	return s
}

// maxNamedRules is how many rules String names.
const maxNamedRules = 2

// Who has allowed a field to be left out.
const (
	OverrideBundle   = "bundle"   // allow_fail_open in the manifest
	OverrideOperator = "operator" // ProbeOptions.Allow
)

// ErrFailOpen is wrapped by the error of ProbeReport.Err.
var ErrFailOpen = errors.New("policy fails open")

// Bounds of one Probe.
const (
	MaxProbes   = 100_000 // evaluations: default and most of ProbeOptions.MaxProbes
	MaxFindings = 256     // kept; the probe ends there
)

// ProbeOptions configure Probe.
type ProbeOptions struct {
	// Recorded are inputs of recorded calls, newest first. Where MaxProbes does
	// not suffice for all of them, the oldest are left out.
	Recorded [][]byte
	// MaxProbes bounds the evaluations. 0, and what is above it: MaxProbes.
	MaxProbes int
	// Allow are fields (JSON Pointers) that the operator has said may be left
	// out, besides those of the bundle.
	Allow []string
}

// ProbeReport is what Probe found.
type ProbeReport struct {
	Examples int        `json:"examples"`        // sample calls of the bundle that were used
	Recorded int        `json:"recorded"`        // recorded calls that were used
	Probes   int        `json:"probes"`          // evaluations of changed calls
	Found    []FailOpen `json:"found,omitempty"` // with those that are allowed
}

// Refused are the findings that nobody has allowed.
func (r *ProbeReport) Refused() []FailOpen {
	return r.where(func(f FailOpen) bool { return f.Override == "" })
}

// Overridden are the findings that the bundle or the operator allows.
func (r *ProbeReport) Overridden() []FailOpen {
	return r.where(func(f FailOpen) bool { return f.Override != "" })
}

func (r *ProbeReport) where(ok func(FailOpen) bool) []FailOpen {
	return slices.DeleteFunc(slices.Clone(r.Found), func(f FailOpen) bool { return !ok(f) })
}

// Err refuses the policy, naming field and rule of the first finding that nobody
// has allowed; nil when there is none. It wraps ErrFailOpen.
func (r *ProbeReport) Err() error {
	refused := r.Refused()
	if len(refused) == 0 {
		return nil
	}
	more := ""
	if n := len(refused) - 1; n > 0 {
		more = fmt.Sprintf(" (and %d more)", n)
	}
	return fmt.Errorf("%w: %s%s", ErrFailOpen, refused[0], more)
}

// Probe looks for rules that fail open: a rule that denies by a field and is
// silent when the caller leaves the field out. For every sample call that p
// denies (the bundle's examples and the recorded calls) it removes each field in
// turn, at every depth, then sets it to null and to a value of another type, and
// each element of a list likewise to null and another type. Where the policy
// then allows, that is a finding, and OPA's evaluator is asked which rule it was.
//
// Not every finding is a fault: leaving out a forbidden header makes a call
// harmless. It is for a person to say so, in the bundle or on the node; the
// report keeps who did. Calls that p allows are skipped. An example that is no
// strict JSON object is an error, as is an evaluation that ends by its budget,
// and examples for which MaxProbes does not suffice; a recorded call that
// cannot be used is skipped.
func Probe(ctx context.Context, p *Program, o ProbeOptions) (*ProbeReport, error) {
	r := &prober{program: p, allow: o.Allow, max: MaxProbes, report: &ProbeReport{}}
	if o.MaxProbes > 0 {
		r.max = min(r.max, o.MaxProbes)
	}
	for _, e := range p.bundle.Examples {
		if err := r.call(ctx, e.Name, e.Input); err != nil {
			return r.report, fmt.Errorf("fail-open probe: %s: %w", e.Name, err)
		}
		r.report.Examples++
	}
	for i, in := range o.Recorded {
		err := r.call(ctx, fmt.Sprintf("recorded call %d", i+1), in)
		switch {
		case errors.Is(err, errProbes):
			return r.report, nil
		case errors.Is(err, errSample):
			continue
		case err != nil:
			return r.report, fmt.Errorf("fail-open probe: recorded call %d: %w", i+1, err)
		}
		r.report.Recorded++
	}
	return r.report, nil
}

var (
	errProbes = errors.New("there are too many changed calls to evaluate: give fewer or smaller sample calls")
	errSample = errors.New("not a call that a policy can be asked about")
)

type prober struct {
	program *Program
	allow   []string
	max     int // probes
	report  *ProbeReport

	name  string // of the call that is probed
	input []byte
	held  []*ruleRun // rules that hold for it; nil: not yet known
}

// call probes one call.
func (r *prober) call(ctx context.Context, name string, input []byte) error {
	if err := strictjson.CheckObject(input); err != nil {
		return fmt.Errorf("%w: %w", errSample, err)
	}
	d, err := r.program.Eval(ctx, input)
	if d.Allow || len(r.report.Found) >= MaxFindings {
		return nil // any other error is a deny, too
	}
	if errors.Is(err, ErrBudget) {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(input))
	dec.UseNumber()
	var doc map[string]any
	if err := dec.Decode(&doc); err != nil {
		return fmt.Errorf("%w: %w", errSample, err)
	}
	r.name, r.input, r.held = name, input, nil
	return eachField(doc, "", func(field string, set func(any), remove func()) error {
		was := valueAt(doc, field)
		if remove != nil {
			remove()
			if err := r.try(ctx, doc, field, "removed"); err != nil {
				return err
			}
		}
		if set(nil); was != nil {
			if err := r.try(ctx, doc, field, "null"); err != nil {
				return err
			}
		}
		set(otherType(was))
		err := r.try(ctx, doc, field, "other type")
		set(was)
		return err
	})
}

// try asks about the call as doc now is.
func (r *prober) try(ctx context.Context, doc map[string]any, field, change string) error {
	if r.report.Probes == r.max {
		return errProbes
	}
	r.report.Probes++
	raw, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	d, err := r.program.Eval(ctx, raw)
	switch {
	case errors.Is(err, ErrBudget):
		return err // nothing was learned
	case !d.Allow || len(r.report.Found) >= MaxFindings:
		return nil
	}
	f := FailOpen{Call: r.name, Field: field, Change: change}
	switch {
	case slices.Contains(r.program.bundle.AllowFailOpen, field):
		f.Override = OverrideBundle
	case slices.Contains(r.allow, field):
		f.Override = OverrideOperator
	}
	if f.Rules, err = r.silenced(ctx, raw); err != nil {
		return err
	}
	r.report.Found = append(r.report.Found, f)
	return nil
}

// silenced are the rules that made the difference between the call and changed.
func (r *prober) silenced(ctx context.Context, changed []byte) ([]RuleTrace, error) {
	if r.held == nil {
		var err error
		if r.held, err = heldRules(ctx, r.program, r.input); err != nil {
			return nil, err
		}
	}
	now, err := heldRules(ctx, r.program, changed)
	if err != nil {
		return nil, err
	}
	if out := missing(r.held, now); len(out) > 0 {
		return out, nil
	}
	return missing(now, r.held), nil
}

// missing are the rules of a, defaults aside, that are not in b.
func missing(a, b []*ruleRun) []RuleTrace {
	var out []RuleTrace
	for _, r := range a {
		if !r.trace.Default && !slices.ContainsFunc(b, func(o *ruleRun) bool { return o.rule == r.rule }) {
			out = append(out, r.trace)
		}
	}
	return out
}

// heldRules are the rules that hold for an input, the entrypoint first.
func heldRules(ctx context.Context, p *Program, input []byte) ([]*ruleRun, error) {
	t := &ruleTracer{runs: map[uint64]*ruleRun{}, rules: map[*ast.Rule]*ruleRun{}}
	if _, err := p.traced(ctx, input, t); errors.Is(err, ErrBudget) {
		return nil, err
	}
	return slices.DeleteFunc(t.ordered(), func(r *ruleRun) bool { return !r.held }), nil
}

// eachField calls f for every member of every object in v and every element of
// every list, parents first, in sorted order, until one fails. An element cannot
// be removed: its list would be another one.
func eachField(v any, at string, f func(field string, set func(any), remove func()) error) error {
	switch v := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			field := at + "/" + pointerEscaper.Replace(k)
			if err := f(field, func(x any) { v[k] = x }, func() { delete(v, k) }); err != nil {
				return err
			}
			if err := eachField(v[k], field, f); err != nil {
				return err
			}
		}
	case []any:
		for i := range v {
			field := at + "/" + strconv.Itoa(i)
			if err := f(field, func(x any) { v[i] = x }, nil); err != nil {
				return err
			}
			if err := eachField(v[i], field, f); err != nil {
				return err
			}
		}
	}
	return nil
}

var (
	pointerEscaper   = strings.NewReplacer("~", "~0", "/", "~1")
	pointerUnescaper = strings.NewReplacer("~1", "/", "~0", "~")
)

// valueAt is what a JSON Pointer that eachField made points to.
func valueAt(v any, pointer string) any {
	for step := range strings.SplitSeq(strings.TrimPrefix(pointer, "/"), "/") {
		switch x := v.(type) {
		case map[string]any:
			v = x[pointerUnescaper.Replace(step)]
		case []any:
			i, err := strconv.Atoi(step)
			if err != nil || i >= len(x) {
				return nil
			}
			v = x[i]
		default:
			return nil
		}
	}
	return v
}

// otherType is a value that no rule for v's type expects.
func otherType(v any) any {
	switch v.(type) {
	case string:
		return 0
	case map[string]any:
		return []any{}
	case []any:
		return map[string]any{}
	}
	return "x"
}
