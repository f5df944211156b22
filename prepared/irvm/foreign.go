package irvm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/topdown/builtins"
)

// Foreign builtins are OPA's own functions, called with OPA's values. Which of
// them a policy may call at all is for the capabilities that it was compiled
// with to say.

// foreign lowers the call of a builtin that is not native.
func (c *compiler) foreign(name string, args []operand, to result) op {
	f, decl := topdown.GetBuiltin(name), ast.BuiltinMap[name]
	if f == nil || decl == nil {
		refuse("builtin %s is not there", name)
	}
	void := decl.Decl.Result() == nil
	// Constant operands are converted once. OPA's functions change none of
	// theirs: its interpreter hands them the terms of the policy and the store.
	consts := make([]*ast.Term, len(args))
	for i := range args {
		if args[i].isConst() {
			consts[i] = args[i].value.term()
		}
	}
	bound := bounds[name]
	return func(m *Machine, r []Value) int {
		terms := make([]*ast.Term, len(args))
		values := make([]Value, len(args))
		for i := range args {
			values[i] = args[i].get(r)
			if terms[i] = consts[i]; terms[i] == nil {
				m.weigh(values[i])
			}
		}
		if bound != nil {
			bound(m, values)
		}
		for i := range args {
			if terms[i] == nil {
				terms[i] = values[i].term()
			}
		}
		v, ok := m.apply(f, terms, decl.Relation)
		if void && ok {
			return next
		}
		return to.put(r, v)
	}
}

// callForeign calls OPA's function for operands that a native one leaves to it.
func (m *Machine) callForeign(name string, args ...Value) Value {
	terms := make([]*ast.Term, len(args))
	for i, a := range args {
		m.weigh(a)
		terms[i] = a.term()
	}
	if bound := bounds[name]; bound != nil {
		bound(m, args)
	}
	v, _ := m.apply(topdown.GetBuiltin(name), terms, false)
	return v
}

func (m *Machine) apply(f topdown.BuiltinFunc, terms []*ast.Term, relation bool) (v Value, ok bool) {
	m.charge(16)
	var all []Value
	err := f(m.context(), terms, func(t *ast.Term) error {
		if t == nil {
			return nil
		}
		if v = m.fromAST(t.Value); relation {
			all = m.appendValue(all, v)
		}
		return nil
	})
	var halt topdown.Halt
	switch {
	case err == nil && relation:
		return m.newArray(all), true
	case err == nil:
		return v, true
	case errors.As(err, &halt):
		m.look() // cancelled: says by what
		m.redo("a builtin stopped the evaluation")
	}
	return m.failed(), false
}

// context is what OPA's functions see of the evaluation.
func (m *Machine) context() topdown.BuiltinContext {
	if m.bctx == nil {
		m.look()
		m.cancel = topdown.NewCancel()
		timer := time.AfterFunc(m.limits.Time-time.Since(m.started), m.cancel.Cancel)
		stopCtx := context.AfterFunc(m.ctx, m.cancel.Cancel)
		m.release = func() { timer.Stop(); stopCtx() }
		m.bctx = &topdown.BuiltinContext{
			Context:      m.ctx,
			Metrics:      metrics.NoOp(),
			Seed:         rand.Reader,
			Time:         ast.NewTerm(astNumber(intValue(m.now))),
			Cancel:       m.cancel,
			Cache:        builtins.Cache{},
			Location:     ast.NewLocation(nil, "", 1, 1),
			Capabilities: m.prog.capabilities,
			Runtime:      ast.ObjectTerm(),
		}
	}
	return *m.bctx
}

// weigh takes the steps and the memory that converting v costs, before it is done.
func (m *Machine) weigh(v Value) {
	switch v.kind() {
	case String:
		m.charge(1 + int(v.n>>4))
		m.take(int(v.n) + 64)
	case Array:
		m.weighAll(v.array().elems)
	case Set:
		m.weighAll(v.set().elems)
	case Object:
		m.weighAll(v.object().keys)
		m.weighAll(v.object().vals)
	default:
		m.charge(1)
		m.take(64)
	}
}

func (m *Machine) weighAll(vs []Value) {
	for i := range vs {
		m.weigh(vs[i])
	}
}

func (m *Machine) overMemory() {
	m.fail(fmt.Errorf("%w: over %d bytes of memory", ErrBudget, m.limits.Memory))
}

// MaxShift bounds bits.lsh, and MaxHostBits the addresses that net.cidr_expand
// lists. Both write large results for short operands, and cannot be stopped on
// the way.
const (
	MaxShift    = 1 << 16
	MaxHostBits = 16
)

// bounds holds what a builtin that cannot be stopped is refused for: it fails
// the evaluation with ErrBudget, or charges for the work to come.
var bounds = map[string]func(m *Machine, args []Value){
	"bits.lsh": func(m *Machine, args []Value) {
		if args[1].isNumber() && args[1].float() > MaxShift {
			m.fail(fmt.Errorf("%w: bits.lsh by more than %d", ErrBudget, MaxShift))
		}
	},
	"net.cidr_expand":                  boundExpand,
	"numbers.range_step":               boundRangeStep,
	"product":                          func(m *Machine, args []Value) { n := args[0].length(); m.charge(n * (n >> 8)) },
	"graph.reachable_paths":            boundPaths,
	"sprintf":                          boundSprintf,
	"replace":                          boundReplace,
	"regex.replace":                    boundRegexReplace,
	"strings.replace_n":                boundReplaceN,
	"regex.match":                      boundRegex(1),
	"regex.find_n":                     boundRegex(1),
	"regex.split":                      boundRegex(1),
	"regex.template_match":             boundRegex(1),
	"regex.globs_match":                boundRegex(0, 1),
	"glob.match":                       boundRegex(2),
	"strings.render_template":          boundRegex(0),
	"regex.find_all_string_submatch_n": boundRegex(1),
}
