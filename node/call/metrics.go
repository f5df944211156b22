package call

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// Metrics of the pipeline. Names are stable; durations are in seconds.
type Metrics struct {
	set         *metrics.Set
	InFlight    atomic.Int64
	Eval        *metrics.Histogram
	Durable     *metrics.Histogram
	Tool        *metrics.Histogram
	Total       *metrics.Histogram
	LostActions *metrics.Counter
}

func (m *Metrics) init() {
	m.set = metrics.NewSet()
	m.Eval = m.set.NewHistogram("autonomy_node_policy_evaluation_seconds")
	m.Durable = m.set.NewHistogram("autonomy_node_decision_durable_wait_seconds")
	m.Tool = m.set.NewHistogram("autonomy_node_tool_seconds")
	m.Total = m.set.NewHistogram("autonomy_node_call_seconds")
	m.LostActions = m.set.NewCounter("autonomy_node_action_records_lost_total")
	m.set.NewGauge("autonomy_node_calls_in_flight", func() float64 { return float64(m.InFlight.Load()) })
}

func (m *Metrics) observe(a *Answer, d time.Duration) {
	m.Total.Update(d.Seconds())
	m.set.GetOrCreateCounter(fmt.Sprintf(`autonomy_node_calls_total{decision=%q,layer=%q,outcome=%q}`, a.Decision, a.Layer, a.Outcome)).Inc()
}

// WriteMetrics writes the pipeline's metrics in the Prometheus text format.
func (p *Pipeline) WriteMetrics(w io.Writer) { p.metrics.set.WritePrometheus(w) }
