package ebpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// A Gate holds the processes below one cgroup to the destinations that each
// call may reach. Its programs hang at that cgroup, once, and look up what the
// cgroup of the calling process (the call's own, one level down) may do:
//
//	calls   hash      cgroup id → refused, lost (counters)
//	allow   LPM trie  cgroup id, port, address prefix → 1
//	events  ring      one entry per refused attempt
//
// A cgroup that is in no map reaches nothing. So a call costs its map entries
// and no program, and there is no moment at which a new cgroup is open.
//
// Programs and maps are pinned in a bpffs of the node's own: when the node is
// killed they stay, with the processes that they hold. The next node takes the
// maps over, empties them, and replaces each program in its link, in place.
//
// Addresses are kept in 16 bytes; an IPv4 address as its IPv4-mapped form, so
// that a socket of either family meets the same entries.
//
// A Gate is safe for concurrent use.
type Gate struct {
	calls, allow, events *ebpf.Map
	links                []link.Link
	dir                  string

	mu     sync.Mutex // guards the reader and pending
	reader *ringbuf.Reader
	live   map[uint64]*Watch
}

// Limits of a gate.
const (
	maxCalls     = 1 << 16   // calls at one time
	maxAllowed   = 1 << 18   // destinations of all calls at one time
	ringBytes    = 256 << 10 // refused attempts that are not yet read: about 4,600
	MaxDestPerOp = 256       // destinations of one call
	maxRefusals  = 32        // attempts kept of one call; the count goes on
)

// A Dest is what a call may reach: addresses and one port of TCP and UDP.
type Dest struct {
	Prefix netip.Prefix
	Port   uint16
}

// A Refusal is one refused attempt.
type Refusal struct {
	Op   string         // connect, send, bind
	Dest netip.AddrPort //
	PID  uint32         // as the host sees it
	Comm string         // name of the process, its own choice
}

// A Watch is a call that is held.
type Watch struct {
	id   uint64
	dest []Dest

	seen []Refusal // guarded by Gate.mu
}

// The hooks. The number is in the event.
var hooks = []struct {
	name   string
	attach ebpf.AttachType
	six    bool
	op     string
}{
	{"connect4", ebpf.AttachCGroupInet4Connect, false, "connect"},
	{"connect6", ebpf.AttachCGroupInet6Connect, true, "connect"},
	{"sendmsg4", ebpf.AttachCGroupUDP4Sendmsg, false, "send"},
	{"sendmsg6", ebpf.AttachCGroupUDP6Sendmsg, true, "send"},
	{"bind4", ebpf.AttachCGroupInet4Bind, false, "bind"},
	{"bind6", ebpf.AttachCGroupInet6Bind, true, "bind"},
}

// maps are the specifications; names are those of the pins.
func mapSpecs() map[string]*ebpf.MapSpec {
	return map[string]*ebpf.MapSpec{
		"calls":  {Name: "calls", Type: ebpf.Hash, KeySize: 8, ValueSize: 16, MaxEntries: maxCalls, Flags: unix.BPF_F_NO_PREALLOC, Pinning: ebpf.PinByName},
		"allow":  {Name: "allow", Type: ebpf.LPMTrie, KeySize: keySize, ValueSize: 1, MaxEntries: maxAllowed, Flags: unix.BPF_F_NO_PREALLOC, Pinning: ebpf.PinByName},
		"events": {Name: "events", Type: ebpf.RingBuf, MaxEntries: ringBytes, Pinning: ebpf.PinByName},
	}
}

