// Package release brings releases to a node: it polls the control plane,
// fetches what a release names, has package verify judge the bytes, activates
// the policy, records each step in the log and reports it.
//
//	poll → fetch → verify (four steps) → activate → report
//
// Trust comes from the keyring alone: the control plane, the registry and the
// relay only carry bytes. Activation depends on local state and verified bytes
// (INV-06): once fetched, a release activates with the network gone.
//
// On disk, DIR/active.json says which release is active and the highest
// sequence ever activated per channel; DIR/staged.json is the same for a
// release whose policy slot is being written. The slot's own meta names its
// release, so that after a crash between the two the file that matches the slot
// wins. DIR/refused.json remembers releases that failed, by the digest of their
// envelope, so that they are not tried in a loop.
package release

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/verify"
)

// Record is what a node keeps of an activated release.
type Record struct {
	Schema          string            `json:"schema"` // autonomy.node.release/v0
	ReleaseID       string            `json:"release_id"`
	Channel         string            `json:"channel"`
	Sequence        uint64            `json:"sequence"`
	Fingerprint     string            `json:"fingerprint"`
	Image           string            `json:"image"`
	Agent           string            `json:"agent"`         // name in the lock
	PolicyDigest    string            `json:"policy_digest"` // of the bundle file
	EnvelopeDigest  string            `json:"envelope_digest"`
	ActivatedAt     time.Time         `json:"activated_at"`
	ExpiresAt       time.Time         `json:"expires_at"`
	HighestSequence map[string]uint64 `json:"highest_sequence"` // by channel
	Evidence        verify.Evidence   `json:"evidence"`
}

const recordSchema = "autonomy.node.release/v0"

// Fetcher brings the bytes of a release.
type Fetcher interface {
	// Fetch returns what r names, each part checked against its digest. An
	// error that wraps verify's *Error condemns the release; any other is a
	// fault of the way, and the release is tried again.
	Fetch(ctx context.Context, envelope []byte, r *verify.Release) (verify.Material, error)
}

// Options configure a Poller. All fields are required but Now.
type Options struct {
	CP       *Client
	Fetch    Fetcher
	Keyring  *verify.Keyring
	Artifact verify.ArtifactVerifier
	Slots    *prepared.Slots
	Dir      string
	NodeID   string
	Channel  string
	Interval time.Duration
	Runtime  string // version of this node
	Logger   *slog.Logger
	// Admit judges a compiled policy before it is staged or comes into force. An
	// error that wraps prepared.ErrBudget, or a context's, is a fault of the
	// moment; any other refuses the release. nil: any policy will do.
	Admit func(ctx context.Context, p *prepared.Program) error
	// Shadow is how long a policy is evaluated beside the one in force before it
	// takes its place. 0: it takes it at once.
	Shadow time.Duration
	// Note records a lifecycle event.
	Note func(eventType string, body any)
	Now  func() time.Time
}

// State is the release part of GET /v1/status.
type State struct {
	Channel   string           `json:"channel"`
	Active    *Record          `json:"active,omitempty"`
	LastPoll  time.Time        `json:"last_poll,omitzero"`
	LastError string           `json:"last_error,omitempty"`
	Refused   []Refusal        `json:"refused,omitempty"`
	Last      *verify.Evidence `json:"last_verification,omitempty"`
	// Stale: the active release has expired. It keeps running.
	Stale bool `json:"stale,omitempty"`
}

// Refusal is a release that failed for good.
type Refusal struct {
	EnvelopeDigest string    `json:"envelope_digest"`
	ReleaseID      string    `json:"release_id,omitempty"`
	Sequence       uint64    `json:"sequence,omitempty"`
	Step           string    `json:"step,omitempty"`
	Code           string    `json:"code"`
	Detail         string    `json:"detail"`
	At             time.Time `json:"at"`
}

// maxRefusals bounds refused.json: the oldest are forgotten.
const maxRefusals = 64

// Poller keeps a node at the release that its channel names.
type Poller struct {
	o Options

	mu      sync.Mutex
	active  *Record // of the policy in force; nil: that belongs to no release
	last    *Record // of the release activated last, whatever is in force
	highest map[string]uint64
	refused []Refusal
	state   State
	etag    string
	shadow  *staged // waits in shadow; nil: none. Of Poll only
}

