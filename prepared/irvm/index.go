package irvm

import (
	"github.com/open-policy-agent/opa/v1/ir"
)

// minIndexed is from how many definitions of a rule an index is worth it.
const minIndexed = 4

// maxIndexed bounds the lists of an index together.
const maxIndexed = 1 << 20

// A ruleIndex picks the definitions of a rule that can apply. OPA's plan tries
// them one after the other; where each begins with comparing the same part of
// the input, or the same argument, with a constant, only those with the right
// constant need to be tried. The order among them stays.
type ruleIndex struct {
	root  int     // register of what the path begins at
	path  []Value // names
	keys  []Value // constants, each once
	tab   []uint32
	lists [][]*block // for each constant
	other []*block   // when the value is none of them, or is not there
}

func (x *ruleIndex) choose(m *Machine, own []Value) []*block {
	v := &own[x.root]
	for i := range x.path {
		if v.kind() != Object {
			return x.other
		}
		o := v.object()
		at := o.find(x.path[i], &m.steps)
		if at < 0 {
			return x.other
		}
		v = &o.vals[at]
	}
	if i := find(x.tab, x.keys, *v, &m.steps); i >= 0 {
		return x.lists[i]
	}
	return x.other
}

// A test is a comparison with a constant that a definition begins with.
type test struct {
	root ir.Local
	path string // names, each behind its length in two bytes
	key  Value
}

// index makes the index of the function that was lowered to c.fn.body, nil if
// it is worth none.
func (c *compiler) index(blocks []*ir.Block) *ruleIndex {
	if len(blocks) < minIndexed {
		return nil
	}
	type place struct {
		root ir.Local
		path string
	}
	votes := map[place]int{}
	tests := make([][]test, len(c.fn.body))
	for i := range tests {
		tests[i] = c.tests(blocks[i])
		for _, t := range tests[i] {
			votes[place{t.root, t.path}]++
		}
	}
	var best place
	for p, n := range votes {
		if n > votes[best] || n == votes[best] && (p.root < best.root || p.root == best.root && p.path < best.path) {
			best = p
		}
	}
	if votes[best] < minIndexed {
		return nil
	}

	// Which constant a block is for: -1 any. A block that begins with asking
	// whether the one before it gave a value goes with that one.
	x := &ruleIndex{path: names(best.path)}
	of := make([]int, len(tests))
	for i := range tests {
		of[i] = -1
		for _, t := range tests[i] {
			if t.root == best.root && t.path == best.path {
				of[i] = x.place(t.key, &c.build)
				break
			}
		}
		if first, ok := firstOf(blocks[i]).(*ir.IsDefinedStmt); ok && i > 0 && first.Source == c.fn.shared {
			of[i] = of[i-1]
		}
	}
	always := 0
	for i := range of {
		if of[i] < 0 {
			always++
		}
	}
	if always*len(x.keys) > maxIndexed {
		return nil
	}
	x.lists = make([][]*block, len(x.keys))
	for i, b := range c.fn.body {
		if of[i] >= 0 {
			x.lists[of[i]] = append(x.lists[of[i]], b)
			continue
		}
		for k := range x.lists {
			x.lists[k] = append(x.lists[k], b)
		}
		x.other = append(x.other, b)
	}
	x.tab = c.build.table(x.keys)
	x.root = c.see(best.root)
	return x
}

// place is the index of a constant among the keys, where it is put if need be.
func (x *ruleIndex) place(key Value, b *builder) int {
	if i := find(x.tab, x.keys, key, &b.steps); i >= 0 {
		return i
	}
	x.keys = append(x.keys, key)
	switch n := len(x.keys); {
	case n <= smallLen:
	case 2*n <= len(x.tab):
		insert(x.tab, hash(key, &b.steps), n-1)
	default:
		x.tab = make([]uint32, tableLen(2*n))
		for i := range x.keys {
			insert(x.tab, hash(x.keys[i], &b.steps), i)
		}
	}
	return len(x.keys) - 1
}

func firstOf(b *ir.Block) ir.Stmt { return follows(b.Stmts) }

func names(path string) (out []Value) {
	for path != "" {
		n := int(path[0])<<8 | int(path[1])
		out = append(out, keptString(path[2:2+n]))
		path = path[2+n:]
	}
	return out
}

// tests finds the comparisons with constants that b begins with. Statements
// that can neither fail nor change anything may stand between.
func (c *compiler) tests(b *ir.Block) (out []test) {
	type value struct {
		root  ir.Local
		path  string
		known bool // a constant
		key   Value
	}
	values := map[ir.Local]value{}
	of := func(o ir.Operand) (value, bool) {
		switch l := o.Value.(type) {
		case ir.StringIndex:
			return value{known: true, key: c.consts[l]}, true
		case ir.Bool:
			return value{known: true, key: boolValue(bool(l))}, true
		case ir.Local:
			if v, ok := values[l]; ok {
				return v, true
			}
			if l != ir.Data && l < c.fn.shared && l != c.fn.result {
				return value{root: l}, true // a parameter
			}
		}
		return value{}, false
	}
	for _, s := range b.Stmts {
		switch s := s.(type) {
		case *ir.ResetLocalStmt:
		case *ir.MakeNumberRefStmt:
			values[s.Target] = value{known: true, key: numberValue(c.consts[s.Index].str())}
		case *ir.MakeNumberIntStmt:
			values[s.Target] = value{known: true, key: intValue(s.Value)}
		case *ir.MakeNullStmt:
			values[s.Target] = value{known: true, key: nullValue()}
		case *ir.AssignVarStmt:
			if v, ok := of(s.Source); ok {
				values[s.Target] = v
			}
		case *ir.DotStmt:
			from, ok1 := of(s.Source)
			name, ok2 := of(s.Key)
			if ok1 && ok2 && !from.known && name.known && name.key.kind() == String && name.key.n < 1<<16 {
				from.path += string([]byte{byte(name.key.n >> 8), byte(name.key.n)}) + name.key.str()
				values[s.Target] = from
			}
		case *ir.EqualStmt:
			x, ok1 := of(s.A)
			y, ok2 := of(s.B)
			if x.known {
				x, y = y, x
			}
			if ok1 && ok2 && !x.known && y.known {
				out = append(out, test{x.root, x.path, y.key})
			}
		case *ir.NotEqualStmt, *ir.IsDefinedStmt, *ir.IsArrayStmt, *ir.IsObjectStmt, *ir.IsSetStmt:
		default:
			return out
		}
	}
	return out
}
