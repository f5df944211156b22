package prepared

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/autonomyops/autonomy/internal/event"
)

// toolPolicy is a policy of the kind that nodes run: grants by role, prefixes,
// hosts, limits, and a reason for each fault.
const toolPolicy = `package autonomy

import rego.v2

decision := {"allow": allow, "reasons": reasons, "constraints": constraints, "redact": redact}

default allow := false

allow if {
	role
	count(reasons) == 0
}

role := data.roles[input.agent.id]

grant := role.grants[input.kind]

reasons contains {"code": "unknown_role", "message": sprintf("no role for %v", [input.agent.id])} if not role

reasons contains {"code": "not_granted"} if not grant

reasons contains {"code": "path"} if {
	input.kind == "tool.fs.read"
	not path_ok
}

path_ok if {
	not contains(input.params.path, "..")
	some prefix in grant.prefixes
	startswith(input.params.path, prefix)
}

reasons contains {"code": "host", "message": host} if {
	input.kind == "tool.http_get"
	not host in grant.hosts
	not suffix_ok
}

suffix_ok if {
	some s in grant.suffixes
	endswith(host, s)
}

host := lower(split(split(input.params.url, "/")[2], ":")[0])

reasons contains "over the limit" if input.params.amount > grant.max_amount

reasons contains "a secret" if {
	some v in input.params
	is_string(v)
	regex.match("(?:AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----)", v)
}

constraints := object.union({"timeout_ms": 5000}, object.get(grant, "constraints", {}))

redact contains concat("/", ["", "params", k]) if {
	some k, _ in input.params
	k in {"token", "password"}
}
`

const toolData = `{"roles":{
	"a1":{"grants":{"tool.fs.read":{"prefixes":["/srv/","/tmp/x"],"constraints":{"fs":["ro:/srv"]}},"tool.http_get":{"hosts":["api.example.com"],"suffixes":[".example.org"],"max_amount":10.5}}},
	"a2":{"grants":{"tool.echo":{},"tool.http_get":{"hosts":[],"suffixes":[],"max_amount":100}}},
	"7":{"grants":{}}}}`

func toolProgram(t testing.TB, o Options) *Program {
	t.Helper()
	p, err := CompileWith(context.Background(), policyBundle(t, "1.0.0", toolPolicy, entry{name: "data.json", body: toolData}), o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// toolInput makes an input out of the values that matter to the policy, and
// leaves some out.
func toolInput(r *rand.Rand) []byte {
	pick := func(list ...any) any { return list[r.IntN(len(list))] }
	params := map[string]any{
		"path":   pick("/srv/a", "/srv/../etc", "/tmp/x1", "/etc", "", 5, nil, []any{"/srv/a"}),
		"url":    pick("https://api.example.com/x", "https://API.Example.COM:443/", "http://a.example.org", "no url", "https://\u00c4.example.org/", 17, map[string]any{}),
		"amount": pick(1, 10.5, json.Number("10.50"), json.Number("1e1"), json.Number("1.05e1"), json.Number("99999999999999999999"), "x", nil),
		"token":  pick("t", "AKIAABCDEFGHIJKLMNOP", "-----BEGIN PRIVATE KEY-----", 1),
		"other":  pick("x", map[string]any{"k": []any{1, "2"}}, true),
	}
	in := map[string]any{
		"kind": pick("tool.fs.read", "tool.http_get", "tool.echo", "tool.none", 3), "params": params,
		"agent": pick(map[string]any{"id": "a1"}, map[string]any{"id": "a1"}, map[string]any{"id": "a2"}, map[string]any{"id": 7}, map[string]any{}, "a1"),
	}
	for _, m := range []map[string]any{params, in} {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if r.IntN(6) == 0 {
				delete(m, k)
			}
		}
	}
	raw, err := json.Marshal(in)
	if err != nil {
		panic(err)
	}
	return raw
}

// TestEnginesAgree compares the engines on a policy of the usual kind, and
// reuses one Decision for all inputs.
func TestEnginesAgree(t *testing.T) {
	compiled, topdown := toolProgram(t, Options{}), toolProgram(t, Options{Engine: EngineTopdown})
	if name, why := compiled.Engine(); name != EngineCompiled || why != "" {
		t.Fatalf("engine %s: %s", name, why)
	}
	if name, why := topdown.Engine(); name != EngineTopdown || why == "" {
		t.Fatalf("engine %s: %s", name, why)
	}
	r := rand.New(rand.NewPCG(3, 4))
	var dst Decision
	allowed, denied, failed := 0, 0, 0
	rounds := 2000
	if raceEnabled {
		rounds = 400
	}
	for range rounds {
		input := toolInput(r)
		err := compiled.EvalInto(t.Context(), &dst, input)
		want, wantErr := topdown.Eval(t.Context(), input)
		if !sameOutcome(dst, err, want, wantErr) {
			t.Fatalf("%s:\nhave %s\nwant %s", input, outcome(dst, err), outcome(want, wantErr))
		}
		switch {
		case err != nil:
			failed++
		case dst.Allow:
			allowed++
		default:
			denied++
		}
	}
	if allowed < rounds/100 || denied < rounds/20 || failed < rounds/20 {
		t.Errorf("%d allowed, %d denied, %d failed: too one-sided to tell anything", allowed, denied, failed)
	}
}

// TestConcurrent: a Program is shared, and nothing of it changes.
func TestConcurrent(t *testing.T) {
	p := toolProgram(t, Options{SelfCheck: 50})
	var wg sync.WaitGroup
	for g := range uint64(4) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(g, 5))
			var dst Decision
			for range 200 {
				input := toolInput(r)
				err := p.EvalInto(t.Context(), &dst, input)
				if again, againErr := p.Eval(t.Context(), input); !sameOutcome(dst, err, again, againErr) {
					t.Errorf("%s: %s, then %s", input, outcome(dst, err), outcome(again, againErr))
				}
			}
		})
	}
	wg.Wait()
	if name, why := p.Engine(); name != EngineCompiled {
		t.Errorf("engine %s: %s", name, why)
	}
}

