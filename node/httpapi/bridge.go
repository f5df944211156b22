package httpapi

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"
	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/node/call"
)

// MCP serves the Model Context Protocol at /mcp; *mcp.Endpoint is one. The
// request has passed every check of the listener and holds no credential; its
// body lies in memory, within MaxBodyBytes, until Serve returns. Its context
// ends when the client goes away or the server has waited long enough to stop.
// A call that it asks for takes its place at the pipeline's gate in there: most
// requests of the protocol are none.
type MCP interface {
	Serve(w http.ResponseWriter, r *http.Request, caller call.Caller)
}

// The Go SDK of MCP speaks net/http, and its answers are streams: events that
// must reach the client while the call runs. A second HTTP server for it would
// be a second set of defences, so a request comes in through fasthttp like any
// other and is carried over:
//
//	fasthttp's worker           handler's goroutine
//	serveMCP ──────────────────▶ MCP.Serve(exchange)
//	   waits for the end           writes into exchange.buf, Flush
//	   or the first Flush
//	   answers whole, or           goes on writing, blocks at maxPending
//	   reads buf as its body  ◀──  end
//
// What is not flushed before the handler ends is answered with its length, in
// one write; the rest is chunked. Both keep the connection.

// maxPending bounds what a handler may write ahead of a slow client, in bytes;
// one larger write is taken alone.
const maxPending = 64 << 10

// settle is how long a first Flush waits for the handler's end. An answer of one
// event is nearly always followed by it at once, and goes out in one write.
const settle = 200 * time.Microsecond

// serveMCP serves /mcp.
func (s *Server) serveMCP(ctx *fasthttp.RequestCtx, caller call.Caller) {
	if len(ctx.Request.Header.ContentEncoding()) > 0 {
		s.deny(ctx, fasthttp.StatusUnsupportedMediaType, "unsupported_encoding", "send the body without Content-Encoding")
		return
	}
	body, ok := s.read(ctx)
	if !ok {
		return
	}
	if !s.exchanges.enter(caller) {
		s.bodies.put(body)
		s.deny(ctx, fasthttp.StatusTooManyRequests, "overloaded", fmt.Sprintf("%d MCP requests are open, or half as many of this caller, which is this node's limit: try again", s.o.MaxExchanges))
		return
	}
	// A stream without an end of its own ends as soon as the server stops; a
	// call gets the time that calls get.
	parent := s.ctx
	if ctx.IsGet() || string(ctx.Request.Header.Peek("Mcp-Method")) == "subscriptions/listen" {
		parent = s.listening
	}
	rctx, cancel := context.WithCancel(parent)
	req := netRequest(rctx, ctx, body.b)
	x := &exchange{ctx: rctx, cancel: cancel, conn: ctx.Conn(), timeout: s.http.WriteTimeout, header: http.Header{},
		started: make(chan struct{}), done: make(chan struct{}), wake: make(chan struct{}, 1), room: make(chan struct{}, 1)}
	go func() {
		stop := watchPeer(x.conn, cancel)
		defer func() {
			if v := recover(); v != nil {
				s.o.Logger.Error("MCP request panicked", "panic", v, "stack", string(debug.Stack()))
				x.fail()
			}
			stop()
			cancel()
			x.end()
			s.bodies.put(body)
			s.exchanges.leave(caller)
		}()
		s.o.MCP.Serve(x, req, caller)
	}()
	select {
	case <-x.done:
	case <-x.started:
		wait := time.NewTimer(settle)
		select {
		case <-x.done:
		case <-wait.C:
		}
		wait.Stop()
	}
	x.answer(ctx)
}

// exchanges counts the open requests. One principal has half of them at most:
// one that opens streams without end leaves room for the others.
type exchanges struct {
	max int

	mu   sync.Mutex
	all  int
	each map[string]int // by Caller.Key
}

func (e *exchanges) enter(caller call.Caller) bool {
	who := caller.Key()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.all >= e.max || e.each[who] >= max(1, e.max/2) {
		return false
	}
	if e.each == nil {
		e.each = map[string]int{}
	}
	e.all++
	e.each[who]++
	return true
}

func (e *exchanges) leave(caller call.Caller) {
	who := caller.Key()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all--
	if e.each[who]--; e.each[who] == 0 {
		delete(e.each, who)
	}
}

func (e *exchanges) open() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.all
}

// netRequest copies a request but for its body, which the caller keeps: the
// handler's goroutine may outlive ctx.
func netRequest(rctx context.Context, ctx *fasthttp.RequestCtx, body []byte) *http.Request {
	h := http.Header{}
	for k, v := range ctx.Request.Header.All() {
		name := http.CanonicalHeaderKey(string(k))
		switch name {
		case fasthttp.HeaderAuthorization, fasthttp.HeaderCookie, fasthttp.HeaderConnection, fasthttp.HeaderTransferEncoding:
			continue // the listener's own, and no business of a handler
		}
		h[name] = append(h[name], string(v))
	}
	r := &http.Request{
		Method: string(ctx.Method()), Host: string(ctx.Host()), Header: h, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		URL:  &url.URL{Path: string(ctx.Path()), RawQuery: string(ctx.QueryArgs().QueryString())},
		Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body)),
	}
	return r.WithContext(rctx)
}

