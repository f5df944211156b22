package wal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func eightSlots() Options {
	o := smallOptions()
	o.MaxBytes = 8 * minSegment
	return o
}

// reopen opens the log in dir and checks every record.
func reopen(t *testing.T, dir string) (*Log, Recovery) {
	t.Helper()
	l, rec := open(t, dir, eightSlots())
	check(t, l, rec.FirstSeq, rec.LastSeq)
	return l, rec
}

// firstSyncFails makes a log whose second segment cannot be made durable: the
// first group of it fails, and the third segment takes its place. It returns
// the log, the last record, which is durable, and the slot of the segment that
// failed.
func firstSyncFails(t *testing.T, dir string) (l *Log, last uint64, slot string) {
	t.Helper()
	o := eightSlots()
	ok, refuse := 0, 1 // syncs of segment 2 that succeed, and that fail then
	if o.Mode == ModeRing {
		ok, refuse = 1, 2 // its header is written before; a write is repeated once
	}
	var mu sync.Mutex
	o.sync = func(f *os.File) error {
		mu.Lock()
		defer mu.Unlock()
		if h, found, err := peekHeader(f.Name()); err == nil && found && h.id == 2 && refuse > 0 {
			if ok--; ok < 0 {
				refuse--
				slot = filepath.Base(f.Name())
				return syscall.EIO
			}
		}
		return fdatasync(f)
	}
	l, _ = open(t, dir, o)
	for told := false; !told; {
		last = appendN(t, l, 1)
		err := l.WaitDurable(t.Context(), last)
		if told = errors.Is(err, ErrFailed); err != nil && !told {
			t.Fatal(err)
		}
	}
	last = appendN(t, l, 3)
	wait(t, l, last)
	st := l.Stats()
	if st.Failovers != 1 || st.Tail.Segment != 3 || slot == "" {
		t.Fatalf("the first sync of segment 2 did not fail: %+v", st)
	}
	return l, last, slot
}

// noted waits until meta says that the newest segment was durable, so that its
// loss is noticed.
func noted(t *testing.T, l *Log) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		l.metaMu.Lock()
		top := l.meta.top
		l.metaMu.Unlock()
		if top == l.Stats().Tail.Segment {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("meta names segment %d, not the newest", top)
		}
	}
}

// The first sync of a segment fails, so that nobody knows what of it is on disk:
// not even its header may be. Whatever is, what was acknowledged afterwards is
// there, also when the slots before and behind it were used again.
func TestSupersededSegment(t *testing.T) {
	t.Parallel()
	l, last, slot := firstSyncFails(t, t.TempDir())
	noted(t, l)
	states := []struct {
		when string
		im   image
		last uint64
	}{{"at once", readImage(t, l.dir), last}}
	for l.Stats().Tail.Segment < 4 {
		last = appendN(t, l, 5)
		wait(t, l, last)
	}
	noted(t, l)
	states = append(states, struct {
		when string
		im   image
		last uint64
	}{"a segment later", readImage(t, l.dir), last})
	// Everything is used again, the slot that failed is not.
	for l.Stats().Tail.Segment < 13 {
		last = appendN(t, l, 5)
		wait(t, l, last)
		must(t, l.AdvanceAll(last-4))
	}
	must(t, l.Close())
	if _, rec := reopen(t, l.dir); rec.LastSeq != last || rec.FirstSeq == 1 {
		t.Fatalf("after everything was used again: %+v, want last %d", rec, last)
	}

	for _, s := range states {
		for _, c := range []struct {
			name string
			edit func(b []byte)
		}{
			{"all of it on disk", func([]byte) {}},
			{"nothing", func(b []byte) { clear(b) }},
			{"header alone", func(b []byte) { clear(b[dataStart:]) }},
			{"one copy of the header", func(b []byte) { clear(b[pageSize:]) }},
			{"the other copy of the header", func(b []byte) { clear(b[:pageSize]); clear(b[dataStart:]) }},
			{"records alone", func(b []byte) { clear(b[:dataStart]) }},
			{"a torn record", func(b []byte) { b[dataStart+frameHeader] ^= 1 }},
		} {
			t.Run(s.when+"/"+c.name, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "wal")
				s.im.write(t, dir)
				b := append([]byte(nil), s.im[slot]...)
				c.edit(b)
				must(t, os.WriteFile(filepath.Join(dir, slot), b, 0o600))

				if got, _, err := readOnly(t, dir); err != nil || got != s.last {
					t.Fatalf("read only: last %d, %v, want %d", got, err, s.last)
				}
				if rep, err := Repair(dir, RepairOptions{}); err != nil || rep.Damaged {
					t.Fatalf("repair found damage: %+v, %v", rep, err)
				}
				for i := range uint64(3) { // and it goes on, more than once
					l, rec := reopen(t, dir)
					if rec.LastSeq != s.last+40*i || rec.FirstSeq != 1 {
						t.Fatalf("open %d: %+v, want last %d", i, rec, s.last+40*i)
					}
					wait(t, l, appendN(t, l, 40))
					must(t, l.Close())
				}
			})
		}
		// Of the segments that count none may be missing still.
		for name, b := range s.im {
			h, _, used, err := readHeader(append(b, make([]byte, dataStart)...))
			if !strings.HasPrefix(name, "slot-") || err != nil || !used || h.state != stateLive || name == slot {
				continue
			}
			t.Run(fmt.Sprintf("%s/segment %d is missing", s.when, h.id), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "wal")
				s.im.write(t, dir)
				must(t, os.WriteFile(filepath.Join(dir, name), make([]byte, len(b)), 0o600))
				if _, _, err := Open(dir, eightSlots()); !errors.Is(err, ErrDamaged) {
					t.Fatalf("Open: %v, want damage", err)
				}
				if _, err := Repair(dir, RepairOptions{}); err != nil {
					t.Fatal(err)
				}
				l, _, err := Open(dir, eightSlots())
				if err != nil {
					t.Fatalf("after the repair: %v", err)
				}
				l.Close()
			})
		}
	}
}

// A header that is refused from the ring may stand on disk all the same, and the
// segment before goes on beyond the end it names: the slot is left out and its
// file goes.
func TestHeaderRefused(t *testing.T) {
	o := ringOptions(t)
	o.SegmentBytes, o.MaxBytes = minSegment, 4*minSegment
	refuse := 1
	o.sync = func(f *os.File) error { // the committer's alone: fresh slots need no preparing
		if h, found, err := peekHeader(f.Name()); err == nil && found && h.id == 2 && refuse > 0 {
			refuse--
			return syscall.EIO
		}
		return nil
	}
	dir := t.TempDir()
	l, _ := open(t, dir, o)
	var last uint64
	for l.Stats().Tail.Segment == 1 {
		last = appendN(t, l, 1)
		wait(t, l, last)
	}
	if refuse != 0 {
		t.Fatal("no header was refused")
	}
	im := readImage(t, dir)
	must(t, l.Close())
	again := filepath.Join(t.TempDir(), "wal")
	im.write(t, again)
	if got, _, err := verifyAll(t, again); err != nil || got != last {
		t.Fatalf("last %d, %v, want %d", got, err, last)
	}
}
