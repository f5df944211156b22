package httpapi

import (
	"strings"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/autonomyops/autonomy/node/call"
)

// The paths on which others ask for a decision and enforce it themselves: the
// shape of OPA's Data API (opa.go) and AuthZEN (authzen.go). They decide and
// record like a call, and execute nothing.
const (
	dataPrefix      = "/v1/data/autonomy/"
	evaluationPath  = "/access/v1/evaluation"
	evaluationsPath = "/access/v1/evaluations"
	authzenMetadata = "/.well-known/authzen-configuration"
)

// queries are the method and handler of these paths; nil: it is none of them.
func (s *Server) queries(path string) (string, func(*fasthttp.RequestCtx, call.Caller)) {
	switch path {
	case evaluationPath:
		return fasthttp.MethodPost, s.evaluation
	case evaluationsPath:
		return fasthttp.MethodPost, s.evaluations
	case authzenMetadata:
		return fasthttp.MethodGet, s.authzenConfiguration
	}
	if rule, ok := strings.CutPrefix(path, dataPrefix); ok && rule != "" {
		return fasthttp.MethodPost, s.data
	}
	return "", nil
}

// queryFault is why a query was not decided, in HTTP's terms.
type queryFault struct {
	status int
	code   string
	msg    string
	retry  time.Duration // when it is worth asking again; 0: in a second
}

// refuse answers a query that has no decision, in the words of its API: never in
// those of /v1/tool, whose "decision" is a text that a careless client of
// AuthZEN would take for true. It reports whether path is a query's.
func (s *Server) refuse(ctx *fasthttp.RequestCtx, f *queryFault) bool {
	var body any
	switch path := string(ctx.Path()); {
	case path == evaluationPath, path == evaluationsPath:
		body = f.msg
	case strings.HasPrefix(path, dataPrefix):
		body = dataMessage{f.code, f.msg}
	default:
		return false
	}
	if f.status == fasthttp.StatusServiceUnavailable || f.status == fasthttp.StatusTooManyRequests {
		ctx.Response.Header.Set(fasthttp.HeaderRetryAfter, retryAfter(f.retry))
	}
	s.json(ctx, f.status, body)
	return true
}

// take reads the body of a query and takes a place for it among the running
// calls; leave gives both back. When ok is false it has answered. The body is
// good until leave.
func (s *Server) take(ctx *fasthttp.RequestCtx, caller call.Caller, contentType int) (data []byte, leave func(), ok bool) {
	h := &ctx.Request.Header
	if !isJSON(h.ContentType()) {
		s.deny(ctx, contentType, "unsupported_media_type", "send Content-Type: application/json")
		return nil, nil, false
	}
	if len(h.ContentEncoding()) > 0 {
		s.deny(ctx, fasthttp.StatusUnsupportedMediaType, "unsupported_encoding", "send the body without Content-Encoding")
		return nil, nil, false
	}
	b, ok := s.read(ctx)
	if !ok {
		return nil, nil, false
	}
	if !s.enter(ctx, caller) {
		s.bodies.put(b)
		return nil, nil, false
	}
	return b.b, func() { s.gate.Leave(); s.bodies.put(b) }, true
}

// query decides and records. A fault means that there is no decision: whoever
// asked must not go on.
func (s *Server) query(req *call.Request) (*call.Answer, *queryFault) {
	a := s.o.Pipeline.Do(s.ctx, req, call.Query)
	if a.Verdict == nil {
		return nil, &queryFault{a.Status, a.Code, a.Reason, a.RetryAfter}
	}
	return &a, nil
}
