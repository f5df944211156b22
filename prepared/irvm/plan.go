package irvm

import (
	"context"
	"errors"
	"fmt"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
	"github.com/open-policy-agent/opa/v1/rego"
)

// target is the name under which this package asks OPA for plans.
const target = "autonomy.irvm"

// OPA hands out plans only to a plugin, and looks for plugins in a map that it
// reads without a lock: the registration must happen before any query is
// prepared.
func init() { rego.RegisterPlugin(target, planner{}) }

// planner is a target that evaluates nothing: it keeps the plan.
type planner struct{}

type planKey struct{}

func (planner) IsTarget(t string) bool { return t == target }

func (planner) PrepareForEval(ctx context.Context, p *ir.Policy, _ ...rego.PrepareOption) (rego.TargetPluginEval, error) {
	into, ok := ctx.Value(planKey{}).(**ir.Policy)
	if !ok {
		return nil, fmt.Errorf("target %s makes plans for one caller only", target)
	}
	*into = p
	return noEval{}, nil
}

type noEval struct{}

func (noEval) Eval(context.Context, *rego.EvalContext, ast.Value) (ast.Value, error) {
	return nil, fmt.Errorf("target %s evaluates nothing", target)
}

// Plan asks OPA for the plan of a query. The options name the query and the
// compiler or modules; the target is set here. The error is OPA's: it has no
// plan for a few constructs that its interpreter can evaluate.
func Plan(ctx context.Context, options ...func(*rego.Rego)) (p *ir.Policy, err error) {
	defer func() {
		if r := recover(); r != nil {
			p, err = nil, fmt.Errorf("the planner panicked: %v", r)
		}
	}()
	options = append(options[:len(options):len(options)], rego.Target(target))
	ctx = context.WithValue(ctx, planKey{}, &p)
	if _, err := rego.New(options...).PrepareForEval(ctx); err != nil {
		return nil, err
	}
	if p == nil || len(p.Plans.Plans) != 1 {
		return nil, errors.New("the planner made no plan")
	}
	return p, nil
}
