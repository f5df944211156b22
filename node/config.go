package node

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/export"
	"github.com/autonomyops/autonomy/node/httpapi"
	"github.com/autonomyops/autonomy/node/trace"
	"github.com/autonomyops/autonomy/prepared"
)

// EnvPrefix is put before a setting's name in the environment.
const EnvPrefix = "AUTONOMY_NODE_"

// Config is everything a node can be told. Each field is one flag, environment
// variable and line of the configuration file; Defaults and Bind hold the list.
type Config struct {
	Listen      []string          // host:port or unix:PATH
	TLSCert     string            // of TCP listeners; with TLSKey
	TLSKey      string            //
	TLSClientCA string            // callers show a certificate of these CAs
	TLSCRL      string            // revocation lists of these CAs
	Tokens      string            // token file
	Callers     string            // callers file: names and limits
	Anonymous   string            // loopback, none: who needs no credential
	Hosts       []string          // names in the Host header beside the listener's address
	StateDir    string            // wal/, policy/, release/, identity/
	Policy      string            // bundle file used while no slot is active; needs no signature
	PolicyCheck int               // one in so many decisions is made by both policy engines; 0: none
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
	ClientCert  string            // shown to control plane and relay; with ClientKey
	ClientKey   string            //
	ServerCA    string            // CAs of control plane and relay; empty: the system's
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
	MaxCallIDs  int  // remembered for idempotent replay
	PlainHTTP   bool // allow http:// registries beyond loopback

	// Under load.
	MaxBodyMemory conf.Size     // of all bodies being read
	MaxQueue      int           // calls that wait for one of the MaxInFlight places
	QueueWait     time.Duration // the longest they wait
	MemoryLimit   conf.Size     // of the process; 0: the cgroup's

	// For the operator.
	Admin      string        // Unix socket; empty: none
	SlowCall   time.Duration // a call that takes as long is logged, and traced; 0: none
	LogCalls   int           // one call in so many is logged; 0: none
	Traces     string        // OTLP endpoint for spans, http(s)://…/v1/traces; empty: none
	TraceRatio float64       // of the calls without a traceparent

	file  string                 // the configuration file, for the watch; empty: none
	again func() (Config, error) // reads the settings anew; nil: a reload takes the tools only
}

// Defaults are the values of a node that is told nothing.
func Defaults() Config {
	return Config{
		Listen:      []string{"127.0.0.1:7777"},
		Anonymous:   "loopback",
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
		MaxInFlight: call.DefaultMaxRunning,
		MaxConns:    httpapi.DefaultMaxConns,
		MaxCallIDs:  1 << 16,

		MaxBodyMemory: httpapi.DefaultMaxBodyMemory,
		MaxQueue:      call.DefaultMaxWaiting,
		QueueWait:     call.DefaultMaxWait,
		TraceRatio:    1,
	}
}

// Bind defines the flags of c on fs; c holds the defaults.
func (c *Config) Bind(fs *pflag.FlagSet) {
	fs.StringArrayVar(&c.Listen, "listen", c.Listen, "serve the API on `ADDR`: host:port or unix:PATH; repeatable; beyond loopback only with TLS and tokens or client certificates")
	fs.StringVar(&c.TLSCert, "tls-cert", c.TLSCert, "serve TLS on TCP with the certificate chain in PEM `FILE`")
	fs.StringVar(&c.TLSKey, "tls-key", c.TLSKey, "private key of --tls-cert, PEM `FILE`")
	fs.StringVar(&c.TLSClientCA, "tls-client-ca", c.TLSClientCA, "take client certificates of the CAs in PEM `FILE`; without --tokens, demand one")
	fs.StringVar(&c.TLSCRL, "tls-crl", c.TLSCRL, "refuse client certificates that the revocation lists in `FILE` name; read again when it changes")
	fs.StringVar(&c.Tokens, "tokens", c.Tokens, "take the bearer tokens of `FILE`, as 'autonomy token create' makes it; read again when it changes")
	fs.StringVar(&c.Callers, "callers", c.Callers, "name callers and limit them by `FILE`; read again when it changes")
	fs.StringVar(&c.Anonymous, "anonymous", c.Anonymous, "`WHO` needs no credential: loopback (connections from this machine), none")
	fs.StringArrayVar(&c.Hosts, "allowed-host", c.Hosts, "accept `NAME` in the Host header beside the listener's address; repeatable")
	fs.StringVar(&c.StateDir, "state-dir", c.StateDir, "keep log, policy slots and identity in `DIR`")
	fs.StringVar(&c.Policy, "policy", c.Policy, "use policy `BUNDLE` while no release is active")
	fs.IntVar(&c.PolicyCheck, "policy-self-check", c.PolicyCheck, "make one in `N` policy decisions by OPA's interpreter as well, and leave the policy to it where they differ; 0: none")
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
	fs.StringVar(&c.ClientCert, "client-cert", c.ClientCert, "show the certificate in PEM `FILE` to control plane and relay; read again for each connection")
	fs.StringVar(&c.ClientKey, "client-key", c.ClientKey, "private key of --client-cert, PEM `FILE`")
	fs.StringVar(&c.ServerCA, "server-ca", c.ServerCA, "take certificates of control plane and relay from the CAs in PEM `FILE` (default: the system's)")
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
	fs.Var(&c.MaxBodyMemory, "max-body-memory", "memory of all request bodies being read or waiting; above: 429")
	fs.IntVar(&c.MaxInFlight, "max-in-flight", c.MaxInFlight, "calls at one time; more wait")
	fs.IntVar(&c.MaxQueue, "max-queue", c.MaxQueue, "calls that wait for a place, at most half of them of one caller; above: 429")
	fs.DurationVar(&c.QueueWait, "queue-wait", c.QueueWait, "longest `TIME` a call waits for a place; then: 429")
	fs.IntVar(&c.MaxConns, "max-connections", c.MaxConns, "open connections; above: 503")
	fs.StringVar(&c.Admin, "admin-socket", c.Admin, "serve administration (reload, export resume, profiles) on the Unix socket `PATH`, for root and this user only")
	fs.DurationVar(&c.SlowCall, "slow-call", c.SlowCall, "log a call that takes `TIME` or longer, and write what the process did meanwhile to the state directory; 0: off")
	fs.IntVar(&c.LogCalls, "log-calls", c.LogCalls, "log one call in `N`; 1: every one, 0: none")
	fs.StringVar(&c.Traces, "trace-endpoint", c.Traces, "send a span of each call to the OTLP endpoint `URL`: http://HOST:PORT/v1/traces, or https (default: none)")
	fs.Float64Var(&c.TraceRatio, "trace-ratio", c.TraceRatio, "part of the calls without a traceparent that get a span, 0 to 1")
	fs.IntVar(&c.MaxCallIDs, "max-call-ids", c.MaxCallIDs, "call ids that are remembered; the oldest is forgotten, and may then run again")
	fs.Var(&c.MemoryLimit, "memory-limit", "memory that this process stays below, and near which it refuses calls; 0: the limit of its cgroup, if that has one")
	fs.BoolVar(&c.PlainHTTP, "allow-plain-http", c.PlainHTTP, "pull from registries over http:// beyond loopback")
}

