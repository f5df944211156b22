// Command autonomy is the operator's program: it builds and checks policy
// bundles, locks and releases, talks to the daemons over HTTP, and reads a
// node's log from disk. Each command stands in a file of its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/run"
)

func main() { os.Exit(Main(os.Args[1:], os.Stdout, os.Stderr)) }

// Main runs the program and returns its exit code; tests call it in process.
func Main(args []string, stdout, stderr io.Writer) int {
	ctx, stop := run.Signals(context.Background())
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err != nil && !errors.Is(err, errSilent) {
		fmt.Fprintln(stderr, "autonomy:", err)
	}
	return run.Code(err)
}

// errSilent ends a command whose output already said what is wrong: wrap it in
// run.Exit to choose the code.
var errSilent = errors.New("already reported")

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "autonomy",
		Short: "Stand between an agent's intent and its effect",
		Long: `autonomy governs what AI agents do with tools: it builds and checks policies and
releases, asks nodes and the control plane, and reads a node's log.

Start with "autonomy demo": it runs everything on this machine in half a minute.`,
		Version:       run.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return run.Exitf(run.Usage, "%w\nSee '%s --help'", err, c.CommandPath())
	})
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	addIdentity(root)
	for _, newCommand := range commands() {
		root.AddCommand(newCommand())
	}
	return root
}

// commands lists the constructors, in the order of --help. Each returns a
// complete command; usage faults leave RunE through run.Exit(run.Usage, …).
func commands() []func() *cobra.Command {
	return []func() *cobra.Command{
		newDemo, newDaemon,
		newPolicy,
		newCall,
		newRelay,
		newDoctor,
		newWAL,
		newToken,
		newKey, newKeyring, newLock, newSign, newVerify, newOCI, newRelease,
		newFleet, newEvents,
	}
}

// usageArgs turns cobra's complaint about arguments into a usage error.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return run.Exitf(run.Usage, "%w\nUsage: %s", err, c.UseLine())
		}
		return nil
	}
}
