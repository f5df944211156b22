package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/wal"
)

// fake is an endpoint in memory. It decodes every request with the official
// types.
type fake struct {
	t *testing.T

	mu       sync.Mutex
	batches  [][]uint64
	held     map[uint64]wal.Class
	content  map[uint64]string // of what was sent, taken or not; nil: not kept
	attempts []time.Time
	answer   func(seqs []uint64) error // nil: take it
}

var errAway = errors.New("away")

func (s *fake) send(_ context.Context, f *frame) (int64, string, time.Duration, error) {
	b, err := io.ReadAll(f.body())
	if err != nil {
		s.t.Error(err)
	}
	var seqs []uint64
	classes := map[uint64]wal.Class{}
	for _, lr := range decode(s.t, b) {
		var seq uint64
		var class wal.Class
		for _, kv := range lr.Attributes {
			switch kv.Key {
			case event.AttrSeq:
				seq = uint64(kv.Value.GetIntValue())
			case event.AttrClass:
				for c := range wal.NumClasses {
					if c.String() == kv.Value.GetStringValue() {
						class = c
					}
				}
			}
		}
		seqs = append(seqs, seq)
		classes[seq] = class
		s.mu.Lock()
		if s.content != nil {
			if was, again := s.content[seq]; again && was != lr.String() {
				s.t.Errorf("record %d was %s, and is %s when it is sent again", seq, was, lr)
			}
			s.content[seq] = lr.String()
		}
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attempts = append(s.attempts, time.Now())
	if s.answer != nil {
		if err := s.answer(seqs); err != nil {
			return 0, "", 0, err
		}
	}
	s.batches = append(s.batches, seqs)
	for seq, c := range classes {
		s.held[seq] = c
	}
	return 0, "", 0, nil
}

func (s *fake) close() error { return nil }

func (s *fake) set(answer func([]uint64) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

func (s *fake) tried() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.attempts)
}

// requests are those that were taken.
func (s *fake) requests() [][]uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.batches)
}

func (s *fake) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.batches = nil
}

func away([]uint64) error { return errAway }

// bench is a log with an exporter to a fake.
type bench struct {
	t    *testing.T
	dir  string
	log  *wal.Log
	sink *fake
	o    Options
	e    *Exporter
	stop func()
}

func newBench(t *testing.T, o Options) *bench {
	b := &bench{t: t, dir: t.TempDir(), sink: &fake{t: t, held: map[uint64]wal.Class{}}, o: o}
	b.o.Endpoint, b.o.Resource, b.o.Logger = "grpc://127.0.0.1:1", testResource, slog.New(slog.DiscardHandler)
	b.o.StateFile = filepath.Join(b.dir, "export.json")
	b.open()
	return b
}

func (b *bench) open() {
	b.t.Helper()
	var err error
	if b.log, _, err = wal.Open(filepath.Join(b.dir, "wal"), wal.Options{SegmentBytes: 256 << 10, MaxBytes: 4 << 20, SyncInterval: time.Millisecond}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) append(classes ...wal.Class) {
	b.t.Helper()
	for _, c := range classes {
		r := otlp.Record{TimeUnixNano: 1, Severity: otlp.Info, EventType: event.Decision, LogID: b.log.ID(), Class: c.String(), Body: []byte(`{"input":{}}`)}
		res, err := b.log.Reserve(c, r.Size())
		if err != nil {
			b.t.Fatal(err)
		}
		r.Put(res.Buf, res.Seq)
		res.Commit()
	}
	if err := b.log.Sync(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
}

// start runs an exporter. It must be stopped before the test ends.
func (b *bench) start() {
	b.t.Helper()
	b.o.Log = b.log
	e, err := New(b.o)
	if err != nil {
		b.t.Fatal(err)
	}
	e.sender.close()
	e.sender = b.sink
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	b.e = e
	b.stop = func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("Run: %v", err)
		}
	}
}

