package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/autonomyops/autonomy/bench/internal/results"
)

// area is this program's part of the results.
const area = "tool-call"

// report holds the legs of every side and number of connections, by repetition.
type report struct {
	options *options
	machine results.Machine
	legs    map[key][]leg
}

type key struct {
	side  string
	conns int
}

func (r *report) add(side string, conns int, l leg) {
	if r.legs == nil {
		r.legs = map[key][]leg{}
	}
	r.legs[key{side, conns}] = append(r.legs[key{side, conns}], l)
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

var peers = []struct{ side, name string }{
	{sideOPA, "opa run -s (no record, no tool)"},
	{sideCeiling, "bare fasthttp echo (ceiling)"},
}

func (r *report) rows() (out []results.Row) {
	for _, conns := range r.options.conns {
		for _, m := range metrics {
			for _, p := range peers {
				ours, theirs := values(r.legs[key{sideNode, conns}], m.of), values(r.legs[key{p.side, conns}], m.of)
				out = append(out, results.NewRow(area,
					fmt.Sprintf("POST /v1/tool echo, durability strict, %d connections: %s", conns, m.name), m.unit, p.name, ours, theirs))
			}
		}
	}
	return out
}

// table is the report's table as Markdown; it reads well in a terminal, too.
func (r *report) table() string {
	var b strings.Builder
	head := "| connections | side | calls/s | spread | p50 µs | p99 µs | CPU µs/call | calls/s, ours/theirs |"
	fmt.Fprintln(&b, head)
	fmt.Fprintln(&b, "|---:|---|---:|---:|---:|---:|---:|---:|")
	for _, conns := range r.options.conns {
		ours := values(r.legs[key{sideNode, conns}], metrics[0].of)
		for _, side := range []string{sideNode, sideOPA, sideCeiling} {
			legs := r.legs[key{side, conns}]
			rate := values(legs, metrics[0].of)
			ratio := ""
			if side != sideNode {
				ratio = fmt.Sprintf("%.2f", results.Ratio(ours, rate))
			}
			fmt.Fprintf(&b, "| %d | %s | %.0f | %.0f–%.0f | %.0f | %.0f | %.1f | %s |\n", conns, side, results.Median(rate), slices.Min(rate), slices.Max(rate),
				results.Median(values(legs, metrics[1].of)), results.Median(values(legs, metrics[2].of)), results.Median(values(legs, metrics[3].of)), ratio)
		}
	}
	return b.String()
}

func (r *report) page() string {
	return fmt.Sprintf(`## POST /v1/tool beside OPA

Written by `+"`make bench`"+` (bench/toolbench); %d repetitions of %v, sides alternating, medians; spread is the smallest and the largest.

%s

%s
The sides do different work:

- **autonomy**: strict decode, evaluate, decision record durable on disk, run tool.echo, action record, answer.
- **opa**: `+"`opa run -s`"+` with the same bundle: decode, evaluate, answer. Nothing is recorded, no tool runs.
- **fasthttp**: sends the body back. The ceiling of the HTTP library on this machine.

The load generator runs on the same cores and takes its share of them, so calls/s hold for this machine only; CPU per call is the server process's own, from /proc.
`, r.options.reps, r.options.duration, r.machine.Markdown(), r.table())
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
