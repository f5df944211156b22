package run

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/testutil"
)

// memory mounts a tmpfs.
func memory(t *testing.T, mode os.FileMode) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		testutil.Missing(t, "a tmpfs to mount", "run as root: "+err.Error())
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, mode); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestMemoryDir(t *testing.T) {
	const public = 0o777 | os.ModeSticky
	for name, tc := range map[string]struct {
		mode  os.FileMode // of the base
		sub   []string
		setup func(t *testing.T, base string)
		why   string // "": it will do
	}{
		"private":           {0o700, nil, nil, ""},
		"below private":     {0o700, []string{"a", "b"}, nil, ""},
		"below public":      {public, []string{"a", "b"}, nil, ""},
		"made before by us": {public, []string{"a"}, func(t *testing.T, base string) { must(t, os.Mkdir(filepath.Join(base, "a"), 0o700)) }, ""},
		"public itself":     {public, nil, nil, "can be written by others"},
		"public, no sticky": {0o777, []string{"a"}, nil, "can be written by others"},
		"somebody else's": {public, []string{"a"}, func(t *testing.T, base string) {
			must(t, os.Mkdir(filepath.Join(base, "a"), 0o700))
			must(t, os.Chown(filepath.Join(base, "a"), 65534, 65534))
		}, "belongs to user 65534"},
		"open to others": {public, []string{"a"}, func(t *testing.T, base string) {
			must(t, os.Mkdir(filepath.Join(base, "a"), 0o700))
			must(t, os.Chmod(filepath.Join(base, "a"), 0o777))
		}, "can be written by others"},
		"a link": {public, []string{"a"}, func(t *testing.T, base string) {
			must(t, os.Symlink(t.TempDir(), filepath.Join(base, "a")))
		}, "is not a directory"},
		"a file": {public, []string{"a"}, func(t *testing.T, base string) {
			must(t, os.WriteFile(filepath.Join(base, "a"), nil, 0o600))
		}, "is not a directory"},
		"somebody else's base": {0o755, []string{"a"}, func(t *testing.T, base string) { must(t, os.Chown(base, 65534, 65534)) }, "belongs to user 65534"},
	} {
		t.Run(name, func(t *testing.T) {
			base := memory(t, tc.mode)
			if tc.setup != nil {
				tc.setup(t, base)
			}
			dir, err := memoryDir(base, tc.sub)
			if tc.why != "" {
				if err == nil || !strings.Contains(err.Error(), tc.why) {
					t.Fatalf("%s, %v; want %q", dir, err, tc.why)
				}
				return
			}
			if err != nil || dir != filepath.Join(append([]string{base}, tc.sub...)...) {
				t.Fatalf("%s, %v", dir, err)
			}
			if again, err := memoryDir(base, tc.sub); again != dir || err != nil {
				t.Errorf("the second time: %s, %v", again, err)
			}
			if info, err := os.Stat(dir); err != nil || info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%v, %v: want it for its owner alone", info.Mode(), err)
			}
		})
	}
	if dir, err := memoryDir(t.TempDir(), nil); err == nil || !strings.Contains(err.Error(), "is not on a tmpfs") {
		t.Errorf("on a disk: %s, %v", dir, err)
	}
}

// What comes first is taken, what will not do is passed over.
func TestRuntimeDir(t *testing.T) {
	first, second := memory(t, 0o700), memory(t, 0o700)
	t.Setenv("RUNTIME_DIRECTORY", first+":/other")
	t.Setenv("XDG_RUNTIME_DIR", second)
	for _, tc := range []struct {
		mode os.FileMode
		want string
	}{{0o700, first}, {0o777, filepath.Join(second, "autonomy", "x")}} {
		must(t, os.Chmod(first, tc.mode))
		if dir, err := RuntimeDir("x"); dir != tc.want || err != nil {
			t.Errorf("mode %v: %s, %v; want %s", tc.mode, dir, err, tc.want)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
