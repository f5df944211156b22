package mcp_test

import (
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
	"sync"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"
	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/internal/metric"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/internal/testutil/mcpserver"
	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/httpapi"
	"github.com/autonomyops/autonomy/node/mcp"
	"github.com/autonomyops/autonomy/node/tool"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/wal"
)

func TestMain(m *testing.M) {
	mcpserver.Main()
	goleak.VerifyTestMain(m,
		// fasthttp's clock and worker cleaner run for the life of the process.
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.updateServerDate.func1"),
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.(*workerPool).Start.func2"))
}

type fixed struct{ a *prepared.Active }

func (f fixed) Current() *prepared.Active { return f.a }

// door is a served node API over a real log, policy and tools.
type door struct {
	t        testing.TB
	log      *wal.Log
	tools    *tool.Registry
	pipeline *call.Pipeline
	gate     *call.Gate // of pipeline
	endpoint *mcp.Endpoint
	server   *httpapi.Server
	url      string // http://ADDR/mcp
	socket   string
}

const policy = `package autonomy
import rego.v2

decision := {"allow": true} if input.kind in {"tool.echo", "tool.exec.wait", "tool.exec.fail"}
decision := {"allow": true} if startswith(input.kind, "tool.mcp.up.")
decision := {"allow": false, "reasons": [{"code": "not_here", "message": "dates are secret"}]} if input.kind == "tool.exec.date"
`

const toolsFile = `tools:
  tool.echo: {description: says it again}
  tool.exec.wait: {argv: [/bin/sleep, "30"], timeout: 60s}
  tool.exec.fail: {argv: [/bin/false]}
  tool.exec.date: {argv: [/bin/date]}
`

func open(t testing.TB, change func(*mcp.Options, *httpapi.Options)) *door {
	t.Helper()
	return serve(t, false, nil, change)
}

// serve is open; upstream adds tool.mcp.up.*, the tools of the fixture, and
// limits hold the callers, if not nil.
func serve(t testing.TB, upstream bool, limits *auth.Limits, change func(*mcp.Options, *httpapi.Options)) *door {
	t.Helper()
	d := &door{t: t}
	dir := t.TempDir()
	policyDir := filepath.Join(dir, "p")
	if err := errors.Join(os.Mkdir(policyDir, 0o700), os.WriteFile(filepath.Join(policyDir, "p.rego"), []byte(policy), 0o600)); err != nil {
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
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file := toolsFile
	if upstream {
		file += fmt.Sprintf("mcp:\n  up:\n    argv: [%q]\n    env: [%q]\n    tools: {\"*\": {}}\n", exe, mcpserver.Env+"=good")
	}
	if d.tools, err = tool.Parse([]byte(file), tool.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.tools.Close() })
	if d.log, _, err = wal.Open(filepath.Join(dir, "wal"), wal.Options{SegmentBytes: 1 << 20, MaxBytes: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.log.Close() })
	quiet := slog.New(slog.DiscardHandler)
	registry := func() *tool.Registry { return d.tools }
	_, batched := t.(*testing.B) // what is measured is the door, not the disk
	pipeline := call.New(call.Options{Batched: batched, Log: d.log, Policies: fixed{&prepared.Active{Program: program}}, Tools: registry, Logger: quiet,
		NodeID: "n", Assurance: func() string { return "none" }, Agent: func() call.Agent { return call.Agent{} }, Limits: limits})
	anyone, err := auth.Open(auth.Options{Anonymous: true, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	d.pipeline, d.gate = pipeline, pipeline.Gate()
	mo := mcp.Options{Pipeline: pipeline, Tools: registry, Logger: quiet}
	ho := httpapi.Options{Pipeline: pipeline, Tools: registry, Logger: quiet, Auth: anyone,
		Status: func() any { return nil }, Ready: func() []string { return nil }, Metrics: func(io.Writer, bool) string { return "" }}
	if change != nil {
		change(&mo, &ho)
	}
	d.endpoint = mcp.New(mo)
	ho.MCP = d.endpoint
	d.server = httpapi.New(ho)
	d.socket = filepath.Join(dir, "s")
	done := make(chan error, 2)
	for _, addr := range []string{"127.0.0.1:0", "unix:" + d.socket} {
		ln, err := run.Listen(addr, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if ln.Addr().Network() == "tcp" {
			d.url = "http://" + ln.Addr().String() + "/mcp"
		}
		go func() { done <- d.server.Serve(ln) }()
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := d.server.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		d.endpoint.Close()
		for range 2 {
			<-done
		}
	})
	return d
}

// connect is a client of the official Go SDK, with the protocol's version.
func (d *door) connect(version string, o *sdk.ClientOptions) *sdk.ClientSession {
	d.t.Helper()
	hc := &http.Client{Transport: &http.Transport{}}
	c := sdk.NewClient(&sdk.Implementation{Name: "test", Version: "1"}, o)
	s, err := c.Connect(d.t.Context(), &sdk.StreamableClientTransport{Endpoint: d.url, HTTPClient: hc}, &sdk.ClientSessionOptions{ProtocolVersion: version})
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() {
		_ = s.Close() // some tests close it themselves
		hc.CloseIdleConnections()
	})
	if got := s.InitializeResult().ProtocolVersion; got != version {
		d.t.Fatalf("negotiated %s, want %s", got, version)
	}
	return s
}

// versions runs f as a client of each revision.
func versions(t *testing.T, f func(t *testing.T, version string)) {
	for _, v := range mcp.Versions {
		t.Run(v, func(t *testing.T) { f(t, v) })
	}
}

func text(r *sdk.CallToolResult) string {
	var b strings.Builder
	for _, c := range r.Content {
		if t, ok := c.(*sdk.TextContent); ok {
			b.WriteString(t.Text)
		}
	}
	return b.String()
}

func structured(t *testing.T, r *sdk.CallToolResult) map[string]any {
	t.Helper()
	m, ok := r.StructuredContent.(map[string]any)
	if !ok {
		t.Fatalf("structuredContent is %T: %v", r.StructuredContent, r.StructuredContent)
	}
	return m
}

func TestList(t *testing.T) {
	d := open(t, nil)
	versions(t, func(t *testing.T, version string) {
		d.t = t
		list, err := d.connect(version, nil).ListTools(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, tl := range list.Tools {
			names = append(names, tl.Name)
		}
		if got := strings.Join(names, " "); got != "tool.echo tool.exec.date tool.exec.fail tool.exec.wait" {
			t.Errorf("tools are %q", got)
		}
		echo := list.Tools[0]
		registered, _ := d.tools.Lookup("tool.echo")
		if echo.Description != "says it again" || echo.Meta[mcp.MetaPrefix+"definition_digest"] != registered.Digest || !echo.Annotations.ReadOnlyHint {
			t.Errorf("tool.echo is shown as %+v", echo)
		}
		var want any
		if err := json.Unmarshal(registered.InputSchema, &want); err != nil {
			t.Fatal(err)
		}
		if got, _ := json.Marshal(echo.InputSchema); string(got) != mustJSON(t, want) {
			t.Errorf("schema is %s, want %s", got, registered.InputSchema)
		}
	})
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestCall(t *testing.T) {
	d := open(t, nil)
	versions(t, func(t *testing.T, version string) {
		d.t = t
		s := d.connect(version, nil)
		res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "tool.echo", Arguments: map[string]any{"text": "hé <b>"}})
		if err != nil {
			t.Fatal(err)
		}
		if res.IsError || mustJSON(t, res.StructuredContent) != mustJSON(t, map[string]any{"text": "hé <b>"}) || !strings.Contains(text(res), "hé <b>") {
			t.Errorf("%+v: %s", res, text(res))
		}
		if id, _ := res.Meta[mcp.MetaPrefix+"audit_id"].(string); id == "" || res.Meta[mcp.MetaPrefix+"policy_ref"] != "t@1.0.0" {
			t.Errorf("_meta is %v", res.Meta)
		}

		for name, tc := range map[string]struct {
			tool string
			args any
			want []string // in the text
			code string   // in structuredContent: code, or the first reason's
		}{
			"policy":  {"tool.exec.date", map[string]any{}, []string{"denied by policy: dates are secret", "code: not_here", "audit_id: ", "next: ", "policy explain"}, "not_here"},
			"no rule": {"tool.exec.date", map[string]any{"x": 1}, []string{"denied by request", "next: correct the arguments"}, "invalid_params"},
			"failure": {"tool.exec.fail", map[string]any{}, []string{"the tool ended with error", "exit_nonzero", "next: "}, ""},
		} {
			t.Run(name, func(t *testing.T) {
				res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: tc.tool, Arguments: tc.args})
				if err != nil {
					t.Fatal(err)
				}
				if !res.IsError {
					t.Errorf("no tool error: %s", text(res))
				}
				for _, w := range tc.want {
					if !strings.Contains(text(res), w) {
						t.Errorf("no %q in %q", w, text(res))
					}
				}
				m := structured(t, res)
				got, _ := m["code"].(string)
				if rs, ok := m["reasons"].([]any); ok && got == "" {
					got, _ = rs[0].(map[string]any)["code"].(string)
				}
				if got != tc.code {
					t.Errorf("code is %q, want %q: %v", got, tc.code, m)
				}
			})
		}

		_, err = s.CallTool(t.Context(), &sdk.CallToolParams{Name: "tool.nothing"})
		var je *jsonrpc.Error
		if !errors.As(err, &je) || je.Code != jsonrpc.CodeInvalidParams {
			t.Errorf("a tool that does not exist: %v", err)
		}
	})
}

