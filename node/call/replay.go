package call

import (
	"bytes"
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/node/tool"
	"github.com/autonomyops/autonomy/wal"
)

// replays remembers the calls that carry a call_id: which records they left.
// It holds positions in the log, not answers, and is rebuilt from the log at
// start.
type replays struct {
	max int

	mu    sync.Mutex
	byKey map[string]*entry // caller, NUL, call_id
	order *list.List        // of *entry, oldest first
}

// entry is one remembered call.
type entry struct {
	key    string
	digest string        // of the params
	done   chan struct{} // closed when the first run has its answer

	// Written by the first run before done is closed, read after.
	decision uint64 // sequence of the decision record, 0: none was written
	action   uint64 // sequence of the action record, 0: none
}

func (e *entry) decided(seq uint64) { e.decision = seq }
func (e *entry) acted(seq uint64)   { e.action = seq }

func newReplays(limit int) replays {
	return replays{max: limit, byKey: map[string]*entry{}, order: list.New()}
}

// claim returns the entry of key, and whether the caller is the first and must run.
func (r *replays) claim(key, digest string) (*entry, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, ok := r.byKey[key]; ok {
		return e, false
	}
	e := &entry{key: key, digest: digest, done: make(chan struct{})}
	r.byKey[key] = e
	r.order.PushBack(e)
	for r.order.Len() > r.max {
		oldest := r.order.Front()
		r.order.Remove(oldest)
		delete(r.byKey, oldest.Value.(*entry).key)
	}
	return e, true
}

// forget drops an entry whose run left no record: the call may be tried again.
func (r *replays) forget(e *entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byKey[e.key] != e {
		return
	}
	delete(r.byKey, e.key)
	for el := r.order.Back(); el != nil; el = el.Prev() {
		if el.Value.(*entry) == e {
			r.order.Remove(el)
			return
		}
	}
}

func replayKey(c Caller, callID string) string { return c.Type + "\x00" + c.ID + "\x00" + callID }