// staged is a verified release whose policy is in shadow.
type staged struct {
	digest  string // of the envelope
	ev      *verify.Evidence
	rel     *verify.Release
	lock    []byte
	bundle  *prepared.Bundle
	program *prepared.Program
	until   time.Time
}

// New reads the state from disk. A damaged file is an error: the highest
// sequence is what keeps an old release from coming back.
func New(o Options) (*Poller, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	p := &Poller{o: o, highest: map[string]uint64{}}
	if err := vfs.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("release state: %w", err)
	}
	active, err := readJSON[Record](p.path("active.json"))
	if err != nil {
		return nil, err
	}
	staged, err := readJSON[Record](p.path("staged.json"))
	if err != nil {
		return nil, err
	}
	current := o.Slots.Current()
	if staged != nil {
		if current != nil && current.Meta.ReleaseID == staged.ReleaseID && current.Meta.Digest == staged.PolicyDigest {
			if err := os.Rename(p.path("staged.json"), p.path("active.json")); err != nil {
				return nil, fmt.Errorf("release state: finish the activation of %s: %w", staged.ReleaseID, err)
			}
			active = staged
		} else if err := os.Remove(p.path("staged.json")); err != nil {
			return nil, fmt.Errorf("release state: %w", err)
		}
		if err := vfs.SyncDir(o.Dir); err != nil {
			return nil, fmt.Errorf("release state: %w", err)
		}
	}
	p.last = active
	if active != nil {
		p.highest = active.HighestSequence
		if p.highest == nil {
			p.highest = map[string]uint64{}
		}
		if current != nil && current.Meta.ReleaseID == active.ReleaseID {
			p.active = active
		}
	}
	if current != nil && current.Meta.Source == prepared.SourceRelease {
		p.highest[o.Channel] = max(p.highest[o.Channel], current.Meta.Sequence)
	}
	refused, err := readJSON[[]Refusal](p.path("refused.json"))
	if err != nil {
		return nil, err
	}
	if refused != nil {
		p.refused = *refused
	}
	return p, nil
}

func (p *Poller) path(name string) string { return filepath.Join(p.o.Dir, name) }

// maxStateFile bounds a state file, in bytes.
const maxStateFile = 1 << 20

func readJSON[T any](path string) (*T, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("release state: %w", err)
	}
	defer f.Close()
	var v T
	if err := strictjson.Read(f, maxStateFile, &v); err != nil {
		return nil, fmt.Errorf("release state %s is damaged: %w. Restore it from a backup; removing it lets a release that was rolled back be activated again", path, err)
	}
	return &v, nil
}

func writeJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("release state: %w", err)
	}
	return vfs.WriteFile(path, append(data, '\n'), 0o600)
}

// Active is the release in force, nil when the policy in force belongs to none.
func (p *Poller) Active() *Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.active
}

// State returns a copy for GET /v1/status.
func (p *Poller) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.state
	s.Channel, s.Active, s.Refused = p.o.Channel, p.active, append([]Refusal(nil), p.refused...)
	s.Stale = p.active != nil && !p.o.Now().Before(p.active.ExpiresAt)
	return s
}

