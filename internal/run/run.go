// Package run is what the programs share around their work: exit codes, the
// logger, listeners, signals, readiness.
package run

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"
)

// Version is set by the linker: -X github.com/autonomyops/autonomy/internal/run.Version=v1.2.3
var Version = "0.1.0-dev"

// Exit codes (contract.md, Programs).
const (
	OK          = 0
	Failure     = 1
	Usage       = 2
	Refused     = 3 // verification refused
	NotFound    = 4
	Unreachable = 5
	Integrity   = 6 // log, store or chain damaged
	Assurance   = 7 // platform assurance refused
)

// ExitError carries an exit code with an error.
type ExitError struct {
	Code int
	Err  error
}

func (e *ExitError) Error() string { return e.Err.Error() }
func (e *ExitError) Unwrap() error { return e.Err }

// Exit gives err an exit code. A nil err stays nil.
func Exit(code int, err error) error {
	if err == nil {
		return nil
	}
	return &ExitError{Code: code, Err: err}
}

// Exitf is Exit with a formatted error.
func Exitf(code int, format string, args ...any) error {
	return &ExitError{Code: code, Err: fmt.Errorf(format, args...)}
}

// Code is the exit code of err: 0 for nil, 1 when err carries none.
func Code(err error) int {
	var e *ExitError
	switch {
	case err == nil:
		return OK
	case errors.As(err, &e):
		return e.Code
	}
	return Failure
}

// Signals returns a context that ends at SIGTERM or SIGINT. A second signal
// kills the process at once.
func Signals(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(parent, syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// Logger writes JSON, or text when w is a terminal.
func Logger(w io.Writer) *slog.Logger {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return slog.New(slog.NewTextHandler(w, nil))
	}
	return slog.New(slog.NewJSONHandler(w, nil))
}

// Listen opens "host:port" or "unix:PATH". The directory of a Unix socket must
// exist; a stale socket file that nobody answers on is replaced, a live one is
// an error. mode is the socket file's permission.
func Listen(addr string, mode fs.FileMode) (net.Listener, error) {
	path, ok := strings.CutPrefix(addr, "unix:")
	if !ok {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, fmt.Errorf("listen: %w", err)
		}
		return ln, nil
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another process serves this socket", addr)
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("listen on %s: the file exists and is no socket", addr)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listen on %s: remove stale socket: %w", addr, err)
		}
	}
	old := syscall.Umask(0o777 &^ int(mode.Perm())) // the file must never be wider, not even for a moment
	ln, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return ln, nil
}

// Addr writes a listener's address as it is given to --listen.
func Addr(ln net.Listener) string {
	if ln.Addr().Network() == "unix" {
		return "unix:" + ln.Addr().String()
	}
	return ln.Addr().String()
}

// Loopback reports whether only this machine can reach addr ("host:port" or
// "unix:PATH"). A name other than localhost is not resolved: it is not.
func Loopback(addr string) bool {
	if strings.HasPrefix(addr, "unix:") {
		return true
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// Ready announces that the program serves: a line "listening on ADDR" per
// address on stderr, readyFile (when not empty) with "addr=ADDR" lines and
// "pid=N", and READY=1 to the service manager.
func Ready(stderr io.Writer, readyFile string, addrs ...string) error {
	var b strings.Builder
	for _, a := range addrs {
		fmt.Fprintf(stderr, "listening on %s\n", a)
		fmt.Fprintf(&b, "addr=%s\n", a)
	}
	fmt.Fprintf(&b, "pid=%d\n", os.Getpid())
	if readyFile != "" {
		if err := writeReady(readyFile, b.String()); err != nil {
			return fmt.Errorf("ready file: %w", err)
		}
	}
	Notify("READY=1")
	return nil
}

// writeReady puts the ready file in place whole, for who waits for it. Unlike
// state it need not survive a crash, so nothing is synced: that could take longer
// than the rest of the start.
func writeReady(path, text string) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".tmp-*")
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// Notify tells the service manager a state (sd_notify(3)); without one it does
// nothing.
func Notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	c, err := net.Dial("unixgram", path)
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte(state)) // the manager's loss is not ours
}

// watchdog tells the service manager every half of its deadline that this
// process is alive (WatchdogSec= in a unit), until ctx ends.
func watchdog(ctx context.Context) {
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if pid := os.Getenv("WATCHDOG_PID"); err != nil || usec <= 0 || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return
	}
	tick := time.NewTicker(max(time.Duration(usec)*time.Microsecond/2, time.Millisecond))
	defer tick.Stop()
	for {
		Notify("WATCHDOG=1")
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Activated returns the sockets that systemd passed (sd_listen_fds(3)).
func Activated() ([]net.Listener, error) {
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() {
		return nil, nil
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > 64 {
		return nil, fmt.Errorf("socket activation: LISTEN_FDS is %q", os.Getenv("LISTEN_FDS"))
	}
	var out []net.Listener
	for i := range n {
		fd := 3 + i
		syscall.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), "LISTEN_FD_"+strconv.Itoa(fd))
		ln, err := net.FileListener(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("socket activation: descriptor %d: %w", fd, err)
		}
		out = append(out, ln)
	}
	return out, nil
}
