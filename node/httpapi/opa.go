package httpapi

import (
	"encoding/json"
	"strings"

	"github.com/valyala/fasthttp"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/node/call"
)

// dataRequest is the body of POST /v1/data/…, as OPA's clients send it.
type dataRequest struct {
	Input json.RawMessage `json:"input"`
}

// dataResponse is OPA's answer. Result is left out when the rule is not defined,
// which OPA's clients take for a deny or an error.
type dataResponse struct {
	DecisionID string          `json:"decision_id"` // the audit_id
	Result     json.RawMessage `json:"result,omitempty"`
	Warning    *dataMessage    `json:"warning,omitempty"`
}

// dataMessage is OPA's error, and its warning.
type dataMessage struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// verdictDoc is the document that rules are looked up in: the policy's result as
// contract.md has it.
type verdictDoc struct {
	Allow       bool                    `json:"allow"`
	Reasons     []event.Reason          `json:"reasons"`
	Constraints *constraint.Constraints `json:"constraints,omitempty"`
	Redact      []string                `json:"redact,omitempty"`
	PolicyRef   string                  `json:"policy_ref"`
}

// data serves POST /v1/data/autonomy/{rule}: the input is that of POST /v1/tool
// without what only a call has, and the node adds what only it may say. The
// rules are decision, allow, reasons, constraints and redact, and what lies in
// them: decision/allow.
func (s *Server) data(ctx *fasthttp.RequestCtx, caller call.Caller) {
	body, leave, ok := s.take(ctx, caller, fasthttp.StatusUnsupportedMediaType)
	if !ok {
		return
	}
	defer leave()
	var in dataRequest
	req := call.Request{TraceParent: string(ctx.Request.Header.Peek("traceparent"))}
	err := strictjson.Unmarshal(body, &in)
	if err == nil {
		err = call.Decode(in.Input, &req)
	}
	if err != nil {
		s.refuse(ctx, &queryFault{status: fasthttp.StatusBadRequest, code: "invalid_parameter", msg: "input: " + err.Error()})
		return
	}
	req.Caller = caller
	a, fault := s.query(&req)
	if fault != nil {
		s.refuse(ctx, fault)
		return
	}
	out := dataResponse{DecisionID: a.AuditID}
	rule := strings.TrimPrefix(string(ctx.Path()), dataPrefix)
	if out.Result, err = lookUp(a, rule); err != nil {
		s.o.Logger.Error("encode a decision", "audit_id", a.AuditID, "err", err)
		s.refuse(ctx, &queryFault{status: fasthttp.StatusInternalServerError, code: "internal_error", msg: "the node failed inside; its log has the cause"})
		return
	}
	if out.Result == nil {
		out.Warning = &dataMessage{"undefined_rule", "autonomy/" + rule + " is not defined: there are decision, allow, reasons, constraints and redact"}
	}
	s.json(ctx, fasthttp.StatusOK, out)
}

// lookUp is the part of the decision that rule names, nil when there is none.
func lookUp(a *call.Answer, rule string) (json.RawMessage, error) {
	v := a.Verdict
	doc := verdictDoc{Allow: v.Allow, Reasons: v.Reasons, Redact: v.Redact, PolicyRef: a.PolicyRef}
	if doc.Reasons == nil {
		doc.Reasons = []event.Reason{}
	}
	whole, err := json.Marshal(v.Constraints)
	if err != nil {
		return nil, err
	}
	if string(whole) != "{}" {
		doc.Constraints = &v.Constraints
	}
	if whole, err = json.Marshal(doc); err != nil {
		return nil, err
	}
	path := strings.Split(rule, "/")
	if path[0] == "decision" {
		path = path[1:]
	}
	for _, key := range path {
		var fields map[string]json.RawMessage
		if json.Unmarshal(whole, &fields) != nil {
			return nil, nil // no object: nothing lies in it
		}
		part, ok := fields[key]
		if !ok {
			return nil, nil
		}
		whole = part
	}
	return whole, nil
}
