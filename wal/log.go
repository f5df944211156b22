// Package wal is the node's write-ahead log: every decision and action is here,
// durable, before the node acts on it. README.md has the bytes on disk and the
// argument why recovery is right.
//
// The life of a record: Reserve assigns the next sequence number and hands out
// that many bytes of a memory-mapped file; the caller encodes into them in
// place; Commit seals them with a keyed checksum. One goroutine at a time, the
// committer or somebody who waits, joins what has arrived into a group, writes a
// commit marker that continues a BLAKE3 chain, makes the whole group durable at
// once, and wakes everybody who waits. The mapped file is either a ring on a
// tmpfs, from which a commit writes to disk past the page cache, or the file on
// disk itself, which it syncs (see Mode). Readers get views. When all consumers
// are past a file and space is needed, it is used again.
//
// The files ("slots") are written in full when the log is made and never grow:
// the disk ceiling holds by construction, and a full disk can only be met then.
// A slot in use holds one segment. At the ceiling Reserve returns
// ErrCeilingExceeded and the caller must refuse what it cannot record.
//
// Sizes are bytes. Sequence numbers are dense and start at 1; 0 means none.
// All methods may be called from any goroutine, except that a Reservation
// belongs to the goroutine that made it. It imports internal/vfs only, may
// be imported by node and cmd/autonomy, and is the one place in the module that
// maps memory.
package wal

import (
	"context"
	"crypto"
	crand "crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"
)

// Class says which consumer's cursor a record belongs to.
type Class uint8

// The classes.
const (
	ClassError Class = iota
	ClassDecision
	ClassAction
	ClassLifecycle
	NumClasses
)

// String is the class as records and the CLI name it.
func (c Class) String() string {
	switch c {
	case ClassError:
		return "error"
	case ClassDecision:
		return "decision"
	case ClassAction:
		return "action"
	case ClassLifecycle:
		return "lifecycle"
	}
	return fmt.Sprintf("class(%d)", uint8(c))
}

// Limits and defaults.
const (
	DefaultSegmentBytes = 64 << 20
	DefaultMaxBytes     = 1 << 30
	DefaultSyncInterval = 5 * time.Millisecond

	minSegment = 64 << 10
	maxSegment = 1 << 30
	maxSlots   = 4096

	// A commit lets those join who keep coming, until all are there who waited last
	// time, nobody has come for quiet, or the whole took twice as long as the last
	// sync; at least joinMin and at most joinMax.
	quiet   = 20 * time.Microsecond
	joinMin = 60 * time.Microsecond
	joinMax = time.Millisecond

	indexEvery = 16 << 10 // bytes of a segment per entry of its index in memory
)

// Errors that callers branch on.
var (
	// ErrCeilingExceeded: the log is full and no slot can be used again, or
	// making the log would pass MaxBytes or enter KeepFree.
	ErrCeilingExceeded = errors.New("write-ahead log is at its disk ceiling")
	ErrClosed          = errors.New("write-ahead log is closed")
	ErrTooLarge        = errors.New("record is larger than the write-ahead log takes")
	// ErrFailed: the disk refused. After a failed sync the log goes on in
	// another slot; only those who waited for that sync are told. It is final
	// when the other slot fails too: then every call returns it.
	ErrFailed   = errors.New("write-ahead log failed")
	ErrNotFound = errors.New("no such record in the write-ahead log")
	ErrLocked   = errors.New("write-ahead log is in use by another process")
)

