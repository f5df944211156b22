package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/oci"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/verify"
)

func newRelease() *cobra.Command {
	c := &cobra.Command{
		Use:   "release",
		Short: "Make, publish and list releases",
		Long: `A release is the desired state of a channel's nodes: image, lock, policy and
fingerprint in one signed statement. Nodes trust the signature, not the control
plane that hands it out.`,
	}
	c.AddCommand(newReleaseCreate(), newReleasePublish(), newReleaseList(), newReleaseShow())
	return c
}

func newReleaseCreate() *cobra.Command {
	var reg registryFlags
	var r verify.Release
	var key, out, lockFile, policy, image string
	var lifetime time.Duration
	c := &cobra.Command{
		Use:   "create --sequence N --image REF@sha256:… --lock FILE --policy REF:VERSION --key FILE --out FILE",
		Short: "Write a signed release",
		Long: `Write a signed release. The lock's fingerprint is checked and taken over. The
policy's tag is resolved once, its bundle must be the one the lock names; with
--policy REF:VERSION@sha256:… the registry is not asked.

The sequence must be above any that was activated in the channel. To go back to an
older version, publish it under a higher sequence.`,
		Example: `  autonomy release create --channel stable --sequence 7 --image registry.example/agent@sha256:… \
    --lock autonomy.lock.json --policy registry.example/policies/agent:1.4.2 --key release.key --out release.json`,
		Args: usageArgs(cobra.NoArgs),
	}
	reg.add(c)
	f := c.Flags()
	f.StringVar(&r.ReleaseID, "id", "", "release `ID` (default CHANNEL-SEQUENCE)")
	f.StringVar(&r.Channel, "channel", "stable", "`CHANNEL` of nodes")
	f.Uint64Var(&r.Sequence, "sequence", 0, "`N`, rising within the channel")
	f.StringVar(&image, "image", "", "agent image `REF@sha256:…`")
	f.StringVar(&lockFile, "lock", "autonomy.lock.json", "lock `FILE`")
	f.StringVar(&policy, "policy", "", "policy artifact `REF:VERSION[@sha256:…]`")
	f.StringVar(&r.RequiresRuntime, "requires-runtime", "", "`CONSTRAINTS` on autonomy-node, as in \">=0.1.0 <2.0.0\"")
	f.DurationVar(&lifetime, "expires-in", 90*24*time.Hour, "no activation after this `DURATION`")
	f.StringVar(&key, "key", "", "private key `FILE`")
	f.StringVar(&out, "out", "", "write the envelope to `FILE`")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if out == "" || policy == "" || image == "" {
			return run.Exitf(run.Usage, "--image, --policy and --out are needed\nUsage: %s", c.UseLine())
		}
		signer, err := readPrivateKey(key)
		if err != nil {
			return err
		}
		lock, lockBytes, err := readLock(lockFile)
		if err != nil {
			return err
		}
		ref, err := oci.ParseRef(image)
		if err != nil || ref.Digest == "" {
			return run.Exitf(run.Usage, "--image is %q, want registry/repository@sha256:…", image)
		}
		if ref.Digest != lock.Agent.ImageDigest {
			return run.Exitf(run.Refused, "the lock is for image %s, --image names %s: make the lock again", lock.Agent.ImageDigest, ref.Digest)
		}
		pol, err := oci.ParseRef(policy)
		if err != nil || pol.Tag == "" {
			return run.Exitf(run.Usage, "--policy is %q, want registry/repository:VERSION", policy)
		}
		if pol.Tag != lock.Policy.Version {
			return run.Exitf(run.Refused, "the lock is for policy version %s, --policy names %s", lock.Policy.Version, pol.Tag)
		}
		if pol.Digest == "" {
			if pol.Digest, err = resolvePolicy(c.Context(), &reg, policy, lock.Policy.Digest); err != nil {
				return registryExit(err)
			}
		}
		r.Schema = verify.ReleaseSchema
		if r.ReleaseID == "" {
			r.ReleaseID = r.Channel + "-" + strconv.FormatUint(r.Sequence, 10)
		}
		r.Agent.Image = ref.Name() + "@" + ref.Digest
		r.Lock = oci.Digest(lockBytes)
		r.Policy = verify.ReleasePolicy{Ref: pol.Name() + ":" + pol.Tag, Digest: pol.Digest}
		r.Fingerprint = lock.Fingerprint
		r.CreatedAt = time.Now().UTC().Truncate(time.Second)
		r.ExpiresAt = r.CreatedAt.Add(lifetime)
		env, err := verify.SignRelease(&r, signer)
		if err != nil {
			return run.Exit(run.Usage, err)
		}
		if err := vfs.WriteFile(out, env, 0o644); err != nil {
			return err
		}
		if *format == "json" {
			return printJSON(c.OutOrStdout(), r)
		}
		printRelease(c.OutOrStdout(), &r)
		fmt.Fprintf(c.OutOrStdout(), "file         %s\n", out)
		return nil
	}
	return c
}

