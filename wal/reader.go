package wal

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"sync"
	"time"
)

// Record is one record of the log.
type Record struct {
	Seq     uint64
	Class   Class
	Lost    uint64 // Repair found that so many records from Seq on are gone; else 0. Void is set too
	Void    bool   // aborted by its writer: the sequence number is used, Payload is nil
	Payload []byte // in a Batch or Snapshot a view: valid until Release or Close
}

// End is the last sequence number that r stands for: its own, but for a loss.
func (r Record) End() uint64 { return r.Seq + max(r.Lost, 1) - 1 }

// Batch is records that stand one after the other in one mapping. Records and
// what it points to belong to the log again after Release.
type Batch struct {
	Records []Record
	l       *Log
	s       *slot // pinned; nil: the records are copies
	from    int64 // the pages of s from here to to are given back
	to      int64
	mem     *batchMem
}

// batchMem is the memory of a batch, which Release gives to the next one.
type batchMem struct {
	records []Record
	bytes   []byte // of records copied out of the ring, which does not wait for its readers
}

var batches = sync.Pool{New: func() any { return new(batchMem) }}

// What a batch leaves to the next one is bounded, so that a large one is not kept
// for ever.
const (
	maxPooledRecords = 4096
	maxPooledBytes   = 4 << 20
)

// Release gives the views up, and takes the pages that were read out of the page
// table. It must be called once per Batch, also when Records is not used.
func (b Batch) Release() {
	if b.mem == nil {
		return
	}
	clear(b.mem.records) // views must not outlive their mapping, not even unread
	if b.mem.records = b.mem.records[:0]; cap(b.mem.records) <= maxPooledRecords && cap(b.mem.bytes) <= maxPooledBytes {
		batches.Put(b.mem)
	}
	if b.s != nil {
		dropPages(b.s.m[b.from:b.to])
		b.l.unpin(b.s)
	}
}

// Reader reads durable records in order. It belongs to one goroutine at a time.
type Reader struct {
	l    *Log
	next uint64
	at   pos   // where next stands; off 0: look it up
	gone int64 // what stands before it in at's segment was given back
	warm int64 // what stands before it was read ahead
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
			_ = l.await(ctx, g) // looked at above
			continue
		}
		if oldest := l.live[0].first; r.next < oldest {
			r.next, r.at = oldest, pos{}
		}
		seg, off := l.find(r.next)
		if seg.id == r.at.id && r.at.off != 0 {
			off = r.at.off
		}
		v := l.view(seg, off)
		l.mu.Unlock()
		b, err := r.read(v, off, durable, maxRecords, maxBytes)
		if errors.Is(err, errOverrun) {
			continue // what was in the ring is in the slot
		}
		return b, err
	}
}

// view is where records can be read: a part of the ring, or a slot. It is
// pinned.
type view struct {
	l    *Log
	seg  *segment
	ring *ring  // nil: the slot
	b    []byte // what stands from base on
	base int64

	sealed bool // nothing comes behind b in this segment
}

var errOverrun = errors.New("the ring was written over meanwhile")

// view pins the ring, if it holds seg from off on, or else the slot. mu is held.
func (l *Log) view(seg *segment, off int64) view {
	if r := l.ring; r != nil && seg == l.cur && off >= max(r.low, l.tail-r.size()) && off < l.flushed {
		r.refs++
		return view{l: l, seg: seg, ring: r, b: r.frame(off, l.flushed-off), base: off}
	}
	seg.refs++
	return view{l: l, seg: seg, b: seg.m[:seg.end()], sealed: seg.limit != 0}
}

// done gives a view up. From then on the ring's bytes may change: whole tells
// whether they are still what they were.
func (v view) done() (whole bool) {
	if v.ring == nil {
		v.l.unpin(v.seg.slot)
		return true
	}
	l := v.l
	l.mu.Lock()
	defer l.mu.Unlock()
	whole = l.ring == v.ring && l.cur == v.seg && v.base >= max(v.ring.low, l.tail-v.ring.size())
	v.ring.refs--
	if v.ring.refs == 0 && l.unmapped {
		v.ring.close()
	}
	return whole
}

