package httpapi

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/valyala/fasthttp"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/node/call"
)

// public are the paths that answer whoever reaches a listener: a load balancer
// and an init system ask them. They say whether the node serves, and nothing
// about what it does.
var public = []string{"/healthz", "/readyz"}

// identify decides whether a request is looked at at all: its framing has one
// reading, it comes from where it may come from, and its caller is known. When
// it returns false it has answered.
func (s *Server) identify(ctx *fasthttp.RequestCtx) (call.Caller, bool) {
	if why := framing(&ctx.Request.Header); why != "" {
		ctx.SetConnectionClose()
		s.deny(ctx, fasthttp.StatusBadRequest, "malformed", why)
		return call.Caller{}, false
	}
	if why := s.foreign(ctx); why != "" {
		s.deny(ctx, fasthttp.StatusForbidden, "forbidden_origin", why)
		return call.Caller{}, false
	}
	caller, err := s.authenticate(ctx)
	if err == nil || errors.Is(err, auth.ErrNoCredential) && slices.Contains(public, string(ctx.Path())) {
		return caller, true
	}
	code, challenge := "unauthenticated", "Bearer"
	if !errors.Is(err, auth.ErrNoCredential) {
		code, challenge = "invalid_credential", `Bearer error="invalid_token"` // RFC 6750
		s.refused(err)
	}
	if errors.Is(err, auth.ErrCertificate) {
		ctx.SetConnectionClose() // it will not get better on this one
	}
	ctx.Response.Header.Set(fasthttp.HeaderWWWAuthenticate, challenge)
	s.deny(ctx, fasthttp.StatusUnauthorized, code, err.Error())
	return call.Caller{}, false
}

// refused tells of a credential that was shown and does not hold.
func (s *Server) refused(err error) {
	if s.o.Refused == nil {
		return
	}
	what := "token"
	if errors.Is(err, auth.ErrCertificate) {
		what = "certificate"
	}
	s.o.Refused(what)
}

// framing says why a request could be taken apart in two ways, "" when it could
// not. A proxy in front of this listener that reads it the other way would let
// one caller put words into another's mouth, so what RFC 9112 lets a server
// repair is refused here: both lengths, folded lines, header lines that end in
// LF alone. (The request line may: the HTTP library does not show its end.)
func framing(h *fasthttp.RequestHeader) string {
	var encoding, length bool
	authorizations := 0
	for rest := h.RawHeaders(); ; {
		i := bytes.IndexByte(rest, '\n')
		if i < 0 {
			break
		}
		line := rest[:i]
		if i == 0 || line[i-1] != '\r' {
			return "a header line does not end in CR LF"
		}
		switch line[0] | 0x20 {
		case ' ', '\t' | 0x20:
			return "a header line is folded"
		case 't':
			encoding = encoding || named(line, "transfer-encoding:")
		case 'c':
			length = length || named(line, "content-length:")
		case 'a':
			if named(line, "authorization:") {
				authorizations++
			}
		}
		rest = rest[i+1:]
	}
	switch {
	case encoding && length:
		return "the request has both Content-Length and Transfer-Encoding"
	case encoding && h.ContentLength() != -1:
		return "the only Transfer-Encoding served is chunked"
	case authorizations > 1:
		return "the request has more than one Authorization header"
	}
	if p := h.Protocol(); string(p) != "HTTP/1.1" && string(p) != "HTTP/1.0" {
		return "the version of HTTP is neither 1.1 nor 1.0"
	}
	if target := h.RequestURI(); len(target) == 0 || target[0] != '/' {
		return "the request target is no path" // an absolute one would name a host beside Host
	}
	return ""
}

// named reports whether a header line begins with name, which is in lower case
// and ends in ':'.
func named(line []byte, name string) bool {
	if len(line) < len(name) {
		return false
	}
	for i := range len(name) {
		c := line[i]
		if c >= 'A' && c <= 'Z' {
			c |= 0x20
		}
		if c != name[i] {
			return false
		}
	}
	return true
}

// authenticate establishes who calls. A credential that does not hold is an
// error, never passed over for anonymous.
func (s *Server) authenticate(ctx *fasthttp.RequestCtx) (call.Caller, error) {
	var token []byte
	if h := ctx.Request.Header.Peek(fasthttp.HeaderAuthorization); h != nil { // empty: a credential was meant
		const scheme = "bearer "
		if len(h) < len(scheme) || !bytes.EqualFold(h[:len(scheme)], []byte(scheme)) {
			return call.Caller{}, auth.ErrToken
		}
		token = bytes.TrimLeft(h[len(scheme):], " ")
	}
	return s.o.Auth.Caller(ctx.Conn(), token)
}

// foreign reports why a request comes from where it should not, "" when it
// does not: Host must name this listener (DNS rebinding), Origin must be absent
// or this server (a page in a browser).
func (s *Server) foreign(ctx *fasthttp.RequestCtx) string {
	origin := ctx.Request.Header.Peek(fasthttp.HeaderOrigin)
	if auth.FromUnix(ctx.Conn()) {
		if len(origin) > 0 {
			return "requests from a browser are not served here"
		}
		return ""
	}
	host := string(ctx.Request.Header.Host())
	scheme := "http://"
	if ctx.IsTLS() {
		scheme = "https://"
	}
	if !s.ownHost(host, ctx.LocalAddr(), ctx.IsTLS()) {
		return "the Host header does not name this listener: use the address that the node prints at start, or give --allowed-host"
	}
	if len(origin) > 0 && string(origin) != scheme+host {
		return "requests from another origin are not served here"
	}
	return ""
}

// ownHost reports whether a Host header names the listener with the address
// local, or is one of the allowed names, with any port: a port may be forwarded.
func (s *Server) ownHost(host string, local net.Addr, tls bool) bool {
	name, port, err := net.SplitHostPort(host)
	if err != nil {
		name, port = strings.Trim(host, "[]"), "80"
		if tls {
			port = "443"
		}
	}
	if slices.ContainsFunc(s.o.AllowedHosts, func(h string) bool { return strings.EqualFold(h, name) }) {
		return true
	}
	addr, ok := local.(*net.TCPAddr)
	if !ok {
		return false
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || int(n) != addr.Port || port[0] == '0' {
		return false
	}
	if strings.EqualFold(name, "localhost") {
		return addr.IP.IsLoopback()
	}
	ip, err := netip.ParseAddr(name)
	own, ok := netip.AddrFromSlice(addr.IP)
	return err == nil && ok && ip.Zone() == "" && ip.Unmap() == own.Unmap()
}
