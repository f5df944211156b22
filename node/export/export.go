// Package export ships the node's log: it tails the durable records, frames
// them as OTLP logs, sends them to one endpoint and moves the log's cursors
// when, and only when, the endpoint has taken them.
//
// Delivery is at least once: after a crash between the endpoint's answer and
// the cursor the same records go out again, and their event ids let the
// receiver drop them. Records that the endpoint refuses for ever (a 4xx that no
// retry can change, or a partial success) are counted, recorded as an event,
// and passed: they stay in the log until it needs the space.
//
// While the endpoint is away the exporter waits, with a capped backoff, and the
// log keeps everything until its ceiling, where the node denies calls.
package export

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/wal"
)

// Options configure an Exporter.
type Options struct {
	Log      *wal.Log
	Endpoint string // grpc://HOST:PORT, grpcs://HOST:PORT, http(s)://… (the whole URL of the logs path)
	Resource otlp.Resource
	Logger   *slog.Logger

	BatchRecords int           // records per request, default 512
	BatchBytes   int           // bytes per request, default 1 MiB
	Timeout      time.Duration // of one request, default 10 s
	MinBackoff   time.Duration // first wait after a failure, default 100 ms
	MaxBackoff   time.Duration // the longest, default 15 s

	// OnRejected is told of records that the endpoint refused for ever. May be nil.
	OnRejected func(first, last uint64, count int64, why string)
}

// Status is what GET /v1/status shows of the exporter.
type Status struct {
	Endpoint  string    `json:"endpoint"`
	State     string    `json:"state"` // starting, delivering, retrying
	Delivered uint64    `json:"delivered_seq"`
	Pending   uint64    `json:"pending_records"`
	Rejected  int64     `json:"rejected_records"`
	Attempts  int       `json:"attempts"` // of the batch at hand
	LastError string    `json:"last_error,omitempty"`
	LastOK    time.Time `json:"last_success,omitzero"`
}

// sender delivers one framed request.
type sender interface {
	// send returns how many records were rejected for ever, and why. An error
	// that wraps errPermanent is one that no retry can change; retryAfter is
	// the server's wish, 0 when it has none.
	send(ctx context.Context, req []byte) (rejected int64, why string, retryAfter time.Duration, err error)
	close() error
}

var errPermanent = errors.New("the endpoint refuses the request")

// Exporter delivers a log to one endpoint.
type Exporter struct {
	o      Options
	sender sender
	set    *metrics.Set
	sent   *metrics.Counter
	failed *metrics.Counter

	mu     sync.Mutex
	status Status
}

// New checks the options. It does not connect.
func New(o Options) (*Exporter, error) {
	u, err := url.Parse(o.Endpoint)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("export endpoint %q: want grpc://HOST:PORT or http://HOST:PORT/PATH", o.Endpoint)
	}
	o.BatchRecords = def(o.BatchRecords, 512)
	o.BatchBytes = def(o.BatchBytes, 1<<20)
	o.Timeout = def(o.Timeout, 10*time.Second)
	o.MinBackoff = def(o.MinBackoff, 100*time.Millisecond)
	o.MaxBackoff = def(o.MaxBackoff, 15*time.Second)
	if o.OnRejected == nil {
		o.OnRejected = func(uint64, uint64, int64, string) {}
	}
	e := &Exporter{o: o, set: metrics.NewSet(), status: Status{Endpoint: u.Redacted(), State: "starting"}}
	e.sent = e.set.NewCounter("autonomy_node_export_records_total")
	e.failed = e.set.NewCounter("autonomy_node_export_failures_total")
	e.set.NewGauge("autonomy_node_export_pending_records", func() float64 { return float64(e.Status().Pending) })
	switch u.Scheme {
	case "grpc", "grpcs":
		creds := insecure.NewCredentials()
		if u.Scheme == "grpcs" {
			creds = credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13})
		}
		conn, err := grpc.NewClient("passthrough:///"+u.Host, grpc.WithTransportCredentials(creds),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{}), grpc.MaxCallRecvMsgSize(maxResponse)))
		if err != nil {
			return nil, fmt.Errorf("export endpoint %s: %w", u.Redacted(), err)
		}
		e.sender = &grpcSender{conn}
	case "http", "https":
		tr := http.DefaultTransport.(*http.Transport).Clone()
		tr.Proxy = nil
		e.sender = &httpSender{url: u.String(), client: &http.Client{Transport: tr,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
	default:
		return nil, fmt.Errorf("export endpoint %q: want the scheme grpc, grpcs, http or https", o.Endpoint)
	}
	return e, nil
}

