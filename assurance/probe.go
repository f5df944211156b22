package assurance

import (
	"context"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Budget is the time that a whole probe takes at most once warm, on a machine
// with time to spare: 300 ms. On a busy one a check that is not done by Deadline
// is reported as failed; cleaning up may take a second more.
const (
	Budget   = 300 * time.Millisecond
	Deadline = 10 * time.Second
)

// Options say what to probe.
type Options struct {
	StateDir string // directory of the program's state; must exist. "": the checks of the disk are left out, and the level is none
}

// Probe tries what Table names and reports. It does not fail: a check that
// cannot be made is a failed check.
func Probe(ctx context.Context, o Options) Report {
	ctx, cancel := context.WithTimeout(ctx, Deadline)
	defer cancel()
	start := time.Now()
	r := Report{Time: start.UTC(), Kernel: kernel()}
	scratch := os.TempDir()
	probes := []func(context.Context) []Check{probeCgroup, func(ctx context.Context) []Check { return probeNamespaces(ctx, scratch) }, func(context.Context) []Check { return probeLandlock(scratch) }, probeSeccomp, probePrivileges, probeClock}
	if o.StateDir != "" {
		scratch = o.StateDir
		probes = append([]func(context.Context) []Check{
			func(context.Context) []Check { return probeStateDir(o.StateDir) },
			func(ctx context.Context) []Check { return probeSync(ctx, o.StateDir) },
		}, probes...)
	}
	for _, probe := range probes {
		began := time.Now()
		for _, c := range probe(ctx) {
			if c.Result == OK {
				c.Fix = ""
			}
			c.Took = time.Since(began)
			r.Checks = append(r.Checks, c)
		}
	}
	r.Level = LevelOf(r.Checks)
	r.Took = time.Since(start)
	return r
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// failed completes a check that went wrong.
func (c Check) failed(err error) Check {
	c.Result, c.Detail = Failed, sentence(err.Error())
	return c
}

// sentence keeps a detail short and on one line: it ends up in answers and logs.
func sentence(s string) string {
	s = strings.ToValidUTF8(strings.ReplaceAll(s, "\n", "; "), "\uFFFD")
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "") + "…"
	}
	return s
}

// built is a time that has passed: no clock that works shows less.
var built = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// probeClock looks at the wall clock, and asks whether the kernel is told to
// keep it in step.
func probeClock(context.Context) []Check {
	c := Check{Name: "clock", Tried: "read the wall clock, asked the kernel whether it is synchronised",
		Why: "records, and the expiry of releases and certificates, are judged by it",
		Fix: "Run a time service (chrony, systemd-timesyncd)."}
	now := time.Now()
	if now.Before(built) || now.Year() > 2100 {
		c.Result, c.Detail = Failed, "the clock shows "+now.UTC().Format(time.DateOnly)
		return []Check{c}
	}
	var tx unix.Timex
	if state, err := unix.Adjtimex(&tx); err != nil || state == unix.TIME_ERROR {
		c.Result, c.Detail = Degraded, "plausible, but no time service keeps it in step"
		return []Check{c}
	}
	c.Result, c.Detail = OK, "plausible and synchronised"
	return []Check{c}
}
