// Package relay keeps declared content next to the nodes that will need it and
// serves it with the upstream gone. It knows digests, never missions: it imports
// nothing of the node, the control plane or policy, and links neither sigstore
// nor a database (INV-10).
//
//	relay/oci       digests, names, manifests
//	relay/cache     content store under the disk ceiling
//	relay/upstream  pulls by digest from one registry
//	relay/prestage  signed lists, closures, staging order, publication
//	relay/serve     HTTP: the OCI pull API, lists, status
//
// Run owns everything. It starts: lock, store, lists, listeners, worker; ready
// once it listens, whether or not the upstream is there. It stops in this order:
// listeners accept no more, the worker ends (its blob under way is dropped),
// running transfers finish within the shutdown timeout, idle connections to the
// upstream close, the lock goes.
//
// The prestage list is signed and the relay checks it itself, with the keyring
// of package verify: the list may arrive through anybody. Content is checked by
// digest only; what a signature among the content is worth, the node decides.
package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/assurance/disk"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/relay/cache"
	"github.com/autonomyops/autonomy/relay/prestage"
	"github.com/autonomyops/autonomy/relay/serve"
	"github.com/autonomyops/autonomy/relay/upstream"
)

// Limits of the HTTP servers that no setting changes.
const (
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 16 << 10
)

// Daemon describes the program autonomy-relay.
func Daemon() run.Daemon {
	cfg := Defaults()
	return run.Daemon{
		Name:      "autonomy-relay",
		Short:     "keep declared content near the nodes and serve it, upstream or not",
		EnvPrefix: EnvPrefix,
		Bind:      cfg.Bind,
		Validate:  cfg.Validate,
		Run: func(ctx context.Context, log *slog.Logger, stderr io.Writer) error {
			return Run(ctx, cfg, log, stderr)
		},
	}
}

// Status is the body of GET /v1/status.
type Status struct {
	Version  string           `json:"version"`
	Upstream string           `json:"upstream"`
	Disk     disk.Usage       `json:"disk"`
	Blobs    int              `json:"blobs"`
	Evicted  uint64           `json:"evicted"` // blobs, since start
	Prestage prestage.Summary `json:"prestage"`
	Signed   bool             `json:"signed_prestage"` // lists need a signature
}

// Run serves until ctx ends, then stops in the order the package comment says.
// cfg must be valid. When it listens, it writes "listening on ADDR" to stderr
// and the ready file. Errors carry exit codes: a state directory that is shared
// or elsewhere 7, a damaged one 6, others 1.
func Run(ctx context.Context, cfg Config, log *slog.Logger, stderr io.Writer) (err error) {
	if err := cfg.Validate(); err != nil {
		return err
	}
	tlsConfig, err := run.ServerTLS(cfg.TLSCert, cfg.TLSKey, cfg.TLSClientCA)
	if err != nil {
		return run.Exit(run.Usage, err)
	}
	if tlsConfig != nil {
		tlsConfig.NextProtos = []string{"http/1.1"} // HTTP/2 would copy every byte through the process
	}
	root, unlock, err := takeStateDir(cfg.StateDir)
	if err != nil {
		return err
	}
	defer unlock()
	ceiling, err := disk.New(disk.Limits{Root: root, MaxBytes: int64(cfg.MaxBytes), KeepFree: int64(cfg.KeepFree), MinInodes: cfg.MinInodes})
	if err != nil {
		return err
	}
	store, err := cache.Open(root, ceiling)
	if err != nil {
		return err
	}
	client, err := upstream.New(upstream.Config{URL: cfg.Upstream, IdleTimeout: cfg.IdleTimeout, TotalTimeout: cfg.TotalTimeout, MinRate: int64(cfg.MinRate)})
	if err != nil {
		return run.Exit(run.Usage, err)
	}
	defer client.Close()
	stager, err := prestage.Open(prestage.Config{Dir: root, Cache: store, Upstream: client, Keyring: cfg.Trust,
		AllowUnsigned: cfg.AllowUnsigned, MaxAttempts: cfg.MaxAttempts, FirstPause: cfg.RetryPause, MaxPause: cfg.RetryPauseMax, Log: log})
	if errors.Is(err, prestage.ErrDamaged) {
		return run.Exit(run.Integrity, err)
	}
	if err != nil {
		return err
	}
	if cfg.AllowUnsigned {
		log.Warn("prestage lists are accepted without a signature: anyone who reaches the listener decides what this relay holds")
	}
	status := func() Status {
		usage, err := ceiling.Usage()
		if err != nil {
			log.Error("disk usage", "error", err)
		}
		return Status{Version: run.Version, Upstream: client.String(), Disk: usage, Blobs: store.Len(), Evicted: store.Evicted(),
			Prestage: stager.Summary(), Signed: cfg.Trust != ""}
	}
	handler := serve.New(serve.Config{
		Content: stager, Lists: stager, Open: store.Open, Log: log,
		Status: func() any { return status() },
		Ready: func() error {
			_, err := ceiling.Usage()
			return err
		},
		Full:    func(err error) bool { return errors.Is(err, disk.ErrCeilingExceeded) },
		Metrics: newMetrics(status),
	})

	var listeners []net.Listener
	closeAll := func() {
		for _, ln := range listeners {
			ln.Close()
		}
	}
	var addrs []string
	for _, addr := range cfg.Listen {
		ln, err := run.Listen(addr, 0o600)
		if err != nil {
			closeAll()
			return err
		}
		addrs = append(addrs, run.Addr(ln))
		ln = serve.LimitListener(ln, cfg.MaxConns)
		if tlsConfig != nil && ln.Addr().Network() != "unix" {
			ln = tls.NewListener(ln, tlsConfig)
		}
		listeners = append(listeners, ln)
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true) // HTTP/2 would copy blobs through user space
	server := &http.Server{
		Handler: handler, Protocols: &protocols, ReadHeaderTimeout: readHeaderTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeaderBytes, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}

	// From here on goroutines run: no return before wg.Wait.
	work, stopWork := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	failed := make(chan error, len(listeners))
	for _, ln := range listeners {
		wg.Go(func() {
			if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serve %s: %w", ln.Addr(), err)
			}
		})
	}
	wg.Go(func() { stager.Run(work) })

	if err = run.Ready(stderr, cfg.ReadyFile, addrs...); err == nil {
		log.Info("relay started", "addresses", addrs, "upstream", client.String(), "state_dir", root, "blobs", store.Len())
		select {
		case <-ctx.Done():
		case err = <-failed:
		}
	}
	run.Notify("STOPPING=1")
	deadline, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.Shutdown)
	defer cancel()
	stopWork()
	if serr := server.Shutdown(deadline); serr != nil {
		log.Warn("transfers cut off at shutdown", "error", serr)
		server.Close()
	}
	wg.Wait()
	log.Info("relay stopped")
	return err
}

