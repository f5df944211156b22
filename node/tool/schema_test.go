package tool_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/node/tool"
)

// TestSchemaReachesNothing: whatever a schema refers to, nothing is fetched, not
// when it is loaded and not when it is used.
func TestSchemaReachesNothing(t *testing.T) {
	var hits atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		hits.Add(1)
		fmt.Fprint(w, `{"type":"object"}`)
	}))
	defer s.Close()
	for _, schema := range []string{
		`{"$ref":"%s/x"}`,
		`{"properties":{"a":{"$ref":"%s/x#/y"}}}`,
		`{"$schema":"%s/meta"}`,
		`{"$id":"%s/base","$ref":"other"}`,
		`{"$id":"%s/base","properties":{"a":{"$ref":"other.json"}}}`,
		`{"$dynamicRef":"%s/x#y"}`,
		`{"$defs":{"d":{"$id":"%s/d","$ref":"e"}},"$ref":"#/$defs/d"}`,
		`{"$schema":"https://json-schema.org/draft/2020-12/schema","allOf":[{"$ref":"%s/x"}]}`,
	} {
		schema = fmt.Sprintf(schema, s.URL)
		if _, err := tool.New("tool.x", "", json.RawMessage(schema), time.Second, fake(nil)); err == nil {
			t.Errorf("%s is accepted", schema)
		}
	}
	for _, schema := range []string{`{"$ref":"file:///etc/passwd"}`, `{"$ref":"/etc/passwd"}`, `{"$ref":"urn:x"}`, `{"$ref":"other"}`, `{"properties":{"a":{"$ref":"../x"}}}`, `{"$ref":"#/none"}`, `{"$ref":"#none"}`,
		`{"pattern":"(?=a)"}`, `{"pattern":"(a{1000}){1000}"}`, `{"type":"object","type":"string"}`, `true`, `[]`,
		strings.Repeat(`{"not":`, 70) + "{}" + strings.Repeat("}", 70), `{"description":"` + strings.Repeat("x", tool.MaxSchemaBytes) + `"}`} {
		if _, err := tool.New("tool.x", "", json.RawMessage(schema), time.Second, fake(nil)); err == nil {
			t.Errorf("%.80s is accepted", schema)
		}
	}
	// What stands in the schema itself may be referred to.
	x, err := tool.New("tool.x", "", json.RawMessage(fmt.Sprintf(`{"$id":"%s/s","$defs":{"n":{"$id":"n","type":"integer"}},"properties":{"a":{"$ref":"n"},"b":{"$ref":"#"}}}`, s.URL)), time.Second, fake(nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := x.Validate([]byte(`{"a":1,"b":{"a":2}}`)); err != nil {
		t.Error(err)
	}
	if x.Validate([]byte(`{"b":{"b":{"a":"x"}}}`)) == nil {
		t.Error("a reference to the schema itself checks nothing")
	}
	if n := hits.Load(); n > 0 {
		t.Errorf("the server was asked %d times", n)
	}
}

// TestFormats: a format is demanded, not noted.
func TestFormats(t *testing.T) {
	for format, tc := range map[string]struct{ good, bad string }{
		"date-time": {"2026-01-02T03:04:05Z", "yesterday"}, "date": {"2026-01-02", "2026-13-01"}, "ipv4": {"192.0.2.1", "192.0.2.256"}, "ipv6": {"2001:db8::1", "1.2.3.4"},
		"hostname": {"a.example.org", "a b"}, "email": {"a@example.org", "a"}, "uri": {"https://example.org/x", "/x"}, "uuid": {"7240d0db-8ff0-41ec-98b2-34a096273b9f", "7240"},
		"json-pointer": {"/a/b", "a"}, "duration": {"P1D", "1d"}, "regex": {"a+", "("},
	} {
		x, err := tool.New("tool.x", "", json.RawMessage(fmt.Sprintf(`{"properties":{"v":{"type":"string","format":%q}}}`, format)), time.Second, fake(nil))
		if err != nil {
			t.Fatal(err)
		}
		params := func(v string) []byte { b, _ := json.Marshal(map[string]string{"v": v}); return b }
		if err := x.Validate(params(tc.good)); err != nil {
			t.Errorf("%s %q: %v", format, tc.good, err)
		}
		if x.Validate(params(tc.bad)) == nil {
			t.Errorf("%s %q is accepted", format, tc.bad)
		}
	}
}

// TestValidateIsBounded: params that are cheap to send are cheap to check.
func TestValidateIsBounded(t *testing.T) {
	x, err := tool.New("tool.x", "", json.RawMessage(`{"properties":{
		"re":{"type":"string","pattern":"^(([a-z])+.)+[A-Z]([a-z])+$"},
		"set":{"type":"array","uniqueItems":true},
		"n":{"type":"array","items":{"type":"integer","minimum":-5,"multipleOf":0.0001}}}}`), time.Second, fake(nil))
	if err != nil {
		t.Fatal(err)
	}
	many := func(n int, item func(int) string) string {
		items := make([]string, n)
		for i := range items {
			items[i] = item(i)
		}
		return "[" + strings.Join(items, ",") + "]"
	}
	for name, tc := range map[string]struct {
		params string
		want   string // "": valid
	}{
		"a regular expression that backtracks elsewhere": {`{"re":"` + strings.Repeat("a", 200_000) + `"}`, "/re: "},
		"many items that must differ":                    {`{"set":` + many(20_000, func(i int) string { return fmt.Sprintf(`{"a":%d}`, i) }) + `}`, ""},
		"large exponents":                                {`{"n":` + many(20_000, func(int) string { return "1e1000000" }) + `}`, "out of range"},
		"negative exponents":                             {`{"n":[1E-1000000]}`, "out of range"},
		"an exponent that overflows":                     {`{"n":[1e99999999999999999999]}`, "out of range"},
		"a long number":                                  {`{"n":[` + strings.Repeat("1", 401) + `]}`, "out of range"},
		"a long fraction":                                {`{"x":0.` + strings.Repeat("1", 401) + `}`, "out of range"},
		"numbers in strings are no numbers":              {`{"re":"Aa","x":"1e1000000 \" 1e1000000","1e1000000":1}`, "pattern"},
		"the largest":                                    {`{"x":[1e400,-1E-400,1.5e+400,` + strings.Repeat("1", 400) + `]}`, ""},
	} {
		begin := time.Now()
		err := x.Validate([]byte(tc.params))
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %.200v, want %q", name, err, tc.want)
		}
		if took := time.Since(begin); took > 10*time.Second { // without the bounds: minutes
			t.Errorf("%s took %s", name, took)
		}
	}
}
