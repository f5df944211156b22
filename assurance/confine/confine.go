// Package confine applies Landlock and seccomp to one thread, to find out
// whether they work. The thread is given up afterwards: what these calls take
// away cannot be given back, and no other thread is touched.
//
// The file uses unsafe because the kernel takes pointers to its structures in
// calls that x/sys/unix does not wrap. Each structure is a local variable that
// lives until the call returns.
package confine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OnThread runs f on a thread of its own that ends with it. f must not start
// goroutines.
func OnThread(f func() error) error {
	done := make(chan error, 1)
	go spawn(f, done)
	return <-done
}

// spawn never unlocks its thread: the runtime ends a locked thread with its
// goroutine. The main thread would only be parked, confined, and shown by /proc
// as the whole process: it is left alone.
func spawn(f func() error, done chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		defer runtime.UnlockOSThread()
		again := make(chan error, 1)
		go spawn(f, again) // on another thread, as this one is taken until it answers
		done <- <-again
		return
	}
	done <- f()
}

// LandlockABI asks the kernel for its Landlock version; 0 with an error when
// there is none.
func LandlockABI() (int, error) {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0, fmt.Errorf("landlock: %w", errno)
	}
	return int(v), nil
}

// RefuseWrites forbids the calling thread to open any file for writing, by
// Landlock.
func RefuseWrites() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	access := uint64(unix.LANDLOCK_ACCESS_FS_WRITE_FILE) // struct landlock_ruleset_attr of ABI 1: one word
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&access)), unsafe.Sizeof(access), 0)
	if errno != 0 {
		return fmt.Errorf("landlock ruleset: %w", errno)
	}
	defer unix.Close(int(fd))
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return fmt.Errorf("landlock restrict: %w", errno)
	}
	return nil
}

// seccomp_data.nr is the first word that the filter sees.
const seccompNR = 0

// RefuseGetppid forbids the calling thread getppid(2) by seccomp: it returns
// EPERM, which it never does otherwise.
func RefuseGetppid() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	filter := [4]unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: seccompNR},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.SYS_GETPPID},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall6(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("seccomp filter: %w", errno)
	}
	return nil
}

// TryLandlock refuses writes on a thread and sees that opening file, which
// exists and is writable, fails there.
func TryLandlock(file string) error {
	return OnThread(func() error {
		if err := RefuseWrites(); err != nil {
			return err
		}
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		if err == nil {
			return errors.Join(errors.New("a write that Landlock should refuse was allowed"), f.Close())
		}
		if !errors.Is(err, unix.EACCES) {
			return fmt.Errorf("want a refusal by Landlock, have %w", err)
		}
		return nil
	})
}

// TrySeccomp refuses a harmless call on a thread and sees it fail there.
func TrySeccomp() error {
	return OnThread(func() error {
		if err := RefuseGetppid(); err != nil {
			return err
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0); errno != unix.EPERM {
			return fmt.Errorf("a call that seccomp should refuse ended with %v", errno)
		}
		return nil
	})
}
