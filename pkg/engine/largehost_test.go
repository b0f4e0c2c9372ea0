package engine

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

// passer makes pass after pass over one host, as the engine does once it has
// been running for a while.
type passer struct {
	view   *largeHost
	list   []probes.Probe
	memory []*probes.Memory
	now    time.Time
}

func newPasser(h *largeHost, names ...string) *passer {
	p := &passer{view: h, now: time.Now()}
	for _, probe := range probes.Defaults().List() {
		if len(names) == 0 || probe.Name() == names[0] {
			p.list = append(p.list, probe)
			p.memory = append(p.memory, probes.NewMemory())
		}
	}
	return p
}

// largeRequire is what a storage node is required to have.
func largeRequire() probes.Require {
	return probes.Require{
		Packages: []probes.RequiredPackage{{Name: "iscsi"}, {Name: "multipath"}, {Name: "time"}},
		Modules:  []string{"iscsi_tcp", "dm_multipath"},
		Devices:  []probes.RequiredDevice{{ID: "/dev/disk/by-uuid/" + rootUUID, MountedAt: "/", FSType: "ext4"}},
	}
}

// pass runs the probes at the same time, a minute after the last pass by the
// clock they are given, and returns what they said.
func (p *passer) pass(ctx context.Context) []outcome {
	p.now = p.now.Add(time.Minute)
	p.view.next()
	out := make([]outcome, len(p.list))
	var wg sync.WaitGroup
	for i, probe := range p.list {
		in := probes.Input{Host: p.view, Now: p.now, Require: largeRequire(), Memory: p.memory[i]}
		wg.Go(func() { out[i] = run(ctx, probe, in, Deadline, func() {}) })
	}
	wg.Wait()
	return out
}

// healthy fails unless every probe found nothing wrong and saw everything.
func (p *passer) healthy(t testing.TB, out []outcome) {
	t.Helper()
	for i, o := range out {
		if s := finding.StatusOf(o.result, o.err); s != finding.OK || o.err != nil || len(o.result.Findings) > 0 {
			t.Errorf("%s: %s, want OK without findings: %.1000v\nerror: %.1000v", p.list[i].Name(), s, o.result.Findings, o.err)
		}
	}
	if n := p.view.commands.Load(); n > 0 {
		t.Errorf("%d commands were executed; a healthy idle pass executes none", n)
	}
}

// settle makes the passes after which nothing is new any more.
func (p *passer) settle(t testing.TB) {
	t.Helper()
	for range 2 {
		p.healthy(t, p.pass(t.Context()))
	}
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkPass measures a pass of all probes, and of each alone, over hosts of
// half, full and double size. Its cpu-ms/op is the processor time of the whole
// process, system calls and garbage collection included; ns/op is the time on
// the clock.
func BenchmarkPass(b *testing.B) {
	for _, s := range []struct {
		name     string
		num, den int
	}{{"half", 1, 2}, {"full", 1, 1}, {"double", 2, 1}} {
		h := newLargeHost(b, fullSize().times(s.num, s.den))
		names := []string{"all"}
		for _, p := range probes.Defaults().List() {
			names = append(names, p.Name())
		}
		for _, name := range names {
			b.Run(fmt.Sprintf("%s/%s", name, s.name), func(b *testing.B) {
				p := newPasser(h)
				if name != "all" {
					p = newPasser(h, name)
				}
				p.settle(b)
				b.ReportAllocs()
				var cpu time.Duration
				for b.Loop() {
					b.StopTimer()
					runtime.GC()
					b.StartTimer()
					before := cpuTime()
					out := p.pass(b.Context())
					cpu += cpuTime() - before
					b.StopTimer()
					p.healthy(b, out)
					b.StartTimer()
				}
				b.ReportMetric(cpu.Seconds()*1e3/float64(b.N), "cpu-ms/op")
			})
		}
	}
}

// cost is what one pass allocates.
type cost struct{ bytes, objects uint64 }

func (p *passer) cost(t testing.TB) cost {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	out := p.pass(t.Context())
	runtime.ReadMemStats(&after)
	p.healthy(t, out)
	return cost{after.TotalAlloc - before.TotalAlloc, after.Mallocs - before.Mallocs}
}

// TestLargeHost holds a pass over a large host to what it may allocate, and to
// growing no faster than the host. It counts and takes no time, so that it can
// not fail on a busy machine.
func TestLargeHost(t *testing.T) {
	measure := func(size hostSize) cost {
		p := newPasser(newLargeHost(t, size))
		first := p.cost(t)
		t.Logf("the first pass over %d processes and %d disks: %d bytes in %d objects", size.processes, size.disks(), first.bytes, first.objects)
		p.settle(t)
		return p.cost(t)
	}
	full, double := measure(fullSize()), measure(fullSize().times(2, 1))
	t.Logf("full: %d bytes in %d objects; double: %d bytes in %d objects", full.bytes, full.objects, double.bytes, double.objects)
	const most = 20 << 20
	if full.bytes > most {
		t.Errorf("one pass over a large host allocates %d bytes, want at most %d", full.bytes, most)
	}
	if grown := float64(double.bytes) / float64(full.bytes); grown > 2.2 {
		t.Errorf("a host of double the size costs %.2f times the bytes, want at most 2.2", grown)
	}
	if grown := float64(double.objects) / float64(full.objects); grown > 2.2 {
		t.Errorf("a host of double the size costs %.2f times the objects, want at most 2.2", grown)
	}
}
