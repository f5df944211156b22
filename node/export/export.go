// Package export ships the node's log: it tails the durable records, frames
// them as OTLP logs, sends them to one endpoint and moves the log's cursors
// when, and only when, the endpoint has taken them.
//
// # The life of a batch
//
// A wal.Reader hands out views of the log's mapping; collect gathers up to
// BatchRecords of them; newFrame lays an ExportLogsServiceRequest around them;
// a sender gives it to grpc or net/http; the cursors move; the views are
// released. A record's bytes are never decoded or encoded again on the way.
// Records below viewFrom are copied, once, behind their heads into a pooled
// buffer, larger ones are handed over where they stand. Both libraries may read
// a request after the call has returned, so a frame counts its readers, and a
// slot of the log is not used again while one of them has a view of it.
//
// # Delivery
//
// At least once: after a crash between the endpoint's answer and the cursor the
// same records go out again, and their event ids let the receiver drop them.
// Records that the endpoint refuses for ever (InvalidArgument, 400, 413, a
// partial success …) are counted, told to OnRejected, and passed; a log.refused
// record goes out under their number, so that it is not missed. They stay in
// the log until it needs the space. An endpoint that does not know the method,
// the path or the compression is set up wrongly: nothing is given up for that.
//
// Records that are not in the log have stand-ins, so that the receiver sees every
// number: log.void for one that its writer cut off, log.lost for each that
// wal.Repair found gone, in requests of the usual size.
//
// # Order
//
// While at most one batch is behind, records go out in the log's order. When
// there is more, as after an outage, errors go first, then decisions, then
// actions and lifecycle records, each kind in the log's order, and each with its
// own cursor: the cursor of a class never passes a record of that class that was
// not taken, also when the node is killed in between. A receiver sees gaps
// meanwhile, and its watermark stands still until they are filled. New errors
// wait for one request at most, and decisions that keep coming do not starve the
// rest (byUrgency).
//
// # Retries
//
// They are bounded, on disk (INV-12). Each attempt is counted in StateFile
// before it is made, from the second on and for the first after a start. The
// wait after it doubles from MinBackoff to MaxBackoff (plus up to a tenth), or is
// what the endpoint wishes, up to MaxBackoff. The count ends when the batch that
// failed first is delivered; another batch's success, a reconnect or a restart
// changes neither count nor wait. After MaxAttempts, by default 24 hours of an
// endpoint that is away, the state is Exhausted, and nothing is sent until an
// operator acts: Resume, another endpoint, or a larger MaxAttempts.
//
// Exhaustion loses no record: cursors stay, so the log keeps everything, and the
// node goes on deciding and recording until the log is at its ceiling, where it
// denies calls. How long that is is a matter of --wal-max-bytes. It also means
// that a control plane that comes back after days finds a node that must be told
// to go on. That is on purpose: an endpoint that is away that long is gone,
// moved or refuses this node, and someone has to look; the alternative is a
// fleet that knocks for ever. Where absences of days are the rule (ships,
// air-gapped sites) MaxAttempts is to be set for the longest one expected:
// AttemptsFor computes it. Nothing is lost either way as long as the log has
// room.
//
// # The control plane's watermark
//
// An endpoint's acknowledgement is not durability: a collector may take records
// and lose them. Where a control plane is configured the log is trimmed by its
// watermark (wal.SetWatermark) and Exporter.SetWatermark is told the same. When
// that stands behind the cursors without moving for ResendAfter, the records
// above it are sent again: one pass, in batches, between which the main stream
// goes on, then again after twice the time, at most an hour, at most MaxResends
// passes until it moves (counted in StateFile). Then Status.NotHeld says so; the
// log keeps the records.
//
// Concurrency: Run owns everything but Status, SetWatermark, Resume and
// WriteMetrics, which may be called from any goroutine. Memory: one request
// (BatchBytes, or one larger record) plus what grpc or net/http still reads.
package export

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/wal"
)

// Defaults of Options.
const (
	DefaultBatchRecords = 512
	DefaultBatchBytes   = 1 << 20
	DefaultTimeout      = 10 * time.Second
	DefaultMinBackoff   = 100 * time.Millisecond
	DefaultMaxBackoff   = 15 * time.Second
	DefaultResendAfter  = 5 * time.Minute
	DefaultMaxResends   = 10

	coveredOutage = 24 * time.Hour // by the default of MaxAttempts
)

