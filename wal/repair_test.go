package wal

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Whatever is damaged: Repair keeps every whole record, tells which are gone,
// and leaves a log that opens, reads and goes on.
func TestRepair(t *testing.T) {
	t.Parallel()
	src := t.TempDir()
	l, last := rotated(t, src, 1500)
	segs := slices.Clone(l.Stats().Slots)
	slices.SortFunc(segs, func(a, b SlotStats) int { return int(a.Segment) - int(b.Segment) })
	var live []string
	var firsts []uint64
	for _, s := range segs {
		if s.Segment != 0 {
			live = append(live, slotName(s.Slot))
			firsts = append(firsts, s.FirstSeq)
		}
	}
	must(t, l.Close())
	im := readImage(t, src)
	if len(live) != 3 {
		t.Fatalf("live slots: %v", live)
	}
	flip := func(k int, off int64) func(image) {
		return func(im image) {
			b := bytes.Clone(im[live[k]])
			b[off] ^= 1
			im[live[k]] = b
		}
	}
	all := func(n uint64) [2]uint64 { return [2]uint64{n, n} }
	tests := []struct {
		name   string
		do     func(image)
		lost   [2]uint64 // least and most records lost
		upto   uint64    // last of them; 0: any
		intact bool      // nothing to repair
	}{
		{"nothing", func(image) {}, all(0), 0, true},
		{"one header copy", func(im image) { flip(1, 20)(im) }, all(0), 0, true},
		{"one record of the middle slot", flip(1, dataStart+frameHeader+3), all(1), firsts[1], false},
		{"one record of the oldest slot", flip(0, dataStart+frameHeader+3), all(1), firsts[0], false},
		{"one record of the newest slot", flip(2, dataStart+frameHeader+3), all(1), firsts[2], false},
		{"a page in the middle", func(im image) {
			b := bytes.Clone(im[live[1]])
			clear(b[16384 : 16384+4096])
			im[live[1]] = b
		}, [2]uint64{5, 60}, 0, false},
		{"all frames of the middle slot", func(im image) {
			b := bytes.Clone(im[live[1]])
			clear(b[dataStart:])
			im[live[1]] = b
		}, all(firsts[2] - firsts[1]), firsts[2] - 1, false},
		{"middle slot dropped", func(im image) { delete(im, live[1]) }, all(firsts[2] - firsts[1]), firsts[2] - 1, false},
		{"middle slot cut", func(im image) { im[live[1]] = im[live[1]][:8192] }, all(firsts[2] - firsts[1]), firsts[2] - 1, false},
		{"both header copies of the middle slot", func(im image) {
			flip(1, 20)(im)
			flip(1, pageSize+20)(im)
		}, all(firsts[2] - firsts[1]), firsts[2] - 1, false},
		{"middle slot replaced by the oldest", func(im image) { im[live[1]] = im[live[0]] }, all(firsts[2] - firsts[1]), firsts[2] - 1, false},
		{"newest slot dropped", func(im image) { delete(im, live[2]) }, [2]uint64{last + 1 - firsts[2], 1 << 20}, 0, false},
		{"end of the newest slot zeroed", func(im image) {
			b := bytes.Clone(im[live[2]])
			clear(b[dataStart:])
			im[live[2]] = b
		}, [2]uint64{last - 10 + 1 - firsts[2], last + 1 - firsts[2]}, 0, false},
		{"two places in two slots", func(im image) {
			flip(0, dataStart+frameHeader+3)(im)
			flip(1, dataStart+frameHeader+3)(im)
		}, all(2), firsts[1], false},
		{"a free slot replaced by noise", func(im image) {
			for name, b := range im {
				if strings.HasPrefix(name, "slot-") && !slices.Contains(live, name) {
					im[name] = bytes.Repeat([]byte{0x5a}, len(b))
				}
			}
		}, all(0), 0, false},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "log")
			changed := maps.Clone(im)
			tc.do(changed)
			changed.write(t, dir)
			o := RepairOptions{Quarantine: filepath.Join(t.TempDir(), "q")}
			rep, err := Repair(dir, o)
			must(t, err)
			var lost uint64
			gone := map[uint64]bool{}
			for _, x := range rep.Lost {
				lost += x.Last + 1 - x.First
				for seq := x.First; seq <= x.Last && seq < x.First+10000; seq++ {
					gone[seq] = true
				}
				if x.Reason == "" {
					t.Errorf("no reason: %+v", x)
				}
			}
			if rep.Damaged == tc.intact || lost < tc.lost[0] || lost > tc.lost[1] {
				t.Fatalf("%d lost, want %v: %+v", lost, tc.lost, rep)
			}
			if n := len(rep.Lost); tc.upto != 0 && rep.Lost[n-1].Last != tc.upto {
				t.Fatalf("%+v, want up to %d", rep.Lost, tc.upto)
			}
			if rep.Damaged {
				for _, name := range rep.Slots { // as it was
					if b, ok := changed[name]; ok {
						if q, err := os.ReadFile(filepath.Join(o.Quarantine, name)); err != nil || !bytes.Equal(q, b) {
							t.Errorf("quarantined %s differs: %v", name, err)
						}
					}
				}
			}
			v, err := Verify(t.Context(), dir)
			if err != nil || v.Lost != lost {
				t.Fatalf("verify: %+v, %v", v, err)
			}
			again, err := Repair(dir, RepairOptions{})
			if err != nil || again.Damaged {
				t.Fatalf("again: %+v, %v", again, err)
			}
			l, rec, err := Open(dir, smallOptions())
			must(t, err)
			defer l.Close()
			more := appendN(t, l, 5)
			wait(t, l, more)
			r := l.Reader(1)
			next := rec.FirstSeq
			for next <= more {
				b, err := r.Next(t.Context(), 64, 1<<20)
				must(t, err)
				for _, x := range b.Records {
					switch {
					case x.Seq != next:
						t.Fatalf("record %d, want %d", x.Seq, next)
					case x.Lost > 0:
						if !x.Void || !gone[x.Seq] {
							t.Fatalf("%+v is not in %+v", x, rep.Lost)
						}
						next += x.Lost
					case gone[x.Seq] || !bytes.Equal(x.Payload, payload(x.Seq)):
						t.Fatalf("record %d: %.20q", x.Seq, x.Payload)
					default:
						next++
					}
				}
				b.Release()
			}
			if len(rep.Lost) > 0 {
				if _, _, err := l.Get(rep.Lost[0].First); !errors.Is(err, ErrNotFound) {
					t.Errorf("Get of a lost record: %v", err)
				}
			}
		})
	}
}

