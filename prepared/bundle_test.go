package prepared

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestReadBundle(t *testing.T) {
	raw := archive(t,
		entry{name: "./", kind: tar.TypeDir},
		entry{name: "/.manifest", body: strings.Replace(goodManifest, `"metadata":{`, `"metadata":{"other":{"a":1},`, 1)},
		entry{name: "./autonomy/p.rego", body: "package autonomy\n\ndecision := {\"allow\": data.autonomy.lists.open}\n"},
		entry{name: "autonomy/lists/data.json", body: `{"open": true}`})
	b, err := ReadBundle(raw, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if b.Ref() != "p@1.0.0" || b.Revision != "r1" || b.Entrypoint != "autonomy/decision" || b.Digest != Digest(raw) || !bytes.Equal(b.Raw, raw) {
		t.Errorf("have %+v", b)
	}
	if d, err := compiled(t, b).Eval(t.Context(), []byte(`{}`)); err != nil || !d.Allow {
		t.Errorf("decision %+v, %v", d, err)
	}
}

// TestReadBundleRefuses holds what OPA's own reader lets through, and more.
func TestReadBundleRefuses(t *testing.T) {
	manifest := entry{name: ".manifest", body: goodManifest}
	rego := entry{name: "p.rego", body: allowAll}
	good := archive(t, manifest, rego)
	with := func(old, new string) []byte {
		t.Helper()
		m := strings.Replace(goodManifest, old, new, 1)
		if m == goodManifest {
			t.Fatalf("%q is not in the manifest", old)
		}
		return archive(t, entry{name: ".manifest", body: m}, rego)
	}
	plain := tarball(t, manifest, rego)
	repack := func(tarBytes []byte) []byte {
		var buf bytes.Buffer
		zw := newGzip(&buf)
		zw.Write(tarBytes)
		zw.Close()
		return buf.Bytes()
	}
	tests := []struct {
		name string
		raw  []byte
		want string
	}{
		{"nothing", nil, "want a gzip-compressed tar archive: EOF"},
		{"text", []byte("package autonomy"), "want a gzip-compressed tar archive: gzip: invalid header"},
		{"tar without gzip", plain, "want a gzip-compressed tar archive: gzip: invalid header"},
		{"empty archive", archive(t), "no .manifest at the top of the archive"},
		{"no manifest", archive(t, rego), "no .manifest at the top of the archive"},
		{"manifest below", archive(t, entry{name: "a/.manifest", body: goodManifest}, rego), `"a/.manifest" does not belong in a bundle`},
		{"no rego", archive(t, manifest), "no .rego file in it"},
		{"truncated", good[:len(good)-9], "unexpected EOF"},
		{"truncated trailer", good[:len(good)-1], "unexpected EOF"},
		{"trailing garbage", append(bytes.Clone(good), 0), "1 bytes after the end of the archive"},
		{"second member", append(bytes.Clone(good), good...), "bytes after the end of the archive"},
		{"data after the tar end", repack(append(bytes.Clone(plain), []byte("tail")...)), "data after the end of the tar archive"},
		{"a second tar", repack(append(bytes.Clone(plain), tarball(t, entry{name: "q.rego", body: allowAll})...)), "data after the end of the tar archive"},
		{"padding without end", repack(append(bytes.Clone(plain), make([]byte, 1<<17)...)), "of padding after the tar archive"},
		{"parent path", archive(t, manifest, rego, entry{name: "../p.rego", body: allowAll}), `path "../p.rego" in the archive`},
		{"parent inside", archive(t, manifest, rego, entry{name: "a/../../p.rego", body: allowAll}), `path "a/../../p.rego" in the archive`},
		{"dot inside", archive(t, manifest, rego, entry{name: "a/./q.rego", body: allowAll}), `path "a/./q.rego" in the archive`},
		{"two slashes", archive(t, manifest, rego, entry{name: "//etc/q.rego", body: allowAll}), `path "//etc/q.rego" in the archive`},
		{"backslash", archive(t, manifest, rego, entry{name: `..\q.rego`, body: allowAll}), "in the archive: want a clean relative path"},
		{"long path", archive(t, manifest, rego, entry{name: strings.Repeat("a/", 200) + "q.rego", body: allowAll}), "a path of 406 bytes"},
		{"symbolic link", archive(t, manifest, rego, entry{name: "q.rego", kind: tar.TypeSymlink, link: "/etc/passwd"}), `"q.rego" is a symbolic link`},
		{"hard link", archive(t, manifest, rego, entry{name: "q.rego", kind: tar.TypeLink, link: "p.rego"}), `"q.rego" is a hard link`},
		{"device", archive(t, manifest, rego, entry{name: "q.rego", kind: tar.TypeChar}), `"q.rego" is a device`},
		{"fifo", archive(t, manifest, rego, entry{name: "q.rego", kind: tar.TypeFifo}), `"q.rego" is a fifo`},
		{"duplicate", archive(t, manifest, rego, rego), `"p.rego" is in the archive twice`},
		{"duplicate by another name", archive(t, manifest, rego, entry{name: "/p.rego", body: allowAll}), `"p.rego" is in the archive twice`},
		{"wasm", archive(t, manifest, rego, entry{name: "policy.wasm", body: "x"}), `"policy.wasm" does not belong in a bundle`},
		{"patch", archive(t, manifest, rego, entry{name: "patch.json", body: "{}"}), `"patch.json" does not belong in a bundle`},
		{"yaml data", archive(t, manifest, rego, entry{name: "data.yaml", body: "a: 1"}), `"data.yaml" does not belong in a bundle`},
		{"opa signatures", archive(t, manifest, rego, entry{name: ".signatures.json", body: "{}"}), "OPA bundle signatures are not used here"},
		{"data with duplicate keys", archive(t, manifest, rego, entry{name: "autonomy/data.json", body: `{"a":1,"a":2}`}), `duplicate key "a"`},
		{"data that is a list", archive(t, manifest, rego, entry{name: "autonomy/data.json", body: `[1]`}), "autonomy/data.json: byte 0: want an object"},
		{"data outside the roots", archive(t, manifest, rego, entry{name: "data.json", body: `{"elsewhere":1}`}), "do not permit data at path '/elsewhere'"},
		{"rego outside the roots", archive(t, manifest, entry{name: "p.rego", body: "package other\n"}), "do not permit 'package other'"},
		{"rego syntax", archive(t, manifest, entry{name: "p.rego", body: "package autonomy\nallow {"}), "rego_parse_error"},
		{"rego v0", archive(t, manifest, entry{name: "p.rego", body: "package autonomy\nallow { true }"}), "rego_parse_error"},
		{"too many entries", archive(t, append([]entry{manifest, rego}, make1025()...)...), "over 1024 entries"},
		{"bomb by ratio", archive(t, manifest, rego, entry{name: "autonomy/data.json", body: `{"a":"` + strings.Repeat("a", 8<<20) + `"}`}), "over 200 times its size"},
		{"bomb by total", archive(t, manifest, rego, entry{name: "autonomy/data.json", body: `{"a":"` + strings.Repeat("a", 33<<20) + `"}`}), "the archive unpacks to over 33554432 bytes"},

		{"manifest of another type", with(goodManifest, "[]"), "want"},
		{"manifest with duplicate keys", with(`"revision":"r1"`, `"revision":"r1","revision":"r2"`), `duplicate key "revision"`},
		{"manifest with unknown key", with(`"revision":"r1"`, `"revision":"r1","wasm":[]`), `unknown key "wasm"`},
		{"manifest with other case", with(`"revision"`, `"Revision"`), `write "revision"`},
		{"manifest with trailing data", with(`}}}`, `}}} {}`), "data after the value"},
		{"manifest with invalid UTF-8", with(`"r1"`, "\"\xff\""), "invalid UTF-8"},
		{"no roots", with(`"roots":["autonomy"]`, `"roots":[]`), "roots is missing"},
		{"rego version 0", with(`"rego_version":1`, `"rego_version":0`), "rego_version must be 1 or 2"},
		{"no rego version", with(`"rego_version":1,`, ``), "rego_version must be 1 or 2"},
		{"no autonomy metadata", with(`"autonomy":{"name":"p","version":"1.0.0"}`, ``), "metadata.autonomy with name and version is missing"},
		{"unknown autonomy metadata", with(`"name":"p"`, `"name":"p","nmae":"q"`), `unknown key "nmae"`},
		{"name with a slash", with(`"name":"p"`, `"name":"p/q"`), `name "p/q": want`},
		{"version", with(`"1.0.0"`, `"v1"`), `version "v1": want a semantic version`},
		{"requires_runtime", with(`"1.0.0"`, `"1.0.0","requires_runtime":"new"`), `requires_runtime "new": want constraints`},
		{"entrypoint", with(`"1.0.0"`, `"1.0.0","entrypoint":"../x"`), `entrypoint "../x": want package and rule`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, err := ReadBundle(tt.raw, Limits{})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !errors.Is(err, ErrBundle) || b != nil {
				t.Errorf("have %v, %v\nwant an ErrBundle with %q", b, err, tt.want)
			}
		})
	}
	if _, err := ReadBundle(good, Limits{}); err != nil {
		t.Errorf("the bundle that all of these are made from: %v", err)
	}
	if _, err := ReadBundle(good, Limits{MaxBytes: int64(len(good)) - 1}); err == nil || !strings.Contains(err.Error(), "the limit for a bundle") {
		t.Errorf("over MaxBytes: %v", err)
	}
}

