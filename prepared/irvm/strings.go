package irvm

import (
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"strconv"
	"strings"
	"unicode/utf8"
)

var nativeStrings = map[string]any{
	"startswith":    texts2(func(_ *Machine, a, b string) Value { return boolValue(strings.HasPrefix(a, b)) }),
	"endswith":      texts2(func(_ *Machine, a, b string) Value { return boolValue(strings.HasSuffix(a, b)) }),
	"contains":      texts2(func(_ *Machine, a, b string) Value { return boolValue(strings.Contains(a, b)) }),
	"strings.count": texts2(func(_ *Machine, a, b string) Value { return intValue(int64(strings.Count(a, b))) }),

	"trim":        texts2(func(_ *Machine, a, b string) Value { return stringValue(strings.Trim(a, b)) }),
	"trim_left":   texts2(func(_ *Machine, a, b string) Value { return stringValue(strings.TrimLeft(a, b)) }),
	"trim_right":  texts2(func(_ *Machine, a, b string) Value { return stringValue(strings.TrimRight(a, b)) }),
	"trim_prefix": texts2(func(_ *Machine, a, b string) Value { return stringValue(strings.TrimPrefix(a, b)) }),
	"trim_suffix": texts2(func(_ *Machine, a, b string) Value { return stringValue(strings.TrimSuffix(a, b)) }),
	"trim_space":  func1(trimSpace),

	"lower": func1(lower),
	"upper": func1(upper),

	"split":      texts2(split),
	"concat":     func2(concat),
	"replace":    func3(replace),
	"substring":  func3(substring),
	"indexof":    texts2(indexOf),
	"format_int": func2(formatInt),
	"sprintf":    func2(sprintf),

	"strings.any_prefix_match": func2(anyAffix("strings.any_prefix_match", strings.HasPrefix)),
	"strings.any_suffix_match": func2(anyAffix("strings.any_suffix_match", strings.HasSuffix)),

	"internal.template_string": func1(templateString),

	"regex.match":       special(regexMatch),
	"regex.replace":     special(regexReplace),
	"net.cidr_contains": special(cidrContains),
	"glob.match":        special(globMatch),

	"crypto.sha256": digest(func(text, into []byte) []byte { h := sha256.Sum256(text); return append(into, h[:]...) }),
	"crypto.sha1":   digest(func(text, into []byte) []byte { h := sha1.Sum(text); return append(into, h[:]...) }),
	"crypto.md5":    digest(func(text, into []byte) []byte { h := md5.Sum(text); return append(into, h[:]...) }),

	"base64.encode":           encoded(base64.StdEncoding),
	"base64url.encode":        encoded(base64.URLEncoding),
	"base64url.encode_no_pad": encoded(base64.RawURLEncoding),
	"base64.decode":           func1(base64Decode),
}

// texts2 is a builtin of two strings.
func texts2(f func(m *Machine, a, b string) Value) func2 {
	return func(m *Machine, a, b Value) Value {
		if a.kind() != String || b.kind() != String {
			return m.failed()
		}
		m.charge(int((a.n + b.n) >> 6))
		return f(m, a.str(), b.str())
	}
}

func trimSpace(m *Machine, a Value) Value {
	if a.kind() != String {
		return m.failed()
	}
	m.charge(int(a.n >> 6))
	return stringValue(strings.TrimSpace(a.str()))
}

// made is a string of bytes that were taken from the arena for it.
func made(b []byte) Value { return stringValue(stringOf(b)) }

func lower(m *Machine, a Value) Value {
	return m.mapped(a, 'A', 'Z', strings.ToLower)
}

func upper(m *Machine, a Value) Value {
	return m.mapped(a, 'a', 'z', strings.ToUpper)
}

