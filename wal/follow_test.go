package wal

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Who follows a log in use gets every record once, over recycled slots, and reads
// nothing twice that stands before its bookmark.
func TestFollow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l, _ := open(t, dir, smallOptions())
	var mark Bookmark
	var last uint64
	look := func(want uint64) {
		t.Helper()
		s, err := OpenReadOnly(dir)
		must(t, err)
		defer s.Close()
		for e, err := range s.RecordsSince(t.Context(), &mark) {
			must(t, err)
			if e.Seq <= last {
				continue
			}
			if e.Seq != last+1 || string(e.Payload) != string(payload(e.Seq)) {
				t.Fatalf("record %d behind %d", e.Seq, last)
			}
			last = e.Seq
		}
		if last != want {
			t.Fatalf("read up to %d, want %d", last, want)
		}
	}
	look(0)
	for i := range 60 {
		seq := appendN(t, l, 1+i%40)
		wait(t, l, seq)
		look(seq)
		must(t, l.AdvanceAll(seq))
	}
	if n := l.Stats().Tail.Segment; n < 4 {
		t.Fatalf("only %d segments", n)
	}
	seg, before := l.Stats().Tail.Segment, mark
	if before.at.id != seg {
		t.Fatalf("the bookmark stands in segment %d, the log in %d", before.at.id, seg)
	}
	// A record that was read is not read again: it may even be damaged.
	var name string
	for _, s := range l.Stats().Slots {
		if s.Segment == seg {
			name = filepath.Join(dir, slotName(s.Slot))
		}
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	b := make([]byte, 1)
	for _, x := range []byte{1, 1} { // and back
		if _, err := f.ReadAt(b, dataStart+frameHeader); err != nil {
			t.Fatal(err)
		}
		b[0] ^= x
		if _, err := f.WriteAt(b, dataStart+frameHeader); err != nil {
			t.Fatal(err)
		}
		seq := appendN(t, l, 3)
		wait(t, l, seq)
		look(seq)
	}
	// A bookmark whose segment is gone goes on with what is left.
	mark = Bookmark{at: pos{seg + 100, 4 * pageSize}, next: last - 1}
	s, err := OpenReadOnly(dir)
	must(t, err)
	defer s.Close()
	n := 0
	for e, err := range s.RecordsSince(t.Context(), &mark) {
		must(t, err)
		if e.Seq >= last-1 {
			n++
		}
	}
	if n != 2 {
		t.Errorf("%d of 2 records", n)
	}
	// The chain is checked from the bookmark on.
	mark.chain[0] ^= 1
	wait(t, l, appendN(t, l, 1))
	err = nil
	s2, err2 := OpenReadOnly(dir)
	must(t, err2)
	defer s2.Close()
	for _, err = range s2.RecordsSince(t.Context(), &mark) {
		if err != nil {
			break
		}
	}
	if !errors.Is(err, ErrDamaged) {
		t.Errorf("a log with another chain: %v", err)
	}
}
