package irvm

import (
	"github.com/open-policy-agent/opa/v1/ir"
)

// undefined leaves the block that the statement stands in.
const undefined = 1

func leaveUnless(ok bool) int {
	if ok {
		return next
	}
	return undefined
}

// stmt lowers one statement; rest are those behind it in its block. nil: there
// is nothing to do when it is reached.
func (c *compiler) stmt(s ir.Stmt, rest []ir.Stmt) op {
	switch s := s.(type) {
	case *ir.NopStmt:
		return nil
	case *ir.AssignVarStmt:
		return c.assign(s)
	case *ir.AssignVarOnceStmt:
		return assignOnce(c.operand(s.Source), c.see(s.Target))
	case *ir.AssignIntStmt:
		return c.constant(s.Target, intValue(s.Value))
	case *ir.MakeNullStmt:
		return c.constant(s.Target, nullValue())
	case *ir.MakeNumberIntStmt:
		return c.constant(s.Target, intValue(s.Value))
	case *ir.MakeNumberRefStmt:
		return c.constant(s.Target, numberValue(c.consts[s.Index].str()))
	case *ir.ResetLocalStmt:
		if !c.read[s.Target] {
			return nil
		}
		t := c.see(s.Target)
		return func(_ *Machine, r []Value) int { r[t] = Value{}; return next }
	case *ir.MakeArrayStmt, *ir.MakeObjectStmt, *ir.MakeSetStmt:
		return c.collection(s, rest)
	case *ir.ArrayAppendStmt:
		if c.isConst(s.Array) {
			return nil
		}
		t, v := c.local(s.Array).reg, c.operand(s.Value)
		return func(m *Machine, r []Value) int {
			a := r[t].array()
			a.elems = m.appendValue(a.elems, v.get(r))
			return next
		}
	case *ir.SetAddStmt:
		if c.isConst(s.Set) {
			return nil
		}
		t, v := c.local(s.Set).reg, c.operand(s.Value)
		return func(m *Machine, r []Value) int {
			m.add(r[t].set(), v.get(r))
			return next
		}
	case *ir.ObjectInsertStmt:
		if c.isConst(s.Object) {
			return nil
		}
		t, k, v := c.local(s.Object).reg, c.operand(s.Key), c.operand(s.Value)
		return func(m *Machine, r []Value) int {
			m.insert(r[t].object(), k.get(r), v.get(r))
			return next
		}
	case *ir.ObjectInsertOnceStmt:
		t, k, v := c.local(s.Object).reg, c.operand(s.Key), c.operand(s.Value)
		return func(m *Machine, r []Value) int {
			o, key, val := r[t].object(), k.get(r), v.get(r)
			if at := o.find(key, &m.steps); at >= 0 {
				if !equal(o.vals[at], val, &m.steps) {
					m.redo("an object has two values for one key")
				}
				return next
			}
			m.insert(o, key, val)
			return next
		}
	case *ir.ObjectMergeStmt:
		a, b, t := c.local(s.A), c.local(s.B), c.see(s.Target)
		return func(m *Machine, r []Value) int {
			r[t] = m.merge(a.get(r), b.get(r))
			return next
		}
	case *ir.ResultSetAddStmt:
		v := c.local(s.Value)
		return func(m *Machine, r []Value) int {
			m.result = append(m.result, v.get(r))
			return next
		}
	case *ir.DotStmt:
		return c.dot(s, rest)
	case *ir.LenStmt:
		v, t := c.operand(s.Source), c.see(s.Target)
		return func(_ *Machine, r []Value) int {
			r[t] = intValue(int64(v.get(r).length()))
			return next
		}
	case *ir.EqualStmt:
		return equality(c.operand(s.A), c.operand(s.B), true)
	case *ir.NotEqualStmt:
		return equality(c.operand(s.A), c.operand(s.B), false)
	case *ir.IsArrayStmt:
		return isKind(c.operand(s.Source), Array)
	case *ir.IsObjectStmt:
		return isKind(c.operand(s.Source), Object)
	case *ir.IsSetStmt:
		return isKind(c.operand(s.Source), Set)
	case *ir.IsDefinedStmt:
		o := c.local(s.Source)
		if o.isConst() {
			return nil
		}
		v := o.reg
		if a, ok := follows(rest).(*ir.AssignVarOnceStmt); ok && a.Source.Value == ir.Val(s.Source) {
			c.skip = 1
			put := assignOnce(o, c.see(a.Target))
			return func(m *Machine, r []Value) int {
				if r[v].k == 0 {
					return undefined
				}
				return put(m, r)
			}
		}
		return func(_ *Machine, r []Value) int { return leaveUnless(r[v].k != 0) }
	case *ir.IsUndefinedStmt:
		v := c.local(s.Source)
		return func(_ *Machine, r []Value) int { return leaveUnless(v.get(r).kind() == Undefined) }
	case *ir.ReturnLocalStmt:
		if s.Source != c.fn.result {
			refuse("return of a local that is not the result")
		}
		return func(*Machine, []Value) int { return stop }
	case *ir.BreakStmt:
		n := int(s.Index) + 1
		return func(*Machine, []Value) int { return n }
	case *ir.BlockStmt:
		return c.nested(s)
	case *ir.NotStmt:
		return c.not(s)
	case *ir.ScanStmt:
		return c.scan(s)
	case *ir.WithStmt:
		return c.with(s)
	case *ir.CallStmt:
		return c.call(s, rest)
	case *ir.CallDynamicStmt:
		return c.callDynamic(s)
	}
	refuse("statement %T", s)
	return nil
}

