package irvm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/util"
)

// A generator writes policies that compile, mostly.
type generator struct {
	*rand.Rand
	out   strings.Builder
	rules []string // that may be called from here on
	funcs []string
	vars  []string
	next  int
}

func pick[T any](g *generator, list ...T) T { return list[g.IntN(len(list))] }

func (g *generator) fresh() string {
	g.next++
	return fmt.Sprintf("v%d", g.next)
}

var (
	numbers = []string{"0", "1", "2", "-1", "1.0", "0.5", "1e2", "9007199254740993", "9223372036854775807", "1e20", "7", "-3"}
	texts   = []string{`"a"`, `"b"`, `""`, `"k"`, `"a,b"`, `","`, `"Äb"`, `"10"`, `"x y"`, `"^[a-k]+$"`}
)

// typed is a constant of a list, or anything at all, of which the type checker
// knows nothing.
func (g *generator) typed(list []string, depth int) string {
	if g.IntN(2) == 0 {
		return pick(g, list...)
	}
	return g.any(depth)
}

func (g *generator) any(depth int) string { return "u(" + g.term(depth-1) + ")" }

// term is an expression with a value.
func (g *generator) term(depth int) string {
	if depth <= 0 {
		return g.leaf()
	}
	switch g.IntN(16) {
	case 0, 1, 2, 3:
		return g.leaf()
	case 4:
		return "[" + g.term(depth-1) + ", " + g.term(depth-1) + "]"
	case 5:
		return "{" + g.term(depth-1) + ", " + g.term(depth-1) + "}"
	case 6:
		return `{"k": ` + g.term(depth-1) + `, "l": ` + g.term(depth-1) + "}"
	case 7:
		return g.comprehension(depth - 1)
	case 8:
		if g.IntN(3) == 0 {
			return "(" + g.any(depth) + " " + pick(g, "&", "|", "-") + " " + g.any(depth) + ")"
		}
		return "(" + g.typed(numbers, depth) + " " + pick(g, "+", "-", "*", "/", "%") + " " + g.typed(numbers, depth) + ")"
	case 9:
		switch g.IntN(4) {
		case 0:
			return pick(g, "lower", "upper", "crypto.sha256", "trim_space", "base64.encode", "base64.decode", "crypto.md5") + "(" + g.typed(texts, depth) + ")"
		case 1:
			return pick(g, "abs", "round", "ceil", "floor") + "(" + g.typed(numbers, depth) + ")"
		case 2:
			return pick(g, "sum", "max", "min", "sort", "count", "object.keys", "array.reverse") + "(" + g.any(depth) + ")"
		}
		return pick(g, "type_name", "is_string", "is_number", "json.marshal", "to_number") + "(" + g.any(depth) + ")"
	case 10:
		switch g.IntN(3) {
		case 0:
			return pick(g, "split", "startswith", "contains", "trim", "trim_prefix", "indexof", "regex.match", "trim_suffix", "strings.count") + "(" + g.typed(texts, depth) + ", " + g.typed(texts, depth) + ")"
		case 1:
			return fmt.Sprintf(pick(g, "format_int(%s, 10)", "bits.and(%s, 3)", "time.clock(%s)", "array.slice(numbers.range(-3, 9), %s, 7)"), g.typed(numbers, depth))
		}
		return pick(g, "array.concat", "concat", "strings.any_prefix_match", "object.union", "object.remove", "object.filter", "json.filter") + "(" + g.any(depth) + ", " + g.any(depth) + ")"
	case 11:
		return `sprintf("` + pick(g, "%v-%d", "%s", "%v", "%d%%", "%5.2f", "%x") + `", [` + g.term(depth-1) + pick(g, "", ", "+g.leaf()) + "])"
	case 12:
		return "object.get(" + g.any(depth) + ", " + g.leaf() + ", " + g.leaf() + ")"
	case 13:
		if g.IntN(2) == 0 {
			return "glob.match(" + pick(g, `"a*"`, `"{a,b}*"`, `"*.?"`) + pick(g, ", [], ", `, [","], `, ", null, ") + g.typed(texts, depth) + ")"
		}
		return "substring(" + g.typed(texts, depth) + ", " + pick(g, "0", "1", "3") + ", " + pick(g, "-1", "2", "9") + ")"
	case 14:
		if len(g.funcs) > 0 {
			return pick(g, g.funcs...) + "(" + g.term(depth-1) + ")"
		}
	case 15:
		if len(g.rules) > 0 {
			return "u(" + pick(g, g.rules...) + ")"
		}
	}
	return g.leaf()
}

