package httptool

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// names is a resolver of the test's choice: each look-up of a name gives the
// next answer of its list, the last one for ever.
type names struct {
	answers map[string][][]netip.Addr
	asked   atomic.Int32
}

func (n *names) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	i := int(n.asked.Add(1)) - 1
	list, ok := n.answers[host]
	if !ok {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return list[min(i, len(list)-1)], nil
}

func addrs(s ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

var onlyLoopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}

func build(t *testing.T, cfg Config) *Tool {
	t.Helper()
	if cfg.Resolver == nil {
		cfg.Resolver = &names{}
	}
	x, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func get(t *testing.T, x *Tool, endpoint string) executor.Result {
	t.Helper()
	return ask(t, x, map[string]any{"endpoint": endpoint}, constraint.Constraints{})
}

func ask(t *testing.T, x *Tool, params map[string]any, c constraint.Constraints) executor.Result {
	t.Helper()
	b, err := json.Marshal(params)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	return x.Execute(ctx, &executor.Request{Params: b, Constraints: c, Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})
}

func decode(t *testing.T, r executor.Result) (out output) {
	t.Helper()
	if err := json.Unmarshal(r.Output, &out); err != nil {
		t.Fatalf("%+v: %v", r, err)
	}
	return out
}

func TestGet(t *testing.T) {
	var seen http.Header
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header
		w.Header().Set("Set-Cookie", "a=b")
		w.Header().Set("X-Internal", "1")
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusTeapot)
		io.WriteString(w, "grüße <b>")
	}))
	defer s.Close()
	x := build(t, Config{Hosts: []string{"127.0.0.1"}, AllowPrivate: onlyLoopback})
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	r := ask(t, x, map[string]any{"endpoint": s.URL + "/a?b=c", "headers": map[string]string{"Accept": "text/plain"}}, constraint.Constraints{})
	out := decode(t, r)
	if r.Outcome != executor.OK || out.Status != 418 || out.Body != "grüße <b>" || out.Encoding != "" || out.Truncated || out.URL != s.URL+"/a?b=c" {
		t.Errorf("result %+v, output %s", r, r.Output)
	}
	if out.Headers["content-type"] != "text/plain" || out.Headers["set-cookie"] != "" || out.Headers["x-internal"] != "" {
		t.Errorf("headers %v", out.Headers)
	}
	if seen.Get("Traceparent") == "" || seen.Get("Accept") != "text/plain" || seen.Get("Cookie") != "" || seen.Get("Accept-Encoding") != "" {
		t.Errorf("the server saw %v", seen)
	}
}

