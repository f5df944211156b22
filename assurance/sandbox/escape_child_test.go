package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The escape suite runs this test's own program inside a sandbox. It makes one
// attempt and prints how the kernel answered: OK, or the name of the error.

const escapeArg = "escape-child"

// escape is a command that makes the attempt of this name.
func escape(t testing.TB, args ...string) *Command {
	t.Helper()
	return &Command{Argv: append([]string{self(t), escapeArg}, args...), Env: childEnv}
}

// childEnv: the race detector would let each child wait a second at its end.
var childEnv = []string{"GOMAXPROCS=1", "GORACE=atexit_sleep_ms=0"}

// self is a copy of this test's program where every user can read it.
func self(t testing.TB) string {
	t.Helper()
	selfOnce.Do(func() {
		dir, err := os.MkdirTemp("/var/tmp", "sandbox-test-")
		if err != nil {
			t.Fatal(err)
		}
		selfPath = dir + "/escape"
		b, err := os.ReadFile("/proc/self/exe")
		if err == nil {
			err = errors.Join(os.Chmod(dir, 0o755), os.WriteFile(selfPath, b, 0o755))
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	return selfPath
}

var (
	selfOnce sync.Once
	selfPath string
)

func escapeChild(args []string) {
	runtime.LockOSThread()
	var err error
	switch args[0] {
	case "dial":
		err = dial(args[1], args[2])
	case "dialer":
		dialer(args[1], args[2])
	case "connect-loop":
		err = connectLoop()
	case "rootless":
		rootless(args[1], args[2:])
	default:
		for _, a := range attempts {
			if a.name == args[0] {
				err = a.try(args[1:])
			}
		}
	}
	fmt.Println(errnoName(err))
	os.Exit(0)
}

func errnoName(err error) string {
	var errno unix.Errno
	var exit *exec.ExitError
	switch {
	case err == nil:
		return "OK"
	case errors.As(err, &errno) && errno != 0:
		return unix.ErrnoName(errno)
	case errors.As(err, &exit):
		return fmt.Sprintf("exit %d", exit.ExitCode())
	}
	return err.Error()
}

// rootless makes every attempt in a sandbox of a process without privileges.
func rootless(dir string, args []string) {
	s, err := Open(context.Background(), Options{RunDir: dir, Hidden: []string{filepath.Dir(args[argState])}})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for _, l := range s.Layers() {
		fmt.Println("layer", l.Name, l.On, l.Detail)
	}
	exe, err := os.Executable()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for _, a := range attempts {
		p, err := s.Start(context.Background(), &Command{Argv: append([]string{exe, escapeArg, a.name}, args...), Env: childEnv})
		if err != nil {
			fmt.Println("attempt", a.name, err)
			continue
		}
		var out strings.Builder
		p.Wait(context.Background(), func(b []byte) { out.Write(b) }, func(b []byte) { out.Write(b) })
		fmt.Println("attempt", a.name, strings.TrimSpace(out.String()))
	}
	if err := s.Close(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

// dial connects and prints what it is told.
func dial(network, addr string) error {
	ap := netip.MustParseAddrPort(addr)
	family, sa := sockaddr(ap)
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, sa); err != nil {
		return err
	}
	var buf [64]byte
	n, err := unix.Read(fd, buf[:])
	fmt.Print(string(buf[:max(n, 0)]))
	return err
}

func sockaddr(ap netip.AddrPort) (int, unix.Sockaddr) {
	if ap.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

// dialer writes E to a file for each attempt that is refused with EPERM, and X
// for another answer, until it is killed.
func dialer(file, addr string) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o666)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for {
		mark := "X"
		if errors.Is(dial("tcp", addr), unix.EPERM) {
			mark = "E"
		}
		if _, err := f.WriteString(mark); err != nil {
			os.Exit(1)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// An attempt is one way out. try returns nil when it worked, or an error that
// shows that it would have: pass lists those. It must do no harm when it works.
type attempt struct {
	group string
	name  string // also the first argument of the child
	try   func(args []string) error
	pass  []unix.Errno // errors of an attempt that was let through
	held  bool         // would exhaust this machine without the layer that stops it
	seen  bool         // a refusal by the egress layer is recorded
}

func openFile(path string, flags int) func([]string) error {
	return func([]string) error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
}

// openArg opens args[i], which the test knows.
func openArg(i, flags int) func([]string) error {
	return func(args []string) error { return openFile(args[i], flags)(nil) }
}

func socket(family, kind, proto int) func([]string) error {
	return func([]string) error {
		_, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, proto)
		return err
	}
}

func call(nr uintptr, args ...uintptr) func([]string) error {
	return func([]string) error {
		var a [6]uintptr
		copy(a[:], args)
		if _, _, errno := unix.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
			return errno
		}
		return nil
	}
}

func cstr(s string) uintptr {
	b := append([]byte(s), 0)
	kept = append(kept, b)
	return uintptr(unsafe.Pointer(&b[0]))
}

var kept [][]byte

// What the test tells the child: see escapeArgs.
const (
	argPID    = iota // a process of the host
	argTCP           // an address that accepts
	argUnix          // a Unix socket that accepts
	argAbs           // the same, abstract
	argState         // a file of the node's state
	argDisk          // a block device
	argCgroup        // cgroup.procs of the sandbox's cgroup
)

func pid(args []string) int {
	n, _ := strconv.Atoi(args[argPID])
	return n
}

func sendTo(addr string, flags int, kind int) error {
	family, sa := sockaddr(netip.MustParseAddrPort(addr))
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Sendto(fd, []byte("x"), flags, sa)
}

func tmpFile() (*os.File, error) { return os.CreateTemp("/tmp", "escape-") }

var attempts = []attempt{
	{"file", "read-shadow", openFile("/etc/shadow", unix.O_RDONLY), nil, false, false},
	{"file", "write-passwd", openFile("/etc/passwd", unix.O_WRONLY), nil, false, false},
	{"file", "read-logs", openFile("/var/log", unix.O_RDONLY|unix.O_DIRECTORY), nil, false, false},
	{"file", "read-node-state", openArg(argState, unix.O_RDONLY), nil, false, false},
	{"file", "write-node-state", openArg(argState, unix.O_WRONLY), nil, false, false},
	{"file", "add-program", func([]string) error {
		const path = "/usr/bin/.escape-attempt"
		err := openFile(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY)(nil)
		_ = os.Remove(path)
		return err
	}, nil, false, false},
	{"file", "follow-symlink", func([]string) error {
		link := fmt.Sprintf("/tmp/escape-link-%d", os.Getpid())
		if err := os.Symlink("/etc/shadow", link); err != nil {
			return err
		}
		defer os.Remove(link)
		return openFile(link, unix.O_RDONLY)(nil)
	}, nil, false, false},
	{"file", "open-by-handle", call(unix.SYS_OPEN_BY_HANDLE_AT, atCWD, cstr("\x08\x00\x00\x00\x01\x00\x00\x0012345678"), 0), []unix.Errno{unix.ESTALE}, false, false},
	{"file", "run-new-program", func([]string) error {
		f, err := tmpFile()
		if err != nil {
			return err
		}
		defer os.Remove(f.Name())
		b, err := os.ReadFile("/bin/true")
		if err == nil {
			_, err = f.Write(b)
		}
		if err = errors.Join(err, f.Chmod(0o755), f.Close()); err != nil {
			return err
		}
		return exec.Command(f.Name()).Run()
	}, nil, false, false},
	{"file", "chroot", call(unix.SYS_CHROOT, cstr("/")), nil, false, false},

	{"proc", "root-of-init", openFile("/proc/1/root/etc/shadow", unix.O_RDONLY), nil, false, false},
	{"proc", "core-pattern", openFile("/proc/sys/kernel/core_pattern", unix.O_WRONLY), nil, false, false},
	{"proc", "sysrq", openFile("/proc/sysrq-trigger", unix.O_WRONLY), nil, false, false},
	{"proc", "kernel-memory", openFile("/proc/kcore", unix.O_RDONLY), nil, false, false},
	{"proc", "memory-of-host-process", func(a []string) error { return openFile("/proc/"+a[argPID]+"/mem", unix.O_RDONLY)(nil) }, nil, false, false},
	{"proc", "environment-of-host-process", func(a []string) error { return openFile("/proc/"+a[argPID]+"/environ", unix.O_RDONLY)(nil) }, nil, false, false},
	{"proc", "sysfs", openFile("/sys/kernel", unix.O_RDONLY|unix.O_DIRECTORY), nil, false, false},

	{"device", "disk", openArg(argDisk, unix.O_RDONLY), nil, false, false},
	{"device", "memory", openFile("/dev/mem", unix.O_RDONLY), nil, false, false},
	{"device", "kernel-log", openFile("/dev/kmsg", unix.O_WRONLY), nil, false, false},
	{"device", "make-device", func([]string) error {
		path := fmt.Sprintf("/tmp/escape-device-%d", os.Getpid())
		defer os.Remove(path)
		return unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 250)))
	}, nil, false, false},
	{"device", "terminal-input", call(unix.SYS_IOCTL, 0, unix.TIOCSTI, cstr("x")), []unix.Errno{unix.ENOTTY}, false, false},

	{"network", "tcp-connect", func(a []string) error { return dial("tcp", a[argTCP]) }, nil, false, true},
	{"network", "tcp-fastopen", func(a []string) error { return sendTo(a[argTCP], unix.MSG_FASTOPEN, unix.SOCK_STREAM) }, nil, false, true},
	{"network", "tcp6-connect", func([]string) error { return dial("tcp", "[::1]:9") }, []unix.Errno{unix.ECONNREFUSED}, false, true},
	{"network", "tcp6-mapped", func(a []string) error { return dial("tcp", "[::ffff:127.0.0.1]:9") }, []unix.Errno{unix.ECONNREFUSED}, false, true},
	{"network", "udp-connect", func([]string) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		return unix.Connect(fd, &unix.SockaddrInet4{Port: 53, Addr: [4]byte{127, 0, 0, 2}})
	}, nil, false, true},
	{"network", "udp-send", func([]string) error { return sendTo("127.0.0.2:9", 0, unix.SOCK_DGRAM) }, nil, false, true},
	{"network", "udp6-send", func([]string) error { return sendTo("[::1]:9", 0, unix.SOCK_DGRAM) }, nil, false, true},
	{"network", "bind-port", func([]string) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrInet4{Port: 39871})
	}, []unix.Errno{unix.EADDRINUSE}, false, true},
	{"network", "raw", socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP), nil, false, false},
	{"network", "ping", func([]string) error { // the sysctl that allows it may be off: then there is nothing to refuse
		return socket(unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP)(nil)
	}, nil, false, false},
	{"network", "mptcp", socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP), nil, false, false},
	{"network", "sctp", socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP), nil, false, false},
	{"network", "packet", socket(unix.AF_PACKET, unix.SOCK_RAW, 0), nil, false, false},
	{"network", "netlink", socket(unix.AF_NETLINK, unix.SOCK_RAW, 0), nil, false, false},
	{"network", "vsock", socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0), nil, false, false},
	{"network", "kernel-crypto", socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0), nil, false, false},
	{"network", "io-uring", call(unix.SYS_IO_URING_SETUP, 1, cstr(string(make([]byte, 120)))), nil, false, false},
	{"network", "unix-socket-of-node", func(a []string) error { return connectUnix(a[argUnix]) }, nil, false, false},
	{"network", "abstract-socket", func(a []string) error { return connectUnix("@" + a[argAbs]) }, nil, false, false},

	{"process", "signal-host-process", func(a []string) error { return unix.Kill(pid(a), 0) }, nil, false, false},
	{"process", "ptrace-host-process", func(a []string) error { return call(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid(a)))(nil) }, nil, false, false},
	{"process", "read-host-process", func(a []string) error {
		local := []unix.Iovec{{Base: &make([]byte, 1)[0], Len: 1}}
		_, err := unix.ProcessVMReadv(pid(a), local, []unix.RemoteIovec{{Base: 0, Len: 1}}, 0)
		return err
	}, []unix.Errno{unix.EFAULT}, false, false},
	{"process", "pidfd-of-host-process", func(a []string) error { _, err := unix.PidfdOpen(pid(a), 0); return err }, nil, false, false},
	{"process", "limits-of-host-process", func(a []string) error {
		return unix.Prlimit(pid(a), unix.RLIMIT_NOFILE, nil, &unix.Rlimit{})
	}, nil, false, false},
	{"process", "become-root", func([]string) error {
		if _, _, errno := unix.Syscall(unix.SYS_SETRESUID, 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	}, nil, false, false},

	{"cgroup", "leave", openArg(argCgroup, unix.O_WRONLY), nil, false, false},
	{"cgroup", "mount-cgroup", call(unix.SYS_FSOPEN, cstr("cgroup2"), 0), nil, false, false},

	{"namespace", "new-net", call(unix.SYS_UNSHARE, unix.CLONE_NEWNET), nil, false, false},
	{"namespace", "new-user", func([]string) error { return exec.Command("/usr/bin/unshare", "-U", "/bin/true").Run() }, nil, false, false},
	{"namespace", "enter", call(unix.SYS_SETNS, ^uintptr(0), 0), []unix.Errno{unix.EBADF}, false, false},

	{"mount", "mount", call(unix.SYS_MOUNT, 0, cstr("/tmp"), cstr("nosuchfs"), 0, 0), []unix.Errno{unix.ENODEV}, false, false},
	{"mount", "fsopen", call(unix.SYS_FSOPEN, cstr("tmpfs"), 0), nil, false, false},
	{"mount", "pivot-root", call(unix.SYS_PIVOT_ROOT, cstr("/"), cstr("/")), []unix.Errno{unix.EBUSY, unix.EINVAL}, false, false},
	{"mount", "swap", call(unix.SYS_SWAPON, cstr("/nonexistent"), 0), []unix.Errno{unix.ENOENT}, false, false},

	{"kernel", "bpf", func([]string) error {
		attr := make([]byte, 72) // BPF_MAP_CREATE of an array with one element
		attr[0], attr[4], attr[8], attr[12] = 2, 4, 4, 1
		return call(unix.SYS_BPF, 0, uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))(nil)
	}, nil, false, false},
	{"kernel", "perf", func([]string) error {
		_, err := unix.PerfEventOpen(&unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{}))}, 0, -1, -1, 0)
		return err
	}, nil, false, false},
	{"kernel", "keyring", func([]string) error {
		_, err := unix.AddKey("user", "escape", []byte("x"), unix.KEY_SPEC_PROCESS_KEYRING)
		return err
	}, nil, false, false},
	{"kernel", "userfaultfd", call(unix.SYS_USERFAULTFD, 0), nil, false, false},
	{"kernel", "module", call(unix.SYS_FINIT_MODULE, ^uintptr(0), cstr(""), 0), []unix.Errno{unix.EBADF}, false, false},
	{"kernel", "reboot", call(unix.SYS_REBOOT, 1, 2, 3), []unix.Errno{unix.EINVAL}, false, false},
	{"kernel", "clock", call(unix.SYS_SETTIMEOFDAY, 0, 0), nil, false, false},
	{"kernel", "log", call(unix.SYS_SYSLOG, 3, cstr("xxxx"), 4), nil, false, false},
	{"kernel", "fanotify", call(unix.SYS_FANOTIFY_INIT, 0x4, 0), nil, false, false}, // FAN_CLASS_CONTENT

	{"exhaustion", "descriptors", func([]string) error {
		for range 4 * DefaultFiles {
			if _, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
				return err
			}
		}
		return nil
	}, nil, false, false},
	{"exhaustion", "inodes", func([]string) error {
		for i := range 3 * DefaultTmp / (16 << 10) {
			fd, err := unix.Open(fmt.Sprintf("/tmp/escape-%d", i), unix.O_CREAT|unix.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			unix.Close(fd)
		}
		return nil
	}, nil, true, false},
	{"exhaustion", "fill-disk", func([]string) error {
		f, err := tmpFile()
		if err != nil {
			return err
		}
		_, err = io.CopyN(f, zero{}, 2*DefaultTmp)
		return err
	}, nil, true, false},
	{"exhaustion", "processes", func([]string) error {
		for range 2 * DefaultPids {
			c := exec.Command("/bin/sleep", "100")
			if err := c.Start(); err != nil {
				return err
			}
		}
		return nil
	}, nil, true, false},
	{"exhaustion", "locked-memory", func([]string) error { return unix.Mlock(make([]byte, 8<<20)) }, nil, true, false},
}

