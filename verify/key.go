package verify

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// KeyringSchema is the value of a keyring's schema key.
const KeyringSchema = "autonomy.keyring/v0"

// Limits of a keyring file.
const (
	MaxKeyringBytes = 256 << 10
	MaxKeys         = 256
)

// Usage says what a key may sign.
type Usage string

// Usages.
const (
	UsageRelease  Usage = "release"  // release statements
	UsageArtifact Usage = "artifact" // OCI artifacts
)

// Key is one public key with what this machine allows it.
type Key struct {
	ID        string     `json:"id"`             // KeyID of the key
	Name      string     `json:"name,omitempty"` // for people
	PublicKey string     `json:"public_key"`     // PEM, SubjectPublicKeyInfo
	Usages    []Usage    `json:"usages"`
	NotBefore *time.Time `json:"not_before,omitempty"` // signs nothing made before
	NotAfter  *time.Time `json:"not_after,omitempty"`  // signs nothing made after
	Revoked   bool       `json:"revoked,omitempty"`    // signs nothing, whenever it was made

	pub crypto.PublicKey
}

// Public is the parsed public key: *ecdsa.PublicKey on P-256 or ed25519.PublicKey.
func (k *Key) Public() crypto.PublicKey { return k.pub }

// May reports whether the key has a usage.
func (k *Key) May(u Usage) bool {
	for _, have := range k.Usages {
		if have == u {
			return true
		}
	}
	return false
}

// ValidAt returns nil when a thing made at t may be signed by k, otherwise an
// *Error: CodeKeyRevoked or CodeKeyExpired. Both ends of the window are inside.
func (k *Key) ValidAt(t time.Time) error {
	switch {
	case k.Revoked:
		return refuse(CodeKeyRevoked, "key %s is revoked: nothing it signed is trusted", k.label())
	case k.NotBefore != nil && t.Before(*k.NotBefore):
		return refuse(CodeKeyExpired, "key %s is valid from %s, the statement was made %s", k.label(), k.NotBefore.Format(time.RFC3339), t.Format(time.RFC3339))
	case k.NotAfter != nil && t.After(*k.NotAfter):
		return refuse(CodeKeyExpired, "key %s was valid until %s, the statement was made %s", k.label(), k.NotAfter.Format(time.RFC3339), t.Format(time.RFC3339))
	}
	return nil
}

func (k *Key) label() string {
	if k.Name != "" {
		return fmt.Sprintf("%s (%q)", k.ID, k.Name)
	}
	return k.ID
}

// Keyring is the set of keys this machine trusts.
type Keyring struct {
	Schema string `json:"schema"`
	Keys   []*Key `json:"keys"`
}

// ErrKeyring is wrapped by every error about a keyring's or key's form.
var ErrKeyring = errors.New("malformed keyring")

// ParseKeyring reads a keyring file strictly. A keyring with no key is refused:
// it would refuse every release, and that is not what an operator meant.
func ParseKeyring(data []byte) (*Keyring, error) {
	if len(data) > MaxKeyringBytes {
		return nil, fmt.Errorf("%w: %d bytes, the limit is %d", ErrKeyring, len(data), MaxKeyringBytes)
	}
	var kr Keyring
	if err := strictjson.Unmarshal(data, &kr); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKeyring, err)
	}
	if kr.Schema != KeyringSchema {
		return nil, fmt.Errorf("%w: schema is %q, want %q", ErrKeyring, clip(kr.Schema), KeyringSchema)
	}
	if err := kr.check(); err != nil {
		return nil, err
	}
	return &kr, nil
}

// NewKeyring makes a keyring of keys, whose ids it fills in.
func NewKeyring(keys ...*Key) (*Keyring, error) {
	kr := &Keyring{Schema: KeyringSchema, Keys: keys}
	for _, k := range keys {
		if pub, err := ParsePublicKey([]byte(k.PublicKey)); err == nil && k.ID == "" {
			if k.ID, err = KeyID(pub); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrKeyring, err)
			}
		}
	}
	if err := kr.check(); err != nil {
		return nil, err
	}
	return kr, nil
}

