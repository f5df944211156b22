// Package e2e runs the four programs as separate processes, with a real
// registry, a real OpenTelemetry Collector between node and control plane, and
// cosign where it is there. What happened is asserted from the control plane's
// GET /v1/events: the way an auditor would look.
package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/verify"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// timeout bounds each wait for something to happen elsewhere.
const timeout = 30 * time.Second

// fleet is one of each: registry, control plane, collector, relay, node.
type fleet struct {
	t        *testing.T
	dir      string
	autonomy string

	registry  *testutil.Registry
	collector *testutil.Collector
	cp        *testutil.Process
	relay     *testutil.Process
	node      *testutil.Process

	cpURL, relayURL, nodeURL string
	sequence                 int
}

func newFleet(t *testing.T, nodeArgs ...string) *fleet {
	t.Helper()
	f := &fleet{t: t, dir: t.TempDir(), autonomy: testutil.Build(t, "autonomy")}
	root, err := testutil.Root()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(f.path("quickstart"), os.DirFS(filepath.Join(root, "examples", "quickstart"))); err != nil {
		t.Fatal(err)
	}
	f.cli("key", "generate", "--out", f.path("release"))
	f.cli("keyring", "create", "--out", f.path("keyring.json"), f.path("release.pub"))
	f.registry = testutil.StartRegistry(t)

	cpAddr, nodeAddr := testutil.FreeAddr(t), testutil.FreeAddr(t)
	f.cpURL, f.nodeURL = "http://"+cpAddr, "http://"+nodeAddr
	f.cp = testutil.Command{Path: testutil.Build(t, "autonomy-cp"), Args: []string{"--listen", cpAddr, "--state-dir", f.path("cp"), "--keep-free", "16MiB"}}.Start(t)
	f.cp.Addr(t)
	f.collector = testutil.StartCollector(t, f.cpURL+"/v1/events")
	f.relay = testutil.Command{Path: testutil.Build(t, "autonomy-relay"), Args: []string{"--listen", "127.0.0.1:0", "--state-dir", f.path("relay"),
		"--upstream", "http://" + f.registry.Addr, "--trust", f.path("keyring.json"), "--max-bytes", "128MiB", "--keep-free", "16MiB"}}.Start(t)
	f.relayURL = "http://" + f.relay.Addr(t)
	f.node = testutil.Command{Path: testutil.Build(t, "autonomy-node"), Args: append([]string{"--listen", nodeAddr, "--listen", "unix:" + f.path("node.sock"),
		"--state-dir", f.path("node"), "--tools", f.path("quickstart", "tools.yaml"), "--cp-url", f.cpURL, "--relay-url", f.relayURL,
		"--trust", f.path("keyring.json"), "--otlp-endpoint", "grpc://" + f.collector.GRPC, "--node-id", "n-1",
		"--poll-interval", "100ms", "--heartbeat-interval", "1s", "--wal-max-bytes", "32MiB", "--wal-segment-bytes", "4MiB", "--keep-free", "16MiB"}, nodeArgs...)}.Start(t)
	f.node.Addr(t)
	return f
}

func (f *fleet) path(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}

