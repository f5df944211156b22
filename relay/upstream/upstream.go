// Package upstream pulls content by digest from one OCI registry.
//
// # What it trusts
//
// Nothing that comes back. Manifests are bounded and hashed before they are
// returned; blobs go to a Sink that hashes them. The registry may redirect, but
// only as far as the guard lets it: to its own host and port, or by https to a
// public address. The check sits where the connection is made, after name
// resolution, so neither a DNS alias nor a second lookup gets around it.
// Tokens go to the configured host only. Proxy variables of the environment
// are not used.
//
// # Life of a pull
//
// Request → on 401 one anonymous token request (distribution token protocol) →
// body under an idle deadline, a minimum rate and a total deadline → on a cut,
// resume by Range with If-Range, at most Config.Resumes times per blob, with a
// doubling pause → verified. Deadlines decide how long to wait, never what to
// fetch or in which order.
//
// Errors wrap one of the sentinels below. A Client is safe for concurrent use.
// Only the relay imports it.
package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/relay/oci"
)

// Sentinels.
var (
	ErrNotFound     = errors.New("the upstream does not have it")
	ErrUnreachable  = errors.New("the upstream cannot be reached")
	ErrInterrupted  = errors.New("the transfer was cut")
	ErrTooSlow      = errors.New("the upstream is too slow")
	ErrMismatch     = errors.New("the upstream sent other content than was asked for")
	ErrUnauthorized = errors.New("the upstream refuses access")
	ErrForbidden    = errors.New("the upstream leads to a place it must not lead to")
	ErrStatus       = errors.New("the upstream answered with an error")
)

// Limits of what is read besides blobs.
const (
	maxTokenBytes    = 64 << 10
	maxIndexPages    = 16 // of a referrers list
	maxRedirects     = 5
	maxHeaderBytes   = 64 << 10
	maxResumePause   = 5 * time.Second
	firstResumePause = 100 * time.Millisecond
)

// Config of a Client. The zero values of all but URL stand for the defaults.
type Config struct {
	URL          string        // https://host[:port], or http:// for a loopback address
	DialTimeout  time.Duration // connect and TLS handshake; default 10 s
	IdleTimeout  time.Duration // longest wait for the next byte, or for the answer; default 30 s
	TotalTimeout time.Duration // longest transfer of one blob, resumes included; default 1 h
	MinRate      int64         // bytes per second below which a transfer is given up; default 1 KiB
	RateWindow   time.Duration // over which MinRate is measured; default 10 s
	Resumes      int           // per blob; default 32
	TLS          *tls.Config   // nil: the system's roots
}

// Client pulls from one registry. Make one with New, and Close it.
type Client struct {
	cfg  Config
	base *url.URL
	host string // host:port of base
	http *http.Client
	tr   *http.Transport

	mu     sync.Mutex
	tokens map[string]string // repository -> bearer token; bounded by maxTokens
}

const maxTokens = 256

// New checks cfg and makes a Client. It does not connect.
func New(cfg Config) (*Client, error) {
	u, err := url.Parse(cfg.URL)
	switch {
	case err != nil || u.Host == "" || u.Hostname() == "":
		return nil, fmt.Errorf("upstream %.200q: want a URL as in https://registry.example.com", cfg.URL)
	case u.User != nil:
		return nil, errors.New("upstream: credentials do not belong in the URL")
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("upstream %s: want scheme and host only", u.Redacted())
	case u.Scheme == "http" && !run.Loopback(hostPort(u)):
		return nil, fmt.Errorf("upstream %s: http is for loopback addresses only; use https", u.Redacted())
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("upstream %s: want https", u.Redacted())
	}
	def := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&cfg.DialTimeout, 10*time.Second)
	def(&cfg.IdleTimeout, 30*time.Second)
	def(&cfg.TotalTimeout, time.Hour)
	def(&cfg.RateWindow, 10*time.Second)
	if cfg.MinRate <= 0 {
		cfg.MinRate = 1 << 10
	}
	if cfg.Resumes <= 0 {
		cfg.Resumes = 32
	}
	c := &Client{cfg: cfg, base: &url.URL{Scheme: u.Scheme, Host: u.Host}, host: hostPort(u), tokens: map[string]string{}}
	own := &net.Dialer{Timeout: cfg.DialTimeout}
	guarded := &net.Dialer{Timeout: cfg.DialTimeout, Control: publicOnly}
	c.tr = &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if strings.EqualFold(addr, c.host) {
				return own.DialContext(ctx, network, addr)
			}
			return guarded.DialContext(ctx, network, addr)
		},
		TLSClientConfig:        cfg.TLS,
		TLSHandshakeTimeout:    cfg.DialTimeout,
		ResponseHeaderTimeout:  cfg.IdleTimeout,
		MaxResponseHeaderBytes: maxHeaderBytes,
		MaxConnsPerHost:        4,
		IdleConnTimeout:        30 * time.Second,
		DisableCompression:     true, // a digest is over the bytes as stored
	}
	c.http = &http.Client{Transport: c.tr, CheckRedirect: c.checkRedirect}
	return c, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.tr.CloseIdleConnections() }