// resolvePolicy returns the digest of the policy artifact under ref, whose one
// layer must be bundle.
func resolvePolicy(ctx context.Context, reg *registryFlags, ref, bundle string) (string, error) {
	client, err := reg.client()
	if err != nil {
		return "", err
	}
	defer client.Close()
	m, err := client.Resolve(ctx, ref)
	if err != nil {
		return "", err
	}
	if m.IsIndex() || len(m.Layers) != 1 || m.Layers[0].MediaType != oci.TypePolicy {
		return "", run.Exitf(run.Refused, "%s is no policy artifact: want one layer of %s; \"autonomy oci push REF BUNDLE --type policy\" makes one", ref, oci.TypePolicy)
	}
	if m.Layers[0].Digest != bundle {
		return "", run.Exitf(run.Refused, "%s holds bundle %s, the lock is for %s: push the bundle the lock was made from, or make the lock again", ref, m.Layers[0].Digest, bundle)
	}
	return m.Digest, nil
}

func printRelease(w io.Writer, r *verify.Release) {
	requires := r.RequiresRuntime
	if requires == "" {
		requires = "any"
	}
	fmt.Fprintf(w, "release      %s\nchannel      %s, sequence %d\nimage        %s\nlock         %s\npolicy       %s@%s\nfingerprint  %s\nruntime      %s\ncreated      %s\nexpires      %s\n",
		printable(r.ReleaseID), printable(r.Channel), r.Sequence, printable(r.Agent.Image), r.Lock, printable(r.Policy.Ref), r.Policy.Digest, r.Fingerprint, printable(requires),
		r.CreatedAt.Format(time.RFC3339), r.ExpiresAt.Format(time.RFC3339))
}

// cpURL is the control plane's default address.
const cpURL = "http://127.0.0.1:8888"

// maxCPAnswer bounds an answer of the control plane, in bytes.
const maxCPAnswer = 16 << 20

// cpFlag adds --cp.
func cpFlag(c *cobra.Command) *string {
	def := os.Getenv("AUTONOMY_CP_URL")
	if def == "" {
		def = cpURL
	}
	return c.Flags().String("cp", def, "control plane `URL` (or AUTONOMY_CP_URL)")
}

