package api

import (
	"fmt"
	"net/http"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/problem"
)

// counters are the control plane's own metrics; the set belongs to one Server.
type counters struct {
	set                                    *metrics.Set
	inserted, deduped, conflicts, rejected *metrics.Counter
	releases, acks                         *metrics.Counter
}

func newCounters(s *Server) counters {
	set := s.set
	gauge := func(name string, f func(store.Stats) float64) {
		set.NewGauge(name, func() float64 { return f(s.o.Store.Stats()) })
	}
	gauge("autonomy_cp_store_bytes", func(st store.Stats) float64 { return float64(st.Bytes) })
	gauge("autonomy_cp_store_max_bytes", func(st store.Stats) float64 { return float64(st.MaxBytes) })
	gauge("autonomy_cp_store_queue", func(st store.Stats) float64 { return float64(st.Queue) })
	gauge("autonomy_cp_store_commits", func(st store.Stats) float64 { return float64(st.Commits) })
	gauge("autonomy_cp_store_pruned_events", func(st store.Stats) float64 { return float64(st.Pruned) })
	set.NewGauge("autonomy_cp_waiters", func() float64 { return float64(s.waiters.Load()) })
	return counters{
		set:       set,
		inserted:  set.NewCounter(`autonomy_cp_events_total{result="inserted"}`),
		deduped:   set.NewCounter(`autonomy_cp_events_total{result="deduped"}`),
		conflicts: set.NewCounter(`autonomy_cp_events_total{result="conflict"}`),
		rejected:  set.NewCounter(`autonomy_cp_events_total{result="rejected"}`),
		releases:  set.NewCounter(`autonomy_cp_releases_published_total`),
		acks:      set.NewCounter(`autonomy_cp_acks_total`),
	}
}

// route is a line of the table, so the label has few values. A histogram, since
// the library's summaries start a goroutine that never ends.
func (c *counters) request(route string, took time.Duration) {
	c.set.GetOrCreateHistogram(fmt.Sprintf("autonomy_cp_request_seconds{route=%q}", route)).Update(took.Seconds())
}

func (c *counters) problem(p *problem.Problem) {
	c.set.GetOrCreateCounter(fmt.Sprintf("autonomy_cp_problems_total{status=%q,code=%q}", fmt.Sprint(p.Status), p.Code)).Inc()
}

func (c *counters) ingest(in store.Ingest, rejected int) {
	c.inserted.Add(in.Inserted)
	c.deduped.Add(in.Deduped)
	c.conflicts.Add(in.Conflicts)
	c.rejected.Add(rejected)
}

func (s *Server) metrics(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	s.set.WritePrometheus(w)
	metrics.WriteProcessMetrics(w)
	return nil
}
