// Package oci is the relay's vocabulary: digests, repository names, and the
// reading of manifests and indexes of the OCI image and distribution
// specifications. It reads only what the relay needs: which other content a
// manifest names. It performs no I/O.
//
// Everything here comes from the network, so every reader is strict: one digest
// algorithm (sha256), names as the distribution specification writes them, JSON
// with one reading only, bounded counts and sizes. Only the relay imports it.
package oci

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// Limits on what one manifest may hold.
const (
	MaxManifestBytes  = 4 << 20 // as the distribution specification advises
	MaxDescriptors    = 4096    // children of one manifest or index
	MaxBlobBytes      = 1 << 44 // 16 TiB: above it a size is a mistake or an attack
	MaxAnnotations    = 64      // kept per manifest for the referrers list
	MaxNameLength     = 255
	MaxMediaTypeBytes = 255
)

// Media types the relay reads as manifests.
const (
	TypeOCIManifest    = "application/vnd.oci.image.manifest.v1+json"
	TypeOCIIndex       = "application/vnd.oci.image.index.v1+json"
	TypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	TypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// ErrInvalid is wrapped by every error of this package.
var ErrInvalid = errors.New("invalid OCI content")

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// Digest is "sha256:" and 64 lower-case hex digits, always valid once parsed.
type Digest string

const digestPrefix = "sha256:"

// ParseDigest accepts exactly sha256:<64 lower-case hex digits>.
func ParseDigest(s string) (Digest, error) {
	hexed, ok := strings.CutPrefix(s, digestPrefix)
	if !ok || len(hexed) != 2*sha256.Size {
		return "", invalid("digest %.80q: want sha256: and 64 hex digits", s)
	}
	for i := range len(hexed) {
		if c := hexed[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return "", invalid("digest %.80q: want lower-case hex digits", s)
		}
	}
	return Digest(s), nil
}

// DigestOf is the digest of data.
func DigestOf(data []byte) Digest {
	sum := sha256.Sum256(data)
	return FromSum(sum[:])
}

// FromSum makes a Digest of a SHA-256 sum.
func FromSum(sum []byte) Digest { return Digest(digestPrefix + hex.EncodeToString(sum)) }

// Hex is the digest without its algorithm.
func (d Digest) Hex() string { return strings.TrimPrefix(string(d), digestPrefix) }

// ParseName checks a repository name: path components of lower-case letters and
// digits, joined inside by one '.', one or two '_' or any number of '-'.
func ParseName(s string) (string, error) {
	if s == "" || len(s) > MaxNameLength {
		return "", invalid("repository name of %d bytes: want 1 to %d", len(s), MaxNameLength)
	}
	for part := range strings.SplitSeq(s, "/") {
		if !component(part) {
			return "", invalid("repository name %.80q: want lower-case letters and digits, separated by '.', '_', '__', '-' or '/'", s)
		}
	}
	return s, nil
}

func component(s string) bool {
	alnum := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
	for i := 0; i < len(s); {
		if alnum(s[i]) {
			i++
			continue
		}
		start := i
		for i < len(s) && s[i] == s[start] {
			i++
		}
		run := i - start
		if start == 0 || i == len(s) || !alnum(s[i]) {
			return false
		}
		switch s[start] {
		case '.':
			if run > 1 {
				return false
			}
		case '_':
			if run > 2 {
				return false
			}
		case '-':
		default:
			return false
		}
	}
	return s != ""
}

// ParseTag reports whether s can be a tag: [a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}.
func ParseTag(s string) bool {
	for i := range len(s) {
		c := s[i]
		word := c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !word && (i == 0 || c != '.' && c != '-') {
			return false
		}
	}
	return s != "" && len(s) <= 128
}

// Descriptor names content.
type Descriptor struct {
	MediaType    string            `json:"mediaType"`
	Digest       Digest            `json:"digest"`
	Size         int64             `json:"size"`
	ArtifactType string            `json:"artifactType,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
}

// Manifest is what the relay knows of a manifest or an index.
type Manifest struct {
	MediaType    string
	ArtifactType string // as the referrers API reports it: artifactType, else the config's media type
	Annotations  map[string]string
	Subject      *Descriptor
	Children     []Descriptor // manifests of an index, in its order
	Blobs        []Descriptor // config, then layers, in order; each digest once
}

// IsIndex reports whether a media type is one of the two index types.
func IsIndex(mediaType string) bool { return mediaType == TypeOCIIndex || mediaType == TypeDockerList }

// IsManifest reports whether a media type is a manifest's or an index's.
func IsManifest(mediaType string) bool {
	return IsIndex(mediaType) || mediaType == TypeOCIManifest || mediaType == TypeDockerManifest
}

// ParseManifest reads a manifest or an index. contentType is what the registry
// said it is, "" if it said nothing; a document that says otherwise about
// itself, or that could be read as both, is refused: two readers would see two
// things under one digest.
func ParseManifest(data []byte, contentType string) (*Manifest, error) {
	if len(data) > MaxManifestBytes {
		return nil, invalid("manifest of %d bytes: the limit is %d", len(data), MaxManifestBytes)
	}
	if err := strictjson.CheckObject(data); err != nil {
		return nil, invalid("manifest: %v", err)
	}
	var version int
	var own string
	var artifact string
	var annotations map[string]string
	var subject, config *descriptor
	var layers, manifests *[]descriptor
	err := object(data, map[string]any{
		"schemaVersion": &version, "mediaType": &own, "artifactType": &artifact, "annotations": &annotations,
		"subject": &subject, "config": &config, "layers": &layers, "manifests": &manifests,
	})
	if err != nil {
		return nil, invalid("manifest: %v", err)
	}
	switch {
	case version != 2:
		return nil, invalid("manifest with schemaVersion %d: want 2", version)
	case manifests != nil && (config != nil || layers != nil):
		return nil, invalid("manifest that is also an index: it has manifests, and config or layers")
	case own != "" && contentType != "" && own != contentType:
		return nil, invalid("manifest says it is %.80q, the registry says %.80q", own, contentType)
	}
	m := &Manifest{MediaType: own, ArtifactType: artifact}
	if m.MediaType == "" {
		m.MediaType = contentType
	}
	if m.MediaType == "" {
		m.MediaType = TypeOCIManifest
		if manifests != nil {
			m.MediaType = TypeOCIIndex
		}
	}
	switch {
	case own == "" && (m.MediaType == TypeDockerManifest || m.MediaType == TypeDockerList):
		return nil, invalid("the registry says %s, which must say so itself in mediaType", m.MediaType)
	case !IsManifest(m.MediaType):
		return nil, invalid("media type %.80q: want an OCI or Docker v2 manifest or index", m.MediaType)
	case IsIndex(m.MediaType) && manifests == nil:
		return nil, invalid("an index is due, and the document has no manifests")
	case !IsIndex(m.MediaType) && (config == nil || layers == nil):
		return nil, invalid("a manifest is due, and the document lacks config or layers")
	}
	if len(annotations) > 0 {
		// Kept for the referrers list only; the first ones by key when there are very many.
		m.Annotations = map[string]string{}
		for _, k := range slices.Sorted(maps.Keys(annotations)) {
			if len(m.Annotations) < MaxAnnotations {
				m.Annotations[k] = annotations[k]
			}
		}
	}
	if subject != nil {
		d, err := subject.check("subject")
		if err != nil {
			return nil, err
		}
		m.Subject = &d
	}
	if manifests != nil {
		if m.Children, err = list("manifests", *manifests); err != nil {
			return nil, err
		}
		for _, d := range m.Children {
			if !IsManifest(d.MediaType) {
				return nil, invalid("index names %s of type %.80q: want a manifest or an index", d.Digest, d.MediaType)
			}
			if d.Size > MaxManifestBytes {
				return nil, invalid("index names a manifest of %d bytes: the limit is %d", d.Size, MaxManifestBytes)
			}
		}
		return m, nil
	}
	if m.Blobs, err = list("config and layers", append([]descriptor{*config}, *layers...)); err != nil {
		return nil, err
	}
	if m.ArtifactType == "" {
		m.ArtifactType = config.MediaType
	}
	return m, nil
}

// descriptor is a Descriptor as it comes in: known keys exactly, unknown ones ignored.
type descriptor struct {
	MediaType string
	Digest    string
	Size      int64
}

func (d *descriptor) UnmarshalJSON(data []byte) error {
	return object(data, map[string]any{"mediaType": &d.MediaType, "digest": &d.Digest, "size": &d.Size})
}

func (d *descriptor) check(where string) (Descriptor, error) {
	digest, err := ParseDigest(d.Digest)
	switch {
	case err != nil:
		return Descriptor{}, fmt.Errorf("%s: %w", where, err)
	case d.Size < 0 || d.Size > MaxBlobBytes:
		return Descriptor{}, invalid("%s: %s has size %d: want 0 to %d", where, digest, d.Size, int64(MaxBlobBytes))
	case d.MediaType == "" || len(d.MediaType) > MaxMediaTypeBytes:
		return Descriptor{}, invalid("%s: %s has a media type of %d bytes: want 1 to %d", where, digest, len(d.MediaType), MaxMediaTypeBytes)
	}
	return Descriptor{MediaType: d.MediaType, Digest: digest, Size: d.Size}, nil
}

// list checks descriptors and drops repetitions; one digest with two sizes is refused.
func list(where string, in []descriptor) ([]Descriptor, error) {
	if len(in) > MaxDescriptors {
		return nil, invalid("%s: %d descriptors, the limit is %d", where, len(in), MaxDescriptors)
	}
	sizes := map[Digest]int64{}
	out := make([]Descriptor, 0, len(in))
	for i := range in {
		d, err := in[i].check(where)
		if err != nil {
			return nil, err
		}
		if size, ok := sizes[d.Digest]; ok {
			if size != d.Size {
				return nil, invalid("%s: %s is named with size %d and with size %d", where, d.Digest, size, d.Size)
			}
			continue
		}
		sizes[d.Digest] = d.Size
		out = append(out, d)
	}
	return out, nil
}

// object decodes the known keys of a JSON object. encoding/json would also take
// a key in another case; here such a key is an error, as the next reader of the
// same bytes may not take it. Other keys are ignored: annotations, platforms
// and later additions are not the relay's concern.
func object(data []byte, known map[string]any) error {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(data, &raw); err != nil {
		return fmt.Errorf("want an object: %w", err)
	}
	names := slices.Sorted(maps.Keys(known))
	for _, k := range slices.Sorted(maps.Keys(raw)) {
		dst, ok := known[k]
		if !ok {
			if i := slices.IndexFunc(names, func(n string) bool { return strings.EqualFold(n, k) }); i >= 0 {
				return fmt.Errorf("key %q: keys are case-sensitive, want %q", k, names[i])
			}
			continue
		}
		if err := json.Unmarshal(raw[k], dst); err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
	}
	return nil
}
