// Package storetest is the contract of a store.Store: every backend passes
// Suite. It is a package for tests only.
package storetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/event"
)

// Start is the time of the first event that Make makes.
var Start = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

// LogA and LogB are log ids.
const (
	LogA = "00000000000000aa"
	LogB = "00000000000000bb"
)

// Make is record seq of a log: decisions, every third one a denial.
func Make(node, log string, seq uint64) event.Event {
	e := event.Event{
		EventID: event.ID(log, seq), EventType: event.Decision, NodeID: node, LogID: log, Seq: seq,
		Timestamp: Start.Add(time.Duration(seq) * time.Millisecond), Class: "decision", Decision: "allow", Kind: "tool.echo",
		AuditID: fmt.Sprintf("%s-%d", node, seq), ReleaseID: "r-1", Fingerprint: "blake3:ab",
		Body: json.RawMessage(`{"policy_ref":"quickstart@1.0.0","n":` + fmt.Sprint(seq) + `}`),
	}
	if seq%3 == 0 {
		e.Decision = "deny"
	}
	return e
}

// Records are the records from first to last of a log.
func Records(node, log string, first, last uint64) []event.Event {
	var out []event.Event
	for seq := first; seq <= last; seq++ {
		out = append(out, Make(node, log, seq))
	}
	return out
}

// Suite runs the contract. open returns an empty store, closed by the test's
// cleanup.
func Suite(t *testing.T, open func(t *testing.T) store.Store) {
	for _, tt := range []struct {
		name string
		run  func(*testing.T, store.Store)
	}{
		{"Dedupe", testDedupe},
		{"Conflict", testConflict},
		{"ChunkOfKnownAndNew", testChunk},
		{"Invalid", testInvalid},
		{"UnnamedLog", testUnnamedLog},
		{"Filters", testFilters},
		{"Pages", testPages},
		{"Watermark", testWatermark},
		{"WatermarkAnyOrder", testWatermarkProperty},
		{"ConcurrentWriters", testConcurrent},
		{"Releases", testReleases},
		{"Acks", testAcks},
		{"Fleet", testFleet},
		{"Closed", testClosed},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.run(t, open(t)) })
	}
}

func appendEvents(t *testing.T, s store.Store, events ...event.Event) store.Ingest {
	t.Helper()
	in, err := s.AppendEvents(t.Context(), events)
	if err != nil {
		t.Fatalf("AppendEvents: %v", err)
	}
	if in.Received != len(events) || in.Inserted+in.Deduped+in.Conflicts != in.Received {
		t.Fatalf("AppendEvents of %d: counts do not add up: %+v", len(events), in)
	}
	return in
}

// All reads every event that matches, page by page.
func All(t *testing.T, s store.Store, f store.Filter, page int) []store.Event {
	t.Helper()
	var out []store.Event
	var after store.Cursor
	for {
		events, next, more, err := s.QueryEvents(t.Context(), f, after, page)
		if err != nil {
			t.Fatalf("QueryEvents: %v", err)
		}
		out = append(out, events...)
		if !more {
			return out
		}
		if next == after {
			t.Fatal("QueryEvents: more, but the cursor stands still")
		}
		after = next
	}
}

func node(t *testing.T, s store.Store, id string) store.Node {
	t.Helper()
	nodes, err := s.Nodes(t.Context(), "", store.MaxPage)
	if err != nil {
		t.Fatalf("Nodes: %v", err)
	}
	for _, n := range nodes {
		if n.NodeID == id {
			return n
		}
	}
	t.Fatalf("node %q is not in the fleet", id)
	return store.Node{}
}

func watermark(t *testing.T, s store.Store, id, log string) uint64 {
	t.Helper()
	w, err := s.Watermark(t.Context(), id, log)
	if err != nil {
		t.Fatalf("Watermark: %v", err)
	}
	return w.Seq
}

func testDedupe(t *testing.T, s store.Store) {
	events := Records("n1", LogA, 1, 100)
	if in := appendEvents(t, s, events...); in.Inserted != 100 {
		t.Errorf("first delivery: %+v, want 100 inserted", in)
	}
	if in := appendEvents(t, s, events...); in.Deduped != 100 {
		t.Errorf("second delivery: %+v, want 100 deduped", in)
	}
	got := All(t, s, store.Filter{}, 7)
	if len(got) != 100 {
		t.Fatalf("%d events held, want 100", len(got))
	}
	for i, e := range got {
		want := events[99-i]
		if store.Digest(&e.Event) != store.Digest(&want) {
			t.Fatalf("event %d: have %+v, want %+v", i, e.Event, want)
		}
		if e.ReceivedAt.IsZero() {
			t.Fatalf("event %d has no time of receipt", i)
		}
	}
}