func def[T int | time.Duration](v, d T) T {
	if v == 0 {
		return d
	}
	return v
}

// Status returns a copy.
func (e *Exporter) Status() Status {
	e.mu.Lock()
	s := e.status
	e.mu.Unlock()
	if d := e.o.Log.Durable(); d > s.Delivered {
		s.Pending = d - s.Delivered
	}
	return s
}

// WriteMetrics writes the exporter's metrics.
func (e *Exporter) WriteMetrics(w io.Writer) { e.set.WritePrometheus(w) }

// Run delivers until ctx ends. Errors of the endpoint are retried, errors of
// the log end it.
func (e *Exporter) Run(ctx context.Context) error {
	defer e.sender.close()
	from := e.o.Log.Cursor(wal.ClassError)
	for c := range wal.NumClasses {
		from = min(from, e.o.Log.Cursor(c))
	}
	e.update(func(s *Status) { s.Delivered = from })
	r := e.o.Log.Reader(from + 1)
	var views [][]byte
	for {
		b, err := r.Next(ctx, e.o.BatchRecords, e.o.BatchBytes)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("export: read the log: %w", err)
		}
		if len(b.Records) == 0 {
			b.Release()
			continue
		}
		views = views[:0]
		for _, rec := range b.Records {
			payload := rec.Payload
			if rec.Void {
				payload = e.void(rec)
			}
			views = append(views, payload)
		}
		first, last := b.Records[0].Seq, b.Records[len(b.Records)-1].Seq
		err = e.deliver(ctx, views, first, last)
		b.Release()
		if err != nil {
			return nil // ctx ended; the batch goes out again after the next start
		}
		if err := e.o.Log.AdvanceAll(last); err != nil {
			return fmt.Errorf("export: move the cursors to %d: %w", last, err)
		}
		e.update(func(s *Status) { s.Delivered = last })
	}
}

// void stands in for a record that was cut off while it was written: the
// receiver must see every sequence number, or it waits for it for ever. Its time
// is that of the record before it, so that a repeat is the same event.
func (e *Exporter) void(v wal.Record) []byte {
	r := otlp.Record{TimeUnixNano: 1, Severity: otlp.Info, EventType: event.LogVoid, LogID: e.o.Log.ID(), Class: v.Class.String(), Body: []byte("{}")}
	for seq := v.Seq - 1; seq > 0; seq-- {
		payload, _, err := e.o.Log.Get(seq)
		if err != nil && errors.Is(err, wal.ErrNotFound) && seq > e.o.Log.Stats().OldestSeq {
			continue // void, too
		}
		if before, perr := otlp.Parse(payload); err == nil && perr == nil {
			r.TimeUnixNano = before.TimeUnixNano
		}
		break
	}
	b := make([]byte, r.Size())
	r.Put(b, v.Seq)
	return b
}

func (e *Exporter) update(f func(*Status)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f(&e.status)
}

