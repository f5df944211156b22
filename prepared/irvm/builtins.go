package irvm

import (
	"maps"
	"math"
	"slices"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"
)

// The builtins here do what those of OPA do, to the byte. What an operand makes
// them do differently than in the plain case, a number that is no int64 for
// instance, they leave to OPA's function; what is an error in OPA they leave to
// the interpreter, which knows how to say it.

type (
	func1 = func(m *Machine, a Value) Value
	func2 = func(m *Machine, a, b Value) Value
	func3 = func(m *Machine, a, b, c Value) Value
)

// native maps the name of a builtin to a func1, func2 or func3, or to a
// special. They return the zero Value for undefined, and what failed says for a
// failure.
var native map[string]any

// A special lowers the call of a builtin that gains from knowing its constant
// operands. nil: it does not.
type special func(c *compiler, args []operand, to result) op

func init() { // not a literal: some of them call others by name
	native = map[string]any{
		"lt":    func2(func(m *Machine, a, b Value) Value { return boolValue(m.compare(a, b) < 0) }),
		"lte":   func2(func(m *Machine, a, b Value) Value { return boolValue(m.compare(a, b) <= 0) }),
		"gt":    func2(func(m *Machine, a, b Value) Value { return boolValue(m.compare(a, b) > 0) }),
		"gte":   func2(func(m *Machine, a, b Value) Value { return boolValue(m.compare(a, b) >= 0) }),
		"equal": func2(func(m *Machine, a, b Value) Value { return boolValue(m.equal(a, b)) }),
		"neq":   func2(func(m *Machine, a, b Value) Value { return boolValue(!m.equal(a, b)) }),

		"plus":  func2(plus),
		"minus": func2(minus),
		"mul":   func2(mul),
		"div":   func2(div),
		"rem":   func2(rem),
		"abs":   func1(abs),
		"round": func1(integer("round")),
		"ceil":  func1(integer("ceil")),
		"floor": func1(integer("floor")),

		"and":   func2(intersect),
		"or":    func2(union),
		"count": func1(countOf),
		"sum":   func1(sum),
		"max":   func1(maximum),
		"min":   func1(minimum),
		"sort":  func1(sorted),

		"array.concat":  func2(arrayConcat),
		"array.slice":   func3(arraySlice),
		"array.reverse": func1(arrayReverse),
		"numbers.range": func2(numbersRange),

		"internal.member_2": func2(member),
		"internal.member_3": func3(memberAt),
		"object.get":        func3(objectGet),
		"object.keys":       func1(objectKeys),
		"object.union":      func2(objectUnion),
		"object.remove":     func2(objectRemove),
		"walk":              func1(walkValue),

		"is_array":   func1(func(_ *Machine, a Value) Value { return boolValue(a.kind() == Array) }),
		"is_boolean": func1(func(_ *Machine, a Value) Value { return boolValue(a.kind() == Bool) }),
		"is_null":    func1(func(_ *Machine, a Value) Value { return boolValue(a.kind() == Null) }),
		"is_number":  func1(func(_ *Machine, a Value) Value { return boolValue(a.isNumber()) }),
		"is_object":  func1(func(_ *Machine, a Value) Value { return boolValue(a.kind() == Object) }),
		"is_set":     func1(func(_ *Machine, a Value) Value { return boolValue(a.kind() == Set) }),
		"is_string":  func1(func(_ *Machine, a Value) Value { return boolValue(a.kind() == String) }),
		"type_name":  func1(func(_ *Machine, a Value) Value { return keptString(a.kind().String()) }),
		"to_number":  func1(toNumber),

		"time.now_ns":    func0(func(m *Machine) Value { return intValue(m.now) }),
		"internal.print": void(func(*Machine) {}),
	}
	maps.Copy(native, nativeStrings)
	maps.Copy(native, nativeTimes)
}

type (
	func0 func(m *Machine) Value
	void  func(m *Machine)
)

// failed is what a builtin returns that OPA's would return an error for.
func (m *Machine) failed() Value {
	if !m.prog.lenient {
		m.redo("a builtin failed")
	}
	return Value{}
}

func (m *Machine) compare(a, b Value) int {
	c := compare(a, b, &m.steps)
	m.charge(0)
	return c
}

