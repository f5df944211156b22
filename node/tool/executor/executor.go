// Package executor is the vocabulary that a tool and its caller share: what is
// asked (Request), what came of it (Result), who does it (Executor). The kinds
// of tools stand beside it (echotool, exectool, httptool, fstool) and import
// nothing else of the node; package tool, one level up, builds them from
// tools.yaml and gives these types to node/call under its own name.
package executor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/autonomyops/autonomy/internal/constraint"
)

// Request is one call that policy allowed and whose decision record is
// durable. The caller owns it; an Executor keeps neither it nor Params after
// Execute returns.
type Request struct {
	AuditID     string
	Kind        string
	Params      []byte        // the JSON object that was evaluated, exactly those bytes
	Timeout     time.Duration // what the caller asked for; 0: the tool's own limit
	Constraints constraint.Constraints
	Traceparent string // W3C Trace Context, passed on where the tool's protocol carries it; "" when none

	// Progress takes what a running tool reports about itself. nil: nobody
	// listens. It may block for as long as the listener does, and is not called
	// after Execute has returned.
	Progress func(Progress)
}

// Progress is how far a call is. It comes from the tool and is not to be
// trusted; whoever makes one bounds Message to MaxProgressMessage bytes of
// valid UTF-8.
type Progress struct {
	Done    float64 // rises from report to report
	Total   float64 // 0: unknown
	Message string
}

// MaxProgressMessage bounds Progress.Message, in bytes. 1 KiB.
const MaxProgressMessage = 1 << 10

// Outcome says how a call that was started, or refused at the last step, ended.
// The strings are part of the contract and of the records.
type Outcome string

// Outcomes.
const (
	OK      Outcome = "ok"
	Error   Outcome = "error"   // it ran and failed; Code and Message say why
	Timeout Outcome = "timeout" // its time was up; it was stopped
	Killed  Outcome = "killed"  // the caller went away or the node stops; it was stopped
	Denied  Outcome = "denied"  // enforcement refused what policy had allowed
)

// Result is what came of a call.
type Result struct {
	Outcome Outcome
	Output  []byte // a JSON object in valid UTF-8, at most MaxOutput bytes; nil when there is none
	Code    string // of an error, timeout, kill or denial: stable, for programs
	Message string // the same for a person; never holds a secret

	// Confinement is a JSON object in valid UTF-8 for the action record: what the
	// call used, and what the sandbox refused it. nil when there was none.
	Confinement []byte
}

// MaxOutput is the largest Result.Output, in bytes, whatever a tool is
// configured to: an output goes into one log record and one answer. 1 MiB.
const MaxOutput = 1 << 20

// Executor runs one kind of tool.
type Executor interface {
	// Execute runs the call and returns when everything it started has ended.
	// It honours ctx: its end stops the call (Timeout when the deadline
	// passed, Killed otherwise). It is safe for concurrent use.
	Execute(ctx context.Context, r *Request) Result
}

// Fail is a Result for a call that ran into an error.
func Fail(code, message string) Result { return Result{Outcome: Error, Code: code, Message: message} }

// Deny is a Result for a call that enforcement refused.
func Deny(code, message string) Result { return Result{Outcome: Denied, Code: code, Message: message} }

// Stopped is the Result for a call whose context has ended.
func Stopped(ctx context.Context) Result {
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) || errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return Result{Outcome: Timeout, Code: "timeout", Message: "the tool was stopped: its time was up"}
	}
	return Result{Outcome: Killed, Code: "canceled", Message: "the tool was stopped: the call was cancelled"}
}

// Encode writes v as the JSON of a Result.Output: no HTML escaping, no newline.
// Strings in v must be valid UTF-8, or they are altered.
func Encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimRight(b.Bytes(), "\n"), nil
}
