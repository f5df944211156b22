package main

import (
	"context"
	"io"
	"log"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/autonomyops/autonomy/cp"
)

// startRegistry starts a registry in memory and sets VAR to its host:port:
// registry VAR
func startRegistry(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: registry VAR")
	}
	server := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
	ts.Defer(server.Close)
	ts.Setenv(args[0], strings.TrimPrefix(server.URL, "http://"))
}

// startControlPlane starts a control plane over a fresh store, trusting KEYRING,
// and sets VAR to its URL: controlplane VAR KEYRING
func startControlPlane(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: controlplane VAR KEYRING")
	}
	dir := ts.MkAbs("cp-" + args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	c := cp.Default()
	c.Listen, c.StateDir, c.Trust = []string{"127.0.0.1:0"}, filepath.Join(dir, "state"), ts.MkAbs(args[1])
	c.ReadyFile, c.KeepFree = filepath.Join(dir, "ready"), 1<<20
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- cp.Run(ctx, c, io.Discard, slog.New(slog.DiscardHandler)) }()
	ts.Defer(func() {
		stop()
		ts.Check(<-done)
	})
	for range 500 {
		if data, err := os.ReadFile(c.ReadyFile); err == nil {
			addr, _, _ := strings.Cut(strings.TrimPrefix(string(data), "addr="), "\n")
			ts.Setenv(args[0], "http://"+addr)
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("the control plane does not serve after 5 s")
}
