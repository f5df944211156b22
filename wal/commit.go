package wal

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/vfs"
)

// commitLoop is the committer. It commits for those who do not wait or whose
// wait can be cancelled, when the ring fills up or a timer says so, and it alone
// rotates. Whoever holds commits, the committer or a waiter that leads (lead), is
// the only one to write markers, sync, and move durable.
func (l *Log) commitLoop() {
	defer l.ended.Done()
	defer l.clock.Stop()
	defer l.idle.Stop()
	due := false
	for {
		select {
		case <-l.kick:
			l.commits.Lock()
		case <-l.clock.C:
			l.commits.Lock()
			l.armed.Store(false) // before looking: a record that comes later starts it again
			due = true
		case <-l.idle.C:
			l.commits.Lock()
			l.idling = false
			if l.signer.groups > 0 && l.err() == nil {
				l.commitEmpty()
			}
		case <-l.stop:
			l.commits.Lock()
			l.finish()
			l.commits.Unlock()
			return
		}
		for again := true; again; {
			l.mu.Lock()
			wanted, dirty, rotating, failed := l.open.wanted, l.open.count > 0, l.rotating, l.failed != nil
			pressed := l.pressed
			if !dirty {
				l.pressed = false
			}
			l.mu.Unlock()
			switch {
			case failed:
				again = false
			case rotating:
				l.rotate()
			case dirty && (due || pressed || wanted):
				if !due && !pressed && l.crowd > 1 {
					l.join()
				}
				l.commit(0).all()
				l.remind()
				due = false
			default:
				again, due = false, false
			}
		}
		l.commits.Unlock()
	}
}

// remind starts the timer of the checkpoint behind the last groups, in case
// nothing more comes.
func (l *Log) remind() {
	if l.signer != nil && l.signer.groups > 0 && !l.idling {
		l.idle.Reset(l.o.CheckpointInterval)
		l.idling = true
	}
}

// join lets more records into the open group while they keep coming: until
// everybody is there who waited when the last group ended, or nobody has come
// for a moment.
func (l *Log) join() {
	begin := time.Now()
	came, limit := begin, min(max(2*l.took, joinMin), joinMax)
	for last := 0; ; {
		l.mu.Lock()
		n := l.open.waiters
		l.mu.Unlock()
		now := time.Now()
		if n != last {
			last, came = n, now
		}
		if n >= l.crowd || now.Sub(came) > quiet || now.Sub(begin) > limit {
			return
		}
		runtime.Gosched()
	}
}

// commit closes the open group behind a marker and makes it durable. Who waited
// for it is still to be woken.
func (l *Log) commit(flags uint64) wake {
	l.mu.Lock()
	seg, g, end := l.cur, l.open, l.tail
	g.last = l.next - 1
	l.tail += markerFrame
	fresh := l.closing // ended; but who was refused may not have looked yet
	if fresh == nil || fresh.refused.Load() != nil {
		fresh = l.newGroup()
	}
	fresh.reset(l.tail, l.next)
	if g.signed = l.checkpointDue(flags&markerClosed != 0); g.signed {
		l.tail += checkpointFrame // of the next group's chain
	}
	l.closing, l.open = g, fresh
	l.pressed, l.soft = false, l.tail+l.softBytes()
	l.mu.Unlock()
	failpoint("closed")
	g.drain()
	failpoint("drained")
	err := l.persist(seg, g, end, flags)
	if err != nil {
		l.failover(seg, g, err)
		return wake{}
	}
	failpoint("written")
	l.mu.Lock()
	l.settled(seg, end+markerFrame)
	l.durable.Store(g.last)
	l.crowd = g.waiters + l.open.waiters
	w := g.end()
	l.mu.Unlock()
	failpoint("durable")
	if l.top.Load() != seg.id {
		l.top.Store(seg.id) // its header is durable from now on: so the one before it may go
		l.kickPreparer()
	}
	return w
}

// commitEmpty commits what there is, maybe nothing, for the checkpoint behind it:
// the last groups have none, and no more may come.
func (l *Log) commitEmpty() {
	l.mu.Lock()
	room := !l.blocked && l.tail+tailRoom <= l.ceil
	l.mu.Unlock()
	if room {
		l.commit(0).all()
	}
}

