package call_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/autonomyops/autonomy/node/call"
)

func TestDecode(t *testing.T) {
	for name, tc := range map[string]struct{ in, err string }{
		"least":              {in: `{"kind":"tool.echo"}`},
		"all":                {in: `{"kind":"tool.echo","params":{"a":1},"session":"s","call_id":"c","timeout_ms":5,"dry_run":true}`},
		"not JSON":           {in: `kind=tool.echo`, err: "want a value"},
		"truncated":          {in: `{"kind":"tool.echo"`, err: "ends inside an object"},
		"array":              {in: `[]`, err: "want an object"},
		"no kind":            {in: `{}`, err: `"kind" is missing`},
		"kind of other form": {in: `{"kind":"Tool.Echo"}`, err: `"kind" is no tool name`},
		"kind too long":      {in: `{"kind":"tool.` + strings.Repeat("a", 200) + `"}`, err: "at most 128 bytes"},
		"params no object":   {in: `{"kind":"tool.echo","params":[1]}`, err: `"params" must be an object`},
		"params null":        {in: `{"kind":"tool.echo","params":null}`, err: `"params" must be an object`},
		"wrong type":         {in: `{"kind":"tool.echo","timeout_ms":"5"}`, err: "timeout_ms: want integer"},
		"timeout negative":   {in: `{"kind":"tool.echo","timeout_ms":-1}`, err: "must be from 0 to 600000"},
		"timeout too long":   {in: `{"kind":"tool.echo","timeout_ms":600001}`, err: "must be from 0 to 600000"},
		"timeout overflow":   {in: `{"kind":"tool.echo","timeout_ms":9223372036854775807}`, err: "must be from 0 to 600000"},
		"session too long":   {in: `{"kind":"tool.echo","session":"` + strings.Repeat("s", 257) + `"}`, err: `"session" is over 256`},
		"call_id too long":   {in: `{"kind":"tool.echo","call_id":"` + strings.Repeat("s", 129) + `"}`, err: `"call_id" is over 128`},
		"duplicate":          {in: `{"kind":"tool.echo","kind":"tool.shell"}`, err: `duplicate key "kind"`},
		"duplicate inside":   {in: `{"kind":"tool.echo","params":{"x":1,"x":2}}`, err: `duplicate key "x"`},
		"other case":         {in: `{"Kind":"tool.echo"}`, err: `write "kind"`},
		"unknown":            {in: `{"kind":"tool.echo","colour":1}`, err: `unknown key "colour"`},
		"trailing":           {in: `{"kind":"tool.echo"}{}`, err: "data after the value"},
		"invalid UTF-8":      {in: "{\"kind\":\"tool.echo\",\"params\":{\"a\":\"\xff\"}}", err: "invalid UTF-8"},
		"trusted agent":      {in: `{"kind":"tool.echo","agent":{}}`, err: `"agent" is set by the node`},
		"trusted caller":     {in: `{"kind":"tool.echo","caller":"root"}`, err: `"caller" is set by the node`},
		"trusted node":       {in: `{"kind":"tool.echo","node":1}`, err: `"node" is set by the node`},
		"trusted release":    {in: `{"kind":"tool.echo","release":1}`, err: `"release" is set by the node`},
		"trusted time":       {in: `{"kind":"tool.echo","time_ns":1}`, err: `"time_ns" is set by the node`},
		"too deep":           {in: `{"kind":"tool.echo","params":{"a":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `}}`, err: "nested deeper"},
	} {
		t.Run(name, func(t *testing.T) {
			var r call.Request
			err := call.Decode([]byte(tc.in), &r)
			if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Fatalf("error %v, want %q", err, tc.err)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"kind":"tool.echo","params":{"a":1},"session":"s","call_id":"c","timeout_ms":5,"dry_run":true}`))
	f.Add([]byte(`{"kind":"tool.echo","agent":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r call.Request
		if call.Decode(b, &r) == nil && (r.Kind == "" || len(r.Params) < 2 || r.Params[0] != '{') {
			t.Fatalf("accepted %q as %+v", b, r)
		}
	})
}

func TestParseTraceParent(t *testing.T) {
	good := "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	for in, want := range map[string]bool{
		good:                               true,
		"01" + good[2:] + "-extra":         true,
		"":                                 false,
		good + "-extra":                    false,
		"ff" + good[2:]:                    false,
		strings.ToUpper(good):              false,
		strings.Replace(good, "4", "g", 1): false,
		"00-00000000000000000000000000000000-00f067aa0ba902b7-01": false,
		"00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01": false,
		good[:54]:        false,
		good[:53] + "0g": false,
	} {
		id, span, ok := call.ParseTraceParent(in)
		if ok != want {
			t.Errorf("%q: %v", in, ok)
		}
		if ok && (fmt.Sprintf("%x", id) != "4bf92f3577b34da6a3ce929d0e0e4736" || fmt.Sprintf("%x", span) != "00f067aa0ba902b7") {
			t.Errorf("%q: %x %x", in, id, span)
		}
	}
}
