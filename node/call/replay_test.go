package call_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/wal"
)

// TestRedactedDigests: what a policy redacts cannot be found out by trial from
// the record, also of a call with a call_id; the record says that its input is
// not the one that was evaluated; and the call is still replayed.
func TestRedactedDigests(t *testing.T) {
	r := newRig(t, policy, nil)
	params := `{"token":"0042","text":"x"}`
	body := `{"kind":"tool.echo","params":` + params + `,"call_id":"c-1"}`
	first := r.do(body)
	if first.Status != 200 || len(first.Output) == 0 {
		t.Fatalf("%+v", first)
	}
	plain := map[string][]byte{"params": []byte(params), "kind and params": []byte("tool.echo\x00" + params), "output": first.Output, "the token": []byte("0042")}
	recs := r.wantRecords("decision allow", "action allow ok")
	for _, rec := range recs {
		for what, secret := range plain {
			sum := sha256.Sum256(secret)
			if bytes.Contains(rec.Body, []byte(hex.EncodeToString(sum[:16]))) {
				t.Errorf("a plain digest of the %s is in the record: %s", what, rec.Body)
			}
		}
	}
	var d event.DecisionBody
	var act event.ActionBody
	if err := json.Unmarshal(recs[0].Body, &d); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(recs[1].Body, &act); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(d.Redacted, []string{"/params/token"}) || !strings.Contains(string(d.Input), `"params":{"token":"[redacted]","text":"x"}`) {
		t.Errorf("%+v %s", d.Redacted, d.Input)
	}
	for _, digest := range []string{d.ParamsDigest, act.OutputDigest} {
		if !strings.HasPrefix(digest, "hmac-sha256:") || len(digest) != len("hmac-sha256:")+64 {
			t.Errorf("digest %q", digest)
		}
	}
	r.reopen()
	if a := r.do(body); !a.Replayed || a.AuditID != first.AuditID || a.ErrCode != "output_not_kept" {
		t.Errorf("%+v", a)
	}
	if a := r.do(strings.Replace(body, "0042", "0043", 1)); a.Status != 409 {
		t.Errorf("another token: %+v", a)
	}
	// Nothing to redact: the record says nothing of it, and the input is exact.
	r.do(`{"kind":"tool.echo","params":{"text":"y"}}`)
	if last := r.records()[2]; bytes.Contains(last.Body, []byte("redacted")) {
		t.Errorf("%s", last.Body)
	}
	// With another secret nothing is taken for the same call, and nothing runs.
	other := r.opts
	r.opts = func(o *call.Options) {
		if other != nil {
			other(o)
		}
		o.Secret = []byte("another one")
	}
	r.reopen()
	if a := r.do(body); a.Status != 409 {
		t.Errorf("with another secret: %+v", a)
	}
}

// slowWeb counts requests and answers when released.
func slowWeb(t *testing.T) (url string, hits *atomic.Int64, release func()) {
	t.Helper()
	hits = new(atomic.Int64)
	gate := make(chan struct{})
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hits.Add(1)
		select {
		case <-gate:
		case <-r.Context().Done():
		}
		fmt.Fprint(w, "done")
	}))
	t.Cleanup(web.Close)
	done := false
	release = func() {
		if !done {
			done = true
			close(gate)
		}
	}
	t.Cleanup(release) // before Close, which waits
	return web.URL, hits, release
}

// begun waits until the tool has asked the server.
func begun(t *testing.T, hits *atomic.Int64) {
	t.Helper()
	testutil.Eventually(t, 20*time.Second, "the tool runs", func() error {
		if hits.Load() == 0 {
			return errors.New("the server was not asked yet")
		}
		return nil
	})
}

