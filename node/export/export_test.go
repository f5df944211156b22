package export_test

import (
	"bufio"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/node/export"
	"github.com/autonomyops/autonomy/wal"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("EXPORT_CHILD_DIR"); dir != "" {
		child(dir, os.Getenv("EXPORT_CHILD_ENDPOINT"))
	}
	goleak.VerifyTestMain(m)
}

// sink is an OTLP endpoint, over gRPC and HTTP, that keeps what it took.
type sink struct {
	collogs.UnimplementedLogsServiceServer

	plainOnly bool // refuse compression

	mu       sync.Mutex
	encoding string // of the last request
	seqs     []int64
	node     string
	answer   func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) // nil: take all
}

func (s *sink) Export(ctx context.Context, req *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Value(encodingKey{}) != nil {
		s.encoding = encodingOf(ctx)
		if s.plainOnly && s.encoding != "" {
			return nil, status.Errorf(codes.Unimplemented, "grpc: Decompressor is not installed for grpc-encoding %q", s.encoding)
		}
	}
	resp := &collogs.ExportLogsServiceResponse{}
	if s.answer != nil {
		var err error
		if resp, err = s.answer(req); err != nil {
			return nil, err
		}
	}
	for _, rl := range req.ResourceLogs {
		for _, kv := range rl.Resource.Attributes {
			if kv.Key == event.ResourceInstance {
				s.node = kv.Value.GetStringValue()
			}
		}
		for _, sl := range rl.ScopeLogs {
			for _, lr := range sl.LogRecords {
				for _, kv := range lr.Attributes {
					if kv.Key == event.AttrSeq {
						s.seqs = append(s.seqs, kv.Value.GetIntValue())
					}
				}
			}
		}
	}
	return resp, nil
}

func (s *sink) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var zr io.Reader = r.Body
	var err error
	encoding := r.Header.Get("Content-Encoding")
	switch encoding {
	case "gzip":
		zr, err = gzip.NewReader(r.Body)
	case "zstd":
		var d *zstd.Decoder
		d, err = zstd.NewReader(r.Body, zstd.WithDecoderConcurrency(1))
		zr = d
	}
	if err != nil || r.Header.Get("Content-Type") != "application/x-protobuf" || s.plainOnly && encoding != "" {
		http.Error(w, "want protobuf", http.StatusUnsupportedMediaType)
		return
	}
	data, err := io.ReadAll(zr)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if encoding == "" && r.ContentLength != int64(len(data)) {
		http.Error(w, "the body is not as long as it says", http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	s.encoding = encoding
	s.mu.Unlock()
	var req collogs.ExportLogsServiceRequest
	if err := proto.Unmarshal(data, &req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	resp, err := s.Export(r.Context(), &req)
	if err != nil {
		code := http.StatusServiceUnavailable
		if status.Code(err) == codes.InvalidArgument {
			code = http.StatusBadRequest
		}
		http.Error(w, err.Error(), code)
		return
	}
	out, err := proto.Marshal(resp)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_, _ = w.Write(out)
}

func (s *sink) taken() []int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]int64(nil), s.seqs...)
}

// listen serves s and returns its endpoint.
func (s *sink) listen(t *testing.T, scheme string) string {
	t.Helper()
	if scheme == "http" {
		srv := httptest.NewServer(s)
		t.Cleanup(srv.Close)
		return srv.URL + "/v1/events"
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.StatsHandler(encodings{}))
	collogs.RegisterLogsServiceServer(srv, s)
	go srv.Serve(ln)
	t.Cleanup(srv.Stop)
	return "grpc://" + ln.Addr().String()
}

// encodings notes the compression of each call where Export finds it.
type encodings struct{}

type encodingKey struct{}

func encodingOf(ctx context.Context) string {
	if p, ok := ctx.Value(encodingKey{}).(*atomic.Value); ok {
		if v, ok := p.Load().(string); ok {
			return v
		}
	}
	return ""
}

func (encodings) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, encodingKey{}, new(atomic.Value))
}

func (encodings) HandleRPC(ctx context.Context, st stats.RPCStats) {
	if in, ok := st.(*stats.InHeader); ok {
		ctx.Value(encodingKey{}).(*atomic.Value).Store(in.Compression)
	}
}

