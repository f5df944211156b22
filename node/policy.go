package node

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"runtime/debug"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/metric"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/verify"
	"github.com/autonomyops/autonomy/wal"
)

// compatible says whether this node can serve a bundle.
func compatible(b *prepared.Bundle) error { return verify.CheckRuntime(b.RequiresRuntime, run.Version) }

func (n *node) loadPolicy(ctx context.Context) error {
	var err error
	n.slots, n.faults, err = prepared.OpenSlots(ctx, filepath.Join(n.cfg.StateDir, "policy"),
		prepared.SlotsOptions{HealthWindow: n.cfg.PolicyGood, Compatible: compatible, Compile: n.compileOptions()})
	if err != nil {
		return err
	}
	for _, f := range n.faults {
		n.log.Error("policy slot cannot be used", "slot", f.Slot, "why", f.Why, "replacement", f.Replacement)
	}
	return nil
}

func (n *node) compileOptions() prepared.Options {
	return prepared.Options{SelfCheck: n.cfg.PolicyCheck, OnMismatch: n.policyMismatch}
}

// compileLocal makes the program of --policy. It writes nothing.
func (n *node) compileLocal(ctx context.Context) error {
	if n.cfg.Policy == "" {
		return nil
	}
	b, err := prepared.ReadBundleFile(n.cfg.Policy, prepared.Limits{})
	if err != nil {
		return run.Exit(run.Usage, fmt.Errorf("--policy: %w", err))
	}
	if err := compatible(b); err != nil {
		return run.Exit(run.Usage, fmt.Errorf("--policy %s: %w", n.cfg.Policy, err))
	}
	p, err := prepared.CompileWith(ctx, b, n.compileOptions())
	if err != nil {
		return run.Exit(run.Usage, fmt.Errorf("--policy %s: %w", n.cfg.Policy, err))
	}
	n.local = &prepared.Active{Program: p, Meta: prepared.Meta{
		Digest: b.Digest, Ref: b.Ref(), Version: b.Version, Source: prepared.SourceLocal, ActivatedAt: n.started}}
	return nil
}

// Current is the policy in force: the active slot, or the operator's file while
// no release was ever activated. A damaged slot is no reason to take the file:
// then there is none, and calls are denied.
func (n *node) Current() *prepared.Active {
	if a := n.slots.Current(); a != nil {
		return a
	}
	if len(n.faults) == 0 {
		return n.local
	}
	return nil
}

// admitLocal admits the operator's file, if it is what will be in force.
func (n *node) admitLocal(ctx context.Context) error {
	if n.local == nil || n.Current() != n.local {
		return nil
	}
	if err := n.admit(ctx, n.local.Program); err != nil {
		if errors.Is(err, prepared.ErrFailOpen) {
			err = fmt.Errorf("%w\nMend the rule, or name the field with --allow-fail-open", err)
		}
		return run.Exit(run.Usage, fmt.Errorf("--policy %s: %w", n.cfg.Policy, err))
	}
	debug.FreeOSMemory() // what compiling and probing have left
	return nil
}

// admit judges a policy before it is staged or comes into force: with its own
// sample calls and calls of the log it must not fail open, but for the fields that
// the bundle or the operator allows, which are recorded. What is likely to be
// wrong with it besides is told in the log only.
func (n *node) admit(ctx context.Context, p *prepared.Program) error {
	b := p.Bundle()
	for i, f := range prepared.LintBundle(b) {
		if i == maxLintLines {
			break
		}
		n.log.Warn("policy: "+f.Message, "policy", b.Ref(), "at", fmt.Sprintf("%s:%d", f.File, f.Line), "rule", f.Rule)
	}
	r, err := prepared.Probe(ctx, p, prepared.ProbeOptions{Recorded: n.recordedCalls(ctx, b.Digest), Allow: n.cfg.FailOpen})
	if err != nil {
		return err
	}
	if err := r.Err(); err != nil {
		return err
	}
	if over := r.Overridden(); len(over) > 0 {
		n.log.Warn("policy fails open where it is allowed to", "policy", b.Ref(), "findings", len(over), "first", over[0].String())
		n.note(wal.ClassLifecycle, event.PolicyOverride, overrideBody(b, over))
	}
	n.log.Info("policy probed", "policy", b.Ref(), "examples", r.Examples, "recorded_calls", r.Recorded, "evaluations", r.Probes)
	return nil
}