// takeStateDir makes and checks the state directory, and locks it for this
// process. The lock is the kernel's: it goes with the process, however it ends.
func takeStateDir(dir string) (root string, unlock func(), err error) {
	if err := vfs.MkdirAll(dir, 0o700); err != nil {
		return "", nil, fmt.Errorf("state directory: %w", err)
	}
	root, err = disk.LocalRoot(dir, slices.Concat(cache.Dirs, prestage.Dirs)...)
	if errors.Is(err, disk.ErrNotLocal) {
		return "", nil, run.Exit(run.Assurance, err)
	}
	if err != nil {
		return "", nil, err
	}
	f, err := os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return "", nil, fmt.Errorf("state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return "", nil, fmt.Errorf("state directory %s is in use by another relay; stop it, or give this one its own --state-dir", root)
		}
		return "", nil, fmt.Errorf("lock state directory %s: %w", root, err)
	}
	return root, func() { f.Close() }, nil
}

func newMetrics(status func() Status) *metrics.Set {
	set := metrics.NewSet()
	gauge := func(name string, f func(Status) float64) {
		set.NewGauge(name, func() float64 { return f(status()) })
	}
	gauge("autonomy_relay_disk_used_bytes", func(s Status) float64 { return float64(s.Disk.Used) })
	gauge("autonomy_relay_disk_reserved_bytes", func(s Status) float64 { return float64(s.Disk.Reserved) })
	gauge("autonomy_relay_disk_max_bytes", func(s Status) float64 { return float64(s.Disk.MaxBytes) })
	gauge("autonomy_relay_disk_available_bytes", func(s Status) float64 { return float64(s.Disk.Available) })
	gauge("autonomy_relay_blobs", func(s Status) float64 { return float64(s.Blobs) })
	gauge("autonomy_relay_evicted_blobs_total", func(s Status) float64 { return float64(s.Evicted) })
	gauge("autonomy_relay_staged_bytes_total", func(s Status) float64 { return float64(s.Prestage.StagedBytes) })
	gauge("autonomy_relay_attempts_total", func(s Status) float64 { return float64(s.Prestage.Attempts) })
	gauge("autonomy_relay_attempt_failures_total", func(s Status) float64 { return float64(s.Prestage.Failures) })
	for _, state := range []string{prestage.Pending, prestage.Staging, prestage.Staged, prestage.Failed} {
		gauge(fmt.Sprintf("autonomy_relay_items{state=%q}", state), func(s Status) float64 { return float64(s.Prestage.Items[state]) })
	}
	return set
}
