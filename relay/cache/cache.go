// Package cache is the relay's content store: files named by their SHA-256
// digest, under a disk ceiling.
//
// # On disk
//
//	tmp/<n>              a blob on its way in; removed at start
//	blobs/sha256/<hex>   complete, hashed, durable; never changed afterwards
//
// # Life of a blob
//
// Begin reserves room, evicts undeclared blobs if it must, and allocates the
// exact size in tmp/ → Write hashes as it stores → Commit compares size and
// digest, makes the file durable, renames it, makes the name durable → Open
// gives it to a reader → Remove or eviction, once nobody declares it and nobody
// reads it. Any failure on the way unlinks the file and gives the room back.
//
// # Eviction
//
// Only undeclared blobs that nobody has open, in the order of their digests.
// The order is a function of the store's content alone: no clock, no access
// history, the same after a restart (INV-11). Declared content is never
// evicted; without room Begin refuses with disk.ErrCeilingExceeded.
//
// Sizes are bytes. A Cache is safe for concurrent use; a Writer has one owner.
// Only the relay imports it.
package cache

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/autonomyops/autonomy/assurance/disk"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/relay/oci"
)

var (
	// ErrNotFound: the store does not hold this digest.
	ErrNotFound = errors.New("not in the store")
	// ErrMismatch: the bytes written are not those of the digest or the size.
	ErrMismatch = errors.New("content does not match its digest")
)

// Dirs are the directories the cache makes under its root.
var Dirs = []string{"tmp", "blobs", "blobs/sha256"}

// maxSpare bounds the room that blobs leave for state files: this, or a 64th of
// the ceiling where that is less.
const maxSpare = 1 << 20

// Cache is the store. Make one with Open.
type Cache struct {
	root    string
	ceiling *disk.Ceiling
	spare   int64         // bytes that blobs leave free under the ceiling
	seq     atomic.Uint64 // names in tmp/

	mu        sync.Mutex // guards what follows; held before the ceiling's lock, never after
	blobs     map[oci.Digest]*blob
	declared  map[oci.Digest]int // how many declare it
	dirBlocks int64              // allocated to blobs/sha256 itself
	evicted   uint64
}

type blob struct {
	size    int64
	readers int
}

// Open takes over the store under root: it removes what an interrupted run left
// in tmp/, lists the blobs and measures the ceiling's use from the disk.
func Open(root string, ceiling *disk.Ceiling) (*Cache, error) {
	for _, d := range Dirs {
		if err := vfs.MkdirAll(filepath.Join(root, d), 0o700); err != nil {
			return nil, fmt.Errorf("cache: %w", err)
		}
	}
	c := &Cache{root: root, ceiling: ceiling, spare: min(maxSpare, ceiling.Max()/64), blobs: map[oci.Digest]*blob{}, declared: map[oci.Digest]int{}}
	orphans, err := os.ReadDir(filepath.Join(root, "tmp"))
	if err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	for _, e := range orphans {
		if err := os.RemoveAll(filepath.Join(root, "tmp", e.Name())); err != nil {
			return nil, fmt.Errorf("cache: remove orphan: %w", err)
		}
	}
	dir := filepath.Join(root, "blobs", "sha256")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	for _, e := range entries {
		d, err := oci.ParseDigest("sha256:" + e.Name())
		if err != nil || !e.Type().IsRegular() {
			return nil, fmt.Errorf("cache: %s is no blob of ours: the name must be 64 hex digits, the type a regular file; move it away", filepath.Join(dir, e.Name()))
		}
		info, err := e.Info()
		if err != nil {
			return nil, fmt.Errorf("cache: %w", err)
		}
		c.blobs[d] = &blob{size: info.Size()}
	}
	if c.dirBlocks, err = c.sizeOfDir(); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	if err := ceiling.Measure(); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	return c, nil
}

func (c *Cache) path(d oci.Digest) string { return filepath.Join(c.root, "blobs", "sha256", d.Hex()) }

func (c *Cache) sizeOfDir() (int64, error) {
	info, err := os.Lstat(filepath.Join(c.root, "blobs", "sha256"))
	if err != nil {
		return 0, err
	}
	return disk.Blocks(info), nil
}

// Size is the size of a held blob.
func (c *Cache) Size(d oci.Digest) (int64, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, ok := c.blobs[d]
	if !ok {
		return 0, false
	}
	return b.size, true
}

// Entry is one line of List.
type Entry struct {
	Digest oci.Digest
	Size   int64
}

// List is what the store holds, by digest.
func (c *Cache) List() []Entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]Entry, 0, len(c.blobs))
	for d, b := range c.blobs {
		out = append(out, Entry{d, b.size})
	}
	slices.SortFunc(out, func(a, b Entry) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return out
}

// Len is the number of held blobs.
func (c *Cache) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.blobs)
}

// Evicted counts the blobs that made room for others since Open.
func (c *Cache) Evicted() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.evicted
}

