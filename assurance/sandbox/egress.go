package sandbox

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/autonomyops/autonomy/assurance/ebpf"
)

// maxAddrs are the addresses that are taken of one name.
const maxAddrs = 16

// An Endpoint is one parsed entry of an egress list: a name, or a prefix, and a
// port.
type Endpoint struct {
	Name   string       // "" when Prefix is set
	Prefix netip.Prefix // of an address: all its bits
	Port   uint16
}

// ParseEndpoint reads "host:port", "10.0.0.0/8:443", "[2001:db8::1]:443" or
// "[2001:db8::/32]:443".
func ParseEndpoint(text string) (Endpoint, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return Endpoint{}, fmt.Errorf("%w: %q: want host:port, prefix:port or [IPv6 address or prefix]:port", ErrEgress, text)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return Endpoint{}, fmt.Errorf("%w: %q: want a port from 1 to 65535", ErrEgress, text)
	}
	e := Endpoint{Port: uint16(n)}
	if p, err := netip.ParsePrefix(host); err == nil {
		if p != p.Masked() {
			return Endpoint{}, fmt.Errorf("%w: %q: bits are set beyond the prefix; write %s", ErrEgress, text, p.Masked())
		}
		if p.Addr().Is4In6() {
			return Endpoint{}, fmt.Errorf("%w: %q: write the IPv4 prefix", ErrEgress, text)
		}
		e.Prefix = p
		return e, nil
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if a.Zone() != "" {
			return Endpoint{}, fmt.Errorf("%w: %q: an address with a zone", ErrEgress, text)
		}
		a = a.Unmap()
		e.Prefix = netip.PrefixFrom(a, a.BitLen())
		return e, nil
	}
	if !validName(host) {
		return Endpoint{}, fmt.Errorf("%w: %q: %q is neither a name nor an address", ErrEgress, text, host)
	}
	e.Name = strings.ToLower(host)
	return e, nil
}

// validName keeps what goes into /etc/hosts to letters, digits, dots, dashes
// and underscores.
func validName(s string) bool {
	if len(s) == 0 || len(s) > 253 || s[0] == '.' || s[0] == '-' {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_", r)
	}) < 0
}

// Narrow keeps of want what have covers, and of have what want covers: what both
// lists allow.
func Narrow(have, want []Endpoint) []Endpoint {
	var out []Endpoint
	for _, h := range have {
		for _, w := range want {
			switch {
			case h.Port != w.Port || h.Name != w.Name:
			case h.Name != "":
				out = append(out, h)
			case h.Prefix.Addr().Is4() != w.Prefix.Addr().Is4():
			case h.Prefix.Bits() <= w.Prefix.Bits() && h.Prefix.Contains(w.Prefix.Addr()):
				out = append(out, w)
			case w.Prefix.Contains(h.Prefix.Addr()) && w.Prefix.Bits() < h.Prefix.Bits():
				out = append(out, h)
			}
		}
	}
	return out
}

func (e Endpoint) String() string {
	host := e.Name
	if host == "" {
		host = e.Prefix.String()
		if e.Prefix.IsSingleIP() {
			host = e.Prefix.Addr().String()
		}
	}
	return net.JoinHostPort(host, strconv.Itoa(int(e.Port)))
}

// reach resolves names, once, and pins them: the process finds the addresses in
// its /etc/hosts and can ask nobody else.
func (s *Sandbox) reach(ctx context.Context, list []string) (reach, error) {
	var r reach
	var hosts strings.Builder
	for _, text := range list {
		e, err := ParseEndpoint(text)
		if err != nil {
			return reach{}, err
		}
		prefixes := []netip.Prefix{e.Prefix}
		if e.Name != "" {
			addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", e.Name)
			if err != nil {
				return reach{}, fmt.Errorf("%w: %w", ErrEgress, err)
			}
			prefixes = prefixes[:0]
			for _, a := range addrs[:min(len(addrs), maxAddrs)] {
				a = a.Unmap()
				if !outside(a) && e.Name != "localhost" {
					return reach{}, fmt.Errorf("%w: %s resolves to %s, which is this machine or its link: name the address itself if that is meant", ErrEgress, e.Name, a)
				}
				prefixes = append(prefixes, netip.PrefixFrom(a, a.BitLen()))
				fmt.Fprintf(&hosts, "%s %s\n", a, e.Name)
			}
		}
		for _, p := range prefixes {
			d := ebpf.Dest{Prefix: p, Port: e.Port}
			if s.own(d) {
				return reach{}, fmt.Errorf("%w: %s is the node itself", ErrEgress, text)
			}
			r.dests = append(r.dests, d)
		}
	}
	r.hosts = hosts.String()
	return r, nil
}

// outside reports whether an address that a name resolved to leads away from
// this machine: whoever answers for a name must not choose loopback, or the
// link-local address where clouds keep credentials.
func outside(a netip.Addr) bool {
	return !a.IsLoopback() && !a.IsUnspecified() && !a.IsLinkLocalUnicast() && !a.IsMulticast() && !a.IsInterfaceLocalMulticast()
}
