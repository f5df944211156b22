package sqlite

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/event"
)

const (
	eventCols = `event_id, digest, event_type, node_id, log_id, seq, time_ns, received_ns, release_id, fingerprint, audit_id, decision, outcome, kind, class, trace_id, body`
	eventArgs = 17
	// rowsPerInsert events share one INSERT: fewer calls into SQLite.
	rowsPerInsert = 40
	// overhead is the estimate of an event's bytes beside its body: columns,
	// nine indexes, and the same again in the WAL.
	overhead = 2048
)

var (
	insertOne  = insertEvents(1)
	insertMany = insertEvents(rowsPerInsert)
)

func insertEvents(n int) string {
	row := "(?" + strings.Repeat(",?", eventArgs-1) + ")"
	return "INSERT INTO events (" + eventCols + ") VALUES " + row + strings.Repeat(","+row, n-1) + " ON CONFLICT DO NOTHING"
}

// AppendEvents implements store.Store.
func (s *Store) AppendEvents(ctx context.Context, events []event.Event) (store.Ingest, error) {
	if len(events) > store.MaxBatch {
		return store.Ingest{}, fmt.Errorf("%w: %d events in one call, at most %d", store.ErrInvalid, len(events), store.MaxBatch)
	}
	if len(events) == 0 {
		return store.Ingest{}, nil
	}
	in := &ingest{events: events, digests: make([][16]byte, len(events))}
	o := &op{kind: "append events", events: len(events), run: in.run}
	for i := range events {
		if err := store.ValidateEvent(&events[i]); err != nil {
			return store.Ingest{}, fmt.Errorf("event %d: %w", i, err)
		}
		in.digests[i] = store.Digest(&events[i]) // here, not in the one writer
		o.bytes += overhead + 2*int64(len(events[i].Body))
	}
	if err := s.do(ctx, o); err != nil {
		return store.Ingest{}, err
	}
	return in.result, nil
}

// ingest is one AppendEvents inside a transaction.
type ingest struct {
	events  []event.Event
	digests [][16]byte
	result  store.Ingest
	args    []any
}

type logKey struct{ node, log string }

// run stores the events, then brings the logs and the fleet up to date from
// what was really new.
func (in *ingest) run(ctx context.Context, t *tx) error {
	in.result = store.Ingest{Received: len(in.events)}
	conflicts := map[string]int{} // node -> count
	fresh := make([]int, 0, len(in.events))
	pruned := map[logKey]*logRow{}
	todo := make([]int, 0, len(in.events))
	for i := range in.events {
		gone, err := t.prunedAway(ctx, &in.events[i], pruned)
		if err != nil {
			return err
		}
		if gone {
			in.result.Deduped++ // held once, removed since: nothing to compare with
			continue
		}
		todo = append(todo, i)
	}
	for len(todo) > 0 {
		n := 1
		query := insertOne
		if len(todo) >= rowsPerInsert {
			n, query = rowsPerInsert, insertMany
		}
		chunk := todo[:n]
		todo = todo[n:]
		in.args = in.args[:0]
		for _, i := range chunk {
			in.appendArgs(t, i)
		}
		res, err := t.exec(ctx, query, in.args...)
		if err != nil {
			return err
		}
		inserted, err := res.RowsAffected()
		if err != nil {
			return err
		}
		if int(inserted) == n {
			fresh = append(fresh, chunk...)
			continue
		}
		if n == 1 {
			same, err := t.same(ctx, &in.events[chunk[0]], in.digests[chunk[0]])
			if err != nil {
				return err
			}
			if same {
				in.result.Deduped++
			} else {
				conflicts[in.events[chunk[0]].NodeID]++
			}
			continue
		}
		// Some of the chunk were known. Which ones, their arrival time and order
		// do not tell when one call repeats itself: count each name's first row
		// of this transaction once.
		more, err := in.sort(ctx, t, chunk, int(inserted), conflicts)
		if err != nil {
			return err
		}
		fresh = append(fresh, more...)
	}
	for _, n := range conflicts {
		in.result.Conflicts += n
	}
	in.result.Inserted = len(fresh)
	if err := t.advanceLogs(ctx, in.events, fresh); err != nil {
		return err
	}
	return t.observe(ctx, in.events, fresh, conflicts)
}

