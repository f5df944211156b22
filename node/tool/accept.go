package tool

import (
	"encoding/json"
	"errors"
	"math"
	"regexp"
	"strconv"
	"unicode/utf8"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// acceptor is a JSON Schema in the form in which most calls can be let through
// without building the document: it reads the params once, as bytes, and
// allocates nothing.
//
// It only ever says yes, or that it does not know: then the schema library
// decides, and words the faults. So whatever it says yes to the library must
// accept too (FuzzAccept), while the reverse need not hold. A schema with a
// keyword that is not here has no acceptor.
type acceptor struct {
	types      uint8 // bits of typeX; 0: any
	properties map[string]*acceptor
	required   []string
	others     *acceptor // of keys that properties does not have; nil: refused
	items      *acceptor // nil: any
	enum       []string  // strings, as they stand between quotes; nil: any
	pattern    *regexp.Regexp
	minLength  int
	maxLength  int // characters
	minItems   int
	maxItems   int
	minMembers int
	maxMembers int
	minimum    int64
	maximum    int64
	bounded    bool // minimum or maximum is set
}

const (
	typeObject = 1 << iota
	typeArray
	typeString
	typeInteger
	typeNumber
	typeBoolean
	typeNull
)

var typeBits = map[string]uint8{"object": typeObject, "array": typeArray, "string": typeString,
	"integer": typeInteger, "number": typeNumber | typeInteger, "boolean": typeBoolean, "null": typeNull}

// anything accepts every value.
func anything() *acceptor {
	return &acceptor{maxLength: math.MaxInt, maxItems: math.MaxInt, maxMembers: math.MaxInt, minimum: math.MinInt64, maximum: math.MaxInt64}
}

// errBeyond: the schema needs the library.
var errBeyond = errors.New("beyond the acceptor")

// newAcceptor compiles a schema, nil when it has what only the library knows.
func newAcceptor(schema any) *acceptor {
	a := anything()
	a.others = anything()
	switch s := schema.(type) {
	case bool:
		if s {
			return a
		}
		return nil
	case map[string]any:
		for key, v := range s {
			if a.keyword(key, v) != nil {
				return nil
			}
		}
		return a
	}
	return nil
}

func (a *acceptor) keyword(key string, v any) error {
	switch key {
	case "$schema", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly":
		return nil // says something about the value, asks nothing of it
	case "type":
		names, ok := v.([]any)
		if !ok {
			names = []any{v}
		}
		for _, n := range names {
			name, _ := n.(string)
			if typeBits[name] == 0 {
				return errBeyond
			}
			a.types |= typeBits[name]
		}
		return nil
	case "properties":
		m, ok := v.(map[string]any)
		if !ok {
			return errBeyond
		}
		a.properties = map[string]*acceptor{}
		for name, s := range m {
			sub := newAcceptor(s)
			if sub == nil {
				return errBeyond
			}
			a.properties[name] = sub
		}
		return nil
	case "required":
		list, err := stringsOf(v)
		a.required = list
		return err
	case "additionalProperties":
		if v == false {
			a.others = nil
			return nil
		}
		if a.others = newAcceptor(v); a.others == nil {
			return errBeyond
		}
		return nil
	case "items":
		if a.items = newAcceptor(v); a.items == nil {
			return errBeyond
		}
		return nil
	case "const":
		return a.keyword("enum", []any{v})
	case "enum":
		list, err := stringsOf(v)
		a.enum = list
		return err
	case "pattern":
		text, ok := v.(string)
		re, err := regexp.Compile(text)
		if !ok || err != nil {
			return errBeyond
		}
		a.pattern = re
		return nil
	case "minLength":
		return count(v, &a.minLength)
	case "maxLength":
		return count(v, &a.maxLength)
	case "minProperties":
		return count(v, &a.minMembers)
	case "maxProperties":
		return count(v, &a.maxMembers)
	case "minItems":
		return count(v, &a.minItems)
	case "maxItems":
		return count(v, &a.maxItems)
	case "minimum":
		return a.bound(v, &a.minimum)
	case "maximum":
		return a.bound(v, &a.maximum)
	}
	return errBeyond
}

func (a *acceptor) bound(v any, dst *int64) (err error) {
	n, ok := v.(json.Number)
	if !ok {
		return errBeyond
	}
	a.bounded = true
	*dst, err = strconv.ParseInt(string(n), 10, 64)
	return err
}

func count(v any, dst *int) (err error) {
	n, ok := v.(json.Number)
	if !ok {
		return errBeyond
	}
	*dst, err = strconv.Atoi(string(n))
	return err
}

func stringsOf(v any) ([]string, error) {
	list, ok := v.([]any)
	if !ok {
		return nil, errBeyond
	}
	out := make([]string, 0, len(list))
	for _, e := range list {
		s, ok := e.(string)
		if !ok {
			return nil, errBeyond
		}
		out = append(out, s)
	}
	return out, nil
}

// errUnknown: the acceptor does not know whether the value is valid.
var errUnknown = errors.New("unknown")

// accept reports whether value, any bytes, is strict JSON that the schema
// surely allows. Strict is checked for objects and arrays; of what is neither
// the caller has checked it.
func (a *acceptor) accept(value []byte) bool {
	switch value[0] {
	case '{':
		return a.is(typeObject) && a.enum == nil && a.object(value)
	case '[':
		return a.is(typeArray) && a.enum == nil && a.array(value)
	case '"':
		return a.is(typeString) && a.text(value)
	case 't', 'f':
		return a.is(typeBoolean) && a.enum == nil
	case 'n':
		return a.is(typeNull) && a.enum == nil
	}
	return a.enum == nil && a.number(value)
}

func (a *acceptor) is(bit uint8) bool { return a.types == 0 || a.types&bit != 0 }

func (a *acceptor) object(value []byte) bool {
	members, found := 0, 0
	err := strictjson.Object(value, func(key, v []byte) error {
		members++
		sub, ok := a.properties[string(key)]
		if !ok {
			sub = a.others
		}
		if sub == nil || !sub.accept(v) {
			return errUnknown
		}
		for _, r := range a.required {
			if r == string(key) {
				found++
			}
		}
		return nil
	})
	return err == nil && found == len(a.required) && members >= a.minMembers && members <= a.maxMembers
}

func (a *acceptor) array(value []byte) bool {
	n := 0
	err := strictjson.Array(value, func(v []byte) error {
		n++
		if a.items != nil && !a.items.accept(v) {
			return errUnknown
		}
		return nil
	})
	return err == nil && n >= a.minItems && n <= a.maxItems
}

func (a *acceptor) text(value []byte) bool {
	s := value[1 : len(value)-1]
	if a.enum == nil && a.pattern == nil && a.minLength == 0 && a.maxLength == math.MaxInt {
		return true
	}
	for _, c := range s {
		if c == '\\' {
			return false // escaped: it would have to be rewritten first
		}
	}
	if n := utf8.RuneCount(s); n < a.minLength || n > a.maxLength {
		return false
	}
	if a.pattern != nil && !a.pattern.Match(s) {
		return false
	}
	if a.enum == nil {
		return true
	}
	for _, e := range a.enum {
		if e == string(s) {
			return true
		}
	}
	return false
}

func (a *acceptor) number(value []byte) bool {
	if a.is(typeNumber) && !a.bounded {
		return true
	}
	if !a.is(typeInteger) || len(value) > 18 { // below 2^63 for sure
		return false
	}
	negative, digits := value[0] == '-', value
	if negative {
		digits = value[1:]
	}
	var n int64
	for _, c := range digits {
		if c < '0' || c > '9' {
			return false
		}
		n = n*10 + int64(c-'0')
	}
	if negative {
		n = -n
	}
	return n >= a.minimum && n <= a.maximum
}
