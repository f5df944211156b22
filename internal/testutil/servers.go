package testutil

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"text/template"
)

// Versions that scripts/setup-test.sh builds.
const (
	otelcolVersion = "v0.162.0"
	cosignVersion  = "v3.1.3"
)

// A Collector is a running OpenTelemetry Collector that takes OTLP and passes
// logs on over OTLP/HTTP. What it has accepted lies in a queue on disk, so that
// Kill and Restart lose nothing.
type Collector struct {
	*Process
	GRPC string // "127.0.0.1:port" of the OTLP/gRPC receiver
	HTTP string // and of OTLP/HTTP
}

// There is no batch processor: it holds records in memory that the sender
// believes delivered. The exporter batches behind its queue instead.
var collectorConfig = template.Must(template.New("config").Parse(`
receivers:
  otlp:
    protocols:
      grpc: { endpoint: "{{.GRPC}}" }
      http: { endpoint: "{{.HTTP}}" }
exporters:
  otlp_http:
    logs_endpoint: "{{.Logs}}"
    timeout: 10s
    retry_on_failure: { enabled: true, initial_interval: 100ms, max_interval: 1s, max_elapsed_time: 0 }
    sending_queue:
      enabled: true
      storage: file_storage
      queue_size: 100000
      batch: { flush_timeout: 100ms, min_size: 100 }
extensions:
  file_storage: { directory: "{{.Queue}}", create_directory: true, fsync: true }
service:
  extensions: [file_storage]
  telemetry: { metrics: { level: none } }
  pipelines:
    logs: { receivers: [otlp], exporters: [otlp_http] }
`))

// StartCollector starts the collector in front of logsEndpoint, the full URL
// that takes OTLP/HTTP logs ("http://127.0.0.1:8888/v1/events"), and waits
// until it serves. Its ports survive Restart.
func StartCollector(t testing.TB, logsEndpoint string) *Collector {
	t.Helper()
	bin := find("otelcol-"+otelcolVersion, "otelcol")
	if bin == "" {
		Missing(t, "the OpenTelemetry Collector", "run: make setup")
	}
	dir := t.TempDir()
	c := &Collector{GRPC: FreeAddr(t), HTTP: FreeAddr(t)}
	var config bytes.Buffer
	err := collectorConfig.Execute(&config, map[string]string{
		"GRPC": c.GRPC, "HTTP": c.HTTP, "Logs": logsEndpoint, "Queue": filepath.Join(dir, "queue"),
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, config.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Process = Command{Path: bin, Args: []string{"--config", file}, Name: "otelcol"}.Start(t)
	c.waitServing(t)
	return c
}

// Restart starts the collector again, on its queue and its ports, and waits
// until it serves.
func (c *Collector) Restart(t testing.TB) *Collector {
	t.Helper()
	next := &Collector{Process: c.Process.Restart(t), GRPC: c.GRPC, HTTP: c.HTTP}
	next.waitServing(t)
	return next
}

var collectorReady = regexp.MustCompile(`Everything is ready`)

func (c *Collector) waitServing(t testing.TB) {
	t.Helper()
	c.WaitOutput(t, c.Stderr, collectorReady, Timeout)
}

// A Registry is a running OCI registry (distribution) with an empty store.
type Registry struct {
	*Process
	Addr string // "127.0.0.1:port"; plain HTTP
}

// StartRegistry starts docker-registry and waits until it serves.
func StartRegistry(t testing.TB) *Registry {
	t.Helper()
	bin := find("docker-registry", "docker-registry")
	if bin == "" {
		Missing(t, "docker-registry", "run: make setup")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "config.yml")
	config := fmt.Sprintf(`version: 0.1
log: { level: info }
storage:
  filesystem: { rootdirectory: %q }
  delete: { enabled: true }
http:
  addr: 127.0.0.1:0
`, filepath.Join(dir, "store"))
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	// It has exporters of its own, which the environment can switch on.
	p := Command{Path: bin, Args: []string{"serve", file}, Env: []string{"OTEL_TRACES_EXPORTER=none"}}.Start(t)
	return &Registry{Process: p, Addr: p.Addr(t)}
}

// Cosign returns the path of cosign, and whether there is one. Its test may be
// skipped where it is not.
func Cosign() (string, bool) {
	p := find("cosign-"+cosignVersion, "cosign")
	return p, p != ""
}
