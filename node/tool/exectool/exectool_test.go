package exectool

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/assurance/sandbox"
	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func build(t *testing.T, cfg Config) *Tool {
	t.Helper()
	x, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// script is a tool that runs a fixed shell script.
func script(t *testing.T, text string) *Tool {
	t.Helper()
	return build(t, Config{Argv: []string{"/bin/sh", "-c", strings.NewReplacer("{", "{{", "}", "}}").Replace(text)}, OutputMax: 1024})
}

func execute(t *testing.T, x *Tool, params string, c constraint.Constraints) (executor.Result, output) {
	t.Helper()
	return within(t, 10*time.Second, x, params, c)
}

func within(t *testing.T, limit time.Duration, x *Tool, params string, c constraint.Constraints) (executor.Result, output) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	r := x.Execute(ctx, &executor.Request{Params: []byte(params), Constraints: c})
	var out output
	if r.Output != nil {
		if err := json.Unmarshal(r.Output, &out); err != nil {
			t.Fatalf("output %q: %v", r.Output, err)
		}
	}
	return r, out
}

func TestEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		script  string
		outcome executor.Outcome
		code    string
		exit    int
		stdout  string
		stderr  string
	}{
		"ok":               {"echo out; echo err >&2", executor.OK, "", 0, "out\n", "err\n"},
		"exit 3":           {"echo out; exit 3", executor.Error, CodeExitNonzero, 3, "out\n", ""},
		"killed by itself": {"echo out; kill -TERM $$", executor.Error, CodeSignal, -1, "out\n", ""},
		"no input":         {"cat", executor.OK, "", 0, "", ""},
		"no environment":   {"/usr/bin/env | /bin/grep -v -e ^PWD= -e ^_= -e ^SHLVL= -e ^OLDPWD=; true", executor.OK, "", 0, "", ""},
		"at the root":      {"pwd", executor.OK, "", 0, "/\n", ""},
		"no descriptors":   {"cd /proc/self/fd && for f in *; do [ $f -gt 2 ] && [ $f -lt 10 ] && [ -e $f ] && echo $f; done; true", executor.OK, "", 0, "", ""},
		"own group":        {"read -r pid comm state ppid pgrp rest < /proc/$$/stat; [ $pgrp = $$ ] && echo leader", executor.OK, "", 0, "leader\n", ""},
		"binary":           {`printf '\377\000\376'`, executor.OK, "", 0, "/wD+", ""},
		"invalid UTF-8":    {`printf 'ab\303'`, executor.OK, "", 0, "YWLD", ""},
		"escapes":          {`printf '\033[31m"<'`, executor.OK, "", 0, "\x1b[31m\"<", ""},
	} {
		t.Run(name, func(t *testing.T) {
			r, out := execute(t, script(t, tc.script), "{}", constraint.Constraints{})
			if r.Outcome != tc.outcome || r.Code != tc.code || out.ExitCode != tc.exit || out.Stdout != tc.stdout || out.Stderr != tc.stderr {
				t.Errorf("%s %s %q: %+v\nwant %+v", r.Outcome, r.Code, r.Message, out, tc)
			}
			if (out.StdoutEncoding == executor.Base64) != (name == "binary" || name == "invalid UTF-8") {
				t.Errorf("encoding %q", out.StdoutEncoding)
			}
		})
	}
}

// alive reports whether the process exists and is no zombie.
func alive(t *testing.T, pid int) bool {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	state := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))[0]
	return state != "Z" && state != "X"
}

// gone waits until every pid in the file has ended.
func gone(t *testing.T, file string, want int) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pids := strings.Fields(string(b))
	if len(pids) != want {
		t.Fatalf("pids %q, want %d", pids, want)
	}
	for _, p := range pids {
		pid, err := strconv.Atoi(p)
		if err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(2 * time.Second); alive(t, pid); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				_ = unix.Kill(pid, unix.SIGKILL)
				t.Fatalf("process %d is still there", pid)
			}
		}
	}
}

