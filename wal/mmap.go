package wal

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// storeWord and loadWord are how a frame becomes visible: its first word, at an
// 8-aligned place of a page-aligned mapping, in one piece.
func storeWord(b []byte, w uint64) {
	atomic.StoreUint64((*uint64)(unsafe.Pointer(&b[:8][0])), w)
}

func loadWord(b []byte) uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&b[:8][0])))
}

// mapFile maps n bytes of f. Access is declared random before the first touch:
// otherwise read-ahead builds large folios, and a store of 300 bytes makes the
// next sync write up to 2 MiB.
func mapFile(f *os.File, n int64, write, random bool) ([]byte, error) {
	prot := unix.PROT_READ
	if write {
		prot |= unix.PROT_WRITE
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(n), prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", f.Name(), err)
	}
	advice := unix.MADV_SEQUENTIAL
	if random {
		advice = unix.MADV_RANDOM
	}
	if err := unix.Madvise(m, advice); err != nil {
		return nil, errors.Join(fmt.Errorf("map %s: advise: %w", f.Name(), err), unix.Munmap(m))
	}
	return m, nil
}

// mapTwice maps n bytes of f at off for writing, two times in a row: what runs
// over the end of the first goes on in the second, at the start.
func mapTwice(f *os.File, off, n int64) ([]byte, error) {
	m, err := unix.Mmap(-1, 0, int(2*n), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map %s: reserve addresses: %w", f.Name(), err)
	}
	for _, at := range [...]int64{0, n} {
		// MAP_FIXED replaces a part of the reservation above, nothing else.
		if _, err := unix.MmapPtr(int(f.Fd()), off, unsafe.Pointer(&m[at]), uintptr(n),
			unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
			return nil, errors.Join(fmt.Errorf("map %s: %w", f.Name(), err), unix.Munmap(m))
		}
	}
	return m, nil
}

// mapMemory maps the first n bytes of f, which is in memory anyway, for writing.
func mapMemory(f *os.File, n int64) ([]byte, error) {
	m, err := unix.Mmap(int(f.Fd()), 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", f.Name(), err)
	}
	return m, nil
}

// pinMemory brings m into the page table, and keeps it from being swapped out
// where the limit on locked memory allows.
func pinMemory(m []byte) error {
	_ = unix.Mlock(m)
	for {
		switch err := unix.Madvise(m, unix.MADV_POPULATE_WRITE); err {
		case unix.EINTR:
		case nil, unix.EINVAL: // kernels before 5.14: the first lap faults page by page
			return nil
		default:
			return fmt.Errorf("populate mapping: %w", err)
		}
	}
}

func unmapMemory(m []byte) {
	if m != nil {
		_ = unix.Munmap(m) // fails only for a range that was never mapped
	}
}

// pageAligned is n bytes that start at a page, as O_DIRECT wants them.
func pageAligned(n int64) []byte {
	b := make([]byte, n+pageSize)
	o := int64(-uintptr(unsafe.Pointer(&b[0])) & (pageSize - 1))
	return b[o : o+n : o+n]
}

// readAhead starts reading all of m, in single pages. It asks piece by piece: the
// kernel takes of one request no more than its read-ahead window, and what is left
// would be read page by page.
func readAhead(m []byte) {
	const piece = 128 << 10 // the smallest window that is usual
	for ; len(m) > 0; m = m[min(len(m), piece):] {
		_ = unix.Madvise(m[:min(len(m), piece)], unix.MADV_WILLNEED) // advice only
	}
}

// readFileAhead starts reading all of f, in single pages: see mapFile.
func readFileAhead(f *os.File) { _ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_WILLNEED) } // advice only

// dropPages takes m out of the page table: of a shared mapping nothing is lost,
// and what is touched again is mapped again.
func dropPages(m []byte) {
	if len(m) > 0 {
		_ = unix.Madvise(m, unix.MADV_DONTNEED) // advice only
	}
}

// populate brings the pages of m into memory and into the page table, so that
// no append waits for a read. It maps them for reading: for writing would make
// all of them dirty, and the next sync would write the whole slot. Kernels
// before 5.14 do not know the advice; there the first append to a page reads it.
func populate(m []byte) error {
	readAhead(m)
	for {
		switch err := unix.Madvise(m, unix.MADV_POPULATE_READ); err {
		case unix.EINTR:
		case nil, unix.EINVAL:
			return nil
		default:
			return fmt.Errorf("populate mapping: %w", err)
		}
	}
}

// fdatasync makes f's data durable; it also writes what was stored through a
// shared mapping of f.
func fdatasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if err == nil {
			return nil
		}
		if err != unix.EINTR {
			return fmt.Errorf("fdatasync %s: %w", f.Name(), err)
		}
	}
}

// errFault is a SIGBUS or SIGSEGV inside a mapping.
var errFault = errors.New("memory fault in the log's mapping: the file was cut, or its disk cannot be read")

// guard runs fn; a fault at a mapped address becomes an error. Other panics
// pass.
func guard(fn func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			if !isFault(p) {
				panic(p)
			}
			err = fmt.Errorf("%w: %v", errFault, p)
		}
	}()
	fn()
	return nil
}

func isFault(p any) bool {
	_, ok := p.(interface{ Addr() uintptr })
	return ok
}

// dropCache forgets those of n cached bytes of f at off that are clean, so that
// what is read next comes from the disk. m maps f; off is that of a page. The
// kernel passes over pages that are being read or looked at: so it is asked again
// for a moment while there are some. What is dirty stays.
func dropCache(f *os.File, m []byte, off, n int64) {
	m = m[off : off+n]
	for wait := 100 * time.Microsecond; ; wait *= 2 {
		_ = unix.Madvise(m, unix.MADV_DONTNEED) // of a shared mapping: only its page table
		_ = unix.Fadvise(int(f.Fd()), off, n, unix.FADV_DONTNEED)
		if wait > 2*time.Millisecond || !cached(m) {
			return
		}
		time.Sleep(wait)
	}
}

// cached reports whether some page of m is in memory; false when the kernel does
// not say.
func cached(m []byte) bool {
	if len(m) == 0 {
		return false
	}
	in := make([]byte, (int64(len(m))+pageSize-1)/pageSize)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&in[0])))
	return errno == 0 && slices.ContainsFunc(in, func(b byte) bool { return b&1 != 0 })
}
