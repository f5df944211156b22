package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/run"
)

func newFleet() *cobra.Command {
	c := &cobra.Command{Use: "fleet", Short: "See the nodes as the control plane knows them"}
	c.AddCommand(newFleetStatus())
	return c
}

// fleetNode is a row of GET /v1/fleet.
type fleetNode struct {
	NodeID          string    `json:"node_id"`
	State           string    `json:"state"`
	Channel         string    `json:"channel"`
	DesiredRelease  string    `json:"desired_release"`
	ObservedRelease string    `json:"observed_release"`
	Fingerprint     string    `json:"fingerprint"`
	PolicyRef       string    `json:"policy_ref"`
	Version         string    `json:"version"`
	Assurance       string    `json:"assurance"`
	LogID           string    `json:"log_id"`
	LastSeq         uint64    `json:"last_seq"`
	Watermark       uint64    `json:"watermark"`
	Gaps            uint64    `json:"gaps"`
	Missing         uint64    `json:"missing"`
	Conflicts       uint64    `json:"conflicts"`
	LastSeen        time.Time `json:"last_seen"`
	LastAck         *struct {
		ReleaseID string    `json:"release_id"`
		Step      string    `json:"step"`
		Result    string    `json:"result"`
		Code      string    `json:"code"`
		Detail    string    `json:"detail"`
		At        time.Time `json:"at"`
	} `json:"last_ack"`
}

// maxFleetPages bounds how much of a fleet one call prints: 100,000 nodes.
const maxFleetPages = 100

func newFleetStatus() *cobra.Command {
	c := &cobra.Command{
		Use:   "status [NODE] --cp URL",
		Short: "Show each node's state, release, policy and audit gaps, or all of one node",
		Args:  usageArgs(cobra.MaximumNArgs(1)),
		Example: `  autonomy fleet status
  autonomy fleet status edge-7 -o json`,
	}
	cp := cpFlag(c)
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		raw, nodes, err := readFleet(c.Context(), *cp)
		if err != nil {
			return err
		}
		if len(args) == 1 {
			for i := range nodes {
				if nodes[i].NodeID != args[0] {
					continue
				}
				if *format == "json" {
					return printJSON(c.OutOrStdout(), raw[i])
				}
				return printNode(c.OutOrStdout(), &nodes[i])
			}
			return run.Exitf(run.NotFound, "the control plane knows no node %q: autonomy fleet status lists those it knows", args[0])
		}
		if *format == "json" {
			return printJSON(c.OutOrStdout(), map[string]any{"nodes": raw})
		}
		return printFleet(c.OutOrStdout(), nodes)
	}
	return c
}

// readFleet reads all pages; raw are the rows as they were sent, for JSON.
func readFleet(ctx context.Context, cp string) (raw []json.RawMessage, nodes []fleetNode, err error) {
	raw = []json.RawMessage{}
	cursor := ""
	for range maxFleetPages {
		path := "/v1/fleet"
		if cursor != "" {
			path += "?" + url.Values{"cursor": {cursor}}.Encode()
		}
		var page struct {
			Nodes      []json.RawMessage `json:"nodes"`
			NextCursor string            `json:"next_cursor"`
		}
		if _, err := askCP(ctx, http.MethodGet, cp, path, nil, &page); err != nil {
			return nil, nil, err
		}
		for _, row := range page.Nodes {
			var n fleetNode
			if err := json.Unmarshal(row, &n); err != nil {
				return nil, nil, fmt.Errorf("control plane: the answer is not the JSON that was due: %w", err)
			}
			raw, nodes = append(raw, row), append(nodes, n)
		}
		if page.NextCursor == "" {
			break
		}
		cursor = page.NextCursor
	}
	return raw, nodes, nil
}

func printFleet(w io.Writer, nodes []fleetNode) error {
	if len(nodes) == 0 {
		_, err := fmt.Fprintln(w, "no node has reported yet")
		return err
	}
	up, behind, trouble := 0, 0, 0
	var rows [][]string
	for _, n := range nodes {
		release := cmp.Or(n.ObservedRelease, "-")
		if n.DesiredRelease != "" && n.DesiredRelease != n.ObservedRelease {
			release += " -> " + n.DesiredRelease
			behind++
		}
		if n.State == "up" {
			up++
		}
		audit := "complete"
		if n.Gaps > 0 || n.Conflicts > 0 {
			audit = fmt.Sprintf("gaps %d, conflicts %d", n.Gaps, n.Conflicts)
			trouble++
		}
		rows = append(rows, []string{
			clipTo(n.NodeID, 20), n.State, clipTo(release, 24), cmp.Or(clipTo(n.PolicyRef, 18), "-"), strconv.FormatUint(n.LastSeq, 10), audit, since(n.LastSeen),
		})
	}
	if err := printTable(w, []string{"NODE", "STATE", "RELEASE", "POLICY", "RECORDS", "AUDIT", "HEARD"}, rows); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "%s, %d up, %d behind, %d with gaps or conflicts\n", count(len(nodes), "node"), up, behind, trouble)
	return err
}

func printNode(w io.Writer, n *fleetNode) error {
	last := "none"
	if a := n.LastAck; a != nil {
		last = strings.TrimSpace(fmt.Sprintf("%s %s %s %s %s", a.ReleaseID, a.Step, a.Result, a.Code, a.Detail))
	}
	for _, row := range [][2]string{
		{"node", n.NodeID}, {"state", n.State + ", heard " + since(n.LastSeen)}, {"channel", cmp.Or(n.Channel, "-")},
		{"desired", cmp.Or(n.DesiredRelease, "-")}, {"observed", cmp.Or(n.ObservedRelease, "-")},
		{"fingerprint", cmp.Or(n.Fingerprint, "-")}, {"policy", cmp.Or(n.PolicyRef, "-")},
		{"version", cmp.Or(n.Version, "-")}, {"assurance", cmp.Or(n.Assurance, "-")},
		{"log", fmt.Sprintf("%s, last %d, complete to %d", cmp.Or(n.LogID, "-"), n.LastSeq, n.Watermark)},
		{"audit", fmt.Sprintf("gaps %d, missing %d, conflicts %d", n.Gaps, n.Missing, n.Conflicts)},
		{"last report", last},
	} {
		if _, err := fmt.Fprintf(w, "%-12s %s\n", row[0], printable(row[1])); err != nil {
			return err
		}
	}
	return nil
}

// since is how long ago t was, by this machine's clock.
func since(t time.Time) string {
	d := time.Since(t)
	switch {
	case t.IsZero():
		return "never"
	case d < 0:
		return "now"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", int(d.Hours()))
	}
	return fmt.Sprintf("%dd ago", int(d.Hours()/24))
}

// clipTo cuts s to n runes.
func clipTo(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}
