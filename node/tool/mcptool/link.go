package mcptool

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

// link is one live connection to a server: a process, or an HTTP session.
type link struct {
	session *mcp.ClientSession
	began   time.Time
	end     func() // ends what is behind the session; waits for it

	dead      chan struct{} // closed when the session has ended
	stopping  atomic.Bool
	closeOnce sync.Once

	stale   atomic.Bool   // the server says that its tools changed
	listing chan struct{} // held while the list is read

	mu     sync.Mutex
	defs   map[string]Definition
	listed time.Time
	tokens int
	wanted map[string]chan executor.Progress // by progress token
}

// start connects and lists. On error nothing is left behind.
func (s *Server) start(ctx context.Context) (*link, error) {
	l := &link{began: time.Now(), dead: make(chan struct{}), listing: make(chan struct{}, 1), wanted: map[string]chan executor.Progress{}}
	client := mcp.NewClient(&mcp.Implementation{Name: "autonomy-node", Version: run.Version}, &mcp.ClientOptions{
		Capabilities:                &mcp.ClientCapabilities{}, // nobody is here who could be asked
		MultiRoundTrip:              &mcp.MultiRoundTripOptions{Disabled: true},
		ToolListChangedHandler:      func(context.Context, *mcp.ToolListChangedRequest) { l.stale.Store(true) },
		ProgressNotificationHandler: l.progress,
	})
	client.AddSendingMiddleware(neverCached)
	transport, end, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	l.end = end
	l.session, err = client.Connect(ctx, transport, &mcp.ClientSessionOptions{ProtocolVersion: s.cfg.Protocol})
	if err != nil {
		end()
		return nil, fmt.Errorf("connect: %w", explain(ctx, err))
	}
	go func() {
		_ = l.session.Wait() // watch reports it
		close(l.dead)
	}()
	if _, err := l.list(ctx); err != nil {
		l.close()
		return nil, fmt.Errorf("list its tools: %w", explain(ctx, err))
	}
	return l, nil
}

// explain names the cause that a person can act on.
func explain(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return errors.New("no answer within start_timeout")
	}
	return err
}

// connect begins what is behind a session.
func (s *Server) connect(ctx context.Context) (mcp.Transport, func(), error) {
	if s.cfg.Remote == nil {
		p, err := s.spawn()
		if err != nil {
			return nil, nil, err
		}
		return p.transport(), p.end, nil
	}
	rt := &remote{next: s.cfg.Remote.Transport(), header: s.cfg.Header}
	c := &http.Client{Transport: rt, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return &mcp.StreamableClientTransport{Endpoint: s.cfg.Remote.URL(), HTTPClient: c, MaxRetries: 1, MaxEventSize: MaxMessage}, c.CloseIdleConnections, nil
}

// neverCached takes the time to live off a list: an upstream must not say how
// long its definitions go unchecked.
func neverCached(next mcp.MethodHandler) mcp.MethodHandler {
	return func(ctx context.Context, method string, r mcp.Request) (mcp.Result, error) {
		res, err := next(ctx, method, r)
		if list, ok := res.(*mcp.ListToolsResult); ok && list != nil {
			list.TTLMs = 0
		}
		return res, err
	}
}

func (l *link) ended() bool {
	select {
	case <-l.dead:
		return true
	default:
		return l.stopping.Load()
	}
}

// survives tells an answer that could not be read from a link that broke over
// it: the SDK gives both as the same kind of error, and ends a broken link at once.
func (l *link) survives() bool {
	select {
	case <-l.dead:
		return false
	case <-time.After(goodbye):
		return true
	}
}

func (l *link) closing() bool { return l.stopping.Load() }

// close ends the link and waits for that.
func (l *link) close() {
	l.closeOnce.Do(func() {
		l.stopping.Store(true)
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			_ = l.session.Close() // what is behind it is ended below
		}()
		select { // a session that is in order says goodbye first
		case <-closed:
		case <-time.After(goodbye):
		}
		l.end()
		<-l.dead
		<-closed
	})
}

