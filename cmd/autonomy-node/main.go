// Command autonomy-node is the agent on a node: it decides, records and runs
// the tool calls of AI agents.
package main

import (
	"os"

	"github.com/autonomyops/autonomy/node"
)

func main() { os.Exit(node.Daemon().Main(os.Args[1:], os.Stdout, os.Stderr)) }
