// Package mcp_test runs autonomy-node as a process against what others wrote
// for the Model Context Protocol: its conformance suite, its official
// TypeScript clients (of both generations), and its Go client over stdio.
package mcp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	"go.yaml.in/yaml/v3"

	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/internal/testutil/mcpserver"
	"github.com/autonomyops/autonomy/prepared"
)

func TestMain(m *testing.M) {
	mcpserver.Main()
	testutil.Main(m)
}

// fixtures are the upstream's tools under the names that the suite calls.
var fixtures = []string{"test_simple_text", "test_image_content", "test_audio_content", "test_embedded_resource",
	"test_multiple_content_types", "test_error_handling", "test_tool_with_progress", "test_streaming_elicitation",
	"test_logging_tool", "json_schema_2020_12_tool", "test_x_mcp_header"}

const policy = `package autonomy
import rego.v2

decision := {"allow": true} if startswith(input.kind, "tool.mcp.up.")
decision := {"allow": true} if input.kind in {"tool.echo", "tool.exec.wait"}
decision := {"allow": false, "reasons": [{"code": "not_here", "message": "dates are secret"}]} if input.kind == "tool.exec.date"
`

// profile is a running node with the fixture profile.
type profile struct {
	*testutil.Process
	url    string // http://ADDR/mcp
	socket string
	dir    string // of the upstream's notes
}

func start(t *testing.T) *profile {
	t.Helper()
	tools := "      wait: {}\n"
	for _, f := range fixtures {
		tools += fmt.Sprintf("      %s: {mcp_name: %s}\n", f, f)
	}
	return startWith(t, "good", tools)
}