func (encodings) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

func (encodings) HandleConn(context.Context, stats.ConnStats) {}

type rig struct {
	compression string
	t           *testing.T
	dir         string
	log         *wal.Log
	rejected    []string
	mu          sync.Mutex
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, dir: filepath.Join(t.TempDir(), "wal")}
	r.open()
	t.Cleanup(func() { r.log.Close() })
	return r
}

func (r *rig) open() {
	r.t.Helper()
	var err error
	if r.log, _, err = wal.Open(r.dir, wal.Options{SegmentBytes: 1 << 20, MaxBytes: 4 << 20, SyncInterval: time.Millisecond}); err != nil {
		r.t.Fatal(err)
	}
}

// append writes n records.
func (r *rig) append(n int) {
	r.t.Helper()
	for range n {
		rec := otlp.Record{TimeUnixNano: 1, Severity: otlp.Info, EventType: event.Decision, LogID: r.log.ID(), Class: "decision",
			Decision: "allow", Body: []byte(`{"input":{"kind":"tool.echo"}}`)}
		res, err := r.log.Reserve(wal.ClassDecision, rec.Size())
		if err != nil {
			r.t.Fatal(err)
		}
		rec.Put(res.Buf, res.Seq)
		res.Commit()
	}
	if err := r.log.Sync(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// run exports to endpoint until the returned function is called.
func (r *rig) run(endpoint string) (e *export.Exporter, stop func()) {
	r.t.Helper()
	e, err := export.New(export.Options{Log: r.log, Endpoint: endpoint, Compression: r.compression, StateFile: r.dir + "-export.json", Resource: otlp.Resource{ServiceName: "autonomy-node", InstanceID: "n-1"},
		Logger: slog.New(slog.DiscardHandler), BatchRecords: 10, MinBackoff: time.Millisecond, MaxBackoff: 20 * time.Millisecond,
		OnRejected: func(first, last uint64, n int64, why string) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.rejected = append(r.rejected, fmt.Sprintf("%d-%d: %d %s", first, last, n, why))
		}})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	return e, func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("Run: %v", err)
		}
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not in time: %s", what)
}

func wantSeqs(t *testing.T, have []int64, n int) {
	t.Helper()
	if len(have) != n {
		t.Fatalf("%d records, want %d", len(have), n)
	}
	for i, s := range have {
		if s != int64(i+1) {
			t.Fatalf("record %d has sequence %d", i+1, s)
		}
	}
}

func TestDelivery(t *testing.T) {
	for _, scheme := range []string{"grpc", "http"} {
		t.Run(scheme, func(t *testing.T) {
			r, s := newRig(t), &sink{}
			endpoint := s.listen(t, scheme)
			r.append(35)
			e, stop := r.run(endpoint)
			eventually(t, "delivered", func() bool { return e.Status().Delivered == 35 })
			r.append(5) // and what comes later
			eventually(t, "delivered later", func() bool { return e.Status().Delivered == 40 })
			stop()
			wantSeqs(t, s.taken(), 40)
			if s.node != "n-1" {
				t.Errorf("resource names %q", s.node)
			}
			if c := r.log.Cursor(wal.ClassDecision); c != 40 {
				t.Errorf("cursor %d", c)
			}
			// A restart goes on where it was.
			if err := r.log.Close(); err != nil {
				t.Fatal(err)
			}
			r.open()
			r.append(1)
			e, stop = r.run(endpoint)
			eventually(t, "delivered after a restart", func() bool { return e.Status().Delivered == 41 })
			stop()
			wantSeqs(t, s.taken(), 41)
		})
	}
}

// TestVoid: a record that was cut off leaves no gap at the receiver.
func TestVoid(t *testing.T) {
	r, s := newRig(t), &sink{}
	r.append(3)
	for range 2 {
		res, err := r.log.Reserve(wal.ClassAction, 50)
		if err != nil {
			t.Fatal(err)
		}
		res.Abort()
	}
	r.append(3)
	e, stop := r.run(s.listen(t, "http"))
	eventually(t, "delivered", func() bool { return e.Status().Delivered == 8 })
	stop()
	wantSeqs(t, s.taken(), 8)
}

