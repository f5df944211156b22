// Package cp is the control plane: it keeps what nodes report and hands out
// the releases they should run. Nodes poll it; it never dials (INV-18).
//
//	Config -> Run: open the store, make the API, listen, announce, serve
//
// Run owns all goroutines and stops them in this order: listeners accept no
// more; long polls are answered; running requests end or are cut off after
// ShutdownTimeout; the store commits what was accepted and closes. So nothing
// that was acknowledged is lost by stopping, nor by being killed.
//
// cmd/autonomy-cp and "autonomy demo" import this package.
package cp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"github.com/autonomyops/autonomy/cp/api"
	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/cp/store/sqlite"
	"github.com/autonomyops/autonomy/cp/web"
	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/verify"
)

// Daemon is the program autonomy-cp.
func Daemon() run.Daemon {
	c := Default()
	return run.Daemon{
		Name: "autonomy-cp", Short: "keep what nodes report, hand out the releases they should run", EnvPrefix: "AUTONOMY_CP_",
		Bind:     c.Bind,
		Validate: func() error { return run.Exit(run.Usage, c.Validate()) },
		Run: func(ctx context.Context, log *slog.Logger, stderr io.Writer) error {
			return Run(ctx, c, stderr, log)
		},
	}
}

// Timeouts of a connection.
const (
	headerTimeout  = 5 * time.Second
	readTimeout    = 60 * time.Second // header and body
	writeTimeout   = 90 * time.Second // long polls and streams move it
	idleTimeout    = 2 * time.Minute
	maxHeaderBytes = 32 << 10
	maxFileBytes   = 1 << 20 // keyring and client CA
)

// Config is everything that can be set.
type Config struct {
	Listen          []string      // "host:port" or "unix:PATH"
	StateDir        string        // holds cp.db
	Store           string        // "sqlite"
	ReadyFile       string        // written when serving; "": none
	Trust           string        // keyring file; "": releases are stored unverified
	TLSCert, TLSKey string        // PEM files; "": plaintext, loopback only
	TLSClientCA     string        // PEM file: clients must have a certificate from it
	AllowedHosts    []string      // names beside localhost that Host may carry without TLS
	MaxBodyBytes    conf.Size     // of one request, also after decompression
	MaxDBBytes      conf.Size     // ceiling of the database's files
	KeepFree        conf.Size     // room on the file system never to use
	EventRetention  time.Duration // events received longer ago are removed; 0: kept until the ceiling
	StaleAfter      time.Duration // silence after which a node is stale
	PeerRate        float64       // requests per second of one peer; 0: not limited
	MaxWaiters      int           // long polls at one time
	ShutdownTimeout time.Duration
}

// Default is the configuration without any flag.
func Default() Config {
	return Config{
		Listen: []string{"127.0.0.1:8888"}, StateDir: run.StateDir("cp"), Store: "sqlite",
		MaxBodyBytes: 16 << 20, MaxDBBytes: 10 << 30, KeepFree: 256 << 20,
		EventRetention: 90 * 24 * time.Hour, StaleAfter: 90 * time.Second,
		PeerRate: 2000, MaxWaiters: 10000, ShutdownTimeout: 10 * time.Second,
	}
}

