package call

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/node/tool"
	"github.com/autonomyops/autonomy/prepared"
)

// Request is one tool call as it came in, checked for form only, together with
// the room that the pipeline works in on its behalf.
//
// A door that serves many calls takes it from NewRequest and gives it back with
// Free once the answer has been written: Params are a view of the body it was
// decoded from, and the Answer of Do may hold views of this room. A Request is
// used for one call and by one goroutine at a time. The zero value works.
type Request struct {
	Kind      string
	Params    json.RawMessage // an object; the exact bytes are evaluated, recorded and executed
	Session   string
	CallID    string
	TimeoutMS int64 // 0: the tool's own
	DryRun    bool

	Caller      Caller // who calls, established by the listener, never by the body
	TraceParent string // W3C traceparent header, checked by ParseTraceParent

	// Progress takes the tool's reports while Do runs; nil when nobody listens.
	Progress func(tool.Progress)

	input    []byte            // policy input
	body     []byte            // of the decision record, without the input
	decision prepared.Decision // reused by the evaluator
	report   Report
}

// keptBytes is the largest room that goes back to the pool, in bytes: one huge
// call must not stay in memory for ever.
const keptBytes = 64 << 10

var requests = sync.Pool{New: func() any { return &Request{} }}

// NewRequest takes an empty Request from the pool.
func NewRequest() *Request { return requests.Get().(*Request) }

// Free gives r back to the pool. Neither r nor the Answer that Do gave for it
// may be used after.
func (r *Request) Free() {
	if cap(r.input)+cap(r.body) > keptBytes {
		return
	}
	*r = Request{input: r.input[:0], body: r.body[:0], decision: r.decision}
	requests.Put(r)
}

// Limits of a request's fields.
const (
	MaxKindBytes    = 128
	MaxSessionBytes = 256
	MaxCallIDBytes  = 128
	MaxTimeout      = 10 * time.Minute
)

// isKind reports whether s has the form tool.NAME[.NAME…], the names of a-z, 0-9, _ and -.
func isKind(s string) bool {
	rest, ok := strings.CutPrefix(s, "tool.")
	if !ok || len(s) > MaxKindBytes {
		return false
	}
	name := 0 // length of the name so far
	for i := range len(rest) {
		switch c := rest[i]; {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '_', c == '-':
			name++
		case c == '.' && name > 0:
			name = 0
		default:
			return false
		}
	}
	return name > 0
}

// Decode reads the body of POST /v1/tool in one pass. Params are a view of
// body. An error is for the caller to read.
func Decode(body []byte, r *Request) error {
	if err := strictjson.Object(body, r.member); err != nil {
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
		return errors.New(`"kind" is missing: name a tool, as in {"kind":"tool.echo","params":{}}`)
	case !isKind(r.Kind):
		return fmt.Errorf(`"kind" is no tool name: want tool.NAME in lower case, at most %d bytes`, MaxKindBytes)
	case r.Params[0] != '{':
		return errors.New(`"params" must be an object`)
	case len(r.Session) > MaxSessionBytes:
		return fmt.Errorf(`"session" is over %d bytes`, MaxSessionBytes)
	case len(r.CallID) > MaxCallIDBytes:
		return fmt.Errorf(`"call_id" is over %d bytes`, MaxCallIDBytes)
	case r.TimeoutMS < 0 || time.Duration(r.TimeoutMS) > MaxTimeout/time.Millisecond:
		return fmt.Errorf(`"timeout_ms" must be from 0 to %d`, MaxTimeout/time.Millisecond)
	}
	return nil
}

// member takes one member of the body. null is taken for a field left out.
func (r *Request) member(key, value []byte) error {
	if string(value) == "null" && string(key) != "params" && known(key) {
		return nil
	}
	switch string(key) {
	case "kind":
		return text("kind", value, &r.Kind)
	case "params":
		r.Params = value
	case "session":
		return text("session", value, &r.Session)
	case "call_id":
		return text("call_id", value, &r.CallID)
	case "timeout_ms":
		if c := value[0]; c != '-' && (c < '0' || c > '9') {
			return fmt.Errorf("timeout_ms: want integer, have %s", valueName(value))
		}
		n, err := strconv.ParseInt(string(value), 10, 64)
		switch {
		case errors.Is(err, strconv.ErrRange):
			n = math.MaxInt64 // Decode says what is allowed
		case err != nil:
			return fmt.Errorf("timeout_ms: want integer, have number %.40s", value)
		}
		r.TimeoutMS = n
	case "dry_run":
		if value[0] != 't' && value[0] != 'f' {
			return fmt.Errorf("dry_run: want boolean, have %s", valueName(value))
		}
		r.DryRun = value[0] == 't'
	default:
		return unknownKey(string(key))
	}
	return nil
}

// fields are the keys of a body.
var fields = []string{"kind", "params", "session", "call_id", "timeout_ms", "dry_run"}

func known(key []byte) bool { return slices.Contains(fields, string(key)) }

func text(key string, value []byte, dst *string) (err error) {
	if value[0] != '"' {
		return fmt.Errorf("%s: want string, have %s", key, valueName(value))
	}
	*dst, err = strictjson.Unquote(value)
	return err
}

// valueName names the type of a JSON value.
func valueName(value []byte) string {
	switch value[0] {
	case '{':
		return "object"
	case '[':
		return "array"
	case '"':
		return "string"
	case 't', 'f':
		return "boolean"
	case 'n':
		return "null"
	}
	return "number"
}

// trusted are keys that a caller might think it may set. They are ordinary
// unknown keys; naming them saves the caller a search.
var trusted = map[string]bool{"agent": true, "caller": true, "node": true, "release": true, "time": true, "time_ns": true}

func unknownKey(key string) error {
	if trusted[key] {
		return fmt.Errorf("%q is set by the node, never by the caller: leave it out", key)
	}
	for _, f := range fields {
		if strings.EqualFold(f, key) {
			return fmt.Errorf("unknown key %q: keys are case-sensitive, write %q", key, f)
		}
	}
	return fmt.Errorf("unknown key %q: there are %s", key, strings.Join(fields, ", "))
}

// ParseTraceParent reads a W3C traceparent. ok is false when it is absent or
// not of the form 00-{32 hex}-{16 hex}-{2 hex}: it is then ignored, as the
// recommendation says, never an error.
func ParseTraceParent(h string) (traceID [16]byte, spanID [8]byte, ok bool) {
	if len(h) < 55 || h[2] != '-' || h[35] != '-' || h[52] != '-' || h[:2] == "ff" || h[:2] == "00" && len(h) != 55 {
		return traceID, spanID, false
	}
	var flags [1]byte
	if !unhex(traceID[:], h[3:35]) || !unhex(spanID[:], h[36:52]) || !unhex(flags[:], h[53:55]) {
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
