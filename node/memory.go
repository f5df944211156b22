package node

import (
	"log/slog"
	"math"
	"os"
	"path"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// memory keeps the process below a limit of memory (INV-07). The Go runtime is
// told nine tenths of it and collects harder as it comes near; when what is in
// use stays above nine tenths of that all the same, calls are shed until it
// falls.
type memory struct {
	limit  int64       // bytes that the runtime was told; 0: no limit is known
	shed   int64       // bytes in use above which calls are refused
	short  atomic.Bool // they are being refused
	sample []metrics.Sample
	checks time.Duration
}

// memoryChecks is the time between two looks at what is in use.
const memoryChecks = 100 * time.Millisecond

// limitMemory finds the limit: flag (bytes) when it is set, else that of the
// cgroup. GOMEMLIMIT in the environment wins over both: it is there for those
// who know better.
func limitMemory(flag int64, log *slog.Logger) *memory {
	m := &memory{sample: []metrics.Sample{
		{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}, {Name: "/memory/classes/heap/free:bytes"},
	}, checks: memoryChecks}
	limit, from := flag, "--memory-limit"
	if limit == 0 {
		limit, from = cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup"), "cgroup"
	}
	switch own := debug.SetMemoryLimit(-1); {
	case own != math.MaxInt64:
		m.limit, from = own, "GOMEMLIMIT"
	case limit > 0:
		m.limit = limit / 10 * 9
		debug.SetMemoryLimit(m.limit)
	default:
		return m
	}
	m.shed = m.limit / 10 * 9
	log.Info("memory limit", "bytes", m.limit, "from", from)
	return m
}

// watch keeps short up to date until done is closed.
func (m *memory) watch(done <-chan struct{}) {
	if m.limit == 0 {
		return
	}
	tick := time.NewTicker(m.checks)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			m.short.Store(m.inUse() > m.shed)
		}
	}
}

// inUse is what the runtime holds of the system and cannot give back at once.
func (m *memory) inUse() int64 {
	metrics.Read(m.sample)
	return int64(m.sample[0].Value.Uint64() - m.sample[1].Value.Uint64() - m.sample[2].Value.Uint64())
}

// unlimited is above what any machine has: version 1 says "none" with a number.
const unlimited = 1 << 60

// cgroupMemory is the least memory limit of the cgroup that self names and of
// those above it, under root; 0 when there is none. Version 2 and 1.
func cgroupMemory(self, root string) int64 {
	data, err := os.ReadFile(self)
	if err != nil {
		return 0
	}
	least := int64(unlimited)
	for line := range strings.Lines(string(data)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		dir, file := "", "memory.max"
		switch {
		case parts[0] == "0" && parts[1] == "":
		case strings.Contains(","+parts[1]+",", ",memory,"):
			dir, file = "memory", "memory.limit_in_bytes"
		default:
			continue
		}
		// In a container the path is often one that is not mounted here: then
		// the mount's own top is the limit.
		for p := path.Clean("/" + parts[2]); ; p = path.Dir(p) {
			text, err := os.ReadFile(path.Join(root, dir, p, file))
			if err == nil {
				if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && n > 0 {
					least = min(least, n)
				}
			}
			if p == "/" {
				break
			}
		}
	}
	if least == unlimited {
		return 0
	}
	return least
}
