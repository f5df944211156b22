package oci

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"golang.org/x/sync/errgroup"

	"github.com/autonomyops/autonomy/internal/testutil"
)

// hostile answers every request by the handler and returns its host:port.
func hostile(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

func answer(contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		_, _ = io.WriteString(w, body)
	}
}

const (
	goodManifest = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`
	goodIndex    = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`
)

func TestHostileManifests(t *testing.T) {
	big := strings.Repeat(" ", DefaultMaxManifest)
	for _, tt := range []struct {
		name, contentType, body string
		digest                  string // "": of the body
		want                    error
		text                    string
	}{
		{"bit flip in transit", TypeManifest, strings.Replace(goodManifest, "2", "3", 1), Digest([]byte(goodManifest)), ErrDigest, "digest mismatch"},
		{"truncated", TypeManifest, goodManifest[:50], "", nil, "ends inside"},
		{"oversized", TypeManifest, goodManifest + big, "", ErrTooLarge, "too large"},
		{"sent as an index", TypeIndex, goodManifest, "", ErrMediaType, "sent as"},
		{"index sent as a manifest", TypeManifest, goodIndex, "", ErrMediaType, "sent as"},
		{"manifest and index at once", TypeManifest, strings.Replace(goodManifest, `"layers"`, `"manifests":[],"layers"`, 1), "", ErrMediaType, "content of an index"},
		{"index and manifest at once", TypeIndex, strings.Replace(goodIndex, `"manifests"`, `"layers":[],"manifests"`, 1), "", ErrMediaType, "content of an image manifest"},
		{"unknown type", "application/json", `{"mediaType":"application/json"}`, "", ErrMediaType, ""},
		{"no type at all", "", `{}`, "", ErrMediaType, ""},
		{"duplicate key", TypeManifest, `{"schemaVersion":2,` + goodManifest[1:], "", nil, "duplicate key"},
		{"array", TypeManifest, `[]`, "", nil, "want an object"},
		{"wrong type of a field", TypeManifest, strings.Replace(goodManifest, `[]`, `{}`, 1), "", nil, "cannot unmarshal"},
		{"invalid UTF-8", TypeManifest, strings.Replace(goodManifest, "schema", "sch\xffma", 1), "", nil, "invalid UTF-8"},
		{"too many layers", TypeManifest, strings.Replace(goodManifest, `[]`, `[`+strings.Repeat(`{},`, maxLayers)+`{}]`, 1), "", ErrTooLarge, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			host := hostile(t, answer(tt.contentType, tt.body))
			c := newClient(t, Options{})
			digest := tt.digest
			if digest == "" {
				digest = Digest([]byte(tt.body))
			}
			m, err := c.Manifest(context.Background(), host+"/a", digest)
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) || m != nil {
				t.Errorf("Manifest = %v, %v; want %v with %q", m, err, tt.want, tt.text)
			}
		})
	}
}

func TestHostileBlobs(t *testing.T) {
	want := Digest([]byte("content"))
	for _, tt := range []struct {
		name string
		h    http.HandlerFunc
		want error
	}{
		{"bit flip", answer("", "cOntent"), ErrDigest},
		{"short", answer("", "conte"), ErrDigest},
		{"long", answer("", "content and more"), ErrDigest},
		{"announced too large", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "99999999") }, ErrTooLarge},
		{"too large without an end", func(w http.ResponseWriter, _ *http.Request) {
			buf := make([]byte, 64<<10)
			for {
				if _, err := w.Write(buf); err != nil {
					return
				}
			}
		}, ErrTooLarge},
		{"cut", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "7")
			_, _ = io.WriteString(w, "con")
		}, io.ErrUnexpectedEOF},
		{"compressed on the way", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = io.WriteString(w, "\x1f\x8b")
		}, ErrDigest},
		{"forbidden", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }, ErrUnauthorized},
		{"not there", http.NotFound, ErrNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newClient(t, Options{})
			if data, err := c.Blob(context.Background(), hostile(t, tt.h)+"/a", want); !errors.Is(err, tt.want) || data != nil {
				t.Errorf("Blob = %q, %v; want %v", data, err, tt.want)
			}
		})
	}
	t.Run("no end in time", func(t *testing.T) {
		stop := make(chan struct{})
		host := hostile(t, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, "c")
			w.(http.Flusher).Flush()
			select {
			case <-stop:
			case <-r.Context().Done():
			}
		})
		defer close(stop)
		c := newClient(t, Options{Timeout: 50 * time.Millisecond})
		if _, err := c.Blob(context.Background(), host+"/a", want); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Blob: %v, want DeadlineExceeded", err)
		}
	})
}

