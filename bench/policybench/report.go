package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/bench/internal/results"
	"github.com/autonomyops/autonomy/bench/policybench/leg"
)

// area is this program's part of the results.
const area = "policy"

// A report holds the results of every side in every block, by repetition.
type report struct {
	options *options
	machine results.Machine
	data    map[string]int64 // bytes, by policy
	legs    map[cell][]leg.Result
}

type cell struct {
	block int // index in the plan
	side  string
}

// A metric is one figure of a leg.
type metric struct {
	name, unit string
	of         func(leg.Result) float64
}

var (
	mRate    = metric{"throughput", "decisions/s", func(r leg.Result) float64 { return float64(r.Decisions) / r.Took.Seconds() }}
	mTime    = metric{"time", "µs/decision", func(r leg.Result) float64 { return micros(r.Took) / float64(r.Decisions) }}
	mAllocs  = metric{"allocations", "per decision", perOwn}
	mHeap    = metric{"allocated", "B/decision", func(r leg.Result) float64 { return r.Heap }}
	mLoad    = metric{"to the first decision", "s", func(r leg.Result) float64 { return r.Open.Seconds() }}
	mRSS     = metric{"growth of RSS", "MiB", func(r leg.Result) float64 { return float64(r.RSS) / (1 << 20) }}
	mPeak    = metric{"growth of RSS right after", "MiB", func(r leg.Result) float64 { return float64(r.Peak) / (1 << 20) }}
	mLive    = metric{"heap in use after a collection", "MiB", func(r leg.Result) float64 { return float64(r.Live) / (1 << 20) }}
	mP50     = metric{"p50", "µs", func(r leg.Result) float64 { return micros(r.P50) }}
	mP99     = metric{"p99", "µs", func(r leg.Result) float64 { return micros(r.P99) }}
	mSwapP50 = metric{"p50 while swapping", "µs", func(r leg.Result) float64 { return micros(r.SwapP50) }}
	mSwapP99 = metric{"p99 while swapping", "µs", func(r leg.Result) float64 { return micros(r.SwapP99) }}
	mSwaps   = metric{"swaps", "", func(r leg.Result) float64 { return float64(r.Swaps) }}
)

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// perOwn is allocations per decision. Below 1 in 20 they are the runtime's or the
// harness', not a decision's.
func perOwn(r leg.Result) float64 {
	if r.Allocs < 0.05 {
		return 0
	}
	return r.Allocs
}

// metrics are what is compared side by side in a block.
func (b block) metrics() []metric {
	switch b.mode {
	case leg.Load:
		return []metric{mLoad, mRSS, mPeak, mLive}
	case leg.Swap:
		return []metric{mP50, mSwapP50, mP99, mSwapP99, mSwaps}
	}
	return []metric{mTime, mRate, mAllocs, mHeap}
}

func (r *report) values(b int, side string, m metric) []float64 {
	legs := r.legs[cell{b, side}]
	out := make([]float64, len(legs))
	for i, l := range legs {
		out[i] = m.of(l)
	}
	return out
}

// rows are every peer's figures next to ours, and then the targets.
func (r *report) rows() (out []results.Row) {
	for i, b := range r.options.plan {
		for _, m := range b.metrics() {
			for _, s := range b.sides[1:] {
				out = append(out, results.NewRow(area, b.String()+": "+m.name, m.unit, s, r.values(i, b.sides[0], m), r.values(i, s, m)))
			}
		}
	}
	return append(out, r.targetRows()...)
}

// targetRows are what the project has set out to reach.
func (r *report) targetRows() (out []results.Row) {
	add := func(rows ...results.Row) { out = append(out, rows...) }
	if c := r.options.conformance; c != nil {
		add(results.Fixed(area, "target: OPA's conformance cases: failed", "cases", "none", 0, []float64{c.failed}).AtMost(0),
			results.Fixed(area, "target: OPA's conformance cases: passed compiled", "cases", "all", c.cases, []float64{c.passed}).AtLeast(0.97))
	}
	alone := map[string]int{} // the block of one goroutine, by policy
	for i, b := range r.options.plan {
		name := func(what string) string { return "target: " + b.String() + ": " + what }
		ours := func(m metric) []float64 { return r.values(i, b.sides[0], m) }
		against := func(what string, m metric, side, peer string) results.Row {
			return results.NewRow(area, name(what), m.unit, peer, r.values(i, side, m), r.values(i, peer, m))
		}
		switch b.mode {
		case leg.Eval:
			if b.goroutines == 1 {
				alone[b.policy] = i
				add(against("throughput", mRate, nameOurs, namePlain).AtLeast(30),
					against("throughput", mRate, nameOurs, nameBest).AtLeast(20),
					against("throughput", mRate, nameOurs, nameCedar).AtLeast(2.5),
					results.Fixed(area, name("allocations"), mAllocs.unit, "none", 0, ours(mAllocs)).AtMost(0),
					against("throughput of the topdown path", mRate, nameTopdown, nameBest).AtLeast(0.95))
				continue
			}
			if one, ok := alone[b.policy]; ok {
				add(results.NewRow(area, name("throughput"), mRate.unit, "one goroutine", ours(mRate), r.values(one, nameOurs, mRate)).AtLeast(1.8))
			}
		case leg.Load:
			size := float64(r.data[b.policy]) / (1 << 20)
			add(results.Fixed(area, name(mLoad.name), mLoad.unit, "2 s", 2, ours(mLoad)).AtMost(1),
				results.Fixed(area, name(mRSS.name), mRSS.unit, "the data as JSON", size, ours(mRSS)).AtMost(8))
		case leg.Swap:
			add(results.NewRow(area, name("p99"), mP99.unit, "without swaps", ours(mSwapP99), ours(mP99)).AtMost(noise))
		}
	}
	return out
}

