package node

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/autonomyops/autonomy/assurance/sandbox"
)

// runBase holds the sandboxes' run directories when the node is root: mount
// points and pins, which are gone after a restart of the machine and so do not
// belong into the state directory.
const runBase = "/run/autonomy/sandbox"

// openSandbox finds out what can hold programs here. A layer that is missing is
// no error: it is reported, and a limit that needs it is refused.
func (n *node) openSandbox(ctx context.Context) error {
	state, err := filepath.Abs(n.cfg.StateDir)
	if err != nil {
		return err
	}
	base := runBase
	if os.Geteuid() != 0 {
		base = filepath.Join(state, "run")
	} else {
		sandbox.Sweep(ctx, base, n.log)
	}
	dir, err := sandbox.MakeRunDir(base, state)
	if err != nil {
		n.log.Warn("programs run without views, cgroups and egress programs", "err", err)
		dir = ""
	}
	hidden := []string{state, "/run/autonomy", "/etc/autonomy", "/var/lib/autonomy"}
	for _, addr := range n.cfg.Listen {
		if path, ok := strings.CutPrefix(addr, "unix:"); ok {
			hidden = append(hidden, path)
		}
	}
	n.sandbox, err = sandbox.Open(ctx, sandbox.Options{RunDir: dir, Hidden: hidden, Own: n.ownAddrs, MaxCalls: n.cfg.MaxInFlight, Logger: n.log})
	if err != nil {
		return err
	}
	for _, l := range n.sandbox.Layers() {
		if !l.On {
			n.log.Info("sandbox layer is off", "layer", l.Name, "why", l.Detail)
		}
	}
	return nil
}

// ownAddrs are the node's listeners, which no program is let to.
func (n *node) ownAddrs() []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range n.addrs {
		if ap, err := netip.ParseAddrPort(a); err == nil {
			out = append(out, ap)
		}
	}
	return out
}
