package irvm

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/util"
)

// FromAST makes a Value of OPA's. The Value refers to nothing of v's but texts,
// and does not belong to any Machine. It is sorted and indexed and must not be
// changed any more. A value that is not ground is an error.
func FromAST(v ast.Value) (Value, error) {
	b := builder{texts: map[string]string{}}
	out := b.fromAST(v)
	return out, b.err
}

// FromJSON is FromAST of what encoding/json makes of a JSON object with
// UseNumber: the data of a policy.
func FromJSON(object map[string]any) (Value, error) {
	b := builder{texts: map[string]string{}, shapes: map[string][]Value{}}
	out := b.fromJSON(object)
	return out, b.err
}

// A builder makes Values that live as long as the Program: constants and data.
type builder struct {
	texts map[string]string // each text once
	// Data often has many objects with the same keys: the keys of each shape
	// are there once. The index is the keys, each behind its length.
	shapes map[string][]Value
	shape  []byte
	steps  int // not counted at load
	err    error
}

func (b *builder) str(s string) Value {
	if known, ok := b.texts[s]; ok {
		return keptString(known)
	}
	b.texts[s] = s
	return keptString(s)
}

func (b *builder) number(s string) Value { return numberValue(s) }

func (b *builder) fromAST(v ast.Value) Value {
	switch v := v.(type) {
	case ast.Null:
		return nullValue()
	case ast.Boolean:
		return boolValue(bool(v))
	case ast.Number:
		return b.number(string(v))
	case ast.String:
		return b.str(string(v))
	case *ast.Array:
		elems := make([]Value, 0, v.Len())
		v.Foreach(func(t *ast.Term) { elems = append(elems, b.fromAST(t.Value)) })
		return arrayValue(&array{elems: elems, fixed: true})
	case ast.Set:
		elems := make([]Value, 0, v.Len())
		v.Foreach(func(t *ast.Term) { elems = append(elems, b.fromAST(t.Value)) })
		return b.set(elems)
	case ast.Object:
		keys, vals := make([]Value, 0, v.Len()), make([]Value, 0, v.Len())
		v.Foreach(func(k, t *ast.Term) {
			keys, vals = append(keys, b.fromAST(k.Value)), append(vals, b.fromAST(t.Value))
		})
		return b.object(keys, vals)
	}
	b.err = fmt.Errorf("%s is no value of JSON or Rego's", ast.ValueName(v))
	return Value{}
}

// fromJSON takes what encoding/json makes with UseNumber.
func (b *builder) fromJSON(x any) Value {
	switch x := x.(type) {
	case nil:
		return nullValue()
	case bool:
		return boolValue(x)
	case json.Number:
		return b.number(string(x))
	case string:
		return b.str(x)
	case []any:
		elems := make([]Value, len(x))
		for i := range x {
			elems[i] = b.fromJSON(x[i])
		}
		return arrayValue(&array{elems: elems, fixed: true, base: true})
	case map[string]any:
		names := util.KeysSorted(x)
		keys, vals := b.keysOf(names), make([]Value, len(x))
		for i, k := range names {
			vals[i] = b.fromJSON(x[k])
		}
		return objectValue(&object{keys: keys, vals: vals, tab: b.table(keys), sorted: true, fixed: true, base: true})
	}
	v, err := ast.InterfaceToValue(x)
	if err != nil {
		b.err = err
		return Value{}
	}
	return b.fromAST(v)
}

// keysOf are the values of names, shared with other objects while they are few.
func (b *builder) keysOf(names []string) []Value {
	few := len(names) <= smallLen
	if few {
		b.shape = b.shape[:0]
		for _, n := range names {
			b.shape = append(binary.AppendUvarint(b.shape, uint64(len(n))), n...)
		}
		if known, ok := b.shapes[string(b.shape)]; ok {
			return known
		}
	}
	keys := make([]Value, len(names))
	for i, n := range names {
		keys[i] = b.str(n)
	}
	if few {
		b.shapes[string(b.shape)] = keys
	}
	return keys
}

