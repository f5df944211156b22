// Package httptool is tool.http_get and tool.http_request: HTTP to hosts on a
// list, and to no address inside.
//
// The policy judged the URL as text. What the text means is decided here, at
// the last moment, and refused with outcome "denied" and code egress_denied
// when it leads anywhere else:
//
//   - the host, spelled one way (lower case, ASCII, no trailing dot, no zone, no
//     decimal, octal or hexadecimal form of an address), is on the allow-list
//   - it is resolved once; every address of the answer must be a public one, or
//     lie in allow_private; one bad address refuses the call
//   - the connection goes to one of exactly these addresses: no second look-up
//     stands between check and dial
//   - a redirect is a new URL and goes through all of this again; it may not
//     leave https for http, and a new origin does not get the caller's headers
//   - if policy gave an egress list, the host and port must be on it too
//
// No proxy of the environment, no cookies, no connection shared between calls.
// Header and body sizes are bounded; a longer body is cut and says so.
//
// The output is {"status","url","headers","body"}: url is the last one asked,
// headers are those of ResponseHeaders, body a string, or base64 with
// "encoding":"base64" when it is no UTF-8 text.
package httptool

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

// Codes of results.
const (
	CodeEgress  = "egress_denied"   // denied: the URL leads where this tool may not go
	CodeParams  = "params_refused"  // error: not a URL or header that can be sent
	CodeDNS     = "dns_failed"      // error: the name has no address
	CodeConnect = "connect_failed"  // error: no connection, or no answer that is HTTP
	CodeHops    = "redirect_limit"  // error: more than MaxRedirects
	CodeBody    = "response_broken" // error: the body ended early
)

// Limits.
const (
	DefaultMaxBytes = 256 << 10           // bytes of body kept, unless configured
	MaxMaxBytes     = executor.MaxContent // the most that can be configured: 720 KiB
	MaxRedirects    = 5
	MaxAddresses    = 16       // of one answer of the resolver; more is refused
	maxHeaderBytes  = 64 << 10 // of a response
	maxHeaderValue  = 1024     // of one response header that is passed on
	maxURL          = 8192
	dialTimeout     = 10 * time.Second // for each address; the call's own limit holds too
)

// ResponseHeaders are passed on to the caller; the rest is dropped.
var ResponseHeaders = []string{"Cache-Control", "Content-Encoding", "Content-Language", "Content-Length",
	"Content-Type", "Date", "Etag", "Last-Modified", "Location", "Retry-After"}

// requestRefused are headers that would change who is asked or how the message
// is framed, or carry state from call to call.
var requestRefused = []string{"Connection", "Content-Length", "Cookie", "Expect", "Forwarded", "Host", "Keep-Alive",
	"Proxy-Authorization", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "X-Forwarded-For",
	"X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip"}

// Resolver turns a host name into addresses. *net.Resolver is one.
type Resolver interface {
	// LookupNetIP is asked for network "ip".
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Config is one HTTP tool of tools.yaml.
type Config struct {
	Hosts        []string       // "host": any port; "host:port"; an IPv6 address in brackets when a port follows
	AllowPrivate []netip.Prefix // addresses that are not public and may be reached all the same
	MaxBytes     int64          // of a body; 0: DefaultMaxBytes
	Methods      []string       // nil: GET alone, and no body
	Resolver     Resolver       // nil: net.DefaultResolver
	TLS          *tls.Config    // nil: the system's roots, no client certificate
}

// Tool is the executor.
type Tool struct {
	cfg   Config
	hosts []host
}

// host is an entry of an allow-list. port 0: any.
type host struct {
	name string
	port uint16
}

// New checks cfg and builds the tool. Its error joins all faults.
func New(cfg Config) (*Tool, error) {
	t := &Tool{cfg: cfg}
	var faults []error
	if len(cfg.Hosts) == 0 {
		faults = append(faults, errors.New("hosts is missing: want a list of hosts that may be asked, as in [api.example.com, \"127.0.0.1:8080\"]"))
	}
	for _, h := range cfg.Hosts {
		entry, err := parseHost(h)
		if err != nil {
			faults = append(faults, fmt.Errorf("hosts: %q: %w", h, err))
		}
		t.hosts = append(t.hosts, entry)
	}
	for _, p := range cfg.AllowPrivate {
		if p.Masked() != p {
			faults = append(faults, fmt.Errorf("allow_private: %s has bits beyond its length, want %s", p, p.Masked()))
		}
	}
	for _, m := range cfg.Methods {
		if !slices.Contains([]string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}, m) {
			faults = append(faults, fmt.Errorf("methods: %q: want GET, HEAD, POST, PUT, PATCH, DELETE or OPTIONS", m))
		}
	}
	switch {
	case cfg.MaxBytes == 0:
		t.cfg.MaxBytes = DefaultMaxBytes
	case cfg.MaxBytes < 0 || cfg.MaxBytes > MaxMaxBytes:
		faults = append(faults, fmt.Errorf("max_bytes is %d, want 1 to %d", cfg.MaxBytes, MaxMaxBytes))
	}
	if cfg.Resolver == nil {
		t.cfg.Resolver = net.DefaultResolver
	}
	return t, errors.Join(faults...)
}

