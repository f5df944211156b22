package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { Main(m) }

// record makes a recording from a script: "w1@0" begins write 1 at page 0, "e1"
// answers it, "f1" and "d1" begin and answer flush 1. Write n is a page of n.
func record(t *testing.T, script string) *Recording {
	t.Helper()
	base, err := NewImage(8 * Atom)
	if err != nil {
		t.Fatal(err)
	}
	r := &Recording{Base: base}
	begin := map[string]int{}
	for i, word := range strings.Fields(script) {
		var id, page int
		e := Event{}
		switch word[0] {
		case 'w':
			if _, err := fmt.Sscanf(word, "w%d@%d", &id, &page); err != nil {
				t.Fatal(word, err)
			}
			e = Event{Kind: WriteBegin, Off: int64(page) * Atom, Data: bytes.Repeat([]byte{byte(id)}, Atom)}
			begin["e"+word[1:2]] = i
		case 'e':
			e = Event{Kind: WriteEnd, Begin: begin[word]}
		case 'f':
			e = Event{Kind: FlushBegin}
			begin["d"+word[1:]] = i
		case 'd':
			e = Event{Kind: FlushEnd, Begin: begin[word]}
		}
		r.Events = append(r.Events, e)
	}
	return r
}

func TestDurable(t *testing.T) {
	for _, c := range []struct {
		name, script string
		ignore       bool
		durable      []int // writes
		open         []int
	}{
		{"nothing flushed", "w1@0 e1 w2@1 e2", false, nil, []int{1, 2}},
		{"flushed", "w1@0 e1 w2@1 e2 f1 d1 w3@2", false, []int{1, 2}, []int{3}},
		{"flush not answered", "w1@0 e1 f1", false, nil, []int{1}},
		{"in flight at the flush", "w1@0 e1 w2@1 f1 e2 d1", false, []int{1}, []int{2}},
		{"answered after the flush", "w1@0 e1 w2@1 f1 d1 e2", false, []int{1}, []int{2}},
		{"covered by the second flush", "w1@0 f1 e1 d1 f2 d2", false, []int{1}, nil},
		{"two flushes at once", "w1@0 e1 f1 w2@1 e2 f2 d2", false, []int{1, 2}, nil},
		{"the earlier of two flushes", "w1@0 e1 f1 w2@1 e2 f2 d1", false, []int{1}, []int{2}},
		{"flushes ignored", "w1@0 e1 f1 d1", true, nil, []int{1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := record(t, c.script)
			r.IgnoreFlush = c.ignore
			ids := func(events []int) (out []int) {
				for _, i := range events {
					out = append(out, int(r.Events[i].Data[0]))
				}
				return out
			}
			durable, open := r.split(len(r.Events))
			if got := ids(durable); !slices.Equal(got, c.durable) {
				t.Errorf("durable are %v, want %v", got, c.durable)
			}
			if got := ids(open); !slices.Equal(got, c.open) {
				t.Errorf("open are %v, want %v", got, c.open)
			}
		})
	}
}

// pages is the first byte of every page.
func pages(m *Image) string {
	out := make([]byte, len(m.pages))
	for i, p := range m.pages {
		out[i] = '.'
		if p != nil && p[0] != 0 {
			out[i] = '0' + p[0]
		}
	}
	return string(out)
}

func TestImage(t *testing.T) {
	r := record(t, "w1@0 e1 w2@1 e2 f1 d1 w3@1 e3 w4@2 e4 w5@3 e5")
	want := map[Mode][]string{
		DropAll: {"12......"},
		KeepAll: {"1345...."},
		Prefix:  {"12......", "13......", "134.....", "1345...."},
		Subset:  {"12......", "13......", "124.....", "12.5....", "134.....", "13.5....", "1245....", "1345...."},
	}
	want[Torn] = want[Subset] // of writes of one page
	for mode, states := range want {
		seen := map[string]bool{}
		for seed := range uint64(400) {
			c := Cut{len(r.Events), mode, seed}
			m, err := r.Image(c)
			if err != nil {
				t.Fatal(err)
			}
			again, err := r.Image(c)
			if err != nil {
				t.Fatal(err)
			}
			if pages(m) != pages(again) {
				t.Fatalf("%v gave %s, then %s", c, pages(m), pages(again))
			}
			seen[pages(m)] = true
		}
		for _, s := range states {
			if !seen[s] {
				t.Errorf("%v never gave %s", mode, s)
			}
			delete(seen, s)
		}
		for s := range seen {
			t.Errorf("%v gave %s", mode, s)
		}
	}
	if pages(r.Base) != "........" {
		t.Error("the base image changed")
	}
	for _, c := range []Cut{{-1, DropAll, 1}, {len(r.Events) + 1, DropAll, 1}, {len(r.Events), numModes, 1}} {
		if _, err := r.Image(c); err == nil {
			t.Errorf("%v: no error", c)
		}
	}
}

