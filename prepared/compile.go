package prepared

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"

	"github.com/autonomyops/autonomy/prepared/irvm"
)

// ErrCompile is wrapped by every error of Compile: the bundle can be read, but
// its policy is not one that can decide.
var ErrCompile = errors.New("policy does not compile")

// RefusedBuiltins maps the OPA builtins that a policy cannot call to the reason.
// What they return is not a function of bundle and input, so a decision made
// with them could not be replayed (INV-17).
var RefusedBuiltins = map[string]string{
	"http.send":              "it reaches the network: put what it would fetch into the bundle's data.json",
	"net.lookup_ip_addr":     "it asks DNS: list hosts by name in data.json, the node pins the address when it dials",
	"opa.runtime":            "it reads the process: use input.node",
	"rand.intn":              "it is random: derive a number from the input, for example by crypto.sha256",
	"uuid.rfc4122":           "it is random: the node gives every call an audit_id",
	"io.jwt.decode_verify":   "it reads the clock: verify with io.jwt.verify_* and compare the claims with input.time_ns",
	"io.jwt.encode_sign":     "it signs with randomness, and a key in a policy is no secret",
	"io.jwt.encode_sign_raw": "it signs with randomness, and a key in a policy is no secret",
	"json.match_schema":      "it follows $ref to the network: tools validate their parameters before policy is asked",
	"json.verify_schema":     "it follows $ref to the network: tools validate their parameters before policy is asked",
	"crypto.x509.parse_and_verify_certificates":              "it reads the machine's clock and trust store",
	"crypto.x509.parse_and_verify_certificates_with_options": "it reads the machine's clock and trust store",
}

// keptNondeterministic are builtins that OPA calls nondeterministic and that
// are made deterministic here.
var keptNondeterministic = map[string]bool{
	"time.now_ns": true, // EvalTime: input.time_ns
}

// capabilities is OPA's language without the refused builtins and without
// network. A builtin that a later OPA adds and marks nondeterministic is absent
// too, named above or not.
var capabilities = sync.OnceValue(func() *ast.Capabilities {
	c := ast.CapabilitiesForThisVersion()
	c.Builtins = slices.DeleteFunc(c.Builtins, func(b *ast.Builtin) bool {
		_, refused := RefusedBuiltins[b.Name]
		return refused || b.IsNondeterministic() && !keptNondeterministic[b.Name]
	})
	c.AllowNet = []string{}
	return c
})

// Program is a compiled policy. It is immutable and safe for concurrent use; it
// holds the bundle's data in memory and no other resource.
type Program struct {
	bundle   *Bundle
	usesTime bool          // calls time.now_ns
	limits   irvm.Limits   // with all fields set
	vm       *irvm.Program // without a plan where the interpreter has to do it all
	engine   engine

	// oracle is the interpreter, made when it is needed first.
	oracle func() (*interpreter, error)
}

// Bundle is what the program was compiled from.
func (p *Program) Bundle() *Bundle { return p.bundle }

// Compile makes b ready to evaluate. It refuses, with an error that wraps
// ErrCompile and names file and line: calls of RefusedBuiltins, a negation
// without `import rego.v2` (see the package comment), rules and data at one
// path, and a bundle that does not define its entrypoint.
func Compile(ctx context.Context, b *Bundle) (*Program, error) {
	return CompileWith(ctx, b, Options{})
}

// CompileWith is Compile with options.
func CompileWith(ctx context.Context, b *Bundle, o Options) (*Program, error) {
	p, err := compile(ctx, b, o)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCompile, err)
	}
	return p, nil
}

