package relay_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/relay"
	"github.com/autonomyops/autonomy/relay/oci"
	"github.com/autonomyops/autonomy/relay/prestage"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// instance is a relay running in this process.
type instance struct {
	t    *testing.T
	url  string
	cfg  relay.Config
	stop func() error
}

// lines sends each "listening on ADDR" to a channel.
type lines struct{ addr chan string }

func (l lines) Write(p []byte) (int, error) {
	if a, ok := strings.CutPrefix(string(p), "listening on "); ok {
		l.addr <- strings.TrimSpace(a)
	}
	return len(p), nil
}

func config(dir, upstream string) relay.Config {
	cfg := relay.Defaults()
	cfg.Listen = []string{"127.0.0.1:0"}
	cfg.StateDir = dir
	cfg.Upstream = upstream
	cfg.MaxBytes = 64 << 20
	cfg.KeepFree = 0
	cfg.MinInodes = 0
	cfg.AllowUnsigned = true
	cfg.Shutdown = 5 * time.Second
	cfg.RetryPause = 10 * time.Millisecond
	return cfg
}

func start(t *testing.T, cfg relay.Config) *instance {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	out := lines{make(chan string, 4)}
	done := make(chan error, 1)
	go func() { done <- relay.Run(ctx, cfg, slog.New(slog.DiscardHandler), out) }()
	in := &instance{t: t, cfg: cfg}
	select {
	case a := <-out.addr:
		in.url = "http://" + a
	case err := <-done:
		cancel()
		t.Fatalf("relay did not start: %v", err)
	}
	stopped := false
	in.stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			t.Fatal("relay did not stop")
			return nil
		}
	}
	t.Cleanup(func() {
		if err := in.stop(); err != nil {
			t.Errorf("relay: %v", err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	return in
}

// do sends a request and returns status, header and body.
func (in *instance) do(method, path string, header http.Header, body []byte) (int, http.Header, []byte) {
	in.t.Helper()
	req, err := http.NewRequestWithContext(in.t.Context(), method, in.url+path, bytes.NewReader(body))
	if err != nil {
		in.t.Fatal(err)
	}
	maps.Copy(req.Header, header)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		in.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		in.t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, data
}

var jsonType = http.Header{"Content-Type": {"application/json"}}

func (in *instance) submit(l *prestage.List) {
	in.t.Helper()
	data, err := l.Marshal()
	if err != nil {
		in.t.Fatal(err)
	}
	if code, _, body := in.do("POST", "/v1/prestage", jsonType, data); code != http.StatusAccepted && code != http.StatusOK {
		in.t.Fatalf("submit: %d %s", code, body)
	}
}

func (in *instance) report(id string) prestage.Report {
	in.t.Helper()
	code, _, body := in.do("GET", "/v1/prestage/"+id, nil, nil)
	var rep prestage.Report
	if err := json.Unmarshal(body, &rep); code != 200 || err != nil {
		in.t.Fatalf("report %s: %d %s (%v)", id, code, body, err)
	}
	return rep
}

// await polls until the list is in the state.
func (in *instance) await(id, state string) prestage.Report {
	in.t.Helper()
	var rep prestage.Report
	testutil.Eventually(in.t, 15*time.Second, "list "+id+" is "+state, func() error {
		if rep = in.report(id); rep.State != state {
			return fmt.Errorf("%+v", rep)
		}
		return nil
	})
	return rep
}

func list(id string, seq uint64, items ...prestage.Item) *prestage.List {
	if items == nil {
		items = []prestage.Item{}
	}
	return &prestage.List{Schema: prestage.ListSchema, ID: id, Sequence: seq, Items: items}
}

func item(repo string, h v1.Hash, priority int) prestage.Item {
	return prestage.Item{Repository: repo, Digest: oci.Digest(h.String()), Priority: priority}
}

func ok[T any](t *testing.T, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// memory is go-containerregistry's registry in this process.
func memory(t *testing.T) *httptest.Server {
	srv := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(slog.NewLogLogger(slog.DiscardHandler, 0))))
	t.Cleanup(srv.Close)
	return srv
}

// content makes bytes that do not compress and are the same every time.
func content(seed byte, n int) []byte {
	out := make([]byte, 0, n+32)
	sum := []byte{seed}
	for len(out) < n {
		h := oci.DigestOf(sum).Hex()
		sum = []byte(h)
		out = append(out, h...)
	}
	return out[:n]
}

func image(t *testing.T, seed byte, size int) v1.Image {
	t.Helper()
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	return ok(t, must(mutate.AppendLayers(img,
		static.NewLayer(content(seed, size), types.OCILayer),
		static.NewLayer(content(seed+100, 100), types.OCILayer))), nil)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// artifact refers to a subject.
func artifact(t *testing.T, subject v1.Image, typ string) v1.Image {
	t.Helper()
	desc := v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: ok(t, must(subject.Digest()), nil), Size: must(subject.Size())}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.MediaType(typ))
	img = must(mutate.AppendLayers(img, static.NewLayer([]byte("lock of "+desc.Digest.String()), "application/octet-stream")))
	img = mutate.Annotations(img, map[string]string{"for": "test"}).(v1.Image)
	return mutate.Subject(img, desc).(v1.Image) // last: mutate.Annotations would drop it
}

func push(t *testing.T, host, repo string, img v1.Image) v1.Hash {
	t.Helper()
	d := must(img.Digest())
	ref := ok(t, must(name.NewDigest(strings.TrimPrefix(host, "http://")+"/"+repo+"@"+d.String(), name.Insecure)), nil)
	if err := remote.Write(ref, img, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	return d
}

const lockType = "application/vnd.autonomyops.lock.v0+json"

// TestPullThroughRelay stages an index of two images, one with a referrer, from
// each kind of registry, and pulls it back by a stock client, first with the
// upstream there, then after a restart with the upstream gone.
func TestPullThroughRelay(t *testing.T) {
	for _, up := range []string{"go-containerregistry", "docker-registry"} {
		t.Run(up, func(t *testing.T) {
			defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
			var url string
			var kill func()
			if up == "docker-registry" {
				reg := testutil.StartRegistry(t)
				url, kill = "http://"+reg.Addr, func() { reg.Process.Kill(t) }
			} else {
				srv := memory(t)
				url, kill = srv.URL, srv.Close
			}
			a, b := image(t, 1, 300<<10), image(t, 2, 4096)
			push(t, url, "team/agent", a)
			ref := push(t, url, "team/agent", artifact(t, a, lockType))
			idx := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), mutate.IndexAddendum{Add: a}, mutate.IndexAddendum{Add: b})
			idxDigest := must(idx.Digest())
			dst := must(name.NewDigest(strings.TrimPrefix(url, "http://")+"/team/agent@"+idxDigest.String(), name.Insecure))
			if err := remote.WriteIndex(dst, idx, remote.WithContext(t.Context())); err != nil {
				t.Fatal(err)
			}

			in := start(t, config(t.TempDir(), url))
			if code, _, body := in.do("GET", "/v2/team/agent/manifests/"+idxDigest.String(), nil, nil); code != 404 || !strings.Contains(string(body), "NAME_UNKNOWN") {
				t.Fatalf("before the list: %d %s", code, body)
			}
			in.submit(list("edge", 1, item("team/agent", idxDigest, 0)))
			rep := in.await("edge", prestage.Staged)
			if rep.MissingBytes != 0 || rep.TotalBytes < 300<<10 || rep.Items[0].Attempts != 1 {
				t.Errorf("report %+v", rep)
			}

			pull := func() {
				t.Helper()
				src := must(name.NewDigest(strings.TrimPrefix(in.url, "http://")+"/team/agent@"+idxDigest.String(), name.Insecure))
				tr := http.DefaultTransport.(*http.Transport).Clone()
				defer tr.CloseIdleConnections()
				got := ok(t, must(remote.Index(src, remote.WithTransport(tr))), nil)
				for _, want := range []v1.Image{a, b} {
					img := ok(t, must(got.Image(must(want.Digest()))), nil)
					layers := must(img.Layers())
					for i, l := range must(want.Layers()) {
						rc := ok(t, must(layers[i].Compressed()), nil)
						have, err := io.ReadAll(rc)
						rc.Close()
						orig := must(io.ReadAll(must(l.Compressed())))
						if err != nil || !bytes.Equal(have, orig) {
							t.Errorf("layer %d differs (%v)", i, err)
						}
					}
				}
				refs := ok(t, must(remote.Referrers(src.Context().Digest(must(a.Digest()).String()), remote.WithTransport(tr), remote.WithFilter("artifactType", lockType))), nil)
				m := must(refs.IndexManifest())
				if len(m.Manifests) != 1 || m.Manifests[0].Digest != ref || m.Manifests[0].ArtifactType != lockType || m.Manifests[0].Annotations["for"] != "test" {
					t.Errorf("referrers: %+v", m.Manifests)
				}
			}
			pull()
			if err := in.stop(); err != nil {
				t.Fatal(err)
			}
			kill()
			in = start(t, in.cfg)
			pull()
			if rep := in.report("edge"); rep.State != prestage.Staged {
				t.Errorf("after restart, upstream gone: %+v", rep)
			}
			in.stop()
			http.DefaultClient.CloseIdleConnections()
			http.DefaultTransport.(*http.Transport).CloseIdleConnections()
		})
	}
}
