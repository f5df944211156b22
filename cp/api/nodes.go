package api

import (
	"context"
	"errors"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/problem"
	"github.com/autonomyops/autonomy/internal/strictjson"
)

const maxAckBytes = 32 << 10

// ackBody is what a node reports of one lifecycle step: one of the four steps
// of verification, or activate. The name of the step's event, with "release."
// before it, will do too.
type ackBody struct {
	ReleaseID    string    `json:"release_id"`
	Channel      string    `json:"channel"`
	Sequence     uint64    `json:"sequence"`
	Step         string    `json:"step"`
	Result       string    `json:"result"`
	Code         string    `json:"code"`
	Detail       string    `json:"detail"`
	PolicyRef    string    `json:"policy_ref"`
	PolicyDigest string    `json:"policy_digest"`
	Fingerprint  string    `json:"fingerprint"`
	Checked      []string  `json:"checked"`
	NotChecked   []string  `json:"not_checked"`
	Timestamp    time.Time `json:"timestamp"`
}

var (
	token   = regexp.MustCompile(`^[a-z][a-z0-9_.-]{0,63}$`)
	results = map[string]bool{"passed": true, "failed": true, "skipped": true, "refused": true}
)

func (s *Server) postAck(w http.ResponseWriter, r *http.Request) error {
	mt, err := mediaType(r)
	if err != nil {
		return err
	}
	if mt != typeJSON {
		return unsupported(mt)
	}
	node, err := nodeID(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
	defer cancel()
	data, release, err := s.body(w, r, maxAckBytes)
	if err != nil {
		return err
	}
	defer release()
	var b ackBody
	if err := strictjson.Unmarshal(data, &b); err != nil {
		return badRequest("bad_json", "%v", err)
	}
	b.Step = strings.TrimPrefix(b.Step, "release.")
	switch {
	case b.ReleaseID == "":
		return badRequest("bad_ack", "release_id is missing")
	case !token.MatchString(b.Step):
		return badRequest("bad_ack", "step is %q, want signature, digest, fingerprint, compatibility or activate", clip(b.Step))
	case !results[b.Result]:
		return badRequest("bad_ack", "result is %q, want passed, failed, skipped or refused", clip(b.Result))
	case len(b.Detail) > store.MaxAckDetail:
		return badRequest("bad_ack", "detail has %d bytes, at most %d", len(b.Detail), store.MaxAckDetail)
	}
	for name, v := range map[string]string{"release_id": b.ReleaseID, "code": b.Code, "fingerprint": b.Fingerprint, "policy_digest": b.PolicyDigest, "policy_ref": b.PolicyRef} {
		if err := store.ValidateID(v); err != nil {
			return badRequest("bad_ack", "%s: %v", name, err)
		}
	}
	if b.Timestamp.IsZero() {
		b.Timestamp = s.o.Now()
	} else if b.Timestamp.Year() < 1970 || b.Timestamp.Year() > 2261 {
		return badRequest("bad_ack", "timestamp: want a time between 1970 and 2262")
	}
	changed, err := s.o.Store.PutAck(ctx, store.Ack{
		NodeID: node, ReleaseID: b.ReleaseID, Step: b.Step, Result: b.Result, Code: b.Code, Detail: b.Detail,
		PolicyRef: b.PolicyRef, PolicyDigest: b.PolicyDigest, Fingerprint: b.Fingerprint, At: b.Timestamp.UTC(),
	})
	if err != nil {
		return err
	}
	s.m.acks.Inc()
	return writeJSON(w, http.StatusOK, struct {
		NodeID    string `json:"node_id"`
		ReleaseID string `json:"release_id"`
		Step      string `json:"step"`
		Changed   bool   `json:"changed"`
	}{node, b.ReleaseID, b.Step, changed})
}

func nodeID(r *http.Request) (string, error) {
	id := r.PathValue("id")
	if err := store.ValidateID(id); err != nil {
		return "", badRequest("bad_node_id", "node id: %v", err)
	}
	return id, nil
}

func (s *Server) getWatermark(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "log_id")
	if err != nil {
		return err
	}
	node, err := nodeID(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
	defer cancel()
	m, err := s.o.Store.Watermark(ctx, node, q["log_id"])
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, struct {
		NodeID string `json:"node_id"`
		LogID  string `json:"log_id"`
		Seq    uint64 `json:"seq"`
	}{m.NodeID, m.LogID, m.Seq})
}

