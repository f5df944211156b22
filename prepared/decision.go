package prepared

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/prepared/irvm"
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

// A decoder reads an answer strictly into a Decision: a bare boolean, or an
// object of the fields that the contract names. Lists may be arrays or sets.
type decoder struct {
	m *irvm.Machine // that the answer belongs to
}

// decide overwrites *d and uses its slices again.
func (x decoder) decide(v irvm.Value, d *Decision) error {
	old := *d
	*d = Decision{Reasons: old.Reasons[:0], Redact: old.Redact[:0]}
	switch v.Kind() {
	case irvm.Bool:
		d.Allow = v.Bool()
		return nil
	case irvm.Object:
	default:
		return fmt.Errorf("the answer is %s, want a boolean or an object", article(v))
	}
	hasAllow := false
	keys, values := x.m.Entries(v)
	for i := range keys {
		key, err := fieldName(keys[i], "")
		if err != nil {
			return err
		}
		v := values[i]
		switch key {
		case "allow":
			if v.Kind() != irvm.Bool {
				return wrongType(key, v, "a boolean")
			}
			hasAllow, d.Allow = true, v.Bool()
		case "reasons":
			d.Reasons, err = x.reasons(v, d.Reasons)
		case "constraints":
			d.Constraints, err = x.constraints(v, old.Constraints)
		case "approval":
			d.Approval, err = x.approval(v, old.Approval[:0])
		case "redact":
			d.Redact, err = x.list(key, v, d.Redact, func(s string) error {
				if !strings.HasPrefix(s, "/") {
					return fmt.Errorf("redact: %q is no JSON Pointer such as /params/token", s)
				}
				return nil
			})
		default:
			return unknown("", key, resultFields)
		}
		if err != nil {
			return err
		}
	}
	if !hasAllow {
		return errors.New("allow is missing")
	}
	return nil
}

