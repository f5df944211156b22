package conf

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes, written as 64MiB, 1GiB, 500MB or a plain number.
// It is a pflag.Value.
type Size int64

var units = []struct {
	suffix string
	bytes  int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1}, {"", 1},
}

// Set parses s.
func (z *Size) Set(s string) error {
	for _, u := range units {
		num, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(num), 64)
		if err != nil || n < 0 || n*float64(u.bytes) > math.MaxInt64 || math.IsNaN(n) {
			break
		}
		*z = Size(n * float64(u.bytes))
		return nil
	}
	return fmt.Errorf("size %q: want a number with KiB, MiB, GiB or TiB, as in 64MiB", s)
}

// String writes z in the largest binary unit that divides it.
func (z Size) String() string {
	for i := 3; i >= 0; i-- {
		if u := units[i]; z != 0 && int64(z)%u.bytes == 0 {
			return strconv.FormatInt(int64(z)/u.bytes, 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(z), 10)
}

// Type names the value in --help.
func (z *Size) Type() string { return "size" }
