package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hosthygiene/agent/pkg/host"
)

// replace puts a new file in the place of one, which may have many names.
func (h *largeHost) replace(t *testing.T, name, text string) {
	t.Helper()
	full := h.dir + name
	if err := os.WriteFile(full+".new", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(full+".new", full); err != nil {
		t.Fatal(err)
	}
}

// edit replaces text in a file.
func (h *largeHost) edit(t *testing.T, name, old, new string) {
	t.Helper()
	data, err := os.ReadFile(h.dir + name)
	if err != nil || !strings.Contains(string(data), old) {
		t.Fatalf("%s has no %q: %v", name, old, err)
	}
	h.replace(t, name, strings.Replace(string(data), old, new, 1))
}

func (h *largeHost) real(t *testing.T, name string) string {
	t.Helper()
	full, err := filepath.EvalSymlinks(h.dir + name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimPrefix(full, h.dir)
}

// process adds a process of a container, with a score.
func (h *largeHost) process(t *testing.T, pid int, score string) {
	b := &builder{t: t, dir: h.dir, made: map[string]bool{}}
	dir := b.process(pid, firstPodPID, "again", false, 3)
	b.file(dir+"/oom_score_adj", score+"\n")
	b.file(dir+"/oom_score", "1\n")
}

// told lists the findings of all probes and the errors, each as "reason subject".
func told(out []outcome) []string {
	var all []string
	for _, o := range out {
		for _, f := range o.result.Findings {
			all = append(all, f.Reason+" "+f.Subject)
		}
		if o.err != nil {
			all = append(all, "error "+o.err.Error())
		}
	}
	slices.Sort(all)
	return all
}

// TestChangesAreSeen makes, between two passes over a host of which all is
// remembered that ever is, the changes that what is remembered could hide, and
// expects each to be told by the next pass, and no longer by the one after it was
// undone.
func TestChangesAreSeen(t *testing.T) {
	size := hostSize{processes: 400, mounts: 80, maps: 4, pods: 8, packages: 50}
	// The second container of the second pod, which is Burstable.
	pod := "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + strings.ReplaceAll(podUID(1), "-", "_") + ".slice"
	box := pod + "/cri-containerd-" + containerName(1, 1) + ".scope"
	firstOf := func(t *testing.T, h *largeHost) string {
		data, err := os.ReadFile(h.dir + box + "/cgroup.procs")
		if err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(string(data), "\n")
		return first
	}
	for _, tt := range []struct {
		name string
		// change makes the change and returns what undoes it.
		change func(t *testing.T, h *largeHost) (undo func())
		want   string
		// first is done before the passes.
		first func(t *testing.T, h *largeHost)
		// after is how many passes it may take to be seen, where that is not
		// the next.
		after int
	}{
		{name: "a disk goes offline", want: "PathsDegraded mpatha", change: func(t *testing.T, h *largeHost) func() {
			state := h.real(t, "/sys/block/sda/device") + "/state"
			h.replace(t, state, "offline\n")
			return func() { h.replace(t, state, "running\n") }
		}},
		{name: "another disk takes the name", want: "PathsDegraded mpatha", change: func(t *testing.T, h *largeHost) func() {
			// All of the device is made anew, in another place.
			old := h.real(t, "/sys/block/sda/device")
			place := strings.ReplaceAll(old, "/3:0:0:0", "/3:0:0:9")
			move := func(from, to, state string) {
				if err := os.Rename(h.dir+from, h.dir+to); err != nil {
					t.Fatal(err)
				}
				for _, link := range []string{"/sys/block/sda", "/sys/class/block/sda", "/sys/dev/block/8:0"} {
					was, err := os.Readlink(h.dir + link)
					if err != nil {
						t.Fatal(err)
					}
					if err := os.Remove(h.dir + link); err != nil {
						t.Fatal(err)
					}
					if err := os.Symlink(strings.ReplaceAll(was, strings.TrimPrefix(from, "/sys"), strings.TrimPrefix(to, "/sys")), h.dir+link); err != nil {
						t.Fatal(err)
					}
				}
				h.replace(t, to+"/state", state)
			}
			move(old, place, "transport-offline\n")
			return func() { move(place, old, "running\n") }
		}},
		{name: "the directory of a disk is made anew", want: "PathsDegraded mpatha", change: func(t *testing.T, h *largeHost) func() {
			unit := h.dir + h.real(t, "/sys/block/sda/device")
			anew := func(state string) {
				entries, err := os.ReadDir(unit)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.Mkdir(unit+".new", 0o755); err != nil {
					t.Fatal(err)
				}
				for _, e := range entries {
					if err := os.Rename(unit+"/"+e.Name(), unit+".new/"+e.Name()); err != nil {
						t.Fatal(err)
					}
				}
				if err := os.Remove(unit); err != nil {
					t.Fatal(err)
				}
				if err := os.Rename(unit+".new", unit); err != nil {
					t.Fatal(err)
				}
				h.replace(t, strings.TrimPrefix(unit, h.dir)+"/state", state)
			}
			anew("offline\n")
			return func() { anew("running\n") }
		}},
		{name: "a path is larger than the others", want: "DuplicateDeviceID naa.6001405000000000000000000000000", change: func(t *testing.T, h *largeHost) func() {
			h.replace(t, "/sys/block/sda/size", "209715202\n")
			h.edit(t, "/proc/partitions", "104857600 sda\n", "104857601 sda\n")
			return func() {
				h.replace(t, "/sys/block/sda/size", "209715200\n")
				h.edit(t, "/proc/partitions", "104857601 sda\n", "104857600 sda\n")
			}
		}},
		{name: "a disk has another's identity", want: "DuplicateDeviceID naa.6001405000000000000000000000001", change: func(t *testing.T, h *largeHost) func() {
			wwid := h.real(t, "/sys/block/sda/device") + "/wwid"
			h.edit(t, wwid, "0\n", "1\n")
			return func() { h.edit(t, wwid, "1\n", "0\n") }
		}},
		{name: "multipathd finds a path faulty", want: "PathsDegraded mpatha", change: func(t *testing.T, h *largeHost) func() {
			well := h.mapsReply.Load()
			ill := frame(strings.Replace(string((*well)[8:len(*well)-1]), `"chk_st" : "ready"`, `"chk_st" : "faulty"`, 1))
			h.mapsReply.Store(&ill)
			return func() { h.mapsReply.Store(well) }
		}},
		{name: "the kernel fails a path", want: "PathsDegraded mpatha", change: func(t *testing.T, h *largeHost) func() {
			target := &h.maps[0].Targets[0]
			well := target.Status
			h.maps[0].Targets = []host.DMTarget{*target}
			h.maps[0].Targets[0].Status = strings.Replace(well, "8:0 A", "8:0 F", 1)
			return func() { h.maps[0].Targets[0].Status = well }
		}},
		{name: "a thin pool comes under a number that was a map's", want: "error thin pool", change: func(t *testing.T, h *largeHost) func() {
			link := h.dir + "/sys/block/dm-1"
			to, err := os.Readlink(link)
			if err != nil {
				t.Fatal(err)
			}
			again := func(uuid string) {
				if err := os.Remove(link); err != nil {
					t.Fatal(err)
				}
				if err := os.Symlink(to, link); err != nil {
					t.Fatal(err)
				}
				h.replace(t, "/sys/devices/virtual/block/dm-1/dm/uuid", uuid)
			}
			again("LVM-abc-tpool\n")
			h.maps = append(h.maps, host.DMDevice{Name: "pool", UUID: "LVM-abc-tpool", Dev: host.DevNum{Major: 253, Minor: 1}, Targets: []host.DMTarget{{Type: "thin-pool", Status: "x"}}})
			return func() {
				h.maps = h.maps[:len(h.maps)-1]
				again("mpath-" + mapWWID(1) + "\n")
			}
		}},
		{name: "a session fails", want: "SessionFailed 00000000", change: func(t *testing.T, h *largeHost) func() {
			state := h.real(t, "/sys/class/iscsi_session/session2") + "/state"
			h.replace(t, state, "FAILED\n")
			return func() { h.replace(t, state, "LOGGED_IN\n") }
		}},
		{name: "a session is made to wait longer", want: "RecoveryTimeoutHigh node.session", change: func(t *testing.T, h *largeHost) func() {
			tmo := h.real(t, "/sys/class/iscsi_session/session2") + "/recovery_tmo"
			h.replace(t, tmo, "120\n")
			return func() { h.replace(t, tmo, "5\n") }
		}},
		{name: "the initiator's file is changed", want: "InitiatorNameChanged /etc/iscsi", change: func(t *testing.T, h *largeHost) func() {
			h.replace(t, "/etc/iscsi/initiatorname.iscsi", "InitiatorName="+initiator+"x\n")
			return func() { h.replace(t, "/etc/iscsi/initiatorname.iscsi", "InitiatorName="+initiator+"\n") }
		}},
		{name: "a session logs in under another name", want: "InitiatorNameChanged /etc/iscsi", after: 10, change: func(t *testing.T, h *largeHost) func() {
			name := h.real(t, "/sys/class/iscsi_session/session2") + "/initiatorname"
			h.replace(t, name, initiator+"x\n")
			return func() { h.replace(t, name, initiator+"\n") }
		}},
		{name: "a file system is made read-only", want: "FilesystemReadOnly", change: func(t *testing.T, h *largeHost) func() {
			h.edit(t, "/proc/1/mountinfo", "ext4 /dev/vda1 rw,errors", "ext4 /dev/vda1 ro,errors")
			return func() { h.edit(t, "/proc/1/mountinfo", "ext4 /dev/vda1 ro,errors", "ext4 /dev/vda1 rw,errors") }
		}},
		{name: "systemd reads the mount unit that a package brought", want: "UnstableDeviceName", change: func(t *testing.T, h *largeHost) func() {
			const unit, generated = "/usr/lib/systemd/system/data.mount", "/run/systemd/generator"
			b := &builder{t: t, dir: h.dir, made: map[string]bool{}}
			b.file(unit, "[Mount]\nWhat=/dev/sdb1\nWhere=/data\n")
			b.file(generated+"/swap.target.wants", "")
			return func() { os.Remove(h.dir + unit); os.RemoveAll(h.dir + generated) }
		}},
		{name: "a score is rewritten", want: "OOMScoreDrift", change: func(t *testing.T, h *largeHost) func() {
			score := "/proc/" + firstOf(t, h) + "/oom_score_adj"
			h.replace(t, score, "-500\n")
			return func() { h.replace(t, score, "990\n") }
		}},
		{name: "a container is started again in its pod", want: "OOMScoreDrift", change: func(t *testing.T, h *largeHost) func() {
			first := firstOf(t, h)
			h.process(t, 99999, "-500")
			if err := os.Rename(h.dir+"/proc/"+first, h.dir+"/ended"); err != nil {
				t.Fatal(err)
			}
			h.replace(t, box+"/cgroup.procs", "99999\n")
			return func() {
				if err := os.Rename(h.dir+"/ended", h.dir+"/proc/"+first); err != nil {
					t.Fatal(err)
				}
				h.replace(t, box+"/cgroup.procs", first+"\n")
			}
		}},
		{name: "a container is new in its pod", want: "OOMScoreDrift", first: func(t *testing.T, h *largeHost) {
			if err := os.Rename(h.dir+box, h.dir+"/box"); err != nil {
				t.Fatal(err)
			}
		}, change: func(t *testing.T, h *largeHost) func() {
			if err := os.Rename(h.dir+"/box", h.dir+box); err != nil {
				t.Fatal(err)
			}
			h.process(t, 99999, "-500")
			was := firstOf(t, h)
			h.replace(t, box+"/cgroup.procs", "99999\n")
			return func() { h.replace(t, box+"/cgroup.procs", was+"\n") }
		}},
		{name: "swap is switched on", want: "SwapEnabled", change: func(t *testing.T, h *largeHost) func() {
			h.edit(t, "/proc/swaps", "Priority\n", "Priority\n/swap file 1 0 -2\n")
			return func() { h.edit(t, "/proc/swaps", "/swap file 1 0 -2\n", "") }
		}},
		{name: "a feature gate is set that the next kubelet does not know", want: "FeatureGateRemoved SidecarContainers", change: func(t *testing.T, h *largeHost) func() {
			h.edit(t, "/var/lib/kubelet/config.yaml", "maxPods", "featureGates: {SidecarContainers: true}\nmaxPods")
			return func() { h.edit(t, "/var/lib/kubelet/config.yaml", "featureGates: {SidecarContainers: true}\n", "") }
		}},
		{name: "a reboot falls due", want: "RebootPending", change: func(t *testing.T, h *largeHost) func() {
			h.replace(t, "/run/reboot-required", "")
			return func() { os.Remove(h.dir + "/run/reboot-required") }
		}},
		{name: "updates are switched off in a file that is there", want: "UpdatesNotConfigured", change: func(t *testing.T, h *largeHost) func() {
			h.edit(t, "/etc/apt/apt.conf.d/20auto-upgrades", "Unattended-Upgrade \"1\"", "Unattended-Upgrade \"0\"")
			return func() {
				h.edit(t, "/etc/apt/apt.conf.d/20auto-upgrades", "Unattended-Upgrade \"0\"", "Unattended-Upgrade \"1\"")
			}
		}},
		{name: "a newer kernel is installed", want: "KernelOutdated", change: func(t *testing.T, h *largeHost) func() {
			b := &builder{t: t, dir: h.dir, made: map[string]bool{}}
			b.file("/lib/modules/6.12.57+deb13-amd64/modules.dep", "")
			b.file("/boot/vmlinuz-6.12.57+deb13-amd64", "")
			return func() { os.Remove(h.dir + "/boot/vmlinuz-6.12.57+deb13-amd64") }
		}},
		{name: "a daemon is a zombie", want: "NoTimeDaemon", change: func(t *testing.T, h *largeHost) func() {
			stat := fmt.Sprintf("/proc/%d/stat", pidChronyd)
			h.edit(t, stat, ") S ", ") Z ")
			return func() { h.edit(t, stat, ") Z ", ") S ") }
		}},
		{name: "a daemon has ended", want: "IscsidDown", change: func(t *testing.T, h *largeHost) func() {
			dir := fmt.Sprintf("%s/proc/%d", h.dir, pidIscsid)
			if err := os.Rename(dir, h.dir+"/ended"); err != nil {
				t.Fatal(err)
			}
			return func() {
				if err := os.Rename(h.dir+"/ended", dir); err != nil {
					t.Fatal(err)
				}
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newLargeHost(t, size)
			if tt.first != nil {
				tt.first(t, h)
			}
			p := newPasser(h)
			p.settle(t)
			saw := func() bool {
				return slices.ContainsFunc(told(p.pass(t.Context())), func(s string) bool { return strings.HasPrefix(s, tt.want) })
			}
			undo := tt.change(t, h)
			seen := saw()
			for n := 1; !seen && n < tt.after; n++ {
				seen = saw()
			}
			if !seen {
				t.Errorf("not told; told: %q", told(p.pass(t.Context())))
			}
			undo()
			p.healthy(t, p.pass(t.Context()))
		})
	}
}
