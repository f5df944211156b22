package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/gowebpki/jcs"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/autonomyops/autonomy/fingerprint"
	"github.com/autonomyops/autonomy/internal/run"
	"github.com/autonomyops/autonomy/internal/vfs"
	"github.com/autonomyops/autonomy/node/tool"
	"github.com/autonomyops/autonomy/prepared"
)

// Exit codes of "lock diff".
const (
	diffDrift    = 2
	diffNotKnown = 3 // the locks could not be compared
)

// Limits of a project.
const (
	maxProjectFile = 256 << 10 // bytes of autonomy.yaml
	maxPromptFile  = 4 << 20   // bytes of a prompt or input file
	projectName    = "autonomy.yaml"
)

func newLock() *cobra.Command {
	c := &cobra.Command{
		Use:   "lock",
		Short: "Write, check and compare lock files",
		Long: `A lock lists everything that shapes what an agent does and that its authors
declare: image, tools, prompts, models, policy, runtime. Its fingerprint says that
these inputs are the ones that were reviewed. It does not say that a hosted model
behaves as it did.`,
	}
	c.AddCommand(newLockCreate(), newLockVerify(), newLockDiff())
	return c
}

// project is autonomy.yaml.
type project struct {
	Name    string            `yaml:"name"`
	Version string            `yaml:"version"`
	Image   string            `yaml:"image"`
	Policy  string            `yaml:"policy"`  // bundle file
	Tools   string            `yaml:"tools"`   // tools file
	Prompts map[string]string `yaml:"prompts"` // name -> file
	Models  []projectModel    `yaml:"models"`
	Runtime struct {
		MinVersion   string   `yaml:"min_version"`
		Capabilities []string `yaml:"capabilities"`
	} `yaml:"runtime"`
	Inputs map[string]string `yaml:"inputs"` // name -> file

	dir string // paths of the file are relative to it and stay in it
}

type projectModel struct {
	Provider string         `yaml:"provider"`
	ID       string         `yaml:"id"`
	Params   map[string]any `yaml:"params"`
}

func readProject(file string) (*project, error) {
	data, err := readFile(file, maxProjectFile)
	if err != nil {
		return nil, err
	}
	p := &project{dir: filepath.Dir(file)}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	if err := dec.Decode(p); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("the file is empty")
		}
		return nil, run.Exitf(run.Usage, "%s: %w", file, err)
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return nil, run.Exitf(run.Usage, "%s: more than one YAML document", file)
	}
	return p, nil
}

// lock computes the lock of p. Files are opened below p.dir only.
func (p *project) lock() (*fingerprint.Lock, error) {
	root, err := os.OpenRoot(p.dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	l := fingerprint.New()
	l.Agent = fingerprint.Agent{Name: p.Name, Version: p.Version, ImageDigest: p.Image}
	if _, digest, ok := strings.Cut(p.Image, "@"); ok {
		l.Agent.ImageDigest = digest
	}
	l.Runtime.MinVersion = p.Runtime.MinVersion
	l.Runtime.Capabilities = append(l.Runtime.Capabilities, p.Runtime.Capabilities...)
	if p.Policy == "" {
		return nil, run.Exitf(run.Usage, "no policy bundle: give --policy BUNDLE or policy: in %s", projectName)
	}
	b, err := prepared.ReadBundleFile(p.Policy, prepared.Limits{})
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	l.Policy = fingerprint.Policy{Name: b.Name, Version: b.Version, Digest: b.Digest}
	if p.Tools != "" {
		if l.Tools, err = lockTools(p.Tools); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.Prompts)) {
		d, err := fileDigest(root, p.Prompts[name])
		if err != nil {
			return nil, fmt.Errorf("prompt %q: %w", name, err)
		}
		l.Prompts = append(l.Prompts, fingerprint.Prompt{Name: name, Digest: d})
	}
	for _, name := range slices.Sorted(maps.Keys(p.Inputs)) {
		d, err := fileDigest(root, p.Inputs[name])
		if err != nil {
			return nil, fmt.Errorf("input %q: %w", name, err)
		}
		l.Inputs[name] = d
	}
	for i, m := range p.Models {
		d, err := paramsDigest(m.Params)
		if err != nil {
			return nil, run.Exitf(run.Usage, "models[%d]: params: %w", i, err)
		}
		l.Models = append(l.Models, fingerprint.Model{Provider: m.Provider, ID: m.ID, ParamsDigest: d})
	}
	l.Normalize()
	if _, err := l.Marshal(); err != nil {
		return nil, run.Exit(run.Usage, err)
	}
	return l, nil
}

func lockTools(file string) (_ []fingerprint.Tool, err error) {
	reg, err := tool.Load(file, tool.Options{})
	if err != nil {
		return nil, run.Exit(run.Usage, err)
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	out := []fingerprint.Tool{}
	for _, t := range reg.List() {
		out = append(out, fingerprint.Tool{Kind: t.Kind, DefinitionDigest: t.Digest})
	}
	return out, nil
}

func fileDigest(root *os.Root, name string) (string, error) {
	f, err := root.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxPromptFile+1))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	if len(data) > maxPromptFile {
		return "", fmt.Errorf("%s: over %d bytes", name, maxPromptFile)
	}
	return fingerprint.Digest(data), nil
}

