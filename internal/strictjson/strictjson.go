// Package strictjson decodes JSON that comes from outside: one reading only.
//
// encoding/json takes the last of two equal keys, matches keys whatever their
// case, repairs invalid UTF-8 and, unless told otherwise, drops what it does
// not know. Each of these lets two programs read one document in two ways: the
// policy sees a harmless value, the tool runs another. This package refuses:
//
//   - duplicate keys, compared after unescaping
//   - keys that the target struct does not have; a key that differs only in
//     case from a known one is named as such
//   - invalid UTF-8, unpaired surrogates, and a byte order mark
//   - anything after the value
//   - nesting deeper than MaxDepth
//
// Values of type any, json.RawMessage, map and those that implement
// json.Unmarshaler accept any keys, but each only once.
//
// A *SyntaxError tells the byte offset and the path. Nothing here allocates in
// proportion to anything but the input; Check and Object allocate nothing for a
// document without faults, but for what Object's comment names. All functions are safe for concurrent
// use.
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"unicode/utf16"
	"unicode/utf8"
)

// MaxDepth is how deep objects and arrays may nest (contract.md, Node HTTP API).
const MaxDepth = 64

// SyntaxError says what is wrong with a document and where.
type SyntaxError struct {
	Offset int    // bytes from the start of the document
	Path   string // JSON Pointer of the enclosing value, "" for the top
	Msg    string
}

func (e *SyntaxError) Error() string {
	if e.Path == "" {
		return fmt.Sprintf("byte %d: %s", e.Offset, e.Msg)
	}
	return fmt.Sprintf("byte %d, in %s: %s", e.Offset, e.Path, e.Msg)
}

// Unmarshal checks data against the shape of v, then decodes it into v.
func Unmarshal(data []byte, v any) error {
	if err := check(data, reflect.TypeOf(v)); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if err := dec.Decode(v); err != nil {
		var te *json.UnmarshalTypeError
		if errors.As(err, &te) {
			field := te.Field
			if field == "" {
				field = "the document"
			}
			return &SyntaxError{Offset: int(te.Offset), Path: "", Msg: fmt.Sprintf("%s: want %s, have %s", field, typeName(te.Type), te.Value)}
		}
		return &SyntaxError{Offset: int(dec.InputOffset()), Msg: err.Error()}
	}
	return nil
}

// Read reads at most limit bytes from r and unmarshals them into v. A longer
// input is an error that wraps ErrTooLarge.
func Read(r io.Reader, limit int64, v any) error {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return fmt.Errorf("read JSON: %w", err)
	}
	if int64(len(data)) > limit {
		return fmt.Errorf("%w: over %d bytes", ErrTooLarge, limit)
	}
	return Unmarshal(data, v)
}

// ErrTooLarge is returned by Read.
var ErrTooLarge = errors.New("document too large")

// Check reports whether data is one strict JSON value of any shape.
func Check(data []byte) error { return check(data, nil) }

// CheckObject is Check, and the value must be an object.
func CheckObject(data []byte) error {
	if err := check(data, nil); err != nil {
		return err
	}
	if t := bytes.TrimLeft(data, " \t\r\n"); len(t) == 0 || t[0] != '{' {
		return &SyntaxError{Msg: "want an object"}
	}
	return nil
}

func typeName(t reflect.Type) string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.Struct, reflect.Map:
		return "object"
	case reflect.Slice, reflect.Array:
		return "array"
	case reflect.String:
		return "string"
	case reflect.Bool:
		return "boolean"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return "integer"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "non-negative integer"
	case reflect.Float32, reflect.Float64:
		return "number"
	}
	return t.String()
}

func check(data []byte, t reflect.Type) error {
	p := parser{data: data}
	p.space()
	if err := p.value(t, 0); err != nil {
		return err
	}
	return p.end()
}

