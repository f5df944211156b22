package run_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/run"
)

// pair writes a self-signed certificate and its key, named name.
func pair(t *testing.T, dir, name string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	write := func(file, kind string, data []byte) string {
		path := filepath.Join(dir, file)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write(name+".pem", "CERTIFICATE", der), write(name+".key", "PRIVATE KEY", keyDER)
}

// TestClientTLS: both ends know each other; a renewed certificate is shown by
// the next connection.
func TestClientTLS(t *testing.T) {
	dir := t.TempDir()
	serverCert, serverKey := pair(t, dir, "server")
	cert, key := pair(t, dir, "client")
	if c, err := run.ClientTLS("", "", ""); c != nil || err != nil {
		t.Errorf("nothing given: %v, %v", c, err)
	}
	for _, tc := range [][3]string{{cert, serverKey, ""}, {cert, "none", ""}, {"", "", "none"}, {"", "", key}} {
		if _, err := run.ClientTLS(tc[0], tc[1], tc[2]); err == nil || !strings.Contains(err.Error(), "--") {
			t.Errorf("%v: %v", tc, err)
		}
	}
	conf, err := run.ClientTLS(cert, key, serverCert)
	if err != nil {
		t.Fatal(err)
	}
	dial := func() (who string, err error) {
		server, err := run.ServerTLS(serverCert, serverKey, cert)
		if err != nil {
			t.Fatal(err)
		}
		ln, err := tls.Listen("tcp", "127.0.0.1:0", server)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		done := make(chan error, 1)
		go func() {
			c, err := ln.Accept()
			if err == nil {
				defer c.Close()
				if err = c.(*tls.Conn).Handshake(); err == nil {
					who = c.(*tls.Conn).ConnectionState().PeerCertificates[0].Subject.CommonName
				}
			}
			done <- err
		}()
		c, err := tls.Dial("tcp", ln.Addr().String(), conf)
		if err != nil {
			return "", err
		}
		defer c.Close()
		err = <-done
		return who, err
	}
	if _, err := dial(); err != nil {
		t.Fatal(err)
	}
	renewed, renewedKey := pair(t, dir, "renewed")
	for from, to := range map[string]string{renewed: cert, renewedKey: key} {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := dial(); err != nil {
		t.Errorf("after the renewal: %v", err)
	}
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if _, err := dial(); err == nil {
		t.Error("without its key the certificate was shown")
	}
}