// Run polls until ctx ends.
func (p *Poller) Run(ctx context.Context) {
	for {
		err := p.Poll(ctx)
		if ctx.Err() != nil {
			return
		}
		p.mu.Lock()
		was := p.state.LastError
		p.state.LastPoll, p.state.LastError = p.o.Now().UTC(), ""
		if err != nil {
			p.state.LastError = err.Error()
		}
		p.mu.Unlock()
		if err != nil && err.Error() != was {
			p.o.Logger.Warn("release poll failed: will retry", "err", err)
		}
		wait := p.o.Interval
		if p.shadow != nil {
			wait = max(min(wait, p.shadow.until.Sub(p.o.Now())), minWait)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// minWait keeps a poller that waits for the end of a shadow from spinning when
// the activation fails.
const minWait = 100 * time.Millisecond

// Poll ends a shadow that is due, asks once, and activates what is new and holds,
// or puts it in shadow. Its error is a fault of the way; a release that was
// refused is none.
func (p *Poller) Poll(ctx context.Context) error {
	if p.shadow != nil && !p.o.Now().Before(p.shadow.until) {
		if err := p.promote(ctx); err != nil {
			return err
		}
	}
	env, etag, err := p.o.CP.Latest(ctx, p.o.Channel, p.o.NodeID, p.etag)
	if err != nil {
		return err
	}
	if env == nil { // nothing new
		return nil
	}
	if err := p.consider(ctx, env); err != nil {
		return err
	}
	p.etag = etag
	return nil
}

func (p *Poller) consider(ctx context.Context, env []byte) error {
	sum := sha256.Sum256(env)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	for _, r := range p.refused {
		if r.EnvelopeDigest == digest {
			return nil
		}
	}
	rel, _, err := verify.OpenEnvelope(env, p.o.Keyring, time.Time{})
	if err == nil && p.active != nil && p.active.ReleaseID == rel.ReleaseID && p.active.Sequence == rel.Sequence {
		return nil
	}
	if p.shadow != nil && p.shadow.digest == digest {
		return nil
	}
	highest := p.highest[p.o.Channel]
	if p.last != nil && p.last.EnvelopeDigest == digest && p.o.Slots.Status().Serving != prepared.ServingActive {
		// The slot of the release that was activated last is damaged: the very
		// same release mends it, and is no way back to an older one.
		highest = p.last.Sequence - 1
	}
	material := verify.Material{Envelope: env}
	if err == nil {
		p.o.Note(event.ReleaseFound, event.LifecycleBody{ReleaseID: rel.ReleaseID, Channel: rel.Channel, Sequence: rel.Sequence, Result: "found"})
		if rel.Channel == p.o.Channel && rel.Sequence > highest { // otherwise verify refuses it: fetch nothing
			material, err = p.o.Fetch.Fetch(ctx, env, rel)
			var fault *verify.Error
			switch {
			case errors.As(err, &fault):
				// What was fetched is not what was named: let the gate say at which step.
				material.Envelope = env
			case err != nil:
				return fmt.Errorf("fetch release %s: %w", rel.ReleaseID, err)
			}
		}
	}
	ev, rel, err := verify.Verify(ctx, material, verify.Params{
		Keyring: p.o.Keyring, Channel: p.o.Channel, HighestSequence: highest, Now: p.o.Now(),
		RuntimeVersion: p.o.Runtime, Artifacts: p.o.Artifact, ReadPolicy: readPolicy,
	})
	p.mu.Lock()
	p.state.Last = &ev
	p.mu.Unlock()
	var refusal *verify.Error
	if err != nil && !errors.As(err, &refusal) {
		return err
	}
	p.report(ctx, &ev)
	if refusal != nil {
		return p.refuse(ctx, digest, &ev, refusal)
	}
	return p.activate(ctx, digest, &ev, rel, &material)
}

func readPolicy(raw []byte) (verify.PolicyMeta, error) {
	b, err := prepared.ReadBundle(raw, prepared.Limits{})
	if err != nil {
		return verify.PolicyMeta{}, err
	}
	return verify.PolicyMeta{Name: b.Name, Version: b.Version, RequiresRuntime: b.RequiresRuntime}, nil
}

var stepEvents = map[string]string{
	verify.Steps[0]: event.ReleaseSignature,
	verify.Steps[1]: event.ReleaseDigest,
	verify.Steps[2]: event.ReleaseFingerprint,
	verify.Steps[3]: event.ReleaseCompatibility,
}

// report records each step and tells the control plane.
func (p *Poller) report(ctx context.Context, ev *verify.Evidence) {
	for _, s := range ev.Steps {
		p.o.Note(stepEvents[s.Name], event.LifecycleBody{ReleaseID: ev.ReleaseID, Channel: ev.Channel, Sequence: ev.Sequence,
			Result: s.Result, Code: s.Code, Detail: s.Detail, Checked: s.Checked, NotChecked: s.NotChecked})
		if ev.ReleaseID != "" {
			p.ack(ctx, Ack{ReleaseID: ev.ReleaseID, Step: s.Name, Result: s.Result, Code: s.Code, Detail: s.Detail})
		}
	}
}

// ack is best effort: the records say the same, and arrive in any case.
func (p *Poller) ack(ctx context.Context, a Ack) {
	if err := p.o.CP.Ack(ctx, p.o.NodeID, a); err != nil && ctx.Err() == nil {
		p.o.Logger.Warn("report to the control plane failed", "step", a.Step, "err", err)
	}
}

func (p *Poller) refuse(ctx context.Context, digest string, ev *verify.Evidence, why *verify.Error) error {
	step := ""
	if why.Step >= 1 && why.Step <= len(verify.Steps) {
		step = verify.Steps[why.Step-1]
	}
	r := Refusal{EnvelopeDigest: digest, ReleaseID: ev.ReleaseID, Sequence: ev.Sequence, Step: step, Code: why.Code, Detail: why.Detail, At: p.o.Now().UTC()}
	p.o.Logger.Error("release refused", "release_id", ev.ReleaseID, "step", step, "code", why.Code, "detail", why.Detail)
	p.o.Note(event.ReleaseRefused, event.LifecycleBody{ReleaseID: ev.ReleaseID, Channel: ev.Channel, Sequence: ev.Sequence, Result: "failed", Code: why.Code, Detail: why.Detail})
	if ev.ReleaseID != "" {
		p.ack(ctx, Ack{ReleaseID: ev.ReleaseID, Step: "activate", Result: "refused", Code: why.Code, Detail: why.Detail})
	}
	p.mu.Lock()
	p.refused = append(p.refused, r)
	if n := len(p.refused) - maxRefusals; n > 0 {
		p.refused = p.refused[n:]
	}
	refused := append([]Refusal(nil), p.refused...)
	p.mu.Unlock()
	return writeJSON(p.path("refused.json"), refused)
}

// codeActivation is the code of a release that verified and could not be put in
// force: its policy does not compile or cannot be probed; codeFailOpen of one
// whose policy allows a denied call when a field is left out.
const (
	codeActivation = "activation_failed"
	codeFailOpen   = "policy_fails_open"
)

func (p *Poller) activate(ctx context.Context, digest string, ev *verify.Evidence, rel *verify.Release, m *verify.Material) error {
	bundle, err := prepared.ReadBundle(m.Policy, prepared.Limits{})
	if err != nil {
		return p.refuse(ctx, digest, ev, &verify.Error{Code: codeActivation, Detail: "read the bundle: " + err.Error()})
	}
	program, err := p.o.Slots.Compile(ctx, bundle)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return p.refuse(ctx, digest, ev, &verify.Error{Code: codeActivation, Detail: "compile the policy: " + err.Error()})
	}
	if p.o.Admit != nil {
		err := p.o.Admit(ctx, program)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, prepared.ErrBudget):
			return fmt.Errorf("admit the policy of release %s: %w", rel.ReleaseID, err)
		case errors.Is(err, prepared.ErrFailOpen):
			return p.refuse(ctx, digest, ev, &verify.Error{Code: codeFailOpen, Detail: err.Error()})
		case err != nil:
			return p.refuse(ctx, digest, ev, &verify.Error{Code: codeActivation, Detail: err.Error()})
		}
	}
	s := &staged{digest: digest, ev: ev, rel: rel, lock: m.Lock, bundle: bundle, program: program, until: p.o.Now().Add(p.o.Shadow)}
	// Without a policy in force there is nothing to compare with, and waiting
	// would only deny; a policy that is or was in force needs no comparison.
	current := p.o.Slots.Current()
	mends := p.last != nil && p.last.EnvelopeDigest == digest
	if p.o.Shadow > 0 && current != nil && current.Meta.Digest != bundle.Digest && !mends {
		return p.stage(s)
	}
	return p.put(ctx, s)
}

