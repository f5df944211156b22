package archtest

import (
	"fmt"
	"go/ast"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
)

// A rule is one thing that must hold of the tree. check returns every place
// where it does not.
type rule struct {
	name   string // of its fixture, too
	inv    string // the invariant it guards, if one
	reason string
	check  func(*tree) []fault
}

var rules = []rule{
	{
		name:   "import-map",
		reason: "imports run one way, so that a part can be read, tested and replaced without the others",
		check:  importMap(packages),
	},
	{
		name: "relay-decoupled", inv: "INV-10",
		reason: "the relay knows digests, never missions: a site's content must flow while the mission side is down or hostile",
		check:  noImport([]string{"relay", "cmd/autonomy-relay"}, module+"/node", module+"/cp", module+"/prepared"),
	},
	{
		name: "one-evaluator", inv: "INV-19",
		reason: "two places that evaluate policy will one day disagree; the CLI evaluates offline only",
		check:  onlyUnder([]string{"node", "cmd/autonomy", "prepared", "bench", "fuzz", "faultinject"}, module+"/prepared"),
	},
	{
		name: "executors-behind-call", inv: "INV-14",
		reason: "node/call writes the decision record before it executes; who calls an executor elsewhere has effects without a record",
		check:  executors,
	},
	{
		name: "poll-only", inv: "INV-18",
		reason: "nodes poll: a control plane that cannot dial cannot be made to reach into a site (the database driver is excepted)",
		check:  both(noImport([]string{"cp", "cmd/autonomy-cp"}, dialImports...), noSymbols([]string{"cp", "cmd/autonomy-cp"}, []string{"cp/store/postgres"}, dialSymbols)),
	},
	{
		name: "deterministic", inv: "INV-11",
		reason: "the same input must give the same choice, digest, verdict and decision, now and at replay",
		check:  noImport([]string{"relay", "fingerprint", "verify", "prepared"}, "math/rand"),
	},
	{
		name: "no-shared-state", inv: "INV-01",
		reason: "what a node or relay keeps lies under its own root: shared memory would be a second, hidden state",
		check:  both(noSymbols([]string{"node", "relay", "wal"}, nil, map[string]string{"golang.org/x/sys/unix": `^SysvShm|^MemfdCreate$`}), noLiteral([]string{"node", "relay", "wal"}, "/dev/"+"shm")),
	},
	{
		name: "no-convergence", inv: "INV-02",
		reason: "nodes and relays take what is published and verified; they never negotiate state with each other",
		check:  noWords([]string{"node", "relay"}, "gossip", "crdt", "crdts", "lamport", "vector clock", "anti entropy"),
	},
	{
		name: "no-leader", inv: "INV-03",
		reason: "no node or relay leads others: a site must work when it is the only one left",
		check:  noWords([]string{"node", "relay"}, "leader", "follower", "quorum", "raft", "election", "elect"),
	},
	{
		name:   "unsafe-listed",
		reason: "memory safety is argued file by file: a new file with unsafe or mmap goes on the list with its argument",
		check:  unsafeListed(unsafeFiles),
	},
	{
		name:   "opa-in-prepared",
		reason: "the evaluator must be replaceable without touching its callers, and autonomy-cp must not link it",
		check:  onlyUnder([]string{"prepared"}, "github.com/open-policy-agent/opa"),
	},
	{
		name:   "sigstore-in-verify",
		reason: "one package decides what a signature is worth; the relay verifies without linking sigstore",
		check:  onlyUnder([]string{"verify/sigstore"}, "github.com/sigstore/sigstore-go"),
	},
	{
		name:   "sql-in-store",
		reason: "SQL stays behind the store's interface and its one contract suite",
		check:  onlyUnder([]string{"cp/store"}, "database/sql", "modernc.org/sqlite", "github.com/pressly/goose", "github.com/jackc/pgx", "github.com/lib/pq"),
	},
	{
		name:   "ebpf-in-assurance",
		reason: "probing the kernel and loading programs into it are privileged; one package does it",
		check:  onlyUnder([]string{"assurance"}, "github.com/cilium/ebpf"),
	},
	{
		name:   "otel-in-trace",
		reason: "the OpenTelemetry SDK has queues, globals and environment variables of its own; one package tames them",
		check:  onlyUnder([]string{"node/trace"}, "go.opentelemetry.io/otel"),
	},
	{
		name:   "mcp-in-its-place",
		reason: "the protocol is spoken at two edges, and what the node decides must not depend on it; the CLI, the relay and the control plane do not link it for themselves",
		check:  onlyUnder([]string{"node/mcp", "node/tool/mcptool", "internal/testutil/mcpserver", "internal/e2e"}, "github.com/modelcontextprotocol/go-sdk"),
	},
	{
		name:   "fuse-in-faultinject",
		reason: "a file system served from a program is a disk to break, never one to keep state on",
		check:  onlyUnder([]string{"faultinject"}, "github.com/hanwen/go-fuse"),
	},
	{
		name:   "test-code-in-tests",
		reason: "helpers that kill processes and keep modules alive do not belong in a program",
		check:  onlyUnder([]string{"internal/testutil", "internal/archtest", "internal/e2e", "internal/oci/ocitest", "verify/verifytest", "cp/store/storetest", "bench", "fuzz", "faultinject"}, "testing", module+"/internal/testutil", module+"/internal/testutil/mcpserver", module+"/internal/archtest", module+"/internal/oci/ocitest", module+"/verify/verifytest", module+"/cp/store/storetest"),
	},
	{
		name:   "words",
		reason: "the tree says nothing about the machine it was written on, promises nothing and postpones nothing",
		check:  prohibitedWords,
	},
}

