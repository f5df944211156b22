package export

import (
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/mem"

	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/wal"
)

// viewFrom is the payload size, in bytes, from which a record is sent from the
// log's mapping instead of being copied into the request's arena. Small records
// are faster copied: at 340 bytes a call takes 0.40 µs per record, with a buffer
// per head and record 0.74 µs, because grpc copies each of them into its write
// buffer anyway. From 1 to 32 KiB both ways take the same within the noise
// (BenchmarkSend), so the rest decides: a copied record holds no slot of the log
// while a slow endpoint takes its time, and large ones should not be in memory
// twice. It must be above 1 KiB: mem.NewBuffer does not count references to
// smaller memory.
const viewFrom = 4 << 10

// maxPooledArena bounds what a pooled frame keeps, in bytes: a request of the
// default size, but not a giant record.
const maxPooledArena = 2 << 20

// item is one record to send.
type item struct {
	seq     uint64
	payload []byte // a view of the log, or memory of its own for a void
	standIn bool   // for a record that the endpoint refused
}

// hold owns log batches that views point into. The last reference releases them.
type hold struct {
	refs    atomic.Int32
	batches []wal.Batch
}

func newHold() *hold {
	h := &hold{}
	h.refs.Store(1)
	return h
}

func (h *hold) unref() {
	if h.refs.Add(-1) == 0 {
		for _, b := range h.batches {
			b.Release()
		}
		h.batches = nil
	}
}

// frame is one ExportLogsServiceRequest: parts, in wire order, of which some
// stand in the pooled arena and some are views of the log. It is reference
// counted, because grpc and net/http may read it after a call has returned: one
// reference for its maker, one for each mem.Buffer, one for each HTTP body. The
// last one gives the arena to the pool and, when there are views, drops the
// frame's reference to their hold. Parts do not change while references exist.
type frame struct {
	refs  atomic.Int32
	arena []byte
	parts [][]byte
	views int
	size  int   // of the whole request, in bytes
	hold  *hold // nil: no views
}

var frames = sync.Pool{New: func() any { return new(frame) }}

// newFrame frames items. h owns the memory of those that are not smaller than
// from. It allocates only when the pool has no frame that is large enough.
func newFrame(framer *otlp.Framer, items []item, h *hold, from int) *frame {
	records, arena, views := 0, 0, 0
	for i := range items {
		n := len(items[i].payload)
		size := otlp.RecordSize(n)
		records += size
		if n >= from {
			views++
			arena += size - n
		} else {
			arena += size
		}
	}
	head := framer.HeadSize(records)
	arena += head
	f := frames.Get().(*frame)
	f.refs.Store(1)
	f.size, f.views = head+records, views
	// A tail beyond the last byte, so that every part has the capacity from
	// which mem.NewBuffer counts references.
	const tail = 1<<10 + 1
	if cap(f.arena) < arena+tail {
		f.arena = make([]byte, 0, arena+tail)
	}
	b := framer.AppendHead(f.arena[:0], records)
	f.parts = f.parts[:0]
	start := 0
	for i := range items {
		p := items[i].payload
		b = otlp.AppendRecordHead(b, len(p))
		if len(p) < from {
			b = append(b, p...)
			continue
		}
		f.parts = append(f.parts, b[start:], p)
		start = len(b)
	}
	if start < len(b) {
		f.parts = append(f.parts, b[start:])
	}
	f.arena = b
	if views > 0 {
		f.hold = h
		h.refs.Add(1)
	}
	return f
}

// guardedFrame is newFrame with a fault of the log's mapping made an error: it
// reads what it copies there.
func guardedFrame(framer *otlp.Framer, items []item, h *hold, from int) (f *frame, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if _, fault := p.(interface{ Addr() uintptr }); !fault {
			panic(p)
		}
		f, err = nil, fmt.Errorf("%w: %v", errFault, p)
	}()
	return newFrame(framer, items, h, from), nil
}

// errFault is a SIGBUS while records are read. It ends Run.
var errFault = errors.New("memory fault in the log's mapping: the file was cut, or its disk cannot be read")

func (f *frame) unref() {
	if f.refs.Add(-1) > 0 {
		return
	}
	if f.hold != nil {
		f.hold.unref()
		f.hold = nil
	}
	clear(f.parts) // views must not outlive their mapping, not even unread
	if cap(f.arena) <= maxPooledArena {
		frames.Put(f)
	}
}

// buffers hands the frame to grpc: each buffer has a reference of its own.
func (f *frame) buffers() mem.BufferSlice {
	out := make(mem.BufferSlice, len(f.parts))
	f.refs.Add(int32(len(f.parts)))
	for i := range f.parts {
		out[i] = mem.NewBuffer(&f.parts[i], f)
	}
	return out
}

// Get is there for mem.BufferPool; grpc takes buffers from its own pool.
func (f *frame) Get(n int) *[]byte {
	b := make([]byte, n)
	return &b
}

// Put is called by grpc when the last reference to a buffer is gone.
func (f *frame) Put(*[]byte) { f.unref() }

// body reads the frame's parts for net/http, which may call Close from another
// goroutine, while a Read runs and after the call has returned.
type body struct {
	mu   sync.Mutex
	f    *frame // nil: closed
	part int
	off  int
}

func (f *frame) body() *body {
	f.refs.Add(1)
	return &body{f: f}
}

func (r *body) Read(p []byte) (n int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.f == nil {
		return 0, io.ErrClosedPipe
	}
	for n < len(p) && r.part < len(r.f.parts) {
		c := copy(p[n:], r.f.parts[r.part][r.off:])
		n += c
		if r.off += c; r.off == len(r.f.parts[r.part]) {
			r.part, r.off = r.part+1, 0
		}
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (r *body) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.f != nil {
		r.f.unref()
		r.f = nil
	}
	return nil
}
