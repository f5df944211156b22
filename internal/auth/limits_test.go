package auth

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

type clock struct{ atomic.Int64 }

func (c *clock) now() time.Time          { return day0.Add(time.Duration(c.Load())) }
func (c *clock) advance(d time.Duration) { c.Add(int64(d)) }

func limits(t *testing.T, c *clock, set LimitSet, dir string) *Limits {
	t.Helper()
	callers := &Callers{Defaults: set}
	l, err := NewLimits(func() *Callers { return callers }, filepath.Join(dir, "budget.json"), c.now)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func enter(t *testing.T, l *Limits, id string) *LimitError {
	t.Helper()
	s, err := l.Enter(Caller{Type: Token, ID: id})
	var le *LimitError
	if err != nil && !errors.As(err, &le) {
		t.Fatal(err)
	}
	if err == nil {
		s.Leave()
	}
	return le
}

func TestRate(t *testing.T) {
	c := &clock{}
	l := limits(t, c, LimitSet{Rate: 10, Burst: 3}, t.TempDir())
	for range 3 {
		if e := enter(t, l, "a"); e != nil {
			t.Fatal(e)
		}
	}
	e := enter(t, l, "a")
	if e == nil || e.Limit != LimitRate || e.RetryAfter != 100*time.Millisecond || !e.First {
		t.Fatalf("%+v", e)
	}
	if e := enter(t, l, "a"); e == nil || e.First {
		t.Errorf("the next refusal: %+v", e)
	}
	if e := enter(t, l, "b"); e != nil {
		t.Errorf("another caller: %v", e)
	}
	// Who waits as told gets in; in the long run ten a second.
	c.advance(e.RetryAfter)
	if e := enter(t, l, "a"); e != nil {
		t.Error(e)
	}
	n := 0
	for range 1000 {
		c.advance(10 * time.Millisecond)
		if enter(t, l, "a") == nil {
			n++
		}
	}
	if n != 100 {
		t.Errorf("%d calls in ten seconds, want 100", n)
	}
	c.advance(time.Hour)
	for i := range 4 {
		if e := enter(t, l, "a"); (e == nil) != (i < 3) {
			t.Errorf("call %d after an idle hour: %v", i, e)
		} else if e != nil && !e.First {
			t.Error("a refusal an hour later is worth a record again")
		}
	}
}

func TestConcurrent(t *testing.T) {
	l := limits(t, &clock{}, LimitSet{Concurrent: 2}, t.TempDir())
	who := Caller{Type: Unix, ID: "uid:1"}
	var held []*Share
	for range 2 {
		s, err := l.Enter(who)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, s)
	}
	if e := enter(t, l, who.ID); e == nil || e.Limit != LimitConcurrent {
		t.Errorf("%+v", e)
	}
	held[0].Leave()
	if e := enter(t, l, who.ID); e != nil {
		t.Error(e)
	}
	// Under contention never more than two run, and no place is lost.
	var wg sync.WaitGroup
	var most, running, ran atomic.Int64
	for range 16 {
		wg.Go(func() {
			for range 500 {
				s, err := l.Enter(who)
				if err != nil {
					continue
				}
				if n := running.Add(1); n > most.Load() {
					most.Store(n)
				}
				ran.Add(1)
				running.Add(-1)
				s.Leave()
			}
		})
	}
	wg.Wait()
	if most.Load() > 1 || ran.Load() == 0 {
		t.Errorf("%d at one time beside the one held, %d in all", most.Load(), ran.Load())
	}
	if e := enter(t, l, who.ID); e != nil {
		t.Errorf("a place was lost: %v", e)
	}
}

func TestNoLimitsCostNothing(t *testing.T) {
	l := limits(t, &clock{}, LimitSet{}, t.TempDir())
	who := Caller{Type: Token, ID: "a"}
	if n := testing.AllocsPerRun(100, func() {
		s, err := l.Enter(who)
		if err != nil || s != nil {
			t.Fatal(s, err)
		}
		s.Leave()
	}); n != 0 {
		t.Errorf("%v allocations without limits", n)
	}
	l = limits(t, &clock{}, LimitSet{Rate: 1e6, Burst: 1e6, Concurrent: 5}, t.TempDir())
	if n := testing.AllocsPerRun(100, func() {
		s, err := l.Enter(who)
		if err != nil {
			t.Fatal(err)
		}
		s.Leave()
	}); n != 0 {
		t.Errorf("%v allocations with limits", n)
	}
}

