package irvm

import (
	"time"
)

var nativeTimes = map[string]any{
	"time.clock": calendar("time.clock", func(m *Machine, t time.Time) Value {
		hour, minute, second := t.Clock()
		return m.threeInts(hour, minute, second)
	}),
	"time.date": calendar("time.date", func(m *Machine, t time.Time) Value {
		year, month, day := t.Date()
		return m.threeInts(year, int(month), day)
	}),
	"time.weekday": calendar("time.weekday", func(_ *Machine, t time.Time) Value {
		return keptString(t.Weekday().String())
	}),
	"time.format":           func1(timeFormat),
	"time.parse_rfc3339_ns": func1(parseRFC3339),
}

// calendar is a builtin of a time, which is nanoseconds since 1970 or a list of
// those and the name of a time zone. A layout behind them means nothing to it.
func calendar(name string, f func(m *Machine, t time.Time) Value) func1 {
	return func(m *Machine, a Value) Value {
		t, layout, ok := m.moment(a)
		if !ok || layout.kind() != Undefined && layout.kind() != String {
			return m.callForeign(name, a)
		}
		return f(m, t)
	}
}

func (m *Machine) threeInts(a, b, c int) Value {
	elems := m.takeValues(3)
	elems[0], elems[1], elems[2] = intValue(int64(a)), intValue(int64(b)), intValue(int64(c))
	return m.newArray(elems)
}

// moment is the time that a names, and what stands behind it in the list. Not
// ok: OPA's function must look at it.
func (m *Machine) moment(a Value) (t time.Time, layout Value, ok bool) {
	m.charge(4)
	zone := time.UTC
	if a.kind() == Array {
		elems := a.array().elems
		if len(elems) == 0 {
			return t, layout, false
		}
		if len(elems) > 1 {
			if elems[1].kind() != String {
				return t, layout, false
			}
			if zone = m.zone(elems[1].str()); zone == nil {
				return t, layout, false
			}
		}
		if len(elems) > 2 {
			layout = elems[2]
		}
		a = elems[0]
	}
	if a.kind() != Int {
		return t, layout, false
	}
	return time.Unix(0, a.int()).In(zone), layout, true
}

// zone is the time zone with a name, nil where OPA's function must look for it.
func (m *Machine) zone(name string) *time.Location {
	switch name {
	case "", "UTC":
		return time.UTC
	case "Local":
		return nil
	}
	if z, ok := m.zones.get(name); ok {
		return z
	}
	m.charge(1000) // it is read from a file
	z, err := time.LoadLocation(name)
	if err != nil {
		return nil
	}
	m.zones.put(string([]byte(name)), z)
	return z
}

// timeFormat writes a time as RFC 3339 has it. Other layouts are OPA's.
func timeFormat(m *Machine, a Value) Value {
	t, layout, ok := m.moment(a)
	if !ok || layout.kind() != Undefined {
		return m.callForeign("time.format", a)
	}
	return made(t.AppendFormat(m.takeText(len(time.RFC3339Nano))[:0], time.RFC3339Nano))
}

// What of time is an int64 of nanoseconds.
var firstTime, lastTime = time.Unix(0, -1<<63), time.Unix(0, 1<<63-1)

func parseRFC3339(m *Machine, a Value) Value {
	if a.kind() != String {
		return m.failed()
	}
	m.charge(4 + int(a.n>>4))
	t, err := time.Parse(time.RFC3339, a.str())
	if err != nil || t.Before(firstTime) || t.After(lastTime) {
		return m.failed()
	}
	return intValue(t.UnixNano())
}
