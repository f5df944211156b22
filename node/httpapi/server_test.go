package httpapi_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/internal/metric"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/httpapi"
	"github.com/autonomyops/autonomy/node/tool"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/wal"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// fasthttp's clock and worker cleaner run for the life of the process.
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.updateServerDate.func1"),
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.(*workerPool).Start.func2"))
}

type fixed struct{ a *prepared.Active }

func (f fixed) Current() *prepared.Active { return f.a }

// api is a served node API over a real log, policy and tools.
type api struct {
	t      *testing.T
	log    *wal.Log
	addr   string
	socket string
	server *httpapi.Server
	ready  []string
}

const echoPolicy = "package autonomy\nimport rego.v2\nallow if input.kind in {\"tool.echo\", \"tool.exec.wait\", \"tool.http_get\"}\n"

func serve(t *testing.T, change func(*httpapi.Options)) *api {
	t.Helper()
	return serveAs(t, echoPolicy, call.GateOptions{}, change)
}

func serveWith(t *testing.T, rego string, change func(*httpapi.Options)) *api {
	t.Helper()
	return serveAs(t, rego, call.GateOptions{}, change)
}

func serveGated(t *testing.T, gate call.GateOptions, change func(*httpapi.Options)) *api {
	t.Helper()
	return serveAs(t, echoPolicy, gate, change)
}

