package sandbox

import (
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A script is the list of system calls that a new process makes between its
// birth and the program: everything that only the process can do to itself. It
// is built before the fork and run by fork (fork.go) in a child that shares the
// parent's memory, so it must not allocate, and cannot branch: a call either
// succeeds, fails in a way that its op lets pass, or ends the child with the
// index of the op left behind.
//
// An op can use the result of an earlier one (a descriptor) through one of two
// registers.
type script struct {
	ops  []op
	keep []any // what the ops point to

	// Written by the child. The parent is stopped until the child has ended or
	// become the program, so nothing races.
	failed int // index of the op that failed; -1: none
	errno  syscall.Errno
	regs   [3]uintptr // by op.into; 0 is nobody's
}

// op is one system call.
type op struct {
	nr   uintptr
	args [6]uintptr
	what string // for the error: "mount /proc"

	pass  syscall.Errno // an error that is none
	skip  bool          // with pass: the next op is left out when the error came
	into  uint8         // the register, 1 or 2, that the result goes to; 0: none
	reg   uint8         // the register that is used; 0: none
	arg   uint8         // with reg: the argument that it replaces
	patch *int32        // with reg: where it is stored before the call, instead of an argument
}

func newScript() *script { return &script{failed: -1} }

// add appends a call. The op is returned for what is rarely needed.
func (s *script) add(what string, nr uintptr, args ...uintptr) *op {
	o := op{nr: nr, what: what}
	copy(o.args[:], args)
	s.ops = append(s.ops, o)
	return &s.ops[len(s.ops)-1]
}

// text is a C string that lives as long as the script. What is given here comes
// from configuration that was checked for NUL bytes; one that slips through
// ends the string, as everywhere in C.
func (s *script) text(v string) uintptr {
	b := append([]byte(v), 0)
	s.keep = append(s.keep, b)
	return uintptr(unsafe.Pointer(&b[0]))
}

// bytes is a buffer that lives as long as the script.
func (s *script) bytes(b []byte) uintptr {
	if len(b) == 0 {
		return 0
	}
	s.keep = append(s.keep, b)
	return uintptr(unsafe.Pointer(&b[0]))
}

// vector is an argv or envp: pointers, then nil.
func (s *script) vector(list []string) uintptr {
	v := make([]uintptr, 0, len(list)+1)
	for _, e := range list {
		v = append(v, s.text(e))
	}
	v = append(v, 0)
	s.keep = append(s.keep, v)
	return uintptr(unsafe.Pointer(&v[0]))
}

const atCWD = ^uintptr(99) // AT_FDCWD: -100

func (s *script) mount(what, source, target, fstype string, flags uintptr, data string) *op {
	var src, typ, opt uintptr
	if source != "" {
		src = s.text(source)
	}
	if fstype != "" {
		typ = s.text(fstype)
	}
	if data != "" {
		opt = s.text(data)
	}
	return s.add(what, unix.SYS_MOUNT, src, s.text(target), typ, flags, opt)
}

func (s *script) mkdir(path string) *op {
	o := s.add("make "+path, unix.SYS_MKDIRAT, atCWD, s.text(path), 0o755)
	o.pass = unix.EEXIST
	return o
}

func (s *script) symlink(target, path string) {
	s.add("link "+path, unix.SYS_SYMLINKAT, s.text(target), atCWD, s.text(path)).pass = unix.EEXIST
}

// file makes a file with this content. It never writes to one that is there.
func (s *script) file(path string, content []byte) {
	s.open("make "+path, path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if len(content) > 0 {
		s.add("write "+path, unix.SYS_WRITE, 0, s.bytes(content), uintptr(len(content))).reg = 1
	}
	s.add("close "+path, unix.SYS_CLOSE, 0).reg = 1
}

// open puts a descriptor into register 1.
func (s *script) open(what, path string, flags int, mode uint32) *op {
	o := s.add(what, unix.SYS_OPENAT, atCWD, s.text(path), uintptr(flags), uintptr(mode))
	o.into = 1
	return o
}

// mountAttr is struct mount_attr.
type mountAttr struct{ set, clear, propagation, userns uint64 }

// attributes sets, and clears, mount attributes on path; recursive for all below.
func (s *script) attributes(what, path string, set uint64, recursive bool, clear ...uint64) {
	a := &mountAttr{set: set}
	for _, c := range clear {
		a.clear |= c
	}
	s.keep = append(s.keep, a)
	var flags uintptr
	if recursive {
		flags = unix.AT_RECURSIVE
	}
	s.add(what, unix.SYS_MOUNT_SETATTR, atCWD, s.text(path), flags, uintptr(unsafe.Pointer(a)), unsafe.Sizeof(*a))
}

// A StepError tells which step of a sandbox the kernel refused.
type StepError struct {
	Step  string
	Errno syscall.Errno
}

func (e *StepError) Error() string { return fmt.Sprintf("%s: %v", e.Step, e.Errno) }
func (e *StepError) Unwrap() error { return e.Errno }

// err is the error that the child left behind.
func (s *script) err() error {
	if s.failed < 0 {
		return nil
	}
	return &StepError{s.ops[s.failed].what, s.errno}
}

// runOnThread makes the calls of s on the calling thread, which is given up
// afterwards: the caller has locked it and does not unlock it.
func (s *script) runOnThread() error {
	s.run()
	runtime.KeepAlive(s)
	return s.err()
}
