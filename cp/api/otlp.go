package api

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"time"

	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/strictjson"
)

// Media types of the events path.
const (
	typeJSON     = "application/json"
	typeProtobuf = "application/x-protobuf"
	typeNDJSON   = "application/x-ndjson"
)

// Limits inside an OTLP request. Records are decoded one at a time, so that a
// request of very many, very small messages costs no more memory than what is
// stored of it.
const (
	maxRecord   = store.MaxBody + 64<<10 // bytes of one encoded LogRecord
	maxResource = 64 << 10               // bytes of one encoded Resource
	maxNesting  = 64                     // depth of values in values
)

// otlpBatch is what an OTLP request holds. Records that cannot be stored are
// counted, not refused with the others: OTLP has partial success for that.
type otlpBatch struct {
	events   []event.Event
	rejected int
	first    error // why the first one was rejected
}

func (b *otlpBatch) reject(err error) {
	if b.first == nil {
		b.first = err
	}
	b.rejected++
}

// why is the message of the partial success.
func (b *otlpBatch) why(conflicts int) string {
	switch {
	case b.first != nil:
		return "the first rejected record: " + b.first.Error()
	case conflicts > 0:
		return "event_id known with other content: the first one was kept"
	}
	return ""
}

// add maps one record and takes it, or rejects it.
func (b *otlpBatch) add(res *resourcepb.Resource, rec *logspb.LogRecord) error {
	if len(b.events)+b.rejected >= store.MaxBatch {
		return tooMany()
	}
	e, err := eventOf(res, rec)
	if err == nil {
		err = normalize(&e)
	}
	if err != nil {
		b.reject(err)
		return nil
	}
	b.events = append(b.events, e)
	return nil
}

func looksLikeOTLP(body []byte) bool {
	dec := json.NewDecoder(bytes.NewReader(body))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return false
	}
	t, err := dec.Token()
	return err == nil && t == "resourceLogs"
}

func decodeOTLP(body []byte, mt string) (*otlpBatch, error) {
	var b otlpBatch
	if mt == typeProtobuf {
		return &b, b.protobuf(body)
	}
	return &b, b.json(body)
}

func badOTLP(err error) error {
	return badRequest("bad_otlp", "not an ExportLogsServiceRequest: %v: nothing was stored", err)
}

// message calls fn for each length-delimited field of a message; other fields
// are passed over, as protobuf demands of fields one does not know.
func message(b []byte, fn func(num protowire.Number, p []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if typ != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
				return protowire.ParseError(n)
			}
			b = b[n:]
			continue
		}
		p, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := fn(num, p); err != nil {
			return err
		}
	}
	return nil
}

var unmarshalProto = proto.UnmarshalOptions{RecursionLimit: maxNesting + 8}

// protobuf walks ExportLogsServiceRequest{1: ResourceLogs{1: Resource, 2:
// ScopeLogs{2: LogRecord}}}. A fault in the framing refuses the request.
func (b *otlpBatch) protobuf(body []byte) error {
	err := message(body, func(num protowire.Number, rl []byte) error {
		if num != 1 {
			return nil
		}
		var res resourcepb.Resource
		if err := message(rl, func(num protowire.Number, p []byte) error {
			if num != 1 {
				return nil
			}
			if len(p) > maxResource {
				return fmt.Errorf("resource has %d bytes, at most %d", len(p), maxResource)
			}
			return proto.UnmarshalOptions{Merge: true, RecursionLimit: maxNesting + 8}.Unmarshal(p, &res)
		}); err != nil {
			return err
		}
		return message(rl, func(num protowire.Number, sl []byte) error {
			if num != 2 {
				return nil
			}
			return message(sl, func(num protowire.Number, p []byte) error {
				if num != 2 {
					return nil
				}
				if len(p) > maxRecord {
					b.reject(fmt.Errorf("record has %d bytes, at most %d", len(p), maxRecord))
					return nil
				}
				var rec logspb.LogRecord
				if err := unmarshalProto.Unmarshal(p, &rec); err != nil {
					return err
				}
				return b.add(&res, &rec)
			})
		})
	})
	return passProblem(err)
}

// passProblem makes a 400 of err unless it is an answer already.
func passProblem(err error) error {
	if err == nil {
		return nil
	}
	if asProblem(err) {
		return err
	}
	return badOTLP(err)
}

var unmarshalJSON = protojson.UnmarshalOptions{DiscardUnknown: true, RecursionLimit: maxNesting + 8}

