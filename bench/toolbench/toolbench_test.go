package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/bench/internal/results"
)

// TestMain makes the test binary its own peers: it is started as the node, as
// OPA and as the ceiling with the arguments that those get.
func TestMain(m *testing.M) {
	var err error
	switch arg := append(os.Args, "")[1]; arg {
	case ceilingCommand:
		err = serveCeiling()
	case "--version":
		fmt.Println("autonomy-node 1.2.3")
	case "--listen":
		err = fakeNode(os.Args[1:])
	case "run":
		err = fakeOPA(os.Args[2:])
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func fakeNode(args []string) error {
	fs := flag.NewFlagSet("node", flag.ContinueOnError)
	listen, ready := fs.String("listen", "", ""), fs.String("ready-file", "", "")
	policy := fs.String("policy", "", "")
	durability := fs.String("durability", "", "")
	for _, name := range []string{"state-dir", "tools", "wal-max-bytes", "wal-segment-bytes"} {
		fs.String(name, "", "")
	}
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *policy == "broken" {
		return fmt.Errorf("bundle %s is broken", *policy)
	}
	ln, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	if err := os.WriteFile(*ready, fmt.Appendf(nil, "addr=%s\npid=%d\n", ln.Addr(), os.Getpid()), 0o600); err != nil {
		return err
	}
	if *durability != "strict" && *durability != "batched" {
		return fmt.Errorf("durability %q", *durability)
	}
	var records atomic.Int64
	return http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/metrics" {
			n := records.Load()
			fmt.Fprintf(w, "# HELP x\nautonomy_node_wal_syncs_total %d\nautonomy_node_wal_synced_records_total %d\n", n/4, n)
			return
		}
		records.Add(1)
		body, err := io.ReadAll(r.Body)
		at := slices.IndexFunc(calls, func(c call) bool { return c.node == string(body) })
		if err != nil || r.URL.Path != "/v1/tool" || at < 0 {
			http.Error(w, "wrong request", http.StatusBadRequest)
			return
		}
		if *policy == "refusing" {
			w.WriteHeader(http.StatusServiceUnavailable)
			io.WriteString(w, `{"decision":"deny","layer":"audit","reason":"the log is full"}`)
			return
		}
		if calls[at].name == "deny" {
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, `{"decision":"deny","layer":"policy"}`)
			return
		}
		io.WriteString(w, `{"decision":"allow","outcome":"ok"}`)
	}))
}

func fakeOPA(args []string) error {
	fs := flag.NewFlagSet("opa", flag.ContinueOnError)
	addr := fs.String("addr", "", "")
	fs.Bool("server", false, "")
	fs.Bool("skip-version-check", false, "")
	fs.String("log-level", "", "")
	fs.String("bundle", "", "")
	set := fs.String("set", "", "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *set != "decision_logs.console=true" {
		return fmt.Errorf("OPA must log its decisions: --set %q", *set)
	}
	return http.ListenAndServe(*addr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var in struct{ Input struct{ Kind string } }
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil || r.URL.Path != "/v1/data/autonomy/decision" || in.Input.Kind == "" {
			http.Error(w, "wrong request", http.StatusBadRequest)
			return
		}
		fmt.Fprintf(w, `{"result":{"allow":%v}}`, in.Input.Kind == "tool.echo")
	}))
}

func arguments(t *testing.T, policy string) (args []string, out string) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out = filepath.Join(t.TempDir(), "results")
	return []string{"-node", self, "-opa", self, "-bundle", policy, "-work", t.TempDir(), "-out", out,
		"-duration", "60ms", "-warmup", "10ms", "-reps", "3", "-conns", "1,64"}, out
}

