package wal

import (
	"cmp"
	"crypto/ed25519"
	"errors"
	"fmt"
	"hash"
	"os"
	"slices"

	"github.com/zeebo/blake3"
)

// ErrDamaged is what errors.Is finds in a *DamageError.
var ErrDamaged = errors.New("write-ahead log is damaged")

// DamageError says where the log contradicts itself in a way that no crash
// explains: records that were acknowledged are missing or changed.
type DamageError struct {
	Slot    string // file name, or "" when no single slot is at fault
	Segment uint64
	Offset  int64  // in the slot
	Seq     uint64 // the first sequence number that cannot be trusted; 0: unknown
	Reason  string
}

func (e *DamageError) Error() string {
	where := "log"
	if e.Slot != "" {
		where = fmt.Sprintf("%s (segment %d) at offset %d", e.Slot, e.Segment, e.Offset)
	}
	s := fmt.Sprintf("%v: %s: %s", ErrDamaged, where, e.Reason)
	if e.Seq != 0 {
		s += fmt.Sprintf("; records up to %d are whole", e.Seq-1)
	}
	return s + ". Copy the directory before doing anything else; then 'autonomy wal export' reads what is whole, " +
		"and 'autonomy wal repair' keeps it and marks what is gone"
}

// Is makes errors.Is(err, ErrDamaged) hold.
func (e *DamageError) Is(target error) bool { return target == ErrDamaged }

// found is one live segment as its header tells it.
type found struct {
	slot   int
	name   string
	m      []byte
	head   header
	epochs []epoch
	file   *os.File // nil in Repair
}

func (s *found) damage(off int64, seq uint64, format string, args ...any) error {
	return &DamageError{s.name, s.head.id, off, seq, fmt.Sprintf(format, args...)}
}

// keyAt is the key that holds at off.
func keyAt(epochs []epoch, off int64) uint64 {
	k := epochs[0].key
	for _, e := range epochs[1:] {
		if e.off > off {
			break
		}
		k = e.key
	}
	return k
}

// superseded splits segments, which are in order, into those that count and
// those that a later one took the place of: the first sync of such a one failed,
// so that its successor begins with the same record, behind the same segment.
func superseded(segs []*found) (kept, gone []*found) {
	for _, s := range slices.Backward(segs) {
		if n := len(kept); n > 0 {
			a, b := s.head, kept[n-1].head
			if a.id < b.id && a.prevID == b.prevID && a.prevEnd == b.prevEnd && a.first == b.first && a.chain == b.chain {
				gone = append(gone, s)
				continue
			}
		}
		kept = append(kept, s)
	}
	slices.Reverse(kept)
	return kept, gone
}

// link puts segments in order, leaves out those that were superseded, and
// checks that none is missing between the oldest and the newest.
func link(segs []*found) (kept, gone []*found, err error) {
	slices.SortFunc(segs, func(a, b *found) int { return cmp.Compare(a.head.id, b.head.id) })
	kept, gone = superseded(segs)
	return kept, gone, checkLinks(kept)
}

func checkLinks(segs []*found) error {
	for i, s := range segs[min(1, len(segs)):] {
		prev := segs[i]
		switch {
		case s.head.id == prev.head.id:
			return s.damage(0, prev.head.first, "%s claims the same segment id", prev.name)
		case s.head.prevID != prev.head.id:
			return s.damage(0, 0, "it follows segment %d, but the segment before it here is %d: a slot is missing or was replaced",
				s.head.prevID, prev.head.id)
		case s.head.prevEnd < dataStart || s.head.prevEnd > uint64(len(prev.m)) || s.head.first < prev.head.first:
			return s.damage(0, 0, "its header does not fit segment %d before it", prev.head.id)
		}
	}
	return nil
}

