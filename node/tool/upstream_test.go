package tool_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/autonomyops/autonomy/internal/testutil/mcpserver"
	"github.com/autonomyops/autonomy/node/tool"
)

// upstream is a tools file with the fixture in a mode as server "up"; settings
// are more lines of it, indented by four.
func upstream(t *testing.T, mode string, settings ...string) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file := fmt.Sprintf("tools:\n  tool.echo: {}\nmcp:\n  up:\n    argv: [%q]\n    env: [%q, %q]\n", exe, mcpserver.Env+"="+mode, mcpserver.Dir+"="+t.TempDir())
	for _, s := range settings {
		file += "    " + s + "\n"
	}
	return file
}

func TestUpstream(t *testing.T) {
	r := parse(t, upstream(t, "good", `tools: {echo: {timeout: 3s, mcp_name: Echo}, test_simple_text: {as: simple, description: mine}}`))
	var kinds []string
	for _, tl := range r.List() {
		kinds = append(kinds, tl.Kind)
	}
	if got := strings.Join(kinds, " "); got != "tool.echo tool.mcp.up.echo tool.mcp.up.simple" {
		t.Fatalf("tools are %q", got)
	}
	echo, simple := lookup(t, r, "tool.mcp.up.echo"), lookup(t, r, "tool.mcp.up.simple")
	if echo.Name() != "Echo" || echo.Description != "fixture echo" || echo.Timeout.String() != "3s" {
		t.Errorf("%+v", echo)
	}
	if simple.Name() != "tool.mcp.up.simple" || simple.Description != "mine" || string(simple.InputSchema) != `{"properties":{},"type":"object"}` {
		t.Errorf("%+v", simple)
	}
	if res := r.Execute(t.Context(), echo, &tool.Request{Params: []byte(`{"a":1}`)}); res.Outcome != tool.OutcomeOK || !strings.Contains(string(res.Output), `"structured_content":{"a":1}`) {
		t.Errorf("%+v %s", res, res.Output)
	}
	if st := r.Upstreams(); len(st) != 1 || st[0].Server != "up" || st[0].Links != 1 || st[0].Restarts != 0 {
		t.Errorf("%+v", st)
	}
	all := parse(t, upstream(t, "good", `timeout: 7s`, `tools: {"*": {}, echo: {as: other}}`))
	if _, ok := all.Lookup("tool.mcp.up.test_image_content"); !ok {
		t.Error("\"*\" does not let in test_image_content")
	}
	if _, ok := all.Lookup("tool.mcp.up.echo"); ok {
		t.Error("a tool that has a name of its own has the other too")
	}
	if got := lookup(t, all, "tool.mcp.up.other").Timeout.String(); got != "7s" {
		t.Errorf("the server's timeout is not its tools': %s", got)
	}
}

// TestUpstreamDigest: the digest that is shown pins the whole definition, also
// what agents are not shown, and a pinned tool that is another does not load.
func TestUpstreamDigest(t *testing.T) {
	a := lookup(t, parse(t, upstream(t, "good", `tools: {echo: {}}`)), "tool.mcp.up.echo").Digest
	if b := lookup(t, parse(t, upstream(t, "good", `tools: {echo: {}}`)), "tool.mcp.up.echo").Digest; a != b {
		t.Errorf("two loads give %s and %s", a, b)
	}
	plain, err := tool.New("tool.mcp.up.echo", "fixture echo", []byte(`{"type":"object"}`), tool.DefaultTimeout, nil)
	if err != nil {
		t.Fatal(err)
	}
	if a == plain.Digest {
		t.Error("the digest holds nothing of the upstream's definition")
	}
	parse(t, upstream(t, "good", fmt.Sprintf(`tools: {echo: {digest: %q}}`, a)))
	r, err := tool.Parse([]byte(upstream(t, "good", fmt.Sprintf(`tools: {echo: {digest: %q}}`, "sha256:"+strings.Repeat("0", 64)))), tool.Options{})
	if err == nil || !strings.Contains(err.Error(), a) || !strings.Contains(err.Error(), "tools.yaml:7: up: tool \"echo\"") {
		t.Errorf("error %v, want one that names %s", err, a)
	}
	if r != nil {
		t.Error("a registry came with the error")
	}
}

func TestBadUpstreams(t *testing.T) {
	dir := t.TempDir()
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte("two words\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	server := func(s string) string { return "mcp:\n  up: " + s }
	for name, tc := range map[string]struct{ file, want string }{
		"a list":             {"mcp: []", `want a mapping "mcp:"`},
		"server name":        {"mcp:\n  Up: {argv: [/bin/true], tools: {'*': {}}}", "tools.yaml:2: Up: a server's name"},
		"unknown key":        {server("{argv: [/bin/true], tool: {}}"), `unknown key "tool": did you mean "tools"?`},
		"no tools":           {server("{argv: [/bin/true]}"), "tools is missing"},
		"neither":            {server("{tools: {'*': {}}}"), "want either argv (a program) or url"},
		"both":               {server("{argv: [/bin/true], url: 'https://a.example/', tools: {'*': {}}}"), "want either argv"},
		"no url":             {server("{url: 'ftp://a', tools: {'*': {}}}"), "url: scheme"},
		"secret in the url":  {server("{url: 'https://a.example/?key=hush', tools: {'*': {}}}"), "a query is not accepted"},
		"address inside":     {server("{url: 'http://127.0.0.1:9/', tools: {'*': {}}}"), "loopback"},
		"no token file":      {server("{url: 'https://a.example/', token_file: " + dir + "/none, tools: {'*': {}}}"), "token_file"},
		"bad token":          {server("{url: 'https://a.example/', token_file: " + token + ", tools: {'*': {}}}"), "want one token"},
		"token in the open":  {server("{url: 'http://a.example/', token_file: " + token + ", tools: {'*': {}}}"), "a token goes over https"},
		"token of a program": {server("{argv: [/bin/true], token_file: " + token + ", tools: {'*': {}}}"), "are for a url"},
		"no such program":    {server("{argv: [/bin/nonexistent], tools: {'*': {}}}"), "no such file"},
		"no server":          {server("{argv: [/bin/true], tools: {'*': {}}}"), "tools.yaml:2: up: start MCP server up: connect"},
		"no such tool":       {upstream(t, "good", "tools: {ecko: {}}"), `tools.yaml:7: up: the server has no tool "ecko": it has echo`},
		"a bad name":         {upstream(t, "good", "tools: {echo: {as: Echo}}"), `give it one with "as"`},
		"one name for two":   {upstream(t, "good", "tools: {echo: {as: x}, meta: {as: x}}"), "is there already"},
		"one mcp_name":       {upstream(t, "good", "tools: {echo: {mcp_name: tool.echo}}"), `both called "tool.echo" over MCP`},
		"a bad mcp_name":     {upstream(t, "good", "tools: {echo: {mcp_name: 'a b'}}"), "mcp_name"},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := tool.Parse([]byte(tc.file), tool.Options{})
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "hush") || strings.Contains(err.Error(), "words") {
				t.Errorf("error %v\nwant one with %q", err, tc.want)
			}
			if r != nil {
				t.Error("a registry came with the error")
			}
		})
	}
}

// TestOptionalUpstream: a server that may be missing takes only its own tools
// with it.
func TestOptionalUpstream(t *testing.T) {
	r := parse(t, upstream(t, "exit-at-once", "optional: true", `tools: {"*": {}}`))
	if n := len(r.List()); n != 1 {
		t.Errorf("%d tools", n)
	}
}
