package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// nodeStub answers POST /v1/tool with what a node would say, and keeps what it
// was asked.
type nodeStub struct {
	status int
	body   string
	header http.Header
	asked  string
}

func (n *nodeStub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if err != nil || r.Method != http.MethodPost || r.URL.Path != "/v1/tool" || r.Header.Get("Content-Type") != "application/json" {
		http.Error(w, "unexpected request", http.StatusTeapot)
		return
	}
	n.asked = string(b)
	for k, v := range n.header {
		w.Header()[k] = v
	}
	w.WriteHeader(n.status)
	io.WriteString(w, n.body)
}

func TestCall(t *testing.T) {
	for name, tc := range map[string]struct {
		status int
		body   string
		header http.Header
		args   []string
		code   int
		asked  string
		out    string // with the latency taken out
		stderr string
	}{
		"allowed": {
			status: 200, body: `{"decision":"allow","audit_id":"A1","policy_ref":"quickstart@1.0.0","outcome":"ok","output":{"text":"hi <b>"}}`,
			args: []string{"tool.echo", `{ "text":"hi", "n":1.50 }`}, code: 0,
			asked: `{"kind":"tool.echo","params":{ "text":"hi", "n":1.50 }}`,
			out:   "allow  tool.echo  ok\n  policy     quickstart@1.0.0\n  audit id   A1\n  latency    T\n  output\n    {\n      \"text\": \"hi <b>\"\n    }\n",
		},
		"all flags": {
			status: 200, body: `{"decision":"allow","audit_id":"A1","dry_run":true}`,
			args: []string{"tool.echo", "--session", "s", "--call-id", "c", "--timeout", "1500ms", "--dry-run"}, code: 0,
			asked: `{"kind":"tool.echo","params":{},"session":"s","call_id":"c","timeout_ms":1500,"dry_run":true}`,
			out:   "allow  tool.echo  dry run: not executed\n  audit id   A1\n  latency    T\n",
		},
		"tool failed": {
			status: 200, body: `{"decision":"allow","audit_id":"A1","outcome":"error","error":{"code":"exit_nonzero","message":"exit code 3"},"output":{"exit_code":3}}`,
			args: []string{"tool.exec.x"}, code: 1,
			out: "allow  tool.exec.x  error\n  error      exit code 3 (exit_nonzero)\n  audit id   A1\n  latency    T\n  output\n    {\n      \"exit_code\": 3\n    }\n",
		},
		"denied by policy": {
			status: 403, body: `{"decision":"deny","layer":"policy","reason":"no shell","reasons":[{"code":"shell","message":"no shell"},{"message":"never"}],"audit_id":"A1","policy_ref":"q@1"}`,
			args: []string{"tool.shell"}, code: 1,
			out: "deny  tool.shell\n  layer      policy: refused by policy\n  reason     no shell (shell)\n  reason     never\n  policy     q@1\n  audit id   A1\n  latency    T\n",
		},
		"denied by enforcement": {
			status: 403, body: `{"decision":"deny","layer":"runtime","reason":"redirect 1: host","code":"egress_denied","audit_id":"A1"}`,
			args: []string{"tool.http_get"}, code: 1,
			out: "deny  tool.http_get\n  layer      runtime: policy allowed it, enforcement refused it\n  reason     redirect 1: host (egress_denied)\n  audit id   A1\n  latency    T\n",
		},
		"pending": {
			status: 202, body: `{"decision":"pending","audit_id":"A1","approval_id":"P1","expires_at":"2026-01-01T00:00:00Z"}`,
			args: []string{"tool.echo"}, code: 1,
			out: "pending  tool.echo\n  approval   P1, until 2026-01-01T00:00:00Z\n  audit id   A1\n  latency    T\n",
		},
		"slow down": {
			status: 429, body: `{"decision":"deny","layer":"request","reason":"busy"}`, header: http.Header{"Retry-After": {"2"}},
			args: []string{"tool.echo"}, code: 1,
			out: "deny  tool.echo\n  layer      request: the request is not one the node accepts\n  reason     busy\n  retry      2\n  latency    T\n",
		},
		"replay": {
			status: 200, body: `{"decision":"allow","outcome":"ok"}`, header: http.Header{"Idempotent-Replay": {"true"}},
			args: []string{"tool.echo"}, code: 0,
			out: "allow  tool.echo  ok\n  replay     the first result of this call id; nothing ran again\n  latency    T\n",
		},
		"escapes": {
			status: 403, body: `{"decision":"deny","layer":"policy","reason":"\u001b[2Jgone\nallow  tool.echo  ok","output":{"a":"\u009b2J"}}`,
			args: []string{"tool.echo"}, code: 1,
			out: "deny  tool.echo\n  layer      policy: refused by policy\n  reason     ·[2Jgone·allow  tool.echo  ok\n  latency    T\n  output\n    {\n      \"a\": \"\\u009b2J\"\n    }\n",
		},
		"a layer of later": {
			status: 403, body: `{"decision":"deny","layer":"budget","reason":"spent"}`,
			args: []string{"tool.echo"}, code: 1,
			out: "deny  tool.echo\n  layer      budget\n  reason     spent\n  latency    T\n",
		},
		"JSON": {
			status: 403, body: `{"decision":"deny","layer":"policy","extra":1}`,
			args: []string{"tool.echo", "-o", "json"}, code: 1,
			out: "{\n  \"decision\": \"deny\",\n  \"layer\": \"policy\",\n  \"extra\": 1\n}\n",
		},
		"an allow that is no 200": {status: 500, body: `{"decision":"allow","outcome":"ok"}`, args: []string{"tool.echo", "-o", "json"}, code: 1,
			out: "{\n  \"decision\": \"allow\",\n  \"outcome\": \"ok\"\n}\n"},
		"not a node":       {status: 404, body: "not found", args: []string{"tool.echo"}, code: 1, stderr: "carries no decision"},
		"an empty answer":  {status: 200, body: "", args: []string{"tool.echo"}, code: 1, stderr: "carries no decision"},
		"an endless one":   {status: 200, body: strings.Repeat(" ", maxCallAnswer+1), args: []string{"tool.echo"}, code: 1, stderr: "over 4194304 bytes"},
		"a redirect":       {status: 302, body: "", header: http.Header{"Location": {"/elsewhere"}}, args: []string{"tool.echo"}, code: 1, stderr: "carries no decision"},
		"a broken-off one": {status: 200, body: `{"decision":"allow"`, header: http.Header{"Content-Length": {"100"}}, args: []string{"tool.echo"}, code: 5, stderr: "broke off"},
	} {
		t.Run(name, func(t *testing.T) {
			stub := &nodeStub{status: tc.status, body: tc.body, header: tc.header}
			s := httptest.NewServer(stub)
			defer s.Close()
			var out, errs bytes.Buffer
			code := Main(append([]string{"call", "--node", s.URL}, tc.args...), &out, &errs)
			if code != tc.code {
				t.Errorf("exit code %d, want %d: %s", code, tc.code, errs.String())
			}
			got := regexp.MustCompile(`(?m)^(  latency    )\S+$`).ReplaceAllString(out.String(), "${1}T")
			if got != tc.out {
				t.Errorf("printed\n%s\nwant\n%s", got, tc.out)
			}
			if !strings.Contains(errs.String(), tc.stderr) || tc.stderr == "" && errs.Len() > 0 {
				t.Errorf("stderr %q, want %q", errs.String(), tc.stderr)
			}
			if tc.asked != "" && stub.asked != tc.asked {
				t.Errorf("asked %s\nwant  %s", stub.asked, tc.asked)
			}
		})
	}
}

func TestCallUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: &nodeStub{status: 200, body: `{"decision":"allow","outcome":"ok"}`}}}
	s.Start()
	defer s.Close()
	var out, errs bytes.Buffer
	if code := Main([]string{"call", "tool.echo", "--node", "unix:" + path}, &out, &errs); code != 0 {
		t.Errorf("exit code %d: %s%s", code, &out, &errs)
	}
}

func TestWrapWords(t *testing.T) {
	for _, tc := range []struct {
		text string
		want string
	}{{"", `[""]`}, {"a b c", `["a b" "c"]`}, {"abcd ef", `["abcd" "ef"]`}, {"äöü ß", `["äöü" "ß"]`}} {
		if got := fmt.Sprintf("%q", wrapWords(tc.text, 3)); got != tc.want {
			t.Errorf("%q: %s, want %s", tc.text, got, tc.want)
		}
	}
}
