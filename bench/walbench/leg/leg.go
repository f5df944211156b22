// Package leg measures one write-ahead log in one process: it is the same code
// for ours and for the peers, which live in another module (there its files are
// symbolic links to these), so that both are asked the same in the same way.
//
// The life of a leg: the harness starts the program with a Spec as JSON in its
// only argument; Main opens the log named there in an empty directory, warms
// up, measures, and prints a Result as JSON. A process measures once: its heap,
// its page faults and /proc/self/io are of that leg only.
//
// Units: bytes; durations are nanoseconds. It imports the standard library only.
package leg

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A Log is what is measured.
type Log interface {
	// Append adds p, in a log opened with Sync durably when it returns. It is
	// called by many goroutines at once.
	Append(p []byte) error
	// Close ends the log.
	Close() error
}

// A Batcher appends several records with one sync: what "the same batching as
// ours" is made of. It is called by one goroutine.
type Batcher interface {
	AppendBatch(ps [][]byte) error
}

// A Drainer reads the whole log, oldest first, as its own readers do.
type Drainer interface {
	Drain(fn func(p []byte)) error
}

// A Syncer counts the syncs that made records durable, and the time they took.
type Syncer interface {
	Syncs() (n uint64, took time.Duration)
}

// Open opens or makes the log in dir.
type Open func(dir string, s Spec) (Log, error)

// The modes of a leg.
const (
	// Durable appends from Waiters goroutines, each waiting until its record is
	// on disk.
	Durable = "durable"
	// NoWait appends Records records from one goroutine, twice: once for the
	// mean and the allocations, once with a clock reading between any two.
	NoWait = "nowait"
	// Fill appends Records records, makes them durable, and ends without
	// closing, as a crash does.
	Fill = "fill"
	// Read opens what Fill left and drains it.
	Read = "read"
)

// A Spec says what a leg does.
type Spec struct {
	Side    string `json:"side"`
	Mode    string `json:"mode"`
	Dir     string `json:"dir"`     // exists; empty except for Read
	Size    int    `json:"size"`    // of a record
	Waiters int    `json:"waiters"` // Durable
	// Batch puts this package's batching before the log, which must be a
	// Batcher.
	Batch   bool          `json:"batch"`
	Warmup  time.Duration `json:"warmup"`  // Durable
	Measure time.Duration `json:"measure"` // Durable
	Records int           `json:"records"` // NoWait, Fill; Read: how many there must be
	// Frame: the records are OTLP, and a drain frames them as export requests.
	Frame bool `json:"frame"`
	// Segment is the size of the files that a log goes through, if it can be told.
	Segment int64 `json:"segment"`
	// MaxBytes ends a Durable leg early, when so many bytes of records were
	// appended: a peer that never reuses space must not fill the disk.
	MaxBytes int64 `json:"max_bytes"`
}

// Sync says whether an append is to be durable on return.
func (s Spec) Sync() bool { return s.Mode == Durable }

// A Result is what a leg found. Fields that its mode does not measure are 0.
type Result struct {
	Records int64         `json:"records"` // measured
	Took    time.Duration `json:"took"`
	// Per append: Durable and NoWait. Of NoWait they include one reading of the
	// clock, Clock.
	P50   time.Duration `json:"p50"`
	P99   time.Duration `json:"p99"`
	Max   time.Duration `json:"max"`
	Clock time.Duration `json:"clock"`

	Allocs float64 `json:"allocs"` // per record, of the whole process; in Read of the drain
	Heap   float64 `json:"heap"`   // bytes allocated per record

	Syncs    int64         `json:"syncs"` // 0: the log does not count them
	SyncTime time.Duration `json:"sync_time"`

	Wrote  int64 `json:"wrote"`  // /proc/self/io write_bytes: pages made dirty, and direct writes
	Device int64 `json:"device"` // sectors that the whole device wrote, in bytes; 0: unknown

	Open time.Duration `json:"open"` // Read
	RSS  int64         `json:"rss"`  // Read: resident memory after open and drain
	Anon int64         `json:"anon"` // the part of it that no file backs
}

