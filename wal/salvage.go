package wal

// maxHole bounds how many records in a row may be missing for salvage: more
// writers than this were not at work at once.
const maxHole = 1 << 16

// salvage mends what a killed process leaves behind in its last group: a record
// that was reserved and never published, with published ones after it. Whoever
// wrote those may have acted on them, so they are kept: each missing record
// becomes a void one, of which nobody was told. It returns how many those are.
//
// It writes only where no commit marker follows. The committer writes one when
// every record before it is published; a marker beyond a hole therefore speaks
// of lost bytes, not of an unpublished record, and is judged by walk.beyond. A
// hole at the very end, or one that leads to no whole record, is a torn tail.
// end is a place at or before the first hole.
func salvage(s *found, end place) (voids uint64) {
	for p := end.follow(s); ; p = p.follow(s) {
		if _, whole := parseFrame(s.m, keyAt(s.epochs, p.off), p.off, int64(len(s.m))); whole {
			return voids // out of sequence: damage, for walk to say
		}
		to, seq := beyondHole(s, p.off, p.next)
		if to == 0 {
			return voids
		}
		for missing := seq - p.next; missing > 0; missing-- {
			size := frameSize(1)
			if missing == 1 {
				size = to - p.off // the last one takes the rest
			}
			n := int(size - frameHeader)
			clear(s.m[p.off+frameHeader : p.off+size])
			putFrame(s.m[p.off:], keyAt(s.epochs, p.off), p.off, n, kindVoid|byte(ClassError), p.next)
			p.off, p.next, voids = p.off+size, p.next+1, voids+1
		}
	}
}

// beyondHole finds the first whole record after a hole at off, where the record
// next is missing. to is 0 when there is none that salvage may keep.
func beyondHole(s *found, off int64, next uint64) (to int64, seq uint64) {
	end := int64(len(s.m))
	for o := off + frameSize(1); o+frameHeader <= end; o += 8 {
		got := le.Uint64(s.m[o+8:]) >> 8
		if got+1 < next || got > next+maxHole {
			continue // cheap: almost every place ends here
		}
		f, ok := parseFrame(s.m, keyAt(s.epochs, o), o, end)
		if !ok {
			continue
		}
		if f.control() {
			return 0, 0
		}
		if to == 0 && f.seq > next && int64(f.seq-next)*frameSize(1) <= o-off {
			to, seq = o, f.seq
		}
		o += f.size - 8
	}
	return to, seq
}