// A write of several pages tears between them and nowhere else.
func TestTorn(t *testing.T) {
	base, err := NewImage(8 * Atom)
	if err != nil {
		t.Fatal(err)
	}
	r := &Recording{Base: base, Events: []Event{{Kind: WriteBegin, Off: 512, Data: bytes.Repeat([]byte{7}, 3*Atom)}}}
	seen := map[string]bool{}
	for seed := range uint64(500) {
		m, err := r.Image(Cut{1, Torn, seed})
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, m.Size())
		m.read(b, 0)
		var parts string
		for _, x := range [][2]int{{512, Atom}, {Atom, 2 * Atom}, {2 * Atom, 3 * Atom}, {3 * Atom, 3*Atom + 512}} {
			part := b[x[0]:x[1]]
			switch {
			case bytes.Count(part, []byte{7}) == len(part):
				parts += "7"
			case zero(part):
				parts += "."
			default:
				t.Fatalf("a piece of %d bytes is torn", len(part))
			}
		}
		if !zero(b[:512]) || !zero(b[3*Atom+512:]) {
			t.Fatal("bytes outside the write changed")
		}
		seen[parts] = true
	}
	if len(seen) != 16 {
		t.Errorf("%d of 16 states were seen", len(seen))
	}
}

func TestCuts(t *testing.T) {
	a, b := Cuts(7, 100, 200, 25), Cuts(7, 100, 200, 25)
	if !slices.Equal(a, b) {
		t.Error("the same seed gave other cuts")
	}
	if slices.Equal(a, Cuts(8, 100, 200, 25)) {
		t.Error("another seed gave the same cuts")
	}
	for i, c := range a {
		if c.At < 100 || c.At > 200 {
			t.Errorf("%v lies outside 100 to 200", c)
		}
		if i > 0 && c.At < a[i-1].At {
			t.Errorf("%v comes after %v", c, a[i-1])
		}
	}
}

func TestLastMoment(t *testing.T) {
	r := record(t, "w1@0 e1 f1 d1 w2@3 f2 e2 d2 w3@1")
	for at, want := range []int{3, 3, 3, 3, 7, 7, 7, 7, 8, 9} {
		if got := r.LastMoment(at); got != want {
			t.Errorf("from %d: %d, want %d", at, got, want)
		}
	}
}

