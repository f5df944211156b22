// Package prestage decides what a relay holds: it takes signed lists of
// digests, pulls the closure of each item, and publishes a closure when all of
// it is there.
//
// # Life of an item
//
// A list arrives (Submit), its signature, sequence and form are checked, it is
// written to disk, and its items are pending. One worker (Run) takes pending
// items in the order priority, digest, repository: it counts the attempt on
// disk, resolves the closure (index → manifests → config and layers, and the
// referrers of every manifest: signatures, locks), asks for room for all that
// is missing, pulls it blob by blob, writes the closure down, and publishes it
// in one step. Before that step no part of the closure is served; after it, all.
//
//	pending → staging → staged
//	   ↑         │ error, attempts left: the next pass, after a pause
//	   └─────────┤
//	             └ error, attempts used up: failed, until a list with a higher
//	               sequence names the item again
//
// A pass ends early when the upstream cannot be reached, so that a dead link
// costs one item an attempt and not all of them. The pause doubles with the
// attempts, up to Config.MaxPause. It decides when a pass starts, never what is
// in it or in which order (INV-11). Attempts survive a restart (INV-12).
//
// A list with a higher sequence has its items staged anew: content that is held
// is not pulled again, but new signatures may hang on it. What was published
// stays published until the new closure is complete.
//
// # On disk, under the state directory
//
//	prestage/<id>.json   the list in force, and who signed it
//	items/<hex>.json     per item, hex = SHA-256 of "repository@digest": attempts,
//	                     state, the closure as resolved and as published
//
// Both are replaced whole and durably. Sizes are bytes. A Stager is safe for
// concurrent use. Only the relay imports it.
package prestage

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/relay/cache"
	"github.com/autonomyops/autonomy/relay/oci"
	"github.com/autonomyops/autonomy/relay/upstream"
	"github.com/autonomyops/autonomy/verify"
)

// Dirs are the directories the Stager makes under the state directory.
var Dirs = []string{"prestage", "items"}

// States of an item.
const (
	Pending = "pending" // waits for its turn, or for the next attempt
	Staging = "staging" // the worker is at it
	Staged  = "staged"  // held and served
	Failed  = "failed"  // attempts used up
)

// Config of a Stager.
type Config struct {
	Dir           string // the relay's state directory
	Cache         *cache.Cache
	Upstream      Upstream
	Keyring       string // path, read at every submission so that a revocation holds at once; "": none
	AllowUnsigned bool   // accept lists without a signature when there is no Keyring
	MaxAttempts   int    // per item; default 10
	FirstPause    time.Duration
	MaxPause      time.Duration // pauses between passes run from FirstPause (1 s) to MaxPause (5 min)
	Log           *slog.Logger
}

// Upstream is what the Stager pulls from; *upstream.Client is one. Errors wrap
// that package's sentinels.
type Upstream interface {
	Manifest(ctx context.Context, repo string, d oci.Digest) (data []byte, mediaType string, err error)
	Referrers(ctx context.Context, repo string, d oci.Digest) ([]oci.Descriptor, error)
	Blob(ctx context.Context, repo string, d oci.Digest, sink upstream.Sink) error
}

// Node is one piece of a closure.
type Node struct {
	oci.Descriptor
	Manifest bool       `json:"manifest,omitempty"` // a manifest or an index, not a blob
	Subject  oci.Digest `json:"subject,omitempty"`  // of a referrer: what it refers to
}

// item is one thing to hold, for all lists that name it. All fields but those
// marked are guarded by Stager.mu.
type item struct {
	Item            // Priority is the lowest of all lists
	state    string // one of the states
	attempts int
	err      string // of the last attempt
	resolved []Node // closure of the attempt under way or interrupted, nil before it is known
	public   []Node // closure being served, nil before the first success
	epoch    uint64 // rises when a list asks for the item anew; staging that began before must not end it
	held     map[oci.Digest]bool
}

