package prepared

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestProbe: a policy that denies by what it sees is silent when the field is
// absent, or of a type that the rule does not expect.
func TestProbe(t *testing.T) {
	p := program(t, `package autonomy

default allow := true

allow := false if startswith(input.params.path, "/etc/")

allow := false if input.params.amount > 100

allow := false if {
	some u in input.params.users
	u.name == "root"
}
`, entry{name: "inputs/allowed.json", body: `{"kind":"tool.echo"}`},
		entry{name: "inputs/pay.json", body: `{"kind":"tool.pay","params":{"amount":500,"list":[{"x":1},7]}}`},
		entry{name: "examples/users.json", body: `{"kind":"tool.x","params":{"users":[{"name":"root"}]}}`})
	r, err := Probe(t.Context(), p, ProbeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if r.Examples != 3 || r.Recorded != 0 {
		t.Errorf("%+v", r)
	}
	var got []string
	for _, f := range r.Found {
		line := ""
		for _, rule := range f.Rules {
			line += fmt.Sprintf(" %s:%d", rule.Rule, rule.Line)
		}
		got = append(got, f.Call+" "+f.Field+" "+f.Change+line)
	}
	const amount, users = " data.autonomy.allow:7", " data.autonomy.allow:9"
	want := []string{
		"examples/users.json /params removed" + users, "examples/users.json /params null" + users, "examples/users.json /params other type" + users,
		"examples/users.json /params/users removed" + users, "examples/users.json /params/users null" + users, "examples/users.json /params/users other type" + users,
		"examples/users.json /params/users/0 null" + users, "examples/users.json /params/users/0 other type" + users,
		"examples/users.json /params/users/0/name removed" + users, "examples/users.json /params/users/0/name null" + users,
		"examples/users.json /params/users/0/name other type" + users,
		"inputs/pay.json /params removed" + amount, "inputs/pay.json /params null" + amount, "inputs/pay.json /params other type" + amount,
		"inputs/pay.json /params/amount removed" + amount, "inputs/pay.json /params/amount null" + amount,
	}
	if !slices.Equal(got, want) {
		t.Errorf("have %s\nwant %s", strings.Join(got, "\n     "), strings.Join(want, "\n     "))
	}
	if err := r.Err(); !errors.Is(err, ErrFailOpen) || !strings.Contains(err.Error(), "allowed with /params removed; rule data.autonomy.allow at p.rego:9 (and 15 more)") {
		t.Errorf("refused with %v", err)
	}
}

// TestProbeDeniesByNot: the form of policy that the design notes warn of, with
// one rule that needs the field to deny. rego.v2 mends the `not`, and the probe
// finds what it does not mend.
func TestProbeDeniesByNot(t *testing.T) {
	const policy = `package autonomy

import rego.v2

decision := {"allow": count(reasons) == 0, "reasons": reasons}

reasons contains "host" if {
	input.kind == "tool.http_get"
	%s
}

host := split(input.params.url, "/")[2]
`
	denied := entry{name: "inputs/deny.json", body: `{"kind":"tool.http_get","params":{"url":"https://evil.test/x"}}`}
	mended := program(t, fmt.Sprintf(policy, `not host in {"good.test"}`), denied)
	r, err := Probe(t.Context(), mended, ProbeOptions{Allow: []string{"/kind"}})
	if err != nil || r.Err() != nil {
		t.Errorf("%v, %v", err, r.Err())
	}
	// /kind is found all the same, and the report says who has allowed it.
	if o := r.Overridden(); len(o) != 3 || o[0].Field != "/kind" || o[0].Override != OverrideOperator || o[0].Rules[0].Rule != "data.autonomy.reasons" {
		t.Errorf("overridden %+v", o)
	}
	open := program(t, fmt.Sprintf(policy, `host != "good.test"`), denied)
	r, err = Probe(t.Context(), open, ProbeOptions{Allow: []string{"/kind"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Err(); err == nil || !strings.Contains(err.Error(), "/params removed; rule data.autonomy.reasons at p.rego:7; rule data.autonomy.host at p.rego:12") {
		t.Errorf("refused with %v", err)
	}
}

// TestProbeOverride: the author's word stands in the manifest, for the fields it
// names and no others.
func TestProbeOverride(t *testing.T) {
	dir := policyDir(t, map[string]string{
		"p.rego":           "package autonomy\n\ndefault allow := true\n\nallow := false if input.params.debug\n",
		"inputs/deny.json": `{"kind":"k","params":{"debug":true}}`,
	})
	build := func(fields ...string) *Program {
		t.Helper()
		raw, err := BuildBundle(dir, BuildOptions{Name: "p", Version: "1.0.0", AllowFailOpen: fields})
		if err != nil {
			t.Fatal(err)
		}
		b, err := ReadBundle(raw, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(b.AllowFailOpen, fields) {
			t.Errorf("read %q, built with %q", b.AllowFailOpen, fields)
		}
		return compiled(t, b)
	}
	for _, tt := range []struct {
		fields  []string
		refused []string
	}{
		{nil, []string{"/params removed", "/params null", "/params other type", "/params/debug removed", "/params/debug null"}},
		{[]string{"/params/debug"}, []string{"/params removed", "/params null", "/params other type"}},
		{[]string{"/params", "/params/debug"}, nil},
	} {
		r, err := Probe(t.Context(), build(tt.fields...), ProbeOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, f := range r.Refused() {
			got = append(got, f.Field+" "+f.Change)
		}
		// `debug: null` denies nothing either: null is not false, so it holds.
		if want := slices.DeleteFunc(slices.Clone(tt.refused), func(s string) bool { return s == "/params/debug null" }); !slices.Equal(got, want) {
			t.Errorf("%q: refused %q, want %q", tt.fields, got, want)
		}
		for _, f := range r.Overridden() {
			if f.Override != OverrideBundle || !slices.Contains(tt.fields, f.Field) {
				t.Errorf("%q: overridden %+v", tt.fields, f)
			}
		}
	}
	for _, bad := range [][]string{{"params"}, {""}, {"/a\n"}, {"/" + strings.Repeat("x", maxTextBytes)}, slices.Repeat([]string{"/x"}, maxOverrides+1)} {
		if _, err := BuildBundle(dir, BuildOptions{Name: "p", Version: "1.0.0", AllowFailOpen: bad}); err == nil || !strings.Contains(err.Error(), "allow_fail_open") {
			t.Errorf("%.40q: %v", bad, err)
		}
	}
}

// TestProbeRecorded: recorded calls are probed like examples, but one that
// cannot be used refuses nothing, and neither does their number.
func TestProbeRecorded(t *testing.T) {
	p := program(t, "package autonomy\n\ndefault allow := true\n\nallow := false if input.params.amount > 100\n")
	deny := []byte(`{"kind":"k","params":{"amount":101}}`)
	r, err := Probe(t.Context(), p, ProbeOptions{Recorded: [][]byte{[]byte(`{"kind":"k"}`), []byte(`no JSON`), deny}})
	if err != nil {
		t.Fatal(err)
	}
	if r.Recorded != 2 || len(r.Found) == 0 || r.Found[0].Call != "recorded call 3" {
		t.Errorf("%+v", r)
	}
	none := program(t, "package autonomy\n\ndefault allow := false\n")
	call := []byte(`{"kind":"k","params":{"a":1,"b":{"c":[1,2]}}}`) // 17 probes
	r, err = Probe(t.Context(), none, ProbeOptions{Recorded: slices.Repeat([][]byte{call}, 10), MaxProbes: 100})
	if err != nil || r.Probes != 100 || r.Recorded != 5 {
		t.Errorf("%d probes of %d calls, %v", r.Probes, r.Recorded, err)
	}
	many := program(t, "package autonomy\n\ndefault allow := false\n", entry{name: "inputs/a.json", body: string(call)})
	if _, err := Probe(t.Context(), many, ProbeOptions{MaxProbes: 10}); err == nil || !strings.Contains(err.Error(), "inputs/a.json: there are too many changed calls") {
		t.Errorf("examples that are too many: %v", err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Probe(gone, p, ProbeOptions{Recorded: [][]byte{deny}}); !errors.Is(err, ErrBudget) {
		t.Errorf("a probe that was cut short: %v", err)
	}
}

// TestExamplesInBundle: sample calls travel with the policy, count against its
// limits, and are no part of its data.
func TestExamplesInBundle(t *testing.T) {
	p := program(t, "package autonomy\n\nallow if not_there\n\nnot_there if data.inputs\n\nnot_there if data.examples\n",
		entry{name: "inputs/a.json", body: `{"kind":"k"}`}, entry{name: "examples/b/c.json", body: `{"kind":"k"}`}, entry{name: "sub/inputs/data.json", body: `{"x":1}`})
	var names []string
	for _, e := range p.bundle.Examples {
		names = append(names, e.Name)
	}
	if !slices.Equal(names, []string{"examples/b/c.json", "inputs/a.json"}) {
		t.Errorf("examples %q", names)
	}
	if _, err := p.Eval(t.Context(), []byte(`{}`)); !errors.Is(err, ErrUndefined) {
		t.Errorf("an example is data of the policy: %v", err)
	}
	for name, bad := range map[string]entry{
		"duplicate key":          {name: "inputs/a.json", body: `{"a":1,"a":2}`},
		"want an object":         {name: "inputs/a.json", body: `[]`},
		"not data of the policy": {name: "inputs/data.json", body: `{}`},
		"does not belong":        {name: "inputs/a.txt", body: `{}`},
		"nested deeper":          {name: "inputs/a.json", body: strings.Repeat(`{"a":`, 65) + `1` + strings.Repeat(`}`, 65)},
		"unpacks to over 4096":   {name: "inputs/a.json", body: `{"a":"` + strings.Repeat("x", 4096) + `"}`},
		"a: nested deeper":       {name: "data.json", body: strings.Repeat(`{"a":`, 65) + `1` + strings.Repeat(`}`, 65)},
	} {
		limits := Limits{}
		if strings.Contains(name, "4096") {
			limits.MaxTotalBytes = 4096
		}
		_, err := ReadBundle(archive(t, entry{name: ".manifest", body: goodManifest}, entry{name: "p.rego", body: allowAll}, bad), limits)
		if !errors.Is(err, ErrBundle) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	long := entry{name: "inputs/a.json", body: `{"a":"` + strings.Repeat("x", MaxInputBytes) + `"}`}
	_, err := ReadBundle(archive(t, entry{name: ".manifest", body: goodManifest}, entry{name: "p.rego", body: allowAll}, long), Limits{MaxRatio: 10_000})
	if !errors.Is(err, ErrBundle) || !strings.Contains(err.Error(), "which no node takes") {
		t.Errorf("an example that no node takes: %v", err)
	}
}
