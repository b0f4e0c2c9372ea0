package remedy

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/report"
	"github.com/hosthygiene/agent/pkg/terminal"
)

var testNow = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// found is a report with one finding a remedy: "action subject".
func found(remedies ...string) []finding.Report {
	r := finding.Report{Probe: "test", Status: finding.Problem, Started: testNow}
	for _, text := range remedies {
		action, subject, _ := strings.Cut(text, " ")
		r.Findings = append(r.Findings, finding.Finding{Reason: "Wrong", Severity: finding.Warning, Subject: subject, Message: subject + " is wrong", Remedy: &finding.Remedy{Action: action, Subject: subject}})
	}
	return []finding.Report{r}
}

// input is a Debian host on which everything is allowed.
func input(remedies ...string) Input {
	r := config.Default().Remedies
	r.Allow = finding.Kinds()
	return Input{
		Reports: found(remedies...), Remedies: r, Now: testNow,
		Require: probes.Require{
			Files: []probes.RequiredFile{
				{Path: "/etc/multipath/conf.d/50-lio.conf", Content: "defaults {\n no_path_retry 5\n}\n"},
				{Path: "/etc/sysctl.d/70-x.conf", Content: "a = 1\n", Mode: "0600", Owner: "root"},
				{Path: "/etc/systemd/system/x.service.d/a.conf", Content: "[Service]\n"},
				{Path: "/etc/multipath/conf.d/bad.conf", Content: "defaults {\n"},
			},
			Sysctls:   map[string]string{"kernel.pid_max": ">=131072", "vm.swappiness": "10", "x.y": ">5"},
			OOMScores: []probes.RequiredOOMScore{{Unit: "multipathd.service", Score: -1000}},
		},
		Facts: Facts{
			OS: host.OS{ID: "debian", Class: host.Mutable, Init: "systemd", BootID: "b1"}, Systemd: true, Manager: Apt, ListsAt: testNow,
			Modprobe: "/usr/sbin/modprobe", Files: map[string]FileFact{}, Owners: map[string][2]uint32{"root": {}},
			Units: map[string]host.Unit{"multipathd.service": {Load: "not-found"}, "chrony.service": {Load: "loaded"}},
		},
	}
}

