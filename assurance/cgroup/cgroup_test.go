package cgroup

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/testutil"
)

func TestMountinfo(t *testing.T) {
	const text = `22 1 0:20 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
30 22 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 master:3 - cgroup2 cgroup2 rw
31 22 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
32 22 0:27 / /mnt/a\040b\134c rw - cgroup2 none rw
33 22 0:27 / /cgroup2 rw - ext4 cgroup2 rw
34 22 0:27
broken - cgroup2 x
`
	if got, want := v2Mounts([]byte(text)), []string{"/sys/fs/cgroup/unified", `/mnt/a b\c`}; !slices.Equal(got, want) {
		t.Errorf("mounts %q, want %q", got, want)
	}
}

func TestOwnPath(t *testing.T) {
	for text, want := range map[string]string{
		"0::/\n": "/", "12:pids:/a\n0::/system.slice/x.service\n": "/system.slice/x.service",
		"1:cpu:/a\n": "", "": "", "0::relative\n": "", "0::/../../x\n": "",
	} {
		if got := ownPath([]byte(text)); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// parent is a place where a cgroup can be made.
func parent(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		testutil.Missing(t, "root, to make cgroups", "run as root")
	}
	parents, err := Parents()
	if errors.Is(err, ErrNone) {
		dir, release, err := MountPrivate()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := release(); err != nil {
				t.Error(err)
			}
		})
		return dir
	}
	if err != nil {
		t.Fatal(err)
	}
	return parents[len(parents)-1]
}

// TestKill puts a program that forks, changes its session and ignores SIGTERM
// into a cgroup, and wants nothing of it left.
func TestKill(t *testing.T) {
	g, err := Create(parent(t))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `trap '' TERM; setsid sleep 100 & sleep 100 & echo started; wait`)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: g.FD()}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 16)); err != nil {
		t.Error(err)
	}
	if in, err := g.Has(cmd.Process.Pid); err != nil || !in {
		t.Errorf("member %v, %v", in, err)
	}
	if in, err := g.Has(os.Getpid()); err != nil || in {
		t.Errorf("the test itself is a member: %v, %v", in, err)
	}
	if _, err := g.Controllers(); err != nil {
		t.Error(err)
	}
	busy, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if err := (&Group{Path: g.Path, dir: must(os.Open(g.Path))}).Remove(busy); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a group with members is removed: %v", err)
	}
	if err := g.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // says that it was killed
	ctx, stop := context.WithTimeout(t.Context(), 2*time.Second)
	defer stop()
	if err := g.Remove(ctx); err != nil {
		t.Errorf("members are left: %v", err)
	}
	if _, err := os.Stat(g.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the cgroup is still there: %v", err)
	}
}

// TestSweep leaves the cgroup of a dead maker behind and sees the next Create
// remove it, and not that of a living one.
func TestSweep(t *testing.T) {
	p := parent(t)
	dead := exec.Command("/bin/true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	name := func(pid int) string { return p + "/" + prefix + strconv.Itoa(pid) + "-SWEEPTST" }
	stale, live := name(dead.Process.Pid), name(os.Getpid())
	for _, d := range []string{stale, live} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(d)
	}
	g, err := Create(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the stale cgroup is still there: %v", err)
	}
	if _, err := os.Stat(live); err != nil {
		t.Errorf("a living maker's cgroup was removed: %v", err)
	}
}

func TestMountPrivate(t *testing.T) {
	if os.Geteuid() != 0 {
		testutil.Missing(t, "root, to mount", "run as root")
	}
	dir, release, err := MountPrivate()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		t.Errorf("type %#x, %v", st.Type, err)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there", dir)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
