// Package call is the pipeline that every tool call goes through, whatever
// door it came in by. It is the only place where the order stands:
//
//	check → validate → evaluate → decision durable → execute → action → answer
//
// The caller was authenticated by its listener before Do is called. No executor
// starts before the record of the decision that allows it is on disk
// (INV-14; with Batched, before it is in the log's memory), and whatever goes
// wrong on the way, a panic included, ends in deny (INV-15).
//
// The path of a denied call allocates little (TestDenyAllocations says how
// much) and takes no lock that all calls share outside the log's reservation:
// the request is decoded once, its params are views of the body, the policy
// input is built in room that comes with the Request, the record is encoded into
// the log's own memory, and the counters are atomic.
//
// One call leaves one or two records with one audit_id. The audit_id is the
// event id of the decision record, so it names a place in the log: no index is
// kept for it.
//
// A Pipeline is safe for concurrent use. It imports the policy evaluator, the
// log and the tools, and is imported by the doors (node/httpapi) and node.
package call

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/node/tool"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/wal"
)

// Policies gives the active program; *prepared.Slots is one.
type Policies interface {
	// Current returns the active policy, nil when there is none: deny.
	Current() *prepared.Active
}

// Agent is the release that a node runs, as policy and records see it.
type Agent struct {
	ID          string
	ReleaseID   string
	Fingerprint string
}

// Options configure a Pipeline. Log, Policies, Tools and Logger are required.
type Options struct {
	Log      *wal.Log
	Policies Policies
	Tools    func() *tool.Registry // the registry in force; a reload swaps it
	Logger   *slog.Logger

	NodeID    string
	Labels    map[string]string
	Assurance func() string // level: none, reduced, full
	Agent     func() Agent

	// Batched starts the tool before the decision is on disk; the log's
	// SyncInterval bounds what a power cut can lose. Default: wait.
	Batched bool
	// AuditTimeout bounds the wait for the disk. Default 10 s.
	AuditTimeout time.Duration
	// MaxRecordOutput is how much of a tool's output goes into its action
	// record, in bytes. A longer output is recorded by its digest. Default 256 KiB.
	MaxRecordOutput int
	// MaxCallIDs is how many call ids are remembered for idempotent replay,
	// oldest forgotten first. Default 65536.
	MaxCallIDs int
	// ReplayWait is how long a call with a call_id waits for the first one with
	// it that is still running. Default 30 s.
	ReplayWait time.Duration
	// Secret keys the digests in records, so that who reads a log cannot find
	// out by trial what was redacted. The node's own, 32 bytes, the same at each
	// start; with another one a call_id of before is answered 409. nil: one of
	// this process.
	Secret []byte
	// CallsFile keeps what Recover would else find out by reading the whole log.
	// Empty: Recover reads it.
	CallsFile string
	// Limits hold each caller to its own. nil: there are none.
	Limits *auth.Limits
	// Gate bounds how many calls run and wait.
	Gate GateOptions
	// Tracer makes a span of each call. nil: none.
	Tracer Tracer
	// Observe is told of each call when it has its answer, on the call's own
	// goroutine: it must be quick. nil: nobody.
	Observe func(*Report)
	// Refuse, when it returns a reason, denies every call: the platform does
	// not give what the operator demanded. May be nil.
	Refuse func() string
	// Now is the clock of records. Default time.Now.
	Now func() time.Time
}

// Pipeline decides, records and executes.
type Pipeline struct {
	o       Options
	metrics counters
	gate    *Gate
	calls   replays
	labels  []byte // of the node, as JSON
	audit   patience
}

