package call

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/node/tool"
	"github.com/autonomyops/autonomy/wal"
)

// Recover reads at start what the log holds of calls: it remembers those that
// carry a call_id, and writes for each decision that allowed a tool and has no
// action record an action with outcome error, code outcome_unknown (INV-14). It
// returns how many those were.
//
// It begins where Options.CallsFile ends, if that fits the log, else at the
// log's oldest record.
func (p *Pipeline) Recover(ctx context.Context) (unknown int, err error) {
	last := p.o.Log.Durable()
	from := uint64(0)
	if p.o.CallsFile != "" {
		calls, seq, err := p.readCalls()
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			p.o.Logger.Warn("the file of finished calls is not used: the log is read instead", "err", err)
		case seq > last:
			p.o.Logger.Warn("the file of finished calls is ahead of the log and not used", "file_seq", seq, "log_seq", last)
		default:
			from = seq
			for _, f := range calls {
				p.calls.keep(f)
			}
		}
	}
	s := scan{p: p, pending: map[string]uint64{}, entries: map[string]int32{}}
	r := p.o.Log.Reader(from + 1)
	for next := from; next < last; {
		b, err := r.Next(ctx, 1024, 4<<20)
		if err != nil {
			return 0, fmt.Errorf("read the log: %w", err)
		}
		for _, raw := range b.Records {
			next = raw.End()
			if err := s.record(&raw); err != nil {
				b.Release()
				return 0, fmt.Errorf("record %d: %w", raw.Seq, err)
			}
		}
		b.Release()
	}
	for _, id := range sortedKeys(s.pending) {
		dec, err := p.read(s.pending[id])
		if err != nil {
			return unknown, fmt.Errorf("decision of %s: %w", id, err)
		}
		seq, err := p.recordAction(&dec, &tool.Result{Outcome: tool.OutcomeError, Code: "outcome_unknown", Message: unknownOutcome}, LayerRuntime, 0, false)
		if err != nil {
			return unknown, fmt.Errorf("record the unknown outcome of %s: %w", id, err)
		}
		s.acted(id, seq)
		unknown++
	}
	return unknown, nil
}

// scan is Recover's way through the log.
type scan struct {
	p       *Pipeline
	pending map[string]uint64 // audit id → sequence of an allow without an action so far
	entries map[string]int32  // audit id → place among the finished calls, until its action came
}

// The members of a decision body that make a look into it necessary.
var (
	hasCallID = []byte(`"call_id":`)
	isDryRun  = []byte(`"dry_run":true`)
)

func (s *scan) record(raw *wal.Record) error {
	if raw.Void || raw.Class != wal.ClassDecision && raw.Class != wal.ClassAction {
		return nil
	}
	rec, err := otlp.Parse(raw.Payload)
	if err != nil {
		return err
	}
	if raw.Class == wal.ClassAction {
		delete(s.pending, rec.AuditID)
		s.acted(rec.AuditID, raw.Seq)
		return nil
	}
	if bytes.Contains(rec.Body, hasCallID) || bytes.Contains(rec.Body, isDryRun) {
		var d event.DecisionBody
		if err := json.Unmarshal(rec.Body, &d); err != nil {
			return err
		}
		if d.DryRun {
			return nil
		}
		if d.CallID != "" {
			key, err := s.p.keyOf(&d)
			if err != nil {
				return err
			}
			s.p.calls.keep(finished{key: key, digest: shortDigest(d.ParamsDigest), decision: raw.Seq})
			s.entries[rec.AuditID] = s.p.calls.index[key]
		}
	}
	if rec.Decision == "allow" {
		s.pending[rec.AuditID] = raw.Seq
	}
	return nil
}

// acted notes the action of a call. The call may have been forgotten since.
func (s *scan) acted(auditID string, seq uint64) {
	i, ok := s.entries[auditID]
	if !ok {
		return
	}
	delete(s.entries, auditID)
	if f := &s.p.calls.ring[i]; event.ID(s.p.o.Log.ID(), f.decision) == auditID {
		f.action = seq
	}
}

