// Command walbench measures the write-ahead log beside other write-ahead logs and
// beside what the disk can do at all, in one run.
//
// Every leg is a process of its own on an empty directory (package leg): ours
// and the floors are this program again, the peers are bench/peers/walpeers,
// which links nothing of ours. Both run the same measuring code. One repetition
// puts every question to every side; the order of the sides is reversed from
// one repetition to the next, so that a slow moment of the machine does not
// always hit the same one. A warm-up is dropped. The figures are medians over
// the repetitions, ratios are taken within a repetition first.
//
// "Batched" peers get from the harness what ours has inside: everybody who
// arrives during a sync shares the next one.
//
// Bytes written are those of the device, other processes' included, so nothing
// else should write to it meanwhile; they are 0 on a file system without a device of its own (btrfs).
// What /proc/self/io counts is in a leg's result, too, and says little: it
// counts a page when it becomes dirty, and a large folio whole.
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

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/bench/internal/legs"
	"github.com/autonomyops/autonomy/bench/internal/results"
	"github.com/autonomyops/autonomy/bench/walbench/leg"
	"github.com/autonomyops/autonomy/wal"
)

type options struct {
	peers   string // program
	work    string // where logs are made: its file system is measured
	out     string // directory of the results
	version string
	quick   bool
	reps    int
	scale
	plan []block
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
		err = check(o.work)
	}
	if err == nil {
		err = run(ctx, o, os.Stdout)
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "walbench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (*options, error) {
	o := &options{scale: scale{segment: wal.DefaultSegmentBytes}}
	fs := flag.NewFlagSet("walbench", flag.ContinueOnError)
	fs.StringVar(&o.peers, "peers", "", "walpeers' `program`")
	fs.StringVar(&o.work, "work", "bin", "`directory` to make logs in: on a disk, not in memory")
	fs.StringVar(&o.out, "out", "bench/results", "`directory` for latest.json and latest.md")
	fs.StringVar(&o.version, "version", "devel", "our `version`, for the report")
	fs.BoolVar(&o.quick, "quick", false, "ask only what the targets are about, with small logs")
	fs.DurationVar(&o.measure, "duration", time.Second, "how long a durable leg is measured")
	fs.DurationVar(&o.warmup, "warmup", 200*time.Millisecond, "how long it runs before that")
	fs.IntVar(&o.reps, "reps", 5, "repetitions")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	o.plan = full()
	if o.quick {
		o.plan = quick()
	}
	switch {
	case fs.NArg() > 0:
		return nil, fmt.Errorf("unknown argument %q", fs.Arg(0))
	case o.peers == "":
		return nil, errors.New("-peers is needed: scripts/bench.sh gives it")
	case o.reps < 1 || o.measure <= 0 || o.warmup < 0:
		return nil, errors.New("-reps and -duration must be positive")
	}
	return o, nil
}

// minFree is what the disk must have before a run, and a leg may take.
const minFree = 3 << 30

// check says whether logs can be measured in dir.
func check(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("statfs %s: %w", dir, err)
	}
	if fs.Type == unix.TMPFS_MAGIC {
		return fmt.Errorf("%s is in memory, where nothing is durable: give -work a directory on a disk", dir)
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < minFree {
		return fmt.Errorf("%s has %d MiB free, want %d: give -work another directory", dir, free>>20, minFree>>20)
	}
	return nil
}

func run(ctx context.Context, o *options, stdout io.Writer) error {
	work, err := os.MkdirTemp(o.work, "walbench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	m, err := results.Describe(work, "wal of "+o.version)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s\n%d repetitions, durable legs of %v\n\n", m, o.reps, o.measure)

	r := &report{options: o, machine: m, legs: map[cell][]leg.Result{}}
	begin := time.Now()
	for rep := range o.reps {
		for i, b := range o.plan {
			for _, s := range legs.Order(b.sides, rep) {
				program := []string{o.peers}
				if _, ok := own[s.name]; ok {
					program = []string{self, legCommand}
				}
				res, err := measure(ctx, o, program, b, s, filepath.Join(work, "log"))
				if err != nil {
					return fmt.Errorf("%v, %v, repetition %d: %w", b, s, rep+1, err)
				}
				r.legs[cell{i, s}] = append(r.legs[cell{i, s}], res)
				fmt.Fprintf(stdout, "%3d  %-36v %-30v %s\n", rep+1, b, s, line(b, res))
			}
		}
	}
	if err := results.Write(o.out, area, r.rows(), r.page()); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "\n%s\nwritten to %s in %v\n", r.targets(), o.out, time.Since(begin).Round(time.Second))
	return nil
}

// measure runs the legs of one side in an empty directory, which it removes.
func measure(ctx context.Context, o *options, program []string, b block, s side, dir string) (res leg.Result, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for _, spec := range b.specs(s, dir, o.scale) {
		if res, err = legs.Run[leg.Result](ctx, program, spec, spec.Warmup+spec.Measure+legTimeout); err != nil {
			return res, err
		}
	}
	return res, nil
}

// legTimeout is how long a leg may take beyond what it measures: filling 1 GiB
// takes a slow disk some time.
const legTimeout = 2 * time.Minute
