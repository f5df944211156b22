package sandbox

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Steps of a script that more than one sandbox layer is made of.

// mapSelf makes the process itself known in the user namespace that it was born
// in: its own user and group, and no other.
func (s *script) mapSelf() {
	put := func(file, text string) {
		s.open("open "+file, file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		s.add("write "+file, unix.SYS_WRITE, 0, s.bytes([]byte(text)), uintptr(len(text))).reg = 1
		s.add("close "+file, unix.SYS_CLOSE).reg = 1
	}
	put("/proc/self/setgroups", "deny")
	put("/proc/self/uid_map", fmt.Sprintf("%d %d 1", os.Geteuid(), os.Geteuid()))
	put("/proc/self/gid_map", fmt.Sprintf("%d %d 1", os.Getegid(), os.Getegid()))
}

// mountProc mounts the process's own /proc: its pid namespace and nothing of
// the kernel's, read-only. Without privileges the kernel lets it be mounted only
// where the old /proc is still seen, and nothing hides a part of it, as in some
// containers: then there is none.
func (s *script) mountProc(path string) {
	s.mount("mount /proc", "proc", path, "proc", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "subset=pid,hidepid=invisible").pass = unix.EPERM
}

func tmpOptions(bytes int64) string {
	return fmt.Sprintf("mode=1777,size=%d,nr_inodes=%d", bytes, max(64, bytes/(16<<10)))
}

const lastCap = 63 // more than any kernel knows

// emptyBounds empties the bounding set.
func (s *script) emptyBounds() {
	for c := uintptr(0); c <= lastKnownCap; c++ {
		s.add("drop a capability", unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0, 0, 0)
	}
}

// lastKnownCap is the highest capability of this kernel, read once.
var lastKnownCap = func() uintptr {
	for c := uintptr(0); c <= lastCap; c++ {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0); err != nil {
			return c - 1
		}
	}
	return lastCap
}()

// noCaps gives up the capabilities that are left after a change of user.
func (s *script) noCaps() {
	s.add("clear ambient capabilities", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	head := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := &[2]unix.CapUserData{}
	s.keep = append(s.keep, head, data)
	s.add("give up capabilities", unix.SYS_CAPSET, uintptr(unsafe.Pointer(head)), uintptr(unsafe.Pointer(data)))
}

// become changes user and group for good.
func (s *script) become(uid, gid uint32) {
	s.add("leave groups", unix.SYS_SETGROUPS, 0, 0)
	s.add("change group", unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid))
	s.add("change user", unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid))
}

func (s *script) noNewPrivs() {
	s.add("no_new_privs", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

func (s *script) rlimit(what string, resource int, n uint64) {
	l := &unix.Rlimit{Cur: n, Max: n}
	s.keep = append(s.keep, l)
	s.add("limit "+what, unix.SYS_PRLIMIT64, 0, uintptr(resource), uintptr(unsafe.Pointer(l)), 0)
}
