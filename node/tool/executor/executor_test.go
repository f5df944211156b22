package executor

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

func TestText(t *testing.T) {
	b64 := base64.StdEncoding.EncodeToString
	for name, tc := range map[string]struct {
		in       string
		cut      bool
		want     string
		encoding string
	}{
		"empty":                       {"", false, "", ""},
		"empty, cut":                  {"", true, "", ""},
		"text":                        {"aü\n", false, "aü\n", ""},
		"cut between characters":      {"aü", true, "aü", ""},
		"cut in two-byte character":   {"a\xc3", true, "a", ""},
		"cut in four-byte character":  {"a\xf0\x9f\x98", true, "a", ""},
		"not cut, incomplete":         {"a\xc3", false, b64([]byte("a\xc3")), Base64},
		"cut, and broken before":      {"\xff a\xc3", true, b64([]byte("\xff a")), Base64},
		"only continuation bytes":     {"\x80\x80\x80\x80\x80", true, b64([]byte("\x80\x80\x80\x80\x80")), Base64},
		"few control characters":      {"\x1b[1m", false, "\x1b[1m", ""},
		"nothing but control bytes":   {strings.Repeat("\x01", 5000), false, strings.Repeat("\x01", 5000), ""},
		"far too many of them":        {strings.Repeat("\x01", 100<<10), false, b64([]byte(strings.Repeat("\x01", 100<<10))), Base64},
		"too many line separators":    {strings.Repeat("\u2028", 100<<10), false, b64([]byte(strings.Repeat("\u2028", 100<<10))), Base64},
		"much text with many escapes": {strings.Repeat("a\n", 5000), false, strings.Repeat("a\n", 5000), ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, encoding := Text([]byte(tc.in), tc.cut)
			if got != tc.want || encoding != tc.encoding {
				t.Errorf("%.40q %q, want %.40q %q", got, encoding, tc.want, tc.encoding)
			}
		})
	}
}

// FuzzText holds Text to what outputs are sized by: the JSON of content is never
// longer than its base64 or maxEscaped, and nothing is altered.
func FuzzText(f *testing.F) {
	for _, s := range []string{"", "a", "ü", "\xff", "\x00\x01", "\u2028\"\\", "\x7f"} {
		f.Add([]byte(s), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, cut bool) {
		if len(b) > 0 {
			b = bytes.Repeat(b, 1+len(b)%3*(50<<10)/len(b)) // some of them large
		}
		s, encoding := Text(b, cut)
		out, err := Encode(s)
		if err != nil {
			t.Fatal(err)
		}
		if limit := max(maxEscaped, base64.StdEncoding.EncodedLen(len(b))) + 2; len(out) > limit {
			t.Fatalf("%d bytes became %d, want at most %d", len(b), len(out), limit)
		}
		var back string
		if err := json.Unmarshal(out, &back); err != nil || back != s {
			t.Fatalf("%q reads back as %q, %v", s, back, err)
		}
		raw := []byte(s)
		if encoding == Base64 {
			if raw, err = base64.StdEncoding.DecodeString(s); err != nil {
				t.Fatal(err)
			}
		}
		if !strings.HasPrefix(string(b), string(raw)) || len(b)-len(raw) > 3 || !cut && len(raw) != len(b) {
			t.Fatalf("%q became %q", b, raw)
		}
	})
}

func TestStopped(t *testing.T) {
	late, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	if r := Stopped(late); r.Outcome != Timeout || r.Code != "timeout" {
		t.Errorf("%+v", r)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if r := Stopped(gone); r.Outcome != Killed || r.Code != "canceled" {
		t.Errorf("%+v", r)
	}
}
