package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/internal/vfs"
)

// A token is "autn_" + id + "_" + secret: 16 hexadecimal digits that name it,
// and 256 random bits in lower-case base32. The prefix lets secret scanners find
// a token that was left somewhere.
const (
	TokenPrefix = "autn_"
	idDigits    = 16
	secretBytes = 32
)

var secretCode = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// tokenBytes is the length of every token.
var tokenBytes = len(TokenPrefix) + idDigits + 1 + secretCode.EncodedLen(secretBytes)

// Limits of a token file.
const (
	TokenSchema       = "autonomy.tokens/v0"
	MaxTokens         = 4096
	MaxLive           = 2                    // of one principal: the one in use and its successor
	DefaultTokenLife  = 90 * 24 * time.Hour  // of a new token
	MaxTokenLife      = 366 * 24 * time.Hour // the most that can be asked for
	MaxPrincipalBytes = 128
)

var principalPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._@/:-]{0,127}$`)

// ValidPrincipal reports whether name can be a principal's.
func ValidPrincipal(name string) bool { return principalPattern.MatchString(name) }

// TokenFile is the file of --tokens: what the node knows of its tokens. It
// holds no token, only the SHA-256 of each; 256 random bits need no slow hash.
type TokenFile struct {
	Schema string        `json:"schema"`
	Tokens []TokenRecord `json:"tokens"`
}

// TokenRecord is one token.
type TokenRecord struct {
	ID        string     `json:"id"`        // 16 hexadecimal digits
	Principal string     `json:"principal"` // who calls with it
	SHA256    string     `json:"sha256"`    // 64 hexadecimal digits, of the whole token
	CreatedAt time.Time  `json:"created_at"`
	ExpiresAt time.Time  `json:"expires_at"`
	RevokedAt *time.Time `json:"revoked_at,omitempty"`
}

// Live reports whether the token is valid at now.
func (r *TokenRecord) Live(now time.Time) bool { return r.RevokedAt == nil && now.Before(r.ExpiresAt) }

// Errors of a TokenFile.
var (
	ErrTooManyLive = errors.New("the principal has two valid tokens already: revoke one first")
	ErrNoToken     = errors.New("no such token")
)

// ParseTokenFile reads the file strictly.
func ParseTokenFile(data []byte) (*TokenFile, error) {
	var f TokenFile
	if err := strictjson.Unmarshal(data, &f); err != nil {
		return nil, err
	}
	if f.Schema != TokenSchema {
		return nil, fmt.Errorf("schema is %q, want %q", f.Schema, TokenSchema)
	}
	if len(f.Tokens) > MaxTokens {
		return nil, fmt.Errorf("%d tokens, at most %d: remove expired ones", len(f.Tokens), MaxTokens)
	}
	seen := map[string]bool{}
	for i := range f.Tokens {
		r := &f.Tokens[i]
		switch {
		case len(r.ID) != idDigits || !lowerHex(r.ID):
			return nil, fmt.Errorf("token %d: id is %.40q, want %d hexadecimal digits", i, r.ID, idDigits)
		case seen[r.ID]:
			return nil, fmt.Errorf("token %s stands twice", r.ID)
		case len(r.SHA256) != 2*sha256.Size || !lowerHex(r.SHA256):
			return nil, fmt.Errorf("token %s: sha256 wants %d hexadecimal digits", r.ID, 2*sha256.Size)
		case !ValidPrincipal(r.Principal):
			return nil, fmt.Errorf("token %s: principal is %.40q, want letters, digits and . _ @ / : -", r.ID, r.Principal)
		case r.ExpiresAt.IsZero():
			return nil, fmt.Errorf("token %s: expires_at is missing", r.ID)
		}
		seen[r.ID] = true
	}
	return &f, nil
}

func lowerHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

// Create adds a token of principal and returns it. It is nowhere else: what is
// kept is its hash. ErrTooManyLive when there are MaxLive valid ones.
func (f *TokenFile) Create(principal string, now time.Time, life time.Duration) (token string, rec TokenRecord, err error) {
	if !ValidPrincipal(principal) {
		return "", rec, fmt.Errorf("principal %.40q: want letters, digits and . _ @ / : -, at most %d", principal, MaxPrincipalBytes)
	}
	if life <= 0 || life > MaxTokenLife {
		return "", rec, fmt.Errorf("a token's life is %s, want more than 0 and at most %s", life, MaxTokenLife)
	}
	live := 0
	for i := range f.Tokens {
		if f.Tokens[i].Principal == principal && f.Tokens[i].Live(now) {
			live++
		}
	}
	if live >= MaxLive {
		return "", rec, ErrTooManyLive
	}
	if len(f.Tokens) >= MaxTokens {
		return "", rec, fmt.Errorf("the file holds %d tokens, which is its limit: remove expired ones", MaxTokens)
	}
	var random [idDigits/2 + secretBytes]byte
	if _, err := rand.Read(random[:]); err != nil {
		return "", rec, err
	}
	id := hex.EncodeToString(random[:idDigits/2])
	token = TokenPrefix + id + "_" + secretCode.EncodeToString(random[idDigits/2:])
	sum := sha256.Sum256([]byte(token))
	rec = TokenRecord{ID: id, Principal: principal, SHA256: hex.EncodeToString(sum[:]),
		CreatedAt: now.UTC().Truncate(time.Second), ExpiresAt: now.Add(life).UTC().Truncate(time.Second)}
	f.Tokens = append(f.Tokens, rec)
	return token, rec, nil
}

// Revoke ends a token at now. Revoking it again changes nothing. ErrNoToken.
func (f *TokenFile) Revoke(id string, now time.Time) error {
	for i := range f.Tokens {
		if f.Tokens[i].ID != id {
			continue
		}
		if f.Tokens[i].RevokedAt == nil {
			at := now.UTC().Truncate(time.Second)
			f.Tokens[i].RevokedAt = &at
		}
		return nil
	}
	return fmt.Errorf("%w: %s", ErrNoToken, id)
}

// EditTokens reads the token file at path, lets edit change it, and writes it
// back as a whole, mode 0600. A file that does not exist is empty. Two editors
// wait for each other. When edit fails nothing is written.
func EditTokens(path string, edit func(*TokenFile) error) (err error) {
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("token file: %w", err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	f, err := LoadTokens(path)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = &TokenFile{Schema: TokenSchema, Tokens: []TokenRecord{}}, nil
	}
	if err != nil {
		return err
	}
	if err := edit(f); err != nil {
		return err
	}
	data, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	if err := vfs.WriteFile(filepath.Clean(path), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("token file: %w", err)
	}
	return nil
}

// LoadTokens reads the token file at path.
func LoadTokens(path string) (*TokenFile, error) {
	data, err := readFile(path, MaxFileBytes)
	if err != nil {
		return nil, fmt.Errorf("token file: %w", err)
	}
	f, err := ParseTokenFile(data)
	if err != nil {
		return nil, fmt.Errorf("token file %s: %w", path, err)
	}
	return f, nil
}

// tokenSet is a token file as requests read it.
type tokenSet struct{ byID map[string]tokenEntry }

type tokenEntry struct {
	sum    [sha256.Size]byte
	record TokenRecord
}

// readTokens returns an empty set with every error: then no token is valid.
func readTokens(path string) (*tokenSet, error) {
	f, err := LoadTokens(path)
	if err != nil {
		return &tokenSet{}, err
	}
	s := &tokenSet{byID: make(map[string]tokenEntry, len(f.Tokens))}
	for _, r := range f.Tokens {
		e := tokenEntry{record: r}
		if _, err := hex.Decode(e.sum[:], []byte(r.SHA256)); err != nil {
			return &tokenSet{}, err
		}
		s.byID[r.ID] = e
	}
	return s, nil
}

// caller looks a token up by its id, which is no secret, and compares the hash
// of all of it in constant time, with a hash of nothing when the id is unknown.
func (s *tokenSet) caller(token []byte, now time.Time) (Caller, error) {
	if len(token) != tokenBytes || string(token[:len(TokenPrefix)]) != TokenPrefix || token[len(TokenPrefix)+idDigits] != '_' {
		return Caller{}, ErrToken
	}
	sum := sha256.Sum256(token)
	e, known := s.byID[string(token[len(TokenPrefix):len(TokenPrefix)+idDigits])]
	if subtle.ConstantTimeCompare(sum[:], e.sum[:]) != 1 || !known {
		return Caller{}, ErrToken
	}
	switch {
	case e.record.RevokedAt != nil:
		return Caller{}, fmt.Errorf("%w: it is revoked", ErrToken)
	case !now.Before(e.record.ExpiresAt):
		return Caller{}, fmt.Errorf("%w: it expired", ErrToken)
	}
	return Caller{Type: Token, ID: e.record.Principal}, nil
}
