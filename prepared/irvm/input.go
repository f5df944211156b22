package irvm

import (
	"errors"
	"fmt"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// Bounds of a number in the input.
const (
	// maxExponent bounds a number's exponent: 1e999999999 is short to write and
	// a gigabyte as an integer.
	maxExponent = 400
	// maxNumberBytes bounds how long a number is written.
	maxNumberBytes = 400
)

var (
	errEnds      = errors.New("the document ends early")
	errSyntax    = errors.New("not JSON")
	errDepth     = fmt.Errorf("nested deeper than %d", strictjson.MaxDepth)
	errUTF8      = errors.New("invalid UTF-8")
	errControl   = errors.New("control character in a string")
	errSurrogate = errors.New("unpaired surrogate")
	errNumber    = errors.New("number out of range")
)

// parse reads the input in one pass into the arena, as strictly as strictjson
// does: no duplicate keys, nothing behind the value, valid UTF-8, no lone
// surrogates, depth bounded. OPA's own reader takes all of these. What is
// accepted here strictjson.CheckObject accepts, and the other way round,
// numbers that are too long to write aside. Strings without escapes refer to
// data.
func (m *Machine) parse(data []byte) (Value, error) {
	p := parser{m: m, data: data}
	p.space()
	if p.pos >= len(data) || data[p.pos] != '{' {
		return Value{}, errors.New("want a JSON object")
	}
	v, err := p.value(0)
	if err == nil {
		p.space()
		if p.pos == len(data) {
			return v, nil
		}
		err = errors.New("data after the value")
	}
	return Value{}, fmt.Errorf("byte %d: %w", p.pos, err)
}

type parser struct {
	m    *Machine
	data []byte
	pos  int
}

func (p *parser) space() {
	for p.pos < len(p.data) {
		switch p.data[p.pos] {
		case ' ', '\t', '\r', '\n':
			p.pos++
		default:
			return
		}
	}
}

func (p *parser) value(depth int) (Value, error) {
	if p.pos >= len(p.data) {
		return Value{}, errEnds
	}
	switch c := p.data[p.pos]; {
	case c == '"':
		return p.str()
	case c == '{':
		return p.object(depth + 1)
	case c == '[':
		return p.array(depth + 1)
	case c == '-' || c >= '0' && c <= '9':
		return p.number()
	case c == 't':
		return boolValue(true), p.literal("true")
	case c == 'f':
		return boolValue(false), p.literal("false")
	case c == 'n':
		return nullValue(), p.literal("null")
	}
	return Value{}, errSyntax
}

func (p *parser) literal(s string) error {
	if len(p.data)-p.pos < len(s) || string(p.data[p.pos:p.pos+len(s)]) != s {
		return errSyntax
	}
	p.pos += len(s)
	return nil
}

func (p *parser) object(depth int) (Value, error) {
	if depth > strictjson.MaxDepth {
		return Value{}, errDepth
	}
	m := p.m
	base := len(m.stack)
	p.pos++
	p.space()
	if p.pos < len(p.data) && p.data[p.pos] == '}' {
		p.pos++
		return objectValue(m.newObject()), nil
	}
	for {
		p.space()
		if p.pos >= len(p.data) {
			return Value{}, errEnds
		}
		if p.data[p.pos] != '"' {
			return Value{}, errSyntax
		}
		key, err := p.str()
		if err != nil {
			return Value{}, err
		}
		p.space()
		if p.pos >= len(p.data) {
			return Value{}, errEnds
		}
		if p.data[p.pos] != ':' {
			return Value{}, errSyntax
		}
		p.pos++
		p.space()
		v, err := p.value(depth)
		if err != nil {
			return Value{}, err
		}
		m.stack = append(m.stack, key, v)
		p.space()
		if p.pos >= len(p.data) {
			return Value{}, errEnds
		}
		if p.data[p.pos] == ',' {
			p.pos++
			continue
		}
		if p.data[p.pos] != '}' {
			return Value{}, errSyntax
		}
		p.pos++
		break
	}
	pairs := m.stack[base:]
	n := len(pairs) / 2
	room := m.takeValues(2 * n)
	o := m.newObject()
	o.keys, o.vals = room[:n:n], room[n:]
	for i := range n {
		o.keys[i], o.vals[i] = pairs[2*i], pairs[2*i+1]
	}
	m.stack = m.stack[:base]
	if n > smallLen {
		return objectValue(o), m.indexKeys(o)
	}
	for i := 1; i < n; i++ {
		k := &o.keys[i]
		for j := range i {
			if l := &o.keys[j]; l.n == k.n && l.str() == k.str() {
				return Value{}, duplicate(*k)
			}
		}
	}
	return objectValue(o), nil
}

func duplicate(key Value) error { return fmt.Errorf("duplicate key %q", key.str()) }

// indexKeys makes the table of a large object of the input, and finds a key
// that is there twice while it does.
func (m *Machine) indexKeys(o *object) error {
	size := tableLen(len(o.keys))
	m.take(4 * size)
	o.tab = m.tables.take(size)
	for i, k := range o.keys {
		mask := uint64(size - 1)
		at := hash(k, &m.steps) & mask
		for ; o.tab[at] != 0; at = (at + 1) & mask {
			if l := o.keys[o.tab[at]-1]; l.n == k.n && l.str() == k.str() {
				return duplicate(k)
			}
		}
		o.tab[at] = uint32(i + 1)
	}
	return nil
}

func (p *parser) array(depth int) (Value, error) {
	if depth > strictjson.MaxDepth {
		return Value{}, errDepth
	}
	m := p.m
	base := len(m.stack)
	p.pos++
	p.space()
	if p.pos < len(p.data) && p.data[p.pos] == ']' {
		p.pos++
		return m.newArray(nil), nil
	}
	for {
		p.space()
		v, err := p.value(depth)
		if err != nil {
			return Value{}, err
		}
		m.stack = append(m.stack, v)
		p.space()
		if p.pos >= len(p.data) {
			return Value{}, errEnds
		}
		if p.data[p.pos] == ',' {
			p.pos++
			continue
		}
		if p.data[p.pos] != ']' {
			return Value{}, errSyntax
		}
		p.pos++
		break
	}
	elems := m.takeValues(len(m.stack) - base)
	copy(elems, m.stack[base:])
	m.stack = m.stack[:base]
	return m.newArray(elems), nil
}

// plain marks the bytes that stand for themselves in a string.
var plain = func() (t [256]bool) {
	for c := 0x20; c < utf8.RuneSelf; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

func (p *parser) str() (Value, error) {
	p.pos++
	start := p.pos
	for p.pos < len(p.data) {
		c := p.data[p.pos]
		if plain[c] {
			p.pos++
			continue
		}
		switch {
		case c == '"':
			raw := p.data[start:p.pos]
			p.pos++
			return stringValue(stringOf(raw)), nil
		case c == '\\':
			return p.escaped(start)
		case c < 0x20:
			return Value{}, errControl
		default:
			if err := p.rune(); err != nil {
				return Value{}, err
			}
		}
	}
	return Value{}, errEnds
}

func (p *parser) rune() error {
	r, n := utf8.DecodeRune(p.data[p.pos:])
	if r == utf8.RuneError && n <= 1 {
		return errUTF8
	}
	p.pos += n
	return nil
}

// escaped reads the rest of a string that began at start and has an escape at
// p.pos. What it stands for is never longer than how it is written.
func (p *parser) escaped(start int) (Value, error) {
	end := p.pos
	for end < len(p.data) && p.data[end] != '"' {
		if p.data[end] == '\\' {
			end++
		}
		end++
	}
	if end >= len(p.data) {
		return Value{}, errEnds
	}
	buf := p.m.takeText(end - start)[:0]
	buf = append(buf, p.data[start:p.pos]...)
	for p.pos < end {
		c := p.data[p.pos]
		var err error
		switch {
		case plain[c]:
			buf = append(buf, c)
			p.pos++
		case c == '\\':
			buf, err = p.escape(buf)
		case c < 0x20:
			err = errControl
		default:
			at := p.pos
			err = p.rune()
			buf = append(buf, p.data[at:p.pos]...)
		}
		if err != nil {
			return Value{}, err
		}
	}
	p.pos++
	return stringValue(stringOf(buf)), nil
}

// escape reads one escape at p.pos and appends what it stands for to buf.
func (p *parser) escape(buf []byte) ([]byte, error) {
	if p.pos+1 >= len(p.data) {
		return nil, errEnds
	}
	c := p.data[p.pos+1]
	switch c {
	case '"', '\\', '/':
	case 'b':
		c = '\b'
	case 'f':
		c = '\f'
	case 'n':
		c = '\n'
	case 'r':
		c = '\r'
	case 't':
		c = '\t'
	case 'u':
		r, err := p.hex4(p.pos + 2)
		if err != nil {
			return nil, err
		}
		p.pos += 6
		if utf16.IsSurrogate(r) {
			if p.pos+1 >= len(p.data) || p.data[p.pos] != '\\' || p.data[p.pos+1] != 'u' {
				return nil, errSurrogate
			}
			low, err := p.hex4(p.pos + 2)
			if err != nil {
				return nil, err
			}
			if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
				return nil, errSurrogate
			}
			p.pos += 6
		}
		return utf8.AppendRune(buf, r), nil
	default:
		return nil, errSyntax
	}
	p.pos += 2
	return append(buf, c), nil
}

func (p *parser) hex4(at int) (rune, error) {
	if at+4 > len(p.data) {
		return 0, errEnds
	}
	var r rune
	for _, c := range p.data[at : at+4] {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, errSyntax
		}
		r = r<<4 | rune(c)
	}
	return r, nil
}

