package release_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/fingerprint"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/node/release"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/verify"
	"github.com/autonomyops/autonomy/verify/sigstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var now = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

// world is a control plane, content, and a node's release state.
type world struct {
	t       *testing.T
	dir     string
	key     *ecdsa.PrivateKey
	keyring *verify.Keyring
	image   []byte

	mu       sync.Mutex
	envelope []byte
	acks     []release.Ack
	polls    int
	events   []string
	bodies   []event.LifecycleBody
	material verify.Material
	fetchErr error
	fetches  int
	now      time.Time
	admit    func(context.Context, *prepared.Program) error
	shadow   time.Duration

	cp     *httptest.Server
	client *release.Client
	slots  *prepared.Slots
	poller *release.Poller
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), now: now, image: []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}`)}
	var err error
	if w.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	pub, err := verify.MarshalPublicKey(w.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if w.keyring, err = verify.NewKeyring(&verify.Key{PublicKey: string(pub), Usages: []verify.Usage{verify.UsageRelease, verify.UsageArtifact}}); err != nil {
		t.Fatal(err)
	}
	w.cp = httptest.NewServer(http.HandlerFunc(w.serve))
	t.Cleanup(w.cp.Close)
	if w.client, err = release.NewClient(w.cp.URL, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.client.Close)
	w.start()
	return w
}

// serve is what the control plane answers.
func (w *world) serve(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch r.URL.Path {
	case "/v1/releases/latest":
		w.polls++
		if w.envelope == nil {
			http.NotFound(rw, r)
			return
		}
		tag := `"` + fingerprint.Digest(w.envelope) + `"`
		rw.Header().Set("ETag", tag)
		if r.Header.Get("If-None-Match") == tag {
			rw.WriteHeader(http.StatusNotModified)
			return
		}
		_, _ = rw.Write(w.envelope)
	case "/v1/nodes/n-1/ack":
		var a release.Ack
		if err := json.NewDecoder(r.Body).Decode(&a); err != nil {
			http.Error(rw, err.Error(), http.StatusBadRequest)
			return
		}
		w.acks = append(w.acks, a)
		rw.WriteHeader(http.StatusNoContent)
	default:
		http.NotFound(rw, r)
	}
}

// Fetch implements release.Fetcher.
func (w *world) Fetch(_ context.Context, envelope []byte, _ *verify.Release) (verify.Material, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fetches++
	m := w.material
	m.Envelope = envelope
	return m, w.fetchErr
}

// start opens slots and poller, as a node does; again: a restart.
func (w *world) start() {
	w.t.Helper()
	var err error
	if w.slots, _, err = prepared.OpenSlots(w.t.Context(), filepath.Join(w.dir, "policy"), prepared.SlotsOptions{}); err != nil {
		w.t.Fatal(err)
	}
	if w.poller, err = w.newPoller(); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) newPoller() (*release.Poller, error) {
	artifacts, err := sigstore.New(w.keyring)
	if err != nil {
		w.t.Fatal(err)
	}
	return release.New(release.Options{
		CP: w.client, Fetch: w, Keyring: w.keyring, Artifact: artifacts, Slots: w.slots, Dir: filepath.Join(w.dir, "release"),
		NodeID: "n-1", Channel: "stable", Interval: time.Millisecond, Runtime: "0.1.0", Logger: slog.New(slog.DiscardHandler),
		Note: func(typ string, body any) {
			w.events = append(w.events, typ)
			if b, ok := body.(event.LifecycleBody); ok {
				w.bodies = append(w.bodies, b)
			}
		},
		Now: func() time.Time { return w.now }, Admit: w.admit, Shadow: w.shadow,
	})
}

// publish makes a whole good release, lets change spoil it, and signs it.
func (w *world) publish(sequence uint64, change func(*verify.Release, *verify.Material)) {
	w.t.Helper()
	t := w.t
	dir := t.TempDir()
	rego := fmt.Sprintf("package autonomy\nimport rego.v2\n# sequence %d\nallow if input.kind == \"tool.echo\"\n", sequence)
	if err := os.WriteFile(filepath.Join(dir, "p.rego"), []byte(rego), 0o600); err != nil {
		t.Fatal(err)
	}
	bundle, err := prepared.BuildBundle(dir, prepared.BuildOptions{Name: "p", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	lock := &fingerprint.Lock{Schema: "autonomy.lock/v0", Agent: fingerprint.Agent{Name: "agent", Version: "1.0.0", ImageDigest: fingerprint.Digest(w.image)},
		Policy: fingerprint.Policy{Name: "p", Version: "1.0.0", Digest: fingerprint.Digest(bundle)},
		Tools:  []fingerprint.Tool{}, Prompts: []fingerprint.Prompt{}, Models: []fingerprint.Model{},
		Runtime: fingerprint.Runtime{MinVersion: "0.1.0", Capabilities: []string{}}, Inputs: map[string]string{}}
	lockBytes, err := lock.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	lock, err = fingerprint.Parse(lockBytes)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := sigstore.Sign(fingerprint.Digest(w.image), "", w.key)
	if err != nil {
		t.Fatal(err)
	}
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
		verify.PolicyMediaType, fingerprint.Digest(bundle), len(bundle))
	m := verify.Material{Lock: lockBytes, PolicyManifest: manifest, Policy: bundle, ImageManifest: w.image, ImageSignatures: [][]byte{sig}}
	rel := &verify.Release{Schema: verify.ReleaseSchema, ReleaseID: fmt.Sprintf("stable-%d", sequence), Channel: "stable", Sequence: sequence,
		Agent: verify.ReleaseAgent{Image: "reg.test/agent@" + fingerprint.Digest(w.image)}, Lock: fingerprint.Digest(lockBytes),
		Policy:      verify.ReleasePolicy{Ref: "reg.test/policy:1.0.0", Digest: fingerprint.Digest(manifest)},
		Fingerprint: lock.Fingerprint, CreatedAt: now.Add(-time.Hour), ExpiresAt: now.Add(24 * time.Hour)}
	if change != nil {
		change(rel, &m)
	}
	env, err := verify.SignRelease(rel, w.key)
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.envelope, w.material = env, m
}

func (w *world) poll() {
	w.t.Helper()
	if err := w.poller.Poll(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// drain returns the events since the last call.
func (w *world) drain() []string {
	e := w.events
	w.events, w.bodies = nil, nil
	return e
}

var passedEvents = []string{event.ReleaseFound, event.ReleaseSignature, event.ReleaseDigest, event.ReleaseFingerprint, event.ReleaseCompatibility, event.ReleaseActivated}

func TestActivate(t *testing.T) {
	w := newWorld(t)
	w.poll() // there is none yet
	if len(w.drain()) != 0 || w.slots.Current() != nil {
		t.Fatal("something happened without a release")
	}
	w.publish(3, nil)
	w.poll()
	if e := w.drain(); !slices.Equal(e, passedEvents) {
		t.Fatalf("events %q, want %q", e, passedEvents)
	}
	if a := w.slots.Current(); a == nil || a.Meta.ReleaseID != "stable-3" || a.Meta.Source != prepared.SourceRelease {
		t.Fatalf("%+v", a)
	}
	if rec := w.poller.Active(); rec == nil || rec.Sequence != 3 || rec.Agent != "agent" {
		t.Fatalf("%+v", rec)
	}
	if len(w.acks) != 5 || w.acks[4].Step != "activate" || w.acks[4].Result != "passed" || w.acks[4].PolicyRef != "p@1.0.0" {
		t.Errorf("%+v", w.acks)
	}
	w.poll()
	w.poll()
	if len(w.drain()) != 0 || w.fetches != 1 {
		t.Errorf("the same release was handled again: %d fetches", w.fetches)
	}
	// The node forgets nothing over a restart, with the control plane gone.
	w.cp.Close()
	w.start()
	if rec := w.poller.Active(); rec == nil || rec.ReleaseID != "stable-3" || w.slots.Current().Meta.ReleaseID != "stable-3" {
		t.Errorf("after a restart: %+v", rec)
	}
	if err := w.poller.Poll(t.Context()); err == nil {
		t.Error("a poll of nobody succeeded")
	}
}

// TestRefuse: a release that fails one of the four steps leaves the active one
// in force, its steps in the log, and is not tried again.
func TestRefuse(t *testing.T) {
	flip := func(b []byte) []byte { c := slices.Clone(b); c[len(c)/2] ^= 1; return c }
	for name, tc := range map[string]struct {
		change func(*world, *verify.Release, *verify.Material)
		step   string
		code   string
	}{
		"no signature of the image": {func(_ *world, _ *verify.Release, m *verify.Material) { m.ImageSignatures = nil }, "signature", verify.CodeSigMissing},
		"signature of another image": {func(w *world, _ *verify.Release, m *verify.Material) {
			sig, err := sigstore.Sign("sha256:"+strings.Repeat("0", 64), "", w.key)
			if err != nil {
				w.t.Fatal(err)
			}
			m.ImageSignatures = [][]byte{sig}
		}, "signature", verify.CodeSigInvalid},
		"expired":         {func(_ *world, r *verify.Release, _ *verify.Material) { r.ExpiresAt = now }, "signature", verify.CodeExpired},
		"another channel": {func(_ *world, r *verify.Release, _ *verify.Material) { r.Channel = "beta" }, "signature", verify.CodeNameMismatch},
		"older sequence":  {func(_ *world, r *verify.Release, _ *verify.Material) { r.Sequence, r.ReleaseID = 4, "old" }, "signature", verify.CodeSequenceRollback},
		"flipped lock":    {func(_ *world, _ *verify.Release, m *verify.Material) { m.Lock = flip(m.Lock) }, "digest", verify.CodeDigestMismatch},
		"flipped policy":  {func(_ *world, _ *verify.Release, m *verify.Material) { m.Policy = flip(m.Policy) }, "digest", verify.CodeDigestMismatch},
		"lock of another image": {func(w *world, r *verify.Release, m *verify.Material) {
			w.image = append(w.image, ' ')
			r.Agent.Image = "reg.test/agent@" + fingerprint.Digest(w.image)
			sig, err := sigstore.Sign(fingerprint.Digest(w.image), "", w.key)
			if err != nil {
				w.t.Fatal(err)
			}
			m.ImageManifest, m.ImageSignatures = w.image, [][]byte{sig}
		}, "digest", verify.CodeDigestMismatch},
		"another fingerprint": {func(_ *world, r *verify.Release, _ *verify.Material) {
			r.Fingerprint = "blake3:" + strings.Repeat("0", 64)
		}, "fingerprint", verify.CodeFingerprint},
		"newer runtime asked": {func(_ *world, r *verify.Release, _ *verify.Material) { r.RequiresRuntime = ">=9.0.0" }, "compatibility", verify.CodePolicyIncompatible},
		"other version asked": {func(_ *world, r *verify.Release, _ *verify.Material) { r.Policy.Ref = "reg.test/policy:2.0.0" }, "compatibility", verify.CodePolicyIncompatible},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.publish(5, nil)
			w.poll()
			w.drain()
			w.acks = nil
			w.publish(6, func(r *verify.Release, m *verify.Material) { tc.change(w, r, m) })
			w.poll()
			if a := w.slots.Current(); a.Meta.ReleaseID != "stable-5" {
				t.Fatalf("active: %+v", a.Meta)
			}
			failed := ""
			for _, b := range w.bodies {
				if b.Result == "failed" && failed == "" {
					failed = b.Code
				}
			}
			events := w.drain()
			want := append(slices.Clone(passedEvents[:5]), event.ReleaseRefused)
			if !slices.Equal(events, want) || failed != tc.code {
				t.Errorf("events %q with %q, want %q with %q", events, failed, want, tc.code)
			}
			st := w.poller.State()
			if len(st.Refused) != 1 || st.Refused[0].Step != tc.step || st.Refused[0].Code != tc.code || st.Refused[0].Detail == "" {
				t.Fatalf("%+v, want %s at %s", st.Refused, tc.code, tc.step)
			}
			if last := w.acks[len(w.acks)-1]; last.Result != "refused" || last.Code != tc.code {
				t.Errorf("reported %+v", last)
			}
			fetches := w.fetches
			w.poll()
			w.start() // and not after a restart either
			w.poll()
			if w.fetches != fetches || len(w.drain()) != 0 {
				t.Error("a refused release was tried again")
			}
		})
	}
}

// TestForged: an envelope that no trusted key signed is refused before anything
// is fetched.
func TestForged(t *testing.T) {
	w := newWorld(t)
	w.publish(1, nil)
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	mine := w.key
	w.key = other
	w.publish(2, nil)
	w.key = mine
	w.poll()
	if w.fetches != 0 || w.slots.Current() != nil {
		t.Fatalf("%d fetches for a forged release", w.fetches)
	}
	if st := w.poller.State(); len(st.Refused) != 1 || st.Refused[0].Code != verify.CodeSigInvalid || st.Refused[0].Step != "signature" {
		t.Errorf("%+v", st.Refused)
	}
	for name, body := range map[string][]byte{"garbage": []byte("\x00\x01"), "empty": {}, "unknown key": []byte(`{"payload":"","x":1}`)} {
		w.mu.Lock()
		w.envelope = body
		w.mu.Unlock()
		w.poll()
		if w.slots.Current() != nil {
			t.Errorf("%s: something is active", name)
		}
	}
	w.mu.Lock()
	w.envelope = make([]byte, verify.MaxEnvelopeBytes+1)
	w.mu.Unlock()
	if err := w.poller.Poll(t.Context()); err == nil || !strings.Contains(err.Error(), "over 65536 bytes") {
		t.Errorf("oversized: %v", err)
	}
}

// TestWay: a fault of the way condemns nothing.
func TestWay(t *testing.T) {
	w := newWorld(t)
	w.publish(1, nil)
	w.fetchErr = errors.New("connection reset")
	for range 3 {
		if err := w.poller.Poll(t.Context()); err == nil || !strings.Contains(err.Error(), "connection reset") {
			t.Fatalf("%v", err)
		}
	}
	if st := w.poller.State(); len(st.Refused) != 0 || w.slots.Current() != nil {
		t.Fatalf("%+v", st)
	}
	w.fetchErr = nil
	w.poll()
	if w.slots.Current() == nil {
		t.Error("not activated once the way was free")
	}
}

// TestRollback: an activated sequence never comes back, not over a restart and
// not with a damaged state file; a higher one that points at older content does.
func TestRollback(t *testing.T) {
	w := newWorld(t)
	w.publish(10, nil)
	old := w.envelope
	oldMaterial := w.material
	w.poll()
	w.publish(11, nil)
	w.poll()
	w.envelope, w.material = old, oldMaterial
	w.start()
	w.poll()
	if st := w.poller.State(); len(st.Refused) != 1 || st.Refused[0].Code != verify.CodeSequenceRollback || w.slots.Current().Meta.Sequence != 11 {
		t.Fatalf("%+v", st.Refused)
	}
	w.publish(12, nil)
	w.poll()
	if w.slots.Current().Meta.Sequence != 12 {
		t.Error("going back on purpose failed")
	}
	path := filepath.Join(w.dir, "release", "active.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{"truncated": data[:len(data)/2], "empty": {}, "unknown key": []byte(`{"x":1}`), "twice": []byte(`{"sequence":1,"sequence":2}`)} {
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := w.newPoller(); err == nil || !strings.Contains(err.Error(), "is damaged") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCrash: a stop between the slot's swap and the state file is completed, one
// before the swap undone.
func TestCrash(t *testing.T) {
	w := newWorld(t)
	w.publish(1, nil)
	w.poll()
	dir := filepath.Join(w.dir, "release")
	active, err := os.ReadFile(filepath.Join(dir, "active.json"))
	if err != nil {
		t.Fatal(err)
	}
	w.publish(2, nil)
	w.poll()
	second, err := os.ReadFile(filepath.Join(dir, "active.json"))
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// After the swap to 2, before the rename.
	write("active.json", active)
	write("staged.json", second)
	w.start()
	if rec := w.poller.Active(); rec == nil || rec.Sequence != 2 {
		t.Fatalf("not completed: %+v", rec)
	}
	// Staged 2, slot still 1.
	write("active.json", active)
	write("staged.json", second)
	if err := w.slots.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.start()
	if rec := w.poller.Active(); rec == nil || rec.Sequence != 1 {
		t.Fatalf("not undone: %+v", rec)
	}
	if _, err := os.Stat(filepath.Join(dir, "staged.json")); !os.IsNotExist(err) {
		t.Error("staged.json is still there")
	}
}

// TestMend: the release whose slot is damaged comes back by the next poll; an
// older one does not.
func TestMend(t *testing.T) {
	w := newWorld(t)
	w.publish(1, nil)
	old, oldMaterial := w.envelope, w.material
	w.poll()
	w.publish(2, nil)
	env, material := w.envelope, w.material
	w.poll()
	for _, slot := range []string{"active", "lkg"} {
		if err := os.WriteFile(filepath.Join(w.dir, "policy", slot, "bundle.tar.gz"), []byte("junk"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.start()
	if w.slots.Current() != nil || w.poller.Active() != nil {
		t.Fatal("a damaged slot is in force")
	}
	w.drain()
	w.envelope, w.material = old, oldMaterial
	w.poll()
	if w.slots.Current() != nil {
		t.Fatal("an older release came back over a damaged slot")
	}
	w.envelope, w.material = env, material
	w.poll()
	if a := w.slots.Current(); a == nil || a.Meta.Sequence != 2 || w.poller.Active() == nil {
		t.Fatalf("not mended: %+v", a)
	}
	w.poll()
	if st := w.poller.State(); len(st.Refused) != 1 || st.Refused[0].Code != verify.CodeSequenceRollback {
		t.Errorf("%+v", st.Refused)
	}
}

func TestStale(t *testing.T) {
	w := newWorld(t)
	w.publish(1, nil)
	w.poll()
	if w.poller.State().Stale {
		t.Error("stale at once")
	}
	w.now = now.Add(48 * time.Hour)
	if !w.poller.State().Stale || w.slots.Current() == nil {
		t.Error("an expired release must keep running, and be called stale")
	}
}

func TestClientURL(t *testing.T) {
	for _, bad := range []string{"", "127.0.0.1:8888", "ftp://x", "http://"} {
		if _, err := release.NewClient(bad, nil); err == nil || !strings.Contains(err.Error(), "want http://HOST:PORT") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