// unsafeFiles may import unsafe or map files into memory, each for its reason.
var unsafeFiles = map[string]string{
	"assurance/confine/confine.go":       "the probe hands structures to Landlock and seccomp in calls that x/sys/unix does not wrap",
	"assurance/sandbox/fork.go":          "a child that shares memory until it becomes the program, by the runtime's hooks for forking",
	"assurance/sandbox/landlock.go":      "structures of Landlock",
	"assurance/sandbox/script.go":        "the calls that a child makes are built beforehand, with pointers to what they need",
	"assurance/sandbox/seccomp.go":       "the filter's structure",
	"assurance/sandbox/seccomp_calls.go": "names mmap and mremap among the calls that a program may make; uses neither",
	"assurance/sandbox/steps.go":         "structures of capabilities and resource limits",
	"assurance/sandbox/view.go":          "structure of openat2",
	"prepared/irvm/value.go":             "a policy's values are 24 bytes each and refer to texts in the input: one pointer that the collector knows, told apart by the kind beside it",
	"wal/mmap.go":                        "the log's segments are mapped: recovery and readers see the bytes that the kernel has, and an append is a copy",
}

// dialImports and dialSymbols are the ways out of a process.
var dialImports = []string{
	"net/http/httputil", "net/rpc", "net/smtp",
	"github.com/google/go-containerregistry/pkg/v1/remote", "github.com/google/go-containerregistry/pkg/crane",
	module + "/internal/oci",
}

var dialSymbols = map[string]string{ // package → its symbols
	"net":                          `^Dial|^Dialer$`,
	"crypto/tls":                   `^Dial|^Dialer$|^Client$`,
	"net/http":                     `^(Get|Head|Post|PostForm|Client|DefaultClient|Transport|DefaultTransport|RoundTripper|NewRequest|NewRequestWithContext)$`,
	"google.golang.org/grpc":       `^Dial|^NewClient$`,
	"github.com/valyala/fasthttp":  `^Dial|Client$|^(Get|Post|Do)`,
	"golang.org/x/sys/unix":        `^Connect$`,
	"syscall":                      `^Connect$`,
	"github.com/coder/websocket":   `^Dial`,
	"github.com/gorilla/websocket": `^Dial|^DefaultDialer$`,
	"golang.org/x/net/websocket":   `^Dial`,
	"golang.org/x/net/proxy":       `.`,
}

// A pkg is a row of the import map: what the packages under dir may import of
// this module. The row with the longest dir that holds a package is its row.
type pkg struct {
	dir string
	may []string // folders; "X" is X alone, "X/..." is X and what lies in it
}

const anyInternal = "internal/..." // vocabulary and plumbing, which import nothing of the parts