// TestRefused is the table of ways in. The server that stands behind all of them
// must not be asked once.
func TestRefused(t *testing.T) {
	var hits atomic.Int32
	l, err := net.Listen("tcp", "0.0.0.0:0") // all of 127.0.0.0/8 answers
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits.Add(1) })}}
	s.Start()
	defer s.Close()
	port := l.Addr().(*net.TCPAddr).Port
	resolver := &names{answers: map[string][][]netip.Addr{
		"inside.test":    {addrs("127.0.0.2")},
		"mixed.test":     {addrs("127.0.0.1", "10.0.0.1")},
		"mapped.test":    {addrs("::ffff:127.0.0.2")},
		"zone.test":      {addrs("fe80::1%lo")},
		"metadata.test":  {addrs("169.254.169.254")},
		"unspec.test":    {addrs("0.0.0.0")},
		"unspec6.test":   {addrs("::")},
		"ula.test":       {addrs("fd00::1")},
		"nat64.test":     {addrs("64:ff9b::7f00:1")},
		"sixtofour.test": {addrs("2002:7f00:1::")},
		"compat.test":    {addrs("::127.0.0.1")},
		"multicast.test": {addrs("224.0.0.1")},
		"cgnat.test":     {addrs("100.64.0.1")},
		"broadcast.test": {addrs("255.255.255.255")},
		"unassigned":     {addrs("4000::1")},
		"many.test":      {slices.Repeat(addrs("127.0.0.1"), MaxAddresses+1)},
		"empty.test":     {nil},
	}}
	hosts := []string{"127.0.0.1", "localhost", "0.0.0.0", "127.0.0.2", "[::1]", "10.0.0.1", "port.test:1"}
	for name := range resolver.answers {
		hosts = append(hosts, name)
	}
	x := build(t, Config{Hosts: hosts, AllowPrivate: onlyLoopback, Resolver: resolver})
	for _, tc := range []struct {
		url, code, want string
	}{
		// not on the list, or spelled so that it could be read in two ways
		{"http://other.test/", CodeEgress, "is not in this tool's hosts"},
		{"http://port.test:2/", CodeEgress, "port 2 is not in this tool's hosts"},
		{"http://127.0.0.1.other.test:%d/", CodeEgress, "is not in this tool's hosts"},
		{"http://2130706433:%d/", CodeEgress, "a number that is no dotted address"},
		{"http://0177.0.0.1:%d/", CodeEgress, "a number that is no dotted address"},
		{"http://0x7f000001:%d/", CodeEgress, "a number that is no dotted address"},
		{"http://0x7f.1:%d/", CodeEgress, "a number that is no dotted address"},
		{"http://127.1:%d/", CodeEgress, "a number that is no dotted address"},
		{"http://127.0.0.01:%d/", CodeEgress, "a number that is no dotted address"},
		{"http://[::ffff:127.0.0.1]:%d/", CodeEgress, "an IPv4 address in IPv6 form"},
		{"http://[::ffff:7f00:1]:%d/", CodeEgress, "an IPv4 address in IPv6 form"},
		{"http://[::1%%25lo]:%d/", CodeEgress, "zone"},
		{"http://127.0.0.1.:%d/", CodeEgress, "without a dot at the end"},
		{"http://localhost.:%d/", CodeEgress, "without a dot at the end"},
		{"http://１２７.0.0.1:%d/", CodeEgress, "not a host name in ASCII"},
		{"http://ⓛocalhost:%d/", CodeEgress, "not a host name in ASCII"},
		{"http://127.0.0.1:0/", CodeEgress, "port"},
		{"http://127.0.0.1:/", CodeEgress, "port is missing"},
		{"http://127.0.0.1:70000/", CodeEgress, "port"},
		// on the list, and leading inside
		{"http://127.0.0.2:%d/", CodeEgress, "127.0.0.2 is a loopback address"},
		{"http://0.0.0.0:%d/", CodeEgress, "an address of this host"},
		{"http://[::1]:%d/", CodeEgress, "a loopback address"},
		{"http://[0:0::1]:%d/", CodeEgress, "a loopback address"},
		{"http://10.0.0.1:%d/", CodeEgress, "a private address"},
		{"http://inside.test:%d/", CodeEgress, "resolves to 127.0.0.2, which is a loopback address"},
		{"http://INSIDE.test:%d/", CodeEgress, "resolves to 127.0.0.2"},
		{"http://mixed.test:%d/", CodeEgress, "10.0.0.1, which is a private address"},
		{"http://mapped.test:%d/", CodeEgress, "a loopback address"},
		{"http://zone.test:%d/", CodeEgress, "an address with a zone"},
		{"http://metadata.test:%d/", CodeEgress, "a link-local address"},
		{"http://unspec.test:%d/", CodeEgress, "an address of this host"},
		{"http://unspec6.test:%d/", CodeEgress, "an address of this host"},
		{"http://ula.test:%d/", CodeEgress, "a private address"},
		{"http://nat64.test:%d/", CodeEgress, "a translated IPv4 address"},
		{"http://sixtofour.test:%d/", CodeEgress, "a relay address"},
		{"http://compat.test:%d/", CodeEgress, "an IPv4-compatible address"},
		{"http://multicast.test:%d/", CodeEgress, "a multicast address"},
		{"http://cgnat.test:%d/", CodeEgress, "a carrier's private address"},
		{"http://broadcast.test:%d/", CodeEgress, "a reserved address"},
		{"http://unassigned:%d/", CodeEgress, "an unassigned address"},
		{"http://many.test:%d/", CodeEgress, "resolves to 17 addresses"},
		// not a request at all
		{"ftp://127.0.0.1:%d/", CodeParams, `scheme "ftp"`},
		{"file:///etc/passwd", CodeParams, `scheme "file"`},
		{"//127.0.0.1:%d/", CodeParams, `scheme ""`},
		{"http:127.0.0.1:%d/", CodeParams, "want an absolute URL"},
		{"http://user:pw@127.0.0.1:%d/", CodeParams, "user or password"},
		{"http://127.0.0.1:%d\\@other.test/", CodeParams, "backslashes"},
		{"http://127.0.0.1:%d/ HTTP/1.1\r\nX: y", CodeParams, "control characters"},
		{"http://127.0.0.1:%d/\x00", CodeParams, "control characters"},
		{"http://", CodeParams, "want an absolute URL"},
		{"", CodeParams, `scheme ""`},
		{"http://127.0.0.1:%d/" + strings.Repeat("a", maxURL), CodeParams, "at most 8192"},
		// nothing there
		{"http://empty.test:%d/", CodeDNS, "resolve empty.test"},
	} {
		endpoint := tc.url
		if strings.Contains(endpoint, "%d") {
			endpoint = fmt.Sprintf(tc.url, port)
		}
		r := get(t, x, endpoint)
		want := executor.Error
		if tc.code == CodeEgress {
			want = executor.Denied
		}
		if r.Outcome != want || r.Code != tc.code || !strings.Contains(r.Message, tc.want) || r.Output != nil {
			t.Errorf("%.80q: %s %s %q\nwant %s %s with %q", endpoint, r.Outcome, r.Code, r.Message, want, tc.code, tc.want)
		}
		if strings.Contains(r.Message, "pw@") {
			t.Errorf("%q: the message repeats a password: %s", endpoint, r.Message)
		}
	}
	if n := hits.Load(); n > 0 {
		t.Errorf("the server was asked %d times", n)
	}
}

