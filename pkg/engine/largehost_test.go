package engine

import (
	"context"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
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
	ctx = host.AsOf(ctx, time.Now())
	out := make([]outcome, len(p.list))
	var wg sync.WaitGroup
	for i, probe := range p.list {
		in := probes.Input{Host: p.view, Now: p.now, Require: largeRequire(), Cluster: largeCluster{p.view.volumes}, Memory: p.memory[i]}
		wg.Go(func() { out[i] = run(ctx, probe, in, Deadline, nil, func() {}) })
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
	if n := p.view.asked.commands.Load(); n > 0 {
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

// cpuTime is what the process has used of the processors, in user mode and in
// the kernel.
func cpuTime() (user, sys time.Duration) {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano()), time.Duration(u.Stime.Nano())
}

// probeNames are those of the probes, and "all" for all of them at a time.
func probeNames() []string {
	names := []string{"all"}
	for _, p := range probes.Defaults().List() {
		names = append(names, p.Name())
	}
	return names
}

func newPasserOf(h *largeHost, name string) *passer {
	if name == "all" {
		return newPasser(h)
	}
	return newPasser(h, name)
}

// BenchmarkPass measures a pass of all probes, and of each alone, over hosts of
// half, full and double size, as an agent makes it that has been running for a
// while. Its cpu-ms/op is the processor time of the whole process, system calls
// and garbage collection included, sys-ms/op the kernel's part of it; ns/op is the
// time on the clock.
func BenchmarkPass(b *testing.B) {
	for _, s := range []struct {
		name     string
		num, den int
	}{{"half", 1, 2}, {"full", 1, 1}, {"double", 2, 1}} {
		h := newLargeHost(b, fullSize().times(s.num, s.den))
		for _, name := range probeNames() {
			b.Run(fmt.Sprintf("%s/%s", name, s.name), func(b *testing.B) {
				p := newPasserOf(h, name)
				p.settle(b)
				p.measure(b, func() {})
			})
		}
	}
}

// BenchmarkFirstPass measures what an agent does that has just started, or
// `agent check`.
func BenchmarkFirstPass(b *testing.B) {
	h := newLargeHost(b, fullSize())
	for _, name := range probeNames() {
		b.Run(name, func(b *testing.B) {
			p := newPasserOf(h, name)
			p.measure(b, func() {
				h.open(b)
				for i := range p.memory {
					p.memory[i] = probes.NewMemory()
				}
			})
		})
	}
}

// growTo is how far BenchmarkGrowth goes; `make plots` goes to 100,000, which
// takes minutes and gigabytes.
var growTo = flag.Int("grow", 1000, "how large the hosts of BenchmarkGrowth become")

// BenchmarkGrowth measures passes over hosts that have more and more of one
// thing, and little of the others. multipathd's own client takes no more than
// 32 MiB, which 40,000 paths come near.
func BenchmarkGrowth(b *testing.B) {
	for _, of := range []struct {
		name string
		most int
		size func(n int) hostSize
	}{
		{"processes", 100000, func(n int) hostSize {
			return hostSize{processes: n, mounts: 60, maps: 4, pods: max(4, min(n/20, 500)), packages: 300}
		}},
		{"mounts", 100000, func(n int) hostSize {
			return hostSize{processes: 200, mounts: n, maps: 4, pods: 10, packages: 300}
		}},
		{"disks", 100000, func(n int) hostSize {
			return hostSize{processes: 200, mounts: 60, maps: 4, alone: n - 4*pathsPerMap, pods: 10, packages: 300}
		}},
		{"paths", 40000, func(n int) hostSize {
			return hostSize{processes: 200, mounts: 60, maps: n / pathsPerMap, pods: 10, packages: 300}
		}},
	} {
		for n := 100; n <= *growTo; n *= 10 {
			size := of.size(min(n, of.most))
			b.Run(fmt.Sprintf("%s/%d", of.name, min(n, of.most)), func(b *testing.B) {
				h := newLargeHost(b, size)
				p := newPasser(h)
				p.settle(b)
				p.measure(b, func() {})
			})
		}
	}
}

// measure times passes; before is done in front of each.
func (p *passer) measure(b *testing.B, before func()) {
	b.ReportAllocs()
	var user, sys time.Duration
	for b.Loop() {
		b.StopTimer()
		before()
		runtime.GC()
		b.StartTimer()
		u, s := cpuTime()
		out := p.pass(b.Context())
		u2, s2 := cpuTime()
		user, sys = user+u2-u, sys+s2-s
		b.StopTimer()
		p.healthy(b, out)
		b.StartTimer()
	}
	b.ReportMetric((user+sys).Seconds()*1e3/float64(b.N), "cpu-ms/op")
	b.ReportMetric(sys.Seconds()*1e3/float64(b.N), "sys-ms/op")
}

// cost is what a pass takes that does not depend on the machine.
type cost struct {
	// files that were opened, questions to systemd, connections to daemons,
	// ioctls of device-mapper, statfs of mounts, questions to the kubelet.
	files, units, dials, ioctls, statfs, kubelet int64
	// bytes and objects that were allocated.
	bytes, objects int64
}

func (c cost) list() []int64 {
	return []int64{c.files, c.units, c.dials, c.ioctls, c.statfs, c.kubelet, c.objects, c.bytes}
}

// spent is the cost of all that was done so far.
func (h *largeHost) spent() cost {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return cost{
		files: h.Opened(), units: h.asked.units.Load(), dials: h.asked.dials.Load(), ioctls: h.asked.ioctls.Load(),
		statfs: h.asked.statfs.Load(), kubelet: h.asked.kubelet.Load(),
		bytes: int64(m.TotalAlloc), objects: int64(m.Mallocs),
	}
}

// cost is the mean of some passes.
func (p *passer) cost(t testing.TB, passes int64) cost {
	t.Helper()
	var sum cost
	for range passes {
		before := p.view.spent()
		out := p.pass(t.Context())
		after := p.view.spent()
		p.healthy(t, out)
		sum.files += after.files - before.files
		sum.units += after.units - before.units
		sum.dials += after.dials - before.dials
		sum.ioctls += after.ioctls - before.ioctls
		sum.statfs += after.statfs - before.statfs
		sum.kubelet += after.kubelet - before.kubelet
		sum.bytes += after.bytes - before.bytes
		sum.objects += after.objects - before.objects
	}
	for _, n := range []*int64{&sum.files, &sum.units, &sum.dials, &sum.ioctls, &sum.statfs, &sum.kubelet, &sum.bytes, &sum.objects} {
		*n = (*n + passes - 1) / passes
	}
	return sum
}

// TestLargeHost holds a pass over a large host to what it may allocate, and to
// growing no faster than the host. It counts and takes no time, so that it can
// not fail on a busy machine.
func TestLargeHost(t *testing.T) {
	measure := func(size hostSize) cost {
		p := newPasser(newLargeHost(t, size))
		first := p.cost(t, 1)
		t.Logf("the first pass over %d processes and %d disks: %d bytes in %d objects", size.processes, size.disks(), first.bytes, first.objects)
		p.settle(t)
		return p.cost(t, 3)
	}
	full, double := measure(fullSize()), measure(fullSize().times(2, 1))
	t.Logf("full: %d bytes in %d objects; double: %d bytes in %d objects", full.bytes, full.objects, double.bytes, double.objects)
	const most = 10 << 20
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

var update = flag.Bool("update", false, "write testdata/largehost.cost as it comes out")

// costColumns are those of testdata/largehost.cost, and by how much each may be
// over before it fails: counts vary with what is due for another look, what is
// allocated also with the order in which the probes run.
var costColumns = []struct {
	name  string
	slack float64
}{
	{"files", 0.03}, {"units", 0}, {"dials", 0}, {"ioctls", 0}, {"statfs", 0}, {"kubelet", 0}, {"objects", 0.15}, {"bytes", 0.15},
}

// TestCostOfAPass holds what a pass over the large host opens, asks and allocates
// to the checked-in table, for each probe: the first pass, and the mean of ten
// that follow, a minute apart. It looks at no clock. What a probe needs for more
// is said in the commit that writes the table anew (go test ./pkg/engine -run
// TestCostOfAPass -update).
func TestCostOfAPass(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates too")
	}
	const file = "testdata/largehost.cost"
	h := newLargeHost(t, fullSize())
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "pass\tprobe\t")
	for _, c := range costColumns {
		fmt.Fprintf(w, "%s\t", c.name)
	}
	fmt.Fprintln(w)
	want := readCosts(t, file)
	for _, name := range probeNames() {
		h.open(t)
		p := newPasserOf(h, name)
		for _, kind := range []string{"first", "next"} {
			passes := int64(1)
			if kind == "next" {
				passes = 10
				p.settle(t)
			}
			got := p.cost(t, passes).list()
			fmt.Fprintf(w, "%s\t%s\t", kind, name)
			for _, n := range got {
				fmt.Fprintf(w, "%d\t", n)
			}
			fmt.Fprintln(w)
			if *update {
				continue
			}
			most, ok := want[kind+" "+name]
			if !ok {
				t.Errorf("%s has no line for %q, %s pass", file, name, kind)
				continue
			}
			for i, c := range costColumns {
				// A few allocations are the runtime's own.
				if limit := float64(most[i])*(1+c.slack) + map[bool]float64{c.slack > 0.1: 200}[true]; float64(got[i]) > limit {
					t.Errorf("the %s pass of %s: %d %s, %d in %s", kind, name, got[i], c.name, most[i], file)
				}
			}
		}
	}
	w.Flush()
	if *update {
		if err := os.WriteFile(file, []byte(text.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("\n%s", text.String())
}

// readCosts reads the table: lines of the pass, the probe and its costs.
func readCosts(t *testing.T, file string) map[string][]int64 {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil && !*update {
		t.Fatal(err)
	}
	costs := map[string][]int64{}
	for i, line := range strings.Split(string(data), "\n") {
		f := strings.Fields(line)
		if i == 0 || len(f) == 0 {
			continue
		}
		if len(f) != 2+len(costColumns) {
			t.Fatalf("%s line %d: %d fields", file, i+1, len(f))
		}
		for _, word := range f[2:] {
			n, err := strconv.ParseInt(word, 10, 64)
			if err != nil {
				t.Fatalf("%s line %d: %v", file, i+1, err)
			}
			costs[f[0]+" "+f[1]] = append(costs[f[0]+" "+f[1]], n)
		}
	}
	return costs
}
