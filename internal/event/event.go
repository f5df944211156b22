// Package event names what the node records and the control plane stores: the
// event types, the OTLP attribute keys, and the native JSON shape of
// POST /v1/events. It is vocabulary only; node and cp both import it so that
// neither imports the other.
//
// One record of the node's log is one OTLP LogRecord:
//
//	event_name        event type, below
//	time_unix_nano    when it happened
//	severity_number   9 (INFO), 13 (WARN: deny, failed tool), 17 (ERROR)
//	body              string: the JSON object that belongs to the type
//	attributes        Attr… below; absent when empty
//	trace_id, span_id from traceparent, when the caller sent one
//
// The resource carries service.name = autonomy-node, service.version and
// service.instance.id = the node's id.
package event

import (
	"encoding/json"
	"time"
)

// Event types. A call that policy allowed leaves a decision and an action; one
// that policy refused leaves a decision only; one that enforcement refused
// after policy allowed it leaves a decision (allow) and an action (denied).
// All records of one call share audit_id.
const (
	Decision = "decision" // body: DecisionBody
	Action   = "action"   // body: ActionBody

	NodeStarted    = "node.started"    // body: version, addresses, recovery, assurance
	NodeStopped    = "node.stopped"    // clean shutdown
	NodeHeartbeat  = "node.heartbeat"  // body: status summary
	LogVoid        = "log.void"        // a sequence number whose record was cut off while it was written: nobody was told of it
	LogLost        = "log.lost"        // stands in for a record that a repair of the log found gone; body: first, last of them all
	LogRefused     = "log.refused"     // stands in for a record that the endpoint refused for ever; body: bytes, why
	NodeAssurance  = "node.assurance"  // the platform's level changed; body: was, is, refused
	PolicyLoaded   = "policy.loaded"   // an operator's local bundle became active
	PolicyFallback = "policy.fallback" // a slot cannot be used: which, why, what took its place
	PolicyOverride = "policy.override" // a policy that fails open may come into force: which fields and rules, who has allowed it

	ReleaseFound         = "release.found"         // a poll returned a release not seen before
	ReleaseSignature     = "release.signature"     // step 1; body: LifecycleBody
	ReleaseDigest        = "release.digest"        // step 2
	ReleaseFingerprint   = "release.fingerprint"   // step 3
	ReleaseCompatibility = "release.compatibility" // step 4
	ReleaseShadow        = "release.shadow"        // its policy is evaluated beside the one in force
	ReleaseActivated     = "release.activated"
	ReleaseRefused       = "release.refused" // body says which step and code

	CallerLimited  = "caller.limited"  // a caller ran into one of its limits, at most once a minute; body: LimitedBody
	CallerRefused  = "caller.refused"  // credentials that do not hold were shown, at most once a minute; body: counts since the last one
	CallersChanged = "callers.changed" // tokens, certificates, revocation list or callers file came into force anew; body: files, problems

	EvaluatorError = "error.evaluator" // policy evaluation failed: the call was denied
	ExportError    = "error.export"    // delivery is exhausted or was partly rejected
)

// Attribute keys of a LogRecord.
const (
	AttrEventID     = "autonomy.event_id" // only in events that are not from a log; see ID
	AttrSeq         = "autonomy.seq"      // int: dense record number within one log
	AttrLogID       = "autonomy.log_id"   // 16 hex digits, made with the log
	AttrClass       = "autonomy.class"    // error, decision, action, lifecycle
	AttrAuditID     = "autonomy.audit_id"
	AttrDecision    = "autonomy.decision" // allow, deny, pending
	AttrOutcome     = "autonomy.outcome"  // ok, error, timeout, killed, denied
	AttrKind        = "autonomy.kind"     // tool kind
	AttrReleaseID   = "autonomy.release_id"
	AttrFingerprint = "autonomy.fingerprint"

	ServiceName         = "autonomy-node"
	ResourceServiceName = "service.name"
	ResourceVersion     = "service.version"
	ResourceInstance    = "service.instance.id"
)

// ID is the event_id of a record: a node's log is made once, its sequence
// numbers are never used twice, so the pair names a record for ever, also when
// a node is set up anew under its old name.
func ID(logID string, seq uint64) string {
	var b [64]byte
	return string(AppendID(b[:0], logID, seq))
}

