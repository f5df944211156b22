package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Appending allocates nothing, whatever the committer does meanwhile.
func TestAppendDoesNotAllocate(t *testing.T) {
	l, _ := open(t, t.TempDir(), Options{SegmentBytes: 1 << 20, MaxBytes: 2 << 20})
	p := payload(7)
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := l.Append(ClassDecision, p); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Fatalf("Append allocates %v times", n)
	}
	if n := testing.AllocsPerRun(1000, func() {
		r, err := l.Reserve(ClassAction, 100)
		if err != nil {
			t.Fatal(err)
		}
		r.Buf[0] = 1
		r.Commit()
	}); n != 0 {
		t.Fatalf("Reserve and Commit allocate %v times", n)
	}
}

// Writers, readers, random access and a read-only view at once, over recycled
// slots: order, density and bytes hold everywhere.
func TestConcurrent(t *testing.T) {
	t.Parallel()
	const writers, each = 8, 2500
	dir := t.TempDir()
	o := testOptions()
	o.Watermark = true
	l, _ := open(t, dir, o)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var work, watch sync.WaitGroup
	for w := range writers {
		work.Go(func() {
			for i := range each {
				seq, err := appendSeq(l)
				for errors.Is(err, ErrCeilingExceeded) { // the consumer is behind
					time.Sleep(time.Millisecond)
					seq, err = appendSeq(l)
				}
				if err == nil && i%(w+1) == 0 {
					err = l.WaitDurable(ctx, seq)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	want := make([]byte, 40)
	watch.Go(func() { // the consumer
		r := l.Reader(1)
		for next := uint64(1); next <= writers*each; {
			b, err := r.Next(ctx, 256, 1<<16)
			if err != nil {
				t.Error(err)
				return
			}
			for _, rec := range b.Records {
				if fixed(want, next); rec.Seq != next || !bytes.Equal(rec.Payload, want) {
					t.Errorf("record %d: got %d %q", next, rec.Seq, rec.Payload)
					return
				}
				next++
			}
			b.Release()
			for c := range NumClasses {
				if err := l.Advance(c, next-1); err != nil {
					t.Error(err)
				}
			}
			l.SetWatermark(next - 1)
		}
	})
	stop := make(chan struct{})
	watch.Go(func() { // random access
		want := make([]byte, 40)
		for {
			select {
			case <-stop:
				return
			default:
			}
			seq := l.Durable()
			b, _, err := l.Get(seq)
			if fixed(want, seq); seq > 0 && (err != nil || !bytes.Equal(b, want)) {
				t.Errorf("Get(%d) = %q, %v", seq, b, err)
				return
			}
			time.Sleep(100 * time.Microsecond)
		}
	})
	var views int
	watch.Go(func() { // what the CLI does beside a running node
		for {
			select {
			case <-stop:
				return
			default:
			}
			rep, err := Verify(ctx, dir)
			if errors.Is(err, ErrDamaged) {
				t.Error(err)
				return
			}
			if err == nil && rep.Records > 0 && rep.Last-rep.First+1 != rep.Records {
				t.Errorf("%+v", rep)
			}
			if err == nil {
				views++
			}
		}
	})
	work.Wait()
	if err := l.Sync(ctx); err != nil {
		t.Error(err)
	}
	close(stop)
	watch.Wait()
	st := l.Stats()
	if st.DurableSeq != writers*each || st.Rotations < 3 || st.OldestSeq == 1 {
		t.Fatalf("%+v", st)
	}
	if views == 0 {
		t.Error("no read-only view succeeded")
	}
	t.Logf("%d syncs, %.1f records each, %d views", st.Syncs, st.RecordsPerSync, views)
}

func TestAbort(t *testing.T) {
	dir := t.TempDir()
	l, _ := open(t, dir, testOptions())
	appendN(t, l, 2)
	r, err := l.Reserve(ClassLifecycle, 50)
	if err != nil {
		t.Fatal(err)
	}
	copy(r.Buf, "half of a secret")
	r.Abort()
	last := appendN(t, l, 1)
	wait(t, l, last)
	if _, c, err := l.Get(r.Seq); !errors.Is(err, ErrNotFound) || c != ClassLifecycle {
		t.Fatalf("Get of a void record: %v, %v", c, err)
	}
	b, err := l.Reader(1).Next(t.Context(), 10, 1<<20)
	if err != nil || len(b.Records) != 4 {
		t.Fatalf("%v, %v", b.Records, err)
	}
	if v := b.Records[2]; !v.Void || v.Payload != nil || v.Seq != 3 || v.Class != ClassLifecycle {
		t.Fatalf("void record: %+v", v)
	}
	b.Release()
	for _, f := range readImage(t, dir) {
		if bytes.Contains(f, []byte("half of a secret")) {
			t.Fatal("the payload of an aborted record is on disk")
		}
	}
}

func TestRefusals(t *testing.T) {
	l, _ := open(t, t.TempDir(), testOptions())
	last := appendN(t, l, 3)
	wait(t, l, last)
	big := make([]byte, l.maxPayload+1)
	if _, err := l.Append(ClassError, big); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := l.Append(ClassError, big[:l.maxPayload]); err != nil {
		t.Errorf("as large as can be: %v", err)
	}
	last++
	for _, tc := range []struct {
		name string
		err  error
		want string
	}{
		{"empty", second(l.Append(ClassError, nil)), "size is 0"},
		{"unknown class", second(l.Append(9, []byte("x"))), "unknown class(9)"},
		{"wait for the future", l.WaitDurable(t.Context(), last+1), "the next one is 5"},
		{"advance past durable", l.Advance(ClassError, last+1), "durable only up to"},
		{"advance unknown class", l.Advance(9, 1), "unknown class(9)"},
	} {
		if tc.err == nil || !strings.Contains(tc.err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.name, tc.err, tc.want)
		}
	}
	if st := l.Stats(); st.NextSeq != last+1 {
		t.Errorf("refused records took sequence numbers: next is %d", st.NextSeq)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Reader(last+1).Next(ctx, 1, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("Next with a dead context: %v", err)
	}
	if _, _, err := l.Get(last + 1); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get of the future: %v", err)
	}
	blocked := make(chan error)
	go func() {
		_, err := l.Reader(last+1).Next(context.Background(), 1, 1)
		blocked <- err
	}()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-blocked; !errors.Is(err, ErrClosed) {
		t.Errorf("Next over Close: %v", err)
	}
	if _, err := l.Append(ClassError, []byte("x")); !errors.Is(err, ErrClosed) {
		t.Errorf("Append after Close: %v", err)
	}
	if _, _, err := l.Get(1); !errors.Is(err, ErrClosed) {
		t.Errorf("Get after Close: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func second(_ uint64, err error) error { return err }

// A view outlives Close; its slot is given back with it.
func TestBatchOutlivesClose(t *testing.T) {
	l, _ := open(t, t.TempDir(), testOptions())
	wait(t, l, appendN(t, l, 1))
	b, err := l.Reader(1).Next(t.Context(), 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.Records[0].Payload, payload(1)) {
		t.Fatal("the view changed")
	}
	b.Release()
	for _, s := range l.slots {
		if s.m != nil {
			t.Fatalf("slot %d is still mapped", s.index)
		}
	}
}

// A view keeps its slot from being recycled.
func TestViewHoldsSlot(t *testing.T) {
	l, _ := open(t, t.TempDir(), smallOptions())
	wait(t, l, appendN(t, l, 5))
	b, err := l.Reader(1).Next(t.Context(), 5, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if !fillUp(t, l) && l.ring == nil { // from the ring it is a copy
		t.Fatal("a slot was recycled under a view")
	}
	for i, rec := range b.Records {
		if !bytes.Equal(rec.Payload, payload(uint64(i+1))) {
			t.Fatalf("record %d changed under its view", i+1)
		}
	}
	b.Release()
	if _, err := appendSeq(l); err != nil {
		t.Fatalf("Append after Release: %v", err)
	}
}

func TestCursors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := smallOptions()
	o.Watermark = true
	l, _ := open(t, dir, o)
	wait(t, l, appendN(t, l, 40))
	for i, seq := range []uint64{5, 3, 9, 9, 1} {
		if err := l.Advance(ClassAction, seq); err != nil {
			t.Fatal(err)
		}
		if want := []uint64{5, 5, 9, 9, 9}[i]; l.Cursor(ClassAction) != want {
			t.Fatalf("cursor is %d, want %d", l.Cursor(ClassAction), want)
		}
	}
	l.SetWatermark(8)
	l.SetWatermark(2)
	if st := l.Stats(); st.Watermark != 8 {
		t.Fatalf("watermark is %d, want 8", st.Watermark)
	}
	l.Close()
	l, _ = open(t, dir, o)
	if c := l.cursors(); c != [NumClasses]uint64{0, 0, 9, 0} {
		t.Fatalf("cursors after reopening: %v", c)
	}
	// All cursors at the end, the watermark behind: no slot may go.
	if !fillUp(t, l) {
		t.Fatal("slots were recycled although the watermark is behind")
	}
	l.SetWatermark(l.Durable())
	if _, err := appendSeq(l); err != nil {
		t.Fatalf("Append after the watermark moved: %v", err)
	}
}

// fillUp appends and advances all cursors until the ceiling, or until the
// oldest record is gone.
func fillUp(t *testing.T, l *Log) bool {
	t.Helper()
	for i := 0; ; {
		_, err := appendSeq(l)
		if errors.Is(err, ErrCeilingExceeded) {
			if err := l.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			for c := range NumClasses {
				if err := l.Advance(c, l.Durable()); err != nil {
					t.Fatal(err)
				}
			}
			_, err = appendSeq(l)
			if errors.Is(err, ErrCeilingExceeded) {
				return true
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		if i++; i%100 == 0 {
			if err := l.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			for c := range NumClasses {
				if err := l.Advance(c, l.Durable()); err != nil {
					t.Fatal(err)
				}
			}
		}
		if l.Stats().OldestSeq > 1 {
			return false
		}
	}
}

func TestLockedAndModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	must(t, os.MkdirAll(dir, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "lock"), []byte("18446744073709551615\n"), 0o600)) // an older one was longer
	open(t, dir, smallOptions())
	_, _, err := Open(dir, smallOptions())
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Fatalf("second Open: %v", err)
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("%v, %v", info.Mode(), err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 6 {
		t.Fatalf("%d files, %v", len(entries), err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", e.Name(), info.Mode(), err)
		}
	}
	s, err := OpenReadOnly(dir)
	if err != nil || !s.Info().InUse {
		t.Fatalf("read-only view beside the owner: %v", err)
	}
	s.Close()
}

func TestResize(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := smallOptions()
	l, _ := open(t, dir, o)
	last := appendN(t, l, 50)
	l.Close()
	steps := []struct {
		max   int64
		slots int
		want  string
	}{
		{8 * minSegment, 8, ""},
		{3 * minSegment, 2, ""}, // slots and the files beside them
		{2*minSegment - 1, 2, "at least two segments"},
		{2 * minSegment, 2, "it needs two of them"},
		{6 * minSegment, 6, ""},
	}
	for _, s := range steps {
		o.MaxBytes = s.max
		l, rec, err := Open(dir, o)
		if s.want != "" {
			if err == nil || !strings.Contains(err.Error(), s.want) {
				t.Fatalf("maximum %d: %v", s.max, err)
			}
			continue
		}
		if err != nil || rec.LastSeq != last {
			t.Fatalf("maximum %d: %+v, %v", s.max, rec, err)
		}
		check(t, l, 1, last)
		l.Close()
		if n := slotFiles(t, dir); n != s.slots || diskBytes(t, dir) > s.max {
			t.Fatalf("maximum %d: %d slots with %d bytes, want %d slots", s.max, n, diskBytes(t, dir), s.slots)
		}
	}
	// Slots that hold undelivered records stay.
	l, _ = open(t, dir, o)
	for full := false; !full; {
		_, err := appendSeq(l)
		full = errors.Is(err, ErrCeilingExceeded)
	}
	l.Close()
	o.MaxBytes = 3 * minSegment
	if _, _, err := Open(dir, o); err == nil || !strings.Contains(err.Error(), "holds records") {
		t.Fatalf("Open with a maximum below what is undelivered: %v", err)
	}
	if rep, err := Verify(t.Context(), dir); err != nil || rep.First != 1 {
		t.Fatalf("%+v, %v", rep, err)
	}
}

func TestOptions(t *testing.T) {
	once(t)
	dir := filepath.Join(t.TempDir(), "none")
	for want, o := range map[string]Options{
		"segment size is 100":        {SegmentBytes: 100},
		"segment size is 2147483648": {SegmentBytes: 2 << 30},
		"at least two segments":      {SegmentBytes: minSegment, MaxBytes: minSegment},
		"more than 4096 segments":    {SegmentBytes: minSegment, MaxBytes: 1 << 40},
		"keep-free is -1":            {KeepFree: -1},
		"sync interval is -1ns":      {SyncInterval: -1},
	} {
		if _, _, err := Open(dir, o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("refused options made a directory")
	}
}

// Batched mode: nobody waits, the records are durable within the interval.
func TestSyncInterval(t *testing.T) {
	o := testOptions()
	o.SyncInterval = 20 * time.Millisecond
	l, _ := open(t, t.TempDir(), o)
	last := appendN(t, l, 10)
	for deadline := time.Now().Add(5 * time.Second); l.Durable() < last; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("durable is %d, want %d", l.Durable(), last)
		}
	}
}
