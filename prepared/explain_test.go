package prepared

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

// brief is an explanation in a line for each rule.
func brief(x *Explanation) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s\n", x.Decision, x.Error)
	seen := func(all []Seen) {
		for _, s := range all {
			v := s.Value.String()
			if s.Undefined {
				v = "undefined"
			}
			fmt.Fprintf(&b, "    %s = %s\n", s.Name, v)
		}
	}
	for _, r := range x.Held {
		fmt.Fprintf(&b, "held %d %s -> %s\n", r.Line, r.Text, r.Value)
		seen(r.Saw)
	}
	for _, r := range x.Failed {
		fmt.Fprintf(&b, "failed %d %s at %d %s\n", r.Line, r.Text, r.StoppedAt.Line, r.StoppedAt.Text)
		seen(r.Saw)
	}
	return b.String()
}

const explained = `package autonomy

import rego.v2

decision := {"allow": allow, "reasons": reasons}

default allow := false

allow if {
	role.level > 2
	count(reasons) == 0
}

allow if input.kind == "tool.echo"

role := data.roles[input.agent.id]

reasons contains $"no prefix for {p}" if {
	some p in input.params.paths
	not under(p, "/srv/")
}

under(path, prefix) if startswith(path, prefix)

size := "large" if {
	input.params.n > 10
} else := "small" if {
	input.params.n >= 0
}

reasons contains "too large" if size == "large"
`

// TestExplain: rules, lines, values, and where the others stopped.
func TestExplain(t *testing.T) {
	p := program(t, explained, entry{name: "data.json", body: `{"roles":{"a":{"level":3},"b":{"level":1}}}`})
	for _, tt := range []struct{ name, input, want string }{
		{"allowed by a role", `{"kind":"k","agent":{"id":"a"},"params":{"n":1}}`, `allow 
held 5 decision := {"allow": allow, "reasons": reasons} -> {"allow":true,"reasons":[]}
held 9 allow -> true
held 16 role := data.roles[input.agent.id] -> {"level":3}
    input.agent.id = "a"
    data.roles.a = {"level":3}
held 27 else := "small" -> "small"
    input.params.n = 1
`},
		{"a level too low", `{"kind":"k","agent":{"id":"b"},"params":{"n":1}}`, `deny 
held 5 decision := {"allow": allow, "reasons": reasons} -> {"allow":false,"reasons":[]}
held 7 default allow := false -> false
held 16 role := data.roles[input.agent.id] -> {"level":1}
    input.agent.id = "b"
    data.roles.b = {"level":1}
held 27 else := "small" -> "small"
    input.params.n = 1
failed 9 allow at 10 role.level > 2
failed 14 allow if input.kind == "tool.echo" at 14 input.kind == "tool.echo"
    input.kind = "k"
`},
		{"nobody knows the agent, and reasons", `{"kind":"k","agent":{},"params":{"n":11,"paths":["/srv/x","/etc"]}}`, `deny 
held 5 decision := {"allow": allow, "reasons": reasons} -> {"allow":false,"reasons":["no prefix for /etc","too large"]}
held 7 default allow := false -> false
held 18 reasons contains $"no prefix for {p}" -> "no prefix for /etc"
    p = "/etc"
    input.params.paths[1] = "/etc"
held 31 reasons contains "too large" if size == "large" -> "too large"
held 23 under(path, prefix) if startswith(path, prefix) -> true
    path = "/srv/x"
    prefix = "/srv/"
held 25 size := "large" -> "large"
    input.params.n = 11
failed 9 allow at 10 role.level
failed 14 allow if input.kind == "tool.echo" at 14 input.kind == "tool.echo"
    input.kind = "k"
failed 16 role := data.roles[input.agent.id] at 16 input.agent.id
    input.agent.id = undefined
`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			x, err := Explain(t.Context(), p, []byte(tt.input))
			if err != nil {
				t.Fatal(err)
			}
			if got := brief(x); got != tt.want {
				t.Errorf("have\n%swant\n%s", got, tt.want)
			}
			d, err := p.Eval(t.Context(), []byte(tt.input))
			if err != nil || d.Allow != (x.Decision == "allow") {
				t.Errorf("Eval says %+v, %v", d, err)
			}
			raw, err := json.Marshal(x)
			if err != nil || !json.Valid(raw) {
				t.Errorf("%s, %v", raw, err)
			}
		})
	}
}

