package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotLocal is wrapped when a path leaves the local root or lies on a file
// system that other machines share (INV-01).
var ErrNotLocal = errors.New("not under a local root")

// Stat is what statfs tells.
type Stat struct {
	Type       uint32 // file-system magic
	BlockSize  int64
	Available  int64 // bytes an ordinary user may still take
	Total      int64
	Inodes     int64 // 0: the file system does not count them
	FreeInodes int64
}

// StatFS asks the kernel about the file system of path.
func StatFS(path string) (Stat, error) {
	var st unix.Statfs_t
	for {
		err := unix.Statfs(path, &st)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return Stat{}, fmt.Errorf("statfs %s: %w", path, err)
		}
		break
	}
	block := int64(st.Frsize)
	if block <= 0 {
		block = int64(st.Bsize)
	}
	return Stat{
		Type: uint32(st.Type), BlockSize: block,
		Available: int64(st.Bavail) * block, Total: int64(st.Blocks) * block,
		Inodes: int64(st.Files), FreeInodes: int64(st.Ffree),
	}, nil
}

// remote are the magics of file systems whose content other machines may change,
// or that a user process answers for. FUSE is among them because the kernel
// cannot tell whether what is behind it is local.
var remote = map[uint32]string{
	0x6969:     "NFS",
	0xFF534D42: "CIFS",
	0xFE534D42: "SMB2",
	0x517B:     "SMB",
	0x564C:     "NCP",
	0x65735546: "FUSE",
	0x01021997: "9P",
	0x6B414653: "kAFS",
	0x5346414F: "OpenAFS",
	0x73757245: "Coda",
	0x00C36400: "Ceph",
	0x7461636F: "OCFS2",
	0x01161970: "GFS2",
	0x0BD00BD0: "Lustre",
	0x19830326: "BeeGFS",
	0xA501FCF5: "VxFS cluster",
	0x47504653: "GPFS",
	0x013111A8: "IBRIX",
	0x61756673: "AUFS",
	0x786F4256: "vboxsf",
	0xBACBACBC: "VMHGFS",
	0xAAD7AAEA: "PanFS",
}

// CheckType reports whether the file-system magic is one of a local file system.
func CheckType(magic uint32) error {
	if name, ok := remote[magic]; ok {
		return fmt.Errorf("%w: the file system is %s, which other machines may share; use a local disk", ErrNotLocal, name)
	}
	return nil
}

// LocalRoot resolves dir, which must exist, and checks that it is a directory
// on a local file system. Symbolic links in its parents are the operator's
// affair; dir itself may be one only if it stays under its own parent. Each of
// subs that exists must be a directory in dir by its own name: no symbolic link
// and no other mount, as files are renamed between them. It returns the path
// without symbolic links. Errors wrap ErrNotLocal, or are the kernel's.
func LocalRoot(dir string, subs ...string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("state directory: %w", err)
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", fmt.Errorf("state directory: %w", err)
	}
	root, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return "", fmt.Errorf("state directory: %w", err)
	}
	if rel, err := filepath.Rel(parent, root); err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", fmt.Errorf("%w: state directory %s is a symbolic link to %s, outside %s; name the real directory", ErrNotLocal, abs, root, parent)
	}
	fd, err := unix.Open(root, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("state directory %s: %w", root, err)
	}
	defer unix.Close(fd)
	st, err := StatFS(root)
	if err != nil {
		return "", err
	}
	if err := CheckType(st.Type); err != nil {
		return "", fmt.Errorf("state directory %s: %w", root, err)
	}
	for _, sub := range subs {
		if err := beneath(fd, root, sub); err != nil {
			return "", err
		}
	}
	return root, nil
}

// beneath opens sub under the directory fd without leaving it.
func beneath(fd int, root, sub string) error {
	how := unix.OpenHow{
		Flags:   unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_MAGICLINKS,
	}
	sfd, err := unix.Openat2(fd, sub, &how)
	switch {
	case err == nil:
		unix.Close(sfd)
		return nil
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM):
		// A container's filter may hide openat2: look by name instead.
		info, err := os.Lstat(filepath.Join(root, sub))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("state directory: %w", err)
		}
		if !info.IsDir() {
			return fmt.Errorf("%w: %s is not a directory of its own", ErrNotLocal, filepath.Join(root, sub))
		}
		return nil
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%w: %s is a symbolic link, another mount or no directory; make it a plain directory of %s", ErrNotLocal, filepath.Join(root, sub), root)
	}
	return fmt.Errorf("state directory %s: %w", filepath.Join(root, sub), err)
}
