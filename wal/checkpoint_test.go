package wal

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func testKey(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func TestCheckpoints(t *testing.T) {
	key, other := testKey(1), testKey(2)
	pub, otherPub := key.Public().(ed25519.PublicKey), other.Public().(ed25519.PublicKey)
	o := smallOptions()
	o.Signer, o.CheckpointGroups = key, 3
	dir := t.TempDir()
	l, _ := open(t, dir, o)
	var last uint64
	for range 60 { // over several segments
		last = appendN(t, l, 8)
		wait(t, l, last)
	}
	live, err := VerifyWith(t.Context(), dir, VerifyOptions{Keys: []ed25519.PublicKey{pub}})
	if err != nil || live.SignedSeq < last-30 || live.SignedSeq == last {
		t.Fatalf("while it runs: %+v, %v", live, err)
	}
	must(t, l.Close())
	for range 2 { // Close signs all of it, and reopening changes nothing
		rep, err := VerifyWith(t.Context(), dir, VerifyOptions{Keys: []ed25519.PublicKey{otherPub, pub}})
		if err != nil || rep.SignedSeq != last || rep.Last != last || rep.Checkpoints < 20 || time.Since(rep.SignedAt) > time.Minute {
			t.Fatalf("%+v, %v", rep, err)
		}
		l, rec := open(t, dir, o)
		if rec.LastSeq != last || rec.TornBytes != 0 {
			t.Fatalf("%+v", rec)
		}
		check(t, l, 1, last)
		must(t, l.Close())
	}
	if _, err := VerifyWith(t.Context(), dir, VerifyOptions{Keys: []ed25519.PublicKey{otherPub}}); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "a key that was not given") {
		t.Fatalf("with another key: %v", err)
	}
	if rep, err := Verify(t.Context(), dir); err != nil || rep.SignedSeq != 0 {
		t.Fatalf("without a key: %+v, %v", rep, err)
	}

	// Who can write the files but has no key: a whole log of his own, the
	// checkpoint in it with the right key's name.
	im := readImage(t, dir)
	b := im["slot-0000"]
	_, epochs, _, err := readHeader(b)
	must(t, err)
	forged := false
	for off := int64(dataStart); ; {
		f, ok := parseFrame(b, keyAt(epochs, off), off, int64(len(b)))
		if !ok {
			break
		}
		if f.kind == kindCheckpoint {
			f.payload[32]++ // the time
			putFrame(b[off:], keyAt(epochs, off), off, checkpointSize, kindCheckpoint, f.seq)
			forged = true
			break
		}
		off += f.size
	}
	if !forged {
		t.Fatal("no checkpoint found")
	}
	dir2 := filepath.Join(t.TempDir(), "log")
	im.write(t, dir2)
	if _, err := VerifyWith(t.Context(), dir2, VerifyOptions{Keys: []ed25519.PublicKey{pub}}); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "signature of this checkpoint is wrong") {
		t.Fatalf("forged: %v", err)
	}
	if l, _, err := Open(dir2, smallOptions()); err == nil {
		l.Close()
	}
}

func TestUnsignedLog(t *testing.T) {
	dir := t.TempDir()
	last := manyGroups(t, dir, 5)
	pub := testKey(1).Public().(ed25519.PublicKey)
	if rep, err := VerifyWith(t.Context(), dir, VerifyOptions{Keys: []ed25519.PublicKey{pub}}); !errors.Is(err, ErrUnsigned) || rep.Last != last {
		t.Fatalf("%+v, %v", rep, err)
	}
	o := smallOptions()
	o.Signer, o.CheckpointInterval = testKey(1), 20*time.Millisecond // signed from now on, also when idle
	l, _ := open(t, dir, o)
	last = appendN(t, l, 3)
	wait(t, l, last)
	deadline := time.Now().Add(10 * time.Second)
	for {
		rep, err := VerifyWith(t.Context(), dir, VerifyOptions{Keys: []ed25519.PublicKey{pub}})
		if err == nil && rep.SignedSeq == last {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("idle log: %+v, %v", rep, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// A crash with a checkpoint at the very end, and a signer that fails.
func TestCheckpointAtTheEnd(t *testing.T) {
	o := smallOptions()
	o.Signer, o.CheckpointGroups = testKey(1), 1
	dir := t.TempDir()
	l, _ := open(t, dir, o)
	wait(t, l, appendN(t, l, 5))
	last := appendN(t, l, 4)
	kill(t, l, func() {})
	for range 3 {
		l, rec, err := Open(dir, o)
		must(t, err)
		if rec.LastSeq != last {
			t.Fatalf("%+v, want records up to %d", rec, last)
		}
		last = appendN(t, l, 2)
		wait(t, l, last)
		check(t, l, 1, last)
		kill(t, l, func() {})
	}
	if rep, err := VerifyWith(t.Context(), dir, VerifyOptions{Keys: []ed25519.PublicKey{testKey(1).Public().(ed25519.PublicKey)}}); err != nil || rep.SignedSeq != last {
		t.Fatalf("%+v, %v", rep, err)
	}
}
