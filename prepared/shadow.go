package prepared

import (
	"bytes"
	"encoding/json"
	"errors"
	"sync/atomic"
)

// DefaultShadowEvery is SlotsOptions.ShadowEvery of zero: at three microseconds
// an evaluation and a hundred for OPA's evaluator, one in 16 costs a busy node a
// few percent of one core.
const DefaultShadowEvery = 16

// shadow evaluates a candidate on a sample of the calls of the policy in force
// and counts how the answers differ.
//
// The call does not wait for it. One evaluation runs at a time, in a goroutine
// of its own, so a candidate that loops costs one core at most and holds one
// copy of one input; a call that would be sampled meanwhile is counted as
// skipped. An answer goes into the counters and nowhere else.
type shadow struct {
	program *Program
	slots   *Slots
	every   uint64

	calls atomic.Uint64
	busy  atomic.Bool
	sampled, same, stricter, looser, other, failed,
	skipped atomic.Uint64
}

// ShadowStats count what a candidate answered beside the policy in force.
type ShadowStats struct {
	Sampled  uint64 `json:"sampled"`  // calls that both have answered
	Same     uint64 `json:"same"`     // same verdict, limits, approval and redaction
	Stricter uint64 `json:"stricter"` // it denies, or asks a human, where the other one allows
	Looser   uint64 `json:"looser"`   // it allows where the other one does not
	Other    uint64 `json:"other"`    // same verdict, other limits, approval or redaction; reasons are not compared
	Failed   uint64 `json:"failed"`   // it gave no valid answer, which is a deny: also counted above
	Skipped  uint64 `json:"skipped"`  // due for the sample while the one before still ran
}

func (s *shadow) stats() ShadowStats {
	return ShadowStats{Sampled: s.sampled.Load(), Same: s.same.Load(), Stricter: s.stricter.Load(), Looser: s.looser.Load(),
		Other: s.other.Load(), Failed: s.failed.Load(), Skipped: s.skipped.Load()}
}

// offer samples a call that the policy in force has answered with d and err. It
// keeps neither input nor d: both belong to the caller.
func (s *shadow) offer(input []byte, d *Decision, err error) {
	if (s.calls.Add(1)-1)%s.every != 0 || errors.Is(err, ErrBudget) { // a call that was cut short says nothing
		return
	}
	if !s.busy.CompareAndSwap(false, true) {
		s.skipped.Add(1)
		return
	}
	in, theirs := bytes.Clone(input), verdictOf(d)
	s.slots.running.Go(func() {
		defer s.busy.Store(false)
		d, err := s.program.Eval(s.slots.shadows, in)
		if s.slots.shadows.Err() != nil {
			return // Close
		}
		if err != nil {
			s.failed.Add(1)
		}
		ours := verdictOf(&d)
		switch {
		case ours.rank > theirs.rank:
			s.looser.Add(1)
		case ours.rank < theirs.rank:
			s.stricter.Add(1)
		case !bytes.Equal(ours.limits, theirs.limits):
			s.other.Add(1)
		default:
			s.same.Add(1)
		}
		s.sampled.Add(1)
	})
}

// verdict is what of a decision is compared.
type verdict struct {
	rank   int    // 0 deny, 1 ask a human, 2 allow
	limits []byte // constraints, approval and redaction as JSON; of a deny none
}

func verdictOf(d *Decision) verdict {
	switch {
	case !d.Allow:
		return verdict{}
	case d.Approval != nil:
		return verdict{rank: 1, limits: limitsOf(d)}
	}
	return verdict{rank: 2, limits: limitsOf(d)}
}

func limitsOf(d *Decision) []byte {
	limits, err := json.Marshal([]any{d.Constraints, d.Approval, d.Redact})
	if err != nil {
		return []byte(err.Error()) // approval is JSON that decisionOf made: does not happen
	}
	return limits
}
