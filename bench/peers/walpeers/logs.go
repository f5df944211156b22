package main

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/hashicorp/raft"
	raftwal "github.com/hashicorp/raft-wal"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/tsdb/wlog"
	"github.com/prometheus/prometheus/util/compression"
	rosewal "github.com/rosedblabs/wal"
	tidwal "github.com/tidwall/wal"
	etcdwal "go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"github.com/autonomyops/autonomy/bench/peers/leg"
)

// tidwall/wal wants indexes in order from its caller: hence the mutex. It has
// no checksums.
type tidwall struct {
	mu    sync.Mutex
	log   *tidwal.Log
	last  uint64
	batch tidwal.Batch
}

func openTidwall(dir string, s leg.Spec) (leg.Log, error) {
	o := *tidwal.DefaultOptions
	o.NoSync, o.SegmentSize, o.NoCopy = !s.Sync(), int(s.Segment), true
	l, err := tidwal.Open(dir, &o)
	if err != nil {
		return nil, err
	}
	last, err := l.LastIndex()
	return &tidwall{log: l, last: last}, err
}

func (t *tidwall) Append(p []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last++
	return t.log.Write(t.last, p)
}

func (t *tidwall) AppendBatch(ps [][]byte) error {
	t.batch.Clear()
	for _, p := range ps {
		t.last++
		t.batch.Write(t.last, p)
	}
	return t.log.WriteBatch(&t.batch)
}

func (t *tidwall) Drain(fn func([]byte)) error {
	first, err := t.log.FirstIndex()
	if err != nil {
		return err
	}
	for i := first; i <= t.last; i++ {
		p, err := t.log.Read(i)
		if err != nil {
			return err
		}
		fn(p)
	}
	return nil
}

func (t *tidwall) Close() error { return t.log.Close() }

// raft-wal cannot be told not to sync.
type raftWAL struct {
	mu   sync.Mutex
	log  *raftwal.WAL
	last uint64
	logs []raft.Log
	ptrs []*raft.Log
}

func openRaftWAL(dir string, s leg.Spec) (leg.Log, error) {
	l, err := raftwal.Open(dir, raftwal.WithSegmentSize(int(s.Segment)))
	if err != nil {
		return nil, err
	}
	last, err := l.LastIndex()
	return &raftWAL{log: l, last: last}, err
}

func (r *raftWAL) Append(p []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.store(p)
}

func (r *raftWAL) AppendBatch(ps [][]byte) error { return r.store(ps...) }

func (r *raftWAL) store(ps ...[]byte) error {
	for len(r.logs) < len(ps) {
		r.logs = make([]raft.Log, max(2*len(r.logs), len(ps), 16))
	}
	r.ptrs = r.ptrs[:0]
	for i, p := range ps {
		r.last++
		r.logs[i] = raft.Log{Index: r.last, Data: p}
		r.ptrs = append(r.ptrs, &r.logs[i])
	}
	return r.log.StoreLogs(r.ptrs)
}

func (r *raftWAL) Drain(fn func([]byte)) error {
	first, err := r.log.FirstIndex()
	if err != nil {
		return err
	}
	var l raft.Log
	for i := first; i <= r.last; i++ {
		if err := r.log.GetLog(i, &l); err != nil {
			return err
		}
		fn(l.Data)
	}
	return nil
}

func (r *raftWAL) Close() error { return r.log.Close() }

// etcd's log decodes everything into memory when it is opened for appending, so
// a drain opens it anew, for reading.
type etcd struct {
	mu      sync.Mutex
	log     *etcdwal.WAL
	dir     string
	last    uint64
	indexes []uint64
	ptrs    []*raftpb.Entry
}

func openEtcd(dir string, s leg.Spec) (leg.Log, error) {
	etcdwal.SegmentSizeBytes = s.Segment
	dir = filepath.Join(dir, "wal") // it renames its directory into place
	e := &etcd{dir: dir}
	var err error
	if !etcdwal.Exist(dir) {
		e.log, err = etcdwal.Create(zap.NewNop(), dir, nil)
	} else if e.log, err = etcdwal.Open(zap.NewNop(), dir, etcdStart()); err == nil {
		_, _, entries, readErr := e.log.ReadAll()
		if err = readErr; err == nil && len(entries) > 0 {
			e.last = entries[len(entries)-1].GetIndex()
		}
	}
	if err != nil {
		return nil, err
	}
	if !s.Sync() {
		e.log.SetUnsafeNoFsync()
	}
	return e, nil
}