// walk is the state of reading a log from its oldest record to its newest.
type walk struct {
	next    uint64   // sequence that must come
	chain   [32]byte // after the last marker
	group   pos      // where the frames since that marker begin
	count   uint64   // records since that marker
	records uint64
	voids   uint64
	src     *window
	h       *blake3.Hasher // of the open group, up to hashed
	hashed  int64

	keys        []ed25519.PublicKey // of checkpoints; none: signatures are not checked
	quick       bool                // take the markers' word for the chain
	follows     bool                // what is not whole in the newest segment is being written
	losses      uint64              // loss markers
	lost        uint64              // records that they tell of
	checkpoints uint64
	signed      bool   // by one of the keys
	signedSeq   uint64 // last record below a checkpoint that a key has signed
	signedAt    uint64 // unix nanoseconds of that
}

// pos is a place in the log. Places are ordered by segment, then offset.
type pos struct {
	id  uint64
	off int64
}

func newWalk(first *found, src *window) *walk {
	return &walk{next: first.head.first, chain: first.head.chain, src: src, h: blake3.New()}
}

// enter checks that s goes on where w ends.
func (w *walk) enter(s *found) error {
	if s.head.first != w.next {
		return s.damage(0, w.next, "its first record is %d, want %d", s.head.first, w.next)
	}
	if s.head.chain != w.chain || w.count != 0 {
		return s.damage(0, w.next, "its header does not continue the chain")
	}
	return nil
}

// begin starts the group that follows a marker, at p.
func (w *walk) begin(p pos) {
	w.group, w.count = p, 0
	if !w.quick {
		w.h.Reset()
		_, _ = w.h.Write(w.chain[:]) // a hash never fails
		w.hashed = p.off
	}
}

// hash takes the open group's bytes below off into its chain head.
func (w *walk) hash(off int64) {
	_, _ = w.h.Write(w.src.bytes(w.hashed, off))
	w.hashed = off
}

// hashStep is how many bytes of a group wait to be hashed, so that a group may be
// larger than a window.
const hashStep = 64 << 10

var _ hash.Hash = (*blake3.Hasher)(nil)

// chainNext is BLAKE3(chain ‖ frames).
func chainNext(h *blake3.Hasher, chain *[32]byte, frames []byte) (next [32]byte) {
	h.Reset()
	_, _ = h.Write(chain[:]) // a hash never fails
	_, _ = h.Write(frames)
	h.Sum(next[:0])
	return next
}

// tail tells how the newest segment ends.
type tail struct {
	end         int64  // of the last whole frame
	marked      int64  // of the last whole commit marker
	uncommitted uint64 // records between the two
	confirmed   bool   // the last marker confirms the one before it
	closed      bool   // the last marker was written by Close
	tornBytes   int64  // what looks like frames beyond end
	tornRecords uint64
}

// segment reads one segment up to its end, calling fn for each frame. next is
// the segment after it, nil for the newest. An error of fn ends the walk.
func (w *walk) segment(s, next *found, fn func(frame) error) (tail, error) {
	if err := w.enter(s); err != nil {
		return tail{}, err
	}
	w.begin(pos{s.head.id, dataStart})
	return w.frames(s, next, fn)
}

