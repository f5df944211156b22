package wal

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// The ring is the memory that records are encoded into when the log runs in
// ModeRing: a file on a tmpfs, mapped twice in a row so that no record is split
// where it wraps. Offset off of the current segment stands at off modulo its
// size. The committer writes from it to the segment's slot, past the page
// cache; so neither a slow nor a frozen file system ever stalls an append that
// has room. The file outlives the process: after a kill what was published and
// not yet written is copied to the slot, and recovery finds what it would have
// found in mapped files. After a reboot it is gone or foreign, and ignored.

const (
	ringMagic    = "AOWALRNG"
	ringVersion  = 1
	ringState    = 512 // two copies of the changing part, written in turn
	ringStateLen = 52

	minRing = 64 << 10

	// DefaultRingBytes is the size of the ring.
	DefaultRingBytes = 16 << 20
)

// ringID says whose a ring is and of which boot.
type ringID struct {
	logID    uint64
	dev, ino uint64 // of the log's directory: a copy of it is another log here
	boot     [16]byte
}

// ringAt is where the log stands, as the ring knows it.
type ringAt struct {
	gen     uint64
	segment uint64
	key     uint64 // of the segment's newest epoch
	durable int64  // everything in the segment below it is in the slot
}

type ring struct {
	file *os.File // holds its flock
	head []byte   // first page
	m    []byte   // size bytes, twice
	mask int64
	key  uint64 // random, of this session: seeds the checksum of ringAt
	at   ringAt
	refs int   // readers at work in it; guarded by Log.mu
	low  int64 // the ring holds the current segment from here; guarded by Log.mu
}

func (r *ring) size() int64 { return r.mask + 1 }

// frame is the n bytes at off of the current segment; n is at most the size.
func (r *ring) frame(off, n int64) []byte {
	o := off & r.mask
	return r.m[o : o+n : o+n]
}

// room is the offset that no frame may pass while everything below durable, but
// for its page, is in the slot.
func (r *ring) room(durable int64) int64 { return durable&^(pageSize-1) + r.size() }

// set records where the log stands. Program order is enough: a killed process
// leaves its memory as it was.
func (r *ring) set(segment, key uint64, durable int64) {
	r.at = ringAt{r.at.gen + 1, segment, key, durable}
	r.at.put(r.head[ringState*(1+r.at.gen%2):], r.key)
}

func (a *ringAt) put(b []byte, key uint64) {
	clear(b[:ringStateLen])
	le.PutUint64(b, a.gen)
	le.PutUint64(b[8:], a.segment)
	le.PutUint64(b[16:], a.key)
	le.PutUint64(b[24:], uint64(a.durable))
	le.PutUint32(b[48:], crc32.Update(uint32(mix(key)), castagnoli, b[:48]))
}

func (a *ringAt) parse(b []byte, key uint64) bool {
	if le.Uint32(b[48:]) != crc32.Update(uint32(mix(key)), castagnoli, b[:48]) {
		return false
	}
	*a = ringAt{le.Uint64(b), le.Uint64(b[8:]), le.Uint64(b[16:]), int64(le.Uint64(b[24:]))}
	return a.gen != 0
}

func putRingHead(b []byte, id ringID, size int64, key uint64) {
	copy(b, ringMagic)
	le.PutUint32(b[8:], ringVersion)
	le.PutUint32(b[12:], 0)
	le.PutUint64(b[16:], id.logID)
	le.PutUint64(b[24:], uint64(size))
	copy(b[32:], id.boot[:])
	le.PutUint64(b[48:], id.dev)
	le.PutUint64(b[56:], id.ino)
	le.PutUint64(b[64:], key)
	clear(b[72:88])
	le.PutUint32(b[88:], crc32.Checksum(b[:88], castagnoli))
}

