// Package api is the control plane's HTTP edge: it decodes and bounds what
// comes in, asks the store, and writes what the contract names.
//
// The life of a request: the peer's token bucket (429), Host and Origin
// (403, DNS rebinding), the route table (404, 405), the route's permission
// (401), then the handler. A handler returns an error instead of writing one;
// fail turns it into an RFC 9457 problem, and what no handler expected into
// "internal" without detail.
//
// Bounds: a body is at most MaxBodyBytes on the wire and after decompression;
// all bodies being read or stored at one time share inflightBodies times that;
// a request holds at most store.MaxBatch events; long polls are at most
// MaxWaiters for at most maxWait.
//
// Nodes poll; nothing here dials (INV-18). A Server is safe for concurrent use.
// Only cp imports this package. Of verify it uses the release envelope only.
package api

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/sync/semaphore"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/problem"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/verify"
)

const (
	inflightBodies = 8                // bodies of full size at one time
	bodyWait       = time.Second      // how long a request waits for its share
	handleTimeout  = 30 * time.Second // one request, but for long polls and streams
	maxWait        = 60 * time.Second // longest long poll
	maxPeers       = 65536            // peers whose bucket is remembered
)

// Options of New.
type Options struct {
	Store        store.Store
	Keyring      *verify.Keyring // nil: releases are stored unverified, and the answer says so
	Web          http.Handler    // serves / and /assets/
	MaxBodyBytes int64           // bytes, default 16 MiB
	StaleAfter   time.Duration   // silence after which a node is stale, default 90 s
	PeerRate     float64         // requests per second of one peer, 0: not limited
	MaxWaiters   int             // long polls at one time, default 10,000
	AllowedHosts []string        // names beside the loopback ones that Host may carry
	Logger       *slog.Logger    // default: discards
	Now          func() time.Time
}

// Server answers the control plane's HTTP API.
type Server struct {
	o       Options
	handler http.Handler
	set     *metrics.Set
	m       counters
	bodies  *semaphore.Weighted
	peers   *buckets
	news    news
	touched touches
	waiters atomic.Int64
	drain   chan struct{} // closed by Drain
	drained sync.Once
}

// New makes a Server.
func New(o Options) *Server {
	if o.MaxBodyBytes <= 0 {
		o.MaxBodyBytes = 16 << 20
	}
	if o.StaleAfter <= 0 {
		o.StaleAfter = 90 * time.Second
	}
	if o.MaxWaiters <= 0 {
		o.MaxWaiters = 10000
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Web == nil {
		o.Web = http.NotFoundHandler()
	}
	s := &Server{
		o: o, set: metrics.NewSet(), bodies: semaphore.NewWeighted(inflightBodies * o.MaxBodyBytes),
		peers: newBuckets(o.PeerRate, maxPeers, o.Now), drain: make(chan struct{}),
		touched: touches{every: o.StaleAfter / 3, seen: map[string]touch{}},
		news:    news{ch: make(chan struct{})},
	}
	s.m = newCounters(s)
	s.handler = s.mux(routes)
	return s
}

// Drain ends the long polls, and readiness: call it before the HTTP server
// shuts down.
func (s *Server) Drain() { s.drained.Do(func() { close(s.drain) }) }

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if wait := s.peers.take(peer(r)); wait > 0 {
		p := problem.New(http.StatusTooManyRequests, "rate_limited", "this peer sends more requests than its share: wait as Retry-After says, and send events in larger batches")
		p.RetryAfter = wait
		s.fail(w, r, p)
		return
	}
	if err := s.sameOrigin(r); err != nil {
		s.fail(w, r, err)
		return
	}
	s.handler.ServeHTTP(w, r)
}

// peer names who is charged: the client certificate when there is one, else
// the address.
func peer(r *http.Request) string {
	if c := clientCert(r); c != nil {
		return "cert:" + c.Subject.String()
	}
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

func clientCert(r *http.Request) *x509.Certificate {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return nil
	}
	return r.TLS.VerifiedChains[0][0]
}

