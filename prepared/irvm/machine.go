package irvm

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"sort"
	"time"

	"github.com/gobwas/glob"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// What Eval can end in besides a value.
var (
	// ErrBudget: the evaluation was cut because it took more steps, time or
	// memory than its limits say, or because the context ended.
	ErrBudget = errors.New("evaluation stopped")
	// ErrInput: the input is not a strict JSON object.
	ErrInput = errors.New("input")
	// ErrRedo: the evaluation met something that this machine leaves to OPA's
	// interpreter: a builtin that failed, rules that conflict. The whole
	// evaluation must be done again there; its outcome, value or error, counts.
	ErrRedo = errors.New("evaluation left to the interpreter")
)

// Limits bound one evaluation. A zero field takes its default.
type Limits struct {
	Steps  int64         // default DefaultSteps
	Time   time.Duration // default DefaultTime
	Memory int64         // bytes of values made, the input's among them; default DefaultMemory
}

// Defaults of Limits. A step is one statement of the plan, one member of a
// collection looked at, or 64 bytes of text, whichever the work consists of; a
// million steps take some ten milliseconds. Steps are what a policy runs into
// first. Time is generous: a tight deadline on the wall clock would turn a busy
// machine into false denials.
const (
	DefaultSteps  = 20_000_000
	DefaultTime   = 10 * time.Second
	DefaultMemory = 64 << 20
)

// WithDefaults has a value in every field.
func (l Limits) WithDefaults() Limits {
	if l.Steps == 0 {
		l.Steps = DefaultSteps
	}
	if l.Time == 0 {
		l.Time = DefaultTime
	}
	if l.Memory == 0 {
		l.Memory = DefaultMemory
	}
	return l
}

const (
	// slice is how many steps pass between two looks at clock and context.
	slice = 1 << 14
	// keepBytes is how large a part of an arena a Machine keeps for the next
	// evaluation.
	keepBytes = 256 << 10
)

// Machine evaluates one input at a time. It belongs to one goroutine; Program
// keeps those that are not in use.
type Machine struct {
	prog *Program

	regs []Value // registers of all functions that are running
	high int     // how many of them were used
	sp   int

	memo   *frame // the current one
	frames []frame
	depth  int

	result  []Value // of ResultSetAdd
	stack   []Value // of the parser
	deep    int     // how many of the stack were used, once values were taken off it
	now     int64   // time.now_ns
	steps   int     // taken so far
	next    int     // steps at which to look at clock and limits
	mem     int64   // bytes left
	limits  Limits
	started time.Time // when the clock was looked at first
	ctx     context.Context
	cancel  topdown.Cancel          // for OPA's builtins
	bctx    *topdown.BuiltinContext // made when the first of OPA's builtins is called
	release func()                  // ends what bctx began
	broken  bool                    // by a panic

	values  arena[Value]
	objects arena[object]
	arrays  arena[array]
	sets    arena[set]
	tables  arena[uint32]
	text    arena[byte]

	strings map[string]string // texts that results had before; see KeepString
	regexps cache[string, *regexp.Regexp]
	globs   cache[globKey, *glob.Pattern]
	zones   cache[string, *time.Location]
}

// A memo holds the values of rules without arguments. A `with` gives its block
// a frame of its own, as rules can have other values there.
type memoEntry struct {
	gen   uint32 // of the frame when the entry was written
	value Value
}

type frame struct {
	gen     uint32
	entries []memoEntry
}

// abort is what the machine panics with to leave an evaluation.
type abort struct{ err error }

func (m *Machine) fail(err error) { panic(abort{err}) }

// redo leaves the evaluation to the interpreter.
func (m *Machine) redo(why string) { panic(abort{fmt.Errorf("%w: %s", ErrRedo, why)}) }

// charge takes n steps.
func (m *Machine) charge(n int) {
	if m.steps += n; m.steps > m.next {
		m.look()
	}
}

// look sees whether the evaluation may go on, and if so for one more slice.
func (m *Machine) look() {
	if int64(m.steps) > m.limits.Steps {
		m.fail(fmt.Errorf("%w: over %d steps", ErrBudget, m.limits.Steps))
	}
	if m.started.IsZero() { // looking at the clock takes longer than a short evaluation
		m.started = time.Now()
	}
	if time.Since(m.started) > m.limits.Time {
		m.fail(fmt.Errorf("%w: over %s", ErrBudget, m.limits.Time))
	}
	if m.ctx.Err() != nil {
		m.fail(fmt.Errorf("%w: %w", ErrBudget, context.Cause(m.ctx)))
	}
	m.next = m.steps + slice
}

// take counts bytes of memory.
func (m *Machine) take(bytes int) {
	if m.mem -= int64(bytes); m.mem < 0 {
		m.fail(fmt.Errorf("%w: over %d bytes of memory", ErrBudget, m.limits.Memory))
	}
}

// An arena gives out memory that is all freed at once. What it gives out is
// zero. When a chunk is full the next is twice as large; the former lives as
// long as values refer to it.
type arena[T any] struct {
	chunk []T
	used  int
}

func (a *arena[T]) take(n int) []T {
	if a.used+n > len(a.chunk) {
		a.chunk, a.used = make([]T, max(2*len(a.chunk), n, 64)), 0
	}
	s := a.chunk[a.used : a.used+n : a.used+n]
	a.used += n
	return s
}

