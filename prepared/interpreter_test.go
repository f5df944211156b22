package prepared

import (
	"errors"
	"strings"
	"sync"
	"testing"
)

// fails has a builtin that fails for some inputs: what to say then is the
// interpreter's.
const fails = `package autonomy

import rego.v2

decision := {"allow": true, "reasons": [sprintf("%d", [to_number(input.params.n)])]}
`

func TestInterpreterIsMadeWhenNeeded(t *testing.T) {
	p := program(t, fails)
	made := false
	inner := p.oracle
	var mu sync.Mutex
	p.oracle = func() (*interpreter, error) {
		mu.Lock()
		made = true
		mu.Unlock()
		return inner()
	}
	d, err := p.Eval(t.Context(), []byte(`{"params":{"n":"7"}}`))
	if err != nil || !d.Allow || made {
		t.Fatalf("%+v, %v, interpreter made %t, want allowed without it", d, err, made)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			d, err := p.Eval(t.Context(), []byte(`{"params":{"n":"seven"}}`))
			if d.Allow || !errors.Is(err, ErrEvaluation) || !strings.Contains(err.Error(), "to_number") {
				t.Errorf("%+v, %v, want OPA's error of to_number", d, err)
			}
		})
	}
	wg.Wait()
	if !made {
		t.Error("the interpreter was not asked")
	}
}

// TestInterpreterCannotBeMade: the calls that need it are denied.
func TestInterpreterCannotBeMade(t *testing.T) {
	p := program(t, fails)
	p.bundle.Raw = []byte("overwritten")
	for range 2 {
		d, err := p.Eval(t.Context(), []byte(`{"params":{"n":"seven"}}`))
		if d.Allow || !errors.Is(err, ErrEvaluation) || !strings.Contains(err.Error(), "make the interpreter ready") {
			t.Errorf("%+v, %v, want a denial that says what failed", d, err)
		}
	}
	if d, err := p.Eval(t.Context(), []byte(`{"params":{"n":"7"}}`)); err != nil || !d.Allow {
		t.Errorf("%+v, %v, want allowed", d, err)
	}
}
