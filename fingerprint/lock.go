package fingerprint

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/Masterminds/semver/v3"
	"github.com/gowebpki/jcs"
	"github.com/zeebo/blake3"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// Schema is the value of a lock's schema key.
const Schema = "autonomy.lock/v0"

// MediaType is the OCI media type of a lock file.
const MediaType = "application/vnd.autonomyops.lock.v0+json"

// FileName is what a lock file is called.
const FileName = "autonomy.lock.json"

// Limits of a lock. Parse and Marshal refuse what is over them.
const (
	MaxBytes   = 1 << 20 // of the file
	MaxEntries = 4096    // of each array and of inputs
	MaxString  = 1024    // bytes of any one string
)

// Lock is one lock file. The zero value is not valid: see New.
type Lock struct {
	Schema      string            `json:"schema"`
	Agent       Agent             `json:"agent"`
	Policy      Policy            `json:"policy"`
	Tools       []Tool            `json:"tools"`
	Prompts     []Prompt          `json:"prompts"`
	Models      []Model           `json:"models"`
	Runtime     Runtime           `json:"runtime"`
	Inputs      map[string]string `json:"inputs"`      // name -> sha256 digest, whatever else shapes behaviour
	Fingerprint string            `json:"fingerprint"` // blake3; Marshal fills it
}

// Agent names the program that runs and its OCI image manifest.
type Agent struct {
	Name        string `json:"name"`
	Version     string `json:"version"`      // semver
	ImageDigest string `json:"image_digest"` // sha256 of the image manifest
}

// Policy names the policy bundle. Digest is of the bundle file, not of the OCI
// manifest that carries it.
type Policy struct {
	Name    string `json:"name"`
	Version string `json:"version"` // semver
	Digest  string `json:"digest"`  // sha256 of the bundle's bytes
}

// Tool is one tool the agent may call, with the digest of its definition as
// ToolDigest computes it.
type Tool struct {
	Kind             string `json:"kind"`
	DefinitionDigest string `json:"definition_digest"` // sha256
}

// Prompt is one prompt file.
type Prompt struct {
	Name   string `json:"name"`
	Digest string `json:"digest"` // sha256 of the file's bytes
}

// Model is one model with the digest of its parameters in canonical JSON.
type Model struct {
	Provider     string `json:"provider"`
	ID           string `json:"id"`
	ParamsDigest string `json:"params_digest"` // sha256
}

// Runtime is what the agent needs of the node.
type Runtime struct {
	MinVersion   string   `json:"min_version"`  // semver of autonomy-node
	Capabilities []string `json:"capabilities"` // sorted
}

var (
	// ErrMalformed is wrapped by every error of Parse, Marshal and Compute that
	// says a lock is not well formed.
	ErrMalformed = errors.New("malformed lock")
	// ErrMismatch is wrapped by *MismatchError.
	ErrMismatch = errors.New("fingerprint mismatch")
)

// MismatchError says that a lock's fingerprint is not the one of its content.
type MismatchError struct {
	Recorded string    // what the lock says
	Computed string    // what its content gives
	Sections []Section // hashes of the content, to compare with a baseline: see Moved
}

func (e *MismatchError) Error() string {
	var names []string
	for _, s := range e.Sections {
		names = append(names, s.Name+"="+short(s.Hash))
	}
	return fmt.Sprintf("%v: the lock says %s, its content gives %s (sections: %s); the file was edited after it was made: make it again with \"autonomy lock create\", or compare it with \"autonomy lock diff\"",
		ErrMismatch, e.Recorded, e.Computed, strings.Join(names, " "))
}

func (e *MismatchError) Unwrap() error { return ErrMismatch }

func short(hash string) string {
	_, h, _ := strings.Cut(hash, ":")
	return h[:min(8, len(h))]
}

// New returns a lock with its schema set and its collections present and empty.
func New() *Lock {
	return &Lock{Schema: Schema, Tools: []Tool{}, Prompts: []Prompt{}, Models: []Model{}, Runtime: Runtime{Capabilities: []string{}}, Inputs: map[string]string{}}
}

