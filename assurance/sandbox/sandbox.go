package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/assurance/cgroup"
	"github.com/autonomyops/autonomy/assurance/confine"
	"github.com/autonomyops/autonomy/assurance/ebpf"
)

// Layers of a sandbox, outermost first.
const (
	LayerCgroup     = "cgroup"     // a cgroup of its own: stopped as a whole, counted
	LayerLimits     = "limits"     // memory, pids, cpu, io by the cgroup's controllers
	LayerNamespaces = "namespaces" // pid, ipc, uts and, without egress, net
	LayerView       = "view"       // a mount namespace that holds only what the call may see
	LayerUser       = "user"       // a user id of its own, without capabilities
	LayerEgress     = "egress"     // eBPF programs at connect, send and bind
	LayerLandlock   = "landlock"   // files, TCP ports, signals, abstract sockets
	LayerSeccomp    = "seccomp"    // a list of system calls
)

// LayerNames are all of them, in order.
var LayerNames = []string{LayerCgroup, LayerLimits, LayerNamespaces, LayerView, LayerUser, LayerEgress, LayerLandlock, LayerSeccomp}

// A Layer tells whether it was tried and works.
type Layer struct {
	Name   string `json:"name"`
	On     bool   `json:"on"`
	Detail string `json:"detail"` // what it gives here, or why it is off
}

// Limits of a Sandbox.
const (
	DefaultMaxCalls = 1024       // processes at one time
	uidBase         = 0x70000000 // first user id of calls: 1879048192, above what distributions and containers hand out
	uidBits         = 17         // log2 of the user ids that one sandbox has; there are 256 such ranges, chosen by RunDir
	spareUsers      = 64         // users beyond MaxCalls, so that none is used again at once
	maxViews        = 64         // mount namespaces kept for calls to come
	maxNets         = 32         // the same of empty network namespaces
	removeTimeout   = 5 * time.Second
)

// Options of Open.
type Options struct {
	RunDir   string                  // a directory of this sandbox's own, 0700, which must exist: mount points, pins. Absolute
	Hidden   []string                // files and directories that no process sees: the node's own
	Own      func() []netip.AddrPort // addresses of the node, which no process reaches; nil: none
	MaxCalls int                     // processes at one time, at most 65536; 0: DefaultMaxCalls
	Off      []string                // layers that are left off; for tests and diagnosis
	Logger   *slog.Logger            // nil: nothing is logged
}

// Sandbox starts processes. It is safe for concurrent use.
type Sandbox struct {
	o      Options
	log    *slog.Logger
	layers []Layer
	stage  string // where views are put together, in mount namespaces of their own
	lock   *os.File
	null   int // /dev/null

	tree     *cgroup.Tree // nil: off
	gate     *ebpf.Gate   // nil: off
	abi      int          // of Landlock; 0: off
	filtered bool         // seccomp
	ns       bool
	view     bool
	user     bool // calls get user ids
	userns   bool // namespaces take a user namespace first: not root

	building sync.Mutex // held while a view is put together on stage

	mu     sync.Mutex     // guards what follows
	uids   []uint32       // free
	views  map[string]int // by viewSpec.key: descriptor of a mount namespace
	nets   []int          // free network namespaces
	live   int
	closed bool
}

// Errors that callers branch on. Each is wrapped with what went wrong.
var (
	ErrBusy    = errors.New("too many processes in the sandbox")
	ErrLayer   = errors.New("this platform cannot keep a limit of the call")
	ErrConfine = errors.New("the process could not be confined, and was not started")
	ErrExec    = errors.New("the program could not be started")
	ErrEgress  = errors.New("destination cannot be given to a sandbox")
)

// Plain is a sandbox without layers: a process group, and a clean table of
// descriptors. Every limit is refused.
func Plain() *Sandbox {
	s, err := Open(context.Background(), Options{Off: LayerNames})
	if err != nil {
		panic(err) // opens /dev/null, nothing else
	}
	return s
}

