package auth

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// pki is a certificate authority of the test.
type pki struct {
	t      *testing.T
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64
}

// newPKI makes a CA, below parent unless that is nil.
func newPKI(t *testing.T, name string, parent *pki) *pki {
	t.Helper()
	p := &pki{t: t, serial: 100}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	if parent == nil {
		parent = p
	} else {
		parent.serial++
		tpl.SerialNumber = big.NewInt(parent.serial)
	}
	p.key = newKey(t)
	signer := tpl
	if parent != p {
		signer = parent.cert
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, signer, &p.key.PublicKey, parent.key)
	if err != nil {
		t.Fatal(err)
	}
	if p.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return p
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// issue signs a leaf; change may alter it before.
func (p *pki) issue(name string, change func(*x509.Certificate)) tls.Certificate {
	p.t.Helper()
	p.serial++
	tpl := &x509.Certificate{SerialNumber: big.NewInt(p.serial), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	if change != nil {
		change(tpl)
	}
	key := newKey(p.t)
	der, err := x509.CreateCertificate(rand.Reader, tpl, p.cert, &key.PublicKey, p.key)
	if err != nil {
		p.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// crl is the CA's revocation list in PEM.
func (p *pki) crl(number int64, next time.Time, revoked ...*x509.Certificate) []byte {
	p.t.Helper()
	tpl := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: next}
	for _, c := range revoked {
		tpl.RevokedCertificateEntries = append(tpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, tpl, p.cert, p.key)
	if err != nil {
		p.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

func certPEM(ders ...[]byte) (out []byte) {
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// listener is a TLS listener of an Authenticator, and its files.
type listener struct {
	t     *testing.T
	dir   string
	a     *Authenticator
	ln    net.Listener
	roots *x509.CertPool
	now   atomic.Int64 // offset of the clock
}

func (l *listener) file(name string) string { return filepath.Join(l.dir, name) }

func (l *listener) write(name string, data []byte) {
	l.t.Helper()
	tmp := l.file(name + ".new")
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		l.t.Fatal(err)
	}
	if err := os.Rename(tmp, l.file(name)); err != nil {
		l.t.Fatal(err)
	}
}

// newListener has a certificate of the CA server, and takes clients of ca.
func newListener(t *testing.T, server *pki, ca, crl []byte, tokens string) (*listener, error) {
	t.Helper()
	l := &listener{t: t, dir: t.TempDir(), roots: x509.NewCertPool()}
	l.roots.AddCert(server.cert)
	l.pair(server.issue("node", nil))
	l.write("ca.pem", ca)
	o := Options{Tokens: tokens, Logger: quiet, TLS: TLSFiles{Cert: l.file("cert.pem"), Key: l.file("key.pem"), ClientCA: l.file("ca.pem")},
		Now: func() time.Time { return time.Now().Add(time.Duration(l.now.Load())) }}
	if crl != nil {
		l.write("crl.pem", crl)
		o.TLS.CRL = l.file("crl.pem")
	}
	var err error
	if l.a, err = Open(o); err != nil {
		return nil, err
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.ln = l.a.Listener(tcp)
	t.Cleanup(func() { l.ln.Close() })
	return l, nil
}

func (l *listener) pair(c tls.Certificate) {
	l.t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		l.t.Fatal(err)
	}
	l.write("cert.pem", certPEM(c.Certificate...))
	l.write("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
}

// dial connects with client certificates and asks who that is. The connection
// stays open; ask asks again.
func (l *listener) dial(certs ...tls.Certificate) (who Caller, ask func() (Caller, error), err error) {
	l.t.Helper()
	type accepted struct {
		c   net.Conn
		err error
	}
	done := make(chan accepted, 1)
	go func() {
		c, err := l.ln.Accept()
		if err == nil {
			err = c.(*tls.Conn).Handshake()
		}
		done <- accepted{c, err}
	}()
	raw, derr := net.Dial("tcp", l.ln.Addr().String())
	if derr != nil {
		l.t.Fatal(derr)
	}
	client := tls.Client(raw, &tls.Config{RootCAs: l.roots, ServerName: "127.0.0.1", Certificates: certs})
	l.t.Cleanup(func() { client.Close() })
	cerr := client.Handshake()
	s := <-done
	if s.c != nil {
		l.t.Cleanup(func() { s.c.Close() })
	}
	if s.err != nil || cerr != nil {
		return Caller{}, nil, errors.Join(s.err, cerr)
	}
	ask = func() (Caller, error) { return l.a.Caller(s.c, nil) }
	who, err = ask()
	return who, ask, err
}

func next() time.Time { return time.Now().Add(12 * time.Hour) }

func TestClientCertificates(t *testing.T) {
	ca, foreign := newPKI(t, "clients", nil), newPKI(t, "clients", nil) // one name, another key
	below := newPKI(t, "below", ca)
	good := ca.issue("agent-1", nil)
	revoked := ca.issue("agent-2", nil)
	l, err := newListener(t, ca, certPEM(ca.cert.Raw), ca.crl(5, next(), revoked.Leaf), "")
	if err != nil {
		t.Fatal(err)
	}
	spiffe, err := url.Parse("spiffe://example.org/agent")
	if err != nil {
		t.Fatal(err)
	}
	chained := below.issue("deep", nil)
	chained.Certificate = append(chained.Certificate, below.cert.Raw)
	for name, tc := range map[string]struct {
		certs []tls.Certificate
		id    string // "": refused
	}{
		"good":                   {[]tls.Certificate{good}, "agent-1"},
		"named by URI":           {[]tls.Certificate{ca.issue("cn", func(c *x509.Certificate) { c.URIs = []*url.URL{spiffe} })}, spiffe.String()},
		"named by DNS":           {[]tls.Certificate{ca.issue("cn", func(c *x509.Certificate) { c.DNSNames = []string{"a.example.org"} })}, "a.example.org"},
		"without a name":         {[]tls.Certificate{ca.issue("", nil)}, ""},
		"none":                   {nil, ""},
		"revoked":                {[]tls.Certificate{revoked}, ""},
		"of another CA":          {[]tls.Certificate{foreign.issue("agent-1", nil)}, ""},
		"expired":                {[]tls.Certificate{ca.issue("x", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })}, ""},
		"not valid yet":          {[]tls.Certificate{ca.issue("x", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Minute) })}, ""},
		"for servers only":       {[]tls.Certificate{ca.issue("x", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })}, ""},
		"of a CA without a list": {[]tls.Certificate{chained}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			who, _, err := l.dial(tc.certs...)
			if tc.id == "" && err == nil || tc.id != "" && (err != nil || who != Caller{Type: Cert, ID: tc.id}) {
				t.Errorf("%+v, %v, want %q", who, err, tc.id)
			}
		})
	}
	// The name of a certificate may be mapped.
	l.write("callers.yaml", []byte("principals: {first: {cert: [agent-1]}}"))
	l.a.o.Callers = l.file("callers.yaml")
	l.a.Reload(true)
	if who, _, err := l.dial(good); err != nil || who.ID != "first" {
		t.Errorf("%+v, %v", who, err)
	}
}

// TestRevocation: a certificate that is revoked is refused on the connection
// that it has open, too, and whatever happens to the list closes the door.
func TestRevocation(t *testing.T) {
	ca := newPKI(t, "clients", nil)
	good := ca.issue("agent-1", nil)
	l, err := newListener(t, ca, certPEM(ca.cert.Raw), ca.crl(5, next()), "")
	if err != nil {
		t.Fatal(err)
	}
	_, ask, err := l.dial(good)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what, why string) {
		t.Helper()
		if _, err := ask(); !errors.Is(err, ErrCertificate) || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: the open connection: %v, want %q", what, err, why)
		}
		if _, _, err := l.dial(good); err == nil {
			t.Errorf("%s: a new connection is accepted", what)
		}
	}
	accepted := func(what string) {
		t.Helper()
		if who, err := ask(); err != nil || who.ID != "agent-1" {
			t.Errorf("%s: the open connection: %v", what, err)
		}
		if _, _, err := l.dial(good); err != nil {
			t.Errorf("%s: a new connection: %v", what, err)
		}
	}
	reload := func(crl []byte) {
		t.Helper()
		l.write("crl.pem", crl)
		l.a.Reload(false)
	}
	reload(ca.crl(6, next(), good.Leaf))
	refused("revoked", "it is revoked")
	reload(ca.crl(5, next()))
	refused("an older list", "number 6 was seen before")
	reload(ca.crl(6, next(), good.Leaf))
	refused("revoked again", "it is revoked")
	reload(ca.crl(7, next()))
	accepted("given back")

	reload([]byte("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"))
	refused("damaged", "--tls-crl")
	reload(nil)
	refused("empty", "--tls-crl")
	reload(newPKI(t, "clients", nil).crl(8, next()))
	refused("of another CA", "no CA in --tls-client-ca has signed")
	reload(ca.crl(8, time.Now().Add(-time.Minute)))
	refused("past its next update", "due for an update")
	if err := os.Remove(l.file("crl.pem")); err != nil {
		t.Fatal(err)
	}
	l.a.Reload(false)
	refused("gone", "--tls-crl")
	if p := l.a.Problems(); len(p) != 1 || !strings.Contains(p[0], "no client certificate is valid") {
		t.Errorf("problems %q", p)
	}
	reload(ca.crl(9, next()))
	accepted("mended")
	if p := l.a.Problems(); len(p) != 0 {
		t.Errorf("problems %q", p)
	}

	// A list runs out while nobody touches a file.
	reload(ca.crl(10, time.Now().Add(30*time.Minute)))
	l.now.Store(int64(31 * time.Minute))
	refused("run out", "due for an update")
	if p := l.a.Problems(); len(p) != 1 || !strings.Contains(p[0], "no client certificate is valid") {
		t.Errorf("problems %q", p)
	}
	l.now.Store(0)
	accepted("the clock is right again")
	// So does a certificate.
	l.now.Store(int64(2 * time.Hour))
	reload(ca.crl(11, next()))
	if _, err := ask(); !errors.Is(err, ErrCertificate) || !strings.Contains(err.Error(), "it is valid from") {
		t.Errorf("an expired certificate on an open connection: %v", err)
	}
}

