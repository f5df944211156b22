// Package ocitest starts registries for tests: the real docker-registry as a
// process, and go-containerregistry's in memory, which misbehaves in ways that
// are useful (it gives a wrong artifact type and shares blobs between
// repositories). Both listen on loopback and end with the test.
package ocitest

import (
	"bufio"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// Memory starts go-containerregistry's registry and returns its host:port.
func Memory(t testing.TB, referrersAPI bool) string {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.WithReferrersSupport(referrersAPI), registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

var reListening = regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)

// Docker starts docker-registry (Debian's package of that name) over a temporary
// directory and returns its host:port. It has no referrers API. Where it is not
// installed the test is skipped, and fails under CI=true.
func Docker(t testing.TB) string {
	t.Helper()
	exe, err := exec.LookPath("docker-registry")
	if err != nil {
		Missing(t, "docker-registry is not installed: apt-get install docker-registry")
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: info}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: 127.0.0.1:0}\n", filepath.Join(dir, "data"))
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "serve", conf)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "OTEL_TRACES_EXPORTER=none"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	addr, done := make(chan string, 1), make(chan struct{})
	go func() {
		defer close(done)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			if m := reListening.FindStringSubmatch(sc.Text()); m != nil {
				select {
				case addr <- m[1]:
				default:
				}
			}
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended by itself
		<-done
		_ = cmd.Wait()
	})
	select {
	case a := <-addr:
		return a
	case <-done:
		t.Fatal("docker-registry ended before it listened")
	case <-time.After(20 * time.Second):
		t.Fatal("docker-registry does not listen after 20 s")
	}
	return ""
}

// Missing skips a test for want of a program, and fails it under CI=true.
func Missing(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// Cosign returns the path of cosign, from PATH or the project's cache. Where
// there is none the test is skipped, printing why, also under CI=true: it takes
// minutes to build.
func Cosign(t testing.TB) string {
	t.Helper()
	if exe, err := exec.LookPath("cosign"); err == nil {
		return exe
	}
	cache := os.Getenv("XDG_CACHE_HOME")
	if cache == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			t.Skip("cosign: not on PATH, and there is no home directory to look for a cached one: ", err)
		}
		cache = filepath.Join(home, ".cache")
	}
	exe := filepath.Join(cache, "autonomyops", "bin", "cosign")
	if _, err := os.Stat(exe); err != nil {
		t.Skip("cosign is not installed: neither on PATH nor at ", exe)
	}
	return exe
}
