package prepared

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/types"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/prepared/irvm"
)

// A builtin that panics, as a faulty one in OPA would.
func init() {
	ast.RegisterBuiltin(&ast.Builtin{Name: "test.panic", Decl: types.NewFunction(types.Args(types.A), types.B)})
	topdown.RegisterBuiltinFunc("test.panic", func(topdown.BuiltinContext, []*ast.Term, func(*ast.Term) error) error {
		panic("a fault in a builtin")
	})
}

func deny(t *testing.T, p *Program, input string, want error, text string) {
	t.Helper()
	d, err := p.Eval(t.Context(), []byte(input))
	if !reflect.DeepEqual(d, Decision{}) {
		t.Errorf("%s: the decision is %+v, want the zero value", input, d)
	}
	if !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: the error is %v, want %v with %q", input, err, want, text)
	}
	kinds := 0
	for _, e := range []error{ErrUndefined, ErrEvaluation, ErrResult, ErrBudget} {
		if errors.Is(err, e) {
			kinds++
		}
	}
	if kinds != 1 {
		t.Errorf("%s: the error is of %d kinds: %v", input, kinds, err)
	}
}

// TestEvalFailsClosed is INV-15 for the evaluator.
func TestEvalFailsClosed(t *testing.T) {
	t.Run("undefined", func(t *testing.T) {
		p := program(t, "package autonomy\n\nallow if input.kind == \"tool.echo\"\n")
		deny(t, p, `{"kind":"tool.shell"}`, ErrUndefined, "autonomy/allow is undefined")
		deny(t, p, `{}`, ErrUndefined, "")
	})
	t.Run("a part of the decision is undefined", func(t *testing.T) {
		p := program(t, "package autonomy\n\nallow if input.ok\n\ndecision := {\"allow\": allow}\n")
		deny(t, p, `{}`, ErrUndefined, "autonomy/decision is undefined")
	})
	t.Run("builtin error", func(t *testing.T) {
		// Without strict builtin errors the negation would hold and allow.
		p := program(t, "package autonomy\n\nimport rego.v2\n\nallow if not to_number(input.n) > 10\n")
		deny(t, p, `{"n":"x"}`, ErrEvaluation, "to_number")
		p = program(t, "package autonomy\n\nallow if 1 / input.n == 1\n")
		deny(t, p, `{"n":0}`, ErrEvaluation, "divide by zero")
	})
	t.Run("conflicting rules", func(t *testing.T) {
		p := program(t, "package autonomy\n\nallow := true if input.a\n\nallow := false if input.b\n")
		deny(t, p, `{"a":true,"b":true}`, ErrEvaluation, "conflict")
	})
	t.Run("panic", func(t *testing.T) {
		p := program(t, "package autonomy\n\ndefault allow := true\n\nallow := false if test.panic(input)\n")
		for range 3 { // and it can go on afterwards
			deny(t, p, `{}`, ErrEvaluation, "the evaluator panicked: a fault in a builtin")
		}
	})
	t.Run("input", func(t *testing.T) {
		p := program(t, allowAll)
		deny(t, p, ``, ErrEvaluation, "want a JSON object")
		deny(t, p, `{"kind":"a","kind":"b"}`, ErrEvaluation, "duplicate key")
		deny(t, p, `{} {}`, ErrEvaluation, "data after the value")
		deny(t, p, `{"a":"`+strings.Repeat("a", MaxInputBytes)+`"}`, ErrBudget, "at most 1048576")
	})
	t.Run("context", func(t *testing.T) {
		p := program(t, allowAll)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if d, err := p.Eval(ctx, []byte(`{}`)); d.Allow || !errors.Is(err, ErrBudget) || !errors.Is(err, context.Canceled) {
			t.Errorf("%+v, %v", d, err)
		}
		slow := program(t, "package autonomy\n\ndefault allow := true\n\nallow := false if {\n\tr := numbers.range(1, 3000)\n\tcount([1 | some x in r; some y in r; x + y == 0]) > 0\n}\n")
		ctx, cancel = context.WithTimeout(t.Context(), 30*time.Millisecond)
		defer cancel()
		start := time.Now()
		if d, err := slow.Eval(ctx, []byte(`{}`)); d.Allow || !errors.Is(err, ErrBudget) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%+v, %v", d, err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("stopped after %s", took)
		}
		for _, engine := range []string{EngineCompiled, EngineTopdown} {
			slow, err := CompileWith(t.Context(), slow.Bundle(), Options{Engine: engine, Limits: irvm.Limits{Time: 30 * time.Millisecond}})
			if err != nil {
				t.Fatal(err)
			}
			deny(t, slow, `{}`, ErrBudget, "over 30ms")
		}
	})
}

