package prepared

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"go.yaml.in/yaml/v3"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// BuildOptions describe the bundle to build.
type BuildOptions struct {
	Name            string // default: the directory's name
	Version         string // semantic version
	RequiresRuntime string // constraints on the runtime's version; empty: any
	Entrypoint      string // default autonomy/decision, else autonomy/allow
	// AllowFailOpen goes into the manifest: fields of the input (JSON Pointers)
	// that may be left out to make a denied call an allowed one.
	AllowFailOpen []string
	Limits        Limits
}

// BuildBundle packs the policy in dir: every *.rego except tests (_test.rego),
// data.json, data.yaml or data.yml, which become data.json, and the sample calls
// examples/*.json and inputs/*.json, for the node's fail-open probe. Directories
// whose name begins with a dot are left out. A data file in a subdirectory lands
// under its path, as in OPA. BuildBundle does not probe: Probe does.
//
// The same files and options give the same bytes, on every machine, for one Go
// release (its compress/gzip). The bundle is read back and compiled before it is
// returned, so an error may wrap ErrBundle or ErrCompile too.
func BuildBundle(dir string, o BuildOptions) ([]byte, error) {
	src, err := loadDir(dir, o.Limits.withDefaults())
	if err != nil {
		return nil, err
	}
	if o.Name == "" {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return nil, err
		}
		o.Name = filepath.Base(abs)
	}
	files := slices.DeleteFunc(src.files, func(f file) bool { return strings.HasSuffix(f.name, testSuffix) })
	owned, err := roots(files)
	if err != nil {
		return nil, fmt.Errorf("build %s: %w: %w", dir, ErrCompile, err)
	}
	version := 1
	m := manifest{Revision: o.Version, RegoVersion: &version, Roots: owned,
		Metadata: manifestMetadata{autonomy: autonomyMetadata{o.Name, o.Version, o.RequiresRuntime, o.Entrypoint, o.AllowFailOpen}}}
	if err := m.Metadata.autonomy.check(); err != nil {
		return nil, fmt.Errorf("build %s: %w", dir, err)
	}
	mf, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	packed := append([]file{{manifestName, append(mf, '\n')}}, files...)
	raw, err := pack(append(packed, src.examples...))
	if err != nil {
		return nil, err
	}
	b, err := ReadBundle(raw, o.Limits)
	if err != nil {
		return nil, fmt.Errorf("build %s: %w", dir, err)
	}
	if _, err := Compile(context.Background(), b); err != nil {
		return nil, fmt.Errorf("build %s: %w", dir, err)
	}
	return raw, nil
}

// pack writes files in their order with nothing in it that differs between
// machines or moments.
func pack(files []file) ([]byte, error) {
	var buf bytes.Buffer
	zw, err := gzip.NewWriterLevel(&buf, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	tw := tar.NewWriter(zw)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.data)), Format: tar.FormatUSTAR}
		if err := tw.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("pack %s: %w", f.name, err)
		}
		if _, err := tw.Write(f.data); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(tw.Close(), zw.Close()); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// roots are the packages and data paths of the bundle, no one below another.
func roots(files []file) ([]string, error) {
	var all []string
	for _, f := range files {
		if path.Base(f.name) == dataName {
			if d := path.Dir(f.name); d != "." {
				all = append(all, d)
				continue
			}
			var top map[string]json.RawMessage
			if err := json.Unmarshal(f.data, &top); err != nil {
				return nil, fmt.Errorf("%s: %w", f.name, err)
			}
			for k := range top {
				all = append(all, k)
			}
			continue
		}
		m, err := ast.ParseModuleWithOpts(f.name, string(f.data), ast.ParserOptions{RegoVersion: ast.RegoV1, Capabilities: capabilities()})
		if err != nil {
			return nil, err
		}
		p, err := m.Package.Path.Ptr()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.name, err)
		}
		all = append(all, p)
	}
	slices.Sort(all)
	var out []string
	for _, r := range slices.Compact(all) {
		if !slices.ContainsFunc(out, func(o string) bool { return r == o || strings.HasPrefix(r, o+"/") }) {
			out = append(out, r)
		}
	}
	return out, nil
}

const testSuffix = "_test.rego"

// source is a policy directory.
type source struct {
	files    []file // *.rego with tests, data.json; by name
	examples []file // examples/*.json, inputs/*.json; by name
}

// loadDir reads a policy directory within the limits of a bundle. Symbolic
// links are not followed out of it.
func loadDir(dir string, l Limits) (*source, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("read policy directory: %w", err)
	}
	defer root.Close()
	src := &source{}
	data := map[string]string{} // directory -> its data file
	var size int64
	entries := 0
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entries++; entries > l.MaxEntries {
			return fmt.Errorf("over %d files in %s, the limit for a bundle", l.MaxEntries, dir)
		}
		if d.IsDir() {
			if name != "." && strings.HasPrefix(d.Name(), ".") {
				return fs.SkipDir
			}
			return nil
		}
		base, top := path.Base(name), strings.SplitN(name, "/", 2)[0]
		apart := top == "examples" || top == "inputs" // sample calls, and nothing of the policy
		isData := base == "data.json" || base == "data.yaml" || base == "data.yml"
		if apart && !isExample(name) || !apart && !isData && path.Ext(base) != regoExt {
			return nil
		}
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s: want a regular file, have %s", name, info.Mode().Type())
		}
		content, err := io.ReadAll(io.LimitReader(f, l.MaxTotalBytes-size+1))
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		if size += int64(len(content)); size > l.MaxTotalBytes {
			return fmt.Errorf("the files in %s have over %d bytes, the limit for a bundle", dir, l.MaxTotalBytes)
		}
		switch {
		case apart:
			src.examples = append(src.examples, file{name, content})
		case isData:
			at := path.Dir(name)
			if other, ok := data[at]; ok {
				return fmt.Errorf("%s and %s: keep one data file in a directory", other, name)
			}
			data[at] = name
			if base != dataName {
				if content, err = yamlToJSON(content); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
			}
			if err := strictjson.CheckObject(content); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			src.files = append(src.files, file{path.Join(at, dataName), content})
		default:
			src.files = append(src.files, file{name, content})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, files := range [][]file{src.files, src.examples} {
		slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.name, b.name) })
	}
	if !slices.ContainsFunc(src.files, func(f file) bool {
		return path.Ext(f.name) == regoExt && !strings.HasSuffix(f.name, testSuffix)
	}) {
		return nil, fmt.Errorf("no .rego file in %s", dir)
	}
	return src, nil
}

// yamlToJSON converts data, so that a bundle holds JSON only and its reader
// needs no YAML parser. Duplicate keys and unbounded aliases are refused by the
// YAML package.
func yamlToJSON(in []byte) ([]byte, error) {
	var v any
	if err := yaml.Unmarshal(in, &v); err != nil {
		return nil, err
	}
	out, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("a key that is no string, or a value that JSON has not: %w", err)
	}
	return append(out, '\n'), nil
}
