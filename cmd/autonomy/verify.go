package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/oci"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/verify"
	"github.com/autonomyops/autonomy/verify/sigstore"
)

func newVerify() *cobra.Command {
	var reg registryFlags
	var key, trust, release, channel, runtime string
	var highest uint64
	var explain bool
	c := &cobra.Command{
		Use:   "verify REF | --release FILE",
		Short: "Check a signature, or a whole release as a node does",
		Long: `With REF: check that the manifest it names is signed by --key, or by an artifact
key of the keyring --trust.

With --release FILE: fetch what the signed release names and run the four steps
that a node runs before it activates: signature, digest, fingerprint,
compatibility. --explain tells what each step checked, and what it did not.

Exit 3: refused, with the step and its code.`,
		Example: `  autonomy verify registry.example/agent:1.4.2 --key release.pub
  autonomy verify --release release.json --trust keyring.json --explain`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
	}
	reg.add(c)
	f := c.Flags()
	f.StringVar(&key, "key", "", "public key `FILE`")
	f.StringVar(&trust, "trust", "", "keyring `FILE`")
	f.StringVar(&release, "release", "", "release envelope `FILE`")
	f.StringVar(&channel, "channel", "stable", "the `CHANNEL` the release must be for")
	f.StringVar(&runtime, "runtime-version", run.Version, "the node `VERSION` to judge by")
	f.Uint64Var(&highest, "highest-sequence", 0, "the highest sequence activated before, `N`")
	f.BoolVar(&explain, "explain", false, "tell what was checked and what was not")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if (release == "") == (len(args) == 0) {
			return run.Exitf(run.Usage, "give a REF, or --release FILE, and not both")
		}
		kr, err := trusted(key, trust)
		if err != nil {
			return err
		}
		client, err := reg.client()
		if err != nil {
			return err
		}
		defer client.Close()
		artifacts, err := sigstore.New(kr)
		if err != nil {
			return err
		}
		w := c.OutOrStdout()
		if release == "" {
			v, err := verifyRef(c.Context(), client, args[0], artifacts)
			if err != nil {
				return registryExit(err)
			}
			return v.print(w, *format, explain)
		}
		env, err := readFile(release, verify.MaxEnvelopeBytes)
		if err != nil {
			return err
		}
		p := verify.Params{Keyring: kr, Channel: channel, HighestSequence: highest, Now: time.Now(), RuntimeVersion: runtime, Artifacts: artifacts, ReadPolicy: readPolicy}
		ev, refusal := verifyRelease(c.Context(), client, env, p)
		if refusal != nil && !isRefusal(refusal) {
			return registryExit(refusal)
		}
		if err := printEvidence(w, ev, *format, explain); err != nil {
			return err
		}
		return run.Exit(run.Refused, refusal)
	}
	return c
}

// trusted makes the keyring of --key, good for everything, or reads --trust.
func trusted(key, trust string) (*verify.Keyring, error) {
	switch {
	case (key == "") == (trust == ""):
		return nil, run.Exitf(run.Usage, "give --key PUB or --trust KEYRING, and not both")
	case trust != "":
		return readKeyring(trust)
	}
	pub, _, err := readPublicKey(key)
	if err != nil {
		return nil, err
	}
	text, err := verify.MarshalPublicKey(pub)
	if err != nil {
		return nil, err
	}
	return verify.NewKeyring(&verify.Key{PublicKey: string(text), Usages: []verify.Usage{verify.UsageRelease, verify.UsageArtifact}})
}

func isRefusal(err error) bool {
	var fault *verify.Error
	return errors.As(err, &fault)
}

// verified is what verify says of an artifact.
type verified struct {
	Ref        string   `json:"ref"`
	Digest     string   `json:"digest"`
	KeyID      string   `json:"key_id"`
	NotChecked []string `json:"not_checked"`
}

func (v verified) print(w io.Writer, format string, explain bool) error {
	if format == "json" {
		return printJSON(w, v)
	}
	fmt.Fprintf(w, "verified  %s\nkey       %s\n", v.Ref, v.KeyID)
	if explain {
		for _, s := range v.NotChecked {
			fmt.Fprintf(w, "not checked: %s\n", s)
		}
	}
	return nil
}

