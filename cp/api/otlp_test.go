package api

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/cp/store/sqlite"
	"github.com/autonomyops/autonomy/cp/store/storetest"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
)

func str(s string) *commonpb.AnyValue {
	return &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: s}}
}

func attr(k, v string) *commonpb.KeyValue { return &commonpb.KeyValue{Key: k, Value: str(v)} }

func request(node string, recs ...*logspb.LogRecord) *collogs.ExportLogsServiceRequest {
	return &collogs.ExportLogsServiceRequest{ResourceLogs: []*logspb.ResourceLogs{{
		Resource:  &resourcepb.Resource{Attributes: []*commonpb.KeyValue{attr("service.name", "autonomy-node"), attr(event.ResourceInstance, node)}},
		ScopeLogs: []*logspb.ScopeLogs{{LogRecords: recs}},
	}}}
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// otlpJSON is OTLP's JSON: protojson, but ids in hex.
func otlpJSON(t testing.TB, m *collogs.ExportLogsServiceRequest) []byte {
	t.Helper()
	b, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, rl := range m.ResourceLogs {
		for _, sl := range rl.ScopeLogs {
			for _, rec := range sl.LogRecords {
				for _, id := range [][]byte{rec.TraceId, rec.SpanId} {
					if len(id) > 0 {
						quoted, _ := json.Marshal(id)
						b = bytes.Replace(b, quoted, []byte(`"`+hex.EncodeToString(id)+`"`), 1)
					}
				}
			}
		}
	}
	return b
}

// TestOTLPSameEvent: what the node writes into its log is the same event,
// whichever way it comes: in the node's framing, re-encoded by another program,
// as JSON, compressed, or natively.
func TestOTLPSameEvent(t *testing.T) {
	r := newRig(t, Options{})
	want := event.Event{
		EventID: event.ID(storetest.LogA, 7), EventType: event.Decision, NodeID: "n1", LogID: storetest.LogA, Seq: 7,
		Timestamp: time.Unix(1_790_000_000, 123456789).UTC(), Class: "decision", AuditID: "aud", Decision: "deny", Outcome: "denied",
		Kind: "tool.exec.x", ReleaseID: "r-1", Fingerprint: "blake3:ab", TraceID: "0102030405060708090a0b0c0d0e0f10",
		Body: json.RawMessage(`{"reasons":[{"message":"because <b>"}],"input":{"kind":"tool.exec.x"}}`),
	}
	rec := otlp.Record{
		TimeUnixNano: uint64(want.Timestamp.UnixNano()), Severity: otlp.Warn, EventType: want.EventType, LogID: want.LogID, Class: want.Class,
		AuditID: want.AuditID, Decision: want.Decision, Outcome: want.Outcome, Kind: want.Kind, ReleaseID: want.ReleaseID, Fingerprint: want.Fingerprint, Body: want.Body,
	}
	id, _ := hex.DecodeString(want.TraceID)
	copy(rec.TraceID[:], id)
	copy(rec.SpanID[:], id)
	raw := make([]byte, rec.Size())
	rec.Put(raw, want.Seq)
	framed := otlp.AppendExportRequest(nil, otlp.Resource{ServiceName: event.ServiceName, InstanceID: "n1"}, [][]byte{raw})
	var msg collogs.ExportLogsServiceRequest
	if err := proto.Unmarshal(framed, &msg); err != nil {
		t.Fatal(err)
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, []byte(native(want)), "", "  "); err != nil {
		t.Fatal(err)
	}
	for i, d := range []struct {
		name, ct, enc string
		body          []byte
	}{
		{"as the node frames it", typeProtobuf, "", framed},
		{"re-encoded", typeProtobuf, "", marshal(t, &msg)},
		{"gzip", typeProtobuf, "gzip", gz(framed)},
		{"JSON", typeJSON, "", otlpJSON(t, &msg)},
		{"JSON, gzip", typeJSON, "gzip", gz(otlpJSON(t, &msg))},
		{"native", typeJSON, "", []byte(native(want))},
		{"native, indented", typeJSON, "", pretty.Bytes()},
	} {
		a := r.do("POST", "/v1/events", d.body, "Content-Type", d.ct, "Content-Encoding", d.enc)
		if a.status != 200 || a.header.Get("Content-Type") != d.ct {
			t.Fatalf("%s: %d %s %s", d.name, a.status, a.header.Get("Content-Type"), a.body)
		}
		if !strings.HasPrefix(d.name, "native") {
			var resp collogs.ExportLogsServiceResponse
			unmarshal := proto.Unmarshal
			if d.ct == typeJSON {
				unmarshal = protojson.Unmarshal
			}
			if err := unmarshal(a.body, &resp); err != nil || resp.GetPartialSuccess() != nil {
				t.Errorf("%s: answer %q, %v", d.name, a.body, err)
			}
		}
		got := storetest.All(t, r.st, store.Filter{}, 10)
		if len(got) != 1 {
			t.Fatalf("after %s (%d): %d events, want 1", d.name, i, len(got))
		}
		if store.Digest(&got[0].Event) != store.Digest(&want) {
			t.Fatalf("%s: have %+v\nwant %+v", d.name, got[0].Event, want)
		}
	}
	if nodes, _ := r.st.Nodes(t.Context(), "", 1); nodes[0].Conflicts != 0 {
		t.Errorf("%d conflicts", nodes[0].Conflicts)
	}
}

// TestOTLPForeign: records of other programs are kept, under a name made of
// their content.
func TestOTLPForeign(t *testing.T) {
	r := newRig(t, Options{})
	kv := func(v *commonpb.AnyValue) *logspb.LogRecord {
		return &logspb.LogRecord{ObservedTimeUnixNano: 1e18, Body: v}
	}
	dbl := func(f float64) *commonpb.AnyValue {
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_DoubleValue{DoubleValue: f}}
	}
	var inf float64
	inf = 1 / inf
	recs := []*logspb.LogRecord{
		kv(str("plain words")), kv(str(`["an array"]`)), kv(str(`{"twice":1,"twice":2}`)), kv(dbl(1.5)), kv(dbl(inf)), kv(nil),
		kv(&commonpb.AnyValue{Value: &commonpb.AnyValue_KvlistValue{KvlistValue: &commonpb.KeyValueList{Values: []*commonpb.KeyValue{attr("k", "v")}}}}),
		kv(&commonpb.AnyValue{Value: &commonpb.AnyValue_ArrayValue{ArrayValue: &commonpb.ArrayValue{Values: []*commonpb.AnyValue{str("a"), dbl(2)}}}}),
		kv(&commonpb.AnyValue{Value: &commonpb.AnyValue_BytesValue{BytesValue: []byte("xy")}}),
	}
	bodies := []string{`{"value":"plain words"}`, `{"value":"[\"an array\"]"}`, `{"value":"{\"twice\":1,\"twice\":2}"}`, `{"value":1.5}`, `{"value":"+Inf"}`, ``, `{"value":{"k":"v"}}`, `{"value":["a",2]}`, `{"value":"eHk="}`}
	for i := range recs {
		recs[i].ObservedTimeUnixNano += uint64(i)
	}
	recs[0].Attributes = []*commonpb.KeyValue{attr("event.name", "device.app.lifecycle")}
	body := marshal(t, request("host-1", recs...))
	for range 2 { // the second delivery changes nothing
		if a := r.do("POST", "/v1/events", body, "Content-Type", typeProtobuf); a.status != 200 || len(a.body) != 0 {
			t.Fatalf("%d %q", a.status, a.body)
		}
	}
	got := storetest.All(t, r.st, store.Filter{NodeID: "host-1"}, 100)
	if len(got) != len(recs) {
		t.Fatalf("%d events, want %d", len(got), len(recs))
	}
	for i, want := range bodies {
		if e := got[len(got)-1-i]; string(e.Body) != want {
			t.Errorf("record %d: body %s, want %s", i, e.Body, want)
		}
	}
	if e := got[len(got)-1]; e.EventType != "device.app.lifecycle" || !strings.HasPrefix(e.EventID, "sha256-") {
		t.Errorf("first record: %+v", e)
	}
	if e := got[0]; e.EventType != "log" {
		t.Errorf("record without a name has type %q", e.EventType)
	}
}

