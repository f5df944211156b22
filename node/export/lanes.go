package export

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/wal"
)

// lane is what is sent in order among itself. Lanes are only told apart while
// more than one batch is behind.
type lane struct {
	classes []wal.Class
	next    uint64 // its records before this one are delivered
	reader  *wal.Reader
	at      uint64 // where reader stands
}

// newLanes are the lanes, most urgent first, as the log's cursors leave them.
func newLanes(l *wal.Log) []lane {
	lanes := []lane{
		{classes: []wal.Class{wal.ClassError}},
		{classes: []wal.Class{wal.ClassDecision}},
		{classes: []wal.Class{wal.ClassAction, wal.ClassLifecycle}},
	}
	for i := range lanes {
		lanes[i].next = l.Cursor(lanes[i].classes[0]) + 1
		for _, c := range lanes[i].classes {
			lanes[i].next = min(lanes[i].next, l.Cursor(c)+1)
		}
	}
	return lanes
}

// chunk is what one request takes. The last release frees what it views.
type chunk struct {
	items []item
	bytes int    // of payloads
	end   uint64 // the scan is done up to here
	hold  *hold
}

func (c *chunk) has(seq uint64) bool {
	_, ok := slices.BinarySearchFunc(c.items, seq, func(it item, seq uint64) int {
		switch {
		case it.seq < seq:
			return -1
		case it.seq > seq:
			return 1
		}
		return 0
	})
	return ok
}

func (c *chunk) release() { c.hold.unref() }

// collect gathers records of the classes, nil: of all, from l.next on, until a
// request is full or what stands up to target has been seen. When the log holds
// nothing at l.next yet it waits for it. It releases nothing on success: the
// caller does.
func (e *Exporter) collect(ctx context.Context, l *lane, classes []wal.Class, target uint64) (*chunk, error) {
	c := &e.chunk
	c.items, c.bytes, c.end, c.hold = c.items[:0], 0, l.next-1, newHold()
	if l.reader == nil || l.at != l.next {
		l.reader, l.at = e.o.Log.Reader(l.next), l.next
	}
	for {
		b, err := l.reader.Next(ctx, e.o.BatchRecords, e.o.BatchBytes)
		if err != nil {
			l.reader = nil
			c.release()
			return nil, err
		}
		used, full := false, false
		for i := range b.Records {
			rec := &b.Records[i]
			switch wanted := classes == nil || slices.Contains(classes, rec.Class) && rec.End() > e.o.Log.Cursor(rec.Class); {
			case wanted && rec.Lost > 0:
				if full, err = e.lost(c, *rec); err != nil {
					b.Release()
					l.reader = nil
					c.release()
					return nil, err
				}
			case wanted:
				payload := rec.Payload
				if rec.Void {
					payload = e.void(*rec)
				}
				if full = len(c.items) == e.o.BatchRecords || len(c.items) > 0 && c.bytes+len(payload) > e.o.BatchBytes; full {
					break
				}
				c.items = append(c.items, item{seq: rec.Seq, payload: payload})
				c.bytes += len(payload)
				used = used || !rec.Void
			}
			if full {
				break
			}
			c.end = rec.End()
		}
		if used {
			c.hold.batches = append(c.hold.batches, b)
		} else {
			b.Release()
		}
		if full {
			l.reader = nil // it stands beyond end
			return c, nil
		}
		l.at = c.end + 1
		if len(c.items) == e.o.BatchRecords || c.bytes >= e.o.BatchBytes || c.end >= target {
			return c, nil
		}
	}
}

// lost stands in for records that a repair found gone, one for each of them: the
// receiver must see every sequence number. They are as many as fit c; full says
// that there are more, which the next chunk begins with. All of them tell of the
// whole loss, so that a repeat is the same event wherever it begins.
func (e *Exporter) lost(c *chunk, gone wal.Record) (full bool, err error) {
	first, last, found, err := e.o.Log.LossAt(gone.Seq)
	if err != nil {
		return false, err
	}
	r := otlp.Record{TimeUnixNano: uint64(max(found.UnixNano(), 1)), Severity: otlp.Error, EventType: event.LogLost, LogID: e.o.Log.ID(),
		Class: gone.Class.String(), Body: fmt.Appendf(nil, `{"first":%d,"last":%d}`, first, last)}
	size := r.Size()
	for seq := gone.Seq; seq <= gone.End(); seq++ {
		if len(c.items) == e.o.BatchRecords || len(c.items) > 0 && c.bytes+size > e.o.BatchBytes {
			return true, nil
		}
		b := make([]byte, size)
		r.Put(b, seq)
		c.items = append(c.items, item{seq: seq, payload: b})
		c.bytes += size
		c.end = seq
	}
	return false, nil
}

