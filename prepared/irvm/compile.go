package irvm

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
)

// ErrUnsupported is wrapped by Compile's errors: the plan is one for the
// interpreter.
var ErrUnsupported = errors.New("plan not supported")

// maxRegs bounds the registers of all functions of one chain of calls, so that
// the memory of a Machine is bounded before it runs.
const maxRegs = 1 << 20

// Options of Compile.
type Options struct {
	Limits Limits
	// Lenient makes a builtin that fails undefined instead of ending the
	// evaluation, as OPA does by default. Only tests set it.
	Lenient bool
	// Capabilities are what OPA's builtins may see of OPA's.
	Capabilities *ast.Capabilities
}

// Program is a plan made ready. It is immutable and safe for concurrent use.
type Program struct {
	data     Value
	plan     []*block
	planRegs int
	regs     int // of the deepest chain of calls
	memos    int
	lenient  bool
	limits   Limits
	machines sync.Pool // of *Machine

	capabilities *ast.Capabilities // for the builtins that ask
}

// A function is a rule or a function of the policy: all definitions of one name.
type function struct {
	name   string
	body   []*block
	params []int
	ret    int
	nregs  int
	shared int // the last local that all definitions share
	memo   int // place in the memo; -1: it has arguments
	stack  int // registers of the deepest chain of calls from here; 0: not known yet
	calls  map[*function]bool
}

// A block is a sequence of statements. It ends early when one is undefined.
type block struct {
	ops  []op
	cost int
}

// An op is one statement. It returns next to go on with the next one, n > 0 to
// leave n blocks, or stop to return from the function.
type op func(m *Machine, r []Value) int

const (
	next = 0
	stop = 1 << 30
)

func (b *block) run(m *Machine, r []Value) int {
	m.charge(b.cost)
	for _, o := range b.ops {
		if c := o(m, r); c != next {
			return c
		}
	}
	return next
}

// Compile lowers a plan over data, what OPA's bundle reader and encoding/json
// with UseNumber make of a JSON object. The error wraps ErrUnsupported when the
// plan uses what this machine has not.
func Compile(plan *ir.Policy, data map[string]any, o Options) (p *Program, err error) {
	c := &compiler{
		prog:   &Program{lenient: o.Lenient, limits: o.Limits.WithDefaults(), capabilities: o.Capabilities},
		build:  builder{texts: map[string]string{}},
		funcs:  map[string]*function{},
		byPath: &pathNode{},
	}
	defer func() {
		if r := recover(); r != nil {
			e, ok := r.(refusal)
			if !ok {
				panic(r)
			}
			p, err = nil, fmt.Errorf("%w: %s", ErrUnsupported, string(e))
		}
	}()
	c.prog.data = c.build.fromJSON(data)
	if c.build.err != nil {
		return nil, c.build.err
	}
	c.compile(plan)
	c.prog.machines.New = func() any { return c.prog.newMachine() }
	return c.prog, nil
}

// refusal is what the compiler panics with on what it cannot lower.
type refusal string

func refuse(format string, args ...any) { panic(refusal(fmt.Sprintf(format, args...))) }

type compiler struct {
	prog   *Program
	build  builder
	consts []Value // the plan's strings
	funcs  map[string]*function
	byPath *pathNode // for calls whose function is known at run time only
	noFold bool      // a `with` replaces data: what is under data is not constant

	// Of the function being lowered.
	fn     *function
	locals int
	// Of its block that is being lowered.
	writes  map[ir.Local]int   // statements that assign a local
	changes map[ir.Local]int   // statements that change the collection in a local
	values  map[ir.Local]Value // of locals whose value is known here
	known   []ir.Local         // those, the latest last
}

// A pathNode leads from the path of a document to its function.
type pathNode struct {
	fn   *function
	next map[string]*pathNode
}

func (c *compiler) compile(plan *ir.Policy) {
	for _, s := range plan.Static.Strings {
		c.consts = append(c.consts, c.build.str(s.Value))
	}
	for _, f := range plan.Funcs.Funcs {
		fn := &function{name: f.Name, ret: int(f.Return), memo: -1, calls: map[*function]bool{}}
		fn.shared = fn.ret
		for _, p := range f.Params {
			fn.params = append(fn.params, int(p))
			fn.shared = max(fn.shared, int(p))
		}
		fn.shared++
		if len(f.Params) == 2 { // input and data only
			fn.memo = c.prog.memos
			c.prog.memos++
		}
		c.funcs[f.Name] = fn
		c.byPath.add(f.Path, fn)
		c.noFold = c.noFold || replacesData(f.Blocks)
	}
	c.noFold = c.noFold || replacesData(plan.Plans.Plans[0].Blocks)
	for _, f := range plan.Funcs.Funcs {
		c.fn, c.locals = c.funcs[f.Name], int(ir.Unused)
		c.see(f.Return)
		for _, p := range f.Params {
			c.see(p)
		}
		c.fn.body = c.body(f.Blocks)
		c.fn.nregs = c.locals
	}
	c.fn, c.locals = &function{shared: int(ir.Data), calls: map[*function]bool{}}, int(ir.Unused)
	c.prog.plan = c.body(plan.Plans.Plans[0].Blocks)
	c.fn.nregs = c.locals
	c.prog.planRegs = c.locals
	c.prog.regs = c.fn.need(0)
}