// Parse reads a lock file. It accepts only the canonical encoding of a valid
// lock; it does not check the fingerprint's value: see Verify. Errors wrap
// ErrMalformed.
func Parse(data []byte) (*Lock, error) {
	if len(data) > MaxBytes {
		return nil, fmt.Errorf("%w: %d bytes, the limit is %d", ErrMalformed, len(data), MaxBytes)
	}
	var l Lock
	if err := strictjson.Unmarshal(data, &l); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err := l.validate(); err != nil {
		return nil, err
	}
	if err := checkHash("blake3:", l.Fingerprint); err != nil {
		return nil, fmt.Errorf("%w: fingerprint: %w", ErrMalformed, err)
	}
	canon, err := canonical(&l)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(canon, data) {
		return nil, fmt.Errorf("%w: the bytes are not RFC 8785 canonical JSON (first difference at byte %d): no white space, keys sorted; write it with \"autonomy lock create\"", ErrMalformed, firstDifference(canon, data))
	}
	return &l, nil
}

func firstDifference(a, b []byte) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// Normalize sorts the arrays and puts empty ones where none are, so that a lock
// made by hand is valid. It does not remove duplicates: validation names them.
func (l *Lock) Normalize() {
	if l.Schema == "" {
		l.Schema = Schema
	}
	l.Tools = nonNil(l.Tools)
	l.Prompts = nonNil(l.Prompts)
	l.Models = nonNil(l.Models)
	l.Runtime.Capabilities = nonNil(l.Runtime.Capabilities)
	if l.Inputs == nil {
		l.Inputs = map[string]string{}
	}
	slices.SortFunc(l.Tools, func(a, b Tool) int { return cmp.Compare(a.key(), b.key()) })
	slices.SortFunc(l.Prompts, func(a, b Prompt) int { return cmp.Compare(a.key(), b.key()) })
	slices.SortFunc(l.Models, func(a, b Model) int { return cmp.Compare(a.key(), b.key()) })
	slices.Sort(l.Runtime.Capabilities)
}