// Declare protects a digest from eviction, held or not, once more.
func (c *Cache) Declare(d oci.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.declared[d]++
}

// Undeclare takes one Declare back.
func (c *Cache) Undeclare(d oci.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.declared[d]--; c.declared[d] <= 0 {
		delete(c.declared, d)
	}
}

// Blob is an open blob. Close it.
type Blob struct {
	*os.File // at offset 0; embedded so that http.ServeContent finds the file and the kernel can send it
	Size     int64
	once     sync.Once
	done     func()
}

// Close ends the reading.
func (b *Blob) Close() error {
	err := b.File.Close()
	b.once.Do(b.done)
	return err
}

// Open opens a held blob for reading; ErrNotFound if there is none.
func (c *Cache) Open(d oci.Digest) (*Blob, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, ok := c.blobs[d]
	if !ok {
		return nil, fmt.Errorf("%s: %w", d, ErrNotFound)
	}
	f, err := os.Open(c.path(d))
	if err != nil {
		return nil, fmt.Errorf("open blob: %w", err)
	}
	b.readers++
	return &Blob{File: f, Size: b.size, done: func() {
		c.mu.Lock()
		b.readers--
		c.mu.Unlock()
	}}, nil
}

// Read returns a held blob of at most limit bytes, hashed again: ErrMismatch
// means the disk has changed it.
func (c *Cache) Read(d oci.Digest, limit int64) ([]byte, error) {
	b, err := c.Open(d)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	if b.Size > limit {
		return nil, fmt.Errorf("%s: %d bytes, the limit is %d", d, b.Size, limit)
	}
	data, err := io.ReadAll(io.LimitReader(b.File, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read blob: %w", err)
	}
	if oci.DigestOf(data) != d {
		return nil, fmt.Errorf("%s on disk: %w", d, ErrMismatch)
	}
	return data, nil
}

// Remove deletes a blob that is held, whoever declares it; the caller has found
// it damaged. One that is being read is left, and the error says so.
func (c *Cache) Remove(d oci.Digest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.remove(d)
}

func (c *Cache) remove(d oci.Digest) error {
	b, ok := c.blobs[d]
	if !ok {
		return nil
	}
	if b.readers > 0 {
		return fmt.Errorf("remove %s: %d readers have it open", d, b.readers)
	}
	if err := c.ceiling.Remove(c.path(d)); err != nil {
		return err
	}
	delete(c.blobs, d)
	return nil
}

// reserve asks the ceiling, evicting until it agrees or nothing is left to evict.
// A blob must leave the spare room for operation: the state files of a relay
// that is full must still be writable.
func (c *Cache) reserve(n int64, files int, spare int64) (*disk.Reservation, error) {
	ask := func() (*disk.Reservation, error) {
		if spare > 0 {
			r, err := c.ceiling.Reserve(spare)
			if err != nil {
				return nil, err
			}
			defer r.Release()
		}
		return c.ceiling.ReserveFiles(n, files)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var victims []oci.Digest
	listed := false
	for {
		r, err := ask()
		if !errors.Is(err, disk.ErrCeilingExceeded) {
			return r, err
		}
		if !listed {
			listed = true
			for d, b := range c.blobs {
				if c.declared[d] == 0 && b.readers == 0 {
					victims = append(victims, d)
				}
			}
			slices.Sort(victims)
			if !c.worthwhile(err, victims) {
				return nil, err
			}
		}
		if len(victims) == 0 {
			return nil, err
		}
		if rerr := c.remove(victims[0]); rerr != nil {
			return nil, errors.Join(err, fmt.Errorf("evict: %w", rerr))
		}
		victims = victims[1:]
		c.evicted++
	}
}

// worthwhile reports whether evicting all victims would make the room that is
// missing: content is not thrown away for a request that is refused anyway.
func (c *Cache) worthwhile(err error, victims []oci.Digest) bool {
	var e *disk.ExceededError
	if !errors.As(err, &e) {
		return false
	}
	if e.Limit == "min-inodes" {
		return int64(len(victims)) >= e.Want-e.Have
	}
	room := e.Have
	for _, d := range victims {
		if info, err := os.Lstat(c.path(d)); err == nil {
			room += disk.Blocks(info)
		}
	}
	return room >= e.Want
}

// Room makes sure that n bytes in so many files fit now, evicting if it must.
// It holds nothing: another writer may take the room.
func (c *Cache) Room(n int64, files int) error {
	r, err := c.reserve(n, files, c.spare)
	if err != nil {
		return err
	}
	r.Release()
	return nil
}

// Writer takes one blob in. Finish it by Commit or Abort.
type Writer struct {
	c      *Cache
	digest oci.Digest
	size   int64
	off    int64
	hash   hash.Hash
	f      *os.File
	r      *disk.Reservation
	done   bool
}

// Begin makes room for a blob of exactly size bytes. Errors:
// disk.ErrCeilingExceeded, or the file system's.
func (c *Cache) Begin(d oci.Digest, size int64) (_ *Writer, err error) {
	r, err := c.reserve(size, 1, c.spare)
	if err != nil {
		return nil, fmt.Errorf("%s (%d bytes): %w", d, size, err)
	}
	name := filepath.Join(c.root, "tmp", strconv.FormatUint(c.seq.Add(1), 10))
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		r.Release()
		return nil, fmt.Errorf("begin %s: %w", d, err)
	}
	w := &Writer{c: c, digest: d, size: size, hash: sha256.New(), f: f, r: r}
	_, err = disk.Fallocate(f, size)
	if err == nil {
		err = w.account()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("begin %s: %w", d, err), w.Abort())
	}
	return w, nil
}