func TestSelfCheck(t *testing.T) {
	input := []byte(`{"kind":"tool.fs.read","agent":{"id":"a1"},"params":{"path":"/srv/a"}}`)
	var told []Mismatch
	p := toolProgram(t, Options{SelfCheck: 3, OnMismatch: func(m Mismatch) { told = append(told, m) }})
	for range 10 {
		if d, err := p.Eval(t.Context(), input); err != nil || !d.Allow {
			t.Fatalf("%+v, %v", d, err)
		}
	}
	if name, why := p.Engine(); name != EngineCompiled || len(told) != 0 {
		t.Fatalf("engine %s, %s, told %v", name, why, told)
	}

	// A compiled engine gone wrong: another policy's.
	p.vm = program(t, "package autonomy\n\ndecision := {\"allow\": false, \"reasons\": [\"wrong\"]}\n").vm
	wrong := 0
	for range 6 {
		d, err := p.Eval(t.Context(), input)
		if err != nil {
			t.Fatal(err)
		}
		if !d.Allow {
			wrong++
		}
	}
	if wrong > 2 {
		t.Errorf("%d wrong decisions, one in three is checked", wrong)
	}
	if name, why := p.Engine(); name != EngineTopdown || !strings.Contains(why, "self-check") {
		t.Errorf("engine %s: %s", name, why)
	}
	if len(told) != 1 || told[0].Bundle != p.Bundle() || !strings.Contains(told[0].Compiled, "allow false") || !strings.Contains(told[0].Topdown, "allow true") {
		t.Errorf("told %+v", told)
	}
	// The decision of the call that is checked is the interpreter's already.
	p = toolProgram(t, Options{SelfCheck: 1})
	p.vm = program(t, "package autonomy\n\nallow if input.never\n").vm
	if d, err := p.Eval(t.Context(), input); err != nil || !d.Allow {
		t.Errorf("%+v, %v", d, err)
	}
}

