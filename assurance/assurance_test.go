package assurance

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/assurance/cgroup"

	"github.com/autonomyops/autonomy/internal/testutil"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func check(t *testing.T, r Report, name string) Check {
	t.Helper()
	i := slices.IndexFunc(r.Checks, func(c Check) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("no check %s in %+v", name, r.Checks)
	}
	return r.Checks[i]
}

// leftovers lists what a probe could leave behind.
func leftovers(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	globs := []string{filepath.Join(dir, ".probe-*"), filepath.Join(os.TempDir(), ".probe-landlock-*"), filepath.Join(os.TempDir(), "autonomy-cgroup2-*")}
	if parents, err := cgroup.Parents(); err == nil {
		for _, p := range parents {
			globs = append(globs, filepath.Join(p, "autonomy-probe-*"))
		}
	}
	for _, g := range globs {
		found, err := filepath.Glob(g)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, found...)
	}
	return out
}

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	r := Probe(t.Context(), Options{StateDir: dir})
	best := r.Took // other programs run on this machine: one warm probe within the budget shows that it can be kept
	for range 5 {
		r = Probe(t.Context(), Options{StateDir: dir})
		best = min(best, r.Took)
	}
	if best > Budget {
		t.Errorf("the fastest of 6 probes took %s, want at most %s", best, Budget)
	}
	for _, c := range r.Checks {
		t.Logf("%-20s %-9s %8s  %s", c.Name, c.Result, c.Took.Round(100_000), c.Detail)
		if c.Name == "" || c.Tried == "" || c.Why == "" || c.Detail == "" || rank(c.Result) == 0 {
			t.Errorf("incomplete check: %+v", c)
		}
		if (c.Result == OK) != (c.Fix == "") {
			t.Errorf("%s is %s and its fix is %q", c.Name, c.Result, c.Fix)
		}
	}
	t.Logf("level %s, %s", r.Level, r.Took)
	for _, row := range Table {
		check(t, r, row.Check)
	}
	if r.Level != LevelOf(r.Checks) || r.Kernel == "" || r.Time.IsZero() {
		t.Errorf("report %+v", r)
	}
	if check(t, r, "state_dir").Result != OK || check(t, r, "seccomp").Result != OK {
		t.Errorf("a temporary directory is refused, or seccomp is")
	}
	if left := leftovers(t, dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var again Report
	if err := json.Unmarshal(b, &again); err != nil || again.Level != r.Level || len(again.Checks) != len(r.Checks) {
		t.Errorf("the report does not survive JSON: %v", err)
	}
}

// TestProbeAsRoot holds this machine to what root can always have where cgroup
// v2 exists: an eBPF refusal seen from inside.
func TestProbeAsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		testutil.Missing(t, "root, to make cgroups", "run as root")
	}
	r := Probe(t.Context(), Options{})
	for _, name := range []string{"cgroup_v2", "ebpf_connect", "landlock", "seccomp"} {
		if c := check(t, r, name); c.Result != OK {
			t.Errorf("%s: %s %s", name, c.Result, c.Detail)
		}
	}
}

func TestProbeEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	r := Probe(ctx, Options{StateDir: dir})
	if check(t, r, "fsync").Result != Failed {
		t.Errorf("fsync was timed after the end: %+v", check(t, r, "fsync"))
	}
	if left := leftovers(t, dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestStateDir(t *testing.T) {
	base := t.TempDir()
	mk := func(parts ...string) string {
		p := filepath.Join(append([]string{base}, parts...)...)
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		return p
	}
	link := func(target, name string) string {
		p := filepath.Join(base, name)
		if err := os.Symlink(target, p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	outside := t.TempDir()
	mk("good", "wal")
	mk("bad")
	link(outside, "bad/wal")
	for name, tc := range map[string]struct {
		dir  string
		want CheckResult
		text string
	}{
		"plain":           {mk("good"), OK, ""},
		"does not exist":  {filepath.Join(base, "none"), Failed, "no such file"},
		"symlink outside": {link(outside, "away"), Failed, "symbolic link"},
		"entry outside":   {filepath.Join(base, "bad"), Failed, "symbolic link"},
	} {
		t.Run(name, func(t *testing.T) {
			c := probeStateDir(tc.dir)[0]
			if c.Result != tc.want || !strings.Contains(c.Detail, tc.text) {
				t.Errorf("%s %q, want %s with %q", c.Result, c.Detail, tc.want, tc.text)
			}
			err := Report{Level: None, Checks: []Check{c}}.Meets(None)
			if (err == nil) != (tc.want == OK) || err != nil && !errors.Is(err, ErrStateDir) {
				t.Errorf("Meets(none): %v", err)
			}
		})
	}
}

func TestSyncOnTmpfsIsDegraded(t *testing.T) {
	const shm = "/dev/shm"
	if out, err := exec.Command("stat", "-f", "-c", "%T", shm).Output(); err != nil || strings.TrimSpace(string(out)) != "tmpfs" {
		testutil.Missing(t, "a tmpfs at /dev/shm", "mount one")
	}
	dir, err := os.MkdirTemp(shm, "assurance-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if c := probeSync(t.Context(), dir)[0]; c.Result != Degraded || !strings.Contains(c.Detail, "gone with the power") {
		t.Errorf("%s %s", c.Result, c.Detail)
	}
}

func TestLevels(t *testing.T) {
	all := func(except ...Check) []Check {
		var out []Check
		for _, row := range Table {
			c := Check{Name: row.Check, Result: OK, Detail: "fine"}
			for _, e := range except {
				if e.Name == row.Check {
					c = e
				}
			}
			if c.Result != "" {
				out = append(out, c)
			}
		}
		return out
	}
	for name, tc := range map[string]struct {
		checks []Check
		want   Level
	}{
		"everything":          {all(), Full},
		"nothing":             {nil, None},
		"no cgroup":           {all(Check{Name: "cgroup_v2", Result: Failed}), Reduced},
		"no controllers":      {all(Check{Name: "cgroup_controllers", Result: Failed}), Reduced},
		"some controllers":    {all(Check{Name: "cgroup_controllers", Result: Degraded}), Reduced},
		"no namespaces":       {all(Check{Name: "namespaces", Result: Failed}), Reduced},
		"no eBPF":             {all(Check{Name: "ebpf_connect", Result: Failed}), Reduced},
		"old Landlock":        {all(Check{Name: "landlock", Result: Degraded}), Reduced},
		"no Landlock":         {all(Check{Name: "landlock", Result: Failed}), None},
		"no seccomp":          {all(Check{Name: "seccomp", Result: Failed}), None},
		"memory for a disk":   {all(Check{Name: "fsync", Result: Degraded}), Reduced},
		"fsync fails":         {all(Check{Name: "fsync", Result: Failed}), None},
		"remote state":        {all(Check{Name: "state_dir", Result: Failed}), None},
		"clock not in step":   {all(Check{Name: "clock", Result: Degraded}), Full},
		"clock in 1970":       {all(Check{Name: "clock", Result: Failed}), None},
		"a check is missing":  {all(Check{Name: "seccomp"}), None},
		"an unknown result":   {all(Check{Name: "seccomp", Result: "fine"}), None},
		"ordinary user":       {all(Check{Name: "privileges", Result: Degraded}), Full},
		"privileges unknown":  {all(Check{Name: "privileges", Result: Failed}), Reduced},
		"an additional check": {append(all(), Check{Name: "other", Result: Failed}), Full},
	} {
		t.Run(name, func(t *testing.T) {
			if got := LevelOf(tc.checks); got != tc.want {
				t.Errorf("level %s, want %s", got, tc.want)
			}
		})
	}
}

func TestMeets(t *testing.T) {
	r := Report{Level: Reduced, Checks: []Check{
		{Name: "ebpf_connect", Result: Failed, Detail: "bpf is refused", Fix: "Let it through."}, {Name: "seccomp", Result: OK},
	}}
	for _, min := range []Level{None, Reduced} {
		if err := r.Meets(min); err != nil {
			t.Errorf("Meets(%s): %v", min, err)
		}
	}
	err := r.Meets(Full)
	if !errors.Is(err, ErrBelowMinimum) || !strings.Contains(err.Error(), "ebpf_connect: bpf is refused. Let it through.") || strings.Contains(err.Error(), "seccomp") {
		t.Errorf("Meets(full): %v", err)
	}
	if err := r.Meets("best"); err == nil {
		t.Error("an unknown minimum is met")
	}
	if err := (Report{Level: "better"}).Meets(None); err == nil {
		t.Error("an unknown level meets a minimum")
	}
	if _, err := ParseLevel("best"); err == nil {
		t.Error("an unknown level is read")
	}
}
