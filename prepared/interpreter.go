package prepared

import (
	"context"
	"fmt"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// An interpreter is OPA's, ready to evaluate one policy. What it holds is several
// times as large as the compiled engine, which most policies never leave: a
// Program that is compiled makes it when it is needed first, and one that is
// checked by it has it from the start. It is safe for concurrent use.
type interpreter struct {
	query   rego.PreparedEvalQuery
	options []rego.EvalOption // those that are the same for every evaluation
}

func newInterpreter(ctx context.Context, c *ast.Compiler, entry ast.Ref, store storage.Store) (*interpreter, error) {
	// The store is never written. The one read transaction lives as long as the
	// interpreter and is freed with it.
	txn, err := store.NewTransaction(ctx)
	if err != nil {
		return nil, fmt.Errorf("open data: %w", err)
	}
	options := append(asked(c, entry), rego.Store(store), rego.Transaction(txn), rego.Target("rego"))
	query, err := rego.New(options...).PrepareForEval(ctx)
	if err != nil {
		return nil, err
	}
	return &interpreter{query, []rego.EvalOption{
		rego.EvalTransaction(txn),
		rego.EvalMetrics(metrics.NoOp()),
		rego.EvalGenerateJSON(func(t *ast.Term, _ *rego.EvalContext) (any, error) { return t.Value, nil }),
	}}, nil
}

// interpretBy makes the interpreter at once.
func (p *Program) interpretBy(ctx context.Context, c *ast.Compiler, entry ast.Ref, store storage.Store) error {
	oracle, err := newInterpreter(ctx, c, entry, store)
	p.oracle = func() (*interpreter, error) { return oracle, err }
	return err
}

// rereadInterpreter makes the interpreter of a bundle that has compiled before.
// It belongs to the program and not to the call that needs it first: no context
// of a call ends it. Its error denies that call and those after it.
func rereadInterpreter(b *Bundle, entry ast.Ref, store storage.Store) (_ *interpreter, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the compiler panicked: %v", r)
		}
		if err != nil {
			err = fmt.Errorf("make the interpreter ready: %w", err)
		}
	}()
	parsed, err := b.content()
	if err != nil {
		return nil, err
	}
	c, err := compileModules(modulesOf(parsed), nil)
	if err != nil {
		return nil, err
	}
	return newInterpreter(context.Background(), c, entry, store)
}

// eval is nil without an error for an undefined answer.
func (i *interpreter) eval(ctx context.Context, limit time.Duration, in ast.Value, now time.Time, more ...rego.EvalOption) (ast.Value, error) {
	if ctx.Err() != nil { // it may have taken its time to be made ready
		return nil, fmt.Errorf("%w: %w", ErrBudget, context.Cause(ctx))
	}
	// One Cancel for the timeout and the context. OPA's own way is a goroutine
	// per evaluation.
	cancel := topdown.NewCancel()
	timer := time.AfterFunc(limit, cancel.Cancel)
	defer timer.Stop()
	if ctx.Done() != nil {
		defer context.AfterFunc(ctx, cancel.Cancel)()
	}
	options := append(i.options[:len(i.options):len(i.options)],
		rego.EvalParsedInput(in), rego.EvalTime(now), rego.EvalExternalCancel(cancel))
	rs, err := i.query.Eval(ctx, append(options, more...)...)
	switch {
	case err != nil && topdown.IsCancel(err):
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", ErrBudget, context.Cause(ctx))
		}
		return nil, fmt.Errorf("%w: over %s", ErrBudget, limit)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrEvaluation, err)
	case len(rs) == 0:
		return nil, nil
	case len(rs) > 1 || len(rs[0].Expressions) != 1:
		return nil, fmt.Errorf("%w: %d answers, want one", ErrResult, len(rs))
	}
	v, ok := rs[0].Expressions[0].Value.(ast.Value)
	if !ok {
		return nil, fmt.Errorf("%w: %T is no value", ErrResult, rs[0].Expressions[0].Value)
	}
	return v, nil
}
