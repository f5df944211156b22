package export

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/wal"
)

// damage loses records of a closed log in three ways: some of the oldest slot,
// all of the next, and the newest slot itself, of which nobody knows how many it
// held.
func (b *bench) damage() []wal.Loss {
	b.t.Helper()
	dir := filepath.Join(b.dir, "wal")
	// Which slot holds which segment depends on when each was prepared.
	snap, err := wal.OpenReadOnly(dir)
	if err != nil {
		b.t.Fatal(err)
	}
	var live []wal.SlotStats
	for _, s := range snap.Info().Slots {
		if s.Segment != 0 {
			live = append(live, s)
		}
	}
	snap.Close()
	slices.SortFunc(live, func(x, y wal.SlotStats) int { return cmp.Compare(x.Segment, y.Segment) })
	if len(live) < 4 {
		b.t.Fatalf("%d live segments, want 4: %+v", len(live), live)
	}
	slot := func(s wal.SlotStats) string { return filepath.Join(dir, fmt.Sprintf("slot-%04d", s.Slot)) }
	edit := func(s wal.SlotStats, change func([]byte)) {
		data, err := os.ReadFile(slot(s))
		if err == nil {
			change(data)
			err = os.WriteFile(slot(s), data, 0o600)
		}
		if err != nil {
			b.t.Fatal(err)
		}
	}
	edit(live[0], func(data []byte) { clear(data[20000:24000]) })
	edit(live[1], func(data []byte) { clear(data[8192:]) })
	if err := os.Remove(slot(live[len(live)-1])); err != nil {
		b.t.Fatal(err)
	}
	rep, err := wal.Repair(dir, wal.RepairOptions{})
	if err != nil {
		b.t.Fatal(err)
	}
	return rep.Lost
}

// TestLost: the receiver gets a stand-in for every record that a repair found
// gone, in requests as large as any, the same one when it is sent again, also
// when the node is restarted in the middle of a loss.
func TestLost(t *testing.T) {
	for seed := range uint64(2) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rng := rand.New(rand.NewPCG(seed, 3))
				b := newBench(t, Options{BatchRecords: 100, BatchBytes: 1 << 20, MinBackoff: time.Millisecond, MaxBackoff: time.Millisecond, MaxAttempts: 1 << 20})
				b.sink.content = map[uint64]string{}
				list, _ := mixed(6000)
				b.append(list...)
				if err := errors.Join(b.log.Advance(wal.ClassError, 10*seed), b.log.Close()); err != nil {
					t.Fatal(err)
				}
				losses := b.damage()
				var gone uint64
				for _, x := range losses {
					gone += x.Last + 1 - x.First
				}
				if len(losses) < 3 || gone < 10_000 {
					t.Fatalf("losses: %+v", losses)
				}
				b.open()
				r, err := b.log.Reserve(wal.ClassAction, 100)
				if err != nil {
					t.Fatal(err)
				}
				r.Abort() // its stand-in looks for the record before it, beyond a loss
				b.append(list[:50]...)
				last := b.log.Durable()

				b.sink.set(func(seqs []uint64) error {
					if len(seqs) > 100 {
						t.Errorf("a request holds %d records", len(seqs))
					}
					if rng.IntN(4) == 0 {
						return errAway
					}
					return nil
				})
				b.start()
				for range 8 {
					stop := b.sink.tried() + rng.IntN(25)
					b.until("more attempts", func() bool { return b.sink.tried() >= stop || b.e.Status().Pending == 0 })
					b.restart()
					for c := range wal.NumClasses {
						from := uint64(1)
						if c == wal.ClassError {
							from += 10 * seed
						}
						b.holds(c, losses, from, b.log.Cursor(c))
					}
				}
				b.until("delivered", func() bool { return b.e.Status().Delivered == last })
				for seq := 10*seed + 1; seq <= last; seq++ {
					if _, ok := b.sink.held[seq]; !ok {
						t.Fatalf("the receiver waits for record %d of %d for ever", seq, last)
					}
				}
				for _, x := range losses {
					want := strconv.Quote(fmt.Sprintf(`{"first":%d,"last":%d}`, x.First, x.Last))
					for seq := x.First; seq <= x.Last; seq++ {
						if got := b.sink.content[seq]; !strings.Contains(got, event.LogLost) || !strings.Contains(got, want) {
							t.Fatalf("stand-in for %d is %s, want %s of %s", seq, got, event.LogLost, want)
						}
					}
				}
				b.end()
			})
		})
	}
}

// holds fails when a record that is gone is below the cursor of its class, and
// the receiver has no stand-in for it.
func (b *bench) holds(c wal.Class, losses []wal.Loss, from, cursor uint64) {
	b.t.Helper()
	if c != wal.ClassError {
		return // losses are of that class
	}
	b.sink.mu.Lock()
	defer b.sink.mu.Unlock()
	for _, x := range losses {
		for seq := max(from, x.First); seq <= min(x.Last, cursor); seq++ {
			if _, ok := b.sink.held[seq]; !ok {
				b.t.Fatalf("the cursor stands at %d, but there is no stand-in for %d", cursor, seq)
			}
		}
	}
}
