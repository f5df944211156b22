package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"

	"github.com/autonomyops/autonomy/bench/policybench/leg"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/prepared"
)

// ours is this project's evaluator, from the bytes of a bundle.
type ours struct{ program *prepared.Program }

func openOurs(dir string) (leg.Policy, error) {
	p, err := compile(dir)
	if err != nil {
		return nil, err
	}
	return ours{p}, nil
}

// openTopdown is ours as it evaluates what its own engine cannot.
func openTopdown(dir string) (leg.Policy, error) {
	b, err := read(dir)
	if err != nil {
		return nil, err
	}
	p, err := prepared.CompileWith(context.Background(), b, prepared.Options{Engine: prepared.EngineTopdown})
	return ours{p}, err
}

func compile(dir string) (*prepared.Program, error) {
	b, err := read(dir)
	if err != nil {
		return nil, err
	}
	return prepared.Compile(context.Background(), b)
}

func read(dir string) (*prepared.Bundle, error) {
	return prepared.ReadBundleFile(filepath.Join(dir, "bundle.tar.gz"), prepared.Limits{})
}

func (o ours) Decider() leg.Decider {
	// The decision is used again, as a node does. Deciders are made one behind
	// the other for goroutines that run beside each other: no two share a cache
	// line.
	var own struct {
		decision prepared.Decision
		_        [64]byte
	}
	return func(dst, input []byte) ([]byte, error) {
		if err := o.program.EvalInto(context.Background(), &own.decision, input); err != nil && !errors.Is(err, prepared.ErrUndefined) {
			return dst, err
		}
		return appendDecision(dst, &own.decision), nil
	}
}

// appendDecision writes a decision as the contract has it.
func appendDecision(dst []byte, d *prepared.Decision) []byte {
	dst = append(dst, `{"allow":`...)
	dst = strconv.AppendBool(dst, d.Allow)
	dst = append(dst, `,"reasons":[`...)
	for i, r := range d.Reasons {
		if i > 0 {
			dst = append(dst, ',')
		}
		if r.Code == "" {
			dst = strictjson.AppendString(dst, r.Message)
			continue
		}
		dst = append(dst, `{"code":`...)
		dst = strictjson.AppendString(dst, r.Code)
		dst = append(dst, `,"message":`...)
		dst = strictjson.AppendString(dst, r.Message)
		dst = append(dst, '}')
	}
	dst = append(dst, `],"constraints":{"timeout_ms":`...)
	dst = strconv.AppendInt(dst, d.Constraints.TimeoutMS, 10)
	dst = append(dst, `,"output_max_bytes":`...)
	dst = strconv.AppendInt(dst, d.Constraints.OutputMaxBytes, 10)
	dst = append(dst, `},"redact":[`...)
	for i, r := range d.Redact {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = strictjson.AppendString(dst, r)
	}
	return append(dst, `]}`...)
}

// swapped are two versions of one policy in slots on disk.
type swapped struct {
	slots    *prepared.Slots
	versions [2]version
	at       int
}

type version struct {
	bundle  *prepared.Bundle
	program *prepared.Program
}

// openSwapped makes slots in dir, which is the leg's own, and activates the
// policy. Its other version differs in the revision.
func openSwapped(dir string) (leg.Policy, error) {
	state, err := os.MkdirTemp(dir, "slots-")
	if err != nil {
		return nil, err
	}
	s := &swapped{}
	if s.slots, _, err = prepared.OpenSlots(context.Background(), state, prepared.SlotsOptions{}); err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(filepath.Join(dir, "bundle.tar.gz"))
	if err != nil {
		return nil, err
	}
	other, err := revised(dir)
	if err != nil {
		return nil, err
	}
	for i, raw := range [][]byte{raw, other} {
		v := &s.versions[i]
		if v.bundle, err = prepared.ReadBundle(raw, prepared.Limits{}); err != nil {
			return nil, err
		}
		if v.program, err = prepared.Compile(context.Background(), v.bundle); err != nil {
			return nil, err
		}
	}
	return s, s.Swap()
}

// revised is the bundle in dir with one more rule, which nothing asks for.
func revised(dir string) ([]byte, error) {
	rego, err := os.ReadFile(filepath.Join(dir, "policy.rego"))
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(filepath.Join(dir, "data.json"))
	if err != nil {
		return nil, err
	}
	c := policyCase{name: "revised"}
	if err := json.Unmarshal(data, &c.data); err != nil {
		return nil, err
	}
	return c.bundle(append(rego, "\nrevised := true\n"...), data)
}

func (s *swapped) Swap() error {
	s.at++
	v := s.versions[s.at%2]
	return s.slots.Activate(context.Background(), v.bundle, v.program, prepared.Meta{Source: prepared.SourceRelease})
}

func (s *swapped) Decider() leg.Decider {
	var d prepared.Decision
	return func(dst, input []byte) ([]byte, error) {
		if err := s.slots.Current().EvalInto(context.Background(), &d, input); err != nil {
			return dst, err
		}
		return appendDecision(dst, &d), nil
	}
}