// TestOTLPPartial: records that cannot be stored are counted in the answer, the
// others are stored.
func TestOTLPPartial(t *testing.T) {
	good := &logspb.LogRecord{TimeUnixNano: 1e18, EventName: "x", Body: str("{}")}
	for name, tt := range map[string]struct {
		req  *collogs.ExportLogsServiceRequest
		want string
	}{
		"no time":     {request("n1", good, &logspb.LogRecord{EventName: "x"}), "no usable time"},
		"long kind":   {request("n1", good, &logspb.LogRecord{TimeUnixNano: 1, Attributes: []*commonpb.KeyValue{attr(event.AttrKind, strings.Repeat("k", 200))}}), "kind: 200 bytes"},
		"wrong name":  {request("n1", good, &logspb.LogRecord{TimeUnixNano: 1, Attributes: []*commonpb.KeyValue{attr(event.AttrEventID, "x"), attr(event.AttrLogID, "l"), {Key: event.AttrSeq, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: 3}}}}}), "is named"},
		"negative":    {request("n1", good, &logspb.LogRecord{TimeUnixNano: 1, Attributes: []*commonpb.KeyValue{{Key: event.AttrSeq, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: -3}}}}}), "want 1 or more"},
		"no instance": {&collogs.ExportLogsServiceRequest{ResourceLogs: append(request("n1", good).ResourceLogs, &logspb.ResourceLogs{ScopeLogs: []*logspb.ScopeLogs{{LogRecords: []*logspb.LogRecord{good}}}})}, "which node"},
		"too large":   {request("n1", good, &logspb.LogRecord{TimeUnixNano: 1, Body: str(strings.Repeat("x", maxRecord))}), "at most"},
	} {
		for _, ct := range []string{typeProtobuf, typeJSON} {
			r := newRig(t, Options{})
			body := marshal(t, tt.req)
			if ct == typeJSON {
				body = otlpJSON(t, tt.req)
			}
			a := r.do("POST", "/v1/events", body, "Content-Type", ct)
			var resp collogs.ExportLogsServiceResponse
			var err error
			if ct == typeJSON {
				err = protojson.Unmarshal(a.body, &resp)
			} else {
				err = proto.Unmarshal(a.body, &resp)
			}
			if ps := resp.GetPartialSuccess(); err != nil || a.status != 200 || ps.GetRejectedLogRecords() != 1 || !strings.Contains(ps.GetErrorMessage(), tt.want) {
				t.Errorf("%s, %s: %d %v %v", name, ct, a.status, &resp, err)
			}
			if n := len(storetest.All(t, r.st, store.Filter{}, 10)); n != 1 {
				t.Errorf("%s, %s: %d events, want 1", name, ct, n)
			}
		}
	}
}

