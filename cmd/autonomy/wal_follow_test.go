package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
	"github.com/autonomyops/autonomy/wal"
)

// Ctrl-C ends what reads a log that is being written: tail, whose end it is, with
// exit code 0, export before its end with 1; and neither in the middle of a line.
func TestWALInterrupted(t *testing.T) {
	dir := t.TempDir() + "/wal"
	l, _, err := wal.Open(dir, wal.Options{SegmentBytes: 1 << 20, MaxBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	put := func(n int) {
		for range n {
			rec := otlp.Record{TimeUnixNano: 1, Severity: otlp.Info, EventType: event.Decision, LogID: l.ID(), Class: "decision",
				AuditID: "a", Decision: "allow", Kind: "tool.echo", Body: []byte(`{"text":"` + strings.Repeat("x", n%400) + `"}`)}
			r, err := l.Reserve(wal.ClassDecision, rec.Size())
			if err != nil {
				t.Fatal(err)
			}
			rec.Put(r.Buf, r.Seq)
			r.Commit()
		}
		if err := l.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	put(5000)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args  []string
		first uint64
		lines int // until Ctrl-C
		code  int
	}{
		{[]string{"tail", "--follow", "-n", "100", "--interval", "10ms"}, 4901, 300, 0},
		{[]string{"export"}, 1, 1, 1},
	} {
		t.Run(tc.args[0], func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), exe, append([]string{"wal", tc.args[0], "--dir", dir}, tc.args[1:]...)...)
			cmd.Args[0] = "autonomy"
			var stderr strings.Builder
			cmd.Stderr = &stderr
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			next, n := tc.first, 0
			for r := bufio.NewReader(stdout); ; n++ {
				line, err := r.ReadString('\n')
				if errors.Is(err, io.EOF) {
					if line != "" {
						t.Errorf("ends with a part of a line: %q", line)
					}
					break
				}
				var rec exported
				if err := errors.Join(err, json.Unmarshal([]byte(line), &rec)); err != nil || rec.Seq != next {
					t.Fatalf("line %d, want record %d: %v: %.80q", n+1, next, err, line)
				}
				next++
				if n+1 == tc.lines {
					if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
						t.Fatal(err)
					}
				}
				if n < tc.lines && n%25 == 0 && tc.lines > 1 {
					put(50) // it is followed while it is written
				}
			}
			err = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != tc.code || n < tc.lines {
				t.Errorf("exit code %d after %d lines, want %d after %d: %v: %s", code, n, tc.code, tc.lines, err, &stderr)
			}
		})
	}
}
