package results

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Machine is what a reader must know to compare figures.
type Machine struct {
	cpu, kernel, fs, goVersion, version string
	cores                               int
	memory                              uint64 // bytes
	sync                                time.Duration
	load                                float64 // runnable tasks over the last minute, when it was looked at
}

func (m Machine) lines() []string {
	return []string{
		fmt.Sprintf("%s, %d cores, %.0f GiB", m.cpu, m.cores, float64(m.memory)/(1<<30)),
		fmt.Sprintf("Linux %s, %s; 4 KiB append and fdatasync: %v", m.kernel, m.fs, m.sync.Round(time.Microsecond)),
		fmt.Sprintf("%s; %s", m.goVersion, m.version),
		fmt.Sprintf("load average before the run: %.2f", m.load),
	}
}

// String is the description for a terminal, one fact per line.
func (m Machine) String() string { return strings.Join(m.lines(), "\n") }

// Markdown is the same as a list.
func (m Machine) Markdown() string { return "- " + strings.Join(m.lines(), "\n- ") }

// Describe looks at this machine and at the file system of dir; version names
// what is measured.
func Describe(dir, version string) (Machine, error) {
	m := Machine{cpu: "unknown CPU", cores: runtime.NumCPU(), goVersion: runtime.Version() + " " + runtime.GOARCH}
	m.version = fmt.Sprintf("%s; %s", version, time.Now().UTC().Format(time.DateOnly))
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
	m.load = float64(sys.Loads[0]) / (1 << 16)
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
	return Percentile(took, 50), nil
}