// packages is the map that ARCHITECTURE.md draws. A package without a row is a
// fault: a new part is given its place here first.
var packages = []pkg{
	{"cmd/autonomy-node", []string{"node", anyInternal}},
	{"cmd/autonomy-cp", []string{"cp", anyInternal}},
	{"cmd/autonomy-relay", []string{"relay", anyInternal}},
	// The operator's program links everything: demo runs the daemons in one
	// process, the rest reads bundles, locks and logs offline.
	{"cmd/autonomy", []string{"node", "node/tool", "cp", "relay", "prepared", "wal", "verify/...", "fingerprint", "assurance/...", "examples", anyInternal}},
	{"examples", nil}, // files to embed

	{"node", []string{"node/...", "prepared", "wal", "verify/...", "fingerprint", "assurance/...", anyInternal}},
	{"node/call", []string{"prepared", "wal", "node/tool", "node/tool/executor", anyInternal}},
	{"node/httpapi", []string{"node/call", "node/tool", anyInternal}},
	{"node/mcp", []string{"node/call", "node/tool", anyInternal}},
	{"node/tool", []string{"node/tool/...", "assurance/sandbox", anyInternal}},
	{"node/tool/executor", []string{anyInternal}},
	{"node/tool/echotool", []string{"node/tool/executor", anyInternal}},
	{"node/tool/exectool", []string{"node/tool/executor", "assurance/sandbox", anyInternal}},
	{"node/tool/fstool", []string{"node/tool/executor", anyInternal}},
	{"node/tool/httptool", []string{"node/tool/executor", anyInternal}},
	{"node/tool/mcptool", []string{"node/tool/executor", "node/tool/httptool", anyInternal}},
	{"node/release", []string{"verify/...", "fingerprint", "prepared", anyInternal}},
	{"node/export", []string{"wal", anyInternal}},
	{"node/trace", []string{"node/call", anyInternal}},

	{"cp", []string{"cp/...", "verify", anyInternal}},
	{"cp/api", []string{"cp/store", "cp/rollout", "cp/web", "verify", anyInternal}},
	{"cp/store", []string{"cp/store", anyInternal}},
	{"cp/rollout", []string{anyInternal}},
	{"cp/web", []string{"cp/store", anyInternal}},

	{"relay", []string{"relay/...", "verify", "assurance", "assurance/disk", anyInternal}},
	{"relay/serve", []string{"relay/cache", "relay/oci", "relay/upstream", "relay/prestage", anyInternal}},
	{"relay/oci", []string{anyInternal}},
	{"relay/cache", []string{"relay/oci", "assurance/disk", anyInternal}},
	{"relay/upstream", []string{"relay/cache", "relay/oci", anyInternal}},
	{"relay/prestage", []string{"relay/cache", "relay/oci", "relay/upstream", "verify", anyInternal}},

	{"wal", []string{"wal/...", "internal/vfs"}},
	{"prepared", []string{"prepared/...", anyInternal}},
	{"prepared/irvm", []string{"internal/strictjson"}},
	{"verify", []string{"verify", "fingerprint", anyInternal}},
	{"fingerprint", []string{anyInternal}},
	{"assurance", []string{"assurance/...", anyInternal}},
	{"internal", []string{anyInternal}},

	// These look at everything from outside and are imported by nothing.
	{"bench", []string{"..."}},
	{"fuzz", []string{"..."}},
	{"faultinject", []string{"..."}},
}

func importMap(rows []pkg) func(*tree) []fault {
	return func(t *tree) (out []fault) {
		for _, f := range t.files {
			row := -1
			for i, r := range rows {
				if under(f.dir, r.dir) && (row < 0 || len(r.dir) > len(rows[row].dir)) {
					row = i
				}
			}
			if row < 0 {
				out = append(out, fault{f.path, 0, fmt.Sprintf("package %s has no row in the import map", f.dir)})
				continue
			}
			for _, i := range f.imports {
				dir, ok := i.internal()
				if !ok || slices.ContainsFunc(rows[row].may, func(may string) bool { return matches(dir, may) }) {
					continue
				}
				out = append(out, fault{f.path, i.line, fmt.Sprintf("%s imports %s; it may import %s", f.dir, dir, strings.Join(rows[row].may, ", "))})
			}
		}
		return out
	}
}

