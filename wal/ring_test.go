package wal

import (
	"bufio"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/testutil"
)

func ringOptions(t testing.TB) Options {
	needRing(t)
	return Options{SegmentBytes: testSegment, MaxBytes: 4 * testSegment, SyncInterval: time.Hour, Mode: ModeRing, RingDir: ringDir}
}

// The mode is chosen by trying, and Stats says why.
func TestModeChoice(t *testing.T) {
	once(t)
	needRing(t)
	small := filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=128k,mode=0700"); err != nil {
		testutil.Missing(t, "a small tmpfs", "run as root: "+err.Error())
	}
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	base := Options{SegmentBytes: testSegment, MaxBytes: 2 * testSegment, RingDir: ringDir}
	for name, tc := range map[string]struct {
		change func(*Options)
		onTmp  bool
		mode   Mode
		why    string
		size   int64
	}{
		"ring":             {func(*Options) {}, false, ModeRing, "written with O_DIRECT", testSegment},
		"small ring":       {func(o *Options) { o.RingBytes = 100_000 }, false, ModeRing, "a ring of 65536 bytes", 64 << 10},
		"forced mapped":    {func(o *Options) { o.Mode = ModeMapped }, false, ModeMapped, "asks for it", 0},
		"no directory":     {func(o *Options) { o.RingDir = "" }, false, ModeMapped, "names no directory", 0},
		"absent directory": {func(o *Options) { o.RingDir = "/nonexistent" }, false, ModeMapped, "no such file", 0},
		"on a disk":        {func(o *Options) { o.RingDir = t.TempDir() }, false, ModeMapped, "is not on a tmpfs", 0},
		"small tmpfs":      {func(o *Options) { o.RingDir = small }, false, ModeMapped, "bytes free, want at least", 0},
		"log on a tmpfs":   {func(*Options) {}, true, ModeMapped, "is itself on a tmpfs", 0},
		"O_DIRECT refused": {func(o *Options) {
			o.openDirect = func(string) (*os.File, error) { return nil, syscall.EINVAL }
		}, false, ModeMapped, "for direct writing: invalid argument", 0},
		"direct write refused": {func(o *Options) {
			o.openDirect = func(path string) (*os.File, error) { return os.Open(path) }
		}, false, ModeMapped, "write directly", 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if tc.onTmp {
				dir = filepath.Join(ringDir, "log")
				t.Cleanup(func() { os.RemoveAll(dir) })
			}
			o := base
			tc.change(&o)
			l, _, err := Open(dir, o)
			if err != nil {
				t.Fatal(err)
			}
			wait(t, l, appendN(t, l, 50))
			check(t, l, 1, 50)
			if st := l.Stats(); st.Mode != tc.mode.String() || !strings.Contains(st.Why, tc.why) || st.RingBytes != tc.size {
				t.Errorf("mode %s, ring of %d, because %q; want %v, ring of %d, %q", st.Mode, st.RingBytes, st.Why, tc.mode, tc.size, tc.why)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if left, _ := filepath.Glob(filepath.Join(ringDir, "autonomy-wal-"+l.ID()+"*")); len(left) != 0 {
				t.Errorf("a ring is left behind: %v", left)
			}
			if tc.mode == ModeMapped && o.Mode == ModeAuto && o.RingDir != "" {
				o.Mode = ModeRing
				if _, _, err := Open(dir, o); err == nil || !strings.Contains(err.Error(), tc.why) {
					t.Errorf("forced: %v, want %q", err, tc.why)
				}
			}
		})
	}
}

