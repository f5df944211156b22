package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/record"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/autonomyops/autonomy/bench/peers/leg"
)

// pebble is the log writer of Pebble without the database above it. When it is
// to be durable it writes into files that were written before and takes them in
// turns, as Pebble recycles its logs.
type pebble struct {
	dir     string
	recycle bool
	sync    bool
	segment int64
	queue   chan struct{} // bounds the syncs under way: LogWriter panics otherwise

	mu    sync.Mutex // LogWriter takes one writer at a time
	w     *record.LogWriter
	n     int      // number of the current file
	files []string // recycle: oldest first
}

type pebbleWait struct {
	wg  sync.WaitGroup
	err error
}

var pebbleWaits = sync.Pool{New: func() any { return new(pebbleWait) }}

func openPebble(dir string, s leg.Spec) (leg.Log, error) {
	p := &pebble{dir: dir, recycle: s.Sync(), sync: s.Sync(), segment: s.Segment, queue: make(chan struct{}, record.SyncConcurrency-1)}
	if s.Mode == leg.Read {
		return p, nil // a log is not opened again for appending: Pebble starts a new one
	}
	if p.recycle {
		for i := range 3 {
			name := filepath.Join(dir, fmt.Sprintf("spare%d", i))
			if err := prewrite(name, s.Segment+1<<20); err != nil {
				return nil, err
			}
			p.files = append(p.files, name)
		}
	}
	return p, p.rotate()
}

// prewrite makes a file whose extents are all written.
func prewrite(name string, size int64) (err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for buf := make([]byte, 1<<20); size > 0; size -= int64(len(buf)) {
		if _, err := f.Write(buf); err != nil {
			return err
		}
	}
	return f.Sync()
}

// logNumber makes the number of a log, whose type is internal to Pebble: it is
// taken from the signature of a function that wants one.
func logNumber[T ~uint64](_ func(io.Reader, T) *record.Reader, n int) T { return T(n) }

func (p *pebble) path(n int) string { return filepath.Join(p.dir, fmt.Sprintf("%06d.log", n)) }

// rotate goes on in another file; mu is held.
func (p *pebble) rotate() error {
	if p.w != nil {
		if err := p.w.Close(); err != nil {
			return err
		}
	}
	p.n++
	var f vfs.File
	var err error
	if p.recycle {
		if f, err = vfs.Default.ReuseForWrite(p.files[0], p.path(p.n), vfs.WriteCategoryUnspecified); err == nil {
			p.files = append(p.files[1:], p.path(p.n))
		}
	} else {
		f, err = vfs.Default.Create(p.path(p.n), vfs.WriteCategoryUnspecified)
	}
	if err != nil {
		return err
	}
	o := vfs.SyncingFileOptions{NoSyncOnClose: true}
	if !p.recycle {
		o.PreallocateSize = int(p.segment)
	}
	p.w = record.NewLogWriter(vfs.NewSyncingFile(f, o), logNumber(record.NewReader, p.n), record.LogWriterConfig{
		WALFsyncLatency:     prometheus.NewHistogram(prometheus.HistogramOpts{}),
		QueueSemChan:        p.queue,
		WriteWALSyncOffsets: func() bool { return false },
	})
	return nil
}

func (p *pebble) write(b []byte) error {
	size, err := p.w.WriteRecord(b)
	if err == nil && size > p.segment {
		err = p.rotate()
	}
	return err
}

func (p *pebble) Append(b []byte) error {
	if !p.sync {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.write(b)
	}
	return p.syncRecord(b, nil)
}

func (p *pebble) AppendBatch(ps [][]byte) error {
	if p.sync {
		return p.syncRecord(ps[len(ps)-1], ps[:len(ps)-1])
	}
	for _, b := range ps {
		if err := p.write(b); err != nil {
			return err
		}
	}
	return nil
}

// syncRecord writes before without waiting, then b, and waits until all are
// durable.
func (p *pebble) syncRecord(b []byte, before [][]byte) error {
	x := pebbleWaits.Get().(*pebbleWait)
	x.wg.Add(1)
	p.queue <- struct{}{}
	p.mu.Lock()
	for _, r := range before {
		if _, err := p.w.WriteRecord(r); err != nil {
			p.mu.Unlock()
			return err
		}
	}
	size, err := p.w.SyncRecord(b, &x.wg, &x.err)
	if err == nil && size > p.segment {
		err = p.rotate()
	}
	p.mu.Unlock()
	if err != nil {
		return err
	}
	x.wg.Wait()
	err = x.err
	pebbleWaits.Put(x)
	return err
}

func (p *pebble) Drain(fn func([]byte)) error {
	names, err := fs.Glob(os.DirFS(p.dir), "*.log")
	if err != nil {
		return err
	}
	slices.Sort(names)
	buf := make([]byte, 64<<10)
	for _, name := range names {
		n, err := strconv.Atoi(strings.TrimSuffix(name, ".log"))
		if err != nil {
			return err
		}
		if err := drainPebble(filepath.Join(p.dir, name), n, buf, fn); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func drainPebble(name string, n int, buf []byte, fn func([]byte)) (err error) {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	rd := record.NewReader(f, logNumber(record.NewReader, n))
	for {
		r, err := rd.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		n, err := io.ReadFull(r, buf)
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("a record of %d bytes and more, want less: %w", n, err)
		}
		fn(buf[:n])
	}
}

func (p *pebble) Close() error {
	if p.w == nil {
		return nil
	}
	return p.w.Close()
}
