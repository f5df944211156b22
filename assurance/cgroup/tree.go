package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Tree is the cgroup below which the calls of one node live, each in a fresh
// cgroup of its own. It is safe for concurrent use.
type Tree struct {
	Path        string
	Controllers []string // what can be limited per call: some of cpu, io, memory, pids
	Missing     string   // why some are missing; "" when none are

	fd   int
	last atomic.Uint64
}

// wanted are the controllers that calls are limited by.
var wanted = []string{"cpu", "io", "memory", "pids"}

// treePrefix of the names of trees; the rest is the caller's.
const treePrefix = "autonomy-"

// OpenTree makes the tree of this name, which must be unique on the machine, at
// the best place this process may use. One that a killed process left is taken
// over: what still runs in it is killed.
func OpenTree(ctx context.Context, name string) (*Tree, error) {
	parents, err := Parents()
	if err != nil {
		return nil, err
	}
	var faults []error
	for _, parent := range parents {
		t, err := openTree(ctx, parent, filepath.Join(parent, treePrefix+name))
		if err == nil {
			return t, nil
		}
		faults = append(faults, err)
	}
	return nil, errors.Join(faults...)
}

func openTree(ctx context.Context, parent, path string) (*Tree, error) {
	if err := os.Mkdir(path, 0o755); errors.Is(err, fs.ErrExist) {
		if err := evict(ctx, path); err != nil {
			return nil, fmt.Errorf("take over the cgroup %s: %w", path, err)
		}
	} else if err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the cgroup %s: %w", path, err)
	}
	t := &Tree{Path: path, fd: fd}
	t.delegate(parent)
	return t, nil
}

// evict kills what is in the cgroups below path and removes them.
func evict(ctx context.Context, path string) error {
	old, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range old {
		if !e.IsDir() {
			continue
		}
		child := filepath.Join(path, e.Name())
		if err := os.WriteFile(filepath.Join(child, "cgroup.kill"), []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := removeDir(ctx, unix.AT_FDCWD, child); err != nil {
			return err
		}
	}
	return nil
}

// delegate hands the controllers down to the calls: the parent must give them to
// the tree, and the tree to its children. The kernel refuses the first while a
// process is in the parent, unless that is the root; if this process is alone
// there, it moves into a leaf beside the tree.
func (t *Tree) delegate(parent string) {
	have, err := words(filepath.Join(parent, "cgroup.controllers"))
	if err != nil {
		t.Missing = err.Error()
		return
	}
	var refused []string
	for _, c := range wanted {
		if !slices.Contains(have, c) {
			refused = append(refused, c+" is not available in "+parent)
			continue
		}
		err := enable(parent, c)
		if errors.Is(err, unix.EBUSY) && stepAside(parent, t.Path+"-node") {
			err = enable(parent, c)
		}
		if err == nil {
			err = enable(t.Path, c)
		}
		if err != nil {
			refused = append(refused, c+": "+err.Error())
			continue
		}
		t.Controllers = append(t.Controllers, c)
	}
	t.Missing = strings.Join(refused, "; ")
}

func enable(dir, controller string) error {
	on, err := words(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil || slices.Contains(on, controller) {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0)
}

// stepAside moves this process from parent to leaf if it is alone there.
func stepAside(parent, leaf string) bool {
	self := strconv.Itoa(os.Getpid())
	members, err := words(filepath.Join(parent, "cgroup.procs"))
	if err != nil || !slices.Equal(members, []string{self}) {
		return false
	}
	if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return false
	}
	return os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte(self), 0) == nil
}

func words(file string) ([]string, error) {
	b, err := os.ReadFile(file)
	return strings.Fields(string(b)), err
}

// Close removes the tree; no call may be left in it.
func (t *Tree) Close() error {
	unix.Close(t.fd)
	if err := os.Remove(t.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the cgroup: %w", err)
	}
	return nil
}

// Limits of one call. Zero means no limit. A limit whose controller is missing
// is an error of New.
type Limits struct {
	Memory int64  // bytes; no swap; the whole call is killed at once when it needs more
	Pids   int64  // processes and threads
	CPU    string // as cpu.max: "quota period", microseconds
	IO     int64  // bytes a second, read and written each, on every device of IODevs
	IODevs []string
}

// Call is the cgroup of one call.
type Call struct {
	ID uint64 // as eBPF programs see it

	tree *Tree
	name string
	fd   int
}

// New makes the cgroup of one call and sets its limits.
func (t *Tree) New(l Limits) (*Call, error) {
	c := &Call{tree: t, name: "call-" + strconv.FormatUint(t.last.Add(1), 10)}
	if err := unix.Mkdirat(t.fd, c.name, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	var err error
	if c.fd, err = unix.Openat(t.fd, c.name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("open the cgroup: %w", err), unix.Unlinkat(t.fd, c.name, unix.AT_REMOVEDIR))
	}
	if err = c.limit(l); err == nil {
		var st unix.Stat_t
		if err = unix.Fstat(c.fd, &st); err == nil {
			c.ID = st.Ino
			return c, nil
		}
	}
	return nil, errors.Join(err, c.Remove(context.Background()))
}