// TestFirstStillRunning: who comes while the first call runs waits within
// bounds, and is told; it never runs a second time, also when more call ids are
// in use than are remembered.
func TestFirstStillRunning(t *testing.T) {
	r := newRig(t, policy, func(o *call.Options) { o.ReplayWait, o.MaxCallIDs = 20*time.Millisecond, 1 })
	url, hits, release := slowWeb(t)
	body := fmt.Sprintf(`{"kind":"tool.http_get","params":{"endpoint":%q},"call_id":"slow"}`, url)
	first := make(chan call.Answer, 1)
	go func() { first <- r.do(body) }()
	begun(t, hits)
	for i := range 4 {
		if a := r.do(fmt.Sprintf(`{"kind":"tool.echo","call_id":"other-%d"}`, i)); a.Status != 200 {
			t.Fatalf("%+v", a)
		}
	}
	for _, b := range []string{body, strings.TrimSuffix(body, "}") + `,"timeout_ms":1}`} {
		if a := r.do(b); a.Status != 503 || a.Code != "first_call_running" || a.Replayed {
			t.Errorf("%+v", a)
		}
	}
	if a := r.do(strings.Replace(body, "endpoint\":\"", "endpoint\":\"http://127.0.0.1:1/?", 1)); a.Status != 409 {
		t.Errorf("other params while the first runs: %+v", a)
	}
	release()
	a := <-first
	if a.Status != 200 || a.Replayed || hits.Load() != 1 {
		t.Errorf("%+v, %d hits", a, hits.Load())
	}
	if b := r.do(body); !b.Replayed || b.AuditID != a.AuditID || hits.Load() != 1 {
		t.Errorf("%+v, %d hits", b, hits.Load())
	}
	// One is remembered: the last that ended. Those before may run again.
	if a := r.do(`{"kind":"tool.echo","call_id":"other-3"}`); a.Status != 200 || a.Replayed {
		t.Errorf("%+v", a)
	}
}

// TestNeverRecorded: a call that was denied because its decision was not on disk
// in time did not run, and does not run later under its call_id.
func TestNeverRecorded(t *testing.T) {
	r := newRig(t, policy, nil)
	url, hits, _ := slowWeb(t)
	late := r.opts
	r.opts = func(o *call.Options) { o.AuditTimeout = time.Nanosecond }
	r.reopen()
	body := fmt.Sprintf(`{"kind":"tool.http_get","params":{"endpoint":%q},"call_id":"c"}`, url)
	if a := r.do(body); a.Status != 503 || a.Layer != "audit" {
		t.Fatalf("%+v", a)
	}
	r.opts = late
	for range 2 { // from memory of the log, twice
		r.reopen()
		a := r.do(body)
		if a.Status != 503 || a.Code != "audit_unavailable" || !a.Replayed || !strings.Contains(a.Reason, "nothing ran") || hits.Load() != 0 {
			t.Errorf("%+v, %d hits", a, hits.Load())
		}
	}
	r.wantRecords("decision allow", "action deny denied")
}

