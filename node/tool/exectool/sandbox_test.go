package exectool

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/assurance/sandbox"
	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

// TestSandboxed runs tools in a whole sandbox: what the tool may do, narrowed by
// what policy allows.
func TestSandboxed(t *testing.T) {
	if os.Geteuid() != 0 {
		testutil.Missing(t, "root, for the sandbox", "run as root")
	}
	box, err := sandbox.Open(t.Context(), sandbox.Options{RunDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := box.Close(); err != nil {
			t.Error(err)
		}
	})
	data := t.TempDir()
	for _, d := range []string{"in", "out"} {
		if err := os.Mkdir(filepath.Join(data, d), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(data, d), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(data, d, "file"), []byte(d), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	secret := filepath.Join(data, "key")
	if err := os.WriteFile(secret, []byte("hunter2"), 0o600); err != nil {
		t.Fatal(err)
	}
	tool := func(script string, more func(*Config)) *Tool {
		cfg := Config{Argv: []string{"/bin/sh", "-c", strings.NewReplacer("{", "{{", "}", "}}", "DATA", data).Replace(script)}, Sandbox: box,
			FS: []string{"ro:" + data + "/in", "rw:" + data + "/out"}}
		if more != nil {
			more(&cfg)
		}
		return build(t, cfg)
	}
	const files = "cat DATA/in/file 2>/dev/null; cat DATA/out/file 2>/dev/null; mktemp DATA/out/XXXXXX >/dev/null 2>&1 && echo wrote; true"
	for name, tc := range map[string]struct {
		tool *Tool
		c    constraint.Constraints
		want string
	}{
		"the tool's files":       {tool(files, nil), constraint.Constraints{}, "inoutwrote\n"},
		"policy: none":           {tool(files, nil), constraint.Constraints{FS: []string{}}, ""},
		"policy: one, read-only": {tool(files, nil), constraint.Constraints{FS: []string{"ro:" + data + "/out"}}, "out"},
		"policy: more":           {tool(files, nil), constraint.Constraints{FS: []string{"rw:" + data}}, "inoutwrote\n"},
		"a secret":               {tool(`cat "$KEY"; env | grep -c hunter; true`, func(c *Config) { c.Secrets = map[string]string{"KEY": secret} }), constraint.Constraints{}, "hunter20\n"},
		"a secret, not named":    {tool(`echo "[$KEY]"`, func(c *Config) { c.Secrets = map[string]string{"KEY": secret} }), constraint.Constraints{Env: []string{"OTHER"}}, "[]\n"},
		"pids":                   {tool("for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done 2>/dev/null; echo all", nil), constraint.Constraints{PidsMax: 5}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, out := execute(t, tc.tool, "{}", tc.c)
			if out.Stdout != tc.want {
				t.Errorf("%q, want %q; stderr %q", out.Stdout, tc.want, out.Stderr)
			}
		})
	}

	// A refused attempt is in the record; the tool's own list is narrowed.
	reach := func(c constraint.Constraints) report {
		r, _ := execute(t, tool("exec 3<>/dev/tcp/127.0.0.1/9", func(c *Config) { c.Argv[0], c.Egress = "/bin/bash", []string{"127.0.0.0/8:9", "127.0.0.1:10"} }), "{}", c)
		var rep report
		if err := json.Unmarshal(r.Confinement, &rep); err != nil {
			t.Fatalf("%s: %v", r.Confinement, err)
		}
		return rep
	}
	if r := reach(constraint.Constraints{}); r.Refused != 0 || r.CPU <= 0 {
		t.Errorf("the tool's egress: %+v", r)
	}
	for _, egress := range [][]string{{}, {"127.0.0.1:10"}, {"127.0.0.2:9", "10.0.0.0/8:9"}} {
		if r := reach(constraint.Constraints{Egress: egress}); r.Refused != 1 || len(r.Refusals) != 1 || r.Refusals[0].Dest != "127.0.0.1:9" || r.Refusals[0].Comm != "bash" {
			t.Errorf("policy %q: %+v", egress, r)
		}
	}

	// What a policy says and nobody can read, and what is not to be had.
	for name, c := range map[string]constraint.Constraints{
		"egress": {Egress: []string{"nonsense"}}, "fs": {FS: []string{"/proc"}}, "mode": {FS: []string{"wx:/a"}}, "pids_max": {PidsMax: -1}, "cpu_max": {CPUMax: "all"},
	} {
		if r, _ := execute(t, tool("true", nil), "{}", c); r.Outcome != executor.Denied || r.Code != CodeConstraint {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if err := os.Remove(secret); err != nil {
		t.Fatal(err)
	}
	if r, _ := execute(t, tool("true", func(c *Config) { c.Secrets = map[string]string{"KEY": secret} }), "{}", constraint.Constraints{}); r.Outcome != executor.Denied {
		t.Errorf("a secret that is missing: %+v", r)
	}

	// A process that leaves its group and session is ended all the same.
	start := time.Now()
	r, _ := execute(t, tool("setsid sleep 100 & setsid sh -c 'sleep 100' & exit 0", nil), "{}", constraint.Constraints{})
	if r.Outcome != executor.OK || strings.Contains(string(r.Confinement), `"left"`) || time.Since(start) > 5*time.Second {
		t.Errorf("%+v after %s", r, time.Since(start))
	}
}

func TestConfinementFaults(t *testing.T) {
	for want, cfg := range map[string]Config{
		"fs: ":         {FS: []string{"ro:relative"}},
		"egress: ":     {Egress: []string{"no-port"}},
		"cpu_max":      {Limits: sandbox.Limits{CPU: "1"}},
		"no such user": {User: "no-such-user-here"},
		"no name":      {Secrets: map[string]string{"A B": "/f"}},
		"set by env":   {Secrets: map[string]string{"A": "/f"}, Env: []string{"A=1"}},
		"positive":     {Limits: sandbox.Limits{Memory: -1}},
	} {
		cfg.Argv = []string{"/bin/true"}
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
