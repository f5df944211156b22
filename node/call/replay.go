package call

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
// It holds positions in the log, not answers, and is rebuilt at start.
//
// A call that runs is in running, whatever their number, which the places for
// running calls bound: it is never forgotten, else its call_id could start it a
// second time. One that ended moves to the ring of finished calls, 48 bytes
// each, where the newest takes the place of the oldest.
type replays struct {
	max    int
	secret []byte

	mu      sync.Mutex
	running map[callKey]*running
	index   map[callKey]int32 // into ring
	ring    []finished
	next    int // place in ring of the next one
}

// callKey names a call_id of a caller: a keyed hash, so that no two can be made
// to meet.
type callKey [16]byte

// running is a call that has not got its answer yet.
type running struct {
	key    callKey
	digest [16]byte      // of kind and params
	done   chan struct{} // closed when it has its answer

	// Written by the call itself before done is closed, read after.
	decision uint64 // sequence of the decision record, 0: none was written
	action   uint64 // sequence of the action record, 0: none
}

// decided and acted note the records of a call. A call without call_id has no
// entry: nil takes both.
func (e *running) decided(seq uint64) {
	if e != nil {
		e.decision = seq
	}
}

func (e *running) acted(seq uint64) {
	if e != nil {
		e.action = seq
	}
}

// finished is a call that has left its records.
type finished struct {
	key              callKey
	digest           [16]byte
	decision, action uint64
}

func newReplays(limit int, secret []byte) replays {
	return replays{max: limit, secret: secret, running: map[callKey]*running{}, index: map[callKey]int32{}}
}

// mac is a digest that only this node can make.
func (r *replays) mac(parts ...string) [sha256.Size]byte {
	h := hmac.New(sha256.New, r.secret)
	for _, p := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		io.WriteString(h, p)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func (r *replays) key(c Caller, callID string) callKey {
	sum := r.mac("call", c.Type, c.ID, callID)
	return callKey(sum[:16])
}

// keyedDigest is how a keyed digest begins in a record.
const keyedDigest = "hmac-sha256:"

// paramsDigest tells whether two calls ask for the same.
func (r *replays) paramsDigest(req *Request) string {
	sum := r.mac("params", req.Kind, string(req.Params))
	return keyedDigest + hex.EncodeToString(sum[:])
}

// shortDigest is the part of a paramsDigest that is kept in memory.
func shortDigest(digest string) (short [16]byte) {
	text := strings.TrimPrefix(digest, keyedDigest)
	_, _ = hex.Decode(short[:], []byte(text[:min(len(text), 32)])) // another form: another digest
	return short
}

// outputDigest stands in a record for an output that is not kept.
func (p *Pipeline) outputDigest(output []byte, secret bool) string {
	if secret {
		sum := p.calls.mac("output", string(output))
		return keyedDigest + hex.EncodeToString(sum[:])
	}
	sum := sha256.Sum256(output)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// claim returns the call that holds key: f when it has finished, else e, and
// whether the caller is the first and must run it.
func (r *replays) claim(key callKey, digest [16]byte) (e *running, f *finished, first bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.running[key]; e != nil {
		return e, nil, false
	}
	if i, ok := r.index[key]; ok {
		done := r.ring[i]
		return nil, &done, false
	}
	e = &running{key: key, digest: digest, done: make(chan struct{})}
	r.running[key] = e
	return e, nil, true
}

// end moves a call that has its answer to the finished ones. One that left no
// record is forgotten: it may be tried again.
func (r *replays) end(e *running) {
	r.mu.Lock()
	delete(r.running, e.key)
	if e.decision != 0 {
		r.keep(finished{e.key, e.digest, e.decision, e.action})
	}
	r.mu.Unlock()
	close(e.done)
}

// keep remembers f. mu is held, or nobody else is there yet.
func (r *replays) keep(f finished) {
	if i, ok := r.index[f.key]; ok {
		r.ring[i] = f
		return
	}
	if len(r.ring) < r.max {
		r.ring = append(r.ring, f)
		r.index[f.key] = int32(len(r.ring) - 1)
		return
	}
	delete(r.index, r.ring[r.next].key)
	r.ring[r.next] = f
	r.index[f.key] = int32(r.next)
	r.next = (r.next + 1) % r.max
}

// all are the finished calls with decisions up to seq, oldest first.
func (r *replays) all(seq uint64) []finished {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]finished, 0, len(r.ring))
	for i := range r.ring {
		if f := r.ring[(r.next+i)%len(r.ring)]; f.decision <= seq && f.action <= seq {
			out = append(out, f)
		}
	}
	return out
}

