package export

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/otlp"
)

// TestFault: a mapping whose file was cut is an error, not the end of the process.
func TestFault(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "slot"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(8 << 10); err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 8<<10, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	items := []item{{seq: 1, payload: m[5000:5100]}}
	if fr, err := guardedFrame(otlp.NewFramer(testResource), items, newHold(), viewFrom); err != nil {
		t.Fatal(err)
	} else {
		fr.unref()
	}
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if _, err := guardedFrame(otlp.NewFramer(testResource), items, newHold(), viewFrom); !errors.Is(err, errFault) {
		t.Errorf("framing a cut file: %v, want a fault", err)
	}
}
