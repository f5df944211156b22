package wal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/vfs"
)

// overhead is what stands in the directory beside the slots: the directory
// itself, lock and meta (two pages).
const overhead = 4 * pageSize

const (
	btrfsMagic = 0x9123683e
	fsNoCOW    = 0x00800000 // FS_NOCOW_FL of linux/fs.h
)

func (l *Log) path(name string) string { return filepath.Join(l.dir, name) }

func slotName(i int) string { return fmt.Sprintf("slot-%04d", i) }

// makeDir makes dir for its owner only.
func makeDir(dir string) error { return vfs.MkdirAll(dir, 0o700) }

// provision makes the slots that are missing and opens all. A log whose making
// was interrupted has no meta file yet and is made anew; a slot in it that was
// ever used says otherwise.
func (l *Log) provision(rec *Recovery) error {
	if err := os.Remove(l.path(repairTemp)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // what a repair that was cut short left behind counts against the ceiling
	}
	b, err := readSmall(l.path("meta"), 2*pageSize)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := checkUnused(l.dir); err != nil {
			return err
		}
		slots := int(l.o.MaxBytes / l.o.SegmentBytes)
		l.slotBytes = min(l.o.SegmentBytes, (l.o.MaxBytes-overhead)/int64(slots)) &^ (pageSize - 1)
		rec.Created = true
		l.meta = meta{logID: randomKey(), slotBytes: l.slotBytes, slots: slots, created: l.o.stamp()}
		if err := l.makeSlots(slots); err != nil {
			return err
		}
		page := make([]byte, 2*pageSize)
		l.meta.put(page)
		l.meta.put(page[pageSize:])
		if err := vfs.WritePreparedFile(l.path("meta"), page, 0o600, noCopyOnWrite); err != nil {
			return err
		}
	case err != nil:
		return err
	default:
		x, ok := readMeta(b)
		if !ok {
			return &DamageError{Slot: "meta", Reason: "both copies are damaged: neither identity nor cursors are known"}
		}
		l.meta, l.slotBytes = x, x.slotBytes
		if err := l.resize(); err != nil {
			return err
		}
	}
	l.id, l.name = l.meta.logID, fmt.Sprintf("%016x", l.meta.logID)
	for c := range l.cursor {
		l.cursor[c].Store(l.meta.cursors[c])
	}
	l.top.Store(l.meta.top)
	if l.file, err = os.OpenFile(l.path("meta"), os.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0); err != nil {
		return err
	}
	for i := range l.meta.slots {
		if err := l.openSlot(i); err != nil {
			return err
		}
	}
	return nil
}

// resize fits the number of slots to MaxBytes.
func (l *Log) resize() error {
	want := min(int((l.o.MaxBytes-overhead)/l.slotBytes), maxSlots)
	if want < 2 {
		return fmt.Errorf("maximum is %d bytes, but this log was made with slots of %d: it needs two of them and %d more bytes",
			l.o.MaxBytes, l.slotBytes, overhead)
	}
	have := l.meta.slots
	for i := have - 1; i >= want; i-- {
		free, err := l.slotUnused(i)
		if err != nil {
			return err
		}
		if !free {
			return fmt.Errorf("maximum of %d bytes leaves room for %d slots, but slot %d holds records: keep the maximum at %d or more until they are delivered and recycled",
				l.o.MaxBytes, want, i, overhead+int64(i+1)*l.slotBytes)
		}
	}
	if want < have {
		l.meta.slots = want
		if err := l.rewriteMeta(); err != nil {
			return err
		}
		for i := have - 1; i >= want; i-- {
			if err := os.Remove(l.path(slotName(i))); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return vfs.SyncDir(l.dir)
	}
	// Also where a free slot was lost: recovery notices when it was not free.
	if err := l.makeSlots(want); err != nil {
		return err
	}
	if want > have {
		l.meta.slots = want
		return l.rewriteMeta()
	}
	return nil
}

// rewriteMeta replaces the meta file before it is open for cursors.
func (l *Log) rewriteMeta() error {
	page := make([]byte, 2*pageSize)
	l.meta.generation++
	l.meta.put(page)
	l.meta.put(page[pageSize:])
	return vfs.WritePreparedFile(l.path("meta"), page, 0o600, noCopyOnWrite)
}

// checkUnused refuses to make a log over slots that hold one.
func checkUnused(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, "slot-*"))
	if err != nil {
		return err
	}
	for _, name := range names {
		h, found, err := peekHeader(name)
		if err != nil || found && h.state == stateLive {
			return &DamageError{Slot: "meta", Reason: "it is missing, but " + filepath.Base(name) + " was in use"}
		}
	}
	return nil
}

func (l *Log) slotUnused(i int) (bool, error) {
	h, found, err := peekHeader(l.path(slotName(i)))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return !found || h.state != stateLive, nil
}

