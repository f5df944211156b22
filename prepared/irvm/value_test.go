package irvm

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"testing"
	"unsafe"

	"github.com/open-policy-agent/opa/v1/ast"
)

// TestSizes holds what the budget of memory counts with.
func TestSizes(t *testing.T) {
	for name, have := range map[string][2]uintptr{
		"Value":  {unsafe.Sizeof(Value{}), valueBytes},
		"object": {unsafe.Sizeof(object{}), objectBytes},
		"array":  {unsafe.Sizeof(array{}), arrayBytes},
		"set":    {unsafe.Sizeof(set{}), setBytes},
	} {
		if have[0] != have[1] {
			t.Errorf("%s has %d bytes, %d are counted", name, have[0], have[1])
		}
	}
}

// value makes a random value of OPA's.
func randomValue(r *rand.Rand, depth int) *ast.Term {
	scalars := []*ast.Term{
		ast.NullTerm(), ast.BooleanTerm(true), ast.BooleanTerm(false), ast.StringTerm(""), ast.StringTerm("a"), ast.StringTerm("ab"), ast.StringTerm("Ä<>&\u2028\"\\\n\x01"),
		num("0"), num("-0"), num("1"), num("1.0"), num("10e-1"), num("-1"), num("0.1"), num("0.10"), num("1e400"), num("1e-400"), num("2e400"),
		num("9223372036854775807"), num("9223372036854775808"), num("9223372036854775807.0"), num("-9223372036854775808"), num("9007199254740993"), num("9007199254740992.5"), num("1e20"),
	}
	if depth <= 0 || r.IntN(3) == 0 {
		return scalars[r.IntN(len(scalars))]
	}
	n := r.IntN(4)
	if r.IntN(6) == 0 {
		n = 12 // with a table
	}
	var terms []*ast.Term
	for range n {
		terms = append(terms, randomValue(r, depth-1))
	}
	switch r.IntN(3) {
	case 0:
		return ast.ArrayTerm(terms...)
	case 1:
		return ast.SetTerm(terms...)
	}
	o := ast.NewObject()
	for _, k := range terms {
		if o.Get(k) == nil { // inserting anew loses keys with the same hash
			o.Insert(k, randomValue(r, depth-1))
		}
	}
	return ast.NewTerm(o)
}

func num(s string) *ast.Term { return ast.NumberTerm(json.Number(s)) }

// TestValueLikeOPA: the order of values, their equality and hash, and the way
// there and back are those of package ast.
func TestValueLikeOPA(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	p := Empty(Limits{})
	rounds := 3000
	if raceEnabled {
		rounds = 500
	}
	for range rounds {
		m := p.Machine(t.Context())
		a, b := randomValue(r, 3), randomValue(r, 3)
		if r.IntN(4) == 0 {
			b = a
		}
		x, err := FromAST(a.Value)
		if err != nil {
			t.Fatal(err)
		}
		y, err := m.FromAST(b.Value)
		if err != nil {
			t.Fatal(err)
		}
		steps := 0
		want := ast.Compare(a, b)
		if have := compare(x, y, &steps); sign(have) != sign(want) {
			t.Fatalf("compare(%v, %v) = %d, want %d", a, b, have, want)
		}
		if have := equal(x, y, &steps); have != (want == 0) {
			t.Fatalf("equal(%v, %v) = %t, want %t", a, b, have, want == 0)
		}
		if want == 0 && hash(x, &steps) != hash(y, &steps) {
			t.Fatalf("%v and %v are equal and have different hashes", a, b)
		}
		if back := x.AST(); back.String() != a.Value.String() {
			t.Fatalf("%v comes back as %v", a, back)
		}
		var k builder
		k.texts = map[string]string{}
		if kept := k.keep(y); !equal(kept, y, &steps) || kept.AST().String() != b.Value.String() {
			t.Fatalf("%v is kept as %v", b, kept.AST())
		}
		checkJSON(t, x, a)
		m.Release()
	}
}

func checkJSON(t *testing.T, v Value, want *ast.Term) {
	t.Helper()
	var have, again any
	raw := v.AppendJSON(nil)
	if err := json.Unmarshal(raw, &have); err != nil {
		var te *json.UnmarshalTypeError // 1e400 is JSON, and no float64
		if !json.Valid(raw) || !errors.As(err, &te) {
			t.Fatalf("%s: %v", raw, err)
		}
		return
	}
	j, err := ast.JSON(want.Value)
	if err != nil {
		t.Fatal(err)
	}
	std, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(std, &again); err != nil {
		t.Fatal(err)
	}
	a, _ := json.Marshal(have)
	b, _ := json.Marshal(again)
	if string(a) != string(b) {
		t.Fatalf("JSON of %v is %s, want %s", want, raw, std)
	}
}

func sign(n int) int { return max(-1, min(1, n)) }