// record reads the record seq, which stands at *off or a little after it.
func (v view) record(off *int64, seq uint64) (frame, bool) {
	end := v.base + int64(len(v.b))
	for *off < end {
		f, ok := parseAt(v.b[*off-v.base:], keyAt(v.seg.keys, *off), *off)
		if ok && f.control() && f.seq >= seq {
			if x, lost := f.lost(); lost && x.last >= x.first {
				return f, x.first <= seq
			}
		}
		if !ok || !f.control() && f.seq >= seq {
			return f, ok && f.seq == seq
		}
		*off += f.size
	}
	return frame{}, false
}

// refresh has the slot's pages read again: one that was cached beside a direct
// write may be old. It reports whether that can help.
func (v view) refresh(try int) bool {
	if v.ring != nil || v.seg.dio == nil || try > 3 {
		return false
	}
	dropCache(v.seg.file, v.seg.m, 0, int64(len(v.seg.m)))
	time.Sleep(time.Duration(try) * time.Millisecond)
	return true
}

// ahead is how far the slot is read ahead.
const ahead = 2 << 20

func (r *Reader) read(v view, off int64, durable uint64, maxRecords, maxBytes int) (b Batch, err error) {
	b.mem = batches.Get().(*batchMem)
	b.Records = b.mem.records
	if v.ring == nil {
		b.l, b.s = r.l, v.seg.slot
	}
	start, next, bytes := off, r.next, 0
	if v.ring == nil {
		r.enter(v, off, int64(min(maxBytes, maxSegment)))
	}
	for try := 1; ; try++ {
		broken := false
		err = guard(func() {
			for next <= durable && (len(b.Records) == 0 || len(b.Records) < maxRecords) {
				f, ok := v.record(&off, next)
				if !ok {
					// The rest of what is durable stands in the next segment.
					broken = len(b.Records) == 0
					return
				}
				if bytes += len(f.payload); bytes > maxBytes && len(b.Records) > 0 {
					return
				}
				if f.control() {
					b.Records = append(b.Records, Record{Seq: next, Lost: f.seq + 1 - next, Void: true})
					off += f.size
					next = f.seq + 1
					continue
				}
				b.Records = append(b.Records, Record{Seq: f.seq, Class: f.class(), Void: f.void(), Payload: f.payload})
				off += f.size
				next++
			}
			if v.ring != nil {
				b.copyOut(v.b[start-v.base : off-v.base])
			}
		})
		if !broken || err != nil || !v.refresh(try) {
			if broken && err == nil {
				err = r.l.corrupt(v.seg, off, next)
			}
			break
		}
	}
	b.mem.records = b.Records
	if v.ring != nil && !v.done() {
		b.Release()
		return Batch{}, errOverrun
	}
	if err != nil {
		b.Release()
		return Batch{}, fmt.Errorf("read record %d: %w", next, err)
	}
	for i := range b.Records {
		if b.Records[i].Void {
			b.Records[i].Payload = nil
		}
	}
	if v.ring == nil {
		r.passed(&b, v, off)
	}
	r.next, r.at = next, pos{v.seg.id, off}
	return b, nil
}

// enter prepares to read n bytes or more of v from off on.
func (r *Reader) enter(v view, off, n int64) {
	if r.at.id != v.seg.id || r.gone > off {
		r.gone, r.warm = off&^(pageSize-1), off&^(pageSize-1)
	}
	// From the ring nobody has the pages in memory.
	if end := int64(len(v.b)); v.seg.dio != nil && r.warm < min(off+n, end) {
		to := min(off+n, end)
		if v.sealed { // else those pages are still to be written, past the cache
			to = min(to+ahead, end)
		}
		readAhead(v.b[r.warm:to])
		r.warm = to &^ (pageSize - 1)
	}
}

