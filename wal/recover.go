package wal

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
)

// recover reads the whole log, decides where it ends, and makes the log ready
// to take records there. README.md argues why that is right.
func (l *Log) recover(rec *Recovery) error {
	err := l.recoverOnce(rec, false)
	if errors.Is(err, ErrDamaged) {
		// Judge the disk, not a page that was cached beside a direct write.
		for _, s := range l.slots {
			dropCache(s.file, s.m, 0, l.slotBytes)
		}
		l.live = l.live[:0]
		err = l.recoverOnce(rec, true)
	}
	return err
}

// recoverOnce reads past the page cache with direct set.
func (l *Log) recoverOnce(rec *Recovery, direct bool) error {
	var segs []*found
	for _, s := range l.slots {
		var x *found
		var err error
		if e := guard(func() { x, err = l.identify(s) }); e != nil {
			err = e
		}
		if err != nil {
			return err
		}
		if x != nil {
			x.file = s.file
			segs = append(segs, x)
		}
	}
	segs, _, err := link(segs)
	if err != nil {
		return err
	}
	if err := checkTop(segs, l.meta); err != nil {
		return err
	}
	if len(segs) == 0 {
		return l.begin()
	}
	w := &walk{next: segs[0].head.first, chain: segs[0].head.chain}
	var t tail
	for _, p := range l.readAll(segs, rec, direct) {
		if err := w.enter(p.s); err != nil {
			return err
		}
		if p.err != nil {
			return p.err
		}
		w.next, w.chain, w.group, w.count = p.w.next, p.w.chain, p.w.group, p.w.count
		w.records += p.w.records
		if t = p.t; p.next != nil {
			p.seg.limit = t.end
		}
		p.seg.state = slotLive
		l.live = append(l.live, p.seg)
	}
	rec.LastSeq = w.next - 1
	if err := checkCursors(segs[0], rec.LastSeq, l.meta); err != nil {
		return err
	}
	rec.Records, rec.Segments, rec.Uncommitted = w.records, len(segs), t.uncommitted
	rec.TornRecords, rec.TornBytes = t.tornRecords, t.tornBytes
	if w.records > 0 {
		rec.FirstSeq = segs[0].head.first
	}
	return l.resume(segs[len(segs)-1], w, t)
}

// mend finds where the newest segment ends, and completes it there with what a
// killed process left behind.
func (l *Log) mend(newest *found, rec *Recovery) (err error) {
	unreadable := func(fault error) error { return newest.damage(0, 0, "the file cannot be read: %v", fault) }
	_ = populate(newest.m) // one call for all pages instead of a fault for each; reading finds what is wrong
	var end place
	if e := guard(func() { end = refreshEnd(newest, place{dataStart, newest.head.first}) }); e != nil {
		return unreadable(e)
	}
	if rec.Replayed, err = l.takeReplay(newest); err != nil {
		return err
	}
	if e := guard(func() { rec.Salvaged = salvage(newest, end) }); e != nil {
		return unreadable(e)
	}
	return nil
}

// maxReaders bounds how many segments recovery reads at once.
const maxReaders = 8

// part is one segment, read by itself.
type part struct {
	s, next *found
	seg     *segment
	w       *walk
	t       tail
	err     error
}

// readAll reads the segments, several at once: how each begins stands in its
// header, so only the seams between them are left to check. The newest comes
// first: it takes longest.
func (l *Log) readAll(segs []*found, rec *Recovery, direct bool) []*part {
	parts := make([]*part, len(segs))
	for i, s := range segs {
		parts[i] = &part{s: s}
		if i > 0 {
			parts[i-1].next = s
		}
	}
	var wg sync.WaitGroup
	var taken atomic.Int64
	for range min(len(parts), runtime.GOMAXPROCS(0), maxReaders) {
		wg.Go(func() {
			src := &window{read: true, direct: direct}
			for {
				i := len(parts) - int(taken.Add(1))
				if i < 0 {
					return
				}
				p := parts[i]
				if p.next == nil {
					p.err = l.mend(p.s, rec)
				}
				p.read(l, src)
			}
		})
	}
	wg.Wait()
	return parts
}

func (p *part) read(l *Log, src *window) {
	s := p.s
	seg := newSegment(l.slots[s.slot], s.head.id, s.head.first, s.epochs)
	seg.prev = pos{s.head.prevID, int64(s.head.prevEnd)}
	p.seg, p.w = seg, newWalk(s, src)
	p.w.quick = !l.o.VerifyOnOpen
	if p.err != nil {
		return
	}
	if e := guard(func() { // beyond the end of the newest its mapping is read
		p.t, p.err = p.w.segment(s, p.next, func(f frame) error {
			if _, lost := f.lost(); lost { // readers account for it
				seg.last[ClassError] = max(seg.last[ClassError], f.seq)
			} else if !f.control() {
				seg.last[f.class()] = f.seq
				seg.note(f.seq, f.off)
			}
			return nil
		})
	}); e != nil {
		p.err = s.damage(0, p.w.next, "the file cannot be read: %v", e)
	}
}

// place is where a segment's whole frames end, and the record that must come
// there.
type place struct {
	off  int64
	next uint64
}

