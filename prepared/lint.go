package prepared

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/format"
)

// Finding is something that Lint would change.
type Finding struct {
	File    string `json:"file"`           // relative to the directory
	Line    int    `json:"line,omitempty"` // 0: the whole file
	Rule    string `json:"rule"`           // one of the Lint… constants
	Message string `json:"message"`
}

func (f Finding) String() string {
	if f.Line > 0 {
		return fmt.Sprintf("%s:%d: %s (%s)", f.File, f.Line, f.Message, f.Rule)
	}
	return fmt.Sprintf("%s: %s (%s)", f.File, f.Message, f.Rule)
}

// Rules of Lint.
const (
	LintCompile    = "compile"        // does not parse or compile; refused builtins and negations, too
	LintEntrypoint = "entrypoint"     // the rule that decides is absent
	LintDefault    = "default"        // a rule that decides can be undefined
	LintInput      = "unknown-input"  // input.x that no node sends: always undefined
	LintResult     = "unknown-result" // a field of the answer that no node takes: always denied
	LintReach      = "unreachable"    // a rule that the entrypoint never asks for
	LintFormat     = "format"         // opa fmt would change the file
	LintTests      = "no-tests"       // there is no _test.rego
	LintFailOpen   = "fail-open"      // leaving out a field turns a deny into an allow
)

// inputFields is the input of the contract: what a node sends. nil: any fields.
var inputFields = map[string][]string{
	"kind": {}, "params": nil, "session": {}, "caller": nil, "time_ns": {},
	"agent": {"id", "release", "fingerprint"},
	"node":  {"id", "labels", "assurance"},
}

var inputNames = []string{"kind", "params", "session", "caller", "agent", "node", "time_ns"}

var resultFields = []string{"allow", "reasons", "constraints", "approval", "redact"}

// Lint reads the policy in dir and says what is likely to be wrong with it, in
// order of file and line. entrypoint is as in BuildOptions. allowFailOpen lists
// fields (JSON Pointers) whose absence may turn a deny into an allow. The error
// is for a directory that cannot be read; a policy that does not compile is a
// finding.
func Lint(ctx context.Context, dir, entrypoint string, allowFailOpen []string) ([]Finding, error) {
	src, err := loadDir(dir, DefaultLimits)
	if err != nil {
		return nil, err
	}
	var found []Finding
	add := func(file string, line int, rule, msg string, args ...any) {
		found = append(found, Finding{file, line, rule, fmt.Sprintf(msg, args...)})
	}
	modules := map[string]*ast.Module{}
	tests, parsed := 0, true
	for _, f := range src.files {
		if path.Ext(f.name) != regoExt {
			continue
		}
		isTest := strings.HasSuffix(f.name, testSuffix)
		if isTest {
			tests++
		}
		m, err := ast.ParseModuleWithOpts(f.name, string(f.data), ast.ParserOptions{RegoVersion: ast.RegoV1, Capabilities: capabilities()})
		if err != nil {
			parsed = parsed && isTest
			addErrors(&found, f.name, err)
			continue
		}
		if out, err := format.SourceWithOpts(f.name, f.data, format.Opts{RegoVersion: ast.RegoV1}); err == nil && !bytes.Equal(out, f.data) {
			add(f.name, firstDifference(f.data, out), LintFormat, "opa fmt would change this file")
		}
		if isTest {
			continue
		}
		modules[f.name] = m
	}
	if tests == 0 {
		add(".", 0, LintTests, "no _test.rego: write one that allows a call and one that denies a call")
	}
	if !parsed {
		for name, m := range modules {
			lintRefs(add, name, m)
		}
		return inOrder(found), nil
	}
	entry := entrypoint
	if entry == "" {
		entry = entryOf(modules)
	}
	lintModules(add, modules, entry)
	if entry == "" {
		add(".", 0, LintEntrypoint, "no rule decision or allow in package autonomy: the node asks for data.autonomy.decision, or else data.autonomy.allow")
	} else {
		lintBuilt(ctx, add, &found, dir, entrypoint, allowFailOpen)
	}
	return inOrder(found), nil
}

