package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
)

// Layer is one layer to push.
type Layer struct {
	MediaType   string
	Data        []byte
	Annotations map[string]string
}

// Artifact is what Push makes a manifest of. The manifest's bytes are a function
// of the artifact: pushing it twice changes nothing the second time.
type Artifact struct {
	ArtifactType string
	Layers       []Layer
	Annotations  map[string]string
	Subject      *Descriptor // the manifest it refers to, or nil
}

var emptyConfig = []byte("{}")

// Push uploads a to ref, registry/repository with a tag or without. It returns
// the manifest's descriptor.
func (c *Client) Push(ctx context.Context, ref string, a Artifact) (Descriptor, error) {
	parsed, err := ParseRef(ref)
	if err != nil {
		return Descriptor{}, err
	}
	m := Manifest{
		SchemaVersion: 2, MediaType: TypeManifest, ArtifactType: a.ArtifactType, Subject: a.Subject, Annotations: a.Annotations,
		Config: &Descriptor{MediaType: TypeEmpty, Digest: Digest(emptyConfig), Size: int64(len(emptyConfig))},
		Layers: []Descriptor{},
	}
	if a.ArtifactType == "" {
		return Descriptor{}, errors.New("push: no artifact type")
	}
	blobs := [][]byte{emptyConfig}
	for _, l := range a.Layers {
		m.Layers = append(m.Layers, Descriptor{MediaType: l.MediaType, Digest: Digest(l.Data), Size: int64(len(l.Data)), Annotations: l.Annotations})
		blobs = append(blobs, l.Data)
	}
	if len(a.Layers) == 0 { // the specification wants one: the empty one
		m.Layers = append(m.Layers, *m.Config)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return Descriptor{}, fmt.Errorf("push %s: %w", ref, err)
	}
	d := Descriptor{MediaType: TypeManifest, Digest: Digest(raw), Size: int64(len(raw)), ArtifactType: a.ArtifactType, Annotations: a.Annotations}
	if parsed.Digest != "" && parsed.Digest != d.Digest {
		return Descriptor{}, fmt.Errorf("push %s: %w: the artifact is %s", ref, ErrDigest, d.Digest)
	}
	ctx, cancel := c.bounded(ctx)
	defer cancel()
	r, repo := c.registry(parsed.Registry), parsed.Repository
	for _, b := range blobs {
		if err := c.putBlob(ctx, r, repo, b); err != nil {
			return Descriptor{}, err
		}
	}
	at := parsed.Tag
	if at == "" {
		at = d.Digest
	}
	h, err := c.putManifest(ctx, r, repo, at, TypeManifest, raw)
	if err != nil {
		return Descriptor{}, err
	}
	if a.Subject != nil && h.Get("OCI-Subject") != a.Subject.Digest {
		if err := c.extendFallback(ctx, r, repo, a.Subject.Digest, d); err != nil {
			return Descriptor{}, err
		}
	}
	return d, nil
}

// Attach pushes a as a referrer of the manifest subject in repo
// ("registry/repository"), which must exist.
func (c *Client) Attach(ctx context.Context, repo, subject string, a Artifact) (Descriptor, error) {
	m, err := c.Manifest(ctx, repo, subject)
	if err != nil {
		return Descriptor{}, err
	}
	a.Subject = &Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Raw))}
	return c.Push(ctx, repo, a)
}

func (c *Client) putBlob(ctx context.Context, r *registry, repo string, data []byte) error {
	digest := Digest(data)
	what := "push blob " + repo + " " + digest
	resp, err := c.send(ctx, r, request{method: http.MethodHead, url: r.url(repo, "blobs", digest), scope: "push", repo: repo})
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	drain(resp)
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	resp, err = c.send(ctx, r, request{method: http.MethodPost, url: r.url(repo, "blobs", "uploads") + "/", scope: "push", repo: repo, body: []byte{}})
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusAccepted {
		return statusError(what, resp)
	}
	loc, err := url.Parse(resp.Header.Get("Location"))
	if err != nil || resp.Header.Get("Location") == "" {
		return fmt.Errorf("%s: the registry gave no upload location", what)
	}
	u := resp.Request.URL.ResolveReference(loc)
	q := u.Query()
	q.Set("digest", digest)
	u.RawQuery = q.Encode()
	put, err := c.send(ctx, r, request{method: http.MethodPut, url: u.String(), header: http.Header{"Content-Type": {"application/octet-stream"}}, body: data, scope: "push", repo: repo})
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer drain(put)
	if put.StatusCode != http.StatusCreated {
		return statusError(what, put)
	}
	return nil
}

func (c *Client) putManifest(ctx context.Context, r *registry, repo, at, mediaType string, raw []byte) (http.Header, error) {
	what := "push manifest " + repo + " " + at
	resp, err := c.send(ctx, r, request{method: http.MethodPut, url: r.url(repo, "manifests", at), header: http.Header{"Content-Type": {mediaType}}, body: raw, scope: "push", repo: repo})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusCreated {
		return nil, statusError(what, resp)
	}
	return resp.Header, nil
}

// fallbackTries bounds how often the fallback index is written when another
// writer takes our entry away again: the tag has no compare-and-swap.
const fallbackTries = 4

// extendFallback adds d to the index under subject's fallback tag. Two clients
// that do so at once can lose an entry, as the specification says; the one that
// sees its own missing writes again.
func (c *Client) extendFallback(ctx context.Context, r *registry, repo, subject string, d Descriptor) error {
	c.fallbackMu.Lock()
	defer c.fallbackMu.Unlock()
	for range fallbackTries {
		m, err := c.fallback(ctx, r, repo, subject)
		if err != nil {
			return err
		}
		index := Manifest{SchemaVersion: 2, MediaType: TypeIndex, Manifests: []Descriptor{}}
		if m != nil {
			if slices.ContainsFunc(m.Manifests, func(e Descriptor) bool { return e.Digest == d.Digest }) {
				return nil
			}
			index.Manifests, index.Annotations = m.Manifests, m.Annotations
		}
		if index.Manifests = append(index.Manifests, d); len(index.Manifests) > maxReferrers {
			return fmt.Errorf("referrers of %s: %w: over %d", subject, ErrTooLarge, maxReferrers)
		}
		raw, err := json.Marshal(struct {
			SchemaVersion int               `json:"schemaVersion"`
			MediaType     string            `json:"mediaType"`
			Manifests     []Descriptor      `json:"manifests"`
			Annotations   map[string]string `json:"annotations,omitempty"`
		}{index.SchemaVersion, index.MediaType, index.Manifests, index.Annotations})
		if err != nil {
			return fmt.Errorf("referrers of %s: %w", subject, err)
		}
		if _, err := c.putManifest(ctx, r, repo, fallbackTag(subject), TypeIndex, raw); err != nil {
			return err
		}
	}
	return fmt.Errorf("referrers of %s: other writers keep replacing the tag %s: try again", subject, fallbackTag(subject))
}
