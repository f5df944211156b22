package wal

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
)

// childMemory opens a log, reads all of it, and prints its resident memory: in
// KiB, after opening, after reading, and after appending as much again.
func childMemory(dir string) error {
	l, rec, err := Open(dir, memoryOptions())
	if err != nil {
		return err
	}
	defer l.Close()
	opened := resident()
	if err := readThrough(l, rec.LastSeq); err != nil {
		return err
	}
	read := resident()
	p := make([]byte, 1000)
	for range rec.Records {
		seq, err := l.Append(ClassAction, p)
		if err != nil {
			return err
		}
		if seq%64 == 0 {
			if err := l.Sync(context.Background()); err != nil {
				return err
			}
			if err := l.AdvanceAll(seq); err != nil {
				return err
			}
		}
	}
	fmt.Println(opened, read, resident())
	return nil
}

func memoryOptions() Options {
	return inMode(Options{SegmentBytes: 1 << 20, MaxBytes: 64 << 20})
}

// readThrough takes every record up to last, whatever it holds.
func readThrough(l *Log, last uint64) error {
	sum := byte(0)
	for r, next := l.Reader(1), uint64(0); next < last; {
		b, err := r.Next(context.Background(), 512, 1<<20)
		if err != nil {
			return err
		}
		for _, rec := range b.Records {
			next = rec.End()
			for _, c := range rec.Payload {
				sum ^= c
			}
		}
		b.Release()
	}
	if sum != 0 {
		return fmt.Errorf("the records' bytes add up to %d", sum)
	}
	return nil
}

// resident is this process' resident memory in KiB.
func resident() (kib int) {
	runtime.GC()
	debug.FreeOSMemory()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		panic(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, _ = strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(v), " kB"))
		}
	}
	return kib
}

// What a log takes in memory does not grow with what it holds: not when it is
// opened, not when it is read, not when it is written.
func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	sizes := [2]int{8, 48} // MiB
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
