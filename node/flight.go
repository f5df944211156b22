package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/trace"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/vfs"
)

// flight is the runtime's flight recorder: it keeps the last seconds of what the
// scheduler, the collector and the system calls did, and when a call was slow
// writes them to a file of the state directory, for "go tool trace".
//
// The files are few and bounded: flightFiles of about flightBytes, the oldest
// goes first; none is written when that would enter keep-free. Between two lies
// flightPause: a node that is slow all the time is not made slower by telling so.
type flight struct {
	dir      string
	keepFree int64
	log      *slog.Logger
	rec      *trace.FlightRecorder
	slow     chan string // audit ids, capacity 1: who finds it full is dropped
	pause    time.Duration

	mu sync.Mutex // one WriteTo at a time
}

const (
	flightFiles = 8
	flightBytes = 4 << 20 // hint to the runtime; a file may be a little larger
	flightAge   = 5 * time.Second
	flightPause = 30 * time.Second
)

func openFlight(dir string, keepFree int64, log *slog.Logger) (*flight, error) {
	f := &flight{dir: dir, keepFree: keepFree, log: log, slow: make(chan string, 1), pause: flightPause,
		rec: trace.NewFlightRecorder(trace.FlightRecorderConfig{MinAge: flightAge, MaxBytes: flightBytes})}
	if err := vfs.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("flight recorder: %w", err)
	}
	if err := f.rec.Start(); err != nil {
		return nil, fmt.Errorf("flight recorder: %w", err)
	}
	return f, nil
}

// notice asks for a file about the call auditID. It never waits.
func (f *flight) notice(auditID string) {
	select {
	case f.slow <- auditID:
	default:
	}
}

// run writes the files until ctx ends.
func (f *flight) run(ctx context.Context) {
	defer f.rec.Stop()
	for {
		var id string
		select {
		case <-ctx.Done():
			return
		case id = <-f.slow:
		}
		if path, err := f.write(id); err != nil {
			f.log.Warn("flight recorder: no file", "audit_id", id, "err", err)
		} else {
			f.log.Warn("a call was slow: what the process did is in a file for 'go tool trace'", "audit_id", id, "file", path)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(f.pause):
		}
	}
}

const flightSuffix = ".trace"

// write puts the recorder's window into a file named after the call.
func (f *flight) write(auditID string) (string, error) {
	var window bytes.Buffer
	if err := f.writeTo(&window); err != nil {
		return "", err
	}
	if err := f.makeRoom(); err != nil {
		return "", err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(f.dir, &st); err != nil {
		return "", fmt.Errorf("statfs %s: %w", f.dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free-int64(window.Len()) < f.keepFree {
		return "", fmt.Errorf("%d bytes are free, %d are kept free (--keep-free)", free, f.keepFree)
	}
	name := time.Now().UTC().Format("20060102T150405.000Z") + "-" + auditID + flightSuffix // sorts by age
	path := filepath.Join(f.dir, name)
	if err := vfs.WriteFile(path, window.Bytes(), 0o600); err != nil {
		return "", err
	}
	return path, nil
}

// writeTo writes the recorder's window.
func (f *flight) writeTo(w io.Writer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.rec.WriteTo(w)
	return err
}

// makeRoom removes the oldest files until one more may be written.
func (f *flight) makeRoom() error {
	entries, err := os.ReadDir(f.dir) // sorted by name, so by age
	if err != nil {
		return err
	}
	entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return !strings.HasSuffix(e.Name(), flightSuffix) })
	for len(entries) >= flightFiles {
		if err := os.Remove(filepath.Join(f.dir, entries[0].Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		entries = entries[1:]
	}
	return nil
}
