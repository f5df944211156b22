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

// image is the files of a log directory.
type image map[string][]byte

func readImage(t testing.TB, dir string) image {
	t.Helper()
	im := image{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if im[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return im
}

func (im image) write(t testing.TB, dir string) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, b := range im {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// kill leaves dir, and the ring, as they were when the process was killed now.
// cleanup lets the log be closed.
func kill(t testing.TB, l *Log, cleanup func()) {
	t.Helper()
	im := readImage(t, l.dir)
	var held []byte
	var name string
	if l.ring != nil {
		name = l.ring.file.Name()
		var err error
		if held, err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
	}
	cleanup()
	l.Close()
	for file, b := range im {
		if err := os.WriteFile(filepath.Join(l.dir, file), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if name != "" {
		if err := os.WriteFile(name, held, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// smallOptions make a log that is quick to copy.
func smallOptions() Options {
	return inMode(Options{SegmentBytes: minSegment, MaxBytes: 4 * minSegment, SyncInterval: time.Hour})
}

// manyGroups makes a log with groups of 1 to 5 records.
func manyGroups(t testing.TB, dir string, groups int) (last uint64) {
	t.Helper()
	l, _ := open(t, dir, smallOptions())
	for i := range groups {
		last = appendN(t, l, 1+i%5)
		wait(t, l, last)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return last
}

// crashed makes a log of groups that was not closed: the image is taken while
// it runs, after the last group is durable.
func crashed(t testing.TB, groups int) (image, uint64) {
	t.Helper()
	dir := t.TempDir()
	l, _ := open(t, dir, smallOptions())
	var last uint64
	for i := range groups {
		last = appendN(t, l, 1+i%5)
		wait(t, l, last)
	}
	return readImage(t, dir), last
}

// verifyAll opens the log in dir and reads all of it; every record must be what
// was written. It returns the last sequence.
func verifyAll(t testing.TB, dir string) (uint64, Recovery, error) {
	t.Helper()
	l, rec, err := Open(dir, smallOptions())
	if err != nil {
		return 0, rec, err
	}
	defer l.Close()
	if rec.LastSeq > 0 {
		check(t, l, rec.FirstSeq, rec.LastSeq)
	}
	return rec.LastSeq, rec, nil
}

// readOnly reads all of dir without opening it; every record must be what was
// written.
func readOnly(t testing.TB, dir string) (last uint64, rec Recovery, err error) {
	t.Helper()
	s, err := OpenReadOnly(dir)
	if err != nil {
		return 0, rec, err
	}
	defer s.Close()
	for e, err := range s.Records(t.Context()) {
		if err != nil {
			return last, rec, err
		}
		if last != 0 && e.Seq != last+1 || !bytes.Equal(e.Payload, payload(e.Seq)) {
			t.Fatalf("record after %d: got %d %q", last, e.Seq, e.Payload)
		}
		last = e.Seq
	}
	return last, Recovery{LastSeq: last, TornBytes: s.tail.tornBytes, TornRecords: s.tail.tornRecords}, nil
}

// After a clean end every flipped bit of the records and markers is damage; in
// the header or beside the slots it is repaired or refused. No record is ever
// changed or invented.
func TestFlipAnyBit(t *testing.T) {
	once(t)
	t.Parallel()
	src := t.TempDir()
	last := manyGroups(t, src, 12)
	im := readImage(t, src)
	slot := im["slot-0000"]
	end := len(bytes.TrimRight(slot, "\x00"))
	confirmed := end - markerFrame - 8 // the last marker itself is not confirmed by another
	dir := filepath.Join(t.TempDir(), "log")
	step := 61
	if testing.Short() {
		step = 211
	}
	im.write(t, dir)
	flip := func(off, bit int) {
		slot[off] ^= 1 << bit
		f, err := os.OpenFile(filepath.Join(dir, "slot-0000"), os.O_RDWR, 0)
		must(t, err)
		_, err = f.WriteAt(slot[off:off+1], int64(off))
		must(t, errors.Join(err, f.Close()))
	}
	var damaged, cut, whole int
	for bit := 0; bit < (end+64)*8; bit += step {
		off := bit / 8
		if off == headerSize || off == pageSize {
			off++
		}
		flip(off, bit%8)
		read := readOnly
		if bit%16 == 0 {
			read = verifyAll // changes the log, and costs syncs
		}
		got, _, err := read(t, dir)
		if err == nil && got < last {
			cut++
			if off >= dataStart && off < confirmed {
				t.Fatalf("bit %d of byte %d: opened with %d of %d records", bit%8, off, got, last)
			}
		} else if err == nil {
			whole++
			if off >= dataStart && off < confirmed {
				t.Fatalf("bit %d of byte %d went unnoticed", bit%8, off)
			}
		} else {
			damaged++
			var d *DamageError
			if !errors.As(err, &d) || d.Slot != "slot-0000" || d.Reason == "" {
				t.Fatalf("byte %d: %v", off, err)
			}
		}
		flip(off, bit%8)
		if bit%16 == 0 {
			im.write(t, dir)
		}
	}
	if damaged == 0 || whole == 0 {
		t.Fatalf("damaged %d, cut %d, whole %d: the test did not test much", damaged, cut, whole)
	}
}

// A crash in the middle of the last group: cut at every byte of it. What was
// acknowledged before is there, what is there is right, and it can go on.
func TestTornTail(t *testing.T) {
	t.Parallel()
	im, last := crashed(t, 7)
	slot := im["slot-0000"]
	end := len(bytes.TrimRight(slot, "\x00"))
	h, epochs, _, err := readHeader(slot)
	if err != nil {
		t.Fatal(err)
	}
	var before, acked int64 // where the last marker starts; the records before its group
	var group int64
	for off := int64(dataStart); ; {
		f, ok := parseFrame(slot, epochs[0].key, off, int64(len(slot)))
		if !ok {
			break
		}
		if f.marker() {
			k := parseMarker(f.payload)
			group, before, acked = int64(k.prevOff), f.off, int64(f.seq-k.count)
		}
		off += f.size
	}
	if h.first != 1 || before == 0 || acked == 0 {
		t.Fatalf("first %d, marker %d, acked %d", h.first, before, acked)
	}
	step := int64(1)
	if testing.Short() {
		step = 5 // of the cuts; still every kind of byte, and every 16th and 64th
	}
	dir := filepath.Join(t.TempDir(), "log")
	for _, fill := range []struct {
		name string
		with func(b []byte)
	}{
		{"zeroes", func(b []byte) { clear(b) }},
		{"stale bytes", func(b []byte) {
			for i := range b {
				b[i] = byte(i*7 + 1)
			}
		}},
	} {
		for off := group; off < int64(end); off += step {
			torn := maps.Clone(im)
			b := bytes.Clone(slot)
			fill.with(b[off : end+8])
			torn["slot-0000"] = b
			torn.write(t, dir)
			read := readOnly
			if off%16 == 0 {
				read = verifyAll
			}
			got, rec, err := read(t, dir)
			if err != nil {
				t.Fatalf("%s from %d: %v", fill.name, off, err)
			}
			if got < uint64(acked) || got > last {
				t.Fatalf("%s from %d: %d records, want %d to %d", fill.name, off, got, acked, last)
			}
			if off > group+frameHeader && off < before && got == uint64(acked) && rec.TornBytes == 0 && fill.name != "zeroes" {
				t.Fatalf("%s from %d: a torn record was not reported", fill.name, off)
			}
			if off%64 == 0 { // go on, and see that it holds
				l, _ := open(t, dir, smallOptions())
				more := appendN(t, l, 3)
				if more != got+3 {
					t.Fatalf("appended up to %d, want %d", more, got+3)
				}
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				if _, err := Verify(t.Context(), dir); err != nil {
					t.Fatalf("%s from %d: after going on: %v", fill.name, off, err)
				}
			}
		}
	}
}

// Writeback may write the marker and not the records: nobody was told, so that
// is a torn tail. One group earlier it is damage.
func TestHoleBelowMarker(t *testing.T) {
	t.Parallel()
	im, last := crashed(t, 7)
	slot := im["slot-0000"]
	var groups []marker
	_, epochs, _, _ := readHeader(slot)
	for off := int64(dataStart); ; {
		f, ok := parseFrame(slot, epochs[0].key, off, int64(len(slot)))
		if !ok {
			break
		}
		if f.marker() {
			groups = append(groups, parseMarker(f.payload))
		}
		off += f.size
	}
	dir := filepath.Join(t.TempDir(), "log")
	for i, g := range groups {
		b := bytes.Clone(slot)
		clear(b[g.prevOff : g.prevOff+24])
		torn := maps.Clone(im)
		torn["slot-0000"] = b
		torn.write(t, dir)
		before := readImage(t, dir)
		got, rec, err := verifyAll(t, dir)
		if i == len(groups)-1 {
			if err != nil || got != last-g.count || rec.TornRecords == 0 {
				t.Fatalf("hole in the last group: %d records, %+v, %v", got, rec, err)
			}
			continue
		}
		var d *DamageError
		if !errors.As(err, &d) || d.Offset != int64(g.prevOff) || !errors.Is(err, ErrDamaged) {
			t.Fatalf("hole in group %d: %v", i, err)
		}
		after := readImage(t, dir)
		delete(before, "lock")
		delete(after, "lock")
		if !maps.EqualFunc(before, after, bytes.Equal) {
			t.Fatal("a refused Open changed the log")
		}
	}
}

// rotated makes a log over several segments, all delivered up to cursor.
func rotated(t testing.TB, dir string, records int) (*Log, uint64) {
	l, _ := open(t, dir, smallOptions())
	var last uint64
	for range records {
		last = appendN(t, l, 1)
		if last%20 == 0 {
			wait(t, l, last)
			for c := range NumClasses {
				if err := l.Advance(c, last-10); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	wait(t, l, last)
	return l, last
}

func TestDamagedMiddle(t *testing.T) {
	t.Parallel()
	src := t.TempDir()
	l, last := rotated(t, src, 1500)
	st := l.Stats()
	if st.Rotations < 5 {
		t.Fatalf("only %d rotations", st.Rotations)
	}
	var live []string
	// A slot that is not needed any more is given up a little later.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		live = live[:0]
		segs := slices.Clone(l.Stats().Slots)
		slices.SortFunc(segs, func(a, b SlotStats) int { return int(a.Segment) - int(b.Segment) })
		for _, s := range segs {
			if s.Segment != 0 {
				live = append(live, slotName(s.Slot))
			}
		}
		if len(live) <= 3 || time.Now().After(deadline) {
			break
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	im := readImage(t, src)
	if len(live) != 3 {
		t.Fatalf("live slots: %v", live)
	}
	dir := filepath.Join(t.TempDir(), "log")
	tests := []struct {
		name string
		do   func(im image)
		want string
	}{
		{"oldest slot dropped", func(im image) { delete(im, live[0]) }, "no cursor is past|"},
		{"middle slot dropped", func(im image) { delete(im, live[1]) }, "a slot is missing"},
		{"newest slot dropped", func(im image) { delete(im, live[2]) }, "a slot is missing"},
		{"oldest and middle slots swapped", func(im image) { im[live[0]], im[live[1]] = im[live[1]], im[live[0]] }, "|"},
		{"middle slot zeroed", func(im image) { im[live[1]] = make([]byte, len(im[live[1]])) }, "a slot is missing"},
		{"middle slot replaced by the oldest", func(im image) { im[live[1]] = im[live[0]] }, "claims the same segment id"},
		{"newest slot cut", func(im image) { im[live[2]] = im[live[2]][:8192] }, "it was cut or replaced"},
		{"newest slot longer", func(im image) { im[live[2]] = append(bytes.Clone(im[live[2]]), 0) }, "it was cut or replaced"},
		{"both header copies", func(im image) {
			b := bytes.Clone(im[live[1]])
			b[20] ^= 1
			b[pageSize+20] ^= 1
			im[live[1]] = b
		}, "both header copies are damaged"},
		{"one header copy", func(im image) {
			b := bytes.Clone(im[live[1]])
			b[20] ^= 1
			im[live[1]] = b
		}, ""},
		{"the other header copy", func(im image) {
			b := bytes.Clone(im[live[2]])
			clear(b[pageSize:dataStart])
			im[live[2]] = b
		}, ""},
		{"records swapped", func(im image) {
			b := bytes.Clone(im[live[1]])
			n := frameSizeAt(b, dataStart)
			first := bytes.Clone(b[dataStart : dataStart+n])
			m := frameSizeAt(b, dataStart+n)
			copy(b[dataStart:], b[dataStart+n:dataStart+n+m])
			copy(b[dataStart+m:], first)
			im[live[1]] = b
		}, "no whole record"},
		{"records from another slot", func(im image) {
			b := bytes.Clone(im[live[1]])
			copy(b[dataStart:], im[live[0]][dataStart:dataStart+4096])
			im[live[1]] = b
		}, "no whole record"},
		{"end of the newest slot zeroed", func(im image) {
			b := bytes.Clone(im[live[2]])
			clear(b[dataStart:])
			im[live[2]] = b
		}, "the end of the log is missing"},
		{"meta missing", func(im image) { delete(im, "meta") }, "was in use"},
		{"meta zeroed", func(im image) { im["meta"] = make([]byte, 2*pageSize) }, "both copies are damaged"},
		{"meta of another log", func(im image) {
			other := t.TempDir()
			manyGroups(t, other, 1)
			im["meta"] = readImage(t, other)["meta"]
		}, "it belongs to log"},
		{"one meta copy", func(im image) {
			b := bytes.Clone(im["meta"])
			clear(b[:metaSize])
			im["meta"] = b
		}, ""},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			im := maps.Clone(im)
			tc.do(im)
			im.write(t, dir)
			got, rec, err := verifyAll(t, dir)
			want, alt := strings.CutSuffix(tc.want, "|") // may also be harmless: nothing undelivered is lost
			if err != nil && !errors.Is(err, ErrDamaged) {
				t.Fatalf("error is not ErrDamaged: %v", err)
			}
			switch {
			case tc.want == "" || alt && err == nil:
				if err != nil || got != last {
					t.Fatalf("%d records up to %d of %d, %v", rec.Records, got, last, err)
				}
			case err == nil || !strings.Contains(err.Error(), want):
				t.Fatalf("%v (records %d to %d), want %q", err, rec.FirstSeq, got, want)
			}
		})
	}
}

func frameSizeAt(b []byte, off int64) int64 { return frameSize(int(le.Uint32(b[off:]))) }

// A slot in its next life still holds whole records of the one before: they must
// never be read, wherever the new tail ends.
func TestStaleBytesOfRecycledSlot(t *testing.T) {
	t.Parallel()
	src := t.TempDir()
	l, last := rotated(t, src, 1500)
	im := readImage(t, src) // without Close: the tail has no last word
	l.Close()
	dir := filepath.Join(t.TempDir(), "log")
	for i := range 3 {
		im.write(t, dir)
		got, rec, err := verifyAll(t, dir)
		if err != nil || got != last || rec.FirstSeq < 100 {
			t.Fatalf("%+v, %v, want up to %d", rec, err, last)
		}
		l, _ := open(t, dir, smallOptions())
		last = appendN(t, l, 1+i)
		wait(t, l, last)
		im = readImage(t, dir)
		l.Close()
	}
}

// Recovery goes on in the same slot until its header is full, then in the next:
// restarts do not eat the log up.
func TestManyRecoveries(t *testing.T) {
	t.Parallel()
	im, last := crashed(t, 3)
	dir := filepath.Join(t.TempDir(), "log")
	var most int
	for range maxEpochs + 10 {
		im.write(t, dir)
		l, rec, err := Open(dir, smallOptions())
		if err != nil {
			t.Fatal(err)
		}
		if rec.LastSeq != last {
			t.Fatalf("recovered up to %d, want %d", rec.LastSeq, last)
		}
		most = max(most, rec.Segments)
		last = appendN(t, l, 1)
		wait(t, l, last)
		im = readImage(t, dir)
		l.Close()
	}
	if most != 2 {
		t.Fatalf("%d segments, want 2", most)
	}
	im.write(t, dir)
	if got, rec, err := verifyAll(t, dir); err != nil || got != last || rec.FirstSeq != 1 {
		t.Fatalf("%+v, %v", rec, err)
	}
}

// Records that were published but not synced survive the process: recovery
// keeps them.
func TestUncommittedAreKept(t *testing.T) {
	dir := t.TempDir()
	l, _ := open(t, dir, smallOptions())
	wait(t, l, appendN(t, l, 5))
	last := appendN(t, l, 7)
	ring := l.ring != nil
	kill(t, l, func() {})
	want := Report{Uncommitted: 7, Records: 12}
	if ring {
		want = Report{Records: 5}
	}
	if rep, err := Verify(t.Context(), dir); err != nil || rep.Uncommitted != want.Uncommitted || rep.Records != want.Records {
		t.Fatalf("%+v, %v", rep, err)
	}
	l, rec, err := Open(dir, smallOptions())
	if err != nil || rec.LastSeq != last || rec.Uncommitted != 7 || ring != (rec.Replayed > 0) {
		t.Fatalf("%+v, %v", rec, err)
	}
	if l.Durable() != last {
		t.Fatalf("durable is %d after Open, want %d", l.Durable(), last)
	}
	check(t, l, 1, last)
	l.Close()
}

// Records published behind one that was never published are kept: their writers
// may have acted on them. The missing ones become void.
func TestSalvage(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		open  []int // of ten records, which are never published
		size  int   // of those
		kept  uint64
		voids []uint64
	}{
		"one in the middle":        {[]int{3}, 100, 10, []uint64{8}},
		"the first":                {[]int{0}, 100, 10, []uint64{5}},
		"several in a row":         {[]int{2, 3, 4}, 1, 10, []uint64{7, 8, 9}},
		"several apart":            {[]int{1, 5, 7}, 333, 10, []uint64{6, 10, 12}},
		"the last: a torn tail":    {[]int{9}, 100, 9, nil},
		"the last two and another": {[]int{4, 8, 9}, 100, 8, []uint64{9}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l, _ := open(t, dir, smallOptions())
			wait(t, l, appendN(t, l, 4))
			var pending []Reservation
			for i := range 10 {
				seq := uint64(5 + i)
				size := len(payload(seq))
				if slices.Contains(tc.open, i) {
					size = tc.size
				}
				r, err := l.Reserve(Class(seq%uint64(NumClasses)), size)
				if err != nil {
					t.Fatal(err)
				}
				if slices.Contains(tc.open, i) {
					pending = append(pending, r)
					continue
				}
				copy(r.Buf, payload(seq))
				r.Commit()
			}
			kill(t, l, func() {
				for _, r := range pending {
					r.Abort() // so that Close can end
				}
			})
			l, rec, err := Open(dir, smallOptions())
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if rec.LastSeq != 4+tc.kept || rec.Salvaged != uint64(len(tc.voids)) {
				t.Fatalf("%+v, want records up to %d and %d salvaged", rec, 4+tc.kept, len(tc.voids))
			}
			for seq := uint64(1); seq <= rec.LastSeq; seq++ {
				got, _, err := l.Get(seq)
				if slices.Contains(tc.voids, seq) {
					if !errors.Is(err, ErrNotFound) {
						t.Errorf("void record %d: %.20q, %v", seq, got, err)
					}
					continue
				}
				if err != nil || !bytes.Equal(got, payload(seq)) {
					t.Errorf("record %d: %.20q, %v", seq, got, err)
				}
			}
			// The log goes on, and holds together.
			wait(t, l, appendN(t, l, 3))
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if rep, err := Verify(t.Context(), dir); err != nil || rep.Last != rec.LastSeq+3 {
				t.Errorf("%+v, %v", rep, err)
			}
		})
	}
}

func TestInterruptedMaking(t *testing.T) {
	src := t.TempDir()
	l, _ := open(t, src, smallOptions())
	l.Close()
	full := readImage(t, src)
	blank := make([]byte, len(full["slot-0000"]))
	dir := filepath.Join(t.TempDir(), "log")
	for name, im := range map[string]image{
		"nothing":       {},
		"one slot":      {"slot-0000": blank},
		"a partial one": {"slot-0000": blank, "slot-0001": blank[:12345]},
		"all, no meta":  {"slot-0000": blank, "slot-0001": blank, "slot-0002": blank, "slot-0003": blank},
	} {
		im.write(t, dir)
		if _, err := Verify(t.Context(), dir); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrDamaged) {
			t.Fatalf("%s: verify: %v", name, err)
		}
		l, rec, err := Open(dir, smallOptions())
		if err != nil || !rec.Created {
			t.Fatalf("%s: %+v, %v", name, rec, err)
		}
		wait(t, l, appendN(t, l, 3))
		l.Close()
	}
}

// FuzzRecover opens arbitrary bytes as a log: no panic, and no record that was
// not written.
func FuzzRecover(f *testing.F) {
	im, _ := crashed(f, 6)
	slot := im["slot-0000"]
	end := len(bytes.TrimRight(slot, "\x00"))
	f.Add(uint32(0), []byte{})
	f.Add(uint32(dataStart), bytes.Repeat([]byte{0xff}, 64))
	f.Add(uint32(dataStart+500), bytes.Clone(slot[dataStart:dataStart+300]))
	f.Add(uint32(end), bytes.Clone(slot[end-markerFrame:end]))
	f.Add(uint32(0), make([]byte, dataStart))
	f.Add(uint32(epochStart), make([]byte, epochSize))
	f.Fuzz(func(t *testing.T, off uint32, b []byte) {
		changed := maps.Clone(im)
		s := bytes.Clone(slot)
		if int(off) < len(s) {
			copy(s[off:], b)
		}
		changed["slot-0000"] = s
		dir := filepath.Join(t.TempDir(), "log")
		changed.write(t, dir)
		snap, err := OpenReadOnly(dir)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatal(err)
			}
			return
		}
		defer snap.Close()
		next := uint64(1)
		for e, err := range snap.Records(t.Context()) {
			if err != nil {
				if !errors.Is(err, ErrDamaged) {
					t.Fatal(err)
				}
				break
			}
			if e.Seq != next || !bytes.Equal(e.Payload, payload(next)) {
				t.Fatalf("record %d: got %d %q", next, e.Seq, e.Payload)
			}
			next++
		}
		if _, _, err := verifyAll(t, dir); err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
	})
}

// FuzzFrame parses arbitrary bytes as a frame, a header and a meta file.
func FuzzFrame(f *testing.F) {
	f.Add([]byte{}, int64(0))
	f.Add(bytes.Repeat([]byte{8, 0, 0, 0, 0, 0, 0, 0}, 40), int64(0))
	f.Fuzz(func(t *testing.T, b []byte, off int64) {
		m := make([]byte, 2*dataStart)
		copy(m[dataStart:], b)
		off = dataStart + (off&0xfff)&^7
		if fr, ok := parseFrame(m, 12345, off, int64(len(m))); ok {
			t.Fatalf("bytes without the key make a frame: %+v", fr)
		}
		copy(m, b)
		if h, _, used, err := readHeader(m); err == nil && used && h.logID != 0 && h.state != stateFree && h.id == 0 {
			t.Fatalf("header %+v", h)
		}
		if x, ok := readMeta(b); ok && x.slots < 2 {
			t.Fatalf("meta %+v", x)
		}
	})
}