// nodeView is a row of the fleet.
type nodeView struct {
	NodeID          string    `json:"node_id"`
	State           string    `json:"state"`
	Channel         string    `json:"channel"`
	DesiredRelease  string    `json:"desired_release"`
	DesiredSequence uint64    `json:"desired_sequence"`
	ObservedRelease string    `json:"observed_release"`
	Fingerprint     string    `json:"fingerprint"`
	PolicyRef       string    `json:"policy_ref"`
	Version         string    `json:"version"`
	Assurance       string    `json:"assurance"`
	LogID           string    `json:"log_id"`
	LastSeq         uint64    `json:"last_seq"`
	Watermark       uint64    `json:"watermark"`
	Gaps            uint64    `json:"gaps"`
	Missing         uint64    `json:"missing"`
	Conflicts       uint64    `json:"conflicts"`
	FirstSeen       time.Time `json:"first_seen,omitzero"`
	LastSeen        time.Time `json:"last_seen,omitzero"`
	LastAck         *ackView  `json:"last_ack,omitempty"`
}

type ackView struct {
	ReleaseID string    `json:"release_id"`
	Step      string    `json:"step"`
	Result    string    `json:"result"`
	Code      string    `json:"code,omitempty"`
	Detail    string    `json:"detail,omitempty"`
	At        time.Time `json:"at"`
}

func (s *Server) getFleet(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := limitOf(q, store.MaxPage)
	if err != nil {
		return err
	}
	if err := store.ValidateID(q["cursor"]); err != nil {
		return badRequest("bad_cursor", "the cursor is not one that this API gave out: use next_cursor of the page before, or none")
	}
	ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
	defer cancel()
	nodes, err := s.o.Store.Nodes(ctx, q["cursor"], limit)
	if err != nil {
		return err
	}
	now := s.o.Now()
	out := struct {
		Nodes      []nodeView `json:"nodes"`
		NextCursor string     `json:"next_cursor,omitempty"`
	}{Nodes: make([]nodeView, 0, len(nodes))}
	for i := range nodes {
		n := &nodes[i]
		v := nodeView{
			NodeID: n.NodeID, State: n.State(now, s.o.StaleAfter), Channel: n.Channel,
			DesiredRelease: n.DesiredRelease, DesiredSequence: n.DesiredSequence, ObservedRelease: n.ObservedRelease,
			Fingerprint: n.Fingerprint, PolicyRef: n.PolicyRef, Version: n.Version, Assurance: n.Assurance,
			LogID: n.LogID, LastSeq: n.LastSeq, Watermark: n.Watermark, Gaps: n.Gaps, Missing: n.Missing, Conflicts: n.Conflicts,
			FirstSeen: n.FirstSeen, LastSeen: n.LastSeen,
		}
		if a := n.LastAck; a != nil {
			v.LastAck = &ackView{a.ReleaseID, a.Step, a.Result, a.Code, a.Detail, a.At}
		}
		out.Nodes = append(out.Nodes, v)
	}
	if len(nodes) == limit {
		out.NextCursor = nodes[limit-1].NodeID
	}
	return writeJSON(w, http.StatusOK, out)
}

func (s *Server) getSummary(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
	defer cancel()
	m, err := s.o.Store.Summary(ctx, s.o.Now(), s.o.StaleAfter)
	if err != nil {
		return err
	}
	st := s.o.Store.Stats()
	return writeJSON(w, http.StatusOK, struct {
		Nodes         int    `json:"nodes"`
		Up            int    `json:"up"`
		Stale         int    `json:"stale"`
		Unknown       int    `json:"unknown"`
		InSync        int    `json:"in_sync"`
		Behind        int    `json:"behind"`
		Gaps          uint64 `json:"gaps"`
		Missing       uint64 `json:"missing"`
		Conflicts     uint64 `json:"conflicts"`
		StoreBytes    int64  `json:"store_bytes"`
		StoreMaxBytes int64  `json:"store_max_bytes"`
	}{m.Nodes, m.Up, m.Stale, m.Unknown, m.InSync, m.Behind, m.Gaps, m.Missing, m.Conflicts, st.Bytes, st.MaxBytes})
}

// asProblem reports whether err is an answer already.
func asProblem(err error) bool {
	var p *problem.Problem
	return errors.As(err, &p)
}
