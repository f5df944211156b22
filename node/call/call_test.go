package call_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/tool"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/wal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// policy allows what its first rules say; the rest is denied with a reason.
const policy = `package autonomy

import rego.v2

decision := {"allow": allow, "reasons": reasons, "constraints": constraints, "redact": redact}

default allow := false

allow if input.kind in {"tool.echo", "tool.http_get"}

default reasons := []

reasons := [{"code": "no_shell", "message": "no shell here"}] if input.params.command == "id"

default constraints := {}

constraints := {"memory_max": 1048576} if input.params.command == "limited"

allow if input.params.command == "limited"

default redact := []

redact := ["/params/token"] if input.params.token
`

type current struct {
	a atomic.Pointer[prepared.Active]
}

func (c *current) Current() *prepared.Active { return c.a.Load() }

// rig is a pipeline over a real log, a real policy and real tools.
type rig struct {
	t      *testing.T
	dir    string
	log    *wal.Log
	p      *call.Pipeline
	policy current
	opts   func(*call.Options)
	tools  *tool.Registry
	logs   *bytes.Buffer
}

func newRig(t *testing.T, rego string, opts func(*call.Options)) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), opts: opts, logs: &bytes.Buffer{}}
	if rego != "" {
		r.policy.a.Store(compile(t, rego))
	}
	var err error
	r.tools, err = tool.Parse([]byte("tools:\n  tool.echo: {}\n  tool.shell: {}\n  tool.http_get:\n    hosts: [127.0.0.1]\n    allow_private: [127.0.0.1/32]\n"), tool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.tools.Close() })
	r.open()
	t.Cleanup(func() { r.log.Close() })
	return r
}