// parseRing reads a ring's first page; why says what is wrong with it.
func parseRing(b []byte, id ringID, fileSize int64) (size int64, key uint64, at ringAt, why string) {
	switch {
	case len(b) < pageSize:
		return 0, 0, at, "it is too short"
	case string(b[:8]) != ringMagic || le.Uint32(b[8:]) != ringVersion || le.Uint32(b[88:]) != crc32.Checksum(b[:88], castagnoli):
		return 0, 0, at, "its header is damaged"
	case !bytes.Equal(b[32:48], id.boot[:]):
		return 0, 0, at, "it is of another boot"
	case le.Uint64(b[16:]) != id.logID:
		return 0, 0, at, "it is of another log"
	case le.Uint64(b[48:]) != id.dev || le.Uint64(b[56:]) != id.ino:
		return 0, 0, at, "it is of a log in another directory"
	}
	size, key = int64(le.Uint64(b[24:])), le.Uint64(b[64:])
	if size < minRing || size > maxSegment || bits.OnesCount64(uint64(size)) != 1 || fileSize != pageSize+size {
		return 0, 0, at, fmt.Sprintf("it has %d bytes: it was cut", fileSize)
	}
	var x ringAt
	for i := range int64(2) {
		if x.parse(b[ringState*(1+i):], key) && x.gen > at.gen {
			at = x
		}
	}
	if at.gen == 0 {
		return 0, 0, at, "it was never used"
	}
	return size, key, at, ""
}

// ringIdentity is what a ring of this log, made now, would say.
func (l *Log) ringIdentity() (id ringID, err error) {
	var st unix.Stat_t
	if err := unix.Stat(l.dir, &st); err != nil {
		return id, fmt.Errorf("identify %s: %w", l.dir, err)
	}
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id, fmt.Errorf("read the boot id: %w", err)
	}
	text := strings.ReplaceAll(strings.TrimSpace(string(b)), "-", "")
	if n, err := hex.Decode(id.boot[:], []byte(text[:min(len(text), 2*len(id.boot))])); err != nil || n != len(id.boot) {
		return id, fmt.Errorf("boot id is %q, want a UUID", text)
	}
	id.logID, id.dev, id.ino = l.id, st.Dev, st.Ino
	return id, nil
}

// ringPath names the ring by the log and by the inode of its directory: a copy of
// the directory has a ring of its own.
func (l *Log) ringPath() string {
	return filepath.Join(l.o.RingDir, fmt.Sprintf("autonomy-wal-%s-%x", l.name, l.dirIno))
}

// makeRing makes and maps a fresh ring. Whatever an old one held is in the slots
// by now.
func (l *Log) makeRing() (_ *ring, err error) {
	id, err := l.ringIdentity()
	if err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(l.o.RingDir, &st); err != nil {
		return nil, fmt.Errorf("ring directory %s: %w", l.o.RingDir, err)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return nil, fmt.Errorf("ring directory %s is not on a tmpfs: appending would wait for its disk", l.o.RingDir)
	}
	if err := l.removeRing(); err != nil {
		return nil, err
	}
	// At most half of what is free: others live there too.
	size := int64(minRing)
	for size*2 <= l.o.RingBytes && size < l.slotBytes {
		size *= 2
	}
	for free := int64(st.Bavail) * st.Bsize; size+pageSize > free/2; size /= 2 {
		if size == minRing {
			return nil, fmt.Errorf("ring directory %s has %d bytes free, want at least %d", l.o.RingDir, free, 2*(minRing+pageSize))
		}
	}
	f, err := os.OpenFile(l.ringPath(), os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	r := &ring{file: f, mask: size - 1, key: randomKey()}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // the first error matters
			r.close()
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	// All of it now: a full tmpfs is met here, not as a fault in an append.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, pageSize+size); err != nil {
		return nil, fmt.Errorf("make ring of %d bytes in %s: %w", size, l.o.RingDir, err)
	}
	if err := r.mmap(); err != nil {
		return nil, err
	}
	putRingHead(r.head, id, size, r.key)
	failpoint("ring made")
	return r, nil
}

func (r *ring) mmap() (err error) {
	if r.head, err = mapMemory(r.file, pageSize); err != nil {
		return err
	}
	if r.m, err = mapTwice(r.file, pageSize, r.size()); err != nil {
		return err
	}
	return pinMemory(r.m)
}

func (r *ring) close() {
	unmapMemory(r.head)
	unmapMemory(r.m)
	r.head, r.m = nil, nil
	unlock(r.file)
}

