package metric_test

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/metric"
)

var table = metric.Table{
	{Name: "x_calls_total", Type: metric.TypeCounter, Unit: "calls", Labels: "a,b", Help: "Calls."},
	{Name: "x_wait_seconds", Type: metric.TypeHistogram, Unit: "seconds", Help: "Wait."},
	{Name: "x_unused", Type: metric.TypeGauge, Unit: "bytes", Help: "Never written."},
}

func TestExpose(t *testing.T) {
	var h metric.Histogram
	at := time.Unix(1767225600, 5e8)
	h.Observe(20*time.Microsecond, "log-1", at)
	h.Observe(25*time.Microsecond, "log-2", at.Add(time.Millisecond)) // too soon for another exemplar
	h.Observe(time.Minute, "", at)
	var c metric.Counter
	c.Inc()
	c.Inc()
	fill := func(open bool) string {
		b := metric.NewBuffer(open)
		b.Uint("y_foreign", "", 1)
		b.Uint("x_calls_total", `a="1"`, c.Value())
		b.Histogram("x_wait_seconds", &h)
		b.Uint("y_foreign", `q="0"`, 2)
		b.Float("x_calls_total", `a="2"`, 0.5)
		var out strings.Builder
		if err := b.Expose(&out, table); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	plain, open := fill(false), fill(true)
	for _, want := range []string{
		"# HELP x_calls_total Calls.\n# TYPE x_calls_total counter\nx_calls_total{a=\"1\"} 2\nx_calls_total{a=\"2\"} 0.5\n# HELP x_wait_seconds Wait.\n# TYPE x_wait_seconds histogram\n",
		"x_wait_seconds_bucket{le=\"1e-05\"} 0\nx_wait_seconds_bucket{le=\"2.5e-05\"} 2\n",
		"x_wait_seconds_bucket{le=\"10\"} 2\nx_wait_seconds_bucket{le=\"+Inf\"} 3\nx_wait_seconds_sum 60.000045\nx_wait_seconds_count 3\ny_foreign 1\ny_foreign{q=\"0\"} 2\n",
	} {
		if !strings.Contains(plain, want) {
			t.Errorf("missing %q in\n%s", want, plain)
		}
	}
	for _, want := range []string{
		"# TYPE x_calls counter\n# UNIT x_calls calls\nx_calls_total{a=\"1\"} 2\n",
		"# UNIT x_wait_seconds seconds\n",
		`x_wait_seconds_bucket{le="2.5e-05"} 2 # {audit_id="log-1"} 2e-05 1767225600.500` + "\n",
	} {
		if !strings.Contains(open, want) {
			t.Errorf("missing %q in\n%s", want, open)
		}
	}
	if !strings.HasSuffix(open, "# EOF\n") || strings.Contains(plain, "#  {") || strings.Contains(plain, "EOF") || strings.Contains(plain, "x_unused") {
		t.Errorf("plain:\n%s\nopen:\n%s", plain, open)
	}
	if got := strings.Join(table.Families([]byte(plain)), " "); got != "x_calls_total x_wait_seconds y_foreign" {
		t.Errorf("families %s", got)
	}
}

func TestObserve(t *testing.T) {
	var h metric.Histogram
	now := time.Now()
	if n := testing.AllocsPerRun(100, func() { h.Observe(time.Millisecond, "id", now) }); n != 0 {
		t.Errorf("%.0f allocations", n)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 1000 {
				h.Observe(time.Duration(i)*time.Millisecond, "id", now.Add(time.Duration(i)*time.Second))
				if i%100 == 0 {
					metric.NewBuffer(true).Histogram("x", &h)
				}
			}
		})
	}
	wg.Wait()
	b := metric.NewBuffer(false)
	b.Histogram("x", &h)
	var out strings.Builder
	if err := b.Expose(&out, nil); err != nil || !strings.Contains(out.String(), "x_count 4101\n") {
		t.Errorf("%v\n%s", err, out.String())
	}
}
