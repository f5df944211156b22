package wal

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	crand "crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"
)

// A checkpoint is a frame that follows a commit marker at once and says, signed,
// which chain head stood there and when. Whoever holds the public key can tell a
// log that was rewritten from the node's own, up to its last checkpoint.

const (
	kindCheckpoint  = 0x81
	checkpointSize  = 128 // payload
	checkpointFrame = frameHeader + checkpointSize
	signedSize      = 64 // of the payload, before the signature
)

// Defaults of the signed checkpoints.
const (
	DefaultCheckpointGroups   = 1024
	DefaultCheckpointInterval = time.Minute
)

const signedPrefix = "autonomy write-ahead log checkpoint v1\n"

// ErrUnsigned: keys were given, but no checkpoint is signed by one of them.
var ErrUnsigned = errors.New("write-ahead log is not signed")

// checkpoint is the payload of its frame.
type checkpoint struct {
	chain   [32]byte // after the marker before it
	time    uint64   // unix nanoseconds
	segment uint64
	offset  uint64  // where that marker ends
	keyID   [8]byte // the first bytes of SHA-256 of the public key
	sig     [64]byte
}

func (c *checkpoint) put(b []byte) {
	copy(b, c.chain[:])
	le.PutUint64(b[32:], c.time)
	le.PutUint64(b[40:], c.segment)
	le.PutUint64(b[48:], c.offset)
	copy(b[56:], c.keyID[:])
	copy(b[64:], c.sig[:])
}

func parseCheckpoint(b []byte) checkpoint {
	return checkpoint{[32]byte(b), le.Uint64(b[32:]), le.Uint64(b[40:]), le.Uint64(b[48:]), [8]byte(b[56:]), [64]byte(b[64:128])}
}

// signed is what the signature covers: besides the payload the log and the
// sequence number of the last record.
func (c *checkpoint) signed(logID, seq uint64) []byte {
	b := append([]byte(signedPrefix), make([]byte, 16+checkpointSize)...)
	n := len(signedPrefix)
	le.PutUint64(b[n:], logID)
	le.PutUint64(b[n+8:], seq)
	c.put(b[n+16:])
	return b[:n+16+signedSize]
}

func keyID(pub ed25519.PublicKey) (id [8]byte) {
	h := sha256.Sum256(pub)
	copy(id[:], h[:])
	return id
}

// signer signs checkpoints for the committer.
type signer struct {
	crypto.Signer
	id     [8]byte
	groups int       // since the last one
	at     time.Time // of the last one
}

func newSigner(s crypto.Signer) (*signer, error) {
	pub, ok := s.Public().(ed25519.PublicKey)
	if !ok {
		return nil, fmt.Errorf("signer has a %T, want an Ed25519 key", s.Public())
	}
	return &signer{Signer: s, id: keyID(pub), at: time.Now()}, nil
}

// checkpointDue reports whether the next group gets a checkpoint.
func (l *Log) checkpointDue(closing bool) bool {
	s := l.signer
	return s != nil && (closing || s.groups+1 >= l.o.CheckpointGroups || time.Since(s.at) >= l.o.CheckpointInterval)
}

// putCheckpoint writes the frame after the marker that ends at off. A signer that
// fails leaves a void in its place: the group does not wait for it.
func (l *Log) putCheckpoint(b []byte, seg *segment, off int64, seq uint64, chain [32]byte) {
	c := checkpoint{chain: chain, time: l.o.stamp(), segment: seg.id, offset: uint64(off), keyID: l.signer.id}
	sig, err := l.signer.Sign(crand.Reader, c.signed(l.id, seq), crypto.Hash(0))
	if err == nil && len(sig) != len(c.sig) {
		err = fmt.Errorf("signature has %d bytes, want %d", len(sig), len(c.sig))
	}
	if err != nil {
		l.o.Logger.Error("write-ahead log: cannot sign a checkpoint", "seq", seq, "err", err)
		c.keyID, c.sig = [8]byte{}, [64]byte{}
	} else {
		copy(c.sig[:], sig)
		l.signer.groups, l.signer.at = 0, time.Now()
	}
	c.put(b[frameHeader:])
	putFrame(b, seg.key, off, checkpointSize, kindCheckpoint, seq)
}

// checkpoint checks one against what was read, and its signature where keys are
// given.
func (w *walk) checkpoint(s *found, f frame) error {
	c := parseCheckpoint(f.payload)
	if w.count != 0 || w.group != (pos{s.head.id, f.off}) || c.segment != s.head.id || int64(c.offset) != f.off || f.seq != w.next-1 || c.chain != w.chain {
		return s.damage(f.off, w.next, "a checkpoint speaks of record %d at segment %d offset %d and another chain; here is record %d, segment %d, offset %d",
			f.seq, c.segment, c.offset, w.next-1, s.head.id, w.group.off)
	}
	if c.keyID == [8]byte{} {
		return nil // its signer failed
	}
	w.checkpoints++
	if len(w.keys) == 0 {
		return nil
	}
	for _, k := range w.keys {
		if id := keyID(k); bytes.Equal(id[:], c.keyID[:]) {
			if !ed25519.Verify(k, c.signed(s.head.logID, f.seq), c.sig[:]) {
				return s.damage(f.off, w.next, "the signature of this checkpoint is wrong: what is before it was not written by the holder of the key")
			}
			w.signed, w.signedSeq, w.signedAt = true, f.seq, c.time
			return nil
		}
	}
	return s.damage(f.off, w.next, "this checkpoint is signed by a key that was not given (key id %x)", c.keyID)
}
