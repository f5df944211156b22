package wal

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// A page that was cached beside a direct write of the owner may be old: a reader
// of a log in use reads it again from disk, and passes no record on twice. Here a
// private copy of the page stands in for the old one.
func TestSnapshotReadsAgain(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		off  int64
		live bool
		want error
	}{
		{"the first page of records", dataStart, true, nil},
		{"a page in the middle", dataStart + 5*pageSize, true, nil},
		{"a log that nobody has", dataStart + 5*pageSize, false, ErrDamaged},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			l, last := rotated(t, dir, 1500)
			must(t, l.Close())
			for i := range 3 {
				s, err := OpenReadOnly(dir)
				must(t, err)
				defer s.Close()
				if i >= len(s.segs) {
					t.Fatalf("%d segments", len(s.segs))
				}
				s.live = c.live
				x := s.segs[i]
				old, err := unix.Mmap(int(x.file.Fd()), 0, len(x.m), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
				must(t, err)
				defer unix.Munmap(old)
				clear(old[c.off : c.off+pageSize])
				x.m = old
				var next uint64
				for e, err2 := range s.Records(t.Context()) {
					if err = err2; err != nil {
						break
					}
					if next != 0 && e.Seq != next {
						t.Fatalf("segment %d: record %d, want %d", i, e.Seq, next)
					}
					next = e.Seq + 1
				}
				if !errors.Is(err, c.want) || err == nil && next != last+1 {
					t.Fatalf("segment %d: ends at %d, %v, want %d, %v", i, next-1, err, last, c.want)
				}
			}
		})
	}
}