// once runs a call that has a call_id, or answers it from the log.
func (p *Pipeline) once(ctx context.Context, r *Request, t *tool.Tool, tools *tool.Registry, mode Mode) Answer {
	digest := shortDigest(p.calls.paramsDigest(r))
	e, done, first := p.calls.claim(p.calls.key(r.Caller, r.CallID), digest)
	if first {
		defer p.calls.end(e)
		return p.run(ctx, r, t, tools, mode, e)
	}
	if e != nil && e.digest != digest || done != nil && done.digest != digest {
		return deny(http.StatusConflict, LayerRequest, "call_id_reused",
			fmt.Sprintf("call_id %q was used with another tool or other params: use a new one", r.CallID))
	}
	if e != nil {
		wait := p.o.ReplayWait
		if ms := time.Duration(r.TimeoutMS) * time.Millisecond; ms > 0 {
			wait = min(wait, ms)
		}
		patience := time.NewTimer(wait)
		defer patience.Stop()
		select {
		case <-e.done:
		case <-ctx.Done():
			return stillRunning()
		case <-patience.C:
			return stillRunning()
		}
		done = &finished{e.key, e.digest, e.decision, e.action}
	}
	if done.decision == 0 {
		return deny(http.StatusServiceUnavailable, LayerAudit, codeAudit, "the first call with this call_id could not be recorded: try again")
	}
	// What is replayed must be what a restart would find.
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.o.AuditTimeout)
	defer cancel()
	if err := p.o.Log.WaitDurable(wctx, max(done.decision, done.action)); err != nil {
		return auditFailed(err)
	}
	a, err := p.replay(done)
	if err != nil {
		return deny(http.StatusServiceUnavailable, LayerAudit, "replay_unavailable",
			"the first call with this call_id has run, and its record cannot be read: "+err.Error()+". It is never run again under this call_id")
	}
	a.Replayed = true
	return a
}

func stillRunning() Answer {
	return deny(http.StatusServiceUnavailable, LayerRuntime, "first_call_running", "the first call with this call_id is still running: ask again later")
}

// codeAudit marks a call that was denied because it could not be recorded.
const codeAudit = "audit_unavailable"

// replay makes the answer of a call from its records.
func (p *Pipeline) replay(f *finished) (Answer, error) {
	rec, err := p.read(f.decision)
	if err != nil {
		return Answer{}, err
	}
	var d event.DecisionBody
	if err := json.Unmarshal(rec.Body, &d); err != nil {
		return Answer{}, fmt.Errorf("decision record %d: %w", f.decision, err)
	}
	if key, err := p.keyOf(&d); err != nil || key != f.key || shortDigest(d.ParamsDigest) != f.digest || rec.EventType != event.Decision {
		return Answer{}, fmt.Errorf("record %d is of another call", f.decision)
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
	if f.action == 0 {
		return finish(a, &tool.Result{Outcome: tool.OutcomeError, Code: "outcome_unknown", Message: unknownOutcome}), nil
	}
	audit := rec.AuditID
	if rec, err = p.read(f.action); err != nil {
		return Answer{}, err
	}
	var act event.ActionBody
	if err := json.Unmarshal(rec.Body, &act); err != nil {
		return Answer{}, fmt.Errorf("action record %d: %w", f.action, err)
	}
	if rec.AuditID != audit {
		return Answer{}, fmt.Errorf("record %d is of another call", f.action)
	}
	res := tool.Result{Outcome: tool.Outcome(rec.Outcome), Output: act.Output, Code: act.ErrorCode, Message: act.Error}
	if len(act.Reasons) > 0 {
		res.Code, res.Message = act.Reasons[0].Code, act.Reasons[0].Message
	}
	if res.Outcome == tool.OutcomeDenied && res.Code == codeAudit {
		a := deny(http.StatusServiceUnavailable, LayerAudit, codeAudit, "the first call with this call_id was denied because its decision could not be made durable; nothing ran: use a new call_id")
		a.AuditID = audit
		return a, nil
	}
	a = finish(a, &res)
	if act.OutputDigest != "" {
		a.ErrCode, a.ErrMsg = "output_not_kept", fmt.Sprintf("the output of the first run (%d bytes, %s) was not recorded in full", act.OutputBytes, act.OutputDigest)
	}
	return a, nil
}

// keyOf is the key of the call that left the decision d.
func (p *Pipeline) keyOf(d *event.DecisionBody) (callKey, error) {
	var in struct {
		Caller struct{ Type, ID string } `json:"caller"`
	}
	if err := json.Unmarshal(d.Input, &in); err != nil {
		return callKey{}, fmt.Errorf("input: %w", err)
	}
	return p.calls.key(Caller{Type: in.Caller.Type, ID: in.Caller.ID}, d.CallID), nil
}

const unknownOutcome = "the node stopped after it allowed this call and before it recorded what came of it: the tool may or may not have run. It is never run again under this call_id"

func (p *Pipeline) read(seq uint64) (otlp.Record, error) {
	payload, _, err := p.o.Log.Get(seq)
	if err != nil {
		return otlp.Record{}, err
	}
	return otlp.Parse(payload)
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
