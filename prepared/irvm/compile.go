package irvm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
)

// ErrUnsupported is wrapped by Compile's errors: the plan is one for the
// interpreter.
var ErrUnsupported = errors.New("plan not supported")

// Bounds of what is evaluated at load: steps of all rules together, and memory
// of one.
const (
	foldSteps  = 10_000_000
	foldMemory = 4 << 20
)

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
	name    string
	body    []*block
	index   *ruleIndex
	lowered bool     // the planner puts a function behind those that it calls
	live    bool     // it calls a builtin that does not give the same every time
	folded  bool     // its value does not depend on the input, and is
	value   Value    // this one
	arity   int      // parameters, input and data among them
	result  ir.Local // the local of the value, and
	ret     int      // its register
	params  []int    // registers of the parameters; -1: nothing reads it
	nregs   int
	shared  ir.Local // the last local that all definitions share
	memo    int      // place in the memo; -1: it has arguments
	stack   int      // registers of the deepest chain of calls from here; 0: not known yet
	calls   map[*function]bool
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

// Compile lowers a plan over data, which FromJSON made. The error wraps
// ErrUnsupported when the plan uses what this machine has not.
func Compile(plan *ir.Policy, data Value, o Options) (p *Program, err error) {
	c := &compiler{
		prog:   &Program{lenient: o.Lenient, limits: o.Limits.WithDefaults(), capabilities: o.Capabilities},
		build:  builder{texts: map[string]string{}},
		funcs:  map[string]*function{},
		byPath: &pathNode{},

		foldSteps: foldSteps,
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
	c.prog.data = data
	c.compile(plan)
	c.prog.machines.New = func() any { return c.prog.newMachine() }
	return c.prog, nil
}

// refusal is what the compiler panics with on what it cannot lower.
type refusal string

func refuse(format string, args ...any) { panic(refusal(fmt.Sprintf(format, args...))) }

type compiler struct {
	prog      *Program
	build     builder
	consts    []Value // the plan's strings
	funcs     map[string]*function
	byPath    *pathNode // for calls whose function is known at run time only
	foldSteps int64     // left
	noFold    bool      // a `with` replaces data: what is under data is not constant

	// Of the function being lowered.
	fn   *function
	regs map[ir.Local]int  // registers of the locals that some op uses
	read map[ir.Local]bool // locals that some block reads
	// Of its block that is being lowered.
	uses  map[ir.Local]*use
	facts map[ir.Local]operand // locals whose value is known, or that of another local
	known []ir.Local           // those, the latest last
	skip  int                  // statements behind the current one that its op has done too
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
		fn := &function{name: f.Name, arity: len(f.Params), memo: -1, calls: map[*function]bool{}}
		fn.shared = max(f.Return, slices.Max(f.Params)) + 1
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
		c.fn, c.regs = c.funcs[f.Name], map[ir.Local]int{}
		c.fn.ret = c.see(f.Return)
		c.fn.result = f.Return
		c.fn.body = c.body(f.Blocks)
		c.fn.index = c.index(f.Blocks)
		for _, p := range f.Params {
			c.fn.params = append(c.fn.params, c.reader(p))
		}
		c.fn.nregs = len(c.regs)
		c.fn.lowered = true
		c.fold(c.fn)
	}
	c.fn, c.regs = &function{shared: ir.Data, calls: map[*function]bool{}}, map[ir.Local]int{}
	c.see(ir.Input) // register 0
	c.see(ir.Data)  // register 1
	c.prog.plan = c.body(plan.Plans.Plans[0].Blocks)
	c.fn.nregs = len(c.regs)
	c.prog.planRegs = c.fn.nregs
	c.prog.regs = c.fn.need(0)
}

// fold evaluates a rule without arguments that depends on nothing but data and
// constants. Whatever is in the way of it, the rule is evaluated like others.
func (c *compiler) fold(fn *function) {
	if fn.memo < 0 || fn.live || c.noFold || c.reader(ir.Input) >= 0 {
		return
	}
	limits := c.prog.limits
	limits.Steps, limits.Memory = c.foldSteps, foldMemory
	p := Program{lenient: c.prog.lenient, limits: limits, capabilities: c.prog.capabilities, regs: fn.need(0), memos: c.prog.memos}
	m := p.newMachine()
	m.begin(context.Background())
	defer m.end()
	var v Value
	err := func() (err error) {
		defer m.recover(&v, &err)
		m.openFrame()
		v = m.invoke(fn, []operand{{}, {}}, []Value{{}})
		return nil
	}()
	c.foldSteps = max(1, c.foldSteps-int64(m.steps))
	if err == nil {
		fn.folded, fn.value = true, c.build.keep(v)
	}
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
		for _, inner := range accessOf(s).blocks {
			walk(inner, visit)
		}
	}
}

