package sandbox

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/testutil"
)

// single are the sandboxes of one layer, and of what that layer stands on.
var single = []struct {
	layer string
	on    []string
}{
	{LayerNamespaces, []string{LayerNamespaces}},
	{LayerView, []string{LayerNamespaces, LayerView}},
	{LayerUser, []string{LayerUser}},
	{LayerEgress, []string{LayerCgroup, LayerEgress}},
	{LayerLandlock, []string{LayerLandlock}},
	{LayerSeccomp, []string{LayerSeccomp}},
}

// passed reports whether an attempt's answer means that it was let through.
func (a *attempt) passed(answer string) bool {
	return answer == "OK" || slices.ContainsFunc(a.pass, func(e unix.Errno) bool { return unix.ErrnoName(e) == answer })
}

// make makes an attempt and returns the answer.
func (a *attempt) make(t *testing.T, s *Sandbox, args []string) (string, Ended) {
	t.Helper()
	e, out := run(t, s, escape(t, append([]string{a.name}, args...)...))
	return strings.TrimSpace(out), e
}

// stateDir stands for the node's state directory.
func stateDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestEscapes makes every attempt in the whole sandbox: each must be refused,
// and recorded where that can be.
func TestEscapes(t *testing.T) {
	state := stateDir(t)
	s := openWith(t, Options{Hidden: []string{state}})
	args := escapeArgs(t, state, s)
	for i := range attempts {
		a := &attempts[i]
		if slices.ContainsFunc(attempts[:i], func(b attempt) bool { return b.name == a.name }) {
			t.Fatalf("two attempts are called %s", a.name)
		}
		if a.group == "limit" {
			continue // these have tests of their own
		}
		t.Run(a.name, func(t *testing.T) {
			answer, e := a.make(t, s, args)
			if a.passed(answer) || !strings.HasPrefix(answer, "E") && !strings.HasPrefix(answer, "exit ") {
				t.Errorf("answer %q", answer)
			}
			if a.seen != (e.Refused > 0) || a.seen && len(e.Refusals) == 0 {
				t.Errorf("answer %q: %d refused, %+v", answer, e.Refused, e.Refusals)
			}
		})
	}
}

// TestEscapeLayers makes every attempt with no layer at all, where each must be
// let through or it proves nothing, and then with one layer alone, to find out
// which layers stop it. docs/sandbox.md holds the result; UPDATE=1 writes it.
func TestEscapeLayers(t *testing.T) {
	state := stateDir(t)
	args := escapeArgs(t, state, open(t))
	refused := map[string][]string{} // attempt → layers that stop it alone; anyway when none is needed
	bare := open(t, LayerNames...)
	for i := range attempts {
		if a := &attempts[i]; !a.held {
			t.Run("bare/"+a.name, func(t *testing.T) {
				answer, _ := a.make(t, bare, args)
				switch {
				case a.passed(answer):
				case slices.Contains(elsewhereRefused[a.name], answer):
					refused[a.name] = []string{anyway}
				default:
					t.Errorf("answer %q: the attempt proves nothing", answer)
				}
			})
		}
	}
	for _, l := range single {
		off := slices.DeleteFunc(slices.Clone(LayerNames), func(n string) bool { return slices.Contains(l.on, n) })
		s := openWith(t, Options{Off: off, Hidden: []string{state}})
		for i := range attempts {
			a := &attempts[i]
			if a.held && l.layer != LayerView && l.layer != LayerUser {
				continue // would exhaust this machine
			}
			if a.held && (a.name == "inodes" || a.name == "fill-disk") != (l.layer == LayerView) {
				continue
			}
			t.Run(l.layer+"/"+a.name, func(t *testing.T) {
				if answer, _ := a.make(t, s, args); !a.passed(answer) && !slices.Contains(refused[a.name], anyway) {
					refused[a.name] = append(refused[a.name], l.layer)
				}
			})
		}
	}
	checkTable(t, refused)
}

const anyway = "anyway"

