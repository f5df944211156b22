// Package httpapi is the node's HTTP edge: it bounds what comes in, establishes
// who calls, and hands calls to node/call. It decides nothing.
//
// One fasthttp server serves all listeners. Handlers copy what outlives them;
// the context of a call is made here, because fasthttp's own ends only when the
// server shuts down. Every listener checks Host and Origin, so that a web page
// opened on this machine cannot reach the tools through the browser.
package httpapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/tool"
)

// Options configure a Server. Zero limits take the defaults named.
type Options struct {
	Pipeline *call.Pipeline
	Tools    func() *tool.Registry
	Status   func() any      // body of GET /v1/status, JSON-able
	Ready    func() []string // what is not ready; empty: ready
	// Metrics writes the node's metrics, as OpenMetrics or as Prometheus text,
	// and returns the content type.
	Metrics func(w io.Writer, openMetrics bool) string
	MCP     MCP // serves /mcp; nil: there is no such path
	Logger  *slog.Logger
	// Auth tells who calls. nil: only peers of Unix sockets do.
	Auth *auth.Authenticator
	// AllowedHosts are names that a Host header may have beside a listener's own
	// address, without a port.
	AllowedHosts []string
	// Refused is told of each credential that does not hold: token, certificate.
	// May be nil.
	Refused func(what string)

	MaxBodyBytes   int           // request body; default 256 KiB → 413
	MaxHeaderBytes int           // request line and headers; default 8 KiB → 431
	MaxBodyMemory  int64         // of all bodies that are being read or wait, in bytes; default 64 MiB → 429
	MaxExchanges   int           // open requests of /mcp, streams among them; half of them for one principal; default 2048 → 429
	MaxConns       int           // open connections; default 4096 → 503
	ReadTimeout    time.Duration // a whole request; default 10 s
	IdleTimeout    time.Duration // between requests; default 60 s
	WriteTimeout   time.Duration // default 30 s
}

// Defaults of Options.
const (
	DefaultMaxBodyBytes   = 256 << 10
	DefaultMaxHeaderBytes = 8 << 10
	DefaultMaxBodyMemory  = 64 << 20
	DefaultMaxExchanges   = 2048
	DefaultMaxConns       = 4096
	DefaultReadTimeout    = 10 * time.Second
	DefaultIdleTimeout    = 60 * time.Second
	DefaultWriteTimeout   = 30 * time.Second
)

// Server serves the node's API on any number of listeners.
type Server struct {
	o      Options
	http   fasthttp.Server
	gate   *call.Gate
	bodies bodies

	serving atomic.Int32 // listeners

	exchanges exchanges // open requests of /mcp

	ctx       context.Context // ends the calls that outlast Shutdown
	cancel    context.CancelFunc
	ctxs      [ctxShards]context.Context // children of ctx, see callContext
	listening context.Context            // ends when Shutdown begins: streams that wait for events
	deafen    context.CancelFunc
	bufs      sync.Pool // *[]byte, answers
}

