package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/problem"
)

// Permission is what a route asks of its caller. The zero value is none at all,
// and no route may have it.
type Permission int

// Permissions.
const (
	noPermission Permission = iota
	Public                  // anyone who reached the listener: health and style sheets
	View                    // see fleet, events, releases
	Report                  // a node: events, acknowledgements, its desired release
	Publish                 // put a release into a channel
)

// route is one line of the table.
type route struct {
	method string
	path   string // http.ServeMux pattern
	perm   Permission
	handle func(*Server, http.ResponseWriter, *http.Request) error
}

// routes is all there is. A test fails for a line without permission.
var routes = []route{
	{"POST", "/v1/events", Report, (*Server).postEvents},
	{"GET", "/v1/events", View, (*Server).getEvents},
	{"POST", "/v1/releases", Publish, (*Server).postRelease},
	{"GET", "/v1/releases", View, (*Server).listReleases},
	{"GET", "/v1/releases/latest", Report, (*Server).latestRelease},
	{"GET", "/v1/releases/{id}", View, (*Server).getRelease},
	{"POST", "/v1/nodes/{id}/ack", Report, (*Server).postAck},
	{"GET", "/v1/nodes/{id}/watermark", Report, (*Server).getWatermark},
	{"GET", "/v1/fleet", View, (*Server).getFleet},
	{"GET", "/v1/fleet/summary", View, (*Server).getSummary},
	{"GET", "/healthz", Public, (*Server).healthz},
	{"GET", "/readyz", Public, (*Server).readyz},
	{"GET", "/metrics", View, (*Server).metrics},
	{"GET", "/{$}", View, (*Server).web},
	{"GET", "/assets/{file}", Public, (*Server).web},
}

// mux builds the handler of a table. It panics on a route without permission:
// such a program must not start.
func (s *Server) mux(table []route) http.Handler {
	byPath := map[string]map[string]http.HandlerFunc{}
	for _, rt := range table {
		if rt.perm == noPermission {
			panic("api: route " + rt.method + " " + rt.path + " has no permission")
		}
		if byPath[rt.path] == nil {
			byPath[rt.path] = map[string]http.HandlerFunc{}
		}
		name := rt.method + " " + rt.path
		byPath[rt.path][rt.method] = func(w http.ResponseWriter, r *http.Request) {
			start := time.Now()
			defer func() { s.m.request(name, time.Since(start)) }()
			if err := s.authorize(r, rt.perm); err != nil {
				s.fail(w, r, err)
				return
			}
			if err := rt.handle(s, w, r); err != nil {
				s.fail(w, r, err)
			}
		}
	}
	mux := http.NewServeMux()
	for path, methods := range byPath {
		if get := methods["GET"]; get != nil {
			methods["HEAD"] = get
		}
		allow := strings.Join(slices.Sorted(maps.Keys(methods)), ", ")
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			if h := methods[r.Method]; h != nil {
				h(w, r)
				return
			}
			w.Header().Set("Allow", allow)
			s.fail(w, r, problem.New(http.StatusMethodNotAllowed, "method_not_allowed", "this path takes "+allow))
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, problem.New(http.StatusNotFound, "no_such_path", "there is nothing at this path: the API is under /v1/"))
	})
	return mux
}

func (s *Server) web(w http.ResponseWriter, r *http.Request) error {
	s.o.Web.ServeHTTP(w, r)
	return nil
}

func (s *Server) healthz(w http.ResponseWriter, r *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}

func (s *Server) readyz(w http.ResponseWriter, r *http.Request) error {
	select {
	case <-s.drain:
		return problem.New(http.StatusServiceUnavailable, "not_ready", "the control plane is stopping")
	default:
	}
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	if err := s.o.Store.Ready(ctx); err != nil {
		s.o.Logger.Warn("not ready", "error", err)
		p := s.problemOf(r, err)
		detail := p.Detail
		if p.Status == http.StatusInternalServerError {
			detail = "the store cannot be used: the log says why"
		}
		return problem.New(http.StatusServiceUnavailable, "not_ready", detail)
	}
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ready"})
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false) // bodies go out as they came in
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes()) // the peer went away: nobody is left to tell
	return nil
}

// params reads the query: every key known, and given once.
func params(r *http.Request, known ...string) (map[string]string, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("bad_query", "the query string cannot be read: %v", err)
	}
	out := make(map[string]string, len(q))
	for key, vals := range q {
		if !slices.Contains(known, key) {
			hint := "known are " + strings.Join(known, ", ")
			if near := conf.Nearest(key, slices.Clone(known)); near != "" {
				hint = fmt.Sprintf("did you mean %q?", near)
			} else if len(known) == 0 {
				hint = "there are none here"
			}
			return nil, badRequest("unknown_parameter", "query parameter %q is unknown: %s", key, hint)
		}
		if len(vals) > 1 {
			return nil, badRequest("repeated_parameter", "query parameter %q is given %d times, want once", key, len(vals))
		}
		if err := store.ValidateID(vals[0]); err != nil && key != "cursor" {
			return nil, badRequest("bad_parameter", "query parameter %q: %v", key, err)
		}
		out[key] = vals[0]
	}
	return out, nil
}

// limitOf reads the limit parameter.
func limitOf(q map[string]string, dflt int) (int, error) {
	v, ok := q["limit"]
	if !ok {
		return dflt, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > store.MaxPage {
		return 0, badRequest("bad_limit", "limit is %q, want 1 to %d", v, store.MaxPage)
	}
	return n, nil
}

func badRequest(code, format string, args ...any) *problem.Problem {
	return problem.New(http.StatusBadRequest, code, fmt.Sprintf(format, args...))
}
