package sigstore

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/autonomyops/autonomy/internal/oci"
	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/verify"
)

func run(t *testing.T, dir, exe string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(exe, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "COSIGN_PASSWORD=", "HOME="+dir, "TUF_ROOT="+dir, "HTTPS_PROXY=http://127.0.0.1:1", "NO_PROXY=127.0.0.1")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// image pushes something to sign.
func image(t *testing.T, c *oci.Client, repo, content string) string {
	t.Helper()
	d, err := c.Push(context.Background(), repo+":v1", oci.Artifact{ArtifactType: "application/vnd.example.agent", Layers: []oci.Layer{{MediaType: "text/plain", Data: []byte(content)}}})
	if err != nil {
		t.Fatal(err)
	}
	return d.Digest
}

func fetchBundles(t *testing.T, c *oci.Client, repo, digest string) [][]byte {
	t.Helper()
	refs, err := c.Referrers(context.Background(), repo, digest, BundleMediaType)
	if err != nil {
		t.Fatal(err)
	}
	var out [][]byte
	for _, r := range refs {
		_, b, err := c.Layer(context.Background(), repo, r.Digest, BundleMediaType)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}

func writePublic(t *testing.T, path string, pub crypto.PublicKey) {
	t.Helper()
	p, err := verify.MarshalPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestCosign is the oracle: what real cosign signs we verify, what we sign real
// cosign verifies, over registries with and without the referrers API.
func TestCosign(t *testing.T) {
	cosign, ok := testutil.Cosign()
	if !ok {
		if cosign = testutil.Cached("cosign"); cosign == "" {
			t.Skip("cosign is not installed, neither on PATH nor in the cache: its build takes minutes, so this one test may be missed")
		}
	}
	for name, start := range map[string]func(testing.TB) string{
		"docker-registry": func(t testing.TB) string { return testutil.StartRegistry(t).Addr },
		"referrers API": func(t testing.TB) string {
			srv := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
			t.Cleanup(srv.Close)
			return strings.TrimPrefix(srv.URL, "http://")
		},
	} {
		t.Run(name, func(t *testing.T) {
			host, dir, ctx := start(t), t.TempDir(), context.Background()
			c, err := oci.New(oci.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(c.Close)
			repo := host + "/agents/a"

			t.Run("cosign signs", func(t *testing.T) {
				digest := image(t, c, repo, "one")
				if out, err := run(t, dir, cosign, "generate-key-pair"); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				empty := filepath.Join(dir, "signing-config.json")
				if err := os.WriteFile(empty, []byte(`{"mediaType":"application/vnd.dev.sigstore.signingconfig.v0.2+json","rekorTlogConfig":{},"tsaConfig":{}}`), 0o600); err != nil {
					t.Fatal(err)
				}
				if out, err := run(t, dir, cosign, "sign", "--key", "cosign.key", "--signing-config", empty, "-y", repo+"@"+digest); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				p, err := os.ReadFile(filepath.Join(dir, "cosign.pub"))
				if err != nil {
					t.Fatal(err)
				}
				kr, err := verify.NewKeyring(&verify.Key{PublicKey: string(p), Usages: []verify.Usage{verify.UsageArtifact}})
				if err != nil {
					t.Fatal(err)
				}
				v, err := New(kr)
				if err != nil {
					t.Fatal(err)
				}
				bundles := fetchBundles(t, c, repo, digest)
				if id, err := v.VerifyArtifact(ctx, digest, bundles, time.Now()); err != nil || id != kr.Keys[0].ID {
					t.Errorf("VerifyArtifact = %q, %v; want key %s", id, err, kr.Keys[0].ID)
				}
				wantCode(t, v, image(t, c, repo, "another"), bundles, time.Now(), verify.CodeSigInvalid)
			})

			t.Run("we sign", func(t *testing.T) {
				digest := image(t, c, repo, "two")
				key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
				if err != nil {
					t.Fatal(err)
				}
				for _, name := range []string{"", repo} {
					b, err := Sign(digest, name, key)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := c.Attach(ctx, repo, digest, oci.Artifact{ArtifactType: BundleMediaType, Annotations: Annotations(), Layers: []oci.Layer{{MediaType: BundleMediaType, Data: b}}}); err != nil {
						t.Fatal(err)
					}
				}
				writePublic(t, filepath.Join(dir, "ours.pub"), key.Public())
				if out, err := run(t, dir, cosign, "verify", "--key", "ours.pub", "--insecure-ignore-tlog", "--new-bundle-format", repo+"@"+digest); err != nil {
					t.Errorf("cosign refuses our signature: %v\n%s", err, out)
				}
				other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
				if err != nil {
					t.Fatal(err)
				}
				writePublic(t, filepath.Join(dir, "other.pub"), other.Public())
				if out, err := run(t, dir, cosign, "verify", "--key", "other.pub", "--insecure-ignore-tlog", "--new-bundle-format", repo+"@"+digest); err == nil {
					t.Errorf("cosign accepts our signature under another key:\n%s", out)
				}
			})
		})
	}
}
