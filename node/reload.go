package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"reflect"
	"syscall"
	"time"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/node/call"
	"github.com/autonomyops/autonomy/node/export"
)

// tuning is what a reload may change beside the tools, read by calls through one
// pointer: a call sees all of the old values or all of the new.
type tuning struct {
	slow     time.Duration // a call that takes as long is slow; 0: none is
	logCalls int           // one call in so many is logged; 0: none
}

func (c *Config) tuning() *tuning { return &tuning{slow: c.SlowCall, logCalls: c.LogCalls} }

func (c *Config) gate(short func() bool) call.GateOptions {
	return call.GateOptions{MaxRunning: c.MaxInFlight, MaxWaiting: c.MaxQueue, MaxWait: c.QueueWait, Short: short}
}

// keepReloadable puts what a reload may change of next into c, and names the
// settings that differ and want a restart.
func (c *Config) keepReloadable(next *Config) (restart []string) {
	c.MaxInFlight, c.MaxQueue, c.QueueWait = next.MaxInFlight, next.MaxQueue, next.QueueWait
	c.SlowCall, c.LogCalls = next.SlowCall, next.LogCalls
	have, want := reflect.ValueOf(*c), reflect.ValueOf(*next)
	for i := range have.NumField() {
		if f := have.Type().Field(i); f.IsExported() && !reflect.DeepEqual(have.Field(i).Interface(), want.Field(i).Interface()) {
			restart = append(restart, f.Name)
		}
	}
	return restart
}

// reload reads the tools file and the configuration anew and puts both into
// force, or, when either has a fault, changes nothing and says what is wrong.
func (n *node) reload(ctx context.Context) error {
	n.reloading.Lock()
	defer n.reloading.Unlock()
	next := n.cfg
	var restart []string
	if n.cfg.again != nil {
		fresh, err := n.cfg.again()
		if err != nil {
			return fmt.Errorf("configuration: %w", err)
		}
		restart = next.keepReloadable(&fresh)
	}
	if err := n.restarts.Reset(); err != nil { // whoever changes the file, or says so, has looked at it
		n.log.Error("restarts of MCP servers not forgiven", "err", err)
	}
	registry, err := n.loadTools(ctx)
	if err != nil {
		return err
	}
	n.reloadCallers(true)
	n.pipeline.Gate().Set(next.gate(n.memory.short.Load))
	n.tuning.Store(next.tuning())
	n.retire(n.tools.Swap(registry))
	n.mcp.Refresh()
	n.log.Info("reloaded", "tools", len(registry.List()), "max_in_flight", next.MaxInFlight, "max_queue", next.MaxQueue)
	if len(restart) > 0 {
		n.log.Warn("settings have changed that only a restart puts into force", "settings", restart)
	}
	return nil
}

// watchFiles is the time between two looks at the files.
const watchFiles = time.Second

// reloads reloads at SIGHUP and when the tools file or the configuration file
// has changed. A file is taken when it has looked the same twice in a row, so
// that one that is being written is left alone; one with faults changes nothing
// and is tried again when it has changed once more. SIGHUP also resumes an
// export that is exhausted: the signal is an operator's act, a file is not.
func (n *node) reloads(ctx context.Context) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	tick := time.NewTicker(watchFiles)
	defer tick.Stop()
	files := []string{n.cfg.Tools, n.cfg.file}
	inForce, seen := n.files, n.files
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			now := look(files)
			settled := now == seen && now != inForce
			seen = now
			if !settled {
				continue
			}
			inForce = now
			n.reloadAndTell(ctx)
		case <-hup:
			inForce = look(files)
			seen = inForce
			n.reloadAndTell(ctx)
			n.resumeExport()
		}
	}
}

func (n *node) reloadAndTell(ctx context.Context) {
	run.Notify("RELOADING=1")
	if err := n.reload(ctx); err != nil {
		n.log.Error("reload refused: what was in force stays", "err", err)
	}
	run.Notify("READY=1")
}

func (n *node) resumeExport() {
	if n.exporter == nil || n.exporter.Status().State != export.Exhausted {
		return
	}
	if err := n.exporter.Resume(); err != nil {
		n.log.Error("export not resumed", "err", err)
		return
	}
	n.log.Info("export resumed")
}

// looks is how files look: enough to see that one was replaced or written to.
type looks [2]struct {
	dev, ino  uint64
	size, mod int64
	missing   bool
}

func look(files []string) (l looks) {
	for i, name := range files {
		if name == "" {
			continue
		}
		info, err := os.Stat(name)
		if err != nil {
			l[i].missing = errors.Is(err, os.ErrNotExist)
			continue
		}
		l[i].size, l[i].mod = info.Size(), info.ModTime().UnixNano()
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			l[i].dev, l[i].ino = st.Dev, st.Ino
		}
	}
	return l
}