func compile(t *testing.T, rego string) *prepared.Active {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "policy.rego"), []byte(rego), 0o600); err != nil {
		t.Fatal(err)
	}
	raw, err := prepared.BuildBundle(dir, prepared.BuildOptions{Name: "test", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := prepared.ReadBundle(raw, prepared.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := prepared.Compile(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	return &prepared.Active{Program: p}
}

// open opens the log and recovers, as a node does at start.
func (r *rig) open() (unknown int) {
	r.t.Helper()
	var err error
	r.log, _, err = wal.Open(filepath.Join(r.dir, "wal"), wal.Options{SegmentBytes: 1 << 20, MaxBytes: 4 << 20, SyncInterval: time.Millisecond})
	if err != nil {
		r.t.Fatal(err)
	}
	o := call.Options{
		Log: r.log, Policies: &r.policy, Tools: func() *tool.Registry { return r.tools }, Logger: slog.New(slog.NewTextHandler(r.logs, nil)),
		NodeID: "n-1", Labels: map[string]string{"zone": "a"}, Assurance: func() string { return "reduced" },
		Agent:  func() call.Agent { return call.Agent{ID: "agent", ReleaseID: "r-1", Fingerprint: "blake3:00"} },
		Secret: []byte("the same at each start"),
	}
	if r.opts != nil {
		r.opts(&o)
	}
	r.p = call.New(o)
	unknown, err = r.p.Recover(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return unknown
}

func (r *rig) reopen() (unknown int) {
	r.t.Helper()
	if err := r.log.Close(); err != nil {
		r.t.Fatal(err)
	}
	return r.open()
}

func (r *rig) do(body string) call.Answer {
	r.t.Helper()
	req := call.Request{}
	if err := call.Decode([]byte(body), &req); err != nil {
		r.t.Fatalf("decode %s: %v", body, err)
	}
	req.Caller = call.Caller{Type: "anonymous", ID: "loopback"}
	return r.p.Do(r.t.Context(), &req, call.Execute)
}

// records are all records of the log.
func (r *rig) records() []otlp.Record {
	r.t.Helper()
	if err := r.log.Sync(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	var out []otlp.Record
	for seq := uint64(1); seq <= r.log.Durable(); seq++ {
		payload, _, err := r.log.Get(seq)
		if err != nil {
			r.t.Fatal(err)
		}
		rec, err := otlp.Parse(payload)
		if err != nil {
			r.t.Fatal(err)
		}
		if rec.Seq != seq {
			r.t.Fatalf("record %d says it is %d", seq, rec.Seq)
		}
		out = append(out, rec)
	}
	return out
}

func (r *rig) wantRecords(want ...string) []otlp.Record {
	r.t.Helper()
	recs := r.records()
	var have []string
	for _, rec := range recs {
		have = append(have, strings.Trim(rec.EventType+" "+rec.Decision+" "+rec.Outcome, " "))
	}
	if fmt.Sprint(have) != fmt.Sprint(want) {
		r.t.Fatalf("records %q, want %q", have, want)
	}
	return recs
}

func TestAllowed(t *testing.T) {
	r := newRig(t, policy, nil)
	params := `{"text":"hi",  "n":1.50}`
	a := r.do(`{"kind":"tool.echo","params":` + params + `,"session":"s-1"}`)
	if a.Status != 200 || a.Decision != "allow" || a.Outcome != "ok" || a.PolicyRef != "test@1.0.0" {
		t.Fatalf("%+v", a)
	}
	recs := r.wantRecords("decision allow", "action allow ok")
	if a.AuditID != recs[0].AuditID || a.AuditID != recs[1].AuditID || a.AuditID != event.ID(r.log.ID(), 1) {
		t.Errorf("audit ids: answer %s, records %s %s", a.AuditID, recs[0].AuditID, recs[1].AuditID)
	}
	var d event.DecisionBody
	if err := json.Unmarshal(recs[0].Body, &d); err != nil {
		t.Fatal(err)
	}
	var in map[string]json.RawMessage
	if err := json.Unmarshal(d.Input, &in); err != nil {
		t.Fatal(err)
	}
	if string(in["params"]) != params {
		t.Errorf("recorded params %s, want the very bytes %s", in["params"], params)
	}
	if recs[0].ReleaseID != "r-1" || recs[0].Fingerprint != "blake3:00" || recs[0].Kind != "tool.echo" {
		t.Errorf("%+v", recs[0])
	}
	// The recorded input gives the same decision again (INV-17).
	again, err := prepared.Replay(t.Context(), r.policy.Current().Program, d.Input)
	if err != nil || !again.Allow {
		t.Errorf("replayed: %+v, %v", again, err)
	}
}

// TestRecordBeforeEffect: when the tool's effect is seen, its decision is on disk.
func TestRecordBeforeEffect(t *testing.T) {
	r := newRig(t, policy, nil)
	var durable, hits atomic.Int64
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		hits.Add(1)
		durable.Store(int64(r.log.Durable()))
	}))
	defer web.Close()
	for i := range 5 {
		before := r.log.Stats().NextSeq
		a := r.do(fmt.Sprintf(`{"kind":"tool.http_get","params":{"endpoint":%q}}`, web.URL))
		if a.Status != 200 || hits.Load() != int64(i+1) {
			t.Fatalf("%+v", a)
		}
		if durable.Load() < int64(before) {
			t.Fatalf("the tool ran when %d was durable; its decision was %d", durable.Load(), before)
		}
	}
}

func TestDenied(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		t.Error("a denied call reached the server")
	}))
	defer web.Close()
	away := httptest.NewServer(http.RedirectHandler(strings.Replace(web.URL, "127.0.0.1", "127.0.0.2", 1), http.StatusFound))
	defer away.Close()
	for name, tc := range map[string]struct {
		rego    string
		opts    func(*call.Options)
		body    string
		status  int
		layer   string
		code    string // in Code or among Reasons
		records []string
	}{
		"by policy, with its reason": {body: `{"kind":"tool.shell","params":{"command":"id"}}`,
			status: 403, layer: "policy", code: "no_shell", records: []string{"decision deny"}},
		"by enforcement after policy allowed": {body: fmt.Sprintf(`{"kind":"tool.http_get","params":{"endpoint":%q}}`, away.URL),
			status: 403, layer: "runtime", code: "egress_denied", records: []string{"decision allow", "action deny denied"}},
		"unknown tool":                   {body: `{"kind":"tool.ehco"}`, status: 400, layer: "request", code: "unknown_tool"},
		"params that the schema refuses": {body: `{"kind":"tool.http_get","params":{"endpoint":7}}`, status: 400, layer: "request", code: "invalid_params"},
		"a limit that cannot be enforced": {body: `{"kind":"tool.shell","params":{"command":"limited"}}`,
			status: 403, layer: "policy", code: "constraint_unenforceable", records: []string{"decision deny"}},
		"undefined": {rego: "package autonomy\nimport rego.v2\nallow if input.kind == \"x\"\n", body: `{"kind":"tool.echo"}`,
			status: 403, layer: "policy", code: "undefined", records: []string{"decision deny", "error.evaluator"}},
		"builtin error": {rego: "package autonomy\nimport rego.v2\nallow if { x := to_number(input.session); x != 1 }\n", body: `{"kind":"tool.echo","session":"x"}`,
			status: 403, layer: "policy", code: "evaluation_error", records: []string{"decision deny", "error.evaluator"}},
		"result of the wrong form": {rego: "package autonomy\nimport rego.v2\ndecision := {\"allow\": \"yes\"}\n", body: `{"kind":"tool.echo"}`,
			status: 403, layer: "policy", code: "policy_result", records: []string{"decision deny", "error.evaluator"}},
		"approval is asked": {rego: "package autonomy\nimport rego.v2\ndecision := {\"allow\": true, \"approval\": {\"from\": \"ops\"}}\n", body: `{"kind":"tool.echo"}`,
			status: 403, layer: "policy", code: "approval_unavailable", records: []string{"decision deny"}},
		"no policy": {rego: "-", body: `{"kind":"tool.echo"}`, status: 503, layer: "policy", code: "no_policy"},
		"platform refused": {opts: func(o *call.Options) { o.Refuse = func() string { return "no disk" } },
			body: `{"kind":"tool.echo"}`, status: 503, layer: "assurance", code: "assurance_refused"},
		"a panic": {opts: func(o *call.Options) { o.Assurance = func() string { panic("boom") } },
			body: `{"kind":"tool.echo"}`, status: 503, layer: "runtime", code: "internal"},
	} {
		t.Run(name, func(t *testing.T) {
			rego := tc.rego
			switch rego {
			case "":
				rego = policy
			case "-":
				rego = ""
			}
			r := newRig(t, rego, tc.opts)
			a := r.do(tc.body)
			codes := a.Code
			for _, reason := range a.Reasons {
				codes += " " + reason.Code
			}
			if a.Status != tc.status || a.Decision != "deny" || a.Layer != tc.layer || !strings.Contains(codes, tc.code) || a.Reason == "" {
				t.Fatalf("%+v, want %d by %s with %s", a, tc.status, tc.layer, tc.code)
			}
			r.wantRecords(tc.records...)
			if (a.AuditID != "") != (len(tc.records) > 0) {
				t.Errorf("audit id %q with %d records", a.AuditID, len(tc.records))
			}
			out := a.AppendJSON(nil)
			if !json.Valid(out) {
				t.Errorf("not JSON: %s", out)
			}
		})
	}
}

