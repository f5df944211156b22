package api

import (
	"sync"
	"time"
)

// buckets is a token bucket per peer: rate tokens a second, two seconds' worth
// at most (INV-13). Of more than cap peers the ones with full buckets are
// forgotten; when there are none, all are.
type buckets struct {
	rate float64
	cap  int
	now  func() time.Time

	mu    sync.Mutex // guards the map
	peers map[string]*bucket
}

type bucket struct {
	tokens float64
	at     time.Time
}

func newBuckets(rate float64, capacity int, now func() time.Time) *buckets {
	return &buckets{rate: rate, cap: capacity, now: now, peers: map[string]*bucket{}}
}

// take uses one token of the peer, or says how long to wait for the next.
func (b *buckets) take(peer string) time.Duration {
	if b.rate <= 0 {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now, burst := b.now(), max(1, 2*b.rate)
	k := b.peers[peer]
	if k == nil {
		if len(b.peers) >= b.cap {
			b.forget(now, burst)
		}
		k = &bucket{tokens: burst, at: now}
		b.peers[peer] = k
	}
	if since := now.Sub(k.at).Seconds(); since > 0 { // a clock that was set back takes nothing away
		k.tokens = min(burst, k.tokens+since*b.rate)
	}
	k.at = now
	if k.tokens >= 1 {
		k.tokens--
		return 0
	}
	return time.Duration((1 - k.tokens) / b.rate * float64(time.Second))
}

func (b *buckets) forget(now time.Time, burst float64) {
	for name, k := range b.peers {
		if k.tokens+now.Sub(k.at).Seconds()*b.rate >= burst {
			delete(b.peers, name)
		}
	}
	if len(b.peers) >= b.cap {
		clear(b.peers)
	}
}

// news wakes the long polls when a release is published.
type news struct {
	mu sync.Mutex // guards ch
	ch chan struct{}
}

// next is closed at the next publication. Take it before reading the store.
func (n *news) next() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ch
}

func (n *news) publish() {
	n.mu.Lock()
	defer n.mu.Unlock()
	close(n.ch)
	n.ch = make(chan struct{})
}

// touches remembers which polls were noted lately, so that a poll is not a
// write each time.
type touches struct {
	every time.Duration

	mu   sync.Mutex // guards seen
	seen map[string]touch
}

type touch struct {
	channel string
	at      time.Time
}

// due reports whether a poll is to be noted, and takes it as noted.
func (t *touches) due(node, channel string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	last, ok := t.seen[node]
	if since := now.Sub(last.at); ok && last.channel == channel && since >= 0 && since < t.every {
		return false
	}
	if len(t.seen) >= maxPeers {
		clear(t.seen)
	}
	t.seen[node] = touch{channel, now}
	return true
}
