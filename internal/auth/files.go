package auth

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"
)

// MaxFileBytes bounds each file of this package but the revocation list.
const MaxFileBytes = 4 << 20

// readFile reads a file that decides who may call. One that others may write,
// or that belongs to another user than root and our own, is refused: whoever
// can write it is whoever they like.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := trusted(info); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s: over %d bytes", path, limit)
	}
	return data, nil
}

func trusted(info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("is no regular file")
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("mode is %04o: others may write it; chmod go-w it", info.Mode().Perm())
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("belongs to uid %d, want root or the uid of this process, %d", st.Uid, os.Geteuid())
	}
	return nil
}

// watch notices that one of some files changed.
type watch struct {
	paths []string
	last  []stamp
}

// stamp tells two states of a file apart. A file that was replaced has another
// inode, also within one tick of its file system's clock.
type stamp struct {
	mtime time.Time
	size  int64
	inode uint64
	mode  fs.FileMode
	err   bool
}

func newWatch(paths ...string) *watch {
	w := &watch{}
	for _, p := range paths {
		if p != "" {
			w.paths = append(w.paths, p)
		}
	}
	w.last = make([]stamp, len(w.paths))
	w.changed()
	return w
}

// changed reports whether a file is not what it was at the last call.
func (w *watch) changed() (changed bool) {
	for i, p := range w.paths {
		var now stamp
		if info, err := os.Stat(p); err != nil {
			now.err = true
		} else {
			now = stamp{mtime: info.ModTime(), size: info.Size(), mode: info.Mode()}
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				now.inode = st.Ino
			}
		}
		if now != w.last[i] {
			changed = true
		}
		w.last[i] = now
	}
	return changed
}