const (
	maxLintLines = 16 // findings told at one load
	maxOverrides = 64 // findings in one record
)

// overrideBody is the body of a policy.override record.
func overrideBody(b *prepared.Bundle, over []prepared.FailOpen) any {
	type field struct {
		Field  string   `json:"field"`
		Change string   `json:"change"`
		By     string   `json:"by"`
		Rules  []string `json:"rules,omitempty"`
	}
	var fields []field
	have := map[[2]string]bool{}
	for _, f := range over {
		if key := [2]string{f.Field, f.Change}; !have[key] && len(fields) < maxOverrides {
			have[key] = true
			out := field{Field: f.Field, Change: f.Change, By: f.Override}
			for _, r := range f.Rules[:min(len(f.Rules), 4)] {
				out.Rules = append(out.Rules, fmt.Sprintf("%s at %s", r.Rule, r.At()))
			}
			fields = append(fields, out)
		}
	}
	return map[string]any{"policy_ref": b.Ref(), "policy_digest": b.Digest, "fields": fields}
}

// Bounds of what the probe takes from the log.
const (
	maxProbeCalls = 64   // distinct calls
	maxProbeScan  = 4096 // records looked at
)

// recordedCalls are the inputs of the newest distinct calls in the log, newest
// first. Two calls are the same when kind and params are, byte for byte. Calls
// that the policy with the given digest has decided are left out: it was in force
// already, and a node must come up again with what it ran on, whatever an agent
// has sent meanwhile.
func (n *node) recordedCalls(ctx context.Context, digest string) [][]byte {
	var out [][]byte
	seen := map[[sha256.Size]byte]bool{}
	last := n.wal.Durable()
	for seq := last; seq > 0 && last-seq < maxProbeScan && len(out) < maxProbeCalls && ctx.Err() == nil; seq-- {
		payload, class, err := n.wal.Get(seq)
		if err != nil {
			if errors.Is(err, wal.ErrNotFound) {
				continue // void, lost, or its space is used again
			}
			break // the log says so elsewhere; the probe makes do with what it has
		}
		if class != wal.ClassDecision {
			continue
		}
		rec, err := otlp.Parse(payload)
		if err != nil {
			continue
		}
		var body event.DecisionBody
		var call struct {
			Kind   json.RawMessage `json:"kind"`
			Params json.RawMessage `json:"params"`
		}
		if json.Unmarshal(rec.Body, &body) != nil || body.PolicyDigest == digest || json.Unmarshal(body.Input, &call) != nil {
			continue
		}
		key := sha256.Sum256(fmt.Appendf(nil, "%s\n%s", call.Kind, call.Params))
		if !seen[key] {
			seen[key] = true
			out = append(out, body.Input)
		}
	}
	return out
}

// notePolicy records how the node comes by its policy at start.
func (n *node) notePolicy() {
	for _, f := range n.faults {
		n.note(wal.ClassError, event.PolicyFallback, f)
	}
	if a := n.Current(); a != nil && a.Meta.Source == prepared.SourceLocal {
		n.note(wal.ClassLifecycle, event.PolicyLoaded, a.Meta)
	}
}

func (n *node) policyMetrics(b *metric.Buffer) {
	active := uint64(0)
	if n.Current() != nil {
		active = 1
	}
	st := n.slots.Status()
	serving := st.Serving
	if n.Current() != nil && n.Current() == n.local {
		serving = prepared.SourceLocal
	}
	b.Uint("autonomy_node_policy_active", "", active)
	b.Uint("autonomy_node_policy_serving", fmt.Sprintf("slot=%q", serving), 1)
	b.Uint("autonomy_node_policy_slot_faults", "", uint64(len(st.Fallbacks)))
	var s prepared.ShadowStats
	if st.Candidate != nil {
		s = st.Candidate.Shadow
	}
	for _, c := range []struct {
		result string
		n      uint64
	}{{"same", s.Same}, {"stricter", s.Stricter}, {"looser", s.Looser}, {"other", s.Other}, {"failed", s.Failed}, {"skipped", s.Skipped}} {
		b.Uint("autonomy_node_policy_shadow_calls", fmt.Sprintf("result=%q", c.result), c.n)
	}
}
