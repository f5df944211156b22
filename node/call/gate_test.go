package call

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func who(id string) Caller { return Caller{Type: "t", ID: id} }

// TestGateFair: one principal fills its queue; another that comes later is
// served after one call of it, not after all.
func TestGateFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(GateOptions{MaxRunning: 1, MaxWaiting: 20, MaxWaitingEach: 10, MaxWait: time.Hour})
		if err := g.Enter(t.Context(), who("greedy")); err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var order []string
		call := func(id string) {
			go func() {
				if err := g.Enter(t.Context(), who(id)); err != nil {
					t.Errorf("%s: %v", id, err)
					return
				}
				mu.Lock()
				order = append(order, id)
				mu.Unlock()
				g.Leave()
			}()
			synctest.Wait()
		}
		for range 5 {
			call("greedy")
		}
		call("modest")
		call("other")
		call("modest")
		g.Leave()
		synctest.Wait()
		want := []string{"greedy", "modest", "other", "greedy", "modest", "greedy", "greedy", "greedy"}
		if !slices.Equal(order, want) {
			t.Errorf("served %q, want %q", order, want)
		}
		if g.Running() != 0 || g.waiting.Load() != 0 || len(g.queues) != 0 || g.turn != nil {
			t.Errorf("left behind: %d running, %d waiting, %d queues", g.Running(), g.waiting.Load(), len(g.queues))
		}
	})
}

// TestGateBounds: the queue of one, all queues together, the wait, the context.
func TestGateBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(GateOptions{MaxRunning: 1, MaxWaiting: 3, MaxWaitingEach: 2, MaxWait: time.Second})
		if err := g.Enter(t.Context(), who("a")); err != nil {
			t.Fatal(err)
		}
		ctx, leave := context.WithCancel(t.Context())
		got := make(chan error, 3)
		for _, id := range []string{"a", "a", "b"} {
			go func() { got <- g.Enter(ctx, who(id)) }()
			synctest.Wait()
		}
		if err := g.Enter(t.Context(), who("a")); !errors.Is(err, ErrQueueFull) {
			t.Errorf("a third of one: %v", err)
		}
		if err := g.Enter(t.Context(), who("c")); !errors.Is(err, ErrQueueFull) {
			t.Errorf("a fourth of all: %v", err)
		}
		time.Sleep(time.Second)
		for range 3 {
			if err := <-got; !errors.Is(err, ErrQueueSlow) {
				t.Errorf("after the wait: %v", err)
			}
		}
		go func() { got <- g.Enter(ctx, who("b")) }()
		synctest.Wait()
		leave()
		if err := <-got; !errors.Is(err, context.Canceled) {
			t.Errorf("the caller left: %v", err)
		}
		if g.waiting.Load() != 0 || len(g.queues) != 0 {
			t.Errorf("%d wait, %d queues", g.waiting.Load(), len(g.queues))
		}
		g.Leave()
		short := true
		o := *g.o.Load()
		o.Short = func() bool { return short }
		g.Set(o)
		if err := g.Enter(t.Context(), who("a")); !errors.Is(err, ErrMemoryShort) {
			t.Errorf("short of memory: %v", err)
		}
		short = false
		if err := g.Enter(t.Context(), who("a")); err != nil {
			t.Error(err)
		}
		if g.full.Value() != 2 || g.slow.Value() != 3 || g.memory.Value() != 1 {
			t.Errorf("counted %d full, %d slow, %d memory", g.full.Value(), g.slow.Value(), g.memory.Value())
		}
	})
}

// TestGateRace: many come and go at once, some give up; the limit is never
// passed and no place is lost.
func TestGateRace(t *testing.T) {
	const places = 3
	g := newGate(GateOptions{MaxRunning: places, MaxWaiting: 64, MaxWait: 50 * time.Millisecond})
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for n := range 400 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n%7)*20*time.Microsecond+1)
				if err := g.Enter(ctx, who(fmt.Sprint(i%5))); err == nil {
					if r := g.Running(); r < 1 || r > places {
						t.Errorf("%d running", r)
					}
					g.Leave()
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if g.Running() != 0 || g.waiting.Load() != 0 || len(g.queues) != 0 {
		t.Fatalf("left behind: %d running, %d waiting, %d queues", g.Running(), g.waiting.Load(), len(g.queues))
	}
	for range places {
		if err := g.Enter(t.Context(), who("x")); err != nil {
			t.Fatal(err)
		}
	}
}

// TestGateAllocations: a place that is free costs nothing.
func TestGateAllocations(t *testing.T) {
	g := newGate(GateOptions{})
	if n := testing.AllocsPerRun(100, func() {
		if err := g.Enter(t.Context(), who("x")); err != nil {
			t.Fatal(err)
		}
		g.Leave()
	}); n > 1 { // t.Context may
		t.Errorf("%.0f allocations", n)
	}
}
