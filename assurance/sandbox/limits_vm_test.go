//go:build vm

// What needs cgroup controllers, which a machine may have bound to cgroup v1.
// "make vm-test" runs these, and others, in a machine of its own.

package sandbox

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	attempts = append(attempts,
		attempt{group: "limit", name: "eat-memory", try: func([]string) error {
			for i := range 256 {
				b := make([]byte, 1<<20)
				for j := 0; j < len(b); j += 4096 {
					b[j] = byte(i)
				}
				kept = append(kept, b)
			}
			return nil
		}},
		attempt{group: "limit", name: "eat-memory-in-tmp", try: func([]string) error {
			f, err := tmpFile()
			if err == nil {
				for range 128 {
					if _, err = f.Write(make([]byte, 1<<20)); err != nil {
						break
					}
				}
			}
			return err
		}},
		attempt{group: "limit", name: "burn", try: func([]string) error {
			for began := time.Now(); time.Since(began) < 3*time.Second; {
			}
			return nil
		}},
		attempt{group: "limit", name: "write-disk", try: func(args []string) error {
			f, err := os.Create(args[0] + "/file")
			if err != nil {
				return err
			}
			for range 16 {
				if _, err := f.Write(make([]byte, 1<<20)); err != nil {
					return err
				}
			}
			return f.Sync()
		}},
	)
}

func TestVMLayers(t *testing.T) {
	s := open(t)
	for _, l := range s.Layers() {
		t.Logf("%s: %v, %s", l.Name, l.On, l.Detail)
		if !l.On {
			t.Errorf("%s is off: %s", l.Name, l.Detail)
		}
	}
	if names := s.Unenforceable(Limits{Memory: 1, Pids: 1, CPU: "1 1", IO: 1}, []string{"a:1"}, []Path{}); len(names) > 0 {
		t.Errorf("cannot keep %q", names)
	}
}

func TestVMMemory(t *testing.T) {
	s := open(t)
	for _, name := range []string{"eat-memory", "eat-memory-in-tmp"} {
		c := escape(t, name)
		c.Limits = Limits{Memory: 48 << 20, Tmp: 256 << 20}
		e, out := run(t, s, c)
		if e.Status.Signal() != unix.SIGKILL || e.Usage.OOMKills == 0 || e.Usage.MemoryPeak > 50<<20 {
			t.Errorf("%s: %q: %#x %+v", name, out, e.Status, e.Usage)
		}
	}
	// The whole call is killed, not only who asked for too much.
	c := escape(t, "eat-memory")
	c.Argv = append([]string{"/bin/sh", "-c", `"$@"; echo survived`, "sh"}, c.Argv...)
	c.FS = []Path{{self(t), false}}
	c.Limits.Memory = 48 << 20
	if e, out := run(t, s, c); strings.Contains(out, "survived") || e.Status.Signal() != unix.SIGKILL {
		t.Errorf("%q: %#x", out, e.Status)
	}
}

func TestVMPids(t *testing.T) {
	s := open(t)
	c := escape(t, "processes")
	c.Limits.Pids = 20
	e, out := run(t, s, c)
	if !strings.HasPrefix(out, "EAGAIN") || e.Usage.PidsPeak > 20 || e.Usage.PidsPeak < 10 {
		t.Errorf("%q, %+v", out, e.Usage)
	}
}

func TestVMCPU(t *testing.T) {
	s := open(t)
	c := escape(t, "burn")
	c.Limits.CPU = "20000 100000"
	e, out := run(t, s, c)
	if e.Usage.CPU > 1200*time.Millisecond || e.Usage.Throttled == 0 {
		t.Errorf("%q, %+v: want a fifth of three seconds", out, e.Usage)
	}
	if e.Usage.PressureCPU == 0 {
		t.Errorf("no pressure is counted: %+v", e.Usage)
	}
}

func TestVMIO(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("/dev/vda", dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	s := open(t)
	c := escape(t, "write-disk", dir)
	c.FS = []Path{{dir, true}}
	c.User = &User{0, 0}
	c.Limits.IO = 4 << 20
	began := time.Now()
	e, out := run(t, s, c)
	if took := time.Since(began); strings.TrimSpace(out) != "OK" || took < 2*time.Second || e.Usage.IOWritten < 8<<20 {
		t.Errorf("%q after %s, %+v: want 16 MiB at 4 MiB a second", out, took, e.Usage)
	}
}

// TestVMFreeze stops a call, looks at it and lets it go on.
func TestVMFreeze(t *testing.T) {
	s := open(t)
	p, err := s.Start(t.Context(), sh("while :; do :; done"))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.call.Freeze(true); err != nil {
		t.Fatal(err)
	}
	frozen := func() string { b, _ := os.ReadFile(p.call.Path() + "/cgroup.events"); return string(b) }
	for end := time.Now().Add(10 * time.Second); !strings.Contains(frozen(), "frozen 1"); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(fmt.Sprint("not frozen: ", frozen()))
		}
	}
	a := p.call.Usage(false).CPU
	time.Sleep(50 * time.Millisecond) // time in which it would use the processor
	if b := p.call.Usage(false).CPU; b != a {
		t.Errorf("a frozen call used %s", b-a)
	}
	p.Kill() // also while frozen
	if e := p.Wait(t.Context(), func([]byte) {}, func([]byte) {}); e.Left != nil || e.Status.Signal() != unix.SIGKILL {
		t.Errorf("%+v", e)
	}
}
