package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// processes are the daemons of a demo: this program again, each with its output
// in DIR/NAME.log.
type processes struct {
	dir    string
	detach bool // they outlive this process
	byName map[string]*process
}

type process struct {
	cmd  *exec.Cmd
	done chan error
}

const startLimit = 20 * time.Second

// start runs "autonomy daemon args…" and waits until addr accepts connections.
func (p *processes) start(ctx context.Context, name, addr string, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return p.exec(ctx, name, addr, self, append([]string{"daemon"}, args...)...)
}

func (p *processes) exec(ctx context.Context, name, addr, program string, args ...string) error {
	path := filepath.Join(p.dir, name+".log")
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the child has its own
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL} // Ctrl-C is for the demo; it stops them in order
	if p.detach {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // away from this terminal, too
	}
	proc := &process{cmd: cmd, done: make(chan error, 1)}
	started := make(chan error)
	go func() {
		// The death signal comes when the thread ends that started the child:
		// this one stays as long as the child does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			proc.done <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	if p.byName == nil {
		p.byName = map[string]*process{}
	}
	p.byName[name] = proc
	deadline := time.After(startLimit)
	for {
		if c, err := net.DialTimeout("tcp", addr, time.Second); err == nil {
			c.Close()
			return nil
		}
		select {
		case err := <-proc.done:
			proc.done <- err
			return fmt.Errorf("%s ended at once (%w):\n%s", name, err, tail(path))
		case <-deadline:
			return fmt.Errorf("%s does not listen on %s after %s:\n%s", name, addr, startLimit, tail(path))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// tail is the end of a log file.
func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-10):], []byte("\n")))
}

// kill ends a process with SIGKILL and waits for it.
func (p *processes) kill(name string) { p.end(name, syscall.SIGKILL) }

// stop ends a process with SIGTERM, and SIGKILL when it does not go.
func (p *processes) stop(name string) { p.end(name, syscall.SIGTERM) }

func (p *processes) end(name string, sig syscall.Signal) {
	proc := p.byName[name]
	if proc == nil {
		return
	}
	delete(p.byName, name)
	if err := proc.cmd.Process.Signal(sig); errors.Is(err, os.ErrProcessDone) {
		return
	}
	select {
	case <-proc.done:
	case <-time.After(15 * time.Second):
		_ = proc.cmd.Process.Kill() // it may have gone this moment
		<-proc.done
	}
}

// stopAll ends what runs, those that depend on others first.
func (p *processes) stopAll() {
	for _, name := range []string{"node", "collector", "relay", "cp", "registry"} {
		p.stop(name)
	}
}

// pids are those of all that runs.
func (p *processes) pids() (out []int) {
	for _, proc := range p.byName {
		out = append(out, proc.cmd.Process.Pid)
	}
	return out
}
