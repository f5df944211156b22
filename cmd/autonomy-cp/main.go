// Command autonomy-cp is the control plane's program: flags, then cp.Run.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/pflag"

	"github.com/autonomyops/autonomy/cp"
	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/run"
)

func main() {
	ctx, stop := run.Signals(context.Background())
	code := Main(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Main runs the program until ctx ends and returns its exit code.
func Main(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	c := cp.Default()
	fs := pflag.NewFlagSet("autonomy-cp", pflag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.SortFlags = false
	fs.Usage = func() {
		fmt.Fprintf(stdout, "autonomy-cp keeps what nodes report and hands out the releases they should run.\n\nUsage: autonomy-cp [flags]\n\n%s\nEvery flag is also a setting of --config FILE and of the environment: %s\n",
			fs.FlagUsagesWrapped(100), conf.EnvName(cp.EnvPrefix, "state-dir"))
	}
	c.Bind(fs)
	version := fs.Bool("version", false, "print the version and exit")
	_, err := conf.Load(fs, args, cp.EnvPrefix, getenv, stdout)
	switch {
	case errors.Is(err, pflag.ErrHelp), errors.Is(err, conf.ErrPrinted):
		return run.OK
	case err != nil:
		fmt.Fprintf(stderr, "autonomy-cp: %v\nSee 'autonomy-cp --help'\n", err)
		return run.Usage
	case *version:
		fmt.Fprintln(stdout, "autonomy-cp", run.Version)
		return run.OK
	}
	if err := cp.Run(ctx, c, stderr, run.Logger(stderr)); err != nil {
		fmt.Fprintln(stderr, "autonomy-cp:", err)
		return run.Code(err)
	}
	return run.OK
}
