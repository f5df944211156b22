package main

import (
	"context"
	"errors"
	"fmt"

	collectorlogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"

	"github.com/autonomyops/autonomy/bench/walbench/leg"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/wal"
)

// framed is our log with OTLP records in it, which a drain frames as export
// requests: what the exporter does before it sends.
type framed struct {
	*ours
	rec otlp.Record
	res otlp.Resource
}

var resource = otlp.Resource{ServiceName: "autonomy-node", ServiceVersion: "1.0.0", InstanceID: "bench"}

// A request holds at most these.
const (
	frameRecords = 512
	frameBytes   = 1 << 20
)

// logRecord is a decision as the node records it, of size bytes when encoded.
func logRecord(size int) (otlp.Record, error) {
	r := otlp.Record{TimeUnixNano: 1767225600_000000000, Severity: otlp.Info, EventType: "tool.decision", LogID: "0123456789abcdef",
		Class: "decision", AuditID: "0123456789abcdef0123456789abcdef", Decision: "allow", Kind: "tool.echo"}
	for range 4 { // the length of the body has a length itself
		d := size - r.Size()
		if d == 0 {
			return r, nil
		}
		r.Body = make([]byte, max(len(r.Body)+d, 0))
		for i := range r.Body {
			r.Body[i] = 'a' + byte(i%26)
		}
	}
	return r, fmt.Errorf("no OTLP record of this shape has %d bytes", size)
}

func newFramed(w *ours, size int) (leg.Log, error) {
	rec, err := logRecord(size)
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return &framed{w, rec, resource}, nil
}

func (f *framed) Append([]byte) error {
	r, err := f.log.Reserve(wal.ClassDecision, f.rec.Size())
	if err != nil {
		return err
	}
	f.rec.Put(r.Buf, r.Seq)
	r.Commit()
	return nil
}

func (f *framed) Drain(fn func([]byte)) error {
	r := f.log.Reader(1)
	views := make([][]byte, 0, frameRecords)
	var req []byte
	for last, seq := f.log.Durable(), uint64(0); seq < last; {
		b, err := r.Next(context.Background(), frameRecords, frameBytes)
		if err != nil {
			return err
		}
		views = views[:0]
		for _, rec := range b.Records {
			views = append(views, rec.Payload)
			fn(rec.Payload)
			seq = rec.Seq
		}
		req = otlp.AppendExportRequest(req[:0], f.res, views)
		b.Release()
		if len(req) < len(views) {
			return errors.New("a request is shorter than its records")
		}
	}
	return nil
}

// marshal is how a program without our log makes the same requests: the same
// records, already built as messages, which proto.Marshal encodes.
type marshal struct{ records []*logs.LogRecord }

func openMarshal(_ string, s leg.Spec) (leg.Log, error) {
	m := &marshal{}
	if s.Mode != leg.Read {
		return m, nil
	}
	rec, err := logRecord(s.Size)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, rec.Size())
	for n := range s.Records {
		rec.Put(buf, uint64(n+1))
		r := &logs.LogRecord{}
		if err := proto.Unmarshal(buf, r); err != nil {
			return nil, err
		}
		m.records = append(m.records, r)
	}
	return m, nil
}

// Append does nothing: the messages are in memory before the clock starts.
func (m *marshal) Append([]byte) error { return nil }

func (m *marshal) Drain(fn func([]byte)) error {
	var out []byte
	for rest := m.records; len(rest) > 0; {
		n := min(frameRecords, len(rest))
		var err error
		out, err = proto.MarshalOptions{}.MarshalAppend(out[:0], &collectorlogs.ExportLogsServiceRequest{
			ResourceLogs: []*logs.ResourceLogs{{ScopeLogs: []*logs.ScopeLogs{{LogRecords: rest[:n]}}}}})
		if err != nil {
			return err
		}
		for range n {
			fn(out)
		}
		rest = rest[n:]
	}
	return nil
}

func (m *marshal) Close() error { return nil }
