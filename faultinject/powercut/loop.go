package powercut

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// attach makes a loop device of f. The kernel takes it away when its last user
// is gone: who opened the result, and who mounted it.
func attach(f *os.File, direct bool) (*os.File, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop device: %w", err)
	}
	defer ctl.Close()
	cfg := unix.LoopConfig{Fd: uint32(f.Fd())}
	cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	if direct {
		cfg.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	}
	for range 64 { // others may take the free device first
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("loop device: none free: %w", err)
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("loop device: %w", err)
		}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if err == nil {
			return dev, nil
		}
		_ = dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("loop device: configure %s: %w", dev.Name(), err)
		}
		time.Sleep(time.Millisecond)
	}
	return nil, errors.New("loop device: the free ones were taken by others 64 times")
}

// A Mount is a mounted file system.
type Mount struct {
	Dir    string
	Device string
}

// MountDevice mounts device on a directory of its own.
func MountDevice(device, fstype, options string) (*Mount, error) {
	dir, err := os.MkdirTemp("", "powercut-mnt-")
	if err != nil {
		return nil, err
	}
	if err := unix.Mount(device, dir, fstype, unix.MS_NOATIME, options); err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s as %s: %w", device, fstype, err), os.Remove(dir))
	}
	m := &Mount{Dir: dir, Device: device}
	// What is written now must not land on the disk of this machine.
	var mp, up unix.Stat_t
	if err := errors.Join(unix.Stat(dir, &mp), unix.Stat(filepath.Dir(dir), &up)); err != nil {
		return nil, errors.Join(err, m.Unmount())
	}
	if mp.Dev == up.Dev {
		return nil, errors.Join(fmt.Errorf("mount %s: %s is still a directory of its parent's file system", device, dir), m.Unmount())
	}
	return m, nil
}

// Unmount unmounts and removes the directory. It waits for users that are about
// to leave, at most 10 s.
func (m *Mount) Unmount() error {
	err := unix.Unmount(m.Dir, 0)
	for end := time.Now().Add(10 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(end); err = unix.Unmount(m.Dir, 0) {
		time.Sleep(2 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", m.Dir, err)
	}
	return os.Remove(m.Dir)
}

// A Device holds a copy of an Image in memory, until Close.
type Device struct {
	Path string
	loop *os.File
}

// Attach makes a device that holds a copy of the image; the image does not
// change.
func (m *Image) Attach() (*Device, error) {
	f, err := memfd("powercut-image", 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := m.WriteFile(f); err != nil {
		return nil, err
	}
	dev, err := attach(f, false)
	if err != nil {
		return nil, err
	}
	return &Device{dev.Name(), dev}, nil
}

// Close gives the device up. It goes when it is not mounted any more.
func (d *Device) Close() error { return d.loop.Close() }

// Mount mounts a copy of the image, which goes with the mount.
func (m *Image) Mount(fstype, options string) (*Mount, error) {
	d, err := m.Attach()
	if err != nil {
		return nil, err
	}
	mnt, err := MountDevice(d.Path, fstype, options)
	return mnt, errors.Join(err, d.Close())
}

// FileSystems are the ones that Mkfs makes.
var FileSystems = []string{"ext4", "xfs", "btrfs"}

// mkfs is how each is made, and the smallest size that the tests use.
var mkfs = map[string]struct {
	size int64
	argv []string
}{
	"ext4":  {48 << 20, []string{"mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"}},
	"xfs":   {300 << 20, []string{"mkfs.xfs", "-q", "-f"}}, // mkfs refuses less
	"btrfs": {128 << 20, []string{"mkfs.btrfs", "-q", "-f"}},
}

// Mkfs makes an empty file system of the smallest size that serves.
func Mkfs(fstype string) (*Image, error) {
	how, ok := mkfs[fstype]
	if !ok {
		return nil, fmt.Errorf("file system %q: want one of %v", fstype, FileSystems)
	}
	return MkfsSize(fstype, how.size)
}

// MkfsSize makes an empty file system of size bytes.
func MkfsSize(fstype string, size int64) (_ *Image, err error) {
	how, ok := mkfs[fstype]
	if !ok {
		return nil, fmt.Errorf("file system %q: want one of %v", fstype, FileSystems)
	}
	if _, err := NewImage(size); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp("", "powercut-mkfs-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	if out, err := exec.Command(how.argv[0], append(how.argv[1:len(how.argv):len(how.argv)], f.Name())...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", how.argv[0], err, out)
	}
	return ReadImage(f)
}
