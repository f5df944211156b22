package irvm

import (
	"cmp"
	"encoding/binary"
	"hash/maphash"
	"math"
	"slices"
	"strings"
	"unsafe"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Kind is what a Value is. The order is OPA's order of values of different
// types; Int and Decimal are both numbers.
type Kind uint8

// Kinds of values. The zero Kind is that of an undefined value.
const (
	Undefined Kind = iota
	Null
	Bool
	Int     // a number that is written as an integer of 64 bits
	Decimal // any other number: its text, exactly as it was written
	String
	Array
	Object
	Set
)

var kindNames = [...]string{"undefined", "null", "boolean", "number", "number", "string", "array", "object", "set"}

// String is the name that Rego has for the type.
func (k Kind) String() string { return kindNames[k] }

// rank is the place of k in the order of types.
func (k Kind) rank() int {
	if k == Decimal {
		return int(Int)
	}
	return int(k)
}

// Value is one Rego value in 24 bytes. It is a view: what it refers to lies in
// the arena of the Machine that made it, in the input, or in the Program, and
// lives no longer. The zero Value is undefined.
//
//	kind      p                 n
//	Bool                        0 or 1
//	Int                         the integer
//	Decimal   its text          nearest float64
//	String    its bytes         length
//	Array     *array
//	Object    *object
//	Set       *set
//
// p always is a pointer that the garbage collector knows, or nil. k holds the
// kind in its lowest byte, then flags, and the length of a Decimal's text in its
// upper half.
type Value struct {
	p unsafe.Pointer
	n uint64
	k uint64
}

// flagKept marks a String whose bytes belong to the Program: they outlive the
// evaluation.
const flagKept = 1 << 8

func (v Value) kind() Kind { return Kind(v.k) }
func (v Value) kept() bool { return v.k&flagKept != 0 }

type array struct {
	elems []Value
	fixed bool // belongs to the Program, and is never changed
	base  bool // of the data that the policy came with; see unlike
}

// A set holds each element once. An object holds each key once. Both are
// searched one by one while they are small; larger ones get a table.
type set struct {
	elems  []Value
	tab    []uint32 // nil, or as built by index
	sorted bool
	fixed  bool // as in array
}

type object struct {
	keys, vals []Value
	tab        []uint32
	sorted     bool // by key
	fixed      bool // as in array
	base       bool // as in array
}

// smallLen is up to how many members are searched one by one.
const smallLen = 8

func nullValue() Value { return Value{k: uint64(Null)} }

func boolValue(b bool) Value {
	if b {
		return Value{k: uint64(Bool), n: 1}
	}
	return Value{k: uint64(Bool)}
}

func intValue(i int64) Value { return Value{k: uint64(Int), n: uint64(i)} }

// stringValue refers to the bytes of s.
func stringValue(s string) Value {
	return Value{k: uint64(String), p: unsafe.Pointer(unsafe.StringData(s)), n: uint64(len(s))}
}

// keptString is stringValue of a string that the Program owns.
func keptString(s string) Value {
	v := stringValue(s)
	v.k |= flagKept
	return v
}

// stringOf is b as a string, without a copy: b must not be changed while it is in use.
func stringOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// bytesOf is s as bytes, which must not be changed.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

// offset is where in s its part lies. It reads no memory.
func offset(part, s string) int {
	return int(uintptr(unsafe.Pointer(unsafe.StringData(part))) - uintptr(unsafe.Pointer(unsafe.StringData(s))))
}

func arrayValue(a *array) Value   { return Value{k: uint64(Array), p: unsafe.Pointer(a)} }
func objectValue(o *object) Value { return Value{k: uint64(Object), p: unsafe.Pointer(o)} }
func setValue(s *set) Value       { return Value{k: uint64(Set), p: unsafe.Pointer(s)} }

// decimalValue is the number that s writes; s is a number in JSON's grammar, or
// what OPA's arithmetic printed. Integers that fit become an Int when they are
// written in the one way that Int prints them.
func numberValue(s string) Value {
	if i, ok := canonicalInt(s); ok {
		return intValue(i)
	}
	return Value{k: uint64(Decimal) | uint64(len(s))<<32, p: unsafe.Pointer(unsafe.StringData(s)), n: math.Float64bits(nearest(s))}
}

func (v Value) array() *array   { return (*array)(v.p) }
func (v Value) object() *object { return (*object)(v.p) }
func (v Value) set() *set       { return (*set)(v.p) }
func (v Value) int() int64      { return int64(v.n) }

// str is the text of a String. It refers to the bytes of v.
func (v Value) str() string { return unsafe.String((*byte)(v.p), int(v.n)) }

// text is the text of a Decimal.
func (v Value) text() string { return unsafe.String((*byte)(v.p), int(v.k>>32)) }

// float is the float64 nearest to a number; infinite for one that has none.
func (v Value) float() float64 {
	if v.kind() == Int {
		return float64(int64(v.n))
	}
	return math.Float64frombits(v.n)
}

func (v Value) isNumber() bool { return v.kind() == Int || v.kind() == Decimal }
func (v Value) isTrue() bool   { return v.kind() == Bool && v.n == 1 }

// equal is Rego's equality. cost counts the values compared.
func equal(a, b Value, cost *int) bool {
	if a.kind() != b.kind() {
		return a.isNumber() && b.isNumber() && compareNumbers(a, b) == 0
	}
	switch a.kind() {
	case Bool, Int:
		return a.n == b.n
	case Decimal:
		return compareNumbers(a, b) == 0
	case String:
		if a.n != b.n {
			return false
		}
		*cost += int(a.n >> 6)
		return a.p == b.p || a.str() == b.str()
	case Array:
		x, y := a.array().elems, b.array().elems
		if len(x) != len(y) {
			return false
		}
		*cost += len(x)
		for i := range x {
			if !equal(x[i], y[i], cost) {
				return false
			}
		}
		return true
	case Object:
		x, y := a.object(), b.object()
		if x == y {
			return true
		}
		if len(x.keys) != len(y.keys) {
			return false
		}
		*cost += len(x.keys)
		for i := range x.keys {
			at := y.find(x.keys[i], cost)
			if at < 0 || !equal(x.vals[i], y.vals[at], cost) {
				return false
			}
		}
		return true
	case Set:
		x, y := a.set(), b.set()
		if x == y {
			return true
		}
		if len(x.elems) != len(y.elems) {
			return false
		}
		*cost += len(x.elems)
		for i := range x.elems {
			if y.find(x.elems[i], cost) < 0 {
				return false
			}
		}
		return true
	}
	return true
}

// compare is OPA's total order.
func compare(a, b Value, cost *int) int {
	if c := cmp.Compare(a.kind().rank(), b.kind().rank()); c != 0 {
		return c
	}
	switch a.kind() {
	case Bool:
		return cmp.Compare(a.n, b.n)
	case Int, Decimal:
		return compareNumbers(a, b)
	case String:
		*cost += int(min(a.n, b.n) >> 6)
		return strings.Compare(a.str(), b.str())
	case Array:
		return compareSlices(a.array().elems, b.array().elems, cost)
	case Object:
		x, y := a.object().order(cost), b.object().order(cost)
		for i := range min(len(x), len(y)) {
			*cost++
			if c := compare(a.object().keys[x[i]], b.object().keys[y[i]], cost); c != 0 {
				return c
			}
			if c := compare(a.object().vals[x[i]], b.object().vals[y[i]], cost); c != 0 {
				return c
			}
		}
		return cmp.Compare(len(x), len(y))
	case Set:
		return compareSlices(a.set().ordered(cost), b.set().ordered(cost), cost)
	}
	return 0
}

func compareSlices(x, y []Value, cost *int) int {
	for i := range min(len(x), len(y)) {
		*cost++
		if c := compare(x[i], y[i], cost); c != 0 {
			return c
		}
	}
	return cmp.Compare(len(x), len(y))
}

// compareNumbers orders numbers by their exact value. Rounding to the nearest
// float64 keeps the order of what it does not make equal, so only numbers with
// the same float64 are looked at closer, and there OPA's own comparison decides.
func compareNumbers(a, b Value) int {
	if a.kind() == Int && b.kind() == Int {
		return cmp.Compare(int64(a.n), int64(b.n))
	}
	if x, y := a.float(), b.float(); x != y {
		return cmp.Compare(x, y)
	}
	return ast.NumberCompare(astNumber(a), astNumber(b))
}

// order is the sequence of o's entries by key. It allocates unless o is sorted.
func (o *object) order(cost *int) []int {
	at := make([]int, len(o.keys))
	for i := range at {
		at[i] = i
	}
	if !o.sorted {
		slices.SortFunc(at, func(i, j int) int { return compare(o.keys[i], o.keys[j], cost) })
	}
	return at
}

// ordered is s's elements in order: a copy, unless s is sorted.
func (s *set) ordered(cost *int) []Value {
	if s.sorted {
		return s.elems
	}
	e := slices.Clone(s.elems)
	slices.SortFunc(e, func(a, b Value) int { return compare(a, b, cost) })
	return e
}

// seed makes it impossible to choose keys of an input that all fall into one
// place of a table.
var seed = maphash.MakeSeed()

// hash is equal for equal values.
func hash(v Value, cost *int) uint64 {
	switch v.kind() {
	case String:
		*cost += int(v.n >> 6)
		return maphash.String(seed, v.str())
	case Int:
		return mix(math.Float64bits(float64(int64(v.n))))
	case Decimal:
		if v.float() == 0 {
			return mix(0) // -0 and 0 are one number
		}
		return mix(v.n)
	case Bool:
		return mix(v.n + 0x51)
	case Array:
		h := uint64(0xa7)
		for _, e := range v.array().elems {
			*cost++
			h = mix(h ^ hash(e, cost))
		}
		return h
	case Object:
		h := uint64(0x0b)
		o := v.object()
		for i := range o.keys {
			*cost++
			h += mix(hash(o.keys[i], cost) ^ mix(hash(o.vals[i], cost)))
		}
		return h
	case Set:
		h := uint64(0x5e)
		for _, e := range v.set().elems {
			*cost++
			h += mix(hash(e, cost))
		}
		return h
	}
	return mix(uint64(v.kind()))
}

func mix(x uint64) uint64 {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], x)
	return maphash.Bytes(seed, b[:])
}

