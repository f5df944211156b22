// Command autonomy-node is the agent on a node: it decides, records and runs
// the tool calls of AI agents. "autonomy-node mcp" is its door for MCP clients
// that start their servers as programs.
package main

import (
	"os"

	"github.com/autonomyops/autonomy/node"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "mcp" {
		os.Exit(node.Stdio().Main(os.Args[2:], os.Stdout, os.Stderr))
	}
	os.Exit(node.Daemon().Main(os.Args[1:], os.Stdout, os.Stderr))
}
