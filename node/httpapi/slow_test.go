package httpapi_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/httpapi"
)

// drip writes s a byte at a time, as slowly as a client may that wants to hold a
// connection, until the server closes it. It returns how long that took.
func drip(c net.Conn, s string, every time.Duration) time.Duration {
	begin := time.Now()
	for i := 0; ; i++ {
		b := byte('x')
		if i < len(s) {
			b = s[i]
		}
		if _, err := c.Write([]byte{b}); err != nil {
			return time.Since(begin)
		}
		time.Sleep(every)
	}
}

// TestSlowClients: clients that send a header or a body a byte at a time are cut
// off after the read timeout, take no place for a call and no memory for what
// they only announce; meanwhile others are served.
func TestSlowClients(t *testing.T) {
	const clients = 100
	a := serveGated(t, call.GateOptions{MaxRunning: 1, MaxWaiting: 1, MaxWait: 20 * time.Second}, func(o *httpapi.Options) {
		o.ReadTimeout = time.Second
		o.MaxBodyBytes = 1 << 20
		o.MaxBodyMemory = 1 << 20 // of which none is needed
	})
	var before, during runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var ended sync.WaitGroup
	var cut atomic.Int64
	for i := range clients {
		c, err := net.Dial("tcp", a.addr)
		if err != nil {
			t.Fatal(err)
		}
		request := fmt.Sprintf("POST /v1/tool HTTP/1.1\r\nHost: %s\r\nContent-Length: 1000000\r\n\r\n{", a.addr)
		if i%2 == 0 {
			request = "POST /v1/tool HTTP/1.1\r\nX-"
		}
		ended.Go(func() {
			defer c.Close()
			if _, err := io.WriteString(c, request); err != nil {
				t.Errorf("client %d: %v", i, err)
				return
			}
			drip(c, "", 20*time.Millisecond)
			cut.Add(1)
		})
	}
	// While they are at it, a call goes through at once, though there is one place.
	for range 20 {
		if resp, body := a.request("POST", "/v1/tool", "", `{"kind":"tool.echo"}`); resp.StatusCode != 200 {
			t.Fatalf("beside slow clients: %d %s", resp.StatusCode, body)
		}
	}
	runtime.ReadMemStats(&during)
	if grown := int64(during.HeapAlloc) - int64(before.HeapAlloc); grown > clients*128<<10 && !raceEnabled {
		t.Errorf("%d slow clients take %d bytes each; half of them announced a body of 1 MB", clients, grown/clients)
	}
	done := make(chan struct{})
	go func() { ended.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%d of %d slow clients were cut off within 30 s, the read timeout is 1 s", cut.Load(), clients)
	}
}

// recycle lets the log forget what is durable, as a node without an endpoint
// does, until the test ends.
func (a *api) recycle() {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for tick := time.NewTicker(5 * time.Millisecond); ; {
			select {
			case <-stop:
				tick.Stop()
				return
			case <-tick.C:
				if err := a.log.AdvanceAll(a.log.Durable()); err != nil {
					a.t.Errorf("recycle the log: %v", err)
					return
				}
			}
		}
	}()
	a.t.Cleanup(func() { close(stop); <-done })
}

// TestSlowReader: a client that does not read its answer loses its connection
// after the write timeout; it holds no place while it waits.
func TestSlowReader(t *testing.T) {
	a := serveGated(t, call.GateOptions{MaxRunning: 1, MaxWaiting: 1, MaxWait: 20 * time.Second}, func(o *httpapi.Options) {
		o.WriteTimeout = 500 * time.Millisecond
		o.MaxBodyBytes = 128 << 10
	})
	a.recycle()
	c, err := net.Dial("tcp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		t.Fatal(err)
	}
	body := `{"kind":"tool.echo","params":{"x":"` + strings.Repeat("y", 100<<10) + `"}}`
	request := fmt.Sprintf("POST /v1/tool HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s", a.addr, len(body), body)
	var sent atomic.Int64
	wrote := make(chan error, 1)
	go func() { // until the answers have filled every buffer on the way
		for {
			if _, err := io.WriteString(c, request); err != nil {
				wrote <- err
				return
			}
			sent.Add(1)
		}
	}()
	for range 20 {
		if resp, body := a.request("POST", "/v1/tool", "", `{"kind":"tool.echo"}`); resp.StatusCode != 200 {
			t.Fatalf("beside a slow reader: %d %s", resp.StatusCode, body)
		}
	}
	select {
	case <-wrote: // cut off
	case <-time.After(30 * time.Second):
		t.Fatalf("a client that reads nothing sent %d requests and was not cut off", sent.Load())
	}
}

// TestBodyMemory: bodies that arrive take memory up to the bound; beyond it a
// request is refused, and what is given back can be used again.
func TestBodyMemory(t *testing.T) {
	a := serve(t, func(o *httpapi.Options) {
		o.MaxBodyBytes = 512 << 10
		o.MaxBodyMemory = 1 << 20
		o.ReadTimeout = time.Minute // none is cut off for being slow
	})
	half := strings.Repeat("y", 200<<10)
	// Each holds 256 KiB: four fill the bound, and of twelve eight are refused at
	// least. A refusal may be lost when the server closes before it has read what
	// was sent.
	const clients, fit = 12, 4
	ended := make(chan int, clients) // a status, 0: cut off
	var held []net.Conn
	for range clients {
		c, err := net.Dial("tcp", a.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		held = append(held, c)
		go func() {
			fmt.Fprintf(c, `POST /v1/tool HTTP/1.1`+"\r\nHost: %s\r\nContent-Length: %d\r\n\r\n"+`{"kind":"tool.echo","params":{"x":"%s`, a.addr, 300<<10, half)
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			switch {
			case err != nil:
				ended <- 0
			case resp.StatusCode == 429 && resp.Header.Get("Retry-After") == "":
				t.Error("a refusal without Retry-After")
				fallthrough
			default:
				ended <- resp.StatusCode
			}
		}()
	}
	statuses := map[int]int{}
	for n := range clients - fit {
		select {
		case status := <-ended:
			statuses[status]++
		case <-time.After(30 * time.Second):
			t.Fatalf("%d bodies of 256 KiB are held in 1 MiB, ended: %v", clients-n, statuses)
		}
	}
	if statuses[429] == 0 || statuses[429]+statuses[0] != clients-fit {
		t.Errorf("answers by status: %v, want 429", statuses)
	}
	for _, c := range held {
		c.Close()
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		resp, body := a.request("POST", "/v1/tool", "", `{"kind":"tool.echo","params":{"x":"`+half+`"}}`)
		if resp.StatusCode == 200 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after the others left: %d %.200s", resp.StatusCode, body)
		}
	}
}

// TestConnections: beyond the limit a connection is told 503 and closed.
func TestConnections(t *testing.T) {
	a := serve(t, func(o *httpapi.Options) { o.MaxConns = 2 })
	for range 2 {
		c, err := net.Dial("tcp", a.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		// It counts from the moment it is served.
		fmt.Fprintf(c, "GET /healthz HTTP/1.1\r\nHost: %s\r\n\r\n", a.addr)
		if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
	}
	c, err := net.Dial("tcp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "GET /healthz HTTP/1.1\r\nHost: %s\r\n\r\n", a.addr)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || !resp.Close {
		t.Fatalf("%+v, %v", resp, err)
	}
	if body, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(body), "too_many_connections") {
		t.Errorf("%s, %v", body, err)
	}
}
