package prepared

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/strictjson"
)

// Explanation says how a policy came to its decision about one input.
type Explanation struct {
	PolicyRef    string         `json:"policy_ref"`
	PolicyDigest string         `json:"policy_digest"`
	Entrypoint   string         `json:"entrypoint"`
	Decision     string         `json:"decision"` // allow, deny, pending
	Reasons      []event.Reason `json:"reasons,omitempty"`
	Error        string         `json:"error,omitempty"` // why there is no valid answer, which is a deny
	// Held are the rules that made the decision, the entrypoint first and what
	// it asked for after it; each once, with the values it saw first.
	Held []RuleTrace `json:"held"`
	// Failed are, for a deny, the rules that would have said otherwise or that
	// those asked for, and the condition that each stopped at. Within one rule's
	// name, the one that came nearest stands first.
	Failed []RuleTrace `json:"failed,omitempty"`
	// Cut: the policy did more than is kept; some rules may be missing.
	Cut bool `json:"cut,omitempty"`
}

// RuleTrace is what one rule did.
type RuleTrace struct {
	Rule    string `json:"rule"` // data.autonomy.allow
	File    string `json:"file"`
	Line    int    `json:"line"`
	Text    string `json:"text"` // its first line
	Default bool   `json:"default,omitempty"`
	// Value is what the rule gave; nil where it did not hold. Of a rule with
	// `contains` it is the element.
	Value *Value `json:"value,omitempty"`
	// StoppedAt is the condition that did not hold; nil where the rule held.
	StoppedAt *Condition `json:"stopped_at,omitempty"`
	// Saw are the variables, and the parts of input and data, that its
	// conditions looked at.
	Saw []Seen `json:"saw,omitempty"`
}

// At is file and line of the rule.
func (r *RuleTrace) At() string { return fmt.Sprintf("%s:%d", r.File, r.Line) }

// Condition is an expression of a rule's body.
type Condition struct {
	File string `json:"file"`
	Line int    `json:"line"`
	Text string `json:"text"`
}

// Seen is a name and what it stood for.
type Seen struct {
	Name  string `json:"name"` // url, input.params.endpoint, data.allowed.hosts
	Value *Value `json:"value,omitempty"`
	// Undefined: there is no such field. A rule that asks for it stops there.
	Undefined bool `json:"undefined,omitempty"`
}

// Value is JSON, or the beginning of it where it is long.
type Value struct {
	JSON json.RawMessage
	Cut  bool // JSON is cut, and is none any more
}

// MarshalJSON gives the value itself, or its beginning as {"cut": "…"}.
func (v *Value) MarshalJSON() ([]byte, error) {
	if v.Cut {
		return json.Marshal(map[string]string{"cut": string(v.JSON)})
	}
	return v.JSON, nil
}

func (v *Value) String() string {
	switch {
	case v == nil:
		return ""
	case v.Cut:
		return string(v.JSON) + "…"
	}
	return string(v.JSON)
}

// Bounds of an Explanation.
const (
	maxValueBytes = 512    // of one value
	maxSeen       = 32     // of one rule
	maxRuns       = 20_000 // evaluations of rules that are followed
	maxTextLine   = 160    // bytes of source text
)

// Explain evaluates a recorded input again, on OPA's own evaluator whatever p
// runs on, and says which rules made the decision, where they stand, and which
// values they saw. A decision is a function of bundle and input, so this is how
// the recorded one was made. It takes ten to a hundred times as long as Eval and
// is for people, not for calls.
//
// A policy that gives no valid answer is explained, too; the error is for an
// input that is none and for a context that ended.
func Explain(ctx context.Context, p *Program, input []byte) (*Explanation, error) {
	if err := strictjson.CheckObject(input); err != nil {
		return nil, fmt.Errorf("explain: input: %w", err)
	}
	content, err := p.bundle.content()
	if err != nil {
		return nil, fmt.Errorf("explain: %w", err)
	}
	t := &ruleTracer{data: content.Data, values: true, runs: map[uint64]*ruleRun{}, rules: map[*ast.Rule]*ruleRun{}}
	// Without the rule index also rules that it would have skipped are tried, so
	// that the condition that rules them out has a line.
	d, err := p.traced(ctx, input, t, rego.EvalRuleIndexing(false))
	if errors.Is(err, ErrBudget) {
		return nil, fmt.Errorf("explain: %w", err)
	}
	x := &Explanation{PolicyRef: p.bundle.Ref(), PolicyDigest: p.bundle.Digest, Entrypoint: p.bundle.Entrypoint,
		Decision: "deny", Reasons: d.Reasons, Held: []RuleTrace{}, Cut: t.cut}
	switch {
	case err != nil:
		x.Error = err.Error()
	case d.Allow && d.Approval != nil:
		x.Decision = "pending"
	case d.Allow:
		x.Decision = "allow"
	}
	answered := map[string]bool{} // names of rules that said more than false
	for _, r := range t.ordered() {
		if r.held {
			x.Held = append(x.Held, r.trace)
			answered[r.trace.Rule] = answered[r.trace.Rule] || !r.trace.Default || r.trace.Value.String() != "false"
		}
	}
	if x.Decision == "allow" {
		return x, nil
	}
	for _, r := range t.ordered() {
		// An element that is not in a set stops nobody; that the set is empty is
		// a condition of a rule that is listed.
		if !r.held && !r.many && !answered[r.trace.Rule] && r.trace.StoppedAt != nil {
			x.Failed = append(x.Failed, r.trace)
		}
	}
	return x, nil
}

