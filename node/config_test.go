package node

import (
	"strings"
	"testing"

	"github.com/autonomyops/autonomy/internal/run"
)

// TestMayListen: beyond loopback only with TLS, and with callers that are known.
func TestMayListen(t *testing.T) {
	tls := func(c *Config) { c.TLSCert, c.TLSKey = "c", "k" }
	for _, tc := range []struct {
		name   string
		listen string
		change func(*Config)
		want   string // "": it may
	}{
		{"loopback", "127.0.0.1:0", nil, ""},
		{"loopback by name", "localhost:0", nil, ""},
		{"loopback, IPv6", "[::1]:0", nil, ""},
		{"a socket", "unix:/run/x", nil, ""},
		{"all addresses", "0.0.0.0:0", nil, "--tls-cert"},
		{"all addresses, IPv6", "[::]:0", nil, "--tls-cert"},
		{"all addresses, short", ":0", nil, "--tls-cert"},
		{"one address", "192.0.2.1:0", nil, "--tls-cert"},
		{"a name", "node.example.org:0", nil, "--tls-cert"},
		{"a name like loopback", "localhost.example.org:0", nil, "--tls-cert"},
		{"tokens without TLS", "0.0.0.0:0", func(c *Config) { c.Tokens = "t" }, "--tls-cert"},
		{"TLS alone", "0.0.0.0:0", tls, "--tokens or --tls-client-ca"},
		{"TLS, and nobody is anonymous", "0.0.0.0:0", func(c *Config) { tls(c); c.Anonymous = "none" }, "--tokens or --tls-client-ca"},
		{"TLS and tokens", "0.0.0.0:0", func(c *Config) { tls(c); c.Tokens = "t" }, ""},
		{"TLS and certificates", "0.0.0.0:0", func(c *Config) { tls(c); c.TLSClientCA = "ca" }, ""},
		{"a certificate without its key", "127.0.0.1:0", func(c *Config) { c.TLSCert = "c" }, "go together"},
		{"a client CA without TLS", "127.0.0.1:0", func(c *Config) { c.TLSClientCA = "ca" }, "--tls-client-ca needs"},
		{"a revocation list without a CA", "127.0.0.1:0", func(c *Config) { tls(c); c.TLSCRL = "l" }, "--tls-crl needs"},
		{"an unknown anonymous", "127.0.0.1:0", func(c *Config) { c.Anonymous = "all" }, "--anonymous"},
		{"a host with a port", "127.0.0.1:0", func(c *Config) { c.Hosts = []string{"a:1"} }, "--allowed-host"},
	} {
		c := Defaults()
		c.StateDir, c.Listen = "/s", []string{tc.listen}
		if tc.change != nil {
			tc.change(&c)
		}
		err := c.Validate()
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || run.Code(err) != run.Usage) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}