// OpenGate attaches the programs to the cgroup at path. dir is a directory of a
// mounted bpffs that is this gate's alone; what an earlier gate pinned there is
// taken over, and its calls are forgotten, so that what is left of them reaches
// nothing.
func OpenGate(path, dir string) (_ *Gate, err error) {
	g := &Gate{dir: dir, live: map[uint64]*Watch{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.close())
		}
	}()
	for name, m := range map[string]**ebpf.Map{"calls": &g.calls, "allow": &g.allow, "events": &g.events} {
		if *m, err = ebpf.NewMapWithOptions(mapSpecs()[name], ebpf.MapOptions{PinPath: dir}); err != nil {
			return nil, fmt.Errorf("egress map %s: %w", name, err)
		}
	}
	if err := g.empty(); err != nil {
		return nil, err
	}
	for i, h := range hooks {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "egress_" + h.name, Type: ebpf.CGroupSockAddr, AttachType: h.attach,
			License: "Apache-2.0", Instructions: g.program(i)})
		if err != nil {
			return nil, fmt.Errorf("egress program %s: %w", h.name, err)
		}
		l, err := hang(path, filepath.Join(dir, h.name), h.attach, prog)
		prog.Close() // the link holds it
		if err != nil {
			return nil, fmt.Errorf("egress program %s: %w", h.name, err)
		}
		g.links = append(g.links, l)
	}
	if g.reader, err = ringbuf.NewReader(g.events); err != nil {
		return nil, fmt.Errorf("egress events: %w", err)
	}
	g.reader.SetDeadline(time.Unix(1, 0)) // Read returns what is there
	return g, nil
}

// hang puts prog into the link that is pinned, or makes and pins one. A link
// whose cgroup is gone is of no use and is replaced.
func hang(cgroup, pin string, at ebpf.AttachType, prog *ebpf.Program) (link.Link, error) {
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		var same bool
		if same, err = linkedTo(old, cgroup); err == nil && same {
			if err = old.Update(prog); err == nil {
				return old, nil
			}
		}
		if err != nil {
			err = fmt.Errorf("take over the pinned link: %w", err)
		}
		if err = errors.Join(err, old.Unpin(), old.Close()); err != nil && same {
			return nil, err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: at, Program: prog})
	if err != nil {
		return nil, err
	}
	if err := l.Pin(pin); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// linkedTo reports whether the link hangs at the cgroup.
func linkedTo(l link.Link, cgroup string) (bool, error) {
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	id, err := ID(cgroup)
	if err != nil {
		return false, err
	}
	c := info.Cgroup()
	return c != nil && c.CgroupId == id, nil
}

// ID is the number that the kernel knows a cgroup by.
func ID(cgroup string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(cgroup, &st); err != nil {
		return 0, fmt.Errorf("cgroup id of %s: %w", cgroup, err)
	}
	return st.Ino, nil
}

// empty forgets the calls of an earlier gate.
func (g *Gate) empty() error {
	for _, m := range []*ebpf.Map{g.allow, g.calls} {
		key := make([]byte, m.KeySize())
		for {
			if err := m.NextKey(nil, &key); errors.Is(err, ebpf.ErrKeyNotExist) {
				break
			} else if err != nil {
				return fmt.Errorf("empty the egress maps: %w", err)
			}
			if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("empty the egress maps: %w", err)
			}
		}
	}
	return nil
}

// The key of allow: struct { u32 prefixlen; u64 cgroup; be16 port; u16 zero; u8 addr[16] }.
const (
	keySize   = 4 + 8 + 4 + 16
	keyFixed  = 64 + 32 // bits before the address
	keyLookup = keyFixed + 128
)

func key(id uint64, d Dest) [keySize]byte {
	var k [keySize]byte
	a, bits := d.Prefix.Masked().Addr(), d.Prefix.Bits()
	if a.Is4() {
		bits += 96
	}
	binary.NativeEndian.PutUint32(k[0:], uint32(keyFixed+bits))
	binary.NativeEndian.PutUint64(k[4:], id)
	binary.BigEndian.PutUint16(k[12:], d.Port)
	b := a.As16()
	copy(k[16:], b[:])
	return k
}

