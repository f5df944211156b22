package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/autonomyops/autonomy/cp/store"
)

// PutAck implements store.Store.
func (s *Store) PutAck(ctx context.Context, a store.Ack) (changed bool, err error) {
	o := &op{kind: "acknowledge", bytes: overhead + 2*int64(len(a.Detail)), run: func(ctx context.Context, t *tx) error {
		changed = false
		var one int
		err := t.row(ctx, `SELECT 1 FROM releases WHERE release_id = ?`, []any{a.ReleaseID}, &one)
		if errors.Is(err, sql.ErrNoRows) {
			return refusal{fmt.Errorf("release %q: %w", a.ReleaseID, store.ErrNotFound)}
		}
		if err != nil {
			return err
		}
		now := t.now.UnixNano()
		if _, err := t.exec(ctx, `INSERT INTO nodes (node_id, first_ns, seen_ns) VALUES (?1, ?2, ?2) ON CONFLICT (node_id) DO UPDATE SET seen_ns = max(seen_ns, ?2)`, a.NodeID, now); err != nil {
			return err
		}
		var id int64
		err = t.row(ctx, `
INSERT INTO acks (node_id, release_id, step, result, code, detail, policy_ref, policy_digest, fingerprint, at_ns) VALUES (?,?,?,?,?,?,?,?,?,?)
ON CONFLICT (node_id, release_id, step) DO UPDATE SET result = excluded.result, code = excluded.code, detail = excluded.detail,
    policy_ref = excluded.policy_ref, policy_digest = excluded.policy_digest, fingerprint = excluded.fingerprint, at_ns = excluded.at_ns
WHERE excluded.at_ns >= at_ns AND (result, code, detail, policy_ref, policy_digest, fingerprint)
    <> (excluded.result, excluded.code, excluded.detail, excluded.policy_ref, excluded.policy_digest, excluded.fingerprint)
RETURNING id`, []any{a.NodeID, a.ReleaseID, a.Step, a.Result, a.Code, a.Detail, a.PolicyRef, a.PolicyDigest, a.Fingerprint, a.At.UnixNano()}, &id)
		if errors.Is(err, sql.ErrNoRows) {
			return nil // the same again, or older than what is held
		}
		if err != nil {
			return err
		}
		changed = true
		if _, err := t.exec(ctx, `UPDATE nodes SET ack = ? WHERE node_id = ?`, id, a.NodeID); err != nil || !a.Activated() {
			return err
		}
		_, err = t.exec(ctx, `
UPDATE nodes SET release_id = ?2, observed_ns = ?3,
    fingerprint = CASE WHEN ?4 <> '' THEN ?4 ELSE fingerprint END,
    policy_ref = CASE WHEN ?5 <> '' THEN ?5 ELSE policy_ref END
WHERE node_id = ?1 AND observed_ns <= ?3`, a.NodeID, a.ReleaseID, a.At.UnixNano(), a.Fingerprint, a.PolicyRef)
		return err
	}}
	if err := s.do(ctx, o); err != nil {
		return false, err
	}
	return changed, nil
}

// Touch implements store.Store.
func (s *Store) Touch(ctx context.Context, nodeID, channel string) error {
	return s.do(ctx, &op{kind: "note a poll", bytes: overhead, run: func(ctx context.Context, t *tx) error {
		_, err := t.exec(ctx, `INSERT INTO nodes (node_id, channel, first_ns, seen_ns) VALUES (?1, ?2, ?3, ?3)
ON CONFLICT (node_id) DO UPDATE SET channel = ?2, seen_ns = max(seen_ns, ?3)`, nodeID, channel, t.now.UnixNano())
		return err
	}})
}

