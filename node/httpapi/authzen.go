package httpapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/valyala/fasthttp"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/node/call"
)

// AuthZEN Authorization API 1.0: evaluation, evaluations, metadata. The search
// APIs are not served: a policy answers for a given resource and cannot list
// those that it would allow.
//
// A policy sees an evaluation as input.kind "access.evaluation" with the four
// entities in input.params, as they were sent. They are claims of the caller:
// who asks stands in input.caller.
const evaluationKind = "access.evaluation"

// Limits of a batch.
const (
	maxEvaluations = 64
	parallel       = 4 // evaluations of one batch at one time: they share the flush of the log
)

// How a batch goes on, by options.evaluations_semantic.
const (
	executeAll  = "execute_all"
	denyFirst   = "deny_on_first_deny"
	permitFirst = "permit_on_first_permit"
)

// entity is subject, action, resource or context as it came in: the text, and
// its members for an object.
type entity map[string]json.RawMessage

// tuple is one evaluation.
type tuple struct {
	subject, action, resource, context json.RawMessage // nil: absent
}

// decision is the answer to one evaluation.
type decision struct {
	Decision bool             `json:"decision"`
	Context  *decisionContext `json:"context,omitempty"`
}

// decisionContext is free form in AuthZEN; reason_admin and error follow its
// examples.
type decisionContext struct {
	AuditID     string            `json:"audit_id,omitempty"`
	PolicyRef   string            `json:"policy_ref,omitempty"`
	ReasonAdmin map[string]string `json:"reason_admin,omitempty"` // language → text
	Reasons     []event.Reason    `json:"reasons,omitempty"`
	Error       *decisionError    `json:"error,omitempty"`
}

type decisionError struct {
	Status  int    `json:"status"`
	Message string `json:"message"`
}

// evaluation serves POST /access/v1/evaluation.
func (s *Server) evaluation(ctx *fasthttp.RequestCtx, caller call.Caller) {
	s.authzen(ctx, caller, func(body []byte) (any, *queryFault) {
		top, err := members(body, "subject", "action", "resource", "context")
		if err != nil {
			return nil, badEvaluation(err)
		}
		return s.evaluate(caller, traceOf(ctx), tupleOf(top))
	})
}

func traceOf(ctx *fasthttp.RequestCtx) string { return string(ctx.Request.Header.Peek("traceparent")) }

// evaluations serves POST /access/v1/evaluations.
func (s *Server) evaluations(ctx *fasthttp.RequestCtx, caller call.Caller) {
	s.authzen(ctx, caller, func(body []byte) (any, *queryFault) {
		top, err := members(body, "subject", "action", "resource", "context", "evaluations", "options")
		if err != nil {
			return nil, badEvaluation(err)
		}
		semantic, err := semanticOf(top["options"])
		if err != nil {
			return nil, badEvaluation(err)
		}
		var items []json.RawMessage
		if raw := top["evaluations"]; raw != nil {
			if err := json.Unmarshal(raw, &items); err != nil {
				return nil, badEvaluation(fmt.Errorf("evaluations: want an array"))
			}
		}
		if len(items) == 0 { // the specification: it is then a single evaluation
			return s.evaluate(caller, traceOf(ctx), tupleOf(top))
		}
		if len(items) > maxEvaluations {
			return nil, badEvaluation(fmt.Errorf("evaluations: %d, at most %d in one request", len(items), maxEvaluations))
		}
		tuples, errs, err := s.batch(top, items)
		if err != nil {
			return nil, badEvaluation(err)
		}
		return struct {
			Evaluations []decision `json:"evaluations"`
		}{s.decideAll(caller, traceOf(ctx), tuples, errs, semantic)}, nil
	})
}

// authzen is what both have in common: the request id comes back, the body is
// strict JSON, and an error is a message with a status.
func (s *Server) authzen(ctx *fasthttp.RequestCtx, caller call.Caller, handle func(body []byte) (any, *queryFault)) {
	const requestID, maxRequestID = "X-Request-ID", 256
	if id := ctx.Request.Header.Peek(requestID); len(id) > 0 && len(id) <= maxRequestID {
		ctx.Response.Header.SetBytesV(requestID, id)
	}
	body, leave, ok := s.take(ctx, caller, fasthttp.StatusBadRequest) // AuthZEN has no 415
	if !ok {
		return
	}
	defer leave()
	if err := strictjson.CheckObject(body); err != nil {
		s.refuse(ctx, badEvaluation(err))
		return
	}
	out, fault := handle(body)
	if fault != nil {
		s.refuse(ctx, fault)
		return
	}
	s.json(ctx, fasthttp.StatusOK, out)
}

