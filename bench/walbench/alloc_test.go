package main

import (
	"runtime"
	"testing"

	"github.com/autonomyops/autonomy/bench/walbench/leg"
)

// perRecord is the allocations of the whole process while fn handles n records.
// What groups of records and batches cost is spread over hundreds of records:
// it stays far below what the gates allow, one allocation per record is far
// above.
func perRecord(n int, fn func()) float64 {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	fn()
	runtime.ReadMemStats(&after)
	return float64(after.Mallocs-before.Mallocs) / float64(n)
}

const gate = 0.05

// TestAllocations is the gate: neither an append nor a record that is read may
// allocate.
func TestAllocations(t *testing.T) {
	const records, size = 20_000, 300
	l, err := openOurs(t.TempDir(), leg.Spec{Mode: leg.Fill, Size: size, Records: 2 * records, Segment: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	w := l.(*ours)
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	p := make([]byte, size)
	add := func() {
		for range records {
			if err := w.Append(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	add() // warms up
	if got := perRecord(records, add); got > gate {
		t.Errorf("%.3f allocations per append, want none", got)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	n := 0
	got := perRecord(2*records, func() {
		if err := w.Drain(func([]byte) { n++ }); err != nil {
			t.Fatal(err)
		}
	})
	if n != 2*records {
		t.Fatalf("%d records were read, want %d", n, 2*records)
	}
	if got > gate {
		t.Errorf("%.3f allocations per drained record, want none", got)
	}
}

var sink []byte

// The gate sees an allocation per record.
func TestGateCanFail(t *testing.T) {
	got := perRecord(1000, func() {
		for range 1000 {
			sink = make([]byte, 8)
		}
	})
	if got <= gate {
		t.Errorf("%.3f allocations per record were counted, want 1", got)
	}
}