// restart is a new process: log and exporter are opened anew.
func (b *bench) restart() {
	b.t.Helper()
	b.stop()
	if err := b.log.Close(); err != nil {
		b.t.Fatal(err)
	}
	b.open()
	b.start()
}

func (b *bench) end() {
	b.stop()
	if err := b.log.Close(); err != nil {
		b.t.Error(err)
	}
}

// until waits for ok, in the bubble's time, at most an hour of it.
func (b *bench) until(what string, ok func() bool) {
	b.t.Helper()
	for range 360_000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	b.t.Fatalf("not in time: %s; %+v", what, b.e.Status())
}

// truthful fails when a cursor is ahead of what the endpoint holds.
func (b *bench) truthful(classes map[uint64]wal.Class) {
	b.t.Helper()
	b.sink.mu.Lock()
	defer b.sink.mu.Unlock()
	for seq, c := range classes {
		if _, held := b.sink.held[seq]; !held && seq <= b.log.Cursor(c) {
			b.t.Errorf("the %v cursor stands at %d, but record %d was never taken", c, b.log.Cursor(c), seq)
		}
	}
}

// mixed is a backlog of n records in the proportions of a node's life.
func mixed(n int) (list []wal.Class, bySeq map[uint64]wal.Class) {
	bySeq = map[uint64]wal.Class{}
	for i := range n {
		c := []wal.Class{wal.ClassDecision, wal.ClassAction}[i%2]
		switch {
		case i%17 == 5:
			c = wal.ClassLifecycle
		case i%23 == 7:
			c = wal.ClassError
		}
		list = append(list, c)
		bySeq[uint64(i+1)] = c
	}
	return list, bySeq
}

// TestUrgentFirst: after an outage errors come first, then decisions, then the
// rest, each in order, once.
func TestUrgentFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Options{BatchRecords: 10})
		list, bySeq := mixed(300)
		b.sink.set(away)
		b.append(list...)
		b.start()
		b.until("three attempts", func() bool { return b.sink.tried() >= 3 })
		b.truthful(bySeq)
		b.sink.set(nil)
		b.until("delivered", func() bool { return b.e.Status().Delivered == 300 })
		rank := []int{0, 1, 2, 2}
		was, last, n := 0, uint64(0), 0
		for _, batch := range b.sink.requests() {
			for _, seq := range batch {
				r := rank[bySeq[seq]]
				if r != was {
					if r < was {
						t.Fatalf("record %d, %v, came after less urgent ones", seq, bySeq[seq])
					}
					was, last = r, 0
				}
				if seq <= last {
					t.Fatalf("record %d after %d of the same kind", seq, last)
				}
				last = seq
				n++
			}
		}
		if n != 300 || len(b.sink.held) != 300 {
			t.Errorf("%d records sent, %d different, want 300", n, len(b.sink.held))
		}
		for c := range wal.NumClasses {
			if b.log.Cursor(c) != 300 {
				t.Errorf("the %v cursor stands at %d", c, b.log.Cursor(c))
			}
		}
		// In order again, and an error is in the next request.
		b.append(wal.ClassAction, wal.ClassError)
		b.until("delivered", func() bool { return b.e.Status().Delivered == 302 })
		all := b.sink.requests()
		if last := all[len(all)-1]; last[len(last)-1] != 302 {
			t.Errorf("last batch %v", last)
		}
		b.end()
	})
}

// TestErrorOvertakes: an error that comes while a backlog is sent waits for one
// request, and one that comes while a batch is retried waits for none.
func TestErrorOvertakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Options{BatchRecords: 10})
		var list []wal.Class
		for range 200 {
			list = append(list, wal.ClassDecision)
		}
		b.append(list...)
		n := 0
		b.sink.set(func([]uint64) error {
			if n++; n > 5 {
				return errAway
			}
			return nil
		})
		b.start()
		b.until("an outage in the middle", func() bool { return b.sink.tried() >= 8 })
		b.append(wal.ClassError)
		b.sink.set(nil)
		b.until("delivered", func() bool { return b.e.Status().Delivered == 201 })
		for i, batch := range b.sink.requests() {
			if batch[0] == 201 && i != 5 {
				t.Errorf("the error was in request %d, want 6", i+1)
			}
		}
		b.end()
	})
}

