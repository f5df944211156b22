package powercut

import (
	"compress/gzip"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
)

// Kind is what an Event is.
type Kind uint8

// The kinds of events. An operation begins when the device receives it and ends
// when it answers.
const (
	WriteBegin Kind = iota
	WriteEnd
	FlushBegin
	FlushEnd
)

// An Event is one entry of a Recording.
type Event struct {
	Kind  Kind
	Begin int    // of an end: the index of its beginning
	Off   int64  // of WriteBegin
	Data  []byte // of WriteBegin
}

// A Recording is all that was done to a Disk.
type Recording struct {
	Base        *Image // what the device held at first
	Events      []Event
	IgnoreFlush bool // flushes made nothing durable
	Full        bool // the record is not complete: MaxRecorded was passed
}

// Stats counts what a Recording holds.
type Stats struct {
	Writes, Flushes int
	Bytes           int64
	InFlight        int // writes that some flush did not cover because they had not been answered when it came
}

// Stats counts the events.
func (r *Recording) Stats() (s Stats) {
	open := map[int]bool{}
	for i, e := range r.Events {
		switch e.Kind {
		case WriteBegin:
			s.Writes++
			s.Bytes += int64(len(e.Data))
			open[i] = true
		case WriteEnd:
			delete(open, e.Begin)
		case FlushBegin:
			s.Flushes++
			s.InFlight += len(open)
			clear(open) // each counts once
		}
	}
	return s
}

// Mode is what becomes of the writes that are not durable.
type Mode uint8

// The modes of a Cut.
const (
	DropAll Mode = iota // none arrived
	Prefix              // those before some place arrived, the later ones did not
	Subset              // some arrived, others did not, whatever their order
	Torn                // pieces of some arrived
	KeepAll             // all arrived
	numModes
)

func (m Mode) String() string {
	if m < numModes {
		return [...]string{"drop-all", "prefix", "subset", "torn", "keep-all"}[m]
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// A Cut is one power cut: after At events. Seed chooses which of the writes that
// are not durable arrived, as Mode says.
type Cut struct {
	At   int
	Mode Mode
	Seed uint64
}

func (c Cut) String() string { return fmt.Sprintf("cut at %d %v seed %d", c.At, c.Mode, c.Seed) }

// Cuts chooses n cuts from the events from to to: one at a random place of each
// of n equal parts, the modes in turn. The same seed gives the same cuts.
func Cuts(seed uint64, from, to, n int) []Cut {
	rng := rand.New(rand.NewPCG(seed, 0x706f776572637574))
	out := make([]Cut, n)
	span := to - from + 1
	for i := range out {
		a, b := from+i*span/n, from+(i+1)*span/n
		out[i] = Cut{At: a + rng.IntN(max(1, b-a)), Mode: Mode(i) % numModes, Seed: rng.Uint64()}
	}
	return out
}

// LastMoment is the next place at or after at where a flush has been worked on
// and not answered: nowhere is more at stake. Where none comes it is at.
func (r *Recording) LastMoment(at int) int {
	for i := at; i < len(r.Events); i++ {
		if r.Events[i].Kind == FlushEnd {
			return i
		}
	}
	return at
}

// split tells the writes that are durable after the first at events from those
// that may or may not be there, both in the order in which they began.
func (r *Recording) split(at int) (durable, open []int) {
	events := r.Events[:at]
	covered := -1 // writes that ended before this place are durable
	if !r.IgnoreFlush {
		for _, e := range events {
			if e.Kind == FlushEnd {
				covered = max(covered, e.Begin)
			}
		}
	}
	safe := make([]bool, at)
	for i, e := range events {
		if e.Kind == WriteEnd && i < covered {
			safe[e.Begin] = true
		}
	}
	for i, e := range events {
		switch {
		case e.Kind != WriteBegin:
		case safe[i]:
			durable = append(durable, i)
		default:
			open = append(open, i)
		}
	}
	return durable, open
}

// Image is what the device holds after the cut.
func (r *Recording) Image(c Cut) (*Image, error) {
	if c.At < 0 || c.At > len(r.Events) {
		return nil, fmt.Errorf("%v: the recording has %d events", c, len(r.Events))
	}
	m := r.Base.clone()
	durable, open := r.split(c.At)
	for _, i := range durable {
		m.write(r.Events[i].Data, r.Events[i].Off)
	}
	rng := rand.New(rand.NewPCG(c.Seed, uint64(c.At)))
	p := 0.1 + 0.8*rng.Float64() // of arriving
	end := rng.IntN(len(open) + 1)
	for k, i := range open {
		e := r.Events[i]
		switch c.Mode {
		case DropAll:
		case Prefix:
			if k < end {
				m.write(e.Data, e.Off)
			}
		case Subset:
			if rng.Float64() < p {
				m.write(e.Data, e.Off)
			}
		case Torn:
			for d, off := e.Data, e.Off; len(d) > 0; {
				n := min(int64(len(d)), Atom-off%Atom)
				if rng.Float64() < p {
					m.write(d[:n], off)
				}
				d, off = d[n:], off+n
			}
		case KeepAll:
			m.write(e.Data, e.Off)
		default:
			return nil, fmt.Errorf("unknown %v", c.Mode)
		}
	}
	return m, nil
}

// stored is a Recording in a file.
type stored struct {
	Size        int64
	Pages       map[int][]byte
	Events      []Event
	IgnoreFlush bool
}

// Save writes the recording, for Load.
func (r *Recording) Save(w io.Writer) error {
	s := stored{Size: r.Base.Size(), Pages: map[int][]byte{}, Events: r.Events, IgnoreFlush: r.IgnoreFlush}
	for i, p := range r.Base.pages {
		if p != nil {
			s.Pages[i] = p
		}
	}
	z := gzip.NewWriter(w)
	return errors.Join(gob.NewEncoder(z).Encode(s), z.Close())
}

// Load reads what Save wrote. The file is the tester's own: it is checked for
// mistakes, not against malice.
func Load(rd io.Reader) (*Recording, error) {
	z, err := gzip.NewReader(rd)
	if err != nil {
		return nil, fmt.Errorf("recording: %w", err)
	}
	var s stored
	if err := gob.NewDecoder(z).Decode(&s); err != nil {
		return nil, fmt.Errorf("recording: %w", err)
	}
	base, err := NewImage(s.Size)
	if err != nil {
		return nil, fmt.Errorf("recording: %w", err)
	}
	for i, p := range s.Pages {
		if i < 0 || i >= len(base.pages) || len(p) != Atom {
			return nil, fmt.Errorf("recording: page %d of %d bytes does not fit the device", i, len(p))
		}
		base.pages[i] = p
	}
	for i, e := range s.Events {
		switch {
		case e.Kind > FlushEnd, e.Begin < 0 || e.Begin > i, e.Off < 0, e.Off+int64(len(e.Data)) > s.Size:
			return nil, fmt.Errorf("recording: event %d makes no sense", i)
		}
	}
	return &Recording{Base: base, Events: s.Events, IgnoreFlush: s.IgnoreFlush}, nil
}