// account tells the ceiling what the kernel has given so far.
func (w *Writer) account() error {
	blocks, err := disk.FileBlocks(w.f)
	if err != nil {
		return err
	}
	return w.r.Allocated(blocks)
}

// Offset is how many bytes have been written.
func (w *Writer) Offset() int64 { return w.off }

// Size is the size the blob must have.
func (w *Writer) Size() int64 { return w.size }

// Write stores the next bytes. More than Size is ErrMismatch.
func (w *Writer) Write(p []byte) (int, error) {
	if int64(len(p)) > w.size-w.off {
		return 0, fmt.Errorf("%s: more than the %d bytes it should have: %w", w.digest, w.size, ErrMismatch)
	}
	n, err := w.f.Write(p)
	w.hash.Write(p[:n])
	w.off += int64(n)
	if err != nil {
		return n, fmt.Errorf("write %s: %w", w.digest, err)
	}
	return n, nil
}

// Restart forgets what was written; the room stays.
func (w *Writer) Restart() error {
	if _, err := w.f.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("restart %s: %w", w.digest, err)
	}
	w.hash.Reset()
	w.off = 0
	return nil
}

// Commit checks size and digest and publishes the blob in the store. A blob
// that has come meanwhile stays, and this copy is dropped: both are the same.
// After an error the Writer is finished, and nothing of it is left.
func (w *Writer) Commit() (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Abort())
		}
	}()
	if w.off != w.size {
		return fmt.Errorf("%s: have %d bytes of %d: %w", w.digest, w.off, w.size, ErrMismatch)
	}
	if got := oci.FromSum(w.hash.Sum(nil)); got != w.digest {
		return fmt.Errorf("want %s, have %s: %w", w.digest, got, ErrMismatch)
	}
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", w.digest, err)
	}
	if err := w.account(); err != nil {
		return fmt.Errorf("commit %s: %w", w.digest, err)
	}
	blocks, err := disk.FileBlocks(w.f)
	if err != nil {
		return fmt.Errorf("commit %s: %w", w.digest, err)
	}
	c := w.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.blobs[w.digest]; ok {
		return w.Abort()
	}
	dir := filepath.Dir(c.path(w.digest))
	if err := os.Rename(w.f.Name(), c.path(w.digest)); err != nil {
		return fmt.Errorf("commit %s: %w", w.digest, err)
	}
	if err := vfs.SyncDir(dir); err != nil {
		// The name may or may not survive a crash; do not promise it.
		return errors.Join(fmt.Errorf("commit %s: %w", w.digest, err), ignoreNotExist(os.Remove(c.path(w.digest))))
	}
	grown, err := c.sizeOfDir()
	if err != nil {
		grown = c.dirBlocks
	}
	w.done = true
	_ = w.f.Close() // synced; nothing to lose
	c.blobs[w.digest] = &blob{size: w.size}
	w.r.Commit(blocks + grown - c.dirBlocks)
	c.dirBlocks = grown
	return nil
}

// Abort removes what was written and gives the room back. After Commit or a
// first Abort it does nothing.
func (w *Writer) Abort() error {
	if w.done {
		return nil
	}
	w.done = true
	err := errors.Join(ignoreNotExist(os.Remove(w.f.Name())), w.f.Close())
	w.r.Release()
	if err != nil {
		return fmt.Errorf("abort %s: %w", w.digest, err)
	}
	return nil
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// WriteFile replaces the small file at path (under the ceiling's root) like
// vfs.WriteFile, with its room reserved first.
func (c *Cache) WriteFile(path string, data []byte) error {
	r, err := c.reserve(int64(len(data)), 1, 0)
	if err != nil {
		return err
	}
	var old int64
	if info, err := os.Lstat(path); err == nil {
		old = disk.Blocks(info)
	}
	if err := vfs.WriteFile(path, data, 0o600); err != nil {
		r.Release()
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		r.Commit(0)
		return err
	}
	r.Commit(disk.Blocks(info) - old)
	return nil
}

// RemoveFile removes a file that WriteFile wrote, durably.
func (c *Cache) RemoveFile(path string) error {
	if err := c.ceiling.Remove(path); err != nil {
		return err
	}
	return vfs.SyncDir(filepath.Dir(path))
}