func nonNil[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func (t Tool) key() string   { return t.Kind }
func (p Prompt) key() string { return p.Name }

// key joins by a character that no name may hold, so that keys cannot collide
// and sort as provider, then id.
func (m Model) key() string { return m.Provider + "\x00" + m.ID }

// Marshal returns the canonical bytes of l with its fingerprint computed. It
// sets l.Fingerprint. Errors wrap ErrMalformed.
func (l *Lock) Marshal() ([]byte, error) {
	fp, err := Compute(l)
	if err != nil {
		return nil, err
	}
	l.Fingerprint = fp
	return canonical(l)
}

// Compute returns the fingerprint of l's content; l.Fingerprint plays no part.
// Errors wrap ErrMalformed.
func Compute(l *Lock) (string, error) {
	if err := l.validate(); err != nil {
		return "", err
	}
	raw, err := json.Marshal(struct {
		*Lock
		Fingerprint string `json:"fingerprint,omitempty"` // hides the embedded one, and is left out
	}{Lock: l})
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	canon, err := jcs.Transform(raw)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	sum := blake3.Sum256(canon)
	return fmt.Sprintf("blake3:%x", sum[:]), nil
}

// Verify reports whether l.Fingerprint is the fingerprint of l's content. A
// difference is a *MismatchError; other errors wrap ErrMalformed.
func (l *Lock) Verify() error {
	fp, err := Compute(l)
	if err != nil {
		return err
	}
	if fp != l.Fingerprint {
		sections, err := Sections(l)
		if err != nil {
			return err
		}
		return &MismatchError{Recorded: l.Fingerprint, Computed: fp, Sections: sections}
	}
	return nil
}

func canonical(v any) ([]byte, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	out, err := jcs.Transform(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return out, nil
}

// ToolDigest is the definition digest of a tool: "sha256:" over the RFC 8785
// bytes of {"description","input_schema","kind"}. inputSchema must be one strict
// JSON object.
func ToolDigest(kind, description string, inputSchema json.RawMessage) (string, error) {
	if err := strictjson.CheckObject(inputSchema); err != nil {
		return "", fmt.Errorf("tool %s: input schema: %w", kind, err)
	}
	raw, err := json.Marshal(struct {
		Description string          `json:"description"`
		InputSchema json.RawMessage `json:"input_schema"`
		Kind        string          `json:"kind"`
	}{description, inputSchema, kind})
	if err != nil {
		return "", fmt.Errorf("tool %s: %w", kind, err)
	}
	canon, err := jcs.Transform(raw)
	if err != nil {
		return "", fmt.Errorf("tool %s: %w", kind, err)
	}
	return Digest(canon), nil
}

func (l *Lock) validate() error {
	v := &validator{}
	if l.Schema != Schema {
		v.fail("schema is %q, want %q", clip(l.Schema), Schema)
	}
	v.text("agent.name", l.Agent.Name)
	v.version("agent.version", l.Agent.Version)
	v.digest("agent.image_digest", l.Agent.ImageDigest)
	v.text("policy.name", l.Policy.Name)
	v.version("policy.version", l.Policy.Version)
	v.digest("policy.digest", l.Policy.Digest)
	entries(v, "tools", l.Tools, func(at string, t Tool) string {
		v.text(at+".kind", t.Kind)
		v.digest(at+".definition_digest", t.DefinitionDigest)
		return t.key()
	})
	entries(v, "prompts", l.Prompts, func(at string, p Prompt) string {
		v.text(at+".name", p.Name)
		v.digest(at+".digest", p.Digest)
		return p.key()
	})
	entries(v, "models", l.Models, func(at string, m Model) string {
		v.text(at+".provider", m.Provider)
		v.text(at+".id", m.ID)
		v.digest(at+".params_digest", m.ParamsDigest)
		return m.key()
	})
	v.version("runtime.min_version", l.Runtime.MinVersion)
	entries(v, "runtime.capabilities", l.Runtime.Capabilities, func(at, c string) string {
		v.text(at, c)
		return c
	})
	switch {
	case l.Inputs == nil:
		v.fail("inputs is missing or null, want an object")
	case len(l.Inputs) > MaxEntries:
		v.fail("inputs has %d entries, the limit is %d", len(l.Inputs), MaxEntries)
	default:
		for name, d := range l.Inputs {
			v.text("inputs key", name)
			v.digest("inputs."+clip(name), d)
		}
	}
	return v.err()
}

// validator collects faults; the first maxFaults are told.
type validator struct{ faults []error }

const maxFaults = 8

func (v *validator) fail(format string, args ...any) {
	if len(v.faults) < maxFaults {
		v.faults = append(v.faults, fmt.Errorf(format, args...))
	}
}

func (v *validator) err() error {
	if len(v.faults) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrMalformed, errors.Join(v.faults...))
}

func (v *validator) text(at, s string) {
	switch {
	case s == "":
		v.fail("%s is missing or empty", at)
	case len(s) > MaxString:
		v.fail("%s has %d bytes, the limit is %d", at, len(s), MaxString)
	case !utf8.ValidString(s):
		v.fail("%s is not UTF-8", at)
	case strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f || r >= 0x80 && r < 0xa0 }):
		v.fail("%s holds a control character", at)
	}
}

func (v *validator) version(at, s string) {
	if v.text(at, s); s == "" {
		return
	}
	if _, err := semver.StrictNewVersion(s); err != nil {
		v.fail("%s is %q, want a version as in 1.4.2", at, clip(s))
	}
}

func (v *validator) digest(at, s string) {
	if err := checkHash("sha256:", s); err != nil {
		v.fail("%s: %w", at, err)
	}
}

func entries[T any](v *validator, at string, list []T, each func(at string, e T) string) {
	if list == nil {
		v.fail("%s is missing or null, want an array", at)
		return
	}
	if len(list) > MaxEntries {
		v.fail("%s has %d entries, the limit is %d", at, len(list), MaxEntries)
		return
	}
	prev := ""
	for i, e := range list {
		here := fmt.Sprintf("%s[%d]", at, i)
		key := each(here, e)
		switch {
		case i > 0 && key == prev:
			v.fail("%s: %q stands twice", here, clip(key))
		case i > 0 && key < prev:
			v.fail("%s: %q stands after %q, want bytewise order", here, clip(key), clip(prev))
		}
		prev = key
	}
}

func checkHash(prefix, s string) error {
	hex, ok := strings.CutPrefix(s, prefix)
	if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return fmt.Errorf("%q is no digest, want %s and 64 lower-case hex digits", clip(s), prefix)
	}
	return nil
}

func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "…"
	}
	return s
}
