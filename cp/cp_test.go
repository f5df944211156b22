package cp

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/autonomyops/autonomy/internal/run"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs a control plane on a free port; stop ends it and returns Run's
// error.
func start(t *testing.T, change func(*Config)) (addr string, stop func() error) {
	t.Helper()
	c := Default()
	c.Listen, c.StateDir, c.KeepFree = []string{"127.0.0.1:0"}, filepath.Join(t.TempDir(), "state"), 0
	c.ReadyFile = filepath.Join(t.TempDir(), "ready")
	if change != nil {
		change(&c)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	var stderr bytes.Buffer
	go func() { done <- Run(ctx, c, &stderr, slog.New(slog.DiscardHandler)) }()
	stopped := false
	stop = func() error {
		stopped = true
		cancel()
		err := <-done
		if !strings.HasPrefix(stderr.String(), "listening on 127.0.0.1:") {
			t.Errorf("stderr is %q", stderr.String())
		}
		if _, serr := os.Stat(c.ReadyFile); !os.IsNotExist(serr) {
			t.Errorf("the ready file is still there: %v", serr)
		}
		return err
	}
	t.Cleanup(func() {
		if !stopped {
			if err := stop(); err != nil {
				t.Error(err)
			}
		}
	})
	for range 1000 {
		if b, err := os.ReadFile(c.ReadyFile); err == nil {
			line, _, _ := strings.Cut(string(b), "\n")
			return strings.TrimPrefix(line, "addr="), stop
		}
		select {
		case err := <-done:
			stopped = true
			cancel()
			t.Fatalf("Run: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
	t.Fatal("not ready after 5 s")
	return "", nil
}

func TestValidate(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no listener":      {func(c *Config) { c.Listen = nil }, "at least one address"},
		"no port":          {func(c *Config) { c.Listen = []string{"127.0.0.1"} }, "want host:port"},
		"public":           {func(c *Config) { c.Listen = []string{"0.0.0.0:8888"} }, "without TLS only loopback"},
		"name":             {func(c *Config) { c.Listen = []string{"cp.example:8888"} }, "without TLS only loopback"},
		"all interfaces":   {func(c *Config) { c.Listen = []string{":8888"} }, "without TLS only loopback"},
		"public, no CA":    {func(c *Config) { c.Listen, c.TLSCert, c.TLSKey = []string{":8888"}, "c", "k" }, "--tls-client-ca"},
		"key missing":      {func(c *Config) { c.TLSCert = "c" }, "belong together"},
		"CA alone":         {func(c *Config) { c.TLSClientCA = "c" }, "needs --tls-cert"},
		"postgres":         {func(c *Config) { c.Store = "postgres://u:secret@h/db" }, "comes in a later release"},
		"unknown store":    {func(c *Config) { c.Store = "mysql://u:secret@h/db" }, "not known"},
		"tiny body":        {func(c *Config) { c.MaxBodyBytes = 1 }, "--max-body-bytes"},
		"tiny database":    {func(c *Config) { c.MaxDBBytes = 1 }, "--max-db-bytes"},
		"negative age":     {func(c *Config) { c.EventRetention = -1 }, "--event-retention"},
		"no shutdown time": {func(c *Config) { c.ShutdownTimeout = 0 }, "positive duration"},
	} {
		c := Default()
		c.StateDir = filepath.Join(t.TempDir(), "state")
		tt.change(&c)
		err := Run(t.Context(), c, io.Discard, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), tt.want) || run.Code(err) != run.Usage {
			t.Errorf("%s: error %v, code %d; want %q, code 2", name, err, run.Code(err), tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error shows a password: %v", name, err)
		}
		if _, err := os.Stat(c.StateDir); !os.IsNotExist(err) {
			t.Errorf("%s: the state directory was made", name)
		}
	}
	c := Default()
	if err := c.Validate(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
}

func TestProgram(t *testing.T) {
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--help"}, 0, "--max-db-bytes"},
		{[]string{"--version"}, 0, "autonomy-cp "},
		{[]string{"--print-config"}, 0, "max_body_bytes: 16MiB"},
		{[]string{"--nope"}, 2, "unknown flag"},
		{[]string{"extra"}, 2, "unexpected argument"},
		{[]string{"--listen", "0.0.0.0:1"}, 2, "only loopback"},
		{[]string{"--store", "postgres://x"}, 2, "later release"},
		{[]string{"--trust", "/nonexistent"}, 2, "--trust"},
	} {
		var out bytes.Buffer
		if code := Daemon().Main(tt.args, &out, &out); code != tt.code || !strings.Contains(out.String(), tt.want) {
			t.Errorf("%v: code %d, want %d with %q in\n%s", tt.args, code, tt.code, tt.want, out.String())
		}
	}
}

// TestDrain: stopping answers a waiting poll, lets a running request end, keeps
// what was acknowledged.
func TestDrain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	addr, stop := start(t, func(c *Config) { c.StateDir = dir })
	defer http.DefaultClient.CloseIdleConnections()
	resp, err := http.Post("http://"+addr+"/v1/events", "application/json",
		strings.NewReader(`{"events":[{"event_id":"e","event_type":"t","node_id":"n","timestamp":"2026-01-02T03:04:05Z"}]}`))
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%v %v", resp, err)
	}
	resp.Body.Close()
	polled := make(chan int, 1)
	go func() {
		resp, err := http.Get("http://" + addr + "/v1/releases/latest?wait=60s")
		if err != nil {
			polled <- 0
			return
		}
		resp.Body.Close()
		polled <- resp.StatusCode
	}()
	time.Sleep(100 * time.Millisecond)
	began := time.Now()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("stopping took %s", took)
	}
	if status := <-polled; status != 404 {
		t.Errorf("the waiting poll got %d", status)
	}
	addr, _ = start(t, func(c *Config) { c.StateDir = dir })
	resp, err = http.Get("http://" + addr + "/v1/events?node_id=n")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, _ := io.ReadAll(resp.Body); !bytes.Contains(b, []byte(`"event_id":"e"`)) {
		t.Errorf("after a restart: %s", b)
	}
}