// follows is the first of the statements behind one, nil if there is none.
func follows(rest []ir.Stmt) ir.Stmt {
	if len(rest) == 0 {
		return nil
	}
	return rest[0]
}

// constant assigns v.
func (c *compiler) constant(to ir.Local, v Value) op {
	if c.learn(to, constOperand(v)) {
		return nil
	}
	t := c.see(to)
	return func(_ *Machine, r []Value) int { r[t] = v; return next }
}

func (c *compiler) assign(s *ir.AssignVarStmt) op {
	from := c.operand(s.Source)
	if from.isConst() {
		return c.constant(s.Target, from.value)
	}
	// Not a register of its own, if the source keeps its value as long.
	if l := s.Source.Value.(ir.Local); c.stable(l) && c.once(s.Target) && c.learn(s.Target, from) {
		return nil
	}
	t, f := c.see(s.Target), from.reg
	return func(_ *Machine, r []Value) int { r[t] = r[f]; return next }
}

func assignOnce(from operand, t int) op {
	if from.isConst() && from.value.kind() == Bool {
		v := from.value
		return func(m *Machine, r []Value) int {
			if have := &r[t]; have.k != 0 && (have.k != v.k || have.n != v.n) {
				m.redo("a rule has two values")
			}
			r[t] = v
			return next
		}
	}
	return func(m *Machine, r []Value) int {
		v := from.get(r)
		if r[t].kind() != Undefined && !equal(r[t], v, &m.steps) {
			m.redo("a rule has two values")
		}
		r[t] = v
		return next
	}
}

func (c *compiler) collection(s ir.Stmt, rest []ir.Stmt) op {
	var target ir.Local
	var room int
	var kind Kind
	switch s := s.(type) {
	case *ir.MakeArrayStmt:
		target, room, kind = s.Target, int(s.Capacity), Array
	case *ir.MakeObjectStmt:
		target, kind = s.Target, Object
	case *ir.MakeSetStmt:
		target, kind = s.Target, Set
	}
	if v, ok := c.literal(target, s, rest); ok {
		return c.constant(target, v)
	}
	t := c.see(target)
	switch kind {
	case Array:
		return func(m *Machine, r []Value) int {
			r[t] = m.newArray(m.takeValues(room)[:0])
			return next
		}
	case Object:
		return func(m *Machine, r []Value) int { r[t] = objectValue(m.newObject()); return next }
	}
	return func(m *Machine, r []Value) int { r[t] = setValue(m.newSet()); return next }
}

