package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/bench/walbench/leg"
)

// A floor is what no log can do better than: one page into a file whose extents
// were written before, made durable. Nothing is checked, nothing is found again.
// Batched it is no bound but a strong reference, the harness' own batching: the bytes
// of all who wait in one write, and one broadcast.
type floor struct {
	mu    sync.Mutex
	file  *os.File
	buf   []byte
	off   int64
	fsync bool
}

const (
	pageSize  = 4096
	floorSize = 32 << 20
	// floorBatch is more than all who wait bring in any block.
	floorBatch = 2 << 20
)

// openFloor writes through the page cache and calls fdatasync.
func openFloor(dir string, _ leg.Spec) (leg.Log, error) { return newFloor(dir, 0) }

// openDirect writes past the page cache, with the sync in the write.
func openDirect(dir string, _ leg.Spec) (leg.Log, error) {
	return newFloor(dir, unix.O_DIRECT|unix.O_DSYNC)
}

func newFloor(dir string, flags int) (_ leg.Log, err error) {
	name := filepath.Join(dir, "floor")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	for buf, n := make([]byte, 1<<20), 0; n < floorSize && err == nil; n += len(buf) {
		_, err = f.Write(buf)
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return nil, err
	}
	if f, err = os.OpenFile(name, os.O_WRONLY|flags, 0); err != nil {
		return nil, err
	}
	// O_DIRECT wants an aligned address. An allocation of this size has spans of
	// its own, which begin at pages; were it otherwise, the write would fail.
	return &floor{file: f, buf: make([]byte, floorBatch), fsync: flags == 0}, nil
}

func (f *floor) Append(p []byte) error { return f.AppendBatch([][]byte{p}) }

func (f *floor) AppendBatch(ps [][]byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, p := range ps {
		n += copy(f.buf[n:], p)
	}
	pages := (n + pageSize - 1) &^ (pageSize - 1)
	if n == len(f.buf) {
		return fmt.Errorf("a batch of %d records has more than %d bytes", len(ps), n)
	}
	if f.off+int64(pages) > floorSize {
		f.off = 0
	}
	if _, err := f.file.WriteAt(f.buf[:pages], f.off); err != nil {
		return err
	}
	f.off += int64(pages)
	if !f.fsync {
		return nil
	}
	if err := unix.Fdatasync(int(f.file.Fd())); err != nil {
		return fmt.Errorf("fdatasync: %w", err)
	}
	return nil
}

func (f *floor) Close() error { return f.file.Close() }
