package export

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"testing"

	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	resource "go.opentelemetry.io/proto/otlp/resource/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/wal"
)

// discard is a server's codec that takes requests without decoding them, so that
// what is measured is the sender.
type discard struct{}

func (discard) Name() string                         { return "proto" }
func (discard) Marshal(any) (mem.BufferSlice, error) { return nil, nil }
func (discard) Unmarshal(mem.BufferSlice, any) error { return nil }
func discardHandler(_ any, _ context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	return nil, dec(nil)
}

// discardServer serves Export on loopback; it returns host:port.
func discardServer(b testing.TB) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	srv := grpc.NewServer(grpc.ForceServerCodecV2(discard{}), grpc.MaxRecvMsgSize(64<<20))
	srv.RegisterService(&grpc.ServiceDesc{ServiceName: "opentelemetry.proto.collector.logs.v1.LogsService", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Export", Handler: discardHandler}}}, new(any))
	go srv.Serve(ln)
	b.Cleanup(srv.Stop)
	return ln.Addr().String()
}

// official is the request of items as a program with the official types holds it.
func official(b testing.TB, items []item) *collogs.ExportLogsServiceRequest {
	recs := make([]*logs.LogRecord, len(items))
	for i, it := range items {
		recs[i] = &logs.LogRecord{}
		if err := proto.Unmarshal(it.payload, recs[i]); err != nil {
			b.Fatal(err)
		}
	}
	attr := func(k, v string) *common.KeyValue {
		return &common.KeyValue{Key: k, Value: &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: v}}}
	}
	return &collogs.ExportLogsServiceRequest{ResourceLogs: []*logs.ResourceLogs{{
		Resource:  &resource.Resource{Attributes: []*common.KeyValue{attr("service.name", "autonomy-node"), attr("service.instance.id", "n-1")}},
		ScopeLogs: []*logs.ScopeLogs{{Scope: &common.InstrumentationScope{Name: "autonomy/node"}, LogRecords: recs}},
	}}}
}

var benchBodies = []int{100, 800, 3 << 10, 8 << 10, 32 << 10}

func batchOf(body int) int { return max(min(DefaultBatchRecords, DefaultBatchBytes/(body+200)), 1) }

// BenchmarkFrame is framing alone: next to one memory move, and to proto.Marshal
// of the same records.
func BenchmarkFrame(b *testing.B) {
	framer, h := otlp.NewFramer(testResource), newHold()
	for _, body := range benchBodies {
		items := testItems(batchOf(body), body)
		size := 0
		for _, it := range items {
			size += len(it.payload)
		}
		perRecord := func(b *testing.B) {
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(items)), "ns/record")
		}
		for name, from := range map[string]int{"copied": 1 << 30, "as-shipped": viewFrom} {
			b.Run(fmt.Sprintf("%s/payload=%d", name, len(items[0].payload)), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(size))
				for b.Loop() {
					newFrame(framer, items, h, from).unref()
				}
				perRecord(b)
			})
		}
		req := official(b, items)
		b.Run(fmt.Sprintf("proto.Marshal/payload=%d", len(items[0].payload)), func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				if _, err := proto.Marshal(req); err != nil {
					b.Fatal(err)
				}
			}
			perRecord(b)
		})
	}
}

// sliced is the rejected way: a buffer for each head and each record.
type sliced struct{ *frame }

type slicedCodec struct{ frameCodec }

func (slicedCodec) Marshal(v any) (mem.BufferSlice, error) {
	f := v.(sliced).frame
	out := make(mem.BufferSlice, len(f.parts))
	for i := range f.parts {
		out[i] = mem.SliceBuffer(f.parts[i])
	}
	return out, nil
}

