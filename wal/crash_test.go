package wal

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/testutil"
)

// TestMain runs this binary as the child of TestKill when asked to.
func TestMain(m *testing.M) {
	if dir := os.Getenv("WAL_TEST_MEMORY"); dir != "" {
		setMode()
		if err := childMemory(dir); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	if dir := os.Getenv("WAL_TEST_CHILD"); dir != "" {
		setMode()
		if os.Getenv("WAL_TEST_NOWAIT") != "" {
			childNoWait(dir)
		}
		child(dir)
		return
	}
	// More at once than there are cores: they wait for the disk.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	done := setMode()
	code := m.Run()
	done()
	os.Exit(code)
}

// child appends from eight goroutines for ever, and prints each sequence number
// once it is durable. It advances the cursors so that slots are recycled.
func child(dir string) {
	o := inMode(Options{SegmentBytes: minSegment, MaxBytes: 4 * minSegment})
	setFailpoint(&o)
	l, rec, err := Open(dir, o)
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	var mu sync.Mutex
	fmt.Println("open", rec.FirstSeq, rec.LastSeq)
	for range 8 {
		go func() {
			for {
				seq, err := appendSeq(l)
				if errors.Is(err, ErrCeilingExceeded) { // the cursors' own writes are slow
					time.Sleep(time.Millisecond)
					continue
				}
				if err == nil {
					err = l.WaitDurable(context.Background(), seq)
				}
				if o.hooked && errors.Is(err, ErrFailed) {
					continue // the fault that was asked for
				}
				mu.Lock()
				if err != nil {
					fmt.Println("error:", err)
				} else {
					fmt.Println(seq)
				}
				mu.Unlock()
			}
		}()
	}
	for {
		time.Sleep(time.Millisecond)
		if d := l.Durable(); d > 500 {
			for c := range NumClasses {
				if err := l.Advance(c, d-500); err != nil {
					fmt.Println("error:", err)
				}
			}
		}
	}
}

// appendSeq appends a record whose payload and class follow from its sequence.
func appendSeq(l *Log) (uint64, error) {
	l.mu.Lock()
	guess := l.next
	l.mu.Unlock()
	r, err := l.Reserve(Class(guess%uint64(NumClasses)), 40)
	if err != nil {
		return 0, err
	}
	fixed(r.Buf, r.Seq)
	r.Commit()
	return r.Seq, nil
}

// fixed fills b with what record seq holds.
func fixed(b []byte, seq uint64) {
	n := copy(b, strconv.AppendUint(nil, seq, 10))
	for i := n; i < len(b); i++ {
		b[i] = byte(seq) + byte(i)
	}
}

// The tests that start processes do not run beside others: until it becomes
// another program, a new process has the locks of this one.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	k := &killed{told: map[uint64]bool{}, voids: map[uint64]bool{}}
	rounds, step := 25, 7 // milliseconds between the kills
	if testing.Short() {
		rounds, step = 10, 17
	}
	for round := 0; round < rounds || !k.recycled && round < 4*rounds; round++ { // a slow disk takes longer to fill slots
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), "WAL_TEST_CHILD="+dir, "WAL_TEST_RING="+ringDir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Duration(10+step*(round%rounds))*time.Millisecond, func() { _ = cmd.Process.Kill() })
		k.listen(t, out)
		_ = cmd.Wait() // killed
		k.check(t, dir)
	}
	if !k.recycled {
		t.Fatalf("only %d records were acknowledged, no slot was recycled: the test did not test much", k.acked)
	}
	t.Logf("%d records acknowledged, %d void", k.acked, len(k.voids))
}

// killed is what the children on one log have said before they were killed.
type killed struct {
	acked    uint64          // highest acknowledged
	told     map[uint64]bool // every one acknowledged
	voids    map[uint64]bool // cut off between Reserve and Commit
	recycled bool
}

