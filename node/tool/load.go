package tool

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/autonomyops/autonomy/assurance/sandbox"
	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/node/tool/echotool"
	"github.com/autonomyops/autonomy/node/tool/exectool"
	"github.com/autonomyops/autonomy/node/tool/fstool"
	"github.com/autonomyops/autonomy/node/tool/httptool"
)

// MaxFileBytes bounds tools.yaml. 1 MiB.
const MaxFileBytes = 1 << 20

// Load reads the tools file at path. An empty path gives tool.echo alone.
// Every fault of the file is reported at once, each with file and line.
func Load(path string, o Options) (*Registry, error) {
	return LoadContext(context.Background(), path, o)
}

// LoadContext is Load; the end of ctx ends the wait for upstream MCP servers,
// which start here.
func LoadContext(ctx context.Context, path string, o Options) (*Registry, error) {
	if path == "" {
		return Parse(nil, o)
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
	return parse(ctx, path, data, o)
}

// Parse is Load for bytes; errors name them tools.yaml. nil gives tool.echo
// alone, as no file does; an empty file is an error.
func Parse(data []byte, o Options) (*Registry, error) {
	if data == nil {
		data = []byte("tools: {tool.echo: {}}")
	}
	return parse(context.Background(), "tools.yaml", data, o)
}

func parse(ctx context.Context, file string, data []byte, o Options) (*Registry, error) {
	if len(data) > MaxFileBytes {
		return nil, fmt.Errorf("tools file %s: over %d bytes", file, MaxFileBytes)
	}
	d := &decoder{file: file}
	entries, servers, err := d.document(data)
	if err != nil {
		return nil, err
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Registry{tools: map[string]*Tool{}, log: o.Logger}
	for _, e := range entries {
		t, err := r.build(d, e, o)
		for _, err := range split(err) {
			d.fault(e.line, "%s: %w", e.kind, err)
		}
		if t != nil {
			r.tools[e.kind] = t
		}
	}
	r.connectAll(ctx, d, servers, o)
	r.checkNames(d)
	if err := errors.Join(d.faults...); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	for _, kind := range slices.Sorted(maps.Keys(r.tools)) {
		r.sorted = append(r.sorted, r.tools[kind])
	}
	return r, nil
}

// checkNames refuses names that two tools would have over MCP.
func (r *Registry) checkNames(d *decoder) {
	kinds := map[string]string{}
	for _, kind := range slices.Sorted(maps.Keys(r.tools)) {
		name := r.tools[kind].Name()
		if first, twice := kinds[name]; twice {
			d.faults = append(d.faults, fmt.Errorf("%s: %s and %s are both called %q over MCP: change mcp_name", d.file, first, kind, name))
		}
		kinds[name] = kind
	}
}

// split takes joined faults apart, so that each is reported with its line.
func split(err error) []error {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}

// entry is one tool of the file.
type entry struct {
	kind string
	line int
	node *yaml.Node
}

// What each kind of tool can be given in tools.yaml. The embedded common holds
// for all.
type (
	common struct {
		Description string   `yaml:"description"`
		Timeout     duration `yaml:"timeout"`
		MCPName     string   `yaml:"mcp_name"`
	}
	httpConfig struct {
		common
		Hosts        []string       `yaml:"hosts"`
		AllowPrivate []netip.Prefix `yaml:"allow_private"`
		MaxBytes     conf.Size      `yaml:"max_bytes"`
	}
	httpRequestConfig struct {
		httpConfig
		Methods []string `yaml:"methods"`
	}
	processConfig struct {
		common
		Env       []string  `yaml:"env"`
		Dir       string    `yaml:"dir"`
		OutputMax conf.Size `yaml:"output_max"`

		FS        []string          `yaml:"fs"`
		Egress    []string          `yaml:"egress"`
		MemoryMax conf.Size         `yaml:"memory_max"`
		PidsMax   int64             `yaml:"pids_max"`
		CPUMax    string            `yaml:"cpu_max"`
		IOMax     conf.Size         `yaml:"io_max"`
		TmpMax    conf.Size         `yaml:"tmp_max"`
		User      string            `yaml:"user"`
		Secrets   map[string]string `yaml:"secrets"`
	}
	execConfig struct {
		processConfig
		Argv   []string                  `yaml:"argv"`
		Params map[string]exectool.Param `yaml:"params"`
		Stdin  string                    `yaml:"stdin"`
	}
	fsConfig struct {
		common
		Root     string    `yaml:"root"`
		MaxBytes conf.Size `yaml:"max_bytes"`
	}
)

// exec is what every program is given.
func (c *processConfig) exec(o Options) exectool.Config {
	return exectool.Config{Env: c.Env, Dir: c.Dir, OutputMax: int64(c.OutputMax), FS: c.FS, Egress: c.Egress, User: c.User, Secrets: c.Secrets, Sandbox: o.Sandbox,
		Limits: sandbox.Limits{Memory: int64(c.MemoryMax), Pids: c.PidsMax, CPU: c.CPUMax, IO: int64(c.IOMax), Tmp: int64(c.TmpMax)}}
}

// kinds are the tools there are; execPrefix takes a name of the file's choice.
var kinds = []string{"tool.echo", "tool.exec.", "tool.fs.read", "tool.fs.write", "tool.http_get", "tool.http_request", "tool.shell"}

const execPrefix = "tool.exec."

var execName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,62}$`)

// defaultMethods are those of tool.http_request when none are configured.
var defaultMethods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}

// build makes the tool of e. A nil Tool means that faults were recorded.
func (r *Registry) build(d *decoder, e entry, o Options) (*Tool, error) {
	switch {
	case e.kind == "tool.echo":
		var c common
		if !d.decode(e.node, &c) {
			return nil, nil
		}
		return c.tool(e.kind, echotool.Description, echotool.Schema, echotool.Tool{})
	case e.kind == "tool.http_get":
		var c httpConfig
		if !d.decode(e.node, &c) {
			return nil, nil
		}
		return c.build(e.kind, "Fetch a URL of a listed host with GET.", nil, o)
	case e.kind == "tool.http_request":
		var c httpRequestConfig
		if !d.decode(e.node, &c) {
			return nil, nil
		}
		if c.Methods == nil {
			c.Methods = defaultMethods
		}
		return c.build(e.kind, "Send an HTTP request to a listed host.", c.Methods, o)
	case e.kind == "tool.shell":
		var c processConfig
		if !d.decode(e.node, &c) {
			return nil, nil
		}
		t, err := exectool.NewShell(c.exec(o))
		if err != nil {
			return nil, err
		}
		return c.tool(e.kind, exectool.ShellDescription, t.Schema(), t)
	case strings.HasPrefix(e.kind, execPrefix):
		var c execConfig
		if !execName.MatchString(e.kind[len(execPrefix):]) {
			return nil, errors.New("the name after tool.exec. wants lower-case letters, digits and _, at most 63")
		}
		if !d.decode(e.node, &c) {
			return nil, nil
		}
		cfg := c.exec(o)
		cfg.Argv, cfg.Params, cfg.Stdin = c.Argv, c.Params, c.Stdin
		t, err := exectool.New(cfg)
		if err != nil {
			return nil, err
		}
		return c.tool(e.kind, "Run "+c.Argv[0]+".", t.Schema(), t)
	case e.kind == "tool.fs.read", e.kind == "tool.fs.write":
		var c fsConfig
		if !d.decode(e.node, &c) {
			return nil, nil
		}
		open, description := fstool.NewRead, "Read a file under the tool's root."
		if e.kind == "tool.fs.write" {
			open, description = fstool.NewWrite, "Write a file under the tool's root, whole or not at all."
		}
		t, err := open(fstool.Config{Root: c.Root, MaxBytes: int64(c.MaxBytes)})
		if err != nil {
			return nil, err
		}
		r.closer = append(r.closer, t.Close)
		return c.tool(e.kind, description, t.Schema(), t)
	}
	if best := conf.Nearest(e.kind, slices.Clone(kinds)); best != "" {
		return nil, fmt.Errorf("no such tool: did you mean %q?", best)
	}
	return nil, fmt.Errorf("no such tool: there are %s (tool.exec. takes a name)", strings.Join(kinds, ", "))
}

func (c *httpConfig) build(kind, description string, methods []string, o Options) (*Tool, error) {
	t, err := httptool.New(httptool.Config{Hosts: c.Hosts, AllowPrivate: c.AllowPrivate, MaxBytes: int64(c.MaxBytes), Methods: methods, Resolver: o.Resolver})
	if err != nil {
		return nil, err
	}
	return c.tool(kind, description, t.Schema(), t)
}

// tool makes the Tool once its executor stands.
func (c *common) tool(kind, description string, schema json.RawMessage, e Executor) (*Tool, error) {
	limit := cmp.Or(time.Duration(c.Timeout), DefaultTimeout)
	if limit > MaxTimeout {
		return nil, fmt.Errorf("timeout %s is over the most that a tool may have, %s", limit, MaxTimeout)
	}
	if len(c.Description) > maxDescription {
		return nil, fmt.Errorf("description has %d bytes, at most %d", len(c.Description), maxDescription)
	}
	if c.MCPName != "" && !mcpName.MatchString(c.MCPName) {
		return nil, fmt.Errorf("mcp_name %q: want letters, digits, _, - and ., at most 128", c.MCPName)
	}
	t, err := New(kind, cmp.Or(c.Description, description), schema, limit, e)
	if err != nil {
		return nil, err
	}
	t.MCPName = c.MCPName
	return t, nil
}

// mcpName is what the protocol asks of a tool's name.
var mcpName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,128}$`)

// maxDescription bounds what is sent to every agent with GET /v1/tools.
const maxDescription = 4096
