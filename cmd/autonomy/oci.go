package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/oci"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/vfs"
)

// registryFlags say how to reach registries.
type registryFlags struct {
	mirror    string
	plainHTTP bool
	hosts     []string
	maxBlob   conf.Size
}

func (f *registryFlags) add(c *cobra.Command) {
	f.maxBlob = 16 << 20
	fs := c.Flags()
	fs.StringVar(&f.mirror, "mirror", "", "ask the registry or relay at base `URL` instead of the one a reference names")
	fs.BoolVar(&f.plainHTTP, "plain-http", false, "allow plain HTTP with hosts other than this machine")
	fs.StringArrayVar(&f.hosts, "allow-host", nil, "`HOST` that a registry may redirect to, whatever its address (repeatable); none other then")
	fs.Var(&f.maxBlob, "max-blob", "refuse blobs over `SIZE`")
}

func (f *registryFlags) client() (*oci.Client, error) {
	c, err := oci.New(oci.Options{Mirror: f.mirror, PlainHTTP: f.plainHTTP, Hosts: f.hosts, MaxBlob: int64(f.maxBlob), Keychain: authn.DefaultKeychain})
	return c, run.Exit(run.Usage, err)
}

// registryExit gives an error of a registry its exit code.
func registryExit(err error) error {
	var op *net.OpError
	var ue *url.Error
	var exit *run.ExitError
	switch {
	case err == nil, errors.As(err, &exit):
		return err
	case errors.Is(err, oci.ErrReference):
		return run.Exit(run.Usage, err)
	case errors.Is(err, oci.ErrNotFound):
		return run.Exit(run.NotFound, err)
	case errors.Is(err, oci.ErrDigest), errors.Is(err, oci.ErrMediaType), errors.Is(err, oci.ErrTooLarge), errors.Is(err, oci.ErrHost):
		return run.Exit(run.Refused, err)
	case errors.As(err, &op), errors.As(err, &ue), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, context.DeadlineExceeded):
		return run.Exit(run.Unreachable, err)
	}
	return err
}

func newOCI() *cobra.Command {
	c := &cobra.Command{Use: "oci", Short: "Push, pull, attach and inspect artifacts in a registry"}
	c.AddCommand(newOCIPush(), newOCIPull(), newOCIAttach(), newOCIInspect())
	return c
}

// artifactTypes are the short names of --type.
var artifactTypes = map[string]string{"policy": oci.TypePolicy, "lock": oci.TypeLock, "release": oci.TypeRelease, "bundle": oci.TypeBundle}

// artifactType reads --type; without one the file's name decides.
func artifactType(s, file string) (string, error) {
	switch base := filepath.Base(file); {
	case s != "":
	case strings.HasSuffix(base, ".tar.gz"):
		s = "policy"
	case strings.HasSuffix(base, ".lock.json"):
		s = "lock"
	default:
		return "", run.Exitf(run.Usage, "--type is missing, and the name %s does not tell: want policy, lock, release, bundle or a media type", base)
	}
	if t, ok := artifactTypes[s]; ok {
		return t, nil
	}
	if typ, sub, ok := strings.Cut(s, "/"); ok && typ != "" && sub != "" && !strings.ContainsAny(s, " \t\r\n\"") {
		return s, nil
	}
	return "", run.Exitf(run.Usage, "--type is %q, want policy, lock, release, bundle or a media type", s)
}

func readArtifact(name string, limit conf.Size, typ string) (oci.Artifact, error) {
	t, err := artifactType(typ, name)
	if err != nil {
		return oci.Artifact{}, err
	}
	data, err := readFile(name, int64(limit))
	if err != nil {
		return oci.Artifact{}, err
	}
	return oci.Artifact{ArtifactType: t, Layers: []oci.Layer{{MediaType: t, Data: data}}}, nil
}

