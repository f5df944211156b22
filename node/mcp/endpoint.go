// Package mcp is the node's Model Context Protocol endpoint: tools/list shows
// the registered tools, tools/call goes through node/call like every other
// call. It decides nothing. The Go SDK speaks the protocol; this package gives
// it the tools, the callers and the bounds.
//
// Two protocols share the path /mcp, told apart by the header that each request
// carries. Since 2026-07-28 a request stands alone and ends with its response:
// a client that closes the connection cancels the call. Before that there are
// sessions: their ids are random and bound to the principal that opened them,
// their number is bounded, in all and per principal, and an idle one is closed;
// a call is cancelled by notifications/cancelled, not by a lost connection.
// Batches, which one revision had, are refused: one HTTP request, one call.
//
// Answers. A call that ran gives its output as structuredContent and the same
// as text; a tool of an upstream MCP server gives the upstream's own content. A
// call that was refused, waits for a human or failed is a tool error (isError),
// so that the model reads why: layer, reason, code, audit_id and what to do
// next, as text, and the body that POST /v1/tool would have sent as
// structuredContent. Only a tool that does not exist, or a field that no call
// may have, is an error of the protocol. Either way _meta names the audit_id.
//
// Fields of a call that the protocol has no place for travel in _meta, under
// MetaPrefix: call_id (idempotency), session, timeout_ms, dry_run. traceparent
// stands there under its own name, as the protocol reserves it.
//
// An Endpoint is safe for concurrent use. It imports node/call and node/tool
// and is imported by node alone; the stdio side is Stdio, in this package too.
package mcp

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/tool"
)

// MetaPrefix stands before the names of this project in _meta.
const MetaPrefix = "io.github.autonomyops/"

// Options configure an Endpoint. Pipeline, Tools and Logger are
// required; zero limits take the defaults named.
type Options struct {
	Pipeline *call.Pipeline
	Tools    func() *tool.Registry // the registry in force; call Refresh after a swap
	Logger   *slog.Logger

	MaxBodyBytes   int           // one request; default 256 KiB
	MaxSessions    int           // open sessions of the older protocol; default 256 → 503
	MaxPerCaller   int           // of these, of one principal; default 128 → 503
	SessionTimeout time.Duration // a session without requests is closed; default 30 min
}

// Defaults of Options.
const (
	DefaultMaxBodyBytes   = 256 << 10
	DefaultMaxSessions    = 256
	DefaultMaxPerCaller   = 128
	DefaultSessionTimeout = 30 * time.Minute
)

// Versions are the protocol's revisions that are served, newest first. The first
// is the stateless one.
var Versions = []string{stateless, "2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05"}

const stateless = "2026-07-28"

// Endpoint serves /mcp.
type Endpoint struct {
	o Options

	single   *mcp.Server  // one request, one session
	lasting  *mcp.Server  // sessions of the older protocol
	answers  http.Handler // of single: one JSON document
	events   http.Handler // of single: a stream, for calls whose progress is wanted
	sessions http.Handler // of lasting

	ctx    context.Context // ends at Close; every call ends with it
	cancel context.CancelFunc

	mu      sync.Mutex
	shown   map[string]string // name of each tool that the servers have → its digest
	owners  map[string]string // session id → principal; holds closed ones until the next count
	opening map[string]int    // principal → sessions that are being opened
}

// New makes an Endpoint.
func New(o Options) *Endpoint {
	if o.MaxBodyBytes == 0 {
		o.MaxBodyBytes = DefaultMaxBodyBytes
	}
	if o.MaxSessions == 0 {
		o.MaxSessions = DefaultMaxSessions
	}
	if o.MaxPerCaller == 0 {
		o.MaxPerCaller = DefaultMaxPerCaller
	}
	if o.SessionTimeout == 0 {
		o.SessionTimeout = DefaultSessionTimeout
	}
	e := &Endpoint{o: o, shown: map[string]string{}, owners: map[string]string{}, opening: map[string]int{}}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.single, e.lasting = newServer(), newServer()
	handler := func(s *mcp.Server, ho mcp.StreamableHTTPOptions) http.Handler {
		ho.MaxRequestBodyBytes = int64(o.MaxBodyBytes)
		ho.DisableLocalhostProtection = true // the listener has checked Host
		h := mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return s }, &ho)
		return auth.RequireBearerToken(principal, &auth.RequireBearerTokenOptions{AllowMissingExpiration: true})(h)
	}
	e.answers = handler(e.single, mcp.StreamableHTTPOptions{Stateless: true, JSONResponse: true, PropagateRequestCancellation: true})
	e.events = handler(e.single, mcp.StreamableHTTPOptions{Stateless: true, PropagateRequestCancellation: true})
	e.sessions = handler(e.lasting, mcp.StreamableHTTPOptions{SessionTimeout: o.SessionTimeout})
	e.Refresh()
	return e
}