// sort tells the new events of a chunk from the known ones. The new ones are
// those whose stored row has an id above the highest before the insert; in one
// statement the rows go in in order, so of two equal events the first is new.
func (in *ingest) sort(ctx context.Context, t *tx, chunk []int, inserted int, conflicts map[string]int) ([]int, error) {
	var newest int64
	if err := t.row(ctx, `SELECT max(id) FROM events`, nil, &newest); err != nil {
		return nil, err
	}
	floor := newest - int64(inserted) // ids are given densely above the maximum
	var fresh []int
	seen := map[string]bool{}
	for _, i := range chunk {
		e := &in.events[i]
		var id int64
		var digest []byte
		err := t.row(ctx, `SELECT id, digest FROM events WHERE event_id = ?`, []any{e.EventID}, &id, &digest)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			conflicts[e.NodeID]++ // its sequence number is taken under another event_id
		case err != nil:
			return nil, err
		case !bytes.Equal(digest, in.digests[i][:]):
			conflicts[e.NodeID]++
		case id > floor && !seen[e.EventID]:
			seen[e.EventID] = true
			fresh = append(fresh, i)
		default:
			in.result.Deduped++
		}
	}
	return fresh, nil
}

// same reports whether the row that kept e out says the same.
func (t *tx) same(ctx context.Context, e *event.Event, digest [16]byte) (bool, error) {
	var held []byte
	err := t.row(ctx, `SELECT digest FROM events WHERE event_id = ?`, []any{e.EventID}, &held)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil // its sequence number is taken under another event_id
	}
	return bytes.Equal(held, digest[:]), err
}

func (in *ingest) appendArgs(t *tx, i int) {
	e := &in.events[i]
	body := []byte(e.Body)
	if body == nil {
		body = []byte{}
	}
	in.args = append(in.args, e.EventID, in.digests[i][:], e.EventType, e.NodeID, e.LogID, int64(e.Seq),
		e.Timestamp.UnixNano(), t.now.UnixNano(), e.ReleaseID, e.Fingerprint, e.AuditID, e.Decision, e.Outcome,
		e.Kind, e.Class, e.TraceID, body)
}

// logRow is a row of logs.
type logRow struct {
	id                                                 int64
	watermark, lastSeq, ranges, held, pruned, newestNS int64
}

func (t *tx) logRow(ctx context.Context, k logKey) (*logRow, error) {
	var r logRow
	err := t.row(ctx, `SELECT id, watermark, last_seq, ranges, held, pruned, newest_ns FROM logs WHERE node_id = ? AND log_id = ?`,
		[]any{k.node, k.log}, &r.id, &r.watermark, &r.lastSeq, &r.ranges, &r.held, &r.pruned, &r.newestNS)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return &r, err
}

// prunedAway reports whether e was held and has been removed by retention. logs
// remembers the rows looked up in this call.
func (t *tx) prunedAway(ctx context.Context, e *event.Event, logs map[logKey]*logRow) (bool, error) {
	if e.Seq == 0 {
		return false, nil
	}
	k := logKey{e.NodeID, e.LogID}
	row, ok := logs[k]
	if !ok {
		var err error
		if row, err = t.logRow(ctx, k); err != nil {
			return false, err
		}
		logs[k] = row
	}
	if row == nil || int64(e.Seq) > row.pruned {
		return false, nil
	}
	var last int64
	err := t.row(ctx, `SELECT last FROM log_ranges WHERE log = ? AND first <= ? ORDER BY first DESC LIMIT 1`, []any{row.id, int64(e.Seq)}, &last)
	if errors.Is(err, sql.ErrNoRows) || err == nil && last < int64(e.Seq) {
		return false, nil // a hole that is filled late
	}
	if err != nil {
		return false, err
	}
	var one int
	err = t.row(ctx, `SELECT 1 FROM events WHERE event_id = ?`, []any{e.EventID}, &one)
	if errors.Is(err, sql.ErrNoRows) {
		return true, nil
	}
	return false, err
}

