package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/run"
)

// TestIdentity: every command that calls a daemon shows the certificate that it
// was given, and takes the daemon's from the CA that it was given alone.
func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "operator"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, data []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	cert, keyFile := write("c.pem", "CERTIFICATE", der), write("k.pem", "PRIVATE KEY", keyDER)
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte("autn_x\n"), 0o600); err != nil {
		t.Fatal(err)
	}

	var who, bearer string
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, bearer = r.TLS.PeerCertificates[0].Subject.CommonName, r.Header.Get("Authorization")
		io.WriteString(w, `{"decision":"allow","outcome":"ok","nodes":[]}`)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	s.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, MinVersion: tls.VersionTLS13}
	s.StartTLS()
	defer s.Close()
	ca := write("ca.pem", "CERTIFICATE", s.Certificate().Raw)

	for _, command := range [][]string{
		{"call", "tool.echo", "--node", s.URL}, {"policy", "status", "--node", s.URL},
		{"fleet", "status", "--cp", s.URL}, {"relay", "status", "--relay", s.URL},
	} {
		who, bearer = "", ""
		var out, stderr bytes.Buffer
		Main(append(command, "--client-cert", cert, "--client-key", keyFile, "--server-ca", ca, "--token-file", token), &out, &stderr)
		if who != "operator" {
			t.Errorf("%v: came as %q: %s%s", command, who, &out, &stderr)
		}
		if toNode := command[0] == "call" || command[0] == "policy"; toNode != (bearer == "Bearer autn_x") {
			t.Errorf("%v: sent Authorization %q", command, bearer)
		}
		if strings.Contains(stderr.String()+out.String(), "autn_x") {
			t.Errorf("%v prints the token", command)
		}
		for name, flags := range map[string][]string{"without a certificate": {"--server-ca", ca}, "with another CA": {"--client-cert", cert, "--client-key", keyFile, "--server-ca", cert},
			"with the system's CAs": {"--client-cert", cert, "--client-key", keyFile}} {
			who = ""
			stderr.Reset()
			if code := Main(append(command, flags...), io.Discard, &stderr); code != run.Unreachable || who != "" {
				t.Errorf("%v %s: exit code %d, came as %q: %s", command, name, code, who, &stderr)
			}
		}
	}
}