// TestEvalInto: what an earlier decision left in dst does not show.
func TestEvalInto(t *testing.T) {
	p := program(t, `package autonomy

decision := input.say
`)
	answers := []struct {
		say  string
		want Decision
	}{
		{`{"allow":false,"reasons":["a","b",{"code":"c","message":"m"}],"redact":["/x"],"approval":{"who":["b","a"],"n":1.50},"constraints":{"egress":["a:1","b:2"],"env":["E"],"fs":["ro:/a"],"cpu_max":"max 1000","timeout_ms":1}}`, Decision{}},
		{`{"allow":true}`, Decision{Allow: true}},
		{`true`, Decision{Allow: true}},
		{`{"allow":true,"constraints":{"egress":[]},"reasons":["z"]}`, Decision{}},
		{`{"allow":true,"approval":{"a":null}}`, Decision{}},
	}
	var dst Decision
	for round := range 3 {
		for _, a := range answers {
			input := []byte(fmt.Sprintf(`{"say":%s}`, a.say))
			if err := p.EvalInto(t.Context(), &dst, input); err != nil {
				t.Fatal(err)
			}
			fresh, err := p.Eval(t.Context(), input)
			if err != nil || !sameOutcome(dst, nil, fresh, nil) {
				t.Errorf("round %d, %s: have %+v, want %+v, %v", round, a.say, dst, fresh, err)
			}
			if (dst.Approval == nil) != (fresh.Approval == nil) || (dst.Constraints.Egress == nil) != (fresh.Constraints.Egress == nil) {
				t.Errorf("%s: nil and empty are mixed up: %+v", a.say, dst)
			}
		}
		if err := p.EvalInto(t.Context(), &dst, []byte(`{"say":{"allow":1}}`)); !errors.Is(err, ErrResult) || !reflect.DeepEqual(dst, Decision{}) {
			t.Errorf("after an error: %+v, %v", dst, err)
		}
	}
}

// TestEvalIntoStringsStay: strings of a Decision are the caller's, whatever
// becomes of the input and the Decision.
func TestEvalIntoStringsStay(t *testing.T) {
	p := program(t, "package autonomy\n\ndecision := {\"allow\": false, \"reasons\": [input.say, sprintf(\"%s!\", [input.say])]}\n")
	var dst Decision
	var kept []event.Reason
	for i := range 600 { // more than a machine remembers
		input := []byte(fmt.Sprintf(`{"say":"text %d"}`, i))
		if err := p.EvalInto(t.Context(), &dst, input); err != nil {
			t.Fatal(err)
		}
		kept = append(kept, dst.Reasons...)
		clear(input)
	}
	for i := range 600 {
		if kept[2*i].Message != fmt.Sprintf("text %d", i) || kept[2*i+1].Message != fmt.Sprintf("text %d!", i) {
			t.Fatalf("%d: %v", i, kept[2*i:2*i+2])
		}
	}
}

// TestEvalIntoAllocations: the compiled engine allocates nothing once warm.
func TestEvalIntoAllocations(t *testing.T) {
	p := toolProgram(t, Options{})
	inputs := [][]byte{
		[]byte(`{"kind":"tool.fs.read","agent":{"id":"a1"},"params":{"path":"/srv/../etc","token":"t","amount":3}}`),
		[]byte(`{"kind":"tool.http_get","agent":{"id":"a2"},"params":{"url":"https://API.example.org/x","amount":300}}`),
	}
	ctx := context.Background()
	for _, input := range inputs {
		var dst Decision
		n := testing.AllocsPerRun(300, func() {
			if err := p.EvalInto(ctx, &dst, input); err != nil || dst.Allow || len(dst.Reasons) == 0 {
				t.Fatal(dst, err)
			}
		})
		if n != 0 && !raceEnabled {
			t.Errorf("%s: %v allocations", input, n)
		}
	}
}

// BenchmarkEvalInto is from the bytes of an input to a Decision.
func BenchmarkEvalInto(b *testing.B) {
	input := []byte(`{"kind":"tool.fs.read","agent":{"id":"a1"},"params":{"path":"/srv/a/b.txt","token":"t","amount":3,"other":{"k":[1,"2"]}}}`)
	for _, engine := range []string{EngineCompiled, EngineTopdown} {
		b.Run(engine, func(b *testing.B) {
			p := toolProgram(b, Options{Engine: engine})
			var dst Decision
			b.ReportAllocs()
			for b.Loop() {
				if err := p.EvalInto(context.Background(), &dst, input); err != nil || !dst.Allow {
					b.Fatal(dst, err)
				}
			}
		})
	}
	b.Run("parallel", func(b *testing.B) {
		p := toolProgram(b, Options{})
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			var dst Decision
			for pb.Next() {
				if err := p.EvalInto(context.Background(), &dst, input); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}