// startWith has the fixture in a mode as server "up", and of its tools those.
func startWith(t *testing.T, mode, upstreamTools string) *profile {
	t.Helper()
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &profile{socket: filepath.Join(dir, "s"), dir: dir}
	tools := fmt.Sprintf("tools:\n  tool.echo: {}\n  tool.exec.wait: {argv: [/bin/sleep, \"60\"], timeout: 60s}\n  tool.exec.date: {argv: [/bin/date]}\n"+
		"mcp:\n  up:\n    argv: [%q]\n    env: [%q, %q]\n    tools:\n%s", exe, mcpserver.Env+"="+mode, mcpserver.Dir+"="+dir, upstreamTools)
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	rego := write("policy/p.rego", []byte(policy))
	bundle, err := prepared.BuildBundle(filepath.Dir(rego), prepared.BuildOptions{Name: "t", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	p.Process = testutil.Command{Path: testutil.Build(t, "autonomy-node"), Args: []string{
		"--listen=127.0.0.1:0", "--listen=unix:" + p.socket, "--state-dir=" + filepath.Join(dir, "state"), "--durability=batched",
		"--wal-max-bytes=16MiB", "--wal-segment-bytes=4MiB", "--keep-free=0", "--heartbeat-interval=0", "--shutdown-timeout=500ms",
		"--policy=" + write("bundle.tar.gz", bundle), "--tools=" + write("tools.yaml", []byte(tools)),
	}}.Start(t)
	p.url = "http://" + p.Addrs(t, 2)[0] + "/mcp"
	return p
}

// modules is the folder with what package-lock.json names.
func modules(t *testing.T) string {
	t.Helper()
	dir := testutil.NodeModules("internal/e2e/mcp")
	if dir == "" {
		testutil.Missing(t, "the npm packages of internal/e2e/mcp", "scripts/setup-test.sh")
	}
	return dir
}

// script is a command that runs one with the node of the packages.
func script(ctx context.Context, modules string, args ...string) *exec.Cmd {
	arch := map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]
	cmd := exec.CommandContext(ctx, filepath.Join(modules, "node-linux-"+arch, "bin/node"), args...)
	cmd.WaitDelay = time.Second
	return cmd
}

// gap is one entry of expected-failures.yaml.
type gap struct {
	Reason    string              `yaml:"reason"`
	Scenarios map[string][]string `yaml:"scenarios"` // scenario → checks that fail; "*": any of them
}

// TestConformance runs what each revision requires of a server. A check that
// fails and is not in expected-failures.yaml is a failure here, and so is an
// entry there that no run needs any more.
func TestConformance(t *testing.T) {
	dir := modules(t)
	data, err := os.ReadFile("expected-failures.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var gaps []gap
	if err := yaml.Unmarshal(data, &gaps); err != nil {
		t.Fatal(err)
	}
	needed := map[string]bool{} // scenario/check → seen to fail
	for _, g := range gaps {
		if g.Reason == "" {
			t.Errorf("no reason for %v", g.Scenarios)
		}
		for scenario, checks := range g.Scenarios {
			for _, c := range checks {
				needed[scenario+"/"+c] = false
			}
		}
	}
	for _, revision := range []string{"2026-07-28", "2025-11-25"} {
		t.Run(revision, func(t *testing.T) {
			p := start(t)
			results := t.TempDir()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			out, err := script(ctx, dir, filepath.Join(dir, "@modelcontextprotocol/conformance/dist/index.js"),
				"server", "--url", p.url, "--requirements", revision, "-o", results).CombinedOutput()
			var exit *exec.ExitError
			if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
				t.Fatalf("%v\n%s", err, out)
			}
			planned := regexp.MustCompile(`\((\d+) scenarios\)`).FindSubmatch(out)
			files, err := filepath.Glob(filepath.Join(results, "server-*", "checks.json"))
			if err != nil || planned == nil || fmt.Sprint(len(files)) != string(planned[1]) {
				t.Fatalf("%v, %d results for %s scenarios\n%s", err, len(files), planned, out)
			}
			passed, expected := 0, 0
			for _, f := range files {
				scenario := regexp.MustCompile(`^server-(.*)-\d{4}-\d\d-\d\dT`).FindStringSubmatch(filepath.Base(filepath.Dir(f)))[1]
				for _, c := range checks(t, f) {
					key, all := scenario+"/"+c.ID, scenario+"/*"
					switch {
					case c.Status == "SUCCESS":
						passed++
					case c.Status != "FAILURE":
					case has(needed, key) || has(needed, all):
						expected++
					default:
						t.Errorf("%s: %s: %s", scenario, c.ID, c.ErrorMessage)
					}
				}
			}
			t.Logf("%d scenarios: %d checks passed, %d expected failures", len(files), passed, expected)
		})
	}
	for key, failed := range needed {
		if !failed && !t.Failed() {
			t.Errorf("%s is expected to fail and does not: take it out of expected-failures.yaml", key)
		}
	}
}

// has reports whether key is there, and marks it.
func has(m map[string]bool, key string) bool {
	_, ok := m[key]
	if ok {
		m[key] = true
	}
	return ok
}

type check struct {
	ID           string `json:"id"`
	Status       string `json:"status"`
	ErrorMessage string `json:"errorMessage"`
}

func checks(t *testing.T, path string) []check {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []check
	if err := json.Unmarshal(data, &out); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return out
}

// TestTypeScriptClients: the official clients of both generations list, call,
// are denied, hear progress and cancel, over HTTP and through "autonomy-node mcp".
func TestTypeScriptClients(t *testing.T) {
	dir := modules(t)
	for _, generation := range []string{"old", "new"} {
		for _, transport := range []string{"http", "stdio"} {
			t.Run(generation+" "+transport, func(t *testing.T) {
				p := start(t)
				args := []string{"client.mjs", dir, generation, p.url}
				if transport == "stdio" {
					args = []string{"client.mjs", dir, generation, "stdio", testutil.Build(t, "autonomy-node"), "mcp", "--socket=" + p.socket}
				}
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
				defer cancel()
				cmd := script(ctx, dir, args...)
				cmd.Env = append(os.Environ(), "NOTES="+p.dir)
				var stderr strings.Builder
				cmd.Stderr = &stderr
				out, err := cmd.Output()
				if err != nil {
					t.Fatalf("%v\n%s%s", err, out, stderr.String())
				}
				var seen pass
				if err := json.Unmarshal(out, &seen); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				seen.check(t)
			})
		}
	}
}

// pass is what client.mjs saw, and goClient.
type pass struct {
	Tools     []string  `json:"tools"`
	Echo      result    `json:"echo"`
	Denied    result    `json:"denied"`
	Image     string    `json:"image"`
	Progress  []float64 `json:"progress"`
	Cancelled string    `json:"cancelled"`
	After     bool      `json:"after"` // isError of a call after the cancelled one
}

type result struct {
	IsError    bool                    `json:"isError"`
	Content    []struct{ Text string } `json:"content"`
	Structured map[string]any          `json:"structuredContent"`
	Meta       map[string]any          `json:"_meta"`
}

func (s *pass) check(t *testing.T) {
	t.Helper()
	for _, name := range []string{"tool.echo", "tool.exec.date", "tool.mcp.up.wait", "test_image_content"} {
		if !slices.Contains(s.Tools, name) {
			t.Errorf("no %s in %v", name, s.Tools)
		}
	}
	if s.Echo.IsError || fmt.Sprint(s.Echo.Structured) != "map[a:[1 é]]" || s.Echo.Meta["io.github.autonomyops/audit_id"] == nil {
		t.Errorf("echo gave %+v", s.Echo)
	}
	if !s.Denied.IsError || len(s.Denied.Content) != 1 || !strings.Contains(s.Denied.Content[0].Text, "denied by policy: dates are secret") ||
		!strings.Contains(s.Denied.Content[0].Text, "audit_id") || s.Denied.Structured["decision"] != "deny" {
		t.Errorf("the denied call gave %+v", s.Denied)
	}
	if s.Image != "image/png" || fmt.Sprint(s.Progress) != "[0 50 100]" || s.Cancelled != "cancelled" || s.After {
		t.Errorf("%+v", s)
	}
}

// TestGoClientOverStdio is the same pass with the official Go client, which
// starts "autonomy-node mcp" as its configuration would.
func TestGoClientOverStdio(t *testing.T) {
	for _, revision := range []string{"2026-07-28", "2025-11-25"} {
		t.Run(revision, func(t *testing.T) {
			p := start(t)
			var s pass
			var mu sync.Mutex
			c := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "1"}, &mcp.ClientOptions{
				ProgressNotificationHandler: func(_ context.Context, r *mcp.ProgressNotificationClientRequest) {
					mu.Lock()
					defer mu.Unlock()
					s.Progress = append(s.Progress, r.Params.Progress)
				}})
			cs, err := c.Connect(t.Context(), &mcp.CommandTransport{Command: exec.Command(testutil.Build(t, "autonomy-node"), "mcp", "--socket", p.socket)},
				&mcp.ClientSessionOptions{ProtocolVersion: revision})
			if err != nil {
				t.Fatal(err)
			}
			defer cs.Close()
			list, err := cs.ListTools(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, tl := range list.Tools {
				s.Tools = append(s.Tools, tl.Name)
			}
			call := func(ctx context.Context, name string, args any) (*mcp.CallToolResult, error) {
				params := &mcp.CallToolParams{Name: name, Arguments: args}
				params.SetProgressToken("p")
				return cs.CallTool(ctx, params)
			}
			into := func(r *result, name string, args any) *mcp.CallToolResult {
				res, err := call(t.Context(), name, args)
				if err != nil {
					t.Fatal(err)
				}
				data, err := json.Marshal(res)
				if err != nil {
					t.Fatal(err)
				}
				if err := json.Unmarshal(data, r); err != nil {
					t.Fatal(err)
				}
				return res
			}
			into(&s.Echo, "tool.echo", map[string]any{"a": []any{1, "é"}})
			into(&s.Denied, "tool.exec.date", map[string]any{})
			if image, ok := into(new(result), "test_image_content", map[string]any{}).Content[0].(*mcp.ImageContent); ok {
				s.Image = image.MIMEType
			}
			into(new(result), "test_tool_with_progress", map[string]any{})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() {
				_, err := call(ctx, "tool.mcp.up.wait", map[string]any{})
				done <- err
			}()
			p.await(t, "waiting")
			cancel()
			if err := <-done; errors.Is(err, context.Canceled) {
				s.Cancelled = "cancelled"
			}
			p.await(t, "cancelled")
			s.After = into(new(result), "tool.echo", map[string]any{}).IsError
			mu.Lock()
			defer mu.Unlock()
			s.check(t)
		})
	}
}