// TestBudget: however often the node is killed, a caller does not get more than
// its budget of a day, and loses at most one step to each kill.
func TestBudget(t *testing.T) {
	const perDay, kills = 1000, 20
	dir, c := t.TempDir(), &clock{}
	made := 0
	for range kills {
		l := limits(t, c, LimitSet{PerDay: perDay}, dir) // the former one was killed: nothing is written at its end
		for range perDay / kills / 2 {
			if enter(t, l, "a") == nil {
				made++
			}
		}
	}
	l := limits(t, c, LimitSet{PerDay: perDay}, dir)
	var e *LimitError
	for range perDay + 1 {
		if e = enter(t, l, "a"); e != nil {
			break
		}
		made++
	}
	if made > perDay || made < perDay-kills*(perDay/budgetSteps) {
		t.Errorf("%d calls of a budget of %d with %d kills", made, perDay, kills)
	}
	if e == nil || e.Limit != LimitBudget || e.RetryAfter != 12*time.Hour {
		t.Errorf("%+v", e)
	}
	if e := enter(t, l, "b"); e != nil {
		t.Errorf("another caller: %v", e)
	}
	// A clock that goes back gives nothing; the next day does.
	c.advance(-48 * time.Hour)
	if e := enter(t, limits(t, c, LimitSet{PerDay: perDay}, dir), "a"); e == nil {
		t.Error("the clock went back and the budget is new")
	}
	c.advance(48*time.Hour + 12*time.Hour)
	if e := enter(t, limits(t, c, LimitSet{PerDay: perDay}, dir), "a"); e != nil {
		t.Errorf("the next day: %v", e)
	}
	if e := enter(t, l, "a"); e != nil {
		t.Errorf("the next day, in one run: %v", e)
	}
}

func TestBudgetFailsClosed(t *testing.T) {
	dir, c := t.TempDir(), &clock{}
	l := limits(t, c, LimitSet{PerDay: 10}, dir)
	if e := enter(t, l, "a"); e != nil {
		t.Fatal(e)
	}
	// A budget that cannot be written down is not spent.
	file := filepath.Join(dir, "budget.json")
	if err := errors.Join(os.Remove(file), os.MkdirAll(filepath.Join(file, "in the way"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Enter(Caller{ID: "a"}); !errors.Is(err, ErrBudget) {
		t.Errorf("%v", err)
	}
	if err := os.RemoveAll(file); err != nil {
		t.Fatal(err)
	}
	if e := enter(t, l, "a"); e != nil {
		t.Errorf("after it was mended: %v", e)
	}
	for _, text := range []string{"", "{", `{"day":"x","up_to":{}}`, `{"day":"2026-03-01","up_to":{"a":"1"}}`} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := NewLimits(func() *Callers { return &Callers{} }, file, c.now); !errors.Is(err, ErrDamaged) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestManyCallers: names come and go, memory stays, and nobody gets in for
// nothing.
func TestManyCallers(t *testing.T) {
	c := &clock{}
	l := limits(t, c, LimitSet{Rate: 1, Burst: 1}, t.TempDir())
	old := map[string]*Share{}
	for i := range maxShares {
		old[fmt.Sprint(i)] = &Share{key: fmt.Sprint(i)}
		old[fmt.Sprint(i)].full.Store(int64(time.Hour)) // busy for an hour
	}
	l.shares.Store(&old)
	if e := enter(t, l, "x"); e != nil {
		t.Fatal(e)
	}
	if e := enter(t, l, "y"); e == nil {
		t.Error("beyond the bound callers do not share one share")
	}
	c.advance(2 * time.Hour)
	if e := enter(t, l, "y"); e != nil {
		t.Error(e)
	}
	if n := len(*l.shares.Load()); n != 1 {
		t.Errorf("%d shares are kept, want that of y", n)
	}
}
