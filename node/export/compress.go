package export

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/grpc/encoding"
)

// Compressions are the values of Options.Compression besides "", which leaves
// the choice to the endpoint: gzip for HTTP and for gRPC beyond this machine,
// none for gRPC on loopback.
var Compressions = []string{"none", "gzip", "zstd"}

// maxDecoder bounds the memory of a decoder of answers, in bytes.
const maxDecoder = 8 << 20

// writer is what gzip.Writer and zstd.Encoder have in common.
type writer interface {
	io.WriteCloser
	Reset(io.Writer)
}

// compressor is a compression for gRPC (encoding.Compressor) and HTTP, with its
// writers pooled.
type compressor struct {
	name    string
	writers sync.Pool
	reader  func(io.Reader) (io.Reader, error)
}

var compressors = map[string]*compressor{
	"gzip": {
		name: "gzip",
		writers: sync.Pool{New: func() any {
			w, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed) // the level is valid
			return w
		}},
		reader: func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
	},
	"zstd": {
		name: "zstd",
		writers: sync.Pool{New: func() any {
			// One goroutine, the caller's; 1 MiB is the window that all decoders take.
			w, _ := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(1<<20))
			return w
		}},
		reader: func(r io.Reader) (io.Reader, error) {
			return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxDecoder))
		},
	},
}

// grpc finds compressors by name, in a registry that may only be written while
// the program starts.
func init() {
	for _, c := range compressors {
		encoding.RegisterCompressor(c)
	}
}

func (c *compressor) Name() string { return c.name }

// pooled gives its writer back when it is closed.
type pooled struct {
	writer
	c *compressor
}

func (p *pooled) Close() error {
	err := p.writer.Close()
	p.writer.Reset(nil)
	p.c.writers.Put(p.writer)
	return err
}

// Compress implements encoding.Compressor.
func (c *compressor) Compress(w io.Writer) (io.WriteCloser, error) {
	z := c.writers.Get().(writer)
	z.Reset(w)
	return &pooled{z, c}, nil
}

// Decompress implements encoding.Compressor, for answers.
func (c *compressor) Decompress(r io.Reader) (io.Reader, error) {
	z, err := c.reader(r)
	if err != nil {
		return nil, fmt.Errorf("decompress %s: %w", c.name, err)
	}
	return z, nil
}

// compressed is a compressed request in a pooled buffer; net/http may close it
// after the call has returned, and only then is the buffer used again.
type compressed struct {
	mu  sync.Mutex
	buf *bytes.Buffer // nil: closed
	r   bytes.Reader
}

var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// pack compresses f.
func (c *compressor) pack(f *frame) (*compressed, error) {
	buf := buffers.Get().(*bytes.Buffer)
	buf.Reset()
	z, err := c.Compress(buf)
	if err != nil {
		return nil, err
	}
	for _, p := range f.parts {
		if _, err := z.Write(p); err != nil {
			return nil, fmt.Errorf("compress with %s: %w", c.name, err)
		}
	}
	if err := z.Close(); err != nil {
		return nil, fmt.Errorf("compress with %s: %w", c.name, err)
	}
	b := &compressed{buf: buf}
	b.r.Reset(buf.Bytes())
	return b, nil
}

func (b *compressed) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.buf == nil {
		return 0, io.ErrClosedPipe
	}
	return b.r.Read(p)
}

func (b *compressed) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.buf != nil {
		if b.buf.Cap() <= maxPooledArena {
			buffers.Put(b.buf)
		}
		b.buf = nil
		b.r.Reset(nil)
	}
	return nil
}
