package node

import (
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/trace"
	"testing"
	"time"
)

func TestCgroupMemory(t *testing.T) {
	root := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a/b/memory.max", "max\n")
	write("a/memory.max", "1073741824\n")
	write("memory/x/memory.limit_in_bytes", "536870912\n")
	write("memory/memory.limit_in_bytes", "9223372036854771712\n")
	write("free/memory.max", "max\n")
	for name, tc := range map[string]struct {
		self string
		want int64
	}{
		"version 2, the parent's":          {"0::/a/b\n", 1 << 30},
		"version 2, unlimited":             {"0::/free\n", 0},
		"version 1":                        {"5:cpu,cpuacct:/y\n4:memory:/x\n0::/\n", 512 << 20},
		"version 1, unlimited":             {"4:memory:/\n", 0},
		"version 1, path not mounted":      {"4:memory:/docker/123\n", 0},
		"both":                             {"4:memory:/x\n0::/a\n", 512 << 20},
		"a controller of a similar name":   {"4:memory2:/x\n", 0},
		"rubbish":                          {"what\n::\n", 0},
		"a path that would lead out of it": {"0::/../../a\n", 1 << 30},
	} {
		self := filepath.Join(t.TempDir(), "cgroup")
		if err := os.WriteFile(self, []byte(tc.self), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := cgroupMemory(self, root); got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
	if got := cgroupMemory(filepath.Join(root, "none"), root); got != 0 {
		t.Errorf("without a file: %d", got)
	}
}

// TestMemoryShed: above the mark calls are refused, below it they are not.
func TestMemoryShed(t *testing.T) {
	was := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(was)
	m := limitMemory(64<<20, slog.New(slog.DiscardHandler))
	if m.limit != 64<<20/10*9 || debug.SetMemoryLimit(-1) != m.limit {
		t.Fatalf("limit %d, the runtime's %d", m.limit, debug.SetMemoryLimit(-1))
	}
	m.checks = time.Millisecond
	done := make(chan struct{})
	ended := make(chan struct{})
	go func() { m.watch(done); close(ended) }()
	defer func() { close(done); <-ended }()
	until := func(want bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); m.short.Load() != want; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("short is not %v", want)
			}
		}
	}
	hold := make([]byte, 60<<20)
	for i := range hold {
		hold[i] = 1
	}
	until(true)
	if hold[len(hold)-1] != 1 {
		t.Fatal("the memory is still needed here")
	}
	hold = nil
	debug.FreeOSMemory()
	until(false)
}

// TestFlightFiles: the files stay few, the oldest goes first, and none is
// written into the space that is kept free.
func TestFlightFiles(t *testing.T) {
	dir := t.TempDir()
	f := &flight{dir: dir, log: slog.New(slog.DiscardHandler), rec: trace.NewFlightRecorder(trace.FlightRecorderConfig{MaxBytes: 1 << 20})}
	if err := f.rec.Start(); err != nil {
		t.Fatal(err)
	}
	defer f.rec.Stop()
	var first string
	for i := range flightFiles + 2 {
		path, err := f.write("id")
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = path
		}
		time.Sleep(2 * time.Millisecond) // the names tell milliseconds
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != flightFiles {
		t.Errorf("%d files, %v", len(left), err)
	}
	if _, err := os.Stat(first); !os.IsNotExist(err) {
		t.Errorf("the oldest is still there: %v", err)
	}
	f.keepFree = 1 << 60
	if path, err := f.write("id"); err == nil {
		t.Errorf("%s was written into the space that is kept free", path)
	}
}
