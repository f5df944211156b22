package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/relay/oci"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sink collects a blob in memory.
type sink struct {
	bytes.Buffer
	size     int64
	restarts int
}

func (s *sink) Offset() int64  { return int64(s.Len()) }
func (s *sink) Size() int64    { return s.size }
func (s *sink) Restart() error { s.Reset(); s.restarts++; return nil }

func client(t *testing.T, url string, change func(*Config)) *Client {
	t.Helper()
	cfg := Config{URL: url, IdleTimeout: 2 * time.Second, DialTimeout: time.Second}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func server(t *testing.T, h http.HandlerFunc) *httptest.Server {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

var blob = bytes.Repeat([]byte("0123456789abcdef"), 4096) // 64 KiB

// cut ends the connection in the middle of the answer.
func cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		conn.Close()
	}
}

// TestResume cuts the body at each tenth: every byte is sent once.
func TestResume(t *testing.T) {
	var sent, requests atomic.Int64
	srv := server(t, func(w http.ResponseWriter, r *http.Request) {
		off := 0
		if rng := r.Header.Get("Range"); rng != "" {
			if r.Header.Get("If-Range") != `"v1"` {
				t.Errorf("If-Range is %q", r.Header.Get("If-Range"))
			}
			fmt.Sscanf(rng, "bytes=%d-", &off)
		}
		requests.Add(1)
		h := w.Header()
		h.Set("ETag", `"v1"`)
		h.Set("Content-Length", fmt.Sprint(len(blob)-off))
		if off > 0 {
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, len(blob)-1, len(blob)))
			w.WriteHeader(http.StatusPartialContent)
		}
		end := min(off+len(blob)/10+1, len(blob))
		n, _ := w.Write(blob[off:end])
		sent.Add(int64(n))
		if end < len(blob) {
			http.NewResponseController(w).Flush()
			cut(w)
		}
	})
	s := &sink{size: int64(len(blob))}
	if err := client(t, srv.URL, nil).Blob(t.Context(), "r", oci.DigestOf(blob), s); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(s.Bytes(), blob) || s.restarts != 0 || sent.Load() != int64(len(blob)) || requests.Load() != 10 {
		t.Errorf("%d bytes in %d requests, %d sent, %d restarts", s.Len(), requests.Load(), sent.Load(), s.restarts)
	}
}

// TestNoRanges: an upstream that ignores Range starts over.
func TestNoRanges(t *testing.T) {
	var n atomic.Int64
	srv := server(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		if n.Add(1) == 1 {
			w.Write(blob[:1000])
			http.NewResponseController(w).Flush()
			cut(w)
			return
		}
		w.Write(blob)
	})
	s := &sink{size: int64(len(blob))}
	if err := client(t, srv.URL, nil).Blob(t.Context(), "r", oci.DigestOf(blob), s); err != nil || s.restarts != 1 || !bytes.Equal(s.Bytes(), blob) {
		t.Errorf("%v, %d restarts", err, s.restarts)
	}
}

