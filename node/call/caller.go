package call

import (
	"errors"
	"net/http"
	"strconv"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/wal"
)

// Caller is the authenticated principal, as the door established it.
type Caller = auth.Caller

// appendCaller writes input.caller: type and id, and of a Unix socket's peer
// what the kernel said of it.
func appendCaller(b []byte, c *Caller) []byte {
	b = append(b, `{"type":`...)
	b = strictjson.AppendString(b, c.Type)
	b = append(b, `,"id":`...)
	b = strictjson.AppendString(b, c.ID)
	if c.Type == auth.Unix {
		b = append(b, `,"uid":`...)
		b = strconv.AppendUint(b, uint64(c.UID), 10)
		b = append(b, `,"gid":`...)
		b = strconv.AppendUint(b, uint64(c.GID), 10)
		b = append(b, `,"pid":`...)
		b = strconv.AppendInt(b, int64(c.PID), 10)
	}
	return append(b, '}')
}

// admit holds the caller of r to its limits. An answer means that it is over
// one of them; the share must be left when the call has ended.
func (p *Pipeline) admit(r *Request) (*auth.Share, *Answer) {
	if p.o.Limits == nil {
		return nil, nil
	}
	share, err := p.o.Limits.Enter(r.Caller)
	if err == nil {
		return share, nil
	}
	var over *auth.LimitError
	if !errors.As(err, &over) {
		p.o.Logger.Error("call denied: it cannot be counted", "caller", r.Caller.Key(), "err", err)
		a := deny(http.StatusServiceUnavailable, LayerRuntime, "budget_unavailable", "the calls of this caller are counted per day, and the count cannot be written down: denied. See the node's log")
		return nil, &a
	}
	if over.First {
		body := event.LimitedBody{CallerType: r.Caller.Type, CallerID: r.Caller.ID, Limit: over.Limit, Max: over.Max}
		if _, err := p.Note(wal.ClassLifecycle, event.CallerLimited, body); err != nil {
			p.o.Logger.Error("event not recorded", "event_type", event.CallerLimited, "err", err)
		}
	}
	a := deny(http.StatusTooManyRequests, LayerRequest, "limit_"+over.Limit, over.Error())
	a.RetryAfter = over.RetryAfter
	return nil, &a
}
