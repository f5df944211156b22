//go:build !race

// The race detector makes sync.Pool forget on purpose, and takes memory of its own.

package wal

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// Reading allocates nothing, neither per record nor per batch.
func TestReadDoesNotAllocate(t *testing.T) {
	once(t)
	for _, mode := range []Mode{ModeMapped, testMode} {
		t.Run(mode.String(), func(t *testing.T) {
			l, _ := open(t, t.TempDir(), Options{Mode: mode, SegmentBytes: 1 << 20, MaxBytes: 8 << 20})
			last := appendN(t, l, 10_000) // several segments
			wait(t, l, last)
			batches := 0
			if n := testing.AllocsPerRun(20, func() {
				r := Reader{l: l, next: 1}
				for r.next <= last {
					b, err := r.Next(t.Context(), 100, 1<<20)
					if err != nil {
						t.Fatal(err)
					}
					b.Release()
					batches++
				}
			}); n != 0 || batches < 100 {
				t.Fatalf("reading %d records allocates %v times", last, n)
			}
		})
	}
}

// What a log takes in memory does not grow with what it holds: not when it is
// opened, not when it is read, not when it is written.
func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	sizes := [2]int{8, 48} // MiB
	if testing.Short() {
		sizes = [2]int{4, 16}
	}
	var kib [2][3]int
	for i, mib := range sizes {
		dir := t.TempDir()
		l, _ := open(t, dir, memoryOptions())
		p := make([]byte, 1000)
		for range mib << 10 {
			if _, err := l.Append(ClassDecision, p); err != nil {
				t.Fatal(err)
			}
		}
		must(t, l.Close())
		exe, err := os.Executable()
		must(t, err)
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), "WAL_TEST_MEMORY="+dir, "WAL_TEST_RING="+ringDir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if n, err := fmt.Sscan(string(out), &kib[i][0], &kib[i][1], &kib[i][2]); n != 3 {
			t.Fatalf("%q: %v", out, err)
		}
	}
	t.Logf("with %d MiB: %v KiB, with %d MiB: %v KiB after opening, reading, appending", sizes[0], kib[0], sizes[1], kib[1])
	for i, when := range []string{"opening", "reading", "appending"} {
		if float64(kib[1][i]) > 1.1*float64(kib[0][i])+4096 { // in mapped files two slots, and part of a third, come and go
			t.Errorf("after %s %d KiB with %d MiB and %d KiB with %d MiB", when, kib[0][i], sizes[0], kib[1][i], sizes[1])
		}
	}
}