func TestLayerRefusals(t *testing.T) {
	ctx := context.Background()
	host := memory(t, true)
	c := newClient(t, Options{MaxBlob: 64})
	repo := host + "/a"
	push := func(layers ...Layer) string {
		t.Helper()
		d, err := c.Push(ctx, repo, Artifact{ArtifactType: TypePolicy, Layers: layers})
		if err != nil {
			t.Fatal(err)
		}
		return d.Digest
	}
	one := Layer{MediaType: TypePolicy, Data: []byte("x")}
	for _, tt := range []struct {
		name, digest string
		want         error
	}{
		{"none", push(), ErrMediaType},
		{"two", push(one, one), ErrMediaType},
		{"another type", push(Layer{MediaType: TypeLock, Data: []byte("x")}), ErrMediaType},
		{"over the limit", push(Layer{MediaType: TypePolicy, Data: make([]byte, 65)}), ErrTooLarge},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, data, err := c.Layer(ctx, repo, tt.digest, TypePolicy); !errors.Is(err, tt.want) || data != nil {
				t.Errorf("Layer = %q, %v; want %v", data, err, tt.want)
			}
		})
	}
}

// TestFallbackTagOverwritten: whoever may push a tag can put an image manifest
// where the index of referrers is. That must not read as "no signatures", and
// an attach must not throw the other's manifest away.
func TestFallbackTagOverwritten(t *testing.T) {
	ctx := context.Background()
	host := memory(t, false)
	c := newClient(t, Options{})
	repo := host + "/a"
	d, err := c.Push(ctx, repo+":v1", Artifact{ArtifactType: TypePolicy})
	if err != nil {
		t.Fatal(err)
	}
	other, err := c.Push(ctx, repo+":"+fallbackTag(d.Digest), Artifact{ArtifactType: TypeLock})
	if err != nil {
		t.Fatal(err)
	}
	if refs, err := c.Referrers(ctx, repo, d.Digest, TypeBundle); !errors.Is(err, ErrMediaType) {
		t.Errorf("Referrers = %v, %v; want ErrMediaType", refs, err)
	}
	if _, err := c.Attach(ctx, repo, d.Digest, Artifact{ArtifactType: TypeBundle}); !errors.Is(err, ErrMediaType) {
		t.Errorf("Attach: %v; want ErrMediaType", err)
	}
	if m, err := c.Resolve(ctx, repo+":"+fallbackTag(d.Digest)); err != nil || m.Digest != other.Digest {
		t.Errorf("the tag is %v, %v after the attach; want it unchanged", m, err)
	}
}

func TestHostileReferrers(t *testing.T) {
	digest := Digest([]byte("subject"))
	endless := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", TypeIndex)
		w.Header().Set("Link", fmt.Sprintf(`<%s?n=%d>; rel="next"`, r.URL.Path, time.Now().UnixNano()))
		_, _ = io.WriteString(w, goodIndex)
	}
	many := strings.Replace(goodIndex, "[]", "["+strings.Repeat(`{"digest":"`+digest+`"},`, maxReferrers)+`{"digest":"`+digest+`"}]`, 1)
	for _, tt := range []struct {
		name string
		h    http.HandlerFunc
		want error
	}{
		{"pages without end", endless, ErrTooLarge},
		{"too many", answer(TypeIndex, many), ErrTooLarge},
		{"next page elsewhere", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", TypeIndex)
			w.Header().Set("Link", `<http://127.0.0.2:1/v2/>; rel="next"`)
			_, _ = io.WriteString(w, goodIndex)
		}, ErrHost},
		{"a digest that is a path", answer(TypeIndex, strings.Replace(goodIndex, "[]", `[{"digest":"../../other/manifests/latest"}]`, 1)), ErrReference},
		{"too many without a type", func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/manifests/") {
				answer(TypeManifest, goodManifest)(w, r)
				return
			}
			answer(TypeIndex, strings.Replace(goodIndex, "[]", "["+strings.Repeat(`{"digest":"`+Digest([]byte(goodManifest))+`"},`, maxUnsure)+`{"digest":"`+Digest([]byte(goodManifest))+`"}]`, 1))(w, r)
		}, ErrTooLarge},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newClient(t, Options{})
			if refs, err := c.Referrers(context.Background(), hostile(t, tt.h)+"/a", digest, TypeBundle); !errors.Is(err, tt.want) {
				t.Errorf("Referrers = %v, %v; want %v", refs, err, tt.want)
			}
		})
	}
}