// need is how many registers a chain of calls from f takes at most.
func (f *function) need(depth int) int {
	if f.stack > 0 {
		return f.stack
	}
	if depth > 10_000 {
		refuse("%s calls itself", f.name)
	}
	most := 0
	for g := range f.calls {
		most = max(most, g.need(depth+1))
	}
	if f.stack = f.nregs + most; f.stack > maxRegs {
		refuse("%s needs more than %d registers", f.name, maxRegs)
	}
	return f.stack
}

func (n *pathNode) add(path []string, fn *function) {
	for _, s := range path {
		child := n.next[s]
		if child == nil {
			child = &pathNode{}
			if n.next == nil {
				n.next = map[string]*pathNode{}
			}
			n.next[s] = child
		}
		n = child
	}
	if len(path) > 0 {
		n.fn = fn
	}
}

// under collects the functions below n.
func (n *pathNode) under(into map[*function]bool) {
	if n.fn != nil {
		into[n.fn] = true
	}
	for _, child := range n.next {
		child.under(into)
	}
}

// replacesData reports whether a `with` changes data.
func replacesData(blocks []*ir.Block) bool {
	found := false
	for _, b := range blocks {
		walk(b, func(s ir.Stmt) {
			if w, ok := s.(*ir.WithStmt); ok && w.Local == ir.Data {
				found = true
			}
		})
	}
	return found
}

// walk visits the statements of b and of the blocks in it.
func walk(b *ir.Block, visit func(ir.Stmt)) {
	for _, s := range b.Stmts {
		visit(s)
		switch s := s.(type) {
		case *ir.BlockStmt:
			for _, inner := range s.Blocks {
				walk(inner, visit)
			}
		case *ir.ScanStmt:
			walk(s.Block, visit)
		case *ir.NotStmt:
			walk(s.Block, visit)
		case *ir.WithStmt:
			walk(s.Block, visit)
		}
	}
}

// see makes room for a local and returns its register.
func (c *compiler) see(l ir.Local) int {
	c.locals = max(c.locals, int(l)+1)
	return int(l)
}

func (c *compiler) body(blocks []*ir.Block) []*block {
	out := make([]*block, len(blocks))
	for i, b := range blocks {
		c.count(b)
		out[i] = c.block(b)
	}
	return out
}

// count finds out which locals are assigned once in b, so that their value is
// the same wherever it is known.
func (c *compiler) count(b *ir.Block) {
	c.writes, c.changes, c.values = map[ir.Local]int{}, map[ir.Local]int{}, map[ir.Local]Value{}
	walk(b, func(s ir.Stmt) {
		switch s := s.(type) {
		case *ir.AssignIntStmt:
			c.writes[s.Target]++
		case *ir.AssignVarStmt:
			c.writes[s.Target]++
		case *ir.AssignVarOnceStmt:
			c.writes[s.Target]++
		case *ir.ResetLocalStmt:
			c.writes[s.Target]++
		case *ir.CallStmt:
			c.writes[s.Result]++
		case *ir.CallDynamicStmt:
			c.writes[s.Result]++
		case *ir.DotStmt:
			c.writes[s.Target]++
		case *ir.LenStmt:
			c.writes[s.Target]++
		case *ir.ScanStmt:
			c.writes[s.Key]++
			c.writes[s.Value]++
		case *ir.MakeNullStmt:
			c.writes[s.Target]++
		case *ir.MakeNumberIntStmt:
			c.writes[s.Target]++
		case *ir.MakeNumberRefStmt:
			c.writes[s.Target]++
		case *ir.MakeArrayStmt:
			c.writes[s.Target]++
		case *ir.MakeObjectStmt:
			c.writes[s.Target]++
		case *ir.MakeSetStmt:
			c.writes[s.Target]++
		case *ir.ObjectMergeStmt:
			c.writes[s.Target]++
		case *ir.WithStmt:
			c.writes[s.Local]++
		case *ir.ArrayAppendStmt:
			c.changes[s.Array]++
		case *ir.ObjectInsertStmt:
			c.changes[s.Object]++
		case *ir.ObjectInsertOnceStmt:
			c.changes[s.Object]++
		case *ir.SetAddStmt:
			c.changes[s.Set]++
		}
	})
}

func (c *compiler) block(b *ir.Block) *block {
	depth := len(c.known)
	out := &block{ops: make([]op, 0, len(b.Stmts))}
	for i, s := range b.Stmts {
		if o := c.stmt(s, b.Stmts[i+1:]); o != nil {
			out.ops = append(out.ops, o)
		}
	}
	out.cost = 1 + len(out.ops)
	for _, l := range c.known[depth:] {
		delete(c.values, l)
	}
	c.known = c.known[:depth]
	return out
}