// paramsDigest tells whether two calls ask for the same.
func paramsDigest(r *Request) string {
	h := sha256.New()
	h.Write([]byte(r.Kind))
	h.Write([]byte{0})
	h.Write(r.Params)
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// once runs a call that has a call_id, or answers it from the log.
func (p *Pipeline) once(ctx context.Context, r *Request, t *tool.Tool, tools *tool.Registry, mode Mode) Answer {
	digest := paramsDigest(r)
	e, first := p.calls.claim(replayKey(r.Caller, r.CallID), digest)
	if first {
		defer close(e.done)
		defer func() {
			if e.decision == 0 {
				p.calls.forget(e)
			}
		}()
		return p.run(ctx, r, t, tools, mode, e)
	}
	if e.digest != digest {
		return deny(http.StatusConflict, LayerRequest, "call_id_reused",
			fmt.Sprintf("call_id %q was used with another tool or other params: use a new one", r.CallID))
	}
	select {
	case <-e.done:
	case <-ctx.Done():
		return deny(http.StatusServiceUnavailable, LayerRuntime, "first_call_running",
			"the first call with this call_id is still running: ask again later")
	}
	if e.decision == 0 {
		return deny(http.StatusServiceUnavailable, LayerAudit, "audit_unavailable", "the first call with this call_id could not be recorded: try again")
	}
	// What is replayed must be what a restart would find.
	if err := p.o.Log.WaitDurable(ctx, max(e.decision, e.action)); err != nil {
		return auditFailed(err)
	}
	a, err := p.replay(e)
	if err != nil {
		return deny(http.StatusServiceUnavailable, LayerAudit, "replay_unavailable", "the record of the first call cannot be read: "+err.Error())
	}
	a.Replayed = true
	return a
}

// decisionBody and actionBody are the recorded bodies as replay reads them.
type decisionBody struct {
	event.DecisionBody
	ParamsDigest string `json:"params_digest"`
}

type actionBody struct {
	event.ActionBody
	OutputDigest string `json:"output_digest"`
	OutputBytes  int64  `json:"output_bytes"`
}

func (p *Pipeline) replay(e *entry) (Answer, error) {
	rec, err := p.read(e.decision)
	if err != nil {
		return Answer{}, err
	}
	var d decisionBody
	if err := json.Unmarshal(rec.Body, &d); err != nil {
		return Answer{}, fmt.Errorf("decision record %d: %w", e.decision, err)
	}
	a := Answer{AuditID: rec.AuditID, PolicyRef: d.PolicyRef}
	if rec.Decision != "allow" {
		a.Status, a.Decision, a.Layer = http.StatusForbidden, "deny", LayerPolicy
		a.Reasons = d.Reasons
		if len(d.Reasons) > 0 {
			a.Reason = d.Reasons[0].Message
		}
		return a, nil
	}
	a.Decision = "allow"
	if e.action == 0 {
		return finish(a, &tool.Result{Outcome: tool.OutcomeError, Code: "outcome_unknown", Message: unknownOutcome}), nil
	}
	if rec, err = p.read(e.action); err != nil {
		return Answer{}, err
	}
	var act actionBody
	if err := json.Unmarshal(rec.Body, &act); err != nil {
		return Answer{}, fmt.Errorf("action record %d: %w", e.action, err)
	}
	res := tool.Result{Outcome: tool.Outcome(rec.Outcome), Output: act.Output, Code: act.ErrorCode, Message: act.Error}
	if len(act.Reasons) > 0 {
		res.Code, res.Message = act.Reasons[0].Code, act.Reasons[0].Message
	}
	a = finish(a, &res)
	if act.OutputDigest != "" {
		a.ErrCode, a.ErrMsg = "output_not_kept", fmt.Sprintf("the output of the first run (%d bytes, %s) was not recorded in full", act.OutputBytes, act.OutputDigest)
	}
	return a, nil
}

const unknownOutcome = "the node stopped after it allowed this call and before it recorded what came of it: the tool may or may not have run. It is never run again under this call_id"

func (p *Pipeline) read(seq uint64) (otlp.Record, error) {
	payload, _, err := p.o.Log.Get(seq)
	if err != nil {
		return otlp.Record{}, err
	}
	return otlp.Parse(payload)
}

// Recover reads the log once at start: it remembers the calls that carry a
// call_id, and writes for each decision that allowed a tool and has no action
// record an action with outcome error, code outcome_unknown (INV-14). It
// returns how many those were.
func (p *Pipeline) Recover(ctx context.Context) (unknown int, err error) {
	last := p.o.Log.Durable()
	pending := map[string]otlp.Record{}
	entries := map[string]*entry{} // audit id → entry
	r := p.o.Log.Reader(0)
	for next := uint64(0); next < last; {
		b, err := r.Next(ctx, 1024, 4<<20)
		if err != nil {
			return 0, fmt.Errorf("read the log: %w", err)
		}
		for _, raw := range b.Records {
			next = raw.End()
			if raw.Void || raw.Class != wal.ClassDecision && raw.Class != wal.ClassAction {
				continue
			}
			rec, err := otlp.Parse(raw.Payload)
			if err != nil {
				b.Release()
				return 0, fmt.Errorf("record %d: %w", raw.Seq, err)
			}
			if raw.Class == wal.ClassAction {
				delete(pending, rec.AuditID)
				if e := entries[rec.AuditID]; e != nil {
					e.action = raw.Seq
				}
				continue
			}
			hasCallID := bytes.Contains(rec.Body, []byte(`"call_id":`))
			dryRun := bytes.Contains(rec.Body, []byte(`"dry_run":true`))
			if !hasCallID && !dryRun && rec.Decision != "allow" {
				continue
			}
			var d decisionBody
			if hasCallID || dryRun { // most need no more than what stands beside the body
				if err := json.Unmarshal(rec.Body, &d); err != nil {
					b.Release()
					return 0, fmt.Errorf("record %d: %w", raw.Seq, err)
				}
			}
			if d.DryRun {
				continue
			}
			if rec.Decision == "allow" {
				body := rec
				body.Body = nil
				pending[rec.AuditID] = body
			}
			if d.CallID != "" {
				var in struct {
					Kind   string                    `json:"kind"`
					Params json.RawMessage           `json:"params"`
					Caller struct{ Type, ID string } `json:"caller"`
				}
				if err := json.Unmarshal(d.Input, &in); err != nil {
					b.Release()
					return 0, fmt.Errorf("record %d: input: %w", raw.Seq, err)
				}
				e, first := p.calls.claim(replayKey(Caller{Type: in.Caller.Type, ID: in.Caller.ID}, d.CallID), d.ParamsDigest)
				if first {
					e.decision = raw.Seq
					close(e.done)
					entries[rec.AuditID] = e
				}
			}
		}
		b.Release()
	}
	for _, id := range sortedKeys(pending) {
		rec := pending[id]
		seq, err := p.recordAction(&rec, &tool.Result{Outcome: tool.OutcomeError, Code: "outcome_unknown", Message: unknownOutcome}, LayerRuntime, 0, false)
		if err != nil {
			return unknown, fmt.Errorf("record the unknown outcome of %s: %w", id, err)
		}
		if e := entries[id]; e != nil {
			e.action = seq
		}
		unknown++
	}
	return unknown, nil
}

// Record is one stored record of a call, as GET /v1/calls shows it.
type Record struct {
	Seq       uint64          `json:"seq"`
	Time      time.Time       `json:"time"`
	EventType string          `json:"event_type"`
	Decision  string          `json:"decision,omitempty"`
	Outcome   string          `json:"outcome,omitempty"`
	Kind      string          `json:"kind,omitempty"`
	Durable   bool            `json:"durable"`
	Body      json.RawMessage `json:"body"`
}

// ErrNoCall is returned by Find.
var ErrNoCall = errors.New("no such call in this node's log")

// findSpan bounds how far behind its decision an action is looked for, in records.
const findSpan = 1 << 17

// Find reads the records of a call from the log. A caller sees its own calls
// only: another's are not found.
func (p *Pipeline) Find(ctx context.Context, auditID string, c Caller) ([]Record, error) {
	logID, hexSeq, ok := strings.Cut(auditID, "-")
	seq, err := strconv.ParseUint(hexSeq, 16, 64)
	if !ok || err != nil || logID != p.o.Log.ID() {
		return nil, ErrNoCall
	}
	dec, err := p.read(seq)
	if err != nil || dec.AuditID != auditID || dec.EventType != event.Decision {
		return nil, ErrNoCall
	}
	var d struct {
		Input struct {
			Caller struct{ Type, ID string } `json:"caller"`
		} `json:"input"`
	}
	if err := json.Unmarshal(dec.Body, &d); err != nil || d.Input.Caller.Type != c.Type || d.Input.Caller.ID != c.ID {
		return nil, ErrNoCall
	}
	durable := p.o.Log.Durable()
	out := []Record{record(dec, durable)}
	if dec.Decision != "allow" {
		return out, nil
	}
	r := p.o.Log.Reader(seq + 1)
	for next := seq; next < durable && next < seq+findSpan; {
		b, err := r.Next(ctx, 1024, 4<<20)
		if err != nil {
			return out, fmt.Errorf("read the log: %w", err)
		}
		for _, raw := range b.Records {
			next = raw.End()
			if raw.Class != wal.ClassAction || !bytes.Contains(raw.Payload, []byte(auditID)) {
				continue
			}
			if rec, err := otlp.Parse(raw.Payload); err == nil && rec.AuditID == auditID {
				rec.Body = slices.Clone(rec.Body)
				out = append(out, record(rec, durable))
				b.Release()
				return out, nil
			}
		}
		b.Release()
	}
	return out, nil
}

func record(r otlp.Record, durable uint64) Record {
	return Record{Seq: r.Seq, Time: time.Unix(0, int64(r.TimeUnixNano)).UTC(), EventType: r.EventType, Decision: r.Decision,
		Outcome: r.Outcome, Kind: r.Kind, Durable: r.Seq <= durable, Body: json.RawMessage(r.Body)}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
