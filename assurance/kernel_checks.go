package assurance

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/assurance/cgroup"
	"github.com/autonomyops/autonomy/assurance/child"
	"github.com/autonomyops/autonomy/assurance/confine"
	"github.com/autonomyops/autonomy/assurance/ebpf"
)

// The probe child connects to both; the eBPF program refuses the first only.
// Port 9 is discard, and a UDP connect sends nothing.
const (
	refusedAddr = "127.0.0.2:9"
	allowedAddr = "127.0.0.3:9"
)

// wantControllers are those that carry a policy's memory_max, pids_max, cpu_max.
var wantControllers = []string{"cpu", "memory", "pids"}

// probeCgroup makes one cgroup and tries three things in it: members and kill,
// controllers, an eBPF program that refuses a connect.
func probeCgroup(ctx context.Context) []Check {
	group := Check{Name: "cgroup_v2", Tried: "made a cgroup, started a child in it, killed it by cgroup.kill, removed it",
		Why: "it is how a tool is stopped together with everything that it started",
		Fix: "Mount cgroup v2, and run as root or as a service with Delegate=yes."}
	limits := Check{Name: "cgroup_controllers", Tried: "read what can be limited in a fresh cgroup",
		Why: "memory_max, pids_max and cpu_max of a policy are kept by them",
		Fix: "Boot with systemd.unified_cgroup_hierarchy=1, or enable them in cgroup.subtree_control."}
	egress := Check{Name: "ebpf_connect", Tried: "attached a connect4 program to the cgroup, connected from inside",
		Why: "it holds a process to the destinations that policy allows",
		Fix: "Run as root or with CAP_BPF and CAP_NET_ADMIN; a container needs bpf(2) let through."}

	g, release, err := makeGroup()
	if err != nil {
		none := errors.New("not tried: there is no cgroup to try it in")
		return []Check{group.failed(err), limits.failed(none), egress.failed(none)}
	}
	// Cleaning up goes on when the probe's time is over.
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	limits = checkControllers(limits, g)
	filter, filterErr := ebpf.RefuseConnect4(g.Path, netip.MustParseAddrPort(refusedAddr).Addr())
	ch, err := child.Start(ctx, g.FD(), refusedAddr, allowedAddr)
	if err != nil {
		err = errors.Join(err, g.Remove(cleanup), release())
		if filterErr == nil {
			err = errors.Join(err, filter.Close())
		}
		return []Check{group.failed(err), limits, egress.failed(errors.New("not tried: no child in the cgroup"))}
	}
	if filterErr != nil {
		egress = egress.failed(filterErr)
	} else {
		egress = checkEgress(egress, ch)
		if err := filter.Close(); err != nil {
			egress = egress.failed(err)
		}
	}
	if err := errors.Join(killGroup(cleanup, g, ch), g.Remove(cleanup), release()); err != nil {
		group = group.failed(err)
	} else {
		group.Result, group.Detail = OK, "a child entered, was killed, the cgroup is gone"
	}
	return []Check{group, limits, egress}
}

// makeGroup makes a cgroup where this process may, on a mount of its own if
// there is no other.
func makeGroup() (*cgroup.Group, func() error, error) {
	release := func() error { return nil }
	parents, err := cgroup.Parents()
	if errors.Is(err, cgroup.ErrNone) {
		var dir string
		var mountErr error
		if dir, release, mountErr = cgroup.MountPrivate(); mountErr != nil {
			return nil, nil, errors.Join(err, mountErr)
		}
		parents = []string{dir}
	} else if err != nil {
		return nil, nil, err
	}
	var faults []error
	for _, p := range parents {
		g, err := cgroup.Create(p)
		if err == nil {
			return g, release, nil
		}
		faults = append(faults, err)
	}
	return nil, nil, errors.Join(append(faults, release())...)
}

func checkControllers(c Check, g *cgroup.Group) Check {
	have, err := g.Controllers()
	if err != nil {
		return c.failed(err)
	}
	var missing []string
	for _, w := range wantControllers {
		if !slices.Contains(have, w) {
			missing = append(missing, w)
		}
	}
	switch {
	case len(missing) == 0:
		c.Result, c.Detail = OK, strings.Join(have, ", ")
	case len(missing) == len(wantControllers):
		c.Result, c.Detail = Failed, "none of "+strings.Join(wantControllers, ", ")+": not enabled, or held by cgroup v1"
	default:
		c.Result, c.Detail = Degraded, "missing: "+strings.Join(missing, ", ")
	}
	return c
}

func checkEgress(c Check, ch *child.Child) Check {
	refused, ok1 := ch.Errno[refusedAddr]
	allowed, ok2 := ch.Errno[allowedAddr]
	switch {
	case !ok1 || !ok2:
		return c.failed(errors.New("the child did not tell how its connects ended"))
	case refused != unix.EPERM:
		return c.failed(fmt.Errorf("a connect that the program refuses ended with %q", errnoName(refused)))
	case allowed == unix.EPERM:
		return c.failed(errors.New("a connect that the program allows was refused"))
	}
	c.Result, c.Detail = OK, "one connect was refused, another was not"
	return c
}

