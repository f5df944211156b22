package run

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
)

// maxPEMBytes bounds a file of certificates.
const maxPEMBytes = 1 << 20

// ServerTLS reads the files of --tls-cert, --tls-key and --tls-client-ca; nil
// without a certificate. With a client CA every peer must show a certificate of
// it. TLS 1.3 only: both ends are ours.
func ServerTLS(cert, key, clientCA string) (*tls.Config, error) {
	if cert == "" {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert %s, --tls-key %s: %w", cert, key, err)
	}
	c := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}}
	if clientCA == "" {
		return c, nil
	}
	f, err := os.Open(clientCA)
	if err != nil {
		return nil, fmt.Errorf("--tls-client-ca: %w", err)
	}
	defer f.Close()
	pem, err := io.ReadAll(io.LimitReader(f, maxPEMBytes+1))
	if err != nil {
		return nil, fmt.Errorf("--tls-client-ca %s: %w", clientCA, err)
	}
	if len(pem) > maxPEMBytes {
		return nil, fmt.Errorf("--tls-client-ca %s: over %d bytes", clientCA, maxPEMBytes)
	}
	c.ClientCAs = x509.NewCertPool()
	if !c.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("--tls-client-ca %s: no PEM certificate in it", clientCA)
	}
	c.ClientAuth = tls.RequireAndVerifyClientCert
	return c, nil
}