func TestRedirects(t *testing.T) {
	digest := Digest([]byte("content"))
	var reached atomic.Int32
	inside := hostile(t, func(w http.ResponseWriter, _ *http.Request) {
		reached.Add(1)
		_, _ = io.WriteString(w, "content")
	})
	_, port, _ := net.SplitHostPort(inside)
	to := func(u string) string {
		return hostile(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, u, http.StatusTemporaryRedirect) })
	}
	for _, tt := range []struct {
		name, target string
		hosts        []string
		want         error
	}{
		{"cloud metadata", "http://169.254.169.254/latest", nil, ErrHost},
		{"cloud metadata over https", "https://169.254.169.254/latest", nil, ErrHost},
		{"another port of loopback", "http://127.0.0.1:" + port + "/x", nil, ErrHost},
		{"IPv6 loopback", "http://[::1]:" + port + "/x", nil, ErrHost},
		{"IPv4 in IPv6", "http://[::ffff:127.0.0.1]:" + port + "/x", nil, ErrHost},
		{"unspecified", "https://0.0.0.0:" + port + "/x", nil, ErrHost},
		{"private", "https://10.1.2.3/x", nil, ErrHost},
		{"carrier NAT", "https://100.64.1.1/x", nil, ErrHost},
		{"name that resolves to loopback", "http://localhost:" + port + "/x", nil, ErrHost},
		{"plain HTTP to a name", "http://registry.invalid/x", nil, ErrHost},
		{"file", "file:///etc/passwd", nil, ErrHost},
		{"not on the list", "https://registry.invalid/x", []string{"other.invalid"}, ErrHost},
		{"credentials in the URL", "http://u:p@127.0.0.1:" + port + "/x", []string{"127.0.0.1"}, ErrHost},
		{"on the list", "http://127.0.0.1:" + port + "/x", []string{"127.0.0.1:" + port}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reached.Store(0)
			c := newClient(t, Options{Hosts: tt.hosts, Timeout: 5 * time.Second})
			_, err := c.Blob(context.Background(), to(tt.target)+"/a", digest)
			if !errors.Is(err, tt.want) {
				t.Errorf("Blob: %v, want %v", err, tt.want)
			}
			if (reached.Load() > 0) != (tt.want == nil) {
				t.Errorf("the server inside was reached %d times", reached.Load())
			}
		})
	}
	t.Run("in a circle", func(t *testing.T) {
		host := hostile(t, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
		})
		if _, err := newClient(t, Options{}).Blob(context.Background(), host+"/a", digest); !errors.Is(err, ErrHost) {
			t.Errorf("Blob: %v, want ErrHost", err)
		}
	})
}

func TestAddressRules(t *testing.T) {
	g := &guard{home: "registry.example:443", homeHTTPS: true, hosts: nil}
	listed := &guard{home: "registry.example:443", homeHTTPS: true, hosts: []string{"blobs.example:8443"}}
	local := &guard{home: "127.0.0.1:5000"}
	for _, tt := range []struct {
		name       string
		g          *guard
		host, port string
		ip         string
		ok         bool
	}{
		{"home, public", g, "registry.example", "443", "93.184.216.34", true},
		{"home, private", g, "registry.example", "443", "10.0.0.1", true},
		{"home, unique local", g, "registry.example", "443", "fd00::1", true},
		{"home, alias of loopback", g, "registry.example", "443", "127.0.0.1", false},
		{"home, alias of IPv6 loopback", g, "registry.example", "443", "::1", false},
		{"home, alias of metadata", g, "registry.example", "443", "169.254.169.254", false},
		{"home, alias of IPv6 link-local", g, "registry.example", "443", "fe80::1", false},
		{"home, another port", g, "registry.example", "8443", "10.0.0.1", false},
		{"other, public", g, "cdn.example", "443", "93.184.216.34", true},
		{"other, private", g, "cdn.example", "443", "192.168.1.1", false},
		{"other, mapped private", g, "cdn.example", "443", "::ffff:192.168.1.1", false},
		{"other, multicast", g, "cdn.example", "443", "224.0.0.1", false},
		{"listed, loopback", listed, "blobs.example", "8443", "127.0.0.1", true},
		{"listed, another port", listed, "blobs.example", "443", "127.0.0.1", false},
		{"loopback home", local, "127.0.0.1", "5000", "127.0.0.1", true},
		{"loopback home, another port", local, "127.0.0.1", "5001", "127.0.0.1", false},
	} {
		if err := tt.g.address(tt.host, tt.port, netip.MustParseAddr(tt.ip)); (err == nil) != tt.ok {
			t.Errorf("%s: address(%s, %s, %s) = %v, want ok %v", tt.name, tt.host, tt.port, tt.ip, err, tt.ok)
		}
	}
}

