package disk

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// fake is a file system of the given state, with 4096-byte blocks.
func fake(t *testing.T, l Limits, st Stat) *Ceiling {
	t.Helper()
	l.Root = t.TempDir()
	c, err := New(l)
	if err != nil {
		t.Fatal(err)
	}
	c.used = 0 // the empty directory's own block would only blur the sums
	st.BlockSize = 4096
	c.statfs = func(string) (Stat, error) { return st, nil }
	return c
}

const k = 1024

func TestReserveLimits(t *testing.T) {
	plenty := Stat{Available: 1 << 40, Inodes: 1000, FreeInodes: 1000}
	tests := []struct {
		name  string
		l     Limits
		st    Stat
		bytes int64
		limit string // "" means granted
	}{
		{"fits", Limits{MaxBytes: 64 * k}, plenty, 10 * k, ""},
		{"exactly, with two blocks overhead", Limits{MaxBytes: 12*k + 8*k}, plenty, 12 * k, ""},
		{"one byte over a block", Limits{MaxBytes: 12*k + 8*k}, plenty, 12*k + 1, "max-bytes"},
		{"keep-free exactly", Limits{MaxBytes: 1 << 30, KeepFree: 100 * k}, Stat{Available: 112 * k}, 4 * k, ""},
		{"into keep-free", Limits{MaxBytes: 1 << 30, KeepFree: 100*k + 1}, Stat{Available: 112 * k}, 4 * k, "keep-free"},
		{"already below keep-free", Limits{MaxBytes: 1 << 30, KeepFree: 100 * k}, Stat{Available: 50 * k}, 0, "keep-free"},
		{"last inode to spare", Limits{MaxBytes: 1 << 30, MinInodes: 9}, Stat{Available: 1 << 40, Inodes: 10, FreeInodes: 10}, 1, ""},
		{"no inode to spare", Limits{MaxBytes: 1 << 30, MinInodes: 10}, Stat{Available: 1 << 40, Inodes: 10, FreeInodes: 10}, 1, "min-inodes"},
		{"inodes not counted", Limits{MaxBytes: 1 << 30, MinInodes: 10}, Stat{Available: 1 << 40}, 1, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := fake(t, tt.l, tt.st)
			r, err := c.Reserve(tt.bytes)
			if tt.limit == "" {
				if err != nil {
					t.Fatal(err)
				}
				r.Release()
			} else {
				var e *ExceededError
				if !errors.As(err, &e) || !errors.Is(err, ErrCeilingExceeded) || e.Limit != tt.limit {
					t.Fatalf("error %v, want limit %s", err, tt.limit)
				}
			}
			if c.reserved != 0 || c.unwritten != 0 || c.inodes != 0 || c.open != 0 || c.used != 0 {
				t.Errorf("state after: %+v", c)
			}
		})
	}
	for _, n := range []int64{-1, maxReserve + 1} {
		if _, err := fake(t, Limits{MaxBytes: 1 << 30}, plenty).Reserve(n); err == nil || errors.Is(err, ErrCeilingExceeded) {
			t.Errorf("reserve %d: %v", n, err)
		}
	}
}

// TestReservationLife follows one file through the sums.
func TestReservationLife(t *testing.T) {
	c := fake(t, Limits{MaxBytes: 40 * k}, Stat{Available: 1 << 40})
	r, err := c.Reserve(8 * k) // 16 KiB with overhead
	if err != nil {
		t.Fatal(err)
	}
	check := func(when string, used, reserved, unwritten int64) {
		t.Helper()
		if c.used != used || c.reserved != reserved || c.unwritten != unwritten {
			t.Errorf("%s: used %d reserved %d unwritten %d, want %d %d %d", when, c.used, c.reserved, c.unwritten, used, reserved, unwritten)
		}
	}
	check("reserved", 0, 16*k, 16*k)
	if err := r.Allocated(8 * k); err != nil {
		t.Fatal(err)
	}
	check("allocated", 0, 16*k, 8*k)
	if err := r.Allocated(20 * k); err != nil { // the file system took more than was guessed
		t.Fatal(err)
	}
	check("grown", 0, 20*k, 0)
	if err := r.Allocated(44 * k); !errors.Is(err, ErrCeilingExceeded) {
		t.Fatalf("growth past the ceiling: %v", err)
	}
	check("not grown", 0, 20*k, 0)
	r.Commit(12 * k)
	r.Release() // a second end does nothing
	check("committed", 12*k, 0, 0)
}

