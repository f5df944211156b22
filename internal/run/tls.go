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
	if c.ClientCAs, err = certPool("--tls-client-ca", clientCA); err != nil {
		return nil, err
	}
	c.ClientAuth = tls.RequireAndVerifyClientCert
	return c, nil
}

// ClientTLS reads the files of --client-cert, --client-key and --server-ca: what
// a program shows to the control plane, relay or node that it calls, and which
// CAs it takes their certificates from. Without serverCA these are the system's.
// nil without any. The certificate is read again for each connection, so a
// renewed one needs no restart; the CAs are read once. TLS 1.3 only.
func ClientTLS(cert, key, serverCA string) (*tls.Config, error) {
	if cert == "" && serverCA == "" {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS13}
	if serverCA != "" {
		var err error
		if c.RootCAs, err = certPool("--server-ca", serverCA); err != nil {
			return nil, err
		}
	}
	if cert != "" {
		load := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(cert, key)
			if err != nil {
				return nil, fmt.Errorf("--client-cert %s, --client-key %s: %w", cert, key, err)
			}
			return &pair, nil
		}
		if _, err := load(); err != nil {
			return nil, err
		}
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return c, nil
}

// certPool reads the CAs of the PEM file that flag names.
func certPool(flag, path string) (*x509.CertPool, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	defer f.Close()
	pem, err := io.ReadAll(io.LimitReader(f, maxPEMBytes+1))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", flag, path, err)
	}
	if len(pem) > maxPEMBytes {
		return nil, fmt.Errorf("%s %s: over %d bytes", flag, path, maxPEMBytes)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s %s: no PEM certificate in it", flag, path)
	}
	return pool, nil
}
