package main

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/autonomyops/autonomy/bench/walbench/leg"
	daemon "github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/wal"
)

// slots is how many our log gets where a consumer follows, so that it recycles
// them during a leg, as it does in a node.
const slots = 4

// consume is how often the consumer moves the cursors, a durable write of its
// own each time.
const consume = 50 * time.Millisecond

// ours is the log of this project with its default settings, as a node opens it.
type ours struct {
	log  *wal.Log
	sync bool

	stop context.CancelFunc // of the consumer
	done sync.WaitGroup
}

// openOurs opens it in the mode that a node takes on this machine.
func openOurs(dir string, s leg.Spec) (leg.Log, error) {
	ring, err := daemon.RuntimeDir("walbench")
	if err != nil {
		return nil, err
	}
	return openWith(dir, s, wal.Options{Mode: wal.ModeRing, RingDir: ring})
}

// openMapped opens it in the other mode.
func openMapped(dir string, s leg.Spec) (leg.Log, error) {
	return openWith(dir, s, wal.Options{Mode: wal.ModeMapped})
}

func openWith(dir string, s leg.Spec, o wal.Options) (leg.Log, error) {
	o.SegmentBytes, o.MaxBytes = s.Segment, slots*s.Segment
	follow := s.Mode == leg.Durable || s.Mode == leg.NoWait
	if !follow {
		// Everything is kept, frames and markers included, and two slots are free.
		o.MaxBytes += int64(s.Records) * int64(s.Size+40)
	}
	l, _, err := wal.Open(dir, o)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	w := &ours{log: l, sync: s.Sync(), stop: stop}
	if follow {
		w.done.Go(func() {
			for tick := time.Tick(consume); ; {
				select {
				case <-tick:
				case <-ctx.Done():
					return
				}
				// An error shows where it matters: the appends fail, too.
				_ = l.AdvanceAll(l.Durable())
			}
		})
	}
	if s.Frame {
		return newFramed(w, s.Size)
	}
	return w, nil
}

func (w *ours) Append(p []byte) error {
	seq, err := w.log.Append(wal.ClassDecision, p)
	for errors.Is(err, wal.ErrCeilingExceeded) { // the consumer is a little behind
		time.Sleep(time.Millisecond)
		seq, err = w.log.Append(wal.ClassDecision, p)
	}
	if err != nil || !w.sync {
		return err
	}
	return w.log.WaitDurable(context.Background(), seq)
}

// Flush makes everything durable and leaves the log open: a process that ends
// then has crashed, as far as the log can tell.
func (w *ours) Flush() error { return w.log.Sync(context.Background()) }

func (w *ours) Drain(fn func([]byte)) error {
	r := w.log.Reader(1)
	for last := w.log.Durable(); last > 0; {
		b, err := r.Next(context.Background(), 512, 1<<20)
		if err != nil {
			return err
		}
		seq := b.Records[len(b.Records)-1].Seq
		for _, rec := range b.Records {
			fn(rec.Payload)
		}
		b.Release()
		if seq >= last {
			return nil
		}
	}
	return nil
}

func (w *ours) Syncs() (uint64, time.Duration) {
	s := w.log.Stats()
	return s.Syncs, s.SyncTime
}

func (w *ours) Close() error {
	w.stop()
	w.done.Wait()
	return w.log.Close()
}
