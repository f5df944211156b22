package verify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/Masterminds/semver/v3"

	"github.com/autonomyops/autonomy/fingerprint"
	"github.com/autonomyops/autonomy/internal/strictjson"
)

// Steps names the four steps in their order.
var Steps = [4]string{"signature", "digest", "fingerprint", "compatibility"}

// PolicyMediaType is the media type of the one layer of a policy artifact.
const PolicyMediaType = "application/vnd.autonomyops.policy.v0.tar+gzip"

// MaxManifestBytes bounds an OCI manifest (distribution specification).
const MaxManifestBytes = 4 << 20

// Material is the bytes of one release, as they were fetched. Verify keeps none
// of them. Whoever activates must use these same bytes, not read them again.
type Material struct {
	Envelope        []byte   // the DSSE envelope
	Lock            []byte   // autonomy.lock.json
	PolicyManifest  []byte   // OCI manifest that the statement's policy.digest names
	Policy          []byte   // the bundle: the manifest's one layer
	ImageManifest   []byte   // OCI manifest of the image; nil when the node did not fetch it
	ImageSignatures [][]byte // sigstore bundles found for the image, JSON
}

// PolicyMeta is what a bundle says of itself (.manifest, metadata.autonomy).
type PolicyMeta struct {
	Name            string
	Version         string // semver
	RequiresRuntime string // space-separated constraints
}

// ArtifactVerifier checks signatures over OCI artifacts; verify/sigstore is one.
type ArtifactVerifier interface {
	// VerifyArtifact returns the id of an artifact key that signed digest
	// ("sha256:…") in one of the bundles and was valid at the time at.
	// Otherwise an *Error: CodeSigMissing when there is no bundle,
	// CodeSigInvalid, CodeKeyExpired or CodeKeyRevoked.
	VerifyArtifact(ctx context.Context, digest string, bundles [][]byte, at time.Time) (keyID string, err error)
}

// Params is what this machine demands of a release.
type Params struct {
	Keyring         *Keyring
	Channel         string    // the channel that was asked for
	AgentName       string    // the lock's agent name that is expected; empty: any
	HighestSequence uint64    // the highest ever activated in this channel; 0: none
	Now             time.Time // must not be zero
	RuntimeVersion  string    // semver of this node

	// Artifacts checks the image's signature. Nil refuses every release.
	Artifacts ArtifactVerifier

	// ReadPolicy reads what a bundle says of itself. It is called in step 4, on
	// bytes whose digest was checked. Nil refuses every release.
	ReadPolicy func(bundle []byte) (PolicyMeta, error)
}

// Results of a step.
const (
	Passed  = "passed"
	Failed  = "failed"
	Skipped = "skipped" // an earlier step failed
)

// Step is what one step did.
type Step struct {
	Name       string   `json:"name"`             // one of Steps
	Result     string   `json:"result"`           // passed, failed, skipped
	Code       string   `json:"code,omitempty"`   // of a failure
	Detail     string   `json:"detail,omitempty"` // of a failure
	Checked    []string `json:"checked,omitempty"`
	NotChecked []string `json:"not_checked,omitempty"`
}

// Evidence is the account of one verification. It holds four steps, always, in
// order. The fields from the statement are empty until its signature held.
type Evidence struct {
	ReleaseID   string                `json:"release_id,omitempty"`
	Channel     string                `json:"channel,omitempty"`
	Sequence    uint64                `json:"sequence,omitempty"`
	Fingerprint string                `json:"fingerprint,omitempty"`
	KeyID       string                `json:"key_id,omitempty"`       // signed the statement
	ImageKeyID  string                `json:"image_key_id,omitempty"` // signed the image
	Sections    []fingerprint.Section `json:"sections,omitempty"`     // of the lock, once it is read
	Policy      PolicyMeta            `json:"-"`                      // once step 4 read it
	Steps       []Step                `json:"steps"`
}

// gate carries one verification.
type gate struct {
	m    Material
	p    Params
	ev   *Evidence
	step *Step
	rel  *Release
	lock *fingerprint.Lock
}

func (g *gate) checked(format string, args ...any) {
	g.step.Checked = append(g.step.Checked, fmt.Sprintf(format, args...))
}

func (g *gate) notChecked(what string) { g.step.NotChecked = append(g.step.NotChecked, what) }

// Verify runs the four steps over m. It returns the statement only when all four
// passed; the evidence in every case. The error is an *Error whose Step says
// which step refused, or ctx's error.
func Verify(ctx context.Context, m Material, p Params) (Evidence, *Release, error) {
	g := &gate{m: m, p: p, ev: &Evidence{Steps: make([]Step, len(Steps))}}
	for i, name := range Steps {
		g.ev.Steps[i] = Step{Name: name, Result: Skipped}
	}
	for i, run := range [len(Steps)]func(context.Context) *Error{g.signature, g.digest, g.fingerprint, g.compatibility} {
		if err := ctx.Err(); err != nil {
			return *g.ev, nil, fmt.Errorf("verify release: %w", err)
		}
		g.step = &g.ev.Steps[i]
		if fault := guarded(ctx, run); fault != nil {
			fault.Step = i + 1
			g.step.Result, g.step.Code, g.step.Detail = Failed, fault.Code, fault.Detail
			return *g.ev, nil, fault
		}
		g.step.Result = Passed
	}
	return *g.ev, g.rel, nil
}

