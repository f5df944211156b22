package relay_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/assurance/disk"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/relay"
	"github.com/autonomyops/autonomy/relay/prestage"
)

// proxy stands before a registry; hook may answer in its place, by returning true.
func proxy(t *testing.T, upstream string, hook func(http.ResponseWriter, *http.Request) bool) *httptest.Server {
	t.Helper()
	target := must(url.Parse(upstream))
	tr := &http.Transport{DisableKeepAlives: true}
	rp := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }, Transport: tr,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !hook(w, r) {
			rp.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(srv.Close)
	return srv
}

// TestClosureIsPublishedAtOnce holds the last blob back: until it is there, no
// part of the closure is served, though most of it is held.
func TestClosureIsPublishedAtOnce(t *testing.T) {
	reg := memory(t)
	img := image(t, 8, 1000)
	d := push(t, reg.URL, "a", img)
	layers := must(img.Layers())
	last := must(layers[1].Digest()).String()
	release := make(chan struct{})
	reached := make(chan struct{})
	var once sync.Once
	up := proxy(t, reg.URL, func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, last) {
			once.Do(func() { close(reached) })
			<-release
		}
		return false
	})
	in := start(t, config(t.TempDir(), up.URL))
	in.submit(list("l", 1, item("a", d, 0)))
	<-reached
	for _, p := range []string{"manifests/" + d.String(), "blobs/" + must(layers[0].Digest()).String()} {
		if code, _, body := in.do("GET", "/v2/a/"+p, nil, nil); code != 404 || !strings.Contains(string(body), "not staged yet") {
			t.Errorf("%s half way: %d %s", p, code, body)
		}
	}
	if rep := in.report("l"); rep.State != prestage.Staging || rep.MissingBytes != 100 || rep.Items[0].Served {
		t.Errorf("half way: %+v", rep)
	}
	close(release)
	in.await("l", prestage.Staged)
	if code, _, _ := in.do("GET", "/v2/a/manifests/"+d.String(), nil, nil); code != 200 {
		t.Errorf("after: %d", code)
	}
}

// TestNewerListRemoves: a newer list takes content away, and only then may it be
// evicted; a repeated list changes nothing.
func TestNewerListRemoves(t *testing.T) {
	reg := memory(t)
	a, b, c := image(t, 9, 40<<10), image(t, 10, 40<<10), image(t, 11, 80<<10)
	da, db, dc := push(t, reg.URL, "r", a), push(t, reg.URL, "r", b), push(t, reg.URL, "r", c)
	cfg := config(t.TempDir(), reg.URL)
	cfg.MaxBytes = 256 << 10
	cfg.MaxAttempts = 1
	in := start(t, cfg)
	in.submit(list("l", 1, item("r", da, 0), item("r", db, 1)))
	in.await("l", prestage.Staged)
	before := tree(t, cfg.StateDir)
	in.submit(list("l", 1, item("r", da, 0), item("r", db, 1)))
	if after := tree(t, cfg.StateDir); before != after {
		t.Errorf("a repeated list changed the state")
	}
	// c does not fit beside declared a and b: it is refused with the numbers,
	// nothing is evicted, and nothing of c is kept in its way.
	in.submit(list("m", 1, item("r", dc, 0)))
	rep := in.await("m", prestage.Failed)
	if !strings.Contains(rep.Items[0].Error, "max-bytes 262144") || rep.Items[0].Attempts != 1 {
		t.Errorf("ceiling: %+v", rep)
	}
	for _, d := range []string{da.String(), db.String()} {
		if code, _, _ := in.do("GET", "/v2/r/manifests/"+d, nil, nil); code != 200 {
			t.Errorf("%s: %d", d, code)
		}
	}
	// b is taken away: not served any more; c, asked for again, takes its room.
	in.submit(list("l", 2, item("r", da, 0)))
	if code, _, _ := in.do("GET", "/v2/r/manifests/"+db.String(), nil, nil); code != 404 {
		t.Errorf("removed content is served: %d", code)
	}
	in.submit(list("m", 2, item("r", dc, 0)))
	in.await("m", prestage.Staged)
	in.await("l", prestage.Staged)
	if code, _, _ := in.do("GET", "/v2/r/manifests/"+da.String(), nil, nil); code != 200 {
		t.Errorf("declared content was evicted: %d", code)
	}
	if n, err := disk.Allocated(cfg.StateDir); err != nil || n > 256<<10 {
		t.Errorf("%d bytes on disk (%v)", n, err)
	}
}

