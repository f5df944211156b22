package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/bench/internal/results"
	"github.com/autonomyops/autonomy/bench/walbench/leg"
)

// area is this program's part of the results.
const area = "wal"

// A report holds the results of every side in every block, by repetition.
type report struct {
	options *options
	machine results.Machine
	legs    map[cell][]leg.Result
}

type cell struct {
	block int // index in the plan
	side  side
}

// A metric is one figure of a leg.
type metric struct {
	name, unit string
	of         func(leg.Result) float64
}

var (
	mRate   = metric{"throughput", "records/s", func(r leg.Result) float64 { return float64(r.Records) / r.Took.Seconds() }}
	mP50    = metric{"p50", "µs", func(r leg.Result) float64 { return micros(r.P50) }}
	mP99    = metric{"p99", "µs", func(r leg.Result) float64 { return micros(r.P99) }}
	mP50ns  = metric{"p50", "ns", func(r leg.Result) float64 { return float64(r.P50) }}
	mP99ns  = metric{"p99", "ns", func(r leg.Result) float64 { return float64(r.P99) }}
	mMean   = metric{"mean", "ns", func(r leg.Result) float64 { return float64(r.Took) / float64(r.Records) }}
	mAllocs = metric{"allocations", "per record", perOwn}
	mDevice = metric{"written to the device", "B/record", func(r leg.Result) float64 { return float64(r.Device) / float64(r.Records) }}
	mGroup  = metric{"records in a sync", "records", func(r leg.Result) float64 { return float64(r.Records) / float64(max(r.Syncs, 1)) }}
	mSync   = metric{"sync", "µs", func(r leg.Result) float64 { return micros(r.SyncTime) / float64(max(r.Syncs, 1)) }}
	mShare  = metric{"time in syncs", "%", func(r leg.Result) float64 { return 100 * float64(r.SyncTime) / float64(r.Took) }}
	mOpen   = metric{"open", "ms", func(r leg.Result) float64 { return micros(r.Open) / 1e3 }}
	mRSS    = metric{"RSS after open and drain", "MiB", func(r leg.Result) float64 { return float64(r.RSS) / (1 << 20) }}
	mAnon   = metric{"of it not backed by files", "MiB", func(r leg.Result) float64 { return float64(r.Anon) / (1 << 20) }}
)

// perOwn is allocations per record. Below 1 in 20 they are a group's, a
// batch's or the runtime's, not a record's.
func perOwn(r leg.Result) float64 {
	if r.Allocs < 0.05 {
		return 0
	}
	return r.Allocs
}

func mBytes(size int) metric {
	return metric{"throughput", "GB/s", func(r leg.Result) float64 { return float64(r.Records) * float64(size) / r.Took.Seconds() / 1e9 }}
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// metrics are what is compared side by side in a block.
func (b block) metrics() []metric {
	switch b.kind {
	case kindDurable:
		return []metric{mRate, mP50, mP99, mDevice, mAllocs}
	case kindNoWait:
		return []metric{mMean, mP50ns, mP99ns, mAllocs}
	case kindDrain, kindFrame:
		return []metric{mBytes(b.size), mAllocs}
	}
	return []metric{mOpen}
}

func (r *report) values(b int, s side, m metric) []float64 {
	legs := r.legs[cell{b, s}]
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
			ours := r.values(i, sideOurs, m)
			for _, s := range b.sides[1:] {
				out = append(out, results.NewRow(area, b.String()+": "+m.name, m.unit, s.String(), ours, r.values(i, s, m)))
			}
		}
	}
	return append(out, r.targetRows()...)
}

// best is the side with the highest median throughput among those that ok
// takes.
func (r *report) best(b int, m metric, ok func(side) bool) (best side, found bool) {
	top := 0.0
	for _, s := range r.options.plan[b].sides[1:] {
		if _, mine := own[s.name]; mine || !ok(s) {
			continue
		}
		if v := results.Median(r.values(b, s, m)); v > top {
			best, top, found = s, v, true
		}
	}
	return best, found
}

