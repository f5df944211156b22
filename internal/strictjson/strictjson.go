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
// proportion to anything but the input. All functions are safe for concurrent
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
	p.space()
	if p.pos < len(p.data) {
		return p.fail("data after the value")
	}
	return nil
}

type parser struct {
	data []byte
	pos  int
	path []string
}

func (p *parser) fail(format string, args ...any) error {
	var path string
	if len(p.path) > 0 {
		path = "/" + strings.Join(p.path, "/")
	}
	return &SyntaxError{Offset: p.pos, Path: path, Msg: fmt.Sprintf(format, args...)}
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
		return p.object(t, depth+1)
	case c == '[':
		return p.array(t, depth+1)
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
	if !bytes.HasPrefix(p.data[p.pos:], []byte(s)) {
		return p.fail("want %s", s)
	}
	p.pos += len(s)
	return nil
}

func (p *parser) object(t reflect.Type, depth int) error {
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
	var few [8]string
	keys := few[:0]
	var many map[string]struct{}
	for {
		p.space()
		if p.pos >= len(p.data) || p.data[p.pos] != '"' {
			return p.fail("want a key")
		}
		at := p.pos
		key, err := p.str()
		if err != nil {
			return err
		}
		dup := false
		if many != nil {
			_, dup = many[key]
			many[key] = struct{}{}
		} else {
			for _, k := range keys {
				dup = dup || k == key
			}
			if keys = append(keys, key); len(keys) > 16 {
				many = make(map[string]struct{}, 64)
				for _, k := range keys {
					many[k] = struct{}{}
				}
			}
		}
		if dup {
			p.pos = at
			return p.fail("duplicate key %q", key)
		}
		next := elem
		if fields != nil {
			ft, ok := fields[key]
			if !ok {
				p.pos = at
				for name := range fields {
					if strings.EqualFold(name, key) {
						return p.fail("unknown key %q: keys are case-sensitive, write %q", key, name)
					}
				}
				return p.fail("unknown key %q", key)
			}
			next = ft
		}
		p.space()
		if p.pos >= len(p.data) || p.data[p.pos] != ':' {
			return p.fail("want ':' after the key %q", key)
		}
		p.pos++
		p.space()
		p.path = append(p.path, key)
		if err := p.value(next, depth); err != nil {
			return err
		}
		p.path = p.path[:len(p.path)-1]
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

func (p *parser) array(t reflect.Type, depth int) error {
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
		p.path = append(p.path, strconv.Itoa(i))
		if err := p.value(elem, depth); err != nil {
			return err
		}
		p.path = p.path[:len(p.path)-1]
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

// str reads the string at p.pos and returns it unescaped.
func (p *parser) str() (string, error) {
	start := p.pos
	p.pos++
	simple := true
	for p.pos < len(p.data) {
		switch c := p.data[p.pos]; {
		case c == '"':
			raw := p.data[start+1 : p.pos]
			p.pos++
			if simple {
				return string(raw), nil
			}
			var s string
			if err := json.Unmarshal(p.data[start:p.pos], &s); err != nil {
				p.pos = start
				return "", p.fail("%s", err)
			}
			return s, nil
		case c == '\\':
			simple = false
			if err := p.escape(); err != nil {
				return "", err
			}
		case c < 0x20:
			return "", p.fail("control character in a string: write it escaped")
		case c < utf8.RuneSelf:
			p.pos++
		default:
			r, n := utf8.DecodeRune(p.data[p.pos:])
			if r == utf8.RuneError && n <= 1 {
				return "", p.fail("invalid UTF-8")
			}
			p.pos += n
		}
	}
	p.pos = len(p.data)
	return "", p.fail("the document ends inside a string")
}

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
