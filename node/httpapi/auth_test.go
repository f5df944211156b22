package httpapi_test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/node/httpapi"
)

// withAuth serves with the callers that o describes.
func withAuth(t *testing.T, o auth.Options, more func(*httpapi.Options)) (*api, *auth.Authenticator) {
	t.Helper()
	o.Logger = slog.New(slog.DiscardHandler)
	x, err := auth.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return serve(t, func(h *httpapi.Options) {
		h.Auth = x
		if more != nil {
			more(h)
		}
	}), x
}

func tokenFile(t *testing.T, principals ...string) (file string, tokens []string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "tokens.json")
	if err := auth.EditTokens(file, func(f *auth.TokenFile) error {
		for _, p := range principals {
			token, _, err := f.Create(p, time.Now(), time.Hour)
			if err != nil {
				return err
			}
			tokens = append(tokens, token)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return file, tokens
}

// records counts what the log holds, and finds the callers in it.
func (a *api) callers() (out []string) {
	a.t.Helper()
	for seq := uint64(1); seq < a.log.Stats().NextSeq; seq++ {
		if err := a.log.WaitDurable(a.t.Context(), seq); err != nil {
			a.t.Fatal(err)
		}
		payload, _, err := a.log.Get(seq)
		if err != nil {
			a.t.Fatal(err)
		}
		if _, rest, ok := strings.Cut(string(payload), `"caller":{"type":"`); ok {
			kind, rest, _ := strings.Cut(rest, `","id":"`)
			id, _, _ := strings.Cut(rest, `"`)
			out = append(out, kind+":"+id)
		}
	}
	return out
}

func TestTokens(t *testing.T) {
	file, tokens := tokenFile(t, "ci", "ops")
	var refused []string
	a, x := withAuth(t, auth.Options{Tokens: file}, func(o *httpapi.Options) { o.Refused = func(what string) { refused = append(refused, what) } })
	call := func(header string, status int) *http.Response {
		t.Helper()
		resp, body := a.request("POST", "/v1/tool", header, `{"kind":"tool.echo"}`)
		if resp.StatusCode != status {
			t.Errorf("%q: %d %s, want %d", clip(header), resp.StatusCode, body, status)
		}
		for _, token := range tokens {
			if strings.Contains(body, token) {
				t.Errorf("%q: the answer repeats a token: %s", clip(header), body)
			}
		}
		return resp
	}
	call("Authorization: Bearer "+tokens[0]+"\r\n", 200)
	call("authorization: bearer   "+tokens[1]+"\r\n", 200)
	if got := fmt.Sprint(a.callers()); got != "[token:ci token:ops]" {
		t.Errorf("callers %s", got)
	}
	if resp := call("", 401); resp.Header.Get("WWW-Authenticate") != "Bearer" {
		t.Errorf("%v", resp.Header)
	}
	if resp := call("Authorization: Bearer "+tokens[0][:20]+"\r\n", 401); !strings.Contains(resp.Header.Get("WWW-Authenticate"), "invalid_token") {
		t.Errorf("%v", resp.Header)
	}
	call("Authorization: "+tokens[0]+"\r\n", 401)
	call("Authorization: Bearer "+tokens[0]+", Bearer "+tokens[1]+"\r\n", 401)
	call("Authorization: Bearer "+tokens[0]+"\r\nAuthorization: Bearer "+tokens[1]+"\r\n", 400)
	if len(refused) != 3 {
		t.Errorf("refused %q, want three", refused)
	}
	// Each path but the public ones asks for a credential, with every method.
	for _, path := range []string{"/", "/v1/tool", "/v1/tools", "/v1/status", "/v1/calls/x", "/metrics", "/v1/data/autonomy/allow",
		"/access/v1/evaluation", "/access/v1/evaluations", "/.well-known/authzen-configuration", "/mcp", "/healthz/", "/readyz/../metrics", "//healthz/../v1/tools"} {
		for _, method := range []string{"GET", "POST", "DELETE", "OPTIONS"} {
			if resp, body := a.request(method, path, "", ""); resp.StatusCode != 401 {
				t.Errorf("%s %s: %d %s", method, path, resp.StatusCode, body)
			}
		}
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if resp, body := a.request("GET", path, "", ""); resp.StatusCode != 200 {
			t.Errorf("%s: %d %s", path, resp.StatusCode, body)
		}
		if resp, _ := a.request("GET", path, "Authorization: Bearer x\r\n", ""); resp.StatusCode != 401 {
			t.Errorf("%s with a token that does not hold: %d", path, resp.StatusCode)
		}
	}
	a.ready = []string{"policy: none is active"}
	if resp, body := a.request("GET", "/readyz", "", ""); resp.StatusCode != 503 || strings.Contains(body, "policy") {
		t.Errorf("readyz for nobody: %d %s", resp.StatusCode, body)
	}
	if resp, body := a.request("GET", "/readyz", "Authorization: Bearer "+tokens[1]+"\r\n", ""); resp.StatusCode != 503 || !strings.Contains(body, "policy") {
		t.Errorf("readyz: %d %s", resp.StatusCode, body)
	}
	// A revoked token is refused on the connection that it has open.
	c, err := net.Dial("tcp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	br := bufio.NewReader(c)
	on := func() int {
		t.Helper()
		fmt.Fprintf(c, "GET /v1/tools HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n\r\n", a.addr, tokens[0])
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	if got := on(); got != 200 {
		t.Errorf("%d", got)
	}
	if err := auth.EditTokens(file, func(f *auth.TokenFile) error { return f.Revoke(tokens[0][5:21], time.Now()) }); err != nil {
		t.Fatal(err)
	}
	x.Reload(false)
	if got := on(); got != 401 {
		t.Errorf("revoked: %d", got)
	}
}

// TestHostTable: every listener's Host and Origin rule.
func TestHostTable(t *testing.T) {
	a, _ := withAuth(t, auth.Options{Anonymous: true}, func(o *httpapi.Options) { o.AllowedHosts = []string{"node.example.org"} })
	_, port, _ := net.SplitHostPort(a.addr)
	for _, tc := range []struct {
		host, origin string
		status       int
	}{
		{a.addr, "", 200},
		{"LocalHost:" + port, "", 200},
		{"node.example.org", "", 200},
		{"NODE.example.org:443", "", 200},
		{"node.example.org.:" + port, "", 403},
		{"node.example.org.evil.test", "", 403},
		{"evil.test:" + port, "", 403},
		{"[::1]:" + port, "", 403}, // another listener's address
		{"127.0.0.1:1", "", 403},
		{"2130706433:" + port, "", 403},
		{"0x7f.1:" + port, "", 403},
		{"127.0.0.1:" + port + "@evil.test", "", 403},
		{"evil.test?" + a.addr, "", 400},
		{a.addr, "http://" + a.addr, 200},
		{a.addr, "https://" + a.addr, 403},
		{a.addr, "http://evil.test", 403},
		{a.addr, "null", 403},
		{a.addr, "http://" + a.addr + ".evil.test", 403},
		{"localhost:" + port, "http://" + a.addr, 403}, // the same server, another origin
		{"localhost:" + port, "http://localhost:" + port, 200},
		{"node.example.org", "http://node.example.org", 200},
	} {
		headers := "Host: " + tc.host + "\r\n"
		if tc.origin != "" {
			headers += "Origin: " + tc.origin + "\r\n"
		}
		for _, path := range []string{"/healthz", "/v1/tools", "/nowhere"} {
			resp, body := a.raw("tcp", "GET "+path+" HTTP/1.1\r\n"+headers+"\r\n")
			want := tc.status
			if want == 200 && path == "/nowhere" {
				want = 404
			}
			if resp.StatusCode != want {
				t.Errorf("%s, Host %q, Origin %q: %d %s, want %d", path, tc.host, tc.origin, resp.StatusCode, clip(body), want)
			}
		}
	}
	// An absolute request target names a host, too: it counts.
	resp, body := a.raw("tcp", "GET http://evil.test/healthz HTTP/1.1\r\nHost: "+a.addr+"\r\n\r\n")
	if resp.StatusCode != 400 {
		t.Errorf("absolute target: %d %s", resp.StatusCode, body)
	}
}

// TestFraming sends bytes that two readers could take apart differently. Each is
// refused and the connection closed: what follows on it is never a request.
func TestFraming(t *testing.T) {
	file, tokens := tokenFile(t, "ci")
	a, _ := withAuth(t, auth.Options{Tokens: file, Anonymous: true}, nil)
	body := `{"kind":"tool.echo"}`
	n := fmt.Sprint(len(body))
	smuggled := "POST /v1/tool HTTP/1.1\r\nHost: " + a.addr + "\r\nAuthorization: Bearer " + tokens[0] + "\r\nContent-Length: " + n + "\r\n\r\n" + body
	post := func(headers, body string) string {
		return "POST /v1/tool HTTP/1.1\r\nHost: " + a.addr + "\r\n" + headers + "\r\n" + body
	}
	chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body)
	for name, tc := range map[string]struct {
		in     string
		status []int // any of; 0: closed without an answer
	}{
		"CL and TE":                      {post("Content-Length: "+n+"\r\nTransfer-Encoding: chunked\r\n", chunked+smuggled), []int{400}},
		"TE and CL":                      {post("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", chunked+smuggled), []int{400}},
		"two lengths":                    {post("Content-Length: "+n+"\r\nContent-Length: 0\r\n", body+smuggled), []int{400}},
		"two equal lengths":              {post("Content-Length: "+n+"\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"a list of lengths":              {post("Content-Length: "+n+", "+n+"\r\n", body+smuggled), []int{400}},
		"a signed length":                {post("Content-Length: +"+n+"\r\n", body+smuggled), []int{400}},
		"a hexadecimal length":           {post("Content-Length: 0x14\r\n", body+smuggled), []int{400}},
		"a negative length":              {post("Content-Length: -20\r\n", body+smuggled), []int{400}},
		"a length with a blank":          {post("Content-Length: 2 0\r\n", body+smuggled), []int{400}},
		"an endless length":              {post("Content-Length: 99999999999999999999999\r\n", body+smuggled), []int{400}},
		"TE twice":                       {post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", chunked+smuggled), []int{400}},
		"TE identity":                    {post("Transfer-Encoding: identity\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"TE unknown":                     {post("Transfer-Encoding: xchunked\r\n", chunked+smuggled), []int{400}},
		"TE list":                        {post("Transfer-Encoding: gzip, chunked\r\n", chunked+smuggled), []int{400}},
		"TE with a tab":                  {post("Transfer-Encoding:\tchunked\r\nContent-Length: 4\r\n", chunked+smuggled), []int{400}},
		"TE with vertical tab":           {post("Transfer-Encoding: \vchunked\r\n", chunked+smuggled), []int{400}},
		"TE with a blank before ':'":     {post("Transfer-Encoding : chunked\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"CL with a blank before ':'":     {post("Content-Length : "+n+"\r\n", body+smuggled), []int{400}},
		"TE in HTTP/1.0":                 {strings.Replace(post("Transfer-Encoding: chunked\r\n", chunked+smuggled), "HTTP/1.1", "HTTP/1.0", 1), []int{400}},
		"folded":                         {post("X: a\r\n b\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"folded length":                  {post("Content-Length:\r\n "+n+"\r\n", body+smuggled), []int{400}},
		"folded TE":                      {post("Transfer-Encoding:\r\n chunked\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"a line ends in LF":              {post("X: a\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"a line ends in CR":              {post("X: a\rContent-Length: 0\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"the head ends in LF":            {"POST /v1/tool HTTP/1.1\r\nHost: " + a.addr + "\r\nContent-Length: " + n + "\n\n" + body + smuggled, []int{400}},
		"NUL in a value":                 {post("X: a\x00b\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"NUL in a name":                  {post("X\x00: a\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"a header without ':'":           {post("Content-Length\r\n", body+smuggled), []int{400}},
		"a header without a name":        {post(": x\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"two hosts":                      {post("Host: evil.test\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"no host":                        {"POST /v1/tool HTTP/1.1\r\nContent-Length: " + n + "\r\n\r\n" + body + smuggled, []int{400}},
		"a first header with a blank":    {"POST /v1/tool HTTP/1.1\r\n Host: " + a.addr + "\r\nContent-Length: " + n + "\r\n\r\n" + body + smuggled, []int{400}},
		"three words and more":           {strings.Replace(post("Content-Length: "+n+"\r\n", body+smuggled), "/v1/tool HTTP", "/v1/tool x HTTP", 1), []int{400}},
		"another version":                {strings.Replace(post("Content-Length: "+n+"\r\n", body+smuggled), "HTTP/1.1", "HTTP/2.0", 1), []int{400, 505}},
		"no version":                     {strings.Replace(post("Content-Length: "+n+"\r\n", body+smuggled), " HTTP/1.1", "", 1), []int{400, 505}},
		"a chunk without a length":       {post("Transfer-Encoding: chunked\r\n", "\r\n"+body+"\r\n0\r\n\r\n"+smuggled), []int{400}},
		"a chunk length with 0x":         {post("Transfer-Encoding: chunked\r\n", "0x14\r\n"+body+"\r\n0\r\n\r\n"+smuggled), []int{400}},
		"a signed chunk length":          {post("Transfer-Encoding: chunked\r\n", "+14\r\n"+body+"\r\n0\r\n\r\n"+smuggled), []int{400}},
		"an endless chunk length":        {post("Transfer-Encoding: chunked\r\n", "ffffffffffffffffff\r\n"+body+"\r\n0\r\n\r\n"+smuggled), []int{400, 413}},
		"a chunk longer than it says":    {post("Transfer-Encoding: chunked\r\n", "4\r\n"+body+"\r\n0\r\n\r\n"+smuggled), []int{400}},
		"a chunk that ends in LF":        {post("Transfer-Encoding: chunked\r\n", "14\n"+body+"\n0\n\n"+smuggled), []int{400}},
		"a chunk size line ends in LF":   {post("Transfer-Encoding: chunked\r\n", "14\n"+body+"\r\n0\r\n\r\n"+smuggled), []int{400}},
		"a chunk extension with LF":      {post("Transfer-Encoding: chunked\r\n", "14;a\nb\r\n"+body+"\r\n0\r\n\r\n"+smuggled), []int{400}},
		"the last chunk ends in LF":      {post("Transfer-Encoding: chunked\r\n", "14\r\n"+body+"\r\n0\n\n"+smuggled), []int{400, 0}},
		"a trailer that frames":          {post("Transfer-Encoding: chunked\r\nTrailer: Content-Length\r\n", "14\r\n"+body+"\r\n0\r\nContent-Length: 5\r\n\r\n"+smuggled), []int{400}},
		"two authorizations":             {post("Authorization: Bearer x\r\nAuthorization: Bearer "+tokens[0]+"\r\nContent-Length: "+n+"\r\n", body+smuggled), []int{400}},
		"a token that does not hold":     {post("Authorization: Bearer x\r\nContent-Length: 0\r\nConnection: close\r\n", smuggled), []int{401}},
		"an upgrade with bytes behind":   {"GET /v1/tools HTTP/1.1\r\nHost: evil.test\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings, close\r\n\r\n" + smuggled, []int{403}},
		"CONNECT with bytes behind":      {"CONNECT evil.test:80 HTTP/1.1\r\nHost: evil.test:80\r\nConnection: close\r\n\r\n" + smuggled, []int{400, 403, 405}},
		"the preface of another version": {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + smuggled, []int{400, 505}},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("tcp", a.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			before := a.log.Stats().NextSeq
			go func() {
				_, _ = io.WriteString(c, tc.in) // refused while it is written: that is the point
				if tc.status[len(tc.status)-1] == 0 {
					_ = c.(*net.TCPConn).CloseWrite()
				}
			}()
			br := bufio.NewReader(c)
			status := 0
			if resp, err := http.ReadResponse(br, nil); err == nil {
				status = resp.StatusCode
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			ok := false
			for _, want := range tc.status {
				ok = ok || status == want
			}
			if !ok {
				t.Errorf("status %d, want %v", status, tc.status)
			}
			// Nothing of what follows is answered.
			if rest, err := io.ReadAll(br); len(rest) > 0 {
				t.Errorf("a second answer: %q (%v)", clip(string(rest)), err)
			}
			if after := a.log.Stats().NextSeq; after != before {
				t.Errorf("%d records: something was evaluated", after-before)
			}
		})
	}
	// What is unusual and has one reading is served.
	for name, in := range map[string]string{
		"chunked":                post("Transfer-Encoding: chunked\r\n", chunked),
		"chunked in pieces":      post("Transfer-Encoding: chunked\r\n", "1\r\n{\r\n13\r\n"+body[1:]+"\r\n0\r\n\r\n"),
		"a chunk extension":      post("Transfer-Encoding: chunked\r\n", "14;a=b\r\n"+body+"\r\n0\r\n\r\n"),
		"a length with zeros":    post("Content-Length: 0020\r\n", body),
		"a request line in LF":   strings.Replace(post("Content-Length: "+n+"\r\n", body), "HTTP/1.1\r\n", "HTTP/1.1\n", 1),
		"CR LF before a request": "\r\n" + post("Content-Length: "+n+"\r\n", body),
	} {
		if resp, out := a.raw("tcp", in); resp.StatusCode != 200 {
			t.Errorf("%s: %d %s", name, resp.StatusCode, out)
		}
	}
}

// TestPipelined: requests that come in one write are answered in their order,
// each as its own caller: a credential holds for its request, not for those
// behind it.
func TestPipelined(t *testing.T) {
	file, tokens := tokenFile(t, "ci", "ops")
	a, _ := withAuth(t, auth.Options{Tokens: file, Anonymous: true}, nil)
	c, err := net.Dial("tcp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var in strings.Builder
	type want struct {
		status int
		text   string
	}
	var wants []want
	for i := range 40 {
		text := fmt.Sprintf("n%d", i)
		b := fmt.Sprintf(`{"kind":"tool.echo","params":{"text":%q}}`, text)
		auth, w := "", want{200, text}
		switch i % 4 {
		case 0:
			auth = "Authorization: Bearer " + tokens[0] + "\r\n"
		case 1:
			auth = "Authorization: Bearer " + tokens[1] + "\r\n"
		case 2:
			auth, w = "Authorization: Bearer nope\r\n", want{401, "not valid"}
		}
		fmt.Fprintf(&in, "POST /v1/tool HTTP/1.1\r\nHost: %s\r\n%sContent-Length: %d\r\n\r\n%s", a.addr, auth, len(b), b)
		wants = append(wants, w)
	}
	go io.WriteString(c, in.String())
	br := bufio.NewReader(c)
	for i, w := range wants {
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(i, err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != w.status || !strings.Contains(string(body), w.text) {
			t.Fatalf("%d: %d %s, want %d %s", i, resp.StatusCode, body, w.status, w.text)
		}
	}
	got := strings.Join(a.callers(), " ")
	if want := strings.TrimSpace(strings.Repeat("token:ci token:ops anonymous:loopback ", 10)); got != want {
		t.Errorf("callers %s\nwant    %s", got, want)
	}
}

// TestTLS: the real server over TLS with client certificates.
func TestTLS(t *testing.T) {
	dir := t.TempDir()
	ca, caKey := certificate(t, "ca", nil, nil)
	server, serverKey := certificate(t, "node", ca, caKey)
	write := func(name, kind string, der []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(serverKey)
	if err != nil {
		t.Fatal(err)
	}
	a, _ := withAuth(t, auth.Options{TLS: auth.TLSFiles{
		Cert: write("cert.pem", "CERTIFICATE", server.Raw), Key: write("key.pem", "PRIVATE KEY", keyDER), ClientCA: write("ca.pem", "CERTIFICATE", ca.Raw)}}, nil)
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	client := func(certs ...tls.Certificate) *http.Client {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: certs}}
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr, Timeout: 20 * time.Second}
	}
	leaf, leafKey := certificate(t, "agent-1", ca, caKey)
	known := client(tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: leafKey})
	for range 2 { // the second on the same connection
		resp, err := known.Post("https://"+a.addr+"/v1/tool", "application/json", strings.NewReader(`{"kind":"tool.echo"}`))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 {
			t.Errorf("%d %s", resp.StatusCode, body)
		}
	}
	if got := fmt.Sprint(a.callers()); got != "[cert:agent-1 cert:agent-1]" {
		t.Errorf("callers %s", got)
	}
	other, otherKey := certificate(t, "other", nil, nil)
	for name, c := range map[string]*http.Client{"none": client(), "of another CA": client(tls.Certificate{Certificate: [][]byte{other.Raw}, PrivateKey: otherKey})} {
		if resp, err := c.Get("https://" + a.addr + "/healthz"); err == nil {
			resp.Body.Close()
			t.Errorf("a certificate %s: %s", name, resp.Status)
		}
	}
	// Plain HTTP is answered by nothing that looks like the API.
	plain, err := net.Dial("tcp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	fmt.Fprintf(plain, "GET /healthz HTTP/1.1\r\nHost: %s\r\n\r\n", a.addr)
	if out, err := io.ReadAll(plain); strings.Contains(string(out), "HTTP/1.1 200") || err != nil && !errors.Is(err, io.EOF) && len(out) == 0 && !strings.Contains(err.Error(), "reset") {
		t.Errorf("%q, %v", out, err)
	}
}

// certificate makes one, signed by itself without parent.
func certificate(t *testing.T, name string, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	if parent == nil {
		tpl.IsCA, tpl.BasicConstraintsValid, tpl.KeyUsage = true, true, x509.KeyUsageCertSign
		parent, parentKey = tpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c, key
}
