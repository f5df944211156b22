package walfault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/autonomyops/autonomy/wal"
)

// A verdict is what one state of the disk says about the log. Only torn and
// created are not faults.
type verdict struct {
	acked    uint64 // records that had been acknowledged
	lost     uint64 // of them, missing or changed
	invented uint64 // records that nobody appended
	torn     bool   // a tail was cut
	created  bool   // there was no log yet
	refused  error  // Open or Verify called it damaged
	faults   []error
}

func (v *verdict) fault(format string, args ...any) {
	if len(v.faults) < 10 {
		v.faults = append(v.faults, fmt.Errorf(format, args...))
	}
}

// check opens the log in dir, which the power cut left after at events, and
// compares it with the notes. ring is as in work: what the process before had
// there went with the power.
func check(ctx context.Context, dir, ring string, n notes, at int) (v verdict) {
	for _, a := range n.Acked {
		if a.Clock <= at {
			v.acked = max(v.acked, a.Seq)
		}
	}
	var asked, moved [wal.NumClasses]uint64
	for _, c := range n.Requested {
		if c.Clock <= at {
			asked[c.Class] = max(asked[c.Class], c.Seq)
		}
	}
	for _, c := range n.Moved {
		if c.Clock <= at {
			moved[c.Class] = max(moved[c.Class], c.Seq)
		}
	}

	before, err := wal.Verify(ctx, dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if v.lost = v.acked; v.acked > 0 {
			v.fault("the log is not there, %d records were acknowledged", v.acked)
			return v
		}
	case err != nil:
		v.refused = fmt.Errorf("verify: %w", err)
		v.fault("%w", v.refused)
	default:
		v.snapshot(ctx, dir, n, before.First)
	}
	l, rec, err := wal.Open(dir, optionsWith(ring))
	if err != nil {
		v.refused = err
		v.lost = v.acked
		v.fault("%w", err)
		return v
	}
	v.torn, v.created = rec.TornBytes > 0, rec.Created
	if v.refused == nil && before.Records > 0 && (before.First != rec.FirstSeq || before.Last > rec.LastSeq) {
		v.fault("verify found records %d to %d, open %d to %d", before.First, before.Last, rec.FirstSeq, rec.LastSeq)
	}

	// What went must have been let go.
	first := rec.FirstSeq
	if first == 0 {
		first = rec.LastSeq + 1
	}
	for seq := uint64(1); seq < first; seq++ {
		a, ok := n.Appended[seq]
		if ok && seq > asked[a.Class] && seq <= v.acked {
			v.lost++
			v.fault("record %d is gone, the %v cursor was at most at %d", seq, a.Class, asked[a.Class])
		}
	}
	if rec.LastSeq < v.acked {
		v.lost += v.acked - rec.LastSeq
		v.fault("the log ends at %d, acknowledged up to %d", rec.LastSeq, v.acked)
	}
	for c := range wal.NumClasses {
		switch got := l.Cursor(c); {
		case got > rec.LastSeq:
			v.fault("the %v cursor stands at %d, the log ends at %d", c, got, rec.LastSeq)
		case got < moved[c]:
			v.fault("the %v cursor stands at %d, it had been moved to %d", c, got, moved[c])
		case got > asked[c]:
			v.fault("the %v cursor stands at %d, nobody moved it beyond %d", c, got, asked[c])
		}
	}
	v.read(ctx, l, n, first, rec.LastSeq)

	// The log goes on.
	next := rec.LastSeq + 1
	p := make([]byte, 300)
	for range 3 {
		seq, err := l.Append(wal.ClassLifecycle, p)
		if errors.Is(err, wal.ErrCeilingExceeded) {
			break // the cut came while it was full
		}
		if err == nil {
			err = l.WaitDurable(ctx, seq)
		}
		if err != nil || seq != next {
			v.fault("append after recovery: record %d, %w; want record %d", seq, err, next)
			break
		}
		next++
	}
	if err := l.Close(); err != nil {
		v.fault("close after recovery: %w", err)
	}
	after, err := wal.Verify(ctx, dir)
	if err != nil || after.Last != next-1 || after.TornBytes != 0 {
		v.fault("verify after recovery: %+v, %w; want the last record to be %d", after, err, next-1)
	}
	return v
}

// snapshot compares what is in the log before it is opened for writing, and so
// before anything in it can be used again.
func (v *verdict) snapshot(ctx context.Context, dir string, n notes, first uint64) {
	s, err := wal.OpenReadOnly(dir)
	if err != nil {
		v.fault("open for reading: %w", err)
		return
	}
	defer s.Close()
	next := max(first, 1)
	for e, err := range s.Records(ctx) {
		if err != nil {
			v.fault("read the closed log at record %d: %w", next, err)
			return
		}
		if e.Seq != next {
			v.fault("record %d follows %d", e.Seq, next-1)
			next = e.Seq
		}
		next++
		v.compare(e.Record, n)
	}
	if next <= v.acked {
		v.fault("the closed log can be read up to %d, acknowledged up to %d", next-1, v.acked)
	}
}

// read compares the records of the open log. Its oldest slot may have been made
// free since it was opened, if the cursors are past it.
func (v *verdict) read(ctx context.Context, l *wal.Log, n notes, first, last uint64) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	rd := l.Reader(first)
	for want := first; want <= last; {
		b, err := rd.Next(ctx, 256, 1<<20)
		if err != nil {
			v.lost += max(v.acked, want-1) - (want - 1)
			v.fault("read record %d of %d: %w", want, last, err)
			return
		}
		for _, r := range b.Records {
			for ; want == first && first < r.Seq; first++ {
				if a := n.Appended[first]; first > l.Cursor(a.Class) {
					v.fault("record %d is gone, the %v cursor is at %d", first, a.Class, l.Cursor(a.Class))
				}
				want++
			}
			if r.Seq != want {
				v.fault("record %d follows %d", r.Seq, want-1)
				want = r.Seq
			}
			want++
			v.compare(r, n)
		}
		b.Release()
	}
}

// compare holds a record against the one that was appended.
func (v *verdict) compare(r wal.Record, n notes) {
	a, ok := n.Appended[r.Seq]
	expect := make([]byte, a.Size)
	fill(expect, n.Seed, r.Seq)
	switch {
	case !ok:
		v.invented++
		v.fault("record %d was never appended", r.Seq)
	case r.Void && (a.Void || r.Seq > v.acked): // aborted, or cut off before it was published
	case r.Void:
		v.lost++
		v.fault("record %d is void, it was acknowledged", r.Seq)
	case a.Void, r.Class != a.Class, !bytes.Equal(r.Payload, expect):
		v.invented++
		if r.Seq <= v.acked {
			v.lost++
		}
		v.fault("record %d: %v of %d bytes is not the one that was appended (%v of %d bytes, void %v)",
			r.Seq, r.Class, len(r.Payload), a.Class, a.Size, a.Void)
	}
}