func verifyRef(ctx context.Context, client *oci.Client, ref string, artifacts verify.ArtifactVerifier) (verified, error) {
	r, err := oci.ParseRef(ref)
	if err != nil {
		return verified{}, err
	}
	m, err := client.Resolve(ctx, ref)
	if err != nil {
		return verified{}, err
	}
	bundles, err := fetchSignatures(ctx, client, r.Name(), m.Digest)
	if err != nil {
		return verified{}, err
	}
	id, err := artifacts.VerifyArtifact(ctx, m.Digest, bundles, time.Now())
	if err != nil {
		return verified{}, run.Exitf(run.Refused, "%s@%s: %w", r.Name(), m.Digest, err)
	}
	return verified{Ref: r.Name() + "@" + m.Digest, Digest: m.Digest, KeyID: id, NotChecked: []string{
		"when it was signed: the key's window is judged by the time now",
		"transparency log: signatures are made with long-lived keys",
		"the name: a signature is of a digest, under whatever name it is found",
	}}, nil
}

// fetchSignatures returns the sigstore bundles that refer to digest. One that is
// not of the form is left out: a registry may hold those of others.
func fetchSignatures(ctx context.Context, client *oci.Client, repo, digest string) ([][]byte, error) {
	refs, err := client.Referrers(ctx, repo, digest, oci.TypeBundle)
	if err != nil {
		return nil, err
	}
	var out [][]byte
	for _, d := range refs[:min(len(refs), sigstore.MaxBundles)] {
		_, b, err := client.Layer(ctx, repo, d.Digest, oci.TypeBundle)
		if errors.Is(err, oci.ErrMediaType) || errors.Is(err, oci.ErrTooLarge) {
			continue
		} else if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

// verifyRelease fetches what the envelope names, by digest, and runs the gate.
// An envelope that does not open is refused by the gate without a fetch.
func verifyRelease(ctx context.Context, client *oci.Client, env []byte, p verify.Params) (verify.Evidence, error) {
	m := verify.Material{Envelope: env}
	if rel, _, err := verify.OpenEnvelope(env, p.Keyring, p.Now); err == nil {
		repo := rel.Agent.Repository()
		image, err := client.Manifest(ctx, repo, rel.Agent.Digest())
		if err != nil {
			return verify.Evidence{}, fmt.Errorf("image: %w", err)
		}
		m.ImageManifest = image.Raw
		if m.ImageSignatures, err = fetchSignatures(ctx, client, repo, rel.Agent.Digest()); err != nil {
			return verify.Evidence{}, fmt.Errorf("image signatures: %w", err)
		}
		if m.Lock, err = client.Blob(ctx, repo, rel.Lock); err != nil {
			return verify.Evidence{}, fmt.Errorf("lock: %w", err)
		}
		policy, err := client.Manifest(ctx, rel.Policy.Repository(), rel.Policy.Digest)
		if err != nil {
			return verify.Evidence{}, fmt.Errorf("policy: %w", err)
		}
		m.PolicyManifest = policy.Raw
		if len(policy.Layers) == 1 { // otherwise the gate says what is wrong
			if m.Policy, err = client.Blob(ctx, rel.Policy.Repository(), policy.Layers[0].Digest); err != nil {
				return verify.Evidence{}, fmt.Errorf("policy bundle: %w", err)
			}
		}
	}
	ev, _, err := verify.Verify(ctx, m, p)
	return ev, err
}

func readPolicy(data []byte) (verify.PolicyMeta, error) {
	b, err := prepared.ReadBundle(data, prepared.Limits{})
	if err != nil {
		return verify.PolicyMeta{}, err
	}
	return verify.PolicyMeta{Name: b.Name, Version: b.Version, RequiresRuntime: b.RequiresRuntime}, nil
}

func printEvidence(w io.Writer, ev verify.Evidence, format string, explain bool) error {
	if format == "json" {
		return printJSON(w, ev)
	}
	if ev.ReleaseID != "" {
		fmt.Fprintf(w, "release  %s, channel %s, sequence %d\n", printable(ev.ReleaseID), printable(ev.Channel), ev.Sequence)
	}
	for i, s := range ev.Steps {
		fmt.Fprintf(w, "%d %-13s  %s", i+1, s.Name, s.Result)
		if s.Code != "" {
			fmt.Fprintf(w, "  %s: %s", s.Code, printable(s.Detail))
		}
		fmt.Fprintln(w)
		if !explain {
			continue
		}
		for _, line := range s.Checked {
			fmt.Fprintf(w, "    checked      %s\n", printable(line))
		}
		for _, line := range s.NotChecked {
			fmt.Fprintf(w, "    not checked  %s\n", printable(line))
		}
	}
	return nil
}
