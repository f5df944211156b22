package run_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/autonomyops/autonomy/internal/run"
)

func TestMain(m *testing.M) {
	if os.Getenv("RUN_TEST_ACTIVATED") != "" {
		lns, err := run.Activated()
		if err != nil || len(lns) != 1 {
			fmt.Println(lns, err)
			os.Exit(1)
		}
		c, err := lns[0].Accept()
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Fprint(c, "activated")
		c.Close()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestCode(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), run.Failure},
		{run.Exitf(run.Usage, "x"), run.Usage},
		{fmt.Errorf("while: %w", run.Exit(run.Integrity, errors.New("x"))), run.Integrity},
		{run.Exit(run.Refused, nil), 0},
	} {
		if got := run.Code(tc.err); got != tc.want {
			t.Errorf("%v: %d, want %d", tc.err, got, tc.want)
		}
	}
}

func TestLoopback(t *testing.T) {
	for addr, want := range map[string]bool{
		"127.0.0.1:1": true, "127.9.9.9:1": true, "[::1]:1": true, "localhost:1": true, "unix:/x": true,
		"0.0.0.0:1": false, ":1": false, "[::]:1": false, "192.0.2.1:1": false, "localhost.evil.test:1": false, "127.0.0.1": false, "": false,
	} {
		if got := run.Loopback(addr); got != want {
			t.Errorf("%q: %v", addr, got)
		}
	}
}

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	ln, err := run.Listen("unix:"+path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if run.Addr(ln) != "unix:"+path {
		t.Error(run.Addr(ln))
	}
	if _, err := run.Listen("unix:"+path, 0o600); err == nil || !strings.Contains(err.Error(), "another process serves") {
		t.Errorf("a live socket: %v", err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close() // as after a crash: the file stays
	ln, err = run.Listen("unix:"+path, 0o600)
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	ln.Close()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := run.Listen("unix:"+file, 0o600); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("a file: %v", err)
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "precious" {
		t.Errorf("the file was touched: %q, %v", data, err)
	}
}

func TestReady(t *testing.T) {
	dir := t.TempDir()
	sock := filepath.Join(dir, "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: sock, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", sock)
	var out bytes.Buffer
	if err := run.Ready(&out, filepath.Join(dir, "ready"), "127.0.0.1:1", "unix:/x"); err != nil {
		t.Fatal(err)
	}
	if out.String() != "listening on 127.0.0.1:1\nlistening on unix:/x\n" {
		t.Errorf("%q", out.String())
	}
	data, err := os.ReadFile(filepath.Join(dir, "ready"))
	if err != nil || !strings.HasPrefix(string(data), "addr=127.0.0.1:1\naddr=unix:/x\npid=") {
		t.Errorf("%q, %v", data, err)
	}
	buf := make([]byte, 64)
	n, err := manager.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	if err := run.Ready(io.Discard, filepath.Join(dir, "no", "such"), "x"); err == nil {
		t.Error("a ready file that cannot be written is no error")
	}
}

// TestWatchdog: while a daemon runs, the service manager hears of it.
func TestWatchdog(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: sock, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", sock)
	t.Setenv("WATCHDOG_USEC", "10000")
	d := run.Daemon{Name: "x", EnvPrefix: "X_", Bind: func(*pflag.FlagSet) {}, Validate: func() error { return nil },
		Run: func(context.Context, *slog.Logger, io.Writer) error {
			buf := make([]byte, 64)
			for range 3 {
				n, err := manager.Read(buf)
				if err != nil || string(buf[:n]) != "WATCHDOG=1" {
					return fmt.Errorf("%q, %w", buf[:n], err)
				}
			}
			return nil
		}}
	if code := d.Main(nil, io.Discard, os.Stderr); code != run.OK {
		t.Errorf("exit code %d", code)
	}
}

// TestActivated passes a listening socket as systemd does: descriptor 3.
func TestActivated(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// LISTEN_PID must be the child's own: the shell execs it.
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), "RUN_TEST_ACTIVATED=1")
	cmd.ExtraFiles = []*os.File{f}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := io.ReadAll(c)
	if werr := cmd.Wait(); err != nil || werr != nil || string(got) != "activated" {
		t.Errorf("%q, %v, %v: %s", got, err, werr, &out)
	}
	if lns, err := run.Activated(); lns != nil || err != nil {
		t.Errorf("without activation: %v, %v", lns, err)
	}
}

func TestDaemonMain(t *testing.T) {
	var size int
	d := run.Daemon{Name: "x", Short: "do x", EnvPrefix: "X_TEST_",
		Bind: func(fs *pflag.FlagSet) { fs.IntVar(&size, "size", 3, "the size") },
		Validate: func() error {
			if size > 9 {
				return run.Exitf(run.Usage, "--size is over 9")
			}
			return nil
		},
		Run: func(context.Context, *slog.Logger, io.Writer) error {
			if size == 7 {
				return run.Exitf(run.Integrity, "broken")
			}
			return nil
		}}
	for _, tc := range []struct {
		args        []string
		code        int
		out, stderr string
	}{
		{nil, 0, "", ""},
		{[]string{"--version"}, 0, "x " + run.Version, ""},
		{[]string{"--help"}, 0, "do x", ""},
		{[]string{"--print-config", "--size=5"}, 0, "size: 5", ""},
		{[]string{"--size=10"}, run.Usage, "", "--size is over 9"},
		{[]string{"--size=x"}, run.Usage, "", "invalid argument"},
		{[]string{"--nope"}, run.Usage, "", "unknown flag"},
		{[]string{"--size=7"}, run.Integrity, "", "x: broken"},
	} {
		var out, stderr bytes.Buffer
		size = 3
		if code := d.Main(tc.args, &out, &stderr); code != tc.code || !strings.Contains(out.String(), tc.out) || !strings.Contains(stderr.String(), tc.stderr) {
			t.Errorf("%q: exit code %d, %q, %q", tc.args, code, &out, &stderr)
		}
	}
}