func (g *generator) leaf() string {
	if len(g.vars) > 0 && g.IntN(3) == 0 {
		return pick(g, g.vars...)
	}
	switch g.IntN(10) {
	case 0, 1:
		return pick(g, numbers...)
	case 2, 3:
		return pick(g, texts...)
	case 4:
		return pick(g, "true", "false", "null", "[]", "{}", "set()")
	case 5:
		return "data." + pick(g, "t.k", "t[input.a]", "l", "l[0]", "l[input.n]", "t", "s", "n[input.a]", "missing", "deep.x.y")
	default:
		return "input" + pick(g, ".a", ".b", ".n", ".o", ".o.k", ".l", ".l[0]", ".l", ".o", ".missing", ".o.k.z", `["a"]`)
	}
}

func (g *generator) comprehension(depth int) string {
	keep := len(g.vars)
	v := g.fresh()
	head := "some " + v + " in " + g.any(depth+1)
	g.vars = append(g.vars, v)
	body := head + "; " + v + " == " + v
	if g.IntN(2) == 0 {
		body += "; u(" + g.term(depth) + ")"
	}
	t := g.term(depth)
	g.vars = g.vars[:keep]
	switch g.IntN(3) {
	case 0:
		return "[" + t + " | " + body + "]"
	case 1:
		return "{" + t + " | " + body + "}"
	}
	return "{" + v + ": " + t + " | " + body + "}"
}

// expr is a statement of a body.
func (g *generator) expr(depth int) string {
	switch g.IntN(14) {
	case 0, 1:
		return g.any(depth) + " " + pick(g, "==", "!=", "<", "<=", ">", ">=") + " " + g.term(depth)
	case 2:
		return "input." + pick(g, "a", "b", "n") + ` == ` + pick(g, `"a"`, `"b"`, "1", "1.0", "true")
	case 3:
		return g.any(depth) + " in " + g.any(depth)
	case 4:
		return "not " + g.any(depth) + " == " + g.term(depth)
	case 5:
		return "not " + g.any(depth)
	case 6:
		v := g.fresh()
		s := v + " := " + g.term(depth)
		g.vars = append(g.vars, v)
		return s
	case 7:
		v := g.fresh()
		s := "some " + v + " in " + g.any(depth+1)
		g.vars = append(g.vars, v)
		return s
	case 8:
		k, v := g.fresh(), g.fresh()
		s := "some " + k + ", " + v + " in " + g.any(depth+1)
		g.vars = append(g.vars, k, v)
		return s
	case 9:
		keep := len(g.vars)
		v := g.fresh()
		domain := g.any(depth + 1)
		g.vars = append(g.vars, v)
		s := "every " + v + " in " + domain + " { " + v + " == " + v + "; u(" + g.term(depth-1) + ") }"
		g.vars = g.vars[:keep]
		return s
	case 10:
		if len(g.rules) > 0 {
			return pick(g, g.rules...) + " with " + pick(g, "input.a", "input.o.k", "input", "data.t.k", "data.l", "input.new.deep") + " as " + g.term(depth-1)
		}
	case 11:
		keep := len(g.vars)
		v := g.fresh()
		in := g.any(depth + 1)
		g.vars = append(g.vars, v)
		s := "not { some " + v + " in " + in + "; u(" + g.term(depth-1) + ") == " + v + " }"
		g.vars = g.vars[:keep]
		return s
	case 12:
		return "startswith(" + g.typed(texts, depth) + ", " + g.typed(texts, depth) + ")"
	}
	return g.any(depth)
}