func TestOrder(t *testing.T) {
	in := input("start-unit multipathd.service", "enable-unit multipathd.service", "set-oom-score multipathd.service", "install-package open-iscsi", "write-file /etc/sysctl.d/70-x.conf",
		"load-module dm_multipath", "set-sysctl kernel.pid_max", "install-package multipath-tools", "write-file /etc/multipath/conf.d/50-lio.conf", "configure-dpkg dpkg", "create-initiator-name x", "enable-unit chrony.service")
	var got []string
	for _, s := range New(in).Steps {
		text := s.ID
		if len(s.DependsOn) > 0 {
			text += " after " + strings.Join(s.DependsOn, " ")
		}
		if s.Refused != "" {
			text += " refused: " + s.Refused
		}
		got = append(got, text)
	}
	lio, x := stepID("file", "/etc/multipath/conf.d/50-lio.conf"), stepID("file", "/etc/sysctl.d/70-x.conf")
	want := []string{
		"dpkg",
		lio,
		"packages after dpkg " + lio,
		x,
		"initiator-name after packages",
		"module-dm_multipath",
		"modules-file",
		"sysctl-kernel.pid_max",
		"sysctls-file",
		"unit-chrony.service",
		"unit-multipathd.service after packages",
		"oom-multipathd.service",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if a, b := New(in), New(in); a.ID != b.ID || cmp.Diff(a.Steps, b.Steps, cmp.AllowUnexported(Step{}, FileChange{})) != "" {
		t.Error("two plans from one input differ")
	}
	if len(New(input()).Steps) != 0 {
		t.Error("nothing is wrong and something is planned")
	}
}

func TestArgv(t *testing.T) {
	for m, want := range map[Manager]string{
		Apt:           "/usr/bin/apt-get install --yes --no-install-recommends --no-upgrade --no-remove -o DPkg::Lock::Timeout=120 -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold -- a b",
		Dnf:           "/usr/bin/dnf install --assumeyes --setopt=install_weak_deps=False a b",
		Yum:           "/usr/bin/yum install --assumeyes a b",
		Microdnf:      "/usr/bin/microdnf install --assumeyes --setopt=install_weak_deps=0 a b",
		Tdnf:          "/usr/bin/tdnf install --assumeyes a b",
		Zypper:        "/usr/bin/zypper --non-interactive install --no-recommends --no-force-resolution -- a b",
		Transactional: "/usr/sbin/transactional-update --non-interactive --continue pkg install --no-recommends --no-force-resolution a b",
	} {
		in := input("install-package b", "install-package a")
		in.Facts.Manager = m
		s := New(in).Steps[0]
		if got := strings.Join(s.Commands[0].Argv, " "); got != want || len(s.Commands) != 1 {
			t.Errorf("%s:\n got %s\nwant %s", m, got, want)
		}
		if s.AfterReboot != (m == Transactional) || s.Simulation != NotSimulated {
			t.Errorf("%s: after reboot %v, %q", m, s.AfterReboot, s.Simulation)
		}
		if _, err := host.DryRun(m.simulateArgv([]string{"a"}), m.simulateEnv()); err != nil {
			t.Errorf("%s has no dry run: %v", m, err)
		}
	}
	in := input("install-package a")
	in.Facts.ListsAt = time.Time{}
	if s := New(in).Steps[0]; len(s.Commands) != 2 || s.Commands[0].Argv[1] != "update" || !s.Commands[0].Prepares {
		t.Errorf("old lists are not refreshed: %+v", s.Commands)
	}
}

// A bound is met by the value nearest to it.
func TestSysctlBound(t *testing.T) {
	for name, want := range map[string]string{"kernel.pid_max": "131072", "vm.swappiness": "10", "x.y": "6"} {
		s := New(input("set-sysctl " + name)).Steps[0]
		if s.Refused != "" || s.Sysctl == nil || s.Sysctl.Value != want {
			t.Errorf("%s: %+v, want %s", name, s, want)
		}
	}
}

// TestRefused: what is not done, and why, in words an operator can act on.
func TestRefused(t *testing.T) {
	for name, test := range map[string]struct {
		remedy string
		change func(*Input)
		want   string
	}{
		"not allowed":      {"install-package a", func(in *Input) { in.Remedies.Allow = []string{"files"} }, "remedies.allow does not list packages"},
		"image":            {"install-package a", func(in *Input) { in.Facts.OS.Class, in.Facts.OS.Why = host.Image, "/usr is a squashfs" }, "image-based (/usr is a squashfs)"},
		"talos":            {"install-package a", func(in *Input) { in.Facts.OS = host.OS{ID: "talos", Class: host.Image} }, "add the system extension that brings a to the node's image"},
		"flatcar":          {"install-package a", func(in *Input) { in.Facts.OS = host.OS{ID: "flatcar", Class: host.Image} }, "bring a as a systemd-sysext image"},
		"bottlerocket":     {"install-package a", func(in *Input) { in.Facts.OS = host.OS{ID: "bottlerocket", Class: host.Image} }, "a variant that has a"},
		"cos":              {"install-package a", func(in *Input) { in.Facts.OS = host.OS{ID: "cos", Class: host.Image} }, "a node image that has a"},
		"rhcos":            {"install-package a", func(in *Input) { in.Facts.OS = host.OS{ID: "rhel", VariantID: "coreos", Class: host.OSTree} }, "extension of a MachineConfig"},
		"fedora coreos":    {"install-package a", func(in *Input) { in.Facts.OS = host.OS{ID: "fedora", VariantID: "coreos", Class: host.OSTree} }, "Butane"},
		"ostree":           {"install-package a", func(in *Input) { in.Facts.OS.Class = host.OSTree }, "layer a with 'rpm-ostree install'"},
		"openshift":        {"install-package a", func(in *Input) { in.Facts.OS.Class, in.Facts.MCO.Present = host.OSTree, true }, "extensions of a MachineConfig"},
		"no manager":       {"install-package a", func(in *Input) { in.Facts.Manager = "" }, "no package manager"},
		"removal":          {"install-package a-", nil, "not taken as a package name"},
		"no systemd":       {"install-package a", func(in *Input) { in.Facts.Systemd = false }, "systemd is not the init"},
		"owned by MCO":     {"write-file /etc/sysctl.d/70-x.conf", func(in *Input) { in.Facts.MCO.Files = map[string]bool{"/etc/sysctl.d/70-x.conf": true} }, "owned by OpenShift's Machine Config Operator"},
		"MCO unreadable":   {"write-file /etc/sysctl.d/70-x.conf", func(in *Input) { in.Facts.MCO.Err = "it is gone" }, "can not be told, because it is gone"},
		"unit of MCO":      {"enable-unit multipathd.service", func(in *Input) { in.Facts.MCO.Files = map[string]bool{"/etc/systemd/system/multipathd.service": true} }, "enable it in a MachineConfig"},
		"start for MCO":    {"start-unit multipathd.service", func(in *Input) { in.Facts.MCO.Files = map[string]bool{"/etc/systemd/system/multipathd.service": true} }, ""},
		"MCO, other unit":  {"unmask-unit iscsid.socket", func(in *Input) { in.Facts.MCO.Files = map[string]bool{"/etc/systemd/system/multipathd.service": true} }, ""},
		"unit, MCO silent": {"unmask-unit iscsid.socket", func(in *Input) { in.Facts.MCO.Err = "it is gone" }, "owns iscsid.socket can not be told"},
		"symlink":          {"write-file /etc/sysctl.d/70-x.conf", func(in *Input) { in.Facts.Files["/etc/sysctl.d/70-x.conf"] = FileFact{Exists: true, Symlink: true} }, "symbolic link"},
		"unreadable":       {"write-file /etc/sysctl.d/70-x.conf", func(in *Input) { in.Facts.Files["/etc/sysctl.d/70-x.conf"] = FileFact{Exists: true, Err: "I/O error"} }, "can not be read"},
		"read-only":        {"write-file /etc/sysctl.d/70-x.conf", func(in *Input) { in.Facts.ReadOnlyMounts = map[string]bool{"/": false, "/etc": true} }, "mounted read-only"},
		"unknown owner":    {"write-file /etc/sysctl.d/70-x.conf", func(in *Input) { clear(in.Facts.Owners) }, "does not know"},
		"unknown file":     {"write-file /etc/passwd", nil, "no content for /etc/passwd"},
		"broken snippet":   {"write-file /etc/multipath/conf.d/bad.conf", nil, "the section defaults is not closed"},
		"login":            {"start-unit open-iscsi.service", nil, "logs in to every iSCSI target"},
		"no score":         {"set-oom-score ssh.service", nil, "no score for ssh.service"},
		"unknown sysctl":   {"set-sysctl no.such", nil, "no value for no.such"},
		"name exists":      {"create-initiator-name x", func(in *Input) { in.Facts.Files[initiatorFile] = FileFact{Exists: true} }, "never overwritten"},
		"no modprobe":      {"load-module x", func(in *Input) { in.Facts.Modprobe = "" }, "modprobe is not on this host"},
		"unknown action":   {"format-disk sda", nil, "does not know how to"},
		"failed lately":    {"install-package a", past(Failed, 10*time.Minute, "b1"), "not tried again before 2026-11-21T12:20:00Z"},
		"staged":           {"install-package a", past(Staged, 10*time.Hour, "b1"), "next reboot"},
		"failed long ago":  {"install-package a", past(Failed, 31*time.Minute, "b1"), ""},
		"staged, rebooted": {"install-package a", past(Staged, 10*time.Hour, "b0"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			in := input(test.remedy)
			if test.change != nil {
				test.change(&in)
			}
			s := New(in).Steps[0]
			if test.want == "" && s.Refused != "" || !strings.Contains(s.Refused, test.want) {
				t.Errorf("refused %q, want %q", s.Refused, test.want)
			}
		})
	}
}

// TestRefusedWhereEtcIsMadeAnew: what holds for every boot is set elsewhere there,
// and what is in force now is still set.
func TestRefusedWhereEtcIsMadeAnew(t *testing.T) {
	for id, want := range map[string][2]string{
		"bottlerocket": {"settings.kernel.modules", "settings.kernel.sysctl"},
		"talos":        {"machine.kernel.modules", "machine.sysctls"},
	} {
		in := input("load-module dm-crypt", "set-sysctl kernel.pid_max")
		in.Facts.OS = host.OS{ID: id, Class: host.Image}
		p := New(in)
		for step, want := range map[string]string{"modules-file": want[0], "sysctls-file": want[1], "module-dm-crypt": "", "sysctl-kernel.pid_max": ""} {
			i := slices.IndexFunc(p.Steps, func(s Step) bool { return s.ID == step })
			if i < 0 {
				t.Fatalf("%s: no step %s", id, step)
			}
			if got := p.Steps[i].Refused; !strings.Contains(got, want) || want == "" && got != "" {
				t.Errorf("%s, %s: refused %q, want %q", id, step, got, want)
			}
		}
	}
}

// TestInitiatorPrefix: the name must look like those the distribution makes.
func TestInitiatorPrefix(t *testing.T) {
	for id, want := range map[string]string{
		"debian": "iqn.1993-08.org.debian:01:", "sl-micro": "iqn.1996-04.de.suse:01:", "opensuse-microos": "iqn.1996-04.de.suse:01:",
		"rhcos": "iqn.1994-05.com.redhat:", "azurelinux": "iqn.1994-05.com.redhat:", "flatcar": "iqn.2016-04.com.open-iscsi:",
	} {
		if got := initiatorPrefix(id); got != want {
			t.Errorf("%s: %s, want %s", id, got, want)
		}
	}
}

func past(o Outcome, ago time.Duration, boot string) func(*Input) {
	return func(in *Input) {
		in.Facts.Past = []Result{{Step: "packages", Digest: New(*in).Steps[0].Digest(), Outcome: o, Ended: testNow.Add(-ago), BootID: boot, Message: "no such package"}}
	}
}

func TestFileContents(t *testing.T) {
	in := input("load-module dm-crypt", "persist-module iscsi_tcp", "set-sysctl kernel.pid_max", "persist-sysctl vm.swappiness", "set-oom-score multipathd.service")
	in.Facts.Files[modulesFile] = FileFact{Exists: true, Data: "# mine\niscsi-tcp\nnbd", Mode: 0o600}
	got := map[string]string{}
	for _, s := range New(in).Steps {
		for _, f := range s.Files {
			got[f.Path] = f.after
		}
	}
	want := map[string]string{
		modulesFile: "# mine\niscsi_tcp\nnbd\ndm-crypt\n",
		sysctlFile:  ownHeader + "kernel.pid_max = 131072\nvm.swappiness = 10\n",
		"/etc/systemd/system/multipathd.service.d/90-host-hygiene.conf": ownHeader + "[Service]\nOOMScoreAdjust=-1000\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// What not everybody may read is not shown to everybody who can read a plan.
func TestSecretsStayHidden(t *testing.T) {
	in := input("write-file /etc/sysctl.d/70-x.conf")
	in.Facts.Files["/etc/sysctl.d/70-x.conf"] = FileFact{Exists: true, Data: "password = hunter2\n", Mode: 0o600}
	var b strings.Builder
	p := New(in)
	if err := report.WriteJSON(&b, p); err != nil {
		t.Fatal(err)
	}
	if err := p.WriteText(&b, terminal.Look{}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(b.String(), "hunter2") {
		t.Error(b.String())
	}
}

func TestMutedIsLeftAlone(t *testing.T) {
	in := input("install-package a")
	in.Reports[0].Findings[0].Muted = &finding.Mute{}
	if p := New(in); len(p.Steps) != 0 {
		t.Errorf("%+v", p.Steps)
	}
}

// TestText: what a host names reaches a terminal only escaped.
func TestText(t *testing.T) {
	in := input("start-unit \x1b[31mx.service")
	var b strings.Builder
	if err := New(in).WriteText(&b, terminal.Look{}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(b.String(), "\x1b") {
		t.Errorf("%q", b.String())
	}
}

func TestUnifiedDiff(t *testing.T) {
	for name, test := range map[string]struct {
		before, after string
		existed       bool
		want          string
	}{
		"new":        {"", "a\nb\n", false, "--- /dev/null\n+++ /f\n@@ -0,0 +1,2 @@\n+a\n+b\n"},
		"changed":    {"1\n2\n3\n4\n5\n6\n7\n8\n9\n", "1\n2\n3\n4\nX\n6\n7\n8\n9\n", true, "--- /f\n+++ /f\n@@ -2,7 +2,7 @@\n 2\n 3\n 4\n-5\n+X\n 6\n 7\n 8\n"},
		"two hunks":  {"a\n1\n2\n3\n4\n5\n6\n7\nb\n", "A\n1\n2\n3\n4\n5\n6\n7\nB\n", true, "--- /f\n+++ /f\n@@ -1,4 +1,4 @@\n-a\n+A\n 1\n 2\n 3\n@@ -6,4 +6,4 @@\n 5\n 6\n 7\n-b\n+B\n"},
		"no newline": {"a", "a\n", true, "--- /f\n+++ /f\n@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+a\n"},
		"emptied":    {"a\n", "", true, "--- /f\n+++ /f\n@@ -1 +0,0 @@\n-a\n"},
		"same":       {"a\n", "a\n", true, "--- /f\n+++ /f\n"},
	} {
		if got := unifiedDiff("/f", test.before, test.after, test.existed); got != test.want {
			t.Errorf("%s:\n%s\nwant\n%s", name, got, test.want)
		}
	}
}

// TestObserve reads facts from whole hosts: an image that takes nothing, an
// OpenShift worker, a Debian.
func TestObserve(t *testing.T) {
	for name, test := range map[string]struct {
		host  string
		check func(t *testing.T, f Facts)
	}{
		"image": {"-- tree/etc/os-release --\nID=bottlerocket\nVERSION_ID=1.2\n-- tree/proc/1/comm --\nsystemd\n", func(t *testing.T, f Facts) {
			in := input("install-package open-iscsi")
			in.Facts = f
			p := New(in)
			if len(p.Pending()) != 0 || !strings.Contains(p.Steps[0].Refused, "image-based") {
				t.Errorf("%+v", p.Steps)
			}
		}},
		"openshift": {"-- tree/etc/os-release --\nID=rhcos\n-- tree/proc/1/comm --\nsystemd\n-- tree" + mcoCurrent + " --\n" +
			`{"kind":"MachineConfig","spec":{"config":{"ignition":{"version":"3.4.0"},"storage":{"files":[{"path":"/etc/multipath.conf"}]},"systemd":{"units":[{"name":"kubelet.service","dropins":[{"name":"10-x.conf"}]}]}}}}` + "\n", func(t *testing.T, f Facts) {
			want := map[string]bool{"/etc/multipath.conf": true, "/etc/systemd/system/kubelet.service": true, "/etc/systemd/system/kubelet.service.d/10-x.conf": true}
			if diff := cmp.Diff(want, f.MCO.Files); diff != "" || f.MCO.Err != "" {
				t.Error(f.MCO.Err, diff)
			}
		}},
		"openshift, nothing said": {"-- tree/etc/os-release --\nID=rhcos\n-- tree/proc/1/comm --\nsystemd\n", func(t *testing.T, f Facts) {
			if f.MCO.Err == "" {
				t.Error("any file may be written")
			}
		}},
		"openshift, broken": {"-- tree/etc/os-release --\nID=rhel\n-- tree/proc/1/comm --\nsystemd\n-- tree" + mcoCurrent + " --\n{}\n", func(t *testing.T, f Facts) {
			if !strings.Contains(f.MCO.Err, "no MachineConfig") {
				t.Error(f.MCO.Err)
			}
		}},
		"debian": {"-- tree/etc/os-release --\nID=debian\n-- tree/proc/1/comm --\nsystemd\n-- tree/usr/bin/apt-get --\n-- tree/usr/bin/dpkg --\n-- tree/usr/bin/dnf --\n-- tree/sbin/modprobe --\n-- tree/var/lib/apt/lists/x_Packages --\n-- tree/etc/modules --\n# x\niscsi-tcp opt\n-- tree" + modulesFile + " --\nnbd\n-- tree/etc/passwd --\nroot:x:0:0::/:/bin/sh\nchrony:x:101:102::/:/bin/sh\n", func(t *testing.T, f Facts) {
			if f.Manager != Apt || f.ListsAt.IsZero() || f.Modprobe != "/sbin/modprobe" || !f.ModulesListed["iscsi_tcp"] || !f.ModulesListed["nbd"] || f.Files[modulesFile].Data != "nbd\n" {
				t.Errorf("%+v", f)
			}
			if f.Owners["chrony"] != [2]uint32{101, 102} || f.MCO.Present || len(f.Unseen) != 0 {
				t.Errorf("%+v", f)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			h := hosttest.Parse(t, test.host+"-- units --\n*\n")
			f, err := Observe(context.Background(), h, probes.Require{Files: []probes.RequiredFile{{Path: "/x", Owner: "chrony"}}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			test.check(t, f)
		})
	}
}
