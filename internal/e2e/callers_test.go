package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/testutil"
)

// lone is a node without control plane and relay, and its own policy and tools.
type lone struct {
	t    *testing.T
	dir  string
	node *testutil.Process
	url  string
	http *http.Client
}

const loneTools = `tools:
  tool.echo: {}
  tool.exec.mark:
    argv: [/bin/sh, -c, "echo run >> \"$0\"; exec sleep \"$1\"", "{file}", "{seconds}"]
    params:
      file: {type: string}
      seconds: {type: string}
    fs: ["rw:MARKS"]
`

func newLone(t *testing.T, listen string, args ...string) *lone {
	t.Helper()
	l := &lone{t: t, dir: t.TempDir(), http: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	l.write("policy/p.rego", "package autonomy\n\nimport rego.v2\n\ndefault decision := {\"allow\": false}\n\ndecision := {\"allow\": true} if input.kind in {\"tool.echo\", \"tool.exec.mark\"}\n")
	marks := l.path("marks")
	if err := errors.Join(os.Mkdir(marks, 0o700), os.Chmod(marks, 0o777)); err != nil { // a program in the sandbox has a user of its own
		t.Fatal(err)
	}
	l.write("tools.yaml", strings.ReplaceAll(loneTools, "MARKS", marks))
	out, err := exec.Command(testutil.Build(t, "autonomy"), "policy", "build", l.path("policy"), "--name", "p", "--version", "1.0.0", "--out", l.path("p.tar.gz")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l.node = testutil.Command{Path: testutil.Build(t, "autonomy-node"), Args: append([]string{"--listen", listen, "--state-dir", l.path("state"),
		"--policy", l.path("p.tar.gz"), "--tools", l.path("tools.yaml"), "--wal-max-bytes=8MiB", "--wal-segment-bytes=1MiB", "--keep-free=0"}, args...)}.Start(t)
	l.url = "http://" + l.node.Addr(t)
	return l
}

func (l *lone) path(parts ...string) string {
	return filepath.Join(append([]string{l.dir}, parts...)...)
}

func (l *lone) write(name, content string) {
	l.t.Helper()
	path := l.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		l.t.Fatal(err)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(content), 0o600); err != nil {
		l.t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		l.t.Fatal(err)
	}
}

type reply struct {
	answer
	Error    struct{ Code, Message string } `json:"error"`
	Replayed bool                           `json:"-"`
}

func (l *lone) call(body, token string) (reply, error) {
	req, err := http.NewRequest(http.MethodPost, l.url+"/v1/tool", strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := l.http.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return reply{}, err
	}
	var r reply
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("%w: %s", err, data)
	}
	r.Status, r.Replayed = resp.StatusCode, resp.Header.Get("Idempotent-Replay") == "true"
	return r, nil
}

func (l *lone) must(body, token string) reply {
	l.t.Helper()
	r, err := l.call(body, token)
	if err != nil {
		l.t.Fatal(err)
	}
	return r
}

func (l *lone) restart() {
	l.t.Helper()
	l.node = l.node.Restart(l.t)
	l.url = l.url[:strings.Index(l.url, "://")+3] + l.node.Addr(l.t)
}

// runs is how often the tool wrote its mark.
func (l *lone) runs(file string) int {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	return bytes.Count(data, []byte("run\n"))
}