// paramsDigest is sha256 over the RFC 8785 bytes of a model's parameters. None
// and an empty mapping are the same.
func paramsDigest(params map[string]any) (string, error) {
	if params == nil {
		params = map[string]any{}
	}
	if err := checkParams("", params); err != nil {
		return "", err
	}
	raw, err := json.Marshal(params)
	if err != nil {
		return "", err
	}
	canon, err := jcs.Transform(raw)
	if err != nil {
		return "", err
	}
	return fingerprint.Digest(canon), nil
}

// checkParams refuses what has no single canonical form: floats (write "0.2"),
// nulls, timestamps, integers that a JSON reader may round.
func checkParams(at string, v any) error {
	switch v := v.(type) {
	case string, bool:
		return nil
	case int:
		if math.Abs(float64(v)) > 1<<53-1 {
			return fmt.Errorf("%s: %d is beyond 2^53-1: write it as a string", at, v)
		}
		return nil
	case float64:
		return fmt.Errorf("%s: %v is a float: write it as a string, %q", at, v, strconv.FormatFloat(v, 'g', -1, 64))
	case []any:
		for i, e := range v {
			if err := checkParams(fmt.Sprintf("%s[%d]", at, i), e); err != nil {
				return err
			}
		}
		return nil
	case map[string]any:
		for k, e := range v {
			if err := checkParams(at+"/"+k, e); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("%s: %T: want strings, integers, booleans, lists or mappings", at, v)
}

// projectFlags are the parts of a project that can be given, or replaced, by
// flags.
type projectFlags struct {
	file, name, version, image, policy, tools, minRuntime string
}

func (f *projectFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.file, "project", "", "read the project from `FILE` (default "+projectName+" when it is there)")
	fs.StringVar(&f.name, "name", "", "agent `NAME`")
	fs.StringVar(&f.version, "agent-version", "", "agent `VERSION` (semver)")
	fs.StringVar(&f.image, "image", "", "image `REF@sha256:…`, or its digest alone")
	fs.StringVar(&f.policy, "policy", "", "policy bundle `FILE`")
	fs.StringVar(&f.tools, "tools", "", "tools `FILE`")
	fs.StringVar(&f.minRuntime, "min-runtime", "", "least autonomy-node `VERSION`")
}

// project reads the project file and lets the flags replace parts of it.
func (f *projectFlags) project() (*project, error) {
	file := f.file
	if file == "" {
		if _, err := os.Stat(projectName); err == nil {
			file = projectName
		}
	}
	p := &project{dir: "."}
	if file != "" {
		var err error
		if p, err = readProject(file); err != nil {
			return nil, err
		}
		for _, path := range []*string{&p.Policy, &p.Tools} {
			if *path != "" && !filepath.IsLocal(*path) {
				return nil, run.Exitf(run.Usage, "%s: %s leaves the project's directory: give it by a flag", file, *path)
			}
			if *path != "" {
				*path = filepath.Join(p.dir, *path)
			}
		}
	}
	for _, o := range []struct{ flag, to *string }{{&f.name, &p.Name}, {&f.version, &p.Version}, {&f.image, &p.Image}, {&f.policy, &p.Policy}, {&f.tools, &p.Tools}, {&f.minRuntime, &p.Runtime.MinVersion}} {
		if *o.flag != "" {
			*o.to = *o.flag
		}
	}
	return p, nil
}

// lockSummary is what create and verify print.
type lockSummary struct {
	File        string                `json:"file"`
	Digest      string                `json:"digest"`
	Fingerprint string                `json:"fingerprint"`
	Agent       string                `json:"agent"`
	Policy      string                `json:"policy"`
	Tools       int                   `json:"tools"`
	Prompts     int                   `json:"prompts"`
	Models      int                   `json:"models"`
	Sections    []fingerprint.Section `json:"sections"`
}

func summarize(file string, data []byte, l *fingerprint.Lock) (lockSummary, error) {
	sections, err := fingerprint.Sections(l)
	return lockSummary{file, fingerprint.Digest(data), l.Fingerprint, l.Agent.Name + "@" + l.Agent.Version, l.Policy.Name + "@" + l.Policy.Version, len(l.Tools), len(l.Prompts), len(l.Models), sections}, err
}

func (s lockSummary) print(w io.Writer, format string) error {
	if format == "json" {
		return printJSON(w, s)
	}
	fmt.Fprintf(w, "lock         %s\ndigest       %s\nfingerprint  %s\nagent        %s\npolicy       %s\ntools        %d, prompts %d, models %d\n",
		s.File, s.Digest, s.Fingerprint, printable(s.Agent), printable(s.Policy), s.Tools, s.Prompts, s.Models)
	return nil
}

func newLockCreate() *cobra.Command {
	var flags projectFlags
	var out string
	c := &cobra.Command{
		Use:     "create",
		Short:   "Write " + fingerprint.FileName + " from " + projectName + " and flags",
		Example: "  autonomy lock create --project examples/quickstart/autonomy.yaml --policy policy.tar.gz --image registry.example/agent@sha256:…",
		Args:    usageArgs(cobra.NoArgs),
	}
	flags.add(c)
	c.Flags().StringVar(&out, "out", fingerprint.FileName, "write the lock to `FILE`")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		p, err := flags.project()
		if err != nil {
			return err
		}
		l, err := p.lock()
		if err != nil {
			return err
		}
		data, err := l.Marshal()
		if err != nil {
			return err
		}
		if err := vfs.WriteFile(out, data, 0o644); err != nil {
			return err
		}
		s, err := summarize(out, data, l)
		if err != nil {
			return err
		}
		return s.print(c.OutOrStdout(), *format)
	}
	return c
}