// cli runs the operator's program and returns its standard output.
func (f *fleet) cli(args ...string) string {
	f.t.Helper()
	out, stderr, code := f.cliCode(args...)
	if code != 0 {
		f.t.Fatalf("autonomy %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, stderr)
	}
	return out
}

func (f *fleet) cliCode(args ...string) (stdout, stderr string, code int) {
	f.t.Helper()
	cmd := exec.Command(f.autonomy, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		f.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// answer is the body of POST /v1/tool.
type answer struct {
	Status    int            `json:"-"`
	Decision  string         `json:"decision"`
	Layer     string         `json:"layer"`
	Code      string         `json:"code"`
	Reason    string         `json:"reason"`
	Reasons   []event.Reason `json:"reasons"`
	AuditID   string         `json:"audit_id"`
	PolicyRef string         `json:"policy_ref"`
	Outcome   string         `json:"outcome"`
	Output    json.RawMessage
}

// try makes a call. ok is false when no answer came.
func (f *fleet) try(body string) (a answer, ok bool) {
	resp, err := http.Post(f.nodeURL+"/v1/tool", "application/json", strings.NewReader(body))
	if err != nil {
		return a, false
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil || json.Unmarshal(data, &a) != nil {
		return a, false
	}
	a.Status = resp.StatusCode
	return a, true
}

func (f *fleet) call(body string) answer {
	f.t.Helper()
	a, ok := f.try(body)
	if !ok {
		f.t.Fatalf("no answer to %s", body)
	}
	return a
}

func (f *fleet) get(u string, v any) error {
	resp, err := http.Get(u)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", u, resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(v)
}

// events are those that the control plane holds for a query, oldest first.
func (f *fleet) events(query url.Values) ([]event.Event, error) {
	query.Set("limit", "1000")
	var page struct {
		Events []event.Event `json:"events"`
	}
	if err := f.get(f.cpURL+"/v1/events?"+query.Encode(), &page); err != nil {
		return nil, err
	}
	out := page.Events
	for i, j := 0, len(out)-1; i < j; i, j = i+1, j-1 {
		out[i], out[j] = out[j], out[i]
	}
	return out, nil
}

// wantEvents waits until the control plane holds exactly these events, each
// written "type decision outcome" without what is empty.
func (f *fleet) wantEvents(query url.Values, want ...string) []event.Event {
	f.t.Helper()
	var have []event.Event
	testutil.Eventually(f.t, timeout, fmt.Sprintf("events %v", query), func() error {
		var err error
		if have, err = f.events(query); err != nil {
			return err
		}
		var got []string
		for _, e := range have {
			got = append(got, strings.Join(strings.Fields(e.EventType+" "+e.Decision+" "+e.Outcome), " "))
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("have %q, want %q", got, want)
		}
		return nil
	})
	return have
}

// nodeStatus is the part of GET /v1/status that the tests read.
type nodeStatus struct {
	Policy struct {
		Serving string
		Active  *struct{ Ref, Digest, Source string }
		LKG     *struct{ Ref, Digest string }
	}
	WAL struct {
		ID         string `json:"id"`
		DurableSeq uint64 `json:"durable_seq"`
		Mode, Why  string
	} `json:"wal"`
	Release struct {
		Active *struct {
			ReleaseID string `json:"release_id"`
			Sequence  uint64
		}
		Refused []struct {
			ReleaseID string `json:"release_id"`
			Step      string
			Code      string
		}
	}
}

func (f *fleet) status() (s nodeStatus, err error) {
	err = f.get(f.nodeURL+"/v1/status", &s)
	return s, err
}

// artifact pushes content and returns its reference by digest.
type pushed struct {
	Ref string `json:"ref"`
}

func (p pushed) digest() string { _, d, _ := strings.Cut(p.Ref, "@"); return d }

func (f *fleet) push(ref, file string, args ...string) pushed {
	f.t.Helper()
	var p pushed
	out := f.cli(append([]string{"oci", "push", ref, file, "-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		f.t.Fatal(err)
	}
	return p
}

// build makes the content of a release: image, policy, lock, signature. What it
// returns can be spoiled before it is published.
type content struct {
	image, policy pushed
	lock          string // path
	version       string
	key           string
}

func (f *fleet) build(version string) content {
	f.t.Helper()
	f.sequence++
	c := content{version: version, lock: f.path(fmt.Sprintf("lock-%d.json", f.sequence)), key: f.path("release.key")}
	bundle, image := f.path("policy-"+version+".tar.gz"), f.path("image-"+version+".tar")
	f.cli("policy", "build", f.path("quickstart", "policy"), "--name", "quickstart", "--version", version, "--out", bundle)
	c.policy = f.push(f.registry.Addr+"/e2e/policy:"+version, bundle)
	if err := os.WriteFile(image, []byte("image "+version), 0o600); err != nil {
		f.t.Fatal(err)
	}
	c.image = f.push(f.registry.Addr+"/e2e/agent:"+version, image, "--type", "application/vnd.oci.image.layer.v1.tar")
	f.cli("lock", "create", "--project", f.path("quickstart", "autonomy.yaml"), "--policy", bundle, "--image", c.image.Ref, "--out", c.lock)
	f.cli("oci", "attach", c.image.Ref, c.lock, "--type", "lock")
	f.cli("sign", c.image.Ref, "--key", c.key)
	return c
}

// publish stages, signs and publishes a release and returns its id.
func (f *fleet) publish(c content, args ...string) string {
	f.t.Helper()
	id := fmt.Sprintf("stable-%d", f.sequence)
	file := f.path(id + ".json")
	strip := func(ref string) string { return strings.TrimPrefix(ref, f.registry.Addr+"/") }
	f.cli("relay", "prestage", "--relay", f.relayURL, "--key", f.path("release.key"), "--id", "e2e", "--sequence", fmt.Sprint(f.sequence),
		"--digest", strip(c.image.Ref), "--digest", strip(c.policy.Ref))
	f.cli(append([]string{"release", "create", "--sequence", fmt.Sprint(f.sequence), "--image", c.image.Ref, "--lock", c.lock,
		"--policy", f.registry.Addr + "/e2e/policy:" + c.version + "@" + c.policy.digest(), "--key", c.key, "--out", file}, args...)...)
	f.cli("release", "publish", file, "--cp", f.cpURL)
	return id
}

// rollOut publishes a good release and waits until the node runs it.
func (f *fleet) rollOut(version string) string {
	f.t.Helper()
	id := f.publish(f.build(version))
	testutil.Eventually(f.t, timeout, "the node runs "+id, func() error {
		s, err := f.status()
		if err != nil {
			return err
		}
		if s.Release.Active == nil || s.Release.Active.ReleaseID != id {
			return fmt.Errorf("%+v", s.Release)
		}
		return nil
	})
	return id
}

// TestCalls follows an allowed call, a call that policy denies, one that
// enforcement denies, and requests that never become calls.
func TestCalls(t *testing.T) {
	f := newFleet(t)
	if a := f.call(`{"kind":"tool.echo"}`); a.Status != 503 || a.Decision != "deny" || a.Layer != "policy" || a.AuditID != "" {
		t.Fatalf("without a policy: %+v", a)
	}
	id := f.rollOut("1.0.0")
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/away" {
			http.Redirect(w, r, "http://127.0.0.2:9/", http.StatusFound)
			return
		}
		fmt.Fprint(w, "hello")
	}))
	defer web.Close()

	allowed := f.call(`{"kind":"tool.echo","params":{"text":"hi"},"session":"s-1"}`)
	if allowed.Status != 200 || allowed.Outcome != "ok" || allowed.PolicyRef != "quickstart@1.0.0" {
		t.Fatalf("%+v", allowed)
	}
	es := f.wantEvents(url.Values{"audit_id": {allowed.AuditID}}, "decision allow", "action allow ok")
	for _, e := range es {
		if e.NodeID != "n-1" || e.ReleaseID != id || !strings.HasPrefix(e.Fingerprint, "blake3:") || e.Kind != "tool.echo" || e.Seq == 0 || e.EventID != event.ID(e.LogID, e.Seq) {
			t.Errorf("%+v", e)
		}
	}
	var body event.DecisionBody
	if err := json.Unmarshal(es[0].Body, &body); err != nil {
		t.Fatal(err)
	}
	if body.PolicyRef != "quickstart@1.0.0" || !strings.HasPrefix(body.PolicyDigest, "sha256:") || !strings.Contains(string(body.Input), `"params":{"text":"hi"}`) {
		t.Errorf("%+v %s", body, body.Input)
	}

	exec := f.call(`{"kind":"tool.exec.word_count","params":{"text":"three little words"}}`)
	if exec.Status != 200 || exec.Outcome != "ok" || !strings.Contains(string(exec.Output), `3`) {
		t.Fatalf("%+v %s", exec, exec.Output)
	}
	f.wantEvents(url.Values{"audit_id": {exec.AuditID}}, "decision allow", "action allow ok")
	get := f.call(fmt.Sprintf(`{"kind":"tool.http_get","params":{"endpoint":%q}}`, web.URL))
	if get.Status != 200 || get.Outcome != "ok" || !strings.Contains(string(get.Output), "hello") {
		t.Fatalf("%+v %s", get, get.Output)
	}

	denied := f.call(`{"kind":"tool.shell","params":{"command":"id"}}`)
	if denied.Status != 403 || denied.Layer != "policy" || len(denied.Reasons) != 1 || denied.Reasons[0].Code != "shell_denied" || denied.Reason == "" {
		t.Fatalf("%+v", denied)
	}
	es = f.wantEvents(url.Values{"audit_id": {denied.AuditID}}, "decision deny")
	if !strings.Contains(string(es[0].Body), `"code":"shell_denied"`) {
		t.Errorf("%s", es[0].Body)
	}

	runtime := f.call(fmt.Sprintf(`{"kind":"tool.http_get","params":{"endpoint":%q}}`, web.URL+"/away"))
	if runtime.Status != 403 || runtime.Layer != "runtime" || runtime.Reasons[0].Code != "egress_denied" {
		t.Fatalf("%+v", runtime)
	}
	es = f.wantEvents(url.Values{"audit_id": {runtime.AuditID}}, "decision allow", "action deny denied")
	if !strings.Contains(string(es[1].Body), `"code":"egress_denied"`) {
		t.Errorf("%s", es[1].Body)
	}

	for body, status := range map[string]int{
		`{"kind":"tool.echo","kind":"tool.shell"}`:    400,
		`{"kind":"tool.echo","caller":{"id":"root"}}`: 400,
		`{"kind":"tool.nope"}`:                        400,
		`not JSON`:                                    400,
		`{"kind":"tool.echo","params":{"text":"` + strings.Repeat("x", 300<<10) + `"}}`: 413,
	} {
		if a := f.call(body); a.Status != status || a.Decision != "deny" || a.Layer != "request" || a.AuditID != "" {
			t.Errorf("%.60s: %+v", body, a)
		}
	}
	// A malformed request leaves no record.
	f.wantEvents(url.Values{"event_type": {event.Decision}}, "decision allow", "decision allow", "decision allow", "decision deny", "decision allow")

	// The records of a call are on the node, too, and the CLI says the same.
	var records struct {
		Records []struct {
			EventType string `json:"event_type"`
		}
	}
	if err := f.get(f.nodeURL+"/v1/calls/"+runtime.AuditID, &records); err != nil || len(records.Records) != 2 {
		t.Errorf("%+v, %v", records, err)
	}
	if out, stderr, code := f.cliCode("call", "tool.shell", `{"command":"id"}`, "--node", f.nodeURL); code != 1 || !strings.Contains(out+stderr, "shell") {
		t.Errorf("exit code %d: %s%s", code, out, stderr)
	}
	if out := f.cli("call", "tool.echo", `{"text":"over the socket"}`, "--node", "unix:"+f.path("node.sock"), "-o", "json"); !strings.Contains(out, "over the socket") {
		t.Error(out)
	}
	if out := f.cli("events", "query", "--cp", f.cpURL, "--decision", "deny"); !strings.Contains(out, "tool.shell") {
		t.Error(out)
	}
	if out := f.cli("fleet", "status", "--cp", f.cpURL); !strings.Contains(out, "n-1") || !strings.Contains(out, id) {
		t.Error(out)
	}
}

// TestReleases rolls a good release out, then one that fails at each of the four
// steps: the good one stays in force, and the events say what happened.
func TestReleases(t *testing.T) {
	f := newFleet(t)
	steps := []string{event.ReleaseFound, event.ReleaseSignature, event.ReleaseDigest, event.ReleaseFingerprint, event.ReleaseCompatibility}
	good := f.rollOut("1.0.0")
	f.wantRelease(good, append(steps[:5:5], event.ReleaseActivated), "passed", "passed", "passed", "passed")

	// 1: the image's signature is by a key that is not trusted.
	f.cli("key", "generate", "--out", f.path("other"))
	c := f.unsigned("1.1.0")
	f.cli("sign", c.image.Ref, "--key", f.path("other.key"))
	f.wantRefused(f.publish(c), "signature", "sig_invalid", good)

	// 2: the lock is for another image than the one released. The CLI refuses to
	// make such a release, and the next one, so their statements are signed here.
	c = f.build("1.2.0")
	c.image = f.build("1.3.0").image
	f.cli("oci", "attach", c.image.Ref, c.lock, "--type", "lock")
	f.wantRefused(f.publishForged(c, func(*verify.Release) {}), "digest", "digest_mismatch", good)

	// 3: the release says another fingerprint than its lock has.
	f.wantRefused(f.publishForged(f.build("1.4.0"), func(r *verify.Release) {
		r.Fingerprint = "blake3:" + strings.Repeat("0", 64)
	}), "fingerprint", "fingerprint_mismatch", good)

	// 4: it wants a newer node.
	f.wantRefused(f.publish(f.build("1.5.0"), "--requires-runtime", ">=99.0.0"), "compatibility", "policy_incompatible", good)

	// The control plane refuses a sequence that is not above the channel's.
	c = f.build("1.6.0")
	f.sequence = 1
	file := f.path("again.json")
	f.cli("release", "create", "--sequence", "1", "--image", c.image.Ref, "--lock", c.lock, "--policy",
		f.registry.Addr+"/e2e/policy:1.6.0@"+c.policy.digest(), "--key", c.key, "--out", file)
	if out, stderr, code := f.cliCode("release", "publish", file, "--cp", f.cpURL); code == 0 {
		t.Errorf("an old sequence was published: %s%s", out, stderr)
	}
	// And the next good one is taken.
	f.sequence = 20
	next := f.rollOut("2.0.0")
	f.wantRelease(next, append(steps[:5:5], event.ReleaseActivated), "passed", "passed", "passed", "passed")
	if s, err := f.status(); err != nil || s.Policy.Active.Ref != "quickstart@2.0.0" || s.Policy.LKG == nil || s.Policy.LKG.Ref != "quickstart@1.0.0" {
		t.Errorf("%+v, %v", s.Policy, err)
	}
}

// unsigned is build without the signature.
func (f *fleet) unsigned(version string) content {
	f.t.Helper()
	signed := f.path("release.key")
	f.cli("key", "generate", "--out", f.path("unused-"+version))
	c := f.build(version) // signs with the trusted key …
	// … so push another image that nobody signed.
	image := f.path("unsigned.tar")
	if err := os.WriteFile(image, []byte("unsigned "+version), 0o600); err != nil {
		f.t.Fatal(err)
	}
	c.image = f.push(f.registry.Addr+"/e2e/agent:unsigned", image, "--type", "application/vnd.oci.image.layer.v1.tar")
	f.cli("lock", "create", "--project", f.path("quickstart", "autonomy.yaml"), "--policy", f.path("policy-"+version+".tar.gz"), "--image", c.image.Ref, "--out", c.lock)
	f.cli("oci", "attach", c.image.Ref, c.lock, "--type", "lock")
	c.key = signed
	return c
}

func (f *fleet) lifecycle(id string) ([]event.Event, error) {
	all, err := f.events(url.Values{})
	if err != nil {
		return nil, err
	}
	var out []event.Event
	for _, e := range all {
		var b event.LifecycleBody
		if strings.HasPrefix(e.EventType, "release.") && json.Unmarshal(e.Body, &b) == nil && b.ReleaseID == id {
			out = append(out, e)
		}
	}
	return out, nil
}

// wantRelease checks the events of one release: types, and results of the steps.
func (f *fleet) wantRelease(id string, types []string, results ...string) []event.Event {
	f.t.Helper()
	var es []event.Event
	testutil.Eventually(f.t, timeout, "events of "+id, func() error {
		var err error
		if es, err = f.lifecycle(id); err != nil {
			return err
		}
		var have []string
		for _, e := range es {
			have = append(have, e.EventType)
		}
		if fmt.Sprint(have) != fmt.Sprint(types) {
			return fmt.Errorf("have %q, want %q", have, types)
		}
		return nil
	})
	for i, want := range results {
		var b event.LifecycleBody
		if err := json.Unmarshal(es[i+1].Body, &b); err != nil {
			f.t.Fatal(err)
		}
		if b.Result != want {
			f.t.Errorf("%s of %s: %s (%s %s), want %s", es[i+1].EventType, id, b.Result, b.Code, b.Detail, want)
		}
	}
	return es
}

func (f *fleet) wantRefused(id, step, code, active string) {
	f.t.Helper()
	order := []string{"signature", "digest", "fingerprint", "compatibility"}
	var results []string
	state := "passed"
	for _, s := range order {
		switch {
		case s == step:
			results, state = append(results, "failed"), "skipped"
		default:
			results = append(results, state)
		}
	}
	es := f.wantRelease(id, []string{event.ReleaseFound, event.ReleaseSignature, event.ReleaseDigest, event.ReleaseFingerprint,
		event.ReleaseCompatibility, event.ReleaseRefused}, results...)
	var b event.LifecycleBody
	if err := json.Unmarshal(es[5].Body, &b); err != nil || b.Code != code || b.Detail == "" {
		f.t.Errorf("%s refused with %+v (%v), want %s", id, b, err, code)
	}
	s, err := f.status()
	if err != nil {
		f.t.Fatal(err)
	}
	if s.Release.Active.ReleaseID != active {
		f.t.Errorf("after %s was refused the node runs %s, want %s", id, s.Release.Active.ReleaseID, active)
	}
	last := s.Release.Refused[len(s.Release.Refused)-1]
	if last.ReleaseID != id || last.Step != step || last.Code != code {
		f.t.Errorf("status says %+v", last)
	}
}

// TestCrash kills the node again and again under load. Every call that was
// answered is in its log and arrives at the control plane; the policy comes back.
func TestCrash(t *testing.T) {
	t.Run("mapped", func(t *testing.T) { testCrash(t, "file-mapped", "--wal-ring-dir", "none") })
	t.Run("ring", func(t *testing.T) { testCrash(t, "ring", "--wal-ring-dir", tmpfs(t)) })
}

// tmpfs mounts a small one for the log's ring.
func tmpfs(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		testutil.Missing(t, "root, to mount a tmpfs", "run as root")
	}
	dir := filepath.Join(t.TempDir(), "ring")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64m,mode=700"); err != nil {
		t.Fatalf("mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

func testCrash(t *testing.T, mode string, nodeArgs ...string) {
	f := newFleet(t, nodeArgs...)
	f.rollOut("1.0.0")
	before, err := f.status()
	if err != nil {
		t.Fatal(err)
	}
	var answered []answer
	for round := range 5 {
		var mu sync.Mutex
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				for i := 0; ; i++ {
					body := fmt.Sprintf(`{"kind":"tool.echo","params":{"text":"%d/%d/%d"}}`, round, w, i)
					if i%5 == 4 {
						body = `{"kind":"tool.shell","params":{"command":"id"}}`
					}
					a, ok := f.try(body)
					if !ok {
						return // it was killed
					}
					mu.Lock()
					answered = append(answered, a)
					mu.Unlock()
				}
			})
		}
		time.Sleep(time.Duration(100+50*round) * time.Millisecond)
		f.node.Kill(t)
		wg.Wait()
		if out, stderr, code := f.cliCode("wal", "verify", "--dir", f.path("node", "wal")); code != 0 || !strings.Contains(out, "gaps 0, chain ok") {
			t.Fatalf("round %d: exit code %d: %s%s", round, code, out, stderr)
		}
		f.node = f.node.Restart(t)
		f.node.Addr(t)
		after, err := f.status()
		if err != nil {
			t.Fatal(err)
		}
		if after.Policy.Active == nil || after.Policy.Active.Digest != before.Policy.Active.Digest || after.WAL.ID != before.WAL.ID {
			t.Fatalf("round %d: %+v", round, after)
		}
	}
	logged := f.export()
	for _, a := range answered {
		want := "deny"
		if a.Decision == "allow" {
			want = "allow"
		}
		if logged[a.AuditID].decision != want {
			t.Errorf("call %s was answered %s; the log has %q", a.AuditID, a.Decision, logged[a.AuditID].decision)
		}
		if a.Decision == "allow" && logged[a.AuditID].outcome != "ok" {
			t.Errorf("call %s was answered ok; the log has outcome %q", a.AuditID, logged[a.AuditID].outcome)
		}
	}
	if len(answered) < 50 {
		t.Errorf("only %d calls were answered: this was no load", len(answered))
	}
	// No allowed decision is left without an action: what was cut off says so.
	for id, c := range logged {
		if c.decision == "allow" && c.outcome == "" {
			t.Errorf("call %s has no action", id)
		}
	}
	s, err := f.status()
	if err != nil {
		t.Fatal(err)
	}
	f.wantWatermark(s)
	if s.WAL.Mode != mode {
		t.Errorf("the log ran in mode %q (%s), want %q", s.WAL.Mode, s.WAL.Why, mode)
	}
	if code := f.node.Stop(t); code != run.OK {
		t.Errorf("the node ended with %d", code)
	}
	if out := f.cli("wal", "verify", "--dir", f.path("node", "wal"), "--key", f.path("node", "identity", "node.pub")); !strings.Contains(out, "chain ok") || !strings.Contains(out, "signed up to") {
		t.Error(out)
	}
	t.Logf("%d calls answered over 5 kills, %d in the log", len(answered), len(logged))
}