func serveAs(t *testing.T, rego string, gate call.GateOptions, change func(*httpapi.Options)) *api {
	t.Helper()
	a := &api{t: t}
	dir := t.TempDir()
	policyDir := filepath.Join(dir, "p")
	if err := os.Mkdir(policyDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(policyDir, "p.rego"), []byte(rego), 0o600); err != nil {
		t.Fatal(err)
	}
	raw, err := prepared.BuildBundle(policyDir, prepared.BuildOptions{Name: "t", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := prepared.ReadBundle(raw, prepared.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	program, err := prepared.Compile(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	tools, err := tool.Parse([]byte("tools:\n  tool.echo: {}\n  tool.exec.wait:\n    argv: [/bin/sleep, \"30\"]\n  tool.http_get:\n    hosts: [127.0.0.1]\n    allow_private: [127.0.0.1/32]\n"), tool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tools.Close() })
	a.log, _, err = wal.Open(filepath.Join(dir, "wal"), wal.Options{SegmentBytes: 1 << 20, MaxBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.log.Close() })
	registry := func() *tool.Registry { return tools }
	quiet := slog.New(slog.DiscardHandler)
	anyone, err := auth.Open(auth.Options{Anonymous: true, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	pipeline := call.New(call.Options{Log: a.log, Policies: fixed{&prepared.Active{Program: program}}, Tools: registry, Logger: quiet,
		NodeID: "n", Assurance: func() string { return "none" }, Agent: func() call.Agent { return call.Agent{} }, Gate: gate})
	o := httpapi.Options{Pipeline: pipeline, Tools: registry, Logger: quiet, Auth: anyone, MaxBodyBytes: 4 << 10,
		Status: func() any { return map[string]string{"node_id": "n"} }, Ready: func() []string { return a.ready },
		Metrics: func(w io.Writer, open bool) string {
			b := metric.NewBuffer(open)
			pipeline.WriteMetrics(b)
			if err := b.Expose(w, call.Metrics); err != nil {
				t.Error(err)
			}
			return b.ContentType()
		}}
	if change != nil {
		change(&o)
	}
	a.server = httpapi.New(o)
	a.socket = filepath.Join(dir, "s")
	done := make(chan error, 2)
	for _, addr := range []string{"127.0.0.1:0", "unix:" + a.socket} {
		ln, err := run.Listen(addr, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if ln.Addr().Network() == "tcp" {
			a.addr = ln.Addr().String()
		}
		go func() { done <- a.server.Serve(ln) }()
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		defer cancel()
		_ = a.server.Shutdown(ctx) // its deadline is part of some tests
		for range 2 {
			select {
			case <-done:
			case <-time.After(30 * time.Second):
				t.Error("Serve did not return after Shutdown")
			}
		}
	})
	return a
}

// raw sends bytes over a new connection and reads one response.
func (a *api) raw(network, request string) (*http.Response, string) {
	a.t.Helper()
	addr := a.addr
	if network == "unix" {
		addr = a.socket
	}
	c, err := net.Dial(network, addr)
	if err != nil {
		a.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		a.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		a.t.Fatalf("%q: %v", clip(request), err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return resp, string(body)
}

func clip(s string) string { return s[:min(len(s), 120)] }

func (a *api) request(method, path, headers, body string) (*http.Response, string) {
	a.t.Helper()
	return a.raw("tcp", fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\n%sContent-Length: %d\r\n\r\n%s", method, path, a.addr, headers, len(body), body))
}

func TestEndpoints(t *testing.T) {
	a := serve(t, nil)
	for _, tc := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"POST", "/v1/tool", `{"kind":"tool.echo","params":{"text":"hi"}}`, 200, `"outcome":"ok"`},
		{"GET", "/v1/tools", "", 200, `"definition_digest":"sha256:`},
		{"GET", "/v1/status", "", 200, `"node_id":"n"`},
		{"GET", "/healthz", "", 200, `"ok"`},
		{"GET", "/readyz", "", 200, `"ready"`},
		{"GET", "/metrics", "", 200, `autonomy_node_calls_total{decision="allow",layer="",outcome="ok"} 1`},
		{"GET", "/v1/calls/" + a.log.ID() + "-0000000000000001", "", 200, `"event_type":"decision"`},
		{"GET", "/v1/calls/nope", "", 404, "no call of yours"},
		{"GET", "/v1/calls/", "", 404, "no call of yours"},
		{"GET", "/", "", 404, "no such path"},
		{"GET", "/v1/tool", "", 405, "use POST"},
		{"POST", "/v1/status", "", 405, "use GET"},
		{"DELETE", "/v1/tools", "", 405, "use GET"},
	} {
		resp, body := a.request(tc.method, tc.path, "", tc.body)
		if resp.StatusCode != tc.status || !strings.Contains(body, tc.want) {
			t.Errorf("%s %s: %d %s, want %d with %s", tc.method, tc.path, resp.StatusCode, body, tc.status, tc.want)
		}
		if resp.Header.Get("Server") != "" {
			t.Errorf("%s tells its server: %q", tc.path, resp.Header.Get("Server"))
		}
	}
	a.ready = []string{"policy: none is active"}
	if resp, body := a.request("GET", "/readyz", "", ""); resp.StatusCode != 503 || !strings.Contains(body, "none is active") {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}

// TestBadRequests: each is refused with its reason, and leaves no record.
func TestBadRequests(t *testing.T) {
	a := serve(t, nil)
	good := `{"kind":"tool.echo"}`
	for name, tc := range map[string]struct {
		method, path, headers, body string
		status                      int
		want                        string
	}{
		"not JSON":              {body: "kind=tool.echo", status: 400, want: "want a value"},
		"empty":                 {body: "", status: 400, want: "ends where a value is due"},
		"truncated":             {body: `{"kind":`, status: 400, want: "ends where a value is due"},
		"duplicate key":         {body: `{"kind":"tool.echo","kind":"tool.shell"}`, status: 400, want: "duplicate key"},
		"other case":            {body: `{"KIND":"tool.echo"}`, status: 400, want: "case-sensitive"},
		"trailing data":         {body: good + "[]", status: 400, want: "data after the value"},
		"invalid UTF-8":         {body: "{\"kind\":\"tool.\xff\"}", status: 400, want: "invalid UTF-8"},
		"trusted field":         {body: `{"kind":"tool.echo","caller":{"id":"root"}}`, status: 400, want: "set by the node"},
		"unknown tool":          {body: `{"kind":"tool.ecko"}`, status: 400, want: "did you mean"},
		"body over the limit":   {body: `{"kind":"tool.echo","params":{"text":"` + strings.Repeat("x", 5000) + `"}}`, status: 413, want: "over 4096 bytes"},
		"header over the limit": {headers: "X-Big: " + strings.Repeat("x", 9000) + "\r\n", body: good, status: 431, want: "over 8192 bytes"},
		"content type":          {headers: "Content-Type: text/plain\r\n", body: good, status: 415, want: "application/json"},
		"content encoding":      {headers: "Content-Encoding: gzip\r\n", body: good, status: 415, want: "without Content-Encoding"},
		"an unknown token":      {headers: "Authorization: Bearer x\r\n", body: good, status: 401, want: "token is not valid"},
		"an empty token":        {headers: "Authorization:\r\n", body: good, status: 401, want: "token is not valid"},
		"another scheme":        {headers: "Authorization: Basic eDp5\r\n", body: good, status: 401, want: "token is not valid"},
		"a page of a site":      {headers: "Origin: https://evil.test\r\n", body: good, status: 403, want: "another origin"},
		"a sandboxed page":      {headers: "Origin: null\r\n", body: good, status: 403, want: "another origin"},
	} {
		t.Run(name, func(t *testing.T) {
			resp, body := a.request("POST", "/v1/tool", tc.headers, tc.body)
			var d struct{ Decision, Layer, Reason, Code string }
			if err := json.Unmarshal([]byte(body), &d); err != nil {
				t.Fatalf("%v: %s", err, body)
			}
			if resp.StatusCode != tc.status || d.Decision != "deny" || d.Layer != "request" || d.Code == "" || !strings.Contains(d.Reason, tc.want) {
				t.Errorf("%d %s, want %d with %q", resp.StatusCode, body, tc.status, tc.want)
			}
		})
	}
	if n := a.log.Stats().NextSeq; n != 1 {
		t.Errorf("bad requests left %d records", n-1)
	}
}

func TestHost(t *testing.T) {
	a := serve(t, nil)
	_, port, _ := net.SplitHostPort(a.addr)
	for host, status := range map[string]int{
		a.addr:                        200,
		"localhost:" + port:           200,
		"evil.test:" + port:           403, // DNS rebinding: the name points here, the page is theirs
		"127.0.0.1":                   403,
		"127.0.0.2:" + port:           403,
		"127.0.0.1.evil.test:" + port: 403,
		"":                            400, // HTTP/1.1 demands one
	} {
		resp, body := a.raw("tcp", "GET /healthz HTTP/1.1\r\nHost: "+host+"\r\n\r\n")
		if resp.StatusCode != status {
			t.Errorf("Host %q: %d %s, want %d", host, resp.StatusCode, body, status)
		}
	}
}

func TestGarbage(t *testing.T) {
	a := serve(t, nil)
	for _, in := range []string{
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS hello\r\n\r\n",
		"GET\r\n\r\n",
		"POST /v1/tool HTTP/1.1\r\nHost: " + a.addr + "\r\nContent-Length: -1\r\n\r\n{}",
		"POST /v1/tool HTTP/1.1\r\nHost: " + a.addr + "\r\nContent-Length: 9999999999999999999999\r\n\r\n{}",
	} {
		if resp, body := a.raw("tcp", in); resp.StatusCode != 400 {
			t.Errorf("%q: %d %s", clip(in), resp.StatusCode, body)
		}
	}
}

// TestPeer: on the Unix socket the caller is the kernel's word, and policy sees it.
func TestPeer(t *testing.T) {
	a := serve(t, nil)
	body := `{"kind":"tool.echo"}`
	resp, out := a.raw("unix", fmt.Sprintf("POST /v1/tool HTTP/1.1\r\nHost: node\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
	if resp.StatusCode != 200 {
		t.Fatalf("%d %s", resp.StatusCode, out)
	}
	payload, _, err := a.log.Get(1)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf(`"caller":{"type":"unix","id":"uid:%d","uid":%[1]d,"gid":%d,"pid":%d}`, os.Getuid(), os.Getgid(), os.Getpid()); !bytes.Contains(payload, []byte(want)) {
		t.Errorf("no %s in %q", want, payload)
	}
	// What one caller did, another does not see.
	id := a.log.ID() + "-0000000000000001"
	if resp, out := a.request("GET", "/v1/calls/"+id, "", ""); resp.StatusCode != 404 {
		t.Errorf("%d %s", resp.StatusCode, out)
	}
	if resp, out := a.raw("unix", "GET /v1/calls/"+id+" HTTP/1.1\r\nHost: node\r\n\r\n"); resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, out)
	}
	if resp, out := a.raw("unix", "GET /healthz HTTP/1.1\r\nHost: node\r\nOrigin: http://x\r\n\r\n"); resp.StatusCode != 403 {
		t.Errorf("%d %s", resp.StatusCode, out)
	}
}

// TestOverload: beyond the limit of calls in flight the node sheds, and a stop
// ends what still runs.
func TestOverload(t *testing.T) {
	a := serveGated(t, call.GateOptions{MaxRunning: 2, MaxWait: 50 * time.Millisecond}, nil)
	slow := make(chan string, 2)
	for range 2 {
		go func() {
			resp, err := http.Post("http://"+a.addr+"/v1/tool", "application/json", strings.NewReader(`{"kind":"tool.exec.wait"}`))
			if err != nil {
				slow <- err.Error()
				return
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			slow <- string(body)
		}()
	}
	deadline := time.Now().Add(30 * time.Second)
	for a.log.Stats().NextSeq < 3 && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond)
	}
	resp, body := a.request("POST", "/v1/tool", "", `{"kind":"tool.echo"}`)
	if resp.StatusCode != 429 || resp.Header.Get("Retry-After") != "1" || !strings.Contains(body, `"code":"overloaded"`) {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := a.server.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown: %v, want its deadline: two calls were running", err)
	}
	for range 2 {
		select {
		case out := <-slow:
			if !strings.Contains(out, `"outcome":"killed"`) {
				t.Errorf("the running call answered %s", out)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("a running call outlived the stop")
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestKeepAlive(t *testing.T) {
	a := serve(t, nil)
	c, err := net.Dial("tcp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	br := bufio.NewReader(c)
	// Two requests in one write: answered in order, each on its own.
	one := `{"kind":"tool.echo","params":{"text":"one"}}`
	two := `{"kind":"tool.echo","params":{"text":"two"}}`
	for _, b := range []string{one, two} {
		fmt.Fprintf(c, "POST /v1/tool HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s", a.addr, len(b), b)
	}
	for _, want := range []string{"one", "two"} {
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 || !strings.Contains(string(body), want) {
			t.Errorf("%d %s, want %s", resp.StatusCode, body, want)
		}
	}
}