// Open tries each layer by doing what it does, and keeps those that work. It
// fails only when RunDir cannot be used, or another Sandbox holds it. What an
// earlier process left in RunDir is taken over: its calls are killed, its
// egress programs are never away.
func Open(ctx context.Context, o Options) (_ *Sandbox, err error) {
	s := &Sandbox{o: o, log: o.Logger, null: -1, views: map[string]int{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.o.MaxCalls <= 0 {
		s.o.MaxCalls = DefaultMaxCalls
	}
	s.o.MaxCalls = min(s.o.MaxCalls, 1<<16)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.null, err = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("sandbox: /dev/null: %w", err)
	}
	if o.RunDir != "" {
		if err := s.hold(); err != nil {
			return nil, err
		}
	}
	for _, l := range []struct {
		name string
		try  func(context.Context) (string, error)
	}{
		{LayerCgroup, s.tryCgroup}, {LayerLimits, s.tryLimits}, {LayerNamespaces, s.tryNamespaces}, {LayerView, s.tryView},
		{LayerUser, s.tryUser}, {LayerEgress, s.tryEgress}, {LayerLandlock, s.tryLandlock}, {LayerSeccomp, s.trySeccomp},
	} {
		detail, err := "switched off", errors.New("off")
		if !slices.Contains(o.Off, l.name) {
			if detail, err = l.try(ctx); err != nil {
				detail = err.Error()
			}
		}
		s.layers = append(s.layers, Layer{l.name, err == nil, detail})
	}
	return s, nil
}

// Layers tells what works here.
func (s *Sandbox) Layers() []Layer { return slices.Clone(s.layers) }

// has reports whether the layer works.
func (s *Sandbox) has(layer string) bool {
	return slices.ContainsFunc(s.layers, func(l Layer) bool { return l.Name == layer && l.On })
}

// hold takes the run directory.
func (s *Sandbox) hold() error {
	if !filepath.IsAbs(s.o.RunDir) {
		return fmt.Errorf("sandbox: run directory %q: want an absolute path", s.o.RunDir)
	}
	f, err := os.OpenFile(filepath.Join(s.o.RunDir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		var pid [16]byte
		n, _ := f.ReadAt(pid[:], 0)
		return errors.Join(fmt.Errorf("sandbox: %s is held by another process (pid %s): %w", s.o.RunDir, pid[:n], err), f.Close())
	}
	s.lock = f
	if err := errors.Join(f.Truncate(0), func() error { _, err := f.WriteAt(fmt.Append(nil, os.Getpid()), 0); return err }()); err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	s.stage = filepath.Join(s.o.RunDir, "root")
	if err := os.Mkdir(s.stage, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("sandbox: %w", err)
	}
	return nil
}

// number tells this sandbox from others on the machine, by its run directory.
func (s *Sandbox) number() []byte {
	sum := sha256.Sum256([]byte(s.o.RunDir))
	return sum[:6]
}

var errNoRunDir = errors.New("no run directory is given")

func (s *Sandbox) tryCgroup(ctx context.Context) (string, error) {
	if s.o.RunDir == "" {
		return "", errNoRunDir
	}
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	tree, err := cgroup.OpenTree(ctx, hex.EncodeToString(s.number()))
	if err != nil {
		return "", err
	}
	c, err := tree.New(cgroup.Limits{})
	if err == nil {
		err = errors.Join(s.attempt(exits(), 0, c.FD()), c.Remove(ctx))
	}
	if err != nil {
		return "", errors.Join(err, tree.Close())
	}
	s.tree = tree
	return "below " + tree.Path, nil
}

func (s *Sandbox) tryLimits(context.Context) (string, error) {
	switch {
	case s.tree == nil:
		return "", errors.New("there is no cgroup to limit")
	case len(s.tree.Controllers) == 0:
		return "", errors.New(s.tree.Missing)
	case s.tree.Missing != "":
		return "", fmt.Errorf("only %s: %s", strings.Join(s.tree.Controllers, ", "), s.tree.Missing)
	}
	return strings.Join(s.tree.Controllers, ", "), nil
}

const nsFlags = unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

func (s *Sandbox) tryNamespaces(context.Context) (string, error) {
	err := s.attempt(exits(), nsFlags|unix.CLONE_NEWNET, -1)
	if err == nil {
		s.ns = true
		return "pid, ipc, uts, net", nil
	}
	own := newScript()
	own.mapSelf()
	own.exit()
	if uerr := s.attempt(own, nsFlags|unix.CLONE_NEWNET|unix.CLONE_NEWUSER, -1); uerr != nil {
		return "", errors.Join(err, uerr)
	}
	s.ns, s.userns = true, true
	return "user, pid, ipc, uts, net", nil
}

func (s *Sandbox) tryView(context.Context) (string, error) {
	switch {
	case !s.ns:
		return "", errors.New("there are no namespaces")
	case s.stage == "":
		return "", errNoRunDir
	}
	v, err := newView(nil, nil, "")
	if err != nil {
		return "", err
	}
	if !s.userns {
		fd, err := v.template(s.stage)
		if err != nil {
			return "", err
		}
		s.views[v.key()] = fd
		s.view = true
		return "kept views, entered and copied", nil
	}
	own := newScript()
	own.mapSelf()
	own.build(s.stage, v, tmpOptions(1<<20))
	own.exit()
	if err := s.attempt(own, nsFlags|unix.CLONE_NEWUSER|unix.CLONE_NEWNS, -1); err != nil {
		return "", err
	}
	s.view = true
	return "built for each call", nil
}

func (s *Sandbox) tryUser(context.Context) (string, error) {
	first := uint32(uidBase)
	if s.o.RunDir != "" {
		first += uint32(s.number()[0]) << uidBits
	}
	try := newScript()
	try.become(first, first)
	try.exit()
	if err := s.attempt(try, 0, -1); err != nil {
		if s.userns {
			return "", errors.New("the node's own user: only root can give calls users of their own")
		}
		return "", err
	}
	s.user = true
	for i := range s.o.MaxCalls + spareUsers {
		s.uids = append(s.uids, first+uint32(i))
	}
	return fmt.Sprintf("from %d, one for each running call", first), nil
}

// bpfMagic is BPF_FS_MAGIC.
const bpfMagic = 0xcafe4a11

func (s *Sandbox) tryEgress(context.Context) (string, error) {
	if s.tree == nil {
		return "", errors.New("there is no cgroup to attach to")
	}
	dir := filepath.Join(s.o.RunDir, "bpf")
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", err
	}
	if uint32(st.Type) != bpfMagic {
		if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return "", fmt.Errorf("mount a bpffs: %w", err)
		}
	}
	gate, err := ebpf.OpenGate(s.tree.Path, dir)
	if err != nil {
		return "", err
	}
	s.gate = gate
	return "connect, send and bind, for IPv4 and IPv6; pinned in " + dir, nil
}