func make1025() []entry {
	out := make([]entry, 1023)
	for i := range out {
		out[i] = entry{name: "d/", kind: tar.TypeDir}
	}
	return out
}

// TestBitFlips flips every bit of a bundle. OPA's reader takes about one in ten
// of these with changed content. Here a flip is refused, or it is in one of the
// few bits that carry none (the gzip header's time and system, padding in the
// deflate stream): then what is unpacked is the same. The digest, which slots and
// releases go by, is another in every case.
func TestBitFlips(t *testing.T) {
	raw := policyBundle(t, "1.0.0", allowAll, entry{name: "data.json", body: `{"hosts":["a.example","b.example"]}`}).Raw
	whole, err := unpack(raw, DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	taken := 0
	for i := range raw {
		for bit := range 8 {
			flipped := bytes.Clone(raw)
			flipped[i] ^= 1 << bit
			if Digest(flipped) == Digest(raw) {
				t.Fatal("same digest")
			}
			files, err := unpack(flipped, DefaultLimits)
			if err != nil {
				continue
			}
			taken++
			same := len(files) == len(whole)
			for j := range files {
				same = same && files[j].name == whole[j].name && bytes.Equal(files[j].data, whole[j].data)
			}
			if !same {
				t.Errorf("byte %d bit %d: accepted with changed content", i, bit)
			}
		}
	}
	if taken > 8*10 {
		t.Errorf("%d of %d flips accepted", taken, len(raw)*8)
	}
	t.Logf("%d of %d flips accepted, all without change of content", taken, len(raw)*8)
}

func TestBuildBundleIsDeterministic(t *testing.T) {
	files := map[string]string{
		"a.rego": allowAll, "b/b.rego": "package b\n\nx := 1\n", "a_test.rego": "package a_test\n\ntest_a := true\n",
		"data.yaml": "lists:\n  b: [1, 2]\n  a: x\n", "notes.md": "not packed", ".git/c.rego": "package c\n", "inputs/x.json": "{}",
	}
	one, err := BuildBundle(policyDir(t, files), BuildOptions{Name: "n", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	two, err := BuildBundle(policyDir(t, files), BuildOptions{Name: "n", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one, two) {
		t.Error("the same files gave other bytes")
	}
	got, err := unpack(one, DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range got {
		names = append(names, f.name)
	}
	if s := strings.Join(names, " "); s != ".manifest a.rego b/b.rego data.json inputs/x.json" {
		t.Errorf("packed %s", s)
	}
	b, err := ReadBundle(one, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if r := strings.Join(*b.parsed.Manifest.Roots, " "); r != "autonomy b lists" {
		t.Errorf("roots %s", r)
	}
}

func TestBuildBundleRefuses(t *testing.T) {
	link := policyDir(t, map[string]string{"a.rego": allowAll})
	if err := os.Symlink("/etc/passwd", filepath.Join(link, "data.json")); err != nil {
		t.Fatal(err)
	}
	fifo := policyDir(t, map[string]string{"a.rego": allowAll})
	if err := os.Symlink("a.rego", filepath.Join(fifo, "b.rego")); err != nil { // inside the directory: allowed
		t.Fatal(err)
	}
	tests := []struct {
		name, dir string
		o         BuildOptions
		want      string
	}{
		{"no directory", filepath.Join(link, "none"), BuildOptions{Version: "1.0.0"}, "no such file or directory"},
		{"no rego", policyDir(t, map[string]string{"data.json": "{}"}), BuildOptions{Version: "1.0.0"}, "no .rego file"},
		{"only tests", policyDir(t, map[string]string{"a_test.rego": "package a\n"}), BuildOptions{Version: "1.0.0"}, "no .rego file"},
		{"a link out of it", link, BuildOptions{Version: "1.0.0"}, "path escapes"},
		{"two data files", policyDir(t, map[string]string{"a.rego": allowAll, "data.json": "{}", "data.yaml": "{}"}), BuildOptions{Version: "1.0.0"}, "keep one data file"},
		{"yaml with duplicate keys", policyDir(t, map[string]string{"a.rego": allowAll, "data.yaml": "a: 1\na: 2\n"}), BuildOptions{Version: "1.0.0"}, "already defined"},
		{"json with duplicate keys", policyDir(t, map[string]string{"a.rego": allowAll, "data.json": `{"a":1,"a":2}`}), BuildOptions{Version: "1.0.0"}, "duplicate key"},
		{"too large", policyDir(t, map[string]string{"a.rego": allowAll}), BuildOptions{Version: "1.0.0", Limits: Limits{MaxTotalBytes: 8}}, "the limit for a bundle"},
		{"no version", policyDir(t, map[string]string{"a.rego": allowAll}), BuildOptions{}, "want a semantic version"},
		{"data over a rule", policyDir(t, map[string]string{"a.rego": allowAll, "data.json": `{"autonomy":{"allow":false}}`}), BuildOptions{Version: "1.0.0"}, "conflict"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			raw, err := BuildBundle(tt.dir, tt.o)
			if err == nil || !strings.Contains(err.Error(), tt.want) || raw != nil {
				t.Errorf("have %d bytes, %v; want %q", len(raw), err, tt.want)
			}
		})
	}
}

func TestReadBundleFileWantsARegularFile(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "b.tar.gz")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadBundleFile(fifo, Limits{}); err == nil || !strings.Contains(err.Error(), "want a regular file") {
		t.Errorf("a fifo: %v", err)
	}
	if _, err := ReadBundleFile(t.TempDir(), Limits{}); err == nil || !strings.Contains(err.Error(), "want a regular file") {
		t.Errorf("a directory: %v", err)
	}
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, make([]byte, 5<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadBundleFile(big, Limits{}); !errors.Is(err, ErrBundle) || !strings.Contains(err.Error(), "over 4194304 bytes") {
		t.Errorf("a large file: %v", err)
	}
}

func FuzzReadBundle(f *testing.F) {
	f.Add(archive(f, entry{name: ".manifest", body: goodManifest}, entry{name: "p.rego", body: allowAll}))
	f.Add(archive(f, entry{name: ".manifest", body: goodManifest}, entry{name: "p.rego", body: allowAll}, entry{name: "inputs/a.json", body: `{"kind":"k"}`}))
	f.Add(archive(f))
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := ReadBundle(raw, Limits{MaxTotalBytes: 1 << 20, MaxEntries: 16})
		if err != nil {
			if !errors.Is(err, ErrBundle) || b != nil {
				t.Fatal(err)
			}
			return
		}
		if b.Digest != Digest(raw) || b.Name == "" || b.Version == "" || b.Entrypoint == "" {
			t.Fatalf("%+v", b)
		}
	})
}
