// Package sigstore checks and makes signatures over OCI artifacts, in the form
// that cosign v3 writes and reads: a sigstore bundle v0.3 with a DSSE envelope
// around an in-toto statement of predicate type
// https://sigstore.dev/cosign/sign/v1, one subject, signed by a long-lived key.
//
// It is the only package that imports sigstore-go, which is large: verify knows
// it as an interface (verify.ArtifactVerifier), the control plane and the relay
// do not link it.
//
// A signature binds a digest, nothing else: copied to another repository it
// still verifies. Names, versions, channels and expiry are for the release
// statement.
//
// What sigstore-go is not asked for is done here. It ignores the validity of a
// key when there are no timestamps, so windows and revocation are the keyring's
// (verify.Key.ValidAt), judged at the time the release statement was made. It
// takes the bundle's hint as the name of the key; here the hint only selects
// which key to try first. Bundles of other versions, with certificates, with a
// message signature instead of an envelope, or over a statement of another kind
// are refused.
//
// No network, no files. A Verifier is safe for concurrent use. Who may import
// it: node/release, the command line.
package sigstore

import (
	"bytes"
	"context"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	protodsse "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	sgverify "github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/signature"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/verify"
)

// BundleMediaType is the media type and OCI artifact type of a bundle.
const BundleMediaType = "application/vnd.dev.sigstore.bundle.v0.3+json"

// PredicateType is the in-toto predicate type of a cosign signature.
const PredicateType = "https://sigstore.dev/cosign/sign/v1"

const (
	statementType   = "https://in-toto.io/Statement/v1"
	dssePayloadType = "application/vnd.in-toto+json"
)

// Limits of what is looked at for one artifact.
const (
	MaxBundleBytes = 128 << 10
	MaxBundles     = 16
)

var reDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// Verifier checks bundles with the artifact keys of a keyring.
type Verifier struct {
	keyring *verify.Keyring
	keys    map[string]*keyVerifier // by key id
}

type keyVerifier struct {
	key      *verify.Key
	verifier *sgverify.Verifier
}

// New makes a Verifier. A keyring without artifact keys is accepted, and refuses
// every artifact.
func New(kr *verify.Keyring) (*Verifier, error) {
	if kr == nil {
		return nil, errors.New("sigstore: no keyring")
	}
	v := &Verifier{keyring: kr, keys: map[string]*keyVerifier{}}
	for _, k := range kr.Keys {
		sv, err := signature.LoadDefaultVerifier(k.Public())
		if err != nil {
			return nil, fmt.Errorf("sigstore: key %s: %w", k.ID, err)
		}
		// Every hint leads to this one key: which keys are tried is decided
		// by VerifyArtifact. The window is open: ValidAt judges it.
		material := root.NewTrustedPublicKeyMaterial(func(string) (root.TimeConstrainedVerifier, error) {
			return root.NewExpiringKey(sv, time.Time{}, time.Time{}), nil
		})
		gv, err := sgverify.NewVerifier(material, sgverify.WithNoObserverTimestamps())
		if err != nil {
			return nil, fmt.Errorf("sigstore: key %s: %w", k.ID, err)
		}
		v.keys[k.ID] = &keyVerifier{key: k, verifier: gv}
	}
	return v, nil
}

