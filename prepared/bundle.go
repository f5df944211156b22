package prepared

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/Masterminds/semver/v3"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/loader/filter"

	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/strictjson"
)

// ErrBundle is wrapped by every error of ReadBundle: the archive or its
// manifest is not one that this package takes.
var ErrBundle = errors.New("policy bundle refused")

// Limits bound what ReadBundle unpacks. A zero field takes the default. The
// depth of data.json, examples and manifest is bounded by strictjson.MaxDepth.
type Limits struct {
	MaxBytes      int64 // size of the compressed file; default 4 MiB
	MaxTotalBytes int64 // sum of all files unpacked; default 32 MiB
	MaxRatio      int64 // unpacked to compressed, judged above 1 MiB unpacked; default 200
	MaxEntries    int   // files and directories in the archive; default 1024
}

// DefaultLimits fit policies of thousands of rules and megabytes of data.
var DefaultLimits = Limits{MaxBytes: 4 << 20, MaxTotalBytes: 32 << 20, MaxRatio: 200, MaxEntries: 1024}

const (
	ratioFloor   = 1 << 20  // unpacked bytes below which MaxRatio is not judged: small files compress well
	maxPadding   = 64 << 10 // zero bytes after the end of the tar archive; GNU tar pads to 10 KiB
	maxPathBytes = 255      // length of a path in the archive
	maxTextBytes = 256      // length of name, version, revision, entrypoint, requires_runtime, one of allow_fail_open
	maxOverrides = 64       // allow_fail_open
	manifestName = ".manifest"
	dataName     = "data.json"
	regoExt      = ".rego"
)

func (l Limits) withDefaults() Limits {
	d := DefaultLimits
	if l.MaxBytes > 0 {
		d.MaxBytes = l.MaxBytes
	}
	if l.MaxTotalBytes > 0 {
		d.MaxTotalBytes = l.MaxTotalBytes
	}
	if l.MaxRatio > 0 {
		d.MaxRatio = l.MaxRatio
	}
	if l.MaxEntries > 0 {
		d.MaxEntries = l.MaxEntries
	}
	return d
}

// Bundle is a policy bundle that was read and checked, not yet compiled.
type Bundle struct {
	Name            string // metadata.autonomy.name
	Version         string // metadata.autonomy.version, semantic version
	Revision        string // the manifest's revision, free text
	Entrypoint      string // path of the rule that decides, "autonomy/decision"
	RequiresRuntime string // constraints on the runtime's version, all must hold; empty: any
	Digest          string // sha256: of Raw
	Raw             []byte // the file as it was read; not to be changed

	// Examples are sample calls, by name: the fail-open probe asks the policy
	// about them before it comes into force. They are no data of the policy.
	Examples []Example
	// AllowFailOpen are the fields (JSON Pointers) that the author has said may
	// be left out to make a denied call an allowed one.
	AllowFailOpen []string

	parsed *bundle.Bundle // nil: see content
}

// content is what the files of b hold, for reading. A Program keeps its bundle
// without it, as data and rules are several times as large as Raw and lie in the
// program in another form; Explain and LintBundle then read Raw again.
func (b *Bundle) content() (*bundle.Bundle, error) {
	if b.parsed != nil {
		return b.parsed, nil
	}
	again, err := readBundle(b.Raw, Limits{MaxBytes: int64(len(b.Raw)), MaxTotalBytes: 1 << 40, MaxRatio: 1 << 40, MaxEntries: 1 << 30})
	if err != nil {
		return nil, err // Raw was changed: it has been read before
	}
	return again.parsed, nil
}

// light is b without its content.
func (b *Bundle) light() *Bundle {
	l := *b
	l.parsed = nil
	return &l
}

// Example is a sample call.
type Example struct {
	Name  string // its file in the bundle, "inputs/deny_host.json"
	Input []byte // a JSON object
}

// isExample reports whether a file of a policy directory or a bundle is a sample
// call: *.json below examples/ or inputs/ at the top.
func isExample(name string) bool {
	top, _, below := strings.Cut(name, "/")
	return below && (top == "examples" || top == "inputs") && path.Ext(name) == ".json"
}

// Ref is name@version, the form that records and status use.
func (b *Bundle) Ref() string { return b.Name + "@" + b.Version }

