package prepared

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/internal/vfs"
)

// Slots keeps the policy in force on disk and in memory.
//
//	DIR/active/bundle.tar.gz   the bundle in force, byte for byte as it came
//	DIR/active/meta.json       Meta, with a checksum over itself
//	DIR/lkg/...                the bundle that was in force before: last known good
//	DIR/next/ old/ retired/    an activation under way; gone when it is done
//
// Activation writes next/ in full and durably, reads it back and verifies it,
// and then only renames directories:
//
//	lkg -> old, active -> lkg, next -> active     the last one commits
//
// and removes old/. A crash before the commit is undone at the next start, a
// crash after it is completed; see recover. At no moment does a slot hold a
// bundle that was not verified where it lies.
//
// # Known good
//
// A policy is known good once it has been in force for SlotsOptions.HealthWindow
// and answers: one that was asked and failed to evaluate every time is not. Only
// such a policy displaces an LKG. When it is replaced before, it is dropped and
// the LKG stays what it was; so two bad releases in a row cannot push the last
// good one out. Any policy that served is better than no LKG at all.
//
// # Shadow
//
// A candidate (Stage) is evaluated beside the policy in force on a sample of
// its calls. The answers are compared and counted, and never given to anybody;
// see shadow. Promote puts the candidate in force, Discard drops it, and so does
// every other change of the policy in force, with which it was compared. It lives in
// memory only: after a start it has to be staged again.
//
// # Memory
//
// At most three programs live here: active, LKG, candidate. Readers hold what
// they loaded; a program that was replaced is freed by the garbage collector when
// the last evaluation with it has returned.
type Slots struct {
	dir   string
	opt   SlotsOptions
	state atomic.Pointer[slotSet]

	shadows context.Context // ends the evaluations of candidates
	close   context.CancelFunc
	running sync.WaitGroup // evaluations of candidates

	mu sync.Mutex // serialises all that changes the set
}

// SlotsOptions configure OpenSlots.
type SlotsOptions struct {
	Limits  Limits  // for the bundles read back from disk; zero: DefaultLimits
	Compile Options // for the programs of both slots; see Slots.Compile
	// HealthWindow is how long a policy must have been in force to be known
	// good, by the wall clock. 0: every policy that served is.
	HealthWindow time.Duration
	// ShadowEvery is the sample of calls on which a candidate is evaluated: one
	// in so many. Default DefaultShadowEvery.
	ShadowEvery int
	// Compatible says whether this program can serve a bundle that is found in a
	// slot: a slot may have been written by a newer version of it. nil: any.
	Compatible func(*Bundle) error

	step func(name string) error // tests: called before each step that changes the disk
	now  func() time.Time        // tests
}

// slotSet is immutable; Slots swaps whole ones.
type slotSet struct {
	current   *Active // what Current returns
	active    *Active // what the active slot holds; nil: empty or damaged
	lkg       *Active
	candidate *Active // in shadow of current; nil: none
	faults    []Fallback
}

// Active is a policy in force.
type Active struct {
	Program *Program
	Meta    Meta

	health *health // shared by all Actives of one activation; nil: not kept
	shadow *shadow // beside it; nil: none
}

// Eval is Program.Eval for a call that is enforced: it also notes whether the
// policy answers, and gives a sample of the calls to the candidate.
func (a *Active) Eval(ctx context.Context, input []byte) (Decision, error) {
	var d Decision
	err := a.EvalInto(ctx, &d, input)
	return d, err
}

// EvalInto is to Program.EvalInto what Eval is to Program.Eval.
func (a *Active) EvalInto(ctx context.Context, dst *Decision, input []byte) error {
	err := a.Program.EvalInto(ctx, dst, input)
	a.health.note(err)
	if a.shadow != nil {
		a.shadow.offer(input, dst, err)
	}
	return err
}

// health is what the evaluations say about a policy. Both flags are written
// once: a hot path that only reads them shares their cache line.
type health struct {
	answered, failed atomic.Bool
}

func (h *health) note(err error) {
	if h == nil {
		return
	}
	switch {
	case err == nil:
		if !h.answered.Load() {
			h.answered.Store(true)
		}
	case errors.Is(err, ErrEvaluation), errors.Is(err, ErrResult):
		if !h.failed.Load() {
			h.failed.Store(true)
		}
	}
}