// void stands in for a record that was cut off while it was written: the
// receiver must see every sequence number, or it waits for it for ever. Its time
// is that of the record before it, so that a repeat is the same event.
func (e *Exporter) void(v wal.Record) []byte {
	r := otlp.Record{TimeUnixNano: 1, Severity: otlp.Info, EventType: event.LogVoid, LogID: e.o.Log.ID(), Class: v.Class.String(), Body: []byte("{}")}
	for seq := v.Seq - 1; seq > 0; seq-- {
		payload, _, err := e.o.Log.Get(seq)
		if err != nil && errors.Is(err, wal.ErrNotFound) && seq > e.o.Log.Stats().OldestSeq {
			if first, _, _, err := e.o.Log.LossAt(seq); err == nil {
				seq = first
			}
			continue // void, too
		}
		if before, perr := otlp.Parse(payload); err == nil && perr == nil {
			r.TimeUnixNano = before.TimeUnixNano
		}
		break
	}
	b := make([]byte, r.Size())
	r.Put(b, v.Seq)
	return b
}

// refused stands in for a record that the endpoint refuses for ever: its number,
// time and class, why, and how large it was. The record itself stays in the log.
func (e *Exporter) refused(it item, why error) item {
	r := otlp.Record{TimeUnixNano: 1, Severity: otlp.Error, EventType: event.LogRefused, LogID: e.o.Log.ID()}
	if rec, err := otlp.Parse(it.payload); err == nil {
		r.TimeUnixNano, r.Class, r.AuditID = rec.TimeUnixNano, rec.Class, rec.AuditID
	}
	text := why.Error()
	if len(text) > maxRefusalText {
		text = text[:maxRefusalText]
	}
	r.Body = append(strictjson.AppendString(append(strconv.AppendInt([]byte(`{"bytes":`), int64(len(it.payload)), 10), `,"why":`...), text), '}')
	b := make([]byte, r.Size())
	r.Put(b, it.seq)
	return item{seq: it.seq, payload: b, standIn: true}
}

// maxRefusalText bounds an endpoint's reason in a stand-in, in bytes.
const maxRefusalText = 512

// together reports whether all lanes stand at the same record.
func (e *Exporter) together() bool {
	for i := range e.lanes {
		if e.lanes[i].next != e.lanes[0].next {
			return false
		}
	}
	return true
}

// delivered is the record up to which all lanes have been delivered.
func (e *Exporter) delivered() uint64 {
	n := e.lanes[0].next
	for i := range e.lanes {
		n = min(n, e.lanes[i].next)
	}
	return n - 1
}

// moved notes that everything up to end is delivered, in all lanes.
func (e *Exporter) moved(end uint64) error {
	for i := range e.lanes {
		e.lanes[i].next = max(e.lanes[i].next, end+1)
	}
	if err := e.o.Log.AdvanceAll(end); err != nil {
		return fmt.Errorf("move the cursors to %d: %w", end, err)
	}
	e.noteDelivered()
	return nil
}

// inOrder sends the next batch in the log's order. It waits for its first
// record, until it is time to look at the watermark; not at all when busy.
// behind is true when there is more than that batch, and nothing was sent.
func (e *Exporter) inOrder(ctx context.Context, busy bool) (behind bool, err error) {
	l := &e.lanes[0]
	if busy && l.next > e.o.Log.Durable() {
		return false, nil
	}
	target := e.o.Log.Durable()
	tick, cancel := context.WithTimeout(ctx, e.resendTick())
	c, err := e.collect(tick, l, nil, target)
	cancel()
	if errors.Is(err, context.DeadlineExceeded) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer c.release()
	if c.end < target { // what came meanwhile does not count
		return true, nil
	}
	if ok, err := e.attempt(ctx, c); err != nil || !ok {
		return false, err
	}
	return false, e.moved(c.end)
}