// mayListen says why the node would not know its callers at addr.
func (c *Config) mayListen(addr string) error {
	switch {
	case run.Loopback(addr):
		return nil
	case c.TLSCert == "":
		return errors.New("other machines can reach this address, and tokens and calls would pass in the clear: give --tls-cert and --tls-key, or use 127.0.0.1:PORT or unix:PATH")
	case c.TLSClientCA == "" && c.Tokens == "":
		return errors.New("other machines can reach this address, and anyone could call tools: give --tokens or --tls-client-ca, so that callers are known")
	}
	return nil
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
		if err := c.mayListen(a); err != nil {
			fault("--listen %s: %w", a, err)
		}
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		fault("--tls-cert and --tls-key go together")
	}
	if c.TLSClientCA != "" && c.TLSCert == "" {
		fault("--tls-client-ca needs --tls-cert and --tls-key")
	}
	if c.TLSCRL != "" && c.TLSClientCA == "" {
		fault("--tls-crl needs --tls-client-ca")
	}
	if (c.ClientCert == "") != (c.ClientKey == "") {
		fault("--client-cert and --client-key go together")
	}
	if c.Anonymous != "loopback" && c.Anonymous != "none" {
		fault("--anonymous is %q, want loopback or none", c.Anonymous)
	}
	for _, h := range c.Hosts {
		if h == "" || strings.ContainsAny(h, ":/@ ") {
			fault("--allowed-host %q: want a name without scheme and port", h)
		}
	}
	if c.StateDir == "" {
		fault("--state-dir is needed: no home directory is known")
	}
	if c.PolicyCheck < 0 {
		fault("--policy-self-check is %d, want 0 for none, or one in how many decisions to check", c.PolicyCheck)
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
	if c.MaxCallIDs < 1 || c.MaxCallIDs > 1<<22 {
		fault("--max-call-ids is %d, want 1 to 4194304", c.MaxCallIDs)
	}
	if c.MaxBodyMemory < c.MaxBody || c.MaxBodyMemory > 16<<30 {
		fault("--max-body-memory is %s, want at least --max-body-bytes (%s) and at most 16GiB", c.MaxBodyMemory, c.MaxBody)
	}
	if c.Traces != "" {
		if err := trace.CheckEndpoint(c.Traces); err != nil {
			fault("--trace-endpoint: %w", err)
		}
	}
	if !(c.TraceRatio >= 0 && c.TraceRatio <= 1) {
		fault("--trace-ratio is %g, want 0 to 1", c.TraceRatio)
	}
	if c.SlowCall < 0 || c.SlowCall > time.Hour {
		fault("--slow-call is %s, want 0 to 1h", c.SlowCall)
	}
	if c.LogCalls < 0 {
		fault("--log-calls is %d, want 0 or more", c.LogCalls)
	}
	if c.MemoryLimit != 0 && c.MemoryLimit < 32<<20 {
		fault("--memory-limit is %s, want 0 or at least 32MiB", c.MemoryLimit)
	}
	if c.MaxQueue < 1 || c.MaxQueue > 1<<20 {
		fault("--max-queue is %d, want 1 to 1048576", c.MaxQueue)
	}
	if c.QueueWait < time.Millisecond || c.QueueWait > time.Minute {
		fault("--queue-wait is %s, want 1ms to 1m", c.QueueWait)
	}
	if c.MaxConns < 1 || c.MaxConns > 1<<20 {
		fault("--max-connections is %d, want 1 to 1048576", c.MaxConns)
	}
	return run.Exit(run.Usage, errors.Join(faults...))
}