// Nodes implements store.Store.
func (s *Store) Nodes(ctx context.Context, after string, limit int) ([]store.Node, error) {
	if limit < 1 || limit > store.MaxPage {
		return nil, fmt.Errorf("list nodes: limit %d, want 1 to %d", limit, store.MaxPage)
	}
	rows, err := s.read.QueryContext(ctx, `
SELECT n.node_id, n.channel, n.first_ns, n.seen_ns, n.release_id, n.fingerprint, n.policy_ref, n.version, n.assurance, n.conflicts,
    coalesce(d.release_id, ''), coalesce(d.sequence, 0),
    coalesce(l.log_id, ''), coalesce(l.last_seq, 0), coalesce(l.watermark, 0),
    coalesce((SELECT sum(ranges - (watermark > 0)) FROM logs WHERE node_id = n.node_id), 0),
    coalesce((SELECT sum(last_seq - held) FROM logs WHERE node_id = n.node_id), 0),
    coalesce(a.release_id, ''), coalesce(a.step, ''), coalesce(a.result, ''), coalesce(a.code, ''), coalesce(a.detail, ''), coalesce(a.at_ns, 0)
FROM nodes n
LEFT JOIN releases d ON d.id = (SELECT id FROM releases WHERE channel = n.channel ORDER BY sequence DESC LIMIT 1)
LEFT JOIN logs l ON l.id = (SELECT id FROM logs WHERE node_id = n.node_id ORDER BY newest_ns DESC, id DESC LIMIT 1)
LEFT JOIN acks a ON a.id = n.ack
WHERE n.node_id > ? ORDER BY n.node_id LIMIT ?`, after, limit)
	if err != nil {
		return nil, s.note(fmt.Errorf("list nodes: %w", err))
	}
	defer rows.Close()
	var out []store.Node
	for rows.Next() {
		var n store.Node
		var a store.Ack
		var first, seen, at int64
		if err := rows.Scan(&n.NodeID, &n.Channel, &first, &seen, &n.ObservedRelease, &n.Fingerprint, &n.PolicyRef, &n.Version, &n.Assurance, &n.Conflicts,
			&n.DesiredRelease, &n.DesiredSequence, &n.LogID, &n.LastSeq, &n.Watermark, &n.Gaps, &n.Missing,
			&a.ReleaseID, &a.Step, &a.Result, &a.Code, &a.Detail, &at); err != nil {
			return nil, s.note(fmt.Errorf("list nodes: %w", err))
		}
		n.FirstSeen, n.LastSeen = instant(first), instant(seen)
		if a.Step != "" {
			a.NodeID, a.At = n.NodeID, instant(at)
			n.LastAck = &a
		}
		out = append(out, n)
	}
	if err := rows.Err(); err != nil {
		return nil, s.note(fmt.Errorf("list nodes: %w", err))
	}
	return out, nil
}

// Summary implements store.Store.
func (s *Store) Summary(ctx context.Context, now time.Time, staleAfter time.Duration) (store.Summary, error) {
	var m store.Summary
	// The same judgement as store.Node.State.
	t, stale := now.UnixNano(), staleAfter.Nanoseconds()
	err := s.read.QueryRowContext(ctx, `
SELECT count(*),
    count(*) FILTER (WHERE seen_ns > 0 AND ?1 - seen_ns <= ?2 AND ?1 - seen_ns >= -?2),
    count(*) FILTER (WHERE seen_ns > 0 AND ?1 - seen_ns > ?2),
    count(*) FILTER (WHERE desired <> '' AND desired = release_id),
    count(*) FILTER (WHERE desired <> '' AND desired <> release_id),
    coalesce(sum(conflicts), 0)
FROM (SELECT seen_ns, release_id, conflicts,
    coalesce((SELECT r.release_id FROM releases r WHERE r.channel = nodes.channel ORDER BY r.sequence DESC LIMIT 1), '') AS desired FROM nodes)`, t, stale).
		Scan(&m.Nodes, &m.Up, &m.Stale, &m.InSync, &m.Behind, &m.Conflicts)
	if err != nil {
		return m, s.note(fmt.Errorf("count the fleet: %w", err))
	}
	m.Unknown = m.Nodes - m.Up - m.Stale
	err = s.read.QueryRowContext(ctx, `SELECT coalesce(sum(ranges - (watermark > 0)), 0), coalesce(sum(last_seq - held), 0) FROM logs`).Scan(&m.Gaps, &m.Missing)
	if err != nil {
		return m, s.note(fmt.Errorf("count gaps: %w", err))
	}
	return m, nil
}