func (c *compiler) dot(s *ir.DotStmt, rest []ir.Stmt) op {
	src, key := c.operand(s.Source), c.operand(s.Key)
	if src.isConst() && key.isConst() {
		v := lookup(src.value, key.value, &c.build.steps)
		if v.kind() == Undefined {
			return func(m *Machine, _ []Value) int { return m.missing(src.value, key.value) }
		}
		return c.constant(s.Target, v)
	}
	names, target := c.path(s, rest)
	switch {
	case src.isConst() && src.value.kind() == Object:
		o, k, t := src.value.object(), key.reg, c.see(s.Target)
		return func(m *Machine, r []Value) int {
			at := o.find(r[k], &m.steps)
			if at < 0 {
				return m.missing(src.value, r[k])
			}
			r[t] = o.vals[at]
			return next
		}
	case len(names) == 1:
		from, name, t := src.reg, names[0], c.see(target)
		return func(m *Machine, r []Value) int {
			v, ok := m.field(&r[from], &name)
			if !ok {
				return undefined
			}
			r[t] = *v
			return next
		}
	case len(names) > 1:
		from, t := src.reg, c.see(target)
		return func(m *Machine, r []Value) int {
			v, ok := &r[from], true
			for i := range names {
				if v, ok = m.field(v, &names[i]); !ok {
					return undefined
				}
			}
			r[t] = *v
			return next
		}
	}
	t := c.see(s.Target)
	return func(m *Machine, r []Value) int {
		from, k := src.get(r), key.get(r)
		v := lookup(from, k, &m.steps)
		if v.kind() == Undefined {
			return m.missing(from, k)
		}
		r[t] = v
		return next
	}
}

// path is the names that s and the lookups right behind it go through, if
// nothing else reads what lies between, and where the last one's result goes.
func (c *compiler) path(s *ir.DotStmt, rest []ir.Stmt) (names []Value, target ir.Local) {
	key := c.operand(s.Key)
	if !key.isConst() || key.value.kind() != String {
		return nil, 0
	}
	names, target = []Value{key.value}, s.Target
	for i := 0; i < len(rest); i++ {
		if a, ok := rest[i].(*ir.AssignVarStmt); ok && a.Source.Value == ir.Val(target) && c.between(target) && c.once(a.Target) && !c.uses[a.Target].outside {
			target = a.Target
			c.skip = i + 1
			continue
		}
		d, ok := rest[i].(*ir.DotStmt)
		if !ok || d.Source.Value != ir.Val(target) || !c.between(target) {
			break
		}
		if key = c.operand(d.Key); !key.isConst() || key.value.kind() != String {
			break
		}
		names, target = append(names, key.value), d.Target
		c.skip = i + 1
	}
	return names, target
}

// between reports whether l only hands a value on to the next statement.
func (c *compiler) between(l ir.Local) bool {
	return c.once(l) && c.uses[l].reads == 1 && !c.uses[l].outside
}

// field is a lookup of a text.
func (m *Machine) field(v, name *Value) (*Value, bool) {
	if v.kind() != Object {
		if v.kind() == Set && v.set().find(*name, &m.steps) >= 0 {
			return name, true
		}
		m.missing(*v, *name)
		return nil, false
	}
	o := v.object()
	if o.tab != nil {
		at := search(o.tab, o.keys, *name, &m.steps)
		if at < 0 {
			return nil, false
		}
		return &o.vals[at], true
	}
	s := name.str()
	for i := range o.keys {
		if k := &o.keys[i]; k.n == name.n && k.kind() == String && k.str() == s {
			return &o.vals[i], true
		}
	}
	return nil, false
}

// missing is what a lookup without a result does.
func (m *Machine) missing(v, k Value) int {
	if unlike(v, k) {
		m.redo("data looked up by a key of another type")
	}
	return undefined
}

// equality goes on if a == b is what want says.
func equality(a, b operand, want bool) op {
	if a.isConst() && b.isConst() {
		if steps := 0; equal(a.value, b.value, &steps) == want {
			return nil
		}
		return func(*Machine, []Value) int { return undefined }
	}
	if a.isConst() {
		a, b = b, a
	}
	if b.isConst() && !a.isConst() {
		x, v := a.reg, b.value
		switch v.kind() {
		case Bool, Null:
			return func(_ *Machine, r []Value) int {
				return leaveUnless((r[x].kind() == v.kind() && r[x].n == v.n) == want)
			}
		case String:
			s := v.str()
			return func(_ *Machine, r []Value) int {
				h := &r[x]
				return leaveUnless((h.kind() == String && h.n == v.n && h.str() == s) == want)
			}
		}
	}
	return func(m *Machine, r []Value) int {
		return leaveUnless(equal(a.get(r), b.get(r), &m.steps) == want)
	}
}

func isKind(v operand, k Kind) op {
	return func(_ *Machine, r []Value) int { return leaveUnless(v.get(r).kind() == k) }
}

