package irvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/test/cases"
	"github.com/open-policy-agent/opa/v1/test/cases/testdata"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/types"
	"github.com/open-policy-agent/opa/v1/util"
)

// conformance loads OPA's own cases.
func conformance(t *testing.T) []cases.TestCase {
	t.Helper()
	var out []cases.TestCase
	err := fs.WalkDir(testdata.V1, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".yaml") {
			return err
		}
		raw, err := fs.ReadFile(testdata.V1, path)
		if err != nil {
			return err
		}
		var set cases.Set
		if err := util.Unmarshal(raw, &set); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, set.Cases...)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 2000 {
		t.Fatalf("only %d cases found", len(out))
	}
	return out
}

// minCompiled is the share of cases that must pass on the compiled path.
const minCompiled = 0.97

// TestConformance runs OPA's cases. A case passes compiled when the machine's
// answer, or the interpreter's after ErrRedo where the case wants an error, is
// the right one; it falls back when the interpreter had to give the answer.
func TestConformance(t *testing.T) {
	all := conformance(t)
	if raceEnabled {
		all = slices.DeleteFunc(all, func(tc cases.TestCase) bool { return len(tc.Note)%5 != 0 })
	}
	var passed, fell, failed int
	why := map[string]int{}
	for _, tc := range all {
		for k, v := range tc.Env {
			t.Setenv(k, v)
		}
		reason, err := runCase(tc)
		switch {
		case err != nil:
			failed++
			t.Errorf("%s: %v", tc.Note, err)
		case reason != "":
			fell++
			why[reason]++
			t.Logf("fell back: %s: %s", tc.Note, reason)
		default:
			passed++
		}
	}
	t.Logf("conformance: %d cases: %d passed compiled, %d fell back, %d failed", len(all), passed, fell, failed)
	if share := float64(passed) / float64(len(all)); share < minCompiled {
		t.Errorf("%.1f%% passed compiled, want %.0f%%", 100*share, 100*minCompiled)
	}
}

func init() {
	// One case calls this builtin of OPA's own tests.
	sleep := &ast.Builtin{Name: "test.sleep", Decl: types.NewFunction(types.Args(types.S), types.NewNull())}
	ast.RegisterBuiltin(sleep)
	topdown.RegisterBuiltinFunc(sleep.Name, func(_ topdown.BuiltinContext, args []*ast.Term, iter func(*ast.Term) error) error {
		d, err := time.ParseDuration(string(args[0].Value.(ast.String)))
		if err != nil {
			return err
		}
		time.Sleep(d)
		return iter(ast.NullTerm())
	})
}

// runCase says why the case fell back, "" if it did not, or what is wrong.
func runCase(tc cases.TestCase) (reason string, err error) {
	ctx := context.Background()
	caps := ast.CapabilitiesForThisVersion(ast.CapabilitiesExperimentalKeywords(true))
	data := map[string]any{}
	if tc.Data != nil {
		data = *tc.Data
	}
	modules := map[string]string{}
	for i, m := range tc.Modules {
		modules[fmt.Sprintf("test-%d.rego", i)] = m
	}
	c, err := ast.CompileModulesWithOpt(modules, ast.CompileOpts{ParserOptions: ast.ParserOptions{RegoVersion: ast.RegoV1, Capabilities: caps}})
	if err != nil {
		return "", err
	}
	options := []func(*rego.Rego){
		rego.Query(tc.Query), rego.SetRegoVersion(ast.RegoV1), rego.Capabilities(caps), rego.Compiler(c),
		rego.Store(inmem.NewFromObject(data)), rego.StrictBuiltinErrors(tc.StrictError),
	}
	var input ast.Value
	if tc.InputTerm != nil {
		term, err := ast.ParseTerm(*tc.InputTerm)
		if err != nil {
			return "", err
		}
		input = term.Value
	} else if tc.Input != nil {
		if input, err = ast.InterfaceToValue(*tc.Input); err != nil {
			return "", err
		}
	}

	got, vmErr := compiledAnswers(ctx, tc, options, caps, data, input)
	wantsError := tc.WantError != nil || tc.WantErrorCode != nil
	switch {
	case vmErr == nil && !wantsError:
		return "", sameAnswers(tc, got)
	case vmErr == nil:
		return "", fmt.Errorf("no error, got %v", got)
	case !errors.Is(vmErr, ErrRedo) && !errors.Is(vmErr, ErrUnsupported) && !errors.Is(vmErr, errPlan):
		return "", vmErr
	}
	got, tdErr := interpreted(ctx, options, input)
	switch {
	case wantsError && tdErr == nil:
		return "", fmt.Errorf("no error after %v", vmErr)
	case wantsError && errors.Is(vmErr, ErrRedo):
		return "", wantError(tc, tdErr)
	case wantsError:
		return vmErr.Error(), wantError(tc, tdErr)
	case tdErr != nil:
		return "", tdErr
	}
	return vmErr.Error(), sameAnswers(tc, got)
}