// parseHost reads an entry of an allow-list.
func parseHost(s string) (host, error) {
	name, portText := s, ""
	if strings.HasPrefix(s, "[") || strings.Count(s, ":") == 1 {
		if strings.HasSuffix(s, "]") {
			name = s[1 : len(s)-1]
		} else {
			var err error
			if name, portText, err = net.SplitHostPort(s); err != nil {
				return host{}, err
			}
			if portText == "" {
				return host{}, errors.New("the port is missing after ':'")
			}
		}
	}
	var h host
	if portText != "" {
		port, err := strconv.ParseUint(portText, 10, 16)
		if err != nil || port == 0 {
			return host{}, fmt.Errorf("port %q: want 1 to 65535", portText)
		}
		h.port = uint16(port)
	}
	var err error
	h.name, err = canonicalHost(name)
	return h, err
}

// canonicalHost gives a host its one spelling, or says why it has none.
func canonicalHost(name string) (string, error) {
	if name == "" {
		return "", errors.New("the host is empty")
	}
	if strings.ContainsRune(name, '%') {
		return "", errors.New("an address with a zone is not accepted")
	}
	if a, err := netip.ParseAddr(name); err == nil {
		if a.Is4In6() {
			return "", errors.New("an IPv4 address in IPv6 form: write it as IPv4")
		}
		return a.String(), nil
	}
	if len(name) > 253 || strings.HasSuffix(name, ".") || strings.HasPrefix(name, ".") || strings.Contains(name, "..") {
		return "", errors.New("not a host name: write it without a dot at the end")
	}
	for _, c := range []byte(name) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_') {
			return "", errors.New("not a host name in ASCII: write an international name in its xn-- form")
		}
	}
	last := name[strings.LastIndexByte(name, '.')+1:]
	if strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") || strings.HasPrefix(last, "0X") {
		// 2130706433, 0177.0.0.1 and 0x7f.1 are addresses to some resolvers
		return "", errors.New("a number that is no dotted address: write IPv4 as four decimal parts")
	}
	return strings.ToLower(name), nil
}

// allowed reports whether name and port are on the list.
func allowed(list []host, name string, port uint16) bool {
	return slices.ContainsFunc(list, func(h host) bool { return h.name == name && (h.port == 0 || h.port == port) })
}

// Schemas of the two tools. http_request takes any configured method.
var (
	getSchema = json.RawMessage(`{"type":"object","additionalProperties":false,"required":["endpoint"],"properties":{
"endpoint":{"type":"string","description":"http or https URL","minLength":1,"maxLength":8192},
"headers":{"type":"object","description":"request headers","maxProperties":32,"additionalProperties":{"type":"string","maxLength":4096}}}}`)
	requestSchema = `{"type":"object","additionalProperties":false,"required":["endpoint","method"],"properties":{
"endpoint":{"type":"string","description":"http or https URL","minLength":1,"maxLength":8192},
"method":{"type":"string","enum":%s},
"headers":{"type":"object","description":"request headers","maxProperties":32,"additionalProperties":{"type":"string","maxLength":4096}},
"body":{"type":"string","description":"request body","maxLength":1048576}}}`
)

// Schema is the JSON Schema of the params.
func (t *Tool) Schema() json.RawMessage {
	if t.cfg.Methods == nil {
		return getSchema
	}
	methods, _ := json.Marshal(t.cfg.Methods) // strings: cannot fail
	return json.RawMessage(fmt.Sprintf(requestSchema, methods))
}

type params struct {
	Endpoint string            `json:"endpoint"`
	Method   string            `json:"method"`
	Headers  map[string]string `json:"headers"`
	Body     string            `json:"body"`
}

type output struct {
	Status    int               `json:"status"`
	URL       string            `json:"url"`
	Headers   map[string]string `json:"headers"`
	Body      string            `json:"body"`
	Encoding  string            `json:"encoding,omitempty"`
	Truncated bool              `json:"truncated,omitempty"`
}