// VerifyArtifact implements verify.ArtifactVerifier. One good bundle is enough:
// a registry may hold signatures of others. Without one, the error is the one of
// the bundle that came closest: a signature by a revoked key, then by an expired
// one, then any other.
func (v *Verifier) VerifyArtifact(ctx context.Context, digest string, bundles [][]byte, at time.Time) (string, error) {
	if !reDigest.MatchString(digest) {
		return "", &verify.Error{Code: verify.CodeSigInvalid, Detail: fmt.Sprintf("%q is no sha256 digest", digest)}
	}
	if len(bundles) == 0 {
		return "", &verify.Error{Code: verify.CodeSigMissing, Detail: "no signature for " + digest}
	}
	if len(bundles) > MaxBundles {
		return "", &verify.Error{Code: verify.CodeSigInvalid, Detail: fmt.Sprintf("%d signatures for %s, the limit is %d", len(bundles), digest, MaxBundles)}
	}
	var worst *verify.Error
	for i, b := range bundles {
		if err := ctx.Err(); err != nil {
			return "", fmt.Errorf("verify artifact: %w", err)
		}
		id, fault := v.one(digest, b, at)
		if fault == nil {
			return id, nil
		}
		fault.Detail = fmt.Sprintf("signature %d of %d: %s", i+1, len(bundles), fault.Detail)
		if worst == nil || rank(fault.Code) > rank(worst.Code) {
			worst = fault
		}
	}
	return "", worst
}

func rank(code string) int {
	switch code {
	case verify.CodeKeyRevoked:
		return 2
	case verify.CodeKeyExpired:
		return 1
	}
	return 0
}

func invalid(format string, args ...any) *verify.Error {
	err := fmt.Errorf(format, args...)
	return &verify.Error{Code: verify.CodeSigInvalid, Detail: err.Error(), Err: err}
}

func (v *Verifier) one(digest string, data []byte, at time.Time) (string, *verify.Error) {
	b, fault := parse(data)
	if fault != nil {
		return "", fault
	}
	sum, err := hex.DecodeString(strings.TrimPrefix(digest, "sha256:"))
	if err != nil {
		return "", invalid("%w", err)
	}
	policy := sgverify.NewPolicy(sgverify.WithArtifactDigest("sha256", sum), sgverify.WithKey())
	hint := b.GetVerificationMaterial().GetPublicKey().GetHint()
	var cause error
	for _, k := range v.keyring.Candidates(hint, verify.UsageArtifact) {
		if _, err := v.keys[k.ID].verifier.Verify(b, policy); err != nil {
			if cause == nil {
				cause = err
			}
			continue
		}
		if !k.May(verify.UsageArtifact) {
			return "", invalid("signed by key %s, which is not for usage %q", k.ID, verify.UsageArtifact)
		}
		if err := k.ValidAt(at); err != nil {
			var fault *verify.Error
			errors.As(err, &fault)
			return "", fault
		}
		return k.ID, nil
	}
	if cause == nil {
		return "", invalid("the keyring is empty: no key is trusted")
	}
	return "", invalid("no artifact key of the keyring made this signature over %s (hint %.64q): %w", digest, hint, cause)
}

// parse reads a bundle strictly and checks everything that needs no key.
func parse(data []byte) (*bundle.Bundle, *verify.Error) {
	if len(data) > MaxBundleBytes {
		return nil, invalid("the bundle has %d bytes, the limit is %d", len(data), MaxBundleBytes)
	}
	if err := strictjson.CheckObject(data); err != nil {
		return nil, invalid("bundle: %w", err)
	}
	pb := new(protobundle.Bundle)
	if err := protojson.Unmarshal(data, pb); err != nil {
		return nil, invalid("bundle: %w", err)
	}
	if pb.GetMediaType() != BundleMediaType {
		return nil, invalid("bundle: mediaType is %.80q, want %s", pb.GetMediaType(), BundleMediaType)
	}
	b, err := bundle.NewBundle(pb)
	if err != nil {
		return nil, invalid("bundle: %w", err)
	}
	if pb.GetVerificationMaterial().GetPublicKey() == nil {
		return nil, invalid("bundle: signed with a certificate, want a long-lived key")
	}
	env := pb.GetDsseEnvelope()
	switch {
	case env == nil:
		return nil, invalid("bundle: holds no DSSE envelope")
	case env.GetPayloadType() != dssePayloadType:
		return nil, invalid("bundle: payloadType is %.80q, want %s", env.GetPayloadType(), dssePayloadType)
	case len(env.GetSignatures()) == 0:
		return nil, &verify.Error{Code: verify.CodeSigMissing, Detail: "the bundle holds no signature"}
	case len(env.GetSignatures()) != 1:
		return nil, invalid("bundle: %d signatures, want exactly one", len(env.GetSignatures()))
	}
	if err := strictjson.CheckObject(env.GetPayload()); err != nil {
		return nil, invalid("statement: %w", err)
	}
	var st struct {
		Type          string            `json:"_type"`
		PredicateType string            `json:"predicateType"`
		Subject       []json.RawMessage `json:"subject"`
	}
	if err := json.Unmarshal(env.GetPayload(), &st); err != nil {
		return nil, invalid("statement: %w", err)
	}
	switch {
	case st.Type != statementType:
		return nil, invalid("statement: _type is %.80q, want %s", st.Type, statementType)
	case st.PredicateType != PredicateType:
		return nil, invalid("statement: predicateType is %.80q, want %s", st.PredicateType, PredicateType)
	case len(st.Subject) != 1:
		return nil, invalid("statement: %d subjects, want exactly one", len(st.Subject))
	}
	return b, nil
}

