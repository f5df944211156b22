// Package node is the agent on a machine: it wires the log, the policy slots,
// the tools, the API, the exporter and the release poller together, and stops
// them in order.
//
// Follow one allowed call: httpapi decodes it, call checks, evaluates, records
// and executes it, export ships the records. Follow one release: release polls,
// fetches, verifies and activates it, prepared swaps it in.
package node

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/autonomyops/autonomy/assurance"
	"github.com/autonomyops/autonomy/assurance/sandbox"
	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/export"
	"github.com/autonomyops/autonomy/node/httpapi"
	"github.com/autonomyops/autonomy/node/mcp"
	"github.com/autonomyops/autonomy/node/release"
	"github.com/autonomyops/autonomy/node/tool"
	"github.com/autonomyops/autonomy/node/trace"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/verify"
	"github.com/autonomyops/autonomy/wal"
)

// Daemon is autonomy-node, for its main and for "autonomy demo".
func Daemon() run.Daemon {
	c := Defaults()
	return run.Daemon{
		Name:      "autonomy-node",
		Short:     "decide, record and run the tool calls of AI agents on this machine\n('autonomy-node mcp --help': MCP on standard input and output)",
		EnvPrefix: EnvPrefix,
		Bind:      c.Bind,
		Validate:  c.Validate,
		Loaded: func(file string, again func(func(*pflag.FlagSet)) error) {
			c.file = file
			c.again = func() (Config, error) {
				next := Defaults()
				if err := again(next.Bind); err != nil {
					return next, err
				}
				return next, next.Validate()
			}
		},
		Run: func(ctx context.Context, log *slog.Logger, stderr io.Writer) error {
			err := Run(ctx, c, log, stderr)
			if ctx.Err() != nil && errors.Is(err, context.Canceled) {
				return nil // told to stop while it was starting
			}
			return err
		},
	}
}

// Stdio is "autonomy-node mcp": MCP on standard input and output, passed on to a
// node that runs.
func Stdio() run.Daemon { return mcp.Stdio() }

// node is what Run wires.
type node struct {
	cfg     Config
	id      string
	signer  crypto.Signer // of the log's checkpoints
	keyID   string
	log     *slog.Logger
	started time.Time

	wal       *wal.Log
	recovery  wal.Recovery
	noRing    string // why the log has no ring, if that was decided here
	report    atomic.Pointer[assurance.Report]
	refuse    atomic.Pointer[string] // why the platform is refused; nil: it is not
	keyring   *verify.Keyring        // nil: no --trust
	slots     *prepared.Slots
	faults    []prepared.Fallback
	local     *prepared.Active // from --policy
	sandbox   *sandbox.Sandbox
	tools     atomic.Pointer[tool.Registry]
	restarts  *tool.Restarts // of upstream MCP servers
	memory    *memory
	auth      *auth.Authenticator
	limits    *auth.Limits
	refusals  refusals
	pipeline  *call.Pipeline
	mcp       *mcp.Endpoint
	exporter  *export.Exporter // nil: no endpoint
	poller    *release.Poller  // nil: no control plane
	client    *release.Client
	clientTLS *tls.Config // for control plane and relay; nil: the system's roots
	addrs     []string

	tuning    atomic.Pointer[tuning]
	observed  atomic.Uint64 // calls, for choosing those that are logged
	flight    *flight       // nil: --slow-call is 0
	admin     *admin        // nil: no --admin-socket
	reloading sync.Mutex    // one reload at a time
	files     looks         // how they looked when they were read at start

	mu          sync.Mutex
	oldTools    []*tool.Registry // replaced by a reload; closed when no call can use them any more
	lastRejects time.Time

	callerProblems []string // as last recorded
}

