package tool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/node/tool/httptool"
	"github.com/autonomyops/autonomy/node/tool/mcptool"
)

// MCPPrefix begins the kinds of tools that an upstream MCP server runs:
// tool.mcp.<server>.<name>.
const MCPPrefix = "tool.mcp."

// Restarts counts how often upstream MCP servers were started again.
type Restarts = mcptool.Ledger

// Upstream is how an upstream MCP server is now.
type Upstream = mcptool.Status

// Upstreams are the registry's upstream MCP servers.
func (r *Registry) Upstreams() []Upstream {
	var out []Upstream
	for _, s := range r.upstreams {
		out = append(out, s.Status())
	}
	return out
}

// OpenRestarts reads the counts at path, or begins them.
func OpenRestarts(path string) (*Restarts, error) { return mcptool.OpenLedger(path) }

type (
	// upstreamConfig is one server under "mcp".
	upstreamConfig struct {
		Argv         []string       `yaml:"argv"`
		Env          []string       `yaml:"env"`
		Dir          string         `yaml:"dir"`
		Processes    int            `yaml:"processes"`
		URL          string         `yaml:"url"`
		AllowPrivate []netip.Prefix `yaml:"allow_private"`
		TokenFile    string         `yaml:"token_file"`
		Protocol     string         `yaml:"protocol"`
		MaxCalls     int            `yaml:"max_calls"`
		MaxRestarts  int            `yaml:"max_restarts"`
		StartTimeout duration       `yaml:"start_timeout"`
		OutputMax    conf.Size      `yaml:"output_max"`
		Timeout      duration       `yaml:"timeout"`
		Optional     bool           `yaml:"optional"`
		Tools        *yaml.Node     `yaml:"tools"`
	}
	// upstreamTool is one of its tools.
	upstreamTool struct {
		common
		As     string `yaml:"as"`
		Digest string `yaml:"digest"`
		line   int
	}
)

// every is the key that lets in all tools of a server that are not named.
const every = "*"