// listen reads what a child prints until it ends.
func (k *killed) listen(t *testing.T, out io.Reader) {
	t.Helper()
	sc := bufio.NewScanner(out)
	for sc.Scan() {
		line := sc.Text()
		if first, ok := strings.CutPrefix(line, "open "); ok {
			var a, b uint64
			if _, err := fmt.Sscan(first, &a, &b); err != nil {
				t.Fatal(err)
			}
			if b < k.acked {
				t.Fatalf("recovered up to %d, acknowledged up to %d", b, k.acked)
			}
			k.recycled = k.recycled || a > 1
			continue
		}
		seq, err := strconv.ParseUint(line, 10, 64)
		if err != nil {
			t.Fatalf("child said %q", line)
		}
		k.acked = max(k.acked, seq)
		k.told[seq] = true
	}
}

// check reads the log as it was left: everything acknowledged is there, nothing
// was invented, nothing is missing in between.
func (k *killed) check(t *testing.T, dir string) {
	t.Helper()
	rep, err := Verify(t.Context(), dir)
	if errors.Is(err, fs.ErrNotExist) && k.acked == 0 {
		return // killed while the log was being made
	}
	if err != nil {
		t.Fatal(err)
	}
	if rep.Last < k.acked {
		t.Fatalf("the log ends at %d, acknowledged up to %d", rep.Last, k.acked)
	}
	s, err := OpenReadOnly(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	next := max(rep.First, 1)
	for e, err := range s.Records(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, 40)
		fixed(want, next)
		if e.Void && !k.told[e.Seq] {
			k.voids[e.Seq] = true // nobody was told of it
			want = nil
		}
		if e.Seq != next || !bytes.Equal(e.Payload, want) {
			t.Fatalf("record %d: got %d %q", next, e.Seq, e.Payload)
		}
		next++
	}
	if next != rep.Last+1 {
		t.Fatalf("read up to %d, want %d", next-1, rep.Last)
	}
}