// good: a caller that sends what the policy fails on does not make it bad, as
// long as it answers somebody.
func (h *health) good() bool { return h == nil || h.answered.Load() || !h.failed.Load() }

// Where a bundle came from.
const (
	SourceLocal   = "local"   // a file that the operator gave
	SourceRelease = "release" // a verified release
)

// Meta is what meta.json holds.
type Meta struct {
	Digest      string    `json:"digest"` // of bundle.tar.gz; Slots fills it in
	Ref         string    `json:"ref"`    // name@version; Slots fills it in
	Version     string    `json:"version"`
	Source      string    `json:"source"`               // SourceLocal, SourceRelease
	ReleaseID   string    `json:"release_id,omitempty"` // when Source is SourceRelease
	Sequence    uint64    `json:"sequence,omitempty"`   // of the release in its channel
	ActivatedAt time.Time `json:"activated_at"`         // zero: now
}

// Fallback tells of a slot that could not be used.
type Fallback struct {
	Slot        string `json:"slot"`        // active, lkg
	Why         string `json:"why"`         // what is wrong with it
	Replacement string `json:"replacement"` // what took its place: name@version of the LKG, or "none": deny all
}

// Names within DIR.
const (
	slotActive  = "active"
	slotLKG     = "lkg"
	slotNext    = "next"
	slotOld     = "old"
	slotRetired = "retired"

	bundleFile = "bundle.tar.gz"
	metaFile   = "meta.json"

	trashPrefix  = ".trash-"
	maxMetaBytes = 16 << 10
	none         = "none"
)

// What Rollback and Promote return when there is nothing to put in force.
var (
	ErrNoLKG       = errors.New("no last known good policy")
	ErrNoCandidate = errors.New("no candidate policy")
)

// OpenSlots finishes or undoes an interrupted activation, reads both slots,
// verifies their digests and compiles them. An active slot that is damaged, does
// not compile or is not Compatible is replaced by the LKG in memory, such an LKG
// by nothing: Current is then nil and all calls are denied. The disk is left as found, so that the damage can be looked
// at; the next Activate replaces it. Each Fallback is for an event, a metric
// and a line in status.
//
// The error is for what no bundle can mend: the directory cannot be made, read
// or written.
func OpenSlots(ctx context.Context, dir string, o SlotsOptions) (*Slots, []Fallback, error) {
	if o.step == nil {
		o.step = func(string) error { return nil }
	}
	if o.now == nil {
		o.now = time.Now
	}
	if o.ShadowEvery <= 0 {
		o.ShadowEvery = DefaultShadowEvery
	}
	s := &Slots{dir: dir, opt: o}
	if err := vfs.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("policy slots: %w", err)
	}
	interrupted, err := s.recover()
	if err != nil {
		return nil, nil, fmt.Errorf("policy slots: %w", err)
	}
	s.shadows, s.close = context.WithCancel(context.WithoutCancel(ctx))
	st := &slotSet{}
	lkg, lkgErr := s.load(ctx, slotLKG)
	active, activeErr := s.load(ctx, slotActive)
	if err := ctx.Err(); err != nil {
		return nil, nil, err // a slot that was not read is not damaged
	}
	st.active, st.lkg, st.current = active, lkg, active
	replacement := none
	if lkg != nil {
		replacement = lkg.Meta.Ref
	}
	switch {
	case activeErr == nil && interrupted != "":
		st.faults = append(st.faults, Fallback{Slot: slotActive, Why: interrupted, Replacement: active.Meta.Ref})
	case errors.Is(activeErr, fs.ErrNotExist) && lkg == nil && errors.Is(lkgErr, fs.ErrNotExist):
		// A new node: nothing was ever active.
	case activeErr != nil:
		st.current = lkg
		st.faults = append(st.faults, Fallback{Slot: slotActive, Why: activeErr.Error(), Replacement: replacement})
	}
	if lkgErr != nil && !errors.Is(lkgErr, fs.ErrNotExist) {
		st.faults = append(st.faults, Fallback{Slot: slotLKG, Why: lkgErr.Error(), Replacement: none})
	}
	s.state.Store(st)
	return s, st.faults, nil
}

// Current is the policy in force: one atomic load. nil: there is none, deny.
// The caller keeps what it got for the whole call; a later Activate does not
// change it.
func (s *Slots) Current() *Active { return s.state.Load().current }

