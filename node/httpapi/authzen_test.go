package httpapi

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/autonomyops/autonomy/internal/strictjson"
)

// FuzzWithDefault: an entity and its default make strict JSON again, which has
// the entity's members, and of the default's only the required ones it lacked.
func FuzzWithDefault(f *testing.F) {
	f.Add(`{"id":"1"}`, `{"type":"record","id":"2","x":1}`)
	f.Add(`{ }`, `{"type":"record"}`)
	f.Add(`{"type" : "a" }`, `{}`)
	f.Fuzz(func(t *testing.T, own, def string) {
		if strictjson.CheckObject([]byte(own)) != nil || strictjson.CheckObject([]byte(def)) != nil {
			return
		}
		merged, err := withDefault(json.RawMessage(own), json.RawMessage(def), []string{"type", "id"})
		if err != nil {
			t.Fatal(err)
		}
		if err := strictjson.CheckObject(merged); err != nil {
			t.Fatalf("%s and %s make %s: %v", own, def, merged, err)
		}
		o, d, m := parse(t, own), parse(t, def), parse(t, string(merged))
		for _, key := range []string{"type", "id"} {
			if _, has := o[key]; !has && d[key] != nil {
				o[key] = d[key]
			}
			if m[key] == nil { // a null of the default is taken over, too
				delete(m, key)
			}
			if o[key] == nil {
				delete(o, key)
			}
		}
		if !reflect.DeepEqual(m, o) {
			t.Fatalf("%s and %s make %s", own, def, merged)
		}
	})
}

func parse(t *testing.T, text string) (m map[string]any) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	if err := dec.Decode(&m); err != nil {
		t.Fatal(err)
	}
	return m
}
