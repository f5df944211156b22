// Command policypeers is the peers' side of policybench: it measures one leg
// (package leg) with an evaluator of somebody else's and prints what it found. It
// is a program of its own so that nothing of ours runs in its process.
//
// OPA is asked in two ways: as its guide shows it, and with the set of options
// that was found to be the fastest. Cedar is asked about policies that come as
// near to ours as its language allows, which leaves out texts, limits and
// redaction: it does less.
package main

import (
	"os"

	"github.com/autonomyops/autonomy/bench/peers/policyleg"
)

var sides = map[string]leg.Open{
	"OPA, json.Unmarshal and EvalInput": openPlain,
	"OPA, best options":                 openBest,
	"cedar-go":                          openCedar,
}

func main() { os.Exit(leg.Main(os.Args[1:], sides)) }
