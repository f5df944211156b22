package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/autonomyops/autonomy/bench/internal/results"
)

// A leg is what one side did in one repetition at one number of connections.
type leg struct {
	rate     float64 // calls per second
	p50, p99 float64 // microseconds
	cpu      float64 // microseconds of the server's CPU per call
	rss      float64 // MiB of the server's own memory at the end, its mapped files left out
	calls    int

	// Of a node only: how its log was flushed meanwhile.
	flushes float64 // per second
	records float64 // per flush
}

// load sends the same request over conns keep-alive connections, one at a time
// on each, for warmup and then for duration. Every answer must have the status
// and hold expect: a server that refuses is fast and measures nothing.
func load(ctx context.Context, srv *server, request []byte, status, expect string, conns int, warmup, duration time.Duration) (leg, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	clients := make([]*client, conns)
	for i := range clients {
		c, err := net.DialTimeout("tcp", srv.addr, 5*time.Second)
		if err != nil {
			return leg{}, err
		}
		defer c.Close()
		clients[i] = &client{conn: c, in: bufio.NewReaderSize(c, 16<<10), request: request, status: []byte("HTTP/1.1 " + status), expect: []byte(expect)}
	}
	// A server that hangs must not hang the benchmark.
	deadline := time.Now().Add(warmup + duration + 10*time.Second)
	round := func(d time.Duration, keep bool) error {
		var wg sync.WaitGroup
		until := time.Now().Add(d)
		for _, c := range clients {
			wg.Go(func() {
				if err := c.run(ctx, until, deadline, keep); err != nil {
					cancel(err)
				}
			})
		}
		wg.Wait()
		return context.Cause(ctx)
	}
	if err := round(warmup, false); err != nil {
		return leg{}, err
	}
	before, err := cpuTime(srv.pid)
	if err != nil {
		return leg{}, err
	}
	flushed, err := srv.flushes()
	if err != nil {
		return leg{}, err
	}
	begin := time.Now()
	if err := round(duration, true); err != nil {
		return leg{}, err
	}
	took := time.Since(begin)
	after, err := cpuTime(srv.pid)
	if err != nil {
		return leg{}, err
	}
	rss, err := ownMemory(srv.pid)
	if err != nil {
		return leg{}, err
	}
	now, err := srv.flushes()
	if err != nil {
		return leg{}, err
	}
	var all []time.Duration
	for _, c := range clients {
		all = append(all, c.latency...)
	}
	if len(all) == 0 {
		return leg{}, errors.New("no call was answered")
	}
	slices.Sort(all)
	syncs := now.syncs - flushed.syncs
	return leg{
		rss: float64(rss) / (1 << 20), flushes: syncs / took.Seconds(), records: (now.records - flushed.records) / max(1, syncs),
		rate:  float64(len(all)) / took.Seconds(),
		p50:   micros(results.Percentile(all, 50)),
		p99:   micros(results.Percentile(all, 99)),
		cpu:   micros(after-before) / float64(len(all)),
		calls: len(all),
	}, nil
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// A client is one connection. It speaks just enough HTTP/1.1 to read the answers
// of the servers here: a general client would use more CPU than they do.
type client struct {
	conn    net.Conn
	in      *bufio.Reader
	request []byte
	status  []byte
	expect  []byte
	body    []byte
	latency []time.Duration
}

func (c *client) run(ctx context.Context, until, deadline time.Time, keep bool) error {
	if err := c.conn.SetDeadline(deadline); err != nil {
		return err
	}
	for begin := time.Now(); begin.Before(until) && ctx.Err() == nil; {
		if _, err := c.conn.Write(c.request); err != nil {
			return err
		}
		if err := c.answer(); err != nil {
			return err
		}
		end := time.Now()
		if keep {
			c.latency = append(c.latency, end.Sub(begin))
		}
		begin = end
	}
	return nil
}

// maxBody bounds an answer.
const maxBody = 1 << 20

// answer reads one response and checks it.
func (c *client) answer() error {
	status, err := c.in.ReadSlice('\n')
	if err != nil {
		return fmt.Errorf("read the status line: %w", err)
	}
	ok := bytes.HasPrefix(status, c.status)
	line := string(bytes.TrimSpace(status[:min(len(status), 64)]))
	length := -1
	for {
		h, err := c.in.ReadSlice('\n')
		if err != nil {
			return fmt.Errorf("read the headers: %w", err)
		}
		h = bytes.TrimRight(h, "\r\n")
		if len(h) == 0 {
			break
		}
		name, value, _ := bytes.Cut(h, []byte(":"))
		if !bytes.EqualFold(name, []byte("Content-Length")) {
			continue
		}
		if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil || length < 0 || length > maxBody {
			return fmt.Errorf("Content-Length %q", value)
		}
	}
	if length < 0 {
		return fmt.Errorf("%s without Content-Length", line)
	}
	c.body = slices.Grow(c.body[:0], length)[:length]
	if _, err := io.ReadFull(c.in, c.body); err != nil {
		return fmt.Errorf("read the body: %w", err)
	}
	if !ok || !bytes.Contains(c.body, c.expect) {
		return fmt.Errorf("unexpected answer: %s\n%.500s", line, c.body)
	}
	return nil
}

// ownMemory is the resident memory of a process without mapped files, in bytes:
// the node's log is one, and its pages are the page cache's.
func ownMemory(pid int) (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/%d/status: %w", pid, err)
			}
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no RssAnon", pid)
}

// clockTick is the unit of /proc/PID/stat: USER_HZ is 100 on every architecture
// that Go runs on under Linux.
const clockTick = 10 * time.Millisecond

// cpuTime is the CPU time a process has used, in user and kernel mode.
func cpuTime(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The command stands in parentheses and may hold anything, so fields are
	// counted from the last one: state is the first after it.
	_, rest, _ := strings.Cut(string(data[max(bytes.LastIndexByte(data, ')'), 0):]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	kernel, err2 := strconv.ParseInt(fields[12], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return time.Duration(user+kernel) * clockTick, nil
}
