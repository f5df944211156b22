package mcp

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/node/call"
)

// TestResult: each way that a call can end tells the model what it needs, and
// programs the same as POST /v1/tool does.
func TestResult(t *testing.T) {
	for name, tc := range map[string]struct {
		kind    string
		a       call.Answer
		isError bool
		text    []string
		answer  bool // structuredContent is the answer's body
	}{
		"ok": {"tool.echo", call.Answer{Decision: "allow", Outcome: "ok", Output: json.RawMessage(`{"a":1}`), AuditID: "x-1"},
			false, []string{`{"a":1}`}, false},
		"ok without output": {"tool.echo", call.Answer{Decision: "allow", Outcome: "ok", AuditID: "x-1"}, false, []string{"done, without output", "audit_id: x-1"}, true},
		"dry run":           {"tool.echo", call.Answer{Decision: "allow", DryRun: true, AuditID: "x-1"}, false, []string{"nothing was executed"}, true},
		"failed": {"tool.exec.a", call.Answer{Decision: "allow", Outcome: "error", ErrCode: "exit_nonzero", ErrMsg: "code 1", Output: json.RawMessage(`{"stdout":"x"}`), AuditID: "x-1"},
			true, []string{"the tool ended with error: code 1", `{"stdout":"x"}`, "code: exit_nonzero", "check before you repeat"}, true},
		"pending": {"tool.echo", call.Answer{Status: 202, Decision: "pending", AuditID: "x-1"},
			true, []string{"pending: a human must approve", "audit_id: x-1", "next: wait"}, true},
		"policy": {"tool.echo", call.Answer{Decision: "deny", Layer: call.LayerPolicy, Reason: "no", Reasons: []event.Reason{{Code: "c", Message: "no"}, {Message: "also no"}}, AuditID: "x-1"},
			true, []string{"denied by policy: no; also no", "code: c", "autonomy policy explain x-1"}, true},
		"no policy": {"tool.echo", call.Answer{Decision: "deny", Layer: call.LayerPolicy, Code: "no_policy", Reason: "none is active"}, true, []string{"an operator must give this node a policy"}, true},
		"runtime": {"tool.http_get", call.Answer{Decision: "deny", Layer: call.LayerRuntime, Reason: "r", Reasons: []event.Reason{{Code: "egress_denied", Message: "r"}}, AuditID: "x-1"},
			true, []string{"denied by runtime: r", "code: egress_denied", "policy allowed it"}, true},
		"log full": {"tool.echo", call.Answer{Decision: "deny", Layer: call.LayerAudit, Code: "log_full", Reason: "full"}, true, []string{"tell its operator"}, true},
		"overload": {"tool.echo", call.Answer{Status: 429, Decision: "deny", Layer: call.LayerRequest, Code: "overloaded", Reason: "busy"}, true, []string{"try again in a moment"}, true},
		"budget":   {"tool.echo", call.Answer{Status: 429, Decision: "deny", Layer: call.LayerRequest, Code: "limit_budget", Reason: "used up", RetryAfter: 1500 * time.Millisecond}, true, []string{"code: limit_budget", "try again in 2 s"}, true},
		"call_id":  {"tool.echo", call.Answer{Status: 409, Decision: "deny", Layer: call.LayerRequest, Code: "call_id_reused", Reason: "used"}, true, []string{"a call_id of its own"}, true},
		"inside":   {"tool.echo", call.Answer{Status: 503, Decision: "deny", Layer: call.LayerRuntime, Code: "internal", Reason: "failed"}, true, []string{"tell its operator"}, true},
		"stopping": {"tool.echo", call.Answer{Status: 503, Decision: "deny", Layer: call.LayerRuntime, Code: "shutting_down", Reason: "stops"}, true, []string{"when the node is back"}, true},
		"upstream": {"tool.mcp.s.t", call.Answer{Decision: "allow", Outcome: "ok", Output: json.RawMessage(`{"content":[{"type":"text","text":"theirs"}],"structured_content":[1]}`), AuditID: "x-1"},
			false, []string{"theirs"}, false},
		"upstream that is no MCP": {"tool.mcp.s.t", call.Answer{Decision: "allow", Outcome: "ok", Output: json.RawMessage(`{"x":1}`), AuditID: "x-1"}, false, []string{`{"x":1}`}, false},
		"upstream denied":         {"tool.mcp.s.t", call.Answer{Decision: "deny", Layer: call.LayerRuntime, Reason: "changed", Reasons: []event.Reason{{Code: "definition_changed"}}, AuditID: "x-1"}, true, []string{"definition_changed"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			res := result(tc.kind, &tc.a)
			if res.IsError != tc.isError {
				t.Errorf("isError is %v", res.IsError)
			}
			text := ""
			for _, c := range res.Content {
				text += c.(*mcp.TextContent).Text
			}
			for _, w := range tc.text {
				if !strings.Contains(text, w) {
					t.Errorf("no %q in %q", w, text)
				}
			}
			body, _ := res.StructuredContent.(json.RawMessage)
			if got := string(body) == string(tc.a.AppendJSON(nil)); got != tc.answer {
				t.Errorf("structuredContent is %s", body)
			}
			if tc.a.AuditID != "" && res.Meta[MetaPrefix+"audit_id"] != tc.a.AuditID {
				t.Errorf("_meta is %v", res.Meta)
			}
			if _, err := json.Marshal(res); err != nil {
				t.Error(err)
			}
		})
	}
}
