package prepared

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"os"
	"path/filepath"
	"testing"
)

const quickstart = "../examples/quickstart/policy"

// entry is one entry of a hand-made archive.
type entry struct {
	name string
	body string
	kind byte // default: a regular file
	link string
}

const goodManifest = `{"revision":"r1","roots":["autonomy"],"rego_version":1,"metadata":{"autonomy":{"name":"p","version":"1.0.0"}}}`

const allowAll = "package autonomy\n\nallow := true\n"

// archive packs entries as they are, hostile or not.
func archive(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	zw.Write(tarball(t, entries...))
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func tarball(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range entries {
		if e.kind == 0 {
			e.kind = tar.TypeReg
		}
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Linkname: e.link, Mode: 0o644, Size: int64(len(e.body))}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// policyBundle is a bundle of one module and a version.
func policyBundle(t testing.TB, version, rego string, more ...entry) *Bundle {
	t.Helper()
	manifest := `{"revision":"r1","roots":[""],"rego_version":1,"metadata":{"autonomy":{"name":"p","version":"` + version + `"}}}`
	b, err := ReadBundle(archive(t, append([]entry{{name: ".manifest", body: manifest}, {name: "p.rego", body: rego}}, more...)...), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func compiled(t testing.TB, b *Bundle) *Program {
	t.Helper()
	p, err := Compile(context.Background(), b)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func program(t testing.TB, rego string, more ...entry) *Program {
	t.Helper()
	return compiled(t, policyBundle(t, "1.0.0", rego, more...))
}

// policyDir writes files to a new directory.
func policyDir(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pol")
	for name, body := range files {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// exampleCalls are the sample calls of a policy directory.
func exampleCalls(dir string) (names []string, inputs [][]byte, err error) {
	src, err := loadDir(dir, DefaultLimits)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range src.examples {
		names, inputs = append(names, e.name), append(inputs, e.data)
	}
	return names, inputs, nil
}

func newGzip(w *bytes.Buffer) *gzip.Writer { return gzip.NewWriter(w) }
