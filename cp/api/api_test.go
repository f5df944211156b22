package api

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/cp/store"
	"github.com/autonomyops/autonomy/cp/store/sqlite"
	"github.com/autonomyops/autonomy/cp/store/storetest"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/verify"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a control plane on a loopback listener with an empty store.
type rig struct {
	t   *testing.T
	st  *sqlite.Store
	api *Server
	srv *httptest.Server
}

func newRig(t *testing.T, o Options, so ...sqlite.Options) *rig {
	t.Helper()
	opts := sqlite.Options{}
	if len(so) > 0 {
		opts = so[0]
	}
	opts.Dir = t.TempDir()
	st, err := sqlite.Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	o.Store = st
	r := &rig{t: t, st: st, api: New(o)}
	r.srv = httptest.NewServer(r.api)
	t.Cleanup(func() {
		r.api.Drain()
		r.srv.Close()
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

type answer struct {
	status int
	header http.Header
	body   []byte
}

// code is the problem's code.
func (a answer) code() string {
	var p struct{ Code, Detail string }
	if a.header.Get("Content-Type") != "application/problem+json" || json.Unmarshal(a.body, &p) != nil {
		return "no problem: " + string(a.body)
	}
	return p.Code
}

func (r *rig) do(method, path string, body []byte, header ...string) answer {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, r.srv.URL+path, bytes.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			req.Host = header[i+1]
		} else {
			req.Header.Set(header[i], header[i+1])
		}
	}
	resp, err := r.srv.Client().Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, b}
}

func (r *rig) post(path, body string, header ...string) answer {
	r.t.Helper()
	return r.do("POST", path, []byte(body), append([]string{"Content-Type", "application/json"}, header...)...)
}

func (r *rig) get(path string, out any, header ...string) answer {
	r.t.Helper()
	a := r.do("GET", path, nil, header...)
	if out != nil {
		if a.status != 200 {
			r.t.Fatalf("GET %s: %d %s", path, a.status, a.body)
		}
		if err := json.Unmarshal(a.body, out); err != nil {
			r.t.Fatalf("GET %s: %v in %s", path, err, a.body)
		}
	}
	return a
}

// state is all that a refused request must leave as it was.
func (r *rig) state() string {
	r.t.Helper()
	events := storetest.All(r.t, r.st, store.Filter{}, 1000)
	releases, _, err := r.st.ListReleases(context.Background(), "", 0, 1000)
	if err != nil {
		r.t.Fatal(err)
	}
	nodes, err := r.st.Nodes(context.Background(), "", 1000)
	if err != nil {
		r.t.Fatal(err)
	}
	for i := range nodes {
		if a := nodes[i].LastAck; a != nil {
			nodes[i].PolicyRef += fmt.Sprint(*a)
			nodes[i].LastAck = nil
		}
	}
	return fmt.Sprintf("%+v %+v %+v", events, releases, nodes)
}

func native(events ...event.Event) string {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(map[string]any{"events": events}); err != nil {
		panic(err)
	}
	return strings.TrimSpace(b.String())
}

func gz(b []byte) []byte {
	var out bytes.Buffer
	zw := gzip.NewWriter(&out)
	_, _ = zw.Write(b)
	_ = zw.Close()
	return out.Bytes()
}

func newKey(t *testing.T) (ed25519.PrivateKey, *verify.Keyring) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pemKey, err := verify.MarshalPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	kr, err := verify.NewKeyring(&verify.Key{PublicKey: string(pemKey), Usages: []verify.Usage{verify.UsageRelease}})
	if err != nil {
		t.Fatal(err)
	}
	return key, kr
}

func statement(channel string, seq uint64) *verify.Release {
	sha := "sha256:" + strings.Repeat("ab", 32)
	return &verify.Release{
		Schema: verify.ReleaseSchema, ReleaseID: fmt.Sprintf("%s-%d", channel, seq), Channel: channel, Sequence: seq,
		Agent: verify.ReleaseAgent{Image: "registry.example/agent@" + sha}, Lock: sha,
		Policy:      verify.ReleasePolicy{Ref: "registry.example/policy:1.4.2", Digest: sha},
		Fingerprint: "blake3:" + strings.Repeat("cd", 32),
		CreatedAt:   time.Now().Add(-time.Minute).UTC().Truncate(time.Second), ExpiresAt: time.Now().Add(time.Hour).UTC().Truncate(time.Second),
	}
}

