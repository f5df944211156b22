package sandbox

import (
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The three hooks of the runtime around a fork, as package syscall uses them.
// The runtime keeps their names and types for code outside of it that forks
// (go.dev/issue/67401).

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

//go:linkname afterForkInChild syscall.runtime_AfterForkInChild
func afterForkInChild()

// vforkClone3 is clone3(2) for a child that shares the parent's memory and
// stack: the return address is kept in a register while the child runs over
// the stack.
//
//go:noescape
func vforkClone3(args *cloneArgs, size uintptr) (pid, errno uintptr)

// cloneArgs is struct clone_args.
type cloneArgs struct {
	flags, pidfd uint64
	_            [2]uint64 // child_tid, parent_tid
	exitSignal   uint64
	_            [5]uint64 // stack, stack_size, tls, set_tid, set_tid_size
	cgroup       uint64
}

// fork starts a child that runs s, whose last op is execve. It returns when the
// child has become the program or has failed. The child shares memory with this
// process until then, as with vfork(2): nothing is copied, so the cost does not
// grow with the node, and the failed step is left in s.
//
// cgroup is a descriptor of the cgroup to be born in, -1 for the parent's.
// flags are CLONE_NEW*. The process is returned as a pidfd, which the caller
// closes, and must be waited for in any case.
func fork(s *script, flags uint64, cgroup int) (pid, pidfd int, err error) {
	var fd int32 = -1
	fdp := &fd
	args := &cloneArgs{flags: flags | unix.CLONE_VFORK | unix.CLONE_VM | unix.CLONE_PIDFD, pidfd: uint64(uintptr(unsafe.Pointer(fdp))), exitSignal: uint64(unix.SIGCHLD)}
	if cgroup >= 0 {
		args.flags |= unix.CLONE_INTO_CGROUP
		args.cgroup = uint64(cgroup)
	}
	p, errno := forkInto(args, s)
	afterFork()
	runtime.KeepAlive(fdp)
	runtime.KeepAlive(args)
	runtime.KeepAlive(s)
	if errno != 0 {
		return 0, -1, &StepError{"start a process", errno}
	}
	return int(p), int(fd), nil
}

// forkInto holds the child. From beforeFork on nothing may allocate, grow the
// stack or be preempted. In the parent it returns at once: the child has used
// its frame.
//
//go:noinline
//go:norace
//go:nocheckptr
func forkInto(args *cloneArgs, s *script) (pid uintptr, errno syscall.Errno) {
	beforeFork()
	pid, e := vforkClone3(args, unsafe.Sizeof(*args))
	if e != 0 || pid != 0 {
		return pid, syscall.Errno(e)
	}
	afterForkInChild()
	s.run()
	for {
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, childFailed, 0, 0)
	}
}

// childFailed is the exit code of a child that did not become the program. Who
// waits looks at script.failed, not at the code.
const childFailed = 126

// run makes the calls. It is the only code between fork and exec.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (s *script) run() {
	for i := 0; i < len(s.ops); i++ {
		o := &s.ops[i]
		if o.reg > 0 {
			if v := s.regs[o.reg%3]; o.patch != nil {
				*o.patch = int32(v)
			} else {
				o.args[o.arg%6] = v
			}
		}
		r, _, errno := syscall.RawSyscall6(o.nr, o.args[0], o.args[1], o.args[2], o.args[3], o.args[4], o.args[5])
		switch {
		case errno == 0:
			s.regs[o.into%3] = r
		case errno == o.pass:
			if o.skip {
				i++
			}
		default:
			s.failed, s.errno = i, errno
			return
		}
	}
}
