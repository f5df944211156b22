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
// One call leaves one or two records with one audit_id. The audit_id is the
// event id of the decision record, so it names a place in the log: no index is
// kept for it.
//
// A Pipeline is safe for concurrent use. It imports the policy evaluator, the
// log and the tools, and is imported by the doors (node/httpapi) and node.
package call

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

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
	// Refuse, when it returns a reason, denies every call: the platform does
	// not give what the operator demanded. May be nil.
	Refuse func() string
	// Now is the clock of records. Default time.Now.
	Now func() time.Time
}

// Pipeline decides, records and executes.
type Pipeline struct {
	o       Options
	metrics Metrics
	calls   replays
	scratch sync.Pool // *scratch
}

// scratch is what one call writes into before the log has it.
type scratch struct {
	input []byte
	body  []byte
}

// keptScratch is the largest buffer that goes back to the pool, in bytes: one
// huge call must not stay in memory for ever.
const keptScratch = 1 << 20

func (p *Pipeline) release(s *scratch) {
	if cap(s.input)+cap(s.body) <= keptScratch {
		p.scratch.Put(s)
	}
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
	p := &Pipeline{o: o, calls: newReplays(o.MaxCallIDs)}
	p.metrics.init()
	p.scratch.New = func() any { return &scratch{} }
	return p
}

// Mode selects how far a call goes.
type Mode int

// Modes.
const (
	Execute  Mode = iota // the whole way
	Evaluate             // decide and record; execute nothing
)

