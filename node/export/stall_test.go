package export

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/wal"
)

// staller stands between a client and a server, without a buffer. It keeps what
// the client sent, and stops reading after some bytes until it is told to go on.
type staller struct {
	near  net.Conn // the client's end
	goOn  chan struct{}
	ended sync.WaitGroup

	mu    sync.Mutex
	bytes []byte
}

func newStaller(t *testing.T, server string, after int) *staller {
	upstream, err := net.Dial("tcp", server)
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	s := &staller{near: near, goOn: make(chan struct{})}
	s.ended.Go(func() {
		_, _ = io.Copy(far, upstream)
		far.Close()
	})
	s.ended.Go(func() {
		defer upstream.Close()
		buf := make([]byte, 4<<10)
		for {
			n, err := far.Read(buf)
			s.mu.Lock()
			s.bytes = append(s.bytes, buf[:n]...)
			stall := len(s.bytes) > after
			s.mu.Unlock()
			if stall {
				<-s.goOn
			}
			if err != nil {
				return
			}
			if _, err := upstream.Write(buf[:n]); err != nil {
				return
			}
		}
	})
	return s
}

func (s *staller) captured() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.bytes)
}

// TestStalledReader: a server has not read all of a request yet, its records
// count as delivered, nobody but grpc refers to them, and the log wants their
// slot. What goes over the wire afterwards is what was framed, never what the
// slot would hold next; and the slot comes free when grpc is done with it.
//
//	in flight   the call is still being made
//	returned    the call has ended by its deadline, grpc still holds memory
//	control     in flight, and the slot is given up without regard to grpc:
//	            foreign bytes do go out, so the rig would show them
func TestStalledReader(t *testing.T) {
	for _, name := range []string{"in flight", "returned", "control"} {
		t.Run(name, func(t *testing.T) {
			early := name == "control"
			s := newStaller(t, discardServer(t), 60<<10)
			conn, err := grpc.NewClient("passthrough:///stalled", grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithDefaultCallOptions(grpc.ForceCodecV2(frameCodec{})),
				grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return s.near, nil }))
			if err != nil {
				t.Fatal(err)
			}
			l, _, err := wal.Open(filepath.Join(t.TempDir(), "wal"), wal.Options{SegmentBytes: 1 << 20, MaxBytes: 4 << 20})
			if err != nil {
				t.Fatal(err)
			}
			var open sync.Once
			goOn := func() { open.Do(func() { close(s.goOn) }) }
			defer func() {
				goOn()
				conn.Close()
				s.ended.Wait()
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			}()
			put := func(fill byte) error {
				r := otlp.Record{TimeUnixNano: 1, Severity: otlp.Info, EventType: event.Decision, LogID: l.ID(), Class: "decision", Body: bytes.Repeat([]byte{fill}, 60<<10)}
				res, err := l.Reserve(wal.ClassDecision, r.Size())
				if err != nil {
					return err
				}
				r.Put(res.Buf, res.Seq)
				res.Commit()
				return nil
			}
			const n = 14
			for range n {
				if err := put('A'); err != nil {
					t.Fatal(err)
				}
			}
			if err := l.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			e := &Exporter{o: Options{Log: l, BatchRecords: 100, BatchBytes: 4 << 20}}
			c, err := e.collect(t.Context(), &lane{next: 1}, nil, n)
			if err != nil || len(c.items) != n {
				t.Fatalf("collected %d records, %v", len(c.items), err)
			}
			f := newFrame(otlp.NewFramer(testResource), c.items, c.hold, viewFrom)
			if f.views != n {
				t.Fatalf("%d views, want %d", f.views, n)
			}
			timeout := 30 * time.Second
			if name == "returned" {
				timeout = 300 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			sent := make(chan error, 1)
			go func() {
				_, _, _, err := (&grpcSender{conn: conn}).send(ctx, f)
				sent <- err
			}()
			if name == "returned" {
				if err := <-sent; status.Code(err) != codes.DeadlineExceeded {
					t.Fatalf("send: %v, want a deadline", err)
				}
			} else {
				for end := time.Now().Add(5 * time.Second); len(s.captured()) <= 60<<10; time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("the server never stalled")
					}
				}
			}
			f.unref()
			hold := c.hold
			c.release()
			if hold.refs.Load() == 0 {
				t.Fatal("grpc holds nothing although the server has not read: the rig shows nothing")
			}
			if early {
				for _, b := range hold.batches {
					b.Release()
				}
				hold.batches = nil // the last reference must not do it again
			}
			if err := l.AdvanceAll(n); err != nil {
				t.Fatal(err)
			}
			// fill goes round the whole log more than once, and takes what it wrote
			// as delivered.
			fill := func() error {
				for range 100 {
					if err := put('B'); err != nil {
						return err
					}
					if err := l.Sync(t.Context()); err != nil {
						return err
					}
					if err := l.AdvanceAll(l.Durable()); err != nil {
						return err
					}
				}
				return nil
			}
			if err := fill(); early && err != nil || !early && !errors.Is(err, wal.ErrCeilingExceeded) {
				t.Fatalf("fill the log: %v", err)
			}
			goOn()
			for end := time.Now().Add(5 * time.Second); hold.refs.Load() > 0; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("grpc never gave %d references back; %d bytes read; sent %v", hold.refs.Load(), len(s.captured()), len(sent))
				}
			}
			if name == "returned" {
				time.Sleep(50 * time.Millisecond) // what grpc has in its buffer still goes out
			} else if err := <-sent; err != nil {
				t.Fatal(err)
			}
			if a := bytes.Count(s.captured(), bytes.Repeat([]byte("A"), 1000)); name == "in flight" && a < n*50 {
				t.Errorf("only %d kB of the records were on the wire", a)
			}
			foreign := bytes.Contains(s.captured(), []byte("BBBBBBBB"))
			if foreign != early {
				t.Errorf("bytes of later records on the wire: %v, want %v", foreign, early)
			}
			if !early {
				if err := fill(); err != nil {
					t.Errorf("the slot did not come free after grpc was done with it: %v", err)
				}
			}
		})
	}
}

// TestEarlyAnswer: a server that answers before it has read the body leaves
// net/http with the frame; everything is given back in the end.
func TestEarlyAnswer(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	defer srv.Close()
	h := &httpSender{url: srv.URL, client: srv.Client()}
	framer := otlp.NewFramer(testResource)
	items := testItems(60, 60<<10)
	for _, h.compress = range []*compressor{nil, compressors["gzip"], compressors["zstd"]} {
		hold := newHold()
		for range 20 {
			f := newFrame(framer, items, hold, viewFrom)
			if _, _, _, err := h.send(t.Context(), f); err == nil {
				t.Error("a 503 is no error")
			}
			f.unref()
		}
		for end := time.Now().Add(5 * time.Second); hold.refs.Load() > 1; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d references are still out", hold.refs.Load())
			}
		}
	}
}
