package node_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/internal/testutil/mcpserver"
	"github.com/autonomyops/autonomy/node"
	"github.com/autonomyops/autonomy/prepared"
)

var update = flag.Bool("update", false, "write docs/metrics.md anew")

func TestMain(m *testing.M) {
	mcpserver.Main()
	os.Exit(m.Run())
}

// logs are what a node under test has logged.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// running is a node in this process.
type running struct {
	t     *testing.T
	dir   string
	addr  string
	logs  *logs
	admin *http.Client
	stop  func() error
}

const tools = "tools:\n  tool.echo: {}\n"

// upstream is more of a tools file: the fixture as server "up", its tools as
// tool.mcp.up.*.
func upstream(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("mcp:\n  up:\n    argv: [%q]\n    env: [%q]\n    tools: {echo: {}}\n", exe, mcpserver.Env+"=good")
}

// start runs a node on the quickstart policy until the test ends.
func start(t *testing.T, change func(*node.Config)) *running {
	t.Helper()
	r := &running{t: t, dir: t.TempDir(), logs: &logs{}}
	raw, err := prepared.BuildBundle("../examples/quickstart/policy", prepared.BuildOptions{Name: "q", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	r.write("policy.tar.gz", string(raw))
	r.write("tools.yaml", tools)
	// A socket's path is short: the test's own directory may not be.
	sockets, err := os.MkdirTemp("", "node")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	cfg := node.Defaults()
	cfg.Listen, cfg.StateDir, cfg.ReadyFile = []string{"127.0.0.1:0"}, filepath.Join(r.dir, "state"), filepath.Join(r.dir, "ready")
	cfg.Policy, cfg.Tools = filepath.Join(r.dir, "policy.tar.gz"), filepath.Join(r.dir, "tools.yaml")
	cfg.WALMax, cfg.WALSegment, cfg.KeepFree = 4<<20, 1<<20, 0
	cfg.Admin = filepath.Join(sockets, "admin")
	if change != nil {
		change(&cfg)
	}
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- node.Run(ctx, cfg, slog.New(slog.NewTextHandler(r.logs, nil)), r.logs) }()
	var once sync.Once
	r.stop = func() (err error) {
		once.Do(func() {
			cancel()
			select {
			case err = <-done:
			case <-time.After(30 * time.Second):
				err = errors.New("the node does not stop")
			}
		})
		return err
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("the node ended with: %v\n%s", err, r.logs)
		}
	})
	testutil.Eventually(t, 30*time.Second, "the node to be ready", func() error {
		data, err := os.ReadFile(cfg.ReadyFile)
		if err == nil {
			r.addr = strings.TrimPrefix(strings.SplitN(string(data), "\n", 2)[0], "addr=")
		}
		return err
	})
	r.admin = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", cfg.Admin)
	}}}
	return r
}

func (r *running) write(name, text string) {
	r.t.Helper()
	// Replaced, not written to: a reader sees the old file or the new one.
	path := filepath.Join(r.dir, name)
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		r.t.Fatal(err)
	}
}

// ask sends a request to the API, or with admin to the operator's socket.
func (r *running) ask(c *http.Client, method, path, body string, header ...string) (int, string, http.Header) {
	r.t.Helper()
	host := r.addr
	if c == r.admin {
		host = "admin"
	}
	req, err := http.NewRequestWithContext(r.t.Context(), method, "http://"+host+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.StatusCode, string(data), resp.Header
}

func (r *running) call(body string) string {
	r.t.Helper()
	_, out, _ := r.ask(http.DefaultClient, "POST", "/v1/tool", body)
	return out
}

func (r *running) toolNames() string {
	r.t.Helper()
	_, out, _ := r.ask(http.DefaultClient, "GET", "/v1/tools", "")
	var list struct{ Tools []struct{ Name string } }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		r.t.Fatal(err)
	}
	var names []string
	for _, t := range list.Tools {
		names = append(names, t.Name)
	}
	return strings.Join(names, " ")
}

