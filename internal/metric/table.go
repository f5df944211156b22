package metric

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// Types of a family.
const (
	TypeCounter   = "counter"
	TypeGauge     = "gauge"
	TypeHistogram = "histogram"
)

// Desc is one family of a Table.
type Desc struct {
	Name   string // as it is exposed; a counter's ends in _total
	Type   string
	Unit   string // seconds, bytes, records, …
	Labels string // their names, separated by commas
	Help   string // one sentence
}

// Table is all that a program exposes of its own.
type Table []Desc

// Markdown is the table for the documentation.
func (t Table) Markdown() string {
	var b strings.Builder
	b.WriteString("| metric | type | unit | labels | meaning |\n|---|---|---|---|---|\n")
	for _, d := range t {
		labels := ""
		if d.Labels != "" {
			labels = "`" + strings.ReplaceAll(d.Labels, ",", "`, `") + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", d.Name, d.Type, d.Unit, labels, d.Help)
	}
	return b.String()
}

// family is the name that a line's sample belongs to in t, or its own.
func (t Table) family(sample string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		base, ok := strings.CutSuffix(sample, suffix)
		if ok && slices.ContainsFunc(t, func(d Desc) bool { return d.Name == base && d.Type == TypeHistogram }) {
			return base
		}
	}
	return sample
}

// Families are the names of what a text exposes, sorted, as t sees them.
func (t Table) Families(text []byte) []string {
	var out []string
	for line := range bytes.Lines(text) {
		if name := sampleName(line); name != "" {
			out = append(out, t.family(name))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// sampleName is the metric's name of a line, "" for a comment or an empty one.
func sampleName(line []byte) string {
	if len(line) == 0 || line[0] == '#' {
		return ""
	}
	if end := bytes.IndexAny(line, "{ \n"); end >= 0 {
		line = line[:end]
	}
	return string(line)
}

func (f *Buffer) expose(t Table) []byte {
	lines := map[string][]byte{}
	var foreign []string
	for line := range bytes.Lines(f.b) {
		name := sampleName(line)
		if name == "" {
			continue
		}
		name = t.family(name)
		if _, seen := lines[name]; !seen && !slices.ContainsFunc(t, func(d Desc) bool { return d.Name == name }) {
			foreign = append(foreign, name)
		}
		lines[name] = append(lines[name], line...)
	}
	var b []byte
	for _, d := range t {
		if len(lines[d.Name]) == 0 {
			continue
		}
		name := d.Name
		if f.open && d.Type == TypeCounter {
			name = strings.TrimSuffix(name, "_total")
		}
		b = fmt.Appendf(b, "# HELP %s %s\n# TYPE %s %s\n", name, d.Help, name, d.Type)
		if f.open && strings.HasSuffix(name, "_"+d.Unit) {
			b = fmt.Appendf(b, "# UNIT %s %s\n", name, d.Unit)
		}
		b = append(b, lines[d.Name]...)
	}
	for _, name := range foreign {
		b = append(b, lines[name]...)
	}
	if f.open {
		b = append(b, "# EOF\n"...)
	}
	return b
}
