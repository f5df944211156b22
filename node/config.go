package node

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/spf13/pflag"

	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/node/export"
	"github.com/autonomyops/autonomy/node/httpapi"
	"github.com/autonomyops/autonomy/prepared"
)

// EnvPrefix is put before a setting's name in the environment.
const EnvPrefix = "AUTONOMY_NODE_"

// Config is everything a node can be told. Each field is one flag, environment
// variable and line of the configuration file; Defaults and Bind hold the list.
type Config struct {
	Listen      []string          // host:port or unix:PATH; only loopback addresses and sockets
	StateDir    string            // wal/, policy/, release/, identity/
	Policy      string            // bundle file used while no slot is active; needs no signature
	PolicyGood  time.Duration     // in force for so long, a policy is known good
	PolicyWatch time.Duration     // a release's policy stays in shadow for so long; 0: not at all
	FailOpen    []string          // fields that may be left out to make a denied call an allowed one
	Tools       string            // tools.yaml; empty: tool.echo only
	Durability  string            // strict, batched
	Sync        time.Duration     // batched: the longest a decision is only in memory
	WALMax      conf.Size         // ceiling of the log
	WALSegment  conf.Size         // one slot of the log
	WALRing     string            // directory in memory for the ring of the log: auto, none (mapped files), or a path
	KeepFree    conf.Size         // bytes that the log never takes from the file system
	OTLP        string            // grpc://HOST:PORT, http://…; empty: not exported
	OTLPPack    string            // compression of exports: none, gzip, zstd; empty: by endpoint
	OTLPOutage  time.Duration     // absence of the endpoint after which export waits for an operator
	CP          string            // control plane; empty: no releases, no watermark
	Relay       string            // content is pulled through it; empty: from the registry
	Trust       string            // keyring file; required with CP
	Channel     string            // release channel
	Poll        time.Duration     // between polls of the control plane
	Heartbeat   time.Duration     // between node.heartbeat records
	MinLevel    string            // none, reduced, full
	NodeID      string            // default: made once, kept in identity/
	Labels      map[string]string // for policy and rollouts
	ReadyFile   string
	Shutdown    time.Duration // for running calls
	MaxBody     conf.Size
	MaxInFlight int
	MaxConns    int
	PlainHTTP   bool // allow http:// registries beyond loopback
}

// Defaults are the values of a node that is told nothing.
func Defaults() Config {
	return Config{
		Listen:      []string{"127.0.0.1:7777"},
		StateDir:    run.StateDir("node"),
		Durability:  "strict",
		Sync:        5 * time.Millisecond,
		WALMax:      1 << 30,
		WALSegment:  64 << 20,
		WALRing:     "auto",
		KeepFree:    256 << 20,
		PolicyGood:  10 * time.Minute,
		Channel:     "stable",
		Poll:        30 * time.Second,
		Heartbeat:   30 * time.Second,
		MinLevel:    "none",
		OTLPOutage:  24 * time.Hour,
		Shutdown:    10 * time.Second,
		MaxBody:     httpapi.DefaultMaxBodyBytes,
		MaxInFlight: httpapi.DefaultMaxInFlight,
		MaxConns:    httpapi.DefaultMaxConns,
	}
}

// Bind defines the flags of c on fs; c holds the defaults.
func (c *Config) Bind(fs *pflag.FlagSet) {
	fs.StringArrayVar(&c.Listen, "listen", c.Listen, "serve the API on `ADDR`: host:port on loopback, or unix:PATH; repeatable")
	fs.StringVar(&c.StateDir, "state-dir", c.StateDir, "keep log, policy slots and identity in `DIR`")
	fs.StringVar(&c.Policy, "policy", c.Policy, "use policy `BUNDLE` while no release is active")
	fs.DurationVar(&c.PolicyGood, "policy-health-window", c.PolicyGood, "a policy in force for `TIME` is known good: a later one that fails falls back to it")
	fs.DurationVar(&c.PolicyWatch, "policy-shadow", c.PolicyWatch, "evaluate a release's policy beside the one in force for `TIME` before it decides; 0: at once")
	fs.StringArrayVar(&c.FailOpen, "allow-fail-open", c.FailOpen, "let policies come into force that allow a denied call when `FIELD` (such as /params/header) is left out; recorded; repeatable")
	fs.StringVar(&c.Tools, "tools", c.Tools, "define tools by `FILE` (default: tool.echo only)")
	fs.StringVar(&c.Durability, "durability", c.Durability, "`strict` (decision on disk before its effect) or batched (within --sync-interval)")
	fs.DurationVar(&c.Sync, "sync-interval", c.Sync, "longest time a decision is only in memory, with --durability batched")
	fs.Var(&c.WALMax, "wal-max-bytes", "ceiling of the log on disk; at it, calls are denied")
	fs.Var(&c.WALSegment, "wal-segment-bytes", "size of one log segment")
	fs.StringVar(&c.WALRing, "wal-ring-dir", c.WALRing, "encode records in a ring in `DIR` on a tmpfs and write them past the page cache; auto: find one, none: mapped files")
	fs.Var(&c.KeepFree, "keep-free", "space of the file system that the log never takes")
	fs.StringVar(&c.OTLP, "otlp-endpoint", c.OTLP, "ship the log to `URL`: grpc://HOST:PORT, or http://… with the whole path")
	fs.StringVar(&c.OTLPPack, "otlp-compression", c.OTLPPack, "compress exports with `NAME`: none, gzip or zstd (default: gzip, and none for gRPC on loopback)")
	fs.DurationVar(&c.OTLPOutage, "otlp-max-outage", c.OTLPOutage, "after `TIME` of failed exports wait for an operator; records stay in the log")
	fs.StringVar(&c.CP, "cp-url", c.CP, "poll releases from the control plane at `URL`")
	fs.StringVar(&c.Relay, "relay-url", c.Relay, "pull release content through the relay at `URL`")
	fs.StringVar(&c.Trust, "trust", c.Trust, "trust the keys in `KEYRING`")
	fs.StringVar(&c.Channel, "channel", c.Channel, "follow release channel `NAME`")
	fs.DurationVar(&c.Poll, "poll-interval", c.Poll, "time between polls of the control plane")
	fs.DurationVar(&c.Heartbeat, "heartbeat-interval", c.Heartbeat, "time between heartbeat records; 0: none")
	fs.StringVar(&c.MinLevel, "assurance-min", c.MinLevel, "refuse to start below platform assurance `LEVEL`: none, reduced, full")
	fs.StringVar(&c.NodeID, "node-id", c.NodeID, "name of this node (default: made once, kept in the state directory)")
	fs.StringToStringVar(&c.Labels, "label", c.Labels, "label `k=v` that policy sees; repeatable")
	fs.StringVar(&c.ReadyFile, "ready-file", c.ReadyFile, "write the addresses to `FILE` when ready")
	fs.DurationVar(&c.Shutdown, "shutdown-timeout", c.Shutdown, "time for running calls at SIGTERM")
	fs.Var(&c.MaxBody, "max-body-bytes", "largest request body")
	fs.IntVar(&c.MaxInFlight, "max-in-flight", c.MaxInFlight, "calls at one time; above: 429")
	fs.IntVar(&c.MaxConns, "max-connections", c.MaxConns, "open connections")
	fs.BoolVar(&c.PlainHTTP, "allow-plain-http", c.PlainHTTP, "pull from registries over http:// beyond loopback")
}

var nodeIDPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}$`)

// Validate reports every fault at once, as usage errors.
func (c *Config) Validate() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if len(c.Listen) == 0 {
		fault("--listen: at least one address is needed")
	}
	for _, a := range c.Listen {
		if !run.Loopback(a) {
			fault("--listen %s: this version serves tools on loopback addresses and Unix sockets only, because it cannot yet tell remote callers apart; use 127.0.0.1:PORT or unix:PATH", a)
		}
	}
	if c.StateDir == "" {
		fault("--state-dir is needed: no home directory is known")
	}
	if c.Durability != "strict" && c.Durability != "batched" {
		fault("--durability is %q, want strict or batched", c.Durability)
	}
	if c.Sync < 100*time.Microsecond || c.Sync > 10*time.Second {
		fault("--sync-interval is %s, want 100µs to 10s", c.Sync)
	}
	if c.WALSegment < 1<<20 || c.WALSegment > 1<<30 {
		fault("--wal-segment-bytes is %s, want 1MiB to 1GiB", c.WALSegment)
	}
	if c.WALMax < 3*c.WALSegment {
		fault("--wal-max-bytes is %s, want at least three segments (3 × %s)", c.WALMax, c.WALSegment)
	}
	if c.WALRing != "auto" && c.WALRing != "none" && !filepath.IsAbs(c.WALRing) {
		fault("--wal-ring-dir is %q, want auto, none, or an absolute path", c.WALRing)
	}
	if c.KeepFree < 0 {
		fault("--keep-free is negative")
	}
	if c.OTLPPack != "" && !slices.Contains(export.Compressions, c.OTLPPack) {
		fault("--otlp-compression is %q, want none, gzip or zstd", c.OTLPPack)
	}
	if c.OTLPOutage < time.Minute || c.OTLPOutage > 366*24*time.Hour {
		fault("--otlp-max-outage is %s, want 1m to 8784h", c.OTLPOutage)
	}
	if c.CP != "" && c.Trust == "" {
		fault("--cp-url needs --trust KEYRING: a node trusts signatures, not the control plane")
	}
	for name, d := range map[string]time.Duration{"--poll-interval": c.Poll, "--shutdown-timeout": c.Shutdown} {
		if d < 50*time.Millisecond || d > 24*time.Hour {
			fault("%s is %s, want 50ms to 24h", name, d)
		}
	}
	if c.Heartbeat != 0 && (c.Heartbeat < 100*time.Millisecond || c.Heartbeat > 24*time.Hour) {
		fault("--heartbeat-interval is %s, want 0 or 100ms to 24h", c.Heartbeat)
	}
	if c.PolicyGood < 0 || c.PolicyGood > 30*24*time.Hour {
		fault("--policy-health-window is %s, want 0 to 720h", c.PolicyGood)
	}
	if c.PolicyWatch < 0 || c.PolicyWatch > 30*24*time.Hour {
		fault("--policy-shadow is %s, want 0 to 720h", c.PolicyWatch)
	}
	if err := prepared.CheckOverrides(c.FailOpen); err != nil {
		fault("--allow-fail-open: %w", err)
	}
	if c.MinLevel != "none" && c.MinLevel != "reduced" && c.MinLevel != "full" {
		fault("--assurance-min is %q, want none, reduced or full", c.MinLevel)
	}
	if c.NodeID != "" && !nodeIDPattern.MatchString(c.NodeID) {
		fault("--node-id %q: want letters, digits, '.', '_' and '-', at most 128", c.NodeID)
	}
	if c.MaxBody < 1<<10 || c.MaxBody > 16<<20 {
		fault("--max-body-bytes is %s, want 1KiB to 16MiB", c.MaxBody)
	}
	if c.MaxInFlight < 1 || c.MaxInFlight > 1<<16 {
		fault("--max-in-flight is %d, want 1 to 65536", c.MaxInFlight)
	}
	if c.MaxConns < 1 || c.MaxConns > 1<<20 {
		fault("--max-connections is %d, want 1 to 1048576", c.MaxConns)
	}
	return run.Exit(run.Usage, errors.Join(faults...))
}
