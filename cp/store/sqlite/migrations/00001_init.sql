-- +goose Up

-- One row per event. id is the order of arrival; time_ns the event's own clock.
CREATE TABLE events (
    id          INTEGER PRIMARY KEY,
    event_id    TEXT    NOT NULL,
    digest      BLOB    NOT NULL,
    event_type  TEXT    NOT NULL,
    node_id     TEXT    NOT NULL,
    log_id      TEXT    NOT NULL,
    seq         INTEGER NOT NULL,
    time_ns     INTEGER NOT NULL,
    received_ns INTEGER NOT NULL,
    release_id  TEXT    NOT NULL,
    fingerprint TEXT    NOT NULL,
    audit_id    TEXT    NOT NULL,
    decision    TEXT    NOT NULL,
    outcome     TEXT    NOT NULL,
    kind        TEXT    NOT NULL,
    class       TEXT    NOT NULL,
    trace_id    TEXT    NOT NULL,
    body        BLOB    NOT NULL
) STRICT;

CREATE UNIQUE INDEX events_event_id ON events (event_id);
-- A record number without a log_id has no name of its own: it counts in the node's one unnamed log.
CREATE UNIQUE INDEX events_unnamed_log ON events (node_id, seq) WHERE log_id = '' AND seq > 0;

-- Each filter has an index that ends in time_ns (and in id, which SQLite adds),
-- so that a page is read off in order without sorting.
CREATE INDEX events_time ON events (time_ns);
CREATE INDEX events_node ON events (node_id, time_ns);
CREATE INDEX events_type ON events (event_type, time_ns);
CREATE INDEX events_decision ON events (decision, time_ns) WHERE decision <> '';
CREATE INDEX events_kind ON events (kind, time_ns) WHERE kind <> '';
CREATE INDEX events_release ON events (release_id, time_ns) WHERE release_id <> '';
CREATE INDEX events_audit ON events (audit_id, time_ns) WHERE audit_id <> '';

-- What was ever held of each log. ranges, held and watermark are sums over log_ranges.
CREATE TABLE logs (
    id        INTEGER PRIMARY KEY,
    node_id   TEXT    NOT NULL,
    log_id    TEXT    NOT NULL,
    watermark INTEGER NOT NULL,
    last_seq  INTEGER NOT NULL,
    ranges    INTEGER NOT NULL,
    held      INTEGER NOT NULL,
    pruned    INTEGER NOT NULL, -- highest seq that retention removed
    newest_ns INTEGER NOT NULL, -- latest event time
    UNIQUE (node_id, log_id)
) STRICT;

CREATE TABLE log_ranges (
    log   INTEGER NOT NULL,
    first INTEGER NOT NULL,
    last  INTEGER NOT NULL,
    PRIMARY KEY (log, first)
) STRICT, WITHOUT ROWID;

CREATE TABLE releases (
    id           INTEGER PRIMARY KEY,
    release_id   TEXT    NOT NULL UNIQUE,
    channel      TEXT    NOT NULL,
    sequence     INTEGER NOT NULL,
    digest       TEXT    NOT NULL,
    envelope     BLOB    NOT NULL,
    statement    BLOB    NOT NULL,
    verified_by  TEXT    NOT NULL,
    published_ns INTEGER NOT NULL,
    UNIQUE (channel, sequence)
) STRICT;

-- +goose StatementBegin
CREATE TRIGGER releases_are_append_only BEFORE UPDATE ON releases
BEGIN SELECT RAISE(ABORT, 'releases are append-only'); END;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE TRIGGER releases_are_kept BEFORE DELETE ON releases
BEGIN SELECT RAISE(ABORT, 'releases are append-only'); END;
-- +goose StatementEnd

CREATE TABLE nodes (
    node_id      TEXT PRIMARY KEY,
    channel      TEXT    NOT NULL DEFAULT '',
    first_ns     INTEGER NOT NULL,
    seen_ns      INTEGER NOT NULL,
    observed_ns  INTEGER NOT NULL DEFAULT 0, -- event time of the newest statement about the columns below
    release_id   TEXT    NOT NULL DEFAULT '',
    fingerprint  TEXT    NOT NULL DEFAULT '',
    policy_ref   TEXT    NOT NULL DEFAULT '',
    version      TEXT    NOT NULL DEFAULT '',
    assurance    TEXT    NOT NULL DEFAULT '',
    conflicts    INTEGER NOT NULL DEFAULT 0,
    ack          INTEGER NOT NULL DEFAULT 0  -- acks.id of the newest
) STRICT, WITHOUT ROWID;

CREATE TABLE acks (
    id            INTEGER PRIMARY KEY,
    node_id       TEXT    NOT NULL,
    release_id    TEXT    NOT NULL,
    step          TEXT    NOT NULL,
    result        TEXT    NOT NULL,
    code          TEXT    NOT NULL,
    detail        TEXT    NOT NULL,
    policy_ref    TEXT    NOT NULL,
    policy_digest TEXT    NOT NULL,
    fingerprint   TEXT    NOT NULL,
    at_ns         INTEGER NOT NULL,
    UNIQUE (node_id, release_id, step)
) STRICT;

-- +goose Down
DROP TABLE acks;
DROP TABLE nodes;
DROP TABLE releases;
DROP TABLE log_ranges;
DROP TABLE logs;
DROP TABLE events;
