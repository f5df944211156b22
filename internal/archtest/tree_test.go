package archtest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

const module = "github.com/autonomyops/autonomy"

// A file is one Go source file that is not a test.
type file struct {
	path    string // from the module's root, with slashes
	dir     string // its package's folder; "." for the root
	ast     *ast.File
	imports []imported
}

type imported struct {
	path string // as written: "net/http"
	name string // what the file calls it: "http", an alias, "." or "_"
	line int
}

// internal returns the folder of an import of this module ("wal"), and whether
// it is one.
func (i imported) internal() (string, bool) {
	if i.path == module {
		return ".", true
	}
	return strings.CutPrefix(i.path, module+"/")
}

// A tree is a module's source.
type tree struct {
	fset  *token.FileSet
	files []*file           // sorted by path
	text  map[string][]byte // every text file that people write, for the rule on words
}

// A fault is one place that breaks a rule.
type fault struct {
	file string
	line int // 0: the file as a whole
	text string
}

func (f fault) String() string {
	if f.line == 0 {
		return fmt.Sprintf("%s: %s", f.file, f.text)
	}
	return fmt.Sprintf("%s:%d: %s", f.file, f.line, f.text)
}

// load reads a module. Folders that Go ignores and nested modules are left out
// of files, not of text.
func load(fsys fs.FS) (*tree, error) {
	t := &tree{fset: token.NewFileSet(), text: map[string][]byte{}}
	nested := []string{}
	err := fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if p == ".git" || p == "bin" || p == "dist" || p == "internal/archtest/testdata" {
				return fs.SkipDir
			}
			if _, err := fs.Stat(fsys, path.Join(p, "go.mod")); err == nil && p != "." {
				nested = append(nested, p)
			}
			return nil
		}
		if !d.Type().IsRegular() || !written(p) {
			return nil
		}
		src, err := fs.ReadFile(fsys, p)
		if err != nil {
			return err
		}
		t.text[p] = src
		if path.Ext(p) != ".go" || strings.HasSuffix(p, "_test.go") || ignored(p) ||
			slices.ContainsFunc(nested, func(dir string) bool { return under(p, dir) }) {
			return nil
		}
		f, err := t.parse(p, src)
		if err != nil {
			return err
		}
		t.files = append(t.files, f)
		return nil
	})
	return t, err
}

// written reports whether people write files of this name.
func written(p string) bool {
	switch path.Ext(p) {
	case ".go", ".md", ".sh", ".yaml", ".yml", ".json", ".rego", ".txtar", ".toml", ".conf", ".service", ".sql", ".html", ".css", ".js", ".c", ".h", ".proto", ".mod":
		return true
	}
	base := path.Base(p)
	return base == "Makefile" || base == "Containerfile" || p == ".ci/run"
}

// ignored reports whether the go command leaves out a file for its folders.
func ignored(p string) bool {
	for _, part := range strings.Split(path.Dir(p), "/") {
		if part == "testdata" || part != "." && strings.HasPrefix(part, ".") || strings.HasPrefix(part, "_") {
			return true
		}
	}
	return false
}

func (t *tree) parse(p string, src []byte) (*file, error) {
	parsed, err := parser.ParseFile(t.fset, p, src, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	f := &file{path: p, dir: path.Dir(p), ast: parsed}
	for _, spec := range parsed.Imports {
		ip, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, err
		}
		i := imported{path: ip, name: defaultName(ip), line: t.fset.Position(spec.Pos()).Line}
		if spec.Name != nil {
			i.name = spec.Name.Name
		}
		f.imports = append(f.imports, i)
	}
	return f, nil
}

// defaultName guesses the name of a package from its path. It is right for the
// packages whose symbols a rule names.
func defaultName(importPath string) string {
	base := path.Base(importPath)
	if len(base) > 1 && base[0] == 'v' && strings.Trim(base[1:], "0123456789") == "" {
		base = path.Base(path.Dir(importPath))
	}
	return base
}

// under reports whether p is dir or lies in it. "." holds everything.
func under(p, dir string) bool {
	return dir == "." || p == dir || strings.HasPrefix(p, dir+"/")
}

func underAny(p string, dirs []string) bool {
	return slices.ContainsFunc(dirs, func(d string) bool { return under(p, d) })
}

// words splits an identifier: isLeader, IS_LEADER and Leader2 have "leader".
func words(ident string) []string {
	var out []string
	var cur []rune
	flush := func() {
		if len(cur) > 0 {
			out = append(out, strings.ToLower(string(cur)))
			cur = cur[:0]
		}
	}
	runes := []rune(ident)
	for i, r := range runes {
		switch {
		case !unicode.IsLetter(r):
			flush()
			continue
		case unicode.IsUpper(r) && (i > 0 && unicode.IsLower(runes[i-1]) || i+1 < len(runes) && unicode.IsLower(runes[i+1])):
			flush() // aB starts B; ABc starts Bc
		}
		cur = append(cur, r)
	}
	flush()
	return out
}

// moduleRoot finds the folder of go.mod above the test.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no go.mod above the test's folder")
		}
		dir = filepath.Dir(dir)
	}
}
