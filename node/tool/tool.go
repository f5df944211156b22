// Package tool holds the tools of a node: their definitions, as tools.yaml
// gives them, and the registry through which node/call runs them.
//
// Life of a tool: Load reads tools.yaml strictly and builds one Tool per kind,
// its JSON Schema compiled, its definition hashed. A caller's params are
// checked with Validate before policy sees them; when policy has allowed the
// call and the decision is durable, Registry.Execute runs the Executor behind
// the tool within the narrowest of four limits: the tool's own, the caller's,
// the policy's constraints, the context's. Nothing else starts a tool.
//
// A tool can be refused at this last step (OutcomeDenied): the policy judged the
// words of the call, the executor sees what they mean, such as the address that
// a host name resolves to.
//
// Units: durations are time.Duration, sizes are bytes. A Registry and its Tools
// are immutable after Load and safe for concurrent use; reloading makes another.
//
// Only node, node/call, node/httpapi, node/mcp and the CLI's lock command may
// import this package; only node/call may call Registry.Execute (INV-14).
package tool

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/gowebpki/jcs"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/autonomyops/autonomy/assurance/sandbox"
	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/node/tool/executor"
	"github.com/autonomyops/autonomy/node/tool/httptool"
	"github.com/autonomyops/autonomy/node/tool/mcptool"
)

// The vocabulary of package executor, under the name that callers use.
type (
	Request  = executor.Request
	Result   = executor.Result
	Outcome  = executor.Outcome
	Progress = executor.Progress
	Executor = executor.Executor
)

// Outcomes.
const (
	OutcomeOK      = executor.OK
	OutcomeError   = executor.Error
	OutcomeTimeout = executor.Timeout
	OutcomeKilled  = executor.Killed
	OutcomeDenied  = executor.Denied
)

// Codes that the registry itself gives; each kind of tool documents its own.
const (
	CodePanic         = "internal"           // the executor panicked: a fault of ours
	CodeOutputInvalid = "output_invalid"     // not a JSON object in UTF-8
	CodeOutputTooBig  = "output_too_large"   // over executor.MaxOutput
	CodeConstraint    = "constraint_refused" // policy set a limit that cannot be kept here
)

// Limits of a tool unless tools.yaml says otherwise.
const (
	DefaultTimeout = 30 * time.Second // wall time of one call
	MaxTimeout     = time.Hour        // the most that tools.yaml may give
	MaxSchemaBytes = 256 << 10        // of an input schema
)

// Tool is one definition. Callers must not change it.
type Tool struct {
	Kind        string          // "tool.exec.word_count"
	Description string          // for the agent
	InputSchema json.RawMessage // JSON Schema 2020-12 of the params object
	Digest      string          // "sha256:" + 64 hex over the RFC 8785 form of {"description","input_schema","kind"}; see pin
	Timeout     time.Duration   // wall time of one call, at most
	MCPName     string          // what MCP clients call it; "": as Kind

	schema *jsonschema.Schema
	quick  *acceptor // nil: the schema has what only the library knows
	exec   Executor
}

// Name is what MCP clients call the tool.
func (t *Tool) Name() string { return cmp.Or(t.MCPName, t.Kind) }

// Definition is what Digest is computed over.
type definition struct {
	Description string          `json:"description"`
	InputSchema json.RawMessage `json:"input_schema"`
	Kind        string          `json:"kind"`
	Upstream    string          `json:"upstream,omitempty"` // digest of what the MCP server says of it
}

