package verify

import "fmt"

// Codes of *Error: stable, for programs and events.
const (
	CodeSigMissing         = "sig_missing"          // no signature where one is due
	CodeSigInvalid         = "sig_invalid"          // no trusted key made this signature over these bytes
	CodeKeyExpired         = "key_expired"          // the key's window does not cover created_at
	CodeKeyRevoked         = "key_revoked"          // the key is revoked
	CodeReleaseMalformed   = "release_malformed"    // envelope or statement is not of the format
	CodeNameMismatch       = "name_mismatch"        // a release for another channel or agent
	CodeExpired            = "expired"              // expires_at has passed
	CodeSequenceRollback   = "sequence_rollback"    // sequence is not above the highest activated
	CodeDigestMismatch     = "digest_mismatch"      // bytes are not the ones named
	CodeArtifactMalformed  = "artifact_malformed"   // an OCI manifest is not what is due
	CodeLockMalformed      = "lock_malformed"       // not a lock file
	CodeFingerprint        = "fingerprint_mismatch" // the lock's content is not what was fingerprinted
	CodePolicyIncompatible = "policy_incompatible"  // version or runtime requirement does not hold
	CodeInternal           = "internal"             // a checker panicked: a fault of ours, and a refusal
)

// Error is a refusal.
type Error struct {
	Step   int    // 1 to 4, as Steps names them; 0 outside Verify
	Code   string // one of the Code constants
	Detail string // what was found, what was due, for a person
	Err    error  // the cause, or nil
}

func (e *Error) Error() string { return e.Code + ": " + e.Detail }

func (e *Error) Unwrap() error { return e.Err }

func refuse(code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Detail: err.Error(), Err: err}
}