// Stager holds lists and items. Make one with Open; Run does the work.
type Stager struct {
	cfg  Config
	wake chan struct{}

	submit sync.Mutex // one submission at a time, over its disk writes; held before mu

	mu     sync.RWMutex // guards what follows and the items; held before the cache's lock, never after
	lists  map[string]*accepted
	items  map[key]*item
	served map[string]*repository

	current struct { // the blob under way, for progress
		digest atomic.Value // oci.Digest
		off    atomic.Int64
	}
	stagedBytes, attempts, failures atomic.Uint64
}

// repository is what is served under one name.
type repository struct {
	nodes     map[oci.Digest]*public
	referrers map[oci.Digest]map[oci.Digest]oci.Descriptor // subject -> referrer
	declared  int                                          // items that name the repository
}

type public struct {
	node Node
	refs int // items whose closure holds it
}

// accepted is a list in force, as it is on disk.
type accepted struct {
	Schema   string     `json:"schema"`
	SignedBy string     `json:"signed_by"` // key id, "" if unsigned lists were allowed
	Payload  oci.Digest `json:"payload"`   // digest of the list as submitted
	List     *List      `json:"list"`
}

// record is an item as it is on disk.
type record struct {
	Schema     string     `json:"schema"`
	Repository string     `json:"repository"`
	Digest     oci.Digest `json:"digest"`
	State      string     `json:"state"`
	Attempts   int        `json:"attempts"`
	Error      string     `json:"error,omitempty"`
	Resolved   []Node     `json:"resolved,omitempty"`
	Public     []Node     `json:"public,omitempty"`
}

const (
	acceptedSchema = "autonomy.relay.list/v0"
	recordSchema   = "autonomy.relay.item/v0"
	maxStateBytes  = 64 << 20
	maxErrorBytes  = 1024
)

// ErrDamaged: a state file is not what this program wrote.
var ErrDamaged = errors.New("relay state is damaged")