// stage puts a release's policy in shadow, in place of one that was there. It is
// in memory only: after a start the release is fetched and staged again.
func (p *Poller) stage(s *staged) error {
	meta := prepared.Meta{Source: prepared.SourceRelease, ReleaseID: s.rel.ReleaseID, Sequence: s.rel.Sequence}
	if err := p.o.Slots.Stage(s.bundle, s.program, meta); err != nil {
		return fmt.Errorf("stage release %s: %w", s.rel.ReleaseID, err)
	}
	p.shadow = s
	p.o.Logger.Info("release in shadow", "release_id", s.rel.ReleaseID, "policy", s.bundle.Ref(), "until", s.until)
	p.o.Note(event.ReleaseShadow, s.lifecycle("passed", "", fmt.Sprintf("evaluated beside the policy in force until %s", s.until.UTC().Format(time.RFC3339))))
	return nil
}

// promote ends a shadow: its release comes into force, unless it has expired
// meanwhile or its candidate was taken away.
func (p *Poller) promote(ctx context.Context) error {
	s := p.shadow
	status := p.o.Slots.Status().Candidate
	if status == nil || status.Digest != s.bundle.Digest {
		p.shadow = nil
		p.o.Logger.Warn("release left the shadow without coming into force: its policy is no candidate any more", "release_id", s.rel.ReleaseID)
		return nil
	}
	p.o.Logger.Info("release leaves the shadow", "release_id", s.rel.ReleaseID, "sampled", status.Shadow.Sampled, "same", status.Shadow.Same,
		"stricter", status.Shadow.Stricter, "looser", status.Shadow.Looser, "other", status.Shadow.Other, "failed", status.Shadow.Failed)
	if !p.o.Now().Before(s.rel.ExpiresAt) {
		p.shadow = nil
		p.o.Slots.Discard()
		return p.refuse(ctx, s.digest, s.ev, &verify.Error{Code: verify.CodeExpired, Detail: "the release expired while its policy was in shadow"})
	}
	return p.put(ctx, s)
}

