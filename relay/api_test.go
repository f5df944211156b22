package relay_test

import (
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/relay"
	"github.com/autonomyops/autonomy/relay/prestage"
	"github.com/autonomyops/autonomy/verify"
)

const noDigest = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

// tree is every file under dir with its digest.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		fmt.Fprintf(&b, "%s %x\n", strings.TrimPrefix(path, dir), sha256.Sum256(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestBadInput: each endpoint, each bad request, the answer, and nothing changed.
func TestBadInput(t *testing.T) {
	srv := memory(t)
	img := image(t, 5, 1000)
	d := push(t, srv.URL, "team/agent", img)
	in := start(t, config(t.TempDir(), srv.URL))
	in.submit(list("l", 3, item("team/agent", d, 0)))
	in.await("l", prestage.Staged)
	layer := must(must(img.Layers())[0].Digest()).String()
	before := tree(t, in.cfg.StateDir)

	good := `{"schema":"autonomy.prestage/v0","id":"x","sequence":1,"items":[{"repository":"a","digest":"` + noDigest + `","priority":0}]}`
	edit := func(old, new string) string { return strings.Replace(good, old, new, 1) }
	post := func(name, body string, status int, want string) func(*testing.T) {
		return func(t *testing.T) {
			code, _, have := in.do("POST", "/v1/prestage", jsonType, []byte(body))
			if code != status || !strings.Contains(string(have), want) {
				t.Errorf("%d %s, want %d %s", code, have, status, want)
			}
		}
	}
	for name, f := range map[string]func(*testing.T){
		"post empty":                     post("", "", 400, "ends where a value is due"),
		"post truncated":                 post("", good[:60], 400, "prestage_malformed"),
		"post oversized":                 post("", good+strings.Repeat(" ", prestage.MaxBodyBytes), 413, "too_large"),
		"post wrong type":                post("", edit(`"sequence":1`, `"sequence":"1"`), 400, "prestage_malformed"),
		"post duplicate key":             post("", edit(`"id":"x"`, `"id":"x","id":"y"`), 400, "duplicate key"),
		"post unknown key":               post("", edit(`"id":"x"`, `"id":"x","mission":"y"`), 400, "unknown key"),
		"post key in other case":         post("", edit(`"items"`, `"Items"`), 400, "case-sensitive"),
		"post invalid UTF-8":             post("", edit(`"id":"x"`, "\"id\":\"\xff\""), 400, "invalid UTF-8"),
		"post trailing data":             post("", good+"{}", 400, "after the value"),
		"post other schema":              post("", edit("v0", "v9"), 400, "schema is"),
		"post id as path":                post("", edit(`"id":"x"`, `"id":"../x"`), 400, "id is"),
		"post sequence 0":                post("", edit(`"sequence":1`, `"sequence":0`), 400, "sequence is 0"),
		"post negative":                  post("", edit(`"sequence":1`, `"sequence":-1`), 400, "prestage_malformed"),
		"post no items":                  post("", `{"schema":"autonomy.prestage/v0","id":"x","sequence":1}`, 400, "items is missing"),
		"post bad repository":            post("", edit(`"a"`, `"../a"`), 400, "repository name"),
		"post bad digest":                post("", edit("sha256", "sha512"), 400, "want sha256"),
		"post bad priority":              post("", edit(`"priority":0`, `"priority":1001`), 400, "priority is 1001"),
		"post item twice":                post("", edit(`[{`, `[{"repository":"a","digest":"`+noDigest+`","priority":1},{`), 400, "the same as items[0]"),
		"post lower sequence":            post("", edit(`"id":"x"`, `"id":"l"`), 409, "sequence_rollback"),
		"post same sequence, other list": post("", strings.Replace(edit(`"id":"x"`, `"id":"l"`), `"sequence":1`, `"sequence":3`, 1), 409, "sequence_rollback"),
		"post envelope without keyring":  post("", `{"payloadType":"x","payload":"","signatures":[]}`, 400, "unknown key"),
	} {
		t.Run(name, f)
	}

	origin := http.Header{"Content-Type": {"application/json"}, "Origin": {"http://evil.example"}}
	for _, tt := range []struct {
		method, path string
		header       http.Header
		status       int
		want         string
	}{
		{"POST", "/v1/prestage", origin, 403, "browser_refused"},
		{"POST", "/v1/prestage", http.Header{"Content-Type": {"text/plain"}}, 415, "media_type"},
		{"POST", "/v1/prestage", nil, 415, "media_type"},
		{"GET", "/v1/prestage", nil, 405, "method_not_allowed"},
		{"DELETE", "/v1/prestage/l", nil, 405, "method_not_allowed"},
		{"GET", "/v1/prestage/none", nil, 404, "no_such_list"},
		{"GET", "/v1/prestage/..", nil, 400, "bad_id"},
		{"GET", "/v1/prestage/a/b", nil, 400, "bad_id"},
		{"GET", "/v1/prestage/%2e%2e", nil, 400, ""},
		{"POST", "/v1/status", nil, 405, "method_not_allowed"},
		{"POST", "/healthz", nil, 405, "method_not_allowed"},
		{"POST", "/readyz", nil, 405, "method_not_allowed"},
		{"POST", "/metrics", nil, 405, "method_not_allowed"},
		{"GET", "/", nil, 404, "no_such_path"},
		{"GET", "/v1", nil, 404, "no_such_path"},
		{"GET", "/" + strings.Repeat("a", 2000), nil, 400, "bad_path"},
		{"PUT", "/v2/team/agent/manifests/" + d.String(), nil, 405, "UNSUPPORTED"},
		{"POST", "/v2/team/agent/blobs/uploads/", nil, 405, "UNSUPPORTED"},
		{"DELETE", "/v2/team/agent/manifests/" + d.String(), nil, 405, "UNSUPPORTED"},
		{"PATCH", "/v2/", nil, 405, "UNSUPPORTED"},
		{"GET", "/v2/team/agent/manifests/latest", nil, 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/team/agent/manifests/sha256:12", nil, 400, "DIGEST_INVALID"},
		{"GET", "/v2/team/agent/blobs/latest", nil, 400, "DIGEST_INVALID"},
		{"GET", "/v2/team/agent/blobs/sha512:" + strings.Repeat("0", 128), nil, 400, "DIGEST_INVALID"},
		{"GET", "/v2/team/agent/blobs/" + strings.ToUpper(layer[:20]) + layer[20:], nil, 400, "DIGEST_INVALID"},
		{"GET", "/v2/team/agent/blobs/" + noDigest, nil, 404, "not declared to this relay"},
		{"GET", "/v2/team/agent/manifests/" + noDigest, nil, 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/team/agent/manifests/" + layer, nil, 404, "a blob, not a manifest"},
		{"GET", "/v2/team/other/blobs/" + layer, nil, 404, "NAME_UNKNOWN"},
		{"GET", "/v2/Team/agent/blobs/" + layer, nil, 400, "NAME_INVALID"},
		{"GET", "/v2/team//agent/blobs/" + layer, nil, 400, "NAME_INVALID"},
		{"GET", "/v2/team/../agent/blobs/" + layer, nil, 400, "NAME_INVALID"},
		{"GET", "/v2/team%2Fagent/blobs/" + layer, nil, 400, "NAME_INVALID"},
		{"GET", "/v2/" + strings.Repeat("a", 300) + "/blobs/" + layer, nil, 400, "NAME_INVALID"},
		{"GET", "/v2/" + strings.Repeat("a", 2000) + "/blobs/" + layer, nil, 400, "NAME_INVALID"},
		{"GET", "/v2/team/agent/secrets/" + layer, nil, 404, "UNSUPPORTED"},
		{"GET", "/v2/_catalog", nil, 404, "UNSUPPORTED"},
		{"GET", "/v2/team/agent/referrers/x", nil, 400, "DIGEST_INVALID"},
		{"GET", "/v2/team/other/referrers/" + d.String(), nil, 404, "NAME_UNKNOWN"},
		{"GET", "/v2/team/other/tags/list", nil, 404, "NAME_UNKNOWN"},
		{"GET", "/v2/team/agent/blobs/" + layer, http.Header{"Range": {"bytes=99999-"}}, 416, ""},
	} {
		t.Run(tt.method+" "+tt.path[:min(len(tt.path), 60)], func(t *testing.T) {
			code, _, body := in.do(tt.method, tt.path, tt.header, nil)
			if code != tt.status || !strings.Contains(string(body), tt.want) {
				t.Errorf("%d %.300s, want %d %s", code, body, tt.status, tt.want)
			}
			if strings.Contains(string(body), in.cfg.StateDir) {
				t.Errorf("the answer names a path of this machine: %s", body)
			}
		})
	}
	if after := tree(t, in.cfg.StateDir); before != after {
		t.Errorf("state changed:\n%s\nthen\n%s", before, after)
	}
}

// TestServe: ranges, conditions, HEAD, and what else a client may rely on.
func TestServe(t *testing.T) {
	srv := memory(t)
	img := image(t, 6, 3<<20) // more than two write chunks
	d := push(t, srv.URL, "team/agent", img)
	in := start(t, config(t.TempDir(), srv.URL))
	in.submit(list("l", 1, item("team/agent", d, 0)))
	in.await("l", prestage.Staged)
	layer := must(must(img.Layers())[0].Digest()).String()
	want := content(6, 3<<20)
	path := "/v2/team/agent/blobs/" + layer
	etag := `"` + layer + `"`

	code, h, body := in.do("GET", path, nil, nil)
	if code != 200 || string(body) != string(want) || h.Get("Docker-Content-Digest") != layer || h.Get("ETag") != etag || h.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("GET: %d, %d bytes, %v", code, len(body), h)
	}
	if code, h, body = in.do("HEAD", path, nil, nil); code != 200 || len(body) != 0 || h.Get("Content-Length") != fmt.Sprint(len(want)) {
		t.Errorf("HEAD: %d %v", code, h)
	}
	if code, h, body = in.do("GET", path, http.Header{"Range": {"bytes=1048570-1048589"}, "If-Range": {etag}}, nil); code != 206 || string(body) != string(want[1048570:1048590]) {
		t.Errorf("range: %d %v", code, h)
	}
	if code, _, body = in.do("GET", path, http.Header{"Range": {"bytes=0-9"}, "If-Range": {`"other"`}}, nil); code != 200 || len(body) != len(want) {
		t.Errorf("range of another entity: %d, %d bytes", code, len(body))
	}
	if code, _, body = in.do("GET", path, http.Header{"Range": {"bytes=" + strings.Repeat("0-1,", 200) + "0-1"}}, nil); code != 200 || len(body) != len(want) {
		t.Errorf("too many ranges: %d, %d bytes", code, len(body))
	}
	if code, _, body = in.do("GET", path, http.Header{"If-None-Match": {etag}}, nil); code != 304 || len(body) != 0 {
		t.Errorf("if-none-match: %d", code)
	}
	if code, h, _ = in.do("GET", "/v2/team/agent/manifests/"+d.String(), nil, nil); code != 200 || h.Get("Content-Type") != "application/vnd.oci.image.manifest.v1+json" {
		t.Errorf("manifest: %d %v", code, h)
	}
	if code, _, body = in.do("GET", "/v2/team/agent/tags/list", nil, nil); code != 200 || string(body) != `{"name":"team/agent","tags":[]}`+"\n" {
		t.Errorf("tags: %d %s", code, body)
	}
	if code, _, body = in.do("GET", "/v2/team/agent/referrers/"+noDigest, nil, nil); code != 200 || !strings.Contains(string(body), `"manifests":[]`) {
		t.Errorf("no referrers: %d %s", code, body)
	}
	for _, p := range []string{"/v2", "/v2/", "/healthz", "/readyz", "/v1/status"} {
		if code, _, body = in.do("GET", p, nil, nil); code != 200 || !json.Valid(body) {
			t.Errorf("%s: %d %s", p, code, body)
		}
	}
	var st relay.Status
	_, _, body = in.do("GET", "/v1/status", nil, nil)
	if err := json.Unmarshal(body, &st); err != nil || st.Blobs != 4 || st.Disk.Used < 3<<20 || st.Disk.Used > st.Disk.MaxBytes || st.Prestage.Items["staged"] != 1 || st.Signed {
		t.Errorf("status: %s (%v)", body, err)
	}
	_, _, body = in.do("GET", "/metrics", nil, nil)
	for _, line := range []string{`autonomy_relay_items{state="staged"} 1`, `autonomy_relay_blobs 4`, `autonomy_relay_http_requests_total{route="v2_blobs",code="206"} 1`} {
		if !strings.Contains(string(body), line) {
			t.Errorf("metrics lack %s:\n%s", line, body)
		}
	}
}

// keyring writes a keyring file and returns its path.
func keyring(t *testing.T, keys ...*verify.Key) string {
	t.Helper()
	data := must(must(verify.NewKeyring(keys...)).Marshal())
	path := filepath.Join(t.TempDir(), "keyring.json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func key(t *testing.T, seed byte, usages ...verify.Usage) (crypto.Signer, *verify.Key) {
	t.Helper()
	priv := ed25519.NewKeyFromSeed(content(seed, ed25519.SeedSize))
	return priv, &verify.Key{PublicKey: string(must(verify.MarshalPublicKey(priv.Public()))), Usages: usages}
}

// TestSignedPrestage: who may declare content, and who may not.
func TestSignedPrestage(t *testing.T) {
	srv := memory(t)
	d := push(t, srv.URL, "a", image(t, 7, 100))
	signer, good := key(t, 1, verify.UsageRelease)
	artifactKey, artifactOnly := key(t, 2, verify.UsageArtifact)
	oldKey, old := key(t, 3, verify.UsageRelease)
	past := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	old.NotAfter = &past
	badKey, bad := key(t, 4, verify.UsageRelease)
	bad.Revoked = true
	stranger, _ := key(t, 5, verify.UsageRelease)
	cfg := config(t.TempDir(), srv.URL)
	cfg.AllowUnsigned = false
	cfg.Trust = keyring(t, good, artifactOnly, old, bad)
	in := start(t, cfg)
	l := list("edge", 1, item("a", d, 0))
	seal := func(s crypto.Signer) []byte { return must(relay.Seal(l, s)) }
	env := func(change func(map[string]any)) []byte {
		var m map[string]any
		if err := json.Unmarshal(seal(signer), &m); err != nil {
			t.Fatal(err)
		}
		change(m)
		return must(json.Marshal(m))
	}
	sigs := func(m map[string]any) []any { return m["signatures"].([]any) }
	for _, tt := range []struct {
		name   string
		body   []byte
		status int
		code   string
	}{
		{"bare list", must(l.Marshal()), 400, "prestage_malformed"},
		{"no signature", env(func(m map[string]any) { m["signatures"] = []any{} }), 403, "sig_missing"},
		{"two signatures", env(func(m map[string]any) { m["signatures"] = append(sigs(m), sigs(m)[0]) }), 403, "sig_invalid"},
		{"other payload type", env(func(m map[string]any) { m["payloadType"] = verify.ReleaseMediaType }), 400, "prestage_malformed"},
		{"other payload", env(func(m map[string]any) { m["payload"] = "e30=" }), 403, "sig_invalid"},
		{"signature not base64", env(func(m map[string]any) { sigs(m)[0].(map[string]any)["sig"] = "!" }), 403, "sig_invalid"},
		{"unknown field", env(func(m map[string]any) { m["x"] = 1 }), 400, "prestage_malformed"},
		{"stranger", seal(stranger), 403, "sig_invalid"},
		{"key for artifacts", seal(artifactKey), 403, "sig_invalid"},
		{"key past its time", seal(oldKey), 403, "key_expired"},
		{"revoked key", seal(badKey), 403, "key_revoked"},
		{"good", seal(signer), 202, ""},
		{"good with a misleading hint", env(func(m map[string]any) { sigs(m)[0].(map[string]any)["keyid"] = "x" }), 200, `"repeated":true`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if code, _, body := in.do("POST", "/v1/prestage", jsonType, tt.body); code != tt.status || !strings.Contains(string(body), tt.code) {
				t.Errorf("%d %s, want %d %s", code, body, tt.status, tt.code)
			}
		})
	}
	if rep := in.await("edge", prestage.Staged); rep.SignedBy != good.ID {
		t.Errorf("signed by %q", rep.SignedBy)
	}
	// A revocation holds at the next submission, an unreadable keyring refuses.
	good.Revoked = true
	l.Sequence = 2
	if err := os.Rename(keyring(t, good), cfg.Trust); err != nil {
		t.Fatal(err)
	}
	if code, _, body := in.do("POST", "/v1/prestage", jsonType, seal(signer)); code != 403 || !strings.Contains(string(body), "key_revoked") {
		t.Errorf("after revocation: %d %s", code, body)
	}
	if err := os.WriteFile(cfg.Trust, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, body := in.do("POST", "/v1/prestage", jsonType, seal(signer)); code != 503 || !strings.Contains(string(body), "keyring_unreadable") {
		t.Errorf("broken keyring: %d %s", code, body)
	}

	cfg = config(t.TempDir(), srv.URL)
	cfg.AllowUnsigned = false
	in = start(t, cfg)
	if code, _, body := in.do("POST", "/v1/prestage", jsonType, seal(signer)); code != 403 || !strings.Contains(string(body), "prestage_unsigned") {
		t.Errorf("no keyring at all: %d %s", code, body)
	}
}

// TestConnectionLimit: connections beyond the limit wait until one is closed.
func TestConnectionLimit(t *testing.T) {
	srv := memory(t)
	cfg := config(t.TempDir(), srv.URL)
	cfg.MaxConns = 2
	in := start(t, cfg)
	addr := strings.TrimPrefix(in.url, "http://")
	var held []net.Conn
	for range 2 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	c := &http.Client{Timeout: 200 * time.Millisecond, Transport: &http.Transport{DisableKeepAlives: true}}
	if resp, err := c.Get(in.url + "/healthz"); err == nil {
		resp.Body.Close()
		t.Error("a third connection was served")
	}
	for _, h := range held {
		h.Close()
	}
	c.Timeout = 5 * time.Second
	resp, err := c.Get(in.url + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}
