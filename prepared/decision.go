package prepared

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/internal/event"
)

// Decision is what a policy says about one call. The zero value denies.
type Decision struct {
	Allow       bool
	Reasons     []event.Reason         // in the policy's order; a set comes sorted
	Constraints constraint.Constraints // narrow what the tool's configuration allows
	Approval    json.RawMessage        // an object: a human must grant the call; nil: none
	Redact      []string               // JSON Pointers of what not to show
}

// Bounds of an answer. A policy that passes them is denied, not cut.
const (
	MaxReasons     = 64
	MaxReasonBytes = 4 << 10 // code and message of one reason together
	MaxListItems   = 256     // egress, env, fs, redact
	MaxItemBytes   = 4 << 10
	MaxApproval    = 16 << 10 // bytes of JSON
)

// decisionOf reads the answer strictly: a bare boolean, or an object of the
// fields that the contract names. Lists may be arrays or sets.
func decisionOf(v ast.Value) (Decision, error) {
	switch v := v.(type) {
	case ast.Boolean:
		return Decision{Allow: bool(v)}, nil
	case ast.Object:
		return decisionOfObject(v)
	}
	return Decision{}, fmt.Errorf("the answer is %s, want a boolean or an object", article(v))
}

func decisionOfObject(obj ast.Object) (Decision, error) {
	var d Decision
	hasAllow := false
	err := fields(obj, "", func(key string, v ast.Value) (err error) {
		switch key {
		case "allow":
			b, ok := v.(ast.Boolean)
			if !ok {
				return wrongType(key, v, "a boolean")
			}
			hasAllow, d.Allow = true, bool(b)
		case "reasons":
			d.Reasons, err = reasons(v)
		case "constraints":
			d.Constraints, err = constraints(v)
		case "approval":
			d.Approval, err = approval(v)
		case "redact":
			d.Redact, err = list(key, v, func(s string) error {
				if !strings.HasPrefix(s, "/") {
					return fmt.Errorf("redact: %q is no JSON Pointer such as /params/token", s)
				}
				return nil
			})
		default:
			return unknown("", key, []string{"allow", "reasons", "constraints", "approval", "redact"})
		}
		return err
	})
	if err != nil {
		return Decision{}, err
	}
	if !hasAllow {
		return Decision{}, errors.New("allow is missing")
	}
	return d, nil
}

func reasons(v ast.Value) ([]event.Reason, error) {
	items, err := elements("reasons", v)
	if err != nil {
		return nil, err
	}
	if len(items) > MaxReasons {
		return nil, fmt.Errorf("%d reasons, at most %d", len(items), MaxReasons)
	}
	out := make([]event.Reason, 0, len(items))
	for _, t := range items {
		var r event.Reason
		switch v := t.Value.(type) {
		case ast.String:
			r.Message = string(v)
		case ast.Object:
			err := fields(v, "reasons.", func(key string, v ast.Value) error {
				s, ok := v.(ast.String)
				switch {
				case key != "code" && key != "message":
					return unknown("reasons.", key, []string{"code", "message"})
				case !ok:
					return wrongType("reasons."+key, v, "a string")
				case key == "code":
					r.Code = string(s)
				default:
					r.Message = string(s)
				}
				return nil
			})
			if err != nil {
				return nil, err
			}
		default:
			return nil, wrongType("reasons", v, "strings or objects of code and message in it")
		}
		if r.Code == "" && r.Message == "" {
			return nil, errors.New("reasons: a reason says nothing")
		}
		if len(r.Code)+len(r.Message) > MaxReasonBytes {
			return nil, fmt.Errorf("reasons: a reason has over %d bytes", MaxReasonBytes)
		}
		out = append(out, r)
	}
	return out, nil
}

