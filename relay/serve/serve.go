// Package serve is the relay's HTTP edge: the pull half of the OCI distribution
// API 1.1 over published content, and the relay's own status and prestage calls.
//
// # Life of a request
//
// The path is parsed strictly, before anything is looked up: no escapes, no
// empty or dotted parts, names and digests as the specification writes them.
// Content is looked up under the repository it was declared for; the same
// digest under another name is not there. A blob goes from file to socket by
// sendfile: the response writer wrapper keeps io.ReaderFrom, and HTTP/2 is off.
// The upstream is never waited for.
//
// Under /v2/ errors are OCI error documents, elsewhere RFC 9457 problems. A
// client that takes less than WriteChunk bytes per WriteTimeout is cut off; the
// number of connections is bounded by the listener (LimitListener).
//
// A Handler is safe for concurrent use. Only the relay imports it.
package serve

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/autonomyops/autonomy/internal/problem"
	"github.com/autonomyops/autonomy/relay/cache"
	"github.com/autonomyops/autonomy/relay/oci"
	"github.com/autonomyops/autonomy/relay/prestage"
)

// Limits of the edge.
const (
	WriteChunk   = 1 << 20          // bytes that a client must take …
	WriteTimeout = 60 * time.Second // … in this time: about 17 kB/s
	ReadTimeout  = 30 * time.Second // for the body of a submission
	maxPath      = 1024
	maxRange     = 256 // bytes of a Range header: a handful of ranges
)

// Content is what is published. Stager and Cache together are one.
type Content interface {
	// Lookup tells what a repository serves under a digest.
	Lookup(repo string, d oci.Digest) (prestage.Node, bool)
	// Known reports whether the repository is declared.
	Known(repo string) bool
	// Why says why a digest is not served.
	Why(repo string, d oci.Digest) string
	// Referrers lists the served referrers of a digest.
	Referrers(repo string, subject oci.Digest) []oci.Descriptor
}

// Lists takes prestage lists and reports on them; *prestage.Stager is one.
type Lists interface {
	// Submit errors: *prestage.Refusal, or about the disk.
	Submit(body []byte, now time.Time) (*prestage.Accepted, error)
	Report(id string) (*prestage.Report, bool)
}

// Config of a Handler.
type Config struct {
	Content Content
	Lists   Lists
	Open    func(oci.Digest) (*cache.Blob, error) // errors: cache.ErrNotFound, or the disk's
	Status  func() any                            // body of GET /v1/status
	Ready   func() error                          // nil when ready; else what is not
	Full    func(error) bool                      // whether an error of Submit means that the disk is full
	Metrics *metrics.Set
	Log     *slog.Logger
}

// Handler serves one relay.
type Handler struct{ cfg Config }

// New makes a Handler.
func New(cfg Config) *Handler { return &Handler{cfg: cfg} }

func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rw := &writer{ResponseWriter: w, rc: http.NewResponseController(w)}
	rw.extend()
	route := h.route(rw, r)
	code := rw.status
	if code == 0 {
		code = http.StatusOK
	}
	h.cfg.Metrics.GetOrCreateCounter(fmt.Sprintf(`autonomy_relay_http_requests_total{route=%q,code="%d"}`, route, code)).Inc()
	h.cfg.Metrics.GetOrCreateCounter(`autonomy_relay_http_sent_bytes_total`).AddInt64(rw.sent)
}