func TestRepairRefuses(t *testing.T) {
	once(t)
	t.Parallel()
	if _, err := Repair(filepath.Join(t.TempDir(), "absent"), RepairOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	dir := t.TempDir()
	l, _ := open(t, dir, smallOptions())
	wait(t, l, appendN(t, l, 30))
	if _, err := Repair(dir, RepairOptions{}); !errors.Is(err, ErrLocked) {
		t.Errorf("in use: %v", err)
	}
	must(t, l.Close())
	b, err := os.ReadFile(dir + "/slot-0000")
	must(t, err)
	b[dataStart+frameHeader] ^= 1
	must(t, os.WriteFile(dir+"/slot-0000", b, 0o600))
	before := readImage(t, dir)
	_, err = Repair(dir, RepairOptions{KeepFree: 1 << 60})
	if err == nil || !strings.Contains(err.Error(), "nothing was changed") || !strings.Contains(err.Error(), "make room") {
		t.Errorf("no room: %v", err)
	}
	if _, err = Repair(dir, RepairOptions{Quarantine: dir}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("quarantine exists: %v", err)
	}
	after := readImage(t, dir)
	delete(before, "lock")
	delete(after, "lock")
	if !maps.EqualFunc(before, after, bytes.Equal) {
		t.Error("a refused repair changed the log")
	}
	must(t, os.WriteFile(dir+"/meta", make([]byte, 2*pageSize), 0o600))
	if _, err = Repair(dir, RepairOptions{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("meta: %v", err)
	}
}

// errKilled ends a repair as the death of its process does: nothing more is
// written.
var errKilled = errors.New("killed")

// A repair that is killed at any of its steps and started again keeps what one
// that was not keeps: every whole record.
func TestRepairKilled(t *testing.T) {
	once(t)
	t.Parallel()
	src := t.TempDir()
	l, last := rotated(t, src, 1500)
	var live []SlotStats
	for _, s := range l.Stats().Slots {
		if s.Segment != 0 {
			live = append(live, s)
		}
	}
	slices.SortFunc(live, func(a, b SlotStats) int { return int(a.Segment) - int(b.Segment) })
	must(t, l.Close())
	im := readImage(t, src)
	for _, s := range live[:2] { // a few records, also the first of all
		b := bytes.Clone(im[slotName(s.Slot)])
		for _, off := range []int64{dataStart + frameHeader, 20000, 20001, 60000} {
			b[off] ^= 1
		}
		im[slotName(s.Slot)] = b
	}
	repaired := func(steps int) (records map[uint64]string, finished bool) {
		dir := filepath.Join(t.TempDir(), "log")
		im.write(t, dir)
		n := 0
		_, err := Repair(dir, RepairOptions{Quarantine: dir + ".a", step: func() error {
			if n++; n > steps {
				return errKilled
			}
			return nil
		}})
		if finished = err == nil; !finished {
			if !errors.Is(err, errKilled) {
				t.Fatalf("killed at step %d: %v", steps+1, err)
			}
			_, err = Repair(dir, RepairOptions{Quarantine: dir + ".b"})
			must(t, err)
		}
		if _, err := Verify(t.Context(), dir); err != nil {
			t.Fatalf("killed at step %d: %v", steps+1, err)
		}
		l, _, err := Open(dir, smallOptions())
		must(t, err)
		defer l.Close()
		if _, err := os.Stat(filepath.Join(dir, repairTemp)); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("killed at step %d: a slot stays half made: %v", steps+1, err)
		}
		records = map[uint64]string{}
		for r, next := l.Reader(1), uint64(0); next < last; {
			b, err := r.Next(t.Context(), 64, 1<<20)
			must(t, err)
			for _, x := range b.Records {
				if next = x.End(); x.Lost == 0 {
					records[x.Seq] = string(x.Payload)
				}
			}
			b.Release()
		}
		return records, finished
	}
	want, _ := repaired(1 << 20)
	if n, all := uint64(len(want)), last+1-live[0].FirstSeq; n >= all || n < all-10 {
		t.Fatalf("%d records of %d are kept", n, all)
	}
	steps := 0
	for ; ; steps++ {
		got, finished := repaired(steps)
		if !maps.Equal(got, want) {
			t.Errorf("killed at step %d: %d records are kept, want %d", steps+1, len(got), len(want))
		}
		if finished {
			break
		}
	}
	if steps < 12 {
		t.Errorf("the repair took %d steps", steps)
	}
}

// However many records are gone from a slot that is full of the smallest ones,
// what says so fits it.
func TestRepairFullSlot(t *testing.T) {
	once(t)
	t.Parallel()
	for _, every := range []uint64{2, 3, 7} {
		dir := t.TempDir()
		l, _ := open(t, dir, Options{Mode: ModeMapped, SegmentBytes: minSegment, MaxBytes: 4 * minSegment})
		for l.Stats().Tail.Segment < 3 {
			_, err := l.Append(ClassAction, []byte{1})
			must(t, err)
		}
		seq, err := l.Append(ClassAction, []byte{1})
		must(t, err)
		wait(t, l, seq)
		slots := l.Stats().Slots
		must(t, l.Close())
		damaged := uint64(0)
		for _, s := range slots {
			if s.Segment != 1 && s.Segment != 2 {
				continue
			}
			b, err := os.ReadFile(filepath.Join(dir, slotName(s.Slot)))
			must(t, err)
			for off := int64(dataStart); off < dataStart+s.Bytes; off += frameSize(int(le.Uint32(b[off:]))) {
				if n := le.Uint64(b[off+8:]) >> 8; b[off+8]&kindMarker == 0 && n%every == 1 {
					b[off+frameHeader] ^= 1
					damaged++
				}
			}
			must(t, os.WriteFile(filepath.Join(dir, slotName(s.Slot)), b, 0o600))
		}
		rep, err := Repair(dir, RepairOptions{})
		must(t, err)
		if uint64(len(rep.Lost)) != damaged || damaged < 300 {
			t.Errorf("%d losses, %d records were damaged", len(rep.Lost), damaged)
		}
		v, err := Verify(t.Context(), dir)
		if err != nil || v.Lost != damaged || v.Last != seq {
			t.Errorf("verify: %+v, %v, want %d lost of %d", v, err, damaged, seq)
		}
		l, _ = open(t, dir, Options{Mode: ModeMapped, SegmentBytes: minSegment, MaxBytes: 4 * minSegment})
		first, end, found, err := l.LossAt(rep.Lost[1].First)
		if err != nil || first != rep.Lost[1].First || end != rep.Lost[1].Last || time.Since(found) > time.Hour {
			t.Errorf("LossAt: %d to %d at %v, %v, want %+v", first, end, found, err, rep.Lost[1])
		}
		must(t, l.Close())
	}
}
