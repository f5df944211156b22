package wal

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
)

// metaFile holds identity, geometry and cursors in two alternating copies, so
// that a write that a crash cuts short leaves the copy before it.
type metaFile struct {
	metaMu sync.Mutex // guards file and meta; held over disk I/O
	file   *os.File
	meta   meta

	cursor [NumClasses]atomic.Uint64
	top    atomic.Uint64 // newest segment whose header is durable
}

// readMeta reads the newer whole copy. found is false when the file is empty or
// absent.
func readMeta(b []byte) (x meta, ok bool) {
	var c meta
	for off := 0; off+metaSize <= len(b) && off <= pageSize; off += pageSize {
		if c.parse(b[off:]) && (!ok || c.generation > x.generation) {
			x, ok = c, true
		}
	}
	return x, ok
}

// update changes the meta file durably; on error nothing has changed.
func (f *metaFile) update(change func(*meta)) error {
	f.metaMu.Lock()
	defer f.metaMu.Unlock()
	if f.file == nil {
		return ErrClosed
	}
	x := f.meta
	change(&x)
	x.generation++
	page := make([]byte, pageSize)
	x.put(page)
	if _, err := f.file.WriteAt(page, int64(x.generation%2)*pageSize); err != nil {
		return fmt.Errorf("write meta file: %w", err)
	}
	failpoint("cursor written")
	if err := fdatasync(f.file); err != nil {
		return err
	}
	f.meta = x
	return nil
}

func (f *metaFile) close() {
	f.metaMu.Lock()
	defer f.metaMu.Unlock()
	if f.file != nil {
		f.file.Close()
		f.file = nil
	}
}

func (f *metaFile) cursors() (c [NumClasses]uint64) {
	for i := range c {
		c[i] = f.cursor[i].Load()
	}
	return c
}

// noteTop records the newest segment, so that the loss of its whole file is
// noticed.
func (l *Log) noteTop() error {
	top := l.top.Load()
	l.metaMu.Lock()
	same := l.meta.top == top
	l.metaMu.Unlock()
	if same {
		return nil
	}
	return l.update(func(x *meta) { x.top = max(x.top, top) })
}

// Cursor is the newest record of class c that its consumer has done with.
func (l *Log) Cursor(c Class) uint64 { return l.cursor[c].Load() }

// Advance moves the cursor of class c to seq, durably: after it, records of
// that class up to seq may be dropped when space is needed. seq may be the
// sequence of a record of another class. A smaller seq than before changes
// nothing. It is an error to pass what is durable.
func (l *Log) Advance(c Class, seq uint64) error {
	if c >= NumClasses {
		return fmt.Errorf("advance: unknown %v", c)
	}
	if d := l.Durable(); seq > d {
		return fmt.Errorf("advance %v cursor to %d: records are durable only up to %d", c, seq, d)
	}
	return l.advance(seq, c)
}

// AdvanceAll is Advance for every class, in one write: for a consumer that takes
// all of them.
func (l *Log) AdvanceAll(seq uint64) error {
	if d := l.Durable(); seq > d {
		return fmt.Errorf("advance cursors to %d: records are durable only up to %d", seq, d)
	}
	return l.advance(seq, ClassError, ClassDecision, ClassAction, ClassLifecycle)
}

func (l *Log) advance(seq uint64, classes ...Class) error {
	behind := false
	for _, c := range classes {
		behind = behind || l.cursor[c].Load() < seq
	}
	if !behind {
		return nil
	}
	err := l.update(func(x *meta) {
		for _, c := range classes {
			x.cursors[c] = max(x.cursors[c], seq)
		}
	})
	if err != nil {
		return fmt.Errorf("advance cursors: %w", err)
	}
	for _, c := range classes {
		raise(&l.cursor[c], seq)
	}
	l.kickPreparer()
	return nil
}

// raise sets v to seq unless it is larger already, and reports whether it did.
func raise(v *atomic.Uint64, seq uint64) bool {
	for {
		old := v.Load()
		if old >= seq {
			return false
		}
		if v.CompareAndSwap(old, seq) {
			return true
		}
	}
}

// SetWatermark tells up to which record the control plane holds everything
// durably. It is not kept: it is asked for anew after a restart. A smaller seq
// than before changes nothing.
func (l *Log) SetWatermark(seq uint64) {
	if raise(&l.watermark, seq) {
		l.kickPreparer()
	}
}
