package verify

import (
	"bytes"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/Masterminds/semver/v3"
	"github.com/gowebpki/jcs"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// ReleaseSchema is the value of a release's schema key.
const ReleaseSchema = "autonomy.release/v0"

// ReleaseMediaType is the DSSE payload type of a release.
const ReleaseMediaType = "application/vnd.autonomyops.release.v0+json"

// Limits of an envelope.
const (
	MaxEnvelopeBytes = 64 << 10
	MaxSequence      = 1<<53 - 1 // the largest integer every JSON reader keeps
)

// Release is the desired state of the nodes of a channel.
type Release struct {
	Schema          string        `json:"schema"`
	ReleaseID       string        `json:"release_id"`
	Channel         string        `json:"channel"`
	Sequence        uint64        `json:"sequence"` // 1 and up, rising within a channel
	Agent           ReleaseAgent  `json:"agent"`
	Lock            string        `json:"lock"` // sha256 of the lock file's bytes
	Policy          ReleasePolicy `json:"policy"`
	Fingerprint     string        `json:"fingerprint"`      // blake3, of the lock
	RequiresRuntime string        `json:"requires_runtime"` // space-separated constraints; empty: any
	CreatedAt       time.Time     `json:"created_at"`
	ExpiresAt       time.Time     `json:"expires_at"` // no activation after it
}

// ReleaseAgent names the agent's image.
type ReleaseAgent struct {
	Image string `json:"image"` // registry/repository@sha256:…, the image manifest
}

// ReleasePolicy names the policy artifact.
type ReleasePolicy struct {
	Ref    string `json:"ref"`    // registry/repository:VERSION
	Digest string `json:"digest"` // sha256 of the OCI manifest whose one layer is the bundle
}

// Repository is the image reference without its digest.
func (a ReleaseAgent) Repository() string { repo, _, _ := strings.Cut(a.Image, "@"); return repo }

// Digest is the image manifest's digest.
func (a ReleaseAgent) Digest() string { _, d, _ := strings.Cut(a.Image, "@"); return d }

// Repository is the policy reference without its tag.
func (p ReleasePolicy) Repository() string { repo, _ := cutTag(p.Ref); return repo }

// Version is the tag of the policy reference: the version that was asked for.
func (p ReleasePolicy) Version() string { _, tag := cutTag(p.Ref); return tag }

// cutTag splits at the last colon after the last slash: a colon before it
// belongs to the registry's port.
func cutTag(ref string) (repo, tag string) {
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		return ref[:i], ref[i+1:]
	}
	return ref, ""
}

var (
	reName  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	reRepo  = regexp.MustCompile(`^(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)+$`)
	reSHA   = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	reBlake = regexp.MustCompile(`^blake3:[0-9a-f]{64}$`)
)

// validRepository reports whether s is registry/repository with the registry
// written out: a dot, a port or localhost tells it from a path.
func validRepository(s string) bool {
	host, _, _ := strings.Cut(s, "/")
	return len(s) <= 512 && reRepo.MatchString(s) && (strings.ContainsAny(host, ".:") || host == "localhost")
}

// Validate reports every fault of r's form. Faults wrap ErrRelease.
func (r *Release) Validate() error {
	var faults []error
	bad := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if r.Schema != ReleaseSchema {
		bad("schema is %q, want %q", clip(r.Schema), ReleaseSchema)
	}
	if !reName.MatchString(r.ReleaseID) {
		bad("release_id is %q, want letters, digits and ._- (at most 128)", clip(r.ReleaseID))
	}
	if !reName.MatchString(r.Channel) {
		bad("channel is %q, want letters, digits and ._- (at most 128)", clip(r.Channel))
	}
	if r.Sequence < 1 || r.Sequence > MaxSequence {
		bad("sequence is %d, want 1 to %d", r.Sequence, uint64(MaxSequence))
	}
	if repo, digest, ok := strings.Cut(r.Agent.Image, "@"); !ok || !validRepository(repo) || !reSHA.MatchString(digest) {
		bad("agent.image is %q, want registry/repository@sha256:…", clip(r.Agent.Image))
	}
	if !reSHA.MatchString(r.Lock) {
		bad("lock is %q, want sha256:…", clip(r.Lock))
	}
	if repo, tag := cutTag(r.Policy.Ref); !validRepository(repo) {
		bad("policy.ref is %q, want registry/repository:VERSION", clip(r.Policy.Ref))
	} else if _, err := semver.StrictNewVersion(tag); err != nil {
		bad("policy.ref is %q, its tag must be the version, as in 1.4.2", clip(r.Policy.Ref))
	}
	if !reSHA.MatchString(r.Policy.Digest) {
		bad("policy.digest is %q, want sha256:…", clip(r.Policy.Digest))
	}
	if !reBlake.MatchString(r.Fingerprint) {
		bad("fingerprint is %q, want blake3:…", clip(r.Fingerprint))
	}
	if _, err := parseConstraints(r.RequiresRuntime); err != nil {
		bad("requires_runtime: %w", err)
	}
	if r.CreatedAt.IsZero() {
		bad("created_at is missing")
	}
	if !r.ExpiresAt.After(r.CreatedAt) {
		bad("expires_at is not after created_at")
	}
	if len(faults) > 0 {
		return fmt.Errorf("%w: %w", ErrRelease, errors.Join(faults...))
	}
	return nil
}

