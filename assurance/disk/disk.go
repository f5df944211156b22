// Package disk keeps a program's files under a stated ceiling and on a local
// file system. The kernel is the judge: free space and inodes come from statfs,
// a file's size is the blocks allocated to it, never a sum kept on the side.
//
// # Life of a file under the ceiling
//
// Reserve before the first byte → fallocate or write → Allocated tells what the
// kernel gave → Commit once the file has its name, or Release after unlinking
// it. Remove takes a file away and gives its room back. A reservation counts
// from the moment it is made, so writers that race for the last room cannot
// both have it.
//
// # The rule (INV-04)
//
// A reservation of n bytes (rounded up to blocks, plus file-system overhead) is
// given only if
//
//	used + reserved + n           <= MaxBytes
//	available − unwritten − n     >= KeepFree
//	free inodes − unwritten inodes − 1 >= MinInodes   (if the file system counts inodes)
//
// where available is f_bavail (what an ordinary user may take: root can write
// into ext4's reserve, so ENOSPC is no guard), and unwritten is what has been
// reserved but not yet been taken from the file system.
//
// Units are bytes. A Ceiling is safe for concurrent use. The relay, the log and
// the node import it; it imports nothing of theirs.
package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrCeilingExceeded is wrapped by the *ExceededError of Reserve and Allocated.
var ErrCeilingExceeded = errors.New("disk ceiling exceeded")

// ExceededError tells which limit stands in the way, with the numbers.
type ExceededError struct {
	Limit string // "max-bytes", "keep-free" or "min-inodes"
	Want  int64  // bytes asked for, file-system overhead included; inodes for min-inodes
	Have  int64  // what could still be given, possibly negative
	Usage Usage
}

func (e *ExceededError) Error() string {
	u := e.Usage
	switch e.Limit {
	case "max-bytes":
		return fmt.Sprintf("%v: %d bytes more do not fit: %d used and %d reserved of max-bytes %d; raise max-bytes or keep less here",
			ErrCeilingExceeded, e.Want, u.Used, u.Reserved, u.MaxBytes)
	case "keep-free":
		return fmt.Sprintf("%v: %d bytes more would leave less than keep-free %d: the file system has %d available, %d of them reserved; free space on it or lower keep-free",
			ErrCeilingExceeded, e.Want, u.KeepFree, u.Available, u.Unwritten)
	default:
		return fmt.Sprintf("%v: no inode to spare: %d free, %d must stay free; remove files from this file system",
			ErrCeilingExceeded, u.FreeInodes, u.MinInodes)
	}
}

// Is makes errors.Is(err, ErrCeilingExceeded) true.
func (e *ExceededError) Is(target error) bool { return target == ErrCeilingExceeded }

// Limits configures a Ceiling.
type Limits struct {
	Root      string // directory whose content is counted; must exist
	MaxBytes  int64  // most bytes allocated under Root; must be positive
	KeepFree  int64  // bytes that must stay available on the file system
	MinInodes int64  // inodes that must stay free, where inodes are counted
}

// Usage is a moment's view of a Ceiling.
type Usage struct {
	Used       int64 `json:"used_bytes"`      // allocated to files and directories under Root
	Reserved   int64 `json:"reserved_bytes"`  // promised to open reservations
	Unwritten  int64 `json:"unwritten_bytes"` // part of Reserved not yet taken from the file system
	MaxBytes   int64 `json:"max_bytes"`
	Available  int64 `json:"available_bytes"` // f_bavail
	KeepFree   int64 `json:"keep_free_bytes"`
	FreeInodes int64 `json:"free_inodes"` // -1: the file system does not count inodes
	MinInodes  int64 `json:"min_inodes"`
}

// Ceiling hands out room. Make one with New.
type Ceiling struct {
	limits Limits
	statfs func(string) (Stat, error) // replaced in tests

	mu        sync.Mutex // guards what follows, and is held across statfs so that no two grants share one view
	used      int64
	reserved  int64
	unwritten int64
	inodes    int64 // reserved files not yet created
	open      int   // reservations
}

// New measures what Root holds and returns its Ceiling. Content already above
// MaxBytes is no error: then every Reserve is refused until enough is removed.
func New(l Limits) (*Ceiling, error) {
	if l.MaxBytes <= 0 || l.KeepFree < 0 || l.MinInodes < 0 {
		return nil, fmt.Errorf("disk ceiling for %s: max-bytes is %d, keep-free %d, min-inodes %d: want max-bytes above 0, the others at least 0", l.Root, l.MaxBytes, l.KeepFree, l.MinInodes)
	}
	c := &Ceiling{limits: l, statfs: StatFS}
	if _, err := c.statfs(l.Root); err != nil {
		return nil, err
	}
	return c, c.Measure()
}

// Max is the configured MaxBytes.
func (c *Ceiling) Max() int64 { return c.limits.MaxBytes }

// Measure counts Root again. It does nothing while reservations are open: their
// files are on disk in part, and would be counted twice.
func (c *Ceiling) Measure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open > 0 {
		return nil
	}
	used, err := Allocated(c.limits.Root)
	if err != nil {
		return err
	}
	c.used = used
	return nil
}

// Usage reports the present state. The error is statfs's.
func (c *Ceiling) Usage() (Usage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	st, err := c.statfs(c.limits.Root)
	if err != nil {
		return Usage{}, err
	}
	return c.usage(st), nil
}

func (c *Ceiling) usage(st Stat) Usage {
	u := Usage{Used: c.used, Reserved: c.reserved, Unwritten: c.unwritten, MaxBytes: c.limits.MaxBytes,
		Available: st.Available, KeepFree: c.limits.KeepFree, FreeInodes: st.FreeInodes, MinInodes: c.limits.MinInodes}
	if st.Inodes == 0 {
		u.FreeInodes = -1
	}
	return u
}

