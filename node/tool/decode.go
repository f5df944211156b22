package tool

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/autonomyops/autonomy/internal/conf"
)

// decoder reads tools.yaml strictly: every key must be known, none may stand
// twice, aliases and tags are refused (one reading only), and each fault tells
// file and line. It collects all faults instead of stopping at the first.
type decoder struct {
	file   string
	faults []error
}

func (d *decoder) fault(line int, format string, args ...any) {
	d.faults = append(d.faults, fmt.Errorf("%s:%d: "+format, append([]any{d.file, line}, args...)...))
}

// document finds the entries under "tools" and "mcp".
func (d *decoder) document(data []byte) (tools, servers []entry, err error) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, nil, fmt.Errorf("%s:1: empty, want a mapping \"tools:\"", d.file)
	case err != nil:
		return nil, nil, fmt.Errorf("%s: %w", d.file, err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("%s: more than one document", d.file)
	}
	var top struct {
		Tools *yaml.Node `yaml:"tools"`
		MCP   *yaml.Node `yaml:"mcp"`
	}
	root := doc.Content[0]
	d.decode(root, &top)
	if len(d.faults) > 0 {
		return nil, nil, errors.Join(d.faults...)
	}
	if top.Tools == nil && top.MCP == nil || top.Tools != nil && top.Tools.Kind != yaml.MappingNode {
		return nil, nil, fmt.Errorf("%s:%d: want a mapping \"tools:\" with a tool per key, as in \"tool.echo: {}\"", d.file, root.Line)
	}
	if top.MCP != nil && top.MCP.Kind != yaml.MappingNode {
		return nil, nil, fmt.Errorf("%s:%d: want a mapping \"mcp:\" with a server per key", d.file, top.MCP.Line)
	}
	return d.entries(top.Tools), d.entries(top.MCP), nil
}

// entries are the pairs of a mapping, nil for none.
func (d *decoder) entries(n *yaml.Node) []entry {
	var out []entry
	if n != nil {
		d.pairs(n, func(k, v *yaml.Node) { out = append(out, entry{k.Value, k.Line, v}) })
	}
	return out
}

// pairs calls f for each key of a mapping, and reports a key that stands twice.
func (d *decoder) pairs(n *yaml.Node, f func(k, v *yaml.Node)) {
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if first := seen[k.Value]; first > 0 {
			d.fault(k.Line, "%q is set a second time, first in line %d", k.Value, first)
			continue
		}
		seen[k.Value] = k.Line
		f(k, v)
	}
}

// decode fills v, a pointer, from n. It returns false when it found a fault.
func (d *decoder) decode(n *yaml.Node, v any) bool {
	before := len(d.faults)
	d.value(n, reflect.ValueOf(v).Elem(), "")
	return len(d.faults) == before
}

var nodeType = reflect.TypeFor[*yaml.Node]()

func (d *decoder) value(n *yaml.Node, v reflect.Value, name string) {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		d.fault(n.Line, "%sanchors and aliases are not read: write the value out", label(name))
		return
	}
	if v.Type() == nodeType {
		v.Set(reflect.ValueOf(n))
		return
	}
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if n.Kind != yaml.ScalarNode {
			d.fault(n.Line, "%swant a plain value", label(name))
		} else if err := u.UnmarshalText([]byte(n.Value)); err != nil {
			d.fault(n.Line, "%s%w", label(name), err)
		}
		return
	}
	if z, ok := v.Addr().Interface().(*conf.Size); ok {
		if n.Kind != yaml.ScalarNode {
			d.fault(n.Line, "%swant a size, as in 64KiB", label(name))
		} else if err := z.Set(n.Value); err != nil {
			d.fault(n.Line, "%s%w", label(name), err)
		}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.object(n, v, name)
	case reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			d.fault(n.Line, "%swant a list", label(name))
			return
		}
		out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
		for i, c := range n.Content {
			d.value(c, out.Index(i), name)
		}
		v.Set(out)
	case reflect.Map:
		if n.Kind != yaml.MappingNode {
			d.fault(n.Line, "%swant a mapping", label(name))
			return
		}
		v.Set(reflect.MakeMap(v.Type()))
		d.pairs(n, func(k, val *yaml.Node) {
			elem := reflect.New(v.Type().Elem()).Elem()
			d.value(val, elem, k.Value)
			v.SetMapIndex(reflect.ValueOf(k.Value), elem)
		})
	case reflect.Pointer:
		elem := reflect.New(v.Type().Elem())
		d.value(n, elem.Elem(), name)
		v.Set(elem)
	default:
		if n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
			d.fault(n.Line, "%swant a plain value", label(name))
			return
		}
		if v.Kind() == reflect.String && n.Tag != "!!str" {
			d.fault(n.Line, "%swant a string: put %s in quotes", label(name), n.Value)
			return
		}
		if err := n.Decode(v.Addr().Interface()); err != nil {
			d.fault(n.Line, "%swant a %s, have %q", label(name), v.Kind(), n.Value)
		}
	}
}

func (d *decoder) object(n *yaml.Node, v reflect.Value, name string) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return // "tool.echo:" with nothing after it
	}
	if n.Kind != yaml.MappingNode {
		d.fault(n.Line, "%swant a mapping", label(name))
		return
	}
	fields := map[string]reflect.Value{}
	collect(v, fields)
	names := make([]string, 0, len(fields))
	for f := range fields {
		names = append(names, f)
	}
	d.pairs(n, func(k, val *yaml.Node) {
		f, ok := fields[k.Value]
		if !ok {
			hint := ""
			if best := conf.Nearest(k.Value, names); best != "" {
				hint = fmt.Sprintf(": did you mean %q?", best)
			} else {
				hint = ": known are " + strings.Join(names, ", ") // sorted by Nearest
			}
			d.fault(k.Line, "%sunknown key %q%s", label(name), k.Value, hint)
			return
		}
		d.value(val, f, k.Value)
	})
}

// collect lists the fields of a struct by their YAML key, embedded ones included.
func collect(v reflect.Value, into map[string]reflect.Value) {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Anonymous {
			collect(v.Field(i), into)
			continue
		}
		if key := f.Tag.Get("yaml"); key != "" {
			into[key] = v.Field(i)
		}
	}
}

func label(name string) string {
	if name == "" {
		return ""
	}
	return name + ": "
}

// duration is a time.Duration written as in Go: 500ms, 5s, 2m.
type duration time.Duration

func (t *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil || v <= 0 {
		return fmt.Errorf("%q: want a duration with its unit, as in 500ms, 5s or 2m", b)
	}
	*t = duration(v)
	return nil
}
