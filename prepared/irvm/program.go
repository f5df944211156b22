package irvm

import (
	"context"
	"errors"
	"fmt"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Empty is a program that evaluates nothing. Its machines read inputs and hold
// values, for who evaluates elsewhere.
func Empty(l Limits) *Program {
	p := &Program{limits: l.WithDefaults()}
	p.machines.New = func() any { return p.newMachine() }
	return p
}

func (p *Program) newMachine() *Machine {
	// What is small and written in every evaluation has room enough to fill
	// cache lines of its own: another machine's must not lie beside it.
	m := &Machine{prog: p, regs: make([]Value, p.regs), frames: make([]frame, 1, 4), result: make([]Value, 0, 8)}
	m.frames[0].entries = make([]memoEntry, p.memos)
	return m
}

// Machine gives out a machine for one evaluation. The caller releases it when
// it has taken what it needs out of the values.
func (p *Program) Machine(ctx context.Context) *Machine {
	m := p.machines.Get().(*Machine)
	m.begin(ctx)
	return m
}

func (m *Machine) begin(ctx context.Context) {
	m.ctx, m.limits = ctx, m.prog.limits
	m.steps, m.next, m.mem = 0, slice, m.limits.Memory
}

// end stops what runs for the evaluation.
func (m *Machine) end() {
	if m.release != nil {
		m.release()
		m.release = nil
	}
}

// Release ends the life of all values that m made.
func (m *Machine) Release() {
	m.end()
	if m.broken {
		return // what a panic left is nobody's
	}
	m.reset()
	m.prog.machines.Put(m)
}

// Parse reads an input strictly. The value refers to data: neither may data be
// changed while the machine is in use, nor the value be used after. The error
// wraps ErrInput or ErrBudget.
func (m *Machine) Parse(data []byte) (v Value, err error) {
	defer m.recover(&v, &err)
	return m.parse(data), nil
}

// Eval evaluates the plan over input, undefined if the zero Value. now is what
// time.now_ns returns. An undefined answer is the zero Value. The error wraps
// ErrBudget or ErrRedo, or is a panic's.
func (m *Machine) Eval(input Value, now int64) (v Value, err error) {
	defer m.recover(&v, &err)
	all, err := m.run(input, now)
	if err != nil || len(all) == 0 {
		return Value{}, err
	}
	if len(all) > 1 || len(all[0].object().vals) != 1 {
		return Value{}, fmt.Errorf("%w: not one answer", ErrRedo)
	}
	return all[0].object().vals[0], nil
}

// run returns the bindings of each answer.
func (m *Machine) run(input Value, now int64) ([]Value, error) {
	p := m.prog
	if p.plan == nil {
		return nil, errors.New("the program is empty")
	}
	m.now = now
	m.depth = 0
	m.openFrame()
	m.sp = p.planRegs
	m.high = max(m.high, m.sp)
	r := m.regs[:m.sp:m.sp]
	clear(r)
	r[0], r[1] = input, p.data
	for _, b := range p.plan {
		if b.run(m, r) == stop {
			break
		}
	}
	if int64(m.steps) > m.limits.Steps {
		m.look()
	}
	return m.result, nil
}

func (m *Machine) recover(v *Value, err *error) {
	switch r := recover().(type) {
	case nil:
		return
	case abort:
		*v, *err = Value{}, r.err
	default:
		m.broken = true
		*v, *err = Value{}, fmt.Errorf("the evaluator panicked: %v", r)
	}
}

// FromAST makes a value of OPA's.
func (m *Machine) FromAST(from ast.Value) (v Value, err error) {
	defer m.recover(&v, &err)
	return m.fromAST(from), nil
}

// Kind of v.
func (v Value) Kind() Kind { return v.kind() }

// IsNumber reports whether v is an Int or a Decimal.
func (v Value) IsNumber() bool { return v.isNumber() }

// Bool is the value of a Bool.
func (v Value) Bool() bool { return v.n == 1 }

// Text is the text of a String or a number. It lives as long as v.
func (v Value) Text() string {
	switch v.kind() {
	case String:
		return v.str()
	case Decimal:
		return v.text()
	case Int:
		return string(astNumber(v))
	}
	return ""
}

// Int64 is the value of a number that is written as an integer.
func (v Value) Int64() (int64, bool) {
	if v.kind() == Int {
		return v.int(), true
	}
	return 0, false
}

// Get is the member of an object under a key, the zero Value if there is none.
func (v Value) Get(key string) Value {
	if v.kind() != Object {
		return Value{}
	}
	var steps int
	return v.object().get(stringValue(key), &steps)
}

// Index is a member of an array, the zero Value if there is none.
func (v Value) Index(i int) Value {
	if v.kind() != Array || i < 0 || i >= v.length() {
		return Value{}
	}
	return v.array().elems[i]
}

// Len is how many members a collection has.
func (v Value) Len() int { return v.length() }

// Members of an array or a set; those of a set in order.
func (m *Machine) Members(v Value) []Value {
	m.sort(v)
	elems, _ := members(v)
	return elems
}

// Entries are the keys and values of an object in the order of the keys.
func (m *Machine) Entries(v Value) (keys, values []Value) {
	m.sort(v)
	o := v.object()
	return o.keys, o.vals
}

// Bounds of the texts that a machine remembers to give them out again.
const (
	maxStrings     = 256
	maxStringBytes = 256
)

// KeepString returns the text of a String, for the caller to keep. Texts of the
// program are returned as they are; others are copied, and a machine remembers
// some so that a text that comes again and again is copied once.
func (m *Machine) KeepString(v Value) string {
	s := v.str()
	if v.kept() || s == "" {
		return s
	}
	if known, ok := m.strings[s]; ok {
		return known
	}
	s = string([]byte(s))
	if len(s) <= maxStringBytes {
		if m.strings == nil || len(m.strings) >= maxStrings {
			m.strings = make(map[string]string, 16)
		}
		m.strings[s] = s
	}
	return s
}
