package prepared

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// What an evaluation can end in besides a decision. Each denies the call.
var (
	ErrUndefined  = errors.New("policy gives no answer")                  // the entrypoint is undefined for this input
	ErrEvaluation = errors.New("policy evaluation failed")                // a builtin failed, rules conflict, a panic, an input that is not strict JSON
	ErrResult     = errors.New("policy answer refused")                   // unknown field, wrong type, out of range
	ErrBudget     = errors.New("policy evaluation stopped by its budget") // the context ended, EvalTimeout, MaxInputBytes
)

// EvalTimeout stops an evaluation that runs away. It is generous on purpose: a
// tight deadline on the wall clock turns a busy machine into false denials. A
// single builtin call is not interrupted; MaxInputBytes bounds it.
const EvalTimeout = 10 * time.Second

// Eval asks the policy about one call. input is the JSON object that the node
// records: the decision is a function of exactly these bytes and the bundle.
//
// With any error the Decision is its zero value, which denies; the error wraps
// one of ErrUndefined, ErrEvaluation, ErrResult and ErrBudget. Eval keeps no
// reference to input.
func (p *Program) Eval(ctx context.Context, input []byte) (Decision, error) {
	var d Decision
	err := p.EvalInto(ctx, &d, input)
	return d, err
}

// EvalInto is Eval into a Decision that the caller has and uses again: the
// slices of dst are overwritten and grown where needed, so a caller that keeps
// one Decision per goroutine and takes what it needs out of it before the next
// call makes the evaluator allocate nothing for them. Strings in dst are never
// written again and may be kept. With an error *dst is the zero value.
func (p *Program) EvalInto(ctx context.Context, dst *Decision, input []byte) (err error) {
	defer func() {
		if r := recover(); r != nil {
			*dst, err = Decision{}, fmt.Errorf("%w: the evaluator panicked: %v", ErrEvaluation, r)
		}
	}()
	v, err := p.eval(ctx, input)
	if err != nil {
		*dst = Decision{}
		return err
	}
	*dst, err = decisionOf(v)
	if err != nil {
		*dst = Decision{}
		return fmt.Errorf("%w: %w", ErrResult, err)
	}
	return nil
}

// Replay evaluates a recorded input again. It is Eval by another name: what was
// recorded is all that a decision depends on (INV-17).
func Replay(ctx context.Context, p *Program, input []byte) (Decision, error) {
	return p.Eval(ctx, input)
}

// eval asks OPA's evaluator. more options are for Explain, which traces.
func (p *Program) eval(ctx context.Context, input []byte, more ...rego.EvalOption) (ast.Value, error) {
	if len(input) > MaxInputBytes {
		return nil, fmt.Errorf("%w: the input has %d bytes, at most %d", ErrBudget, len(input), MaxInputBytes)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBudget, err)
	}
	in, err := parseInput(input)
	if err != nil {
		return nil, fmt.Errorf("%w: input: %w", ErrEvaluation, err)
	}
	now, err := p.now(in)
	if err != nil {
		return nil, fmt.Errorf("%w: input: %w", ErrEvaluation, err)
	}

	// One Cancel for the timeout and the context. OPA's own way is a goroutine
	// per evaluation.
	cancel := topdown.NewCancel()
	timer := time.AfterFunc(p.timeout, cancel.Cancel)
	defer timer.Stop()
	if ctx.Done() != nil {
		defer context.AfterFunc(ctx, cancel.Cancel)()
	}
	options := append(p.options[:len(p.options):len(p.options)],
		rego.EvalParsedInput(in), rego.EvalTime(now), rego.EvalExternalCancel(cancel))
	rs, err := p.query.Eval(ctx, append(options, more...)...)
	switch {
	case err != nil && topdown.IsCancel(err):
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", ErrBudget, context.Cause(ctx))
		}
		return nil, fmt.Errorf("%w: over %s", ErrBudget, p.timeout)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrEvaluation, err)
	case len(rs) == 0:
		return nil, fmt.Errorf("%w: %s is undefined for this input", ErrUndefined, p.bundle.Entrypoint)
	case len(rs) > 1 || len(rs[0].Expressions) != 1:
		return nil, fmt.Errorf("%w: %d answers, want one", ErrResult, len(rs))
	}
	v, ok := rs[0].Expressions[0].Value.(ast.Value)
	if !ok {
		return nil, fmt.Errorf("%w: %T is no value", ErrResult, rs[0].Expressions[0].Value)
	}
	return v, nil
}

// now is what time.now_ns returns: the input's time_ns. It is never the wall
// clock; a policy that asks for the time of an input without one is denied.
func (p *Program) now(in ast.Value) (time.Time, error) {
	if !p.usesTime {
		return time.Unix(0, 0), nil
	}
	obj := in.(ast.Object) // parseInput returns nothing else
	t := obj.Get(ast.InternedTerm("time_ns"))
	if t == nil {
		return time.Time{}, errors.New("time_ns is missing and the policy calls time.now_ns")
	}
	n, ok := t.Value.(ast.Number)
	if !ok {
		return time.Time{}, fmt.Errorf("time_ns is %s, want nanoseconds since 1970", ast.ValueName(t.Value))
	}
	ns, err := json.Number(n).Int64()
	if err != nil {
		return time.Time{}, fmt.Errorf("time_ns is %.40s, want nanoseconds since 1970", strings.TrimSpace(string(n)))
	}
	return time.Unix(0, ns).UTC(), nil
}