var (
	serverName   = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`)
	upstreamName = regexp.MustCompile(`^[a-z0-9_-]{1,64}$`)
)

// maxToken bounds a token file, in bytes.
const maxToken = 8 << 10

// upstream is a server on its way into the registry.
type upstream struct {
	entry
	cfg   upstreamConfig
	tools map[string]upstreamTool
	conf  mcptool.Config

	server *mcptool.Server
	err    error
}

// connectAll starts the servers of the file side by side and builds their tools.
func (r *Registry) connectAll(ctx context.Context, d *decoder, entries []entry, o Options) {
	var ups []*upstream
	for _, e := range entries {
		u := &upstream{entry: e, tools: map[string]upstreamTool{}}
		if err := u.decode(d, o); err != nil {
			for _, err := range split(err) {
				d.fault(e.line, "%s: %w", e.kind, err)
			}
			continue
		}
		ups = append(ups, u)
	}
	if len(d.faults) > 0 {
		return // nothing is started for a file that is refused anyhow
	}
	var wg sync.WaitGroup
	for _, u := range ups {
		wg.Go(func() { u.server, u.err = mcptool.Open(ctx, u.conf) })
	}
	wg.Wait()
	for _, u := range ups {
		switch {
		case u.err != nil && u.cfg.Optional:
			o.Logger.Error("optional MCP server left out until the tools are reloaded", "server", u.kind, "err", u.err)
		case u.err != nil:
			for _, err := range split(u.err) {
				d.fault(u.line, "%s: %w", u.kind, err)
			}
		default:
			r.upstreams = append(r.upstreams, u.server)
			r.admit(d, u)
		}
	}
}

// decode reads the server's entry. Faults of the file go to d, of the values
// into the error.
func (u *upstream) decode(d *decoder, o Options) error {
	if !serverName.MatchString(u.kind) {
		return errors.New("a server's name wants lower-case letters, digits, _ and -, at most 32")
	}
	if !d.decode(u.node, &u.cfg) {
		return nil
	}
	c := &u.cfg
	if c.Tools == nil || c.Tools.Kind != yaml.MappingNode || len(c.Tools.Content) == 0 {
		return errors.New(`tools is missing: name the tools that agents may see, as in "tools: {search: {}}", or "*" for all`)
	}
	d.pairs(c.Tools, func(k, v *yaml.Node) {
		t := upstreamTool{line: k.Line}
		if d.decode(v, &t) {
			u.tools[k.Value] = t
		}
	})
	u.conf = mcptool.Config{Name: u.kind, Argv: c.Argv, Env: c.Env, Dir: c.Dir, Processes: c.Processes, Protocol: c.Protocol,
		MaxCalls: c.MaxCalls, MaxRestarts: c.MaxRestarts, StartTimeout: time.Duration(c.StartTimeout), OutputMax: int64(c.OutputMax),
		Ledger: o.Restarts, Logger: o.Logger}
	if c.URL == "" {
		if c.AllowPrivate != nil || c.TokenFile != "" {
			return errors.New("allow_private and token_file are for a url")
		}
		return nil
	}
	var err error
	if u.conf.Remote, err = httptool.NewGuard(c.URL, c.AllowPrivate, o.Resolver); err != nil {
		return fmt.Errorf("url: %w", err)
	}
	if c.TokenFile == "" {
		return nil
	}
	if !u.conf.Remote.Private() {
		return errors.New("token_file: a token goes over https, or http to an address of this machine")
	}
	token, err := os.ReadFile(c.TokenFile)
	if err != nil {
		return fmt.Errorf("token_file: %w", err)
	}
	text := strings.TrimSpace(string(token))
	if text == "" || len(text) > maxToken || strings.ContainsFunc(text, func(r rune) bool { return r <= 0x20 || r >= 0x7f }) {
		return fmt.Errorf("token_file %s: want one token of printable ASCII, at most %d bytes", c.TokenFile, maxToken)
	}
	u.conf.Header = map[string]string{"Authorization": "Bearer " + text}
	return nil
}

// admit registers the server's tools that the file lets in.
func (r *Registry) admit(d *decoder, u *upstream) {
	offered := map[string]bool{}
	for _, def := range u.server.Definitions() {
		offered[def.Name] = true
		t, named := u.tools[def.Name]
		if !named {
			var all bool
			if t, all = u.tools[every]; !all {
				continue
			}
		}
		built, err := u.build(def, t)
		if err == nil {
			if _, twice := r.tools[built.Kind]; twice {
				err = fmt.Errorf("%s is there already: give one of the two another name with \"as\"", built.Kind)
			}
		}
		if err != nil {
			d.fault(t.line, "%s: tool %q: %w", u.kind, def.Name, err)
			continue
		}
		r.tools[built.Kind] = built
	}
	for _, name := range slices.Sorted(maps.Keys(u.tools)) {
		if name != every && !offered[name] {
			hint := ": it has none"
			if names := slices.Sorted(maps.Keys(offered)); len(names) > 0 {
				hint = ": it has " + strings.Join(names[:min(len(names), 20)], ", ")
			}
			d.fault(u.tools[name].line, "%s: the server has no tool %q%s", u.kind, name, hint)
		}
	}
}

func (u *upstream) build(def mcptool.Definition, t upstreamTool) (*Tool, error) {
	name := cmp.Or(t.As, def.Name)
	if !upstreamName.MatchString(name) {
		return nil, errors.New(`no name for a kind: give it one with "as", of lower-case letters, digits, _ and -, at most 64`)
	}
	if len(def.Description) > maxDescription && t.Description == "" {
		return nil, fmt.Errorf("the server's description has %d bytes, at most %d: give one with \"description\"", len(def.Description), maxDescription)
	}
	t.Timeout = cmp.Or(t.Timeout, u.cfg.Timeout)
	built, err := t.tool(MCPPrefix+u.kind+"."+name, def.Description, def.InputSchema, u.server.Tool(def.Name))
	if err != nil {
		return nil, err
	}
	if err := built.pin(def.Digest); err != nil {
		return nil, err
	}
	if t.Digest != "" && t.Digest != built.Digest {
		return nil, fmt.Errorf("its definition has digest %s, and %s was accepted: look at what changed, then write the new one here", built.Digest, t.Digest)
	}
	return built, nil
}