// TestRootless makes every attempt in the sandbox of a process that is not root.
func TestRootless(t *testing.T) {
	state := stateDir(t)
	s := open(t)
	args := escapeArgs(t, state, s)
	exe, dir := self(t), elsewhere(t)
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, append([]string{escapeArg, "rootless", dir}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.Env, cmd.Dir = childEnv, "/"
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	on := map[string]string{}
	answers := map[string]string{}
	for line := range strings.Lines(string(out)) {
		switch kind, rest, _ := strings.Cut(strings.TrimSpace(line), " "); kind {
		case "layer":
			name, rest, _ := strings.Cut(rest, " ")
			on[name] = rest
		case "attempt":
			name, answer, _ := strings.Cut(rest, " ")
			answers[name] = answer
		}
	}
	if strings.HasPrefix(on[LayerNamespaces], "false") {
		testutil.Missing(t, "user namespaces for everybody", "set kernel.unprivileged_userns_clone, or user.max_user_namespaces")
	}
	for _, l := range LayerNames {
		t.Logf("%s: %s", l, on[l])
		want := slices.Contains([]string{LayerNamespaces, LayerView, LayerLandlock, LayerSeccomp}, l)
		if strings.HasPrefix(on[l], "true") != want {
			t.Errorf("layer %s: %s", l, on[l])
		}
	}
	for _, a := range attempts {
		answer, ok := answers[a.name]
		if a.group != "limit" && (!ok || a.passed(answer) || !strings.HasPrefix(answer, "E") && !strings.HasPrefix(answer, "exit ")) {
			t.Errorf("%s: answer %q", a.name, answer)
		}
	}
}

// elsewhereRefused are attempts that some kernels refuse to everybody, and one
// that a resource limit stops, which every process has.
var elsewhereRefused = map[string][]string{
	"descriptors":   {"EMFILE"},
	"root-of-init":  {"EACCES", "EPERM"},                // init is another container's
	"ping":          {"EACCES"},                         // net.ipv4.ping_group_range
	"mptcp":         {"ENOPROTOOPT", "EPROTONOSUPPORT"}, // not built in, or switched off
	"sctp":          {"EPROTONOSUPPORT", "ESOCKTNOSUPPORT"},
	"vsock":         {"EAFNOSUPPORT"},
	"packet":        {"EAFNOSUPPORT"},
	"kernel-crypto": {"EAFNOSUPPORT"},
	"memory":        {"ENOENT", "EPERM", "EIO", "EACCES"}, // CONFIG_DEVMEM
	"kernel-memory": {"ENOENT", "EPERM"},
	"sysrq":         {"ENOENT"},
	"module":        {"ENOSYS", "EPERM"},
	"io-uring":      {"ENOSYS", "EPERM"},
	"userfaultfd":   {"ENOSYS", "EPERM"},
	"keyring":       {"ENOSYS"},
	"swap":          {"ENOSYS"},
	"perf":          {"ENOSYS", "EACCES", "ENOENT"},
	"fanotify":      {"ENOSYS"},
	"tcp6-connect":  {"EADDRNOTAVAIL", "EAFNOSUPPORT", "ENETUNREACH"},
	"udp6-send":     {"EADDRNOTAVAIL", "EAFNOSUPPORT", "ENETUNREACH"},
	"tcp-fastopen":  {"EINPROGRESS"},
}

const (
	tableBegin = "<!-- escapes: written by go test ./assurance/sandbox -run TestEscapeLayers with UPDATE=1 -->\n"
	tableEnd   = "<!-- end of escapes -->\n"
)

// checkTable compares the table in the documentation with what was found. What
// a kernel refuses to everybody is left to the machine that wrote the table.
func checkTable(t *testing.T, refused map[string][]string) {
	t.Helper()
	var b strings.Builder
	b.WriteString(tableBegin)
	b.WriteString("\n| | attempt | " + strings.Join(layerTitles(), " | ") + " |\n|---|---|" + strings.Repeat("---|", len(single)) + "\n")
	for _, a := range attempts {
		fmt.Fprintf(&b, "| %s | %s |", a.group, a.name)
		for _, l := range single {
			mark := " "
			if slices.Contains(refused[a.name], anyway) {
				mark = "-"
			} else if slices.Contains(refused[a.name], l.layer) {
				mark = "x"
			}
			fmt.Fprintf(&b, " %s |", mark)
		}
		b.WriteString("\n")
	}
	b.WriteString("\n" + tableEnd)
	root, err := testutil.Root()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(root, "docs", "sandbox.md")
	doc, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := bytes.Cut(doc, []byte(tableBegin))
	old, after, ok2 := bytes.Cut(rest, []byte(tableEnd))
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", file)
	}
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(file, append(append(before, b.String()...), after...), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have := map[string]string{}
	for line := range strings.Lines(string(old)) {
		if f := strings.Split(line, "|"); len(f) > 3 {
			have[strings.TrimSpace(f[2])] = line
		}
	}
	for line := range strings.Lines(b.String()) {
		f := strings.Split(line, "|")
		if len(f) <= 3 {
			continue
		}
		name := strings.TrimSpace(f[2])
		if _, depends := elsewhereRefused[name]; !depends && have[name] != line {
			t.Errorf("docs/sandbox.md says\n\t%swant\n\t%srun with UPDATE=1", have[name], line)
		}
		delete(have, name)
	}
	for name := range have {
		t.Errorf("docs/sandbox.md has a line for %q, which is not tried", name)
	}
}

func layerTitles() []string {
	var out []string
	for _, l := range single {
		out = append(out, l.layer)
	}
	return out
}
