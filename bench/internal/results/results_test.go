package results

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestStatistics(t *testing.T) {
	sorted := []time.Duration{10, 20, 30, 40}
	for p, want := range map[int]time.Duration{1: 10, 25: 10, 26: 20, 50: 20, 75: 30, 99: 40, 100: 40} {
		if got := Percentile(sorted, p); got != want {
			t.Errorf("percentile %d = %d, want %d", p, got, want)
		}
	}
	if got := Median([]float64{9, 1, 5}); got != 5 {
		t.Errorf("median of three = %v", got)
	}
	if got := Median([]float64{9, 1, 5, 7}); got != 6 {
		t.Errorf("median of four = %v", got)
	}
	for in, want := range map[float64]float64{123456: 123500, 0.0123456: 0.01235, 0: 0, -12.3456: -12.35} {
		if got := Round(in); got != want {
			t.Errorf("Round(%v) = %v, want %v", in, got, want)
		}
	}
}

func TestRows(t *testing.T) {
	r := NewRow("a", "n", "u", "p", []float64{10, 30, 20}, []float64{5, 10, 10})
	if r.Ours != 20 || r.Value != 10 || r.Ratio != 2 || r.Target != nil || r.Met != nil {
		t.Errorf("%+v", r)
	}
	for _, tt := range []struct {
		row  Row
		want bool
	}{
		{r.AtLeast(2), true}, {r.AtLeast(2.1), false}, {r.AtMost(2), true}, {r.AtMost(1.9), false},
		{Fixed("a", "n", "u", "target", 150, []float64{151}).AtMost(1), false},
		{Fixed("a", "n", "u", "target", 150, []float64{149}).AtMost(1), true},
		// To nothing there is no ratio: then the target is on the value.
		{Fixed("a", "n", "u", "target", 0, []float64{1}).AtMost(0), false},
		{Fixed("a", "n", "u", "target", 0, []float64{0}).AtMost(0), true},
	} {
		if tt.row.Met == nil || *tt.row.Met != tt.want {
			t.Errorf("%+v: want met %v", tt.row, tt.want)
		}
	}
}

// TestWrite runs two areas, one of them twice: each replaces its own part only.
func TestWrite(t *testing.T) {
	out := filepath.Join(t.TempDir(), "results")
	row := func(area string, v float64) []Row {
		return []Row{NewRow(area, "n", "u", "p", []float64{v}, []float64{1})}
	}
	for _, w := range []struct {
		area, page string
		v          float64
	}{{"a", "## first a", 1}, {"b", "## b", 2}, {"a", "## second a", 3}} {
		if err := Write(out, w.area, row(w.area, w.v), w.page); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(filepath.Join(out, "latest.json"))
	if err != nil {
		t.Fatal(err)
	}
	var rows []Row
	if err := json.Unmarshal(data, &rows); err != nil || len(rows) != 2 || rows[0].Ours != 3 || rows[1].Ours != 2 {
		t.Errorf("%v, %s", err, data)
	}
	page, err := os.ReadFile(filepath.Join(out, "latest.md"))
	if err != nil {
		t.Fatal(err)
	}
	for want, n := range map[string]int{"## first a": 0, "## second a": 1, "## b": 1, "# Benchmarks\n": 1} {
		if got := strings.Count(string(page), want); got != n {
			t.Errorf("%q is there %d times, want %d:\n%s", want, got, n, page)
		}
	}
}

// TestWriteRefuses leaves files alone that it cannot read.
func TestWriteRefuses(t *testing.T) {
	for name, data := range map[string]string{
		"latest.json": `{"not":"rows"}`,
		"latest.md":   "# Benchmarks\n<!-- begin a -->\ncut off",
	} {
		t.Run(name, func(t *testing.T) {
			out := t.TempDir()
			file := filepath.Join(out, name)
			if err := os.WriteFile(file, []byte(data), 0o600); err != nil {
				t.Fatal(err)
			}
			err := Write(out, "a", nil, "page")
			if err == nil || !strings.Contains(err.Error(), "remove it") {
				t.Errorf("got %v, want an error that says what to do", err)
			}
			if got, err := os.ReadFile(file); err != nil || string(got) != data {
				t.Errorf("%v, the file is now %q", err, got)
			}
		})
	}
}
