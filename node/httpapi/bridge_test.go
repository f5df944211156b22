package httpapi_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/httpapi"
)

type mcpFunc func(http.ResponseWriter, *http.Request, call.Caller)

func (f mcpFunc) Serve(w http.ResponseWriter, r *http.Request, c call.Caller) { f(w, r, c) }

// bridge serves f at /mcp.
func bridge(t *testing.T, change func(*httpapi.Options), f mcpFunc) *api {
	return serve(t, func(o *httpapi.Options) {
		o.MCP = f
		if change != nil {
			change(o)
		}
	})
}

// dial opens a connection to the TCP listener, with a deadline.
func (a *api) dial() (net.Conn, *bufio.Reader) {
	a.t.Helper()
	c, err := net.Dial("tcp", a.addr)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(testutil.Timeout)); err != nil {
		a.t.Fatal(err)
	}
	return c, bufio.NewReader(c)
}

func (a *api) mcp(method, body string) string {
	return fmt.Sprintf("%s /mcp?q=1 HTTP/1.1\r\nHost: %s\r\nX-Two: a\r\nX-Two: b\r\nCookie: c=1\r\nContent-Length: %d\r\n\r\n%s", method, a.addr, len(body), body)
}

func TestBridgeCarriesOver(t *testing.T) {
	a := bridge(t, nil, func(w http.ResponseWriter, r *http.Request, c call.Caller) {
		body, err := io.ReadAll(r.Body)
		w.Header().Add("X-Out", "1")
		w.Header().Add("X-Out", "2")
		w.Header().Set("Content-Type", "text/x")
		w.WriteHeader(http.StatusTeapot)
		w.Header().Set("X-Late", "1")
		fmt.Fprintln(w, r.Method, r.URL, r.Header["X-Two"], r.Header["Cookie"], string(body), err, c.Key())
	})
	c, rd := a.dial()
	for range 2 { // the connection is kept
		if _, err := io.WriteString(c, a.mcp("POST", "hello")); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(rd, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if want := "POST /mcp?q=1 [a b] [] hello <nil> anonymous:loopback\n"; string(body) != want || resp.ContentLength != int64(len(want)) {
			t.Errorf("%d bytes %q, want %q", resp.ContentLength, body, want)
		}
		if resp.StatusCode != 418 || fmt.Sprint(resp.Header["X-Out"]) != "[1 2]" || resp.Header.Get("Content-Type") != "text/x" || resp.Header.Get("X-Late") != "" {
			t.Errorf("%d %v", resp.StatusCode, resp.Header)
		}
	}
}

// TestBridgeCallers: the caller is who the listener found, and the handler sees
// no credential.
func TestBridgeCallers(t *testing.T) {
	file, tokens := tokenFile(t, "ci")
	a, _ := withAuth(t, auth.Options{Tokens: file}, func(o *httpapi.Options) {
		o.MCP = mcpFunc(func(w http.ResponseWriter, r *http.Request, c call.Caller) {
			fmt.Fprintln(w, c.Key(), len(r.Header["Authorization"]))
		})
	})
	if resp, body := a.request("POST", "/mcp", "Authorization: Bearer "+tokens[0]+"\r\n", "x"); resp.StatusCode != 200 || body != "token:ci 0\n" {
		t.Errorf("%d %q", resp.StatusCode, body)
	}
	for _, header := range []string{"", "Authorization: Bearer x\r\n"} {
		if resp, _ := a.request("POST", "/mcp", header, "x"); resp.StatusCode != 401 {
			t.Errorf("%q: status %d", header, resp.StatusCode)
		}
	}
}

// TestBridgeStreams: what is flushed arrives while the handler still runs.
func TestBridgeStreams(t *testing.T) {
	next := make(chan string)
	a := bridge(t, nil, func(w http.ResponseWriter, r *http.Request, _ call.Caller) {
		w.Header().Set("Content-Type", "text/event-stream")
		w.(http.Flusher).Flush() // a header alone is something too
		for s := range next {
			_, _ = io.WriteString(w, s) // the reader checks
			w.(http.Flusher).Flush()
		}
		_, _ = io.WriteString(w, "end")
	})
	c, rd := a.dial()
	if _, err := io.WriteString(c, a.mcp("POST", "")); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(rd, nil)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	for _, s := range []string{"one", "two"} {
		next <- s
		n, err := io.ReadFull(resp.Body, buf[:len(s)])
		if err != nil || string(buf[:n]) != s {
			t.Fatalf("%q, %v, want %q", buf[:n], err, s)
		}
	}
	close(next)
	if rest, err := io.ReadAll(resp.Body); err != nil || string(rest) != "end" {
		t.Fatalf("%q, %v", rest, err)
	}
	if _, err := io.WriteString(c, a.mcp("GET", "")); err != nil {
		t.Fatal(err)
	}
	if _, err := http.ReadResponse(rd, nil); err != nil {
		t.Errorf("the connection was not kept: %v", err)
	}
}

// TestBridgeNoticesTheClientLeave: at once, in the middle of a silent handler,
// whether it closes the connection or pipelines before it does.
func TestBridgeNoticesTheClientLeave(t *testing.T) {
	for name, after := range map[string]string{"closed": "", "pipelined": "GET /healthz HTTP/1.1\r\n\r\n", "over a socket": ""} {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, stream %v", name, stream), func(t *testing.T) {
				running, gone := make(chan struct{}), make(chan struct{})
				a := bridge(t, nil, func(w http.ResponseWriter, r *http.Request, _ call.Caller) {
					if stream {
						w.(http.Flusher).Flush()
					}
					close(running)
					<-r.Context().Done()
					close(gone)
				})
				c, _ := a.dial()
				if name == "over a socket" {
					var err error
					if c, err = net.Dial("unix", a.socket); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := io.WriteString(c, a.mcp("POST", "")+after); err != nil {
					t.Fatal(err)
				}
				<-running
				c.Close()
				select {
				case <-gone:
				case <-time.After(testutil.Timeout):
					t.Error("the handler did not hear of it")
				}
			})
		}
	}
}

