package wal

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/vfs"
)

// Two frames say that records are gone; only Repair writes them. A gap stands
// among the records of a group, in the place of those that are gone, and is never
// larger than one of them: so what is left of a segment always fits its slot. A
// loss is a group of its own, and says with which chain head the log goes on. The
// chain does not cover it, the dense sequence does.

const (
	kindLoss = 0x82
	lossSize = 64 // payload

	kindGap = 0x83
	gapSize = 8 // payload
)

// loss is what both of them say: the records first to last are gone; none when
// last is first-1, then only the chain was mended.
type loss struct {
	first, last uint64
	chain       [32]byte // from here on; not of a gap
	time        uint64   // of the repair, unix nanoseconds; of a gap in whole seconds
}

func (x *loss) put(b []byte) {
	le.PutUint64(b, x.first)
	le.PutUint64(b[8:], x.last)
	copy(b[16:], x.chain[:])
	le.PutUint64(b[48:], x.time)
	le.PutUint64(b[56:], 0)
}

// putGap writes the payload of a gap: how many, and when.
func (x *loss) putGap(b []byte) {
	le.PutUint32(b, uint32(x.last+1-x.first))
	le.PutUint32(b[4:], uint32(min(x.time/uint64(time.Second), math.MaxUint32)))
}

// lost is what f says, if it is a gap or a loss. Its last is f.seq, or the frame
// is wrong.
func (f frame) lost() (x loss, ok bool) {
	switch b := f.payload; f.kind {
	case kindLoss:
		return loss{le.Uint64(b), le.Uint64(b[8:]), [32]byte(b[16:]), le.Uint64(b[48:])}, true
	case kindGap:
		return loss{first: f.seq + 1 - uint64(le.Uint32(b)), last: f.seq, time: uint64(le.Uint32(b[4:])) * uint64(time.Second)}, true
	}
	return loss{}, false
}

// loss takes such a frame into the walk.
func (w *walk) loss(s *found, f frame, x loss) error {
	if f.kind == kindLoss && w.count != 0 || x.first != w.next || x.last+1 < x.first || f.seq != x.last {
		return s.damage(f.off, w.next, "a loss marker speaks of records %d to %d; want %d on", x.first, x.last, w.next)
	}
	w.next = x.last + 1
	w.lost += x.last + 1 - x.first
	w.losses++
	if f.kind == kindLoss {
		w.chain = x.chain
		w.begin(pos{s.head.id, f.off + f.size})
	}
	return nil
}

// RepairOptions configure Repair.
type RepairOptions struct {
	// Quarantine is a directory that must not exist yet, for the damaged slots. "":
	// beside the log, named after it and the time. They and the slots that replace
	// them take at most twice the log's size.
	Quarantine string
	// KeepFree is what must stay available on its file system, and on the log's.
	KeepFree int64

	step func() error // tests stop the repair here, before each thing it does
}

// Loss is a range of records that Repair found gone.
type Loss struct {
	First  uint64 `json:"first"`
	Last   uint64 `json:"last"`
	Reason string `json:"reason"`
}

// RepairReport is what Repair did.
type RepairReport struct {
	Damaged    bool     `json:"damaged"` // false: nothing was changed
	Slots      []string `json:"slots"`   // that were written
	Kept       uint64   `json:"kept"`    // records in those slots that are whole
	Lost       []Loss   `json:"lost"`
	Quarantine string   `json:"quarantine,omitempty"`
}

// piece is one segment of the repaired log.
type piece struct {
	slot    int
	head    header
	end     int64
	body    []byte // what stands from dataStart to end; nil: as it is
	changed bool   // the header
}