// TestDecision holds every answer that is taken, and what is made of it.
func TestDecision(t *testing.T) {
	tests := []struct {
		answer string
		want   Decision
	}{
		{`true`, Decision{Allow: true}},
		{`false`, Decision{}},
		{`{"allow": true}`, Decision{Allow: true}},
		{`{"allow": false, "reasons": ["no", {"code": "c"}, {"code": "c", "message": "m"}]}`,
			Decision{Reasons: []event.Reason{{Message: "no"}, {Code: "c"}, {Code: "c", Message: "m"}}}},
		{`{"allow": false, "reasons": {"b", "a"}}`, Decision{Reasons: []event.Reason{{Message: "a"}, {Message: "b"}}}},
		{`{"allow": true, "reasons": [], "constraints": {}, "redact": set()}`, Decision{Allow: true, Reasons: []event.Reason{}, Redact: []string{}}},
		{`{"allow": true, "constraints": {"timeout_ms": 1, "memory_max": 2, "pids_max": 3, "cpu_max": "50000 100000", "egress": ["a.example:443", "[::1]:80"], "output_max_bytes": 4, "env": ["HOME"], "fs": ["ro:/usr", "rw:/tmp"]}}`,
			Decision{Allow: true, Constraints: constraint.Constraints{TimeoutMS: 1, MemoryMax: 2, PidsMax: 3, CPUMax: "50000 100000",
				Egress: []string{"a.example:443", "[::1]:80"}, OutputMaxBytes: 4, Env: []string{"HOME"}, FS: []string{"ro:/usr", "rw:/tmp"}}}},
		{`{"allow": true, "constraints": {"egress": []}}`, Decision{Allow: true, Constraints: constraint.Constraints{Egress: []string{}}}},
		{`{"allow": true, "approval": {"by": {"ops"}, "n": 1}}`, Decision{Allow: true, Approval: json.RawMessage(`{"by":["ops"],"n":1}`)}},
		{`{"allow": true, "redact": ["/params/token"]}`, Decision{Allow: true, Redact: []string{"/params/token"}}},
	}
	for _, tt := range tests {
		p := program(t, "package autonomy\n\ndecision := "+tt.answer+"\n")
		d, err := p.Eval(t.Context(), []byte(`{}`))
		if err != nil || !reflect.DeepEqual(d, tt.want) {
			t.Errorf("%s:\nhave %+v, %v\nwant %+v", tt.answer, d, err, tt.want)
		}
	}
}

