package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/autonomyops/autonomy/bench/internal/results"
)

// area is this program's part of the results.
const area = "tool-call"

// report holds the legs of every side, call and number of connections, by
// repetition, and what is measured once.
type report struct {
	options *options
	machine results.Machine
	legs    map[key][]leg
	starts  []float64 // milliseconds until a node listens that was started before
	syncs   []float64 // microseconds of one fdatasync, by repetition
	binary  float64   // MiB of the node's program
}

type key struct {
	side, call string
	conns      int
}

func (r *report) add(side, call string, conns int, l leg) {
	if r.legs == nil {
		r.legs = map[key][]leg{}
	}
	k := key{side, call, conns}
	r.legs[k] = append(r.legs[k], l)
}

// metrics are what is reported of a leg.
var metrics = []struct {
	name, unit string
	of         func(leg) float64
}{
	{"throughput", "calls/s", func(l leg) float64 { return l.rate }},
	{"p50", "µs", func(l leg) float64 { return l.p50 }},
	{"p99", "µs", func(l leg) float64 { return l.p99 }},
	{"CPU per call", "µs", func(l leg) float64 { return l.cpu }},
}

func rate(l leg) float64 { return l.rate }
func cpu(l leg) float64  { return l.cpu }

var peers = []struct{ side, name string }{
	{sideOPA, "opa run -s, decision logs to console (no tool)"},
	{sideCeiling, "bare fasthttp echo (ceiling)"},
}

func (r *report) values(side, call string, conns int, of func(leg) float64) []float64 {
	return values(r.legs[key{side, call, conns}], of)
}

// rows are the figures that have a target, and then every other comparison.
func (r *report) rows() []results.Row { return append(r.targetRows(), r.otherRows()...) }

// The targets of the tool call. Those that name a number of connections are not
// in the results of a run without it.
func (r *report) targetRows() (out []results.Row) {
	name := func(side, call string, conns int, what string) string {
		return fmt.Sprintf("POST /v1/tool %s, %s, %d connections: %s", call, strings.TrimPrefix(side, "autonomy, "), conns, what)
	}
	for _, conns := range r.options.conns {
		for _, c := range calls {
			batched := r.values(sideBatched, c.name, conns, rate)
			out = append(out,
				results.NewRow(area, name(sideBatched, c.name, conns, "throughput"), "calls/s", peers[1].name, batched, r.values(sideCeiling, c.name, conns, rate)).AtLeast(0.6),
				results.NewRow(area, name(sideBatched, c.name, conns, "throughput"), "calls/s", peers[0].name, batched, r.values(sideOPA, c.name, conns, rate)).AtLeast(12))
			if conns >= 64 {
				out = append(out, results.NewRow(area, name(sideStrict, c.name, conns, "throughput"), "calls/s", "the same, batched",
					r.values(sideStrict, c.name, conns, rate), batched).AtLeast(0.5),
					results.NewRow(area, name(sideStrict, c.name, conns, "p99"), "µs", "one fdatasync of this disk",
						r.values(sideStrict, c.name, conns, func(l leg) float64 { return l.p99 }), r.syncs).AtMost(4))
			}
			if conns == 1 {
				floor := make([]float64, len(r.syncs))
				for i, s := range r.syncs {
					floor[i] = s + 60
				}
				out = append(out, results.NewRow(area, name(sideStrict, c.name, conns, "p50"), "µs", "one fdatasync of this disk + 60 µs",
					r.values(sideStrict, c.name, conns, func(l leg) float64 { return l.p50 }), floor).AtMost(1))
			}
		}
		for _, side := range []string{sideStrict, sideBatched} {
			deny := r.values(side, "deny", conns, cpu)
			out = append(out,
				results.Fixed(area, name(side, "deny", conns, "CPU per call"), "µs", "15 µs", 15, deny).AtMost(1),
				results.NewRow(area, name(side, "deny", conns, "CPU per call"), "µs", peers[0].name, deny, r.values(sideOPA, "deny", conns, cpu)).AtMost(0.05))
		}
		if conns == 256 {
			out = append(out, results.Fixed(area, "node, strict, 256 connections: memory of its own (RssAnon)", "MiB", "64 MiB", 64,
				r.values(sideStrict, "deny", conns, func(l leg) float64 { return l.rss })).AtMost(1))
		}
	}
	return append(out,
		results.Fixed(area, "node: start to listening, warm", "ms", "100 ms", 100, r.starts).AtMost(1),
		results.Fixed(area, "node: program, stripped", "MiB", "30 MiB", 30, []float64{r.binary}).AtMost(1))
}

