// Package prepared holds policy: it reads a bundle, compiles it, evaluates one
// tool call against it, and keeps the bundle that is in force on disk.
//
// Life of a policy:
//
//	directory of .rego and data  --BuildBundle-->  bundle bytes (tar.gz)
//	bundle bytes   --ReadBundle-->  *Bundle   checked archive, manifest, parsed
//	*Bundle        --Compile----->  *Program  ready to evaluate
//	*Program       --Probe------->  refused, when leaving out a field turns a deny into an allow
//	*Program       --Slots.Stage-->     candidate: evaluated beside the one in force, answers nobody
//	*Program       --Slots.Activate-->  in force, on disk as active, former as lkg
//	*Program       --Eval------->  Decision    compiled engine, or OPA's interpreter
//	*Program, recorded input  --Explain-->  which rules, lines and values made it
//
// What is refused is refused early: an archive that two readers could read in
// two ways does not become a Bundle, and a bundle whose decision could depend
// on anything but its bytes and the input does not become a Program.
//
// # Rego
//
// Modules are Rego v1. A module that negates (`not`) must `import rego.v2`
// (OPA 1.21 and later), or the manifest must say rego_version 2. Without it
// OPA evaluates the operands of a negation before the negation: in
//
//	deny if not startswith(input.params.path, "/srv/")
//
// a call without params.path makes the whole body undefined, so nothing is
// denied. With rego.v2 semantics the body of the negation is what is undefined,
// so the negation holds and the call is denied. Modules without a negation
// behave the same either way and need no import.
//
// # Fail closed
//
// Eval returns the zero Decision, which denies, with every error. An error
// wraps one of ErrUndefined, ErrEvaluation, ErrResult and ErrBudget. Nothing
// becomes an allow that the policy did not say in full: an unknown field in its
// answer, a limit of zero, or a reason of the wrong type denies the call.
//
// # Engines
//
// A program is evaluated by prepared/irvm, a machine for OPA's own plan of the
// policy ("compiled"). What has no plan there is evaluated by OPA's interpreter
// ("topdown"); Engine says which and why. The compiled engine gives up an
// evaluation that it might not do exactly as the interpreter, and it is then
// done again, as a whole, by the interpreter; so is each with an error. With
// Options.SelfCheck a share of all evaluations is done by both. docs/adr has
// the reasons.
//
// OPA's compiler and syntax trees are several times as large as the compiled
// engine. A compiled program without SelfCheck keeps none of them: the first
// evaluation that needs the interpreter makes it, from the bundle's bytes, which
// takes as long as loading did, and those that need it too wait. If that fails
// they are denied.
//
// An evaluation is bounded in input bytes (MaxInputBytes), steps, time and
// memory (EvalLimits; the interpreter in time only). Past a bound it ends with
// ErrBudget, which denies.
//
// # Replay
//
// A decision is a function of bundle and input (INV-17). Builtins that look at
// anything else are absent: see RefusedBuiltins. time.now_ns gives the time_ns
// of the input.
//
// # Concurrency
//
// Bundle and Program are immutable and safe for concurrent use. Slots.Current
// is one atomic load and never blocks; what changes the slots excludes each other.
// A caller that asks what Current gave it gets its answer from exactly that
// version, however often the slots are swapped meanwhile.
//
// # Units
//
// Sizes are bytes. Digests are "sha256:" and 64 hex digits over the bundle
// file's own bytes.
//
// Only node (for enforcement) and cmd/autonomy (build, test, replay, explain)
// may import this package (INV-19).
package prepared