// Main is a program that measures one leg: opens maps sides to logs.
func Main(args []string, opens map[string]Open) int {
	res, err := run(args, opens)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(res)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func run(args []string, opens map[string]Open) (Result, error) {
	if len(args) != 1 {
		return Result{}, errors.New("want one argument, the leg as JSON: walbench starts this program")
	}
	var s Spec
	if err := json.Unmarshal([]byte(args[0]), &s); err != nil {
		return Result{}, fmt.Errorf("read the leg: %w", err)
	}
	open, ok := opens[s.Side]
	if !ok {
		return Result{}, fmt.Errorf("there is no side %q", s.Side)
	}
	return Run(s, open)
}

// Run measures one leg in this process.
func Run(s Spec, open Open) (Result, error) {
	if s.Size < 1 {
		return Result{}, fmt.Errorf("record size %d, want at least 1", s.Size)
	}
	var res Result
	var err error
	switch s.Mode {
	case Durable:
		res, err = durable(s, open)
	case NoWait:
		res, err = noWait(s, open)
	case Fill:
		res, err = fill(s, open)
	case Read:
		res, err = read(s, open)
	default:
		err = fmt.Errorf("there is no mode %q", s.Mode)
	}
	if err != nil {
		return Result{}, fmt.Errorf("%s, %s: %w", s.Side, s.Mode, err)
	}
	return res, nil
}

// payload is a record that no compression makes smaller.
func payload(size int) []byte {
	p := make([]byte, size)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

// latencies bounds what one goroutine keeps; beyond it, it keeps counting.
const latencies = 1 << 20

func durable(s Spec, open Open) (_ Result, err error) {
	if s.Waiters < 1 {
		return Result{}, fmt.Errorf("%d waiters, want at least 1", s.Waiters)
	}
	log, err := open(s.Dir, s)
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	add := log.Append
	if s.Batch {
		b, ok := log.(Batcher)
		if !ok {
			return Result{}, errors.New("it takes no batches")
		}
		g := newBatching(b)
		defer g.stop()
		add = g.append
	}
	p := payload(s.Size)
	var budget atomic.Int64 // bytes
	budget.Store(s.MaxBytes)
	kept := make([][]time.Duration, s.Waiters)
	for i := range kept {
		kept[i] = make([]time.Duration, 0, min(latencies, 4*latencies/s.Waiters))
	}
	round := func(d time.Duration, keep bool) (int64, error) {
		var wg sync.WaitGroup
		var failed atomic.Pointer[error]
		var records atomic.Int64
		until := time.Now().Add(d)
		for w := range s.Waiters {
			wg.Go(func() {
				n := int64(0)
				defer func() { records.Add(n) }()
				for begin := time.Now(); begin.Before(until) && failed.Load() == nil && budget.Add(-int64(s.Size)) > 0; {
					if err := add(p); err != nil {
						why := err // err itself would be allocated in every turn
						failed.Store(&why)
						return
					}
					end := time.Now()
					if keep && len(kept[w]) < cap(kept[w]) {
						kept[w] = append(kept[w], end.Sub(begin))
					}
					begin = end
					n++
				}
			})
		}
		wg.Wait()
		if err := failed.Load(); err != nil {
			return 0, *err
		}
		return records.Load(), nil
	}
	if _, err := round(s.Warmup, false); err != nil {
		return Result{}, err
	}
	budget.Store(s.MaxBytes)
	runtime.GC()
	m := begin(s.Dir, log)
	n, err := round(s.Measure, true)
	if err != nil {
		return Result{}, err
	}
	res, err := m.end(log, n)
	if err != nil {
		return Result{}, err
	}
	res.quantiles(slices.Concat(kept...))
	return res, nil
}

func noWait(s Spec, open Open) (_ Result, err error) {
	log, err := open(s.Dir, s)
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	p := payload(s.Size)
	for range min(s.Records/10, 10_000) {
		if err := log.Append(p); err != nil {
			return Result{}, err
		}
	}
	kept := make([]time.Duration, s.Records)
	runtime.GC()
	m := begin(s.Dir, log)
	for range s.Records {
		if err := log.Append(p); err != nil {
			return Result{}, err
		}
	}
	res, err := m.end(log, int64(s.Records))
	if err != nil {
		return Result{}, err
	}
	last := time.Now()
	for i := range kept {
		if err := log.Append(p); err != nil {
			return Result{}, err
		}
		now := time.Now()
		kept[i], last = now.Sub(last), now
	}
	res.quantiles(kept)
	last = time.Now()
	for i := range kept {
		now := time.Now()
		kept[i], last = now.Sub(last), now
	}
	slices.Sort(kept)
	res.Clock = Percentile(kept, 50)
	return res, nil
}

func fill(s Spec, open Open) (Result, error) {
	log, err := open(s.Dir, s)
	if err != nil {
		return Result{}, err
	}
	p := payload(s.Size)
	if b, ok := log.(Batcher); ok {
		ps := slices.Repeat([][]byte{p}, 256)
		for n := s.Records; n > 0 && err == nil; n -= len(ps) {
			ps = ps[:min(len(ps), n)]
			err = b.AppendBatch(ps)
		}
	} else {
		for n := s.Records; n > 0 && err == nil; n-- {
			err = log.Append(p)
		}
	}
	if err != nil {
		return Result{}, err
	}
	// Ours is not closed: it is to be found as a crash leaves it. A peer is,
	// where its Close does nothing but write out what it buffers.
	if c, ok := log.(interface{ Flush() error }); ok {
		return Result{Records: int64(s.Records)}, c.Flush()
	}
	return Result{Records: int64(s.Records)}, log.Close()
}

func read(s Spec, open Open) (_ Result, err error) {
	var res Result
	if err := warm(s.Dir); err != nil {
		return Result{}, err
	}
	begin := time.Now()
	log, err := open(s.Dir, s)
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	res.Open = time.Since(begin)
	d, ok := log.(Drainer)
	if !ok {
		return Result{}, errors.New("it cannot be read")
	}
	sum := byte(0)
	fn := func(p []byte) {
		res.Records++
		sum ^= p[0] ^ p[len(p)-1]
	}
	// The first drain warms the page cache and the mappings.
	for range 2 {
		res.Records = 0
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		begin = time.Now()
		if err := d.Drain(fn); err != nil {
			return Result{}, err
		}
		res.Took = time.Since(begin)
		runtime.ReadMemStats(&after)
		if res.Records != int64(s.Records) {
			return Result{}, fmt.Errorf("%d records were read, %d were written", res.Records, s.Records)
		}
		res.perRecord(before, after)
	}
	runtime.KeepAlive(sum)
	res.RSS, res.Anon, err = resident()
	return res, err
}

// warm brings the log's files into the page cache, where they are unless they were
// written past it.
func warm(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, f)
		return errors.Join(err, f.Close())
	})
}