// A failed sync: those who wait are told, the log goes on in the next slot, and
// nothing is missing after a restart.
func TestSyncFailure(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	fail := 0
	o := testOptions()
	o.SyncInterval = time.Hour // only waiting makes a sync
	o.sync = func(f *os.File) error {
		mu.Lock()
		defer mu.Unlock()
		if fail > 0 {
			fail--
			return syscall.EIO
		}
		return fdatasync(f)
	}
	l, _ := open(t, dir, o)
	wait(t, l, appendN(t, l, 10))
	mu.Lock()
	fail = 1
	if l.ring != nil { // repeated once from there
		fail = 2
	}
	mu.Unlock()
	seq := appendN(t, l, 5)
	err := l.WaitDurable(t.Context(), seq)
	if !errors.Is(err, ErrFailed) || !errors.Is(err, syscall.EIO) {
		t.Fatalf("WaitDurable over a failed sync: %v", err)
	}
	last := appendN(t, l, 20)
	wait(t, l, last)
	check(t, l, 1, last)
	if st := l.Stats(); st.Failovers != 1 || st.Failed != "" {
		t.Fatalf("stats: %+v", st)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l, rec := open(t, dir, testOptions())
	if rec.LastSeq != last || rec.Records != last {
		t.Fatalf("recovery: %+v, want %d records", rec, last)
	}
	check(t, l, 1, last)
}

// When the next slot fails too, it is final: every call says so.
func TestSyncFailureForGood(t *testing.T) {
	var mu sync.Mutex
	broken := false
	o := testOptions()
	o.sync = func(f *os.File) error {
		mu.Lock()
		defer mu.Unlock()
		if broken {
			return syscall.EIO
		}
		return fdatasync(f)
	}
	dir := t.TempDir()
	l, _ := open(t, dir, o)
	good := appendN(t, l, 10)
	wait(t, l, good)
	mu.Lock()
	broken = true
	mu.Unlock()
	seq := appendN(t, l, 1)
	if err := l.WaitDurable(t.Context(), seq); !errors.Is(err, ErrFailed) {
		t.Fatalf("WaitDurable: %v", err)
	}
	if _, err := l.Append(ClassAction, []byte("x")); !errors.Is(err, ErrFailed) {
		t.Fatalf("Append on a failed log: %v", err)
	}
	if err := l.WaitDurable(t.Context(), seq); !errors.Is(err, ErrFailed) {
		t.Fatalf("WaitDurable on a failed log: %v", err)
	}
	check(t, l, 1, good)
	if _, err := l.Reader(good+1).Next(t.Context(), 1, 1); !errors.Is(err, ErrFailed) {
		t.Fatalf("Next on a failed log: %v", err)
	}
	if err := l.Close(); !errors.Is(err, ErrFailed) {
		t.Fatalf("Close of a failed log: %v", err)
	}
	l, rec := open(t, dir, testOptions())
	if rec.LastSeq < good {
		t.Fatalf("recovery: %+v, want at least %d records", rec, good)
	}
	check(t, l, 1, rec.LastSeq)
}

// The first sync of a new segment fails when the only other slot still holds
// the durable end of the log: it must be given up, not waited for for ever, and
// that end must be there after a restart.
func TestSyncFailureWithoutSlot(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var mu sync.Mutex
	var broken string
	o := inMode(Options{SegmentBytes: minSegment, MaxBytes: 2 * minSegment, SyncInterval: time.Hour})
	o.sync = func(f *os.File) error {
		mu.Lock()
		defer mu.Unlock()
		if f.Name() == broken {
			return syscall.EIO
		}
		return fdatasync(f)
	}
	l, _ := open(t, dir, o)
	var last uint64
	for range 20 {
		last = appendN(t, l, 1)
	}
	wait(t, l, last)
	mu.Lock()
	broken = dir + "/slot-0001"
	mu.Unlock()
	var err error
	for err == nil {
		var seq uint64
		if seq, err = appendSeq(l); err == nil {
			if err = l.WaitDurable(t.Context(), seq); err == nil {
				last = seq
				err = l.AdvanceAll(seq)
			}
		}
	}
	// From the ring the header is written before the slot is used: the slot is
	// left out, and without it the log is full.
	want := ErrFailed
	if l.ring != nil {
		want = ErrCeilingExceeded
	}
	if !errors.Is(err, want) {
		t.Fatal(err)
	}
	if _, err := appendSeq(l); !errors.Is(err, want) {
		t.Fatalf("Append on a failed log: %v", err)
	}
	if err := l.Close(); l.ring == nil && !errors.Is(err, ErrFailed) || l.ring != nil && err != nil {
		t.Fatal(err)
	}
	o.sync = nil
	l, rec, err := Open(dir, o)
	if err != nil || rec.LastSeq < last {
		t.Fatalf("%+v, %v, want at least %d", rec, err, last)
	}
	l.Close()
}

// Somebody cuts the file under the mapping: the process lives, the records that
// are gone are void, the log goes on.
func TestFaultInMapping(t *testing.T) {
	once(t)
	dir := t.TempDir()
	o := testOptions()
	o.Mode = ModeMapped
	l, _ := open(t, dir, o)
	last := appendN(t, l, 10)
	wait(t, l, last)
	l.mu.Lock()
	file := l.cur.file.Name()
	l.mu.Unlock()
	if err := os.Truncate(file, dataStart); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(ClassAction, bytes.Repeat([]byte("x"), 100)); !errors.Is(err, ErrFailed) {
		t.Fatalf("Append into a cut file: %v", err)
	}
	// A caller that encodes by itself gets a panic it can recover.
	func() {
		r, err := l.Reserve(ClassDecision, 30000)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if p := recover(); p != nil && !isFault(p) {
				panic(p)
			}
			r.Abort()
		}()
		for i := range r.Buf {
			r.Buf[i] = 1
		}
	}()
	deadline := time.Now().Add(10 * time.Second)
	for l.Stats().Failovers == 0 {
		if time.Now().After(deadline) {
			t.Fatal("the committer did not leave the cut segment")
		}
		time.Sleep(time.Millisecond)
	}
	seq, err := l.Append(ClassAction, payload(0))
	if err != nil {
		t.Fatal(err)
	}
	wait(t, l, seq)
	if b, _, err := l.Get(seq); err != nil || !bytes.Equal(b, payload(0)) {
		t.Fatalf("Get(%d) = %q, %v", seq, b, err)
	}
	if _, _, err := l.Get(1); err == nil {
		t.Fatal("Get of a record that is gone gave no error")
	}
	if _, err := l.Reader(1).Next(t.Context(), 10, 1<<20); err == nil {
		t.Fatal("Next over records that are gone gave no error")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(dir, testOptions()); !errors.Is(err, ErrDamaged) {
		t.Fatalf("Open of a log with a cut file: %v", err)
	}
}

// The ceiling on a file system that is hardly larger than the log.
func TestCeilingOnSmallFileSystem(t *testing.T) {
	once(t)
	if os.Getuid() != 0 {
		testutil.Missing(t, "root, to mount a small tmpfs", "run as root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m,nr_inodes=32,mode=0700"); err != nil {
		if errors.Is(err, unix.EPERM) {
			testutil.Missing(t, "a small tmpfs", err.Error())
		}
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		t.Fatalf("%s is not the tmpfs that was mounted: type %#x, %v", dir, st.Type, err)
	}
	o := testOptions()
	o.Mode = ModeMapped // a log on a tmpfs takes no ring

	// Larger than the file system: refused, nothing left behind.
	o.MaxBytes = 3 << 20
	if _, _, err := Open(dir+"/a", o); !errors.Is(err, ErrCeilingExceeded) {
		t.Fatalf("Open larger than the file system: %v", err)
	}
	if n := slotFiles(t, dir+"/a"); n != 0 {
		t.Fatalf("%d slots are left of a log that could not be made", n)
	}
	// It would fit, but enter what is to stay free.
	o.MaxBytes, o.KeepFree = 1<<20, 1536<<10
	if _, _, err := Open(dir+"/a", o); !errors.Is(err, ErrCeilingExceeded) {
		t.Fatalf("Open into keep-free: %v", err)
	}
	o.KeepFree = 512 << 10
	l, _ := open(t, dir+"/a", o)
	hammer(t, l, dir+"/a", o.MaxBytes)
	// Somebody else fills the disk: the log does not care.
	junk := make([]byte, 4<<20)
	_ = os.WriteFile(dir+"/junk", junk, 0o600) // ends in ENOSPC
	for c := range NumClasses {
		if err := l.Advance(c, l.Durable()); err != nil {
			t.Fatal(err)
		}
	}
	hammer(t, l, dir+"/a", o.MaxBytes)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), dir+"/a"); err != nil {
		t.Fatal(err)
	}
	// Nothing can be written to lock: who has the log is then unknown, no more.
	if err := os.Truncate(dir+"/a/lock", 0); err != nil {
		t.Fatal(err)
	}
	_ = os.WriteFile(dir+"/junk2", junk, 0o600)
	if err := os.WriteFile(dir+"/full", []byte("x"), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the file system is not full: %v", err)
	}
	open(t, dir+"/a", o)
	if _, _, err := Open(dir+"/a", o); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "pid unknown") {
		t.Fatalf("second Open: %v", err)
	}
}