// TestCatchUpRestarts: endings, at any point of a catch-up with an endpoint that
// comes and goes, lose nothing and leave no cursor ahead of what was taken.
func TestCatchUpRestarts(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rng := rand.New(rand.NewPCG(seed, 1))
				b := newBench(t, Options{BatchRecords: 7, BatchBytes: 2000})
				list, bySeq := mixed(250)
				b.append(list[:200]...)
				b.sink.set(func([]uint64) error {
					if rng.IntN(3) == 0 {
						return errAway
					}
					return nil
				})
				b.start()
				for range 6 {
					stop := b.sink.tried() + rng.IntN(12)
					b.until("more attempts", func() bool { return b.sink.tried() >= stop || b.e.Status().Pending == 0 })
					b.restart()
					b.truthful(bySeq)
				}
				b.append(list[200:]...)
				b.until("delivered", func() bool { return b.e.Status().Delivered == 250 })
				b.truthful(bySeq)
				if len(b.sink.held) != 250 {
					t.Errorf("%d records taken, want 250", len(b.sink.held))
				}
				b.end()
			})
		})
	}
}

// TestBackoffAndExhaustion: waits double to the cap, neither a restart nor
// another start in mid-backoff resets count or wait, the end is final until
// Resume, also across restarts and a long time, and nothing is lost.
func TestBackoffAndExhaustion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told atomic.Int32
		b := newBench(t, Options{MinBackoff: time.Second, MaxBackoff: 8 * time.Second, MaxAttempts: 9,
			OnExhausted: func(string) { told.Add(1) }})
		b.append(wal.ClassDecision, wal.ClassAction)
		b.sink.set(away)
		b.start()
		b.until("four attempts", func() bool { return b.sink.tried() >= 4 })
		for range 5 { // in the middle of the fourth wait, over and over
			time.Sleep(time.Second)
			b.restart()
		}
		if n := b.sink.tried(); n != 4 {
			t.Fatalf("%d attempts, want 4: a restart shortened the wait", n)
		}
		b.until("exhaustion", func() bool { return b.e.Status().State == Exhausted })
		if n := b.sink.tried(); n != 9 {
			t.Errorf("%d attempts, want 9", n)
		}
		for i := 1; i < len(b.sink.attempts); i++ {
			d := b.sink.attempts[i].Sub(b.sink.attempts[i-1])
			want := min(time.Second<<(i-1), 8*time.Second)
			if d < want || d > want+want/10+time.Second/10 {
				t.Errorf("attempt %d came %s after the one before, want %s and at most a tenth more", i+1, d, want)
			}
		}
		b.sink.set(nil) // it is back, and nobody has said so
		time.Sleep(30 * 24 * time.Hour)
		b.restart()
		time.Sleep(time.Hour)
		b.append(wal.ClassError) // the log takes records all the while
		time.Sleep(time.Hour)
		if st := b.e.Status(); st.State != Exhausted || st.Pending != 3 || st.Attempts != 9 || !strings.Contains(st.Exhausted, "9 attempts") {
			t.Errorf("%+v", st)
		}
		if n := b.sink.tried(); n != 9 {
			t.Errorf("%d attempts after exhaustion, want 9", n)
		}
		if n := told.Load(); n != 2 { // by either process
			t.Errorf("OnExhausted was called %d times, want 2", n)
		}
		if err := b.e.Resume(); err != nil {
			t.Fatal(err)
		}
		b.until("delivered", func() bool { return b.e.Status().Delivered == 3 })
		if st := b.e.Status(); st.State != Delivering || st.Attempts != 0 || st.Exhausted != "" || len(b.sink.held) != 3 {
			t.Errorf("%+v", st)
		}
		b.end()
		if s, err := readState(b.o.StateFile); err != nil || s.Attempts != 0 || s.FirstSeq != 0 {
			t.Errorf("state %+v, %v", s, err)
		}
	})
}