func (g *generator) body(n int) string {
	g.vars = g.vars[:0]
	var lines []string
	for range 1 + g.IntN(n) {
		lines = append(lines, "\t"+g.expr(2))
	}
	for _, v := range g.vars { // all must be used
		lines = append(lines, "\t"+v+" == "+v)
	}
	return strings.Join(lines, "\n")
}

func (g *generator) rule(i int) {
	name := fmt.Sprintf("r%d", i)
	defs := 1 + g.IntN(3)
	switch g.IntN(6) {
	case 0: // a set
		for range defs {
			b := g.body(3)
			fmt.Fprintf(&g.out, "%s contains %s if {\n%s\n}\n", name, g.term(1), b)
		}
	case 1: // an object
		for range defs {
			b := g.body(3)
			fmt.Fprintf(&g.out, "%s[%s] := %s if {\n%s\n}\n", name, pick(g, `"k"`, `"l"`, "input.a", g.leaf()), g.term(1), b)
		}
	case 2: // a function
		for range defs {
			g.vars = append(g.vars[:0], "x")
			b := "\tu(" + g.term(1) + ")\n\tx == x"
			fmt.Fprintf(&g.out, "f%d(%s) := %s if {\n%s\n}\n", i, pick(g, "x", "x", "x", `x`), g.term(1), b)
		}
		g.vars = g.vars[:0]
		g.funcs = append(g.funcs, fmt.Sprintf("f%d", i))
		return
	case 3: // many comparisons, for an index
		fmt.Fprintf(&g.out, "default %s := %s\n", name, pick(g, "false", `"none"`))
		for _, v := range []string{`"a"`, `"b"`, `"c"`, "1", "2", "true"} {
			fmt.Fprintf(&g.out, "%s := %s if {\n\tinput.%s == %s\n%s\n}\n", name, pick(g, "1", "true", `"x"`), pick(g, "a", "a", "a", "n"), v, g.body(1))
		}
	default:
		if g.IntN(2) == 0 {
			fmt.Fprintf(&g.out, "default %s := %s\n", name, pick(g, "false", "0", `"d"`, "[]"))
		}
		b := g.body(3)
		fmt.Fprintf(&g.out, "%s := %s if {\n%s\n}", name, g.term(1), b)
		for range g.IntN(3) {
			b := g.body(2)
			fmt.Fprintf(&g.out, " else := %s if {\n%s\n}", g.term(1), b)
		}
		g.out.WriteString("\n")
	}
	g.rules = append(g.rules, name)
}

func policyOf(seed uint64) string {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 1))}
	g.out.WriteString("package p\n\nimport rego.v2\n\nu(x) := x\n\n")
	for i := range 2 + g.IntN(5) {
		g.rule(i)
	}
	fmt.Fprintf(&g.out, "answer := {%q: [x | x := %s]", "last", g.lastRule())
	for _, r := range g.rules {
		fmt.Fprintf(&g.out, ", %q: [x | x := %s]", r, r)
	}
	g.out.WriteString("}\n")
	return g.out.String()
}

func (g *generator) lastRule() string {
	if len(g.rules) == 0 {
		return "input"
	}
	return g.rules[len(g.rules)-1]
}

const diffData = `{"t":{"k":1,"a":{"z":[1,2]},"b":"a"},"l":[1,"a",{"k":2},[3],1.0],"s":"data,text","n":{"1":"one","a":[1,2,3]},"deep":{"x":{"y":[{"k":1},{"k":2}]}}}`

var diffInputs = []string{
	`{}`,
	`{"a":"a","b":"b","n":1,"o":{"k":{"z":1},"l":2},"l":["a","b",1]}`,
	`{"a":"k","b":true,"n":1.0,"o":{"z":9,"k":"v","a":[]},"l":[3,1,2,1.0]}`,
	`{"a":1,"b":"a,b","n":0,"o":["x","y"],"l":{"k":"v"}}`,
	`{"a":"1","b":null,"n":12345678901234567890,"o":{"k":[1,{"z":2}]},"l":[[1],[2,3],"a"]}`,
	`{"a":"c","b":"Äb x","n":-1,"o":{"1":1,"2":2,"3":3,"4":4,"5":5,"6":6,"7":7,"8":8,"9":9,"k":0},"l":[1,2,3,4,5,6,7,8,9,10,11,12]}`,
}

