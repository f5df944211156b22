package auth

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/autonomyops/autonomy/internal/strictjson"
	"github.com/autonomyops/autonomy/internal/vfs"
)

// ErrDamaged is returned by NewLimits for a budget file that cannot be read.
var ErrDamaged = errors.New("the budget file is damaged")

// budget keeps the daily counts across restarts.
//
// Calls are counted in memory. The file says, per caller, up to which count it
// may go without asking again; it is written, durably, before the count goes
// beyond that. After a crash counting goes on from what the file says, so at
// most one step is lost to the caller, and none is won by it. A step is a
// hundredth of the budget, so a day costs a caller about a hundred writes.
type budget struct {
	path string

	mu   sync.Mutex
	day  string           // UTC date of granted: never goes back
	upTo map[string]int64 // caller → count that is on disk
}

// dayCount is a caller's count, guarded by mu. It is a lock of one caller.
type dayCount struct {
	mu   sync.Mutex
	day  string
	n    int64 // calls of the day
	upTo int64 // as on disk
}

// used reports whether calls were counted on the day of now.
func (d *dayCount) used(now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.n > 0 && d.day >= now.UTC().Format(time.DateOnly)
}

// budgetFile is the file's form.
type budgetFile struct {
	Day  string           `json:"day"`
	UpTo map[string]int64 `json:"up_to"`
}

const budgetSteps = 100 // per budget and day

func openBudget(path string) (*budget, error) {
	b := &budget{path: path, upTo: map[string]int64{}}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return b, nil
	}
	if err != nil {
		return nil, fmt.Errorf("caller budgets: %w", err)
	}
	var f budgetFile
	if err := strictjson.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("%w: %s: %w: restore it, or remove it to begin today's budgets anew", ErrDamaged, path, err)
	}
	if _, err := time.Parse(time.DateOnly, f.Day); err != nil {
		return nil, fmt.Errorf("%w: %s: day is %q: restore it, or remove it to begin today's budgets anew", ErrDamaged, path, f.Day)
	}
	b.day = f.Day
	if f.UpTo != nil {
		b.upTo = f.UpTo
	}
	return b, nil
}

// spend counts one call of s. false: the day's budget is used up.
func (b *budget) spend(s *Share, perDay int64, now time.Time) (bool, error) {
	d := &s.day
	d.mu.Lock()
	defer d.mu.Unlock()
	if today := now.UTC().Format(time.DateOnly); today > d.day {
		d.day, d.n, d.upTo = b.begin(s.key, today)
	}
	if d.n >= perDay {
		return false, nil
	}
	if d.n >= d.upTo {
		upTo := min(d.n+max(1, perDay/budgetSteps), perDay)
		if err := b.grant(s.key, d.day, upTo); err != nil {
			return false, err
		}
		d.upTo = upTo
	}
	d.n++
	return true, nil
}

// begin is where a caller's count of a day starts. A clock that went back does
// not give a day twice.
func (b *budget) begin(key, today string) (day string, n, upTo int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if today > b.day {
		b.day, b.upTo = today, map[string]int64{}
	}
	return b.day, b.upTo[key], b.upTo[key]
}

// grant writes down that key may count up to n.
func (b *budget) grant(key, day string, n int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if day != b.day {
		return nil // another caller has begun the next day; this call was still of the last one
	}
	was, had := b.upTo[key]
	b.upTo[key] = n
	data, err := json.Marshal(budgetFile{b.day, b.upTo})
	if err == nil {
		err = vfs.WriteFile(b.path, append(data, '\n'), 0o600)
	}
	if err != nil {
		if b.upTo[key] = was; !had {
			delete(b.upTo, key)
		}
	}
	return err
}
