package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/assurance/cgroup"
	"github.com/autonomyops/autonomy/assurance/ebpf"
)

// Limits of one process and all that it starts. Zero means the default, or none
// where there is none.
type Limits struct {
	Memory int64  // bytes, page cache and /tmp included; no swap. The whole call is killed when it needs more
	Pids   int64  // processes and threads; 0: DefaultPids
	CPU    string // "quota period" in microseconds, as cpu.max
	IO     int64  // bytes a second read and written, each, on the devices of writable paths
	Tmp    int64  // bytes of /tmp; 0: DefaultTmp
	Files  uint64 // open descriptors of one process; 0: DefaultFiles
	File   uint64 // bytes of one file; 0: DefaultFile
}

// Defaults.
const (
	DefaultPids  = 256
	DefaultTmp   = 64 << 20
	DefaultFiles = 1024
	DefaultFile  = 1 << 30
)

// User is who a process runs as, beside the user of its own that it gets
// otherwise. It has no capabilities, whoever it is.
type User struct{ UID, GID uint32 }

// A Secret reaches the process as a descriptor of sealed memory. The variable
// Name holds its path, /proc/self/fd/N: the value is in no argument, variable
// or file.
type Secret struct {
	Name  string
	Value []byte
}

// Command is what to start and how to hold it.
type Command struct {
	Argv    []string // Argv[0] is an absolute path
	Env     []string // all of it
	Dir     string   // working directory; shown read-only unless FS says more. "": /
	Stdin   []byte   // nil: /dev/null
	Limits  Limits
	FS      []Path   // what may be seen beside the system's programs
	Egress  []string // "host:port", "[address]:port", "prefix:port"; empty: nothing
	Secrets []Secret
	User    *User // nil: a user of its own
}

// DrainDelay is how long Wait waits for the output pipes once the process has
// ended and everything that was found was killed: without a cgroup and without a
// pid namespace one that left its group may hold them open for ever.
const DrainDelay = 500 * time.Millisecond

// pressureAfter is how long a call must run for its pressure to be read: three
// files, and nothing in them for less.
const pressureAfter = 100 * time.Millisecond

// Process is a process that runs.
type Process struct {
	s      *Sandbox
	pid    int
	pidfd  int
	call   *cgroup.Call // nil: no cgroup
	watch  *ebpf.Watch  // nil: no gate
	net    int          // a network namespace to give back; -1: none
	uid    uint32       // to give back; 0: none
	stdout *os.File
	stderr *os.File
}

// Ended is how a process ended, and what it did on the way.
type Ended struct {
	Status   unix.WaitStatus
	Usage    Usage
	Refused  uint64         // attempts to reach what egress does not allow
	Refusals []ebpf.Refusal // the first of them
	Left     error          // not nil: not everything that the process started could be ended
}

// Usage is what a process and its children used.
type Usage struct {
	cgroup.Usage
	MaxRSS int64 // bytes, of the largest process that was waited for
}

// Start starts c. Its output is read through copies to stdout and stderr by
// Wait. An error wraps ErrBusy, ErrLayer, ErrPath, ErrEgress, ErrConfine or
// ErrExec, and nothing of c has run then.
func (s *Sandbox) Start(ctx context.Context, c *Command) (_ *Process, err error) {
	if names := s.Unenforceable(c.Limits, c.Egress, c.FS); len(names) > 0 {
		return nil, fmt.Errorf("%w: %s", ErrLayer, strings.Join(names, ", "))
	}
	reach, err := s.reach(ctx, c.Egress)
	if err != nil {
		return nil, err
	}
	where, view, err := s.visible(c, reach)
	if err != nil {
		return nil, err
	}
	p := &Process{s: s, pidfd: -1, net: -1}
	if err := s.admit(p); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			p.release(context.WithoutCancel(ctx))
		}
	}()
	if err := p.group(c, reach); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfine, err)
	}
	var open files
	defer open.close()
	script, flags, err := p.script(c, where, view, reach, &open)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfine, err)
	}
	into := -1
	if p.call != nil {
		into = p.call.FD()
	}
	p.pid, p.pidfd, err = fork(script, flags, into)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfine, err)
	}
	if err := script.err(); err != nil {
		_, _ = p.reap()
		if script.failed == len(script.ops)-1 {
			return nil, fmt.Errorf("%w: %w", ErrExec, err)
		}
		return nil, fmt.Errorf("%w: %w", ErrConfine, err)
	}
	p.stdout, p.stderr = open.reader("stdout", open.out), open.reader("stderr", open.err)
	return p, nil
}