// frames is segment from where the open group begins.
func (w *walk) frames(s, next *found, fn func(frame) error) (tail, error) {
	from := w.group.off
	w.src.open(s, from)
	defer w.src.done()
	t := tail{end: from, marked: from}
	limit := int64(len(s.m))
	if next != nil {
		limit = int64(next.head.prevEnd)
	}
	for off := from; off < limit; {
		if w.quick {
			w.src.release(off)
		} else {
			if off-w.hashed >= hashStep {
				w.hash(off)
			}
			w.src.release(w.hashed)
		}
		f, ok, err := w.src.frame(off, limit)
		if err != nil {
			return t, s.damage(off, w.next, "the file cannot be read: %v", err)
		}
		if ok && !f.control() && f.seq != w.next {
			return t, s.damage(off, w.next, "the record has sequence %d, want %d", f.seq, w.next)
		}
		if !ok {
			if next != nil {
				return t, s.damage(off, w.next, "no whole record, but segment %d says that this one ends at %d", next.head.id, limit)
			}
			if w.follows {
				break
			}
			again, err := w.beyond(s, off, &t)
			if err != nil {
				return t, err
			}
			if again {
				w.src.reload(off)
				continue
			}
			break
		}
		if x, ok := f.lost(); ok {
			if err := w.loss(s, f, x); err != nil {
				return t, err
			}
			if f.kind == kindLoss {
				t.marked, t.confirmed, t.closed = f.off+f.size, true, false
			}
		} else if f.kind == kindCheckpoint {
			if err := w.checkpoint(s, f); err != nil {
				return t, err
			}
			if t.marked == f.off {
				t.marked = f.off + f.size
			}
		} else if f.marker() {
			if err := w.marker(s, f); err != nil {
				return t, err
			}
			k := parseMarker(f.payload)
			t.marked, t.confirmed, t.closed = f.off+f.size, k.count == 0, k.flags&markerClosed != 0
		} else {
			w.next++
			w.count++
			w.records++
			if f.void() {
				w.voids++
			}
		}
		off += f.size
		t.end = off
		if fn != nil {
			if err := fn(f); err != nil {
				return t, err
			}
		}
	}
	if next != nil && (t.end != limit || w.count != 0) {
		return t, s.damage(t.end, w.next, "the segment ends without a commit marker at %d", limit)
	}
	t.uncommitted = w.count
	return t, nil
}

// marker checks a commit marker against what was read since the one before.
func (w *walk) marker(s *found, f frame) error {
	k := parseMarker(f.payload)
	head := k.chain
	if !w.quick {
		w.hash(f.off)
		w.h.Sum(head[:0])
	}
	switch {
	case k.prevID != w.group.id || int64(k.prevOff) != w.group.off || k.count != w.count || f.seq != w.next-1:
		return s.damage(f.off, w.next-w.count, "a commit marker counts %d records up to %d since offset %d, found %d up to %d since %d",
			k.count, f.seq, k.prevOff, w.count, w.next-1, w.group.off)
	case k.chain != head:
		return s.damage(f.off, w.next-w.count, "the chain does not hold: a byte between %d and %d was changed", w.group.off, f.off)
	}
	w.chain = head
	w.begin(pos{s.head.id, f.off + f.size})
	return nil
}

// beyond looks at what stands after the place where whole frames end in the
// newest segment. A commit marker there whose group began beyond that place
// proves that what is unreadable was durable once: damage. Anything else is a
// torn tail, of which nobody was told. again is true when the frame at off has
// become whole since: another process is writing.
func (w *walk) beyond(s *found, off int64, t *tail) (again bool, err error) {
	end := int64(len(s.m))
	last := off
	most := w.next + uint64(end/(frameHeader+8)) // no more records than this fit
	for o := off; o+frameHeader <= end; o += 8 {
		w1 := le.Uint64(s.m[o+8:])
		seq := w1 >> 8
		if seq+1 < w.next || seq > most {
			continue // cheap: almost every place ends here
		}
		n := int64(uint32(loadWord(s.m[o:])))
		if o == off && seq == w.next && n > 0 && n < end-o-frameHeader && validKind(byte(w1), n) {
			last = o + frameSize(int(n)) // the record that was being written
			t.tornRecords++
			continue
		}
		f, ok := parseFrame(s.m, keyAt(s.epochs, o), o, end)
		if !ok {
			continue
		}
		last = max(last, o+f.size)
		if f.control() && !f.marker() {
			continue
		}
		if !f.marker() {
			t.tornRecords++
			continue
		}
		if k := parseMarker(f.payload); k.prevID == s.head.id && int64(k.prevOff) > off {
			if _, ok := parseFrame(s.m, keyAt(s.epochs, off), off, end); ok {
				t.tornRecords = 0
				return true, nil
			}
			return false, s.damage(off, w.next, "no whole record here, but the commit marker at %d says that everything below %d was durable",
				f.off, k.prevOff)
		}
	}
	t.tornBytes = last - off
	return false, nil
}
