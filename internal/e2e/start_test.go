package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/testutil"
)

// TestRefusesToStart: what cannot work is said at once, with the exit code of
// the contract, and nothing is left listening.
func TestRefusesToStart(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	elsewhere := t.TempDir()
	if err := os.Symlink(elsewhere, filepath.Join(dir, "linked")); err != nil {
		t.Fatal(err)
	}
	small := []string{"--wal-max-bytes=4MiB", "--wal-segment-bytes=1MiB", "--keep-free=0", "--listen=127.0.0.1:0"}
	state := func(name string) string { return "--state-dir=" + filepath.Join(dir, name) }
	for _, tc := range []struct {
		name, program string
		args          []string
		code          int
		want          string
	}{
		{"unknown flag", "autonomy-node", []string{"--colour"}, run.Usage, "unknown flag: --colour"},
		{"unknown setting", "autonomy-node", []string{"--config", write("n.yaml", "listen: 127.0.0.1:0\nwal_max_byte: 1GiB\n")}, run.Usage, `n.yaml:2: unknown setting "wal_max_byte": did you mean "wal_max_bytes"?`},
		{"several faults at once", "autonomy-node", []string{"--durability=maybe", "--node-id=a b", "--poll-interval=0s"}, run.Usage, "--node-id"},
		{"node beyond loopback", "autonomy-node", []string{"--listen=0.0.0.0:7777", state("a")}, run.Usage, "give --tls-cert and --tls-key"},
		{"node beyond loopback, callers unknown", "autonomy-node", []string{"--listen=0.0.0.0:7777", "--tls-cert=c", "--tls-key=k", state("a")}, run.Usage, "give --tokens or --tls-client-ca"},
		{"tokens that cannot be read", "autonomy-node", append([]string{"--tokens", write("t.json", `{"schema":"autonomy.tokens/v0"}x`), state("a")}, small...), run.Usage, "t.json"},
		{"callers with a slip", "autonomy-node", append([]string{"--callers", write("callers.yaml", "principal: {}\n"), state("a")}, small...), run.Usage, "callers.yaml"},
		{"damaged record secret", "autonomy-node", append([]string{state("s")}, small...), run.Integrity, "record secret"},
		{"damaged budgets", "autonomy-node", append([]string{state("budget")}, small...), run.Integrity, "budget"},
		{"releases without trust", "autonomy-node", []string{"--cp-url=http://127.0.0.1:1", state("a")}, run.Usage, "--cp-url needs --trust"},
		{"trust that is no keyring", "autonomy-node", append([]string{"--cp-url=http://127.0.0.1:1", "--trust", write("k.json", `{"schema":"x"}`), state("b")}, small...), run.Usage, "k.json"},
		{"no such policy", "autonomy-node", append([]string{"--policy=/nonexistent.tar.gz", state("c")}, small...), run.Usage, "no such file"},
		{"policy that is no bundle", "autonomy-node", append([]string{"--policy", write("p.tar.gz", "junk"), state("c")}, small...), run.Usage, "p.tar.gz"},
		{"tools with a slip", "autonomy-node", append([]string{"--tools", write("t.yaml", "tools:\n  tool.ecko: {}\n"), state("c")}, small...), run.Usage, "t.yaml:2"},
		{"endpoint of no scheme", "autonomy-node", append([]string{"--otlp-endpoint=collector:4317", state("c")}, small...), run.Usage, "want grpc://HOST:PORT"},
		{"damaged identity", "autonomy-node", append([]string{state("d")}, small...), run.Integrity, "identity"},
		{"damaged node key", "autonomy-node", append([]string{state("k")}, small...), run.Integrity, "node key"},
		{"state directory that leads away", "autonomy-node", append([]string{state("linked")}, small...), run.Assurance, "state"},
		{"log too small", "autonomy-node", []string{"--wal-max-bytes=1MiB", "--wal-segment-bytes=1MiB", state("e")}, run.Usage, "at least three segments"},
		{"control plane beyond loopback", "autonomy-cp", []string{"--listen=0.0.0.0:8888", state("f")}, run.Usage, "loopback"},
		{"PostgreSQL", "autonomy-cp", []string{"--store=postgres://x/y", state("f")}, run.Usage, "PostgreSQL"},
		{"relay beyond loopback", "autonomy-relay", []string{"--listen=0.0.0.0:5080", "--upstream=http://127.0.0.1:1", state("g")}, run.Usage, "give --tls-cert, --tls-key and --tls-client-ca"},
		{"relay without upstream", "autonomy-relay", []string{"--listen=127.0.0.1:0", state("g")}, run.Usage, "upstream"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			switch tc.name {
			case "damaged identity":
				write("d/identity/node.json", `{"node_id":"../x"}`)
			case "damaged record secret":
				write("s/identity/digest.key", "abc\n")
			case "damaged budgets":
				write("budget/budget.json", `{"day":"tomorrow"}`)
			case "damaged node key":
				write("k/identity/node.key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
			}
			p := testutil.Command{Path: testutil.Build(t, tc.program), Args: tc.args}.Start(t)
			if code := p.Wait(t, timeout); code != tc.code || !strings.Contains(p.Stderr.String(), tc.want) {
				t.Errorf("exit code %d, want %d with %q:\n%s", code, tc.code, tc.want, p.Stderr)
			}
			if strings.Contains(p.Stderr.String(), "listening on") {
				t.Error("it was listening before it refused")
			}
		})
	}
	if left, err := os.ReadDir(elsewhere); err != nil || len(left) != 0 {
		t.Errorf("a refused start left %v outside its state directory (%v)", left, err)
	}
}

