package mcp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"github.com/spf13/pflag"

	"github.com/autonomyops/autonomy/internal/run"
)

// Stdio is "autonomy-node mcp": it speaks MCP on standard input and output, for
// clients that start their servers as programs, and passes everything on to a
// node that runs, as one client of it. It holds no policy, no log and no tools:
// a node of its own would be a second one on the same state. Who calls is
// whoever the node takes this process for: the user it runs as, on a socket.
func Stdio() run.Daemon {
	c := stdioConfig{url: "http://127.0.0.1:7777"}
	return run.Daemon{
		Name:      "autonomy-node mcp",
		Short:     "speak MCP on standard input and output, for the node that runs on this machine",
		EnvPrefix: "AUTONOMY_NODE_MCP_",
		Bind: func(fs *pflag.FlagSet) {
			fs.StringVar(&c.socket, "socket", "", "reach the node on the Unix socket `PATH`")
			fs.StringVar(&c.url, "url", c.url, "reach the node at `URL`, unless --socket is given")
			fs.StringVar(&c.tokenFile, "token-file", "", "send the token in `FILE` as bearer token")
		},
		Validate: c.validate,
		Run: func(ctx context.Context, log *slog.Logger, _ io.Writer) error {
			err := c.serve(ctx, &mcp.StdioTransport{MaxLineLength: maxLine}, log)
			if ctx.Err() != nil {
				return nil
			}
			return err
		},
	}
}

// maxLine bounds one message of the client, in bytes; the node's own bound is
// for the body that comes of it.
const maxLine = 16 << 20

// connectTimeout bounds the first exchange with the node.
const connectTimeout = 10 * time.Second

type stdioConfig struct {
	socket    string
	url       string
	tokenFile string

	client *http.Client // set by validate
}

func (c *stdioConfig) validate() error {
	tr := &http.Transport{}
	if c.socket != "" {
		c.url = "http://localhost"
		tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", c.socket)
		}
	}
	u, err := url.Parse(c.url)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
		return run.Exitf(run.Usage, "--url: want http://HOST:PORT or https://HOST:PORT, without a user")
	}
	c.url = strings.TrimSuffix(c.url, "/") + "/mcp"
	var rt http.RoundTripper = tr
	if c.tokenFile != "" {
		if c.socket == "" && u.Scheme == "http" && !run.Loopback(u.Host) {
			return run.Exitf(run.Usage, "--token-file: a token goes over https, to a socket, or to http on loopback, not to %s", c.url)
		}
		token, err := os.ReadFile(c.tokenFile)
		if err != nil {
			return run.Exit(run.Usage, fmt.Errorf("--token-file: %w", err))
		}
		rt = &bearer{"Bearer " + strings.TrimSpace(string(token)), tr}
	}
	c.client = &http.Client{Transport: rt, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return nil
}

type bearer struct {
	value string
	next  http.RoundTripper
}

func (b *bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", b.value)
	return b.next.RoundTrip(r)
}

// pipe is a client's session here, and ours with the node.
type pipe struct {
	server *mcp.Server
	node   *mcp.ClientSession
	log    *slog.Logger

	mu     sync.Mutex
	shown  map[string]bool
	tokens int
	wanted map[string]func(*mcp.ProgressNotificationParams) // by our token
}

// serve runs until the client closes its end, or ctx ends.
func (c *stdioConfig) serve(ctx context.Context, client mcp.Transport, log *slog.Logger) error {
	defer c.client.CloseIdleConnections()
	p := &pipe{log: log, shown: map[string]bool{}, wanted: map[string]func(*mcp.ProgressNotificationParams){}}
	changed := make(chan struct{}, 1)
	up := mcp.NewClient(&mcp.Implementation{Name: "autonomy-node mcp", Version: run.Version}, &mcp.ClientOptions{
		Capabilities:                &mcp.ClientCapabilities{},
		MultiRoundTrip:              &mcp.MultiRoundTripOptions{Disabled: true},
		ProgressNotificationHandler: p.progress,
		ToolListChangedHandler: func(context.Context, *mcp.ToolListChangedRequest) {
			select {
			case changed <- struct{}{}:
			default:
			}
		},
	})
	cctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var err error
	if p.node, err = up.Connect(cctx, &mcp.StreamableClientTransport{Endpoint: c.url, HTTPClient: c.client}, nil); err != nil {
		return run.Exit(run.Unreachable, fmt.Errorf("no node at %s: %w\nStart one, or say where it is with --socket PATH or --url URL", c.where(), err))
	}
	defer p.node.Close()
	p.server = newServer()
	if err := p.list(cctx); err != nil {
		return run.Exit(run.Unreachable, fmt.Errorf("list the node's tools: %w", err))
	}
	ctx, stop := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer stop()
	background.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			if err := p.list(ctx); err != nil && ctx.Err() == nil {
				log.Error("list the node's tools", "err", err)
			}
		}
	})
	if err := p.server.Run(ctx, client); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

func (c *stdioConfig) where() string {
	if c.socket != "" {
		return c.socket
	}
	return c.url
}

// list shows the client what the node shows us.
func (p *pipe) list(ctx context.Context) error {
	now := map[string]bool{}
	for t, err := range p.node.Tools(ctx, nil) {
		if err != nil {
			return err
		}
		now[t.Name] = true
		p.server.AddTool(t, p.call)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for name := range p.shown {
		if !now[name] {
			p.server.RemoveTools(name)
		}
	}
	p.shown = now
	return nil
}

// call passes a call on. Its cancellation is passed on by its context.
func (p *pipe) call(ctx context.Context, r *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
	params := &mcp.CallToolParams{Meta: mcp.Meta{}, Name: r.Params.Name, Arguments: r.Params.Arguments}
	for k, v := range r.Params.Meta {
		if strings.HasPrefix(k, MetaPrefix) || k == "traceparent" {
			params.Meta[k] = v // the rest is about the client's connection with us
		}
	}
	if token := r.Params.GetProgressToken(); token != nil {
		defer p.listen(ctx, r, params, token)()
	}
	res, err := p.node.CallTool(ctx, params)
	if err != nil {
		var refused *jsonrpc.Error
		if errors.As(err, &refused) {
			return nil, refused
		}
		return nil, &jsonrpc.Error{Code: jsonrpc.CodeInternalError, Message: "the node cannot be reached: " + err.Error()}
	}
	return res, nil
}

// listen passes progress on until stop.
func (p *pipe) listen(ctx context.Context, r *mcp.CallToolRequest, params *mcp.CallToolParams, token any) (stop func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tokens++
	ours := fmt.Sprint("p", p.tokens)
	params.SetProgressToken(ours)
	p.wanted[ours] = func(n *mcp.ProgressNotificationParams) {
		_ = r.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ // best effort: the result says how it ended
			ProgressToken: token, Progress: n.Progress, Total: n.Total, Message: n.Message})
	}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.wanted, ours)
	}
}

func (p *pipe) progress(_ context.Context, r *mcp.ProgressNotificationClientRequest) {
	token, _ := r.Params.ProgressToken.(string)
	p.mu.Lock()
	f := p.wanted[token]
	p.mu.Unlock()
	if f != nil {
		f(r.Params)
	}
}