// Allow lets the processes of the cgroup with this id reach dests and nothing
// else. The cgroup must be a child of the gate's. It must be called before the
// first process is in it, and End after the last is gone.
func (g *Gate) Allow(id uint64, dests []Dest) (*Watch, error) {
	if len(dests) > MaxDestPerOp {
		return nil, fmt.Errorf("egress: %d destinations, at most %d", len(dests), MaxDestPerOp)
	}
	w := &Watch{id: id, dest: dests}
	var zero [16]byte
	if err := g.calls.Put(id, zero[:]); err != nil {
		return nil, fmt.Errorf("egress: %w", err)
	}
	for i, d := range dests {
		k := key(id, d)
		if err := g.allow.Put(k[:], uint8(1)); err != nil {
			w.dest = dests[:i]
			_, _, endErr := g.End(w)
			return nil, errors.Join(fmt.Errorf("egress to %s port %d: %w", d.Prefix, d.Port, err), endErr)
		}
	}
	g.mu.Lock()
	g.live[id] = w
	g.mu.Unlock()
	return w, nil
}

// End forgets the call and returns the attempts that were refused, at most
// maxRefusals of them, and how many there were.
func (g *Gate) End(w *Watch) (kept []Refusal, refused uint64, err error) {
	var counters [16]byte
	err = g.calls.LookupAndDelete(w.id, &counters)
	for _, d := range w.dest {
		k := key(w.id, d)
		if e := g.allow.Delete(k[:]); e != nil && !errors.Is(e, ebpf.ErrKeyNotExist) {
			err = errors.Join(err, e)
		}
	}
	refused = binary.NativeEndian.Uint64(counters[:8])
	g.mu.Lock()
	defer g.mu.Unlock()
	if refused > 0 {
		err = errors.Join(err, g.drain())
	}
	delete(g.live, w.id)
	if err != nil {
		err = fmt.Errorf("egress of a call that ended: %w", err)
	}
	return w.seen, refused, err
}

// An event is struct { u64 cgroup; u32 pid; u16 hook; be16 port; u8 addr[16]; u8 comm[16] }.
const eventSize = 48

// drain hands out what is in the ring. Attempts of calls that ended are dropped.
func (g *Gate) drain() error {
	var rec ringbuf.Record
	for {
		if err := g.reader.ReadInto(&rec); errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read the events: %w", err)
		}
		b := rec.RawSample
		if len(b) < eventSize {
			continue
		}
		w := g.live[binary.NativeEndian.Uint64(b)]
		hook := int(binary.NativeEndian.Uint16(b[12:]))
		if w == nil || len(w.seen) == maxRefusals || hook >= len(hooks) {
			continue
		}
		w.seen = append(w.seen, Refusal{
			Op:   hooks[hook].op,
			Dest: netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[16:32])).Unmap(), binary.BigEndian.Uint16(b[14:])),
			PID:  binary.NativeEndian.Uint32(b[8:]), Comm: unix.ByteSliceToString(b[32:48]),
		})
	}
}

// Close lets go of the gate and leaves it shut: what is pinned stays.
func (g *Gate) Close() error { return g.close() }

// Remove takes the gate away. No process may be left below its cgroup.
func (g *Gate) Remove() error {
	var errs []error
	for _, l := range g.links {
		errs = append(errs, l.Unpin())
	}
	for _, m := range []*ebpf.Map{g.calls, g.allow, g.events} {
		errs = append(errs, m.Unpin())
	}
	return errors.Join(append(errs, g.close())...)
}

func (g *Gate) close() error {
	var errs []error
	if g.reader != nil {
		errs = append(errs, g.reader.Close())
	}
	for _, l := range g.links {
		errs = append(errs, l.Close())
	}
	for _, m := range []*ebpf.Map{g.calls, g.allow, g.events} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}

// Fields of struct bpf_sock_addr, in network order.
const (
	ctxIP4  = 4
	ctxIP6  = 8
	ctxPort = 24
)

// Where the program keeps things, below the frame pointer.
const (
	fpKey   = -40 // the key of allow
	fpCgrp  = fpKey + 4
	fpPort  = fpKey + 12
	fpAddr  = fpKey + 16
	fpID    = -48 // the key of calls
	fpEvent = fpID - eventSize
)

