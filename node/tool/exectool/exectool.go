// Package exectool runs programs: tool.exec.<name>, whose command line is a
// template, and tool.shell, which hands one string to /bin/sh -c and exists so
// that a policy can deny it.
//
// A template is a list of arguments. A slot, {name}, takes one param; its type
// is fixed in tools.yaml and becomes the tool's JSON Schema. There is no shell
// and no word splitting: one template element is one argument, always. A slot
// that is an element by itself refuses a value that begins with '-', unless it
// stands after the element "--": otherwise a file name could be an option.
// The program, argv[0], is an absolute path without a slot.
//
// Life of a call: build argv → narrow what the tool may do by what policy allows
// for this call → start in the sandbox (assurance/sandbox), with the declared
// environment, working directory, standard input and secrets, and no other
// descriptor → wait → kill what is left → collect. At the end of the context
// everything gets SIGKILL at once: a tool has no claim to a grace period.
// Standard output and error are read to the end and kept up to the limit.
// Without a sandbox (nil in Config) there is a process group only; a process
// that leaves it (setsid) is then not found, and Execute returns after
// sandbox.DrainDelay all the same.
//
// fs and egress are lists of what the program may see and reach beside the
// system's own programs: the tool's in tools.yaml, and policy's. What both allow
// holds. The program and its working directory are always seen, read-only.
//
// The output is {"exit_code","stdout","stderr"}, with "stdout_encoding":
// "base64" for what is no UTF-8 text, and "truncated": true when either stream
// was cut. An exit code other than 0 is the error exit_nonzero.
//
// Limits that the sandbox cannot keep on this platform are refused, not ignored:
// what a decision claims is what happens (INV-05). Usage and refused attempts go
// into Result.Confinement, for the action record.
//
// Units: bytes, time.Duration. A Tool is immutable and safe for concurrent use.
package exectool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/autonomyops/autonomy/assurance/sandbox"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

// Codes of results.
const (
	CodeExitNonzero = "exit_nonzero"       // error: the program ended with another code than 0
	CodeSignal      = "signal"             // error: a signal ended the program
	CodeStart       = "start_failed"       // error: the program could not be started
	CodeParams      = "params_refused"     // error: params do not fit the template
	CodeArgument    = "argument_denied"    // denied: a value that would be read as an option
	CodeConstraint  = "constraint_refused" // denied: a limit that cannot be kept here
	CodeConfine     = "confine_failed"     // denied: the sandbox could not be set up, so the program was not started
	CodeMemory      = "memory_exceeded"    // error: the program needed more memory than it may have
)

// Limits.
const (
	DefaultOutputMax = 64 << 10                // bytes kept of each of stdout and stderr, unless configured
	MaxOutputMax     = executor.MaxContent / 2 // the most that can be configured: 360 KiB
	DefaultMaxLength = 4096                    // characters of a string param, unless configured
	MaxStdin         = 1 << 20                 // bytes of a param that becomes standard input
	MaxArgs          = 256                     // elements of a template
	maxArgBytes      = 128 << 10               // one argument; the kernel's own limit (MAX_ARG_STRLEN)
)

// Param is one param of a template.
type Param struct {
	Type        string   `yaml:"type"` // string (default), integer, number, boolean
	Description string   `yaml:"description"`
	Pattern     string   `yaml:"pattern"`    // strings: RE2; the whole value must match
	Enum        []string `yaml:"enum"`       // strings: the values there are
	MaxLength   int      `yaml:"max_length"` // strings: characters; 0: DefaultMaxLength
	Minimum     *float64 `yaml:"minimum"`    // numbers
	Maximum     *float64 `yaml:"maximum"`    // numbers
	Default     *string  `yaml:"default"`    // makes the param optional
}

