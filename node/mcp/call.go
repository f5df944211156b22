package mcp

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/tool"
)

// call takes one tools/call through the gate and the pipeline, like POST
// /v1/tool does. ctx ends when the client cancels: by notifications/cancelled,
// or by closing the connection since 2026-07-28.
func (e *Endpoint) call(ctx context.Context, kind string, r *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
	if r.Extra == nil || r.Extra.TokenInfo == nil {
		return nil, &jsonrpc.Error{Code: jsonrpc.CodeInternalError, Message: "the caller is not known"}
	}
	caller, ok := r.Extra.TokenInfo.Extra["caller"].(call.Caller)
	if !ok {
		return nil, &jsonrpc.Error{Code: jsonrpc.CodeInternalError, Message: "the caller is not known"}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(e.ctx, cancel)() // the node stops
	gate := e.o.Pipeline.Gate()
	if err := gate.Enter(ctx, caller); err != nil {
		a := e.notAdmitted(err)
		return result(kind, &a), nil
	}
	defer gate.Leave()
	req := call.NewRequest()
	defer req.Free() // result has copied what it keeps
	if err := fill(req, kind, r); err != nil {
		return nil, &jsonrpc.Error{Code: jsonrpc.CodeInvalidParams, Message: err.Error()}
	}
	req.Caller = caller
	if token := r.Params.GetProgressToken(); token != nil {
		req.Progress = func(p tool.Progress) {
			_ = r.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ // best effort: the result says how it ended
				ProgressToken: token, Progress: p.Done, Total: p.Total, Message: p.Message})
		}
	}
	a := e.o.Pipeline.Do(ctx, req, call.Execute)
	return result(kind, &a), nil
}

// notAdmitted is the answer to a call that got no place.
func (e *Endpoint) notAdmitted(err error) call.Answer {
	a := call.Answer{Status: http.StatusTooManyRequests, Decision: "deny", Layer: call.LayerRequest, Code: "overloaded", Reason: err.Error() + ": this node is at its limit"}
	if e.ctx.Err() != nil {
		a.Status, a.Layer, a.Code, a.Reason = http.StatusServiceUnavailable, call.LayerRuntime, "shutting_down", "the node is stopping: denied"
	}
	return a
}

// fill reads the protocol's params into req.
func fill(req *call.Request, kind string, r *mcp.CallToolRequest) error {
	req.Kind, req.Params = kind, r.Params.Arguments
	m := r.Params.Meta
	for key, v := range map[string]any{"call_id": &req.CallID, "session": &req.Session, "timeout_ms": &req.TimeoutMS, "dry_run": &req.DryRun} {
		if err := meta(m, key, v); err != nil {
			return err
		}
	}
	if s, ok := m["traceparent"].(string); ok {
		req.TraceParent = s
	} else if r.Extra.Header != nil {
		req.TraceParent = r.Extra.Header.Get("traceparent")
	}
	return req.Check()
}

// result writes an answer in the protocol's form. It keeps no view of the
// request's room: texts are copied, and an output belongs to who reads it.
func result(kind string, a *call.Answer) *mcp.CallToolResult {
	res := &mcp.CallToolResult{Meta: mcp.Meta{MetaPrefix + "decision": a.Decision}}
	for key, v := range map[string]string{"audit_id": a.AuditID, "policy_ref": a.PolicyRef, "outcome": a.Outcome} {
		if v != "" {
			res.Meta[MetaPrefix+key] = v
		}
	}
	if a.Replayed {
		res.Meta[MetaPrefix+"idempotent_replay"] = true
	}
	if a.RetryAfter > 0 { // as the header of POST /v1/tool
		res.Meta[MetaPrefix+"retry_after"] = seconds(a.RetryAfter)
	}
	ran := a.Decision == "allow"
	res.IsError = !ran || a.Outcome != "" && a.Outcome != string(tool.OutcomeOK)
	if ran && len(a.Output) > 0 && strings.HasPrefix(kind, tool.MCPPrefix) && upstream(res, a) {
		return res
	}
	if !res.IsError && len(a.Output) > 0 {
		res.Content = []mcp.Content{&mcp.TextContent{Text: string(a.Output)}}
		res.StructuredContent = a.Output
		return res
	}
	res.Content = []mcp.Content{&mcp.TextContent{Text: explain(a)}}
	res.StructuredContent = json.RawMessage(a.AppendJSON(nil))
	return res
}

