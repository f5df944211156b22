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
	"strings"
	"sync"
	"time"

	"github.com/valyala/fasthttp"
	"golang.org/x/sys/unix"

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
	Metrics  func(io.Writer) // Prometheus text
	MCP      MCP             // serves /mcp; nil: there is no such path
	Logger   *slog.Logger

	MaxBodyBytes   int           // request body; default 256 KiB → 413
	MaxHeaderBytes int           // request line and headers; default 8 KiB → 431
	MaxInFlight    int           // calls at one time; default 1024 → 429
	MaxExchanges   int           // open requests of /mcp, streams among them; default 1024 → 429
	MaxConns       int           // open connections; default 16384
	ReadTimeout    time.Duration // a whole request; default 10 s
	IdleTimeout    time.Duration // between requests; default 60 s
	WriteTimeout   time.Duration // default 30 s
}

// Defaults of Options.
const (
	DefaultMaxBodyBytes   = 256 << 10
	DefaultMaxHeaderBytes = 8 << 10
	DefaultMaxInFlight    = 1024
	DefaultMaxExchanges   = 1024
	DefaultMaxConns       = 16384
	DefaultReadTimeout    = 10 * time.Second
	DefaultIdleTimeout    = 60 * time.Second
	DefaultWriteTimeout   = 30 * time.Second
)

// Server serves the node's API on any number of listeners.
type Server struct {
	o     Options
	http  fasthttp.Server
	slots chan struct{} // one token per call in flight

	exchanges chan struct{} // one token per open request of /mcp

	ctx       context.Context // ends the calls that outlast Shutdown
	cancel    context.CancelFunc
	listening context.Context // ends when Shutdown begins: streams that wait for events
	deafen    context.CancelFunc
	bufs      sync.Pool // *[]byte, answers
}

// New makes a Server.
func New(o Options) *Server {
	o.MaxBodyBytes = def(o.MaxBodyBytes, DefaultMaxBodyBytes)
	o.MaxHeaderBytes = def(o.MaxHeaderBytes, DefaultMaxHeaderBytes)
	o.MaxInFlight = def(o.MaxInFlight, DefaultMaxInFlight)
	o.MaxExchanges = def(o.MaxExchanges, DefaultMaxExchanges)
	o.MaxConns = def(o.MaxConns, DefaultMaxConns)
	s := &Server{o: o, slots: make(chan struct{}, o.MaxInFlight), exchanges: make(chan struct{}, o.MaxExchanges)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.listening, s.deafen = context.WithCancel(s.ctx)
	s.bufs.New = func() any { b := make([]byte, 0, 4096); return &b }
	s.http = fasthttp.Server{
		Name:                         "",
		NoDefaultServerHeader:        true,
		NoDefaultContentType:         true,
		Handler:                      s.serve,
		ErrorHandler:                 s.badRequest,
		MaxRequestBodySize:           o.MaxBodyBytes,
		ReadBufferSize:               o.MaxHeaderBytes,
		Concurrency:                  o.MaxConns,
		ReadTimeout:                  def(o.ReadTimeout, DefaultReadTimeout),
		IdleTimeout:                  def(o.IdleTimeout, DefaultIdleTimeout),
		WriteTimeout:                 def(o.WriteTimeout, DefaultWriteTimeout),
		DisablePreParseMultipartForm: true,
		CloseOnShutdown:              true,
		Logger:                       discard{},
	}
	return s
}

func def[T int | time.Duration](v, d T) T {
	if v == 0 {
		return d
	}
	return v
}

// discard drops fasthttp's own log lines: they are about single connections,
// and hold what a client sent.
type discard struct{}

func (discard) Printf(string, ...any) {}

// Serve serves ln until Shutdown.
func (s *Server) Serve(ln net.Listener) error {
	if _, ok := ln.(*net.UnixListener); ok {
		ln = peerListener{ln}
	}
	if err := s.http.Serve(ln); err != nil {
		return fmt.Errorf("serve %s: %w", run.Addr(ln), err)
	}
	return nil
}

// Shutdown stops accepting and waits for running calls until ctx ends; what
// still runs then is cancelled and waited for.
func (s *Server) Shutdown(ctx context.Context) error {
	s.deafen()
	err := s.http.ShutdownWithContext(ctx)
	s.cancel()
	if err != nil {
		// Cancelled calls end at once; give them the time to record it.
		again, stop := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer stop()
		for len(s.slots)+len(s.exchanges) > 0 && again.Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
	}
	return err
}

// peerConn is a Unix connection with its caller, read once when it was accepted.
type peerConn struct {
	net.Conn
	caller call.Caller
}

// NetConn is the connection underneath, as tls.Conn has it.
func (c peerConn) NetConn() net.Conn { return c.Conn }

type peerListener struct{ net.Listener }

func (l peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uc, ok := c.(*net.UnixConn)
		if !ok {
			return c, nil
		}
		raw, err := uc.SyscallConn()
		if err != nil {
			c.Close()
			continue
		}
		var cred *unix.Ucred
		var credErr error
		if err := raw.Control(func(fd uintptr) {
			cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		}); err != nil || credErr != nil {
			c.Close() // who cannot be named is not served
			continue
		}
		return peerConn{c, call.Caller{Type: "unix", ID: fmt.Sprintf("uid:%d", cred.Uid)}}, nil
	}
}

