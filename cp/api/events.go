package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/problem"
	"github.com/autonomyops/autonomy/internal/strictjson"
)

// postEvents takes the native shape and OTLP/HTTP logs. Which of the two a JSON
// body is, its first key tells: {"events":…} or {"resourceLogs":…}.
func (s *Server) postEvents(w http.ResponseWriter, r *http.Request) error {
	mt, err := mediaType(r)
	if err != nil {
		return err
	}
	if mt != typeJSON && mt != typeProtobuf {
		return unsupported(mt, typeJSON, typeProtobuf)
	}
	ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
	defer cancel()
	body, release, err := s.body(w, r, s.o.MaxBodyBytes)
	if err != nil {
		return err
	}
	defer release()
	if mt == typeJSON && !looksLikeOTLP(body) {
		events, err := decodeNative(body)
		if err != nil {
			return err
		}
		in, err := s.o.Store.AppendEvents(ctx, events)
		if err != nil {
			return err
		}
		s.m.ingest(in, 0)
		return writeJSON(w, http.StatusOK, struct {
			Received  int `json:"received"`
			Inserted  int `json:"inserted"`
			Deduped   int `json:"deduped"`
			Conflicts int `json:"conflicts,omitempty"`
		}{in.Received, in.Inserted, in.Deduped, in.Conflicts})
	}
	batch, err := decodeOTLP(body, mt)
	if err != nil {
		return err
	}
	in, err := s.o.Store.AppendEvents(ctx, batch.events)
	if err != nil {
		return s.retryable(r, err)
	}
	s.m.ingest(in, batch.rejected)
	return writeOTLP(w, mt, batch.rejected+in.Conflicts, batch.why(in.Conflicts))
}

// retryable answers an OTLP sender. By the OTLP specification it retries 429,
// 502, 503 and 504 only and drops the batch at any other code: a full store
// (507) or a fault of ours (500) would lose records that nobody refused.
func (s *Server) retryable(r *http.Request, err error) error {
	p := s.problemOf(r, err)
	if p.Status == http.StatusInsufficientStorage || p.Status == http.StatusInternalServerError {
		p.Status, p.Title = http.StatusServiceUnavailable, http.StatusText(http.StatusServiceUnavailable)
		p.RetryAfter = max(p.RetryAfter, 5*time.Second)
	}
	return p
}

// decodeNative reads {"events":[…]} strictly. One bad event refuses all.
func decodeNative(body []byte) ([]event.Event, error) {
	var doc struct {
		Events json.RawMessage `json:"events"`
	}
	if err := strictjson.Unmarshal(body, &doc); err != nil {
		return nil, badRequest("bad_json", "%v: nothing was stored", err)
	}
	if t := bytes.TrimLeft(doc.Events, " \t\r\n"); len(t) == 0 || t[0] != '[' {
		return nil, badRequest("bad_json", `want {"events":[…]}: nothing was stored`)
	}
	// Element by element, so that "[{},{},…" costs no more memory than is stored.
	dec := json.NewDecoder(bytes.NewReader(doc.Events))
	if _, err := dec.Token(); err != nil {
		return nil, badRequest("bad_json", "%v: nothing was stored", err)
	}
	var events []event.Event
	for dec.More() {
		if len(events) == store.MaxBatch {
			return nil, tooMany()
		}
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return nil, badRequest("bad_json", "%v: nothing was stored", err)
		}
		var e event.Event
		err := strictjson.Unmarshal(raw, &e)
		if err == nil {
			err = normalize(&e)
		}
		if err != nil {
			return nil, badRequest("invalid_event", "event %d: %v: nothing was stored", len(events), err)
		}
		events = append(events, e)
	}
	return events, nil
}

func tooMany() error {
	return problem.New(http.StatusRequestEntityTooLarge, "too_many_events", fmt.Sprintf("more than %d events in one request: send smaller batches", store.MaxBatch))
}

// normalize brings an event into the form that is stored, and checks it: the
// same event has the same bytes whichever way it came.
func normalize(e *event.Event) error {
	e.Timestamp = e.Timestamp.UTC()
	if len(e.Body) > 0 {
		if t := bytes.TrimLeft(e.Body, " \t\r\n"); len(t) == 0 || t[0] != '{' {
			return fmt.Errorf("body: want an object")
		}
		var b bytes.Buffer
		b.Grow(len(e.Body))
		if err := json.Compact(&b, e.Body); err != nil {
			return fmt.Errorf("body: %w", err)
		}
		e.Body = b.Bytes()
	}
	e.TraceID = strings.ToLower(e.TraceID)
	return store.ValidateEvent(e)
}

