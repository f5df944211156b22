package call_test

import (
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/tool"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/wal"
)

const (
	echo   = `{"kind":"tool.echo","params":{"text":"hello, this is what an agent might say"},"session":"s-1"}`
	denied = `{"kind":"tool.http_get","params":{"endpoint":"https://not-on-the-list.example/quick/brown/fox"},"session":"s-1"}`
)

// BenchmarkCall is one call under the quickstart policy, from the request's bytes
// to the answer's, many at once: echo is allowed, deny is not; batched: without
// the disk.
func BenchmarkCall(b *testing.B) {
	raw, err := prepared.BuildBundle("../../examples/quickstart/policy", prepared.BuildOptions{Name: "q", Version: "1.0.0"})
	if err != nil {
		b.Fatal(err)
	}
	bundle, err := prepared.ReadBundle(raw, prepared.Limits{})
	if err != nil {
		b.Fatal(err)
	}
	program, err := prepared.Compile(b.Context(), bundle)
	if err != nil {
		b.Fatal(err)
	}
	tools, err := tool.Parse([]byte("tools:\n  tool.echo: {}\n  tool.http_get: {hosts: [example.org]}\n"), tool.Options{})
	if err != nil {
		b.Fatal(err)
	}
	var policy current
	policy.a.Store(&prepared.Active{Program: program})
	for _, bc := range []struct {
		name, body string
		batched    bool
		status     int
	}{
		{"echo/strict", echo, false, 200},
		{"echo/batched", echo, true, 200},
		{"deny/strict", denied, false, 403},
		{"deny/batched", denied, true, 403},
	} {
		b.Run(bc.name, func(b *testing.B) {
			body := []byte(bc.body)
			log, _, err := wal.Open(filepath.Join(b.TempDir(), "wal"), wal.Options{SegmentBytes: 16 << 20, MaxBytes: 64 << 20})
			if err != nil {
				b.Fatal(err)
			}
			defer log.Close()
			stop := make(chan struct{})
			done := make(chan struct{})
			go func() { // as without an endpoint: the oldest make room
				defer close(done)
				for {
					select {
					case <-stop:
						return
					case <-time.After(20 * time.Millisecond):
						if err := log.AdvanceAll(log.Durable()); err != nil {
							b.Error(err)
							return
						}
					}
				}
			}()
			defer func() { close(stop); <-done }()
			p := call.New(call.Options{Log: log, Policies: &policy, Tools: func() *tool.Registry { return tools }, Logger: slog.New(slog.DiscardHandler),
				NodeID: "n", Assurance: func() string { return "reduced" }, Agent: func() call.Agent { return call.Agent{} }, Batched: bc.batched})
			b.ReportAllocs()
			b.SetParallelism(32)
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				var out []byte
				for pb.Next() {
					r := call.NewRequest()
					if err := call.Decode(body, r); err != nil {
						b.Error(err)
						return
					}
					r.Caller = call.Caller{Type: "anonymous", ID: "loopback"}
					a := p.Do(b.Context(), r, call.Execute)
					if a.Status != bc.status && a.Code != "log_full" {
						b.Errorf("%+v", a)
						return
					}
					out = a.AppendJSON(out[:0])
					r.Free()
				}
			})
		})
	}
}
