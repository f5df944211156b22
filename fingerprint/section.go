package fingerprint

import (
	"crypto/sha256"
	"fmt"

	"github.com/zeebo/blake3"
)

// Section is one named part of a lock with the hash of its content.
type Section struct {
	Name string `json:"name"`
	Hash string `json:"hash"` // "blake3:" and 64 hex digits
}

// sectionContext and a section's name make the BLAKE3 derive-key context. It is
// part of the format: changing it changes every published vector.
const sectionContext = "github.com/autonomyops/autonomy lock/v0 section "

// Sections returns the section hashes of l, always the same eight in the same
// order. Errors wrap ErrMalformed.
func Sections(l *Lock) ([]Section, error) {
	if err := l.validate(); err != nil {
		return nil, err
	}
	parts := []struct {
		name  string
		value any
	}{
		{"agent", l.Agent},
		{"tools", l.Tools},
		{"prompts", l.Prompts},
		{"models", l.Models},
		{"policy", l.Policy},
		{"capabilities", l.Runtime.Capabilities},
		{"runtime", map[string]string{"min_version": l.Runtime.MinVersion}},
		{"inputs", l.Inputs},
	}
	out := make([]Section, len(parts))
	for i, p := range parts {
		canon, err := canonical(p.value)
		if err != nil {
			return nil, fmt.Errorf("section %s: %w", p.name, err)
		}
		var sum [32]byte
		blake3.DeriveKey(sectionContext+p.name, canon, sum[:])
		out[i] = Section{Name: p.name, Hash: fmt.Sprintf("blake3:%x", sum[:])}
	}
	return out, nil
}

// Moved names the sections whose hashes differ between a and b.
func Moved(a, b []Section) []string {
	old := make(map[string]string, len(a))
	for _, s := range a {
		old[s.Name] = s.Hash
	}
	var names []string
	for _, s := range b {
		if old[s.Name] != s.Hash {
			names = append(names, s.Name)
		}
	}
	return names
}

// Digest is "sha256:" and the hex SHA-256 of data, as files and OCI content are
// named.
func Digest(data []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(data)) }
