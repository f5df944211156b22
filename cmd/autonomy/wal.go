package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/wal"
)

func newWAL() *cobra.Command {
	c := &cobra.Command{
		Use:   "wal",
		Short: "Read a node's write-ahead log from disk",
		Long: `Read a node's write-ahead log from disk. The node may be running: nothing here
locks or changes the log.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newWALInspect(), newWALVerify(), newWALExport())
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
	case errors.Is(err, wal.ErrDamaged):
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
		for e, err := range s.Records(c.Context()) {
			if err != nil {
				return walExit(err)
			}
			if records == 0 {
				first = e.Seq
			}
			records, last, at = records+1, e.Seq, e.Position
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
chain of commit markers holds. Exit code 6 when the log is damaged.`,
		Example: "  autonomy wal verify --dir /var/lib/autonomy/node/wal",
		Args:    usageArgs(cobra.NoArgs),
	}
	format := outputFlag(c)
	dir := dirFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		r, err := wal.Verify(c.Context(), *dir)
		if err != nil && (!errors.Is(err, wal.ErrDamaged) || *format != "json") {
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
error; exit code 6. A record that its writer aborted has event_type "void".`,
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
		for e, err := range s.Records(c.Context()) {
			if err == nil && e.Seq < *from {
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
