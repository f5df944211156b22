package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/run"
)

func newEvents() *cobra.Command {
	c := &cobra.Command{Use: "events", Short: "Read the decisions, actions and releases the nodes recorded"}
	c.AddCommand(newEventsQuery())
	return c
}

const (
	eventsPage = 1000      // events of one request
	maxEvents  = 1_000_000 // of one query: a bound, not a wish
	lineWidth  = 80
)

func newEventsQuery() *cobra.Command {
	c := &cobra.Command{
		Use:   "query --cp URL [filters]",
		Short: "List events, newest first",
		Long: `List events, newest first. Filters are joined by "and". Times are RFC 3339, or
how long ago: --since 15m. Exit code 4 when --audit-id names nothing.`,
		Args: usageArgs(cobra.NoArgs),
		Example: `  autonomy events query --decision deny --since 1h
  autonomy events query --audit-id 9f3c5a1be07d2c44-000000000000002a -o json`,
	}
	cp := cpFlag(c)
	format := outputFlag(c)
	limit := c.Flags().Int("limit", 50, "print at most `N` events")
	filters := []struct {
		param, flag, usage string
		val                *string
	}{
		{"node_id", "node", "only of this `NODE`", nil},
		{"event_type", "type", "only of this `TYPE`, as in decision or release.activated", nil},
		{"decision", "decision", "only this `DECISION`: allow, deny or pending", nil},
		{"outcome", "outcome", "only this `OUTCOME`: ok, error, timeout, killed or denied", nil},
		{"kind", "kind", "only of this tool `KIND`", nil},
		{"release_id", "release", "only of this `RELEASE`", nil},
		{"audit_id", "audit-id", "all events of one call", nil},
		{"since", "since", "not before this `TIME`", nil},
		{"until", "until", "before this `TIME`", nil},
	}
	for i := range filters {
		filters[i].val = c.Flags().String(filters[i].flag, "", filters[i].usage)
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		if *limit < 1 || *limit > maxEvents {
			return run.Exitf(run.Usage, "--limit is %d, want 1 to %d", *limit, maxEvents)
		}
		q := url.Values{}
		byID := false
		for _, f := range filters {
			v := *f.val
			if v == "" {
				continue
			}
			if f.param == "since" || f.param == "until" {
				at, err := moment(v)
				if err != nil {
					return run.Exitf(run.Usage, "--%s: %w", f.flag, err)
				}
				v = at.UTC().Format(time.RFC3339Nano)
			}
			q.Set(f.param, v)
			byID = byID || f.param == "audit_id"
		}
		events := []json.RawMessage{}
		for len(events) < *limit {
			q.Set("limit", strconv.Itoa(min(eventsPage, *limit-len(events))))
			var page struct {
				Events     []json.RawMessage `json:"events"`
				NextCursor string            `json:"next_cursor"`
			}
			if _, err := askCP(c.Context(), http.MethodGet, *cp, "/v1/events?"+q.Encode(), nil, &page); err != nil {
				return err
			}
			events = append(events, page.Events...)
			if page.NextCursor == "" || len(page.Events) == 0 {
				break
			}
			q.Set("cursor", page.NextCursor)
		}
		if len(events) == 0 && byID {
			return run.Exitf(run.NotFound, "no event has this audit id: the node may not have delivered it yet")
		}
		if *format == "json" {
			return printJSON(c.OutOrStdout(), map[string]any{"events": events})
		}
		if len(events) == 0 {
			fmt.Fprintln(c.ErrOrStderr(), "no event matches")
			return nil
		}
		var rows [][]string
		for _, raw := range events {
			var e event.Event
			if err := json.Unmarshal(raw, &e); err != nil {
				return fmt.Errorf("control plane: the answer is not the JSON that was due: %w", err)
			}
			rows = append(rows, eventRow(&e))
		}
		header := []string{"TIME (UTC)", "NODE", "EVENT", "RESULT", "DETAIL"}
		fitLast(header, rows)
		return printTable(c.OutOrStdout(), header, rows)
	}
	return c
}

// moment reads an RFC 3339 time, or a duration before now.
func moment(s string) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return time.Now().Add(-d), nil
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return t, fmt.Errorf("%q is no time: want RFC 3339, as in 2026-01-31T15:04:05Z, or how long ago, as in 15m", s)
	}
	return t, nil
}

func eventRow(e *event.Event) []string {
	result := e.Decision
	if e.EventType == event.Action {
		result = e.Outcome
	}
	var b struct {
		Reasons []event.Reason `json:"reasons"`
		Result  string         `json:"result"`
		Code    string         `json:"code"`
		Detail  string         `json:"detail"`
		Error   string         `json:"error"`
		Policy  string         `json:"policy_ref"`
	}
	detail := e.Kind
	if json.Unmarshal(e.Body, &b) == nil { // a node's word: what does not fit is not shown
		if result == "" {
			result = b.Result
		}
		var why []string
		for _, r := range b.Reasons {
			if r.Message == "" {
				r.Message = r.Code
			}
			why = append(why, r.Message)
		}
		for _, s := range []string{b.Code, b.Detail, b.Error} {
			if s != "" {
				why = append(why, s)
			}
		}
		if len(why) == 0 && e.Kind == "" && b.Policy != "" {
			why = append(why, b.Policy)
		}
		detail = strings.TrimPrefix(detail+": "+strings.Join(why, "; "), ": ")
		detail = strings.TrimSuffix(detail, ": ")
	}
	if e.ReleaseID != "" && strings.HasPrefix(e.EventType, "release.") {
		detail = strings.TrimSpace(e.ReleaseID + " " + detail)
	}
	if result == "" {
		result = "-"
	}
	return []string{e.Timestamp.UTC().Format("01-02 15:04:05"), clipTo(e.NodeID, 14), clipTo(e.EventType, 21), clipTo(result, 8), detail}
}

// fitLast cuts the last column to what is left of the line, but not below 30.
func fitLast(header []string, rows [][]string) {
	used, last := 0, len(header)-1
	for col := range last {
		w := utf8.RuneCountInString(header[col])
		for _, r := range rows {
			w = max(w, utf8.RuneCountInString(r[col]))
		}
		used += w + 2
	}
	for _, r := range rows {
		r[last] = clipTo(r[last], max(30, lineWidth-used))
	}
}
