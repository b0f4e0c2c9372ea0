package probes

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

// startedKubelet is a host whose kubelet has this PID, start, command line,
// configuration and user.
func startedKubelet(t *testing.T, pid, start int, args, config, uid string) *hosttest.Noting {
	t.Helper()
	return hosttest.Note(hosttest.Parse(t, fmt.Sprintf(`
-- procs --
1 systemd ppid=0
%[1]d kubelet start=%[2]d
-- links --
/proc/1/ns/mnt -> mnt:[1]
/proc/1/ns/net -> net:[1]
/proc/1/ns/user -> user:[1]
/proc/%[1]d/ns/mnt -> mnt:[1]
/proc/%[1]d/ns/net -> net:[1]
/proc/%[1]d/ns/user -> user:[1]
/proc/%[1]d/cwd -> /
-- treebin/proc/%[1]d/cmdline --
kubelet\x00%[3]s\x00
-- tree/proc/%[1]d/cgroup --
0::/system.slice/kubelet.service
-- tree/proc/%[1]d/status --
Uid:	0	%[5]s	0	0
-- tree/etc/kubelet.yaml --
%[4]s
-- kubelet/configz --
{"kubeletconfig": {"maxPods": %[2]d}}
`, pid, start, args, config, uid)))
}

// TestKubeletIsRemembered: what a kubelet was started with is read again when
// another process takes its place, and every few minutes; its files in every pass.
func TestKubeletIsRemembered(t *testing.T) {
	const args = `--config=/etc/kubelet.yaml`
	memory, now := NewMemory(), time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	look := func(after time.Duration, v *hosttest.Noting) (k Kubelet, restart, running KubeletConfig) {
		t.Helper()
		now = now.Add(after)
		in := Input{Host: v, Now: now, Memory: memory}
		memory.Begin()
		k, ok, err := findKubelet(t.Context(), in)
		if err != nil || !ok {
			t.Fatalf("%v, %v", ok, err)
		}
		if restart, err = k.configOnRestart(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		if running, err = k.runningConfig(t.Context(), in, 0); err != nil {
			t.Fatal(err)
		}
		return k, restart, running
	}
	asked := func(v *hosttest.Noting) bool {
		return slices.ContainsFunc(v.Names(), func(n string) bool { return strings.HasSuffix(n, "/cmdline") })
	}
	first := startedKubelet(t, 640, 100, args, "maxPods: 50", "0")
	if _, restart, running := look(0, first); restart.MaxPods != 50 || running.MaxPods != 100 || !asked(first) {
		t.Errorf("%+v, %+v", restart, running)
	}
	// The same process says the same, whatever it would say now.
	again := startedKubelet(t, 640, 100, `--config=/elsewhere`, "maxPods: 51", "0")
	if _, restart, _ := look(time.Minute, again); restart.MaxPods != 51 || asked(again) {
		t.Errorf("a minute later %+v; looked at: %q", restart, again.Names())
	}
	other := startedKubelet(t, 640, 200, args, "maxPods: 51", "0")
	if k, _, running := look(time.Minute, other); k.StartTicks != 200 || running.MaxPods != 200 || !asked(other) {
		t.Errorf("another process with its PID: %+v, %+v", k, running)
	}
	flags := startedKubelet(t, 641, 200, args+`\x00--max-pods=7`, "maxPods: 51", "0")
	if _, restart, _ := look(time.Minute, flags); restart.MaxPods != 7 {
		t.Errorf("one with other flags: %+v", restart)
	}
	later := startedKubelet(t, 641, 200, args, "maxPods: 51", "0")
	if _, restart, _ := look(seldomFor, later); restart.MaxPods != 51 || !asked(later) {
		t.Errorf("after %s: %+v", seldomFor, restart)
	}
}

// TestOfTheHostIsRemembered: a daemon that gives up root does so within a moment
// of its start, and one that is somebody else's stays that.
func TestOfTheHostIsRemembered(t *testing.T) {
	memory, now := NewMemory(), time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	look := func(after time.Duration, start int, uid string) (ours, read bool) {
		t.Helper()
		now = now.Add(after)
		v := startedKubelet(t, 640, start, "", "", uid)
		memory.Begin()
		procs, err := processesNamed(t.Context(), v, func(comm string) bool { return comm == "kubelet" }, false)
		if err != nil {
			t.Fatal(err)
		}
		ours = slices.ContainsFunc(ofTheHost(t.Context(), Input{Host: v, Now: now, Memory: memory}, procs), func(p host.Process) bool { return p.PID == 640 })
		return ours, slices.Contains(v.Names(), "/proc/640/status")
	}
	for i, step := range []struct {
		after      time.Duration
		start      int
		uid        string
		ours, read bool
	}{
		{0, 100, "0", true, true},
		{time.Minute, 100, "7", false, true}, // it has given up root
		{time.Minute, 100, "7", false, false},
		{time.Minute, 200, "0", true, true}, // another one
		{placesItself, 200, "0", true, false},
		{time.Minute, 200, "7", true, false},
		{seldomFor, 200, "7", false, true},
		{seldomFor, 200, "7", false, true},
		{time.Minute, 200, "7", false, false},
	} {
		if ours, read := look(step.after, step.start, step.uid); ours != step.ours || read != step.read {
			t.Errorf("step %d: the host's %v, want %v; looked at %v, want %v", i, ours, step.ours, read, step.read)
		}
	}
}
