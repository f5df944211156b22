package sandbox

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkSpawn runs /bin/true in turn plainly and with more and more layers,
// and reports what each costs as a multiple of plain fork, exec and wait: of the
// fast tenth of the runs, which other work on the machine disturbs least.
func BenchmarkSpawn(b *testing.B) {
	type variant struct {
		name string
		run  func()
		took []time.Duration
	}
	held := func(name string, off ...string) *variant {
		s := openWith(b, Options{Off: off, RunDir: b.TempDir()})
		return &variant{name: name, run: func() {
			p, err := s.Start(b.Context(), &Command{Argv: []string{"/bin/true"}})
			if err != nil {
				b.Fatal(err)
			}
			if e := p.Wait(b.Context(), func([]byte) {}, func([]byte) {}); e.Status != 0 || e.Left != nil {
				b.Fatalf("%+v", e)
			}
		}}
	}
	variants := []*variant{
		{name: "plain", run: func() {
			if err := exec.Command("/bin/true").Run(); err != nil {
				b.Fatal(err)
			}
		}},
		held("cgroup", LayerNamespaces, LayerView, LayerUser, LayerEgress, LayerLandlock, LayerSeccomp),
		held("cgroup+ns+egress", LayerView, LayerUser, LayerLandlock, LayerSeccomp),
		held("cgroup+ns+view+user+egress", LayerLandlock, LayerSeccomp),
		held("all"),
	}
	for b.Loop() {
		for _, v := range variants {
			began := time.Now()
			v.run()
			v.took = append(v.took, time.Since(began))
		}
	}
	for _, v := range variants {
		slices.Sort(v.took)
		fast := func(v *variant) float64 { return float64(v.took[len(v.took)/10]) }
		b.ReportMetric(fast(v)/fast(variants[0]), v.name+"/plain")
	}
	b.ReportMetric(0, "ns/op") // of all variants together: says nothing
}

// BenchmarkConnect connects a UDP socket, which is the egress programs' work and
// little else, with and without them.
func BenchmarkConnect(b *testing.B) {
	for name, off := range map[string][]string{
		"without": {LayerNamespaces, LayerView, LayerUser, LayerEgress, LayerLandlock, LayerSeccomp},
		"with":    {LayerNamespaces, LayerView, LayerUser, LayerLandlock, LayerSeccomp},
	} {
		b.Run(name, func(b *testing.B) {
			s := openWith(b, Options{Off: off})
			c := escape(b, "connect-loop")
			if s.gate != nil {
				c.Egress = []string{"127.0.0.0/8:9", "10.0.0.0/8:9", "127.0.0.1:443"}
			}
			var perOp float64
			for b.Loop() {
				_, out := run(b, s, c)
				d, err := time.ParseDuration(strings.TrimSuffix(out, "\nOK\n"))
				if err != nil {
					b.Fatal(out)
				}
				if ns := float64(d) / connects; perOp == 0 || ns < perOp {
					perOp = ns
				}
			}
			b.ReportMetric(perOp, "ns/connect")
			b.ReportMetric(0, "ns/op")
		})
	}
}

const connects = 200000

// connectLoop says how long that many connects took.
func connectLoop() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	sa := &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}
	began := time.Now()
	for range connects {
		if err := unix.Connect(fd, sa); err != nil {
			return err
		}
	}
	fmt.Println(time.Since(began))
	return nil
}