// advanceLogs enters the new records' sequence numbers, merged into runs.
func (t *tx) advanceLogs(ctx context.Context, events []event.Event, fresh []int) error {
	type entry struct {
		seqs   []int64
		newest int64
	}
	byLog := map[logKey]*entry{}
	var order []logKey // map order must not choose row ids
	for _, i := range fresh {
		e := &events[i]
		if e.Seq == 0 {
			continue
		}
		k := logKey{e.NodeID, e.LogID}
		en := byLog[k]
		if en == nil {
			en = &entry{}
			byLog[k] = en
			order = append(order, k)
		}
		en.seqs = append(en.seqs, int64(e.Seq))
		en.newest = max(en.newest, e.Timestamp.UnixNano())
	}
	for _, k := range order {
		en := byLog[k]
		row, err := t.logRow(ctx, k)
		if err != nil {
			return err
		}
		if row == nil {
			res, err := t.exec(ctx, `INSERT INTO logs (node_id, log_id, watermark, last_seq, ranges, held, pruned, newest_ns) VALUES (?,?,0,0,0,0,0,0)`, k.node, k.log)
			if err != nil {
				return err
			}
			id, err := res.LastInsertId()
			if err != nil {
				return err
			}
			row = &logRow{id: id}
		}
		slices.Sort(en.seqs)
		for i := 0; i < len(en.seqs); {
			j := i + 1
			for j < len(en.seqs) && en.seqs[j] == en.seqs[j-1]+1 {
				j++
			}
			if err := t.addRange(ctx, row, en.seqs[i], en.seqs[j-1]); err != nil {
				return err
			}
			i = j
		}
		row.lastSeq = max(row.lastSeq, en.seqs[len(en.seqs)-1])
		row.newestNS = max(row.newestNS, en.newest)
		if _, err := t.exec(ctx, `UPDATE logs SET watermark = ?, last_seq = ?, ranges = ?, held = ?, newest_ns = ? WHERE id = ?`,
			row.watermark, row.lastSeq, row.ranges, row.held, row.newestNS, row.id); err != nil {
			return err
		}
	}
	return nil
}

// addRange enters [first, last], none of which is held, and joins it with the
// neighbours it touches: ranges stay disjoint and apart.
func (t *tx) addRange(ctx context.Context, row *logRow, first, last int64) error {
	row.held += last - first + 1
	var f, l int64
	err := t.row(ctx, `SELECT first, last FROM log_ranges WHERE log = ? AND first < ? ORDER BY first DESC LIMIT 1`, []any{row.id, first}, &f, &l)
	switch {
	case errors.Is(err, sql.ErrNoRows):
	case err != nil:
		return err
	case l == first-1:
		first = f
	}
	err = t.row(ctx, `SELECT last FROM log_ranges WHERE log = ? AND first = ?`, []any{row.id, last + 1}, &l)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		row.ranges++
	case err != nil:
		return err
	default:
		if _, err := t.exec(ctx, `DELETE FROM log_ranges WHERE log = ? AND first = ?`, row.id, last+1); err != nil {
			return err
		}
		last = l
	}
	res, err := t.exec(ctx, `UPDATE log_ranges SET last = ? WHERE log = ? AND first = ?`, last, row.id, first)
	if err != nil {
		return err
	}
	n, err := res.RowsAffected()
	if err != nil {
		return err
	}
	if n == 1 {
		row.ranges--
	} else if _, err := t.exec(ctx, `INSERT INTO log_ranges (log, first, last) VALUES (?,?,?)`, row.id, first, last); err != nil {
		return err
	}
	if first == 1 {
		row.watermark = last
	}
	return nil
}

// states are the event types whose release_id and fingerprint name what the
// node runs; the other types name a candidate.
var states = map[string]bool{
	event.Decision: true, event.Action: true, event.NodeHeartbeat: true, event.NodeStarted: true,
	event.ReleaseActivated: true, event.PolicyLoaded: true,
}

// observation is the newest word of a node about itself in one call.
type observation struct {
	seenNS, atNS                                        int64
	release, fingerprint, policyRef, version, assurance string
	bodies                                              map[string]*event.Event // newest by type, parsed at the end
	conflicts                                           int
}

