package leg

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// fields reads numbers from a file of "name: number" lines.
func fields(file string, names ...string) ([]int64, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := make([]int64, len(names))
	found := 0
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		name, rest, _ := strings.Cut(sc.Text(), ":")
		for i, want := range names {
			if name != want {
				continue
			}
			if out[i], err = strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64); err != nil {
				return nil, fmt.Errorf("%s: %s: %w", file, name, err)
			}
			found++
		}
	}
	if err := sc.Err(); err != nil {
		return nil, err
	}
	if found != len(names) {
		return nil, fmt.Errorf("%s: want %s, %d of them are there", file, strings.Join(names, ", "), found)
	}
	return out, nil
}

// written is what this process has caused to be written to disks, in bytes.
func written() (int64, error) {
	v, err := fields("/proc/self/io", "write_bytes")
	if err != nil {
		return 0, err
	}
	return v[0], nil
}

// resident is the memory of this process in bytes: all of it, and the part that
// no file backs.
func resident() (all, anon int64, err error) {
	v, err := fields("/proc/self/status", "VmRSS", "RssAnon")
	if err != nil {
		return 0, 0, err
	}
	return v[0] << 10, v[1] << 10, nil
}

// deviceOf is the file with the counters of the device that holds dir; "" when
// the file system has no device of its own (btrfs, overlay).
func deviceOf(dir string) (string, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		return "", fmt.Errorf("stat %s: %w", dir, err)
	}
	major, minor := st.Dev>>8&0xfff|st.Dev>>32&^0xfff, st.Dev&0xff|st.Dev>>12&^0xff
	file := fmt.Sprintf("/sys/dev/block/%d:%d/stat", major, minor)
	if _, err := os.Stat(file); err != nil {
		return "", nil
	}
	return file, nil
}

// sectors is what the device has written since it was there, in bytes; 0 when
// it is not known.
func sectors(stat string) int64 {
	data, err := os.ReadFile(stat)
	if err != nil {
		return 0
	}
	f := strings.Fields(string(data))
	if len(f) < 7 {
		return 0
	}
	n, err := strconv.ParseInt(f[6], 10, 64)
	if err != nil {
		return 0
	}
	return n * 512
}