// Object reads data as one strict JSON object in a single pass and calls member
// for each of its members, in order: the key unescaped, the value as it stands.
// Both are views of data where that is possible, and hold only as long as data
// does. What is below a value has been checked when member sees it; what comes
// after it has not. An error of member ends the reading and is returned.
//
// It allocates nothing, except for a key with an escape in it and for an object
// of more than 16 members.
func Object(data []byte, member func(key, value []byte) error) error {
	p := parser{data: data}
	p.space()
	if p.pos >= len(data) || data[p.pos] != '{' {
		if err := p.value(nil, 0); err != nil { // what is no JSON at all is told as such
			return err
		}
		return &SyntaxError{Msg: "want an object"}
	}
	if err := p.object(nil, 1, member); err != nil {
		return err
	}
	return p.end()
}

// Array is Object for an array: elem gets each element.
func Array(data []byte, elem func(value []byte) error) error {
	p := parser{data: data}
	p.space()
	if p.pos >= len(data) || data[p.pos] != '[' {
		if err := p.value(nil, 0); err != nil {
			return err
		}
		return &SyntaxError{Msg: "want an array"}
	}
	if err := p.array(nil, 1, elem); err != nil {
		return err
	}
	return p.end()
}

type parser struct {
	data []byte
	pos  int
}

func (p *parser) end() error {
	p.space()
	if p.pos < len(p.data) {
		return p.fail("data after the value")
	}
	return nil
}

func (p *parser) fail(format string, args ...any) error {
	return &SyntaxError{Offset: p.pos, Msg: fmt.Sprintf(format, args...)}
}