// TestConcurrentReserve: however many writers race, what is granted never
// passes the ceiling, and all of it is granted.
func TestConcurrentReserve(t *testing.T) {
	c := fake(t, Limits{MaxBytes: 120 * k}, Stat{Available: 1 << 40})
	var wg sync.WaitGroup
	var mu sync.Mutex
	granted := 0
	for range 64 {
		wg.Go(func() {
			if _, err := c.Reserve(4 * k); err == nil { // 12 KiB each
				mu.Lock()
				granted++
				mu.Unlock()
			} else if !errors.Is(err, ErrCeilingExceeded) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if granted != 10 || c.reserved != 120*k {
		t.Errorf("%d granted, %d reserved; want 10 and %d", granted, c.reserved, 120*k)
	}
}

func TestMeasureAndRemove(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, make([]byte, 100*k), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := New(Limits{Root: dir, MaxBytes: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	before := c.used
	if before < 100*k {
		t.Fatalf("measured %d bytes", before)
	}
	if err := c.Remove(path); err != nil {
		t.Fatal(err)
	}
	after, err := Allocated(dir)
	if err != nil || c.used != after || after > before-100*k {
		t.Errorf("used %d, on disk %d (%v)", c.used, after, err)
	}
	if err := c.Remove(path); err != nil {
		t.Errorf("removing what is gone: %v", err)
	}
	r, err := c.Reserve(1)
	if err != nil {
		t.Fatal(err)
	}
	c.used = 7
	if err := c.Measure(); err != nil || c.used != 7 {
		t.Errorf("measured while a reservation was open: %d, %v", c.used, err)
	}
	r.Release()
}

func TestNewRefuses(t *testing.T) {
	for _, l := range []Limits{{MaxBytes: 0}, {MaxBytes: 1, KeepFree: -1}, {MaxBytes: 1, MinInodes: -1}} {
		l.Root = t.TempDir()
		if _, err := New(l); err == nil {
			t.Errorf("%+v accepted", l)
		}
	}
	if _, err := New(Limits{Root: filepath.Join(t.TempDir(), "none"), MaxBytes: 1}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing root: %v", err)
	}
}

func TestLocalRoot(t *testing.T) {
	base, outside := t.TempDir(), t.TempDir()
	mk := func(p string) string {
		p = filepath.Join(base, p)
		if err := os.MkdirAll(p, 0o700); err != nil {
			t.Fatal(err)
		}
		return p
	}
	link := func(to, p string) string {
		p = filepath.Join(base, p)
		if err := os.Symlink(to, p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	plain := mk("plain/blobs")
	inside := mk("v2")
	tests := []struct {
		name, dir string
		subs      []string
		notLocal  bool
	}{
		{"plain", filepath.Dir(plain), []string{"blobs", "missing"}, false},
		{"link to a sibling", link(inside, "current"), nil, false},
		{"link outside", link(outside, "away"), nil, true},
		{"linked sub", mk("s1"), []string{"blobs"}, true},
		{"file as sub", mk("s2"), []string{"blobs"}, true},
	}
	link(outside, "s1/blobs")
	if err := os.WriteFile(filepath.Join(base, "s2/blobs"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root, err := LocalRoot(tt.dir, tt.subs...)
			if errors.Is(err, ErrNotLocal) != tt.notLocal || !tt.notLocal && err != nil {
				t.Fatalf("root %q, error %v", root, err)
			}
			if err == nil && strings.Contains(root, "current") {
				t.Errorf("root %q still holds the link", root)
			}
		})
	}
	if _, err := LocalRoot(filepath.Join(base, "nothing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing directory: %v", err)
	}
}

func TestCheckType(t *testing.T) {
	for magic, want := range map[uint32]string{0x6969: "NFS", 0xFF534D42: "CIFS", 0xFE534D42: "SMB2", 0x65735546: "FUSE", 0x01021997: "9P", 0x7461636F: "OCFS2"} {
		if err := CheckType(magic); !errors.Is(err, ErrNotLocal) || !strings.Contains(err.Error(), want) {
			t.Errorf("%#x: %v", magic, err)
		}
	}
	for _, magic := range []uint32{0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630} { // ext4, xfs, btrfs, tmpfs, overlay
		if err := CheckType(magic); err != nil {
			t.Errorf("%#x: %v", magic, err)
		}
	}
}

func TestFallocate(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	real, err := Fallocate(f, 100*k)
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := FileBlocks(f)
	if err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil || info.Size() != 100*k || real && blocks < 100*k {
		t.Errorf("size %d, %d bytes of blocks, allocated %v (%v)", info.Size(), blocks, real, err)
	}
}
