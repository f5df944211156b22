package prestage

import (
	"cmp"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/relay/oci"
	"github.com/autonomyops/autonomy/verify"
)

// Names in a list and around it.
const (
	ListSchema  = "autonomy.prestage/v0"
	PayloadType = "application/vnd.autonomyops.prestage.v0+json"
)

// Limits of what is accepted.
const (
	MaxBodyBytes   = 4 << 20   // of a submission, envelope included
	MaxItems       = 4096      // of one list
	MaxLists       = 256       // held at once
	MaxAllItems    = 16384     // of all lists
	MaxPriority    = 1000      // priorities run from 0 to this
	MaxSequence    = 1<<53 - 1 // the largest integer every JSON reader keeps
	maxIDLength    = 64
	maxKeyringSize = verify.MaxKeyringBytes
)

// List names what a relay must hold. Within one ID a list with a higher
// Sequence replaces the one before it: that, and only that, takes content away.
type List struct {
	Schema   string `json:"schema"`
	ID       string `json:"id"`
	Sequence uint64 `json:"sequence"` // 1 and up
	Items    []Item `json:"items"`
}

// Item is a manifest or an index, with all that hangs on it, in one repository.
type Item struct {
	Repository string     `json:"repository"`
	Digest     oci.Digest `json:"digest"`
	Priority   int        `json:"priority"` // 0 to 1000; the lower number is staged first
}

// key identifies staged content: the same manifest in two repositories is two.
type key struct {
	repo   string
	digest oci.Digest
}

// order is the staging order: priority, digest, repository. Nothing else counts.
func order(a, b Item) int {
	return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Digest, b.Digest), cmp.Compare(a.Repository, b.Repository))
}

// ErrList is wrapped by errors about a list's form.
var ErrList = errors.New("malformed prestage list")

// ParseList reads a list strictly and puts its items in staging order.
func ParseList(data []byte) (*List, error) {
	var l List
	if err := strictjson.Unmarshal(data, &l); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrList, err)
	}
	if err := l.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrList, err)
	}
	slices.SortFunc(l.Items, order)
	return &l, nil
}

func (l *List) check() error {
	switch {
	case l.Schema != ListSchema:
		return fmt.Errorf("schema is %.80q, want %q", l.Schema, ListSchema)
	case !ValidID(l.ID):
		return fmt.Errorf("id is %.80q, want 1 to %d of a-z, 0-9, '.', '_' and '-', first a letter or digit", l.ID, maxIDLength)
	case l.Sequence < 1 || l.Sequence > MaxSequence:
		return fmt.Errorf("sequence is %d, want 1 to %d", l.Sequence, uint64(MaxSequence))
	case l.Items == nil:
		return errors.New("items is missing; write [] to hold nothing")
	case len(l.Items) > MaxItems:
		return fmt.Errorf("%d items, the limit is %d", len(l.Items), MaxItems)
	}
	seen := make(map[key]int, len(l.Items))
	for i, it := range l.Items {
		if _, err := oci.ParseName(it.Repository); err != nil {
			return fmt.Errorf("items[%d]: %w", i, err)
		}
		if _, err := oci.ParseDigest(string(it.Digest)); err != nil {
			return fmt.Errorf("items[%d]: %w", i, err)
		}
		if it.Priority < 0 || it.Priority > MaxPriority {
			return fmt.Errorf("items[%d]: priority is %d, want 0 to %d", i, it.Priority, MaxPriority)
		}
		k := key{it.Repository, it.Digest}
		if j, ok := seen[k]; ok {
			return fmt.Errorf("items[%d]: the same as items[%d]", i, j)
		}
		seen[k] = i
	}
	return nil
}

// ValidID reports whether s can be a list's id. It is a file name in the state
// directory, so it holds no separator and does not start with a dot.
func ValidID(s string) bool {
	if s == "" || len(s) > maxIDLength {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && (i == 0 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return true
}

// Seal checks l and returns its DSSE envelope, signed by s.
func Seal(l *List, s crypto.Signer) ([]byte, error) {
	data, err := l.Marshal()
	if err != nil {
		return nil, err
	}
	return verify.Seal(PayloadType, data, s)
}

// Marshal checks l and writes it as JSON that ParseList accepts.
func (l *List) Marshal() ([]byte, error) {
	if err := l.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrList, err)
	}
	data, err := json.Marshal(l)
	if err != nil {
		return nil, fmt.Errorf("write prestage list: %w", err)
	}
	return data, nil
}

// Refusal says why a submission is not accepted.
type Refusal struct {
	Code   string // one of the Code constants
	Detail string
	Err    error // cause, or nil
}

func (r *Refusal) Error() string { return r.Code + ": " + r.Detail }
func (r *Refusal) Unwrap() error { return r.Err }

// Codes of a Refusal.
const (
	CodeUnsigned         = "prestage_unsigned"  // no keyring, and unsigned lists are not allowed
	CodeKeyring          = "keyring_unreadable" // fail closed
	CodeMalformed        = "prestage_malformed"
	CodeTooLarge         = "too_large"
	CodeTooMany          = "too_many"
	CodeSigMissing       = verify.CodeSigMissing
	CodeSigInvalid       = verify.CodeSigInvalid
	CodeSequenceRollback = verify.CodeSequenceRollback
)

func refuse(code, format string, args ...any) *Refusal {
	err := fmt.Errorf(format, args...)
	return &Refusal{Code: code, Detail: err.Error(), Err: err}
}

// openEnvelope checks a DSSE envelope against the keyring and returns its
// payload and the id of the key that signed it. The payload is not read before
// the signature holds. A list has no date of its own, so the key's window is
// compared with now, the moment of submission. Keys with usage "release" may
// sign: who may say what nodes run may say what a relay keeps for them.
func openEnvelope(data []byte, kr *verify.Keyring, now time.Time) (payload []byte, keyID string, err error) {
	payload, key, err := verify.Unseal(data, PayloadType, verify.UsageRelease, kr, MaxBodyBytes)
	if err == nil {
		err = key.ValidAt(now)
	}
	var fault *verify.Error
	switch {
	case err == nil:
		return payload, key.ID, nil
	case errors.As(err, &fault) && fault.Code == verify.CodeReleaseMalformed:
		return nil, "", refuse(CodeMalformed, "%s", fault.Detail)
	case errors.As(err, &fault):
		return nil, "", refuse(fault.Code, "%s", fault.Detail)
	}
	return nil, "", refuse(CodeSigInvalid, "%w", err)
}
