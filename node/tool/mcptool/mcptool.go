// Package mcptool runs the tools of upstream MCP servers: tool.mcp.<server>.<name>.
// The Go SDK speaks the protocol; this package starts and watches the servers,
// pins what they define, and bounds what they say.
//
// An upstream is either a program, spoken to over its standard input and output
// (argv: no shell, no environment but the declared one, a process group of its
// own, killed with it), or a URL, dialled by httptool's rules: one host, no
// address inside unless allow_private lists it, no redirects.
//
// Life of a server: Open starts it and lists its tools once. Each definition
// (name, title, description, schemas, annotations) is hashed over its RFC 8785
// form, and that digest is what the operator has accepted by loading the file.
// The list is read again whenever the server says that it changed, after each
// restart, and before a call when it is older than Relist. A tool whose
// definition is no longer the accepted one is refused with definition_changed,
// until the file is loaded again.
//
// Life of a call: take one of the server's places (MaxCalls) → the link with
// the fewest running calls, started again if it died → the definition is still
// the accepted one → tools/call, with the evaluated params, progress passed on,
// and notifications/cancelled when the context ends → the answer is checked.
//
// A link that dies is started again at the next call that needs it, at most
// MaxRestarts times with a pause that doubles; the count is on disk (Ledger),
// and a run of Steady forgives it. After that the server stays down until an
// operator reloads the tools (INV-12).
//
// Nothing an upstream says is trusted: a message is at most MaxMessage bytes,
// a definition MaxDefinition, a list MaxTools; what is no JSON-RPC ends the
// link; output is valid UTF-8 of known content types within OutputMax; standard
// error goes to the log, in bounded lines at a bounded rate.
//
// The output is {"content":[…],"structured_content":…,"truncated":…}, content in
// the protocol's own form. An answer with isError is the error tool_error.
//
// Units: bytes, time.Duration. A Server and its Tools are safe for concurrent
// use. Only node/tool imports this package.
package mcptool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/node/tool/executor"
	"github.com/autonomyops/autonomy/node/tool/httptool"
)

// Codes of results.
const (
	CodeChanged   = "definition_changed"   // denied: the upstream defines the tool otherwise than when it was accepted
	CodeEgress    = "egress_denied"        // denied: policy's egress list does not hold the upstream's host
	CodeTool      = "tool_error"           // error: the tool answered with isError
	CodeUpstream  = "upstream_error"       // error: the server answered with an error of the protocol
	CodeLost      = "upstream_lost"        // error: the link ended during the call
	CodeDown      = "upstream_down"        // error: the server does not run, and was not started again for this call
	CodeExhausted = "upstream_exhausted"   // error: restarts are used up, an operator must act
	CodeContent   = "content_refused"      // error: an answer that is not passed on
	CodeInput     = "upstream_wants_input" // error: the server asks its client for something; nobody is there
)

// Limits, where Config says nothing or there is no choice.
const (
	DefaultOutputMax    = 256 << 10 // bytes of an answer's content
	DefaultMaxCalls     = 32        // calls at one time, of one server
	DefaultProcesses    = 1
	MaxProcesses        = 16
	DefaultStartTimeout = 10 * time.Second // from start to the list of tools
	MaxStartTimeout     = 2 * time.Minute
	DefaultMaxRestarts  = 8
	MaxMaxRestarts      = 1000
	MaxMessage          = 4 << 20  // one message of an upstream
	MaxDefinition       = 64 << 10 // one tool's definition, as JSON
	MaxTools            = 512      // one server's
	maxPages            = 64       // of one list
	maxText             = 512      // of an upstream's words in a Message
)

// Times.
const (
	Relist     = time.Minute            // a list older than this is read again before a call
	Steady     = 10 * time.Minute       // a link that lived this long has no restarts on its account
	minBackoff = 250 * time.Millisecond // before the first restart
	maxBackoff = 30 * time.Second
)

