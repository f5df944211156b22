package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/prepared"
)

func newPolicy() *cobra.Command {
	c := &cobra.Command{
		Use:   "policy",
		Short: "Build, test and look at policies",
		Long: `Build, test and look at policies.

A policy is a directory of Rego files, their data and their tests. "build" packs
it into a bundle, which a node loads or a release carries. A first one to read is
examples/quickstart/policy.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newPolicyBuild(), newPolicyTest(), newPolicyLint(), newPolicyEval(), newPolicyExplain(), newPolicyStatus())
	return c
}

func newPolicyBuild() *cobra.Command {
	var o prepared.BuildOptions
	var out string
	c := &cobra.Command{
		Use:   "build DIR --version V --out FILE",
		Short: "Pack a policy directory into a bundle",
		Long: `Pack the policy in DIR into a bundle: all .rego files but tests, data.json,
data.yaml or data.yml, and the sample calls DIR/inputs/*.json and
DIR/examples/*.json. The same files and flags give the same bytes. The bundle is
compiled before it is written.

The sample calls are used to look for rules that fail open: each field of a denied
call is left out in turn, and changed to another type. If the call is then
allowed, nothing is written, and rule and field are named. Where that is what the
policy means, name the field with --allow-fail-open: the bundle then says so, and
each node that activates it records it. A node probes again, with calls that it has
recorded, too.`,
		Example: `  autonomy policy build examples/quickstart/policy --version 1.0.0 --out policy.tar.gz
  autonomy policy build ./policy --name edge --version 1.4.2 --requires-runtime ">=0.1.0 <2.0.0" --out edge.tar.gz`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	fl := c.Flags()
	fl.StringVar(&o.Version, "version", "", "semantic `version` of the bundle (required)")
	fl.StringVar(&out, "out", "", "`file` to write (required)")
	fl.StringVar(&o.Name, "name", "", "`name` of the bundle; default: the directory's name, or its parent's when that is \"policy\"")
	fl.StringVar(&o.RequiresRuntime, "requires-runtime", "", "`constraints` on the node's version, all must hold")
	fl.StringVar(&o.Entrypoint, "entrypoint", "", "`path` of the rule that decides; default autonomy/decision, else autonomy/allow")
	fl.StringArrayVar(&o.AllowFailOpen, "allow-fail-open", nil, "`field` (such as /params/header) that may be left out to make a denied call an allowed one; recorded in the bundle; repeatable")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		dir := args[0]
		switch {
		case o.Version == "":
			return run.Exitf(run.Usage, "--version is missing, for example --version 1.0.0")
		case out == "":
			return run.Exitf(run.Usage, "--out is missing: the file to write, for example --out policy.tar.gz")
		}
		if o.Name == "" {
			o.Name = policyName(dir)
		}
		raw, err := prepared.BuildBundle(dir, o)
		if err != nil {
			return policyFault(err)
		}
		b, err := prepared.ReadBundle(raw, o.Limits)
		if err != nil {
			return err
		}
		p, err := prepared.Compile(c.Context(), b)
		if err != nil {
			return err
		}
		r, err := prepared.Probe(c.Context(), p, prepared.ProbeOptions{})
		if err != nil {
			return err
		}
		for _, f := range r.Refused() {
			f.Call = filepath.Join(dir, f.Call)
			fmt.Fprintln(c.ErrOrStderr(), printable(f.String()))
		}
		if r.Err() != nil {
			return run.Exitf(run.Failure, "the policy fails open; nothing was written\nMake the rule permit what it knows instead of denying what it sees, or name the field with --allow-fail-open")
		}
		if err := vfs.WriteFile(out, raw, 0o644); err != nil {
			return err
		}
		if *format == "json" {
			return printJSON(c.OutOrStdout(), map[string]any{"ref": b.Ref(), "digest": b.Digest, "entrypoint": b.Entrypoint, "bytes": len(raw), "file": out, "probe": r})
		}
		w := c.OutOrStdout()
		fmt.Fprintf(w, "bundle      %s\ndigest      %s\nentrypoint  %s\nfile        %s (%d bytes)\n", b.Ref(), b.Digest, b.Entrypoint, out, len(raw))
		overridden := slices.Compact(slices.Sorted(func(yield func(string) bool) {
			for _, f := range r.Overridden() {
				if !yield(f.Field) {
					return
				}
			}
		}))
		switch {
		case r.Examples == 0:
			fmt.Fprintf(c.ErrOrStderr(), "note: no sample calls in %s: the policy was not probed for rules that fail open\n", filepath.Join(dir, "inputs"))
		case len(overridden) > 0:
			fmt.Fprintf(w, "probe       %d sample calls; --allow-fail-open is needed for %s, and recorded in the bundle\n", r.Examples, printable(strings.Join(overridden, " ")))
		default:
			fmt.Fprintf(w, "probe       %d sample calls, no field turns a deny into an allow\n", r.Examples)
		}
		return nil
	}
	return c
}

// policyName is the directory's name, or for a directory called policy that of
// the project around it.
func policyName(dir string) string {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return filepath.Base(dir)
	}
	if base := filepath.Base(abs); base != "policy" {
		return base
	}
	return filepath.Base(filepath.Dir(abs))
}

// policyFault gives a missing directory or file its own exit code.
func policyFault(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return run.Exit(run.NotFound, err)
	}
	return err
}

func newPolicyTest() *cobra.Command {
	var minimum float64
	var verbose bool
	c := &cobra.Command{
		Use:   "test DIR",
		Short: "Run a policy's Rego tests",
		Long: `Run the tests (rules whose name begins with test_) in the _test.rego files of
DIR, with the builtins that a node has. Prints the tests that failed and the lines
of the policy that no test reached. Exits 1 when a test fails or there is none.`,
		Example: `  autonomy policy test examples/quickstart/policy
  autonomy policy test ./policy --verbose --min-coverage 90`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	c.Flags().BoolVarP(&verbose, "verbose", "v", false, "print passed tests and print() output too")
	c.Flags().Float64Var(&minimum, "min-coverage", 0, "fail below this `percentage` of covered lines")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		r, err := prepared.Test(c.Context(), args[0])
		if err != nil {
			return policyFault(err)
		}
		if *format == "json" {
			if err := printJSON(c.OutOrStdout(), r); err != nil {
				return err
			}
		} else {
			printTestReport(c.OutOrStdout(), r, verbose)
		}
		switch {
		case len(r.Results) == 0:
			return run.Exitf(run.Failure, "no tests in %s: write a _test.rego that allows a call and one that denies a call", args[0])
		case !r.OK():
			return run.Exitf(run.Failure, "%d of %d tests did not pass", len(r.Results)-r.Passed, len(r.Results))
		case r.Coverage < minimum:
			return run.Exitf(run.Failure, "coverage is %.1f%%, want %.1f%%", r.Coverage, minimum)
		}
		return nil
	}
	return c
}

func printTestReport(w io.Writer, r *prepared.TestReport, verbose bool) {
	for _, t := range r.Results {
		if t.Outcome == prepared.TestPassed && !verbose {
			continue
		}
		fmt.Fprintf(w, "%-7s %s:%d  %s\n", t.Outcome, printable(t.File), t.Line, printable(t.Name))
		for _, s := range []string{t.Detail, t.Output} {
			for line := range strings.Lines(s) {
				fmt.Fprintf(w, "          %s\n", printable(strings.TrimRight(line, "\n")))
			}
		}
	}
	for _, m := range r.Missed {
		if m.First == m.Last {
			fmt.Fprintf(w, "not covered  %s:%d\n", printable(m.File), m.First)
		} else {
			fmt.Fprintf(w, "not covered  %s:%d-%d\n", printable(m.File), m.First, m.Last)
		}
	}
	fmt.Fprintf(w, "passed %d, failed %d, errors %d, skipped %d, coverage %.1f%%\n", r.Passed, r.Failed, r.Errors, r.Skipped, r.Coverage)
}

func newPolicyLint() *cobra.Command {
	var entrypoint string
	var allow []string
	c := &cobra.Command{
		Use:   "lint DIR",
		Short: "Find what is likely to be wrong with a policy",
		Long: `Read the policy in DIR and say what is likely to be wrong with it: it does not
compile, calls a builtin that a node does not have, negates without rego.v2, can
be undefined, has a rule that is never reached, reads an input field that no node
sends, answers with a field that no node takes, has no tests, is not formatted, or
fails open for a sample call in DIR/inputs. Exits 1 when there is a finding.`,
		Example: `  autonomy policy lint examples/quickstart/policy`,
		Args:    usageArgs(cobra.ExactArgs(1)),
	}
	c.Flags().StringVar(&entrypoint, "entrypoint", "", "`path` of the rule that decides; default autonomy/decision, else autonomy/allow")
	c.Flags().StringArrayVar(&allow, "allow-fail-open", nil, "`field` that may be left out to make a denied call an allowed one; repeatable")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		found, err := prepared.Lint(c.Context(), args[0], entrypoint, allow)
		if err != nil {
			return policyFault(err)
		}
		if *format == "json" {
			if found == nil {
				found = []prepared.Finding{}
			}
			if err := printJSON(c.OutOrStdout(), map[string]any{"findings": found}); err != nil {
				return err
			}
		} else {
			for _, f := range found {
				f.File = filepath.Join(args[0], f.File)
				fmt.Fprintln(c.OutOrStdout(), printable(f.String()))
			}
		}
		if len(found) > 0 {
			return run.Exitf(run.Failure, "%s", count(len(found), "finding"))
		}
		return nil
	}
	return c
}

func newPolicyEval() *cobra.Command {
	var bundle, input string
	c := &cobra.Command{
		Use:   "eval --bundle FILE --input FILE",
		Short: "Ask a bundle about one call",
		Long: `Evaluate the input (a JSON object as a node makes it; "-" reads stdin) against a
bundle and print the decision. Nothing is executed or recorded. Exits 0 for allow
and for deny; 1 when the policy has no valid answer, which a node takes for deny.`,
		Example: `  autonomy policy eval --bundle policy.tar.gz --input examples/quickstart/policy/inputs/deny_host.json
  autonomy policy eval --bundle policy.tar.gz --input - --output json < call.json`,
		Args: usageArgs(cobra.NoArgs),
	}
	c.Flags().StringVar(&bundle, "bundle", "", "bundle `file` (required)")
	c.Flags().StringVar(&input, "input", "", "input `file`, or - for stdin (required)")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if bundle == "" || input == "" {
			return run.Exitf(run.Usage, "--bundle and --input are both needed")
		}
		b, err := prepared.ReadBundleFile(bundle, prepared.Limits{})
		if err != nil {
			return policyFault(err)
		}
		p, err := prepared.Compile(c.Context(), b)
		if err != nil {
			return err
		}
		in, err := readInput(c.InOrStdin(), input)
		if err != nil {
			return policyFault(err)
		}
		start := time.Now()
		d, err := p.Eval(c.Context(), in)
		took := time.Since(start)
		if err != nil {
			return fmt.Errorf("denied: %w", err)
		}
		if *format == "json" {
			return printJSON(c.OutOrStdout(), decisionView(b, d))
		}
		w := c.OutOrStdout()
		fmt.Fprintf(w, "decision    %s\npolicy      %s\n", decisionWord(d), b.Ref())
		for _, r := range d.Reasons {
			fmt.Fprintf(w, "reason      %s\n", printable(strings.TrimPrefix(r.Code+": "+r.Message, ": ")))
		}
		if cons, err := json.Marshal(d.Constraints); err == nil && string(cons) != "{}" {
			fmt.Fprintf(w, "constraints %s\n", printable(string(cons)))
		}
		if d.Approval != nil {
			fmt.Fprintf(w, "approval    %s\n", printable(string(d.Approval)))
		}
		if len(d.Redact) > 0 {
			fmt.Fprintf(w, "redact      %s\n", printable(strings.Join(d.Redact, " ")))
		}
		fmt.Fprintf(w, "took        %s\n", took.Round(time.Microsecond))
		return nil
	}
	return c
}

func decisionWord(d prepared.Decision) string {
	switch {
	case !d.Allow:
		return "deny"
	case d.Approval != nil:
		return "pending"
	}
	return "allow"
}

func decisionView(b *prepared.Bundle, d prepared.Decision) any {
	return struct {
		Decision    string          `json:"decision"`
		PolicyRef   string          `json:"policy_ref"`
		Digest      string          `json:"policy_digest"`
		Reasons     any             `json:"reasons,omitempty"`
		Constraints any             `json:"constraints,omitempty"`
		Approval    json.RawMessage `json:"approval,omitempty"`
		Redact      []string        `json:"redact,omitempty"`
	}{decisionWord(d), b.Ref(), b.Digest, d.Reasons, d.Constraints, d.Approval, d.Redact}
}

// readInput reads at most what Eval takes, and one byte more so that Eval says so.
func readInput(stdin io.Reader, name string) ([]byte, error) {
	r := stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r = f
	}
	return io.ReadAll(io.LimitReader(r, prepared.MaxInputBytes+1))
}

func newPolicyStatus() *cobra.Command {
	var node string
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the policy that a node has in force",
		Long: `Ask a node which policy is in force, which one it would fall back to, and how the
one in shadow compares.

Exits 5 when the node cannot be reached, 1 when it has no policy in force and so
denies every call.`,
		Example: `  autonomy policy status
  autonomy policy status --node unix:/run/autonomy/node/node.sock --output json`,
		Args: usageArgs(cobra.NoArgs),
	}
	c.Flags().StringVar(&node, "node", "http://127.0.0.1:7777", "`address` of the node: http://HOST:PORT or unix:PATH")
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "how long to wait for an answer")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(c.Context(), timeout)
		defer cancel()
		body, err := getNode(ctx, node, "/v1/status")
		if err != nil {
			return err
		}
		var status struct {
			Policy *policyStatus `json:"policy"`
		}
		if err := json.Unmarshal(body, &status); err != nil {
			return run.Exitf(run.Failure, "%s answered /v1/status with something that is no status: %w", node, err)
		}
		if status.Policy == nil || status.Policy.Serving == "" {
			return run.Exitf(run.Failure, "%s answered /v1/status without its policy slots: is it an autonomy-node?", node)
		}
		st := status.Policy
		if *format == "json" {
			if err := printJSON(c.OutOrStdout(), st); err != nil {
				return err
			}
		} else {
			if err := printSlots(c.OutOrStdout(), st); err != nil {
				return err
			}
		}
		if st.Serving == "none" && st.Local == nil {
			return run.Exitf(run.Failure, "no policy is in force: the node denies every call")
		}
		return nil
	}
	return c
}

// policyStatus is what a node says of its policy: the slots, and the operator's
// own file while that is in force.
type policyStatus struct {
	prepared.SlotStatus
	Local *prepared.Meta `json:"local,omitempty"`
}

func printSlots(w io.Writer, st *policyStatus) error {
	var rows [][]string
	type slot struct {
		name string
		info *prepared.SlotInfo
	}
	slots := []slot{{"active", st.Active}, {"lkg", st.LKG}}
	if st.Candidate != nil {
		slots = append(slots, slot{"candidate", &st.Candidate.SlotInfo})
	}
	for _, s := range slots {
		name := s.name
		if name == st.Serving {
			name += " *"
		}
		if s.info == nil {
			rows = append(rows, []string{name, "-", "-", "-", "-", "-"})
			continue
		}
		release := "-"
		if s.info.ReleaseID != "" {
			release = s.info.ReleaseID + " #" + strconv.FormatUint(s.info.Sequence, 10)
		}
		rows = append(rows, []string{name, s.info.Ref, s.info.Source, release, s.info.ActivatedAt.Format(time.RFC3339), s.info.Digest})
	}
	inForce := st.Serving
	if m := st.Local; m != nil {
		inForce = "local, the file given by --policy"
		rows = append(rows, []string{"local *", m.Ref, m.Source, "-", m.ActivatedAt.Format(time.RFC3339), m.Digest})
	}
	if err := printTable(w, []string{"SLOT", "POLICY", "SOURCE", "RELEASE", "ACTIVATED", "DIGEST"}, rows); err != nil {
		return err
	}
	for _, s := range slots {
		if s.info != nil && s.info.Why != "" {
			fmt.Fprintf(w, "%s is evaluated by %s: %s\n", s.name, printable(s.info.Evaluator), printable(s.info.Why))
		}
	}
	if st.Candidate != nil {
		c := st.Candidate.Shadow
		fmt.Fprintf(w, "shadow:   %d calls compared: %d same, %d stricter, %d looser, %d other limits; %d without a valid answer, %d skipped\n",
			c.Sampled, c.Same, c.Stricter, c.Looser, c.Other, c.Failed, c.Skipped)
	}
	for _, f := range st.Fallbacks {
		fmt.Fprintf(w, "fallback: %s; in its place: %s\n", printable(f.Why), printable(f.Replacement))
	}
	fmt.Fprintf(w, "in force: %s\n", printable(inForce))
	return nil
}

// maxStatus bounds what is read of a node's answer.
const maxStatus = 4 << 20

// getNode asks a node at "http://HOST:PORT" or "unix:PATH". No answer is exit
// code 5.
func getNode(ctx context.Context, node, path string) ([]byte, error) {
	client, base, err := callClient(ctx, node)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path, nil)
	if err != nil {
		return nil, run.Exitf(run.Usage, "--node is %q: %w", node, err)
	}
	if err := identityOf(ctx).authorize(req); err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, run.Exitf(run.Unreachable, "cannot reach the node: %w\nIs it running? --node says where it listens", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxStatus+1))
	if err != nil {
		return nil, run.Exitf(run.Unreachable, "the node's answer broke off: %w", err)
	}
	if len(body) > maxStatus {
		return nil, run.Exitf(run.Failure, "the node's answer is over %d bytes", maxStatus)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, run.Exitf(run.Failure, "the node answered %s with %s", path, resp.Status)
	}
	return body, nil
}
