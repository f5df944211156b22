package archtest

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/rogpeppe/go-internal/txtar"
)

func TestRules(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	tree, err := load(os.DirFS(root))
	if err != nil {
		t.Fatal(err)
	}
	if len(tree.files) < 10 {
		t.Fatalf("only %d source files found under %s", len(tree.files), root)
	}
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			for _, f := range r.check(tree) {
				t.Error(f)
			}
			if t.Failed() {
				t.Logf("%s the rule: %s", r.inv, r.reason)
			}
		})
	}
}

// TestRulesCanFail runs every rule over its fixture and expects exactly the
// faults of the fixture's head.
func TestRulesCanFail(t *testing.T) {
	known := map[string]bool{}
	for _, r := range rules {
		known[r.name] = true
		t.Run(r.name, func(t *testing.T) {
			archive, want := fixture(t, r.name)
			fsys := fstest.MapFS{}
			for _, f := range archive.Files {
				fsys[f.Name] = &fstest.MapFile{Data: f.Data}
			}
			tree, err := load(fsys)
			if err != nil {
				t.Fatal(err)
			}
			check := r.check
			if r.name == "unsafe-listed" { // its list names files of the real tree
				check = unsafeListed(map[string]string{"wal/map.go": "the fixture's", "wal/gone.go": "the fixture's"})
			}
			var got []string
			for _, f := range check(tree) {
				got = append(got, f.String())
			}
			compare(t, got, want)
		})
	}
	for _, r := range linkRules {
		known[r.name] = true
		t.Run(r.name, func(t *testing.T) {
			archive, want := fixture(t, r.name)
			var got []string
			for _, f := range archive.Files {
				got = append(got, r.check(f.Name, strings.Fields(string(f.Data)))...)
			}
			compare(t, got, want)
		})
	}
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if name := strings.TrimSuffix(filepath.Base(f), ".txtar"); !known[name] {
			t.Errorf("%s belongs to no rule", f)
		}
	}
}

// fixture reads testdata/name.txtar; want are the lines of its head that are
// not comments.
func fixture(t *testing.T, name string) (archive *txtar.Archive, want []string) {
	t.Helper()
	archive, err := txtar.ParseFile(filepath.Join("testdata", name+".txtar"))
	if err != nil {
		t.Fatalf("every rule has a fixture that breaks it: %v", err)
	}
	for line := range strings.Lines(string(archive.Comment)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			want = append(want, line)
		}
	}
	if len(want) == 0 {
		t.Fatal("the fixture names no fault")
	}
	return archive, want
}

func compare(t *testing.T, got, want []string) {
	t.Helper()
	slices.Sort(got)
	slices.Sort(want)
	for _, g := range got {
		if !slices.Contains(want, g) {
			t.Errorf("found, and not in the fixture's head: %s", g)
		}
	}
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("not found: %s", w)
		}
	}
	if len(got) != len(want) && !t.Failed() {
		t.Errorf("found %d faults, want %d:\n%s", len(got), len(want), strings.Join(got, "\n"))
	}
}

// A linkRule bans packages from a program, however far down they come from.
type linkRule struct {
	name, inv, reason string
	programs          []string // nil: all
	banned            []string // import paths, and all below them
}

// check returns the banned packages among those that program links.
func (r linkRule) check(program string, linked []string) (out []string) {
	if r.programs != nil && !slices.Contains(r.programs, program) {
		return nil
	}
	for _, p := range linked {
		if p == "database/sql/driver" {
			continue // interfaces only, which uuid and time types implement
		}
		if underAny(p, r.banned) {
			out = append(out, program+" links "+p)
		}
	}
	return out
}

var (
	sqlPackages  = []string{"database/sql", "modernc.org/sqlite", "github.com/pressly/goose", "github.com/jackc/pgx", "github.com/lib/pq", "github.com/mattn/go-sqlite3"}
	opaPackages  = []string{"github.com/open-policy-agent/opa", module + "/prepared"}
	ebpfPackages = []string{"github.com/cilium/ebpf"}
)