// New makes a Pipeline. Recover must be called before the first Do.
func New(o Options) *Pipeline {
	if o.AuditTimeout == 0 {
		o.AuditTimeout = 10 * time.Second
	}
	if o.MaxRecordOutput == 0 {
		o.MaxRecordOutput = 256 << 10
	}
	if o.MaxCallIDs == 0 {
		o.MaxCallIDs = 1 << 16
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Refuse == nil {
		o.Refuse = func() string { return "" }
	}
	if o.ReplayWait == 0 {
		o.ReplayWait = 30 * time.Second
	}
	if o.Secret == nil {
		o.Secret = make([]byte, 32)
		_, _ = rand.Read(o.Secret) // never fails
	}
	p := &Pipeline{o: o, calls: newReplays(o.MaxCallIDs, o.Secret), gate: newGate(o.Gate), labels: appendLabels(nil, o.Labels)}
	p.audit.limit = o.AuditTimeout
	p.metrics.init()
	return p
}

// Gate is where a door takes a place for a call before it decodes it.
func (p *Pipeline) Gate() *Gate { return p.gate }

// Mode selects how far a call goes.
type Mode int

// Modes.
const (
	Execute  Mode = iota // the whole way
	Evaluate             // decide and record; execute nothing
	Query                // Evaluate for a caller that enforces the decision itself: the kind need not be a tool of this node
)

// Do takes one call through the pipeline. It always answers; ctx ends the tool
// and the wait for the disk, never a record that was begun. The Answer may hold
// views of r's room: it is good until r is freed.
func (p *Pipeline) Do(ctx context.Context, r *Request, mode Mode) (a Answer) {
	r.report = Report{Request: r, Start: time.Now()}
	p.metrics.inFlight.Add(1)
	var span Span
	if p.o.Tracer != nil {
		span, r.TraceParent = p.o.Tracer.Start(r, r.report.Start)
	}
	defer func() {
		if v := recover(); v != nil {
			p.o.Logger.Error("call panicked: denied", "kind", r.Kind, "panic", v, "stack", string(debug.Stack()))
			a = deny(http.StatusServiceUnavailable, LayerRuntime, "internal", "the node failed inside; its log has the cause")
		}
		p.metrics.inFlight.Add(-1)
		now := time.Now()
		r.report.Answer, r.report.Total = a, now.Sub(r.report.Start)
		p.metrics.observe(&r.report, now)
		if span != nil {
			span.End(&r.report)
		}
		if p.o.Observe != nil {
			p.o.Observe(&r.report)
		}
	}()
	if r.DryRun {
		mode = Evaluate
	}
	if why := p.o.Refuse(); why != "" {
		return deny(http.StatusServiceUnavailable, LayerAssurance, "assurance_refused", why)
	}
	share, refused := p.admit(r)
	if refused != nil {
		return *refused
	}
	defer share.Leave()
	tools := p.o.Tools()
	t, ok := tools.Lookup(r.Kind)
	if !ok && mode != Query {
		return deny(http.StatusBadRequest, LayerRequest, "unknown_tool", unknownTool(r.Kind, tools))
	}
	if ok {
		if err := t.Validate(r.Params); err != nil {
			return deny(http.StatusBadRequest, LayerRequest, "invalid_params", err.Error())
		}
	}
	if r.CallID == "" || mode != Execute {
		return p.run(ctx, r, t, tools, mode, nil)
	}
	return p.once(ctx, r, t, tools, mode)
}

func unknownTool(kind string, tools *tool.Registry) string {
	var names []string
	for _, t := range tools.List() {
		names = append(names, t.Kind)
	}
	msg := fmt.Sprintf("no tool %q is registered on this node", kind)
	if near := conf.Nearest(kind, names); near != "" {
		return msg + fmt.Sprintf(": did you mean %q?", near)
	}
	return msg + ": GET /v1/tools lists them"
}

// run is the order of one call. e is nil unless the call has a call_id.
func (p *Pipeline) run(ctx context.Context, r *Request, t *tool.Tool, tools *tool.Registry, mode Mode, e *running) Answer {
	active := p.o.Policies.Current()
	if active == nil {
		return deny(http.StatusServiceUnavailable, LayerPolicy, "no_policy",
			"no policy is active: publish a release, or start a node that never had one with --policy BUNDLE. GET /v1/status says why")
	}
	bundle := active.Program.Bundle()
	agent := p.o.Agent()
	now := p.o.Now()
	r.input = p.appendInput(r.input[:0], r, agent, now)

	// Evaluate.
	d := &r.decision
	began := time.Now()
	// The evaluator has a bound of its own, so it need not watch the call's
	// context, for which all calls would meet at one lock; a call that has ended is
	// stopped before its tool.
	evalErr := active.EvalInto(context.Background(), d, r.input)
	r.report.Eval = time.Since(began)
	switch {
	case evalErr != nil:
		*d = prepared.Decision{Reasons: []event.Reason{evalReason(evalErr)}}
	case d.Allow && len(d.Approval) > 0:
		*d = prepared.Decision{Reasons: []event.Reason{{Code: "approval_unavailable",
			Message: "policy asks for a human's approval, and this node has no way to ask: denied"}}}
	case d.Allow && mode == Execute:
		if c := t.Unenforceable(d.Constraints); c != "" {
			*d = prepared.Decision{Reasons: []event.Reason{{Code: "constraint_unenforceable",
				Message: fmt.Sprintf("policy limits this call by %s, which this node cannot enforce: denied", c)}}}
		}
	case !d.Allow && len(d.Reasons) == 0:
		d.Reasons = append(d.Reasons[:0], event.Reason{Code: "denied", Message: "policy does not allow this call and gives no reason"})
	}

	// Record the decision, durably.
	ref := bundle.Ref()
	a := Answer{PolicyRef: ref, DryRun: r.DryRun}
	rec := otlp.Record{
		TimeUnixNano: uint64(now.UnixNano()), Severity: otlp.Info, EventType: event.Decision,
		LogID: p.o.Log.ID(), Class: wal.ClassDecision.String(), Decision: "allow", Kind: r.Kind,
		ReleaseID: agent.ReleaseID, Fingerprint: agent.Fingerprint,
	}
	rec.TraceID, rec.SpanID, _ = ParseTraceParent(r.TraceParent)
	if !d.Allow {
		rec.Decision, rec.Severity = "deny", otlp.Warn
	}
	shown, hit := redact(r.input, d.Redact)
	r.body = p.appendDecisionBody(r.body[:0], r, d, ref, bundle.Digest, mode, hit)
	seq, auditID, err := p.record(wal.ClassDecision, &rec, "", r.body, shown, bodyEnd)
	if err != nil {
		return auditFailed(err)
	}
	a.AuditID = auditID
	e.decided(seq)
	if evalErr != nil {
		p.evaluatorFailed(auditID, bundle, evalErr)
	}
	if !p.o.Batched {
		began = time.Now()
		err := p.o.Log.WaitDurable(p.audit.context(began), seq)
		r.report.Durable = time.Since(began)
		if err != nil {
			if d.Allow && mode == Execute {
				// The log says allow; say also that nothing ran.
				actionSeq, _ := p.recordAction(&rec, &tool.Result{Outcome: tool.OutcomeDenied, Code: codeAudit,
					Message: "the decision could not be made durable: the tool was not started"}, LayerAudit, 0, false)
				e.acted(actionSeq)
			}
			return auditFailed(err)
		}
	}
	if mode == Query {
		a.Verdict = &Verdict{Allow: d.Allow, Reasons: d.Reasons, Constraints: d.Constraints, Redact: d.Redact}
	}
	if !d.Allow {
		a.Status, a.Decision, a.Layer = http.StatusForbidden, "deny", LayerPolicy
		a.Reasons, a.Reason = d.Reasons, d.Reasons[0].Message
		return a
	}
	a.Decision = "allow"
	if mode != Execute {
		a.Status, a.Reasons = http.StatusOK, d.Reasons
		return a
	}
	if ctx.Err() != nil { // the node stops, or the caller left while we waited
		res := tool.Result{Outcome: tool.OutcomeKilled, Code: "canceled", Message: "the call was cancelled before the tool started"}
		actionSeq, _ := p.recordAction(&rec, &res, LayerRuntime, 0, false)
		e.acted(actionSeq)
		return finish(a, &res)
	}

	// Execute, and record what came of it.
	began = time.Now()
	res := tools.Execute(ctx, t, &tool.Request{AuditID: auditID, Kind: r.Kind, Params: r.Params,
		Timeout: time.Duration(r.TimeoutMS) * time.Millisecond, Constraints: d.Constraints, Traceparent: r.TraceParent, Progress: r.Progress})
	r.report.Tool = time.Since(began)
	actionSeq, err := p.recordAction(&rec, &res, LayerRuntime, r.report.Tool, len(d.Redact) > 0)
	e.acted(actionSeq)
	if err != nil {
		// The effect has happened and its record could not be written: the
		// decision record stands, and the caller must learn what happened.
		p.o.Logger.Error("action record failed", "audit_id", auditID, "err", err)
		p.metrics.lostActions.Inc()
	}
	return finish(a, &res)
}

// finish turns a tool's result into the answer of an allowed call.
func finish(a Answer, res *tool.Result) Answer {
	if res.Outcome == tool.OutcomeDenied {
		a.Status, a.Decision, a.Layer = http.StatusForbidden, "deny", LayerRuntime
		a.Reason, a.Reasons = res.Message, []event.Reason{{Code: res.Code, Message: res.Message}}
		return a
	}
	a.Status, a.Outcome, a.Output = http.StatusOK, string(res.Outcome), res.Output
	if res.Outcome != tool.OutcomeOK {
		a.ErrCode, a.ErrMsg = res.Code, res.Message
	}
	return a
}

func auditFailed(err error) Answer {
	code, reason := codeAudit, "the decision could not be recorded durably: denied. See the node's log and GET /v1/status"
	switch {
	case errors.Is(err, wal.ErrCeilingExceeded):
		code, reason = "log_full", "the node's log is at its ceiling and nothing in it has been delivered yet: denied. Restore the export endpoint, or raise --wal-max-bytes"
	case errors.Is(err, wal.ErrTooLarge):
		code, reason = "record_too_large", "the record of this call would not fit into the log: denied. Send a smaller call"
	case errors.Is(err, wal.ErrClosed):
		code, reason = "shutting_down", "the node is stopping: denied"
	}
	return deny(http.StatusServiceUnavailable, LayerAudit, code, reason)
}

// maxErrorText bounds the text of an evaluator's error in a record, in bytes.
const maxErrorText = 1024

// evaluatorFailed leaves an error record for the operator; the decision record
// says only that the call was denied for it.
func (p *Pipeline) evaluatorFailed(auditID string, b *prepared.Bundle, err error) {
	text := err.Error()
	if len(text) > maxErrorText {
		text = strings.ToValidUTF8(text[:maxErrorText], "") + "…"
	}
	p.o.Logger.Error("policy evaluation failed: call denied", "audit_id", auditID, "policy", b.Ref(), "err", text)
	body := struct {
		AuditID   string `json:"audit_id"`
		PolicyRef string `json:"policy_ref"`
		Error     string `json:"error"`
	}{auditID, b.Ref(), text}
	if _, err := p.Note(wal.ClassError, event.EvaluatorError, body); err != nil {
		p.o.Logger.Error("error record failed", "audit_id", auditID, "err", err)
	}
}

func evalReason(err error) event.Reason {
	switch {
	case errors.Is(err, prepared.ErrUndefined):
		return event.Reason{Code: "undefined", Message: "policy gives no decision for this call: denied"}
	case errors.Is(err, prepared.ErrBudget):
		return event.Reason{Code: "evaluation_budget", Message: "policy took too long to decide: denied"}
	case errors.Is(err, prepared.ErrResult):
		return event.Reason{Code: "policy_result", Message: "policy gave a result that is not of the contract's form: denied"}
	}
	return event.Reason{Code: "evaluation_error", Message: "policy failed to evaluate: denied"}
}

// appendInput builds the policy input (contract.md, Policy). The same bytes are
// evaluated and recorded.
func (p *Pipeline) appendInput(b []byte, r *Request, agent Agent, now time.Time) []byte {
	b = append(b, `{"kind":`...)
	b = strictjson.AppendString(b, r.Kind)
	b = append(b, `,"params":`...)
	b = append(b, r.Params...)
	b = append(b, `,"session":`...)
	b = strictjson.AppendString(b, r.Session)
	b = append(b, `,"caller":`...)
	b = appendCaller(b, &r.Caller)
	b = append(b, `,"agent":{"id":`...)
	b = strictjson.AppendString(b, agent.ID)
	b = append(b, `,"release":`...)
	b = strictjson.AppendString(b, agent.ReleaseID)
	b = append(b, `,"fingerprint":`...)
	b = strictjson.AppendString(b, agent.Fingerprint)
	b = append(b, `},"node":{"id":`...)
	b = strictjson.AppendString(b, p.o.NodeID)
	b = append(b, `,"labels":`...)
	b = append(b, p.labels...)
	b = append(b, `,"assurance":`...)
	b = strictjson.AppendString(b, p.o.Assurance())
	b = append(b, `},"time_ns":`...)
	b = strconv.AppendInt(b, now.UnixNano(), 10)
	return append(b, '}')
}

func appendLabels(b []byte, labels map[string]string) []byte {
	b = append(b, '{')
	for i, k := range sortedKeys(labels) {
		if i > 0 {
			b = append(b, ',')
		}
		b = strictjson.AppendString(b, k)
		b = append(b, ':')
		b = strictjson.AppendString(b, labels[k])
	}
	return append(b, '}')
}

// appendDecisionBody builds the body up to the input, which follows it in the
// log, and then bodyEnd.
func (p *Pipeline) appendDecisionBody(b []byte, r *Request, d *prepared.Decision, ref, digest string, mode Mode, hit []string) []byte {
	b = append(b, `{"policy_ref":`...)
	b = strictjson.AppendString(b, ref)
	b = appendField(b, "policy_digest", digest)
	b = appendInt(b, "eval_ns", r.report.Eval.Nanoseconds())
	if !d.Allow {
		b = appendField(b, "layer", LayerPolicy)
	}
	if len(d.Reasons) > 0 {
		b = append(b, `,"reasons":`...)
		b = appendReasons(b, d.Reasons)
	}
	if mode != Execute {
		b = append(b, `,"dry_run":true`...)
	}
	if r.CallID != "" {
		b = appendField(b, "call_id", r.CallID)
		b = appendField(b, "params_digest", p.calls.paramsDigest(r))
	}
	if len(hit) > 0 {
		b = append(b, `,"redacted":`...)
		b = appendStrings(b, hit)
	}
	return append(b, `,"input":`...)
}

var bodyEnd = []byte("}")

// idRoom stands for an audit id whose text is not known yet, of any length.
const idRoom = "0000000000000000000000000000000000000000000000000000000000000000"

// record writes rec with the body that the parts make together, and returns its
// sequence and the audit id, which for a decision (auditID empty) is derived
// from the sequence. Between Reserve and Commit the whole log waits: there is
// nothing but copying in between.
func (p *Pipeline) record(c wal.Class, rec *otlp.Record, auditID string, parts ...[]byte) (uint64, string, error) {
	rec.AuditID = auditID
	if auditID == "" {
		rec.AuditID = idRoom[:event.IDLen(rec.LogID)]
	}
	size := 0
	for _, part := range parts {
		size += len(part)
	}
	res, err := p.o.Log.Reserve(c, rec.SizeWith(size))
	if err != nil {
		return 0, "", err
	}
	done := false
	defer func() {
		if !done { // writing panicked: leave no hole behind
			res.Abort()
		}
	}()
	if auditID == "" {
		rec.AuditID = event.ID(rec.LogID, res.Seq)
	}
	body := rec.PutAround(res.Buf, res.Seq, size)
	for _, part := range parts {
		body = body[copy(body, part):]
	}
	res.Commit()
	done = true
	return res.Seq, rec.AuditID, nil
}

// patience hands out the context that bounds waiting for the disk. One is shared
// by the calls of a while: it ends between one and one and a quarter times the
// limit after it was asked for. A context and a timer for each call would be a
// third of what a denied call allocates.
type patience struct {
	limit   time.Duration
	current atomic.Pointer[shared]
}

type shared struct {
	ctx   context.Context
	until time.Time // good to be handed out
}

func (p *patience) context(now time.Time) context.Context {
	if s := p.current.Load(); s != nil && now.Before(s.until) {
		return s.ctx
	}
	quarter := p.limit / 4
	ctx, cancel := context.WithTimeout(context.Background(), p.limit+quarter)
	context.AfterFunc(ctx, cancel) // nobody ends it early
	p.current.Store(&shared{ctx, now.Add(quarter)})
	return ctx
}

// recordAction writes the action that belongs to the decision dec. It does not
// wait for the disk: the decision is there, and an action that a power cut
// takes is reported as outcome unknown. secret leaves the output out.
func (p *Pipeline) recordAction(dec *otlp.Record, res *tool.Result, layer string, took time.Duration, secret bool) (uint64, error) {
	rec := *dec
	rec.TimeUnixNano = uint64(p.o.Now().UnixNano())
	rec.EventType, rec.Class = event.Action, wal.ClassAction.String()
	rec.Outcome, rec.Severity = string(res.Outcome), otlp.Info
	if res.Outcome != tool.OutcomeOK {
		rec.Severity = otlp.Warn
	}
	b := append(make([]byte, 0, 256), `{"duration_ns":`...)
	b = strconv.AppendInt(b, took.Nanoseconds(), 10)
	if res.Outcome == tool.OutcomeDenied {
		rec.Decision = "deny"
		b = appendField(b, "layer", layer)
		b = append(b, `,"reasons":`...)
		b = appendReasons(b, []event.Reason{{Code: res.Code, Message: res.Message}})
	} else {
		b = appendField(b, "error_code", res.Code)
		b = appendField(b, "error", res.Message)
	}
	if len(res.Confinement) > 0 {
		b = append(b, `,"sandbox":`...)
		b = append(b, res.Confinement...)
	}
	var output []byte
	switch {
	case len(res.Output) == 0:
	case secret || len(res.Output) > p.o.MaxRecordOutput:
		b = appendField(b, "output_digest", p.outputDigest(res.Output, secret))
		b = appendInt(b, "output_bytes", int64(len(res.Output)))
	default:
		b = append(b, `,"output":`...)
		output = res.Output
	}
	seq, _, err := p.record(wal.ClassAction, &rec, dec.AuditID, b, output, bodyEnd)
	return seq, err
}

// Note records a lifecycle or error event that belongs to no call, and returns
// its sequence. body is marshalled as JSON.
func (p *Pipeline) Note(c wal.Class, eventType string, body any) (uint64, error) {
	data, err := json.Marshal(body)
	if err != nil {
		return 0, fmt.Errorf("record %s: %w", eventType, err)
	}
	agent := p.o.Agent()
	rec := otlp.Record{TimeUnixNano: uint64(p.o.Now().UnixNano()), Severity: otlp.Info, EventType: eventType,
		LogID: p.o.Log.ID(), Class: c.String(), ReleaseID: agent.ReleaseID, Fingerprint: agent.Fingerprint, Body: data}
	if c == wal.ClassError {
		rec.Severity = otlp.Error
	}
	size := rec.Size()
	res, err := p.o.Log.Reserve(c, size)
	if err != nil {
		return 0, fmt.Errorf("record %s: %w", eventType, err)
	}
	rec.Put(res.Buf, res.Seq)
	res.Commit()
	return res.Seq, nil
}