// guarded turns a panic of a step into a refusal (INV-15): parsers of others read
// bytes of others here.
func guarded(ctx context.Context, run func(context.Context) *Error) (fault *Error) {
	defer func() {
		if p := recover(); p != nil {
			fault = refuse(CodeInternal, "the check panicked: %.200q", fmt.Sprint(p))
		}
	}()
	return run(ctx)
}

func (g *gate) signature(ctx context.Context) *Error {
	rel, key, fault := open(g.m.Envelope, g.p.Keyring)
	if fault != nil {
		return fault
	}
	g.rel = rel
	g.ev.ReleaseID, g.ev.Channel, g.ev.Sequence, g.ev.Fingerprint, g.ev.KeyID = rel.ReleaseID, rel.Channel, rel.Sequence, rel.Fingerprint, key.ID
	g.checked("statement signed by release key %s, valid at %s, not revoked", key.label(), rel.CreatedAt.Format(time.RFC3339))
	if rel.Channel != g.p.Channel {
		return refuse(CodeNameMismatch, "the release is for channel %q, this node follows %q", rel.Channel, g.p.Channel)
	}
	g.checked("channel %s", rel.Channel)
	if g.p.Now.IsZero() {
		return refuse(CodeExpired, "the time is not known: expires_at %s cannot be checked", rel.ExpiresAt.Format(time.RFC3339))
	}
	if fault := checkExpiry(rel, g.p.Now); fault != nil {
		return fault
	}
	g.checked("expires %s", rel.ExpiresAt.Format(time.RFC3339))
	if rel.Sequence <= g.p.HighestSequence {
		return refuse(CodeSequenceRollback, "sequence %d was reached before (highest activated %d): to go back on purpose, publish the older content under a higher sequence", rel.Sequence, g.p.HighestSequence)
	}
	g.checked("sequence %d above %d", rel.Sequence, g.p.HighestSequence)
	if g.p.Artifacts == nil {
		return refuse(CodeSigMissing, "no verifier for artifact signatures is configured: the image %s cannot be trusted", rel.Agent.Digest())
	}
	imageKey, err := g.p.Artifacts.VerifyArtifact(ctx, rel.Agent.Digest(), g.m.ImageSignatures, rel.CreatedAt)
	if err != nil {
		if fault := (*Error)(nil); errors.As(err, &fault) {
			return &Error{Code: fault.Code, Detail: "image: " + fault.Detail, Err: err}
		}
		return refuse(CodeSigInvalid, "image: %w", err)
	}
	g.ev.ImageKeyID = imageKey
	g.checked("image %s signed by artifact key %s", rel.Agent.Digest(), imageKey)
	g.checked("lock and policy bound by their digests in the statement")
	g.notChecked("transparency log: signatures are made with long-lived keys")
	g.notChecked("created_at against this machine's clock")
	return nil
}

func (g *gate) digest(context.Context) *Error {
	rel := g.rel
	if fault := checkDigest("lock", g.m.Lock, rel.Lock); fault != nil {
		return fault
	}
	g.checked("lock is %s", rel.Lock)
	if fault := checkDigest("policy manifest", g.m.PolicyManifest, rel.Policy.Digest); fault != nil {
		return fault
	}
	layer, fault := policyLayer(g.m.PolicyManifest)
	if fault != nil {
		return fault
	}
	if fault := checkDigest("policy bundle", g.m.Policy, layer); fault != nil {
		return fault
	}
	g.checked("policy manifest is %s, its bundle %s", rel.Policy.Digest, layer)
	if g.m.ImageManifest != nil {
		if fault := checkDigest("image manifest", g.m.ImageManifest, rel.Agent.Digest()); fault != nil {
			return fault
		}
		g.checked("image manifest is %s", rel.Agent.Digest())
	} else {
		g.notChecked("image bytes: this node did not fetch them")
	}
	lock, err := fingerprint.Parse(g.m.Lock)
	if err != nil {
		return refuse(CodeLockMalformed, "%w", err)
	}
	if lock.Agent.ImageDigest != rel.Agent.Digest() {
		return refuse(CodeDigestMismatch, "the lock is for image %s, the release names %s", lock.Agent.ImageDigest, rel.Agent.Digest())
	}
	g.checked("lock and statement name the same image")
	if lock.Policy.Digest != layer {
		return refuse(CodeDigestMismatch, "the lock is for policy bundle %s, the release carries %s", lock.Policy.Digest, layer)
	}
	g.checked("lock and policy manifest name the same bundle")
	g.lock = lock
	return nil
}

func checkDigest(what string, data []byte, want string) *Error {
	if len(data) == 0 {
		return refuse(CodeDigestMismatch, "%s: there are no bytes, want %s", what, want)
	}
	if have := fingerprint.Digest(data); have != want {
		return refuse(CodeDigestMismatch, "%s: the bytes are %s, want %s", what, have, want)
	}
	return nil
}