// settled records that everything in seg below off is on disk. mu is held.
func (l *Log) settled(seg *segment, off int64) {
	l.flushed = off
	if l.ring != nil {
		// Before its room is given to others. A ring that was cut is noticed by the
		// next group.
		_ = guard(func() { l.ring.set(seg.id, seg.key, off) })
		l.ceil = min(l.slotBytes, l.ring.room(off))
		l.moved.Broadcast()
	}
}

// softBytes is how large the open group grows before it is committed without
// anybody waiting: a quarter of the ring, so that appending does not meet its
// end while the disk keeps up. mu is held.
func (l *Log) softBytes() int64 {
	if l.ring == nil {
		return l.slotBytes
	}
	return l.ring.size() / 4
}

// bytes is the n bytes at off of the current segment where records are encoded:
// in the ring, or in the slot. mu is held, or it is the committer.
func (l *Log) bytes(seg *segment, off, n int64) []byte {
	if l.ring != nil {
		return l.ring.frame(off, n)
	}
	return seg.m[off : off+n : off+n]
}

// persist writes the marker of g at end, and makes the group durable.
func (l *Log) persist(seg *segment, g *group, end int64, flags uint64) error {
	if g.fault.Load() {
		return errFault
	}
	var chain [32]byte
	if err := guard(func() {
		chain = l.putMarker(l.bytes(seg, g.start, end+markerFrame-g.start), seg, g, end, flags)
		if g.signed {
			l.putCheckpoint(l.bytes(seg, end+markerFrame, checkpointFrame), seg, end+markerFrame, g.last, chain)
		}
	}); err != nil {
		return err
	}
	failpoint("marked")
	begin := time.Now()
	to := end + markerFrame
	if g.signed {
		to += checkpointFrame
	} else if l.signer != nil {
		l.signer.groups++
	}
	if err := l.flush(seg, g.start, to); err != nil {
		return err
	}
	l.counted(seg, g, end, chain, time.Since(begin))
	return nil
}

// putMarker writes the marker of g at the end of its frames, which are b.
func (l *Log) putMarker(b []byte, seg *segment, g *group, end int64, flags uint64) [32]byte {
	n := end - g.start
	chain := chainNext(l.hasher, &l.chain, b[:n])
	k := marker{l.mark.id, uint64(l.mark.off), g.count, flags, chain}
	k.put(b[n+frameHeader:])
	putFrame(b[n:], seg.key, end, markerSize, kindMarker, g.last)
	return chain
}

// counted takes a group that is durable into the committer's state.
func (l *Log) counted(seg *segment, g *group, end int64, chain [32]byte, took time.Duration) {
	l.took = took
	l.stats.mu.Lock()
	l.stats.syncs++
	l.stats.records += g.count
	l.stats.syncTime += took
	l.stats.syncMax = max(l.stats.syncMax, took)
	l.stats.mu.Unlock()
	l.chain, l.mark, l.confirmed = chain, pos{seg.id, end + markerFrame}, g.count == 0
}

// flush makes the bytes from from to to of seg durable. From the ring a write
// that failed is repeated once: what it should have written is still there, and
// its error speaks of this write alone. fdatasync is never repeated.
func (l *Log) flush(seg *segment, from, to int64) error {
	r := l.ring
	if r == nil {
		return l.o.sync(seg.file)
	}
	first, last := from&^(pageSize-1), to&^(pageSize-1)
	var pages [2][]byte
	if err := guard(func() {
		pages[0] = r.frame(first, last-first)
		if n := to - last; n > 0 {
			// The rest of this page belongs to records that are being encoded:
			// what the disk gets must not change under it.
			copy(l.bounce, r.frame(last, n))
			clear(l.bounce[n:])
			pages[1] = l.bounce
		}
	}); err != nil {
		return err
	}
	err := l.writeDirect(seg.slot, pages[:], first)
	if err != nil {
		l.o.Logger.Warn("write-ahead log: write failed, repeating it once", "slot", seg.index, "segment", seg.id, "err", err)
		err = l.writeDirect(seg.slot, pages[:], first)
	}
	return err
}

