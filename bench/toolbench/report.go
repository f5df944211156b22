package main

import (
	"encoding/json"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"

	"github.com/autonomyops/autonomy/internal/vfs"
)

// results holds the legs of every side and number of connections, by repetition.
type results struct {
	options *options
	machine machine
	legs    map[key][]leg
}

type key struct {
	side  string
	conns int
}

func (r *results) add(side string, conns int, l leg) {
	if r.legs == nil {
		r.legs = map[key][]leg{}
	}
	r.legs[key{side, conns}] = append(r.legs[key{side, conns}], l)
}

// A row of latest.json. Ratio is ours/peer: above 1 is better for calls/s,
// below 1 for µs. Target and Met are null where nobody has set a target.
type row struct {
	Area   string   `json:"area"`
	Name   string   `json:"name"`
	Ours   float64  `json:"ours"`
	Peer   string   `json:"peer"`
	Value  float64  `json:"peer_value"`
	Ratio  float64  `json:"ratio"`
	Unit   string   `json:"unit"`
	Target *float64 `json:"target"`
	Met    *bool    `json:"met"`
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

func (r *results) rows() (out []row) {
	for _, conns := range r.options.conns {
		for _, m := range metrics {
			for _, p := range peers {
				ours, theirs := values(r.legs[key{sideNode, conns}], m.of), values(r.legs[key{p.side, conns}], m.of)
				ratios := make([]float64, len(ours))
				for i := range ours {
					ratios[i] = ours[i] / theirs[i]
				}
				out = append(out, row{
					Area: "tool-call",
					Name: fmt.Sprintf("POST /v1/tool echo, durability strict, %d connections: %s", conns, m.name),
					Ours: round(median(ours)), Peer: p.name, Value: round(median(theirs)),
					Ratio: round(median(ratios)), Unit: m.unit,
				})
			}
		}
	}
	return out
}

// table is the report's table as Markdown; it reads well in a terminal, too.
func (r *results) table() string {
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
				rs := make([]float64, len(ours))
				for i := range ours {
					rs[i] = ours[i] / rate[i]
				}
				ratio = fmt.Sprintf("%.2f", median(rs))
			}
			fmt.Fprintf(&b, "| %d | %s | %.0f | %.0f–%.0f | %.0f | %.0f | %.1f | %s |\n", conns, side, median(rate), slices.Min(rate), slices.Max(rate),
				median(values(legs, metrics[1].of)), median(values(legs, metrics[2].of)), median(values(legs, metrics[3].of)), ratio)
		}
	}
	return b.String()
}

func (r *results) page() string {
	return fmt.Sprintf(`# POST /v1/tool beside OPA

Written by `+"`make bench`"+` (bench/toolbench); %d repetitions of %v, sides alternating, medians; spread is the smallest and the largest.

%s

%s
The sides do different work:

- **autonomy**: strict decode, evaluate, decision record durable on disk, run tool.echo, action record, answer.
- **opa**: `+"`opa run -s`"+` with the same bundle: decode, evaluate, answer. Nothing is recorded, no tool runs.
- **fasthttp**: sends the body back. The ceiling of the HTTP library on this machine.

The load generator runs on the same cores and takes its share of them, so calls/s hold for this machine only; CPU per call is the server process's own, from /proc.
`, r.options.reps, r.options.duration, r.machine.markdown(), r.table())
}

func (r *results) write() error {
	if err := vfs.MkdirAll(r.options.out, 0o755); err != nil {
		return err
	}
	data, err := json.MarshalIndent(r.rows(), "", "  ")
	if err != nil {
		return err
	}
	if err := vfs.WriteFile(filepath.Join(r.options.out, "latest.json"), append(data, '\n'), 0o644); err != nil {
		return err
	}
	return vfs.WriteFile(filepath.Join(r.options.out, "latest.md"), []byte(r.page()), 0o644)
}

func values(legs []leg, of func(leg) float64) []float64 {
	out := make([]float64, len(legs))
	for i, l := range legs {
		out[i] = of(l)
	}
	return out
}

// median of an even number is the mean of the two in the middle.
func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// round keeps four significant digits: more is noise.
func round(v float64) float64 {
	if v == 0 || math.IsInf(v, 0) || math.IsNaN(v) {
		return 0 // JSON has no such numbers; a ratio to nothing is none
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}