// Repair makes a damaged log one that Open takes: whole records stay, with their
// sequence numbers; where records are gone a loss marker says which. Readers are
// given it as a Record with Lost. The damaged slots are kept aside; without room
// for those that replace them nothing is changed. A repair that is cut short is
// started again, and has lost nothing. Errors: ErrLocked while a process has the log, ErrDamaged when it is
// beyond repair, fs.ErrNotExist.
func Repair(dir string, o RepairOptions) (rep RepairReport, err error) {
	if _, err := os.Stat(filepath.Join(dir, "lock")); err != nil {
		return rep, fmt.Errorf("repair write-ahead log %s: %w", dir, err)
	}
	l := &Log{dir: dir}
	if err := l.lockDir(); err != nil {
		return rep, fmt.Errorf("repair write-ahead log %s: %w", dir, err)
	}
	defer unlock(l.lock)
	r := &repair{dir: dir, at: time.Now(), step: o.step}
	if r.step == nil {
		r.step = func() error { return nil }
	}
	defer r.close()
	if err := r.plan(&rep); err != nil {
		return RepairReport{}, fmt.Errorf("repair write-ahead log %s: %w", dir, err)
	}
	if rep.Damaged = len(r.touched()) > 0; !rep.Damaged {
		return rep, nil
	}
	if rep.Quarantine = o.Quarantine; rep.Quarantine == "" {
		rep.Quarantine = fmt.Sprintf("%s.damaged-%s", filepath.Clean(dir), r.at.UTC().Format("20060102T150405Z"))
	}
	if err := r.quarantine(rep.Quarantine, o.KeepFree); err != nil {
		return RepairReport{}, fmt.Errorf("repair write-ahead log %s: nothing was changed: %w", dir, err)
	}
	for _, i := range r.touched() {
		if err := r.apply(i); err != nil {
			return rep, fmt.Errorf("repair write-ahead log %s: slot %d: %w; the damaged slots are in %s: start the repair again", dir, i, err, rep.Quarantine)
		}
		rep.Slots = append(rep.Slots, slotName(i))
	}
	return rep, vfs.SyncDir(dir)
}

type repair struct {
	dir    string
	step   func() error
	at     time.Time
	meta   meta
	files  []mapped // by slot
	broken []int    // slots that hold nothing that can be read, or a segment twice
	stale  []int    // slots of segments that were superseded
	pieces []*piece // oldest first
	h      *blake3.Hasher
}

// stamp is the time of the repair, in unix nanoseconds.
func (r *repair) stamp() uint64 { return uint64(max(r.at.UnixNano(), 0)) }

func (r *repair) close() {
	for _, f := range r.files {
		unmapMemory(f.m)
		if f.f != nil {
			f.f.Close()
		}
	}
}

// plan reads everything and decides what to write.
func (r *repair) plan(rep *RepairReport) error {
	b, err := readSmall(filepath.Join(r.dir, "meta"), 2*pageSize)
	if err != nil {
		return err
	}
	var ok bool
	if r.meta, ok = readMeta(b); !ok {
		return &DamageError{Slot: "meta", Reason: "both copies are damaged: without identity and cursors this cannot be repaired"}
	}
	r.h = blake3.New()
	var segs []*found
	l := &Log{id: r.meta.logID, slotBytes: r.meta.slotBytes}
	for i := range r.meta.slots {
		x, err := r.open(l, i)
		if err != nil {
			r.broken = append(r.broken, i)
		} else if x != nil {
			segs = append(segs, x)
		}
	}
	slices.SortStableFunc(segs, func(a, b *found) int { return cmp.Compare(a.head.id, b.head.id) })
	for i := 1; i < len(segs); i++ {
		if segs[i].head.id == segs[i-1].head.id {
			r.broken = append(r.broken, segs[i].slot)
			segs = slices.Delete(segs, i, i+1)
			i--
		}
	}
	segs, gone := superseded(segs)
	for _, s := range gone {
		r.stale = append(r.stale, s.slot)
	}
	if len(segs) == 0 {
		return &DamageError{Reason: "no slot holds a segment: there is nothing to keep"}
	}
	var most uint64 // a consumer had everything up to here
	for _, c := range r.meta.cursors {
		most = max(most, c)
	}
	w := newWalk(segs[0], &window{})
	if first := segs[0].head; first.first-1 > most {
		if err := r.insert(rep, header{id: first.prevID, first: most + 1}, first); err != nil {
			return err
		}
	}
	for i, s := range segs {
		var next *found
		if i+1 < len(segs) {
			next = segs[i+1]
		}
		if n := len(r.pieces); n > 0 && s.head.prevID != r.pieces[n-1].head.id {
			if err := r.insert(rep, header{id: s.head.prevID, first: w.next, chain: w.chain}, s.head); err != nil {
				return err
			}
			w.next, w.chain = s.head.first, s.head.chain
		}
		if err := r.keep(rep, s, next, w, most); err != nil {
			return err
		}
	}
	if last := segs[len(segs)-1].head.id; r.meta.top > last { // newer segments are gone: no more records than fit there
		bound := max(most, w.next-1+(r.meta.top-last)*uint64(r.meta.slotBytes/frameSize(1)))
		if err := r.insert(rep, header{id: r.meta.top, first: w.next, chain: w.chain}, header{first: bound + 1, chain: w.chain}); err != nil {
			return err
		}
	}
	// Every header says where the segment before it ends.
	for i, p := range r.pieces[1:] {
		prev := r.pieces[i]
		if p.head.prevID != prev.head.id || p.head.prevEnd != uint64(prev.end) {
			p.head.prevID, p.head.prevEnd, p.changed = prev.head.id, uint64(prev.end), true
		}
	}
	return nil
}

