package walfault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/faultinject/powercut"
	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/wal"
)

// slotMagic is how the header of a slot looks; see wal/README.md.
const slotMagic = "AOWALSLT"

// A device that refuses writes or flushes: those who waited are told, the log
// goes on in another slot or fails for good, and what it acknowledged before or
// after is there, also after a power cut.
func TestDeviceFault(t *testing.T) {
	powercut.Require(t)
	seed := seed(t)
	var told atomic.Int64 // a group that fails need not have a waiter; of all of them some do
	const after = 30      // operations of the log's own before the fault
	for _, c := range []struct {
		name  string
		op    powercut.Op
		fails func(n int) bool // the n-th operation after the log's first ones
		head  bool             // also writes that hold the header of a slot
		final bool             // no slot can be written: the log fails for good
	}{
		{"one write", powercut.Write, func(n int) bool { return n == 0 }, false, false},
		{"some writes", powercut.Write, func(n int) bool { return n%25 == 0 }, false, false},
		{"header of a segment", powercut.Write, func(n int) bool { return n == 0 }, true, false},
		{"all writes", powercut.Write, func(int) bool { return true }, true, true},
		{"one flush", powercut.Flush, func(n int) bool { return n == 0 }, false, false},
		{"all flushes", powercut.Flush, func(int) bool { return true }, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, fstype := range powercut.FileSystems {
				t.Run(fstype, func(t *testing.T) {
					t.Parallel()
					n, seen, failed := 0, 0, 0
					o := powercut.Options{Fault: func(op powercut.Op, _ int64, data []byte) syscall.Errno {
						if op == powercut.Write && bytes.Contains(data, []byte(magic)) {
							seen++
						}
						// File systems give up when their own pages cannot be written:
						// only those with records in them are refused.
						head := bytes.Contains(data, []byte(slotMagic))
						if op != c.op || seen < after || op == powercut.Write &&
							(!bytes.Contains(data, []byte(magic)) || head != c.head && !c.final) {
							return 0
						}
						n++
						if !c.fails(n - 1) {
							return 0
						}
						failed++
						return syscall.EIO
					}}
					r, notes := recordWork(t, fstype, o, work{Seed: seed, Records: 500, Lives: 1, Tolerate: true})
					if failed == 0 {
						t.Fatalf("the device refused nothing: %d writes of records seen", seen)
					}
					t.Logf("%d refused; %d of %d records acknowledged, %d waiters told, %d cursors not moved, %d failovers, failed for good: %q",
						failed, last(notes), len(notes.Appended), notes.Told, notes.Unmoved, notes.Failovers, notes.Failed)
					// A flush may be the file system's own, or that of a cursor or of a slot
					// that is being prepared: then no record waits for it.
					if c.op == powercut.Write && notes.Failovers == 0 && notes.Failed == "" {
						t.Error("the log did not leave the segment")
					}
					if c.final && notes.Failed == "" {
						t.Error("the log did not fail, and no slot can be written")
					}
					told.Add(int64(notes.Told))
					cuts := append(powercut.Cuts(seed, notes.Opened, len(r.Events), 6), powercut.Cut{At: len(r.Events), Mode: powercut.KeepAll})
					replay(t, &tally{fs: fstype}, r, notes, cuts, func(cut powercut.Cut, v verdict) {
						for _, err := range v.faults {
							t.Errorf("%v of %d events: %v", cut, len(r.Events), err)
						}
					})
				})
			}
		})
	}
	if told.Load() == 0 {
		t.Error("no waiter was told of any failure")
	}
}

func last(n notes) (seq uint64) {
	for _, a := range n.Acked {
		seq = max(seq, a.Seq)
	}
	return seq
}

// each runs a test on every file system, on a device in memory.
func each(t *testing.T, fn func(t *testing.T, fstype string, m *powercut.Mount)) {
	powercut.Require(t)
	for _, fstype := range powercut.FileSystems {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			img, err := powercut.Mkfs(fstype)
			if err != nil {
				t.Fatal(err)
			}
			m, err := img.Mount(fstype, "")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := m.Unmount(); err != nil {
					t.Error(err)
				}
			})
			fn(t, fstype, m)
		})
	}
}