// LintBundle says what is likely to be wrong with a bundle that compiles: a rule
// that is never reached, an input field that no node sends, an answer that can be
// undefined or that no node takes. It is for a warning at load; Lint is for the
// author, who has the directory with its tests.
func LintBundle(b *Bundle) []Finding {
	content, err := b.content()
	if err != nil {
		return nil // it compiles, so it can be read
	}
	modules := make(map[string]*ast.Module, len(content.Modules))
	for _, m := range content.Modules {
		modules[strings.TrimPrefix(m.Path, "/")] = m.Parsed
	}
	var found []Finding
	lintModules(func(file string, line int, rule, msg string, args ...any) {
		found = append(found, Finding{file, line, rule, fmt.Sprintf(msg, args...)})
	}, modules, b.Entrypoint)
	return inOrder(found)
}

func inOrder(found []Finding) []Finding {
	slices.SortStableFunc(found, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Message, b.Message))
	})
	return slices.Compact(found)
}

// lintModules are the findings that need the modules only.
func lintModules(add addFinding, modules map[string]*ast.Module, entry string) {
	for name, m := range modules {
		lintRefs(add, name, m)
	}
	if entry != "" {
		lintEntry(add, modules, entry)
		lintReach(add, modules, entry)
	}
}

type addFinding func(file string, line int, rule, msg string, args ...any)

// lintBuilt builds and compiles, and probes with the sample calls.
func lintBuilt(ctx context.Context, add addFinding, found *[]Finding, dir, entrypoint string, allowFailOpen []string) {
	raw, err := BuildBundle(dir, BuildOptions{Name: "lint", Version: "0.0.0", Entrypoint: entrypoint, AllowFailOpen: allowFailOpen})
	var b *Bundle
	if err == nil {
		b, err = ReadBundle(raw, Limits{})
	}
	var p *Program
	if err == nil {
		p, err = Compile(ctx, b)
	}
	if err != nil {
		addErrors(found, ".", err)
		return
	}
	r, err := Probe(ctx, p, ProbeOptions{})
	if err != nil {
		add(".", 0, LintFailOpen, "%s", err)
	}
	for _, f := range r.Refused() {
		add(f.Call, 0, LintFailOpen, "%s", strings.TrimPrefix(f.String(), f.Call+": "))
	}
}

// lintReach finds rules that the entrypoint never asks for, by the compiler's
// graph of dependencies. A policy that does not compile has none.
func lintReach(add addFinding, modules map[string]*ast.Module, entry string) {
	c := ast.NewCompiler().WithCapabilities(capabilities()).WithDefaultRegoVersion(ast.RegoV1)
	if c.Compile(modules); c.Failed() { // works on copies
		return
	}
	reached := map[string]bool{}
	queue := c.GetRulesWithPrefix(entryRef(entry))
	for len(queue) > 0 {
		r := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		if reached[r.Ref().String()] {
			continue
		}
		// All rules of one name decide together, and only those that have a body
		// depend on something.
		for _, same := range c.GetRulesExact(r.Ref().GroundPrefix()) {
			reached[same.Ref().String()] = true
			for ; same != nil; same = same.Else {
				for d := range c.Graph.Dependencies(same) {
					if rule, ok := d.(*ast.Rule); ok && !reached[rule.Ref().String()] {
						queue = append(queue, rule)
					}
				}
			}
		}
		reached[r.Ref().String()] = true
	}
	told := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(c.Modules)) {
		for _, r := range c.Modules[name].Rules {
			ref := r.Ref().String()
			if reached[ref] || told[ref] {
				continue
			}
			told[ref] = true
			add(name, r.Location.Row, LintReach, "%s is never asked for by %s, so it decides nothing: remove it, or use it where it should decide", ref, entryRef(entry))
		}
	}
}

