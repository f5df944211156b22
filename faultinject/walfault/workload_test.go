package walfault

import (
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/faultinject/powercut"
	"github.com/autonomyops/autonomy/wal"
)

const childEnv = "WALFAULT_CHILD"

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		if err := child(spec); err != nil {
			fmt.Fprintln(os.Stderr, "workload:", err)
			os.Exit(1)
		}
		return
	}
	powercut.Main(m)
}

// magic is how the first bytes of records look; a device finds them by it.
const magic = "walfault"

// fill makes the one payload that record seq of this size may have.
func fill(b []byte, seed, seq uint64) {
	rng := rand.New(rand.NewPCG(seed^uint64(len(b))<<40, seq))
	for i := 0; i < len(b); i += 8 {
		v := rng.Uint64()
		for k := i; k < min(i+8, len(b)); k++ {
			b[k], v = byte(v), v>>8
		}
	}
	copy(b, magic)
}

// A work says what the workload does.
type work struct {
	Dir      string
	Ring     string // directory in memory for the ring; empty: mapped files
	Seed     uint64
	Records  int    // in each of its lives
	Lives    int    // the log is closed between them, and not after the last
	AckEarly bool   // the fault of the control: acknowledge before the sync
	Tolerate bool   // ErrFailed is expected: such a record counts as not acknowledged
	Filler   string // not empty: fill the disk with it, then one writer that waits for every 100th record and prints its number
}

// sizes of the log: small, so that slots are used again soon.
var logOptions = wal.Options{SegmentBytes: 64 << 10, MaxBytes: 7 * 64 << 10, SyncInterval: 2 * time.Millisecond}

// optionsWith are those with a ring in that directory, and fail without it; "":
// mapped files.
func optionsWith(ring string) wal.Options {
	o := logOptions
	o.Mode = wal.ModeMapped
	if ring != "" {
		o.Mode, o.RingDir = wal.ModeRing, ring
	}
	return o
}

// notes is what the workload saw. Clock is how much the device had recorded: of
// acknowledgements and moved cursors read after they came, of requests before
// they were made.
type notes struct {
	Seed      uint64
	Opened    int // clock when the log was there
	Appended  map[uint64]appended
	Acked     []ack
	Requested []cursor
	Moved     []cursor

	Told      int // ErrFailed was returned
	Unmoved   int // a cursor could not be moved
	Rotations uint64
	Failovers uint64
	Failed    string // the log failed for good
}

type appended struct {
	Class wal.Class
	Size  int
	Void  bool
}

// ack: this record and all before it are durable.
type ack struct {
	Seq   uint64
	Clock int
}

type cursor struct {
	Class wal.Class
	Seq   uint64
	Clock int
}

// run is the workload of one process.
type run struct {
	work
	now func() int

	mu sync.Mutex
	n  notes
}

func child(spec string) error {
	r := &run{}
	if err := json.Unmarshal([]byte(spec), &r.work); err != nil {
		return err
	}
	in, out := os.NewFile(3, "clock or start"), os.NewFile(4, "notes")
	if r.Filler != "" {
		return r.plain(in, out)
	}
	clock := powercut.NewClock(in)
	r.now = func() int {
		n, err := clock.Now()
		if err != nil {
			panic(err)
		}
		return n
	}
	if err := r.all(); err != nil {
		return err
	}
	return errors.Join(gob.NewEncoder(out).Encode(r.n), out.Close())
}

// plain says that the log is open by printing 0, and goes on when start is closed.
func (r *run) plain(start, out *os.File) error {
	l, _, err := wal.Open(r.Dir, logOptions)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(out, 0); err != nil {
		return err
	}
	if _, err := io.ReadAll(start); err != nil {
		return err
	}
	if err := fillDisk(r.Filler); err != nil {
		return err
	}
	for range r.Records {
		res, err := l.Reserve(wal.ClassAction, 1000)
		if err != nil {
			return err
		}
		if err := put(res, r.Seed); err != nil {
			return err
		}
		if res.Seq%100 > 0 {
			continue
		}
		if err := l.WaitDurable(context.Background(), res.Seq); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(out, res.Seq); err != nil {
			return err
		}
		if err := l.AdvanceAll(res.Seq); err != nil && !r.Tolerate {
			return err
		}
	}
	return l.Close()
}

