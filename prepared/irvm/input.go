package irvm

import (
	"encoding/binary"
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
func (m *Machine) parse(data []byte) Value {
	p := parser{m: m, data: data}
	if p.peek() != '{' {
		p.refuse(errors.New("want a JSON object"))
	}
	v := p.value(0)
	if p.space(); p.pos < len(data) {
		p.refuse(errors.New("data after the value"))
	}
	return v
}

type parser struct {
	m    *Machine
	data []byte
	pos  int
}

// refuse ends the parsing.
func (p *parser) refuse(why error) {
	p.m.fail(fmt.Errorf("%w: byte %d: %w", ErrInput, p.pos, why))
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

// peek is the next byte that is no space, 0 at the end.
func (p *parser) peek() byte {
	if p.pos < len(p.data) && p.data[p.pos] > ' ' {
		return p.data[p.pos]
	}
	if p.space(); p.pos < len(p.data) {
		return p.data[p.pos]
	}
	return 0
}

// want steps over c, which must be next.
func (p *parser) want(c byte) {
	if have := p.peek(); have != c {
		p.unexpected(have)
	}
	p.pos++
}

func (p *parser) unexpected(have byte) {
	if have == 0 && p.pos >= len(p.data) {
		p.refuse(errEnds)
	}
	p.refuse(errSyntax)
}

func (p *parser) value(depth int) Value {
	switch c := p.peek(); c {
	case '"':
		return p.str()
	case '{':
		return p.object(depth + 1)
	case '[':
		return p.array(depth + 1)
	case 't':
		p.literal("true")
		return boolValue(true)
	case 'f':
		p.literal("false")
		return boolValue(false)
	case 'n':
		p.literal("null")
		return nullValue()
	default:
		if c != '-' && c-'0' > 9 {
			p.unexpected(c)
		}
		return p.number()
	}
}

func (p *parser) literal(s string) {
	if len(p.data)-p.pos < len(s) || string(p.data[p.pos:p.pos+len(s)]) != s {
		p.refuse(errSyntax)
	}
	p.pos += len(s)
}

// open steps over the bracket that begins a collection and reports whether it
// has members.
func (p *parser) open(depth int, end byte) bool {
	if depth > strictjson.MaxDepth {
		p.refuse(errDepth)
	}
	p.pos++
	if p.peek() == end {
		p.pos++
		return false
	}
	return true
}

// more steps over the byte behind a member and reports whether one more follows.
func (p *parser) more(end byte) bool {
	c := p.peek()
	if c != ',' && c != end {
		p.unexpected(c)
	}
	p.pos++
	return c == ','
}

func (p *parser) object(depth int) Value {
	m := p.m
	base := len(m.stack)
	for more := p.open(depth, '}'); more; more = p.more('}') {
		if c := p.peek(); c != '"' {
			p.unexpected(c)
		}
		key := p.str()
		p.want(':')
		m.stack = append(m.stack, key, p.value(depth))
	}
	pairs := m.stack[base:]
	n := len(pairs) / 2
	room := m.takeValues(2 * n)
	o := m.newObject()
	o.keys, o.vals = room[:n:n], room[n:2*n]
	keys, vals := o.keys, o.vals
	for i := range keys {
		keys[i], vals[i] = pairs[2*i], pairs[2*i+1]
	}
	m.pop(base)
	if n > smallLen {
		p.indexKeys(o)
		return objectValue(o)
	}
	for i := 1; i < n; i++ {
		k := &keys[i]
		for j := range i {
			if l := &keys[j]; l.n == k.n && l.str() == k.str() {
				p.duplicate(*k)
			}
		}
	}
	return objectValue(o)
}

// pop takes all from base on off the stack.
func (m *Machine) pop(base int) {
	m.deep = max(m.deep, len(m.stack))
	m.stack = m.stack[:base]
}

func (p *parser) duplicate(key Value) { p.refuse(fmt.Errorf("duplicate key %q", key.str())) }

// indexKeys makes the table of a large object of the input, and finds a key
// that is there twice while it does.
func (p *parser) indexKeys(o *object) {
	m := p.m
	size := tableLen(len(o.keys))
	m.take(4 * size)
	o.tab = m.tables.take(size)
	for i, k := range o.keys {
		mask := uint64(size - 1)
		at := hash(k, &m.steps) & mask
		for ; o.tab[at] != 0; at = (at + 1) & mask {
			if l := o.keys[o.tab[at]-1]; l.n == k.n && l.str() == k.str() {
				p.duplicate(k)
			}
		}
		o.tab[at] = uint32(i + 1)
	}
}

func (p *parser) array(depth int) Value {
	m := p.m
	base := len(m.stack)
	for more := p.open(depth, ']'); more; more = p.more(']') {
		m.stack = append(m.stack, p.value(depth))
	}
	elems := m.takeValues(len(m.stack) - base)
	copy(elems, m.stack[base:])
	m.pop(base)
	return m.newArray(elems)
}

// plain marks the bytes that stand for themselves in a string.
var plain = func() (t [256]bool) {
	for c := 0x20; c < utf8.RuneSelf; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

// plainWord reports whether all eight bytes of w are plain.
func plainWord(w uint64) bool {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	quote, slash := w^(ones*'"'), w^(ones*'\\')
	// Each term has the high bit of a byte set where it is below 0x20, a quote,
	// a backslash; or above 0x7f, where the others may be wrong.
	return (w|((w-ones*0x20)&^w)|((quote-ones)&^quote)|((slash-ones)&^slash))&highs == 0
}

func (p *parser) str() Value {
	start := p.pos + 1
	data, i := p.data, start
	for {
		for len(data)-i >= 8 && plainWord(binary.LittleEndian.Uint64(data[i:])) {
			i += 8
		}
		for i < len(data) && plain[data[i]] {
			i++
		}
		p.pos = i
		if i >= len(data) {
			p.refuse(errEnds)
		}
		switch c := data[i]; {
		case c == '"':
			p.pos++
			return stringValue(stringOf(data[start:i]))
		case c == '\\':
			return p.escaped(start)
		case c < 0x20:
			p.refuse(errControl)
		default:
			p.rune()
			i = p.pos
		}
	}
}

// rune steps over a character of several bytes.
func (p *parser) rune() {
	r, n := utf8.DecodeRune(p.data[p.pos:])
	if r == utf8.RuneError && n <= 1 {
		p.refuse(errUTF8)
	}
	p.pos += n
}

// escaped reads the rest of a string that began at start and has an escape at
// p.pos. What it stands for is never longer than how it is written.
func (p *parser) escaped(start int) Value {
	end := p.pos
	for end < len(p.data) && p.data[end] != '"' {
		if p.data[end] == '\\' {
			end++
		}
		end++
	}
	if end >= len(p.data) {
		p.pos = len(p.data)
		p.refuse(errEnds)
	}
	buf := p.m.takeText(end - start)[:0]
	buf = append(buf, p.data[start:p.pos]...)
	for p.pos < end {
		c := p.data[p.pos]
		switch {
		case plain[c]:
			buf = append(buf, c)
			p.pos++
		case c == '\\':
			buf = p.escape(buf)
		case c < 0x20:
			p.refuse(errControl)
		default:
			at := p.pos
			p.rune()
			buf = append(buf, p.data[at:p.pos]...)
		}
	}
	p.pos++
	return stringValue(stringOf(buf))
}

// escape reads one escape at p.pos and appends what it stands for to buf. The
// string ends behind it, so that there is a byte to read.
func (p *parser) escape(buf []byte) []byte {
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
		r := p.hex4(p.pos + 2)
		p.pos += 6
		if utf16.IsSurrogate(r) {
			if p.pos+1 >= len(p.data) || p.data[p.pos] != '\\' || p.data[p.pos+1] != 'u' {
				p.refuse(errSurrogate)
			}
			if r = utf16.DecodeRune(r, p.hex4(p.pos+2)); r == utf8.RuneError {
				p.refuse(errSurrogate)
			}
			p.pos += 6
		}
		return utf8.AppendRune(buf, r)
	default:
		p.refuse(errSyntax)
	}
	p.pos += 2
	return append(buf, c)
}

func (p *parser) hex4(at int) (r rune) {
	if at+4 > len(p.data) {
		p.refuse(errEnds)
	}
	for _, c := range p.data[at : at+4] {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			p.refuse(errSyntax)
		}
		r = r<<4 | rune(c)
	}
	return r
}

// digits steps over digits, of which there must be one.
func (p *parser) digits() {
	i := p.pos
	for i < len(p.data) && p.data[i]-'0' <= 9 {
		i++
	}
	if i == p.pos {
		p.refuse(errSyntax)
	}
	p.pos = i
}

func (p *parser) at(c byte) bool { return p.pos < len(p.data) && p.data[p.pos] == c }

func (p *parser) number() Value {
	start := p.pos
	if p.at('-') {
		p.pos++
	}
	if p.at('0') {
		p.pos++
	} else {
		p.digits()
	}
	if p.at('.') {
		p.pos++
		p.digits()
	}
	if p.at('e') || p.at('E') {
		p.pos++
		if p.at('+') || p.at('-') {
			p.pos++
		}
		at := p.pos
		p.digits()
		if exp, err := strconv.Atoi(string(p.data[at:p.pos])); err != nil || exp > maxExponent {
			p.refuse(errNumber)
		}
	}
	raw := p.data[start:p.pos]
	if len(raw) > maxNumberBytes {
		p.refuse(errNumber)
	}
	return numberValue(stringOf(raw))
}
