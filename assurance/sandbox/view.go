package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Path is a file or directory of the host that a process may see.
type Path struct {
	Path  string // absolute, clean, without symbolic links
	Write bool
}

// viewSpec says what a process sees of the file system: the system's programs
// and libraries, a few made-up files of /etc, harmless devices, and paths. The
// rest of the host is not there. /tmp and /proc are each process's own and come
// later.
type viewSpec struct {
	paths []entry // sorted; a path stands before what lies in it
	hosts string  // lines of /etc/hosts beside localhost
}

type entry struct {
	Path
	dir  bool
	hide bool      // an empty directory, or an empty device, takes its place
	file [2]uint64 // device and inode: a path that names another file now makes another view
}

func (v *viewSpec) key() string {
	var b strings.Builder
	for _, p := range v.paths {
		fmt.Fprintf(&b, "%t%t%t%d%q", p.Write, p.dir, p.hide, p.file, p.Path.Path)
	}
	return b.String() + v.hosts
}

// systemDirs are seen read-only by every process, as the host has them: a
// directory, or the symbolic link of a merged /usr.
var systemDirs = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"}

// systemFiles of /etc are seen read-only if they are there: directories as they
// are, files as copies of at most maxCopy bytes. None holds a secret.
var systemFiles = []string{"/etc/alternatives", "/etc/ld.so.cache", "/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/pki/tls/certs",
	"/etc/protocols", "/etc/services", "/etc/mime.types"}

const maxCopy = 256 << 10

// devices are what a program may expect; all are made by the kernel's memory
// driver and lead nowhere.
var devices = []string{"null", "zero", "full", "random", "urandom"}

// never are paths that no configuration can make visible.
var never = []string{"/", "/proc", "/sys", "/dev", "/etc/shadow", "/etc/gshadow"}

// ErrPath is wrapped by errors about paths that cannot be made visible.
var ErrPath = errors.New("path cannot be given to a sandbox")

// Check tells what can be told of p without the file system.
func (p Path) Check() error {
	switch {
	case !filepath.IsAbs(p.Path) || filepath.Clean(p.Path) != p.Path || strings.ContainsRune(p.Path, 0):
		return fmt.Errorf("%w: %q is not an absolute, clean path", ErrPath, p.Path)
	case slices.Contains(never, p.Path), inside(p.Path, "/proc"), inside(p.Path, "/sys"), inside(p.Path, "/dev"):
		return fmt.Errorf("%w: %s is the kernel's, or everything", ErrPath, p.Path)
	}
	return nil
}

// NarrowPaths keeps of each list what the other covers: what both allow.
func NarrowPaths(have, want []Path) []Path {
	out := []Path{}
	for _, h := range have {
		for _, w := range want {
			if p := (Path{w.Path, h.Write && w.Write}); inside(w.Path, h.Path) {
				out = append(out, p)
			} else if inside(h.Path, w.Path) {
				p.Path = h.Path
				out = append(out, p)
			}
		}
	}
	return out
}

func inside(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}

// newView checks paths against the host. hidden are files and directories that
// no process sees, whatever the paths say: the node's own.
func newView(paths []Path, hidden []string, hosts string) (*viewSpec, error) {
	v := &viewSpec{hosts: hosts}
	for _, p := range paths {
		if err := p.Check(); err != nil {
			return nil, err
		}
		if slices.ContainsFunc(hidden, func(h string) bool { return inside(p.Path, h) }) {
			return nil, fmt.Errorf("%w: %s is the node's own", ErrPath, p.Path)
		}
		real, err := filepath.EvalSymlinks(p.Path)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrPath, err)
		}
		if real != p.Path {
			return nil, fmt.Errorf("%w: %s is a symbolic link: name %s", ErrPath, p.Path, real)
		}
		info, err := os.Stat(p.Path)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrPath, err)
		}
		if m := info.Mode(); !m.IsDir() && !m.IsRegular() {
			return nil, fmt.Errorf("%w: %s is neither a file nor a directory", ErrPath, p.Path)
		}
		st, _ := info.Sys().(*syscall.Stat_t)
		v.paths = append(v.paths, entry{p, info.IsDir(), false, [2]uint64{st.Dev, st.Ino}})
		for _, h := range hidden {
			if i, err := os.Lstat(h); err == nil && info.IsDir() && inside(h, p.Path) {
				v.paths = append(v.paths, entry{Path: Path{h, false}, dir: i.IsDir(), hide: true})
			}
		}
	}
	slices.SortFunc(v.paths, func(a, b entry) int { return strings.Compare(a.Path.Path, b.Path.Path) })
	v.paths = slices.CompactFunc(v.paths, func(a, b entry) bool { return a.Path.Path == b.Path.Path && a.hide == b.hide })
	return v, nil
}