func (c *compiler) nested(s *ir.BlockStmt) op {
	blocks := make([]*block, len(s.Blocks))
	for i, b := range s.Blocks {
		blocks[i] = c.block(b)
	}
	return func(m *Machine, r []Value) int {
		for _, b := range blocks {
			if n := b.run(m, r); n > 1 {
				return left(n)
			}
		}
		return next
	}
}

// left is what is still to leave after one block was.
func left(n int) int {
	if n == stop {
		return stop
	}
	return n - 1
}

func (c *compiler) not(s *ir.NotStmt) op {
	stmts := s.Block.Stmts
	cond, ok := condition(s.Block)
	if ok && setsLast(stmts, cond) && c.uses[cond].reads == 1 {
		// The condition holds whenever the end is reached.
		b := c.block(&ir.Block{Stmts: stmts[:len(stmts)-2]})
		return func(m *Machine, r []Value) int { return negated(b.run(m, r)) }
	}
	b := c.block(s.Block)
	if !ok {
		return func(m *Machine, r []Value) int { return negated(b.run(m, r)) }
	}
	t := c.see(cond)
	return func(m *Machine, r []Value) int {
		r[t] = Value{}
		return negated(b.run(m, r))
	}
}

// negated is what a `not` does when its block ended with n.
func negated(n int) int {
	switch n {
	case next:
		return undefined
	case undefined:
		return next
	}
	return left(n)
}

// setsLast reports whether stmts end with setting cond and looking at it.
func setsLast(stmts []ir.Stmt, cond ir.Local) bool {
	if len(stmts) < 2 {
		return false
	}
	a, ok := stmts[len(stmts)-2].(*ir.AssignVarStmt)
	return ok && a.Target == cond
}

// condition finds the local by which the block of a `not` tells at its end
// whether anything in it succeeded. The plan sets it and never resets it, so
// that in a loop it would still say what an earlier round found.
func condition(b *ir.Block) (ir.Local, bool) {
	if len(b.Stmts) == 0 {
		return 0, false
	}
	end, ok := b.Stmts[len(b.Stmts)-1].(*ir.IsDefinedStmt)
	if !ok {
		return 0, false
	}
	set := false
	walk(b, func(s ir.Stmt) {
		if a, ok := s.(*ir.AssignVarStmt); ok && a.Target == end.Source && a.Source.Value == ir.Val(ir.Bool(true)) {
			set = true
		}
	})
	return end.Source, set
}

func (c *compiler) scan(s *ir.ScanStmt) op {
	src := c.local(s.Source)
	if crosses(s.Block, 0) {
		refuse("a break out of a loop")
	}
	b := c.block(s.Block)
	// What no op of the loop reads has no register.
	k, v := c.reader(s.Key), c.reader(s.Value)
	anyOrder := c.anyOrder(s.Block)
	return func(m *Machine, r []Value) int {
		from := src.get(r)
		switch from.kind() {
		case Array:
			for i, e := range from.array().elems {
				if k >= 0 {
					r[k] = intValue(int64(i))
				}
				if v >= 0 {
					r[v] = e
				}
				if n := b.run(m, r); n > undefined {
					return n
				}
			}
		case Set:
			if !anyOrder {
				m.sort(from)
			}
			for _, e := range from.set().elems {
				if k >= 0 {
					r[k] = e
				}
				if v >= 0 {
					r[v] = e
				}
				if n := b.run(m, r); n > undefined {
					return n
				}
			}
		case Object:
			if !anyOrder {
				m.sort(from)
			}
			o := from.object()
			for i := range o.keys {
				if k >= 0 {
					r[k] = o.keys[i]
				}
				if v >= 0 {
					r[v] = o.vals[i]
				}
				if n := b.run(m, r); n > undefined {
					return n
				}
			}
		}
		return next
	}
}

// reader is the register of l if an op uses it, else -1.
func (c *compiler) reader(l ir.Local) int {
	if reg, ok := c.regs[l]; ok {
		return reg
	}
	return -1
}

