package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/wal"
)

func newPolicyExplain() *cobra.Command {
	var bundle, input, walDir, stateDir string
	var all bool
	c := &cobra.Command{
		Use:   "explain {AUDIT_ID | --input FILE}",
		Short: "Say which rules, lines and values made a decision",
		Long: `Evaluate a call again, watched, and say which rules held, where they stand, which
values they saw, and for a deny the condition that each other rule stopped at.

The call is one that a node has recorded, named by its audit id (the answer to the
caller has it), or any input from a file. With --state-dir the log and the bundle
are found in a node's state directory; otherwise --wal-dir and --bundle name them.
The node may be running. Nothing is executed or recorded.

Exits 4 when there is no such record, or no bundle that made it.`,
		Example: `  autonomy policy explain 6f1c0e2ab94d7733-000000000000002a --state-dir /var/lib/autonomy/node
  autonomy policy explain 6f1c0e2ab94d7733-000000000000002a --wal-dir wal --bundle policy.tar.gz
  autonomy policy explain --bundle policy.tar.gz --input examples/quickstart/policy/inputs/deny_host.json`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
	}
	fl := c.Flags()
	fl.StringVar(&bundle, "bundle", "", "bundle `file`")
	fl.StringVar(&input, "input", "", "input `file`, or - for stdin, instead of a recorded call")
	fl.StringVar(&walDir, "wal-dir", "", "the log's `directory`, for a recorded call")
	fl.StringVar(&stateDir, "state-dir", "", "a node's state `directory`, with its log and its policy slots")
	fl.BoolVar(&all, "all", false, "print all rules that stopped somewhere, not the nearest of each name")
	_ = c.MarkFlagDirname("wal-dir")
	_ = c.MarkFlagDirname("state-dir")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		switch {
		case (len(args) == 1) == (input != ""):
			return run.Exitf(run.Usage, "name either an audit id or --input FILE")
		case bundle == "" && stateDir == "":
			return run.Exitf(run.Usage, "--bundle is missing: the policy that decided; or --state-dir, where it is found")
		case input == "" && walDir == "" && stateDir == "":
			return run.Exitf(run.Usage, "--wal-dir or --state-dir is missing: where the call is recorded")
		}
		var rec *recordedCall
		in, err := []byte(nil), error(nil)
		if input != "" {
			if in, err = readInput(c.InOrStdin(), input); err != nil {
				return policyFault(err)
			}
		} else {
			if walDir == "" {
				walDir = filepath.Join(stateDir, "wal")
			}
			if rec, err = findDecision(c.Context(), walDir, args[0]); err != nil {
				return err
			}
			in = rec.input
		}
		b, err := explainBundle(bundle, stateDir, rec)
		if err != nil {
			return err
		}
		p, err := prepared.Compile(c.Context(), b)
		if err != nil {
			return err
		}
		x, err := prepared.Explain(c.Context(), p, in)
		if err != nil {
			return err
		}
		if rec != nil {
			rec.tell(c.ErrOrStderr(), x)
		}
		if *format == "json" {
			return printJSON(c.OutOrStdout(), struct {
				*prepared.Explanation
				Recorded *recordedCall `json:"recorded,omitempty"`
			}{x, rec})
		}
		w := c.OutOrStdout()
		e := explainer{w: w, colour: isTerminal(w) && os.Getenv("NO_COLOR") == "", all: all}
		e.print(x, rec)
		return nil
	}
	return c
}

// explainBundle is --bundle, or the slot that holds what decided the call.
func explainBundle(bundle, stateDir string, rec *recordedCall) (*prepared.Bundle, error) {
	if bundle != "" {
		b, err := prepared.ReadBundleFile(bundle, prepared.Limits{})
		return b, policyFault(err)
	}
	var faults []error
	for _, slot := range []string{"active", "lkg"} {
		b, err := prepared.ReadBundleFile(filepath.Join(stateDir, "policy", slot, "bundle.tar.gz"), prepared.Limits{})
		switch {
		case err != nil:
			faults = append(faults, err)
		case rec == nil || b.Digest == rec.PolicyDigest:
			return b, nil
		}
	}
	if rec == nil {
		return nil, run.Exitf(run.NotFound, "no policy slot in %s can be read; name the policy with --bundle: %w", stateDir, errors.Join(faults...))
	}
	return nil, run.Exitf(run.NotFound, "%s was decided by %s (%s), which is in no slot of %s any more (a local file given with --policy never is); name it with --bundle",
		rec.AuditID, rec.PolicyRef, rec.PolicyDigest, stateDir)
}

// recordedCall is what a decision record says.
type recordedCall struct {
	AuditID      string    `json:"audit_id"`
	Time         time.Time `json:"time"`
	Kind         string    `json:"kind"`
	Decision     string    `json:"decision"`
	PolicyRef    string    `json:"policy_ref"`
	PolicyDigest string    `json:"policy_digest"`

	input []byte
}

// tell notes where the explanation is not of what was recorded.
func (r *recordedCall) tell(w io.Writer, x *prepared.Explanation) {
	if r.PolicyDigest != x.PolicyDigest {
		fmt.Fprintf(w, "note: the call was decided by %s (%s); this is what %s says of it\n", printable(r.PolicyRef), printable(r.PolicyDigest), printable(x.PolicyRef))
		return
	}
	if explained := x.Decision; explained != r.Decision && !(explained == "pending" && r.Decision == "deny") {
		fmt.Fprintf(w, "note: recorded was %s, evaluated now is %s: the policy has redacted the recorded input, or the node denied for another reason than policy\n", printable(r.Decision), explained)
	}
}

