// Package peers names, in a module of their own, the programs that the
// benchmarks compare with: what they need must not enter the project's go.mod.
// scripts/bench.sh builds them with `go build` in this folder: OPA itself,
// walpeers, which measures write-ahead logs, and policypeers, which measures
// policy evaluators. Their packages leg and policyleg are those of bench/walbench
// and bench/policybench, by symbolic links.
package peers
