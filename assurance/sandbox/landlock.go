package sandbox

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Landlock rights by what they are for.
const (
	llRead    = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	llExecute = unix.LANDLOCK_ACCESS_FS_EXECUTE
	llFile    = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE |
		unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV // rights that a rule for a file can have
	llWrite = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE |
		unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_SOCK |
		unix.LANDLOCK_ACCESS_FS_MAKE_FIFO | unix.LANDLOCK_ACCESS_FS_MAKE_SYM | unix.LANDLOCK_ACCESS_FS_REFER | unix.LANDLOCK_ACCESS_FS_TRUNCATE
	llDevices = unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK // given to nobody
)

// landlockFS is what each ABI can hold back in the file system.
func landlockFS(abi int) uint64 {
	all := uint64(llRead | llExecute | llWrite | llDevices | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV)
	if abi < 2 {
		all &^= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if abi < 3 {
		all &^= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if abi < 5 {
		all &^= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	return all
}

const ruleNetPort = 2 // LANDLOCK_RULE_NET_PORT

// rulesetAttr is struct landlock_ruleset_attr.
type rulesetAttr struct{ fs, net, scoped uint64 }

// rulesetSizes: an older ABI takes a shorter structure.
func (rulesetAttr) size(abi int) uintptr {
	switch {
	case abi >= 6:
		return 24
	case abi >= 4:
		return 16
	}
	return 8
}

// ruleset makes a Landlock ruleset that holds back all that the ABI can of files,
// signals and abstract sockets, and with tcp all of TCP but connecting to ports.
// Landlock refuses before the egress programs are asked, and tells nobody: it
// holds TCP where they cannot.
func ruleset(abi int, tcp bool, ports []uint16) (fd int, err error) {
	a := rulesetAttr{fs: landlockFS(abi)}
	if tcp = tcp && abi >= 4; tcp {
		a.net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	}
	if abi >= 6 {
		a.scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
	}
	r, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&a)), a.size(abi), 0)
	if errno != 0 {
		return -1, fmt.Errorf("landlock ruleset: %w", errno)
	}
	if !tcp {
		return int(r), nil
	}
	for _, p := range ports {
		rule := struct{ access, port uint64 }{unix.LANDLOCK_ACCESS_NET_CONNECT_TCP, uint64(p)}
		if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, r, ruleNetPort, uintptr(unsafe.Pointer(&rule)), 0, 0, 0); errno != 0 {
			return -1, fmt.Errorf("landlock rule for port %d: %w", p, errno)
		}
	}
	return int(r), nil
}

// pathRule is struct landlock_path_beneath_attr, which is packed.
type pathRule struct {
	access [2]uint32
	fd     int32
}

// allow adds a rule for path to the ruleset, by the path as the child sees it.
func (s *script) allow(rules, abi int, path string, access uint64) {
	access &= landlockFS(abi)
	r := &pathRule{access: [2]uint32{uint32(access), uint32(access >> 32)}}
	s.keep = append(s.keep, r)
	open := s.open("open "+path+" for landlock", path, unix.O_PATH|unix.O_CLOEXEC, 0)
	open.pass, open.skip = unix.ENOENT, true // what is not there needs no rule
	add := s.add("landlock rule for "+path, unix.SYS_LANDLOCK_ADD_RULE, uintptr(rules), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(r)))
	add.reg, add.patch = 1, &r.fd
}

func (s *script) landlock(rules int) {
	s.add("landlock", unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(rules), 0)
}
