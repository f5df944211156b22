package conf_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/autonomyops/autonomy/internal/conf"
)

type config struct {
	listen []string
	max    conf.Size
	every  time.Duration
	store  string
	labels map[string]string
}

func load(t *testing.T, file string, env map[string]string, args ...string) (config, string, error) {
	t.Helper()
	c := config{max: 1 << 30}
	fs := pflag.NewFlagSet("x", pflag.ContinueOnError)
	fs.StringArrayVar(&c.listen, "listen", []string{"127.0.0.1:7777"}, "")
	fs.Var(&c.max, "wal-max-bytes", "")
	fs.DurationVar(&c.every, "poll-interval", time.Second, "")
	fs.StringVar(&c.store, "store", "", "")
	fs.StringToStringVar(&c.labels, "label", nil, "")
	if file != "" {
		path := filepath.Join(t.TempDir(), "x.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config", path)
	}
	var out bytes.Buffer
	_, err := conf.Load(fs, args, "X_", func(k string) string { return env[k] }, &out)
	return c, out.String(), err
}

func TestPrecedence(t *testing.T) {
	c, _, err := load(t, "listen: [a:1, b:2]\nwal_max_bytes: 2MiB\npoll_interval: 3s\nlabel: {zone: a, rack: r1}\n",
		map[string]string{"X_WAL_MAX_BYTES": "4MiB", "X_POLL_INTERVAL": "5s"}, "--poll-interval=7s")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(c.listen, " ") != "a:1 b:2" || c.max != 4<<20 || c.every != 7*time.Second || c.labels["zone"] != "a" {
		t.Errorf("%+v", c)
	}
}

func TestFaults(t *testing.T) {
	for name, tc := range map[string]struct {
		file string
		args []string
		want string
	}{
		"unknown key, near":    {file: "listen: a:1\nwal_max_byte: 1GiB\n", want: `x.yaml:2: unknown setting "wal_max_byte": did you mean "wal_max_bytes"?`},
		"unknown key, far":     {file: "colour: red\n", want: `unknown setting "colour": --help lists the known ones`},
		"twice":                {file: "store: a\nstore: b\n", want: `x.yaml:2: "store" is set a second time, first in line 1`},
		"bad size":             {file: "wal_max_bytes: lots\n", want: `x.yaml:1: wal_max_bytes: invalid argument "lots"`},
		"not a mapping":        {file: "- a\n", want: "want a mapping of settings"},
		"nested":               {file: "listen: [[a]]\n", want: "want a list of plain values"},
		"not YAML":             {file: "a: b: c\n", want: "mapping values are not allowed"},
		"no such file":         {args: []string{"--config", "/nonexistent/x.yaml"}, want: "no such file"},
		"positional":           {args: []string{"serve"}, want: `unexpected argument "serve"`},
		"several at once, 1":   {file: "colour: red\nshape: round\n", want: `"colour"`},
		"several at once, 2":   {file: "colour: red\nshape: round\n", want: `"shape"`},
		"oversized":            {file: strings.Repeat("#", 1<<20+1), want: "over 1048576 bytes"},
		"negative size":        {args: []string{"--wal-max-bytes=-1"}, want: "want a number with"},
		"size beyond an int64": {args: []string{"--wal-max-bytes=99999999TiB"}, want: "want a number with"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := load(t, tc.file, nil, tc.args...)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}

func TestPrint(t *testing.T) {
	_, out, err := load(t, "poll_interval: 3s\n", nil, "--print-config", "--store=postgres://u:secret@h/db")
	if !errors.Is(err, conf.ErrPrinted) {
		t.Fatal(err)
	}
	if strings.Contains(out, "secret") {
		t.Errorf("a password is shown:\n%s", out)
	}
	for _, want := range []string{"poll_interval: 3s", "# file ", "x.yaml:1", "wal_max_bytes: 1GiB", "# default", "# flag"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	again, _, err := load(t, out, nil)
	if err != nil || again.every != 3*time.Second {
		t.Errorf("what was printed is not read back: %v\n%s", err, out)
	}
}
