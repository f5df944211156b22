// Command autonomy-relay keeps declared content near the nodes and serves it,
// whether the upstream registry can be reached or not.
package main

import (
	"os"

	"github.com/autonomyops/autonomy/relay"
)

func main() { os.Exit(relay.Daemon().Main(os.Args[1:], os.Stdout, os.Stderr)) }
