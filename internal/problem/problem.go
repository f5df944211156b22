// Package problem writes RFC 9457 problem details, the one error shape of the
// control plane and the relay. An error that no handler expected becomes
// "internal" with no detail: what went wrong inside is for the log.
package problem

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

// Problem is one RFC 9457 document. Code is stable and for programs, Detail is
// for the person: what happened, what was expected, what to do.
type Problem struct {
	Type       string        `json:"type"`
	Title      string        `json:"title"`
	Status     int           `json:"status"`
	Code       string        `json:"code"`
	Detail     string        `json:"detail,omitempty"`
	Instance   string        `json:"instance,omitempty"`
	RetryAfter time.Duration `json:"-"` // sent as Retry-After in whole seconds, at least 1; 0: not sent
}

func (p *Problem) Error() string { return p.Code + ": " + p.Detail }

// New makes a Problem whose title is the status text.
func New(status int, code, detail string) *Problem {
	return &Problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Code: code, Detail: detail}
}

// Write sends p.
func Write(w http.ResponseWriter, p *Problem) {
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if p.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64(max(1, (p.RetryAfter+time.Second-1)/time.Second)), 10))
	}
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p) // the peer went away: nobody is left to tell
}
