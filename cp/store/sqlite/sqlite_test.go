package sqlite

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/cp/store/storetest"
	"github.com/autonomyops/autonomy/internal/event"
)

// childDir makes this test binary a writer that is to be killed.
const childDir = "AUTONOMY_TEST_WRITER_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		writeUntilKilled(dir)
	}
	goleak.VerifyTestMain(m)
}

func open(t testing.TB, o Options) *Store {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	s, err := Open(context.Background(), o)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

func TestContract(t *testing.T) {
	storetest.Suite(t, func(t *testing.T) store.Store { return open(t, Options{}) })
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	if _, err := s.AppendEvents(t.Context(), storetest.Records("n1", storetest.LogA, 1, 50)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PutRelease(t.Context(), storetest.Release("stable", 3)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Options{Dir: dir}); !errors.Is(err, store.ErrLocked) {
		t.Errorf("second Open: error %v, want ErrLocked", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, fileName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("database file: %v, %v; want mode 0600", info.Mode(), err)
	}
	s = open(t, Options{Dir: dir})
	if n := len(storetest.All(t, s, store.Filter{}, 100)); n != 50 {
		t.Errorf("%d events after reopening, want 50", n)
	}
	var seq *store.SequenceError
	r := storetest.Release("stable", 3)
	r.ReleaseID = "other"
	if _, err := s.PutRelease(t.Context(), r); !errors.As(err, &seq) {
		t.Errorf("sequence after reopening: error %v", err)
	}
}

func TestReleasesAreAppendOnly(t *testing.T) {
	s := open(t, Options{})
	if _, err := s.PutRelease(t.Context(), storetest.Release("stable", 1)); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, q := range []string{`UPDATE releases SET channel = 'x'`, `DELETE FROM releases`} {
		if _, err := db.ExecContext(t.Context(), q); err == nil || !strings.Contains(err.Error(), "append-only") {
			t.Errorf("%s: error %v", q, err)
		}
	}
}

func TestNewerSchema(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	if err := s.do(t.Context(), &op{kind: "test", run: func(ctx context.Context, t *tx) error {
		_, err := t.exec(ctx, `INSERT INTO goose_db_version (version_id, is_applied) VALUES (99, 1)`)
		return err
	}}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := Open(t.Context(), Options{Dir: dir}); !errors.Is(err, store.ErrNewer) {
		t.Errorf("error %v, want ErrNewer", err)
	}
}

func TestDamaged(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"not a database": func(b []byte) []byte { return []byte(strings.Repeat("what is this? ", 1000)) },
		"schema page":    func(b []byte) []byte { copy(b[100:], strings.Repeat("\xff", 400)); return b },
	} {
		dir := t.TempDir()
		s := open(t, Options{Dir: dir})
		s.Close()
		path := filepath.Join(dir, fileName)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, damage(b), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), Options{Dir: dir}); !errors.Is(err, store.ErrDamaged) {
			t.Errorf("%s: error %v, want ErrDamaged", name, err)
		}
	}
}

// TestCeiling: writers at the boundary get ErrFull, nothing of a refused call is
// there, the files stay below the ceiling, and a release still goes in.
func TestCeiling(t *testing.T) {
	const ceiling = 6 << 20
	s := open(t, Options{MaxBytes: ceiling})
	var wg sync.WaitGroup
	acked := make([]uint64, 4)
	for w := range acked {
		wg.Go(func() {
			id, log := fmt.Sprintf("n%d", w), fmt.Sprintf("%016x", w+1)
			for first := uint64(1); first < 100_000; first += 20 {
				events := storetest.Records(id, log, first, first+19)
				for i := range events {
					events[i].Body = []byte(`{"x":"` + strings.Repeat("y", 2000) + `"}`)
				}
				_, err := s.AppendEvents(t.Context(), events)
				if errors.Is(err, store.ErrFull) {
					return
				}
				if err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
				acked[w] = first + 19
			}
			t.Errorf("writer %d was never refused", w)
		})
	}
	wg.Wait()
	if have := s.fileBytes(); have > ceiling {
		t.Errorf("files have %d bytes, ceiling %d", have, ceiling)
	}
	for w, want := range acked {
		if got := len(storetest.All(t, s, store.Filter{NodeID: fmt.Sprintf("n%d", w)}, 1000)); uint64(got) != want {
			t.Errorf("node %d: %d events held, %d acknowledged", w, got, want)
		}
	}
	if _, err := s.PutRelease(t.Context(), storetest.Release("stable", 1)); err != nil {
		t.Errorf("a release in a full store: %v", err)
	}
}

func TestKeepFree(t *testing.T) {
	s := open(t, Options{KeepFree: 1 << 60})
	if _, err := s.AppendEvents(t.Context(), storetest.Records("n1", storetest.LogA, 1, 1)); !errors.Is(err, store.ErrFull) {
		t.Errorf("error %v, want ErrFull", err)
	}
	if err := s.Ready(t.Context()); !errors.Is(err, store.ErrFull) {
		t.Errorf("Ready: error %v, want ErrFull", err)
	}
}

// TestPrune: what retention removed is neither missing nor new when it comes
// again, and a hole among it can still be filled.
func TestPrune(t *testing.T) {
	now := storetest.Start
	s := open(t, Options{Retention: time.Hour, Now: func() time.Time { return now }})
	events := append(storetest.Records("n1", storetest.LogA, 1, 10), storetest.Records("n1", storetest.LogA, 12, 20)...)
	if _, err := s.AppendEvents(t.Context(), events); err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Hour)
	if _, err := s.AppendEvents(t.Context(), storetest.Records("n1", storetest.LogA, 21, 25)); err != nil {
		t.Fatal(err)
	}
	// On the writer's goroutine, as its ticker would.
	if err := s.do(t.Context(), &op{kind: "test prune", run: func(ctx context.Context, tx *tx) error {
		n, err := tx.prune(ctx, now.Add(-time.Hour).UnixNano())
		if n != 19 {
			t.Errorf("%d events removed, want 19", n)
		}
		return err
	}}); err != nil {
		t.Fatal(err)
	}
	if got := len(storetest.All(t, s, store.Filter{}, 10)); got != 5 {
		t.Errorf("%d events left, want 5", got)
	}
	in, err := s.AppendEvents(t.Context(), storetest.Records("n1", storetest.LogA, 1, 25))
	if err != nil || in.Inserted != 1 || in.Deduped != 24 {
		t.Errorf("delivered again: %+v, %v; want the hole filled, the rest known", in, err)
	}
	if w, err := s.Watermark(t.Context(), "n1", storetest.LogA); err != nil || w.Seq != 25 {
		t.Errorf("watermark %+v, %v; want 25", w, err)
	}
}