func TestDecisionRefused(t *testing.T) {
	for answer, want := range map[string]string{
		`"allow"`:                          "the answer is a string",
		`1`:                                "the answer is a number",
		`null`:                             "the answer is null",
		`[true]`:                           "the answer is an array",
		`{true}`:                           "the answer is a set",
		`{}`:                               "allow is missing",
		`{"reasons": []}`:                  "allow is missing",
		`{"allow": "true"}`:                "allow is a string, want a boolean",
		`{"allow": 1}`:                     "allow is a number",
		`{"allow": null}`:                  "allow is null",
		`{"allow": true, "Allow": false}`:  `unknown field "Allow"; did you mean "allow"?`,
		`{"allow": true, "reason": "x"}`:   `unknown field "reason"; did you mean "reasons"?`,
		`{"allow": true, 1: 2}`:            "key 1 is no string",
		`{"allow": true, "reasons": "x"}`:  "reasons is a string",
		`{"allow": true, "reasons": [1]}`:  "reasons is a number",
		`{"allow": true, "reasons": [""]}`: "a reason says nothing",
		`{"allow": true, "reasons": [{"code": 1}]}`:                           "reasons.code is a number",
		`{"allow": true, "reasons": [{"text": "x"}]}`:                         `unknown field "reasons.text"`,
		`{"allow": true, "reasons": [{}]}`:                                    "a reason says nothing",
		`{"allow": true, "reasons": numbers.range(1, 65)}`:                    "65 reasons, at most 64",
		`{"allow": true, "constraints": null}`:                                "constraints is null",
		`{"allow": true, "constraints": {"timout_ms": 1}}`:                    `unknown field "constraints.timout_ms"; did you mean "timeout_ms"?`,
		`{"allow": true, "constraints": {"timeout_ms": 0}}`:                   "constraints.timeout_ms is 0, want an integer from 1",
		`{"allow": true, "constraints": {"timeout_ms": -5}}`:                  "constraints.timeout_ms is -5",
		`{"allow": true, "constraints": {"timeout_ms": 1.5}}`:                 "constraints.timeout_ms is 1.5",
		`{"allow": true, "constraints": {"memory_max": 9223372036854775808}}`: "constraints.memory_max is 9223372036854775808",
		`{"allow": true, "constraints": {"pids_max": "3"}}`:                   "constraints.pids_max is a string",
		`{"allow": true, "constraints": {"cpu_max": "50%"}}`:                  "constraints.cpu_max: want",
		`{"allow": true, "constraints": {"cpu_max": "0 100000"}}`:             "constraints.cpu_max: want",
		`{"allow": true, "constraints": {"egress": "a:1"}}`:                   "constraints.egress is a string",
		`{"allow": true, "constraints": {"egress": ["a"]}}`:                   `constraints.egress: "a", want host:port`,
		`{"allow": true, "constraints": {"egress": [":80"]}}`:                 `constraints.egress: ":80"`,
		`{"allow": true, "constraints": {"egress": ["a:0"]}}`:                 `constraints.egress: "a:0"`,
		`{"allow": true, "constraints": {"env": ["A=B"]}}`:                    `constraints.env: "A=B"`,
		`{"allow": true, "constraints": {"env": [1]}}`:                        "constraints.env is a number",
		`{"allow": true, "constraints": {"fs": ["/tmp"]}}`:                    `constraints.fs: "/tmp"`,
		`{"allow": true, "approval": true}`:                                   "approval is a boolean",
		`{"allow": true, "approval": null}`:                                   "approval is null",
		`{"allow": true, "redact": ["params/token"]}`:                         `redact: "params/token" is no JSON Pointer`,
	} {
		deny(t, program(t, "package autonomy\n\ndecision := "+answer+"\n"), `{}`, ErrResult, want)
	}
}

func TestCompileRefuses(t *testing.T) {
	type row struct{ name, rego, want string }
	tests := []row{
		{"no entrypoint", "package autonomy\n\nx := 1\n", "no rule data.autonomy.decision or data.autonomy.allow"},
		{"negation", "package autonomy\n\nallow if not input.x\n", "p.rego:3: `not` without `import rego.v2`"},
		{"negation in a comprehension", "package autonomy\n\nallow if count([1 | not input.x]) == 0\n", "p.rego:3: `not`"},
		{"unknown function", "package autonomy\n\nallow if nosuch(1)\n", "undefined function nosuch"},
		{"unsafe variable", "package autonomy\n\nallow if x == 1\n", "unsafe"},
		{"local time", "package autonomy\n\nallow if time.weekday([input.time_ns, \"Local\"]) == \"Monday\"\n", "p.rego:3: the time zone \"Local\" is another one"},
		{"recursion", "package autonomy\n\nallow if allow\n", "recursive"},
		{"as a value", "package autonomy\n\nallow if f(1)\n\nf(x) if http.send({\"url\": x, \"method\": \"get\"})\n", "p.rego:5: http.send is not available"},
		{"by with", "package autonomy\n\nallow if f with f as http.send\n\nf := 1\n", "http.send is not available"},
	}
	for name := range RefusedBuiltins {
		b, ok := ast.BuiltinMap[name]
		if !ok {
			t.Errorf("OPA has no builtin %s any more", name)
			continue
		}
		args := make([]string, len(b.Decl.FuncArgs().Args))
		for i := range args {
			args[i] = "input"
		}
		tests = append(tests, row{name, fmt.Sprintf("package autonomy\n\nallow if %s(%s)\n", name, strings.Join(args, ", ")), "p.rego:3: " + name + " is not available in a policy: "})
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Compile(t.Context(), policyBundle(t, "1.0.0", tt.rego))
			if !errors.Is(err, ErrCompile) || !strings.Contains(err.Error(), tt.want) || p != nil {
				t.Errorf("have %v, %v; want %q", p, err, tt.want)
			}
		})
	}
	if _, err := Compile(t.Context(), &Bundle{}); !errors.Is(err, ErrCompile) {
		t.Errorf("a bundle made by hand: %v", err)
	}
	data := policyBundle(t, "1.0.0", allowAll, entry{name: "data.json", body: `{"autonomy":{"allow":false}}`})
	if _, err := Compile(t.Context(), data); !errors.Is(err, ErrCompile) || !strings.Contains(err.Error(), "conflict") {
		t.Errorf("data over a rule: %v", err)
	}
}

