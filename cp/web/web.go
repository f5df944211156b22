// Package web is the control plane's page for people: rendered on the server,
// styled by one embedded sheet, no script. It reads the store and changes
// nothing.
//
// What is shown came from nodes and agents and is hostile until escaped:
// html/template does that, and the content security policy allows no script,
// no inline style and no other origin. Only cp imports this package.
package web

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"html/template"
	"log/slog"
	"net/http"
	"path"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/run"
)

//go:embed page.html assets/style.css assets/icon.svg
var files embed.FS

// Rows of each table of the page; the API has the rest.
const (
	maxNodes     = 200
	maxDecisions = 50
	maxReleases  = 20
	readTimeout  = 10 * time.Second
)

const policy = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

var page = template.Must(template.New("page.html").Funcs(template.FuncMap{"short": short, "tail": tail, "bytes": humanBytes}).ParseFS(files, "page.html"))

// New returns the handler of "/" and "/assets/".
func New(st store.Store, staleAfter time.Duration, now func() time.Time, log *slog.Logger) http.Handler {
	p := &pages{st: st, staleAfter: staleAfter, now: now, log: log}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", p.overview)
	mux.HandleFunc("GET /assets/{file}", p.asset)
	return mux
}

type pages struct {
	st         store.Store
	staleAfter time.Duration
	now        func() time.Time
	log        *slog.Logger
}

func (p *pages) asset(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("file")
	data, err := files.ReadFile("assets/" + name) // a name with .. in it is no valid path there
	if err != nil {
		http.NotFound(w, r)
		return
	}
	ct := "text/css; charset=utf-8"
	if strings.HasSuffix(name, ".svg") {
		ct = "image/svg+xml"
	}
	w.Header().Set("Content-Type", ct)
	w.Header().Set("Cache-Control", "max-age=300")
	_, _ = w.Write(data) // the browser went away: nobody is left to tell
}

// nodeRow, decisionRow and releaseRow are what the template shows.
type nodeRow struct {
	store.Node
	State, Seen, Release, Want, Trouble string
}

type decisionRow struct {
	At, Ago, Node, Kind, Decision, Why, AuditID string
}

type releaseRow struct {
	ID, Channel, Policy, Published, Verified string
	Sequence                                 uint64
	Current                                  bool
}

type view struct {
	Version, Now string
	Summary      store.Summary
	Stats        store.Stats
	Nodes        []nodeRow
	MoreNodes    bool
	Decisions    []decisionRow
	Allowed      int
	Denied       int
	Pending      int
	Releases     []releaseRow
}

func (p *pages) overview(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), readTimeout)
	defer cancel()
	v, err := p.read(ctx)
	var b bytes.Buffer
	if err == nil {
		err = page.Execute(&b, v)
	}
	h := w.Header()
	h.Set("Content-Security-Policy", policy)
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	if err != nil {
		p.log.Error("web page failed", "error", err)
		http.Error(w, "The store could not be read. The control plane's log says why.", http.StatusServiceUnavailable)
		return
	}
	h.Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(b.Bytes()) // the browser went away: nobody is left to tell
}

func (p *pages) read(ctx context.Context) (*view, error) {
	now := p.now().UTC()
	v := &view{Version: run.Version, Now: now.Format("2006-01-02 15:04:05"), Stats: p.st.Stats()}
	var err error
	if v.Summary, err = p.st.Summary(ctx, now, p.staleAfter); err != nil {
		return nil, err
	}
	nodes, err := p.st.Nodes(ctx, "", maxNodes)
	if err != nil {
		return nil, err
	}
	v.MoreNodes = v.Summary.Nodes > len(nodes)
	for i := range nodes {
		v.Nodes = append(v.Nodes, p.node(&nodes[i], now))
	}
	events, _, _, err := p.st.QueryEvents(ctx, store.Filter{EventType: event.Decision}, store.Cursor{}, maxDecisions)
	if err != nil {
		return nil, err
	}
	for i := range events {
		d := decision(&events[i], now)
		switch d.Decision {
		case "allow":
			v.Allowed++
		case "pending":
			v.Pending++
		default:
			v.Denied++
		}
		v.Decisions = append(v.Decisions, d)
	}
	releases, _, err := p.st.ListReleases(ctx, "", 0, maxReleases)
	if err != nil {
		return nil, err
	}
	current := map[string]bool{}
	for i := range releases {
		rel := release(&releases[i], now)
		rel.Current = !current[rel.Channel] // newest first
		current[rel.Channel] = true
		v.Releases = append(v.Releases, rel)
	}
	return v, nil
}