// TestExplainNoAnswer: what ends in an error is a deny, and is explained.
func TestExplainNoAnswer(t *testing.T) {
	for _, tt := range []struct{ rego, input, err, text string }{
		{`allow if input.n > 1`, `{}`, "policy gives no answer", "input.n"},
		{`allow := {"yes": true}`, `{}`, "policy answer refused", ""},
		{`allow := 1 / input.n > 0`, `{"n":0}`, "divide by zero", ""},
		{`decision := {"allow": true, "approval": {"by": "x"}}`, `{}`, "", ""},
	} {
		x, err := Explain(t.Context(), program(t, "package autonomy\n\n"+tt.rego+"\n"), []byte(tt.input))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(x.Error, tt.err) || (tt.err == "") != (x.Error == "" && x.Decision == "pending") {
			t.Errorf("%s: %s, %q", tt.rego, x.Decision, x.Error)
		}
		if tt.text != "" && (len(x.Failed) != 1 || x.Failed[0].StoppedAt.Text != tt.text) {
			t.Errorf("%s: failed %+v", tt.rego, x.Failed)
		}
	}
	p := program(t, allowAll)
	if _, err := Explain(t.Context(), p, []byte(`{"a":1,"a":2}`)); err == nil || !strings.Contains(err.Error(), "duplicate key") {
		t.Errorf("an input that is none: %v", err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Explain(gone, p, []byte(`{}`)); !errors.Is(err, ErrBudget) {
		t.Errorf("a context that ended: %v", err)
	}
}

// TestExplainBounds: long values are cut, and a policy that does a lot does not
// make a large explanation.
func TestExplainBounds(t *testing.T) {
	p := program(t, `package autonomy

allow if {
	input.text != ""
	count([x | some x in numbers.range(1, 25000); odd(x)]) > 0
}

odd(x) if x % 2 == 1
`)
	long := strings.Repeat("ä<", maxValueBytes)
	x, err := Explain(t.Context(), p, []byte(`{"text":"`+long+`"}`))
	if err != nil {
		t.Fatal(err)
	}
	if x.Decision != "allow" || !x.Cut || len(x.Held) != 2 {
		t.Errorf("%s, cut %v, %d rules", x.Decision, x.Cut, len(x.Held))
	}
	v := x.Held[0].Saw[0].Value
	if raw, err := json.Marshal(v); !v.Cut || len(v.JSON) > maxValueBytes || err != nil || !strings.HasPrefix(string(raw), `{"cut":"\"ä`) {
		t.Errorf("%s, %v", raw, err)
	}
}

// TestLintBundle: what is told at load, without the directory.
func TestLintBundle(t *testing.T) {
	b := policyBundle(t, "1.0.0", `package autonomy

decision := {"allow": allow, "resons": reasons}

allow if input.knd == "x"

reasons contains data.autonomy.text[input.kind]

reasons contains why("x")

text := {"k": "no"}

why(x) := x

deny if input.kind == "y"

deny if helper

helper if input.caller.anything
`, entry{name: "q.rego", body: "package other\n\ndefault x := 1\n\nx := 2 if data.autonomy.helper\n"})
	var got []string
	for _, f := range LintBundle(b) {
		got = append(got, f.String())
	}
	want := []string{
		`p.rego:3: the answer's field "resons" is unknown to a node, which denies every call then; did you mean "reasons"? (unknown-result)`,
		"p.rego:5: a node sends no input.knd; did you mean \"kind\"? (unknown-input)",
		"p.rego:5: allow has no default: where no rule applies there is no answer; add `default allow := false` (default)",
		"p.rego:15: data.autonomy.deny is never asked for by data.autonomy.decision, so it decides nothing: remove it, or use it where it should decide (unreachable)",
		"p.rego:19: data.autonomy.helper is never asked for by data.autonomy.decision, so it decides nothing: remove it, or use it where it should decide (unreachable)",
		"q.rego:3: data.other.x is never asked for by data.autonomy.decision, so it decides nothing: remove it, or use it where it should decide (unreachable)",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("have\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	raw, err := os.ReadFile(quickstart + "/policy.rego")
	if err != nil {
		t.Fatal(err)
	}
	if found := LintBundle(policyBundle(t, "1.0.0", string(raw))); len(found) > 0 {
		t.Errorf("the quickstart: %v", found)
	}
}

// FuzzExplain: whatever is asked, an explanation tells of the decision that Eval
// makes, as JSON.
func FuzzExplain(f *testing.F) {
	p := program(f, explained, entry{name: "data.json", body: `{"roles":{"a":{"level":3},"b":{"level":1}}}`})
	for _, seed := range []string{
		`{}`, `{"kind":"tool.echo"}`, `{"agent":{"id":"a"},"params":{"n":11,"paths":["/etc","/srv/x",{}]}}`, `{"agent":{"id":["a"]},"params":7}`, `[]`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		d, evalErr := p.Eval(t.Context(), input)
		x, err := Explain(t.Context(), p, input)
		if err != nil {
			if evalErr == nil {
				t.Fatalf("Eval says %+v, Explain %v", d, err)
			}
			return
		}
		if d.Allow != (x.Decision == "allow") || (evalErr == nil) != (x.Error == "") {
			t.Errorf("Eval says %+v, %v; Explain %s, %q", d, evalErr, x.Decision, x.Error)
		}
		if raw, err := json.Marshal(x); err != nil || !json.Valid(raw) {
			t.Errorf("%s, %v", raw, err)
		}
	})
}
