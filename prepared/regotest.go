package prepared

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/cover"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/tester"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// Outcomes of a Rego test.
const (
	TestPassed  = "passed"
	TestFailed  = "failed"
	TestErrored = "error"
	TestSkipped = "skipped" // its name begins with todo_
)

// TestReport is what Test found.
type TestReport struct {
	Passed   int          `json:"passed"`
	Failed   int          `json:"failed"`
	Errors   int          `json:"errors"`
	Skipped  int          `json:"skipped"`
	Coverage float64      `json:"coverage"`              // percent of the policy's lines, tests not counted
	Missed   []Lines      `json:"not_covered,omitempty"` // lines that no test reached
	Results  []TestResult `json:"results"`               // by file and line
}

// OK reports whether there were tests and all of them passed.
func (r *TestReport) OK() bool { return r.Passed > 0 && r.Failed == 0 && r.Errors == 0 }

// Lines is a range in a file, both ends included.
type Lines struct {
	File  string `json:"file"`
	First int    `json:"first"`
	Last  int    `json:"last"`
}

// TestResult is one test.
type TestResult struct {
	Name       string `json:"name"` // package.rule
	File       string `json:"file"`
	Line       int    `json:"line"`
	Outcome    string `json:"outcome"`
	DurationNS int64  `json:"duration_ns"`
	Output     string `json:"output,omitempty"` // of print()
	Detail     string `json:"detail,omitempty"` // the expression that failed, or the error
}

// testTimeout bounds one test.
const testTimeout = 5 * time.Second

// Test runs the Rego tests in dir with OPA's test runner, under the same
// capabilities as a node. It also refuses what Compile would refuse.
func Test(ctx context.Context, dir string) (*TestReport, error) {
	src, err := loadDir(dir, DefaultLimits)
	if err != nil {
		return nil, err
	}
	modules, policy, data := map[string]*ast.Module{}, map[string]*ast.Module{}, map[string]any{}
	for _, f := range src.files {
		if path.Ext(f.name) != regoExt {
			if err := insertData(data, path.Dir(f.name), f.data); err != nil {
				return nil, fmt.Errorf("%s: %w", f.name, err)
			}
			continue
		}
		m, err := ast.ParseModuleWithOpts(f.name, string(f.data), ast.ParserOptions{RegoVersion: ast.RegoV1, Capabilities: capabilities()})
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrCompile, err)
		}
		modules[f.name] = m
		if !strings.HasSuffix(f.name, testSuffix) {
			policy[f.name] = m
		}
	}
	if faults := checkModules(policy); len(faults) > 0 {
		return nil, fmt.Errorf("%w: %w", ErrCompile, joined(faults))
	}
	store := inmem.NewFromObject(data)
	txn, err := store.NewTransaction(ctx)
	if err != nil {
		return nil, err
	}
	defer store.Abort(ctx, txn)
	runner := func() *tester.Runner {
		compiler := ast.NewCompiler().WithCapabilities(capabilities()).WithDefaultRegoVersion(ast.RegoV1).
			WithEnablePrintStatements(true).WithPathConflictsCheck(storage.NonEmpty(ctx, store, txn))
		return tester.NewRunner().SetCompiler(compiler).SetStore(store).SetModules(modules).
			SetTimeout(testTimeout).CapturePrintOutput(true).RaiseBuiltinErrors(true)
	}
	cov := cover.New()
	results, err := runner().SetCoverageRuns(nil).SetCoverageQueryTracer(cov).RunTests(ctx, txn)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCompile, err)
	}
	report := &TestReport{Results: []TestResult{}}
	for r := range results {
		t := TestResult{Name: strings.TrimPrefix(r.Package, "data.") + "." + r.Name, DurationNS: int64(r.Duration), Output: string(r.Output)}
		if r.Location != nil {
			t.File, t.Line = r.Location.File, r.Location.Row
		}
		switch {
		case r.Skip:
			t.Outcome = TestSkipped
			report.Skipped++
		case r.Error != nil:
			t.Outcome, t.Detail = TestErrored, r.Error.Error()
			report.Errors++
		case r.Fail:
			t.Outcome = TestFailed
			report.Failed++
		default:
			t.Outcome = TestPassed
			report.Passed++
		}
		report.Results = append(report.Results, t)
	}
	if report.Failed > 0 {
		if err := explain(ctx, runner(), txn, report.Results); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err // an interrupted run is no report
	}
	slices.SortFunc(report.Results, func(a, b TestResult) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Name, b.Name))
	})
	c := cov.Report(policy)
	covered, missed := 0, 0
	for _, name := range slices.Sorted(maps.Keys(policy)) {
		fr := c.Files[name]
		covered, missed = covered+fr.CoveredLines, missed+fr.NotCoveredLines
		for _, r := range fr.NotCovered {
			l := Lines{name, r.Start.Row, r.End.Row}
			if n := len(report.Missed); n > 0 && report.Missed[n-1].File == name && report.Missed[n-1].Last >= l.First-1 {
				report.Missed[n-1].Last = max(report.Missed[n-1].Last, l.Last)
				continue
			}
			report.Missed = append(report.Missed, l)
		}
	}
	if covered+missed > 0 {
		report.Coverage = 100 * float64(covered) / float64(covered+missed)
	}
	return report, nil
}

// explain runs the failed tests again, traced, and fills in the expression of
// the test that did not hold. A trace of all tests would be slow and hides the
// coverage.
func explain(ctx context.Context, r *tester.Runner, txn storage.Transaction, results []TestResult) error {
	failed := map[string]*TestResult{}
	var names []string
	for i := range results {
		if t := &results[i]; t.Outcome == TestFailed {
			failed[t.Name] = t
			names = append(names, regexp.QuoteMeta(t.Name))
		}
	}
	traced, err := r.EnableTracing(true).Filter("^data\\.("+strings.Join(names, "|")+")$").RunTests(ctx, txn)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCompile, err)
	}
	for r := range traced {
		t := failed[strings.TrimPrefix(r.Package, "data.")+"."+r.Name]
		if t == nil {
			continue
		}
		for _, e := range r.Trace {
			if _, ok := e.Node.(*ast.Expr); ok && e.Op == topdown.FailOp && e.Location != nil && e.Location.File == t.File {
				t.Detail = fmt.Sprintf("%s:%d: %s", e.Location.File, e.Location.Row, e.Location.Text)
			}
		}
	}
	return nil
}

// insertData puts a data file's object under its directory's path, as OPA does.
func insertData(data map[string]any, dir string, content []byte) error {
	if dir != "." {
		for s := range strings.SplitSeq(dir, "/") {
			next, ok := data[s].(map[string]any)
			if !ok {
				if _, taken := data[s]; taken {
					return fmt.Errorf("the path %s is taken by another data file", dir)
				}
				next = map[string]any{}
				data[s] = next
			}
			data = next
		}
	}
	dec := json.NewDecoder(strings.NewReader(string(content)))
	dec.UseNumber()
	var own map[string]any
	if err := dec.Decode(&own); err != nil {
		return err
	}
	for k, v := range own {
		if _, taken := data[k]; taken {
			return fmt.Errorf("%q is in another data file, too", k)
		}
		data[k] = v
	}
	return nil
}