// admit takes what there is a bounded number of.
func (s *Sandbox) admit(p *Process) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live >= s.o.MaxCalls || s.user && len(s.uids) == 0 { // users of processes that could not be killed stay taken
		return fmt.Errorf("%w: %d", ErrBusy, s.live)
	}
	s.live++
	if s.user {
		// The one that was free the longest: what the kernel counts for a user may
		// lag behind the end of its processes.
		p.uid = s.uids[0]
		s.uids = s.uids[1:]
	}
	if s.ns && !s.userns && len(s.nets) > 0 {
		p.net = s.nets[len(s.nets)-1]
		s.nets = s.nets[:len(s.nets)-1]
	}
	return nil
}

// group makes the cgroup with its limits and its egress.
func (p *Process) group(c *Command, r reach) (err error) {
	if p.s.tree == nil {
		return nil
	}
	var l cgroup.Limits
	has := func(name string) bool {
		return slices.Contains(p.s.tree.Controllers, name) && !slices.Contains(p.s.o.Off, LayerLimits)
	}
	if has("memory") {
		l.Memory = c.Limits.Memory
	}
	if has("pids") {
		l.Pids = pids(c.Limits)
	}
	if has("cpu") {
		l.CPU = c.Limits.CPU
	}
	if has("io") && c.Limits.IO > 0 {
		l.IO = c.Limits.IO
		if l.IODevs, err = devicesOf(c.FS); err != nil {
			return err
		}
	}
	if p.call, err = p.s.tree.New(l); err != nil {
		return err
	}
	if p.s.gate != nil {
		p.watch, err = p.s.gate.Allow(p.call.ID, r.dests)
	}
	return err
}

func pids(l Limits) int64 {
	if l.Pids > 0 {
		return l.Pids
	}
	return DefaultPids
}