// findDecision reads a decision record from a log. Its audit id names the place.
func findDecision(ctx context.Context, dir, auditID string) (*recordedCall, error) {
	logID, number, ok := strings.Cut(auditID, "-")
	seq, err := strconv.ParseUint(number, 16, 64)
	if !ok || err != nil || auditID != event.ID(logID, seq) {
		return nil, run.Exitf(run.Usage, "%q is no audit id: want the log's id, a dash, and 16 hex digits, as a node's answer has it", auditID)
	}
	s, err := wal.OpenReadOnly(dir)
	if err != nil {
		return nil, walExit(err)
	}
	defer s.Close()
	if have := s.Info().ID; have != logID {
		return nil, run.Exitf(run.NotFound, "%s is of log %s; %s holds log %s", auditID, logID, dir, have)
	}
	for e, err := range s.RecordsFrom(ctx, seq) {
		if err != nil {
			return nil, walExit(err)
		}
		if e.End() < seq {
			continue
		}
		if e.Seq != seq || e.Void || e.Lost > 0 {
			break
		}
		r, err := otlp.Parse(e.Payload)
		if err != nil {
			return nil, run.Exitf(run.Integrity, "record %d holds no OTLP log record: %w", seq, err)
		}
		var body event.DecisionBody
		if r.EventType != event.Decision {
			return nil, run.Exitf(run.NotFound, "record %d has event type %q: the audit id of a call is that of its decision", seq, r.EventType)
		}
		if err := json.Unmarshal(r.Body, &body); err != nil {
			return nil, run.Exitf(run.Integrity, "record %d: its body is no decision: %w", seq, err)
		}
		return &recordedCall{AuditID: auditID, Time: time.Unix(0, int64(r.TimeUnixNano)).UTC(), Kind: r.Kind, Decision: r.Decision,
			PolicyRef: body.PolicyRef, PolicyDigest: body.PolicyDigest, input: body.Input}, nil
	}
	return nil, run.Exitf(run.NotFound, "record %d is not in %s: it was delivered and its space used again, or it was never written; the control plane may have it (autonomy events query)", seq, dir)
}

// explainer prints an explanation for a person.
type explainer struct {
	w      io.Writer
	colour bool
	all    bool
}

func (e *explainer) style(code, s string) string {
	if !e.colour || s == "" {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (e *explainer) print(x *prepared.Explanation, rec *recordedCall) {
	verdict := e.style(bold+";"+red, x.Decision)
	if x.Decision == "allow" {
		verdict = e.style(bold+";"+green, x.Decision)
	}
	fmt.Fprintf(e.w, "decision    %s\npolicy      %s, %s\n", verdict, printable(x.PolicyRef), printable(x.Entrypoint))
	if rec != nil {
		fmt.Fprintf(e.w, "call        %s at %s\n", printable(rec.Kind), rec.Time.Format(time.RFC3339Nano))
	}
	for _, r := range x.Reasons {
		fmt.Fprintf(e.w, "reason      %s\n", printable(strings.TrimPrefix(r.Code+": "+r.Message, ": ")))
	}
	if x.Error != "" {
		fmt.Fprintf(e.w, "no answer   %s\n", printable(x.Error))
	}
	if len(x.Held) > 0 {
		fmt.Fprintf(e.w, "\n%s\n", e.style(bold, "Rules that held"))
	}
	for _, r := range x.Held {
		fmt.Fprintf(e.w, "  %s  %s\n", e.style(faint, printable(r.At())), printable(r.Text))
		if v := r.Value.String(); v != "true" && !(r.Default && strings.HasSuffix(r.Text, v)) {
			fmt.Fprintf(e.w, "      %s %s\n", e.style(faint, "gave"), e.value(r.Value))
		}
		e.saw(r.Saw, "      ")
	}
	if len(x.Failed) > 0 {
		fmt.Fprintf(e.w, "\n%s\n", e.style(bold, "Rules that did not, and where they stopped"))
	}
	left, name := 0, ""
	for _, r := range x.Failed {
		if r.Rule == name && !e.all {
			left++
			continue
		}
		name = r.Rule
		fmt.Fprintf(e.w, "  %s  %s\n", e.style(faint, printable(r.At())), printable(r.Text))
		fmt.Fprintf(e.w, "      %s %s:%d  %s\n", e.style(red, "stopped at"), printable(r.StoppedAt.File), r.StoppedAt.Line, printable(r.StoppedAt.Text))
		e.saw(r.Saw, "      ")
	}
	if left > 0 {
		fmt.Fprintf(e.w, "  %s\n", e.style(faint, count(left, "further rule")+" of these names: --all shows them"))
	}
	if x.Cut {
		fmt.Fprintln(e.w, "\nThe policy did more than is kept here: some rules may be missing.")
	}
}

// shownValue is how much of a value a line shows, in bytes.
const shownValue = 120

func (e *explainer) value(v *prepared.Value) string {
	s := printable(v.String())
	if len(s) > shownValue {
		s = strings.ToValidUTF8(s[:shownValue], "") + "…"
	}
	return s
}

func (e *explainer) saw(seen []prepared.Seen, indent string) {
	width := 0
	for _, s := range seen {
		width = max(width, len(s.Name))
	}
	for _, s := range seen {
		value := e.style(red, "not there")
		if !s.Undefined {
			value = e.value(s.Value)
		}
		fmt.Fprintf(e.w, "%s%s = %s\n", indent, fmt.Sprintf("%-*s", min(width, 40), printable(s.Name)), value)
	}
}
