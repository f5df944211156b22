package export

import (
	"bytes"
	"compress/gzip"
	"io"
	"slices"
	"testing"

	"github.com/klauspost/compress/zstd"
	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
)

var testResource = otlp.Resource{ServiceName: event.ServiceName, ServiceVersion: "1.2.3", InstanceID: "n-1"}

// testRecord is record seq with a body of n bytes, which also shows its seq.
func testRecord(seq uint64, n int) []byte {
	r := otlp.Record{TimeUnixNano: 1763800000000000000 + seq, Severity: otlp.Info, EventType: event.Decision, LogID: "0123456789abcdef", Class: "decision",
		AuditID: "0d4a7c1e6f614d3c", Decision: "allow", Kind: "tool.http_get", Body: bytes.Repeat([]byte{'a' + byte(seq%26)}, n)}
	b := make([]byte, r.Size())
	r.Put(b, seq)
	return b
}

func testItems(n, body int) []item {
	items := make([]item, n)
	for i := range items {
		items[i] = item{seq: uint64(i + 1), payload: testRecord(uint64(i+1), body)}
	}
	return items
}

// decode reads a request with the official types.
func decode(t *testing.T, b []byte) []*logs.LogRecord {
	t.Helper()
	var req collogs.ExportLogsServiceRequest
	if err := proto.Unmarshal(b, &req); err != nil {
		t.Fatal(err)
	}
	if len(req.ResourceLogs) != 1 || len(req.ResourceLogs[0].ScopeLogs) != 1 {
		t.Fatalf("request holds %d resources", len(req.ResourceLogs))
	}
	attrs := req.ResourceLogs[0].Resource.Attributes
	if len(attrs) != 3 || attrs[2].Key != event.ResourceInstance || attrs[2].Value.GetStringValue() != testResource.InstanceID {
		t.Fatalf("resource: %v", attrs)
	}
	return req.ResourceLogs[0].ScopeLogs[0].LogRecords
}

// FuzzFrame: whatever records are sent, of whatever sizes, from the arena or as
// views, the official types read the same ones, in order, from the buffers that
// grpc gets, from the HTTP body and from what AppendExportRequest builds; and all
// memory is given back once.
func FuzzFrame(f *testing.F) {
	f.Add([]byte{1, 2, 3}, uint16(64))
	f.Add([]byte{}, uint16(0))
	f.Add([]byte{0, 255, 0, 200, 1, 1, 1, 127}, uint16(3000))
	f.Fuzz(func(t *testing.T, sizes []byte, scale uint16) {
		if len(sizes) > 300 {
			sizes = sizes[:300]
		}
		var items []item
		var want []*logs.LogRecord
		var payloads [][]byte
		for i, s := range sizes {
			seq := uint64(i + 1)
			p := testRecord(seq, int(s)*int(scale)/64)
			if s == 0 { // a void's stand-in
				r := otlp.Record{TimeUnixNano: seq, Severity: otlp.Info, EventType: event.LogVoid, LogID: "l", Class: "action", Body: []byte("{}")}
				p = make([]byte, r.Size())
				r.Put(p, seq)
			}
			lr := &logs.LogRecord{}
			if err := proto.Unmarshal(p, lr); err != nil {
				t.Fatal(err)
			}
			items, want, payloads = append(items, item{seq: seq, payload: p}), append(want, lr), append(payloads, p)
		}
		flat := otlp.AppendExportRequest(nil, testResource, payloads)
		h := newHold()
		for _, from := range []int{1<<10 + 1, viewFrom, 1 << 30} {
			fr := newFrame(otlp.NewFramer(testResource), items, h, from)
			bufs := fr.buffers()
			wire := bufs.Materialize()
			if !bytes.Equal(wire, flat) || fr.size != len(flat) {
				t.Fatalf("from %d: %d bytes, size %d, AppendExportRequest makes %d", from, len(wire), fr.size, len(flat))
			}
			body := fr.body()
			streamed, err := io.ReadAll(body)
			if err != nil || !bytes.Equal(streamed, flat) {
				t.Fatalf("from %d: the body differs (%v)", from, err)
			}
			got := decode(t, wire)
			if !slices.EqualFunc(got, want, func(a, b *logs.LogRecord) bool { return proto.Equal(a, b) }) {
				t.Fatalf("from %d: %d records decoded, want the %d that were framed", from, len(got), len(want))
			}
			views := fr.views
			fr.unref()
			bufs.Free()
			if views > 0 && h.refs.Load() != 2 {
				t.Fatalf("from %d: hold has %d references while the body is open, want 2", from, h.refs.Load())
			}
			body.Close()
			body.Close() // net/http may close twice
			if h.refs.Load() != 1 {
				t.Fatalf("from %d: hold has %d references at the end, want 1", from, h.refs.Load())
			}
			if _, err := body.Read(make([]byte, 1)); err == nil {
				t.Fatal("a closed body can be read")
			}
		}
	})
}

func TestCompressions(t *testing.T) {
	items := testItems(100, 300)
	f := newFrame(otlp.NewFramer(testResource), items, newHold(), viewFrom)
	defer f.unref()
	flat, err := io.ReadAll(f.body())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range Compressions[1:] {
		for range 2 { // also with a used writer
			packed, err := compressors[name].pack(f)
			if err != nil {
				t.Fatal(err)
			}
			size := packed.r.Len()
			var r io.Reader
			if name == "gzip" {
				r, err = gzip.NewReader(packed)
			} else {
				r, err = zstd.NewReader(packed)
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, flat) {
				t.Fatalf("%s: %v, %d bytes, want %d", name, err, len(got), len(flat))
			}
			if size >= len(flat)/2 {
				t.Errorf("%s makes %d bytes of %d", name, size, len(flat))
			}
			packed.Close()
			if _, err := packed.Read(make([]byte, 1)); err == nil {
				t.Error("a closed body can be read")
			}
		}
	}
}