// maxReserve keeps the sums far from overflow.
const maxReserve = 1 << 60

// footprint is the most that n bytes in a number of files may take: whole
// blocks, per file a block for the directory's growth and one for an extent
// node, and one more per 128 MiB, which is what one ext4 extent spans. A badly
// fragmented file may need more: Allocated corrects the guess.
func footprint(n, files, block int64) int64 {
	return roundUp(n, block) + block*(2*files+max(0, files-1)+n>>27)
}

func roundUp(n, block int64) int64 { return (n + block - 1) / block * block }

// Reserve promises room for one file of n bytes. Errors: *ExceededError
// (errors.Is ErrCeilingExceeded), or what statfs says.
func (c *Ceiling) Reserve(n int64) (*Reservation, error) { return c.ReserveFiles(n, 1) }

// ReserveFiles promises room for files of n bytes in all.
func (c *Ceiling) ReserveFiles(n int64, files int) (*Reservation, error) {
	if n < 0 || n > maxReserve || files < 0 || files > 1<<20 {
		return nil, fmt.Errorf("reserve %d bytes in %d files: out of range", n, files)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	st, err := c.statfs(c.limits.Root)
	if err != nil {
		return nil, err
	}
	n = footprint(n, int64(files), st.BlockSize)
	if err := c.fits(st, n, n, int64(files)); err != nil {
		return nil, err
	}
	c.reserved += n
	c.unwritten += n
	c.inodes += int64(files)
	c.open++
	return &Reservation{c: c, size: n, files: int64(files)}, nil
}

// fits is the rule. The caller holds mu.
func (c *Ceiling) fits(st Stat, more, unwritten, files int64) error {
	exceeded := func(limit string, want, have int64) error {
		return &ExceededError{Limit: limit, Want: want, Have: have, Usage: c.usage(st)}
	}
	if have := c.limits.MaxBytes - c.used - c.reserved; more > have {
		return exceeded("max-bytes", more, have)
	}
	if have := st.Available - c.unwritten - c.limits.KeepFree; unwritten > have {
		return exceeded("keep-free", unwritten, have)
	}
	if st.Inodes > 0 {
		if have := st.FreeInodes - c.inodes - c.limits.MinInodes; files > have {
			return exceeded("min-inodes", files, have)
		}
	}
	return nil
}

// Remove unlinks the file at path and gives its room back. A file that does not
// exist is no error. Do not remove a file that somebody has open: its blocks
// stay until it is closed, and would no longer be counted.
func (c *Ceiling) Remove(path string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	c.used = max(0, c.used-Blocks(info))
	return nil
}

// Reservation is room promised to one writer. Finish it by Commit or Release,
// once; a second call does nothing.
type Reservation struct {
	c       *Ceiling
	size    int64 // promised; guarded by c.mu, as are the others
	written int64 // already taken from the file system
	files   int64
	done    bool
}

// Allocated tells that the files of this reservation hold n bytes by now, as
// the kernel counts (Blocks). If that is more than was promised the promise
// grows, and if it cannot, the error is an *ExceededError: remove the file.
func (r *Reservation) Allocated(n int64) error {
	c := r.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.done {
		return nil
	}
	c.inodes -= r.files
	r.files = 0
	if n > r.size {
		st, err := c.statfs(c.limits.Root)
		if err != nil {
			return err
		}
		// The blocks are taken already: what is left to ask is whether they may stay.
		if err := c.fits(st, n-r.size, 0, 0); err != nil {
			return err
		}
		c.reserved += n - r.size
		c.unwritten += n - r.size
		r.size = n
	}
	if n > r.written {
		c.unwritten -= n - r.written
		r.written = n
	}
	return nil
}

// Commit ends the reservation: the bytes now on disk, allocated in all, are used.
func (r *Reservation) Commit(allocated int64) { r.end(allocated) }

// Release ends the reservation with nothing kept. Unlink first.
func (r *Reservation) Release() { r.end(0) }

func (r *Reservation) end(allocated int64) {
	c := r.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.done {
		return
	}
	r.done = true
	c.reserved -= r.size
	c.unwritten -= r.size - r.written
	c.inodes -= r.files
	c.open--
	c.used = max(0, c.used+allocated)
}

// Allocated is the number of bytes allocated to everything under root, root
// itself included. Symbolic links are not followed; a file with several names
// counts once per name.
func Allocated(root string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err == nil {
			var info fs.FileInfo
			if info, err = e.Info(); err == nil {
				sum += Blocks(info)
			}
		}
		if errors.Is(err, fs.ErrNotExist) && path != root {
			return nil // gone between listing and stat
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("measure %s: %w", root, err)
	}
	return sum, nil
}

// Blocks is the bytes the file system has allocated to a file.
func Blocks(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512 // stat(2): 512 whatever the block size
	}
	return info.Size()
}

// FileBlocks is Blocks of an open file.
func FileBlocks(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return Blocks(info), nil
}

// Fallocate gives f exactly size bytes of blocks, so that no later write to it
// can fail for want of space. On a file system that cannot (EOPNOTSUPP), the
// file is only extended, and ok is false. On error the caller must unlink the
// file: ext4 keeps the part it could allocate.
func Fallocate(f *os.File, size int64) (ok bool, err error) {
	if size == 0 {
		return true, nil
	}
	for {
		err = unix.Fallocate(int(f.Fd()), 0, 0, size)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP):
			return false, f.Truncate(size)
		}
		return false, fmt.Errorf("allocate %d bytes for %s: %w", size, f.Name(), err)
	}
}