// ErrRelease is wrapped by the errors of Validate and ParseRelease.
var ErrRelease = errors.New("malformed release")

// ParseRelease reads a statement strictly: every key there, none else, no nulls.
// requires_runtime may be missing. It trusts nothing: OpenEnvelope does.
func ParseRelease(payload []byte) (*Release, error) {
	var r Release
	if err := strictjson.Unmarshal(payload, &r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRelease, err)
	}
	var shape map[string]any
	if err := json.Unmarshal(payload, &shape); err != nil || shape == nil {
		return nil, fmt.Errorf("%w: want an object", ErrRelease)
	}
	if err := noNulls("", shape); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRelease, err)
	}
	if err := r.Validate(); err != nil {
		return nil, err
	}
	r.CreatedAt, r.ExpiresAt = r.CreatedAt.UTC(), r.ExpiresAt.UTC()
	return &r, nil
}

func noNulls(at string, m map[string]any) error {
	for k, v := range m {
		switch v := v.(type) {
		case nil:
			return fmt.Errorf("%s%s is null", at, k)
		case map[string]any:
			if err := noNulls(at+k+".", v); err != nil {
				return err
			}
		}
	}
	return nil
}

// SignRelease returns the DSSE envelope of r, signed by s.
func SignRelease(r *Release, s crypto.Signer) ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	copied := *r
	copied.CreatedAt, copied.ExpiresAt = r.CreatedAt.UTC(), r.ExpiresAt.UTC()
	raw, err := json.Marshal(copied)
	if err != nil {
		return nil, fmt.Errorf("sign release: %w", err)
	}
	payload, err := jcs.Transform(raw)
	if err != nil {
		return nil, fmt.Errorf("sign release: %w", err)
	}
	return Seal(ReleaseMediaType, payload, s)
}

// Seal wraps payload in a DSSE envelope with one signature by s.
func Seal(payloadType string, payload []byte, s crypto.Signer) ([]byte, error) {
	id, err := KeyID(s.Public())
	if err != nil {
		return nil, err
	}
	sig, err := SignMessage(s, dsse.PAE(payloadType, payload))
	if err != nil {
		return nil, err
	}
	env, err := json.Marshal(envelope{
		PayloadType: payloadType,
		Payload:     base64.StdEncoding.EncodeToString(payload),
		Signatures:  []envelopeSignature{{KeyID: id, Sig: base64.StdEncoding.EncodeToString(sig)}},
	})
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	return env, nil
}

type envelope struct {
	PayloadType string              `json:"payloadType"`
	Payload     string              `json:"payload"`
	Signatures  []envelopeSignature `json:"signatures"`
}

type envelopeSignature struct {
	KeyID string `json:"keyid"`
	Sig   string `json:"sig"`
}

// OpenEnvelope checks an envelope against the keyring and returns its statement
// and the id of the key that signed it. The key must have usage release, its
// window must cover created_at, and it must not be revoked. now is compared with
// expires_at; a zero now is not: what is active already stays active after its
// release expired. Errors are *Error.
func OpenEnvelope(env []byte, kr *Keyring, now time.Time) (r *Release, keyID string, err error) {
	r, k, fault := open(env, kr)
	if fault != nil {
		return nil, "", fault
	}
	if fault := checkExpiry(r, now); fault != nil {
		return nil, "", fault
	}
	return r, k.ID, nil
}