// mapped changes the case of the ASCII letters from lo to hi, and leaves texts
// with others to f.
func (m *Machine) mapped(a Value, lo, hi byte, f func(string) string) Value {
	if a.kind() != String {
		return m.failed()
	}
	s := a.str()
	m.charge(len(s) >> 5)
	change := false
	for i := range len(s) {
		c := s[i]
		if c >= utf8.RuneSelf {
			m.take(3 * len(s))
			return stringValue(f(s))
		}
		change = change || c >= lo && c <= hi
	}
	if !change {
		return a
	}
	b := m.takeText(len(s))
	copy(b, s)
	for i, c := range b {
		if c >= lo && c <= hi {
			b[i] = c ^ 0x20
		}
	}
	return made(b)
}

func split(m *Machine, s, sep string) Value {
	if sep == "" {
		n := utf8.RuneCountInString(s)
		m.charge(n)
		elems := m.takeValues(n)[:0]
		for s != "" {
			_, size := utf8.DecodeRuneInString(s)
			elems = append(elems, stringValue(s[:size]))
			s = s[size:]
		}
		return m.newArray(elems)
	}
	n := strings.Count(s, sep) + 1
	m.charge(n)
	elems := m.takeValues(n)
	for i := range n - 1 {
		at := strings.Index(s, sep)
		elems[i] = stringValue(s[:at])
		s = s[at+len(sep):]
	}
	elems[n-1] = stringValue(s)
	return m.newArray(elems)
}

func concat(m *Machine, sep, list Value) Value {
	if list.kind() == Set {
		m.sort(list)
	}
	elems, ok := members(list)
	if sep.kind() != String || !ok {
		return m.failed()
	}
	n := 0
	for _, e := range elems {
		if e.kind() != String {
			return m.failed()
		}
		n += int(e.n + sep.n)
	}
	m.charge(len(elems) + n>>6)
	b := m.takeText(n)[:0]
	for i, e := range elems {
		if i > 0 {
			b = append(b, sep.str()...)
		}
		b = append(b, e.str()...)
	}
	return made(b)
}