func testConflict(t *testing.T, s store.Store) {
	appendEvents(t, s, Make("n1", LogA, 1))
	other := Make("n1", LogA, 1)
	other.Decision = "deny"
	if in := appendEvents(t, s, other); in.Conflicts != 1 {
		t.Errorf("other content: %+v, want 1 conflict", in)
	}
	body := Make("n1", LogA, 1)
	body.Body = json.RawMessage(`{"forged":true}`)
	if in := appendEvents(t, s, body, Make("n1", LogA, 2)); in.Conflicts != 1 || in.Inserted != 1 {
		t.Errorf("other body: %+v, want 1 conflict and 1 inserted", in)
	}
	got := All(t, s, store.Filter{}, 10)
	if len(got) != 2 || got[1].Decision != "allow" {
		t.Errorf("the first content must stay: %+v", got)
	}
	if n := node(t, s, "n1"); n.Conflicts != 2 {
		t.Errorf("fleet shows %d conflicts, want 2", n.Conflicts)
	}
}

// testChunk mixes new, known, repeated and conflicting events in one call that
// is larger than any chunk.
func testChunk(t *testing.T, s store.Store) {
	appendEvents(t, s, Records("n1", LogA, 50, 60)...)
	batch := Records("n1", LogA, 1, 150)        // 139 new, 11 known
	batch = append(batch, Make("n1", LogA, 3))  // repeated
	forged := Make("n1", LogA, 4)               // conflict with one of this call
	forged.Outcome = "ok"                       //
	batch = append(batch, forged)               //
	batch = slices.Insert(batch, 75, batch[70]) // repeated next to itself
	batch = slices.Insert(batch, 10, batch[9])  //
	in := appendEvents(t, s, batch...)
	if in.Inserted != 139 || in.Deduped != 14 || in.Conflicts != 1 {
		t.Errorf("have %+v, want 139 inserted, 14 deduped, 1 conflict", in)
	}
	if got := len(All(t, s, store.Filter{}, 100)); got != 150 {
		t.Errorf("%d events held, want 150", got)
	}
	if seq := watermark(t, s, "n1", LogA); seq != 150 {
		t.Errorf("watermark %d, want 150", seq)
	}
}

