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
type floor struct {
	mu    sync.Mutex
	file  *os.File
	page  []byte
	off   int64
	fsync bool
}

const (
	pageSize  = 4096
	floorSize = 32 << 20
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
	page := make([]byte, 64<<10)[:pageSize]
	return &floor{file: f, page: page, fsync: flags == 0}, nil
}

func (f *floor) Append(p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	copy(f.page, p)
	if _, err := f.file.WriteAt(f.page, f.off); err != nil {
		return err
	}
	f.off = (f.off + pageSize) % floorSize
	if !f.fsync {
		return nil
	}
	if err := unix.Fdatasync(int(f.file.Fd())); err != nil {
		return fmt.Errorf("fdatasync: %w", err)
	}
	return nil
}

func (f *floor) Close() error { return f.file.Close() }