// Do takes one call through the pipeline. It always answers; ctx ends the tool
// and the wait for the disk, never a record that was begun.
func (p *Pipeline) Do(ctx context.Context, r *Request, mode Mode) (a Answer) {
	start := time.Now()
	p.metrics.InFlight.Add(1)
	defer func() {
		if v := recover(); v != nil {
			p.o.Logger.Error("call panicked: denied", "kind", r.Kind, "panic", v, "stack", string(debug.Stack()))
			a = deny(http.StatusServiceUnavailable, LayerRuntime, "internal", "the node failed inside; its log has the cause")
		}
		p.metrics.InFlight.Add(-1)
		p.metrics.observe(&a, time.Since(start))
	}()
	if r.DryRun {
		mode = Evaluate
	}
	if why := p.o.Refuse(); why != "" {
		return deny(http.StatusServiceUnavailable, LayerAssurance, "assurance_refused", why)
	}
	tools := p.o.Tools()
	t, ok := tools.Lookup(r.Kind)
	if !ok {
		return deny(http.StatusBadRequest, LayerRequest, "unknown_tool", unknownTool(r.Kind, tools))
	}
	if err := t.Validate(r.Params); err != nil {
		return deny(http.StatusBadRequest, LayerRequest, "invalid_params", err.Error())
	}
	if r.CallID == "" || mode == Evaluate {
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
func (p *Pipeline) run(ctx context.Context, r *Request, t *tool.Tool, tools *tool.Registry, mode Mode, e *entry) Answer {
	active := p.o.Policies.Current()
	if active == nil {
		return deny(http.StatusServiceUnavailable, LayerPolicy, "no_policy",
			"no policy is active: publish a release, or start a node that never had one with --policy BUNDLE. GET /v1/status says why")
	}
	bundle := active.Program.Bundle()
	s := p.scratch.Get().(*scratch)
	defer p.release(s)
	agent := p.o.Agent()
	now := p.o.Now()
	s.input = p.appendInput(s.input[:0], r, agent, now)

	// Evaluate.
	began := time.Now()
	d, err := active.Program.Eval(ctx, s.input)
	evalTime := time.Since(began)
	p.metrics.Eval.Update(evalTime.Seconds())
	evalErr := err
	switch {
	case evalErr != nil:
		d = prepared.Decision{Reasons: []event.Reason{evalReason(evalErr)}}
	case d.Allow && len(d.Approval) > 0:
		d = prepared.Decision{Reasons: []event.Reason{{Code: "approval_unavailable",
			Message: "policy asks for a human's approval, and this node has no way to ask: denied"}}}
	case d.Allow && mode == Execute:
		if c := t.Unenforceable(d.Constraints); c != "" {
			d = prepared.Decision{Reasons: []event.Reason{{Code: "constraint_unenforceable",
				Message: fmt.Sprintf("policy limits this call by %s, which this node cannot enforce: denied", c)}}}
		}
	case !d.Allow && len(d.Reasons) == 0:
		d.Reasons = []event.Reason{{Code: "denied", Message: "policy does not allow this call and gives no reason"}}
	}

	// Record the decision, durably.
	a := Answer{PolicyRef: bundle.Ref(), DryRun: r.DryRun}
	rec := otlp.Record{
		TimeUnixNano: uint64(now.UnixNano()), Severity: otlp.Info, EventType: event.Decision,
		LogID: p.o.Log.ID(), Class: wal.ClassDecision.String(), Decision: "allow", Kind: r.Kind,
		ReleaseID: agent.ReleaseID, Fingerprint: agent.Fingerprint,
	}
	rec.TraceID, rec.SpanID, _ = ParseTraceParent(r.TraceParent)
	if !d.Allow {
		rec.Decision, rec.Severity = "deny", otlp.Warn
	}
	s.body = p.appendDecisionBody(s.body[:0], r, s.input, &d, bundle, evalTime, mode)
	rec.Body = s.body
	seq, auditID, err := p.record(wal.ClassDecision, &rec, "")
	if err != nil {
		return auditFailed(err)
	}
	a.AuditID = auditID
	if e != nil {
		e.decided(seq)
	}
	if evalErr != nil {
		p.evaluatorFailed(auditID, bundle, evalErr)
	}
	if !p.o.Batched {
		waitStart := time.Now()
		wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.o.AuditTimeout)
		err := p.o.Log.WaitDurable(wctx, seq)
		cancel()
		p.metrics.Durable.Update(time.Since(waitStart).Seconds())
		if err != nil {
			if d.Allow && mode == Execute {
				// The log says allow; say also that nothing ran.
				p.recordAction(&rec, &tool.Result{Outcome: tool.OutcomeDenied, Code: "audit_unavailable",
					Message: "the decision could not be made durable: the tool was not started"}, LayerAudit, 0, false)
			}
			return auditFailed(err)
		}
	}
	if !d.Allow {
		a.Status, a.Decision, a.Layer = http.StatusForbidden, "deny", LayerPolicy
		a.Reasons, a.Reason = d.Reasons, d.Reasons[0].Message
		return a
	}
	a.Decision = "allow"
	if mode == Evaluate {
		a.Status, a.Reasons = http.StatusOK, d.Reasons
		return a
	}
	if ctx.Err() != nil { // the node stops, or the caller left while we waited
		res := tool.Result{Outcome: tool.OutcomeKilled, Code: "canceled", Message: "the call was cancelled before the tool started"}
		p.recordAction(&rec, &res, LayerRuntime, 0, false)
		return finish(a, &res)
	}

	// Execute, and record what came of it.
	began = time.Now()
	res := tools.Execute(ctx, t, &tool.Request{AuditID: auditID, Kind: r.Kind, Params: r.Params,
		Timeout: time.Duration(r.TimeoutMS) * time.Millisecond, Constraints: d.Constraints, Traceparent: r.TraceParent, Progress: r.Progress})
	took := time.Since(began)
	p.metrics.Tool.Update(took.Seconds())
	actionSeq, err := p.recordAction(&rec, &res, LayerRuntime, took, len(d.Redact) > 0)
	if e != nil {
		e.acted(actionSeq)
	}
	if err != nil {
		// The effect has happened and its record could not be written: the
		// decision record stands, and the caller must learn what happened.
		p.o.Logger.Error("action record failed", "audit_id", auditID, "err", err)
		p.metrics.LostActions.Inc()
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
	code, reason := "audit_unavailable", "the decision could not be recorded durably: denied. See the node's log and GET /v1/status"
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
	b = append(b, `,"caller":{"type":`...)
	b = strictjson.AppendString(b, r.Caller.Type)
	b = append(b, `,"id":`...)
	b = strictjson.AppendString(b, r.Caller.ID)
	b = append(b, `},"agent":{"id":`...)
	b = strictjson.AppendString(b, agent.ID)
	b = append(b, `,"release":`...)
	b = strictjson.AppendString(b, agent.ReleaseID)
	b = append(b, `,"fingerprint":`...)
	b = strictjson.AppendString(b, agent.Fingerprint)
	b = append(b, `},"node":{"id":`...)
	b = strictjson.AppendString(b, p.o.NodeID)
	b = append(b, `,"labels":{`...)
	first := true
	for _, k := range sortedKeys(p.o.Labels) {
		if !first {
			b = append(b, ',')
		}
		first = false
		b = strictjson.AppendString(b, k)
		b = append(b, ':')
		b = strictjson.AppendString(b, p.o.Labels[k])
	}
	b = append(b, `},"assurance":`...)
	b = strictjson.AppendString(b, p.o.Assurance())
	b = append(b, `},"time_ns":`...)
	b = strconv.AppendInt(b, now.UnixNano(), 10)
	return append(b, '}')
}

func (p *Pipeline) appendDecisionBody(b []byte, r *Request, input []byte, d *prepared.Decision, bundle *prepared.Bundle, evalTime time.Duration, mode Mode) []byte {
	b = append(b, `{"policy_ref":`...)
	b = strictjson.AppendString(b, bundle.Ref())
	b = appendField(b, "policy_digest", bundle.Digest)
	b = appendInt(b, "eval_ns", evalTime.Nanoseconds())
	if !d.Allow {
		b = appendField(b, "layer", LayerPolicy)
	}
	if len(d.Reasons) > 0 {
		b = append(b, `,"reasons":`...)
		b = appendReasons(b, d.Reasons)
	}
	if mode == Evaluate {
		b = append(b, `,"dry_run":true`...)
	}
	if r.CallID != "" {
		b = appendField(b, "call_id", r.CallID)
		b = appendField(b, "params_digest", paramsDigest(r))
	}
	b = append(b, `,"input":`...)
	b = append(b, redact(input, d.Redact)...)
	return append(b, '}')
}

// record writes rec and returns its sequence and the audit id, which for a
// decision (auditID empty) is derived from the sequence.
func (p *Pipeline) record(c wal.Class, rec *otlp.Record, auditID string) (uint64, string, error) {
	rec.AuditID = auditID
	if auditID == "" {
		rec.AuditID = event.ID(rec.LogID, 0) // of the final length
	}
	res, err := p.o.Log.Reserve(c, rec.Size())
	if err != nil {
		return 0, "", err
	}
	done := false
	defer func() {
		if !done { // Put panicked: leave no hole behind
			res.Abort()
		}
	}()
	if auditID == "" {
		rec.AuditID = event.ID(rec.LogID, res.Seq)
	}
	rec.Put(res.Buf, res.Seq)
	res.Commit()
	done = true
	return res.Seq, rec.AuditID, nil
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
	s := p.scratch.Get().(*scratch)
	defer p.release(s)
	b := append(s.body[:0], `{"duration_ns":`...)
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
	switch {
	case len(res.Output) == 0:
	case secret || len(res.Output) > p.o.MaxRecordOutput:
		sum := sha256.Sum256(res.Output)
		b = appendField(b, "output_digest", "sha256:"+hex.EncodeToString(sum[:]))
		b = appendInt(b, "output_bytes", int64(len(res.Output)))
	default:
		b = append(b, `,"output":`...)
		b = append(b, res.Output...)
	}
	s.body = append(b, '}')
	rec.Body = s.body
	seq, _, err := p.record(wal.ClassAction, &rec, dec.AuditID)
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

// redact replaces what the JSON Pointers name by "[redacted]". The input is an
// object that the strict decoder accepted. A pointer that names nothing is
// passed over.
func redact(input []byte, pointers []string) []byte {
	if len(pointers) == 0 {
		return input
	}
	dec := json.NewDecoder(bytes.NewReader(input))
	dec.UseNumber()
	var doc any
	if err := dec.Decode(&doc); err != nil {
		return []byte(`{"redacted":true}`)
	}
	for _, ptr := range pointers {
		blank(doc, strings.Split(strings.TrimPrefix(ptr, "/"), "/"))
	}
	out, err := json.Marshal(doc)
	if err != nil {
		return []byte(`{"redacted":true}`)
	}
	return out
}

var unescapePointer = strings.NewReplacer("~1", "/", "~0", "~")

func blank(doc any, path []string) {
	key := unescapePointer.Replace(path[0])
	switch v := doc.(type) {
	case map[string]any:
		next, ok := v[key]
		if !ok {
			return
		}
		if len(path) == 1 {
			v[key] = "[redacted]"
			return
		}
		blank(next, path[1:])
	case []any:
		i, err := strconv.Atoi(key)
		if err != nil || i < 0 || i >= len(v) {
			return
		}
		if len(path) == 1 {
			v[i] = "[redacted]"
			return
		}
		blank(v[i], path[1:])
	}
}
