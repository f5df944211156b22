package main

import (
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"path/filepath"
	"strconv"
	"sync"

	bolt "go.etcd.io/bbolt"
	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/autonomyops/autonomy/bench/peers/leg"
)

var bucket = []byte("queue")

// boltLog is an outbox in bbolt: the usual answer to "write it down first".
type boltLog struct {
	db  *bolt.DB
	add func(func(*bolt.Tx) error) error
}

func openBoltDB(dir string, sync bool) (*bolt.DB, error) {
	db, err := bolt.Open(filepath.Join(dir, "queue.db"), 0o600,
		&bolt.Options{NoSync: !sync, FreelistType: bolt.FreelistMapType, NoFreelistSync: true})
	if err != nil {
		return nil, err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucket)
		return err
	})
	return db, err
}

func openBolt(dir string, s leg.Spec) (leg.Log, error) {
	db, err := openBoltDB(dir, s.Sync())
	if err != nil {
		return nil, err
	}
	return &boltLog{db, db.Update}, nil
}

// openBoltBatch is bbolt with its own batching.
func openBoltBatch(dir string, s leg.Spec) (leg.Log, error) {
	db, err := openBoltDB(dir, s.Sync())
	if err != nil {
		return nil, err
	}
	return &boltLog{db, db.Batch}, nil
}

func putBolt(tx *bolt.Tx, p []byte) error {
	b := tx.Bucket(bucket)
	b.FillPercent = 1 // keys only grow
	n, err := b.NextSequence()
	if err != nil {
		return err
	}
	return b.Put(binary.BigEndian.AppendUint64(nil, n), p)
}

func (l *boltLog) Append(p []byte) error {
	return l.add(func(tx *bolt.Tx) error { return putBolt(tx, p) })
}

func (l *boltLog) AppendBatch(ps [][]byte) error {
	return l.db.Update(func(tx *bolt.Tx) error {
		for _, p := range ps {
			if err := putBolt(tx, p); err != nil {
				return err
			}
		}
		return nil
	})
}

func (l *boltLog) Drain(fn func([]byte)) error {
	return l.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucket).ForEach(func(_, v []byte) error {
			fn(v)
			return nil
		})
	})
}

func (l *boltLog) Close() error { return l.db.Close() }

// fileStorage does to bbolt what the OpenTelemetry Collector's persistent queue
// does through the file_storage extension for each request: one transaction
// that puts the item under its decimal index, and the write index. fsync is on,
// which is not the extension's default.
type fileStorage struct {
	mu   sync.Mutex
	db   *bolt.DB
	next uint64
}

func openFileStorage(dir string, s leg.Spec) (leg.Log, error) {
	db, err := openBoltDB(dir, s.Sync())
	if err != nil {
		return nil, err
	}
	return &fileStorage{db: db}, nil
}

func (l *fileStorage) Append(p []byte) error {
	l.mu.Lock() // the queue's own
	defer l.mu.Unlock()
	return l.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucket)
		item := strconv.AppendUint(nil, l.next, 10)
		l.next++
		return errors.Join(b.Put(item, p), b.Put([]byte("wi"), binary.LittleEndian.AppendUint64(nil, l.next)))
	})
}

func (l *fileStorage) Close() error { return l.db.Close() }

// sqlite is an outbox in SQLite with its own write-ahead log.
type sqlite struct {
	mu     sync.Mutex
	db     *sql.DB
	conn   *sql.Conn
	insert *sql.Stmt
}

func openSQLite(dir string, s leg.Spec) (leg.Log, error) {
	mode := "OFF"
	if s.Sync() {
		mode = "FULL"
	}
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "queue.db")+"?_pragma=journal_mode(WAL)&_pragma=synchronous("+mode+")")
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	l := &sqlite{db: db}
	if l.conn, err = db.Conn(ctx); err == nil {
		_, err = l.conn.ExecContext(ctx, "create table if not exists queue(id integer primary key, record blob)")
	}
	if err == nil {
		l.insert, err = l.conn.PrepareContext(ctx, "insert into queue(record) values(?)")
	}
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return l, nil
}

func (l *sqlite) Append(p []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.insert.Exec(p)
	return err
}

func (l *sqlite) AppendBatch(ps [][]byte) error {
	ctx := context.Background()
	if _, err := l.conn.ExecContext(ctx, "begin"); err != nil {
		return err
	}
	for _, p := range ps {
		if _, err := l.insert.Exec(p); err != nil {
			return err
		}
	}
	_, err := l.conn.ExecContext(ctx, "commit")
	return err
}

func (l *sqlite) Drain(fn func([]byte)) (err error) {
	rows, err := l.conn.QueryContext(context.Background(), "select record from queue order by id")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	var p sql.RawBytes
	for rows.Next() {
		if err := rows.Scan(&p); err != nil {
			return err
		}
		fn(p)
	}
	return rows.Err()
}

func (l *sqlite) Close() error {
	return errors.Join(l.insert.Close(), l.conn.Close(), l.db.Close())
}