// exchange is one request's http.ResponseWriter, and its body for fasthttp.
type exchange struct {
	ctx     context.Context
	cancel  context.CancelFunc
	conn    net.Conn
	timeout time.Duration // of one write to the client
	header  http.Header   // the handler's, until sent is made

	started   chan struct{} // closed at the first Flush
	startOnce sync.Once
	done      chan struct{} // closed when the handler has ended
	wake      chan struct{} // there is something to read, or the end
	room      chan struct{} // something was read, or nobody reads any more

	mu     sync.Mutex
	status int
	sent   http.Header // as they were when the status was set
	buf    []byte      // written and not read
	ended  bool
	closed bool // the client's side failed
}

func (x *exchange) Header() http.Header { return x.header }

func (x *exchange) WriteHeader(status int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.writeHeader(status)
}

func (x *exchange) writeHeader(status int) {
	if x.status == 0 {
		x.status, x.sent = status, x.header.Clone()
	}
}

func (x *exchange) Write(b []byte) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.writeHeader(http.StatusOK)
	for !x.closed && len(x.buf) > 0 && len(x.buf)+len(b) > maxPending {
		x.mu.Unlock()
		x.Flush()
		select {
		case <-x.room:
		case <-x.ctx.Done():
		}
		x.mu.Lock()
		if x.ctx.Err() != nil {
			return 0, x.ctx.Err()
		}
	}
	if x.closed {
		return 0, io.ErrClosedPipe
	}
	x.buf = append(x.buf, b...)
	return len(b), nil
}

// Flush lets what was written go out. It does not wait for that.
func (x *exchange) Flush() {
	x.WriteHeader(http.StatusOK)
	x.startOnce.Do(func() { close(x.started) })
	signal(x.wake)
}

// fail turns an answer that has not begun into an error; one that has is cut.
func (x *exchange) fail() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.status == 0 {
		x.writeHeader(http.StatusInternalServerError)
	}
}

func (x *exchange) end() {
	x.mu.Lock()
	x.writeHeader(http.StatusOK)
	x.ended = true
	x.mu.Unlock()
	close(x.done)
	signal(x.wake)
}

// answer gives fasthttp the response: whole when the handler has ended, else
// the exchange itself as a stream.
func (x *exchange) answer(ctx *fasthttp.RequestCtx) {
	x.mu.Lock()
	defer x.mu.Unlock()
	ctx.SetStatusCode(x.status)
	for k, vs := range x.sent {
		if k == fasthttp.HeaderConnection || k == fasthttp.HeaderContentLength {
			continue // fasthttp's own
		}
		ctx.Response.Header.Del(k)
		for _, v := range vs {
			ctx.Response.Header.Add(k, v)
		}
	}
	if x.ended {
		ctx.SetBody(x.buf)
		return
	}
	ctx.Response.ImmediateHeaderFlush = true
	ctx.SetBodyStream(x, -1)
}

// Read is fasthttp's side: it blocks until something was flushed or the handler
// has ended.
func (x *exchange) Read(p []byte) (int, error) {
	for {
		x.mu.Lock()
		if len(x.buf) > 0 {
			n := copy(p, x.buf)
			x.buf = x.buf[:copy(x.buf, x.buf[n:])]
			if len(x.buf) == 0 && cap(x.buf) > maxPending {
				x.buf = nil
			}
			x.mu.Unlock()
			signal(x.room)
			// The server's own write deadline is for the whole response; a
			// stream may last, but each piece must be taken in time.
			_ = x.conn.SetWriteDeadline(time.Now().Add(x.timeout)) // a connection that is gone fails at the write
			return n, nil
		}
		ended := x.ended
		x.mu.Unlock()
		if ended {
			return 0, io.EOF
		}
		<-x.wake
	}
}

// Close is fasthttp's, when it has sent everything or could not.
func (x *exchange) Close() error {
	x.mu.Lock()
	x.closed = true
	x.mu.Unlock()
	x.cancel()
	signal(x.room)
	return nil
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// watchDelay is how long a request runs before its connection is watched: most
// have ended by then.
const watchDelay = 5 * time.Millisecond

// watchPeer calls gone when the client closes the connection, or its side of it.
// Nothing is read: what a client may have pipelined stays for fasthttp. stop
// ends the watch and must be called before the connection is read again.
func watchPeer(c net.Conn, gone func()) (stop func()) {
	raw := rawConn(c)
	if raw == nil {
		return func() {}
	}
	_ = c.SetReadDeadline(time.Time{}) // fasthttp's own, for the request that was read
	ended := make(chan struct{})
	timer := time.AfterFunc(watchDelay, func() {
		defer close(ended)
		hung := false
		err := raw.Read(func(fd uintptr) bool {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
			n, err := unix.Poll(p, 0)
			hung = err == nil && n > 0
			return hung
		})
		if err == nil && hung {
			gone()
		}
	})
	return func() {
		if timer.Stop() {
			return
		}
		_ = c.SetReadDeadline(time.Unix(1, 0)) // a closed connection has ended the watch itself
		<-ended
		_ = c.SetReadDeadline(time.Time{}) // fasthttp sets its own before it reads
	}
}

func rawConn(c net.Conn) syscall.RawConn {
	for {
		if sc, ok := c.(syscall.Conn); ok {
			raw, err := sc.SyscallConn()
			if err != nil {
				return nil
			}
			return raw
		}
		inner, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return nil
		}
		c = inner.NetConn()
	}
}
