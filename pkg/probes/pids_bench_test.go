package probes

import (
	"fmt"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

// BenchmarkProcesses measures a pass over hosts of half, the whole and double
// the size that must stay cheap; time and memory are to grow with it, no faster.
// The process table is shared with the other probes and cached, so it does not
// count here.
func BenchmarkProcesses(b *testing.B) {
	for _, n := range []int{5000, 10000, 20000} {
		h := hosttest.Parse(b, benchHost(n))
		for _, p := range []Probe{DefaultPIDs(), DefaultOOM()} {
			b.Run(fmt.Sprintf("%s/%d", p.Name(), n), func(b *testing.B) {
				b.ReportAllocs()
				in := Input{Host: h, Memory: NewMemory()}
				for b.Loop() {
					in.Now = in.Now.Add(time.Minute)
					in.Memory.Begin()
					r, err := p.Check(b.Context(), in)
					if err != nil || len(r.Findings) > 0 {
						b.Fatal(r.Findings, err)
					}
				}
			})
		}
	}
}
