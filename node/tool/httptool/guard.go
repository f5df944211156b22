package httptool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"
)

// Guard reaches one server at one URL under this package's rules: its host,
// spelled one way, resolved for each connection, every address a public one or
// in allowPrivate, and the connection to exactly one of these. It is for
// protocols that need connections of their own (MCP) and is safe for concurrent
// use.
type Guard struct {
	url  *url.URL
	tool *Tool
}

// NewGuard checks rawURL. resolver may be nil: the system's.
func NewGuard(rawURL string, allowPrivate []netip.Prefix, resolver Resolver) (*Guard, error) {
	u, err := parseURL(rawURL)
	if err != nil {
		return nil, err
	}
	if u.RawQuery != "" {
		return nil, errors.New("a query is not accepted: a secret belongs in a header")
	}
	t, err := New(Config{Hosts: []string{u.Host}, AllowPrivate: allowPrivate, Resolver: resolver})
	if err != nil {
		return nil, err
	}
	return &Guard{u, t}, nil
}

// URL is the server's.
func (g *Guard) URL() string { return g.url.String() }

// Private reports whether nobody on the way reads what is sent: https, or http to
// a loopback address written as one.
func (g *Guard) Private() bool {
	a, err := netip.ParseAddr(g.url.Hostname())
	return g.url.Scheme == "https" || err == nil && a.IsLoopback()
}

// Within reports whether a policy's egress list holds the server. An entry that
// is none is an error.
func (g *Guard) Within(egress []string) (bool, error) {
	name, err := canonicalHost(g.url.Hostname())
	if err != nil {
		return false, err
	}
	port := uint16(80)
	if g.url.Scheme == "https" {
		port = 443
	}
	if p := g.url.Port(); p != "" {
		ap, err := netip.ParseAddrPort("0.0.0.0:" + p)
		if err != nil {
			return false, err
		}
		port = ap.Port()
	}
	var list []host
	for _, e := range egress {
		h, err := parseHost(e)
		if err != nil {
			return false, fmt.Errorf("policy's egress entry %q: %w", e, err)
		}
		list = append(list, h)
	}
	return allowed(list, name, port), nil
}

// Transport makes connections to the server and to nothing else. It keeps idle
// ones for a minute; they lead to an address that was checked when dialled.
func (g *Guard) Transport() *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			checked := gate{tool: g.tool}
			addrs, err := checked.check(ctx, &url.URL{Scheme: g.url.Scheme, Host: addr})
			if err != nil {
				return nil, err
			}
			return dial(ctx, addrs)
		},
		TLSHandshakeTimeout:    dialTimeout,
		DisableCompression:     true, // what arrives is what counts against limits
		MaxResponseHeaderBytes: maxHeaderBytes,
		MaxIdleConnsPerHost:    4,
		IdleConnTimeout:        time.Minute,
	}
}

// dial connects to the first of addrs that answers.
func dial(ctx context.Context, addrs []netip.AddrPort) (net.Conn, error) {
	var faults []error
	d := net.Dialer{Timeout: dialTimeout}
	for _, a := range addrs {
		c, err := d.DialContext(ctx, "tcp", a.String())
		if err == nil {
			return c, nil
		}
		faults = append(faults, err)
	}
	return nil, errors.Join(faults...)
}