// TestBridgeWatchesLong: the time for reading a request is not the time that its
// client is watched.
func TestBridgeWatchesLong(t *testing.T) {
	running, gone := make(chan struct{}), make(chan struct{})
	a := bridge(t, func(o *httpapi.Options) { o.ReadTimeout = 100 * time.Millisecond }, func(w http.ResponseWriter, r *http.Request, _ call.Caller) {
		close(running)
		<-r.Context().Done()
		close(gone)
	})
	c, _ := a.dial()
	if _, err := io.WriteString(c, a.mcp("POST", "")); err != nil {
		t.Fatal(err)
	}
	<-running
	select {
	case <-gone:
		t.Fatal("a client that waits was taken for gone")
	case <-time.After(300 * time.Millisecond):
	}
	c.Close()
	select {
	case <-gone:
	case <-time.After(testutil.Timeout):
		t.Error("the handler did not hear of it")
	}
}

// TestBridgeKeepsPipelined: watching the connection takes nothing from it.
func TestBridgeKeepsPipelined(t *testing.T) {
	var calls atomic.Int32
	a := bridge(t, nil, func(w http.ResponseWriter, r *http.Request, _ call.Caller) {
		time.Sleep(20 * time.Millisecond) // past the watch's begin
		fmt.Fprint(w, calls.Add(1))
	})
	c, rd := a.dial()
	if _, err := io.WriteString(c, strings.Repeat(a.mcp("POST", "x"), 3)); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		resp, err := http.ReadResponse(rd, nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(resp.Body); err != nil || string(body) != fmt.Sprint(i+1) {
			t.Fatalf("%q, %v", body, err)
		}
	}
}

