package auth

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/autonomyops/autonomy/internal/run"
)

// TLSFiles are the files of --tls-cert, --tls-key, --tls-client-ca, --tls-crl.
type TLSFiles struct {
	Cert, Key string // both or none
	ClientCA  string // callers show a certificate that one of these CAs signed
	CRL       string // revocation lists, PEM or one in DER; one of every CA in ClientCA

	optional bool // a caller may come with a token instead of a certificate
}

const maxCRLBytes = 64 << 20

// serverTLS is the server's side of TLS, reloaded from its files.
type serverTLS struct {
	files TLSFiles
	now   func() time.Time
	conf  atomic.Pointer[tls.Config] // of new connections
	peers atomic.Pointer[peerRules]
}

// peerRules say which client certificates are good.
type peerRules struct {
	err  error           // not nil: none is
	cas  map[string]bool // caKey of those in the CA file
	crls map[string]*crl // by caKey of the issuer; nil: revocation is not asked for
	dead map[string]bool // caKey of CAs that are revoked themselves
}

// crl is one CA's revocation list.
type crl struct {
	issuer     string // for people
	number     *big.Int
	nextUpdate time.Time
	revoked    map[string]bool // serial numbers, as bytes
}

func openTLS(files TLSFiles, now func() time.Time) (*serverTLS, error) {
	t := &serverTLS{files: files, now: now}
	pairErr, peerErr := t.reload()
	return t, errors.Join(pairErr, peerErr)
}

// reload reads the files. pairErr: the former certificate stays. peerErr: no
// client certificate is good until the files are.
func (t *serverTLS) reload() (pairErr, peerErr error) {
	rules := &peerRules{cas: map[string]bool{}}
	if t.files.ClientCA != "" {
		cas, err := readCAs(t.files.ClientCA)
		for _, ca := range cas {
			rules.cas[caKey(ca)] = true
		}
		rules.err = err
	}
	if t.files.CRL != "" {
		var old map[string]*crl
		if was := t.peers.Load(); was != nil {
			old = was.crls
		}
		var err error
		if rules.crls, rules.dead, err = readCRLs(t.files.CRL, t.files.ClientCA, old); err != nil {
			rules.crls = old // so that an older list does not come back in the next attempt
		}
		rules.err = errors.Join(rules.err, err)
	}
	if rules.err == nil && t.files.CRL != "" {
		rules.err = rules.expired(t.now())
	}
	conf, err := run.ServerTLS(t.files.Cert, t.files.Key, t.files.ClientCA)
	if err != nil {
		if t.files.ClientCA != "" {
			// Which of the files it is does not matter: whom the CA file meant to
			// shut out must not come in by the former one.
			rules.err = errors.Join(rules.err, err)
		}
		t.peers.Store(rules)
		return err, rules.err
	}
	if t.files.ClientCA != "" && t.files.optional {
		conf.ClientAuth = tls.VerifyClientCertIfGiven
	}
	// A resumed session would bring back a verdict from before a revocation.
	conf.SessionTicketsDisabled = true
	conf.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return nil // ClientAuth has decided that
		}
		_, err := t.peer(&cs, t.now())
		return err
	}
	t.peers.Store(rules)
	t.conf.Store(conf)
	return nil, rules.err
}

// config hands every new connection the configuration in force.
func (t *serverTLS) config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return t.conf.Load(), nil }}
}

// peer judges the verified chains of a connection as things stand now, and
// returns the name in the certificate.
func (t *serverTLS) peer(cs *tls.ConnectionState, now time.Time) (string, error) {
	rules := t.peers.Load()
	if rules.err != nil {
		return "", rules.err
	}
	if len(cs.VerifiedChains) == 0 {
		return "", errors.New("it was not verified")
	}
	leaf := cs.PeerCertificates[0]
	if now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return "", fmt.Errorf("it is valid from %s to %s", leaf.NotBefore.Format(time.RFC3339), leaf.NotAfter.Format(time.RFC3339))
	}
	var err error
	for _, chain := range cs.VerifiedChains {
		if err = rules.chain(chain, now); err == nil {
			break
		}
	}
	if err != nil {
		return "", err
	}
	name := certName(leaf)
	if name == "" {
		return "", errors.New("it names nobody: want a URI, a DNS name or a common name")
	}
	return name, nil
}

// chain asks the list of each issuer about what it signed.
func (r *peerRules) chain(chain []*x509.Certificate, now time.Time) error {
	if !r.cas[caKey(chain[len(chain)-1])] { // it was when the connection was made
		return errors.New("its CA is not among those of --tls-client-ca any more")
	}
	if r.crls == nil {
		return nil
	}
	for _, ca := range chain[1:] {
		if r.dead[caKey(ca)] {
			return fmt.Errorf("the CA %q is revoked", ca.Subject)
		}
	}
	for i, c := range chain[:len(chain)-1] {
		list := r.crls[caKey(chain[i+1])]
		switch {
		case list == nil:
			return fmt.Errorf("there is no revocation list of %q", chain[i+1].Subject)
		case now.After(list.nextUpdate):
			return fmt.Errorf("the revocation list of %q was due for an update on %s", chain[i+1].Subject, list.nextUpdate.Format(time.RFC3339))
		case list.revoked[string(c.SerialNumber.Bytes())]:
			return errors.New("it is revoked")
		}
	}
	return nil
}