func (d definition) digest() (string, error) {
	def, err := json.Marshal(d)
	if err != nil {
		return "", fmt.Errorf("tool %s: definition: %w", d.Kind, err)
	}
	canonical, err := jcs.Transform(def)
	if err != nil {
		return "", fmt.Errorf("tool %s: definition: %w", d.Kind, err)
	}
	sum := sha256.Sum256(canonical)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

// pin makes what an upstream says of its tool part of the digest, beyond what is
// shown to agents: {"description","input_schema","kind","upstream"}.
func (t *Tool) pin(upstream string) (err error) {
	t.Digest, err = definition{t.Description, t.InputSchema, t.Kind, upstream}.digest()
	return err
}

// New makes a Tool: it compiles the schema and computes the digest. A schema
// that does not compile, or that refers to another document, is an error.
func New(kind, description string, schema json.RawMessage, timeout time.Duration, e Executor) (*Tool, error) {
	if len(schema) > MaxSchemaBytes {
		return nil, fmt.Errorf("tool %s: input schema: %d bytes, at most %d", kind, len(schema), MaxSchemaBytes)
	}
	if err := strictjson.CheckObject(schema); err != nil {
		return nil, fmt.Errorf("tool %s: input schema: %w", kind, err)
	}
	digest, err := definition{Description: description, InputSchema: schema, Kind: kind}.digest()
	if err != nil {
		return nil, err
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(schema))
	if err != nil {
		return nil, fmt.Errorf("tool %s: input schema: %w", kind, err)
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.UseLoader(noLoader{})
	c.AssertFormat()            // a schema that says "format": "uri" means it
	const url = "tool:///input" // with a path: a relative reference leads elsewhere, to noLoader
	if err := c.AddResource(url, doc); err != nil {
		return nil, fmt.Errorf("tool %s: input schema: %w", kind, err)
	}
	compiled, err := c.Compile(url)
	if err != nil {
		return nil, fmt.Errorf("tool %s: input schema: %w", kind, err)
	}
	return &Tool{Kind: kind, Description: description, InputSchema: schema, Timeout: timeout,
		Digest: digest, schema: compiled, quick: newAcceptor(doc), exec: e}, nil
}

// noLoader keeps a schema from reading files or the network.
type noLoader struct{}

func (noLoader) Load(url string) (any, error) {
	return nil, fmt.Errorf("reference to %s: a tool's schema stands alone", url)
}

// ErrParams is wrapped by every error of Validate.
var ErrParams = errors.New("invalid params")

// Validate checks params, one strict JSON object, against the tool's schema.
// The error names the path of the first faults, as in
//
//	invalid params: /endpoint: got number, want string
func (t *Tool) Validate(params []byte) error {
	if t.quick != nil && len(params) > 0 && params[0] == '{' && t.quick.accept(params) {
		return nil
	}
	if err := strictjson.CheckObject(params); err != nil {
		return fmt.Errorf("%w: %w", ErrParams, err)
	}
	if err := checkNumbers(params); err != nil {
		return fmt.Errorf("%w: %w", ErrParams, err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(params))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrParams, err)
	}
	err = t.schema.Validate(doc)
	if err == nil {
		return nil
	}
	var ve *jsonschema.ValidationError
	if !errors.As(err, &ve) {
		return fmt.Errorf("%w: %w", ErrParams, err)
	}
	var faults []string
	for _, u := range ve.BasicOutput().Errors {
		if u.Error == nil || len(faults) == maxFaults {
			continue
		}
		text := u.Error.String()
		if len(text) > maxFaultText {
			text = strings.ToValidUTF8(text[:maxFaultText], "") + "…"
		}
		faults = append(faults, cmp.Or(u.InstanceLocation, "/")+": "+text)
	}
	return fmt.Errorf("%w: %s", ErrParams, strings.Join(faults, "; "))
}

// What Validate tells at most: faults, and bytes of each.
const (
	maxFaults    = 4
	maxFaultText = 256
)

// Unenforceable names the limits of c that the tool cannot keep, "" for none.
// The pipeline asks before it records an allow; Execute refuses them all the
// same. What a tool has no part in, such as the processes of one that starts
// none, it keeps; memory and processor time of one that runs inside the node
// are the node's own, which nothing holds to a call's limit.
func (t *Tool) Unenforceable(c constraint.Constraints) string {
	if e, ok := t.exec.(interface {
		Unenforceable(constraint.Constraints) string
	}); ok {
		return e.Unenforceable(c)
	}
	var names []string
	if c.MemoryMax != 0 {
		names = append(names, "memory_max")
	}
	if c.CPUMax != "" {
		names = append(names, "cpu_max")
	}
	return strings.Join(names, ", ")
}

// Options are what Load needs beside the file. The zero value is right for the
// node.
type Options struct {
	Resolver httptool.Resolver // nil: the system's
	Sandbox  *sandbox.Sandbox  // confines programs; nil: they are held by a process group only
	Logger   *slog.Logger      // nil: nothing is logged
	Restarts *Restarts         // of upstream MCP servers; nil: counted in memory
}

// Registry is the set of tools of a node.
type Registry struct {
	tools  map[string]*Tool
	sorted []*Tool
	log    *slog.Logger
	closer []func() error

	upstreams []*mcptool.Server
}

// Lookup finds a tool by its kind.
func (r *Registry) Lookup(kind string) (*Tool, bool) {
	t, ok := r.tools[kind]
	return t, ok
}

// List returns the tools sorted by kind. The slice is the caller's, the tools
// are shared.
func (r *Registry) List() []*Tool { return slices.Clone(r.sorted) }

// Retire says that another registry has taken over: upstream MCP servers end as
// soon as no call runs on them. Calls that come late still work.
func (r *Registry) Retire() {
	for _, s := range r.upstreams {
		s.Retire()
	}
}

// Close releases what the tools hold: directories, upstream MCP servers and
// their processes. Calls must have ended.
func (r *Registry) Close() error {
	var wg sync.WaitGroup
	for _, s := range r.upstreams {
		wg.Go(s.Close)
	}
	wg.Wait()
	var errs []error
	for _, c := range r.closer {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}

// Execute runs t for req within the narrowest limit of time. It does not panic:
// a panic of the executor becomes an error. Output is checked: whatever the
// tool made, what leaves here is a JSON object in valid UTF-8 within
// executor.MaxOutput, or none.
func (r *Registry) Execute(ctx context.Context, t *Tool, req *Request) (res Result) {
	limit := t.Timeout
	if req.Timeout > 0 {
		limit = min(limit, req.Timeout)
	}
	if ms := req.Constraints.TimeoutMS; ms != 0 {
		if ms < 0 {
			return executor.Deny(CodeConstraint, fmt.Sprintf("policy set timeout_ms to %d, want a positive number", ms))
		}
		if ms < int64(limit/time.Millisecond) {
			limit = time.Duration(ms) * time.Millisecond
		}
	}
	if n := req.Constraints.OutputMaxBytes; n < 0 {
		return executor.Deny(CodeConstraint, fmt.Sprintf("policy set output_max_bytes to %d, want a positive number", n))
	}
	if c := t.Unenforceable(req.Constraints); c != "" {
		return executor.Deny(CodeConstraint, fmt.Sprintf("policy limits this call by %s, which this tool cannot keep", c))
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			r.log.Error("tool panicked", "kind", t.Kind, "audit_id", req.AuditID, "panic", p, "stack", string(debug.Stack()))
			res = executor.Fail(CodePanic, "the tool failed inside; the node's log has the cause")
		}
	}()
	if ctx.Err() != nil {
		return executor.Stopped(ctx)
	}
	res = t.exec.Execute(ctx, req)
	res.Message = strings.ToValidUTF8(res.Message, "\uFFFD")
	switch {
	case res.Output == nil:
	case len(res.Output) > executor.MaxOutput:
		return executor.Fail(CodeOutputTooBig, fmt.Sprintf("the tool's output has %d bytes, at most %d are kept: lower its output limit in tools.yaml", len(res.Output), executor.MaxOutput))
	case !utf8.Valid(res.Output) || !json.Valid(res.Output) || res.Output[0] != '{':
		return executor.Fail(CodeOutputInvalid, "the tool's output is no JSON object in UTF-8")
	}
	return res
}
