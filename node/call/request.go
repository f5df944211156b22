package call

import (
	"encoding/json"
	"fmt"
	"regexp"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/node/tool"
)

// Request is one tool call as it came in, checked for form only.
type Request struct {
	Kind      string          `json:"kind"`
	Params    json.RawMessage `json:"params"` // an object; the exact bytes are evaluated, recorded and executed
	Session   string          `json:"session"`
	CallID    string          `json:"call_id"`
	TimeoutMS int64           `json:"timeout_ms"` // 0: the tool's own
	DryRun    bool            `json:"dry_run"`

	Caller      Caller `json:"-"` // who calls, established by the listener, never by the body
	TraceParent string `json:"-"` // W3C traceparent header, checked by ParseTraceParent

	// Progress takes the tool's reports while Do runs; nil when nobody listens.
	Progress func(tool.Progress) `json:"-"`
}

// Caller is the authenticated principal.
type Caller struct {
	Type string // unix, anonymous
	ID   string // uid:1000; loopback
}

// Limits of a request's fields.
const (
	MaxKindBytes    = 128
	MaxSessionBytes = 256
	MaxCallIDBytes  = 128
	MaxTimeout      = 10 * time.Minute
)

var kindPattern = regexp.MustCompile(`^tool(\.[a-z0-9_-]+)+$`)

// trusted are keys that a caller might think it may set. They are ordinary
// unknown keys to the decoder; naming them saves the caller a search.
var trusted = map[string]bool{"agent": true, "caller": true, "node": true, "release": true, "time": true, "time_ns": true}

// Decode reads the body of POST /v1/tool. An error is for the caller to read.
func Decode(body []byte, r *Request) error {
	if err := strictjson.CheckObject(body); err != nil {
		return err
	}
	if err := strictjson.Unmarshal(body, r); err != nil {
		var keys map[string]json.RawMessage
		if json.Unmarshal(body, &keys) == nil {
			for k := range keys {
				if trusted[k] {
					return fmt.Errorf("%q is set by the node, never by the caller: leave it out", k)
				}
			}
		}
		return err
	}
	return r.Check()
}

// Check bounds the fields that a caller gave, whichever door they came by, and
// sets missing params to {}. Do relies on it. An error is for the caller to read.
func (r *Request) Check() error {
	if len(r.Params) == 0 {
		r.Params = json.RawMessage("{}")
	}
	switch {
	case r.Kind == "":
		return fmt.Errorf(`"kind" is missing: name a tool, as in {"kind":"tool.echo","params":{}}`)
	case len(r.Kind) > MaxKindBytes || !kindPattern.MatchString(r.Kind):
		return fmt.Errorf(`"kind" is no tool name: want tool.NAME in lower case, at most %d bytes`, MaxKindBytes)
	case r.Params[0] != '{':
		return fmt.Errorf(`"params" must be an object`)
	case len(r.Session) > MaxSessionBytes:
		return fmt.Errorf(`"session" is over %d bytes`, MaxSessionBytes)
	case len(r.CallID) > MaxCallIDBytes:
		return fmt.Errorf(`"call_id" is over %d bytes`, MaxCallIDBytes)
	case r.TimeoutMS < 0 || time.Duration(r.TimeoutMS) > MaxTimeout/time.Millisecond:
		return fmt.Errorf(`"timeout_ms" must be from 0 to %d`, MaxTimeout/time.Millisecond)
	}
	return nil
}

// ParseTraceParent reads a W3C traceparent. ok is false when it is absent or
// not of the form 00-{32 hex}-{16 hex}-{2 hex}: it is then ignored, as the
// recommendation says, never an error.
func ParseTraceParent(h string) (traceID [16]byte, spanID [8]byte, ok bool) {
	if len(h) < 55 || h[2] != '-' || h[35] != '-' || h[52] != '-' || h[:2] == "ff" || h[:2] == "00" && len(h) != 55 {
		return traceID, spanID, false
	}
	if !unhex(traceID[:], h[3:35]) || !unhex(spanID[:], h[36:52]) {
		return [16]byte{}, [8]byte{}, false
	}
	return traceID, spanID, traceID != [16]byte{} && spanID != [8]byte{}
}

// unhex decodes lower-case hex only: upper case is invalid in a traceparent.
func unhex(dst []byte, src string) bool {
	for i := range dst {
		hi, lo := nibble(src[2*i]), nibble(src[2*i+1])
		if hi > 15 || lo > 15 {
			return false
		}
		dst[i] = hi<<4 | lo
	}
	return true
}

func nibble(c byte) byte {
	switch {
	case c >= '0' && c <= '9':
		return c - '0'
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10
	}
	return 255
}