func (p *pages) node(n *store.Node, now time.Time) nodeRow {
	row := nodeRow{Node: *n, State: n.State(now, p.staleAfter), Seen: ago(now, n.LastSeen), Release: n.ObservedRelease}
	if n.DesiredRelease != n.ObservedRelease {
		row.Want = n.DesiredRelease
	}
	var trouble []string
	if n.Gaps > 0 {
		trouble = append(trouble, fmt.Sprintf("%d %s, %d missing", n.Gaps, plural(n.Gaps, "gap"), n.Missing))
	}
	if n.Conflicts > 0 {
		trouble = append(trouble, fmt.Sprintf("%d %s", n.Conflicts, plural(n.Conflicts, "conflict")))
	}
	if a := n.LastAck; a != nil && (a.Result == "failed" || a.Result == "refused") {
		trouble = append(trouble, strings.TrimSpace("release "+a.ReleaseID+" refused: "+a.Step+" "+a.Code))
	}
	row.Trouble = strings.Join(trouble, "; ")
	return row
}

func decision(e *store.Event, now time.Time) decisionRow {
	var body event.DecisionBody
	why := ""
	if json.Unmarshal(e.Body, &body) == nil { // a node's word: what does not fit is not shown
		var parts []string
		for _, r := range body.Reasons {
			switch {
			case r.Message != "":
				parts = append(parts, r.Message)
			case r.Code != "":
				parts = append(parts, r.Code)
			}
		}
		why = strings.Join(parts, "; ")
		if body.DryRun {
			why = strings.TrimSpace("(dry run) " + why)
		}
	}
	if len(why) > 300 {
		why = strings.ToValidUTF8(why[:300], "") + "…"
	}
	return decisionRow{
		At: e.Timestamp.Format("2006-01-02 15:04:05 UTC"), Ago: ago(now, e.Timestamp), Node: e.NodeID, Kind: e.Kind,
		Decision: e.Decision, Why: why, AuditID: e.AuditID,
	}
}

func release(r *store.Release, now time.Time) releaseRow {
	var st struct {
		Policy struct {
			Ref string `json:"ref"`
		} `json:"policy"`
	}
	_ = json.Unmarshal(r.Statement, &st) // was checked when it was published
	row := releaseRow{
		ID: r.ReleaseID, Channel: r.Channel, Sequence: r.Sequence, Policy: path.Base(st.Policy.Ref),
		Published: ago(now, r.PublishedAt), Verified: "by nodes only",
	}
	if r.VerifiedBy != "" {
		row.Verified = "here and by nodes"
	}
	return row
}

// ago is a distance in time as people say it.
func ago(now, t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	d := now.Sub(t)
	switch {
	case d < -2*time.Second:
		return "ahead of the clock"
	case d < 2*time.Second:
		return "now"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}

func plural(n uint64, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}

// short cuts a long identifier in the middle of nothing: its start tells it apart.
func short(s string) string {
	if i := strings.IndexByte(s, ':'); i > 0 && i < 8 && len(s) > i+13 {
		return s[:i+13] + "…"
	}
	if len(s) > 28 {
		return strings.ToValidUTF8(s[:27], "") + "…"
	}
	return s
}

// tail keeps the end of an audit id: the start names the log and is the same in
// every row of a node, the end counts.
func tail(id string) string {
	if _, seq, ok := strings.Cut(id, "-"); ok && len(seq) == 16 {
		id = "…" + seq[8:]
	}
	return short(id)
}

func humanBytes(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d KiB", n>>10)
}