// String is the upstream's URL.
func (c *Client) String() string { return c.base.String() }

func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = "443"
		if u.Scheme == "http" {
			port = "80"
		}
	}
	return net.JoinHostPort(u.Hostname(), port)
}

func (c *Client) own(u *url.URL) bool {
	return u.Scheme == c.base.Scheme && strings.EqualFold(hostPort(u), c.host)
}

func (c *Client) checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return fmt.Errorf("%w: more than %d redirects", ErrForbidden, maxRedirects)
	}
	if c.own(req.URL) {
		return nil
	}
	// net/http drops the header for foreign hosts, yet keeps it for a subdomain or another port.
	req.Header.Del("Authorization")
	return c.checkForeign(req.URL)
}

// checkForeign is the first half of the guard; publicOnly is the second.
func (c *Client) checkForeign(u *url.URL) error {
	if u.Scheme != "https" || u.User != nil {
		return fmt.Errorf("%w: redirect to %.200s: want https, or the upstream itself", ErrForbidden, u.Redacted())
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil && !public(ip) {
		return fmt.Errorf("%w: redirect to the address %s, which is not public", ErrForbidden, ip)
	}
	return nil
}

// publicOnly looks at the very address that is about to be connected to.
func publicOnly(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil || !public(ap.Addr()) {
		return fmt.Errorf("%w: %s is not a public address", ErrForbidden, address)
	}
	return nil
}

// reserved are address blocks that netip has no word for.
var reserved = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"), // carrier NAT
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("64:ff9b::/96"), // NAT64 and 6to4 carry an IPv4 address inside
	netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("2002::/16"),
	netip.MustParsePrefix("2001::/23"),
	netip.MustParsePrefix("2001:db8::/32"),
	netip.MustParsePrefix("::/96"),
}

func public(ip netip.Addr) bool {
	ip = ip.Unmap().WithZone("")
	if !ip.IsValid() || !ip.IsGlobalUnicast() || ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast() {
		return false
	}
	for _, p := range reserved {
		if p.Contains(ip) {
			return false
		}
	}
	return true
}

// get sends one GET to the upstream, with a token if it asks for one. On nil
// error the caller closes the body. Status is checked by the caller.
func (c *Client) get(ctx context.Context, repo, path string, header http.Header) (*http.Response, error) {
	u := c.base.JoinPath("v2", repo, path)
	return c.getURL(ctx, repo, u, header)
}

func (c *Client) getURL(ctx context.Context, repo string, u *url.URL, header http.Header) (*http.Response, error) {
	for try := 0; ; try++ {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return nil, fmt.Errorf("request: %w", err)
		}
		for k, v := range header {
			req.Header[k] = v
		}
		req.Header.Set("User-Agent", "autonomy-relay/"+run.Version)
		c.mu.Lock()
		token := c.tokens[repo]
		c.mu.Unlock()
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			return nil, classify(ctx, err)
		}
		if resp.StatusCode != http.StatusUnauthorized || try > 0 || !c.own(resp.Request.URL) {
			return resp, nil
		}
		challenge := resp.Header.Get("WWW-Authenticate")
		drain(resp)
		if err := c.authorize(ctx, repo, challenge); err != nil {
			return nil, err
		}
	}
}

func classify(ctx context.Context, err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err // the URL may carry a signed query
	}
	switch {
	case ctx.Err() != nil && context.Cause(ctx) != nil:
		return context.Cause(ctx)
	case errors.Is(err, ErrForbidden):
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// drain lets the connection be used again if little is left to read.
func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 4<<10)
	resp.Body.Close()
}

func statusError(resp *http.Response) error {
	switch resp.StatusCode {
	case http.StatusNotFound:
		return ErrNotFound
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w: %s", ErrUnauthorized, resp.Status)
	}
	return fmt.Errorf("%w: %.80s", ErrStatus, resp.Status)
}