// askCP sends one request to the control plane and decodes its answer into v.
// A problem document becomes the error; exit codes: 4 not found, 5 unreachable.
func askCP(ctx context.Context, method, base, path string, body []byte, v any) (status int, err error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return 0, run.Exitf(run.Usage, "--cp is not a URL such as %s", cpURL)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	path, query, _ := strings.Cut(path, "?")
	u = u.JoinPath(path)
	u.RawQuery = query
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return 0, run.Exit(run.Usage, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set("Accept", "application/json")
	resp, err := httpClient(ctx).Do(req)
	if err != nil {
		return 0, run.Exitf(run.Unreachable, "control plane: %w; is autonomy-cp running, and --cp right?", err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxCPAnswer+1))
	if err != nil {
		return 0, run.Exitf(run.Unreachable, "control plane: read the answer: %w", err)
	}
	if len(data) > maxCPAnswer {
		return 0, fmt.Errorf("control plane: the answer is over %d bytes", maxCPAnswer)
	}
	if resp.StatusCode/100 != 2 {
		code := run.Failure
		if resp.StatusCode == http.StatusNotFound {
			code = run.NotFound
		}
		var p struct{ Code, Detail string }
		if json.Unmarshal(data, &p) != nil || p.Code == "" {
			return resp.StatusCode, run.Exitf(code, "control plane: %s", resp.Status)
		}
		return resp.StatusCode, run.Exitf(code, "control plane: %s: %s", printable(p.Code), printable(p.Detail))
	}
	if err := json.Unmarshal(data, v); err != nil {
		return 0, fmt.Errorf("control plane: the answer is not the JSON that was due: %w", err)
	}
	return resp.StatusCode, nil
}

func newReleasePublish() *cobra.Command {
	c := &cobra.Command{
		Use:   "publish FILE --cp URL",
		Short: "Hand a signed release to the control plane",
		Long:  "Hand a signed release to the control plane. Publishing the same file again\nchanges nothing; a sequence that is not above the channel's is refused.",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	cp := cpFlag(c)
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		env, err := readFile(args[0], verify.MaxEnvelopeBytes)
		if err != nil {
			return err
		}
		var answer struct {
			ReleaseID string `json:"release_id"`
			Channel   string `json:"channel"`
			Sequence  uint64 `json:"sequence"`
			Verified  bool   `json:"verified"`
			Note      string `json:"note,omitempty"`
		}
		status, err := askCP(c.Context(), http.MethodPost, *cp, "/v1/releases", env, &answer)
		if err != nil {
			return err
		}
		if *format == "json" {
			return printJSON(c.OutOrStdout(), map[string]any{"release_id": answer.ReleaseID, "channel": answer.Channel, "sequence": answer.Sequence, "created": status == http.StatusCreated, "verified": answer.Verified})
		}
		what := "published"
		if status != http.StatusCreated {
			what = "known already"
		}
		fmt.Fprintf(c.OutOrStdout(), "%s  %s, channel %s, sequence %d\n", what, printable(answer.ReleaseID), printable(answer.Channel), answer.Sequence)
		if answer.Note != "" {
			fmt.Fprintln(c.ErrOrStderr(), printable(answer.Note))
		}
		return nil
	}
	return c
}

// storedRelease is a release as the control plane shows it.
type storedRelease struct {
	ReleaseID   string          `json:"release_id"`
	Channel     string          `json:"channel"`
	Sequence    uint64          `json:"sequence"`
	Digest      string          `json:"digest"`
	VerifiedBy  string          `json:"verified_by,omitempty"`
	PublishedAt time.Time       `json:"published_at"`
	Release     json.RawMessage `json:"release"`
	Envelope    json.RawMessage `json:"envelope,omitempty"`
}

func newReleaseList() *cobra.Command {
	var channel string
	c := &cobra.Command{
		Use:   "list --cp URL",
		Short: "List the releases the control plane holds, newest first",
		Args:  usageArgs(cobra.NoArgs),
	}
	cp := cpFlag(c)
	c.Flags().StringVar(&channel, "channel", "", "only those of `CHANNEL`")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		path := "/v1/releases"
		if channel != "" {
			path += "?" + url.Values{"channel": {channel}}.Encode()
		}
		var answer struct {
			Releases []storedRelease `json:"releases"`
		}
		if _, err := askCP(c.Context(), http.MethodGet, *cp, path, nil, &answer); err != nil {
			return err
		}
		if *format == "json" {
			if answer.Releases == nil {
				answer.Releases = []storedRelease{}
			}
			return printJSON(c.OutOrStdout(), answer)
		}
		var rows [][]string
		for _, s := range answer.Releases {
			policy, fp := "?", "?" // an older control plane may keep what this program cannot read
			if r, err := verify.ParseRelease(s.Release); err == nil {
				policy, fp = r.Policy.Ref, shorten(r.Fingerprint)
			}
			rows = append(rows, []string{s.Channel, strconv.FormatUint(s.Sequence, 10), s.ReleaseID, policy, fp, s.PublishedAt.UTC().Format(time.RFC3339)})
		}
		return printTable(c.OutOrStdout(), []string{"CHANNEL", "SEQ", "RELEASE", "POLICY", "FINGERPRINT", "PUBLISHED"}, rows)
	}
	return c
}

func newReleaseShow() *cobra.Command {
	var key, trust, out string
	c := &cobra.Command{
		Use:   "show ID --cp URL",
		Short: "Show one release, and check its signature here with --trust",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	cp := cpFlag(c)
	f := c.Flags()
	f.StringVar(&key, "key", "", "check with this public key `FILE`")
	f.StringVar(&trust, "trust", "", "check with this keyring `FILE`")
	f.StringVar(&out, "out", "", "write the envelope to `FILE`")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		var s storedRelease
		if _, err := askCP(c.Context(), http.MethodGet, *cp, "/v1/releases/"+url.PathEscape(args[0]), nil, &s); err != nil {
			return err
		}
		r, err := verify.ParseRelease(s.Release)
		if err != nil {
			return fmt.Errorf("control plane: %w", err)
		}
		signed := "not checked: give --trust KEYRING or --key PUB"
		if key != "" || trust != "" {
			kr, err := trusted(key, trust)
			if err != nil {
				return err
			}
			// What is shown is what was signed, not what the control plane says it is.
			var id string
			if r, id, err = verify.OpenEnvelope(s.Envelope, kr, time.Time{}); err != nil {
				return run.Exit(run.Refused, err)
			}
			signed = "good, by key " + id
		}
		if out != "" {
			if err := vfs.WriteFile(out, s.Envelope, 0o644); err != nil {
				return err
			}
		}
		if *format == "json" {
			return printJSON(c.OutOrStdout(), s)
		}
		printRelease(c.OutOrStdout(), r)
		fmt.Fprintf(c.OutOrStdout(), "signature    %s\n", signed)
		return nil
	}
	return c
}