// noise is how much a p99 of this length differs from one run to the next.
const noise = 1.25

// targets is the table of the targets as Markdown; it reads well in a terminal,
// too.
func (r *report) targets() string {
	var b strings.Builder
	fmt.Fprint(&b, "| figure | ours | beside | its value | ratio | target | met |\n|---|---:|---|---:|---:|---:|---|\n")
	for _, row := range r.targetRows() {
		met := "yes"
		if !*row.Met {
			met = "**no**"
		}
		fmt.Fprintf(&b, "| %s | %v %s | %s | %v | %v | %v | %s |\n", strings.TrimPrefix(row.Name, "target: "), row.Ours, row.Unit, row.Peer, row.Value, row.Ratio, *row.Target, met)
	}
	return b.String()
}

// table shows every side of one block.
func (r *report) table(i int) string {
	b := r.options.plan[i]
	ms := b.metrics()
	var t strings.Builder
	fmt.Fprint(&t, "| side |")
	for j, m := range ms {
		fmt.Fprintf(&t, " %s |", strings.TrimSpace(m.name+" "+m.unit))
		if j == 0 {
			fmt.Fprint(&t, " spread | theirs/ours |")
		}
	}
	fmt.Fprintf(&t, "\n|---|%s\n", strings.Repeat("---:|", len(ms)+2))
	ours := r.values(i, b.sides[0], ms[0])
	for _, s := range b.sides {
		fmt.Fprintf(&t, "| %s |", s)
		for j, m := range ms {
			v := r.values(i, s, m)
			fmt.Fprintf(&t, " %s |", number(results.Median(v)))
			if j > 0 {
				continue
			}
			ratio := ""
			if s != b.sides[0] {
				ratio = number(results.Ratio(v, ours))
			}
			fmt.Fprintf(&t, " %s–%s | %s |", number(slices.Min(v)), number(slices.Max(v)), ratio)
		}
		fmt.Fprintln(&t)
	}
	return t.String()
}

// number keeps three digits, without exponents.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// line is one leg for the terminal.
func line(b block, l leg.Result) string {
	var parts []string
	for _, m := range b.metrics() {
		parts = append(parts, strings.TrimSpace(fmt.Sprintf("%s %s %s", m.name, number(m.of(l)), m.unit)))
	}
	return strings.Join(parts, "  ")
}

// conformance is how many of OPA's own test cases the compiled engine takes.
type conformance struct{ cases, passed, failed float64 }

var conformanceLine = regexp.MustCompile(`conformance: (\d+) cases: (\d+) passed compiled, (\d+) fell back, (\d+) failed`)

// readConformance finds the line of the conformance test in what it has printed.
func readConformance(name string) (*conformance, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	m := conformanceLine.FindSubmatch(data)
	if m == nil {
		return nil, fmt.Errorf("%s has no line that begins with \"conformance:\": is it what go test -v ./prepared/irvm printed?", name)
	}
	var n [4]float64
	for i := range n {
		if n[i], err = strconv.ParseFloat(string(m[i+1]), 64); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return &conformance{cases: n[0], passed: n[1], failed: n[3]}, nil
}

func (r *report) page() string {
	var b strings.Builder
	fmt.Fprintf(&b, `## The policy evaluator beside others

Written by bench/policybench; %d repetitions of %v after %v of warm-up, every leg a process of its own, sides alternating, medians; spread is the smallest and the largest.

%s

### Targets
A target bounds the ratio, or our value where the other one is 0.

%s`, r.options.reps, r.options.measure, r.options.warmup, r.machine.Markdown(), r.targets())
	for i, bl := range r.options.plan {
		s := bl.String()
		fmt.Fprintf(&b, "\n### %s\n%s", strings.ToUpper(s[:1])+s[1:], r.table(i))
	}
	b.WriteString(`
How to read this:

- A **decision** is from the bytes of a request to the bytes of an answer, over eight calls in turn, half of them denied. Every side decides all of them alike, which each leg checks first.
- The **desk** policy is roles, grants and reasons; the **mail** policy is sets, patterns and numbers, written after the evaluator was. Policies and sample calls are in bench/policybench; about 240 KB of data for each is made from numbers.
- **OPA, best options** keeps data and answer as its evaluator's values, reads in one transaction, has no metrics and no goroutine per evaluation.
- **cedar-go** does less: the language has no texts, limits or redaction in an answer, and what it cannot look up or count lies in its policy, its entities or its context.
- **allocations** are those of the whole process divided by its decisions; under one in twenty they count as none.
- **growth of RSS** is what the kernel counts when the garbage of loading was given back, as a node does after an activation; right after loading that garbage is still there.
- **swap under load**: one goroutine asks while another one activates two versions in turn, through the disk, in every second window of 100 ms.
`)
	return b.String()
}