// authorize asks the realm of a Bearer challenge for an anonymous token.
func (c *Client) authorize(ctx context.Context, repo, challenge string) error {
	params, ok := bearer(challenge)
	if !ok {
		return fmt.Errorf("%w: it wants %.80q, the relay has anonymous bearer tokens only", ErrUnauthorized, challenge)
	}
	realm, err := url.Parse(params["realm"])
	if err != nil || realm.Host == "" {
		return fmt.Errorf("%w: token realm %.200q is no URL", ErrUnauthorized, params["realm"])
	}
	if !c.own(realm) {
		if err := c.checkForeign(realm); err != nil {
			return err
		}
	}
	q := realm.Query()
	if s := params["service"]; s != "" {
		q.Set("service", s)
	}
	q.Set("scope", "repository:"+repo+":pull") // our own words: never more than this
	realm.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), nil)
	if err != nil {
		return fmt.Errorf("token request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("token request: %w", classify(ctx, err))
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%w: token request: %.80s", ErrUnauthorized, resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenBytes+1))
	if err != nil {
		return fmt.Errorf("token request: %w", classify(ctx, err))
	}
	var answer map[string]any
	if len(body) > maxTokenBytes || strictjson.Unmarshal(body, &answer) != nil {
		return fmt.Errorf("%w: token answer is not JSON of at most %d bytes", ErrUnauthorized, maxTokenBytes)
	}
	token, _ := answer["token"].(string)
	if token == "" {
		token, _ = answer["access_token"].(string)
	}
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("%w: token answer holds no token", ErrUnauthorized)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.tokens) >= maxTokens {
		clear(c.tokens) // they are cheap to ask for again
	}
	c.tokens[repo] = token
	return nil
}

// bearer parses a Bearer challenge (RFC 6750, RFC 9110 auth-param).
func bearer(challenge string) (map[string]string, bool) {
	scheme, rest, _ := strings.Cut(challenge, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return nil, false
	}
	// Auth-params are written like media type parameters, with ',' for ';'.
	var b strings.Builder
	quoted := false
	for i := 0; i < len(rest); i++ {
		switch ch := rest[i]; {
		case ch == '\\' && quoted && i+1 < len(rest):
			b.WriteByte(ch)
			i++
			b.WriteByte(rest[i])
			continue
		case ch == '"':
			quoted = !quoted
		case ch == ',' && !quoted:
			b.WriteByte(';')
			continue
		}
		b.WriteByte(rest[i])
	}
	_, params, err := mime.ParseMediaType("x/y;" + b.String())
	if err != nil || params["realm"] == "" {
		return nil, false
	}
	return params, true
}

var acceptManifests = http.Header{"Accept": {strings.Join([]string{oci.TypeOCIIndex, oci.TypeOCIManifest, oci.TypeDockerList, oci.TypeDockerManifest}, ", ")}}

// Manifest pulls a manifest or an index by digest and returns its bytes, which
// have that digest, with the media type the registry gave.
func (c *Client) Manifest(ctx context.Context, repo string, d oci.Digest) (data []byte, mediaType string, err error) {
	data, mediaType, err = c.small(ctx, repo, c.base.JoinPath("v2", repo, "manifests", string(d)), acceptManifests, nil)
	if err != nil {
		return nil, "", fmt.Errorf("manifest %s@%s: %w", repo, d, err)
	}
	if got := oci.DigestOf(data); got != d {
		return nil, "", fmt.Errorf("manifest %s@%s: %w: its digest is %s", repo, d, ErrMismatch, got)
	}
	return data, mediaType, nil
}

// small reads an answer of manifest size.
func (c *Client) small(ctx context.Context, repo string, u *url.URL, header http.Header, next *string) ([]byte, string, error) {
	ctx, release := context.WithTimeoutCause(ctx, c.cfg.TotalTimeout, fmt.Errorf("%w: not done after %s", ErrTooSlow, c.cfg.TotalTimeout))
	defer release()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	resp, err := c.getURL(ctx, repo, u, header)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		drain(resp)
		return nil, "", statusError(resp)
	}
	if resp.ContentLength > oci.MaxManifestBytes {
		return nil, "", fmt.Errorf("%w: %d bytes, the limit is %d", ErrMismatch, resp.ContentLength, oci.MaxManifestBytes)
	}
	body, stop := c.watch(ctx, cancel, resp.Body)
	defer stop()
	data, err := io.ReadAll(io.LimitReader(body, oci.MaxManifestBytes+1))
	if err != nil {
		return nil, "", err
	}
	if len(data) > oci.MaxManifestBytes {
		return nil, "", fmt.Errorf("%w: over %d bytes", ErrMismatch, oci.MaxManifestBytes)
	}
	mediaType, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		mediaType = ""
	}
	if next != nil {
		*next = nextLink(resp.Header.Get("Link"))
	}
	return data, mediaType, nil
}

