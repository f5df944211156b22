package tool_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/internal/testutil/mcpserver"
	"github.com/autonomyops/autonomy/node/tool"
)

func TestMain(m *testing.M) {
	mcpserver.Main()
	goleak.VerifyTestMain(m)
}

func parse(t *testing.T, file string) *tool.Registry {
	t.Helper()
	r, err := tool.Parse([]byte(file), tool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func lookup(t *testing.T, r *tool.Registry, kind string) *tool.Tool {
	t.Helper()
	x, ok := r.Lookup(kind)
	if !ok {
		t.Fatalf("no %s", kind)
	}
	return x
}

func TestNoFileIsEchoAlone(t *testing.T) {
	r, err := tool.Load("", tool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if l := r.List(); len(l) != 1 || l[0].Kind != "tool.echo" {
		t.Fatalf("tools: %v, want tool.echo alone", l)
	}
	params := []byte(` {"a": [1, 2.50], "b":"<ü>"} `)
	res := r.Execute(t.Context(), lookup(t, r, "tool.echo"), &tool.Request{Params: params})
	if res.Outcome != tool.OutcomeOK || string(res.Output) != `{"a": [1, 2.50], "b":"<ü>"}` {
		t.Errorf("result %+v %s", res, res.Output)
	}
}

// TestQuickstart runs the example that newcomers start from.
func TestQuickstart(t *testing.T) {
	r, err := tool.Load(filepath.Join("..", "..", "examples", "quickstart", "tools.yaml"), tool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, x := range r.List() {
		kinds = append(kinds, x.Kind)
	}
	if got, want := strings.Join(kinds, " "), "tool.echo tool.exec.date_utc tool.exec.word_count tool.http_get tool.shell"; got != want {
		t.Fatalf("tools %q, want %q", got, want)
	}
	for _, tc := range []struct{ kind, params, stdout string }{
		{"tool.exec.date_utc", `{}`, `^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\n$`},
		{"tool.exec.word_count", `{"text":"one two\nthree"}`, `^3\n$`},
		{"tool.shell", `{"command":"echo $((6*7)) -n"}`, `^42 -n\n$`},
		{"tool.shell", `{"command":"-x"}`, `^$`}, // no option of sh: a command that does not exist
	} {
		x := lookup(t, r, tc.kind)
		if err := x.Validate([]byte(tc.params)); err != nil {
			t.Errorf("%s: %v", tc.kind, err)
		}
		res := r.Execute(t.Context(), x, &tool.Request{Kind: tc.kind, Params: []byte(tc.params)})
		var out struct{ Stdout string }
		if err := json.Unmarshal(res.Output, &out); err != nil {
			t.Fatalf("%s: %+v: %v", tc.kind, res, err)
		}
		if !regexp.MustCompile(tc.stdout).MatchString(out.Stdout) {
			t.Errorf("%s: stdout %q, want %s (%+v)", tc.kind, out.Stdout, tc.stdout, res)
		}
	}
}

func TestBadFiles(t *testing.T) {
	dir := t.TempDir()
	for name, tc := range map[string]struct{ file, want string }{
		"empty":                {"", `tools.yaml:1: empty`},
		"truncated":            {"tools: {tool.echo: {", "tools.yaml: yaml: line 1"},
		"not a mapping":        {"[]", `tools.yaml:1: want a mapping`},
		"scalar":               {"tools", `tools.yaml:1: want a mapping`},
		"tools is a list":      {"tools: []", `tools.yaml:1: want a mapping "tools:"`},
		"two documents":        {"tools: {tool.echo: {}}\n---\na: 1", "more than one document"},
		"unknown top key":      {"tool: {}", `tools.yaml:1: unknown key "tool": did you mean "tools"?`},
		"top key twice":        {"tools: {}\ntools: {}", `tools.yaml:2: "tools" is set a second time, first in line 1`},
		"tool twice":           {"tools:\n  tool.echo: {}\n  tool.echo: {}", `tools.yaml:3: "tool.echo" is set a second time, first in line 2`},
		"unknown tool":         {"tools:\n  tool.ecko: {}", `tools.yaml:2: tool.ecko: no such tool: did you mean "tool.echo"?`},
		"far-off tool":         {"tools:\n  frobnicate_everything: {}", `no such tool: there are tool.echo, tool.exec.`},
		"unknown key":          {"tools:\n  tool.http_get:\n    hosts: [a]\n    max_byte: 1", `tools.yaml:4: unknown key "max_byte": did you mean "max_bytes"?`},
		"far-off key":          {"tools:\n  tool.echo:\n    colour: red", `tools.yaml:3: unknown key "colour": known are description, mcp_name, timeout`},
		"key in param":         {"tools:\n  tool.exec.a:\n    argv: [/bin/true, '{x}']\n    params:\n      x: {typ: string}", `tools.yaml:5: x: unknown key "typ": did you mean "type"?`},
		"wrong type":           {"tools:\n  tool.http_get: {hosts: a}", `tools.yaml:2: hosts: want a list`},
		"number for string":    {"tools:\n  tool.exec.a: {argv: [/bin/echo, 5]}", `argv: want a string: put 5 in quotes`},
		"null for string":      {"tools:\n  tool.exec.a: {argv: [null]}", `argv: want a plain value`},
		"alias":                {"tools:\n  tool.echo: &a {}\n  tool.http_get: *a", `tools.yaml:2: anchors and aliases are not read`},
		"merge key":            {"tools:\n  tool.echo: {<<: {timeout: 1s}}", `unknown key "<<"`},
		"bad timeout":          {"tools:\n  tool.echo: {timeout: 5}", `timeout: "5": want a duration with its unit`},
		"negative timeout":     {"tools:\n  tool.echo: {timeout: -5s}", `want a duration`},
		"timeout over the cap": {"tools:\n  tool.echo: {timeout: 2h}", `over the most that a tool may have, 1h0m0s`},
		"bad size":             {"tools:\n  tool.http_get: {hosts: [a], max_bytes: big}", `max_bytes: size "big"`},
		"size over the cap":    {"tools:\n  tool.http_get: {hosts: [a], max_bytes: 1GiB}", `max_bytes is 1073741824, want 1 to 737280`},
		"no hosts":             {"tools:\n  tool.http_get: {}", `tools.yaml:2: tool.http_get: hosts is missing`},
		"host with scheme":     {"tools:\n  tool.http_get: {hosts: ['http://a']}", `hosts: "http://a"`},
		"host with a blank":    {"tools:\n  tool.http_get: {hosts: ['a b']}", `not a host name in ASCII`},
		"octal host":           {"tools:\n  tool.http_get: {hosts: ['0177.0.0.1']}", `a number that is no dotted address`},
		"port 0":               {"tools:\n  tool.http_get: {hosts: ['a:0']}", `port "0": want 1 to 65535`},
		"bad prefix":           {"tools:\n  tool.http_get: {hosts: [a], allow_private: [10.0.0.0]}", `allow_private: `},
		"unmasked prefix":      {"tools:\n  tool.http_get: {hosts: [a], allow_private: [10.0.0.1/8]}", `has bits beyond its length, want 10.0.0.0/8`},
		"bad method":           {"tools:\n  tool.http_request: {hosts: [a], methods: [get]}", `methods: "get"`},
		"exec without a name":  {"tools:\n  tool.exec.: {argv: [/bin/true]}", `the name after tool.exec.`},
		"exec without argv":    {"tools:\n  tool.exec.a: {}", `tools.yaml:2: tool.exec.a: argv is missing`},
		"relative program":     {"tools:\n  tool.exec.a: {argv: [date]}", `argv element 0 is "date": want the absolute path`},
		"program is a slot":    {"tools:\n  tool.exec.a: {argv: ['/bin/{x}'], params: {x: {}}}", `without slots`},
		"no such program":      {"tools:\n  tool.exec.a: {argv: [/bin/nonexistent]}", `no such file`},
		"not executable":       {"tools:\n  tool.exec.a: {argv: [/etc/passwd]}", `/etc/passwd is no program`},
		"slot without param":   {"tools:\n  tool.exec.a: {argv: [/bin/echo, '{x}']}", `slot {x} has no entry under params`},
		"param without slot":   {"tools:\n  tool.exec.a: {argv: [/bin/echo], params: {x: {}}}", `param "x" is used neither`},
		"open brace":           {"tools:\n  tool.exec.a: {argv: [/bin/echo, '{x']}", `'{' is not closed`},
		"close brace":          {"tools:\n  tool.exec.a: {argv: [/bin/echo, 'x}']}", `'}' without '{'`},
		"stdin is a number":    {"tools:\n  tool.exec.a: {argv: [/bin/cat], stdin: x, params: {x: {type: integer}}}", `stdin: param "x" is a integer`},
		"bad param type":       {"tools:\n  tool.exec.a: {argv: [/bin/echo, '{x}'], params: {x: {type: date}}}", `type is "date", want string`},
		"bad pattern":          {"tools:\n  tool.exec.a: {argv: [/bin/echo, '{x}'], params: {x: {pattern: '('}}}", `missing closing )`},
		"env twice":            {"tools:\n  tool.exec.a: {argv: [/bin/true], env: [A, A=1]}", `env "A": named twice`},
		"relative dir":         {"tools:\n  tool.exec.a: {argv: [/bin/true], dir: tmp}", `dir "tmp": want an absolute path`},
		"no root":              {"tools:\n  tool.fs.read: {}", `root is missing`},
		"relative root":        {"tools:\n  tool.fs.read: {root: x}", `want an absolute path`},
		"root does not exist":  {"tools:\n  tool.fs.read: {root: " + dir + "/none}", `no such file`},
		"long description":     {"tools:\n  tool.echo: {description: " + strings.Repeat("x", 5000) + "}", `description has 5000 bytes`},
		"several, first":       {"tools:\n  tool.ecko: {}\n  tool.http_get: {}", `tools.yaml:2: tool.ecko`},
		"several, second":      {"tools:\n  tool.ecko: {}\n  tool.http_get: {}", `tools.yaml:3: tool.http_get`},
		"invalid UTF-8":        {"tools:\n  tool.echo: {description: \"\xff\"}", `yaml: `},
		"oversized":            {strings.Repeat("#", tool.MaxFileBytes+1), "over 1048576 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := tool.Parse(append([]byte{}, tc.file...), tool.Options{})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v\nwant one with %q", err, tc.want)
			}
			if r != nil {
				t.Error("a registry came with the error")
			}
		})
	}
	if _, err := tool.Load(filepath.Join(dir, "none.yaml"), tool.Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

const counter = `
tools:
  tool.exec.head:
    argv: [/usr/bin/head, "--lines={n}", --, "{file}"]
    params:
      n: {type: integer, minimum: 1, maximum: 10}
      file: {pattern: "[a-z./]+"}
`

func TestValidate(t *testing.T) {
	x := lookup(t, parse(t, counter), "tool.exec.head")
	if err := x.Validate([]byte(`{"n":3,"file":"/etc/passwd"}`)); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ params, want string }{
		"missing":        {`{"n":1}`, "missing property 'file'"},
		"wrong type":     {`{"n":"1","file":"a"}`, "/n: got string, want integer"},
		"fraction":       {`{"n":1.5,"file":"a"}`, "/n: got number, want integer"},
		"out of range":   {`{"n":11,"file":"a"}`, "/n: maximum"},
		"pattern":        {`{"n":1,"file":"a;b"}`, "/file: 'a;b' does not match pattern"},
		"pattern anchor": {`{"n":1,"file":"a\nb"}`, "/file: "},
		"unknown key":    {`{"n":1,"file":"a","x":1}`, "additional properties 'x' not allowed"},
		"duplicate key":  {`{"n":1,"n":2,"file":"a"}`, `duplicate key "n"`},
		"no object":      {`[]`, "want an object"},
		"null":           {`null`, "want an object"},
		"truncated":      {`{"n":1`, "the document ends"},
		"trailing":       {`{"n":1,"file":"a"}{}`, "data after the value"},
		"invalid UTF-8":  {"{\"n\":1,\"file\":\"\xff\"}", "invalid UTF-8"},
		"too deep":       {strings.Repeat(`{"a":`, 70) + "1" + strings.Repeat("}", 70), "nested deeper"},
		"huge value":     {`{"n":1,"file":"` + strings.Repeat("A", 5000) + `"}`, "/file: maxLength"},
	} {
		t.Run(name, func(t *testing.T) {
			err := x.Validate([]byte(tc.params))
			if !errors.Is(err, tool.ErrParams) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v\nwant one with %q", err, tc.want)
			}
			if err != nil && len(err.Error()) > 4*300 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

// TestDigest holds the digest to its definition: a change of how it is made
// breaks every lock file.
func TestDigest(t *testing.T) {
	x := lookup(t, parse(t, "tools: {tool.echo: {description: say it again}}"), "tool.echo")
	// printf '{"description":"say it again","input_schema":{"type":"object"},"kind":"tool.echo"}' | sha256sum
	if want := "sha256:6bf38bc95b7bdce4da778719ea3b93a0d4fb0fb1539e426902988db22d2c51e7"; x.Digest != want {
		t.Errorf("digest %s, want %s", x.Digest, want)
	}
	a := lookup(t, parse(t, counter), "tool.exec.head").Digest
	b := lookup(t, parse(t, strings.Replace(counter, "10", "11", 1)), "tool.exec.head").Digest
	if a == b || a != lookup(t, parse(t, counter), "tool.exec.head").Digest {
		t.Error("the digest does not follow the definition")
	}
}

// fake is an executor of the test's choice.
type fake func(ctx context.Context, r *tool.Request) tool.Result

func (f fake) Execute(ctx context.Context, r *tool.Request) tool.Result { return f(ctx, r) }

func TestExecuteGuards(t *testing.T) {
	var log strings.Builder
	r, err := tool.Parse([]byte("tools: {tool.echo: {}}"), tool.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	out := func(b string) fake {
		return func(context.Context, *tool.Request) tool.Result {
			return tool.Result{Outcome: tool.OutcomeOK, Output: []byte(b)}
		}
	}
	wait := fake(func(ctx context.Context, _ *tool.Request) tool.Result {
		<-ctx.Done()
		d, _ := ctx.Deadline()
		if time.Until(d) > time.Second {
			return tool.Result{Outcome: tool.OutcomeKilled}
		}
		return tool.Result{Outcome: tool.OutcomeTimeout}
	})
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, tc := range map[string]struct {
		ctx  context.Context
		exec fake
		req  tool.Request
		want tool.Outcome
		code string
	}{
		"panic":                 {exec: func(context.Context, *tool.Request) tool.Result { panic("secret") }, want: tool.OutcomeError, code: tool.CodePanic},
		"nil output":            {exec: func(context.Context, *tool.Request) tool.Result { return tool.Result{Outcome: tool.OutcomeOK} }, want: tool.OutcomeOK},
		"array":                 {exec: out("[]"), want: tool.OutcomeError, code: tool.CodeOutputInvalid},
		"empty":                 {exec: out(""), want: tool.OutcomeError, code: tool.CodeOutputInvalid},
		"not JSON":              {exec: out("{"), want: tool.OutcomeError, code: tool.CodeOutputInvalid},
		"not UTF-8":             {exec: out("{\"a\":\"\xff\"}"), want: tool.OutcomeError, code: tool.CodeOutputInvalid},
		"too large":             {exec: out(`{"a":"` + strings.Repeat("x", 1<<20) + `"}`), want: tool.OutcomeError, code: tool.CodeOutputTooBig},
		"caller's timeout":      {exec: wait, req: tool.Request{Timeout: 10 * time.Millisecond}, want: tool.OutcomeTimeout},
		"policy's timeout":      {exec: wait, req: tool.Request{Timeout: time.Hour, Constraints: constraint.Constraints{TimeoutMS: 10}}, want: tool.OutcomeTimeout},
		"huge policy timeout":   {exec: out("{}"), req: tool.Request{Constraints: constraint.Constraints{TimeoutMS: 1 << 62}}, want: tool.OutcomeOK},
		"negative timeout":      {exec: out("{}"), req: tool.Request{Constraints: constraint.Constraints{TimeoutMS: -1}}, want: tool.OutcomeDenied, code: tool.CodeConstraint},
		"negative output limit": {exec: out("{}"), req: tool.Request{Constraints: constraint.Constraints{OutputMaxBytes: -1}}, want: tool.OutcomeDenied, code: tool.CodeConstraint},
		"canceled before":       {ctx: canceled, exec: out("{}"), want: tool.OutcomeKilled, code: "canceled"},
		"invalid message": {exec: func(context.Context, *tool.Request) tool.Result {
			return tool.Result{Outcome: tool.OutcomeError, Code: "x", Message: "\xff"}
		}, want: tool.OutcomeError, code: "x"},
	} {
		t.Run(name, func(t *testing.T) {
			x, err := tool.New("tool.fake", "", json.RawMessage(`{}`), time.Minute, tc.exec)
			if err != nil {
				t.Fatal(err)
			}
			ctx := tc.ctx
			if ctx == nil {
				ctx = t.Context()
			}
			res := r.Execute(ctx, x, &tc.req)
			if res.Outcome != tc.want || res.Code != tc.code {
				t.Errorf("result %s %s (%s), want %s %s", res.Outcome, res.Code, res.Message, tc.want, tc.code)
			}
			if strings.Contains(res.Message, "secret") || strings.Contains(res.Message, "\xff") {
				t.Errorf("message %q", res.Message)
			}
		})
	}
	if !strings.Contains(log.String(), "tool panicked") {
		t.Errorf("the panic is not in the log: %s", log.String())
	}
}

// TestUnenforceable: each kind says what it cannot keep, so that the pipeline
// can deny before it records an allow.
func TestUnenforceable(t *testing.T) {
	r := parse(t, "tools: {tool.echo: {}, tool.shell: {}, tool.http_get: {hosts: [a]}, tool.fs.read: {root: /}, tool.exec.x: {argv: [/bin/true]}}")
	all := constraint.Constraints{TimeoutMS: 1, OutputMaxBytes: 1, Env: []string{}, MemoryMax: 1, PidsMax: 1, CPUMax: "1 1", Egress: []string{}, FS: []string{}}
	for kind, want := range map[string]string{
		"tool.echo": "memory_max, cpu_max", "tool.http_get": "memory_max, cpu_max", "tool.fs.read": "memory_max, cpu_max",
		"tool.exec.x": "memory_max, pids_max, cpu_max, egress, fs", "tool.shell": "memory_max, pids_max, cpu_max, egress, fs",
	} {
		if got := lookup(t, r, kind).Unenforceable(all); got != want {
			t.Errorf("%s: %q, want %q", kind, got, want)
		}
		if got := lookup(t, r, kind).Unenforceable(constraint.Constraints{TimeoutMS: 1, OutputMaxBytes: 1, Env: []string{}}); got != "" {
			t.Errorf("%s cannot keep %q", kind, got)
		}
	}
}

func TestSchemaStandsAlone(t *testing.T) {
	for _, schema := range []string{`{"$ref":"file:///etc/passwd"}`, `{"$ref":"http://127.0.0.1:1/x"}`, `{"type":"objekt"}`, `{"pattern":"("}`, `nope`} {
		if _, err := tool.New("tool.x", "", json.RawMessage(schema), time.Second, fake(nil)); err == nil {
			t.Errorf("schema %s is accepted", schema)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(counter))
	f.Add([]byte("tools: {tool.http_get: {hosts: [a], allow_private: [10.0.0.0/8], max_bytes: 1KiB}}"))
	f.Add([]byte("tools: {tool.echo: {timeout: 1s}}\n---\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := tool.Parse(data, tool.Options{})
		if (r == nil) == (err == nil) {
			t.Fatalf("registry %v, error %v", r, err)
		}
		if r != nil {
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}
	})
}