// Run starts a node and serves until ctx ends. Then it stops in this order:
// listeners, running calls (within Config.Shutdown), the release poller, the
// exporter (after it had a moment to drain), the log.
func Run(ctx context.Context, cfg Config, log *slog.Logger, stderr io.Writer) (err error) {
	n := &node{cfg: cfg, log: log, started: time.Now().UTC()}
	if err := vfs.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	n.memory = limitMemory(int64(cfg.MemoryLimit), log)
	n.tuning.Store(cfg.tuning())
	// The probe waits for the kernel and the disk; the policy, which only reads, is
	// compiled meanwhile.
	compiled := make(chan error, 1)
	go func() { compiled <- n.compileLocal(ctx) }()
	err = n.assure(ctx)
	policyErr := <-compiled
	if err != nil {
		return err // before anything is written: the directory may not be ours
	}
	if n.id, err = identity(cfg); err != nil {
		return err
	}
	if n.signer, n.keyID, err = logKey(cfg); err != nil {
		return err
	}
	secret, err := recordSecret(cfg)
	if err != nil {
		return err
	}
	n.log = log.With("node", n.id)
	// What the operator may have got wrong comes before the log, which takes its
	// time at the first start.
	if err := n.loadTrust(); err != nil {
		return err
	}
	if policyErr != nil {
		return policyErr
	}
	if err := n.loadPolicy(ctx); err != nil {
		return err
	}
	if err := n.openSandbox(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.sandbox.Close()) }()
	if n.restarts, err = tool.OpenRestarts(filepath.Join(cfg.StateDir, "mcp-restarts.json")); err != nil {
		return run.Exit(run.Integrity, err)
	}
	n.files = look([]string{cfg.Tools, cfg.file}) // before they are read: a change from here on is seen
	registry, err := n.loadTools(ctx)
	if err != nil {
		return run.Exit(run.Usage, err)
	}
	n.tools.Store(registry)
	defer n.closeTools()
	if err := n.loadCallers(); err != nil {
		return err
	}
	if err := n.openLog(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.wal.Close()) }()
	defer n.slots.Close()
	var tracer call.Tracer // nil without an endpoint
	if cfg.Traces != "" {
		spans, err := trace.New(ctx, trace.Options{Endpoint: cfg.Traces, Ratio: cfg.TraceRatio, NodeID: n.id, Version: run.Version, Logger: n.log})
		if err != nil {
			return run.Exit(run.Usage, err)
		}
		defer func() {
			last, cancel := context.WithTimeout(context.Background(), drainTime)
			defer cancel()
			if err := spans.Close(last); err != nil {
				n.log.Warn("some spans were not sent", "err", err)
			}
		}()
		tracer = spans
	}
	n.pipeline = call.New(call.Options{
		Log: n.wal, Policies: n, Tools: n.tools.Load, Logger: n.log, NodeID: n.id, Labels: cfg.Labels,
		Assurance: func() string { return string(n.report.Load().Level) }, Agent: n.agent, Batched: cfg.Durability == "batched",
		Refuse: n.refused, Limits: n.limits, Secret: secret, CallsFile: filepath.Join(cfg.StateDir, "calls"), MaxCallIDs: cfg.MaxCallIDs,
		Gate: cfg.gate(n.memory.short.Load), Observe: n.observe, Tracer: tracer,
	})
	if err := n.connect(); err != nil {
		return err
	}
	if err := n.admitLocal(ctx); err != nil {
		return err
	}
	unknown, err := n.pipeline.Recover(ctx)
	if err != nil {
		return run.Exit(run.Integrity, fmt.Errorf("recover the log's calls: %w", err))
	}
	n.mcp = mcp.New(mcp.Options{Pipeline: n.pipeline, Tools: n.tools.Load, Logger: n.log, MaxBodyBytes: int(cfg.MaxBody)})
	server := httpapi.New(httpapi.Options{
		Pipeline: n.pipeline, Tools: n.tools.Load, Status: n.status, Ready: n.notReady, Metrics: n.writeMetrics, MCP: n.mcp, Logger: n.log,
		Auth: n.auth, AllowedHosts: cfg.Hosts, Refused: n.refusals.add,
		MaxBodyBytes: int(cfg.MaxBody), MaxBodyMemory: int64(cfg.MaxBodyMemory), MaxConns: cfg.MaxConns,
	})
	if cfg.SlowCall > 0 {
		if n.flight, err = openFlight(filepath.Join(cfg.StateDir, "flight"), int64(cfg.KeepFree), n.log); err != nil {
			return err
		}
	}
	listeners, err := n.listen()
	if err != nil {
		return err
	}
	if n.admin, err = n.openAdmin(cfg.Admin); err != nil {
		for _, ln := range listeners {
			err = errors.Join(err, ln.Close())
		}
		return err
	}
	n.noteStart(unknown)

	// Four groups, stopped one after the other.
	servers, _ := errgroup.WithContext(context.Background())
	failed := make(chan error, len(listeners)+3)
	for _, ln := range listeners {
		servers.Go(func() error {
			err := server.Serve(ln)
			if err != nil {
				failed <- err
			}
			return err
		})
	}
	loops, stopLoops := context.WithCancel(context.Background())
	defer stopLoops()
	var background sync.WaitGroup
	if n.poller != nil {
		background.Go(func() { n.poller.Run(loops) })
		background.Go(func() { n.followWatermark(loops) })
	}
	if cfg.Heartbeat > 0 {
		background.Go(func() { n.heartbeat(loops) })
	}
	if n.flight != nil {
		background.Go(func() { n.flight.run(loops) })
	}
	var admins sync.WaitGroup
	if n.admin != nil {
		admins.Go(func() {
			if err := n.admin.serve(); err != nil {
				failed <- err
			}
		})
	}
	background.Go(func() { n.memory.watch(loops.Done()) })
	background.Go(func() { n.watchPlatform(loops) })
	background.Go(func() { n.reloads(loops) })
	background.Go(func() { n.watchCallers(loops) })
	background.Go(func() { n.keepCalls(loops) })
	exporting, stopExport := context.WithCancel(context.Background())
	defer stopExport()
	var exports sync.WaitGroup
	exports.Go(func() {
		if err := n.runExport(exporting); err != nil {
			failed <- err
		}
	})
	if err := run.Ready(stderr, cfg.ReadyFile, n.addrs...); err != nil {
		failed <- err
	}
	select {
	case <-ctx.Done():
	case err = <-failed:
	}

	run.Notify("STOPPING=1")
	n.log.Info("stopping", "timeout", cfg.Shutdown)
	grace, cancel := context.WithTimeout(context.Background(), cfg.Shutdown)
	defer cancel()
	// A call of an MCP session does not hang on a connection: it is cancelled here.
	late := context.AfterFunc(grace, n.mcp.Close)
	if serr := server.Shutdown(grace); serr != nil {
		n.log.Warn("some calls did not end in time and were cancelled", "err", serr)
	}
	late()
	n.mcp.Close()
	_ = servers.Wait() // a listener's failure has gone through failed
	stopLoops()
	background.Wait()
	if n.client != nil {
		n.client.Close()
	}
	if _, nerr := n.pipeline.Note(wal.ClassLifecycle, event.NodeStopped, struct{}{}); nerr != nil {
		n.log.Warn("the stop is not recorded", "err", nerr)
	}
	if serr := n.wal.Sync(context.WithoutCancel(grace)); serr != nil {
		err = errors.Join(err, fmt.Errorf("make the log durable: %w", serr))
	} else {
		n.saveCalls(context.WithoutCancel(grace))
	}
	n.drain()
	stopExport()
	exports.Wait()
	if n.admin != nil { // last: an operator may want to see what a stop waits for
		err = errors.Join(err, n.admin.close())
		admins.Wait()
	}
	return err
}