// TestCapabilities is INV-17: what is nondeterministic is absent, whatever a
// later OPA adds, and all that is refused exists.
func TestCapabilities(t *testing.T) {
	have := map[string]bool{}
	for _, b := range capabilities().Builtins {
		have[b.Name] = true
		if b.IsNondeterministic() && !keptNondeterministic[b.Name] {
			t.Errorf("%s is nondeterministic and available", b.Name)
		}
	}
	for name := range RefusedBuiltins {
		if have[name] {
			t.Errorf("%s is available", name)
		}
	}
	var unexplained []string
	for _, b := range ast.Builtins {
		if _, ok := RefusedBuiltins[b.Name]; !ok && !have[b.Name] {
			unexplained = append(unexplained, b.Name)
		}
	}
	if len(unexplained) > 0 {
		t.Errorf("refused without a reason for the author: %v", unexplained)
	}
	if len(capabilities().AllowNet) != 0 || capabilities().AllowNet == nil {
		t.Error("network hosts are not restricted to none")
	}
	t.Log(slices.Sorted(maps.Keys(RefusedBuiltins)))
}

// TestTimeIsRecorded: time.now_ns is the input's, never the clock.
func TestTimeIsRecorded(t *testing.T) {
	p := program(t, "package autonomy\n\ndecision := {\"allow\": true, \"reasons\": [sprintf(\"%d\", [time.now_ns()])]}\n")
	for range 2 {
		d, err := Replay(t.Context(), p, []byte(`{"time_ns":1700000000123456789}`))
		if err != nil || d.Reasons[0].Message != "1700000000123456789" {
			t.Errorf("%+v, %v", d, err)
		}
	}
	deny(t, p, `{}`, ErrEvaluation, "time_ns is missing")
	deny(t, p, `{"time_ns":"now"}`, ErrEvaluation, "time_ns is string")
	deny(t, p, `{"time_ns":1.5}`, ErrEvaluation, "time_ns is 1.5")
	deny(t, p, `{"time_ns":1e30}`, ErrEvaluation, "time_ns is 1e30")
	// A policy that does not ask for the time does not need it.
	if d, err := program(t, allowAll).Eval(t.Context(), []byte(`{}`)); err != nil || !d.Allow {
		t.Errorf("%+v, %v", d, err)
	}
}

// TestNegation shows what rego.v2 is required for, and that it is enough here.
func TestNegation(t *testing.T) {
	const rule = "default allow := false\n\nallow if count(deny) == 0\n\ndeny contains \"outside\" if not startswith(input.params.path, \"/srv/\")\n"
	p := program(t, "package autonomy\n\nimport rego.v2\n\n"+rule)
	for in, want := range map[string]bool{
		`{"params":{"path":"/srv/a"}}`: true, `{"params":{"path":"/etc/a"}}`: false, `{"params":{}}`: false, `{}`: false,
	} {
		if d, err := p.Eval(t.Context(), []byte(in)); err != nil || d.Allow != want {
			t.Errorf("%s: %+v, %v; want %v", in, d, err, want)
		}
	}
	// The import by its single part is as good.
	program(t, "package autonomy\n\nimport future.keywords.not\n\n"+rule)
}

