package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/verify"
)

func newKey() *cobra.Command {
	c := &cobra.Command{Use: "key", Short: "Make signing keys"}
	c.AddCommand(newKeyGenerate())
	return c
}

func newKeyGenerate() *cobra.Command {
	var out, kind string
	c := &cobra.Command{
		Use:   "generate --out DIR/NAME",
		Short: "Make a key pair: NAME.key (private, 0600) and NAME.pub",
		Long: `Make a key pair for releases and artifacts.

NAME.key is an unencrypted PKCS #8 PEM file, readable by its owner only. NAME.pub
is the public key; cosign takes it as it is (cosign verify --key NAME.pub). No
file is overwritten.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if out == "" {
				return run.Exitf(run.Usage, "--out is missing: where to write, as in --out keys/release")
			}
			var s crypto.Signer
			var err error
			switch kind {
			case "ecdsa":
				s, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			case "ed25519":
				_, s, err = ed25519.GenerateKey(rand.Reader)
			default:
				return run.Exitf(run.Usage, "--type is %q, want ecdsa (P-256, for cosign too) or ed25519", kind)
			}
			if err != nil {
				return fmt.Errorf("make a key: %w", err)
			}
			der, err := x509.MarshalPKCS8PrivateKey(s)
			if err != nil {
				return fmt.Errorf("make a key: %w", err)
			}
			pub, err := verify.MarshalPublicKey(s.Public())
			if err != nil {
				return err
			}
			id, err := verify.KeyID(s.Public())
			if err != nil {
				return err
			}
			if err := vfs.MkdirAll(filepath.Dir(out), 0o700); err != nil {
				return err
			}
			for _, name := range []string{out + ".key", out + ".pub"} {
				if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("%s exists already: choose another name, or move it away", name)
				}
			}
			if err := writeNew(out+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
				return err
			}
			if err := writeNew(out+".pub", pub, 0o644); err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "private key  %s.key\npublic key   %s.pub\nkey id       %s\n", out, out, id)
			return nil
		},
	}
	c.Flags().StringVar(&out, "out", "", "write `DIR/NAME`.key and .pub")
	c.Flags().StringVar(&kind, "type", "ecdsa", "`ecdsa|ed25519`")
	return c
}

// writeNew writes a file that must not exist.
func writeNew(name string, data []byte, perm fs.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists already: choose another name, or move it away", name)
	} else if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", name, err), os.Remove(name))
	}
	return vfs.SyncDir(filepath.Dir(name))
}

func newKeyring() *cobra.Command {
	c := &cobra.Command{Use: "keyring", Short: "Make the file of keys a node trusts"}
	c.AddCommand(newKeyringCreate())
	return c
}

func newKeyringCreate() *cobra.Command {
	var out string
	var release, artifact []string
	var before, after string
	c := &cobra.Command{
		Use:   "create --out FILE [PUB...]",
		Short: "Make a keyring from public keys",
		Long: `Make a keyring (autonomy-node --trust FILE) from public keys. Those given as
arguments may sign releases and artifacts, the flags give a key one use. To revoke
a key or to change its window, edit the file: "revoked": true, "not_before",
"not_after".`,
		Example: `  autonomy keyring create --out keyring.json release.pub
  autonomy keyring create --out keyring.json --release-key ops.pub --artifact-key build.pub`,
		RunE: func(c *cobra.Command, args []string) error {
			release, artifact := slices.Concat(args, release), slices.Concat(args, artifact)
			if out == "" || len(release)+len(artifact) == 0 {
				return run.Exitf(run.Usage, "--out and at least one public key are needed\nUsage: %s", c.UseLine())
			}
			notBefore, err := parseTime("--not-before", before)
			if err != nil {
				return err
			}
			notAfter, err := parseTime("--not-after", after)
			if err != nil {
				return err
			}
			var keys []*verify.Key
			byID := map[string]*verify.Key{}
			for _, g := range []struct {
				files []string
				usage verify.Usage
			}{{release, verify.UsageRelease}, {artifact, verify.UsageArtifact}} {
				for _, file := range g.files {
					pub, id, err := readPublicKey(file)
					if err != nil {
						return err
					}
					k := byID[id]
					if k == nil {
						text, err := verify.MarshalPublicKey(pub)
						if err != nil {
							return err
						}
						k = &verify.Key{ID: id, Name: filepath.Base(file), PublicKey: string(text), NotBefore: notBefore, NotAfter: notAfter}
						byID[id] = k
						keys = append(keys, k)
					}
					if !k.May(g.usage) {
						k.Usages = append(k.Usages, g.usage)
					}
				}
			}
			kr, err := verify.NewKeyring(keys...)
			if err != nil {
				return run.Exit(run.Usage, err)
			}
			data, err := kr.Marshal()
			if err != nil {
				return err
			}
			if err := writeNew(out, data, 0o644); err != nil { // overwritten, it would lose its revocations
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "keyring  %s, %d keys\n", out, len(keys))
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&out, "out", "", "write the keyring to `FILE`")
	f.StringArrayVar(&release, "release-key", nil, "public key `FILE` for releases (repeatable)")
	f.StringArrayVar(&artifact, "artifact-key", nil, "public key `FILE` for artifacts (repeatable)")
	f.StringVar(&before, "not-before", "", "the keys sign nothing made before `TIME` (RFC 3339)")
	f.StringVar(&after, "not-after", "", "the keys sign nothing made after `TIME` (RFC 3339)")
	return c
}

func parseTime(flag, s string) (*time.Time, error) {
	if s == "" {
		return nil, nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return nil, run.Exitf(run.Usage, "%s is %q, want RFC 3339, as in 2026-12-31T23:59:59Z", flag, s)
	}
	t = t.UTC()
	return &t, nil
}

// readFile reads a regular file of at most limit bytes.
func readFile(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, run.Exit(run.NotFound, err)
		}
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if info.IsDir() {
		return nil, run.Exitf(run.Usage, "%s is a directory, want a file", name)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(data)) > limit {
		return nil, run.Exitf(run.Usage, "%s: over %d bytes", name, limit)
	}
	return data, nil
}

// maxKeyFile bounds a PEM file of one key, in bytes.
const maxKeyFile = 64 << 10

func readPublicKey(name string) (crypto.PublicKey, string, error) {
	data, err := readFile(name, maxKeyFile)
	if err != nil {
		return nil, "", err
	}
	pub, err := verify.ParsePublicKey(data)
	if err != nil {
		return nil, "", run.Exitf(run.Usage, "%s: %w", name, err)
	}
	id, err := verify.KeyID(pub)
	if err != nil {
		return nil, "", err
	}
	return pub, id, nil
}

func readPrivateKey(name string) (crypto.Signer, error) {
	if name == "" {
		return nil, run.Exitf(run.Usage, "--key is missing: the private key file, as \"autonomy key generate\" makes it")
	}
	data, err := readFile(name, maxKeyFile)
	if err != nil {
		return nil, err
	}
	s, err := verify.ParsePrivateKey(data)
	if err != nil {
		return nil, run.Exitf(run.Usage, "%s: %w", name, err)
	}
	return s, nil
}

func readKeyring(name string) (*verify.Keyring, error) {
	data, err := readFile(name, verify.MaxKeyringBytes)
	if err != nil {
		return nil, err
	}
	kr, err := verify.ParseKeyring(data)
	if err != nil {
		return nil, run.Exitf(run.Usage, "%s: %w", name, err)
	}
	return kr, nil
}