// A table is a power of two of places, at most half of them taken; a place
// holds 1 + the index of a member, 0 is free. Members are never removed.

// tableLen is the length of a table for n members.
func tableLen(n int) int {
	l := 32
	for l < 2*n {
		l *= 2
	}
	return l
}

// insert puts member i with hash h into tab.
func insert(tab []uint32, h uint64, i int) {
	mask := uint64(len(tab) - 1)
	for at := h & mask; ; at = (at + 1) & mask {
		if tab[at] == 0 {
			tab[at] = uint32(i + 1)
			return
		}
	}
}

// search finds the member that equals v in tab, or -1.
func search(tab []uint32, members []Value, v Value, cost *int) int {
	mask := uint64(len(tab) - 1)
	for at := hash(v, cost) & mask; ; at = (at + 1) & mask {
		i := int(tab[at]) - 1
		if i < 0 || equal(members[i], v, cost) {
			return i
		}
	}
}

func find(tab []uint32, members []Value, v Value, cost *int) int {
	if tab != nil {
		return search(tab, members, v, cost)
	}
	*cost += len(members) >> 2
	if v.kind() == String {
		for i := range members {
			if m := &members[i]; m.n == v.n && m.kind() == String && (m.p == v.p || m.str() == v.str()) {
				return i
			}
		}
		return -1
	}
	for i := range members {
		if equal(members[i], v, cost) {
			return i
		}
	}
	return -1
}

