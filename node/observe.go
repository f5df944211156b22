package node

import (
	"context"
	"encoding/hex"
	"log/slog"
	"time"

	"github.com/autonomyops/autonomy/node/call"
)

// observe is told of every call when it has its answer, on the call's own
// goroutine. It writes the wide log event, one line with all that is known of
// the call but its params and output, for one call in --log-calls and for every
// slow one, and has the flight recorder write down what made a call slow.
func (n *node) observe(r *call.Report) {
	t := n.tuning.Load()
	slow := t.slow > 0 && r.Total >= t.slow
	if slow && n.flight != nil {
		n.flight.notice(r.Answer.AuditID)
	}
	if slow || t.logCalls > 0 && n.observed.Add(1)%uint64(t.logCalls) == 0 {
		n.log.LogAttrs(context.Background(), slog.LevelInfo, "call", callAttrs(r, slow)...)
	}
}

// callAttrs are the attributes of the wide event. Durations are microseconds.
// Empty ones are left out.
func callAttrs(r *call.Report, slow bool) []slog.Attr {
	req, a := r.Request, &r.Answer
	attrs := make([]slog.Attr, 0, 24)
	text := func(key, v string) {
		if v != "" {
			attrs = append(attrs, slog.String(key, v))
		}
	}
	micros := func(key string, d time.Duration) {
		if d > 0 {
			attrs = append(attrs, slog.Int64(key, d.Microseconds()))
		}
	}
	text("audit_id", a.AuditID)
	text("kind", req.Kind)
	text("caller_type", req.Caller.Type)
	text("caller_id", req.Caller.ID)
	text("session", req.Session)
	text("call_id", req.CallID)
	attrs = append(attrs, slog.Int("status", a.Status))
	text("decision", a.Decision)
	text("layer", a.Layer)
	text("code", a.Code)
	if len(a.Reasons) > 0 {
		text("reason_code", a.Reasons[0].Code)
	}
	text("outcome", a.Outcome)
	text("error_code", a.ErrCode)
	text("policy_ref", a.PolicyRef)
	if traceID, _, ok := call.ParseTraceParent(req.TraceParent); ok {
		text("trace_id", hex.EncodeToString(traceID[:]))
	}
	attrs = append(attrs, slog.Int("params_bytes", len(req.Params)), slog.Int("output_bytes", len(a.Output)))
	micros("total_us", r.Total)
	micros("eval_us", r.Eval)
	micros("durable_us", r.Durable)
	micros("tool_us", r.Tool)
	for key, v := range map[string]bool{"dry_run": a.DryRun, "replayed": a.Replayed, "slow": slow} {
		if v {
			attrs = append(attrs, slog.Bool(key, true))
		}
	}
	return attrs
}
