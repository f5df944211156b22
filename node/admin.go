package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/problem"
	"github.com/autonomyops/autonomy/internal/run"
)

// admin is what an operator on this machine may ask of a running node: a Unix
// socket, mode 0600, whose peer must be the node's own user or root. The
// listeners that agents reach have none of it.
//
// It is net/http and not the edge's server: nothing here is on the way of a
// call, and the profiles of the standard library are handlers of it.
type admin struct {
	n    *node
	http http.Server
	ln   net.Listener
}

// adminRoutes is all there is. A pattern is method and path.
func (a *admin) routes() map[string]http.HandlerFunc {
	return map[string]http.HandlerFunc{
		"GET /v1/status":             func(w http.ResponseWriter, _ *http.Request) { answer(w, a.n.status()) },
		"POST /v1/reload":            a.reload,
		"POST /v1/export/resume":     a.resume,
		"GET /debug/flight":          a.flight,
		"GET /debug/pprof/":          pprof.Index,
		"GET /debug/pprof/cmdline":   http.NotFound, // flags may name what is nobody's business
		"GET /debug/pprof/profile":   pprof.Profile,
		"GET /debug/pprof/symbol":    pprof.Symbol,
		"GET /debug/pprof/trace":     pprof.Trace,
		"GET /debug/pprof/heap":      pprof.Handler("heap").ServeHTTP,
		"GET /debug/pprof/goroutine": pprof.Handler("goroutine").ServeHTTP,
	}
}

// How long a peer may take. A profile is written while it is made.
const (
	adminReadTimeout  = 10 * time.Second
	adminWriteTimeout = 5 * time.Minute
)

// openAdmin listens on path; nil without one.
func (n *node) openAdmin(path string) (*admin, error) {
	if path == "" {
		return nil, nil
	}
	ln, err := run.Listen("unix:"+path, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--admin-socket: %w", err)
	}
	a := &admin{n: n, ln: ln}
	mux := http.NewServeMux()
	for pattern, h := range a.routes() {
		mux.HandleFunc(pattern, h)
	}
	a.http = http.Server{
		Handler: mux, ReadTimeout: adminReadTimeout, WriteTimeout: adminWriteTimeout, MaxHeaderBytes: 8 << 10,
		ErrorLog: nil,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, mayAdminister(c))
		},
	}
	a.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err, _ := r.Context().Value(peerKey{}).(error); err != nil {
			problem.Write(w, problem.New(http.StatusForbidden, "forbidden", err.Error()))
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, 4<<10) // nothing here takes a body
		mux.ServeHTTP(w, r)
	})
	return a, nil
}

// peerKey is the context key of why the peer may not administer, nil when it may.
type peerKey struct{}

// mayAdminister says why the peer of c may not administer this node. The file's
// mode says the same; it can be changed behind our back.
func mayAdminister(c net.Conn) error {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return errors.New("not a Unix socket")
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return errors.New("the peer cannot be named")
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || credErr != nil {
		return errors.New("the peer cannot be named")
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d may not administer this node: be root, or the node's own user (%d)", cred.Uid, os.Geteuid())
	}
	return nil
}

func (a *admin) serve() error {
	if err := a.http.Serve(a.ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", run.Addr(a.ln), err)
	}
	return nil
}

// close ends it at once: what it is asked is asked again.
func (a *admin) close() error { return a.http.Close() }

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the peer has gone
}

func (a *admin) reload(w http.ResponseWriter, r *http.Request) {
	if err := a.n.reload(r.Context()); err != nil {
		problem.Write(w, problem.New(http.StatusUnprocessableEntity, "reload_refused", err.Error()))
		return
	}
	answer(w, map[string]any{"reloaded": true, "tools": len(a.n.tools.Load().List())})
}

func (a *admin) resume(w http.ResponseWriter, _ *http.Request) {
	if a.n.exporter == nil {
		problem.Write(w, problem.New(http.StatusConflict, "no_export", "this node exports nothing: it was started without --otlp-endpoint"))
		return
	}
	if err := a.n.exporter.Resume(); err != nil {
		problem.Write(w, problem.New(http.StatusInternalServerError, "not_resumed", err.Error()))
		return
	}
	answer(w, a.n.exporter.Status())
}

func (a *admin) flight(w http.ResponseWriter, _ *http.Request) {
	if a.n.flight == nil {
		problem.Write(w, problem.New(http.StatusConflict, "no_flight_recorder", "the flight recorder is off: start the node with --slow-call TIME"))
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if err := a.n.flight.writeTo(w); err != nil {
		a.n.log.Warn("flight recorder", "err", err)
	}
}
