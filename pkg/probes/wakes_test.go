package probes

import (
	"context"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

// What a pass comes upon that somebody may write is to be followed.
func TestFollow(t *testing.T) {
	for _, c := range []struct {
		probe Probe
		file  string
		want  []string
	}{
		{DefaultPIDs(), "pids/healthy.txtar", []string{"/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max", "/sys/fs/cgroup/kubepods.slice/pids.max", "/sys/fs/cgroup/kubepods.slice/pids.events", "/var/lib/kubelet/config.yaml"}},
		{DefaultOOM(), "oom/healthy.txtar", []string{"/proc/455/oom_score_adj"}},
		{DefaultMultipath(), "multipath/daemon-stopped.txtar", []string{"/sys/block/sda/device/state"}},
		{DefaultUpdates(), "updates/rocky-healthy.txtar", []string{"/etc/dnf/automatic.conf"}},
		{DefaultUpdates(), "updates/debian-healthy.txtar", []string{"/etc/apt/apt.conf.d/"}},
		{DefaultKubeletSettings(), "kubelet-settings/no-cluster.txtar", []string{"/var/lib/kubelet/config.yaml", "/var/lib/kubelet/pki/kubelet-client-current.pem", "/var/lib/kubelet/pki/kubelet.crt"}},
		{DefaultDisks(), "disks/duplicate-targets.txtar", []string{"/sys/block/sda/device/state"}},
	} {
		ar, err := txtar.ParseFile(filepath.Join("testdata", c.file))
		if err != nil {
			t.Fatal(err)
		}
		h := hosttest.New(t, ar)
		r, _ := c.probe.Check(context.Background(), Input{Host: h, Memory: NewMemory(), Now: h.Times()[0]})
		for _, want := range c.want {
			if !slices.Contains(r.Follow, want) {
				t.Errorf("%s: %s is not followed: %q", c.file, want, r.Follow)
			}
		}
	}
}

// What a probe wants to hear of must be names the host takes.
func TestWakes(t *testing.T) {
	yes := true
	require := Require{
		Units:     []RequiredUnit{{Name: "own.service", Enabled: &yes}},
		Files:     []RequiredFile{{Path: "/etc/multipath/conf.d/50-own.conf"}},
		OOMScores: []RequiredOOMScore{{Unit: "scored.service"}},
		Modules:   []string{"iscsi_tcp"},
		Sysctls:   map[string]string{"net.ipv4.ip_forward": "1"},
	}
	var units []string
	var files []host.FollowedFile
	for _, p := range Defaults().List() {
		w := p.Wakes(require)
		if len(w.Units)+len(w.Files)+len(w.Subsystems)+len(w.KernelLog) == 0 {
			t.Errorf("nothing wakes %s", p.Name())
		}
		for _, u := range w.Units {
			if !validUnitName(u) {
				t.Errorf("%s: %q is no unit", p.Name(), u)
			}
		}
		for _, f := range append(w.Files, w.WithoutKernelLog...) {
			if !filepath.IsAbs(f.Name) || strings.TrimSuffix(filepath.Clean(f.Name), "/") != strings.TrimSuffix(f.Name, "/") {
				t.Errorf("%s: %q is no clean path", p.Name(), f.Name)
			}
		}
		for _, c := range w.Processes {
			if len(c) > 15 {
				t.Errorf("%s: no process can have the name %q", p.Name(), c)
			}
		}
		units, files = append(units, w.Units...), append(files, w.Files...)
	}
	for _, want := range []string{"own.service", "scored.service", "chrony.service", "multipathd.service", "iscsid.socket", "kubelet.service", "apt-daily-upgrade.timer"} {
		if !slices.Contains(units, want) {
			t.Errorf("%s wakes nobody", want)
		}
	}
	for _, want := range []string{"/etc/multipath/conf.d/50-own.conf", "/proc/sys/net/ipv4/ip_forward", "/var/lib/dpkg/status", "/etc/fstab", "/etc/iscsi/initiatorname.iscsi", "/etc/modules-load.d/", "/run/reboot-required", "/lib/modules/", "/var/lib/kubelet/kubeadm-flags.env"} {
		if !slices.Contains(files, host.FollowedFile{Name: want}) {
			t.Errorf("%s wakes nobody", want)
		}
	}
}
