package assurance

import (
	"context"
	"errors"
	"os"

	"github.com/autonomyops/autonomy/assurance/sandbox"
)

// probeNamespaces starts processes in namespaces of their own and in a view of
// the file system, as programs are started. scratch is a directory where one can
// be made.
func probeNamespaces(ctx context.Context, scratch string) []Check {
	c := Check{Name: "namespaces", Tried: "started a process in pid, ipc, uts, net and mount namespaces, with a root of its own",
		Why: "they keep the host's processes, network and files out of a tool's sight",
		Fix: "Run as root, or let everybody make user namespaces (user.max_user_namespaces, kernel.unprivileged_userns_clone)."}
	dir, err := os.MkdirTemp(scratch, ".probe-sandbox-*")
	if err != nil {
		return []Check{c.failed(err)}
	}
	defer os.RemoveAll(dir)
	s, err := sandbox.Open(ctx, sandbox.Options{RunDir: dir, Off: []string{
		sandbox.LayerCgroup, sandbox.LayerLimits, sandbox.LayerUser, sandbox.LayerEgress, sandbox.LayerLandlock, sandbox.LayerSeccomp}})
	if err != nil {
		return []Check{c.failed(err)}
	}
	layers := map[string]sandbox.Layer{}
	for _, l := range s.Layers() {
		layers[l.Name] = l
	}
	ns, view := layers[sandbox.LayerNamespaces], layers[sandbox.LayerView]
	switch err := s.Close(); {
	case err != nil:
		return []Check{c.failed(err)}
	case !ns.On:
		return []Check{c.failed(errors.New(ns.Detail))}
	case !view.On:
		c.Result, c.Detail = Degraded, sentence(ns.Detail+"; no root of its own: "+view.Detail)
	default:
		c.Result, c.Detail = OK, ns.Detail+", mnt; "+view.Detail
	}
	return []Check{c}
}
