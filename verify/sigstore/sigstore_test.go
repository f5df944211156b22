package sigstore

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
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/verify"
)

var digestA = "sha256:" + strings.Repeat("a1", 32)

var signedAt = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

func wantCode(t *testing.T, v *Verifier, digest string, bundles [][]byte, at time.Time, code string) {
	t.Helper()
	id, err := v.VerifyArtifact(context.Background(), digest, bundles, at)
	var fault *verify.Error
	if !errors.As(err, &fault) || fault.Code != code || id != "" {
		t.Errorf("VerifyArtifact = %q, %v; want %s", id, err, code)
	}
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// keyring makes a verifier that trusts s, changed by edit.
func trusting(t testing.TB, s crypto.Signer, edit func(*verify.Key)) *Verifier {
	t.Helper()
	p, err := verify.MarshalPublicKey(s.Public())
	if err != nil {
		t.Fatal(err)
	}
	k := &verify.Key{PublicKey: string(p), Usages: []verify.Usage{verify.UsageArtifact}}
	if edit != nil {
		edit(k)
	}
	kr, err := verify.NewKeyring(k)
	if err != nil {
		t.Fatal(err)
	}
	v, err := New(kr)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func sign(t testing.TB, digest string, s crypto.Signer) []byte {
	t.Helper()
	b, err := Sign(digest, "", s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSignVerify(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]crypto.Signer{"P-256": newKey(t), "Ed25519": ed} {
		t.Run(name, func(t *testing.T) {
			v := trusting(t, s, nil)
			want, err := verify.KeyID(s.Public())
			if err != nil {
				t.Fatal(err)
			}
			others := [][]byte{sign(t, digestA, newKey(t)), []byte("{}"), sign(t, digestA, s)}
			if id, err := v.VerifyArtifact(context.Background(), digestA, others, signedAt); err != nil || id != want {
				t.Errorf("VerifyArtifact = %q, %v; want %q: one good signature among others is enough", id, err, want)
			}
		})
	}
	if _, err := Sign("sha256:short", "", ed); err == nil {
		t.Error("Sign of a malformed digest gives no error")
	}
}

// rewrite changes a bundle's JSON.
func rewrite(t testing.TB, b []byte, edit func(m map[string]any)) []byte {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	edit(m)
	out, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func envelopeOf(m map[string]any) map[string]any { return m["dsseEnvelope"].(map[string]any) }

func TestAttacks(t *testing.T) {
	s, other := newKey(t), newKey(t)
	good := sign(t, digestA, s)
	statement := func(text string) []byte {
		b, err := seal([]byte(text), s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	hex := strings.TrimPrefix(digestA, "sha256:")
	mediaType := func(v string) func(map[string]any) { return func(m map[string]any) { m["mediaType"] = v } }
	before, after := signedAt.Add(-time.Hour), signedAt.Add(time.Hour)

	for _, tt := range []struct {
		name    string
		edit    func(*verify.Key)
		bundles [][]byte
		code    string
	}{
		{"no bundle", nil, nil, verify.CodeSigMissing},
		{"signature stripped", nil, [][]byte{rewrite(t, good, func(m map[string]any) { envelopeOf(m)["signatures"] = []any{} })}, verify.CodeSigMissing},
		{"wrong key", nil, [][]byte{sign(t, digestA, other)}, verify.CodeSigInvalid},
		{"wrong key, hint of the right one", nil, [][]byte{rewrite(t, sign(t, digestA, other), func(m map[string]any) {
			m["verificationMaterial"] = map[string]any{"publicKey": map[string]any{"hint": mustID(t, s)}}
		})}, verify.CodeSigInvalid},
		{"another digest", nil, [][]byte{sign(t, "sha256:"+strings.Repeat("b2", 32), s)}, verify.CodeSigInvalid},
		{"key revoked", func(k *verify.Key) { k.Revoked = true }, [][]byte{good}, verify.CodeKeyRevoked},
		{"key expired", func(k *verify.Key) { k.NotAfter = &before }, [][]byte{good}, verify.CodeKeyExpired},
		{"key not yet valid", func(k *verify.Key) { k.NotBefore = &after }, [][]byte{good}, verify.CodeKeyExpired},
		{"key for releases only", func(k *verify.Key) { k.Usages = []verify.Usage{verify.UsageRelease} }, [][]byte{good}, verify.CodeSigInvalid},
		{"revoked is told before wrong", func(k *verify.Key) { k.Revoked = true }, [][]byte{sign(t, digestA, other), good}, verify.CodeKeyRevoked},
		{"payload changed", nil, [][]byte{rewrite(t, good, func(m map[string]any) {
			p, _ := base64.StdEncoding.DecodeString(envelopeOf(m)["payload"].(string))
			envelopeOf(m)["payload"] = base64.StdEncoding.EncodeToString(bytes.Replace(p, []byte("a1a1"), []byte("a1a2"), 1))
		})}, verify.CodeSigInvalid},
		{"two signatures, one bad", nil, [][]byte{rewrite(t, good, func(m map[string]any) {
			e := envelopeOf(m)
			e["signatures"] = append(e["signatures"].([]any), map[string]any{"sig": "AAAA"})
		})}, verify.CodeSigInvalid},
		{"payload type", nil, [][]byte{rewrite(t, good, func(m map[string]any) { envelopeOf(m)["payloadType"] = verify.ReleaseMediaType })}, verify.CodeSigInvalid},
		{"bundle v0.1", nil, [][]byte{rewrite(t, good, mediaType("application/vnd.dev.sigstore.bundle+json;version=0.1"))}, verify.CodeSigInvalid},
		{"bundle v0.2", nil, [][]byte{rewrite(t, good, mediaType("application/vnd.dev.sigstore.bundle+json;version=0.2"))}, verify.CodeSigInvalid},
		{"bundle v0.4", nil, [][]byte{rewrite(t, good, mediaType("application/vnd.dev.sigstore.bundle.v0.4+json"))}, verify.CodeSigInvalid},
		{"no media type", nil, [][]byte{rewrite(t, good, func(m map[string]any) { delete(m, "mediaType") })}, verify.CodeSigInvalid},
		{"unknown key in the bundle", nil, [][]byte{rewrite(t, good, func(m map[string]any) { m["extra"] = 1 })}, verify.CodeSigInvalid},
		{"duplicate key in the bundle", nil, [][]byte{append([]byte(`{"mediaType":"x",`), good[1:]...)}, verify.CodeSigInvalid},
		{"truncated", nil, [][]byte{good[:len(good)/2]}, verify.CodeSigInvalid},
		{"oversized", nil, [][]byte{append(bytes.Clone(good), bytes.Repeat([]byte(" "), MaxBundleBytes)...)}, verify.CodeSigInvalid},
		{"not JSON", nil, [][]byte{[]byte("x")}, verify.CodeSigInvalid},
		{"invalid UTF-8", nil, [][]byte{bytes.Replace(good, []byte("hint\":\""), []byte("hint\":\"\xff"), 1)}, verify.CodeSigInvalid},
		{"certificate instead of a key", nil, [][]byte{rewrite(t, good, func(m map[string]any) {
			m["verificationMaterial"] = map[string]any{"certificate": map[string]any{"rawBytes": "AAAA"}}
		})}, verify.CodeSigInvalid},
		{"message signature instead of an envelope", nil, [][]byte{rewrite(t, good, func(m map[string]any) {
			delete(m, "dsseEnvelope")
			m["messageSignature"] = map[string]any{"messageDigest": map[string]any{"algorithm": "SHA2_256", "digest": "AAAA"}, "signature": "AAAA"}
		})}, verify.CodeSigInvalid},
		{"other predicate", nil, [][]byte{statement(`{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"` + hex + `"}}],"predicateType":"https://slsa.dev/provenance/v1","predicate":{}}`)}, verify.CodeSigInvalid},
		{"other statement type", nil, [][]byte{statement(`{"_type":"https://in-toto.io/Statement/v0.1","subject":[{"digest":{"sha256":"` + hex + `"}}],"predicateType":"` + PredicateType + `","predicate":{}}`)}, verify.CodeSigInvalid},
		{"two subjects", nil, [][]byte{statement(`{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"` + hex + `"}},{"digest":{"sha256":"` + hex + `"}}],"predicateType":"` + PredicateType + `","predicate":{}}`)}, verify.CodeSigInvalid},
		{"duplicate key in the statement", nil, [][]byte{statement(`{"_type":"x","_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"` + hex + `"}}],"predicateType":"` + PredicateType + `","predicate":{}}`)}, verify.CodeSigInvalid},
		{"digest of another algorithm", nil, [][]byte{statement(`{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha512":"` + hex + hex + `"}}],"predicateType":"` + PredicateType + `","predicate":{}}`)}, verify.CodeSigInvalid},
		{"too many", nil, make([][]byte, MaxBundles+1), verify.CodeSigInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) { wantCode(t, trusting(t, s, tt.edit), digestA, tt.bundles, signedAt, tt.code) })
	}

	t.Run("a wrong hint does not matter", func(t *testing.T) {
		b := rewrite(t, good, func(m map[string]any) {
			m["verificationMaterial"] = map[string]any{"publicKey": map[string]any{"hint": "anything"}}
		})
		if id, err := trusting(t, s, nil).VerifyArtifact(context.Background(), digestA, [][]byte{b}, signedAt); err != nil || id != mustID(t, s) {
			t.Errorf("VerifyArtifact = %q, %v", id, err)
		}
	})
	t.Run("windows include their ends", func(t *testing.T) {
		v := trusting(t, s, func(k *verify.Key) { k.NotBefore, k.NotAfter = &signedAt, &signedAt })
		if _, err := v.VerifyArtifact(context.Background(), digestA, [][]byte{good}, signedAt); err != nil {
			t.Error(err)
		}
	})
	t.Run("a malformed digest", func(t *testing.T) {
		wantCode(t, trusting(t, s, nil), "sha256:..", [][]byte{good}, signedAt, verify.CodeSigInvalid)
	})
	t.Run("every flipped bit is refused", func(t *testing.T) {
		v := trusting(t, s, nil)
		var e struct{ DsseEnvelope struct{ Payload, Sig string } }
		if err := json.Unmarshal(good, &e); err != nil {
			t.Fatal(err)
		}
		at := bytes.Index(good, []byte(e.DsseEnvelope.Payload))
		for i := at; i < at+len(e.DsseEnvelope.Payload); i += 7 {
			b := bytes.Clone(good)
			b[i] ^= 1 << (i % 7)
			if _, err := v.VerifyArtifact(context.Background(), digestA, [][]byte{b}, signedAt); err == nil {
				t.Fatalf("bit %d of byte %d flipped: accepted", i%7, i)
			}
		}
	})
}

func mustID(t testing.TB, s crypto.Signer) string {
	t.Helper()
	id, err := verify.KeyID(s.Public())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func FuzzParse(f *testing.F) {
	s := newKey(f)
	v := trusting(f, s, nil)
	good := sign(f, digestA, s)
	f.Add(good)
	f.Add([]byte("{}"))
	other := "sha256:" + strings.Repeat("00", 32)
	f.Fuzz(func(t *testing.T, data []byte) {
		// Whatever the bytes are, they are no signature of a digest nobody signed.
		if id, err := v.VerifyArtifact(context.Background(), other, [][]byte{data}, signedAt); err == nil {
			t.Fatalf("accepted as signed by %s: %q", id, data)
		}
	})
}

func BenchmarkVerifyArtifact(b *testing.B) {
	s := newKey(b)
	v := trusting(b, s, nil)
	bundles := [][]byte{sign(b, digestA, s)}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.VerifyArtifact(context.Background(), digestA, bundles, signedAt); err != nil {
			b.Fatal(err)
		}
	}
}