// TestMisbehaviour: what a bad upstream does, and the error it gets for it.
func TestMisbehaviour(t *testing.T) {
	d := oci.DigestOf(blob)
	length := func(w http.ResponseWriter, n int) { w.Header().Set("Content-Length", fmt.Sprint(n)) }
	slow := func(step int, pause time.Duration) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			for off := 0; off < len(blob) && r.Context().Err() == nil; off += step {
				w.Write(blob[off:min(off+step, len(blob))])
				http.NewResponseController(w).Flush()
				time.Sleep(pause)
			}
		}
	}
	tests := []struct {
		name   string
		h      http.HandlerFunc
		change func(*Config)
		want   error
	}{
		{"not there", http.NotFound, nil, ErrNotFound},
		{"server error", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, nil, ErrStatus},
		{"refused", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) }, nil, ErrUnauthorized},
		{"basic challenge", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
		}, nil, ErrUnauthorized},
		{"longer than declared", func(w http.ResponseWriter, _ *http.Request) { length(w, len(blob)+1); w.Write(blob) }, nil, ErrMismatch},
		{"shorter than declared", func(w http.ResponseWriter, _ *http.Request) { length(w, 10); w.Write(blob[:10]) }, nil, ErrMismatch},
		{"endless", func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(blob); err != nil {
					return
				}
			}
		}, nil, ErrMismatch},
		{"always cut", func(w http.ResponseWriter, _ *http.Request) { length(w, len(blob)); cut(w) }, func(c *Config) { c.Resumes = 1 }, ErrUnreachable},
		{"cut without progress", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				cut(w)
				return
			}
			length(w, len(blob))
			w.Write(blob[:100])
			http.NewResponseController(w).Flush()
			cut(w)
		}, func(c *Config) { c.Resumes = 2 }, ErrInterrupted},
		{"other range", func(w http.ResponseWriter, r *http.Request) {
			length(w, len(blob))
			if r.Header.Get("Range") == "" {
				w.Write(blob[:100])
				http.NewResponseController(w).Flush()
				cut(w)
				return
			}
			w.Header().Set("Content-Range", "bytes 0-9/10")
			w.WriteHeader(206)
		}, nil, ErrMismatch},
		{"idle", slow(1000, 400*time.Millisecond), func(c *Config) { c.IdleTimeout = 100 * time.Millisecond }, ErrTooSlow},
		{"below the minimum rate", slow(10, 20*time.Millisecond), func(c *Config) { c.MinRate, c.RateWindow = 100<<10, 200*time.Millisecond }, ErrTooSlow},
		{"over the total deadline", slow(100, 20*time.Millisecond), func(c *Config) { c.TotalTimeout = 200 * time.Millisecond }, ErrTooSlow},
		{"redirect to the metadata address", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://169.254.169.254/latest", http.StatusTemporaryRedirect)
		}, nil, ErrForbidden},
		{"the same by https", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://169.254.169.254/latest", http.StatusTemporaryRedirect)
		}, nil, ErrForbidden},
		{"redirect to loopback", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://[::1]:9/", http.StatusTemporaryRedirect)
		}, nil, ErrForbidden},
		{"a name for loopback", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://localhost:9/", http.StatusTemporaryRedirect)
		}, nil, ErrForbidden},
		{"mapped address", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://[::ffff:10.0.0.1]/", http.StatusTemporaryRedirect)
		}, nil, ErrForbidden},
		{"redirect for ever", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
		}, nil, ErrForbidden},
		{"token realm on a private address", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://10.0.0.1/token"`)
			w.WriteHeader(401)
		}, nil, ErrForbidden},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := server(t, tt.h)
			err := client(t, srv.URL, tt.change).Blob(t.Context(), "team/agent", d, &sink{size: int64(len(blob))})
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
	t.Run("gone", func(t *testing.T) {
		srv := httptest.NewServer(nil)
		srv.Close()
		if err := client(t, srv.URL, nil).Blob(t.Context(), "r", d, &sink{size: 1}); !errors.Is(err, ErrUnreachable) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		srv := server(t, func(w http.ResponseWriter, r *http.Request) { cancel(); <-r.Context().Done() })
		if err := client(t, srv.URL, nil).Blob(ctx, "r", d, &sink{size: 1}); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	})
}

// TestRedirectIsNotDialled: the refused address is never connected to.
func TestRedirectIsNotDialled(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	hit := make(chan struct{})
	go func() {
		if c, err := ln.Accept(); err == nil {
			c.Close()
			close(hit)
		}
	}()
	for _, host := range []string{"127.0.0.1", "localhost"} {
		_, port, _ := net.SplitHostPort(ln.Addr().String())
		srv := server(t, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://"+net.JoinHostPort(host, port)+"/", http.StatusFound)
		})
		if _, _, err := client(t, srv.URL, nil).Manifest(t.Context(), "r", oci.DigestOf(nil)); !errors.Is(err, ErrForbidden) {
			t.Errorf("%s: %v", host, err)
		}
	}
	select {
	case <-hit:
		t.Error("a refused address was connected to")
	case <-time.After(50 * time.Millisecond):
	}
	ln.Close()
}

func TestManifest(t *testing.T) {
	good := []byte(`{"schemaVersion":2}`)
	tests := []struct {
		name string
		h    http.HandlerFunc
		want error
	}{
		{"good", func(w http.ResponseWriter, _ *http.Request) { w.Write(good) }, nil},
		{"other bytes", func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("{}")) }, ErrMismatch},
		{"huge by its header", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(oci.MaxManifestBytes+1))
		}, ErrMismatch},
		{"huge without saying so", func(w http.ResponseWriter, _ *http.Request) {
			io.Copy(w, io.LimitReader(zeros{}, oci.MaxManifestBytes+10))
		}, ErrMismatch},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			data, _, err := client(t, server(t, tt.h).URL, nil).Manifest(t.Context(), "r", oci.DigestOf(good))
			if !errors.Is(err, tt.want) || err == nil && !bytes.Equal(data, good) {
				t.Errorf("error %v", err)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestToken: the anonymous token is asked for once, for pulling only, and is not
// shown to another host.
func TestToken(t *testing.T) {
	var tokens atomic.Int64
	var srv *httptest.Server
	srv = server(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			tokens.Add(1)
			if q := r.URL.Query(); q.Get("scope") != "repository:team/agent:pull" || q.Get("service") != "reg, istry" {
				t.Errorf("token request %s", r.URL)
			}
			io.WriteString(w, `{"token":"abc","expires_in":300}`)
		case r.Header.Get("Authorization") != "Bearer abc":
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+srv.URL+`/token",service="reg, istry",scope="repository:team/agent:pull,push"`)
			w.WriteHeader(401)
		default:
			w.Write([]byte("{}"))
		}
	})
	c := client(t, srv.URL, nil)
	for range 2 {
		if _, _, err := c.Manifest(t.Context(), "team/agent", oci.DigestOf([]byte("{}"))); err != nil {
			t.Fatal(err)
		}
	}
	if tokens.Load() != 1 {
		t.Errorf("%d token requests", tokens.Load())
	}
	req := httptest.NewRequest("GET", "https://cdn.example.com/x", nil)
	req.Header.Set("Authorization", "Bearer abc")
	if err := c.checkRedirect(req, nil); err != nil || req.Header.Get("Authorization") != "" {
		t.Errorf("redirect elsewhere: %v, %v", err, req.Header)
	}
}

