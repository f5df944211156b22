package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A machine is what a reader must know to compare figures.
type machine struct {
	cpu, kernel, fs, goVersion, version string
	cores                               int
	memory                              uint64 // bytes
	sync                                time.Duration
}

func (m machine) lines() []string {
	return []string{
		fmt.Sprintf("%s, %d cores, %.0f GiB", m.cpu, m.cores, float64(m.memory)/(1<<30)),
		fmt.Sprintf("Linux %s, %s; 4 KiB append and fdatasync: %v", m.kernel, m.fs, m.sync.Round(time.Microsecond)),
		fmt.Sprintf("%s; %s", m.goVersion, m.version),
	}
}

func (m machine) String() string   { return strings.Join(m.lines(), "\n") }
func (m machine) markdown() string { return "- " + strings.Join(m.lines(), "\n- ") }

// describe looks at this machine, at the file system of dir and at the node.
func describe(dir, node string) (machine, error) {
	m := machine{cpu: "unknown CPU", cores: runtime.NumCPU(), goVersion: runtime.Version() + " " + runtime.GOARCH}
	v, err := exec.Command(node, "--version").Output()
	if err != nil {
		return m, fmt.Errorf("%s --version: %w (run: make build)", node, err)
	}
	m.version = fmt.Sprintf("%s; %s", strings.TrimSpace(string(v)), time.Now().UTC().Format(time.DateOnly))
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			m.cpu = strings.TrimSpace(value)
			break
		}
	}
	var uts unix.Utsname
	var sys unix.Sysinfo_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Uname(&uts), unix.Sysinfo(&sys), unix.Statfs(dir, &fs)); err != nil {
		return m, err
	}
	m.kernel = unix.ByteSliceToString(uts.Release[:])
	m.memory = sys.Totalram * uint64(sys.Unit)
	m.fs = fmt.Sprintf("file system %#x", fs.Type)
	if name, ok := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
		unix.TMPFS_MAGIC: "tmpfs (memory: nothing here is durable)", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs"}[int64(fs.Type)]; ok {
		m.fs = name
	}
	m.sync, err = syncTime(dir)
	return m, err
}

// syncTime is the median of 200 appends of 4 KiB, each made durable.
func syncTime(dir string) (_ time.Duration, err error) {
	f, err := os.Create(filepath.Join(dir, "sync"))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	var took []time.Duration
	block := make([]byte, 4096)
	for range 200 {
		begin := time.Now()
		if _, err := f.Write(block); err != nil {
			return 0, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return 0, err
		}
		took = append(took, time.Since(begin))
	}
	slices.Sort(took)
	return percentile(took, 50), nil
}