// TestFlapping: an endpoint that takes some batches and never the oldest does
// not reset that one's count.
func TestFlapping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Options{MinBackoff: time.Second, MaxBackoff: time.Second, MaxAttempts: 6, BatchRecords: 2})
		b.append(wal.ClassAction, wal.ClassAction, wal.ClassAction)
		b.sink.set(func(seqs []uint64) error {
			if seqs[0] == 1 {
				return errAway
			}
			return nil
		})
		b.start()
		for i := range 20 {
			b.append(wal.ClassError)
			time.Sleep(2 * time.Second)
			if b.e.Status().State == Exhausted {
				break
			}
			if i == 19 {
				t.Fatalf("not exhausted: %+v", b.e.Status())
			}
		}
		if n := b.e.Status().Attempts; n != 6 {
			t.Errorf("%d attempts", n)
		}
		if len(b.sink.held) == 0 {
			t.Error("no error was taken")
		}
		if c := b.log.Cursor(wal.ClassAction); c != 0 {
			t.Errorf("the action cursor moved to %d", c)
		}
		b.end()
	})
}

// TestCrashLoop: attempts of processes that die in them are counted.
func TestCrashLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Options{MinBackoff: time.Second, MaxBackoff: time.Second, MaxAttempts: 4})
		b.append(wal.ClassAction)
		seen := 0
		b.sink.set(func([]uint64) error {
			s, err := readState(b.o.StateFile)
			if seen++; err != nil || s.Attempts != seen {
				t.Errorf("attempt %d: the file says %+v, %v", seen, s, err)
			}
			return errAway
		})
		b.start()
		b.until("exhaustion", func() bool { return b.e.Status().State == Exhausted })
		b.end()
		if seen != 4 {
			t.Errorf("%d attempts", seen)
		}
	})
}

// TestStateFile: what cannot be read does not begin the count anew, and what is
// of another log or endpoint does.
func TestStateFile(t *testing.T) {
	whole := `{"schema":"autonomy.export-state/v0","log_id":"LOG","endpoint":"ENDPOINT","first_seq":1,"attempts":3,"not_until_unix_ns":0,"watermark":0,"resends":0}`
	for name, c := range map[string]struct {
		data string
		want string // of Status.Exhausted
	}{
		"spent":          {whole, "3 attempts"},
		"another log":    {strings.Replace(whole, "LOG", "0000000000000000", 1), ""},
		"another target": {strings.Replace(whole, "ENDPOINT", "grpc://127.0.0.1:2", 1), ""},
		"empty":          {"", "not known"},
		"truncated":      {whole[:len(whole)/2], "not known"},
		"trailing":       {whole + "{}", "not known"},
		"unknown key":    {strings.Replace(whole, `"resends"`, `"resend"`, 1), "not known"},
		"duplicate key":  {strings.Replace(whole, `"resends"`, `"attempts"`, 1), "not known"},
		"wrong type":     {strings.Replace(whole, `:3,`, `:"3",`, 1), "not known"},
		"invalid UTF-8":  {strings.Replace(whole, "LOG", "\xff", 1), "not known"},
		"wrong schema":   {strings.Replace(whole, "/v0", "/v9", 1), "do not fit together"},
		"negative":       {strings.Replace(whole, ":3,", ":-3,", 1), "do not fit together"},
		"oversized":      {whole + strings.Repeat(" ", maxStateFile), "not known"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, Options{MaxAttempts: 3})
				b.append(wal.ClassAction)
				data := strings.NewReplacer("LOG", b.log.ID(), "ENDPOINT", b.o.Endpoint).Replace(c.data)
				if err := os.WriteFile(b.o.StateFile, []byte(data), 0o600); err != nil {
					t.Fatal(err)
				}
				b.start()
				time.Sleep(time.Hour)
				if why := b.e.Status().Exhausted; c.want == "" && why != "" || !strings.Contains(why, c.want) {
					t.Errorf("exhausted: %q, want %q", why, c.want)
				}
				if c.want != "" {
					if have, _ := os.ReadFile(b.o.StateFile); string(have) != data {
						t.Errorf("the file was changed to %q", have)
					}
					if b.sink.tried() != 0 {
						t.Error("something was sent")
					}
					if err := b.e.Resume(); err != nil {
						t.Fatal(err)
					}
				}
				b.until("delivered", func() bool { return b.e.Status().Delivered == 1 })
				b.end()
			})
		})
	}
}