// removeRing removes this log's ring of an earlier process.
func (l *Log) removeRing() error {
	if l.o.RingDir == "" {
		return nil
	}
	f, err := openRing(l.ringPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return os.Remove(f.Name())
}

// openRing opens a ring file that is this user's alone and that nobody holds.
func openRing(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o077 != 0 || st.Uid != uint32(os.Geteuid()) || st.Nlink != 1 {
		return nil, errors.Join(fmt.Errorf("%s is not a file of this user alone: mode %#o, owner %d, %d links", path, st.Mode, st.Uid, st.Nlink), f.Close())
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s is in use: %w", path, err), f.Close())
	}
	return f, nil
}

// replay copies what a killed process left in its ring to the newest segment, as
// if it had been encoded there. It must not trust the ring: the segment's newest
// key, a commit marker where the ring says that the slot ends, and whatever the
// slot holds beyond, must all agree. Else the log went on without this ring, and
// the ring is ignored. n counts the bytes.
func (l *Log) replay(x *found) (n int64, why string, err error) {
	f, err := openRing(l.ringPath())
	if errors.Is(err, fs.ErrNotExist) {
		return 0, "", nil
	}
	if err != nil {
		return 0, err.Error(), nil
	}
	defer f.Close()
	id, err := l.ringIdentity()
	if err != nil {
		return 0, err.Error(), nil
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err.Error(), nil
	}
	head := make([]byte, pageSize)
	if _, err := f.ReadAt(head, 0); err != nil {
		return 0, "its first page cannot be read: " + err.Error(), nil
	}
	size, _, at, why := parseRing(head, id, info.Size())
	if why != "" {
		return 0, why, nil
	}
	end := int64(len(x.m))
	key := x.epochs[len(x.epochs)-1].key
	if at.segment != x.head.id || at.key != key || at.durable < dataStart || at.durable > end || at.durable%8 != 0 {
		return 0, "the log has gone on without it", nil
	}
	next := x.head.first
	if at.durable > dataStart {
		o := at.durable - markerFrame
		k, ok := parseFrame(x.m, keyAt(x.epochs, o), o, at.durable)
		if !ok || !k.marker() {
			return 0, fmt.Sprintf("the slot holds no commit marker below %d, where the ring goes on", at.durable), nil
		}
		next = k.seq + 1
	}
	r := &ring{file: f, mask: size - 1}
	if r.m, err = mapTwice(f, pageSize, size); err != nil {
		return 0, err.Error(), nil
	}
	defer func() { unmapMemory(r.m) }()

	limit := min(r.room(at.durable), end)
	if at.durable >= limit {
		return 0, "", nil
	}
	w := r.frame(at.durable, limit-at.durable)
	last := lastWhole(w, key, at.durable, next)
	for off := at.durable; ; { // is the slot ahead of the ring?
		k, ok := parseFrame(x.m, key, off, end)
		if !ok {
			break
		}
		o := off - at.durable
		if o+k.size > int64(len(w)) || !bytes.Equal(w[o:o+k.size], x.m[off:off+k.size]) {
			return 0, "the slot is ahead of it", nil
		}
		off += k.size
	}
	copy(x.m[at.durable:], w[:last])
	failpoint("replayed")
	return last, "", nil
}

// takeReplay replays the ring, if there is one to look for, and tells the logger
// why one was ignored.
func (l *Log) takeReplay(newest *found) (n int64, err error) {
	if l.o.RingDir == "" {
		return 0, nil
	}
	var why string
	if e := guard(func() { n, why, err = l.replay(newest) }); e != nil {
		n, why = 0, e.Error()
	}
	switch {
	case why != "":
		l.o.Logger.Warn("write-ahead log: an old ring is ignored", "ring", l.ringPath(), "why", why)
	case n > 0:
		l.o.Logger.Info("write-ahead log: replayed what a killed process left in its ring", "bytes", n)
	}
	return n, err
}

// lastWhole is where the last whole frame in w ends, which stands at off in its
// segment; the first record in it is next.
func lastWhole(w []byte, key uint64, off int64, next uint64) (last int64) {
	most := next + uint64(len(w)/(frameHeader+8))
	for o := int64(0); o+frameHeader <= int64(len(w)); o += 8 {
		if seq := le.Uint64(w[o+8:]) >> 8; seq+1 < next || seq > most {
			continue // cheap: almost every place of an earlier lap ends here
		}
		if f, ok := parseAt(w[o:], key, off+o); ok {
			last = o + f.size
			o = last - 8
		}
	}
	return last
}

// chooseMode takes the ring if it may and can. Everything in the log is durable
// and nobody else has the log yet.
func (l *Log) chooseMode() error {
	switch {
	case l.o.Mode == ModeMapped:
		l.why = "Options.Mode asks for it"
	case l.o.RingDir == "":
		l.why = "Options.RingDir names no directory for a ring"
	default:
		err := l.enterRing()
		if err == nil {
			l.why = fmt.Sprintf("records are encoded into a ring of %d bytes in %s and written with O_DIRECT", l.ring.size(), l.o.RingDir)
			return nil
		}
		if l.o.Mode == ModeRing {
			return fmt.Errorf("mode is ring: %w", err)
		}
		l.why = err.Error()
		l.o.Logger.Warn("write-ahead log: no ring, records are encoded into mapped files", "why", l.why)
		l.encodeMapped()
		return nil
	}
	if err := l.removeRing(); err != nil {
		l.o.Logger.Warn("write-ahead log: an old ring stays behind", "err", err)
	}
	l.encodeMapped()
	return nil
}

// encodeMapped has slots brought into memory before records are encoded there,
// also those that are ready already.
func (l *Log) encodeMapped() {
	_ = populate(l.cur.m) // what cannot be read now is met by who appends
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mapped = true
	for _, s := range l.slots {
		if s.state == slotReady {
			s.state = slotFree
		}
	}
	l.kickPreparer()
}

// enterRing makes the ring and tries a direct write: of the log's last page,
// which stays as it is.
func (l *Log) enterRing() (err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(l.dir, &st); err != nil {
		return fmt.Errorf("file system of %s: %w", l.dir, err)
	}
	if st.Type == unix.TMPFS_MAGIC {
		return fmt.Errorf("%s is itself on a tmpfs", l.dir)
	}
	r, err := l.makeRing()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(r.file.Name()) // the first error matters
			r.close()
			for _, s := range l.slots {
				if s.dio != nil {
					s.dio.Close()
					s.dio = nil
				}
			}
		}
	}()
	for _, s := range l.slots {
		s.dio, err = l.o.openDirect(s.file.Name())
		if err != nil {
			return fmt.Errorf("open %s for direct writing: %w", s.file.Name(), err)
		}
	}
	l.bounce = pageAligned(pageSize)
	seg := l.cur
	page := (l.tail - 1) &^ (pageSize - 1)
	n := l.tail - page
	if err := guard(func() { copy(l.bounce, seg.m[page:l.tail]) }); err != nil {
		return err
	}
	if err := pwritev(seg.dio, [][]byte{l.bounce}, page); err != nil {
		return fmt.Errorf("write directly: %w", err)
	}
	same := false
	if err := guard(func() { same = bytes.Equal(seg.m[page:page+n], l.bounce[:n]) }); err != nil {
		return err
	}
	if !same {
		return fmt.Errorf("%s: a mapping does not show what was written directly", seg.file.Name())
	}
	// The next group starts at base: a checkpoint may stand between it and the
	// tail.
	base := l.open.start
	if err := guard(func() {
		low := base &^ (pageSize - 1)
		copy(r.frame(low, l.tail-low), seg.m[low:l.tail])
	}); err != nil {
		return err
	}
	l.mu.Lock() // the preparer runs
	defer l.mu.Unlock()
	l.ring = r
	r.low, l.flushed = base&^(pageSize-1), l.tail
	r.set(seg.id, seg.key, base)
	l.ceil, l.soft = min(l.slotBytes, r.room(base)), l.tail+l.softBytes()
	l.maxPayload = min(l.maxPayload, int(r.size()/2-tailRoom-pageSize)-frameHeader)
	for _, s := range l.slots {
		dropPages(s.m) // nothing is encoded there any more
	}
	return nil
}

// openDirect opens a slot for writing past the page cache, each write durable
// when it returns.
func openDirect(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT|unix.O_DSYNC|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
}

// pwritev writes all of b at off.
func pwritev(f *os.File, b [][]byte, off int64) error {
	total := 0
	for _, x := range b {
		total += len(x)
	}
	if len(b[0]) == 0 {
		b = b[1:]
	}
	for {
		n, err := unix.Pwritev(int(f.Fd()), b, off)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && n != total:
			err = fmt.Errorf("%d of %d bytes were written: %w", n, total, unix.EIO)
		case err == nil:
			return nil
		}
		return fmt.Errorf("write %s at %d: %w", f.Name(), off, err)
	}
}