// assure probes the platform and refuses to start below the minimum.
func (n *node) assure(ctx context.Context) error {
	level, err := assurance.ParseLevel(n.cfg.MinLevel)
	if err != nil {
		return run.Exit(run.Usage, err)
	}
	report := assurance.Probe(ctx, assurance.Options{StateDir: n.cfg.StateDir})
	n.report.Store(&report)
	if err := report.Meets(level); err != nil {
		return run.Exit(run.Assurance, fmt.Errorf("%w\nSee 'autonomy doctor' for what is missing and how to get it", err))
	}
	return nil
}

// refused says why the platform is refused, "" when it is not.
func (n *node) refused() string {
	if why := n.refuse.Load(); why != nil {
		return *why
	}
	return ""
}

// probeInterval is the time between two probes of the platform.
const probeInterval = time.Minute

// watchPlatform probes again and again: a change of the level is recorded, and
// below the minimum calls are denied until the platform is back.
func (n *node) watchPlatform(ctx context.Context) {
	level, err := assurance.ParseLevel(n.cfg.MinLevel)
	if err != nil {
		return // assure has refused it
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(probeInterval):
		}
		report := assurance.Probe(ctx, assurance.Options{StateDir: n.cfg.StateDir})
		if ctx.Err() != nil {
			return
		}
		var why *string
		if err := report.Meets(level); err != nil {
			text := err.Error()
			why = &text
		}
		n.refuse.Store(why)
		if was := n.report.Swap(&report); was.Level != report.Level {
			n.log.Warn("platform assurance changed", "was", was.Level, "is", report.Level)
			n.note(wal.ClassLifecycle, event.NodeAssurance, map[string]any{"was": was.Level, "is": report.Level, "refused": n.refused()})
		}
	}
}

