package irvm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/util"
)

// compiled is a program whose answer is data.p.answer.
func compiled(t testing.TB, policy, data string, o Options) *Program {
	t.Helper()
	var d map[string]any
	if err := util.UnmarshalJSON([]byte(data), &d); err != nil {
		t.Fatal(err)
	}
	plan, err := Plan(context.Background(), rego.Query("data.p.answer"), rego.Module("p.rego", "package p\n\nimport rego.v2\n\n"+policy), rego.SetRegoVersion(ast.RegoV1))
	if err != nil {
		t.Fatal(err)
	}
	base, err := FromJSON(d)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Compile(plan, base, o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// answer evaluates and returns the answer as JSON, "" if it is undefined.
func answer(ctx context.Context, p *Program, input string) (string, error) {
	m := p.Machine(ctx)
	defer m.Release()
	in, err := m.Parse([]byte(input))
	if err != nil {
		return "", err
	}
	v, err := m.Eval(in, 0)
	return string(v.AppendJSON(nil)), err
}

func TestBudget(t *testing.T) {
	many := `{"l":[` + strings.TrimSuffix(strings.Repeat("1,", 5000), ",") + `]}`
	long := fmt.Sprintf(`{"s":%q,"t":%q}`, strings.Repeat("a", 400_000), strings.Repeat("b", 400_000))
	for name, tc := range map[string]struct {
		policy, input string
		limits        Limits
		want          string
	}{
		"loops":      {"answer := count([1 | some x in input.l; some y in input.l; x + y == 3])", many, Limits{}, "over 20000000 steps"},
		"few steps":  {"answer := count([1 | some x in input.l])", many, Limits{Steps: 1000}, "over 1000 steps"},
		"calls":      {"f(x) := x if { g(x); g(x) }\ng(x) := x if { h(x); h(x) }\nh(x) := x if { k(x); k(x) }\nk(x) := x if { every y in input.l { y == 1 } }\nanswer := [f(x) | some x in input.l]", many, Limits{}, "steps"},
		"time":       {"answer := count([1 | some x in input.l; some y in input.l; x + y == 3])", many, Limits{Time: time.Millisecond, Steps: 1 << 60}, "over 1ms"},
		"memory":     {"answer := [[x, y] | some x in input.l; some y in input.l]", many, Limits{Steps: 1 << 60}, "bytes of memory"},
		"input":      {"answer := true", many, Limits{Memory: 10_000}, "bytes of memory"},
		"range":      {"answer := numbers.range(1, input.n)", `{"n":1000000000000}`, Limits{}, "bytes of memory"},
		"huge range": {"answer := numbers.range(1, input.n)", `{"n":1e300}`, Limits{}, "bytes of memory"},
		"range step": {"answer := numbers.range_step(1, input.n, 2)", `{"n":1000000000000}`, Limits{}, "bytes of memory"},
		"shift":      {"answer := bits.lsh(1, input.n)", `{"n":1000000000}`, Limits{}, "bits.lsh by more than"},
		"network":    {"answer := net.cidr_expand(input.n)", `{"n":"10.0.0.0/8"}`, Limits{}, "24 host bits, at most 16"},
		"replace":    {"answer := replace(input.s, \"a\", input.t)", long, Limits{}, "bytes of memory"},
		"replace_n":  {"answer := strings.replace_n({\"a\": input.t}, input.s)", long, Limits{}, "bytes of memory"},
		"regex":      {"answer := regex.replace(input.s, \"a\", input.t)", long, Limits{}, "bytes of memory"},
		"padding":    {"answer := sprintf(concat(\"\", [\"%900000d\" | some x in input.l]), input.l)", many, Limits{}, "bytes of memory"},
		"star":       {"answer := sprintf(concat(\"\", [\"%*d\" | some x in input.l]), input.l)", many, Limits{}, "bytes of memory"},
		"printing":   {"answer := sprintf(concat(\"\", [\"%[1]v\" | some x in input.l]), [input.l])", many, Limits{}, "bytes of memory"},
		"paths":      {"answer := graph.reachable_paths({k: numbers.range(k + 1, 40) | some k in numbers.range(0, 39)}, {0})", `{}`, Limits{}, "over"},
		"walk":       {"answer := count([1 | some x in input.l; walk(input, [_, y]); y == x])", many, Limits{Steps: 1 << 60}, "bytes of memory"},
	} {
		t.Run(name, func(t *testing.T) {
			p := compiled(t, tc.policy, `{}`, Options{Limits: tc.limits})
			start := time.Now()
			out, err := answer(t.Context(), p, tc.input)
			if out != "" || !errors.Is(err, ErrBudget) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("have %.40q, %v; want ErrBudget and %q", out, err, tc.want)
			}
			if took := time.Since(start); took > time.Minute {
				t.Errorf("cut after %s", took)
			}
			if out, err := answer(t.Context(), p, `{"l":[],"n":"x","s":"","t":""}`); err != nil && !errors.Is(err, ErrRedo) && !errors.Is(err, ErrBudget) {
				t.Errorf("the next evaluation: %s, %v", out, err)
			}
		})
	}
}

// TestCancelled: an evaluation ends soon after its context.
func TestCancelled(t *testing.T) {
	p := compiled(t, "answer := count([1 | some x in input.l; some y in input.l; x + y == 3])", `{}`, Options{Limits: Limits{Steps: 1 << 60}})
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the caller left")
	cancel(why)
	_, err := answer(ctx, p, `{"l":[`+strings.TrimSuffix(strings.Repeat("1,", 5000), ",")+`]}`)
	if !errors.Is(err, ErrBudget) || !errors.Is(err, why) {
		t.Errorf("the error is %v", err)
	}
}

// TestIndex: thousands of rules that each begin with a comparison take no more
// steps than one, and say the same.
func TestIndex(t *testing.T) {
	var policy strings.Builder
	policy.WriteString("default answer := \"none\"\n")
	for i := range 3000 {
		fmt.Fprintf(&policy, "answer := \"a%d\" if {\n\tinput.tool.name == \"t%d\"\n\tinput.x > %d\n}\n", i, i, i%7)
	}
	policy.WriteString("answer := \"always\" if input.any\n")
	policy.WriteString("answer := \"seven\" if input.tool.name == 7\n")
	p := compiled(t, policy.String(), `{}`, Options{})
	for input, want := range map[string]string{
		`{"tool":{"name":"t2999"},"x":9}`:            `"a2999"`,
		`{"tool":{"name":"t6"},"x":6}`:               `"none"`, // 6 > 6 does not hold
		`{"tool":{"name":"t3000"},"x":9}`:            `"none"`,
		`{"tool":{"name":"t3000"},"x":9,"any":true}`: `"always"`,
		`{"tool":{"name":7.0}}`:                      `"seven"`,
		`{"tool":"t1","x":9}`:                        `"none"`,
		`{"any":1}`:                                  `"always"`,
		`{}`:                                         `"none"`,
	} {
		m := p.Machine(t.Context())
		in, err := m.Parse([]byte(input))
		if err != nil {
			t.Fatal(err)
		}
		before := m.steps
		v, err := m.Eval(in, 0)
		if have := string(v.AppendJSON(nil)); err != nil || have != want {
			t.Errorf("%s: %s, %v; want %s", input, have, err, want)
		}
		if took := m.steps - before; took > 200 {
			t.Errorf("%s took %d steps", input, took)
		}
		m.Release()
	}
	// Two that apply and differ are a conflict, index or not.
	if _, err := answer(t.Context(), p, `{"tool":{"name":"t1"},"x":9,"any":true}`); !errors.Is(err, ErrRedo) {
		t.Errorf("two values: %v", err)
	}
}

// TestNotInLoop: what a `not` found in one round of a loop does not hold in the
// next, although the plan does not reset the local that says so.
func TestNotInLoop(t *testing.T) {
	p := compiled(t, "answer contains x if {\n\tsome x in input.l\n\tnot {\n\t\tsome y in input.m[x]\n\t\ty == 1\n\t}\n}\n", `{}`, Options{})
	out, err := answer(t.Context(), p, `{"l":["a","b","c","d"],"m":{"a":[1],"b":[2],"c":[1,2],"d":[]}}`)
	if err != nil || out != `["b","d"]` {
		t.Errorf("%s, %v", out, err)
	}
}

// TestFold: rules that do not depend on the input are evaluated at load, those
// that do are not, and a rule that fails is left to each evaluation.
func TestFold(t *testing.T) {
	policy := `
admins := {u | some u, r in data.users; r == "admin"}
big := numbers.range(1, 400000)
fails := 1 / data.zero
clock := time.now_ns()
answer := [input.u in admins, count(admins), now] if now := clock
other := count(big)
use := fails
`
	p := compiled(t, policy+"answer := fails if input.fail\nanswer := count(big) if input.big\n", `{"users":{"a":"admin","b":"user","c":"admin"},"zero":0}`, Options{})
	for input, want := range map[string]string{`{"u":"a"}`: `[true,2,0]`, `{"u":"b"}`: `[false,2,0]`} {
		if have, err := answer(t.Context(), p, input); err != nil || have != want {
			t.Errorf("%s: %s, %v; want %s", input, have, err, want)
		}
	}
	if _, err := answer(t.Context(), p, `{"u":"a","fail":true}`); !errors.Is(err, ErrRedo) {
		t.Errorf("a rule that fails: %v", err)
	}
}

// TestAllocations: an evaluation on a warm machine allocates nothing.
func TestAllocations(t *testing.T) {
	p := compiled(t, `
answer := {"a": {x | some x in input.l; x > 1}, "s": sprintf("%s-%d", [lower(input.s), count(input.l)]), "r": regex.match("^[a-z]+$", input.s), "o": input.o, "p": split(input.s, "B")[0]} if not input.missing
`, `{"users":{"a":1}}`, Options{})
	input := []byte(`{"l":[1,2,3,4,5,6,7,8,9,10,11,12],"s":"aBc","o":{"k":1.5,"e":"x\ty"}}`)
	buf := make([]byte, 0, 1024)
	if n := testing.AllocsPerRun(200, func() {
		m := p.Machine(context.Background())
		in, err := m.Parse(input)
		if err != nil {
			t.Fatal(err)
		}
		v, err := m.Eval(in, 0)
		if err != nil || len(m.Members(v.Get("a"))) != 11 {
			t.Fatal(err)
		}
		buf = v.Get("s").AppendJSON(buf[:0])
		m.Release()
	}); n != 0 && !raceEnabled { // the race detector allocates
		t.Errorf("%v allocations", n)
	}
}

// TestPanic: what panics in a builtin ends this evaluation only.
func TestPanic(t *testing.T) {
	native["test.panics"] = func1(func(*Machine, Value) Value { panic("a fault") })
	ast.RegisterBuiltin(&ast.Builtin{Name: "test.panics", Decl: ast.IsString.Decl})
	t.Cleanup(func() { delete(native, "test.panics") })
	p := compiled(t, "answer := test.panics(input.x) if input.x", `{}`, Options{})
	if _, err := answer(t.Context(), p, `{"x":1}`); err == nil || errors.Is(err, ErrRedo) || !strings.Contains(err.Error(), "a fault") {
		t.Errorf("the error is %v", err)
	}
	if out, err := answer(t.Context(), p, `{}`); err != nil || out != "" {
		t.Errorf("the next evaluation: %s, %v", out, err)
	}
}

// TestDataByNumber: OPA's interpreter reads data by texts, so that a number
// finds a key. Such an evaluation is its.
func TestDataByNumber(t *testing.T) {
	p := compiled(t, `answer := data.roles[input.role].ok`, `{"roles":{"5":{"ok":true}},"l":[{"ok":1}]}`, Options{})
	for input, want := range map[string]error{`{"role":5}`: ErrRedo, `{"role":5.0}`: ErrRedo, `{"role":"5"}`: nil, `{"role":"6"}`: nil} {
		if _, err := answer(t.Context(), p, input); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", input, err, want)
		}
	}
}