// anonymous is who calls on loopback without a credential; policy sees that.
var anonymous = call.Caller{Type: "anonymous", ID: "loopback"}

// authenticate establishes who calls. A credential that this node cannot check
// is refused, never taken for anonymous.
func authenticate(ctx *fasthttp.RequestCtx) (call.Caller, bool) {
	if len(ctx.Request.Header.Peek(fasthttp.HeaderAuthorization)) > 0 {
		return call.Caller{}, false
	}
	if pc, ok := ctx.Conn().(peerConn); ok {
		return pc.caller, true
	}
	return anonymous, true
}

// foreign reports why a request comes from where it should not, "" when it
// does not: Host must name this machine (DNS rebinding), Origin must be absent
// or this server (a page in a browser).
func foreign(ctx *fasthttp.RequestCtx) string {
	if _, ok := ctx.Conn().(peerConn); ok {
		if len(ctx.Request.Header.Peek(fasthttp.HeaderOrigin)) > 0 {
			return "requests from a browser are not served here"
		}
		return ""
	}
	host := string(ctx.Request.Header.Host())
	if !ownHost(host, ctx.LocalAddr()) {
		return "the Host header does not name this listener: use the address that the node prints at start"
	}
	if o := ctx.Request.Header.Peek(fasthttp.HeaderOrigin); len(o) > 0 && string(o) != "http://"+host {
		return "requests from another origin are not served here"
	}
	return ""
}

func ownHost(host string, local net.Addr) bool {
	name, port, err := net.SplitHostPort(host)
	if err != nil {
		name, port = strings.Trim(host, "[]"), "80"
	}
	addr, ok := local.(*net.TCPAddr)
	if !ok || port != fmt.Sprint(addr.Port) {
		return false
	}
	if name == "localhost" {
		return addr.IP.IsLoopback()
	}
	ip := net.ParseIP(name)
	return ip != nil && ip.Equal(addr.IP)
}