// openLog opens the log. Making a large one takes its time: a stop in the middle
// does not wait for that. What was made so far is left behind as by a crash, and
// the next start goes on with it.
func (n *node) openLog(ctx context.Context) error {
	type result struct {
		log *wal.Log
		rec wal.Recovery
		err error
	}
	opened := make(chan result, 1)
	ring := n.ringDir()
	go func() {
		var r result
		r.log, r.rec, r.err = wal.Open(filepath.Join(n.cfg.StateDir, "wal"), wal.Options{
			SegmentBytes: int64(n.cfg.WALSegment), MaxBytes: int64(n.cfg.WALMax), KeepFree: int64(n.cfg.KeepFree),
			SyncInterval: n.cfg.Sync, Watermark: n.cfg.CP != "" && n.cfg.OTLP != "", Logger: n.log,
			Progress: n.provisioning(), Signer: n.signer, RingDir: ring,
		})
		opened <- r
	}()
	var r result
	select {
	case r = <-opened:
	case <-ctx.Done():
		return ctx.Err() // the process ends
	}
	n.wal, n.recovery = r.log, r.rec
	if r.err == nil {
		s := n.logStats()
		n.log.Info("write-ahead log is open", "mode", s.Mode, "why", s.Why)
	}
	if errors.Is(r.err, wal.ErrDamaged) {
		return run.Exit(run.Integrity, fmt.Errorf("open the log: %w", r.err))
	}
	if r.err != nil {
		return fmt.Errorf("open the log: %w", r.err)
	}
	return nil
}

// ringDir is where the log's ring goes; "": nowhere, and noRing says why. The
// ring holds only what the disk has not confirmed yet, for this process alone: to
// lose it is what a power cut does, too (docs/adr/0002).
func (n *node) ringDir() string {
	switch n.cfg.WALRing {
	case "none":
		n.noRing = "--wal-ring-dir is none"
		return ""
	case "auto":
		dir, err := run.RuntimeDir("node")
		if err != nil {
			n.noRing = strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		return dir
	}
	return n.cfg.WALRing
}

// logStats are the log's, with the reason why it has no ring if that was decided
// here.
func (n *node) logStats() wal.Stats {
	s := n.wal.Stats()
	if n.noRing != "" {
		s.Why = n.noRing
	}
	return s
}

// provisioning tells how far the first start is: it writes the whole log once.
func (n *node) provisioning() func(done, total int64) {
	next := time.Now().Add(time.Second)
	return func(done, total int64) {
		if time.Now().After(next) && total > 0 {
			n.log.Info("writing the log's segments, once", "percent", done*100/total, "bytes", total)
			next = time.Now().Add(time.Second)
		}
	}
}

func (n *node) loadTools(ctx context.Context) (*tool.Registry, error) {
	return tool.LoadContext(ctx, n.cfg.Tools, tool.Options{Logger: n.log, Sandbox: n.sandbox, Restarts: n.restarts})
}

// retire closes a registry that a reload replaced, once no call can hold it.
func (n *node) retire(old *tool.Registry) {
	old.Retire()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.oldTools = append(n.oldTools, old)
	time.AfterFunc(tool.MaxTimeout+n.cfg.Shutdown, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		i := slices.Index(n.oldTools, old)
		if i < 0 {
			return // the node has stopped
		}
		n.oldTools = slices.Delete(n.oldTools, i, i+1)
		if err := old.Close(); err != nil {
			n.log.Warn("close tools", "err", err)
		}
	})
}

func (n *node) closeTools() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, r := range append(n.oldTools, n.tools.Load()) {
		if err := r.Close(); err != nil {
			n.log.Warn("close tools", "err", err)
		}
	}
	n.oldTools = nil
}

// agent is the release that policy and records see.
func (n *node) agent() call.Agent {
	if n.poller == nil {
		return call.Agent{}
	}
	rec := n.poller.Active()
	if rec == nil {
		return call.Agent{}
	}
	return call.Agent{ID: rec.Agent, ReleaseID: rec.ReleaseID, Fingerprint: rec.Fingerprint}
}