// devicesOf are the disks behind writable paths, as io.max wants them: whole
// ones, since the kernel does not limit partitions.
func devicesOf(paths []Path) ([]string, error) {
	var out []string
	for _, p := range paths {
		if !p.Write {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(p.Path, &st); err != nil {
			return nil, fmt.Errorf("device of %s: %w", p.Path, err)
		}
		dev := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
		sys := "/sys/dev/block/" + dev
		if _, err := os.Stat(sys + "/partition"); err == nil {
			whole, err := os.ReadFile(sys + "/../dev")
			if err != nil {
				return nil, fmt.Errorf("disk of %s: %w", p.Path, err)
			}
			dev = strings.TrimSpace(string(whole))
		} else if unix.Major(st.Dev) == 0 {
			continue // no device: tmpfs, overlay
		}
		if !slices.Contains(out, dev) {
			out = append(out, dev)
		}
	}
	return out, nil
}

// place is where a process begins: paths as it sees them.
type place struct{ program, dir string }

// visible says what the process sees, and where it begins there.
func (s *Sandbox) visible(c *Command, r reach) (at place, v *viewSpec, err error) {
	if len(c.Argv) == 0 || !filepath.IsAbs(c.Argv[0]) {
		return place{}, nil, fmt.Errorf("%w: want the absolute path of a program", ErrExec)
	}
	at = place{c.Argv[0], "/"}
	if c.Dir != "" {
		at.dir = c.Dir
	}
	paths := slices.Clone(c.FS)
	covered := func(path string) bool {
		return seen(path) || slices.ContainsFunc(paths, func(p Path) bool { return inside(path, p.Path) })
	}
	if !covered(at.program) {
		if at.program, err = filepath.EvalSymlinks(at.program); err != nil {
			return place{}, nil, fmt.Errorf("%w: %w", ErrExec, err)
		}
		if !covered(at.program) {
			paths = append(paths, Path{Path: at.program})
		}
	}
	if at.dir != "/" && at.dir != "/tmp" && !covered(at.dir) {
		if at.dir, err = filepath.EvalSymlinks(at.dir); err != nil {
			return place{}, nil, fmt.Errorf("%w: working directory: %w", ErrExec, err)
		}
		if !covered(at.dir) {
			paths = append(paths, Path{Path: at.dir})
		}
	}
	hidden := s.o.Hidden
	if s.o.RunDir != "" {
		hidden = append(slices.Clone(hidden), s.o.RunDir)
	}
	v, err = newView(paths, hidden, r.hosts)
	return at, v, err
}

// files are the descriptors that a process is started with. Those of the parent
// are closed when it has started.
type files struct {
	fds      []int // to close
	out, err int   // read ends
}

func (f *files) close() {
	for _, fd := range f.fds {
		unix.Close(fd)
	}
}

// pipe returns the write end; the read end is polled, not waited for.
func (f *files) pipe(read *int) (int, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return -1, fmt.Errorf("pipe: %w", err)
	}
	f.fds = append(f.fds, p[0], p[1])
	*read = p[0]
	return p[1], unix.SetNonblock(p[0], true)
}

// reader keeps a read end past close.
func (f *files) reader(name string, fd int) *os.File {
	f.fds = slices.DeleteFunc(f.fds, func(x int) bool { return x == fd })
	return os.NewFile(uintptr(fd), name)
}

// memory is a sealed file of these bytes, read from its beginning.
func (f *files) memory(name string, b []byte) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, fmt.Errorf("memory for %s: %w", name, err)
	}
	f.fds = append(f.fds, fd)
	for rest := b; len(rest) > 0; {
		n, err := unix.Write(fd, rest)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return -1, fmt.Errorf("memory for %s: %w", name, err)
		}
		rest = rest[max(n, 0):]
	}
	if _, err := unix.Seek(fd, 0, 0); err != nil {
		return -1, fmt.Errorf("memory for %s: %w", name, err)
	}
	seals := unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return -1, fmt.Errorf("seal memory for %s: %w", name, err)
	}
	return fd, nil
}

