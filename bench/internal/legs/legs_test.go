package legs

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestRun(t *testing.T) {
	type result struct{ A int }
	sh := func(script string) []string { return []string{"/bin/sh", "-c", script, "leg"} }
	for _, c := range []struct {
		script string
		want   int
		err    string
	}{
		{`printf '%s' "$1"`, 7, ""},
		{`echo no disk >&2; exit 3`, 0, "no disk"},
		{`echo '{"A":1,"B":2}'`, 0, "build it anew"},
		{`echo`, 0, "build it anew"},
		{`exec sleep 60`, 0, "deadline"},
	} {
		limit := time.Minute
		if c.err == "deadline" {
			limit = 50 * time.Millisecond
		}
		got, err := Run[result](t.Context(), sh(c.script), result{A: 7}, limit)
		if c.err == "" && (err != nil || got.A != c.want) {
			t.Errorf("%s: %+v, %v", c.script, got, err)
		}
		if c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: error %v, want %q in it", c.script, err, c.err)
		}
	}
}

func TestOrder(t *testing.T) {
	sides := []string{"a", "b", "c"}
	if got := Order(sides, 0); !slices.Equal(got, sides) {
		t.Errorf("first: %v", got)
	}
	if got := Order(sides, 1); !slices.Equal(got, []string{"c", "b", "a"}) || sides[0] != "a" {
		t.Errorf("second: %v of %v", got, sides)
	}
}