func newServer() *mcp.Server {
	s := mcp.NewServer(&mcp.Implementation{Name: "autonomy-node", Title: "AutonomyOps node", Version: run.Version}, &mcp.ServerOptions{
		Logger:       slog.New(slog.DiscardHandler), // its lines are about single requests, and hold what a client sent
		Capabilities: &mcp.ServerCapabilities{Tools: &mcp.ToolCapabilities{ListChanged: true}},
		Instructions: "Every call is decided by policy and recorded before it runs. " +
			"A result with isError that says \"denied\" is a decision, not a fault: do not repeat the call unchanged; its text says what to do next.",
		SupportedProtocolVersions: Versions,
	})
	s.AddReceivingMiddleware(toolsOnly)
	return s
}

// served are the methods there are; the SDK would answer others with nothing in
// them, as if there could be something.
var served = map[string]bool{"initialize": true, "ping": true, "server/discover": true, "subscriptions/listen": true, "tools/list": true, "tools/call": true}

func toolsOnly(next mcp.MethodHandler) mcp.MethodHandler {
	return func(ctx context.Context, method string, r mcp.Request) (mcp.Result, error) {
		if !served[method] && !strings.HasPrefix(method, "notifications/") {
			return nil, &jsonrpc.Error{Code: jsonrpc.CodeMethodNotFound, Message: "this server has tools only: no " + method}
		}
		return next(ctx, method, r)
	}
}

// The SDK takes a principal, binds sessions to it and hands it to the tool's
// handler as the result of a bearer check. The listener has established who
// calls; its finding travels in the context, and the header holds nothing.
type callerKey struct{}

func principal(_ context.Context, _ string, r *http.Request) (*auth.TokenInfo, error) {
	c, ok := r.Context().Value(callerKey{}).(call.Caller)
	if !ok {
		return nil, auth.ErrInvalidToken
	}
	return &auth.TokenInfo{UserID: name(c), Extra: map[string]any{"caller": c}}, nil
}

func name(c call.Caller) string { return c.Type + "\x00" + c.ID }

// Serve serves one request of caller.
func (e *Endpoint) Serve(w http.ResponseWriter, r *http.Request, caller call.Caller) {
	r = r.WithContext(context.WithValue(r.Context(), callerKey{}, caller))
	r.Header.Set("Authorization", "Bearer listener")
	var body []byte
	if r.Method == http.MethodPost {
		var err error
		body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, int64(e.o.MaxBodyBytes)))
		if err != nil {
			refuse(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("the body is over %d bytes", e.o.MaxBodyBytes))
			return
		}
		if bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("[")) {
			refuse(w, http.StatusBadRequest, "batches are not served: send one message in a request")
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
	}
	switch {
	case r.Header.Get("Mcp-Protocol-Version") >= stateless:
		r.Header.Del("Mcp-Session-Id")
		if bytes.Contains(body, []byte(`"progressToken"`)) {
			e.events.ServeHTTP(w, r)
			return
		}
		e.answers.ServeHTTP(w, r)
	case r.Method == http.MethodPost && r.Header.Get("Mcp-Session-Id") == "":
		e.open(w, r, caller)
	default:
		e.sessions.ServeHTTP(w, r)
	}
}

