package release

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/verify"
)

// Client speaks to the control plane. The node dials, never the other way.
type Client struct {
	base string
	http *http.Client
}

// clientTimeout bounds one request.
const clientTimeout = 15 * time.Second

// NewClient checks the URL. tlsConf is for https; nil: the system's roots, no
// client certificate. Proxies of the environment are not used.
func NewClient(base string, tlsConf *tls.Config) (*Client, error) {
	u, err := url.Parse(base)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("control plane URL %q: want http://HOST:PORT or https://HOST:PORT", base)
	}
	tr := http.DefaultTransport.(*http.Transport).Clone()
	tr.Proxy = nil
	tr.TLSClientConfig = tlsConf.Clone()
	return &Client{base: strings.TrimRight(u.String(), "/"), http: &http.Client{Transport: tr, Timeout: clientTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Latest returns the envelope of the channel's release, nil when it is the one
// that etag names or when there is none.
func (c *Client) Latest(ctx context.Context, channel, nodeID, etag string) (envelope []byte, newETag string, err error) {
	q := url.Values{"channel": {channel}, "node_id": {nodeID}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/v1/releases/latest?"+q.Encode(), nil)
	if err != nil {
		return nil, "", err
	}
	if etag != "" {
		req.Header.Set("If-None-Match", etag)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, "", fmt.Errorf("ask the control plane: %w", err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotModified, http.StatusNotFound:
		return nil, etag, nil
	default:
		return nil, "", fmt.Errorf("the control plane answered %s to GET /v1/releases/latest", resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, verify.MaxEnvelopeBytes+1))
	if err != nil {
		return nil, "", fmt.Errorf("read the control plane's answer: %w", err)
	}
	if len(body) > verify.MaxEnvelopeBytes {
		return nil, "", fmt.Errorf("the control plane's release is over %d bytes", verify.MaxEnvelopeBytes)
	}
	return body, resp.Header.Get("ETag"), nil
}

// Ack is what a node reports of a lifecycle step.
type Ack struct {
	ReleaseID   string `json:"release_id"`
	Step        string `json:"step"`
	Result      string `json:"result"`
	Code        string `json:"code,omitempty"`
	Detail      string `json:"detail,omitempty"`
	PolicyRef   string `json:"policy_ref,omitempty"`
	Fingerprint string `json:"fingerprint,omitempty"`
}

// Ack reports a step.
func (c *Client) Ack(ctx context.Context, nodeID string, a Ack) error {
	body, err := json.Marshal(a)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+"/v1/nodes/"+url.PathEscape(nodeID)+"/ack", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection can be used again
	if resp.StatusCode >= 300 {
		return fmt.Errorf("the control plane answered %s", resp.Status)
	}
	return nil
}

// Watermark asks how far the control plane holds this node's log without a gap.
// ok is false when it knows another log under this node's name, or none.
func (c *Client) Watermark(ctx context.Context, nodeID, logID string) (seq uint64, ok bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet,
		c.base+"/v1/nodes/"+url.PathEscape(nodeID)+"/watermark?"+url.Values{"log_id": {logID}}.Encode(), nil)
	if err != nil {
		return 0, false, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, false, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		return 0, false, nil
	}
	if resp.StatusCode != http.StatusOK {
		return 0, false, fmt.Errorf("the control plane answered %s", resp.Status)
	}
	var w struct {
		NodeID string `json:"node_id"`
		LogID  string `json:"log_id"`
		Seq    uint64 `json:"seq"`
	}
	if err := strictjson.Read(resp.Body, 4<<10, &w); err != nil {
		return 0, false, fmt.Errorf("the control plane's watermark: %w", err)
	}
	return w.Seq, w.LogID == logID, nil
}
