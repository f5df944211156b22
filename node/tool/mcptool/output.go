package mcptool

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/autonomyops/autonomy/node/tool/executor"
)

// answer is the JSON of a result.
type answer struct {
	Content    []mcp.Content `json:"content"`
	Structured any           `json:"structured_content,omitempty"`
	Truncated  bool          `json:"truncated,omitempty"` // text was cut to fit; structured content is left out then
}

// output checks what an upstream answered and makes it a Result. limit is for
// the bytes of content, before JSON's escapes.
func output(res *mcp.CallToolResult, limit int64) executor.Result {
	if len(res.InputRequests) > 0 {
		return executor.Fail(CodeInput, "the tool asks for input from a person or a model, and there is none on this way")
	}
	out := answer{Content: []mcp.Content{}, Structured: res.StructuredContent}
	first := ""
	left := limit
	for i, c := range res.Content {
		if left <= 0 {
			out.Truncated = true
			break
		}
		kept, used, cut, err := admit(c, left)
		if err != nil {
			return executor.Fail(CodeContent, fmt.Sprintf("content %d of the tool's answer: %v", i, err))
		}
		if t, ok := kept.(*mcp.TextContent); ok && first == "" {
			first = t.Text
		}
		left -= used
		out.Truncated = out.Truncated || cut
		if kept != nil {
			out.Content = append(out.Content, kept)
		}
	}
	if out.Structured != nil {
		data, err := json.Marshal(out.Structured)
		if err != nil {
			return executor.Fail(CodeContent, "the tool's structured content: "+clip(err.Error()))
		}
		if int64(len(data)) > limit {
			out.Structured, out.Truncated = nil, true
		}
	}
	encoded, err := executor.Encode(out)
	if err == nil && len(encoded) > executor.MaxOutput && out.Structured != nil {
		out.Structured, out.Truncated = nil, true // it says mostly what the text says
		encoded, err = executor.Encode(out)
	}
	switch {
	case err != nil:
		return executor.Fail(CodeContent, "the tool's answer: "+clip(err.Error()))
	case len(encoded) > executor.MaxOutput:
		return executor.Fail(CodeContent, fmt.Sprintf("the tool's answer has %d bytes as JSON, at most %d are kept: lower output_max", len(encoded), executor.MaxOutput))
	}
	if res.IsError {
		return executor.Result{Outcome: executor.Error, Output: encoded, Code: CodeTool, Message: clip(first)}
	}
	return executor.Result{Outcome: executor.OK, Output: encoded}
}

// admit gives the part of c that is passed on: its text or data and what names
// it, without the server's _meta and annotations, which speak to the client's
// user interface. Text is cut at left bytes; data is whole or not there (nil).
func admit(c mcp.Content, left int64) (kept mcp.Content, used int64, cut bool, err error) {
	switch c := c.(type) {
	case *mcp.TextContent:
		text, cut := cutText(c.Text, left)
		return &mcp.TextContent{Text: text}, int64(len(text)), cut, nil
	case *mcp.ImageContent:
		if err := media(c.MIMEType, "image/"); err != nil {
			return nil, 0, false, err
		}
		if n := int64(len(c.Data)); n <= left {
			return &mcp.ImageContent{Data: c.Data, MIMEType: c.MIMEType}, n, false, nil
		}
		return nil, 0, true, nil
	case *mcp.AudioContent:
		if err := media(c.MIMEType, "audio/"); err != nil {
			return nil, 0, false, err
		}
		if n := int64(len(c.Data)); n <= left {
			return &mcp.AudioContent{Data: c.Data, MIMEType: c.MIMEType}, n, false, nil
		}
		return nil, 0, true, nil
	case *mcp.ResourceLink:
		n := int64(len(c.URI) + len(c.Name) + len(c.Title) + len(c.Description) + len(c.MIMEType))
		if n > left {
			return nil, 0, true, nil
		}
		return &mcp.ResourceLink{URI: c.URI, Name: c.Name, Title: c.Title, Description: c.Description, MIMEType: c.MIMEType, Size: c.Size}, n, false, nil
	case *mcp.EmbeddedResource:
		if c.Resource == nil {
			return nil, 0, false, errors.New("a resource without content")
		}
		r := &mcp.ResourceContents{URI: c.Resource.URI, MIMEType: c.Resource.MIMEType, Text: c.Resource.Text, Blob: c.Resource.Blob}
		n := int64(len(r.URI) + len(r.MIMEType) + len(r.Text) + len(r.Blob))
		if n > left {
			return nil, 0, true, nil
		}
		return &mcp.EmbeddedResource{Resource: r}, n, false, nil
	}
	return nil, 0, false, errors.New("its type is not one of text, image, audio, resource_link, resource")
}

func cutText(s string, left int64) (string, bool) {
	if int64(len(s)) <= left {
		return strings.ToValidUTF8(s, "\uFFFD"), false
	}
	return strings.ToValidUTF8(s[:left], ""), true
}

// media checks that a media type is one, and of the kind that it stands for.
func media(s, prefix string) error {
	t, _, err := mime.ParseMediaType(s)
	if err != nil || !strings.HasPrefix(t, prefix) {
		return fmt.Errorf("media type %q, want %s…", clip(s), prefix)
	}
	return nil
}

// bounded is a response's body, cut with an error at MaxMessage. A stream of
// events has no end; the SDK bounds each.
func bounded(resp *http.Response) io.ReadCloser {
	if t, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err == nil && t == "text/event-stream" {
		return resp.Body
	}
	return &limited{resp.Body, MaxMessage}
}

type limited struct {
	io.ReadCloser
	left int64
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("the answer is over %d bytes", MaxMessage)
	}
	n, err := l.ReadCloser.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	return n, err
}
