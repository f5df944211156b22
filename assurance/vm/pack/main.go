// Command pack writes an initramfs: a cpio archive in the "newc" format (kernel:
// Documentation/driver-api/early-userspace/buffer-format.rst).
//
//	pack OUT FILE=PATH … DIR/ … TARGET>PATH …
//
// FILE=PATH puts a file at PATH, with mode 0755. DIR/ makes a directory.
// TARGET>PATH makes a symbolic link. Directories above are made as needed.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: pack OUT FILE=PATH … DIR/ … TARGET>PATH …")
		os.Exit(2)
	}
	if err := pack(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

func pack(out string, items []string) (err error) {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := &archive{w: bufio.NewWriterSize(f, 1<<20), dirs: map[string]bool{".": true, "/": true}}
	for _, item := range items {
		switch {
		case strings.HasSuffix(item, "/"):
			w.dir(path.Clean(item))
		case strings.Contains(item, ">"):
			target, at, _ := strings.Cut(item, ">")
			w.dir(path.Dir(at))
			w.entry(at, 0o120777, []byte(target))
		default:
			file, at, ok := strings.Cut(item, "=")
			if !ok {
				return fmt.Errorf("%q: want FILE=PATH, DIR/ or TARGET>PATH", item)
			}
			b, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			w.dir(path.Dir(at))
			w.entry(at, 0o100755, b)
		}
	}
	w.entry("TRAILER!!!", 0, nil)
	return errors.Join(w.err, w.w.Flush())
}

type archive struct {
	w     *bufio.Writer
	inode int
	dirs  map[string]bool
	err   error
}

func (a *archive) dir(d string) {
	if a.dirs[d] {
		return
	}
	a.dir(path.Dir(d))
	a.dirs[d] = true
	a.entry(d, 0o40755, nil)
}

func (a *archive) entry(name string, mode uint32, data []byte) {
	name = strings.TrimPrefix(name, "/")
	a.inode++
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	a.write([]byte(head))
	a.write(data)
}

// write pads to 4 bytes.
func (a *archive) write(b []byte) {
	for _, part := range [][]byte{b, make([]byte, (4-len(b)%4)%4)} {
		if a.err == nil {
			_, a.err = io.Copy(a.w, strings.NewReader(string(part)))
		}
	}
}