// writeDirect writes whole pages to a slot, durably.
func (l *Log) writeDirect(s *slot, pages [][]byte, off int64) error {
	if err := pwritev(s.dio, pages, off); err != nil {
		return err
	}
	if l.o.hooked {
		return l.o.sync(s.file)
	}
	return nil
}

// rotate makes the current segment durable and opens the next. Reservations
// wait meanwhile: so there is never more than one segment that is not durable,
// and a failed sync leaves one tail to carry over, not two.
func (l *Log) rotate() {
	l.mu.Lock()
	dirty := l.open.count > 0
	l.mu.Unlock()
	if dirty {
		l.commit(0).all()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.rotating { // commit went over to another slot
		return
	}
	var s *slot
	for !l.closed && l.failed == nil {
		if !l.canRotate() {
			break
		}
		if s = l.takeReady(); s != nil {
			break
		}
		l.kickPreparer()
		l.moved.Wait()
	}
	if s != nil {
		g := l.open // empty: it moves with the tail
		old, first := l.cur, l.next
		s.state = slotBusy
		end := l.tail // after a checkpoint, if there is one
		l.mu.Unlock()
		seg, page := l.newLife(s, old.id+1, first, pos{old.id, end})
		failpoint("rotating")
		err := l.writeLive(s, page)
		failpoint("live")
		if err != nil {
			// One copy may have reached the disk, and the segment before goes on
			// beyond the end that it names: it must not stand at the next start.
			err = errors.Join(err, os.Remove(s.file.Name()), vfs.SyncDir(l.dir))
		}
		l.mu.Lock()
		if err != nil {
			l.o.Logger.Error("write-ahead log: a slot cannot be written and is left out", "slot", s.index, "err", err)
			s.state = slotBad
		} else {
			old.limit = end
			l.mark = pos{seg.id, dataStart}
			l.install(seg, g, dataStart, nil)
			l.stats.mu.Lock()
			l.stats.rotations++
			l.stats.mu.Unlock()
			failpoint("rotated")
		}
	}
	l.rotating = false
	l.blocked = l.closed || l.failed != nil
	l.moved.Broadcast()
	l.kickPreparer()
}

// takeReady takes a slot that is ready; mu is held.
func (l *Log) takeReady() *slot {
	for _, s := range l.slots {
		if s.state == slotReady {
			return s
		}
	}
	return nil
}

// newLife makes a segment of a slot, and the page of its header.
func (l *Log) newLife(s *slot, id, first uint64, prev pos) (*segment, []byte) {
	h := header{
		state: stateLive, logID: l.id, slotBytes: uint64(l.slotBytes), id: id, key: randomKey(), first: first,
		prevID: prev.id, prevEnd: uint64(prev.off), chain: l.chain, created: l.o.stamp(),
	}
	page := pageAligned(pageSize)
	h.put(page)
	seg := newSegment(s, id, first, []epoch{{dataStart, h.key}})
	seg.prev = prev
	return seg, page
}

// writeLive writes both copies of a segment's header: from the ring durably, as
// its records go there without it; else through the mapping, where the
// segment's first sync makes it durable.
func (l *Log) writeLive(s *slot, page []byte) error {
	if l.ring != nil {
		return l.writeDirect(s, [][]byte{page, page}, 0)
	}
	return guard(func() {
		copy(s.m, page)
		failpoint("one header")
		copy(s.m[pageSize:], page)
	})
}

// install makes seg the current segment, its tail at off; page is what stands
// below off in its page. mu is held.
func (l *Log) install(seg *segment, g *group, off int64, page []byte) {
	seg.state = slotLive
	l.live = append(l.live, seg)
	l.cur, l.tail = seg, off
	g.start, g.first = off, l.next
	l.open = g
	l.full = false
	l.ceil, l.flushed, l.pressed = l.slotBytes, off, false
	if r := l.ring; r != nil {
		r.low = off &^ (pageSize - 1)
		_ = guard(func() { // as in settled
			copy(r.frame(r.low, off-r.low), page)
			r.set(seg.id, seg.key, off)
		})
		l.ceil = min(l.ceil, r.room(off))
	}
	l.soft = off + l.softBytes()
}

// failover leaves a segment whose disk refused. A failed fdatasync is never
// repeated: the kernel has forgotten the pages, and would say yes. Those who
// waited for it are told.
func (l *Log) failover(seg *segment, g *group, cause error) {
	l.o.Logger.Error("write-ahead log: sync failed, going on in another slot", "slot", seg.index, "segment", seg.id, "err", cause)
	l.mu.Lock()
	seg.bad = true
	l.mu.Unlock()
	l.stats.mu.Lock()
	l.stats.failovers++
	l.stats.mu.Unlock()
	if errors.Is(cause, errFault) || errors.Is(cause, unix.EFAULT) {
		g.fault.Store(true) // so a ring is left, too
	}
	l.moveOn(seg, g, fmt.Errorf("%w: %w", ErrFailed, cause))
}

// moveOn opens the next segment in the middle of one. Everything since the last
// good sync is copied there as far as it is still whole, the rest becomes void
// records, and that is made durable: so the sequence stays dense. g is the
// group that could not be committed, because of cause: who waits for it is told.
// The open one comes along.
func (l *Log) moveOn(seg *segment, g *group, cause error) {
	l.mu.Lock()
	l.rotating, l.blocked = true, true
	g2 := l.open
	g2.last = l.next - 1
	if g != g2 {
		g.refuse(cause)
	}
	l.mu.Unlock()
	g2.drain()
	l.mu.Lock()
	var s *slot
	for {
		if s = l.takeReady(); s != nil || l.closed || !l.obtainable() {
			break
		}
		l.kickPreparer()
		l.moved.Wait()
	}
	if s == nil {
		l.fail(errors.Join(cause, errors.New("no other slot to go on in")), [2]*group{g, g2})
		l.mu.Unlock()
		return
	}
	s.state = slotBusy
	if l.ring != nil && (g.fault.Load() || g2.fault.Load()) {
		l.leaveRing()
	}
	tail := l.tail
	l.mu.Unlock()

	all := l.newGroup()
	all.reset(dataStart, g.first)
	all.last = g2.last
	all.count = all.last + 1 - all.first
	prev := pos{seg.id, g.start}
	if g.start == dataStart {
		// Nothing of seg is durable, maybe not even its header: so the next one
		// takes its place (superseded).
		prev = seg.prev
	}
	next, page := l.newLife(s, seg.id+1, g.first, prev)
	failpoint("moving")
	var src []byte
	switch {
	case l.ring != nil:
		src = l.ring.frame(g.start, tail-g.start)
	case l.left != nil:
		src = l.left.frame(g.start, tail-g.start)
	default:
		src = seg.m[g.start:tail]
	}
	end, rest, err := l.moveTo(next, page, src, seg.key, g.start, all)
	failpoint("moved")
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		s.state = slotBad
		l.fail(fmt.Errorf("%w; then in slot %d: %w", cause, s.index, err), [2]*group{g, g2})
		return
	}
	seg.limit = g.start
	l.closing = g
	l.install(next, l.newGroup(), end+markerFrame, rest)
	l.durable.Store(all.last)
	l.top.Store(next.id)
	g.end().all()
	g2.end().all()
	l.rotating, l.blocked = false, l.closed
	l.moved.Broadcast()
	l.kickPreparer()
}