// fillDisk takes all space there is.
func fillDisk(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	end := int64(0)
	for size := int64(64 << 20); size >= 4096; {
		if err := unix.Fallocate(int(f.Fd()), 0, end, size); err != nil {
			if !errors.Is(err, unix.ENOSPC) {
				return err
			}
			size /= 2
			continue
		}
		end += size
	}
	page := make([]byte, 4096)
	for i := range 1024 { // what only small files can still take
		if err := os.WriteFile(fmt.Sprintf("%s-%d", path, i), page, 0o600); err != nil {
			if errors.Is(err, unix.ENOSPC) {
				return errors.Join(f.Sync(), nil)
			}
			return err
		}
	}
	return f.Sync()
}

func free(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}

func slots(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "slot-*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// No room for the log: nothing is made of it.
func TestFullBefore(t *testing.T) {
	each(t, func(t *testing.T, _ string, m *powercut.Mount) {
		dir := filepath.Join(m.Dir, "log")
		o := wal.Options{SegmentBytes: 1 << 20, MaxBytes: powercut.MaxImage}
		if _, _, err := wal.Open(dir, o); !errors.Is(err, wal.ErrCeilingExceeded) {
			t.Errorf("open: %v, want ErrCeilingExceeded", err)
		}
		if got := slots(t, dir); len(got) > 0 {
			t.Errorf("slots were left behind: %q", got)
		}
		o.MaxBytes, o.KeepFree = 4<<20, free(t, m.Dir)-3<<20
		if _, _, err := wal.Open(dir, o); !errors.Is(err, wal.ErrCeilingExceeded) {
			t.Errorf("open into what is to stay free: %v, want ErrCeilingExceeded", err)
		}
		if got := slots(t, dir); len(got) > 0 {
			t.Errorf("slots were left behind: %q", got)
		}
	})
}

// Somebody fills the disk while the slots are made: they are given back, and
// when there is room the log is made.
func TestFullDuring(t *testing.T) {
	each(t, func(t *testing.T, _ string, m *powercut.Mount) {
		dir, filler := filepath.Join(m.Dir, "log"), filepath.Join(m.Dir, "filler")
		o := wal.Options{SegmentBytes: 1 << 20, MaxBytes: 12 << 20}
		var calls int
		o.Progress = func(int64, int64) {
			if calls++; calls == 3 {
				if err := fillDisk(filler); err != nil {
					t.Error(err)
				}
			}
		}
		if _, _, err := wal.Open(dir, o); !errors.Is(err, wal.ErrCeilingExceeded) {
			t.Errorf("open: %v, want ErrCeilingExceeded", err)
		}
		if got := slots(t, dir); len(got) > 0 {
			t.Errorf("slots were left behind: %q", got)
		}
		if calls < 3 {
			t.Fatalf("only %d slots were made before the fault", calls)
		}
		removeAll(t, filler)
		l, rec, err := wal.Open(dir, o)
		for ; errors.Is(err, wal.ErrLocked); l, rec, err = wal.Open(dir, o) { // as in reopen
			time.Sleep(time.Millisecond)
		}
		if err != nil {
			t.Fatal(err)
		}
		if !rec.Created {
			t.Errorf("%+v: the log was not made anew", rec)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
}

func removeAll(t *testing.T, filler string) {
	t.Helper()
	names, err := filepath.Glob(filler + "*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(filepath.Dir(filler))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Space comes back with the transaction, and on xfs some time after it.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if err := unix.Syncfs(int(f.Fd())); err != nil {
			t.Fatal(err)
		}
		if free(t, f.Name()) > 16<<20 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the space of %s does not come back: %d bytes are free", filler, free(t, f.Name()))
		}
	}
}

// Once the slots are there a full disk does not matter: appending, recycling,
// cursors, closing and opening go on.
func TestFilledByOthers(t *testing.T) {
	each(t, func(t *testing.T, fstype string, m *powercut.Mount) {
		if fstype == "btrfs" {
			onFullBtrfs(t, m, false)
			return
		}
		dir := filepath.Join(m.Dir, "log")
		l, _, err := wal.Open(dir, logOptions)
		if err != nil {
			t.Fatal(err)
		}
		if err := fillDisk(filepath.Join(m.Dir, "filler")); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d bytes are free", free(t, m.Dir))
		var seq uint64
		p := make([]byte, 1000)
		for life := range 2 {
			for range 1200 { // 1.2 MB through 448 KiB of slots
				fill(p, 1, seq+1)
				if seq, err = l.Append(wal.ClassAction, p); err != nil {
					t.Fatal(err)
				}
				if seq%100 == 0 {
					if err := l.WaitDurable(t.Context(), seq); err != nil {
						t.Fatal(err)
					}
					if err := l.AdvanceAll(seq); err != nil {
						t.Fatal(err)
					}
				}
			}
			if got := l.Stats(); got.Rotations < 10 || got.Failovers > 0 {
				t.Errorf("life %d: %d rotations, %d failovers; want at least 10 and none", life, got.Rotations, got.Failovers)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			rep, err := wal.Verify(t.Context(), dir)
			if err != nil || rep.Last != seq {
				t.Fatalf("%+v, %v: want the last record to be %d", rep, err, seq)
			}
			l, _ = reopen(t, dir)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
}

// reopen opens a log that this process has just closed. A test that runs beside
// this one may be starting a process: between fork and exec that holds the lock,
// too.
func reopen(t *testing.T, dir string) (*wal.Log, wal.Recovery) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		l, rec, err := wal.Open(dir, logOptions)
		if err == nil {
			return l, rec
		}
		if !errors.Is(err, wal.ErrLocked) || time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// onFullBtrfs hands the log to a process of its own: when no data block is free,
// btrfs takes space for every page that is stored to through a mapping, also of
// files without copy-on-write, and the store waits until it finds some. Linux
// 6.18 has been seen to wait for ever. What must hold in any case: nobody is told
// of a record that is not there afterwards, and the process can be killed.
func onFullBtrfs(t *testing.T, m *powercut.Mount, snapshot bool) {
	btrfs := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("btrfs", args...).CombinedOutput(); err != nil {
			t.Fatalf("btrfs %v: %v: %s", args, err, out)
		}
	}
	sub, snap, filler := filepath.Join(m.Dir, "sub"), filepath.Join(m.Dir, "snap"), filepath.Join(m.Dir, "filler")
	dir := filepath.Join(m.Dir, "log")
	if snapshot {
		btrfs("subvolume", "create", sub)
		dir = filepath.Join(sub, "log")
	}
	rd, wr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer rd.Close()
	start, begin, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer begin.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf(`%s={"Dir":%q,"Filler":%q,"Seed":1,"Records":1000,"Tolerate":true}`, childEnv, dir, filler))
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{start, wr} // in the place of the clock what it waits for
	err = errors.Join(cmd.Start(), wr.Close(), start.Close())
	if err != nil {
		t.Fatal(err)
	}
	var stalled *time.Timer
	var acked uint64
	for {
		var line string
		if _, err := fmt.Fscanln(rd, &line); err != nil {
			break
		}
		if acked, err = strconv.ParseUint(line, 10, 64); err != nil {
			t.Fatal(err)
		}
		if stalled != nil {
			continue
		}
		if snapshot {
			btrfs("subvolume", "snapshot", "-r", sub, snap)
		}
		stalled = time.AfterFunc(3*time.Second, func() { _ = cmd.Process.Kill() })
		if err := begin.Close(); err != nil {
			t.Error(err)
		}
	}
	err = cmd.Wait()
	if stalled == nil {
		t.Fatalf("the workload did not open the log: %v", err)
	}
	t.Logf("%d of 1000 records acknowledged; stalled and killed: %v (%v)", acked, !stalled.Stop(), err)
	removeAll(t, filler)
	if snapshot {
		btrfs("subvolume", "delete", "-c", snap)
	}
	l, rec := reopen(t, dir)
	if rec.LastSeq < acked {
		t.Errorf("the log ends at %d, %d records were acknowledged", rec.LastSeq, acked)
	}
	for seq := l.Stats().OldestSeq; seq <= acked && seq > 0; seq++ {
		got, _, err := l.Get(seq)
		want := make([]byte, 1000)
		fill(want, 1, seq)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("record %d of %d: %v", seq, acked, err)
		}
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// On a full disk what the log keeps beside the slots can be written still: it
// opens, cursors move and stay. Nothing is appended: onFullBtrfs says why.
func TestCursorsOnFullDisk(t *testing.T) {
	each(t, func(t *testing.T, fstype string, m *powercut.Mount) {
		dir := filepath.Join(m.Dir, "log")
		l, _, err := wal.Open(dir, logOptions)
		if err != nil {
			t.Fatal(err)
		}
		var last uint64
		for range 100 {
			if last, err = l.Append(wal.ClassAction, []byte("record")); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l, _ = reopen(t, dir)
		if err := fillDisk(filepath.Join(m.Dir, "filler")); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d bytes are free", fstype, free(t, m.Dir))
		for seq := uint64(1); seq <= last; seq++ {
			if seq%20 == 0 {
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				l, _ = reopen(t, dir)
				if got := l.Cursor(wal.ClassAction); got != seq-1 {
					t.Fatalf("the cursor stands at %d, it was moved to %d", got, seq-1)
				}
			}
			if err := l.Advance(wal.ClassAction, seq); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A snapshot makes btrfs copy blocks again, whatever the files' attributes say.
func TestSnapshotOnFullBtrfs(t *testing.T) {
	powercut.Require(t)
	img, err := powercut.Mkfs("btrfs")
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Mount("btrfs", "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
	}()
	onFullBtrfs(t, m, true)
}

// The ceiling with 64 writers: everybody is told, the kernel counts no more than
// the maximum, nothing acknowledged is lost, and after an advance it goes on.
func TestCeiling(t *testing.T) {
	each(t, func(t *testing.T, fstype string, m *powercut.Mount) {
		dir := filepath.Join(m.Dir, "log")
		l, _, err := wal.Open(dir, logOptions)
		if err != nil {
			t.Fatal(err)
		}
		for round := range 3 {
			var wg sync.WaitGroup
			var mu sync.Mutex
			var acked []uint64
			rotations := l.Stats().Rotations
			for w := range 64 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(round), uint64(w)))
					for {
						res, err := l.Reserve(wal.ClassDecision, 1+rng.IntN(3000))
						if errors.Is(err, wal.ErrCeilingExceeded) {
							return
						}
						if err != nil {
							t.Error(err)
							return
						}
						fill(res.Buf, 1, res.Seq)
						res.Commit()
						if err := l.WaitDurable(t.Context(), res.Seq); err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						acked = append(acked, res.Seq)
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			if used := blocks(t, dir); used > logOptions.MaxBytes {
				t.Errorf("round %d: the kernel counts %d bytes, the maximum is %d", round, used, logOptions.MaxBytes)
			}
			if l.Stats().Rotations == rotations {
				t.Errorf("round %d: no rotation", round)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			rep, err := wal.Verify(t.Context(), dir)
			if err != nil {
				t.Fatal(err)
			}
			slices.Sort(acked)
			if len(acked) == 0 {
				t.Fatal("nothing was acknowledged")
			}
			if rep.Last < acked[len(acked)-1] || rep.First > acked[0] {
				t.Errorf("records %d to %d are there, %d to %d were acknowledged", rep.First, rep.Last, acked[0], acked[len(acked)-1])
			}
			l, _ = reopen(t, dir)
			for _, seq := range acked {
				b, _, err := l.Get(seq)
				want := make([]byte, len(b))
				fill(want, 1, seq)
				if err != nil || !bytes.Equal(b, want) {
					t.Fatalf("%s: acknowledged record %d: %v", fstype, seq, err)
				}
			}
			if err := l.AdvanceAll(rep.Last); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
}

// blocks is what the kernel counts for dir and the files in it.
func blocks(t *testing.T, dir string) (sum int64) {
	t.Helper()
	err := filepath.Walk(dir, func(_ string, info os.FileInfo, err error) error {
		if err == nil {
			sum += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// An administrator cannot make the file system read-only under an open log, and
// the log does not notice the attempt.
func TestRemount(t *testing.T) {
	each(t, func(t *testing.T, _ string, m *powercut.Mount) {
		dir := filepath.Join(m.Dir, "log")
		l, _, err := wal.Open(dir, logOptions)
		if err != nil {
			t.Fatal(err)
		}
		readOnly := func() error { return unix.Mount("", m.Dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") }
		if err := readOnly(); !errors.Is(err, unix.EBUSY) {
			t.Errorf("remount under the log: %v, want EBUSY", err)
		}
		seq, err := l.Append(wal.ClassError, []byte("record"))
		if err != nil {
			t.Fatal(err)
		}
		if err := l.WaitDurable(t.Context(), seq); err != nil {
			t.Error(err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if err := readOnly(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := wal.Open(dir, logOptions); !errors.Is(err, unix.EROFS) {
			t.Errorf("open on a read-only file system: %v, want EROFS", err)
		}
		if rep, err := wal.Verify(t.Context(), dir); err != nil || rep.Last != seq {
			t.Errorf("verify on a read-only file system: %+v, %v", rep, err)
		}
	})
}

// A file system that fails under a working log: ext4 turns read-only by itself,
// ext4 and xfs are shut down without writing their journals, which is what a
// power cut leaves of what was never written back. Who waits is told, and what
// was acknowledged is there when it is mounted again.
func TestFileSystemDies(t *testing.T) {
	powercut.Require(t)
	shutdown := func(flags int) func(*powercut.Mount) error {
		return func(m *powercut.Mount) error {
			f, err := os.Open(m.Dir)
			if err != nil {
				return err
			}
			defer f.Close()
			const goingDown = 0x8004587d // _IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
			return unix.IoctlSetPointerInt(int(f.Fd()), goingDown, flags)
		}
	}
	turnReadOnly := func(m *powercut.Mount) error {
		return os.WriteFile(filepath.Join("/sys/fs/ext4", filepath.Base(m.Device), "trigger_fs_error"), []byte("walfault"), 0)
	}
	const flushLog, noFlush = 1, 2
	for _, c := range []struct {
		name, fstype, options string
		kill                  func(*powercut.Mount) error
	}{
		{"ext4 read-only", "ext4", "errors=remount-ro", turnReadOnly},
		{"ext4 shut down", "ext4", "", shutdown(noFlush)},
		{"ext4 shut down, journal written", "ext4", "", shutdown(flushLog)},
		{"xfs shut down", "xfs", "", shutdown(noFlush)},
		{"xfs shut down, journal written", "xfs", "", shutdown(flushLog)},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed(t), 3))
			img, err := powercut.Mkfs(c.fstype)
			if err != nil {
				t.Fatal(err)
			}
			for round := range 4 {
				dies(t, img, c.fstype, c.options, c.kill, time.Duration(5+rng.IntN(60))*time.Millisecond, uint64(round))
			}
		})
	}
}

func dies(t *testing.T, img *powercut.Image, fstype, options string, kill func(*powercut.Mount) error, after time.Duration, seed uint64) {
	t.Helper()
	dev, err := img.Attach()
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	m, err := powercut.MountDevice(dev.Path, fstype, options)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(m.Dir, "log")
	l, _, err := wal.Open(dir, logOptions)
	if err != nil {
		t.Fatal(err)
	}
	r := &run{work: work{Dir: dir, Seed: seed, Records: math.MaxInt32, Tolerate: true}, now: func() int { return 0 }}
	r.n = notes{Seed: seed, Appended: map[uint64]appended{}}
	killed := make(chan error, 1)
	time.AfterFunc(after, func() { killed <- kill(m) })
	if err := r.live(l, seed); err != nil {
		t.Errorf("the workload: %v", err)
	}
	if err := <-killed; err != nil {
		t.Fatal(err)
	}
	t.Logf("after %v: %d of %d records acknowledged, %d waiters told, failed: %q", after, last(r.n), len(r.n.Appended), r.n.Told, l.Stats().Failed)
	// A log that was at its ceiling has nothing to write and does not notice; its
	// consumer was told, and nobody appends.
	failed := l.Stats().Failed != ""
	if !failed && r.n.Unmoved == 0 {
		t.Error("the log did not fail, and no cursor was refused")
	}
	if err := l.Close(); failed && !errors.Is(err, wal.ErrFailed) {
		t.Errorf("close: %v, want ErrFailed", err)
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	if m, err = powercut.MountDevice(dev.Path, fstype, options); err != nil {
		t.Fatal(err)
	}
	v := check(t.Context(), filepath.Join(m.Dir, "log"), "", r.n, math.MaxInt)
	for _, err := range v.faults {
		t.Error(err)
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
}

// A file system that is frozen, as a snapshot of the disk does it. With a ring
// appends do not wait for it, and nothing is acknowledged before it is thawed; in
// mapped files they may stand still, and go on. Nothing is lost either way.
func TestFreeze(t *testing.T) {
	fsfreeze, err := exec.LookPath("fsfreeze")
	if err != nil {
		testutil.Missing(t, "fsfreeze", "install util-linux")
	}
	each(t, func(t *testing.T, _ string, m *powercut.Mount) {
		for _, mode := range []wal.Mode{wal.ModeRing, wal.ModeMapped} {
			o := logOptions
			if o.Mode = mode; mode == wal.ModeRing {
				o.RingDir = t.TempDir()
				if err := unix.Mount("tmpfs", o.RingDir, "tmpfs", 0, "size=8m,mode=0700"); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := unix.Unmount(o.RingDir, unix.MNT_DETACH); err != nil {
						t.Error(err)
					}
				})
			}
			dir := filepath.Join(m.Dir, mode.String())
			l, _, err := wal.Open(dir, o)
			if err != nil {
				t.Fatal(err)
			}
			var seq uint64
			put := func() {
				p := make([]byte, 100)
				for range 200 {
					if seq, err = l.Append(wal.ClassDecision, p); err != nil {
						t.Fatal(err)
					}
				}
			}
			put()
			if err := l.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			durable := seq
			// Another process thaws: while a goroutine of this one waits for a page, all
			// of it may.
			wait := "read x"
			if mode == wal.ModeMapped {
				wait = "sleep 0.3"
			}
			thaw := exec.Command("sh", "-c", wait+`; exec "$0" --unfreeze "$1"`, fsfreeze, m.Dir)
			stdin, err := thaw.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(fsfreeze, "--freeze", m.Dir).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if err := thaw.Start(); err != nil {
				t.Fatal(errors.Join(err, exec.Command(fsfreeze, "--unfreeze", m.Dir).Run()))
			}
			t.Cleanup(func() { _, _ = stdin.Close(), thaw.Wait() }) // a test that ended before has to thaw, too
			put()
			if mode == wal.ModeRing {
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				if err := l.WaitDurable(ctx, seq); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("durable on a frozen file system: %v", err)
				}
				cancel()
				if d := l.Durable(); d != durable {
					t.Errorf("%d records are durable on a frozen file system, %d were before", d, durable)
				}
			}
			if err := stdin.Close(); err != nil {
				t.Fatal(err)
			}
			if err := thaw.Wait(); err != nil {
				t.Fatal(err)
			}
			if err := l.WaitDurable(t.Context(), seq); err != nil {
				t.Errorf("%v: after the thaw: %v", mode, err)
			}
			put()
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			if rep, err := wal.Verify(t.Context(), dir); err != nil || rep.Last != seq {
				t.Errorf("%v: %+v, %v, want %d records", mode, rep, err, seq)
			}
		}
	})
}
