package node

import (
	"fmt"
	"io"
	"slices"

	"github.com/VictoriaMetrics/metrics"

	"github.com/autonomyops/autonomy/internal/metric"
	"github.com/autonomyops/autonomy/node/call"
)

// Metrics is everything of its own that a node exposes on GET /metrics; beside
// it stand go_… and process_…, as VictoriaMetrics/metrics writes them. The page
// docs/metrics.md is made from it (TestMetricsPage). Names are stable: a changed
// one is a breaking change.
var Metrics = slices.Concat(call.Metrics, metric.Table{
	{Name: "autonomy_node_wal_durable_seq", Type: metric.TypeGauge, Unit: "records", Help: "Sequence number of the last record that is on disk."},
	{Name: "autonomy_node_wal_used_bytes", Type: metric.TypeGauge, Unit: "bytes", Help: "Bytes of the log that hold records not yet delivered."},
	{Name: "autonomy_node_wal_max_bytes", Type: metric.TypeGauge, Unit: "bytes", Help: "Ceiling of the log (--wal-max-bytes)."},
	{Name: "autonomy_node_wal_syncs_total", Type: metric.TypeCounter, Unit: "syncs", Help: "Times the log was flushed to disk."},
	{Name: "autonomy_node_wal_synced_records_total", Type: metric.TypeCounter, Unit: "records",
		Help: "Records those flushes made durable; divided by them, how many share one."},
	{Name: "autonomy_node_export_records_total", Type: metric.TypeCounter, Unit: "records", Help: "Records the export endpoint has acknowledged."},
	{Name: "autonomy_node_export_failures_total", Type: metric.TypeCounter, Unit: "requests", Help: "Export requests that failed and are tried again."},
	{Name: "autonomy_node_export_rejected_records_total", Type: metric.TypeCounter, Unit: "records", Help: "Records the endpoint refused for ever."},
	{Name: "autonomy_node_export_resent_records_total", Type: metric.TypeCounter, Unit: "records",
		Help: "Records sent again because the control plane did not hold them."},
	{Name: "autonomy_node_export_pending_records", Type: metric.TypeGauge, Unit: "records", Help: "Durable records not yet delivered."},
	{Name: "autonomy_node_export_exhausted", Type: metric.TypeGauge, Unit: "boolean", Help: "1 when export waits for an operator."},
	{Name: "autonomy_node_assurance_level", Type: metric.TypeGauge, Unit: "boolean", Labels: "level", Help: "1 for the platform's level: none, reduced or full."},
	{Name: "autonomy_node_policy_active", Type: metric.TypeGauge, Unit: "boolean", Help: "1 while a policy is in force; without one every call is denied."},
	{Name: "autonomy_node_policy_serving", Type: metric.TypeGauge, Unit: "boolean", Labels: "slot", Help: "1 for what answers calls: active, lkg, local (--policy), none."},
	{Name: "autonomy_node_policy_shadow_calls", Type: metric.TypeGauge, Unit: "calls", Labels: "result",
		Help: "Calls that the policy in shadow was asked too, by how its answer compares: same, stricter, looser, other, failed, skipped. 0 while there is none."},
	{Name: "autonomy_node_policy_slot_faults", Type: metric.TypeGauge, Unit: "slots", Help: "Policy slots found damaged at start."},
	{Name: "autonomy_node_mcp_sessions", Type: metric.TypeGauge, Unit: "sessions", Help: "Open MCP sessions, of the protocol's revisions before 2026-07-28."},
	{Name: "autonomy_node_mcp_upstream_links", Type: metric.TypeGauge, Unit: "links", Labels: "server", Help: "Processes or sessions of an upstream MCP server that live."},
	{Name: "autonomy_node_mcp_upstream_restarts", Type: metric.TypeGauge, Unit: "restarts", Labels: "server",
		Help: "Restarts on an upstream MCP server's account; at its max_restarts it stays down."},
	{Name: "autonomy_node_mcp_upstream_changed", Type: metric.TypeGauge, Unit: "tools", Labels: "server",
		Help: "Tools that an upstream MCP server defines otherwise than when they were accepted: refused."},
	{Name: "autonomy_node_memory_limit_bytes", Type: metric.TypeGauge, Unit: "bytes", Help: "What the Go runtime keeps its memory below; 0: no limit is known."},
	{Name: "autonomy_node_credentials_refused_total", Type: metric.TypeCounter, Unit: "requests", Labels: "credential", Help: "Credentials that were shown and did not hold: certificate, token."},
	{Name: "autonomy_node_calls_limited_total", Type: metric.TypeCounter, Unit: "calls", Labels: "limit", Help: "Calls refused with 429 by a limit of their caller: rate, concurrent, budget."},
})

// writeMetrics writes all of Metrics and returns the content type.
func (n *node) writeMetrics(w io.Writer, openMetrics bool) string {
	b := metric.NewBuffer(openMetrics)
	n.pipeline.WriteMetrics(b)
	if n.exporter != nil {
		n.exporter.WriteMetrics(b)
	}
	st := n.wal.Stats()
	b.Uint("autonomy_node_wal_durable_seq", "", st.DurableSeq)
	b.Uint("autonomy_node_wal_used_bytes", "", uint64(st.UsedBytes))
	b.Uint("autonomy_node_wal_max_bytes", "", uint64(st.MaxBytes))
	b.Uint("autonomy_node_wal_syncs_total", "", st.Syncs)
	b.Uint("autonomy_node_wal_synced_records_total", "", st.SyncedRecords)
	b.Uint("autonomy_node_assurance_level", fmt.Sprintf("level=%q", n.report.Load().Level), 1)
	n.policyMetrics(b)
	b.Uint("autonomy_node_mcp_sessions", "", uint64(n.mcp.Stats().Sessions))
	for _, u := range n.tools.Load().Upstreams() {
		server := fmt.Sprintf("server=%q", u.Server)
		b.Uint("autonomy_node_mcp_upstream_links", server, uint64(u.Links))
		b.Uint("autonomy_node_mcp_upstream_restarts", server, uint64(u.Restarts))
		b.Uint("autonomy_node_mcp_upstream_changed", server, uint64(len(u.Changed)))
	}
	b.Uint("autonomy_node_memory_limit_bytes", "", uint64(n.memory.limit))
	n.writeCallerMetrics(b)
	metrics.WriteProcessMetrics(b)
	_ = b.Expose(w, Metrics) // the answer's buffer takes everything
	return b.ContentType()
}