func constraints(v ast.Value) (constraint.Constraints, error) {
	obj, ok := v.(ast.Object)
	if !ok {
		return constraint.Constraints{}, wrongType("constraints", v, "an object")
	}
	var c constraint.Constraints
	err := fields(obj, "constraints.", func(key string, v ast.Value) (err error) {
		at := "constraints." + key
		switch key {
		case "timeout_ms":
			c.TimeoutMS, err = limit(at, v)
		case "memory_max":
			c.MemoryMax, err = limit(at, v)
		case "pids_max":
			c.PidsMax, err = limit(at, v)
		case "output_max_bytes":
			c.OutputMaxBytes, err = limit(at, v)
		case "cpu_max":
			s, ok := v.(ast.String)
			if !ok || !validCPUMax(string(s)) {
				return fmt.Errorf("%s: want \"QUOTA PERIOD\" in microseconds, for example \"50000 100000\"", at)
			}
			c.CPUMax = string(s)
		case "egress":
			c.Egress, err = list(at, v, func(s string) error {
				host, port, err := net.SplitHostPort(s)
				if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || host == "" || n == 0 {
					return fmt.Errorf("%s: %q, want host:port", at, s)
				}
				return nil
			})
		case "env":
			c.Env, err = list(at, v, func(s string) error {
				if s == "" || strings.ContainsAny(s, "=\x00") {
					return fmt.Errorf("%s: %q is no variable's name", at, s)
				}
				return nil
			})
		case "fs":
			c.FS, err = list(at, v, func(s string) error {
				if !strings.HasPrefix(s, "ro:/") && !strings.HasPrefix(s, "rw:/") || strings.Contains(s, "\x00") {
					return fmt.Errorf("%s: %q, want \"ro:/path\" or \"rw:/path\"", at, s)
				}
				return nil
			})
		default:
			return unknown("constraints.", key, []string{"timeout_ms", "memory_max", "pids_max", "cpu_max", "egress", "output_max_bytes", "env", "fs"})
		}
		return err
	})
	return c, err
}

// limit reads a bound. Zero and less are refused: in the tools a zero bound
// means none, which is not what a policy that writes 0 can have meant.
func limit(at string, v ast.Value) (int64, error) {
	n, ok := v.(ast.Number)
	if !ok {
		return 0, wrongType(at, v, "an integer")
	}
	i, err := json.Number(n).Int64()
	if err != nil || i < 1 {
		return 0, fmt.Errorf("%s is %.40s, want an integer from 1 to 9223372036854775807", at, string(n))
	}
	return i, nil
}

func validCPUMax(s string) bool {
	quota, period, ok := strings.Cut(s, " ")
	q, qerr := strconv.ParseUint(quota, 10, 63)
	p, perr := strconv.ParseUint(period, 10, 63)
	return ok && (quota == "max" || qerr == nil && q > 0) && perr == nil && p > 0
}

func approval(v ast.Value) (json.RawMessage, error) {
	if _, ok := v.(ast.Object); !ok {
		return nil, wrongType("approval", v, "an object; leave it out where none is needed")
	}
	x, err := ast.JSON(v)
	if err != nil {
		return nil, fmt.Errorf("approval: %w", err)
	}
	raw, err := json.Marshal(x)
	if err != nil {
		return nil, fmt.Errorf("approval: %w", err)
	}
	if len(raw) > MaxApproval {
		return nil, fmt.Errorf("approval has over %d bytes", MaxApproval)
	}
	return raw, nil
}

// list reads strings. An empty list stays different from none: it allows nothing.
func list(at string, v ast.Value, check func(string) error) ([]string, error) {
	items, err := elements(at, v)
	if err != nil {
		return nil, err
	}
	if len(items) > MaxListItems {
		return nil, fmt.Errorf("%s has %d items, at most %d", at, len(items), MaxListItems)
	}
	out := make([]string, 0, len(items))
	for _, t := range items {
		s, ok := t.Value.(ast.String)
		if !ok {
			return nil, wrongType(at, t.Value, "strings in it")
		}
		if len(s) > MaxItemBytes {
			return nil, fmt.Errorf("%s: an item has over %d bytes", at, MaxItemBytes)
		}
		if err := check(string(s)); err != nil {
			return nil, err
		}
		out = append(out, string(s))
	}
	return out, nil
}

// elements are those of an array, or of a set in its sorted order.
func elements(at string, v ast.Value) ([]*ast.Term, error) {
	var out []*ast.Term
	switch v := v.(type) {
	case *ast.Array:
		v.Foreach(func(t *ast.Term) { out = append(out, t) })
	case ast.Set:
		v.Sorted().Foreach(func(t *ast.Term) { out = append(out, t) })
	default:
		return nil, wrongType(at, v, "an array or a set")
	}
	return out, nil
}

// fields calls f for every field in sorted order until one is refused.
func fields(obj ast.Object, at string, f func(key string, v ast.Value) error) error {
	return obj.Iter(func(k, v *ast.Term) error {
		key, ok := k.Value.(ast.String)
		if !ok {
			return fmt.Errorf("%skey %.80s is no string", at, k.String())
		}
		return f(string(key), v.Value)
	})
}

func unknown(at, key string, known []string) error {
	return fmt.Errorf("unknown field %q%s", at+key, nearest(key, known))
}

func wrongType(at string, v ast.Value, want string) error {
	return fmt.Errorf("%s is %s, want %s", at, article(v), want)
}

func article(v ast.Value) string {
	switch n := ast.ValueName(v); n {
	case "array", "object":
		return "an " + n
	case "null":
		return n
	default:
		return "a " + n
	}
}
