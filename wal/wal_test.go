package wal

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/testutil"
)

const testSegment = 256 << 10

// ringDir is a tmpfs for rings, "" when there is none; testMode is what the tests
// run in.
var (
	ringDir  = os.Getenv("WAL_TEST_RING")
	testMode = ModeMapped
)

// setMode finds or mounts a tmpfs, and chooses the mode: the ring where there is
// one, unless WAL_TEST_MODE says mapped.
func setMode() (done func()) {
	done = func() {}
	if ringDir == "" && os.Getuid() == 0 {
		dir, err := os.MkdirTemp("", "wal-ring-")
		if err == nil {
			done = func() { _ = os.Remove(dir) }
			if err = unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m,mode=0700"); err == nil {
				ringDir = dir
				done = func() { _ = unix.Unmount(dir, unix.MNT_DETACH); _ = os.Remove(dir) }
			}
		}
	}
	if ringDir != "" && os.Getenv("WAL_TEST_MODE") != "mapped" {
		testMode = ModeRing
	}
	return done
}

// inMode is o in the mode of this test run, unless it names one.
func inMode(o Options) Options {
	if o.Mode == ModeAuto {
		o.Mode = testMode
	}
	if o.Mode == ModeRing {
		o.RingDir = ringDir
	}
	return o
}

func needRing(t testing.TB) {
	t.Helper()
	if ringDir == "" {
		testutil.Missing(t, "a tmpfs for a ring", "run as root, or set WAL_TEST_RING to a directory on one")
	}
}

// again is set in the run of TestInMappedFiles, which is short.
var again = os.Getenv("WAL_TEST_AGAIN") != ""

// once marks a test that names its mode, or in which none plays a part:
// TestInMappedFiles does not repeat it.
func once(t testing.TB) {
	t.Helper()
	if again {
		t.Skip("the run with a ring does it")
	}
}

// The tests ran with the ring: run those again in mapped files that are not the
// same there.
func TestInMappedFiles(t *testing.T) {
	if testMode == ModeMapped {
		t.Log("this run is in mapped files")
		return
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.count=1", "-test.short")
	cmd.Env = append(os.Environ(), "WAL_TEST_MODE=mapped", "WAL_TEST_AGAIN=1", "WAL_TEST_RING="+ringDir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start()) // before others run beside this test, as TestKill says
	t.Parallel()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.Bytes())
	}
}

func testOptions() Options {
	return inMode(Options{SegmentBytes: testSegment, MaxBytes: 4 * testSegment})
}

func open(t testing.TB, dir string, o Options) (*Log, Recovery) {
	t.Helper()
	l, rec, err := Open(dir, inMode(o))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, rec
}

// payload is what record seq holds in tests: its length and bytes follow from
// seq, so that an invented or mixed-up record is noticed.
func payload(seq uint64) []byte {
	n := 20 + int(mix(seq)%400)
	b := fmt.Appendf(nil, "record %d ", seq)
	for len(b) < n {
		b = append(b, byte(seq)+byte(len(b)))
	}
	return b
}

func appendN(t testing.TB, l *Log, n int) (last uint64) {
	t.Helper()
	for range n {
		l.mu.Lock()
		seq := l.next
		l.mu.Unlock()
		got, err := l.Append(Class(seq%uint64(NumClasses)), payload(seq))
		if err != nil {
			t.Fatal(err)
		}
		if got != seq {
			t.Fatalf("Append = %d, want %d", got, seq)
		}
		last = got
	}
	return last
}

func wait(t testing.TB, l *Log, seq uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := l.WaitDurable(ctx, seq); err != nil {
		t.Fatal(err)
	}
}

// check reads records from first to last and compares them.
func check(t testing.TB, l *Log, first, last uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	r := l.Reader(first)
	for seq := first; seq <= last; {
		b, err := r.Next(ctx, 100, 1<<20)
		if err != nil {
			t.Fatalf("at %d: %v", seq, err)
		}
		for _, rec := range b.Records {
			if rec.Seq != seq || !bytes.Equal(rec.Payload, payload(seq)) || rec.Class != Class(seq%uint64(NumClasses)) {
				t.Fatalf("record %d: got seq %d class %v %.20q", seq, rec.Seq, rec.Class, rec.Payload)
			}
			seq++
		}
		b.Release()
	}
}

func TestAppendReadReopen(t *testing.T) {
	dir := t.TempDir()
	l, rec := open(t, dir, testOptions())
	if !rec.Created || rec.LastSeq != 0 {
		t.Fatalf("recovery of a new log: %+v", rec)
	}
	last := appendN(t, l, 1000)
	wait(t, l, last)
	check(t, l, 1, last)
	id := l.ID()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		l, rec = open(t, dir, testOptions())
		if rec.Created || rec.FirstSeq != 1 || rec.LastSeq != last || rec.Records != last || rec.TornBytes != 0 || rec.Uncommitted != 0 {
			t.Fatalf("recovery: %+v", rec)
		}
		if l.ID() != id {
			t.Fatalf("id changed from %s to %s", id, l.ID())
		}
		check(t, l, 1, last)
		for _, seq := range []uint64{1, 2, 500, last} {
			b, c, err := l.Get(seq)
			if err != nil || !bytes.Equal(b, payload(seq)) || c != Class(seq%4) {
				t.Fatalf("Get(%d) = %q, %v, %v", seq, b, c, err)
			}
		}
		last = appendN(t, l, 10)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		rep, err := Verify(t.Context(), dir)
		if err != nil || rep.Records != last || rep.First != 1 || rep.Last != last || rep.TornBytes != 0 {
			t.Fatalf("verify: %+v, %v", rep, err)
		}
	}
}