// The file of finished calls:
//
//	"autonomy calls 1\n"
//	the log's id, 16 bytes of text
//	seq, 8 bytes: everything up to this record of the log is accounted for, and
//	  no decision up to it waits for its action
//	count, 8 bytes; then for each call, oldest first: key 16, digest 16,
//	  decision 8, action 8
//	HMAC-SHA256 over all of it with the node's secret, 32 bytes
//
// Numbers are big endian. The file saves time and nothing else: without it, or
// when anything about it is wrong, the log is read.
const (
	callsMagic = "autonomy calls 1\n"
	callsHead  = len(callsMagic) + 16 + 8 + 8
	callsEntry = 16 + 16 + 8 + 8
	callsMAC   = 32
)

// SaveCalls writes Options.CallsFile. It must be called while no call runs: at
// the end, or when Idle says so. seq is a record that was the log's last before
// that was so.
func (p *Pipeline) SaveCalls(ctx context.Context, seq uint64) error {
	if p.o.CallsFile == "" || seq == 0 {
		return nil
	}
	// A record that a power cut takes away would give its number to another one.
	if err := p.o.Log.WaitDurable(ctx, seq); err != nil {
		return fmt.Errorf("save the finished calls: %w", err)
	}
	calls := p.calls.all(seq)
	b := make([]byte, 0, callsHead+len(calls)*callsEntry+callsMAC)
	b = append(b, callsMagic...)
	b = append(b, fmt.Sprintf("%-16.16s", p.o.Log.ID())...)
	b = binary.BigEndian.AppendUint64(b, seq)
	b = binary.BigEndian.AppendUint64(b, uint64(len(calls)))
	for _, f := range calls {
		b = append(b, f.key[:]...)
		b = append(b, f.digest[:]...)
		b = binary.BigEndian.AppendUint64(b, f.decision)
		b = binary.BigEndian.AppendUint64(b, f.action)
	}
	mac := p.calls.mac("calls file", string(b))
	if err := vfs.WriteFile(p.o.CallsFile, append(b, mac[:]...), 0o600); err != nil {
		return fmt.Errorf("save the finished calls: %w", err)
	}
	return nil
}

// Idle reports whether no call runs, and a record that every call before was
// over at: what SaveCalls wants.
func (p *Pipeline) Idle() (seq uint64, idle bool) {
	// The order matters: a call that wrote a record up to seq had been counted
	// before it did, and is over when none is counted now.
	seq = p.o.Log.Stats().NextSeq - 1
	return seq, p.metrics.inFlight.Load() == 0
}

func (p *Pipeline) readCalls() (calls []finished, seq uint64, err error) {
	f, err := os.Open(p.o.CallsFile)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	most := callsHead + p.o.MaxCallIDs*callsEntry + callsMAC
	b, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err != nil {
		return nil, 0, err
	}
	if len(b) > most {
		return nil, 0, fmt.Errorf("%s holds more than %d calls", p.o.CallsFile, p.o.MaxCallIDs)
	}
	if len(b) < callsHead+callsMAC || string(b[:len(callsMagic)]) != callsMagic {
		return nil, 0, fmt.Errorf("%s is damaged", p.o.CallsFile)
	}
	body := b[:len(b)-callsMAC]
	if mac := p.calls.mac("calls file", string(body)); !hmac.Equal(mac[:], b[len(body):]) {
		return nil, 0, fmt.Errorf("%s is damaged, or of another node", p.o.CallsFile)
	}
	body = body[len(callsMagic):]
	if id := fmt.Sprintf("%-16.16s", p.o.Log.ID()); string(body[:16]) != id {
		return nil, 0, fmt.Errorf("%s is of the log %s", p.o.CallsFile, body[:16])
	}
	seq = binary.BigEndian.Uint64(body[16:])
	n := binary.BigEndian.Uint64(body[24:])
	body = body[32:]
	if uint64(len(body)) != n*uint64(callsEntry) {
		return nil, 0, fmt.Errorf("%s is damaged", p.o.CallsFile)
	}
	for e := range slices.Chunk(body, callsEntry) {
		calls = append(calls, finished{callKey(e[:16]), [16]byte(e[16:32]), binary.BigEndian.Uint64(e[32:]), binary.BigEndian.Uint64(e[40:])})
	}
	return calls, seq, nil
}