// TestRun measures the fakes and reads what was written.
func TestRun(t *testing.T) {
	args, out := arguments(t, "good")
	var stdout bytes.Buffer
	if err := run(t.Context(), args, &stdout); err != nil {
		t.Fatalf("%v\n%s", err, stdout.String())
	}
	data, err := os.ReadFile(filepath.Join(out, "latest.json"))
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var rows []results.Row
	if err := dec.Decode(&rows); err != nil {
		t.Fatal(err)
	}
	// With each number of connections: two throughputs of each call and two CPU
	// figures of each durability; with 1: p50 of each call; with 64: throughput
	// and p99 of each. Then start and size.
	targets := 2*(2*len(calls)+4) + len(calls) + 2*len(calls) + 2
	if want := targets + 2*len(calls)*len(metrics)*len(peers); len(rows) != want {
		t.Fatalf("%d rows, want %d", len(rows), want)
	}
	for i, r := range rows {
		if r.Area != "tool-call" || r.Ours < 0 || r.Value < 0 || (r.Target != nil) != (i < targets) || (r.Met != nil) != (i < targets) {
			t.Errorf("row %d: %+v", i, r)
		}
		if r.Unit == "calls/s" && (r.Ours < 10 || r.Value < 10 || r.Ratio == 0) {
			t.Errorf("no throughput in %+v", r)
		}
	}
	for _, k := range []string{`"area"`, `"name"`, `"ours"`, `"peer"`, `"peer_value"`, `"ratio"`, `"unit"`, `"target"`, `"met"`} {
		if bytes.Count(data, []byte(k)) != len(rows) {
			t.Errorf("key %s is not in every row", k)
		}
	}
	page, err := os.ReadFile(filepath.Join(out, "latest.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"3 repetitions of 60ms", "autonomy-node 1.2.3", "Linux ", "| echo | 64 | opa | ", "one fdatasync", "| 15 µs | 15 |"} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page does not say %q:\n%s", want, page)
		}
	}
	// The first repetition goes one way, the second the other.
	order := ""
	for line := range strings.Lines(stdout.String()) {
		if strings.Contains(line, "echo    1 conns") {
			order += strings.Fields(line)[1][:1] + strings.Fields(line)[2][:1]
		}
	}
	if forth, back := "asaboefe", "feoeabas"; order != forth+back+forth {
		t.Errorf("sides were measured in the order %s", order)
	}
}

// A server that refuses calls, or does not start, ends the run: its figures
// would be those of another program.
func TestRunRefuses(t *testing.T) {
	for policy, want := range map[string]string{
		"refusing": "autonomy, strict, echo, 1 connections, repetition 1: unexpected answer: HTTP/1.1 503 Service Unavailable\n" + `{"decision":"deny","layer":"audit","reason":"the log is full"}`,
		"broken":   "it ended; it wrote:\nbundle broken is broken",
	} {
		t.Run(policy, func(t *testing.T) {
			args, out := arguments(t, policy)
			err := run(t.Context(), args, io.Discard)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got  %v\nwant %s", err, want)
			}
			if _, err := os.Stat(out); err == nil {
				t.Error("results were written")
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"-conns", "1,x"}, "-conns 1,x: want numbers"},
		{[]string{"-conns", "0"}, "-conns 0: want numbers"},
		{[]string{"extra"}, `unknown argument "extra"`},
		{nil, "-opa and -bundle are needed"},
		{[]string{"-opa", "a", "-bundle", "b", "-reps", "0"}, "must be positive"},
		{[]string{"-opa", "a", "-bundle", "b", "-duration", "0s"}, "must be positive"},
	} {
		if _, err := parse(tt.args); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("parse(%q) = %v, want %s", tt.args, err, tt.want)
		}
	}
}

// TestAnswers gives the client answers that are cut, too long or not of the
// kind it reads.
func TestAnswers(t *testing.T) {
	for _, tt := range []struct{ name, answer, want string }{
		{"good", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", ""},
		{"cut status", "HTTP/1.1 2", "read the status line: EOF"},
		{"cut headers", "HTTP/1.1 200 OK\r\nA: b\r\n", "read the headers: EOF"},
		{"cut body", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", "read the body: unexpected EOF"},
		{"chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "HTTP/1.1 200 OK without Content-Length"},
		{"huge", "HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n", `Content-Length " 1048577"`},
		{"negative", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", `Content-Length " -1"`},
		{"other status", "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nok", "unexpected answer: HTTP/1.1 404 Not Found\nok"},
		{"other body", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno", "unexpected answer: HTTP/1.1 200 OK\nno"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					buf := make([]byte, 16)
					for {
						if _, err := c.Read(buf); err != nil {
							break
						}
						io.WriteString(c, tt.answer)
						if tt.want != "" {
							break
						}
					}
					c.Close()
				}
			}()
			srv := &server{addr: ln.Addr().String(), pid: os.Getpid()}
			l, err := load(t.Context(), srv, []byte("0123456789abcdef"), "200", "ok", 1, 0, 20*time.Millisecond)
			switch {
			case tt.want == "" && (err != nil || l.calls == 0):
				t.Errorf("%d calls, %v", l.calls, err)
			case tt.want != "" && (err == nil || err.Error() != tt.want):
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

// TestCPUTime burns CPU and expects to see it.
func TestCPUTime(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; {
		now, err := cpuTime(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if now-before >= 50*time.Millisecond {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v of CPU in 5 s of work", now-before)
		}
	}
}
