package powercut

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// MaxRecorded is what a Disk records, 512 MiB of written bytes. Beyond it writes
// fail with ENOSPC, and Recording.Full says so.
const MaxRecorded = 512 << 20

// Op is what a device is asked to do.
type Op uint8

// The operations.
const (
	Read Op = iota
	Write
	Flush
)

// Options of a Disk.
type Options struct {
	// Fault is asked before every operation, and answers it when the result is
	// not 0. data is what is written. It is called with the device locked and
	// must not keep data.
	Fault func(op Op, off int64, data []byte) syscall.Errno
	// Delay holds every answer to a write or flush back, so that more is in
	// flight at once.
	Delay time.Duration
	// IgnoreFlush makes a device that answers flushes and does nothing.
	IgnoreFlush bool
}

// A Disk is a block device that records what is done to it.
type Disk struct {
	// Path is the block device.
	Path string

	o     Options
	clock *os.File
	dir   string
	srv   *fuse.Server
	loop  *os.File

	mu   sync.Mutex
	live *Image
	rec  *Recording
	size int64 // bytes recorded
	dead bool
}

// New makes a device that holds base, which does not change.
func New(base *Image, o Options) (_ *Disk, err error) {
	d := &Disk{o: o, live: base.clone(), rec: &Recording{Base: base, IgnoreFlush: o.IgnoreFlush}}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if d.clock, err = memfd("powercut-clock", clockBytes); err != nil {
		return nil, err
	}
	if d.dir, err = os.MkdirTemp("", "powercut-"); err != nil {
		return nil, err
	}
	d.srv, err = fs.Mount(d.dir, &root{d: d}, &fs.Options{MountOptions: fuse.MountOptions{
		DirectMountStrict: true, MaxWrite: 1 << 20, FsName: "powercut", Name: "powercut",
		// Writes go on while others are not answered, as on a device with a queue.
		ExtraCapabilities: fuse.CAP_ASYNC_DIO,
	}})
	if err != nil {
		return nil, fmt.Errorf("mount FUSE: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(d.dir, "disk"), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	d.loop, err = attach(f, true)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	d.Path = d.loop.Name()
	return d, nil
}

// ClockFile is what a process reads the Clock of this device from; it is valid
// until Close.
func (d *Disk) ClockFile() *os.File { return d.clock }

// Now is how many events the device has recorded.
func (d *Disk) Now() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.rec.Events)
}

// SetFault replaces Options.Fault.
func (d *Disk) SetFault(fault func(op Op, off int64, data []byte) syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.o.Fault = fault
}

// PowerOff makes every later write and flush fail and returns what was recorded.
func (d *Disk) PowerOff() *Recording {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	return d.rec
}

// Content is what the device holds, its cache included.
func (d *Disk) Content() *Image {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.live.clone()
}

// Close takes the device away. What is mounted on it must be unmounted first.
func (d *Disk) Close() error {
	var errs []error
	if d.loop != nil {
		errs = append(errs, d.loop.Close()) // the last user of the device detaches it
	}
	if d.srv != nil {
		// The loop device lets go of the file a little after its last user.
		err := d.srv.Unmount()
		for end := time.Now().Add(10 * time.Second); err != nil && time.Now().Before(end); err = d.srv.Unmount() {
			time.Sleep(5 * time.Millisecond)
		}
		errs = append(errs, err)
	}
	if d.dir != "" {
		errs = append(errs, os.Remove(d.dir))
	}
	if d.clock != nil {
		errs = append(errs, d.clock.Close())
	}
	return errors.Join(errs...)
}

// note records an event; mu is held. The clock is set before the answer to the
// event leaves, so what depends on the answer reads a clock that counts it.
func (d *Disk) note(e Event) {
	d.rec.Events = append(d.rec.Events, e)
	var b [clockBytes]byte
	binary.LittleEndian.PutUint64(b[:], uint64(len(d.rec.Events)))
	if _, err := d.clock.WriteAt(b[:], 0); err != nil {
		d.rec.Full = true // a clock that stands still would make the record worthless
	}
}

func (d *Disk) fault(op Op, off int64, data []byte) syscall.Errno {
	if d.dead && op != Read {
		return syscall.EIO
	}
	if d.o.Fault != nil {
		return d.o.Fault(op, off, data)
	}
	return 0
}

func (d *Disk) write(p []byte, off int64) syscall.Errno {
	d.mu.Lock()
	if e := d.fault(Write, off, p); e != 0 {
		d.mu.Unlock()
		return e
	}
	if d.size+int64(len(p)) > MaxRecorded || off < 0 || off+int64(len(p)) > d.live.Size() {
		d.rec.Full = true
		d.mu.Unlock()
		return syscall.ENOSPC
	}
	d.size += int64(len(p))
	p = append([]byte(nil), p...)
	d.live.write(p, off)
	n := len(d.rec.Events)
	d.note(Event{Kind: WriteBegin, Off: off, Data: p})
	d.mu.Unlock()
	d.pause()
	d.mu.Lock()
	d.note(Event{Kind: WriteEnd, Begin: n})
	d.mu.Unlock()
	return 0
}

func (d *Disk) flush() syscall.Errno {
	d.mu.Lock()
	if e := d.fault(Flush, 0, nil); e != 0 {
		d.mu.Unlock()
		return e
	}
	n := len(d.rec.Events)
	d.note(Event{Kind: FlushBegin})
	d.mu.Unlock()
	d.pause()
	d.mu.Lock()
	d.note(Event{Kind: FlushEnd, Begin: n})
	d.mu.Unlock()
	return 0
}

func (d *Disk) pause() {
	if d.o.Delay > 0 {
		time.Sleep(d.o.Delay)
	}
}

// root is the FUSE file system: one file, the device.
type root struct {
	fs.Inode
	d *Disk
}

func (r *root) OnAdd(ctx context.Context) {
	child := r.NewPersistentInode(ctx, &device{d: r.d}, fs.StableAttr{Mode: syscall.S_IFREG, Ino: 2})
	r.AddChild("disk", child, false)
}

type device struct {
	fs.Inode
	d *Disk
}

var (
	_ fs.NodeOpener    = (*device)(nil)
	_ fs.NodeGetattrer = (*device)(nil)
	_ fs.NodeReader    = (*device)(nil)
	_ fs.NodeWriter    = (*device)(nil)
	_ fs.NodeFsyncer   = (*device)(nil)
)

func (f *device) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES, 0
}

func (f *device) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Blksize = 0o600, uint64(f.d.live.Size()), Atom
	out.Blocks = out.Size / 512
	return 0
}

func (f *device) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if e := f.d.fault(Read, off, nil); e != 0 {
		return nil, e
	}
	p = p[:max(0, min(int64(len(p)), f.d.live.Size()-off))]
	f.d.live.read(p, off)
	return fuse.ReadResultData(p), 0
}

func (f *device) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	if e := f.d.write(p, off); e != 0 {
		return 0, e
	}
	return uint32(len(p)), 0
}

func (f *device) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return f.d.flush() }
