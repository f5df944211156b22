package mcptool

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/internal/testutil/mcpserver"
	"github.com/autonomyops/autonomy/node/tool/executor"
	"github.com/autonomyops/autonomy/node/tool/httptool"
)

func TestMain(m *testing.M) {
	mcpserver.Main()
	goleak.VerifyTestMain(m)
}

// logs keeps what is logged.
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

// program is the configuration of the fixture in a mode.
func program(t *testing.T, mode string) (Config, string, *logs) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	out := &logs{}
	return Config{Name: "up", Argv: []string{exe}, Env: []string{mcpserver.Env + "=" + mode, mcpserver.Dir + "=" + dir},
		StartTimeout: testutil.Timeout, Logger: slog.New(slog.NewTextHandler(out, nil))}, dir, out
}

func open(t *testing.T, c Config) *Server {
	t.Helper()
	s, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func do(ctx context.Context, s *Server, name, params string) executor.Result {
	return s.Tool(name).Execute(ctx, &executor.Request{Params: []byte(params)})
}

// words is the text of a result's content.
func words(t *testing.T, r executor.Result) string {
	t.Helper()
	var out struct {
		Content []struct{ Text string } `json:"content"`
	}
	if err := json.Unmarshal(r.Output, &out); err != nil {
		t.Fatalf("%+v: %v", r, err)
	}
	var b strings.Builder
	for _, c := range out.Content {
		b.WriteString(c.Text)
	}
	return b.String()
}

func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(testutil.Timeout); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not come", what)
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func TestDefinitions(t *testing.T) {
	c, _, _ := program(t, "good")
	s := open(t, c)
	defs := s.Definitions()
	if len(defs) < 10 {
		t.Fatalf("%d definitions", len(defs))
	}
	again := open(t, c).Definitions()
	for i, d := range defs {
		if !strings.HasPrefix(d.Digest, "sha256:") || d.Digest != again[i].Digest || d.Name != again[i].Name {
			t.Errorf("%s: digests %s and %s", d.Name, d.Digest, again[i].Digest)
		}
		if d.Description != "fixture "+d.Name {
			t.Errorf("%s: %q", d.Name, d.Description)
		}
	}
}

// TestDigestCoversEverything: whatever part of a definition changes, the digest does.
func TestDigestCoversEverything(t *testing.T) {
	base := func() *mcp.Tool {
		return &mcp.Tool{Name: "n", Title: "t", Description: "d", InputSchema: map[string]any{"type": "object", "b": 1, "a": 2},
			OutputSchema: map[string]any{"type": "object"}, Annotations: &mcp.ToolAnnotations{Title: "x"}}
	}
	seen := map[string]string{}
	for name, change := range map[string]func(*mcp.Tool){
		"nothing":     func(*mcp.Tool) {},
		"name":        func(t *mcp.Tool) { t.Name = "m" },
		"title":       func(t *mcp.Tool) { t.Title = "u" },
		"description": func(t *mcp.Tool) { t.Description = "e" },
		"input":       func(t *mcp.Tool) { t.InputSchema = map[string]any{"type": "object", "a": 2} },
		"output":      func(t *mcp.Tool) { t.OutputSchema = nil },
		"annotations": func(t *mcp.Tool) { t.Annotations.ReadOnlyHint = true },
	} {
		tool := base()
		change(tool)
		d, err := define(tool)
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[d.Digest]; ok {
			t.Errorf("%s and %s have one digest", name, other)
		}
		seen[d.Digest] = name
	}
	a, b := base(), base()
	b.InputSchema = json.RawMessage(`{ "a": 2, "type": "object", "b": 1.0 }`)
	da, errA := define(a)
	db, errB := define(b)
	if errA != nil || errB != nil || da.Digest != db.Digest {
		t.Errorf("spelling changes the digest: %v %v", errA, errB)
	}
}

func TestCall(t *testing.T) {
	t.Setenv("NODE_SECRET", "s")
	c, dir, _ := program(t, "good")
	c.Env = append(c.Env, "GIVEN=1")
	s := open(t, c)
	for name, tc := range map[string]struct {
		params  string
		outcome executor.Outcome
		code    string
		want    string // in the output
	}{
		"test_simple_text":            {"{}", executor.OK, "", "simple text response"},
		"test_image_content":          {"{}", executor.OK, "", `"mimeType":"image/png"`},
		"test_audio_content":          {"{}", executor.OK, "", `"mimeType":"audio/wav"`},
		"test_multiple_content_types": {"{}", executor.OK, "", "test://mixed-content-resource"},
		"test_error_handling":         {"{}", executor.Error, CodeTool, "intentionally"},
		"echo":                        {`{"a":"<é>","n":12345678901234567890}`, executor.OK, "", `12345678901234567890`},
		"environ":                     {"{}", executor.OK, "", fmt.Sprintf("%q in /", []string{mcpserver.Env + "=good", mcpserver.Dir + "=" + dir, "GIVEN=1"})},
	} {
		t.Run(name, func(t *testing.T) {
			r := do(t.Context(), s, name, tc.params)
			if r.Outcome != tc.outcome || r.Code != tc.code {
				t.Errorf("%s %s: %s", r.Outcome, r.Code, r.Message)
			}
			if got := words(t, r) + string(r.Output); !strings.Contains(got, tc.want) {
				t.Errorf("no %q in %s", tc.want, got)
			}
		})
	}
	r := s.Tool("meta").Execute(t.Context(), &executor.Request{Params: []byte("{}"), Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})
	if !strings.Contains(words(t, r), `"traceparent":"00-0af7`) {
		t.Errorf("traceparent was not passed on: %s", r.Output)
	}
}

func TestProgress(t *testing.T) {
	c, _, _ := program(t, "good")
	s := open(t, c)
	var got []executor.Progress
	r := s.Tool("test_tool_with_progress").Execute(t.Context(), &executor.Request{Params: []byte("{}"), Progress: func(p executor.Progress) { got = append(got, p) }})
	if r.Outcome != executor.OK || len(got) != 3 || got[1] != (executor.Progress{Done: 50, Total: 100, Message: "50 of 100"}) {
		t.Errorf("%+v, progress %v", r, got)
	}
}

func TestCancel(t *testing.T) {
	c, dir, _ := program(t, "good")
	s := open(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan executor.Result, 1)
	go func() { done <- do(ctx, s, "wait", "{}") }()
	await(t, "the call", func() bool { return exists(dir + "/waiting") })
	cancel()
	if r := <-done; r.Outcome != executor.Killed {
		t.Errorf("%+v", r)
	}
	await(t, "notifications/cancelled", func() bool { return exists(dir + "/cancelled") })
	if r := do(t.Context(), s, "echo", "{}"); r.Outcome != executor.OK {
		t.Errorf("after a cancelled call: %+v", r)
	}
	late, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if r := do(late, s, "wait", "{}"); r.Outcome != executor.Timeout {
		t.Errorf("%+v", r)
	}
}

// TestHostileStart: what an upstream does wrong while it starts is an error of
// the file, in time, and leaves no process.
func TestHostileStart(t *testing.T) {
	for mode, want := range map[string]string{
		"mute":         "no answer within start_timeout",
		"banner":       "connect",
		"exit-at-once": "connect",
		"endless-list": "more than 64 pages",
		"many-tools":   "more than 512 tools",
		"twice":        "listed twice",
		"big-schema":   "its definition has",
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			c, _, _ := program(t, mode)
			if mode == "mute" {
				c.StartTimeout = 300 * time.Millisecond
			}
			s, err := Open(t.Context(), c)
			if err == nil {
				s.Close()
				t.Fatal("it was taken")
			}
			if !strings.Contains(err.Error(), want) {
				t.Errorf("error %v, want one with %q", err, want)
			}
		})
	}
}