// script is everything between birth and the program. The order matters: what
// takes privileges comes before they are given up, what would refuse a later
// step comes last.
func (p *Process) script(c *Command, at place, v *viewSpec, r reach, open *files) (*script, uint64, error) {
	s, sc := p.s, newScript()
	var flags uint64
	stdin := s.null
	var err error
	if c.Stdin != nil {
		if stdin, err = open.memory("stdin", c.Stdin); err != nil {
			return nil, 0, err
		}
	}
	stdout, err := open.pipe(&open.out)
	if err != nil {
		return nil, 0, err
	}
	stderr, err := open.pipe(&open.err)
	if err != nil {
		return nil, 0, err
	}
	env := slices.Clone(c.Env)
	var secrets []int
	for _, x := range c.Secrets {
		fd, err := open.memory(x.Name, x.Value)
		if err != nil {
			return nil, 0, err
		}
		secrets = append(secrets, fd)
		env = append(env, x.Name+"=/proc/self/fd/"+strconv.Itoa(fd))
	}
	rules := -1
	if s.abi > 0 {
		if rules, err = ruleset(s.abi, s.gate == nil, r.ports()); err != nil {
			return nil, 0, err
		}
		open.fds = append(open.fds, rules)
	}

	sc.add("begin a session", unix.SYS_SETSID)
	for to, from := range []int{stdin, stdout, stderr} {
		sc.add("pass a descriptor", unix.SYS_DUP3, uintptr(from), uintptr(to), 0)
	}
	if s.ns {
		flags |= nsFlags
		if s.userns {
			flags |= unix.CLONE_NEWUSER
			sc.mapSelf()
		}
		if len(r.dests) == 0 {
			if flags, err = p.lonely(sc, flags); err != nil {
				return nil, 0, err
			}
		}
		sc.add("set the host name", unix.SYS_SETHOSTNAME, sc.text("sandbox"), 7)
	}
	if s.view {
		if flags, err = p.look(sc, v, tmpOptions(or(c.Limits.Tmp, DefaultTmp)), flags, open); err != nil {
			return nil, 0, err
		}
	}
	if rules >= 0 {
		p.rules(sc, rules, v)
	}
	sc.add("enter "+at.dir, unix.SYS_CHDIR, sc.text(at.dir))
	p.surrender(sc, c)
	if rules >= 0 {
		sc.landlock(rules)
	}
	sc.add("close descriptors", unix.SYS_CLOSE_RANGE, 3, uintptr(^uint32(0)), unix.CLOSE_RANGE_CLOEXEC)
	for _, fd := range secrets {
		sc.add("pass a secret", unix.SYS_FCNTL, uintptr(fd), unix.F_SETFD, 0)
	}
	path, argv, envp := sc.text(at.program), sc.vector(c.Argv), sc.vector(env)
	if s.filtered {
		sc.seccomp(p.network(r))
	}
	sc.add("run "+at.program, unix.SYS_EXECVE, path, argv, envp)
	return sc, flags, nil
}

func or[T int64 | uint64](v, otherwise T) T {
	if v > 0 {
		return v
	}
	return otherwise
}

func (p *Process) network(r reach) network {
	switch {
	case len(r.dests) > 0:
		return connected
	case p.s.ns || p.s.gate != nil:
		return isolated
	}
	return localOnly
}

// lonely puts the process into a network namespace without interfaces. One that
// was used before is as good as new: no process is left in it, and none had the
// capabilities to leave anything else.
func (p *Process) lonely(sc *script, flags uint64) (uint64, error) {
	if p.s.userns {
		return flags | unix.CLONE_NEWNET, nil
	}
	if p.net < 0 {
		var err error
		if p.net, err = onThread("net", unix.CLONE_NEWNET, nil); err != nil {
			return 0, err
		}
	}
	sc.add("enter the network namespace", unix.SYS_SETNS, uintptr(p.net), unix.CLONE_NEWNET)
	return flags, nil
}

// look gives the process its view: a copy of a kept one, or one built on the
// spot where views cannot be kept (not root), or not shared (paths in /tmp).
func (p *Process) look(sc *script, v *viewSpec, tmp string, flags uint64, open *files) (uint64, error) {
	if p.s.userns || v.inTmp() {
		sc.build(p.s.stage, v, tmp)
		return flags | unix.CLONE_NEWNS, nil
	}
	ns, err := p.s.kept(v, open)
	if err != nil {
		return 0, err
	}
	sc.add("enter the view", unix.SYS_SETNS, uintptr(ns), unix.CLONE_NEWNS)
	sc.add("copy the view", unix.SYS_UNSHARE, unix.CLONE_NEWNS)
	sc.mountTmp("/tmp", tmp)
	sc.mountProc("/proc")
	return flags, nil
}