// startWork runs the workload in a process and returns its notes.
func startWork(t *testing.T, d *powercut.Disk, w work) notes {
	t.Helper()
	spec, err := json.Marshal(w)
	if err != nil {
		t.Fatal(err)
	}
	rd, wr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer rd.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+string(spec))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{d.ClockFile(), wr}
	err = cmd.Start()
	_ = wr.Close()
	if err != nil {
		t.Fatal(err)
	}
	var n notes
	decode := gob.NewDecoder(rd).Decode(&n)
	if err := errors.Join(cmd.Wait(), decode); err != nil {
		t.Fatalf("the workload ended early: %v", err)
	}
	return n
}

func (r *run) all() error {
	r.n.Seed = r.Seed
	r.n.Appended = map[uint64]appended{}
	for life := range r.Lives {
		l, _, err := wal.Open(r.Dir, optionsWith(r.Ring))
		if err != nil {
			return err
		}
		if life == 0 {
			r.n.Opened = r.now()
		}
		if err := r.live(l, r.Seed+uint64(life)*1000); err != nil {
			return err
		}
		s := l.Stats()
		r.n.Rotations += s.Rotations
		r.n.Failovers += s.Failovers
		r.n.Failed = s.Failed
		if life < r.Lives-1 {
			if err := l.Close(); err != nil && !r.Tolerate {
				return err
			}
		}
	}
	return nil
}

const (
	waiting = 4 // writers that wait for each record
	loose   = 2 // writers that do not
)

// live is one life of the log: writers until enough records are in it, and the
// consumer.
func (r *run) live(l *wal.Log, seed uint64) error {
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()
	var left atomic.Int64
	left.Store(int64(r.Records))
	var writers, readers sync.WaitGroup
	errs := make(chan error, waiting+loose+3)
	for w := range waiting + loose {
		writers.Go(func() {
			if err := r.writer(ctx, l, rand.New(rand.NewPCG(seed, uint64(w))), w < waiting, &left); err != nil {
				errs <- fmt.Errorf("writer %d: %w", w, err)
				cancel()
			}
		})
	}
	done := make(chan struct{})
	readers.Go(func() {
		if err := r.consumer(ctx, l, rand.New(rand.NewPCG(seed, 99)), done); err != nil {
			errs <- fmt.Errorf("consumer: %w", err)
			cancel()
		}
	})
	readers.Go(func() { // whoever asks Durable may act on the answer, too
		for {
			select {
			case <-done:
				return
			case <-ctx.Done():
				return
			case <-time.After(time.Millisecond):
				r.acked(l.Durable())
			}
		}
	})
	readers.Go(func() {
		if err := writeback(r.Dir, rand.New(rand.NewPCG(seed, 98)), done); err != nil {
			errs <- fmt.Errorf("writeback: %w", err)
			cancel()
		}
	})
	writers.Wait()
	close(done)
	readers.Wait()
	close(errs)
	var all []error
	for err := range errs {
		all = append(all, err)
	}
	return errors.Join(all...)
}

func (r *run) note(seq uint64, a appended) {
	r.mu.Lock()
	r.n.Appended[seq] = a
	r.mu.Unlock()
}

// put encodes and publishes a record. A page that the disk cannot give is a
// panic here, as Reservation says; the record is aborted then.
func put(res wal.Reservation, seed uint64) (err error) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		fault, ok := p.(interface {
			error
			Addr() uintptr
		})
		if !ok {
			panic(p)
		}
		res.Abort()
		err = fmt.Errorf("record %d: %w", res.Seq, fault)
	}()
	fill(res.Buf, seed, res.Seq)
	res.Commit()
	return nil
}

func (r *run) acked(seq uint64) {
	if seq == 0 {
		return
	}
	now := r.now()
	r.mu.Lock()
	r.n.Acked = append(r.n.Acked, ack{seq, now})
	r.mu.Unlock()
}

