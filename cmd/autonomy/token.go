package main

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/internal/run"
)

func newToken() *cobra.Command {
	c := &cobra.Command{
		Use:   "token",
		Short: "Make, list and revoke the bearer tokens of a node's callers",
		Long: `Make, list and revoke the bearer tokens of a node's callers.

The file is the one of autonomy-node --tokens. It holds the hash of each token,
never a token. A node reads it again within seconds of a change.`,
	}
	c.AddCommand(newTokenCreate(), newTokenList(), newTokenRevoke())
	return c
}

func tokensFlag(c *cobra.Command) *string {
	return c.Flags().String("tokens", "", "token `FILE` of the node")
}

func needTokens(file string) error {
	if file == "" {
		return run.Exitf(run.Usage, "--tokens is missing: the node's token file, as in --tokens /etc/autonomy/tokens.json")
	}
	return nil
}

func newTokenCreate() *cobra.Command {
	c := &cobra.Command{
		Use:   "create PRINCIPAL --tokens FILE",
		Short: "Make a token and print it, once",
		Long: `Make a token for PRINCIPAL and print it on standard output, once: only its hash
is kept. Give it to the caller by a file or a secret store; it is sent as
"Authorization: Bearer TOKEN".

A principal has at most two valid tokens, so that one can take over from the
other: make the second, hand it out, revoke the first.`,
		Example: `  autonomy token create build-agent --tokens /etc/autonomy/tokens.json > build-agent.token
  autonomy call tool.echo --token-file build-agent.token`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	file := tokensFlag(c)
	life := lifeFlag(auth.DefaultTokenLife)
	c.Flags().Var(&life, "expires", "the token is valid for `TIME`, such as 12h or 90d")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := needTokens(*file); err != nil {
			return err
		}
		if !auth.ValidPrincipal(args[0]) {
			return run.Exitf(run.Usage, "principal %q: want letters, digits and . _ @ / : -, at most %d", args[0], auth.MaxPrincipalBytes)
		}
		var token string
		var rec auth.TokenRecord
		err := auth.EditTokens(*file, func(f *auth.TokenFile) (err error) {
			token, rec, err = f.Create(args[0], time.Now(), time.Duration(life))
			return err
		})
		if errors.Is(err, auth.ErrTooManyLive) {
			return fmt.Errorf("%s: %w ('autonomy token list' shows them)", args[0], err)
		}
		if err != nil {
			return err
		}
		fmt.Fprintln(c.OutOrStdout(), token)
		fmt.Fprintf(c.ErrOrStderr(), "token %s of %s, valid until %s. It is not shown again.\n", rec.ID, rec.Principal, rec.ExpiresAt.Format(time.RFC3339))
		return nil
	}
	return c
}

func newTokenList() *cobra.Command {
	c := &cobra.Command{
		Use:   "list --tokens FILE",
		Short: "Show the tokens of the file: id, principal, state",
		Args:  usageArgs(cobra.NoArgs),
	}
	file, format := tokensFlag(c), outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := needTokens(*file); err != nil {
			return err
		}
		f, err := auth.LoadTokens(*file)
		if errors.Is(err, fs.ErrNotExist) {
			return run.Exit(run.NotFound, err)
		}
		if err != nil {
			return err
		}
		now := time.Now()
		type row struct {
			ID        string     `json:"id"`
			Principal string     `json:"principal"`
			State     string     `json:"state"` // valid, expired, revoked
			CreatedAt time.Time  `json:"created_at"`
			ExpiresAt time.Time  `json:"expires_at"`
			RevokedAt *time.Time `json:"revoked_at,omitempty"`
		}
		rows := make([]row, 0, len(f.Tokens))
		for _, t := range f.Tokens {
			state := "valid"
			switch {
			case t.RevokedAt != nil:
				state = "revoked"
			case !t.Live(now):
				state = "expired"
			}
			rows = append(rows, row{t.ID, t.Principal, state, t.CreatedAt, t.ExpiresAt, t.RevokedAt})
		}
		if *format == "json" {
			return printJSON(c.OutOrStdout(), rows)
		}
		cells := make([][]string, len(rows))
		for i, r := range rows {
			cells[i] = []string{r.ID, r.Principal, r.State, r.ExpiresAt.Format(time.RFC3339)}
		}
		return printTable(c.OutOrStdout(), []string{"ID", "PRINCIPAL", "STATE", "EXPIRES"}, cells)
	}
	return c
}

func newTokenRevoke() *cobra.Command {
	c := &cobra.Command{
		Use:   "revoke ID --tokens FILE",
		Short: "End a token; a node refuses it within seconds",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	file := tokensFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := needTokens(*file); err != nil {
			return err
		}
		err := auth.EditTokens(*file, func(f *auth.TokenFile) error { return f.Revoke(args[0], time.Now()) })
		if errors.Is(err, auth.ErrNoToken) {
			return run.Exitf(run.NotFound, "%w in %s", err, *file)
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(c.OutOrStdout(), "token %s is revoked\n", args[0])
		return nil
	}
	return c
}

// lifeFlag is a duration that also takes days.
type lifeFlag time.Duration

func (l *lifeFlag) Type() string { return "duration" }

func (l *lifeFlag) String() string {
	if d := time.Duration(*l); d%(24*time.Hour) == 0 {
		return strconv.FormatInt(int64(d/(24*time.Hour)), 10) + "d"
	}
	return time.Duration(*l).String()
}

func (l *lifeFlag) Set(s string) error {
	var d time.Duration
	var err error
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n int64
		n, err = strconv.ParseInt(days, 10, 32)
		d = time.Duration(n) * 24 * time.Hour
	} else {
		d, err = time.ParseDuration(s)
	}
	if err != nil || d <= 0 || d > auth.MaxTokenLife {
		return fmt.Errorf("%q: want a time such as 12h or 90d, at most %d days", s, auth.MaxTokenLife/(24*time.Hour))
	}
	*l = lifeFlag(d)
	return nil
}
