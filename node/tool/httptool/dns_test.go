package httptool

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

// dnsServer answers over UDP on loopback as a hostile name server does: each
// question about a name gets the next answer of its list, with a lifetime of
// zero, the last one for ever.
type dnsServer struct {
	conn net.PacketConn
	done sync.WaitGroup

	mu    sync.Mutex
	names map[string][][]netip.Addr
	asked map[string]int // A questions, by name
}

func startDNS(t *testing.T, names map[string][][]netip.Addr) (*dnsServer, *net.Resolver) {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &dnsServer{conn: conn, names: names, asked: map[string]int{}}
	s.done.Go(s.serve)
	t.Cleanup(func() { conn.Close(); s.done.Wait() })
	return s, &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

func (s *dnsServer) serve() {
	buf := make([]byte, 1500)
	for {
		n, from, err := s.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		if reply := s.answer(buf[:n]); reply != nil {
			_, _ = s.conn.WriteTo(reply, from)
		}
	}
}

const (
	typeA    = 1
	typeAAAA = 28
)

// answer makes a reply to a query with one question (RFC 1035, section 4).
func (s *dnsServer) answer(q []byte) []byte {
	if len(q) < 12 {
		return nil
	}
	var labels []string
	i := 12
	for i < len(q) && q[i] != 0 {
		n := int(q[i])
		if i+1+n > len(q) {
			return nil
		}
		labels = append(labels, string(q[i+1:i+1+n]))
		i += 1 + n
	}
	if i+5 > len(q) {
		return nil
	}
	kind := binary.BigEndian.Uint16(q[i+1:])
	question := q[12 : i+5]
	name := strings.ToLower(strings.Join(labels, "."))

	s.mu.Lock()
	list := s.names[name]
	var addrs []netip.Addr
	if len(list) > 0 {
		addrs = list[min(s.asked[name], len(list)-1)]
	}
	if kind == typeA {
		s.asked[name]++
	}
	s.mu.Unlock()

	var records []byte
	count := 0
	for _, a := range addrs {
		if (kind == typeA) != a.Is4() || kind != typeA && kind != typeAAAA {
			continue
		}
		raw := a.AsSlice()
		records = append(records, 0xc0, 12) // the name of the question
		records = binary.BigEndian.AppendUint16(records, kind)
		records = append(records, 0, 1, 0, 0, 0, 0) // IN, TTL 0
		records = binary.BigEndian.AppendUint16(records, uint16(len(raw)))
		records = append(records, raw...)
		count++
	}
	reply := append([]byte{}, q[:2]...)
	flags := uint16(0x8180)
	if list == nil {
		flags |= 3 // no such name
	}
	reply = binary.BigEndian.AppendUint16(reply, flags)
	reply = append(reply, 0, 1)
	reply = binary.BigEndian.AppendUint16(reply, uint16(count))
	reply = append(reply, 0, 0, 0, 0)
	return append(append(reply, question...), records...)
}

func (s *dnsServer) questions(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked[name]
}

// TestRebindingServer has a real name server that changes its mind: between
// check and dial, between two calls, and between a request and its redirect.
func TestRebindingServer(t *testing.T) {
	var outside, inside atomic.Int32
	var location string
	l, err := net.Listen("tcp", "0.0.0.0:0") // all of 127.0.0.0/8 answers
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if host, _, _ := net.SplitHostPort(r.Context().Value(http.LocalAddrContextKey).(net.Addr).String()); host == "127.0.0.1" {
			outside.Add(1)
		} else {
			inside.Add(1)
		}
		if location != "" {
			http.Redirect(w, r, location, http.StatusFound)
			return
		}
		fmt.Fprint(w, r.Host)
	})}}
	s.Start()
	defer s.Close()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	at := func(name, path string) string { return "http://" + name + ":" + u.Port() + path }
	good, bad := addrs("127.0.0.1"), addrs("127.0.0.2")
	dns, resolver := startDNS(t, map[string][][]netip.Addr{
		"rebind.test":   {good, bad},
		"redirect.test": {good, bad},
		"both.test":     {addrs("127.0.0.1", "127.0.0.2")},
		"mapped.test":   {addrs("127.0.0.1", "::ffff:127.0.0.2")},
		"six.test":      {addrs("127.0.0.1", "::1")},
		"flip.test":     {bad, good},
	})
	x := build(t, Config{Hosts: []string{"rebind.test", "redirect.test", "both.test", "mapped.test", "six.test", "flip.test", "none.test"}, AllowPrivate: onlyLoopback, Resolver: resolver})

	if r := get(t, x, at("rebind.test", "/")); r.Outcome != executor.OK || decode(t, r).Body != "rebind.test:"+u.Port() {
		t.Errorf("the first call: %+v %s", r, r.Output)
	}
	if n := dns.questions("rebind.test"); n != 1 {
		t.Errorf("%d questions for one call, want 1", n)
	}
	if r := get(t, x, at("rebind.test", "/")); r.Outcome != executor.Denied || r.Code != CodeEgress {
		t.Errorf("the second call: %+v", r)
	}
	for _, name := range []string{"both.test", "mapped.test", "six.test", "flip.test"} {
		if r := get(t, x, at(name, "/")); r.Outcome != executor.Denied || r.Code != CodeEgress {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if r := get(t, x, at("flip.test", "/")); r.Outcome != executor.OK {
		t.Errorf("a good answer after a bad one: %+v", r)
	}
	if r := get(t, x, at("none.test", "/")); r.Outcome != executor.Error || r.Code != CodeDNS {
		t.Errorf("no such name: %+v", r)
	}
	location = at("redirect.test", "/next")
	if r := get(t, x, at("redirect.test", "/")); r.Outcome != executor.Denied || !strings.Contains(r.Message, "redirect 1: redirect.test resolves to 127.0.0.2") {
		t.Errorf("a redirect to the same name: %+v", r)
	}
	if inside.Load() != 0 || outside.Load() != 3 {
		t.Errorf("%d connections went inside, %d outside (want 3)", inside.Load(), outside.Load())
	}
}

// TestNoProxy: no variable of the environment puts a proxy between check and
// connection, whatever its spelling.
func TestNoProxy(t *testing.T) {
	var proxied atomic.Int32
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { proxied.Add(1) }))
	defer proxy.Close()
	for _, v := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"} {
		t.Setenv(v, proxy.URL)
	}
	for _, v := range []string{"NO_PROXY", "no_proxy"} {
		t.Setenv(v, "")
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "direct") }))
	defer s.Close()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	_, resolver := startDNS(t, map[string][][]netip.Addr{"named.test": {addrs("127.0.0.1")}})
	x := build(t, Config{Hosts: []string{"named.test"}, AllowPrivate: onlyLoopback, Resolver: resolver})
	r := ask(t, x, map[string]any{"endpoint": "http://named.test:" + u.Port() + "/"}, constraint.Constraints{})
	if r.Outcome != executor.OK || decode(t, r).Body != "direct" || proxied.Load() != 0 {
		t.Errorf("%+v %s, %d requests at the proxy", r, r.Output, proxied.Load())
	}
}
