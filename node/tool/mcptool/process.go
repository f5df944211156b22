package mcptool

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// What is passed on of a program's standard error: bytes of a line, and lines of
// a second, with twice that at once.
const (
	maxStderrLine = 1 << 10
	stderrRate    = 20
)

// Grace is how long a program has to end after its input was closed, and again
// after SIGTERM; then its process group is killed.
const Grace = time.Second

func checkProgram(c *Config) error {
	var faults []error
	if !filepath.IsAbs(c.Argv[0]) {
		faults = append(faults, fmt.Errorf("argv: %q: want an absolute path as the program", c.Argv[0]))
	}
	if c.Dir != "" && !filepath.IsAbs(c.Dir) {
		faults = append(faults, fmt.Errorf("dir: %q: want an absolute path", c.Dir))
	}
	if slices.ContainsFunc(c.Argv, func(a string) bool { return strings.ContainsRune(a, 0) }) {
		faults = append(faults, errors.New("argv: an argument holds a NUL"))
	}
	for _, e := range c.Env {
		if name, _, _ := strings.Cut(e, "="); name == "" || strings.ContainsAny(e, "\x00") || strings.ContainsAny(name, " \t\n") {
			faults = append(faults, errors.New("env: want NAME or NAME=value")) // the value may be a secret
		}
	}
	return errors.Join(faults...)
}

// process is a running program of a server.
type process struct {
	stdin  *os.File
	stdout *os.File
	pid    int
	exited chan struct{}
	drains chan struct{} // closed when its standard error was read to the end
}

// spawn starts the program. Its end kills its process group, and so does the
// node's: the parent's death is a signal to it. The kernel takes the thread that
// forked for the parent, so that thread lives as long as the program.
func (s *Server) spawn() (*process, error) {
	cmd := exec.Command(s.cfg.Argv[0], s.cfg.Argv[1:]...)
	cmd.Env = []string{} // not nil: nil would be the node's own
	for _, e := range s.cfg.Env {
		if strings.Contains(e, "=") {
			cmd.Env = append(cmd.Env, e)
		} else if v, ok := os.LookupEnv(e); ok {
			cmd.Env = append(cmd.Env, e+"="+v)
		}
	}
	cmd.Dir = s.cfg.Dir
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	var pipes [6]*os.File
	for i := 0; i < len(pipes); i += 2 {
		r, w, err := os.Pipe()
		if err != nil {
			closeAll(pipes[:])
			return nil, fmt.Errorf("pipe: %w", err)
		}
		pipes[i], pipes[i+1] = r, w
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = pipes[0], pipes[3], pipes[5]
	p := &process{stdin: pipes[1], stdout: pipes[2], exited: make(chan struct{}), drains: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		_ = cmd.Wait() // how it ended: the log's line about the link says what matters
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		close(p.exited)
	}()
	err := <-started
	closeAll([]*os.File{pipes[0], pipes[3], pipes[5]})
	if err != nil {
		closeAll([]*os.File{pipes[1], pipes[2], pipes[4]})
		return nil, fmt.Errorf("start %s: %w", s.cfg.Argv[0], err)
	}
	p.pid = cmd.Process.Pid
	go func() {
		defer close(p.drains)
		logStderr(pipes[4], s.cfg.Logger.With("server", s.cfg.Name, "pid", p.pid))
	}()
	go func() { // a descendant that left the group may hold the pipes open for ever
		<-p.exited
		time.AfterFunc(Grace, func() { p.stdout.Close(); pipes[4].Close() })
	}()
	return p, nil
}

func closeAll(fs []*os.File) {
	for _, f := range fs {
		if f != nil {
			f.Close()
		}
	}
}

func (p *process) transport() mcp.Transport {
	return &mcp.IOTransport{Reader: p.stdout, Writer: p.stdin, MaxLineLength: MaxMessage}
}

// end stops the program and waits for its end.
func (p *process) end() {
	p.stdin.Close()
	select {
	case <-p.exited:
	case <-time.After(Grace):
		p.signal(syscall.SIGTERM)
		select {
		case <-p.exited:
		case <-time.After(Grace):
			p.signal(syscall.SIGKILL)
			<-p.exited
		}
	}
	p.stdout.Close()
	<-p.drains
}

// signal reaches the whole group. The leader is not reaped before exited is
// closed, so the number is still its own unless this comes in that very moment.
func (p *process) signal(sig syscall.Signal) {
	select {
	case <-p.exited:
	default:
		_ = syscall.Kill(-p.pid, sig)
	}
}

// logStderr passes lines on until the end of r, and closes it.
func logStderr(r io.ReadCloser, log *slog.Logger) {
	defer r.Close()
	rd := bufio.NewReaderSize(r, maxStderrLine)
	tokens, last, dropped := float64(2*stderrRate), time.Now(), 0
	for {
		line, err := rd.ReadSlice('\n')
		if len(line) > 0 {
			now := time.Now()
			tokens = min(2*stderrRate, tokens+now.Sub(last).Seconds()*stderrRate)
			last = now
			if tokens < 1 {
				dropped++
			} else {
				tokens--
				text := clip(strings.TrimRight(string(line), "\r\n"))
				if dropped > 0 {
					log.Warn("MCP server wrote more to stderr than is kept", "lines", dropped)
					dropped = 0
				}
				if text != "" {
					log.Info("MCP server's stderr", "text", text)
				}
			}
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}