// TestOTLPResourceLast: protobuf allows fields in any order.
func TestOTLPResourceLast(t *testing.T) {
	m := request("n9", &logspb.LogRecord{TimeUnixNano: 5, EventName: "x"}).ResourceLogs[0]
	var rl []byte
	rl = protowire.AppendBytes(protowire.AppendTag(rl, 2, protowire.BytesType), marshal(t, m.ScopeLogs[0]))
	rl = protowire.AppendBytes(protowire.AppendTag(rl, 1, protowire.BytesType), marshal(t, m.Resource))
	b, err := decodeOTLP(protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), rl), typeProtobuf)
	if err != nil || len(b.events) != 1 || b.events[0].NodeID != "n9" {
		t.Errorf("%+v, %v", b, err)
	}
}

// TestBombs: small requests that would be large in memory are refused, and
// their handling allocates no more than a stated amount at one time.
func TestBombs(t *testing.T) {
	r := newRig(t, Options{})
	zeros := gz(bytes.Repeat([]byte(" "), 8<<20))
	tiny := bytes.Repeat([]byte("\x12\x00"), 2<<20/2) // one million empty records
	scope := protowire.AppendBytes([]byte{2<<3 | 2}, tiny)
	emptyRecords := protowire.AppendBytes([]byte{1<<3 | 2}, scope)
	for _, tt := range []struct {
		name, ct, enc string
		body          []byte
		status        int
		code          string
	}{
		{"gzip ratio", typeJSON, "gzip", zeros, 413, "compression_ratio"},
		{"empty records", typeProtobuf, "", emptyRecords, 413, "too_many_events"},
		{"empty JSON records", typeJSON, "", []byte(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{}` + strings.Repeat(",{}", 1<<20) + `]}]}]}`), 413, "too_many_events"},
		{"empty native events", typeJSON, "", []byte(`{"events":[{}` + strings.Repeat(",{}", 1<<20) + `]}`), 400, "invalid_event"},
		{"deep value", typeJSON, "", []byte(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":` + strings.Repeat(`{"arrayValue":{"values":[`, 5000) + strings.Repeat(`]}}`, 5000) + `}]}]}]}`), 400, "bad_otlp"},
	} {
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		a := r.do("POST", "/v1/events", tt.body, "Content-Type", tt.ct, "Content-Encoding", tt.enc)
		runtime.ReadMemStats(&after)
		if a.status != tt.status || a.code() != tt.code {
			t.Errorf("%s: %d %s, want %d %s", tt.name, a.status, a.code(), tt.status, tt.code)
		}
		if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > 256<<20 {
			t.Errorf("%s: the heap grew by %d MiB", tt.name, grown>>20)
		}
	}
	if n := len(storetest.All(t, r.st, store.Filter{}, 10)); n != 0 {
		t.Errorf("%d events are held", n)
	}
}