// Digest is the digest of a bundle file's bytes.
func Digest(raw []byte) string {
	sum := sha256.Sum256(raw)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// ReadBundleFile reads a bundle from a regular file. Errors: those of the file
// system, and ErrBundle.
func ReadBundleFile(name string, l Limits) (*Bundle, error) {
	raw, err := readRegular(name, l.withDefaults().MaxBytes)
	if err != nil {
		return nil, err
	}
	b, err := ReadBundle(raw, l)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// readRegular reads a regular file of at most limit bytes; a longer one is
// returned cut to limit+1 so that the caller's own limit names it.
func readRegular(name string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a fifo must not block the open
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: want a regular file, have %s", name, info.Mode().Type())
	}
	raw, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return raw, nil
}

// ReadBundle reads a bundle from the bytes of its file, which it keeps as Raw.
//
// It unpacks the archive itself before OPA sees it: OPA's reader never checks
// the gzip checksum and takes trailing bytes, paths with "..", an archive
// without a manifest, and an unbounded total. Taken are one gzip member with
// nothing behind it, holding regular files (and directories) with clean
// relative names, each once: .manifest, *.rego, data.json, and sample calls in
// examples/ or inputs/. OPA's reader is then fed those files, not the archive,
// and not the sample calls.
//
// Every error wraps ErrBundle.
func ReadBundle(raw []byte, l Limits) (*Bundle, error) {
	b, err := readBundle(raw, l.withDefaults())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	return b, nil
}

func readBundle(raw []byte, l Limits) (*Bundle, error) {
	files, err := unpack(raw, l)
	if err != nil {
		return nil, err
	}
	m, err := readManifest(files)
	if err != nil {
		return nil, err
	}
	var examples []Example
	policy := make([]file, 0, len(files))
	for _, f := range files {
		if isExample(f.name) || path.Base(f.name) == dataName {
			if err := strictjson.CheckObject(f.data); err != nil {
				return nil, fmt.Errorf("%s: %w", f.name, err)
			}
		}
		if !isExample(f.name) {
			policy = append(policy, f)
			continue
		}
		if len(f.data) > MaxInputBytes {
			return nil, fmt.Errorf("%s: a sample call has over %d bytes, which no node takes", f.name, MaxInputBytes)
		}
		examples = append(examples, Example{f.name, f.data})
	}
	parsed, err := bundle.NewCustomReader(&memLoader{files: policy}).
		WithSkipBundleVerification(true). // signatures are over the whole file: package verify
		WithCapabilities(capabilities()).
		WithRegoVersion(ast.RegoV1).
		WithSizeLimitBytes(l.MaxTotalBytes).
		Read()
	if err != nil {
		return nil, err
	}
	if len(parsed.Modules) == 0 {
		return nil, errors.New("no .rego file in it: a bundle without rules decides nothing")
	}
	b := &Bundle{
		Name: m.Metadata.autonomy.Name, Version: m.Metadata.autonomy.Version, Revision: m.Revision,
		Entrypoint: m.Metadata.autonomy.Entrypoint, RequiresRuntime: m.Metadata.autonomy.RequiresRuntime,
		Digest: Digest(raw), Raw: raw, Examples: examples, AllowFailOpen: m.Metadata.autonomy.AllowFailOpen, parsed: &parsed,
	}
	if b.Entrypoint == "" {
		b.Entrypoint = defaultEntrypoint(parsed.Modules)
	}
	return b, nil
}

// Entrypoints of a bundle whose manifest names none.
const (
	mainEntrypoint     = "autonomy/decision"
	fallbackEntrypoint = "autonomy/allow"
)

// defaultEntrypoint is mainEntrypoint when some module has that rule, else
// fallbackEntrypoint, which Compile then looks for.
func defaultEntrypoint(modules []bundle.ModuleFile) string {
	decision := ast.MustParseRef("data.autonomy.decision")
	for _, m := range modules {
		for _, r := range m.Parsed.Rules {
			if m.Parsed.Package.Path.Extend(r.Head.Ref()).Equal(decision) {
				return mainEntrypoint
			}
		}
	}
	return fallbackEntrypoint
}

type file struct {
	name string
	data []byte
}

// unpack walks the archive within the limits and returns its files in order of
// their names.
func unpack(raw []byte, l Limits) ([]file, error) {
	if int64(len(raw)) > l.MaxBytes {
		return nil, fmt.Errorf("the file is over %d bytes, the limit for a bundle", l.MaxBytes)
	}
	under := bytes.NewReader(raw)
	zr, err := gzip.NewReader(under)
	if err != nil {
		return nil, fmt.Errorf("want a gzip-compressed tar archive: %w", err)
	}
	zr.Multistream(false) // a second member is content that another reader may not see
	total := &countingReader{r: zr, limit: l.MaxTotalBytes + int64(l.MaxEntries)*2048 + maxPadding, ratio: l.MaxRatio, packed: int64(len(raw))}
	tr := tar.NewReader(total)
	var files []file
	seen := map[string]bool{}
	entries, size := 0, int64(0)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read archive: %w", err)
		}
		if entries++; entries > l.MaxEntries {
			return nil, fmt.Errorf("the archive has over %d entries", l.MaxEntries)
		}
		name, err := cleanName(h.Name)
		if err != nil {
			return nil, err
		}
		switch h.Typeflag {
		case tar.TypeDir:
			continue
		case tar.TypeReg:
		default:
			return nil, fmt.Errorf("%q is a %s: a bundle holds regular files only", h.Name, typeName(h.Typeflag))
		}
		if seen[name] {
			return nil, fmt.Errorf("%q is in the archive twice", name)
		}
		seen[name] = true
		switch base := path.Base(name); {
		case isExample(name) && base == dataName:
			return nil, fmt.Errorf("%q: examples/ and inputs/ hold sample calls, not data of the policy; move it or give it another name", name)
		case name == manifestName, base == dataName, path.Ext(base) == regoExt, isExample(name):
		case base == ".signatures.json":
			return nil, fmt.Errorf("%q: OPA bundle signatures are not used here; sign the whole file with \"autonomy sign\"", name)
		default:
			return nil, fmt.Errorf("%q does not belong in a bundle: want .manifest, *.rego, data.json, and sample calls in inputs/*.json; \"autonomy policy build\" makes one", name)
		}
		if h.Size > l.MaxTotalBytes-size {
			return nil, fmt.Errorf("the archive unpacks to over %d bytes", l.MaxTotalBytes)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			return nil, fmt.Errorf("read %q: %w", name, err)
		}
		size += int64(len(data))
		files = append(files, file{name, data})
	}
	// Reading to the end makes gzip check its CRC and length.
	if err := onlyZeros(total); err != nil {
		return nil, err
	}
	if n := under.Len(); n > 0 {
		return nil, fmt.Errorf("%d bytes after the end of the archive", n)
	}
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.name, b.name) })
	return files, nil
}

