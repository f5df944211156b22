package export

import (
	"context"
	"errors"
	"time"
)

// resend is a pass over records that were delivered and that the control plane
// does not hold. It belongs to Run.
type resend struct {
	mark  uint64    // the watermark when since was set
	since time.Time // since when it stands behind what is delivered; zero: it does not
	next  uint64    // of the pass; 0: none runs
	end   uint64
	lane  lane
}

// SetWatermark tells up to which record the control plane holds everything
// durably. A smaller seq than before changes nothing. It may be called from any
// goroutine.
func (e *Exporter) SetWatermark(seq uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.marked || seq > e.watermark {
		e.marked, e.watermark = true, seq
	}
}

// resendTick is how often Run looks at the watermark while nothing is to be
// sent.
func (e *Exporter) resendTick() time.Duration { return max(e.o.ResendAfter/8, time.Millisecond) }

// maxResendInterval caps the time between passes.
const maxResendInterval = time.Hour

// resendInterval is the time before the pass after that many.
func (e *Exporter) resendInterval(passes int) time.Duration {
	d := e.o.ResendAfter
	for ; passes > 0 && d < maxResendInterval; passes-- {
		d *= 2
	}
	return min(d, max(maxResendInterval, e.o.ResendAfter))
}

// again sends one batch of a pass, when one is due. busy is true when the pass
// has more to send.
func (e *Exporter) again(ctx context.Context) (busy bool, err error) {
	r := &e.re
	delivered := e.delivered()
	e.mu.Lock()
	known, mark := e.marked, e.watermark
	if known && mark > e.led.Watermark { // progress; before it, passes are counted across restarts
		e.led.Watermark, e.led.Resends = mark, 0
		e.status.Resends, e.status.NotHeld = 0, ""
	}
	passes := e.led.Resends
	e.mu.Unlock()
	now := time.Now()
	if !known || mark >= delivered {
		r.since, r.next = time.Time{}, 0
		return false, nil
	}
	if r.since.IsZero() || mark != r.mark {
		r.mark, r.since = mark, now
	}
	if r.next == 0 {
		if passes >= e.o.MaxResends {
			e.mu.Lock()
			e.status.NotHeld = notHeld
			e.mu.Unlock()
			return false, nil
		}
		if now.Sub(r.since) < e.resendInterval(passes) {
			return false, nil
		}
		r.next, r.end = mark+1, delivered
		e.mu.Lock()
		e.led.Resends++
		e.status.Resends = e.led.Resends
		err := e.save()
		e.mu.Unlock()
		e.o.Logger.Warn("the control plane does not hold records that the export endpoint took: sending them again",
			"first_seq", r.next, "last_seq", r.end, "pass", passes+1, "of", e.o.MaxResends)
		if err != nil {
			e.o.Logger.Error("a pass of sending again could not be counted on disk", "err", err)
		}
	}
	r.lane.next = max(r.next, mark+1)
	if r.lane.next > r.end {
		r.next, r.since = 0, now
		return false, nil
	}
	c, err := e.collect(ctx, &r.lane, nil, r.end)
	if err != nil {
		return false, err
	}
	defer c.release()
	if _, err := e.deliver(ctx, c.items, c.hold); errors.Is(err, errFault) {
		return false, err
	} else if err != nil {
		// The outage is the main stream's to retry; this pass is spent.
		r.next, r.since = 0, now
		e.failed.Inc()
		return false, nil
	}
	e.resent.Add(len(c.items))
	if r.next = c.end + 1; r.next > r.end {
		r.next, r.since = 0, now
	}
	return r.next != 0, nil
}

const notHeld = "the export endpoint took records that the control plane does not hold, also after they were sent again: see what lies between them, then resume delivery"
