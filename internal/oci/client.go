package oci

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/strictjson"
)

// Defaults of Options, and fixed limits.
const (
	DefaultMaxManifest = 4 << 20 // bytes; OCI distribution specification
	DefaultMaxBlob     = 1 << 20 // bytes
	DefaultTimeout     = 60 * time.Second
	maxRedirects       = 10
	maxRegistries      = 16 // connection pools kept
	maxLayers          = 128
)

// Options configure a Client. The zero value is usable.
type Options struct {
	// Mirror is a base URL that is used instead of the registry a reference
	// names, as in http://127.0.0.1:5080: its /v2/REPOSITORY/… is asked.
	Mirror string
	// PlainHTTP allows http with hosts that are not loopback.
	PlainHTTP bool
	// Hosts, when not empty, are the only hosts ("name" or "name:port") that
	// may be reached beside the registry (or mirror) itself. A listed host may
	// resolve to any address. With or without the list, a host that is not
	// listed and not the registry must have a public address.
	Hosts []string
	// MaxManifest and MaxBlob are in bytes; 0: the default.
	MaxManifest, MaxBlob int64
	// Timeout bounds one call of a Client's method, all its requests and
	// reading included; 0: the default.
	Timeout time.Duration
	// TLS is used for https; nil: the system's roots.
	TLS *tls.Config
	// Keychain finds credentials when a registry asks for them; nil: none.
	Keychain authn.Keychain
}

// Client pulls and pushes. It is made by New.
type Client struct {
	opts   Options
	mirror *url.URL

	mu    sync.Mutex
	conns map[string]*registry // by registry host

	// fallbackMu is held while a fallback index is read and written, so that
	// attaches of one client do not lose each other's entries.
	fallbackMu sync.Mutex
}

// registry is the connection pool of one registry.
type registry struct {
	base   url.URL // scheme, host, path prefix
	client *http.Client
	rt     *guardedTransport

	mu   sync.Mutex
	auth map[string]http.RoundTripper // by scope, made after the first 401
}

// New returns a Client, or an error when the options make no sense.
func New(o Options) (*Client, error) {
	c := &Client{opts: o, conns: map[string]*registry{}}
	if c.opts.MaxManifest == 0 {
		c.opts.MaxManifest = DefaultMaxManifest
	}
	if c.opts.MaxBlob == 0 {
		c.opts.MaxBlob = DefaultMaxBlob
	}
	if c.opts.Timeout == 0 {
		c.opts.Timeout = DefaultTimeout
	}
	if c.opts.MaxManifest < 0 || c.opts.MaxBlob < 0 || c.opts.Timeout < 0 {
		return nil, errors.New("oci: a limit is negative")
	}
	if o.Mirror != "" {
		u, err := url.Parse(o.Mirror)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return nil, fmt.Errorf("oci: mirror is not a base URL such as http://127.0.0.1:5080")
		}
		c.mirror = u
	}
	return c, nil
}

// Close drops idle connections.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.conns {
		r.rt.base.(*http.Transport).CloseIdleConnections()
	}
	clear(c.conns)
}

func (c *Client) registry(host string) *registry {
	key := host
	base := url.URL{Scheme: "https", Host: host}
	if c.mirror != nil {
		base = url.URL{Scheme: c.mirror.Scheme, Host: c.mirror.Host, Path: strings.TrimSuffix(c.mirror.Path, "/")}
		key = "mirror"
	} else if h, _ := splitHost(host, "http"); c.opts.PlainHTTP || loopbackHost(h) {
		base.Scheme = "http"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.conns[key]; r != nil {
		return r
	}
	if len(c.conns) >= maxRegistries {
		for k, r := range c.conns {
			r.rt.base.(*http.Transport).CloseIdleConnections()
			delete(c.conns, k)
		}
	}
	r := &registry{base: base, auth: map[string]http.RoundTripper{}}
	r.rt = newTransport(&guard{home: base.Host, homeHTTPS: base.Scheme == "https", hosts: c.opts.Hosts, plain: c.opts.PlainHTTP}, c.opts)
	r.client = &http.Client{Transport: r.rt, CheckRedirect: checkRedirect}
	c.conns[key] = r
	return r
}

func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("%w: more than %d redirects", ErrHost, maxRedirects)
	}
	if via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme == "http" {
		return fmt.Errorf("%w: redirect from https to http", ErrHost)
	}
	return nil
}