// upstream passes on what an MCP server gave: mcptool's output holds it in the
// protocol's own form.
func upstream(res *mcp.CallToolResult, a *call.Answer) bool {
	var out struct {
		Content    json.RawMessage `json:"content"`
		Structured json.RawMessage `json:"structured_content"`
	}
	if json.Unmarshal(a.Output, &out) != nil || len(out.Content) == 0 {
		return false
	}
	var theirs mcp.CallToolResult
	data, err := json.Marshal(map[string]json.RawMessage{"content": out.Content})
	if err != nil || json.Unmarshal(data, &theirs) != nil {
		return false
	}
	res.Content = theirs.Content
	if len(out.Structured) > 0 {
		res.StructuredContent = out.Structured
	}
	return true
}

// explain is what the model reads of a call that did not give what it asked for.
func explain(a *call.Answer) string {
	var b strings.Builder
	switch {
	case a.Decision == "pending":
		b.WriteString("pending: a human must approve this call before it runs")
	case a.Decision != "allow":
		fmt.Fprintf(&b, "denied by %s: %s", a.Layer, a.Reason)
		for _, r := range a.Reasons {
			if r.Message != a.Reason {
				b.WriteString("; " + r.Message)
			}
		}
	case a.DryRun:
		b.WriteString("allowed: this was a dry run, nothing was executed")
	case a.ErrCode != "" || a.ErrMsg != "":
		fmt.Fprintf(&b, "the tool ended with %s: %s", a.Outcome, a.ErrMsg)
		if len(a.Output) > 0 {
			b.WriteString("\n")
			b.Write(a.Output)
		}
	default:
		b.WriteString("done, without output")
	}
	if c := code(a); c != "" {
		fmt.Fprintf(&b, "\ncode: %s", c)
	}
	if a.AuditID != "" {
		fmt.Fprintf(&b, "\naudit_id: %s", a.AuditID)
	}
	if n := next(a); n != "" {
		fmt.Fprintf(&b, "\nnext: %s", n)
	}
	return b.String()
}

func code(a *call.Answer) string {
	switch {
	case a.Code != "":
		return a.Code
	case a.ErrCode != "":
		return a.ErrCode
	case len(a.Reasons) > 0:
		return a.Reasons[0].Code
	}
	return ""
}

// next says what a model, or its user, can do about it.
func next(a *call.Answer) string {
	switch {
	case a.Decision == "pending":
		return "wait, and repeat the call with the same call_id once it is approved; an operator sees it in 'autonomy approvals list'"
	case a.Decision == "allow" && a.Outcome != "" && a.Outcome != string(tool.OutcomeOK):
		return "the tool may have had an effect: check before you repeat the call"
	case a.Decision == "allow":
		return ""
	case a.Status == http.StatusTooManyRequests && a.RetryAfter > 0:
		return fmt.Sprintf("try again in %d s, not before", seconds(a.RetryAfter))
	case a.Status == http.StatusTooManyRequests:
		return "try again in a moment"
	case a.Status == http.StatusConflict:
		return "give this call a call_id of its own"
	case a.Code == "first_call_running":
		return "ask again later, with the same call_id"
	case a.Code == "shutting_down":
		return "try again when the node is back"
	case a.Layer == call.LayerRequest:
		return "correct the arguments to fit the tool's input schema"
	case a.Layer == call.LayerPolicy && a.AuditID == "":
		return "an operator must give this node a policy; until then every call is denied"
	case a.Layer == call.LayerPolicy:
		return "do not repeat the call unchanged: change what the reason names, or ask the operator, who finds why with 'autonomy policy explain " + a.AuditID + "'"
	case a.Layer == call.LayerRuntime && a.AuditID != "":
		return "do not repeat the call unchanged: policy allowed it, and enforcement refused what it would have done"
	}
	return "this node refuses all calls for now: tell its operator"
}

// seconds is d in whole seconds, rounded up.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }
