package wal

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Snapshot reads a log that this process does not own, also one that another
// process is writing. It changes nothing and takes no lock.
type Snapshot struct {
	meta  meta
	live  bool // another process holds the log
	slots []SlotStats
	segs  []*found
	files []mapped
	tail  tail
	walk  *walk
	keys  []ed25519.PublicKey
	seen  uint64 // last record that a scan has passed on

	partial bool // segs does not begin with the oldest
}

type mapped struct {
	f *os.File
	m []byte
}

// Info describes a Snapshot.
type Info struct {
	ID        string             `json:"id"`
	Created   time.Time          `json:"created"`
	InUse     bool               `json:"in_use"` // another process holds the log
	SlotBytes int64              `json:"slot_bytes"`
	Slots     []SlotStats        `json:"slots"`
	Cursors   [NumClasses]uint64 `json:"cursors"` // by Class
	DiskBytes int64              `json:"disk_bytes"`
}

// Entry is a record with its place.
type Entry struct {
	Record
	Position
	Slot string
}

// OpenReadOnly maps the log in dir for reading. Errors: fs.ErrNotExist when
// there is none, ErrDamaged.
func OpenReadOnly(dir string) (*Snapshot, error) {
	var err error
	for range 5 { // another process may open its next segment meanwhile
		var s *Snapshot
		if s, err = openSnapshot(dir); err == nil {
			return s, nil
		}
		if _, damaged := errors.AsType[*DamageError](err); !damaged || !locked(filepath.Join(dir, "lock")) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("read write-ahead log %s: %w", dir, err)
}

func openSnapshot(dir string) (_ *Snapshot, err error) {
	s := &Snapshot{}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	b, err := readSmall(filepath.Join(dir, "meta"), 2*pageSize)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = errors.Join(checkUnused(dir), err)
		}
		return nil, err
	}
	var ok bool
	if s.meta, ok = readMeta(b); !ok {
		return nil, &DamageError{Slot: "meta", Reason: "both copies are damaged: neither identity nor cursors are known"}
	}
	s.live = locked(filepath.Join(dir, "lock"))
	for i := range s.meta.slots {
		if err := s.openSlot(dir, i); err != nil {
			return nil, err
		}
	}
	var gone []*found
	if s.segs, gone, err = link(s.segs); err != nil {
		return nil, err
	}
	for _, x := range gone {
		s.slots[x.slot] = SlotStats{Slot: x.slot, State: slotFree.String()}
	}
	if err := checkTop(s.segs, s.meta); err != nil {
		return nil, err
	}
	return s, nil
}

// locked reports whether another process holds the log.
func locked(path string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

func (s *Snapshot) openSlot(dir string, i int) error {
	f, err := os.OpenFile(filepath.Join(dir, slotName(i)), os.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		s.slots = append(s.slots, SlotStats{Slot: i, State: "missing"}) // link and checkTop tell whether it held anything
		return nil
	}
	if err != nil {
		return err
	}
	file := mapped{f: f}
	defer func() { s.files = append(s.files, file) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != s.meta.slotBytes {
		return &DamageError{Slot: slotName(i), Offset: info.Size(),
			Reason: fmt.Sprintf("the file has %d bytes, want %d: it was cut or replaced", info.Size(), s.meta.slotBytes)}
	}
	// Random also here: reading the writer's pages ahead would merge them into
	// large folios and make its syncs slow.
	if file.m, err = mapFile(f, s.meta.slotBytes, false, true); err != nil {
		return err
	}
	if s.live { // the owner may write past the page cache
		dropCache(f, file.m, 0, dataStart)
	}
	l := &Log{id: s.meta.logID, slotBytes: s.meta.slotBytes}
	var x *found
	if e := guard(func() { x, err = l.identify(&slot{index: i, m: file.m}) }); e != nil {
		err = e
	}
	if err != nil {
		return err
	}
	st := SlotStats{Slot: i, State: "free"}
	if x != nil {
		st = SlotStats{Slot: i, State: "live", Segment: x.head.id, FirstSeq: x.head.first}
		x.file = f
		s.segs = append(s.segs, x)
	}
	s.slots = append(s.slots, st)
	return nil
}

// Info describes the log; the sizes of segments are known once Records ran to
// the end.
func (s *Snapshot) Info() Info {
	return Info{
		ID: fmt.Sprintf("%016x", s.meta.logID), Created: time.Unix(0, int64(s.meta.created)).UTC(), InUse: s.live,
		SlotBytes: s.meta.slotBytes, Slots: slices.Clone(s.slots), Cursors: s.meta.cursors,
		DiskBytes: overhead + int64(s.meta.slots)*s.meta.slotBytes,
	}
}

// errStop ends a walk whose caller has enough.
var errStop = errors.New("stop")

// Records reads all committed records, oldest first, and checks checksums,
// sequence and chain on the way. Views are valid until Close. An error, at most
// one, is the last element: a *DamageError, or the context's. A log whose writer
// overtakes the reader ends in an error too: read it again.
func (s *Snapshot) Records(ctx context.Context) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if err := s.scan(ctx, nil, func(e Entry) bool { return yield(e, nil) }); err != nil && !errors.Is(err, errStop) {
			yield(Entry{}, err)
		}
	}
}