// Options configure an Exporter. Zero values mean the defaults.
type Options struct {
	Log      *wal.Log
	Endpoint string // grpc://HOST:PORT, grpcs://HOST:PORT, http(s)://… (the whole URL of the logs path)
	Resource otlp.Resource
	Logger   *slog.Logger

	// Compression of requests: none, gzip or zstd. Empty: gzip for HTTP and for
	// gRPC beyond this machine, none for gRPC on loopback. An endpoint that
	// refuses it (415, Unimplemented) is sent to without, until the next start.
	Compression string
	// TLS is for https and grpcs; nil: the system's roots, no client certificate.
	TLS *tls.Config
	// StateFile keeps attempts and backoff across restarts. Empty: they are not
	// kept, which is for tests and one-off tools.
	StateFile string

	BatchRecords int           // records per request
	BatchBytes   int           // bytes of records per request; a larger record goes alone
	Timeout      time.Duration // of one request
	MinBackoff   time.Duration // the wait after the first failure
	MaxBackoff   time.Duration // the longest; up to a tenth is added
	MaxAttempts  int           // failed attempts until Exhausted; default: AttemptsFor 24 hours
	ResendAfter  time.Duration // how long the watermark may stand behind the cursors
	MaxResends   int           // passes without progress of the watermark

	// OnRejected is told of records that the endpoint refused for ever. May be nil.
	OnRejected func(first, last uint64, count int64, why string)
	// OnExhausted is told when delivery ends until an operator acts. May be nil.
	OnExhausted func(why string)
}

// States of an Exporter.
const (
	Starting   = "starting"
	Delivering = "delivering"
	Retrying   = "retrying"
	Exhausted  = "exhausted" // nothing is sent until Resume
)

// Status is what GET /v1/status shows of the exporter.
type Status struct {
	Endpoint    string    `json:"endpoint"`
	State       string    `json:"state"`           // starting, delivering, retrying, exhausted
	Delivered   uint64    `json:"delivered_seq"`   // every record up to it was taken, or refused for ever
	Pending     uint64    `json:"pending_records"` // durable ones above Delivered, some of which may be delivered already
	Rejected    int64     `json:"rejected_records"`
	Attempts    int       `json:"attempts"` // failed ones, since the oldest batch that is not delivered
	MaxAttempts int       `json:"max_attempts"`
	Exhausted   string    `json:"exhausted,omitempty"` // why nothing is sent
	Watermark   uint64    `json:"watermark,omitempty"` // the control plane holds everything up to it
	Resends     int       `json:"resends,omitempty"`   // passes since the watermark moved
	NotHeld     string    `json:"not_held,omitempty"`  // passes are used up
	LastError   string    `json:"last_error,omitempty"`
	LastOK      time.Time `json:"last_success,omitzero"`
}

// Exporter delivers a log to one endpoint.
type Exporter struct {
	o        Options
	endpoint string // without secrets
	framer   *otlp.Framer
	sender   sender
	set      *metrics.Set
	sent     *metrics.Counter
	failed   *metrics.Counter
	rejected *metrics.Counter
	resent   *metrics.Counter
	wake     chan struct{} // by Resume, capacity 1

	// Run's own.
	lanes []lane
	chunk chunk
	re    resend

	mu        sync.Mutex // guards what follows; held over writes of StateFile
	status    Status
	led       ledger
	marked    bool // SetWatermark was called
	watermark uint64
}