// TestAssuranceMin: a node that demands more than the platform gives ends with 7.
func TestAssuranceMin(t *testing.T) {
	autonomy := testutil.Build(t, "autonomy")
	f := &fleet{t: t, dir: t.TempDir(), autonomy: autonomy}
	var report struct{ Level string }
	if err := json.Unmarshal([]byte(f.cli("doctor", "--state-dir", f.dir, "-o", "json")), &report); err != nil {
		t.Fatal(err)
	}
	p := testutil.Command{Path: testutil.Build(t, "autonomy-node"), Args: []string{"--listen=127.0.0.1:0", "--state-dir", f.path("s"), "--assurance-min=full",
		"--wal-max-bytes=4MiB", "--wal-segment-bytes=1MiB", "--keep-free=0"}}.Start(t)
	if report.Level == "full" {
		p.Addr(t) // it starts: this platform gives all
		return
	}
	if code := p.Wait(t, timeout); code != run.Assurance || !strings.Contains(p.Stderr.String(), "autonomy doctor") {
		t.Errorf("at level %s: exit code %d:\n%s", report.Level, code, p.Stderr)
	}
}

// TestOneAtATime: a second node on one state directory names the first; a stop
// in the middle of the start is a stop; readiness is announced where asked.
func TestOneAtATime(t *testing.T) {
	dir := t.TempDir()
	args := []string{"--listen=127.0.0.1:0", "--state-dir", filepath.Join(dir, "s"), "--ready-file", filepath.Join(dir, "ready"),
		"--wal-max-bytes=4MiB", "--wal-segment-bytes=1MiB", "--keep-free=0"}
	command := testutil.Command{Path: testutil.Build(t, "autonomy-node"), Args: args}
	first := command.Start(t)
	addr := first.WaitReady(t, filepath.Join(dir, "ready"))
	if addr == "" {
		t.Error("the ready file names no address")
	}
	second := command.Start(t)
	if code := second.Wait(t, timeout); code != run.Failure || !strings.Contains(second.Stderr.String(), fmt.Sprint(first.PID())) {
		t.Errorf("the second ended with %d:\n%s\nwant the first's pid %d", code, second.Stderr, first.PID())
	}
	if code := first.Stop(t); code != run.OK {
		t.Errorf("the first ended with %d", code)
	}
	early := testutil.Command{Path: command.Path, Args: []string{"--listen=127.0.0.1:0", "--state-dir", filepath.Join(dir, "big"), "--wal-max-bytes=1GiB", "--keep-free=0"}}.Start(t)
	time.Sleep(200 * time.Millisecond)
	if code := early.Stop(t); code != run.OK {
		t.Errorf("stopped while it started, it ended with %d:\n%s", code, early.Stderr)
	}
}
