package irvm

import (
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"
)

// canonicalInt reads s if it is an int64 written as strconv writes it: no plus,
// no leading zero, no -0, no fraction, no exponent.
func canonicalInt(s string) (int64, bool) {
	digits := s
	if len(s) > 0 && s[0] == '-' {
		digits = s[1:]
	}
	if len(digits) == 0 || len(digits) > 19 || digits[0] == '0' && len(s) > 1 {
		return 0, false
	}
	var n uint64
	for i := range len(digits) {
		c := digits[i] - '0'
		if c > 9 {
			return 0, false
		}
		n = n*10 + uint64(c)
	}
	if len(digits) < len(s) {
		return -int64(n), n <= 1<<63
	}
	return int64(n), n < 1<<63
}

// nearest is the float64 nearest to the number s writes.
func nearest(s string) float64 {
	f, _ := strconv.ParseFloat(s, 64) // out of range: ±Inf, which keeps the order
	return f
}

// smallInt is the integer of 64 bits that a number is where OPA asks for an
// integer: 1.0 is one, 1e0 is none.
func smallInt(v Value) (int64, bool) {
	if v.kind() == Int {
		return v.int(), true
	}
	if v.kind() != Decimal {
		return 0, false
	}
	return ast.Number(v.text()).Int64()
}

// astNumber is OPA's number for v, with the same text.
func astNumber(v Value) ast.Number {
	if v.kind() == Int {
		return ast.Number(strconv.FormatInt(v.int(), 10))
	}
	return ast.Number(v.text())
}

func addInts(a, b int64) (int64, bool) {
	s := a + b
	return s, (s > a) == (b > 0)
}

func subInts(a, b int64) (int64, bool) {
	s := a - b
	return s, (s < a) == (b > 0)
}

func mulInts(a, b int64) (int64, bool) {
	if a == 0 || b == 0 {
		return 0, true
	}
	p := a * b
	if (a == -1 && b == -1<<63) || (b == -1 && a == -1<<63) || p/b != a {
		return 0, false
	}
	return p, true
}
