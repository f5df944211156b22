// Package fstool is tool.fs.read and tool.fs.write: files under one root
// directory, and nowhere else.
//
// The root is opened once, at load, as an os.Root: every path is resolved below
// that directory one component at a time by the kernel, so "..", an absolute
// path, or a symbolic link that leads out is refused with outcome "denied" and
// code path_denied, also when the tree changes in between. Only regular files
// are opened; a FIFO or a device is denied before it can block. What os.Root
// does not see is a hard link or a mount inside the root: whoever can make these
// is trusted with the files they show.
//
// A write replaces the whole file or nothing: temporary file in the same
// directory, fsync, rename, fsync of the directory.
//
// If policy gave constraints.fs, a list of absolute paths prefixed "ro:" or
// "rw:", the file must also lie in one of them (rw for a write), judged by
// where the open directory really is.
//
// Output of read: {"content","size"}, with "encoding":"base64" for what is no
// UTF-8 text and "truncated": true when the file is longer than max_bytes.
// Output of write: {"bytes"}. A Tool is safe for concurrent use.
package fstool

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

// Codes of results.
const (
	CodePath       = "path_denied"       // denied: the path leads out of the root, or to no regular file
	CodeNotFound   = "not_found"         // error
	CodePermission = "permission_denied" // error: the node's user may not
	CodeTooLarge   = "content_too_large" // error: a write over max_bytes
	CodeParams     = "params_refused"    // error: content that cannot be decoded
	CodeIO         = "io_error"          // error: anything else that the file system says
)

// Limits.
const (
	DefaultMaxBytes = 256 << 10           // bytes read or written, unless configured
	MaxMaxBytes     = executor.MaxContent // the most that can be configured: 720 KiB
	maxPath         = 4096
)

// Config is one fs tool of tools.yaml.
type Config struct {
	Root     string // absolute path of a directory
	MaxBytes int64  // 0: DefaultMaxBytes
}

// Tool is the executor of both; Write tells which.
type Tool struct {
	root  *os.Root
	max   int64
	write bool
}

// NewRead opens the root for tool.fs.read.
func NewRead(cfg Config) (*Tool, error) { return open(cfg, false) }

// NewWrite opens the root for tool.fs.write.
func NewWrite(cfg Config) (*Tool, error) { return open(cfg, true) }

func open(cfg Config, write bool) (*Tool, error) {
	switch {
	case cfg.Root == "":
		return nil, errors.New("root is missing: want the absolute path of a directory")
	case !filepath.IsAbs(cfg.Root):
		return nil, fmt.Errorf("root %q: want an absolute path", cfg.Root)
	case cfg.MaxBytes < 0 || cfg.MaxBytes > MaxMaxBytes:
		return nil, fmt.Errorf("max_bytes is %d, want 1 to %d", cfg.MaxBytes, MaxMaxBytes)
	case cfg.MaxBytes == 0:
		cfg.MaxBytes = DefaultMaxBytes
	}
	root, err := os.OpenRoot(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("root: %w", err)
	}
	return &Tool{root: root, max: cfg.MaxBytes, write: write}, nil
}

// Close closes the root. Calls must have ended.
func (t *Tool) Close() error { return t.root.Close() }

var (
	readSchema = json.RawMessage(`{"type":"object","additionalProperties":false,"required":["path"],"properties":{
"path":{"type":"string","description":"path relative to the tool's root","minLength":1,"maxLength":4096}}}`)
	writeSchema = json.RawMessage(`{"type":"object","additionalProperties":false,"required":["path","content"],"properties":{
"path":{"type":"string","description":"path relative to the tool's root; its directory must exist","minLength":1,"maxLength":4096},
"content":{"type":"string","description":"the whole new content of the file"},
"encoding":{"type":"string","enum":["base64"],"description":"how content is encoded; absent: text"}}}`)
)

// Schema is the JSON Schema of the params.
func (t *Tool) Schema() json.RawMessage {
	if t.write {
		return writeSchema
	}
	return readSchema
}

type params struct {
	Path     string `json:"path"`
	Content  string `json:"content"`
	Encoding string `json:"encoding"`
}

// Execute reads or writes.
func (t *Tool) Execute(ctx context.Context, r *executor.Request) executor.Result {
	var p params
	if err := strictjson.Unmarshal(r.Params, &p); err != nil {
		return executor.Fail(CodeParams, err.Error())
	}
	if len(p.Path) > maxPath || strings.ContainsRune(p.Path, 0) {
		return executor.Deny(CodePath, "the path is too long or holds a NUL byte")
	}
	if ctx.Err() != nil {
		return executor.Stopped(ctx)
	}
	if t.write {
		return t.put(p, r.Constraints.FS)
	}
	limit := t.max
	if n := r.Constraints.OutputMaxBytes; n > 0 {
		limit = min(limit, n)
	}
	return t.get(p.Path, limit, r.Constraints.FS)
}

