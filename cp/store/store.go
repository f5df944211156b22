// Package store is the control plane's memory: what it holds, the errors a
// caller can branch on, and the interface that every backend satisfies
// (cp/store/storetest is the contract in tests; cp/store/sqlite the first
// backend).
//
// The life of an event: cp/api decodes and checks it, AppendEvents hands a
// request's events to the backend as one unit, and the call returns when they
// are committed. An event_id is stored once. The same event again changes
// nothing; other content under a known event_id is a conflict: what came first
// stays, and the conflict is counted against the node, so that it shows.
//
// Per (node_id, log_id) the backend keeps which sequence numbers it has ever
// held, as ranges. The watermark is the end of the range that starts at 1: the
// node may forget everything up to it. Every hole is a gap until it is filled.
// Ranges outlive the events that retention removes.
//
// Units: times are UTC with nanoseconds; sizes are bytes. A Store is safe for
// concurrent use. Only cp and its folders import this package.
package store

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/autonomyops/autonomy/internal/event"
)

// Limits that every backend relies on and that ValidateEvent enforces.
const (
	MaxID        = 128     // bytes of an identifier: event_id, node_id, log_id, audit_id, …
	MaxBody      = 1 << 20 // bytes of one event's body
	MaxPage      = 1000    // events or rows of one query
	MaxBatch     = 65536   // events of one AppendEvents
	MaxEnvelope  = 1 << 20 // bytes of one release envelope
	MaxAckDetail = 4096    // bytes of an acknowledgement's detail
)

// Errors of a Store. Anything else is internal.
var (
	ErrNotFound = errors.New("not found")
	// ErrFull: the ceiling or the free space to keep is reached; nothing of the call is stored.
	ErrFull = errors.New("store is full")
	// ErrBusy: the writer's queue stayed full; nothing of the call is stored, try again.
	ErrBusy = errors.New("store is busy")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("store is closed")
	// ErrDamaged: the data on disk cannot be read as what was written.
	ErrDamaged = errors.New("store is damaged")
	// ErrLocked: another process has the store open.
	ErrLocked = errors.New("store is in use by another process")
	// ErrNewer: the store was written by a newer release of this program.
	ErrNewer = errors.New("store has a newer schema")
	// ErrReleaseConflict: the release_id is taken by a release with other content.
	ErrReleaseConflict = errors.New("release_id is taken by other content")
	// ErrInvalid: an event breaks a limit (ValidateEvent says which).
	ErrInvalid = errors.New("invalid event")
)

// SequenceError: the channel already has a release with this sequence or a
// higher one.
type SequenceError struct {
	Channel   string
	Sequence  uint64 // offered
	Highest   uint64 // held
	HighestID string // release_id of the highest
}

func (e *SequenceError) Error() string {
	return fmt.Sprintf("channel %q is at sequence %d (release %s): sequence %d is not higher", e.Channel, e.Highest, e.HighestID, e.Sequence)
}

// Event is an event as it is held.
type Event struct {
	event.Event
	ReceivedAt time.Time `json:"received_at"`
}

// Ingest tells what AppendEvents did. Received = Inserted + Deduped +
// Conflicts.
type Ingest struct {
	Received  int
	Inserted  int
	Deduped   int // known, same content
	Conflicts int // known event_id (or sequence number), other content: not stored
}

// Filter selects events; zero fields select all. Since is inclusive, Until
// exclusive, both on the event's own timestamp.
type Filter struct {
	NodeID, EventType, ReleaseID, AuditID, Decision, Outcome, Kind string
	Since, Until                                                   time.Time
}

// Cursor is a position in the newest-first order: the last event that was
// returned. The zero Cursor starts at the newest.
type Cursor struct {
	TimeNS int64 // the event's timestamp, ns since 1970
	ID     int64 // the backend's row
}

// Watermark says how far a node's log is held without a gap.
type Watermark struct {
	NodeID string
	LogID  string
	Seq    uint64 // highest contiguous, from 1; 0: the first record is not there
}