// routes are method and path; nothing else is served.
func (s *Server) serve(ctx *fasthttp.RequestCtx) {
	h := &ctx.Response.Header
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	if why := foreign(ctx); why != "" {
		s.deny(ctx, fasthttp.StatusForbidden, "forbidden_origin", why)
		return
	}
	caller, ok := authenticate(ctx)
	if !ok {
		h.Set("WWW-Authenticate", "Bearer")
		s.deny(ctx, fasthttp.StatusUnauthorized, "unauthenticated", "this node checks no bearer tokens: leave the Authorization header out, or call on its Unix socket")
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
	switch {
	case handler == nil:
		s.deny(ctx, fasthttp.StatusNotFound, "not_found", "no such path: the node serves /v1/tool, /v1/tools, /v1/status, /v1/calls/{audit_id}, /mcp, /healthz, /readyz and /metrics")
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

// Admit takes one of the places for running calls; ok is false when none is
// free. release gives it back, once.
func (s *Server) Admit() (release func(), ok bool) {
	select {
	case s.slots <- struct{}{}:
		return func() { <-s.slots }, true
	default:
		return nil, false
	}
}

// tool serves POST /v1/tool.
func (s *Server) tool(ctx *fasthttp.RequestCtx, caller call.Caller) {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		ctx.Response.Header.Set("Retry-After", "1")
		s.deny(ctx, fasthttp.StatusTooManyRequests, "overloaded", fmt.Sprintf("%d calls are running, which is this node's limit: try again", s.o.MaxInFlight))
		return
	}
	if ct := ctx.Request.Header.ContentType(); len(ct) > 0 {
		media, _, _ := bytes.Cut(ct, []byte(";"))
		if !bytes.EqualFold(bytes.TrimSpace(media), []byte("application/json")) {
			s.deny(ctx, fasthttp.StatusUnsupportedMediaType, "unsupported_media_type", "send Content-Type: application/json")
			return
		}
	}
	if len(ctx.Request.Header.ContentEncoding()) > 0 {
		s.deny(ctx, fasthttp.StatusUnsupportedMediaType, "unsupported_encoding", "send the body without Content-Encoding")
		return
	}
	req := call.Request{Caller: caller, TraceParent: string(ctx.Request.Header.Peek("traceparent"))}
	if err := call.Decode(ctx.Request.Body(), &req); err != nil {
		s.deny(ctx, fasthttp.StatusBadRequest, "malformed", err.Error())
		return
	}
	req.Caller = caller
	a := s.o.Pipeline.Do(s.ctx, &req, call.Execute)
	s.answer(ctx, &a)
}

func (s *Server) answer(ctx *fasthttp.RequestCtx, a *call.Answer) {
	if a.Replayed {
		ctx.Response.Header.Set("Idempotent-Replay", "true")
	}
	if a.Status == fasthttp.StatusServiceUnavailable || a.Status == fasthttp.StatusTooManyRequests {
		ctx.Response.Header.Set("Retry-After", "1")
	}
	buf := s.bufs.Get().(*[]byte)
	*buf = a.AppendJSON((*buf)[:0])
	ctx.SetStatusCode(a.Status)
	ctx.SetContentType("application/json")
	ctx.Response.SetBody(*buf) // copies
	if cap(*buf) <= 64<<10 {
		s.bufs.Put(buf)
	}
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

func (s *Server) ready(ctx *fasthttp.RequestCtx, _ call.Caller) {
	if missing := s.o.Ready(); len(missing) > 0 {
		s.json(ctx, fasthttp.StatusServiceUnavailable, health{"not ready", missing})
		return
	}
	s.json(ctx, fasthttp.StatusOK, health{"ready", nil})
}

func (s *Server) metrics(ctx *fasthttp.RequestCtx, _ call.Caller) {
	ctx.SetContentType("text/plain; version=0.0.4; charset=utf-8")
	s.o.Metrics(ctx)
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
	a := call.Answer{Status: status, Decision: "deny", Layer: call.LayerRequest, Code: code, Reason: reason}
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
		drain(ctx)
		s.deny(ctx, fasthttp.StatusRequestEntityTooLarge, "body_too_large", fmt.Sprintf("the body is over %d bytes", s.o.MaxBodyBytes))
	case errors.As(err, &netErr) && netErr.Timeout():
		s.deny(ctx, fasthttp.StatusRequestTimeout, "timeout", "the request did not arrive in time")
	default:
		s.deny(ctx, fasthttp.StatusBadRequest, "malformed", "not an HTTP request that can be read")
	}
	ctx.SetConnectionClose()
}

// What of a body over the limit is read and thrown away, so that the sender
// gets to read the answer: a connection closed with unread data is reset.
const (
	drainBytes = 4 << 20
	drainTime  = time.Second
)

func drain(ctx *fasthttp.RequestCtx) {
	left := ctx.Request.Header.ContentLength()
	c := ctx.Conn()
	if left <= 0 || left > drainBytes || c.SetReadDeadline(time.Now().Add(drainTime)) != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, c, int64(left)) // part of it was read with the header: the deadline ends the wait
}