func etcdStart() *walpb.Snapshot { return &walpb.Snapshot{Index: new(uint64), Term: new(uint64)} }

func (e *etcd) Append(p []byte) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.save(p)
}

func (e *etcd) AppendBatch(ps [][]byte) error { return e.save(ps...) }

var etcdTerm uint64 = 1

func (e *etcd) save(ps ...[]byte) error {
	if len(e.indexes) < len(ps) {
		n := max(2*len(e.indexes), len(ps), 16)
		e.indexes, e.ptrs = make([]uint64, n), make([]*raftpb.Entry, n)
		for i := range e.ptrs {
			e.ptrs[i] = &raftpb.Entry{Index: &e.indexes[i], Term: &etcdTerm}
		}
	}
	for i, p := range ps {
		e.last++
		e.indexes[i], e.ptrs[i].Data = e.last, p
	}
	return e.log.Save(&raftpb.HardState{}, e.ptrs[:len(ps)])
}

func (e *etcd) Drain(fn func([]byte)) (err error) {
	l, err := etcdwal.OpenForRead(zap.NewNop(), e.dir, etcdStart())
	if err != nil {
		return err
	}
	defer func() {
		// It closes its directory, which a log opened for reading has none of.
		if closeErr := l.Close(); !errors.Is(closeErr, os.ErrInvalid) {
			err = errors.Join(err, closeErr)
		}
	}()
	_, _, entries, err := l.ReadAll()
	for _, x := range entries {
		fn(x.Data)
	}
	return err
}

func (e *etcd) Close() error { return e.log.Close() }

// Prometheus' log syncs when it is asked to.
type prom struct {
	log  *wlog.WL
	sync bool
}

func openProm(dir string, s leg.Spec) (leg.Log, error) {
	l, err := wlog.NewSize(slog.New(slog.DiscardHandler), prometheus.NewRegistry(), dir, int(s.Segment), compression.None)
	if err != nil {
		return nil, err
	}
	return &prom{l, s.Sync()}, nil
}

func (w *prom) Append(p []byte) error         { return w.store(p) }
func (w *prom) AppendBatch(ps [][]byte) error { return w.store(ps...) }

func (w *prom) store(ps ...[]byte) error {
	if err := w.log.Log(ps...); err != nil || !w.sync {
		return err
	}
	return w.log.Sync()
}

func (w *prom) Drain(fn func([]byte)) (err error) {
	sr, err := wlog.NewSegmentsReader(w.log.Dir())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sr.Close()) }()
	r := wlog.NewReader(sr)
	for r.Next() {
		fn(r.Record())
	}
	return r.Err()
}

func (w *prom) Close() error { return w.log.Close() }

// rosedb's WriteAll never syncs, whatever Options.Sync says.
type rose struct {
	log  *rosewal.WAL
	sync bool
}

func openRose(dir string, s leg.Spec) (leg.Log, error) {
	l, err := rosewal.Open(rosewal.Options{DirPath: dir, SegmentSize: s.Segment, SegmentFileExt: ".SEG", Sync: s.Sync()})
	if err != nil {
		return nil, err
	}
	return &rose{l, s.Sync()}, nil
}

func (r *rose) Append(p []byte) error {
	_, err := r.log.Write(p)
	return err
}

func (r *rose) AppendBatch(ps [][]byte) error {
	for _, p := range ps {
		r.log.PendingWrites(p)
	}
	if _, err := r.log.WriteAll(); err != nil || !r.sync {
		return err
	}
	return r.log.Sync()
}

func (r *rose) Drain(fn func([]byte)) error {
	for rd := r.log.NewReader(); ; {
		p, _, err := rd.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		fn(p)
	}
}

func (r *rose) Close() error { return r.log.Close() }