// writeback does what the kernel does under memory pressure: it writes pages of
// the log's files whenever it likes, later ones before earlier ones, and flushes
// nothing.
func writeback(dir string, rng *rand.Rand, done chan struct{}) (err error) {
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return err
	}
	var files []*os.File
	defer func() {
		for _, f := range files {
			err = errors.Join(err, f.Close())
		}
	}()
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	for {
		select {
		case <-done:
			return nil
		case <-time.After(time.Duration(rng.IntN(1500)) * time.Microsecond):
		}
		f := files[rng.IntN(len(files))]
		// It starts writing and asks for no result: an error stays for the log.
		_ = unix.SyncFileRange(int(f.Fd()), int64(rng.IntN(16))<<12, int64(1+rng.IntN(8))<<12, unix.SYNC_FILE_RANGE_WRITE)
	}
}

func size(rng *rand.Rand) int {
	switch n := rng.IntN(10); {
	case n < 6:
		return 20 + rng.IntN(400)
	case n < 9:
		return 400 + rng.IntN(3000)
	}
	return 3000 + rng.IntN(9000)
}

func (r *run) writer(ctx context.Context, l *wal.Log, rng *rand.Rand, wait bool, left *atomic.Int64) error {
	for left.Add(-1) >= 0 {
		n, class, void := size(rng), wal.Class(rng.IntN(int(wal.NumClasses))), rng.IntN(40) == 0
		res, err := l.Reserve(class, n)
		for errors.Is(err, wal.ErrCeilingExceeded) { // the consumer is behind
			select {
			case <-ctx.Done():
				return fmt.Errorf("%w: %w", ctx.Err(), err)
			case <-time.After(time.Millisecond):
			}
			r.mu.Lock()
			stuck := r.n.Unmoved > 0 // the consumer may not come back to it
			r.mu.Unlock()
			if stuck {
				return nil
			}
			res, err = l.Reserve(class, n)
		}
		if r.Tolerate && errors.Is(err, wal.ErrFailed) {
			return nil
		}
		if err != nil {
			return err
		}
		r.note(res.Seq, appended{class, n, void})
		if void {
			res.Abort()
		} else if err := put(res, r.Seed); err != nil {
			r.note(res.Seq, appended{class, n, true})
			if !r.Tolerate {
				return err
			}
			continue
		}
		switch {
		case r.AckEarly:
			r.acked(res.Seq)
		case wait:
			err := l.WaitDurable(ctx, res.Seq)
			if r.Tolerate && errors.Is(err, wal.ErrFailed) {
				r.mu.Lock()
				r.n.Told++
				r.mu.Unlock()
				continue
			}
			if err != nil {
				return err
			}
			r.acked(res.Seq)
		default:
			if rng.IntN(4) == 0 {
				time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
			}
		}
	}
	return nil
}

// consumer reads, and moves the cursors of the classes apart.
func (r *run) consumer(ctx context.Context, l *wal.Log, rng *rand.Rand, done chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { <-done; cancel() }()
	rd := l.Reader(l.Stats().OldestSeq)
	var last uint64
	for {
		next, stop := context.WithTimeout(ctx, 5*time.Millisecond)
		b, err := rd.Next(next, 1+rng.IntN(64), 64<<10)
		stop()
		idle := errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil
		switch {
		case err == nil:
			last = b.Records[len(b.Records)-1].Seq
			b.Release()
		case !idle:
			select {
			case <-done:
				return nil
			default:
			}
			if r.Tolerate && errors.Is(err, wal.ErrFailed) {
				return nil
			}
			return err
		case last == 0:
			continue
		}
		for c := range wal.NumClasses {
			if !idle && rng.IntN(3) == 0 {
				continue // this class stays behind, until there is nothing else to do
			}
			now := r.now()
			r.mu.Lock()
			r.n.Requested = append(r.n.Requested, cursor{c, last, now})
			r.mu.Unlock()
			err := l.Advance(c, last)
			if err != nil && r.Tolerate {
				r.mu.Lock()
				r.n.Unmoved++
				r.mu.Unlock()
				continue
			}
			if err != nil {
				return err
			}
			now = r.now()
			r.mu.Lock()
			r.n.Moved = append(r.n.Moved, cursor{c, last, now})
			r.mu.Unlock()
		}
	}
}
