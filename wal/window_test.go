package wal

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A segment that cannot be read, or that ends before it should, is damage; what a
// window reads is what the mapping holds, however large its frames and groups are.
func TestWindow(t *testing.T) {
	once(t)
	t.Parallel()
	dir := t.TempDir()
	o := inMode(Options{SegmentBytes: 4 << 20, MaxBytes: 12 << 20})
	l, _ := open(t, dir, o)
	for _, n := range []int{1, 1_000_000, 300, windowBytes - 40, windowBytes, 7, 900_000, 900_000, 900_000, 5} {
		_, err := l.Append(ClassAction, make([]byte, n))
		must(t, err)
	}
	must(t, l.Close())
	s, err := OpenReadOnly(dir)
	must(t, err)
	defer s.Close()
	if len(s.segs) < 2 {
		t.Fatalf("%d segments", len(s.segs))
	}
	x, next := s.segs[0], s.segs[1]
	walk := func(file *os.File, read, quick bool) (*walk, error) {
		x.file = file
		w := newWalk(x, &window{read: read})
		w.quick = quick
		_, err := w.segment(x, next, nil)
		return w, err
	}
	whole := x.file
	mapped, err := walk(whole, false, false)
	must(t, err)
	for _, quick := range []bool{false, true} {
		w, err := walk(whole, true, quick)
		if err != nil || w.next != mapped.next || w.chain != mapped.chain || w.records != mapped.records {
			t.Errorf("quick %v: %+v, %v, want %+v", quick, w, err, mapped)
		}
	}
	b, err := os.ReadFile(whole.Name())
	must(t, err)
	path := filepath.Join(t.TempDir(), "cut")
	must(t, os.WriteFile(path, b[:windowBytes*3], 0o600))
	cut, err := os.Open(path)
	must(t, err)
	for range 2 { // cut, then closed
		_, err = walk(cut, true, true)
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "cannot be read") {
			t.Errorf("a file that cannot be read: %v", err)
		}
		cut.Close()
	}
	x.file = whole
}