func (s *Sandbox) tryLandlock(context.Context) (string, error) {
	abi, err := confine.LandlockABI()
	if err != nil {
		return "", err
	}
	rules, err := ruleset(abi, true, nil)
	if err != nil {
		return "", err
	}
	defer unix.Close(rules)
	try := newScript()
	try.noNewPrivs()
	try.landlock(rules)
	try.refuses("landlock refused nothing", unix.SYS_OPENAT, unix.EACCES, atCWD, try.text("/etc"), unix.O_RDONLY|unix.O_DIRECTORY)
	try.exit()
	if err := s.attempt(try, 0, -1); err != nil {
		return "", err
	}
	s.abi = abi
	return fmt.Sprintf("ABI %d", abi), nil
}

func (s *Sandbox) trySeccomp(context.Context) (string, error) {
	try := newScript()
	try.noNewPrivs()
	try.seccomp(connected)
	try.refuses("seccomp refused nothing", unix.SYS_SOCKET, unix.EPERM, unix.AF_NETLINK, unix.SOCK_RAW)
	try.exit()
	if err := s.attempt(try, 0, -1); err != nil {
		return "", err
	}
	s.filtered = true
	return fmt.Sprintf("%d calls are allowed", len(allowed)+len(checked(isolated))), nil
}

// attempt runs a script that ends by itself.
func (s *Sandbox) attempt(try *script, flags uint64, cgroup int) error {
	pid, pidfd, err := fork(try, flags, cgroup)
	if err != nil {
		return err
	}
	unix.Close(pidfd)
	var ws unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &ws, 0, nil); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err := try.err(); err != nil {
		return err
	}
	if ws.ExitStatus() != 0 {
		return fmt.Errorf("a process that tries it ended with %v", ws)
	}
	return nil
}