// TestHostileCall: what an upstream does wrong in a call ends that call, in a
// bounded time and with a code, and the next one works or says why not.
func TestHostileCall(t *testing.T) {
	for mode, tc := range map[string]struct {
		outcome executor.Outcome
		code    string
		words   string // of the output, or the message
	}{
		"huge":      {executor.Error, CodeLost, ""},
		"garbage":   {executor.Error, CodeLost, ""},
		"silent":    {executor.Timeout, "timeout", ""},
		"exit":      {executor.Error, CodeLost, "not known"},
		"duplicate": {executor.OK, "", "once"},
		"drip":      {executor.Timeout, "timeout", ""},
		"flood":     {executor.OK, "", "after the flood"},
		"ask":       {executor.OK, "", "error"},
		"utf8":      {executor.OK, "", "a\uFFFD"},
		"media":     {executor.Error, CodeContent, "text/html"},
		"unknown":   {executor.Error, CodeContent, "hologram"},
		"input":     {executor.Error, CodeInput, ""},
		"error":     {executor.Error, CodeUpstream, "not today"},
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			c, _, log := program(t, mode)
			s := open(t, c)
			limit := testutil.Timeout
			if tc.outcome == executor.Timeout {
				limit = 300 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			r := s.Tool("t").Execute(ctx, &executor.Request{Params: []byte("{}"), Progress: func(executor.Progress) {}})
			// A link may take longer to end than the call waits to see it end.
			late := tc.code == CodeLost && r.Code == CodeContent
			if r.Outcome != tc.outcome || r.Code != tc.code && !late {
				t.Fatalf("%s %s (%s), want %s %s", r.Outcome, r.Code, r.Message, tc.outcome, tc.code)
			}
			text := r.Message
			if r.Outcome == executor.OK {
				text = words(t, r)
			}
			if !strings.Contains(text, tc.words) && !late {
				t.Errorf("%q, want %q in it", text, tc.words)
			}
			if n := len(log.String()); n > 1<<20 {
				t.Errorf("%d bytes were logged", n)
			}
		})
	}
}