// moveTo writes the records of all, which stood at start of another segment, to
// the start of next, durably. With a ring the header is written last: a process
// that is killed before has its ring, and its old segment. rest is what stands
// in the last page.
func (l *Log) moveTo(next *segment, page, src []byte, key uint64, start int64, all *group) (end int64, rest []byte, err error) {
	l.mark = pos{next.id, dataStart}
	if l.ring == nil {
		if err := l.writeLive(next.slot, page); err != nil {
			return 0, nil, err
		}
		if end, err = carry(src, key, start, next, next.m[dataStart:], all); err == nil {
			failpoint("carried")
			err = l.persist(next, all, end, 0)
		}
		return end, nil, err
	}
	buf := pageAligned((int64(len(src))+2*markerFrame+pageSize-1)&^(pageSize-1) + pageSize)
	if end, err = carry(src, key, start, next, buf, all); err != nil {
		return 0, nil, err
	}
	n := end + markerFrame - dataStart
	begin := time.Now()
	chain := l.putMarker(buf[:n], next, all, end, 0)
	if err := l.writeDirect(next.slot, [][]byte{buf[:(n+pageSize-1)&^(pageSize-1)]}, dataStart); err != nil {
		return 0, nil, err
	}
	failpoint("carried")
	if err := l.writeLive(next.slot, page); err != nil {
		return 0, nil, err
	}
	l.counted(next, all, end, chain, time.Since(begin))
	return end, buf[n&^(pageSize-1) : n], nil
}