// byUrgency makes one round: all errors that are durable now, then at most one
// batch of decisions, and, when those have none left, at most one of the rest.
// So an error never waits for more than one request, and decisions that keep
// coming do not keep the rest back. It ends early when an attempt fails.
func (e *Exporter) byUrgency(ctx context.Context) error {
	target := e.o.Log.Durable()
	for i := range e.lanes {
		l := &e.lanes[i]
		for l.next <= target {
			ok, err := e.advanceLane(ctx, l, target)
			if err != nil || !ok {
				return err
			}
			if i > 0 {
				break
			}
		}
		if l.next <= target {
			return nil
		}
	}
	return e.moved(target) // all of them are past it
}

func (e *Exporter) advanceLane(ctx context.Context, l *lane, target uint64) (ok bool, err error) {
	c, err := e.collect(ctx, l, l.classes, target)
	if err != nil {
		return false, err
	}
	defer c.release()
	if len(c.items) > 0 {
		if ok, err := e.attempt(ctx, c); err != nil || !ok {
			return false, err
		}
	}
	l.next = c.end + 1
	if len(c.items) > 0 {
		for _, class := range l.classes {
			if err := e.o.Log.Advance(class, c.end); err != nil {
				return false, fmt.Errorf("move the %v cursor to %d: %w", class, c.end, err)
			}
		}
	}
	e.noteDelivered()
	return true, nil
}

func (e *Exporter) noteDelivered() {
	d := e.delivered()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.status.Delivered = d
}

// attempt makes one attempt to deliver c, and reports whether c is done with:
// taken, or refused for ever. Its error is one of the log.
func (e *Exporter) attempt(ctx context.Context, c *chunk) (bool, error) {
	first := c.items[0].seq
	e.begin(first)
	wait, err := e.deliver(ctx, c.items, c.hold)
	if err == nil {
		e.succeeded(c)
		return true, nil
	}
	if errors.Is(err, errFault) {
		return false, err
	}
	if ctx.Err() == nil {
		e.failedAttempt(first, wait, err)
	}
	return false, nil
}

// deliver sends items once. Records that are refused for ever are found by
// halving, and the rest is sent: it is at most twice as many requests as records.
func (e *Exporter) deliver(ctx context.Context, items []item, h *hold) (wait time.Duration, err error) {
	f, err := guardedFrame(e.framer, items, h, viewFrom)
	if err != nil {
		return 0, err
	}
	sctx, cancel := context.WithTimeout(ctx, e.o.Timeout)
	rejected, why, wait, err := e.sender.send(sctx, f)
	cancel()
	f.unref()
	if errors.Is(err, errPermanent) {
		if half := len(items) / 2; half > 0 {
			if wait, err := e.deliver(ctx, items[:half], h); err != nil {
				return wait, err
			}
			return e.deliver(ctx, items[half:], h)
		}
		if items[0].standIn {
			return 0, nil // nothing of this record is taken: it was counted
		}
		// The receiver must see its number all the same, or it waits for it for
		// ever, and a log that is trimmed by its watermark fills up.
		if wait, err := e.deliver(ctx, []item{e.refused(items[0], err)}, nil); err != nil {
			return wait, err
		}
		rejected, why, err = 1, err.Error(), nil
	}
	if err != nil {
		return wait, err
	}
	rejected = min(max(rejected, 0), int64(len(items)))
	if rejected > 0 {
		first, last := items[0].seq, items[len(items)-1].seq
		e.o.Logger.Error("the export endpoint refused records for ever", "first_seq", first, "last_seq", last, "count", rejected, "why", why)
		e.o.OnRejected(first, last, rejected, why)
	}
	e.sent.Add(len(items) - int(rejected))
	e.rejected.Add(int(rejected))
	e.mu.Lock()
	e.status.Rejected += rejected
	e.mu.Unlock()
	return 0, nil
}
