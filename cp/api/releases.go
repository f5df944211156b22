package api

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/problem"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/verify"
)

const (
	envelopeType   = "application/vnd.dsse.envelope.v1+json"
	defaultChannel = "stable"
)

// openEnvelope reads the form of an envelope and its statement. With a keyring
// it also verifies; without one it trusts nothing, and does not need to: the
// node verifies.
func openEnvelope(env []byte, kr *verify.Keyring, now time.Time) (r *verify.Release, statement []byte, key string, err error) {
	var doc struct {
		PayloadType string `json:"payloadType"`
		Payload     string `json:"payload"`
		Signatures  []struct {
			KeyID string `json:"keyid"`
			Sig   string `json:"sig"`
		} `json:"signatures"`
	}
	if err := strictjson.Unmarshal(env, &doc); err != nil {
		return nil, nil, "", badRequest("bad_envelope", "not a DSSE envelope: %v", err)
	}
	if doc.PayloadType != verify.ReleaseMediaType {
		return nil, nil, "", badRequest("bad_envelope", "payloadType is %q, want %q", clip(doc.PayloadType), verify.ReleaseMediaType)
	}
	if len(doc.Signatures) == 0 {
		return nil, nil, "", badRequest("bad_envelope", "the envelope holds no signature: sign it with autonomy release create --key")
	}
	if statement, err = base64.StdEncoding.Strict().DecodeString(doc.Payload); err != nil {
		if statement, err = base64.URLEncoding.Strict().DecodeString(doc.Payload); err != nil {
			return nil, nil, "", badRequest("bad_envelope", "payload is not base64")
		}
	}
	if r, err = verify.ParseRelease(statement); err != nil {
		return nil, nil, "", badRequest("bad_release", "%v", err)
	}
	if kr == nil {
		return r, statement, "", nil
	}
	if r, key, err = verify.OpenEnvelope(env, kr, now); err != nil {
		p := problem.New(http.StatusUnprocessableEntity, "unverified", "the release does not verify with this control plane's --trust keyring: "+err.Error())
		var ve *verify.Error
		if errors.As(err, &ve) {
			p.Code = ve.Code
		}
		return nil, nil, "", p
	}
	return r, statement, key, nil
}

// releaseView is how a release is shown.
type releaseView struct {
	ReleaseID   string          `json:"release_id"`
	Channel     string          `json:"channel"`
	Sequence    uint64          `json:"sequence"`
	Digest      string          `json:"digest"` // sha256 of the envelope: the ETag of /latest
	VerifiedBy  string          `json:"verified_by,omitempty"`
	PublishedAt time.Time       `json:"published_at"`
	Release     json.RawMessage `json:"release"`
	Envelope    json.RawMessage `json:"envelope,omitempty"`
}

func viewRelease(r store.Release) releaseView {
	return releaseView{
		ReleaseID: r.ReleaseID, Channel: r.Channel, Sequence: r.Sequence, Digest: r.Digest,
		VerifiedBy: r.VerifiedBy, PublishedAt: r.PublishedAt, Release: r.Statement,
	}
}

func (s *Server) postRelease(w http.ResponseWriter, r *http.Request) error {
	mt, err := mediaType(r)
	if err != nil {
		return err
	}
	if mt != typeJSON && mt != envelopeType {
		return unsupported(mt, typeJSON, envelopeType)
	}
	ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
	defer cancel()
	env, release, err := s.body(w, r, verify.MaxEnvelopeBytes)
	if err != nil {
		return err
	}
	defer release()
	rel, statement, key, err := openEnvelope(env, s.o.Keyring, s.o.Now())
	if err != nil {
		return err
	}
	sum := sha256.Sum256(env)
	rec := store.Release{
		ReleaseID: rel.ReleaseID, Channel: rel.Channel, Sequence: rel.Sequence,
		Digest: "sha256:" + hex.EncodeToString(sum[:]), Envelope: env, Statement: statement, VerifiedBy: key,
	}
	created, err := s.o.Store.PutRelease(ctx, rec)
	if err != nil {
		return err
	}
	status := http.StatusOK
	if created {
		status = http.StatusCreated
		s.m.releases.Inc()
		s.news.publish()
		s.o.Logger.Info("release published", "release_id", rel.ReleaseID, "channel", rel.Channel, "sequence", rel.Sequence, "verified_by", key)
	}
	out := struct {
		ReleaseID string `json:"release_id"`
		Channel   string `json:"channel"`
		Sequence  uint64 `json:"sequence"`
		Created   bool   `json:"created"`
		Verified  bool   `json:"verified"`
		Note      string `json:"note,omitempty"`
	}{rel.ReleaseID, rel.Channel, rel.Sequence, created, key != "", ""}
	if key == "" {
		out.Note = "not verified here: this control plane has no --trust keyring. Nodes verify before they activate."
	}
	w.Header().Set("Location", "/v1/releases/"+rel.ReleaseID)
	return writeJSON(w, status, out)
}