// leaveRing goes on in mapped files: the ring's memory cannot be used. mu is
// held.
func (l *Log) leaveRing() {
	l.left, l.ring, l.mapped = l.ring, nil, true
	l.why = "the ring had a memory fault: somebody cut its file"
	l.o.Logger.Error("write-ahead log: the ring cannot be used any more, going on in mapped files", "ring", l.left.file.Name())
}

// carry copies the records of g from src, which stood at start in a segment with
// that key, to dst, which is the start of to.
func carry(src []byte, key uint64, start int64, to *segment, dst []byte, g *group) (end int64, err error) {
	off, whole := int64(0), true
	for seq := g.first; seq <= g.last; seq++ {
		var f frame
		ok := false
		for whole && !ok {
			if guard(func() { f, ok = parseAt(src[off:], key, start+off) }) != nil || !ok {
				whole = false
				break
			}
			off += f.size
			if f.control() { // of the sync that failed, or a checkpoint
				ok = false
			}
		}
		if ok = ok && f.seq == seq; !ok {
			whole = false
			f = frame{kind: byte(ClassError) | kindVoid, payload: make([]byte, 8)}
		}
		err := guard(func() {
			copy(dst[end+frameHeader:], f.payload)
			putFrame(dst[end:], to.key, dataStart+end, len(f.payload), f.kind, seq)
		})
		if err != nil {
			return 0, err
		}
		to.last[f.class()] = seq
		to.note(seq, dataStart+end)
		end += frameSize(len(f.payload))
	}
	return dataStart + end, nil
}

// fail ends the log: nothing can be appended any more. mu is held.
func (l *Log) fail(cause error, groups [2]*group) {
	l.failed = fmt.Errorf("%w for good: %w. Restart on a working disk", ErrFailed, cause)
	l.o.Logger.Error("write-ahead log failed for good", "err", cause)
	l.blocked, l.rotating = true, false
	for _, g := range groups {
		g.refuse(l.failed)
		g.end().all()
	}
	l.open = l.newGroup()
	l.open.reset(l.tail, l.next)
	l.moved.Broadcast()
}

// finish is the committer's part of Close: commit what is there, then a marker
// that confirms it, so that after a clean end every byte is accounted for.
func (l *Log) finish() {
	l.mu.Lock()
	dirty := l.open.count > 0
	l.mu.Unlock()
	if dirty && l.err() == nil {
		l.commit(0).all()
	}
	l.mu.Lock()
	room := l.tail+markerFrame+checkpointFrame <= l.slotBytes
	l.mu.Unlock()
	unsigned := l.signer != nil && l.signer.groups > 0
	if l.err() == nil && (!l.confirmed || unsigned) && room {
		l.commit(markerClosed).all()
	}
}

func (l *Log) err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failed
}

// consumed reports whether every consumer is past seg. mu is held.
func (l *Log) consumed(seg *segment, cursors [NumClasses]uint64) bool {
	for c, last := range seg.last {
		if last > cursors[c] || l.o.Watermark && last > l.watermark.Load() {
			return false
		}
	}
	return true
}

// recyclable counts the oldest segments that nobody needs or looks at. mu is
// held.
func (l *Log) recyclable() int {
	cursors := l.cursors()
	n := 0
	for _, seg := range l.live {
		if seg.refs > 0 || !l.consumed(seg, cursors) {
			break
		}
		n++
	}
	return n
}

// spare reports whether at least n slots are, or can be made, free. mu is held.
func (l *Log) spare(n int) bool {
	for _, s := range l.slots {
		if s.state == slotFree || s.state == slotReady || s.state == slotBusy {
			if n--; n <= 0 {
				return true
			}
		}
	}
	for _, seg := range l.live[:l.recyclable()] {
		if !seg.bad {
			n--
		}
	}
	return n <= 0
}

