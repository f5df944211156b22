package prepared

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// FailOpen is a field without which the policy allows what it denies with it.
type FailOpen struct {
	Input  int    // index of the input that it was found with
	Field  string // JSON Pointer, /params/path
	Change string // removed, null, other type
}

func (f FailOpen) String() string { return f.Field + " " + f.Change }

// MaxProbes bounds the evaluations of one DropFieldProbe.
const MaxProbes = 100_000

// DropFieldProbe looks for rules that fail open. For every input that p denies,
// it removes each field in turn, at every depth, then sets it to null and to a
// value of another type, and reports where the policy then allows. Such a rule
// denies by a field and is silent when the caller leaves the field out.
//
// Not every finding is a fault: leaving out a forbidden header makes a call
// harmless. It is for a person to say so. Inputs that p allows are skipped.
// An input that is no strict JSON object is an error, as are more than
// MaxProbes evaluations.
func DropFieldProbe(ctx context.Context, p *Program, inputs [][]byte) ([]FailOpen, error) {
	var found []FailOpen
	probes := 0
	for i, in := range inputs {
		if _, err := parseInput(in); err != nil {
			return nil, fmt.Errorf("input %d: %w", i, err)
		}
		if d, _ := p.Eval(ctx, in); d.Allow {
			continue // an error is a deny, too
		}
		dec := json.NewDecoder(bytes.NewReader(in))
		dec.UseNumber()
		var doc map[string]any
		if err := dec.Decode(&doc); err != nil {
			return nil, fmt.Errorf("input %d: %w", i, err)
		}
		var failed error
		eachField(doc, "", func(field string, parent map[string]any, key string) {
			was := parent[key]
			try := func(change string) {
				if failed != nil {
					return
				}
				if probes++; probes > MaxProbes {
					failed = fmt.Errorf("over %d probes: give fewer or smaller inputs", MaxProbes)
					return
				}
				raw, err := json.Marshal(doc)
				if err != nil {
					failed = err
					return
				}
				if d, err := p.Eval(ctx, raw); d.Allow {
					found = append(found, FailOpen{Input: i, Field: field, Change: change})
				} else if errors.Is(err, ErrBudget) {
					failed = err // nothing was learned
				}
			}
			delete(parent, key)
			try("removed")
			if parent[key] = nil; was != nil {
				try("null")
			}
			parent[key] = otherType(was)
			try("other type")
			parent[key] = was
		})
		if failed != nil {
			return found, failed
		}
	}
	return found, nil
}

// eachField calls f for every member of every object in v, parents first, in
// sorted order.
func eachField(v any, at string, f func(field string, parent map[string]any, key string)) {
	switch v := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			field := at + "/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(k)
			f(field, v, k)
			eachField(v[k], field, f)
		}
	case []any:
		for i, e := range v {
			eachField(e, at+"/"+strconv.Itoa(i), f)
		}
	}
}

// otherType is a value that no rule for v's type expects.
func otherType(v any) any {
	switch v.(type) {
	case string:
		return 0
	case map[string]any:
		return []any{}
	case []any:
		return map[string]any{}
	}
	return "x"
}