// connect prepares the exporter and the poller; neither dials yet.
func (n *node) connect() (err error) {
	if n.clientTLS, err = run.ClientTLS(n.cfg.ClientCert, n.cfg.ClientKey, n.cfg.ServerCA); err != nil {
		return run.Exit(run.Usage, err)
	}
	if n.cfg.OTLP != "" {
		var conf *tls.Config
		if sameHost(n.cfg.OTLP, n.cfg.CP) {
			conf = n.clientTLS // a collector elsewhere is no part of ours
		}
		n.exporter, err = export.New(export.Options{
			Log: n.wal, Endpoint: n.cfg.OTLP, Logger: n.log,
			Resource:    otlp.Resource{ServiceName: event.ServiceName, ServiceVersion: run.Version, InstanceID: n.id},
			Compression: n.cfg.OTLPPack, TLS: conf, StateFile: filepath.Join(n.cfg.StateDir, "export.json"),
			MaxAttempts: export.AttemptsFor(n.cfg.OTLPOutage, export.DefaultMinBackoff, export.DefaultMaxBackoff),
			OnRejected:  n.rejected, OnExhausted: n.exportExhausted,
		})
		if err != nil {
			return run.Exit(run.Usage, err)
		}
	}
	if n.cfg.CP == "" {
		return nil
	}
	return n.connectReleases()
}

// sameHost reports whether two URLs name one host and port.
func sameHost(a, b string) bool {
	x, err := url.Parse(a)
	if err != nil || x.Host == "" {
		return false
	}
	y, err := url.Parse(b)
	return err == nil && strings.EqualFold(x.Host, y.Host)
}

// rejected records that the endpoint refused records for ever, at most once a
// minute: the record of it is itself exported, and may be refused too.
func (n *node) rejected(first, last uint64, count int64, why string) {
	n.mu.Lock()
	due := time.Since(n.lastRejects) > time.Minute
	if due {
		n.lastRejects = time.Now()
	}
	n.mu.Unlock()
	if due {
		n.note(wal.ClassError, event.ExportError, map[string]any{"first_seq": first, "last_seq": last, "rejected": count, "why": why})
	}
}

// exportExhausted records that delivery has ended until an operator resumes it.
// The record waits in the log with the others.
func (n *node) exportExhausted(why string) {
	n.note(wal.ClassError, event.ExportError, map[string]any{"state": export.Exhausted, "why": why})
}

// note records an event; a log that cannot take it is the log's error, which
// every call meets as well.
func (n *node) note(c wal.Class, eventType string, body any) {
	if _, err := n.pipeline.Note(c, eventType, body); err != nil {
		n.log.Error("event not recorded", "event_type", eventType, "err", err)
	}
}

// policyMismatch records that the compiled policy engine made a decision that
// OPA's interpreter does not make, which evaluates the policy from now on.
func (n *node) policyMismatch(m prepared.Mismatch) {
	const what = "self-check: the engines disagree; the interpreter's decision counts, and it evaluates this policy from now on"
	n.log.Error("policy "+what, "policy", m.Bundle.Ref(), "compiled", m.Compiled, "topdown", m.Topdown)
	if n.pipeline == nil {
		return // evaluated while starting, before there is a log
	}
	n.note(wal.ClassError, event.EvaluatorError, map[string]any{
		"policy_ref": m.Bundle.Ref(), "error": what, "compiled": m.Compiled, "topdown": m.Topdown})
}

func (n *node) noteStart(unknown int) {
	n.note(wal.ClassLifecycle, event.NodeStarted, map[string]any{
		"version": run.Version, "durability": n.cfg.Durability, "assurance": n.report.Load().Level, "listen": n.addrs,
		"recovered_records": n.recovery.Records, "outcome_unknown": unknown, "sandbox": n.sandbox.Layers(),
	})
	n.notePolicy()
	if unknown > 0 {
		n.log.Warn("calls were cut off before their outcome was recorded", "count", unknown)
	}
}

func (n *node) listen() (lns []net.Listener, err error) {
	defer func() {
		if err != nil {
			for _, ln := range lns {
				ln.Close()
			}
		}
	}()
	if lns, err = run.Activated(); err != nil {
		return nil, err
	}
	if len(lns) == 0 {
		for _, addr := range n.cfg.Listen {
			ln, err := run.Listen(addr, 0o660)
			if err != nil {
				return lns, err
			}
			lns = append(lns, ln)
		}
	}
	for _, ln := range lns {
		if err := n.cfg.mayListen(run.Addr(ln)); err != nil {
			return lns, run.Exitf(run.Usage, "%s, handed over by socket activation: %w", run.Addr(ln), err)
		}
		n.addrs = append(n.addrs, run.Addr(ln))
	}
	return lns, nil
}