// json walks the JSON encoding, in which unknown keys are passed over and trace
// ids are hex, which protojson takes for base64: see traceID.
func (b *otlpBatch) json(body []byte) error {
	if err := strictjson.Check(body); err != nil {
		return badOTLP(err)
	}
	var req struct {
		ResourceLogs json.RawMessage `json:"resourceLogs"`
	}
	if err := json.Unmarshal(body, &req); err != nil {
		return badOTLP(err)
	}
	return passProblem(elements(req.ResourceLogs, func(raw json.RawMessage) error {
		var rl struct {
			Resource  json.RawMessage `json:"resource"`
			ScopeLogs json.RawMessage `json:"scopeLogs"`
		}
		if err := json.Unmarshal(raw, &rl); err != nil {
			return err
		}
		var res resourcepb.Resource
		if len(rl.Resource) > maxResource {
			return fmt.Errorf("resource has %d bytes, at most %d", len(rl.Resource), maxResource)
		}
		if len(rl.Resource) > 0 {
			if err := unmarshalJSON.Unmarshal(rl.Resource, &res); err != nil {
				return err
			}
		}
		return elements(rl.ScopeLogs, func(raw json.RawMessage) error {
			var sl struct {
				LogRecords json.RawMessage `json:"logRecords"`
			}
			if err := json.Unmarshal(raw, &sl); err != nil {
				return err
			}
			return elements(sl.LogRecords, func(raw json.RawMessage) error {
				if len(raw) > 2*maxRecord { // escaped
					b.reject(fmt.Errorf("record has %d bytes, at most %d", len(raw), 2*maxRecord))
					return nil
				}
				var rec logspb.LogRecord
				if err := unmarshalJSON.Unmarshal(raw, &rec); err != nil {
					return err
				}
				var err error
				if rec.TraceId, err = hexOf(rec.TraceId, 16); err != nil {
					return fmt.Errorf("traceId: %w", err)
				}
				if rec.SpanId, err = hexOf(rec.SpanId, 8); err != nil {
					return fmt.Errorf("spanId: %w", err)
				}
				return b.add(&res, &rec)
			})
		})
	}))
}

// hexOf undoes protojson's base64 reading of a hex string, whose length is a
// multiple of four and whose digits are all base64 digits.
func hexOf(b []byte, want int) ([]byte, error) {
	if len(b) == 0 {
		return nil, nil
	}
	id, err := hex.DecodeString(base64.StdEncoding.EncodeToString(b))
	if err != nil || len(id) != want {
		return nil, fmt.Errorf("want %d hex digits", 2*want)
	}
	return id, nil
}

