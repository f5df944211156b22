package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/prepared"
)

func quickstart(t *testing.T, dir string) string {
	t.Helper()
	root, err := testutil.Root()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := prepared.BuildBundle(filepath.Join(root, "examples/quickstart/policy"), prepared.BuildOptions{Name: "q", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "policy.tar.gz")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// activated starts a node that is handed ln as systemd does: descriptor 3, and
// the pid of the process itself, which the shell execs.
func activated(t *testing.T, ln *net.TCPListener, out *bytes.Buffer, ready string, args ...string) *exec.Cmd {
	t.Helper()
	f, err := ln.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`, testutil.Build(t, "autonomy-node"), "--ready-file", ready}, args...)...)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // mostly it has ended
		_ = cmd.Wait()
	})
	return cmd
}

// TestHandover: a node is replaced by another on the same socket, as systemd
// does at a restart, while clients call all the time on new connections. None is
// refused, none loses its answer: who comes in between waits.
func TestHandover(t *testing.T) {
	dir := t.TempDir()
	addr, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := addr.(*net.TCPListener)
	defer ln.Close()
	args := []string{"--state-dir", filepath.Join(dir, "state"), "--policy", quickstart(t, dir), "--wal-max-bytes=4MiB", "--wal-segment-bytes=1MiB", "--keep-free=0"}
	var out [3]bytes.Buffer
	begin := func(i int) *exec.Cmd {
		ready := filepath.Join(dir, fmt.Sprint("ready", i))
		cmd := activated(t, ln, &out[i], ready, args...)
		testutil.Eventually(t, timeout, "the node to be ready", func() error { _, err := os.Stat(ready); return err })
		return cmd
	}
	current := begin(0)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: timeout}
	ctx, stop := context.WithCancel(t.Context())
	var calls atomic.Int64
	failed := make(chan error, 4)
	for range 4 {
		go func() {
			for ctx.Err() == nil {
				resp, err := client.Post("http://"+ln.Addr().String()+"/v1/tool", "application/json", strings.NewReader(`{"kind":"tool.echo"}`))
				if err == nil {
					var body []byte
					body, err = io.ReadAll(resp.Body)
					resp.Body.Close()
					if err == nil && resp.StatusCode != 200 {
						err = fmt.Errorf("%d %s", resp.StatusCode, body)
					}
				}
				if err != nil {
					failed <- fmt.Errorf("call %d: %w", calls.Load(), err)
					return
				}
				calls.Add(1)
			}
			failed <- nil
		}()
	}
	more := func() {
		t.Helper()
		from := calls.Load()
		testutil.Eventually(t, timeout, "calls to go on", func() error {
			if calls.Load() < from+20 {
				return errors.New("too few")
			}
			return nil
		})
	}
	more()
	for i := 1; i < len(out); i++ {
		if err := current.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := current.Wait(); err != nil {
			t.Fatalf("the node ended with %v:\n%s", err, &out[i-1])
		}
		current = begin(i)
		more()
	}
	stop()
	for range 4 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
}

// TestReloadConfig: SIGHUP and a changed file put limits into force; what needs a
// restart is named; a file with a slip changes nothing.
func TestReloadConfig(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "node.yaml")
	write := func(more string) {
		t.Helper()
		text := fmt.Sprintf("listen: 127.0.0.1:0\nstate_dir: %s\npolicy: %s\nwal_max_bytes: 4MiB\nwal_segment_bytes: 1MiB\nkeep_free: 0\n%s", filepath.Join(dir, "state"), filepath.Join(dir, "policy.tar.gz"), more)
		if err := os.WriteFile(config+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(config+".new", config); err != nil {
			t.Fatal(err)
		}
	}
	quickstart(t, dir)
	write("")
	p := testutil.Command{Path: testutil.Build(t, "autonomy-node"), Args: []string{"--config", config, "--max-queue=7"}}.Start(t)
	addr := p.Addr(t)
	logged := func(what string, fields map[string]any) {
		t.Helper()
		testutil.Eventually(t, timeout, what, func() error {
		lines:
			for line := range strings.Lines(p.Stderr.String()) {
				var have map[string]any
				if json.Unmarshal([]byte(line), &have) != nil {
					continue
				}
				for k, v := range fields {
					if fmt.Sprint(have[k]) != fmt.Sprint(v) {
						continue lines
					}
				}
				return nil
			}
			return errors.New(p.Stderr.String())
		})
	}
	write("max_in_flight: 5\nlog_calls: 1\nheartbeat_interval: 5s\n") // the file watch finds it
	logged("the reload", map[string]any{"msg": "reloaded", "max_in_flight": 5, "max_queue": 7})
	logged("what needs a restart", map[string]any{"level": "WARN", "settings": "[Heartbeat]"})
	resp, err := http.Post("http://"+addr+"/v1/tool", "application/json", strings.NewReader(`{"kind":"tool.echo","session":"s-1"}`))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	logged("the call, which --log-calls has logged since", map[string]any{"msg": "call", "session": "s-1"})
	write("max_in_flight: none\n")
	p.Signal(syscall.SIGHUP)
	logged("the refusal", map[string]any{"msg": "reload refused: what was in force stays"})
	if code := p.Stop(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
