// Package leg measures one policy evaluator in one process: it is the same code
// for ours and for the peers, which live in another module (there its files are
// symbolic links to these), so that all are asked the same in the same way.
//
// The life of a leg: the harness starts the program with a Spec as JSON in its
// only argument; Main opens the policy in Spec.Dir, checks that it decides every
// sample call as the call's name says, measures, and prints a Result as JSON. A
// process measures once: its heap and its memory are of that leg only.
//
// Spec.Dir holds policy.rego, data.json, policy.cedar, bundle.tar.gz and inputs/,
// whose files are named allow_… or deny_….
//
// Units: bytes; durations are nanoseconds. It imports the standard library only.
package leg

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A Decider answers calls one after the other: the bytes of a request in, the
// bytes of a decision appended to dst, a JSON object with allow and reasons. It
// keeps neither. One goroutine uses it.
type Decider func(dst, input []byte) ([]byte, error)

// A Policy is ready to be asked.
type Policy interface {
	// Decider is one for the goroutine that asks.
	Decider() Decider
}

// Swapping is a Policy that can be replaced while it is asked.
type Swapping interface {
	Policy
	// Swap puts the other of two policies in force.
	Swap() error
}

// Open reads the policy in dir and makes it ready.
type Open func(dir string) (Policy, error)

// The modes of a leg.
const (
	Eval = "eval" // Goroutines ask as fast as they can
	Load = "load" // open once
	Swap = "swap" // one goroutine asks; in every second window the policy is swapped all the time
)

// A Spec says what a leg does.
type Spec struct {
	Side       string        `json:"side"`
	Mode       string        `json:"mode"`
	Dir        string        `json:"dir"`
	Goroutines int           `json:"goroutines"`
	Warmup     time.Duration `json:"warmup"`
	Measure    time.Duration `json:"measure"`
}

// A Result is what a leg found. Fields that its mode does not measure are 0.
type Result struct {
	Decisions int64         `json:"decisions"`
	Took      time.Duration `json:"took"`
	Allocs    float64       `json:"allocs"` // per decision, of the whole process
	Heap      float64       `json:"heap"`   // bytes allocated per decision

	Open time.Duration `json:"open"` // Load: from files to the first decision
	Peak int64         `json:"peak"` // Load: growth of resident memory, as the kernel sees it right after
	RSS  int64         `json:"rss"`  // Load: what stays of it when garbage was given back, as a node does
	Live int64         `json:"live"` // Load: heap in use then

	P50     time.Duration `json:"p50"` // Swap: of a decision in the windows without swaps
	P99     time.Duration `json:"p99"`
	SwapP50 time.Duration `json:"swap_p50"` // in the windows with swaps
	SwapP99 time.Duration `json:"swap_p99"`
	Swaps   int64         `json:"swaps"`
}

// Main is a program that measures one leg: opens maps sides to policies.
func Main(args []string, opens map[string]Open) int {
	res, err := run(args, opens)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(res)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func run(args []string, opens map[string]Open) (Result, error) {
	if len(args) != 1 {
		return Result{}, errors.New("want one argument, the leg as JSON: policybench starts this program")
	}
	var s Spec
	if err := json.Unmarshal([]byte(args[0]), &s); err != nil {
		return Result{}, fmt.Errorf("read the leg: %w", err)
	}
	open, ok := opens[s.Side]
	if !ok {
		return Result{}, fmt.Errorf("there is no side %q", s.Side)
	}
	return Run(s, open)
}

// Run measures one leg in this process.
func Run(s Spec, open Open) (Result, error) {
	calls, err := readCalls(s.Dir)
	if err != nil {
		return Result{}, err
	}
	var res Result
	switch s.Mode {
	case Eval:
		res, err = eval(s, open, calls)
	case Load:
		res, err = load(s, open, calls)
	case Swap:
		res, err = swap(s, open, calls)
	default:
		err = fmt.Errorf("there is no mode %q", s.Mode)
	}
	if err != nil {
		return Result{}, fmt.Errorf("%s, %s: %w", s.Side, s.Mode, err)
	}
	return res, nil
}

// call is a sample call.
type call struct {
	name  string
	input []byte
	allow bool
}

func readCalls(dir string) ([]call, error) {
	names, err := filepath.Glob(filepath.Join(dir, "inputs", "*.json"))
	if err != nil {
		return nil, err
	}
	var out []call
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		base := filepath.Base(name)
		out = append(out, call{base, data, strings.HasPrefix(base, "allow_")})
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no sample calls in %s", dir)
	}
	return out, nil
}

// check asks about every call and compares the verdict.
func check(p Policy, calls []call) error {
	decide := p.Decider()
	for _, c := range calls {
		answer, err := decide(nil, c.input)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		var d struct {
			Allow   *bool             `json:"allow"`
			Reasons []json.RawMessage `json:"reasons"`
		}
		if err := json.Unmarshal(answer, &d); err != nil || d.Allow == nil {
			return fmt.Errorf("%s: %q is no decision: %w", c.name, answer, err)
		}
		if *d.Allow != c.allow {
			return fmt.Errorf("%s: the answer is %s", c.name, answer)
		}
	}
	return nil
}

// batch is how many decisions are made between two looks at the clock.
const batch = 32