// Bind defines the flags; c holds the defaults and receives the values.
func (c *Config) Bind(fs *pflag.FlagSet) {
	fs.StringArrayVar(&c.Listen, "listen", c.Listen, "serve on `ADDR` (host:port or unix:PATH), repeatable; without TLS only loopback")
	fs.StringVar(&c.StateDir, "state-dir", c.StateDir, "keep the database in `DIR`")
	fs.StringVar(&c.Store, "store", c.Store, "where to keep data: sqlite (in the state directory)")
	fs.StringVar(&c.ReadyFile, "ready-file", c.ReadyFile, "write address and pid to `FILE` when serving")
	fs.StringVar(&c.Trust, "trust", c.Trust, "refuse releases that do not verify with the keyring `FILE`; without it they are stored unverified and nodes verify")
	fs.StringVar(&c.TLSCert, "tls-cert", c.TLSCert, "certificate chain `FILE` (PEM)")
	fs.StringVar(&c.TLSKey, "tls-key", c.TLSKey, "private key `FILE` (PEM)")
	fs.StringVar(&c.TLSClientCA, "tls-client-ca", c.TLSClientCA, "ask clients for a certificate signed by the CAs in `FILE` (PEM)")
	fs.StringArrayVar(&c.AllowedHosts, "allowed-host", c.AllowedHosts, "accept `NAME` in the Host header beside localhost, repeatable")
	fs.Var(&c.MaxBodyBytes, "max-body-bytes", "largest request body, also after decompression")
	fs.Var(&c.MaxDBBytes, "max-db-bytes", "ceiling of the database on disk; events are refused at 15/16 of it")
	fs.Var(&c.KeepFree, "keep-free", "room on the file system never to use")
	fs.DurationVar(&c.EventRetention, "event-retention", c.EventRetention, "remove events received longer ago than this; 0 keeps them until the ceiling")
	fs.DurationVar(&c.StaleAfter, "stale-after", c.StaleAfter, "call a node stale after this silence")
	fs.Float64Var(&c.PeerRate, "peer-rate", c.PeerRate, "requests per second of one peer; 0 does not limit")
	fs.IntVar(&c.MaxWaiters, "max-waiters", c.MaxWaiters, "long polls at one time")
	fs.DurationVar(&c.ShutdownTimeout, "shutdown-timeout", c.ShutdownTimeout, "how long running requests may take to end at shutdown")
}

// Validate reports all faults at once.
func (c *Config) Validate() error {
	var faults []error
	bad := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if len(c.Listen) == 0 {
		bad("--listen: want at least one address")
	}
	if c.StateDir == "" {
		bad("--state-dir: want a directory")
	}
	switch {
	case c.Store == "sqlite":
	case strings.HasPrefix(c.Store, "postgres://"), strings.HasPrefix(c.Store, "postgresql://"):
		bad("--store: PostgreSQL comes in a later release; this one keeps its data in SQLite: leave --store out and give --state-dir")
	default:
		bad("--store is not known: want sqlite")
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		bad("--tls-cert and --tls-key belong together: give both or none")
	}
	if c.TLSClientCA != "" && c.TLSCert == "" {
		bad("--tls-client-ca needs --tls-cert and --tls-key")
	}
	for _, addr := range c.Listen {
		if _, _, err := net.SplitHostPort(addr); err != nil && !strings.HasPrefix(addr, "unix:") {
			bad("--listen %q: want host:port or unix:PATH", addr)
			continue
		}
		switch {
		case run.Loopback(addr):
		case c.TLSCert == "":
			bad("--listen %s: without TLS only loopback addresses are served; give --tls-cert, --tls-key and --tls-client-ca, or listen on 127.0.0.1", addr)
		case c.TLSClientCA == "":
			bad("--listen %s: anyone could publish releases and events there; give --tls-client-ca so that clients must have a certificate, or listen on 127.0.0.1", addr)
		}
	}
	for _, f := range []struct {
		name       string
		val, least int64
	}{
		{"max-body-bytes", int64(c.MaxBodyBytes), 64 << 10}, {"max-db-bytes", int64(c.MaxDBBytes), 4 << 20}, {"keep-free", int64(c.KeepFree), 0},
		{"event-retention", int64(c.EventRetention), 0}, {"max-waiters", int64(c.MaxWaiters), 1},
	} {
		if f.val < f.least {
			bad("--%s: want at least %d", f.name, f.least)
		}
	}
	if c.MaxBodyBytes > 1<<30 {
		bad("--max-body-bytes: want at most 1GiB")
	}
	if c.StaleAfter <= 0 || c.ShutdownTimeout <= 0 {
		bad("--stale-after and --shutdown-timeout: want a positive duration")
	}
	if !(c.PeerRate >= 0) {
		bad("--peer-rate: want 0 or more")
	}
	return errors.Join(faults...)
}