// TestBridgeBoundsASlowClient: a client that does not read holds a bounded
// amount, and not for ever.
func TestBridgeBoundsASlowClient(t *testing.T) {
	var written atomic.Int64
	ended := make(chan error, 1)
	a := bridge(t, func(o *httpapi.Options) { o.WriteTimeout = 300 * time.Millisecond }, func(w http.ResponseWriter, r *http.Request, _ call.Caller) {
		piece := make([]byte, 32<<10)
		for {
			n, err := w.Write(piece)
			written.Add(int64(n))
			if err != nil {
				ended <- err
				return
			}
			w.(http.Flusher).Flush()
		}
	})
	c, _ := a.dial()
	if err := c.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, a.mcp("POST", "")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(testutil.Timeout):
		t.Fatal("a client that reads nothing is served for ever")
	}
	if n := written.Load(); n > 16<<20 { // the kernel's buffers and ours
		t.Errorf("%d bytes were written for a client that reads nothing", n)
	}
}

func TestBridgePanic(t *testing.T) {
	a := bridge(t, nil, func(http.ResponseWriter, *http.Request, call.Caller) { panic("x") })
	if resp, _ := a.raw("tcp", a.mcp("POST", "")); resp.StatusCode != 500 {
		t.Errorf("status %d", resp.StatusCode)
	}
}

func TestBridgeLimit(t *testing.T) {
	running, release := make(chan struct{}), make(chan struct{})
	a := bridge(t, func(o *httpapi.Options) { o.MaxExchanges = 1 }, func(w http.ResponseWriter, r *http.Request, _ call.Caller) {
		close(running)
		<-release
	})
	c, rd := a.dial()
	if _, err := io.WriteString(c, a.mcp("POST", "")); err != nil {
		t.Fatal(err)
	}
	<-running
	if resp, _ := a.raw("tcp", a.mcp("POST", "")); resp.StatusCode != 429 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("status %d, %v", resp.StatusCode, resp.Header)
	}
	close(release)
	if _, err := http.ReadResponse(rd, nil); err != nil {
		t.Error(err)
	}
}

// TestBridgeShares: one principal has half of the open requests at most.
func TestBridgeShares(t *testing.T) {
	running, release := make(chan struct{}, 2), make(chan struct{})
	a := bridge(t, func(o *httpapi.Options) { o.MaxExchanges = 2 }, func(w http.ResponseWriter, r *http.Request, _ call.Caller) {
		running <- struct{}{}
		<-release
	})
	c, rd := a.dial()
	if _, err := io.WriteString(c, a.mcp("POST", "")); err != nil {
		t.Fatal(err)
	}
	<-running
	if resp, _ := a.raw("tcp", a.mcp("POST", "")); resp.StatusCode != 429 {
		t.Errorf("second of the same principal: status %d", resp.StatusCode)
	}
	other, err := net.Dial("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := io.WriteString(other, a.mcp("POST", "")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-running:
	case <-time.After(testutil.Timeout):
		t.Error("another principal got no place")
	}
	close(release)
	for _, rd := range []*bufio.Reader{rd, bufio.NewReader(other)} {
		if resp, err := http.ReadResponse(rd, nil); err != nil || resp.StatusCode != 200 {
			t.Error(resp, err)
		}
	}
}

// TestBridgeShutdown: a stream that waits for events ends at once, a call gets
// its time.
func TestBridgeShutdown(t *testing.T) {
	running := make(chan string, 2)
	release := make(chan struct{})
	a := bridge(t, nil, func(w http.ResponseWriter, r *http.Request, _ call.Caller) {
		w.(http.Flusher).Flush()
		running <- r.Method
		if r.Method == "GET" {
			<-r.Context().Done()
			close(release) // so the call ends only after the stream has
			return
		}
		select {
		case <-release:
			fmt.Fprint(w, "whole")
		case <-r.Context().Done():
		}
	})
	var post *bufio.Reader
	for _, m := range []string{"GET", "POST"} {
		c, rd := a.dial()
		if m == "POST" {
			post = rd
		}
		if _, err := io.WriteString(c, a.mcp(m, "")); err != nil {
			t.Fatal(err)
		}
		<-running
	}
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Timeout)
	defer cancel()
	if err := a.server.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	resp, err := http.ReadResponse(post, nil)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "whole" {
		t.Errorf("%q, %v", body, err)
	}
}
