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

// BenchmarkEcho is one allowed tool.echo under the quickstart policy, from the
// request's bytes to the answer's, many at once; batched: without the disk.
func BenchmarkEcho(b *testing.B) {
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
	tools, err := tool.Parse(nil, tool.Options{})
	if err != nil {
		b.Fatal(err)
	}
	var policy current
	policy.a.Store(&prepared.Active{Program: program})
	body := []byte(`{"kind":"tool.echo","params":{"text":"hello, this is what an agent might say"},"session":"s-1"}`)
	for _, batched := range []bool{false, true} {
		b.Run(map[bool]string{false: "strict", true: "batched"}[batched], func(b *testing.B) {
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
				NodeID: "n", Assurance: func() string { return "reduced" }, Agent: func() call.Agent { return call.Agent{} }, Batched: batched})
			b.ReportAllocs()
			b.SetParallelism(32)
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				var out []byte
				for pb.Next() {
					var r call.Request
					if err := call.Decode(body, &r); err != nil {
						b.Error(err)
						return
					}
					a := p.Do(b.Context(), &r, call.Execute)
					if a.Status != 200 && a.Code != "log_full" {
						b.Errorf("%+v", a)
						return
					}
					out = a.AppendJSON(out[:0])
				}
			})
		})
	}
}
