package wal

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// The byte tables of README.md. All integers are little-endian.
const (
	pageSize   = 4096
	dataStart  = 2 * pageSize // two header copies stand before the first frame
	headerSize = 120          // of a slot header, within one 512-byte sector

	frameHeader = 16
	markerSize  = 64 // payload of a commit marker
	markerFrame = frameHeader + markerSize

	// tailRoom is kept free at the end of every segment: one marker for the
	// group that fills it, one for Close, each with a checkpoint.
	tailRoom = 2 * (markerFrame + checkpointFrame)

	epochStart = 512 // of the epoch table in a header copy
	epochSize  = 24
	maxEpochs  = 128

	formatVersion = 1
)

var (
	slotMagic = [8]byte{'A', 'O', 'W', 'A', 'L', 'S', 'L', 'T'}
	metaMagic = [8]byte{'A', 'O', 'W', 'A', 'L', 'M', 'E', 'T'}

	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

// Slot states in a header. A slot of zeroes was never used: it is free too.
const (
	stateFree = 1
	stateLive = 2
)

// Frame kinds, the low byte of the second word.
const (
	kindClass  = 0x0f // mask: the record's class
	kindVoid   = 0x40 // flag: aborted, the payload is zeroes
	kindMarker = 0x80 // commit marker
)

// Marker flags.
const markerClosed = 1 // written by Close, confirms everything before it

// header is the fixed part of a slot's header.
type header struct {
	state     uint32
	logID     uint64
	slotBytes uint64
	id        uint64 // segment id; 0 when free
	key       uint64 // of the first epoch
	first     uint64 // sequence of the first record
	prevID    uint64 // the segment before this one; 0: none
	prevEnd   uint64 // where that one ends
	chain     [32]byte
	created   uint64 // unix nanoseconds
}

func (h *header) put(b []byte) {
	copy(b, slotMagic[:])
	le.PutUint32(b[8:], formatVersion)
	le.PutUint32(b[12:], h.state)
	le.PutUint64(b[16:], h.logID)
	le.PutUint64(b[24:], h.slotBytes)
	le.PutUint64(b[32:], h.id)
	le.PutUint64(b[40:], h.key)
	le.PutUint64(b[48:], h.first)
	le.PutUint64(b[56:], h.prevID)
	le.PutUint64(b[64:], h.prevEnd)
	copy(b[72:], h.chain[:])
	le.PutUint64(b[104:], h.created)
	le.PutUint32(b[112:], 0)
	le.PutUint32(b[116:], crc32.Checksum(b[:116], castagnoli))
}

// parse reports whether b holds a header, and reads it.
func (h *header) parse(b []byte) bool {
	if [8]byte(b) != slotMagic || le.Uint32(b[116:]) != crc32.Checksum(b[:116], castagnoli) ||
		le.Uint32(b[8:]) != formatVersion {
		return false
	}
	*h = header{
		state: le.Uint32(b[12:]), logID: le.Uint64(b[16:]), slotBytes: le.Uint64(b[24:]),
		id: le.Uint64(b[32:]), key: le.Uint64(b[40:]), first: le.Uint64(b[48:]),
		prevID: le.Uint64(b[56:]), prevEnd: le.Uint64(b[64:]), chain: [32]byte(b[72:]),
		created: le.Uint64(b[104:]),
	}
	return h.state == stateFree || h.state == stateLive && h.id != 0 && h.first != 0
}

// epoch is a key and the offset from which it holds. A segment starts with one;
// each recovery that goes on in the segment adds another, so that what a torn
// tail left behind can never be read as a record.
type epoch struct {
	off int64
	key uint64
}

func (e epoch) put(b []byte, segKey uint64) {
	le.PutUint64(b, uint64(e.off))
	le.PutUint64(b[8:], e.key)
	le.PutUint64(b[16:], uint64(crc32.Update(uint32(mix(segKey)), castagnoli, b[:16])))
}

func parseEpoch(b []byte, segKey uint64) (epoch, bool) {
	e := epoch{off: int64(le.Uint64(b)), key: le.Uint64(b[8:])}
	return e, le.Uint64(b[16:]) == uint64(crc32.Update(uint32(mix(segKey)), castagnoli, b[:16])) && e.off >= dataStart
}

// readHeader takes the better of the two copies at the start of a slot, and the
// epochs that either holds. found is false for a slot of zeroes.
func readHeader(m []byte) (h header, epochs []epoch, found bool, err error) {
	var ha, hb header
	a, b := ha.parse(m), hb.parse(m[pageSize:])
	switch {
	case a && b && hb.state == stateLive && (ha.state != stateLive || hb.id > ha.id):
		h = hb
	case a:
		h = ha
	case b:
		h = hb
	default:
		for _, x := range [...][]byte{m[:headerSize], m[pageSize : pageSize+headerSize]} {
			for _, c := range x {
				if c != 0 {
					return h, nil, true, fmt.Errorf("both header copies are damaged")
				}
			}
		}
		return h, nil, false, nil
	}
	if h.state != stateLive {
		return h, nil, true, nil
	}
	epochs = append(epochs, epoch{dataStart, h.key})
	for i := range maxEpochs {
		o := epochStart + i*epochSize
		e, ok := parseEpoch(m[o:o+epochSize], h.key)
		if !ok {
			if e, ok = parseEpoch(m[pageSize+o:pageSize+o+epochSize], h.key); !ok {
				break
			}
		}
		if e.off < epochs[len(epochs)-1].off {
			return h, nil, true, fmt.Errorf("header: epoch %d starts at %d, before the one before it", i+1, e.off)
		}
		epochs = append(epochs, e)
	}
	return h, epochs, true, nil
}

// meta is the small file beside the slots: identity, geometry, cursors.
type meta struct {
	logID      uint64
	slotBytes  int64
	slots      int
	generation uint64
	cursors    [NumClasses]uint64
	created    uint64
	top        uint64 // newest segment known to be durable
}

const metaSize = 100

func (x *meta) put(b []byte) {
	copy(b, metaMagic[:])
	le.PutUint32(b[8:], formatVersion)
	le.PutUint32(b[12:], 0)
	le.PutUint64(b[16:], x.logID)
	le.PutUint64(b[24:], uint64(x.slotBytes))
	le.PutUint64(b[32:], uint64(x.slots))
	le.PutUint64(b[40:], x.generation)
	for i, c := range x.cursors {
		le.PutUint64(b[48+8*i:], c)
	}
	le.PutUint64(b[80:], x.created)
	le.PutUint64(b[88:], x.top)
	le.PutUint32(b[96:], crc32.Checksum(b[:96], castagnoli))
}

func (x *meta) parse(b []byte) bool {
	if len(b) < metaSize || [8]byte(b) != metaMagic || le.Uint32(b[8:]) != formatVersion ||
		le.Uint32(b[96:]) != crc32.Checksum(b[:96], castagnoli) {
		return false
	}
	*x = meta{
		logID: le.Uint64(b[16:]), slotBytes: int64(le.Uint64(b[24:])), slots: int(le.Uint64(b[32:])),
		generation: le.Uint64(b[40:]), created: le.Uint64(b[80:]), top: le.Uint64(b[88:]),
	}
	for i := range x.cursors {
		x.cursors[i] = le.Uint64(b[48+8*i:])
	}
	return x.logID != 0 && x.slotBytes >= minSegment/2 && x.slotBytes <= maxSegment && x.slotBytes%pageSize == 0 &&
		x.slots >= 2 && x.slots <= maxSlots
}

// mix is the finaliser of MurmurHash3: every input bit reaches every output bit.
func mix(x uint64) uint64 {
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// checksum is the CRC of the frame b that stands at off, seeded so that a frame
// of another life of the slot, or one that was moved, fails. b[8:16+n] is
// covered.
func checksum(b []byte, key uint64, off int64, n int) uint32 {
	x := mix(key ^ uint64(off)<<32 ^ uint64(n))
	return crc32.Update(uint32(x^x>>32), castagnoli, b[8:frameHeader+n])
}

// frameSize is what a payload of n bytes takes in a segment.
func frameSize(n int) int64 { return (frameHeader + int64(n) + 7) &^ 7 }

// frame is one record or marker in a segment.
type frame struct {
	off     int64
	size    int64 // with header and padding
	kind    byte
	seq     uint64
	payload []byte // a view
}

// control tells markers and checkpoints from records.
func (f frame) control() bool { return f.kind&kindMarker != 0 }
func (f frame) marker() bool  { return f.kind == kindMarker }
func (f frame) void() bool    { return f.kind&kindVoid != 0 }
func (f frame) class() Class  { return Class(f.kind & kindClass) }

// parseFrame reads the frame at off, of which nothing may reach beyond end.
func parseFrame(m []byte, key uint64, off, end int64) (frame, bool) {
	if off+frameHeader > end {
		return frame{}, false
	}
	return parseAt(m[off:end], key, off)
}

// parseAt reads the frame that b starts with and that stands at off in its
// segment; nothing of it may reach beyond b.
func parseAt(b []byte, key uint64, off int64) (frame, bool) {
	if len(b) < frameHeader {
		return frame{}, false
	}
	word := loadWord(b)
	n := int64(uint32(word))
	if n == 0 || n > int64(len(b))-frameHeader {
		return frame{}, false
	}
	w1 := le.Uint64(b[8:])
	f := frame{off: off, size: frameSize(int(n)), kind: byte(w1), seq: w1 >> 8}
	if f.size > int64(len(b)) || !validKind(f.kind, n) {
		return frame{}, false
	}
	if checksum(b, key, off, int(n)) != uint32(word>>32) {
		return frame{}, false
	}
	for _, c := range b[frameHeader+n : f.size] {
		if c != 0 { // the padding, which the checksum leaves out
			return frame{}, false
		}
	}
	f.payload = b[frameHeader : frameHeader+n : frameHeader+n]
	return f, true
}

func validKind(kind byte, n int64) bool {
	switch kind {
	case kindMarker:
		return n == markerSize
	case kindCheckpoint:
		return n == checkpointSize
	case kindLoss:
		return n == lossSize
	case kindGap:
		return n == gapSize
	}
	return kind&^(kindClass|kindVoid) == 0 && Class(kind&kindClass) < NumClasses
}

// putFrame publishes the frame b that stands at off: everything but the first
// word, then the first word. The payload is already in place.
func putFrame(b []byte, key uint64, off int64, n int, kind byte, seq uint64) {
	le.PutUint64(b[8:], seq<<8|uint64(kind))
	clear(b[frameHeader+n : frameSize(n)])
	storeWord(b, uint64(checksum(b, key, off, n))<<32|uint64(n))
}

// marker is the payload of a commit marker.
type marker struct {
	prevID  uint64 // position of the end of the marker before: durable when
	prevOff uint64 // this one was written
	count   uint64 // records since then
	flags   uint64
	chain   [32]byte // BLAKE3(chain before ‖ the frames since then)
}

func (k *marker) put(b []byte) {
	le.PutUint64(b, k.prevID)
	le.PutUint64(b[8:], k.prevOff)
	le.PutUint64(b[16:], k.count)
	le.PutUint64(b[24:], k.flags)
	copy(b[32:], k.chain[:])
}

func parseMarker(b []byte) marker {
	return marker{le.Uint64(b), le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint64(b[24:]), [32]byte(b[32:64])}
}