// TestSwap: a definition that changes while the server runs is refused from then
// on, and accepted by opening the server anew.
func TestSwap(t *testing.T) {
	c, _, log := program(t, "swap")
	s := open(t, c)
	if r := do(t.Context(), s, "t", "{}"); r.Outcome != executor.OK {
		t.Fatalf("%+v", r)
	}
	await(t, "the refusal", func() bool {
		r := do(t.Context(), s, "t", "{}")
		return r.Outcome == executor.Denied && r.Code == CodeChanged
	})
	if r := do(t.Context(), s, "t", "{}"); r.Code != CodeChanged {
		t.Errorf("refused once: %+v", r)
	}
	if n := strings.Count(log.String(), "changed a tool's definition"); n != 1 {
		t.Errorf("logged %d times", n)
	}
}

// TestSwapAcrossRestart: so is one that another process brings.
func TestSwapAcrossRestart(t *testing.T) {
	c, _, _ := program(t, "swap-quiet")
	s := open(t, c)
	if r := do(t.Context(), s, "t", "{}"); r.Code != CodeLost {
		t.Fatalf("%+v", r)
	}
	await(t, "the refusal", func() bool { return do(t.Context(), s, "t", "{}").Code == CodeChanged })
	if r := do(t.Context(), open(t, c), "t", "{}"); r.Code != CodeLost {
		t.Errorf("after it was accepted: %+v", r)
	}
}