// TestClock: a wait in the file from a clock that ran ahead is cut to the longest.
func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Options{MaxBackoff: 10 * time.Second})
		b.append(wal.ClassAction)
		s := state{Schema: stateSchema, LogID: b.log.ID(), Endpoint: b.o.Endpoint, FirstSeq: 1, Attempts: 2, NotUntil: time.Now().Add(1000 * time.Hour).UnixNano()}
		if err := writeState(b.o.StateFile, s); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		b.start()
		b.until("delivered", func() bool { return b.e.Status().Delivered == 1 })
		if d := time.Since(begin); d < 10*time.Second || d > 12*time.Second {
			t.Errorf("waited %s, want the longest backoff of 10s", d)
		}
		b.end()
	})
}

// TestStateBehind: a count whose batch was delivered, the end of which could not
// be written, is over.
func TestStateBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Options{MaxAttempts: 3})
		b.append(wal.ClassAction, wal.ClassAction)
		if err := b.log.AdvanceAll(1); err != nil {
			t.Fatal(err)
		}
		if err := writeState(b.o.StateFile, state{Schema: stateSchema, LogID: b.log.ID(), Endpoint: b.o.Endpoint, FirstSeq: 1, Attempts: 3}); err != nil {
			t.Fatal(err)
		}
		b.start()
		b.until("delivered", func() bool { return b.e.Status().Delivered == 2 })
		b.end()
	})
}

// TestStateUnwritable: where attempts cannot be counted on disk they are counted
// in memory, and Resume says that it could not be kept.
func TestStateUnwritable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Options{MinBackoff: time.Second, MaxBackoff: time.Second, MaxAttempts: 3})
		b.o.StateFile = filepath.Join(b.dir, "gone", "export.json")
		b.append(wal.ClassAction)
		b.sink.set(away)
		b.start()
		b.until("exhaustion", func() bool { return b.e.Status().State == Exhausted })
		if n := b.sink.tried(); n != 3 {
			t.Errorf("%d attempts, want 3", n)
		}
		if err := b.e.Resume(); err == nil || !strings.Contains(err.Error(), "resume export") {
			t.Errorf("Resume: %v", err)
		}
		time.Sleep(time.Hour)
		if n := b.sink.tried(); n != 3 {
			t.Errorf("%d attempts after a Resume that failed, want 3", n)
		}
		b.end()
	})
}

func TestAttemptsFor(t *testing.T) {
	for _, c := range []struct{ outage, lo, hi time.Duration }{
		{24 * time.Hour, DefaultMinBackoff, DefaultMaxBackoff}, {time.Minute, time.Second, time.Hour}, {7 * 24 * time.Hour, time.Second, time.Minute}, {time.Second, time.Second, time.Second},
	} {
		e := &Exporter{o: Options{MinBackoff: c.lo, MaxBackoff: c.hi}}
		n := AttemptsFor(c.outage, c.lo, c.hi)
		sum := time.Duration(0)
		for i := 1; i < n; i++ { // the waits between the first attempt and the last
			sum += e.backoff(i)
		}
		if sum < c.outage || sum-e.backoff(n-1)-e.backoff(n-2) > c.outage {
			t.Errorf("%v: %d attempts wait %s", c, n, sum)
		}
	}
}