func (n *node) heartbeat(ctx context.Context) {
	for {
		if n.wal.Durable() > 0 {
			body := map[string]any{"assurance": n.report.Load().Level, "not_ready": n.notReady(), "uptime_s": int64(time.Since(n.started).Seconds())}
			if a := n.Current(); a != nil {
				body["policy_ref"], body["policy_digest"] = a.Meta.Ref, a.Meta.Digest
			}
			n.note(wal.ClassLifecycle, event.NodeHeartbeat, body)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(n.cfg.Heartbeat):
		}
	}
}

// followWatermark lets the log recycle what the control plane holds durably,
// and the exporter send again what it does not hold although it was taken.
func (n *node) followWatermark(ctx context.Context) {
	for {
		seq, ok, err := n.client.Watermark(ctx, n.id, n.wal.ID())
		if err == nil {
			if !ok {
				seq = 0 // it holds nothing of this log
			}
			n.wal.SetWatermark(seq)
			if n.exporter != nil {
				n.exporter.SetWatermark(seq)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(n.cfg.Poll):
		}
	}
}

// runExport delivers the log. Without an endpoint nobody is waited for: the
// oldest records make room for new ones.
func (n *node) runExport(ctx context.Context) error {
	if n.exporter != nil {
		return n.exporter.Run(ctx)
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if durable := n.wal.Durable(); durable > n.wal.Cursor(wal.ClassLifecycle) {
			if err := n.wal.AdvanceAll(durable); err != nil {
				return fmt.Errorf("move the log's cursors: %w", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// drainTime is how long a stopping node tries to deliver what is left.
const drainTime = 2 * time.Second

func (n *node) drain() {
	if n.exporter == nil {
		return
	}
	for end := time.Now().Add(drainTime); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if s := n.exporter.Status(); s.Pending == 0 || s.State == export.Retrying || s.State == export.Exhausted {
			return
		}
	}
}

// notReady lists what keeps the node from serving calls.
func (n *node) notReady() []string {
	var out []string
	if n.Current() == nil {
		out = append(out, "policy: none is active")
	}
	switch st := n.wal.Stats(); {
	case st.Failed != "":
		out = append(out, "log: "+st.Failed)
	case st.Full:
		out = append(out, "log: at its ceiling, nothing delivered that could make room")
	}
	if why := n.refused(); why != "" {
		out = append(out, "assurance: "+why)
	}
	for _, why := range n.auth.Problems() {
		out = append(out, "callers: "+why)
	}
	return out
}

// Status is the body of GET /v1/status.
type Status struct {
	NodeID     string            `json:"node_id"`
	KeyID      string            `json:"key_id"` // signs the log's checkpoints; identity/node.pub
	Version    string            `json:"version"`
	StartedAt  time.Time         `json:"started_at"`
	Durability string            `json:"durability"`
	Listen     []string          `json:"listen"`
	NotReady   []string          `json:"not_ready,omitempty"`
	Policy     PolicyStatus      `json:"policy"`
	WAL        wal.Stats         `json:"wal"`
	Export     *export.Status    `json:"export,omitempty"`
	Release    *release.State    `json:"release,omitempty"`
	Tools      []string          `json:"tools"`
	Upstreams  []tool.Upstream   `json:"upstreams,omitempty"` // MCP servers
	MCP        mcp.Stats         `json:"mcp"`
	Labels     map[string]string `json:"labels,omitempty"`
	Assurance  assurance.Report  `json:"assurance"`
	Sandbox    []sandbox.Layer   `json:"sandbox"` // what holds programs here
}

// PolicyStatus is the slots, and the operator's file while that is in force.
type PolicyStatus struct {
	prepared.SlotStatus
	Local *prepared.Meta `json:"local,omitempty"`
}

func (n *node) status() any {
	s := Status{NodeID: n.id, KeyID: n.keyID, Version: run.Version, StartedAt: n.started, Durability: n.cfg.Durability, Listen: n.addrs,
		NotReady: n.notReady(), Policy: PolicyStatus{SlotStatus: n.slots.Status()}, WAL: n.logStats(), Labels: n.cfg.Labels, Assurance: *n.report.Load(), Sandbox: n.sandbox.Layers()}
	if a := n.Current(); a != nil && a == n.local {
		s.Policy.Local = &a.Meta
	}
	s.Upstreams, s.MCP = n.tools.Load().Upstreams(), n.mcp.Stats()
	for _, t := range n.tools.Load().List() {
		s.Tools = append(s.Tools, t.Kind)
	}
	if n.exporter != nil {
		e := n.exporter.Status()
		s.Export = &e
	}
	if n.poller != nil {
		r := n.poller.State()
		s.Release = &r
	}
	return s
}
