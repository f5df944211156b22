package prepared

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/open-policy-agent/opa/v1/rego"

	"github.com/autonomyops/autonomy/prepared/irvm"
)

// What an evaluation can end in besides a decision. Each denies the call.
var (
	ErrUndefined  = errors.New("policy gives no answer")                  // the entrypoint is undefined for this input
	ErrEvaluation = errors.New("policy evaluation failed")                // a builtin failed, rules conflict, a panic, an input that is not strict JSON
	ErrResult     = errors.New("policy answer refused")                   // unknown field, wrong type, out of range
	ErrBudget     = errors.New("policy evaluation stopped by its budget") // the context ended, Limits, MaxInputBytes
)

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

// EvalInto is Eval into a Decision that the caller has and uses again. It
// overwrites dst and uses the slices in it again, Reasons, Redact, Approval and
// those in Constraints: what a caller keeps of them it copies before the next
// call with the same dst. Strings in dst are never written again and may be
// kept. With an error *dst is the zero value.
//
// On the compiled engine it allocates nothing once a Decision like this one was
// made before with the same dst, and the texts that the policy puts together
// are among the last that it made. Reasons and Redact of a dst that was used
// before are empty instead of nil where the policy gives none.
func (p *Program) EvalInto(ctx context.Context, dst *Decision, input []byte) (err error) {
	defer func() {
		if r := recover(); r != nil {
			*dst, err = Decision{}, fmt.Errorf("%w: the evaluator panicked: %v", ErrEvaluation, r)
		}
	}()
	if err := p.evalInto(ctx, dst, input); err != nil {
		*dst = Decision{}
		return err
	}
	return nil
}

// Replay evaluates a recorded input again. It is Eval by another name: what was
// recorded is all that a decision depends on (INV-17).
func Replay(ctx context.Context, p *Program, input []byte) (Decision, error) {
	return p.Eval(ctx, input)
}

func (p *Program) evalInto(ctx context.Context, dst *Decision, input []byte) error {
	if len(input) > MaxInputBytes {
		return fmt.Errorf("%w: the input has %d bytes, at most %d", ErrBudget, len(input), MaxInputBytes)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", ErrBudget, context.Cause(ctx))
	}
	m := p.vm.Machine(ctx)
	defer m.Release()
	in, err := m.Parse(input)
	if err != nil {
		return machineError(err)
	}
	now, err := p.now(in)
	if err != nil {
		return fmt.Errorf("%w: input: %w", ErrEvaluation, err)
	}
	if !p.compiled() {
		return p.interpret(ctx, m, in, now, dst)
	}
	v, err := m.Eval(in, now)
	switch {
	case errors.Is(err, irvm.ErrRedo):
		return p.interpret(ctx, m, in, now, dst)
	case err != nil:
		err = machineError(err)
	default:
		err = p.decide(m, v, dst)
	}
	if p.sampled() {
		return p.selfCheck(ctx, m, in, now, dst, err)
	}
	return err
}

// machineError makes an error of this package of one of irvm's.
func machineError(err error) error {
	switch {
	case errors.Is(err, irvm.ErrBudget):
		return fmt.Errorf("%w: %w", ErrBudget, err)
	default:
		return fmt.Errorf("%w: %w", ErrEvaluation, err)
	}
}

// decide reads the answer v into dst.
func (p *Program) decide(m *irvm.Machine, v irvm.Value, dst *Decision) error {
	if v.Kind() == irvm.Undefined {
		return fmt.Errorf("%w: %s is undefined for this input", ErrUndefined, p.bundle.Entrypoint)
	}
	if err := (decoder{m}).decide(v, dst); err != nil {
		return fmt.Errorf("%w: %w", ErrResult, err)
	}
	return nil
}

// interpret evaluates by OPA's interpreter. more options are for Explain, which
// traces.
func (p *Program) interpret(ctx context.Context, m *irvm.Machine, in irvm.Value, now int64, dst *Decision, more ...rego.EvalOption) error {
	oracle, err := p.oracle()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrEvaluation, err)
	}
	answer, err := oracle.eval(ctx, p.limits.Time, in.AST(), time.Unix(0, now).UTC(), more...)
	if err != nil || answer == nil {
		if err == nil {
			err = p.decide(m, irvm.Value{}, dst)
		}
		return err
	}
	v, err := m.FromAST(answer)
	if err != nil {
		return machineError(err)
	}
	return p.decide(m, v, dst)
}

// now is what time.now_ns returns: the input's time_ns. It is never the wall
// clock; a policy that asks for the time of an input without one is denied.
func (p *Program) now(in irvm.Value) (int64, error) {
	if !p.usesTime {
		return 0, nil
	}
	v := in.Get("time_ns")
	switch {
	case v.Kind() == irvm.Undefined:
		return 0, errors.New("time_ns is missing and the policy calls time.now_ns")
	case !v.IsNumber():
		return 0, fmt.Errorf("time_ns is %s, want nanoseconds since 1970", v.Kind())
	}
	ns, ok := v.Int64()
	if !ok {
		return 0, fmt.Errorf("time_ns is %.40s, want nanoseconds since 1970", v.Text())
	}
	return ns, nil
}
