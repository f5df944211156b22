package irvm

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

func TestParseRefuses(t *testing.T) {
	deep := strings.Repeat(`{"a":`, 65) + "1" + strings.Repeat("}", 65)
	for in, want := range map[string]string{
		``:                                       "want a JSON object",
		`[]`:                                     "want a JSON object",
		`null`:                                   "want a JSON object",
		`{"a":1} {}`:                             "data after the value",
		`{"a":1,"a":2}`:                          `duplicate key "a"`,
		`{"a":1,"\u0061":2}`:                     `duplicate key "a"`,
		`{"o":{"x":[{"b":1,"b":1}]}}`:            `duplicate key "b"`,
		`{"a"`:                                   "ends early",
		`{"a":"x`:                                "ends early",
		`{"a":1,}`:                               "not JSON",
		`{a:1}`:                                  "not JSON",
		`{"a":01}`:                               "not JSON",
		`{"a":+1}`:                               "not JSON",
		`{"a":1.}`:                               "not JSON",
		`{"a":NaN}`:                              "not JSON",
		`{"a":tru}`:                              "not JSON",
		`{"a":"\x"}`:                             "not JSON",
		"{\"a\":\"\xff\"}":                       "invalid UTF-8",
		"{\"a\":\"\x01\"}":                       "control character",
		`{"a":"\ud800"}`:                         "unpaired surrogate",
		`{"a":"\udc00\ud800"}`:                   "unpaired surrogate",
		"\xef\xbb\xbf{}":                         "want a JSON object",
		deep:                                     "nested deeper than 64",
		`{"a":1e999999999}`:                      "number out of range",
		`{"a":1e99999999999999999999}`:           "number out of range",
		`{"a":` + strings.Repeat("9", 500) + `}`: "number out of range",
	} {
		m := Empty(Limits{}).Machine(t.Context())
		v, err := m.Parse([]byte(in))
		if !errors.Is(err, ErrInput) || !strings.Contains(err.Error(), want) || v.Kind() != Undefined {
			t.Errorf("%.60q: have %v, %v; want %q", in, v, err, want)
		}
		m.Release()
	}
}

// FuzzParse compares with strictjson (what is taken) and with OPA's own
// parser (what is read).
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"kind":"tool.echo","params":{"a":[1,-2.5e3,true,false,null,"\u00e9\ud83d\ude00\n"]}}`, `{"a":1,"a":2}`, `{"a":-0}`, `{"":{"":[]}}`,
		`{"a":1e400}`, `{"a":1E-5}`, `{"a":[[[[]]]]}`, "{\"\u2028\":\"\x7f\"}", `{"a":"\/\b\f\r\t\"\\"}`,
	} {
		f.Add([]byte(s))
	}
	reader := Empty(Limits{})
	f.Fuzz(func(t *testing.T, data []byte) {
		m := reader.Machine(t.Context())
		defer m.Release()
		v, err := m.Parse(data)
		strict := strictjson.CheckObject(data)
		if err != nil {
			if strict == nil && !errors.Is(err, errNumber) {
				t.Fatalf("refused what strictjson takes: %v", err)
			}
			return
		}
		if strict != nil {
			t.Fatalf("took what strictjson refuses: %v", strict)
		}
		want, err := ast.ValueFromReader(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		if have := v.AST(); have.Compare(want) != 0 || have.String() != want.String() {
			t.Fatalf("have %v, want %v", have, want)
		}
	})
}
