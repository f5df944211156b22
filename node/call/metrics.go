package call

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/autonomyops/autonomy/internal/metric"
)

// Metrics are the pipeline's part of the node's table. Names are stable.
var Metrics = metric.Table{
	{Name: "autonomy_node_calls_total", Type: metric.TypeCounter, Unit: "calls", Labels: "decision,layer,outcome",
		Help: "Calls answered, by decision, by the layer that denied, and by the tool's outcome."},
	{Name: "autonomy_node_calls_in_flight", Type: metric.TypeGauge, Unit: "calls", Help: "Calls in the pipeline now."},
	{Name: "autonomy_node_call_seconds", Type: metric.TypeHistogram, Unit: "seconds",
		Help: "Time of a whole call in the pipeline, from the decoded request to the answer."},
	{Name: "autonomy_node_policy_evaluation_seconds", Type: metric.TypeHistogram, Unit: "seconds", Help: "Time in the policy evaluator."},
	{Name: "autonomy_node_decision_durable_wait_seconds", Type: metric.TypeHistogram, Unit: "seconds",
		Help: "Time that a decision waited to be on disk, with durability strict."},
	{Name: "autonomy_node_tool_seconds", Type: metric.TypeHistogram, Unit: "seconds", Help: "Time in the tool."},
	{Name: "autonomy_node_action_records_lost_total", Type: metric.TypeCounter, Unit: "records",
		Help: "Tools that ran and whose action record could not be written."},
	{Name: "autonomy_node_admission_running", Type: metric.TypeGauge, Unit: "calls", Help: "Calls that hold a place (--max-in-flight)."},
	{Name: "autonomy_node_admission_waiting", Type: metric.TypeGauge, Unit: "calls", Help: "Calls that wait for a place."},
	{Name: "autonomy_node_admission_refused_total", Type: metric.TypeCounter, Unit: "calls", Labels: "why",
		Help: "Calls refused with 429 before anything was evaluated: the queue was full, the wait too long, memory short."},
}

// counters of one pipeline. No call takes a lock for them.
type counters struct {
	inFlight    atomic.Int64
	eval        metric.Histogram
	durable     metric.Histogram
	tool        metric.Histogram
	total       metric.Histogram
	lostActions metric.Counter
	calls       map[ending]*metric.Counter // made once, of all endings there are
	other       metric.Counter             // of an ending that is in none: there should be none
}

// ending is how a call can end.
type ending struct{ decision, layer, outcome string }

func (c *counters) init() {
	c.calls = map[ending]*metric.Counter{}
	for _, decision := range []string{"allow", "deny", "pending"} {
		for _, layer := range []string{"", LayerRequest, LayerPolicy, LayerRuntime, LayerAudit, LayerAssurance} {
			for _, outcome := range []string{"", "ok", "error", "timeout", "killed"} {
				c.calls[ending{decision, layer, outcome}] = &metric.Counter{}
			}
		}
	}
}

// observe counts one call.
func (c *counters) observe(r *Report, now time.Time) {
	a := &r.Answer
	if n := c.calls[ending{a.Decision, a.Layer, a.Outcome}]; n != nil {
		n.Inc()
	} else {
		c.other.Inc()
	}
	c.total.Observe(r.Total, a.AuditID, now)
	if r.Eval > 0 {
		c.eval.Observe(r.Eval, a.AuditID, now)
	}
	if r.Durable > 0 {
		c.durable.Observe(r.Durable, a.AuditID, now)
	}
	if r.Tool > 0 {
		c.tool.Observe(r.Tool, a.AuditID, now)
	}
}

// WriteMetrics writes the pipeline's metrics.
func (p *Pipeline) WriteMetrics(b *metric.Buffer) {
	c := &p.metrics
	var ends []ending
	for e := range c.calls {
		ends = append(ends, e)
	}
	slices.SortFunc(ends, func(a, b ending) int {
		return strings.Compare(a.decision+a.layer+a.outcome, b.decision+b.layer+b.outcome)
	})
	for _, e := range ends {
		if n := c.calls[e].Value(); n > 0 {
			b.Uint("autonomy_node_calls_total", fmt.Sprintf("decision=%q,layer=%q,outcome=%q", e.decision, e.layer, e.outcome), n)
		}
	}
	if n := c.other.Value(); n > 0 {
		b.Uint("autonomy_node_calls_total", `decision="other",layer="",outcome=""`, n)
	}
	b.Float("autonomy_node_calls_in_flight", "", float64(c.inFlight.Load()))
	b.Histogram("autonomy_node_call_seconds", &c.total)
	b.Histogram("autonomy_node_policy_evaluation_seconds", &c.eval)
	b.Histogram("autonomy_node_decision_durable_wait_seconds", &c.durable)
	b.Histogram("autonomy_node_tool_seconds", &c.tool)
	b.Uint("autonomy_node_action_records_lost_total", "", c.lostActions.Value())
	p.gate.writeMetrics(b)
}