// nextLink is the target of a Link header with rel="next", or "".
func nextLink(link string) string {
	target, params, ok := strings.Cut(link, ">")
	if !ok || !strings.HasPrefix(target, "<") || !strings.Contains(params, `rel="next"`) && !strings.Contains(params, "rel=next") {
		return ""
	}
	return target[1:]
}

// Referrers lists the digests of manifests whose subject is d, as the upstream
// tells: by the referrers API, or where it has none by the tag sha256-<hex>. The
// list is a hint: the caller fetches each and reads its subject.
func (c *Client) Referrers(ctx context.Context, repo string, d oci.Digest) ([]oci.Descriptor, error) {
	var all []oci.Descriptor
	u := c.base.JoinPath("v2", repo, "referrers", string(d))
	for page := 0; ; page++ {
		if page == maxIndexPages {
			return nil, fmt.Errorf("referrers of %s@%s: %w: more than %d pages", repo, d, ErrMismatch, maxIndexPages)
		}
		var next string
		data, mediaType, err := c.small(ctx, repo, u, http.Header{"Accept": {oci.TypeOCIIndex}}, &next)
		if errors.Is(err, ErrNotFound) && page == 0 {
			return c.referrersTag(ctx, repo, d)
		}
		if err != nil {
			return nil, fmt.Errorf("referrers of %s@%s: %w", repo, d, err)
		}
		m, err := oci.ParseManifest(data, mediaType)
		if err != nil || !oci.IsIndex(m.MediaType) {
			return nil, fmt.Errorf("referrers of %s@%s: %w: want an index", repo, d, errors.Join(ErrMismatch, err))
		}
		if all = append(all, m.Children...); len(all) > oci.MaxDescriptors {
			return nil, fmt.Errorf("referrers of %s@%s: %w: more than %d", repo, d, ErrMismatch, oci.MaxDescriptors)
		}
		if next == "" {
			return all, nil
		}
		n, err := u.Parse(next)
		if err != nil || !c.own(n) {
			return nil, fmt.Errorf("referrers of %s@%s: %w: the next page is elsewhere", repo, d, ErrForbidden)
		}
		u = n
	}
}

func (c *Client) referrersTag(ctx context.Context, repo string, d oci.Digest) ([]oci.Descriptor, error) {
	tag := "sha256-" + d.Hex()
	data, mediaType, err := c.small(ctx, repo, c.base.JoinPath("v2", repo, "manifests", tag), acceptManifests, nil)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("referrers tag %s:%s: %w", repo, tag, err)
	}
	m, err := oci.ParseManifest(data, mediaType)
	if err != nil {
		return nil, fmt.Errorf("referrers tag %s:%s: %w: %w", repo, tag, ErrMismatch, err)
	}
	if !oci.IsIndex(m.MediaType) {
		return nil, fmt.Errorf("referrers tag %s:%s: %w: it is a manifest where an index is due", repo, tag, ErrMismatch)
	}
	return m.Children, nil
}

// Sink takes a blob in; cache.Writer is one.
type Sink interface {
	io.Writer
	Offset() int64
	Size() int64
	Restart() error
}

// Blob pulls a blob into sink until sink.Size bytes are there. It resumes after
// cuts. It does not check the digest: the sink does, when it is committed.
func (c *Client) Blob(ctx context.Context, repo string, d oci.Digest, sink Sink) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.cfg.TotalTimeout, fmt.Errorf("%w: not done after %s", ErrTooSlow, c.cfg.TotalTimeout))
	defer cancel()
	etag := ""
	pause := firstResumePause
	for n := 0; ; n++ {
		start := sink.Offset()
		err := c.part(ctx, repo, d, sink, &etag)
		if err == nil {
			return nil
		}
		err = fmt.Errorf("blob %s@%s, at byte %d of %d: %w", repo, d, sink.Offset(), sink.Size(), err)
		// Only a cut is worth another request here; the rest is for the next attempt of the whole item.
		if !errors.Is(err, ErrInterrupted) || ctx.Err() != nil {
			return err
		}
		if n == c.cfg.Resumes {
			return fmt.Errorf("%w: given up after %d resumes", err, n)
		}
		if sink.Offset() > start {
			pause = firstResumePause
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		pause = min(2*pause, maxResumePause)
	}
}

