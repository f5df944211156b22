package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/strictjson"
)

// Limits of call.
const (
	maxCallParams = 4 << 20 // bytes of params read from a file or standard input
	maxCallAnswer = 4 << 20 // bytes of the node's answer
	callDial      = 5 * time.Second
	callGrace     = 10 * time.Second // how long past --timeout an answer is waited for
)

// callOptions are the flags of call.
type callOptions struct {
	node, session, callID string
	timeout               time.Duration
	dryRun                bool
	output                *string
}

func newCall() *cobra.Command {
	var o callOptions
	c := &cobra.Command{
		Use:   "call KIND [PARAMS]",
		Short: "Ask a node to run a tool, as an agent would",
		Long: `Ask a node to run a tool, as an agent would: the call is judged by policy,
recorded, run and recorded again.

PARAMS is a JSON object, @FILE to read one, or - for standard input; without it
the params are {}. Their bytes reach the node as they are.

Exit code 0: allowed, and the tool succeeded. 1: denied, or the tool failed; the
text says by whom and why. 2: the call cannot be made like this. 5: no node.`,
		Example: `  autonomy call tool.echo '{"text": "hello"}'
  autonomy call tool.exec.word_count '{"text": "one two three"}'
  autonomy call tool.http_get @params.json --node unix:/run/autonomy/node/node.sock
  autonomy call tool.shell '{"command": "id"}' --dry-run`,
		Args: usageArgs(cobra.RangeArgs(1, 2)),
		RunE: func(c *cobra.Command, args []string) error {
			params := "{}"
			if len(args) == 2 {
				params = args[1]
			}
			body, err := callBody(c.InOrStdin(), args[0], params, &o)
			if err != nil {
				return err
			}
			return call(c.Context(), c.OutOrStdout(), args[0], body, &o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.node, "node", "http://127.0.0.1:7777", "where the node listens: `URL` or unix:PATH")
	f.StringVar(&o.session, "session", "", "session the call belongs to")
	f.StringVar(&o.callID, "call-id", "", "idempotency key: the same key and params give the first result again")
	f.DurationVar(&o.timeout, "timeout", 0, "stop the tool after this time (default: the tool's own limit)")
	f.BoolVar(&o.dryRun, "dry-run", false, "evaluate and record, run nothing")
	o.output = outputFlag(c)
	return c
}

// callBody writes the request. The params are put in as the bytes they are.
func callBody(stdin io.Reader, kind, params string, o *callOptions) ([]byte, error) {
	raw := []byte(params)
	var err error
	switch name, isFile := strings.CutPrefix(params, "@"); {
	case params == "-":
		raw, err = readParams(stdin)
	case isFile:
		var f *os.File
		if f, err = os.Open(name); err == nil {
			raw, err = readParams(f)
			err = errors.Join(err, f.Close())
		}
	}
	if err != nil {
		return nil, run.Exitf(run.Usage, "params: %w", err)
	}
	if err := strictjson.CheckObject(raw); err != nil {
		return nil, run.Exitf(run.Usage, "params: %w\nWant a JSON object, as in '{\"text\": \"hello\"}'", err)
	}
	if o.timeout < 0 || o.timeout > 0 && o.timeout < time.Millisecond {
		return nil, run.Exitf(run.Usage, "--timeout is %s, want at least 1ms", o.timeout)
	}
	rest, err := json.Marshal(struct {
		Session   string `json:"session,omitempty"`
		CallID    string `json:"call_id,omitempty"`
		TimeoutMS int64  `json:"timeout_ms,omitempty"`
		DryRun    bool   `json:"dry_run,omitempty"`
	}{o.session, o.callID, o.timeout.Milliseconds(), o.dryRun})
	if err != nil {
		return nil, err
	}
	name, err := json.Marshal(kind)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"kind":%s,"params":%s`, name, raw)
	if len(rest) > len("{}") {
		b.WriteByte(',')
		b.Write(rest[1 : len(rest)-1])
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

func readParams(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxCallParams+1))
	if err == nil && len(b) > maxCallParams {
		err = fmt.Errorf("over %d bytes", maxCallParams)
	}
	return b, err
}

// callAnswer is the body of POST /v1/tool. The node may add fields.
type callAnswer struct {
	Decision string `json:"decision"`
	Layer    string `json:"layer"`
	Code     string `json:"code"`
	Reason   string `json:"reason"`
	Reasons  []struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	} `json:"reasons"`
	AuditID    string          `json:"audit_id"`
	PolicyRef  string          `json:"policy_ref"`
	ApprovalID string          `json:"approval_id"`
	ExpiresAt  string          `json:"expires_at"`
	DryRun     bool            `json:"dry_run"`
	Outcome    string          `json:"outcome"`
	Output     json.RawMessage `json:"output"`
	Error      *struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	} `json:"error"`
}

// call sends body and prints the answer.
func call(ctx context.Context, w io.Writer, kind string, body []byte, o *callOptions) error {
	client, base, err := callClient(ctx, o.node)
	if err != nil {
		return err
	}
	if o.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.timeout+callGrace)
		defer cancel()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/v1/tool", bytes.NewReader(body))
	if err != nil {
		return run.Exitf(run.Usage, "--node is %q: %w", o.node, err)
	}
	req.Header.Set("Content-Type", "application/json")
	if err := identityOf(ctx).authorize(req); err != nil {
		return err
	}
	start := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return run.Exitf(run.Unreachable, "cannot reach the node: %w\nIs it running? --node says where it listens", err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxCallAnswer+1))
	took := time.Since(start)
	if err != nil {
		return run.Exitf(run.Unreachable, "the node's answer broke off: %w\nThe tool may have run: the node's log tells", err)
	}
	if len(data) > maxCallAnswer {
		return run.Exitf(run.Failure, "the node's answer is over %d bytes", maxCallAnswer)
	}
	var a callAnswer
	if err := json.Unmarshal(data, &a); err != nil || a.Decision == "" {
		return run.Exitf(run.Failure, "the answer (%s) carries no decision: is %s a node?", resp.Status, o.node)
	}
	if *o.output == "json" {
		var b bytes.Buffer
		if err := json.Indent(&b, bytes.TrimSpace(data), "", "  "); err != nil {
			return run.Exitf(run.Failure, "the answer is no JSON: %w", err)
		}
		fmt.Fprintln(w, b.String())
	} else {
		a.print(w, kind, took, resp)
	}
	if resp.StatusCode == http.StatusOK && a.Decision == "allow" && (a.Outcome == "ok" || a.DryRun && a.Outcome == "") {
		return nil
	}
	return run.Exit(run.Failure, errSilent)
}

// callClient makes a client for a node. It uses no proxy and follows no
// redirect: a call goes to the node that was named, or nowhere.
func callClient(ctx context.Context, node string) (*http.Client, string, error) {
	d := net.Dialer{Timeout: callDial}
	tr := &http.Transport{DisableKeepAlives: true, DialContext: d.DialContext, TLSClientConfig: identityOf(ctx).tls.Clone()}
	base := strings.TrimSuffix(node, "/")
	if socket, ok := strings.CutPrefix(node, "unix:"); ok {
		base = "http://localhost"
		tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) }
	} else if u, err := url.Parse(node); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Path != "" && u.Path != "/" || u.User != nil {
		return nil, "", run.Exitf(run.Usage, "--node is %q, want http://HOST:PORT or unix:PATH", node)
	}
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, base, nil
}

// layers say who denied, for a person.
var layers = map[string]string{
	"request":   "the request is not one the node accepts",
	"policy":    "refused by policy",
	"runtime":   "policy allowed it, enforcement refused it",
	"audit":     "the node cannot record it, so it does not do it",
	"assurance": "this platform does not give what is required",
}

// print writes the answer for a person. Everything from the node is cleaned of
// control characters.
func (a *callAnswer) print(w io.Writer, kind string, took time.Duration, resp *http.Response) {
	line := func(label, text string) {
		if text != "" {
			fmt.Fprintf(w, "  %-10s %s\n", label, printable(text))
		}
	}
	head := []string{a.Decision, kind}
	switch {
	case a.DryRun:
		head = append(head, "dry run: not executed")
	case a.Outcome != "":
		head = append(head, a.Outcome)
	}
	fmt.Fprintln(w, printable(strings.Join(head, "  ")))
	if a.Decision != "allow" && a.Layer != "" {
		text := a.Layer
		if known := layers[a.Layer]; known != "" {
			text += ": " + known
		}
		line("layer", text)
	}
	if len(a.Reasons) == 0 {
		line("reason", withCode(a.Code, a.Reason))
	}
	for _, r := range a.Reasons {
		line("reason", withCode(r.Code, r.Message))
	}
	if a.Error != nil {
		line("error", withCode(a.Error.Code, a.Error.Message))
	}
	if a.ApprovalID != "" {
		line("approval", a.ApprovalID+", until "+a.ExpiresAt)
	}
	line("retry", resp.Header.Get("Retry-After"))
	line("policy", a.PolicyRef)
	line("audit id", a.AuditID)
	if resp.Header.Get("Idempotent-Replay") == "true" {
		line("replay", "the first result of this call id; nothing ran again")
	}
	line("latency", latency(took))
	if len(a.Output) > 0 && string(a.Output) != "null" {
		var b bytes.Buffer
		if json.Indent(&b, a.Output, "    ", "  ") == nil {
			fmt.Fprintln(w, "  output")
			for text := range strings.Lines("    " + b.String()) {
				fmt.Fprintln(w, printable(strings.TrimRight(text, "\n")))
			}
		}
	}
}

func withCode(code, message string) string {
	switch {
	case code == "":
		return message
	case message == "":
		return code
	}
	return message + " (" + code + ")"
}

// latency keeps three digits.
func latency(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < time.Second:
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}