// countingReader fails when the archive unpacks to too much.
type countingReader struct {
	r                    io.Reader
	n                    int64
	limit, ratio, packed int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.n > c.limit {
		return n, fmt.Errorf("the archive unpacks to over %d bytes", c.limit)
	}
	if c.n > ratioFloor && c.n/c.ratio > c.packed {
		return n, fmt.Errorf("the archive unpacks to over %d times its size", c.ratio)
	}
	return n, err
}

func onlyZeros(r io.Reader) error {
	buf := make([]byte, 4096)
	for total := 0; ; {
		n, err := r.Read(buf)
		for _, c := range buf[:n] {
			if c != 0 {
				return errors.New("data after the end of the tar archive")
			}
		}
		if total += n; total > maxPadding {
			return fmt.Errorf("over %d bytes of padding after the tar archive", maxPadding)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
	}
}

// cleanName takes "a/b", "/a/b" (as OPA writes it) and "./a/b" (as tar does)
// and refuses what could lead elsewhere or be read in two ways.
func cleanName(s string) (string, error) {
	name := strings.TrimPrefix(strings.TrimPrefix(s, "./"), "/")
	name = strings.TrimSuffix(name, "/")
	if s == "./" || s == "." {
		return ".", nil
	}
	if len(name) > maxPathBytes {
		return "", fmt.Errorf("a path of %d bytes in the archive, at most %d", len(name), maxPathBytes)
	}
	if name == "" || !utf8.ValidString(name) || path.Clean(name) != name || name == ".." || strings.HasPrefix(name, "../") ||
		strings.HasPrefix(name, "/") || strings.ContainsFunc(name, func(r rune) bool { return r < 0x20 || r == 0x7f || r == '\\' || r == ':' }) {
		return "", fmt.Errorf("path %q in the archive: want a clean relative path", s)
	}
	return name, nil
}

func typeName(t byte) string {
	switch t {
	case tar.TypeLink:
		return "hard link"
	case tar.TypeSymlink:
		return "symbolic link"
	case tar.TypeChar, tar.TypeBlock:
		return "device"
	case tar.TypeFifo:
		return "fifo"
	}
	return fmt.Sprintf("tar entry of type %q", t)
}

// manifest is what of OPA's .manifest this package takes; other keys are refused.
type manifest struct {
	Revision    string           `json:"revision"`
	Roots       []string         `json:"roots"`
	RegoVersion *int             `json:"rego_version"`
	Metadata    manifestMetadata `json:"metadata"`
}

// manifestMetadata leaves other tools' metadata alone and reads ours.
type manifestMetadata struct {
	others   map[string]json.RawMessage
	autonomy autonomyMetadata
}

type autonomyMetadata struct {
	Name            string   `json:"name"`
	Version         string   `json:"version"`
	RequiresRuntime string   `json:"requires_runtime,omitempty"`
	Entrypoint      string   `json:"entrypoint,omitempty"`
	AllowFailOpen   []string `json:"allow_fail_open,omitempty"`
}

func (m *manifestMetadata) UnmarshalJSON(data []byte) error {
	if err := json.Unmarshal(data, &m.others); err != nil {
		return err
	}
	own, ok := m.others["autonomy"]
	if !ok {
		return nil
	}
	if err := strictjson.Unmarshal(own, &m.autonomy); err != nil {
		return fmt.Errorf("metadata.autonomy: %w", err)
	}
	return nil
}

func (m manifestMetadata) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]any{"autonomy": m.autonomy})
}