// Config is one server of tools.yaml.
type Config struct {
	Name string // the <server> of its kinds

	Argv      []string // a program: argv[0] is an absolute path; or
	Env       []string // "NAME": the node's value, if it has one; "NAME=value". Nothing else is passed
	Dir       string   // working directory, absolute; "": /
	Processes int      // how many run side by side; 0: DefaultProcesses

	Remote *httptool.Guard // a server at a URL
	Header map[string]string

	Protocol     string        // revision to speak; "": the newest that both know
	MaxCalls     int           // 0: DefaultMaxCalls
	MaxRestarts  int           // 0: DefaultMaxRestarts
	StartTimeout time.Duration // 0: DefaultStartTimeout
	OutputMax    int64         // 0: DefaultOutputMax

	Ledger *Ledger      // nil: restarts are counted in memory
	Logger *slog.Logger // required
}

func (c *Config) complete() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	bound := func(name string, v *int, def, most int) {
		if *v == 0 {
			*v = def
		}
		if *v < 1 || *v > most {
			fault("%s is %d, want 1 to %d", name, *v, most)
		}
	}
	bound("processes", &c.Processes, DefaultProcesses, MaxProcesses)
	bound("max_calls", &c.MaxCalls, DefaultMaxCalls, 1024)
	bound("max_restarts", &c.MaxRestarts, DefaultMaxRestarts, MaxMaxRestarts)
	if c.StartTimeout == 0 {
		c.StartTimeout = DefaultStartTimeout
	}
	if c.StartTimeout > MaxStartTimeout {
		fault("start_timeout is %s, want at most %s", c.StartTimeout, MaxStartTimeout)
	}
	if c.OutputMax == 0 {
		c.OutputMax = DefaultOutputMax
	}
	if c.OutputMax < 0 || c.OutputMax > executor.MaxContent {
		fault("output_max is %d, want 1 to %d", c.OutputMax, executor.MaxContent)
	}
	if (len(c.Argv) == 0) == (c.Remote == nil) {
		fault("want either argv (a program) or url")
	}
	if c.Remote != nil && (len(c.Env) > 0 || c.Dir != "" || c.Processes != DefaultProcesses) {
		fault("env, dir and processes are for a program, not for a url")
	}
	if c.Protocol != "" && !slices.Contains(mcp.SupportedProtocolVersions(), c.Protocol) {
		fault("protocol %q: want one of %s", c.Protocol, strings.Join(mcp.SupportedProtocolVersions(), ", "))
	}
	if len(c.Argv) > 0 {
		if err := checkProgram(c); err != nil {
			faults = append(faults, err)
		}
	}
	return errors.Join(faults...)
}

// Server is one upstream.
type Server struct {
	cfg    Config
	defs   map[string]Definition // as accepted, by the upstream's name
	calls  chan struct{}         // one token per running call
	ctx    context.Context       // ends at Close
	cancel context.CancelFunc
	links  sync.WaitGroup // what runs in the background

	mu       sync.Mutex
	slots    []*slot
	restarts int       // on account; the Ledger has the same
	next     time.Time // no restart before
	retired  bool
	told     map[string]string // tool → digest that the log has named as changed
}

// slot is a place for one link.
type slot struct {
	running  int           // calls; under Server.mu
	link     *link         // nil: none yet; may be dead; under Server.mu
	starting chan struct{} // closed when the start that is under way has ended; under Server.mu
	err      error         // of the last start; under Server.mu
}

// Open starts a server and lists its tools. The caller closes it.
func Open(ctx context.Context, cfg Config) (*Server, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, calls: make(chan struct{}, cfg.MaxCalls), told: map[string]string{}, restarts: cfg.Ledger.count(cfg.Name)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	for range cfg.Processes {
		s.slots = append(s.slots, &slot{})
	}
	sctx, cancel := context.WithTimeout(ctx, cfg.StartTimeout)
	defer cancel()
	l, err := s.start(sctx)
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("start MCP server %s: %w", cfg.Name, err)
	}
	s.mu.Lock()
	s.slots[0].link, s.defs = l, l.definitions()
	s.mu.Unlock()
	s.watch(l)
	return s, nil
}