// object is one of keys, each there once.
func (b *builder) object(keys, vals []Value) Value {
	o := &object{keys: keys, vals: vals}
	if !slices.IsSortedFunc(keys, b.compare) {
		at := o.order(&b.steps)
		o.keys, o.vals = make([]Value, len(at)), make([]Value, len(at))
		for i, from := range at {
			o.keys[i], o.vals[i] = keys[from], vals[from]
		}
	}
	o.fixed, o.sorted, o.tab = true, true, b.table(o.keys)
	return objectValue(o)
}

// set is one of elems, of which equal ones are taken once. It keeps elems.
func (b *builder) set(elems []Value) Value {
	slices.SortStableFunc(elems, b.compare)
	elems = slices.CompactFunc(elems, func(x, y Value) bool { return b.compare(x, y) == 0 })
	return setValue(&set{elems: elems, fixed: true, sorted: true, tab: b.table(elems)})
}

func (b *builder) compare(x, y Value) int { return compare(x, y, &b.steps) }

func (b *builder) table(members []Value) []uint32 {
	if len(members) <= smallLen {
		return nil
	}
	tab := make([]uint32, tableLen(len(members)))
	for i := range members {
		insert(tab, hash(members[i], &b.steps), i)
	}
	return tab
}

// keep copies v out of a Machine, but for what belongs to the Program already.
func (b *builder) keep(v Value) Value {
	switch v.kind() {
	case Decimal:
		return b.number(string([]byte(v.text())))
	case String:
		if v.kept() {
			return v
		}
		return b.str(string([]byte(v.str())))
	case Array:
		if v.array().fixed {
			return v
		}
		return arrayValue(&array{elems: b.keepAll(v.array().elems), fixed: true})
	case Set:
		if v.set().fixed {
			return v
		}
		return b.set(b.keepAll(v.set().elems))
	case Object:
		if v.object().fixed {
			return v
		}
		return b.object(b.keepAll(v.object().keys), b.keepAll(v.object().vals))
	}
	return v
}

func (b *builder) keepAll(vs []Value) []Value {
	out := make([]Value, len(vs))
	for i := range vs {
		out[i] = b.keep(vs[i])
	}
	return out
}

// fromAST makes a Value of what one of OPA's builtins returned.
func (m *Machine) fromAST(v ast.Value) Value {
	switch v := v.(type) {
	case ast.Null:
		return nullValue()
	case ast.Boolean:
		return boolValue(bool(v))
	case ast.Number:
		return numberValue(string(v))
	case ast.String:
		m.take(len(v))
		m.charge(1 + len(v)>>6)
		return stringValue(string(v))
	case *ast.Array:
		m.charge(v.Len())
		elems := m.takeValues(v.Len())
		for i := range elems {
			elems[i] = m.fromAST(v.Elem(i).Value)
		}
		return m.newArray(elems)
	case ast.Set:
		m.charge(v.Len())
		s := m.newSet()
		s.elems = m.takeValues(v.Len())[:0]
		v.Foreach(func(t *ast.Term) { s.elems = append(s.elems, m.fromAST(t.Value)) })
		s.tab = m.index(nil, s.elems)
		return setValue(s)
	case ast.Object:
		m.charge(v.Len())
		o := m.newObject()
		o.keys, o.vals = m.takeValues(v.Len())[:0], m.takeValues(v.Len())[:0]
		v.Foreach(func(k, t *ast.Term) {
			o.keys, o.vals = append(o.keys, m.fromAST(k.Value)), append(o.vals, m.fromAST(t.Value))
		})
		o.tab = m.index(nil, o.keys)
		return objectValue(o)
	}
	m.redo("a builtin returned " + ast.ValueName(v))
	return Value{}
}

// AST makes OPA's value of v. It shares nothing with v but the texts that the
// Program keeps.
func (v Value) AST() ast.Value { return v.term().Value }