// addErrors turns a compiler's errors into findings, a finding each.
func addErrors(found *[]Finding, file string, err error) {
	var list ast.Errors
	if errors.As(err, &list) {
		for _, e := range list {
			f := Finding{File: file, Rule: LintCompile, Message: strings.Join(strings.Fields(e.Message), " ")}
			if e.Location != nil && e.Location.File != "" {
				f.File, f.Line = strings.TrimPrefix(e.Location.File, "/"), e.Location.Row
			}
			*found = append(*found, f)
		}
		return
	}
	var faults *PolicyError
	for _, e := range flatten(err) {
		if errors.As(e, &faults) {
			*found = append(*found, Finding{faults.File, faults.Line, LintCompile, faults.Msg})
			continue
		}
		*found = append(*found, Finding{File: file, Rule: LintCompile, Message: strings.Join(strings.Fields(e.Error()), " ")})
	}
}

// flatten returns the *PolicyErrors in err, or err itself when there is none.
func flatten(err error) []error {
	var out []error
	var walk func(error)
	walk = func(e error) {
		switch x := e.(type) {
		case *PolicyError:
			out = append(out, x)
		case interface{ Unwrap() []error }:
			for _, e := range x.Unwrap() {
				walk(e)
			}
		case interface{ Unwrap() error }:
			walk(x.Unwrap())
		}
	}
	if walk(err); len(out) == 0 {
		return []error{err}
	}
	return out
}

// lintRefs finds input.x that no node sends.
func lintRefs(add addFinding, name string, m *ast.Module) {
	ast.WalkRefs(m, func(r ast.Ref) bool {
		if len(r) < 2 || !r[0].Equal(ast.InputRootDocument) {
			return false
		}
		first, ok := r[1].Value.(ast.String)
		if !ok {
			return false
		}
		known, ok := inputFields[string(first)]
		if !ok {
			add(name, r[0].Location.Row, LintInput, "a node sends no input.%s%s", string(first), nearest(string(first), inputNames))
			return false
		}
		if len(r) > 2 && known != nil {
			if second, ok := r[2].Value.(ast.String); ok && !slices.Contains(known, string(second)) {
				add(name, r[0].Location.Row, LintInput, "a node sends no input.%s.%s%s", string(first), string(second), nearest(string(second), known))
			}
		}
		return false
	})
}

func entryOf(modules map[string]*ast.Module) string {
	all := entrypoints(modules)
	for _, e := range []string{mainEntrypoint, fallbackEntrypoint} {
		if slices.Contains(all, e) {
			return e
		}
	}
	return ""
}

// lintEntry checks that the answer is always defined and has known fields.
func lintEntry(add addFinding, modules map[string]*ast.Module, entry string) {
	ref := entryRef(entry)
	pkg := ref[:len(ref)-1]
	type named struct {
		file              string
		line              int
		conditional, isIt bool
		hasDefault        bool
	}
	rules := map[string]*named{}
	for file, m := range modules {
		if !m.Package.Path.Equal(pkg) {
			continue
		}
		for _, r := range m.Rules {
			name := r.Head.Name.String()
			isIt := m.Package.Path.Extend(r.Head.Ref()).Equal(ref)
			if !isIt && name != "allow" {
				continue
			}
			n := rules[name]
			if n == nil {
				n = &named{file: file, line: r.Location.Row, conditional: true, isIt: isIt}
				rules[name] = n
			}
			n.hasDefault = n.hasDefault || r.Default
			if !r.Default && r.Body.Equal(ast.NewBody(ast.NewExpr(ast.InternedTerm(true)))) {
				n.conditional = false
			}
			if isIt && r.Head.Value != nil {
				if obj, ok := r.Head.Value.Value.(ast.Object); ok {
					obj.Foreach(func(k, v *ast.Term) {
						key, ok := k.Value.(ast.String)
						if ok && !slices.Contains(resultFields, string(key)) {
							add(file, k.Location.Row, LintResult, "the answer's field %q is unknown to a node, which denies every call then%s", string(key), nearest(string(key), resultFields))
						}
					})
				}
			}
		}
	}
	for name, n := range rules {
		if n.conditional && !n.hasDefault {
			add(n.file, n.line, LintDefault, "%s has no default: where no rule applies there is no answer; add `default %s := false`", name, name)
		}
	}
}

func firstDifference(a, b []byte) int {
	line := 1
	for i := range a {
		if i >= len(b) || a[i] != b[i] {
			return line
		}
		if a[i] == '\n' {
			line++
		}
	}
	return line
}
