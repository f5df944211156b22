package export

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// sender delivers one framed request. It is used by one goroutine at a time,
// and takes references of its own for what it reads after send has returned.
type sender interface {
	// send returns how many records were rejected for ever, and why. An error
	// that wraps errPermanent is one that no retry of the same records can
	// change; wait is the server's wish, 0 when it has none.
	send(ctx context.Context, f *frame) (rejected int64, why string, wait time.Duration, err error)
	close() error
}

// errPermanent marks refusals of the records themselves. An endpoint that does
// not know the method, the path or the compression is set up wrongly: no record
// is at fault, and none is given up for it.
var errPermanent = errors.New("the endpoint refuses the records")

// maxResponse bounds an endpoint's answer, in bytes.
const maxResponse = 64 << 10

// grpcSender speaks OTLP/gRPC.
type grpcSender struct {
	conn     *grpc.ClientConn
	compress string // "": none
}

const exportMethod = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"

func (g *grpcSender) send(ctx context.Context, f *frame) (int64, string, time.Duration, error) {
	var out []byte
	opts := make([]grpc.CallOption, 0, 1)
	if g.compress != "" {
		opts = append(opts, grpc.UseCompressor(g.compress))
	}
	err := g.conn.Invoke(ctx, exportMethod, f, &out, opts...)
	if err == nil {
		n, why, err := partial(out)
		return n, why, 0, err
	}
	st := status.Convert(err)
	wait := retryInfo(st)
	switch st.Code() {
	case codes.InvalidArgument, codes.OutOfRange, codes.DataLoss:
		return 0, "", 0, fmt.Errorf("%w: %w", errPermanent, err)
	case codes.ResourceExhausted:
		// Also the answer of a receiver that is out of room for now. The request
		// itself is too large only when the server says so.
		if wait == 0 && tooLarge(st.Message()) {
			return 0, "", 0, fmt.Errorf("%w: %w", errPermanent, err)
		}
	case codes.Unimplemented:
		if g.compress != "" {
			err = fmt.Errorf("%w (it may not read %s: going on without)", err, g.compress)
			g.compress = ""
		}
	}
	return 0, "", wait, err
}

// retryInfo is the delay of a google.rpc.RetryInfo among the details, whose only
// field is a Duration; 0: none.
func retryInfo(st *status.Status) time.Duration {
	for _, d := range st.Proto().GetDetails() {
		if !strings.HasSuffix(d.GetTypeUrl(), "/google.rpc.RetryInfo") {
			continue
		}
		num, typ, n := protowire.ConsumeTag(d.GetValue())
		if n < 0 || num != 1 || typ != protowire.BytesType {
			continue
		}
		var delay durationpb.Duration
		if p, m := protowire.ConsumeBytes(d.GetValue()[n:]); m >= 0 && proto.Unmarshal(p, &delay) == nil {
			return max(delay.AsDuration(), 0)
		}
	}
	return 0
}

// tooLarge recognizes how the common gRPC servers say that a message is above
// their limit: there is no code for it.
func tooLarge(message string) bool {
	message = strings.ToLower(message)
	return strings.Contains(message, "larger than max") || strings.Contains(message, "exceeds maximum size")
}

func (g *grpcSender) close() error { return g.conn.Close() }

// frameCodec hands a frame to grpc as it is, and the answer's bytes over.
type frameCodec struct{}

func (frameCodec) Name() string { return "proto" }

func (frameCodec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return nil, fmt.Errorf("frame codec: want a *frame, have %T", v)
	}
	return f.buffers(), nil
}

func (frameCodec) Unmarshal(data mem.BufferSlice, v any) error {
	out, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("frame codec: want a *[]byte, have %T", v)
	}
	*out = data.Materialize()
	return nil
}

// partial reads an ExportLogsServiceResponse.
func partial(data []byte) (int64, string, error) {
	var resp collogs.ExportLogsServiceResponse
	if err := proto.Unmarshal(data, &resp); err != nil {
		return 0, "", fmt.Errorf("the endpoint's answer is no ExportLogsServiceResponse: %w", err)
	}
	ps := resp.GetPartialSuccess()
	return ps.GetRejectedLogRecords(), ps.GetErrorMessage(), nil
}

// httpSender speaks OTLP/HTTP with protobuf bodies. Uncompressed ones are
// streamed from the frame.
type httpSender struct {
	url      string
	client   *http.Client
	compress *compressor // nil: none
}

func (h *httpSender) send(ctx context.Context, f *frame) (int64, string, time.Duration, error) {
	var content io.ReadCloser
	size := f.size
	if h.compress != nil {
		packed, err := h.compress.pack(f)
		if err != nil {
			return 0, "", 0, err
		}
		content, size = packed, packed.r.Len()
	} else {
		content = f.body()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url, content)
	if err != nil {
		return 0, "", 0, errors.Join(err, content.Close())
	}
	req.ContentLength = int64(size)
	req.Header.Set("Content-Type", "application/x-protobuf")
	if h.compress != nil {
		req.Header.Set("Content-Encoding", h.compress.name)
	} else {
		// The frame can be read again, on another connection when the first
		// one was closed under the request.
		req.GetBody = func() (io.ReadCloser, error) { return f.body(), nil }
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return 0, "", 0, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse))
	if err != nil {
		return 0, "", 0, fmt.Errorf("read the endpoint's answer: %w", err)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		n, why, err := partial(data)
		return n, why, 0, err
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusInsufficientStorage:
		return 0, "", retryAfter(resp.Header.Get("Retry-After")), fmt.Errorf("the endpoint answered %s", resp.Status)
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
		return 0, "", 0, fmt.Errorf("%w: %s%s", errPermanent, resp.Status, detail(data))
	case http.StatusUnsupportedMediaType:
		if h.compress != nil {
			name := h.compress.name
			h.compress = nil
			return 0, "", 0, fmt.Errorf("the endpoint answered %s (it may not read %s: going on without)", resp.Status, name)
		}
	}
	return 0, "", 0, fmt.Errorf("the endpoint answered %s%s", resp.Status, detail(data))
}

// retryAfter reads the header's two forms; 0: none.
func retryAfter(v string) time.Duration {
	if secs, err := strconv.ParseUint(v, 10, 31); err == nil {
		return time.Duration(secs) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(time.Until(at), 0)
	}
	return 0
}

// maxDetail bounds what is taken over from a problem document, in bytes.
const maxDetail = 512

// detail is the problem document's detail, when there is one.
func detail(data []byte) string {
	var p struct{ Detail string }
	if json.Unmarshal(data, &p) != nil || p.Detail == "" {
		return ""
	}
	return ": " + strings.ToValidUTF8(p.Detail[:min(len(p.Detail), maxDetail)], "")
}

func (h *httpSender) close() error {
	h.client.CloseIdleConnections()
	return nil
}
