package api

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/internal/problem"
)

// Decompression may not blow a body up by more than maxRatio once it is larger
// than ratioFloor: below that the absolute limit is guard enough.
const (
	maxRatio   = 250
	ratioFloor = 1 << 20
)

// body reads the request's body, decompressed, at most limit bytes. release
// gives back its share of the memory for bodies; call it when the bytes are no
// longer used.
func (s *Server) body(w http.ResponseWriter, r *http.Request, limit int64) (data []byte, release func(), err error) {
	encoding := strings.ToLower(strings.TrimSpace(r.Header.Get("Content-Encoding")))
	share := limit
	switch encoding {
	case "", "identity":
		if r.ContentLength > limit {
			return nil, nil, tooLarge(limit)
		}
		if r.ContentLength >= 0 {
			share = r.ContentLength
		}
	case "gzip":
	default:
		w.Header().Set("Accept-Encoding", "gzip, identity")
		return nil, nil, problem.New(http.StatusUnsupportedMediaType, "unsupported_encoding", fmt.Sprintf("Content-Encoding %q is not read here, send gzip or none", encoding))
	}
	ctx, cancel := context.WithTimeout(r.Context(), bodyWait)
	defer cancel()
	if err := s.bodies.Acquire(ctx, share); err != nil {
		p := problem.New(http.StatusServiceUnavailable, "busy", "too many bodies are being read at this moment: send it again")
		p.RetryAfter = time.Second
		return nil, nil, p
	}
	defer func() {
		if err != nil {
			s.bodies.Release(share)
		}
	}()
	wire := &counter{r: http.MaxBytesReader(w, r.Body, limit)}
	var src io.Reader = wire
	if encoding == "gzip" {
		zr, err := gzip.NewReader(wire)
		if err != nil {
			return nil, nil, readError(err, limit)
		}
		src = &ratio{r: zr, wire: wire}
	}
	data, err = readAll(src, share, limit)
	if err != nil {
		return nil, nil, readError(err, limit)
	}
	return data, func() { s.bodies.Release(share) }, nil
}

// readAll reads up to limit bytes; hint is a first guess at the size that the
// caller was charged for.
func readAll(r io.Reader, hint, limit int64) ([]byte, error) {
	buf := make([]byte, 0, min(hint, 1<<20)+512)
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if int64(len(buf)) > limit {
			return nil, errTooLarge
		}
		if err == io.EOF {
			return buf, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

var (
	errTooLarge = errors.New("too large")
	errRatio    = errors.New("compressed too far")
)

func readError(err error, limit int64) error {
	var mbe *http.MaxBytesError
	switch {
	case errors.Is(err, errTooLarge), errors.As(err, &mbe):
		return tooLarge(limit)
	case errors.Is(err, errRatio):
		return problem.New(http.StatusRequestEntityTooLarge, "compression_ratio", fmt.Sprintf("the body grows more than %d times when decompressed: send smaller batches", maxRatio))
	case errors.Is(err, gzip.ErrHeader), errors.Is(err, gzip.ErrChecksum), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return badRequest("bad_body", "the body ends early or is not valid gzip: nothing was stored")
	}
	return badRequest("bad_body", "the body could not be read: nothing was stored")
}

func tooLarge(limit int64) error {
	return problem.New(http.StatusRequestEntityTooLarge, "body_too_large", fmt.Sprintf("the body is over %d bytes: send smaller batches", limit))
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// ratio stops a stream that decompresses too well to be honest.
type ratio struct {
	r    io.Reader
	wire *counter
	n    int64
}

func (x *ratio) Read(p []byte) (int, error) {
	n, err := x.r.Read(p)
	x.n += int64(n)
	if x.n > ratioFloor && x.n > maxRatio*x.wire.n {
		return n, errRatio
	}
	return n, err
}

// mediaType is the request's Content-Type without parameters; a charset other
// than UTF-8 is refused.
func mediaType(r *http.Request) (string, error) {
	ct := r.Header.Get("Content-Type")
	mt, params, err := mime.ParseMediaType(ct)
	if err != nil || params["charset"] != "" && !strings.EqualFold(params["charset"], "utf-8") {
		return "", unsupported(ct)
	}
	return mt, nil
}

func unsupported(ct string, want ...string) error {
	if len(want) == 0 {
		want = []string{"application/json"}
	}
	return problem.New(http.StatusUnsupportedMediaType, "unsupported_media_type", fmt.Sprintf("Content-Type is %q, want %s", clip(ct), strings.Join(want, " or ")))
}

// clip shortens what a peer sent before it is repeated to it.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
