package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/autonomyops/autonomy/internal/problem"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/relay"
)

const defaultRelay = "http://127.0.0.1:5080"

func newRelay() *cobra.Command {
	c := &cobra.Command{
		Use:   "relay",
		Short: "Ask a relay, and tell it what to hold",
		Long: `Ask a relay, and tell it what to hold.

A relay holds what prestage lists name, near the nodes that will need it, and
serves it whether or not the registry behind it can be reached.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newRelayStatus(), newRelayPrestage())
	return c
}

func relayFlag(c *cobra.Command) *string {
	return c.Flags().String("relay", defaultRelay, "`URL` of the relay: http://HOST:PORT, https://HOST:PORT or unix:PATH")
}

func dialRelay(ctx context.Context, addr string) (*relay.Client, error) {
	client, err := relay.Dial(addr, identityOf(ctx).tls)
	return client, run.Exit(run.Usage, err)
}

// relayFault gives an error of a relay.Client its exit code.
func relayFault(err error) error {
	var p *problem.Problem
	switch {
	case errors.Is(err, relay.ErrUnreachable):
		return run.Exit(run.Unreachable, err)
	case !errors.As(err, &p):
		return err
	case p.Status == http.StatusForbidden || p.Status == http.StatusConflict:
		return run.Exitf(run.Refused, "the relay refuses: %s", printable(p.Error()))
	case p.Status == http.StatusNotFound:
		return run.Exitf(run.NotFound, "%s", printable(p.Error()))
	}
	return fmt.Errorf("the relay answers %d: %s", p.Status, printable(p.Error()))
}

func newRelayStatus() *cobra.Command {
	c := &cobra.Command{
		Use:     "status [LIST]",
		Short:   "Show what a relay holds, or how far a prestage list is",
		Example: "  autonomy relay status\n  autonomy relay status edge --relay http://10.0.0.5:5080 --output json",
		Args:    usageArgs(cobra.MaximumNArgs(1)),
	}
	addr, format := relayFlag(c), outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		client, err := dialRelay(c.Context(), *addr)
		if err != nil {
			return err
		}
		defer client.Close()
		out := c.OutOrStdout()
		if len(args) == 1 {
			rep, err := relayReport(c.Context(), client, args[0])
			if err != nil {
				return err
			}
			if *format == "json" {
				return printJSON(out, rep)
			}
			return printReport(out, rep)
		}
		s, err := client.Status(c.Context())
		if err != nil {
			return relayFault(err)
		}
		if *format == "json" {
			return printJSON(out, s)
		}
		signed := "signed"
		if !s.Signed {
			signed = "not signed"
		}
		return printTable(out, []string{"relay", *addr}, [][]string{
			{"version", s.Version},
			{"upstream", s.Upstream},
			{"disk", fmt.Sprintf("%s used, %s reserved, of %s", sizeText(s.Disk.Used), sizeText(s.Disk.Reserved), sizeText(s.Disk.MaxBytes))},
			{"file system", fmt.Sprintf("%s available, %s kept free", sizeText(s.Disk.Available), sizeText(s.Disk.KeepFree))},
			{"blobs", fmt.Sprintf("%d, %d evicted since start", s.Blobs, s.Evicted)},
			{"lists", fmt.Sprintf("%s (%s)", strings.Join(append([]string{}, s.Prestage.Lists...), " "), signed)},
			{"items", fmt.Sprintf("%d staged, %d staging, %d pending, %d failed", s.Prestage.Items["staged"], s.Prestage.Items["staging"], s.Prestage.Items["pending"], s.Prestage.Items["failed"])},
		})
	}
	return c
}

func relayReport(ctx context.Context, client *relay.Client, id string) (*relay.Report, error) {
	if !relay.ValidID(id) {
		return nil, run.Exitf(run.Usage, "list id %q: want a-z, 0-9, '.', '_' and '-', first a letter or digit", id)
	}
	rep, err := client.Report(ctx, id)
	if err != nil {
		return nil, relayFault(err)
	}
	return rep, nil
}

func printReport(w io.Writer, rep *relay.Report) error {
	fmt.Fprintf(w, "list %s, sequence %d: %s, %d of %d items, %s of %s\n", printable(rep.ID), rep.Sequence, printable(rep.State), rep.Staged, len(rep.Items),
		sizeText(rep.TotalBytes-rep.MissingBytes), sizeText(rep.TotalBytes))
	rows := make([][]string, 0, len(rep.Items))
	for _, it := range rep.Items {
		missing := "?"
		if it.Resolved || it.State == "staged" {
			missing = sizeText(it.MissingBytes)
		}
		rows = append(rows, []string{it.State, missing, strconv.Itoa(it.Priority), strconv.Itoa(it.Attempts), it.Repository + "@" + string(it.Digest), it.Error})
	}
	return printTable(w, []string{"STATE", "MISSING", "PRIORITY", "ATTEMPTS", "CONTENT", "ERROR"}, rows)
}

// sizeText writes bytes for a person, to three digits.
func sizeText(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	v, i := float64(n), 0
	for ; v >= 1000 && i < len(units)-1; i++ {
		v /= 1024
	}
	if i == 0 {
		return strconv.FormatInt(n, 10) + " B"
	}
	return strconv.FormatFloat(v, 'g', 3, 64) + " " + units[i]
}

func newRelayPrestage() *cobra.Command {
	c := &cobra.Command{
		Use:   "prestage FILE | --id NAME --digest REPO@DIGEST…",
		Short: "Tell a relay what to hold, and wait until it does",
		Long: `Tell a relay what to hold, and wait until it does.

FILE ("-": standard input) is a prestage list, or one that is signed already (a
DSSE envelope). Without FILE the list is made of --id, --sequence and --digest.
With --key the list is signed with that private key; a relay accepts a list only
if a release key of its keyring signed it, unless it was started with
--allow-unsigned-prestage.

A list replaces the one with the same id and a lower sequence: what only the
older one named may then be evicted.`,
		Example: `  autonomy relay prestage --id edge --sequence 2 --digest team/agent@sha256:… --key release.key
  autonomy relay prestage list.json --key release.key --relay http://10.0.0.5:5080`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
	}
	fl := c.Flags()
	addr := relayFlag(c)
	id := fl.String("id", "", "`name` of the list")
	sequence := fl.Uint64("sequence", 1, "`number` of the list; each change needs a higher one")
	digests := fl.StringArray("digest", nil, "hold `REPO@sha256:…` and all that hangs on it; repeatable, in order of priority")
	key := fl.String("key", "", "sign the list with the private key in `FILE`")
	wait := fl.Bool("wait", true, "wait until every item is staged or has failed")
	timeout := fl.Duration("timeout", 10*time.Minute, "longest time to wait")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		body, err := prestageBody(c.InOrStdin(), args, *id, *sequence, *digests, *key)
		if err != nil {
			return err
		}
		client, err := dialRelay(c.Context(), *addr)
		if err != nil {
			return err
		}
		defer client.Close()
		ok, err := client.Submit(c.Context(), body)
		if err != nil {
			return relayFault(err)
		}
		if !*wait {
			if *format == "json" {
				return printJSON(c.OutOrStdout(), ok)
			}
			fmt.Fprintf(c.OutOrStdout(), "list %s, sequence %d, %d items: accepted\n", printable(ok.ID), ok.Sequence, ok.Items)
			return nil
		}
		ctx, cancel := context.WithTimeout(c.Context(), *timeout)
		defer cancel()
		rep, err := waitStaged(ctx, client, ok.ID, c.ErrOrStderr())
		if rep == nil {
			return err
		}
		if *format == "json" {
			err = errors.Join(err, printJSON(c.OutOrStdout(), rep))
		} else {
			err = errors.Join(err, printReport(c.OutOrStdout(), rep))
		}
		if err == nil && rep.State != "staged" {
			err = fmt.Errorf("%d of %d items are not staged; the column ERROR says why; submit a list with a higher sequence to try again", len(rep.Items)-rep.Staged, len(rep.Items))
		}
		return err
	}
	return c
}

