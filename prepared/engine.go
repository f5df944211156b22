package prepared

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync/atomic"

	"github.com/autonomyops/autonomy/prepared/irvm"
)

// Names of the engines that evaluate a program.
const (
	EngineCompiled = "compiled" // OPA's plan, lowered by prepared/irvm
	EngineTopdown  = "topdown"  // OPA's interpreter
)

// EvalLimits bound one evaluation.
type EvalLimits = irvm.Limits

// Options of CompileWith. The zero value is what Compile uses.
type Options struct {
	// Limits of one evaluation; zero fields take irvm's defaults. The
	// interpreter keeps Time only.
	Limits EvalLimits

	// SelfCheck evaluates one in so many decisions of the compiled engine a
	// second time by OPA's interpreter, in the same call. Where they differ the
	// interpreter's decision is returned, and the interpreter evaluates this
	// program from then on. 0: none.
	SelfCheck int
	// OnMismatch is told once per program when a self-check fails. It must not
	// block: a call is waiting.
	OnMismatch func(Mismatch)

	// Engine is EngineTopdown to leave the program to the interpreter. "": the
	// compiled engine where it can.
	Engine string
}

// Mismatch tells of a self-check that failed. The texts are for an event: they
// hold decisions, and no input.
type Mismatch struct {
	Bundle   *Bundle
	Compiled string // what the compiled engine said: a decision or an error
	Topdown  string // what the interpreter said, which counts
}

// engine is the part of a Program that changes: once, from compiled to topdown.
type engine struct {
	reason atomic.Pointer[string] // why it is topdown; nil: it is compiled
	count  atomic.Uint64          // evaluations, where some are checked
	every  uint64                 // SelfCheck
	report func(Mismatch)
}

// Engine is what evaluates the program, EngineCompiled or EngineTopdown. With
// EngineTopdown the reason says why.
func (p *Program) Engine() (name, reason string) {
	if why := p.engine.reason.Load(); why != nil {
		return EngineTopdown, *why
	}
	return EngineCompiled, ""
}

func (p *Program) compiled() bool { return p.engine.reason.Load() == nil }

// leave makes the interpreter the engine. It reports whether it was not before.
func (e *engine) leave(why string) bool { return e.reason.CompareAndSwap(nil, &why) }

// sampled reports whether this evaluation is one to check.
func (p *Program) sampled() bool {
	return p.engine.every > 0 && p.engine.count.Add(1)%p.engine.every == 0
}

// selfCheck evaluates again what the compiled engine answered with *dst or err.
func (p *Program) selfCheck(ctx context.Context, m *irvm.Machine, in irvm.Value, now int64, dst *Decision, err error) error {
	if errors.Is(err, ErrBudget) {
		return err // the interpreter counts no steps: it has nothing to compare
	}
	compiled := *dst
	var again Decision
	oracle := p.interpret(ctx, m, in, now, &again)
	if errors.Is(oracle, ErrBudget) || sameOutcome(compiled, err, again, oracle) {
		return err
	}
	*dst = again
	if p.engine.leave("a self-check found a decision that the interpreter does not make") && p.engine.report != nil {
		p.engine.report(Mismatch{Bundle: p.bundle, Compiled: outcome(compiled, err), Topdown: outcome(again, oracle)})
	}
	return oracle
}

func sameOutcome(a Decision, aErr error, b Decision, bErr error) bool {
	for _, kind := range []error{ErrUndefined, ErrEvaluation, ErrResult} {
		if errors.Is(aErr, kind) != errors.Is(bErr, kind) {
			return false
		}
	}
	if aErr != nil || bErr != nil {
		return aErr != nil && bErr != nil
	}
	return a.Allow == b.Allow && equalOrEmpty(a.Reasons, b.Reasons) && equalOrEmpty(a.Redact, b.Redact) &&
		string(a.Approval) == string(b.Approval) && reflect.DeepEqual(a.Constraints, b.Constraints)
}

func equalOrEmpty[T any](a, b []T) bool {
	return len(a) == 0 && len(b) == 0 || reflect.DeepEqual(a, b)
}

func outcome(d Decision, err error) string {
	text := fmt.Sprintf("allow %t, reasons %v, constraints %+v, approval %s, redact %v", d.Allow, d.Reasons, d.Constraints, d.Approval, d.Redact)
	if err != nil {
		text = "error: " + err.Error()
	}
	if len(text) > maxOutcome {
		text = strings.ToValidUTF8(text[:maxOutcome], "") + "…"
	}
	return text
}

// maxOutcome bounds a text of a Mismatch, in bytes.
const maxOutcome = 1024