// traced is Eval on OPA's evaluator, watched by t.
func (p *Program) traced(ctx context.Context, input []byte, t *ruleTracer, more ...rego.EvalOption) (d Decision, err error) {
	defer func() {
		if r := recover(); r != nil {
			d, err = Decision{}, fmt.Errorf("%w: the evaluator panicked: %v", ErrEvaluation, r)
		}
	}()
	if ctx.Err() != nil {
		return Decision{}, fmt.Errorf("%w: %w", ErrBudget, context.Cause(ctx))
	}
	m := p.vm.Machine(ctx)
	defer m.Release()
	in, err := m.Parse(input)
	if err != nil {
		return Decision{}, machineError(err)
	}
	now, err := p.now(in)
	if err != nil {
		return Decision{}, fmt.Errorf("%w: input: %w", ErrEvaluation, err)
	}
	if err := p.interpret(ctx, m, in, now, &d, append(more, rego.EvalQueryTracer(t))...); err != nil {
		return Decision{}, err
	}
	return d, nil
}

// ruleRun is one evaluation of a rule, and at last the one that is shown for it.
type ruleRun struct {
	trace    RuleTrace
	order    int // of the first entry
	held     bool
	many     bool // contains: one of several values
	progress int  // conditions that held before the one it stopped at
	rule     *ast.Rule
}

// ruleTracer follows the rules of one evaluation.
type ruleTracer struct {
	data   map[string]any
	values bool // also what they saw, which costs

	runs  map[uint64]*ruleRun    // by query
	rules map[*ast.Rule]*ruleRun // what is known of each rule
	cut   bool
}

func (t *ruleTracer) Enabled() bool { return true }

func (t *ruleTracer) Config() topdown.TraceConfig {
	return topdown.TraceConfig{PlugLocalVars: t.values}
}

// TraceEvent is called for every step of the evaluation.
func (t *ruleTracer) TraceEvent(e topdown.Event) {
	switch n := e.Node.(type) {
	case *ast.Rule:
		switch e.Op {
		case topdown.EnterOp:
			t.enter(e.QueryID, n)
		case topdown.ExitOp:
			if run := t.runs[e.QueryID]; run != nil {
				t.exit(run, n, &e)
			}
		}
	case *ast.Expr:
		if run := t.runs[e.QueryID]; run != nil && e.Op == topdown.FailOp {
			t.fail(run, n, &e)
		}
	}
}

func (t *ruleTracer) enter(query uint64, r *ast.Rule) {
	if len(t.runs) >= maxRuns {
		t.cut = true
		return
	}
	run := t.rules[r]
	if run == nil {
		run = &ruleRun{order: len(t.rules), progress: -1, rule: r, many: r.Head.RuleKind() == ast.MultiValue,
			trace: RuleTrace{Rule: r.Ref().GroundPrefix().String(), Text: firstLine(r), Default: r.Default}}
		if l := r.Location; l != nil {
			run.trace.File, run.trace.Line = strings.TrimPrefix(l.File, "/"), l.Row
		}
		t.rules[r] = run
	}
	t.runs[query] = run
}

func (t *ruleTracer) exit(run *ruleRun, r *ast.Rule, e *topdown.Event) {
	if run.held {
		return // shown is what it saw first
	}
	run.held, run.trace.StoppedAt = true, nil
	if !t.values {
		return
	}
	run.trace.Saw = t.seen(r, len(r.Body), e)
	switch h := r.Head; {
	case run.many:
		run.trace.Value = valueOf(e.Plug(h.Key))
	case h.Value != nil:
		run.trace.Value = valueOf(e.Plug(h.Value))
	}
}

// fail notes where a rule stopped, if it came further than before.
func (t *ruleTracer) fail(run *ruleRun, x *ast.Expr, e *topdown.Event) {
	if run.held || x.Index <= run.progress {
		return
	}
	run.progress = x.Index
	c := &Condition{File: run.trace.File, Line: run.trace.Line, Text: oneLine(x.String())}
	if l := cmp.Or(x.Location, e.Location); l != nil {
		c.Line = l.Row
		if len(l.Text) > 0 {
			c.Text = oneLine(string(l.Text))
		}
	}
	run.trace.StoppedAt = c
	if t.values {
		run.trace.Saw = t.seen(run.rule, x.Index+1, e)
	}
}

