// Package trace makes an OpenTelemetry span of each call and sends it to an OTLP
// endpoint of the operator's choice.
//
// Life of a span: call.Pipeline asks Start when a call comes in; a traceparent
// of the caller makes the span its child, and decides whether it is sampled;
// without one the ratio decides. The span's own context is what the tool is
// given and what the records carry, so that a record leads to its span and back.
// End puts the decision, the outcome and the times onto it. The SDK sends spans
// in batches from a bounded queue: when the endpoint is slow or gone, spans are
// dropped, calls are not.
//
// Spans are named execute_tool and carry the GenAI attributes of the OpenTelemetry
// semantic conventions (gen_ai.operation.name, gen_ai.tool.name, …) beside
// autonomy.* ones. Params and outputs are not on them: a trace is read by more
// people than the log.
//
// A Tracer is safe for concurrent use. Only node imports this package, and only
// it imports the OpenTelemetry SDK.
package trace

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strconv"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/node/call"
)

// Options configure a Tracer.
type Options struct {
	Endpoint string  // http(s)://HOST:PORT/v1/traces
	Ratio    float64 // of the calls without a traceparent, 0 to 1
	NodeID   string
	Version  string
	Logger   *slog.Logger
}

// Bounds of what waits to be sent.
const (
	maxQueue    = 2048 // spans; more are dropped
	maxBatch    = 512
	sendTimeout = 10 * time.Second
)

// Tracer makes spans. It is a call.Tracer.
type Tracer struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
}

// CheckEndpoint says what is wrong with an endpoint.
func CheckEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	switch {
	case err != nil:
		return fmt.Errorf("%q is no URL", endpoint)
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return fmt.Errorf("%q: want http://HOST:PORT/v1/traces, or https", u.Redacted())
	case u.Path == "" || u.Path == "/":
		return fmt.Errorf("%q: want the whole path, mostly /v1/traces", u.Redacted())
	case u.User != nil:
		return errors.New("a user or password in the URL would show in the process list: put a proxy in front that adds it")
	}
	return nil
}

// New makes a Tracer. It dials nothing yet. Errors: an endpoint that
// CheckEndpoint refuses.
func New(ctx context.Context, o Options) (*Tracer, error) {
	if err := CheckEndpoint(o.Endpoint); err != nil {
		return nil, err
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(o.Endpoint), otlptracehttp.WithTimeout(sendTimeout),
		otlptracehttp.WithCompression(otlptracehttp.GzipCompression),
		// A batch that fails is dropped: spans are not worth a queue behind the queue.
		otlptracehttp.WithRetry(otlptracehttp.RetryConfig{Enabled: false}))
	if err != nil {
		return nil, fmt.Errorf("trace endpoint: %w", err)
	}
	return newTracer(o, &quiet{SpanExporter: exporter, log: o.Logger}), nil
}

func newTracer(o Options, exporter sdktrace.SpanExporter) *Tracer {
	p := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter, sdktrace.WithMaxQueueSize(maxQueue), sdktrace.WithMaxExportBatchSize(maxBatch), sdktrace.WithExportTimeout(sendTimeout)),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(o.Ratio))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String(event.ResourceServiceName, event.ServiceName),
			attribute.String(event.ResourceVersion, o.Version),
			attribute.String(event.ResourceInstance, o.NodeID))),
		sdktrace.WithRawSpanLimits(sdktrace.SpanLimits{AttributeValueLengthLimit: 1024, AttributeCountLimit: 32, EventCountLimit: 4, LinkCountLimit: 1}),
	)
	return &Tracer{provider: p, tracer: p.Tracer("autonomy/node")}
}

// Close sends what waits, until ctx ends, and stops.
func (t *Tracer) Close(ctx context.Context) error { return t.provider.Shutdown(ctx) }

// Start begins a span and returns its traceparent.
func (t *Tracer) Start(r *call.Request, at time.Time) (call.Span, string) {
	ctx := context.Background()
	if traceID, spanID, ok := call.ParseTraceParent(r.TraceParent); ok {
		flags := trace.TraceFlags(0)
		if n, err := strconv.ParseUint(r.TraceParent[53:55], 16, 8); err == nil {
			flags = trace.TraceFlags(n) & trace.FlagsSampled
		}
		ctx = trace.ContextWithRemoteSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: traceID, SpanID: spanID, TraceFlags: flags, Remote: true}))
	}
	_, s := t.tracer.Start(ctx, "execute_tool "+r.Kind, trace.WithTimestamp(at), trace.WithSpanKind(trace.SpanKindInternal))
	return span{s}, traceParent(s.SpanContext())
}

func traceParent(sc trace.SpanContext) string {
	traceID, spanID := sc.TraceID(), sc.SpanID()
	b := make([]byte, 0, 55)
	b = append(b, "00-"...)
	b = hex.AppendEncode(b, traceID[:])
	b = append(b, '-')
	b = hex.AppendEncode(b, spanID[:])
	b = append(b, '-')
	b = hex.AppendEncode(b, []byte{byte(sc.TraceFlags())})
	return string(b)
}

type span struct{ s trace.Span }

// End puts onto the span what came of the call.
func (s span) End(r *call.Report) {
	defer s.s.End(trace.WithTimestamp(r.Start.Add(r.Total)))
	if !s.s.IsRecording() {
		return
	}
	a := &r.Answer
	attrs := []attribute.KeyValue{
		attribute.String("gen_ai.operation.name", "execute_tool"),
		attribute.String("gen_ai.tool.name", r.Request.Kind),
		attribute.String("gen_ai.tool.type", "function"),
		attribute.String(event.AttrDecision, a.Decision),
		attribute.String("autonomy.caller.type", r.Request.Caller.Type),
		attribute.String("autonomy.caller.id", r.Request.Caller.ID),
	}
	text := func(key, v string) {
		if v != "" {
			attrs = append(attrs, attribute.String(key, v))
		}
	}
	micros := func(key string, d time.Duration) {
		if d > 0 {
			attrs = append(attrs, attribute.Int64(key, d.Microseconds()))
		}
	}
	text("gen_ai.tool.call.id", r.Request.CallID)
	text("gen_ai.conversation.id", r.Request.Session)
	text(event.AttrAuditID, a.AuditID)
	text(event.AttrOutcome, a.Outcome)
	text("autonomy.layer", a.Layer)
	text("autonomy.policy_ref", a.PolicyRef)
	micros("autonomy.eval_us", r.Eval)
	micros("autonomy.durable_us", r.Durable)
	micros("autonomy.tool_us", r.Tool)
	code := a.ErrCode
	if a.Decision == "deny" {
		code = a.Code
		if len(a.Reasons) > 0 && a.Reasons[0].Code != "" {
			code = a.Reasons[0].Code
		}
	}
	text("error.type", code)
	s.s.SetAttributes(attrs...)
	if a.Decision == "deny" || a.ErrCode != "" {
		s.s.SetStatus(codes.Error, code)
	}
}

// quiet tells of an endpoint that fails once, and once when it is back, instead
// of at every batch; the SDK would tell a global logger.
type quiet struct {
	sdktrace.SpanExporter
	log *slog.Logger

	mu      sync.Mutex
	failing bool
}

// ExportSpans sends a batch. A failure ends here: the spans are gone.
func (q *quiet) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	err := q.SpanExporter.ExportSpans(ctx, spans)
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case err != nil && !q.failing:
		q.log.Warn("the trace endpoint does not take spans: they are dropped until it does", "err", err)
	case err == nil && q.failing:
		q.log.Info("the trace endpoint takes spans again")
	}
	q.failing = err != nil
	return nil
}