func eval(s Spec, open Open, calls []call) (Result, error) {
	if s.Goroutines < 1 {
		return Result{}, fmt.Errorf("%d goroutines, want at least 1", s.Goroutines)
	}
	p, err := open(s.Dir)
	if err != nil {
		return Result{}, err
	}
	if err := check(p, calls); err != nil {
		return Result{}, err
	}
	// Each goroutine asks with the same state in warm-up and measurement.
	deciders := make([]Decider, s.Goroutines)
	answers := make([][]byte, s.Goroutines)
	for i := range deciders {
		deciders[i], answers[i] = p.Decider(), make([]byte, 0, 4096)
	}
	round := func(d time.Duration) (int64, error) {
		var wg sync.WaitGroup
		var failed atomic.Pointer[error]
		var total atomic.Int64
		until := time.Now().Add(d)
		for g, decide := range deciders {
			wg.Go(func() {
				n, at, dst := int64(0), g, answers[g]
				for time.Now().Before(until) {
					for range batch {
						var err error
						if dst, err = decide(dst[:0], calls[at%len(calls)].input); err != nil {
							why := err // err itself would be allocated in every turn
							failed.Store(&why)
							return
						}
						at++
					}
					n += batch
				}
				total.Add(n)
			})
		}
		wg.Wait()
		if err := failed.Load(); err != nil {
			return 0, *err
		}
		return total.Load(), nil
	}
	if _, err := round(s.Warmup); err != nil {
		return Result{}, err
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	begin := time.Now()
	n, err := round(s.Measure)
	if err != nil {
		return Result{}, err
	}
	took := time.Since(begin)
	runtime.ReadMemStats(&after)
	if n == 0 {
		return Result{}, errors.New("nothing was decided")
	}
	return Result{Decisions: n, Took: took,
		Allocs: float64(after.Mallocs-before.Mallocs) / float64(n),
		Heap:   float64(after.TotalAlloc-before.TotalAlloc) / float64(n)}, nil
}

func load(s Spec, open Open, calls []call) (Result, error) {
	debug.FreeOSMemory()
	before, err := resident()
	if err != nil {
		return Result{}, err
	}
	begin := time.Now()
	p, err := open(s.Dir)
	if err != nil {
		return Result{}, err
	}
	decide := p.Decider()
	if _, err := decide(nil, calls[0].input); err != nil {
		return Result{}, err
	}
	res := Result{Open: time.Since(begin)}
	grown, err := resident()
	if err != nil {
		return Result{}, err
	}
	var mem runtime.MemStats
	debug.FreeOSMemory()
	kept, err := resident()
	if err != nil {
		return Result{}, err
	}
	runtime.ReadMemStats(&mem)
	res.Peak, res.RSS, res.Live = grown-before, kept-before, int64(mem.HeapAlloc)
	return res, check(p, calls)
}

// window is how long the policy is swapped, and then not.
const window = 100 * time.Millisecond

// pause is between two swaps: dozens a second are more than a node does in a
// month, and few enough that the disk is not what is measured.
const pause = 20 * time.Millisecond

func swap(s Spec, open Open, calls []call) (Result, error) {
	policy, err := open(s.Dir)
	if err != nil {
		return Result{}, err
	}
	p, ok := policy.(Swapping)
	if !ok {
		return Result{}, errors.New("it cannot be swapped")
	}
	if err := check(p, calls); err != nil {
		return Result{}, err
	}
	decide, dst := p.Decider(), make([]byte, 0, 4096)
	var swapping, stop atomic.Bool
	var swaps atomic.Int64
	failed := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			if swapping.Load() {
				if err := p.Swap(); err != nil {
					failed <- err
					return
				}
				swaps.Add(1)
			}
			time.Sleep(pause)
		}
	})
	kept := [2][]time.Duration{make([]time.Duration, 0, 1<<20), make([]time.Duration, 0, 1<<20)}
	begin := time.Now()
	warm := begin.Add(s.Warmup)
	end := warm.Add(s.Measure)
	at := 0
	for now := begin; now.Before(end) && err == nil; {
		on := 0
		if now.Sub(begin)/window%2 == 1 {
			on = 1
		}
		swapping.Store(on == 1)
		for range batch {
			if dst, err = decide(dst[:0], calls[at%len(calls)].input); err != nil {
				break
			}
			at++
			next := time.Now()
			if now.After(warm) && len(kept[on]) < cap(kept[on]) {
				kept[on] = append(kept[on], next.Sub(now))
			}
			now = next
		}
	}
	stop.Store(true)
	wg.Wait()
	select {
	case swapErr := <-failed:
		err = errors.Join(err, swapErr)
	default:
	}
	if err != nil {
		return Result{}, err
	}
	if len(kept[0]) == 0 || len(kept[1]) == 0 || swaps.Load() == 0 {
		return Result{}, errors.New("the leg is too short to swap in")
	}
	for i := range kept {
		slices.Sort(kept[i])
	}
	return Result{Decisions: int64(at), Took: time.Since(begin), Swaps: swaps.Load(),
		P50: percentile(kept[0], 50), P99: percentile(kept[0], 99), SwapP50: percentile(kept[1], 50), SwapP99: percentile(kept[1], 99)}, nil
}

// percentile is the smallest value that p percent of sorted do not exceed.
func percentile(sorted []time.Duration, p int) time.Duration {
	i := (len(sorted)*p + 99) / 100
	return sorted[max(i, 1)-1]
}

// resident is the memory of this process in bytes.
func resident() (int64, error) {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("/proc/self/status has no VmRSS")
}