// get reads at most limit bytes of the file.
func (t *Tool) get(name string, limit int64, list []string) executor.Result {
	// To open a device can be to use it, so look first; and look again at what
	// was opened, which may be another file by then.
	if info, err := t.root.Stat(name); err != nil {
		return refused(name, err)
	} else if !info.Mode().IsRegular() {
		return executor.Deny(CodePath, fmt.Sprintf("%s is no regular file", name))
	}
	f, err := t.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO must not block
	if err != nil {
		return refused(name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return refused(name, err)
	}
	if !info.Mode().IsRegular() {
		return executor.Deny(CodePath, fmt.Sprintf("%s is no regular file", name))
	}
	if err := listed(f, "", list, "ro:", "rw:"); err != nil {
		return executor.Deny(CodePath, fmt.Sprintf("%s: %v", name, err))
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return refused(name, err)
	}
	cut := int64(len(data)) > limit
	if cut {
		data = data[:limit]
	}
	out := struct {
		Content   string `json:"content"`
		Encoding  string `json:"encoding,omitempty"`
		Size      int64  `json:"size"`
		Truncated bool   `json:"truncated,omitempty"`
	}{Size: info.Size(), Truncated: cut}
	out.Content, out.Encoding = executor.Text(data, cut)
	return encode(out)
}

// put replaces the file.
func (t *Tool) put(p params, list []string) executor.Result {
	data := []byte(p.Content)
	if p.Encoding == executor.Base64 {
		var err error
		if data, err = base64.StdEncoding.DecodeString(p.Content); err != nil {
			return executor.Fail(CodeParams, "content is not base64")
		}
	}
	if int64(len(data)) > t.max {
		return executor.Fail(CodeTooLarge, fmt.Sprintf("the content has %d bytes, at most %d are written", len(data), t.max))
	}
	dirName, base := path.Split(p.Path)
	if base == "" || base == "." || base == ".." {
		return executor.Deny(CodePath, fmt.Sprintf("%s names no file", p.Path))
	}
	if dirName == "" {
		dirName = "."
	}
	dir, err := t.root.OpenRoot(dirName)
	if err != nil {
		return refused(p.Path, err)
	}
	defer dir.Close()
	d, err := dir.Open(".")
	if err != nil {
		return refused(p.Path, err)
	}
	defer d.Close()
	if err := listed(d, base, list, "rw:"); err != nil {
		return executor.Deny(CodePath, fmt.Sprintf("%s: %v", p.Path, err))
	}
	perm := fs.FileMode(0o644)
	if info, err := dir.Lstat(base); err == nil {
		if !info.Mode().IsRegular() { // a link is not followed and not replaced
			return executor.Deny(CodePath, fmt.Sprintf("%s is no regular file", p.Path))
		}
		perm = info.Mode().Perm()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return refused(p.Path, err)
	}
	if err := replace(dir, d, base, data, perm); err != nil {
		return refused(p.Path, err)
	}
	return encode(struct {
		Bytes int `json:"bytes"`
	}{len(data)})
}

// replace writes base in dir so that a crash leaves the old bytes or the new.
func replace(dir *os.Root, d *os.File, base string, data []byte, perm fs.FileMode) (err error) {
	tmp := ".autonomy-" + rand.Text()
	f, err := dir.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, dir.Remove(tmp))
		}
	}()
	if _, err := f.Write(data); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Sync(); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := dir.Rename(tmp, base); err != nil {
		return err
	}
	return d.Sync()
}

// listed reports whether the open file, or base in the open directory, lies in
// a path of list that has one of the modes. A nil list allows all.
func listed(f *os.File, base string, list []string, modes ...string) error {
	if list == nil {
		return nil
	}
	real, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
	if err != nil || !filepath.IsAbs(real) {
		return errors.New("its place cannot be found out, and policy limits the places")
	}
	real = filepath.Join(real, base)
	for _, e := range list {
		for _, mode := range modes {
			p, ok := strings.CutPrefix(e, mode)
			if !ok || !filepath.IsAbs(p) {
				continue
			}
			if rel, err := filepath.Rel(filepath.Clean(p), real); err == nil && filepath.IsLocal(rel) {
				return nil
			}
		}
	}
	return errors.New("not in the paths that the policy allows")
}

// refused sorts an error of os.Root. What has no errno is a verdict of os.Root
// itself: the path escapes.
func refused(name string, err error) executor.Result {
	var errno syscall.Errno
	switch {
	case !errors.As(err, &errno), errno == unix.ELOOP, errno == unix.EXDEV:
		return executor.Deny(CodePath, fmt.Sprintf("%s leads out of the root", name))
	case errno == unix.ENOENT, errno == unix.ENOTDIR:
		return executor.Fail(CodeNotFound, fmt.Sprintf("%s: no such file", name))
	case errno == unix.EACCES, errno == unix.EPERM:
		return executor.Fail(CodePermission, fmt.Sprintf("%s: the node's user may not", name))
	case errno == unix.ENXIO:
		return executor.Deny(CodePath, fmt.Sprintf("%s is no regular file", name))
	}
	return executor.Fail(CodeIO, fmt.Sprintf("%s: %v", name, errno))
}

func encode(v any) executor.Result {
	out, err := executor.Encode(v)
	if err != nil {
		return executor.Fail(CodeIO, err.Error())
	}
	return executor.Result{Outcome: executor.OK, Output: out}
}
