package call

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

func TestRedactBytes(t *testing.T) {
	const doc = `{"kind":"k", "params" : {"a/b":"s1","c~d":"s2","list":[1, "s3", {"x":"s4"}],"o":{"p":{"q":"s5"}},"n":-1.50e3,"e":"a\"b\\","\u0074oken":"s6"} ,"z":[]}`
	for _, tc := range []struct {
		pointers string
		want     string // what changes, as old=>new; "": nothing
		hit      string
	}{
		{"/params/nothing /x /params/list/9 /kind/x /params/list/x", "", "[]"},
		{"/params/a~1b", `"s1"=>"[redacted]"`, "[/params/a~1b]"},
		{"/params/c~0d", `"s2"=>"[redacted]"`, "[/params/c~0d]"},
		{"/params/list/1", `"s3"=>"[redacted]"`, "[/params/list/1]"},
		{"/params/list/2/x", `"s4"=>"[redacted]"`, "[/params/list/2/x]"},
		{"/params/list", `[1, "s3", {"x":"s4"}]=>"[redacted]"`, "[/params/list]"},
		{"/params/o /params/o/p/q", `{"p":{"q":"s5"}}=>"[redacted]"`, "[/params/o]"},
		{"/params/o/p/q /params/o", `{"p":{"q":"s5"}}=>"[redacted]"`, "[/params/o]"},
		{"/params/token", `"s6"=>"[redacted]"`, "[/params/token]"},
		{"/params/n", `-1.50e3=>"[redacted]"`, "[/params/n]"},
		{"/params/e", `"a\"b\\"=>"[redacted]"`, "[/params/e]"},
		{"/z", `[]=>"[redacted]"`, "[/z]"},
		{"/kind /kind", `"k"=>"[redacted]"`, "[/kind /kind]"},
	} {
		want := doc
		if old, now, ok := strings.Cut(tc.want, "=>"); ok {
			want = strings.Replace(doc, old, now, 1)
		}
		out, hit := redact([]byte(doc), strings.Fields(tc.pointers))
		if string(out) != want || fmt.Sprint(hit) != tc.hit {
			t.Errorf("%s: %s\nhit %v\nwant %s\nhit %s", tc.pointers, out, hit, want, tc.hit)
		}
	}
}

// FuzzRedact: what the strict decoder accepts stays JSON; the value at a pointer
// is gone, and everything else is as it was.
func FuzzRedact(f *testing.F) {
	f.Add(`{"params":{"token":"s","a":[1,{"b":2}]}}`, "/params/token")
	f.Add(`{"params":{"token":"s","a":[1,{"b":2}]}}`, "/params/a/1/b")
	f.Add(`{"":{"~":[[]]}}`, "//~0/0")
	f.Fuzz(func(t *testing.T, doc, ptr string) {
		if strictjson.CheckObject([]byte(doc)) != nil || !strings.HasPrefix(ptr, "/") {
			return
		}
		out, hit := redact([]byte(doc), []string{ptr})
		if len(hit) == 0 {
			if string(out) != doc {
				t.Fatalf("%s %s: nothing hit, and %s", doc, ptr, out)
			}
			return
		}
		if err := strictjson.CheckObject(out); err != nil {
			t.Fatalf("%s %s: %s: %v", doc, ptr, out, err)
		}
		var want any
		dec := json.NewDecoder(strings.NewReader(doc))
		dec.UseNumber()
		if err := dec.Decode(&want); err != nil {
			t.Fatal(err)
		}
		blank(want, strings.Split(strings.TrimPrefix(ptr, "/"), "/"))
		var got any
		dec = json.NewDecoder(bytes.NewReader(out))
		dec.UseNumber()
		if err := dec.Decode(&got); err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%s %s: %s (%v)", doc, ptr, out, err)
		}
	})
}

// blank is the plain way to do it, which loses the bytes.
func blank(doc any, path []string) {
	key := unescapePointer.Replace(path[0])
	set := func(v any) any {
		if len(path) == 1 {
			return "[redacted]"
		}
		blank(v, path[1:])
		return v
	}
	switch v := doc.(type) {
	case map[string]any:
		if next, ok := v[key]; ok {
			v[key] = set(next)
		}
	case []any:
		if i := index(key); i >= 0 && i < len(v) {
			v[i] = set(v[i])
		}
	}
}
