package walfault

import (
	"encoding/gob"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/faultinject/powercut"
	"github.com/autonomyops/autonomy/wal"
)

// perRound is how many power cuts are tried on one recording.
const perRound = 125

// delay is what the recorded device takes for a write or flush: so much is in
// flight at once.
const delay = 200 * time.Microsecond

func seed(t *testing.T) uint64 {
	t.Helper()
	s := os.Getenv("FAULT_SEED")
	if s == "" {
		return uint64(time.Now().Unix() / 86400)
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("FAULT_SEED: %v", err)
	}
	return n
}

func states(t *testing.T) int {
	t.Helper()
	s := os.Getenv("FAULT_STATES")
	if s == "" {
		return 20
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 1_000_000 {
		t.Fatalf("FAULT_STATES is %q: want 1 to 1000000", s)
	}
	return n
}

// A tally is a row of the table.
type tally struct {
	fs, ring                                      string // ring is as in work
	states                                        int
	acked, lost, invented, torn, created, refused uint64
	bad                                           int // states with any fault
	record, replay                                time.Duration
	writes, flushes, inFlight                     int
}

func (c *tally) add(v verdict) {
	c.states++
	c.acked += v.acked
	c.lost += v.lost
	c.invented += v.invented
	if v.torn {
		c.torn++
	}
	if v.created {
		c.created++
	}
	if v.refused != nil {
		c.refused++
	}
	if len(v.faults) > 0 {
		c.bad++
	}
}

func table(rows []*tally) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "fs\tmode\tstates\tacked\tlost\tinvented\ttorn tails\tno log yet\tdamage refused\twrites\tflushes\tin flight\trecording\tper state\t")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%v\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%v\t%v\t\n", r.fs, optionsWith(r.ring).Mode, r.states, r.acked, r.lost, r.invented, r.torn, r.created, r.refused,
			r.writes, r.flushes, r.inFlight, r.record.Round(time.Millisecond), (r.replay / time.Duration(max(1, r.states))).Round(100*time.Microsecond))
	}
	_ = w.Flush()
	return b.String()
}

