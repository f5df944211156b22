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
// and its last group is not durable yet, or when the ring is full. Errors: ErrCeilingExceeded, ErrClosed,
// ErrTooLarge, ErrFailed.
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
	g.pending.Add(1)
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
func (r Reservation) Commit() { r.publish(byte(r.class), false) }

// Abort publishes the record as a void one: its sequence number is used, its
// payload is wiped. Readers see it as Void.
func (r Reservation) Abort() { r.publish(byte(r.class)|kindVoid, true) }

func (r Reservation) publish(kind byte, wipe bool) {
	defer r.g.release()
	defer debug.SetPanicOnFault(r.fault)
	defer func() {
		if p := recover(); p != nil {
			if !isFault(p) {
				panic(p)
			}
			r.g.fault.Store(true) // the committer leaves this segment
		}
	}()
	if wipe {
		clear(r.Buf)
	}
	putFrame(r.frame, r.key, r.off, len(r.Buf), kind, r.Seq)
}

// Append copies payload into the log and returns its sequence number. Errors as
// Reserve.
func (l *Log) Append(c Class, payload []byte) (uint64, error) {
	r, err := l.Reserve(c, len(payload))
	if err != nil {
		return 0, err
	}
	if err := guard(func() { copy(r.Buf, payload) }); err != nil {
		r.Abort()
		return 0, fmt.Errorf("%w: %w", ErrFailed, err)
	}
	r.Commit()
	return r.Seq, nil
}

// WaitDurable waits until the record seq, and with it every one before it, is
// on disk. The context ends the wait, never the write. Errors: ErrFailed when
// the sync failed (the record may or may not be in the log after a restart: act
// as if it were not), ErrClosed, the context's.
func (l *Log) WaitDurable(ctx context.Context, seq uint64) error {
	for l.durable.Load() < seq {
		l.mu.Lock()
		g := l.open
		switch {
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
		l.mu.Unlock()
		if !g.wanted.Load() && !g.wanted.Swap(true) {
			l.kickCommitter()
		}
		select {
		case <-g.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		// Told of the failure even if the record is safe in another slot by now:
		// its caller has waited on a disk that refused.
		if g.err != nil && seq >= g.first {
			return g.err
		}
		if closed && l.durable.Load() < seq {
			return ErrClosed
		}
	}
	return nil
}

func (l *Log) kickCommitter() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}
