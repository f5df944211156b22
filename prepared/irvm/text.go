package irvm

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net/netip"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/gobwas/glob"
)

// regexMatch compiles a constant pattern once, and looks for a text that every
// match contains before it runs the expression: most values contain none.
// Patterns that are not constant are kept by the machine.
func regexMatch(_ *compiler, args []operand, to result) op {
	if !args[0].isConst() {
		f := func2(func(m *Machine, pattern, v Value) Value {
			if pattern.kind() != String || v.kind() != String {
				return m.failed()
			}
			re := m.regexp(pattern.str())
			if re == nil {
				return m.failed()
			}
			m.charge(1 + 2*int(v.n))
			return boolValue(re.MatchString(v.str()))
		})
		pattern, text := args[0], args[1]
		return func(m *Machine, r []Value) int { return to.put(r, f(m, pattern.get(r), text.get(r))) }
	}
	if args[0].value.kind() != String {
		return nil
	}
	pattern := args[0].value.str()
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil
	}
	var needles []string
	if parsed, err := syntax.Parse(pattern, syntax.Perl); err == nil {
		needles = required(parsed)
	}
	text := args[1]
	return func(m *Machine, r []Value) int {
		v := text.get(r)
		if v.kind() != String {
			return to.put(r, m.failed())
		}
		s := v.str()
		m.charge(len(s) >> 5)
		found := len(needles) == 0 || containsAny(s, needles)
		if found {
			m.charge(2 * len(s))
			found = re.MatchString(s)
		}
		return to.put(r, boolValue(found))
	}
}

// regexp is a pattern made ready; nil if it is none.
func (m *Machine) regexp(pattern string) *regexp.Regexp {
	if re, ok := m.regexps.get(pattern); ok {
		return re
	}
	m.charge(16 * (16 + len(pattern)))
	re, err := regexp.Compile(string([]byte(pattern)))
	if err != nil {
		return nil
	}
	if len(pattern) <= maxCachedBytes {
		m.regexps.put(re.String(), re)
	}
	return re
}

// maxReplaced bounds the result of a replacement that is done here, in bytes.
const maxReplaced = 64 << 10

// regexReplace does constant patterns whose matches can be found one by one
// without memory; see replaceable. The rest, and replacements that refer to
// groups, are OPA's.
func regexReplace(c *compiler, args []operand, to result) op {
	if !args[1].isConst() || args[1].value.kind() != String {
		return nil
	}
	pattern := args[1].value.str()
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil
	}
	parsed, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return nil
	}
	shortest, once := minMatch(parsed), anchored(parsed)
	if shortest == 0 || !once && looksBehind(parsed) {
		return nil
	}
	otherwise := c.foreign("regex.replace", args, to)
	text, by := args[0], args[2]
	return func(m *Machine, r []Value) int {
		v, with := text.get(r), by.get(r)
		if v.kind() != String || with.kind() != String || strings.Contains(with.str(), "$") {
			return otherwise(m, r)
		}
		s, w := v.str(), with.str()
		matches := len(s) / shortest
		if once {
			matches = min(matches, 1)
		}
		most := len(s) + matches*len(w)
		if most > maxReplaced || !utf8.ValidString(s) {
			return otherwise(m, r)
		}
		m.charge(1 + 2*len(s))
		match := re.FindString(s)
		if match == "" { // no match is empty
			return to.put(r, v)
		}
		if once && w == "" {
			return to.put(r, stringValue(s[len(match):]))
		}
		out := m.takeText(most)[:0]
		for match != "" {
			at := offset(match, s)
			out = append(append(out, s[:at]...), w...)
			if s = s[at+len(match):]; once {
				break
			}
			match = re.FindString(s)
		}
		return to.put(r, made(append(out, s...)))
	}
}

// minMatch is how many bytes a match of re has at least.
func minMatch(re *syntax.Regexp) int {
	switch re.Op {
	case syntax.OpLiteral:
		return len(re.Rune)
	case syntax.OpCharClass, syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		return 1
	case syntax.OpCapture, syntax.OpPlus:
		return minMatch(re.Sub[0])
	case syntax.OpRepeat:
		return re.Min * minMatch(re.Sub[0])
	case syntax.OpConcat:
		n := 0
		for _, sub := range re.Sub {
			n += minMatch(sub)
		}
		return n
	case syntax.OpAlternate:
		n := minMatch(re.Sub[0])
		for _, sub := range re.Sub[1:] {
			n = min(n, minMatch(sub))
		}
		return n
	}
	return 0
}

// anchored reports whether re matches at the beginning of the text only.
func anchored(re *syntax.Regexp) bool {
	return re.Op == syntax.OpBeginText || re.Op == syntax.OpConcat && re.Sub[0].Op == syntax.OpBeginText
}

// looksBehind reports whether re asks what is before a place in the text: then
// it does not find in the rest of a text what it finds in the text.
func looksBehind(re *syntax.Regexp) bool {
	switch re.Op {
	case syntax.OpBeginLine, syntax.OpBeginText, syntax.OpWordBoundary, syntax.OpNoWordBoundary:
		return true
	}
	return slices.ContainsFunc(re.Sub, looksBehind)
}

func containsAny(s string, needles []string) bool {
	for _, n := range needles {
		if strings.Contains(s, n) {
			return true
		}
	}
	return false
}

// maxNeedles is up to how many texts are looked for before an expression is run.
const maxNeedles = 8