func (r *peerRules) expired(now time.Time) error {
	for _, l := range r.crls {
		if now.After(l.nextUpdate) {
			return fmt.Errorf("--tls-crl: the list of %q was due for an update on %s", l.issuer, l.nextUpdate.Format(time.RFC3339))
		}
	}
	return nil
}

// stale says that a list ran out since it was read.
func (t *serverTLS) stale(now time.Time) string {
	if rules := t.peers.Load(); rules.err == nil {
		if err := rules.expired(now); err != nil {
			return err.Error() + ": no client certificate is valid"
		}
	}
	return ""
}

// certName is who a certificate is for: its first URI (SPIFFE), else its first
// DNS name, else its common name.
func certName(c *x509.Certificate) string {
	switch {
	case len(c.URIs) > 0:
		return c.URIs[0].String()
	case len(c.DNSNames) > 0:
		return c.DNSNames[0]
	}
	return c.Subject.CommonName
}

// caKey names a CA. Two may have one subject while one takes over from the other.
func caKey(c *x509.Certificate) string {
	return string(c.RawSubject) + string(c.RawSubjectPublicKeyInfo)
}

// readCRLs reads revocation lists. Each must be signed by a CA of caFile, every
// CA there must have one, and none may be older than the one in old. dead are
// the CAs of caFile that a list names, and those below them.
func readCRLs(path, caFile string, old map[string]*crl) (lists map[string]*crl, dead map[string]bool, err error) {
	data, err := readFile(path, maxCRLBytes)
	if err != nil {
		return nil, nil, fmt.Errorf("--tls-crl: %w", err)
	}
	cas, err := readCAs(caFile)
	if err != nil {
		return nil, nil, err
	}
	ders := [][]byte{data}
	if bytes.Contains(data, []byte("-----BEGIN")) {
		ders = blocks(data, "X509 CRL")
	}
	lists = map[string]*crl{}
	for _, der := range ders {
		key, c, err := parseCRL(der, cas)
		if err != nil {
			return nil, nil, fmt.Errorf("--tls-crl %s: %w", path, err)
		}
		if was := old[key]; was != nil && c.number.Cmp(was.number) < 0 {
			return nil, nil, fmt.Errorf("--tls-crl %s: the list of %q is number %s, and number %s was seen before", path, c.issuer, c.number, was.number)
		}
		lists[key] = c
	}
	for _, ca := range cas {
		if lists[caKey(ca)] == nil {
			return nil, nil, fmt.Errorf("--tls-crl %s: no list of %q, which --tls-client-ca names", path, ca.Subject)
		}
	}
	return lists, deadCAs(cas, lists), nil
}

func parseCRL(der []byte, cas []*x509.Certificate) (key string, c *crl, err error) {
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return "", nil, err
	}
	i := slices.IndexFunc(cas, func(ca *x509.Certificate) bool {
		return bytes.Equal(ca.RawSubject, list.RawIssuer) && list.CheckSignatureFrom(ca) == nil
	})
	switch {
	case i < 0:
		return "", nil, fmt.Errorf("a list of %q that no CA in --tls-client-ca has signed", list.Issuer)
	case list.NextUpdate.IsZero():
		return "", nil, fmt.Errorf("the list of %q says no next update, so nobody can tell when it is too old", list.Issuer)
	case list.Number == nil:
		return "", nil, fmt.Errorf("the list of %q has no number, so nobody can tell an old one from a new one", list.Issuer)
	}
	c = &crl{issuer: list.Issuer.String(), number: list.Number, nextUpdate: list.NextUpdate,
		revoked: make(map[string]bool, len(list.RevokedCertificateEntries))}
	for _, e := range list.RevokedCertificateEntries {
		c.revoked[string(e.SerialNumber.Bytes())] = true
	}
	return caKey(cas[i]), c, nil
}

// deadCAs finds CAs that are trusted by their file and revoked by another CA of
// it. Chains end at such a CA and would never ask for the list above it.
func deadCAs(cas []*x509.Certificate, lists map[string]*crl) map[string]bool {
	dead := map[string]bool{}
	for again := true; again; {
		again = false
		for _, ca := range cas {
			if dead[caKey(ca)] || bytes.Equal(ca.RawSubject, ca.RawIssuer) {
				continue
			}
			for _, above := range cas {
				if !bytes.Equal(above.RawSubject, ca.RawIssuer) {
					continue
				}
				if dead[caKey(above)] || lists[caKey(above)].revoked[string(ca.SerialNumber.Bytes())] {
					dead[caKey(ca)], again = true, true
				}
			}
		}
	}
	return dead
}

// readCAs are the certificates of a PEM file.
func readCAs(path string) (out []*x509.Certificate, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("--tls-client-ca: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFileBytes))
	if err != nil {
		return nil, fmt.Errorf("--tls-client-ca %s: %w", path, err)
	}
	for _, der := range blocks(data, "CERTIFICATE") {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("--tls-client-ca %s: %w", path, err)
		}
		out = append(out, c)
	}
	return out, nil
}

// blocks are the PEM blocks of one type in data.
func blocks(data []byte, kind string) (out [][]byte) {
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			return out
		}
		if b.Type == kind {
			out = append(out, b.Bytes)
		}
	}
}