// A measurement holds what the counters said when it began.
type measurement struct {
	at     time.Time
	mem    runtime.MemStats
	wrote  int64
	device int64
	dev    string
	syncs  uint64
	err    error

	syncTime time.Duration
}

func begin(dir string, log Log) *measurement {
	m := &measurement{}
	m.dev, m.err = deviceOf(dir)
	if l, ok := log.(Syncer); ok {
		m.syncs, m.syncTime = l.Syncs()
	}
	var err error
	m.wrote, err = written()
	m.err = errors.Join(m.err, err)
	m.device = sectors(m.dev)
	runtime.ReadMemStats(&m.mem)
	m.at = time.Now()
	return m
}

func (m *measurement) end(log Log, records int64) (Result, error) {
	res := Result{Records: records, Took: time.Since(m.at)}
	if records == 0 {
		return Result{}, errors.New("nothing was appended")
	}
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	res.perRecord(m.mem, mem)
	wrote, err := written()
	if err = errors.Join(m.err, err); err != nil {
		return Result{}, err
	}
	res.Wrote = wrote - m.wrote
	res.Device = sectors(m.dev) - m.device
	if l, ok := log.(Syncer); ok {
		n, took := l.Syncs()
		res.Syncs, res.SyncTime = int64(n-m.syncs), took-m.syncTime
	}
	return res, nil
}

func (r *Result) perRecord(before, after runtime.MemStats) {
	r.Allocs = float64(after.Mallocs-before.Mallocs) / float64(r.Records)
	r.Heap = float64(after.TotalAlloc-before.TotalAlloc) / float64(r.Records)
}

func (r *Result) quantiles(d []time.Duration) {
	slices.Sort(d)
	r.P50, r.P99, r.Max = Percentile(d, 50), Percentile(d, 99), d[len(d)-1]
}

// Percentile is the smallest value that p percent of sorted do not exceed.
func Percentile(sorted []time.Duration, p int) time.Duration {
	i := (len(sorted)*p + 99) / 100
	return sorted[max(i, 1)-1]
}
