// Package mcpserver holds upstream MCP servers for tests: a good one, with the
// tools that the protocol's conformance suite asks for, and hostile ones. A test
// binary becomes one when its environment says so:
//
//	func TestMain(m *testing.M) { mcpserver.Main(); … }
//
//	mcp: {x: {argv: [<os.Executable()>], env: ["AUTONOMY_TEST_MCP=good"], …}}
//
// Only tests import it.
package mcpserver

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// Env names the environment variable that holds the mode.
const Env = "AUTONOMY_TEST_MCP"

// Dir names the environment variable with a directory for what a server has to
// remember from one process to the next, or tells its test.
const Dir = "AUTONOMY_TEST_MCP_DIR"

// Main serves on standard input and output, and ends the process, if the
// environment asks for it.
func Main() {
	mode := os.Getenv(Env)
	switch mode {
	case "":
		return
	case "good":
		if err := Good().Run(context.Background(), &mcp.StdioTransport{}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	default:
		hostile(mode)
	}
	os.Exit(0)
}

// Schema2020 is a schema that must reach a client word by word.
const Schema2020 = `{"$schema":"https://json-schema.org/draft/2020-12/schema","type":"object",
"$defs":{"address":{"$anchor":"addressDef","type":"object","properties":{"street":{"type":"string"},"city":{"type":"string"}}}},
"properties":{"name":{"type":"string"},"address":{"$ref":"#/$defs/address"},"contactMethod":{"type":"string","enum":["phone","email"]},"phone":{"type":"string"},"email":{"type":"string"}},
"allOf":[{"anyOf":[{"required":["phone"]},{"required":["email"]}]}],
"if":{"properties":{"contactMethod":{"const":"phone"}},"required":["contactMethod"]},"then":{"required":["phone"]},"else":{"required":["email"]},
"additionalProperties":false}`

// A picture of one red pixel, and a sound of no samples.
var (
	png = []byte("\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde\x00\x00\x00\x0cIDATx\x9cc\xf8\xcf\xc0\x00\x00\x03\x01\x01\x00\xc9\xfe\x92\xef\x00\x00\x00\x00IEND\xaeB`\x82")
	wav = []byte("RIFF$\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00\x40\x1f\x00\x00\x01\x00\x08\x00data\x00\x00\x00\x00")
)

// Good is a server that behaves.
func Good() *mcp.Server {
	s := mcp.NewServer(&mcp.Implementation{Name: "fixture", Version: "1"}, nil)
	add := func(name, schema string, h func(context.Context, *mcp.CallToolRequest) *mcp.CallToolResult) {
		if schema == "" {
			schema = `{"type":"object","properties":{}}`
		}
		s.AddTool(&mcp.Tool{Name: name, Description: "fixture " + name, InputSchema: json.RawMessage(schema)},
			func(ctx context.Context, r *mcp.CallToolRequest) (*mcp.CallToolResult, error) { return h(ctx, r), nil })
	}
	content := func(c ...mcp.Content) func(context.Context, *mcp.CallToolRequest) *mcp.CallToolResult {
		return func(context.Context, *mcp.CallToolRequest) *mcp.CallToolResult {
			return &mcp.CallToolResult{Content: c}
		}
	}
	text := func(s string) *mcp.TextContent { return &mcp.TextContent{Text: s} }
	image := &mcp.ImageContent{Data: png, MIMEType: "image/png"}
	resource := func(uri, mime, s string) *mcp.EmbeddedResource {
		return &mcp.EmbeddedResource{Resource: &mcp.ResourceContents{URI: uri, MIMEType: mime, Text: s}}
	}
	add("test_simple_text", "", content(text("This is a simple text response for testing.")))
	add("test_image_content", "", content(image))
	add("test_audio_content", "", content(&mcp.AudioContent{Data: wav, MIMEType: "audio/wav"}))
	add("test_embedded_resource", "", content(resource("test://embedded-resource", "text/plain", "This is an embedded resource content.")))
	add("test_multiple_content_types", "", content(text("Multiple content types test:"), image,
		resource("test://mixed-content-resource", "application/json", `{"test":"data","value":123}`)))
	add("test_error_handling", "", func(context.Context, *mcp.CallToolRequest) *mcp.CallToolResult {
		return &mcp.CallToolResult{IsError: true, Content: []mcp.Content{text("This tool intentionally returns an error for testing")}}
	})
	progress := func(ctx context.Context, r *mcp.CallToolRequest) *mcp.CallToolResult {
		if token := r.Params.GetProgressToken(); token != nil {
			for _, done := range []float64{0, 50, 100} {
				_ = r.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: token, Progress: done, Total: 100, Message: fmt.Sprint(done, " of 100")})
				time.Sleep(20 * time.Millisecond) // as a tool that works
			}
		}
		return &mcp.CallToolResult{Content: []mcp.Content{text("done")}}
	}
	add("test_tool_with_progress", "", progress)
	add("test_streaming_elicitation", "", progress)
	add("test_logging_tool", "", content(text("no log is sent")))
	add("json_schema_2020_12_tool", Schema2020, content(text("ok")))
	add("test_x_mcp_header", `{"type":"object","properties":{"region":{"type":"string","x-mcp-header":"Region"},"level":{"type":"integer"}}}`, content(text("ok")))
	add("echo", `{"type":"object"}`, func(_ context.Context, r *mcp.CallToolRequest) *mcp.CallToolResult {
		return &mcp.CallToolResult{Content: []mcp.Content{text(string(r.Params.Arguments))}, StructuredContent: r.Params.Arguments}
	})
	add("meta", "", func(_ context.Context, r *mcp.CallToolRequest) *mcp.CallToolResult {
		data, _ := json.Marshal(r.Params.Meta) // it was JSON
		return &mcp.CallToolResult{Content: []mcp.Content{text(string(data))}}
	})
	add("environ", "", func(context.Context, *mcp.CallToolRequest) *mcp.CallToolResult {
		wd, _ := os.Getwd() // the test sees what it is
		return &mcp.CallToolResult{Content: []mcp.Content{text(fmt.Sprintf("%q in %s", os.Environ(), wd))}}
	})
	// wait ends when it is cancelled, and leaves a file to prove it.
	add("wait", "", func(ctx context.Context, _ *mcp.CallToolRequest) *mcp.CallToolResult {
		note("waiting")
		<-ctx.Done()
		note("cancelled")
		return &mcp.CallToolResult{Content: []mcp.Content{text("cancelled")}}
	})
	return s
}

// note leaves a file in the directory of the test.
func note(name string) {
	if dir := os.Getenv(Dir); dir != "" {
		_ = os.WriteFile(dir+"/"+name, nil, 0o600) // its absence fails the test
	}
}