// elements calls fn for each element of a JSON array; nothing and null are
// empty arrays.
func elements(raw json.RawMessage, fn func(json.RawMessage) error) error {
	if t := bytes.TrimSpace(raw); len(t) == 0 || bytes.Equal(t, []byte("null")) {
		return nil
	} else if t[0] != '[' {
		return errors.New("want an array")
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	if _, err := dec.Token(); err != nil {
		return err
	}
	for dec.More() {
		var el json.RawMessage
		if err := dec.Decode(&el); err != nil {
			return err
		}
		if err := fn(el); err != nil {
			return err
		}
	}
	return nil
}

// eventOf maps a record (internal/event tells the attributes). Records of other
// programs are taken too, if their resource says which instance they are from.
func eventOf(res *resourcepb.Resource, rec *logspb.LogRecord) (event.Event, error) {
	e := event.Event{EventType: rec.GetEventName()}
	for _, kv := range res.GetAttributes() {
		if kv.GetKey() == event.ResourceInstance {
			e.NodeID = kv.GetValue().GetStringValue()
		}
	}
	if e.NodeID == "" {
		return e, fmt.Errorf("the resource has no %s: which node is it?", event.ResourceInstance)
	}
	var foreignName string
	for _, kv := range rec.GetAttributes() {
		v := kv.GetValue()
		switch kv.GetKey() {
		case event.AttrEventID:
			e.EventID = v.GetStringValue()
		case event.AttrSeq:
			if v.GetIntValue() < 0 {
				return e, fmt.Errorf("%s is %d, want 1 or more", event.AttrSeq, v.GetIntValue())
			}
			e.Seq = uint64(v.GetIntValue())
		case event.AttrLogID:
			e.LogID = v.GetStringValue()
		case event.AttrClass:
			e.Class = v.GetStringValue()
		case event.AttrAuditID:
			e.AuditID = v.GetStringValue()
		case event.AttrDecision:
			e.Decision = v.GetStringValue()
		case event.AttrOutcome:
			e.Outcome = v.GetStringValue()
		case event.AttrKind:
			e.Kind = v.GetStringValue()
		case event.AttrReleaseID:
			e.ReleaseID = v.GetStringValue()
		case event.AttrFingerprint:
			e.Fingerprint = v.GetStringValue()
		case "event.name": // where it stood before LogRecord had the field
			foreignName = v.GetStringValue()
		}
	}
	if e.EventType == "" {
		e.EventType = foreignName
	}
	if e.EventType == "" {
		e.EventType = "log"
	}
	ns := rec.GetTimeUnixNano()
	if ns == 0 {
		ns = rec.GetObservedTimeUnixNano()
	}
	if ns == 0 || ns > math.MaxInt64 {
		return e, errors.New("the record has no usable time")
	}
	e.Timestamp = time.Unix(0, int64(ns)).UTC()
	if id := rec.GetTraceId(); len(id) == 16 {
		e.TraceID = hex.EncodeToString(id)
	}
	var err error
	if e.Body, err = bodyOf(rec.GetBody()); err != nil {
		return e, err
	}
	switch {
	case e.LogID != "" && e.Seq > 0:
		if e.EventID == "" {
			e.EventID = event.ID(e.LogID, e.Seq)
		}
	case e.EventID == "":
		e.EventID, err = contentID(res, rec)
	}
	return e, err
}

// contentID names a record that has no name, so that its second delivery is
// recognised.
func contentID(res *resourcepb.Resource, rec *logspb.LogRecord) (string, error) {
	opts := proto.MarshalOptions{Deterministic: true}
	b, err := opts.Marshal(res)
	if err != nil {
		return "", fmt.Errorf("resource: %w", err)
	}
	n := len(b)
	if b, err = opts.MarshalAppend(b, rec); err != nil {
		return "", fmt.Errorf("record: %w", err)
	}
	sum := sha256.Sum256(protowire.AppendVarint(b, uint64(n)))
	return "sha256-" + hex.EncodeToString(sum[:16]), nil
}

// bodyOf makes an object of a body: a string that holds one is that object,
// anything else becomes {"value":…}.
func bodyOf(v *commonpb.AnyValue) (json.RawMessage, error) {
	if v == nil || v.Value == nil {
		return nil, nil
	}
	if s, ok := v.Value.(*commonpb.AnyValue_StringValue); ok {
		if raw := []byte(s.StringValue); strictjson.CheckObject(raw) == nil {
			return raw, nil
		}
	}
	val, err := plain(v, 0)
	if err != nil {
		return nil, err
	}
	raw, err := json.Marshal(map[string]any{"value": val})
	if err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	return raw, nil
}

// plain turns an AnyValue into what encoding/json writes.
func plain(v *commonpb.AnyValue, depth int) (any, error) {
	if depth > maxNesting-2 {
		return nil, fmt.Errorf("body: nested deeper than %d", maxNesting)
	}
	switch x := v.GetValue().(type) {
	case *commonpb.AnyValue_StringValue:
		return x.StringValue, nil
	case *commonpb.AnyValue_BoolValue:
		return x.BoolValue, nil
	case *commonpb.AnyValue_IntValue:
		return x.IntValue, nil
	case *commonpb.AnyValue_DoubleValue:
		if math.IsNaN(x.DoubleValue) || math.IsInf(x.DoubleValue, 0) {
			return fmt.Sprint(x.DoubleValue), nil // JSON has no such number
		}
		return x.DoubleValue, nil
	case *commonpb.AnyValue_BytesValue:
		return x.BytesValue, nil
	case *commonpb.AnyValue_ArrayValue:
		out := make([]any, 0, len(x.ArrayValue.GetValues()))
		for _, el := range x.ArrayValue.GetValues() {
			p, err := plain(el, depth+1)
			if err != nil {
				return nil, err
			}
			out = append(out, p)
		}
		return out, nil
	case *commonpb.AnyValue_KvlistValue:
		out := make(map[string]any, len(x.KvlistValue.GetValues()))
		for _, kv := range x.KvlistValue.GetValues() {
			p, err := plain(kv.GetValue(), depth+1)
			if err != nil {
				return nil, err
			}
			out[kv.GetKey()] = p
		}
		return out, nil
	}
	return nil, nil
}

// writeOTLP answers in the encoding of the request.
func writeOTLP(w http.ResponseWriter, mt string, rejected int, why string) error {
	resp := &collogs.ExportLogsServiceResponse{}
	if rejected > 0 {
		resp.PartialSuccess = &collogs.ExportLogsPartialSuccess{RejectedLogRecords: int64(rejected), ErrorMessage: why}
	}
	marshal := proto.Marshal
	if mt == typeJSON {
		marshal = protojson.Marshal
	}
	b, err := marshal(resp)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	w.Header().Set("Content-Type", mt)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(b) // the peer went away: nobody is left to tell
	return nil
}