// TestNoSurvivors stops programs that do not want to end, and looks for what
// they left.
func TestNoSurvivors(t *testing.T) {
	for name, tc := range map[string]struct {
		script string // writes its pids to PIDS
		pids   int
		ends   bool // by itself
	}{
		"sleeps":                   {`echo $$ >PIDS; exec sleep 100`, 1, false},
		"ignores SIGTERM":          {`trap '' TERM INT HUP; echo $$ >PIDS; while :; do sleep 100; done`, 1, false},
		"forks":                    {`sleep 100 & echo $! >PIDS; sleep 100 & echo $! >>PIDS; wait`, 2, false},
		"double fork":              {`(sleep 100 & echo $! >PIDS) ; sleep 100`, 1, false},
		"stopped":                  {`echo $$ >PIDS; kill -STOP $$; sleep 100`, 1, false},
		"leaves a child behind":    {`sleep 100 & echo $! >PIDS`, 1, true},
		"child holds the pipes":    {`sleep 100 & echo $! >PIDS; exec >&- 2>&-`, 1, true},
		"writes for ever":          {`echo $$ >PIDS; exec yes`, 1, false},
		"child that ignores all":   {`(trap '' TERM; exec sleep 100) & echo $! >PIDS; wait`, 1, false},
		"background, then a crash": {`sleep 100 & echo $! >PIDS; kill -SEGV $$`, 1, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pids := filepath.Join(t.TempDir(), "pids")
			x := script(t, strings.ReplaceAll(tc.script, "PIDS", pids))
			start := time.Now()
			r, out := within(t, 300*time.Millisecond, x, "{}", constraint.Constraints{})
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("took %s", took)
			}
			if tc.ends == (r.Outcome == executor.Timeout) {
				t.Errorf("outcome %s %s", r.Outcome, r.Message)
			}
			if len(out.Stdout) > 1024 {
				t.Errorf("%d bytes are kept", len(out.Stdout))
			}
			gone(t, pids, tc.pids)
		})
	}
}

// TestEscapedSession shows what a process group alone cannot do: a process in a
// session of its own lives on. The call still ends. TestSandboxed has the same
// with a sandbox.
func TestEscapedSession(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	x := script(t, `setsid sh -c 'echo $$ >`+pids+`; exec sleep 100' & while [ ! -s `+pids+` ]; do :; done; echo done`)
	start := time.Now()
	r, out := within(t, 5*time.Second, x, "{}", constraint.Constraints{})
	if r.Outcome != executor.OK || out.Stdout != "done\n" {
		t.Errorf("%+v %+v", r, out)
	}
	if took := time.Since(start); took > 4*sandbox.DrainDelay {
		t.Errorf("took %s: the pipe that is held open must not hold the call", took)
	}
	b, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Errorf("the escaped process: %v; if it is stopped now, say so in the package comment", err)
	}
}

func TestCancelIsKilled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	r := script(t, "echo begun; exec sleep 100").Execute(ctx, &executor.Request{Params: []byte("{}")})
	if r.Outcome != executor.Killed || !strings.Contains(string(r.Output), "begun") {
		t.Errorf("%+v %s", r, r.Output)
	}
}

func TestOutputCaps(t *testing.T) {
	x := script(t, `head -c 5000 /dev/zero | tr '\0' a; head -c 5000 /dev/zero | tr '\0' b >&2`)
	r, out := execute(t, x, "{}", constraint.Constraints{})
	if r.Outcome != executor.OK || len(out.Stdout) != 1024 || len(out.Stderr) != 1024 || !out.Truncated {
		t.Errorf("%s: %d, %d, truncated %v", r.Outcome, len(out.Stdout), len(out.Stderr), out.Truncated)
	}
	// A policy's limit is for both together, standard output first.
	_, out = execute(t, x, "{}", constraint.Constraints{OutputMaxBytes: 1000})
	if len(out.Stdout) != 1000 || len(out.Stderr) != 0 || !out.Truncated {
		t.Errorf("narrowed: %d, %d", len(out.Stdout), len(out.Stderr))
	}
	_, out = execute(t, script(t, "printf %s äää"), "{}", constraint.Constraints{OutputMaxBytes: 3})
	if out.Stdout != "ä" || out.StdoutEncoding != "" || !out.Truncated {
		t.Errorf("cut inside a character: %+v", out)
	}
	// The largest configurable output, all of it in need of escapes, still fits.
	big := build(t, Config{Argv: []string{"/bin/sh", "-c", "head -c 400000 /dev/zero; head -c 400000 /dev/zero >&2"}, OutputMax: MaxOutputMax})
	r, out = execute(t, big, "{}", constraint.Constraints{})
	if r.Outcome != executor.OK || len(r.Output) > executor.MaxOutput || !out.Truncated || out.StderrEncoding != executor.Base64 {
		t.Errorf("%s: %d bytes", r.Outcome, len(r.Output))
	}
}