func testInvalid(t *testing.T, s store.Store) {
	for name, change := range map[string]func(*event.Event){
		"event_id is missing":   func(e *event.Event) { e.EventID = "" },
		"event_type is missing": func(e *event.Event) { e.EventType = "" },
		"node_id is missing":    func(e *event.Event) { e.NodeID = "" },
		"timestamp is missing":  func(e *event.Event) { e.Timestamp = time.Time{} },
		"between 1970 and 2262": func(e *event.Event) { e.Timestamp = time.Date(2300, 1, 1, 0, 0, 0, 0, time.UTC) },
		"over 2^63-1":           func(e *event.Event) { e.Seq = 1 << 63 },
		"body has":              func(e *event.Event) { e.Body = make([]byte, store.MaxBody+1) },
		"is named":              func(e *event.Event) { e.EventID = event.ID(LogB, 1) },
		"kind: 129 bytes":       func(e *event.Event) { e.Kind = strings.Repeat("k", 129) },
		"node_id: control":      func(e *event.Event) { e.NodeID = "a\x1b[2J" },
		"audit_id: invalid":     func(e *event.Event) { e.AuditID = "\xff" },
	} {
		bad := Make("n1", LogA, 1)
		change(&bad)
		_, err := s.AppendEvents(t.Context(), []event.Event{Make("n1", LogA, 2), bad})
		if !errors.Is(err, store.ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	if _, err := s.AppendEvents(t.Context(), make([]event.Event, store.MaxBatch+1)); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("too many events: error %v", err)
	}
	if got := All(t, s, store.Filter{}, 10); len(got) != 0 {
		t.Errorf("%d events are held after refused calls", len(got))
	}
}

// testUnnamedLog: records that carry seq but no log_id.
func testUnnamedLog(t *testing.T, s store.Store) {
	make := func(id string, seq uint64) event.Event {
		e := Make("n1", LogA, seq)
		e.EventID, e.LogID = id, ""
		return e
	}
	appendEvents(t, s, make("a", 1), make("b", 2), make("d", 4))
	if seq := watermark(t, s, "n1", ""); seq != 2 {
		t.Errorf("watermark %d, want 2", seq)
	}
	if in := appendEvents(t, s, make("forged", 2)); in.Conflicts != 1 {
		t.Errorf("a number under another name: %+v, want 1 conflict", in)
	}
	if in := appendEvents(t, s, make("c", 3), make("b", 2)); in.Inserted != 1 || in.Deduped != 1 {
		t.Errorf("have %+v, want 1 inserted, 1 deduped", in)
	}
	if seq := watermark(t, s, "n1", ""); seq != 4 {
		t.Errorf("watermark %d, want 4", seq)
	}
}

func testFilters(t *testing.T, s store.Store) {
	appendEvents(t, s, Records("n1", LogA, 1, 30)...)
	others := Records("n2", LogB, 1, 30)
	for i := range others {
		others[i].EventType, others[i].ReleaseID, others[i].Kind, others[i].Outcome = event.Action, "r-2", "tool.exec.x", "ok"
	}
	appendEvents(t, s, others...)
	at := func(ms int) time.Time { return Start.Add(time.Duration(ms) * time.Millisecond) }
	for _, tt := range []struct {
		name string
		f    store.Filter
		want int
	}{
		{"all", store.Filter{}, 60},
		{"node", store.Filter{NodeID: "n1"}, 30},
		{"type", store.Filter{EventType: event.Action}, 30},
		{"release", store.Filter{ReleaseID: "r-2"}, 30},
		{"audit", store.Filter{AuditID: "n1-7"}, 1},
		{"decision", store.Filter{Decision: "deny"}, 20},
		{"decision and node", store.Filter{Decision: "deny", NodeID: "n1"}, 10},
		{"kind", store.Filter{Kind: "tool.exec.x"}, 30},
		{"outcome", store.Filter{Outcome: "ok"}, 30},
		{"since is inclusive", store.Filter{NodeID: "n1", Since: at(21)}, 10},
		{"until is exclusive", store.Filter{NodeID: "n1", Until: at(21)}, 20},
		{"window", store.Filter{Since: at(10), Until: at(20)}, 20},
		{"none", store.Filter{NodeID: "n3"}, 0},
		{"hostile", store.Filter{NodeID: "n1' OR '1'='1"}, 0},
	} {
		got := All(t, s, tt.f, 7)
		if len(got) != tt.want {
			t.Errorf("%s: %d events, want %d", tt.name, len(got), tt.want)
		}
		if !slices.IsSortedFunc(got, func(a, b store.Event) int { return b.Timestamp.Compare(a.Timestamp) }) {
			t.Errorf("%s: not newest first", tt.name)
		}
	}
}

// testPages: equal times, and events that arrive between two pages, neither
// repeat nor skip what was there before.
func testPages(t *testing.T, s store.Store) {
	events := Records("n1", LogA, 1, 40)
	for i := range events {
		events[i].Timestamp = Start.Add(time.Duration(i/10) * time.Second)
	}
	appendEvents(t, s, events...)
	seen := map[string]bool{}
	var after store.Cursor
	for n := 0; ; n++ {
		page, next, more, err := s.QueryEvents(t.Context(), store.Filter{NodeID: "n1"}, after, 3)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page {
			if seen[e.EventID] {
				t.Fatalf("event %s twice", e.EventID)
			}
			seen[e.EventID] = true
		}
		if !more {
			break
		}
		after = next
		newer := Make("n1", LogA, uint64(100+n))
		newer.Timestamp = Start.Add(time.Hour)
		appendEvents(t, s, newer)
	}
	if len(seen) != 40 {
		t.Errorf("%d events seen, want the 40 that were there at the start", len(seen))
	}
	for _, limit := range []int{0, -1, store.MaxPage + 1} {
		if _, _, _, err := s.QueryEvents(t.Context(), store.Filter{}, store.Cursor{}, limit); err == nil {
			t.Errorf("limit %d is accepted", limit)
		}
	}
}

func testWatermark(t *testing.T, s store.Store) {
	if _, err := s.Watermark(t.Context(), "n1", ""); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("unknown node: error %v", err)
	}
	appendEvents(t, s, Records("n1", LogA, 1, 10)...)
	appendEvents(t, s, Records("n1", LogA, 13, 20)...)
	if seq := watermark(t, s, "n1", LogA); seq != 10 {
		t.Errorf("watermark %d, want 10", seq)
	}
	if n := node(t, s, "n1"); n.Gaps != 1 || n.Missing != 2 || n.LastSeq != 20 || n.Watermark != 10 {
		t.Errorf("fleet: gaps %d, missing %d, last %d, watermark %d; want 1, 2, 20, 10", n.Gaps, n.Missing, n.LastSeq, n.Watermark)
	}
	// The node is set up anew: a log of its own, from 1.
	fresh := Records("n1", LogB, 1, 3)
	for i := range fresh {
		fresh[i].Timestamp = fresh[i].Timestamp.Add(time.Hour)
	}
	appendEvents(t, s, fresh...)
	if seq := watermark(t, s, "n1", LogB); seq != 3 {
		t.Errorf("new log: watermark %d, want 3", seq)
	}
	if w, err := s.Watermark(t.Context(), "n1", ""); err != nil || w.LogID != LogB || w.Seq != 3 {
		t.Errorf("newest log: %+v, %v; want %s at 3", w, err, LogB)
	}
	appendEvents(t, s, Records("n1", LogA, 11, 12)...)
	if seq := watermark(t, s, "n1", LogA); seq != 20 {
		t.Errorf("hole filled: watermark %d, want 20", seq)
	}
	if n := node(t, s, "n1"); n.Gaps != 0 || n.Missing != 0 || n.LogID != LogB {
		t.Errorf("fleet: gaps %d, missing %d, log %s; want 0, 0, %s", n.Gaps, n.Missing, n.LogID, LogB)
	}
	if _, err := s.Watermark(t.Context(), "n1", "other"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("unknown log: error %v", err)
	}
}