// below puts the way to where an error was found before its path. The path is
// made on the way out, so that a document without a fault does not pay for it.
func below(err error, step string) error {
	if e, ok := err.(*SyntaxError); ok { // made here, never wrapped
		e.Path = "/" + step + e.Path
	}
	return err
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

var (
	unmarshaler = reflect.TypeFor[json.Unmarshaler]()
	rawMessage  = reflect.TypeFor[json.RawMessage]()
)

// shape strips pointers; nil means: any shape.
func shape(t reflect.Type) reflect.Type {
	for t != nil {
		if t == rawMessage || t.Implements(unmarshaler) || reflect.PointerTo(t).Implements(unmarshaler) {
			return nil
		}
		if t.Kind() != reflect.Pointer {
			break
		}
		t = t.Elem()
	}
	if t != nil && t.Kind() == reflect.Interface {
		return nil
	}
	return t
}

func (p *parser) value(t reflect.Type, depth int) error {
	if p.pos >= len(p.data) {
		return p.fail("the document ends where a value is due")
	}
	t = shape(t)
	switch c := p.data[p.pos]; {
	case c == '{':
		return p.object(t, depth+1, nil)
	case c == '[':
		return p.array(t, depth+1, nil)
	case c == '"':
		_, err := p.str()
		return err
	case c == '-' || c >= '0' && c <= '9':
		return p.number()
	case c == 't':
		return p.literal("true")
	case c == 'f':
		return p.literal("false")
	case c == 'n':
		return p.literal("null")
	default:
		return p.fail("want a value, have %q", rune(c))
	}
}

func (p *parser) literal(s string) error {
	if len(p.data)-p.pos < len(s) || string(p.data[p.pos:p.pos+len(s)]) != s {
		return p.fail("want %s", s)
	}
	p.pos += len(s)
	return nil
}

// fewKeys is how many keys of an object are compared one by one, before a map
// is made of them.
const fewKeys = 16

func (p *parser) object(t reflect.Type, depth int, member func(key, value []byte) error) error {
	if depth > MaxDepth {
		return p.fail("nested deeper than %d", MaxDepth)
	}
	var fields map[string]reflect.Type
	var elem reflect.Type
	if t != nil {
		switch t.Kind() {
		case reflect.Struct:
			fields = structFields(t)
		case reflect.Map:
			elem = t.Elem()
		}
	}
	p.pos++
	p.space()
	if p.pos < len(p.data) && p.data[p.pos] == '}' {
		p.pos++
		return nil
	}
	var few [fewKeys][]byte
	keys := 0
	var many map[string]struct{}
	for {
		p.space()
		if p.pos >= len(p.data) || p.data[p.pos] != '"' {
			return p.fail("want a key")
		}
		at := p.pos
		key, err := p.key()
		if err != nil {
			return err
		}
		dup := false
		switch {
		case many != nil:
			_, dup = many[string(key)]
			many[string(key)] = struct{}{}
		case keys == fewKeys:
			many = make(map[string]struct{}, 64)
			for _, k := range few {
				many[string(k)] = struct{}{}
			}
			_, dup = many[string(key)]
			many[string(key)] = struct{}{}
		default:
			for _, k := range few[:keys] {
				dup = dup || string(k) == string(key)
			}
			few[keys] = key
			keys++
		}
		if dup {
			p.pos = at
			return p.fail("duplicate key %q", string(key))
		}
		next := elem
		if fields != nil {
			ft, ok := fields[string(key)]
			if !ok {
				p.pos = at
				for name := range fields {
					if strings.EqualFold(name, string(key)) {
						return p.fail("unknown key %q: keys are case-sensitive, write %q", string(key), name)
					}
				}
				return p.fail("unknown key %q", string(key))
			}
			next = ft
		}
		p.space()
		if p.pos >= len(p.data) || p.data[p.pos] != ':' {
			return p.fail("want ':' after the key %q", string(key))
		}
		p.pos++
		p.space()
		from := p.pos
		if err := p.value(next, depth); err != nil {
			return below(err, string(key))
		}
		if member != nil {
			if err := member(key, p.data[from:p.pos:p.pos]); err != nil {
				return err
			}
		}
		p.space()
		if p.pos >= len(p.data) {
			return p.fail("the document ends inside an object")
		}
		switch p.data[p.pos] {
		case ',':
			p.pos++
		case '}':
			p.pos++
			return nil
		default:
			return p.fail("want ',' or '}'")
		}
	}
}

func (p *parser) array(t reflect.Type, depth int, each func(value []byte) error) error {
	if depth > MaxDepth {
		return p.fail("nested deeper than %d", MaxDepth)
	}
	var elem reflect.Type
	if t != nil && (t.Kind() == reflect.Slice || t.Kind() == reflect.Array) {
		elem = t.Elem()
	}
	p.pos++
	p.space()
	if p.pos < len(p.data) && p.data[p.pos] == ']' {
		p.pos++
		return nil
	}
	for i := 0; ; i++ {
		p.space()
		from := p.pos
		if err := p.value(elem, depth); err != nil {
			return below(err, strconv.Itoa(i))
		}
		if each != nil {
			if err := each(p.data[from:p.pos:p.pos]); err != nil {
				return err
			}
		}
		p.space()
		if p.pos >= len(p.data) {
			return p.fail("the document ends inside an array")
		}
		switch p.data[p.pos] {
		case ',':
			p.pos++
		case ']':
			p.pos++
			return nil
		default:
			return p.fail("want ',' or ']'")
		}
	}
}

// key reads the string at p.pos and returns it unescaped.
func (p *parser) key() ([]byte, error) {
	start := p.pos
	plain, err := p.str()
	if err != nil {
		return nil, err
	}
	if plain {
		return p.data[start+1 : p.pos-1 : p.pos-1], nil
	}
	s, err := Unquote(p.data[start:p.pos])
	if err != nil {
		p.pos = start
		return nil, p.fail("%s", err)
	}
	return []byte(s), nil
}

// Unquote returns the string that a JSON string literal, checked before, stands
// for.
func Unquote(literal []byte) (string, error) {
	if len(literal) >= 2 && literal[0] == '"' && bytes.IndexByte(literal, '\\') < 0 {
		return string(literal[1 : len(literal)-1]), nil
	}
	var s string
	err := json.Unmarshal(literal, &s)
	return s, err
}

// str passes over the string at p.pos and reports whether it has no escapes.
func (p *parser) str() (plain bool, err error) {
	p.pos++
	plain = true
	for {
		for p.pos < len(p.data) && ordinary[p.data[p.pos]] {
			p.pos++
		}
		if p.pos == len(p.data) {
			break
		}
		switch c := p.data[p.pos]; {
		case c == '"':
			p.pos++
			return plain, nil
		case c == '\\':
			plain = false
			if err := p.escape(); err != nil {
				return false, err
			}
		case c < 0x20:
			return false, p.fail("control character in a string: write it escaped")
		default:
			r, n := utf8.DecodeRune(p.data[p.pos:])
			if r == utf8.RuneError && n <= 1 {
				return false, p.fail("invalid UTF-8")
			}
			p.pos += n
		}
	}
	return false, p.fail("the document ends inside a string")
}

// ordinary are the bytes that mean themselves in a string: ASCII but for control
// characters, quote and backslash.
var ordinary = func() (t [256]bool) {
	for c := 0x20; c < utf8.RuneSelf; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

func (p *parser) escape() error {
	if p.pos+1 >= len(p.data) {
		return p.fail("the document ends inside a string")
	}
	switch p.data[p.pos+1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		p.pos += 2
		return nil
	case 'u':
		r, err := p.hex4(p.pos)
		if err != nil {
			return err
		}
		if !utf16.IsSurrogate(r) {
			p.pos += 6
			return nil
		}
		if p.pos+11 < len(p.data) && p.data[p.pos+6] == '\\' && p.data[p.pos+7] == 'u' {
			low, err := p.hex4(p.pos + 6)
			if err != nil {
				return err
			}
			if utf16.DecodeRune(r, low) != utf8.RuneError {
				p.pos += 12
				return nil
			}
		}
		return p.fail("unpaired surrogate")
	}
	return p.fail("unknown escape")
}

func (p *parser) hex4(at int) (rune, error) {
	if at+6 > len(p.data) {
		return 0, p.fail("the document ends inside a string")
	}
	n, err := strconv.ParseUint(string(p.data[at+2:at+6]), 16, 16)
	if err != nil {
		return 0, p.fail(`want four hex digits after \u`)
	}
	return rune(n), nil
}

func (p *parser) number() error {
	digits := func() int {
		n := 0
		for p.pos < len(p.data) && p.data[p.pos] >= '0' && p.data[p.pos] <= '9' {
			p.pos++
			n++
		}
		return n
	}
	if p.data[p.pos] == '-' {
		p.pos++
	}
	if p.pos < len(p.data) && p.data[p.pos] == '0' {
		p.pos++
	} else if digits() == 0 {
		return p.fail("want a digit")
	}
	if p.pos < len(p.data) && p.data[p.pos] == '.' {
		p.pos++
		if digits() == 0 {
			return p.fail("want a digit after the point")
		}
	}
	if p.pos < len(p.data) && (p.data[p.pos] == 'e' || p.data[p.pos] == 'E') {
		p.pos++
		if p.pos < len(p.data) && (p.data[p.pos] == '+' || p.data[p.pos] == '-') {
			p.pos++
		}
		if digits() == 0 {
			return p.fail("want a digit in the exponent")
		}
	}
	return nil
}

var fieldCache sync.Map // reflect.Type -> map[string]reflect.Type

// structFields maps the JSON names of t's fields, embedded ones included, to their types.
func structFields(t reflect.Type) map[string]reflect.Type {
	if m, ok := fieldCache.Load(t); ok {
		return m.(map[string]reflect.Type)
	}
	m := map[string]reflect.Type{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && name == "" {
			if et := shape(f.Type); et != nil && et.Kind() == reflect.Struct {
				for k, v := range structFields(et) {
					m[k] = v
				}
			}
			continue
		}
		if !f.IsExported() || name == "-" {
			continue
		}
		if name == "" {
			name = f.Name
		}
		m[name] = f.Type
	}
	fieldCache.Store(t, m)
	return m
}