// goodbye is how long a server gets to take note of the end, and a broken link
// to end.
const goodbye = 500 * time.Millisecond

// definitions are those of the last list.
func (l *link) definitions() map[string]Definition {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.defs
}

// current are the definitions, read again if they may be out of date.
func (l *link) current(ctx context.Context) (map[string]Definition, error) {
	l.mu.Lock()
	defs, age := l.defs, time.Since(l.listed)
	l.mu.Unlock()
	if !l.stale.Load() && age < Relist {
		return defs, nil
	}
	select {
	case l.listing <- struct{}{}:
		defer func() { <-l.listing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	l.mu.Lock()
	defs, age = l.defs, time.Since(l.listed)
	l.mu.Unlock()
	if !l.stale.Load() && age < Relist {
		return defs, nil // another call has read it meanwhile
	}
	return l.list(ctx)
}

// list reads the server's tools.
func (l *link) list(ctx context.Context) (map[string]Definition, error) {
	l.stale.Store(false) // what changes from here on is told again
	defs := map[string]Definition{}
	params := &mcp.ListToolsParams{}
	for page := 0; ; page++ {
		if page == maxPages {
			return nil, fmt.Errorf("the list has more than %d pages", maxPages)
		}
		res, err := l.session.ListTools(ctx, params)
		if err != nil {
			l.stale.Store(true)
			return nil, err
		}
		for _, t := range res.Tools {
			d, err := define(t)
			if err != nil {
				return nil, err
			}
			if _, twice := defs[d.Name]; twice {
				return nil, fmt.Errorf("tool %q is listed twice", clip(d.Name))
			}
			if len(defs) == MaxTools {
				return nil, fmt.Errorf("more than %d tools", MaxTools)
			}
			defs[d.Name] = d
		}
		if res.NextCursor == "" {
			break
		}
		params = &mcp.ListToolsParams{Cursor: res.NextCursor}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.defs, l.listed = defs, time.Now()
	return defs, nil
}

// call sends tools/call and waits for its answer. When ctx ends the SDK sends
// notifications/cancelled, or closes the request's stream.
func (l *link) call(ctx context.Context, name string, r *executor.Request) (*mcp.CallToolResult, error) {
	params := &mcp.CallToolParams{Name: name, Arguments: raw(r.Params)}
	if r.Traceparent != "" {
		params.Meta = mcp.Meta{"traceparent": r.Traceparent}
	}
	if r.Progress != nil {
		defer l.listen(ctx, params, r.Progress)()
	}
	return l.session.CallTool(ctx, params)
}

// progressQueue is how many reports may wait for a slow listener; more are
// dropped. It must not hold up the link, which other calls share.
const progressQueue = 16

// listen passes on the reports for params' call until stop is called; stop
// waits until those that came have been taken.
func (l *link) listen(ctx context.Context, params *mcp.CallToolParams, to func(executor.Progress)) (stop func()) {
	queue, done := make(chan executor.Progress, progressQueue), make(chan struct{})
	l.mu.Lock()
	l.tokens++
	token := "call-" + strconv.Itoa(l.tokens)
	l.wanted[token] = queue
	l.mu.Unlock()
	params.SetProgressToken(token)
	go func() {
		defer close(done)
		for p := range queue {
			if ctx.Err() == nil {
				to(p)
			}
		}
	}()
	return func() {
		l.mu.Lock()
		delete(l.wanted, token)
		close(queue)
		l.mu.Unlock()
		<-done
	}
}

// progress takes one report off the link.
func (l *link) progress(_ context.Context, r *mcp.ProgressNotificationClientRequest) {
	token, ok := r.Params.ProgressToken.(string)
	if !ok {
		return
	}
	message := strings.ToValidUTF8(r.Params.Message, "\uFFFD")
	if len(message) > executor.MaxProgressMessage {
		message = strings.ToValidUTF8(message[:executor.MaxProgressMessage], "")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.wanted[token] <- executor.Progress{Done: r.Params.Progress, Total: r.Params.Total, Message: message}:
	default: // nobody waits, or too slowly
	}
}