// part is one request's worth of a blob.
func (c *Client) part(ctx context.Context, repo string, d oci.Digest, sink Sink, etag *string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	header := http.Header{"Accept": {"application/octet-stream, */*"}}
	if off := sink.Offset(); off > 0 {
		header.Set("Range", fmt.Sprintf("bytes=%d-", off))
		if *etag != "" {
			header.Set("If-Range", *etag)
		}
	}
	resp, err := c.get(ctx, repo, "blobs/"+string(d), header)
	if err != nil {
		if sink.Offset() > 0 && errors.Is(err, ErrUnreachable) {
			return fmt.Errorf("%w: %w", ErrInterrupted, err) // it was there a moment ago
		}
		return err
	}
	defer resp.Body.Close()
	off := sink.Offset()
	switch resp.StatusCode {
	case http.StatusOK:
		if off > 0 { // no ranges there, or another entity
			if err := sink.Restart(); err != nil {
				return err
			}
			off = 0
		}
	case http.StatusPartialContent:
		if want := fmt.Sprintf("bytes %d-%d/%d", off, sink.Size()-1, sink.Size()); resp.Header.Get("Content-Range") != want {
			return fmt.Errorf("%w: range %.80q, want %q", ErrMismatch, resp.Header.Get("Content-Range"), want)
		}
	default:
		drain(resp)
		if resp.StatusCode >= 500 && off > 0 {
			return fmt.Errorf("%w: %w", ErrInterrupted, statusError(resp))
		}
		return statusError(resp)
	}
	if left := sink.Size() - off; resp.ContentLength >= 0 && resp.ContentLength != left {
		return fmt.Errorf("%w: it has %d bytes, %d are due", ErrMismatch, resp.ContentLength, left)
	}
	if tag := resp.Header.Get("ETag"); strings.HasPrefix(tag, `"`) && len(tag) <= 256 { // If-Range takes strong ones only
		*etag = tag
	}
	body, stop := c.watch(ctx, cancel, resp.Body)
	defer stop()
	if err := c.copy(sink, body, sink.Size()-off); err != nil {
		return err
	}
	// The declared size is there. One byte more is a lie about the content.
	var extra [1]byte
	if resp.ContentLength < 0 {
		if n, _ := body.Read(extra[:]); n > 0 {
			return fmt.Errorf("%w: it goes on after the %d bytes due", ErrMismatch, sink.Size())
		}
	}
	return nil
}

const copyBuffer = 256 << 10

func (c *Client) copy(sink Sink, body io.Reader, left int64) error {
	buf := make([]byte, min(copyBuffer, max(1, left)))
	for left > 0 {
		n, err := body.Read(buf[:min(int64(len(buf)), left)])
		if n > 0 {
			if _, werr := sink.Write(buf[:n]); werr != nil {
				return werr
			}
			left -= int64(n)
		}
		if left == 0 {
			return nil
		}
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("%w: %d bytes missing", ErrInterrupted, left)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// watch puts body under the idle deadline and the minimum rate: when either is
// broken the request is cancelled with the reason, and Read returns it. Call
// stop when done.
func (c *Client) watch(ctx context.Context, cancel context.CancelCauseFunc, body io.Reader) (_ io.Reader, stop func()) {
	w := &watched{ctx: ctx, body: body, idleFor: c.cfg.IdleTimeout}
	w.idle = time.AfterFunc(w.idleFor, func() {
		cancel(fmt.Errorf("%w: no byte in %s", ErrTooSlow, w.idleFor))
	})
	quit := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		rate := time.NewTicker(c.cfg.RateWindow)
		defer rate.Stop()
		least := int64(float64(c.cfg.MinRate) * c.cfg.RateWindow.Seconds())
		for {
			select {
			case <-quit:
				return
			case <-rate.C:
				if n := w.window.Swap(0); n < least {
					cancel(fmt.Errorf("%w: %d bytes in %s, at least %d are due", ErrTooSlow, n, c.cfg.RateWindow, least))
					return
				}
			}
		}
	})
	return w, func() {
		w.idle.Stop()
		close(quit)
		wg.Wait()
	}
}

type watched struct {
	ctx     context.Context
	body    io.Reader
	idle    *time.Timer
	idleFor time.Duration
	window  atomic.Int64 // bytes since the rate was last looked at
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.body.Read(p)
	if w.ctx.Err() != nil {
		return n, context.Cause(w.ctx)
	}
	if n > 0 {
		w.window.Add(int64(n))
		w.idle.Reset(w.idleFor)
	}
	if err == nil || errors.Is(err, io.EOF) {
		return n, err
	}
	return n, fmt.Errorf("%w: %w", ErrInterrupted, err)
}