// kept returns a descriptor of the mount namespace of v, which is made the first
// time. When too many are kept, some other goes.
func (s *Sandbox) kept(v *viewSpec, open *files) (int, error) {
	key := v.key()
	s.building.Lock() // stage is one directory
	defer s.building.Unlock()
	s.mu.Lock()
	ns, ok := s.views[key]
	s.mu.Unlock()
	if !ok {
		var err error
		if ns, err = v.template(s.stage); err != nil {
			return -1, err
		}
		s.mu.Lock()
		for other, fd := range s.views {
			if len(s.views) < maxViews {
				break
			}
			unix.Close(fd)
			delete(s.views, other)
		}
		s.views[key] = ns
		s.mu.Unlock()
	}
	fd, err := unix.FcntlInt(uintptr(ns), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, fmt.Errorf("view: %w", err)
	}
	open.fds = append(open.fds, fd)
	return fd, nil
}

// rules are the Landlock rules. With a view, what is there is little and may be
// read; without, they are all that hides the rest of the host.
func (p *Process) rules(sc *script, rules int, v *viewSpec) {
	abi := p.s.abi
	if p.s.view {
		sc.allow(rules, abi, "/", llRead)
	} else {
		for _, f := range append([]string{"/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/hosts", "/etc/localtime"}, systemFiles...) {
			access := uint64(llRead)
			if info, err := os.Stat(f); err == nil && !info.IsDir() {
				access = unix.LANDLOCK_ACCESS_FS_READ_FILE
			}
			sc.allow(rules, abi, f, access)
		}
	}
	for _, d := range systemDirs {
		sc.allow(rules, abi, d, llRead|llExecute)
	}
	for _, d := range devices {
		sc.allow(rules, abi, "/dev/"+d, unix.LANDLOCK_ACCESS_FS_READ_FILE|unix.LANDLOCK_ACCESS_FS_WRITE_FILE|unix.LANDLOCK_ACCESS_FS_IOCTL_DEV)
	}
	if p.s.view {
		sc.allow(rules, abi, "/tmp", llRead|llWrite)
	}
	for _, e := range v.paths {
		access := uint64(llRead)
		switch {
		case e.hide:
			continue
		case e.Write:
			access |= llWrite
		default:
			access |= llExecute
		}
		if !e.dir {
			access &= llFile
		}
		sc.allow(rules, abi, e.Path.Path, access)
	}
}

// surrender sets what the process may use, and gives up what it has.
func (p *Process) surrender(sc *script, c *Command) {
	sc.rlimit("core dumps", unix.RLIMIT_CORE, 0)
	sc.rlimit("descriptors", unix.RLIMIT_NOFILE, or(c.Limits.Files, DefaultFiles))
	sc.rlimit("file size", unix.RLIMIT_FSIZE, or(c.Limits.File, DefaultFile))
	sc.rlimit("locked memory", unix.RLIMIT_MEMLOCK, 64<<10)
	sc.rlimit("message queues", unix.RLIMIT_MSGQUEUE, 64<<10)
	sc.rlimit("signals", unix.RLIMIT_SIGPENDING, 1024)
	if p.uid != 0 && c.User == nil || p.s.userns {
		sc.rlimit("processes", unix.RLIMIT_NPROC, uint64(pids(c.Limits))) // counted by user: this call's alone
	}
	if p.s.user {
		id := User{p.uid, p.uid}
		if c.User != nil {
			id = *c.User
		}
		if id.UID == 0 { // it would be given what the bounding set holds when it runs a program
			sc.emptyBounds()
		}
		sc.become(id.UID, id.GID)
	}
	if p.s.user || p.s.userns {
		sc.noCaps()
	}
	sc.noNewPrivs()
}

// Kill ends the process and all that it started. It does not wait.
func (p *Process) Kill() {
	if p.call != nil && p.call.Kill() == nil {
		return
	}
	_ = unix.PidfdSendSignal(p.pidfd, unix.SIGKILL, nil, 0) // takes its pid namespace along
	_ = unix.Kill(-p.pid, unix.SIGKILL)                     // its number is taken until it is reaped
}