func checkExpiry(r *Release, now time.Time) *Error {
	if !now.IsZero() && !now.Before(r.ExpiresAt) {
		return refuse(CodeExpired, "the release expired %s, it is %s: publish it again with a later expires_at", r.ExpiresAt.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return nil
}

// open checks form, signature and key, in this order: the statement is not read
// before its signature holds.
func open(env []byte, kr *Keyring) (*Release, *Key, *Error) {
	payload, k, fault := unseal(env, ReleaseMediaType, UsageRelease, kr, MaxEnvelopeBytes)
	if fault != nil {
		return nil, nil, fault
	}
	r, err := ParseRelease(payload)
	if err != nil {
		return nil, nil, refuse(CodeReleaseMalformed, "%w", err)
	}
	if err := k.ValidAt(r.CreatedAt); err != nil {
		var fault *Error
		errors.As(err, &fault)
		return nil, nil, fault
	}
	return r, k, nil
}

// Unseal checks an envelope of payloadType and at most limit bytes against the
// keys of kr that have the usage, and returns its payload and the key that signed
// it. The key's window and revocation are not judged yet: what the payload says
// of when it was made is for the caller to read, and to give to Key.ValidAt.
// Errors are *Error.
func Unseal(data []byte, payloadType string, usage Usage, kr *Keyring, limit int) ([]byte, *Key, error) {
	payload, k, fault := unseal(data, payloadType, usage, kr, limit)
	if fault != nil {
		return nil, nil, fault
	}
	return payload, k, nil
}

func unseal(data []byte, payloadType string, usage Usage, kr *Keyring, limit int) ([]byte, *Key, *Error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, nil, refuse(CodeSigMissing, "there is no envelope")
	}
	if len(data) > limit {
		return nil, nil, refuse(CodeReleaseMalformed, "the envelope has %d bytes, the limit is %d", len(data), limit)
	}
	var e envelope
	if err := strictjson.Unmarshal(data, &e); err != nil {
		return nil, nil, refuse(CodeReleaseMalformed, "envelope: %w", err)
	}
	if e.PayloadType != payloadType {
		return nil, nil, refuse(CodeReleaseMalformed, "payloadType is %q, want %q", clip(e.PayloadType), payloadType)
	}
	payload, err := decode64(e.Payload)
	if err != nil {
		return nil, nil, refuse(CodeReleaseMalformed, "payload: %w", err)
	}
	switch {
	case len(e.Signatures) == 0 || len(e.Signatures) == 1 && e.Signatures[0].Sig == "":
		return nil, nil, refuse(CodeSigMissing, "the envelope holds no signature")
	case len(e.Signatures) > 1:
		return nil, nil, refuse(CodeSigInvalid, "the envelope holds %d signatures, want exactly one", len(e.Signatures))
	}
	sig, err := decode64(e.Signatures[0].Sig)
	if err != nil {
		return nil, nil, refuse(CodeSigInvalid, "signature: %w", err)
	}
	if kr == nil || len(kr.Keys) == 0 {
		return nil, nil, refuse(CodeSigInvalid, "the keyring is empty: no key is trusted")
	}
	message := dsse.PAE(payloadType, payload)
	for _, k := range kr.Candidates(e.Signatures[0].KeyID, usage) {
		if !verifyMessage(k.pub, message, sig) {
			continue
		}
		if !k.May(usage) {
			return nil, nil, refuse(CodeSigInvalid, "signed by key %s, which is not for usage %q", k.label(), usage)
		}
		return payload, k, nil
	}
	return nil, nil, refuse(CodeSigInvalid, "no %s key of the keyring made this signature over these bytes (keyid %q)", usage, clip(e.Signatures[0].KeyID))
}

// decode64 takes both alphabets, as the DSSE specification demands, and no
// sloppy endings.
func decode64(s string) ([]byte, error) {
	if b, err := base64.StdEncoding.Strict().DecodeString(s); err == nil {
		return b, nil
	}
	b, err := base64.URLEncoding.Strict().DecodeString(s)
	if err != nil {
		return nil, errors.New("not base64")
	}
	return b, nil
}