// TestAttempts: counted on disk, ended at the limit, not reset by a restart, and
// taken up again by a list with a higher sequence.
func TestAttempts(t *testing.T) {
	reg := memory(t)
	d := push(t, reg.URL, "a", image(t, 12, 100))
	var broken atomic.Bool
	broken.Store(true)
	var asked atomic.Int64
	up := proxy(t, reg.URL, func(w http.ResponseWriter, r *http.Request) bool {
		asked.Add(1)
		if broken.Load() {
			w.WriteHeader(http.StatusBadGateway)
		}
		return broken.Load()
	})
	cfg := config(t.TempDir(), up.URL)
	cfg.MaxAttempts = 2
	in := start(t, cfg)
	in.submit(list("l", 1, item("a", d, 0)))
	rep := in.await("l", prestage.Failed)
	if rep.Items[0].Attempts != 2 || asked.Load() != 2 || !strings.Contains(rep.Items[0].Error, "502") {
		t.Errorf("%d requests, %+v", asked.Load(), rep)
	}
	if err := in.stop(); err != nil {
		t.Fatal(err)
	}
	broken.Store(false)
	in = start(t, cfg)
	in.submit(list("l", 1, item("a", d, 0))) // the same list is no new order
	time.Sleep(50 * time.Millisecond)
	if rep := in.report("l"); rep.State != prestage.Failed || rep.Items[0].Attempts != 2 || asked.Load() != 2 {
		t.Errorf("after restart: %d requests, %+v", asked.Load(), rep)
	}
	in.submit(list("l", 2, item("a", d, 0)))
	if rep := in.await("l", prestage.Staged); rep.Items[0].Attempts != 1 {
		t.Errorf("asked for anew: %+v", rep)
	}
}

// TestDeterminism runs one script of lists and faults twice: the same requests
// in the same order, the same bytes in the state directory.
func TestDeterminism(t *testing.T) {
	script := func() (trace, store string) {
		reg := memory(t)
		var mu sync.Mutex
		var b strings.Builder
		seen := map[string]int{}
		up := proxy(t, reg.URL, func(w http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			fmt.Fprintln(&b, r.Method, r.URL.Path, r.Header.Get("Range"))
			seen[r.URL.Path]++
			// Every third path fails the first time it is asked for.
			if len(seen)%3 == 0 && seen[r.URL.Path] == 1 {
				w.WriteHeader(http.StatusServiceUnavailable)
				return true
			}
			return false
		})
		var items []prestage.Item
		for i := range 6 {
			img := image(t, byte(20+i), 20<<10)
			items = append(items, item(fmt.Sprintf("r%d", i%2), push(t, reg.URL, fmt.Sprintf("r%d", i%2), img), i/3))
			push(t, reg.URL, fmt.Sprintf("r%d", i%2), artifact(t, img, lockType))
		}
		cfg := config(t.TempDir(), up.URL)
		cfg.MaxBytes = 256 << 10 // not all fit
		cfg.MaxAttempts = 3
		in := start(t, cfg)
		in.submit(list("one", 1, items...))
		wait := func(id string) {
			testutil.Eventually(t, 20*time.Second, id+" is done", func() error {
				if rep := in.report(id); rep.State == prestage.Staging {
					return fmt.Errorf("%+v", rep)
				}
				return nil
			})
		}
		wait("one")
		in.submit(list("one", 2, items[4:]...))
		wait("one")
		if err := in.stop(); err != nil {
			t.Fatal(err)
		}
		return b.String(), strings.ReplaceAll(tree(t, cfg.StateDir), up.URL, "UPSTREAM")
	}
	t1, s1 := script()
	t2, s2 := script()
	if t1 != t2 {
		t.Errorf("trace differs:\n%s\nthen\n%s", t1, t2)
	}
	if s1 != s2 {
		t.Errorf("store differs:\n%s\nthen\n%s", s1, s2)
	}
	if !strings.Contains(t1, "/blobs/") || strings.Count(s1, "/blobs/") < 6 {
		t.Errorf("the script did too little:\n%s%s", t1, s1)
	}
}