// Config is one tool.exec.<name> of tools.yaml.
type Config struct {
	Argv      []string         // the template
	Params    map[string]Param // every slot and Stdin must be here, and nothing else
	Stdin     string           // name of the param that becomes standard input; "": /dev/null
	Env       []string         // "NAME": the node's value, if it has one; "NAME=value": that value. Nothing else is passed
	Dir       string           // working directory, absolute; "": /
	OutputMax int64            // bytes kept of each stream; 0: DefaultOutputMax

	FS      []string          // "ro:PATH" or "rw:PATH", absolute
	Egress  []string          // "host:port", "prefix:port"; none: no network
	Limits  sandbox.Limits    // policy can lower them
	User    string            // name or number; "": a user of the call's own, where the node is root
	Secrets map[string]string // variable → file, read for each call; the variable holds the path of a descriptor
	Sandbox *sandbox.Sandbox  // nil: none
}

// maxSecret bounds one secret's file. 64 KiB.
const maxSecret = 64 << 10

// Tool is the executor.
type Tool struct {
	cfg    Config
	argv   []element
	env    []string
	schema json.RawMessage
	fs     []sandbox.Path
	egress []sandbox.Endpoint
	user   *sandbox.User
	box    *sandbox.Sandbox
}

// element is one argument: literal and slot parts in turn.
type element struct {
	parts []part
	after bool // stands after "--"
}

type part struct {
	text string
	slot bool
}