// TestRevokedCA: an intermediate CA that the file trusts and its own CA has
// revoked takes its certificates with it.
func TestRevokedCA(t *testing.T) {
	root := newPKI(t, "root", nil)
	mid := newPKI(t, "mid", root)
	low := newPKI(t, "low", mid)
	cas := certPEM(root.cert.Raw, mid.cert.Raw, low.cert.Raw)
	lists := func(number int64, dead ...*x509.Certificate) []byte {
		return append(append(root.crl(number, next(), dead...), mid.crl(number, next())...), low.crl(number, next())...)
	}
	l, err := newListener(t, root, cas, lists(1), "")
	if err != nil {
		t.Fatal(err)
	}
	leaf := low.issue("agent", nil)
	if _, _, err := l.dial(leaf); err != nil {
		t.Fatal(err)
	}
	l.write("crl.pem", lists(2, mid.cert))
	l.a.Reload(false)
	if _, _, err := l.dial(leaf); err == nil || !strings.Contains(err.Error(), `the CA "CN=low" is revoked`) {
		t.Errorf("below a revoked CA: %v", err)
	}
	if _, _, err := l.dial(root.issue("other", nil)); err != nil {
		t.Errorf("of the CA above: %v", err)
	}
	// A CA without a list of its own is a fault.
	l.write("crl.pem", root.crl(3, next()))
	l.a.Reload(false)
	if _, _, err := l.dial(root.issue("other", nil)); err == nil || !strings.Contains(err.Error(), "no list of") {
		t.Errorf("%v", err)
	}
}