// TestRestarts: they are counted on disk, end, and are not given back by a new
// Server, only by Reset.
func TestRestarts(t *testing.T) {
	c, dir, _ := program(t, "exit")
	path := filepath.Join(dir, "restarts.json")
	ledger := func() *Ledger {
		l, err := OpenLedger(path)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	c.Ledger, c.MaxRestarts = ledger(), 2
	s := open(t, c)
	lost := 0
	await(t, "the end of restarts", func() bool {
		r := do(t.Context(), s, "t", "{}")
		switch r.Code {
		case CodeLost:
			lost++
		case CodeDown:
			if !strings.Contains(r.Message, "started again in") && !strings.Contains(r.Message, "does not run") {
				t.Fatalf("%+v", r)
			}
		case CodeExhausted:
			return true
		default:
			t.Fatalf("%+v", r)
		}
		return false
	})
	if lost != 3 {
		t.Errorf("%d processes ended, want one and two restarts", lost)
	}
	s.Close()

	c.Ledger = ledger()
	s = open(t, c) // an operator's start is none of the restarts
	if r := do(t.Context(), s, "t", "{}"); r.Code != CodeLost {
		t.Errorf("%+v", r)
	}
	await(t, "the end of restarts", func() bool { return do(t.Context(), s, "t", "{}").Code == CodeExhausted })
	s.Close()

	c.Ledger = ledger()
	if err := c.Ledger.Reset(); err != nil {
		t.Fatal(err)
	}
	s = open(t, c)
	do(t.Context(), s, "t", "{}")
	await(t, "a restart", func() bool { return do(t.Context(), s, "t", "{}").Code == CodeLost })
}

func TestLedgerDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "l")
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenLedger(path); err == nil {
		t.Error("a damaged file was taken for an empty one")
	}
}

// TestNoProcessIsLeft: closing ends the whole process group, whatever it holds.
func TestNoProcessIsLeft(t *testing.T) {
	c, dir, _ := program(t, "family")
	s := open(t, c)
	data, err := os.ReadFile(dir + "/child")
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(string(data))
	if err != nil {
		t.Fatal(err)
	}
	if !alive(child) {
		t.Fatal("the child does not run")
	}
	s.Close()
	await(t, "the child's end", func() bool { return !alive(child) })
}

// alive tells a running process from none and from a zombie.
func alive(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	return syscall.Kill(pid, 0) == nil && !strings.HasPrefix(rest, "Z")
}

// TestPool: calls that wait occupy the processes evenly, and MaxCalls bounds them.
func TestPool(t *testing.T) {
	c, _, _ := program(t, "good")
	c.Processes, c.MaxCalls = 2, 3
	s := open(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { do(ctx, s, "wait", "{}") })
	}
	await(t, "three calls", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		a, b := s.slots[0], s.slots[1]
		return a.running+b.running == 3 && max(a.running, b.running) == 2 && a.link != nil && b.link != nil
	})
	late, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if r := do(late, s, "echo", "{}"); r.Outcome != executor.Timeout {
		t.Errorf("a fourth call: %+v", r)
	}
	cancel()
	wg.Wait()
	if r := do(t.Context(), s, "echo", "{}"); r.Outcome != executor.OK {
		t.Errorf("afterwards: %+v", r)
	}
}

// TestRetire: idle links end at once, a late call gets a new one.
func TestRetire(t *testing.T) {
	c, _, _ := program(t, "good")
	s := open(t, c)
	s.mu.Lock()
	l := s.slots[0].link
	s.mu.Unlock()
	s.Retire()
	<-l.dead
	if r := do(t.Context(), s, "echo", "{}"); r.Outcome != executor.OK {
		t.Errorf("a late call: %+v", r)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.slots[0].link != nil || s.restarts != 0 {
		t.Errorf("after the late call: link %v, %d restarts", s.slots[0].link, s.restarts)
	}
}

func TestConfig(t *testing.T) {
	for want, c := range map[string]Config{
		"either argv":   {},
		"absolute path": {Argv: []string{"sh"}},
		"processes":     {Argv: []string{"/x"}, Processes: 17},
		"max_calls":     {Argv: []string{"/x"}, MaxCalls: -1},
		"output_max":    {Argv: []string{"/x"}, OutputMax: 1 << 30},
		"protocol":      {Argv: []string{"/x"}, Protocol: "1999"},
		"env":           {Argv: []string{"/x"}, Env: []string{"=secret"}},
		"start_timeout": {Argv: []string{"/x"}, StartTimeout: time.Hour},
	} {
		if _, err := Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("error %v, want one about %s", err, want)
		}
	}
	c, _, _ := program(t, "good")
	c.Argv = []string{"/nonexistent/server"}
	if _, err := Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), "/nonexistent/server") {
		t.Errorf("%v", err)
	}
}

