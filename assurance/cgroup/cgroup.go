// Package cgroup makes, kills and removes cgroups of the v2 hierarchy, by the
// files that the kernel shows. It never writes to a v1 hierarchy, and never to a
// cgroup that it did not make.
//
// Life of a Group: Create → children enter it at birth by FD (clone3) → Kill →
// Remove. A killed group is not used again: kernels 6.1 to 6.18 kill at birth
// what enters one later.
package cgroup

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNone: no cgroup v2 hierarchy is mounted.
var ErrNone = errors.New("no cgroup v2 hierarchy is mounted")

// maxProc bounds what is read of a /proc file.
const maxProc = 1 << 20

// Parents returns the directories where this process may be able to make a
// cgroup, best first: its own cgroup (delegated by a service manager), then the
// root of each v2 mount. It returns ErrNone when there is no v2 mount.
func Parents() ([]string, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cgroup mounts: %w", err)
	}
	if len(mounts) > maxProc {
		mounts = mounts[:maxProc]
	}
	own := ""
	if b, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		own = ownPath(b)
	}
	var out []string
	add := func(dir string) {
		for _, have := range out {
			if have == dir {
				return
			}
		}
		out = append(out, dir)
	}
	points := v2Mounts(mounts)
	for _, m := range points {
		if own != "" && own != "/" {
			add(filepath.Join(m, own))
		}
	}
	for _, m := range points {
		add(m)
	}
	if len(out) == 0 {
		return nil, ErrNone
	}
	return out, nil
}

// v2Mounts finds the mount points of type cgroup2 in the text of mountinfo
// (proc_pid_mountinfo(5)).
func v2Mounts(mountinfo []byte) []string {
	var out []string
	sc := bufio.NewScanner(bytes.NewReader(mountinfo))
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		f := strings.Fields(before)
		if ok && strings.HasPrefix(after, "cgroup2 ") && len(f) >= 5 {
			out = append(out, unescape(f[4]))
		}
	}
	return out
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// ownPath finds the v2 line of /proc/self/cgroup: "0::/path".
func ownPath(b []byte) string {
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok && filepath.IsAbs(p) && !strings.Contains(p, "..") {
			return p
		}
	}
	return ""
}

// MountPrivate mounts the v2 hierarchy on a directory of its own, for a machine
// that has none mounted; it needs CAP_SYS_ADMIN. release unmounts and removes.
func MountPrivate() (dir string, release func() error, err error) {
	dir, err = os.MkdirTemp("", "autonomy-cgroup2-")
	if err != nil {
		return "", nil, fmt.Errorf("mount cgroup2: %w", err)
	}
	if err := unix.Mount("cgroup2", dir, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return "", nil, errors.Join(fmt.Errorf("mount cgroup2 on %s: %w", dir, err), os.Remove(dir))
	}
	return dir, func() error {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		return os.Remove(dir)
	}, nil
}

// Group is one cgroup that Create made.
type Group struct {
	Path string
	dir  *os.File
}

// prefix of the names that Create gives, before the pid of the maker.
const prefix = "autonomy-probe-"

// Create makes a cgroup under parent. Empty ones that a killed process left
// there are removed first.
func Create(parent string) (*Group, error) {
	sweep(parent)
	path := filepath.Join(parent, prefix+strconv.Itoa(os.Getpid())+"-"+rand.Text()[:8])
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	d, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the cgroup: %w", err), os.Remove(path))
	}
	return &Group{Path: path, dir: d}, nil
}

// sweep removes the cgroups of makers that are gone. The kernel refuses to
// remove one that has members.
func sweep(parent string) {
	old, err := filepath.Glob(filepath.Join(parent, prefix+"*"))
	if err != nil {
		return
	}
	for _, dir := range old {
		pid, err := strconv.Atoi(strings.SplitN(strings.TrimPrefix(filepath.Base(dir), prefix), "-", 2)[0])
		if err == nil && errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			_ = os.Remove(dir)
		}
	}
}

// FD is the descriptor for clone3 (syscall.SysProcAttr.CgroupFD).
func (g *Group) FD() int { return int(g.dir.Fd()) }

// Controllers lists what can be limited in the group.
func (g *Group) Controllers() ([]string, error) {
	b, err := os.ReadFile(filepath.Join(g.Path, "cgroup.controllers"))
	if err != nil {
		return nil, fmt.Errorf("cgroup controllers: %w", err)
	}
	return strings.Fields(string(b)), nil
}

// Has reports whether the process is in the group.
func (g *Group) Has(pid int) (bool, error) {
	b, err := os.ReadFile(filepath.Join(g.Path, "cgroup.procs"))
	if err != nil {
		return false, fmt.Errorf("cgroup members: %w", err)
	}
	for _, f := range strings.Fields(string(b)) {
		if f == strconv.Itoa(pid) {
			return true, nil
		}
	}
	return false, nil
}

// Kill sends SIGKILL to every member, also to those that fork meanwhile. It
// does not wait. The group must not be entered again.
func (g *Group) Kill() error {
	f, err := os.OpenFile(filepath.Join(g.Path, "cgroup.kill"), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("kill the cgroup: %w", err)
	}
	defer f.Close()
	if _, err := f.WriteString("1"); err != nil {
		return fmt.Errorf("kill the cgroup: %w", err)
	}
	return nil
}

// Remove waits until the group has no member and removes it.
func (g *Group) Remove(ctx context.Context) error {
	for {
		err := os.Remove(g.Path)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return g.dir.Close()
		}
		if !errors.Is(err, unix.EBUSY) {
			return errors.Join(fmt.Errorf("remove the cgroup: %w", err), g.dir.Close())
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("remove the cgroup %s: it still has members: %w", g.Path, err), g.dir.Close())
		case <-time.After(200 * time.Microsecond):
		}
	}
}
