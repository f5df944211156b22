package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"
)

// The sides, as the report names them.
const (
	sideStrict  = "autonomy, strict"
	sideBatched = "autonomy, batched"
	sideOPA     = "opa"
	sideCeiling = "fasthttp"
)

// A side is one of what is compared.
type side struct {
	name  string
	path  string                                         // of the request
	body  func(call) string                              // of the request
	start func(context.Context, string) (*server, error) // in an empty directory
	again func(context.Context, string) (*server, error) // in a directory that it was started in before; nil: it keeps nothing
}

func (s side) request(addr string, c call) []byte {
	body := s.body(c)
	return fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		s.path, addr, len(body), body)
}

// A call is one of those that are measured: what the node is sent, the input
// that it makes of it and that OPA is sent, and what must be in the answers.
type call struct {
	name   string
	node   string
	opa    string
	status map[string]string // by side, the answer's status
	expect map[string]string // by side, what it must hold
}

const opaRest = `,"caller":{"type":"anonymous","id":"loopback"},"agent":{"id":"","release":"","fingerprint":""},` +
	`"node":{"id":"bench","labels":{},"assurance":"reduced"},"time_ns":1767225600000000000}}`

// calls are the two that are measured: one that policy allows, whose tool does
// nothing, and one that policy denies.
var calls = []call{
	newCall("echo", `"kind":"tool.echo","params":{"message":"The quick brown fox jumps over the lazy dog."},"session":"bench"`,
		"200", `"outcome":"ok"`, `"allow":true`),
	newCall("deny", `"kind":"tool.http_get","params":{"endpoint":"https://not-on-the-list.example/quick/brown/fox"},"session":"bench"`,
		"403", `"layer":"policy"`, `"allow":false`),
}

func newCall(name, members, status, node, opa string) call {
	return call{name: name, node: "{" + members + "}", opa: `{"input":{` + members + opaRest,
		status: map[string]string{sideStrict: status, sideBatched: status, sideOPA: "200", sideCeiling: "200"},
		expect: map[string]string{sideStrict: node, sideBatched: node, sideOPA: opa, sideCeiling: `"session":"bench"`}}
}

// The node's log: larger than what a second of batched calls writes, because
// without an endpoint the oldest records make room once a second; and no larger
// than needed, because the first start writes all of it.
const (
	nodeLog     = "768MiB"
	nodeSegment = "64MiB"
)

func newSides(o *options) ([]side, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	nodeBody := func(c call) string { return c.node }
	node := func(name, durability string) side {
		begin := func(ctx context.Context, dir string) (*server, error) {
			ready := filepath.Join(dir, "ready")
			s, err := start(ctx, dir, o.node, "--listen", "127.0.0.1:0", "--state-dir", filepath.Join(dir, "state"),
				"--policy", o.bundle, "--tools", o.tools, "--durability", durability, "--ready-file", ready,
				"--wal-max-bytes", nodeLog, "--wal-segment-bytes", nodeSegment)
			if err != nil {
				return nil, err
			}
			s.node = true
			return s, s.wait(func() error {
				data, err := os.ReadFile(ready)
				if err != nil {
					return err
				}
				for line := range strings.Lines(string(data)) {
					if a, ok := strings.CutPrefix(strings.TrimSpace(line), "addr="); ok {
						s.addr = a
						return nil
					}
				}
				return errors.New("the ready file names no address")
			})
		}
		return side{name: name, path: "/v1/tool", body: nodeBody, again: begin,
			start: func(ctx context.Context, dir string) (*server, error) {
				if err := os.Mkdir(filepath.Join(dir, "state"), 0o700); err != nil {
					return nil, err
				}
				return begin(ctx, dir)
			},
		}
	}
	return []side{
		node(sideStrict, "strict"),
		node(sideBatched, "batched"),
		{
			name: sideOPA, path: "/v1/data/autonomy/decision", body: func(c call) string { return c.opa },
			start: func(ctx context.Context, dir string) (*server, error) {
				ln, err := net.Listen("tcp", "127.0.0.1:0") // it does not tell which port it chose
				if err != nil {
					return nil, err
				}
				addr := ln.Addr().String()
				ln.Close()
				// Its decision logs go to the console, here a file that nobody
				// syncs: what it offers that comes nearest to a record.
				s, err := start(ctx, dir, o.opa, "run", "--server", "--addr", addr, "--log-level", "error",
					"--set", "decision_logs.console=true", "--skip-version-check", "--bundle", o.bundle)
				if err != nil {
					return nil, err
				}
				s.addr = addr
				return s, s.wait(s.dial)
			},
		},
		{
			name: sideCeiling, path: "/", body: nodeBody,
			start: func(ctx context.Context, dir string) (*server, error) {
				s, err := start(ctx, dir, self, ceilingCommand)
				if err != nil {
					return nil, err
				}
				return s, s.wait(func() error {
					data, err := os.ReadFile(filepath.Join(dir, "output"))
					if err != nil {
						return err
					}
					addr, ok := strings.CutSuffix(string(data), "\n")
					if !ok {
						return errors.New("no address yet")
					}
					s.addr = addr
					return nil
				})
			},
		},
	}, nil
}

// A server is a running process.
type server struct {
	addr string
	pid  int
	node bool // it has a node's metrics

	cmd    *exec.Cmd
	output string        // file
	done   chan struct{} // closed when it has ended
}

// start runs a program whose output goes to a file in dir.
func start(ctx context.Context, dir, program string, args ...string) (*server, error) {
	output, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		return nil, err
	}
	defer output.Close()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{pid: cmd.Process.Pid, cmd: cmd, output: output.Name(), done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // its end is what counts; wait says what it wrote
		close(s.done)
	}()
	return s, nil
}

// wait waits until ready returns nil. When it does not, the server is stopped.
func (s *server) wait(ready func() error) error {
	const timeout = 15 * time.Second
	for deadline := time.Now().Add(timeout); ; {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-s.done:
			err = errors.New("it ended")
		case <-time.After(2 * time.Millisecond):
			if time.Now().Before(deadline) {
				continue
			}
			err = fmt.Errorf("not ready after %v: %w", timeout, err)
		}
		s.stop()
		out, readErr := os.ReadFile(s.output)
		return errors.Join(fmt.Errorf("%s: %w; it wrote:\n%.2000s", filepath.Base(s.cmd.Path), err, out), readErr)
	}
}

func (s *server) dial() error {
	c, err := net.DialTimeout("tcp", s.addr, time.Second)
	if err != nil {
		return err
	}
	return c.Close()
}

// terminate ends the server as an operator does, and waits for it.
func (s *server) terminate() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // an error means it has ended
	<-s.done
}

// stop ends the server: it has nothing to save, its directory goes with it.
func (s *server) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGKILL) // an error means it has ended
	<-s.done
}

// ceilingCommand makes this program the bare server.
const ceilingCommand = "serve-ceiling"

// serveCeiling sends every body back, from a free port that it prints.
func serveCeiling() error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr())
	return (&fasthttp.Server{Handler: func(ctx *fasthttp.RequestCtx) {
		ctx.SetContentType("application/json")
		ctx.SetBody(ctx.PostBody())
	}}).Serve(ln)
}