func (m *Machine) equal(a, b Value) bool {
	e := equal(a, b, &m.steps)
	m.charge(0)
	return e
}

// builtin lowers a call of one of OPA's builtins.
func (c *compiler) builtin(name string, args []operand, to result) op {
	f := native[name]
	if decl := ast.BuiltinMap[name]; decl == nil || decl.IsNondeterministic() {
		c.fn.live = true
	}
	if s, ok := f.(special); ok {
		if o := s(c, args, to); o != nil {
			return o
		}
	}
	switch f := f.(type) {
	case func0:
		return func(m *Machine, r []Value) int { return to.put(r, f(m)) }
	case void:
		return func(m *Machine, _ []Value) int { f(m); return next }
	case func1:
		a := args[0]
		return func(m *Machine, r []Value) int { return to.put(r, f(m, a.get(r))) }
	case func2:
		a, b := args[0], args[1]
		return func(m *Machine, r []Value) int { return to.put(r, f(m, a.get(r), b.get(r))) }
	case func3:
		a, b, d := args[0], args[1], args[2]
		return func(m *Machine, r []Value) int { return to.put(r, f(m, a.get(r), b.get(r), d.get(r))) }
	}
	return c.foreign(name, args, to)
}

// Arithmetic.

func plus(m *Machine, a, b Value) Value {
	if a.kind() == Int && b.kind() == Int {
		if s, ok := addInts(a.int(), b.int()); ok {
			return intValue(s)
		}
	}
	return m.callForeign("plus", a, b)
}

func minus(m *Machine, a, b Value) Value {
	if a.kind() == Int && b.kind() == Int {
		if d, ok := subInts(a.int(), b.int()); ok {
			return intValue(d)
		}
	}
	if a.kind() == Set && b.kind() == Set {
		out := m.newSet()
		for _, e := range a.set().elems {
			m.charge(1)
			if b.set().find(e, &m.steps) < 0 {
				m.add(out, e)
			}
		}
		return setValue(out)
	}
	return m.callForeign("minus", a, b)
}

func mul(m *Machine, a, b Value) Value {
	if a.kind() == Int && b.kind() == Int {
		if p, ok := mulInts(a.int(), b.int()); ok {
			return intValue(p)
		}
	}
	return m.callForeign("mul", a, b)
}

func div(m *Machine, a, b Value) Value {
	if x, y := a.int(), b.int(); a.kind() == Int && b.kind() == Int && x != 0 && y != 0 &&
		x >= math.MinInt32 && x <= math.MaxInt32 && x%y == 0 {
		return intValue(x / y)
	}
	return m.callForeign("div", a, b)
}

func rem(m *Machine, a, b Value) Value {
	if a.kind() == Int && b.kind() == Int && b.int() != 0 && b.int() != -1 {
		return intValue(a.int() % b.int())
	}
	return m.callForeign("rem", a, b)
}

func abs(m *Machine, a Value) Value {
	if a.kind() == Int && a.int() > math.MinInt64 {
		return intValue(max(a.int(), -a.int()))
	}
	return m.callForeign("abs", a)
}

// integer is a rounding, which leaves integers alone.
func integer(name string) func1 {
	return func(m *Machine, a Value) Value {
		if a.kind() == Int {
			return a
		}
		return m.callForeign(name, a)
	}
}

func numbersRange(m *Machine, a, b Value) Value {
	if a.kind() != Int || b.kind() != Int {
		if n := math.Abs(a.float() - b.float()); a.isNumber() && b.isNumber() && !(n < float64(m.mem)/arrayBytes) {
			m.overMemory()
		}
		return m.callForeign("numbers.range", a, b)
	}
	from, to := a.int(), b.int()
	step := int64(1)
	if from > to {
		step = -1
	}
	n := uint64(to-from)*uint64(step) + 1
	if n == 0 || n > uint64(m.mem)/valueBytes {
		m.overMemory()
	}
	m.charge(int(n))
	elems := m.takeValues(int(n))
	for i := range elems {
		elems[i] = intValue(from + int64(i)*step)
	}
	return m.newArray(elems)
}