// TestCallsFile: with the file Recover begins where it ends; whatever is wrong
// with it, the log is read instead, with the same result.
func TestCallsFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "calls")
	with := func(o *call.Options) { o.CallsFile = file }
	r := newRig(t, policy, with)
	body := func(i int) string {
		return fmt.Sprintf(`{"kind":"tool.echo","params":{"text":"%d"},"call_id":"c-%d"}`, i, i)
	}
	audit := map[int]string{}
	for i := range 5 {
		audit[i] = r.do(body(i)).AuditID
	}
	// A decision without an action, which the file will (wrongly) cover: who
	// reads the log finds it, who believes the file does not.
	r.do(`{"kind":"tool.echo"}`)
	recs, seq := r.records(), r.log.Stats().NextSeq
	if _, err := r.log.Append(wal.ClassDecision, encode(recs[len(recs)-2], r.log.ID(), seq)); err != nil {
		t.Fatal(err)
	}
	if err := r.p.SaveCalls(t.Context(), seq); err != nil {
		t.Fatal(err)
	}
	for i := 5; i < 7; i++ { // after the file
		audit[i] = r.do(body(i)).AuditID
	}
	r.records()
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	snapshot := snapshotOf(t, filepath.Join(r.dir, "wal"), r)
	for _, tc := range []struct {
		name    string
		change  func([]byte) []byte
		opts    func(*call.Options)
		unknown int // 0: the file was used
		status  int
	}{
		{"good", func(b []byte) []byte { return b }, nil, 0, 200},
		{"none", func([]byte) []byte { return nil }, nil, 1, 200},
		{"one bit", func(b []byte) []byte { b[len(b)/2] ^= 1; return b }, nil, 1, 200},
		{"a bit of the sequence", func(b []byte) []byte { b[40] ^= 1; return b }, nil, 1, 200},
		{"cut off", func(b []byte) []byte { return b[:len(b)-1] }, nil, 1, 200},
		{"one call less", func(b []byte) []byte { return append(b[:len(b)-32-48], b[len(b)-32:]...) }, nil, 1, 200},
		{"empty", func([]byte) []byte { return []byte{} }, nil, 1, 200},
		{"longer than it may be", func(b []byte) []byte { return append(b, make([]byte, 1<<20)...) }, func(o *call.Options) { o.MaxCallIDs = 100 }, 1, 200},
		{"of another secret", func(b []byte) []byte { return b }, func(o *call.Options) { o.Secret = []byte("x") }, 1, 409},
	} {
		t.Run(tc.name, func(t *testing.T) {
			snapshot()
			if err := os.RemoveAll(file); err != nil {
				t.Fatal(err)
			}
			if b := tc.change(bytes.Clone(good)); b != nil {
				if err := os.WriteFile(file, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			r.opts = func(o *call.Options) {
				with(o)
				if tc.opts != nil {
					tc.opts(o)
				}
			}
			if unknown := r.open(); unknown != tc.unknown {
				t.Errorf("%d outcomes unknown, want %d", unknown, tc.unknown)
			}
			for i := range 7 {
				if a := r.do(body(i)); a.Status != tc.status || tc.status == 200 && (!a.Replayed || a.AuditID != audit[i]) {
					t.Errorf("call %d: %+v, want a replay of %s", i, a, audit[i])
				}
			}
		})
	}
	// A log that was set back: the file is ahead of it.
	r.log.Close()
	fresh := newRig(t, policy, with)
	if a := fresh.do(body(0)); a.Status != 200 || a.Replayed {
		t.Errorf("another log: %+v", a)
	}
}

// snapshotOf keeps the log's files as they are and returns what puts them back.
func snapshotOf(t *testing.T, dir string, r *rig) func() {
	t.Helper()
	if err := r.log.Close(); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if files[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		t.Helper()
		_ = r.log.Close() // of the case before
		for name, data := range files {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestIdle: the file may be written while calls go on, at a moment when none
// runs; what ends later is not in it.
func TestIdle(t *testing.T) {
	file := filepath.Join(t.TempDir(), "calls")
	r := newRig(t, policy, func(o *call.Options) { o.CallsFile = file })
	url, hits, release := slowWeb(t)
	r.do(`{"kind":"tool.echo","call_id":"a"}`)
	done := make(chan call.Answer, 1)
	go func() {
		done <- r.do(fmt.Sprintf(`{"kind":"tool.http_get","params":{"endpoint":%q},"call_id":"slow"}`, url))
	}()
	begun(t, hits)
	if _, idle := r.p.Idle(); idle {
		t.Error("idle while a call runs")
	}
	release()
	<-done
	seq, idle := r.p.Idle()
	if !idle || seq != 4 {
		t.Fatalf("%d, %v", seq, idle)
	}
	r.do(`{"kind":"tool.echo","call_id":"b"}`)
	if err := r.p.SaveCalls(t.Context(), seq); err != nil {
		t.Fatal(err)
	}
	if unknown := r.reopen(); unknown != 0 {
		t.Errorf("%d", unknown)
	}
	for _, id := range []string{"a", "b"} {
		if a := r.do(fmt.Sprintf(`{"kind":"tool.echo","call_id":%q}`, id)); !a.Replayed {
			t.Errorf("%s: %+v", id, a)
		}
	}
}

// BenchmarkRecover reads a log of calls at start: one in ten has a call_id.
func BenchmarkRecover(b *testing.B) {
	const calls = 100_000
	dir := b.TempDir()
	options := wal.Options{SegmentBytes: 64 << 20, MaxBytes: 256 << 20}
	log, _, err := wal.Open(filepath.Join(dir, "wal"), options)
	if err != nil {
		b.Fatal(err)
	}
	o := call.Options{Log: log, Policies: &current{}, Logger: quietLog, Secret: []byte("s"), Assurance: func() string { return "none" },
		Agent: func() call.Agent { return call.Agent{} }, MaxCallIDs: 1 << 16}
	fill(b, log, calls)
	if err := log.Sync(b.Context()); err != nil {
		b.Fatal(err)
	}
	defer log.Close()
	for _, name := range []string{"log", "file"} {
		b.Run(name, func(b *testing.B) {
			if name == "file" {
				o.CallsFile = filepath.Join(dir, "calls")
				p := call.New(o)
				if _, err := p.Recover(b.Context()); err != nil {
					b.Fatal(err)
				}
				if err := p.SaveCalls(b.Context(), log.Durable()); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				if n, err := call.New(o).Recover(b.Context()); err != nil || n != 0 {
					b.Fatal(n, err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/(2*calls), "ns/record")
		})
	}
}