// TestQueryPlans: every filter is answered from an index in order; no sorting,
// no full scan.
func TestQueryPlans(t *testing.T) {
	s := open(t, Options{})
	for name, f := range map[string]store.Filter{
		"events_time": {}, "events_node": {NodeID: "n"}, "events_type": {EventType: "t"}, "events_decision": {Decision: "d"},
		"events_kind": {Kind: "k"}, "events_release": {ReleaseID: "r"}, "events_audit": {AuditID: "a"},
	} {
		for _, after := range []store.Cursor{{}, {TimeNS: 5, ID: 5}} {
			q, args := eventQuery(f, after, 100)
			rows, err := s.read.QueryContext(t.Context(), "EXPLAIN QUERY PLAN "+q, args...)
			if err != nil {
				t.Fatal(err)
			}
			var plan []string
			for rows.Next() {
				var id, parent, x int
				var detail string
				if err := rows.Scan(&id, &parent, &x, &detail); err != nil {
					t.Fatal(err)
				}
				plan = append(plan, detail)
			}
			rows.Close()
			got := strings.Join(plan, "; ")
			if !strings.Contains(got, name) || strings.Contains(got, "TEMP B-TREE") {
				t.Errorf("%s, cursor %v: plan is %q", name, after, got)
			}
		}
	}
}

// writeUntilKilled appends batches and tells each acknowledged one on stdout.
func writeUntilKilled(dir string) {
	s, err := Open(context.Background(), Options{Dir: dir})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	var mu sync.Mutex
	for w := range 4 {
		go func() {
			id, log := fmt.Sprintf("n%d", w), fmt.Sprintf("%016x", w+1)
			for first := uint64(1); ; first += 25 {
				if _, err := s.AppendEvents(context.Background(), storetest.Records(id, log, first, first+24)); err != nil {
					fmt.Println("error", err)
					os.Exit(1)
				}
				mu.Lock()
				fmt.Println(id, first+24)
				mu.Unlock()
			}
		}()
	}
	select {}
}

// TestKilled kills a writing process at different moments: what it had
// acknowledged is there, and the store opens.
func TestKilled(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		dir := t.TempDir()
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), childDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		acked := map[string]uint64{}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			var id string
			var seq uint64
			if _, err := fmt.Sscan(lines.Text(), &id, &seq); err != nil {
				t.Fatalf("child says %q", lines.Text())
			}
			acked[id] = seq
			if n == 20+15*round {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("the child ended by itself")
		}
		s := open(t, Options{Dir: dir})
		for id, want := range acked {
			w, err := s.Watermark(t.Context(), id, "")
			if err != nil || w.Seq < want {
				t.Errorf("round %d: %s acknowledged %d, held to %d, %v", round, id, want, w.Seq, err)
			}
			if got := len(storetest.All(t, s, store.Filter{NodeID: id}, 1000)); uint64(got) != w.Seq {
				t.Errorf("round %d: %s has %d events and a watermark of %d", round, id, got, w.Seq)
			}
		}
		var check string
		if err := s.read.QueryRowContext(t.Context(), "PRAGMA integrity_check").Scan(&check); err != nil || check != "ok" {
			t.Errorf("round %d: integrity check: %s, %v", round, check, err)
		}
	}
}

// BenchmarkAppend is durable ingest in batches of 1,000 by four callers.
func BenchmarkAppend(b *testing.B) {
	s := open(b, Options{})
	const batch = 1000
	var next sync.Mutex
	seq := uint64(1)
	b.SetParallelism(2)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			next.Lock()
			first := seq
			seq += batch
			next.Unlock()
			events := make([]event.Event, 0, batch)
			events = append(events, storetest.Records("n1", storetest.LogA, first, first+batch-1)...)
			if _, err := s.AppendEvents(b.Context(), events); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)*batch/b.Elapsed().Seconds(), "events/s")
}