// testWatermarkProperty delivers in any order, with repeats and holes, and
// compares with a set after every call.
func testWatermarkProperty(t *testing.T, s store.Store) {
	for round := range uint64(6) {
		rng := rand.New(rand.NewPCG(round, 1))
		id := fmt.Sprintf("p%d", round)
		log := fmt.Sprintf("%016x", round+1)
		held := map[uint64]bool{}
		for range 40 {
			var batch []event.Event
			for range 1 + rng.IntN(6) {
				first := 1 + rng.Uint64N(120)
				batch = append(batch, Records(id, log, first, min(120, first+rng.Uint64N(8)))...)
			}
			rng.Shuffle(len(batch), func(i, j int) { batch[i], batch[j] = batch[j], batch[i] })
			fresh := 0
			for _, e := range batch {
				if !held[e.Seq] {
					held[e.Seq] = true
					fresh++
				}
			}
			if in := appendEvents(t, s, batch...); in.Inserted != fresh || in.Conflicts != 0 {
				t.Fatalf("round %d: %+v, want %d inserted", round, in, fresh)
			}
			var mark, gaps, last uint64
			for held[mark+1] {
				mark++
			}
			for seq := range held {
				last = max(last, seq)
			}
			for seq := uint64(1); seq <= last; seq++ {
				if !held[seq] && (seq == 1 || held[seq-1]) {
					gaps++
				}
			}
			if have := watermark(t, s, id, log); have != mark {
				t.Fatalf("round %d: watermark %d, want %d", round, have, mark)
			}
			if n := node(t, s, id); n.Gaps != gaps || n.LastSeq != last || n.Missing != last-uint64(len(held)) {
				t.Fatalf("round %d: gaps %d, last %d, missing %d; want %d, %d, %d", round, n.Gaps, n.LastSeq, n.Missing, gaps, last, last-uint64(len(held)))
			}
		}
	}
}