// pushed is what push, attach and sign print.
type pushed struct {
	Ref     string `json:"ref"` // registry/repository@sha256:…
	Digest  string `json:"digest"`
	Type    string `json:"artifact_type"`
	Subject string `json:"subject,omitempty"`
}

func (p pushed) print(w io.Writer, format string) error {
	if format == "json" {
		return printJSON(w, p)
	}
	fmt.Fprintf(w, "pushed   %s\ntype     %s\n", p.Ref, p.Type)
	if p.Subject != "" {
		fmt.Fprintf(w, "subject  %s\n", p.Subject)
	}
	return nil
}

func newOCIPush() *cobra.Command {
	var reg registryFlags
	var typ string
	c := &cobra.Command{
		Use:     "push REF FILE",
		Short:   "Push a file as an artifact of one layer",
		Example: "  autonomy oci push registry.example/policies/quickstart:1.0.0 policy.tar.gz --type policy",
		Args:    usageArgs(cobra.ExactArgs(2)),
	}
	reg.add(c)
	c.Flags().StringVar(&typ, "type", "", "artifact `TYPE`: policy, lock, release, bundle or a media type (default by the file's name)")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		a, err := readArtifact(args[1], reg.maxBlob, typ)
		if err != nil {
			return err
		}
		client, err := reg.client()
		if err != nil {
			return err
		}
		defer client.Close()
		ref, err := oci.ParseRef(args[0])
		if err != nil {
			return registryExit(err)
		}
		d, err := client.Push(c.Context(), args[0], a)
		if err != nil {
			return registryExit(err)
		}
		return pushed{Ref: ref.Name() + "@" + d.Digest, Digest: d.Digest, Type: a.ArtifactType}.print(c.OutOrStdout(), *format)
	}
	return c
}

func newOCIAttach() *cobra.Command {
	var reg registryFlags
	var typ string
	c := &cobra.Command{
		Use:     "attach REF FILE",
		Short:   "Push a file as an artifact that refers to REF",
		Long:    "Push a file as an artifact whose subject is REF. Where the registry has no\nreferrers API the fallback tag sha256-HEX is extended.",
		Example: "  autonomy oci attach registry.example/agent@sha256:… autonomy.lock.json --type lock",
		Args:    usageArgs(cobra.ExactArgs(2)),
	}
	reg.add(c)
	c.Flags().StringVar(&typ, "type", "", "artifact `TYPE`: policy, lock, release, bundle or a media type (default by the file's name)")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		a, err := readArtifact(args[1], reg.maxBlob, typ)
		if err != nil {
			return err
		}
		p, err := attach(c.Context(), &reg, args[0], func(string) (oci.Artifact, error) { return a, nil })
		if err != nil {
			return registryExit(err)
		}
		return p.print(c.OutOrStdout(), *format)
	}
	return c
}

// attach resolves ref once and attaches what make returns for its digest.
func attach(ctx context.Context, reg *registryFlags, ref string, makeArtifact func(digest string) (oci.Artifact, error)) (pushed, error) {
	client, err := reg.client()
	if err != nil {
		return pushed{}, err
	}
	defer client.Close()
	r, err := oci.ParseRef(ref)
	if err != nil {
		return pushed{}, err
	}
	m, err := client.Resolve(ctx, ref)
	if err != nil {
		return pushed{}, err
	}
	a, err := makeArtifact(m.Digest)
	if err != nil {
		return pushed{}, err
	}
	d, err := client.Attach(ctx, r.Name(), m.Digest, a)
	if err != nil {
		return pushed{}, err
	}
	return pushed{Ref: r.Name() + "@" + d.Digest, Digest: d.Digest, Type: a.ArtifactType, Subject: m.Digest}, nil
}