// open serves a request that begins a session, if there is room for one.
func (e *Endpoint) open(w http.ResponseWriter, r *http.Request, caller call.Caller) {
	who := name(caller)
	e.mu.Lock()
	live := map[string]string{}
	for s := range e.lasting.Sessions() {
		if owner, ok := e.owners[s.ID()]; ok {
			live[s.ID()] = owner
		}
	}
	e.owners = live
	all, own := len(live), e.opening[who]
	for _, n := range e.opening {
		all += n
	}
	for _, owner := range live {
		if owner == who {
			own++
		}
	}
	full := all >= e.o.MaxSessions || own >= e.o.MaxPerCaller
	if !full {
		e.opening[who]++
	}
	e.mu.Unlock()
	if full {
		w.Header().Set("Retry-After", "60")
		refuse(w, http.StatusServiceUnavailable, "too many MCP sessions are open: end one with DELETE, or use protocol "+stateless+", which needs none")
		return
	}
	defer func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.opening[who]--; e.opening[who] == 0 {
			delete(e.opening, who)
		}
		if id := w.Header().Get("Mcp-Session-Id"); id != "" {
			e.owners[id] = who
		}
	}()
	e.sessions.ServeHTTP(w, r)
}

// refuse answers a request that never reached the protocol.
func refuse(w http.ResponseWriter, status int, reason string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	b := append([]byte(nil), `{"jsonrpc":"2.0","id":null,"error":{"code":-32600,"message":`...)
	_, _ = w.Write(append(strictjson.AppendString(b, reason), "}}\n"...)) // the client is gone or reads it
}

// Refresh shows the tools that are registered now. Clients that asked for it
// hear of a change.
func (e *Endpoint) Refresh() {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := map[string]string{}
	for _, t := range e.o.Tools().List() {
		n := t.Name()
		if _, ok := e.shown[n]; ok && e.shown[n] == t.Digest || e.add(n, t) {
			now[n] = t.Digest
		}
	}
	var gone []string
	for n := range e.shown {
		if _, ok := now[n]; !ok {
			gone = append(gone, n)
		}
	}
	if len(gone) > 0 {
		e.single.RemoveTools(gone...)
		e.lasting.RemoveTools(gone...)
	}
	e.shown = now
}

// add gives both servers a tool. The SDK panics about a definition that it
// cannot serve, and an upstream's may be one: it is left out.
func (e *Endpoint) add(name string, t *tool.Tool) (ok bool) {
	defer func() {
		if v := recover(); v != nil {
			e.o.Logger.Error("a tool cannot be shown over MCP", "kind", t.Kind, "why", v)
			ok = false
		}
	}()
	d := &mcp.Tool{Name: name, Description: t.Description, InputSchema: t.InputSchema, Annotations: annotations(t.Kind),
		Meta: mcp.Meta{MetaPrefix + "kind": t.Kind, MetaPrefix + "definition_digest": t.Digest}}
	kind := t.Kind
	h := func(ctx context.Context, r *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		return e.call(ctx, kind, r)
	}
	e.single.AddTool(d, h)
	e.lasting.AddTool(d, h)
	return true
}

// annotations are hints to the client's user. What a program or an upstream
// does is not known here: they get none, which means the worst.
func annotations(kind string) *mcp.ToolAnnotations {
	no := false
	switch kind {
	case "tool.echo", "tool.fs.read":
		return &mcp.ToolAnnotations{ReadOnlyHint: true, IdempotentHint: true, OpenWorldHint: &no}
	case "tool.http_get":
		return &mcp.ToolAnnotations{ReadOnlyHint: true, IdempotentHint: true}
	case "tool.fs.write":
		return &mcp.ToolAnnotations{IdempotentHint: true, OpenWorldHint: &no}
	}
	return nil
}

// Close cancels running calls and ends all sessions; a second time it does
// nothing more. What is served afterwards is cancelled at once.
func (e *Endpoint) Close() {
	e.cancel()
	for _, s := range []*mcp.Server{e.single, e.lasting} {
		for _, session := range slices.Collect(s.Sessions()) {
			_ = session.Close() // its client is gone or will notice
		}
	}
}

// Stats are for metrics and status.
type Stats struct {
	Sessions int `json:"sessions"` // open, of the older protocol
}

// Stats counts.
func (e *Endpoint) Stats() Stats {
	var st Stats
	for range e.lasting.Sessions() {
		st.Sessions++
	}
	return st
}

// meta reads the value of key, given under MetaPrefix, into v, a pointer.
func meta(m mcp.Meta, key string, v any) error {
	raw, ok := m[MetaPrefix+key]
	if !ok {
		return nil
	}
	data, err := json.Marshal(raw)
	if err == nil {
		err = json.Unmarshal(data, v)
	}
	if err != nil {
		return fmt.Errorf("_meta %s%s: %w", MetaPrefix, key, err)
	}
	return nil
}
