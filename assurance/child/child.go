// Package child is the process that a probe puts into a cgroup: the program
// itself, started again under another name, which its init notices. It tries to
// connect to the addresses in its arguments, says how each ended, and waits to
// be killed. No other program is needed on the machine for it, and the package
// is so small that it is initialised, and so ends the process, before the rest
// of a large binary is.
//
// A connect is that of a UDP socket: the kernel's checks run, and nothing is
// sent. The child ends when its standard input does, so it does not outlive
// whoever probes.
package child

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// name is argv[0] of the child. No program is installed under it.
const name = "autonomy-probe-child"

const ready = "ready"

func init() {
	if os.Args[0] == name {
		run(os.Args[1:])
		os.Exit(0)
	}
}

func run(addrs []string) {
	for _, a := range addrs {
		fmt.Printf("%s %d\n", a, connect(a))
	}
	fmt.Println(ready)
	_, _ = io.Copy(io.Discard, os.Stdin) // until the parent goes away
}

// connect returns the errno of a connect, 0 when it is allowed.
func connect(addr string) int {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil || !ap.Addr().Is4() {
		return int(unix.EINVAL)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()})
		unix.Close(fd)
	}
	var errno unix.Errno
	if err != nil && !errors.As(err, &errno) {
		return int(unix.EINVAL)
	}
	return int(errno)
}

// Child is a running child.
type Child struct {
	Errno map[string]unix.Errno // of the connect to each address, 0: allowed

	cmd   *exec.Cmd
	stdin io.Closer
	done  chan error // its end, once
}

// Start starts a child in the cgroup behind the descriptor and returns when it
// has tried every address. At the end of ctx the child is killed. The caller
// must Wait.
func Start(ctx context.Context, cgroup int, addrs ...string) (*Child, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", addrs...)
	cmd.Args[0] = name
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: cgroup}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("probe child: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("probe child: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a child in the cgroup: %w", err)
	}
	c := &Child{Errno: map[string]unix.Errno{}, cmd: cmd, stdin: stdin, done: make(chan error, 1)}
	sc := bufio.NewScanner(io.LimitReader(stdout, 64<<10))
	for sc.Scan() && sc.Text() != ready {
		var addr string
		var errno int
		if _, err := fmt.Sscan(sc.Text(), &addr, &errno); err == nil {
			c.Errno[addr] = unix.Errno(errno)
		}
	}
	if sc.Text() != ready {
		_ = stdin.Close()
		err := cmd.Wait()
		return nil, fmt.Errorf("the child ended before it was ready: %v", err)
	}
	go func() { c.done <- cmd.Wait() }()
	return c, nil
}

// Pid is the child's process id.
func (c *Child) Pid() int { return c.cmd.Process.Pid }

// Wait waits for the end of the child, or of ctx, which kills it. It reports
// whether SIGKILL ended it, and not the context.
func (c *Child) Wait(ctx context.Context) (killed bool, err error) {
	select {
	case err = <-c.done:
	case <-ctx.Done():
		_ = c.stdin.Close()
		_ = c.cmd.Process.Kill()
		<-c.done
		return false, fmt.Errorf("the child is still there: %w", ctx.Err())
	}
	ws, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() && ws.Signal() == syscall.SIGKILL {
		return true, nil
	}
	return false, fmt.Errorf("the child ended by itself: %v", strings.TrimSpace(fmt.Sprint(err)))
}

// Stop ends the child.
func (c *Child) Stop() {
	_ = c.stdin.Close()
	_ = c.cmd.Process.Kill()
	<-c.done
}
