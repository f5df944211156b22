// Package assurance finds out what this platform really gives, by doing it:
// it makes a cgroup, puts a child in and kills it, attaches an eBPF program and
// sees a connect refused, times the disk. What a kernel version or a
// configuration file promises is not asked.
//
// A Probe leaves a Report: one Check per thing tried, with what happened, why it
// matters and what to do, and a Level computed from the checks by one table
// (Table). The level is shown by /v1/status and "autonomy doctor", is visible
// to policy as input.node.assurance, and --assurance-min refuses to start below
// it.
//
// A probe takes at most Budget once the pages are warm, leaves nothing behind
// (its cgroups, files and mounts are gone when it returns), and never touches
// cgroup v1 hierarchies: those belong to the machine.
//
// Probe is safe for concurrent use. node, relay and the CLI import this
// package; it imports nothing of theirs.
package assurance

import "time"

// Level is how much of the enforcement this platform carries.
type Level string

// Levels, weakest first.
const (
	None    Level = "none"    // decisions are recorded; nothing but this process holds a tool back
	Reduced Level = "reduced" // some of the kernel's means are missing: see the checks
	Full    Level = "full"    // every means was tried and works
)

// CheckResult is how one check ended.
type CheckResult string

// Results.
const (
	OK       CheckResult = "ok"
	Degraded CheckResult = "degraded" // works in part
	Failed   CheckResult = "failed"
)

// Check is one thing that was tried.
type Check struct {
	Name   string        `json:"name"`          // stable: cgroup_v2, ebpf, …
	Tried  string        `json:"tried"`         // what was done
	Result CheckResult   `json:"result"`        //
	Detail string        `json:"detail"`        // what happened
	Why    string        `json:"why"`           // why it matters
	Fix    string        `json:"fix,omitempty"` // what to do; empty when ok
	Took   time.Duration `json:"took_ns"`       // nanoseconds
}

// Report is what Probe found.
type Report struct {
	Level  Level         `json:"level"`
	Time   time.Time     `json:"time"`
	Kernel string        `json:"kernel"`  // release, as uname prints it
	Took   time.Duration `json:"took_ns"` // nanoseconds
	Checks []Check       `json:"checks"`
}