func errnoName(e unix.Errno) string {
	if e == 0 {
		return "success"
	}
	return e.Error()
}

// killGroup sees that the child is a member, and that the group's kill ends it.
func killGroup(ctx context.Context, g *cgroup.Group, ch *child.Child) error {
	member, err := g.Has(ch.Pid())
	if err == nil && !member {
		err = errors.New("the child is not in the cgroup that it was started in")
	}
	if err == nil {
		err = g.Kill()
	}
	if err != nil {
		ch.Stop()
		return err
	}
	killed, err := ch.Wait(ctx)
	if err == nil && !killed {
		err = errors.New("the child was not killed")
	}
	return err
}

// probeLandlock refuses writes on a thread of its own and tries one. scratch is
// a directory where a file can be made.
func probeLandlock(scratch string) []Check {
	c := Check{Name: "landlock", Tried: "refused writes on a thread, tried to open a file for writing there",
		Why: "it holds a tool to the files that policy allows, without privileges",
		Fix: "Use a kernel of 5.13 or later with landlock in the lsm= list."}
	abi, err := confine.LandlockABI()
	if err != nil {
		return []Check{c.failed(err)}
	}
	f, err := os.CreateTemp(scratch, ".probe-landlock-*")
	if err != nil {
		return []Check{c.failed(err)}
	}
	err = confine.TryLandlock(f.Name())
	if err := errors.Join(err, f.Close(), os.Remove(f.Name())); err != nil {
		return []Check{c.failed(err)}
	}
	c.Result, c.Detail = OK, fmt.Sprintf("the write was refused, ABI %d", abi)
	if abi < fullLandlock {
		c.Result, c.Detail = Degraded, fmt.Sprintf("the write was refused; ABI %d does not know %s", abi, missingLandlock(abi))
		c.Fix = "Use a kernel of 6.7 or later for file truncation and TCP rules."
	}
	return []Check{c}
}

// fullLandlock is the first ABI with TCP rules (kernel 6.7).
const fullLandlock = 4

func missingLandlock(abi int) string {
	if abi < 3 {
		return "truncation and TCP rules"
	}
	return "TCP rules"
}

// probeSeccomp refuses a system call on a thread of its own and makes it.
func probeSeccomp(context.Context) []Check {
	c := Check{Name: "seccomp", Tried: "refused getppid on a thread, called it there",
		Why: "it takes away the system calls that a tool has no use for",
		Fix: "Use a kernel with CONFIG_SECCOMP_FILTER."}
	if err := confine.TrySeccomp(); err != nil {
		return []Check{c.failed(err)}
	}
	c.Result, c.Detail = OK, "the call was refused"
	return []Check{c}
}

// Capabilities that setting up the kernel's means needs, by bit.
var capabilities = []struct {
	bit  uint
	name string
}{{unix.CAP_SYS_ADMIN, "SYS_ADMIN"}, {unix.CAP_NET_ADMIN, "NET_ADMIN"}, {unix.CAP_BPF, "BPF"}}

// maxStatus bounds what is read of /proc/self/status.
const maxStatus = 64 << 10

// probePrivileges reads who this process is. Neither root nor an ordinary user
// is wrong; what follows from it shows in the other checks.
func probePrivileges(context.Context) []Check {
	c := Check{Name: "privileges", Tried: "read the user, capabilities and no_new_privs of this process",
		Why: "they decide which of the above can be set up",
		Fix: "Run as root, or as a service with AmbientCapabilities=CAP_BPF CAP_NET_ADMIN CAP_SYS_ADMIN."}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return []Check{c.failed(err)}
	}
	eff, noNew, err := status(b[:min(len(b), maxStatus)])
	if err != nil {
		return []Check{c.failed(err)}
	}
	var have, missing []string
	for _, k := range capabilities {
		if eff&(1<<k.bit) != 0 {
			have = append(have, k.name)
		} else {
			missing = append(missing, k.name)
		}
	}
	c.Detail = fmt.Sprintf("uid %d, capabilities %s", os.Geteuid(), strings.Join(have, " "))
	if len(have) == 0 {
		c.Detail = fmt.Sprintf("uid %d, without capabilities", os.Geteuid())
	}
	if noNew {
		c.Detail += ", no_new_privs"
	}
	if c.Result = OK; len(missing) > 0 {
		c.Result = Degraded
	}
	return []Check{c}
}

// status finds CapEff and NoNewPrivs in the text of /proc/self/status.
func status(b []byte) (eff uint64, noNew bool, err error) {
	found := false
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		key, val, _ := strings.Cut(sc.Text(), ":")
		val = strings.TrimSpace(val)
		switch key {
		case "CapEff":
			if eff, err = strconv.ParseUint(val, 16, 64); err != nil {
				return 0, false, fmt.Errorf("capabilities in /proc/self/status: %w", err)
			}
			found = true
		case "NoNewPrivs":
			noNew = val == "1"
		}
	}
	if !found {
		return 0, false, errors.New("no capabilities in /proc/self/status")
	}
	return eff, noNew, nil
}
