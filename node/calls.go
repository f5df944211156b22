package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/vfs"
)

// secretBytes is the length of the node's secret.
const secretBytes = 32

// recordSecret reads the secret that keys digests in records, or makes one:
// identity/digest.key, in hexadecimal digits, 0600. Without it a record's
// digests of redacted params and outputs tell nothing. A damaged one is an
// error, not a reason for a new one: call ids of before would no longer match.
func recordSecret(cfg Config) ([]byte, error) {
	dir := filepath.Join(cfg.StateDir, "identity")
	path := filepath.Join(dir, "digest.key")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		secret := make([]byte, secretBytes)
		if _, err := rand.Read(secret); err != nil {
			return nil, fmt.Errorf("record secret: %w", err)
		}
		if err := vfs.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("record secret: %w", err)
		}
		if err := vfs.WriteFile(path, []byte(hex.EncodeToString(secret)+"\n"), 0o600); err != nil {
			return nil, fmt.Errorf("record secret: %w", err)
		}
		return secret, nil
	}
	if err != nil {
		return nil, fmt.Errorf("record secret: %w", err)
	}
	secret, err := hex.DecodeString(strings.TrimSpace(string(data)))
	if err != nil || len(secret) != secretBytes {
		return nil, run.Exitf(run.Integrity, "record secret %s is damaged: restore it. Removing it makes a new one, and calls with a call_id of before are then answered 409", path)
	}
	return secret, nil
}

// How often the finished calls are written down while the node runs, and how
// many records make it worth it. A start after a crash reads from there on.
const (
	saveInterval = time.Minute
	saveRecords  = 1 << 16
	saveTries    = 50 // moments at which no call may run, 20 ms apart
)

// keepCalls saves the finished calls now and then.
func (n *node) keepCalls(ctx context.Context) {
	saved := n.wal.Durable()
	tick := time.NewTicker(saveInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if n.wal.Durable() < saved+saveRecords {
			continue
		}
		for range saveTries {
			seq, idle := n.pipeline.Idle()
			if idle {
				if err := n.pipeline.SaveCalls(ctx, seq); err != nil {
					n.log.Warn("the next start reads more of the log", "err", err)
				}
				saved = seq
				break
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
}

// saveCalls saves them at the end, when all calls are over.
func (n *node) saveCalls(ctx context.Context) {
	seq, idle := n.pipeline.Idle()
	if !idle {
		return // one did not let itself be cancelled: the next start reads the log
	}
	if err := n.pipeline.SaveCalls(ctx, seq); err != nil {
		n.log.Warn("the next start reads more of the log", "err", err)
	}
}
