package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/bench/internal/results"
)

// flushed is what a node's log has written so far; zero for another server.
type flushed struct{ syncs, records float64 }

// flushes reads a node's metrics. Of another server it reads nothing.
func (s *server) flushes() (f flushed, err error) {
	if !s.node {
		return f, nil
	}
	c, err := net.DialTimeout("tcp", s.addr, 5*time.Second)
	if err != nil {
		return f, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return f, err
	}
	fmt.Fprintf(c, "GET /metrics HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", s.addr)
	in := bufio.NewScanner(io.LimitReader(c, maxBody))
	found := 0
	for in.Scan() {
		name, value, _ := strings.Cut(in.Text(), " ")
		var dst *float64
		switch name {
		case "autonomy_node_wal_syncs_total":
			dst = &f.syncs
		case "autonomy_node_wal_synced_records_total":
			dst = &f.records
		default:
			continue
		}
		if *dst, err = strconv.ParseFloat(value, 64); err != nil {
			return f, fmt.Errorf("metric %s: %w", name, err)
		}
		found++
	}
	if found != 2 {
		return f, fmt.Errorf("the node's metrics name %d of 2 figures of its log: %w", found, in.Err())
	}
	return f, nil
}

// startTimes starts a node on a state directory that it has used before, and
// tells how long it took until it listened: the time from the start of the
// process to the first connection that is accepted.
func startTimes(ctx context.Context, s side, dir string, n int) (listening []float64, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	first, err := s.start(ctx, dir)
	if err != nil {
		return nil, err
	}
	first.terminate()
	for range n {
		for _, name := range []string{"ready", "output"} {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				return nil, err
			}
		}
		begin := time.Now()
		srv, err := s.again(ctx, dir)
		if err != nil {
			return nil, err
		}
		listening = append(listening, float64(time.Since(begin))/float64(time.Millisecond))
		srv.terminate()
	}
	return listening, nil
}

// diskSync is the median of one fdatasync of 4 KiB that were appended before the
// file was made as long, in microseconds: what one record costs at least.
func diskSync(dir string) (float64, error) {
	f, err := os.CreateTemp(dir, "fdatasync")
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	const page, pages = 4096, 200
	block := bytes.Repeat([]byte{1}, page)
	for range pages {
		if _, err := f.Write(block); err != nil {
			return 0, err
		}
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	var took []float64
	for i := range pages {
		block[0] = byte(i)
		begin := time.Now()
		if _, err := f.WriteAt(block, int64(i*page)); err != nil {
			return 0, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return 0, err
		}
		took = append(took, micros(time.Since(begin)))
	}
	return results.Median(took), nil
}