// Options configure Open. Zero values mean the defaults.
type Options struct {
	// SegmentBytes is the size of a slot, 64 KiB to 1 GiB, fixed when the log is
	// made (later values are ignored). Slots are made a little smaller when
	// MaxBytes is a multiple of it, so that the files beside them fit.
	SegmentBytes int64
	// MaxBytes is the ceiling for everything in the directory, at least two
	// slots. Raising it adds slots; lowering it removes slots that are free.
	MaxBytes int64
	// KeepFree is what must stay available on the file system after slots are
	// made.
	KeepFree int64
	// SyncInterval is the largest age of a record that is not durable when
	// nobody waits for it.
	SyncInterval time.Duration
	// Mode chooses how records reach the disk; ModeAuto takes the ring where it
	// works, and Stats says what was taken and why.
	Mode Mode
	// RingDir is a directory on a tmpfs for the ring, one file of RingBytes with
	// mode 0600. "": there is no ring. It must be the same at every Open and not
	// be cleared while the machine runs: after a kill, what was appended and not
	// yet durable is there and nowhere else.
	RingDir string
	// RingBytes is the size of the ring, 64 KiB to 1 GiB, rounded down to a power
	// of two and to half of what is free in RingDir. A record takes at most half
	// of it.
	RingBytes int64
	// Watermark keeps slots until SetWatermark is past them, too.
	Watermark bool
	// Signer signs checkpoints of the chain; it must hold an Ed25519 key. One is
	// written every CheckpointGroups groups, CheckpointInterval after the first
	// group that has none, and by Close. Nil: none is written. Whoever commits
	// waits for it.
	Signer             crypto.Signer
	CheckpointGroups   int
	CheckpointInterval time.Duration
	// VerifyOnOpen recomputes the whole chain in Open. Without it Open checks every
	// checksum, every sequence number and that markers and headers fit together;
	// Verify recomputes the chain at any time.
	VerifyOnOpen bool
	// Logger is told of recovery, failures and the ceiling. Nil: nobody is.
	Logger *slog.Logger
	// Progress is called while slots are written, with bytes done and in total.
	Progress func(done, total int64)

	sync       func(*os.File) error // fdatasync of a slot; tests make it fail
	openDirect func(string) (*os.File, error)
	now        func() time.Time // of timestamps, which nothing depends on
	hooked     bool             // sync is a test's: called after direct writes too
}

// Mode is how records reach the disk.
type Mode uint8

// The modes. There is one format: a log may be opened in any mode at any time.
const (
	// ModeAuto is ModeRing where RingDir and the file system allow it.
	ModeAuto Mode = iota
	// ModeRing encodes records into the ring; the committer writes them to the
	// slot past the page cache (O_DIRECT, O_DSYNC).
	ModeRing
	// ModeMapped encodes records into the mapped slot; the committer calls
	// fdatasync.
	ModeMapped
)

