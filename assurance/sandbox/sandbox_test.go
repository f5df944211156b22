package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/testutil"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == escapeArg {
		escapeChild(os.Args[2:])
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if selfPath != "" {
			_ = os.RemoveAll(filepath.Dir(selfPath))
		}
		os.Exit(code)
	}))
}

// open is a sandbox of the test's own, without some layers.
func open(t testing.TB, off ...string) *Sandbox {
	t.Helper()
	return openWith(t, Options{Off: off})
}

func openWith(t testing.TB, o Options) *Sandbox {
	t.Helper()
	if os.Geteuid() != 0 {
		testutil.Missing(t, "root, for cgroups and eBPF", "run as root")
	}
	if o.RunDir == "" {
		o.RunDir = t.TempDir()
	}
	s, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, l := range s.Layers() {
		if !l.On && l.Name != LayerLimits && l.Detail != "switched off" { // controllers may be bound to v1 hierarchies
			testutil.Missing(t, "sandbox layer "+l.Name, l.Detail)
		}
	}
	return s
}

// run starts c and returns its end and output, both streams together.
func run(t testing.TB, s *Sandbox, c *Command) (Ended, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p, err := s.Start(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	e := p.Wait(ctx, func(b []byte) { out.Write(b) }, func(b []byte) { errs.Write(b) })
	if e.Left != nil {
		t.Errorf("something is left: %v", e.Left)
	}
	return e, out.String() + errs.String()
}

func sh(script string) *Command { return &Command{Argv: []string{"/bin/sh", "-c", script}} }

func TestRuns(t *testing.T) {
	s := open(t)
	real := elsewhere(t)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(real, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cmd    *Command
		status unix.WaitStatus
		want   string
	}{
		"output":        {sh("echo out; echo err >&2"), 0, "out\nerr\n"},
		"exit code":     {sh("exit 7"), 7 << 8, ""},
		"stdin":         {&Command{Argv: []string{"/usr/bin/wc", "-c"}, Stdin: bytes.Repeat([]byte("x"), 1<<20)}, 0, "1048576\n"},
		"no stdin":      {sh("wc -c"), 0, "0\n"},
		"environment":   {&Command{Argv: []string{"/usr/bin/env"}, Env: []string{"A=1"}}, 0, "A=1\n"},
		"secret":        {&Command{Argv: []string{"/bin/sh", "-c", `cat "$KEY"; cat "$KEY"; env | grep -c hunter2; cat /proc/self/cmdline | grep -c hunter2`}, Secrets: []Secret{{"KEY", []byte("hunter2")}}}, 1 << 8, "hunter2hunter20\n0\n"},
		"own /tmp":      {sh("ls -A /tmp; echo a >/tmp/a && cat /tmp/a; ls -ld /tmp | cut -c1-10"), 0, "a\ndrwxrwxrwt\n"},
		"first process": {sh("echo $$; hostname"), 0, "1\nsandbox\n"},
		"devices":       {sh("echo x >/dev/null && head -c 3 /dev/zero | wc -c && head -c 5 /dev/urandom | wc -c"), 0, "3\n5\n"},
		"no caps":       {sh("grep -h -e Cap[PE] -e NoNew -e ^Seccomp: /proc/self/status | tr -d '\t'"), 0, "CapPrm:0000000000000000\nCapEff:0000000000000000\nNoNewPrivs:1\nSeccomp:2\n"},
		"as root":       {&Command{Argv: []string{"/bin/sh", "-c", "id -u; grep -h Cap[PEB] /proc/self/status | tr -d '\t'; cat /proc/1/environ | wc -c"}, User: &User{0, 0}}, 0, "0\nCapPrm:0000000000000000\nCapEff:0000000000000000\nCapBnd:0000000000000000\n0\n"},
		"linked dir":    {&Command{Argv: []string{"/bin/pwd", "-P"}, Dir: link}, 0, real + "\n"},
		"directory":     {&Command{Argv: []string{"/bin/pwd"}, Dir: "/usr/share"}, 0, "/usr/share\n"},
		"descriptors":   {sh("ls /proc/self/fd | tr '\\n' ' '"), 0, "0 1 2 3 "}, // 3 is the directory that ls reads
		"killed":        {sh("exec 2>/dev/null; sh -c 'kill -9 $$'; echo $?"), 0, "137\n"},
	} {
		t.Run(name, func(t *testing.T) {
			e, out := run(t, s, tc.cmd)
			if e.Status != tc.status || out != tc.want {
				t.Errorf("status %#x, output %q; want %#x, %q", e.Status, out, tc.status, tc.want)
			}
			if e.Usage.CPU <= 0 || e.Usage.MaxRSS <= 0 {
				t.Errorf("usage %+v", e.Usage)
			}
		})
	}
}

// TestPaths shows paths inside and outside of /tmp, and hides the node's.
func TestPaths(t *testing.T) {
	for name, base := range map[string]string{"in /tmp": t.TempDir(), "elsewhere": elsewhere(t)} {
		t.Run(name, func(t *testing.T) {
			for _, d := range []string{"ro", "rw", "other", "ro/state", "ro/sub"} {
				if err := os.Mkdir(filepath.Join(base, d), 0o777); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(filepath.Join(base, d), 0o777); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(base, d, "file"), []byte(d+"\n"), 0o666); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Chmod(base, 0o755); err != nil {
				t.Fatal(err)
			}
			s := openWith(t, Options{Hidden: []string{base + "/ro/state", base + "/ro/sub/file"}})
			c := sh(strings.ReplaceAll(`cat D/ro/file D/rw/file
echo x 2>/dev/null >D/ro/new || echo ro is read-only
echo new >D/rw/new && cat D/rw/new
ls D
cat D/other/file 2>/dev/null || echo other is not there
cat D/ro/state/file 2>/dev/null || echo state is hidden
cat D/ro/sub/file
cp /bin/true D/rw/true && chmod 755 D/rw/true && D/rw/true 2>/dev/null || echo no new programs`, "D", base))
			c.FS = []Path{{base + "/ro", false}, {base + "/rw", true}}
			e, out := run(t, s, c)
			want := "ro\nrw\nro is read-only\nnew\nro\nrw\nother is not there\nstate is hidden\nno new programs\n"
			if e.Status != 0 || out != want {
				t.Errorf("%#x %q\nwant %q", e.Status, out, want)
			}
			if b, err := os.ReadFile(base + "/ro/state/file"); err != nil || string(b) != "ro/state\n" {
				t.Errorf("a hidden file: %q, %v", b, err)
			}
			if err := os.Symlink(base+"/other", base+"/link"); err != nil {
				t.Fatal(err)
			}
			for _, p := range []string{"/", "/proc", "/sys/fs", "/dev", "relative", base + "/../x", base + "/link", base + "/none", base + "/ro/state", base + "/ro/state/file", "/etc/shadow"} {
				c.FS = []Path{{p, false}}
				if _, err := s.Start(t.Context(), c); !errors.Is(err, ErrPath) {
					t.Errorf("%s: %v", p, err)
				}
			}
		})
	}
}

// elsewhere is a directory that is not in /tmp.
func elsewhere(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "sandbox-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestNoSurvivors stops programs that do not want to end, and sees that nothing
// of them is left: Ended.Left is nil only when the kernel let the cgroup go. Once
// more without pid namespace, where the cgroup is what finds them.
func TestNoSurvivors(t *testing.T) {
	for layers, s := range map[string]*Sandbox{"all layers": open(t), "cgroup only": open(t, LayerNamespaces, LayerView)} {
		for name, tc := range map[string]struct {
			script string
			ends   bool // by itself
		}{
			"sleeps":          {"exec sleep 100", false},
			"ignores SIGTERM": {"trap '' TERM INT HUP; while :; do sleep 100; done", false},
			"double fork":     {"(sleep 100 &) ; sleep 100", false},
			"new sessions":    {"setsid sh -c 'sleep 100 & setsid sleep 100' & (setsid setsid sleep 100) ; sleep 100", false},
			"stopped":         {"sleep 100 & kill -STOP $!; kill -STOP $$; sleep 100", false},
			"fork bomb":       {"f() { f | f & }; f 2>/dev/null; while :; do f 2>/dev/null; done", false},
			"writes for ever": {"exec yes", false},
			"leaves children": {"setsid sleep 100 & setsid sh -c 'sleep 100' & exit 0", true},
			"holds the pipes": {"(setsid sleep 100 &) ; exit 0", true},
		} {
			t.Run(layers+"/"+name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
				if tc.ends {
					ctx, cancel = context.WithTimeout(t.Context(), 30*time.Second)
				}
				defer cancel()
				c := sh(tc.script)
				c.Limits.Pids = 40
				p, err := s.Start(ctx, c)
				if err != nil {
					t.Fatal(err)
				}
				group := p.call.Path()
				var errs bytes.Buffer
				e := p.Wait(ctx, func([]byte) {}, func(b []byte) { errs.Write(b[:min(len(b), max(0, 512-errs.Len()))]) })
				if e.Left != nil {
					t.Error(e.Left)
				}
				if _, err := os.Stat(group); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("the cgroup is there: %v", err)
				}
				if e.Status.Signaled() == tc.ends && name != "fork bomb" { // whose shell may end when it cannot fork
					t.Errorf("status %#x, %s", e.Status, errs.String())
				}
			})
		}
	}
}

