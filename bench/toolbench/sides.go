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
	sideNode    = "autonomy"
	sideOPA     = "opa"
	sideCeiling = "fasthttp"
)

// A side is one of what is compared.
type side struct {
	name   string
	expect string                                         // must be in the answer
	path   string                                         // of the request
	body   string                                         // of the request
	start  func(context.Context, string) (*server, error) // in an empty directory
}

func (s side) request(addr string) []byte {
	return fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		s.path, addr, len(s.body), s.body)
}

// The call that is measured, and the input that the node makes of it and that
// OPA is sent.
const (
	toolCall = `{"kind":"tool.echo","params":{"message":"The quick brown fox jumps over the lazy dog."},"session":"bench"}`
	opaInput = `{"input":{"kind":"tool.echo","params":{"message":"The quick brown fox jumps over the lazy dog."},"session":"bench",` +
		`"caller":{"type":"anonymous","id":"loopback"},"agent":{"id":"","release":"","fingerprint":""},` +
		`"node":{"id":"bench","labels":{},"assurance":"reduced"},"time_ns":1767225600000000000}}`
)

func newSides(o *options) ([]side, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return []side{
		{
			name: sideNode, path: "/v1/tool", body: toolCall, expect: `"outcome":"ok"`,
			start: func(ctx context.Context, dir string) (*server, error) {
				ready := filepath.Join(dir, "ready")
				state := filepath.Join(dir, "state")
				if err := os.Mkdir(state, 0o700); err != nil {
					return nil, err
				}
				s, err := start(ctx, dir, o.node, "--listen", "127.0.0.1:0", "--state-dir", state, "--policy", o.bundle,
					"--tools", o.tools, "--durability", "strict", "--ready-file", ready)
				if err != nil {
					return nil, err
				}
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
			},
		},
		{
			name: sideOPA, path: "/v1/data/autonomy/decision", body: opaInput, expect: `"allow":true`,
			start: func(ctx context.Context, dir string) (*server, error) {
				ln, err := net.Listen("tcp", "127.0.0.1:0") // it does not tell which port it chose
				if err != nil {
					return nil, err
				}
				addr := ln.Addr().String()
				ln.Close()
				s, err := start(ctx, dir, o.opa, "run", "--server", "--addr", addr, "--log-level", "error",
					"--skip-version-check", "--bundle", o.bundle)
				if err != nil {
					return nil, err
				}
				s.addr = addr
				return s, s.wait(s.dial)
			},
		},
		{
			name: sideCeiling, path: "/", body: toolCall, expect: `"tool.echo"`,
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
		case <-time.After(10 * time.Millisecond):
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
