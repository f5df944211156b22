package relay

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/pflag"

	"github.com/autonomyops/autonomy/internal/conf"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/relay/upstream"
)

// EnvPrefix is put before a setting's name in the environment.
const EnvPrefix = "AUTONOMY_RELAY_"

// Config is everything a relay can be told. Each field is one flag, environment
// variable and line of the configuration file; Defaults and Bind hold the list.
type Config struct {
	Listen        []string  // host:port or unix:PATH; beyond loopback only with TLS and client certificates
	StateDir      string    // blobs/, tmp/, prestage/, items/, lock
	Upstream      string    // https://host[:port]; http:// for loopback addresses
	MaxBytes      conf.Size // ceiling of everything under StateDir
	KeepFree      conf.Size // bytes that the relay never takes from the file system
	MinInodes     int64     // files that must stay possible on it
	Trust         string    // keyring file; without it no list is accepted
	AllowUnsigned bool      // accept lists without a signature; loopback listeners only, not with Trust
	MaxAttempts   int       // per item
	RetryPause    time.Duration
	RetryPauseMax time.Duration // the pause before the next attempt doubles from RetryPause to this
	MinRate       conf.Size     // bytes per second of the upstream
	IdleTimeout   time.Duration
	TotalTimeout  time.Duration // for one blob
	MaxConns      int           // per listener
	TLSCert       string
	TLSKey        string
	TLSClientCA   string // clients must show a certificate of this CA
	ReadyFile     string
	Shutdown      time.Duration // for running transfers
}

// Defaults are the values of a relay that is told nothing.
func Defaults() Config {
	return Config{
		Listen:        []string{"127.0.0.1:5080"},
		StateDir:      run.StateDir("relay"),
		MaxBytes:      10 << 30,
		KeepFree:      1 << 30,
		MinInodes:     1024,
		MaxAttempts:   10,
		RetryPause:    time.Second,
		RetryPauseMax: 5 * time.Minute,
		MinRate:       1 << 10,
		IdleTimeout:   30 * time.Second,
		TotalTimeout:  time.Hour,
		MaxConns:      1024,
		Shutdown:      10 * time.Second,
	}
}

// Bind defines the flags of c on fs; c holds the defaults.
func (c *Config) Bind(fs *pflag.FlagSet) {
	fs.StringArrayVar(&c.Listen, "listen", c.Listen, "serve on `ADDR`: host:port or unix:PATH; repeatable; beyond loopback only with TLS and client certificates")
	fs.StringVar(&c.StateDir, "state-dir", c.StateDir, "keep content and lists in `DIR`, on a local file system")
	fs.StringVar(&c.Upstream, "upstream", c.Upstream, "pull declared content from the registry at `URL` (https, or http on loopback)")
	fs.Var(&c.MaxBytes, "max-bytes", "ceiling of the state directory on disk; at it, content is refused")
	fs.Var(&c.KeepFree, "keep-free", "space of the file system that the relay never takes")
	fs.Int64Var(&c.MinInodes, "min-inodes", c.MinInodes, "files that must stay possible on the file system")
	fs.StringVar(&c.Trust, "trust", c.Trust, "accept prestage lists signed by the release keys in `KEYRING`")
	fs.BoolVar(&c.AllowUnsigned, "allow-unsigned-prestage", c.AllowUnsigned, "accept unsigned prestage lists; for development, on loopback only")
	fs.IntVar(&c.MaxAttempts, "max-attempts", c.MaxAttempts, "attempts per prestage item; then it waits for a list with a higher sequence")
	fs.DurationVar(&c.RetryPause, "retry-pause", c.RetryPause, "time before the second attempt; it doubles with each")
	fs.DurationVar(&c.RetryPauseMax, "retry-pause-max", c.RetryPauseMax, "longest time between attempts")
	fs.Var(&c.MinRate, "min-rate", "bytes per second below which a transfer from the upstream is given up")
	fs.DurationVar(&c.IdleTimeout, "idle-timeout", c.IdleTimeout, "longest wait for the upstream's next byte")
	fs.DurationVar(&c.TotalTimeout, "total-timeout", c.TotalTimeout, "longest transfer of one blob, resumes included")
	fs.IntVar(&c.MaxConns, "max-connections", c.MaxConns, "open connections per listener; more wait")
	fs.StringVar(&c.TLSCert, "tls-cert", c.TLSCert, "serve TLS with the certificate chain in PEM `FILE`")
	fs.StringVar(&c.TLSKey, "tls-key", c.TLSKey, "private key of --tls-cert, PEM `FILE`")
	fs.StringVar(&c.TLSClientCA, "tls-client-ca", c.TLSClientCA, "demand client certificates of the CA in PEM `FILE`")
	fs.StringVar(&c.ReadyFile, "ready-file", c.ReadyFile, "write the addresses to `FILE` when ready")
	fs.DurationVar(&c.Shutdown, "shutdown-timeout", c.Shutdown, "time for running transfers at SIGTERM")
}

// Validate reports every fault at once, as usage errors.
func (c *Config) Validate() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if len(c.Listen) == 0 {
		fault("--listen: at least one address is needed")
	}
	tls := c.TLSCert != ""
	for _, a := range c.Listen {
		if !run.Loopback(a) && (!tls || c.TLSClientCA == "") {
			fault("--listen %s: other machines can reach this address: give --tls-cert, --tls-key and --tls-client-ca, so that each side knows the other, or use 127.0.0.1:PORT or unix:PATH", a)
		}
		if !run.Loopback(a) && c.AllowUnsigned {
			fault("--listen %s: --allow-unsigned-prestage is for loopback addresses and Unix sockets only", a)
		}
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		fault("--tls-cert and --tls-key go together")
	}
	if c.TLSClientCA != "" && !tls {
		fault("--tls-client-ca needs --tls-cert and --tls-key")
	}
	if c.Trust != "" && c.AllowUnsigned {
		fault("--trust and --allow-unsigned-prestage exclude each other")
	}
	if c.StateDir == "" {
		fault("--state-dir is needed: no home directory is known")
	}
	if c.Upstream == "" {
		fault("--upstream is needed, as in --upstream https://registry.example.com")
	} else if u, err := upstream.New(upstream.Config{URL: c.Upstream}); err != nil {
		fault("--upstream: %w", err)
	} else {
		u.Close()
	}
	if c.MaxBytes < 64<<10 {
		fault("--max-bytes is %s, want at least 64KiB", c.MaxBytes)
	}
	if c.KeepFree < 0 || c.MinInodes < 0 {
		fault("--keep-free and --min-inodes: want at least 0")
	}
	if c.MaxAttempts < 1 || c.MaxAttempts > 1000 {
		fault("--max-attempts is %d, want 1 to 1000", c.MaxAttempts)
	}
	if c.RetryPause <= 0 || c.RetryPauseMax < c.RetryPause {
		fault("--retry-pause is %s and --retry-pause-max %s: want more than 0, and the second not below the first", c.RetryPause, c.RetryPauseMax)
	}
	if c.MinRate < 1 || c.IdleTimeout <= 0 || c.TotalTimeout <= 0 {
		fault("--min-rate, --idle-timeout and --total-timeout: want more than 0")
	}
	if c.MaxConns < 1 {
		fault("--max-connections is %d, want at least 1", c.MaxConns)
	}
	if c.Shutdown < 0 {
		fault("--shutdown-timeout is %s, want at least 0s", c.Shutdown)
	}
	return run.Exit(run.Usage, errors.Join(faults...))
}
