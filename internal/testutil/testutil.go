// Package testutil is what the tests share that run programs as processes: to
// build them, start them, wait for them, kill them, and to put a real
// OpenTelemetry Collector and a real OCI registry beside them.
//
//	func TestMain(m *testing.M) { testutil.Main(m) }
//
//	func TestRestart(t *testing.T) {
//		node := testutil.Command{Path: testutil.Build(t, "autonomy-node"), Args: …}.Start(t)
//		addr := node.Addr(t)
//		…
//		node.Kill(t)            // SIGKILL
//		node = node.Restart(t)  // the same command again
//	}
//
// A process that a test starts ends with the test, and with the test binary
// should that be killed. What a process wrote is shown when its test fails.
// Waiting has a deadline everywhere; the deadlines are generous, because two
// cores may be running everything else at the same time.
//
// The collector and the registry come from scripts/setup-test.sh. Where one is
// missing the test is skipped with the command that gets it, and fails where CI
// is set: there, nothing may pass by being absent.
//
// Only tests, and the harnesses under bench, fuzz and faultinject, import this
// package.
package testutil

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Timeout is how long the helpers wait for something that takes milliseconds
// on an idle machine: a listener, an exit, a first record.
const Timeout = 30 * time.Second

// pollInterval is the pause between two looks.
const pollInterval = 10 * time.Millisecond

var builds struct {
	mu   sync.Mutex
	dir  string             // owned by Main, or by nobody before the first Build
	once map[string]*result // by package
}

type result struct {
	once sync.Once
	path string
	err  error
}

// Main runs the tests and removes what Build made. Call it from TestMain; it
// does not return.
func Main(m *testing.M) {
	code := m.Run()
	if builds.dir != "" {
		if err := os.RemoveAll(builds.dir); err != nil {
			fmt.Fprintln(os.Stderr, "testutil:", err)
		}
	}
	os.Exit(code)
}

// Build compiles a program of this module, once for all tests of the binary,
// and returns the path of the executable. It takes a name under cmd/
// ("autonomy-node") or a folder from the module's root ("bench/toolbench").
// The test's package needs Main, which removes the executable.
func Build(t testing.TB, program string) string {
	t.Helper()
	if !strings.Contains(program, "/") {
		program = "cmd/" + program
	}
	builds.mu.Lock()
	if builds.once == nil {
		dir, err := os.MkdirTemp("", "autonomy-test-")
		if err != nil {
			builds.mu.Unlock()
			t.Fatal(err)
		}
		builds.dir, builds.once = dir, map[string]*result{}
	}
	r := builds.once[program]
	if r == nil {
		r = &result{path: filepath.Join(builds.dir, path.Base(program))}
		builds.once[program] = r
	}
	builds.mu.Unlock()

	r.once.Do(func() {
		cmd := exec.Command("go", "build", "-buildvcs=false", "-o", r.path, "./"+program)
		cmd.Dir, r.err = Root()
		if r.err != nil {
			return
		}
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			r.err = fmt.Errorf("go build %s: %w\n%s", program, err, out)
		}
	})
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.path
}

// Root is the module's folder, above the working directory of a test.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no go.mod in the working directory or above")
		}
		dir = filepath.Dir(dir)
	}
}

// Eventually calls check until it returns nil, and fails the test with the last
// error when it has not within timeout. what completes "waiting for".
func Eventually(t testing.TB, timeout time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for %s: %v", timeout, what, err)
		}
		time.Sleep(pollInterval)
	}
}

// FreeAddr returns a loopback address that nobody listens on at this moment. It
// is for programs that cannot report the port they chose; ours can: give them
// port 0 and ask Process.Addr.
func FreeAddr(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// Missing ends a test that needs what is not here: it skips the test, or fails
// it where CI is set. get is what a reader can do about it.
func Missing(t testing.TB, what, get string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("%s is missing, and CI is set: %s", what, get)
	}
	t.Skipf("%s is missing: %s", what, get)
}

// Cached returns the path of a program that scripts/setup-test.sh puts into the
// cache outside the tree, or "" when it is not there.
func Cached(name string) string {
	dir, err := os.UserCacheDir() // $XDG_CACHE_HOME, else $HOME/.cache
	if err != nil {
		return ""
	}
	p := filepath.Join(dir, "autonomyops", "bin", name)
	if info, err := os.Stat(p); err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return ""
	}
	return p
}

// NodeModules returns the npm packages that scripts/setup-test.sh installed for
// dir, a folder from the module's root with a package-lock.json, or "" when they
// are not there.
func NodeModules(dir string) string {
	root, err := Root()
	if err != nil {
		return ""
	}
	lock, err := os.ReadFile(filepath.Join(root, dir, "package-lock.json"))
	if err != nil {
		return ""
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(lock)
	modules := filepath.Join(cache, "autonomyops", "bin", "npm-"+hex.EncodeToString(sum[:8]), "node_modules")
	if _, err := os.Stat(modules); err != nil {
		return ""
	}
	return modules
}

// find looks in the cache, then on the PATH.
func find(cached, command string) string {
	if p := Cached(cached); p != "" {
		return p
	}
	p, err := exec.LookPath(command)
	if err != nil {
		return ""
	}
	return p
}