func TestSaveLoad(t *testing.T) {
	r := record(t, "w1@0 e1 f1 d1 w2@3")
	r.Base.write(bytes.Repeat([]byte{9}, Atom), 5*Atom)
	var buf bytes.Buffer
	if err := r.Save(&buf); err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(buf.Bytes())
	got, err := Load(&buf)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range Cuts(1, 0, len(r.Events), 10) {
		a, err := r.Image(c)
		if err != nil {
			t.Fatal(err)
		}
		b, err := got.Image(c)
		if err != nil {
			t.Fatal(err)
		}
		if pages(a) != pages(b) {
			t.Errorf("%v: %s after loading, was %s", c, pages(b), pages(a))
		}
	}
	for name, b := range map[string][]byte{"empty": nil, "cut": whole[:len(whole)/2], "not gzip": []byte("recording")} {
		if _, err := Load(bytes.NewReader(b)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestImageFile(t *testing.T) {
	for _, size := range []int64{-1, 0, 1, Atom + 1, MaxImage + Atom} {
		if _, err := NewImage(size); err == nil {
			t.Errorf("size %d: no error", size)
		}
	}
	m, err := NewImage(8 * Atom)
	if err != nil {
		t.Fatal(err)
	}
	m.write(bytes.Repeat([]byte{3}, 100), 2*Atom-50)
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := m.WriteFile(f); err != nil {
		t.Fatal(err)
	}
	got, err := ReadImage(f)
	if err != nil {
		t.Fatal(err)
	}
	a, b := make([]byte, m.Size()), make([]byte, m.Size())
	m.read(a, 0)
	got.read(b, 0)
	if !bytes.Equal(a, b) || len(got.pages) != 8 || got.pages[0] != nil {
		t.Error("the image changed on its way through a file")
	}
}

func newDisk(t *testing.T, base *Image, o Options) *Disk {
	t.Helper()
	d, err := New(base, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// A flush that comes while a write is in flight does not make it durable, on the
// real device.
func TestInFlight(t *testing.T) {
	Require(t)
	base, err := NewImage(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, base, Options{Delay: 50 * time.Millisecond})
	f, err := os.OpenFile(d.Path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page, err := unix.Mmap(-1, 0, Atom, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(page)
	for i := range page {
		page[i] = 5
	}
	clock, err := NewClock(d.ClockFile()).Now()
	if err != nil {
		t.Fatal(err)
	}
	if clock != d.Now() {
		t.Errorf("the clock says %d, the disk %d", clock, d.Now())
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := f.WriteAt(page, 0); err != nil {
			t.Error(err)
		}
	})
	for d.Now() == clock { // the write has begun
		time.Sleep(time.Millisecond)
	}
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	between := d.Now()
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	r := d.PowerOff()
	if s := r.Stats(); s.Writes != 1 || s.Flushes < 2 || s.InFlight != 1 {
		t.Errorf("recorded %+v, want 1 write, 2 flushes, 1 in flight", s)
	}
	for at, want := range map[int]string{between: ".", len(r.Events): "5"} {
		m, err := r.Image(Cut{at, DropAll, 1})
		if err != nil {
			t.Fatal(err)
		}
		if got := pages(m)[:1]; got != want {
			t.Errorf("after %d of %d events page 0 holds %q, want %q", at, len(r.Events), got, want)
		}
	}
	if _, err := f.WriteAt(page, 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("write after the power went off: %v, want EIO", err)
	}
}

func TestFault(t *testing.T) {
	Require(t)
	base, err := NewImage(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, base, Options{})
	f, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d.SetFault(func(op Op, _ int64, data []byte) syscall.Errno {
		if op == Write && bytes.Contains(data, []byte("broken")) {
			return syscall.EIO
		}
		return 0
	})
	if _, err := f.WriteAt([]byte("broken"), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("sync of a page that cannot be written: %v, want EIO", err)
	}
	d.SetFault(nil)
	if _, err := f.WriteAt([]byte("whole.."), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
}

// Every file system holds what was synced, and a file that was never synced may
// be missing.
func TestFileSystems(t *testing.T) {
	Require(t)
	for _, fstype := range FileSystems {
		t.Run(fstype, func(t *testing.T) {
			base, err := Mkfs(fstype)
			if err != nil {
				t.Fatal(err)
			}
			d := newDisk(t, base, Options{})
			m, err := MountDevice(d.Path, fstype, "")
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(m.Dir, "file")
			if err := os.WriteFile(path, []byte("synced"), 0o600); err != nil {
				t.Error(err)
			}
			for _, p := range []string{path, m.Dir} {
				f, err := os.Open(p)
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(f.Sync(), f.Close()); err != nil {
					t.Error(err)
				}
			}
			at := d.Now()
			if err := os.WriteFile(filepath.Join(m.Dir, "other"), []byte("not synced"), 0o600); err != nil {
				t.Error(err)
			}
			r := d.PowerOff()
			if err := m.Unmount(); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			for _, cut := range []Cut{{at, DropAll, 1}, {at, Torn, 2}, {len(r.Events), KeepAll, 3}} {
				img, err := r.Image(cut)
				if err != nil {
					t.Fatal(err)
				}
				m, err := img.Mount(fstype, "")
				if err != nil {
					t.Fatalf("%v: %v", cut, err)
				}
				b, err := os.ReadFile(filepath.Join(m.Dir, "file"))
				if err != nil || string(b) != "synced" {
					t.Errorf("%v: the file holds %q, %v", cut, b, err)
				}
				if _, err := os.Stat(filepath.Join(m.Dir, "other")); cut.Mode == DropAll && err == nil {
					t.Errorf("%v: a file that was not synced is there", cut)
				}
				if err := m.Unmount(); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("%+v, %v per state", r.Stats(), time.Since(begin)/3)
		})
	}
	if _, err := Mkfs("fat"); err == nil {
		t.Error("mkfs of fat: no error")
	}
}
