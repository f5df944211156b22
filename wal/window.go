package wal

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// window is where walk reads a segment: its mapping, of which the pages that were
// passed are given back, or, with read set, a buffer that moves over its file.
// Reading into a buffer that stays in the processor's cache is as fast as bringing
// pages into the page table, does not get slower when others do it too, and takes
// no memory that grows with the log. What must outlive the walk is a view of the
// mapping.
type window struct {
	read   bool
	direct bool // with read: past the page cache, where the file system can do that

	past *os.File // when direct: the file, opened so; nil: it cannot be

	s    *found
	buf  []byte // when read: what stands from base on
	base int64
	need int64 // what stands before it is not needed any more
	gone int64 // pages below it were given back
}

const (
	windowBytes = 256 << 10 // of a buffer; a larger frame makes it larger
	giveBack    = 1 << 20   // bytes of a mapping that are given back at once
)

// open moves the window to s, from off on.
func (v *window) open(s *found, off int64) {
	v.s, v.need, v.gone = s, off, off&^(pageSize-1)
	v.reload(off)
	switch {
	case v.direct:
		v.past, _ = os.OpenFile(s.file.Name(), os.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0) // else through the cache
	case v.read:
		readFileAhead(s.file)
	}
}

// reload forgets what was read.
func (v *window) reload(off int64) { v.base, v.buf = off, v.buf[:0] }

// done gives back what is left.
func (v *window) done() {
	if !v.read {
		dropPages(v.s.m[v.gone:])
	}
	if v.past != nil {
		v.past.Close()
		v.past = nil
	}
}

// release says that nothing before off will be asked for.
func (v *window) release(off int64) {
	v.need = off
	if to := off &^ (pageSize - 1); !v.read && to-v.gone >= giveBack {
		dropPages(v.s.m[v.gone:to])
		v.gone = to
	}
}

// frame reads the frame at off, of which nothing may reach beyond end.
func (v *window) frame(off, end int64) (f frame, ok bool, err error) {
	key := keyAt(v.s.epochs, off)
	if !v.read {
		f, ok = parseFrame(v.s.m, key, off, end)
		return f, ok, nil
	}
	for size := int64(frameHeader); ; {
		b := v.buf[min(off-v.base, int64(len(v.buf))):]
		if len(b) >= frameHeader {
			size = frameSize(int(uint32(loadWord(b))))
		}
		if off+size > end {
			return frame{}, false, nil
		}
		if int64(len(b)) >= size {
			f, ok = parseAt(b[:min(int64(len(b)), end-off)], key, off)
			return f, ok, nil
		}
		if err := v.fill(off+size, end); err != nil {
			return frame{}, false, err
		}
	}
}

// fill reads from what is still needed to at least to, at most to end.
func (v *window) fill(to, end int64) error {
	base, n := v.need, max(to-v.need, min(windowBytes, end-v.need))
	src := v.s.file
	if v.past != nil { // whole pages, as O_DIRECT wants them: a slot is made of those
		src, base = v.past, v.need&^(pageSize-1)
		n = (v.need + n - base + pageSize - 1) &^ (pageSize - 1)
	}
	if int64(cap(v.buf)) < n {
		v.buf = pageAligned(n)
	}
	v.base, v.buf = base, v.buf[:n]
	if _, err := src.ReadAt(v.buf, base); err != nil {
		v.buf = v.buf[:0]
		if err == io.EOF {
			err = io.ErrUnexpectedEOF // somebody cut it
		}
		return err
	}
	return nil
}

// bytes is what stands from from to to: needed, and passed by frame.
func (v *window) bytes(from, to int64) []byte {
	if !v.read {
		return v.s.m[from:to]
	}
	return v.buf[from-v.base : to-v.base]
}
