package auth

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// Which limit refused a call.
const (
	LimitRate       = "rate"
	LimitConcurrent = "concurrent"
	LimitBudget     = "budget"
)

// LimitError says that a caller may not make one more call now.
type LimitError struct {
	Limit      string        // one of the above
	Max        string        // for people: "50 calls per second"
	RetryAfter time.Duration // when it is worth trying again
	First      bool          // of this caller within noteEvery: worth a record
}

func (e *LimitError) Error() string {
	return fmt.Sprintf("this caller's limit is %s: try again in %s", e.Max, e.RetryAfter.Round(time.Millisecond))
}

// ErrBudget wraps the error of a budget that cannot be written down. A call that
// cannot be counted is not made.
var ErrBudget = errors.New("the caller's daily budget cannot be recorded")

// noteEvery is how often a caller that runs into its limits is worth a record.
const noteEvery = time.Minute

// maxShares bounds how many callers are told apart by their limits. Beyond it
// the rest share one share: that is unfair among them and to nobody else.
const maxShares = 8192

// Limits holds each caller to its LimitSet.
//
// The rate is a generic cell rate algorithm: one number per caller, the time at
// which its bucket is full again, moved on by compare-and-swap. A new limit in
// the callers file holds from the next call on. The daily budget is counted in
// memory and written ahead in steps (see budget.go).
type Limits struct {
	callers func() *Callers
	now     func() time.Time
	start   time.Time
	budget  *budget

	overRate, overConcurrent, overBudget atomic.Uint64

	shares atomic.Pointer[map[string]*Share] // copied on write
	mu     sync.Mutex                        // writers of shares
	rest   *Share
}

// Share is one caller's use of its limits.
type Share struct {
	key     string
	full    atomic.Int64 // nanoseconds since Limits.start at which the bucket is full again
	running atomic.Int64
	noted   atomic.Int64 // as full: when a refusal was last worth a record
	day     dayCount
}

// NewLimits makes the limits that callers gives at each call. stateFile keeps
// the daily budgets; a damaged one is an error that wraps ErrDamaged.
func NewLimits(callers func() *Callers, stateFile string, now func() time.Time) (*Limits, error) {
	if now == nil {
		now = time.Now
	}
	l := &Limits{callers: callers, now: now, start: now(), rest: &Share{key: "*"}}
	l.shares.Store(&map[string]*Share{})
	var err error
	l.budget, err = openBudget(stateFile)
	return l, err
}

// Enter asks for one call of c. A nil error means that Leave must be called
// once when the call has ended; the Share may be nil, which Leave takes. An
// error is a *LimitError, or wraps ErrBudget.
func (l *Limits) Enter(c Caller) (*Share, error) {
	set := l.callers().limits(c.ID)
	if set == (LimitSet{}) {
		return nil, nil
	}
	s := l.share(c.ID)
	now := l.now()
	if set.Concurrent > 0 {
		if s.running.Add(1) > int64(set.Concurrent) {
			s.running.Add(-1)
			return nil, l.refuse(s, now, LimitConcurrent, fmt.Sprintf("%d calls at one time", set.Concurrent), time.Second)
		}
	} else {
		s.running.Add(1)
	}
	if wait := s.take(int64(now.Sub(l.start)), set); wait > 0 {
		s.running.Add(-1)
		return nil, l.refuse(s, now, LimitRate, fmt.Sprintf("%v calls per second", set.Rate), wait)
	}
	if set.PerDay > 0 {
		ok, err := l.budget.spend(s, set.PerDay, now)
		if err != nil {
			s.running.Add(-1)
			return nil, fmt.Errorf("%w: %w", ErrBudget, err)
		}
		if !ok {
			s.running.Add(-1)
			y, m, d := now.UTC().Date()
			return nil, l.refuse(s, now, LimitBudget, fmt.Sprintf("%d calls per day (UTC)", set.PerDay),
				time.Date(y, m, d+1, 0, 0, 0, 0, time.UTC).Sub(now))
		}
	}
	return s, nil
}

// Refused is how many calls each limit has refused so far.
func (l *Limits) Refused() map[string]uint64 {
	return map[string]uint64{LimitRate: l.overRate.Load(), LimitConcurrent: l.overConcurrent.Load(), LimitBudget: l.overBudget.Load()}
}

// Leave ends a call.
func (s *Share) Leave() {
	if s != nil {
		s.running.Add(-1)
	}
}

// take moves the bucket on by one call, or says how long to wait for one.
func (s *Share) take(now int64, set LimitSet) (wait time.Duration) {
	if set.Rate == 0 {
		return 0
	}
	each := int64(float64(time.Second) / set.Rate)
	burst := int64(set.Burst)
	if burst == 0 {
		burst = int64(math.Max(1, math.Floor(set.Rate)))
	}
	for {
		full := s.full.Load()
		next := max(full, now) + each
		if over := next - now - burst*each; over > 0 {
			return time.Duration(over)
		}
		if s.full.CompareAndSwap(full, next) {
			return 0
		}
	}
}

func (l *Limits) refuse(s *Share, now time.Time, limit, most string, wait time.Duration) *LimitError {
	switch limit {
	case LimitRate:
		l.overRate.Add(1)
	case LimitConcurrent:
		l.overConcurrent.Add(1)
	case LimitBudget:
		l.overBudget.Add(1)
	}
	e := &LimitError{Limit: limit, Max: most, RetryAfter: wait}
	at := int64(now.Sub(l.start)) + 1 // 0 means never
	if last := s.noted.Load(); (last == 0 || at-last >= int64(noteEvery)) && s.noted.CompareAndSwap(last, at) {
		e.First = true
	}
	return e
}

// share finds the caller's share, or makes one.
func (l *Limits) share(key string) *Share {
	if s := (*l.shares.Load())[key]; s != nil {
		return s
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	old := *l.shares.Load()
	if s := old[key]; s != nil {
		return s
	}
	next := maps.Clone(old)
	if len(next) >= maxShares {
		// Those who are idle and owe nothing are as good as new.
		now := l.now()
		maps.DeleteFunc(next, func(_ string, s *Share) bool {
			return s.running.Load() == 0 && s.full.Load() <= int64(now.Sub(l.start)) && !s.day.used(now)
		})
		if len(next) >= maxShares {
			return l.rest
		}
	}
	s := &Share{key: key}
	next[key] = s
	l.shares.Store(&next)
	return s
}
