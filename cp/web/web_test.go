package web

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/cp/store/sqlite"
	"github.com/autonomyops/autonomy/cp/store/storetest"
	"github.com/autonomyops/autonomy/internal/event"
)

func get(t *testing.T, h http.Handler, path string) *http.Response {
	t.Helper()
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), "GET", path, nil))
	return rec.Result()
}

func body(t *testing.T, r *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func newPages(t *testing.T) (store.Store, http.Handler) {
	t.Helper()
	st, err := sqlite.Open(t.Context(), sqlite.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return st, New(st, time.Minute, func() time.Time { return storetest.Start.Add(10 * time.Second) }, slog.New(slog.DiscardHandler))
}

func TestEmpty(t *testing.T) {
	_, h := newPages(t)
	r := get(t, h, "/")
	b := body(t, r)
	for _, want := range []string{"No node has reported yet", "No decision has been recorded yet", "Nothing has been released yet"} {
		if !strings.Contains(b, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if r.StatusCode != 200 || r.Header.Get("Content-Security-Policy") != policy {
		t.Errorf("status %d, policy %q", r.StatusCode, r.Header.Get("Content-Security-Policy"))
	}
}

// TestHostile: what nodes and agents say is text, never markup.
func TestHostile(t *testing.T) {
	st, h := newPages(t)
	e := storetest.Make(`<img src=x onerror=alert(1)>`, storetest.LogA, 3)
	e.Kind = `"><script>alert(2)</script>`
	e.AuditID = `' onmouseover='alert(3)`
	e.Body = []byte(`{"reasons":[{"message":"</td><script src=//evil.example></script>"},{"code":"only_code"}],"policy_ref":"<b>p</b>"}`)
	odd := storetest.Make("n2", storetest.LogB, 1)
	odd.Body = []byte(`{"reasons":"not a list"}`)
	if _, err := st.AppendEvents(t.Context(), []event.Event{e, odd}); err != nil {
		t.Fatal(err)
	}
	if _, err := st.PutRelease(t.Context(), storetest.Release("stable", 1)); err != nil {
		t.Fatal(err)
	}
	b := body(t, get(t, h, "/"))
	if m := regexp.MustCompile(`(?i)<(script|b>|img src=x)|style=|'\s*onmouseover=`).FindString(b); m != "" {
		t.Errorf("the page contains %q", m)
	}
	for _, want := range []string{"&lt;img src=x onerror=alert(1)&gt;", "only_code", "stable-1", `class="pill deny"`, `class="pill allow"`, `class="pill up"`} {
		if !strings.Contains(b, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
}

// TestSelfContained: every address on the page is served here, and nothing is
// loaded from elsewhere.
func TestSelfContained(t *testing.T) {
	_, h := newPages(t)
	b := body(t, get(t, h, "/"))
	for _, m := range regexp.MustCompile(`(?:href|src)="([^"]*)"`).FindAllStringSubmatch(b, -1) {
		switch url := m[1]; {
		case strings.HasPrefix(url, "#"):
			if !strings.Contains(b, `id="`+url[1:]+`"`) {
				t.Errorf("nothing has the id of %s", url)
			}
		case strings.HasPrefix(url, "/assets/"):
			if r := get(t, h, url); r.StatusCode != 200 || strings.HasPrefix(r.Header.Get("Content-Type"), "text/plain") {
				t.Errorf("%s: %d %s", url, r.StatusCode, r.Header.Get("Content-Type"))
			}
		case strings.HasPrefix(url, "//"), strings.Contains(url, ":"):
			t.Errorf("the page refers to %s", url)
		}
	}
	for _, path := range []string{"/assets/", "/assets/nope.css", "/assets/..%2fpage.html", "/page.html"} {
		if r := get(t, h, path); r.StatusCode != 404 {
			t.Errorf("%s: %d, want 404", path, r.StatusCode)
		}
	}
}

func TestStoreGone(t *testing.T) {
	st, h := newPages(t)
	if err := st.Close(); err != nil && !errors.Is(err, store.ErrClosed) {
		t.Fatal(err)
	}
	if r := get(t, h, "/"); r.StatusCode != 503 || strings.Contains(body(t, r), "sql") {
		t.Errorf("status %d", r.StatusCode)
	}
}

func TestAgo(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for d, want := range map[time.Duration]string{
		0: "now", 30 * time.Second: "30 s ago", 10 * time.Minute: "10 min ago", 5 * time.Hour: "5 h ago", 72 * time.Hour: "3 days ago", -time.Hour: "ahead of the clock",
	} {
		if got := ago(now, now.Add(-d)); got != want {
			t.Errorf("%s: %q, want %q", d, got, want)
		}
	}
	if got := ago(now, time.Time{}); got != "never" {
		t.Errorf("zero time: %q", got)
	}
}
