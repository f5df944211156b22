// Package archtest holds the rules about what may import, call and mention
// what. They are tests: `go test ./internal/archtest` says which line breaks
// which rule and why the rule is there.
//
// The tree is read in process with go/parser, every file whatever its build
// tags, so that the test cache knows the files and a rule holds on arm64, too.
// Only what a program links is asked of `go list`, whose reads the cache does
// not see: `make check` therefore runs this package with -count=1.
//
// A rule has a name, the invariant it guards (INV-nn, see docs/invariants.md)
// and a reason. Each has a fixture, testdata/NAME.txtar: a small tree that
// breaks the rule and, beside it, what the rule must let pass. Its head lists
// the faults that must be found, no more and no fewer. A rule without a fixture
// fails, because a rule that cannot fail guards nothing.
//
// Tests (_test.go) and testdata are exempt from the rules about imports and
// symbols: they may take a program apart in ways its parts may not.
//
// Relaxing a rule that names an invariant needs a decision in docs/adr.
package archtest