// TestOutage: nothing moves while the endpoint refuses, nothing is lost after.
func TestOutage(t *testing.T) {
	for _, scheme := range []string{"grpc", "http"} {
		t.Run(scheme, func(t *testing.T) {
			r, s := newRig(t), &sink{}
			s.answer = func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
				return nil, status.Error(codes.Unavailable, "busy")
			}
			r.append(25)
			e, stop := r.run(s.listen(t, scheme))
			defer stop()
			eventually(t, "three attempts", func() bool { return e.Status().Attempts >= 3 })
			if st := e.Status(); st.State != "retrying" || st.Delivered != 0 || st.Pending != 25 || st.LastError == "" {
				t.Errorf("%+v", st)
			}
			if c := r.log.Cursor(wal.ClassDecision); c != 0 {
				t.Errorf("the cursor moved to %d", c)
			}
			s.mu.Lock()
			s.answer = nil
			s.mu.Unlock()
			eventually(t, "delivered", func() bool { return e.Status().Delivered == 25 })
			wantSeqs(t, s.taken(), 25)
		})
	}
}

// TestPoison: one record that the endpoint refuses for ever does not stop the rest.
func TestPoison(t *testing.T) {
	for _, scheme := range []string{"grpc", "http"} {
		t.Run(scheme, func(t *testing.T) {
			r, s := newRig(t), &sink{}
			s.answer = func(req *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
				for _, lr := range req.ResourceLogs[0].ScopeLogs[0].LogRecords {
					for _, kv := range lr.Attributes {
						if kv.Key == event.AttrSeq && kv.Value.GetIntValue() == 7 {
							return nil, status.Error(codes.InvalidArgument, "bad record")
						}
					}
				}
				return &collogs.ExportLogsServiceResponse{}, nil
			}
			r.append(12)
			e, stop := r.run(s.listen(t, scheme))
			eventually(t, "delivered", func() bool { return e.Status().Delivered == 12 })
			stop()
			if have := s.taken(); len(have) != 11 {
				t.Errorf("taken: %v", have)
			}
			if st := e.Status(); st.Rejected != 1 || len(r.rejected) != 1 || !strings.Contains(r.rejected[0], "1 ") {
				t.Errorf("%+v %v", st, r.rejected)
			}
		})
	}
}

// TestRefusedLeavesNoGap: where a record is refused for what it holds, its number
// arrives all the same.
func TestRefusedLeavesNoGap(t *testing.T) {
	for _, scheme := range []string{"grpc", "http"} {
		t.Run(scheme, func(t *testing.T) {
			r, s := newRig(t), &sink{}
			s.answer = func(req *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
				for _, lr := range req.ResourceLogs[0].ScopeLogs[0].LogRecords {
					if lr.EventName == "poison" {
						return nil, status.Error(codes.InvalidArgument, "bad record")
					}
				}
				return &collogs.ExportLogsServiceResponse{}, nil
			}
			r.append(3)
			rec := otlp.Record{TimeUnixNano: 7, EventType: "poison", LogID: r.log.ID(), Class: "decision", AuditID: "a", Body: []byte(`{}`)}
			res, err := r.log.Reserve(wal.ClassDecision, rec.Size())
			if err != nil {
				t.Fatal(err)
			}
			rec.Put(res.Buf, res.Seq)
			res.Commit()
			r.append(3)
			e, stop := r.run(s.listen(t, scheme))
			eventually(t, "delivered", func() bool { return e.Status().Delivered == 7 })
			stop()
			wantSeqs(t, s.taken(), 7)
			if st := e.Status(); st.Rejected != 1 || len(r.rejected) != 1 {
				t.Errorf("%+v %v", st, r.rejected)
			}
		})
	}
}

func TestPartialSuccess(t *testing.T) {
	r, s := newRig(t), &sink{}
	s.answer = func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
		return &collogs.ExportLogsServiceResponse{PartialSuccess: &collogs.ExportLogsPartialSuccess{RejectedLogRecords: 2, ErrorMessage: "too old"}}, nil
	}
	r.append(5)
	e, stop := r.run(s.listen(t, "grpc"))
	eventually(t, "delivered", func() bool { return e.Status().Delivered == 5 })
	stop()
	if e.Status().Rejected != 2 || len(r.rejected) != 1 || !strings.Contains(r.rejected[0], "too old") {
		t.Errorf("%+v %v", e.Status(), r.rejected)
	}
}

