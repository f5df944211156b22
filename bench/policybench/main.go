// Command policybench measures the policy evaluator beside others in one run.
//
// Every leg is a process of its own (package leg): ours are this program again,
// the peers are bench/peers/policypeers, which links nothing of ours. Both run
// the same measuring code on the same files, and a leg first checks that it
// decides every sample call as it must. One repetition puts every question to
// every side; the order of the sides is reversed from one repetition to the next,
// so that a slow moment of the machine does not always hit the same one. The
// figures are medians over the repetitions, ratios are taken within a repetition
// first.
//
// A decision is measured from the bytes of a request to the bytes of an answer,
// over eight calls in turn, half of them denied.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/autonomyops/autonomy/bench/internal/legs"
	"github.com/autonomyops/autonomy/bench/internal/results"
	"github.com/autonomyops/autonomy/bench/policybench/leg"
)

type options struct {
	peers           string // program
	work            string // where the policies are written
	out             string // directory of the results
	version         string
	reps            int
	warmup, measure time.Duration
	plan            []block
	conformance     *conformance // nil: not asked
}

// legCommand makes this program run one leg.
const legCommand = "leg"

func main() {
	if len(os.Args) > 1 && os.Args[1] == legCommand {
		os.Exit(leg.Main(os.Args[2:], own))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	o, err := parse(os.Args[1:])
	if err == nil {
		err = run(ctx, o, os.Stdout)
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "policybench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (*options, error) {
	o := &options{plan: plan()}
	fs := flag.NewFlagSet("policybench", flag.ContinueOnError)
	fs.StringVar(&o.peers, "peers", "", "policypeers' `program`")
	fs.StringVar(&o.work, "work", os.TempDir(), "`directory` to write the policies to")
	fs.StringVar(&o.out, "out", "bench/results", "`directory` for latest.json and latest.md")
	fs.StringVar(&o.version, "version", "devel", "our `version`, for the report")
	fs.DurationVar(&o.measure, "duration", time.Second, "how long a leg is measured; one that swaps six times as long")
	fs.DurationVar(&o.warmup, "warmup", 300*time.Millisecond, "how long it runs before that")
	fs.IntVar(&o.reps, "reps", 5, "repetitions")
	cases := fs.String("conformance", "", "`file` with what the conformance test has printed; without it, that target has no row")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	switch {
	case fs.NArg() > 0:
		return nil, fmt.Errorf("unknown argument %q", fs.Arg(0))
	case o.peers == "":
		return nil, errors.New("-peers is needed: scripts/bench.sh gives it")
	case o.reps < 1 || o.measure <= 0 || o.warmup < 0:
		return nil, errors.New("-reps and -duration must be positive")
	}
	if *cases == "" {
		return o, nil
	}
	var err error
	o.conformance, err = readConformance(*cases)
	return o, err
}

func run(ctx context.Context, o *options, stdout io.Writer) error {
	work, err := os.MkdirTemp(o.work, "policybench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	m, err := results.Describe(work, "prepared of "+o.version)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s\n%d repetitions of %v\n\n", m, o.reps, o.measure)

	r := &report{options: o, machine: m, legs: map[cell][]leg.Result{}}
	if r.data, err = writeCases(work, o.plan); err != nil {
		return err
	}
	begin := time.Now()
	for rep := range o.reps {
		for i, b := range o.plan {
			for _, s := range legs.Order(b.sides, rep) {
				program := []string{o.peers}
				if _, ok := own[s]; ok {
					program = []string{self, legCommand}
				}
				spec := b.spec(s, work, o)
				res, err := legs.Run[leg.Result](ctx, program, spec, spec.Warmup+spec.Measure+legTimeout)
				if err != nil {
					return fmt.Errorf("%v, %s, repetition %d: %w", b, s, rep+1, err)
				}
				r.legs[cell{i, s}] = append(r.legs[cell{i, s}], res)
				fmt.Fprintf(stdout, "%3d  %-42v %-36s %s\n", rep+1, b, s, line(b, res))
			}
		}
	}
	if err := results.Write(o.out, area, r.rows(), r.page()); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "\n%s\nwritten to %s in %v\n", r.targets(), o.out, time.Since(begin).Round(time.Second))
	return nil
}

// writeCases writes the policies that the plan asks for and returns the size of
// their data in bytes.
func writeCases(work string, plan []block) (map[string]int64, error) {
	sizes := map[string]int64{}
	for _, b := range plan {
		if _, ok := sizes[b.policy]; ok {
			continue
		}
		dir := filepath.Join(work, b.policy)
		if err := cases[b.policy]().write(dir); err != nil {
			return nil, fmt.Errorf("write the policy %s: %w", b.policy, err)
		}
		info, err := os.Stat(filepath.Join(dir, "data.json"))
		if err != nil {
			return nil, err
		}
		sizes[b.policy] = info.Size()
	}
	return sizes, nil
}

// legTimeout is how long a leg may take beyond what it measures: a slow machine
// compiles a megabyte of rules for a while.
const legTimeout = 2 * time.Minute