type logged struct{ decision, outcome string }

// export reads the node's log with the CLI, while the node runs.
func (f *fleet) export() map[string]logged {
	f.t.Helper()
	calls := map[string]logged{}
	dec := json.NewDecoder(strings.NewReader(f.cli("wal", "export", "--dir", f.path("node", "wal"))))
	for next := uint64(0); ; {
		var r struct {
			Seq       uint64
			EventType string `json:"event_type"`
			AuditID   string `json:"audit_id"`
			Decision  string
			Outcome   string
		}
		if err := dec.Decode(&r); err == io.EOF {
			return calls
		} else if err != nil {
			f.t.Fatal(err)
		}
		if next != 0 && r.Seq != next {
			f.t.Fatalf("after record %d comes %d", next-1, r.Seq)
		}
		next = r.Seq + 1
		c := calls[r.AuditID]
		switch r.EventType {
		case event.Decision:
			c.decision = r.Decision
		case event.Action:
			c.outcome = r.Outcome
		default:
			continue
		}
		calls[r.AuditID] = c
	}
}

// wantWatermark waits until the control plane holds the node's log as far as s says.
func (f *fleet) wantWatermark(s nodeStatus) {
	f.t.Helper()
	testutil.Eventually(f.t, timeout, "the control plane holds the log", func() error {
		var w struct{ Seq uint64 }
		if err := f.get(f.cpURL+"/v1/nodes/n-1/watermark?log_id="+s.WAL.ID, &w); err != nil {
			return err
		}
		if w.Seq < s.WAL.DurableSeq {
			return fmt.Errorf("%d of %d", w.Seq, s.WAL.DurableSeq)
		}
		return nil
	})
}

