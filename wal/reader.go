package wal

import (
	"context"
	"fmt"
	"sort"
)

// Record is one record of the log.
type Record struct {
	Seq     uint64
	Class   Class
	Void    bool   // aborted by its writer: the sequence number is used, Payload is nil
	Payload []byte // in a Batch or Snapshot a view: valid until Release or Close
}

// Batch is records that stand one after the other in one mapping.
type Batch struct {
	Records []Record
	l       *Log
	s       *slot
}

// Release gives the views up. It must be called once per Batch, also when
// Records is not used.
func (b Batch) Release() {
	if b.l != nil {
		b.l.unpin(b.s)
	}
}

// Reader reads durable records in order. It belongs to one goroutine at a time.
type Reader struct {
	l    *Log
	next uint64
	at   pos // where next stands; off 0: look it up
}

// Reader starts at the record from. When that is no longer in the log, it
// starts at the oldest one.
func (l *Log) Reader(from uint64) *Reader { return &Reader{l: l, next: max(from, 1)} }

// Next waits until something is durable and returns at most maxRecords records
// of together at most maxBytes, but at least one. Void records are among them:
// a consumer that accounts for sequence numbers must see them. Errors: the
// context's, ErrClosed, ErrFailed (nothing more will come), ErrDamaged (a
// record changed on disk since it was written).
func (r *Reader) Next(ctx context.Context, maxRecords, maxBytes int) (Batch, error) {
	l := r.l
	for {
		if err := ctx.Err(); err != nil {
			return Batch{}, err
		}
		l.mu.Lock()
		if l.closed {
			l.mu.Unlock()
			return Batch{}, ErrClosed
		}
		durable := l.durable.Load()
		if r.next > durable {
			if l.failed != nil {
				l.mu.Unlock()
				return Batch{}, l.failed
			}
			g := l.open
			if l.closing != nil && r.next <= l.closing.last {
				g = l.closing
			}
			l.mu.Unlock()
			select {
			case <-g.done:
			case <-ctx.Done():
			}
			continue
		}
		if oldest := l.live[0].first; r.next < oldest {
			r.next, r.at = oldest, pos{}
		}
		seg, off := l.find(r.next)
		if seg.id == r.at.id && r.at.off != 0 {
			off = r.at.off
		}
		seg.refs++
		end := seg.end()
		l.mu.Unlock()
		b, err := r.read(seg, off, end, durable, maxRecords, maxBytes)
		if err != nil {
			l.unpin(seg.slot)
			return Batch{}, err
		}
		return b, nil
	}
}

func (r *Reader) read(seg *segment, off, end int64, durable uint64, maxRecords, maxBytes int) (Batch, error) {
	b := Batch{l: r.l, s: seg.slot}
	next, bytes := r.next, 0
	var fault error
	err := guard(func() {
		for next <= durable && (len(b.Records) == 0 || len(b.Records) < maxRecords) {
			f, ok := seg.record(&off, end, next)
			if !ok {
				// The rest of what is durable stands in the next segment.
				if len(b.Records) == 0 {
					fault = r.l.corrupt(seg, off, next)
				}
				return
			}
			if bytes += len(f.payload); bytes > maxBytes && len(b.Records) > 0 {
				return
			}
			if b.Records == nil {
				b.Records = make([]Record, 0, min(max(maxRecords, 1), int(durable-next)+1, 1024))
			}
			rec := Record{Seq: f.seq, Class: f.class(), Void: f.void(), Payload: f.payload}
			if rec.Void {
				rec.Payload = nil
			}
			b.Records = append(b.Records, rec)
			off += f.size
			next++
		}
	})
	if err == nil {
		err = fault
	}
	if err != nil {
		return Batch{}, fmt.Errorf("read record %d: %w", next, err)
	}
	r.next, r.at = next, pos{seg.id, off}
	return b, nil
}

// end is where frames of s end for readers. mu is held.
func (s *segment) end() int64 {
	if s.limit != 0 {
		return s.limit
	}
	return int64(len(s.m))
}

// record reads the record seq, which stands at *off or a little after it.
func (s *segment) record(off *int64, end int64, seq uint64) (frame, bool) {
	for {
		f, ok := parseFrame(s.m, keyAt(s.keys, *off), *off, end)
		if !ok || !f.marker() && f.seq >= seq {
			return f, ok && f.seq == seq
		}
		*off += f.size
	}
}

func (l *Log) corrupt(seg *segment, off int64, seq uint64) error {
	return &DamageError{slotName(seg.index), seg.id, off, seq, "a durable record cannot be read back"}
}

// find is the segment that holds seq, which is in the log, and a place at or
// before it. mu is held.
func (l *Log) find(seq uint64) (*segment, int64) {
	i := sort.Search(len(l.live), func(i int) bool { return l.live[i].first > seq }) - 1
	seg := l.live[i]
	k := sort.Search(len(seg.marks), func(k int) bool { return seg.marks[k].seq > seq }) - 1
	if k < 0 {
		return seg, dataStart
	}
	return seg, seg.marks[k].off
}

// Get copies the record seq. Errors: ErrNotFound when it is not durable yet, not
// in the log any more, or void; ErrClosed, ErrDamaged.
func (l *Log) Get(seq uint64) ([]byte, Class, error) {
	l.mu.Lock()
	switch {
	case l.closed:
		l.mu.Unlock()
		return nil, 0, ErrClosed
	case seq == 0 || seq > l.durable.Load() || seq < l.live[0].first:
		l.mu.Unlock()
		return nil, 0, fmt.Errorf("%w: %d", ErrNotFound, seq)
	}
	seg, off := l.find(seq)
	seg.refs++
	end := seg.end()
	l.mu.Unlock()
	defer l.unpin(seg.slot)

	var f frame
	var payload []byte
	ok := false
	err := guard(func() {
		f, ok = seg.record(&off, end, seq)
		if ok {
			payload = append([]byte(nil), f.payload...)
		}
	})
	switch {
	case err != nil:
		return nil, 0, fmt.Errorf("read record %d: %w", seq, err)
	case !ok:
		return nil, 0, fmt.Errorf("read record %d: %w", seq, l.corrupt(seg, off, seq))
	case f.void():
		return nil, f.class(), fmt.Errorf("%w: %d was aborted by its writer", ErrNotFound, seq)
	}
	return payload, f.class(), nil
}

// unpin gives up one use of s.
func (l *Log) unpin(s *slot) {
	l.mu.Lock()
	s.refs--
	last := s.refs == 0
	if last && l.closed && l.unmapped {
		s.unmap()
	}
	l.mu.Unlock()
	if last {
		l.kickPreparer()
	}
}
