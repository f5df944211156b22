// Package conf gives the three daemons one way to be configured: flags
// override environment override file override default (contract.md, Programs).
//
// A program defines its flags on a pflag.FlagSet, bound to its Config struct;
// that is the only list of settings there is. Setting "wal-max-bytes" is
// written --wal-max-bytes, AUTONOMY_NODE_WAL_MAX_BYTES (prefix plus name) and
// wal_max_bytes in the file. The file is one flat YAML mapping, read strictly:
// an unknown key is an error that tells file, line and the nearest known key.
package conf

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// maxFileBytes bounds a configuration file.
const maxFileBytes = 1 << 20

// Source tells where a setting's value came from.
type Source string

// Sources, weakest first.
const (
	Default Source = "default"
	File    Source = "file"
	Env     Source = "environment"
	Flag    Source = "flag"
)

// Settings is the result of Load.
type Settings struct {
	fs      *pflag.FlagSet
	sources map[string]string // flag name -> "file /etc/x.yaml:3"
	file    string
}

// File is the configuration file that was read, or "".
func (s *Settings) File() string { return s.file }

const (
	configFlag = "config"
	printFlag  = "print-config"
)

// ErrPrinted is returned by Load when --print-config was given and done.
var ErrPrinted = errors.New("configuration printed")

// Load parses args into fs, then fills what was not given from the environment
// and from the file named by --config. It adds --config and --print-config.
// All faults are reported at once. Errors are usage errors (exit code 2).
func Load(fs *pflag.FlagSet, args []string, prefix string, getenv func(string) string, stdout io.Writer) (*Settings, error) {
	fs.String(configFlag, "", "read settings from `FILE` (YAML, one flat mapping)")
	printIt := fs.Bool(printFlag, false, "print the effective configuration, each value with its source, and exit")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q: every setting is a flag, see --help", fs.Arg(0))
	}
	s := &Settings{fs: fs, sources: map[string]string{}}
	var faults []error
	fs.Visit(func(f *pflag.Flag) { s.sources[f.Name] = string(Flag) })
	fs.VisitAll(func(f *pflag.Flag) {
		name := EnvName(prefix, f.Name)
		val := getenv(name)
		if val == "" || s.sources[f.Name] != "" || f.Name == printFlag {
			return
		}
		vals := []string{val}
		if strings.HasSuffix(f.Value.Type(), "Array") {
			vals = strings.Split(val, ",")
		}
		for _, v := range vals {
			if err := fs.Set(f.Name, v); err != nil {
				faults = append(faults, fmt.Errorf("environment %s: %w", name, err))
			}
		}
		s.sources[f.Name] = string(Env) + " " + name
	})
	if s.file = fs.Lookup(configFlag).Value.String(); s.file != "" {
		faults = append(faults, s.readFile()...)
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	if *printIt {
		s.Print(stdout)
		return s, ErrPrinted
	}
	return s, nil
}

// EnvName is the environment variable of a flag.
func EnvName(prefix, flag string) string {
	return prefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

func key(flag string) string { return strings.ReplaceAll(flag, "-", "_") }

func (s *Settings) readFile() []error {
	f, err := os.Open(s.file)
	if err != nil {
		return []error{fmt.Errorf("configuration file: %w", err)}
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return []error{fmt.Errorf("configuration file %s: %w", s.file, err)}
	}
	if len(data) > maxFileBytes {
		return []error{fmt.Errorf("configuration file %s: over %d bytes", s.file, maxFileBytes)}
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return []error{fmt.Errorf("configuration file %s: %w", s.file, err)}
	}
	if len(doc.Content) == 0 {
		return nil
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return []error{fmt.Errorf("%s:%d: want a mapping of settings, as in \"listen: 127.0.0.1:7777\"", s.file, root.Line)}
	}
	known := map[string]*pflag.Flag{}
	s.fs.VisitAll(func(f *pflag.Flag) {
		if f.Name != configFlag && f.Name != printFlag && !f.Hidden {
			known[key(f.Name)] = f
		}
	})
	var faults []error
	seen := map[string]int{}
	for i := 0; i+1 < len(root.Content); i += 2 {
		k, v := root.Content[i], root.Content[i+1]
		at := fmt.Sprintf("%s:%d", s.file, k.Line)
		flag, ok := known[k.Value]
		switch {
		case !ok:
			faults = append(faults, fmt.Errorf("%s: unknown setting %q%s", at, k.Value, nearest(k.Value, known)))
			continue
		case seen[k.Value] > 0:
			faults = append(faults, fmt.Errorf("%s: %q is set a second time, first in line %d", at, k.Value, seen[k.Value]))
			continue
		}
		seen[k.Value] = k.Line
		if src := s.sources[flag.Name]; src != "" {
			continue // a stronger source has set it
		}
		vals, err := scalars(v)
		if err == nil {
			for _, val := range vals {
				if err = s.fs.Set(flag.Name, val); err != nil {
					break
				}
			}
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("%s: %s: %w", at, k.Value, err))
			continue
		}
		s.sources[flag.Name] = string(File) + " " + at
	}
	return faults
}