// TestOutage takes away, one after the other, the control plane, the collector,
// the relay and the registry. The node goes on deciding; nothing is lost.
func TestOutage(t *testing.T) {
	f := newFleet(t)
	f.rollOut("1.0.0")
	var ids []string
	calls := func(what string) {
		t.Helper()
		for i := range 10 {
			a := f.call(fmt.Sprintf(`{"kind":"tool.echo","params":{"text":"%s %d"}}`, what, i))
			if a.Status != 200 {
				t.Fatalf("%s: %+v", what, a)
			}
			ids = append(ids, a.AuditID)
		}
	}
	if code := f.cp.Stop(t); code != run.OK {
		t.Errorf("the control plane ended with %d", code)
	}
	calls("no control plane")
	f.collector.Kill(t)
	calls("no collector")
	f.relay.Kill(t)
	f.registry.Kill(t)
	calls("no relay, no registry")
	// A restart in the middle of it: the policy needs nobody.
	if code := f.node.Stop(t); code != run.OK {
		t.Errorf("the node ended with %d", code)
	}
	f.node = f.node.Restart(t)
	f.node.Addr(t)
	calls("alone after a restart")

	f.collector = f.collector.Restart(t)
	f.cp = f.cp.Restart(t)
	f.cp.Addr(t)
	s, err := f.status()
	if err != nil {
		t.Fatal(err)
	}
	f.wantWatermark(s)
	for _, id := range ids {
		f.wantEvents(url.Values{"audit_id": {id}}, "decision allow", "action allow ok")
	}
}

