package fingerprint

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/Masterminds/semver/v3"
)

// Severity says how much a change can widen or alter what the agent does.
type Severity int

// Severities, least first.
const (
	Low      Severity = iota + 1 // versions, what was taken away
	Medium                       // a model, a declared input
	High                         // a prompt, the image, the policy, a tool's definition
	Critical                     // the agent can do what it could not: a tool or capability was added
)

func (s Severity) String() string {
	switch s {
	case Critical:
		return "critical"
	case High:
		return "high"
	case Medium:
		return "medium"
	case Low:
		return "low"
	}
	return "unknown"
}

// MarshalText writes the severity's name.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Change is one difference between two locks. Old is empty for what was added,
// New for what was removed.
type Change struct {
	Severity Severity `json:"severity"`
	Section  string   `json:"section"` // as in Sections
	Key      string   `json:"key"`     // what in the section, as in "tool.echo" or "version"
	Old      string   `json:"old,omitempty"`
	New      string   `json:"new,omitempty"`
	Why      string   `json:"why"` // in words
}

// Diff lists what changed from a to b, most severe first; equal severities stand
// in a fixed order. It is empty exactly when the fingerprints are equal.
func Diff(a, b *Lock) []Change {
	var out []Change
	add := func(sev Severity, section, key, old, now, why string) {
		if old != now {
			out = append(out, Change{sev, section, key, old, now, why})
		}
	}
	diffMaps(byKey(a.Tools, Tool.key, func(t Tool) string { return t.DefinitionDigest }),
		byKey(b.Tools, Tool.key, func(t Tool) string { return t.DefinitionDigest }),
		func(key, old, now string) {
			switch {
			case old == "":
				add(Critical, "tools", key, old, now, "tool added")
			case now == "":
				add(Low, "tools", key, old, now, "tool removed")
			default:
				add(High, "tools", key, old, now, "tool definition changed: description or input schema")
			}
		})
	one := func(c string) string { return "present" }
	self := func(c string) string { return c }
	diffMaps(byKey(a.Runtime.Capabilities, self, one), byKey(b.Runtime.Capabilities, self, one), func(key, old, now string) {
		if old == "" {
			add(Critical, "capabilities", key, old, now, "capability added")
		} else {
			add(Low, "capabilities", key, old, now, "capability removed")
		}
	})
	add(High, "policy", "name", a.Policy.Name, b.Policy.Name, "another policy")
	add(High, "policy", "digest", a.Policy.Digest, b.Policy.Digest, "policy bundle changed")
	add(High, "agent", "name", a.Agent.Name, b.Agent.Name, "another agent")
	add(High, "agent", "image_digest", a.Agent.ImageDigest, b.Agent.ImageDigest, "image changed")
	diffMaps(byKey(a.Prompts, Prompt.key, func(p Prompt) string { return p.Digest }),
		byKey(b.Prompts, Prompt.key, func(p Prompt) string { return p.Digest }),
		func(key, old, now string) { add(High, "prompts", key, old, now, "prompt "+verb(old, now)) })
	params := func(m Model) string { return m.ParamsDigest }
	diffMaps(byKey(a.Models, Model.key, params), byKey(b.Models, Model.key, params), func(key, old, now string) {
		add(Medium, "models", strings.ReplaceAll(key, "\x00", "/"), old, now, "model "+verb(old, now))
	})
	diffMaps(a.Inputs, b.Inputs, func(key, old, now string) { add(Medium, "inputs", key, old, now, "input "+verb(old, now)) })
	runtime := Low
	if lower(b.Runtime.MinVersion, a.Runtime.MinVersion) {
		runtime = Medium // an older node, with fewer protections, would now do
	}
	add(runtime, "runtime", "min_version", a.Runtime.MinVersion, b.Runtime.MinVersion, "runtime requirement changed")
	add(Low, "policy", "version", a.Policy.Version, b.Policy.Version, "policy version changed")
	add(Low, "agent", "version", a.Agent.Version, b.Agent.Version, "agent version changed")
	slices.SortStableFunc(out, func(x, y Change) int { return cmp.Compare(y.Severity, x.Severity) })
	return out
}

func verb(old, now string) string {
	switch {
	case old == "":
		return "added"
	case now == "":
		return "removed"
	}
	return "changed"
}

func lower(a, b string) bool {
	va, errA := semver.NewVersion(a)
	vb, errB := semver.NewVersion(b)
	return errA == nil && errB == nil && va.LessThan(vb)
}

func byKey[T any](list []T, key, value func(T) string) map[string]string {
	m := make(map[string]string, len(list))
	for _, e := range list {
		m[key(e)] = value(e)
	}
	return m
}

// diffMaps calls f for each key whose values differ, keys sorted.
func diffMaps(a, b map[string]string, f func(key, old, now string)) {
	keys := slices.Sorted(maps.Keys(a))
	for k := range b {
		if _, ok := a[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, strings.Compare)
	for _, k := range keys {
		if a[k] != b[k] {
			f(k, a[k], b[k])
		}
	}
}