// await waits for a note of the upstream.
func (p *profile) await(t *testing.T, note string) {
	t.Helper()
	for end := time.Now().Add(testutil.Timeout); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(p.dir, note)); err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the upstream did not note %q", note)
		}
	}
}

// TestStopInMidCall: a node that is told to stop cancels what outlasts its
// patience, upstream too, ends its sessions and streams, and exits 0.
func TestStopInMidCall(t *testing.T) {
	for _, revision := range []string{"2026-07-28", "2025-11-25"} {
		t.Run(revision, func(t *testing.T) {
			p := start(t)
			c := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "1"}, &mcp.ClientOptions{
				ToolListChangedHandler: func(context.Context, *mcp.ToolListChangedRequest) {}}) // so a stream is open
			cs, err := c.Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: p.url, MaxRetries: -1}, &mcp.ClientSessionOptions{ProtocolVersion: revision})
			if err != nil {
				t.Fatal(err)
			}
			defer cs.Close()
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = cs.CallTool(t.Context(), &mcp.CallToolParams{Name: "tool.mcp.up.wait"}) // its node goes away
			}()
			p.await(t, "waiting")
			if code := p.Stop(t); code != 0 {
				t.Errorf("exit code %d", code)
			}
			p.await(t, "cancelled")
			<-done
		})
	}
}