// seen reports whether the system directories show path anyway.
func seen(path string) bool {
	return slices.ContainsFunc(systemDirs, func(d string) bool { return inside(path, d) })
}

const etcPasswd = "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"

// build adds the calls that make the view on stage, an empty directory, and
// make it the root of the mount namespace that the caller has just entered. It
// ends in the new root, which is read-only but for the paths.
//
// With tmp, /tmp and /proc are mounted here too, so that paths inside /tmp can be
// shown, and without privileges; else the caller mounts them on top.
func (s *script) build(stage string, v *viewSpec, tmp string) {
	at := func(path string) string { return stage + path }
	s.mount("keep mounts to the sandbox", "", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	s.mount("mount the root", "autonomy", stage, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=4m,nr_inodes=4096")
	for _, d := range []string{"/etc", "/dev", "/proc", "/tmp", "/run", "/var"} {
		s.mkdir(at(d))
	}
	if tmp != "" {
		s.mountTmp(at("/tmp"), tmp)
	}
	for _, d := range systemDirs {
		info, err := os.Lstat(d)
		if err != nil {
			continue
		}
		if info.Mode()&os.ModeSymlink != 0 {
			if target, err := os.Readlink(d); err == nil {
				s.symlink(target, at(d))
			}
			continue
		}
		s.mkdir(at(d))
		s.mount("show "+d, d, at(d), "", unix.MS_BIND|unix.MS_REC, "")
	}
	s.file(at("/etc/passwd"), []byte(etcPasswd))
	s.file(at("/etc/group"), []byte("root:x:0:\nnogroup:x:65534:\n"))
	s.file(at("/etc/nsswitch.conf"), []byte("passwd: files\ngroup: files\nhosts: files\n"))
	s.file(at("/etc/hosts"), []byte("127.0.0.1 localhost\n::1 localhost\n"+v.hosts))
	for _, f := range systemFiles {
		info, err := os.Stat(f)
		if err != nil || slices.ContainsFunc(v.paths, func(e entry) bool { return inside(f, e.Path.Path) }) {
			continue
		}
		if info.IsDir() {
			s.mountPoint(stage, f, true)
			s.mount("show "+f, f, at(f), "", unix.MS_BIND, "")
		} else if b, err := os.ReadFile(f); err == nil && len(b) <= maxCopy { // fewer mounts to copy for each call
			s.parents(stage, f)
			s.file(at(f), b)
		}
	}
	for _, d := range devices {
		s.mountPoint(stage, "/dev/"+d, false)
	}
	for i, e := range v.paths {
		if e.hide || seen(e.Path.Path) && !e.Write {
			continue
		}
		if above := slices.ContainsFunc(v.paths[:i], func(p entry) bool { return inside(e.Path.Path, p.Path.Path) }); !above && !seen(e.Path.Path) {
			s.mountPoint(stage, e.Path.Path, e.dir)
		}
		if !e.Write {
			s.show(stage, e)
		}
	}
	// Links come last: until the root is entered, they lead to the host's paths.
	s.symlink("/tmp", at("/var/tmp"))
	s.symlink("/tmp", at("/dev/shm"))
	for name, target := range map[string]string{"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"} {
		s.symlink("/proc/self/fd"+target, at("/dev/"+name))
	}
	if zone, err := os.Readlink("/etc/localtime"); err == nil && filepath.IsAbs(zone) {
		s.symlink(zone, at("/etc/localtime"))
	}
	s.attributes("make the view read-only", stage, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV, true)
	if tmp != "" {
		s.attributes("make /tmp writable", at("/tmp"), 0, false, unix.MOUNT_ATTR_RDONLY)
		s.mountProc(at("/proc"))
	}
	for _, e := range v.paths {
		switch {
		case e.hide && !e.dir:
			s.mount("hide "+e.Path.Path, "/dev/null", at(e.Path.Path), "", unix.MS_BIND, "")
		case e.hide:
			s.mount("hide "+e.Path.Path, "autonomy", at(e.Path.Path), "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=000,size=4k,nr_inodes=2")
		case e.Write:
			s.show(stage, e)
			s.attributes("restrict "+e.Path.Path, at(e.Path.Path), unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC, true)
		}
	}
	for _, d := range devices {
		s.mount("show /dev/"+d, "/dev/"+d, at("/dev/"+d), "", unix.MS_BIND, "")
		s.attributes("restrict /dev/"+d, at("/dev/"+d), unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC, false)
	}
	s.add("enter the root", unix.SYS_CHDIR, s.text(stage))
	s.add("pivot_root", unix.SYS_PIVOT_ROOT, s.text("."), s.text("."))
	s.add("leave the old root", unix.SYS_UMOUNT2, s.text("."), unix.MNT_DETACH)
	s.add("chdir /", unix.SYS_CHDIR, s.text("/"))
}

// mountTmp mounts a process's own /tmp; options bound its bytes and inodes.
func (s *script) mountTmp(path, options string) {
	s.mount("mount /tmp", "autonomy", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options)
}

// inTmp reports whether a path of the view lies in /tmp.
func (v *viewSpec) inTmp() bool {
	return slices.ContainsFunc(v.paths, func(e entry) bool { return inside(e.Path.Path, "/tmp") })
}

// parents makes the directories above path.
func (s *script) parents(stage, path string) {
	for i := 1; i < len(path); i++ {
		if path[i] == '/' {
			s.mkdir(stage + path[:i])
		}
	}
}

// mountPoint makes path below stage, and the directories above it.
func (s *script) mountPoint(stage, path string, dir bool) {
	s.parents(stage, path)
	if dir {
		s.mkdir(stage + path)
		return
	}
	s.add("make "+path, unix.SYS_MKNODAT, atCWD, s.text(stage+path), unix.S_IFREG|0o644).pass = unix.EEXIST
}

// show binds a path of the host to the same path below stage. No symbolic link
// on the way is followed: a process with a writable directory could have put
// one there since the path was checked.
func (s *script) show(stage string, e entry) {
	what, path := "show "+e.Path.Path, e.Path.Path
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS}
	s.keep = append(s.keep, how)
	s.add(what, unix.SYS_OPENAT2, atCWD, s.text(path), uintptr(unsafe.Pointer(how)), unsafe.Sizeof(*how)).into = 1
	tree := s.add(what, unix.SYS_OPEN_TREE, 0, s.text(""), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	tree.reg, tree.into = 1, 2
	s.add(what, unix.SYS_CLOSE).reg = 1
	s.add(what, unix.SYS_MOVE_MOUNT, 0, s.text(""), atCWD, s.text(stage+path), unix.MOVE_MOUNT_F_EMPTY_PATH).reg = 2
	s.add(what, unix.SYS_CLOSE).reg = 2
}

// template makes the view in a mount namespace that no process is in, and
// returns a descriptor of it. A process enters it and takes a copy, which costs
// a fraction of building it. It takes CAP_SYS_ADMIN in the host's user
// namespace.
func (v *viewSpec) template(stage string) (fd int, err error) {
	s := newScript()
	s.build(stage, v, "")
	return onThread("mnt", unix.CLONE_NEWNS|unix.CLONE_FS, s)
}

// onThread makes a namespace of the kind, runs s in it and returns its
// descriptor. The thread that does it ends with it.
func onThread(kind string, flags int, s *script) (int, error) {
	type result struct {
		fd  int
		err error
	}
	var spawn func(chan<- result)
	spawn = func(done chan<- result) {
		runtime.LockOSThread() // for ever: the runtime ends the thread with its goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread would outlive its goroutine. It is taken until
			// another has done the work.
			defer runtime.UnlockOSThread()
			again := make(chan result, 1)
			go spawn(again)
			done <- <-again
			return
		}
		fd := -1
		err := unix.Unshare(flags)
		if err == nil {
			fd, err = unix.Open("/proc/thread-self/ns/"+kind, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		if err == nil && s != nil {
			err = s.runOnThread()
		}
		if err != nil && fd >= 0 {
			unix.Close(fd)
		}
		done <- result{fd, err}
	}
	done := make(chan result, 1)
	go spawn(done)
	r := <-done
	if r.err != nil {
		return -1, fmt.Errorf("make a %s namespace: %w", kind, r.err)
	}
	return r.fd, nil
}