// New makes a Server.
func New(o Options) *Server {
	o.MaxBodyBytes = def(o.MaxBodyBytes, DefaultMaxBodyBytes)
	o.MaxHeaderBytes = def(o.MaxHeaderBytes, DefaultMaxHeaderBytes)
	o.MaxBodyMemory = def(o.MaxBodyMemory, DefaultMaxBodyMemory)
	o.MaxExchanges = def(o.MaxExchanges, DefaultMaxExchanges)
	o.MaxConns = def(o.MaxConns, DefaultMaxConns)
	if o.Auth == nil {
		o.Auth, _ = auth.Open(auth.Options{Logger: o.Logger}) // without files nothing can fail, and over TCP nobody gets in
	}
	s := &Server{o: o, gate: o.Pipeline.Gate(), bodies: bodies{max: o.MaxBodyMemory}, exchanges: exchanges{max: o.MaxExchanges}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	for i := range s.ctxs {
		shard, cancel := context.WithCancel(s.ctx)
		context.AfterFunc(s.ctx, cancel) // nobody ends one of them alone
		s.ctxs[i] = shard
	}
	s.listening, s.deafen = context.WithCancel(s.ctx)
	s.bufs.New = func() any { b := make([]byte, 0, 4096); return &b }
	s.http = fasthttp.Server{
		Name:                         "",
		NoDefaultServerHeader:        true,
		NoDefaultContentType:         true,
		Handler:                      s.serve,
		ErrorHandler:                 s.badRequest,
		MaxRequestBodySize:           o.MaxBodyBytes,
		StreamRequestBody:            true, // a body takes memory as it arrives, not as it announces itself: see read
		ReadBufferSize:               o.MaxHeaderBytes,
		Concurrency:                  o.MaxConns + spareConns,
		ReadTimeout:                  def(o.ReadTimeout, DefaultReadTimeout),
		IdleTimeout:                  def(o.IdleTimeout, DefaultIdleTimeout),
		WriteTimeout:                 def(o.WriteTimeout, DefaultWriteTimeout),
		DisablePreParseMultipartForm: true,
		CloseOnShutdown:              true,
		Logger:                       discard{},
	}
	return s
}

func def[T int | int64 | time.Duration](v, d T) T {
	if v == 0 {
		return d
	}
	return v
}

// spareConns are connections over the limit that are still told why they are
// refused; beyond them the server's own words have to do.
const spareConns = 64

// discard drops fasthttp's own log lines: they are about single connections,
// and hold what a client sent.
type discard struct{}

func (discard) Printf(string, ...any) {}

// Serve serves ln until Shutdown.
func (s *Server) Serve(ln net.Listener) error {
	s.serving.Add(1)
	defer s.serving.Add(-1)
	if err := s.http.Serve(steady{s.o.Auth.Listener(ln), s.o.Logger}); err != nil {
		return fmt.Errorf("serve %s: %w", run.Addr(ln), err)
	}
	return nil
}

// connections is how many are open. The server counts one too many for each
// listener but the first.
func (s *Server) connections() int {
	return int(s.http.GetOpenConnectionsCount()) - max(0, int(s.serving.Load())-1)
}

// Shutdown stops accepting and waits for running calls until ctx ends; what
// still runs then is cancelled and waited for.
func (s *Server) Shutdown(ctx context.Context) error {
	s.deafen()
	err := s.http.ShutdownWithContext(ctx)
	for err == nil && s.gate.Running() > 0 { // calls of MCP sessions go on without their connection
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	s.cancel()
	if err != nil {
		// Cancelled calls end at once; give them the time to record it.
		again, stop := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer stop()
		for s.gate.Running()+s.exchanges.open() > 0 && again.Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
	}
	return err
}

// Headers of every answer, in the form in which they are sent.
var (
	headerNoSniff, valueNoSniff = []byte("X-Content-Type-Options"), []byte("nosniff")
	headerCache, valueNoStore   = []byte("Cache-Control"), []byte("no-store")
	contentJSON                 = []byte("application/json")
)

// routes are method and path; nothing else is served.
func (s *Server) serve(ctx *fasthttp.RequestCtx) {
	h := &ctx.Response.Header
	h.SetCanonical(headerNoSniff, valueNoSniff)
	h.SetCanonical(headerCache, valueNoStore)
	if ctx.ConnRequestNum() == 1 && s.connections() > s.o.MaxConns {
		ctx.SetConnectionClose()
		s.deny(ctx, fasthttp.StatusServiceUnavailable, "too_many_connections", fmt.Sprintf("%d connections are open, which is this node's limit: use those you have, or try again", s.o.MaxConns))
		return
	}
	caller, ok := s.identify(ctx)
	if !ok {
		return
	}
	path := string(ctx.Path())
	if id, ok := strings.CutPrefix(path, "/v1/calls/"); ok && id != "" {
		path = "/v1/calls/"
	}
	method, handler := fasthttp.MethodGet, s.routes(path)
	switch path {
	case "/v1/tool":
		method = fasthttp.MethodPost
	case "/mcp":
		method = string(ctx.Method()) // the protocol's own affair
	}
	if handler == nil {
		method, handler = s.queries(path)
	}
	switch {
	case handler == nil:
		s.deny(ctx, fasthttp.StatusNotFound, "not_found", "no such path: the node serves /v1/tool, /v1/tools, /v1/status, /v1/calls/{audit_id}, /v1/data/autonomy/{rule}, /access/v1/evaluation, /access/v1/evaluations, /mcp, /healthz, /readyz and /metrics")
	case string(ctx.Method()) != method:
		h.Set("Allow", method)
		s.deny(ctx, fasthttp.StatusMethodNotAllowed, "method_not_allowed", "use "+method)
	default:
		handler(ctx, caller)
	}
}

func (s *Server) routes(path string) func(*fasthttp.RequestCtx, call.Caller) {
	switch path {
	case "/v1/tool":
		return s.tool
	case "/v1/tools":
		return s.tools
	case "/v1/status":
		return func(ctx *fasthttp.RequestCtx, _ call.Caller) { s.json(ctx, fasthttp.StatusOK, s.o.Status()) }
	case "/v1/calls/":
		return s.call
	case "/mcp":
		if s.o.MCP != nil {
			return s.serveMCP
		}
	case "/healthz":
		return func(ctx *fasthttp.RequestCtx, _ call.Caller) { s.json(ctx, fasthttp.StatusOK, health{"ok", nil}) }
	case "/readyz":
		return s.ready
	case "/metrics":
		return s.metrics
	}
	return nil
}

// tool serves POST /v1/tool.
func (s *Server) tool(ctx *fasthttp.RequestCtx, caller call.Caller) {
	if ct := ctx.Request.Header.ContentType(); len(ct) > 0 && !isJSON(ct) {
		s.deny(ctx, fasthttp.StatusUnsupportedMediaType, "unsupported_media_type", "send Content-Type: application/json")
		return
	}
	if len(ctx.Request.Header.ContentEncoding()) > 0 {
		s.deny(ctx, fasthttp.StatusUnsupportedMediaType, "unsupported_encoding", "send the body without Content-Encoding")
		return
	}
	body, ok := s.read(ctx)
	if !ok {
		return
	}
	defer s.bodies.put(body)
	if !s.enter(ctx, caller) {
		return
	}
	defer s.gate.Leave()
	req := call.NewRequest()
	defer req.Free()
	if tp := ctx.Request.Header.Peek("traceparent"); len(tp) > 0 {
		req.TraceParent = string(tp)
	}
	if err := call.Decode(body.b, req); err != nil {
		s.deny(ctx, fasthttp.StatusBadRequest, "malformed", err.Error())
		return
	}
	req.Caller = caller
	a := s.o.Pipeline.Do(s.callContext(ctx), req, call.Execute)
	s.answer(ctx, &a)
}

// ctxShards is how many contexts the calls share.
const ctxShards = 32

// callContext is the context of the calls on one connection. A call that gives
// its tool a time limit enters itself into its parent under the parent's lock:
// with one parent for all, they would meet there.
func (s *Server) callContext(ctx *fasthttp.RequestCtx) context.Context {
	return s.ctxs[ctx.ConnID()%ctxShards]
}

func isJSON(contentType []byte) bool {
	if string(contentType) == "application/json" {
		return true
	}
	media, _, _ := bytes.Cut(contentType, []byte(";"))
	return bytes.EqualFold(bytes.TrimSpace(media), []byte("application/json"))
}

// enter takes a place for a call of caller, or answers 429: the node is at its
// limit. What is refused here was not decoded.
func (s *Server) enter(ctx *fasthttp.RequestCtx, caller call.Caller) bool {
	err := s.gate.Enter(s.ctx, caller)
	switch {
	case err == nil:
		return true
	case s.ctx.Err() != nil:
		s.deny(ctx, fasthttp.StatusServiceUnavailable, "shutting_down", "the node is stopping: denied")
	default:
		s.deny(ctx, fasthttp.StatusTooManyRequests, "overloaded", err.Error()+": this node is at its limit, try again")
	}
	return false
}

func (s *Server) answer(ctx *fasthttp.RequestCtx, a *call.Answer) {
	if a.Replayed {
		ctx.Response.Header.Set("Idempotent-Replay", "true")
	}
	if a.Status == fasthttp.StatusServiceUnavailable || a.Status == fasthttp.StatusTooManyRequests {
		ctx.Response.Header.Set("Retry-After", retryAfter(a.RetryAfter))
	}
	buf := s.bufs.Get().(*[]byte)
	*buf = a.AppendJSON((*buf)[:0])
	ctx.SetStatusCode(a.Status)
	ctx.SetContentTypeBytes(contentJSON)
	ctx.Response.SetBody(*buf) // copies
	if cap(*buf) <= 64<<10 {
		s.bufs.Put(buf)
	}
}

// retryAfter is d in whole seconds, at least 1.
func retryAfter(d time.Duration) string {
	return strconv.FormatInt(max(1, int64((d+time.Second-1)/time.Second)), 10)
}

// toolInfo is one entry of GET /v1/tools.
type toolInfo struct {
	Name             string          `json:"name"`
	Description      string          `json:"description"`
	InputSchema      json.RawMessage `json:"input_schema"`
	DefinitionDigest string          `json:"definition_digest"`
}

func (s *Server) tools(ctx *fasthttp.RequestCtx, _ call.Caller) {
	list := s.o.Tools().List()
	out := struct {
		Tools []toolInfo `json:"tools"`
	}{make([]toolInfo, 0, len(list))}
	for _, t := range list {
		out.Tools = append(out.Tools, toolInfo{t.Kind, t.Description, t.InputSchema, t.Digest})
	}
	s.json(ctx, fasthttp.StatusOK, out)
}

func (s *Server) call(ctx *fasthttp.RequestCtx, caller call.Caller) {
	id := strings.TrimPrefix(string(ctx.Path()), "/v1/calls/")
	cctx, cancel := context.WithTimeout(s.ctx, 5*time.Second)
	defer cancel()
	records, err := s.o.Pipeline.Find(cctx, id, caller)
	if errors.Is(err, call.ErrNoCall) {
		s.deny(ctx, fasthttp.StatusNotFound, "not_found", "this node's log has no call of yours with that audit_id: it was made elsewhere, by another caller, or has left the log")
		return
	}
	if err != nil {
		s.o.Logger.Error("read a call's records", "audit_id", id, "err", err)
		s.deny(ctx, fasthttp.StatusServiceUnavailable, "log_unreadable", "the log could not be read: see the node's log")
		return
	}
	s.json(ctx, fasthttp.StatusOK, struct {
		AuditID string        `json:"audit_id"`
		Records []call.Record `json:"records"`
	}{id, records})
}

type health struct {
	Status   string   `json:"status"`
	NotReady []string `json:"not_ready,omitempty"`
}

func (s *Server) ready(ctx *fasthttp.RequestCtx, caller call.Caller) {
	if missing := s.o.Ready(); len(missing) > 0 {
		if caller.Type == "" {
			missing = nil // what is wrong inside is not for everybody
		}
		s.json(ctx, fasthttp.StatusServiceUnavailable, health{"not ready", missing})
		return
	}
	s.json(ctx, fasthttp.StatusOK, health{"ready", nil})
}

func (s *Server) metrics(ctx *fasthttp.RequestCtx, _ call.Caller) {
	open := bytes.Contains(ctx.Request.Header.Peek("Accept"), []byte("application/openmetrics-text"))
	ctx.SetContentType(s.o.Metrics(ctx, open))
}

func (s *Server) json(ctx *fasthttp.RequestCtx, status int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		s.o.Logger.Error("encode an answer", "path", string(ctx.Path()), "err", err)
		s.deny(ctx, fasthttp.StatusInternalServerError, "internal", "the node failed inside; its log has the cause")
		return
	}
	ctx.SetStatusCode(status)
	ctx.SetContentType("application/json")
	ctx.SetBody(append(data, '\n'))
}

// deny answers a request that never became a call.
func (s *Server) deny(ctx *fasthttp.RequestCtx, status int, code, reason string) {
	if s.refuse(ctx, &queryFault{status: status, code: code, msg: reason}) {
		return
	}
	layer := call.LayerRequest
	if status == fasthttp.StatusServiceUnavailable {
		layer = call.LayerRuntime // nothing is wrong with the request
	}
	a := call.Answer{Status: status, Decision: "deny", Layer: layer, Code: code, Reason: reason}
	s.answer(ctx, &a)
}

// badRequest answers what fasthttp could not read.
func (s *Server) badRequest(ctx *fasthttp.RequestCtx, err error) {
	ctx.Response.Header.Set("X-Content-Type-Options", "nosniff")
	var small *fasthttp.ErrSmallBuffer
	var netErr net.Error
	switch {
	case errors.As(err, &small):
		s.deny(ctx, fasthttp.StatusRequestHeaderFieldsTooLarge, "headers_too_large", fmt.Sprintf("request line and headers are over %d bytes", s.o.MaxHeaderBytes))
	case errors.Is(err, fasthttp.ErrBodyTooLarge):
		s.tooLarge(ctx)
	case errors.As(err, &netErr) && netErr.Timeout():
		s.deny(ctx, fasthttp.StatusRequestTimeout, "timeout", "the request did not arrive in time")
	default:
		s.deny(ctx, fasthttp.StatusBadRequest, "malformed", "not an HTTP request that can be read")
	}
	ctx.SetConnectionClose()
}
