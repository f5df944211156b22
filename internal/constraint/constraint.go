// Package constraint holds the limits that a policy decision puts on one tool
// call (contract.md, Policy). prepared decodes them, node/call carries them,
// node/tool enforces them; none of these imports another for it.
package constraint

// Constraints are limits for one call. The zero value limits nothing beyond
// the tool's own configuration. A limit can only narrow what the tool's
// configuration allows, never widen it.
type Constraints struct {
	TimeoutMS      int64    `json:"timeout_ms,omitempty"`       // wall time, milliseconds
	MemoryMax      int64    `json:"memory_max,omitempty"`       // bytes
	PidsMax        int64    `json:"pids_max,omitempty"`         // processes and threads
	CPUMax         string   `json:"cpu_max,omitempty"`          // as cgroup v2 cpu.max: "quota period" in microseconds
	Egress         []string `json:"egress,omitzero"`            // host:port; present and empty: none
	OutputMaxBytes int64    `json:"output_max_bytes,omitempty"` // bytes of output kept
	Env            []string `json:"env,omitzero"`               // names of the variables that the tool may see
	FS             []string `json:"fs,omitzero"`                // paths, "ro:" or "rw:" prefixed
}