var linkRules = []linkRule{
	{
		name: "link-no-consensus", inv: "INV-02, INV-03",
		reason: "no program joins a cluster: no consensus, gossip or CRDT library, also not by way of another",
		banned: []string{
			"github.com/hashicorp/raft", "github.com/hashicorp/memberlist", "github.com/hashicorp/serf", "github.com/hashicorp/consul",
			"go.etcd.io/raft", "go.etcd.io/etcd", "github.com/coreos/etcd", "github.com/lni/dragonboat", "github.com/shaj13/raft",
			"github.com/weaveworks/mesh", "github.com/libp2p", "github.com/ipfs", "github.com/nats-io/nats-server",
			"github.com/automerge", "github.com/ipfs/go-ds-crdt", "github.com/schollz/peerdiscovery", "github.com/buraksezer/olric",
			"k8s.io/client-go/tools/leaderelection",
		},
	},
	{
		name:     "link-node",
		reason:   "the node keeps its state in the log and in files; a database is the control plane's, and so is the web UI",
		programs: []string{"autonomy-node"},
		banned:   append(slices.Clone(sqlPackages), module+"/cp", module+"/relay"),
	},
	{
		name:     "link-cp",
		reason:   "the control plane neither evaluates policy nor loads programs into a kernel",
		programs: []string{"autonomy-cp"},
		banned:   slices.Concat(opaPackages, ebpfPackages, []string{module + "/node", module + "/relay"}),
	},
	{
		name: "link-relay", inv: "INV-10",
		reason:   "the relay is small enough to stand alone on a site: no policy, no database, no sigstore, nothing of the mission side",
		programs: []string{"autonomy-relay"},
		banned:   slices.Concat(opaPackages, sqlPackages, []string{"github.com/sigstore/sigstore-go", module + "/node", module + "/cp"}),
	},
}

// TestPrograms asks the go command what each program links. The test cache does
// not know what go list reads: run it with -count=1 (make check does).
func TestPrograms(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := filepath.Glob(filepath.Join(root, "cmd", "*"))
	if err != nil {
		t.Fatal(err)
	}
	programs := []string{}
	for _, d := range dirs {
		programs = append(programs, filepath.Base(d))
	}
	for _, r := range linkRules {
		for _, p := range r.programs {
			if !slices.Contains(programs, p) {
				t.Errorf("rule %s is about %s, which is not under cmd/", r.name, p)
			}
		}
	}
	for _, program := range programs {
		t.Run(program, func(t *testing.T) {
			t.Parallel()
			linked := links(t, root, program)
			for _, r := range linkRules {
				for _, fault := range r.check(program, linked) {
					t.Errorf("%s\nthe rule %s %s: %s\nfind the way with: go list -deps -json=ImportPath,Imports ./cmd/%s", fault, r.name, r.inv, r.reason, program)
				}
			}
		})
	}
}

// links lists the packages of a program, itself among them.
func links(t *testing.T, root, program string) []string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "list", "-deps", "-json=ImportPath", "./cmd/"+program)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=-mod=readonly")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var out []string
	for dec := json.NewDecoder(stdout); ; {
		var p struct{ ImportPath string }
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		out = append(out, p.ImportPath)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	if !slices.Contains(out, module+"/cmd/"+program) {
		t.Fatalf("go list named %d packages without %s itself", len(out), program)
	}
	return out
}

// TestInvariantsPage holds docs/invariants.md to the rules: each rule that
// guards an invariant stands in that invariant's row, and each rule that a row
// names exists.
func TestInvariantsPage(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(root, "docs", "invariants.md"))
	if err != nil {
		t.Fatal(err)
	}
	guards := map[string]string{} // the last column, by invariant
	for line := range strings.Lines(string(page)) {
		cells := strings.Split(line, "|")
		if len(cells) == 7 && strings.HasPrefix(cells[1], " INV-") {
			guards[strings.TrimSpace(cells[1])] = cells[5]
		}
	}
	if len(guards) != 19 {
		t.Errorf("the page has %d invariants, want 19", len(guards))
	}
	known := map[string]bool{}
	has := func(name, invs string) {
		known[name] = true
		if invs == "" {
			return
		}
		for _, inv := range strings.Split(invs, ", ") {
			if !strings.Contains(guards[inv], "`"+name+"`") {
				t.Errorf("the row of %s does not name its rule %s", inv, name)
			}
		}
	}
	for _, r := range rules {
		has(r.name, r.inv)
	}
	for _, r := range linkRules {
		has(r.name, r.inv)
	}
	for inv, cell := range guards {
		for i, part := range strings.Split(cell, "`") {
			if i%2 == 1 && !known[part] {
				t.Errorf("the row of %s names %s, which is no rule", inv, part)
			}
		}
	}
}