// TestRetryAfter: the server's wish is kept, within the longest backoff.
func TestRetryAfter(t *testing.T) {
	r := newRig(t)
	var mu sync.Mutex
	var times []time.Time
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		times = append(times, time.Now())
		w.Header().Set("Retry-After", "3600")
		w.WriteHeader(http.StatusTooManyRequests)
	}))
	defer srv.Close()
	r.append(1)
	_, stop := r.run(srv.URL)
	eventually(t, "three attempts", func() bool { mu.Lock(); defer mu.Unlock(); return len(times) >= 3 })
	stop()
	if d := times[2].Sub(times[1]); d < 15*time.Millisecond {
		t.Errorf("attempts %s apart, want the longest backoff of 20 ms", d)
	}
}

// TestCompression: each choice reaches the endpoint as it is meant, and one that
// the endpoint does not read costs no record.
func TestCompression(t *testing.T) {
	for _, scheme := range []string{"grpc", "http"} {
		for _, c := range []struct {
			choice    string
			plainOnly bool
			want      string
		}{
			{"", false, map[string]string{"grpc": "", "http": "gzip"}[scheme]},
			{"none", false, ""}, {"gzip", false, "gzip"}, {"zstd", false, "zstd"}, {"zstd", true, ""}, {"gzip", true, ""},
		} {
			t.Run(fmt.Sprintf("%s/%s/plain=%v", scheme, c.choice, c.plainOnly), func(t *testing.T) {
				r, s := newRig(t), &sink{plainOnly: c.plainOnly}
				r.compression = c.choice
				r.append(35)
				e, stop := r.run(s.listen(t, scheme))
				eventually(t, "delivered", func() bool { return e.Status().Delivered == 35 })
				stop()
				wantSeqs(t, s.taken(), 35)
				if s.encoding != c.want {
					t.Errorf("encoding %q, want %q", s.encoding, c.want)
				}
				if e.Status().Rejected != 0 {
					t.Errorf("%+v", e.Status())
				}
			})
		}
	}
	if _, err := export.New(export.Options{Endpoint: "http://127.0.0.1:1/", Compression: "lz4"}); err == nil || !strings.Contains(err.Error(), "want one of [none gzip zstd]") {
		t.Errorf("lz4: %v", err)
	}
}

// TestRetryInfo: a gRPC server's wish is kept like Retry-After, and a busy
// receiver's ResourceExhausted gives up nothing.
func TestRetryInfo(t *testing.T) {
	r, s := newRig(t), &sink{}
	var times []time.Time
	s.answer = func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
		times = append(times, time.Now())
		if len(times) > 3 {
			return &collogs.ExportLogsServiceResponse{}, nil
		}
		st := status.New(codes.ResourceExhausted, "busy").Proto()
		// RetryInfo{retry_delay: Duration{seconds: 3600}}
		st.Details = append(st.Details, &anypb.Any{TypeUrl: "type.googleapis.com/google.rpc.RetryInfo", Value: []byte{0x0a, 3, 0x08, 0x90, 0x1c}})
		return nil, status.ErrorProto(st)
	}
	r.append(1)
	e, stop := r.run(s.listen(t, "grpc"))
	eventually(t, "delivered", func() bool { return e.Status().Delivered == 1 })
	stop()
	if d := times[1].Sub(times[0]); d < 20*time.Millisecond {
		t.Errorf("attempts %s apart, want the longest backoff of 20 ms", d)
	}
	if e.Status().Rejected != 0 {
		t.Errorf("%+v", e.Status())
	}
}

// TestTooLarge: a record that is above the server's limit does not stop the rest.
func TestTooLarge(t *testing.T) {
	r, s := newRig(t), &sink{}
	s.answer = func(req *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
		if n := len(req.ResourceLogs[0].ScopeLogs[0].LogRecords); n > 3 {
			return nil, status.Errorf(codes.ResourceExhausted, "grpc: received message larger than max (%d vs. 3)", n)
		}
		return &collogs.ExportLogsServiceResponse{}, nil
	}
	r.append(10)
	e, stop := r.run(s.listen(t, "grpc"))
	eventually(t, "delivered", func() bool { return e.Status().Delivered == 10 })
	stop()
	wantSeqs(t, s.taken(), 10)
}