// route answers the request and names the route for the metrics.
func (h *Handler) route(w *writer, r *http.Request) string {
	path := r.URL.Path
	oversize := len(path) > maxPath
	if path == "/v2" || strings.HasPrefix(path, "/v2/") {
		switch {
		case oversize:
			ociError(w, http.StatusBadRequest, codeNameInvalid, fmt.Sprintf("the path has %d bytes, the limit is %d", len(path), maxPath))
		case r.URL.RawPath != "":
			ociError(w, http.StatusBadRequest, codeNameInvalid, "the path holds escapes; names and digests need none")
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			w.Header().Set("Allow", "GET, HEAD")
			ociError(w, http.StatusMethodNotAllowed, codeUnsupported, "this relay is read-only; content comes in by prestage lists")
		default:
			return h.v2(w, r, path)
		}
		return "v2"
	}
	if oversize || r.URL.RawPath != "" {
		problem.Write(w, problem.New(http.StatusBadRequest, "bad_path", "the path is too long or holds escapes"))
		return "bad_path"
	}
	id, isReport := strings.CutPrefix(path, "/v1/prestage/")
	switch {
	case path == "/v1/prestage":
		if allow(w, r, http.MethodPost) {
			h.submit(w, r)
		}
		return "prestage"
	case isReport:
		if allow(w, r, http.MethodGet, http.MethodHead) {
			h.report(w, id)
		}
		return "prestage_report"
	case path == "/v1/status":
		if allow(w, r, http.MethodGet, http.MethodHead) {
			writeJSON(w, http.StatusOK, h.cfg.Status())
		}
		return "status"
	case path == "/healthz":
		if allow(w, r, http.MethodGet, http.MethodHead) {
			writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
		}
		return "healthz"
	case path == "/readyz":
		if allow(w, r, http.MethodGet, http.MethodHead) {
			if err := h.cfg.Ready(); err != nil {
				problem.Write(w, problem.New(http.StatusServiceUnavailable, "not_ready", err.Error()))
			} else {
				writeJSON(w, http.StatusOK, map[string]string{"status": "ready"})
			}
		}
		return "readyz"
	case path == "/metrics":
		if allow(w, r, http.MethodGet) {
			w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			h.cfg.Metrics.WritePrometheus(w)
		}
		return "metrics"
	}
	problem.Write(w, problem.New(http.StatusNotFound, "no_such_path", "this relay serves /v2/, /v1/prestage, /v1/status, /metrics, /healthz and /readyz"))
	return "unknown"
}

func allow(w http.ResponseWriter, r *http.Request, methods ...string) bool {
	if slices.Contains(methods, r.Method) {
		return true
	}
	w.Header().Set("Allow", strings.Join(methods, ", "))
	problem.Write(w, problem.New(http.StatusMethodNotAllowed, "method_not_allowed", "want "+strings.Join(methods, " or ")))
	return false
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // the peer went away: nobody is left to tell
}

// Codes of the distribution specification.
const (
	codeBlobUnknown     = "BLOB_UNKNOWN"
	codeDigestInvalid   = "DIGEST_INVALID"
	codeManifestUnknown = "MANIFEST_UNKNOWN"
	codeNameInvalid     = "NAME_INVALID"
	codeNameUnknown     = "NAME_UNKNOWN"
	codeUnsupported     = "UNSUPPORTED"
	codeUnknown         = "UNKNOWN"
)

func ociError(w http.ResponseWriter, status int, code, message string) {
	type one struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	writeJSON(w, status, map[string][]one{"errors": {{code, message}}})
}

// kind of a path under /v2/.
type kind string

const (
	kindBase      kind = "v2"
	kindManifest  kind = "manifests"
	kindBlob      kind = "blobs"
	kindReferrers kind = "referrers"
	kindTags      kind = "tags"
)

// target is a parsed path under /v2/.
type target struct {
	kind kind
	repo string
	ref  string // digest, tag, or "list"
}

// parsePath splits /v2/<name>/<kind>/<ref>. The name may itself hold any of the
// words for kinds: the last but one part decides.
func parsePath(path string) (t target, ok bool) {
	rest, ok := strings.CutPrefix(path, "/v2")
	if !ok {
		return target{}, false
	}
	if rest == "" || rest == "/" {
		return target{kind: kindBase}, true
	}
	rest, ok = strings.CutPrefix(rest, "/")
	if !ok {
		return target{}, false
	}
	head, ref, ok := cutLast(rest)
	if !ok || ref == "" {
		return target{}, false
	}
	repo, k, ok := cutLast(head)
	if !ok {
		return target{}, false
	}
	t = target{kind: kind(k), repo: repo, ref: ref}
	switch t.kind {
	case kindManifest, kindBlob, kindReferrers:
		return t, true
	case kindTags:
		return t, ref == "list"
	}
	return target{}, false
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", "", false
	}
	return s[:i], s[i+1:], true
}