// TestEgress lets a program to one address and sees others refused and recorded.
func TestEgress(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("hello"))
			_ = c.Close()
		}
	}()
	port := ln.Addr().(*net.TCPAddr).Port
	var own []netip.AddrPort
	s := openWith(t, Options{Own: func() []netip.AddrPort { return own }})
	dial := func(egress []string, dest string) (Ended, string) {
		c := escape(t, "dial", "tcp", dest)
		c.Egress = egress
		return run(t, s, c)
	}
	here := fmt.Sprintf("127.0.0.1:%d", port)
	for name, tc := range map[string]struct {
		egress  []string
		dest    string
		refused string // destination in the event; "": let through
	}{
		"an address":        {[]string{here}, here, ""},
		"a prefix":          {[]string{fmt.Sprintf("127.0.0.0/8:%d", port)}, here, ""},
		"a mapped address":  {[]string{here}, fmt.Sprintf("[::ffff:127.0.0.1]:%d", port), ""},
		"a name":            {[]string{fmt.Sprintf("localhost:%d", port)}, here, ""},
		"nothing":           {nil, here, here},
		"an empty list":     {[]string{}, here, here},
		"another address":   {[]string{fmt.Sprintf("127.0.0.2:%d", port)}, here, here},
		"another port":      {[]string{"127.0.0.1:1"}, here, here},
		"another prefix":    {[]string{fmt.Sprintf("127.1.0.0/16:%d", port)}, here, here},
		"zero is loopback":  {[]string{"127.0.0.2:1"}, fmt.Sprintf("0.0.0.0:%d", port), fmt.Sprintf("0.0.0.0:%d", port)},
		"IPv6":              {[]string{here}, fmt.Sprintf("[::1]:%d", port), fmt.Sprintf("[::1]:%d", port)},
		"mapped, elsewhere": {[]string{here}, fmt.Sprintf("[::ffff:127.0.0.3]:%d", port), fmt.Sprintf("127.0.0.3:%d", port)},
	} {
		t.Run(name, func(t *testing.T) {
			e, out := dial(tc.egress, tc.dest)
			if tc.refused == "" {
				if !strings.Contains(out, "hello") || e.Refused != 0 {
					t.Errorf("%q, %d refused", out, e.Refused)
				}
				return
			}
			if !strings.Contains(out, "EPERM") || e.Refused != 1 || len(e.Refusals) != 1 {
				t.Fatalf("%q: %+v", out, e)
			}
			if r := e.Refusals[0]; r.Dest.String() != tc.refused || r.Op != "connect" || r.PID == 0 || r.Comm == "" {
				t.Errorf("%+v, want %s", r, tc.refused)
			}
		})
	}
	own = []netip.AddrPort{netip.MustParseAddrPort(here)}
	for _, egress := range []string{here, fmt.Sprintf("127.0.0.0/8:%d", port), fmt.Sprintf("localhost:%d", port)} {
		if _, err := s.Start(t.Context(), &Command{Argv: []string{"/bin/true"}, Egress: []string{egress}}); !errors.Is(err, ErrEgress) {
			t.Errorf("the node's own %s: %v", egress, err)
		}
	}
}