var errPlan = errors.New("no plan")

func compiledAnswers(ctx context.Context, tc cases.TestCase, options []func(*rego.Rego), caps *ast.Capabilities, data map[string]any, input ast.Value) ([]ast.Value, error) {
	plan, err := Plan(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errPlan, err)
	}
	base, err := FromJSON(data)
	if err != nil {
		return nil, err
	}
	p, err := Compile(plan, base, Options{Lenient: !tc.StrictError, Capabilities: caps})
	if err != nil {
		return nil, err
	}
	m := p.Machine(ctx)
	defer m.Release()
	var in Value
	if input != nil {
		if in, err = FromAST(input); err != nil {
			return nil, fmt.Errorf("%w: %w", errPlan, err)
		}
	}
	var out []ast.Value
	var v Value
	err = func() (err error) {
		defer m.recover(&v, &err)
		all, err := m.run(in, 1700000000000000000)
		for _, v := range all {
			out = append(out, v.AST())
		}
		return err
	}()
	return out, err
}

func interpreted(ctx context.Context, options []func(*rego.Rego), input ast.Value) ([]ast.Value, error) {
	q, err := rego.New(append(options, rego.Target("rego"), rego.GenerateJSON(func(t *ast.Term, _ *rego.EvalContext) (any, error) { return t, nil }))...).PrepareForEval(ctx)
	if err != nil {
		return nil, err
	}
	rs, err := q.Eval(ctx, rego.EvalParsedInput(input))
	var out []ast.Value
	for _, r := range rs {
		o := ast.NewObject()
		for k, v := range r.Bindings {
			o.Insert(ast.StringTerm(k), v.(*ast.Term))
		}
		out = append(out, o)
	}
	return out, err
}

func wantError(tc cases.TestCase, err error) error {
	if tc.WantErrorCode != nil {
		var te *topdown.Error
		if !errors.As(err, &te) || te.Code != *tc.WantErrorCode {
			return fmt.Errorf("error %v, want code %s", err, *tc.WantErrorCode)
		}
	}
	if tc.WantError != nil && !strings.Contains(err.Error(), *tc.WantError) {
		return fmt.Errorf("error %v, want %s", err, *tc.WantError)
	}
	return nil
}

func sameAnswers(tc cases.TestCase, answers []ast.Value) error {
	if tc.WantResult == nil {
		return errors.New("the case wants nothing")
	}
	want, got := ast.NewSet(), ast.NewSet()
	for _, b := range *tc.WantResult {
		o := ast.NewObject()
		for k, v := range b {
			o.Insert(ast.StringTerm(k), ast.NewTerm(ast.MustInterfaceToValue(v)))
		}
		want.Add(ast.NewTerm(o))
	}
	for _, a := range answers {
		o := ast.NewObject()
		a.(ast.Object).Foreach(func(k, v *ast.Term) {
			if strings.HasPrefix(string(k.Value.(ast.String)), "__") {
				return
			}
			j, err := ast.JSON(v.Value)
			if err != nil {
				panic(err)
			}
			if list, ok := j.([]any); ok && tc.SortBindings {
				slices.SortFunc(list, util.Compare)
			}
			o.Insert(k, ast.NewTerm(ast.MustInterfaceToValue(j)))
		})
		got.Add(ast.NewTerm(o))
	}
	if want.Compare(got) != 0 {
		return fmt.Errorf("got %v, want %v", got, want)
	}
	return nil
}