// scalars flattens a value: a scalar is itself, a list is its items, a mapping
// is key=value items.
func scalars(n *yaml.Node) ([]string, error) {
	switch n.Kind {
	case yaml.ScalarNode:
		return []string{n.Value}, nil
	case yaml.SequenceNode:
		var out []string
		for _, c := range n.Content {
			if c.Kind != yaml.ScalarNode {
				return nil, errors.New("want a list of plain values")
			}
			out = append(out, c.Value)
		}
		return out, nil
	case yaml.MappingNode:
		var out []string
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i+1].Kind != yaml.ScalarNode {
				return nil, errors.New("want a mapping of plain values")
			}
			out = append(out, n.Content[i].Value+"="+n.Content[i+1].Value)
		}
		return out, nil
	}
	return nil, errors.New("want a plain value, a list or a mapping")
}

func nearest(word string, known map[string]*pflag.Flag) string {
	names := make([]string, 0, len(known))
	for name := range known {
		names = append(names, name)
	}
	if best := Nearest(word, names); best != "" {
		return fmt.Sprintf(": did you mean %q?", best)
	}
	return ": --help lists the known ones"
}

// Nearest is the candidate closest to word by edit distance, or "" when none is
// close enough to be a slip of the hand.
func Nearest(word string, candidates []string) string {
	best, bestD := "", max(2, len(word)/3)+1
	slices.Sort(candidates)
	for _, c := range candidates {
		if d := distance(word, c); d < bestD {
			best, bestD = c, d
		}
	}
	return best
}

// distance is the Levenshtein distance.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diag := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			diag, row[j] = row[j], min(row[j]+1, row[j-1]+1, diag+cost)
		}
	}
	return row[len(b)]
}

// Print writes the effective configuration as a YAML file that Load accepts,
// each line with its source. Passwords in URLs are not shown.
func (s *Settings) Print(w io.Writer) {
	s.fs.VisitAll(func(f *pflag.Flag) {
		if f.Name == configFlag || f.Name == printFlag || f.Hidden || f.Name == "help" || f.Name == "version" {
			return
		}
		src := s.sources[f.Name]
		if src == "" {
			src = string(Default)
		}
		fmt.Fprintf(w, "%-46s # %s\n", key(f.Name)+": "+yamlValue(f), src)
	})
}

func yamlValue(f *pflag.Flag) string {
	if sv, ok := f.Value.(pflag.SliceValue); ok {
		items := sv.GetSlice()
		for i := range items {
			items[i] = quote(items[i])
		}
		return "[" + strings.Join(items, ", ") + "]"
	}
	if list, ok := strings.CutPrefix(f.Value.String(), "["); ok && f.Value.Type() == "stringToString" {
		return "{" + strings.ReplaceAll(strings.ReplaceAll(strings.TrimSuffix(list, "]"), "=", ": "), ",", ", ") + "}"
	}
	return quote(f.Value.String())
}

func quote(v string) string {
	if u, err := url.Parse(v); err == nil && u.User != nil {
		v = u.Redacted()
	}
	out, err := yaml.Marshal(v)
	if err != nil {
		return strconv.Quote(v)
	}
	// A number, a duration or a size is read back by the flag: quotes add nothing.
	return strings.Trim(strings.TrimSuffix(string(out), "\n"), `"`)
}