// policyLayer returns the digest of the one layer of a policy artifact.
func policyLayer(manifest []byte) (string, *Error) {
	if len(manifest) > MaxManifestBytes {
		return "", refuse(CodeArtifactMalformed, "policy manifest has %d bytes, the limit is %d", len(manifest), MaxManifestBytes)
	}
	if err := strictjson.CheckObject(manifest); err != nil {
		return "", refuse(CodeArtifactMalformed, "policy manifest: %w", err)
	}
	var m struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Manifests     []json.RawMessage `json:"manifests"`
		Layers        []struct {
			MediaType string `json:"mediaType"`
			Digest    string `json:"digest"`
		} `json:"layers"`
	}
	dec := json.NewDecoder(bytes.NewReader(manifest))
	if err := dec.Decode(&m); err != nil {
		return "", refuse(CodeArtifactMalformed, "policy manifest: %w", err)
	}
	switch {
	case m.MediaType != ociManifest || m.Manifests != nil:
		return "", refuse(CodeArtifactMalformed, "policy manifest is %q, want one %s (an index is not accepted)", clip(m.MediaType), ociManifest)
	case len(m.Layers) != 1:
		return "", refuse(CodeArtifactMalformed, "policy manifest has %d layers, want one", len(m.Layers))
	case m.Layers[0].MediaType != PolicyMediaType:
		return "", refuse(CodeArtifactMalformed, "policy layer is %q, want %s", clip(m.Layers[0].MediaType), PolicyMediaType)
	}
	return m.Layers[0].Digest, nil
}

const ociManifest = "application/vnd.oci.image.manifest.v1+json"

func (g *gate) fingerprint(context.Context) *Error {
	sections, err := fingerprint.Sections(g.lock)
	if err != nil {
		return refuse(CodeLockMalformed, "%w", err)
	}
	g.ev.Sections = sections
	if err := g.lock.Verify(); err != nil {
		return refuse(CodeFingerprint, "%w", err)
	}
	g.checked("recomputed from the lock: %s", g.lock.Fingerprint)
	if g.lock.Fingerprint != g.rel.Fingerprint {
		return refuse(CodeFingerprint, "the release says %s, the lock's content gives %s", g.rel.Fingerprint, g.lock.Fingerprint)
	}
	g.checked("equal to the statement's")
	if g.p.AgentName != "" && g.lock.Agent.Name != g.p.AgentName {
		return refuse(CodeNameMismatch, "the lock is for agent %q, this node runs %q", clip(g.lock.Agent.Name), g.p.AgentName)
	}
	g.notChecked("behaviour of hosted models: a name and parameters are declared, not what the provider runs")
	return nil
}

func (g *gate) compatibility(context.Context) *Error {
	if g.p.ReadPolicy == nil {
		return refuse(CodePolicyIncompatible, "no reader for policy bundles is configured")
	}
	meta, err := g.p.ReadPolicy(g.m.Policy)
	if err != nil {
		return refuse(CodePolicyIncompatible, "read the bundle: %w", err)
	}
	g.ev.Policy = meta
	have, err := semver.StrictNewVersion(meta.Version)
	if err != nil {
		return refuse(CodePolicyIncompatible, "the bundle's version is %q, want a version as in 1.4.2", clip(meta.Version))
	}
	// Validate and Parse made sure that these two are versions.
	if want := g.rel.Policy.Version(); !sameVersion(have, want) {
		return refuse(CodePolicyIncompatible, "the bundle is version %s, the release asks for %s", have, want)
	}
	g.checked("bundle version %s is the one asked for", have)
	if meta.Name != g.lock.Policy.Name || !sameVersion(have, g.lock.Policy.Version) {
		return refuse(CodePolicyIncompatible, "the bundle is %q %s, the lock says %q %s", clip(meta.Name), have, clip(g.lock.Policy.Name), clip(g.lock.Policy.Version))
	}
	g.checked("bundle is %s as the lock says", clip(meta.Name))
	for _, c := range []struct{ who, list string }{
		{"release", g.rel.RequiresRuntime},
		{"lock", ">=" + g.lock.Runtime.MinVersion},
		{"bundle", meta.RequiresRuntime},
	} {
		if err := CheckRuntime(c.list, g.p.RuntimeVersion); err != nil {
			return refuse(CodePolicyIncompatible, "%s: %w", c.who, err)
		}
		if c.list == "" {
			g.checked("%s requires no runtime version", c.who)
		} else {
			g.checked("runtime %s satisfies the %s's %s", g.p.RuntimeVersion, c.who, c.list)
		}
	}
	if n := len(g.lock.Runtime.Capabilities); n > 0 {
		g.notChecked(fmt.Sprintf("%d runtime capabilities the lock lists: assurance judges them", n))
	}
	return nil
}

// sameVersion compares by precedence: build metadata does not count.
func sameVersion(have *semver.Version, want string) bool {
	w, err := semver.StrictNewVersion(want)
	return err == nil && have.Equal(w)
}