// Open reads the state directory: what was served before is served again at
// once, whether or not the upstream is there.
func Open(cfg Config) (*Stager, error) {
	if cfg.MaxAttempts <= 0 {
		cfg.MaxAttempts = 10
	}
	if cfg.FirstPause <= 0 {
		cfg.FirstPause = time.Second
	}
	if cfg.MaxPause <= 0 {
		cfg.MaxPause = 5 * time.Minute
	}
	s := &Stager{cfg: cfg, wake: make(chan struct{}, 1), lists: map[string]*accepted{}, items: map[key]*item{}, served: map[string]*repository{}}
	for _, d := range Dirs {
		if err := vfs.MkdirAll(filepath.Join(cfg.Dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("prestage: %w", err)
		}
	}
	err := s.each("prestage", func(name string, data []byte) error {
		var a accepted
		if err := strictjson.Unmarshal(data, &a); err != nil {
			return err
		}
		if a.Schema != acceptedSchema || a.List == nil || a.List.ID+".json" != name {
			return fmt.Errorf("schema %.80q: not a list of that name", a.Schema)
		}
		if err := a.List.check(); err != nil {
			return err
		}
		s.lists[a.List.ID] = &a
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.rebuild()
	s.mu.Unlock()
	err = s.each("items", func(name string, data []byte) error {
		var r record
		if err := strictjson.Unmarshal(data, &r); err != nil {
			return err
		}
		k := key{r.Repository, r.Digest}
		if r.Schema != recordSchema || s.itemName(k) != name || !slices.Contains([]string{Pending, Staged, Failed}, r.State) || r.Attempts < 0 {
			return fmt.Errorf("schema %.80q, state %.80q: not an item of that name", r.Schema, r.State)
		}
		it, ok := s.items[k]
		if !ok { // its list went, and the crash came before this file did
			return s.cfg.Cache.RemoveFile(filepath.Join(cfg.Dir, "items", name))
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		it.state, it.attempts, it.err, it.resolved = r.State, r.Attempts, r.Error, r.Resolved
		if missing := s.missing(r.Public); r.Public != nil && missing == 0 {
			s.publish(it, r.Public)
		} else if it.state == Staged {
			// The store lost part of it. It is declared, so it is fetched again.
			it.state, it.attempts, it.err = Pending, 0, "content was missing from the store at start"
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, it := range s.items {
		s.declare(it)
	}
	return s, nil
}

// each reads the state files of a directory in name order. What a crash left of
// an unfinished write is removed.
func (s *Stager) each(dir string, f func(name string, data []byte) error) error {
	entries, err := os.ReadDir(filepath.Join(s.cfg.Dir, dir))
	if err != nil {
		return fmt.Errorf("prestage: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(s.cfg.Dir, dir, e.Name())
		if strings.HasPrefix(e.Name(), ".") && strings.Contains(e.Name(), ".tmp-") {
			if err := s.cfg.Cache.RemoveFile(path); err != nil {
				return fmt.Errorf("prestage: %w", err)
			}
			continue
		}
		data, err := readFile(path, maxStateBytes)
		if err != nil {
			return fmt.Errorf("prestage: %w", err)
		}
		if err := f(e.Name(), data); err != nil {
			return fmt.Errorf("%w: %s: %w; move the file away and submit its list again", ErrDamaged, path, err)
		}
	}
	return nil
}

func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s: over %d bytes", path, limit)
	}
	return data, err
}

func (s *Stager) itemName(k key) string {
	sum := sha256.Sum256([]byte(k.repo + "@" + string(k.digest)))
	return hex.EncodeToString(sum[:]) + ".json"
}

// Accepted answers a submission.
type Accepted struct {
	ID       string `json:"id"`
	Sequence uint64 `json:"sequence"`
	Items    int    `json:"items"`
	Repeated bool   `json:"repeated"` // this very list was in force already
}

// Submit takes a list: a DSSE envelope, or the bare list where that is allowed.
// now is compared with the windows of keys. Errors are *Refusal, or about the
// disk (disk.ErrCeilingExceeded). After an error nothing has changed.
func (s *Stager) Submit(body []byte, now time.Time) (*Accepted, error) {
	if len(body) > MaxBodyBytes {
		return nil, refuse(CodeTooLarge, "%d bytes, the limit is %d", len(body), MaxBodyBytes)
	}
	payload, signer := body, ""
	if s.cfg.Keyring != "" {
		data, err := readFile(s.cfg.Keyring, maxKeyringSize)
		if err != nil {
			return nil, &Refusal{Code: CodeKeyring, Detail: "the relay's keyring cannot be read; its log says why", Err: err}
		}
		kr, err := verify.ParseKeyring(data)
		if err != nil {
			return nil, &Refusal{Code: CodeKeyring, Detail: "the relay's keyring is malformed; its log says why", Err: err}
		}
		if payload, signer, err = openEnvelope(body, kr, now); err != nil {
			return nil, err
		}
	} else if !s.cfg.AllowUnsigned {
		return nil, refuse(CodeUnsigned, "this relay has no keyring to check a list against: start it with --trust")
	}
	l, err := ParseList(payload)
	if err != nil {
		return nil, refuse(CodeMalformed, "%w", err)
	}
	return s.accept(&accepted{Schema: acceptedSchema, SignedBy: signer, Payload: oci.DigestOf(payload), List: l})
}

func (s *Stager) accept(a *accepted) (*Accepted, error) {
	s.submit.Lock()
	defer s.submit.Unlock()
	id, out := a.List.ID, &Accepted{ID: a.List.ID, Sequence: a.List.Sequence, Items: len(a.List.Items)}
	s.mu.RLock()
	old := s.lists[id]
	all := len(a.List.Items)
	for other, l := range s.lists {
		if other != id {
			all += len(l.List.Items)
		}
	}
	lists := len(s.lists)
	s.mu.RUnlock()
	switch {
	case old != nil && a.List.Sequence == old.List.Sequence && a.Payload == old.Payload:
		out.Repeated = true
		return out, nil
	case old != nil && a.List.Sequence <= old.List.Sequence:
		return nil, refuse(CodeSequenceRollback, "list %s has sequence %d in force, this one has %d: want a higher one", id, old.List.Sequence, a.List.Sequence)
	case old == nil && lists >= MaxLists:
		return nil, refuse(CodeTooMany, "the relay holds %d lists, which is its limit", lists)
	case all > MaxAllItems:
		return nil, refuse(CodeTooMany, "all lists together would have %d items, the limit is %d", all, MaxAllItems)
	}
	data, err := json.Marshal(a)
	if err != nil {
		return nil, fmt.Errorf("write list: %w", err)
	}
	if err := s.cfg.Cache.WriteFile(filepath.Join(s.cfg.Dir, "prestage", id+".json"), data); err != nil {
		return nil, fmt.Errorf("write list: %w", err)
	}
	s.mu.Lock()
	s.lists[id] = a
	gone := s.rebuild()
	var again []*record
	for _, i := range a.List.Items {
		it := s.items[key{i.Repository, i.Digest}]
		it.state, it.attempts, it.err = Pending, 0, ""
		it.epoch++
		s.declare(it)
		again = append(again, it.record())
	}
	s.mu.Unlock()
	// The list is in force. An item file that cannot be written now is written
	// with the first attempt, before anything is pulled.
	for _, r := range again {
		if err := s.write(r); err != nil {
			s.cfg.Log.Warn("prestage: item state not written", "repository", r.Repository, "digest", r.Digest, "error", err)
			break
		}
	}
	for _, k := range gone {
		if err := s.cfg.Cache.RemoveFile(filepath.Join(s.cfg.Dir, "items", s.itemName(k))); err != nil {
			s.cfg.Log.Warn("prestage: item state not removed; it goes at the next start", "repository", k.repo, "digest", k.digest, "error", err)
		}
	}
	s.cfg.Log.Info("prestage list in force", "id", id, "sequence", a.List.Sequence, "items", len(a.List.Items), "removed", len(gone), "signed_by", a.SignedBy)
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return out, nil
}

// rebuild makes s.items what the lists name, and returns the keys that are not
// named any more, in order. The caller holds mu.
func (s *Stager) rebuild() (gone []key) {
	want := map[key]int{}
	for _, a := range s.lists {
		for _, i := range a.List.Items {
			k := key{i.Repository, i.Digest}
			if p, ok := want[k]; !ok || i.Priority < p {
				want[k] = i.Priority
			}
		}
	}
	for k, it := range s.items {
		if _, ok := want[k]; ok {
			continue
		}
		gone = append(gone, k)
		s.unpublish(it)
		it.resolved, it.state = nil, Failed
		it.epoch++ // the worker may have it in hand
		for d := range it.held {
			s.cfg.Cache.Undeclare(d)
		}
		it.held = nil
		delete(s.items, k)
		if r := s.served[k.repo]; r != nil {
			if r.declared--; r.declared == 0 {
				delete(s.served, k.repo)
			}
		}
	}
	for k, p := range want {
		it := s.items[k]
		if it == nil {
			it = &item{Item: Item{Repository: k.repo, Digest: k.digest}, state: Pending, held: map[oci.Digest]bool{}}
			s.items[k] = it
			r := s.served[k.repo]
			if r == nil {
				r = &repository{nodes: map[oci.Digest]*public{}, referrers: map[oci.Digest]map[oci.Digest]oci.Descriptor{}}
				s.served[k.repo] = r
			}
			r.declared++
		}
		it.Priority = p
	}
	slices.SortFunc(gone, func(a, b key) int { return cmp.Or(cmp.Compare(a.digest, b.digest), cmp.Compare(a.repo, b.repo)) })
	return gone
}

// declare protects the item's content in the store: what is served, and unless
// the item has failed for good, what is on its way. The caller holds mu.
func (s *Stager) declare(it *item) {
	want := map[oci.Digest]bool{}
	for _, n := range it.public {
		want[n.Digest] = true
	}
	if it.state != Failed {
		want[it.Digest] = true
		for _, n := range it.resolved {
			want[n.Digest] = true
		}
	}
	for d := range want {
		if !it.held[d] {
			s.cfg.Cache.Declare(d)
		}
	}
	for d := range it.held {
		if !want[d] {
			s.cfg.Cache.Undeclare(d)
		}
	}
	it.held = want
}

// publish replaces what the item serves. The caller holds mu, so a reader sees
// the closure before or the closure after.
func (s *Stager) publish(it *item, closure []Node) {
	r := s.served[it.Repository]
	for _, n := range closure {
		p := r.nodes[n.Digest]
		if p == nil {
			p = &public{node: n}
			r.nodes[n.Digest] = p
		}
		p.refs++
		if n.Subject != "" {
			if r.referrers[n.Subject] == nil {
				r.referrers[n.Subject] = map[oci.Digest]oci.Descriptor{}
			}
			r.referrers[n.Subject][n.Digest] = n.Descriptor
		}
	}
	s.unpublish(it)
	it.public = closure
}

func (s *Stager) unpublish(it *item) {
	r := s.served[it.Repository]
	for _, n := range it.public {
		p := r.nodes[n.Digest]
		if p.refs--; p.refs > 0 {
			continue
		}
		delete(r.nodes, n.Digest)
		if n.Subject != "" {
			delete(r.referrers[n.Subject], n.Digest)
			if len(r.referrers[n.Subject]) == 0 {
				delete(r.referrers, n.Subject)
			}
		}
	}
	it.public = nil
}

func (it *item) record() *record {
	state := it.state
	if state == Staging {
		state = Pending // what a restart must make of it
	}
	return &record{Schema: recordSchema, Repository: it.Repository, Digest: it.Digest, State: state,
		Attempts: it.attempts, Error: it.err, Resolved: it.resolved, Public: it.public}
}

func (s *Stager) write(r *record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write item: %w", err)
	}
	if err := s.cfg.Cache.WriteFile(filepath.Join(s.cfg.Dir, "items", s.itemName(key{r.Repository, r.Digest})), data); err != nil {
		return fmt.Errorf("write item: %w", err)
	}
	return nil
}

// missing is how many bytes of a closure the store lacks; an empty blob that is
// missing counts as one byte.
func (s *Stager) missing(closure []Node) int64 {
	var sum int64
	for _, n := range closure {
		if size, ok := s.cfg.Cache.Size(n.Digest); !ok || size != n.Size {
			sum += max(1, n.Size)
		}
	}
	return sum
}

// Lookup tells what a repository serves under a digest.
func (s *Stager) Lookup(repo string, d oci.Digest) (Node, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := s.served[repo]
	if r == nil {
		return Node{}, false
	}
	p := r.nodes[d]
	if p == nil {
		return Node{}, false
	}
	return p.node, true
}

// Known reports whether any list names the repository.
func (s *Stager) Known(repo string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.served[repo] != nil
}

// Why says for a digest that is not served what stands in the way, for the
// person who reads the 404.
func (s *Stager) Why(repo string, d oci.Digest) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.served[repo] == nil {
		return "no prestage list declares this repository to this relay"
	}
	for k, it := range s.items {
		if k.repo == repo && it.held[d] {
			return "declared, and not staged yet: see its prestage list for progress"
		}
	}
	return "not declared to this relay: it serves only what a prestage list names"
}

// Referrers lists the served referrers of a digest, by digest.
func (s *Stager) Referrers(repo string, subject oci.Digest) []oci.Descriptor {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := s.served[repo]
	if r == nil {
		return nil
	}
	out := slices.Collect(maps.Values(r.referrers[subject]))
	slices.SortFunc(out, func(a, b oci.Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
	return out
}

// Report tells how far a list is.
type Report struct {
	ID           string       `json:"id"`
	Sequence     uint64       `json:"sequence"`
	SignedBy     string       `json:"signed_by"`
	State        string       `json:"state"` // staged: all are; failed: some are, and none is under way; else staging
	Staged       int          `json:"staged"`
	TotalBytes   int64        `json:"total_bytes"`   // of the items whose closure is known
	MissingBytes int64        `json:"missing_bytes"` // likewise
	Items        []ItemReport `json:"items"`         // in staging order
}

// ItemReport is one item of a Report.
type ItemReport struct {
	Repository   string     `json:"repository"`
	Digest       oci.Digest `json:"digest"`
	Priority     int        `json:"priority"`
	State        string     `json:"state"`
	Served       bool       `json:"served"`   // a closure is served, maybe of an earlier sequence
	Resolved     bool       `json:"resolved"` // the closure, and so its size, is known
	Attempts     int        `json:"attempts"`
	TotalBytes   int64      `json:"total_bytes"`
	MissingBytes int64      `json:"missing_bytes"`
	Error        string     `json:"error,omitempty"`
}

// Report of the list with this id; false if there is none.
func (s *Stager) Report(id string) (*Report, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	a := s.lists[id]
	if a == nil {
		return nil, false
	}
	rep := &Report{ID: id, Sequence: a.List.Sequence, SignedBy: a.SignedBy, Items: []ItemReport{}}
	failed, open := 0, 0
	for _, i := range a.List.Items {
		it := s.items[key{i.Repository, i.Digest}]
		r := ItemReport{Repository: i.Repository, Digest: i.Digest, Priority: i.Priority, State: it.state,
			Served: it.public != nil, Attempts: it.attempts, Error: it.err}
		closure := it.resolved
		if it.state == Staged {
			closure = it.public
		}
		r.Resolved = closure != nil
		for _, n := range closure {
			r.TotalBytes += n.Size
		}
		if it.state != Staged {
			r.MissingBytes = s.missing(closure)
			if d, _ := s.current.digest.Load().(oci.Digest); it.state == Staging && d != "" {
				if slices.ContainsFunc(closure, func(n Node) bool { return n.Digest == d }) {
					r.MissingBytes = max(0, r.MissingBytes-s.current.off.Load())
				}
			}
		}
		switch it.state {
		case Staged:
			rep.Staged++
		case Failed:
			failed++
		default:
			open++
		}
		rep.TotalBytes += r.TotalBytes
		rep.MissingBytes += r.MissingBytes
		rep.Items = append(rep.Items, r)
	}
	switch {
	case open > 0:
		rep.State = Staging
	case failed > 0:
		rep.State = Failed
	default:
		rep.State = Staged
	}
	return rep, true
}

// Summary counts what the Stager has.
type Summary struct {
	Lists        []string       `json:"lists"` // ids, sorted
	Items        map[string]int `json:"items"` // by state
	Repositories int            `json:"repositories"`
	StagedBytes  uint64         `json:"staged_bytes"` // pulled since start
	Attempts     uint64         `json:"attempts"`     // since start
	Failures     uint64         `json:"failures"`     // attempts that failed, since start
}

// Summary of all lists.
func (s *Stager) Summary() Summary {
	s.mu.RLock()
	defer s.mu.RUnlock()
	sum := Summary{Lists: slices.Sorted(maps.Keys(s.lists)), Items: map[string]int{Pending: 0, Staging: 0, Staged: 0, Failed: 0},
		Repositories: len(s.served), StagedBytes: s.stagedBytes.Load(), Attempts: s.attempts.Load(), Failures: s.failures.Load()}
	if sum.Lists == nil {
		sum.Lists = []string{}
	}
	for _, it := range s.items {
		sum.Items[it.state]++
	}
	return sum
}