// deliver sends one batch until it is taken or refused for ever. Its error is
// that of ctx.
func (e *Exporter) deliver(ctx context.Context, views [][]byte, first, last uint64) error {
	req := otlp.AppendExportRequest(nil, e.o.Resource, views)
	backoff := e.o.MinBackoff
	for attempt := 1; ; attempt++ {
		e.update(func(s *Status) { s.Attempts = attempt })
		sctx, cancel := context.WithTimeout(ctx, e.o.Timeout)
		rejected, why, wait, err := e.sender.send(sctx, req)
		cancel()
		if errors.Is(err, errPermanent) && len(views) > 1 {
			// One record may spoil the batch: find it, deliver the rest.
			half := len(views) / 2
			if err := e.deliver(ctx, views[:half], first, last); err != nil {
				return err
			}
			return e.deliver(ctx, views[half:], first, last)
		}
		if errors.Is(err, errPermanent) {
			rejected, why, err = int64(len(views)), err.Error(), nil
		}
		if err == nil {
			if rejected > 0 {
				e.o.Logger.Error("the export endpoint refused records for ever", "first_seq", first, "last_seq", last, "count", rejected, "why", why)
				e.o.OnRejected(first, last, rejected, why)
			}
			e.sent.Add(len(views) - int(rejected))
			e.update(func(s *Status) {
				s.State, s.Attempts, s.LastError, s.LastOK = "delivering", 0, "", time.Now().UTC()
				s.Rejected += rejected
			})
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		e.failed.Inc()
		if attempt == 1 {
			e.o.Logger.Warn("export failed: will retry", "endpoint", e.status.Endpoint, "first_seq", first, "err", err)
		}
		e.update(func(s *Status) { s.State, s.LastError = "retrying", err.Error() })
		wait = min(max(wait, backoff), e.o.MaxBackoff)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		backoff = min(2*backoff, e.o.MaxBackoff)
	}
}

// maxResponse bounds an endpoint's answer, in bytes.
const maxResponse = 64 << 10

// grpcSender speaks OTLP/gRPC.
type grpcSender struct{ conn *grpc.ClientConn }

const exportMethod = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"

func (g *grpcSender) send(ctx context.Context, req []byte) (int64, string, time.Duration, error) {
	in := mem.BufferSlice{mem.SliceBuffer(req)}
	var out []byte
	if err := g.conn.Invoke(ctx, exportMethod, in, &out, grpc.WaitForReady(false)); err != nil {
		switch status.Code(err) {
		case codes.InvalidArgument, codes.Unimplemented, codes.OutOfRange, codes.DataLoss:
			return 0, "", 0, fmt.Errorf("%w: %w", errPermanent, err)
		}
		return 0, "", 0, err
	}
	n, why, err := partial(out)
	return n, why, 0, err
}

func (g *grpcSender) close() error { return g.conn.Close() }

// rawCodec passes a framed request through and hands the answer's bytes over.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.(mem.BufferSlice)
	if !ok {
		return nil, fmt.Errorf("raw codec: want a mem.BufferSlice, have %T", v)
	}
	return b, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	out, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("raw codec: want a *[]byte, have %T", v)
	}
	*out = data.Materialize()
	return nil
}

// partial reads an ExportLogsServiceResponse.
func partial(data []byte) (int64, string, error) {
	var resp collogs.ExportLogsServiceResponse
	if err := proto.Unmarshal(data, &resp); err != nil {
		return 0, "", fmt.Errorf("the endpoint's answer is no ExportLogsServiceResponse: %w", err)
	}
	ps := resp.GetPartialSuccess()
	return ps.GetRejectedLogRecords(), ps.GetErrorMessage(), nil
}

// httpSender speaks OTLP/HTTP with protobuf bodies, gzipped.
type httpSender struct {
	url    string
	client *http.Client
	buf    bytes.Buffer
	zw     *gzip.Writer
}

func (h *httpSender) send(ctx context.Context, body []byte) (int64, string, time.Duration, error) {
	h.buf.Reset()
	if h.zw == nil {
		h.zw, _ = gzip.NewWriterLevel(&h.buf, gzip.BestSpeed) // the level is valid
	}
	h.zw.Reset(&h.buf)
	if _, err := h.zw.Write(body); err != nil {
		return 0, "", 0, err
	}
	if err := h.zw.Close(); err != nil {
		return 0, "", 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url, bytes.NewReader(h.buf.Bytes()))
	if err != nil {
		return 0, "", 0, err
	}
	req.Header.Set("Content-Type", "application/x-protobuf")
	req.Header.Set("Content-Encoding", "gzip")
	resp, err := h.client.Do(req)
	if err != nil {
		return 0, "", 0, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse))
	if err != nil {
		return 0, "", 0, fmt.Errorf("read the endpoint's answer: %w", err)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		n, why, err := partial(data)
		return n, why, 0, err
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusInsufficientStorage:
		secs, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		return 0, "", time.Duration(secs) * time.Second, fmt.Errorf("the endpoint answered %s", resp.Status)
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity, http.StatusUnsupportedMediaType:
		return 0, "", 0, fmt.Errorf("%w: %s%s", errPermanent, resp.Status, detail(data))
	}
	return 0, "", 0, fmt.Errorf("the endpoint answered %s", resp.Status)
}

// detail is the problem document's detail, when there is one.
func detail(data []byte) string {
	var p struct{ Detail string }
	if json.Unmarshal(data, &p) == nil && p.Detail != "" {
		return ": " + p.Detail
	}
	return ""
}

func (h *httpSender) close() error {
	h.client.CloseIdleConnections()
	return nil
}
