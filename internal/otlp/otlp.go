// Package otlp encodes OTLP log records straight into a caller's buffer, and
// reads them back as views.
//
// The life of a record: node/call fills a Record, asks SizeWith, reserves that
// many bytes in the write-ahead log, and PutAround writes the protobuf LogRecord
// there, once, but for the body, which the caller copies into its place. (Size
// and Put are the same for a record that has its Body in one piece.) From then on those bytes are what is stored, hashed, read and
// sent: the exporter only frames them (Framer, AppendExportRequest).
//
// Size does not depend on Seq, which the log assigns after it knows the size:
// the sequence is a varint padded to ten bytes, which every protobuf parser
// reads. Nothing here allocates except where a doc comment says so. Source:
// opentelemetry-proto logs/v1/logs.proto.
package otlp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/autonomyops/autonomy/internal/event"
)

// Severity numbers used by the node.
const (
	Info  = 9
	Warn  = 13
	Error = 17
)

// Record is one log record. Strings are borrowed while Put runs. Empty strings
// are left out of the encoding.
type Record struct {
	TimeUnixNano uint64
	Severity     int32
	EventType    string
	Seq          uint64 // set by Put
	LogID        string
	Class        string
	AuditID      string
	Decision     string
	Outcome      string
	Kind         string
	ReleaseID    string
	Fingerprint  string
	TraceID      [16]byte // zero: none
	SpanID       [8]byte  // zero: none
	Body         []byte   // JSON object
}

// Field numbers of LogRecord, KeyValue and AnyValue.
const (
	lrTime      = 1
	lrSeverity  = 2
	lrBody      = 5
	lrAttr      = 6
	lrTraceID   = 9
	lrSpanID    = 10
	lrObserved  = 11
	lrEventName = 12
	avString    = 1
	avInt       = 3
	seqVarint   = 10 // bytes of the padded sequence
)

func sizeVarint(v uint64) int { return (bits.Len64(v|1) + 6) / 7 }

func sizeBytes(n int) int { return 1 + sizeVarint(uint64(n)) + n }

func sizeAttr(key, val string) int {
	if val == "" {
		return 0
	}
	return sizeBytes(sizeBytes(len(key)) + sizeBytes(sizeBytes(len(val))))
}

var seqAttrSize = sizeBytes(sizeBytes(len(event.AttrSeq)) + sizeBytes(1+seqVarint))

// Size is how many bytes Put writes.
func (r *Record) Size() int { return r.SizeWith(len(r.Body)) }

// SizeWith is how many bytes PutAround writes and leaves for a body of n bytes.
func (r *Record) SizeWith(n int) int { return r.rest() + sizeBytes(sizeBytes(n)) }

// rest is the size without the body.
func (r *Record) rest() int {
	n := 9 + 9 + seqAttrSize
	n += 1 + sizeVarint(uint64(r.Severity))
	n += sizeBytes(len(r.EventType))
	n += sizeAttr(event.AttrLogID, r.LogID) + sizeAttr(event.AttrClass, r.Class) +
		sizeAttr(event.AttrAuditID, r.AuditID) + sizeAttr(event.AttrDecision, r.Decision) +
		sizeAttr(event.AttrOutcome, r.Outcome) + sizeAttr(event.AttrKind, r.Kind) +
		sizeAttr(event.AttrReleaseID, r.ReleaseID) + sizeAttr(event.AttrFingerprint, r.Fingerprint)
	if r.TraceID != ([16]byte{}) {
		n += sizeBytes(16)
	}
	if r.SpanID != ([8]byte{}) {
		n += sizeBytes(8)
	}
	return n
}

// Put encodes r with the given sequence into dst, whose length must be Size.
func (r *Record) Put(dst []byte, seq uint64) { copy(r.PutAround(dst, seq, len(r.Body)), r.Body) }