func TestCeiling(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := testOptions()
	l, _ := open(t, dir, o)
	for range 3 {
		hammer(t, l, dir, o.MaxBytes)
		for c := range NumClasses {
			if err := l.Advance(c, l.Durable()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
}

// hammer appends from 64 goroutines until every one is refused, and asks the
// kernel what is on disk meanwhile.
func hammer(t *testing.T, l *Log, dir string, most int64) {
	t.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var newest uint64
	before := l.Durable()
	for range 64 {
		wg.Go(func() {
			for {
				seq, err := appendSeq(l)
				if errors.Is(err, ErrCeilingExceeded) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				newest = max(newest, seq)
				mu.Unlock()
			}
		})
	}
	stop := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			if n := diskBytes(t, dir); n > most {
				t.Errorf("%d bytes on disk, the ceiling is %d", n, most)
				return
			}
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	})
	wg.Wait()
	close(stop)
	watch.Wait()
	if newest <= before+1000 {
		t.Fatalf("refused after %d records", newest-before)
	}
	wait(t, l, newest)
	if !l.Stats().Full {
		t.Fatal("Stats does not say that the log is full")
	}
}

func slotFiles(t *testing.T, dir string) int {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "slot-") {
			n++
		}
	}
	return n
}

// diskBytes is what the kernel says the directory takes.
func diskBytes(t *testing.T, dir string) int64 {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
		return 0
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Error(err)
	}
	n := st.Blocks * 512
	for _, e := range entries {
		if err := unix.Stat(dir+"/"+e.Name(), &st); err != nil {
			continue // a temporary file
		}
		n += st.Blocks * 512
	}
	return n
}
