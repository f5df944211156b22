package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/prepared"
	"github.com/autonomyops/autonomy/wal"
)

// buildPolicy makes a bundle of one module and sample calls, and writes it.
func buildPolicy(t *testing.T, rego string, o prepared.BuildOptions, calls ...string) string {
	t.Helper()
	dir := t.TempDir()
	files := map[string]string{"p.rego": "package autonomy\n\nimport rego.v2\n\n" + rego}
	for i, c := range calls {
		files[fmt.Sprintf("inputs/%d.json", i)] = c
	}
	for name, body := range files {
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(body), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	o.Name = "p"
	if o.Version == "" {
		o.Version = "1.0.0"
	}
	raw, err := prepared.BuildBundle(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "policy.tar.gz")
	if err := os.WriteFile(name, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// runNode runs a node until do returns, and gives back Run's error. do gets the
// node's URL; it is not called when the node does not become ready.
func runNode(t *testing.T, change func(*Config), do func(url string)) error {
	t.Helper()
	cfg := Defaults()
	cfg.Listen = []string{"127.0.0.1:0"}
	cfg.WALSegment, cfg.WALMax, cfg.KeepFree = 1<<20, 3<<20, 0
	cfg.ReadyFile = filepath.Join(t.TempDir(), "ready")
	change(&cfg)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg, slog.New(slog.DiscardHandler), io.Discard) }()
	for {
		addr, err := os.ReadFile(cfg.ReadyFile)
		if err == nil && bytes.HasSuffix(addr, []byte("\n")) {
			do("http://" + strings.TrimPrefix(strings.Fields(string(addr))[0], "addr="))
			stop()
			return <-done
		}
		select {
		case err := <-done:
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// records reads a node's log when it has stopped.
func records(t *testing.T, stateDir string) (out []otlp.Record) {
	t.Helper()
	s, err := wal.OpenReadOnly(filepath.Join(stateDir, "wal"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for e, err := range s.Records(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if r, err := otlp.Parse(e.Payload); err == nil {
			r.Body = bytes.Clone(r.Body)
			out = append(out, r)
		}
	}
	return out
}

func bodies(t *testing.T, stateDir, eventType string) (out []string) {
	t.Helper()
	for _, r := range records(t, stateDir) {
		if r.EventType == eventType {
			out = append(out, string(r.Body))
		}
	}
	return out
}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

const opens = `default allow := true

allow := false if startswith(input.params.message, "rm ")
`

// TestPolicyFailsOpen: the operator's file does not come into force when it fails
// open, with its own sample calls or with one that the node has recorded, unless
// the field is allowed, and then a record says so.
func TestPolicyFailsOpen(t *testing.T) {
	refused := func(err error, want string) {
		t.Helper()
		if !errors.Is(err, prepared.ErrFailOpen) || run.Code(err) != run.Usage || !strings.Contains(err.Error(), want) {
			t.Errorf("ended with %v (exit %d), want a refusal with %q", err, run.Code(err), want)
		}
	}
	never := func(string) { t.Error("the node came up") }

	state := t.TempDir()
	withCall := buildPolicy(t, opens, prepared.BuildOptions{}, `{"kind":"tool.echo","params":{"message":"rm x"}}`)
	err := runNode(t, func(c *Config) { c.StateDir, c.Policy = state, withCall }, never)
	refused(err, "inputs/0.json: denied as it stands, allowed with /params removed; rule data.autonomy.allow at p.rego:7")
	err = runNode(t, func(c *Config) { c.StateDir, c.Policy, c.FailOpen = state, withCall, []string{"/params"} }, never)
	refused(err, "allowed with /params/message removed")
	err = runNode(t, func(c *Config) {
		c.StateDir, c.Policy, c.FailOpen = state, withCall, []string{"/params", "/params/message"}
	}, func(url string) {
		if st := get(t, url+"/v1/status"); !strings.Contains(st, `"ref":"p@1.0.0"`) {
			t.Error(st)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	over := bodies(t, state, event.PolicyOverride)
	if len(over) != 1 || !strings.Contains(over[0], `{"field":"/params/message","change":"removed","by":"operator","rules":["data.autonomy.allow at p.rego:7"]}`) {
		t.Errorf("recorded overrides %q", over)
	}

	// Without sample calls nothing is found, until a call was denied and recorded.
	state = t.TempDir()
	silent := buildPolicy(t, opens, prepared.BuildOptions{})
	err = runNode(t, func(c *Config) { c.StateDir, c.Policy = state, silent }, func(url string) {
		for _, message := range []string{"hello", "rm x"} {
			resp, err := http.Post(url+"/v1/tool", "application/json", strings.NewReader(`{"kind":"tool.echo","params":{"message":"`+message+`"}}`))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if (resp.StatusCode == 200) != (message == "hello") {
				t.Errorf("%s: %s", message, resp.Status)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	// The same policy comes up again, whatever was sent to it. Another one is probed
	// with it.
	if err := runNode(t, func(c *Config) { c.StateDir, c.Policy = state, silent }, func(string) {}); err != nil {
		t.Fatal(err)
	}
	later := buildPolicy(t, opens, prepared.BuildOptions{Version: "1.0.1"})
	err = runNode(t, func(c *Config) { c.StateDir, c.Policy = state, later }, never)
	refused(err, "recorded call 1: denied as it stands, allowed with /params removed; rule data.autonomy.allow at p.rego:7")

	// The author's word is in the bundle.
	said := buildPolicy(t, opens, prepared.BuildOptions{AllowFailOpen: []string{"/params", "/params/message"}})
	if err := runNode(t, func(c *Config) { c.StateDir, c.Policy = state, said }, func(string) {}); err != nil {
		t.Fatal(err)
	}
	if over := bodies(t, state, event.PolicyOverride); len(over) != 1 || !strings.Contains(over[0], `"by":"bundle"`) {
		t.Errorf("recorded overrides %q", over)
	}
}

// TestPolicySlots: a slot that cannot be used at start is an event, a metric and
// a line in status, for each step down to denying everything.
func TestPolicySlots(t *testing.T) {
	state := t.TempDir()
	slots, _, err := prepared.OpenSlots(t.Context(), filepath.Join(state, "policy"), prepared.SlotsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	put(t, slots, buildPolicy(t, "allow := true", prepared.BuildOptions{Version: "1.0.0"}))
	put(t, slots, buildPolicy(t, "allow := true", prepared.BuildOptions{Version: "2.0.0", RequiresRuntime: ">=99.0.0"}))
	slots.Close()

	check := func(metrics, serving string, events int, why string) {
		t.Helper()
		before := 0
		if _, err := os.Stat(filepath.Join(state, "wal")); err == nil {
			before = len(bodies(t, state, event.PolicyFallback))
		}
		err := runNode(t, func(c *Config) { c.StateDir = state }, func(url string) {
			m := get(t, url+"/metrics")
			for _, want := range []string{metrics, fmt.Sprintf("autonomy_node_policy_slot_faults %d\n", events), fmt.Sprintf("autonomy_node_policy_serving{slot=%q} 1\n", serving)} {
				if !strings.Contains(m, want) {
					t.Errorf("the metrics lack %q", want)
				}
			}
			var st Status
			if err := json.Unmarshal([]byte(get(t, url+"/v1/status")), &st); err != nil {
				t.Fatal(err)
			}
			if st.Policy.Serving != serving || len(st.Policy.Fallbacks) != events || !strings.Contains(st.Policy.Fallbacks[0].Why, why) {
				t.Errorf("status %+v", st.Policy)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		told := bodies(t, state, event.PolicyFallback)[before:]
		if len(told) != events || !strings.Contains(told[0], why) {
			t.Errorf("recorded %q, want %d with %q", told, events, why)
		}
	}
	check("autonomy_node_policy_active 1\n", "lkg", 1, "slot active cannot be used: not compatible with this program: runtime")
	lkg := filepath.Join(state, "policy", "lkg", "bundle.tar.gz")
	raw, err := os.ReadFile(lkg)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(lkg, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	check("autonomy_node_policy_active 0\n", "none", 2, "slot active cannot be used")
}

func put(t *testing.T, slots *prepared.Slots, name string) {
	t.Helper()
	b, err := prepared.ReadBundleFile(name, prepared.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := prepared.Compile(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	if err := slots.Activate(t.Context(), b, p, prepared.Meta{Source: prepared.SourceRelease}); err != nil {
		t.Fatal(err)
	}
}
