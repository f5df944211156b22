package mcp

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestStdioConfig(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("t\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		c    stdioConfig
		url  string
		want string // in the error
	}{
		"default":           {stdioConfig{url: "http://127.0.0.1:7777"}, "http://127.0.0.1:7777/mcp", ""},
		"slash":             {stdioConfig{url: "http://127.0.0.1:7777/"}, "http://127.0.0.1:7777/mcp", ""},
		"socket":            {stdioConfig{url: "http://127.0.0.1:7777", socket: "/s", tokenFile: token}, "http://localhost/mcp", ""},
		"token":             {stdioConfig{url: "http://127.0.0.1:7777", tokenFile: token}, "http://127.0.0.1:7777/mcp", ""},
		"token over https":  {stdioConfig{url: "https://node.example", tokenFile: token}, "https://node.example/mcp", ""},
		"token in the open": {stdioConfig{url: "http://192.0.2.1:7777", tokenFile: token}, "", "a token goes over https"},
		"no token":          {stdioConfig{url: "http://127.0.0.1:1", tokenFile: token + "x"}, "", "--token-file"},
		"no url":            {stdioConfig{url: "127.0.0.1:7777"}, "", "--url"},
		"user in the url":   {stdioConfig{url: "http://u:p@127.0.0.1:7777"}, "", "--url"},
	} {
		t.Run(name, func(t *testing.T) {
			err := tc.c.validate()
			if tc.want == "" && (err != nil || tc.c.url != tc.url) {
				t.Errorf("%v, url %s", err, tc.c.url)
			}
			if tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}
