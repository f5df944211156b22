package powercut

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const clockBytes = 8

// A Clock tells a process on a Disk how much the Disk has recorded: whatever the
// process has seen happen before Now, the events before that place have caused.
// It is read with one system call and takes no part in what the disk does.
type Clock struct{ f *os.File }

// NewClock reads Disk.ClockFile, which the process has inherited.
func NewClock(f *os.File) Clock { return Clock{f} }

// Now is the number of events.
func (c Clock) Now() (int, error) {
	var b [clockBytes]byte
	if _, err := c.f.ReadAt(b[:], 0); err != nil {
		return 0, fmt.Errorf("read the disk's clock: %w", err)
	}
	return int(binary.LittleEndian.Uint64(b[:])), nil
}

// memfd makes a file in memory.
func memfd(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(size); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
