// Package sandbox starts a program so that the kernel holds it to what was
// decided for it, and sees to it that nothing of it is left.
//
// Life of a Process: Start (cgroup, limits, egress entries, view, Landlock
// rules; then a child that enters all of this and becomes the program) → Wait
// (output is copied, the end is awaited, what is left is killed, the cgroup is
// removed, usage and refused attempts are read) → Ended.
//
// A Sandbox is made of layers (LayerNames). Each holds something back that
// another would let through or cannot see; Open tries each and goes on without
// those that this platform refuses. Start refuses what the missing ones would
// have kept: a limit that was decided is kept or the program does not run.
// docs/sandbox.md has the table of attempts and layers, made from the tests.
//
//	cgroup      one for each process; killed and counted as a whole
//	limits      memory, pids, cpu, io: where the controllers are
//	namespaces  pid, ipc, uts; net without interfaces unless egress is allowed
//	view        a root with the system's programs, chosen paths, own /tmp and /proc
//	user        a user id for each running call, no capabilities
//	egress      eBPF at connect, send, bind: destinations, and who tried others
//	landlock    the same files once more, signals, abstract sockets
//	seccomp     a list of system calls
//
// What a process must do to itself between fork and exec is a list of system
// calls (script), run in a child that shares the node's memory (fork): no second
// program, no second start of this one, so the whole costs about twice a plain
// fork and exec where a re-executed helper costs six times. It uses the
// runtime's hooks for forking and a few lines of assembly, as package syscall
// does. The process is the first of its pid namespace: a signal that it sends
// itself without a handler is ignored, and when it ends, the kernel ends the
// rest.
//
// Units: bytes, time.Duration. All types but Command are safe for concurrent
// use as they say. Sizes of everything are bounded by Options and Limits.
// Secrets appear in no argument, environment, file or error.
//
// The package may be imported by those who run tools (node/tool) and by
// assurance. It uses unsafe where the kernel takes pointers in calls that
// x/sys/unix does not wrap; what they point to is kept by the script that names
// them.
package sandbox