type staticKeychain struct{ auth authn.Authenticator }

func (k staticKeychain) Resolve(authn.Resource) (authn.Authenticator, error) { return k.auth, nil }

// TestCredentials: they are sent after a challenge, to the registry alone.
func TestCredentials(t *testing.T) {
	var leaked atomic.Bool
	other := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			leaked.Store(true)
		}
		_, _ = io.WriteString(w, "content")
	})
	host := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		if user, pass, _ := r.BasicAuth(); user != "u" || pass != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if r.URL.Path == "/v2/" {
			return
		}
		http.Redirect(w, r, "http://"+other+"/blob", http.StatusTemporaryRedirect)
	})
	digest := Digest([]byte("content"))
	if _, err := newClient(t, Options{}).Blob(context.Background(), host+"/a", digest); !errors.Is(err, ErrUnauthorized) {
		t.Errorf("without credentials: %v, want ErrUnauthorized", err)
	}
	keys := staticKeychain{&authn.Basic{Username: "u", Password: "secret"}}
	c := newClient(t, Options{Keychain: keys, Hosts: []string{other}})
	if data, err := c.Blob(context.Background(), host+"/a", digest); err != nil || string(data) != "content" {
		t.Errorf("with credentials: %q, %v", data, err)
	}
	if leaked.Load() {
		t.Error("the credentials went to another host")
	}
	wrong := newClient(t, Options{Keychain: staticKeychain{&authn.Basic{Username: "u", Password: "wrong-secret"}}})
	if _, err := wrong.Blob(context.Background(), host+"/a", digest); !errors.Is(err, ErrUnauthorized) || strings.Contains(err.Error(), "secret") {
		t.Errorf("with wrong credentials: %v, want ErrUnauthorized and no password in it", err)
	}
}

// TestToken does the token handshake, against a token service on another port:
// it must be allowed like any other host.
func TestToken(t *testing.T) {
	tokens := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		if user, pass, _ := r.BasicAuth(); user != "u" || pass != "secret" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = fmt.Fprintf(w, `{"token":%q}`, "for "+r.URL.Query().Get("scope"))
	})
	// By name: go-containerregistry itself refuses loopback literals here.
	tokens = strings.Replace(tokens, "127.0.0.1", "localhost", 1)
	host := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer for repository:a:pull" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+tokens+`/token",service="s"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, "content")
	})
	keys := staticKeychain{&authn.Basic{Username: "u", Password: "secret"}}
	digest := Digest([]byte("content"))
	if data, err := newClient(t, Options{Keychain: keys, Hosts: []string{tokens}}).Blob(context.Background(), host+"/a", digest); err != nil || string(data) != "content" {
		t.Errorf("Blob = %q, %v", data, err)
	}
	if _, err := newClient(t, Options{Keychain: keys}).Blob(context.Background(), host+"/a", digest); !errors.Is(err, ErrHost) {
		t.Errorf("a token service that is not allowed: %v, want ErrHost", err)
	}
}