// request is one request that can be sent again after the credentials came.
type request struct {
	method string
	url    string // absolute
	header http.Header
	body   []byte
	scope  string // pull or push
	repo   string
}

// send does one request, with credentials once the registry asked for them. The
// caller closes the body.
func (c *Client) send(ctx context.Context, r *registry, q request) (*http.Response, error) {
	scope := q.repo + ":" + q.scope
	r.mu.Lock()
	rt := r.auth[scope]
	r.mu.Unlock()
	resp, err := r.try(ctx, q, rt)
	if err != nil || resp.StatusCode != http.StatusUnauthorized || rt != nil || c.opts.Keychain == nil {
		return resp, err
	}
	drain(resp)
	rt, err = c.login(ctx, r, q)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.auth[scope] = rt
	r.mu.Unlock()
	return r.try(ctx, q, rt)
}

func (r *registry) try(ctx context.Context, q request, rt http.RoundTripper) (*http.Response, error) {
	var body io.Reader
	if q.body != nil {
		body = bytes.NewReader(q.body)
	}
	req, err := http.NewRequestWithContext(ctx, q.method, q.url, body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", q.method, q.url, err)
	}
	for k, v := range q.header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", "autonomy/"+run.Version)
	client := r.client
	if rt != nil {
		client = &http.Client{Transport: rt, CheckRedirect: checkRedirect}
	}
	return client.Do(req)
}

// login does the registry's handshake: Basic, or a token from the service the
// registry names. Both go through the guard.
func (c *Client) login(ctx context.Context, r *registry, q request) (http.RoundTripper, error) {
	opts := []name.Option{}
	if r.base.Scheme == "http" {
		opts = append(opts, name.Insecure)
	}
	reg, err := name.NewRegistry(r.base.Host, opts...)
	if err != nil {
		return nil, fmt.Errorf("log in to %s: %w", r.base.Host, err)
	}
	auth, err := authn.Resolve(ctx, c.opts.Keychain, reg)
	if err != nil {
		return nil, fmt.Errorf("log in to %s: find credentials: %w", r.base.Host, err)
	}
	actions := "pull"
	if q.scope == "push" {
		actions = "pull,push"
	}
	rt, err := transport.NewWithContext(ctx, reg, auth, r.rt, []string{"repository:" + q.repo + ":" + actions})
	if err != nil {
		return nil, fmt.Errorf("%w: log in to %s: %w", ErrUnauthorized, r.base.Host, err)
	}
	return rt, nil
}

func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10)
	resp.Body.Close()
}

// statusError turns an unexpected answer into an error.
func statusError(what string, resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // the status is what counts
	var e struct {
		Errors []struct{ Code, Message string }
	}
	detail := ""
	if json.Unmarshal(body, &e) == nil && len(e.Errors) > 0 {
		detail = fmt.Sprintf(": %.60q %.200q", e.Errors[0].Code, e.Errors[0].Message)
	}
	switch resp.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("%s: %w at %s%s", what, ErrNotFound, resp.Request.URL.Host, detail)
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%s: %w by %s (status %d)%s", what, ErrUnauthorized, resp.Request.URL.Host, resp.StatusCode, detail)
	}
	return fmt.Errorf("%s: %s answered status %d%s", what, resp.Request.URL.Host, resp.StatusCode, detail)
}

// read reads a body up to limit and checks it against want, "" for any. It
// returns the bytes only when all is right.
func read(what string, resp *http.Response, limit int64, want string) ([]byte, error) {
	if resp.ContentLength > limit {
		return nil, fmt.Errorf("%s: %w: %d bytes, the limit is %d", what, ErrTooLarge, resp.ContentLength, limit)
	}
	var buf bytes.Buffer
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(&buf, sum), io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s: after %d bytes: %w", what, n, err)
	}
	if n > limit {
		return nil, fmt.Errorf("%s: %w: over %d bytes", what, ErrTooLarge, limit)
	}
	if have := "sha256:" + hex.EncodeToString(sum.Sum(nil)); want != "" && have != want {
		return nil, fmt.Errorf("%s: %w: the bytes are %s, want %s", what, ErrDigest, have, want)
	}
	return buf.Bytes(), nil
}

