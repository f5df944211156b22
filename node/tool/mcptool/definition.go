package mcptool

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"unicode/utf8"

	"github.com/gowebpki/jcs"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// Definition is one tool as its server describes it.
type Definition struct {
	Name        string          // the server's own, any text of at most maxName bytes
	Description string          // may be empty
	InputSchema json.RawMessage // an object
	Digest      string          // "sha256:" + 64 hex over the RFC 8785 form of everything that the server says of it
}

const maxName = 128

func define(t *mcp.Tool) (Definition, error) {
	if t == nil || t.Name == "" || len(t.Name) > maxName || !utf8.ValidString(t.Name) {
		return Definition{}, fmt.Errorf("a tool without a name of 1 to %d bytes", maxName)
	}
	whole := *t
	whole.Meta = nil // the protocol's envelope, not the tool
	all, err := json.Marshal(&whole)
	if err != nil {
		return Definition{}, fmt.Errorf("tool %q: %w", clip(t.Name), err)
	}
	if len(all) > MaxDefinition {
		return Definition{}, fmt.Errorf("tool %q: its definition has %d bytes, at most %d", clip(t.Name), len(all), MaxDefinition)
	}
	if err := strictjson.CheckObject(all); err != nil {
		return Definition{}, fmt.Errorf("tool %q: %w", clip(t.Name), err)
	}
	canonical, err := jcs.Transform(all)
	if err != nil {
		return Definition{}, fmt.Errorf("tool %q: %w", clip(t.Name), err)
	}
	schema, err := json.Marshal(t.InputSchema)
	if err != nil {
		return Definition{}, fmt.Errorf("tool %q: input schema: %w", clip(t.Name), err)
	}
	sum := sha256.Sum256(canonical)
	return Definition{Name: t.Name, Description: t.Description, InputSchema: schema, Digest: "sha256:" + hex.EncodeToString(sum[:])}, nil
}

// remote adds the configured headers to requests, and bounds answers.
type remote struct {
	next   http.RoundTripper
	header map[string]string
}

func (t *remote) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	for k, v := range t.header {
		r.Header.Set(k, v)
	}
	resp, err := t.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	resp.Body = bounded(resp)
	return resp, nil
}

func (t *remote) CloseIdleConnections() {
	if c, ok := t.next.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}
