package mcptool

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/internal/vfs"
)

// Ledger counts the restarts of servers in a file, so that a restart of the
// node gives none back. nil counts nothing. It is safe for concurrent use.
type Ledger struct {
	path string

	mu     sync.Mutex
	counts map[string]int
}

// OpenLedger reads the file at path, or begins it. A damaged one is an error.
func OpenLedger(path string) (*Ledger, error) {
	l := &Ledger{path: path, counts: map[string]int{}}
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return l, nil
	case err != nil:
		return nil, fmt.Errorf("restarts of MCP servers: %w", err)
	}
	if err := strictjson.Unmarshal(data, &l.counts); err != nil {
		return nil, fmt.Errorf("restarts of MCP servers: %s: %w: delete the file to forget them", path, err)
	}
	return l, nil
}

// Reset forgives all servers: an operator has acted.
func (l *Ledger) Reset() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.counts) == 0 {
		return nil
	}
	clear(l.counts)
	return l.write()
}

func (l *Ledger) count(server string) int {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.counts[server]
}

// set is durable when it returns.
func (l *Ledger) set(server string, n int) error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if n == 0 {
		delete(l.counts, server)
	} else {
		l.counts[server] = n
	}
	return l.write()
}

func (l *Ledger) write() error {
	data, err := json.Marshal(l.counts)
	if err != nil {
		return err
	}
	if err := vfs.WriteFile(l.path, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("restarts of MCP servers: %s: %w", filepath.Base(l.path), err)
	}
	return nil
}