func envelope(t *testing.T, key ed25519.PrivateKey, r *verify.Release) string {
	t.Helper()
	b, err := verify.SignRelease(r, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestRoutesHavePermission: a route without one must not start, and every route
// is enforced on a listener where nobody is local.
func TestRoutesHavePermission(t *testing.T) {
	r := newRig(t, Options{})
	for _, rt := range routes {
		if rt.perm == noPermission {
			t.Errorf("%s %s has no permission", rt.method, rt.path)
		}
		path := strings.NewReplacer("{id}", "x", "{file}", "style.css", "{$}", "").Replace(rt.path)
		req := httptest.NewRequest(rt.method, "http://127.0.0.1"+path, nil) // no local address: not a loopback connection
		rec := httptest.NewRecorder()
		r.api.ServeHTTP(rec, req)
		if (rec.Code == http.StatusUnauthorized) != (rt.perm != Public) {
			t.Errorf("%s %s for a stranger: status %d with permission %d", rt.method, rt.path, rec.Code, rt.perm)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("a table with a route without permission was accepted")
		}
	}()
	r.api.mux([]route{{method: "GET", path: "/x"}})
}

func TestHostAndOrigin(t *testing.T) {
	r := newRig(t, Options{AllowedHosts: []string{"cp.internal"}})
	for _, tt := range []struct {
		name   string
		header []string
		want   int
	}{
		{"plain", nil, 200},
		{"localhost", []string{"Host", "localhost:8888"}, 200},
		{"IPv6 loopback", []string{"Host", "[::1]:8888"}, 200},
		{"allowed", []string{"Host", "CP.internal:8888"}, 200},
		{"rebound name", []string{"Host", "evil.example"}, 403},
		{"rebound with port", []string{"Host", "evil.example:8888"}, 403},
		{"looks like loopback", []string{"Host", "127.0.0.1.evil.example"}, 403},
		{"foreign origin", []string{"Origin", "http://evil.example"}, 403},
		{"null origin", []string{"Origin", "null"}, 403},
		{"own origin", []string{"Host", "127.0.0.1:1", "Origin", "http://127.0.0.1:1"}, 200},
		{"cross-site fetch", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors"}, 403},
		{"link from elsewhere", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, 200},
		{"frame from elsewhere", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"}, 403},
	} {
		if a := r.do("GET", "/healthz", nil, tt.header...); a.status != tt.want {
			t.Errorf("%s: status %d, want %d", tt.name, a.status, tt.want)
		}
	}
}

// TestBadInput: what is wrong is refused with its code, and nothing changes.
func TestBadInput(t *testing.T) {
	key, _ := newKey(t)
	r := newRig(t, Options{MaxBodyBytes: 256 << 10})
	good := storetest.Make("n1", storetest.LogA, 1)
	if a := r.post("/v1/events", native(good)); a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	if a := r.post("/v1/releases", envelope(t, key, statement("stable", 5))); a.status != 201 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	if a := r.post("/v1/nodes/n1/ack", `{"release_id":"stable-5","step":"signature","result":"passed"}`); a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	before := r.state()

	ev := func(change string) string { // one event with a part replaced
		old, repl, _ := strings.Cut(change, " => ")
		s := native(storetest.Make("n1", storetest.LogA, 2))
		if !strings.Contains(s, old) {
			t.Fatalf("%q is not in %s", old, s)
		}
		return strings.Replace(s, old, repl, 1)
	}
	env := envelope(t, key, statement("stable", 6))
	reseal := func(payload string) string {
		return `{"payloadType":"` + verify.ReleaseMediaType + `","payload":"` + base64.StdEncoding.EncodeToString([]byte(payload)) + `","signatures":[{"keyid":"k","sig":"AAAA"}]}`
	}
	withID := func(ch string, seq uint64, id string) string {
		s := statement(ch, seq)
		s.ReleaseID = id
		return envelope(t, key, s)
	}
	for _, tt := range []struct {
		name, method, path, body string
		header                   []string
		status                   int
		code                     string
	}{
		{"empty", "POST", "/v1/events", "", nil, 400, "bad_json"},
		{"truncated", "POST", "/v1/events", native(good)[:60], nil, 400, "bad_json"},
		{"trailing data", "POST", "/v1/events", native(good) + "{}", nil, 400, "bad_json"},
		{"not an object", "POST", "/v1/events", "[]", nil, 400, "bad_json"},
		{"no events", "POST", "/v1/events", "{}", nil, 400, "bad_json"},
		{"events is an object", "POST", "/v1/events", `{"events":{}}`, nil, 400, "bad_json"},
		{"events is null", "POST", "/v1/events", `{"events":null}`, nil, 400, "bad_json"},
		{"unknown key", "POST", "/v1/events", `{"events":[],"extra":1}`, nil, 400, "bad_json"},
		{"duplicate key", "POST", "/v1/events", `{"events":[],"events":[]}`, nil, 400, "bad_json"},
		{"invalid UTF-8", "POST", "/v1/events", ev("tool.echo => \xff\xfe"), nil, 400, "bad_json"},
		{"deep", "POST", "/v1/events", `{"events":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`, nil, 400, "bad_json"},
		{"event of wrong type", "POST", "/v1/events", `{"events":[3]}`, nil, 400, "invalid_event"},
		{"seq of wrong type", "POST", "/v1/events", ev(`"seq":2 => "seq":"2"`), nil, 400, "invalid_event"},
		{"seq negative", "POST", "/v1/events", ev(`"seq":2 => "seq":-2`), nil, 400, "invalid_event"},
		{"seq too large", "POST", "/v1/events", ev(`"seq":2 => "seq":18446744073709551615`), nil, 400, "invalid_event"},
		{"unknown key in event", "POST", "/v1/events", ev(`"kind" => "Kind"`), nil, 400, "invalid_event"},
		{"duplicate key in event", "POST", "/v1/events", ev(`"kind": => "node_id":"n2","kind":`), nil, 400, "bad_json"},
		{"bad time", "POST", "/v1/events", ev(`2026-01-02 => 2026-13-02`), nil, 400, "invalid_event"},
		{"body is a string", "POST", "/v1/events", ev(`"body":{ => "body":"x","trace_id":"","x":{`), nil, 400, "invalid_event"},
		{"body is null", "POST", "/v1/events", `{"events":[{"event_id":"a","event_type":"b","node_id":"c","timestamp":"2026-01-02T03:04:05Z","body":null}]}`, nil, 400, "invalid_event"},
		{"body is an array", "POST", "/v1/events", `{"events":[{"event_id":"a","event_type":"b","node_id":"c","timestamp":"2026-01-02T03:04:05Z","body":[]}]}`, nil, 400, "invalid_event"},
		{"one bad of two", "POST", "/v1/events", `{"events":[` + native(storetest.Make("n1", storetest.LogA, 2))[11:] + `,`, nil, 400, "bad_json"},
		{"second event bad", "POST", "/v1/events", native(storetest.Make("n1", storetest.LogA, 2), event.Event{EventID: "x"}), nil, 400, "invalid_event"},
		{"name of another record", "POST", "/v1/events", ev(`-0000000000000002 => -0000000000000003`), nil, 400, "invalid_event"},
		{"oversized", "POST", "/v1/events", `{"events":[` + strings.Repeat(" ", 300<<10) + `]}`, nil, 413, "body_too_large"},
		{"no media type", "POST", "/v1/events", native(good), []string{"Content-Type", ""}, 415, "unsupported_media_type"},
		{"form", "POST", "/v1/events", "a=b", []string{"Content-Type", "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"},
		{"text", "POST", "/v1/events", native(good), []string{"Content-Type", "text/plain"}, 415, "unsupported_media_type"},
		{"latin-1", "POST", "/v1/events", native(good), []string{"Content-Type", "application/json; charset=iso-8859-1"}, 415, "unsupported_media_type"},
		{"zstd", "POST", "/v1/events", native(good), []string{"Content-Encoding", "zstd"}, 415, "unsupported_encoding"},
		{"not gzip", "POST", "/v1/events", native(good), []string{"Content-Encoding", "gzip"}, 400, "bad_body"},
		{"gzip cut", "POST", "/v1/events", string(gz([]byte(native(good)))[:40]), []string{"Content-Encoding", "gzip"}, 400, "bad_body"},
		{"gzip of too much", "POST", "/v1/events", string(gz(bytes.Repeat([]byte(" "), 1<<20))), []string{"Content-Encoding", "gzip"}, 413, "body_too_large"},
		{"OTLP noise", "POST", "/v1/events", "\x0a\xff\xff", []string{"Content-Type", "application/x-protobuf"}, 400, "bad_otlp"},
		{"OTLP JSON wrong shape", "POST", "/v1/events", `{"resourceLogs":{}}`, nil, 400, "bad_otlp"},
		{"OTLP JSON duplicate key", "POST", "/v1/events", `{"resourceLogs":[],"resourceLogs":[]}`, nil, 400, "bad_otlp"},
		{"OTLP JSON bad trace id", "POST", "/v1/events", `{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"traceId":"zz"}]}]}]}`, nil, 400, "bad_otlp"},
		{"method", "PUT", "/v1/events", "", nil, 405, "method_not_allowed"},
		{"delete a release", "DELETE", "/v1/releases/stable-5", "", nil, 405, "method_not_allowed"},
		{"no such path", "GET", "/v1/nothing", "", nil, 404, "no_such_path"},

		{"unknown parameter", "GET", "/v1/events?node=n1", "", nil, 400, "unknown_parameter"},
		{"repeated parameter", "GET", "/v1/events?node_id=a&node_id=b", "", nil, 400, "repeated_parameter"},
		{"bad escape", "GET", "/v1/events?node_id=%zz", "", nil, 400, "bad_query"},
		{"limit 0", "GET", "/v1/events?limit=0", "", nil, 400, "bad_limit"},
		{"limit 1001", "GET", "/v1/events?limit=1001", "", nil, 400, "bad_limit"},
		{"limit word", "GET", "/v1/events?limit=all", "", nil, 400, "bad_limit"},
		{"bad since", "GET", "/v1/events?since=yesterday", "", nil, 400, "bad_time"},
		{"bad cursor", "GET", "/v1/events?cursor=AAAA", "", nil, 400, "bad_cursor"},
		{"long parameter", "GET", "/v1/events?node_id=" + strings.Repeat("n", 200), "", nil, 400, "bad_parameter"},

		{"envelope empty", "POST", "/v1/releases", "", nil, 400, "bad_envelope"},
		{"envelope truncated", "POST", "/v1/releases", env[:100], nil, 400, "bad_envelope"},
		{"envelope unknown key", "POST", "/v1/releases", strings.Replace(env, `{"payloadType`, `{"x":1,"payloadType`, 1), nil, 400, "bad_envelope"},
		{"envelope duplicate key", "POST", "/v1/releases", strings.Replace(env, `{"payloadType`, `{"payload":"","payloadType`, 1), nil, 400, "bad_envelope"},
		{"envelope of another type", "POST", "/v1/releases", strings.Replace(env, "release.v0", "lock.v0", 1), nil, 400, "bad_envelope"},
		{"envelope not base64", "POST", "/v1/releases", strings.Replace(env, `"payload":"`, `"payload":"***`, 1), nil, 400, "bad_envelope"},
		{"envelope unsigned", "POST", "/v1/releases", env[:strings.Index(env, `"signatures"`)] + `"signatures":[]}`, nil, 400, "bad_envelope"},
		{"statement empty", "POST", "/v1/releases", reseal(`{}`), nil, 400, "bad_release"},
		{"statement not JSON", "POST", "/v1/releases", reseal(`xx`), nil, 400, "bad_release"},
		{"envelope oversized", "POST", "/v1/releases", env + strings.Repeat(" ", 70<<10), nil, 413, "body_too_large"},
		{"envelope as text", "POST", "/v1/releases", env, []string{"Content-Type", "text/plain"}, 415, "unsupported_media_type"},
		{"sequence lower", "POST", "/v1/releases", withID("stable", 4, "lower"), nil, 409, "sequence_not_higher"},
		{"sequence equal", "POST", "/v1/releases", withID("stable", 5, "equal"), nil, 409, "sequence_not_higher"},
		{"id taken", "POST", "/v1/releases", withID("stable", 9, "stable-5"), nil, 409, "release_conflict"},
		{"no release", "GET", "/v1/releases/latest?channel=empty", "", nil, 404, "no_release"},
		{"unknown release", "GET", "/v1/releases/none", "", nil, 404, "not_found"},
		{"bad wait", "GET", "/v1/releases/latest?wait=soon", "", nil, 400, "bad_wait"},
		{"negative wait", "GET", "/v1/releases/latest?wait=-1s", "", nil, 400, "bad_wait"},

		{"ack empty", "POST", "/v1/nodes/n1/ack", "", nil, 400, "bad_json"},
		{"ack unknown key", "POST", "/v1/nodes/n1/ack", `{"release":"stable-5"}`, nil, 400, "bad_json"},
		{"ack duplicate key", "POST", "/v1/nodes/n1/ack", `{"step":"a","step":"b"}`, nil, 400, "bad_json"},
		{"ack no release", "POST", "/v1/nodes/n1/ack", `{"step":"signature","result":"passed"}`, nil, 400, "bad_ack"},
		{"ack no step", "POST", "/v1/nodes/n1/ack", `{"release_id":"stable-5","result":"passed"}`, nil, 400, "bad_ack"},
		{"ack bad result", "POST", "/v1/nodes/n1/ack", `{"release_id":"stable-5","step":"signature","result":"maybe"}`, nil, 400, "bad_ack"},
		{"ack detail too long", "POST", "/v1/nodes/n1/ack", `{"release_id":"stable-5","step":"signature","result":"failed","detail":"` + strings.Repeat("d", 5000) + `"}`, nil, 400, "bad_ack"},
		{"ack oversized", "POST", "/v1/nodes/n1/ack", `{"detail":"` + strings.Repeat("d", 40<<10) + `"}`, nil, 413, "body_too_large"},
		{"ack unknown release", "POST", "/v1/nodes/n1/ack", `{"release_id":"none","step":"signature","result":"passed"}`, nil, 404, "not_found"},
		{"ack of a hostile node", "POST", "/v1/nodes/a%1bb/ack", `{"release_id":"stable-5","step":"signature","result":"passed"}`, nil, 400, "bad_node_id"},
		{"watermark unknown", "GET", "/v1/nodes/none/watermark", "", nil, 404, "not_found"},
		{"watermark parameter", "GET", "/v1/nodes/n1/watermark?log=x", "", nil, 400, "unknown_parameter"},
		{"fleet parameter", "GET", "/v1/fleet?state=up", "", nil, 400, "unknown_parameter"},
	} {
		header := tt.header
		if tt.method == "POST" && (len(header) == 0 || header[0] != "Content-Type") {
			header = append([]string{"Content-Type", "application/json"}, header...)
		}
		a := r.do(tt.method, tt.path, []byte(tt.body), header...)
		if a.status != tt.status || a.code() != tt.code {
			t.Errorf("%s: %d %s, want %d %s\n%s", tt.name, a.status, a.code(), tt.status, tt.code, a.body)
		}
	}
	if after := r.state(); after != before {
		t.Errorf("state changed:\nbefore %s\nafter  %s", before, after)
	}
}

func TestEventsRoundTrip(t *testing.T) {
	r := newRig(t, Options{})
	events := storetest.Records("n1", storetest.LogA, 1, 25)
	var in struct{ Received, Inserted, Deduped, Conflicts int }
	for i, body := range []string{native(events...), string(gz([]byte(native(events...))))} {
		enc := []string{"", "gzip"}[i]
		a := r.post("/v1/events", body, "Content-Encoding", enc)
		if err := json.Unmarshal(a.body, &in); err != nil || a.status != 200 {
			t.Fatalf("%d %s", a.status, a.body)
		}
		if want := []int{25, 0}[i]; in.Received != 25 || in.Inserted != want || in.Deduped != 25-want {
			t.Errorf("delivery %d: %+v", i+1, in)
		}
	}
	forged := events[3]
	forged.Decision = "deny"
	if a := r.post("/v1/events", native(forged)); !bytes.Contains(a.body, []byte(`"conflicts":1`)) {
		t.Errorf("conflict: %s", a.body)
	}

	var got []string
	for path := "/v1/events?node_id=n1&limit=10"; ; {
		var page struct {
			Events     []event.Event `json:"events"`
			NextCursor string        `json:"next_cursor"`
		}
		var loose struct {
			Events []json.RawMessage `json:"events"`
		}
		a := r.get(path, &page)
		if err := json.Unmarshal(a.body, &loose); err != nil {
			t.Fatal(err)
		}
		for i, e := range page.Events {
			got = append(got, e.EventID)
			if !bytes.Contains(loose.Events[i], []byte(`"received_at"`)) {
				t.Fatalf("no received_at: %s", loose.Events[i])
			}
			if want := events[e.Seq-1]; !reflect.DeepEqual(e, want) {
				t.Fatalf("have %+v\nwant %+v", e, want)
			}
		}
		if page.NextCursor == "" {
			break
		}
		path = "/v1/events?node_id=n1&limit=10&cursor=" + page.NextCursor
	}
	if len(got) != 25 || got[0] != events[24].EventID {
		t.Errorf("pages gave %d events from %s", len(got), got[0])
	}
	if a := r.get("/v1/events?node_id=none", nil); strings.TrimSpace(string(a.body)) != `{"events":[]}` {
		t.Errorf("nothing found: %s", a.body)
	}

	var mark struct {
		NodeID string `json:"node_id"`
		LogID  string `json:"log_id"`
		Seq    uint64 `json:"seq"`
	}
	r.get("/v1/nodes/n1/watermark?log_id="+storetest.LogA, &mark)
	if mark.Seq != 25 || mark.LogID != storetest.LogA || mark.NodeID != "n1" {
		t.Errorf("watermark %+v", mark)
	}
	var fleet struct{ Nodes []map[string]any }
	r.get("/v1/fleet", &fleet)
	if n := fleet.Nodes[0]; n["conflicts"] != 1.0 || n["gaps"] != 0.0 || n["last_seq"] != 25.0 || n["state"] != "stale" || n["policy_ref"] != "quickstart@1.0.0" {
		t.Errorf("fleet: %v", n)
	}
}

func TestStream(t *testing.T) {
	r := newRig(t, Options{})
	for first := uint64(1); first <= 2500; first += 500 {
		if a := r.post("/v1/events", native(storetest.Records("n1", storetest.LogA, first, first+499)...)); a.status != 200 {
			t.Fatal(a.status)
		}
	}
	a := r.get("/v1/events?node_id=n1", nil, "Accept", "application/x-ndjson")
	lines := bytes.Split(bytes.TrimSpace(a.body), []byte("\n"))
	if len(lines) != 2500 || a.header.Get("Content-Type") != "application/x-ndjson" {
		t.Fatalf("%d lines, %s", len(lines), a.header.Get("Content-Type"))
	}
	for i, line := range lines {
		var e event.Event
		if err := json.Unmarshal(line, &e); err != nil || e.Seq != uint64(2500-i) {
			t.Fatalf("line %d: %v %s", i, err, line)
		}
	}
	a = r.get("/v1/events?limit=7", nil, "Accept", "application/x-ndjson")
	if n := bytes.Count(a.body, []byte("\n")); n != 7 {
		t.Errorf("with limit=7: %d lines", n)
	}
}

func TestReleaseFlow(t *testing.T) {
	key, kr := newKey(t)
	r := newRig(t, Options{Keyring: kr})
	stranger, _ := newKey(t)
	if a := r.post("/v1/releases", envelope(t, stranger, statement("stable", 1))); a.status != 422 || a.code() != verify.CodeSigInvalid {
		t.Errorf("signed by a stranger: %d %s", a.status, a.body)
	}
	old := statement("stable", 1)
	old.CreatedAt, old.ExpiresAt = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	if a := r.post("/v1/releases", envelope(t, key, old)); a.status != 422 || a.code() != verify.CodeExpired {
		t.Errorf("expired: %d %s", a.status, a.body)
	}
	env := envelope(t, key, statement("stable", 1))
	for i, want := range []int{201, 200} {
		a := r.post("/v1/releases", env)
		if a.status != want || !bytes.Contains(a.body, []byte(`"verified":true`)) || a.header.Get("Location") != "/v1/releases/stable-1" {
			t.Errorf("publication %d: %d %s, want %d", i+1, a.status, a.body, want)
		}
	}
	a := r.get("/v1/releases/latest?channel=stable&node_id=n1", nil)
	etag := a.header.Get("ETag")
	if a.status != 200 || string(a.body) != env || etag == "" {
		t.Errorf("latest: %d %s", a.status, a.body)
	}
	if a := r.get("/v1/releases/latest", nil, "If-None-Match", `"x", W/`+etag); a.status != 304 || len(a.body) != 0 || a.header.Get("ETag") != etag {
		t.Errorf("latest with its ETag: %d %s", a.status, a.body)
	}
	var one struct {
		ReleaseID  string `json:"release_id"`
		VerifiedBy string `json:"verified_by"`
		Envelope   json.RawMessage
		Release    verify.Release
	}
	r.get("/v1/releases/stable-1", &one)
	if one.Release.Policy.Ref != "registry.example/policy:1.4.2" || one.VerifiedBy == "" || string(one.Envelope) != env {
		t.Errorf("release: %+v", one)
	}
	var list struct{ Releases []map[string]any }
	r.get("/v1/releases?channel=stable", &list)
	if len(list.Releases) != 1 || list.Releases[0]["release_id"] != "stable-1" {
		t.Errorf("list: %v", list)
	}
	if a := r.post("/v1/nodes/n1/ack", `{"release_id":"stable-1","step":"release.activated","result":"passed","policy_ref":"p@1","fingerprint":"blake3:ff"}`); a.status != 200 || !bytes.Contains(a.body, []byte(`"changed":true`)) {
		t.Errorf("ack: %d %s", a.status, a.body)
	}
	var fleet struct{ Nodes []nodeView }
	r.get("/v1/fleet", &fleet)
	if n := fleet.Nodes[0]; n.State != "up" || n.DesiredRelease != "stable-1" || n.ObservedRelease != "stable-1" || n.Channel != "stable" || n.LastAck == nil {
		t.Errorf("fleet: %+v", n)
	}
	var sum map[string]any
	r.get("/v1/fleet/summary", &sum)
	if sum["in_sync"] != 1.0 || sum["up"] != 1.0 {
		t.Errorf("summary: %v", sum)
	}
}

func TestReleaseUnverified(t *testing.T) {
	key, _ := newKey(t)
	r := newRig(t, Options{})
	a := r.post("/v1/releases", envelope(t, key, statement("stable", 1)))
	if a.status != 201 || !bytes.Contains(a.body, []byte(`"verified":false`)) || !bytes.Contains(a.body, []byte("not verified here")) {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestLongPoll(t *testing.T) {
	key, _ := newKey(t)
	r := newRig(t, Options{MaxWaiters: 1})
	wait := func(path string, header ...string) chan answer {
		c := make(chan answer, 1)
		n := r.api.waiters.Load()
		go func() { c <- r.do("GET", path, nil, header...) }()
		for deadline := time.Now().Add(5 * time.Second); r.api.waiters.Load() == n; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the poll does not wait")
			}
		}
		return c
	}
	first := wait("/v1/releases/latest?wait=30s")
	if a := r.get("/v1/releases/latest?wait=30s", nil); a.status != 429 || a.code() != "too_many_waiters" || a.header.Get("Retry-After") == "" {
		t.Errorf("second waiter: %d %s", a.status, a.body)
	}
	env := envelope(t, key, statement("stable", 1))
	if a := r.post("/v1/releases", env); a.status != 201 {
		t.Fatal(a.status)
	}
	a := <-first
	if a.status != 200 || string(a.body) != env {
		t.Errorf("waiter after publication: %d %s", a.status, a.body)
	}
	etag := a.header.Get("ETag")
	second := wait("/v1/releases/latest?wait=30s", "If-None-Match", etag)
	if a := r.post("/v1/releases", envelope(t, key, statement("canary", 1))); a.status != 201 { // another channel: wait on
		t.Fatal(a.status)
	}
	if a := r.post("/v1/releases", envelope(t, key, statement("stable", 2))); a.status != 201 {
		t.Fatal(a.status)
	}
	if a = <-second; a.status != 200 || a.header.Get("ETag") == etag {
		t.Errorf("waiter with an ETag: %d", a.status)
	}
	start := time.Now()
	if a := r.get("/v1/releases/latest?wait=50ms", nil, "If-None-Match", a.header.Get("ETag")); a.status != 304 || time.Since(start) < 50*time.Millisecond {
		t.Errorf("nothing new: %d after %s", a.status, time.Since(start))
	}
	if a := r.get("/v1/releases/latest?wait=20ms&channel=none", nil); a.status != 404 {
		t.Errorf("empty channel: %d", a.status)
	}
	third := wait("/v1/releases/latest?wait=30s&channel=none")
	r.api.Drain()
	if a := <-third; a.status != 404 {
		t.Errorf("at shutdown: %d", a.status)
	}
	if a := r.get("/readyz", nil); a.status != 503 || a.code() != "not_ready" {
		t.Errorf("readyz at shutdown: %d %s", a.status, a.body)
	}
}

func TestRateLimit(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	r := newRig(t, Options{PeerRate: 2, Now: func() time.Time { return now }})
	for i := range 4 {
		if a := r.get("/healthz", nil); a.status != 200 {
			t.Fatalf("request %d: %d", i, a.status)
		}
	}
	a := r.get("/healthz", nil)
	if a.status != 429 || a.code() != "rate_limited" || a.header.Get("Retry-After") != "1" {
		t.Errorf("fifth request: %d %s", a.status, a.body)
	}
	if wait := r.api.peers.take("192.0.2.7"); wait != 0 {
		t.Errorf("another peer waits %s", wait)
	}
	now = now.Add(500 * time.Millisecond)
	if a := r.get("/healthz", nil); a.status != 200 {
		t.Errorf("after half a second: %d", a.status)
	}
}

func TestBucketsAreBounded(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	b := newBuckets(1, 100, func() time.Time { return now })
	for i := range 10_000 {
		b.take(fmt.Sprint(i))
		now = now.Add(time.Millisecond)
		if len(b.peers) > 100 {
			t.Fatalf("%d peers are remembered", len(b.peers))
		}
	}
}

func TestFull(t *testing.T) {
	r := newRig(t, Options{}, sqlite.Options{KeepFree: 1 << 60})
	before := r.state()
	a := r.post("/v1/events", native(storetest.Make("n1", storetest.LogA, 1)))
	if a.status != 507 || a.code() != "store_full" || a.header.Get("Retry-After") == "" {
		t.Errorf("events: %d %s", a.status, a.body)
	}
	if a := r.get("/v1/releases/latest?node_id=n1", nil); a.status != 404 {
		t.Errorf("a poll of a full store: %d %s", a.status, a.body)
	}
	if a := r.get("/readyz", nil); a.status != 503 {
		t.Errorf("readyz: %d", a.status)
	}
	if after := r.state(); after != before {
		t.Errorf("state changed: %s", after)
	}
}

func TestMetrics(t *testing.T) {
	r := newRig(t, Options{})
	r.post("/v1/events", native(storetest.Records("n1", storetest.LogA, 1, 3)...))
	a := r.get("/metrics", nil)
	for _, want := range []string{`autonomy_cp_events_total{result="inserted"} 3`, "autonomy_cp_store_bytes ", `autonomy_cp_request_seconds_count{route="POST /v1/events"} 1`} {
		if !bytes.Contains(a.body, []byte(want)) {
			t.Errorf("no %s in\n%s", want, a.body)
		}
	}
}
