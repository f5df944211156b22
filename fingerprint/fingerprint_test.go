package fingerprint

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gowebpki/jcs"
	"github.com/zeebo/blake3"
)

var update = flag.Bool("update", false, "write the golden files again")

func digest(c byte) string { return "sha256:" + strings.Repeat(string(c), 64) }

// sample is a lock with something in every section.
func sample() *Lock {
	l := New()
	l.Agent = Agent{"agent", "1.0.0", digest('1')}
	l.Policy = Policy{"policy", "1.0.0", digest('2')}
	l.Tools = []Tool{{"tool.echo", digest('3')}, {"tool.exec.date", digest('4')}}
	l.Prompts = []Prompt{{"system", digest('5')}}
	l.Models = []Model{{"p", "m", digest('6')}}
	l.Runtime = Runtime{"0.1.0", []string{"landlock"}}
	l.Inputs = map[string]string{"data": digest('7')}
	return l
}

func mustMarshal(t testing.TB, l *Lock) []byte {
	t.Helper()
	b, err := l.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestGolden(t *testing.T) {
	for _, name := range []string{"minimal", "full"} {
		t.Run(name, func(t *testing.T) {
			file := func(suffix string) string { return filepath.Join("testdata", "golden", name+suffix) }
			input, err := os.ReadFile(file(".input.json"))
			if err != nil {
				t.Fatal(err)
			}
			var l Lock
			if err := json.Unmarshal(input, &l); err != nil {
				t.Fatal(err)
			}
			lock := mustMarshal(t, &l)

			// Once more without this package's types, as the contract words it.
			canon, err := jcs.Transform(input)
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("blake3:%x", blake3.Sum256(canon)); l.Fingerprint != want {
				t.Errorf("fingerprint %s, the contract's definition gives %s", l.Fingerprint, want)
			}

			sections, err := Sections(&l)
			if err != nil {
				t.Fatal(err)
			}
			var hashes strings.Builder
			fmt.Fprintf(&hashes, "fingerprint %s\n", l.Fingerprint)
			for _, s := range sections {
				fmt.Fprintf(&hashes, "%s %s\n", s.Name, s.Hash)
			}
			for suffix, have := range map[string][]byte{".lock.json": lock, ".hashes.txt": []byte(hashes.String())} {
				if *update {
					if err := os.WriteFile(file(suffix), have, 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(file(suffix))
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(have, want) {
					t.Errorf("%s:\nhave %s\nwant %s", suffix, have, want)
				}
			}
			parsed, err := Parse(lock)
			if err != nil {
				t.Fatal(err)
			}
			if err := parsed.Verify(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestVectors holds the two modules to the official vectors: an update that
// changes a byte would change every fingerprint.
func TestVectors(t *testing.T) {
	inputs, err := filepath.Glob("testdata/jcs/input/*.json")
	if err != nil || len(inputs) != 10 {
		t.Fatalf("%d RFC 8785 vectors, %v; want 10", len(inputs), err)
	}
	for _, in := range inputs {
		data, err := os.ReadFile(in)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join("testdata/jcs/output", filepath.Base(in)))
		if err != nil {
			t.Fatal(err)
		}
		if have, err := jcs.Transform(data); err != nil || !bytes.Equal(have, want) {
			t.Errorf("%s: %s, %v; want %s", in, have, err, want)
		}
	}
	text, err := os.ReadFile("testdata/blake3.txt")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		var size int
		var hash, derived string
		if _, err := fmt.Sscan(line, &size, &hash, &derived); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		input := make([]byte, size)
		for i := range input {
			input[i] = byte(i % 251)
		}
		sum := blake3.Sum256(input)
		var key [32]byte
		blake3.DeriveKey("BLAKE3 2019-12-27 16:29:52 test vectors context", input, key[:])
		if hex.EncodeToString(sum[:]) != hash || hex.EncodeToString(key[:]) != derived {
			t.Errorf("input of %d bytes: %x and %x, want %s and %s", size, sum, key, hash, derived)
		}
		n++
	}
	if n != 21 {
		t.Errorf("%d BLAKE3 vectors, want 21", n)
	}
}

func TestRefused(t *testing.T) {
	good := string(mustMarshal(t, sample()))
	swap := func(old, now string) string {
		t.Helper()
		if !strings.Contains(good, old) {
			t.Fatalf("%q is not in the lock", old)
		}
		return strings.Replace(good, old, now, 1)
	}
	d := digest('3')
	many := sample()
	many.Tools = nil
	for i := range MaxEntries + 1 {
		many.Tools = append(many.Tools, Tool{fmt.Sprintf("tool.%06d", i), d})
	}
	manyJSON, err := json.Marshal(many)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, in, want string }{
		{"empty", "", "the document ends where a value is due"},
		{"truncated", good[:len(good)/2], "ends inside"},
		{"oversized", good + strings.Repeat(" ", MaxBytes), "the limit is 1048576"},
		{"not an object", "[]", "want object"},
		{"null", "null", "schema is"},
		{"trailing data", good + "{}", "data after the value"},
		{"trailing newline", good + "\n", "not RFC 8785 canonical JSON"},
		{"white space", strings.Replace(good, ":", ": ", 1), "not RFC 8785 canonical JSON"},
		{"needless escape", swap("agent\",\"version", "\\u0061gent\",\"version"), "not RFC 8785 canonical JSON"},
		{"byte order mark", "\ufeff" + good, "want a value"},
		{"duplicate key", swap(`{"agent":`, `{"schema":"x","agent":`), `duplicate key "schema"`},
		{"unknown key", swap(`{"agent":`, `{"Aaa":"x","agent":`), `unknown key "Aaa"`},
		{"unknown key inside", swap(`{"image_digest"`, `{"extra":"x","image_digest"`), `unknown key "extra"`},
		{"key of another case", swap(`"inputs"`, `"Inputs"`), `keys are case-sensitive, write "inputs"`},
		{"missing key", swap(`"inputs":{"data":"`+digest('7')+`"},`, ``), "inputs is missing or null"},
		{"null object", swap(`"inputs":{"data":"`+digest('7')+`"}`, `"inputs":null`), "inputs is missing or null"},
		{"null array", swap(`"capabilities":["landlock"]`, `"capabilities":null`), "runtime.capabilities is missing or null"},
		{"null string", swap(`"name":"agent"`, `"name":null`), "agent.name is missing or empty"},
		{"number", swap(`"version":"1.0.0"`, `"version":1.0`), "want string, have number"},
		{"boolean", swap(`"version":"1.0.0"`, `"version":true`), "want string, have bool"},
		{"invalid UTF-8", swap(`"name":"agent"`, "\"name\":\"ag\xffent\""), "invalid UTF-8"},
		{"unpaired surrogate", swap(`"name":"agent"`, `"name":"\ud800"`), "unpaired surrogate"},
		{"control character", swap(`"name":"agent"`, `"name":"a\u001b[2J"`), "holds a control character"},
		{"long string", swap(`"name":"agent"`, `"name":"`+strings.Repeat("a", MaxString+1)+`"`), "the limit is 1024"},
		{"other schema", swap("autonomy.lock/v0", "autonomy.lock/v1"), `schema is "autonomy.lock/v1"`},
		{"no version", swap(`"version":"1.0.0"`, `"version":"one"`), "want a version"},
		{"version with a v", swap(`"version":"1.0.0"`, `"version":"v1.0.0"`), "want a version"},
		{"digest in capitals", swap(digest('3'), "sha256:"+strings.Repeat("A", 64)), "is no digest"},
		{"digest too short", swap(digest('3'), "sha256:33"), "is no digest"},
		{"blake3 where sha256 is due", swap(digest('3'), "blake3:"+strings.Repeat("3", 64)), "want sha256:"},
		{"sha256 as the fingerprint", swap(`"fingerprint":"blake3:`, `"fingerprint":"sha256:`), "want blake3:"},
		{"tools not sorted", swap(`{"definition_digest":"`+digest('3')+`","kind":"tool.echo"}`, `{"definition_digest":"`+digest('3')+`","kind":"tool.zzz"}`), "want bytewise order"},
		{"tool twice", swap(`"kind":"tool.exec.date"`, `"kind":"tool.echo"`), `"tool.echo" stands twice`},
		{"too many", string(manyJSON), "4097 entries, the limit is 4096"},
		{"deep", strings.Repeat("[", 100), "nested deeper"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := Parse([]byte(tt.in))
			if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), tt.want) || l != nil {
				t.Errorf("Parse = %v, %v; want ErrMalformed with %q", l, err, tt.want)
			}
		})
	}
}

func TestMismatch(t *testing.T) {
	a := sample()
	mustMarshal(t, a)
	before, err := Sections(a)
	if err != nil {
		t.Fatal(err)
	}
	for section, edit := range map[string]func(*Lock){
		"agent":        func(l *Lock) { l.Agent.Version = "1.0.1" },
		"tools":        func(l *Lock) { l.Tools[0].DefinitionDigest = digest('f') },
		"prompts":      func(l *Lock) { l.Prompts[0].Digest = digest('f') },
		"models":       func(l *Lock) { l.Models[0].ParamsDigest = digest('f') },
		"policy":       func(l *Lock) { l.Policy.Digest = digest('f') },
		"capabilities": func(l *Lock) { l.Runtime.Capabilities = append(l.Runtime.Capabilities, "network") },
		"runtime":      func(l *Lock) { l.Runtime.MinVersion = "0.2.0" },
		"inputs":       func(l *Lock) { l.Inputs["data"] = digest('f') },
	} {
		t.Run(section, func(t *testing.T) {
			b := sample()
			b.Fingerprint = a.Fingerprint
			edit(b)
			err := b.Verify()
			var mismatch *MismatchError
			if !errors.As(err, &mismatch) || !errors.Is(err, ErrMismatch) {
				t.Fatalf("Verify = %v, want a *MismatchError", err)
			}
			if moved := Moved(before, mismatch.Sections); !slices.Equal(moved, []string{section}) {
				t.Errorf("moved %v, want %s alone", moved, section)
			}
			if mismatch.Recorded != a.Fingerprint || mismatch.Computed == a.Fingerprint {
				t.Errorf("recorded %s, computed %s", mismatch.Recorded, mismatch.Computed)
			}
		})
	}
}

func TestDiff(t *testing.T) {
	a, b := sample(), sample()
	if d := Diff(a, b); d != nil {
		t.Fatalf("Diff of equal locks = %v", d)
	}
	b.Agent.Version = "1.1.0"
	b.Runtime = Runtime{"0.0.9", []string{"landlock", "network"}}
	b.Tools = []Tool{{"tool.exec.date", digest('f')}, {"tool.shell", digest('8')}}
	b.Models = []Model{{"p", "m2", digest('6')}}
	b.Prompts[0].Digest = digest('f')
	b.Policy.Digest = digest('f')
	b.Inputs["more"] = digest('9')
	var have []string
	for _, c := range Diff(a, b) {
		have = append(have, fmt.Sprintf("%s %s %s %s", c.Severity, c.Section, c.Key, c.Why))
	}
	want := []string{
		"critical tools tool.shell tool added",
		"critical capabilities network capability added",
		"high tools tool.exec.date tool definition changed: description or input schema",
		"high policy digest policy bundle changed",
		"high prompts system prompt changed",
		"medium models p/m model removed",
		"medium models p/m2 model added",
		"medium inputs more input added",
		"medium runtime min_version runtime requirement changed",
		"low tools tool.echo tool removed",
		"low agent version agent version changed",
	}
	if !slices.Equal(have, want) {
		t.Errorf("Diff:\n%s\nwant:\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
	// Names that run together when joined are still told apart.
	a, b = sample(), sample()
	a.Models = []Model{{"x/y", "z", digest('1')}}
	b.Models = []Model{{"x", "y/z", digest('1')}}
	if len(Diff(a, b)) != 2 {
		t.Errorf("Diff of x/y + z and x + y/z = %v, want two changes", Diff(a, b))
	}
}

func TestNormalize(t *testing.T) {
	l := &Lock{Agent: sample().Agent, Policy: sample().Policy, Runtime: Runtime{MinVersion: "0.1.0", Capabilities: []string{"b", "a"}},
		Tools: []Tool{{"b", digest('1')}, {"a", digest('2')}}}
	l.Normalize()
	if _, err := l.Marshal(); err != nil {
		t.Fatal(err)
	}
	if l.Tools[0].Kind != "a" || l.Runtime.Capabilities[0] != "a" {
		t.Errorf("not sorted: %+v", l)
	}
	l.Tools = append(l.Tools, l.Tools[0])
	l.Normalize()
	if _, err := l.Marshal(); !errors.Is(err, ErrMalformed) {
		t.Errorf("a tool twice: %v, want ErrMalformed", err)
	}
}

func TestToolDigest(t *testing.T) {
	a, err := ToolDigest("tool.x", "d", json.RawMessage(`{"type":"object","properties":{"b":{},"a":{}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if want := Digest([]byte(`{"description":"d","input_schema":{"properties":{"a":{},"b":{}},"type":"object"},"kind":"tool.x"}`)); a != want {
		t.Errorf("ToolDigest = %s, want %s", a, want)
	}
	b, err := ToolDigest("tool.x", "d ", json.RawMessage(`{ "properties": {"a":{}, "b":{}}, "type": "object" }`))
	if err != nil || a == b {
		t.Errorf("another description gives %s, %v; want another digest", b, err)
	}
	for _, schema := range []string{"", "null", "[]", `{"a":1,"a":2}`, "{} {}"} {
		if d, err := ToolDigest("tool.x", "d", json.RawMessage(schema)); err == nil {
			t.Errorf("ToolDigest with the schema %q = %s, want an error", schema, d)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(mustMarshal(f, sample()))
	f.Add([]byte(`{"schema":"autonomy.lock/v0"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := Parse(data)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("%v does not wrap ErrMalformed", err)
			}
			return
		}
		// One content, one encoding.
		recorded := l.Fingerprint
		again, err := l.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if recorded == l.Fingerprint && !bytes.Equal(again, data) {
			t.Fatalf("two encodings of one lock:\n%q\n%q", data, again)
		}
	})
}

func BenchmarkParseVerify(b *testing.B) {
	data := mustMarshal(b, sample())
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		l, err := Parse(data)
		if err != nil {
			b.Fatal(err)
		}
		if err := l.Verify(); err != nil {
			b.Fatal(err)
		}
	}
}
