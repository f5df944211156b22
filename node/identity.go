package node

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/verify"
)

// identity reads the node's name, or makes one and keeps it.
func identity(cfg Config) (string, error) {
	if cfg.NodeID != "" {
		return cfg.NodeID, nil
	}
	dir := filepath.Join(cfg.StateDir, "identity")
	path := filepath.Join(dir, "node.json")
	var id struct {
		NodeID string `json:"node_id"`
	}
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return "", fmt.Errorf("node identity: %w", err)
	default:
		if err := strictjson.Unmarshal(data, &id); err != nil || !nodeIDPattern.MatchString(id.NodeID) {
			return "", run.Exitf(run.Integrity, "node identity %s is damaged: restore it, or give --node-id", path)
		}
		return id.NodeID, nil
	}
	var b [5]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	id.NodeID = "node-" + hex.EncodeToString(b[:])
	if err := vfs.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	if err := vfs.WriteFile(path, fmt.Appendf(nil, "{\"node_id\":%q}\n", id.NodeID), 0o600); err != nil {
		return "", fmt.Errorf("node identity: %w", err)
	}
	return id.NodeID, nil
}

// logKey reads the key that signs the log's checkpoints, or makes one:
// identity/node.key (PKCS #8 PEM, 0600), and node.pub beside it for whoever
// verifies. A damaged key is an error, not a reason for a new one: what was
// signed with it would no longer verify.
func logKey(cfg Config) (signer crypto.Signer, keyID string, err error) {
	dir := filepath.Join(cfg.StateDir, "identity")
	path := filepath.Join(dir, "node.key")
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if data, err = newLogKey(dir, path); err != nil {
			return nil, "", fmt.Errorf("node key: %w", err)
		}
	case err != nil:
		return nil, "", fmt.Errorf("node key: %w", err)
	}
	signer, err = verify.ParsePrivateKey(data)
	if _, ok := signer.(ed25519.PrivateKey); err != nil || !ok {
		return nil, "", run.Exitf(run.Integrity, "node key %s is damaged: restore it. Removing it makes a new one, and what the old one signed needs the old node.pub to verify", path)
	}
	pub, err := verify.MarshalPublicKey(signer.Public())
	if err != nil {
		return nil, "", fmt.Errorf("node key: %w", err)
	}
	if err := vfs.WriteFile(filepath.Join(dir, "node.pub"), pub, 0o644); err != nil {
		return nil, "", fmt.Errorf("node key: %w", err)
	}
	keyID, err = verify.KeyID(signer.Public())
	return signer, keyID, err
}

func newLogKey(dir, path string) ([]byte, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	data := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err := vfs.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return data, vfs.WriteFile(path, data, 0o600)
}