func toNumber(m *Machine, a Value) Value {
	switch a.kind() {
	case Int, Decimal:
		return a
	case Bool:
		return intValue(int64(a.n))
	case Null:
		return intValue(0)
	case String:
		if i, ok := canonicalInt(a.str()); ok {
			return intValue(i)
		}
	}
	return m.callForeign("to_number", a)
}

// Collections.

func intersect(m *Machine, a, b Value) Value {
	if a.kind() != Set || b.kind() != Set {
		return m.failed()
	}
	x, y := a.set(), b.set()
	if len(y.elems) < len(x.elems) {
		x, y = y, x
	}
	out := m.newSet()
	for _, e := range x.elems {
		m.charge(1)
		if y.find(e, &m.steps) >= 0 {
			m.add(out, e)
		}
	}
	return setValue(out)
}

func union(m *Machine, a, b Value) Value {
	if a.kind() != Set || b.kind() != Set {
		return m.failed()
	}
	out := m.newSet()
	for _, s := range [2]*set{a.set(), b.set()} {
		for _, e := range s.elems {
			m.charge(1)
			m.add(out, e)
		}
	}
	return setValue(out)
}

func countOf(m *Machine, a Value) Value {
	switch a.kind() {
	case Array, Object, Set:
		return intValue(int64(a.length()))
	case String:
		m.charge(int(a.n >> 6))
		return intValue(int64(utf8.RuneCountInString(a.str())))
	}
	return m.failed()
}

// members are those of an array or a set, as they come.
func members(a Value) ([]Value, bool) {
	switch a.kind() {
	case Array:
		return a.array().elems, true
	case Set:
		return a.set().elems, true
	}
	return nil, false
}

func sum(m *Machine, a Value) Value {
	elems, ok := members(a)
	if !ok {
		return m.failed()
	}
	m.charge(len(elems))
	var s int64
	for _, e := range elems {
		t, ok := addInts(s, e.int())
		if e.kind() != Int || !ok {
			return m.callForeign("sum", a)
		}
		s = t
	}
	return intValue(s)
}

func maximum(m *Machine, a Value) Value {
	elems, ok := members(a)
	if !ok {
		return m.failed()
	}
	var best Value
	for _, e := range elems {
		m.charge(1)
		if best.kind() == Undefined || m.compare(best, e) <= 0 {
			best = e
		}
	}
	return best
}

func minimum(m *Machine, a Value) Value {
	elems, ok := members(a)
	if !ok {
		return m.failed()
	}
	var best Value
	for _, e := range elems {
		m.charge(1)
		if best.kind() == Undefined || m.compare(best, e) >= 0 {
			best = e
		}
	}
	return best
}

func sorted(m *Machine, a Value) Value {
	elems, ok := members(a)
	if !ok {
		return m.failed()
	}
	out := m.takeValues(len(elems))
	copy(out, elems)
	m.sortValues(out)
	return m.newArray(out)
}

func arrayConcat(m *Machine, a, b Value) Value {
	if a.kind() != Array || b.kind() != Array {
		return m.failed()
	}
	x, y := a.array().elems, b.array().elems
	m.charge(len(x) + len(y))
	return m.newArray(append(append(m.takeValues(len(x) + len(y))[:0], x...), y...))
}

func arraySlice(m *Machine, a, from, to Value) Value {
	lo, ok1 := smallInt(from)
	hi, ok2 := smallInt(to)
	if a.kind() != Array || !ok1 || !ok2 {
		return m.failed()
	}
	elems := a.array().elems
	hi = min(max(hi, 0), int64(len(elems)))
	lo = min(max(lo, 0), hi)
	return m.newArray(elems[lo:hi:hi])
}

func arrayReverse(m *Machine, a Value) Value {
	if a.kind() != Array {
		return m.failed()
	}
	m.charge(a.length())
	out := m.takeValues(a.length())
	copy(out, a.array().elems)
	slices.Reverse(out)
	return m.newArray(out)
}

func member(m *Machine, v, in Value) Value {
	var elems []Value
	switch in.kind() {
	case Set:
		return boolValue(in.set().find(v, &m.steps) >= 0)
	case Array:
		elems = in.array().elems
	case Object:
		elems = in.object().vals
	}
	m.charge(len(elems))
	for i := range elems {
		if equal(elems[i], v, &m.steps) {
			return boolValue(true)
		}
	}
	return boolValue(false)
}