func (x decoder) reasons(v irvm.Value, out []event.Reason) ([]event.Reason, error) {
	items, err := x.elements("reasons", v)
	if err != nil {
		return nil, err
	}
	if len(items) > MaxReasons {
		return nil, fmt.Errorf("%d reasons, at most %d", len(items), MaxReasons)
	}
	if out == nil {
		out = make([]event.Reason, 0, len(items))
	}
	for _, v := range items {
		r, err := x.reason(v)
		if err != nil {
			return nil, err
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

func (x decoder) reason(v irvm.Value) (r event.Reason, err error) {
	switch v.Kind() {
	case irvm.String:
		r.Message = x.m.KeepString(v)
	case irvm.Object:
		keys, values := x.m.Entries(v)
		for i := range keys {
			key, err := fieldName(keys[i], "reasons.")
			switch {
			case err != nil:
				return r, err
			case key != "code" && key != "message":
				return r, unknown("reasons.", key, []string{"code", "message"})
			case values[i].Kind() != irvm.String:
				return r, wrongType("reasons."+key, values[i], "a string")
			case key == "code":
				r.Code = x.m.KeepString(values[i])
			default:
				r.Message = x.m.KeepString(values[i])
			}
		}
	default:
		return r, wrongType("reasons", v, "strings or objects of code and message in it")
	}
	return r, nil
}

func (x decoder) constraints(v irvm.Value, old constraint.Constraints) (c constraint.Constraints, err error) {
	if v.Kind() != irvm.Object {
		return c, wrongType("constraints", v, "an object")
	}
	keys, values := x.m.Entries(v)
	for i := range keys {
		key, err := fieldName(keys[i], "constraints.")
		if err != nil {
			return c, err
		}
		v := values[i]
		switch key {
		case "timeout_ms":
			c.TimeoutMS, err = limit("constraints.timeout_ms", v)
		case "memory_max":
			c.MemoryMax, err = limit("constraints.memory_max", v)
		case "pids_max":
			c.PidsMax, err = limit("constraints.pids_max", v)
		case "output_max_bytes":
			c.OutputMaxBytes, err = limit("constraints.output_max_bytes", v)
		case "cpu_max":
			if v.Kind() != irvm.String || !validCPUMax(v.Text()) {
				return c, errors.New("constraints.cpu_max: want \"QUOTA PERIOD\" in microseconds, for example \"50000 100000\"")
			}
			c.CPUMax = x.m.KeepString(v)
		case "egress":
			c.Egress, err = x.list("constraints.egress", v, old.Egress[:0], validEgress)
		case "env":
			c.Env, err = x.list("constraints.env", v, old.Env[:0], validEnv)
		case "fs":
			c.FS, err = x.list("constraints.fs", v, old.FS[:0], validFS)
		default:
			return c, unknown("constraints.", key, []string{"timeout_ms", "memory_max", "pids_max", "cpu_max", "egress", "output_max_bytes", "env", "fs"})
		}
		if err != nil {
			return c, err
		}
	}
	return c, nil
}

func validEgress(s string) error {
	host, port, err := net.SplitHostPort(s)
	if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || host == "" || n == 0 {
		return fmt.Errorf("constraints.egress: %q, want host:port", s)
	}
	return nil
}

func validEnv(s string) error {
	if s == "" || strings.ContainsAny(s, "=\x00") {
		return fmt.Errorf("constraints.env: %q is no variable's name", s)
	}
	return nil
}

func validFS(s string) error {
	if !strings.HasPrefix(s, "ro:/") && !strings.HasPrefix(s, "rw:/") || strings.Contains(s, "\x00") {
		return fmt.Errorf("constraints.fs: %q, want \"ro:/path\" or \"rw:/path\"", s)
	}
	return nil
}

// limit reads a bound. Zero and less are refused: in the tools a zero bound
// means none, which is not what a policy that writes 0 can have meant.
func limit(at string, v irvm.Value) (int64, error) {
	if !v.IsNumber() {
		return 0, wrongType(at, v, "an integer")
	}
	i, ok := v.Int64()
	if !ok || i < 1 {
		return 0, fmt.Errorf("%s is %.40s, want an integer from 1 to 9223372036854775807", at, v.Text())
	}
	return i, nil
}

func validCPUMax(s string) bool {
	quota, period, ok := strings.Cut(s, " ")
	q, qerr := strconv.ParseUint(quota, 10, 63)
	p, perr := strconv.ParseUint(period, 10, 63)
	return ok && (quota == "max" || qerr == nil && q > 0) && perr == nil && p > 0
}

func (x decoder) approval(v irvm.Value, out json.RawMessage) (json.RawMessage, error) {
	if v.Kind() != irvm.Object {
		return nil, wrongType("approval", v, "an object; leave it out where none is needed")
	}
	out = v.AppendJSON(out)
	if len(out) > MaxApproval {
		return nil, fmt.Errorf("approval has over %d bytes", MaxApproval)
	}
	return out, nil
}

// list reads strings. An empty list stays different from none: it allows nothing.
func (x decoder) list(at string, v irvm.Value, out []string, check func(string) error) ([]string, error) {
	items, err := x.elements(at, v)
	if err != nil {
		return nil, err
	}
	if len(items) > MaxListItems {
		return nil, fmt.Errorf("%s has %d items, at most %d", at, len(items), MaxListItems)
	}
	if out == nil {
		out = make([]string, 0, len(items))
	}
	for _, v := range items {
		if v.Kind() != irvm.String {
			return nil, wrongType(at, v, "strings in it")
		}
		if len(v.Text()) > MaxItemBytes {
			return nil, fmt.Errorf("%s: an item has over %d bytes", at, MaxItemBytes)
		}
		s := x.m.KeepString(v)
		if err := check(s); err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

// elements are those of an array, or of a set in its sorted order.
func (x decoder) elements(at string, v irvm.Value) ([]irvm.Value, error) {
	if k := v.Kind(); k != irvm.Array && k != irvm.Set {
		return nil, wrongType(at, v, "an array or a set")
	}
	return x.m.Members(v), nil
}

// fieldName is the name of a field; it lives as long as key.
func fieldName(key irvm.Value, at string) (string, error) {
	if key.Kind() != irvm.String {
		return "", fmt.Errorf("%skey %.80s is no string", at, key.AppendJSON(nil))
	}
	return key.Text(), nil
}

func unknown(at, key string, known []string) error {
	return fmt.Errorf("unknown field %q%s", at+key, nearest(key, known))
}

func wrongType(at string, v irvm.Value, want string) error {
	return fmt.Errorf("%s is %s, want %s", at, article(v), want)
}

func article(v irvm.Value) string {
	switch n := v.Kind().String(); n {
	case "array", "object":
		return "an " + n
	case "null":
		return n
	default:
		return "a " + n
	}
}
