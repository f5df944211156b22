// Package fingerprint holds the lock file of an agent, autonomy.lock/v0, and
// computes its behavioural fingerprint.
//
// A lock lists everything that shapes what an agent does and that its authors
// declare: the image, the tools with their definitions, the prompts, the
// models, the policy, the runtime it needs. It proves that these declared
// inputs are the ones that were reviewed. It does not prove that a hosted model
// behaves as it did: the provider may change it behind the same name.
//
// # Bytes
//
// A lock file is RFC 8785 canonical JSON, nothing before or after it. There is
// one encoding for one content, so equal locks have equal sha256 digests and
// equal fingerprints. Values are strings, arrays and objects only: no numbers
// (a decimal is written as a string), no booleans, no nulls. Arrays have the
// meaning of sets: sorted bytewise by their key (tools by kind, prompts by name,
// models by provider then id, capabilities by themselves), no key twice. Every
// key of contract.md (Lock file v0) is present, also when its array is empty.
//
// # Hashes
//
// The fingerprint is "blake3:" and 64 hex digits: BLAKE3-256, plain hash mode,
// over the canonical bytes of the lock without its fingerprint key. Anyone can
// check it without this package: remove the key, canonicalize, b3sum.
//
// Beside it there is one hash for each section (agent, tools, prompts, models,
// policy, capabilities, runtime, inputs), so that two locks can be told apart
// by section without showing their content. A section hash is BLAKE3 in
// derive-key mode with the context
//
//	github.com/autonomyops/autonomy lock/v0 section NAME
//
// over the canonical bytes of that section's value. The derive-key context
// keeps a section hash from ever being mistaken for a fingerprint or for the
// hash of another section. Section hashes are not stored in the lock: the
// fingerprint alone says that something moved, and a second lock, or section
// hashes kept from one, say what. testdata/golden holds vectors.
//
// Digests of files and of OCI content are "sha256:" and 64 hex digits. The two
// families never mix.
//
// Nothing here reads files or the network. All functions are safe for
// concurrent use. Who may import it: verify, node, the command line.
package fingerprint