// TestRebinding has a resolver that answers with a good address once and with a
// bad one ever after: the connection must go to the address that was checked,
// and there must be no second look-up.
func TestRebinding(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Host) }))
	defer s.Close()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	resolver := &names{answers: map[string][][]netip.Addr{"rebind.test": {addrs("127.0.0.1"), addrs("127.0.0.2")}}}
	x := build(t, Config{Hosts: []string{"rebind.test"}, AllowPrivate: onlyLoopback, Resolver: resolver})
	r := get(t, x, "http://rebind.test:"+u.Port()+"/")
	if out := decode(t, r); r.Outcome != executor.OK || out.Body != "rebind.test:"+u.Port() {
		t.Errorf("result %+v %s", r, r.Output)
	}
	if n := resolver.asked.Load(); n != 1 {
		t.Errorf("%d look-ups, want 1", n)
	}
	if r := get(t, x, "http://rebind.test:"+u.Port()+"/"); r.Code != CodeEgress {
		t.Errorf("the next call is not looked up again: %+v", r)
	}
}

func TestRedirects(t *testing.T) {
	var hits atomic.Int32
	target := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hits.Add(1)
		fmt.Fprintf(w, "%s %s %q %q", r.Method, r.URL.Path, r.Header.Get("Authorization"), must(io.ReadAll(r.Body)))
	}))
	defer target.Close()
	var location string
	status := http.StatusFound
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", location)
		w.WriteHeader(status)
	}))
	defer s.Close()
	port := func(raw string) string { return must(url.Parse(raw)).Port() }
	resolver := &names{answers: map[string][][]netip.Addr{"inside.test": {addrs("127.0.0.2")}}}
	x := build(t, Config{Hosts: []string{"127.0.0.1", "inside.test"}, AllowPrivate: onlyLoopback, Resolver: resolver, Methods: []string{"GET", "POST"}})
	for name, tc := range map[string]struct {
		location string
		status   int
		method   string
		outcome  executor.Outcome
		code     string
		text     string // in the message, or the body
	}{
		"to a listed host":            {target.URL + "/x", 302, "GET", executor.OK, "", `GET /x "" ""`},
		"303 turns POST into GET":     {target.URL, 303, "POST", executor.OK, "", `GET / "" ""`},
		"302 turns POST into GET":     {target.URL, 302, "POST", executor.OK, "", `GET / "" ""`},
		"307 keeps POST, no secrets":  {target.URL, 307, "POST", executor.OK, "", `POST / "" "hello"`},
		"to an unlisted address":      {"http://127.0.0.2:" + port(target.URL) + "/", 302, "GET", executor.Denied, CodeEgress, "redirect 1: host 127.0.0.2 port"},
		"to a name that leads inside": {"http://inside.test:" + port(target.URL) + "/", 302, "GET", executor.Denied, CodeEgress, "redirect 1: inside.test resolves to 127.0.0.2"},
		"relative to another host":    {"//127.0.0.2:" + port(target.URL) + "/", 302, "GET", executor.Denied, CodeEgress, "redirect 1"},
		"decimal form":                {"http://2130706434/", 302, "GET", executor.Denied, CodeEgress, "redirect 1"},
		"another scheme":              {"file:///etc/passwd", 302, "GET", executor.Denied, CodeEgress, `scheme "file"`},
		"with a password":             {"http://a:b@127.0.0.1/", 302, "GET", executor.Denied, CodeEgress, "user or password"},
		"not a URL":                   {"http://%zz", 302, "GET", executor.Denied, CodeEgress, "redirect 1"},
		"for ever":                    {"/again", 302, "GET", executor.Error, CodeHops, "more than 5 redirects"},
		"without a place":             {"", 302, "GET", executor.OK, "", ""},
		"304 is no redirect":          {target.URL, 304, "GET", executor.OK, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			location, status = tc.location, tc.status
			before := hits.Load()
			p := map[string]any{"endpoint": s.URL, "method": tc.method, "headers": map[string]string{"Authorization": "Bearer x"}}
			if tc.method == "POST" {
				p["body"] = "hello"
			}
			r := ask(t, x, p, constraint.Constraints{})
			if r.Outcome != tc.outcome || r.Code != tc.code {
				t.Fatalf("%s %s %q, want %s %s", r.Outcome, r.Code, r.Message, tc.outcome, tc.code)
			}
			text := r.Message
			if r.Outcome == executor.OK {
				text = decode(t, r).Body
			} else if hits.Load() != before {
				t.Error("the target was asked")
			}
			if !strings.Contains(text, tc.text) {
				t.Errorf("%q, want %q in it", text, tc.text)
			}
		})
	}
}