// Definitions are the tools that the server had when it was opened, by name.
func (s *Server) Definitions() []Definition {
	return slices.SortedFunc(maps.Values(s.defs), func(a, b Definition) int { return strings.Compare(a.Name, b.Name) })
}

// Tool is the executor for one of the Definitions.
func (s *Server) Tool(name string) *Tool { return &Tool{s, name} }

// Status is how a server is now.
type Status struct {
	Server   string   `json:"server"`
	Links    int      `json:"links"`             // processes or sessions that live
	Calls    int      `json:"calls"`             // running
	Restarts int      `json:"restarts"`          // on account
	Limit    int      `json:"max_restarts"`      // at it, the server stays down
	Changed  []string `json:"changed,omitempty"` // the upstream's names of tools that were refused for another definition
}

// Status reports.
func (s *Server) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{Server: s.cfg.Name, Restarts: s.restarts, Limit: s.cfg.MaxRestarts, Changed: slices.Sorted(maps.Keys(s.told))}
	for _, sl := range s.slots {
		st.Calls += sl.running
		if sl.link != nil && !sl.link.ended() {
			st.Links++
		}
	}
	return st
}

// Retire closes each link as soon as no call runs on it: another registry has
// taken over. A call that comes late still gets one.
func (s *Server) Retire() {
	s.mu.Lock()
	s.retired = true
	var idle []*link
	for _, sl := range s.slots {
		if sl.running == 0 && sl.link != nil {
			idle, sl.link = append(idle, sl.link), nil
		}
	}
	s.mu.Unlock()
	for _, l := range idle {
		s.links.Go(l.close)
	}
}

// Close ends the server's processes and waits for that. Calls must have ended.
func (s *Server) Close() {
	s.mu.Lock()
	var open []*link
	for _, sl := range s.slots {
		if sl.link != nil {
			open, sl.link = append(open, sl.link), nil
		}
	}
	s.mu.Unlock()
	s.cancel()
	for _, l := range open {
		s.links.Go(l.close)
	}
	s.links.Wait()
}

// errDown is why there is no link; it is a Result's code and message.
type errDown struct{ code, message string }

func (e *errDown) Error() string { return e.message }

// take gives the slot with the fewest running calls.
func (s *Server) take() *slot {
	s.mu.Lock()
	defer s.mu.Unlock()
	best := s.slots[0]
	for _, sl := range s.slots[1:] {
		if sl.running < best.running {
			best = sl
		}
	}
	best.running++
	return best
}

func (s *Server) give(sl *slot) {
	s.mu.Lock()
	sl.running--
	var idle *link
	if s.retired && sl.running == 0 {
		idle, sl.link = sl.link, nil
	}
	s.mu.Unlock()
	if idle != nil {
		s.links.Go(idle.close)
	}
}

