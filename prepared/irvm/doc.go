// Package irvm evaluates policies that OPA has compiled to its plan (package
// v1/ir): a small machine for values of 24 bytes, some thirty times as fast as
// OPA's interpreter and without allocations once it is warm.
//
// Life of a program:
//
//	query, modules  --Plan----->  *ir.Policy   by OPA's planner
//	plan, data      --Compile-->  *Program     immutable
//	Program         --Machine-->  *Machine     of one evaluation, from a pool
//	input bytes     --Parse---->  Value        strict, in the machine's arena
//	Value           --Eval----->  Value        the answer
//	Machine         --Release-->  (pool)       all its values are gone
//
// # Values
//
// A Value is a view on memory that the machine's arena, the input or the program
// holds. Objects and sets are searched one by one up to eight members and by a
// hash table above that; the hash is seeded, so that an input cannot be chosen
// to make it slow. Numbers are int64 where they are written so, else their text:
// comparison is exact, and arithmetic that leaves int64 is done by OPA's own
// functions on the text. What is equal, and what comes first, is what package
// ast says. Data is converted once, its texts are held once, and it is sorted
// and indexed.
//
// # Lowering
//
// Each statement of the plan becomes a Go closure over registers. Known at load
// and not computed again: what lies under data, literals, and calls of builtins
// whose operands are known as far as they can be prepared (regular expressions,
// networks). Rules without arguments are evaluated once per input.
//
// # What it leaves to the interpreter
//
// Compile refuses a plan with something that it does not know (ErrUnsupported).
// Eval ends with ErrRedo where the interpreter can come to another result or
// must say what is wrong: a builtin that fails, a rule with two values, data
// looked up with a key that is no string. The caller then evaluates the same
// input anew by the interpreter, whose result alone counts: no evaluation is
// half of one and half of the other. An error of a builtin thus never becomes
// "undefined", and the error that is reported is OPA's.
//
// # Budget
//
// Every evaluation is bounded in steps, time and memory; see Limits. Loops,
// calls, comparisons and the work of builtins count as steps; all memory comes
// from the arena and is counted before it is taken. Builtins of OPA's cannot be
// stopped: those that turn short operands into much work or much memory are
// refused beforehand (bounds.go).
//
// # Concurrency
//
// A Program is safe for concurrent use, a Machine belongs to one goroutine.
//
// Only prepared imports this package.
package irvm