// What a killed process left in the ring counts only if it is this log's, of this
// boot, and nothing happened since. Else the log is what its slots say.
func TestForeignRing(t *testing.T) {
	once(t)
	t.Parallel()
	o := ringOptions(t)
	edit := func(off int64) func(*testing.T, string, string) {
		return func(t *testing.T, _, ring string) {
			f, err := os.OpenFile(ring, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			head := make([]byte, pageSize)
			if _, err := f.ReadAt(head, 0); err != nil {
				t.Fatal(err)
			}
			head[off] ^= 1
			le.PutUint32(head[88:], crc32.Checksum(head[:88], castagnoli))
			if _, err := f.WriteAt(head, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, tc := range map[string]struct {
		change func(t *testing.T, dir, ring string)
		kept   bool
	}{
		"untouched":    {func(*testing.T, string, string) {}, true},
		"other boot":   {edit(32), false},
		"other log":    {edit(16), false},
		"other place":  {edit(56), false},
		"other magic":  {edit(0), false},
		"other size":   {edit(26), false},
		"other key":    {edit(64), false},
		"gone":         {func(t *testing.T, _, ring string) { must(t, os.Remove(ring)) }, false},
		"cut":          {func(t *testing.T, _, ring string) { must(t, os.Truncate(ring, pageSize+4096)) }, false},
		"cut to a few": {func(t *testing.T, _, ring string) { must(t, os.Truncate(ring, 100)) }, false},
		"open to all":  {func(t *testing.T, _, ring string) { must(t, os.Chmod(ring, 0o644)) }, false},
		"a link": {func(t *testing.T, _, ring string) {
			must(t, os.Rename(ring, ring+".x"))
			must(t, os.Symlink(ring+".x", ring))
			t.Cleanup(func() { os.Remove(ring + ".x"); os.Remove(ring) })
		}, false},
		"one state copy": {func(t *testing.T, _, ring string) {
			f, err := os.OpenFile(ring, os.O_RDWR, 0)
			must(t, err)
			defer f.Close()
			_, err = f.WriteAt(make([]byte, 2*ringState), ringState)
			must(t, err)
		}, false},
		"the log went on without it": {func(t *testing.T, dir, ring string) {
			m := o
			m.Mode, m.RingDir = ModeMapped, ""
			l, _, err := Open(dir, m)
			must(t, err)
			must(t, l.Close())
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l, _ := open(t, dir, o)
			wait(t, l, appendN(t, l, 5))
			last := appendN(t, l, 7)
			ring := l.ring.file.Name()
			kill(t, l, func() {})
			tc.change(t, dir, ring)
			want := uint64(5)
			if tc.kept {
				want = last
			}
			again := o
			again.Mode = ModeAuto // a ring that cannot be removed leaves mapped files
			l, rec, err := Open(dir, again)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if rec.LastSeq != want || (rec.Replayed > 0) != tc.kept {
				t.Fatalf("%+v, want records up to %d", rec, want)
			}
			wait(t, l, appendN(t, l, 3))
			check(t, l, 1, want+3)
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A kill in the middle of recovery: the ring was replayed, and is there still.
func TestReplayTwice(t *testing.T) {
	once(t)
	t.Parallel()
	o := ringOptions(t)
	dir := t.TempDir()
	l, _ := open(t, dir, o)
	wait(t, l, appendN(t, l, 5))
	last := appendN(t, l, 7)
	ring := l.ring.file.Name()
	kill(t, l, func() {})
	held, err := os.ReadFile(ring)
	must(t, err)
	for range 3 {
		must(t, os.WriteFile(ring, held, 0o600))
		l, rec, err := Open(dir, o)
		must(t, err)
		if rec.LastSeq != last {
			t.Fatalf("%+v, want records up to %d", rec, last)
		}
		last = appendN(t, l, 2)
		wait(t, l, last)
		check(t, l, 1, last)
		must(t, l.Close())
	}
}

// The disk is slower than the writers: they wait for room in the ring, nothing is
// lost, and readers see the right bytes whether they come from ring or slot.
func TestRingFull(t *testing.T) {
	once(t)
	t.Parallel()
	o := ringOptions(t)
	o.SegmentBytes, o.MaxBytes, o.RingBytes = 1<<20, 8<<20, minRing
	var once sync.Mutex
	slow := true
	o.sync = func(*os.File) error {
		once.Lock()
		defer once.Unlock()
		if slow {
			time.Sleep(time.Millisecond)
		}
		return nil
	}
	dir := t.TempDir()
	l, _ := open(t, dir, o)
	const each, writers = 1500, 8
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				if _, err := appendSeq(l); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		want := make([]byte, 40)
		r := l.Reader(1)
		for next := uint64(1); next <= each*writers; {
			if next > each*writers/2 {
				time.Sleep(3 * time.Millisecond) // fall behind the ring
			}
			b, err := r.Next(t.Context(), 50, 1<<20)
			if err != nil {
				t.Error(err)
				return
			}
			for _, rec := range b.Records {
				if fixed(want, next); rec.Seq != next || string(rec.Payload) != string(want) {
					t.Errorf("record %d: got %d %q", next, rec.Seq, rec.Payload)
					return
				}
				next++
			}
			b.Release()
			if next == each*writers/4 { // let some wait for the writers to end
				must(t, l.Sync(t.Context()))
			}
		}
	})
	time.AfterFunc(time.Second, func() { once.Lock(); slow = false; once.Unlock() })
	go func() { // nobody waits and SyncInterval is an hour: the end needs a push
		for l.Durable() < each*writers {
			time.Sleep(10 * time.Millisecond)
			_ = l.Sync(t.Context())
		}
	}()
	wg.Wait()
	must(t, l.Close())
	if rep, err := Verify(t.Context(), dir); err != nil || rep.Last != each*writers {
		t.Fatalf("%+v, %v", rep, err)
	}
}

// One failed write is repeated from the ring: nobody needs to know.
func TestWriteRepeated(t *testing.T) {
	once(t)
	o := ringOptions(t)
	fail := 0
	o.sync = func(*os.File) error {
		if fail > 0 {
			fail--
			return syscall.EIO
		}
		return nil
	}
	dir := t.TempDir()
	l, _ := open(t, dir, o)
	wait(t, l, appendN(t, l, 5))
	fail = 1
	last := appendN(t, l, 5)
	wait(t, l, last)
	if st := l.Stats(); st.Failovers != 0 || fail != 0 {
		t.Fatalf("%d failovers, %d failures left", st.Failovers, fail)
	}
	must(t, l.Close())
	if rep, err := Verify(t.Context(), dir); err != nil || rep.Last != last {
		t.Fatalf("%+v, %v", rep, err)
	}
}

// Somebody cuts the ring: the process lives, what was in it alone is void, and
// the log goes on in mapped files.
func TestRingCut(t *testing.T) {
	once(t)
	o := ringOptions(t)
	dir := t.TempDir()
	l, _ := open(t, dir, o)
	wait(t, l, appendN(t, l, 5))
	appendN(t, l, 3)
	must(t, os.Truncate(l.ring.file.Name(), pageSize))
	if _, err := l.Append(ClassAction, payload(9)); !errors.Is(err, ErrFailed) {
		t.Fatalf("Append into a cut ring: %v", err)
	}
	if err := l.Sync(t.Context()); !errors.Is(err, ErrFailed) {
		t.Fatalf("Sync over a cut ring: %v", err)
	}
	last := appendN(t, l, 5)
	wait(t, l, last)
	st := l.Stats()
	if st.Mode != ModeMapped.String() || !strings.Contains(st.Why, "cut its file") || st.Failovers != 1 {
		t.Fatalf("%+v", st)
	}
	check(t, l, 1, 5)
	check(t, l, 10, last)
	if _, _, err := l.Get(7); !errors.Is(err, ErrNotFound) {
		t.Fatalf("Get of a record that is gone: %v", err)
	}
	must(t, l.Close())
	if rep, err := Verify(t.Context(), dir); err != nil || rep.Last != last || rep.Voids != 4 {
		t.Fatalf("%+v, %v", rep, err)
	}
}

// The same, noticed by the committer alone.
func TestRingGone(t *testing.T) {
	once(t)
	o := ringOptions(t)
	dir := t.TempDir()
	l, _ := open(t, dir, o)
	wait(t, l, appendN(t, l, 5))
	appendN(t, l, 3)
	must(t, os.Truncate(l.ring.file.Name(), 0))
	if err := l.Sync(t.Context()); !errors.Is(err, ErrFailed) {
		t.Fatalf("Sync over a ring that is gone: %v", err)
	}
	last := appendN(t, l, 5)
	wait(t, l, last)
	if st := l.Stats(); st.Mode != ModeMapped.String() || st.Failovers != 1 {
		t.Fatalf("%+v", st)
	}
	check(t, l, 9, last)
	must(t, l.Close())
	if rep, err := Verify(t.Context(), dir); err != nil || rep.Last != last || rep.Voids != 3 {
		t.Fatalf("%+v, %v", rep, err)
	}
}

// FuzzRing reads arbitrary bytes as a ring's first page: nothing but the right
// identity and a whole state is taken.
func FuzzRing(f *testing.F) {
	id := ringID{logID: 1, dev: 2, ino: 3, boot: [16]byte{4}}
	page := make([]byte, pageSize)
	putRingHead(page, id, minRing, 5)
	at := ringAt{1, 1, 9, dataStart}
	at.put(page[ringState:], 5)
	f.Add(uint16(0), []byte{})
	f.Add(uint16(16), []byte{1, 2})
	f.Add(uint16(ringState), []byte{0xff})
	f.Fuzz(func(t *testing.T, off uint16, b []byte) {
		p := append([]byte(nil), page...)
		copy(p[min(int(off), len(p)):], b)
		size, _, got, why := parseRing(p, id, pageSize+minRing)
		if why == "" && (size != minRing || got != at) {
			t.Fatalf("size %d, %+v", size, got)
		}
		if _, _, _, why := parseRing(p, ringID{logID: 1, dev: 2, ino: 3}, pageSize+minRing); why == "" && string(p) == string(page) {
			t.Fatal("a ring of another boot was taken")
		}
	})
}

// childNoWait appends without waiting, and prints what it has appended.
func childNoWait(dir string) {
	o := inMode(Options{SegmentBytes: 256 << 10, MaxBytes: 4 << 20, RingBytes: minRing, SyncInterval: 20 * time.Millisecond})
	l, rec, err := Open(dir, o)
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	fmt.Println("open", rec.LastSeq)
	var mu sync.Mutex
	for range 4 {
		go func() {
			for {
				seq, err := appendSeq(l)
				if errors.Is(err, ErrCeilingExceeded) {
					_ = l.AdvanceAll(l.Durable())
					continue
				}
				mu.Lock()
				fmt.Println(seq, err)
				mu.Unlock()
			}
		}()
	}
	select {}
}

// Everything appended survives a kill, durable or not.
func TestKillKeepsPublished(t *testing.T) {
	dir := t.TempDir()
	exe, err := os.Executable()
	must(t, err)
	var appended uint64
	rounds, step := 15, 9 // milliseconds between the kills
	if testing.Short() {
		rounds, step = 6, 25
	}
	for round := range rounds {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), "WAL_TEST_CHILD="+dir, "WAL_TEST_RING="+ringDir, "WAL_TEST_NOWAIT=1")
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		time.AfterFunc(time.Duration(15+step*round)*time.Millisecond, func() { _ = cmd.Process.Kill() })
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			line := sc.Text()
			if rest, ok := strings.CutPrefix(line, "open "); ok {
				last, err := strconv.ParseUint(rest, 10, 64)
				must(t, err)
				if last < appended {
					t.Fatalf("round %d: recovered up to %d, appended up to %d", round, last, appended)
				}
				continue
			}
			var seq uint64
			if _, err := fmt.Sscanf(line, "%d <nil>", &seq); err != nil {
				if strings.HasSuffix(line, "<nil>") || strings.Contains(line, "error") {
					t.Fatalf("round %d: child said %q", round, line)
				}
				continue // cut off
			}
			appended = max(appended, seq)
		}
		_ = cmd.Wait()
	}
	l, rec, err := Open(dir, inMode(Options{SegmentBytes: 256 << 10, MaxBytes: 4 << 20}))
	must(t, err)
	defer l.Close()
	if rec.LastSeq < appended || appended < 1000 {
		t.Fatalf("recovered up to %d, appended up to %d", rec.LastSeq, appended)
	}
	t.Logf("%d records appended", appended)
}
