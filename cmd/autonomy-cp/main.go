// Command autonomy-cp is the control plane: it keeps what nodes report and
// hands out the releases they should run.
package main

import (
	"os"

	"github.com/autonomyops/autonomy/cp"
)

func main() { os.Exit(cp.Daemon().Main(os.Args[1:], os.Stdout, os.Stderr)) }
