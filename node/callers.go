package node

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/metric"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/wal"
)

// loadCallers reads who may call and how much.
func (n *node) loadCallers() (err error) {
	n.auth, err = auth.Open(auth.Options{
		Tokens: n.cfg.Tokens, Callers: n.cfg.Callers, Anonymous: n.cfg.Anonymous == "loopback", Logger: n.log,
		TLS: auth.TLSFiles{Cert: n.cfg.TLSCert, Key: n.cfg.TLSKey, ClientCA: n.cfg.TLSClientCA, CRL: n.cfg.TLSCRL},
	})
	if err != nil {
		return run.Exit(run.Usage, err)
	}
	n.limits, err = auth.NewLimits(n.auth.Callers, filepath.Join(n.cfg.StateDir, "budget.json"), nil)
	if errors.Is(err, auth.ErrDamaged) {
		return run.Exit(run.Integrity, err)
	}
	return err
}

// callersInterval is how soon a changed file of callers holds: a revoked token
// or certificate is refused after it at the latest, or at once after SIGHUP.
const callersInterval = 2 * time.Second

// watchCallers follows the files of callers, and tells of refused credentials.
func (n *node) watchCallers(ctx context.Context) {
	tick := time.NewTicker(callersInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n.reloadCallers(false)
		if counts := n.refusals.due(time.Now()); counts != nil {
			n.note(wal.ClassLifecycle, event.CallerRefused, counts)
		}
	}
}

func (n *node) reloadCallers(force bool) {
	changed, problems := n.auth.Reload(force), n.auth.Problems()
	n.mu.Lock()
	same := slices.Equal(problems, n.callerProblems)
	n.callerProblems = problems
	n.mu.Unlock()
	if len(changed) == 0 && same {
		return
	}
	n.log.Info("callers reloaded", "files", changed, "problems", problems)
	n.note(wal.ClassLifecycle, event.CallersChanged, map[string]any{"files": changed, "problems": problems})
}

// refusals counts credentials that did not hold, for metrics and for a record
// now and then: a guesser must not fill the log.
type refusals struct {
	mu    sync.Mutex
	total map[string]uint64
	since map[string]uint64 // the last record
	noted time.Time
}

func (r *refusals) add(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.total == nil {
		r.total, r.since = map[string]uint64{}, map[string]uint64{}
	}
	r.total[what]++
	r.since[what]++
}

// due returns the counts since the last record when one is due, else nil.
func (r *refusals) due(now time.Time) map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.since) == 0 || now.Sub(r.noted) < time.Minute {
		return nil
	}
	counts := r.since
	r.since, r.noted = map[string]uint64{}, now
	return counts
}

func (r *refusals) count(what string) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.total[what]
}

func (n *node) writeCallerMetrics(b *metric.Buffer) {
	for _, what := range []string{"certificate", "token"} {
		b.Uint("autonomy_node_credentials_refused_total", fmt.Sprintf("credential=%q", what), n.refusals.count(what))
	}
	refused := n.limits.Refused()
	for _, limit := range []string{auth.LimitBudget, auth.LimitConcurrent, auth.LimitRate} {
		b.Uint("autonomy_node_calls_limited_total", fmt.Sprintf("limit=%q", limit), refused[limit])
	}
}
