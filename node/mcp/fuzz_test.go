package mcp_test

import (
	"bytes"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/mcp"
	"github.com/autonomyops/autonomy/node/tool"
)

// FuzzServe: whatever is posted, the endpoint answers, in time, and calls
// nothing: there is no place free, and no log that a call could be written to.
func FuzzServe(f *testing.F) {
	tools, err := tool.Parse(nil, tool.Options{})
	if err != nil {
		f.Fatal(err)
	}
	shut := call.New(call.Options{Gate: call.GateOptions{Short: func() bool { return true }}})
	e := mcp.New(mcp.Options{Tools: func() *tool.Registry { return tools }, Pipeline: shut,
		Logger: slog.New(slog.DiscardHandler), MaxSessions: 8, SessionTimeout: time.Second})
	f.Cleanup(e.Close)
	const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`
	for _, s := range []string{initialize, `{"jsonrpc":"2.0","id":1,"method":"server/discover","params":{` + meta + `}}`,
		`{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{` + meta + `}}`,
		`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"tool.echo","arguments":{"a":1},` + meta + `}}`,
		`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}`, `[]`, `{"jsonrpc":"2.0","id":1,"result":{}}`} {
		f.Add([]byte(s), "2026-07-28", "tools/call", "tool.echo")
		f.Add([]byte(s), "", "", "")
	}
	f.Fuzz(func(t *testing.T, body []byte, version, method, name string) {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/mcp", bytes.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("Accept", "application/json, text/event-stream")
		r.Header.Set("Mcp-Protocol-Version", version)
		r.Header.Set("Mcp-Method", method)
		r.Header.Set("Mcp-Name", name)
		if bytes.Contains(body, []byte("subscriptions/listen")) {
			return // it answers for as long as its client listens
		}
		w := httptest.NewRecorder()
		e.Serve(w, r, call.Caller{Type: "anonymous", ID: "loopback"})
		if w.Code < 200 || w.Code > 503 {
			t.Errorf("status %d", w.Code)
		}
	})
}