type statement struct {
	Type          string    `json:"_type"`
	Subject       []subject `json:"subject"`
	PredicateType string    `json:"predicateType"`
	Predicate     struct{}  `json:"predicate"`
}

type subject struct {
	Name        string            `json:"name,omitempty"`
	Digest      map[string]string `json:"digest"`
	Annotations struct{}          `json:"annotations"`
}

// Sign returns a bundle with a signature by s over digest ("sha256:…"), as
// cosign writes it. name goes into the statement for people to read, and proves
// nothing; empty leaves it out, as cosign does.
func Sign(digest, name string, s crypto.Signer) ([]byte, error) {
	if !reDigest.MatchString(digest) {
		return nil, fmt.Errorf("sign artifact: %q is no sha256 digest", digest)
	}
	payload, err := json.Marshal(statement{
		Type:          statementType,
		Subject:       []subject{{Name: name, Digest: map[string]string{"sha256": strings.TrimPrefix(digest, "sha256:")}}},
		PredicateType: PredicateType,
	})
	if err != nil {
		return nil, fmt.Errorf("sign artifact: %w", err)
	}
	return seal(payload, s)
}

func seal(payload []byte, s crypto.Signer) ([]byte, error) {
	id, err := verify.KeyID(s.Public())
	if err != nil {
		return nil, fmt.Errorf("sign artifact: %w", err)
	}
	sig, err := verify.SignMessage(s, dsse.PAE(dssePayloadType, payload))
	if err != nil {
		return nil, fmt.Errorf("sign artifact: %w", err)
	}
	pb := &protobundle.Bundle{
		MediaType: BundleMediaType,
		VerificationMaterial: &protobundle.VerificationMaterial{
			Content: &protobundle.VerificationMaterial_PublicKey{PublicKey: &protocommon.PublicKeyIdentifier{Hint: id}},
		},
		Content: &protobundle.Bundle_DsseEnvelope{DsseEnvelope: &protodsse.Envelope{
			Payload:     payload,
			PayloadType: dssePayloadType,
			Signatures:  []*protodsse.Signature{{Sig: sig}},
		}},
	}
	raw, err := protojson.Marshal(pb)
	if err != nil {
		return nil, fmt.Errorf("sign artifact: %w", err)
	}
	var out bytes.Buffer // protojson varies its white space from build to build
	if err := json.Compact(&out, raw); err != nil {
		return nil, fmt.Errorf("sign artifact: %w", err)
	}
	return out.Bytes(), nil
}

// Annotations are those that cosign puts on the manifest that carries a bundle.
func Annotations() map[string]string {
	return map[string]string{
		"dev.sigstore.bundle.content":       "dsse-envelope",
		"dev.sigstore.bundle.predicateType": PredicateType,
	}
}
