package leg

import (
	"runtime"
	"sync"
	"time"
)

// joinFor is how long a batch lets arrivals join while they keep coming, as our
// log does.
const joinFor = 60 * time.Microsecond

// batching gives a log that syncs per call what ours has inside: everybody who
// arrives during a sync shares the next one. One goroutine appends; the rest
// wait for their group. It costs a mutex, an append to a slice and one
// allocation per group, so it is not what a peer would lose by.
type batching struct {
	log  Batcher
	mu   sync.Mutex
	open *group
	kick chan struct{}
	quit chan struct{}
	done chan struct{}
}

type group struct {
	ps   [][]byte
	err  error
	done chan struct{}
}

func newBatching(log Batcher) *batching {
	b := &batching{log: log, open: &group{done: make(chan struct{})}, kick: make(chan struct{}, 1),
		quit: make(chan struct{}), done: make(chan struct{})}
	go b.loop()
	return b
}

func (b *batching) append(p []byte) error {
	b.mu.Lock()
	g := b.open
	g.ps = append(g.ps, p)
	first := len(g.ps) == 1
	b.mu.Unlock()
	if first {
		b.kick <- struct{}{} // never blocks: one group is open at a time
	}
	<-g.done
	return g.err
}

// stop ends it; nobody may be in append.
func (b *batching) stop() {
	close(b.quit)
	<-b.done
}

func (b *batching) loop() {
	defer close(b.done)
	var spare [][]byte
	for {
		select {
		case <-b.kick:
		case <-b.quit:
			return
		}
		b.join()
		fresh := &group{ps: spare[:0], done: make(chan struct{})}
		b.mu.Lock()
		g := b.open
		b.open = fresh
		b.mu.Unlock()
		g.err = b.log.AppendBatch(g.ps)
		spare = g.ps
		close(g.done)
	}
}

func (b *batching) join() {
	last := 0
	for begin := time.Now(); time.Since(begin) < joinFor; {
		b.mu.Lock()
		n := len(b.open.ps)
		b.mu.Unlock()
		if n == last {
			return
		}
		last = n
		runtime.Gosched()
	}
}