func TestDowngradeIsRefused(t *testing.T) {
	s := httptest.NewUnstartedServer(http.RedirectHandler("http://127.0.0.1:1/", http.StatusFound))
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // the second client refuses the certificate
	s.StartTLS()
	defer s.Close()
	tr := s.Client().Transport.(*http.Transport)
	x := build(t, Config{Hosts: []string{"127.0.0.1"}, AllowPrivate: onlyLoopback, TLS: tr.TLSClientConfig})
	if r := get(t, x, s.URL); r.Code != CodeEgress || !strings.Contains(r.Message, "from https to http") {
		t.Errorf("%+v", r)
	}
	x = build(t, Config{Hosts: []string{"127.0.0.1"}, AllowPrivate: onlyLoopback})
	if r := get(t, x, s.URL); r.Code != CodeConnect || r.Outcome != executor.Error {
		t.Errorf("an unknown certificate: %+v", r)
	}
}

func TestBodies(t *testing.T) {
	var body string
	var short bool
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if short {
			w.Header().Set("Content-Length", "100000")
		}
		io.WriteString(w, body)
	}))
	defer s.Close()
	x := build(t, Config{Hosts: []string{"127.0.0.1"}, AllowPrivate: onlyLoopback, MaxBytes: MaxMaxBytes})
	control := strings.Repeat("\x01", MaxMaxBytes)
	for name, tc := range map[string]struct {
		body           string
		limit          int64
		text, encoding string
		truncated      bool
	}{
		"empty":               {"", 0, "", "", false},
		"text":                {"a\nb", 0, "a\nb", "", false},
		"binary":              {"\xff\x00", 0, "/wA=", "base64", false},
		"exactly the limit":   {"abcd", 4, "abcd", "", false},
		"over the limit":      {"abcde", 4, "abcd", "", true},
		"cut in a character":  {"abcü", 4, "abc", "", true},
		"escapes blow it up":  {control, 0, base64.StdEncoding.EncodeToString([]byte(control)), "base64", false},
		"over all limits":     {strings.Repeat("x", MaxMaxBytes+1), 0, strings.Repeat("x", MaxMaxBytes), "", true},
		"policy cannot widen": {strings.Repeat("x", MaxMaxBytes+1), 1 << 40, strings.Repeat("x", MaxMaxBytes), "", true},
	} {
		t.Run(name, func(t *testing.T) {
			body = tc.body
			r := ask(t, x, map[string]any{"endpoint": s.URL}, constraint.Constraints{OutputMaxBytes: tc.limit})
			out := decode(t, r)
			if r.Outcome != executor.OK || out.Body != tc.text || out.Encoding != tc.encoding || out.Truncated != tc.truncated {
				t.Errorf("%s %s: body of %d bytes, encoding %q, truncated %v", r.Outcome, r.Message, len(out.Body), out.Encoding, out.Truncated)
			}
			if len(r.Output) > executor.MaxOutput {
				t.Errorf("the output has %d bytes", len(r.Output))
			}
		})
	}
	body, short = "partial", true
	if r := get(t, x, s.URL); r.Outcome != executor.Error || r.Code != CodeBody || decode(t, r).Body != "partial" || !decode(t, r).Truncated {
		t.Errorf("a body that breaks off: %+v %s", r, r.Output)
	}
}