func matches(dir, pattern string) bool {
	if pattern == "..." {
		return true
	}
	if prefix, ok := strings.CutSuffix(pattern, "/..."); ok {
		return under(dir, prefix)
	}
	return dir == pattern
}

// noImport forbids, under dirs, packages and all below them.
func noImport(dirs []string, banned ...string) func(*tree) []fault {
	return func(t *tree) (out []fault) {
		for _, f := range t.files {
			if !underAny(f.path, dirs) {
				continue
			}
			for _, i := range f.imports {
				if underAny(i.path, banned) {
					out = append(out, fault{f.path, i.line, "imports " + i.path})
				}
			}
		}
		return out
	}
}

// onlyUnder allows packages, and all below them, to those under dirs.
func onlyUnder(dirs []string, pkgs ...string) func(*tree) []fault {
	return func(t *tree) (out []fault) {
		for _, f := range t.files {
			if underAny(f.path, dirs) {
				continue
			}
			for _, i := range f.imports {
				// Code of one's own folder is not an import from outside.
				if own, ok := i.internal(); ok && under(f.dir, own) {
					continue
				}
				if underAny(i.path, pkgs) {
					out = append(out, fault{f.path, i.line, fmt.Sprintf("imports %s; only %s may", i.path, strings.Join(dirs, ", "))})
				}
			}
		}
		return out
	}
}

// noSymbols forbids symbols of packages, under dirs without except. An import
// without a name to look for (a dot import) of such a package is a fault, too.
func noSymbols(dirs, except []string, symbols map[string]string) func(*tree) []fault {
	banned := map[string]*regexp.Regexp{}
	for p, expr := range symbols {
		banned[p] = regexp.MustCompile(expr)
	}
	return func(t *tree) (out []fault) {
		for _, f := range t.files {
			if !underAny(f.path, dirs) || underAny(f.path, except) {
				continue
			}
			names := map[string]imported{}
			for _, i := range f.imports {
				if banned[i.path] == nil {
					continue
				}
				if i.name == "." {
					out = append(out, fault{f.path, i.line, "imports " + i.path + " without a name"})
				}
				names[i.name] = i
			}
			ast.Inspect(f.ast, func(n ast.Node) bool {
				sel, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				if id, ok := sel.X.(*ast.Ident); ok {
					if i, ok := names[id.Name]; ok && banned[i.path].MatchString(sel.Sel.Name) {
						out = append(out, fault{f.path, t.fset.Position(sel.Pos()).Line, "uses " + i.path + "." + sel.Sel.Name})
					}
				}
				return true
			})
		}
		return out
	}
}

// noLiteral forbids a text in string literals under dirs.
func noLiteral(dirs []string, text string) func(*tree) []fault {
	return func(t *tree) (out []fault) {
		for _, f := range t.files {
			if !underAny(f.path, dirs) {
				continue
			}
			ast.Inspect(f.ast, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && strings.Contains(lit.Value, text) {
					out = append(out, fault{f.path, t.fset.Position(lit.Pos()).Line, "names " + text})
				}
				return true
			})
		}
		return out
	}
}

// noWords forbids identifiers that hold one of the words, in a row, under dirs.
func noWords(dirs []string, banned ...string) func(*tree) []fault {
	return func(t *tree) (out []fault) {
		for _, f := range t.files {
			if !underAny(f.path, dirs) {
				continue
			}
			ast.Inspect(f.ast, func(n ast.Node) bool {
				id, ok := n.(*ast.Ident)
				if !ok {
					return true
				}
				have := " " + strings.Join(words(id.Name), " ") + " "
				for _, b := range banned {
					if strings.Contains(have, " "+b+" ") || strings.Contains(have, " "+strings.ReplaceAll(b, " ", "")+" ") {
						out = append(out, fault{f.path, t.fset.Position(id.Pos()).Line, "identifier " + id.Name})
						break
					}
				}
				return true
			})
		}
		return out
	}
}

