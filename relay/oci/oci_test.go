package oci

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// The distribution specification's own words, as oracles.
var (
	nameSpec = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagSpec  = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

func FuzzParseName(f *testing.F) {
	for _, s := range []string{"a", "team/agent", "a..b", "a__b", "a___b", "a-_b", "a---b/c.d", "/a", "a/", "a//b", "A", "a/../b", "é", "a.", "_a", strings.Repeat("a/", 130) + "a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		_, err := ParseName(s)
		if want := nameSpec.MatchString(s) && len(s) <= MaxNameLength && !strings.HasSuffix(s, "\n"); (err == nil) != want {
			t.Errorf("%q: %v, the specification says %v", s, err, want)
		}
		if err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v does not wrap ErrInvalid", s, err)
		}
		if ParseTag(s) != tagSpec.MatchString(s) {
			t.Errorf("tag %q: %v", s, ParseTag(s))
		}
	})
}

func TestParseDigest(t *testing.T) {
	good := "sha256:" + strings.Repeat("0a", 32)
	if d, err := ParseDigest(good); err != nil || string(d) != good || d.Hex() != good[7:] {
		t.Errorf("%s: %v", good, err)
	}
	for _, s := range []string{"", "sha256:", good + "0", good[:len(good)-1], strings.ToUpper(good), "sha512:" + strings.Repeat("0", 128), "sha256:" + strings.Repeat("0g", 32), " " + good, good + "\n", strings.Repeat("0", 64)} {
		if _, err := ParseDigest(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

const hex64 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func desc(mediaType string, size int64) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":"sha256:%s","size":%d}`, mediaType, hex64, size)
}

func TestParseManifest(t *testing.T) {
	layer, child := desc("application/x", 7), desc(TypeOCIManifest, 7)
	manifest := func(extra string) string {
		return `{"schemaVersion":2,"mediaType":"` + TypeOCIManifest + `","config":` + desc("application/vnd.oci.empty.v1+json", 2) + `,"layers":[]` + extra + `}`
	}
	index := `{"schemaVersion":2,"mediaType":"` + TypeOCIIndex + `","manifests":[` + child + `]}`
	bad := []struct{ name, data, contentType, want string }{
		{"empty", "", "", "ends where a value is due"},
		{"truncated", manifest("")[:40], "", "ends"},
		{"not an object", "[]", "", "want an object"},
		{"duplicate key", manifest(`,"layers":[]`), "", "duplicate key"},
		{"key in another case", manifest(`,"Subject":` + layer), "", "case-sensitive"},
		{"invalid UTF-8", manifest(",\"x\":\"\xff\""), "", "invalid UTF-8"},
		{"trailing data", manifest("") + "{}", "", "after the value"},
		{"wrong type", `{"schemaVersion":"2"}`, "", "schemaVersion"},
		{"schema 1", `{"schemaVersion":1}`, "", "want 2"},
		{"both an index and a manifest", manifest(`,"manifests":[]`), "", "also an index"},
		{"index where a manifest is due", index, TypeOCIManifest, "the registry says"},
		{"manifest where an index is due", manifest(""), TypeOCIIndex, "the registry says"},
		{"unnamed index as manifest", `{"schemaVersion":2,"manifests":[]}`, TypeOCIManifest, "lacks config"},
		{"unnamed manifest as index", `{"schemaVersion":2,"config":` + layer + `,"layers":[]}`, TypeOCIIndex, "no manifests"},
		{"unnamed Docker", `{"schemaVersion":2,"config":` + layer + `,"layers":[]}`, TypeDockerManifest, "must say so itself"},
		{"other media type", `{"schemaVersion":2,"mediaType":"text/html"}`, "", "want an OCI or Docker"},
		{"no layers", `{"schemaVersion":2,"config":` + layer + `}`, "", "lacks config or layers"},
		{"negative size", `{"schemaVersion":2,"config":` + desc("a/b", -1) + `,"layers":[]}`, "", "has size -1"},
		{"huge size", `{"schemaVersion":2,"config":` + desc("a/b", MaxBlobBytes+1) + `,"layers":[]}`, "", "has size"},
		{"bad digest", `{"schemaVersion":2,"config":{"mediaType":"a/b","digest":"sha256:xyz","size":1},"layers":[]}`, "", "digest"},
		{"two sizes", `{"schemaVersion":2,"config":` + desc("a/b", 1) + `,"layers":[` + desc("a/b", 2) + `]}`, "", "with size 1 and with size 2"},
		{"no media type", `{"schemaVersion":2,"config":` + desc("", 1) + `,"layers":[]}`, "", "media type of 0 bytes"},
		{"index of blobs", `{"schemaVersion":2,"manifests":[` + layer + `]}`, "", "want a manifest or an index"},
		{"index of a huge manifest", `{"schemaVersion":2,"manifests":[` + desc(TypeOCIManifest, MaxManifestBytes+1) + `]}`, "", "the limit is"},
		{"too many", `{"schemaVersion":2,"manifests":[` + strings.Repeat(child+",", MaxDescriptors) + child + `]}`, "", "the limit is"},
		{"too large", strings.Repeat(" ", MaxManifestBytes+1), "", "the limit is"},
	}
	for _, tt := range bad {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := ParseManifest([]byte(tt.data), tt.contentType); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
	m, err := ParseManifest([]byte(manifest(`,"artifactType":"a/t","subject":`+child+`,"annotations":{"k":"v"},"unknown":1`)), TypeOCIManifest)
	if err != nil || m.ArtifactType != "a/t" || m.Subject == nil || m.Annotations["k"] != "v" || len(m.Blobs) != 1 {
		t.Errorf("%+v, %v", m, err)
	}
	if m, err := ParseManifest([]byte(manifest("")), ""); err != nil || m.ArtifactType != "application/vnd.oci.empty.v1+json" {
		t.Errorf("artifact type from config: %+v, %v", m, err)
	}
	if m, err := ParseManifest([]byte(index), TypeOCIIndex); err != nil || len(m.Children) != 1 {
		t.Errorf("index: %+v, %v", m, err)
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"config":`+desc("a/b", 1)+`,"layers":[`+desc("a/b", 1)+`]}`), TypeOCIManifest)
	f.Add([]byte(`{"schemaVersion":2,"manifests":[`+desc(TypeOCIIndex, 1)+`]}`), "")
	f.Fuzz(func(t *testing.T, data []byte, contentType string) {
		m, err := ParseManifest(data, contentType)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%v does not wrap ErrInvalid", err)
			}
			return
		}
		if !IsManifest(m.MediaType) || contentType != "" && m.MediaType != contentType {
			t.Errorf("media type %q from %q", m.MediaType, contentType)
		}
		if IsIndex(m.MediaType) != (m.Blobs == nil) {
			t.Errorf("%s with %d blobs and %d children", m.MediaType, len(m.Blobs), len(m.Children))
		}
		for _, d := range append(m.Children, m.Blobs...) {
			if _, err := ParseDigest(string(d.Digest)); err != nil || d.Size < 0 || d.Size > MaxBlobBytes {
				t.Errorf("let through %+v", d)
			}
		}
	})
}