// prestageBody makes what is sent: a list, or an envelope around one.
func prestageBody(stdin io.Reader, args []string, id string, sequence uint64, digests []string, keyFile string) (body []byte, err error) {
	var list *relay.List
	switch {
	case len(args) == 1 && (id != "" || len(digests) > 0):
		return nil, run.Exitf(run.Usage, "give a file, or --id and --digest, not both")
	case len(args) == 1:
		var data []byte
		if args[0] == "-" {
			data, err = io.ReadAll(io.LimitReader(stdin, relay.MaxList+1))
		} else {
			data, err = readFile(args[0], relay.MaxList)
		}
		if err != nil {
			return nil, err
		}
		if len(data) > relay.MaxList {
			return nil, run.Exitf(run.Usage, "the list has over %d bytes", relay.MaxList)
		}
		var shape map[string]any
		if err := strictjson.Unmarshal(data, &shape); err != nil {
			return nil, run.Exitf(run.Usage, "%s: %w", args[0], err)
		}
		if _, sealed := shape["payloadType"]; sealed {
			if keyFile != "" {
				return nil, run.Exitf(run.Usage, "%s is signed already; leave --key out", args[0])
			}
			return data, nil
		}
		if list, err = relay.ParseList(data); err != nil {
			return nil, run.Exitf(run.Usage, "%s: %w", args[0], err)
		}
	case id == "" || len(digests) == 0:
		return nil, run.Exitf(run.Usage, "give a file, or --id and at least one --digest")
	default:
		list = &relay.List{Schema: relay.ListSchema, ID: id, Sequence: sequence}
		for i, d := range digests {
			repo, digest, ok := strings.Cut(d, "@")
			if !ok {
				return nil, run.Exitf(run.Usage, "--digest %q: want REPO@sha256:…", d)
			}
			list.Items = append(list.Items, relay.Item{Repository: repo, Digest: relay.Digest(digest), Priority: i})
		}
	}
	if keyFile == "" {
		body, err = list.Marshal()
		return body, run.Exit(run.Usage, err)
	}
	key, err := readPrivateKey(keyFile)
	if err != nil {
		return nil, err
	}
	body, err = relay.Seal(list, key)
	return body, run.Exit(run.Usage, err)
}

