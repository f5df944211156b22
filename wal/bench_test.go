package wal

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func benchLog(b *testing.B) *Log {
	l, _ := open(b, b.TempDir(), Options{SegmentBytes: 16 << 20, MaxBytes: 64 << 20})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { // a consumer, so that slots are recycled
		for ctx.Err() == nil {
			if err := l.AdvanceAll(l.Durable()); err != nil {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	b.Cleanup(func() { cancel(); wg.Wait() })
	return l
}

const benchRecord = 300

// benchAppend retries at the ceiling: the consumer is a little behind.
func benchAppend(b *testing.B, l *Log, p []byte) uint64 {
	for {
		seq, err := l.Append(ClassDecision, p)
		if err == nil {
			return seq
		}
		if l.Stats().Failed != "" {
			b.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, writers := range []int{1, 8} {
		b.Run(fmt.Sprintf("nowait/writers=%d", writers), func(b *testing.B) {
			l := benchLog(b)
			b.ReportAllocs()
			b.SetBytes(benchRecord)
			b.ResetTimer()
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					p := make([]byte, benchRecord)
					for i := w; i < b.N; i += writers {
						benchAppend(b, l, p)
					}
				})
			}
			wg.Wait()
		})
	}
	for _, waiters := range []int{1, 8, 64, 1024} {
		b.Run(fmt.Sprintf("durable/waiters=%d", waiters), func(b *testing.B) {
			l := benchLog(b)
			before := l.Stats()
			var n atomic.Int64
			b.ReportAllocs()
			b.ResetTimer()
			var wg sync.WaitGroup
			for range waiters {
				wg.Go(func() {
					p := make([]byte, benchRecord)
					for n.Add(1) <= int64(b.N) {
						if err := l.WaitDurable(context.Background(), benchAppend(b, l, p)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			after := l.Stats()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
			b.ReportMetric(float64(after.SyncedRecords-before.SyncedRecords)/float64(max(1, after.Syncs-before.Syncs)), "records/sync")
		})
	}
}

func BenchmarkDrain(b *testing.B) {
	l := benchLog(b)
	var last uint64
	p := make([]byte, 1024)
	for range 40_000 { // more than two segments
		last = benchAppend(b, l, p)
	}
	if err := l.WaitDurable(context.Background(), last); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(p)))
	b.ResetTimer()
	for n := 0; n < b.N; {
		r := l.Reader(1)
		for r.next <= last && n < b.N {
			batch, err := r.Next(context.Background(), 512, 1<<20)
			if err != nil {
				b.Fatal(err)
			}
			n += len(batch.Records)
			batch.Release()
		}
	}
}

// BenchmarkLatency gives percentiles of one append that waits for nothing, in
// bursts that leave the disk time to follow, and what measuring itself costs.
func BenchmarkLatency(b *testing.B) {
	l := benchLog(b)
	p := make([]byte, benchRecord)
	const burst = 2000
	took := make([]time.Duration, 0, b.N)
	clock := make([]time.Duration, 0, b.N)
	for len(took) < b.N {
		for range min(burst, b.N-len(took)) {
			begin := time.Now()
			seq, err := l.Append(ClassDecision, p)
			took = append(took, time.Since(begin))
			if err != nil {
				b.Fatal(err)
			}
			_ = seq
			begin = time.Now()
			clock = append(clock, time.Since(begin))
		}
		if err := l.Sync(b.Context()); err != nil {
			b.Fatal(err)
		}
		if err := l.AdvanceAll(l.Durable()); err != nil {
			b.Fatal(err)
		}
	}
	slices.Sort(took)
	slices.Sort(clock)
	at := func(d []time.Duration, q float64) float64 { return float64(d[int(q*float64(len(d)-1))]) }
	b.ReportMetric(at(took, 0.5), "p50-ns")
	b.ReportMetric(at(took, 0.99), "p99-ns")
	b.ReportMetric(at(took, 0.999), "p99.9-ns")
	b.ReportMetric(at(clock, 0.5), "clock-ns")
}

// BenchmarkFloor alternates a raw overwrite of one page with fdatasync, a raw
// direct write of one page, and one durable append, so that all see the same
// disk.
func BenchmarkFloor(b *testing.B) {
	l := benchLog(b)
	f, err := os.CreateTemp(b.TempDir(), "raw")
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	page := pageAligned(pageSize)
	for i := range int64(1024) {
		if _, err := f.WriteAt(page, i*pageSize); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	d, err := openDirect(f.Name())
	if err != nil {
		b.Skip("skipped: no direct writes here: ", err)
	}
	defer d.Close()
	p := make([]byte, benchRecord)
	var took [3][]time.Duration
	for i := range b.N {
		off := int64(i%1024) * pageSize
		begin := time.Now()
		page[0]++
		if _, err := f.WriteAt(page, off); err != nil {
			b.Fatal(err)
		}
		if err := fdatasync(f); err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if err := pwritev(d, [][]byte{page}, off); err != nil {
			b.Fatal(err)
		}
		t2 := time.Now()
		if err := l.WaitDurable(b.Context(), benchAppend(b, l, p)); err != nil {
			b.Fatal(err)
		}
		t3 := time.Now()
		took[0], took[1], took[2] = append(took[0], t1.Sub(begin)), append(took[1], t2.Sub(t1)), append(took[2], t3.Sub(t2))
	}
	var m [3]float64
	for i := range took {
		slices.Sort(took[i])
		m[i] = float64(took[i][len(took[i])/2])
	}
	b.ReportMetric(m[0], "fdatasync-ns")
	b.ReportMetric(m[1], "direct-ns")
	b.ReportMetric(m[2], "append-ns")
	b.ReportMetric(m[2]/m[0], "x-fdatasync")
	b.ReportMetric(m[2]/m[1], "x-direct")
}

// BenchmarkOpen opens a log of 1 GiB that is in the page cache.
func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir()
	o := inMode(Options{SegmentBytes: 64 << 20, MaxBytes: 1 << 30})
	l, _ := open(b, dir, o)
	p := make([]byte, benchRecord)
	for {
		if _, err := l.Append(ClassDecision, p); err != nil {
			break
		}
	}
	if err := l.Sync(b.Context()); err != nil {
		b.Fatal(err)
	}
	bytes := l.Stats().UsedBytes
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	for _, full := range []bool{false, true} {
		b.Run(fmt.Sprintf("verify=%v", full), func(b *testing.B) {
			o.VerifyOnOpen = full
			if l, _, err := Open(dir, o); err != nil { // warm
				b.Fatal(err)
			} else if err := l.Close(); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(bytes)
			var took time.Duration
			best := time.Hour
			b.ResetTimer()
			for range b.N {
				l, rec, err := Open(dir, o)
				if err != nil {
					b.Fatal(err)
				}
				took += rec.Duration
				best = min(best, rec.Duration)
				b.StopTimer()
				if err := l.Close(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(took.Milliseconds())/float64(b.N), "open-ms")
			b.ReportMetric(float64(best.Milliseconds()), "best-ms")
		})
	}
}