// TestDamage: a damaged active slot falls back to the last known good, both
// damaged to deny, a damaged log to no start at all.
func TestDamage(t *testing.T) {
	f := newFleet(t)
	f.rollOut("1.0.0")
	f.rollOut("1.1.0")
	restart := func() {
		t.Helper()
		f.node = f.node.Restart(t)
		f.node.Addr(t)
	}
	spoil := func(path string, at int64) {
		t.Helper()
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		b := make([]byte, 1)
		if _, err := file.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 0x40
		if _, err := file.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	f.cp.Stop(t) // which would mend it
	f.node.Stop(t)
	spoil(f.path("node", "policy", "active", "bundle.tar.gz"), 100)
	restart()
	if s, err := f.status(); err != nil || s.Policy.Serving != "lkg" {
		t.Fatalf("%+v, %v", s.Policy, err)
	}
	if a := f.call(`{"kind":"tool.echo"}`); a.Status != 200 || a.PolicyRef != "quickstart@1.0.0" {
		t.Errorf("%+v", a)
	}
	f.cp = f.cp.Restart(t)
	f.cp.Addr(t)
	es := f.wantEvents(url.Values{"event_type": {event.PolicyFallback}}, event.PolicyFallback)
	if !strings.Contains(string(es[0].Body), "quickstart@1.0.0") {
		t.Errorf("%s", es[0].Body)
	}
	testutil.Eventually(t, timeout, "the same release mends the slot", func() error {
		s, err := f.status()
		if err != nil {
			return err
		}
		if s.Policy.Serving != "active" || s.Policy.Active.Ref != "quickstart@1.1.0" {
			return fmt.Errorf("%+v", s.Policy)
		}
		return nil
	})

	f.node.Stop(t)
	f.cp.Stop(t)
	spoil(f.path("node", "policy", "active", "bundle.tar.gz"), 100)
	spoil(f.path("node", "policy", "lkg", "bundle.tar.gz"), 100)
	restart()
	if a := f.call(`{"kind":"tool.echo"}`); a.Status != 503 || a.Layer != "policy" {
		t.Errorf("%+v", a)
	}
	if resp, err := http.Get(f.nodeURL + "/readyz"); err != nil || resp.StatusCode != 503 {
		t.Errorf("%v, %v", resp, err)
	}

	f.node.Stop(t)
	slots, err := filepath.Glob(f.path("node", "wal", "slot-*"))
	if err != nil || len(slots) == 0 {
		t.Fatalf("%v, %v", slots, err)
	}
	spoil(slots[0], 8192+64)
	f.node = f.node.Restart(t)
	if code := f.node.Wait(t, timeout); code != run.Integrity {
		t.Errorf("on a damaged log the node ended with %d, want %d", code, run.Integrity)
	}
	if _, stderr, code := f.cliCode("wal", "verify", "--dir", f.path("node", "wal")); code != run.Integrity || !strings.Contains(stderr, "slot") {
		t.Errorf("wal verify: exit code %d: %s", code, stderr)
	}
}

// TestCosign: cosign accepts what "autonomy sign" made, from a real registry.
func TestCosign(t *testing.T) {
	cosign, ok := testutil.Cosign()
	if !ok {
		t.Skip("cosign is not installed; 'make cosign' builds it (the one test that may be skipped)")
	}
	f := &fleet{t: t, dir: t.TempDir(), autonomy: testutil.Build(t, "autonomy"), registry: testutil.StartRegistry(t)}
	f.cli("key", "generate", "--out", f.path("release"))
	if err := os.WriteFile(f.path("image"), []byte("image"), 0o600); err != nil {
		t.Fatal(err)
	}
	image := f.push(f.registry.Addr+"/e2e/agent:1", f.path("image"), "--type", "application/vnd.oci.image.layer.v1.tar")
	check := func(key string) (string, error) {
		cmd := exec.Command(cosign, "verify", "--key", key, "--insecure-ignore-tlog", "--new-bundle-format", "--allow-http-registry", image.Ref)
		cmd.Env = append(os.Environ(), "HOME="+f.dir)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := check(f.path("release.pub")); err == nil {
		t.Errorf("cosign accepts an image that nobody signed: %s", out)
	}
	f.cli("sign", image.Ref, "--key", f.path("release.key"))
	if out, err := check(f.path("release.pub")); err != nil {
		t.Errorf("cosign refuses our signature: %v\n%s", err, out)
	}
	f.cli("key", "generate", "--out", f.path("other"))
	if out, err := check(f.path("other.pub")); err == nil {
		t.Errorf("cosign accepts another key: %s", out)
	}
	f.cli("verify", image.Ref, "--key", f.path("release.pub"))
	if out, stderr, code := f.cliCode("verify", image.Ref, "--key", f.path("other.pub")); code != run.Refused {
		t.Errorf("autonomy verify with another key: exit code %d: %s%s", code, out, stderr)
	}
}

// TestDemo: the demo checks what it claims; here only that it ends well, is
// readable on 80 columns, cleans up, and works with a collector in between.
func TestDemo(t *testing.T) {
	autonomy := testutil.Build(t, "autonomy")
	for _, args := range [][]string{{"demo"}, {"demo", "--with-collector"}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			tmp := t.TempDir()
			cmd := exec.Command(autonomy, args...)
			cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
			out, err := cmd.CombinedOutput()
			if cmd.ProcessState.ExitCode() == run.NotFound {
				testutil.Missing(t, "the OpenTelemetry Collector", "run: make setup")
			}
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for line := range strings.Lines(string(out)) {
				if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 80 {
					t.Errorf("%d columns: %s", n, line)
				}
			}
			for _, want := range []string{"gaps 0, chain ok", "demo-node", "All checks held"} {
				if !strings.Contains(string(out), want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
			if left, err := os.ReadDir(tmp); err != nil || len(left) != 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

// TestDemoKeep: with --keep all goes on running after the demo has ended, and
// what it prints stops it.
func TestDemoKeep(t *testing.T) {
	autonomy := testutil.Build(t, "autonomy")
	cmd := exec.Command(autonomy, "demo", "--keep")
	cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	stop := regexp.MustCompile(`(?m)^ +(kill [0-9 ]+ && sleep 1 && rm -r \S+)$`).FindSubmatch(out)
	node := regexp.MustCompile(`--node (http://\S+)`).FindSubmatch(out)
	if stop == nil || node == nil {
		t.Fatalf("no way to go on in\n%s", out)
	}
	defer exec.Command("sh", "-c", strings.ReplaceAll(string(stop[1]), "kill ", "kill -9 ")).Run() // when the test failed before
	if out, err := exec.Command(autonomy, "call", "tool.echo", `{"text":"still here"}`, "--node", string(node[1])).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := exec.Command("sh", "-c", string(stop[1])).CombinedOutput(); err != nil {
		t.Errorf("%s: %v: %s", stop[1], err, out)
	}
	testutil.Eventually(t, timeout, "the node has stopped", func() error {
		if resp, err := http.Get(string(node[1]) + "/healthz"); err == nil {
			resp.Body.Close()
			return fmt.Errorf("it answers %s", resp.Status)
		}
		return nil
	})
}
