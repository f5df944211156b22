package call

import "time"

// Report is what is known of a call once it has its answer. It belongs to the
// pipeline: who gets one copies what it keeps.
type Report struct {
	Request *Request
	Answer  Answer
	Start   time.Time

	// Time spent; 0 where the call did not come so far.
	Total   time.Duration
	Eval    time.Duration // in the policy evaluator
	Durable time.Duration // waiting for the decision to be on disk
	Tool    time.Duration // in the tool
}

// Tracer makes spans of calls.
type Tracer interface {
	// Start begins the span of a call. It may read the caller's trace context
	// from r, and returns the one to pass on and to record.
	Start(r *Request, at time.Time) (Span, string)
}

// Span is one call in a trace.
type Span interface {
	// End ends the span. It is called once.
	End(*Report)
}
