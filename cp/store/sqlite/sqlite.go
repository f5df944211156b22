// Package sqlite is the control plane's store on one machine: one SQLite file
// in WAL mode, driven by a pure Go SQLite.
//
// The life of a write: the caller's operation is queued, one goroutine takes
// what waits (up to maxBatchEvents), runs it all in one transaction with
// synchronous=FULL, and answers everyone after the commit reached the disk. So
// the price of a sync is shared by all who wait for it, and an answer means
// committed. Operations decide before they change: one that is refused leaves
// the transaction as it was for the others. When a transaction fails as a whole
// it is rolled back, and when it held several operations each is tried alone,
// so that one caller's flood does not fail another's report.
//
// Reads use a small pool of read-only connections and see the last commit; they
// never wait for the writer, nor it for them.
//
// Space: before a transaction the writer asks the kernel how large the files
// are and how much room the file system has. Events are refused (ErrFull) when
// the database could pass MaxBytes less a sixteenth, or when KeepFree would be
// entered; releases and reports may use that sixteenth. PRAGMA max_page_count
// is the last line. Retention deletes the oldest arrivals in small batches
// between transactions; freed pages are used again.
package sqlite

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pressly/goose/v3"
	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/vfs"
)

//go:embed migrations/*.sql
var migrations embed.FS

const (
	fileName = "cp.db"
	lockName = "cp.lock"
	pageSize = 4096

	queueCap       = 256              // write calls that may wait
	maxBatchEvents = 16384            // events of one transaction, unless one call has more
	busyWait       = time.Second      // how long a call waits for a place in the queue
	readers        = 4                // connections for reading
	cacheKiB       = 16 << 10         // page cache of the writer; a reader has a quarter
	walPages       = 4000             // pages of the WAL that start a checkpoint: 16 MiB
	minBytes       = 4 << 20          // smallest MaxBytes
	pruneEvery     = 10 * time.Second // between looks at the oldest events
	pruneBatch     = 2000             // events removed in one transaction
)

// Options of Open. Zero values mean the defaults of the fields.
type Options struct {
	Dir       string           // made when missing, 0700
	MaxBytes  int64            // ceiling over all files; default 10 GiB, at least 4 MiB
	KeepFree  int64            // bytes of the file system never to use; default 0
	Retention time.Duration    // events received longer ago are removed; 0: kept until the ceiling
	Logger    *slog.Logger     // default: discards
	Now       func() time.Time // default time.Now
}

// Store is a store.Store on SQLite.
type Store struct {
	opts  Options
	lock  *os.File
	write *sql.DB // the writer goroutine's
	read  *sql.DB
	path  string

	queue   chan *op
	stop    chan struct{} // closed by Close: no more operations
	stopped chan struct{} // closed by the writer at its end
	closing sync.Once

	commits, pruned atomic.Uint64
	fault           atomic.Pointer[error] // sticky: damage seen by any call
	w               *writer               // owned by the writer goroutine
}

var _ store.Store = (*Store)(nil)

// Open opens or makes the store in opts.Dir and brings its schema up to date.
// store.ErrLocked, store.ErrDamaged, store.ErrNewer.
func Open(ctx context.Context, opts Options) (_ *Store, err error) {
	if opts.MaxBytes == 0 {
		opts.MaxBytes = 10 << 30
	}
	if opts.MaxBytes < minBytes {
		return nil, fmt.Errorf("open store: a ceiling of %d bytes is too small, at least %d", opts.MaxBytes, minBytes)
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if err := vfs.MkdirAll(opts.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{
		opts: opts, path: filepath.Join(opts.Dir, fileName),
		queue: make(chan *op, queueCap), stop: make(chan struct{}), stopped: make(chan struct{}),
	}
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	if err := s.takeLock(); err != nil {
		return nil, err
	}
	// Made here so that it is never readable by others; SQLite gives its WAL the same mode.
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := errors.Join(f.Close(), vfs.SyncDir(opts.Dir)); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s.write, err = openDB(s.path, 1,
		"journal_mode(WAL)", "synchronous(FULL)", "temp_store(MEMORY)", "trusted_schema(0)",
		"cache_size(-"+strconv.Itoa(cacheKiB)+")", "wal_autocheckpoint("+strconv.Itoa(walPages)+")",
		"journal_size_limit("+strconv.Itoa(walPages*pageSize)+")",
		"max_page_count("+strconv.FormatInt(opts.MaxBytes/pageSize, 10)+")")
	if err != nil {
		return nil, err
	}
	if err := s.migrate(ctx); err != nil {
		return nil, fmt.Errorf("open store %s: %w", s.path, s.note(err))
	}
	s.read, err = openDB(s.path, readers, "query_only(1)", "temp_store(MEMORY)", "trusted_schema(0)",
		"cache_size(-"+strconv.Itoa(cacheKiB/4)+")")
	if err != nil {
		return nil, err
	}
	if s.w, err = newWriter(ctx, s); err != nil {
		return nil, fmt.Errorf("open store %s: %w", s.path, s.note(err))
	}
	go s.run()
	return s, nil
}

func openDB(path string, conns int, pragmas ...string) (*sql.DB, error) {
	q := url.Values{"_pragma": append([]string{"busy_timeout(5000)"}, pragmas...), "_txlock": {"immediate"}}
	if conns > 1 {
		q.Set("_txlock", "deferred")
	}
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: path}).EscapedPath()+"?"+q.Encode())
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db, nil
}