func exits() *script {
	s := newScript()
	s.exit()
	return s
}

func (s *script) exit() { s.add("exit", unix.SYS_EXIT_GROUP, 0) }

// refuses adds a call that must fail with errno; success is the failure named
// what.
func (s *script) refuses(what string, nr uintptr, errno syscall.Errno, args ...uintptr) {
	o := s.add(what, nr, args...)
	o.pass, o.skip = errno, true
	s.add(what, ^uintptr(0)) // no such call: ENOSYS
}

// Unenforceable names the limits that this sandbox cannot keep.
func (s *Sandbox) Unenforceable(l Limits, egress []string, fs []Path) []string {
	var names []string
	has := func(controller string) bool {
		return s.tree != nil && slices.Contains(s.tree.Controllers, controller) && !slices.Contains(s.o.Off, LayerLimits)
	}
	for _, x := range []struct {
		name       string
		set, keeps bool
	}{
		{"memory_max", l.Memory > 0, has("memory")},
		{"pids_max", l.Pids > 0, has("pids") || s.user || s.userns},
		{"cpu_max", l.CPU != "", has("cpu")},
		{"io_max", l.IO > 0, has("io")},
		{"egress", egress != nil && len(egress) == 0, s.ns || s.gate != nil || s.filtered},
		{"egress", len(egress) > 0, s.gate != nil},
		{"fs", fs != nil, s.view || s.abi > 0},
	} {
		if x.set && !x.keeps {
			names = append(names, x.name)
		}
	}
	return names
}

// Sweep removes what Sandboxes left in the directories below base whose owner,
// the directory that the file "owner" in each names, is gone: a killed process
// leaves pinned programs and a cgroup behind, for its next start to take over,
// and for nobody if there is none. Those that are held are left alone.
func Sweep(ctx context.Context, base string, log *slog.Logger) {
	dirs, err := filepath.Glob(filepath.Join(base, "*", ownerFile))
	if err != nil {
		return
	}
	for _, file := range dirs {
		owner, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if _, err := os.Stat(string(owner)); !errors.Is(err, os.ErrNotExist) {
			continue
		}
		dir := filepath.Dir(file)
		s, err := Open(ctx, Options{RunDir: dir, Off: []string{LayerNamespaces, LayerView, LayerUser, LayerLandlock, LayerSeccomp}})
		if err == nil {
			err = errors.Join(s.Close(), os.RemoveAll(dir))
		}
		if err != nil {
			log.Warn("what a sandbox left is not removed", "dir", dir, "err", err)
		}
	}
}

const ownerFile = "owner"

// MakeRunDir makes the run directory of owner, a directory, below base.
func MakeRunDir(base, owner string) (string, error) {
	sum := sha256.Sum256([]byte(owner))
	dir := filepath.Join(base, hex.EncodeToString(sum[:6]))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("sandbox: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, ownerFile), []byte(owner), 0o600); err != nil {
		return "", fmt.Errorf("sandbox: %w", err)
	}
	return dir, nil
}

// Close lets go of everything. Processes must have ended. What is pinned stays
// when close is not reached.
func (s *Sandbox) Close() error {
	var errs []error
	s.mu.Lock()
	if s.live > 0 {
		errs = append(errs, fmt.Errorf("sandbox: closed with %d processes in it", s.live))
	}
	for _, fd := range s.views {
		unix.Close(fd)
	}
	for _, fd := range s.nets {
		unix.Close(fd)
	}
	s.views, s.nets, s.closed = nil, nil, true
	s.mu.Unlock()
	if s.gate != nil {
		errs = append(errs, s.gate.Remove(), unix.Unmount(filepath.Join(s.o.RunDir, "bpf"), unix.MNT_DETACH), os.Remove(filepath.Join(s.o.RunDir, "bpf")))
	}
	if s.tree != nil {
		errs = append(errs, s.tree.Close())
	}
	if s.null >= 0 {
		unix.Close(s.null)
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}
