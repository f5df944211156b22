package fstool

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tree is a root with a file, a directory and ways out, and a secret outside.
func tree(t *testing.T) (root, secret string) {
	t.Helper()
	base := t.TempDir()
	root, secret = filepath.Join(base, "root"), filepath.Join(base, "secret")
	for _, err := range []error{
		os.MkdirAll(filepath.Join(root, "sub"), 0o755),
		os.WriteFile(secret, []byte("secret"), 0o600),
		os.WriteFile(filepath.Join(root, "a.txt"), []byte("grüße"), 0o640),
		os.WriteFile(filepath.Join(root, "sub", "b.bin"), []byte("\xff\x00"), 0o644),
		os.Symlink("a.txt", filepath.Join(root, "inside")),
		os.Symlink("../secret", filepath.Join(root, "up")),
		os.Symlink(secret, filepath.Join(root, "abs")),
		os.Symlink("..", filepath.Join(root, "updir")),
		os.Symlink("/", filepath.Join(root, "slash")),
		os.Symlink("loop", filepath.Join(root, "loop")),
		os.Symlink("/proc/self/root", filepath.Join(root, "magic")),
		unix.Mkfifo(filepath.Join(root, "fifo"), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return root, secret
}

func open2(t *testing.T, root string, max int64) (read, write *Tool) {
	t.Helper()
	read, err := NewRead(Config{Root: root, MaxBytes: max})
	if err != nil {
		t.Fatal(err)
	}
	write, err = NewWrite(Config{Root: root, MaxBytes: max})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := read.Close(); err != nil {
			t.Error(err)
		}
		if err := write.Close(); err != nil {
			t.Error(err)
		}
	})
	return read, write
}

func do(t *testing.T, x *Tool, c constraint.Constraints, kv ...string) (executor.Result, map[string]any) {
	t.Helper()
	p := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		p[kv[i]] = kv[i+1]
	}
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	r := x.Execute(t.Context(), &executor.Request{Params: b, Constraints: c})
	var out map[string]any
	if r.Output != nil {
		if err := json.Unmarshal(r.Output, &out); err != nil {
			t.Fatalf("%s: %v", r.Output, err)
		}
	}
	return r, out
}

