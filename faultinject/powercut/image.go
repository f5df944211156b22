package powercut

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Atom is the largest piece of a write that reaches the device whole or not at
// all, if it is aligned. With 512 ext4 is lost too: its superblock has 1 KiB.
const Atom = 4096

// MaxImage is the largest device, 1 GiB. Only what is not zero takes memory.
const MaxImage = 1 << 30

// An Image is the content of a device. Pages are shared between images and never
// change once they are in one.
type Image struct {
	pages [][]byte // of Atom bytes; nil is zeroes
}

// NewImage returns zeroes. size is a multiple of Atom, at most MaxImage.
func NewImage(size int64) (*Image, error) {
	if size <= 0 || size%Atom != 0 || size > MaxImage {
		return nil, fmt.Errorf("device of %d bytes: want a multiple of %d, at most %d", size, Atom, MaxImage)
	}
	return &Image{pages: make([][]byte, size/Atom)}, nil
}

// Size is the device's.
func (m *Image) Size() int64 { return int64(len(m.pages)) * Atom }

// clone is a copy that can be changed.
func (m *Image) clone() *Image { return &Image{pages: append([][]byte(nil), m.pages...)} }

// write puts p at off and keeps whole pages of it without copying: p must not
// change afterwards. The range lies in the image.
func (m *Image) write(p []byte, off int64) {
	for len(p) > 0 {
		i, in := off/Atom, off%Atom
		n := min(int64(len(p)), Atom-in)
		if n == Atom {
			m.pages[i] = p[:Atom:Atom]
		} else {
			page := make([]byte, Atom)
			copy(page, m.pages[i])
			copy(page[in:], p[:n])
			m.pages[i] = page
		}
		p, off = p[n:], off+n
	}
}

// read fills p from off; what lies outside is zero.
func (m *Image) read(p []byte, off int64) {
	clear(p)
	for len(p) > 0 && off < m.Size() {
		i, in := off/Atom, off%Atom
		n := min(int64(len(p)), Atom-in)
		if m.pages[i] != nil {
			copy(p[:n], m.pages[i][in:])
		}
		p, off = p[n:], off+n
	}
}

// ReadImage reads a file that holds an image, such as mkfs has made.
func ReadImage(f *os.File) (*Image, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	m, err := NewImage(info.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	for off := int64(0); off < m.Size(); {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		off = data &^ (Atom - 1)
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		for ; off < hole; off += Atom {
			page := make([]byte, Atom)
			if _, err := f.ReadAt(page, off); err != nil && !errors.Is(err, io.EOF) {
				return nil, err
			}
			if !zero(page) {
				m.pages[off/Atom] = page
			}
		}
	}
	return m, nil
}

func zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// WriteFile makes f hold the image; pages of zeroes become holes.
func (m *Image) WriteFile(f *os.File) error {
	if err := f.Truncate(m.Size()); err != nil {
		return err
	}
	for i, page := range m.pages {
		if page == nil {
			continue
		}
		if _, err := f.WriteAt(page, int64(i)*Atom); err != nil {
			return err
		}
	}
	return nil
}