// Close ends what evaluates in shadow and waits for it. It is called after the
// last Eval of an Active; the slots can still be read.
func (s *Slots) Close() {
	s.close()
	s.running.Wait()
}

// Activate puts b, compiled as p, in force. It persists first: when it returns
// an error, the policy in force and both slots are as they were. m says where
// the bundle comes from; its Digest, Ref and Version are taken from b. A
// candidate is discarded.
//
// Activating the bundle that is already in force writes its meta anew and keeps
// the LKG.
func (s *Slots) Activate(ctx context.Context, b *Bundle, p *Program, m Meta) error {
	next, err := s.newActive(b, p, m)
	if err != nil {
		return fmt.Errorf("activate policy: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err // from here on it is a matter of milliseconds: not interrupted
	}
	return s.activate(next)
}

// newActive checks that p, b and m belong together.
func (s *Slots) newActive(b *Bundle, p *Program, m Meta) (*Active, error) {
	if b == nil || p == nil || p.bundle.Digest != b.Digest || Digest(b.Raw) != b.Digest {
		return nil, errors.New("the program was not compiled from this bundle")
	}
	if m.Digest != "" && m.Digest != b.Digest {
		return nil, fmt.Errorf("the bundle has digest %s, want %s", b.Digest, m.Digest)
	}
	m.Digest, m.Ref, m.Version = b.Digest, b.Ref(), b.Version
	return &Active{Program: p, Meta: s.stamped(m), health: &health{}}, nil
}

// activate persists and swaps. The caller holds mu.
func (s *Slots) activate(next *Active) error {
	st := s.state.Load()
	keep := s.keep(st, next)
	if err := s.replaceActive(next, keep); err != nil {
		return fmt.Errorf("activate policy %s: %w", next.Meta.Ref, err)
	}
	lkg := st.lkg
	if keep {
		lkg = st.active
	}
	s.state.Store(&slotSet{current: next, active: next, lkg: lkg.alone()})
	return nil
}

// keep reports whether the active slot is worth keeping as LKG: it serves,
// differs from what follows, still lies on the disk as it was written, and is
// known good or better than nothing.
func (s *Slots) keep(st *slotSet, next *Active) bool {
	a := st.active
	if a == nil || st.current != a || a.Meta.Digest == next.Meta.Digest || !s.intact(slotActive, a) {
		return false
	}
	return st.lkg == nil || a.health.good() && s.opt.now().Sub(a.Meta.ActivatedAt) >= s.opt.HealthWindow
}

// Stage puts b, compiled as p, in the shadow of the policy in force. A candidate
// that was there is replaced, and its counts with it. m is as in Activate; its
// ActivatedAt is when it was staged. Without a policy in force there is nothing
// to compare with: the error says so.
func (s *Slots) Stage(b *Bundle, p *Program, m Meta) error {
	candidate, err := s.newActive(b, p, m)
	if err != nil {
		return fmt.Errorf("stage policy: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.state.Load()
	if st.current == nil {
		return errors.New("stage policy: no policy is in force to compare it with; activate it")
	}
	s.setShadow(st, candidate, &shadow{program: p, slots: s, every: uint64(s.opt.ShadowEvery)})
	return nil
}

// Promote puts the candidate in force, as Activate does. Errors: ErrNoCandidate,
// and those of Activate, after which the candidate is still there.
func (s *Slots) Promote(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	c := s.state.Load().candidate
	if c == nil {
		return fmt.Errorf("promote policy: %w", ErrNoCandidate)
	}
	m := c.Meta
	m.ActivatedAt = time.Time{}
	return s.activate(&Active{Program: c.Program, Meta: s.stamped(m), health: &health{}})
}

// Discard drops the candidate, if there is one.
func (s *Slots) Discard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.state.Load(); st.candidate != nil {
		s.setShadow(st, nil, nil)
	}
}

// setShadow swaps in a set that differs from st in its candidate. Actives are
// immutable: the one in force is copied to carry the shadow. The caller holds mu.
func (s *Slots) setShadow(st *slotSet, candidate *Active, sh *shadow) {
	next := *st
	next.candidate = candidate
	current := *st.current
	current.shadow = sh
	next.current = &current
	if st.active == st.current {
		next.active = next.current
	}
	if st.lkg == st.current {
		next.lkg = next.current
	}
	s.state.Store(&next)
}

// alone is a without what is in its shadow.
func (a *Active) alone() *Active {
	if a == nil || a.shadow == nil {
		return a
	}
	c := *a
	c.shadow = nil
	return &c
}

// Rollback puts the LKG in force. Both slots then hold it: what was rolled back
// from is not kept, as it is not known good. A candidate is discarded. Errors:
// ErrNoLKG, and those of the disk, after which all is as it was.
func (s *Slots) Rollback(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	st := s.state.Load()
	if st.lkg == nil {
		return fmt.Errorf("roll policy back: %w", ErrNoLKG)
	}
	m := st.lkg.Meta
	m.ActivatedAt = time.Time{}
	next := &Active{Program: st.lkg.Program, Meta: s.stamped(m), health: st.lkg.health}
	if err := s.replaceActive(next, false); err != nil {
		return fmt.Errorf("roll policy back to %s: %w", m.Ref, err)
	}
	s.state.Store(&slotSet{current: next, active: next, lkg: st.lkg.alone()})
	return nil
}

func (s *Slots) stamped(m Meta) Meta {
	if m.ActivatedAt.IsZero() {
		m.ActivatedAt = s.opt.now()
	}
	m.ActivatedAt = m.ActivatedAt.UTC().Truncate(time.Millisecond)
	return m
}

// SlotStatus is what /v1/status says about policy.
type SlotStatus struct {
	Serving   string     `json:"serving"` // which slot is in force: active, lkg, none (deny all)
	Active    *SlotInfo  `json:"active,omitempty"`
	LKG       *SlotInfo  `json:"lkg,omitempty"`
	Candidate *Candidate `json:"candidate,omitempty"`
	Fallbacks []Fallback `json:"fallbacks,omitempty"` // since start; cleared by a good activation
}

// ServingActive is SlotStatus.Serving when the active slot is in force.
const ServingActive = slotActive

// SlotInfo is one slot.
type SlotInfo struct {
	Ref         string    `json:"ref"`
	Digest      string    `json:"digest"`
	Source      string    `json:"source"`
	ReleaseID   string    `json:"release_id,omitempty"`
	Sequence    uint64    `json:"sequence,omitempty"`
	ActivatedAt time.Time `json:"activated_at"`
	Evaluator   string    `json:"evaluator"`                  // EngineCompiled, EngineTopdown
	Why         string    `json:"evaluator_reason,omitempty"` // with EngineTopdown: why not the other
}

// Candidate is the policy in shadow and what came of it. Its ActivatedAt is when
// it was staged.
type Candidate struct {
	SlotInfo
	Shadow ShadowStats `json:"shadow"`
}

// Status describes the slots.
func (s *Slots) Status() SlotStatus {
	st := s.state.Load()
	out := SlotStatus{Serving: none, Active: st.active.info(), LKG: st.lkg.info(), Fallbacks: st.faults}
	if st.candidate != nil {
		out.Candidate = &Candidate{SlotInfo: *st.candidate.info(), Shadow: st.current.shadow.stats()}
	}
	switch {
	case st.current == nil:
	case st.current == st.active:
		out.Serving = slotActive
	default:
		out.Serving = slotLKG
	}
	return out
}

func (a *Active) info() *SlotInfo {
	if a == nil {
		return nil
	}
	m := a.Meta
	engine, why := a.Program.Engine()
	return &SlotInfo{Ref: m.Ref, Digest: m.Digest, Source: m.Source, ReleaseID: m.ReleaseID,
		Sequence: m.Sequence, ActivatedAt: m.ActivatedAt, Evaluator: engine, Why: why}
}

// storedMeta is meta.json: Meta and a checksum, as a sequence number or release
// id with a flipped bit is as bad as a rule with one.
type storedMeta struct {
	Meta
	Check string `json:"check"` // sha256 over the file with this field empty
}

func encodeMeta(m Meta) ([]byte, error) {
	sm := storedMeta{Meta: m}
	plain, err := json.Marshal(sm)
	if err != nil {
		return nil, err
	}
	sm.Check = Digest(plain)
	return json.Marshal(sm)
}

func decodeMeta(data []byte) (Meta, error) {
	var sm storedMeta
	if err := strictjson.Unmarshal(data, &sm); err != nil {
		return Meta{}, err
	}
	if again, err := encodeMeta(sm.Meta); err != nil || !bytes.Equal(again, data) {
		return Meta{}, errors.New("the checksum does not match")
	}
	return sm.Meta, nil
}

// load reads, verifies and compiles a slot. An absent one is fs.ErrNotExist;
// one that exists without its files is not.
func (s *Slots) load(ctx context.Context, slot string) (*Active, error) {
	if _, err := os.Stat(s.path(slot)); err != nil {
		return nil, err
	}
	a, err := s.read(ctx, slot)
	if err != nil {
		return nil, fmt.Errorf("slot %s cannot be used: %s", slot, err) // not %w: an absent file within is not an absent slot
	}
	return a, nil
}

func (s *Slots) read(ctx context.Context, slot string) (*Active, error) {
	m, raw, err := s.readFiles(slot)
	if err != nil {
		return nil, err
	}
	b, err := ReadBundle(raw, s.opt.Limits)
	if err != nil {
		return nil, err
	}
	if b.Ref() != m.Ref {
		return nil, fmt.Errorf("the bundle is %s, %s says %s", b.Ref(), metaFile, m.Ref)
	}
	if s.opt.Compatible != nil {
		if err := s.opt.Compatible(b); err != nil {
			return nil, fmt.Errorf("not compatible with this program: %w", err)
		}
	}
	p, err := s.Compile(ctx, b)
	if err != nil {
		return nil, err
	}
	return &Active{Program: p, Meta: m, health: &health{}}, nil
}

// readFiles reads a slot's files and checks the bundle against the meta.
func (s *Slots) readFiles(slot string) (Meta, []byte, error) {
	data, err := readRegular(s.path(slot, metaFile), maxMetaBytes)
	if err != nil {
		return Meta{}, nil, err
	}
	m, err := decodeMeta(data)
	if err != nil {
		return Meta{}, nil, fmt.Errorf("%s: %w", metaFile, err)
	}
	raw, err := readRegular(s.path(slot, bundleFile), s.opt.Limits.withDefaults().MaxBytes)
	if err != nil {
		return Meta{}, nil, err
	}
	if d := Digest(raw); d != m.Digest {
		return Meta{}, nil, fmt.Errorf("%s has digest %s, %s says %s", bundleFile, d, metaFile, m.Digest)
	}
	return m, raw, nil
}

// intact reports whether a slot's files are still what a was read from.
func (s *Slots) intact(slot string, a *Active) bool {
	m, raw, err := s.readFiles(slot)
	return err == nil && m == a.Meta && bytes.Equal(raw, a.Program.bundle.Raw)
}

// Compile compiles a bundle that may become active, as the slots' own are.
func (s *Slots) Compile(ctx context.Context, b *Bundle) (*Program, error) {
	return CompileWith(ctx, b, s.opt.Compile)
}

func (s *Slots) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

func (s *Slots) exists(slot string) (bool, error) {
	_, err := os.Lstat(s.path(slot))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// move renames one slot directory to another name, where it exists.
func (s *Slots) move(from, to string) error {
	if ok, err := s.exists(from); err != nil || !ok {
		return err
	}
	if err := s.opt.step(from + " to " + to); err != nil {
		return err
	}
	return os.Rename(s.path(from), s.path(to))
}

// remove deletes a slot directory. It is first renamed to a name that nothing
// reads: a deletion that is cut short must not leave half a slot.
func (s *Slots) remove(slot string) error {
	if ok, err := s.exists(slot); err != nil || !ok {
		return err
	}
	if err := s.opt.step("remove " + slot); err != nil {
		return err
	}
	var nonce [8]byte
	rand.Read(nonce[:])
	trash := s.path(trashPrefix + hex.EncodeToString(nonce[:]))
	if err := os.Rename(s.path(slot), trash); err != nil {
		return err
	}
	return os.RemoveAll(trash)
}

// replaceActive persists a as the active slot. keep: the former active becomes
// the LKG; else it is dropped and the LKG stays. The caller holds mu.
func (s *Slots) replaceActive(a *Active, keep bool) (err error) {
	if err := s.stage(a); err != nil {
		return errors.Join(err, s.remove(slotNext))
	}
	had, err := s.exists(slotActive)
	if err != nil {
		return errors.Join(err, s.remove(slotNext))
	}
	committed := false
	defer func() {
		if err == nil || committed {
			return
		}
		// Put everything back, as the start does after a crash. Where nothing had
		// to make room there is only next to remove.
		undo := func() error { _, err := s.recover(); return err }
		if !had {
			undo = func() error { return s.remove(slotNext) }
		}
		if uerr := undo(); uerr != nil {
			err = errors.Join(err, fmt.Errorf("undo: %w", uerr))
		}
	}()
	if keep {
		if err := s.move(slotLKG, slotOld); err != nil {
			return err
		}
		if err := s.move(slotActive, slotLKG); err != nil {
			return err
		}
	} else if err := s.move(slotActive, slotRetired); err != nil {
		return err
	}
	// What was moved must be durable before the commit: then no power cut shows
	// the commit without it.
	if err := s.sync("moved"); err != nil {
		return err
	}
	if err := s.move(slotNext, slotActive); err != nil {
		return err
	}
	if err := s.sync("committed"); err != nil {
		// Whether the rename is on disk is unknown. Take it back: next is then
		// removed and the former state returns.
		return errors.Join(err, os.Rename(s.path(slotActive), s.path(slotNext)))
	}
	committed = true
	// What is left over is removed now or at the next start.
	_ = s.remove(slotOld)
	_ = s.remove(slotRetired)
	return nil
}

func (s *Slots) sync(name string) error {
	if err := s.opt.step("sync " + name); err != nil {
		return err
	}
	return vfs.SyncDir(s.dir)
}

// stage writes a to next/ durably, reads it back and verifies it.
func (s *Slots) stage(a *Active) error {
	if err := s.remove(slotNext); err != nil {
		return err
	}
	if err := s.opt.step("make next"); err != nil {
		return err
	}
	if err := vfs.MkdirAll(s.path(slotNext), 0o700); err != nil {
		return err
	}
	meta, err := encodeMeta(a.Meta)
	if err != nil {
		return err
	}
	if len(meta) > maxMetaBytes {
		return fmt.Errorf("%s would have over %d bytes", metaFile, maxMetaBytes)
	}
	for _, f := range []file{{bundleFile, a.Program.bundle.Raw}, {metaFile, meta}} {
		if err := s.opt.step("write " + f.name); err != nil {
			return err
		}
		if err := vfs.WriteFile(s.path(slotNext, f.name), f.data, 0o600); err != nil {
			return err
		}
	}
	if err := s.opt.step("verify next"); err != nil {
		return err
	}
	if !s.intact(slotNext, a) {
		return fmt.Errorf("read back %s: the disk returns other bytes than were written", s.path(slotNext))
	}
	return nil
}

// recover brings the directory to a state that an activation starts from: at
// most active/ and lkg/. It can be cut short anywhere and run again. It returns
// what it undid, if the active slot was concerned.
//
//	active  what else            how it came                what is done
//	yes     old, no lkg          cut after lkg -> old       old -> lkg
//	yes     old and lkg          cut after the commit       remove old
//	yes     retired              cut after the commit       remove retired
//	no      retired              cut before the commit      retired -> active
//	no      lkg, next [, old]    cut before the commit      lkg -> active [, old -> lkg]
//	any     next                 never committed            remove next
func (s *Slots) recover() (undone string, err error) {
	have := map[string]bool{}
	for _, slot := range []string{slotActive, slotLKG, slotNext, slotOld, slotRetired} {
		if have[slot], err = s.exists(slot); err != nil {
			return "", err
		}
	}
	const told = "an activation was interrupted: the policy before it was put back"
	switch {
	case have[slotActive]:
	case have[slotRetired]:
		undone = told
		if err := s.move(slotRetired, slotActive); err != nil {
			return "", err
		}
	case have[slotLKG] && have[slotNext]:
		undone = told
		if err := s.move(slotLKG, slotActive); err != nil {
			return "", err
		}
		have[slotLKG] = false
	}
	if have[slotOld] && !have[slotLKG] {
		if err := s.move(slotOld, slotLKG); err != nil {
			return "", err
		}
	}
	if undone != "" || have[slotOld] {
		if err := s.sync("recovered"); err != nil {
			return "", err
		}
	}
	for _, slot := range []string{slotNext, slotOld, slotRetired} {
		if err := s.remove(slot); err != nil {
			return "", err
		}
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), trashPrefix) {
			if err := os.RemoveAll(s.path(e.Name())); err != nil {
				return "", err
			}
		}
	}
	return undone, nil
}