// TestLogFull: at the ceiling calls are denied and nothing runs.
func TestLogFull(t *testing.T) {
	r := newRig(t, policy, nil)
	var hits atomic.Int64
	web := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits.Add(1) }))
	defer web.Close()
	fill := bytes.Repeat([]byte("x"), 64<<10)
	for {
		if _, err := r.log.Append(wal.ClassLifecycle, fill); err != nil {
			break
		}
	}
	for {
		if _, err := r.log.Append(wal.ClassLifecycle, fill[:64]); err != nil {
			break
		}
	}
	a := r.do(fmt.Sprintf(`{"kind":"tool.http_get","params":{"endpoint":%q}}`, web.URL))
	if a.Status != 503 || a.Layer != "audit" || a.Code != "log_full" || hits.Load() != 0 {
		t.Fatalf("%+v, %d hits", a, hits.Load())
	}
	// When what is there has been delivered, calls go on.
	for c := range wal.NumClasses {
		if err := r.log.Advance(c, r.log.Durable()); err != nil {
			t.Fatal(err)
		}
	}
	if a := r.do(`{"kind":"tool.echo"}`); a.Status != 200 {
		t.Fatalf("after delivery: %+v", a)
	}
}

func TestClosedLog(t *testing.T) {
	r := newRig(t, policy, nil)
	r.log.Close()
	if a := r.do(`{"kind":"tool.echo"}`); a.Status != 503 || a.Layer != "audit" {
		t.Fatalf("%+v", a)
	}
	r.open()
}

