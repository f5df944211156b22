package otlp_test

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
)

func encode(r otlp.Record, seq uint64) []byte {
	b := make([]byte, r.Size())
	r.Put(b, seq)
	return b
}

// FuzzRecord: the official types read what Put writes, and Parse reads the same.
func FuzzRecord(f *testing.F) {
	f.Add(uint64(1), int32(9), "decision", uint64(7), "0123456789abcdef", "a-1", "allow", "tool.echo", []byte(`{"x":1}`), true)
	f.Add(uint64(0), int32(0), "", uint64(1)<<63, "", "", "", "", []byte(nil), false)
	f.Add(uint64(1)<<62, int32(17), strings.Repeat("é", 200), uint64(0), "x", "y", "", strings.Repeat("k", 130), bytes.Repeat([]byte("b"), 20000), true)
	f.Fuzz(func(t *testing.T, ts uint64, sev int32, typ string, seq uint64, logID, auditID, decision, kind string, body []byte, trace bool) {
		if sev < 0 {
			sev = -sev
		}
		if sev < 0 {
			t.Skip("the severity has no positive value")
		}
		for _, s := range []*string{&typ, &logID, &auditID, &decision, &kind} {
			*s = strings.ToValidUTF8(*s, "?") // the decoder in front refuses anything else
		}
		body = bytes.ToValidUTF8(body, []byte("?"))
		in := otlp.Record{TimeUnixNano: ts, Severity: sev, EventType: typ, LogID: logID, Class: "decision", AuditID: auditID, Decision: decision, Kind: kind, Body: body}
		if trace {
			in.TraceID[3], in.SpanID[7] = 1, 2
		}
		b := encode(in, seq)
		in.Seq = seq

		var lr logs.LogRecord
		if err := proto.Unmarshal(b, &lr); err != nil {
			t.Fatal(err)
		}
		if lr.TimeUnixNano != ts || int32(lr.SeverityNumber) != sev || lr.EventName != typ || lr.Body.GetStringValue() != string(body) {
			t.Fatalf("the official type reads %v", &lr)
		}
		if trace && hex.EncodeToString(lr.TraceId) != hex.EncodeToString(in.TraceID[:]) {
			t.Fatalf("trace id %x", lr.TraceId)
		}
		attrs := map[string]string{}
		for _, kv := range lr.Attributes {
			if kv.Key == event.AttrSeq {
				if uint64(kv.Value.GetIntValue()) != seq {
					t.Fatalf("seq %d, want %d", kv.Value.GetIntValue(), seq)
				}
				continue
			}
			attrs[kv.Key] = kv.Value.GetStringValue()
		}
		for k, want := range map[string]string{event.AttrLogID: logID, event.AttrAuditID: auditID, event.AttrDecision: decision, event.AttrKind: kind, event.AttrClass: "decision"} {
			if attrs[k] != want {
				t.Fatalf("%s is %q, want %q", k, attrs[k], want)
			}
		}

		out, err := otlp.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Body, in.Body) {
			t.Fatalf("body %q, want %q", out.Body, in.Body)
		}
		if out.Seq != seq || out.EventType != typ || out.AuditID != auditID || out.TraceID != in.TraceID || out.SpanID != in.SpanID {
			t.Fatalf("Parse reads %+v, want %+v", out, in)
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add(encode(otlp.Record{EventType: "decision", Body: []byte("{}")}, 1))
	f.Add([]byte{0x32, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := otlp.Parse(b); err != nil && !strings.Contains(err.Error(), otlp.ErrMalformed.Error()) {
			t.Fatal(err)
		}
	})
}

func TestExportRequest(t *testing.T) {
	recs := [][]byte{
		encode(otlp.Record{EventType: "decision", LogID: "l", Body: []byte(`{"a":1}`)}, 1),
		encode(otlp.Record{EventType: "action", LogID: "l", Body: bytes.Repeat([]byte("x"), 40000)}, 2),
	}
	b := otlp.AppendExportRequest(nil, otlp.Resource{ServiceName: "autonomy-node", ServiceVersion: "1", InstanceID: "n-1"}, recs)
	var req collogs.ExportLogsServiceRequest
	if err := proto.Unmarshal(b, &req); err != nil {
		t.Fatal(err)
	}
	rl := req.ResourceLogs[0]
	if got := rl.Resource.Attributes[2].Value.GetStringValue(); got != "n-1" {
		t.Errorf("instance %q", got)
	}
	if n := len(rl.ScopeLogs[0].LogRecords); n != 2 {
		t.Fatalf("%d records", n)
	}
	if got := len(rl.ScopeLogs[0].LogRecords[1].Body.GetStringValue()); got != 40000 {
		t.Errorf("body of %d bytes", got)
	}
}

func TestPutDoesNotAllocate(t *testing.T) {
	r := otlp.Record{EventType: "decision", LogID: "0123456789abcdef", Class: "decision", AuditID: "a", Decision: "allow", Kind: "tool.echo", Body: []byte(`{"input":{}}`)}
	buf := make([]byte, r.Size())
	if n := testing.AllocsPerRun(100, func() { r.Put(buf[:r.Size()], 42) }); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}