func compile(ctx context.Context, b *Bundle, o Options) (p *Program, err error) {
	defer func() {
		if r := recover(); r != nil {
			p, err = nil, fmt.Errorf("the compiler panicked: %v", r)
		}
	}()
	if b == nil || b.Raw == nil {
		return nil, errors.New("the bundle was not made by ReadBundle")
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	parsed, err := b.content()
	if err != nil {
		return nil, err
	}
	modules := modulesOf(parsed)
	if faults := checkModules(modules); len(faults) > 0 {
		return nil, joined(faults)
	}

	data, err := irvm.FromJSON(parsed.Data)
	if err != nil {
		return nil, fmt.Errorf("data: %w", err)
	}
	store := &dataStore{data: data}
	c, err := compileModules(modules, storage.NonEmpty(ctx, store, readOnly{}))
	if err != nil {
		return nil, err
	}
	entry := entryRef(b.Entrypoint)
	if len(c.GetRulesExact(entry)) == 0 {
		either := ""
		if b.Entrypoint == fallbackEntrypoint {
			either = "data.autonomy.decision or "
		}
		return nil, fmt.Errorf("no rule %s%s: define it, or name another as the entrypoint%s",
			either, entry, nearest(b.Entrypoint, entrypoints(modules)))
	}
	p = &Program{bundle: b.light(), limits: o.Limits.WithDefaults()}
	p.engine.every, p.engine.report = uint64(max(0, o.SelfCheck)), o.OnMismatch
	if c.Required != nil {
		p.usesTime = slices.ContainsFunc(c.Required.Builtins, func(b *ast.Builtin) bool { return b.Name == "time.now_ns" })
	}
	p.vm, err = lower(ctx, data, o, asked(c, entry))
	switch {
	case err == nil && o.SelfCheck == 0:
		p.oracle = sync.OnceValues(func() (*interpreter, error) { return rereadInterpreter(p.bundle, entry, store) })
		return p, nil
	case err == nil:
		return p, p.interpretBy(ctx, c, entry, store)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	}
	p.vm = irvm.Empty(o.Limits)
	p.engine.leave(err.Error())
	// The interpreter has it all to do: a store that holds OPA's own values is
	// the fastest for it.
	return p, p.interpretBy(ctx, c, entry, inmem.NewFromObjectWithOpts(parsed.Data, inmem.OptRoundTripOnWrite(false), inmem.OptReturnASTValuesOnRead(true)))
}

// compileModules has OPA compile a policy. conflicts tells whether there is data
// at a path; nil if that was asked before.
func compileModules(modules map[string]*ast.Module, conflicts func([]string) (bool, error)) (*ast.Compiler, error) {
	c := ast.NewCompiler().
		WithCapabilities(capabilities()).
		WithDefaultRegoVersion(ast.RegoV1).
		WithPathConflictsCheck(conflicts)
	if c.Compile(modules); c.Failed() {
		return nil, c.Errors
	}
	return c, nil
}

// asked is the query for a rule.
func asked(c *ast.Compiler, entry ast.Ref) []func(*rego.Rego) {
	return []func(*rego.Rego){
		rego.ParsedQuery(ast.NewBody(ast.NewExpr(ast.NewTerm(entry)))),
		rego.Compiler(c),
		rego.Capabilities(capabilities()),
		rego.StrictBuiltinErrors(true),
		rego.SetRegoVersion(ast.RegoV1),
	}
}

// lower compiles the plan of the query. The error is the reason for which the
// interpreter must evaluate it.
func lower(ctx context.Context, data irvm.Value, o Options, asked []func(*rego.Rego)) (*irvm.Program, error) {
	if o.Engine == EngineTopdown {
		return nil, errors.New("it was asked for")
	}
	plan, err := irvm.Plan(ctx, asked...)
	if err != nil {
		return nil, fmt.Errorf("OPA has no plan for this policy: %w", err)
	}
	return irvm.Compile(plan, data, irvm.Options{Limits: o.Limits, Capabilities: capabilities()})
}

func modulesOf(parsed *bundle.Bundle) map[string]*ast.Module {
	modules := make(map[string]*ast.Module, len(parsed.Modules))
	for _, m := range parsed.Modules {
		modules[strings.TrimPrefix(m.Path, "/")] = m.Parsed
	}
	return modules
}

// entryRef turns "autonomy/decision" into data.autonomy.decision.
func entryRef(path string) ast.Ref {
	ref := ast.Ref{ast.DefaultRootDocument}
	for s := range strings.SplitSeq(path, "/") {
		ref = append(ref, ast.StringTerm(s))
	}
	return ref
}

// entrypoints lists what could have been meant by an entrypoint.
func entrypoints(modules map[string]*ast.Module) []string {
	seen := map[string]bool{}
	for _, m := range modules {
		for _, r := range m.Rules {
			if p, err := r.Ref().GroundPrefix().Ptr(); err == nil {
				seen[p] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// checkModules finds what must not be in a policy, in order of file and line,
// so that the error is ours and not "undefined function".
func checkModules(modules map[string]*ast.Module) []*PolicyError {
	var faults []*PolicyError
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		m := modules[name]
		notFixed := m.RegoVersionSpan().Min() == ast.RegoV2 || importsRegoV2(m)
		ast.WalkExprs(m, func(e *ast.Expr) bool {
			if e.IsNegated() && !notFixed {
				notFixed = true // once per file says it
				faults = append(faults, fault(name, e.Location, "`not` without `import rego.v2`: a missing input field would turn this negation off; add the import below the package line"))
			}
			return false
		})
		ast.WalkRefs(m, func(r ast.Ref) bool {
			if why, ok := RefusedBuiltins[r.String()]; ok {
				faults = append(faults, fault(name, r[0].Location, fmt.Sprintf("%s is not available in a policy: %s", r, why)))
			}
			return false
		})
		ast.WalkTerms(m, func(t *ast.Term) bool {
			if a, ok := t.Value.(*ast.Array); ok && a.Len() > 1 && a.Elem(1).Value.Compare(ast.String("Local")) == 0 {
				faults = append(faults, fault(name, t.Location, "the time zone \"Local\" is another one on another machine: name one, for example \"Europe/Berlin\""))
			}
			return false
		})
	}
	return faults
}

// PolicyError is a fault at a place in a policy. Compile's error may wrap several.
type PolicyError struct {
	File string
	Line int // 0: unknown
	Msg  string
}

func (e *PolicyError) Error() string {
	if e.Line == 0 {
		return e.File + ": " + e.Msg
	}
	return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Msg)
}

func fault(file string, l *ast.Location, msg string) *PolicyError {
	e := &PolicyError{File: file, Msg: msg}
	if l != nil {
		e.Line = l.Row
	}
	return e
}

func joined(faults []*PolicyError) error {
	errs := make([]error, len(faults))
	for i, f := range faults {
		errs[i] = f
	}
	return errors.Join(errs...)
}

var futureNot = ast.MustParseRef("future.keywords.not")

func importsRegoV2(m *ast.Module) bool {
	return slices.ContainsFunc(m.Imports, func(i *ast.Import) bool {
		ref, ok := i.Path.Value.(ast.Ref)
		return ok && (ref.Equal(ast.RegoV2CompatibleRef) || ref.Equal(futureNot))
	})
}