// TestIdempotency: the same call_id is the same call, while it runs, after it,
// and after the node was stopped or killed in the middle of it.
func TestIdempotency(t *testing.T) {
	l := newLone(t, "127.0.0.1:0")
	mark := func(id, file, seconds string) string {
		return fmt.Sprintf(`{"kind":"tool.exec.mark","params":{"file":%q,"seconds":%q},"call_id":%q}`, file, seconds, id)
	}
	done, cut := l.path("marks/done"), l.path("marks/cut")

	first := l.must(mark("a", done, "0"), "")
	if first.Status != 200 || first.Outcome != "ok" || first.Replayed {
		t.Fatalf("%+v", first)
	}
	again := func(when string) {
		t.Helper()
		if r := l.must(mark("a", done, "0"), ""); !r.Replayed || r.AuditID != first.AuditID || r.Outcome != "ok" || l.runs(done) != 1 {
			t.Errorf("%s: %+v, %d runs", when, r, l.runs(done))
		}
		if r := l.must(mark("a", done, "1"), ""); r.Status != 409 || r.Code != "call_id_reused" {
			t.Errorf("%s, other params: %+v", when, r)
		}
	}
	again("at once")

	// Killed between decision and action: the tool has begun, nobody knows how it ended.
	gone := make(chan error, 1)
	go func() {
		_, err := l.call(mark("b", cut, "30"), "")
		gone <- err
	}()
	testutil.Eventually(t, timeout, "the tool runs", func() error {
		if l.runs(cut) == 0 {
			return fmt.Errorf("no mark yet")
		}
		return nil
	})
	if r := l.must(strings.TrimSuffix(mark("b", cut, "30"), "}")+`,"timeout_ms":50}`, ""); r.Status != 503 || r.Code != "first_call_running" {
		t.Errorf("while the first runs: %+v", r)
	}
	l.node.Kill(t)
	if err := <-gone; err == nil {
		t.Error("the cut off call was answered")
	}
	if _, err := os.Stat(l.path("state", "calls")); err == nil {
		t.Error("a file of finished calls was written before the first clean stop")
	}
	for round, stop := range []func(){func() {}, func() { l.node.Kill(t) }, func() { l.node.Stop(t) }} {
		stop()
		l.restart()
		again(fmt.Sprintf("round %d", round))
		r := l.must(mark("b", cut, "30"), "")
		if r.Status != 200 || !r.Replayed || r.Outcome != "error" || r.Error.Code != "outcome_unknown" || l.runs(cut) != 1 {
			t.Errorf("round %d: %+v, %d runs", round, r, l.runs(cut))
		}
	}
	if _, err := os.Stat(l.path("state", "calls")); err != nil {
		t.Errorf("after a clean stop: %v", err)
	}
	// A damaged file is passed over, a lost one too.
	l.node.Stop(t)
	l.write("state/calls", "autonomy calls 1\njunk")
	l.restart()
	again("with a damaged file")
}

