package assurance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/assurance/disk"
)

// fileSystems names the magics that a detail may show.
var fileSystems = map[uint32]string{
	unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs",
	unix.RAMFS_MAGIC: "ramfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.F2FS_SUPER_MAGIC: "f2fs", 0x2fc12fc1: "zfs",
	unix.BCACHEFS_SUPER_MAGIC: "bcachefs", unix.MSDOS_SUPER_MAGIC: "vfat", unix.EXFAT_SUPER_MAGIC: "exfat",
}

func fileSystem(magic uint32) string {
	if name, ok := fileSystems[magic]; ok {
		return name
	}
	return fmt.Sprintf("a file system of type %#x", magic)
}

// probeStateDir checks that everything persistent lies on this machine (INV-01).
func probeStateDir(dir string) []Check {
	c := Check{Name: "state_dir", Tried: "resolved the path and its entries, asked statfs what is below",
		Why: "state that another machine can change, or that lies elsewhere, is not this node's",
		Fix: "Name an existing directory on a local disk, without symbolic links in it."}
	subs, err := entries(dir)
	if err != nil {
		return []Check{c.failed(err)}
	}
	root, err := disk.LocalRoot(dir, subs...)
	if err != nil {
		return []Check{c.failed(err)}
	}
	st, err := disk.StatFS(root)
	if err != nil {
		return []Check{c.failed(err)}
	}
	c.Result, c.Detail = OK, fmt.Sprintf("%s, %d MiB available, %s", fileSystem(st.Type), st.Available>>20, root)
	return []Check{c}
}

// maxEntries bounds what is looked at in a state directory; the programs make a
// handful.
const maxEntries = 256

// entries lists what in dir is, or could stand for, a directory.
func entries(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	defer d.Close()
	list, _ := d.ReadDir(maxEntries) // io.EOF on an empty directory; LocalRoot judges the rest
	var out []string
	for _, e := range list {
		if e.IsDir() || e.Type()&os.ModeSymlink != 0 {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// How fdatasync is timed, and judged.
const (
	syncRounds = 10
	syncBytes  = 4096
	tooFast    = 10 * time.Microsecond // no device answers sooner: the flush is not sent
)

// probeSync times fdatasync on a file of the state directory. A time cannot
// prove that a disk is honest; it can show that one is not.
func probeSync(ctx context.Context, dir string) []Check {
	c := Check{Name: "fsync", Tried: fmt.Sprintf("appended %d bytes and called fdatasync, %d times", syncBytes, syncRounds),
		Why: "a decision is answered once its record is durable; it must be",
		Fix: "Put the state directory on a disk of its own, with write barriers on (not tmpfs, not a container's overlay)."}
	st, err := disk.StatFS(dir)
	if err != nil {
		return []Check{c.failed(err)}
	}
	times, err := timeSync(ctx, dir)
	if err != nil {
		return []Check{c.failed(err)}
	}
	slices.Sort(times)
	median := times[len(times)/2]
	c.Detail = fmt.Sprintf("median %s on %s", median.Round(time.Microsecond), fileSystem(st.Type))
	switch {
	case st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC:
		c.Result, c.Detail = Degraded, c.Detail+": memory, gone with the power"
	case st.Type == unix.OVERLAYFS_SUPER_MAGIC:
		c.Result, c.Detail = Degraded, c.Detail+": goes with the container"
	case median < tooFast:
		c.Result, c.Detail = Degraded, c.Detail+": faster than any disk, so nothing reaches one"
	default: // a slow disk is honest
		c.Result = OK
	}
	return []Check{c}
}

func timeSync(ctx context.Context, dir string) (times []time.Duration, err error) {
	f, err := os.CreateTemp(dir, ".probe-fsync-*")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	block := make([]byte, syncBytes)
	for range syncRounds {
		if _, err := f.Write(block); err != nil {
			return nil, err
		}
		start := time.Now()
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return nil, fmt.Errorf("fdatasync in %s: %w", filepath.Clean(dir), err)
		}
		times = append(times, time.Since(start))
		if ctx.Err() != nil {
			return nil, fmt.Errorf("fdatasync: %d took longer than the probe may: %w", len(times), ctx.Err())
		}
	}
	return times, nil
}
