package oci

import (
	"context"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"strings"
)

// Limits of a referrers listing.
const (
	maxReferrers     = 1024
	maxReferrerPages = 16
	maxUnsure        = 64 // manifests fetched because a listing does not say their type
)

// Referrers returns the manifests that refer to digest in repo and are of the
// artifact type, "" for all. It asks the API and, where there is none, reads the
// fallback tag. The registry is not asked to filter and a listing's type is not
// believed when it is missing or the empty type: the manifest is read then. An
// empty list is no error. A fallback tag that is not an index is ErrMediaType.
func (c *Client) Referrers(ctx context.Context, repo, digest, artifactType string) ([]Descriptor, error) {
	r, path, err := c.repo(repo)
	if err != nil {
		return nil, err
	}
	if err := checkDigestForm(digest); err != nil {
		return nil, err
	}
	ctx, cancel := c.bounded(ctx)
	defer cancel()
	all, err := c.referrers(ctx, r, path, digest)
	if err != nil {
		return nil, err
	}
	out := []Descriptor{}
	unsure := 0
	for _, d := range all {
		if d.ArtifactType == "" || d.ArtifactType == TypeEmpty {
			if unsure++; unsure > maxUnsure {
				if artifactType == "" {
					out = append(out, d)
					continue
				}
				return nil, fmt.Errorf("referrers of %s: %w: over %d without an artifact type", digest, ErrTooLarge, maxUnsure)
			}
			m, err := c.manifest(ctx, r, path, d.Digest, d.Digest)
			if errors.Is(err, ErrNotFound) {
				continue // deleted since it was listed
			} else if err != nil {
				return nil, err
			}
			d.ArtifactType = m.Type()
		}
		if artifactType == "" || d.ArtifactType == artifactType {
			out = append(out, d)
		}
	}
	return out, nil
}

func (c *Client) referrers(ctx context.Context, r *registry, repo, digest string) ([]Descriptor, error) {
	var all []Descriptor
	next := r.url(repo, "referrers", digest)
	for page := 0; next != ""; page++ {
		if page == maxReferrerPages {
			return nil, fmt.Errorf("referrers of %s: %w: over %d pages", digest, ErrTooLarge, maxReferrerPages)
		}
		m, link, err := c.referrersPage(ctx, r, repo, next, digest)
		if err != nil {
			return nil, err
		}
		if m == nil {
			if page > 0 {
				return nil, fmt.Errorf("referrers of %s: page %d is missing", digest, page+1)
			}
			m, err = c.fallback(ctx, r, repo, digest)
			if err != nil || m == nil {
				return nil, err
			}
		}
		for _, d := range m.Manifests {
			if err := checkDigestForm(d.Digest); err != nil {
				return nil, fmt.Errorf("referrers of %s: %w", digest, err)
			}
		}
		if all = append(all, m.Manifests...); len(all) > maxReferrers {
			return nil, fmt.Errorf("referrers of %s: %w: over %d", digest, ErrTooLarge, maxReferrers)
		}
		next = link
	}
	return all, nil
}

// referrersPage returns one page and the next one's URL; nil when the registry
// has no referrers API.
func (c *Client) referrersPage(ctx context.Context, r *registry, repo, at, digest string) (*Manifest, string, error) {
	what := "referrers of " + repo + " " + digest
	resp, err := c.send(ctx, r, request{method: http.MethodGet, url: at, header: http.Header{"Accept": {TypeIndex}}, scope: "pull", repo: repo})
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", what, err)
	}
	defer drain(resp)
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound, http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotAcceptable:
		return nil, "", nil
	default:
		return nil, "", statusError(what, resp)
	}
	if t, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || t != TypeIndex {
		return nil, "", nil // a catch-all page, not the API
	}
	data, err := read(what, resp, c.opts.MaxManifest, "")
	if err != nil {
		return nil, "", err
	}
	m, err := ParseManifest(data, TypeIndex)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", what, err)
	}
	next, err := nextPage(resp)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", what, err)
	}
	return m, next, nil
}

// nextPage reads the Link header; the next page must be on the same host.
func nextPage(resp *http.Response) (string, error) {
	link := resp.Header.Get("Link")
	if link == "" {
		return "", nil
	}
	target, rel, ok := strings.Cut(strings.TrimPrefix(link, "<"), ">")
	if !ok || !strings.Contains(rel, `rel="next"`) {
		return "", nil
	}
	u, err := url.Parse(target)
	if err != nil {
		return "", fmt.Errorf("malformed Link header: %w", err)
	}
	next := resp.Request.URL.ResolveReference(u)
	if next.Host != resp.Request.URL.Host {
		return "", fmt.Errorf("%w: the next page is on %s", ErrHost, next.Host)
	}
	return next.String(), nil
}

func fallbackTag(digest string) string { return strings.Replace(digest, ":", "-", 1) }

// fallback reads the fallback tag: nil when there is none.
func (c *Client) fallback(ctx context.Context, r *registry, repo, digest string) (*Manifest, error) {
	m, err := c.manifest(ctx, r, repo, fallbackTag(digest), "")
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if !m.IsIndex() {
		return nil, fmt.Errorf("referrers of %s: %w: the tag %s was overwritten by an image manifest, want an index", digest, ErrMediaType, fallbackTag(digest))
	}
	return m, nil
}