func replace(m *Machine, s, old, by Value) Value {
	if s.kind() != String || old.kind() != String || by.kind() != String {
		return m.failed()
	}
	m.charge(int(s.n >> 5))
	if old.n == 0 { // between bytes, not between runes
		return m.callForeign("replace", s, old, by)
	}
	if !strings.Contains(s.str(), old.str()) {
		return s
	}
	boundReplace(m, []Value{s, old, by})
	return stringValue(strings.ReplaceAll(s.str(), old.str(), by.str()))
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

func substring(m *Machine, text, from, length Value) Value {
	start, ok1 := smallInt(from)
	n, ok2 := smallInt(length)
	if text.kind() != String || !ok1 || !ok2 || start < 0 {
		return m.failed()
	}
	s := text.str()
	m.charge(len(s) >> 5)
	if !isASCII(s) {
		if !utf8.ValidString(s) { // OPA replaces what is not
			return m.callForeign("substring", text, from, length)
		}
		s = s[runeOffset(s, start):]
		if n >= 0 {
			s = s[:runeOffset(s, n)]
		}
		return stringValue(s)
	}
	start = min(start, int64(len(s)))
	if n < 0 {
		return stringValue(s[start:])
	}
	return stringValue(s[start : start+min(n, int64(len(s))-start)])
}

// runeOffset is where in s the rune n begins, len(s) if there are fewer.
func runeOffset(s string, n int64) int {
	for i := range s {
		if n == 0 {
			return i
		}
		n--
	}
	return len(s)
}

func indexOf(m *Machine, s, search string) Value {
	if search == "" {
		return m.failed()
	}
	if !utf8.ValidString(s) || !utf8.ValidString(search) { // OPA finds U+FFFD in it
		return m.callForeign("indexof", stringValue(s), stringValue(search))
	}
	at := strings.Index(s, search)
	if at > 0 {
		at = utf8.RuneCountInString(s[:at])
	}
	return intValue(int64(at))
}

func formatInt(m *Machine, n, base Value) Value {
	if n.kind() == Int && base.kind() == Int && base.int() == 10 {
		return made(strconv.AppendInt(m.takeText(20)[:0], n.int(), 10))
	}
	return m.callForeign("format_int", n, base)
}

// sprintf knows %s and %v of strings and %d and %v of integers, and no flags.
// The rest it leaves to OPA.
func sprintf(m *Machine, format, list Value) Value {
	if format.kind() != String || list.kind() != Array {
		return m.failed()
	}
	f, args := format.str(), list.array().elems
	n, used := 0, 0
	for i := 0; i < len(f); i++ {
		if f[i] != '%' {
			n++
			continue
		}
		if i++; i < len(f) && f[i] == '%' {
			n++
			continue
		}
		if i >= len(f) || used >= len(args) {
			return m.callForeign("sprintf", format, list)
		}
		a := args[used]
		used++
		switch {
		case a.kind() == String && (f[i] == 's' || f[i] == 'v'):
			n += int(a.n)
		case a.kind() == Int && (f[i] == 'd' || f[i] == 'v'):
			n += 20
		default:
			return m.callForeign("sprintf", format, list)
		}
	}
	if used < len(args) {
		return m.callForeign("sprintf", format, list)
	}
	m.charge(n >> 5)
	b := m.takeText(n)[:0]
	used = 0
	for i := 0; i < len(f); i++ {
		if f[i] != '%' {
			b = append(b, f[i])
			continue
		}
		if i++; f[i] == '%' {
			b = append(b, '%')
			continue
		}
		if a := args[used]; a.kind() == String {
			b = append(b, a.str()...)
		} else {
			b = strconv.AppendInt(b, a.int(), 10)
		}
		used++
	}
	return made(b)
}

// templateString joins what $"…{x}…" consists of: texts, and for each x a set of
// its value, which is empty if it is undefined.
func templateString(m *Machine, parts Value) Value {
	if parts.kind() != Array {
		return m.failed()
	}
	elems := parts.array().elems
	n := 0
	for _, e := range elems {
		p, ok := templatePart(e)
		if !ok {
			return m.callForeign("internal.template_string", parts)
		}
		n += 24
		if p.kind() == String {
			n += int(p.n)
		}
	}
	m.charge(len(elems) + n>>5)
	b := m.takeText(n)[:0]
	for _, e := range elems {
		switch p, _ := templatePart(e); p.kind() {
		case Undefined:
			b = append(b, "<undefined>"...)
		case String:
			b = append(b, p.str()...)
		default:
			b = p.AppendJSON(b)
		}
	}
	return made(b)
}

// templatePart is the value that a part of a template stands for. Not ok: OPA
// must print it.
func templatePart(v Value) (Value, bool) {
	if v.kind() == Set {
		elems := v.set().elems
		if len(elems) == 0 {
			return Value{}, true
		}
		if v = elems[0]; len(elems) > 1 {
			return v, false
		}
	}
	switch v.kind() {
	case Null, Bool, Int, String:
		return v, true
	}
	return v, false
}

// anyAffix tells whether one of the texts begins (or ends) with one of the
// affixes; each of the two can be a string or a collection.
func anyAffix(name string, has func(s, affix string) bool) func2 {
	return func(m *Machine, texts, affixes Value) Value {
		var one [2][1]Value
		lists := [2][]Value{}
		for i, v := range [2]Value{texts, affixes} {
			list, ok := members(v)
			if v.kind() == String {
				one[i][0] = v
				list, ok = one[i][:], true
			}
			if !ok {
				return m.failed()
			}
			for _, e := range list {
				if e.kind() != String {
					return m.failed()
				}
			}
			lists[i] = list
		}
		for _, t := range lists[0] {
			m.charge(1 + len(lists[1]))
			for _, a := range lists[1] {
				if has(t.str(), a.str()) {
					return boolValue(true)
				}
			}
		}
		return boolValue(false)
	}
}
