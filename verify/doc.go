// Package verify decides whether a release may be activated: the ordered gate of
// four steps, and the signed release statement and keyring it starts from.
//
// # The life of a release
//
// The command line builds a Release, signs it (SignRelease) and publishes the
// envelope. A control plane checks it before it stores it (OpenEnvelope). A node
// fetches the envelope and every byte the statement names, then calls Verify:
//
//  1. signature: one signature by a release key of the node's own keyring, the
//     key valid when the statement was made and not revoked; the statement well
//     formed, for this channel, not expired, its sequence above any activated
//     before; the image signed by an artifact key.
//  2. digest: the lock and the policy are, byte for byte, the ones the statement
//     names, and the statement's image is the lock's.
//  3. fingerprint: computed again from the lock, equal to the lock's own and to
//     the statement's.
//  4. compatibility: the bundle is the policy version that was asked for, and
//     this runtime satisfies what release, lock and bundle require.
//
// A step that fails ends the work: later steps are reported as skipped. Evidence
// tells for each step what was checked and what was not.
//
// # What it does not do
//
// No network, no files, no clock of its own, no remote identifier among its
// arguments (INV-06): Verify sees bytes, keys, and numbers the caller keeps. Any
// fault refuses (INV-15). Sigstore bundles are checked by verify/sigstore, which
// is large; this package knows it only as an interface, so that the control
// plane and the relay do not link it.
//
// # Formats
//
// A release is a DSSE v1 envelope, {"payload","payloadType","signatures":
// [{"keyid","sig"}]}, with exactly one signature. The payload is the statement
// of contract.md as JSON, read strictly; SignRelease writes RFC 8785. Signatures
// are Ed25519, or ECDSA P-256 with SHA-256 in ASN.1 DER. A key's id is the
// standard base64 of the SHA-256 of its DER SubjectPublicKeyInfo, as cosign
// writes it. An envelope's keyid is a hint: it selects the key to try first and
// proves nothing.
//
// Rotation needs no second signature: the keyring of the nodes gets the new key
// before the first release it signs, and the windows overlap.
//
// Times are UTC, RFC 3339. Errors of the gate are *Error with a stable Code. All
// functions are safe for concurrent use; a Keyring is not changed after it is
// read. Who may import it: node/release, cp/api, relay, the command line.
package verify
