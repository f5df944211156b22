package main

import (
	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/oci"
	"github.com/autonomyops/autonomy/verify/sigstore"
)

func newSign() *cobra.Command {
	var reg registryFlags
	var key string
	c := &cobra.Command{
		Use:   "sign REF --key FILE",
		Short: "Sign an artifact in a registry",
		Long: `Sign the manifest that REF names and attach the signature: a sigstore bundle v0.3,
as cosign writes it. A tag is resolved once, the signature is of the digest.
cosign checks it with

    cosign verify --key NAME.pub --insecure-ignore-tlog --new-bundle-format REF

A signature is of bytes. It does not say under which name or in which channel they
may be used: "autonomy release create" does.`,
		Example: "  autonomy sign registry.example/agent@sha256:… --key keys/release.key",
		Args:    usageArgs(cobra.ExactArgs(1)),
	}
	reg.add(c)
	c.Flags().StringVar(&key, "key", "", "private key `FILE`")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		signer, err := readPrivateKey(key)
		if err != nil {
			return err
		}
		p, err := attach(c.Context(), &reg, args[0], func(digest string) (oci.Artifact, error) {
			b, err := sigstore.Sign(digest, "", signer)
			return oci.Artifact{ArtifactType: oci.TypeBundle, Annotations: sigstore.Annotations(), Layers: []oci.Layer{{MediaType: oci.TypeBundle, Data: b}}}, err
		})
		if err != nil {
			return registryExit(err)
		}
		return p.print(c.OutOrStdout(), *format)
	}
	return c
}