// sameOrigin keeps a web page in this machine's browser from using the API: a
// page whose name was rebound to 127.0.0.1 sends its own name as Host, any
// other foreign page sends its Origin.
func (s *Server) sameOrigin(r *http.Request) error {
	if r.TLS == nil && !overUnix(r) && !s.allowedHost(r.Host) {
		return problem.New(http.StatusForbidden, "host_refused", "the Host header names none of this listener's names: use 127.0.0.1 or localhost, or start with --allowed-host")
	}
	if origin := r.Header.Get("Origin"); origin != "" {
		u, err := url.Parse(origin)
		if err != nil || u.Host == "" || !strings.EqualFold(u.Host, r.Host) {
			return problem.New(http.StatusForbidden, "origin_refused", "requests from pages of another origin are refused")
		}
	}
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "same-origin", "none":
		return nil
	}
	if r.Method == http.MethodGet && r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document" {
		return nil // a link to the web page
	}
	return problem.New(http.StatusForbidden, "origin_refused", "requests from pages of another origin are refused")
}

// overUnix: no web page can reach a Unix socket, and its clients send any Host.
func overUnix(r *http.Request) bool {
	a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return ok && a.Network() == "unix"
}

func (s *Server) allowedHost(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.Trim(name, "[]")
	return run.Loopback(net.JoinHostPort(strings.ToLower(name), "0")) || slices.ContainsFunc(s.o.AllowedHosts, func(a string) bool { return strings.EqualFold(a, name) })
}

// authorize decides whether a request may use a permission. Peers with a
// verified client certificate and local ones may use all: finer roles come with
// identities of operators and nodes, from this one place.
func (s *Server) authorize(r *http.Request, p Permission) error {
	if p == Public || clientCert(r) != nil {
		return nil
	}
	if a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok && (overUnix(r) || run.Loopback(a.String())) {
		return nil
	}
	return problem.New(http.StatusUnauthorized, "unauthenticated", "this listener asks for a client certificate signed by its --tls-client-ca")
}

// fail writes err as a problem.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	p := s.problemOf(r, err)
	s.m.problem(p)
	problem.Write(w, p)
}

func (s *Server) problemOf(r *http.Request, err error) *problem.Problem {
	var p *problem.Problem
	var seq *store.SequenceError
	retry := func(status int, code, detail string, after time.Duration) *problem.Problem {
		p := problem.New(status, code, detail)
		p.RetryAfter = after
		return p
	}
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &seq):
		return problem.New(http.StatusConflict, "sequence_not_higher", seq.Error()+": publish with a higher one")
	case errors.Is(err, store.ErrReleaseConflict):
		return problem.New(http.StatusConflict, "release_conflict", err.Error()+": releases are append-only, publish under a new release_id")
	case errors.Is(err, store.ErrInvalid):
		return problem.New(http.StatusBadRequest, "invalid_event", err.Error())
	case errors.Is(err, store.ErrNotFound):
		return problem.New(http.StatusNotFound, "not_found", err.Error())
	case errors.Is(err, store.ErrFull):
		s.o.Logger.Warn("store is full", "path", r.URL.Path)
		return retry(http.StatusInsufficientStorage, "store_full", "the store has reached --max-db-bytes or --keep-free: nothing of this request was stored. Raise the limit, free the disk, or shorten --event-retention", 30*time.Second)
	case errors.Is(err, store.ErrBusy), errors.Is(err, context.DeadlineExceeded):
		return retry(http.StatusServiceUnavailable, "busy", "the store did not answer in time: send the request again, repeats are recognised", time.Second)
	case errors.Is(err, store.ErrClosed), errors.Is(err, context.Canceled):
		return retry(http.StatusServiceUnavailable, "shutting_down", "the control plane is stopping: send the request again later", time.Second)
	}
	s.o.Logger.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	return problem.New(http.StatusInternalServerError, "internal", "")
}
