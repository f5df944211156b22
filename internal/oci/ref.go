package oci

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Media types this project uses (contract.md) and those of OCI.
const (
	TypeManifest = "application/vnd.oci.image.manifest.v1+json"
	TypeIndex    = "application/vnd.oci.image.index.v1+json"
	TypeEmpty    = "application/vnd.oci.empty.v1+json"
	TypeLock     = "application/vnd.autonomyops.lock.v0+json"
	TypePolicy   = "application/vnd.autonomyops.policy.v0.tar+gzip"
	TypeRelease  = "application/vnd.autonomyops.release.v0+json"
	TypeBundle   = "application/vnd.dev.sigstore.bundle.v0.3+json"
)

var (
	// ErrReference is wrapped by errors about a reference's form.
	ErrReference = errors.New("malformed reference")
	// ErrNotFound: the registry says there is no such thing.
	ErrNotFound = errors.New("not found")
	// ErrUnauthorized: the registry wants other credentials.
	ErrUnauthorized = errors.New("not authorized")
	// ErrDigest: the bytes are not the ones their digest names.
	ErrDigest = errors.New("digest mismatch")
	// ErrTooLarge: more bytes than the limit.
	ErrTooLarge = errors.New("too large")
	// ErrMediaType: an index where a manifest is due, a layer of another type,
	// a manifest that says two things.
	ErrMediaType = errors.New("unexpected media type")
	// ErrHost: the request would go where it may not.
	ErrHost = errors.New("host not allowed")
)

// Ref is a parsed reference. Tag and Digest may both be empty, or both set.
type Ref struct {
	Registry   string // host or host:port
	Repository string
	Tag        string
	Digest     string // sha256:…
}

var (
	reHost   = regexp.MustCompile(`^(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?$`)
	reRepo   = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	reTag    = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
	reDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

// maxRef bounds a reference, in bytes.
const maxRef = 1024

// ParseRef parses registry/repository[:tag][@sha256:…]. The registry must be
// written out.
func ParseRef(s string) (Ref, error) {
	var r Ref
	bad := func(why string) (Ref, error) {
		return Ref{}, fmt.Errorf("%w: %.80q: %s; want registry/repository[:tag][@sha256:…]", ErrReference, s, why)
	}
	if len(s) > maxRef {
		return bad(fmt.Sprintf("over %d bytes", maxRef))
	}
	rest, digest, hasDigest := strings.Cut(s, "@")
	if hasDigest {
		if !reDigest.MatchString(digest) {
			return bad("the digest is not sha256: and 64 hex digits")
		}
		r.Digest = digest
	}
	host, path, ok := strings.Cut(rest, "/")
	if !ok {
		return bad("no registry")
	}
	// Docker's reading of "a/b" is a repository on its own hub. Without a dot, a
	// port or localhost the first part is most likely meant so.
	if !reHost.MatchString(host) || !strings.ContainsAny(host, ".:") && host != "localhost" {
		return bad("the registry is not a host name with a dot, a port or localhost")
	}
	r.Registry = host
	if i := strings.LastIndexByte(path, ':'); i >= 0 {
		path, r.Tag = path[:i], path[i+1:]
		if !reTag.MatchString(r.Tag) {
			return bad("malformed tag")
		}
	}
	if !reRepo.MatchString(path) {
		return bad("malformed repository")
	}
	r.Repository = path
	return r, nil
}

// Name is registry/repository.
func (r Ref) Name() string { return r.Registry + "/" + r.Repository }

func (r Ref) String() string {
	s := r.Name()
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest
	}
	return s
}

// Digest is "sha256:" and the hex SHA-256 of data.
func Digest(data []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(data)) }