func (v Value) term() *ast.Term {
	switch v.kind() {
	case Null:
		return ast.InternedNullTerm
	case Bool:
		return ast.InternedTerm(v.n == 1)
	case Int:
		return ast.InternedTerm(int(v.int()))
	case Decimal:
		return ast.NumberTerm(json.Number([]byte(v.text())))
	case String:
		if v.kept() {
			return ast.InternedTerm(v.str())
		}
		return ast.InternedTerm(string([]byte(v.str())))
	case Array:
		elems := v.array().elems
		terms := make([]*ast.Term, len(elems))
		for i := range elems {
			terms[i] = elems[i].term()
		}
		return ast.ArrayTerm(terms...)
	case Set:
		elems := v.set().elems
		s := ast.NewSetWithCapacity(len(elems))
		for i := range elems {
			s.Add(elems[i].term())
		}
		return ast.NewTerm(s)
	case Object:
		o := v.object()
		obj := ast.NewObjectWithCapacity(len(o.keys))
		for i := range o.keys {
			obj.Insert(o.keys[i].term(), o.vals[i].term())
		}
		return ast.NewTerm(obj)
	}
	panic("undefined has no term")
}

// AppendJSON appends v as JSON, sets as arrays, objects and sets in order. It is
// what ast.JSON and encoding/json make of OPA's value, without HTML escapes.
func (v Value) AppendJSON(b []byte) []byte {
	var steps int
	switch v.kind() {
	case Null:
		return append(b, "null"...)
	case Bool:
		return strconv.AppendBool(b, v.n == 1)
	case Int:
		return strconv.AppendInt(b, v.int(), 10)
	case Decimal:
		return append(b, v.text()...)
	case String:
		return appendString(b, v.str())
	case Array:
		return appendList(b, v.array().elems)
	case Set:
		return appendList(b, v.set().ordered(&steps))
	case Object:
		o := v.object()
		for i := range o.keys {
			if o.keys[i].kind() != String {
				return appendByOPA(b, v)
			}
		}
		b = append(b, '{')
		if o.sorted {
			for i := range o.keys {
				b = o.appendEntry(b, i, i > 0)
			}
		} else {
			for n, i := range o.order(&steps) {
				b = o.appendEntry(b, i, n > 0)
			}
		}
		return append(b, '}')
	}
	return b
}

// appendByOPA appends an object with keys that are no strings: JSON has none,
// and OPA's way to write them decides their order.
func appendByOPA(b []byte, v Value) []byte {
	j, err := ast.JSON(v.AST())
	if err != nil {
		return append(b, "null"...)
	}
	raw, err := json.Marshal(j)
	if err != nil {
		return append(b, "null"...)
	}
	return append(b, raw...)
}

func (o *object) appendEntry(b []byte, i int, comma bool) []byte {
	if comma {
		b = append(b, ',')
	}
	b = append(appendString(b, o.keys[i].str()), ':')
	return o.vals[i].AppendJSON(b)
}

func appendList(b []byte, elems []Value) []byte {
	b = append(b, '[')
	for i := range elems {
		if i > 0 {
			b = append(b, ',')
		}
		b = elems[i].AppendJSON(b)
	}
	return append(b, ']')
}

const hexDigits = "0123456789abcdef"

// appendString appends s as a JSON string. s is valid UTF-8 or was made by a
// builtin; bytes that are none become U+FFFD.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	from := 0
	for i := 0; i < len(s); i++ {
		c := s[i]
		if plain[c] {
			continue
		}
		if c >= utf8.RuneSelf {
			r, n := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && n == 1 {
				b = append(append(b, s[from:i]...), `\ufffd`...)
				from = i + 1
			}
			i += n - 1
			continue
		}
		b = append(b, s[from:i]...)
		from = i + 1
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		default:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
	}
	return append(append(b, s[from:]...), '"')
}