// oldestMayGo reports whether the oldest segment can be recycled now: nobody
// needs it, and a later one is durably in its place. Else a crash would find no
// log at all. mu is held.
func (l *Log) oldestMayGo() bool {
	return len(l.live) > 1 && l.recyclable() > 0 && l.durable.Load() >= l.live[1].first && l.top.Load() >= l.live[1].id
}

// obtainable reports whether the preparer has, or can have, a slot. mu is held.
func (l *Log) obtainable() bool {
	for _, s := range l.slots {
		if s.state == slotFree || s.state == slotReady || s.state == slotBusy {
			return true
		}
	}
	return l.oldestMayGo() && !l.live[0].bad
}

// canRotate keeps one slot free for a failover: two must be there.
func (l *Log) canRotate() bool { return l.spare(2) }

// prepareLoop is the preparer: it has the next slot ready before it is needed.
// It takes the oldest segment only when no slot is free, so that history stays
// readable as long as it fits.
func (l *Log) prepareLoop() {
	defer l.ended.Done()
	for {
		select {
		case <-l.prep:
		case <-l.stop:
			return
		}
		if err := l.noteTop(); err != nil {
			l.o.Logger.Error("write-ahead log: cannot write the meta file", "err", err)
		}
		l.giveBackSealed()
		for {
			l.mu.Lock()
			s := l.pick()
			l.mu.Unlock()
			if s == nil {
				break
			}
			err := l.prepare(s)
			if err != nil {
				// Its header must not stand as a segment at the next start: the
				// file goes, and is made anew then.
				err = errors.Join(err, os.Remove(s.file.Name()), vfs.SyncDir(l.dir))
				l.o.Logger.Error("write-ahead log: a slot cannot be written and is left out until the next start",
					"slot", s.index, "err", err)
			}
			l.mu.Lock()
			s.state = slotReady
			if err != nil || s.bad {
				s.state = slotBad
			}
			l.moved.Broadcast()
			l.mu.Unlock()
		}
	}
}

// pick chooses the slot to prepare and marks it busy; mu is held.
func (l *Log) pick() *slot {
	var free *slot
	for _, s := range l.slots {
		switch s.state {
		case slotReady, slotBusy:
			return nil // one at a time is enough
		case slotFree:
			if free == nil {
				free = s
			}
		}
	}
	if free == nil && l.oldestMayGo() {
		old := l.live[0]
		l.live = append(l.live[:0], l.live[1:]...)
		old.clean = false
		free = old.slot
	}
	if free != nil {
		free.state = slotBusy
	}
	return free
}

// prepare makes a slot's header say free, one copy after the other so that a
// power cut leaves one whole, and brings its pages into memory.
func (l *Log) prepare(s *slot) error {
	if !s.clean {
		if err := l.writeFree(s); err != nil {
			return err
		}
		s.clean = true
	}
	if !l.inMapped() {
		return nil // nothing is encoded there
	}
	return populate(s.m)
}

func (l *Log) inMapped() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mapped
}

// giveBackSealed takes segments that take no more records out of the page table:
// what the log has in memory does not grow with what it holds.
func (l *Log) giveBackSealed() {
	var sealed []*slot
	l.mu.Lock()
	for _, seg := range l.live[:len(l.live)-1] {
		if !seg.given {
			seg.given = true
			sealed = append(sealed, seg.slot)
		}
	}
	l.mu.Unlock()
	for _, s := range sealed {
		dropPages(s.m)
	}
}

func (l *Log) writeFree(s *slot) error {
	page := make([]byte, pageSize)
	h := header{state: stateFree, logID: l.id, slotBytes: uint64(l.slotBytes)}
	h.put(page)
	return l.writeHeader(s, page)
}

func (l *Log) writeHeader(s *slot, page []byte) error {
	for _, off := range [...]int64{0, pageSize} {
		if _, err := s.file.WriteAt(page, off); err != nil {
			return fmt.Errorf("write header: %w", err)
		}
		if err := l.o.sync(s.file); err != nil {
			return err
		}
		failpoint("one free")
	}
	return nil
}

func (l *Log) kickPreparer() {
	select {
	case l.prep <- struct{}{}:
	default:
	}
}
