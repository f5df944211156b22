package wal

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
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