// Execute asks.
func (t *Tool) Execute(ctx context.Context, r *executor.Request) executor.Result {
	var p params
	if err := strictjson.Unmarshal(r.Params, &p); err != nil {
		return executor.Fail(CodeParams, err.Error())
	}
	if t.cfg.Methods == nil {
		if p.Method != "" || p.Body != "" {
			return executor.Fail(CodeParams, "this tool takes neither method nor body")
		}
		p.Method = http.MethodGet
	} else if !slices.Contains(t.cfg.Methods, p.Method) {
		return executor.Fail(CodeParams, fmt.Sprintf("method %q is not among the configured ones", p.Method))
	}
	header, err := requestHeader(p.Headers, r.Traceparent)
	if err != nil {
		return executor.Fail(CodeParams, err.Error())
	}
	g := gate{tool: t, max: t.cfg.MaxBytes}
	if n := r.Constraints.OutputMaxBytes; n > 0 {
		g.max = min(g.max, n)
	}
	if r.Constraints.Egress != nil {
		g.narrowed = true
		for _, e := range r.Constraints.Egress {
			h, err := parseHost(e)
			if err != nil {
				return executor.Deny("constraint_refused", fmt.Sprintf("policy's egress entry %q: %v", e, err))
			}
			g.egress = append(g.egress, h)
		}
	}
	u, err := parseURL(p.Endpoint)
	if err != nil {
		return executor.Fail(CodeParams, "endpoint: "+err.Error())
	}
	return g.follow(ctx, p.Method, u, header, p.Body)
}

func requestHeader(in map[string]string, traceparent string) (http.Header, error) {
	h := http.Header{"User-Agent": {"autonomy-node"}}
	for k, v := range in {
		name := http.CanonicalHeaderKey(k)
		if !token(k) || strings.ContainsFunc(v, func(r rune) bool { return r < 0x20 && r != '\t' || r == 0x7f }) {
			return nil, fmt.Errorf("header %q: want a name of letters, digits and -, and a value without control characters", k)
		}
		if slices.Contains(requestRefused, name) {
			return nil, fmt.Errorf("header %q cannot be set", k)
		}
		if _, twice := h[name]; twice && name != "User-Agent" {
			return nil, fmt.Errorf("header %q is set twice", k)
		}
		h[name] = []string{v}
	}
	if traceparent != "" {
		h["Traceparent"] = []string{traceparent}
	}
	return h, nil
}

func token(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_')
	})
}

// parseURL accepts an absolute http or https URL and nothing that two readers
// could take apart differently.
func parseURL(s string) (*url.URL, error) {
	if len(s) > maxURL {
		return nil, fmt.Errorf("the URL has %d bytes, at most %d", len(s), maxURL)
	}
	if i := strings.IndexFunc(s, func(r rune) bool { return r <= 0x20 || r == 0x7f || r == '\\' }); i >= 0 {
		return nil, fmt.Errorf("byte %d: blanks, control characters and backslashes must be escaped", i)
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("not a URL") // the parser's own text repeats the input
	}
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("scheme %q: want http or https", u.Scheme)
	case u.User != nil:
		return nil, errors.New("a user or password in the URL is not accepted: use a header")
	case u.Host == "" || u.Opaque != "":
		return nil, errors.New("want an absolute URL with a host")
	}
	u.Fragment, u.RawFragment = "", ""
	return u, nil
}

// gate is one call's way out.
type gate struct {
	tool     *Tool
	max      int64 // bytes of body kept
	narrowed bool  // policy gave an egress list
	egress   []host
}

// refusal is an error that makes the outcome denied.
type refusal struct{ msg string }

func (e *refusal) Error() string { return e.msg }

func refuse(format string, args ...any) error { return &refusal{fmt.Sprintf(format, args...)} }

// check decides about u as the lists and the resolver stand now, and returns
// the addresses that may be dialled.
func (g *gate) check(ctx context.Context, u *url.URL) ([]netip.AddrPort, error) {
	name, err := canonicalHost(u.Hostname())
	if err != nil {
		return nil, refuse("host %q: %v", u.Hostname(), err)
	}
	port := uint16(80)
	if u.Scheme == "https" {
		port = 443
	}
	if text := u.Port(); text != "" {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return nil, refuse("port %q: want 1 to 65535", text)
		}
		port = uint16(n)
	} else if strings.HasSuffix(u.Host, ":") {
		return nil, refuse("host %q: the port is missing after ':'", u.Host)
	}
	if !allowed(g.tool.hosts, name, port) {
		return nil, refuse("host %s port %d is not in this tool's hosts", name, port)
	}
	if g.narrowed && !allowed(g.egress, name, port) {
		return nil, refuse("host %s port %d is not in the egress list of the policy", name, port)
	}
	var addrs []netip.Addr
	if a, err := netip.ParseAddr(name); err == nil {
		addrs = []netip.Addr{a}
	} else if addrs, err = g.tool.cfg.Resolver.LookupNetIP(ctx, "ip", name); err != nil {
		return nil, fmt.Errorf("resolve %s: %w", name, errors.Join(errDNS, err))
	}
	switch {
	case len(addrs) == 0:
		return nil, fmt.Errorf("resolve %s: %w", name, errDNS)
	case len(addrs) > MaxAddresses:
		return nil, refuse("%s resolves to %d addresses, at most %d are accepted", name, len(addrs), MaxAddresses)
	}
	out := make([]netip.AddrPort, 0, len(addrs))
	for _, a := range addrs {
		if why := g.tool.inside(a); why != "" {
			if a.String() == name {
				return nil, refuse("%s is %s and not in allow_private", name, why)
			}
			return nil, refuse("%s resolves to %s, which is %s and not in allow_private", name, a, why)
		}
		out = append(out, netip.AddrPortFrom(a.Unmap(), port))
	}
	return out, nil
}

