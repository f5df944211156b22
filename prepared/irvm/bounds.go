package irvm

import (
	"fmt"
	"math"
	"net/netip"
	"strings"
)

func boundExpand(m *Machine, args []Value) {
	if args[0].kind() != String {
		return
	}
	p, err := netip.ParsePrefix(args[0].str())
	if err != nil {
		return // OPA's function says what is wrong
	}
	if bits := p.Addr().BitLen() - p.Bits(); bits > MaxHostBits {
		m.fail(fmt.Errorf("%w: net.cidr_expand of %d host bits, at most %d", ErrBudget, bits, MaxHostBits))
	} else {
		m.charge(8 << bits)
		m.take(256 << bits)
	}
}

func boundRangeStep(m *Machine, args []Value) {
	if n := math.Abs(args[0].float()-args[1].float()) / math.Max(1, args[2].float()); args[0].isNumber() && args[1].isNumber() && args[2].isNumber() {
		if !(n < float64(m.mem)/64) {
			m.overMemory()
		}
		// OPA copies the array for every number it adds.
		m.charge(int(n) * (1 + int(n)>>4))
		m.take(int(n) * 64)
	}
}

// boundSprintf bounds the padding that a short format can ask for.
func boundSprintf(m *Machine, args []Value) {
	if args[0].kind() != String || args[1].kind() != Array {
		return
	}
	format := args[0].str()
	var width, total int64
	stars := strings.Count(format, "*")
	for i := range len(format) {
		if c := format[i] - '0'; c <= 9 {
			width = min(10*width+int64(c), 1<<20)
		} else {
			total, width = total+width, 0
		}
	}
	m.takeLarge(float64(total+width) + float64(stars)*(1<<20))
	// Each verb can print each argument.
	var size int
	for _, a := range args[1].array().elems {
		size = max(size, m.printed(a))
	}
	m.takeLarge(float64(strings.Count(format, "%")) * float64(size))
}

// printed is about how many bytes v prints to.
func (m *Machine) printed(v Value) int {
	m.charge(1)
	switch v.kind() {
	case String:
		return int(v.n) + 2
	case Decimal:
		return int(v.k>>32) + maxExponent
	case Array:
		return m.printedAll(v.array().elems)
	case Set:
		return m.printedAll(v.set().elems)
	case Object:
		return m.printedAll(v.object().keys) + m.printedAll(v.object().vals)
	}
	return 24
}

func (m *Machine) printedAll(vs []Value) int {
	n := 2
	for i := range vs {
		n += 2 + m.printed(vs[i])
	}
	return n
}

// takeLarge is take for a size that may be too large for an int.
func (m *Machine) takeLarge(bytes float64) {
	if !(bytes <= float64(m.mem)) {
		m.overMemory()
	}
	m.take(int(bytes))
	m.charge(int(bytes) >> 6)
}

// boundReplace: replace(s, old, new).
func boundReplace(m *Machine, args []Value) {
	if args[0].kind() == String && args[1].kind() == String && args[2].kind() == String {
		m.takeLarge(float64(args[0].n) + float64(strings.Count(args[0].str(), args[1].str()))*float64(args[2].n))
	}
}

// boundRegexReplace: regex.replace(s, pattern, value). A match can be empty,
// and value can name a group once in each of its bytes.
func boundRegexReplace(m *Machine, args []Value) {
	if args[0].kind() == String && args[2].kind() == String {
		m.charge(2 * int(args[0].n))
		groups := float64(strings.Count(args[2].str(), "$"))
		m.takeLarge((float64(args[0].n)+1)*float64(args[2].n) + groups*float64(args[0].n))
	}
}

// boundReplaceN: strings.replace_n(patterns, s).
func boundReplaceN(m *Machine, args []Value) {
	if args[0].kind() != Object || args[1].kind() != String {
		return
	}
	var longest uint64
	for _, v := range args[0].object().vals {
		if v.kind() == String {
			longest = max(longest, v.n)
		}
	}
	m.takeLarge((float64(args[1].n) + 1) * float64(longest+1))
}

// boundRegex charges for matching the texts at the given places. Go's regular
// expressions take time proportional to the text, up to a microsecond a byte.
func boundRegex(at ...int) func(*Machine, []Value) {
	return func(m *Machine, args []Value) {
		for _, i := range at {
			if i < len(args) && args[i].kind() == String {
				m.charge(2 * int(args[i].n))
			}
		}
	}
}

// boundPaths: graph.reachable_paths(graph, roots). The number of paths can grow
// exponentially with the graph; they are counted first, each as long as it is.
func boundPaths(m *Machine, args []Value) {
	if args[0].kind() != Object {
		return
	}
	graph := args[0].object()
	on := m.newSet()
	var visit func(at Value)
	visit = func(at Value) {
		m.charge(1 + len(on.elems))
		m.take((1 + len(on.elems)) * 16)
		edges, ok := members(graph.get(at, &m.steps))
		if !ok || on.find(at, &m.steps) >= 0 {
			return
		}
		on.elems = m.appendValue(on.elems, at) // no table: it also shrinks
		for _, e := range edges {
			visit(e)
		}
		on.elems = on.elems[:len(on.elems)-1]
	}
	roots, _ := members(args[1])
	for _, root := range roots {
		visit(root)
	}
}
