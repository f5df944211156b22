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
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/sync/errgroup"

	"github.com/autonomyops/autonomy/assurance"
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

	wal      *wal.Log
	recovery wal.Recovery
	report   atomic.Pointer[assurance.Report]
	refuse   atomic.Pointer[string] // why the platform is refused; nil: it is not
	keyring  *verify.Keyring        // nil: no --trust
	slots    *prepared.Slots
	faults   []prepared.Fallback
	local    *prepared.Active // from --policy
	tools    atomic.Pointer[tool.Registry]
	pipeline *call.Pipeline
	mcp      *mcp.Endpoint
	restarts *tool.Restarts   // of upstream MCP servers
	exporter *export.Exporter // nil: no endpoint
	poller   *release.Poller  // nil: no control plane
	client   *release.Client
	addrs    []string

	mu          sync.Mutex
	oldTools    []*tool.Registry // replaced by a reload; closed when no call can use them any more
	lastRejects time.Time
}

// Run starts a node and serves until ctx ends. Then it stops in this order:
// listeners, running calls (within Config.Shutdown), the release poller, the
// exporter (after it had a moment to drain), the log.
func Run(ctx context.Context, cfg Config, log *slog.Logger, stderr io.Writer) (err error) {
	n := &node{cfg: cfg, log: log, started: time.Now().UTC()}
	if err := vfs.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := n.assure(ctx); err != nil {
		return err // before anything is written: the directory may not be ours
	}
	if n.id, err = identity(cfg); err != nil {
		return err
	}
	if n.signer, n.keyID, err = logKey(cfg); err != nil {
		return err
	}
	n.log = log.With("node", n.id)
	// What the operator may have got wrong comes before the log, which takes its
	// time at the first start.
	if err := n.loadTrust(); err != nil {
		return err
	}
	if err := n.loadPolicy(ctx); err != nil {
		return err
	}
	if n.restarts, err = tool.OpenRestarts(filepath.Join(cfg.StateDir, "mcp-restarts.json")); err != nil {
		return run.Exit(run.Integrity, err)
	}
	registry, err := n.loadTools(ctx)
	if err != nil {
		return run.Exit(run.Usage, err)
	}
	n.tools.Store(registry)
	defer n.closeTools()
	if err := n.openLog(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.wal.Close()) }()
	n.pipeline = call.New(call.Options{
		Log: n.wal, Policies: n, Tools: n.tools.Load, Logger: n.log, NodeID: n.id, Labels: cfg.Labels,
		Assurance: func() string { return string(n.report.Load().Level) }, Agent: n.agent, Batched: cfg.Durability == "batched",
		Refuse: n.refused,
	})
	if err := n.connect(); err != nil {
		return err
	}
	unknown, err := n.pipeline.Recover(ctx)
	if err != nil {
		return run.Exit(run.Integrity, fmt.Errorf("recover the log's calls: %w", err))
	}
	var server *httpapi.Server
	n.mcp = mcp.New(mcp.Options{Pipeline: n.pipeline, Tools: n.tools.Load, Admit: func() (func(), bool) { return server.Admit() },
		Logger: n.log, MaxBodyBytes: int(cfg.MaxBody)})
	server = httpapi.New(httpapi.Options{
		MCP: n.mcp, Pipeline: n.pipeline, Tools: n.tools.Load, Status: n.status, Ready: n.notReady, Metrics: n.writeMetrics, Logger: n.log,
		MaxBodyBytes: int(cfg.MaxBody), MaxInFlight: cfg.MaxInFlight, MaxConns: cfg.MaxConns,
	})
	listeners, err := n.listen()
	if err != nil {
		return err
	}
	n.noteStart(unknown)

	// Four groups, stopped one after the other.
	servers, _ := errgroup.WithContext(context.Background())
	failed := make(chan error, len(listeners)+1)
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
	background.Go(func() { n.watchPlatform(loops) })
	background.Go(func() { n.reloads(loops) })
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
	}
	n.drain()
	stopExport()
	exports.Wait()
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
	go func() {
		var r result
		r.log, r.rec, r.err = wal.Open(filepath.Join(n.cfg.StateDir, "wal"), wal.Options{
			SegmentBytes: int64(n.cfg.WALSegment), MaxBytes: int64(n.cfg.WALMax), KeepFree: int64(n.cfg.KeepFree),
			SyncInterval: n.cfg.Sync, Watermark: n.cfg.CP != "" && n.cfg.OTLP != "", Logger: n.log,
			Progress: n.provisioning(), Signer: n.signer, RingDir: n.cfg.WALRing,
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
	if errors.Is(r.err, wal.ErrDamaged) {
		return run.Exit(run.Integrity, fmt.Errorf("open the log: %w", r.err))
	}
	if r.err != nil {
		return fmt.Errorf("open the log: %w", r.err)
	}
	return nil
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

func (n *node) loadPolicy(ctx context.Context) error {
	var err error
	n.slots, n.faults, err = prepared.OpenSlots(ctx, filepath.Join(n.cfg.StateDir, "policy"), prepared.SlotsOptions{})
	if err != nil {
		return err
	}
	for _, f := range n.faults {
		n.log.Error("policy slot damaged", "slot", f.Slot, "why", f.Why, "replacement", f.Replacement)
	}
	if n.cfg.Policy == "" {
		return nil
	}
	b, err := prepared.ReadBundleFile(n.cfg.Policy, prepared.Limits{})
	if err != nil {
		return run.Exit(run.Usage, fmt.Errorf("--policy: %w", err))
	}
	p, err := prepared.Compile(ctx, b)
	if err != nil {
		return run.Exit(run.Usage, fmt.Errorf("--policy %s: %w", n.cfg.Policy, err))
	}
	n.local = &prepared.Active{Program: p, Meta: prepared.Meta{
		Digest: b.Digest, Ref: b.Ref(), Version: b.Version, Source: prepared.SourceLocal, ActivatedAt: n.started}}
	return nil
}

// Current is the policy in force: the active slot, or the operator's file while
// no release was ever activated. A damaged slot is no reason to take the file:
// then there is none, and calls are denied.
func (n *node) Current() *prepared.Active {
	if a := n.slots.Current(); a != nil {
		return a
	}
	if len(n.faults) == 0 {
		return n.local
	}
	return nil
}

func (n *node) loadTools(ctx context.Context) (*tool.Registry, error) {
	return tool.LoadContext(ctx, n.cfg.Tools, tool.Options{Logger: n.log, Restarts: n.restarts})
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
func (n *node) connect() error {
	if n.cfg.OTLP != "" {
		var err error
		n.exporter, err = export.New(export.Options{
			Log: n.wal, Endpoint: n.cfg.OTLP, Logger: n.log,
			Resource:    otlp.Resource{ServiceName: event.ServiceName, ServiceVersion: run.Version, InstanceID: n.id},
			Compression: n.cfg.OTLPPack, StateFile: filepath.Join(n.cfg.StateDir, "export.json"),
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

func (n *node) noteStart(unknown int) {
	n.note(wal.ClassLifecycle, event.NodeStarted, map[string]any{
		"version": run.Version, "durability": n.cfg.Durability, "assurance": n.report.Load().Level, "listen": n.addrs,
		"recovered_records": n.recovery.Records, "outcome_unknown": unknown,
	})
	for _, f := range n.faults {
		n.note(wal.ClassError, event.PolicyFallback, f)
	}
	if a := n.Current(); a != nil && a.Meta.Source == prepared.SourceLocal {
		n.note(wal.ClassLifecycle, event.PolicyLoaded, a.Meta)
	}
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
		if !run.Loopback(run.Addr(ln)) {
			return lns, run.Exitf(run.Usage, "socket activation handed over %s: only loopback addresses and Unix sockets are served", run.Addr(ln))
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

// reloads loads the tools anew at SIGHUP; a file with faults changes nothing.
// An export that is exhausted is resumed: the signal is an operator's act.
func (n *node) reloads(ctx context.Context) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
		}
		run.Notify("RELOADING=1")
		if err := n.restarts.Reset(); err != nil {
			n.log.Error("restarts of MCP servers not forgiven", "err", err)
		}
		registry, err := n.loadTools(ctx)
		if err != nil {
			n.log.Error("reload refused: the tools in force stay", "err", err)
		} else {
			n.retire(n.tools.Swap(registry))
			n.mcp.Refresh()
			n.log.Info("tools reloaded", "tools", len(registry.List()))
		}
		if n.exporter != nil && n.exporter.Status().State == export.Exhausted {
			if err := n.exporter.Resume(); err != nil {
				n.log.Error("export not resumed", "err", err)
			} else {
				n.log.Info("export resumed")
			}
		}
		run.Notify("READY=1")
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
	return out
}

func (n *node) writeMetrics(w io.Writer) {
	n.pipeline.WriteMetrics(w)
	if n.exporter != nil {
		n.exporter.WriteMetrics(w)
	}
	metrics.WriteGaugeUint64(w, "autonomy_node_mcp_sessions", uint64(n.mcp.Stats().Sessions))
	for _, u := range n.tools.Load().Upstreams() {
		metrics.WriteGaugeUint64(w, fmt.Sprintf(`autonomy_node_mcp_upstream_links{server=%q}`, u.Server), uint64(u.Links))
		metrics.WriteGaugeUint64(w, fmt.Sprintf(`autonomy_node_mcp_upstream_restarts{server=%q}`, u.Server), uint64(u.Restarts))
		metrics.WriteGaugeUint64(w, fmt.Sprintf(`autonomy_node_mcp_upstream_changed{server=%q}`, u.Server), uint64(len(u.Changed)))
	}
	st := n.wal.Stats()
	metrics.WriteGaugeUint64(w, "autonomy_node_wal_durable_seq", st.DurableSeq)
	metrics.WriteGaugeUint64(w, "autonomy_node_wal_used_bytes", uint64(st.UsedBytes))
	metrics.WriteGaugeUint64(w, "autonomy_node_wal_max_bytes", uint64(st.MaxBytes))
	metrics.WriteCounterUint64(w, "autonomy_node_wal_syncs_total", st.Syncs)
	metrics.WriteCounterUint64(w, "autonomy_node_wal_synced_records_total", st.SyncedRecords)
	metrics.WriteGaugeUint64(w, fmt.Sprintf(`autonomy_node_assurance_level{level=%q}`, n.report.Load().Level), 1)
	policy := uint64(0)
	if n.Current() != nil {
		policy = 1
	}
	metrics.WriteGaugeUint64(w, "autonomy_node_policy_active", policy)
	metrics.WriteGaugeUint64(w, "autonomy_node_policy_slot_faults", uint64(len(n.faults)))
	metrics.WriteProcessMetrics(w)
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
}

// PolicyStatus is the slots, and the operator's file while that is in force.
type PolicyStatus struct {
	prepared.SlotStatus
	Local *prepared.Meta `json:"local,omitempty"`
}

func (n *node) status() any {
	s := Status{NodeID: n.id, KeyID: n.keyID, Version: run.Version, StartedAt: n.started, Durability: n.cfg.Durability, Listen: n.addrs,
		NotReady: n.notReady(), Policy: PolicyStatus{SlotStatus: n.slots.Status()}, WAL: n.wal.Stats(), Labels: n.cfg.Labels, Assurance: *n.report.Load()}
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
