package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/wal"
)

func newWAL() *cobra.Command {
	c := &cobra.Command{
		Use:   "wal",
		Short: "Read a node's write-ahead log from disk, and repair it",
		Long: `Read a node's write-ahead log from disk. The node may be running: nothing here
locks or changes the log, but for repair, which needs it stopped.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newWALInspect(), newWALVerify(), newWALExport(), newWALTail(), newWALRepair())
	return c
}

// dirFlag adds the --dir that all of them need.
func dirFlag(c *cobra.Command) *string {
	dir := c.Flags().String("dir", "", "the log's `directory`: wal/ in the node's state directory")
	_ = c.MarkFlagDirname("dir")
	pre := c.PreRunE
	c.PreRunE = func(c *cobra.Command, args []string) error {
		if *dir == "" {
			return run.Exitf(run.Usage, "--dir is not set: name the log's directory, as in --dir /var/lib/autonomy/node/wal")
		}
		if pre != nil {
			return pre(c, args)
		}
		return nil
	}
	return dir
}

// walExit gives an error of reading a log its exit code.
func walExit(err error) error {
	switch {
	case errors.Is(err, wal.ErrDamaged), errors.Is(err, wal.ErrUnsigned):
		return run.Exit(run.Integrity, err)
	case errors.Is(err, fs.ErrNotExist):
		return run.Exitf(run.NotFound, "no write-ahead log there: %w", err)
	}
	return err
}

func newWALInspect() *cobra.Command {
	c := &cobra.Command{
		Use:     "inspect --dir DIR",
		Short:   "Show slots, positions and cursors",
		Example: "  autonomy wal inspect --dir /var/lib/autonomy/node/wal",
		Args:    usageArgs(cobra.NoArgs),
	}
	format := outputFlag(c)
	dir := dirFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		s, err := wal.OpenReadOnly(*dir)
		if err != nil {
			return walExit(err)
		}
		defer s.Close()
		var first, last, records uint64
		var at wal.Position
		bar := newProgress(c.ErrOrStderr(), "records read")
		defer bar.done()
		for e, err := range s.Records(c.Context()) {
			if err != nil {
				return walExit(err)
			}
			if records == 0 {
				first = e.Seq
			}
			records, last, at = records+1, e.End(), e.Position
			if records%(1<<14) == 0 {
				bar.set(records)
			}
		}
		info := s.Info()
		if *format == "json" {
			return printJSON(c.OutOrStdout(), struct {
				wal.Info
				Records uint64       `json:"records"`
				First   uint64       `json:"first"`
				Last    uint64       `json:"last"`
				LastAt  wal.Position `json:"last_at"`
			}{info, records, first, last, at})
		}
		out := c.OutOrStdout()
		use := "not in use"
		if info.InUse {
			use = "in use by a running process"
		}
		fmt.Fprintf(out, "log      %s, made %s, %s\n", info.ID, info.Created.Format(time.RFC3339), use)
		fmt.Fprintf(out, "disk     %s in %d slots of %s\n", size(info.DiskBytes), len(info.Slots), size(info.SlotBytes))
		fmt.Fprintf(out, "records  %d, first %d, last %d at segment %d offset %d\n\n", records, first, last, at.Segment, at.Offset)
		var rows [][]string
		for class := range wal.NumClasses {
			rows = append(rows, []string{class.String(), strconv.FormatUint(info.Cursors[class], 10)})
		}
		if err := printTable(out, []string{"CLASS", "CURSOR"}, rows); err != nil {
			return err
		}
		fmt.Fprintln(out)
		rows = nil
		for _, slot := range info.Slots {
			row := []string{strconv.Itoa(slot.Slot), slot.State, "-", "-", "-"}
			if slot.Segment != 0 {
				row = []string{strconv.Itoa(slot.Slot), slot.State, strconv.FormatUint(slot.Segment, 10),
					strconv.FormatUint(slot.FirstSeq, 10), strconv.FormatInt(slot.Bytes, 10)}
			}
			rows = append(rows, row)
		}
		return printTable(out, []string{"SLOT", "STATE", "SEGMENT", "FIRST", "BYTES"}, rows)
	}
	return c
}

func size(n int64) string { z := conf.Size(n); return z.String() }

func newWALVerify() *cobra.Command {
	c := &cobra.Command{
		Use:   "verify --dir DIR",
		Short: "Check every record, the sequence and the chain",
		Long: `Check every record's checksum, that no sequence number is missing, and that the
chain of commit markers holds. With --key also the signatures of its checkpoints:
one by another key is damage, and so is a log without any. Exit code 6 when the
log is damaged.`,
		Example: `  autonomy wal verify --dir /var/lib/autonomy/node/wal
  autonomy wal verify --dir wal --key node.pub`,
		Args: usageArgs(cobra.NoArgs),
	}
	format := outputFlag(c)
	dir := dirFlag(c)
	keys := c.Flags().StringArray("key", nil, "the node's public key `FILE` (repeatable)")
	_ = c.MarkFlagFilename("key", "pub")
	c.RunE = func(c *cobra.Command, _ []string) error {
		var o wal.VerifyOptions
		for _, name := range *keys {
			pub, _, err := readPublicKey(name)
			if err != nil {
				return err
			}
			k, ok := pub.(ed25519.PublicKey)
			if !ok {
				return run.Exitf(run.Usage, "%s holds a %T, want an Ed25519 key: logs are signed with those", name, pub)
			}
			o.Keys = append(o.Keys, k)
		}
		bar := newProgress(c.ErrOrStderr(), "records checked")
		o.Progress = bar.set
		r, err := wal.VerifyWith(c.Context(), *dir, o)
		bar.done()
		if err != nil && (!errors.Is(err, wal.ErrDamaged) && !errors.Is(err, wal.ErrUnsigned) || *format != "json") {
			return walExit(err)
		}
		out := c.OutOrStdout()
		if *format == "json" {
			v := struct {
				wal.Report
				Damage string `json:"damage,omitempty"`
			}{Report: r}
			if err != nil {
				v.Damage = err.Error()
			}
			if perr := printJSON(out, v); perr != nil {
				return perr
			}
			if err != nil {
				return run.Exit(run.Integrity, fmt.Errorf("%w: %w", errSilent, err))
			}
			return nil
		}
		fmt.Fprintf(out, "log %s, %d segments, chain head %s\n", r.ID, r.Segments, r.Chain)
		if r.Uncommitted > 0 || r.TornBytes > 0 {
			fmt.Fprintf(out, "after the last commit: %d whole records, which the next start keeps; %d torn records (%d bytes), which it cuts: nobody was told of them\n",
				r.Uncommitted, r.TornRecords, r.TornBytes)
		}
		if len(o.Keys) > 0 {
			fmt.Fprintf(out, "signed up to record %d at %s, %d checkpoints\n", r.SignedSeq, r.SignedAt.Format(time.RFC3339), r.Checkpoints)
		}
		if r.Gaps > 0 {
			fmt.Fprintf(out, "earlier repairs found records gone: %d, in places: %d\n", r.Lost, r.Gaps)
		}
		_, err = fmt.Fprintf(out, "records %d, first %d, last %d, gaps %d, chain ok\n", r.Records, r.First, r.Last, r.Gaps)
		return err
	}
	return c
}

// exported is one line of export.
type exported struct {
	Seq       uint64          `json:"seq"`
	Time      string          `json:"time"`
	Class     string          `json:"class"`
	EventType string          `json:"event_type"`
	AuditID   string          `json:"audit_id"`
	Decision  string          `json:"decision"`
	Outcome   string          `json:"outcome"`
	Kind      string          `json:"kind"`
	Body      json.RawMessage `json:"body"`
}

func newWALExport() *cobra.Command {
	c := &cobra.Command{
		Use:   "export --dir DIR",
		Short: "Print the records as NDJSON, oldest first",
		Long: `Print the records as NDJSON, one a line, oldest first, checking them on the way.
When the log is damaged the records before the damage are printed, then the
error; exit code 6. A record that its writer aborted has event_type "void"; where
a repair found records gone, one line has event_type "log.lost", the first of
their sequence numbers, and a body with the range.`,
		Example: "  autonomy wal export --dir /var/lib/autonomy/node/wal | jq 'select(.decision == \"deny\")'",
		Args:    usageArgs(cobra.NoArgs),
	}
	dir := dirFlag(c)
	from := c.Flags().Uint64("from", 0, "start at this sequence `number`")
	c.RunE = func(c *cobra.Command, _ []string) error {
		s, err := wal.OpenReadOnly(*dir)
		if err != nil {
			return walExit(err)
		}
		defer s.Close()
		out := bufio.NewWriterSize(c.OutOrStdout(), 1<<16)
		enc := json.NewEncoder(out)
		enc.SetEscapeHTML(false)
		bar := newProgress(c.ErrOrStderr(), "records read")
		if isTerminal(c.OutOrStdout()) {
			bar = nil // the records themselves show it
		}
		defer bar.done()
		var n uint64
		for e, err := range s.Records(c.Context()) {
			if n++; n%(1<<14) == 0 {
				bar.set(n)
			}
			if err == nil && e.End() < *from {
				continue
			}
			if err == nil {
				err = exportOne(enc, e)
			}
			if err != nil {
				return errors.Join(out.Flush(), walExit(err))
			}
		}
		return out.Flush()
	}
	return c
}

func exportOne(enc *json.Encoder, e wal.Entry) error {
	line := exported{Seq: e.Seq, Class: e.Class.String(), EventType: "void", Body: json.RawMessage("null")}
	if e.Lost > 0 {
		line.EventType, line.Class = event.LogLost, wal.ClassError.String()
		line.Body = fmt.Appendf(nil, `{"first":%d,"last":%d,"records":%d}`, e.Seq, e.End(), e.Lost)
	}
	if !e.Void {
		r, err := otlp.Parse(e.Payload)
		if err != nil {
			return run.Exitf(run.Integrity, "record %d (%s, segment %d, offset %d) is whole but holds no OTLP log record: %w",
				e.Seq, e.Slot, e.Segment, e.Offset, err)
		}
		line.Time = time.Unix(0, int64(r.TimeUnixNano)).UTC().Format(time.RFC3339Nano)
		line.EventType, line.AuditID, line.Decision = r.EventType, r.AuditID, r.Decision
		line.Outcome, line.Kind = r.Outcome, r.Kind
		switch {
		case json.Valid(r.Body):
			line.Body = json.RawMessage(r.Body)
		case len(r.Body) > 0:
			if line.Body, err = json.Marshal(string(r.Body)); err != nil {
				return err
			}
		}
	}
	return enc.Encode(line)
}

// newWALTail follows a log.
func newWALTail() *cobra.Command {
	c := &cobra.Command{
		Use:   "tail --dir DIR",
		Short: "Print the newest records as NDJSON, and follow what comes",
		Long: `Print the newest records as NDJSON, in the form of export. With --follow wait for
more, until Ctrl-C. Another process may be writing the log; records are shown
once they are durable.`,
		Example: "  autonomy wal tail --dir /var/lib/autonomy/node/wal --follow",
		Args:    usageArgs(cobra.NoArgs),
	}
	dir := dirFlag(c)
	lines := c.Flags().IntP("lines", "n", 10, "start with the newest `N` records")
	follow := c.Flags().BoolP("follow", "f", false, "wait for more until Ctrl-C")
	every := c.Flags().Duration("interval", 250*time.Millisecond, "how often --follow looks, 10ms or more")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if *lines < 0 || *lines > maxTail || *every < 10*time.Millisecond {
			return run.Exitf(run.Usage, "--lines is %d, want 0 to %d; --interval is %v, want 10ms or more", *lines, maxTail, *every)
		}
		out := bufio.NewWriterSize(c.OutOrStdout(), 1<<16)
		enc := json.NewEncoder(out)
		enc.SetEscapeHTML(false)
		t := follower{dir: *dir, n: *lines, print: func(e wal.Entry) error { return exportOne(enc, e) }}
		for {
			err := t.look(c.Context())
			if err = errors.Join(out.Flush(), err); err != nil {
				if errors.Is(err, context.Canceled) && c.Context().Err() != nil {
					return nil // Ctrl-C is how a tail ends
				}
				return walExit(err)
			}
			if !*follow {
				return nil
			}
			select {
			case <-c.Context().Done():
				return nil
			case <-time.After(*every):
			}
		}
	}
	return c
}

const maxTail = 100_000 // of --lines

// follower prints a log that another process may be writing: the newest n records
// first, then what has come since the last look.
type follower struct {
	dir   string
	n     int
	print func(wal.Entry) error

	mark wal.Bookmark // nothing before it is read again
	next uint64       // the first that was not printed; 0: nothing was read yet
}

func (t *follower) look(ctx context.Context) error {
	s, err := wal.OpenReadOnly(t.dir)
	if err != nil {
		return err
	}
	defer s.Close()
	if t.next == 0 {
		t.mark = wal.BookmarkAt(t.first(s))
	}
	var newest []wal.Entry // a ring of the last n
	seen, after := 0, max(t.next, 1)
	for e, err := range s.RecordsSince(ctx, &t.mark) {
		if errors.Is(err, wal.ErrOvertaken) {
			return nil // the writer was faster: look again
		}
		if err != nil {
			return err
		}
		end := e.End() + 1
		if t.next != 0 {
			if end <= t.next {
				continue
			}
			if err := t.print(e); err != nil {
				return err
			}
			t.next = end
			continue
		}
		after = end
		if t.n == 0 {
			continue
		}
		if len(newest) < t.n {
			newest = append(newest, e)
		} else {
			newest[seen%t.n] = e
		}
		seen++
	}
	if t.next != 0 {
		return nil
	}
	for i := range newest {
		if err := t.print(newest[(seen+i)%len(newest)]); err != nil {
			return err
		}
	}
	t.next = after
	return nil
}

// first is a record that the newest n come behind: that many before the newest
// segment.
func (t *follower) first(s *wal.Snapshot) uint64 {
	var first uint64
	for _, slot := range s.Info().Slots {
		first = max(first, slot.FirstSeq)
	}
	return first - min(first, uint64(t.n))
}

func newWALRepair() *cobra.Command {
	c := &cobra.Command{
		Use:   "repair --dir DIR",
		Short: "Make a damaged log one that opens, keeping every whole record",
		Long: `Make a damaged log one that opens. Every whole record stays, with its sequence
number; where records are gone a loss marker says which, and export, readers and
the exporter see it. The damaged slots are first copied to a directory beside the
log; without room for that nothing is changed. The node must be stopped.`,
		Example: "  autonomy wal repair --dir /var/lib/autonomy/node/wal",
		Args:    usageArgs(cobra.NoArgs),
	}
	format := outputFlag(c)
	dir := dirFlag(c)
	to := c.Flags().String("quarantine", "", "a new `directory` for the damaged slots, DIR.damaged-TIME if not given")
	_ = c.MarkFlagDirname("quarantine")
	c.RunE = func(c *cobra.Command, _ []string) error {
		r, err := wal.Repair(*dir, wal.RepairOptions{Quarantine: *to})
		if err != nil {
			return walExit(err)
		}
		out := c.OutOrStdout()
		if *format == "json" {
			return printJSON(out, r)
		}
		if !r.Damaged {
			_, err := fmt.Fprintln(out, "the log is whole; nothing was changed")
			return err
		}
		fmt.Fprintf(out, "repaired %d slots; %d records in them are whole and kept\n", len(r.Slots), r.Kept)
		for _, x := range r.Lost {
			fmt.Fprintf(out, "lost     records %d to %d: %s\n", x.First, x.Last, x.Reason)
		}
		_, err = fmt.Fprintf(out, "the damaged slots are in %s: keep them until the loss is explained\n", r.Quarantine)
		return err
	}
	return c
}

// progress is one line on a terminal that counts; elsewhere it is silent. A nil
// one does nothing.
type progress struct {
	w     io.Writer
	what  string
	last  time.Time
	shown bool
}

func newProgress(w io.Writer, what string) *progress {
	if !isTerminal(w) {
		return nil
	}
	return &progress{w: w, what: what, last: time.Now()}
}

func (p *progress) set(n uint64) {
	if p == nil || time.Since(p.last) < 200*time.Millisecond {
		return
	}
	p.last, p.shown = time.Now(), true
	fmt.Fprintf(p.w, "\r%d %s", n, p.what)
}

func (p *progress) done() {
	if p != nil && p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