// testConcurrent: many writers, each event sent by two of them; every event is
// inserted exactly once.
func testConcurrent(t *testing.T, s store.Store) {
	const writers, per = 8, 200
	var mu sync.Mutex
	var sum store.Ingest
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			id := fmt.Sprintf("n%d", w/2)
			log := fmt.Sprintf("%016x", w/2+1)
			for first := uint64(1); first <= per; first += 20 {
				in, err := s.AppendEvents(t.Context(), Records(id, log, first, first+19))
				if err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
				mu.Lock()
				sum.Inserted += in.Inserted
				sum.Deduped += in.Deduped
				sum.Conflicts += in.Conflicts
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if want := writers / 2 * per; sum.Inserted != want || sum.Deduped != want || sum.Conflicts != 0 {
		t.Errorf("have %+v, want %d inserted and as many deduped", sum, want)
	}
	for w := range writers / 2 {
		if seq := watermark(t, s, fmt.Sprintf("n%d", w), ""); seq != per {
			t.Errorf("node %d: watermark %d, want %d", w, seq, per)
		}
	}
}

// Release makes a release.
func Release(channel string, seq uint64) store.Release {
	id := fmt.Sprintf("%s-%d", channel, seq)
	return store.Release{
		ReleaseID: id, Channel: channel, Sequence: seq, Digest: "sha256:" + id,
		Envelope: []byte(`{"env":"` + id + `"}`), Statement: []byte(`{"id":"` + id + `"}`),
	}
}

func put(t *testing.T, s store.Store, r store.Release) {
	t.Helper()
	if created, err := s.PutRelease(t.Context(), r); err != nil || !created {
		t.Fatalf("PutRelease %s: created %v, %v", r.ReleaseID, created, err)
	}
}

func testReleases(t *testing.T, s store.Store) {
	ctx := t.Context()
	if _, err := s.LatestRelease(ctx, "stable"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("empty channel: error %v", err)
	}
	put(t, s, Release("stable", 1))
	put(t, s, Release("stable", 5))
	put(t, s, Release("canary", 2))
	if created, err := s.PutRelease(ctx, Release("stable", 1)); err != nil || created {
		t.Errorf("the same again: created %v, %v", created, err)
	}
	var seq *store.SequenceError
	for _, n := range []uint64{4, 5} {
		r := Release("stable", n)
		r.ReleaseID = "late"
		if _, err := s.PutRelease(ctx, r); !errors.As(err, &seq) || seq.Highest != 5 || seq.HighestID != "stable-5" {
			t.Errorf("sequence %d after 5: error %v", n, err)
		}
	}
	taken := Release("stable", 1)
	taken.Statement = []byte(`{"other":1}`)
	if _, err := s.PutRelease(ctx, taken); !errors.Is(err, store.ErrReleaseConflict) {
		t.Errorf("other content under the id: error %v", err)
	}
	if r, err := s.LatestRelease(ctx, "stable"); err != nil || r.ReleaseID != "stable-5" || string(r.Envelope) != `{"env":"stable-5"}` || r.PublishedAt.IsZero() {
		t.Errorf("latest: %+v, %v", r, err)
	}
	if r, err := s.GetRelease(ctx, "stable-1"); err != nil || r.Sequence != 1 {
		t.Errorf("get: %+v, %v", r, err)
	}
	if _, err := s.GetRelease(ctx, "late"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a refused release is held: %v", err)
	}
	var ids []string
	for before := int64(0); ; {
		page, next, err := s.ListReleases(ctx, "", before, 2)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range page {
			ids = append(ids, r.ReleaseID)
		}
		if next == 0 {
			break
		}
		before = next
	}
	if want := []string{"canary-2", "stable-5", "stable-1"}; !slices.Equal(ids, want) {
		t.Errorf("list: %v, want %v", ids, want)
	}
	if page, _, err := s.ListReleases(ctx, "stable", 0, 10); err != nil || len(page) != 2 {
		t.Errorf("list of stable: %d, %v; want 2", len(page), err)
	}
	// Two publishers of one sequence: one wins.
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() {
			r := Release("race", 1)
			r.ReleaseID = fmt.Sprintf("race-%d", i)
			_, errs[i] = s.PutRelease(ctx, r)
		})
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else if !errors.As(err, &seq) {
			t.Errorf("race: %v", err)
		}
	}
	if won != 1 {
		t.Errorf("%d publishers of one sequence won, want 1", won)
	}
}