// TestMeta holds the fields that travel in _meta to what they do over HTTP.
func TestMeta(t *testing.T) {
	d := open(t, nil)
	s := d.connect(mcp.Versions[0], nil)
	do := func(text string, meta sdk.Meta) (*sdk.CallToolResult, error) {
		return s.CallTool(t.Context(), &sdk.CallToolParams{Meta: meta, Name: "tool.echo", Arguments: map[string]any{"text": text}})
	}
	once := sdk.Meta{mcp.MetaPrefix + "call_id": "c-1"}
	first, err := do("a", once)
	if err != nil {
		t.Fatal(err)
	}
	again, err := do("a", sdk.Meta{mcp.MetaPrefix + "call_id": "c-1"})
	if err != nil {
		t.Fatal(err)
	}
	if again.Meta[mcp.MetaPrefix+"audit_id"] != first.Meta[mcp.MetaPrefix+"audit_id"] || again.Meta[mcp.MetaPrefix+"idempotent_replay"] != true {
		t.Errorf("a repeated call gave %v, the first %v", again.Meta, first.Meta)
	}
	other, err := do("b", sdk.Meta{mcp.MetaPrefix + "call_id": "c-1"})
	if err != nil || !other.IsError {
		t.Errorf("same call_id, other params: %v, %+v", err, other)
	}
	dry, err := do("a", sdk.Meta{mcp.MetaPrefix + "dry_run": true})
	if err != nil || dry.IsError || !strings.Contains(text(dry), "dry run") {
		t.Errorf("dry run: %v, %+v", err, dry)
	}
	for name, bad := range map[string]sdk.Meta{
		"type":    {mcp.MetaPrefix + "call_id": 7},
		"timeout": {mcp.MetaPrefix + "timeout_ms": -1},
		"length":  {mcp.MetaPrefix + "session": strings.Repeat("s", 300)},
	} {
		var je *jsonrpc.Error
		if _, err := do("a", bad); !errors.As(err, &je) || je.Code != jsonrpc.CodeInvalidParams {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCancel cancels a call that sleeps for half a minute: each client's way of
// cancelling must end it, and the log must say so.
func TestCancel(t *testing.T) {
	versions(t, func(t *testing.T, version string) {
		d := open(t, nil)
		s := d.connect(version, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := s.CallTool(ctx, &sdk.CallToolParams{Name: "tool.exec.wait"})
			done <- err
		}()
		d.await("a decision", func(recs []call.Record) bool { return len(recs) == 1 })
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("the cancelled call gave %v", err)
		}
		d.await("the action", func(recs []call.Record) bool { return len(recs) == 2 && recs[1].Outcome == "killed" })
	})
}

// await reads the log's only call until found says so.
func (d *door) await(what string, found func([]call.Record) bool) {
	d.t.Helper()
	p := call.New(call.Options{Log: d.log, Logger: slog.New(slog.DiscardHandler)})
	for end := time.Now().Add(testutil.Timeout); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		for _, c := range []call.Caller{{Type: "anonymous", ID: "loopback"}} {
			recs, err := p.Find(d.t.Context(), fmt.Sprintf("%s-%016x", d.log.ID(), 1), c)
			if err == nil && found(recs) {
				return
			}
		}
	}
	d.t.Fatalf("%s did not come", what)
}

// TestListChanged: a client that listens hears of another registry.
func TestListChanged(t *testing.T) {
	versions(t, func(t *testing.T, version string) {
		d := open(t, nil)
		heard := make(chan struct{}, 16)
		s := d.connect(version, &sdk.ClientOptions{ToolListChangedHandler: func(context.Context, *sdk.ToolListChangedRequest) { heard <- struct{}{} }})
		if _, err := s.ListTools(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		next, err := tool.Parse([]byte("tools:\n  tool.echo: {description: other words}\n"), tool.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { next.Close() })
		// The stream may open after the change; then another change is heard.
		d.tools.Close()
		d.tools = next
		d.endpoint.Refresh()
		deadline := time.After(testutil.Timeout)
	wait:
		for i := 0; ; i++ {
			select {
			case <-heard:
				break wait
			case <-deadline:
				t.Fatal("list_changed was not heard")
			case <-time.After(200 * time.Millisecond):
				if d.tools, err = tool.Parse(fmt.Appendf(nil, "tools:\n  tool.echo: {description: words %d}\n", i), tool.Options{}); err != nil {
					t.Fatal(err)
				}
				d.endpoint.Refresh()
			}
		}
		list, err := s.ListTools(t.Context(), nil)
		if err != nil || len(list.Tools) != 1 {
			t.Errorf("%v, %+v", err, list)
		}
	})
}

// post sends a body as a raw client.
func (d *door) post(body string, header map[string]string) (int, http.Header, string) {
	d.t.Helper()
	req, err := http.NewRequestWithContext(d.t.Context(), http.MethodPost, d.url, strings.NewReader(body))
	if err != nil {
		d.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	for k, v := range header {
		if k == "Host" {
			req.Host = v
		}
		req.Header.Set(k, v)
	}
	tr := &http.Transport{DisableKeepAlives: true}
	if d.socket != "" && header["Socket"] != "" {
		tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", d.socket)
		}
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		d.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(data)
}

const initialize = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`

func TestDefences(t *testing.T) {
	d := open(t, nil)
	for name, tc := range map[string]struct {
		body   string
		header map[string]string
		status int
	}{
		"origin":                          {initialize, map[string]string{"Origin": "https://evil.example"}, 403},
		"host":                            {initialize, map[string]string{"Host": "evil.example"}, 403},
		"credential":                      {initialize, map[string]string{"Authorization": "Bearer listener"}, 401},
		"batch":                           {" [" + initialize + "]", nil, 400},
		"too large":                       {`{"jsonrpc":"2.0","id":1,"method":"x","params":{"a":"` + strings.Repeat("a", 300<<10) + `"}}`, nil, 413},
		"no json":                         {"hello", nil, 400},
		"content type":                    {initialize, map[string]string{"Content-Type": "text/plain"}, 415},
		"no session":                      {`{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, map[string]string{"Mcp-Session-Id": "none"}, 404},
		"a new version without its _meta": {`{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, map[string]string{"Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/list"}, 400},
	} {
		t.Run(name, func(t *testing.T) {
			d.t = t
			if status, _, body := d.post(tc.body, tc.header); status != tc.status {
				t.Errorf("status %d, want %d: %s", status, tc.status, body)
			}
		})
	}
}

// TestSessions: bound to their principal, bounded in number, gone when deleted.
func TestSessions(t *testing.T) {
	d := open(t, func(o *mcp.Options, _ *httpapi.Options) { o.MaxSessions, o.MaxPerCaller = 3, 2 })
	begin := func(header map[string]string) (int, string) {
		status, h, _ := d.post(initialize, header)
		return status, h.Get("Mcp-Session-Id")
	}
	status, first := begin(nil)
	if status != 200 || len(first) < 26 {
		t.Fatalf("status %d, session id %q", status, first)
	}
	ping := `{"jsonrpc":"2.0","id":2,"method":"ping"}`
	if status, _, _ := d.post(ping, map[string]string{"Mcp-Session-Id": first}); status != 200 {
		t.Errorf("own session: status %d", status)
	}
	if status, _, _ := d.post(ping, map[string]string{"Mcp-Session-Id": first, "Socket": "1"}); status != 403 {
		t.Errorf("another principal's session: status %d", status)
	}
	if status, _ := begin(nil); status != 200 {
		t.Errorf("second session: status %d", status)
	}
	if status, _ := begin(nil); status != 503 {
		t.Errorf("third session of a principal that may have two: status %d", status)
	}
	if status, _ := begin(map[string]string{"Socket": "1"}); status != 200 {
		t.Errorf("session of another principal: status %d", status)
	}
	if status, _ := begin(map[string]string{"Socket": "1"}); status != 503 {
		t.Errorf("fourth session in all: status %d", status)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, d.url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Mcp-Session-Id", first)
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil || resp.StatusCode != 204 {
		t.Fatalf("DELETE: %v, %v", err, resp)
	}
	resp.Body.Close()
	if status, _ := begin(nil); status != 200 {
		t.Errorf("after one was deleted: status %d", status)
	}
	if n := d.endpoint.Stats().Sessions; n != 3 {
		t.Errorf("%d sessions, want 3", n)
	}
}

func TestOverload(t *testing.T) {
	d := open(t, nil)
	d.gate.Set(call.GateOptions{MaxRunning: 1, MaxWaiting: 1, MaxWait: time.Millisecond})
	s := d.connect(mcp.Versions[0], nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = s.CallTool(ctx, &sdk.CallToolParams{Name: "tool.exec.wait"}) // cancelled below
	}()
	d.await("a decision", func(recs []call.Record) bool { return len(recs) == 1 })
	res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "tool.echo"})
	if err != nil || !res.IsError || !strings.Contains(text(res), "overloaded") {
		t.Errorf("second of one: %v, %+v", err, res)
	}
	cancel()
	<-done
}

// TestGate: the places are those of POST /v1/tool, and a call that finds none
// waits for one.
func TestGate(t *testing.T) {
	d := open(t, nil)
	d.gate.Set(call.GateOptions{MaxRunning: 1, MaxWaiting: 1, MaxWait: testutil.Timeout})
	admitted := func(running, waiting int) {
		t.Helper()
		want := fmt.Sprintf("autonomy_node_admission_running %d\nautonomy_node_admission_waiting %d\n", running, waiting)
		testutil.Eventually(t, testutil.Timeout, want, func() error {
			b, out := metric.NewBuffer(false), &bytes.Buffer{}
			d.pipeline.WriteMetrics(b)
			if err := b.Expose(out, nil); err != nil {
				return err
			}
			if !strings.Contains(out.String(), want) {
				return errors.New("it is otherwise")
			}
			return nil
		})
	}
	versions(t, func(t *testing.T, version string) {
		d.t = t
		s := d.connect(version, nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var calls sync.WaitGroup
		defer calls.Wait()
		calls.Go(func() {
			_, _ = s.CallTool(ctx, &sdk.CallToolParams{Name: "tool.exec.wait"}) // cancelled below
		})
		admitted(1, 0)
		calls.Go(func() {
			if res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "tool.echo"}); err != nil || res.IsError {
				t.Errorf("the call that waited: %v, %+v", err, res)
			}
		})
		admitted(1, 1)
		tr := &http.Transport{DisableKeepAlives: true}
		resp, err := (&http.Client{Transport: tr}).Post(strings.TrimSuffix(d.url, "/mcp")+"/v1/tool", "application/json", strings.NewReader(`{"kind":"tool.echo"}`))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 429 {
			t.Errorf("POST /v1/tool while all places are taken: status %d", resp.StatusCode)
		}
		cancel()
		calls.Wait()
		admitted(0, 0)
	})
}

// TestLimits: the limits of a caller hold here as at every door.
func TestLimits(t *testing.T) {
	for _, version := range mcp.Versions[:2] {
		t.Run(version, func(t *testing.T) {
			callers, err := auth.ParseCallers([]byte("principals: {loopback: {limits: {per_day: 1}}}"))
			if err != nil {
				t.Fatal(err)
			}
			limits, err := auth.NewLimits(func() *auth.Callers { return callers }, filepath.Join(t.TempDir(), "budget.json"), nil)
			if err != nil {
				t.Fatal(err)
			}
			s := serve(t, false, limits, nil).connect(version, nil)
			if res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "tool.echo"}); err != nil || res.IsError {
				t.Fatalf("first: %v, %+v", err, res)
			}
			res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "tool.echo"})
			if err != nil || !res.IsError || !strings.Contains(text(res), "code: limit_budget") || !strings.Contains(text(res), "next: try again in") {
				t.Fatalf("second: %v, %+v", err, res)
			}
			if after, ok := res.Meta[mcp.MetaPrefix+"retry_after"].(float64); !ok || after < 1 || after > 86400 {
				t.Errorf("retry_after is %v", res.Meta)
			}
		})
	}
}

// TestShutdownWaitsForSessions: a call of a session runs on without its
// connection. A stop gives it the time that calls get, and then it is cancelled
// and recorded before the server is done.
func TestShutdownWaitsForSessions(t *testing.T) {
	d := open(t, nil)
	_, h, _ := d.post(initialize, nil)
	session := "Mcp-Protocol-Version: 2025-11-25\r\nMcp-Session-Id: " + h.Get("Mcp-Session-Id")
	d.post(`{"jsonrpc":"2.0","method":"notifications/initialized"}`, map[string]string{"Mcp-Protocol-Version": "2025-11-25", "Mcp-Session-Id": h.Get("Mcp-Session-Id")})
	host := strings.TrimSuffix(strings.TrimPrefix(d.url, "http://"), "/mcp")
	c, err := net.Dial("tcp", host)
	if err != nil {
		t.Fatal(err)
	}
	body := `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"tool.exec.wait","arguments":{}}}`
	fmt.Fprintf(c, "POST /mcp HTTP/1.1\r\nHost: %s\r\nAccept: application/json, text/event-stream\r\nContent-Type: application/json\r\n%s\r\nContent-Length: %d\r\n\r\n%s", host, session, len(body), body)
	d.await("the decision", func(recs []call.Record) bool { return len(recs) == 1 })
	c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	defer context.AfterFunc(ctx, d.endpoint.Close)() // as the node does
	if err := d.server.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown: %v", err)
	}
	if n := d.gate.Running(); n != 0 {
		t.Errorf("%d calls still run", n)
	}
	d.await("its end", func(recs []call.Record) bool { return len(recs) == 2 && recs[1].Outcome == "killed" })
}

// TestUpstream: what an upstream MCP server answers arrives as it gave it, with
// its progress, through decision and record.
func TestUpstream(t *testing.T) {
	d := serve(t, true, nil, nil)
	versions(t, func(t *testing.T, version string) {
		d.t = t
		var mu sync.Mutex
		var progress []float64
		s := d.connect(version, &sdk.ClientOptions{ProgressNotificationHandler: func(_ context.Context, r *sdk.ProgressNotificationClientRequest) {
			mu.Lock()
			defer mu.Unlock()
			progress = append(progress, r.Params.Progress)
		}})
		res, err := s.CallTool(t.Context(), &sdk.CallToolParams{Name: "tool.mcp.up.test_multiple_content_types"})
		if err != nil || res.IsError || len(res.Content) != 3 {
			t.Fatalf("%v, %+v", err, res)
		}
		if img, ok := res.Content[1].(*sdk.ImageContent); !ok || img.MIMEType != "image/png" || !bytes.HasPrefix(img.Data, []byte("\x89PNG")) {
			t.Errorf("second content is %+v", res.Content[1])
		}
		if r, ok := res.Content[2].(*sdk.EmbeddedResource); !ok || r.Resource.URI != "test://mixed-content-resource" {
			t.Errorf("third content is %+v", res.Content[2])
		}
		if res, err = s.CallTool(t.Context(), &sdk.CallToolParams{Name: "tool.mcp.up.test_error_handling"}); err != nil || !res.IsError || !strings.Contains(text(res), "intentionally") {
			t.Errorf("%v, %+v", err, res)
		}
		if res, err = s.CallTool(t.Context(), &sdk.CallToolParams{Name: "tool.mcp.up.echo", Arguments: map[string]any{"a": 1}}); err != nil || mustJSON(t, res.StructuredContent) != `{"a":1}` {
			t.Errorf("%v, %+v", err, res)
		}
		params := &sdk.CallToolParams{Name: "tool.mcp.up.test_tool_with_progress"}
		params.SetProgressToken("p-1")
		if res, err = s.CallTool(t.Context(), params); err != nil || text(res) != "done" {
			t.Errorf("%v, %+v", err, res)
		}
		for end := time.Now().Add(testutil.Timeout); ; time.Sleep(time.Millisecond) { // the client handles them in its own time
			mu.Lock()
			got := fmt.Sprint(progress)
			mu.Unlock()
			if got == "[0 50 100]" {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("progress is %s", got)
			}
		}
	})
}
