package run

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// shared is the tmpfs that every user may write to.
const shared = "/dev/shm"

// RuntimeDir is a directory of this user alone, in memory, for what a daemon
// ("node") may lose when the machine does: it is made if need be, and the same at
// every start. The first that will do of $RUNTIME_DIRECTORY (systemd gives it),
// $XDG_RUNTIME_DIR, for root /run/autonomy/NAME, and a directory of this user in
// the shared tmpfs. The error says of each why it will not; then do without.
func RuntimeDir(name string) (string, error) {
	first, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":")
	tried := []struct {
		base string
		sub  []string
	}{
		{first, nil},
		{os.Getenv("XDG_RUNTIME_DIR"), []string{"autonomy", name}},
		{"/run", []string{"autonomy", name}},
		{shared, []string{"autonomy-" + strconv.Itoa(os.Geteuid()), name}},
	}
	if os.Geteuid() != 0 {
		tried[2].base = ""
	}
	var why []error
	for _, t := range tried {
		if !filepath.IsAbs(t.base) { // not set, or to be ignored, as StateDir
			continue
		}
		dir, err := memoryDir(t.base, t.sub)
		if err == nil {
			return dir, nil
		}
		why = append(why, err)
	}
	return "", fmt.Errorf("no directory in memory: %w", errors.Join(why...))
}

// memoryDir makes the directories sub below base, one in the other. All of them
// must be on a tmpfs and this user's alone; only base may be writable by others,
// if its sticky bit keeps them from replacing what is in it. Whoever made one of
// the names before, or a link in its place, has it refused.
func memoryDir(base string, sub []string) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(base, &st); err != nil {
		return "", fmt.Errorf("%s: %w", base, err)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return "", fmt.Errorf("%s is not on a tmpfs", base)
	}
	info, err := os.Stat(base)
	if err != nil {
		return "", err
	}
	sticky := info.Mode()&fs.ModeSticky != 0
	if info.Mode()&0o022 != 0 && (!sticky || len(sub) == 0) {
		return "", fmt.Errorf("%s can be written by others (mode %v)", base, info.Mode())
	}
	if o, ok := owner(info); !ok || o != 0 && o != os.Geteuid() {
		return "", fmt.Errorf("%s belongs to user %d, want %d or root", base, o, os.Geteuid())
	}
	dir := base
	for _, s := range sub {
		dir = filepath.Join(dir, s)
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
		info, err := os.Lstat(dir)
		if err != nil {
			return "", err
		}
		o, ok := owner(info)
		switch {
		case !info.IsDir():
			return "", fmt.Errorf("%s is not a directory (mode %v): somebody made it", dir, info.Mode())
		case !ok || o != os.Geteuid():
			return "", fmt.Errorf("%s belongs to user %d, want %d: somebody made it", dir, o, os.Geteuid())
		case info.Mode()&0o022 != 0:
			return "", fmt.Errorf("%s can be written by others (mode %v), want 0700", dir, info.Mode())
		}
		// A mount may stand on any of the names.
		if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
			return "", errors.Join(fmt.Errorf("%s is not on a tmpfs", dir), err)
		}
	}
	return dir, unix.Access(dir, unix.W_OK|unix.X_OK)
}

// owner is the user a file belongs to.
func owner(info fs.FileInfo) (uid int, ok bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return -1, false
	}
	return int(st.Uid), true
}
