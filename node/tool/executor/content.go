package executor

import (
	"encoding/base64"
	"unicode/utf8"
)

// MaxContent is how many bytes of content one output can carry: as base64 they
// fit in MaxOutput with 64 KiB left for the rest. 720 KiB.
const MaxContent = 720 << 10

// Base64 is the encoding that Text reports for what is no text.
const Base64 = "base64"

// maxEscaped is how long text may become by JSON's escapes, in bytes, if that is
// more than its base64: two such texts fit in MaxOutput. 480 KiB.
const maxEscaped = 480 << 10

// Text makes bytes from outside a JSON string. Valid UTF-8 stays as it is, with
// encoding "". Anything else becomes base64; so does text that escapes would
// blow up beyond maxEscaped, which keeps MaxContent a bound. When b
// was cut, a character that the cut went through is dropped, not held against
// it.
func Text(b []byte, cut bool) (s, encoding string) {
	if cut {
		for i := 1; i <= utf8.UTFMax && i <= len(b); i++ {
			if tail := b[len(b)-i:]; utf8.RuneStart(tail[0]) {
				if !utf8.FullRune(tail) {
					b = b[:len(b)-i]
				}
				break
			}
		}
	}
	if utf8.Valid(b) && escaped(b) <= max(maxEscaped, base64.StdEncoding.EncodedLen(len(b))) {
		return string(b), ""
	}
	return base64.StdEncoding.EncodeToString(b), Base64
}

// escaped is the length of b as the inside of a JSON string.
func escaped(b []byte) int {
	n := 0
	for i, c := range b {
		switch {
		case c == '"' || c == '\\' || c == '\n' || c == '\r' || c == '\t' || c == '\b' || c == '\f':
			n += 2
		case c < 0x20 || c == 0x7f:
			n += 6
		case c == 0xe2 && i+2 < len(b) && b[i+1] == 0x80 && b[i+2]&0xfe == 0xa8: // U+2028, U+2029
			n += 6
		default:
			n++
		}
	}
	return n
}