// BenchmarkSend is a unary call on loopback to a server that does not decode:
// records copied into one buffer, views from viewFrom on, a buffer per record,
// and grpc's own codec with the official types.
func BenchmarkSend(b *testing.B) {
	conn, err := grpc.NewClient("passthrough:///"+discardServer(b), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	framer, h := otlp.NewFramer(testResource), newHold()
	for _, body := range benchBodies {
		items := testItems(batchOf(body), body)
		req := official(b, items)
		run := func(name string, call func() error) {
			b.Run(fmt.Sprintf("%s/payload=%d", name, len(items[0].payload)), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(len(items) * len(items[0].payload)))
				for b.Loop() {
					if err := call(); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(items)), "ns/record")
			})
		}
		ctx := context.Background()
		var out []byte
		framed := func(from int) func() error {
			return func() error {
				f := newFrame(framer, items, h, from)
				defer f.unref()
				return conn.Invoke(ctx, exportMethod, f, &out, grpc.ForceCodecV2(frameCodec{}))
			}
		}
		run("copied", framed(1<<30))
		run("as-shipped", framed(viewFrom))
		run("views", framed(1<<10+1))
		run("slices", func() error {
			f := newFrame(framer, items, h, 0)
			defer f.unref()
			return conn.Invoke(ctx, exportMethod, sliced{f}, &out, grpc.ForceCodecV2(slicedCodec{}))
		})
		var resp collogs.ExportLogsServiceResponse
		run("official", func() error { return conn.Invoke(ctx, exportMethod, req, &resp) })
	}
}

// BenchmarkCompress is what a compression costs, and what it leaves, on records
// whose bodies are JSON of a node's kind.
func BenchmarkCompress(b *testing.B) {
	items := make([]item, DefaultBatchRecords)
	size := 0
	for i := range items {
		r := otlp.Record{TimeUnixNano: 1763800000000000000 + uint64(i)*1234567, Severity: otlp.Info, EventType: "decision", LogID: "0123456789abcdef", Class: "decision",
			AuditID: fmt.Sprintf("%016x", uint64(i)*0x9e3779b97f4a7c15), Decision: "allow", Kind: "tool.http_get",
			Body: fmt.Appendf(nil, `{"input":{"kind":"tool.http_get","params":{"endpoint":"https://api.example.com/x/%d"},"session":"s-%d","time_ns":%d}}`, i, i%7, i)}
		p := make([]byte, r.Size())
		r.Put(p, uint64(i+1))
		items[i] = item{seq: uint64(i + 1), payload: p}
		size += len(p)
	}
	f := newFrame(otlp.NewFramer(testResource), items, newHold(), viewFrom)
	defer f.unref()
	for _, name := range Compressions[1:] {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(size))
			left := 0
			for b.Loop() {
				p, err := compressors[name].pack(f)
				if err != nil {
					b.Fatal(err)
				}
				left = p.r.Len()
				p.Close()
			}
			b.ReportMetric(float64(left)/float64(f.size), "left/byte")
		})
	}
}

// BenchmarkDrain is the whole way from the log to the socket, cursors included.
// b.N counts records.
func BenchmarkDrain(b *testing.B) {
	for _, body := range []int{100, 800} {
		p := testRecord(1, body)
		const n = 50_000
		l, _, err := wal.Open(filepath.Join(b.TempDir(), "wal"), wal.Options{SegmentBytes: 32 << 20, MaxBytes: 128 << 20})
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		for range n {
			if _, err := l.Append(wal.ClassDecision, p); err != nil {
				b.Fatal(err)
			}
		}
		if err := l.Sync(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("payload=%d", len(p)), func(b *testing.B) {
			e, err := New(Options{Log: l, Endpoint: "grpc://" + discardServer(b), Resource: testResource, Logger: slog.New(slog.DiscardHandler)})
			if err != nil {
				b.Fatal(err)
			}
			defer e.sender.close()
			e.led.clean = true
			e.lanes = newLanes(l)
			b.ReportAllocs()
			b.SetBytes(int64(len(p)))
			b.ResetTimer()
			for sent := 0; sent < b.N; {
				la := &e.lanes[1]
				c, err := e.collect(b.Context(), la, la.classes, n)
				if err != nil {
					b.Fatal(err)
				}
				if ok, err := e.attempt(b.Context(), c); err != nil || !ok {
					b.Fatal(err, e.Status().LastError)
				}
				sent += len(c.items)
				if la.next = c.end + 1; la.next > n {
					la.next = 1
				}
				c.release()
			}
		})
	}
}