// Run serves until ctx ends, then drains. stderr receives the lines "listening
// on ADDR". Errors carry an exit code (run.Code).
func Run(ctx context.Context, c Config, stderr io.Writer, log *slog.Logger) (err error) {
	if err := c.Validate(); err != nil {
		return run.Exit(run.Usage, err)
	}
	opts := api.Options{
		MaxBodyBytes: int64(c.MaxBodyBytes), StaleAfter: c.StaleAfter, PeerRate: c.PeerRate,
		MaxWaiters: c.MaxWaiters, AllowedHosts: c.AllowedHosts, Logger: log,
	}
	if c.Trust != "" {
		data, err := readFile(c.Trust)
		if err == nil {
			opts.Keyring, err = verify.ParseKeyring(data)
		}
		if err != nil {
			return run.Exitf(run.Usage, "--trust %s: %w", c.Trust, err)
		}
	}
	tlsConf, err := run.ServerTLS(c.TLSCert, c.TLSKey, c.TLSClientCA)
	if err != nil {
		return run.Exit(run.Usage, err)
	}
	st, err := sqlite.Open(ctx, sqlite.Options{
		Dir: c.StateDir, MaxBytes: int64(c.MaxDBBytes), KeepFree: int64(c.KeepFree), Retention: c.EventRetention, Logger: log,
	})
	switch {
	case errors.Is(err, store.ErrDamaged):
		return run.Exitf(run.Integrity, "%w: restore it from a backup, or move it away to start anew", err)
	case err != nil:
		return err
	}
	defer func() {
		if cerr := st.Close(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("close store: %w", cerr))
		}
	}()
	opts.Store = st
	opts.Web = web.New(st, c.StaleAfter, time.Now, log)
	handler := api.New(opts)

	listeners, err := listen(c.Listen)
	if err != nil {
		return err
	}
	srv := &http.Server{
		Handler: handler, TLSConfig: tlsConf,
		ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeaderBytes, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	var serving sync.WaitGroup
	failed := make(chan error, len(listeners))
	addrs := make([]string, len(listeners))
	for i, ln := range listeners {
		addrs[i] = run.Addr(ln)
		serving.Go(func() {
			serve := srv.Serve
			if tlsConf != nil {
				serve = func(ln net.Listener) error { return srv.ServeTLS(ln, "", "") }
			}
			if err := serve(ln); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serve %s: %w", run.Addr(ln), err)
			}
		})
	}
	if err = run.Ready(stderr, c.ReadyFile, addrs...); err == nil {
		if opts.Keyring == nil {
			log.Info("no --trust keyring: releases are stored unverified, nodes verify them")
		}
		select {
		case <-ctx.Done():
		case err = <-failed:
		}
	}
	run.Notify("STOPPING=1")
	handler.Drain()
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.ShutdownTimeout)
	defer cancel()
	if serr := srv.Shutdown(grace); serr != nil {
		log.Warn("requests were cut off at shutdown", "after", c.ShutdownTimeout)
		_ = srv.Close() // what is left is being cut off
	}
	serving.Wait()
	if c.ReadyFile != "" {
		if rerr := os.Remove(c.ReadyFile); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}

// listen opens all addresses, or none. Sockets from the service manager take
// the place of --listen.
func listen(addrs []string) ([]net.Listener, error) {
	out, err := run.Activated()
	if err != nil {
		return nil, err
	}
	if len(out) > 0 {
		for _, ln := range out {
			if a := run.Addr(ln); !run.Loopback(a) {
				return nil, run.Exitf(run.Usage, "socket activation: %s is not loopback; use --listen with TLS", a)
			}
		}
		return out, nil
	}
	for _, a := range addrs {
		ln, err := run.Listen(a, 0o660)
		if err != nil {
			for _, open := range out {
				err = errors.Join(err, open.Close())
			}
			return nil, err
		}
		out = append(out, ln)
	}
	return out, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err == nil && len(data) > maxFileBytes {
		err = fmt.Errorf("over %d bytes", maxFileBytes)
	}
	return data, err
}
