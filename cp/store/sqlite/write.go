package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/autonomyops/autonomy/cp/store"
)

// op is one queued write. run sees the transaction and must decide before it
// changes anything: an error of its own (refused) leaves the others alone.
type op struct {
	kind   string
	events int   // 0: may use the reserve
	bytes  int64 // estimate of what it adds to the database
	run    func(ctx context.Context, t *tx) error

	refused error         // run's answer, valid after done
	failed  error         // the transaction's
	done    chan struct{} // closed when the answer stands
}

// refusal marks an error by which run declines; any other error is the
// database's and fails the transaction.
type refusal struct{ err error }

func (r refusal) Error() string { return r.err.Error() }
func (r refusal) Unwrap() error { return r.err }

// do queues o and waits for its commit.
func (s *Store) do(ctx context.Context, o *op) error {
	o.done = make(chan struct{})
	select {
	case <-s.stop:
		return store.ErrClosed
	default:
	}
	select {
	case s.queue <- o:
	default:
		wait := time.NewTimer(busyWait)
		defer wait.Stop()
		select {
		case s.queue <- o:
		case <-wait.C:
			return store.ErrBusy
		case <-ctx.Done():
			return ctx.Err()
		case <-s.stop:
			return store.ErrClosed
		}
	}
	select {
	case <-o.done:
	case <-ctx.Done():
		return ctx.Err() // it may still be committed
	case <-s.stopped:
		select {
		case <-o.done:
		default:
			return store.ErrClosed
		}
	}
	if o.failed != nil {
		return o.failed
	}
	return o.refused
}

// writer is the one connection that writes, with its prepared statements.
type writer struct {
	conn  *sql.Conn
	stmts map[string]*sql.Stmt
}

func newWriter(ctx context.Context, s *Store) (*writer, error) {
	conn, err := s.write.Conn(ctx)
	if err != nil {
		return nil, err
	}
	return &writer{conn: conn, stmts: map[string]*sql.Stmt{}}, nil
}

func (w *writer) close() error {
	var errs []error
	for _, st := range w.stmts {
		errs = append(errs, st.Close())
	}
	return errors.Join(append(errs, w.conn.Close())...)
}

// tx is a running transaction of the writer.
type tx struct {
	w   *writer
	now time.Time
}

// stmt prepares a statement once.
func (t *tx) stmt(ctx context.Context, query string) (*sql.Stmt, error) {
	if st := t.w.stmts[query]; st != nil {
		return st, nil
	}
	st, err := t.w.conn.PrepareContext(ctx, query)
	if err != nil {
		return nil, fmt.Errorf("prepare: %w", err)
	}
	t.w.stmts[query] = st
	return st, nil
}

func (t *tx) exec(ctx context.Context, query string, args ...any) (sql.Result, error) {
	st, err := t.stmt(ctx, query)
	if err != nil {
		return nil, err
	}
	return st.ExecContext(ctx, args...)
}

func (t *tx) row(ctx context.Context, query string, args []any, dest ...any) error {
	st, err := t.stmt(ctx, query)
	if err != nil {
		return err
	}
	return st.QueryRowContext(ctx, args...).Scan(dest...)
}

// run is the writer goroutine. It ends when stop is closed and the queue is
// drained.
func (s *Store) run() {
	defer close(s.stopped)
	ctx := context.Background() // a started transaction is never abandoned half way
	prune := time.NewTicker(pruneEvery)
	defer prune.Stop()
	for {
		select {
		case o := <-s.queue:
			s.commit(ctx, s.gather(o))
		case <-prune.C:
			s.prune(ctx)
		case <-s.stop:
			for {
				select {
				case o := <-s.queue:
					s.commit(ctx, s.gather(o))
				default:
					return
				}
			}
		}
	}
}

// gather takes what waits behind first, without waiting for more: while one
// transaction syncs, the next one's operations collect by themselves.
func (s *Store) gather(first *op) []*op {
	batch, events := []*op{first}, first.events
	for events < maxBatchEvents && len(batch) < queueCap {
		select {
		case o := <-s.queue:
			batch = append(batch, o)
			events += o.events
		default:
			return batch
		}
	}
	return batch
}

