package oci

import (
	"bytes"
	"context"
	"errors"
	"testing"
)

func newClient(t *testing.T, o Options) *Client {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestPushPullAttach(t *testing.T) {
	registries(t, func(t *testing.T, host string) {
		ctx := context.Background()
		c := newClient(t, Options{})
		repo := host + "/agents/a"
		policy := Artifact{ArtifactType: TypePolicy, Layers: []Layer{{MediaType: TypePolicy, Data: []byte("bundle")}}}
		d, err := c.Push(ctx, repo+":1.0.0", policy)
		if err != nil {
			t.Fatal(err)
		}
		again, err := c.Push(ctx, repo+":1.0.0", policy)
		if err != nil || again.Digest != d.Digest {
			t.Fatalf("second push: %v, %v; want %s again", again.Digest, err, d.Digest)
		}
		m, err := c.Resolve(ctx, repo+":1.0.0")
		if err != nil || m.Digest != d.Digest || m.Type() != TypePolicy {
			t.Fatalf("Resolve = %+v, %v; want %s", m, err, d.Digest)
		}
		if _, data, err := c.Layer(ctx, repo, d.Digest, TypePolicy); err != nil || string(data) != "bundle" {
			t.Fatalf("Layer = %q, %v", data, err)
		}
		if _, _, err := c.Layer(ctx, repo, d.Digest, TypeLock); !errors.Is(err, ErrMediaType) {
			t.Errorf("Layer of another type: %v, want ErrMediaType", err)
		}

		if refs, err := c.Referrers(ctx, repo, d.Digest, TypeLock); err != nil || len(refs) != 0 {
			t.Fatalf("Referrers before any = %v, %v", refs, err)
		}
		want := map[string]bool{}
		for i, typ := range []string{TypeLock, TypeBundle, TypeBundle} {
			a, err := c.Attach(ctx, repo, d.Digest, Artifact{ArtifactType: typ, Layers: []Layer{{MediaType: typ, Data: []byte{byte(i)}}}})
			if err != nil {
				t.Fatal(err)
			}
			if typ == TypeBundle {
				want[a.Digest] = true
			}
			if _, err := c.Attach(ctx, repo, d.Digest, Artifact{ArtifactType: typ, Layers: []Layer{{MediaType: typ, Data: []byte{byte(i)}}}}); err != nil {
				t.Fatal(err) // the same again changes nothing
			}
		}
		refs, err := c.Referrers(ctx, repo, d.Digest, TypeBundle)
		if err != nil || len(refs) != len(want) {
			t.Fatalf("Referrers = %v, %v; want %v", refs, err, want)
		}
		for _, r := range refs {
			if !want[r.Digest] || r.ArtifactType != TypeBundle {
				t.Errorf("unexpected referrer %+v", r)
			}
		}
		if all, err := c.Referrers(ctx, repo, d.Digest, ""); err != nil || len(all) != 3 {
			t.Errorf("all referrers: %d, %v; want 3", len(all), err)
		}
		if _, err := c.Blob(ctx, repo, Digest([]byte("absent"))); !errors.Is(err, ErrNotFound) {
			t.Errorf("absent blob: %v, want ErrNotFound", err)
		}
		if _, err := c.Manifest(ctx, repo, Digest([]byte("absent"))); !errors.Is(err, ErrNotFound) {
			t.Errorf("absent manifest: %v, want ErrNotFound", err)
		}
		blob, err := c.Blob(ctx, repo, Digest([]byte("bundle")))
		if err != nil || !bytes.Equal(blob, []byte("bundle")) {
			t.Errorf("Blob = %q, %v", blob, err)
		}

		// The same through another base URL: the reference's host is not asked.
		via := newClient(t, Options{Mirror: "http://" + host})
		if m, err := via.Manifest(ctx, "registry.invalid/agents/a", d.Digest); err != nil || m.Digest != d.Digest {
			t.Errorf("through a mirror: %v", err)
		}
	})
}
