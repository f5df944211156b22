package call

import (
	"encoding/json"
	"errors"
	"strconv"
	"strings"
)

// redacted takes the place of what a policy names in "redact".
const redacted = `"[redacted]"`

// redact replaces what the JSON Pointers name and leaves every other byte of
// input as it is. hit are the pointers that named something: with any, the
// recorded input is not the one that was evaluated, and the record says so. A
// pointer that names nothing is passed over. The input is an object that the
// strict decoder accepted; should it not be one after all, nothing of it is
// shown.
func redact(input []byte, pointers []string) (out []byte, hit []string) {
	if len(pointers) == 0 {
		return input, nil
	}
	r := redactor{in: input, out: make([]byte, 0, len(input)), hit: make([]bool, len(pointers))}
	want := make([]pointer, len(pointers))
	for i, p := range pointers {
		want[i] = pointer{i, strings.Split(strings.TrimPrefix(p, "/"), "/")}
	}
	if err := r.value(want); err != nil {
		return []byte(`{"redacted":true}`), pointers
	}
	for i, p := range pointers {
		if r.hit[i] {
			hit = append(hit, p)
		}
	}
	if hit == nil {
		return input, nil
	}
	return append(r.out, r.in[r.pos:]...), hit
}

// pointer is what is left of the pointer i at some place of the document.
type pointer struct {
	i    int
	path []string
}

var unescapePointer = strings.NewReplacer("~1", "/", "~0", "~")

// redactor copies in to out.
type redactor struct {
	in  []byte
	pos int
	out []byte
	hit []bool
}

var errNotJSON = errors.New("not JSON")

// value copies the value at pos, with want being the pointers that lead into it.
func (r *redactor) value(want []pointer) error {
	r.space()
	blank := false
	for _, p := range want {
		if len(p.path) == 0 {
			r.hit[p.i], blank = true, true
		}
	}
	start := r.pos
	if blank || len(want) == 0 {
		if err := r.skip(); err != nil {
			return err
		}
		if blank {
			r.out = append(r.out, redacted...)
		} else {
			r.out = append(r.out, r.in[start:r.pos]...)
		}
		return nil
	}
	switch r.peek() {
	case '{':
		return r.container('}', want, true)
	case '[':
		return r.container(']', want, false)
	}
	if err := r.skip(); err != nil {
		return err
	}
	r.out = append(r.out, r.in[start:r.pos]...)
	return nil
}

// container copies an object or an array.
func (r *redactor) container(end byte, want []pointer, keys bool) error {
	r.copyByte()
	for n := 0; ; n++ {
		r.space()
		switch c := r.peek(); {
		case c == end:
			r.copyByte()
			return nil
		case c == ',' && n > 0:
			r.copyByte()
			r.space()
		case n > 0:
			return errNotJSON
		}
		key := strconv.Itoa(n)
		if keys {
			start := r.pos
			if r.peek() != '"' {
				return errNotJSON
			}
			if err := r.skip(); err != nil {
				return err
			}
			if err := json.Unmarshal(r.in[start:r.pos], &key); err != nil {
				return err
			}
			r.out = append(r.out, r.in[start:r.pos]...)
			r.space()
			if r.peek() != ':' {
				return errNotJSON
			}
			r.copyByte()
		}
		var into []pointer
		for _, p := range want {
			if step := unescapePointer.Replace(p.path[0]); step == key || !keys && index(step) == n {
				into = append(into, pointer{p.i, p.path[1:]})
			}
		}
		if err := r.value(into); err != nil {
			return err
		}
	}
}

// index reads an array index, -1 for what is none. It takes more than RFC 6901
// does: a policy that writes "01" means to hide something.
func index(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		return -1
	}
	return n
}

func (r *redactor) peek() byte {
	if r.pos < len(r.in) {
		return r.in[r.pos]
	}
	return 0
}

func (r *redactor) copyByte() {
	r.out = append(r.out, r.in[r.pos])
	r.pos++
}

// space copies white space.
func (r *redactor) space() {
	for r.pos < len(r.in) && strings.IndexByte(" \t\r\n", r.in[r.pos]) >= 0 {
		r.copyByte()
	}
}

// skip moves pos behind the value at pos.
func (r *redactor) skip() error {
	depth := 0
	for r.pos < len(r.in) {
		switch c := r.in[r.pos]; c {
		case '"':
			for r.pos++; r.pos < len(r.in) && r.in[r.pos] != '"'; r.pos++ {
				if r.in[r.pos] == '\\' {
					r.pos++
				}
			}
			if r.pos >= len(r.in) {
				return errNotJSON
			}
			r.pos++
		case '{', '[':
			depth++
			r.pos++
			continue
		case '}', ']':
			if depth == 0 {
				return errNotJSON
			}
			depth--
			r.pos++
		default:
			start := r.pos
			for r.pos < len(r.in) && strings.IndexByte(" \t\r\n,:]}[{\"", r.in[r.pos]) < 0 {
				r.pos++
			}
			if depth == 0 {
				if r.pos == start {
					return errNotJSON
				}
				return nil
			}
			if r.pos == start { // a separator or space within
				r.pos++
			}
			continue
		}
		if depth == 0 {
			return nil
		}
	}
	return errNotJSON
}