// TestReset: nothing of an evaluation is left in a machine, however it ended.
func TestReset(t *testing.T) {
	p := compiled(t, `answer := {"l": [x | some x in input.l], "s": {lower(x) | some x in input.t}, "f": count(input.l) / input.n}`, `{}`, Options{})
	large := `{"l":[` + strings.TrimSuffix(strings.Repeat(`{"k":["x"]},`, 300), ",") + `],"t":["A","B"],"n":%s}`
	for _, input := range []string{fmt.Sprintf(large, "2"), fmt.Sprintf(large, "0"), fmt.Sprintf(large, "nothing"), `{"l":[1,2`} {
		m := p.Machine(t.Context())
		if in, err := m.Parse([]byte(input)); err == nil {
			_, _ = m.Eval(in, 0) // some fail, on purpose
		}
		m.Release()
		for name, values := range map[string][]Value{"registers": m.regs, "stack": m.stack[:cap(m.stack)], "values": m.values.chunk, "result": m.result[:cap(m.result)]} {
			for i, v := range values {
				if v != (Value{}) {
					t.Fatalf("%.30s…: %s hold %v at %d", input, name, v.kind(), i)
				}
			}
		}
		for _, o := range m.objects.chunk {
			if o.keys != nil || o.tab != nil {
				t.Fatalf("%.30s…: an object is left", input)
			}
		}
		if m.ctx != nil || m.bctx != nil || m.release != nil {
			t.Fatalf("%.30s…: the context is left", input)
		}
	}
}