var slotName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,63}$`)

// New checks cfg and builds the tool. Its error joins all faults.
func New(cfg Config) (*Tool, error) {
	t := &Tool{cfg: cfg}
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }

	if len(cfg.Argv) == 0 {
		fault("argv is missing: want a list, as in [\"/usr/bin/wc\", \"-w\"]")
	} else {
		faults = append(faults, checkProgram(cfg.Argv[0])...)
	}
	if len(cfg.Argv) > MaxArgs {
		fault("argv has %d elements, at most %d", len(cfg.Argv), MaxArgs)
	}
	used := map[string]bool{}
	after := false
	for i, a := range cfg.Argv {
		parts, err := parseElement(a)
		if err != nil {
			fault("argv element %d: %w", i, err)
			continue
		}
		for _, p := range parts {
			if !p.slot {
				continue
			}
			if _, ok := cfg.Params[p.text]; !ok {
				fault("argv element %d: slot {%s} has no entry under params", i, p.text)
			}
			used[p.text] = true
		}
		if len(parts) == 0 {
			parts = []part{{}} // an empty argument
		}
		t.argv = append(t.argv, element{parts, after})
		after = after || a == "--"
	}
	if cfg.Stdin != "" {
		p, ok := cfg.Params[cfg.Stdin]
		switch {
		case !ok:
			fault("stdin: param %q has no entry under params", cfg.Stdin)
		case p.Type != "" && p.Type != "string":
			fault("stdin: param %q is a %s, want a string", cfg.Stdin, p.Type)
		}
		used[cfg.Stdin] = true
	}
	for name := range cfg.Params {
		if !used[name] {
			fault("param %q is used neither in argv nor as stdin", name)
		}
	}
	switch {
	case cfg.OutputMax == 0:
		t.cfg.OutputMax = DefaultOutputMax
	case cfg.OutputMax < 0 || cfg.OutputMax > MaxOutputMax:
		fault("output_max is %d, want 1 to %d bytes", cfg.OutputMax, MaxOutputMax)
	}
	if cfg.Dir == "" {
		t.cfg.Dir = "/"
	} else if !filepath.IsAbs(cfg.Dir) {
		fault("dir %q: want an absolute path", cfg.Dir)
	}
	env, err := environment(cfg.Env)
	if err != nil {
		faults = append(faults, err)
	}
	t.env = env
	if t.schema, err = schema(cfg); err != nil {
		faults = append(faults, err)
	}
	faults = append(faults, t.confinement(cfg)...)
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	return t, nil
}

// checkProgram wants a program that can be run now: a tools file with a slip in
// a path should fail at load, not at the first call.
func checkProgram(path string) []error {
	if !filepath.IsAbs(path) || strings.ContainsAny(path, "{}") {
		return []error{fmt.Errorf("argv element 0 is %q: want the absolute path of a program, without slots", path)}
	}
	if info, err := os.Stat(path); err != nil {
		return []error{fmt.Errorf("argv element 0: %w", err)}
	} else if info.IsDir() || info.Mode()&0o111 == 0 {
		return []error{fmt.Errorf("argv element 0: %s is no program", path)}
	}
	return nil
}

// parseElement splits "--since={day}" into its parts. "{{" and "}}" are braces.
func parseElement(s string) ([]part, error) {
	if strings.ContainsRune(s, 0) {
		return nil, errors.New("holds a NUL byte")
	}
	var parts []part
	var lit strings.Builder
	flush := func() {
		if lit.Len() > 0 {
			parts = append(parts, part{text: lit.String()})
			lit.Reset()
		}
	}
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case (c == '{' || c == '}') && i+1 < len(s) && s[i+1] == c:
			lit.WriteByte(c)
			i++
		case c == '{':
			end := strings.IndexByte(s[i:], '}')
			if end < 0 {
				return nil, fmt.Errorf("%q: '{' is not closed; write {{ for a brace", s)
			}
			name := s[i+1 : i+end]
			if !slotName.MatchString(name) {
				return nil, fmt.Errorf("%q: %q is no slot name, want lower-case letters, digits and _", s, name)
			}
			flush()
			parts = append(parts, part{text: name, slot: true})
			i += end
		case c == '}':
			return nil, fmt.Errorf("%q: '}' without '{'; write }} for a brace", s)
		default:
			lit.WriteByte(c)
		}
	}
	flush()
	return parts, nil
}

func environment(names []string) ([]string, error) {
	var env []string
	seen := map[string]bool{}
	for _, e := range names {
		name, _, set := strings.Cut(e, "=")
		if name == "" || strings.ContainsAny(e, "\x00") || strings.ContainsAny(name, " \t\n") {
			return nil, fmt.Errorf("env %q: want NAME or NAME=value", e)
		}
		if seen[name] {
			return nil, fmt.Errorf("env %q: named twice", name)
		}
		seen[name] = true
		if set {
			env = append(env, e)
		} else if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env, nil
}

// Schema is the JSON Schema that the template's params make.
func (t *Tool) Schema() json.RawMessage { return t.schema }

func schema(cfg Config) (json.RawMessage, error) {
	props := map[string]any{}
	required := []string{}
	for name, p := range cfg.Params {
		if !slotName.MatchString(name) {
			return nil, fmt.Errorf("param %q: want lower-case letters, digits and _", name)
		}
		s := map[string]any{}
		if p.Description != "" {
			s["description"] = p.Description
		}
		s["type"] = "string"
		switch p.Type {
		case "", "string":
			limit := p.MaxLength
			if limit == 0 {
				limit = DefaultMaxLength
			}
			if limit < 0 || limit > MaxStdin {
				return nil, fmt.Errorf("param %q: max_length is %d, want 1 to %d", name, limit, MaxStdin)
			}
			s["maxLength"] = limit
			if p.Pattern != "" {
				if _, err := regexp.Compile(p.Pattern); err != nil {
					return nil, fmt.Errorf("param %q: %w", name, err)
				}
				s["pattern"] = "^(?:" + p.Pattern + ")$"
			}
			if len(p.Enum) > 0 {
				s["enum"] = p.Enum
			}
			if p.Minimum != nil || p.Maximum != nil {
				return nil, fmt.Errorf("param %q: minimum and maximum are for numbers", name)
			}
		case "integer", "number", "boolean":
			s["type"] = p.Type
			if p.Pattern != "" || len(p.Enum) > 0 || p.MaxLength != 0 {
				return nil, fmt.Errorf("param %q: pattern, enum and max_length are for strings", name)
			}
			if p.Minimum != nil {
				s["minimum"] = *p.Minimum
			}
			if p.Maximum != nil {
				s["maximum"] = *p.Maximum
			}
		default:
			return nil, fmt.Errorf("param %q: type is %q, want string, integer, number or boolean", name, p.Type)
		}
		if p.Default == nil {
			required = append(required, name)
		}
		props[name] = s
	}
	slices.Sort(required)
	out := map[string]any{"type": "object", "additionalProperties": false, "properties": props}
	if len(required) > 0 {
		out["required"] = required
	}
	return json.Marshal(out)
}

// output is the JSON of a result.
type output struct {
	ExitCode       int    `json:"exit_code"`
	Stdout         string `json:"stdout"`
	StdoutEncoding string `json:"stdout_encoding,omitempty"`
	Stderr         string `json:"stderr"`
	StderrEncoding string `json:"stderr_encoding,omitempty"`
	Truncated      bool   `json:"truncated,omitempty"`
}

// Execute runs the program.
func (t *Tool) Execute(ctx context.Context, r *executor.Request) executor.Result {
	if refused := t.Unenforceable(r.Constraints); refused != "" {
		return executor.Deny(CodeConstraint, "policy limits "+refused+" for this call, and this platform cannot keep that for a program (autonomy doctor says why): remove the constraint, or deny the call")
	}
	values, err := t.values(r.Params)
	if err != nil {
		return executor.Fail(CodeParams, err.Error())
	}
	argv, denied, err := t.expand(values)
	if err != nil {
		if denied {
			return executor.Deny(CodeArgument, err.Error())
		}
		return executor.Fail(CodeParams, err.Error())
	}
	cmd, err := t.command(r.Constraints)
	if err != nil {
		return executor.Deny(CodeConstraint, err.Error())
	}
	cmd.Argv = argv
	if in := values[t.cfg.Stdin]; in != "" {
		cmd.Stdin = []byte(in)
	}
	limit := t.cfg.OutputMax
	if n := r.Constraints.OutputMaxBytes; n > 0 {
		limit = min(limit, n)
	}
	return t.run(ctx, cmd, limit, r.Constraints.OutputMaxBytes)
}

// narrow keeps the variables that policy names. nil names all.
func (t *Tool) narrow(names []string) []string {
	env := []string{} // not nil: nil would be the node's own
	for _, e := range t.env {
		name, _, _ := strings.Cut(e, "=")
		if names == nil || slices.Contains(names, name) {
			env = append(env, e)
		}
	}
	return env
}

// values reads the params as the strings that go into argv.
func (t *Tool) values(params []byte) (map[string]string, error) {
	var raw map[string]json.RawMessage
	if err := strictjson.Unmarshal(params, &raw); err != nil {
		return nil, err
	}
	out := make(map[string]string, len(t.cfg.Params))
	for name := range raw {
		if _, ok := t.cfg.Params[name]; !ok {
			return nil, fmt.Errorf("unknown param %q", name)
		}
	}
	for name, p := range t.cfg.Params {
		v, ok := raw[name]
		if !ok {
			if p.Default == nil {
				return nil, fmt.Errorf("param %q is missing", name)
			}
			out[name] = *p.Default
			continue
		}
		s, err := p.text(v)
		if err != nil {
			return nil, fmt.Errorf("param %q: %w", name, err)
		}
		out[name] = s
	}
	return out, nil
}

// text writes a JSON value as an argument. The schema has been checked before;
// the types are checked again because this is where the value gets its power.
func (p *Param) text(v json.RawMessage) (string, error) {
	switch p.Type {
	case "", "string":
		var s string
		if len(v) == 0 || v[0] != '"' {
			return "", errors.New("want a string")
		}
		if err := json.Unmarshal(v, &s); err != nil {
			return "", err
		}
		return s, nil
	case "boolean":
		var b bool
		if err := json.Unmarshal(v, &b); err != nil || string(v) == "null" {
			return "", errors.New("want true or false")
		}
		return strconv.FormatBool(b), nil
	}
	var f float64
	if err := json.Unmarshal(v, &f); err != nil || string(v) == "null" {
		return "", errors.New("want a number")
	}
	if p.Type == "integer" {
		if f != math.Trunc(f) || math.Abs(f) > 1<<53 {
			return "", errors.New("want an integer of at most 53 bits")
		}
		return strconv.FormatInt(int64(f), 10), nil
	}
	return strconv.FormatFloat(f, 'f', -1, 64), nil
}

// expand fills the template. denied tells a value that is refused for what it
// would do from one that cannot be passed at all.
func (t *Tool) expand(values map[string]string) (argv []string, denied bool, err error) {
	for _, e := range t.argv {
		var b strings.Builder
		for _, p := range e.parts {
			if !p.slot {
				b.WriteString(p.text)
				continue
			}
			v := values[p.text]
			if strings.ContainsRune(v, 0) {
				return nil, false, fmt.Errorf("param %q holds a NUL byte", p.text)
			}
			b.WriteString(v)
		}
		if !e.after && e.parts[0].slot && strings.HasPrefix(b.String(), "-") && !t.number(e) {
			return nil, true, fmt.Errorf("param %q begins with '-': the program would read it as an option", e.parts[0].text)
		}
		if b.Len() >= maxArgBytes {
			return nil, false, fmt.Errorf("an argument has %d bytes, at most %d can be passed", b.Len(), maxArgBytes-1)
		}
		argv = append(argv, b.String())
	}
	return argv, false, nil
}

// number reports whether e is one number: "-5" is no option.
func (t *Tool) number(e element) bool {
	kind := t.cfg.Params[e.parts[0].text].Type
	return len(e.parts) == 1 && (kind == "integer" || kind == "number")
}

// run starts the command and sees it to its end.
func (t *Tool) run(ctx context.Context, cmd *sandbox.Command, streamMax, totalMax int64) executor.Result {
	stdout, stderr := &capped{limit: streamMax}, &capped{limit: streamMax}
	p, err := t.box.Start(ctx, cmd)
	switch {
	case err == nil:
	case errors.Is(err, sandbox.ErrLayer), errors.Is(err, sandbox.ErrPath), errors.Is(err, sandbox.ErrEgress):
		return executor.Deny(CodeConstraint, err.Error())
	case errors.Is(err, sandbox.ErrConfine):
		return executor.Deny(CodeConfine, err.Error())
	default:
		return executor.Fail(CodeStart, err.Error())
	}
	ended := p.Wait(ctx, stdout.write, stderr.write)
	res := result(ctx, &ended, stdout, stderr, totalMax)
	res.Confinement = confinement(&ended)
	return res
}

func result(ctx context.Context, e *sandbox.Ended, stdout, stderr *capped, totalMax int64) executor.Result {
	o, oCut := stdout.take(math.MaxInt64)
	rest := int64(math.MaxInt64)
	if totalMax > 0 {
		rest = max(0, totalMax-int64(len(o)))
	}
	x, xCut := stderr.take(rest)
	out := output{ExitCode: -1, Truncated: oCut || xCut}
	if e.Status.Exited() {
		out.ExitCode = e.Status.ExitStatus()
	}
	out.Stdout, out.StdoutEncoding = executor.Text(o, oCut)
	out.Stderr, out.StderrEncoding = executor.Text(x, xCut)
	body, err := executor.Encode(out)
	if err != nil {
		return executor.Fail(CodeStart, "encode the output: "+err.Error())
	}
	fail := func(code, message string) executor.Result {
		return executor.Result{Outcome: executor.Error, Output: body, Code: code, Message: message}
	}
	switch {
	case ctx.Err() != nil && e.Status.Signaled():
		r := executor.Stopped(ctx)
		r.Output = body
		return r
	case e.Usage.OOMKills > 0:
		return fail(CodeMemory, "the program was ended: it needed more memory than this call may have")
	case e.Status.Signaled():
		return fail(CodeSignal, "the program was ended by the signal "+e.Status.Signal().String())
	case out.ExitCode != 0:
		return fail(CodeExitNonzero, fmt.Sprintf("the program ended with exit code %d", out.ExitCode))
	}
	return executor.Result{Outcome: executor.OK, Output: body}
}

// capped keeps the first limit bytes and notes whether there were more. The
// program never blocks on it. It has a lock because it is written by one
// goroutine and read by another.
type capped struct {
	limit int64

	mu  sync.Mutex
	buf []byte
	cut bool
}

func (c *capped) write(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	keep := p
	if room := c.limit - int64(len(c.buf)); int64(len(p)) > room {
		keep, c.cut = p[:room], true
	}
	c.buf = append(c.buf, keep...)
}

// take returns at most n of the kept bytes, and whether any are missing.
func (c *capped) take(n int64) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if int64(len(c.buf)) > n {
		return slices.Clone(c.buf[:n]), true
	}
	return slices.Clone(c.buf), c.cut
}