var (
	namePattern  = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?$`)
	entryPattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)+$`)
)

func readManifest(files []file) (*manifest, error) {
	i := slices.IndexFunc(files, func(f file) bool { return f.name == manifestName })
	if i < 0 {
		return nil, errors.New("no .manifest at the top of the archive")
	}
	var m manifest
	if err := strictjson.Unmarshal(files[i].data, &m); err != nil {
		return nil, fmt.Errorf(".manifest: %w", err)
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf(".manifest: %w", err)
	}
	return &m, nil
}

func (m *manifest) check() error {
	if len(m.Roots) == 0 {
		return errors.New(`roots is missing: list the packages that the bundle owns, for example ["autonomy"]`)
	}
	if m.RegoVersion == nil || *m.RegoVersion != 1 && *m.RegoVersion != 2 {
		return errors.New("rego_version must be 1 or 2")
	}
	for _, t := range []string{m.Revision, m.Metadata.autonomy.RequiresRuntime} {
		if len(t) > maxTextBytes || strings.ContainsFunc(t, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
			return fmt.Errorf("revision and requires_runtime are at most %d bytes of one line", maxTextBytes)
		}
	}
	return m.Metadata.autonomy.check()
}

func (a autonomyMetadata) check() error {
	switch {
	case a.Name == "" && a.Version == "":
		return errors.New(`metadata.autonomy with name and version is missing; "autonomy policy build" writes it`)
	case !namePattern.MatchString(a.Name):
		return fmt.Errorf("name %q: want lower-case letters, digits and . _ - between them, at most 128", a.Name)
	case len(a.Version) > maxTextBytes:
		return fmt.Errorf("version is over %d bytes", maxTextBytes)
	}
	if _, err := semver.StrictNewVersion(a.Version); err != nil {
		return fmt.Errorf("version %q: want a semantic version such as 1.4.2: %w", a.Version, err)
	}
	if a.RequiresRuntime != "" {
		if _, err := semver.NewConstraint(a.RequiresRuntime); err != nil {
			return fmt.Errorf("requires_runtime %q: want constraints such as \">=0.1.0 <2.0.0\": %w", a.RequiresRuntime, err)
		}
	}
	if a.Entrypoint != "" && (len(a.Entrypoint) > maxTextBytes || !entryPattern.MatchString(a.Entrypoint)) {
		return fmt.Errorf("entrypoint %q: want package and rule as a path, for example autonomy/decision", a.Entrypoint)
	}
	return CheckOverrides(a.AllowFailOpen)
}

// CheckOverrides says whether fields are what an override of the fail-open probe
// may name: at most 64 JSON Pointers such as /params/header.
func CheckOverrides(fields []string) error {
	if len(fields) > maxOverrides {
		return fmt.Errorf("allow_fail_open names %d fields, at most %d", len(fields), maxOverrides)
	}
	for _, f := range fields {
		if len(f) > maxTextBytes || !strings.HasPrefix(f, "/") || !utf8.ValidString(f) || strings.ContainsFunc(f, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
			return fmt.Errorf("allow_fail_open: %.80q, want a field of the input as a JSON Pointer, for example /params/header", f)
		}
	}
	return nil
}

// memLoader feeds checked files to OPA's reader.
type memLoader struct{ files []file }

func (m *memLoader) NextFile() (*bundle.Descriptor, error) {
	if len(m.files) == 0 {
		return nil, io.EOF
	}
	f := m.files[0]
	m.files = m.files[1:]
	return bundle.NewDescriptor("/"+f.name, "/"+f.name, bytes.NewReader(f.data)), nil
}

func (m *memLoader) WithFilter(filter.LoaderFilter) bundle.DirectoryLoader   { return m }
func (m *memLoader) WithPathFormat(bundle.PathFormat) bundle.DirectoryLoader { return m }
func (m *memLoader) WithSizeLimitBytes(int64) bundle.DirectoryLoader         { return m }
func (m *memLoader) WithFollowSymlinks(bool) bundle.DirectoryLoader          { return m }

// nearest suggests one of candidates for a word that is none of them.
func nearest(word string, candidates []string) string {
	if s := conf.Nearest(word, slices.Clone(candidates)); s != "" {
		return fmt.Sprintf("; did you mean %q?", s)
	}
	return ""
}
