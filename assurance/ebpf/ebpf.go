// Package ebpf attaches small eBPF programs to cgroups. The programs are written
// in the kernel's instructions here, so that a probe needs neither clang nor an
// object file.
package ebpf

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// userIP4 is the offset of user_ip4 in struct bpf_sock_addr, in network order.
const userIP4 = 4

// RefuseConnect4 attaches a program to the cgroup at path that refuses the
// connect(2) of an IPv4 socket to addr with EPERM and lets every other through.
// It is attached by a link that is not pinned: it is gone when the Closer is
// closed, or the process ends.
func RefuseConnect4(path string, addr netip.Addr) (io.Closer, error) {
	if !addr.Is4() {
		return nil, fmt.Errorf("refuse connect: %s is no IPv4 address", addr)
	}
	bytes := addr.As4()
	word := binary.NativeEndian.Uint32(bytes[:]) // as the program loads it
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "refuse_connect4", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, userIP4, asm.Word),
			asm.Mov.Imm(asm.R0, 0), // 0: refuse
			asm.JEq.Imm32(asm.R2, int32(word), "out"),
			asm.Mov.Imm(asm.R0, 1), // 1: proceed
			asm.Return().WithSymbol("out"),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("load an eBPF program: %w", err)
	}
	defer prog.Close() // the link holds it
	l, err := link.AttachCgroup(link.CgroupOptions{Path: path, Attach: ebpf.AttachCGroupInet4Connect, Program: prog})
	if err != nil {
		return nil, fmt.Errorf("attach an eBPF program to the cgroup: %w", err)
	}
	return l, nil
}