func (s *Server) getRelease(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
	defer cancel()
	rel, err := s.o.Store.GetRelease(ctx, r.PathValue("id"))
	if err != nil {
		return err
	}
	v := viewRelease(rel)
	v.Envelope = rel.Envelope
	return writeJSON(w, http.StatusOK, v)
}

func (s *Server) listReleases(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "channel", "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := limitOf(q, 100)
	if err != nil {
		return err
	}
	var before int64
	if v := q["cursor"]; v != "" {
		if before, err = strconv.ParseInt(v, 36, 64); err != nil || before < 1 {
			return badRequest("bad_cursor", "the cursor is not one that this API gave out: use next_cursor of the page before, or none")
		}
	}
	ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
	defer cancel()
	page, next, err := s.o.Store.ListReleases(ctx, q["channel"], before, limit)
	if err != nil {
		return err
	}
	out := struct {
		Releases   []releaseView `json:"releases"`
		NextCursor string        `json:"next_cursor,omitempty"`
	}{Releases: make([]releaseView, 0, len(page))}
	for _, rel := range page {
		out.Releases = append(out.Releases, viewRelease(rel))
	}
	if next > 0 {
		out.NextCursor = strconv.FormatInt(next, 36)
	}
	return writeJSON(w, http.StatusOK, out)
}

// latestRelease answers a node's poll with the envelope as it was published.
// With ?wait= it answers when there is something other than what the caller
// has (If-None-Match), or when the time is over: 304, or 404 while the channel
// is empty.
func (s *Server) latestRelease(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "channel", "node_id", "wait")
	if err != nil {
		return err
	}
	channel := q["channel"]
	if channel == "" {
		channel = defaultChannel
	}
	var wait time.Duration
	if v := q["wait"]; v != "" {
		if wait, err = time.ParseDuration(v); err != nil || wait < 0 {
			return badRequest("bad_wait", "wait is %q, want a duration, as in 60s", v)
		}
		wait = min(wait, maxWait)
	}
	s.notePoll(r.Context(), q["node_id"], channel)
	have := r.Header.Get("If-None-Match")
	var timeout <-chan time.Time
	for {
		changed := s.news.next() // before the read: nothing is missed between the two
		rel, err := s.latest(r.Context(), channel)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		if err == nil && !matches(have, rel.Digest) {
			h := w.Header()
			h.Set("ETag", `"`+rel.Digest+`"`)
			h.Set("Cache-Control", "no-cache")
			h.Set("Content-Type", envelopeType)
			_, _ = w.Write(rel.Envelope) // the peer went away: nobody is left to tell
			return nil
		}
		if timeout == nil && wait > 0 {
			if s.waiters.Add(1) > int64(s.o.MaxWaiters) {
				s.waiters.Add(-1)
				p := problem.New(http.StatusTooManyRequests, "too_many_waiters", "all places for long polls are taken: poll without wait")
				p.RetryAfter = 5 * time.Second
				return p
			}
			defer s.waiters.Add(-1)
			timer := time.NewTimer(wait)
			defer timer.Stop()
			timeout = timer.C
			if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(wait + handleTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
				return err
			}
		}
		over := timeout == nil
		if !over {
			select {
			case <-changed:
			case <-timeout:
				over = true
			case <-s.drain:
				over = true
			case <-r.Context().Done():
				return r.Context().Err()
			}
		}
		if !over {
			continue
		}
		if err != nil {
			return problem.New(http.StatusNotFound, "no_release", "channel "+strconv.Quote(channel)+" has no release yet: publish one with autonomy release publish")
		}
		w.Header().Set("ETag", `"`+rel.Digest+`"`)
		w.Header().Set("Cache-Control", "no-cache")
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
}

func (s *Server) latest(ctx context.Context, channel string) (store.Release, error) {
	ctx, cancel := context.WithTimeout(ctx, handleTimeout)
	defer cancel()
	return s.o.Store.LatestRelease(ctx, channel)
}

// notePoll tells the fleet that a node is there. A store that cannot take it
// does not fail the poll.
func (s *Server) notePoll(ctx context.Context, node, channel string) {
	if node == "" || !s.touched.due(node, channel, s.o.Now()) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := s.o.Store.Touch(ctx, node, channel); err != nil && ctx.Err() == nil {
		s.o.Logger.Warn("a node's poll was not noted", "node_id", node, "error", err)
	}
}

// matches reports whether an If-None-Match header names the digest.
func matches(header, digest string) bool {
	for tag := range strings.SplitSeq(header, ",") {
		tag = strings.TrimPrefix(strings.TrimSpace(tag), "W/")
		if tag == "*" || tag == `"`+digest+`"` {
			return true
		}
	}
	return false
}
