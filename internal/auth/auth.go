// Package auth says who calls: it turns what a listener knows of its peer, the
// credentials of a Unix socket, a client certificate, a bearer token, into a
// Caller, and holds the limits of each Caller.
//
// # Life of a caller
//
// Authenticator.Listener wraps a listening socket, so that an accepted
// connection knows its peer: who the kernel says it is, or the certificate of
// its TLS handshake. For every request the HTTP edge asks Authenticator.Caller,
// with the token if one was sent. A credential that was shown and does not hold
// is an error; it is never passed over for a weaker one. Limits.Enter then asks
// whether this caller may make one more call now.
//
// # Files
//
// Tokens, certificates, revocation list and the callers file are read at start
// and again by Reload when they change. What takes rights away fails closed: a
// token file that cannot be read means that no token is valid, a revocation
// list that is missing, damaged or past its next update means that no
// certificate is. What describes (the callers file, the server's own
// certificate) stays as it was when its new form is faulty. Problems says what
// is wrong; it is for readiness and status.
//
// # Concurrency
//
// All exported types are safe for concurrent use. A request reads immutable
// snapshots; no lock is shared by requests.
//
// Times are time.Time and time.Duration, sizes bytes. Only listeners and their
// wiring (node, node/httpapi, node/call, the token command) import this package.
package auth

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Types of callers: how the identity was established.
const (
	Unix      = "unix"      // peer credentials of a Unix socket
	Token     = "token"     // bearer token
	Cert      = "cert"      // client certificate
	Anonymous = "anonymous" // loopback, no credential
)

// Caller is an authenticated principal. The zero value is nobody.
type Caller struct {
	Type string
	ID   string // name from the callers or token file; else uid:1000, a certificate's name, loopback

	// Of the process that connected, for Type Unix only. The pid is a trace for
	// people: it may have ended and its number be in use again.
	UID, GID uint32
	PID      int32
}

// Key is what limits and idempotency keys are kept by.
func (c Caller) Key() string { return c.Type + ":" + c.ID }

// loopback is who calls on loopback without a credential.
var loopback = Caller{Type: Anonymous, ID: "loopback"}

// Sentinels of Authenticator.Caller. Each is a 401.
var (
	ErrNoCredential = errors.New("no credential: send a bearer token or a client certificate")
	ErrToken        = errors.New("the bearer token is not valid")
	ErrCertificate  = errors.New("the client certificate is not valid")
)

// Options configure an Authenticator. Empty files are not used.
type Options struct {
	Tokens    string // token file, see TokenFile
	Callers   string // callers file, see Callers
	TLS       TLSFiles
	Anonymous bool // connections from loopback to loopback need no credential
	Logger    *slog.Logger
	Now       func() time.Time // default time.Now
}

// Authenticator tells who calls.
type Authenticator struct {
	o       Options
	tls     *serverTLS // nil: TCP listeners are plain
	tokens  atomic.Pointer[tokenSet]
	callers atomic.Pointer[Callers]

	mu       sync.Mutex // guards what follows; taken by Reload and Problems
	watched  *watch
	problems map[string]string // file → why it is not in force
}

// Open reads all files. At start every fault is an error.
func Open(o Options) (*Authenticator, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	a := &Authenticator{o: o, problems: map[string]string{}}
	a.callers.Store(&Callers{})
	a.tokens.Store(&tokenSet{})
	var errs []error
	if o.TLS.Cert != "" {
		o.TLS.optional = o.Tokens != ""
		var err error
		if a.tls, err = openTLS(o.TLS, o.Now); err != nil {
			errs = append(errs, err)
		}
	}
	if o.Tokens != "" {
		set, err := readTokens(o.Tokens)
		if err != nil {
			errs = append(errs, err)
		}
		a.tokens.Store(set)
	}
	if o.Callers != "" {
		c, err := ReadCallers(o.Callers)
		if err != nil {
			errs = append(errs, err)
		} else {
			a.callers.Store(c)
		}
	}
	a.watched = newWatch(o.Tokens, o.Callers, o.TLS.Cert, o.TLS.Key, o.TLS.ClientCA, o.TLS.CRL)
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return a, nil
}

// TLS reports whether TCP listeners speak TLS.
func (a *Authenticator) TLS() bool { return a.tls != nil }

// Callers is the callers file in force.
func (a *Authenticator) Callers() *Callers { return a.callers.Load() }

