package httpapi_test

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/node/call"
)

// soak is how long the overload lasts: "make soak-node" gives ten minutes.
var soak = flag.Duration("soak", 0, "run the overload of TestOverloadGoodput this long, and hold it to the full targets")

// offered sends calls from many clients at a steady rate, whatever comes of
// them, for a while, and returns the time that each answered call took and how
// many were shed.
func offered(t *testing.T, client *http.Client, url, body string, clients int, perSecond float64, d time.Duration) (ok []time.Duration, shed int) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	end := time.Now().Add(d)
	pause := time.Duration(float64(clients) / perSecond * float64(time.Second))
	for i := range clients {
		wg.Go(func() {
			for next := time.Now().Add(pause * time.Duration(i) / time.Duration(clients)); next.Before(end); next = next.Add(pause) {
				time.Sleep(time.Until(next))
				begin := time.Now()
				resp, err := client.Post(url, "application/json", strings.NewReader(body))
				if err != nil {
					t.Errorf("a call failed: %v", err)
					return
				}
				out, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				took := time.Since(begin)
				mu.Lock()
				switch {
				case resp.StatusCode == 200 && strings.Contains(string(out), `"outcome":"ok"`):
					ok = append(ok, took)
				case resp.StatusCode == 429 && resp.Header.Get("Retry-After") != "":
					shed++
				default:
					t.Errorf("%d %.300s", resp.StatusCode, out)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return ok, shed
}

func rssBytes(t *testing.T) int64 {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	var kib int64
	_, rest, _ := strings.Cut(string(data), "RssAnon:")
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// liveBytes is the memory that is in use after a collection.
func liveBytes() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestOverloadGoodput: at three times what the node can do it goes on doing what
// it can. Its capacity is the places for calls, each held for the time of a tool
// that waits for a server elsewhere. What is over is shed early; a second
// principal that asks for little is served as if nothing were; memory does not
// grow with the time that it lasts.
//
// Goodput and memory are figures of a node that has the machine to itself: they
// are held to their targets with -soak. Otherwise goodput has a bound that only
// a collapse falls below, in the best of a few rounds that each compare with
// their own peak, and memory is what is live; under the race detector neither is
// judged.
func TestOverloadGoodput(t *testing.T) {
	const places, service = 8, 50 * time.Millisecond
	const capacity = float64(places) / 0.05 // calls per second, and not more
	least, dur, rounds := 0.4, 2*time.Second, 3
	switch {
	case *soak > 0:
		least, dur, rounds = 0.9, *soak, 1
	case raceEnabled:
		dur, rounds = time.Second, 1
	}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(service)
		io.WriteString(w, "done")
	}))
	defer web.Close()
	// The modest principal is served after at most one call of each queue before
	// it; MaxWait is what a call may wait on a machine that is busy elsewhere.
	a := serveGated(t, call.GateOptions{MaxRunning: places, MaxWaiting: 2 * places, MaxWait: 20 * time.Second}, nil)
	a.recycle()
	body := fmt.Sprintf(`{"kind":"tool.http_get","params":{"endpoint":%q}}`, web.URL)
	many := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256}}
	defer many.CloseIdleConnections()
	modest := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", a.socket)
	}}}
	defer modest.CloseIdleConnections()
	url := "http://" + a.addr + "/v1/tool"

	best := 0.0
	for round := 0; round < rounds && best < least; round++ {
		// The peak is found a little above what the places can do: below it the
		// rate is what is offered, and says nothing.
		alone := max(dur/10, time.Second)
		peak, shed := offered(t, many, url, body, 3*places, 1.15*capacity, alone)
		peakRate := float64(len(peak)) / alone.Seconds()
		t.Logf("at capacity: %.0f calls/s of %.0f, %d shed", peakRate, capacity, shed)

		var fair []time.Duration
		var fairShed int
		beside := make(chan struct{})
		rss, live := rssBytes(t), liveBytes()
		go func() {
			defer close(beside)
			fair, fairShed = offered(t, modest, "http://node/v1/tool", body, 1, 5, dur)
		}()
		over, shed := offered(t, many, url, body, 12*places, 3*capacity, dur)
		<-beside
		grown, liveGrown := rssBytes(t)-rss, liveBytes()-live
		if len(over) == 0 || len(fair) == 0 {
			t.Fatalf("of the greedy principal %d calls were answered, of the modest one %d", len(over), len(fair))
		}
		rate := float64(len(over)+len(fair)) / dur.Seconds()
		slices.Sort(over)
		slices.Sort(fair)
		t.Logf("at three times that: %.0f calls/s (%.2f of peak), %d shed, median %v; the modest principal: %d calls, %d shed, median %v; memory %+d KiB, live %+d KiB",
			rate, rate/peakRate, shed, over[len(over)/2], len(fair), fairShed, fair[len(fair)/2], grown>>10, liveGrown>>10)
		if shed == 0 {
			t.Error("nothing was shed at three times the capacity")
		}
		if fairShed > 0 {
			t.Errorf("%d calls of the modest principal were shed: another's load is not its own", fairShed)
		}
		if *soak > 0 && grown > 32<<20 {
			t.Errorf("memory grew by %d bytes under overload", grown)
		}
		if !raceEnabled && liveGrown > 16<<20 {
			t.Errorf("live memory grew by %d bytes under overload", liveGrown)
		}
		best = max(best, rate/peakRate)
	}
	if !raceEnabled && best < least {
		t.Errorf("goodput fell to %.0f%% of the peak under overload, want at least %.0f%%", 100*best, 100*least)
	}
}