// String is the mode as Stats names it.
func (m Mode) String() string {
	switch m {
	case ModeAuto:
		return "auto"
	case ModeRing:
		return "ring"
	case ModeMapped:
		return "file-mapped"
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

func (o *Options) setDefaults() error {
	if o.SegmentBytes == 0 {
		o.SegmentBytes = DefaultSegmentBytes
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = DefaultMaxBytes
	}
	if o.SyncInterval == 0 {
		o.SyncInterval = DefaultSyncInterval
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.CheckpointGroups == 0 {
		o.CheckpointGroups = DefaultCheckpointGroups
	}
	if o.CheckpointInterval == 0 {
		o.CheckpointInterval = DefaultCheckpointInterval
	}
	if o.RingBytes == 0 {
		o.RingBytes = DefaultRingBytes
	}
	if o.now == nil {
		o.now = time.Now
	}
	if o.openDirect == nil {
		o.openDirect = openDirect
	}
	if o.hooked = o.sync != nil; !o.hooked {
		o.sync = fdatasync
	}
	var faults []error
	if o.Mode > ModeMapped {
		faults = append(faults, fmt.Errorf("unknown %v", o.Mode))
	}
	if o.Mode == ModeRing && o.RingDir == "" {
		faults = append(faults, errors.New("mode is ring, but no ring directory is set"))
	}
	if o.RingBytes < minRing || o.RingBytes > maxSegment {
		faults = append(faults, fmt.Errorf("ring size is %d bytes, want %d to %d", o.RingBytes, minRing, maxSegment))
	}
	if o.SegmentBytes < minSegment || o.SegmentBytes > maxSegment {
		faults = append(faults, fmt.Errorf("segment size is %d bytes, want %d to %d", o.SegmentBytes, minSegment, maxSegment))
	} else if o.MaxBytes < 2*o.SegmentBytes {
		faults = append(faults, fmt.Errorf("maximum is %d bytes, want at least two segments of %d", o.MaxBytes, o.SegmentBytes))
	} else if o.MaxBytes/o.SegmentBytes > maxSlots {
		faults = append(faults, fmt.Errorf("maximum of %d bytes makes more than %d segments of %d: choose larger segments",
			o.MaxBytes, maxSlots, o.SegmentBytes))
	}
	if o.CheckpointGroups < 0 || o.CheckpointInterval < 0 {
		faults = append(faults, fmt.Errorf("checkpoints every %d groups and %v, want more than 0", o.CheckpointGroups, o.CheckpointInterval))
	}
	if o.KeepFree < 0 {
		faults = append(faults, fmt.Errorf("keep-free is %d bytes, want 0 or more", o.KeepFree))
	}
	if o.SyncInterval < 0 {
		faults = append(faults, fmt.Errorf("sync interval is %v, want more than 0", o.SyncInterval))
	}
	if err := errors.Join(faults...); err != nil {
		return fmt.Errorf("write-ahead log: options: %w", err)
	}
	return nil
}

// stamp is the wall clock, in unix nanoseconds, as the log writes it down. It may
// jump: order comes from sequence numbers, intervals from the monotonic clock.
func (o *Options) stamp() uint64 { return uint64(max(o.now().UnixNano(), 0)) }

// Recovery tells what Open found.
type Recovery struct {
	Created     bool   // the log was made by this call
	Records     uint64 // readable records, aborted ones included
	FirstSeq    uint64 // oldest readable; 0: none
	LastSeq     uint64 // newest; 0: none was ever written
	Segments    int
	Uncommitted uint64 // whole records after the last commit marker: kept, and made durable now
	Replayed    int64  // bytes that only the ring held: its process was killed
	Salvaged    uint64 // records that were reserved and never published, with published ones after them: void now
	TornRecords uint64 // records cut from the end, of which nobody was told
	TornBytes   int64
	Duration    time.Duration
}

// Log is an open log. The zero value is of no use.
type Log struct {
	dir    string
	o      Options
	id     uint64
	name   string // id in hex
	lock   *os.File
	dirIno uint64
	metaFile
	slotBytes  int64
	maxPayload int

	durable   atomic.Uint64 // highest contiguous durable sequence
	watermark atomic.Uint64

	// mu guards what follows. It is never held over disk I/O.
	mu       sync.Mutex
	moved    sync.Cond // blocked, ready or a slot's state changed
	cur      *segment  // takes records
	tail     int64     // where the next frame goes in cur
	next     uint64    // its sequence
	open     *group    // takes records
	closing  *group    // being made durable, or the last that was
	ceil     int64     // no frame of cur may pass it: the end of the slot, or of the ring
	soft     int64     // a tail beyond it starts a commit although nobody waits
	pressed  bool      // the ring fills up: commit although nobody waits
	ring     *ring     // nil: ModeMapped
	left     *ring     // one that could not be used any more
	flushed  int64     // end of the last durable marker in cur
	mapped   bool      // ModeMapped was chosen: slots are in memory before records are encoded there
	why      string    // of the mode
	blocked  bool      // rotating, failed or closed: look closer
	rotating bool      // reservations wait for a new segment
	failed   error     // final
	closed   bool
	unmapped bool // Close is done with the mappings: the last view gives its slot back
	slots    []*slot
	live     []*segment // oldest first; the last is cur
	full     bool       // the ceiling was hit and told to the logger

	// commits is held by whoever commits: one at a time. It comes before mu. It
	// guards what follows.
	commits   sync.Mutex
	chain     [32]byte // after the last marker
	mark      pos      // where the last marker ends
	confirmed bool     // the last marker confirms the one before it
	exhausted bool     // recovery found no room for another epoch in cur
	hasher    *blake3.Hasher
	signer    *signer       // nil: no checkpoints
	bounce    []byte        // one page, for the last of a direct write
	crowd     int           // who waited when the last group ended: for it, or for the next
	took      time.Duration // by the last sync
	idle      *time.Timer   // for a last checkpoint
	idling    bool          // it runs

	// clock runs from the first record that nobody may be waiting for; it is not
	// stopped when a waiter makes the committer faster, so that waiters pay for it
	// once in SyncInterval only.
	clock *time.Timer
	armed atomic.Bool

	stats  counters
	kick   chan struct{} // to the committer, capacity 1
	prep   chan struct{} // to the preparer, capacity 1
	stop   chan struct{}
	ended  sync.WaitGroup
	closer sync.Once
}

// slot is one file.
type slot struct {
	index int
	file  *os.File
	dio   *os.File // O_DIRECT, O_DSYNC; nil in ModeMapped
	m     []byte
	state slotState // guarded by Log.mu
	clean bool      // the header on disk says free; preparer's
	bad   bool      // a sync failed; guarded by Log.mu
	refs  int       // views and copies in progress; guarded by Log.mu
}

type slotState uint8

const (
	slotFree  slotState = iota // holds nothing that is needed, its header may still say otherwise
	slotReady                  // its header says free, durably: can be taken at once
	slotBusy                   // the preparer has it
	slotLive                   // holds a segment
	slotBad                    // its disk refused; not used again until the next Open
)

func (s slotState) String() string {
	return [...]string{"free", "ready", "preparing", "live", "bad"}[s]
}

// segment is one life of a slot.
type segment struct {
	*slot
	id    uint64
	first uint64             // sequence of its first record
	prev  pos                // where the one before ends, as its header says
	key   uint64             // of the current epoch
	last  [NumClasses]uint64 // newest sequence per class; guarded by Log.mu
	marks []mark             // its index, ascending; guarded by Log.mu, entries never change
	keys  []epoch
	limit int64 // where its frames end; 0: not sealed; guarded by Log.mu
	given bool  // its pages were given back since it was sealed; guarded by Log.mu
}

// mark is an entry of a segment's index: record seq begins at off.
type mark struct {
	seq uint64
	off int64
}

func (s *segment) note(seq uint64, off int64) {
	if n := len(s.marks); n == 0 || off-s.marks[n-1].off >= indexEvery {
		s.marks = append(s.marks, mark{seq, off})
	}
}

// newSegment has room for the whole index, so that appending never allocates.
func newSegment(s *slot, id, first uint64, keys []epoch) *segment {
	return &segment{slot: s, id: id, first: first, keys: keys, key: keys[len(keys)-1].key,
		marks: make([]mark, 0, len(s.m)/indexEvery+1)}
}

type counters struct {
	mu        sync.Mutex
	syncs     uint64
	records   uint64
	syncTime  time.Duration
	syncMax   time.Duration
	rotations uint64
	failovers uint64
}

// ID names the log for ever: 16 hex digits, random, made with it. With a
// sequence number it names a record.
func (l *Log) ID() string { return l.name }

// Durable is the highest sequence number up to which every record is on disk.
func (l *Log) Durable() uint64 { return l.durable.Load() }

// Open opens the log in dir, or makes it. The directory belongs to one process
// at a time. Errors: ErrLocked, ErrDamaged (a *DamageError), ErrCeilingExceeded
// (no room to make the slots); on error nothing runs and the log is as it was.
func Open(dir string, o Options) (*Log, Recovery, error) {
	begin := time.Now()
	if err := o.setDefaults(); err != nil {
		return nil, Recovery{}, err
	}
	l := &Log{dir: dir, o: o, kick: make(chan struct{}, 1), prep: make(chan struct{}, 1), stop: make(chan struct{}),
		hasher: blake3.New()}
	l.moved.L = &l.mu
	l.clock = time.NewTimer(time.Hour)
	l.clock.Stop()
	l.idle = time.NewTimer(time.Hour)
	l.idle.Stop()
	var rec Recovery
	var err error
	if o.Signer != nil {
		l.signer, err = newSigner(o.Signer)
	}
	if err == nil {
		err = l.lockDir()
	}
	if err == nil {
		if err = l.provision(&rec); err == nil {
			err = l.recover(&rec)
		}
	}
	if err != nil {
		l.unmap()
		return nil, Recovery{}, fmt.Errorf("open write-ahead log %s: %w", dir, err)
	}
	l.maxPayload = int((l.slotBytes-dataStart-tailRoom)/4) - frameHeader
	l.ended.Add(1)
	go l.prepareLoop()
	l.kickPreparer()
	// What recovery kept is made durable in ModeMapped; then the mode is chosen.
	if l.exhausted {
		l.moveOn(l.cur, l.open, errors.New("the segment takes no more recoveries"))
	} else if l.open.count > 0 {
		l.commit(0).all()
	}
	err = l.err()
	if err == nil {
		err = l.chooseMode()
	}
	if err != nil {
		return nil, Recovery{}, fmt.Errorf("open write-ahead log %s: %w", dir, errors.Join(err, l.Close()))
	}
	l.ended.Add(1)
	go l.commitLoop()
	rec.Duration = time.Since(begin)
	if rec.TornBytes > 0 {
		o.Logger.Warn("write-ahead log: cut a torn tail; none of it was acknowledged",
			"records", rec.TornRecords, "bytes", rec.TornBytes, "last_seq", rec.LastSeq)
	}
	return l, rec, nil
}

// lockDir makes the directory and takes its lock.
func (l *Log) lockDir() error {
	if err := makeDir(l.dir); err != nil {
		return err
	}
	f, err := os.OpenFile(l.path("lock"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if errors.Is(err, unix.EWOULDBLOCK) && time.Since(begin) < lockWait {
			continue
		}
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("%w (pid %s): stop it, or give this one a directory of its own", ErrLocked, lockHolder(f))
		}
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	l.lock = f
	var st unix.Stat_t
	if err := unix.Stat(l.dir, &st); err != nil {
		return fmt.Errorf("identify %s: %w", l.dir, err)
	}
	l.dirIno = st.Ino
	// The pid only tells people who has the lock: a disk that is full must not
	// keep the log closed. One width, so that nothing is left of an older one.
	_, _ = f.WriteAt(fmt.Appendf(nil, "%-*d\n", pidWidth-1, os.Getpid()), 0)
	return nil
}

const pidWidth = 20

// lockHolder reads the pid that the holder of the lock wrote.
func lockHolder(f *os.File) string {
	var b [pidWidth]byte
	n, _ := f.ReadAt(b[:], 0)
	if pid := strings.TrimSpace(string(b[:n])); pid != "" {
		return pid
	}
	return "unknown"
}

// Close waits for open reservations, makes everything durable, confirms that
// with a last marker, and stops. Readers get ErrClosed; a Batch stays valid
// until its Release.
func (l *Log) Close() error {
	var err error
	l.closer.Do(func() {
		l.mu.Lock()
		l.closed, l.blocked = true, true
		l.moved.Broadcast()
		l.mu.Unlock()
		close(l.stop)
		l.ended.Wait()
		if l.err() == nil {
			// The preparer may have ended before it came to that.
			if e := l.noteTop(); e != nil {
				l.o.Logger.Error("write-ahead log: cannot write the meta file", "err", e)
			}
		}
		l.mu.Lock()
		err = l.failed
		l.open.end().all() // its readers and waiters look again, and see that the log is closed
		l.mu.Unlock()
		l.unmap()
	})
	return err
}

// unmap gives back files, lock and the mappings that nobody views; Release
// gives back the others.
func (l *Log) unmap() {
	l.mu.Lock()
	l.closed, l.blocked, l.unmapped = true, true, true
	for _, s := range l.slots {
		if s.refs == 0 {
			s.unmap()
		}
		if s.file != nil {
			s.file.Close()
		}
		if s.dio != nil {
			s.dio.Close()
		}
	}
	for _, r := range [...]*ring{l.ring, l.left} {
		if r == nil {
			continue
		}
		if l.failed == nil {
			_ = os.Remove(r.file.Name()) // everything in it is durable; if it stays, the next Open finds that out
		}
		if r.refs == 0 {
			r.close()
		}
	}
	l.mu.Unlock()
	l.metaFile.close()
	if l.lock != nil {
		unlock(l.lock)
	}
}

// lockWait is how long Open waits for a lock that somebody holds in passing: a
// reader that asks whether the log is in use.
const lockWait = 100 * time.Millisecond

// unlock closes a file whose flock is held. Closing alone may leave it held for a
// moment: by a child that was forked and has not called execve yet.
func unlock(f *os.File) {
	_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
	f.Close()
}

func (s *slot) unmap() {
	if s.m != nil {
		_ = unix.Munmap(s.m) // fails only for a range that was never mapped
		s.m = nil
	}
}

// Sync waits until everything appended so far is durable. Errors as WaitDurable.
func (l *Log) Sync(ctx context.Context) error {
	l.mu.Lock()
	seq := l.next - 1
	l.mu.Unlock()
	return l.WaitDurable(ctx, seq)
}

// Position is a place in the log; places are ordered by Segment, then Offset.
// A place that was ever durable is never used for another record.
type Position struct {
	Segment uint64 `json:"segment"`
	Offset  int64  `json:"offset"`
}

// SlotStats is one slot in Stats and in a Snapshot.
type SlotStats struct {
	Slot     int    `json:"slot"`
	State    string `json:"state"`
	Segment  uint64 `json:"segment,omitempty"`
	FirstSeq uint64 `json:"first_seq,omitempty"`
	Bytes    int64  `json:"bytes"` // of frames
}

// Stats is a view of the log at one moment.
type Stats struct {
	ID             string             `json:"id"`
	Mode           string             `json:"mode"`
	Why            string             `json:"why"`
	RingBytes      int64              `json:"ring_bytes,omitempty"`
	OldestSeq      uint64             `json:"oldest_seq"` // oldest readable
	NextSeq        uint64             `json:"next_seq"`
	DurableSeq     uint64             `json:"durable_seq"`
	Tail           Position           `json:"tail"`
	Cursors        [NumClasses]uint64 `json:"cursors"` // by Class
	Watermark      uint64             `json:"watermark"`
	Slots          []SlotStats        `json:"slots"`
	SlotBytes      int64              `json:"slot_bytes"`
	DiskBytes      int64              `json:"disk_bytes"` // of all slots and the files beside them
	MaxBytes       int64              `json:"max_bytes"`
	UsedBytes      int64              `json:"used_bytes"` // of frames that cannot be recycled yet
	Syncs          uint64             `json:"syncs"`
	SyncedRecords  uint64             `json:"synced_records"`
	RecordsPerSync float64            `json:"records_per_sync"`
	SyncTime       time.Duration      `json:"sync_time_ns"` // total
	SyncMax        time.Duration      `json:"sync_max_ns"`
	Rotations      uint64             `json:"rotations"`
	Failovers      uint64             `json:"failovers"` // slots left because their disk refused
	Full           bool               `json:"full"`      // Reserve returns ErrCeilingExceeded
	Failed         string             `json:"failed,omitempty"`
}

// Stats reads the log's figures.
func (l *Log) Stats() Stats {
	s := Stats{
		ID: l.name, Mode: ModeMapped.String(), DurableSeq: l.Durable(), Cursors: l.cursors(), Watermark: l.watermark.Load(),
		SlotBytes: l.slotBytes, MaxBytes: l.o.MaxBytes,
	}
	l.mu.Lock()
	s.Why = l.why
	if l.ring != nil {
		s.Mode, s.RingBytes = ModeRing.String(), l.ring.size()
	}
	s.NextSeq, s.Tail, s.Full = l.next, Position{l.cur.id, l.tail}, l.full
	s.OldestSeq = l.live[0].first
	s.DiskBytes = overhead + int64(len(l.slots))*l.slotBytes
	if l.failed != nil {
		s.Failed = l.failed.Error()
	}
	s.Slots = make([]SlotStats, len(l.slots))
	for i, x := range l.slots {
		s.Slots[i] = SlotStats{Slot: x.index, State: x.state.String()}
	}
	for _, x := range l.live {
		bytes := x.limit - dataStart
		if x == l.cur {
			bytes = l.tail - dataStart
		}
		t := &s.Slots[x.index]
		t.Segment, t.FirstSeq, t.Bytes = x.id, x.first, bytes
		if !l.consumed(x, s.Cursors) {
			s.UsedBytes += bytes
		}
	}
	l.mu.Unlock()
	l.stats.mu.Lock()
	defer l.stats.mu.Unlock()
	s.Syncs, s.SyncedRecords, s.SyncTime, s.SyncMax = l.stats.syncs, l.stats.records, l.stats.syncTime, l.stats.syncMax
	s.Rotations, s.Failovers = l.stats.rotations, l.stats.failovers
	if s.Syncs > 0 {
		s.RecordsPerSync = float64(s.SyncedRecords) / float64(s.Syncs)
	}
	return s
}

func randomKey() uint64 {
	var b [8]byte
	for {
		_, _ = crand.Read(b[:]) // never fails (crypto/rand)
		if k := le.Uint64(b[:]); k != 0 {
			return k
		}
	}
}
