package main

import (
	"fmt"
	"path/filepath"

	"github.com/autonomyops/autonomy/bench/policybench/leg"
)

// Names of the sides, as the leg programs know them.
const (
	nameOurs    = "autonomy/prepared"
	nameTopdown = "autonomy/prepared, topdown"
	nameSlots   = "autonomy/prepared, in slots"
	namePlain   = "OPA, json.Unmarshal and EvalInput"
	nameBest    = "OPA, best options"
	nameCedar   = "cedar-go"
)

// own are the sides that this program measures itself, in a process per leg.
var own = map[string]leg.Open{nameOurs: openOurs, nameTopdown: openTopdown, nameSlots: openSwapped}

// cases are the policies by name.
var cases = map[string]func() policyCase{"desk": desk, "mail": mail, "large": large}

// A block is one question, put to several sides; ours is the first.
type block struct {
	mode       string
	policy     string
	goroutines int // Eval
	sides      []string
}

func (b block) String() string {
	switch b.mode {
	case leg.Load:
		return "load 1 MiB of policy and 10 MiB of data"
	case leg.Swap:
		return fmt.Sprintf("swap under load, %s policy", b.policy)
	}
	who := "one goroutine"
	if b.goroutines > 1 {
		who = fmt.Sprintf("%d goroutines", b.goroutines)
	}
	return fmt.Sprintf("decision, %s policy, %s", b.policy, who)
}

// swapTimes is how much longer a leg that swaps is measured: half of it is
// without swaps, and a percentile needs more than a mean.
const swapTimes = 6

// spec is the leg of one side.
func (b block) spec(side, work string, o *options) leg.Spec {
	s := leg.Spec{Side: side, Mode: b.mode, Dir: filepath.Join(work, b.policy), Goroutines: b.goroutines, Warmup: o.warmup, Measure: o.measure}
	if b.mode == leg.Swap {
		s.Measure *= swapTimes
	}
	return s
}

func plan() (out []block) {
	for _, policy := range []string{"desk", "mail"} {
		out = append(out,
			block{mode: leg.Eval, policy: policy, goroutines: 1, sides: []string{nameOurs, nameTopdown, namePlain, nameBest, nameCedar}},
			block{mode: leg.Eval, policy: policy, goroutines: 2, sides: []string{nameOurs, nameBest, nameCedar}})
	}
	return append(out,
		block{mode: leg.Load, policy: "large", sides: []string{nameOurs, namePlain}},
		block{mode: leg.Swap, policy: "desk", sides: []string{nameSlots}})
}