func newOCIPull() *cobra.Command {
	var reg registryFlags
	var out, typ string
	c := &cobra.Command{
		Use:   "pull REF --out FILE",
		Short: "Pull the one layer of an artifact into a file",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	reg.add(c)
	c.Flags().StringVar(&out, "out", "", "write to `FILE`; - for standard output")
	c.Flags().StringVar(&typ, "type", "", "refuse a layer of another `TYPE`: policy, lock, release, bundle or a media type")
	c.RunE = func(c *cobra.Command, args []string) error {
		if out == "" {
			return run.Exitf(run.Usage, "--out is missing: a file, or - for standard output")
		}
		client, err := reg.client()
		if err != nil {
			return err
		}
		defer client.Close()
		r, err := oci.ParseRef(args[0])
		if err != nil {
			return registryExit(err)
		}
		m, err := client.Resolve(c.Context(), args[0])
		if err != nil {
			return registryExit(err)
		}
		if m.IsIndex() || len(m.Layers) != 1 {
			return run.Exitf(run.Refused, "%s is no artifact of one layer: see \"autonomy oci inspect\"", args[0])
		}
		want := m.Layers[0].MediaType
		if typ != "" {
			if want, err = artifactType(typ, ""); err != nil {
				return err
			}
		}
		_, data, err := client.Layer(c.Context(), r.Name(), m.Digest, want)
		if err != nil {
			return registryExit(err)
		}
		if out == "-" {
			_, err := c.OutOrStdout().Write(data)
			return err
		}
		if err := vfs.WriteFile(out, data, 0o644); err != nil {
			return err
		}
		fmt.Fprintf(c.OutOrStdout(), "pulled  %s@%s\nlayer   %s, %d bytes\nfile    %s\n", r.Name(), m.Digest, m.Layers[0].Digest, len(data), out)
		return nil
	}
	return c
}

// inspection is what inspect prints.
type inspection struct {
	Ref       string           `json:"ref"`
	MediaType string           `json:"media_type"`
	Type      string           `json:"artifact_type,omitempty"`
	Subject   string           `json:"subject,omitempty"`
	Layers    []oci.Descriptor `json:"layers"`
	Manifests []oci.Descriptor `json:"manifests,omitempty"`
	Referrers []oci.Descriptor `json:"referrers"`
}

func newOCIInspect() *cobra.Command {
	var reg registryFlags
	c := &cobra.Command{
		Use:   "inspect REF",
		Short: "Show a manifest and what refers to it",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	reg.add(c)
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		client, err := reg.client()
		if err != nil {
			return err
		}
		defer client.Close()
		r, err := oci.ParseRef(args[0])
		if err != nil {
			return registryExit(err)
		}
		m, err := client.Resolve(c.Context(), args[0])
		if err != nil {
			return registryExit(err)
		}
		refs, err := client.Referrers(c.Context(), r.Name(), m.Digest, "")
		if err != nil {
			return registryExit(err)
		}
		in := inspection{Ref: r.Name() + "@" + m.Digest, MediaType: m.MediaType, Type: m.Type(), Layers: slices.Concat([]oci.Descriptor{}, m.Layers), Manifests: m.Manifests, Referrers: slices.Concat([]oci.Descriptor{}, refs)}
		if m.Subject != nil {
			in.Subject = m.Subject.Digest
		}
		w := c.OutOrStdout()
		if *format == "json" {
			return printJSON(w, in)
		}
		fmt.Fprintf(w, "manifest  %s\ntype      %s\n", in.Ref, printable(in.Type))
		if in.Subject != "" {
			fmt.Fprintf(w, "subject   %s\n", printable(in.Subject))
		}
		var rows [][]string
		for _, g := range []struct {
			what string
			list []oci.Descriptor
		}{{"layer", in.Layers}, {"manifest", in.Manifests}, {"referrer", in.Referrers}} {
			for _, d := range g.list {
				typ := d.MediaType
				if d.ArtifactType != "" {
					typ = d.ArtifactType
				}
				rows = append(rows, []string{g.what, d.Digest, strconv.FormatInt(d.Size, 10), typ})
			}
		}
		return printTable(w, []string{"WHAT", "DIGEST", "BYTES", "TYPE"}, rows)
	}
	return c
}
