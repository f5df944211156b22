package mcptool

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/autonomyops/autonomy/node/tool/executor"
)

func TestOutputLimits(t *testing.T) {
	text := func(n int) mcp.Content { return &mcp.TextContent{Text: strings.Repeat("x", n)} }
	image := func(n int) mcp.Content { return &mcp.ImageContent{Data: make([]byte, n), MIMEType: "image/png"} }
	for name, tc := range map[string]struct {
		content    []mcp.Content
		structured any
		limit      int64
		outcome    executor.Outcome
		blocks     int
		truncated  bool
		kept       bool // structured content
	}{
		"fits":                {[]mcp.Content{text(5), image(5)}, map[string]any{"a": 1}, 10, executor.OK, 2, false, true},
		"text is cut":         {[]mcp.Content{text(8), text(8)}, nil, 10, executor.OK, 2, true, false},
		"data is left out":    {[]mcp.Content{image(11), text(1)}, nil, 10, executor.OK, 1, true, false},
		"nothing after":       {[]mcp.Content{text(10), text(1)}, nil, 10, executor.OK, 1, true, false},
		"structured too long": {[]mcp.Content{text(1)}, strings.Repeat("x", 20), 10, executor.OK, 1, true, false},
		"both at the most":    {[]mcp.Content{text(executor.MaxContent)}, strings.Repeat("x", 700<<10), executor.MaxContent, executor.OK, 1, true, false},
		"escapes blow it up":  {[]mcp.Content{&mcp.TextContent{Text: strings.Repeat("\x01", executor.MaxContent)}}, nil, executor.MaxContent, executor.Error, 0, false, false},
		"nothing at all":      {nil, nil, 10, executor.OK, 0, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := output(&mcp.CallToolResult{Content: tc.content, StructuredContent: tc.structured}, tc.limit)
			if r.Outcome != tc.outcome {
				t.Fatalf("%s %s %s", r.Outcome, r.Code, r.Message)
			}
			if r.Outcome != executor.OK {
				return
			}
			var out struct {
				Content    []json.RawMessage `json:"content"`
				Structured any               `json:"structured_content"`
				Truncated  bool              `json:"truncated"`
			}
			if err := json.Unmarshal(r.Output, &out); err != nil {
				t.Fatal(err)
			}
			if len(out.Content) != tc.blocks || out.Truncated != tc.truncated || (out.Structured != nil) != tc.kept {
				t.Errorf("%d blocks, truncated %v, structured %v", len(out.Content), out.Truncated, out.Structured != nil)
			}
		})
	}
}

// FuzzOutput: whatever an upstream answers, what leaves here is a JSON object in
// valid UTF-8 within MaxOutput, that the endpoint can read back, or an error.
func FuzzOutput(f *testing.F) {
	for _, s := range []string{
		`{"content":[{"type":"text","text":"a"}],"structuredContent":{"a":1},"isError":true}`,
		`{"content":[{"type":"image","mimeType":"image/png","data":"AA=="},{"type":"audio","mimeType":"audio/wav","data":""}]}`,
		`{"content":[{"type":"resource_link","uri":"a:b","name":"n"},{"type":"resource","resource":{"uri":"a:b","blob":"AA=="}}]}`,
		`{"content":[{"type":"image","mimeType":"text/html"}]}`, `{"content":[{"type":"text","text":"\ud800\u0000"}]}`, `{}`,
	} {
		f.Add([]byte(s), int64(4))
	}
	f.Fuzz(func(t *testing.T, data []byte, limit int64) {
		var res mcp.CallToolResult
		if json.Unmarshal(data, &res) != nil || limit < 1 || limit > executor.MaxContent {
			return
		}
		r := output(&res, limit)
		if !utf8.ValidString(r.Message) {
			t.Fatalf("message %q", r.Message)
		}
		if r.Output == nil {
			if r.Outcome == executor.OK {
				t.Fatal("no output and no error")
			}
			return
		}
		if !utf8.Valid(r.Output) || !json.Valid(r.Output) || r.Output[0] != '{' || len(r.Output) > executor.MaxOutput {
			t.Fatalf("%d bytes: %.200q", len(r.Output), r.Output)
		}
		var back mcp.CallToolResult
		var out map[string]json.RawMessage
		if err := json.Unmarshal(r.Output, &out); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(`{"content":`+string(out["content"])+`}`), &back); err != nil {
			t.Fatalf("%s: %v", out["content"], err)
		}
	})
}