// TestMetrics: every family that a node exposes of its own is in the table, has
// its type and its meaning on the page, and the page of the documentation is the
// table.
func TestMetrics(t *testing.T) {
	r := start(t, func(c *node.Config) {
		c.OTLP, c.Tools = "http://127.0.0.1:1/v1/logs", filepath.Join(filepath.Dir(c.Tools), "upstream.yaml")
		if err := os.WriteFile(c.Tools, []byte(tools+upstream(t)), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	if out := r.call(`{"kind":"tool.echo","params":{}}`); !strings.Contains(out, `"outcome":"ok"`) {
		t.Fatal(out)
	}
	_, plain, h := r.ask(http.DefaultClient, "GET", "/metrics", "")
	if ct := h.Get("Content-Type"); !strings.HasPrefix(ct, "text/plain; version=0.0.4") {
		t.Errorf("content type %q", ct)
	}
	exposed := map[string]bool{}
	for _, name := range node.Metrics.Families([]byte(plain)) {
		exposed[name] = true
	}
	for _, d := range node.Metrics {
		if !exposed[d.Name] {
			t.Errorf("%s is in the table and not exposed", d.Name)
		}
		if !strings.Contains(plain, "# TYPE "+d.Name+" "+d.Type+"\n") {
			t.Errorf("%s has no TYPE %s", d.Name, d.Type)
		}
		if (d.Type == "counter") != strings.HasSuffix(d.Name, "_total") {
			t.Errorf("%s is a %s", d.Name, d.Type)
		}
		delete(exposed, d.Name)
	}
	for name := range exposed {
		if !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
			t.Errorf("%s is exposed and not in the table", name)
		}
	}
	_, open, h := r.ask(http.DefaultClient, "GET", "/metrics", "", "Accept", "application/openmetrics-text; version=1.0.0")
	if ct := h.Get("Content-Type"); !strings.HasPrefix(ct, "application/openmetrics-text") || !strings.HasSuffix(open, "# EOF\n") {
		t.Errorf("content type %q", ct)
	}
	if !regexp.MustCompile(`autonomy_node_call_seconds_bucket\{le="[^"]+"\} 1 # \{audit_id="[0-9a-f]{16}-0{15}[0-9a-f]"\} `).MatchString(open) {
		t.Errorf("no exemplar names the call:\n%.3000s", open)
	}

	page := metricsPage()
	if *update {
		if err := os.WriteFile("../docs/metrics.md", []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != page {
		t.Error("docs/metrics.md is not what the table says: go test ./node -run TestMetrics -update")
	}
}

func metricsPage() string {
	return `# Metrics of the node

Made from the table in the code (node/metrics.go, node/call/metrics.go); a test keeps it so. ` + "`GET /metrics`" + ` answers in the Prometheus text format, and in OpenMetrics to who asks for it (` + "`Accept: application/openmetrics-text`" + `): then the buckets of the histograms carry exemplars with the ` + "`audit_id`" + ` of a call that fell into them, for ` + "`GET /v1/calls/{audit_id}`" + `. Names, units and labels are stable. Beside these stand ` + "`go_…` and `process_…`" + `.

` + node.Metrics.Markdown()
}

// TestAdmin: what the operator's socket serves, that it is the operator's, and
// that the listener which agents reach has none of it.
func TestAdmin(t *testing.T) {
	var socket string
	r := start(t, func(c *node.Config) { socket, c.SlowCall = c.Admin, time.Hour })
	if info, err := os.Stat(socket); err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("the socket has mode %v, %v", info.Mode(), err)
	}
	for _, tc := range []struct {
		method, path string
		status       int
		want         string
	}{
		{"GET", "/v1/status", 200, `"node_id"`},
		{"GET", "/debug/pprof/", 200, "goroutine"},
		{"GET", "/debug/pprof/goroutine?debug=1", 200, "goroutine profile"},
		{"GET", "/debug/pprof/heap", 200, ""},
		{"GET", "/debug/pprof/cmdline", 404, ""},
		{"GET", "/debug/flight", 200, "go 1."},
		{"POST", "/v1/reload", 200, `"tools":1`},
		{"GET", "/v1/reload", 405, ""},
		{"POST", "/v1/export/resume", 409, "no_export"},
		{"POST", "/v1/tool", 404, ""},
	} {
		if status, body, _ := r.ask(r.admin, tc.method, tc.path, ""); status != tc.status || !strings.Contains(body, tc.want) {
			t.Errorf("%s %s: %d %.200q, want %d with %q", tc.method, tc.path, status, body, tc.status, tc.want)
		}
	}
	for _, path := range []string{"/debug/pprof/", "/debug/flight", "/v1/reload", "/v1/export/resume"} {
		for _, method := range []string{"GET", "POST"} {
			if status, body, _ := r.ask(http.DefaultClient, method, path, ""); status != 404 {
				t.Errorf("agents reach %s %s: %d %.200s", method, path, status, body)
			}
		}
	}
	r.write("tools.yaml", "tools:\n  tool.ecko: {}\n")
	if status, body, _ := r.ask(r.admin, "POST", "/v1/reload", ""); status != 422 || !strings.Contains(body, "tools.yaml:2") {
		t.Errorf("a broken file: %d %s", status, body)
	}
	if got := r.toolNames(); got != "tool.echo" {
		t.Errorf("after a refused reload the tools are %q", got)
	}
}

// TestFileWatch: a changed tools file comes into force without anybody asking; a
// broken one changes nothing, and the next good one does.
func TestFileWatch(t *testing.T) {
	r := start(t, nil)
	files := t.TempDir()
	have := func(want string) {
		t.Helper()
		testutil.Eventually(t, 20*time.Second, "tools "+want, func() error {
			if got := r.toolNames(); got != want {
				return fmt.Errorf("have %s", got)
			}
			return nil
		})
	}
	r.write("tools.yaml", tools+"  tool.fs.read:\n    root: "+files+"\n")
	have("tool.echo tool.fs.read")
	r.write("tools.yaml", "tools:\n  tool.ecko: {}\n")
	testutil.Eventually(t, 20*time.Second, "the refusal", func() error {
		if !strings.Contains(r.logs.String(), "reload refused") {
			return errors.New(r.logs.String())
		}
		return nil
	})
	have("tool.echo tool.fs.read")
	r.write("tools.yaml", tools)
	have("tool.echo")
}

// TestUpstreamReload: a reload starts what the file names, shows it over MCP too,
// forgives restarts, and a refused one leaves all as it is.
func TestUpstreamReload(t *testing.T) {
	restarts := ""
	r := start(t, func(c *node.Config) {
		restarts = filepath.Join(c.StateDir, "mcp-restarts.json")
		if err := errors.Join(os.MkdirAll(c.StateDir, 0o700), os.WriteFile(restarts, []byte(`{"up":1000}`), 0o600)); err != nil {
			t.Fatal(err)
		}
	})
	reload := func(file string, status int) {
		t.Helper()
		r.write("tools.yaml", file)
		if got, body, _ := r.ask(r.admin, "POST", "/v1/reload", ""); got != status {
			t.Fatalf("reload: %d %s", got, body)
		}
	}
	list := func() string {
		t.Helper()
		_, out, _ := r.ask(http.DefaultClient, "POST", "/mcp", `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"t","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}}}`,
			"Content-Type", "application/json", "Accept", "application/json, text/event-stream", "Mcp-Protocol-Version", "2026-07-28", "Mcp-Method", "tools/list")
		var list struct {
			Result struct{ Tools []struct{ Name string } }
		}
		if err := json.Unmarshal([]byte(out), &list); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		var names []string
		for _, tl := range list.Result.Tools {
			names = append(names, tl.Name)
		}
		return strings.Join(names, " ")
	}
	reload(tools, 200)
	if data, err := os.ReadFile(restarts); err != nil || strings.Contains(string(data), "up") {
		t.Errorf("restarts after a reload: %s, %v", data, err)
	}
	const both = "tool.echo tool.mcp.up.echo"
	reload(tools+upstream(t), 200)
	if got := list(); got != both {
		t.Errorf("over MCP there are %q", got)
	}
	if _, status, _ := r.ask(http.DefaultClient, "GET", "/v1/status", ""); !strings.Contains(status, `"server":"up","links":1`) {
		t.Errorf("no upstream in %s", status)
	}
	reload(tools+"mcp:\n  up:\n    argv: [/bin/false]\n    tools: {echo: {}}\n", 422)
	if got := list(); got != both {
		t.Errorf("after a refused reload there are %q", got)
	}
	reload(tools, 200)
	if got := list(); got != "tool.echo" {
		t.Errorf("without the upstream there are %q", got)
	}
}

// TestWideEvent: --log-calls logs one line with what is known of a call, and
// neither its params nor its output.
func TestWideEvent(t *testing.T) {
	r := start(t, func(c *node.Config) { c.LogCalls = 1 })
	r.call(`{"kind":"tool.echo","params":{"secret":"hunter2"},"session":"s-9"}`)
	r.call(`{"kind":"tool.http_get","params":{"endpoint":"x"}}`) // no such tool here: not a call of the log
	line := ""
	for l := range strings.Lines(r.logs.String()) {
		if strings.Contains(l, "msg=call ") && strings.Contains(l, "session=s-9") {
			line = l
		}
	}
	for _, want := range []string{"audit_id=", "kind=tool.echo", "caller_type=anonymous", "decision=allow", "outcome=ok", "status=200", "policy_ref=q@1.0.0", "total_us=", "durable_us=", "params_bytes=20"} {
		if !strings.Contains(line, want) {
			t.Errorf("no %s in %q", want, line)
		}
	}
	if strings.Contains(r.logs.String(), "hunter2") {
		t.Error("params are in the log")
	}
}

// TestSlowCall: a slow call leaves a file for "go tool trace", and a line.
func TestSlowCall(t *testing.T) {
	var state string
	r := start(t, func(c *node.Config) { state, c.SlowCall = c.StateDir, time.Nanosecond })
	out := r.call(`{"kind":"tool.echo","params":{}}`)
	var a struct {
		AuditID string `json:"audit_id"`
	}
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 20*time.Second, "the file", func() error {
		found, err := filepath.Glob(filepath.Join(state, "flight", "*-"+a.AuditID+".trace"))
		if err != nil || len(found) != 1 {
			return fmt.Errorf("%q, %v", found, err)
		}
		data, err := os.ReadFile(found[0])
		if err == nil && !bytes.HasPrefix(data, []byte("go 1.")) {
			err = fmt.Errorf("it begins with %q", data[:min(16, len(data))])
		}
		return err
	})
	if !strings.Contains(r.logs.String(), "slow=true") {
		t.Errorf("no slow call in the log:\n%s", r.logs)
	}
}
