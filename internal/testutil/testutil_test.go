package testutil

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestMain makes the test binary its own child: with MODE set it behaves as the
// programs do that are started with this package.
func TestMain(m *testing.M) {
	switch os.Getenv("TESTUTIL_MODE") {
	case "":
		Main(m)
	case "serve":
		term := make(chan os.Signal, 1)
		signal.Notify(term, syscall.SIGTERM)
		fmt.Fprintln(os.Stderr, "listening on 127.0.0.1:1")
		fmt.Fprintln(os.Stderr, "listening on unix:/run/x.sock")
		fmt.Println("args", strings.Join(os.Args[1:], " "))
		if err := os.WriteFile(os.Getenv("READY"), []byte("addr=127.0.0.1:1\npid=1\n"), 0o600); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		<-term
		os.Exit(7)
	case "fail":
		fmt.Fprintln(os.Stderr, "cannot start")
		os.Exit(2)
	}
}

func child(t *testing.T, mode string, args ...string) (Command, string) {
	ready := filepath.Join(t.TempDir(), "ready")
	return Command{Path: os.Args[0], Args: args, Name: "child", Env: []string{"TESTUTIL_MODE=" + mode, "READY=" + ready}}, ready
}

func TestProcess(t *testing.T) {
	command, ready := child(t, "serve", "a", "b")
	p := command.Start(t)
	if got := p.Addr(t); got != "127.0.0.1:1" {
		t.Errorf("Addr = %q", got)
	}
	if got := p.Addrs(t, 2); len(got) != 2 || got[1] != "unix:/run/x.sock" {
		t.Errorf("Addrs = %q", got)
	}
	if got := p.WaitReady(t, ready); got != "127.0.0.1:1" {
		t.Errorf("WaitReady = %q", got)
	}
	if got := p.WaitOutput(t, p.Stdout, regexp.MustCompile(`args (.*)`), Timeout); got[1] != "a b" {
		t.Errorf("args = %q", got)
	}
	p.Kill(t)
	if code := p.Wait(t, time.Second); code != -1 {
		t.Errorf("after Kill: exit code %d, want -1", code)
	}
	p.Signal(syscall.SIGTERM) // to an ended process: nothing

	again := p.Restart(t)
	if again.PID() == p.PID() {
		t.Error("Restart gave the same process")
	}
	again.Addr(t)
	if code := again.Stop(t); code != 7 {
		t.Errorf("Stop = %d, want the child's own exit code 7", code)
	}
}

// A TB that records instead of ending the test. Fatal must end the goroutine.
type recorder struct {
	testing.TB
	mu      sync.Mutex
	message string
	skipped bool
}

func (r *recorder) Helper()        {}
func (r *recorder) Cleanup(func()) {}
func (r *recorder) Fatal(a ...any) { r.Fatalf("%s", fmt.Sprint(a...)) }
func (r *recorder) Fatalf(format string, a ...any) {
	r.mu.Lock()
	r.message = fmt.Sprintf(format, a...)
	r.mu.Unlock()
	panic(r)
}
func (r *recorder) Skipf(format string, a ...any) {
	r.skipped = true
	r.Fatalf(format, a...)
}

// fatal returns what f failed with, "" when it did not.
func fatal(t *testing.T, f func(testing.TB)) (r *recorder) {
	t.Helper()
	r = &recorder{TB: t}
	defer func() {
		if p := recover(); p != nil && p != any(r) {
			panic(p)
		}
	}()
	f(r)
	return r
}