// passed has b give back the pages that r is past when it is released. What is
// still to be written in the current segment stays mapped: off is not beyond it.
func (r *Reader) passed(b *Batch, v view, off int64) {
	to := off &^ (pageSize - 1)
	if end := int64(len(v.b)); end-off < pageSize && v.sealed {
		to = int64(len(v.seg.m)) // nothing more is read here
	} else if to-r.gone < dropStep {
		return
	}
	b.from, b.to, r.gone = r.gone, to, to
}

// dropStep is how many bytes a reader gives back at once.
const dropStep = 2 << 20

// copyOut makes the payloads, which lie in src, views of a copy.
func (b *Batch) copyOut(src []byte) {
	b.mem.bytes = append(b.mem.bytes[:0], src...)
	rest := b.mem.bytes
	for i := 0; i < len(b.Records) && len(rest) >= frameHeader; {
		n := int(le.Uint32(rest))
		if b.Records[i].Lost > 0 {
			i++
			continue
		}
		size := int(frameSize(n))
		if size > len(rest) {
			return // written over meanwhile: the batch is dropped
		}
		if w1 := le.Uint64(rest[8:]); byte(w1)&kindMarker == 0 && w1>>8 == b.Records[i].Seq {
			b.Records[i].Payload = rest[frameHeader : frameHeader+n : frameHeader+n]
			i++
		}
		rest = rest[size:]
	}
}

// end is where frames of s end for readers. mu is held.
func (s *segment) end() int64 {
	if s.limit != 0 {
		return s.limit
	}
	return int64(len(s.m))
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
// in the log any more, lost, or void; ErrClosed, ErrDamaged.
func (l *Log) Get(seq uint64) ([]byte, Class, error) {
	payload, f, err := l.get(seq)
	switch {
	case err != nil:
		return nil, 0, err
	case f.control():
		return nil, ClassError, fmt.Errorf("%w: %d is gone: the log was damaged and repaired", ErrNotFound, seq)
	case f.void():
		return nil, f.class(), fmt.Errorf("%w: %d was aborted by its writer", ErrNotFound, seq)
	}
	return payload, f.class(), nil
}

// LossAt is the loss that covers the record seq: the first and the last record
// that are gone, and when Repair found that. Errors: ErrNotFound when seq is not
// durable yet, not in the log any more, or not lost; ErrClosed, ErrDamaged.
func (l *Log) LossAt(seq uint64) (first, last uint64, found time.Time, err error) {
	payload, f, err := l.get(seq)
	if err != nil {
		return 0, 0, time.Time{}, err
	}
	f.payload = payload
	x, lost := f.lost()
	if !lost {
		return 0, 0, time.Time{}, fmt.Errorf("%w: %d is not lost", ErrNotFound, seq)
	}
	return x.first, x.last, time.Unix(0, int64(x.time)).UTC(), nil
}

// get copies what stands for seq: a record, or the loss marker that covers it.
func (l *Log) get(seq uint64) ([]byte, frame, error) {
	for {
		l.mu.Lock()
		switch {
		case l.closed:
			l.mu.Unlock()
			return nil, frame{}, ErrClosed
		case seq == 0 || seq > l.durable.Load() || seq < l.live[0].first:
			l.mu.Unlock()
			return nil, frame{}, fmt.Errorf("%w: %d", ErrNotFound, seq)
		}
		seg, off := l.find(seq)
		v := l.view(seg, off)
		l.mu.Unlock()
		payload, f, err := v.get(off, seq)
		if !v.done() {
			continue
		}
		if err != nil {
			return nil, frame{}, fmt.Errorf("read record %d: %w", seq, err)
		}
		return payload, f, nil
	}
}

// get copies the record seq, which stands at off or a little after it.
func (v view) get(off int64, seq uint64) (payload []byte, f frame, err error) {
	for try := 1; ; try++ {
		ok := false
		err = guard(func() {
			if f, ok = v.record(&off, seq); ok {
				payload = append([]byte(nil), f.payload...)
			}
		})
		if ok || err != nil {
			return payload, f, err
		}
		if !v.refresh(try) {
			return nil, f, v.l.corrupt(v.seg, off, seq)
		}
	}
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
