package testutil

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A Command says what to start.
type Command struct {
	Path string
	Args []string
	Env  []string // added to the test's own environment
	Dir  string   // working directory; "": the test's
	Name string   // in messages; "": the base of Path
}

// A Process is a started Command. Its methods may be called from several
// goroutines; those that take a testing.TB from the test's own only, because
// they may end it.
type Process struct {
	Stdout, Stderr *Output

	command Command
	pid     int
	done    chan struct{} // closed when the process has ended and its output is complete
	err     error         // what Wait said; read after done
}

// Start starts a process. When the test ends, so does the process; when the
// test has failed, the end of what it wrote is logged.
func (c Command) Start(t testing.TB) *Process {
	t.Helper()
	if c.Name == "" {
		c.Name = filepath.Base(c.Path)
	}
	p := &Process{Stdout: &Output{}, Stderr: &Output{}, command: c, done: make(chan struct{})}
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Dir = c.Dir
	cmd.Stdout, cmd.Stderr = p.Stdout, p.Stderr
	cmd.WaitDelay = 2 * time.Second // a grandchild may hold the pipes open
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}

	started := make(chan error)
	go func() {
		// The death signal is sent when the thread ends that started the
		// process: this one stays until the process has ended.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		p.pid = cmd.Process.Pid
		started <- nil
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		t.Fatalf("start %s: %v", c.Name, err)
	}
	t.Cleanup(func() {
		p.signal(syscall.SIGKILL)
		<-p.done
		if t.Failed() {
			t.Logf("%s (pid %d) ended with %v; stdout:\n%s\nstderr:\n%s", c.Name, p.pid, p.err, p.Stdout.tail(4<<10), p.Stderr.tail(16<<10))
		}
	})
	return p
}

// Restart starts the same command again. The process must have ended.
func (p *Process) Restart(t testing.TB) *Process {
	t.Helper()
	select {
	case <-p.done:
	default:
		t.Fatalf("restart %s: it still runs: call Stop or Kill first", p.command.Name)
	}
	return p.command.Start(t)
}

// PID is the process id.
func (p *Process) PID() int { return p.pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Kill ends the process with SIGKILL, as a crash does, and waits for its end.
func (p *Process) Kill(t testing.TB) {
	t.Helper()
	p.signal(syscall.SIGKILL)
	p.Wait(t, Timeout)
}

// Stop asks the process to end with SIGTERM and returns its exit code. One that
// takes longer than Timeout fails the test.
func (p *Process) Stop(t testing.TB) int {
	t.Helper()
	p.signal(syscall.SIGTERM)
	return p.Wait(t, Timeout)
}

// Signal sends a signal. To a process that has ended it does nothing.
func (p *Process) Signal(sig syscall.Signal) { p.signal(sig) }

func (p *Process) signal(sig syscall.Signal) {
	select {
	case <-p.done:
		return
	default:
	}
	// The goroutine of Start reaps the process just before it closes done; the
	// number cannot be somebody else's within that moment.
	_ = syscall.Kill(p.pid, sig)
}

// Wait waits for the end and returns the exit code, -1 after a signal.
func (p *Process) Wait(t testing.TB, timeout time.Duration) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(timeout):
		t.Fatalf("%s (pid %d) has not ended after %v", p.command.Name, p.pid, timeout)
	}
	var exit *exec.ExitError
	switch {
	case p.err == nil:
		return 0
	case errors.As(p.err, &exit):
		return exit.ExitCode()
	case errors.Is(p.err, exec.ErrWaitDelay): // ended well; a grandchild kept the pipes
		return 0
	}
	t.Fatalf("wait for %s: %v", p.command.Name, p.err)
	return -1
}

// listening is the line of internal/run.Ready; the registry logs the same words.
var listening = regexp.MustCompile(`listening on ([^\s"\\]+)`)

// Addr waits until the process listens and returns the first address it
// reported on stderr.
func (p *Process) Addr(t testing.TB) string {
	t.Helper()
	return p.WaitOutput(t, p.Stderr, listening, Timeout)[1]
}

// Addrs is Addr for a process with n listeners.
func (p *Process) Addrs(t testing.TB, n int) []string {
	t.Helper()
	var out []string
	p.await(t, fmt.Sprintf("%d listeners", n), Timeout, func() bool {
		out = nil
		for _, m := range listening.FindAllStringSubmatch(p.Stderr.String(), n) {
			out = append(out, m[1])
		}
		return len(out) == n
	})
	return out
}

// WaitOutput waits until out, one of the process's two, has a match of re, and
// returns it with its groups. It fails the test at once when the process ends
// without.
func (p *Process) WaitOutput(t testing.TB, out *Output, re *regexp.Regexp, timeout time.Duration) []string {
	t.Helper()
	var m []string
	p.await(t, fmt.Sprintf("output like %q", re), timeout, func() bool {
		m = re.FindStringSubmatch(out.String())
		return m != nil
	})
	return m
}

// WaitReady waits for the file of --ready-file and returns its address.
func (p *Process) WaitReady(t testing.TB, readyFile string) string {
	t.Helper()
	var addr string
	p.await(t, "ready file "+readyFile, Timeout, func() bool {
		data, err := os.ReadFile(readyFile)
		if err != nil {
			return false
		}
		for line := range strings.Lines(string(data)) {
			if a, ok := strings.CutPrefix(strings.TrimSpace(line), "addr="); ok {
				addr = a
				return true
			}
		}
		return false
	})
	return addr
}

func (p *Process) await(t testing.TB, what string, timeout time.Duration, found func() bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for {
		ended := false
		select {
		case <-p.done: // before the look: what was written last counts
			ended = true
		default:
		}
		switch {
		case found():
			return
		case ended:
			t.Fatalf("%s ended (%v) before %s", p.command.Name, p.err, what)
		case time.Now().After(deadline):
			t.Fatalf("waited %v for %s of %s", timeout, what, p.command.Name)
		}
		time.Sleep(pollInterval)
	}
}

// maxOutput bounds what is kept of one stream; older output goes first.
const maxOutput = 8 << 20

// Output is what a process has written to one stream so far, at most the last
// 8 MiB of it. It is safe for concurrent use.
type Output struct {
	mu  sync.Mutex
	buf []byte
}

// Write is for the process.
func (o *Output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.buf = append(o.buf, b...)
	if len(o.buf) > maxOutput {
		cut := len(o.buf) - maxOutput/2
		if nl := bytes.IndexByte(o.buf[cut:], '\n'); nl >= 0 {
			cut += nl + 1
		}
		o.buf = append(o.buf[:0], o.buf[cut:]...)
	}
	return len(b), nil
}

// String returns a copy.
func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.buf)
}

func (o *Output) tail(n int) string {
	s := o.String()
	if len(s) > n {
		s = "…" + s[len(s)-n:]
	}
	return s
}