// targetRows are what the project has set out to reach.
func (r *report) targetRows() (out []results.Row) {
	add := func(rows ...results.Row) { out = append(out, rows...) }
	small := -1 // the smaller log of kindOpen
	for i, b := range r.options.plan {
		name := func(what string) string { return "target: " + b.String() + ": " + what }
		ours := func(m metric) []float64 { return r.values(i, sideOurs, m) }
		against := func(what string, m metric, s side) results.Row {
			return results.NewRow(area, name(what), m.unit, s.String(), ours(m), r.values(i, s, m))
		}
		switch b.kind {
		case kindDurable:
			add(results.Fixed(area, name("allocations"), mAllocs.unit, "none", 0, ours(mAllocs)).AtMost(0))
			switch b.waiters {
			case 1:
				add(against("p50", mP50, side{name: nameFdatasync}).AtMost(1.15))
			case 64:
				if s, ok := r.best(i, mRate, func(side) bool { return true }); ok {
					add(against("throughput, best peer", mRate, s).AtLeast(2))
				}
				add(against("throughput", mRate, side{name: nameTidwall}).AtLeast(30),
					against("throughput", mRate, side{name: nameBbolt}).AtLeast(30))
				if wrote, pages, ok := r.amplification(i); ok {
					add(results.NewRow(area, name("bytes written above page rounding"), "B/record",
						"appended bytes, and a page for each sync", wrote, pages).AtMost(1.25))
				}
			case 1024:
				if s, ok := r.best(i, mRate, func(side) bool { return true }); ok {
					add(against("throughput, best peer", mRate, s).AtLeast(1.3))
				}
				add(results.Fixed(area, name("records in a sync"), "records", "all that wait", float64(b.waiters),
					ours(mGroup)).AtLeast(0.95))
			}
		case kindNoWait:
			add(results.Fixed(area, name("p50"), "ns", "150 ns", 150, ours(mP50ns)).AtMost(1),
				results.Fixed(area, name("p99"), "ns", "1 µs", 1000, ours(mP99ns)).AtMost(1),
				against("p50", mP50ns, side{name: namePebble}).AtMost(1),
				against("p99", mP99ns, side{name: namePebble}).AtMost(1),
				results.Fixed(area, name("allocations"), mAllocs.unit, "none", 0, ours(mAllocs)).AtMost(0))
		case kindDrain:
			add(results.Fixed(area, name("allocations"), mAllocs.unit, "none", 0, ours(mAllocs)).AtMost(0))
		case kindFrame:
			add(against("throughput", mBytes(b.size), side{name: nameMarshal}).AtLeast(3),
				results.Fixed(area, name("throughput"), "GB/s", "1 GB/s", 1, ours(mBytes(b.size))).AtLeast(1))
		case kindOpen:
			if b.bytes() >= 1<<30 {
				add(results.Fixed(area, name("open, warm"), mOpen.unit, "0.3 s", 300, ours(mOpen)).AtMost(1))
			}
			if small >= 0 {
				add(results.NewRow(area, name(mRSS.name), mRSS.unit,
					fmt.Sprintf("the same with %d MiB", r.options.plan[small].bytes()>>20), ours(mRSS), r.values(small, sideOurs, mRSS)).AtMost(1.1))
			}
			small = i
		}
	}
	return out
}

