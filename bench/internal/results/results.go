// Package results is what the benchmarks under bench/ share: the statistics, the
// description of the machine, and the two files they write.
//
// Each benchmark owns an area. latest.json holds the rows of all areas,
// latest.md a page with a section for each; Write replaces those of one area and
// keeps the rest. Nothing here is safe for concurrent use, and two benchmarks
// must not run at once anyway. Only programs under bench/ import it.
package results

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/bench/walbench/leg"
	"github.com/autonomyops/autonomy/internal/vfs"
)

// A Row of latest.json. Ratio is ours/peer, the median of the ratios within each
// repetition. Target bounds Ratio, or Ours where the peer's value is 0; it and
// Met are null where nobody has set a target.
type Row struct {
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

// NewRow compares what both sides did, repetition by repetition.
func NewRow(area, name, unit, peer string, ours, theirs []float64) Row {
	return Row{Area: area, Name: name, Ours: Round(Median(ours)), Peer: peer, Value: Round(Median(theirs)),
		Ratio: Round(Ratio(ours, theirs)), Unit: unit}
}

// Fixed compares with one value, such as a target in absolute figures.
func Fixed(area, name, unit, peer string, value float64, ours []float64) Row {
	return NewRow(area, name, unit, peer, ours, slices.Repeat([]float64{value}, len(ours)))
}

// AtLeast sets a target that the ratio must reach.
func (r Row) AtLeast(target float64) Row { return r.target(target, r.bounded() >= target) }

// AtMost sets a target that the ratio must not pass.
func (r Row) AtMost(target float64) Row { return r.target(target, r.bounded() <= target) }

func (r Row) bounded() float64 {
	if r.Value == 0 {
		return r.Ours
	}
	return r.Ratio
}

func (r Row) target(t float64, met bool) Row {
	r.Target, r.Met = &t, &met
	return r
}

// Ratio is the median of ours/theirs, repetition by repetition.
func Ratio(ours, theirs []float64) float64 {
	rs := make([]float64, min(len(ours), len(theirs)))
	for i := range rs {
		rs[i] = ours[i] / theirs[i]
	}
	return Median(rs)
}

// Median of an even number is the mean of the two in the middle.
func Median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// Percentile is the smallest value that p percent of sorted do not exceed.
func Percentile(sorted []time.Duration, p int) time.Duration { return leg.Percentile(sorted, p) }

// Round keeps four significant digits: more is noise.
func Round(v float64) float64 {
	if v == 0 || math.IsInf(v, 0) || math.IsNaN(v) {
		return 0 // JSON has no such numbers; a ratio to nothing is none
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}

const title = "# Benchmarks\n\nWritten by `make bench`; the rows are in latest.json.\n"

// Write puts the rows and the page of one area into the files in dir.
func Write(dir, area string, rows []Row, page string) error {
	all, err := readRows(filepath.Join(dir, "latest.json"))
	if err != nil {
		return err
	}
	text, err := readPage(filepath.Join(dir, "latest.md"))
	if err != nil {
		return err
	}
	begin, end := "<!-- begin "+area+" -->\n", "<!-- end "+area+" -->\n"
	section := begin + strings.TrimSpace(page) + "\n" + end
	if before, rest, ok := strings.Cut(text, begin); ok {
		_, after, ok := strings.Cut(rest, end)
		if !ok {
			return fmt.Errorf("%s: the section of %s has no end: remove it", filepath.Join(dir, "latest.md"), area)
		}
		text = before + section + after
	} else {
		text += "\n" + section
	}

	at := slices.IndexFunc(all, func(r Row) bool { return r.Area == area })
	all = slices.DeleteFunc(all, func(r Row) bool { return r.Area == area })
	if at < 0 {
		at = len(all)
	}
	data, err := json.MarshalIndent(slices.Insert(all, at, rows...), "", "  ")
	if err != nil {
		return err
	}
	if err := vfs.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := vfs.WriteFile(filepath.Join(dir, "latest.json"), append(data, '\n'), 0o644); err != nil {
		return err
	}
	return vfs.WriteFile(filepath.Join(dir, "latest.md"), []byte(text), 0o644)
}

func readRows(file string) (rows []Row, err error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &rows)
	}
	if err != nil {
		return nil, fmt.Errorf("%s is not of this program: remove it: %w", file, err)
	}
	return rows, nil
}

func readPage(file string) (string, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return title, nil
	}
	return string(data), err
}
