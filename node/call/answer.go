package call

import (
	"encoding/json"
	"strconv"
	"time"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/strictjson"
)

// Layers that can deny.
const (
	LayerRequest   = "request"
	LayerPolicy    = "policy"
	LayerRuntime   = "runtime"
	LayerAudit     = "audit"
	LayerAssurance = "assurance"
)

// Answer is what a caller gets: the HTTP status and the fields of the body
// (contract.md, POST /v1/tool). Empty fields are left out.
type Answer struct {
	Status    int
	Decision  string // allow, deny
	Layer     string
	Code      string
	Reason    string
	Reasons   []event.Reason
	AuditID   string
	PolicyRef string
	Outcome   string // ok, error, timeout, killed
	Output    json.RawMessage
	ErrCode   string
	ErrMsg    string
	DryRun    bool
	Verdict   *Verdict // of a Query that was decided and recorded
	Replayed  bool     // sent as header Idempotent-Replay: true

	RetryAfter time.Duration // sent as header Retry-After in whole seconds; 0: not sent, or the door's default
}

// Verdict is a policy's decision for a caller that enforces it itself.
type Verdict struct {
	Allow       bool
	Reasons     []event.Reason
	Constraints constraint.Constraints
	Redact      []string
}

func deny(status int, layer, code, reason string) Answer {
	return Answer{Status: status, Decision: "deny", Layer: layer, Code: code, Reason: reason}
}

// AppendJSON appends the body.
func (a *Answer) AppendJSON(b []byte) []byte {
	b = append(b, `{"decision":`...)
	b = strictjson.AppendString(b, a.Decision)
	b = appendField(b, "layer", a.Layer)
	b = appendField(b, "code", a.Code)
	b = appendField(b, "reason", a.Reason)
	if len(a.Reasons) > 0 {
		b = append(b, `,"reasons":`...)
		b = appendReasons(b, a.Reasons)
	}
	b = appendField(b, "audit_id", a.AuditID)
	b = appendField(b, "policy_ref", a.PolicyRef)
	if a.DryRun {
		b = append(b, `,"dry_run":true`...)
	}
	b = appendField(b, "outcome", a.Outcome)
	if len(a.Output) > 0 {
		b = append(b, `,"output":`...)
		b = append(b, a.Output...)
	}
	if a.ErrCode != "" || a.ErrMsg != "" {
		b = append(b, `,"error":{"code":`...)
		b = strictjson.AppendString(b, a.ErrCode)
		b = append(b, `,"message":`...)
		b = strictjson.AppendString(b, a.ErrMsg)
		b = append(b, '}')
	}
	return append(b, '}', '\n')
}

func appendField(b []byte, key, val string) []byte {
	if val == "" {
		return b
	}
	b = append(b, ',', '"')
	b = append(b, key...)
	b = append(b, '"', ':')
	return strictjson.AppendString(b, val)
}

func appendStrings(b []byte, list []string) []byte {
	b = append(b, '[')
	for i, s := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = strictjson.AppendString(b, s)
	}
	return append(b, ']')
}

func appendInt(b []byte, key string, val int64) []byte {
	b = append(b, ',', '"')
	b = append(b, key...)
	b = append(b, '"', ':')
	return strconv.AppendInt(b, val, 10)
}

func appendReasons(b []byte, rs []event.Reason) []byte {
	b = append(b, '[')
	for i, r := range rs {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, '{')
		if r.Code != "" {
			b = append(b, `"code":`...)
			b = strictjson.AppendString(b, r.Code)
			b = append(b, ',')
		}
		b = append(b, `"message":`...)
		b = strictjson.AppendString(b, r.Message)
		b = append(b, '}')
	}
	return append(b, ']')
}
