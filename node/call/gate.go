package call

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/autonomyops/autonomy/internal/metric"
)

// Gate lets a bounded number of calls in at a time. Who finds no place waits in
// a bounded queue for a bounded time; who finds no room there either is refused
// at once, before anything is decoded. Each principal has a queue of its own and
// the queues are served in turn, so that one that calls without end delays the
// others by one call at a time, not by its whole queue.
//
// While there are places, Enter and Leave are one atomic operation each. The
// mutex is taken only when somebody waits: then the node is at its limit anyway.
type Gate struct {
	o       atomic.Pointer[GateOptions]
	running atomic.Int64
	waiting atomic.Int64 // in all queues; changed with mu held

	mu     sync.Mutex
	queues map[principal]*queue
	turn   *queue // whose turn it is, in a ring of the queues that are not empty; nil: none waits

	full, slow, memory metric.Counter // refused
}

// GateOptions configure a Gate. Zero values take the defaults named.
type GateOptions struct {
	MaxRunning int // calls at one time; default DefaultMaxRunning
	// MaxWaiting bounds all queues together, default DefaultMaxWaiting. It is
	// also what bounds their memory: a waiting call holds its body.
	MaxWaiting int
	// MaxWaitingEach bounds the queue of one principal. Default: half of
	// MaxWaiting, at least 1, so that no single one can fill all the room.
	MaxWaitingEach int
	// MaxWait bounds the time in a queue. Default DefaultMaxWait.
	MaxWait time.Duration
	// Short reports that memory is short: nobody is let in. May be nil.
	Short func() bool
}

// Defaults of GateOptions.
const (
	DefaultMaxRunning = 1024
	DefaultMaxWaiting = 1024
	DefaultMaxWait    = time.Second
)

// Why Enter refused. The caller answers 429 with Retry-After.
var (
	ErrQueueFull   = errors.New("too many calls are running and waiting")
	ErrQueueSlow   = errors.New("the call waited for its place too long")
	ErrMemoryShort = errors.New("the node is short of memory")
)

// principal is who shares a queue.
type principal struct{ typ, id string }

// queue is the callers of one principal that wait, oldest first.
type queue struct {
	who        principal
	waiters    []*waiter
	next, prev *queue
}

// waiter is one call that waits; in is closed when it has a place.
type waiter struct {
	in chan struct{}
}

func newGate(o GateOptions) *Gate {
	g := &Gate{queues: map[principal]*queue{}}
	g.Set(o)
	return g
}

// Set puts other limits into force. Calls that run or wait already stay, also
// when there are now more of them than the limits allow.
func (g *Gate) Set(o GateOptions) {
	if o.MaxRunning == 0 {
		o.MaxRunning = DefaultMaxRunning
	}
	if o.MaxWaiting == 0 {
		o.MaxWaiting = DefaultMaxWaiting
	}
	if o.MaxWaitingEach == 0 {
		o.MaxWaitingEach = max(1, o.MaxWaiting/2)
	}
	if o.MaxWait == 0 {
		o.MaxWait = DefaultMaxWait
	}
	if o.Short == nil {
		o.Short = func() bool { return false }
	}
	g.o.Store(&o)
	g.mu.Lock()
	g.serve() // there may be more places now
	g.mu.Unlock()
}

// Enter takes a place for a call of c; the caller gives it back with Leave. The
// error is ErrQueueFull, ErrQueueSlow, ErrMemoryShort or that of ctx: then there
// is no place and no Leave.
func (g *Gate) Enter(ctx context.Context, c Caller) error {
	if g.o.Load().Short() {
		g.memory.Inc()
		return ErrMemoryShort
	}
	if g.waiting.Load() == 0 && g.take() {
		return nil
	}
	return g.wait(ctx, principal{c.Type, c.ID})
}

// Leave gives a place back.
func (g *Gate) Leave() {
	g.running.Add(-1)
	if g.waiting.Load() == 0 {
		return
	}
	g.mu.Lock()
	g.serve()
	g.mu.Unlock()
}

// Running is how many calls hold a place.
func (g *Gate) Running() int { return int(g.running.Load()) }

// take takes a place if there is one.
func (g *Gate) take() bool {
	for {
		n := g.running.Load()
		if n >= int64(g.o.Load().MaxRunning) {
			return false
		}
		if g.running.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// serve gives free places to those whose turn it is. mu is held.
func (g *Gate) serve() {
	for g.turn != nil && g.take() {
		q := g.turn
		w := q.waiters[0]
		q.waiters = q.waiters[1:]
		g.waiting.Add(-1)
		g.turn = q.next
		if len(q.waiters) == 0 {
			g.remove(q)
		}
		close(w.in)
	}
}

func (g *Gate) wait(ctx context.Context, who principal) error {
	o := g.o.Load()
	g.mu.Lock()
	q := g.queues[who]
	if int(g.waiting.Load()) >= o.MaxWaiting || q != nil && len(q.waiters) >= o.MaxWaitingEach {
		g.mu.Unlock()
		g.full.Inc()
		return ErrQueueFull
	}
	if q == nil {
		q = g.insert(who)
	}
	w := &waiter{in: make(chan struct{})}
	q.waiters = append(q.waiters, w)
	g.waiting.Add(1)
	g.serve() // a place may have come free before anybody was seen waiting
	g.mu.Unlock()

	timer := time.NewTimer(o.MaxWait)
	defer timer.Stop()
	var err error
	select {
	case <-w.in:
		return nil
	case <-timer.C:
		err = ErrQueueSlow
	case <-ctx.Done():
		err = ctx.Err()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, other := range q.waiters {
		if other != w {
			continue
		}
		q.waiters = append(q.waiters[:i], q.waiters[i+1:]...)
		g.waiting.Add(-1)
		if len(q.waiters) == 0 {
			g.remove(q)
		}
		if errors.Is(err, ErrQueueSlow) {
			g.slow.Inc()
		}
		return err
	}
	return nil // it got its place in the same moment
}

// insert makes the queue of who, last in turn. mu is held.
func (g *Gate) insert(who principal) *queue {
	q := &queue{who: who}
	g.queues[who] = q
	if g.turn == nil {
		q.next, q.prev = q, q
		g.turn = q
		return q
	}
	q.next, q.prev = g.turn, g.turn.prev
	q.prev.next, q.next.prev = q, q
	return q
}

// remove takes an empty queue out of the ring. mu is held.
func (g *Gate) remove(q *queue) {
	delete(g.queues, q.who)
	if q.next == q {
		g.turn = nil
		return
	}
	q.prev.next, q.next.prev = q.next, q.prev
	if g.turn == q {
		g.turn = q.next
	}
}

func (g *Gate) writeMetrics(b *metric.Buffer) {
	b.Float("autonomy_node_admission_running", "", float64(g.running.Load()))
	b.Float("autonomy_node_admission_waiting", "", float64(g.waiting.Load()))
	for why, c := range map[string]*metric.Counter{"queue_full": &g.full, "queue_slow": &g.slow, "memory": &g.memory} {
		b.Uint("autonomy_node_admission_refused_total", `why="`+why+`"`, c.Value())
	}
}
