package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/cp/store"
)

// eventQuery builds the page query. The partial indexes are usable only when the
// query says what they are partial by, so it does.
func eventQuery(f store.Filter, after store.Cursor, limit int) (string, []any) {
	var where []string
	var args []any
	eq := func(col, val string, partial bool) {
		if val == "" {
			return
		}
		where = append(where, col+" = ?")
		args = append(args, val)
		if partial {
			where = append(where, col+" <> ''")
		}
	}
	eq("audit_id", f.AuditID, true)
	eq("release_id", f.ReleaseID, true)
	eq("decision", f.Decision, true)
	eq("kind", f.Kind, true)
	eq("node_id", f.NodeID, false)
	eq("event_type", f.EventType, false)
	eq("outcome", f.Outcome, false)
	if !f.Since.IsZero() {
		where = append(where, "time_ns >= ?")
		args = append(args, f.Since.UnixNano())
	}
	if !f.Until.IsZero() {
		where = append(where, "time_ns < ?")
		args = append(args, f.Until.UnixNano())
	}
	if after != (store.Cursor{}) {
		where = append(where, "(time_ns, id) < (?, ?)")
		args = append(args, after.TimeNS, after.ID)
	}
	q := `SELECT id, event_id, event_type, node_id, log_id, seq, time_ns, received_ns, release_id, fingerprint, audit_id, decision, outcome, kind, class, trace_id, body FROM events`
	if len(where) > 0 {
		q += " WHERE " + strings.Join(where, " AND ")
	}
	return q + " ORDER BY time_ns DESC, id DESC LIMIT ?", append(args, limit+1)
}

// QueryEvents implements store.Store.
func (s *Store) QueryEvents(ctx context.Context, f store.Filter, after store.Cursor, limit int) (page []store.Event, next store.Cursor, more bool, err error) {
	if limit < 1 || limit > store.MaxPage {
		return nil, next, false, fmt.Errorf("query events: limit %d, want 1 to %d", limit, store.MaxPage)
	}
	q, args := eventQuery(f, after, limit)
	rows, err := s.read.QueryContext(ctx, q, args...)
	if err != nil {
		return nil, next, false, s.note(fmt.Errorf("query events: %w", err))
	}
	defer rows.Close()
	for rows.Next() {
		if len(page) == limit {
			more = true
			break
		}
		var e store.Event
		var id, seq, at, received int64
		var body []byte
		if err := rows.Scan(&id, &e.EventID, &e.EventType, &e.NodeID, &e.LogID, &seq, &at, &received, &e.ReleaseID, &e.Fingerprint,
			&e.AuditID, &e.Decision, &e.Outcome, &e.Kind, &e.Class, &e.TraceID, &body); err != nil {
			return nil, next, false, s.note(fmt.Errorf("query events: %w", err))
		}
		e.Seq, e.Timestamp, e.ReceivedAt = uint64(seq), instant(at), instant(received)
		if len(body) > 0 {
			e.Body = body
		}
		page = append(page, e)
		next = store.Cursor{TimeNS: at, ID: id}
	}
	if err := rows.Err(); err != nil {
		return nil, next, false, s.note(fmt.Errorf("query events: %w", err))
	}
	return page, next, more, nil
}

func instant(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

// Watermark implements store.Store.
func (s *Store) Watermark(ctx context.Context, nodeID, logID string) (store.Watermark, error) {
	w := store.Watermark{NodeID: nodeID}
	q := `SELECT log_id, watermark FROM logs WHERE node_id = ? ORDER BY newest_ns DESC, id DESC LIMIT 1`
	args := []any{nodeID}
	if logID != "" {
		q = `SELECT log_id, watermark FROM logs WHERE node_id = ? AND log_id = ?`
		args = append(args, logID)
	}
	err := s.read.QueryRowContext(ctx, q, args...).Scan(&w.LogID, &w.Seq)
	if errors.Is(err, sql.ErrNoRows) {
		return w, fmt.Errorf("log of node %q: %w", nodeID, store.ErrNotFound)
	}
	if err != nil {
		return w, s.note(fmt.Errorf("watermark: %w", err))
	}
	return w, nil
}