func TestArguments(t *testing.T) {
	show := []string{"/bin/sh", "-c", `for a in "$@"; do printf '[%s]' "$a"; done`, "sh"}
	str := func(s string) *string { return &s }
	cfg := Config{
		Argv: append(show, "{word}", "--n={n}", "{{{word}}}", "{n}", "{flag}", "", "--", "{rest}"),
		Params: map[string]Param{"word": {}, "n": {Type: "integer"}, "flag": {Type: "boolean", Default: str("false")},
			"rest": {Default: str("none")}},
	}
	x := build(t, cfg)
	for name, tc := range map[string]struct {
		params  string
		outcome executor.Outcome
		code    string
		want    string
	}{
		"plain":                 {`{"word":"a","n":-5}`, executor.OK, "", "[a][--n=-5][{a}][-5][false][][--][none]"},
		"one argument, always":  {`{"word":"a b; $(id) *\n'\"","n":1}`, executor.OK, "", "[a b; $(id) *\n'\"][--n=1][{a b; $(id) *\n'\"}][1][false][][--][none]"},
		"an empty value":        {`{"word":"","n":1}`, executor.OK, "", "[][--n=1][{}][1][false][][--][none]"},
		"after the --":          {`{"word":"a","n":1,"rest":"-rf","flag":true}`, executor.OK, "", "[a][--n=1][{a}][1][true][][--][-rf]"},
		"a whole number":        {`{"word":"a","n":2.0}`, executor.OK, "", "[a][--n=2][{a}][2][false][][--][none]"},
		"an option":             {`{"word":"-rf","n":1}`, executor.Denied, CodeArgument, "would read it as an option"},
		"a lone dash":           {`{"word":"-","n":1}`, executor.Denied, CodeArgument, "option"},
		"a NUL":                 {`{"word":"a\u0000b","n":1}`, executor.Error, CodeParams, "NUL"},
		"a fraction":            {`{"word":"a","n":1.5}`, executor.Error, CodeParams, "want an integer"},
		"beyond 53 bits":        {`{"word":"a","n":1e300}`, executor.Error, CodeParams, "want an integer"},
		"a string for a number": {`{"word":"a","n":"1"}`, executor.Error, CodeParams, "want a number"},
		"null":                  {`{"word":null,"n":1}`, executor.Error, CodeParams, "want a string"},
		"null for a number":     {`{"word":"a","n":null}`, executor.Error, CodeParams, "want a number"},
		"missing":               {`{"word":"a"}`, executor.Error, CodeParams, `"n" is missing`},
		"unknown":               {`{"word":"a","n":1,"x":1}`, executor.Error, CodeParams, `unknown param "x"`},
		"duplicate":             {`{"word":"a","word":"b","n":1}`, executor.Error, CodeParams, "duplicate key"},
		"too long":              {`{"word":"` + strings.Repeat("a", 200<<10) + `","n":1}`, executor.Error, CodeParams, "at most 131071"},
	} {
		t.Run(name, func(t *testing.T) {
			r, out := execute(t, x, tc.params, constraint.Constraints{})
			text := r.Message
			if r.Outcome == executor.OK {
				text = out.Stdout
			}
			if r.Outcome != tc.outcome || r.Code != tc.code || (tc.outcome == executor.OK && text != tc.want) || !strings.Contains(text, tc.want) {
				t.Errorf("%s %s %q\nwant %s %s %q", r.Outcome, r.Code, text, tc.outcome, tc.code, tc.want)
			}
		})
	}
	// Two slots side by side: an empty first one must not let the second begin with '-'.
	two := build(t, Config{Argv: append(show, "{a}{b}"), Params: map[string]Param{"a": {}, "b": {}}})
	if r, _ := execute(t, two, `{"a":"","b":"-rf"}`, constraint.Constraints{}); r.Code != CodeArgument {
		t.Errorf("%+v", r)
	}
}

