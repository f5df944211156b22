package export

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/autonomyops/autonomy/wal"
)

// TestResend: what a collector took and lost is sent again from the control
// plane's watermark, in passes that are bounded and counted across restarts.
func TestResend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Options{BatchRecords: 10, ResendAfter: time.Minute, MaxResends: 3})
		list, _ := mixed(40)
		b.start()
		b.append(list...)
		b.until("delivered", func() bool { return b.e.Status().Delivered == 40 })
		b.sink.forget()
		b.e.SetWatermark(15)
		time.Sleep(50 * time.Second)
		if len(b.sink.requests()) != 0 {
			t.Fatalf("sent again before its time: %v", b.sink.requests())
		}
		begin := time.Now()
		b.until("a pass", func() bool { return len(b.sink.requests()) == 3 })
		if got := slices.Concat(b.sink.requests()...); len(got) != 25 || got[0] != 16 || got[24] != 40 {
			t.Errorf("sent again: %v, want 16 to 40", got)
		}
		if d := time.Since(begin); d > 20*time.Second {
			t.Errorf("the pass came %s late", d)
		}
		// The next comes after twice the time, also in another process.
		b.restart()
		b.e.SetWatermark(15)
		time.Sleep(100 * time.Second)
		if len(b.sink.requests()) != 3 {
			t.Errorf("%d requests, want 3: a restart shortened the wait", len(b.sink.requests()))
		}
		b.until("the third pass", func() bool { return len(b.sink.requests()) == 9 })
		time.Sleep(24 * time.Hour)
		if n := len(b.sink.requests()); n != 9 {
			t.Errorf("%d requests, want 9: there are three passes", n)
		}
		if st := b.e.Status(); st.NotHeld == "" || st.Resends != 3 || st.Watermark != 15 || st.State == Exhausted {
			t.Errorf("%+v", st)
		}
		// New records are not kept back by it.
		b.append(wal.ClassError)
		b.until("delivered", func() bool { return b.e.Status().Delivered == 41 })
		// Progress of the watermark begins it anew; being level ends it.
		b.e.SetWatermark(30)
		b.sink.forget()
		b.until("a pass from 31", func() bool { return len(b.sink.requests()) == 2 })
		if st := b.e.Status(); st.NotHeld != "" || st.Resends != 1 || b.sink.requests()[0][0] != 31 {
			t.Errorf("%+v %v", st, b.sink.requests())
		}
		b.e.SetWatermark(41)
		time.Sleep(24 * time.Hour)
		if n := len(b.sink.requests()); n != 2 {
			t.Errorf("%d requests, want 2: the control plane holds everything", n)
		}
		b.end()
	})
}

// TestNoResend: a watermark that moves, however late it is, is left in peace.
func TestNoResend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Options{ResendAfter: time.Minute})
		list, _ := mixed(100)
		b.append(list...)
		b.start()
		for i := range 100 {
			b.e.SetWatermark(uint64(i))
			time.Sleep(50 * time.Second)
		}
		if n := len(b.sink.requests()); n != 1 {
			t.Errorf("%d requests, want 1", n)
		}
		b.end()
	})
}

// TestResendOutage: an endpoint that is away ends the pass, not the main stream.
func TestResendOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Options{ResendAfter: time.Minute, MaxResends: 2})
		b.append(wal.ClassDecision)
		b.start()
		b.until("delivered", func() bool { return b.e.Status().Delivered == 1 })
		b.sink.set(away)
		b.e.SetWatermark(0)
		time.Sleep(24 * time.Hour)
		if n := b.sink.tried(); n != 3 {
			t.Errorf("%d attempts, want 3: one delivery and two passes", n)
		}
		if st := b.e.Status(); st.State != Delivering || st.NotHeld == "" {
			t.Errorf("%+v", st)
		}
		b.end()
	})
}