// peekHeader reads the header of a slot file. A file that is too short for one
// counts as never used.
func peekHeader(path string) (h header, found bool, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return h, false, err
	}
	defer f.Close()
	b := make([]byte, dataStart)
	if n, _ := f.ReadAt(b, 0); n < len(b) {
		return h, false, nil
	}
	h, _, found, err = readHeader(b)
	return h, found, err
}

// readSmall reads a file of at most limit bytes.
func readSmall(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, min(info.Size(), limit))
	n, err := f.ReadAt(b, 0)
	if n == len(b) {
		err = nil
	}
	return b, err
}

// makeSlots writes the slots 0 to n-1 that do not exist, in full: from then on
// nothing is allocated any more. On error the ones made are removed.
func (l *Log) makeSlots(n int) (err error) {
	var missing []int
	for i := range n {
		info, err := os.Lstat(l.path(slotName(i)))
		if err == nil && info.Mode().IsRegular() && (info.Size() == l.slotBytes || !l.neverUsed(i)) {
			continue // openSlot complains about one that was cut
		}
		missing = append(missing, i)
	}
	if len(missing) == 0 {
		return nil
	}
	total := int64(len(missing)) * l.slotBytes
	if err := l.room(total); err != nil {
		return err
	}
	made := 0
	defer func() {
		if err != nil {
			for _, i := range missing[:made] {
				_ = os.Remove(l.path(slotName(i))) // the first error is the one that matters
			}
		}
	}()
	for k, i := range missing {
		made++
		if err := l.makeSlot(i); err != nil {
			if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
				return fmt.Errorf("%w: make slot %d of %d: %w", ErrCeilingExceeded, i+1, n, err)
			}
			return fmt.Errorf("make slot %d of %d: %w", i+1, n, err)
		}
		if err := l.room(total - int64(k+1)*l.slotBytes); err != nil {
			return err
		}
		if l.o.Progress != nil {
			l.o.Progress(int64(k+1)*l.slotBytes, total)
		}
	}
	return vfs.SyncDir(l.dir)
}

// neverUsed reports whether slot i can be written over: its making was
// interrupted.
func (l *Log) neverUsed(i int) bool {
	h, found, err := peekHeader(l.path(slotName(i)))
	return err == nil && (!found || h.state != stateLive) && l.meta.top == 0
}

// room asks the kernel whether n more bytes leave KeepFree alone.
func (l *Log) room(n int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(l.dir, &st); err != nil {
		return fmt.Errorf("free space: %w", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free-n < l.o.KeepFree {
		return fmt.Errorf("%w: %d bytes are free, %d more are needed for the log and %d are to stay free: lower the maximum, or give it a larger disk",
			ErrCeilingExceeded, free, n, l.o.KeepFree)
	}
	return nil
}

func (l *Log) makeSlot(i int) error {
	f, err := os.OpenFile(l.path(slotName(i)), os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(l.fillSlot(f), f.Close())
}

// fillSlot writes all of a new slot, durably.
func (l *Log) fillSlot(f *os.File) error {
	if err := noCopyOnWrite(f); err != nil {
		return err
	}
	// Reserve first: one extent where there is room, and a full disk is met
	// before anything is written. Then write: a store to an extent that was only
	// reserved costs a journal commit at the next sync.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, l.slotBytes); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	// Large writes leave large folios in the page cache, of which a store through
	// the mapping would make the next sync write all. So they are dropped where a
	// ring is to be used, past which nobody writes to the slot; else it is written
	// page by page, and is in memory when it is needed.
	ring := l.o.RingDir != "" && l.o.Mode != ModeMapped
	zero := make([]byte, pageSize)
	if ring {
		zero = make([]byte, 1<<20)
	}
	for off := int64(0); off < l.slotBytes; off += int64(len(zero)) {
		if _, err := f.WriteAt(zero[:min(int64(len(zero)), l.slotBytes-off)], off); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if ring {
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // advice only
	}
	return nil
}

// noCopyOnWrite turns copying off on btrfs: there every write takes new blocks,
// so a full disk would kill a mapping that was written long ago.
func noCopyOnWrite(f *os.File) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Type != btrfsMagic {
		return nil
	}
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|fsNoCOW)
	}
	if err != nil {
		return fmt.Errorf("btrfs: cannot turn copy-on-write off for %s: %w; put the log on another file system", f.Name(), err)
	}
	return nil
}

// openSlot opens and maps slot i.
func (l *Log) openSlot(i int) error {
	f, err := os.OpenFile(l.path(slotName(i)), os.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	s := &slot{index: i, file: f}
	l.slots = append(l.slots, s)
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != l.slotBytes {
		return &DamageError{Slot: slotName(i), Offset: info.Size(),
			Reason: fmt.Sprintf("the file has %d bytes, want %d: it was cut or replaced", info.Size(), l.slotBytes)}
	}
	if s.m, err = mapFile(f, l.slotBytes, true, true); err != nil {
		return err
	}
	// For recovery, which reads the file: see mapFile.
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM) // advice only
	return nil
}