// PutAround encodes all of r but its body into dst, whose length must be
// SizeWith(body), and returns the part of dst, body bytes long, where the body
// belongs. The caller fills it. r.Body is not looked at.
func (r *Record) PutAround(dst []byte, seq uint64, body int) []byte {
	r.Seq = seq
	want := len(dst)
	b := dst[:0]
	b = append(b, lrTime<<3|1)
	b = binary.LittleEndian.AppendUint64(b, r.TimeUnixNano)
	b = append(b, lrObserved<<3|1)
	b = binary.LittleEndian.AppendUint64(b, r.TimeUnixNano)
	b = append(b, lrSeverity<<3|0)
	b = protowire.AppendVarint(b, uint64(r.Severity))
	b = append(b, lrBody<<3|2)
	b = protowire.AppendVarint(b, uint64(sizeBytes(body)))
	b = append(b, avString<<3|2)
	b = protowire.AppendVarint(b, uint64(body))
	if body > want-len(b) {
		panic(fmt.Sprintf("otlp: a body of %d bytes does not fit into a record of %d: SizeWith was not asked after the last change", body, want))
	}
	window := b[len(b) : len(b)+body : len(b)+body]
	b = b[:len(b)+body]
	b = append(b, lrEventName<<3|2)
	b = protowire.AppendVarint(b, uint64(len(r.EventType)))
	b = append(b, r.EventType...)

	b = append(b, lrAttr<<3|2)
	b = protowire.AppendVarint(b, uint64(sizeBytes(len(event.AttrSeq))+sizeBytes(1+seqVarint)))
	b = append(b, 1<<3|2)
	b = protowire.AppendVarint(b, uint64(len(event.AttrSeq)))
	b = append(b, event.AttrSeq...)
	b = append(b, 2<<3|2, 1+seqVarint, avInt<<3|0)
	for range seqVarint - 1 {
		b = append(b, byte(seq)|0x80)
		seq >>= 7
	}
	b = append(b, byte(seq))

	b = appendAttr(b, event.AttrLogID, r.LogID)
	b = appendAttr(b, event.AttrClass, r.Class)
	b = appendAttr(b, event.AttrAuditID, r.AuditID)
	b = appendAttr(b, event.AttrDecision, r.Decision)
	b = appendAttr(b, event.AttrOutcome, r.Outcome)
	b = appendAttr(b, event.AttrKind, r.Kind)
	b = appendAttr(b, event.AttrReleaseID, r.ReleaseID)
	b = appendAttr(b, event.AttrFingerprint, r.Fingerprint)
	if r.TraceID != ([16]byte{}) {
		b = append(b, lrTraceID<<3|2, 16)
		b = append(b, r.TraceID[:]...)
	}
	if r.SpanID != ([8]byte{}) {
		b = append(b, lrSpanID<<3|2, 8)
		b = append(b, r.SpanID[:]...)
	}
	if len(b) != want {
		panic(fmt.Sprintf("otlp: Put wrote %d bytes into a buffer of %d: Size was not asked after the last change", len(b), want))
	}
	return window
}

func appendAttr(b []byte, key, val string) []byte {
	if val == "" {
		return b
	}
	b = append(b, lrAttr<<3|2)
	b = protowire.AppendVarint(b, uint64(sizeBytes(len(key))+sizeBytes(sizeBytes(len(val)))))
	b = append(b, 1<<3|2)
	b = protowire.AppendVarint(b, uint64(len(key)))
	b = append(b, key...)
	b = append(b, 2<<3|2)
	b = protowire.AppendVarint(b, uint64(sizeBytes(len(val))))
	b = append(b, avString<<3|2)
	b = protowire.AppendVarint(b, uint64(len(val)))
	return append(b, val...)
}

// ErrMalformed is returned by Parse.
var ErrMalformed = errors.New("malformed OTLP log record")

// Parse reads what Put wrote; unknown fields are passed over. Body is a view of
// b; strings are copied (they allocate).
func Parse(b []byte) (Record, error) {
	var r Record
	err := fields(b, func(num protowire.Number, v uint64, p []byte) error {
		switch num {
		case lrTime:
			r.TimeUnixNano = v
		case lrSeverity:
			r.Severity = int32(v)
		case lrBody:
			return fields(p, func(num protowire.Number, _ uint64, p []byte) error {
				if num == avString {
					r.Body = p
				}
				return nil
			})
		case lrEventName:
			r.EventType = string(p)
		case lrTraceID:
			copy(r.TraceID[:], p)
		case lrSpanID:
			copy(r.SpanID[:], p)
		case lrAttr:
			return r.parseAttr(p)
		}
		return nil
	})
	return r, err
}

func (r *Record) parseAttr(b []byte) error {
	var key, val []byte
	var n uint64
	err := fields(b, func(num protowire.Number, _ uint64, p []byte) error {
		switch num {
		case 1:
			key = p
		case 2:
			return fields(p, func(num protowire.Number, v uint64, p []byte) error {
				switch num {
				case avString:
					val = p
				case avInt:
					n = v
				}
				return nil
			})
		}
		return nil
	})
	if err != nil {
		return err
	}
	switch string(key) {
	case event.AttrSeq:
		r.Seq = n
	case event.AttrLogID:
		r.LogID = string(val)
	case event.AttrClass:
		r.Class = string(val)
	case event.AttrAuditID:
		r.AuditID = string(val)
	case event.AttrDecision:
		r.Decision = string(val)
	case event.AttrOutcome:
		r.Outcome = string(val)
	case event.AttrKind:
		r.Kind = string(val)
	case event.AttrReleaseID:
		r.ReleaseID = string(val)
	case event.AttrFingerprint:
		r.Fingerprint = string(val)
	}
	return nil
}