// up gives the slot's link, starting one if there is none that lives. A start
// goes on when the caller that asked for it leaves: others wait for it too.
func (s *Server) up(ctx context.Context, sl *slot) (*link, error) {
	s.mu.Lock()
	if sl.link != nil && !sl.link.ended() {
		defer s.mu.Unlock()
		return sl.link, nil
	}
	if sl.starting == nil {
		if err := s.mayStart(sl); err != nil {
			s.mu.Unlock()
			return nil, err
		}
		sl.starting = make(chan struct{})
		s.links.Go(func() { s.restart(sl) })
	}
	starting := sl.starting
	s.mu.Unlock()
	select {
	case <-starting:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if sl.link != nil && !sl.link.ended() {
		return sl.link, nil
	}
	why := "it ended as soon as it was started"
	if sl.err != nil {
		why = clip(sl.err.Error())
	}
	return nil, &errDown{CodeDown, "the MCP server " + s.cfg.Name + " does not run: " + why}
}

// mayStart counts a restart, on disk before it happens. The first start of a
// slot, and one after Retire, is none. s.mu is held.
func (s *Server) mayStart(sl *slot) error {
	if s.ctx.Err() != nil {
		return &errDown{CodeDown, "the MCP server " + s.cfg.Name + " was closed"}
	}
	if sl.link == nil && sl.err == nil {
		return nil
	}
	if s.restarts >= s.cfg.MaxRestarts {
		return &errDown{CodeExhausted, fmt.Sprintf("the MCP server %s ended %d times and is not started again: see the node's log, mend it, and reload the tools with SIGHUP", s.cfg.Name, s.restarts)}
	}
	if wait := time.Until(s.next); wait > 0 {
		return &errDown{CodeDown, fmt.Sprintf("the MCP server %s does not run; it is started again in %s", s.cfg.Name, wait.Round(time.Millisecond))}
	}
	n := s.restarts + 1
	if err := s.cfg.Ledger.set(s.cfg.Name, n); err != nil {
		return &errDown{CodeDown, "the restart of the MCP server " + s.cfg.Name + " cannot be counted: " + err.Error()}
	}
	s.restarts = n
	s.next = time.Now().Add(backoff(n))
	return nil
}

func backoff(n int) time.Duration {
	return min(maxBackoff, minBackoff<<min(n-1, 10))
}

// restart fills a slot.
func (s *Server) restart(sl *slot) {
	ctx, cancel := context.WithTimeout(s.ctx, s.cfg.StartTimeout)
	defer cancel()
	l, err := s.start(ctx)
	s.mu.Lock()
	sl.link, sl.err = l, err
	close(sl.starting)
	sl.starting = nil
	closed := s.ctx.Err() != nil
	if closed {
		sl.link = nil
	}
	n := s.restarts
	s.mu.Unlock()
	switch {
	case err != nil:
		s.cfg.Logger.Error("MCP server does not start", "server", s.cfg.Name, "restarts", n, "of", s.cfg.MaxRestarts, "err", clip(err.Error()))
	case closed:
		l.close()
	default:
		s.cfg.Logger.Info("MCP server started", "server", s.cfg.Name, "restarts", n)
		s.watch(l)
	}
}

// watch waits for a link's end.
func (s *Server) watch(l *link) {
	s.links.Go(func() {
		err := l.session.Wait()
		planned := l.closing()
		l.close()
		if planned {
			return
		}
		s.mu.Lock()
		lived := time.Since(l.began)
		if lived >= Steady && s.restarts > 0 {
			s.restarts = 0
			if lerr := s.cfg.Ledger.set(s.cfg.Name, 0); lerr != nil {
				s.cfg.Logger.Error("MCP server's restarts not forgiven on disk", "server", s.cfg.Name, "err", lerr)
			}
		}
		s.next = time.Now().Add(backoff(s.restarts + 1))
		s.mu.Unlock()
		why := "it closed the connection"
		if err != nil {
			why = clip(err.Error())
		}
		s.cfg.Logger.Error("MCP server ended", "server", s.cfg.Name, "after", lived.Round(time.Millisecond), "why", why)
	})
}

// accepted says whether the link still defines name as it was accepted.
func (s *Server) accepted(ctx context.Context, l *link, name string) (bool, error) {
	defs, err := l.current(ctx)
	if err != nil {
		return false, err
	}
	is, want := defs[name].Digest, s.defs[name].Digest
	if is == want {
		return true, nil
	}
	s.mu.Lock()
	known := s.told[name] == is
	s.told[name] = is
	s.mu.Unlock()
	if !known {
		if is == "" {
			is = "gone"
		}
		s.cfg.Logger.Error("MCP server changed a tool's definition: refused until the tools are reloaded", "server", s.cfg.Name, "tool", clip(name), "accepted", want, "is", is)
	}
	return false, nil
}

// Tool is the executor of one upstream tool.
type Tool struct {
	server *Server
	name   string // the upstream's
}

// Unenforceable names the limits that this package cannot keep: a server is
// shared by calls, so nothing that holds for its process holds for one of them.
func (t *Tool) Unenforceable(c constraint.Constraints) string {
	var names []string
	for _, l := range []struct {
		name string
		set  bool
	}{{"memory_max", c.MemoryMax != 0}, {"cpu_max", c.CPUMax != ""}, {"pids_max", c.PidsMax != 0 && t.server.cfg.Remote == nil},
		{"egress", c.Egress != nil && t.server.cfg.Remote == nil}, {"fs", c.FS != nil}, {"env", c.Env != nil && t.server.cfg.Remote == nil}} {
		if l.set {
			names = append(names, l.name)
		}
	}
	return strings.Join(names, ", ")
}

// Execute calls the tool.
func (t *Tool) Execute(ctx context.Context, r *executor.Request) executor.Result {
	s := t.server
	if s.cfg.Remote != nil && r.Constraints.Egress != nil {
		ok, err := s.cfg.Remote.Within(r.Constraints.Egress)
		if err != nil {
			return executor.Deny("constraint_refused", err.Error())
		}
		if !ok {
			return executor.Deny(CodeEgress, "the host of the MCP server "+s.cfg.Name+" is not in the egress list of the policy")
		}
	}
	select {
	case s.calls <- struct{}{}:
		defer func() { <-s.calls }()
	case <-ctx.Done():
		return executor.Stopped(ctx)
	}
	sl := s.take()
	defer s.give(sl)
	l, err := s.up(ctx, sl)
	if err != nil {
		return unreachable(ctx, err)
	}
	ok, err := s.accepted(ctx, l, t.name)
	if err != nil {
		return unreachable(ctx, err)
	}
	if !ok {
		return executor.Deny(CodeChanged, fmt.Sprintf("the MCP server %s defines this tool otherwise than when it was accepted: an operator must look at it and reload the tools", s.cfg.Name))
	}
	res, err := l.call(ctx, t.name, r)
	if err != nil {
		return t.failed(ctx, l, err)
	}
	limit := s.cfg.OutputMax
	if n := r.Constraints.OutputMaxBytes; n > 0 {
		limit = min(limit, n)
	}
	return output(res, limit)
}

func unreachable(ctx context.Context, err error) executor.Result {
	var down *errDown
	switch {
	case ctx.Err() != nil:
		return executor.Stopped(ctx)
	case errors.As(err, &down):
		return executor.Fail(down.code, down.message)
	}
	return executor.Fail(CodeDown, "the MCP server does not say which tools it has: "+clip(err.Error()))
}

// failed sorts the error of a call into a Result.
func (t *Tool) failed(ctx context.Context, l *link, err error) executor.Result {
	var refused *jsonrpc.Error
	switch {
	case ctx.Err() != nil:
		return executor.Stopped(ctx)
	case l.ended() || errors.Is(err, mcp.ErrConnectionClosed) || errors.Is(err, io.EOF):
	case !errors.As(err, &refused) && l.survives():
		return executor.Fail(CodeContent, "the tool's answer cannot be read: "+clip(err.Error()))
	case refused != nil:
		return executor.Fail(CodeUpstream, fmt.Sprintf("the MCP server answered with error %d: %s", refused.Code, clip(refused.Message)))
	}
	return executor.Fail(CodeLost, "the MCP server "+t.server.cfg.Name+" was lost during the call, whose effect is not known: "+clip(err.Error()))
}

// clip bounds an upstream's words, on one line of valid UTF-8.
func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText] + "…"
	}
	s = strings.ToValidUTF8(s, "\uFFFD")
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}

// raw keeps params as the bytes that were evaluated.
func raw(params []byte) json.RawMessage { return json.RawMessage(params) }