// waitStaged polls until no item is under way, with a progress line if w is a
// terminal. On a timeout it returns the last report with the error.
func waitStaged(ctx context.Context, client *relay.Client, id string, w io.Writer) (*relay.Report, error) {
	f, isFile := w.(*os.File)
	live := isFile && term.IsTerminal(int(f.Fd()))
	if live {
		defer fmt.Fprint(w, "\r\x1b[K")
	}
	pause := 50 * time.Millisecond
	var last *relay.Report
	for {
		rep, err := client.Report(ctx, id)
		if err != nil {
			if last != nil && ctx.Err() != nil {
				return last, fmt.Errorf("stopped waiting: %w; the relay goes on by itself", ctx.Err())
			}
			return nil, relayFault(err)
		}
		if last = rep; rep.State != "staging" {
			return rep, nil
		}
		if live {
			fmt.Fprint(w, "\r\x1b[K", progressLine(rep))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return last, fmt.Errorf("stopped waiting: %w; the relay goes on by itself", ctx.Err())
		}
		pause = min(2*pause, time.Second)
	}
}

// progressLine is at most 72 columns.
func progressLine(rep *relay.Report) string {
	const width = 24
	done := 0
	if rep.TotalBytes > 0 {
		done = int(float64(width) * float64(rep.TotalBytes-rep.MissingBytes) / float64(rep.TotalBytes))
	}
	return fmt.Sprintf("[%s%s] %s of %s, %d of %d items", strings.Repeat("#", done), strings.Repeat(".", width-done),
		sizeText(rep.TotalBytes-rep.MissingBytes), sizeText(rep.TotalBytes), rep.Staged, len(rep.Items))
}