// TestKillWhileStaging kills the program in the middle of a blob, and starts it
// again: no space is lost, the attempt is counted, the work is finished.
func TestKillWhileStaging(t *testing.T) {
	reg := memory(t)
	img := image(t, 13, 4<<20)
	d := push(t, reg.URL, "a", img)
	big := must(must(img.Layers())[0].Digest()).String()
	half := make(chan struct{})
	var once sync.Once
	up := proxy(t, reg.URL, func(w http.ResponseWriter, r *http.Request) bool {
		stop := false
		if strings.HasSuffix(r.URL.Path, big) {
			once.Do(func() {
				stop = true
				w.Header().Set("Content-Length", fmt.Sprint(4<<20))
				w.Write(content(13, 4<<20)[:1<<20])
				http.NewResponseController(w).Flush()
				close(half)
				<-r.Context().Done()
			})
		}
		return stop
	})
	dir := t.TempDir()
	state, ready := filepath.Join(dir, "state"), filepath.Join(dir, "ready")
	cmd := testutil.Command{Path: testutil.Build(t, "autonomy-relay"), Args: []string{"--listen", "127.0.0.1:0", "--state-dir", state,
		"--upstream", up.URL, "--max-bytes", "16MiB", "--keep-free", "0B", "--min-inodes", "0", "--allow-unsigned-prestage", "--ready-file", ready}}
	p := cmd.Start(t)
	in := &instance{t: t, url: "http://" + p.WaitReady(t, ready)}
	in.submit(list("l", 1, item("a", d, 0)))
	<-half
	testutil.Eventually(t, 10*time.Second, "the blob's file is there", func() error {
		entries, err := os.ReadDir(filepath.Join(state, "tmp"))
		if err != nil || len(entries) != 1 {
			return fmt.Errorf("%v %v", entries, err)
		}
		return nil
	})
	p.Signal(syscall.SIGKILL)
	p.Wait(t, 10*time.Second)
	if err := os.Remove(ready); err != nil {
		t.Fatal(err)
	}
	p = cmd.Start(t)
	in.url = "http://" + p.WaitReady(t, ready)
	if rep := in.await("l", prestage.Staged); rep.Items[0].Attempts != 2 {
		t.Errorf("attempts: %+v", rep)
	}
	if entries, err := os.ReadDir(filepath.Join(state, "tmp")); err != nil || len(entries) > 0 {
		t.Errorf("orphans: %v %v", entries, err)
	}
	if code := p.Stop(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestRefusesToStart: the faults of a start, their exit codes and words.
func TestRefusesToStart(t *testing.T) {
	base := t.TempDir()
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"sub/blobs", "damaged/prestage", "other/items", "other/prestage"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for p, data := range map[string]string{"damaged/prestage/l.json": "{", "other/prestage/l.json": `{"schema":"x"}`} {
		if err := os.WriteFile(filepath.Join(base, p), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(base, "sub/blobs/sha256")); err != nil {
		t.Fatal(err)
	}
	in := start(t, config(filepath.Join(base, "taken"), "http://127.0.0.1:1"))
	for _, tt := range []struct {
		name   string
		change func(*relay.Config)
		code   int
		want   string
	}{
		{"symbolic link", func(c *relay.Config) { c.StateDir = filepath.Join(base, "link") }, run.Assurance, "symbolic link"},
		{"linked blobs", func(c *relay.Config) { c.StateDir = filepath.Join(base, "sub") }, run.Assurance, "symbolic link"},
		{"second instance", func(c *relay.Config) { c.StateDir = in.cfg.StateDir }, run.Failure, "in use by another relay"},
		{"damaged list", func(c *relay.Config) { c.StateDir = filepath.Join(base, "damaged") }, run.Integrity, "l.json"},
		{"other file", func(c *relay.Config) { c.StateDir = filepath.Join(base, "other") }, run.Integrity, "l.json"},
		{"plain http beyond loopback", func(c *relay.Config) { c.Upstream = "http://192.0.2.1" }, run.Usage, "--upstream"},
		{"no upstream", func(c *relay.Config) { c.Upstream = "" }, run.Usage, "--upstream is needed"},
		{"open listener", func(c *relay.Config) { c.Listen = []string{"0.0.0.0:0"}; c.AllowUnsigned = false }, run.Usage, "--tls-cert"},
		{"unsigned beyond loopback", func(c *relay.Config) { c.Listen = []string{"0.0.0.0:0"}; c.TLSCert, c.TLSKey = "x", "y" }, run.Usage, "--allow-unsigned-prestage"},
		{"trust and unsigned", func(c *relay.Config) { c.Trust = "k" }, run.Usage, "exclude each other"},
		{"half of TLS", func(c *relay.Config) { c.TLSKey = "k" }, run.Usage, "go together"},
		{"no such certificate", func(c *relay.Config) { c.TLSCert, c.TLSKey = "none", "none" }, run.Usage, "--tls-cert"},
		{"tiny ceiling", func(c *relay.Config) { c.MaxBytes = 1 }, run.Usage, "--max-bytes"},
		{"no attempts", func(c *relay.Config) { c.MaxAttempts = 0 }, run.Usage, "--max-attempts"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := config(filepath.Join(t.TempDir(), "state"), "http://127.0.0.1:1")
			tt.change(&cfg)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			err := relay.Run(ctx, cfg, slog.New(slog.DiscardHandler), io.Discard)
			if run.Code(err) != tt.code || !strings.Contains(fmt.Sprint(err), tt.want) {
				t.Errorf("exit code %d, error %v; want %d, %q", run.Code(err), err, tt.code, tt.want)
			}
		})
	}
}