// TestReloadServer: the server's own certificate follows its files, a faulty
// pair changes nothing; a client CA that is gone lets nobody in.
func TestReloadServer(t *testing.T) {
	ca := newPKI(t, "clients", nil)
	good := ca.issue("agent-1", nil)
	l, err := newListener(t, ca, certPEM(ca.cert.Raw), nil, "")
	if err != nil {
		t.Fatal(err)
	}
	_, ask, err := l.dial(good)
	if err != nil {
		t.Fatal(err)
	}
	other := newPKI(t, "servers", nil)
	l.pair(other.issue("node", nil))
	if got := l.a.Reload(false); len(got) == 0 {
		t.Fatal("the new pair is not in force")
	}
	if _, _, err := l.dial(good); err == nil {
		t.Error("the old certificate is still shown")
	}
	l.roots.AddCert(other.cert)
	if _, _, err := l.dial(good); err != nil {
		t.Error(err)
	}
	l.write("ca.pem", nil)
	l.a.Reload(false)
	if _, _, err := l.dial(good); err == nil {
		t.Error("an empty client CA lets in who the former one did")
	}
	l.write("ca.pem", certPEM(other.cert.Raw))
	l.a.Reload(false)
	if _, _, err := l.dial(good); err == nil {
		t.Error("another client CA lets in who the former one did")
	}
	if _, err := ask(); !errors.Is(err, ErrCertificate) {
		t.Errorf("a connection from under the former client CA: %v", err)
	}
	if _, _, err := l.dial(other.issue("agent", nil)); err != nil {
		t.Error(err)
	}
}

// TestCertificateOrToken: with a token file a certificate may be left out, but
// one that is shown must hold.
func TestCertificateOrToken(t *testing.T) {
	ca := newPKI(t, "clients", nil)
	file := filepath.Join(t.TempDir(), "tokens.json")
	newToken(t, file, "ci", time.Now(), time.Hour)
	l, err := newListener(t, ca, certPEM(ca.cert.Raw), nil, file)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.dial(); !errors.Is(err, ErrNoCredential) {
		t.Errorf("neither: %v", err)
	}
	if _, _, err := l.dial(newPKI(t, "x", nil).issue("agent", nil)); err == nil {
		t.Error("a certificate of nobody's CA is passed over")
	}
	who, _, err := l.dial(ca.issue("agent", nil))
	if err != nil || who.ID != "agent" {
		t.Errorf("%+v, %v", who, err)
	}
}

func TestOpenTLSFaults(t *testing.T) {
	ca := newPKI(t, "clients", nil)
	for name, tc := range map[string]struct{ ca, crl []byte }{
		"no CA in the file":    {[]byte("x"), nil},
		"a list that ran out":  {certPEM(ca.cert.Raw), ca.crl(1, time.Now().Add(-time.Minute))},
		"a list of another CA": {certPEM(ca.cert.Raw), newPKI(t, "other", nil).crl(1, next())},
		"no list in the file":  {certPEM(ca.cert.Raw), []byte("-----BEGIN X-----\n-----END X-----\n")},
	} {
		if _, err := newListener(t, ca, tc.ca, tc.crl, ""); err == nil {
			t.Errorf("%s: the start succeeds", name)
		}
	}
	// One list may be in DER.
	block, _ := pem.Decode(ca.crl(1, next()))
	if _, err := newListener(t, ca, certPEM(ca.cert.Raw), block.Bytes, ""); err != nil {
		t.Error(err)
	}
}