// RecordsFrom is Records from seq on, whose segments before that are not read:
// they are checked by Records. ErrOvertaken, which is not damage, ends it when
// the writer has used a segment again meanwhile.
func (s *Snapshot) RecordsFrom(ctx context.Context, seq uint64) iter.Seq2[Entry, error] {
	i := len(s.segs) - 1
	for i > 0 && s.segs[i].head.first > seq {
		i--
	}
	t := *s
	i = max(i, 0)
	t.segs, t.partial = s.segs[i:], i > 0
	return t.Records(ctx)
}

// Bookmark is a place in a log between two groups. The zero value is before the
// first one.
type Bookmark struct {
	at    pos
	next  uint64 // the record that comes there
	chain [32]byte
}

// BookmarkAt is where to begin for the records from seq on: at the start of the
// segment that holds it, or of the log.
func BookmarkAt(seq uint64) Bookmark { return Bookmark{next: seq} }

// RecordsSince is RecordsFrom for one who reads a log in use again and again, each
// time with a new Snapshot: it reads what stands behind b, and moves b. Bytes that
// are not whole in the newest segment are being written, as far as it can tell:
// they count as damage once the writer has gone on to another segment.
func (s *Snapshot) RecordsSince(ctx context.Context, b *Bookmark) iter.Seq2[Entry, error] {
	i := len(s.segs) - 1
	for i >= 0 && s.segs[i].head.id != b.at.id {
		i--
	}
	t := *s
	if i < 0 { // unused, or its segment was used again
		i = max(len(s.segs)-1, 0)
		for i > 0 && s.segs[i].head.first > b.next {
			i--
		}
		*b = Bookmark{next: b.next}
	}
	t.segs, t.partial = s.segs[i:], i > 0 || b.at.off != 0
	return func(yield func(Entry, error) bool) {
		err := t.scan(ctx, b, func(e Entry) bool { return yield(e, nil) })
		if err != nil && !errors.Is(err, errStop) {
			yield(Entry{}, err)
		}
	}
}

// ErrOvertaken: the log's writer has used a segment again while it was read.
var ErrOvertaken = errors.New("the writer has overtaken the reader: read the log again")

// scan gives fn what stands in s.segs, or what stands there behind from, which it
// moves.
func (s *Snapshot) scan(ctx context.Context, from *Bookmark, fn func(Entry) bool) error {
	if len(s.segs) == 0 {
		s.walk = &walk{next: 1}
		return checkEmpty(s.meta)
	}
	w := newWalk(s.segs[0], &window{})
	w.keys = s.keys
	s.seen = 0
	s.walk = w
	if from != nil {
		w.follows = s.live
		if from.at.off != 0 {
			w.next, w.chain = from.next, from.chain
			w.begin(from.at)
		}
	}
	for i, x := range s.segs {
		var next *found
		if i+1 < len(s.segs) {
			next = s.segs[i+1]
		}
		read, start := w.segment, place{dataStart, x.head.first}
		if w.group.id == x.head.id {
			read, start = w.frames, place{w.group.off, w.next}
		} else {
			readAhead(x.m)
		}
		if s.live && next == nil {
			_ = guard(func() { refreshEnd(x, start) }) // a fault is met again below
		}
		var group []Entry // of records whose marker is still to come
		var err error
		begin, try := *w, 0
	again:
		fault := guard(func() {
			s.tail, err = read(x, next, func(f frame) error {
				if f.control() || len(group) == maxHeld {
					for i, e := range group {
						if i%256 == 0 && ctx.Err() != nil {
							return ctx.Err()
						}
						if e.Seq <= s.seen {
							continue // before the segment was read again
						}
						s.seen = e.End()
						if !fn(e) {
							return errStop
						}
					}
					group = group[:0]
					if from != nil && (f.marker() || f.kind == kindLoss) {
						*from = Bookmark{w.group, w.next, w.chain}
					}
				}
				if p, lost := f.lost(); lost && p.last >= p.first {
					group = append(group, Entry{Record{Seq: p.first, Lost: p.last + 1 - p.first, Void: true}, Position{x.head.id, f.off}, x.name})
				}
				if !f.control() {
					e := Entry{Record{Seq: f.seq, Class: f.class(), Void: f.void(), Payload: f.payload}, Position{x.head.id, f.off}, x.name}
					if e.Void {
						e.Payload = nil
					}
					group = append(group, e)
				}
				return nil
			})
			if err == nil && next == nil && !s.live {
				for _, e := range group { // survived the process: recovery keeps them
					if !fn(e) {
						err = errStop
						return
					}
				}
			}
		})
		if fault != nil {
			err = x.damage(0, w.next, "the file cannot be read: %v", fault)
		}
		if err != nil {
			if _, damaged := errors.AsType[*DamageError](err); damaged && s.live {
				if s.recycled(x) {
					return fmt.Errorf("segment %d was recycled: %w", x.head.id, ErrOvertaken)
				}
				if try++; try <= rereads {
					// A page that was cached beside a direct write of the owner may be
					// old: what counts stands on disk.
					time.Sleep(time.Duration(try) * time.Millisecond)
					dropCache(x.file, x.m, 0, int64(len(x.m)))
					*w, group = begin, group[:0]
					w.begin(w.group) // where that counts, a group begins there
					goto again
				}
			}
			return err
		}
		s.slots[x.slot].Bytes = s.tail.end - dataStart
	}
	if s.live || s.partial {
		return nil // the cursors were read before the records
	}
	return checkCursors(s.segs[0], w.next-1, s.meta)
}

// rereads bounds how often a segment of a log in use is read again from disk
// before it counts as damaged.
const rereads = 3

const progressEvery = 1 << 14 // records

// maxHeld bounds the records of one group that Records holds back until it has
// seen their marker. A larger group is passed on before.
const maxHeld = 1 << 16

// recycled reports whether x's slot holds something else by now.
func (s *Snapshot) recycled(x *found) bool {
	again := true
	_ = guard(func() {
		h, _, used, err := readHeader(x.m)
		again = err != nil || !used || h.id != x.head.id || h.key != x.head.key
	})
	return again
}

// checkEmpty is for a log without any segment: it has never had one.
func checkEmpty(x meta) error {
	for c, seq := range x.cursors {
		if seq > 0 {
			return &DamageError{Reason: fmt.Sprintf("the %v cursor stands at %d, but there are no records", Class(c), seq)}
		}
	}
	return nil
}

// Close gives the mappings back; views are invalid from then on.
func (s *Snapshot) Close() error {
	var errs []error
	for _, f := range s.files {
		if f.m != nil {
			errs = append(errs, unix.Munmap(f.m))
		}
		errs = append(errs, f.f.Close())
	}
	s.files = nil
	return errors.Join(errs...)
}

// Report is what Verify found.
type Report struct {
	ID          string `json:"id"`
	Records     uint64 `json:"records"` // void ones included
	Voids       uint64 `json:"voids"`
	First       uint64 `json:"first"`
	Last        uint64 `json:"last"`
	Gaps        uint64 `json:"gaps"` // loss markers, which Repair wrote; any other gap is damage
	Lost        uint64 `json:"lost"` // records that they tell of
	Segments    int    `json:"segments"`
	Uncommitted uint64 `json:"uncommitted"` // after the last commit marker
	TornRecords uint64 `json:"torn_records"`
	TornBytes   int64  `json:"torn_bytes"`
	Chain       string `json:"chain"` // head after the last marker: blake3:HEX
	Checkpoints uint64 `json:"checkpoints"`
	// SignedSeq is the last record below a checkpoint that one of the given keys
	// has signed, SignedAt when that was; zero without keys.
	SignedSeq uint64    `json:"signed_seq,omitempty"`
	SignedAt  time.Time `json:"signed_at,omitzero"`
}

// VerifyOptions configure VerifyWith. Zero values ask for what Verify does.
type VerifyOptions struct {
	// Keys are the public keys that may have signed checkpoints. With keys a
	// checkpoint that none of them has signed is damage, and a log without any
	// checkpoint is ErrUnsigned.
	Keys []ed25519.PublicKey
	// Progress is called now and then with records read so far.
	Progress func(records uint64)
}

// Verify reads everything in dir and checks it. On damage the error is a
// *DamageError and the report counts what is whole before it.
func Verify(ctx context.Context, dir string) (Report, error) {
	return VerifyWith(ctx, dir, VerifyOptions{})
}

// VerifyWith is Verify with options. Errors: also ErrUnsigned.
func VerifyWith(ctx context.Context, dir string, o VerifyOptions) (Report, error) {
	s, err := OpenReadOnly(dir)
	if err != nil {
		return Report{}, err
	}
	defer s.Close()
	s.keys = o.Keys
	var n uint64
	r := Report{ID: s.Info().ID, Segments: len(s.segs)}
	var first uint64
	err = s.scan(ctx, nil, func(e Entry) bool {
		if first == 0 {
			first = e.Seq
		}
		if n++; o.Progress != nil && n%progressEvery == 0 {
			o.Progress(n)
		}
		return true
	})
	w := s.walk
	r.Records, r.Voids, r.Uncommitted = w.records, w.voids, w.count
	r.Gaps, r.Lost = w.losses, w.lost
	r.Checkpoints, r.SignedSeq = w.checkpoints, w.signedSeq
	if w.signed {
		r.SignedAt = time.Unix(0, int64(w.signedAt)).UTC()
	}
	if err == nil && len(o.Keys) > 0 && !w.signed {
		err = fmt.Errorf("%w by any of the %d keys given: %d checkpoints", ErrUnsigned, len(o.Keys), w.checkpoints)
	}
	r.Chain = fmt.Sprintf("blake3:%x", w.chain)
	r.TornRecords, r.TornBytes = s.tail.tornRecords, s.tail.tornBytes
	if s.live {
		r.Records, r.TornRecords, r.TornBytes = w.records-w.count, 0, 0 // they are being written
		w.next -= w.count
	}
	if r.Records > 0 {
		r.First, r.Last = first, w.next-1
	}
	return r, err
}