// Wait copies the output until the process has ended, ends what it left behind,
// and lets go of everything. It is called once. At the end of ctx the process is
// killed.
func (p *Process) Wait(ctx context.Context, stdout, stderr func([]byte)) Ended {
	var copies sync.WaitGroup
	copies.Go(func() { drain(p.stdout, stdout) })
	copies.Go(func() { drain(p.stderr, stderr) })
	killed, began := make(chan struct{}), time.Now()
	stop := context.AfterFunc(ctx, func() { defer close(killed); p.Kill() })
	for {
		if err := unix.Waitid(unix.P_PID, p.pid, nil, unix.WEXITED|unix.WNOWAIT, nil); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if !stop() {
		<-killed
	}
	if p.call == nil {
		_ = unix.Kill(-p.pid, unix.SIGKILL) // what it left in its group; the zombie keeps the number
	}
	var e Ended
	e.Status, e.Usage = p.reap()
	if p.call != nil {
		e.Usage.Usage = p.call.Usage(time.Since(began) >= pressureAfter)
	}
	e.Refusals, e.Refused, e.Left = p.release(context.WithoutCancel(ctx))
	if !p.s.ns && p.call == nil {
		_ = p.stdout.SetReadDeadline(time.Now().Add(DrainDelay))
		_ = p.stderr.SetReadDeadline(time.Now().Add(DrainDelay))
	}
	copies.Wait()
	return e
}

// drain reads to the end. The program never waits for long: what the sink does
// not keep is dropped there.
func drain(f *os.File, sink func([]byte)) {
	defer f.Close()
	var buf [32 << 10]byte
	for {
		n, err := f.Read(buf[:])
		if n > 0 {
			sink(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// reap takes the process's end from the kernel.
func (p *Process) reap() (unix.WaitStatus, Usage) {
	var ws unix.WaitStatus
	var ru unix.Rusage
	for {
		if _, err := unix.Wait4(p.pid, &ws, 0, &ru); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	unix.Close(p.pidfd)
	p.pidfd = -1
	return ws, Usage{cgroup.Usage{CPU: time.Duration(ru.Utime.Nano() + ru.Stime.Nano())}, ru.Maxrss << 10}
}

// release gives back what the process held. The cgroup goes first: that it can
// be removed is the proof that nothing is left that could use the rest.
func (p *Process) release(ctx context.Context) (refusals []ebpf.Refusal, refused uint64, err error) {
	if p.call != nil {
		ctx, cancel := context.WithTimeout(ctx, removeTimeout)
		defer cancel()
		err = p.call.Remove(ctx)
	}
	if p.watch != nil && err == nil {
		var gerr error
		refusals, refused, gerr = p.s.gate.End(p.watch)
		if gerr != nil {
			p.s.log.Warn("the egress of a call is not cleared", "err", gerr)
		}
	}
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	p.s.live--
	if err != nil {
		if p.net >= 0 {
			unix.Close(p.net)
		}
		return refusals, refused, err // its user stays taken
	}
	if p.uid != 0 {
		p.s.uids = append(p.s.uids, p.uid)
	}
	if p.net >= 0 {
		if len(p.s.nets) < maxNets && !p.s.closed {
			p.s.nets = append(p.s.nets, p.net)
		} else {
			unix.Close(p.net)
		}
	}
	return refusals, refused, nil
}

// reach is what a process may connect to.
type reach struct {
	dests []ebpf.Dest
	hosts string // lines for /etc/hosts
}

func (r reach) ports() []uint16 {
	var out []uint16
	for _, d := range r.dests {
		if !slices.Contains(out, d.Port) {
			out = append(out, d.Port)
		}
	}
	return out
}

// own reports whether a destination covers an address of the node.
func (s *Sandbox) own(d ebpf.Dest) bool {
	if s.o.Own == nil {
		return false
	}
	return slices.ContainsFunc(s.o.Own(), func(a netip.AddrPort) bool {
		return a.Port() == d.Port && (d.Prefix.Contains(a.Addr().Unmap()) || a.Addr().IsUnspecified() && d.Prefix.Addr().IsLoopback())
	})
}
