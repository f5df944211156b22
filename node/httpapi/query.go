package httpapi

import (
	"fmt"
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

// fault answers with f in the shape v of its API.
func (s *Server) fault(ctx *fasthttp.RequestCtx, f *queryFault, v any) {
	if f.status == fasthttp.StatusServiceUnavailable || f.status == fasthttp.StatusTooManyRequests {
		ctx.Response.Header.Set(fasthttp.HeaderRetryAfter, retryAfter(f.retry))
	}
	s.json(ctx, f.status, v)
}

// take reads the body of a query and takes a place for it among the running
// calls; leave gives the place back. Exactly one of fault and leave is not nil.
// The body is good until the handler returns.
func (s *Server) take(ctx *fasthttp.RequestCtx, contentType int) (body []byte, leave func(), fault *queryFault) {
	h := &ctx.Request.Header
	if !isJSON(h.ContentType()) {
		return nil, nil, &queryFault{status: contentType, code: "unsupported_media_type", msg: "send Content-Type: application/json"}
	}
	if len(h.ContentEncoding()) > 0 {
		return nil, nil, &queryFault{status: fasthttp.StatusUnsupportedMediaType, code: "unsupported_encoding", msg: "send the body without Content-Encoding"}
	}
	select {
	case s.slots <- struct{}{}:
		return ctx.Request.Body(), func() { <-s.slots }, nil
	default:
		return nil, nil, &queryFault{status: fasthttp.StatusTooManyRequests, code: "overloaded", msg: fmt.Sprintf("%d calls are running, which is this node's limit: try again", s.o.MaxInFlight)}
	}
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