// getEvents answers a page, or with Accept: application/x-ndjson all pages.
func (s *Server) getEvents(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "node_id", "event_type", "release_id", "audit_id", "decision", "outcome", "kind", "since", "until", "limit", "cursor")
	if err != nil {
		return err
	}
	f := store.Filter{
		NodeID: q["node_id"], EventType: q["event_type"], ReleaseID: q["release_id"], AuditID: q["audit_id"],
		Decision: q["decision"], Outcome: q["outcome"], Kind: q["kind"],
	}
	for name, to := range map[string]*time.Time{"since": &f.Since, "until": &f.Until} {
		if v := q[name]; v != "" {
			if *to, err = time.Parse(time.RFC3339Nano, v); err != nil || to.Unix() < 0 || to.Year() > 2261 {
				return badRequest("bad_time", "%s is %q, want RFC 3339, as in 2026-01-31T15:04:05Z", name, v)
			}
		}
	}
	limit, err := limitOf(q, 100)
	if err != nil {
		return err
	}
	var after store.Cursor
	if v := q["cursor"]; v != "" {
		if after, err = parseCursor(v); err != nil {
			return err
		}
	}
	if strings.Contains(r.Header.Get("Accept"), typeNDJSON) {
		_, bounded := q["limit"]
		return s.streamEvents(w, r, f, after, limit, bounded)
	}
	ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
	defer cancel()
	page, next, more, err := s.o.Store.QueryEvents(ctx, f, after, limit)
	if err != nil {
		return err
	}
	out := struct {
		Events     []store.Event `json:"events"`
		NextCursor string        `json:"next_cursor,omitempty"`
	}{Events: page}
	if page == nil {
		out.Events = []store.Event{}
	}
	if more {
		out.NextCursor = formatCursor(next)
	}
	return writeJSON(w, http.StatusOK, out)
}

// streamEvents writes one event a line, newest first: limit of them when the
// caller gave one, else all that match. A stream that cannot be finished is cut
// off, so that the client sees it: the status has been sent by then.
func (s *Server) streamEvents(w http.ResponseWriter, r *http.Request, f store.Filter, after store.Cursor, limit int, bounded bool) error {
	rc := http.NewResponseController(w)
	size := store.MaxPage
	if bounded {
		size = limit
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	for first := true; ; first = false {
		ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
		page, next, more, err := s.o.Store.QueryEvents(ctx, f, after, size)
		cancel()
		if err != nil {
			if first {
				return err
			}
			s.o.Logger.Warn("event stream cut", "error", err)
			panic(http.ErrAbortHandler)
		}
		if first {
			w.Header().Set("Content-Type", typeNDJSON)
			w.Header().Set("Cache-Control", "no-store")
			w.WriteHeader(http.StatusOK)
		}
		buf.Reset()
		for i := range page {
			if err := enc.Encode(&page[i]); err != nil {
				return fmt.Errorf("encode event: %w", err)
			}
		}
		// A client that reads nothing for this long loses the stream.
		if err := rc.SetWriteDeadline(time.Now().Add(handleTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return fmt.Errorf("set deadline: %w", err)
		}
		if _, err := w.Write(buf.Bytes()); err != nil {
			return nil // the client went away
		}
		if !more || bounded {
			return nil
		}
		_ = rc.Flush() // an error shows at the next write
		select {
		case <-s.drain:
			panic(http.ErrAbortHandler)
		default:
		}
		after = next
	}
}

// Cursors are opaque to clients: version, time and row.
const cursorVersion = "1"

func formatCursor(c store.Cursor) string {
	return base64.RawURLEncoding.EncodeToString([]byte(cursorVersion + "." + strconv.FormatInt(c.TimeNS, 36) + "." + strconv.FormatInt(c.ID, 36)))
}

func parseCursor(s string) (store.Cursor, error) {
	bad := badRequest("bad_cursor", "the cursor is not one that this API gave out: use next_cursor of the page before, or none")
	raw, err := base64.RawURLEncoding.Strict().DecodeString(s)
	parts := strings.Split(string(raw), ".")
	if err != nil || len(s) > 64 || len(parts) != 3 || parts[0] != cursorVersion {
		return store.Cursor{}, bad
	}
	at, err1 := strconv.ParseInt(parts[1], 36, 64)
	id, err2 := strconv.ParseInt(parts[2], 36, 64)
	if cmp.Or(err1, err2) != nil || at < 0 || id < 1 {
		return store.Cursor{}, bad
	}
	return store.Cursor{TimeNS: at, ID: id}, nil
}
