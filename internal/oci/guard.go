package oci

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// guard decides where requests that began at one registry may go. Each registry
// has its own guard and its own connections, so that a connection opened under
// one registry's rules is never used under another's.
type guard struct {
	home      string   // host:port of the registry or mirror
	homeHTTPS bool     // home was given with https
	hosts     []string // Options.Hosts
	plain     bool     // Options.PlainHTTP
	dialer    net.Dialer
}

// splitHost splits host:port, with the port that the scheme implies.
func splitHost(hostport, scheme string) (host, port string) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		host, port = strings.Trim(hostport, "[]"), "443"
		if scheme == "http" {
			port = "80"
		}
	}
	return host, port
}

// loopbackHost reports whether host can only be this machine, without asking DNS.
func loopbackHost(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

func (g *guard) isHome(host, port string) bool {
	h, p := splitHost(g.home, map[bool]string{true: "https", false: "http"}[g.homeHTTPS])
	return strings.EqualFold(h, host) && p == port
}

// listed reports whether Options.Hosts names host, or host with this port.
func (g *guard) listed(host, port string) bool {
	return slices.ContainsFunc(g.hosts, func(e string) bool {
		return strings.EqualFold(e, host) || strings.EqualFold(e, net.JoinHostPort(host, port))
	})
}

// request checks a request, the first one or after a redirect, before it is sent.
func (g *guard) request(req *http.Request) error {
	host, port := splitHost(req.URL.Host, req.URL.Scheme)
	switch req.URL.Scheme {
	case "https":
	case "http":
		if !g.plain && !loopbackHost(host) {
			return fmt.Errorf("%w: %s over plain HTTP: only loopback hosts may, unless plain HTTP is asked for", ErrHost, req.URL.Host)
		}
	default:
		return fmt.Errorf("%w: scheme %q", ErrHost, req.URL.Scheme)
	}
	if req.URL.User != nil {
		return fmt.Errorf("%w: credentials in the URL of %s", ErrHost, req.URL.Host)
	}
	if len(g.hosts) > 0 && !g.listed(host, port) && !g.isHome(host, port) {
		return fmt.Errorf("%w: %s is not among the allowed hosts", ErrHost, req.URL.Host)
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return g.address(host, port, ip)
	}
	return nil
}

// address judges a resolved address.
//
//   - unspecified, multicast and link-local (cloud metadata): only for a host
//     that is listed
//   - loopback: for a host that is listed, or for the registry itself when it is
//     written as loopback; a name that resolves to loopback is an attack on what
//     listens there
//   - private: for the registry itself, or a listed host
//   - public: any
func (g *guard) address(host, port string, ip netip.Addr) error {
	ip = ip.Unmap()
	if g.listed(host, port) {
		return nil
	}
	home := g.isHome(host, port)
	switch {
	case ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast() || ip.IsInterfaceLocalMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("%w: %s is %s, a link-local, multicast or unspecified address", ErrHost, host, ip)
	case ip.IsLoopback():
		if home && loopbackHost(host) {
			return nil
		}
		return fmt.Errorf("%w: %s is %s, a loopback address", ErrHost, host, ip)
	case ip.IsPrivate() || sharedSpace.Contains(ip) || !ip.IsGlobalUnicast():
		if home {
			return nil
		}
		return fmt.Errorf("%w: %s is %s, a private address", ErrHost, host, ip)
	}
	return nil
}

var sharedSpace = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598, carrier NAT

// dial resolves, judges every address, and dials the judged ones: between check
// and connection DNS is not asked again.
func (g *guard) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	var ips []netip.Addr
	if ip, err := netip.ParseAddr(host); err == nil {
		ips = []netip.Addr{ip}
	} else if ips, err = net.DefaultResolver.LookupNetIP(ctx, "ip", host); err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	var faults []error
	for _, ip := range ips {
		if err := g.address(host, port, ip); err != nil {
			faults = append(faults, err)
			continue
		}
		c, err := g.dialer.DialContext(ctx, network, net.JoinHostPort(ip.Unmap().String(), port))
		if err == nil {
			return c, nil
		}
		faults = append(faults, err)
	}
	return nil, errors.Join(faults...)
}

// guardedTransport is an http.RoundTripper with the guard's checks in front.
type guardedTransport struct {
	guard *guard
	base  http.RoundTripper
}

func (t *guardedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := t.guard.request(req); err != nil {
		return nil, err
	}
	return t.base.RoundTrip(req)
}

func newTransport(g *guard, o Options) *guardedTransport {
	return &guardedTransport{guard: g, base: &http.Transport{
		DialContext:            g.dial,
		TLSClientConfig:        o.TLS.Clone(),
		TLSHandshakeTimeout:    10 * time.Second,
		ResponseHeaderTimeout:  30 * time.Second,
		ExpectContinueTimeout:  time.Second,
		IdleConnTimeout:        30 * time.Second,
		MaxIdleConnsPerHost:    4,
		MaxConnsPerHost:        8,
		MaxResponseHeaderBytes: 64 << 10,
		ForceAttemptHTTP2:      true,
		DisableCompression:     true, // a digest is of the bytes as they are
	}}
}
