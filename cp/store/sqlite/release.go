package sqlite

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/autonomyops/autonomy/cp/store"
)

const releaseCols = `id, release_id, channel, sequence, digest, envelope, statement, verified_by, published_ns`

// PutRelease implements store.Store.
func (s *Store) PutRelease(ctx context.Context, r store.Release) (created bool, err error) {
	o := &op{kind: "publish release", bytes: overhead + 4*int64(len(r.Envelope)), run: func(ctx context.Context, t *tx) error {
		created = false
		var held []byte
		err := t.row(ctx, `SELECT statement FROM releases WHERE release_id = ?`, []any{r.ReleaseID}, &held)
		switch {
		case err == nil && bytes.Equal(held, r.Statement):
			return nil // signed anew or sent again: what came first stays
		case err == nil:
			return refusal{fmt.Errorf("release %q: %w", r.ReleaseID, store.ErrReleaseConflict)}
		case !errors.Is(err, sql.ErrNoRows):
			return err
		}
		refused := &store.SequenceError{Channel: r.Channel, Sequence: r.Sequence}
		err = t.row(ctx, `SELECT sequence, release_id FROM releases WHERE channel = ? ORDER BY sequence DESC LIMIT 1`, []any{r.Channel}, &refused.Highest, &refused.HighestID)
		switch {
		case err == nil && r.Sequence <= refused.Highest:
			return refusal{refused}
		case err != nil && !errors.Is(err, sql.ErrNoRows):
			return err
		}
		created = true
		_, err = t.exec(ctx, `INSERT INTO releases (release_id, channel, sequence, digest, envelope, statement, verified_by, published_ns) VALUES (?,?,?,?,?,?,?,?)`,
			r.ReleaseID, r.Channel, int64(r.Sequence), r.Digest, r.Envelope, r.Statement, r.VerifiedBy, t.now.UnixNano())
		return err
	}}
	if err := s.do(ctx, o); err != nil {
		return false, err
	}
	return created, nil
}

func scanRelease(scan func(...any) error) (r store.Release, id int64, err error) {
	var published int64
	err = scan(&id, &r.ReleaseID, &r.Channel, &r.Sequence, &r.Digest, &r.Envelope, &r.Statement, &r.VerifiedBy, &published)
	r.PublishedAt = instant(published)
	return r, id, err
}

func (s *Store) oneRelease(ctx context.Context, what, where string, arg string) (store.Release, error) {
	r, _, err := scanRelease(s.read.QueryRowContext(ctx, `SELECT `+releaseCols+` FROM releases WHERE `+where, arg).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return r, fmt.Errorf("%s %q: %w", what, arg, store.ErrNotFound)
	}
	if err != nil {
		return r, s.note(fmt.Errorf("read release: %w", err))
	}
	return r, nil
}

// LatestRelease implements store.Store.
func (s *Store) LatestRelease(ctx context.Context, channel string) (store.Release, error) {
	return s.oneRelease(ctx, "release in channel", `channel = ? ORDER BY sequence DESC LIMIT 1`, channel)
}

// GetRelease implements store.Store.
func (s *Store) GetRelease(ctx context.Context, releaseID string) (store.Release, error) {
	return s.oneRelease(ctx, "release", `release_id = ?`, releaseID)
}

// ListReleases implements store.Store.
func (s *Store) ListReleases(ctx context.Context, channel string, before int64, limit int) (page []store.Release, next int64, err error) {
	if limit < 1 || limit > store.MaxPage {
		return nil, 0, fmt.Errorf("list releases: limit %d, want 1 to %d", limit, store.MaxPage)
	}
	rows, err := s.read.QueryContext(ctx, `SELECT `+releaseCols+` FROM releases WHERE (?1 = '' OR channel = ?1) AND (?2 = 0 OR id < ?2) ORDER BY id DESC LIMIT ?3`, channel, before, limit+1)
	if err != nil {
		return nil, 0, s.note(fmt.Errorf("list releases: %w", err))
	}
	defer rows.Close()
	var last int64
	for rows.Next() {
		if len(page) == limit {
			next = last
			break
		}
		r, id, err := scanRelease(rows.Scan)
		if err != nil {
			return nil, 0, s.note(fmt.Errorf("list releases: %w", err))
		}
		page, last = append(page, r), id
	}
	if err := rows.Err(); err != nil {
		return nil, 0, s.note(fmt.Errorf("list releases: %w", err))
	}
	return page, next, nil
}