// FuzzEvents: no body makes the decoders panic, and what they accept is valid.
func FuzzEvents(f *testing.F) {
	f.Add([]byte(native(storetest.Make("n1", storetest.LogA, 1))), false)
	f.Add([]byte(`{"resourceLogs":[{"resource":{},"scopeLogs":[{"logRecords":[{"timeUnixNano":"5","traceId":"0102030405060708090a0b0c0d0e0f10"}]}]}]}`), false)
	f.Add(marshal(f, request("n1", &logspb.LogRecord{TimeUnixNano: 5, Body: str(`{"a":1}`)})), true)
	f.Fuzz(func(t *testing.T, body []byte, pb bool) {
		var events []event.Event
		if !pb && !looksLikeOTLP(body) {
			ev, err := decodeNative(body)
			if err != nil {
				if !asProblem(err) {
					t.Fatalf("not a problem: %v", err)
				}
				return
			}
			events = ev
		} else {
			mt := typeJSON
			if pb {
				mt = typeProtobuf
			}
			b, err := decodeOTLP(body, mt)
			if err != nil {
				if !asProblem(err) {
					t.Fatalf("not a problem: %v", err)
				}
				return
			}
			events = b.events
		}
		for i := range events {
			if err := store.ValidateEvent(&events[i]); err != nil {
				t.Fatalf("event %d: %v", i, err)
			}
			if len(events[i].Body) > 0 && !json.Valid(events[i].Body) {
				t.Fatalf("event %d: body %q", i, events[i].Body)
			}
		}
	})
}

// BenchmarkIngest posts batches of 1,000 records as OTLP/HTTP protobuf to a
// listening server, durable answers.
func BenchmarkIngest(b *testing.B) {
	const batch = 1000
	st, err := sqlite.Open(b.Context(), sqlite.Options{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer st.Close()
	srv := httptest.NewServer(New(Options{Store: st}))
	defer srv.Close()
	seq := uint64(1)
	res := otlp.Resource{ServiceName: event.ServiceName, InstanceID: "n1"}
	b.ResetTimer()
	for range b.N {
		records := make([][]byte, batch)
		for i := range records {
			rec := otlp.Record{TimeUnixNano: 1_790_000_000_000_000_000 + seq, Severity: otlp.Info, EventType: event.Decision, LogID: storetest.LogA, Class: "decision",
				AuditID: fmt.Sprintf("%026d", seq), Decision: "allow", Kind: "tool.echo", Body: []byte(`{"policy_ref":"quickstart@1.0.0","eval_ns":3400,"input":{"kind":"tool.echo","params":{"text":"hello"}}}`)}
			records[i] = make([]byte, rec.Size())
			rec.Put(records[i], seq)
			seq++
		}
		resp, err := srv.Client().Post(srv.URL+"/v1/events", typeProtobuf, bytes.NewReader(otlp.AppendExportRequest(nil, res, records)))
		if err != nil {
			b.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != 200 {
			b.Fatal(resp.Status)
		}
	}
	b.ReportMetric(float64(b.N)*batch/b.Elapsed().Seconds(), "events/s")
}