// executors finds calls and method values of Execute in packages that can hold
// a registry: those that import something of the node. node/call may, and
// node/tool is what is behind it. A symbol of package call itself (call.Execute,
// a mode of call.Do) is none of them.
func executors(t *tree) (out []fault) {
	const node = module + "/node"
	holds := map[string]bool{} // by folder
	for _, f := range t.files {
		for _, i := range f.imports {
			if under(i.path, node) {
				holds[f.dir] = true
			}
		}
	}
	for _, f := range t.files {
		if !holds[f.dir] || under(f.dir, "node/call") || f.dir == "node/tool" {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok && sel.Sel.Name == "Execute" && !f.names(sel.X, node+"/call") {
				out = append(out, fault{f.path, t.fset.Position(sel.Sel.Pos()).Line, "uses Execute outside node/call"})
			}
			return true
		})
	}
	return out
}

// names reports whether x is the name under which f imports a package.
func (f *file) names(x ast.Expr, importPath string) bool {
	id, ok := x.(*ast.Ident)
	return ok && slices.ContainsFunc(f.imports, func(i imported) bool { return i.path == importPath && i.name == id.Name })
}

// unsafeListed compares the files that use unsafe or mmap with the list, both
// ways: an entry that is no longer needed must go.
func unsafeListed(listed map[string]string) func(*tree) []fault {
	mmap := regexp.MustCompile(`^(Mmap|MmapPtr|Mremap|SYS_MMAP)$`)
	return func(t *tree) (out []fault) {
		used := map[string]bool{}
		for _, f := range t.files {
			for _, i := range f.imports {
				if i.path == "unsafe" || path.Base(i.path) == "mmap" {
					used[f.path] = true
					if listed[f.path] == "" {
						out = append(out, fault{f.path, i.line, "imports " + i.path + " and is not on the list"})
					}
				}
			}
			ast.Inspect(f.ast, func(n ast.Node) bool {
				if sel, ok := n.(*ast.SelectorExpr); ok && mmap.MatchString(sel.Sel.Name) {
					used[f.path] = true
					if listed[f.path] == "" {
						out = append(out, fault{f.path, t.fset.Position(sel.Pos()).Line, "uses " + sel.Sel.Name + " and is not on the list"})
					}
				}
				return true
			})
		}
		for _, p := range slices.Sorted(maps.Keys(listed)) {
			if !used[p] {
				out = append(out, fault{p, 0, "is on the list and uses neither unsafe nor mmap"})
			}
		}
		return out
	}
}

// prohibited is what no text file of the tree may hold. The expressions are
// written so that they do not match themselves.
var prohibited = []struct {
	expr  *regexp.Regexp
	what  string
	tests bool // holds in tests and their data, too
}{
	{regexp.MustCompile(`(^|[^\w.$})-])/(r[o]ot|h[o]me/[a-z]\w*|w[o]rk|Use[r]s/[A-Za-z]\w*)(/|\b)`), "a path of somebody's machine", true},
	{regexp.MustCompile(`\b(TO[D]O|FIX[M]E|XX[X])\b`), "a postponed task: do it, or open an issue", true},
	{regexp.MustCompile(`(?i)\b(seam[l]ess(ly)?|rob[u]st(ly|ness)?|blaz[i]ng(ly)?|world-cl[a]ss|cutting-e[d]ge|enterprise-gr[a]de|battle-t[e]sted)\b`), "praise instead of a fact", true},
	{regexp.MustCompile(`[\x{1F300}-\x{1FAFF}\x{2705}\x{274C}\x{2728}]`), "an emoji", false},
}

func prohibitedWords(t *tree) (out []fault) {
	for _, p := range slices.Sorted(maps.Keys(t.text)) {
		for n, line := range strings.Split(string(t.text[p]), "\n") {
			for _, w := range prohibited {
				if !w.tests && (strings.HasSuffix(p, "_test.go") || ignored(p)) {
					continue // hostile input has every character
				}
				if m := w.expr.FindString(line); m != "" {
					out = append(out, fault{p, n + 1, fmt.Sprintf("%q: %s", m, w.what)})
				}
			}
		}
	}
	return out
}

func both(a, b func(*tree) []fault) func(*tree) []fault {
	return func(t *tree) []fault { return append(a(t), b(t)...) }
}