// IDLen is the length of an ID.
func IDLen(logID string) int { return len(logID) + 1 + 16 }

// AppendID appends ID(logID, seq).
func AppendID(b []byte, logID string, seq uint64) []byte {
	const hexDigits = "0123456789abcdef"
	b = append(b, logID...)
	b = append(b, '-')
	for shift := 60; shift >= 0; shift -= 4 {
		b = append(b, hexDigits[seq>>shift&15])
	}
	return b
}

// Event is the native JSON shape (contract.md, POST /v1/events).
type Event struct {
	EventID     string          `json:"event_id"`
	EventType   string          `json:"event_type"`
	NodeID      string          `json:"node_id"`
	Timestamp   time.Time       `json:"timestamp"`
	Seq         uint64          `json:"seq,omitempty"`    // 0: not from a log
	LogID       string          `json:"log_id,omitempty"` // which log Seq counts in
	ReleaseID   string          `json:"release_id,omitempty"`
	Fingerprint string          `json:"fingerprint,omitempty"`
	AuditID     string          `json:"audit_id,omitempty"`
	Decision    string          `json:"decision,omitempty"`
	Outcome     string          `json:"outcome,omitempty"`
	Kind        string          `json:"kind,omitempty"`
	Class       string          `json:"class,omitempty"`
	TraceID     string          `json:"trace_id,omitempty"` // 32 hex digits
	Body        json.RawMessage `json:"body,omitempty"`     // an object
}

// Reason is one reason of a decision.
type Reason struct {
	Code    string `json:"code,omitempty"`
	Message string `json:"message"`
}

// DecisionBody is the body of a Decision. Input is exactly the bytes that were
// evaluated: with the bundle named by PolicyDigest they give this decision
// again (INV-17). Where Redacted names something it is not: what stood there is
// replaced, and the decision cannot be computed again from the record.
type DecisionBody struct {
	Layer        string          `json:"layer,omitempty"` // who denied: policy, assurance
	Reasons      []Reason        `json:"reasons,omitempty"`
	PolicyRef    string          `json:"policy_ref,omitempty"`    // name@version
	PolicyDigest string          `json:"policy_digest,omitempty"` // sha256: of the bundle file
	EvalNS       int64           `json:"eval_ns"`                 // nanoseconds in the evaluator
	CallID       string          `json:"call_id,omitempty"`
	ParamsDigest string          `json:"params_digest,omitempty"` // with CallID: keyed with the node's secret, of kind and params
	DryRun       bool            `json:"dry_run,omitempty"`       // nothing was executed by this node
	Redacted     []string        `json:"redacted,omitempty"`      // JSON Pointers into Input
	Input        json.RawMessage `json:"input"`
}

// ActionBody is the body of an Action. Output is the tool's, unless it is too
// long to be kept or the policy redacts: then its digest and length stand in,
// "sha256:" of a long one, keyed ("hmac-sha256:") of a redacted one.
type ActionBody struct {
	Layer      string          `json:"layer,omitempty"` // runtime, when enforcement refused
	Reasons    []Reason        `json:"reasons,omitempty"`
	DurationNS int64           `json:"duration_ns"`
	ErrorCode  string          `json:"error_code,omitempty"`
	Error      string          `json:"error,omitempty"`
	Output     json.RawMessage `json:"output,omitempty"`

	OutputDigest string `json:"output_digest,omitempty"`
	OutputBytes  int64  `json:"output_bytes,omitempty"`

	Sandbox json.RawMessage `json:"sandbox,omitempty"` // what a program used, and was refused
}

// LimitedBody is the body of a CallerLimited.
type LimitedBody struct {
	CallerType string `json:"caller_type"`
	CallerID   string `json:"caller_id"`
	Limit      string `json:"limit"` // rate, concurrent, budget
	Max        string `json:"max"`   // for people
}

// LifecycleBody is the body of the release.* events.
type LifecycleBody struct {
	ReleaseID  string   `json:"release_id,omitempty"`
	Channel    string   `json:"channel,omitempty"`
	Sequence   uint64   `json:"sequence,omitempty"`
	Result     string   `json:"result"` // passed, failed, skipped
	Code       string   `json:"code,omitempty"`
	Detail     string   `json:"detail,omitempty"`
	Checked    []string `json:"checked,omitempty"`
	NotChecked []string `json:"not_checked,omitempty"`
}