// takeLock keeps a second process out: two writers would each trust their own
// idea of what is held.
func (s *Store) takeLock() error {
	f, err := os.OpenFile(filepath.Join(s.opts.Dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	s.lock = f
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("open store %s: %w", s.opts.Dir, store.ErrLocked)
		}
		return fmt.Errorf("lock store: %w", err)
	}
	return nil
}

func (s *Store) migrate(ctx context.Context) error {
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, s.write, dir,
		goose.WithDisableGlobalRegistry(true), goose.WithLogger(goose.NopLogger()))
	if err != nil {
		return err
	}
	have, want, err := p.GetVersions(ctx)
	if err != nil {
		return err
	}
	if have > want {
		return fmt.Errorf("%w: it is at version %d, this program knows %d: use the release that wrote it, or a newer one", store.ErrNewer, have, want)
	}
	_, err = p.Up(ctx)
	return err
}

// Close commits what was queued, checkpoints and closes the files.
func (s *Store) Close() error {
	var err error
	s.closing.Do(func() {
		close(s.stop)
		<-s.stopped
		err = s.closeFiles()
	})
	return err
}

func (s *Store) closeFiles() error {
	var errs []error
	if s.w != nil {
		errs = append(errs, s.w.close())
	}
	for _, db := range []*sql.DB{s.read, s.write} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

// note turns SQLite's error codes into the store's errors.
func (s *Store) note(err error) error {
	var se *sqlite.Error
	if !errors.As(err, &se) {
		return err
	}
	switch se.Code() & 0xff {
	case sqlite3.SQLITE_FULL:
		return fmt.Errorf("%w: %w", store.ErrFull, err)
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		return fmt.Errorf("%w: %w", store.ErrBusy, err)
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		err = fmt.Errorf("%w: %w", store.ErrDamaged, err)
		s.fault.CompareAndSwap(nil, &err)
		return err
	}
	return err
}

// Ready implements store.Store.
func (s *Store) Ready(ctx context.Context) error {
	if p := s.fault.Load(); p != nil {
		return *p
	}
	select {
	case <-s.stop:
		return store.ErrClosed
	default:
	}
	var one int
	if err := s.read.QueryRowContext(ctx, "SELECT 1 FROM goose_db_version LIMIT 1").Scan(&one); err != nil {
		return s.note(err)
	}
	return s.do(ctx, &op{kind: "ready", events: 1, run: func(context.Context, *tx) error { return nil }})
}

// Stats implements store.Store.
func (s *Store) Stats() store.Stats {
	return store.Stats{
		Bytes: s.fileBytes(), MaxBytes: s.opts.MaxBytes,
		Queue: len(s.queue), QueueCap: cap(s.queue),
		Commits: s.commits.Load(), Pruned: s.pruned.Load(),
	}
}

// fileBytes is what the kernel says the database and its WAL occupy.
func (s *Store) fileBytes() int64 {
	var n int64
	for _, suffix := range []string{"", "-wal", "-shm"} {
		var st unix.Stat_t
		if unix.Stat(s.path+suffix, &st) == nil {
			n += max(st.Size, st.Blocks*512)
		}
	}
	return n
}

// freeBytes is what the file system has left for us.
func (s *Store) freeBytes() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.opts.Dir, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", s.opts.Dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}
