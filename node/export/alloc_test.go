//go:build !race

// The race detector makes sync.Pool forget on purpose.

package export

import (
	"testing"

	"github.com/autonomyops/autonomy/internal/otlp"
)

// TestFrameDoesNotAllocate: a frame's memory is pooled, whatever it holds.
func TestFrameDoesNotAllocate(t *testing.T) {
	for _, body := range []int{200, 8 << 10} {
		items := testItems(100, body)
		framer, h := otlp.NewFramer(testResource), newHold()
		if n := testing.AllocsPerRun(50, func() { newFrame(framer, items, h, viewFrom).unref() }); n >= 1 {
			t.Errorf("%v allocations per frame of 100 records of %d bytes, want 0", n, body)
		}
	}
}