func TestSecondProcessAndDamage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	_, stop := start(t, func(c *Config) { c.StateDir = dir })
	c := Default()
	c.Listen, c.StateDir = []string{"127.0.0.1:0"}, dir
	if err := Run(t.Context(), c, io.Discard, slog.New(slog.DiscardHandler)); run.Code(err) != run.Failure || !strings.Contains(err.Error(), "another process") {
		t.Errorf("second process: %v", err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cp.db"), bytes.Repeat([]byte("no database "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), c, io.Discard, slog.New(slog.DiscardHandler)); run.Code(err) != run.Integrity {
		t.Errorf("damaged store: %v, code %d, want 6", err, run.Code(err))
	}
}

// certs writes a CA, a server and a client certificate.
func certs(t *testing.T, dir string) (client tls.Certificate, pool *x509.CertPool) {
	t.Helper()
	newCert := func(name string, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: parent == nil, BasicConstraintsValid: true,
			KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if parent == nil {
			parent, parentKey = tmpl, key
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, parentKey)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		for file, block := range map[string]*pem.Block{name + ".crt": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: keyDER}} {
			if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return cert, key
	}
	ca, caKey := newCert("ca", nil, nil)
	newCert("server", ca, caKey)
	newCert("client", ca, caKey)
	client, err := tls.LoadX509KeyPair(filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key"))
	if err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AddCert(ca)
	return client, pool
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	client, pool := certs(t, dir)
	addr, _ := start(t, func(c *Config) {
		c.TLSCert, c.TLSKey, c.TLSClientCA = filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key"), filepath.Join(dir, "ca.crt")
	})
	get := func(conf *tls.Config) (int, error) {
		tr := &http.Transport{TLSClientConfig: conf}
		defer tr.CloseIdleConnections()
		resp, err := (&http.Client{Transport: tr}).Get("https://" + addr + "/v1/fleet")
		if err != nil {
			return 0, err
		}
		resp.Body.Close()
		return resp.StatusCode, nil
	}
	if status, err := get(&tls.Config{RootCAs: pool, Certificates: []tls.Certificate{client}}); err != nil || status != 200 {
		t.Errorf("with a certificate: %d %v", status, err)
	}
	if status, err := get(&tls.Config{RootCAs: pool}); err == nil {
		t.Errorf("without a certificate: %d", status)
	}
	if status, err := get(&tls.Config{RootCAs: pool, Certificates: []tls.Certificate{client}, MaxVersion: tls.VersionTLS12}); err == nil {
		t.Errorf("with TLS 1.2: %d", status)
	}
	if resp, err := http.Get("http://" + addr + "/v1/fleet"); err == nil {
		if resp.Body.Close(); resp.StatusCode == 200 {
			t.Error("plaintext on a TLS listener was answered")
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestUnixSocket: a Unix socket is local whatever Host its client sends.
func TestUnixSocket(t *testing.T) {
	dir := t.TempDir()
	sock := filepath.Join(dir, "cp.sock")
	start(t, func(c *Config) { c.Listen = append(c.Listen, "unix:"+sock) })
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", sock)
	}}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Get("http://autonomy-cp/v1/fleet")
	if err != nil {
		t.Fatal(err)
	}
	if resp.Body.Close(); resp.StatusCode != 200 {
		t.Errorf("status %d", resp.StatusCode)
	}
	if info, err := os.Stat(sock); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v, %v", info, err)
	}
}

// TestConfigFile: the file's faults are usage errors with a place and a hint.
func TestConfigFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cp.yaml")
	if err := os.WriteFile(file, []byte("stale_after: 30s\nmax_db_byts: 1GiB\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if code := Daemon().Main([]string{"--config", file}, &out, &out); code != 2 || !strings.Contains(out.String(), `:2: unknown setting "max_db_byts": did you mean "max_db_bytes"?`) {
		t.Errorf("code %d: %s", code, out.String())
	}
}