// keep takes one segment over: as it is if it is whole, else its whole records
// and loss markers between them.
func (r *repair) keep(rep *RepairReport, s, next *found, w *walk, most uint64) error {
	sealed := next
	if next != nil && next.head.prevID != s.head.id {
		sealed = nil // the segment that knew its end is gone
	}
	try := *w
	t, err := try.segment(s, sealed, nil)
	gone := uint64(0) // records up to here were there
	if next == nil && r.meta.top <= s.head.id {
		gone = most
	}
	if err == nil && gone < try.next && (sealed != nil || next == nil) {
		*w = try
		r.pieces = append(r.pieces, &piece{slot: s.slot, head: s.head, end: t.end})
		return nil
	}
	why := "the end of the log is missing"
	if d, ok := errors.AsType[*DamageError](err); ok {
		why = d.Reason
	} else if err == nil && sealed == nil && next != nil && gone < try.next {
		why = "the segment behind is gone"
	}
	// A new life of the same segment: its own key, so that nothing of the old one
	// is taken for a record.
	p := &piece{slot: s.slot, head: s.head, changed: true}
	p.head.key, p.head.first, p.head.chain = randomKey(), w.next, w.chain
	c := &composer{r: r, p: p, w: w, body: pageAligned(r.meta.slotBytes)[:0], mark: pos{s.head.id, dataStart}}
	end := int64(len(s.m))
	until := ^uint64(0)
	if next != nil {
		until = next.head.first
	}
	if sealed != nil {
		end = int64(sealed.head.prevEnd)
	}
	err2 := guard(func() {
		for off := int64(dataStart); off+frameHeader <= end; off += 8 {
			f, ok := parseFrame(s.m, keyAt(s.epochs, off), off, end)
			if !ok {
				continue
			}
			off += f.size - 8
			x, lost := f.lost()
			switch {
			case lost && x.first >= w.next && x.last >= x.first && x.last < until:
				c.lose(x.first, why) // what is between, if anything
				c.lose(x.last+1, "lost before an earlier repair")
			case f.control():
				gone = max(gone, min(f.seq, until-1))
			case f.seq >= w.next && f.seq < until:
				c.lose(f.seq, why)
				c.record(f)
			}
		}
	})
	if err2 != nil {
		return s.damage(0, w.next, "the file cannot be read: %v", err2)
	}
	if next != nil {
		gone = next.head.first - 1
	}
	c.lose(gone+1, why)
	c.group()
	if next != nil && w.chain != next.head.chain {
		w.chain = next.head.chain
		c.loss(w.next-1, why)
	}
	if c.overflow {
		return s.damage(0, 0, "its whole records and the loss markers do not fit the slot, which no log of this program can come to; read what is whole with 'autonomy wal export'")
	}
	rep.Kept += c.kept
	rep.Lost = append(rep.Lost, c.lost...)
	p.body, p.end = c.body, dataStart+int64(len(c.body))
	r.pieces = append(r.pieces, p)
	return nil
}

// insert puts a segment where slots are gone, which holds nothing but the loss
// marker of all records before next.
func (r *repair) insert(rep *RepairReport, h, next header) error {
	used := map[int]bool{}
	for _, p := range r.pieces {
		used[p.slot] = true
	}
	slot := -1
	for _, i := range r.broken {
		if !used[i] {
			slot = i
		}
	}
	for i := 0; slot < 0 && i < r.meta.slots; i++ { // none: one that is free
		if h, found, err := peekHeader(filepath.Join(r.dir, slotName(i))); err == nil && !used[i] && (!found || h.state != stateLive || slices.Contains(r.stale, i)) {
			slot = i
		}
	}
	if slot < 0 {
		return &DamageError{Segment: h.id, Reason: "its slot is gone and no other is free for the loss marker"}
	}
	if h.id == 0 {
		h.id = next.id - 1
	}
	h.state, h.logID, h.slotBytes = stateLive, r.meta.logID, uint64(r.meta.slotBytes)
	h.key, h.created = randomKey(), r.stamp()
	p := &piece{slot: slot, head: h, changed: true}
	w := &walk{next: h.first, chain: next.chain}
	c := &composer{r: r, p: p, w: w, body: make([]byte, 0, pageSize)}
	c.loss(next.first-1, "the slot that held them is gone")
	rep.Lost = append(rep.Lost, c.lost...)
	p.body, p.end = c.body, dataStart+int64(len(c.body))
	r.pieces = append(r.pieces, p)
	return nil
}

