package wal

import (
	"context"
	"fmt"
	"runtime/debug"
)

// Reservation is room for one record. Between Reserve and Commit or Abort a
// fault in the mapping (somebody cut the file) is a panic on this goroutine
// instead of the end of the process: recover it, and Abort. Everything that
// comes later waits for this record: encode, and commit.
type Reservation struct {
	Seq uint64 // of this record
	Buf []byte // encode into it, exactly; may hold old bytes

	g     *group
	frame []byte // with header and padding
	key   uint64
	off   int64
	class Class
	fault bool // what SetPanicOnFault was before
}

// Reserve takes the next sequence number and size bytes for a record of class
// c. It allocates nothing and waits for the disk only when a segment is full
// and its last group is not durable yet, or when the ring is full. Errors:
// ErrCeilingExceeded, ErrClosed, ErrTooLarge, ErrFailed.
func (l *Log) Reserve(c Class, size int) (Reservation, error) {
	if c >= NumClasses {
		return Reservation{}, fmt.Errorf("reserve: unknown %v", c)
	}
	if size <= 0 {
		return Reservation{}, fmt.Errorf("reserve: size is %d, want at least 1", size)
	}
	if size > l.maxPayload {
		return Reservation{}, fmt.Errorf("%w: it has %d bytes, want at most %d", ErrTooLarge, size, l.maxPayload)
	}
	need := frameSize(size)
	l.mu.Lock()
	for l.blocked || l.tail+need+tailRoom > l.ceil {
		if err := l.makeRoom(need); err != nil {
			l.mu.Unlock()
			return Reservation{}, err
		}
	}
	seg, g, seq, off := l.cur, l.open, l.next, l.tail
	l.next++
	l.tail += need
	seg.last[c] = seq
	seg.note(seq, off)
	g.count++
	clock, kick := g.count == 1 && !l.armed.Load(), l.tail > l.soft && !l.pressed
	if kick {
		l.pressed = true
	}
	b := l.bytes(seg, off, need)
	l.mu.Unlock()
	if clock && !l.armed.Swap(true) {
		l.clock.Reset(l.o.SyncInterval)
	}
	if kick {
		l.kickCommitter()
	}
	failpoint("reserved")
	return Reservation{
		Seq: seq, Buf: b[frameHeader : frameHeader+size : frameHeader+size],
		g: g, frame: b, key: seg.key, off: off, class: c, fault: debug.SetPanicOnFault(true),
	}, nil
}

// makeRoom waits for room in the ring or for a segment with room, or says why
// there is none. It is called with mu held and returns with it held.
func (l *Log) makeRoom(need int64) error {
	switch {
	case l.failed != nil:
		return l.failed
	case l.closed:
		return ErrClosed
	case !l.blocked && l.tail+need+tailRoom <= l.slotBytes:
		l.pressed = true // the ring is full: what is in it goes to disk now
		l.kickCommitter()
	case !l.rotating:
		if !l.canRotate() {
			if !l.full {
				l.full = true
				l.o.Logger.Error("write-ahead log is at its ceiling: nothing more can be recorded until its readers advance",
					"max_bytes", l.o.MaxBytes, "slots", len(l.slots))
			}
			return fmt.Errorf("%w of %d bytes, and its readers are not past the oldest segment", ErrCeilingExceeded, l.o.MaxBytes)
		}
		l.rotating, l.blocked = true, true
		l.kickCommitter()
	}
	l.moved.Wait()
	return nil
}

// Commit publishes the record: it is in the log, and will be durable. It never
// waits for the disk.
func (r Reservation) Commit() { r.publish(byte(r.class), nil) }

// Abort publishes the record as a void one: its sequence number is used, its
// payload is wiped. Readers see it as Void.
func (r Reservation) Abort() { r.publish(byte(r.class)|kindVoid, nil) }

// publish copies payload into the record, if there is one, and seals it. stored
// is false when the mapping had a fault: then the committer leaves this segment.
func (r *Reservation) publish(kind byte, payload []byte) (stored bool) {
	defer func() {
		if !stored {
			if p := recover(); p != nil && !isFault(p) {
				panic(p)
			}
			r.g.fault.Store(true)
		}
		debug.SetPanicOnFault(r.fault)
		r.g.release()
	}()
	switch {
	case payload != nil:
		copy(r.Buf, payload)
	case kind&kindVoid != 0:
		clear(r.Buf)
	}
	failpoint("encoded")
	putFrame(r.frame, r.key, r.off, len(r.Buf), kind, r.Seq)
	failpoint("published")
	return true
}

// Append copies payload into the log and returns its sequence number. Errors as
// Reserve.
func (l *Log) Append(c Class, payload []byte) (uint64, error) {
	r, err := l.Reserve(c, len(payload))
	if err != nil {
		return 0, err
	}
	if !r.publish(byte(c), payload) {
		return 0, fmt.Errorf("%w: %w", ErrFailed, errFault)
	}
	return r.Seq, nil
}

// WaitDurable waits until the record seq, and with it every one before it, is
// on disk. The context ends the wait, never the write; a caller whose context
// cannot end may be made to do the write itself. Errors: ErrFailed when the sync
// failed (the record may or may not be in the log after a restart: act as if it
// were not), ErrClosed, the context's.
func (l *Log) WaitDurable(ctx context.Context, seq uint64) error {
	for l.durable.Load() < seq {
		l.mu.Lock()
		g := l.open
		switch {
		case l.durable.Load() >= seq:
			l.mu.Unlock()
			return nil
		case l.failed != nil:
			l.mu.Unlock()
			return l.failed
		case seq >= l.next:
			next := l.next
			l.mu.Unlock()
			return fmt.Errorf("wait for record %d: the next one is %d", seq, next)
		case l.closing != nil && seq <= l.closing.last:
			g = l.closing
		}
		closed := l.closed
		g.waiters++
		if !g.wanted {
			g.wanted = true
			if g == l.open && !l.blocked && ctx.Done() == nil && l.commits.TryLock() {
				l.mu.Unlock()
				l.lead()
				if err := g.refusedTo(seq); err != nil {
					return err
				}
				continue
			}
			l.kickCommitter()
		}
		// With mu held: whoever ends the group takes it between making the records
		// durable and waking, so none who is not woken has looked before.
		if ctx.Done() == nil {
			g.over.Wait() // gives mu up, and does not take it again
		} else if err := l.await(ctx, g); err != nil {
			return err
		}
		// Told of the failure even if the record is safe in another slot by now:
		// its caller has waited on a disk that refused.
		if err := g.refusedTo(seq); err != nil {
			return err
		}
		if closed && l.durable.Load() < seq {
			return ErrClosed
		}
	}
	return nil
}

// await waits for g to end. It is called with mu held, and gives it up.
func (l *Log) await(ctx context.Context, g *group) error {
	if g.done == nil {
		g.done = make(chan struct{})
	}
	done := g.done
	l.mu.Unlock()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lead commits the open group on the goroutine of the first who waits for it:
// handing it to the committer and back would cost a lone waiter two changes of
// thread. commits is held, and given up.
func (l *Log) lead() {
	if l.crowd > 1 {
		l.join()
	}
	wake := l.commit(0)
	l.remind()
	l.commits.Unlock()
	wake.all()
	failpoint("woken")
}

func (l *Log) kickCommitter() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}