// anyOrder reports whether the rounds of a loop over b come to the same in
// whatever order they are: what is left of them are constants.
func (c *compiler) anyOrder(b *ir.Block) bool {
	own := map[ir.Local]bool{}
	ok := true
	walk(b, func(s ir.Stmt) {
		switch s := s.(type) {
		case *ir.MakeArrayStmt:
			own[s.Target] = true
		case *ir.MakeObjectStmt:
			own[s.Target] = true
		case *ir.MakeSetStmt:
			own[s.Target] = true
		case *ir.ResultSetAddStmt:
			ok = false
		case *ir.SetAddStmt:
			if l, local := s.Value.Value.(ir.Local); local && !c.isConst(l) {
				ok = ok && own[s.Set]
			}
			return
		case *ir.AssignVarOnceStmt:
			_, local := s.Source.Value.(ir.Local)
			ok = ok && !local
			return
		}
		a := accessOf(s)
		ok = ok && (a.changed < 0 || own[a.changed])
		for _, l := range a.writes {
			if !own[l] && c.uses[l].outside {
				ok = false
			}
		}
	})
	return ok
}

// crosses reports whether a break in b leaves more than b and the blocks in it.
// OPA's planner makes no such break in a loop, and its meaning is not settled.
func crosses(b *ir.Block, depth int) bool {
	for _, s := range b.Stmts {
		switch s := s.(type) {
		case *ir.BreakStmt:
			if int(s.Index) > depth {
				return true
			}
		case *ir.BlockStmt:
			for _, inner := range s.Blocks {
				if crosses(inner, depth+1) {
					return true
				}
			}
		case *ir.NotStmt:
			if crosses(s.Block, depth+1) {
				return true
			}
		case *ir.WithStmt:
			if crosses(s.Block, depth+1) {
				return true
			}
		}
	}
	return false
}

func (c *compiler) with(s *ir.WithStmt) op {
	t, v := c.see(s.Local), c.operand(s.Value)
	path := make([]Value, len(s.Path))
	for i, p := range s.Path {
		path[i] = c.consts[p]
	}
	b := c.block(s.Block)
	return func(m *Machine, r []Value) int {
		saved := r[t]
		r[t] = m.upsert(saved, path, v.get(r))
		m.pushMemo()
		n := b.run(m, r)
		m.popMemo()
		r[t] = saved
		if n > undefined {
			return left(n)
		}
		return n
	}
}

// upsert is v with val at path; what is on the way and no object gives way.
func (m *Machine) upsert(v Value, path []Value, val Value) Value {
	if len(path) == 0 {
		return val
	}
	if v.kind() != Object {
		o := m.newObject()
		m.insert(o, path[0], m.upsert(Value{}, path[1:], val))
		return objectValue(o)
	}
	o := m.copyObject(v.object(), 1)
	below := o.get(path[0], &m.steps)
	m.insert(o, path[0], m.upsert(below, path[1:], val))
	return objectValue(o)
}

// merge joins base and virtual documents.
func (m *Machine) merge(a, b Value) Value {
	if a.kind() != Object || b.kind() != Object {
		m.redo("documents at one path")
	}
	x, y := a.object(), b.object()
	o := m.copyObject(x, len(y.keys))
	for i, k := range y.keys {
		v := y.vals[i]
		if at := o.find(k, &m.steps); at >= 0 {
			v = m.merge(o.vals[at], v)
		}
		m.insert(o, k, v)
	}
	return objectValue(o)
}

func (m *Machine) pushMemo() {
	m.depth++
	if m.depth == len(m.frames) {
		m.take(m.prog.memos * 32)
		m.frames = append(m.frames, frame{entries: make([]memoEntry, m.prog.memos)})
	}
	m.openFrame()
}

func (m *Machine) popMemo() {
	m.depth--
	m.memo = &m.frames[m.depth]
}

// openFrame forgets what the current frame holds.
func (m *Machine) openFrame() {
	m.memo = &m.frames[m.depth]
	if m.memo.gen++; m.memo.gen == 0 {
		clear(m.memo.entries)
		m.memo.gen = 1
	}
}