// composer writes the frames of a segment.
type composer struct {
	r        *repair
	p        *piece
	w        *walk
	body     []byte
	start    int    // of the open group, in body
	count    uint64 // of its records
	mark     pos    // end of the marker before
	kept     uint64
	lost     []Loss
	overflow bool
}

// frame makes room for a frame of n payload bytes and returns it.
func (c *composer) frame(n int) ([]byte, int64) {
	off := dataStart + int64(len(c.body))
	size := int(frameSize(n))
	if off+int64(size) > c.r.meta.slotBytes {
		c.overflow = true
		return make([]byte, size), off
	}
	c.body = append(c.body, make([]byte, size)...)
	return c.body[len(c.body)-size:], off
}

func (c *composer) record(f frame) {
	b, off := c.frame(len(f.payload))
	copy(b[frameHeader:], f.payload)
	putFrame(b, c.p.head.key, off, len(f.payload), f.kind, f.seq)
	c.w.next = f.seq + 1
	c.count++
	c.kept++
}

// group ends the open group with a marker.
func (c *composer) group() {
	if len(c.body) == c.start {
		return
	}
	chain := chainNext(c.r.h, &c.w.chain, c.body[c.start:])
	k := marker{c.p.head.id, uint64(dataStart + c.start), c.count, 0, chain}
	b, off := c.frame(markerSize)
	k.put(b[frameHeader:])
	putFrame(b, c.p.head.key, off, markerSize, kindMarker, c.w.next-1)
	c.w.chain, c.count, c.start = chain, 0, len(c.body)
}

// lose writes that the records before seq are gone, if any is.
func (c *composer) lose(seq uint64, why string) {
	if seq <= c.w.next {
		return
	}
	x := loss{first: c.w.next, last: seq - 1, time: c.r.stamp()}
	if seq-c.w.next > math.MaxUint32 { // only a cursor can speak of so many
		c.loss(x.last, why)
		return
	}
	b, off := c.frame(gapSize)
	x.putGap(b[frameHeader:])
	putFrame(b, c.p.head.key, off, gapSize, kindGap, x.last)
	c.lost = append(c.lost, Loss{x.first, x.last, why})
	c.w.next = seq
}

// loss writes a loss up to last; the chain goes on as w says.
func (c *composer) loss(last uint64, why string) {
	c.group()
	x := loss{c.w.next, last, c.w.chain, c.r.stamp()}
	b, off := c.frame(lossSize)
	x.put(b[frameHeader:])
	putFrame(b, c.p.head.key, off, lossSize, kindLoss, last)
	if last >= x.first {
		c.lost = append(c.lost, Loss{x.first, last, why})
	}
	c.w.next, c.start = last+1, len(c.body)
}

// touched is the slots that will be written, in the order of the log.
func (r *repair) touched() (slots []int) {
	live := map[int]bool{}
	for _, p := range r.pieces {
		live[p.slot] = true
		if p.changed {
			slots = append(slots, p.slot)
		}
	}
	for _, i := range r.broken {
		if !live[i] {
			slots = append(slots, i)
		}
	}
	if len(slots) == 0 {
		return nil // superseded segments alone are no damage
	}
	// First, while their successors' headers still say that they are.
	var first []int
	for _, i := range r.stale {
		if !live[i] {
			first = append(first, i)
		}
	}
	return append(first, slots...)
}

// quarantine keeps the slots that will be replaced, as they are: by a second name
// where that is possible, else as a copy.
func (r *repair) quarantine(to string, keepFree int64) error {
	parent := filepath.Dir(filepath.Clean(to))
	if err := r.step(); err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return fmt.Errorf("quarantine: %w", err)
	}
	if err := r.keepSlots(to, keepFree); err != nil {
		return errors.Join(fmt.Errorf("quarantine: %w", err), os.RemoveAll(to))
	}
	return errors.Join(vfs.SyncDir(to), vfs.SyncDir(parent))
}

