package trace

import (
	"compress/gzip"
	"context"
	"encoding/hex"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	coltrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/node/call"
)

// collector takes OTLP traces and hands their spans over.
func collector(t *testing.T) (url string, spans chan *tracev1.Span) {
	spans = make(chan *tracev1.Span, 16)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := io.Reader(r.Body)
		if r.Header.Get("Content-Encoding") == "gzip" {
			z, err := gzip.NewReader(r.Body)
			if err != nil {
				t.Error(err)
				return
			}
			body = z
		}
		data, err := io.ReadAll(body)
		var req coltrace.ExportTraceServiceRequest
		if err == nil {
			err = proto.Unmarshal(data, &req)
		}
		if err != nil || r.URL.Path != "/v1/traces" {
			t.Errorf("%s: %v", r.URL.Path, err)
			return
		}
		for _, rs := range req.ResourceSpans {
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					spans <- s
				}
			}
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	t.Cleanup(srv.Close)
	return srv.URL + "/v1/traces", spans
}

func one(t *testing.T, o Options, r *call.Request, report call.Report) (traceparent string) {
	t.Helper()
	o.Logger, o.NodeID, o.Version = slog.New(slog.DiscardHandler), "n-1", "1.0.0"
	tr, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	report.Request, report.Start, report.Total = r, time.Now(), 3*time.Millisecond
	s, tp := tr.Start(r, report.Start)
	s.End(&report)
	if err := tr.Close(context.WithoutCancel(t.Context())); err != nil {
		t.Error(err)
	}
	return tp
}

// TestSpan: what reaches a collector, and how it hangs together with the caller's.
func TestSpan(t *testing.T) {
	url, spans := collector(t)
	const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	tp := one(t, Options{Endpoint: url, Ratio: 0}, &call.Request{Kind: "tool.shell", Session: "s-1", CallID: "c-1", TraceParent: parent, Caller: call.Caller{Type: "unix", ID: "uid:0"}},
		call.Report{Eval: time.Millisecond, Answer: call.Answer{Decision: "deny", Layer: "policy", AuditID: "a-1", PolicyRef: "p@1", Reasons: []event.Reason{{Code: "no_shell", Message: "no"}}}})
	s := <-spans
	if s.Name != "execute_tool tool.shell" || hex.EncodeToString(s.TraceId) != parent[3:35] || hex.EncodeToString(s.ParentSpanId) != parent[36:52] {
		t.Errorf("span %v", s)
	}
	if want := "00-" + parent[3:35] + "-" + hex.EncodeToString(s.SpanId) + "-01"; tp != want {
		t.Errorf("passed on %s, want %s", tp, want)
	}
	got := map[string]string{}
	for _, kv := range s.Attributes {
		got[kv.Key] = kv.Value.GetStringValue()
		if v := kv.Value.GetIntValue(); v != 0 {
			got[kv.Key] = time.Duration(v * 1000).String()
		}
	}
	for k, want := range map[string]string{
		"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "tool.shell", "gen_ai.tool.call.id": "c-1", "gen_ai.conversation.id": "s-1",
		"autonomy.audit_id": "a-1", "autonomy.decision": "deny", "autonomy.layer": "policy", "autonomy.eval_us": "1ms", "error.type": "no_shell",
	} {
		if got[k] != want {
			t.Errorf("%s is %q, want %q", k, got[k], want)
		}
	}
	if s.Status.GetCode() != tracev1.Status_STATUS_CODE_ERROR || s.EndTimeUnixNano-s.StartTimeUnixNano != 3e6 {
		t.Errorf("status %v, took %d ns", s.Status, s.EndTimeUnixNano-s.StartTimeUnixNano)
	}
}

// TestSampling: the caller's decision counts; without one, the ratio.
func TestSampling(t *testing.T) {
	url, spans := collector(t)
	const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-"
	for _, tc := range []struct {
		parent string
		ratio  float64
		want   bool
	}{{"", 0, false}, {"", 1, true}, {parent + "00", 1, false}, {parent + "03", 0, true}, {parent + "0b", 0, true}, {parent + "0a", 1, false}} {
		tp := one(t, Options{Endpoint: url, Ratio: tc.ratio}, &call.Request{Kind: "tool.echo", TraceParent: tc.parent}, call.Report{Answer: call.Answer{Decision: "allow"}})
		if _, _, ok := call.ParseTraceParent(tp); !ok || strings.HasSuffix(tp, "-01") != tc.want {
			t.Errorf("%+v: passes on %q", tc, tp)
		}
		select {
		case s := <-spans:
			if !tc.want {
				t.Errorf("%+v: sent %v", tc, s)
			}
		default:
			if tc.want {
				t.Errorf("%+v: nothing was sent", tc)
			}
		}
	}
}

// TestEndpointGone: nobody waits for an endpoint that is not there.
func TestEndpointGone(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	url := srv.URL + "/v1/traces"
	srv.Close()
	one(t, Options{Endpoint: url, Ratio: 1}, &call.Request{Kind: "tool.echo"}, call.Report{})
}

func TestCheckEndpoint(t *testing.T) {
	for in, ok := range map[string]bool{
		"http://127.0.0.1:4318/v1/traces": true, "https://c.example/v1/traces": true,
		"http://127.0.0.1:4318": false, "grpc://127.0.0.1:4317": false, "127.0.0.1:4318": false, "": false, "http://u:p@h/v1/traces": false,
	} {
		if err := CheckEndpoint(in); (err == nil) != ok {
			t.Errorf("%q: %v", in, err)
		} else if err != nil && strings.Contains(err.Error(), "u:p") {
			t.Errorf("the password is in %q", err)
		}
	}
}
