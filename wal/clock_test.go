package wal

import (
	"crypto/ed25519"
	"testing"
	"time"
)

// The wall clock may stand still, jump back behind the first record or far ahead:
// it is written down and nothing more.
func TestClockJumps(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	key := testKey(1)
	clocks := []time.Time{
		time.Now(), time.Unix(0, 0), time.Now().AddDate(200, 0, 0), time.Unix(-1e9, 0), time.Now().Add(-time.Hour),
	}
	var last uint64
	calls := 0
	for life := range clocks {
		o := smallOptions()
		o.Signer, o.CheckpointGroups = key, 3
		o.now = func() time.Time { calls++; return clocks[(life+calls)%len(clocks)] } // also within a life
		l, rec, err := Open(dir, o)
		must(t, err)
		if rec.LastSeq != last {
			t.Fatalf("life %d: opened at %d, want %d", life, rec.LastSeq, last)
		}
		for range 30 {
			last = appendN(t, l, 10)
			wait(t, l, last)
			must(t, l.AdvanceAll(last))
		}
		check(t, l, l.Stats().OldestSeq, last)
		must(t, l.Close())
		r, err := VerifyWith(t.Context(), dir, VerifyOptions{Keys: []ed25519.PublicKey{key.Public().(ed25519.PublicKey)}})
		if err != nil || r.Last != last || r.SignedSeq != last {
			t.Fatalf("life %d: %+v, %v", life, r, err)
		}
	}
	if calls < 50 {
		t.Fatalf("the clock was asked %d times", calls)
	}
	// A repair under such a clock: its time is in the log, too.
	for i, at := range clocks {
		r := &repair{at: at}
		b := make([]byte, gapSize)
		(&loss{first: 7, last: 9, time: r.stamp()}).putGap(b)
		x, ok := frame{kind: kindGap, seq: 9, payload: b}.lost()
		if !ok || x.first != 7 || x.last != 9 || at.Year() == time.Now().Year() && time.Unix(0, int64(x.time)).Unix() != at.Unix() {
			t.Errorf("clock %d: %+v", i, x)
		}
	}
}