func readLock(file string) (*fingerprint.Lock, []byte, error) {
	data, err := readFile(file, fingerprint.MaxBytes)
	if err != nil {
		return nil, nil, err
	}
	l, err := fingerprint.Parse(data)
	if err == nil {
		err = l.Verify()
	}
	if err != nil {
		return nil, nil, run.Exitf(run.Refused, "%s: %w", file, err)
	}
	return l, data, nil
}

func newLockVerify() *cobra.Command {
	var flags projectFlags
	c := &cobra.Command{
		Use:   "verify [LOCK]",
		Short: "Check a lock's form and fingerprint, and that it is still true",
		Long: `Check that a lock file is well formed and that its fingerprint is that of its
content. With --project the lock is also made again from the project's files and
compared. Exit 3: refused.`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
	}
	flags.add(c)
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		file := fingerprint.FileName
		if len(args) > 0 {
			file = args[0]
		}
		l, data, err := readLock(file)
		if err != nil {
			return err
		}
		if flags.file != "" {
			p, err := flags.project()
			if err != nil {
				return err
			}
			if p.Image == "" {
				p.Image = l.Agent.ImageDigest
			}
			now, err := p.lock()
			if err != nil {
				return err
			}
			if changes := fingerprint.Diff(l, now); len(changes) > 0 {
				if err := printChanges(c.ErrOrStderr(), changes); err != nil {
					return err
				}
				return run.Exitf(run.Refused, "%s is not the lock of %s any more: %d changes; make it again with \"autonomy lock create\" when they are meant", file, flags.file, len(changes))
			}
		}
		s, err := summarize(file, data, l)
		if err != nil {
			return err
		}
		return s.print(c.OutOrStdout(), *format)
	}
	return c
}

func printChanges(w io.Writer, changes []fingerprint.Change) error {
	var rows [][]string
	for _, ch := range changes {
		rows = append(rows, []string{ch.Severity.String(), ch.Section, ch.Key, shorten(ch.Old), shorten(ch.New), ch.Why})
	}
	return printTable(w, []string{"SEVERITY", "SECTION", "KEY", "OLD", "NEW", "WHAT"}, rows)
}

// shorten keeps the first digits of a digest.
func shorten(s string) string {
	if s == "" {
		return "-"
	}
	if algorithm, hex, ok := strings.Cut(s, ":"); ok && len(hex) == 64 {
		return algorithm + ":" + hex[:12]
	}
	return s
}

func newLockDiff() *cobra.Command {
	c := &cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Tell what changed between two locks, most severe first",
		Long: `Tell what changed between two locks, most severe first.

Exit codes: 0 the same, 2 they differ, 3 they could not be compared.`,
		Args: func(c *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(2)(c, args); err != nil {
				return run.Exitf(diffNotKnown, "%w\nUsage: %s", err, c.UseLine())
			}
			return nil
		},
	}
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return run.Exit(diffNotKnown, err) })
	format := outputFlag(c)
	checkFormat := c.PreRunE
	c.PreRunE = func(c *cobra.Command, args []string) error { return run.Exit(diffNotKnown, checkFormat(c, args)) }
	c.RunE = func(c *cobra.Command, args []string) error {
		a, _, err := readLock(args[0])
		if err != nil {
			return run.Exit(diffNotKnown, err)
		}
		b, _, err := readLock(args[1])
		if err != nil {
			return run.Exit(diffNotKnown, err)
		}
		changes := fingerprint.Diff(a, b)
		if *format == "json" {
			if changes == nil {
				changes = []fingerprint.Change{}
			}
			err = printJSON(c.OutOrStdout(), map[string]any{"same": len(changes) == 0, "changes": changes})
		} else if len(changes) == 0 {
			_, err = fmt.Fprintln(c.OutOrStdout(), "no change")
		} else {
			err = printChanges(c.OutOrStdout(), changes)
		}
		if err != nil {
			return run.Exit(diffNotKnown, err)
		}
		if len(changes) > 0 {
			return run.Exit(diffDrift, errSilent)
		}
		return nil
	}
	return c
}