// mapped is the third word of an IPv4-mapped address: 00 00 ff ff.
const mapped = -65536 // 0xffff0000, as both architectures are little-endian

// program is the one program there is, for the hook with this number. It is
// written in the kernel's instructions: 60 of them, which need no compiler to
// build and can be read beside their comments.
//
//	id = cgroup of the caller
//	if bind and port == 0: let through, the kernel picks a port as it does without bind
//	if allow[id, port, address]: let through
//	calls[id].refused++
//	put the attempt into the ring, or calls[id].lost++
//	refuse (EPERM)
func (g *Gate) program(hook int) asm.Instructions {
	h := hooks[hook]
	p := asm.Instructions{
		asm.Mov.Reg(asm.R9, asm.R1), // context
		asm.FnGetCurrentCgroupId.Call(),
		asm.Mov.Reg(asm.R6, asm.R0),
		asm.StoreMem(asm.RFP, fpID, asm.R6, asm.DWord),
		asm.StoreImm(asm.RFP, fpKey, keyLookup, asm.Word),
		asm.StoreMem(asm.RFP, fpCgrp, asm.R6, asm.Word), // in halves: not aligned to 8
		asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, fpCgrp+4, asm.R0, asm.Word),
		asm.LoadMem(asm.R8, asm.R9, ctxPort, asm.Word),
		asm.StoreMem(asm.RFP, fpPort, asm.R8, asm.Word),
	}
	if h.six {
		for i := int16(0); i < 16; i += 4 {
			p = append(p, asm.LoadMem(asm.R2, asm.R9, ctxIP6+i, asm.Word), asm.StoreMem(asm.RFP, fpAddr+i, asm.R2, asm.Word))
		}
	} else {
		p = append(p,
			asm.StoreImm(asm.RFP, fpAddr, 0, asm.Word),
			asm.StoreImm(asm.RFP, fpAddr+4, 0, asm.Word),
			asm.StoreImm(asm.RFP, fpAddr+8, mapped, asm.Word),
			asm.LoadMem(asm.R2, asm.R9, ctxIP4, asm.Word),
			asm.StoreMem(asm.RFP, fpAddr+12, asm.R2, asm.Word))
	}
	if h.op == "bind" {
		p = append(p, asm.JEq.Imm(asm.R8, 0, "allow"))
	} else {
		p = append(p,
			asm.LoadMapPtr(asm.R1, g.allow.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, fpKey),
			asm.FnMapLookupElem.Call(),
			asm.JNE.Imm(asm.R0, 0, "allow"))
	}
	p = append(p,
		asm.LoadMapPtr(asm.R1, g.calls.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, fpID),
		asm.FnMapLookupElem.Call(),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.JEq.Imm(asm.R7, 0, "event"),
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R7, asm.R1, asm.DWord, 0),

		asm.StoreMem(asm.RFP, fpEvent, asm.R6, asm.DWord).WithSymbol("event"),
		asm.FnGetCurrentPidTgid.Call(),
		asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, fpEvent+8, asm.R0, asm.Word),
		asm.StoreImm(asm.RFP, fpEvent+12, int64(hook), asm.Half),
		asm.StoreMem(asm.RFP, fpEvent+14, asm.R8, asm.Half),
	)
	for i := int16(0); i < 16; i += 4 {
		p = append(p, asm.LoadMem(asm.R2, asm.RFP, fpAddr+i, asm.Word), asm.StoreMem(asm.RFP, fpEvent+16+i, asm.R2, asm.Word))
	}
	return append(p,
		asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, fpEvent+32),
		asm.Mov.Imm(asm.R2, 16),
		asm.FnGetCurrentComm.Call(),
		asm.LoadMapPtr(asm.R1, g.events.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, fpEvent),
		asm.Mov.Imm(asm.R3, eventSize),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
		asm.JEq.Imm(asm.R0, 0, "refuse"),
		asm.JEq.Imm(asm.R7, 0, "refuse"),
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R7, asm.R1, asm.DWord, 8),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("refuse"),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("allow"),
		asm.Return(),
	)
}
