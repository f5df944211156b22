// Command init is the first process of the machine that "make vm-test" boots. It
// mounts what a system has, loads the modules in /modules in the order of their
// names, runs every program in /tests with its arguments from the file of the
// same name and the suffix .args, prints "vm-test: result N" and powers off. N is
// the number of programs that failed.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	failed := 0
	if err := setUp(); err != nil {
		fmt.Println("vm-test:", err)
		failed++
	} else {
		failed += runTests()
	}
	fmt.Println("vm-test: result", failed)
	unix.Sync()
	time.Sleep(100 * time.Millisecond) // for the console
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func setUp() error {
	if err := newRoot(); err != nil {
		return fmt.Errorf("make a root that can be left: %w", err)
	}
	for _, m := range [][4]string{
		{"devtmpfs", "/dev", "devtmpfs", ""}, {"proc", "/proc", "proc", ""}, {"sysfs", "/sys", "sysfs", ""},
		{"securityfs", "/sys/kernel/security", "securityfs", ""}, {"cgroup2", "/sys/fs/cgroup", "cgroup2", "nsdelegate"},
		{"tmpfs", "/tmp", "tmpfs", "mode=1777"}, {"tmpfs", "/run", "tmpfs", "mode=755"}, {"tmpfs", "/var/tmp", "tmpfs", "mode=1777"},
	} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m[0], m[1], m[2], 0, m[3]); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	for _, path := range modules { // Glob sorts
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
			return fmt.Errorf("load %s: %w", path, err)
		}
		f.Close()
	}
	if err := os.WriteFile("/etc/hosts", []byte("127.0.0.1 localhost\n"), 0o644); err != nil {
		return err
	}
	return loopback()
}

// newRoot puts a mount over the initial root, which pivot_root(2) refuses to
// leave: no system but this one runs its services there.
func newRoot() error {
	if err := os.MkdirAll("/newroot", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", "/newroot", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := unix.Chdir("/newroot"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Chdir("/")
}

func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

func runTests() (failed int) {
	tests, err := filepath.Glob("/tests/*.test")
	if err != nil || len(tests) == 0 {
		fmt.Println("vm-test: there is nothing to run")
		return 1
	}
	for _, path := range tests {
		args, err := os.ReadFile(path + ".args")
		if err != nil {
			fmt.Println("vm-test:", err)
			failed++
			continue
		}
		cmd := exec.Command(path, strings.Fields(string(args))...)
		cmd.Dir = "/tmp"
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		cmd.Env = []string{"PATH=/bin:/usr/bin", "HOME=/tmp", "CI=true"}
		began := time.Now()
		err = cmd.Run()
		fmt.Printf("vm-test: %s: %v, %s\n", filepath.Base(path), err, time.Since(began).Round(time.Millisecond))
		if err != nil {
			failed++
		}
	}
	return failed
}
