package tool

import (
	"bytes"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// schemas of the kinds that tools have.
var schemas = []string{
	`{"type":"object"}`,
	`{"type":"object","properties":{"a":{"type":"string","minLength":2,"maxLength":4},"b":{"type":"integer","minimum":-3,"maximum":7}},"required":["a"],"additionalProperties":false}`,
	`{"type":"object","properties":{"a":{"enum":["x","é"]},"b":{"type":["number","null"]},"c":{"type":"array","items":{"type":"boolean"},"minItems":1,"maxItems":2}}}`,
	`{"type":"object","properties":{"a":{"type":"string","pattern":"^[a-z]+$"}},"additionalProperties":{"type":"object","properties":{"a":true}}}`,
	`{"type":"object","properties":{"a":{"const":"x"},"b":{"maximum":10}},"minProperties":1,"maxProperties":2}`,
	`{"type":["object","array"],"properties":{"a":{"type":"integer"}},"items":{"type":"number","minimum":0}}`,
}

func newTool(t testing.TB, schema string) *Tool {
	t.Helper()
	tool, err := New("tool.x", "", []byte(schema), time.Second, nil)
	if err != nil {
		t.Fatal(err)
	}
	return tool
}

// library is what the schema library alone says.
func library(t *Tool, params []byte) bool {
	if strictjson.CheckObject(params) != nil {
		return false
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(params))
	return err == nil && t.schema.Validate(doc) == nil
}

// FuzzAccept: what the acceptor lets through the library accepts.
func FuzzAccept(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"a":"xyz","b":7}`, `{"a":"x"}`, `{"a":"\u0078","b":-0}`, `{"a":"x","a":"y"}`, `{"b":null,"c":[true,false]}`, `{"c":[1]}`,
		`{"a":"abc","z":{"a":1}}`, `{"b":1e1}`, `{"b":7.0}`, `{"b":99999999999999999999}`, `{"a":"éé"}`, `{"z":{"a":1,"a":2}}`, `{"c":[]} x`,
	} {
		for i := range schemas {
			f.Add(uint8(i), []byte(s))
		}
	}
	var tools []*Tool
	for _, s := range schemas {
		tools = append(tools, newTool(f, s))
	}
	f.Fuzz(func(t *testing.T, i uint8, params []byte) {
		tool := tools[int(i)%len(tools)]
		want := library(tool, params)
		if tool.quick != nil && len(params) > 0 && params[0] == '{' && tool.quick.accept(params) && !want {
			t.Fatalf("schema %s: accepted %q, which the library refuses", tool.InputSchema, params)
		}
		if got := tool.Validate(params) == nil; got != want {
			t.Fatalf("schema %s: Validate(%q) is %v, the library says %v", tool.InputSchema, params, got, want)
		}
	})
}

// TestAccepts: ordinary params of ordinary schemas do not need the library, and
// cost nothing.
func TestAccepts(t *testing.T) {
	for schema, params := range map[string]string{
		schemas[0]: `{"text":"hello","n":[1,2,{"x":null}]}`,
		schemas[1]: `{"a":"xyz","b":-3}`,
		schemas[2]: `{"a":"é","b":1.5,"c":[true]}`,
		schemas[3]: `{"a":"abc","other":{"a":{}}}`,
	} {
		tool := newTool(t, schema)
		if tool.quick == nil || !tool.quick.accept([]byte(params)) {
			t.Errorf("schema %s needs the library for %s", schema, params)
			continue
		}
		if n := testing.AllocsPerRun(100, func() {
			if err := tool.Validate([]byte(params)); err != nil {
				t.Fatal(err)
			}
		}); n > 1 { // the copy of params
			t.Errorf("schema %s: %.0f allocations", schema, n)
		}
	}
	if newTool(t, `{"type":"object","propertyNames":{"maxLength":3}}`).quick != nil {
		t.Error("a keyword that the acceptor does not know was passed over")
	}
	// The acceptor must not be asked where the params are no object.
	if newTool(t, `{"type":["object","array"]}`).Validate([]byte(`[]`)) == nil {
		t.Error("params that are an array were accepted")
	}
}