func TestTLS(t *testing.T) {
	plain := hostile(t, answer("", "content"))
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/v2/down/") {
			http.Redirect(w, r, "http://"+plain+"/x", http.StatusTemporaryRedirect)
			return
		}
		_, _ = io.WriteString(w, "content")
	}))
	t.Cleanup(srv.Close)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	digest := Digest([]byte("content"))
	trusted := Options{Mirror: srv.URL, TLS: srv.Client().Transport.(*http.Transport).TLSClientConfig, Hosts: []string{plain}}
	if data, err := newClient(t, trusted).Blob(context.Background(), "registry.invalid/a", digest); err != nil || string(data) != "content" {
		t.Errorf("Blob = %q, %v", data, err)
	}
	if _, err := newClient(t, trusted).Blob(context.Background(), "registry.invalid/down", digest); !errors.Is(err, ErrHost) {
		t.Errorf("redirect from https to http: %v, want ErrHost", err)
	}
	var unknown x509.UnknownAuthorityError
	if _, err := newClient(t, Options{Mirror: srv.URL}).Blob(context.Background(), "registry.invalid/a", digest); !errors.As(err, &unknown) {
		t.Errorf("a certificate nobody vouches for: %v, want UnknownAuthorityError", err)
	}
}

// TestAttachConcurrently: the fallback index has no compare-and-swap, one client
// must not lose its own entries all the same.
func TestAttachConcurrently(t *testing.T) {
	ctx := context.Background()
	host := testutil.StartRegistry(t).Addr
	c := newClient(t, Options{})
	repo := host + "/a"
	d, err := c.Push(ctx, repo, Artifact{ArtifactType: TypePolicy})
	if err != nil {
		t.Fatal(err)
	}
	const n = 8
	var g errgroup.Group
	for i := range n {
		g.Go(func() error {
			_, err := c.Attach(ctx, repo, d.Digest, Artifact{ArtifactType: TypeBundle, Layers: []Layer{{MediaType: TypeBundle, Data: []byte{byte(i)}}}})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if refs, err := c.Referrers(ctx, repo, d.Digest, TypeBundle); err != nil || len(refs) != n {
		t.Errorf("%d referrers, %v; want %d", len(refs), err, n)
	}
}

func TestParseRef(t *testing.T) {
	d := Digest(nil)
	for s, want := range map[string]Ref{
		"registry.example/a/b:1.0.0":       {"registry.example", "a/b", "1.0.0", ""},
		"127.0.0.1:5000/a@" + d:            {"127.0.0.1:5000", "a", "", d},
		"localhost/a":                      {"localhost", "a", "", ""},
		"[::1]:5000/a:t@" + d:              {"[::1]:5000", "a", "t", d},
		"registry.example:5000/a__b/c-d.e": {"registry.example:5000", "a__b/c-d.e", "", ""},
	} {
		got, err := ParseRef(s)
		if err != nil || got != want || got.String() != s {
			t.Errorf("ParseRef(%q) = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "a", "a/b", "agent:1", "registry.example/", "registry.example/A", "registry.example/a:", "registry.example/a@sha256:1", "registry.example/a@md5:" + d[7:],
		"registry.example/a@" + strings.ToUpper(d), "registry.example/../a", "registry.example/a//b", "registry.example/a:t:u", "http://registry.example/a", "user@registry.example/a",
		"registry.example/a b", "registry.example/a?x", "registry.example:x/a", "registry.example/a\n", "registry.example/" + strings.Repeat("a", maxRef)} {
		if got, err := ParseRef(s); !errors.Is(err, ErrReference) {
			t.Errorf("ParseRef(%q) = %+v, %v; want ErrReference", s, got, err)
		}
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []Options{{MaxBlob: -1}, {Timeout: -1}, {Mirror: "ftp://x"}, {Mirror: "relay:5080"}, {Mirror: "http://u:p@x"}, {Mirror: "http://x/?q"}} {
		if _, err := New(o); err == nil || strings.Contains(err.Error(), "u:p") {
			t.Errorf("New(%+v): %v, want an error without credentials", o, err)
		}
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(goodManifest), TypeManifest)
	f.Add([]byte(goodIndex), TypeIndex)
	f.Fuzz(func(t *testing.T, data []byte, contentType string) {
		m, err := ParseManifest(data, contentType)
		if err != nil {
			return
		}
		if m.IsIndex() == (m.Config != nil) || m.Digest != Digest(data) || !json.Valid(data) {
			t.Fatalf("accepted what is neither an index nor a manifest: %q", data)
		}
	})
}