// required are texts of which every match of re contains at least one; nil if
// there are none to be told.
func required(re *syntax.Regexp) []string {
	switch re.Op {
	case syntax.OpLiteral:
		// U+FFFD also matches bytes that are no UTF-8.
		if re.Flags&syntax.FoldCase == 0 && !slices.Contains(re.Rune, utf8.RuneError) {
			return []string{string(re.Rune)}
		}
	case syntax.OpCapture, syntax.OpPlus:
		return required(re.Sub[0])
	case syntax.OpRepeat:
		if re.Min > 0 {
			return required(re.Sub[0])
		}
	case syntax.OpConcat:
		var best []string
		for _, sub := range re.Sub {
			if r := required(sub); shortest(r) > shortest(best) {
				best = r
			}
		}
		return best
	case syntax.OpAlternate:
		var all []string
		for _, sub := range re.Sub {
			r := required(sub)
			if r == nil || len(all)+len(r) > maxNeedles {
				return nil
			}
			all = append(all, r...)
		}
		return all
	}
	return nil
}

func shortest(texts []string) int {
	if len(texts) == 0 {
		return 0
	}
	n := len(texts[0])
	for _, t := range texts {
		n = min(n, len(t))
	}
	return n
}

// A globKey is what a glob was made of.
type globKey struct{ pattern, delimiters string }

// globMatch compiles a constant pattern once. Those that are not constant are
// kept by the machine. Delimiters that are not are OPA's.
func globMatch(_ *compiler, args []operand, to result) op {
	if !args[1].isConst() {
		return nil
	}
	delimiters := []rune{}
	switch d := args[1].value; d.kind() {
	case Null:
	case Array:
		for _, e := range d.array().elems {
			if e.kind() != String || utf8.RuneCountInString(e.str()) != 1 {
				return nil
			}
			r, _ := utf8.DecodeRuneInString(e.str())
			delimiters = append(delimiters, r)
		}
		if len(delimiters) == 0 {
			delimiters = []rune{'.'} // what OPA takes then
		}
	default:
		return nil
	}
	text := args[2]
	if !args[0].isConst() {
		pattern, key := args[0], string(delimiters)
		return func(m *Machine, r []Value) int {
			p, v := pattern.get(r), text.get(r)
			if p.kind() != String || v.kind() != String {
				return to.put(r, m.failed())
			}
			g := m.glob(globKey{p.str(), key}, delimiters)
			if g == nil {
				return to.put(r, m.failed())
			}
			m.charge(1 + 2*int(v.n))
			return to.put(r, boolValue(g.Match(v.str())))
		}
	}
	if args[0].value.kind() != String {
		return nil
	}
	pattern, err := glob.Compile(args[0].value.str(), delimiters...)
	if err != nil {
		return nil
	}
	return func(m *Machine, r []Value) int {
		v := text.get(r)
		if v.kind() != String {
			return to.put(r, m.failed())
		}
		m.charge(2 * int(v.n))
		return to.put(r, boolValue(pattern.Match(v.str())))
	}
}

// glob is a pattern made ready; nil if it is none.
func (m *Machine) glob(k globKey, delimiters []rune) *glob.Pattern {
	if g, ok := m.globs.get(k); ok {
		return g
	}
	m.charge(16 * (16 + len(k.pattern)))
	k.pattern = string([]byte(k.pattern))
	g, err := glob.Compile(k.pattern, delimiters...)
	if err != nil {
		return nil
	}
	if len(k.pattern) <= maxCachedBytes {
		m.globs.put(k, g)
	}
	return g
}

// digest is a builtin that prints a hash of a text.
func digest(sum func(text, into []byte) []byte) func1 {
	return func(m *Machine, a Value) Value {
		if a.kind() != String {
			return m.failed()
		}
		m.charge(int(a.n >> 3))
		var buf [sha256.Size]byte
		raw := sum(bytesOf(a.str()), buf[:0])
		return made(hex.AppendEncode(m.takeText(2 * len(raw))[:0], raw))
	}
}

// encoded is a builtin that writes a text in base 64.
func encoded(enc *base64.Encoding) func1 {
	return func(m *Machine, a Value) Value {
		if a.kind() != String {
			return m.failed()
		}
		m.charge(int(a.n >> 4))
		return made(enc.AppendEncode(m.takeText(enc.EncodedLen(int(a.n)))[:0], bytesOf(a.str())))
	}
}

func base64Decode(m *Machine, a Value) Value {
	if a.kind() != String {
		return m.failed()
	}
	m.charge(int(a.n >> 4))
	out, err := base64.StdEncoding.AppendDecode(m.takeText(base64.StdEncoding.DecodedLen(int(a.n)))[:0], bytesOf(a.str()))
	if err != nil {
		return m.failed()
	}
	return made(out)
}

// cidrContains parses a constant network once. An address is looked up in it
// here; another network as second operand is OPA's.
func cidrContains(c *compiler, args []operand, to result) op {
	otherwise := c.foreign("net.cidr_contains", args, to)
	network, text := args[0], args[1]
	var known netip.Prefix
	if network.isConst() {
		if known = prefixOf(network.value); !known.IsValid() {
			return otherwise
		}
	}
	return func(m *Machine, r []Value) int {
		p := known
		if !p.IsValid() {
			p = prefixOf(network.get(r))
		}
		if v := text.get(r); v.kind() == String && p.IsValid() {
			m.charge(2)
			if a, err := netip.ParseAddr(v.str()); err == nil && a.Zone() == "" {
				return to.put(r, boolValue(p.Contains(a.Unmap())))
			}
		}
		return otherwise(m, r)
	}
}

// prefixOf is the network that v writes. It is not valid where OPA may see
// another one: package net takes an IPv4-mapped one for one of IPv4.
func prefixOf(v Value) netip.Prefix {
	if v.kind() != String {
		return netip.Prefix{}
	}
	p, err := netip.ParsePrefix(v.str())
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}
	}
	return p
}
