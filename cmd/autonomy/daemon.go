package main

import (
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"net/http"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/autonomyops/autonomy/cp"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/node"
	"github.com/autonomyops/autonomy/relay"
)

// newDaemon is how "autonomy demo" starts the daemons when only this one
// program is installed: the same code as in autonomy-node, -cp and -relay.
func newDaemon() *cobra.Command {
	return &cobra.Command{
		Use:                "daemon node|cp|relay|registry [flags]",
		Short:              "Run a daemon from this program (for the demo)",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return run.Exitf(run.Usage, "name a daemon: node, cp, relay or registry")
			}
			var d run.Daemon
			switch args[0] {
			case "node":
				d = node.Daemon()
			case "cp":
				d = cp.Daemon()
			case "relay":
				d = relay.Daemon()
			case "registry":
				d = registryDaemon()
			default:
				return run.Exitf(run.Usage, "no daemon %q: want node, cp, relay or registry", args[0])
			}
			if code := d.Main(args[1:], c.OutOrStdout(), c.ErrOrStderr()); code != run.OK {
				return run.Exit(code, errSilent)
			}
			return nil
		},
	}
}

// registryDaemon is a small OCI registry in memory, so that the demo needs no
// other program. It is no product: no limits, no authentication, loopback only.
func registryDaemon() run.Daemon {
	var listen, ready string
	return run.Daemon{
		Name: "autonomy daemon registry", Short: "an OCI registry in memory, for the demo", EnvPrefix: "AUTONOMY_DEMO_REGISTRY_",
		Bind: func(fs *pflag.FlagSet) {
			fs.StringVar(&listen, "listen", "127.0.0.1:0", "serve on `ADDR`")
			fs.StringVar(&ready, "ready-file", "", "write the address to `FILE` when ready")
		},
		Validate: func() error {
			if !run.Loopback(listen) {
				return run.Exitf(run.Usage, "--listen %s: the demo's registry serves loopback only", listen)
			}
			return nil
		},
		Run: func(ctx context.Context, _ *slog.Logger, stderr io.Writer) error {
			ln, err := run.Listen(listen, 0o600)
			if err != nil {
				return err
			}
			srv := &http.Server{
				Handler:           registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))),
				ReadHeaderTimeout: 10 * time.Second,
			}
			stop := context.AfterFunc(ctx, func() { srv.Close() })
			defer stop()
			if err := run.Ready(stderr, ready, run.Addr(ln)); err != nil {
				return err
			}
			if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		},
	}
}