func badEvaluation(err error) *queryFault {
	return &queryFault{status: fasthttp.StatusBadRequest, code: "malformed", msg: err.Error()}
}

// members are those of a JSON object that passed strictjson. Others than the
// known ones are left alone, as AuthZEN demands, unless they differ from one in
// case only: then two readers would see two requests.
func members(raw json.RawMessage, known ...string) (entity, error) {
	var e entity
	if err := json.Unmarshal(raw, &e); err != nil || e == nil {
		return nil, fmt.Errorf("want an object")
	}
	for _, key := range slices.Sorted(maps.Keys(e)) {
		if i := slices.IndexFunc(known, func(k string) bool { return strings.EqualFold(k, key) }); i >= 0 && known[i] != key {
			return nil, fmt.Errorf("key %q: keys are case-sensitive, write %q", key, known[i])
		}
	}
	return e, nil
}

func tupleOf(e entity) tuple { return tuple{e["subject"], e["action"], e["resource"], e["context"]} }

func semanticOf(options json.RawMessage) (string, error) {
	if options == nil {
		return executeAll, nil
	}
	o, err := members(options, "evaluations_semantic")
	if err != nil {
		return "", fmt.Errorf("options: %w", err)
	}
	raw, ok := o["evaluations_semantic"]
	if !ok {
		return executeAll, nil
	}
	var semantic string
	if json.Unmarshal(raw, &semantic) != nil || !slices.Contains([]string{executeAll, denyFirst, permitFirst}, semantic) {
		return "", fmt.Errorf("options.evaluations_semantic is %.40s: want %s, %s or %s", raw, executeAll, denyFirst, permitFirst)
	}
	return semantic, nil
}

// batch makes the tuples of a batch: what an item leaves out comes from the top.
// An item that cannot be one has its error instead. All together may be no more
// than a few times the largest body: defaults are copied into each.
func (s *Server) batch(top entity, items []json.RawMessage) ([]tuple, []error, error) {
	tuples, errs := make([]tuple, len(items)), make([]error, len(items))
	size := 0
	for i, raw := range items {
		item, err := members(raw, "subject", "action", "resource", "context")
		if err != nil {
			errs[i] = err
			continue
		}
		t := tupleOf(item)
		for _, f := range []struct {
			dst      *json.RawMessage
			name     string
			required []string
		}{{&t.subject, "subject", []string{"type", "id"}}, {&t.action, "action", []string{"name"}}, {&t.resource, "resource", []string{"type", "id"}}, {&t.context, "context", nil}} {
			if *f.dst, err = withDefault(*f.dst, top[f.name], f.required); err != nil {
				errs[i] = fmt.Errorf("%s: %w", f.name, err)
				break
			}
		}
		tuples[i] = t
		size += len(t.subject) + len(t.action) + len(t.resource) + len(t.context)
	}
	if most := 4 * s.o.MaxBodyBytes; size > most {
		return nil, nil, fmt.Errorf("evaluations: %d bytes with their defaults, at most %d", size, most)
	}
	return tuples, errs, nil
}

// withDefault is own, or the default when there is none. An entity takes the
// place of its default as a whole; only a required member that it lacks is
// taken from there.
func withDefault(own, def json.RawMessage, required []string) (json.RawMessage, error) {
	if own == nil || def == nil {
		if own == nil {
			own = def
		}
		return own, nil
	}
	e, err := members(own)
	if err != nil {
		return nil, err
	}
	d, err := members(def)
	if err != nil {
		return nil, err
	}
	merged := bytes.TrimSpace(own)
	for _, key := range required {
		if _, has := e[key]; has || d[key] == nil {
			continue
		}
		// The member goes in front; the rest stays byte for byte.
		rest := bytes.TrimLeft(merged[1:], " \t\r\n")
		sep := ","
		if rest[0] == '}' {
			sep = ""
		}
		merged = slices.Concat([]byte(`{"`+key+`":`), d[key], []byte(sep), rest)
	}
	return merged, nil
}