func TestFailures(t *testing.T) {
	t.Run("ended before it listened", func(t *testing.T) {
		command, _ := child(t, "fail")
		p := command.Start(t)
		begin := time.Now()
		got := fatal(t, func(tb testing.TB) { p.Addr(tb) }).message
		if want := "child ended (exit status 2) before output like \"listening on ([^\\\\s\\\"\\\\\\\\]+)\""; got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		if time.Since(begin) > Timeout/2 {
			t.Error("it waited for a process that had ended")
		}
		if !strings.Contains(p.Stderr.String(), "cannot start") {
			t.Errorf("stderr = %q", p.Stderr)
		}
	})
	t.Run("restart while running", func(t *testing.T) {
		command, _ := child(t, "serve")
		p := command.Start(t)
		if got := fatal(t, func(tb testing.TB) { p.Restart(tb) }).message; !strings.Contains(got, "it still runs") {
			t.Errorf("got %q", got)
		}
	})
	t.Run("no such program", func(t *testing.T) {
		got := fatal(t, func(tb testing.TB) { Command{Path: filepath.Join(t.TempDir(), "absent")}.Start(tb) }).message
		if !strings.Contains(got, "start absent: ") {
			t.Errorf("got %q", got)
		}
	})
	t.Run("eventually never", func(t *testing.T) {
		got := fatal(t, func(tb testing.TB) {
			Eventually(tb, 30*time.Millisecond, "rain", func() error { return errors.New("dry") })
		}).message
		if got != "waited 30ms for rain: dry" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("build of nothing", func(t *testing.T) {
		got := fatal(t, func(tb testing.TB) { Build(tb, "no-such-program") }).message
		if !strings.Contains(got, "go build cmd/no-such-program: exit status 1") {
			t.Errorf("got %q", got)
		}
	})
	for _, ci := range []string{"", "true"} {
		t.Run("missing with CI="+ci, func(t *testing.T) {
			t.Setenv("CI", ci)
			t.Setenv("XDG_CACHE_HOME", t.TempDir())
			t.Setenv("PATH", t.TempDir())
			for _, start := range []func(testing.TB){
				func(tb testing.TB) { StartRegistry(tb) },
				func(tb testing.TB) { StartCollector(tb, "http://127.0.0.1:1/") },
			} {
				r := fatal(t, start)
				if r.skipped != (ci == "") || !strings.Contains(r.message, "run: make setup") {
					t.Errorf("skipped %v, message %q", r.skipped, r.message)
				}
			}
			if p, ok := Cosign(); ok {
				t.Errorf("Cosign = %q with an empty PATH and cache", p)
			}
		})
	}
}

func TestOutputIsBounded(t *testing.T) {
	var o Output
	line := bytes.Repeat([]byte("x"), 1023)
	line = append(line, '\n')
	for range 3 * maxOutput / len(line) {
		if _, err := o.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Fprintln(&o, "last")
	s := o.String()
	if len(s) > maxOutput || !strings.HasSuffix(s, "x\nlast\n") || len(strings.SplitN(s, "\n", 2)[0]) != 1023 {
		t.Errorf("%d bytes kept, the first line of %d", len(s), len(strings.SplitN(s, "\n", 2)[0]))
	}
}

func TestRegistry(t *testing.T) {
	r := StartRegistry(t)
	resp, err := http.Get("http://" + r.Addr + "/v2/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("/v2/ answers %s", resp.Status)
	}
}

func gunzip(t *testing.T, r *http.Request, body []byte) []byte {
	if r.Header.Get("Content-Encoding") != "gzip" {
		return body
	}
	z, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		t.Error(err)
		return nil
	}
	out, err := io.ReadAll(z)
	if err != nil {
		t.Error(err)
	}
	return out
}

// TestCollector sends a log record in OTLP/JSON and expects it in protobuf
// where logs_endpoint points, the second one after a crash of the collector.
func TestCollector(t *testing.T) {
	var mu sync.Mutex
	var got []byte
	up := false
	sink := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		if !up || err != nil || r.URL.Path != "/v1/events" {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
			return
		}
		got = append(got, gunzip(t, r, body)...)
	}))
	t.Cleanup(sink.Close)
	c := StartCollector(t, sink.URL+"/v1/events")
	send := func(text string) {
		t.Helper()
		body := fmt.Sprintf(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":%q}}]}]}]}`, text)
		resp, err := http.Post("http://"+c.HTTP+"/v1/logs", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("collector answers %s", resp.Status)
		}
	}
	send("before-the-crash")
	c.Kill(t)
	mu.Lock()
	up = true
	mu.Unlock()
	c = c.Restart(t)
	send("after-the-crash")
	Eventually(t, Timeout, "both records", func() error {
		mu.Lock()
		defer mu.Unlock()
		for _, want := range []string{"before-the-crash", "after-the-crash"} {
			if !bytes.Contains(got, []byte(want)) {
				return fmt.Errorf("%s is not among %d bytes", want, len(got))
			}
		}
		return nil
	})
	if code := c.Stop(t); code != 0 {
		t.Errorf("collector stops with %d", code)
	}
}
