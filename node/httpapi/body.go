package httpapi

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"
)

// bodies is the memory of request bodies. One grows with what has arrived, never
// with what a header announces, and all together have a bound: a client that
// announces much and sends little costs what it sends.
type bodies struct {
	max  int64
	used atomic.Int64 // claimed by those over freeBody
	pool sync.Pool    // *body
}

// body is one request's.
type body struct {
	b       []byte
	claimed int64
}

const (
	freeBody  = 8 << 10  // a body up to this size is not counted: the connection's own buffers are as large
	keptBody  = 16 << 10 // and one up to this goes back to the pool
	firstBody = 1 << 10
)

// errBodies: there is no memory left for bodies.
var errBodies = errors.New("bodies that are being read take all the memory they may")

func (m *bodies) get() *body {
	if b, ok := m.pool.Get().(*body); ok {
		return b
	}
	return &body{b: make([]byte, 0, firstBody)}
}

func (m *bodies) put(b *body) {
	m.used.Add(-b.claimed)
	b.b, b.claimed = b.b[:0], 0
	if cap(b.b) <= keptBody {
		m.pool.Put(b)
	}
}

// grow doubles b.
func (m *bodies) grow(b *body) error {
	size := int64(max(2*cap(b.b), firstBody))
	if need := size - b.claimed; size > freeBody {
		if m.used.Add(need) > m.max {
			m.used.Add(-need)
			return errBodies
		}
		b.claimed = size
	}
	b.b = slices.Grow(b.b, int(size)-len(b.b))
	return nil
}

// read takes in what src has, at most limit bytes. Errors: errBodies,
// fasthttp.ErrBodyTooLarge, those of src.
func (m *bodies) read(b *body, src io.Reader, limit int) error {
	for {
		if len(b.b) == cap(b.b) {
			if err := m.grow(b); err != nil {
				return err
			}
		}
		n, err := src.Read(b.b[len(b.b):cap(b.b)])
		b.b = b.b[:len(b.b)+n]
		switch {
		case len(b.b) > limit:
			return fasthttp.ErrBodyTooLarge
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// read takes the body in; the time is bounded by ReadTimeout. When it returns
// false it has answered; else the body goes back with put.
func (s *Server) read(ctx *fasthttp.RequestCtx) (*body, bool) {
	announced := ctx.Request.Header.ContentLength()
	if announced > s.o.MaxBodyBytes {
		s.tooLarge(ctx)
		return nil, false
	}
	b := s.bodies.get()
	src := ctx.RequestBodyStream()
	if src == nil {
		return b, true
	}
	err := s.bodies.read(b, src, s.o.MaxBodyBytes)
	if err == nil && len(b.b) < announced {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		return b, true
	}
	s.bodies.put(b)
	if errors.Is(err, errBodies) {
		ctx.SetConnectionClose()
		s.deny(ctx, fasthttp.StatusTooManyRequests, "overloaded", err.Error()+": try again")
		return nil, false
	}
	s.badRequest(ctx, err)
	return nil, false
}

// What of a body over the limit is read and thrown away, so that the sender
// gets to read the answer: a connection closed with unread data is reset.
const (
	drainBytes = 4 << 20
	drainTime  = time.Second
)

func (s *Server) tooLarge(ctx *fasthttp.RequestCtx) {
	if src := ctx.RequestBodyStream(); src != nil && ctx.Request.Header.ContentLength() <= drainBytes &&
		ctx.Conn().SetReadDeadline(time.Now().Add(drainTime)) == nil {
		_, _ = io.CopyN(io.Discard, src, drainBytes) // the deadline ends the wait
	}
	ctx.SetConnectionClose()
	s.deny(ctx, fasthttp.StatusRequestEntityTooLarge, "body_too_large", fmt.Sprintf("the body is over %d bytes", s.o.MaxBodyBytes))
}