func TestIdempotency(t *testing.T) {
	r := newRig(t, policy, nil)
	var hits atomic.Int64
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "hit %d", hits.Add(1)) }))
	defer web.Close()
	body := fmt.Sprintf(`{"kind":"tool.http_get","params":{"endpoint":%q},"call_id":"c-1"}`, web.URL)

	var wg sync.WaitGroup
	answers := make([]call.Answer, 8)
	for i := range answers {
		wg.Go(func() { answers[i] = r.do(body) })
	}
	wg.Wait()
	replayed := 0
	for _, a := range answers {
		if a.Status != 200 || a.AuditID != answers[0].AuditID || !bytes.Equal(a.Output, answers[0].Output) {
			t.Errorf("%+v", a)
		}
		if a.Replayed {
			replayed++
		}
	}
	if hits.Load() != 1 || replayed != 7 {
		t.Fatalf("%d hits, %d replays, want 1 and 7", hits.Load(), replayed)
	}
	r.wantRecords("decision allow", "action allow ok")

	if unknown := r.reopen(); unknown != 0 {
		t.Errorf("%d outcomes unknown after a clean stop", unknown)
	}
	if a := r.do(body); !a.Replayed || a.AuditID != answers[0].AuditID || !bytes.Equal(a.Output, answers[0].Output) || hits.Load() != 1 {
		t.Errorf("after a restart: %+v, %d hits", a, hits.Load())
	}
	if a := r.do(strings.Replace(body, "endpoint\":\"", "endpoint\":\"http://127.0.0.1:1/?", 1)); a.Status != 409 || a.Code != "call_id_reused" {
		t.Errorf("other params: %+v", a)
	}
	if a := r.do(`{"kind":"tool.shell","params":{"command":"id"},"call_id":"c-2"}`); a.Status != 403 || a.Replayed {
		t.Errorf("%+v", a)
	}
	if a := r.do(`{"kind":"tool.shell","params":{"command":"id"},"call_id":"c-2"}`); a.Status != 403 || !a.Replayed || a.Reason != "no shell here" {
		t.Errorf("a replayed denial: %+v", a)
	}
}

// TestOutcomeUnknown: a decision whose action was lost is reported, and never run again.
func TestOutcomeUnknown(t *testing.T) {
	r := newRig(t, policy, nil)
	body := `{"kind":"tool.echo","params":{"text":"x"},"call_id":"c-1"}`
	first := r.do(body)
	rec := r.records()[0]
	// A second node's log that ends after the decision: what a crash leaves.
	cut := newRig(t, policy, nil)
	old := rec.AuditID
	payload := encode(rec, cut.log.ID(), 1)
	if _, err := cut.log.Append(wal.ClassDecision, payload); err != nil {
		t.Fatal(err)
	}
	if unknown := cut.reopen(); unknown != 1 {
		t.Fatalf("%d outcomes unknown, want 1", unknown)
	}
	recs := cut.wantRecords("decision allow", "action allow error")
	if !strings.Contains(string(recs[1].Body), "outcome_unknown") || recs[1].AuditID == old {
		t.Errorf("%s %s", recs[1].AuditID, recs[1].Body)
	}
	a := cut.do(body)
	if !a.Replayed || a.Outcome != "error" || a.ErrCode != "outcome_unknown" || a.AuditID == first.AuditID {
		t.Errorf("%+v", a)
	}
	if unknown := cut.reopen(); unknown != 0 {
		t.Errorf("reported twice: %d", unknown)
	}
}