func (r *repair) keepSlots(to string, keepFree int64) error {
	slots := r.touched()
	var present []int
	copies := int64(0)
	for _, i := range slots {
		if err := r.step(); err != nil {
			return err
		}
		from := filepath.Join(r.dir, slotName(i))
		info, err := os.Lstat(from)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() || os.Link(from, filepath.Join(to, slotName(i))) != nil {
			present = append(present, i)
			copies++
		}
	}
	// The new slots stand beside those that were linked, one beside those that
	// are copied.
	if err := haveRoom(r.dir, (int64(len(slots))-copies+min(copies, 1))*r.meta.slotBytes, keepFree); err != nil {
		return err
	}
	if copies > 0 {
		if err := haveRoom(to, copies*r.meta.slotBytes+overhead, keepFree); err != nil {
			return err
		}
	}
	for _, i := range present {
		if err := r.copySlot(i, to); err != nil {
			return err
		}
	}
	return nil
}

// haveRoom asks whether need bytes fit dir's file system and leave keepFree.
func haveRoom(dir string, need, keepFree int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free-need < keepFree {
		return fmt.Errorf("%d bytes are free in %s, %d are needed for the damaged slots and those that replace them, and %d are to stay free: make room, or name a quarantine on another file system",
			free, dir, need, keepFree)
	}
	return nil
}

func (r *repair) copySlot(i int, to string) error {
	in, err := os.OpenFile(filepath.Join(r.dir, slotName(i)), os.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(filepath.Join(to, slotName(i)), os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, io.LimitReader(in, r.meta.slotBytes))
	return errors.Join(err, out.Sync(), out.Close())
}

// repairTemp is the slot that is being written. It takes its place by rename, so
// that a repair that is cut short leaves every slot as it was or as it will be.
const repairTemp = "repair.tmp"

// apply replaces one slot.
func (r *repair) apply(i int) error {
	path, temp := filepath.Join(r.dir, slotName(i)), filepath.Join(r.dir, repairTemp)
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	err = r.compose(f, i)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	if err := r.step(); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	if err := r.step(); err != nil {
		return err
	}
	return vfs.SyncDir(r.dir)
}

// compose writes all of slot i's new content to f, durably.
func (r *repair) compose(f *os.File, i int) error {
	l := &Log{dir: r.dir, slotBytes: r.meta.slotBytes, id: r.meta.logID}
	if err := r.step(); err != nil {
		return err
	}
	if err := l.fillSlot(f); err != nil {
		return err
	}
	page := make([]byte, pageSize)
	h := header{state: stateFree, logID: r.meta.logID, slotBytes: uint64(r.meta.slotBytes)}
	var body []byte
	if k := slices.IndexFunc(r.pieces, func(p *piece) bool { return p.slot == i }); k >= 0 {
		p := r.pieces[k]
		h = p.head
		if body = p.body; body == nil { // the records and the epochs stay
			old := r.files[i].m
			body = old[dataStart:]
			if err := guard(func() {
				if x := (header{}); !x.parse(old) {
					old = old[pageSize:]
				}
				copy(page, old)
			}); err != nil {
				return err
			}
		}
	}
	h.put(page)
	if err := r.step(); err != nil {
		return err
	}
	for off := 0; off < len(body); off += 1 << 20 {
		if _, err := f.WriteAt(body[off:min(off+1<<20, len(body))], dataStart+int64(off)); err != nil {
			return err
		}
	}
	for _, off := range [...]int64{0, pageSize} {
		if _, err := f.WriteAt(page, off); err != nil {
			return err
		}
	}
	if err := r.step(); err != nil {
		return err
	}
	return f.Sync()
}

// open reads one slot; an error means that it holds nothing that can be read.
func (r *repair) open(l *Log, i int) (*found, error) {
	var file mapped
	defer func() { r.files = append(r.files, file) }()
	f, err := os.OpenFile(filepath.Join(r.dir, slotName(i)), os.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	file.f = f
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != r.meta.slotBytes {
		return nil, fmt.Errorf("%s has %d bytes", f.Name(), info.Size())
	}
	m, err := mapFile(f, r.meta.slotBytes, false, true)
	if err != nil {
		return nil, err
	}
	file.m = m
	dropCache(f, m, 0, int64(len(m)))
	var x *found
	if e := guard(func() { x, err = l.identify(&slot{index: i, m: m}) }); e != nil {
		err = e
	}
	return x, err
}
