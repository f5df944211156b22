package powercut

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const isolated = "POWERCUT_ISOLATED"

// Main is what TestMain calls. As root it runs the tests in a copy of the test
// binary with a mount namespace of its own: mounts, and with them loop devices,
// go when the process goes, however it ends.
func Main(m *testing.M) {
	if os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	if os.Getenv(isolated) != "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			fmt.Fprintln(os.Stderr, "powercut: make mounts private:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	// The death signal is sent when the thread ends that started the process.
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), isolated+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "powercut: run the tests in a mount namespace:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Require skips the test when it cannot run here, and says why. Under CI=true
// that is a failure.
func Require(t testing.TB) {
	t.Helper()
	missing := func(format string, args ...any) {
		t.Helper()
		if os.Getenv("CI") == "true" {
			t.Fatalf(format, args...)
		}
		t.Skipf(format, args...)
	}
	if os.Getuid() != 0 {
		missing("needs root: mounts file systems")
	}
	if os.Getenv(isolated) == "" {
		t.Fatal("TestMain of this package does not call powercut.Main")
	}
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			missing("needs %s: %v", dev, err)
			return
		}
		_ = f.Close()
	}
	for name, how := range mkfs {
		if _, err := exec.LookPath(how.argv[0]); err != nil {
			missing("needs %s: install e2fsprogs, xfsprogs and btrfs-progs (%s is not there)", how.argv[0], name)
		}
	}
}