func (c *Client) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, c.opts.Timeout, fmt.Errorf("no complete answer within %s: %w", c.opts.Timeout, context.DeadlineExceeded))
}

func (r *registry) url(repo string, parts ...string) string {
	u := r.base
	u.Path += "/v2/" + repo + "/" + strings.Join(parts, "/")
	return u.String()
}

// repo parses "registry/repository".
func (c *Client) repo(s string) (*registry, string, error) {
	ref, err := ParseRef(s)
	if err != nil {
		return nil, "", err
	}
	if ref.Tag != "" || ref.Digest != "" {
		return nil, "", fmt.Errorf("%w: %.80q: want registry/repository alone here", ErrReference, s)
	}
	return c.registry(ref.Registry), ref.Repository, nil
}

func checkDigestForm(digest string) error {
	if !reDigest.MatchString(digest) {
		return fmt.Errorf("%w: %.80q is no sha256 digest", ErrReference, digest)
	}
	return nil
}

// Descriptor names content.
type Descriptor struct {
	MediaType    string            `json:"mediaType"`
	Digest       string            `json:"digest"`
	Size         int64             `json:"size"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	ArtifactType string            `json:"artifactType,omitempty"`
}

// Manifest is an OCI image manifest or index, with the bytes it was read from.
type Manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	ArtifactType  string            `json:"artifactType,omitempty"`
	Config        *Descriptor       `json:"config,omitempty"`
	Layers        []Descriptor      `json:"layers,omitempty"`
	Manifests     []Descriptor      `json:"manifests,omitempty"` // of an index
	Subject       *Descriptor       `json:"subject,omitempty"`
	Annotations   map[string]string `json:"annotations,omitempty"`

	Raw    []byte `json:"-"`
	Digest string `json:"-"` // sha256 of Raw
}

// Type is the artifact type, which older tools write as the configuration's
// media type.
func (m *Manifest) Type() string {
	if m.ArtifactType == "" && m.Config != nil {
		return m.Config.MediaType
	}
	return m.ArtifactType
}

// IsIndex reports whether m lists manifests instead of layers.
func (m *Manifest) IsIndex() bool { return m.MediaType == TypeIndex || m.MediaType == typeDockerList }

// Descriptor names m.
func (m *Manifest) Descriptor() Descriptor {
	return Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Raw)), ArtifactType: m.ArtifactType}
}

const (
	typeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	typeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

var acceptManifest = http.Header{"Accept": {TypeManifest, TypeIndex, typeDockerManifest, typeDockerList}}

// ParseManifest reads a manifest or index. contentType is what the server said,
// "" for unknown: it must agree with the document. Keys beside the known ones
// are allowed, twice the same key is not; a document that is manifest and index
// at once is refused with ErrMediaType.
func ParseManifest(data []byte, contentType string) (*Manifest, error) {
	if err := strictjson.CheckObject(data); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	m := &Manifest{Raw: data, Digest: Digest(data)}
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if contentType != "" {
		t, _, err := mime.ParseMediaType(contentType)
		if err != nil {
			return nil, fmt.Errorf("manifest: %w: Content-Type %.80q", ErrMediaType, contentType)
		}
		if m.MediaType == "" {
			m.MediaType = t
		} else if m.MediaType != t {
			return nil, fmt.Errorf("manifest: %w: sent as %.80q, says it is %.80q", ErrMediaType, t, m.MediaType)
		}
	}
	isManifest := m.Config != nil || m.Layers != nil
	switch m.MediaType {
	case TypeManifest, typeDockerManifest:
		if m.Manifests != nil || m.Config == nil {
			return nil, fmt.Errorf("manifest: %w: an image manifest with the content of an index", ErrMediaType)
		}
	case TypeIndex, typeDockerList:
		if isManifest {
			return nil, fmt.Errorf("manifest: %w: an index with the content of an image manifest", ErrMediaType)
		}
	default:
		return nil, fmt.Errorf("manifest: %w: %.80q", ErrMediaType, m.MediaType)
	}
	if len(m.Layers) > maxLayers || len(m.Manifests) > maxReferrers {
		return nil, fmt.Errorf("manifest: %w: %d layers and %d manifests, the limits are %d and %d", ErrTooLarge, len(m.Layers), len(m.Manifests), maxLayers, maxReferrers)
	}
	return m, nil
}

// Resolve returns the manifest that ref names now: by its digest when it has
// one, else by its tag.
func (c *Client) Resolve(ctx context.Context, ref string) (*Manifest, error) {
	r, err := ParseRef(ref)
	if err != nil {
		return nil, err
	}
	ctx, cancel := c.bounded(ctx)
	defer cancel()
	switch {
	case r.Digest != "":
		return c.manifest(ctx, c.registry(r.Registry), r.Repository, r.Digest, r.Digest)
	case r.Tag != "":
		return c.manifest(ctx, c.registry(r.Registry), r.Repository, r.Tag, "")
	}
	return nil, fmt.Errorf("%w: %.80q: want a tag or a digest", ErrReference, ref)
}

// Manifest returns the manifest or index with this digest from repo
// ("registry/repository").
func (c *Client) Manifest(ctx context.Context, repo, digest string) (*Manifest, error) {
	r, path, err := c.repo(repo)
	if err != nil {
		return nil, err
	}
	if err := checkDigestForm(digest); err != nil {
		return nil, err
	}
	ctx, cancel := c.bounded(ctx)
	defer cancel()
	return c.manifest(ctx, r, path, digest, digest)
}

func (c *Client) manifest(ctx context.Context, r *registry, repo, ref, digest string) (*Manifest, error) {
	what := "manifest " + repo + " " + ref
	resp, err := c.send(ctx, r, request{method: http.MethodGet, url: r.url(repo, "manifests", ref), header: acceptManifest, scope: "pull", repo: repo})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusOK {
		return nil, statusError(what, resp)
	}
	data, err := read(what, resp, c.opts.MaxManifest, digest)
	if err != nil {
		return nil, err
	}
	m, err := ParseManifest(data, resp.Header.Get("Content-Type"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return m, nil
}

// Blob returns the blob with this digest from repo ("registry/repository").
func (c *Client) Blob(ctx context.Context, repo, digest string) ([]byte, error) {
	r, path, err := c.repo(repo)
	if err != nil {
		return nil, err
	}
	if err := checkDigestForm(digest); err != nil {
		return nil, err
	}
	ctx, cancel := c.bounded(ctx)
	defer cancel()
	what := "blob " + path + " " + digest
	resp, err := c.send(ctx, r, request{method: http.MethodGet, url: r.url(path, "blobs", digest), scope: "pull", repo: path})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusOK {
		return nil, statusError(what, resp)
	}
	return read(what, resp, c.opts.MaxBlob, digest)
}

// Layer fetches the manifest with this digest, which must be an image manifest
// with exactly one layer of type mediaType, and the layer.
func (c *Client) Layer(ctx context.Context, repo, digest, mediaType string) (*Manifest, []byte, error) {
	m, err := c.Manifest(ctx, repo, digest)
	if err != nil {
		return nil, nil, err
	}
	switch {
	case m.IsIndex():
		return nil, nil, fmt.Errorf("artifact %s: %w: an index, want an image manifest", digest, ErrMediaType)
	case len(m.Layers) != 1:
		return nil, nil, fmt.Errorf("artifact %s: %w: %d layers, want one of %s", digest, ErrMediaType, len(m.Layers), mediaType)
	case m.Layers[0].MediaType != mediaType:
		return nil, nil, fmt.Errorf("artifact %s: %w: the layer is %.80q, want %s", digest, ErrMediaType, m.Layers[0].MediaType, mediaType)
	}
	if m.Layers[0].Size > c.opts.MaxBlob {
		return nil, nil, fmt.Errorf("artifact %s: %w: the layer has %d bytes, the limit is %d", digest, ErrTooLarge, m.Layers[0].Size, c.opts.MaxBlob)
	}
	data, err := c.Blob(ctx, repo, m.Layers[0].Digest)
	if err != nil {
		return nil, nil, err
	}
	if int64(len(data)) != m.Layers[0].Size {
		return nil, nil, fmt.Errorf("artifact %s: %w: the layer has %d bytes, its descriptor says %d", digest, ErrDigest, len(data), m.Layers[0].Size)
	}
	return m, data, nil
}
