package main

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/run"
)

// identity is what this program shows to the daemons that it calls.
type identity struct {
	tls   *tls.Config // nil: the system's roots, no client certificate
	token string      // for a node; "": none
}

type identityKey struct{}

// maxTokenFile bounds a file that holds one token, in bytes.
const maxTokenFile = 4 << 10

// addIdentity gives root the flags that every command has which calls a daemon.
// A token is read from a file or the environment, never from an argument: other
// users see those.
func addIdentity(root *cobra.Command) {
	f := root.PersistentFlags()
	cert := f.String("client-cert", os.Getenv("AUTONOMY_CLIENT_CERT"), "show the certificate in PEM `FILE` to the daemon that is called (or AUTONOMY_CLIENT_CERT)")
	key := f.String("client-key", os.Getenv("AUTONOMY_CLIENT_KEY"), "private key of --client-cert, PEM `FILE` (or AUTONOMY_CLIENT_KEY)")
	ca := f.String("server-ca", os.Getenv("AUTONOMY_SERVER_CA"), "take the daemon's certificate from the CAs in PEM `FILE` (or AUTONOMY_SERVER_CA; default: the system's)")
	token := f.String("token-file", os.Getenv("AUTONOMY_TOKEN_FILE"), "send the bearer token in `FILE` to a node (or AUTONOMY_TOKEN_FILE)")
	root.PersistentPreRunE = func(c *cobra.Command, _ []string) error {
		if (*cert == "") != (*key == "") {
			return run.Exitf(run.Usage, "--client-cert and --client-key go together")
		}
		conf, err := run.ClientTLS(*cert, *key, *ca)
		if err != nil {
			return run.Exit(run.Usage, err)
		}
		id := identity{tls: conf}
		if *token != "" {
			data, err := readFile(*token, maxTokenFile)
			if err != nil {
				return run.Exitf(run.Usage, "--token-file: %w", err)
			}
			if id.token = strings.TrimSpace(string(data)); id.token == "" || strings.ContainsAny(id.token, " \t\r\n") {
				return run.Exitf(run.Usage, "--token-file %s: want one token in it", *token)
			}
		}
		c.SetContext(context.WithValue(c.Context(), identityKey{}, id))
		return nil
	}
}

// identityOf is the identity that the flags gave, none for a context without.
func identityOf(ctx context.Context) identity {
	id, _ := ctx.Value(identityKey{}).(identity)
	return id
}

// authorize adds the token to a request to a node, unless it would pass a
// network in the clear.
func (id identity) authorize(req *http.Request) error {
	if id.token == "" {
		return nil
	}
	if req.URL.Scheme != "https" && !run.Loopback(net.JoinHostPort(req.URL.Hostname(), "1")) {
		return run.Exitf(run.Usage, "the token would go to %s unencrypted: use https", req.URL.Host)
	}
	req.Header.Set("Authorization", "Bearer "+id.token)
	return nil
}

// httpClient is a client with the identity of ctx.
func httpClient(ctx context.Context) *http.Client {
	tr := http.DefaultTransport.(*http.Transport).Clone()
	tr.TLSClientConfig = identityOf(ctx).tls.Clone()
	tr.DisableKeepAlives = true // one request a command
	return &http.Client{Transport: tr}
}
