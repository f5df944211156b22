package call_test

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/wal"
)

var quietLog = slog.New(slog.DiscardHandler)

// fill writes the records of n allowed calls, every tenth with a call_id.
func fill(b *testing.B, log *wal.Log, n int) {
	b.Helper()
	put := func(c wal.Class, rec otlp.Record, audit string) string {
		res, err := log.Reserve(c, func() int { rec.AuditID = event.ID(log.ID(), 0); return rec.Size() }())
		if err != nil {
			b.Fatal(err)
		}
		if rec.AuditID = audit; audit == "" {
			rec.AuditID = event.ID(log.ID(), res.Seq)
		}
		rec.Put(res.Buf, res.Seq)
		res.Commit()
		return rec.AuditID
	}
	for i := range n {
		id := ""
		if i%10 == 0 {
			id = fmt.Sprintf(`,"call_id":"c-%d","params_digest":"hmac-sha256:%064x"`, i, i)
		}
		body := fmt.Sprintf(`{"policy_ref":"q@1.0.0","policy_digest":"sha256:%064x","eval_ns":12345%s,"input":{"kind":"tool.echo","params":{"text":"hello, this is what an agent might say"},"session":"s-1","caller":{"type":"unix","id":"uid:1000","uid":1000,"gid":1000,"pid":4711},"agent":{"id":"","release":"","fingerprint":""},"node":{"id":"n","labels":{},"assurance":"none"},"time_ns":1790000000000000000}}`, 1, id)
		rec := otlp.Record{TimeUnixNano: 1, Severity: otlp.Info, EventType: event.Decision, LogID: log.ID(), Class: "decision", Decision: "allow", Kind: "tool.echo", Body: []byte(body)}
		audit := put(wal.ClassDecision, rec, "")
		rec.EventType, rec.Class, rec.Outcome = event.Action, "action", "ok"
		rec.Body = []byte(`{"duration_ns":1234,"output":{"text":"hello, this is what an agent might say"}}`)
		put(wal.ClassAction, rec, audit)
	}
}
