package engine

import (
	"fmt"
	"hash/fnv"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
	"github.com/hosthygiene/agent/pkg/probes"
)

// shared is what package host reads by itself, for any probe.
func shared(name string) bool {
	if pid, ok := strings.CutPrefix(name, "/proc/"); ok && pid != "" && pid[0] >= '0' && pid[0] <= '9' {
		return true
	}
	for _, dir := range []string{"/sys/block", "/sys/dev", "/sys/devices", "/sys/class/block", "/dev", "/etc/os-release", "/usr/lib/os-release", "/proc/stat", "/proc/sys/kernel/osrelease"} {
		if name == dir || strings.HasPrefix(name, dir+"/") || strings.HasPrefix(dir, name+"/") {
			return true
		}
	}
	return name == "/"
}

// hostileFiles are what stands in the place of a file.
var hostileFiles = []struct {
	name string
	put  func(at string) error
}{
	{"a FIFO", func(at string) error { return syscall.Mkfifo(at, 0o666) }},
	{"a loop", func(at string) error { return os.Symlink(path.Base(at), at) }},
	{"a directory", func(at string) error { return os.MkdirAll(at+"/\x1b[2J\n", 0o755) }},
	{"a file of 10 GB", func(at string) error {
		if err := os.WriteFile(at, nil, 0o644); err != nil {
			return err
		}
		return os.Truncate(at, 10<<30)
	}},
	{"garbage", func(at string) error {
		return os.WriteFile(at, []byte(strings.Repeat("\x00\xff\n\x1b[2J: = (,) -9223372036854775808 18446744073709551616 NaN\n", 100)), 0o644)
	}},
	{"a socket", func(at string) error { return syscall.Mknod(at, syscall.S_IFSOCK|0o666, 0) }},
}

// words is all that a probe says, but for what moves by itself.
func (o outcome) words() string {
	var b strings.Builder
	fmt.Fprintln(&b, finding.StatusOf(o.result, o.err), o.err, o.result.Summary)
	for _, f := range o.result.Findings {
		fmt.Fprintln(&b, f.Severity, f.Reason, f.Subject, f.Message, f.Evidence)
	}
	return b.String()
}

// TestOneHostileFile: what stands in the place of one file is the trouble of the
// probes that read it. All others, at work at the same time over the same host,
// say word for word what they said without. HYGIENE_NIGHTLY=1 tries everything
// everywhere.
func TestOneHostileFile(t *testing.T) {
	h := newLargeHost(t, fullSize().times(1, 50))
	list := probes.Defaults().List()
	now := time.Now()
	pass := func(view func(i int) host.View) []outcome {
		out := make([]outcome, len(list))
		ctx := host.AsOf(t.Context(), now)
		var wg sync.WaitGroup
		for i, p := range list {
			in := probes.Input{Host: view(i), Now: now, Require: largeRequire(), Cluster: largeCluster{}, Memory: probes.NewMemory()}
			wg.Go(func() { out[i] = run(ctx, p, in, Deadline, nil, func() {}) })
		}
		wg.Wait()
		return out
	}
	readers := make([]*hosttest.Noting, len(list))
	for i := range list {
		readers[i] = hosttest.Note(h)
	}
	well := pass(func(i int) host.View { return readers[i] })
	names := map[string]bool{}
	for _, r := range readers {
		for _, name := range r.Names() {
			names[name] = true
		}
	}
	everything := os.Getenv("HYGIENE_NIGHTLY") != ""
	passes, troubled := 0, map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		dir, err := h.RealPath(t.Context(), path.Dir(name))
		if err != nil || shared(name) {
			continue
		}
		real := path.Join(dir, path.Base(name))
		for n, s := range hostileFiles {
			hash := fnv.New32()
			fmt.Fprint(hash, name)
			if !everything && int(hash.Sum32())%(4*len(hostileFiles)) != n {
				continue
			}
			passes++
			at, aside := h.dir+real, h.dir+".aside"
			err := os.Rename(at, aside)
			was := err == nil
			if err := s.put(at); err != nil {
				t.Fatal(name, err)
			}
			h.open(t)
			out := pass(func(int) host.View { return h })
			for i, p := range list {
				got, want := out[i].words(), well[i].words()
				if readers[i].Depends(name) || readers[i].Depends(real) {
					troubled[p.Name()] = troubled[p.Name()] || got != want
				} else if got != want {
					t.Errorf("%s in place of %s changes the answer of %s, which does not read it:\n%s\nwithout:\n%s", s.name, name, p.Name(), got, want)
				}
			}
			if err := os.RemoveAll(at); err != nil {
				t.Fatal(err)
			}
			if was {
				if err := os.Rename(aside, at); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	h.open(t)
	for i, o := range pass(func(int) host.View { return h }) {
		if got, want := o.words(), well[i].words(); got != want {
			t.Errorf("in the end %s says another thing than at first:\n%s\nat first:\n%s", list[i].Name(), got, want)
		}
	}
	t.Logf("%d passes, %d names; troubled: %v", passes, len(names), slices.Sorted(maps.Keys(troubled)))
	if len(troubled) < len(list)-2 {
		t.Errorf("only %v were troubled by anything: the files are none that matter", slices.Sorted(maps.Keys(troubled)))
	}
}