func (s *staged) lifecycle(result, code, detail string) event.LifecycleBody {
	return event.LifecycleBody{ReleaseID: s.rel.ReleaseID, Channel: s.rel.Channel, Sequence: s.rel.Sequence, Result: result, Code: code, Detail: detail}
}

// put brings a release into force.
func (p *Poller) put(ctx context.Context, s *staged) error {
	rel, bundle := s.rel, s.bundle
	highest := map[string]uint64{}
	for k, v := range p.highest {
		highest[k] = v
	}
	highest[rel.Channel] = rel.Sequence
	rec := Record{
		Schema: recordSchema, ReleaseID: rel.ReleaseID, Channel: rel.Channel, Sequence: rel.Sequence, Fingerprint: rel.Fingerprint,
		Image: rel.Agent.Image, Agent: agentName(s.lock), PolicyDigest: bundle.Digest, EnvelopeDigest: s.digest, ActivatedAt: p.o.Now().UTC(), ExpiresAt: rel.ExpiresAt,
		HighestSequence: highest, Evidence: *s.ev,
	}
	if err := writeJSON(p.path("staged.json"), rec); err != nil {
		return err
	}
	meta := prepared.Meta{Version: bundle.Version, Source: prepared.SourceRelease, ReleaseID: rel.ReleaseID, Sequence: rel.Sequence, ActivatedAt: rec.ActivatedAt}
	enforce := func() error { return p.o.Slots.Activate(ctx, bundle, s.program, meta) }
	if p.shadow == s {
		enforce = func() error { return p.o.Slots.Promote(ctx) }
	}
	if err := enforce(); err != nil {
		return fmt.Errorf("activate release %s: %w", rel.ReleaseID, err)
	}
	p.shadow = nil
	p.mu.Lock()
	p.active, p.last, p.highest = &rec, &rec, highest
	p.mu.Unlock()
	if err := os.Rename(p.path("staged.json"), p.path("active.json")); err != nil {
		return fmt.Errorf("release state: %w", err) // New finishes it
	}
	if err := vfs.SyncDir(p.o.Dir); err != nil {
		return fmt.Errorf("release state: %w", err)
	}
	// Compiling leaves several times as much garbage as the program is large, and
	// an activation is rare: give it back at once.
	debug.FreeOSMemory()
	p.o.Logger.Info("release activated", "release_id", rel.ReleaseID, "sequence", rel.Sequence, "policy", bundle.Ref())
	p.o.Note(event.ReleaseActivated, s.lifecycle("passed", "", ""))
	p.ack(ctx, Ack{ReleaseID: rel.ReleaseID, Step: "activate", Result: "passed", PolicyRef: bundle.Ref(), Fingerprint: rel.Fingerprint})
	return nil
}

// agentName is the agent's name in a lock that verify has read.
func agentName(lock []byte) string {
	var l struct {
		Agent struct {
			Name string `json:"name"`
		} `json:"agent"`
	}
	if json.Unmarshal(lock, &l) != nil {
		return ""
	}
	return l.Agent.Name
}
