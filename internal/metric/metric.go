// Package metric holds counters and histograms that a hot path can update
// without a lock and without allocating, and writes them, together with the text
// that other libraries make, as Prometheus text or as OpenMetrics.
//
// A program keeps one Table of what it exposes: name, type, unit, meaning. The
// table is what /metrics says in HELP and TYPE and what the documentation shows,
// so that the two cannot differ.
//
// Units: histograms take time.Duration and expose seconds, as Prometheus wants.
// All methods are safe for concurrent use. Nothing here can fail but the writer
// that is written to.
package metric

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Counter only goes up. The zero value is ready.
type Counter struct{ n atomic.Uint64 }

// Inc adds one.
func (c *Counter) Inc() { c.n.Add(1) }

// Value is the count so far.
func (c *Counter) Value() uint64 { return c.n.Load() }

// bounds are the upper bounds of a histogram's buckets but the last, which has
// none: from ten microseconds, about what a call costs that touches no disk, to
// the ten seconds after which most of what can be waited for is given up.
var bounds = []time.Duration{
	10 * time.Microsecond, 25 * time.Microsecond, 50 * time.Microsecond,
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	1 * time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	1 * time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

const buckets = 20 // len(bounds) + 1

// exemplarEvery is the least time between two exemplars of one bucket: they are
// for finding one call of a kind, not all.
const exemplarEvery = time.Second

// Histogram counts durations. The zero value is ready.
type Histogram struct {
	counts [buckets]atomic.Uint64
	sum    atomic.Int64 // nanoseconds

	due       [buckets]atomic.Int64 // Unix nanoseconds from which the bucket takes another exemplar
	mu        sync.Mutex            // never waited for by Observe
	exemplars [buckets]exemplar
}

type exemplar struct {
	auditID string
	value   time.Duration
	at      time.Time
}

// Observe counts d. auditID names the call that took it, "" when there is none.
func (h *Histogram) Observe(d time.Duration, auditID string, now time.Time) {
	i, _ := slices.BinarySearch(bounds, d)
	h.counts[i].Add(1)
	h.sum.Add(int64(d))
	if auditID == "" || now.UnixNano() < h.due[i].Load() || !h.mu.TryLock() {
		return
	}
	h.due[i].Store(now.Add(exemplarEvery).UnixNano())
	h.exemplars[i] = exemplar{auditID, d, now}
	h.mu.Unlock()
}

// append writes the histogram's lines.
func (h *Histogram) append(b []byte, name string, open bool) []byte {
	h.mu.Lock()
	ex := h.exemplars
	h.mu.Unlock()
	var total uint64
	for i := range buckets {
		total += h.counts[i].Load()
		b = append(b, name...)
		b = append(b, `_bucket{le="`...)
		if i < len(bounds) {
			b = strconv.AppendFloat(b, bounds[i].Seconds(), 'g', -1, 64)
		} else {
			b = append(b, "+Inf"...)
		}
		b = append(b, `"} `...)
		b = strconv.AppendUint(b, total, 10)
		if e := ex[i]; open && e.auditID != "" {
			b = fmt.Appendf(b, ` # {audit_id=%q} %g %.3f`, e.auditID, e.value.Seconds(), float64(e.at.UnixMilli())/1000)
		}
		b = append(b, '\n')
	}
	sum := math.Max(0, time.Duration(h.sum.Load()).Seconds())
	b = fmt.Appendf(b, "%s_sum %g\n", name, sum)
	return fmt.Appendf(b, "%s_count %d\n", name, total)
}

// Buffer collects samples, one line each, until Expose puts them in order. Its
// own methods and any library that writes Prometheus text can fill it.
type Buffer struct {
	b    []byte
	open bool
}

// NewBuffer makes a Buffer for OpenMetrics, or else for Prometheus text.
func NewBuffer(openMetrics bool) *Buffer { return &Buffer{open: openMetrics} }

// Write takes lines of Prometheus text.
func (f *Buffer) Write(p []byte) (int, error) {
	f.b = append(f.b, p...)
	return len(p), nil
}

// Uint writes one sample; labels are as in `level="full"`, "" for none.
func (f *Buffer) Uint(name, labels string, v uint64) { f.Float(name, labels, float64(v)) }

// Float writes one sample.
func (f *Buffer) Float(name, labels string, v float64) {
	f.b = append(f.b, name...)
	if labels != "" {
		f.b = append(append(append(f.b, '{'), labels...), '}')
	}
	f.b = append(f.b, ' ')
	if v == math.Trunc(v) && math.Abs(v) < 1<<53 {
		f.b = strconv.AppendInt(f.b, int64(v), 10)
	} else {
		f.b = strconv.AppendFloat(f.b, v, 'g', -1, 64)
	}
	f.b = append(f.b, '\n')
}

// Histogram writes all of h.
func (f *Buffer) Histogram(name string, h *Histogram) { f.b = h.append(f.b, name, f.open) }

// Expose writes what was collected to w: each family of the table once, in its
// order, with its meaning, then the families that the table does not have.
func (f *Buffer) Expose(w io.Writer, t Table) error {
	_, err := w.Write(f.expose(t))
	return err
}

// ContentType is what Expose writes.
func (f *Buffer) ContentType() string {
	if f.open {
		return "application/openmetrics-text; version=1.0.0; charset=utf-8"
	}
	return "text/plain; version=0.0.4; charset=utf-8"
}