func TestUnenforceable(t *testing.T) {
	c, _, _ := program(t, "good")
	s := open(t, c)
	all := constraint.Constraints{MemoryMax: 1, CPUMax: "1", PidsMax: 1, Egress: []string{}, FS: []string{}, Env: []string{}}
	if got := s.Tool("echo").Unenforceable(all); got != "memory_max, cpu_max, pids_max, egress, fs, env" {
		t.Errorf("%q", got)
	}
}

// remoteServer serves the good fixture over HTTP.
func remoteServer(t *testing.T, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	good := mcpserver.Good()
	var h http.Handler = mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return good }, nil)
	if wrap != nil {
		h = wrap(h)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	return srv.URL + "/mcp"
}

func guard(t *testing.T, url string, private ...netip.Prefix) *httptool.Guard {
	t.Helper()
	g, err := httptool.NewGuard(url, private, nil)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

var loopback = netip.MustParsePrefix("127.0.0.0/8")

func TestRemote(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(mcpserver.Dir, dir) // the server is in this process
	var mu sync.Mutex
	tokens := map[string]int{}
	url := remoteServer(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			tokens[r.Header.Get("Authorization")]++
			mu.Unlock()
			h.ServeHTTP(w, r)
		})
	})
	quiet := slog.New(slog.DiscardHandler)
	if _, err := Open(t.Context(), Config{Name: "r", Remote: guard(t, url), Logger: quiet}); err == nil || !strings.Contains(err.Error(), "loopback") {
		t.Fatalf("an address inside was dialled: %v", err)
	}
	s := open(t, Config{Name: "r", Remote: guard(t, url, loopback), Header: map[string]string{"Authorization": "Bearer x"}, Logger: quiet})
	if r := do(t.Context(), s, "echo", `{"a":1}`); r.Outcome != executor.OK || !strings.Contains(string(r.Output), `"a":1`) {
		t.Errorf("%+v", r)
	}
	mu.Lock()
	if len(tokens) != 1 || tokens["Bearer x"] == 0 {
		t.Errorf("tokens seen: %v", tokens)
	}
	mu.Unlock()
	egress := func(list ...string) executor.Result {
		return s.Tool("echo").Execute(t.Context(), &executor.Request{Params: []byte("{}"), Constraints: constraint.Constraints{Egress: list}})
	}
	if r := egress("127.0.0.1"); r.Outcome != executor.OK {
		t.Errorf("%+v", r)
	}
	if r := egress("127.0.0.2"); r.Outcome != executor.Denied || r.Code != CodeEgress {
		t.Errorf("%+v", r)
	}
	late, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if r := do(late, s, "wait", "{}"); r.Outcome != executor.Timeout {
		t.Errorf("%+v", r)
	}
	await(t, "the cancellation", func() bool { return exists(dir + "/cancelled") })
}

// TestRemoteHostile: redirects are not followed, answers are bounded.
func TestRemoteHostile(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	for name, h := range map[string]http.HandlerFunc{
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.2:9/", http.StatusTemporaryRedirect)
		},
		"endless": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			for r.Context().Err() == nil {
				if _, err := w.Write(bytes.Repeat([]byte(" "), 64<<10)); err != nil {
					return
				}
			}
		},
		"endless event": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprint(w, "data: ")
			for r.Context().Err() == nil {
				if _, err := w.Write(bytes.Repeat([]byte(" "), 64<<10)); err != nil {
					return
				}
			}
		},
		"page": func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "<html>") },
	} {
		t.Run(name, func(t *testing.T) {
			url := remoteServer(t, func(http.Handler) http.Handler { return h })
			s, err := Open(t.Context(), Config{Name: "r", Remote: guard(t, url, loopback), Logger: quiet, StartTimeout: 5 * time.Second})
			if err == nil {
				s.Close()
				t.Fatal("it was taken")
			}
		})
	}
}
