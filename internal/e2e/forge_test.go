package e2e

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/autonomyops/autonomy/fingerprint"
	"github.com/autonomyops/autonomy/verify"
)

// publishForged signs a statement that "autonomy release create" would refuse to
// write: spoil changes a good one.
func (f *fleet) publishForged(c content, spoil func(*verify.Release)) string {
	f.t.Helper()
	pemKey, err := os.ReadFile(c.key)
	if err != nil {
		f.t.Fatal(err)
	}
	key, err := verify.ParsePrivateKey(pemKey)
	if err != nil {
		f.t.Fatal(err)
	}
	data, err := os.ReadFile(c.lock)
	if err != nil {
		f.t.Fatal(err)
	}
	lock, err := fingerprint.Parse(data)
	if err != nil {
		f.t.Fatal(err)
	}
	id := fmt.Sprintf("stable-%d", f.sequence)
	rel := &verify.Release{
		Schema: verify.ReleaseSchema, ReleaseID: id, Channel: "stable", Sequence: uint64(f.sequence),
		Agent: verify.ReleaseAgent{Image: c.image.Ref}, Lock: fingerprint.Digest(data),
		Policy:      verify.ReleasePolicy{Ref: f.registry.Addr + "/e2e/policy:" + c.version, Digest: c.policy.digest()},
		Fingerprint: lock.Fingerprint,
		CreatedAt:   time.Now().Add(-time.Minute).UTC().Truncate(time.Second), ExpiresAt: time.Now().Add(time.Hour).UTC().Truncate(time.Second),
	}
	spoil(rel)
	env, err := verify.SignRelease(rel, key)
	if err != nil {
		f.t.Fatal(err)
	}
	strip := func(ref string) string { return strings.TrimPrefix(ref, f.registry.Addr+"/") }
	f.cli("relay", "prestage", "--relay", f.relayURL, "--key", f.path("release.key"), "--id", "e2e", "--sequence", fmt.Sprint(f.sequence),
		"--digest", strip(c.image.Ref), "--digest", strip(c.policy.Ref))
	resp, err := http.Post(f.cpURL+"/v1/releases", "application/json", strings.NewReader(string(env)))
	if err != nil {
		f.t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		f.t.Fatalf("publish: %s", resp.Status)
	}
	return id
}