// TestQuickstart: the policy that a newcomer reads does what it says.
func TestQuickstart(t *testing.T) {
	p := quickstartProgram(t)
	names, inputs, err := exampleCalls(quickstart)
	if err != nil || len(inputs) < 6 {
		t.Fatalf("%d inputs, %v", len(inputs), err)
	}
	for i, in := range inputs {
		d, err := p.Eval(t.Context(), in)
		if err != nil {
			t.Errorf("%s: %v", names[i], err)
		}
		if d.Allow != strings.Contains(names[i], "/allow_") {
			t.Errorf("%s: allow is %v", names[i], d.Allow)
		}
		if !d.Allow && len(d.Reasons) != 1 {
			t.Errorf("%s: %d reasons: %v", names[i], len(d.Reasons), d.Reasons)
		}
	}
	if r, err := Probe(t.Context(), p, ProbeOptions{}); err != nil || r.Examples != len(inputs) || r.Probes < 100 || len(r.Found) > 0 {
		t.Errorf("fails open: %+v, %v", r, err)
	}
	if found, err := Lint(t.Context(), quickstart, "", nil); err != nil || len(found) > 0 {
		t.Errorf("lint: %v, %v", found, err)
	}
	r, err := Test(t.Context(), quickstart)
	if err != nil || !r.OK() || r.Coverage < 100 {
		t.Errorf("tests: %+v, %v", r, err)
	}
}

func quickstartProgram(t testing.TB) *Program {
	t.Helper()
	raw, err := BuildBundle(quickstart, BuildOptions{Name: "quickstart", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := ReadBundle(raw, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return compiled(t, b)
}

// TestEvalConcurrently: one program, many callers, one answer each.
func TestEvalConcurrently(t *testing.T) {
	p := quickstartProgram(t)
	_, inputs, err := exampleCalls(quickstart)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]Decision, len(inputs))
	for i, in := range inputs {
		want[i], _ = p.Eval(t.Context(), in)
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 200 {
				k := (i + g) % len(inputs)
				if d, err := p.Eval(t.Context(), inputs[k]); err != nil || !reflect.DeepEqual(d, want[k]) {
					t.Errorf("input %d: %+v, %v", k, d, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestEvalAllocations holds the figure of BenchmarkEval in bounds: allocations
// do not depend on the machine.
func TestEvalAllocations(t *testing.T) {
	p := quickstartProgram(t)
	_, inputs, err := exampleCalls(quickstart)
	if err != nil {
		t.Fatal(err)
	}
	n := testing.AllocsPerRun(100, func() {
		if _, err := p.Eval(context.Background(), inputs[0]); err != nil {
			t.Fatal(err)
		}
	})
	if n > maxEvalAllocs {
		t.Errorf("%.0f allocations for %s, at most %d", n, "allow_echo", maxEvalAllocs)
	}
}

func BenchmarkEval(b *testing.B) {
	p := quickstartProgram(b)
	names, inputs, err := exampleCalls(quickstart)
	if err != nil {
		b.Fatal(err)
	}
	for i, in := range inputs {
		b.Run(strings.TrimSuffix(strings.TrimPrefix(names[i], "inputs/"), ".json"), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := p.Eval(context.Background(), in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkEvalPlain is what a program does that takes OPA as its guide shows
// it: encoding/json, EvalInput, default options. For the ratio to BenchmarkEval.
func BenchmarkEvalPlain(b *testing.B) {
	p := quickstartProgram(b)
	_, inputs, err := exampleCalls(quickstart)
	if err != nil {
		b.Fatal(err)
	}
	content, err := p.bundle.content()
	if err != nil {
		b.Fatal(err)
	}
	options := []func(*rego.Rego){rego.Query("data.autonomy.decision"), rego.Store(inmem.NewFromObject(content.Data))}
	for _, m := range content.Modules {
		options = append(options, rego.Module(m.Path, string(m.Raw)))
	}
	query, err := rego.New(options...).PrepareForEval(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		var in map[string]any
		if err := json.Unmarshal(inputs[0], &in); err != nil {
			b.Fatal(err)
		}
		rs, err := query.Eval(context.Background(), rego.EvalInput(in))
		if err != nil || len(rs) != 1 {
			b.Fatal(rs, err)
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	raw, err := BuildBundle(quickstart, BuildOptions{Name: "quickstart", Version: "1.0.0"})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		bundle, err := ReadBundle(raw, Limits{})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := Compile(context.Background(), bundle); err != nil {
			b.Fatal(err)
		}
	}
}

// maxEvalAllocs is what is measured, 250, and a little: with the race detector
// pools lose items at random.
const maxEvalAllocs = 310
