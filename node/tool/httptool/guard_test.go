package httptool_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/autonomyops/autonomy/node/tool/httptool"
)

// names answers each question with the next of its addresses.
type names struct {
	addrs []string
	asked atomic.Int32
}

func (n *names) LookupNetIP(context.Context, string, string) ([]netip.Addr, error) {
	i := int(n.asked.Add(1)) - 1
	return []netip.Addr{netip.MustParseAddr(n.addrs[min(i, len(n.addrs)-1)])}, nil
}

// TestGuardTransport: each connection is checked, whatever the name meant before.
func TestGuardTransport(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
	defer srv.Close()
	port := srv.URL[strings.LastIndexByte(srv.URL, ':'):]
	loopback := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	r := &names{addrs: []string{"127.0.0.1", "127.0.0.2"}}
	g, err := httptool.NewGuard("http://mcp.example"+port+"/mcp", loopback, r)
	if err != nil {
		t.Fatal(err)
	}
	tr := g.Transport()
	tr.DisableKeepAlives = true
	get := func(url string) error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	if err := get(g.URL()); err != nil {
		t.Fatal(err)
	}
	if err := get(g.URL()); err == nil || !strings.Contains(err.Error(), "resolves to 127.0.0.2") {
		t.Errorf("the name means another address now: %v", err)
	}
	if err := get("http://other.example" + port); err == nil || !strings.Contains(err.Error(), "is not in this tool's hosts") {
		t.Errorf("another host: %v", err)
	}
}

func TestGuard(t *testing.T) {
	for url, want := range map[string]string{
		"http://a.example/?k=hush": "a query is not accepted", "http://u:hush@a.example/": "a user or password",
		"unix:/x": "scheme", "http://0x7f.1/": "number", "/x": "scheme",
	} {
		if _, err := httptool.NewGuard(url, nil, nil); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: error %v, want one with %q", url, err, want)
		}
	}
	for url, private := range map[string]bool{
		"https://a.example/": true, "http://127.0.0.1:1/": true, "http://[::1]:1/": true, "http://a.example/": false, "http://localhost/": false,
	} {
		g, err := httptool.NewGuard(url, nil, nil)
		if err != nil || g.Private() != private {
			t.Errorf("%s: private %v, want %v (%v)", url, g.Private(), private, err)
		}
	}
	g, err := httptool.NewGuard("https://a.example/", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for egress, want := range map[string]bool{"a.example": true, "A.example:443": true, "a.example:80": false, "b.example": false} {
		if ok, err := g.Within([]string{egress}); ok != want || err != nil {
			t.Errorf("within %s: %v, %v", egress, ok, err)
		}
	}
	if _, err := g.Within([]string{"a b"}); err == nil {
		t.Error("an egress entry that is none was taken")
	}
}