func (kr *Keyring) check() error {
	if len(kr.Keys) == 0 || len(kr.Keys) > MaxKeys {
		return fmt.Errorf("%w: %d keys, want 1 to %d", ErrKeyring, len(kr.Keys), MaxKeys)
	}
	seen := map[string]bool{}
	for i, k := range kr.Keys {
		if k == nil {
			return fmt.Errorf("%w: keys[%d] is null", ErrKeyring, i)
		}
		pub, err := ParsePublicKey([]byte(k.PublicKey))
		if err != nil {
			return fmt.Errorf("%w: keys[%d]: %w", ErrKeyring, i, err)
		}
		id, err := KeyID(pub)
		switch {
		case err != nil:
			return fmt.Errorf("%w: keys[%d]: %w", ErrKeyring, i, err)
		case k.ID != id:
			return fmt.Errorf("%w: keys[%d]: id is %q, its public key's id is %q", ErrKeyring, i, clip(k.ID), id)
		case seen[id]:
			return fmt.Errorf("%w: keys[%d]: %s stands twice", ErrKeyring, i, id)
		case len(k.Name) > 256:
			return fmt.Errorf("%w: keys[%d]: name has %d bytes, the limit is 256", ErrKeyring, i, len(k.Name))
		case len(k.Usages) == 0:
			return fmt.Errorf("%w: keys[%d]: no usages, want %q or %q or both", ErrKeyring, i, UsageRelease, UsageArtifact)
		case k.NotBefore != nil && k.NotAfter != nil && k.NotAfter.Before(*k.NotBefore):
			return fmt.Errorf("%w: keys[%d]: not_after is before not_before", ErrKeyring, i)
		}
		for j, u := range k.Usages {
			if u != UsageRelease && u != UsageArtifact {
				return fmt.Errorf("%w: keys[%d]: usage %q, want %q or %q", ErrKeyring, i, clip(string(u)), UsageRelease, UsageArtifact)
			}
			for _, before := range k.Usages[:j] {
				if before == u {
					return fmt.Errorf("%w: keys[%d]: usage %q stands twice", ErrKeyring, i, u)
				}
			}
		}
		seen[id] = true
		k.pub = pub
	}
	return nil
}

// Marshal writes the keyring as indented JSON that ParseKeyring accepts.
func (kr *Keyring) Marshal() ([]byte, error) {
	if err := kr.check(); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(kr); err != nil {
		return nil, fmt.Errorf("write keyring: %w", err)
	}
	return b.Bytes(), nil
}

// Candidates returns the keys in the order to try them for a hint: the one it
// names first. Keys without the usage are there too, last, so that a refusal can
// say that the key is known but not for this.
func (kr *Keyring) Candidates(hint string, u Usage) []*Key {
	var first, rest, others []*Key
	for _, k := range kr.Keys {
		switch {
		case !k.May(u):
			others = append(others, k)
		case k.ID == hint:
			first = append(first, k)
		default:
			rest = append(rest, k)
		}
	}
	return append(append(first, rest...), others...)
}

// KeyID is the standard base64 of the SHA-256 of the key's DER
// SubjectPublicKeyInfo: the hint that cosign writes.
func KeyID(pub crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("key id: %w", err)
	}
	sum := sha256.Sum256(der)
	return base64.StdEncoding.EncodeToString(sum[:]), nil
}

// ParsePublicKey reads one PEM block of a P-256 or Ed25519 public key.
func ParsePublicKey(data []byte) (crypto.PublicKey, error) {
	block, rest := pem.Decode(data)
	if block == nil {
		return nil, errors.New("public key: no PEM block, want -----BEGIN PUBLIC KEY-----")
	}
	if block.Type != "PUBLIC KEY" {
		return nil, fmt.Errorf("public key: the PEM block is %q, want \"PUBLIC KEY\"", clip(block.Type))
	}
	if strings.TrimSpace(string(rest)) != "" {
		return nil, errors.New("public key: data after the PEM block")
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	if err := checkPublic(pub); err != nil {
		return nil, err
	}
	return pub, nil
}

func checkPublic(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case ed25519.PublicKey:
		return nil
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() {
			return fmt.Errorf("public key: curve %s, want P-256", k.Curve.Params().Name)
		}
		return nil
	}
	return fmt.Errorf("public key: %T, want ECDSA P-256 or Ed25519", pub)
}

// MarshalPublicKey writes pub as a PEM block.
func MarshalPublicKey(pub crypto.PublicKey) ([]byte, error) {
	if err := checkPublic(pub); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// ParsePrivateKey reads one PEM block of an unencrypted PKCS #8 private key,
// P-256 or Ed25519. Errors never hold the key's bytes.
func ParsePrivateKey(data []byte) (crypto.Signer, error) {
	block, rest := pem.Decode(data)
	if block == nil {
		return nil, errors.New("private key: no PEM block, want -----BEGIN PRIVATE KEY-----")
	}
	if block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("private key: the PEM block is %q, want \"PRIVATE KEY\" (PKCS #8, not encrypted); \"autonomy key generate\" makes one", clip(block.Type))
	}
	if strings.TrimSpace(string(rest)) != "" {
		return nil, errors.New("private key: data after the PEM block")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("private key: the PEM block is no PKCS #8 key")
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("private key: %T cannot sign", k)
	}
	if err := checkPublic(s.Public()); err != nil {
		return nil, err
	}
	return s, nil
}

// SignMessage signs message: Ed25519 over the message, ECDSA over its SHA-256 in
// ASN.1 DER.
func SignMessage(s crypto.Signer, message []byte) ([]byte, error) {
	var sig []byte
	var err error
	switch s.Public().(type) {
	case ed25519.PublicKey:
		sig, err = s.Sign(rand.Reader, message, crypto.Hash(0))
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(message)
		sig, err = s.Sign(rand.Reader, sum[:], crypto.SHA256)
	default:
		err = checkPublic(s.Public())
	}
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return sig, nil
}

func verifyMessage(pub crypto.PublicKey, message, sig []byte) bool {
	switch k := pub.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(k, message, sig)
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(message)
		return ecdsa.VerifyASN1(k, sum[:], sig)
	}
	return false
}

func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "…"
	}
	return s
}
