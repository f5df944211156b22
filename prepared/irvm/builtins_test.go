package irvm

import (
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// operandLike makes an operand, mostly of the type that the builtin wants.
func operandLike(r *rand.Rand, builtin string, at int) *ast.Term {
	strings := []string{"", "a", "b", "ab", "abcabc", "a,b,,c", "Äbc", "ÄBC x", " x ", "10.0.0.1", "10.0.0.0/8", "::1", "::ffff:10.1.2.3", "fe80::1%eth0", "^[a-c]+$", "(x|abc)", "a*", "{a,b}?", "%s-%d", "%v", "%5d%%", "12", "-7", "1.50", "YWI=", "YW", "aaa"}
	numbers := []string{"0", "1", "2", "3", "-1", "7", "-7", "10", "2147483647", "2147483648", "-2147483648", "9223372036854775807", "-9223372036854775808", "1.0", "2.5", "-2.5", "-0", "1e1", "1e20", "0.1"}
	kinds := map[string]string{
		"plus": "nn", "minus": "na", "mul": "nn", "div": "nn", "rem": "nn", "abs": "n", "round": "n", "ceil": "n", "floor": "n", "numbers.range": "mm",
		"array.slice": "ann", "substring": "snn", "format_int": "nb", "concat": "sa", "sprintf": "sl", "glob.match": "gds",
		"and": "ee", "or": "ee", "object.union": "oo", "object.remove": "ox", "object.filter": "ox", "object.get": "oxa", "object.keys": "o", "net.cidr_contains": "ci",
		"regex.match": "ps", "regex.replace": "spw", "indexof": "ss", "internal.template_string": "q",
		"time.clock": "t", "time.date": "t", "time.weekday": "t", "time.format": "t", "time.parse_rfc3339_ns": "r",
	}
	kind := byte('a')
	if k := kinds[builtin]; k != "" {
		kind = k[at]
	} else if _, ok := nativeStrings[builtin]; ok {
		kind = 's'
	}
	if r.IntN(8) == 0 && builtin != "numbers.range" { // OPA's would go on for ever
		kind = 'a'
	}
	list := []*ast.Term{ast.StringTerm("a"), ast.StringTerm("b"), num("1"), num("1.0"), ast.ArrayTerm(), randomValue(r, 1)}
	r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	list = list[:r.IntN(len(list))]
	switch kind {
	case 'e':
		return ast.SetTerm(list...)
	case 'x':
		return []*ast.Term{ast.SetTerm(list...), ast.ArrayTerm(list...), ast.StringTerm("a")}[r.IntN(3)]
	case 'o':
		o := ast.NewObject()
		for _, k := range list {
			if o.Get(k) == nil {
				v := randomValue(r, 2)
				if r.IntN(4) == 0 { // objects under one key
					v = operandLike(r, "object.keys", 0)
				}
				o.Insert(k, v)
			}
		}
		return ast.NewTerm(o)
	case 'c':
		return ast.StringTerm([]string{"10.0.0.0/8", "::/0", "::ffff:10.0.0.0/104", "fe80::/10", "10.0.0.1/33"}[r.IntN(5)])
	case 'i':
		return ast.StringTerm([]string{"10.1.2.3", "11.1.2.3", "::1", "::ffff:10.1.2.3", "fe80::1", "fe80::1%eth0", "10.2.0.0/16", "010.1.1.1", "x"}[r.IntN(9)])
	case 's':
		return ast.StringTerm(strings[r.IntN(len(strings))])
	case 'n':
		return num(numbers[r.IntN(len(numbers))])
	case 'm':
		return num(numbers[r.IntN(8)])
	case 'g':
		return ast.StringTerm([]string{"a*", "{a,b}?", "*", "**", "a", "*.?", "[a-c]*", "[", "{a", "?b*"}[r.IntN(10)])
	case 'p': // regular expressions
		return ast.StringTerm([]string{`^.*a`, `[ab]+`, `a|bc`, `(a)(b)`, `^a`, `b$`, `\bab`, `x*`, `(?i)B`, `(?m)^a`, `.`, `(`, `Ä|,`, `^`, `(?:^|,)a`, `[^a]`, "a*"}[r.IntN(17)])
	case 'w':
		return ast.StringTerm([]string{"", "-", "long text", "$1", "$$", "Ä"}[r.IntN(6)])
	case 'q':
		parts := []*ast.Term{ast.StringTerm("n: "), ast.SetTerm(), ast.SetTerm(ast.StringTerm("Ä")), ast.SetTerm(num("7")), ast.SetTerm(num("1.50")),
			ast.SetTerm(ast.NullTerm()), num("-3"), ast.BooleanTerm(true), ast.SetTerm(ast.ArrayTerm(ast.StringTerm("a"))), ast.SetTerm(ast.BooleanTerm(false))}
		r.Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
		return ast.ArrayTerm(parts[:r.IntN(5)]...)
	case 't':
		at := num([]string{"0", "1795378449123456789", "-1", "951782400000000000", "1e18", "1.5", "9223372036854775807", "9223372036854775808", "-9223372036854775808"}[r.IntN(9)])
		zone := ast.StringTerm([]string{"", "UTC", "Europe/Berlin", "America/New_York", "Nowhere/City", "Asia/Kathmandu"}[r.IntN(6)])
		return []*ast.Term{at, ast.ArrayTerm(at), ast.ArrayTerm(at, zone), ast.ArrayTerm(at, zone, ast.StringTerm("RFC1123")), ast.ArrayTerm(at, zone, num("1")), ast.ArrayTerm(at, num("1"))}[r.IntN(6)]
	case 'r':
		return ast.StringTerm([]string{"2026-11-22T10:00:00Z", "2026-11-22T10:00:00.123456789+02:00", "1677-09-21T00:12:43.145224192Z", "1677-09-21T00:12:43Z", "2262-04-11T23:47:16.854775807Z", "2263-01-01T00:00:00Z", "2026-02-30T10:00:00Z", "2026-11-22", "2026-11-22T10:00:00,5Z", ""}[r.IntN(10)])
	case 'b':
		return num([]string{"2", "8", "10", "16", "10.0"}[r.IntN(5)])
	case 'd':
		return []*ast.Term{ast.NullTerm(), ast.ArrayTerm(), ast.ArrayTerm(ast.StringTerm(","))}[r.IntN(3)]
	case 'l':
		return ast.ArrayTerm(operandLike(r, "trim", 0), num(numbers[r.IntN(len(numbers))]))
	}
	if r.IntN(3) == 0 {
		return ast.ArrayTerm(operandLike(r, "trim", 0), operandLike(r, "lower", 0))
	}
	return randomValue(r, 2)
}

// TestBuiltinsLikeOPA calls each builtin that is written here and OPA's own
// with the same operands.
func TestBuiltinsLikeOPA(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	rounds := 300
	if raceEnabled {
		rounds = 60
	}
	p := Empty(Limits{})
	p.lenient = true
	for _, name := range slices.Sorted(maps.Keys(native)) {
		decl, theirs := ast.BuiltinMap[name], topdown.GetBuiltin(name)
		if decl == nil || theirs == nil {
			t.Errorf("OPA has no %s", name)
			continue
		}
		if name == "internal.print" || name == "time.now_ns" || decl.Relation {
			continue // no value, the machine's own, and several
		}
		defined := 0
		for range rounds {
			var terms []*ast.Term
			for at := range decl.Decl.Arity() {
				terms = append(terms, operandLike(r, name, at))
			}
			m := p.Machine(t.Context())
			var want, have Value
			err := theirs(m.context(), terms, func(v *ast.Term) (err error) {
				want, err = FromAST(v.Value)
				return err
			})

			// Some operands are constant.
			c := &compiler{prog: p, build: builder{texts: map[string]string{}}, fn: &function{}}
			regs := []Value{{}}
			var args []operand
			for _, term := range terms {
				v, err := FromAST(term.Value)
				if err != nil {
					t.Fatal(err)
				}
				if r.IntN(2) == 0 {
					args = append(args, constOperand(v))
				} else {
					args = append(args, operand{reg: len(regs)})
					regs = append(regs, v)
				}
			}
			func() {
				var evalErr error
				defer func() {
					var halt topdown.Halt
					if evalErr != nil && !(errors.As(err, &halt) && errors.Is(evalErr, ErrRedo)) {
						t.Errorf("%s(%v): %v", name, terms, evalErr)
					}
				}()
				defer m.recover(&have, &evalErr)
				if c.builtin(name, args, result{})(m, regs) == next {
					have = regs[0]
				}
			}()
			var steps int
			switch {
			case (err != nil || want.kind() == Undefined) != (have.kind() == Undefined):
				t.Errorf("%s(%v): defined %t, OPA says %v, %v", name, terms, have.kind() != Undefined, show(want), err)
			case have.kind() == Undefined:
			case !equal(want, have, &steps) || show(want) != show(have):
				t.Errorf("%s(%v): %s, want %s", name, terms, show(have), show(want))
			default:
				defined++
			}
			m.Release()
		}
		if defined < rounds/20 {
			t.Errorf("%s gave a value %d times of %d: the operands test nothing", name, defined, rounds)
		}
	}
}

func show(v Value) string {
	if v.kind() == Undefined {
		return "undefined"
	}
	return v.AST().String()
}
