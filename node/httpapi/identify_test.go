package httpapi

import (
	"bufio"
	"log/slog"
	"net"
	"strings"
	"testing"

	"github.com/valyala/fasthttp"

	"github.com/autonomyops/autonomy/internal/auth"
)

// loopbackConn is a connection from this machine.
type loopbackConn struct{ net.Conn }

var ours, theirs = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 7777}, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 40000}

func (loopbackConn) LocalAddr() net.Addr  { return ours }
func (loopbackConn) RemoteAddr() net.Addr { return theirs }

// TestIdentifyAllocations: what it costs to know the caller of a request.
func TestIdentifyAllocations(t *testing.T) {
	a, err := auth.Open(auth.Options{Anonymous: true, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{o: Options{Auth: a}}
	var ctx fasthttp.RequestCtx
	ctx.Init2(loopbackConn{}, nil, false)
	const request = "POST /v1/tool HTTP/1.1\r\nHost: 127.0.0.1:7777\r\nUser-Agent: agent\r\nAccept: */*\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n"
	if err := ctx.Request.Read(bufio.NewReader(strings.NewReader(request))); err != nil {
		t.Fatal(err)
	}
	n := testing.AllocsPerRun(200, func() {
		if who, ok := s.identify(&ctx); !ok || who.ID != "loopback" {
			t.Fatalf("%+v", who)
		}
	})
	if n > 1 {
		t.Errorf("%v allocations, want one: the Host header as a string", n)
	}
}

func BenchmarkIdentify(b *testing.B) {
	a, err := auth.Open(auth.Options{Anonymous: true, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	s := &Server{o: Options{Auth: a}}
	var ctx fasthttp.RequestCtx
	ctx.Init2(loopbackConn{}, nil, false)
	const request = "POST /v1/tool HTTP/1.1\r\nHost: 127.0.0.1:7777\r\nUser-Agent: agent\r\nAccept: */*\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n"
	if err := ctx.Request.Read(bufio.NewReader(strings.NewReader(request))); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := s.identify(&ctx); !ok {
			b.Fatal("refused")
		}
	}
}
