package tool

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"

	"go.yaml.in/yaml/v3"

	"github.com/autonomyops/autonomy/node/tool/echotool"
)

// MaxFileBytes bounds tools.yaml. 1 MiB.
const MaxFileBytes = 1 << 20

// Load reads the tools file at path. An empty path gives tool.echo alone.
// Every fault of the file is reported at once, each with file and line.
func Load(path string, o Options) (*Registry, error) {
	if path == "" {
		return Parse([]byte("tools: {tool.echo: {}}"), o)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("tools file: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("tools file %s: %w", path, err)
	}
	return parse(path, data, o)
}

// Parse is Load for bytes; errors name them tools.yaml.
func Parse(data []byte, o Options) (*Registry, error) { return parse("tools.yaml", data, o) }

func parse(file string, data []byte, o Options) (*Registry, error) {
	if len(data) > MaxFileBytes {
		return nil, fmt.Errorf("tools file %s: over %d bytes", file, MaxFileBytes)
	}
	d := &decoder{file: file}
	entries, err := d.document(data)
	if err != nil {
		return nil, err
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Registry{tools: map[string]*Tool{}, log: o.Logger}
	for _, e := range entries {
		t, err := r.build(d, e, o)
		if err != nil {
			d.fault(e.line, "%s: %w", e.kind, err)
		}
		if t != nil {
			r.tools[e.kind] = t
		}
	}
	if err := errors.Join(d.faults...); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	for _, kind := range slices.Sorted(maps.Keys(r.tools)) {
		r.sorted = append(r.sorted, r.tools[kind])
	}
	return r, nil
}

// entry is one tool of the file.
type entry struct {
	kind string
	line int
	node *yaml.Node
}

// common is what every kind of tool can be given.
type common struct {
	Description string   `yaml:"description"`
	Timeout     duration `yaml:"timeout"`
}

// build makes the tool of e. A nil Tool means that faults were recorded.
func (r *Registry) build(d *decoder, e entry, o Options) (*Tool, error) {
	switch e.kind {
	case "tool.echo":
		var c common
		if !d.decode(e.node, &c) {
			return nil, nil
		}
		return c.tool(e.kind, echotool.Description, echotool.Schema, echotool.Tool{})
	}
	return nil, errors.New("unknown tool")
}
