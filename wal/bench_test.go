package wal

import (
	"context"
	"fmt"
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
	for range 12_000 {
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
