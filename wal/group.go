package wal

import (
	"sync"
	"sync/atomic"
)

// group is what one sync makes durable: the records from one marker to the next.
// Two take turns, so that a commit allocates nothing: one is open while the other
// is made durable, and that one opens again when the next closes. Who was woken
// may still look at it then, and only at refused; who waits in its next life may
// be woken with them, and looks again.
type group struct {
	start   int64  // offset of its first frame in the segment
	first   uint64 // its first sequence
	last    uint64 // its last; set when it closes
	count   uint64 // guarded by Log.mu
	waiters int    // calls of WaitDurable so far; guarded by Log.mu
	wanted  bool   // somebody waits; guarded by Log.mu
	signed  bool   // a checkpoint follows its marker; set when it closes
	fault   atomic.Bool
	pending atomic.Int64  // unsettled less the records published; when it is closed, those not yet published
	drained chan struct{} // the last of them was

	over    sync.Cond     // it ended: those who cannot be cancelled wait here
	done    chan struct{} // closed when it ends: for the others; nil: there are none. Guarded by Log.mu
	refused atomic.Pointer[refusal]
}

// refusal says that records from first on were not made durable in their group.
type refusal struct {
	first uint64
	err   error
}

// unsettled is more than a group ever has records.
const unsettled = 1 << 40

func (l *Log) newGroup() *group {
	g := &group{drained: make(chan struct{}, 1)}
	g.over.L = released{&l.mu}
	g.reset(0, 0)
	return g
}

// reset makes g an open group without records.
func (g *group) reset(start int64, first uint64) {
	g.start, g.first, g.last, g.count, g.waiters = start, first, 0, 0, 0
	g.wanted, g.signed = false, false
	g.fault.Store(false)
	g.pending.Store(unsettled)
}

// release says that one of its records is published.
func (g *group) release() {
	if g.pending.Add(-1) == 0 {
		g.drained <- struct{}{}
	}
}

// drain waits until all records of a group that takes no more are published; count
// does not change any more.
func (g *group) drain() {
	if g.pending.Add(int64(g.count)-unsettled) != 0 {
		<-g.drained
	}
}

// refuse has those who wait for g told err.
func (g *group) refuse(err error) { g.refused.Store(&refusal{g.first, err}) }

// refusedTo is what who waited for seq in g is told. A group that is used again
// begins after seq.
func (g *group) refusedTo(seq uint64) error {
	if r := g.refused.Load(); r != nil && seq >= r.first {
		return r.err
	}
	return nil
}

// A wake is who is still to be woken.
type wake struct {
	over *sync.Cond
	done chan struct{}
}

// end takes those who wait for g. mu is held.
func (g *group) end() wake {
	w := wake{&g.over, g.done}
	g.done = nil
	return w
}

func (w wake) all() {
	if w.over != nil {
		w.over.Broadcast()
	}
	if w.done != nil {
		close(w.done)
	}
}

// released is the lock of a Cond whose waiters hold mu when they begin to wait,
// and have no use for it when they are woken: a thousand of them would only queue
// for it.
type released struct{ mu *sync.Mutex }

func (released) Lock()     {}
func (r released) Unlock() { r.mu.Unlock() }
