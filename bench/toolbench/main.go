// Command toolbench measures POST /v1/tool of a real node beside `opa run -s`
// with the same policy bundle and beside a bare fasthttp server, in one run.
//
// What is compared is not the same work. The node decodes strictly, evaluates,
// writes the decision to its log, waits until it is on disk (strict) or not
// (batched), runs the tool (tool.echo), writes the action, answers; a call that
// is denied ends with the decision. OPA decodes, evaluates, writes its decision
// log to the console, here a file that nobody syncs, and answers; it runs
// nothing. The fasthttp server sends the body back: no HTTP server written with
// that library can be faster here.
//
// One repetition starts every server, on an empty state directory, and measures
// each of them with each call at each number of connections; the order of the
// sides is reversed from one repetition to the next, so that a slow moment of
// the machine does not always hit the same one. Every leg drops a warm-up. The
// servers that are not being measured are idle. The figures are medians over the
// repetitions, ratios are taken within a repetition first.
//
// The load generator runs on the same cores as the servers and takes its share
// of them: calls/s are those of this machine with this generator. CPU per call,
// read from /proc, is the server's own.
//
// Units: durations are nanoseconds inside, microseconds in the report; CPU has
// the resolution of the kernel's clock tick, 10 ms in a leg.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/autonomyops/autonomy/bench/internal/results"
)

type options struct {
	node, opa, bundle, tools string // paths
	work                     string // where state directories are made: its file system is measured
	out                      string // directory of the results
	duration, warmup         time.Duration
	reps                     int
	conns                    []int
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == ceilingCommand {
		if err := serveCeiling(); err != nil {
			fmt.Fprintln(os.Stderr, "toolbench:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "toolbench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("toolbench", flag.ContinueOnError)
	fs.StringVar(&o.node, "node", "bin/autonomy-node", "the node's `program`")
	fs.StringVar(&o.opa, "opa", "", "OPA's `program`")
	fs.StringVar(&o.bundle, "bundle", "", "policy bundle for both, a `file`")
	fs.StringVar(&o.tools, "tools", "examples/quickstart/tools.yaml", "the node's tools, a `file`")
	fs.StringVar(&o.work, "work", "bin", "`directory` to make state directories in: on a disk, not in memory")
	fs.StringVar(&o.out, "out", "bench/results", "`directory` for latest.json and latest.md")
	fs.DurationVar(&o.duration, "duration", 2*time.Second, "how long a leg is measured")
	fs.DurationVar(&o.warmup, "warmup", 300*time.Millisecond, "how long a leg runs before that")
	fs.IntVar(&o.reps, "reps", 7, "repetitions")
	conns := fs.String("conns", "1,8,64,256", "numbers of connections")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	for c := range strings.SplitSeq(*conns, ",") {
		n, err := strconv.Atoi(c)
		if err != nil || n < 1 || n > 4096 {
			return nil, fmt.Errorf("-conns %s: want numbers from 1 to 4096, separated by commas", *conns)
		}
		o.conns = append(o.conns, n)
	}
	switch {
	case fs.NArg() > 0:
		return nil, fmt.Errorf("unknown argument %q", fs.Arg(0))
	case o.opa == "" || o.bundle == "":
		return nil, errors.New("-opa and -bundle are needed: scripts/bench.sh gives them")
	case o.reps < 1 || o.duration <= 0 || o.warmup < 0:
		return nil, errors.New("-reps and -duration must be positive")
	}
	return o, nil
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp(o.work, "toolbench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	version, err := exec.CommandContext(ctx, o.node, "--version").Output()
	if err != nil {
		return fmt.Errorf("%s --version: %w (run: make build)", o.node, err)
	}
	m, err := results.Describe(work, strings.TrimSpace(string(version)))
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s\n%d repetitions of %v at %v connections\n\n", m, o.reps, o.duration, o.conns)

	sides, err := newSides(o)
	if err != nil {
		return err
	}
	r := report{options: o, machine: m}
	if info, err := os.Stat(o.node); err == nil {
		r.binary = float64(info.Size()) / (1 << 20)
	}
	if r.starts, err = startTimes(ctx, sides[0], filepath.Join(work, "starts"), max(3, o.reps)); err != nil {
		return fmt.Errorf("start times: %w", err)
	}
	begin := time.Now()
	for rep := range o.reps {
		sync, err := diskSync(work)
		if err != nil {
			return err
		}
		r.syncs = append(r.syncs, sync)
		if err := repetition(ctx, o, sides, filepath.Join(work, strconv.Itoa(rep)), rep, &r, stdout); err != nil {
			return err
		}
	}
	if err := r.write(); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "\n%s\n%s\nwritten to %s in %v\n", r.targets(), r.table(), o.out, time.Since(begin).Round(time.Second))
	return nil
}

// repetition starts every server, measures every leg and stops them.
func repetition(ctx context.Context, o *options, sides []side, dir string, rep int, r *report, stdout io.Writer) error {
	defer os.RemoveAll(dir)
	servers := map[string]*server{}
	for i, s := range sides {
		own := filepath.Join(dir, strconv.Itoa(i))
		if err := os.MkdirAll(own, 0o700); err != nil {
			return err
		}
		srv, err := s.start(ctx, own)
		if err != nil {
			return fmt.Errorf("%s, repetition %d: %w", s.name, rep+1, err)
		}
		defer srv.stop()
		servers[s.name] = srv
	}
	order := slices.Clone(sides)
	if rep%2 == 1 {
		slices.Reverse(order)
	}
	for _, conns := range o.conns {
		for _, c := range calls {
			for _, s := range order {
				srv := servers[s.name]
				l, err := load(ctx, srv, s.request(srv.addr, c), c.status[s.name], c.expect[s.name], conns, o.warmup, o.duration)
				if err != nil {
					return fmt.Errorf("%s, %s, %d connections, repetition %d: %w", s.name, c.name, conns, rep+1, err)
				}
				r.add(s.name, c.name, conns, l)
				fmt.Fprintf(stdout, "%3d  %-17s %s %4d conns  %9.0f calls/s  p50 %8.1f µs  p99 %9.1f µs  %7.1f µs CPU/call\n",
					rep+1, s.name, c.name, conns, l.rate, l.p50, l.p99, l.cpu)
			}
		}
	}
	return nil
}
