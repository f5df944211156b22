package assurance

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Requirement is one row of the table that levels are computed by: what the
// check must say at least for a level.
type Requirement struct {
	Check   string      // Check.Name
	Reduced CheckResult // at least this for reduced; "": not needed
	Full    CheckResult // at least this for full; "": not needed
	Meaning string      // what is lost without it
}

// Table is how a level is computed: the highest level whose every row holds. A
// row whose check is missing from the report does not hold. Docs and "autonomy
// doctor" print it.
var Table = []Requirement{
	{"state_dir", OK, OK, "records vanish, or others change them"},
	{"fsync", Degraded, OK, "a power cut takes durable records"},
	{"cgroup_v2", "", OK, "a stopped tool leaves processes"},
	{"cgroup_controllers", "", OK, "limits of a policy are refused"},
	{"ebpf_connect", "", OK, "a process can connect anywhere"},
	{"namespaces", "", OK, "a tool sees the host's files and processes"},
	{"landlock", Degraded, OK, "a tool opens what its user can"},
	{"seccomp", OK, OK, "a tool can use every system call"},
	{"privileges", "", Degraded, "nothing can be set up"},
	{"clock", Degraded, Degraded, "times and expiry are wrong"},
}

// rank orders results; a missing check ranks lowest.
func rank(r CheckResult) int { return slices.Index([]CheckResult{Failed, Degraded, OK}, r) + 1 }

func rankLevel(l Level) int { return slices.Index([]Level{None, Reduced, Full}, l) }

// LevelOf computes the level of a set of checks by Table.
func LevelOf(checks []Check) Level {
	level := Full
	for _, row := range Table {
		have := 0
		if i := slices.IndexFunc(checks, func(c Check) bool { return c.Name == row.Check }); i >= 0 {
			have = rank(checks[i].Result)
		}
		if row.Full != "" && have < rank(row.Full) {
			level = Reduced
		}
		if row.Reduced != "" && have < rank(row.Reduced) {
			return None
		}
	}
	return level
}

// ErrBelowMinimum is wrapped by the error of Meets: the program ends with exit
// code 7.
var ErrBelowMinimum = errors.New("platform assurance is below the minimum")

// ParseLevel reads none, reduced or full.
func ParseLevel(s string) (Level, error) {
	if l := Level(s); rankLevel(l) >= 0 {
		return l, nil
	}
	return "", fmt.Errorf("assurance level %q: want none, reduced or full", s)
}

// ErrStateDir is wrapped by the error of Meets when the state directory is
// remote, or leads outside of itself. No minimum allows that (INV-01).
var ErrStateDir = errors.New("the state directory cannot be used")

// Meets reports whether the report's level is at least min, and the state
// directory is local. The error tells which checks stand in the way and what to
// do about each; the program ends with exit code 7.
func (r Report) Meets(min Level) error {
	if rankLevel(min) < 0 {
		return fmt.Errorf("assurance level %q: want none, reduced or full", min)
	}
	for _, c := range r.Checks {
		if c.Name == "state_dir" && c.Result != OK {
			return fmt.Errorf("%w: %s. %s", ErrStateDir, c.Detail, c.Fix)
		}
	}
	if rankLevel(r.Level) >= rankLevel(min) {
		return nil
	}
	var b strings.Builder
	for _, row := range Table {
		need := row.Full
		if min == Reduced {
			need = row.Reduced
		}
		if need == "" {
			continue
		}
		i := slices.IndexFunc(r.Checks, func(c Check) bool { return c.Name == row.Check })
		switch {
		case i < 0:
			fmt.Fprintf(&b, "\n  %s: not checked", row.Check)
		case rank(r.Checks[i].Result) < rank(need):
			c := r.Checks[i]
			fmt.Fprintf(&b, "\n  %s: %s. %s", c.Name, c.Detail, c.Fix)
		}
	}
	return fmt.Errorf("%w: it is %s, %s is wanted:%s", ErrBelowMinimum, r.Level, min, b.String())
}
