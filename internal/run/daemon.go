package run

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"

	"github.com/spf13/pflag"

	"github.com/autonomyops/autonomy/internal/conf"
)

// Daemon is what a program's main hands over: its flags, and what to do with
// them.
type Daemon struct {
	Name      string // autonomy-node
	Short     string // one line for --help
	EnvPrefix string // AUTONOMY_NODE_
	Bind      func(*pflag.FlagSet)
	Validate  func() error
	// Loaded, when not nil, is told the configuration file ("" for none) and how
	// to read all settings anew, into flags that bind defines: for a reload.
	Loaded func(file string, again func(bind func(*pflag.FlagSet)) error)
	Run    func(context.Context, *slog.Logger, io.Writer) error
}

// Main parses args, runs the daemon until SIGTERM or SIGINT, and returns the
// exit code.
func (d Daemon) Main(args []string, stdout, stderr io.Writer) int {
	fs := pflag.NewFlagSet(d.Name, pflag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.SortFlags = false
	fs.Usage = func() {
		fmt.Fprintf(stdout, "%s: %s\n\nUsage:\n  %s [flags]\n\nFlags (each also as %sNAME in the environment and name in the --config file):\n%s",
			d.Name, d.Short, d.Name, d.EnvPrefix, fs.FlagUsagesWrapped(80))
	}
	d.Bind(fs)
	version := fs.Bool("version", false, "print the version and exit")
	settings, err := conf.Load(fs, args, d.EnvPrefix, os.Getenv, stdout)
	switch {
	case errors.Is(err, pflag.ErrHelp), errors.Is(err, conf.ErrPrinted):
		return OK
	case err != nil:
		fmt.Fprintf(stderr, "%s: %v\nSee '%s --help'\n", d.Name, err, d.Name)
		return Usage
	case *version:
		fmt.Fprintf(stdout, "%s %s\n", d.Name, Version)
		return OK
	}
	if err := d.Validate(); err != nil {
		fmt.Fprintf(stderr, "%s: %v\nSee '%s --help'\n", d.Name, err, d.Name)
		return Code(err)
	}
	if d.Loaded != nil {
		d.Loaded(settings.File(), func(bind func(*pflag.FlagSet)) error {
			fs := pflag.NewFlagSet(d.Name, pflag.ContinueOnError)
			fs.SetOutput(io.Discard)
			fs.Usage = func() {}
			bind(fs)
			fs.Bool("version", false, "")
			_, err := conf.Load(fs, args, d.EnvPrefix, os.Getenv, io.Discard)
			return err
		})
	}
	ctx, stop := Signals(context.Background())
	defer stop()
	var alive sync.WaitGroup
	defer alive.Wait()
	beat, still := context.WithCancel(context.Background()) // also while it stops
	defer still()
	alive.Go(func() { watchdog(beat) })
	if err := d.Run(ctx, Logger(stderr), stderr); err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", d.Name, err)
		return Code(err)
	}
	return OK
}