// amplification is, per record, what our log wrote to the device, and what it
// had to: the records, and one page for each sync, which begins and ends within
// pages.
func (r *report) amplification(b int) (wrote, pages []float64, ok bool) {
	size := r.options.plan[b].size
	for _, l := range r.legs[cell{b, sideOurs}] {
		if l.Device == 0 || l.Syncs == 0 {
			return nil, nil, false
		}
		n := float64(l.Records)
		wrote = append(wrote, float64(l.Device)/n)
		pages = append(pages, float64(size)+float64(l.Syncs)*pageSize/n)
	}
	return wrote, pages, true
}

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
	if b.kind == kindOpen {
		ms = append(ms, mRSS, mAnon)
	}
	var t strings.Builder
	fmt.Fprintf(&t, "| side |")
	for j, m := range ms {
		fmt.Fprintf(&t, " %s %s |", m.name, m.unit)
		if j == 0 {
			fmt.Fprint(&t, " spread | ours/theirs |")
		}
	}
	fmt.Fprintf(&t, "\n|---|%s\n", strings.Repeat("---:|", len(ms)+2))
	ours := r.values(i, sideOurs, ms[0])
	for _, s := range b.sides {
		fmt.Fprintf(&t, "| %v |", s)
		for j, m := range ms {
			v := r.values(i, s, m)
			fmt.Fprintf(&t, " %s |", number(results.Median(v)))
			if j > 0 {
				continue
			}
			ratio := ""
			if s != sideOurs {
				ratio = number(results.Ratio(ours, v))
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
		parts = append(parts, fmt.Sprintf("%s %s %s", m.name, number(m.of(l)), m.unit))
	}
	return strings.Join(parts, "  ")
}

func (r *report) page() string {
	var b strings.Builder
	fmt.Fprintf(&b, `## The write-ahead log beside others

Written by bench/walbench; %d repetitions, durable legs of %v after %v of warm-up, every leg a process of its own, sides alternating, medians; spread is the smallest and the largest.

%s

### Targets
A target bounds the ratio, or our value where the other one is 0.

%s`, r.options.reps, r.options.measure, r.options.warmup, r.machine.Markdown(), r.targets())
	for i, bl := range r.options.plan {
		s := bl.String()
		fmt.Fprintf(&b, "\n### %s\n%s\n", strings.ToUpper(s[:1])+s[1:], r.table(i))
		if bl.kind == kindDurable {
			floor := side{name: nameDirect, batch: true}
			if s, ok := r.best(i, mRate, func(side) bool { return true }); ok && slices.Contains(bl.sides, floor) {
				fmt.Fprintf(&b, "The floor of %s is %s times the best peer; ours reaches %s of that floor.\n\n", plural(bl.waiters, "waiter"),
					number(results.Ratio(r.values(i, floor, mRate), r.values(i, s, mRate))), number(results.Ratio(r.values(i, sideOurs, mRate), r.values(i, floor, mRate))))
			}
			fmt.Fprintf(&b, "Ours: %s records in a sync of %s µs; syncs take %s%% of the time.\n",
				number(results.Median(r.values(i, sideOurs, mGroup))), number(results.Median(r.values(i, sideOurs, mSync))), number(results.Median(r.values(i, sideOurs, mShare))))
		}
	}
	fmt.Fprintf(&b, `
How to read this:

- **batched**: the harness batches for the peer as ours does inside, with one sync for everybody who arrived during the one before. The other lines are the peer as shipped; bbolt Batch and the pebble record log batch themselves.
- **autonomy/wal** runs as a node does by default, with its ring in memory; **in mapped files** is what it falls back to.
- **floor**: one page of a file that was written before, made durable. It keeps nothing that could be read again. Batched it is the bytes of all who wait, in one write, and one broadcast that wakes them. That is the harness' own batching, a strong reference and no bound: a log that groups or wakes better can pass it.
- **append without waiting** reads the clock once for each append, %s ns of p50 and p99 here; the mean has none of that. Ours is in memory that survives the process; pebble's is in its heap until it is flushed.
- **drain** reads the whole log once it is warm. tidwall/wal, bbolt and SQLite check no record; etcd reads all of it into memory first.
- **drain to OTLP requests** reads, checks and frames OTLP records; nothing is sent. proto.Marshal encodes the same records from messages that are already built, in requests of the same size.
- **open** of ours follows a process that ended without closing, and checks every record. tidwall/wal was closed, and reads its last segment.
- **written to the device** is the whole device's counter. It also counts what other processes and the file system write meanwhile, and so does the target for bytes written: on a machine that is not idle both are too high.
- **allocations** are those of the whole process divided by its records; under one in twenty they count as none.
`, r.clock())
	return b.String()
}

func (r *report) clock() string {
	for i, b := range r.options.plan {
		if b.kind == kindNoWait {
			return number(results.Median(r.values(i, sideOurs, metric{of: func(l leg.Result) float64 { return float64(l.Clock) }})))
		}
	}
	return "some"
}