func testAcks(t *testing.T, s store.Store) {
	ctx := t.Context()
	put(t, s, Release("stable", 1))
	ack := store.Ack{NodeID: "n1", ReleaseID: "stable-1", Step: "signature", Result: "passed", At: Start}
	if _, err := s.PutAck(ctx, store.Ack{NodeID: "n1", ReleaseID: "none", Step: "signature", Result: "passed", At: Start}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("unknown release: error %v", err)
	}
	if nodes, err := s.Nodes(ctx, "", 10); err != nil || len(nodes) != 0 {
		t.Errorf("a refused report made a node: %v, %v", nodes, err)
	}
	for i, want := range []bool{true, false} {
		if changed, err := s.PutAck(ctx, ack); err != nil || changed != want {
			t.Errorf("delivery %d: changed %v, %v; want %v", i+1, changed, err, want)
		}
	}
	older := ack
	older.Result, older.At = "failed", Start.Add(-time.Second)
	if changed, err := s.PutAck(ctx, older); err != nil || changed {
		t.Errorf("an older report: changed %v, %v", changed, err)
	}
	done := store.Ack{NodeID: "n1", ReleaseID: "stable-1", Step: "activate", Result: "passed", Fingerprint: "blake3:cd", PolicyRef: "p@1", At: Start.Add(time.Second)}
	if changed, err := s.PutAck(ctx, done); err != nil || !changed {
		t.Errorf("activation: changed %v, %v", changed, err)
	}
	n := node(t, s, "n1")
	if n.ObservedRelease != "stable-1" || n.Fingerprint != "blake3:cd" || n.PolicyRef != "p@1" || n.LastAck == nil || n.LastAck.Step != "activate" {
		t.Errorf("fleet after activation: %+v", n)
	}
}

func testFleet(t *testing.T, s store.Store) {
	ctx := t.Context()
	put(t, s, Release("stable", 1))
	put(t, s, Release("stable", 2))
	for _, id := range []string{"n1", "n2"} {
		if err := s.Touch(ctx, id, "stable"); err != nil {
			t.Fatal(err)
		}
	}
	e := Make("n1", LogA, 1)
	e.ReleaseID, e.Timestamp = "stable-2", Start
	found := Make("n1", LogA, 2) // a candidate is not what runs
	found.EventType, found.ReleaseID, found.Timestamp = event.ReleaseFound, "stable-9", Start.Add(time.Second)
	beat := Make("n1", LogA, 3)
	beat.EventType, beat.Decision, beat.ReleaseID, beat.Timestamp = event.NodeHeartbeat, "", "", Start.Add(2*time.Second)
	beat.Body = json.RawMessage(`{"assurance":"reduced","version":"1.2.3","policy_ref":"p@2","not_ready":[]}`)
	appendEvents(t, s, e, found, beat)
	late := Make("n1", LogA, 4) // an older word that arrives later changes nothing
	late.ReleaseID, late.Fingerprint, late.Timestamp = "stable-1", "blake3:old", Start.Add(-time.Hour)
	appendEvents(t, s, late)
	n := node(t, s, "n1")
	if n.DesiredRelease != "stable-2" || n.DesiredSequence != 2 || n.ObservedRelease != "stable-2" || n.Channel != "stable" ||
		n.PolicyRef != "p@2" || n.Assurance != "reduced" || n.Version != "1.2.3" || n.Fingerprint != "blake3:ab" {
		t.Errorf("n1: %+v", n)
	}
	appendEvents(t, s, Make("only-events", LogB, 1)) // an old log, delivered late
	if n := node(t, s, "only-events"); !n.LastSeen.Equal(Make("x", LogB, 1).Timestamp) {
		t.Errorf("last seen %s, want the event's time", n.LastSeen)
	}
	now := node(t, s, "n2").LastSeen
	m, err := s.Summary(ctx, now.Add(time.Second), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	want := store.Summary{Nodes: 3, Up: 2, Stale: 1, InSync: 1, Behind: 1}
	if m != want {
		t.Errorf("summary %+v, want %+v", m, want)
	}
	if m, err = s.Summary(ctx, Start.Add(-24*time.Hour), time.Minute); err != nil || m.Unknown != 3 {
		t.Errorf("before it all: %+v, %v; want 3 unknown", m, err)
	}
	var ids []string
	for after := ""; ; {
		page, err := s.Nodes(ctx, after, 1)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		after = page[0].NodeID
		ids = append(ids, after)
	}
	if want := []string{"n1", "n2", "only-events"}; !slices.Equal(ids, want) {
		t.Errorf("nodes %v, want %v", ids, want)
	}
}

func testClosed(t *testing.T, s store.Store) {
	if err := s.Ready(t.Context()); err != nil {
		t.Fatalf("Ready: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := s.AppendEvents(context.Background(), Records("n1", LogA, 1, 1)); !errors.Is(err, store.ErrClosed) {
		t.Errorf("append after Close: error %v", err)
	}
	if err := s.Ready(context.Background()); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Ready after Close: error %v", err)
	}
}