// decideAll decides a batch in order. What stops early leaves the rest out.
func (s *Server) decideAll(caller call.Caller, trace string, tuples []tuple, errs []error, semantic string) []decision {
	one := func(i int) decision {
		fault := &queryFault{}
		if errs[i] != nil {
			fault = badEvaluation(errs[i])
		} else {
			var d any
			if d, fault = s.evaluate(caller, trace, tuples[i]); fault == nil {
				return d.(decision)
			}
		}
		return decision{Context: &decisionContext{Error: &decisionError{fault.status, fault.msg}}}
	}
	out := make([]decision, len(tuples))
	if semantic != executeAll {
		for i := range tuples {
			out[i] = one(i)
			if out[i].Decision == (semantic == permitFirst) {
				return out[:i+1]
			}
		}
		return out
	}
	var wg sync.WaitGroup
	places := make(chan struct{}, parallel)
	for i := range tuples {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			out[i] = one(i)
		})
	}
	wg.Wait()
	return out
}

// evaluate decides one tuple; the first result is a decision.
func (s *Server) evaluate(caller call.Caller, trace string, t tuple) (any, *queryFault) {
	params, err := t.params()
	if err != nil {
		return nil, badEvaluation(err)
	}
	req := call.Request{Kind: evaluationKind, Params: params, Caller: caller, TraceParent: trace}
	a, fault := s.query(&req)
	if fault != nil {
		return nil, fault
	}
	c := &decisionContext{AuditID: a.AuditID, PolicyRef: a.PolicyRef, Reasons: a.Verdict.Reasons}
	if len(c.Reasons) > 0 {
		c.ReasonAdmin = map[string]string{"en": c.Reasons[0].Message}
	}
	return decision{Decision: a.Verdict.Allow, Context: c}, nil
}

// params checks the tuple and writes it as the params of a query, each entity
// byte for byte as it came.
func (t tuple) params() ([]byte, error) {
	for _, f := range []struct {
		name     string
		raw      json.RawMessage
		required []string
	}{{"subject", t.subject, []string{"type", "id"}}, {"action", t.action, []string{"name"}}, {"resource", t.resource, []string{"type", "id"}}} {
		if f.raw == nil {
			return nil, fmt.Errorf("%s is missing", f.name)
		}
		e, err := members(f.raw, append(f.required, "properties")...)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.name, err)
		}
		for _, key := range f.required {
			raw, ok := e[key]
			if !ok {
				return nil, fmt.Errorf("%s.%s is missing", f.name, key)
			}
			if len(raw) <= len(`""`) || raw[0] != '"' {
				return nil, fmt.Errorf("%s.%s: want a string that is not empty", f.name, key)
			}
		}
		if raw, ok := e["properties"]; ok && raw[0] != '{' {
			return nil, fmt.Errorf("%s.properties: want an object", f.name)
		}
	}
	if t.context != nil && t.context[0] != '{' {
		return nil, fmt.Errorf("context: want an object")
	}
	b := make([]byte, 0, len(t.subject)+len(t.action)+len(t.resource)+len(t.context)+64)
	b = append(append(b, `{"subject":`...), t.subject...)
	b = append(append(b, `,"action":`...), t.action...)
	b = append(append(b, `,"resource":`...), t.resource...)
	if t.context != nil {
		b = append(append(b, `,"context":`...), t.context...)
	}
	return append(b, '}'), nil
}

// authzenConfiguration serves the metadata. The base is what the client called
// this listener, which foreign has checked.
func (s *Server) authzenConfiguration(ctx *fasthttp.RequestCtx, _ call.Caller) {
	base := "http://" + string(ctx.Request.Header.Host())
	if ctx.IsTLS() {
		base = "https://" + string(ctx.Request.Header.Host())
	}
	s.json(ctx, fasthttp.StatusOK, struct {
		PDP         string `json:"policy_decision_point"`
		Evaluation  string `json:"access_evaluation_endpoint"`
		Evaluations string `json:"access_evaluations_endpoint"`
	}{base, base + evaluationPath, base + evaluationsPath})
}
