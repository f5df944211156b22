package prepared

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// MaxInputBytes is the size of the largest input that Eval takes. The node's
// body limit (256 KiB by default) is below it; the budget of a builtin such as
// a regular expression, which cannot be interrupted, is the size of what it is
// given.
const MaxInputBytes = 1 << 20

// maxExponent bounds a number's exponent: 1e999999999 is short to write and a
// gigabyte as an integer.
const maxExponent = 400

// maxNumberBytes bounds how long a number is written.
const maxNumberBytes = 400

// parseInput reads the input into OPA's value in one pass, as strictly as
// strictjson does: no duplicate keys, nothing behind the value, valid UTF-8, no
// lone surrogates, depth bounded. OPA's own reader takes all of these. What is
// accepted here strictjson.CheckObject accepts (FuzzParseInput), numbers that
// are too long to write aside.
func parseInput(data []byte) (ast.Value, error) {
	p := inputParser{data: data}
	p.space()
	if p.pos >= len(data) || data[p.pos] != '{' {
		return nil, errors.New("want a JSON object")
	}
	t, err := p.value(0)
	if err != nil {
		return nil, fmt.Errorf("byte %d: %w", p.pos, err)
	}
	p.space()
	if p.pos < len(data) {
		return nil, fmt.Errorf("byte %d: data after the value", p.pos)
	}
	return t.Value, nil
}

var (
	errEnds      = errors.New("the document ends early")
	errSyntax    = errors.New("not JSON")
	errDepth     = fmt.Errorf("nested deeper than %d", strictjson.MaxDepth)
	errUTF8      = errors.New("invalid UTF-8")
	errControl   = errors.New("control character in a string")
	errSurrogate = errors.New("unpaired surrogate")
	errNumber    = errors.New("number out of range")
)

// contractTerms are the strings that every input has: terms are immutable and
// shared, so these cost nothing.
var contractTerms = func() map[string]*ast.Term {
	m := map[string]*ast.Term{}
	for name, fields := range inputFields {
		m[name] = ast.StringTerm(name)
		for _, f := range fields {
			m[f] = ast.StringTerm(f)
		}
	}
	for _, s := range []string{"type", "anonymous", "uid", "gid", "pid", "none", "reduced", "full", "endpoint", "path", "message",
		"tool.echo", "tool.http_get", "tool.http_request", "tool.fs.read", "tool.fs.write", "tool.shell"} {
		m[s] = ast.StringTerm(s)
	}
	return m
}()

type inputParser struct {
	data []byte
	pos  int
	buf  []byte // an unescaped string, until it is copied out
}

func (p *inputParser) space() {
	for p.pos < len(p.data) {
		switch p.data[p.pos] {
		case ' ', '\t', '\r', '\n':
			p.pos++
		default:
			return
		}
	}
}

func (p *inputParser) value(depth int) (*ast.Term, error) {
	if p.pos >= len(p.data) {
		return nil, errEnds
	}
	switch c := p.data[p.pos]; {
	case c == '{':
		return p.object(depth + 1)
	case c == '[':
		return p.array(depth + 1)
	case c == '"':
		return p.str()
	case c == '-' || c >= '0' && c <= '9':
		return p.number()
	case c == 't':
		return ast.InternedTerm(true), p.literal("true")
	case c == 'f':
		return ast.InternedTerm(false), p.literal("false")
	case c == 'n':
		return ast.InternedNullTerm, p.literal("null")
	}
	return nil, errSyntax
}

func (p *inputParser) literal(s string) error {
	if len(p.data)-p.pos < len(s) || string(p.data[p.pos:p.pos+len(s)]) != s {
		return errSyntax
	}
	p.pos += len(s)
	return nil
}

func (p *inputParser) object(depth int) (*ast.Term, error) {
	if depth > strictjson.MaxDepth {
		return nil, errDepth
	}
	obj := ast.NewObjectWithCapacity(4)
	p.pos++
	p.space()
	if p.pos < len(p.data) && p.data[p.pos] == '}' {
		p.pos++
		return ast.NewTerm(obj), nil
	}
	for n := 1; ; n++ {
		p.space()
		if p.pos >= len(p.data) {
			return nil, errEnds
		}
		if p.data[p.pos] != '"' {
			return nil, errSyntax
		}
		key, err := p.str()
		if err != nil {
			return nil, err
		}
		p.space()
		if p.pos >= len(p.data) {
			return nil, errEnds
		}
		if p.data[p.pos] != ':' {
			return nil, errSyntax
		}
		p.pos++
		p.space()
		v, err := p.value(depth)
		if err != nil {
			return nil, err
		}
		obj.Insert(key, v)
		if obj.Len() != n { // the key was there: Insert replaced its value
			return nil, fmt.Errorf("duplicate key %s", key)
		}
		p.space()
		if p.pos >= len(p.data) {
			return nil, errEnds
		}
		switch p.data[p.pos] {
		case ',':
			p.pos++
		case '}':
			p.pos++
			return ast.NewTerm(obj), nil
		default:
			return nil, errSyntax
		}
	}
}