// listing is the whole tree with contents, to see that nothing changed.
func listing(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(filepath.Dir(dir), func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %s", p, d.Type())
		if d.Type().IsRegular() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", data)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestRead(t *testing.T) {
	root, _ := tree(t)
	read, _ := open2(t, root, 0)
	for name, want := range map[string]string{
		"a.txt": `{"content":"grüße","size":7}`, "./a.txt": `{"content":"grüße","size":7}`, "sub/../a.txt": `{"content":"grüße","size":7}`,
		"inside": `{"content":"grüße","size":7}`, "sub/b.bin": `{"content":"/wA=","encoding":"base64","size":2}`,
	} {
		if r, _ := do(t, read, constraint.Constraints{}, "path", name); r.Outcome != executor.OK || string(r.Output) != want {
			t.Errorf("%s: %+v %s, want %s", name, r, r.Output, want)
		}
	}
	r, _ := do(t, read, constraint.Constraints{OutputMaxBytes: 4}, "path", "a.txt")
	if string(r.Output) != `{"content":"gr","size":7,"truncated":true}` && string(r.Output) != `{"content":"grü","size":7,"truncated":true}` {
		t.Errorf("cut: %s", r.Output)
	}
}

// TestEscapes tries every way out, for reading and for writing.
func TestEscapes(t *testing.T) {
	root, secret := tree(t)
	read, write := open2(t, root, 0)
	before := listing(t, root)
	for _, tc := range []struct{ path, code string }{
		{"../secret", CodePath},
		{"sub/../../secret", CodePath},
		{secret, CodePath},
		{"/etc/passwd", CodePath},
		{"up", CodePath},
		{"abs", CodePath},
		{"updir/secret", CodePath},
		{"slash/etc/passwd", CodePath},
		{"magic/etc/passwd", CodePath},
		{"loop", CodePath},
		{"fifo", CodePath},
		{"sub", CodePath},
		{".", CodePath},
		{"..", CodePath},
		{"", ""},
		{"a\x00b", CodePath},
		{strings.Repeat("a/", 3000), CodePath},
	} {
		r, _ := do(t, read, constraint.Constraints{}, "path", tc.path)
		if r.Outcome == executor.OK || tc.code != "" && (r.Outcome != executor.Denied || r.Code != tc.code) || strings.Contains(string(r.Output), "secret") {
			t.Errorf("read %.40q: %+v", tc.path, r)
		}
		w, _ := do(t, write, constraint.Constraints{}, "path", tc.path, "content", "owned")
		if w.Outcome == executor.OK || tc.code != "" && (w.Outcome != executor.Denied || w.Code != tc.code) {
			t.Errorf("write %.40q: %+v", tc.path, w)
		}
	}
	if after := listing(t, root); after != before {
		t.Errorf("the tree changed:\n%s\nwas:\n%s", after, before)
	}
}

func TestErrors(t *testing.T) {
	root, _ := tree(t)
	read, write := open2(t, root, 8)
	before := listing(t, root)
	for _, tc := range []struct {
		x    *Tool
		kv   []string
		code string
	}{
		{read, []string{"path", "none"}, CodeNotFound},
		{read, []string{"path", "none/none"}, CodeNotFound},
		{read, []string{"path", "a.txt/x"}, CodeNotFound},
		{read, []string{"path", "a.txt", "mode", "w"}, CodeParams},
		{write, []string{"path", "none/x", "content", ""}, CodeNotFound},
		{write, []string{"path", "x", "content", "123456789"}, CodeTooLarge},
		{write, []string{"path", "x", "content", "%%%", "encoding", "base64"}, CodeParams},
		{write, []string{"path", "inside", "content", "x"}, CodePath}, // a link is not replaced
		{write, []string{"path", "sub", "content", "x"}, CodePath},
	} {
		if r, _ := do(t, tc.x, constraint.Constraints{}, tc.kv...); r.Code != tc.code || r.Output != nil {
			t.Errorf("%q: %+v, want %s", tc.kv, r, tc.code)
		}
	}
	if after := listing(t, root); after != before {
		t.Errorf("the tree changed:\n%s", after)
	}
}

func TestWrite(t *testing.T) {
	root, _ := tree(t)
	_, write := open2(t, root, 0)
	for _, tc := range []struct{ path, content, encoding, want string }{
		{"new.txt", "hello", "", "hello"},
		{"a.txt", "", "", ""},
		{"sub/new.bin", "/wA=", "base64", "\xff\x00"},
		{"sub/../c", "c", "", "c"},
	} {
		kv := []string{"path", tc.path, "content", tc.content}
		if tc.encoding != "" {
			kv = append(kv, "encoding", tc.encoding)
		}
		r, out := do(t, write, constraint.Constraints{}, kv...)
		if r.Outcome != executor.OK || out["bytes"] != float64(len(tc.want)) {
			t.Errorf("%s: %+v", tc.path, r)
		}
		if got, err := os.ReadFile(filepath.Join(root, tc.path)); err != nil || string(got) != tc.want {
			t.Errorf("%s holds %q, %v", tc.path, got, err)
		}
	}
	if info, err := os.Stat(filepath.Join(root, "a.txt")); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("the mode changed: %v %v", info, err)
	}
	if left, err := filepath.Glob(filepath.Join(root, ".autonomy-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestConstraints(t *testing.T) {
	root, _ := tree(t)
	if err := os.Symlink("../a.txt", filepath.Join(root, "sub", "link")); err != nil {
		t.Fatal(err)
	}
	read, write := open2(t, root, 0)
	sub := filepath.Join(root, "sub")
	for _, tc := range []struct {
		fs          []string
		path        string
		read, write bool
	}{
		{nil, "a.txt", true, true},
		{[]string{}, "a.txt", false, false},
		{[]string{"ro:" + root}, "a.txt", true, false},
		{[]string{"rw:" + root}, "a.txt", true, true},
		{[]string{"rw:" + root + "/"}, "sub/b.bin", true, true},
		{[]string{"rw:" + sub}, "a.txt", false, false},
		{[]string{"rw:" + sub}, "sub/b.bin", true, true},
		{[]string{"ro:" + sub}, "sub/link", false, false}, // leads out of sub, inside the root
		{[]string{"rw:" + sub + "x"}, "sub/b.bin", false, false},
		{[]string{"ro:" + filepath.Join(root, "a.txt")}, "a.txt", true, false},
		{[]string{root}, "a.txt", false, false},         // no mode
		{[]string{"rw:sub"}, "sub/b.bin", false, false}, // not absolute
		{[]string{"rx:" + root}, "a.txt", false, false},
	} {
		c := constraint.Constraints{FS: tc.fs}
		if r, _ := do(t, read, c, "path", tc.path); (r.Outcome == executor.OK) != tc.read || !tc.read && r.Code != CodePath {
			t.Errorf("read %s under %q: %+v", tc.path, tc.fs, r)
		}
		if tc.path == "sub/link" {
			continue // a write does not go through a link at all
		}
		if r, _ := do(t, write, c, "path", tc.path, "content", "x"); (r.Outcome == executor.OK) != tc.write || !tc.write && r.Code != CodePath {
			t.Errorf("write %s under %q: %+v", tc.path, tc.fs, r)
		}
	}
}

// TestSwap changes a directory into a link that leads out while it is used.
func TestSwap(t *testing.T) {
	root, secret := tree(t)
	read, write := open2(t, root, 0)
	dir, link := filepath.Join(root, "d"), filepath.Join(root, "l")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("..", link); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE)
			}
		}
	})
	for range 300 {
		if r, _ := do(t, read, constraint.Constraints{}, "path", "d/secret"); strings.Contains(string(r.Output), `"secret"`) {
			t.Errorf("the secret was read: %s", r.Output)
		}
		do(t, write, constraint.Constraints{}, "path", "d/secret", "content", "owned")
	}
	close(stop)
	wg.Wait()
	if b, err := os.ReadFile(secret); err != nil || string(b) != "secret" {
		t.Errorf("the secret is %q, %v", b, err)
	}
}