type zero struct{}

func (zero) Read(p []byte) (int, error) { return len(p), nil }

func connectUnix(path string) error {
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	return err
}

// escapeArgs makes what the attempts aim at, and returns where it is.
func escapeArgs(t *testing.T, state string, s *Sandbox) []string {
	t.Helper()
	accept := func(network, addr string) string {
		ln, err := (&net.ListenConfig{}).Listen(context.Background(), network, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		return ln.Addr().String()
	}
	abstract := fmt.Sprintf("escape-%d", os.Getpid())
	accept("unix", "@"+abstract)
	file := state + "/wal"
	if err := os.WriteFile(file, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	return []string{
		argPID: strconv.Itoa(os.Getpid()), argTCP: accept("tcp4", "127.0.0.1:0"), argUnix: accept("unix", state+"/sock"), argAbs: abstract,
		argState: file, argDisk: disk(t), argCgroup: s.tree.Path + "/cgroup.procs",
	}
}

// disk is a block device of this machine.
func disk(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir("/sys/block")
	if err != nil || len(entries) == 0 {
		t.Fatalf("no block device: %v", err)
	}
	for _, e := range entries {
		if _, err := os.Stat("/dev/" + e.Name()); err == nil {
			return "/dev/" + e.Name()
		}
	}
	t.Fatal("no block device in /dev")
	return ""
}