func TestEnds(t *testing.T) {
	release := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "begin")
		w.(http.Flusher).Flush()
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	defer s.Close()
	defer close(release)
	x := build(t, Config{Hosts: []string{"127.0.0.1"}, AllowPrivate: onlyLoopback})
	req := &executor.Request{Params: []byte(`{"endpoint":"` + s.URL + `"}`)}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if r := x.Execute(ctx, req); r.Outcome != executor.Timeout || decode(t, r).Body != "begin" {
		t.Errorf("timeout: %+v %s", r, r.Output)
	}
	ctx, stop := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, stop)
	if r := x.Execute(ctx, req); r.Outcome != executor.Killed {
		t.Errorf("cancel: %+v", r)
	}
}

func TestConstraintsNarrow(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
	defer s.Close()
	x := build(t, Config{Hosts: []string{"127.0.0.1"}, AllowPrivate: onlyLoopback})
	host := strings.TrimPrefix(s.URL, "http://")
	for _, tc := range []struct {
		egress []string
		want   executor.Outcome
	}{
		{nil, executor.OK}, {[]string{host}, executor.OK}, {[]string{"127.0.0.1"}, executor.OK},
		{[]string{}, executor.Denied}, {[]string{"127.0.0.1:1"}, executor.Denied}, {[]string{"api.example.com:443"}, executor.Denied}, {[]string{"a b"}, executor.Denied},
	} {
		if r := ask(t, x, map[string]any{"endpoint": s.URL}, constraint.Constraints{Egress: tc.egress}); r.Outcome != tc.want {
			t.Errorf("egress %q: %s %s, want %s", tc.egress, r.Outcome, r.Message, tc.want)
		}
	}
}

func TestBadParams(t *testing.T) {
	x := build(t, Config{Hosts: []string{"127.0.0.1"}, AllowPrivate: onlyLoopback})
	for _, tc := range []struct{ params, want string }{
		{`{"endpoint":"http://127.0.0.1:1/","method":"POST"}`, "takes neither method"},
		{`{"endpoint":"http://127.0.0.1:1/","body":"x"}`, "takes neither method"},
		{`{"endpoint":"http://127.0.0.1:1/","headers":{"Host":"other"}}`, `header "Host" cannot be set`},
		{`{"endpoint":"http://127.0.0.1:1/","headers":{"cookie":"a=b"}}`, `header "cookie" cannot be set`},
		{`{"endpoint":"http://127.0.0.1:1/","headers":{"transfer-encoding":"chunked"}}`, `cannot be set`},
		{`{"endpoint":"http://127.0.0.1:1/","headers":{"A":"x\r\nHost: y"}}`, "without control characters"},
		{`{"endpoint":"http://127.0.0.1:1/","headers":{"A b":"x"}}`, "want a name of letters"},
		{`{"endpoint":"http://127.0.0.1:1/","headers":{"A":"1","a":"2"}}`, "is set twice"},
		{`{"endpoint":"http://127.0.0.1:1/","endpoint":"http://other/"}`, "duplicate key"},
		{`{"Endpoint":"http://127.0.0.1:1/"}`, "unknown key"},
		{`{`, "want a key"},
	} {
		r := x.Execute(t.Context(), &executor.Request{Params: []byte(tc.params)})
		if r.Outcome != executor.Error || r.Code != CodeParams || !strings.Contains(r.Message, tc.want) {
			t.Errorf("%s: %s %s %q, want %q", tc.params, r.Outcome, r.Code, r.Message, tc.want)
		}
	}
}

// TestPublicAddresses are let through by the judgement (nothing is dialled).
func TestPublicAddresses(t *testing.T) {
	x := build(t, Config{Hosts: []string{"a"}})
	for _, a := range addrs("1.1.1.1", "8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8") {
		if why := x.inside(a); why != "" {
			t.Errorf("%s is refused as %s", a, why)
		}
	}
}

func FuzzCheck(f *testing.F) {
	for _, s := range []string{"http://127.0.0.1/", "http://[::1]:80/", "http://a.test:1/x?y#z", "http://0x7f.1/", "https://good.test/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := parseURL(s)
		if err != nil {
			return
		}
		x, err := New(Config{Hosts: []string{"good.test", "127.0.0.1"}, Resolver: &names{answers: map[string][][]netip.Addr{"good.test": {addrs("1.1.1.1")}}}})
		if err != nil {
			t.Fatal(err)
		}
		g := gate{tool: x}
		to, err := g.check(t.Context(), u)
		var ref *refusal
		if err != nil && !errors.As(err, &ref) {
			t.Fatalf("%q: %v", s, err)
		}
		for _, a := range to {
			if a.Addr() != netip.MustParseAddr("1.1.1.1") {
				t.Fatalf("%q leads to %s", s, a)
			}
		}
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