// see returns the register of a local.
func (c *compiler) see(l ir.Local) int {
	reg, ok := c.regs[l]
	if !ok {
		reg = len(c.regs)
		c.regs[l] = reg
	}
	return reg
}

func (c *compiler) body(blocks []*ir.Block) []*block {
	c.read = map[ir.Local]bool{}
	for _, b := range blocks {
		walk(b, func(s ir.Stmt) {
			for _, l := range accessOf(s).reads {
				c.read[l] = true
			}
		})
	}
	out := make([]*block, 0, len(blocks))
	for i, b := range blocks {
		if i == len(blocks)-1 && len(b.Stmts) == 1 {
			if _, ok := b.Stmts[0].(*ir.ReturnLocalStmt); ok {
				break // it is the end anyway
			}
		}
		c.count(b)
		out = append(out, c.block(b))
	}
	return out
}

// A use says what a block, one of those that a function consists of, does with
// a local.
type use struct {
	writes  int
	reads   int
	changes int   // to the collection in it
	path    []int // of the block in the blocks where it is written
	outside bool  // it is read where that block has ended
}

func (c *compiler) use(l ir.Local) *use {
	u := c.uses[l]
	if u == nil {
		u = &use{}
		c.uses[l] = u
	}
	return u
}

// count finds out what b does with its locals.
func (c *compiler) count(b *ir.Block) {
	c.uses, c.facts = map[ir.Local]*use{}, map[ir.Local]operand{}
	var path []int
	blocks := 0
	var visit func(b *ir.Block)
	visit = func(b *ir.Block) {
		blocks++
		path = append(path, blocks)
		for _, s := range b.Stmts {
			a := accessOf(s)
			for _, l := range a.reads {
				u := c.use(l)
				u.reads++
				n := len(u.path)
				u.outside = u.outside || n == 0 || n > len(path) || path[n-1] != u.path[n-1]
			}
			for _, l := range a.writes {
				u := c.use(l)
				u.writes++
				if u.path == nil {
					u.path = slices.Clone(path)
				}
			}
			if a.changed >= 0 {
				c.use(a.changed).changes++
			}
			for _, inner := range a.blocks {
				visit(inner)
			}
		}
		path = path[:len(path)-1]
	}
	visit(b)
}

// An access says which locals a statement reads and writes.
type access struct {
	reads, writes []ir.Local
	changed       ir.Local // the collection in it is changed; -1: none
	blocks        []*ir.Block
}

func accessOf(s ir.Stmt) access {
	a := access{changed: -1}
	read := func(ops ...ir.Operand) {
		for _, o := range ops {
			if l, ok := o.Value.(ir.Local); ok {
				a.reads = append(a.reads, l)
			}
		}
	}
	write := func(ls ...ir.Local) { a.writes = append(a.writes, ls...) }
	change := func(l ir.Local) {
		a.reads = append(a.reads, l)
		a.changed = l
	}
	switch s := s.(type) {
	case *ir.AssignIntStmt:
		write(s.Target)
	case *ir.AssignVarStmt:
		read(s.Source)
		write(s.Target)
	case *ir.AssignVarOnceStmt:
		read(s.Source)
		a.reads = append(a.reads, s.Target)
		write(s.Target)
	case *ir.ResetLocalStmt:
		write(s.Target)
	case *ir.CallStmt:
		read(s.Args...)
		write(s.Result)
	case *ir.CallDynamicStmt:
		read(s.Path...)
		a.reads = append(a.reads, s.Args...)
		write(s.Result)
	case *ir.DotStmt:
		read(s.Source, s.Key)
		write(s.Target)
	case *ir.LenStmt:
		read(s.Source)
		write(s.Target)
	case *ir.EqualStmt:
		read(s.A, s.B)
	case *ir.NotEqualStmt:
		read(s.A, s.B)
	case *ir.IsArrayStmt:
		read(s.Source)
	case *ir.IsObjectStmt:
		read(s.Source)
	case *ir.IsSetStmt:
		read(s.Source)
	case *ir.IsDefinedStmt:
		a.reads = append(a.reads, s.Source)
	case *ir.IsUndefinedStmt:
		a.reads = append(a.reads, s.Source)
	case *ir.ReturnLocalStmt:
		a.reads = append(a.reads, s.Source)
	case *ir.ResultSetAddStmt:
		a.reads = append(a.reads, s.Value)
	case *ir.MakeNullStmt:
		write(s.Target)
	case *ir.MakeNumberIntStmt:
		write(s.Target)
	case *ir.MakeNumberRefStmt:
		write(s.Target)
	case *ir.MakeArrayStmt:
		write(s.Target)
	case *ir.MakeObjectStmt:
		write(s.Target)
	case *ir.MakeSetStmt:
		write(s.Target)
	case *ir.ObjectMergeStmt:
		a.reads = append(a.reads, s.A, s.B)
		write(s.Target)
	case *ir.ArrayAppendStmt:
		read(s.Value)
		change(s.Array)
	case *ir.ObjectInsertStmt:
		read(s.Key, s.Value)
		change(s.Object)
	case *ir.ObjectInsertOnceStmt:
		read(s.Key, s.Value)
		change(s.Object)
	case *ir.SetAddStmt:
		read(s.Value)
		change(s.Set)
	case *ir.BlockStmt:
		a.blocks = s.Blocks
	case *ir.NotStmt:
		a.blocks = []*ir.Block{s.Block}
	case *ir.ScanStmt:
		a.reads = append(a.reads, s.Source)
		write(s.Key, s.Value)
		a.blocks = []*ir.Block{s.Block}
	case *ir.WithStmt:
		read(s.Value)
		a.reads = append(a.reads, s.Local)
		write(s.Local)
		a.blocks = []*ir.Block{s.Block}
	}
	return a
}

