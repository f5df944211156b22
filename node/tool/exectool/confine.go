package exectool

import (
	"fmt"
	"io"
	"maps"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/autonomyops/autonomy/assurance/sandbox"
	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

// plain is what runs a tool that is given no sandbox.
var plain = sync.OnceValue(sandbox.Plain)

// confinement checks what cfg says about the sandbox.
func (t *Tool) confinement(cfg Config) (faults []error) {
	t.box = cfg.Sandbox
	if t.box == nil {
		t.box = plain()
	}
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	var err error
	if t.fs, err = parsePaths(cfg.FS); err != nil {
		fault("fs: %w", err)
	}
	if t.egress, err = parseEgress(cfg.Egress); err != nil {
		fault("egress: %w", err)
	}
	if cfg.Limits.CPU != "" {
		if _, err := share(cfg.Limits.CPU); err != nil {
			faults = append(faults, err)
		}
	}
	if l := cfg.Limits; l.Memory < 0 || l.Pids < 0 || l.IO < 0 || l.Tmp < 0 {
		fault("memory_max, pids_max, io_max and tmp_max: want positive numbers")
	}
	if cfg.User != "" {
		if t.user, err = lookupUser(cfg.User); err != nil {
			faults = append(faults, err)
		}
	}
	for name := range cfg.Secrets {
		if name == "" || strings.ContainsAny(name, "= \t\n\x00") {
			fault("secrets: %q is no name of a variable", name)
		}
		if slices.ContainsFunc(cfg.Env, func(e string) bool { n, _, _ := strings.Cut(e, "="); return n == name }) {
			fault("secrets: %s is set by env already", name)
		}
	}
	return faults
}

// parsePaths reads "ro:/a", "rw:/b"; a path alone means "ro:".
func parsePaths(list []string) ([]sandbox.Path, error) {
	var out []sandbox.Path
	for _, e := range list {
		p := sandbox.Path{Path: e}
		if mode, rest, ok := strings.Cut(e, ":"); ok {
			if mode != "ro" && mode != "rw" {
				return nil, fmt.Errorf("%q: want ro:PATH or rw:PATH", e)
			}
			p = sandbox.Path{Path: rest, Write: mode == "rw"}
		}
		if err := p.Check(); err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func parseEgress(list []string) ([]sandbox.Endpoint, error) {
	var out []sandbox.Endpoint
	for _, text := range list {
		e, err := sandbox.ParseEndpoint(text)
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, nil
}

func lookupUser(name string) (*sandbox.User, error) {
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			return nil, fmt.Errorf("user %q: there is no such user", name)
		}
	}
	uid, uerr := strconv.ParseUint(u.Uid, 10, 32)
	gid, gerr := strconv.ParseUint(u.Gid, 10, 32)
	if uerr != nil || gerr != nil {
		return nil, fmt.Errorf("user %q: its ids %s and %s are no numbers", name, u.Uid, u.Gid)
	}
	return &sandbox.User{UID: uint32(uid), GID: uint32(gid)}, nil
}

// share reads "quota period", both in microseconds, as parts of one processor.
func share(cpuMax string) (float64, error) {
	f := strings.Fields(cpuMax)
	if len(f) == 2 {
		quota, qerr := strconv.ParseInt(f[0], 10, 64)
		period, perr := strconv.ParseInt(f[1], 10, 64)
		if qerr == nil && perr == nil && quota >= 1000 && period >= 1000 && period <= 1e6 {
			return float64(quota) / float64(period), nil
		}
	}
	return 0, fmt.Errorf("cpu_max %q: want \"quota period\" in microseconds, each at least 1000, the period at most 1000000, as in \"50000 100000\"", cpuMax)
}

// lower is the smaller of two limits, where 0 is none.
func lower(a, b int64) int64 {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// limits are the tool's, lowered by policy's.
func (t *Tool) limits(c constraint.Constraints) (sandbox.Limits, error) {
	l := t.cfg.Limits
	if c.MemoryMax < 0 || c.PidsMax < 0 {
		return l, fmt.Errorf("policy set memory_max to %d and pids_max to %d: want positive numbers", c.MemoryMax, c.PidsMax)
	}
	l.Memory = lower(l.Memory, c.MemoryMax)
	l.Pids = lower(l.Pids, c.PidsMax)
	if c.CPUMax != "" {
		policy, err := share(c.CPUMax)
		if err != nil {
			return l, fmt.Errorf("policy: %w", err)
		}
		if own, err := share(l.CPU); err != nil || policy < own {
			l.CPU = c.CPUMax
		}
	}
	return l, nil
}

// command narrows what the tool may do by what policy allows.
func (t *Tool) command(c constraint.Constraints) (*sandbox.Command, error) {
	cmd := &sandbox.Command{Env: t.narrow(c.Env), Dir: t.cfg.Dir, FS: t.fs, User: t.user}
	var err error
	if cmd.Limits, err = t.limits(c); err != nil {
		return nil, err
	}
	if c.FS != nil {
		want, err := parsePaths(c.FS)
		if err != nil {
			return nil, fmt.Errorf("policy: fs: %w", err)
		}
		cmd.FS = sandbox.NarrowPaths(t.fs, want)
	}
	egress := t.egress
	if c.Egress != nil {
		want, err := parseEgress(c.Egress)
		if err != nil {
			return nil, fmt.Errorf("policy: egress: %w", err)
		}
		egress = sandbox.Narrow(t.egress, want)
		cmd.Egress = []string{}
	}
	for _, e := range egress {
		cmd.Egress = append(cmd.Egress, e.String())
	}
	for _, name := range slices.Sorted(maps.Keys(t.cfg.Secrets)) {
		if c.Env != nil && !slices.Contains(c.Env, name) {
			continue // policy names the variables that the program may see
		}
		value, err := readSecret(t.cfg.Secrets[name])
		if err != nil {
			return nil, fmt.Errorf("secret %s: %w", name, err)
		}
		cmd.Secrets = append(cmd.Secrets, sandbox.Secret{Name: name, Value: value})
	}
	return cmd, nil
}

func readSecret(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err == nil && len(b) > maxSecret {
		err = fmt.Errorf("%s is over %d bytes", path, maxSecret)
	}
	return b, err
}

// Unenforceable names the limits of c that cannot be kept here.
func (t *Tool) Unenforceable(c constraint.Constraints) string {
	l := sandbox.Limits{Memory: c.MemoryMax, Pids: c.PidsMax, CPU: c.CPUMax}
	var fs []sandbox.Path
	if c.FS != nil {
		fs = []sandbox.Path{}
	}
	return strings.Join(t.box.Unenforceable(l, c.Egress, fs), ", ")
}

// refusal is one refused attempt, in the record of an action.
type refusal struct {
	Op   string `json:"op"`   // connect, send, bind
	Dest string `json:"dest"` // address:port
	PID  uint32 `json:"pid"`
	Comm string `json:"comm"` // what the process calls itself
}

// report is the JSON of Result.Confinement. Sizes are bytes.
type report struct {
	CPU        int64     `json:"cpu_ns"`
	MaxRSS     int64     `json:"max_rss"`
	MemoryPeak int64     `json:"memory_peak,omitempty"`
	PidsPeak   int64     `json:"pids_peak,omitempty"`
	IORead     int64     `json:"io_read,omitempty"`
	IOWritten  int64     `json:"io_written,omitempty"`
	OOMKills   int64     `json:"oom_kills,omitempty"`
	Throttled  int64     `json:"throttled_ns,omitempty"`
	WaitCPU    int64     `json:"pressure_cpu_ns,omitempty"`
	WaitMemory int64     `json:"pressure_memory_ns,omitempty"`
	WaitIO     int64     `json:"pressure_io_ns,omitempty"`
	Refused    uint64    `json:"refused,omitempty"` // attempts to reach what egress does not allow
	Refusals   []refusal `json:"refusals,omitempty"`
	Left       string    `json:"left,omitempty"` // why something that the program started could not be ended
}

func confinement(e *sandbox.Ended) []byte {
	u := e.Usage
	r := report{
		CPU: u.CPU.Nanoseconds(), MaxRSS: u.MaxRSS, MemoryPeak: u.MemoryPeak, PidsPeak: u.PidsPeak,
		IORead: u.IORead, IOWritten: u.IOWritten, OOMKills: u.OOMKills, Throttled: u.Throttled.Nanoseconds(),
		WaitCPU: u.PressureCPU.Nanoseconds(), WaitMemory: u.PressureMemory.Nanoseconds(), WaitIO: u.PressureIO.Nanoseconds(),
		Refused: e.Refused,
	}
	for _, x := range e.Refusals {
		r.Refusals = append(r.Refusals, refusal{x.Op, x.Dest.String(), x.PID, strings.ToValidUTF8(x.Comm, "\uFFFD")})
	}
	if e.Left != nil {
		r.Left = e.Left.Error()
	}
	b, err := executor.Encode(r)
	if err != nil {
		return nil // not reached: numbers and valid strings encode
	}
	return b
}