// recordWork runs the workload on a new file system and returns what its disk
// recorded.
func recordWork(t *testing.T, fstype string, o powercut.Options, w work) (*powercut.Recording, notes) {
	t.Helper()
	base, err := powercut.Mkfs(fstype)
	if err != nil {
		t.Fatal(err)
	}
	d, err := powercut.New(base, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	m, err := powercut.MountDevice(d.Path, fstype, "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		d.PowerOff()
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
	}()
	w.Dir = filepath.Join(m.Dir, "log")
	n := startWork(t, d, w)
	r := d.PowerOff()
	if r.Full {
		t.Fatal("the recording is not complete: make the workload smaller")
	}
	return r, n
}

// replay tries cuts and adds what they say to c. A disk that cannot be mounted
// is a fault of the state, too.
func replay(t *testing.T, c *tally, r *powercut.Recording, n notes, cuts []powercut.Cut, report func(powercut.Cut, verdict)) {
	t.Helper()
	begin := time.Now()
	for _, cut := range cuts {
		v := state(t, c.fs, c.ring, r, n, cut)
		c.add(v)
		if report != nil {
			report(cut, v)
		}
	}
	c.replay += time.Since(begin)
}

func state(t *testing.T, fstype, ring string, r *powercut.Recording, n notes, cut powercut.Cut) verdict {
	t.Helper()
	img, err := r.Image(cut)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Mount(fstype, "")
	if err != nil {
		return verdict{faults: []error{err}}
	}
	defer func() {
		if err := m.Unmount(); err != nil {
			t.Fatal(err)
		}
	}()
	if ring != "" { // a new one for every state: memory is empty after a power cut
		if ring, err = os.MkdirTemp(ring, "state-"); err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(ring)
	}
	return check(t.Context(), filepath.Join(m.Dir, "log"), ring, n, cut.At)
}

// cutsOf spreads cuts over the recording, one in eight before the log was there.
// Of the others every second falls on the last moment before a flush is done.
func cutsOf(seed uint64, r *powercut.Recording, n notes, count int) []powercut.Cut {
	making := count / 8
	cuts := append(powercut.Cuts(seed, 0, n.Opened, making), powercut.Cuts(seed+1, n.Opened, len(r.Events), count-making)...)
	for i := making; i < count; i += 2 {
		cuts[i].At = r.LastMoment(cuts[i].At)
	}
	return cuts
}

// memory is a tmpfs for rings; it goes with the test.
func memory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16m,mode=0700"); err != nil {
		t.Fatal("mount a tmpfs: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// kind is a file system and a mode of the log.
type kind struct {
	fs   string
	mode wal.Mode
}

func TestCampaign(t *testing.T) {
	powercut.Require(t)
	var kinds []kind
	for _, fstype := range powercut.FileSystems {
		kinds = append(kinds, kind{fstype, wal.ModeRing}, kind{fstype, wal.ModeMapped})
	}
	seed, want := seed(t), states(t)
	t.Logf("FAULT_SEED=%d FAULT_STATES=%d", seed, want)
	var mu sync.Mutex
	rows := map[kind]*tally{}
	t.Run("fs", func(t *testing.T) {
		for _, k := range kinds {
			fstype, mode := k.fs, k.mode
			t.Run(fstype+"/"+mode.String(), func(t *testing.T) {
				t.Parallel()
				c := &tally{fs: fstype}
				if mode == wal.ModeRing {
					c.ring = memory(t)
				}
				for round := uint64(0); c.states < want && !t.Failed(); round++ {
					s := seed + round
					begin := time.Now()
					r, n := recordWork(t, fstype, powercut.Options{Delay: delay}, work{Seed: s, Records: 600, Lives: 2, Ring: c.ring})
					c.record += time.Since(begin)
					st := r.Stats()
					c.writes += st.Writes
					c.flushes += st.Flushes
					c.inFlight += st.InFlight
					if n.Rotations < 8 {
						t.Errorf("only %d rotations: slots were not used again, the campaign does not test much", n.Rotations)
					}
					if len(n.Moved) == 0 {
						t.Error("no cursor moved: the campaign does not test much")
					}
					replay(t, c, r, n, cutsOf(s, r, n, min(perRound, want-c.states)), func(cut powercut.Cut, v verdict) {
						for _, err := range v.faults {
							t.Errorf("seed %d, %v of %d events: %v", s, cut, len(r.Events), err)
						}
					})
					if t.Failed() {
						keep(t, fstype, mode, s, r, n)
					}
				}
				if c.acked == 0 {
					t.Error("no record was acknowledged before any cut")
				}
				mu.Lock()
				rows[k] = c
				mu.Unlock()
			})
		}
	})
	var list []*tally
	for _, k := range kinds {
		if rows[k] != nil {
			list = append(list, rows[k])
		}
	}
	t.Logf("power cuts under the log\n%s", table(list))
}

// The campaign must notice a program that says yes too early, and a disk that
// lies.
func TestControls(t *testing.T) {
	powercut.Require(t)
	seed := seed(t)
	ring := memory(t)
	for _, control := range []struct {
		name string
		o    powercut.Options
		w    work
	}{
		{"acknowledged before the sync", powercut.Options{Delay: delay}, work{Seed: seed, Records: 400, Lives: 1, AckEarly: true}},
		{"acknowledged before the write from the ring", powercut.Options{Delay: delay}, work{Seed: seed, Records: 400, Lives: 1, AckEarly: true, Ring: ring}},
		{"flush ignored", powercut.Options{Delay: delay, IgnoreFlush: true}, work{Seed: seed, Records: 400, Lives: 1}},
	} {
		t.Run(control.name, func(t *testing.T) {
			t.Parallel()
			r, n := recordWork(t, "ext4", control.o, control.w)
			c := &tally{fs: "ext4", ring: control.w.Ring}
			replay(t, c, r, n, powercut.Cuts(seed, n.Opened, len(r.Events), 40), nil)
			t.Logf("caught in %d of %d states, %d of %d acknowledged records lost", c.bad, c.states, c.lost, c.acked)
			if c.bad == 0 {
				t.Error("the campaign did not notice")
			}
		})
	}
}

// TestReplay checks a kept recording again.
func TestReplay(t *testing.T) {
	path := os.Getenv("FAULT_REPLAY")
	if path == "" {
		t.Skip("no recording to check again: FAULT_REPLAY is not set")
	}
	powercut.Require(t)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := powercut.Load(f)
	if err != nil {
		t.Fatal(err)
	}
	g, err := os.Open(path + ".notes")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	var n notes
	if err := gob.NewDecoder(g).Decode(&n); err != nil {
		t.Fatal(err)
	}
	fstype, rest, _ := strings.Cut(filepath.Base(path), "-")
	c := &tally{fs: fstype}
	if strings.HasPrefix(rest, wal.ModeRing.String()) {
		c.ring = memory(t)
	}
	replay(t, c, r, n, cutsOf(n.Seed, r, n, min(perRound, states(t))), func(cut powercut.Cut, v verdict) {
		for _, err := range v.faults {
			t.Errorf("%v: %v", cut, err)
		}
	})
	t.Logf("\n%s", table([]*tally{c}))
}

// keep writes a recording and its notes where FAULT_KEEP says.
func keep(t *testing.T, fstype string, mode wal.Mode, seed uint64, r *powercut.Recording, n notes) {
	dir := os.Getenv("FAULT_KEEP")
	if dir == "" {
		t.Log("set FAULT_KEEP to a directory to keep recordings that fail")
		return
	}
	path := filepath.Join(dir, fmt.Sprintf("%s-%v-%d", fstype, mode, seed))
	f, err := os.Create(path)
	if err != nil {
		t.Error(err)
		return
	}
	g, err := os.Create(path + ".notes")
	if err != nil {
		t.Error(errors.Join(err, f.Close()))
		return
	}
	if err := errors.Join(r.Save(f), f.Close(), gob.NewEncoder(g).Encode(n), g.Close()); err != nil {
		t.Error(err)
		return
	}
	t.Logf("kept: FAULT_SEED=%d FAULT_REPLAY=%s", seed, path)
}