func (c *compiler) block(b *ir.Block) *block {
	depth, skip := len(c.known), c.skip
	out := &block{}
	c.stmts(b.Stmts, out)
	out.cost = 1 + len(out.ops)
	for _, l := range c.known[depth:] {
		delete(c.facts, l)
	}
	c.known, c.skip = c.known[:depth], skip
	return out
}

func (c *compiler) stmts(stmts []ir.Stmt, out *block) {
	for i := 0; i < len(stmts); i++ {
		if inner, ok := spliced(stmts[i]); ok {
			c.stmts(inner, out)
			continue
		}
		c.skip = 0
		if o := c.stmt(stmts[i], stmts[i+1:]); o != nil {
			out.ops = append(out.ops, o)
		}
		i += c.skip
	}
}

// spliced recognizes how the planner writes that statements must succeed,
//
//	block { block { block { block { statements; break 1 } }; break 1 } }
//
// which is the same as the statements alone.
func spliced(s ir.Stmt) ([]ir.Stmt, bool) {
	outer, ok := s.(*ir.BlockStmt)
	if !ok || len(outer.Blocks) != 1 || len(outer.Blocks[0].Stmts) != 2 || !isBreak(outer.Blocks[0].Stmts[1], 1) {
		return nil, false
	}
	nested, ok := outer.Blocks[0].Stmts[0].(*ir.BlockStmt)
	if !ok || len(nested.Blocks) != 1 {
		return nil, false
	}
	stmts := nested.Blocks[0].Stmts
	last := len(stmts) - 1
	if last < 0 || !isBreak(stmts[last], 1) || crosses(&ir.Block{Stmts: stmts[:last]}, 0) {
		return nil, false
	}
	return stmts[:last], true
}

func isBreak(s ir.Stmt, index uint32) bool {
	b, ok := s.(*ir.BreakStmt)
	return ok && b.Index == index
}

// learn notes that l is what from is, from here to the end of the block. It
// reports whether all that reads l will know: l then needs no register.
func (c *compiler) learn(l ir.Local, from operand) bool {
	u := c.uses[l]
	if !c.once(l) {
		return false
	}
	if _, have := c.facts[l]; !have {
		c.facts[l] = from
		c.known = append(c.known, l)
	}
	return !u.outside
}

// once reports whether l is assigned once in the block being lowered, and in no
// other. Locals that are shared by the definitions of a function come before
// those that each of them numbers anew: parameters, the result, and behind them
// the result of one definition.
func (c *compiler) once(l ir.Local) bool {
	u := c.uses[l]
	return u != nil && u.writes == 1 && l > c.fn.shared
}

// stable reports whether l, which has a value now, keeps it to the end of the block.
func (c *compiler) stable(l ir.Local) bool {
	u := c.uses[l]
	return u == nil || u.writes == 0 || c.once(l)
}

func (c *compiler) isConst(l ir.Local) bool {
	o := c.local(l)
	return o.isConst()
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
	if l == ir.Data && !c.noFold {
		return operand{value: c.prog.data, reg: -1}
	}
	if o, ok := c.facts[l]; ok {
		return o
	}
	return operand{reg: c.see(l)}
}

func constOperand(v Value) operand { return operand{value: v, reg: -1} }

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
			drafts[l] = &draft{kind: k, left: c.uses[l].changes}
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
			c.learn(s.Target, constOperand(numberValue(c.consts[s.Index].str())))
		case *ir.MakeNumberIntStmt:
			c.learn(s.Target, constOperand(intValue(s.Value)))
		case *ir.MakeNullStmt:
			c.learn(s.Target, constOperand(nullValue()))
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
		return arrayValue(&array{elems: d.vals, fixed: true}), true
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
		c.fn.live = c.fn.live || f.live || !f.lowered
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