func encode(rec otlp.Record, logID string, seq uint64) []byte {
	rec.LogID, rec.AuditID = logID, event.ID(logID, seq)
	b := make([]byte, rec.Size())
	rec.Put(b, seq)
	return b
}

func TestRedact(t *testing.T) {
	r := newRig(t, policy, nil)
	a := r.do(`{"kind":"tool.echo","params":{"token":"s3cr3t-value","text":"x"}}`)
	if a.Status != 200 || !strings.Contains(string(a.Output), "s3cr3t-value") {
		t.Fatalf("%+v", a)
	}
	for _, rec := range r.wantRecords("decision allow", "action allow ok") {
		if bytes.Contains(rec.Body, []byte("s3cr3t")) {
			t.Errorf("the secret is in the log: %s", rec.Body)
		}
	}
}

func TestDryRun(t *testing.T) {
	r := newRig(t, policy, nil)
	a := r.do(`{"kind":"tool.http_get","params":{"endpoint":"http://127.0.0.1:1/"},"dry_run":true}`)
	if a.Status != 200 || a.Decision != "allow" || a.Outcome != "" || !a.DryRun {
		t.Fatalf("%+v", a)
	}
	r.wantRecords("decision allow")
	if unknown := r.reopen(); unknown != 0 {
		t.Errorf("a dry run counts as cut off: %d", unknown)
	}
}

func TestFind(t *testing.T) {
	r := newRig(t, policy, nil)
	a := r.do(`{"kind":"tool.echo","params":{"text":"x"}}`)
	if err := r.log.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	me := call.Caller{Type: "anonymous", ID: "loopback"}
	recs, err := r.p.Find(t.Context(), a.AuditID, me)
	if err != nil || len(recs) != 2 || recs[0].EventType != event.Decision || recs[1].Outcome != "ok" {
		t.Fatalf("%+v, %v", recs, err)
	}
	for name, tc := range map[string]struct {
		id string
		c  call.Caller
	}{
		"another caller": {a.AuditID, call.Caller{Type: "unix", ID: "uid:1"}},
		"another log":    {"0000000000000000-0000000000000001", me},
		"an action":      {event.ID(r.log.ID(), 2), me},
		"beyond the end": {event.ID(r.log.ID(), 99), me},
		"garbage":        {"../../etc/passwd", me},
	} {
		if _, err := r.p.Find(t.Context(), tc.id, tc.c); !errors.Is(err, call.ErrNoCall) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCanceled: what the node's stop cuts off is recorded as killed.
func TestCanceled(t *testing.T) {
	r := newRig(t, policy, nil)
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	web := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) { close(started); <-req.Context().Done() }))
	defer web.Close()
	go func() { <-started; cancel() }()
	req := call.Request{Kind: "tool.http_get", Params: fmt.Appendf(nil, `{"endpoint":%q}`, web.URL)}
	a := r.p.Do(ctx, &req, call.Execute)
	if a.Status != 200 || a.Outcome != "killed" {
		t.Fatalf("%+v", a)
	}
	r.wantRecords("decision allow", "action allow killed")
}

func TestBatchedAnswersBeforeTheDisk(t *testing.T) {
	r := newRig(t, policy, func(o *call.Options) { o.Batched = true })
	if a := r.do(`{"kind":"tool.echo"}`); a.Status != 200 {
		t.Fatalf("%+v", a)
	}
	r.wantRecords("decision allow", "action allow ok")
}