func (p *parser) digits() bool {
	at := p.pos
	for p.pos < len(p.data) && p.data[p.pos]-'0' <= 9 {
		p.pos++
	}
	return p.pos > at
}

func (p *parser) number() (Value, error) {
	start := p.pos
	if p.data[p.pos] == '-' {
		p.pos++
	}
	if p.pos < len(p.data) && p.data[p.pos] == '0' {
		p.pos++
	} else if !p.digits() {
		return Value{}, errSyntax
	}
	if p.pos < len(p.data) && p.data[p.pos] == '.' {
		p.pos++
		if !p.digits() {
			return Value{}, errSyntax
		}
	}
	if p.pos < len(p.data) && p.data[p.pos]|0x20 == 'e' {
		p.pos++
		if p.pos < len(p.data) && (p.data[p.pos] == '+' || p.data[p.pos] == '-') {
			p.pos++
		}
		at := p.pos
		if !p.digits() {
			return Value{}, errSyntax
		}
		if exp, err := strconv.Atoi(string(p.data[at:p.pos])); err != nil || exp > maxExponent {
			return Value{}, errNumber
		}
	}
	raw := p.data[start:p.pos]
	if len(raw) > maxNumberBytes {
		return Value{}, errNumber
	}
	return numberValue(stringOf(raw)), nil
}
