package node

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/autonomyops/autonomy/internal/oci"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/node/release"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/verify"
	"github.com/autonomyops/autonomy/verify/sigstore"
	"github.com/autonomyops/autonomy/wal"
)

// loadTrust reads the keyring of --trust.
func (n *node) loadTrust() error {
	if n.cfg.Trust == "" {
		return nil
	}
	f, err := os.Open(n.cfg.Trust)
	if err != nil {
		return run.Exit(run.Usage, fmt.Errorf("--trust: %w", err))
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, verify.MaxKeyringBytes+1))
	if err == nil {
		n.keyring, err = verify.ParseKeyring(data)
	}
	if err != nil {
		return run.Exit(run.Usage, fmt.Errorf("--trust %s: %w", n.cfg.Trust, err))
	}
	return nil
}

// connectReleases prepares the way on which releases come in. Nothing is dialled.
func (n *node) connectReleases() error {
	artifacts, err := sigstore.New(n.keyring)
	if err != nil {
		return run.Exit(run.Usage, fmt.Errorf("--trust %s: %w", n.cfg.Trust, err))
	}
	options := oci.Options{Mirror: n.cfg.Relay, PlainHTTP: n.cfg.PlainHTTP, MaxBlob: prepared.DefaultLimits.MaxBytes}
	if n.cfg.Relay != "" {
		options.TLS = n.clientTLS // our certificate is for our own relay, not for a registry
	}
	content, err := oci.New(options)
	if err != nil {
		return run.Exit(run.Usage, fmt.Errorf("--relay-url: %w", err))
	}
	if n.client, err = release.NewClient(n.cfg.CP, n.clientTLS); err != nil {
		return run.Exit(run.Usage, fmt.Errorf("--cp-url: %w", err))
	}
	n.poller, err = release.New(release.Options{
		CP: n.client, Fetch: release.Registry{Client: content}, Keyring: n.keyring, Artifact: artifacts, Slots: n.slots,
		Dir: filepath.Join(n.cfg.StateDir, "release"), NodeID: n.id, Channel: n.cfg.Channel, Interval: n.cfg.Poll,
		Runtime: run.Version, Logger: n.log, Admit: n.admit, Shadow: n.cfg.PolicyWatch,
		Note: func(eventType string, body any) { n.note(wal.ClassLifecycle, eventType, body) },
	})
	if err != nil {
		return run.Exit(run.Integrity, err)
	}
	return nil
}
