package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/internal/problem"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/relay/oci"
	"github.com/autonomyops/autonomy/relay/prestage"
)

// What clients of a relay need, without importing its parts.
type (
	List     = prestage.List
	Item     = prestage.Item
	Accepted = prestage.Accepted
	Report   = prestage.Report
	Digest   = oci.Digest
)

// Names of package prestage.
const (
	ListSchema  = prestage.ListSchema
	PayloadType = prestage.PayloadType
	MaxList     = prestage.MaxBodyBytes
)

// ParseList reads a list strictly; ParseDigest and ParseName its parts; Seal
// signs one; ValidID checks its id.
var (
	ParseList   = prestage.ParseList
	ParseDigest = oci.ParseDigest
	ParseName   = oci.ParseName
	Seal        = prestage.Seal
	ValidID     = prestage.ValidID
)

const (
	clientTimeout   = 30 * time.Second
	maxAnswerBytes  = 64 << 20 // a report of 4096 items is 2 MiB
	maxProblemBytes = 64 << 10
)

// ErrUnreachable wraps errors of a Client that got no answer.
var ErrUnreachable = errors.New("the relay cannot be reached")

// Client asks a relay. Make one with Dial. Errors are *problem.Problem for what
// the relay answered, or wrap ErrUnreachable.
type Client struct {
	base string
	http *http.Client
}

// Dial makes a Client for http(s)://host[:port] or unix:PATH. tlsConf is for
// https; nil: the system's roots, no client certificate. It does not connect.
func Dial(addr string, tlsConf *tls.Config) (*Client, error) {
	tr := &http.Transport{MaxResponseHeaderBytes: 64 << 10, TLSClientConfig: tlsConf.Clone()}
	c := &Client{http: &http.Client{Transport: tr, Timeout: clientTimeout, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}}
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		c.base = "http://relay"
		tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}
		return c, nil
	}
	u, err := url.Parse(addr)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" {
		return nil, fmt.Errorf("relay address %.200q: want http://HOST:PORT, https://HOST:PORT or unix:PATH", addr)
	}
	c.base = u.Scheme + "://" + u.Host
	return c, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status of the relay.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	var s Status
	return &s, c.call(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Submit sends a list: an envelope as Seal makes it, or the bare list.
func (c *Client) Submit(ctx context.Context, body []byte) (*Accepted, error) {
	var a Accepted
	return &a, c.call(ctx, http.MethodPost, "/v1/prestage", body, &a)
}

// Report of a list. The id must be valid.
func (c *Client) Report(ctx context.Context, id string) (*Report, error) {
	var r Report
	return &r, c.call(ctx, http.MethodGet, "/v1/prestage/"+id, nil, &r)
}

func (c *Client) call(ctx context.Context, method, path string, body []byte, answer any) error {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 == 2 {
		if err := strictjson.Read(resp.Body, maxAnswerBytes, answer); err != nil {
			return fmt.Errorf("%s %s: the answer is not a relay's: %w", method, c.base+path, err)
		}
		return nil
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxProblemBytes))
	var p problem.Problem
	if err != nil || json.Unmarshal(data, &p) != nil || p.Code == "" {
		return fmt.Errorf("%s %s: %s, and the answer is not a relay's", method, c.base+path, resp.Status)
	}
	p.Status = resp.StatusCode
	return &p
}