func (o *object) find(k Value, cost *int) int { return find(o.tab, o.keys, k, cost) }
func (s *set) find(v Value, cost *int) int    { return find(s.tab, s.elems, v, cost) }

// get is the value under k, undefined if there is none.
func (o *object) get(k Value, cost *int) Value {
	if i := o.find(k, cost); i >= 0 {
		return o.vals[i]
	}
	return Value{}
}

// lookup is v[k]: undefined if v has no such member or is no collection.
func lookup(v, k Value, cost *int) Value {
	switch v.kind() {
	case Object:
		return v.object().get(k, cost)
	case Array:
		e := v.array().elems
		if i, ok := smallInt(k); ok && uint64(i) < uint64(len(e)) {
			return e[i]
		}
	case Set:
		if v.set().find(k, cost) >= 0 {
			return k // as it was asked for: 1.0, though the set has 1
		}
	}
	return Value{}
}

// unlike reports whether v[k], which is undefined, can still be defined for
// OPA's interpreter: it reads data by a path of texts, so that a number finds
// the member of a data object whose key is the number's text, and a text the
// member of a data array.
func unlike(v, k Value) bool {
	switch v.kind() {
	case Object:
		return v.object().base && k.kind() != String
	case Array:
		return v.array().base && k.kind() != Int
	}
	return false
}

// length is how many members a collection has.
func (v Value) length() int {
	switch v.kind() {
	case Array:
		return len(v.array().elems)
	case Object:
		return len(v.object().keys)
	case Set:
		return len(v.set().elems)
	}
	return 0
}