func memberAt(m *Machine, k, v, in Value) Value {
	have := lookup(in, k, &m.steps)
	return boolValue(have.kind() != Undefined && m.equal(have, v))
}

func objectGet(m *Machine, obj, path, otherwise Value) Value {
	if obj.kind() != Object {
		return m.failed()
	}
	if path.kind() != Array {
		if v := obj.object().get(path, &m.steps); v.kind() != Undefined {
			return v
		}
		return otherwise
	}
	for _, k := range path.array().elems {
		m.charge(1)
		if obj = lookup(obj, k, &m.steps); obj.kind() == Undefined {
			return otherwise
		}
	}
	return obj
}

func objectKeys(m *Machine, a Value) Value {
	if a.kind() != Object {
		return m.failed()
	}
	o := a.object()
	m.charge(len(o.keys))
	s := m.newSet()
	s.elems = o.keys[:len(o.keys):len(o.keys)]
	if !o.sorted { // sorting one of them must not disturb the other
		s.elems = append(m.takeValues(len(o.keys))[:0], o.keys...)
	}
	s.tab, s.sorted = o.tab, o.sorted
	return setValue(s)
}

// objectUnion has all of a and b; where both have a key, b's value, or the union
// if both are objects.
func objectUnion(m *Machine, a, b Value) Value {
	if a.kind() != Object || b.kind() != Object {
		return m.failed()
	}
	x, y := a.object(), b.object()
	if len(x.keys) == 0 {
		return b
	}
	if len(y.keys) == 0 {
		return a
	}
	o := m.copyObject(x, len(y.keys))
	for i, k := range y.keys {
		m.charge(1)
		v := y.vals[i]
		if at := o.find(k, &m.steps); at < 0 {
			m.insert(o, k, v)
		} else if have := o.vals[at]; have.kind() == Object && v.kind() == Object {
			o.vals[at] = objectUnion(m, have, v)
		} else {
			o.vals[at] = v
		}
	}
	return objectValue(o)
}

// copyObject is a copy of o with room for more keys.
func (m *Machine) copyObject(from *object, more int) *object {
	n := len(from.keys)
	m.charge(n)
	o := m.newObject()
	o.keys = append(m.takeValues(n + more)[:0], from.keys...)
	o.vals = append(m.takeValues(n + more)[:0], from.vals...)
	o.tab, o.sorted, o.base = m.index(nil, o.keys), from.sorted, from.base
	return o
}

// has reports whether k is among the keys that a list, set or object names.
func (m *Machine) has(names, k Value) bool {
	switch names.kind() {
	case Object:
		return names.object().find(k, &m.steps) >= 0
	case Set:
		return names.set().find(k, &m.steps) >= 0
	}
	return member(m, k, names).isTrue()
}

func objectRemove(m *Machine, obj, names Value) Value {
	if k := names.kind(); obj.kind() != Object || k != Object && k != Set && k != Array {
		return m.failed()
	}
	from, o := obj.object(), m.newObject()
	for i, k := range from.keys {
		m.charge(1)
		if !m.has(names, k) {
			m.insert(o, k, from.vals[i])
		}
	}
	return objectValue(o)
}

// walkValue lists the pairs of path and value of all that a contains.
func walkValue(m *Machine, a Value) Value {
	w := walker{m: m}
	w.visit(nil, a)
	return m.newArray(w.out)
}

type walker struct {
	m   *Machine
	out []Value
}

func (w *walker) visit(path []Value, v Value) {
	m := w.m
	m.charge(1 + len(path))
	pair := m.takeValues(2)
	pair[0], pair[1] = m.newArray(path), v
	w.out = m.appendValue(w.out, m.newArray(pair))
	below := func(k, v Value) {
		longer := m.takeValues(len(path) + 1)
		copy(longer, path)
		longer[len(path)] = k
		w.visit(longer, v)
	}
	switch v.kind() {
	case Array:
		for i, e := range v.array().elems {
			below(intValue(int64(i)), e)
		}
	case Set:
		m.sort(v)
		for _, e := range v.set().elems {
			below(e, e)
		}
	case Object:
		m.sort(v)
		o := v.object()
		for i := range o.keys {
			below(o.keys[i], o.vals[i])
		}
	}
}
