package sandbox

import (
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The seccomp filter is an allow-list: what is not named here, and what a later
// kernel adds, is refused. A refused call fails with EPERM, one that this list
// has not heard of with ENOSYS, as on a kernel without it, so that a C library
// takes its older way. A process of another architecture's calls is killed.
//
// The filter is a binary search over ranges of call numbers, compiled once. The
// kernel remembers for each number whether it is allowed whatever its arguments,
// so most calls cost nothing more; those with checked arguments run through it.

// Offsets in struct seccomp_data; both architectures are little-endian.
const (
	dataNR   = 0
	dataArch = 4
	dataArg0 = 16 // each argument has 8 bytes, the low word first
)

func dataArg(i int) uint32 { return uint32(dataArg0 + 8*i) }

// Refused clone(2) flags: a new namespace of any kind.
const cloneNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

const sockTypeMask = 0xf // the rest of the type are SOCK_CLOEXEC and SOCK_NONBLOCK

var (
	retAllow  = stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW)
	retRefuse = stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM))
	retNoSys  = stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS))
	retKill   = stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_KILL_PROCESS)
)

func stmt(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }

func jump(code uint16, k uint32, t, f uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_K | code, K: k, Jt: t, Jf: f}
}

func load(offset uint32) unix.SockFilter { return stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset) }

// A span is a range of call numbers that are treated alike. body is what
// decides; the call's number is in the accumulator.
type span struct {
	first uint32
	body  []unix.SockFilter
}

// network is what the filter lets a process do with sockets.
type network int

const (
	localOnly network = iota // Unix sockets: nothing else would hold an IP socket back
	isolated                 // IP sockets too, in a network namespace of its own: that an attempt fails there can be recorded
	connected                // IP sockets in the host's network, held by the egress programs; nothing may listen
)

// socketRules allow, by socket(2)'s arguments, streams and datagrams of the
// local machine and of TCP and UDP. Everything else that the kernel calls a
// socket reaches further than a tool should: packets, netlink, vsock, raw
// sockets, kernel crypto, the alternatives to TCP that egress programs do not
// see.
func socketRules(n network) []unix.SockFilter {
	if n == localOnly {
		return []unix.SockFilter{load(dataArg(0)), jump(unix.BPF_JEQ, unix.AF_UNIX, 0, 1), retAllow, retRefuse}
	}
	return []unix.SockFilter{
		load(dataArg(0)),
		jump(unix.BPF_JEQ, unix.AF_UNIX, 11, 0),
		jump(unix.BPF_JEQ, unix.AF_INET, 1, 0),
		jump(unix.BPF_JEQ, unix.AF_INET6, 0, 8),
		load(dataArg(1)),
		stmt(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, sockTypeMask),
		jump(unix.BPF_JEQ, unix.SOCK_STREAM, 1, 0),
		jump(unix.BPF_JEQ, unix.SOCK_DGRAM, 0, 4),
		load(dataArg(2)),
		jump(unix.BPF_JEQ, 0, 3, 0), // the type's own protocol
		jump(unix.BPF_JEQ, unix.IPPROTO_TCP, 2, 0),
		jump(unix.BPF_JEQ, unix.IPPROTO_UDP, 1, 0),
		retRefuse,
		retAllow,
	}
}

func equalRules(arg int, values ...uint32) []unix.SockFilter {
	out := []unix.SockFilter{load(dataArg(arg))}
	for i, v := range values {
		out = append(out, jump(unix.BPF_JEQ, v, uint8(len(values)-i), 0))
	}
	return append(out, retRefuse, retAllow)
}

// checked are the calls that depend on their arguments.
func checked(n network) map[uint32][]unix.SockFilter {
	rules := map[uint32][]unix.SockFilter{
		unix.SYS_SOCKET:     socketRules(n),
		unix.SYS_SOCKETPAIR: equalRules(0, unix.AF_UNIX),
		unix.SYS_CLONE: {load(dataArg(0)),
			jump(unix.BPF_JSET, cloneNamespaces, 1, 0), retAllow, retRefuse},
		// Its flags lie in memory, where a filter cannot look.
		unix.SYS_CLONE3: {retNoSys},
		// Characters pushed into a terminal are commands for who reads it.
		unix.SYS_IOCTL: {load(dataArg(1)),
			jump(unix.BPF_JEQ, unix.TIOCSTI, 2, 0), jump(unix.BPF_JEQ, unix.TIOCLINUX, 1, 0), retAllow, retRefuse},
		// The execution domains that exist: Linux, with or without random addresses.
		unix.SYS_PERSONALITY: equalRules(0, 0, 0x40000, 0xffffffff),
	}
	if n == connected { // listen(2) takes a port without bind(2), which is where the egress programs look
		rules[unix.SYS_LISTEN] = []unix.SockFilter{retRefuse}
	}
	return rules
}

// filter builds the program.
func filter(n network) []unix.SockFilter {
	special := checked(n)
	highest := uint32(0)
	kind := map[uint32][]unix.SockFilter{}
	for _, nr := range allowed {
		kind[nr] = []unix.SockFilter{retAllow}
	}
	for nr, body := range special {
		kind[nr] = body
	}
	for nr := range kind {
		highest = max(highest, nr)
	}
	var spans []span
	var last []unix.SockFilter
	for nr := uint32(0); nr <= highest; nr++ {
		body, ok := kind[nr]
		if !ok {
			body = []unix.SockFilter{retRefuse}
		}
		if last == nil || !slices.Equal(last, body) {
			spans = append(spans, span{nr, body})
			last = body
		}
	}
	spans = append(spans, span{max(highest, lastKnown) + 1, []unix.SockFilter{retNoSys}})
	if highest < lastKnown {
		spans = slices.Insert(spans, len(spans)-1, span{highest + 1, []unix.SockFilter{retRefuse}})
	}
	out := []unix.SockFilter{load(dataArch), jump(unix.BPF_JEQ, auditArch, 1, 0), retKill, load(dataNR)}
	return append(out, search(spans)...)
}

// search compiles spans, sorted by first, to a binary search. A jump over more
// than 255 instructions takes an instruction of its own, so every one does.
func search(spans []span) []unix.SockFilter {
	if len(spans) == 1 {
		return spans[0].body
	}
	mid := len(spans) / 2
	left, right := search(spans[:mid]), search(spans[mid:])
	out := []unix.SockFilter{
		jump(unix.BPF_JGE, spans[mid].first, 0, 1),
		stmt(unix.BPF_JMP|unix.BPF_JA, uint32(len(left))),
	}
	return append(append(out, left...), right...)
}

// lastKnown is the highest call number that the list was made for (Linux 6.18).
const lastKnown = 470

// The filters there are, compiled at start.
var filters = map[network][]unix.SockFilter{localOnly: filter(localOnly), isolated: filter(isolated), connected: filter(connected)}

// seccomp adds the filter to s. Nothing but execve may follow.
func (s *script) seccomp(n network) {
	f := filters[n]
	prog := &unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	s.keep = append(s.keep, prog)
	s.add("seccomp", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(prog)))
}
