package cache

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/assurance/disk"
	"github.com/autonomyops/autonomy/relay/oci"

	"github.com/autonomyops/autonomy/internal/testutil"
)

const kib = 1024

func open(t *testing.T, root string, maxBytes int64) (*Cache, *disk.Ceiling) {
	t.Helper()
	ceiling, err := disk.New(disk.Limits{Root: root, MaxBytes: maxBytes})
	if err != nil {
		t.Fatal(err)
	}
	c, err := Open(root, ceiling)
	if err != nil {
		t.Fatal(err)
	}
	return c, ceiling
}

func put(c *Cache, data []byte) (oci.Digest, error) {
	d := oci.DigestOf(data)
	w, err := c.Begin(d, int64(len(data)))
	if err != nil {
		return d, err
	}
	if _, err := w.Write(data); err != nil {
		return d, errors.Join(err, w.Abort())
	}
	return d, w.Commit()
}

func mustPut(t *testing.T, c *Cache, data []byte) oci.Digest {
	t.Helper()
	d, err := put(c, data)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// same checks that what the ceiling believes is what the kernel says, and that
// nothing is left in tmp/.
func same(t *testing.T, root string, ceiling *disk.Ceiling) {
	t.Helper()
	u, err := ceiling.Usage()
	if err != nil {
		t.Fatal(err)
	}
	real, err := disk.Allocated(root)
	if err != nil {
		t.Fatal(err)
	}
	if u.Used != real || u.Reserved != 0 || u.Unwritten != 0 {
		t.Errorf("used %d, reserved %d, unwritten %d; on disk %d", u.Used, u.Reserved, u.Unwritten, real)
	}
	if left, err := os.ReadDir(filepath.Join(root, "tmp")); err != nil || len(left) > 0 {
		t.Errorf("left in tmp: %v (%v)", left, err)
	}
}

func TestRoundTrip(t *testing.T) {
	root := t.TempDir()
	c, ceiling := open(t, root, 1<<20)
	data := []byte(strings.Repeat("blob ", 5000))
	d := mustPut(t, c, data)
	mustPut(t, c, data) // again changes nothing
	empty := mustPut(t, c, nil)
	same(t, root, ceiling)
	b, err := c.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	have, err := io.ReadAll(b)
	if err != nil || string(have) != string(data) || b.Size != int64(len(data)) {
		t.Errorf("read %d bytes: %v", len(have), err)
	}
	if err := c.Remove(d); err == nil {
		t.Error("removed a blob that is being read")
	}
	b.Close()
	c, ceiling = open(t, root, 1<<20) // a restart finds it
	if size, ok := c.Size(d); !ok || size != int64(len(data)) || c.Len() != 2 {
		t.Errorf("after restart: %d %v, %d blobs", size, ok, c.Len())
	}
	if _, ok := c.Size(empty); !ok {
		t.Error("the empty blob is gone")
	}
	if err := c.Remove(d); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Open(d); !errors.Is(err, ErrNotFound) {
		t.Errorf("after removal: %v", err)
	}
	same(t, root, ceiling)
}

func TestBadContentLeavesNothing(t *testing.T) {
	data := []byte("the right content")
	d := oci.DigestOf(data)
	for _, tt := range []struct {
		name string
		feed func(*Writer) error
	}{
		{"wrong bytes", func(w *Writer) error { w.Write([]byte("the wrong content")); return w.Commit() }},
		{"too short", func(w *Writer) error { w.Write(data[:5]); return w.Commit() }},
		{"too long", func(w *Writer) error {
			_, err := w.Write(append(slices.Clone(data), 'x'))
			return errors.Join(err, w.Abort())
		}},
		{"nothing", func(w *Writer) error { return w.Commit() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			c, ceiling := open(t, root, 1<<20)
			before, _ := ceiling.Usage()
			w, err := c.Begin(d, int64(len(data)))
			if err != nil {
				t.Fatal(err)
			}
			if err := tt.feed(w); !errors.Is(err, ErrMismatch) {
				t.Errorf("error %v", err)
			}
			if _, ok := c.Size(d); ok {
				t.Error("bad content is held")
			}
			after, _ := ceiling.Usage()
			if before.Used != after.Used {
				t.Errorf("used %d before, %d after", before.Used, after.Used)
			}
			same(t, root, ceiling)
		})
	}
}

func TestReadFindsDamage(t *testing.T) {
	root := t.TempDir()
	c, _ := open(t, root, 1<<20)
	d := mustPut(t, c, []byte("content"))
	if err := os.WriteFile(c.path(d), []byte("c0ntent"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(d, 100); !errors.Is(err, ErrMismatch) {
		t.Errorf("error %v", err)
	}
}

func TestOpenRemovesOrphansAndRefusesStrangers(t *testing.T) {
	root := t.TempDir()
	c, _ := open(t, root, 1<<20)
	if _, err := c.Begin(oci.DigestOf([]byte("x")), 100*kib); err != nil {
		t.Fatal(err)
	}
	// No Commit, no Abort: the process was killed here.
	_, ceiling := open(t, root, 1<<20)
	same(t, root, ceiling)
	if err := os.WriteFile(filepath.Join(root, "blobs/sha256/stranger"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(root, ceiling); err == nil || !strings.Contains(err.Error(), "no blob of ours") {
		t.Errorf("stranger: %v", err)
	}
}

// TestEviction fills the store with undeclared, declared and open blobs, and
// asks for more: the undeclared go in digest order, as many as needed.
func TestEviction(t *testing.T) {
	root := t.TempDir()
	c, ceiling := open(t, root, 1<<20)
	var ds []oci.Digest
	for i := 0; ; i++ {
		d, err := put(c, fmt.Appendf(nil, "%*d", 32*kib, i))
		if c.Evicted() > 0 || err != nil {
			t.Fatalf("blob %d: %v, %d evicted", i, err, c.Evicted())
		}
		if ds = append(ds, d); len(ds) == 20 {
			break
		}
	}
	slices.Sort(ds)
	c.Declare(ds[0])
	b, err := c.Open(ds[1])
	if err != nil {
		t.Fatal(err)
	}
	big := make([]byte, 500*kib)
	if _, err := put(c, big); err != nil {
		t.Fatal(err)
	}
	n := int(c.Evicted())
	if n < 1 || n > 10 {
		t.Errorf("%d evicted", n)
	}
	for i, d := range ds {
		_, held := c.Size(d)
		if want := i < 2 || i >= 2+n; held != want {
			t.Errorf("blob %d held %v, want %v", i, held, want)
		}
	}
	b.Close()
	same(t, root, ceiling)

	// Nothing is thrown away for a request that cannot be met anyway.
	for _, d := range ds {
		c.Declare(d)
	}
	before := c.List()
	if err := c.Room(900*kib, 1); !errors.Is(err, disk.ErrCeilingExceeded) {
		t.Errorf("room for more than the ceiling: %v", err)
	}
	if _, err := put(c, make([]byte, 600*kib)); !errors.Is(err, disk.ErrCeilingExceeded) {
		t.Errorf("declared content in the way: %v", err)
	}
	if after := c.List(); !slices.Equal(before, after) {
		t.Errorf("evicted for nothing: %v, then %v", before, after)
	}
	// The state files of a full relay can still be written.
	for i := range 2 {
		if err := c.WriteFile(filepath.Join(root, "state.json"), fmt.Appendf(nil, "%d", i)); err != nil {
			t.Error(err)
		}
	}
	same(t, root, ceiling)
}

// mount makes a small file system, or skips with the reason.
func mount(t *testing.T, fstype string, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		testutil.Missing(t, "root, to mount "+fstype, "run as root")
	}
	dir := filepath.Join(t.TempDir(), "m")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	switch fstype {
	case "tmpfs":
		if err := unix.Mount("t", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
			testutil.Missing(t, "a tmpfs", err.Error())
		}
	default:
		img := filepath.Join(t.TempDir(), "img")
		f, err := os.Create(img)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("mkfs."+fstype, "-q", "-F", img).CombinedOutput(); err != nil {
			testutil.Missing(t, "mkfs."+fstype, fmt.Sprintf("run: make setup (%v %s)", err, out))
		}
		if out, err := exec.Command("mount", "-o", "loop", img, dir).CombinedOutput(); err != nil {
			testutil.Missing(t, "a loop mount", fmt.Sprintf("%v %s", err, out))
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	// Nothing may be written before this is known to be the small one.
	st, err := disk.StatFS(dir)
	if err != nil || st.Total > 2*size {
		t.Fatalf("%s is not the file system just mounted: %+v (%v)", dir, st, err)
	}
	return dir
}

// TestCeilingOnSmallDisks: many writers at the boundary, on file systems smaller
// than what they want. At no moment do the files pass the ceiling or enter what
// must stay free.
func TestCeilingOnSmallDisks(t *testing.T) {
	for _, tt := range []struct {
		fs                       string
		size, maxBytes, keepFree int64
		wantLimit                string
	}{
		{"tmpfs", 8 << 20, 2 << 20, 0, "max-bytes"},
		{"tmpfs", 8 << 20, 1 << 30, 5 << 20, "keep-free"},
		{"ext4", 16 << 20, 2 << 20, 0, "max-bytes"},
		{"ext4", 16 << 20, 1 << 30, 8 << 20, "keep-free"},
	} {
		t.Run(tt.fs+" "+tt.wantLimit, func(t *testing.T) {
			m := mount(t, tt.fs, tt.size)
			root := filepath.Join(m, "relay")
			if err := os.Mkdir(root, 0o700); err != nil {
				t.Fatal(err)
			}
			ceiling, err := disk.New(disk.Limits{Root: root, MaxBytes: tt.maxBytes, KeepFree: tt.keepFree})
			if err != nil {
				t.Fatal(err)
			}
			c, err := Open(root, ceiling)
			if err != nil {
				t.Fatal(err)
			}
			var stop atomic.Bool
			var watcher sync.WaitGroup
			watcher.Go(func() {
				for !stop.Load() {
					if n, err := disk.Allocated(root); err != nil || n > tt.maxBytes {
						t.Errorf("on disk: %d bytes, ceiling %d (%v)", n, tt.maxBytes, err)
						return
					}
					if st, err := disk.StatFS(root); err != nil || st.Available < tt.keepFree {
						t.Errorf("available: %d bytes, %d must stay (%v)", st.Available, tt.keepFree, err)
						return
					}
				}
			})
			var wg sync.WaitGroup
			var kept, refused atomic.Int64
			for g := range 8 {
				wg.Go(func() {
					for i := range 30 {
						data := make([]byte, (g*37+i*53)%200*kib+1)
						copy(data, fmt.Sprint(g, i))
						d := oci.DigestOf(data)
						c.Declare(d)
						_, err := put(c, data)
						var e *disk.ExceededError
						switch {
						case err == nil:
							kept.Add(1)
						case errors.As(err, &e) && e.Limit == tt.wantLimit:
							refused.Add(1)
						default:
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			stop.Store(true)
			watcher.Wait()
			if kept.Load() == 0 || refused.Load() == 0 {
				t.Errorf("%d kept, %d refused: the boundary was not reached", kept.Load(), refused.Load())
			}
			same(t, root, ceiling)
		})
	}
}
