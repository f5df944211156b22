package assurance

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

// Budget is the time that a whole probe may take once warm. 300 ms. A check
// that is not done by Deadline is reported as failed.
const (
	Budget   = 300 * time.Millisecond
	Deadline = 3 * time.Second
)

// Options say what to probe.
type Options struct {
	StateDir string // directory of the program's state; must exist. "": the checks of the disk are left out
}

// Probe tries what Table names and reports. It does not fail: a check that
// cannot be made is a failed check.
func Probe(ctx context.Context, o Options) Report {
	ctx, cancel := context.WithTimeout(ctx, Deadline)
	defer cancel()
	start := time.Now()
	r := Report{Time: start.UTC(), Kernel: kernel()}
	for _, probe := range probes(o) {
		began := time.Now()
		c := probe(ctx)
		c.Took = time.Since(began)
		if c.Result == OK {
			c.Fix = ""
		}
		r.Checks = append(r.Checks, c)
	}
	r.Level = LevelOf(r.Checks)
	r.Took = time.Since(start)
	return r
}

func probes(o Options) []func(context.Context) Check {
	return []func(context.Context) Check{clock}
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// built is a time that has passed: no clock that works shows less.
var built = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// clock looks at the wall clock, and whether the kernel says that it is kept in
// step.
func clock(context.Context) Check {
	c := Check{Name: "clock", Tried: "read the wall clock, and asked the kernel whether it is synchronised",
		Why: "records, expiry of releases and certificates are judged by it"}
	now := time.Now()
	if now.Before(built) || now.Year() > 2100 {
		c.Result, c.Detail, c.Fix = Failed, "the clock shows "+now.UTC().Format(time.DateOnly), "Set the clock, and run a time service (chrony, systemd-timesyncd)."
		return c
	}
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	if err != nil || state == unix.TIME_ERROR {
		c.Result, c.Detail, c.Fix = Degraded, "plausible, but not synchronised", "Run a time service (chrony, systemd-timesyncd) if this machine should keep time."
		return c
	}
	c.Result, c.Detail = OK, "plausible and synchronised"
	return c
}