// Release is one published release, append-only.
type Release struct {
	ReleaseID   string
	Channel     string
	Sequence    uint64
	Digest      string // "sha256:" of Envelope
	Envelope    []byte // the DSSE envelope as it was posted
	Statement   []byte // its payload: the release's JSON
	VerifiedBy  string // key that this control plane checked it with; "": not checked here
	PublishedAt time.Time
}

// Ack is a node's report of one lifecycle step of a release. The last report of
// a step counts.
type Ack struct {
	NodeID       string
	ReleaseID    string
	Step         string
	Result       string
	Code         string
	Detail       string
	PolicyRef    string
	PolicyDigest string
	Fingerprint  string
	At           time.Time // the node's clock, or the time of receipt
}

// Activated reports whether a says that its release is now active.
func (a *Ack) Activated() bool {
	return (a.Step == "activate" || a.Step == "activated") && a.Result == "passed"
}

// Node is one row of the fleet, without the judgement of time: see State.
type Node struct {
	NodeID          string
	Channel         string // from its last poll; "": never polled
	DesiredRelease  string // highest sequence in Channel; "": none
	DesiredSequence uint64
	ObservedRelease string // from acknowledgements and events
	Fingerprint     string
	PolicyRef       string
	Version         string
	Assurance       string
	LogID           string // newest log
	LastSeq         uint64 // highest of the newest log
	Watermark       uint64 // of the newest log
	Gaps            uint64 // missing ranges over all logs
	Missing         uint64 // missing records over all logs
	Conflicts       uint64
	FirstSeen       time.Time
	LastSeen        time.Time
	LastAck         *Ack
}

// States of a node.
const (
	StateUp      = "up"
	StateStale   = "stale"
	StateUnknown = "unknown"
)

// State judges a node: up when it was heard of within staleAfter, stale when
// longer ago, unknown when never, or when the clock stands before what it said.
func (n *Node) State(now time.Time, staleAfter time.Duration) string {
	silent := now.Sub(n.LastSeen)
	switch {
	case n.LastSeen.IsZero() || silent < -staleAfter:
		return StateUnknown
	case silent > staleAfter:
		return StateStale
	}
	return StateUp
}

// Summary counts the fleet.
type Summary struct {
	Nodes, Up, Stale, Unknown int
	InSync                    int // observed is desired
	Behind                    int // has a desired release and does not run it
	Gaps, Missing, Conflicts  uint64
}

// Stats is for metrics and readiness.
type Stats struct {
	Bytes    int64 // on disk, all files
	MaxBytes int64
	Queue    int // write calls waiting
	QueueCap int
	Commits  uint64 // transactions since Open
	Pruned   uint64 // events removed by retention since Open
}

// Store is the control plane's memory. All methods may also return ErrClosed,
// ErrDamaged and the context's error; the writing ones ErrBusy and ErrFull. A
// write whose context ended may still have been committed.
type Store interface {
	// AppendEvents stores events, all or none. When it returns nil they are
	// durable. Events must pass ValidateEvent (ErrInvalid).
	AppendEvents(ctx context.Context, events []event.Event) (Ingest, error)
	// QueryEvents returns at most limit (1…MaxPage) events after the cursor,
	// newest first, and the cursor of the last one; more says whether there
	// are others behind it.
	QueryEvents(ctx context.Context, f Filter, after Cursor, limit int) (page []Event, next Cursor, more bool, err error)
	// Watermark of a node's log; with logID "" of its newest. ErrNotFound.
	Watermark(ctx context.Context, nodeID, logID string) (Watermark, error)

	// PutRelease publishes. created is false when the very release is held
	// already. *SequenceError, ErrReleaseConflict.
	PutRelease(ctx context.Context, r Release) (created bool, err error)
	// LatestRelease has the highest sequence of the channel. ErrNotFound.
	LatestRelease(ctx context.Context, channel string) (Release, error)
	// GetRelease by release_id. ErrNotFound.
	GetRelease(ctx context.Context, releaseID string) (Release, error)
	// ListReleases returns releases newest first, published before the row
	// `before` (0: from the newest); channel "" means all.
	ListReleases(ctx context.Context, channel string, before int64, limit int) (page []Release, next int64, err error)

	// PutAck stores a report. changed is false when it says what is held
	// already. ErrNotFound when the release is not known.
	PutAck(ctx context.Context, a Ack) (changed bool, err error)
	// Touch notes that a node polled a channel.
	Touch(ctx context.Context, nodeID, channel string) error
	// Nodes lists the fleet by node_id, after the given one.
	Nodes(ctx context.Context, after string, limit int) ([]Node, error)
	// Summary counts the fleet as of now.
	Summary(ctx context.Context, now time.Time, staleAfter time.Duration) (Summary, error)

	// Ready reports why the store cannot take writes now, or nil.
	Ready(ctx context.Context) error
	Stats() Stats
	// Close commits what was accepted and closes the files.
	Close() error
}