// commit runs a batch in one transaction and answers.
func (s *Store) commit(ctx context.Context, batch []*op) {
	var admitted []*op
	room, err := s.room(ctx)
	for _, o := range batch {
		switch {
		case err != nil:
			o.failed = err
			close(o.done)
		case o.events > 0 && o.bytes > room.events || o.bytes > room.all:
			o.failed = store.ErrFull
			close(o.done)
		default:
			room.events -= o.bytes
			room.all -= o.bytes
			admitted = append(admitted, o)
		}
	}
	if len(admitted) == 0 {
		return
	}
	if err = s.transact(ctx, admitted); err != nil && len(admitted) > 1 {
		for _, o := range admitted {
			o.failed = s.transact(ctx, []*op{o})
			close(o.done)
		}
		return
	}
	for _, o := range admitted {
		o.failed = err
		close(o.done)
	}
}

func (s *Store) transact(ctx context.Context, batch []*op) (err error) {
	c := s.w.conn
	if _, err := c.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
		return s.note(fmt.Errorf("begin: %w", err))
	}
	defer func() {
		if err != nil {
			// SQLite has rolled back already after a full disk: then this fails, which is as well.
			_, _ = c.ExecContext(ctx, "ROLLBACK")
		}
	}()
	t := &tx{w: s.w, now: s.opts.Now().UTC()}
	for _, o := range batch {
		err := o.run(ctx, t)
		var r refusal
		switch {
		case errors.As(err, &r):
			o.refused = r.err
		case err != nil:
			return s.note(fmt.Errorf("%s: %w", o.kind, err))
		default:
			o.refused = nil
		}
	}
	if _, err := c.ExecContext(ctx, "COMMIT"); err != nil {
		return s.note(fmt.Errorf("commit: %w", err))
	}
	s.commits.Add(1)
	return nil
}

// space is how many bytes may still be added.
type space struct{ events, all int64 }

// room judges by the kernel's figures. Pages that retention freed count as room
// in the database, not on the file system.
func (s *Store) room(ctx context.Context) (space, error) {
	var free int64
	if err := s.w.conn.QueryRowContext(ctx, "PRAGMA freelist_count").Scan(&free); err != nil {
		return space{}, s.note(fmt.Errorf("count free pages: %w", err))
	}
	free *= pageSize
	left := s.opts.MaxBytes - s.fileBytes() + free
	disk, err := s.freeBytes()
	if err != nil {
		return space{}, err
	}
	disk -= s.opts.KeepFree
	return space{events: min(left-s.opts.MaxBytes/16, disk), all: min(left, disk)}, nil
}

// prune removes one batch of the oldest arrivals, and goes on while there are
// more and nobody waits.
func (s *Store) prune(ctx context.Context) {
	if s.opts.Retention <= 0 {
		return
	}
	for {
		n := 0
		o := &op{kind: "prune", run: func(ctx context.Context, t *tx) (err error) {
			n, err = t.prune(ctx, t.now.Add(-s.opts.Retention).UnixNano())
			return err
		}}
		if err := s.transact(ctx, []*op{o}); err != nil {
			s.opts.Logger.Error("removing old events failed", "error", err)
			return
		}
		s.pruned.Add(uint64(n))
		if n < pruneBatch || len(s.queue) > 0 {
			return
		}
		select {
		case <-s.stop:
			return
		default:
		}
	}
}

func (t *tx) prune(ctx context.Context, before int64) (int, error) {
	st, err := t.stmt(ctx, `SELECT id, node_id, log_id, seq, received_ns FROM events ORDER BY id LIMIT ?`)
	if err != nil {
		return 0, err
	}
	rows, err := st.QueryContext(ctx, pruneBatch)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	type logKey struct{ node, log string }
	highest := map[logKey]int64{}
	var last int64
	n := 0
	for rows.Next() {
		var id, seq, received int64
		var k logKey
		if err := rows.Scan(&id, &k.node, &k.log, &seq, &received); err != nil {
			return 0, err
		}
		if received >= before {
			break
		}
		highest[k] = max(highest[k], seq)
		last = id
		n++
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil || n == 0 {
		return 0, err
	}
	for k, seq := range highest {
		if seq == 0 {
			continue
		}
		if _, err := t.exec(ctx, `UPDATE logs SET pruned = max(pruned, ?) WHERE node_id = ? AND log_id = ?`, seq, k.node, k.log); err != nil {
			return 0, err
		}
	}
	_, err = t.exec(ctx, `DELETE FROM events WHERE id <= ?`, last)
	return n, err
}