func (h *Handler) v2(w *writer, r *http.Request, path string) string {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	t, ok := parsePath(path)
	if !ok {
		ociError(w, http.StatusNotFound, codeUnsupported, "no such path: want /v2/<name>/manifests/<digest>, blobs/<digest>, referrers/<digest> or tags/list")
		return "v2"
	}
	if t.kind == kindBase {
		writeJSON(w, http.StatusOK, struct{}{})
		return "v2"
	}
	route := "v2_" + string(t.kind)
	if _, err := oci.ParseName(t.repo); err != nil {
		ociError(w, http.StatusBadRequest, codeNameInvalid, err.Error())
		return route
	}
	if t.kind == kindTags {
		h.tags(w, t.repo)
		return route
	}
	d, err := oci.ParseDigest(t.ref)
	if err != nil {
		if t.kind == kindManifest && oci.ParseTag(t.ref) {
			ociError(w, http.StatusNotFound, codeManifestUnknown, "this relay serves by digest, not by tag")
		} else {
			ociError(w, http.StatusBadRequest, codeDigestInvalid, err.Error())
		}
		return route
	}
	switch t.kind {
	case kindReferrers:
		h.referrers(w, r, t.repo, d)
	default:
		h.content(w, r, t, d)
	}
	return route
}

// content serves a manifest or a blob.
func (h *Handler) content(w *writer, r *http.Request, t target, d oci.Digest) {
	manifest := t.kind == kindManifest
	node, ok := h.cfg.Content.Lookup(t.repo, d)
	if !ok || manifest && !node.Manifest {
		code := codeBlobUnknown
		if manifest {
			code = codeManifestUnknown
		}
		why := h.cfg.Content.Why(t.repo, d)
		if ok {
			why = "the digest is a blob, not a manifest"
		}
		if !h.cfg.Content.Known(t.repo) {
			code = codeNameUnknown
		}
		ociError(w, http.StatusNotFound, code, why)
		return
	}
	blob, err := h.cfg.Open(d)
	if err != nil {
		h.cfg.Log.Error("published content cannot be opened", "repository", t.repo, "digest", d, "error", err)
		ociError(w, http.StatusInternalServerError, codeUnknown, "the content cannot be read from disk; the relay's log says why")
		return
	}
	defer blob.Close()
	header := w.Header()
	header.Set("Docker-Content-Digest", string(d))
	header.Set("ETag", `"`+string(d)+`"`)
	header.Set("Cache-Control", "max-age=31536000, immutable")
	header.Set("X-Content-Type-Options", "nosniff")
	if manifest {
		header.Set("Content-Type", node.MediaType)
	} else {
		header.Set("Content-Type", "application/octet-stream")
	}
	if len(r.Header.Get("Range")) > maxRange {
		r.Header.Del("Range") // as RFC 9110 allows: the whole is an answer too
	}
	http.ServeContent(w, r, "", time.Time{}, blob.File)
}

func (h *Handler) tags(w *writer, repo string) {
	if !h.cfg.Content.Known(repo) {
		ociError(w, http.StatusNotFound, codeNameUnknown, "no prestage list declares this repository to this relay")
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"name": repo, "tags": []string{}})
}

