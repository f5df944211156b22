package export

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/internal/vfs"
)

// state is what a restart must not reset: StateFile, as JSON. It speaks of one
// log and one endpoint; that of another is ignored.
type state struct {
	Schema   string `json:"schema"`
	LogID    string `json:"log_id"`
	Endpoint string `json:"endpoint"`
	// FirstSeq is the first record of the batch that failed first and is not
	// delivered yet; 0: there is none. Attempts counts since then, those for
	// other batches too.
	FirstSeq uint64 `json:"first_seq"`
	Attempts int    `json:"attempts"`
	NotUntil int64  `json:"not_until_unix_ns"` // the next attempt waits for it
	// Resends counts how often the records above Watermark were sent again
	// without moving it.
	Watermark uint64 `json:"watermark"`
	Resends   int    `json:"resends"`
}

const (
	stateSchema  = "autonomy.export-state/v0"
	maxStateFile = 4 << 10 // bytes
)

// ledger keeps the state. e.mu guards it.
type ledger struct {
	state
	saved   state // what the file holds
	damaged error // the file cannot be read: exhausted until Resume
	clean   bool  // the last attempt of this process succeeded
	counted bool  // the attempt that is being made is in Attempts
}

// load reads the state file. A file that cannot be read is no reason to begin
// to count anew: delivery stays off until Resume.
func (e *Exporter) load() {
	fresh := state{Schema: stateSchema, LogID: e.o.Log.ID(), Endpoint: e.endpoint}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.led = ledger{state: fresh, saved: fresh}
	if e.o.StateFile == "" {
		return
	}
	s, err := readState(e.o.StateFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		e.led.damaged = fmt.Errorf("%w: how often delivery was tried is not known; nothing is sent until an operator resumes it", err)
		e.o.Logger.Error("export state is damaged: delivery is off until it is resumed", "file", e.o.StateFile, "err", err)
	case s.LogID == fresh.LogID && s.Endpoint == fresh.Endpoint:
		if s.FirstSeq <= e.delivered() { // its end could not be noted
			s.FirstSeq, s.Attempts, s.NotUntil = 0, 0, 0
		}
		e.led.state, e.led.saved = s, s
		e.status.Attempts, e.status.Resends = s.Attempts, s.Resends
	}
}

func readState(path string) (state, error) {
	var s state
	f, err := os.Open(path)
	if err != nil {
		return s, err
	}
	defer f.Close()
	if err := strictjson.Read(f, maxStateFile, &s); err != nil {
		return s, fmt.Errorf("export state: %w", err)
	}
	if s.Schema != stateSchema || s.Attempts < 0 || s.Resends < 0 || (s.Attempts > 0) != (s.FirstSeq > 0) {
		return s, fmt.Errorf("export state: schema %q, first_seq %d, attempts %d, resends %d do not fit together", s.Schema, s.FirstSeq, s.Attempts, s.Resends)
	}
	return s, nil
}

// save makes the state durable, unless the file holds it. mu is held. When the
// disk refuses, the count goes on in memory: this process stays bounded, the
// next one may count some attempts twice.
func (e *Exporter) save() error {
	if e.o.StateFile == "" || e.led.state == e.led.saved || e.led.damaged != nil {
		return nil
	}
	if err := writeState(e.o.StateFile, e.led.state); err != nil {
		return fmt.Errorf("export state: %w", err)
	}
	e.led.saved = e.led.state
	return nil
}

func writeState(path string, s state) error {
	b := fmt.Appendf(nil, `{"schema":%q,"log_id":%q,"endpoint":`, s.Schema, s.LogID)
	b = strictjson.AppendString(b, s.Endpoint)
	b = fmt.Appendf(b, `,"first_seq":%d,"attempts":%d,"not_until_unix_ns":%d,"watermark":%d,"resends":%d}`+"\n",
		s.FirstSeq, s.Attempts, s.NotUntil, s.Watermark, s.Resends)
	return vfs.WriteFile(path, b, 0o600)
}

// backoff is the wait after the attempt of that number: it doubles from
// MinBackoff to MaxBackoff.
func (e *Exporter) backoff(attempt int) time.Duration {
	d := e.o.MinBackoff
	for ; attempt > 1 && d < e.o.MaxBackoff; attempt-- {
		d *= 2
	}
	return min(d, e.o.MaxBackoff)
}

// jitter adds up to a tenth, so that nodes that lost the same endpoint do not
// come back together.
func jitter(d time.Duration) time.Duration { return d + time.Duration(rand.Int64N(int64(d)/10+1)) }

// exhausted reports why nothing is sent; "" when something may be. mu is held.
func (e *Exporter) exhausted() string {
	if e.led.damaged != nil {
		return e.led.damaged.Error()
	}
	if e.led.Attempts >= e.o.MaxAttempts {
		return fmt.Sprintf("%d attempts to deliver record %d and those after it have failed: nothing is sent until an operator resumes delivery; the records stay in the log",
			e.led.Attempts, e.led.FirstSeq)
	}
	return ""
}