// Reload reads the files again if one of them changed, or with force. It reports
// which are in force anew; a file that is faulty is in Problems and in the log.
func (a *Authenticator) Reload(force bool) (changed []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	touched := a.watched.changed()
	if !touched && !force {
		return nil
	}
	note := func(file, consequence string, err error) {
		if err == nil {
			changed = append(changed, file)
			delete(a.problems, file)
			return
		}
		a.problems[file] = consequence + ": " + err.Error()
		a.o.Logger.Error("reload of credentials failed", "file", file, "consequence", consequence, "err", err)
	}
	if f := a.o.Tokens; f != "" {
		set, err := readTokens(f)
		a.tokens.Store(set) // empty with an error: nobody has a token
		note(f, "no token is valid", err)
	}
	if f := a.o.Callers; f != "" {
		c, err := ReadCallers(f)
		if err == nil {
			a.callers.Store(c)
		}
		note(f, "the former one stays in force", err)
	}
	if a.tls != nil {
		pairErr, peerErr := a.tls.reload()
		note(a.o.TLS.Cert, "the former certificate stays in force", pairErr)
		if a.o.TLS.ClientCA != "" {
			note(a.o.TLS.ClientCA, "no client certificate is valid", peerErr)
		}
	}
	if !touched {
		return nil
	}
	return changed
}

// Problems says which files are not in force and what follows from it.
func (a *Authenticator) Problems() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for file, why := range a.problems {
		out = append(out, file+": "+why)
	}
	slices.Sort(out)
	if a.tls != nil {
		if why := a.tls.stale(a.o.Now()); why != "" {
			out = append(out, why)
		}
	}
	return out
}

// Listener wraps ln, so that Caller knows the peers of its connections.
func (a *Authenticator) Listener(ln net.Listener) net.Listener {
	switch {
	case ln.Addr().Network() == "unix":
		return peerListener{ln}
	case a.tls != nil:
		return tls.NewListener(ln, a.tls.config())
	}
	return ln
}

// Caller tells who sends a request over c, a connection of a wrapped listener.
// token is the bearer token, nil when none was sent. A token goes before the
// certificate of the connection: a proxy with a certificate passes on whose
// call it is. The handshake of a TLS connection must be over.
//
// Errors wrap ErrNoCredential, ErrToken or ErrCertificate.
func (a *Authenticator) Caller(c net.Conn, token []byte) (Caller, error) {
	// A certificate counts on every request, not only at the handshake: it may
	// have been revoked since.
	var cert Caller
	if tc, ok := c.(*tls.Conn); ok {
		state := tc.ConnectionState()
		if len(state.PeerCertificates) > 0 {
			name, err := a.tls.peer(&state, a.o.Now())
			if err != nil {
				return Caller{}, fmt.Errorf("%w: %w", ErrCertificate, err)
			}
			cert = Caller{Type: Cert, ID: a.callers.Load().certName(name, state.PeerCertificates[0])}
		}
	}
	switch {
	case token != nil:
		return a.tokens.Load().caller(token, a.o.Now())
	case cert.Type != "":
		return cert, nil
	}
	if pc, ok := c.(peerConn); ok {
		who := pc.peer
		who.ID = a.callers.Load().unixName(who)
		return who, nil
	}
	if a.o.Anonymous && loopbackAddr(c.RemoteAddr()) && loopbackAddr(c.LocalAddr()) {
		return loopback, nil
	}
	return Caller{}, ErrNoCredential
}

// FromUnix reports whether c came over a Unix socket.
func FromUnix(c net.Conn) bool {
	_, ok := c.(peerConn)
	return ok
}

func loopbackAddr(a net.Addr) bool {
	t, ok := a.(*net.TCPAddr)
	return ok && t.IP.IsLoopback()
}

// peerConn is a Unix connection with its peer, read once when it was accepted.
type peerConn struct {
	net.Conn
	peer Caller
}

// NetConn is the connection underneath, as tls.Conn has it.
func (c peerConn) NetConn() net.Conn { return c.Conn }

type peerListener struct{ net.Listener }

func (l peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer, err := peerOf(c)
		if err != nil {
			c.Close() // who cannot be named is not served
			continue
		}
		return peerConn{c, peer}, nil
	}
}

func peerOf(c net.Conn) (Caller, error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return Caller{}, fmt.Errorf("a connection of type %T has no peer credentials", c)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Caller{}, err
	}
	if credErr != nil {
		return Caller{}, credErr
	}
	return Caller{Type: Unix, ID: "uid:" + strconv.FormatUint(uint64(cred.Uid), 10), UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}, nil
}