func TestConstraints(t *testing.T) {
	x := build(t, Config{Argv: []string{"/usr/bin/env"}, Env: []string{"A=1", "B=2", "EXECTOOL_TEST"}})
	if _, out := execute(t, x, "{}", constraint.Constraints{}); out.Stdout != "A=1\nB=2\n" {
		t.Errorf("environment %q", out.Stdout)
	}
	t.Setenv("EXECTOOL_TEST", "x")
	x = build(t, Config{Argv: []string{"/usr/bin/env"}, Env: []string{"A=1", "B=2", "EXECTOOL_TEST"}})
	for _, tc := range []struct {
		env  []string
		want string
	}{{nil, "A=1\nB=2\nEXECTOOL_TEST=x\n"}, {[]string{"B", "HOME"}, "B=2\n"}, {[]string{}, ""}} {
		if _, out := execute(t, x, "{}", constraint.Constraints{Env: tc.env}); out.Stdout != tc.want {
			t.Errorf("env %q: %q, want %q", tc.env, out.Stdout, tc.want)
		}
	}
	// What cannot be kept is refused, never ignored.
	marker := filepath.Join(t.TempDir(), "ran")
	x = script(t, "touch "+marker)
	for name, c := range map[string]constraint.Constraints{
		"memory_max": {MemoryMax: 1}, "pids_max": {PidsMax: 1}, "cpu_max": {CPUMax: "1 1"}, "egress": {Egress: []string{}}, "fs": {FS: []string{}},
	} {
		r, _ := execute(t, x, "{}", c)
		if r.Outcome != executor.Denied || r.Code != CodeConstraint || !strings.Contains(r.Message, name) {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if _, err := os.Stat(marker); err == nil {
		t.Error("the program ran")
	}
}

func TestStdin(t *testing.T) {
	x := build(t, Config{Argv: []string{"/usr/bin/wc", "-c"}, Stdin: "text", Params: map[string]Param{"text": {MaxLength: MaxStdin}}})
	if _, out := execute(t, x, `{"text":"`+strings.Repeat("a", 1000000)+`"}`, constraint.Constraints{}); strings.TrimSpace(out.Stdout) != "1000000" {
		t.Errorf("%+v", out)
	}
	x = build(t, Config{Argv: []string{"/bin/true"}, Stdin: "text", Params: map[string]Param{"text": {MaxLength: MaxStdin}}})
	if r, _ := execute(t, x, `{"text":"`+strings.Repeat("a", 1000000)+`"}`, constraint.Constraints{}); r.Outcome != executor.OK {
		t.Errorf("a program that does not read its input: %+v", r)
	}
}

func TestStartFails(t *testing.T) {
	dir := t.TempDir()
	prog := filepath.Join(dir, "prog")
	if err := os.WriteFile(prog, []byte("not a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	x := build(t, Config{Argv: []string{prog, "{secret}"}, Params: map[string]Param{"secret": {}}})
	r, _ := execute(t, x, `{"secret":"hunter2"}`, constraint.Constraints{})
	if r.Outcome != executor.Error || r.Code != CodeStart || strings.Contains(r.Message, "hunter2") {
		t.Errorf("%+v", r)
	}
	if err := os.Remove(prog); err != nil {
		t.Fatal(err)
	}
	if r, _ := execute(t, x, `{"secret":"x"}`, constraint.Constraints{}); r.Code != CodeStart {
		t.Errorf("%+v", r)
	}
	x = build(t, Config{Argv: []string{"/bin/true"}, Dir: filepath.Join(dir, "none")})
	if r, _ := execute(t, x, `{}`, constraint.Constraints{}); r.Code != CodeStart {
		t.Errorf("%+v", r)
	}
}

func TestShell(t *testing.T) {
	x, err := NewShell(Config{})
	if err != nil {
		t.Fatal(err)
	}
	if r, out := execute(t, x, `{"command":"echo a | tr a b; echo $0"}`, constraint.Constraints{}); r.Outcome != executor.OK || !strings.HasPrefix(out.Stdout, "b\n") {
		t.Errorf("%+v %+v", r, out)
	}
}

func FuzzTemplate(f *testing.F) {
	for _, s := range []string{"{a}", "--x={a}", "{{a}}", "{", "}", "{a}{b}", ""} {
		f.Add(s, "v", "-w")
	}
	f.Fuzz(func(t *testing.T, text, a, b string) {
		parts, err := parseElement(text)
		if err != nil {
			return
		}
		x := &Tool{argv: []element{{parts: parts}}, cfg: Config{Params: map[string]Param{}}}
		if len(parts) == 0 {
			return
		}
		argv, _, err := x.expand(map[string]string{"a": a, "b": b})
		if err != nil {
			return
		}
		if parts[0].slot && strings.HasPrefix(argv[0], "-") || strings.ContainsRune(argv[0], 0) {
			t.Fatalf("%q with %q, %q gives %q", text, a, b, argv[0])
		}
	})
}
