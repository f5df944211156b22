package tool

import "fmt"

// Bounds of a number in params. Nine bytes, 1e1000000, are half a megabyte as
// an integer, and a schema that compares numbers makes one of each; a body holds
// tens of thousands of them. The policy's reader has the same bounds.
const (
	maxNumberBytes = 400
	maxExponent    = 400
)

// checkNumbers refuses numbers that are out of bounds. params is strict JSON.
func checkNumbers(params []byte) error {
	for i := 0; i < len(params); i++ {
		switch c := params[i]; {
		case c == '"':
			for i++; i < len(params) && params[i] != '"'; i++ {
				if params[i] == '\\' {
					i++
				}
			}
		case c == '-' || c >= '0' && c <= '9':
			start, exponent, has := i, 0, false
			for i++; i < len(params); i++ {
				switch c := params[i]; {
				case c == 'e' || c == 'E':
					has = true
				case c >= '0' && c <= '9':
					if has && exponent <= maxExponent {
						exponent = exponent*10 + int(c-'0')
					}
				case c != '+' && c != '-' && c != '.':
					goto end
				}
			}
		end:
			if i-start > maxNumberBytes || exponent > maxExponent {
				return fmt.Errorf("byte %d: the number %.20s… is out of range: at most %d bytes and an exponent of %d", start, params[start:i], maxNumberBytes, maxExponent)
			}
			i-- // the loop moves on
		}
	}
	return nil
}