func (c *Call) limit(l Limits) error {
	type setting struct{ file, value string }
	var set []setting
	if l.Memory > 0 {
		set = append(set, setting{"memory.max", strconv.FormatInt(l.Memory, 10)}, setting{"memory.oom.group", "1"})
		if err := c.write("memory.swap.max", "0"); err != nil && !errors.Is(err, fs.ErrNotExist) { // absent on a kernel without swap
			return err
		}
	}
	if l.Pids > 0 {
		set = append(set, setting{"pids.max", strconv.FormatInt(l.Pids, 10)})
	}
	if l.CPU != "" {
		set = append(set, setting{"cpu.max", l.CPU})
	}
	if l.IO > 0 {
		for _, dev := range l.IODevs {
			set = append(set, setting{"io.max", fmt.Sprintf("%s rbps=%d wbps=%d", dev, l.IO, l.IO)})
		}
	}
	for _, s := range set {
		if err := c.write(s.file, s.value); err != nil {
			return err
		}
	}
	return nil
}

// FD is the descriptor for clone3 (CLONE_INTO_CGROUP).
func (c *Call) FD() int { return c.fd }

// Path is the cgroup's directory.
func (c *Call) Path() string { return filepath.Join(c.tree.Path, c.name) }

func (c *Call) write(file, value string) error {
	fd, err := unix.Openat(c.fd, file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(value))
		unix.Close(fd)
	}
	if err != nil {
		return fmt.Errorf("set %s to %q: %w", file, value, err)
	}
	return nil
}

// Kill sends SIGKILL to every member, also to those that fork meanwhile or are
// stopped or frozen. It does not wait.
func (c *Call) Kill() error { return c.write("cgroup.kill", "1") }

// Freeze stops every member, or lets them go on; for looking at a call.
func (c *Call) Freeze(on bool) error {
	if on {
		return c.write("cgroup.freeze", "1")
	}
	return c.write("cgroup.freeze", "0")
}

// Remove ends the cgroup. That the kernel lets it go is the proof that no
// member is left: members that are, are killed first. It returns an error when
// some cannot be killed before ctx ends (a process in the middle of a failing
// disk access); the cgroup then stays, so that they are not lost sight of.
func (c *Call) Remove(ctx context.Context) error {
	defer unix.Close(c.fd)
	err := unix.Unlinkat(c.tree.fd, c.name, unix.AT_REMOVEDIR)
	if !errors.Is(err, unix.EBUSY) {
		if err != nil {
			return fmt.Errorf("remove the cgroup: %w", err)
		}
		return nil
	}
	if err := c.Kill(); err != nil {
		return err
	}
	return removeDir(ctx, c.tree.fd, c.name)
}

// removeDir removes a cgroup whose members have been killed, once they are gone.
func removeDir(ctx context.Context, at int, name string) error {
	wait := 50 * time.Microsecond
	for {
		err := unix.Unlinkat(at, name, unix.AT_REMOVEDIR)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove the cgroup %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove the cgroup %s: it has members that were killed and do not end: %w", name, err)
		case <-time.After(wait):
			wait = min(2*wait, 10*time.Millisecond)
		}
	}
}

// Usage is what a call used. A field that the kernel does not count here is 0.
type Usage struct {
	CPU        time.Duration // user and system
	MemoryPeak int64         // bytes, page cache included
	PidsPeak   int64         // processes and threads at one time
	IORead     int64         // bytes, from and to devices
	IOWritten  int64
	OOMKills   int64 // times the memory limit killed
	Throttled  time.Duration
	// Pressure is the time in which some member waited for it.
	PressureCPU, PressureMemory, PressureIO time.Duration
}

// Usage reads what the call has used so far. Pressure is left out of a short
// call.
func (c *Call) Usage(pressure bool) Usage {
	var u Usage
	micros := func(s string) time.Duration {
		n, _ := strconv.ParseInt(s, 10, 64)
		return time.Duration(n) * time.Microsecond
	}
	var buf [4096]byte
	for line := range strings.Lines(c.read("cpu.stat", buf[:])) {
		switch k, v, _ := strings.Cut(strings.TrimSpace(line), " "); k {
		case "usage_usec":
			u.CPU = micros(v)
		case "throttled_usec":
			u.Throttled = micros(v)
		}
	}
	has := func(name string) bool { return slices.Contains(c.tree.Controllers, name) }
	if has("memory") {
		u.MemoryPeak, _ = strconv.ParseInt(strings.TrimSpace(c.read("memory.peak", buf[:])), 10, 64)
		for line := range strings.Lines(c.read("memory.events", buf[:])) {
			if v, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
				u.OOMKills, _ = strconv.ParseInt(v, 10, 64)
			}
		}
	}
	if has("pids") {
		u.PidsPeak, _ = strconv.ParseInt(strings.TrimSpace(c.read("pids.peak", buf[:])), 10, 64)
	}
	if has("io") {
		for _, f := range strings.Fields(c.read("io.stat", buf[:])) {
			k, v, _ := strings.Cut(f, "=")
			n, _ := strconv.ParseInt(v, 10, 64)
			switch k {
			case "rbytes":
				u.IORead += n
			case "wbytes":
				u.IOWritten += n
			}
		}
	}
	if !pressure {
		return u
	}
	for file, to := range map[string]*time.Duration{"cpu.pressure": &u.PressureCPU, "memory.pressure": &u.PressureMemory, "io.pressure": &u.PressureIO} {
		if line, _, _ := strings.Cut(c.read(file, buf[:]), "\n"); strings.HasPrefix(line, "some ") {
			if _, v, ok := strings.Cut(line, "total="); ok {
				*to = micros(v)
			}
		}
	}
	return u
}

// read returns what fits into buf of a file of the cgroup, "" when there is no
// such file.
func (c *Call) read(file string, buf []byte) string {
	fd, err := unix.Openat(c.fd, file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	n, err := unix.Read(fd, buf)
	if err != nil {
		return ""
	}
	return string(buf[:n])
}
