package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// places is every failpoint, and what a child must do to come by. A name that is
// not here ends every child.
var places = []struct {
	name       string
	ring, disk bool // in ModeRing, in ModeMapped
	refuse     bool // syncs are refused now and then
	open       bool // while the log is opened, so once in a life
}{
	{name: "reserved", ring: true, disk: true},
	{name: "encoded", ring: true, disk: true},
	{name: "published", ring: true, disk: true},
	{name: "closed", ring: true, disk: true},
	{name: "drained", ring: true, disk: true},
	{name: "marked", ring: true, disk: true},
	{name: "written", ring: true, disk: true},
	{name: "durable", ring: true, disk: true},
	{name: "woken", ring: true, disk: true},
	{name: "rotating", ring: true, disk: true},
	{name: "one header", disk: true},
	{name: "live", ring: true, disk: true},
	{name: "rotated", ring: true, disk: true},
	{name: "one free", ring: true, disk: true},
	{name: "cursor written", ring: true, disk: true},
	{name: "moving", ring: true, disk: true, refuse: true},
	{name: "carried", ring: true, disk: true, refuse: true},
	{name: "moved", ring: true, disk: true, refuse: true},
	{name: "ring made", ring: true, open: true},
	{name: "replayed", ring: true, open: true},
}

const refusedSlots = 16

// setFailpoint has this process killed at the place and time that
// WAL_TEST_FAILPOINT names, and its syncs refused if it says so.
func setFailpoint(o *Options) {
	name, rest, ok := strings.Cut(os.Getenv("WAL_TEST_FAILPOINT"), "/")
	if !ok {
		return
	}
	left, refuse, _ := strings.Cut(rest, "/")
	n, err := strconv.ParseInt(left, 10, 64)
	if err != nil {
		panic(err)
	}
	var count, syncs atomic.Int64
	failpoints = func(at string) {
		if !known(at) {
			fmt.Println("error: a failpoint that the test does not know:", at)
			os.Exit(1)
		}
		if at == name && count.Add(1) >= n {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // nothing more happens here
		}
	}
	if refuse != "" {
		o.hooked = true
		o.MaxBytes = refusedSlots * minSegment // a refusal may also cost a slot that is being prepared
		o.sync = func(f *os.File) error {
			// Not while the log is opened. From the ring a write is repeated once: two
			// in a row.
			if n := syncs.Add(1) % 60; n >= 58 {
				return syscall.EIO
			}
			return fdatasync(f)
		}
	}
}

func known(name string) bool {
	for _, p := range places {
		if p.name == name {
			return true
		}
	}
	return false
}

// A kill at every place of the protocol, several times on one log: what was
// acknowledged is there, nothing was invented, the sequence is dense, and the
// next process goes on.
func TestKillAtFailpoints(t *testing.T) {
	exe, err := os.Executable()
	must(t, err)
	for _, p := range places {
		if testMode == ModeRing && !p.ring || testMode == ModeMapped && !p.disk {
			continue
		}
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			k := &killed{told: map[uint64]bool{}, voids: map[uint64]bool{}}
			slots := int64(4)
			if p.refuse {
				slots = refusedSlots
			}
			for _, n := range []int{1, 3} {
				if p.refuse {
					n = 1
				}
				if p.open {
					n = 1
					// Something to replay, first.
					killAt(t, exe, dir, k, "published/300", false)
				}
				killAt(t, exe, dir, k, fmt.Sprintf("%s/%d", p.name, n), p.refuse)
			}
			l, rec, err := Open(dir, inMode(Options{SegmentBytes: minSegment, MaxBytes: slots * minSegment}))
			must(t, err)
			defer l.Close()
			if rec.LastSeq < k.acked {
				t.Fatalf("%+v: acknowledged up to %d", rec, k.acked)
			}
			must(t, l.AdvanceAll(rec.LastSeq))
			seq, err := appendSeq(l)
			must(t, err)
			wait(t, l, seq)
		})
	}
}

// killAt runs a child until it is killed there, and reads the log that it leaves.
func killAt(t *testing.T, exe, dir string, k *killed, where string, refuse bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe)
	if refuse {
		where += "/refuse"
	}
	cmd.Env = append(os.Environ(), "WAL_TEST_CHILD="+dir, "WAL_TEST_RING="+ringDir, "WAL_TEST_FAILPOINT="+where)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	k.listen(t, out)
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || ctx.Err() != nil {
		t.Fatalf("%s: the child was not killed there: %v\n%.2000s", where, err, stderr.Bytes())
	}
	k.check(t, dir)
}