// learn notes that l has the value v from here to the end of the block.
func (c *compiler) learn(l ir.Local, v Value) {
	if _, have := c.values[l]; have || !c.once(l) {
		return
	}
	c.values[l] = v
	c.known = append(c.known, l)
}

// once reports whether l is assigned once in the block being lowered, and in no
// other. Locals that are shared by the definitions of a function come before
// those that each of them numbers anew: parameters, the result, and behind them
// the result of one definition.
func (c *compiler) once(l ir.Local) bool {
	return c.writes[l] == 1 && int(l) > c.fn.shared
}

func (c *compiler) valueOf(l ir.Local) (Value, bool) {
	if l == ir.Data && !c.noFold {
		return c.prog.data, true
	}
	v, ok := c.values[l]
	return v, ok
}

// An operand is a constant or a register.
type operand struct {
	value Value
	reg   int // -1: the value
}

func (o *operand) isConst() bool { return o.reg < 0 }

func (o *operand) get(r []Value) Value {
	if o.reg < 0 {
		return o.value
	}
	return r[o.reg]
}

func (c *compiler) operand(o ir.Operand) operand {
	switch v := o.Value.(type) {
	case ir.Local:
		return c.local(v)
	case ir.StringIndex:
		return operand{value: c.consts[v], reg: -1}
	case ir.Bool:
		return operand{value: boolValue(bool(v)), reg: -1}
	}
	refuse("operand %T", o.Value)
	return operand{}
}

func (c *compiler) local(l ir.Local) operand {
	if v, ok := c.valueOf(l); ok {
		return operand{value: v, reg: -1}
	}
	return operand{reg: c.see(l)}
}

// A draft is a collection that a run of statements writes down.
type draft struct {
	kind       Kind
	keys, vals []Value
	left       int // statements that will still change it
}

// literal makes the collection that a Make statement and the statements right
// behind it write, if all of it is constant and nothing changes it later.
func (c *compiler) literal(target ir.Local, first ir.Stmt, rest []ir.Stmt) (Value, bool) {
	drafts := map[ir.Local]*draft{}
	begin := func(l ir.Local, k Kind) {
		if c.once(l) {
			drafts[l] = &draft{kind: k, left: c.changes[l]}
		}
	}
	value := func(o ir.Operand) (Value, bool) {
		if l, ok := o.Value.(ir.Local); ok {
			if d := drafts[l]; d != nil {
				return c.finish(d)
			}
		}
		v := c.operand(o)
		return v.value, v.isConst()
	}
	for i := -1; i < len(rest); i++ {
		s := first
		if i >= 0 {
			s = rest[i]
		}
		var d *draft
		var k, v ir.Operand
		switch s := s.(type) {
		case *ir.MakeArrayStmt:
			begin(s.Target, Array)
		case *ir.MakeSetStmt:
			begin(s.Target, Set)
		case *ir.MakeObjectStmt:
			begin(s.Target, Object)
		case *ir.MakeNumberRefStmt:
			c.learn(s.Target, numberValue(c.consts[s.Index].str()))
		case *ir.MakeNumberIntStmt:
			c.learn(s.Target, intValue(s.Value))
		case *ir.MakeNullStmt:
			c.learn(s.Target, nullValue())
		case *ir.ArrayAppendStmt:
			d, v = drafts[s.Array], s.Value
		case *ir.SetAddStmt:
			d, v = drafts[s.Set], s.Value
		case *ir.ObjectInsertStmt:
			d, k, v = drafts[s.Object], s.Key, s.Value
		default:
			return Value{}, false
		}
		if v.Value != nil {
			val, ok := value(v)
			if d == nil || !ok {
				return Value{}, false
			}
			if k.Value != nil {
				key, ok := value(k)
				if !ok {
					return Value{}, false
				}
				d.keys = append(d.keys, key)
			}
			d.vals = append(d.vals, val)
			d.left--
		}
		if d := drafts[target]; d == nil || d.left == 0 {
			if d == nil {
				return Value{}, false
			}
			return c.finish(d)
		}
	}
	return Value{}, false
}

func (c *compiler) finish(d *draft) (Value, bool) {
	if d.left != 0 {
		return Value{}, false
	}
	switch d.kind {
	case Array:
		return arrayValue(&array{elems: d.vals}), true
	case Set:
		return c.build.set(d.vals), true
	}
	v := c.build.object(d.keys, d.vals)
	keys := v.object().keys
	for i := 1; i < len(keys); i++ {
		if c.build.compare(keys[i-1], keys[i]) == 0 {
			return Value{}, false
		}
	}
	return v, true
}

// funcNamed is the policy's function that a call names, nil for a builtin.
func (c *compiler) funcNamed(name string) *function {
	f := c.funcs[name]
	if f != nil {
		c.fn.calls[f] = true
	}
	return f
}

// describe shortens a function's name for messages: g0.data.a.b is data.a.b.
func describe(name string) string {
	_, after, ok := strings.Cut(name, ".")
	if !ok {
		return name
	}
	return after
}