// TestStdioWithoutNode: a client's user reads what is wrong and what to do.
func TestStdioWithoutNode(t *testing.T) {
	cmd := exec.Command(testutil.Build(t, "autonomy-node"), "mcp", "--socket=/nonexistent/s")
	cmd.Stdin = strings.NewReader("")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 5 || !strings.Contains(string(out), "no node at /nonexistent/s") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestKilledNodeLeavesNoUpstream: a node that is killed takes its upstream
// servers with it.
func TestKilledNodeLeavesNoUpstream(t *testing.T) {
	p := start(t)
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	var children []byte
	for _, f := range tasks {
		more, err := os.ReadFile(f)
		if err == nil {
			children = append(append(children, ' '), more...)
		}
	}
	pids := slices.Compact(slices.Sorted(slices.Values(strings.Fields(string(children)))))
	if len(pids) != 1 {
		t.Fatalf("the node has children %v, want its one upstream", pids)
	}
	p.Kill(t)
	for end := time.Now().Add(testutil.Timeout); ; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + pids[0] + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the upstream lives on: %s", stat)
		}
	}
}

// TestOperatorAccepts: a tool that comes back as another is refused, shown in
// the status, and taken again when the operator reloads the tools.
func TestOperatorAccepts(t *testing.T) {
	p := startWith(t, "swap-quiet", "      t: {}\n")
	base := strings.TrimSuffix(p.url, "/mcp")
	digest := func() string {
		var list struct {
			Tools []struct {
				Name             string `json:"name"`
				DefinitionDigest string `json:"definition_digest"`
			} `json:"tools"`
		}
		ask(t, http.MethodGet, base+"/v1/tools", "", &list)
		for _, tl := range list.Tools {
			if tl.Name == "tool.mcp.up.t" {
				return tl.DefinitionDigest
			}
		}
		return ""
	}
	code := func() string {
		var a struct {
			Layer   string                  `json:"layer"`
			Reasons []struct{ Code string } `json:"reasons"`
			Error   struct{ Code string }   `json:"error"`
		}
		ask(t, http.MethodPost, base+"/v1/tool", `{"kind":"tool.mcp.up.t"}`, &a)
		if len(a.Reasons) > 0 {
			return a.Layer + " " + a.Reasons[0].Code
		}
		return a.Error.Code
	}
	until := func(want string) {
		t.Helper()
		for end := time.Now().Add(testutil.Timeout); ; time.Sleep(20 * time.Millisecond) {
			got := code()
			if got == want {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("the call gives %q, want %q", got, want)
			}
		}
	}
	first := digest()
	until("upstream_lost") // its first process ends in its first call
	until("runtime definition_changed")
	if digest() != first {
		t.Error("another digest is shown before the operator has accepted it")
	}
	var st struct {
		Upstreams []struct {
			Server   string   `json:"server"`
			Restarts int      `json:"restarts"`
			Changed  []string `json:"changed"`
		} `json:"upstreams"`
	}
	ask(t, http.MethodGet, base+"/v1/status", "", &st)
	if len(st.Upstreams) != 1 || st.Upstreams[0].Restarts == 0 || fmt.Sprint(st.Upstreams[0].Changed) != "[t]" {
		t.Errorf("status says %+v", st)
	}
	p.Signal(syscall.SIGHUP)
	until("upstream_lost") // so the call was let through
	if digest() == first {
		t.Error("the digest that was accepted is not shown")
	}
}

// ask reads a JSON document from the node.
func ask(t *testing.T, method, url, body string, into any) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		t.Fatal(err)
	}
}
