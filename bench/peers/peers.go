// Package peers names, in a module of their own, the programs that the
// benchmarks compare with: what they need must not enter the project's go.mod.
// scripts/bench.sh builds them with `go build` in this folder: OPA itself, and
// walpeers, which measures write-ahead logs. Its package leg is the one of
// bench/walbench, by symbolic links.
package peers
