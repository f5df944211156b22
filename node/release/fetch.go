package release

import (
	"context"
	"errors"
	"fmt"

	"github.com/autonomyops/autonomy/internal/oci"
	"github.com/autonomyops/autonomy/verify"
	"github.com/autonomyops/autonomy/verify/sigstore"
)

// Registry fetches a release's content from the registry that it names, or
// through a relay: everything by digest, nothing by tag.
//
// What it cannot get is a fault of the way and tried again: a relay that has
// not staged the content yet, a flipped bit on the line. What it can get and is
// of the wrong form it hands on, for verify to refuse by name: a digest names
// the same bytes for ever, so asking again would not help.
type Registry struct{ Client *oci.Client }

// Fetch implements Fetcher.
func (f Registry) Fetch(ctx context.Context, envelope []byte, r *verify.Release) (verify.Material, error) {
	m := verify.Material{Envelope: envelope}
	image, err := f.Client.Manifest(ctx, r.Agent.Repository(), r.Agent.Digest())
	if err != nil && !condemned(err) {
		return m, fmt.Errorf("image: %w", err)
	}
	if err == nil {
		m.ImageManifest = image.Raw
	}
	refs, err := f.Client.Referrers(ctx, r.Agent.Repository(), r.Agent.Digest(), oci.TypeBundle)
	if err != nil {
		return m, fmt.Errorf("signatures of the image: %w", err)
	}
	for _, d := range refs[:min(len(refs), sigstore.MaxBundles)] {
		_, bundle, err := f.Client.Layer(ctx, r.Agent.Repository(), d.Digest, oci.TypeBundle)
		if condemned(err) {
			continue // somebody else's oddity: one good signature is enough
		}
		if err != nil {
			return m, fmt.Errorf("signature of the image: %w", err)
		}
		m.ImageSignatures = append(m.ImageSignatures, bundle)
	}
	if m.Lock, err = f.Client.Blob(ctx, r.Agent.Repository(), r.Lock); err != nil && !condemned(err) {
		return m, fmt.Errorf("lock: %w", err)
	}
	policy, err := f.Client.Manifest(ctx, r.Policy.Repository(), r.Policy.Digest)
	if condemned(err) {
		return m, nil
	}
	if err != nil {
		return m, fmt.Errorf("policy: %w", err)
	}
	m.PolicyManifest = policy.Raw
	if len(policy.Layers) != 1 {
		return m, nil
	}
	if m.Policy, err = f.Client.Blob(ctx, r.Policy.Repository(), policy.Layers[0].Digest); err != nil && !condemned(err) {
		return m, fmt.Errorf("policy bundle: %w", err)
	}
	return m, nil
}

// condemned reports faults of the content itself.
func condemned(err error) bool {
	return errors.Is(err, oci.ErrMediaType) || errors.Is(err, oci.ErrTooLarge)
}