// fields calls fn for each field of a message: v for varint and fixed, p for
// length-delimited ones.
func fields(b []byte, fn func(num protowire.Number, v uint64, p []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("%w: %w", ErrMalformed, protowire.ParseError(n))
		}
		b = b[n:]
		var v uint64
		var p []byte
		switch typ {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(b)
		case protowire.Fixed64Type:
			v, n = protowire.ConsumeFixed64(b)
		case protowire.Fixed32Type:
			var v32 uint32
			v32, n = protowire.ConsumeFixed32(b)
			v = uint64(v32)
		case protowire.BytesType:
			p, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return fmt.Errorf("%w: field %d: %w", ErrMalformed, num, protowire.ParseError(n))
		}
		if err := fn(num, v, p); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// Resource is who sends: the attributes of the one ResourceLogs of a request.
type Resource struct {
	ServiceName, ServiceVersion, InstanceID string
}

// scope names the instrumentation of every record.
const scope = "autonomy/node"

// Framer lays an ExportLogsServiceRequest around encoded records that it never
// looks at, so that they can be sent from where they are stored:
//
//	AppendHead, then for each record AppendRecordHead and the record itself.
//
// There is nothing after the last record. The bytes are the gRPC message and
// the body of OTLP/HTTP alike. A Framer does not change: it may be shared.
type Framer struct {
	resource []byte // field 1 of ResourceLogs
	scope    []byte // field 1 of ScopeLogs
}

// NewFramer encodes the parts that all requests of one sender share.
func NewFramer(res Resource) *Framer {
	f := &Framer{}
	resource := appendResource(nil, res)
	f.resource = append(f.resource, 1<<3|2)
	f.resource = protowire.AppendVarint(f.resource, uint64(len(resource)))
	f.resource = append(f.resource, resource...)
	f.scope = append(f.scope, 1<<3|2)
	f.scope = protowire.AppendVarint(f.scope, uint64(sizeBytes(len(scope))))
	f.scope = append(f.scope, 1<<3|2)
	f.scope = protowire.AppendVarint(f.scope, uint64(len(scope)))
	f.scope = append(f.scope, scope...)
	return f
}

// RecordSize is how many bytes of a request a record of n bytes takes, its head
// included.
func RecordSize(n int) int { return sizeBytes(n) }

// AppendRecordHead appends what stands before a record of n bytes: at most
// MaxRecordHead bytes.
func AppendRecordHead(dst []byte, n int) []byte {
	return protowire.AppendVarint(append(dst, 2<<3|2), uint64(n))
}

// MaxRecordHead bounds AppendRecordHead for records below 4 GiB.
const MaxRecordHead = 6

// HeadSize is the length of AppendHead.
func (f *Framer) HeadSize(records int) int {
	logs := len(f.scope) + records
	return sizeBytes(f.inner(logs)) - records
}

// inner is the length of ResourceLogs for a ScopeLogs of n bytes.
func (f *Framer) inner(n int) int { return len(f.resource) + sizeBytes(n) }

// AppendHead appends everything that stands before the first record; records
// is the sum of RecordSize of all of them. With len(dst) and capacity for
// HeadSize more bytes it does not allocate.
func (f *Framer) AppendHead(dst []byte, records int) []byte {
	// ExportLogsServiceRequest{1: ResourceLogs{1: Resource{1: KeyValue…}, 2: ScopeLogs{1: Scope{1: name}, 2: LogRecord…}}}
	logs := len(f.scope) + records
	dst = append(dst, 1<<3|2)
	dst = protowire.AppendVarint(dst, uint64(f.inner(logs)))
	dst = append(dst, f.resource...)
	dst = append(dst, 2<<3|2)
	dst = protowire.AppendVarint(dst, uint64(logs))
	return append(dst, f.scope...)
}

// AppendExportRequest frames records, each one encoded LogRecord, as one
// contiguous ExportLogsServiceRequest.
func AppendExportRequest(dst []byte, res Resource, records [][]byte) []byte {
	n := 0
	for _, r := range records {
		n += RecordSize(len(r))
	}
	dst = NewFramer(res).AppendHead(dst, n)
	for _, r := range records {
		dst = append(AppendRecordHead(dst, len(r)), r...)
	}
	return dst
}

func appendResource(b []byte, res Resource) []byte {
	for _, kv := range [...][2]string{
		{event.ResourceServiceName, res.ServiceName},
		{event.ResourceVersion, res.ServiceVersion},
		{event.ResourceInstance, res.InstanceID},
	} {
		if kv[1] == "" {
			continue
		}
		key, val := kv[0], kv[1]
		b = append(b, 1<<3|2)
		b = protowire.AppendVarint(b, uint64(sizeBytes(len(key))+sizeBytes(sizeBytes(len(val)))))
		b = append(b, 1<<3|2)
		b = protowire.AppendVarint(b, uint64(len(key)))
		b = append(b, key...)
		b = append(b, 2<<3|2)
		b = protowire.AppendVarint(b, uint64(sizeBytes(len(val))))
		b = append(b, avString<<3|2)
		b = protowire.AppendVarint(b, uint64(len(val)))
		b = append(b, val...)
	}
	return b
}