// TestTakeOver kills the owner of a sandbox, as far as a test can: its gate is
// let go without being taken away. What runs stays refused, and the next owner
// ends it.
func TestTakeOver(t *testing.T) {
	dir := t.TempDir()
	first, err := Open(t.Context(), Options{RunDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if first.gate == nil {
		testutil.Missing(t, "the egress layer", "run as root")
	}
	// The program tries for ever, and says so in a file.
	shared := t.TempDir()
	if err := os.Chmod(shared, 0o777); err != nil {
		t.Fatal(err)
	}
	c := escape(t, "dialer", shared+"/log", "127.0.0.1:9")
	c.FS = []Path{{shared, true}}
	p, err := first.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	tries := func() int {
		b, _ := os.ReadFile(shared + "/log")
		if s := string(b); strings.Trim(s, "E") != "" {
			t.Fatalf("an attempt was not refused with EPERM: %q", s)
		}
		return len(b)
	}
	moves := func(when string) {
		t.Helper()
		was := tries()
		testutil.Eventually(t, 10*time.Second, when, func() error {
			if tries() < was+3 {
				return errors.New("no new attempts")
			}
			return nil
		})
	}
	moves("attempts before")
	if err := first.gate.Close(); err != nil { // as the kernel does for a process that is killed
		t.Fatal(err)
	}
	moves("attempts without an owner")
	if _, err := Open(t.Context(), Options{RunDir: dir}); err == nil || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("two owners: %v", err)
	}
	if err := first.lock.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := Open(t.Context(), Options{RunDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := awaitEnd(ctx, p); err != nil {
		t.Error(err)
	}
	if e, out := run(t, second, escape(t, "dial", "tcp", "127.0.0.1:9")); !strings.Contains(out, "EPERM") || e.Refused != 1 {
		t.Errorf("after taking over: %q, %+v", out, e)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
}

// awaitEnd reaps a process whose sandbox is gone.
func awaitEnd(ctx context.Context, p *Process) error {
	defer p.stdout.Close()
	defer p.stderr.Close()
	for ctx.Err() == nil {
		var ws unix.WaitStatus
		if pid, err := unix.Wait4(p.pid, &ws, unix.WNOHANG, nil); err != nil {
			return err
		} else if pid == p.pid {
			unix.Close(p.pidfd)
			if ws.Signal() != unix.SIGKILL {
				return fmt.Errorf("status %#x", ws)
			}
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return errors.New("the program of the first owner still runs")
}

func TestErrors(t *testing.T) {
	s := openWith(t, Options{MaxCalls: 1})
	notAProgram := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notAProgram, []byte("x"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cmd  *Command
		want error
	}{
		"no program":       {&Command{}, ErrExec},
		"relative":         {&Command{Argv: []string{"true"}}, ErrExec},
		"missing":          {&Command{Argv: []string{"/nonexistent"}}, ErrExec},
		"missing below":    {&Command{Argv: []string{"/usr/bin/nonexistent"}}, ErrExec},
		"not a program":    {&Command{Argv: []string{notAProgram}}, ErrExec},
		"no directory":     {&Command{Argv: []string{"/bin/true"}, Dir: "/nonexistent"}, ErrExec},
		"a file as dir":    {&Command{Argv: []string{"/bin/true"}, Dir: "/usr/bin/env"}, ErrConfine},
		"egress, no port":  {&Command{Argv: []string{"/bin/true"}, Egress: []string{"a"}}, ErrEgress},
		"memory, no limit": {&Command{Argv: []string{"/bin/true"}, Limits: Limits{Memory: 1 << 20, CPU: "1000 1000", IO: 1}}, ErrLayer},
	} {
		if errors.Is(tc.want, ErrLayer) && s.has(LayerLimits) {
			continue
		}
		if _, err := s.Start(t.Context(), tc.cmd); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	p, err := s.Start(t.Context(), sh("sleep 100"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(t.Context(), sh("")); !errors.Is(err, ErrBusy) {
		t.Errorf("one more than MaxCalls: %v", err)
	}
	p.Kill()
	p.Wait(t.Context(), func([]byte) {}, func([]byte) {})
	run(t, s, sh("true"))
	if n := Plain().Unenforceable(Limits{Memory: 1, Pids: 1, CPU: "1 1", IO: 1}, []string{"a:1"}, []Path{}); strings.Join(n, " ") != "memory_max pids_max cpu_max io_max egress fs" {
		t.Errorf("plain keeps everything but %q", n)
	}
}

func TestNarrow(t *testing.T) {
	parse := func(list ...string) []Endpoint {
		var out []Endpoint
		for _, s := range list {
			e, err := ParseEndpoint(s)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, e)
		}
		return out
	}
	for name, tc := range map[string]struct {
		have, want []Endpoint
		out        string
	}{
		"same":          {parse("a.example:443"), parse("A.example:443"), "[a.example:443]"},
		"other port":    {parse("a.example:443"), parse("a.example:80"), "[]"},
		"inside":        {parse("10.0.0.0/8:443"), parse("10.1.2.3:443"), "[10.1.2.3:443]"},
		"around":        {parse("10.1.2.3:443"), parse("10.0.0.0/8:443"), "[10.1.2.3:443]"},
		"beside":        {parse("10.0.0.0/8:443"), parse("11.0.0.0/8:443"), "[]"},
		"families":      {parse("0.0.0.0/0:443"), parse("[::]:443"), "[]"},
		"name, address": {parse("0.0.0.0/0:443"), parse("a.example:443"), "[]"},
		"nothing":       {nil, parse("a.example:443"), "[]"},
		"IPv6":          {parse("[2001:db8::/32]:443"), parse("[2001:db8::1]:443"), "[[2001:db8::1]:443]"},
	} {
		if got := fmt.Sprint(Narrow(tc.have, tc.want)); got != tc.out {
			t.Errorf("%s: %s, want %s", name, got, tc.out)
		}
	}
	got := NarrowPaths([]Path{{"/a", true}, {"/b/c", false}}, []Path{{"/a/x", true}, {"/b", true}, {"/ab", true}, {"/a/y", false}})
	if fmt.Sprint(got) != "[{/a/x true} {/a/y false} {/b/c false}]" {
		t.Errorf("paths %v", got)
	}
}

func FuzzParseEndpoint(f *testing.F) {
	for _, s := range []string{"a:1", "10.0.0.0/8:443", "[::1]:80", "[2001:db8::/32]:443", "127.0.0.1:0", "[::ffff:1.2.3.4]:1", "a b:1", "a\n:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		e, err := ParseEndpoint(text)
		if err != nil {
			return
		}
		if e.Port == 0 || (e.Name == "") == !e.Prefix.IsValid() || strings.ContainsAny(e.Name, " \n\t#") {
			t.Fatalf("%q: %+v", text, e)
		}
		again, err := ParseEndpoint(e.String())
		if err != nil || again != e {
			t.Fatalf("%q: %+v, again %+v, %v", text, e, again, err)
		}
	})
}
