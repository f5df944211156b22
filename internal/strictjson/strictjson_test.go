package strictjson_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

type doc struct {
	Kind   string          `json:"kind"`
	Params json.RawMessage `json:"params"`
	N      int             `json:"n"`
	Sub    *struct {
		List []struct {
			A string `json:"a"`
		} `json:"list"`
		Any map[string]int `json:"any"`
	} `json:"sub"`
}

func TestUnmarshal(t *testing.T) {
	for name, tc := range map[string]struct{ in, err string }{
		"plain":                     {in: ` {"kind":"x","params":{"a":[1,2.5e-3,-0,true,null,"\u00e9\ud83d\ude00"]},"n":3} `},
		"nested":                    {in: `{"sub":{"list":[{"a":"b"},{}],"any":{"k":1,"l":2}}}`},
		"raw values keep any key":   {in: `{"params":{"Kind":1,"kind":2}}`},
		"empty":                     {in: ``, err: "byte 0: the document ends where a value is due"},
		"truncated object":          {in: `{"kind":"x"`, err: "byte 11: the document ends inside an object"},
		"truncated string":          {in: `{"kind":"x`, err: "the document ends inside a string"},
		"truncated array":           {in: `{"params":[1,`, err: "the document ends where a value is due"},
		"trailing data":             {in: `{"n":1} {}`, err: "byte 8: data after the value"},
		"trailing garbage":          {in: `{"n":1}x`, err: "data after the value"},
		"duplicate":                 {in: `{"n":1,"n":2}`, err: `byte 7: duplicate key "n"`},
		"duplicate, escaped":        {in: `{"n":1,"\u006e":2}`, err: `duplicate key "n"`},
		"duplicate below":           {in: `{"params":{"a":1,"b":{"c":1,"c":2}}}`, err: `in /params/b: duplicate key "c"`},
		"unknown":                   {in: `{"agent":1}`, err: `byte 1: unknown key "agent"`},
		"case":                      {in: `{"Kind":"x"}`, err: `unknown key "Kind": keys are case-sensitive, write "kind"`},
		"unknown below":             {in: `{"sub":{"list":[{"b":1}]}}`, err: `in /sub/list/0: unknown key "b"`},
		"wrong type":                {in: `{"n":"1"}`, err: "n: want integer, have string"},
		"not an object":             {in: `[]`, err: "want object, have array"},
		"invalid UTF-8":             {in: "{\"kind\":\"\xff\"}", err: "invalid UTF-8"},
		"invalid UTF-8 in a key":    {in: "{\"\xc3\x28\":1}", err: "invalid UTF-8"},
		"overlong UTF-8":            {in: "{\"kind\":\"\xc0\xaf\"}", err: "invalid UTF-8"},
		"surrogate in UTF-8":        {in: "{\"kind\":\"\xed\xa0\x80\"}", err: "invalid UTF-8"},
		"unpaired surrogate":        {in: `{"kind":"\ud800"}`, err: "unpaired surrogate"},
		"surrogates, wrong order":   {in: `{"kind":"\udc00\ud800"}`, err: "unpaired surrogate"},
		"byte order mark":           {in: "\xef\xbb\xbf{}", err: "want a value"},
		"control character":         {in: "{\"kind\":\"a\nb\"}", err: "control character"},
		"bad escape":                {in: `{"kind":"\x"}`, err: "unknown escape"},
		"short hex":                 {in: `{"kind":"\u12"}`, err: "hex"},
		"leading zero":              {in: `{"n":01}`, err: "want ',' or '}'"},
		"plus":                      {in: `{"n":+1}`, err: "want a value"},
		"bare point":                {in: `{"n":1.}`, err: "want a digit after the point"},
		"bare exponent":             {in: `{"n":1e}`, err: "want a digit in the exponent"},
		"NaN":                       {in: `{"n":NaN}`, err: "want a value"},
		"comment":                   {in: `{/**/"n":1}`, err: "want a key"},
		"trailing comma":            {in: `{"n":1,}`, err: "want a key"},
		"single quotes":             {in: `{'n':1}`, err: "want a key"},
		"deep, allowed":             {in: `{"params":` + strings.Repeat("[", 63) + strings.Repeat("]", 63) + `}`},
		"too deep":                  {in: `{"params":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `}`, err: "nested deeper than 64"},
		"much too deep":             {in: strings.Repeat("[", 1<<20), err: "nested deeper than 64"},
		"float for an integer":      {in: `{"n":1.5}`, err: "n: want integer, have number 1.5"},
		"more than the key set has": {in: `{"params":{"a":1,"b":1,"c":1,"d":1,"e":1,"f":1,"g":1,"h":1,"i":1,"j":1,"k":1,"l":1,"m":1,"n":1,"o":1,"p":1,"q":1,"r":1,"c":1}}`, err: `duplicate key "c"`},
	} {
		t.Run(name, func(t *testing.T) {
			var d doc
			err := strictjson.Unmarshal([]byte(tc.in), &d)
			switch {
			case tc.err == "" && err != nil:
				t.Fatal(err)
			case tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)):
				t.Fatalf("error %v, want one with %q", err, tc.err)
			}
		})
	}
}

// FuzzCheck: what Check accepts, encoding/json accepts and reads the same when
// it is written and read again; what encoding/json refuses, Check refuses.
func FuzzCheck(f *testing.F) {
	for _, s := range []string{`{}`, `{"a":[1,"x",null]}`, `"\ud83d\ude00"`, `1e5`, `{"a":1,"a":2}`, "\"\xff\"", `[[[]]]`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		err := strictjson.Check(b)
		if err != nil {
			return
		}
		if !json.Valid(b) {
			t.Fatalf("accepted what is not JSON: %q", b)
		}
		var v any
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.UseNumber()
		if err := dec.Decode(&v); err != nil {
			t.Fatalf("accepted, yet encoding/json says %v: %q", err, b)
		}
	})
}

func FuzzAppendString(f *testing.F) {
	f.Add("plain")
	f.Add("a\"b\\c\n\x00é\xff😀\xed\xa0\x80")
	f.Fuzz(func(t *testing.T, s string) {
		got := strictjson.AppendString(nil, s)
		if err := strictjson.Check(got); err != nil {
			t.Fatalf("%q: %v", got, err)
		}
		var back string
		if err := json.Unmarshal(got, &back); err != nil || back != string([]rune(s)) {
			t.Fatalf("%q reads back as %q (%v)", s, back, err)
		}
		if b := strictjson.AppendString(nil, []byte(s)); !bytes.Equal(b, got) {
			t.Fatalf("bytes %q, string %q", b, got)
		}
	})
}

func TestObject(t *testing.T) {
	var got []string
	err := strictjson.Object([]byte(` {"a":1,"\u0062":{"c":[1,2]} , "d":"x\ny"} `), func(k, v []byte) error {
		got = append(got, string(k)+"="+string(v))
		return nil
	})
	if want := []string{"a=1", `b={"c":[1,2]}`, `d="x\ny"`}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	stop := errors.New("stop")
	if err := strictjson.Object([]byte(`{"a":1,"b":`), func(_, _ []byte) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("an error of member: %v", err)
	}
	for in, want := range map[string]string{
		`[]`: "want an object", ``: "ends where a value", `{"a":1}x`: "data after", `{"a":{"b":1,"b":2}}`: `in /a: duplicate key "b"`,
		`{"a":1,"a":2}`: "duplicate", `{"a":[0,{"x":tru}]}`: "in /a/1/x: want true",
		`{"params":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `}`: "nested deeper",
	} {
		if err := strictjson.Object([]byte(in), func(_, _ []byte) error { return nil }); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: %v, want %q", in, err, want)
		}
	}
	n := 0
	if err := strictjson.Array([]byte(`[1, "x" ,{}]`), func([]byte) error { n++; return nil }); err != nil || n != 3 {
		t.Errorf("%d elements, %v", n, err)
	}
	if err := strictjson.Array([]byte(`{}`), nil); err == nil {
		t.Error("an object is no array")
	}
}

func TestAllocations(t *testing.T) {
	in := []byte(`{"kind":"tool.echo","params":{"a":[1,2.5,{"b":"c\n","d":null}],"e":true},"session":"s"}`)
	var size int
	if n := testing.AllocsPerRun(100, func() {
		size = 0
		if err := strictjson.Object(in, func(k, v []byte) error { size += len(k) + len(v); return nil }); err != nil {
			t.Fatal(err)
		}
		if err := strictjson.CheckObject(in); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%.0f allocations", n)
	}
}
