package verify_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/fingerprint"
	"github.com/autonomyops/autonomy/verify"
	"github.com/autonomyops/autonomy/verify/sigstore"
)

var (
	created = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	now     = created.Add(time.Hour)
)

func ecKey(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func publicKey(t testing.TB, s crypto.Signer, usages ...verify.Usage) *verify.Key {
	t.Helper()
	p, err := verify.MarshalPublicKey(s.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &verify.Key{PublicKey: string(p), Usages: usages}
}

// fixture is a release that passes; a test breaks one thing of it. The bytes are
// made by build, so what is changed before it is consistent, and what is changed
// after it is an attack.
type fixture struct {
	t testing.TB

	release, artifact       crypto.Signer // sign the statement, the image
	releaseKey, artifactKey *verify.Key

	lock           *fingerprint.Lock
	bundle         []byte
	meta           verify.PolicyMeta
	imageManifest  []byte
	policyManifest []byte // nil: made for bundle
	rel            verify.Release

	m verify.Material
	p verify.Params
}

func newFixture(t testing.TB) *fixture { return newFixtureWith(t, ecKey(t), ecKey(t)) }

func newFixtureWith(t testing.TB, release, artifact crypto.Signer) *fixture {
	f := &fixture{t: t, release: release, artifact: artifact, bundle: []byte("the bundle's bytes")}
	f.releaseKey, f.artifactKey = publicKey(t, release, verify.UsageRelease), publicKey(t, artifact, verify.UsageArtifact)
	f.imageManifest = []byte(`{"schemaVersion":2}`)
	f.meta = verify.PolicyMeta{Name: "edge", Version: "1.4.2", RequiresRuntime: ">=0.1.0 <1.0.0"}
	f.lock = fingerprint.New()
	f.lock.Agent = fingerprint.Agent{Name: "agent", Version: "2.0.0", ImageDigest: fingerprint.Digest(f.imageManifest)}
	f.lock.Policy = fingerprint.Policy{Name: "edge", Version: "1.4.2", Digest: fingerprint.Digest(f.bundle)}
	f.lock.Tools = []fingerprint.Tool{{Kind: "tool.echo", DefinitionDigest: fingerprint.Digest(nil)}}
	f.lock.Runtime.MinVersion = "0.1.0"
	f.rel = verify.Release{
		Schema: verify.ReleaseSchema, ReleaseID: "stable-7", Channel: "stable", Sequence: 7,
		Agent:           verify.ReleaseAgent{Image: "registry.example/agents/a@" + fingerprint.Digest(f.imageManifest)},
		Policy:          verify.ReleasePolicy{Ref: "registry.example:5000/policies/edge:1.4.2"},
		RequiresRuntime: ">=0.1.0", CreatedAt: created, ExpiresAt: created.Add(24 * time.Hour),
	}
	f.p = verify.Params{Channel: "stable", AgentName: "agent", HighestSequence: 6, Now: now, RuntimeVersion: "0.1.0"}
	f.p.ReadPolicy = func(b []byte) (verify.PolicyMeta, error) {
		if !bytes.Equal(b, f.m.Policy) {
			t.Error("ReadPolicy was given other bytes than those that were checked")
		}
		return f.meta, nil
	}
	return f
}

func manifestOf(layerType, digest string) []byte {
	return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":%q,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[{"mediaType":%q,"digest":%q,"size":1}]}`, layerType, layerType, digest)
}

func (f *fixture) build() {
	f.t.Helper()
	lock, err := f.lock.Marshal()
	if err != nil {
		f.t.Fatal(err)
	}
	if f.policyManifest == nil {
		f.policyManifest = manifestOf(verify.PolicyMediaType, fingerprint.Digest(f.bundle))
	}
	f.rel.Policy.Digest = fingerprint.Digest(f.policyManifest)
	f.rel.Lock = fingerprint.Digest(lock)
	if f.rel.Fingerprint == "" {
		f.rel.Fingerprint = f.lock.Fingerprint
	}
	f.m = verify.Material{Lock: lock, PolicyManifest: f.policyManifest, Policy: f.bundle, ImageManifest: f.imageManifest}
	f.sign()
	image, err := sigstore.Sign(f.rel.Agent.Digest(), "", f.artifact)
	if err != nil {
		f.t.Fatal(err)
	}
	f.m.ImageSignatures = [][]byte{image}
	if f.release == f.artifact {
		f.trust(publicKey(f.t, f.release, verify.UsageRelease, verify.UsageArtifact))
	} else {
		f.trust(f.releaseKey, f.artifactKey)
	}
}

func (f *fixture) sign() {
	f.t.Helper()
	env, err := verify.SignRelease(&f.rel, f.release)
	if err != nil {
		f.t.Fatal(err)
	}
	f.m.Envelope = env
}

func (f *fixture) trust(keys ...*verify.Key) {
	f.t.Helper()
	kr, err := verify.NewKeyring(keys...)
	if err != nil {
		f.t.Fatal(err)
	}
	if f.p.Artifacts, err = sigstore.New(kr); err != nil {
		f.t.Fatal(err)
	}
	f.p.Keyring = kr
}

// envelope edits the DSSE envelope's JSON without signing it again.
func (f *fixture) envelope(edit func(e map[string]any)) {
	f.t.Helper()
	var e map[string]any
	if err := json.Unmarshal(f.m.Envelope, &e); err != nil {
		f.t.Fatal(err)
	}
	edit(e)
	out, err := json.Marshal(e)
	if err != nil {
		f.t.Fatal(err)
	}
	f.m.Envelope = out
}

// payload signs a payload that SignRelease would not.
func (f *fixture) payload(payloadType, text string) {
	f.t.Helper()
	env, err := verify.Seal(payloadType, []byte(text), f.release)
	if err != nil {
		f.t.Fatal(err)
	}
	f.m.Envelope = env
}

func (f *fixture) statement() string {
	f.t.Helper()
	var e struct{ Payload []byte }
	if err := json.Unmarshal(f.m.Envelope, &e); err != nil {
		f.t.Fatal(err)
	}
	return string(e.Payload)
}

// restate signs the statement again with old replaced by now.
func (f *fixture) restate(old, now string) {
	f.t.Helper()
	s := f.statement()
	if !strings.Contains(s, old) {
		f.t.Fatalf("the statement holds no %q: %s", old, s)
	}
	f.payload(verify.ReleaseMediaType, strings.Replace(s, old, now, 1))
}

func TestPasses(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256 := ecKey(t)
	for _, tt := range []struct {
		name              string
		release, artifact crypto.Signer
		before, after     func(*fixture)
	}{
		{name: "P-256", release: p256, artifact: ecKey(t)},
		{name: "Ed25519", release: &ed, artifact: p256}, // by pointer: a slice cannot be compared
		{name: "one key for both", release: p256, artifact: p256},
		{name: "no image bytes", release: p256, artifact: ecKey(t), after: func(f *fixture) { f.m.ImageManifest = nil }},
		{name: "any agent", release: p256, artifact: ecKey(t), before: func(f *fixture) { f.p.AgentName = "" }},
		{name: "a development version", release: p256, artifact: ecKey(t), before: func(f *fixture) { f.p.RuntimeVersion = "0.2.0-dev" }},
		{name: "no constraints", release: p256, artifact: ecKey(t), before: func(f *fixture) { f.rel.RequiresRuntime, f.meta.RequiresRuntime = "", "" }},
		{name: "key valid at that moment only", release: p256, artifact: ecKey(t), before: func(f *fixture) { f.releaseKey.NotBefore, f.releaseKey.NotAfter = &created, &created }},
		{name: "first release", release: p256, artifact: ecKey(t), before: func(f *fixture) { f.rel.Sequence, f.p.HighestSequence = 1, 0 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixtureWith(t, tt.release, tt.artifact)
			if tt.before != nil {
				tt.before(f)
			}
			f.build()
			if tt.after != nil {
				tt.after(f)
			}
			ev, rel, err := verify.Verify(context.Background(), f.m, f.p)
			if err != nil {
				t.Fatal(err)
			}
			if rel.ReleaseID != f.rel.ReleaseID || ev.Fingerprint != f.lock.Fingerprint || len(ev.Sections) != 8 || ev.KeyID == "" || ev.ImageKeyID == "" {
				t.Errorf("release %+v, evidence %+v", rel, ev)
			}
			for i, s := range ev.Steps {
				if s.Name != verify.Steps[i] || s.Result != verify.Passed || s.Code != "" || len(s.Checked) == 0 {
					t.Errorf("step %d is %+v, want it passed", i+1, s)
				}
			}
			if len(ev.Steps[0].NotChecked) == 0 {
				t.Error("the evidence does not say what was not checked")
			}
		})
	}
}

// TestAttacks breaks one thing of a good release each, and wants the step and the
// code. before changes what is built, after changes what was built.
func TestAttacks(t *testing.T) {
	past, future := created.Add(-time.Second), created.Add(time.Second)
	type attack struct {
		name   string
		before func(*fixture)
		after  func(*fixture)
		step   int
		code   string
		text   string
	}
	flip := func(b []byte) []byte {
		out := bytes.Clone(b)
		out[len(out)/2] ^= 4
		return out
	}
	attacks := []attack{
		// Step 1: the envelope.
		{"no envelope", nil, func(f *fixture) { f.m.Envelope = nil }, 1, verify.CodeSigMissing, "no envelope"},
		{"signature stripped", nil, func(f *fixture) { f.envelope(func(e map[string]any) { e["signatures"] = []any{} }) }, 1, verify.CodeSigMissing, "no signature"},
		{"signatures key gone", nil, func(f *fixture) { f.envelope(func(e map[string]any) { delete(e, "signatures") }) }, 1, verify.CodeSigMissing, ""},
		{"signature emptied", nil, func(f *fixture) {
			f.envelope(func(e map[string]any) { e["signatures"] = []any{map[string]any{"keyid": "", "sig": ""}} })
		}, 1, verify.CodeSigMissing, ""},
		{"wrong key", nil, func(f *fixture) { f.release = ecKey(f.t); f.sign() }, 1, verify.CodeSigInvalid, "no release key"},
		{"wrong key under the right hint", nil, func(f *fixture) {
			id := f.p.Keyring.Keys[0].ID
			f.release = ecKey(f.t)
			f.sign()
			f.envelope(func(e map[string]any) { e["signatures"].([]any)[0].(map[string]any)["keyid"] = id })
		}, 1, verify.CodeSigInvalid, "no release key"},
		{"signed by the artifact key", nil, func(f *fixture) { f.release = f.artifact; f.sign() }, 1, verify.CodeSigInvalid, "not for usage"},
		{"two signatures, one bad", nil, func(f *fixture) {
			f.envelope(func(e map[string]any) {
				e["signatures"] = append(e["signatures"].([]any), map[string]any{"keyid": "x", "sig": "AAAA"})
			})
		}, 1, verify.CodeSigInvalid, "2 signatures, want exactly one"},
		{"two good signatures", nil, func(f *fixture) {
			f.envelope(func(e map[string]any) {
				s := e["signatures"].([]any)
				e["signatures"] = append(s, s[0])
			})
		}, 1, verify.CodeSigInvalid, "want exactly one"},
		{"signature is no base64", nil, func(f *fixture) {
			f.envelope(func(e map[string]any) { e["signatures"].([]any)[0].(map[string]any)["sig"] = "***" })
		}, 1, verify.CodeSigInvalid, "not base64"},
		{"payload changed", nil, func(f *fixture) {
			s := strings.Replace(f.statement(), "stable-7", "stable-8", 1)
			f.envelope(func(e map[string]any) { e["payload"] = base64.StdEncoding.EncodeToString([]byte(s)) })
		}, 1, verify.CodeSigInvalid, ""},
		{"payload type exchanged", nil, func(f *fixture) {
			f.envelope(func(e map[string]any) { e["payloadType"] = "application/vnd.in-toto+json" })
		}, 1, verify.CodeReleaseMalformed, "payloadType is"},
		{"another kind of document by the same key", nil, func(f *fixture) {
			f.payload("application/vnd.in-toto+json", f.statement())
			f.envelope(func(e map[string]any) { e["payloadType"] = verify.ReleaseMediaType })
		}, 1, verify.CodeSigInvalid, ""},
		{"envelope with an unknown key", nil, func(f *fixture) { f.envelope(func(e map[string]any) { e["extra"] = 1 }) }, 1, verify.CodeReleaseMalformed, `unknown key "extra"`},
		{"envelope with a duplicate key", nil, func(f *fixture) { f.m.Envelope = append([]byte(`{"payload":"",`), f.m.Envelope[1:]...) }, 1, verify.CodeReleaseMalformed, "duplicate key"},
		{"envelope truncated", nil, func(f *fixture) { f.m.Envelope = f.m.Envelope[:40] }, 1, verify.CodeReleaseMalformed, ""},
		{"envelope oversized", nil, func(f *fixture) { f.m.Envelope = append(f.m.Envelope, make([]byte, verify.MaxEnvelopeBytes)...) }, 1, verify.CodeReleaseMalformed, "the limit is 65536"},
		{"envelope not JSON", nil, func(f *fixture) { f.m.Envelope = []byte("\xff\xfe") }, 1, verify.CodeReleaseMalformed, ""},
		{"payload no base64", nil, func(f *fixture) { f.envelope(func(e map[string]any) { e["payload"] = "*" }) }, 1, verify.CodeReleaseMalformed, "not base64"},

		// Step 1: the statement, signed by a trusted key all the same.
		{"statement with an unknown key", nil, func(f *fixture) { f.restate(`{"agent"`, `{"Extra":1,"agent"`) }, 1, verify.CodeReleaseMalformed, "unknown key"},
		{"statement with a duplicate key", nil, func(f *fixture) { f.restate(`{"agent"`, `{"channel":"edge","agent"`) }, 1, verify.CodeReleaseMalformed, "duplicate key"},
		{"statement with a key of another case", nil, func(f *fixture) { f.restate(`"channel"`, `"Channel"`) }, 1, verify.CodeReleaseMalformed, "case-sensitive"},
		{"statement with a null", nil, func(f *fixture) { f.restate(`"requires_runtime":">=0.1.0"`, `"requires_runtime":null`) }, 1, verify.CodeReleaseMalformed, "requires_runtime is null"},
		{"statement without a key", nil, func(f *fixture) { f.restate(`"channel":"stable",`, ``) }, 1, verify.CodeReleaseMalformed, "channel is"},
		{"statement without an end", nil, func(f *fixture) {
			f.restate(`"expires_at":"`+f.rel.ExpiresAt.Format(time.RFC3339)+`",`, ``)
		}, 1, verify.CodeReleaseMalformed, "expires_at"},
		{"statement of the wrong type", nil, func(f *fixture) { f.restate(`"sequence":7`, `"sequence":"7"`) }, 1, verify.CodeReleaseMalformed, "sequence"},
		{"negative sequence", nil, func(f *fixture) { f.restate(`"sequence":7`, `"sequence":-7`) }, 1, verify.CodeReleaseMalformed, ""},
		{"fractional sequence", nil, func(f *fixture) { f.restate(`"sequence":7`, `"sequence":7.5`) }, 1, verify.CodeReleaseMalformed, ""},
		{"sequence beyond 2^53", nil, func(f *fixture) { f.restate(`"sequence":7`, `"sequence":9007199254740992`) }, 1, verify.CodeReleaseMalformed, "sequence is"},
		{"statement is null", nil, func(f *fixture) { f.payload(verify.ReleaseMediaType, "null") }, 1, verify.CodeReleaseMalformed, ""},
		{"statement is a list", nil, func(f *fixture) { f.payload(verify.ReleaseMediaType, "[]") }, 1, verify.CodeReleaseMalformed, ""},
		{"other schema", nil, func(f *fixture) { f.restate("autonomy.release/v0", "autonomy.release/v1") }, 1, verify.CodeReleaseMalformed, "schema is"},
		{"image by tag", nil, func(f *fixture) { f.restate("/agents/a@sha256:", "/agents/a:sha256-") }, 1, verify.CodeReleaseMalformed, "agent.image"},
		{"image without a registry", nil, func(f *fixture) { f.restate("registry.example/agents/a", "agents/a") }, 1, verify.CodeReleaseMalformed, "agent.image"},
		{"image with a path that climbs", nil, func(f *fixture) { f.restate("registry.example/agents/a", "registry.example/../a") }, 1, verify.CodeReleaseMalformed, "agent.image"},
		{"policy without a version", nil, func(f *fixture) { f.restate("edge:1.4.2", "edge:latest") }, 1, verify.CodeReleaseMalformed, "its tag must be the version"},
		{"constraints with an alternative", nil, func(f *fixture) { f.restate(`"requires_runtime":">=0.1.0"`, `"requires_runtime":">=9 || >=0"`) }, 1, verify.CodeReleaseMalformed, "constraint"},

		// Step 1: who, for whom, when, after what.
		{"key revoked", func(f *fixture) { f.releaseKey.Revoked = true }, nil, 1, verify.CodeKeyRevoked, "is revoked"},
		{"key expired before it was made", func(f *fixture) { f.releaseKey.NotAfter = &past }, nil, 1, verify.CodeKeyExpired, "was valid until"},
		{"key not yet valid when it was made", func(f *fixture) { f.releaseKey.NotBefore = &future }, nil, 1, verify.CodeKeyExpired, "is valid from"},
		{"channel of others", nil, func(f *fixture) { f.p.Channel = "edge" }, 1, verify.CodeNameMismatch, `for channel "stable"`},
		{"release expired", nil, func(f *fixture) { f.p.Now = f.rel.ExpiresAt }, 1, verify.CodeExpired, "expired 2026-06-02"},
		{"time not known", nil, func(f *fixture) { f.p.Now = time.Time{} }, 1, verify.CodeExpired, "time is not known"},
		{"same sequence again", nil, func(f *fixture) { f.p.HighestSequence = 7 }, 1, verify.CodeSequenceRollback, "sequence 7"},
		{"older sequence", nil, func(f *fixture) { f.p.HighestSequence = 8 }, 1, verify.CodeSequenceRollback, ""},
		{"no keyring", nil, func(f *fixture) { f.p.Keyring = nil }, 1, verify.CodeSigInvalid, "no key is trusted"},

		// Step 1: the image's signature.
		{"image not signed", nil, func(f *fixture) { f.m.ImageSignatures = nil }, 1, verify.CodeSigMissing, "image: no signature"},
		{"image signed by another", nil, func(f *fixture) {
			b, err := sigstore.Sign(f.rel.Agent.Digest(), "", ecKey(f.t))
			if err != nil {
				f.t.Fatal(err)
			}
			f.m.ImageSignatures = [][]byte{b}
		}, 1, verify.CodeSigInvalid, "image:"},
		{"image signed by the release key", nil, func(f *fixture) {
			b, err := sigstore.Sign(f.rel.Agent.Digest(), "", f.release)
			if err != nil {
				f.t.Fatal(err)
			}
			f.m.ImageSignatures = [][]byte{b}
		}, 1, verify.CodeSigInvalid, "not for usage"},
		{"signature of another image", nil, func(f *fixture) {
			b, err := sigstore.Sign(fingerprint.Digest([]byte("other")), "", f.artifact)
			if err != nil {
				f.t.Fatal(err)
			}
			f.m.ImageSignatures = [][]byte{b}
		}, 1, verify.CodeSigInvalid, "image:"},
		{"artifact key revoked", func(f *fixture) { f.artifactKey.Revoked = true }, nil, 1, verify.CodeKeyRevoked, "image:"},
		{"artifact key expired", func(f *fixture) { f.artifactKey.NotAfter = &past }, nil, 1, verify.CodeKeyExpired, "image:"},
		{"verifier for artifacts that fails without a code", nil, func(f *fixture) { f.p.Artifacts = failing{} }, 1, verify.CodeSigInvalid, "image: out of order"},
		{"no verifier for artifacts", nil, func(f *fixture) { f.p.Artifacts = nil }, 1, verify.CodeSigMissing, "no verifier"},

		// Step 2: bytes.
		{"lock, one bit", nil, func(f *fixture) { f.m.Lock = flip(f.m.Lock) }, 2, verify.CodeDigestMismatch, "lock: the bytes are"},
		{"lock missing", nil, func(f *fixture) { f.m.Lock = nil }, 2, verify.CodeDigestMismatch, "lock: there are no bytes"},
		{"lock truncated", nil, func(f *fixture) { f.m.Lock = f.m.Lock[:9] }, 2, verify.CodeDigestMismatch, "lock:"},
		{"lock of another release", nil, func(f *fixture) {
			g := newFixture(f.t)
			g.lock.Agent.Version = "9.9.9"
			g.build()
			f.m.Lock = g.m.Lock
		}, 2, verify.CodeDigestMismatch, "lock:"},
		{"policy, one bit", nil, func(f *fixture) { f.m.Policy = flip(f.m.Policy) }, 2, verify.CodeDigestMismatch, "policy bundle: the bytes are"},
		{"policy missing", nil, func(f *fixture) { f.m.Policy = nil }, 2, verify.CodeDigestMismatch, "policy bundle: there are no bytes"},
		{"policy manifest, one bit", nil, func(f *fixture) { f.m.PolicyManifest = flip(f.m.PolicyManifest) }, 2, verify.CodeDigestMismatch, "policy manifest:"},
		{"policy and manifest swapped together", nil, func(f *fixture) {
			f.m.Policy = []byte("another bundle")
			f.m.PolicyManifest = manifestOf(verify.PolicyMediaType, fingerprint.Digest(f.m.Policy))
		}, 2, verify.CodeDigestMismatch, "policy manifest:"},
		{"image, one bit", nil, func(f *fixture) { f.m.ImageManifest = flip(f.m.ImageManifest) }, 2, verify.CodeDigestMismatch, "image manifest:"},
		{"lock and policy swapped", nil, func(f *fixture) { f.m.Lock, f.m.Policy = f.m.Policy, f.m.Lock }, 2, verify.CodeDigestMismatch, "lock:"},
		{"index where the policy manifest is due", func(f *fixture) {
			f.policyManifest = []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`)
		}, nil, 2, verify.CodeArtifactMalformed, "an index is not accepted"},
		{"manifest and index at once", func(f *fixture) {
			f.policyManifest = bytes.Replace(manifestOf(verify.PolicyMediaType, fingerprint.Digest(f.bundle)), []byte(`"layers"`), []byte(`"manifests":[],"layers"`), 1)
		}, nil, 2, verify.CodeArtifactMalformed, ""},
		{"policy layer of another type", func(f *fixture) {
			f.policyManifest = manifestOf(fingerprint.MediaType, fingerprint.Digest(f.bundle))
		}, nil, 2, verify.CodeArtifactMalformed, "policy layer is"},
		{"two layers", func(f *fixture) {
			f.policyManifest = bytes.Replace(manifestOf(verify.PolicyMediaType, fingerprint.Digest(f.bundle)), []byte(`"layers":[`), []byte(`"layers":[{},`), 1)
		}, nil, 2, verify.CodeArtifactMalformed, "2 layers, want one"},
		{"manifest with a duplicate key", func(f *fixture) {
			f.policyManifest = append([]byte(`{"layers":[],`), manifestOf(verify.PolicyMediaType, fingerprint.Digest(f.bundle))[1:]...)
		}, nil, 2, verify.CodeArtifactMalformed, "duplicate key"},
		{"manifest oversized", func(f *fixture) {
			f.policyManifest = append(manifestOf(verify.PolicyMediaType, fingerprint.Digest(f.bundle)), bytes.Repeat([]byte(" "), verify.MaxManifestBytes)...)
		}, nil, 2, verify.CodeArtifactMalformed, "the limit is"},
		{"lock for another image", func(f *fixture) { f.lock.Agent.ImageDigest = fingerprint.Digest([]byte("other")) }, nil, 2, verify.CodeDigestMismatch, "the lock is for image"},
		{"lock for another bundle", func(f *fixture) { f.lock.Policy.Digest = fingerprint.Digest([]byte("other")) }, nil, 2, verify.CodeDigestMismatch, "the lock is for policy bundle"},
		{"signed lock that is none", nil, func(f *fixture) {
			f.m.Lock = []byte(`{"schema":"autonomy.lock/v0"}`)
			f.rel.Lock = fingerprint.Digest(f.m.Lock)
			f.sign()
		}, 2, verify.CodeLockMalformed, "malformed lock"},

		// Step 3.
		{"statement with another fingerprint", func(f *fixture) { f.rel.Fingerprint = "blake3:" + strings.Repeat("0", 64) }, nil, 3, verify.CodeFingerprint, "the release says"},
		{"lock whose fingerprint is not its content's", nil, func(f *fixture) {
			f.m.Lock = bytes.Replace(f.m.Lock, []byte("2.0.0"), []byte("2.0.1"), 1)
			f.rel.Lock = fingerprint.Digest(f.m.Lock)
			f.sign()
		}, 3, verify.CodeFingerprint, "its content gives"},
		{"another agent", nil, func(f *fixture) { f.p.AgentName = "other" }, 3, verify.CodeNameMismatch, `for agent "agent"`},

		// Step 4.
		{"bundle of another version", func(f *fixture) { f.meta.Version = "1.4.1" }, nil, 4, verify.CodePolicyIncompatible, "the release asks for 1.4.2"},
		{"bundle without a version", func(f *fixture) { f.meta.Version = "latest" }, nil, 4, verify.CodePolicyIncompatible, "want a version"},
		{"bundle of another name", func(f *fixture) { f.meta.Name = "other" }, nil, 4, verify.CodePolicyIncompatible, "the lock says"},
		{"lock of another policy version", func(f *fixture) { f.lock.Policy.Version = "1.4.1" }, nil, 4, verify.CodePolicyIncompatible, "the lock says"},
		{"bundle that cannot be read", func(f *fixture) {
			f.p.ReadPolicy = func([]byte) (verify.PolicyMeta, error) { return verify.PolicyMeta{}, errors.New("not an archive") }
		}, nil, 4, verify.CodePolicyIncompatible, "not an archive"},
		{"reader for bundles that panics", func(f *fixture) {
			f.p.ReadPolicy = func([]byte) (verify.PolicyMeta, error) { panic("out of range") }
		}, nil, 4, verify.CodeInternal, "the check panicked: \"out of range\""},
		{"no reader for bundles", nil, func(f *fixture) { f.p.ReadPolicy = nil }, 4, verify.CodePolicyIncompatible, "no reader"},
		{"runtime below the release's", func(f *fixture) { f.rel.RequiresRuntime = ">=0.2.0" }, nil, 4, verify.CodePolicyIncompatible, "release: runtime 0.1.0"},
		{"runtime below the lock's", func(f *fixture) { f.lock.Runtime.MinVersion = "0.1.1" }, nil, 4, verify.CodePolicyIncompatible, "lock: runtime 0.1.0"},
		{"runtime above the bundle's", func(f *fixture) { f.p.RuntimeVersion = "1.0.0" }, nil, 4, verify.CodePolicyIncompatible, "bundle: runtime 1.0.0 does not satisfy <1.0.0"},
		{"pre-release of what is due", func(f *fixture) { f.p.RuntimeVersion = "0.1.0-rc.1" }, nil, 4, verify.CodePolicyIncompatible, ""},
		{"bundle's constraint malformed", func(f *fixture) { f.meta.RequiresRuntime = "any" }, nil, 4, verify.CodePolicyIncompatible, `constraint "any"`},
		{"runtime version malformed", nil, func(f *fixture) { f.p.RuntimeVersion = "dev" }, 4, verify.CodePolicyIncompatible, "runtime version"},
	}
	seen := map[string]bool{}
	for _, a := range attacks {
		seen[a.code] = true
		t.Run(a.name, func(t *testing.T) {
			f := newFixture(t)
			if a.before != nil {
				a.before(f)
			}
			f.build()
			if a.after != nil {
				a.after(f)
			}
			ev, rel, err := verify.Verify(context.Background(), f.m, f.p)
			var fault *verify.Error
			if !errors.As(err, &fault) || fault.Step != a.step || fault.Code != a.code || !strings.Contains(fault.Detail, a.text) || rel != nil {
				t.Fatalf("Verify = %v, step and error %+v; want step %d, %s with %q", rel, fault, a.step, a.code, a.text)
			}
			for i, s := range ev.Steps {
				want := verify.Passed
				switch {
				case i+1 == a.step:
					want = verify.Failed
				case i+1 > a.step:
					want = verify.Skipped
				}
				if s.Name != verify.Steps[i] || s.Result != want || (s.Code != "") != (want == verify.Failed) {
					t.Errorf("step %d is %+v, want %s", i+1, s, want)
				}
			}
		})
	}
	for _, code := range []string{verify.CodeSigMissing, verify.CodeSigInvalid, verify.CodeKeyExpired, verify.CodeKeyRevoked, verify.CodeReleaseMalformed, verify.CodeNameMismatch, verify.CodeExpired,
		verify.CodeSequenceRollback, verify.CodeDigestMismatch, verify.CodeArtifactMalformed, verify.CodeLockMalformed, verify.CodeFingerprint, verify.CodePolicyIncompatible, verify.CodeInternal} {
		if !seen[code] {
			t.Errorf("no attack gives %s", code)
		}
	}
}

// failing is an artifact verifier whose error carries no code, and a key id all
// the same.
type failing struct{}

func (failing) VerifyArtifact(context.Context, string, [][]byte, time.Time) (string, error) {
	return "some key", errors.New("out of order")
}

func TestUnseal(t *testing.T) {
	s := ecKey(t)
	kr, err := verify.NewKeyring(publicKey(t, s, verify.UsageArtifact))
	if err != nil {
		t.Fatal(err)
	}
	env, err := verify.Seal("application/x", []byte("payload"), s)
	if err != nil {
		t.Fatal(err)
	}
	payload, k, err := verify.Unseal(env, "application/x", verify.UsageArtifact, kr, len(env))
	if err != nil || string(payload) != "payload" || k != kr.Keys[0] {
		t.Errorf("Unseal = %q, %v, %v", payload, k, err)
	}
	for name, tt := range map[string]struct {
		typ   string
		usage verify.Usage
		limit int
		code  string
	}{
		"another type":   {"application/y", verify.UsageArtifact, len(env), verify.CodeReleaseMalformed},
		"another usage":  {"application/x", verify.UsageRelease, len(env), verify.CodeSigInvalid},
		"over the limit": {"application/x", verify.UsageArtifact, len(env) - 1, verify.CodeReleaseMalformed},
	} {
		var fault *verify.Error
		if payload, k, err := verify.Unseal(env, tt.typ, tt.usage, kr, tt.limit); !errors.As(err, &fault) || fault.Code != tt.code || payload != nil || k != nil {
			t.Errorf("%s: Unseal = %q, %v, %v; want %s", name, payload, k, err, tt.code)
		}
	}
}

func TestCanceled(t *testing.T) {
	f := newFixture(t)
	f.build()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, rel, err := verify.Verify(ctx, f.m, f.p); !errors.Is(err, context.Canceled) || rel != nil {
		t.Errorf("Verify = %v, %v; want Canceled", rel, err)
	}
}

// TestLocalOnly guards INV-06: nothing that Verify takes can lead to the network.
func TestLocalOnly(t *testing.T) {
	var walk func(at string, typ reflect.Type)
	walk = func(at string, typ reflect.Type) {
		switch typ.Kind() {
		case reflect.Struct:
			if typ.PkgPath() != reflect.TypeFor[verify.Params]().PkgPath() {
				return
			}
			for i := range typ.NumField() {
				f := typ.Field(i)
				for _, word := range []string{"url", "uri", "host", "addr", "endpoint", "remote", "client", "ref", "dial", "transport"} {
					if slices.Contains(strings.FieldsFunc(strings.ToLower(f.Name), func(r rune) bool { return r == '_' }), word) {
						t.Errorf("%s.%s: activation takes a remote identifier", at, f.Name)
					}
				}
				walk(at+"."+f.Name, f.Type)
			}
		case reflect.Pointer, reflect.Slice:
			walk(at, typ.Elem())
		case reflect.Chan:
			t.Errorf("%s is a %s", at, typ)
		}
	}
	walk("Material", reflect.TypeFor[verify.Material]())
	walk("Params", reflect.TypeFor[verify.Params]())
}

func TestOpenEnvelope(t *testing.T) {
	f := newFixture(t)
	f.build()
	r, id, err := verify.OpenEnvelope(f.m.Envelope, f.p.Keyring, now)
	if err != nil || id != f.p.Keyring.Keys[0].ID || *r != f.rel {
		t.Errorf("OpenEnvelope = %+v, %q, %v; want %+v", r, id, err, f.rel)
	}
	var fault *verify.Error
	if _, _, err := verify.OpenEnvelope(f.m.Envelope, f.p.Keyring, f.rel.ExpiresAt); !errors.As(err, &fault) || fault.Code != verify.CodeExpired {
		t.Errorf("after its end: %v, want expired", err)
	}
	if _, _, err := verify.OpenEnvelope(f.m.Envelope, f.p.Keyring, time.Time{}); err != nil {
		t.Errorf("a zero time skips expiry: %v", err)
	}
	if _, _, err := verify.OpenEnvelope(f.m.Envelope, nil, now); !errors.As(err, &fault) || fault.Code != verify.CodeSigInvalid {
		t.Errorf("without a keyring: %v, want sig_invalid", err)
	}
	// The URL-safe alphabet is the other one that DSSE allows.
	f.envelope(func(e map[string]any) {
		std, _ := base64.StdEncoding.DecodeString(e["payload"].(string))
		e["payload"] = base64.URLEncoding.EncodeToString(std)
	})
	if _, _, err := verify.OpenEnvelope(f.m.Envelope, f.p.Keyring, now); err != nil {
		t.Errorf("URL-safe base64: %v", err)
	}
}

func TestKeyring(t *testing.T) {
	kr, err := verify.NewKeyring(publicKey(t, ecKey(t), verify.UsageRelease), publicKey(t, ecKey(t), verify.UsageArtifact))
	if err != nil {
		t.Fatal(err)
	}
	kr.Keys[0].NotBefore = &created
	data, err := kr.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	again, err := verify.ParseKeyring(data)
	if err != nil || again.Keys[0].ID != kr.Keys[0].ID || !again.Keys[0].NotBefore.Equal(created) {
		t.Fatalf("ParseKeyring = %+v, %v", again, err)
	}
	good := string(data)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := verify.MarshalPublicKey(p384.Public()); err == nil {
		t.Error("a P-384 key is written")
	}
	swap := func(old, now string) string {
		t.Helper()
		if !strings.Contains(good, old) {
			t.Fatalf("%q is not in the keyring", old)
		}
		return strings.Replace(good, old, now, 1)
	}
	for _, tt := range []struct{ name, in, want string }{
		{"empty", "", "ends where a value is due"},
		{"truncated", good[:100], "ends inside"},
		{"oversized", good + strings.Repeat(" ", verify.MaxKeyringBytes), "the limit is 262144"},
		{"other schema", swap("keyring/v0", "keyring/v1"), "schema is"},
		{"unknown key", swap(`"schema"`, `"extra": 1, "schema"`), `unknown key "extra"`},
		{"duplicate key", swap(`"schema"`, `"keys": [], "schema"`), "duplicate key"},
		{"revoked in another spelling", swap(`"usages"`, `"Revoked": true, "usages"`), "case-sensitive"},
		{"no keys", `{"schema":"autonomy.keyring/v0","keys":[]}`, "0 keys"},
		{"null key", `{"schema":"autonomy.keyring/v0","keys":[null]}`, "keys[0] is null"},
		{"id of another key", swap(kr.Keys[0].ID, kr.Keys[1].ID), "its public key's id is"},
		{"no usage", swap("[\n        \"release\"\n      ]", "[]"), "no usages"},
		{"unknown usage", swap(`"release"`, `"everything"`), `usage "everything"`},
		{"window upside down", swap(`"not_before"`, `"not_after": "2020-01-01T00:00:00Z", "not_before"`), "not_after is before not_before"},
		{"time malformed", swap(created.Format(time.RFC3339), "soon"), ""},
		{"not a key", swap("BEGIN PUBLIC KEY", "BEGIN PRIVATE KEY"), "public key"},
		{"invalid UTF-8", swap("keyring/v0", "keyring\xff"), "invalid UTF-8"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if kr, err := verify.ParseKeyring([]byte(tt.in)); !errors.Is(err, verify.ErrKeyring) || !strings.Contains(err.Error(), tt.want) || kr != nil {
				t.Errorf("ParseKeyring = %v, %v; want ErrKeyring with %q", kr, err, tt.want)
			}
		})
	}
	k := publicKey(t, ecKey(t), verify.UsageRelease)
	if _, err := verify.NewKeyring(k, k); !errors.Is(err, verify.ErrKeyring) {
		t.Errorf("a key twice: %v", err)
	}
}

func TestPrivateKeyErrorsHoldNoKey(t *testing.T) {
	for _, in := range []string{"", "secret-bytes", "-----BEGIN PRIVATE KEY-----\nc2VjcmV0LWJ5dGVz\n-----END PRIVATE KEY-----\n", "-----BEGIN EC PRIVATE KEY-----\nc2VjcmV0LWJ5dGVz\n-----END EC PRIVATE KEY-----\n"} {
		if k, err := verify.ParsePrivateKey([]byte(in)); err == nil || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "c2Vj") {
			t.Errorf("ParsePrivateKey = %v, %v; want an error without the key", k, err)
		}
	}
}

func TestCheckRuntime(t *testing.T) {
	for _, tt := range []struct {
		constraints, version string
		ok                   bool
	}{
		{"", "0.1.0", true},
		{">=0.1.0 <0.2.0", "0.1.9", true},
		{">=0.1.0 <0.2.0", "0.2.0", false},
		{">=0.1.0  !=0.1.3", "0.1.3", false},
		{"~0.1.2", "v0.1.9", true},
		{"^1.2", "1.9.0", true},
		{"^1.2", "2.0.0", false},
		{">=0.1.0", "0.1.0-dev", false},
		{">=0.1.0-0", "0.1.0-dev", true},
		{">=0.1.0", "0.2.0-dev", true},
		{"0.1.0", "0.1.0", true},
		{">=0.1.0, <1", "0.1.0", false},
		{">=0.1.0 || <1", "0.1.0", false},
		{"1.0.0 - 2.0.0", "1.5.0", false},
		{"*", "1.0.0", false},
		{"1.x", "1.0.0", false},
		{">= 1.0.0", "1.0.0", false},
		{strings.Repeat(">=0.1.0 ", 17), "1.0.0", false},
		{">=0.1.0", "1.0", false},
		{">=0.1.0", "", false},
	} {
		if err := verify.CheckRuntime(tt.constraints, tt.version); (err == nil) != tt.ok {
			t.Errorf("CheckRuntime(%q, %q) = %v, want ok %v", tt.constraints, tt.version, err, tt.ok)
		}
	}
}

func FuzzOpenEnvelope(f *testing.F) {
	fix := newFixture(f)
	fix.build()
	f.Add(fix.m.Envelope)
	f.Add([]byte(`{"payload":"e30=","payloadType":"` + verify.ReleaseMediaType + `","signatures":[{"keyid":"","sig":"AA=="}]}`))
	f.Fuzz(func(t *testing.T, env []byte) {
		r, _, err := verify.OpenEnvelope(env, fix.p.Keyring, now)
		if err == nil && *r != fix.rel {
			t.Fatalf("accepted what nobody signed: %+v from %q", r, env)
		}
		var fault *verify.Error
		if err != nil && (!errors.As(err, &fault) || fault.Code == "") {
			t.Fatalf("%v carries no code", err)
		}
	})
}

func FuzzParseRelease(f *testing.F) {
	fix := newFixture(f)
	fix.build()
	f.Add([]byte(fix.statement()))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := verify.ParseRelease(data)
		if err != nil {
			if !errors.Is(err, verify.ErrRelease) {
				t.Fatalf("%v does not wrap ErrRelease", err)
			}
			return
		}
		if err := r.Validate(); err != nil {
			t.Fatal(err)
		}
	})
}

// BenchmarkVerify is the whole gate: two signatures, three digests, one lock.
func BenchmarkVerify(b *testing.B) {
	f := newFixture(b)
	f.build()
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := verify.Verify(context.Background(), f.m, f.p); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpenEnvelope(b *testing.B) {
	f := newFixture(b)
	f.build()
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := verify.OpenEnvelope(f.m.Envelope, f.p.Keyring, now); err != nil {
			b.Fatal(err)
		}
	}
}
