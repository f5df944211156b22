package irvm

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net"
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
func regexMatch(_ *compiler, args []operand, to result) op {
	if !args[0].isConst() || args[0].value.kind() != String {
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

// globMatch compiles a constant pattern with constant delimiters once.
func globMatch(_ *compiler, args []operand, to result) op {
	if !args[0].isConst() || args[0].value.kind() != String || !args[1].isConst() {
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
	pattern, err := glob.Compile(args[0].value.str(), delimiters...)
	if err != nil {
		return nil
	}
	text := args[2]
	return func(m *Machine, r []Value) int {
		v := text.get(r)
		if v.kind() != String {
			return to.put(r, m.failed())
		}
		m.charge(2 * int(v.n))
		return to.put(r, boolValue(pattern.Match(v.str())))
	}
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
	if !args[0].isConst() || args[0].value.kind() != String {
		return nil
	}
	_, network, err := net.ParseCIDR(args[0].value.str())
	if err != nil {
		return nil
	}
	otherwise := c.foreign("net.cidr_contains", args, to)
	text := args[1]
	return func(m *Machine, r []Value) int {
		v := text.get(r)
		if v.kind() == String {
			if a, err := netip.ParseAddr(v.str()); err == nil && a.Zone() == "" {
				b := a.As16()
				return to.put(r, boolValue(network.Contains(b[:])))
			}
		}
		return otherwise(m, r)
	}
}