// New checks the options. It does not connect.
func New(o Options) (*Exporter, error) {
	u, err := url.Parse(o.Endpoint)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("export endpoint %q: want grpc://HOST:PORT or http://HOST:PORT/PATH", o.Endpoint)
	}
	isGRPC := u.Scheme == "grpc" || u.Scheme == "grpcs"
	if !isGRPC && u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("export endpoint %q: want the scheme grpc, grpcs, http or https", o.Endpoint)
	}
	switch {
	case o.Compression == "" && isGRPC && run.Loopback(u.Host):
		o.Compression = "none"
	case o.Compression == "":
		o.Compression = "gzip"
	case !slices.Contains(Compressions, o.Compression):
		return nil, fmt.Errorf("export compression %q: want one of %v", o.Compression, Compressions)
	}
	o.BatchRecords = def(o.BatchRecords, DefaultBatchRecords)
	o.BatchBytes = def(o.BatchBytes, DefaultBatchBytes)
	o.Timeout = def(o.Timeout, DefaultTimeout)
	o.MinBackoff = def(o.MinBackoff, DefaultMinBackoff)
	o.MaxBackoff = max(def(o.MaxBackoff, DefaultMaxBackoff), o.MinBackoff)
	o.MaxAttempts = def(o.MaxAttempts, AttemptsFor(coveredOutage, o.MinBackoff, o.MaxBackoff))
	o.ResendAfter = def(o.ResendAfter, DefaultResendAfter)
	o.MaxResends = def(o.MaxResends, DefaultMaxResends)
	if o.OnRejected == nil {
		o.OnRejected = func(uint64, uint64, int64, string) {}
	}
	if o.OnExhausted == nil {
		o.OnExhausted = func(string) {}
	}
	e := &Exporter{o: o, endpoint: u.Redacted(), framer: otlp.NewFramer(o.Resource), set: metrics.NewSet(), wake: make(chan struct{}, 1)}
	e.status = Status{Endpoint: e.endpoint, State: Starting, MaxAttempts: o.MaxAttempts}
	e.sent = e.set.NewCounter("autonomy_node_export_records_total")
	e.failed = e.set.NewCounter("autonomy_node_export_failures_total")
	e.rejected = e.set.NewCounter("autonomy_node_export_rejected_records_total")
	e.resent = e.set.NewCounter("autonomy_node_export_resent_records_total")
	e.set.NewGauge("autonomy_node_export_pending_records", func() float64 { return float64(e.Status().Pending) })
	e.set.NewGauge("autonomy_node_export_exhausted", func() float64 {
		if e.Status().State == Exhausted {
			return 1
		}
		return 0
	})
	compress := compressors[o.Compression] // nil for none
	if !isGRPC {
		tr := http.DefaultTransport.(*http.Transport).Clone()
		tr.Proxy = nil
		tr.TLSClientConfig = o.TLS.Clone()
		e.sender = &httpSender{url: u.String(), compress: compress, client: &http.Client{Transport: tr,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
		return e, nil
	}
	creds := insecure.NewCredentials()
	if u.Scheme == "grpcs" {
		conf := &tls.Config{MinVersion: tls.VersionTLS13}
		if o.TLS != nil {
			conf = o.TLS.Clone()
		}
		creds = credentials.NewTLS(conf)
	}
	conn, err := grpc.NewClient("passthrough:///"+u.Host, grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(frameCodec{}), grpc.MaxCallRecvMsgSize(maxResponse)))
	if err != nil {
		return nil, fmt.Errorf("export endpoint %s: %w", e.endpoint, err)
	}
	s := &grpcSender{conn: conn}
	if compress != nil {
		s.compress = compress.name
	}
	e.sender = s
	return e, nil
}

func def[T int | time.Duration](v, d T) T {
	if v == 0 {
		return d
	}
	return v
}

// AttemptsFor is the MaxAttempts that covers an outage of that length: the waits
// alone fill it, the attempts themselves come on top.
func AttemptsFor(outage, minBackoff, maxBackoff time.Duration) int {
	n, sum, d := 1, time.Duration(0), minBackoff
	for ; d < maxBackoff && sum < outage; n++ {
		sum += d
		d *= 2
	}
	return n + int((outage-min(sum, outage))/maxBackoff) + 1
}

// Status returns a copy.
func (e *Exporter) Status() Status {
	e.mu.Lock()
	s := e.status
	s.Watermark = e.watermark
	e.mu.Unlock()
	if d := e.o.Log.Durable(); d > s.Delivered {
		s.Pending = d - s.Delivered
	}
	return s
}

// WriteMetrics writes the exporter's metrics.
func (e *Exporter) WriteMetrics(w io.Writer) { e.set.WritePrometheus(w) }

// Run delivers until ctx ends. Errors of the endpoint are retried, errors of
// the log end it. It is called once.
func (e *Exporter) Run(ctx context.Context) error {
	defer e.sender.close()
	e.lanes = newLanes(e.o.Log)
	e.load()
	e.noteDelivered()
	behind := !e.together()
	for {
		if !e.gate(ctx.Done()) {
			return nil // ctx ended; what was not acknowledged goes out again after the next start
		}
		busy, err := e.again(ctx)
		if err == nil {
			if behind {
				err = e.byUrgency(ctx)
				behind = !e.together()
			} else {
				behind, err = e.inOrder(ctx, busy)
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("export: %w", err)
		}
	}
}