// observe updates the fleet's rows.
func (t *tx) observe(ctx context.Context, events []event.Event, fresh []int, conflicts map[string]int) error {
	nodes := map[string]*observation{}
	get := func(id string) *observation {
		o := nodes[id]
		if o == nil {
			o = &observation{bodies: map[string]*event.Event{}}
			nodes[id] = o
		}
		return o
	}
	now := t.now.UnixNano()
	// What a repeated delivery says about "now" was said the first time.
	for _, i := range fresh {
		e := &events[i]
		at := e.Timestamp.UnixNano()
		o := get(e.NodeID)
		// An old log that is delivered late does not make its node alive, and a
		// clock that runs ahead does not keep it alive.
		o.seenNS = max(o.seenNS, min(at, now))
		if !states[e.EventType] || at < o.atNS && o.bodies[e.EventType] != nil {
			continue
		}
		if at >= o.atNS {
			o.atNS = at
			o.release = cmp.Or(e.ReleaseID, o.release)
			o.fingerprint = cmp.Or(e.Fingerprint, o.fingerprint)
		}
		if e.EventType != event.Action {
			o.bodies[e.EventType] = e
		}
	}
	for id, n := range conflicts {
		get(id).conflicts = n
	}
	ids := make([]string, 0, len(nodes))
	for id := range nodes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		o := nodes[id]
		o.readBodies()
		if _, err := t.exec(ctx, `
INSERT INTO nodes (node_id, first_ns, seen_ns, observed_ns, release_id, fingerprint, policy_ref, version, assurance, conflicts)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
ON CONFLICT (node_id) DO UPDATE SET
    seen_ns     = max(seen_ns, ?3),
    release_id  = CASE WHEN ?4 >= observed_ns AND ?5 <> '' THEN ?5 ELSE release_id END,
    fingerprint = CASE WHEN ?4 >= observed_ns AND ?6 <> '' THEN ?6 ELSE fingerprint END,
    policy_ref  = CASE WHEN ?4 >= observed_ns AND ?7 <> '' THEN ?7 ELSE policy_ref END,
    version     = CASE WHEN ?4 >= observed_ns AND ?8 <> '' THEN ?8 ELSE version END,
    assurance   = CASE WHEN ?4 >= observed_ns AND ?9 <> '' THEN ?9 ELSE assurance END,
    observed_ns = max(observed_ns, ?4),
    conflicts   = conflicts + ?10`,
			id, now, o.seenNS, o.atNS, o.release, o.fingerprint, o.policyRef, o.version, o.assurance, o.conflicts); err != nil {
			return err
		}
	}
	return nil
}

// readBodies takes what the fleet shows from the newest bodies. Bodies are a
// node's word and may be anything: what does not fit is passed over.
func (o *observation) readBodies() {
	order := make([]*event.Event, 0, len(o.bodies))
	for _, e := range o.bodies {
		order = append(order, e)
	}
	slices.SortFunc(order, func(a, b *event.Event) int {
		return cmp.Or(a.Timestamp.Compare(b.Timestamp), cmp.Compare(a.EventType, b.EventType))
	})
	for _, e := range order {
		var b struct {
			PolicyRef string          `json:"policy_ref"`
			Version   string          `json:"version"`
			Assurance json.RawMessage `json:"assurance"`
		}
		if len(e.Body) == 0 || json.Unmarshal(e.Body, &b) != nil {
			continue
		}
		if e.EventType != event.NodeStarted && e.EventType != event.NodeHeartbeat {
			b.Version = "" // of something else, such as a bundle
		}
		level := struct {
			Level string `json:"level"`
		}{}
		if len(b.Assurance) > 0 && json.Unmarshal(b.Assurance, &level.Level) != nil {
			_ = json.Unmarshal(b.Assurance, &level) // neither a word nor a report: shown as none given
		}
		for _, f := range []struct {
			to   *string
			from string
		}{{&o.policyRef, b.PolicyRef}, {&o.version, b.Version}, {&o.assurance, level.Level}} {
			if f.from != "" && store.ValidateID(f.from) == nil {
				*f.to = f.from
			}
		}
	}
}
