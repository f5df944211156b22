package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/autonomyops/autonomy/assurance"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/wal"
)

// pageWidth is that of every page this program prints.
const pageWidth = 80

func newDoctor() *cobra.Command {
	var stateDir, min string
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Find out what this platform gives a node, by trying it",
		Long: `Find out what this platform gives a node, by trying it: a cgroup is made and
killed, a connect refused, a file write refused, the disk timed. It takes less
than a second and leaves nothing behind but an empty directory in memory. Run it
as the user that runs the node, in the same environment.

Exit code 0, or 7 when the state directory cannot be used or the level is below
--assurance-min.`,
		Args: usageArgs(cobra.NoArgs),
	}
	c.Flags().StringVar(&stateDir, "state-dir", "", "judge this `DIR`, which must exist (default: where a node's state would lie)")
	c.Flags().StringVar(&min, "assurance-min", string(assurance.None), "fail below this `LEVEL`: none, reduced or full")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		level, err := assurance.ParseLevel(min)
		if err != nil {
			return run.Exitf(run.Usage, "--assurance-min: %w", err)
		}
		if stateDir == "" {
			dir, release, err := doctorStateDir(os.Geteuid(), os.Getenv)
			if err != nil {
				return run.Exitf(run.Assurance, "%w\n--state-dir names the directory to judge", err)
			}
			defer release()
			stateDir = dir
		}
		r := assurance.Probe(c.Context(), assurance.Options{StateDir: stateDir})
		w := c.OutOrStdout()
		if *format == "json" {
			err = printJSON(w, struct {
				assurance.Report
				Log logPlace `json:"log"`
			}{r, findLogPlace()})
		} else {
			_, err = io.WriteString(w, doctorPage(r, findLogPlace(), colourful(w)))
		}
		if err != nil {
			return err
		}
		return run.Exit(run.Assurance, r.Meets(level))
	}
	return c
}

// logPlace is where a node with --wal-ring-dir auto would encode its records.
type logPlace struct {
	Mode string `json:"mode"` // ring or mapped, as wal.mode in the status
	Dir  string `json:"ring_dir,omitempty"`
	Why  string `json:"why,omitempty"`
}

func findLogPlace() logPlace {
	dir, err := run.RuntimeDir("node")
	if err != nil {
		return logPlace{Mode: wal.ModeMapped.String(), Why: strings.ReplaceAll(err.Error(), "\n", "; ")}
	}
	return logPlace{Mode: wal.ModeRing.String(), Dir: dir}
}

// doctorStateDir is the node's state directory. Where there is none yet, it is
// an empty directory made for the moment, as near to that place as possible;
// release removes it.
func doctorStateDir(euid int, getenv func(string) string) (dir string, release func(), err error) {
	dir = "/var/lib/autonomy/node"
	if euid != 0 {
		state := getenv("XDG_STATE_HOME")
		if !filepath.IsAbs(state) {
			state = filepath.Join(getenv("HOME"), ".local", "state")
		}
		dir = filepath.Join("/", state, "autonomy", "node")
	}
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		return dir, func() {}, nil
	}
	for dir != "/" {
		dir = filepath.Dir(dir)
		if info, err := os.Stat(dir); err == nil && info.IsDir() {
			break
		}
	}
	if dir, err = os.MkdirTemp(dir, ".autonomy-doctor-"); err != nil {
		return "", nil, fmt.Errorf("make a directory where the node's state would lie: %w", err)
	}
	return dir, func() { _ = os.RemoveAll(dir) }, nil
}

// colourful reports whether w is a terminal that may be coloured.
func colourful(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && term.IsTerminal(int(f.Fd()))
}

// doctorPage writes the report for a person.
func doctorPage(r assurance.Report, log logPlace, colour bool) string {
	var b strings.Builder
	paint := func(code, s string) string {
		if !colour {
			return s
		}
		return "\x1b[" + code + "m" + s + "\x1b[0m"
	}
	colours := map[assurance.CheckResult]string{assurance.OK: "32", assurance.Degraded: "33", assurance.Failed: "31"}

	right := "Linux " + printable(r.Kernel) + ", probed in " + latency(r.Took)
	left := "Platform assurance: " + string(r.Level)
	fmt.Fprintf(&b, "%s%s%s\n", paint("1", left), strings.Repeat(" ", max(2, pageWidth-len(left)-len(right))), right)
	for _, line := range wrapWords(levelMeaning[r.Level], pageWidth) {
		fmt.Fprintln(&b, line)
	}
	place := "Log records are encoded in memory, in " + log.Dir + ", and written past the page cache."
	if log.Why != "" {
		place = "Log records are encoded into mapped files: " + log.Why + "."
	}
	for _, line := range wrapWords(printable(place), pageWidth) {
		fmt.Fprintln(&b, line)
	}
	fmt.Fprintln(&b)

	const column = 32 // where details begin
	for _, c := range r.Checks {
		lead := fmt.Sprintf("  %-8s  %-*s  ", c.Result, column-14, c.Name)
		for i, line := range wrapWords(printable(c.Detail), pageWidth-column) {
			if i > 0 {
				lead = strings.Repeat(" ", column)
			} else {
				lead = strings.Replace(lead, string(c.Result), paint(colours[c.Result], string(c.Result)), 1)
			}
			fmt.Fprintln(&b, strings.TrimRight(lead+line, " "))
		}
	}

	if open := slices.DeleteFunc(slices.Clone(r.Checks), func(c assurance.Check) bool { return c.Result == assurance.OK }); len(open) > 0 {
		fmt.Fprintf(&b, "\n%s\n", paint("1", "What to do"))
		for _, c := range open {
			section(&b, "  "+paint("1", c.Name), 2+len(c.Name), "why", c.Why)
			section(&b, "", 0, "fix", c.Fix)
		}
	}

	fmt.Fprintf(&b, "\n%s\n", paint("1", fmt.Sprintf("%-22s%-10s%-10s%s", "What a level needs", "reduced", "full", "without it")))
	for _, row := range assurance.Table {
		lead := fmt.Sprintf("  %-20s%-10s%-10s", row.Check, need(row.Reduced), need(row.Full))
		for _, line := range wrapWords(row.Meaning, pageWidth-len(lead)) {
			fmt.Fprintln(&b, strings.TrimRight(lead+line, " "))
			lead = strings.Repeat(" ", len(lead))
		}
	}
	return b.String()
}

// levelMeaning says a level in a sentence.
var levelMeaning = map[assurance.Level]string{
	assurance.Full:    "Everything was tried and works.",
	assurance.Reduced: "Decisions are recorded and held; some of the kernel's means are missing.",
	assurance.None:    "Decisions are recorded; the kernel does not help to hold a tool to them.",
}

func need(r assurance.CheckResult) string {
	if r == "" {
		return "-"
	}
	return string(r)
}

// section writes a label of the given width, a mark, and text beside them.
func section(b *strings.Builder, label string, width int, mark, text string) {
	const column = 22
	lead := label + strings.Repeat(" ", max(1, column-width)) + mark + "  "
	for _, line := range wrapWords(text, pageWidth-column-len(mark)-2) {
		fmt.Fprintln(b, lead+line)
		lead = strings.Repeat(" ", column+len(mark)+2)
	}
}

// wrapWords breaks text at blanks into lines of at most width characters; a longer
// word stands alone. There is always one line.
func wrapWords(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
			lines = append(lines, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}