func TestReferrers(t *testing.T) {
	subject := oci.DigestOf([]byte("s"))
	entry := fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":1}`, oci.TypeOCIManifest, oci.DigestOf([]byte("r")))
	index := `{"schemaVersion":2,"mediaType":"` + oci.TypeOCIIndex + `","manifests":[` + entry + `]}`
	manifest := `{"schemaVersion":2,"mediaType":"` + oci.TypeOCIManifest + `","config":` + entry + `,"layers":[]}`
	api, tag := "/v2/r/referrers/"+string(subject), "/v2/r/manifests/sha256-"+subject.Hex()
	send := func(w http.ResponseWriter, typ, body string) {
		w.Header().Set("Content-Type", typ)
		io.WriteString(w, body)
	}
	tests := []struct {
		name string
		h    http.HandlerFunc
		n    int
		want error
	}{
		{"none", http.NotFound, 0, nil},
		{"api", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != api {
				t.Errorf("asked for %s", r.URL.Path)
			}
			send(w, oci.TypeOCIIndex, index)
		}, 1, nil},
		{"two pages", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.RawQuery == "" {
				w.Header().Set("Link", "<"+api+`?last=1>; rel="next"`)
			}
			send(w, oci.TypeOCIIndex, index)
		}, 2, nil},
		{"pages for ever", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "<"+api+`>; rel="next"`)
			send(w, oci.TypeOCIIndex, index)
		}, 0, ErrMismatch},
		{"next page elsewhere", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", `<http://127.0.0.1:1/x>; rel="next"`)
			send(w, oci.TypeOCIIndex, index)
		}, 0, ErrForbidden},
		{"tag", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != tag {
				http.NotFound(w, r)
				return
			}
			send(w, oci.TypeOCIIndex, index)
		}, 1, nil},
		{"tag overwritten by a manifest", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != tag {
				http.NotFound(w, r)
				return
			}
			send(w, oci.TypeOCIManifest, manifest)
		}, 0, ErrMismatch},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			refs, err := client(t, server(t, tt.h).URL, nil).Referrers(t.Context(), "r", subject)
			if !errors.Is(err, tt.want) || len(refs) != tt.n {
				t.Errorf("%d referrers, error %v", len(refs), err)
			}
		})
	}
}

func TestPublic(t *testing.T) {
	for addr, want := range map[string]bool{
		"1.1.1.1": true, "2606:4700::1": true, "127.0.0.1": false, "10.1.2.3": false, "172.16.0.1": false, "192.168.1.1": false,
		"169.254.169.254": false, "100.64.0.1": false, "0.0.0.0": false, "255.255.255.255": false, "224.0.0.1": false, "198.18.0.1": false,
		"::1": false, "::": false, "fe80::1": false, "fe80::1%eth0": false, "fc00::1": false, "::ffff:127.0.0.1": false,
		"64:ff9b::a00:1": false, "2002:a00:1::": false, "ff02::1": false, "::7f00:1": false,
	} {
		if got := public(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %v", addr, got)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for url, want := range map[string]string{
		"": "want a URL", "registry": "want a URL", "ftp://x": "want https", "http://example.com": "loopback", "http://10.0.0.1:5000": "loopback",
		"https://user:secret@x": "credentials", "https://x/v2": "scheme and host only", "https://x?q": "scheme and host only",
	} {
		_, err := New(Config{URL: url})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", url, err)
		}
	}
	for _, url := range []string{"https://registry.example.com", "https://10.0.0.1:5000/", "http://127.0.0.1:5000", "http://[::1]:5000"} {
		if c, err := New(Config{URL: url}); err != nil {
			t.Errorf("%q: %v", url, err)
		} else {
			c.Close()
		}
	}
}