// ordered are the rules as they were entered first; those of one name that did
// not hold by how far they came.
func (t *ruleTracer) ordered() []*ruleRun {
	first := map[string]int{}
	var out []*ruleRun
	for _, r := range t.rules {
		if o, ok := first[r.trace.Rule]; !ok || r.order < o {
			first[r.trace.Rule] = r.order
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *ruleRun) int {
		return cmp.Or(cmp.Compare(first[a.trace.Rule], first[b.trace.Rule]), -cmp.Compare(a.progress, b.progress), cmp.Compare(a.order, b.order))
	})
	return out
}

// seen collects what the first n conditions of a rule looked at.
func (t *ruleTracer) seen(r *ast.Rule, n int, e *topdown.Event) []Seen {
	var out []Seen
	have := map[string]bool{}
	add := func(s Seen) {
		if len(out) < maxSeen && !have[s.Name] {
			have[s.Name] = true
			out = append(out, s)
		}
	}
	visit := ast.NewGenericVisitor(func(x any) bool {
		switch x := x.(type) {
		case ast.Ref:
			if s, ok := t.seenRef(x, e); ok {
				add(s)
			}
		case ast.Var:
			if m, ok := e.LocalMetadata[x]; ok && !m.Name.IsGenerated() && !m.Name.IsWildcard() {
				if v := e.Plug(ast.NewTerm(x)); v != nil && v.IsGround() {
					add(Seen{Name: string(m.Name), Value: valueOf(v)})
				}
			}
		case *ast.ArrayComprehension, *ast.SetComprehension, *ast.ObjectComprehension:
			return true // a query of its own, with other variables
		}
		return false
	})
	for _, a := range r.Head.Args {
		visit.Walk(a)
	}
	for _, x := range r.Body[:min(n, len(r.Body))] {
		visit.Walk(x)
	}
	return out
}

// seenRef resolves a reference into input or data. What a rule of the policy
// makes is left to that rule.
func (t *ruleTracer) seenRef(ref ast.Ref, e *topdown.Event) (Seen, bool) {
	root := ref[0].Value
	isInput, isData := root.Compare(ast.InputRootDocument.Value) == 0, root.Compare(ast.DefaultRootDocument.Value) == 0
	if !isInput && !isData || len(ref) < 2 || isInput && e.Input() == nil {
		return Seen{}, false
	}
	plugged, ok := e.Plug(ast.NewTerm(ref)).Value.(ast.Ref)
	if !ok {
		return Seen{}, false
	}
	ground := plugged.GroundPrefix()
	s := Seen{Name: ground.String()}
	if isInput {
		if v, err := e.Input().Value.Find(ground[1:]); err == nil {
			s.Value = valueOf(ast.NewTerm(v))
		} else {
			s.Undefined = true
		}
		return s, true
	}
	var at any = t.data
	for i, step := range ground[1:] {
		switch doc := at.(type) {
		case map[string]any:
			key, isString := step.Value.(ast.String)
			if at, ok = doc[string(key)]; !ok || !isString {
				if i == 0 || !ok && i < 2 {
					return Seen{}, false // a package of the policy
				}
				s.Undefined = true
				return s, true
			}
		default:
			return Seen{}, false
		}
	}
	s.Value = jsonValue(at)
	return s, true
}

func valueOf(t *ast.Term) *Value {
	x, err := ast.JSON(t.Value)
	if err != nil {
		x = t.String() // an object with keys that JSON has not
	}
	return jsonValue(x)
}

func jsonValue(x any) *Value {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(x); err != nil {
		return &Value{JSON: json.RawMessage("null")} // x came from JSON: does not happen
	}
	raw := bytes.TrimSpace(buf.Bytes())
	if len(raw) <= maxValueBytes {
		return &Value{JSON: raw}
	}
	return &Value{JSON: bytes.ToValidUTF8(raw[:maxValueBytes], nil), Cut: true}
}

// firstLine is how a rule begins in its file.
func firstLine(r *ast.Rule) string {
	text := r.Head.String()
	if r.Default {
		return oneLine("default " + text)
	}
	if r.Location != nil && len(r.Location.Text) > 0 {
		text, _, _ = strings.Cut(string(r.Location.Text), "\n")
	}
	text = strings.TrimSuffix(oneLine(text), " {")
	return strings.TrimSuffix(strings.TrimSuffix(text, " if"), " :=")
}

func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > maxTextLine {
		return strings.ToValidUTF8(s[:maxTextLine], "") + "…"
	}
	return s
}
