package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/wal"
)

// makeWAL writes a log of N calls, each a decision and an action, and one
// aborted record at the end: makewal DIR N
func makeWAL(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: makewal DIR N")
	}
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	l, _, err := wal.Open(ts.MkAbs(args[0]), wal.Options{SegmentBytes: 64 << 10, MaxBytes: 256 << 10})
	ts.Check(err)
	put := func(c wal.Class, r otlp.Record) {
		r.LogID, r.Class = l.ID(), c.String()
		res, err := l.Reserve(c, r.Size())
		ts.Check(err)
		r.Put(res.Buf, res.Seq)
		res.Commit()
	}
	for i := range n {
		id := fmt.Sprintf("a-%d", i)
		at := uint64(1_700_000_000_000_000_000) + uint64(i)
		put(wal.ClassDecision, otlp.Record{TimeUnixNano: at, Severity: otlp.Info, EventType: event.Decision, AuditID: id,
			Decision: "allow", Kind: "tool.echo", Body: []byte(`{"policy_ref":"p@1.0.0","input":{"msg":"<hi>"}}`)})
		put(wal.ClassAction, otlp.Record{TimeUnixNano: at + 5, Severity: otlp.Info, EventType: event.Action, AuditID: id,
			Decision: "allow", Outcome: "ok", Kind: "tool.echo", Body: []byte(`{"duration_ns":5}`)})
	}
	res, err := l.Reserve(wal.ClassAction, 20)
	ts.Check(err)
	res.Abort()
	ts.Check(l.Close())
}

// makeCall writes a log with the decision of a bundle about an input, as a node
// does, and an action, and puts their audit ids into DECIDED and ACTED:
// makecall DIR BUNDLE INPUT
func makeCall(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: makecall DIR BUNDLE INPUT")
	}
	b, err := prepared.ReadBundleFile(ts.MkAbs(args[1]), prepared.Limits{})
	ts.Check(err)
	p, err := prepared.Compile(context.Background(), b)
	ts.Check(err)
	input := []byte(ts.ReadFile(args[2]))
	d, err := p.Eval(context.Background(), input)
	ts.Check(err)
	body, err := json.Marshal(event.DecisionBody{PolicyRef: b.Ref(), PolicyDigest: b.Digest, Reasons: d.Reasons, Input: input})
	ts.Check(err)
	l, _, err := wal.Open(ts.MkAbs(args[0]), wal.Options{SegmentBytes: 64 << 10, MaxBytes: 256 << 10})
	ts.Check(err)
	for _, r := range []struct {
		class wal.Class
		rec   otlp.Record
		name  string
	}{
		{wal.ClassDecision, otlp.Record{EventType: event.Decision, Decision: decisionWord(d), Kind: "tool.x", Body: body}, "DECIDED"},
		{wal.ClassAction, otlp.Record{EventType: event.Action, Decision: "allow", Outcome: "ok", Body: []byte(`{}`)}, "ACTED"},
	} {
		r.rec.LogID, r.rec.Class, r.rec.TimeUnixNano, r.rec.Severity = l.ID(), r.class.String(), 1_700_000_000_000_000_000, otlp.Info
		res, err := l.Reserve(r.class, r.rec.Size())
		ts.Check(err)
		r.rec.Put(res.Buf, res.Seq)
		res.Commit()
		ts.Setenv(r.name, event.ID(l.ID(), res.Seq))
	}
	ts.Check(l.Close())
}

// flipBit changes one bit of a file: flip FILE OFFSET
func flipBit(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: flip FILE OFFSET")
	}
	off, err := strconv.ParseInt(args[1], 0, 64)
	ts.Check(err)
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	b := make([]byte, 1)
	_, err = f.ReadAt(b, off)
	ts.Check(err)
	b[0] ^= 1
	_, err = f.WriteAt(b, off)
	ts.Check(err)
}