func (r *report) otherRows() (out []results.Row) {
	for _, conns := range r.options.conns {
		for _, c := range calls {
			for _, m := range metrics {
				for _, p := range peers {
					out = append(out, results.NewRow(area, fmt.Sprintf("POST /v1/tool %s, strict, %d connections: %s, beside", c.name, conns, m.name),
						m.unit, p.name, r.values(sideStrict, c.name, conns, m.of), r.values(p.side, c.name, conns, m.of)))
				}
			}
		}
	}
	return out
}

// targets is the table of the targets as Markdown.
func (r *report) targets() string {
	var b strings.Builder
	fmt.Fprintln(&b, "| figure | ours | beside | its value | ratio | target | met |")
	fmt.Fprintln(&b, "|---|---:|---|---:|---:|---:|---|")
	for _, row := range r.targetRows() {
		met := "**no**"
		if *row.Met {
			met = "yes"
		}
		fmt.Fprintf(&b, "| %s | %g %s | %s | %g | %g | %g | %s |\n", row.Name, row.Ours, row.Unit, row.Peer, row.Value, row.Ratio, *row.Target, met)
	}
	return b.String()
}

// table is every leg as Markdown; it reads well in a terminal, too.
func (r *report) table() string {
	var b strings.Builder
	fmt.Fprintln(&b, "| call | connections | side | calls/s | spread | p50 µs | p99 µs | CPU µs/call | own MiB | flushes/s | records/flush |")
	fmt.Fprintln(&b, "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")
	for _, c := range calls {
		for _, conns := range r.options.conns {
			for _, side := range []string{sideStrict, sideBatched, sideOPA, sideCeiling} {
				legs := r.legs[key{side, c.name, conns}]
				rates := values(legs, rate)
				median := func(of func(leg) float64) float64 { return results.Median(values(legs, of)) }
				flush := " | "
				if side == sideStrict || side == sideBatched {
					flush = fmt.Sprintf("%.0f | %.1f", median(func(l leg) float64 { return l.flushes }), median(func(l leg) float64 { return l.records }))
				}
				fmt.Fprintf(&b, "| %s | %d | %s | %.0f | %.0f–%.0f | %.0f | %.0f | %.1f | %.0f | %s |\n", c.name, conns, side,
					median(rate), slices.Min(rates), slices.Max(rates), median(metrics[1].of), median(metrics[2].of), median(cpu),
					median(func(l leg) float64 { return l.rss }), flush)
			}
		}
	}
	return b.String()
}

func (r *report) page() string {
	return fmt.Sprintf(`## POST /v1/tool beside OPA

Written by `+"`make bench`"+` (bench/toolbench); %d repetitions of %v, sides alternating, medians; spread is the smallest and the largest.

%s
- one fdatasync of 4 KiB in a file written before, in this run: %.0f µs

### Targets

%s
### All legs

%s
The sides do different work:

- **autonomy**: strict decode, evaluate, decision record, run tool.echo, action record, answer; "deny" ends with the decision. **strict** waits until the decision is on disk: a call can be no faster than one flush, and calls that wait at the same time share one. flushes/s and records/flush show how: their product is the rate of records, and when flushes/s is that of the disk alone, more calls need more waiters.
- **opa**: `+"`opa run -s`"+` with the same bundle and decision logs to the console: decode, evaluate, print, answer. No tool runs, nothing is synced.
- **fasthttp**: sends the body back. The ceiling of the HTTP library on this machine.

The load generator runs on the same cores and takes its share of them, so calls/s hold for this machine only; CPU per call is the server process's own, from /proc. "own MiB" is RssAnon: the pages of the mapped log are the page cache's.
`, r.options.reps, r.options.duration, r.machine.Markdown(), results.Median(r.syncs), r.targets(), r.table())
}

func (r *report) write() error {
	return results.Write(r.options.out, area, r.rows(), r.page())
}

func values(legs []leg, of func(leg) float64) []float64 {
	out := make([]float64, len(legs))
	for i, l := range legs {
		out[i] = of(l)
	}
	return out
}
