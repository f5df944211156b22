package mcp_test

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/node/mcp"
)

// BenchmarkCall is one denied call (nothing runs) over one kept connection,
// through the doors that there are: what the protocol adds is the difference.
func BenchmarkCall(b *testing.B) {
	d := open(b, nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() { // nobody takes the records: let the log go round
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				_ = d.log.AdvanceAll(d.log.Durable()) // a full log fails the calls
			}
		}
	}()
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	post := func(url, body string, header map[string]string) (http.Header, string) {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodPost, url, strings.NewReader(body))
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Accept", "application/json, text/event-stream")
		for k, v := range header {
			req.Header.Set(k, v)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			b.Fatal(err)
		}
		defer resp.Body.Close()
		out, err := io.ReadAll(resp.Body)
		if err != nil {
			b.Fatal(err)
		}
		return resp.Header, string(out)
	}
	h, _ := post(d.url, initialize, nil)
	session := map[string]string{"Mcp-Session-Id": h.Get("Mcp-Session-Id"), "Mcp-Protocol-Version": "2025-11-25"}
	post(d.url, `{"jsonrpc":"2.0","method":"notifications/initialized"}`, session)
	single := map[string]string{"Mcp-Protocol-Version": mcp.Versions[0], "Mcp-Method": "tools/call", "Mcp-Name": "tool.exec.date"}
	const meta = `"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"t","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}`
	for _, door := range []struct {
		name, url, body string
		header          map[string]string
	}{
		{"tool", strings.TrimSuffix(d.url, "/mcp") + "/v1/tool", `{"kind":"tool.exec.date","params":{}}`, nil},
		{"mcp", d.url, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"tool.exec.date","arguments":{},"_meta":{` + meta + `}}}`, single},
		{"mcp-events", d.url, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"tool.exec.date","arguments":{},"_meta":{"progressToken":1,` + meta + `}}}`, single},
		{"mcp-session", d.url, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"tool.exec.date","arguments":{}}}`, session},
	} {
		b.Run(door.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, out := post(door.url, door.body, door.header); !bytes.Contains([]byte(out), []byte("dates are secret")) {
					b.Fatal(out)
				}
			}
		})
	}
}
