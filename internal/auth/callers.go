package auth

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"go.yaml.in/yaml/v3"
)

// MaxCallers is how many principals a callers file may name.
const MaxCallers = 4096

// Callers is the callers file: names for peers, and limits.
//
//	defaults:
//	  concurrent: 64
//	principals:
//	  build-agent:
//	    uid: [1001]
//	    cert: [spiffe://example.org/build]
//	    limits: {rate: 50, burst: 100, concurrent: 8, per_day: 20000}
//
// A peer that no principal lists keeps the name that it came with: uid:1001, or
// the certificate's. Limits go by the name, however the caller came.
type Callers struct {
	Defaults   LimitSet             `yaml:"defaults"`
	Principals map[string]Principal `yaml:"principals"`

	uids, gids map[uint32]string
	certs      map[string]string
}

// Principal is one name.
type Principal struct {
	UID    []uint32  `yaml:"uid"`  // of a Unix socket's peer
	GID    []uint32  `yaml:"gid"`  // its primary group, when no principal lists its uid
	Cert   []string  `yaml:"cert"` // URI, DNS name or common name in a client certificate
	Limits *LimitSet `yaml:"limits"`
}

// LimitSet bounds one caller. Zero values do not limit.
type LimitSet struct {
	Rate       float64 `yaml:"rate"`       // calls per second over time
	Burst      int     `yaml:"burst"`      // calls at once when it was idle; 0: one second's worth, at least 1
	Concurrent int     `yaml:"concurrent"` // calls at one time
	PerDay     int64   `yaml:"per_day"`    // calls per day, UTC; kept across restarts
}

// ReadCallers reads a callers file strictly.
func ReadCallers(path string) (*Callers, error) {
	data, err := readFile(path, MaxFileBytes)
	if err != nil {
		return nil, fmt.Errorf("callers file: %w", err)
	}
	c, err := ParseCallers(data)
	if err != nil {
		return nil, fmt.Errorf("callers file %s: %w", path, err)
	}
	return c, nil
}

// ParseCallers is ReadCallers for bytes. It joins all faults.
func ParseCallers(data []byte) (*Callers, error) {
	c := &Callers{uids: map[uint32]string{}, gids: map[uint32]string{}, certs: map[string]string{}}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	if err := dec.Decode(c); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one document")
	}
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if len(c.Principals) > MaxCallers {
		return nil, fmt.Errorf("%d principals, at most %d", len(c.Principals), MaxCallers)
	}
	for _, msg := range c.Defaults.faults() {
		fault("defaults: %s", msg)
	}
	names := make([]string, 0, len(c.Principals))
	for name := range c.Principals {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		p := c.Principals[name]
		if !ValidPrincipal(name) {
			fault("principal %.40q: want letters, digits and . _ @ / : -, at most %d", name, MaxPrincipalBytes)
		}
		for _, id := range p.UID {
			if other, ok := c.uids[id]; ok {
				fault("uid %d is both %s and %s", id, other, name)
			}
			c.uids[id] = name
		}
		for _, id := range p.GID {
			if other, ok := c.gids[id]; ok {
				fault("gid %d is both %s and %s", id, other, name)
			}
			c.gids[id] = name
		}
		for _, cert := range p.Cert {
			if other, ok := c.certs[cert]; ok || cert == "" {
				fault("certificate name %q is both %s and %s", cert, other, name)
			}
			c.certs[cert] = name
		}
		if p.Limits != nil {
			for _, msg := range p.Limits.faults() {
				fault("principal %s: limits: %s", name, msg)
			}
		}
	}
	return c, errors.Join(faults...)
}

func (l *LimitSet) faults() (out []string) {
	if !(l.Rate >= 0 && l.Rate <= 1e6) || math.IsNaN(l.Rate) || l.Rate > 0 && l.Rate < 1e-4 {
		out = append(out, fmt.Sprintf("rate is %v, want 0, or 0.0001 to 1000000 calls per second", l.Rate))
	}
	if l.Burst < 0 || l.Burst > 1e6 || l.Burst > 0 && l.Rate == 0 {
		out = append(out, fmt.Sprintf("burst is %d, want 0 to 1000000, with a rate", l.Burst))
	}
	if l.Concurrent < 0 || l.Concurrent > 1<<16 {
		out = append(out, fmt.Sprintf("concurrent is %d, want 0 to 65536", l.Concurrent))
	}
	if l.PerDay < 0 || l.PerDay > 1e12 {
		out = append(out, fmt.Sprintf("per_day is %d, want 0 to 1000000000000", l.PerDay))
	}
	return out
}

// limits of a caller.
func (c *Callers) limits(id string) LimitSet {
	if p, ok := c.Principals[id]; ok && p.Limits != nil {
		return *p.Limits
	}
	return c.Defaults
}

func (c *Callers) unixName(who Caller) string {
	if name, ok := c.uids[who.UID]; ok {
		return name
	}
	if name, ok := c.gids[who.GID]; ok {
		return name
	}
	return who.ID
}

// certName is the principal of any of the names in a certificate, else name.
func (c *Callers) certName(name string, cert *x509.Certificate) string {
	if len(c.certs) == 0 {
		return name
	}
	for _, u := range cert.URIs {
		if p, ok := c.certs[u.String()]; ok {
			return p
		}
	}
	for _, d := range cert.DNSNames {
		if p, ok := c.certs[d]; ok {
			return p
		}
	}
	if p, ok := c.certs[cert.Subject.CommonName]; ok {
		return p
	}
	return name
}