// gate waits until an attempt may be made: the backoff, or Resume. It is false
// when done was closed first.
func (e *Exporter) gate(done <-chan struct{}) bool {
	for {
		e.mu.Lock()
		why := e.exhausted()
		var wait time.Duration
		if e.led.NotUntil > 0 {
			// A clock that jumped must not make the wait longer than it ever is.
			wait = min(time.Until(time.Unix(0, e.led.NotUntil)), e.o.MaxBackoff+e.o.MaxBackoff/10)
		}
		ended := why != "" && e.status.State != Exhausted
		if ended {
			e.status.State, e.status.Exhausted, e.status.Attempts = Exhausted, why, e.led.Attempts
			e.o.Logger.Error("export is exhausted", "endpoint", e.endpoint, "why", why, "last_err", e.status.LastError)
		}
		e.mu.Unlock()
		if ended {
			e.o.OnExhausted(why)
		}
		if why == "" && wait <= 0 {
			return true
		}
		var due <-chan time.Time
		var timer *time.Timer
		if why == "" {
			timer = time.NewTimer(wait)
			due = timer.C
		}
		select {
		case <-done:
			return false
		case <-e.wake:
		case <-due:
			e.mu.Lock()
			e.led.NotUntil = 0 // waited out, whatever the clock says
			e.mu.Unlock()
		}
		if timer != nil {
			timer.Stop()
		}
	}
}

// begin counts an attempt before it is made, so that a process that dies in it
// has counted it. Only the first attempt after a success is not written down
// before: it is when it fails.
func (e *Exporter) begin(first uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.led.counted = !e.led.clean; e.led.counted {
		e.count(first)
	}
}

// count enters one more attempt; mu is held.
func (e *Exporter) count(first uint64) {
	if e.led.Attempts == 0 {
		e.led.FirstSeq = first
	}
	e.led.Attempts++
	e.led.NotUntil = time.Now().Add(jitter(e.backoff(e.led.Attempts))).UnixNano()
	e.status.Attempts = e.led.Attempts
	if err := e.save(); err != nil {
		e.o.Logger.Error("an attempt to deliver could not be counted on disk", "err", err)
		e.status.LastError = err.Error()
	}
}

// failedAttempt enters the failure of an attempt; wait is the server's wish.
func (e *Exporter) failedAttempt(first uint64, wait time.Duration, cause error) {
	e.failed.Inc()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.led.clean = false
	if !e.led.counted {
		e.count(first)
	}
	if wait = min(wait, e.o.MaxBackoff); wait > 0 {
		e.led.NotUntil = max(e.led.NotUntil, time.Now().Add(jitter(wait)).UnixNano())
	}
	if e.status.State != Retrying {
		e.o.Logger.Warn("export failed: will retry", "endpoint", e.endpoint, "first_seq", first, "attempts", e.led.Attempts, "err", cause)
	}
	e.status.State, e.status.LastError = Retrying, cause.Error()
}

// succeeded ends an attempt. The count ends with it only when the batch that
// failed first is among what was delivered: another one's success changes
// nothing for it.
func (e *Exporter) succeeded(c *chunk) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.led.counted {
		e.led.Attempts--
	}
	if e.led.Attempts == 0 || c.has(e.led.FirstSeq) {
		e.led.FirstSeq, e.led.Attempts = 0, 0
	}
	e.led.NotUntil, e.led.clean = 0, true
	e.status.State, e.status.Attempts, e.status.LastError, e.status.LastOK = Delivering, e.led.Attempts, "", time.Now().UTC()
	if err := e.save(); err != nil {
		e.o.Logger.Error("the end of an outage could not be noted on disk", "err", err)
		e.status.LastError = err.Error()
	}
}

// Resume is the operator's word that delivery is to go on: it forgets the
// attempts and sends at once. It is the only way out of Exhausted, besides
// another endpoint or a larger MaxAttempts at the next start. On error, which is
// that of writing StateFile, nothing has changed.
func (e *Exporter) Resume() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.led.state
	s.FirstSeq, s.Attempts, s.NotUntil, s.Resends = 0, 0, 0, 0
	if e.o.StateFile != "" {
		if err := writeState(e.o.StateFile, s); err != nil {
			return fmt.Errorf("resume export: %w", err)
		}
	}
	e.led.state, e.led.saved, e.led.damaged = s, s, nil
	e.status.Attempts, e.status.Exhausted = 0, ""
	if e.status.State == Exhausted {
		e.status.State = Retrying
	}
	select {
	case e.wake <- struct{}{}:
	default:
	}
	return nil
}