// outcomes counts how comparisons ended.
type outcomes struct{ same, redone, refused int }

// compareEngines evaluates the policy of seed by both and compares.
func compareEngines(t *testing.T, seed uint64, n *outcomes) {
	t.Helper()
	strict := seed%2 == 0
	policy := policyOf(seed)
	ctx := context.Background()
	c, err := ast.CompileModulesWithOpt(map[string]string{"p.rego": policy}, ast.CompileOpts{ParserOptions: ast.ParserOptions{RegoVersion: ast.RegoV1}})
	if err != nil {
		n.refused++
		return
	}
	var data map[string]any
	if err := util.UnmarshalJSON([]byte(diffData), &data); err != nil {
		t.Fatal(err)
	}
	options := []func(*rego.Rego){
		rego.Query("data.p.answer"), rego.SetRegoVersion(ast.RegoV1), rego.Compiler(c), rego.StrictBuiltinErrors(strict),
		rego.Store(inmem.NewFromObjectWithOpts(data, inmem.OptRoundTripOnWrite(false), inmem.OptReturnASTValuesOnRead(true))),
		rego.GenerateJSON(func(t *ast.Term, _ *rego.EvalContext) (any, error) { return t.Value, nil }),
	}
	plan, err := Plan(ctx, options...)
	if err != nil {
		n.refused++
		return
	}
	base, err := FromJSON(data)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Compile(plan, base, Options{Lenient: !strict})
	if err != nil {
		t.Fatalf("seed %d: %v\n%s", seed, err, policy)
	}
	q, err := rego.New(options...).PrepareForEval(ctx)
	if err != nil {
		t.Fatalf("seed %d: %v\n%s", seed, err, policy)
	}
	for _, input := range diffInputs {
		m := p.Machine(ctx)
		in, err := m.Parse([]byte(input))
		if err != nil {
			t.Fatal(err)
		}
		v, err := m.Eval(in, 0)
		rs, tdErr := q.Eval(ctx, rego.EvalParsedInput(in.AST()))
		var want ast.Value
		if len(rs) == 1 {
			want = rs[0].Expressions[0].Value.(ast.Value)
		}
		switch {
		case errors.Is(err, ErrRedo):
			n.redone++
		case err != nil:
			t.Fatalf("seed %d, input %s: %v\n%s", seed, input, err, policy)
		case tdErr != nil:
			t.Fatalf("seed %d, input %s: have %v, the interpreter fails: %v\n%s", seed, input, v.AST(), tdErr, policy)
		case want == nil || v.Kind() == Undefined || v.AST().Compare(want) != 0:
			have := "undefined"
			if v.Kind() != Undefined {
				have = v.AST().String()
			}
			t.Fatalf("seed %d, input %s:\nhave %s\nwant %v\n%s", seed, input, have, want, policy)
		default:
			n.same++
		}
		m.Release()
	}
}

// TestSameAsInterpreter compares with OPA's interpreter on generated policies.
func TestSameAsInterpreter(t *testing.T) {
	policies := uint64(300)
	if raceEnabled || testing.Short() {
		policies = 40
	}
	var n outcomes
	for seed := range policies {
		compareEngines(t, seed, &n)
	}
	t.Logf("%+v", n)
	if n.same < 2*int(policies) || n.refused > int(policies)/10 {
		t.Errorf("too few of the comparisons compare something: %+v", n)
	}
}

func FuzzSameAsInterpreter(f *testing.F) {
	for _, s := range []uint64{1, 2, 3, 1 << 40} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, seed uint64) { compareEngines(t, seed, &outcomes{}) })
}