// follow goes from p over whole frames in sequence to where they end.
func (p place) follow(s *found) place {
	for end := int64(len(s.m)); p.off < end; {
		f, ok := parseFrame(s.m, keyAt(s.epochs, p.off), p.off, end)
		if !ok || !f.control() && f.seq != p.next {
			break
		}
		p.off += f.size
		if _, lost := f.lost(); lost {
			p.next = f.seq + 1
		} else if !f.control() {
			p.next++
		}
	}
	return p
}

// refreshEnd finds where the newest segment ends by what the disk says, not by a
// page that was cached beside a direct write: what follows the last whole frame
// is read again until that changes nothing. It begins at p.
func refreshEnd(s *found, p place) place {
	const span = 1 << 20
	end := int64(len(s.m))
	for again := int64(0); ; {
		if p = p.follow(s); p.off == again || p.off >= end {
			return p
		}
		from := p.off &^ (pageSize - 1)
		dropCache(s.file, s.m, from, min(span, end-from))
		again = p.off
	}
}

// identify reads a slot's header; nil when it is free.
func (l *Log) identify(s *slot) (*found, error) {
	h, epochs, used, err := readHeader(s.m)
	x := &found{slot: s.index, name: slotName(s.index), m: s.m, head: h, epochs: epochs}
	switch {
	case err != nil:
		return nil, x.damage(0, 0, "%v", err)
	case !used:
		s.clean = true
		return nil, nil
	case h.logID != l.id || h.slotBytes != uint64(l.slotBytes):
		return nil, x.damage(0, 0, "it belongs to log %016x with slots of %d bytes, this is log %016x with slots of %d",
			h.logID, h.slotBytes, l.id, l.slotBytes)
	case h.state == stateFree:
		s.clean = true
		return nil, nil
	}
	return x, nil
}

// checkTop notices that the newest segments are gone altogether.
func checkTop(segs []*found, x meta) error {
	var newest uint64
	if len(segs) > 0 {
		newest = segs[len(segs)-1].head.id
	}
	if newest < x.top {
		return &DamageError{Segment: x.top,
			Reason: fmt.Sprintf("segment %d was durable, but the newest here is %d: a slot is missing or was replaced", x.top, newest)}
	}
	return nil
}

// checkCursors notices what only the cursors can tell: records that a consumer
// had are not there, or records went that nobody had.
func checkCursors(oldest *found, last uint64, x meta) error {
	var most uint64
	for c, seq := range x.cursors {
		most = max(most, seq)
		if seq > last {
			return &DamageError{Seq: last + 1,
				Reason: fmt.Sprintf("the %v cursor stands at %d, but the last record is %d: the end of the log is missing", Class(c), seq, last)}
		}
	}
	if first := oldest.head.first; first-1 > most {
		return oldest.damage(0, 0, "the oldest record is %d, but no cursor is past %d: a slot is missing", first, most)
	}
	return nil
}

// begin opens the first segment of a new log.
func (l *Log) begin() error {
	s := l.slots[0]
	if err := l.prepare(s); err != nil {
		return err
	}
	l.next = 1
	seg, page := l.newLife(s, 1, 1, pos{})
	if err := l.writeLive(s, page); err != nil {
		return err
	}
	l.mark = pos{1, dataStart}
	if err := l.o.sync(s.file); err != nil {
		return err
	}
	l.confirmed = true // nothing to confirm
	l.install(seg, l.newGroup(), dataStart, nil)
	return nil
}

// resume goes on where the newest segment ends. What may stand beyond that
// place was never acknowledged, and a fresh key makes it unreadable for ever.
// Records after the last marker are kept and committed as soon as the committer
// runs: they survived the process, so whoever wrote them in batched mode may
// have acted on them.
func (l *Log) resume(s *found, w *walk, t tail) error {
	seg := l.live[len(l.live)-1]
	if err := populate(seg.m); err != nil {
		return err
	}
	l.next, l.chain, l.mark, l.confirmed = w.next, w.chain, w.group, t.confirmed
	l.durable.Store(w.next - 1 - w.count)
	l.cur, l.tail, l.ceil, l.soft, l.flushed = seg, t.end, l.slotBytes, l.slotBytes, w.group.off
	clean := t.closed && t.marked == t.end && t.tornBytes == 0
	if l.exhausted = !clean && len(seg.keys) > maxEpochs; !clean && !l.exhausted {
		if err := l.addEpoch(seg, s.head.key, t.end); err != nil {
			return err
		}
	}
	l.top.Store(seg.id) // closed, or synced with its new epoch
	l.open = l.newGroup()
	l.open.reset(w.group.off, w.next-w.count)
	l.open.count = w.count
	l.open.pending.Add(-int64(w.count)) // published by another process
	return nil
}

// addEpoch gives the rest of seg a new key, durable in both header copies.
func (l *Log) addEpoch(seg *segment, segKey uint64, off int64) error {
	e := epoch{off, randomKey()}
	n := len(seg.keys) - 1
	var b [epochSize]byte
	e.put(b[:], segKey)
	for _, page := range [...]int64{0, pageSize} {
		if _, err := seg.file.WriteAt(b[:], page+epochStart+int64(n)*epochSize); err != nil {
			return fmt.Errorf("write header: %w", err)
		}
		if err := l.o.sync(seg.file); err != nil {
			return err
		}
	}
	seg.keys = append(seg.keys, e)
	seg.key = e.key
	return nil
}