func (c *compiler) call(s *ir.CallStmt, rest []ir.Stmt) op {
	fn := c.funcNamed(s.Func)
	if fn != nil && fn.folded {
		if fn.value.kind() == Undefined {
			return func(*Machine, []Value) int { return undefined }
		}
		return c.constant(s.Result, fn.value)
	}
	args := make([]operand, len(s.Args))
	for i, a := range s.Args {
		if fn == nil || fn.params == nil || fn.params[i] >= 0 {
			args[i] = c.operand(a)
		}
	}
	if fn == nil {
		return c.builtin(s.Func, args, c.result(s.Result, rest))
	}
	if len(args) != fn.arity {
		refuse("%s is called with %d arguments, has %d", describe(fn.name), len(args), fn.arity)
	}
	if fn.memo < 0 {
		to := c.result(s.Result, rest)
		return func(m *Machine, r []Value) int { return to.put(r, m.invoke(fn, args, r)) }
	}
	if d, ok := follows(rest).(*ir.DotStmt); ok && d.Source.Value == ir.Val(s.Result) && c.between(s.Result) {
		if names, target := c.path(d, rest[1:]); len(names) > 0 {
			c.skip++
			to := c.result(target, rest[c.skip:])
			return func(m *Machine, r []Value) int {
				v, ok := m.rule(fn, args, r), true
				for i := range names {
					if v, ok = m.field(v, &names[i]); !ok {
						return undefined
					}
				}
				return to.put(r, *v)
			}
		}
		c.skip = 0
	}
	to := c.result(s.Result, rest)
	return func(m *Machine, r []Value) int { return to.put(r, *m.rule(fn, args, r)) }
}

// rule is the value of a rule without arguments, which is evaluated once.
func (m *Machine) rule(fn *function, args []operand, r []Value) *Value {
	e := &m.memo.entries[fn.memo]
	if gen := m.memo.gen; e.gen != gen {
		*e = memoEntry{gen, m.invoke(fn, args, r)}
	}
	return &e.value
}

// A result says what becomes of the value of a call.
type result struct {
	reg  int  // -1: nothing reads it
	test bool // the statement behind the call wants it not to be false
}

// result takes the statement that tests a call's value into the call.
func (c *compiler) result(l ir.Local, rest []ir.Stmt) result {
	to := result{}
	reads := 0
	if len(rest) > 0 {
		n, ok := rest[0].(*ir.NotEqualStmt)
		if ok && n.A.Value == ir.Val(l) && n.B.Value == ir.Val(ir.Bool(false)) {
			to.test = true
			c.skip++
			reads = 1
		}
	}
	if u := c.uses[l]; c.once(l) && u.reads == reads {
		to.reg = -1
	} else {
		to.reg = c.see(l)
	}
	return to
}

// put stores v and says how to go on.
func (to *result) put(r []Value, v Value) int {
	if v.kind() == Undefined || to.test && v.kind() == Bool && v.n == 0 {
		return undefined
	}
	if to.reg >= 0 {
		r[to.reg] = v
	}
	return next
}

// invoke runs a function of the policy and returns its value.
func (m *Machine) invoke(fn *function, args []operand, r []Value) Value {
	base := m.sp
	m.sp += fn.nregs
	m.high = max(m.high, m.sp)
	own := m.regs[base:m.sp:m.sp]
	clear(own)
	for i, to := range fn.params {
		if to >= 0 {
			own[to] = args[i].get(r)
		}
	}
	body := fn.body
	if fn.index != nil {
		body = fn.index.choose(m, own)
	}
	for _, b := range body {
		if b.run(m, own) == stop {
			break
		}
	}
	m.sp = base
	return own[fn.ret]
}

// callDynamic calls the function whose path is known at run time only. A path
// that is no function's leaves the block, where the plan looks into data next;
// a function without a value leaves the whole expression, which in the plan is
// four blocks.
func (c *compiler) callDynamic(s *ir.CallDynamicStmt) op {
	path := make([]operand, len(s.Path))
	root := c.byPath
	for i, p := range s.Path {
		path[i] = c.operand(p)
	}
	args := make([]operand, len(s.Args))
	for i, a := range s.Args {
		args[i] = c.local(a)
	}
	for ; len(path) > 0 && path[0].isConst() && root != nil; path = path[1:] {
		root = root.next[path[0].value.str()]
	}
	if root == nil {
		return func(*Machine, []Value) int { return undefined }
	}
	root.under(c.fn.calls)
	c.fn.live = true // which function it calls is not known
	res := c.see(s.Result)
	return func(m *Machine, r []Value) int {
		at := root
		for i := range path {
			k := path[i].get(r)
			if k.kind() != String {
				return undefined
			}
			if at = at.next[k.str()]; at == nil {
				return undefined
			}
		}
		fn := at.fn
		if fn == nil || fn.memo < 0 || len(args) != fn.arity {
			return undefined
		}
		v := m.rule(fn, args, r)
		if v.kind() == Undefined {
			return 4
		}
		r[res] = *v
		return next
	}
}