func (p *inputParser) array(depth int) (*ast.Term, error) {
	if depth > strictjson.MaxDepth {
		return nil, errDepth
	}
	p.pos++
	p.space()
	if p.pos < len(p.data) && p.data[p.pos] == ']' {
		p.pos++
		return ast.NewTerm(ast.NewArray()), nil
	}
	var elems []*ast.Term
	for {
		p.space()
		v, err := p.value(depth)
		if err != nil {
			return nil, err
		}
		elems = append(elems, v)
		p.space()
		if p.pos >= len(p.data) {
			return nil, errEnds
		}
		switch p.data[p.pos] {
		case ',':
			p.pos++
		case ']':
			p.pos++
			return ast.NewTerm(ast.NewArray(elems...)), nil
		default:
			return nil, errSyntax
		}
	}
}

func (p *inputParser) str() (*ast.Term, error) {
	p.pos++
	start := p.pos
	escaped := false
	for p.pos < len(p.data) {
		switch c := p.data[p.pos]; {
		case c == '"':
			raw := p.data[start:p.pos]
			if escaped {
				raw = append(p.buf, raw...)
			}
			p.pos++
			if t, ok := contractTerms[string(raw)]; ok { // no allocation
				return t, nil
			}
			return ast.InternedTerm(string(raw)), nil
		case c == '\\':
			if !escaped {
				escaped, p.buf = true, p.buf[:0]
			}
			p.buf = append(p.buf, p.data[start:p.pos]...)
			if err := p.escape(); err != nil {
				return nil, err
			}
			start = p.pos
		case c < 0x20:
			return nil, errControl
		case c < utf8.RuneSelf:
			p.pos++
		default:
			r, n := utf8.DecodeRune(p.data[p.pos:])
			if r == utf8.RuneError && n <= 1 {
				return nil, errUTF8
			}
			p.pos += n
		}
	}
	return nil, errEnds
}

// escape reads one escape at p.pos and appends what it stands for to p.buf.
func (p *inputParser) escape() error {
	if p.pos+1 >= len(p.data) {
		return errEnds
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
			return err
		}
		p.pos += 6
		if utf16.IsSurrogate(r) {
			if p.pos+1 >= len(p.data) || p.data[p.pos] != '\\' || p.data[p.pos+1] != 'u' {
				return errSurrogate
			}
			low, err := p.hex4(p.pos + 2)
			if err != nil {
				return err
			}
			if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
				return errSurrogate
			}
			p.pos += 6
		}
		p.buf = utf8.AppendRune(p.buf, r)
		return nil
	default:
		return errSyntax
	}
	p.buf = append(p.buf, c)
	p.pos += 2
	return nil
}

func (p *inputParser) hex4(at int) (rune, error) {
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

func (p *inputParser) number() (*ast.Term, error) {
	start := p.pos
	digits := func() bool {
		at := p.pos
		for p.pos < len(p.data) && p.data[p.pos] >= '0' && p.data[p.pos] <= '9' {
			p.pos++
		}
		return p.pos > at
	}
	if p.data[p.pos] == '-' {
		p.pos++
	}
	if p.pos < len(p.data) && p.data[p.pos] == '0' {
		p.pos++
	} else if !digits() {
		return nil, errSyntax
	}
	if p.pos < len(p.data) && p.data[p.pos] == '.' {
		p.pos++
		if !digits() {
			return nil, errSyntax
		}
	}
	if p.pos < len(p.data) && (p.data[p.pos] == 'e' || p.data[p.pos] == 'E') {
		p.pos++
		if p.pos < len(p.data) && (p.data[p.pos] == '+' || p.data[p.pos] == '-') {
			p.pos++
		}
		at := p.pos
		if !digits() {
			return nil, errSyntax
		}
		if exp, err := strconv.Atoi(string(p.data[at:p.pos])); err != nil || exp > maxExponent {
			return nil, errNumber
		}
	}
	if p.pos-start > maxNumberBytes {
		return nil, errNumber
	}
	return ast.NumberTerm(json.Number(p.data[start:p.pos])), nil
}
