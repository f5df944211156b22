package tool_test

import (
	"os/exec"
	"testing"

	"github.com/autonomyops/autonomy/node/tool"
)

// The cost of what stands between a decision and a tool. "spawn" is to be read
// beside "os/exec", the least that a process costs here.
func Benchmark(b *testing.B) {
	r, err := tool.Parse([]byte("tools: {tool.echo: {}, tool.exec.true: {argv: [/bin/true, '{x}'], params: {x: {}}}}"), tool.Options{})
	if err != nil {
		b.Fatal(err)
	}
	echo, _ := r.Lookup("tool.echo")
	prog, _ := r.Lookup("tool.exec.true")
	params := []byte(`{"x":"hello"}`)
	b.Run("validate", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := prog.Validate(params); err != nil {
				b.Fatal(err)
			}
		}
	})
	for name, t := range map[string]*tool.Tool{"echo": echo, "spawn": prog} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if res := r.Execute(b.Context(), t, &tool.Request{Params: params}); res.Outcome != tool.OutcomeOK {
					b.Fatalf("%+v", res)
				}
			}
		})
	}
	b.Run("os/exec", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := exec.Command("/bin/true", "hello").Run(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