// TestRecoverAfterRepair: a repair found the end of the log gone, of more than
// one record. The node starts all the same; a call whose action is gone has an
// unknown outcome.
func TestRecoverAfterRepair(t *testing.T) {
	r := newRig(t, policy, nil)
	first := r.do(`{"kind":"tool.echo","params":{"text":"a"}}`)
	r.do(`{"kind":"tool.echo","params":{"text":"b"}}`)
	last := uint64(len(r.records()))
	if err := errors.Join(r.log.AdvanceAll(last), r.log.Close()); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(r.dir, "wal")
	slot := filepath.Join(dir, "slot-0000")
	data, err := os.ReadFile(slot)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(data, []byte(first.AuditID))
	at += 1 + bytes.Index(data[at+1:], []byte(first.AuditID)) // in the action
	clear(data[at:])
	if err := os.WriteFile(slot, data, 0o600); err != nil {
		t.Fatal(err)
	}
	rep, err := wal.Repair(dir, wal.RepairOptions{})
	if err != nil || len(rep.Lost) != 1 || rep.Lost[0].First != 2 || rep.Lost[0].Last != last {
		t.Fatalf("%+v, %v: want records 2 to %d lost", rep, err, last)
	}
	if unknown := r.open(); unknown != 1 {
		t.Fatalf("%d outcomes unknown, want 1", unknown)
	}
	if err := r.log.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	recs, err := r.p.Find(t.Context(), first.AuditID, call.Caller{Type: "anonymous", ID: "loopback"})
	if err != nil || len(recs) != 2 || recs[1].Seq != last+1 || !strings.Contains(string(recs[1].Body), "outcome_unknown") {
		t.Fatalf("%+v, %v", recs, err)
	}
}

// tracer gives every call the same span, and keeps what it was told at its end.
type tracer struct{ ended []call.Report }

const spanParent = "00-4bf92f3577b34da6a3ce929d0e0e4736-1111111111111111-01"

func (tr *tracer) Start(r *call.Request, _ time.Time) (call.Span, string) {
	if r.TraceParent != "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01" {
		panic("the caller's trace context is not there: " + r.TraceParent)
	}
	return tr, spanParent
}

func (tr *tracer) End(r *call.Report) { tr.ended = append(tr.ended, *r) }

// TestTraced: the records and the tool carry the span of the call; who observes
// is told of the call with its answer and its times.
func TestTraced(t *testing.T) {
	var got string
	web := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r.Header.Get("traceparent") }))
	defer web.Close()
	tr := &tracer{}
	var seen []call.Report
	r := newRig(t, policy, func(o *call.Options) {
		o.Tracer = tr
		o.Observe = func(r *call.Report) { seen = append(seen, *r) }
	})
	req := call.NewRequest()
	defer req.Free()
	req.Kind, req.Params = "tool.http_get", fmt.Appendf(nil, `{"endpoint":%q}`, web.URL)
	req.TraceParent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	a := r.p.Do(t.Context(), req, call.Execute)
	if a.Status != 200 || a.Outcome != "ok" {
		t.Fatalf("%+v", a)
	}
	if got != spanParent {
		t.Errorf("the tool was given %q", got)
	}
	for _, rec := range r.wantRecords("decision allow", "action allow ok") {
		if fmt.Sprintf("%x", rec.SpanID) != "1111111111111111" {
			t.Errorf("%s carries span %x", rec.EventType, rec.SpanID)
		}
	}
	for _, list := range [][]call.Report{tr.ended, seen} {
		if len(list) != 1 || list[0].Answer.AuditID != a.AuditID || list[0].Eval <= 0 || list[0].Durable <= 0 || list[0].Tool <= 0 || list[0].Total < list[0].Tool {
			t.Errorf("told of %+v", list)
		}
	}
}