// TestCallers: tokens, client certificates and a revocation list on a real node;
// what is taken away is refused within seconds, without a restart.
func TestCallers(t *testing.T) {
	dir := t.TempDir()
	autonomy := testutil.Build(t, "autonomy")
	tokens := filepath.Join(dir, "tokens.json")
	token := func(principal string) string {
		t.Helper()
		out, err := exec.Command(autonomy, "token", "create", principal, "--tokens", tokens).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	one := token("agent-1")
	limited := token("agent-2")
	callers := filepath.Join(dir, "callers.yaml")
	if err := os.WriteFile(callers, []byte("principals: {agent-2: {limits: {per_day: 2}}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ca := newCA(t, dir)
	ca.crl(t, 1)
	l := newLone(t, "127.0.0.1:0", "--tokens", tokens, "--callers", callers, "--anonymous", "none",
		"--tls-cert", ca.file("node.pem"), "--tls-key", ca.file("node.key"), "--tls-client-ca", ca.file("ca.pem"), "--tls-crl", ca.file("crl.pem"))
	l.url = strings.Replace(l.url, "http://", "https://", 1)
	plain := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: ca.pool}}}
	withCert := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: ca.pool, Certificates: []tls.Certificate{ca.agent}}}}
	const echo = `{"kind":"tool.echo"}`

	l.http = plain
	if r := l.must(echo, ""); r.Status != 401 || r.Code != "unauthenticated" {
		t.Errorf("nobody: %+v", r)
	}
	if r := l.must(echo, one); r.Status != 200 {
		t.Errorf("a token: %+v", r)
	}
	if r := l.must(echo, one[:len(one)-1]+"x"); r.Status != 401 || r.Code != "invalid_credential" {
		t.Errorf("a wrong token: %+v", r)
	}
	l.http = withCert
	if r := l.must(echo, ""); r.Status != 200 {
		t.Errorf("a certificate: %+v", r)
	}
	if r := l.must(echo, limited); r.Status != 200 {
		t.Errorf("a token over a certificate: %+v", r)
	}
	l.http = plain
	l.must(echo, limited)
	if r := l.must(echo, limited); r.Status != 429 || r.Code != "limit_budget" {
		t.Errorf("beyond the budget: %+v", r)
	}
	l.node.Kill(t)
	l.restart()
	if r := l.must(echo, limited); r.Status != 429 {
		t.Errorf("beyond the budget, after a crash: %+v", r)
	}

	// Taken away while it runs.
	out, err := exec.Command(autonomy, "token", "revoke", one[5:21], "--tokens", tokens).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	testutil.Eventually(t, timeout, "the revoked token is refused", func() error {
		if r := l.must(echo, one); r.Status != 401 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	ca.crl(t, 2, ca.agent.Leaf)
	l.http = withCert
	testutil.Eventually(t, timeout, "the revoked certificate is refused", func() error {
		if r, err := l.call(echo, ""); err == nil && r.Status != 401 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	if err := os.Remove(tokens); err != nil {
		t.Fatal(err)
	}
	l.node.Signal(syscall.SIGHUP)
	l.http = plain
	testutil.Eventually(t, timeout, "without a token file no token is valid", func() error {
		if r := l.must(echo, limited); r.Status != 401 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	resp, err := plain.Get(l.url + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 503 || strings.Contains(string(body), "tokens.json") {
		t.Errorf("readyz: %d %s", resp.StatusCode, body)
	}
	l.node.Stop(t)
	logs := l.node.Stderr.String()
	for _, secret := range []string{one, limited} {
		if strings.Contains(logs, secret) || strings.Contains(logs, secret[22:]) {
			t.Error("a token is in the node's log")
		}
	}
	export, err := exec.Command(autonomy, "wal", "export", "--dir", l.path("state", "wal")).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"no token is valid", `"caller":{"type":"token","id":"agent-1"}`, `"caller":{"type":"cert","id":"agent"}`, `"caller.limited"`, `"caller.refused"`, `"callers.changed"`} {
		if !bytes.Contains(export, []byte(want)) {
			t.Errorf("no %s in the log", want)
		}
	}
}

// testCA is a certificate authority in files.
type testCA struct {
	dir   string
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	pool  *x509.CertPool
	agent tls.Certificate
}

func (ca *testCA) file(name string) string { return filepath.Join(ca.dir, name) }

func (ca *testCA) write(t *testing.T, name, kind string, der []byte) {
	t.Helper()
	tmp := ca.file(name + ".new")
	if err := os.WriteFile(tmp, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, ca.file(name)); err != nil {
		t.Fatal(err)
	}
}

func newCA(t *testing.T, dir string) *testCA {
	t.Helper()
	ca := &testCA{dir: dir, pool: x509.NewCertPool()}
	make := func(serial int64, name string, isCA bool) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		tpl := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: isCA, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
		parent, signer := ca.cert, ca.key
		if isCA {
			tpl.KeyUsage, tpl.IPAddresses, tpl.ExtKeyUsage = x509.KeyUsageCertSign|x509.KeyUsageCRLSign, nil, nil
			parent, signer = tpl, key
		}
		der, err := x509.CreateCertificate(rand.Reader, tpl, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	ca.cert, ca.key = make(1, "ca", true)
	ca.pool.AddCert(ca.cert)
	ca.write(t, "ca.pem", "CERTIFICATE", ca.cert.Raw)
	node, nodeKey := make(2, "node", false)
	ca.write(t, "node.pem", "CERTIFICATE", node.Raw)
	der, err := x509.MarshalPKCS8PrivateKey(nodeKey)
	if err != nil {
		t.Fatal(err)
	}
	ca.write(t, "node.key", "PRIVATE KEY", der)
	agent, agentKey := make(3, "agent", false)
	ca.agent = tls.Certificate{Certificate: [][]byte{agent.Raw}, PrivateKey: agentKey, Leaf: agent}
	return ca
}

func (ca *testCA) crl(t *testing.T, number int64, revoked ...*x509.Certificate) {
	t.Helper()
	tpl := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
	for _, c := range revoked {
		tpl.RevokedCertificateEntries = append(tpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, tpl, ca.cert, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	ca.write(t, "crl.pem", "X509 CRL", der)
}