func (h *Handler) referrers(w *writer, r *http.Request, repo string, d oci.Digest) {
	if !h.cfg.Content.Known(repo) {
		ociError(w, http.StatusNotFound, codeNameUnknown, "no prestage list declares this repository to this relay")
		return
	}
	list := h.cfg.Content.Referrers(repo, d)
	if want := r.URL.Query()["artifactType"]; len(want) > 0 {
		list = slices.DeleteFunc(list, func(x oci.Descriptor) bool { return !slices.Contains(want, x.ArtifactType) })
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	if list == nil {
		list = []oci.Descriptor{}
	}
	body, err := json.Marshal(struct {
		SchemaVersion int              `json:"schemaVersion"`
		MediaType     string           `json:"mediaType"`
		Manifests     []oci.Descriptor `json:"manifests"`
	}{2, oci.TypeOCIIndex, list})
	if err != nil {
		ociError(w, http.StatusInternalServerError, codeUnknown, "the list cannot be written")
		return
	}
	w.Header().Set("Content-Type", oci.TypeOCIIndex)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write(body)
}

func (h *Handler) submit(w *writer, r *http.Request) {
	// A browser page on this machine must not be able to declare content.
	if r.Header.Get("Origin") != "" {
		problem.Write(w, problem.New(http.StatusForbidden, "browser_refused", "requests with an Origin header are refused"))
		return
	}
	if mt, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mt != "application/json" && mt != "application/vnd.dsse.envelope.v1+json" {
		problem.Write(w, problem.New(http.StatusUnsupportedMediaType, "media_type", "want Content-Type application/json"))
		return
	}
	_ = w.rc.SetReadDeadline(time.Now().Add(ReadTimeout)) // a listener without deadlines has none to set
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, prestage.MaxBodyBytes))
	_ = w.rc.SetReadDeadline(time.Time{})
	var tooLong *http.MaxBytesError
	switch {
	case errors.As(err, &tooLong):
		problem.Write(w, problem.New(http.StatusRequestEntityTooLarge, prestage.CodeTooLarge, fmt.Sprintf("the body is over %d bytes", tooLong.Limit)))
		return
	case errors.Is(err, os.ErrDeadlineExceeded):
		problem.Write(w, problem.New(http.StatusRequestTimeout, "timeout", "the body did not come in time"))
		return
	case err != nil:
		problem.Write(w, problem.New(http.StatusBadRequest, "body_unreadable", "the body ended early"))
		return
	}
	ok, err := h.cfg.Lists.Submit(body, time.Now())
	var refused *prestage.Refusal
	switch {
	case err == nil && ok.Repeated:
		writeJSON(w, http.StatusOK, ok)
	case err == nil:
		w.Header().Set("Location", "/v1/prestage/"+ok.ID)
		writeJSON(w, http.StatusAccepted, ok)
	case errors.As(err, &refused):
		h.cfg.Log.Warn("prestage list refused", "code", refused.Code, "error", err, "cause", refused.Err)
		problem.Write(w, problem.New(refusalStatus(refused.Code), refused.Code, refused.Detail))
	case h.cfg.Full(err):
		h.cfg.Log.Error("prestage list not written", "error", err)
		problem.Write(w, problem.New(http.StatusInsufficientStorage, "disk_ceiling", err.Error()))
	default:
		h.cfg.Log.Error("prestage list not written", "error", err)
		problem.Write(w, problem.New(http.StatusInternalServerError, "internal", ""))
	}
}

func refusalStatus(code string) int {
	switch code {
	case prestage.CodeMalformed:
		return http.StatusBadRequest
	case prestage.CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case prestage.CodeSequenceRollback:
		return http.StatusConflict
	case prestage.CodeTooMany:
		return http.StatusInsufficientStorage
	case prestage.CodeKeyring:
		return http.StatusServiceUnavailable
	}
	return http.StatusForbidden
}

func (h *Handler) report(w *writer, id string) {
	if !prestage.ValidID(id) {
		problem.Write(w, problem.New(http.StatusBadRequest, "bad_id", "want the id of a prestage list: a-z, 0-9, '.', '_' and '-'"))
		return
	}
	rep, ok := h.cfg.Lists.Report(id)
	if !ok {
		problem.Write(w, problem.New(http.StatusNotFound, "no_such_list", "no list with this id has been submitted"))
		return
	}
	writeJSON(w, http.StatusOK, rep)
}

// writer counts, and moves the write deadline along while a client keeps
// taking bytes. It passes ReadFrom down, so that a file still goes out by
// sendfile.
type writer struct {
	http.ResponseWriter
	rc     *http.ResponseController
	status int
	sent   int64
}

func (w *writer) extend() {
	_ = w.rc.SetWriteDeadline(time.Now().Add(WriteTimeout)) // not supported in tests without a connection
}

func (w *writer) WriteHeader(code int) {
	if w.status == 0 && code >= 200 {
		w.status = code
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *writer) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.sent += int64(n)
	return n, err
}

// ReadFrom sends src in pieces of WriteChunk, each under a fresh deadline. The
// pieces are *io.LimitedReader over the *os.File itself: that shape, and no
// deeper one, is what the kernel's sendfile is used for.
func (w *writer) ReadFrom(src io.Reader) (int64, error) {
	from, ok := w.ResponseWriter.(io.ReaderFrom)
	if !ok {
		return io.Copy(struct{ io.Writer }{w}, src)
	}
	limited, ok := src.(*io.LimitedReader)
	if !ok {
		limited = &io.LimitedReader{R: src, N: 1<<63 - 1}
	}
	var sum int64
	for limited.N > 0 {
		w.extend()
		part := &io.LimitedReader{R: limited.R, N: min(limited.N, WriteChunk)}
		want := part.N
		n, err := from.ReadFrom(part)
		sum += n
		w.sent += n
		limited.N -= n
		if err != nil {
			return sum, err
		}
		if n < want {
			break
		}
	}
	return sum, nil
}

// Unwrap lets http.ResponseController reach the connection.
func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }
