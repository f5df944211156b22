package ebpf

import (
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/assurance/cgroup"
	"github.com/autonomyops/autonomy/assurance/child"

	"github.com/autonomyops/autonomy/internal/testutil"
)

func TestRefuseConnect4(t *testing.T) {
	if os.Geteuid() != 0 {
		testutil.Missing(t, "root, for bpf(2)", "run as root")
	}
	parents, err := cgroup.Parents()
	if err != nil {
		t.Fatal(err)
	}
	connects := func(attach bool) map[string]unix.Errno {
		t.Helper()
		g, err := cgroup.Create(parents[len(parents)-1])
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := g.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		}()
		if attach {
			l, err := RefuseConnect4(g.Path, netip.MustParseAddr("127.0.0.2"))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		c, err := child.Start(t.Context(), g.FD(), "127.0.0.2:9", "127.0.0.3:9", "127.0.0.2:53", "nonsense")
		if err != nil {
			t.Fatal(err)
		}
		c.Stop()
		return c.Errno
	}
	with, without := connects(true), connects(false)
	for addr, want := range map[string]unix.Errno{"127.0.0.2:9": unix.EPERM, "127.0.0.3:9": 0, "127.0.0.2:53": unix.EPERM, "nonsense": unix.EINVAL} {
		if with[addr] != want {
			t.Errorf("%s with the program: %v, want %v", addr, with[addr], want)
		}
	}
	for addr, errno := range without {
		if errno == unix.EPERM {
			t.Errorf("%s is refused without the program", addr)
		}
	}
}

func TestRefuseConnect4Errors(t *testing.T) {
	if _, err := RefuseConnect4("/nonexistent", netip.MustParseAddr("::1")); err == nil {
		t.Error("an IPv6 address is accepted")
	}
	if _, err := RefuseConnect4("/nonexistent", netip.MustParseAddr("127.0.0.2")); err == nil {
		t.Error("a cgroup that does not exist is accepted")
	}
}

// TestChildEnds sees that a child does not outlive a cgroup that cannot take it.
func TestChildEnds(t *testing.T) {
	f, err := os.Open(t.TempDir()) // no cgroup
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	start := time.Now()
	if c, err := child.Start(t.Context(), int(f.Fd())); err == nil {
		c.Stop()
		t.Error("a child started in a directory that is no cgroup")
	}
	if time.Since(start) > 2*time.Second {
		t.Error("took too long")
	}
}
