//go:build !race

// The race detector makes sync.Pool forget on purpose.

package wal

import (
	"testing"
)

// Reading allocates nothing, neither per record nor per batch.
func TestReadDoesNotAllocate(t *testing.T) {
	for _, mode := range []Mode{ModeMapped, testMode} {
		t.Run(mode.String(), func(t *testing.T) {
			l, _ := open(t, t.TempDir(), Options{Mode: mode, SegmentBytes: 1 << 20, MaxBytes: 8 << 20})
			last := appendN(t, l, 10_000) // several segments
			wait(t, l, last)
			batches := 0
			if n := testing.AllocsPerRun(20, func() {
				r := Reader{l: l, next: 1}
				for r.next <= last {
					b, err := r.Next(t.Context(), 100, 1<<20)
					if err != nil {
						t.Fatal(err)
					}
					b.Release()
					batches++
				}
			}); n != 0 || batches < 100 {
				t.Fatalf("reading %d records allocates %v times", last, n)
			}
		})
	}
}