// reset forgets what was given out, and what it referred to.
func (a *arena[T]) reset(maxLen int) {
	if len(a.chunk) > maxLen {
		a.chunk = nil
	}
	clear(a.chunk[:min(a.used, len(a.chunk))])
	a.used = 0
}

const (
	valueBytes  = 24
	objectBytes = 80
	arrayBytes  = 32
	setBytes    = 56
)

func (m *Machine) takeValues(n int) []Value {
	m.take(n * valueBytes)
	return m.values.take(n)
}

func (m *Machine) newObject() *object {
	m.take(objectBytes)
	return &m.objects.take(1)[0]
}

func (m *Machine) newArray(elems []Value) Value {
	m.take(arrayBytes)
	a := &m.arrays.take(1)[0]
	a.elems = elems
	return arrayValue(a)
}

func (m *Machine) newSet() *set {
	m.take(setBytes)
	return &m.sets.take(1)[0]
}

func (m *Machine) takeText(n int) []byte {
	m.take(n)
	return m.text.take(n)
}

// appendValue is append with the arena's memory.
func (m *Machine) appendValue(s []Value, v Value) []Value {
	if len(s) == cap(s) {
		grown := m.takeValues(max(4, 2*cap(s)))
		copy(grown, s)
		s = grown[:len(s)]
	}
	return append(s, v)
}

// add puts v into s unless it is there.
func (m *Machine) add(s *set, v Value) {
	if s.find(v, &m.steps) < 0 {
		s.elems = m.appendValue(s.elems, v)
		s.tab = m.index(s.tab, s.elems)
		s.sorted = false
	}
}

// insert sets o[k] to v.
func (m *Machine) insert(o *object, k, v Value) {
	if at := o.find(k, &m.steps); at >= 0 {
		o.vals[at] = v
		return
	}
	o.keys = m.appendValue(o.keys, k)
	o.vals = m.appendValue(o.vals, v)
	o.tab = m.index(o.tab, o.keys)
	o.sorted = false
}

// index brings the table of members up to date after the last one was appended.
// Few members need none: it is nil then.
func (m *Machine) index(tab []uint32, members []Value) []uint32 {
	n := len(members)
	if n <= smallLen {
		return nil
	}
	if tab != nil && 2*n <= len(tab) {
		insert(tab, hash(members[n-1], &m.steps), n-1)
		return tab
	}
	size := tableLen(2 * n)
	m.take(4 * size)
	tab = m.tables.take(size)
	for i := range members {
		insert(tab, hash(members[i], &m.steps), i)
	}
	return tab
}

// sort puts the entries in order of their keys, as OPA visits them.
func (m *Machine) sort(v Value) {
	switch v.kind() {
	case Set:
		s := v.set()
		if s.sorted {
			return
		}
		m.sortValues(s.elems)
		s.sorted, s.tab = true, m.index(nil, s.elems)
	case Object:
		o := v.object()
		if o.sorted {
			return
		}
		if n := len(o.keys); n <= smallLen {
			m.insertionSort(o)
		} else {
			m.charge(n)
			by := entries{o: o, m: m}
			sort.Sort(&by)
			o.tab = m.index(nil, o.keys)
		}
		o.sorted = true
	}
}

func (m *Machine) insertionSort(o *object) {
	for i := 1; i < len(o.keys); i++ {
		for j := i; j > 0 && compare(o.keys[j], o.keys[j-1], &m.steps) < 0; j-- {
			o.keys[j], o.keys[j-1] = o.keys[j-1], o.keys[j]
			o.vals[j], o.vals[j-1] = o.vals[j-1], o.vals[j]
		}
	}
}

// entries sorts keys and values of an object together.
type entries struct {
	o *object
	m *Machine
}

func (e *entries) Len() int { return len(e.o.keys) }
func (e *entries) Less(i, j int) bool {
	return compare(e.o.keys[i], e.o.keys[j], &e.m.steps) < 0
}
func (e *entries) Swap(i, j int) {
	e.o.keys[i], e.o.keys[j] = e.o.keys[j], e.o.keys[i]
	e.o.vals[i], e.o.vals[j] = e.o.vals[j], e.o.vals[i]
}

func (m *Machine) sortValues(v []Value) {
	m.charge(len(v))
	if len(v) <= smallLen {
		for i := 1; i < len(v); i++ {
			for j := i; j > 0 && compare(v[j], v[j-1], &m.steps) < 0; j-- {
				v[j], v[j-1] = v[j-1], v[j]
			}
		}
		return
	}
	slices.SortFunc(v, func(a, b Value) int { return compare(a, b, &m.steps) })
}

// reset drops all that the evaluation made.
func (m *Machine) reset() {
	clear(m.regs[:m.high])
	clear(m.result)
	clear(m.stack[:max(m.deep, len(m.stack))])
	m.result, m.stack, m.deep = m.result[:0], m.stack[:0], 0
	if cap(m.stack)*valueBytes > keepBytes {
		m.stack = nil
	}
	m.values.reset(keepBytes / valueBytes)
	m.objects.reset(keepBytes / objectBytes)
	m.arrays.reset(keepBytes / arrayBytes)
	m.sets.reset(keepBytes / setBytes)
	m.tables.reset(keepBytes / 4)
	m.text.reset(keepBytes)
	m.ctx, m.bctx, m.cancel = nil, nil, nil
	m.high, m.sp, m.depth, m.started = 0, 0, 0, time.Time{}
}