func TestEndpointForm(t *testing.T) {
	for in, want := range map[string]string{
		"":                "want grpc://HOST:PORT",
		"collector:4317":  "want",
		"ftp://collector": "want the scheme",
		"grpc://":         "want grpc://HOST:PORT",
		"http://a b/":     "want grpc://HOST:PORT",
	} {
		if _, err := export.New(export.Options{Endpoint: in}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", in, err, want)
		}
	}
}

// child exports the log in dir until it is killed.
func child(dir, endpoint string) {
	log, _, err := wal.Open(dir, wal.Options{SegmentBytes: 1 << 20, MaxBytes: 4 << 20})
	if err == nil {
		var e *export.Exporter
		e, err = export.New(export.Options{Log: log, Endpoint: endpoint, Logger: slog.New(slog.DiscardHandler), BatchRecords: 7,
			StateFile: dir + "-export.json", MinBackoff: time.Millisecond, MaxBackoff: 5 * time.Millisecond})
		if err == nil {
			fmt.Println("running")
			err = e.Run(context.Background())
		}
	}
	fmt.Fprintln(os.Stderr, "child:", err)
	os.Exit(1)
}

// TestKill: an exporter that is killed anywhere in a catch-up, over and over,
// with an endpoint that fails now and then, loses nothing, and no cursor stands
// ahead of what was taken.
func TestKill(t *testing.T) {
	r, s := newRig(t), &sink{}
	const n = 600
	var classes []wal.Class
	for i := range n {
		c := []wal.Class{wal.ClassDecision, wal.ClassAction, wal.ClassLifecycle, wal.ClassError}[rand.IntN(4)]
		if i%50 == 49 { // a void
			res, err := r.log.Reserve(c, 50)
			if err != nil {
				t.Fatal(err)
			}
			res.Abort()
		} else {
			rec := otlp.Record{TimeUnixNano: 1, Severity: otlp.Info, EventType: event.Decision, LogID: r.log.ID(), Class: c.String(), Body: []byte("{}")}
			res, err := r.log.Reserve(c, rec.Size())
			if err != nil {
				t.Fatal(err)
			}
			rec.Put(res.Buf, res.Seq)
			res.Commit()
		}
		classes = append(classes, c)
	}
	if err := r.log.Close(); err != nil {
		t.Fatal(err)
	}
	s.answer = func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
		if rand.IntN(4) == 0 {
			return nil, status.Error(codes.Unavailable, "busy")
		}
		return &collogs.ExportLogsServiceResponse{}, nil
	}
	endpoint := s.listen(t, "grpc")
	truthful := func() {
		t.Helper()
		held := map[int64]bool{}
		for _, seq := range s.taken() {
			held[seq] = true
		}
		for i, c := range classes {
			if seq := uint64(i + 1); !held[int64(seq)] && seq <= r.log.Cursor(c) {
				t.Errorf("the %v cursor stands at %d, but record %d was never taken", c, r.log.Cursor(c), seq)
			}
		}
	}
	for range 6 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "EXPORT_CHILD_DIR="+r.dir, "EXPORT_CHILD_ENDPOINT="+endpoint)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "running\n" {
			t.Fatalf("child says %q, %v", line, err)
		}
		was, want := len(s.taken()), 7+rand.IntN(60)
		eventually(t, "progress", func() bool { return len(s.taken()) >= was+want })
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // says that it was killed
		r.open()
		truthful()
		if err := r.log.Close(); err != nil {
			t.Fatal(err)
		}
	}
	r.open()
	if r.log.Cursor(wal.ClassError) == 0 {
		t.Error("no cursor moved")
	}
	e, stop := r.run(endpoint)
	eventually(t, "delivered", func() bool { return e.Status().Delivered == n })
	stop()
	truthful()
	seen := map[int64]bool{}
	for _, seq := range s.taken() {
		seen[seq] = true
	}
	if len(seen) != n {
		t.Errorf("%d different records taken, want %d", len(seen), n)
	}
}
