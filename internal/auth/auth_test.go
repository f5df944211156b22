package auth

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

var quiet = slog.New(slog.DiscardHandler)

var day0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func newToken(t *testing.T, file, principal string, now time.Time, life time.Duration) (token, id string) {
	t.Helper()
	if err := EditTokens(file, func(f *TokenFile) error {
		var rec TokenRecord
		var err error
		token, rec, err = f.Create(principal, now, life)
		id = rec.ID
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return token, id
}

func TestTokens(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tokens.json")
	one, _ := newToken(t, file, "ci", day0, time.Hour)
	two, _ := newToken(t, file, "ci", day0, 2*time.Hour)
	err := EditTokens(file, func(f *TokenFile) error { _, _, err := f.Create("ci", day0, time.Hour); return err })
	if !errors.Is(err, ErrTooManyLive) {
		t.Errorf("a third valid token: %v", err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{one, two} {
		if secret := token[len(TokenPrefix)+idDigits+1:]; strings.Contains(string(data), secret) {
			t.Error("the file holds a token")
		}
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}

	now := day0
	a, err := Open(Options{Tokens: file, Logger: quiet, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	c, _ := net.Pipe()
	valid := func(token string) error {
		who, err := a.Caller(c, []byte(token))
		if err == nil && who != (Caller{Type: Token, ID: "ci"}) {
			t.Errorf("token of %+v", who)
		}
		return err
	}
	for _, token := range []string{one, two} {
		if err := valid(token); err != nil {
			t.Error(err)
		}
	}
	for name, token := range map[string]string{
		"empty": "", "short": one[:len(one)-1], "long": one + "a", "other prefix": "autm_" + one[5:], "no separator": strings.Replace(one, "_", "-", 2),
		"other id": TokenPrefix + "0000000000000000" + one[len(TokenPrefix)+idDigits:], "other secret": one[:len(one)-1] + other(one[len(one)-1]),
		"upper case": strings.ToUpper(one), "secret of the other": one[:len(TokenPrefix)+idDigits] + two[len(TokenPrefix)+idDigits:],
	} {
		if err := valid(token); !errors.Is(err, ErrToken) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A token that does not hold is not passed over for a weaker credential.
	if _, err := a.Caller(c, []byte{}); !errors.Is(err, ErrToken) {
		t.Errorf("an empty token: %v", err)
	}
	if _, err := a.Caller(c, nil); !errors.Is(err, ErrNoCredential) {
		t.Errorf("no token: %v", err)
	}

	// Rotation: the first runs out, is revoked, and a third is made.
	now = day0.Add(90 * time.Minute)
	if err := valid(one); !errors.Is(err, ErrToken) || valid(two) != nil {
		t.Errorf("expired: %v; its successor: %v", err, valid(two))
	}
	three, id3 := newToken(t, file, "ci", now, time.Hour)
	if err := valid(three); err == nil {
		t.Error("known before the reload")
	}
	if got := a.Reload(false); len(got) != 1 || got[0] != file || valid(three) != nil {
		t.Errorf("after the reload: %v, %v", got, valid(three))
	}
	if got := a.Reload(false); got != nil {
		t.Errorf("nothing changed: %v", got)
	}
	for range 2 {
		if err := EditTokens(file, func(f *TokenFile) error { return f.Revoke(id3, now) }); err != nil {
			t.Fatal(err)
		}
	}
	a.Reload(false)
	if err := valid(three); !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("revoked: %v", err)
	}
	if err := EditTokens(file, func(f *TokenFile) error { return f.Revoke("ffffffffffffffff", now) }); !errors.Is(err, ErrNoToken) {
		t.Errorf("revoke an unknown one: %v", err)
	}
}

func other(b byte) string {
	if b == 'a' {
		return "b"
	}
	return "a"
}

// TestTokenFileFailsClosed: whatever happens to the file while the node runs,
// no token is valid then, and all are again when the file is.
func TestTokenFileFailsClosed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tokens.json")
	token, _ := newToken(t, file, "ci", time.Now(), time.Hour)
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	a, err := Open(Options{Tokens: file, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	c, _ := net.Pipe()
	for name, spoil := range map[string]func() error{
		"gone":           func() error { return os.Remove(file) },
		"cut off":        func() error { return os.WriteFile(file, good[:len(good)/2], 0o600) },
		"empty":          func() error { return os.WriteFile(file, nil, 0o600) },
		"another schema": func() error { return os.WriteFile(file, []byte(`{"schema":"x","tokens":[]}`), 0o600) },
		"an unknown key": func() error {
			return os.WriteFile(file, []byte(`{"schema":"autonomy.tokens/v0","tokens":[],"x":1}`), 0o600)
		},
		"others may write": func() error { return os.Chmod(file, 0o666) },
		"a directory":      func() error { return errors.Join(os.Remove(file), os.Mkdir(file, 0o700)) },
		"too long":         func() error { return os.Truncate(file, MaxFileBytes+1) },
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := a.Caller(c, []byte(token)); err != nil {
				t.Fatal(err)
			}
			if err := spoil(); err != nil {
				t.Fatal(err)
			}
			if got := a.Reload(false); got != nil {
				t.Errorf("in force: %v", got)
			}
			if _, err := a.Caller(c, []byte(token)); !errors.Is(err, ErrToken) {
				t.Errorf("the token: %v", err)
			}
			if p := a.Problems(); len(p) != 1 || !strings.Contains(p[0], "no token is valid") {
				t.Errorf("problems %q", p)
			}
			if _, err := Open(Options{Tokens: file, Logger: quiet}); err == nil {
				t.Error("a start with such a file succeeds")
			}
			if err := errors.Join(os.RemoveAll(file), os.WriteFile(file, good, 0o600)); err != nil {
				t.Fatal(err)
			}
			if got := a.Reload(false); len(got) != 1 || len(a.Problems()) != 0 {
				t.Errorf("mended: %v, problems %q", got, a.Problems())
			}
		})
	}
}

// TestEditTokens: editors wait for each other, none loses what another wrote.
func TestEditTokens(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tokens.json")
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			if err := EditTokens(file, func(f *TokenFile) error {
				_, _, err := f.Create(fmt.Sprintf("p%d", i), time.Now(), time.Hour)
				return err
			}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	f, err := LoadTokens(file)
	if err != nil || len(f.Tokens) != 16 {
		t.Errorf("%v, %v", f, err)
	}
}

func FuzzParseTokenFile(f *testing.F) {
	f.Add([]byte(`{"schema":"autonomy.tokens/v0","tokens":[]}`))
	f.Add([]byte(`{"schema":"autonomy.tokens/v0","tokens":[{"id":"0123456789abcdef","principal":"a","sha256":"` + strings.Repeat("0", 64) + `","created_at":"2026-01-01T00:00:00Z","expires_at":"2026-01-01T00:00:00Z"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		x, err := ParseTokenFile(data)
		if err != nil {
			return
		}
		for _, r := range x.Tokens {
			if len(r.ID) != idDigits || !ValidPrincipal(r.Principal) || r.ExpiresAt.IsZero() {
				t.Errorf("accepted %+v", r)
			}
		}
	})
}

func TestUnixPeers(t *testing.T) {
	dir := t.TempDir()
	callers := filepath.Join(dir, "callers.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(callers, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("{}")
	a, err := Open(Options{Callers: callers, Anonymous: true, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	wrapped := a.Listener(ln)
	client, err := net.Dial("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := wrapped.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	uid, gid := uint32(os.Getuid()), uint32(os.Getgid())
	want := Caller{Type: Unix, ID: fmt.Sprintf("uid:%d", uid), UID: uid, GID: gid, PID: int32(os.Getpid())}
	check := func(id string) {
		t.Helper()
		want.ID = id
		if who, err := a.Caller(conn, nil); err != nil || who != want || !FromUnix(conn) {
			t.Errorf("%+v, %v, want %+v", who, err, want)
		}
	}
	check(want.ID)
	// The map is read anew; a connection that is open follows it.
	write(fmt.Sprintf("principals: {by-group: {gid: [%d]}}", gid))
	a.Reload(false)
	check("by-group")
	write(fmt.Sprintf("principals: {by-group: {gid: [%d]}, by-user: {uid: [%d]}}", gid, uid))
	a.Reload(false)
	check("by-user")
	// A faulty one changes nothing, and is told.
	write("principals: {by-user: {uid: [-1]}}")
	if got := a.Reload(false); got != nil {
		t.Errorf("in force: %v", got)
	}
	check("by-user")
	if p := a.Problems(); len(p) != 1 || !strings.Contains(p[0], "former one stays") {
		t.Errorf("%q", p)
	}
	// A token that does not hold makes a known peer nobody.
	if _, err := a.Caller(conn, []byte("autn_x")); !errors.Is(err, ErrToken) {
		t.Errorf("%v", err)
	}
}

func TestLoopback(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, anonymous := range []bool{true, false} {
		a, err := Open(Options{Anonymous: anonymous, Logger: quiet})
		if err != nil {
			t.Fatal(err)
		}
		who, err := a.Caller(conn, nil)
		if anonymous && (err != nil || who != loopback) || !anonymous && !errors.Is(err, ErrNoCredential) {
			t.Errorf("anonymous %v: %+v, %v", anonymous, who, err)
		}
		far := remote{conn}
		if who, err := a.Caller(far, nil); !errors.Is(err, ErrNoCredential) {
			t.Errorf("from another machine: %+v, %v", who, err)
		}
	}
}

// remote is a connection whose peer is elsewhere.
type remote struct{ net.Conn }

func (remote) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1} }

func TestParseCallers(t *testing.T) {
	for text, want := range map[string]string{
		"":                    "",
		"defaults: {rate: 5}": "",
		"principals: {a: {uid: [1], limits: {}}}":          "",
		"principals: {a: {uid: [1]}, b: {uid: [1]}}":       "uid 1 is both a and b",
		"principals: {a: {gid: [1]}, b: {gid: [1]}}":       "gid 1 is both a and b",
		"principals: {a: {cert: [x]}, b: {cert: [x]}}":     `"x" is both a and b`,
		"principals: {a: {cert: ['']}}":                    "certificate name",
		"principals: {\" a\": {}}":                         "principal",
		"principals: {a: {limits: {rate: -1}}}":            "rate is -1",
		"defaults: {rate: .nan}":                           "rate is NaN",
		"defaults: {rate: .inf}":                           "rate is +Inf",
		"defaults: {burst: 3}":                             "with a rate",
		"defaults: {concurrent: -1}":                       "concurrent is -1",
		"defaults: {per_day: -1}":                          "per_day is -1",
		"default: {}":                                      "default",
		"principals: {a: {uids: [1]}}":                     "uids",
		"principals: {a: {}, a: {}}":                       "already defined",
		"a: b: c":                                          "mapping",
		"defaults: {}\n---\ndefaults: {}":                  "more than one document",
		"principals: {a: {limits: {per_day: 1, rates: 1}}": "did not find",
	} {
		_, err := ParseCallers([]byte(text))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func FuzzParseCallers(f *testing.F) {
	f.Add([]byte("principals: {a: {uid: [1], gid: [2], cert: [x], limits: {rate: 1, burst: 2, concurrent: 3, per_day: 4}}}"))
	f.Add([]byte("defaults: {rate: 1e300}"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseCallers(data)
		if err != nil {
			return
		}
		for name := range c.Principals {
			if set := c.limits(name); !ValidPrincipal(name) || len(set.faults()) > 0 {
				t.Errorf("accepted %q with %+v", name, set)
			}
		}
	})
}