// maxTime is the last instant that int64 nanoseconds can say.
var maxTime = time.Unix(0, 1<<63-1)

// ValidateEvent checks the limits that a backend relies on. Body must be a JSON
// object already, or empty.
func ValidateEvent(e *event.Event) error {
	switch {
	case e.EventID == "":
		return fmt.Errorf("%w: event_id is missing", ErrInvalid)
	case e.EventType == "":
		return fmt.Errorf("%w: event_type is missing", ErrInvalid)
	case e.NodeID == "":
		return fmt.Errorf("%w: node_id is missing", ErrInvalid)
	case e.Timestamp.IsZero():
		return fmt.Errorf("%w: timestamp is missing", ErrInvalid)
	case e.Timestamp.Unix() < 0 || e.Timestamp.After(maxTime):
		return fmt.Errorf("%w: timestamp %s: want a time between 1970 and 2262", ErrInvalid, e.Timestamp.Format(time.RFC3339))
	case e.Seq > 1<<63-1:
		return fmt.Errorf("%w: seq %d is over 2^63-1", ErrInvalid, e.Seq)
	case len(e.Body) > MaxBody:
		return fmt.Errorf("%w: body has %d bytes, at most %d", ErrInvalid, len(e.Body), MaxBody)
	case e.LogID != "" && e.Seq > 0 && e.EventID != event.ID(e.LogID, e.Seq):
		return fmt.Errorf("%w: event_id %q: record %d of log %s is named %q", ErrInvalid, e.EventID, e.Seq, e.LogID, event.ID(e.LogID, e.Seq))
	}
	for _, f := range [...]struct{ name, val string }{
		{"event_id", e.EventID}, {"event_type", e.EventType}, {"node_id", e.NodeID}, {"log_id", e.LogID},
		{"release_id", e.ReleaseID}, {"fingerprint", e.Fingerprint}, {"audit_id", e.AuditID}, {"decision", e.Decision},
		{"outcome", e.Outcome}, {"kind", e.Kind}, {"class", e.Class}, {"trace_id", e.TraceID},
	} {
		if err := ValidateID(f.val); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrInvalid, f.name, err)
		}
	}
	return nil
}

// ValidateID checks an identifier: at most MaxID bytes of valid UTF-8 without
// control characters. Empty is valid.
func ValidateID(s string) error {
	if len(s) > MaxID {
		return fmt.Errorf("%d bytes, at most %d", len(s), MaxID)
	}
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, n := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && n <= 1 {
				return errors.New("invalid UTF-8")
			}
			if r < 0xa0 {
				return fmt.Errorf("control character %q", r)
			}
			i += n
			continue
		}
		if c < 0x20 || c == 0x7f {
			return fmt.Errorf("control character %q", rune(c))
		}
		i++
	}
	return nil
}

// Digest is a hash over everything an event says; with it a repeated event is
// told from another one under the same name. The first half of SHA-256.
func Digest(e *event.Event) [16]byte {
	var few [1024]byte
	b := few[:0]
	for _, s := range [...]string{e.EventID, e.EventType, e.NodeID, e.LogID, e.ReleaseID, e.Fingerprint, e.AuditID,
		e.Decision, e.Outcome, e.Kind, e.Class, e.TraceID} {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	b = binary.AppendUvarint(b, e.Seq)
	b = binary.AppendVarint(b, e.Timestamp.UnixNano())
	b = append(b, e.Body...)
	sum := sha256.Sum256(b)
	return [16]byte(sum[:16])
}