var errDNS = errors.New("no address")

// follow asks for u and for what it redirects to.
func (g *gate) follow(ctx context.Context, method string, u *url.URL, header http.Header, body string) executor.Result {
	for hop := 0; ; hop++ {
		addrs, err := g.check(ctx, u)
		if err != nil {
			if hop > 0 {
				return failed(ctx, err, fmt.Sprintf("redirect %d: ", hop))
			}
			return failed(ctx, err, "")
		}
		resp, err := g.ask(ctx, method, u, addrs, header, body)
		if err != nil {
			return failed(ctx, err, "")
		}
		location := resp.Header.Get("Location")
		if !slices.Contains([]int{301, 302, 303, 307, 308}, resp.StatusCode) || location == "" {
			return g.answer(ctx, u, resp)
		}
		resp.Body.Close()
		if hop == MaxRedirects {
			return executor.Fail(CodeHops, fmt.Sprintf("more than %d redirects", MaxRedirects))
		}
		next, err := u.Parse(location)
		if err == nil {
			next, err = parseURL(next.String())
		}
		if err != nil {
			return executor.Deny(CodeEgress, fmt.Sprintf("redirect %d: %v", hop+1, err))
		}
		if u.Scheme == "https" && next.Scheme == "http" {
			return executor.Deny(CodeEgress, fmt.Sprintf("redirect %d leads from https to http", hop+1))
		}
		if next.Scheme != u.Scheme || next.Host != u.Host {
			header = http.Header{"User-Agent": header["User-Agent"]} // the caller's headers were for the first origin
		}
		if resp.StatusCode <= 303 && method != http.MethodGet && method != http.MethodHead {
			method, body = http.MethodGet, ""
			header.Del("Content-Type")
		}
		u = next
	}
}

// ask sends one request to one of addrs.
func (g *gate) ask(ctx context.Context, method string, u *url.URL, addrs []netip.AddrPort, header http.Header, body string) (*http.Response, error) {
	tr := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, addrs) },
		TLSClientConfig:        g.tool.cfg.TLS.Clone(),
		TLSHandshakeTimeout:    dialTimeout,
		DisableKeepAlives:      true,
		DisableCompression:     true, // what arrives is what counts against the limit
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
	var rd io.Reader
	if body != "" {
		rd = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), rd)
	if err != nil {
		return nil, err
	}
	req.Header = header.Clone()
	return tr.RoundTrip(req)
}

// failed sorts an error into a Result.
func failed(ctx context.Context, err error, where string) executor.Result {
	var ref *refusal
	switch {
	case errors.As(err, &ref):
		return executor.Deny(CodeEgress, where+ref.msg)
	case ctx.Err() != nil:
		return executor.Stopped(ctx)
	case errors.Is(err, errDNS):
		return executor.Fail(CodeDNS, where+oneLine(err))
	}
	return executor.Fail(CodeConnect, where+oneLine(err))
}

func oneLine(err error) string {
	s := strings.ReplaceAll(err.Error(), "\n", "; ")
	return s[:min(len(s), 512)]
}

// answer reads the response into the output.
func (g *gate) answer(ctx context.Context, u *url.URL, resp *http.Response) executor.Result {
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, g.max+1))
	cut := int64(len(data)) > g.max
	if cut {
		data = data[:g.max]
	}
	out := output{Status: resp.StatusCode, URL: u.String(), Headers: map[string]string{}, Truncated: cut || err != nil}
	out.Body, out.Encoding = executor.Text(data, out.Truncated)
	for _, name := range ResponseHeaders {
		if v := resp.Header.Get(name); v != "" {
			out.Headers[strings.ToLower(name)] = strings.ToValidUTF8(v[:min(len(v), maxHeaderValue)], "\uFFFD")
		}
	}
	encoded, encErr := executor.Encode(out)
	if encErr != nil {
		return executor.Fail(CodeBody, encErr.Error())
	}
	switch {
	case err != nil && ctx.Err() != nil:
		r := executor.Stopped(ctx)
		r.Output = encoded
		return r
	case err != nil:
		return executor.Result{Outcome: executor.Error, Output: encoded, Code: CodeBody, Message: "the response ended early: " + oneLine(err)}
	}
	return executor.Result{Outcome: executor.OK, Output: encoded}
}
