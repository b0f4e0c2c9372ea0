//go:build cluster

package e2e

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

//go:embed testdata/config.yaml
var runConfig string

// step does something to the node.
type step func(ctx context.Context, w *world) error

// sh is a step that runs a shell script on the node.
func sh(script string) step {
	return func(ctx context.Context, w *world) error {
		_, err := w.guest(ctx, script)
		return err
	}
}

// steps are one after the other, to the first that fails.
func steps(all ...step) step {
	return func(ctx context.Context, w *world) error {
		for _, s := range all {
			if err := s(ctx, w); err != nil {
				return err
			}
		}
		return nil
	}
}

func unplug(id string) step {
	return func(ctx context.Context, w *world) error { return w.node.Unplug(ctx, id) }
}

func replug(id string) step {
	return func(ctx context.Context, w *world) error { return w.node.Replug(ctx, id) }
}

// scenario is a fault, what the Node has to say of it, and its repair.
type scenario struct {
	name      string
	condition string // without the prefix
	reason    string
	// says are texts the condition's message must contain: the thing and not
	// only the kind of trouble.
	says []string
	// critical faults make Ready False for the same reason.
	critical bool
	// passing are reasons that the condition may give on the way to the one
	// above, and back.
	passing []string
	// affects are other conditions that the fault may change too.
	affects []string
	// prepare makes what the fault needs; restore undoes it.
	prepare, fault, repair, restore step
}

// setPaths writes the state of SCSI paths of mpatha, all of them or the first
// few.
func setPaths(state string, first string) string {
	return `dm=$(basename "$(readlink -f /dev/mapper/mpatha)")
for d in $(ls /sys/block/$dm/slaves | head -n ` + first + `); do echo ` + state + ` >/sys/block/$d/device/state; done`
}

// spareDisk sets d to the kernel's name of the spare disk.
const spareDisk = "d=$(basename $(readlink -f /dev/disk/by-id/virtio-SPARE))\n"

// kubeletConfig edits the kubelet's config with sed and restarts it.
func kubeletConfig(edit string) string {
	return `f=/var/lib/kubelet/config.yaml; test -e $f.e2e || cp $f $f.e2e
sed ` + edit + ` $f.e2e >$f
systemctl restart kubelet`
}

const kubeletConfigBack = `f=/var/lib/kubelet/config.yaml
if test -e $f.e2e; then mv $f.e2e $f; systemctl restart kubelet; fi`

// scenarios are the faults, in an order in which neighbours disturb each other
// least.
func scenarios() []scenario {
	return []scenario{
		{
			name: "chronyd stopped", condition: "TimeProblem", reason: "NoTimeDaemon",
			fault: sh("systemctl stop chrony"), repair: sh("systemctl start chrony"),
		},
		{
			name: "chronyd hangs", condition: "TimeProblem", reason: "TimeDaemonUnresponsive",
			fault:  sh("systemctl kill --kill-whom=main -s STOP chrony"),
			repair: sh("systemctl kill --kill-whom=main -s CONT chrony"),
		},
		{
			name: "chronyd without a reachable source", condition: "TimeProblem", reason: "TimeSourceUnreachable",
			fault: sh(`port=$(awk '/^server/ {print $4}' /etc/chrony/sources.d/rig.sources)
iptables -I OUTPUT -p udp --dport $port -m comment --comment e2e -j DROP`),
			repair: sh(`iptables-save | awk '/--comment e2e/ {sub("-A", "-D"); print}' | while read -r rule; do iptables $rule; done`),
		},
		{
			name: "a multipath path offline", condition: "MultipathProblem", reason: "PathsDegraded", says: []string{"mpatha"},
			affects: []string{"DiskProblem"},
			fault:   sh(setPaths("offline", "1")), repair: sh(setPaths("running", "9")),
		},
		{
			name: "all multipath paths offline", condition: "MultipathProblem", reason: "AllPathsFailed", says: []string{"mpatha"}, critical: true,
			passing: []string{"PathsDegraded"}, affects: []string{"DiskProblem"},
			fault: sh(setPaths("offline", "9")), repair: sh(setPaths("running", "9")),
		},
		{
			name: "a multipath path pulled out", condition: "MultipathProblem", reason: "PathsDegraded", says: []string{"mpatha"},
			fault: unplug("path-b"), repair: replug("path-b"),
		},
		{
			name: "multipathd stopped with a map live", condition: "MultipathProblem", reason: "MultipathdDown", critical: true,
			fault:  sh("systemctl stop multipathd.socket multipathd.service"),
			repair: sh("systemctl start multipathd.service"),
		},
		{
			name: "iSCSI target gone", condition: "ISCSIProblem", reason: "SessionFailed", critical: true,
			affects: []string{"DiskProblem"},
			fault:   sh("systemctl stop tgt"), repair: sh("systemctl start tgt rig-iscsi"),
		},
		{
			name: "iscsid stopped with a session", condition: "ISCSIProblem", reason: "IscsidDown", critical: true,
			fault: sh("systemctl stop iscsid.socket iscsid.service"), repair: sh("systemctl start iscsid.socket iscsid.service"),
		},
		{
			name: "required disk pulled out", condition: "DiskProblem", reason: "RequiredDeviceMissing", says: []string{"virtio-SPARE"}, critical: true,
			fault: unplug("spare"), repair: replug("spare"),
		},
		{
			name: "required disk pulled out while mounted", condition: "DiskProblem", reason: "MountedDeviceGone", says: []string{"/data", "virtio-DATA"}, critical: true,
			passing: []string{"RequiredDeviceMissing", "RequiredDeviceNotMounted"},
			fault:   unplug("data"),
			repair: steps(sh("umount -l /data || true"), replug("data"),
				sh("udevadm settle; for i in $(seq 100); do test -e /dev/disk/by-id/virtio-DATA && break; sleep 0.2; done; mountpoint -q /data || mount /data")),
		},
		{
			name: "file system fails by error", condition: "DiskProblem", reason: "FilesystemReadOnly", says: []string{"/spare"}, critical: true,
			prepare: sh("mountpoint -q /spare || mount /spare"),
			fault:   sh(spareDisk + "echo 1 >/sys/fs/ext4/$d/trigger_fs_error"),
			repair:  sh("umount /spare; e2fsck -fy /dev/disk/by-id/virtio-SPARE || test $? -eq 1; mount /spare"),
			restore: sh("umount /spare"),
		},
		{
			name: "kubelet without PID reservation", condition: "PIDProblem", reason: "NoPIDReservation",
			fault: sh(kubeletConfig(`'/^systemReserved:/,/pid:/d; /^kubeReserved:/,/pid:/d'`)), repair: sh(kubeletConfigBack),
		},
		{
			name: "containerd's OOM score changed", condition: "OOMProblem", reason: "OOMScoreDrift", says: []string{"containerd"},
			fault:  sh("echo -500 >/proc/$(systemctl show -P MainPID containerd)/oom_score_adj"),
			repair: sh("echo -999 >/proc/$(systemctl show -P MainPID containerd)/oom_score_adj"),
		},
		{
			name: "required package removed", condition: "PackageProblem", reason: "PackageMissing", says: []string{testPackage}, critical: true,
			fault: sh("dpkg --remove " + testPackage), repair: sh("dpkg -i /run/e2e/" + testPackage + ".deb"),
		},
		{
			name: "package lock held", condition: "PackageProblem", reason: "PackageLockHeld", says: []string{"dpkg"},
			// A maintainer script that does not come to its end, as happens.
			fault:   sh("systemd-run --quiet --unit e2e-dpkg dpkg -i /run/e2e/hygiene-slow.deb"),
			repair:  sh("touch /run/e2e/go-on; while systemctl is-active -q e2e-dpkg; do sleep 0.2; done"),
			restore: sh("rm -f /run/e2e/go-on; dpkg --purge hygiene-slow"),
		},
	}
}

// testPackage is a package that is there to be removed.
const testPackage = "hygiene-e2e"

// outfit puts the packages on the node that scenarios need.
const outfit = `mkdir -p /run/e2e && cd /run/e2e
for p in hygiene-e2e hygiene-slow; do
  mkdir -p $p/DEBIAN
  printf 'Package: %s\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: for a test\n' $p >$p/DEBIAN/control
done
printf '#!/bin/sh\nwhile ! test -e /run/e2e/go-on; do sleep 0.2; done\n' >hygiene-slow/DEBIAN/preinst
chmod 755 hygiene-slow/DEBIAN/preinst
for p in hygiene-e2e hygiene-slow; do dpkg-deb --build $p $p.deb >/dev/null; done
dpkg -i hygiene-e2e.deb >/dev/null`

const outfitOff = `dpkg --purge hygiene-e2e; rm -rf /run/e2e`

// play goes through one scenario.
func (w *world) play(t *testing.T, s scenario) {
	ctx := cleanupContext(t)
	do := func(what string, do step) {
		t.Helper()
		if do == nil {
			return
		}
		if err := do(ctx, w); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	await(t, "every condition to be healthy", w.healthy)
	repaired := false
	t.Cleanup(func() {
		ctx := cleanupContext(t)
		if !repaired {
			if err := s.repair(ctx, w); err != nil {
				t.Errorf("repair: %v", err)
			}
		}
		if s.restore != nil {
			if err := s.restore(ctx, w); err != nil {
				t.Errorf("restore: %v", err)
			}
		}
	})
	t.Cleanup(func() {
		if t.Failed() {
			w.dump(t)
		}
	})
	do("prepare", s.prepare)

	before := w.mark()
	do("fault", s.fault)
	await(t, s.reason, w.is(s.condition, corev1.ConditionTrue, s.reason))
	told := w.when(before, s.condition, corev1.ConditionTrue)
	await(t, strings.Join(s.says, " and "), func() error {
		c, _ := w.condition(s.condition)
		for _, text := range s.says {
			if !strings.Contains(c.Message, text) {
				return fmt.Errorf("the message does not name %s: %s", text, c.Message)
			}
		}
		return nil
	})
	await(t, "an Event", func() error { return w.event(before, corev1.EventTypeWarning, s.reason) })
	if s.critical {
		await(t, "Ready", w.is("Ready", corev1.ConditionFalse, append(s.passing, s.reason)...))
	}
	c, _ := w.condition(s.condition)
	t.Logf("told after %s: %s", told.Sub(before.at).Round(100*time.Millisecond), c.Message)

	fixed := time.Now()
	do("repair", s.repair)
	repaired = true
	await(t, "the condition to clear", w.is(s.condition, corev1.ConditionFalse, "NoProblem"))
	cleared := w.when(before, s.condition, corev1.ConditionFalse)
	await(t, "every condition to be healthy again", w.healthy)
	await(t, "the Event that it is over", func() error { return w.event(before, corev1.EventTypeNormal, "NoProblem") })
	w.mu.Lock()
	w.rows = append(w.rows, row{s.name, s.reason, told.Sub(before.at), cleared.Sub(fixed)})
	w.mu.Unlock()

	// Once True, once False, and nothing else moved.
	turns := map[string][]string{}
	for _, c := range w.changesSince(before) {
		if c.statusChange() {
			to := "absent"
			if c.to != nil {
				to = string(c.to.Status)
			}
			turns[c.kind] = append(turns[c.kind], to)
		}
		if c.kind == s.condition && c.to != nil && c.to.Status == corev1.ConditionTrue &&
			!slices.Contains(append(s.passing, s.reason), c.to.Reason) {
			t.Errorf("another reason on the way: %s: %s", c, c.to.Message)
		}
	}
	want := map[string][]string{s.condition: {"True", "False"}}
	if s.critical {
		want["Ready"] = []string{"False", "True"}
	}
	for kind, got := range turns {
		if !slices.Equal(got, want[kind]) && !slices.Contains(s.affects, kind) {
			t.Errorf("%s went %v, want %v", kind, got, want[kind])
		}
	}
	if t.Failed() {
		for _, c := range w.changesSince(before) {
			t.Log(c)
		}
	}
	w.invariants(t)
}

// when returns the time at which a condition took a status after the mark, the
// latest time of them.
func (w *world) when(m mark, kind string, status corev1.ConditionStatus) time.Time {
	var at time.Time
	for _, c := range w.changesSince(m) {
		if c.kind == kind && c.statusChange() && c.to != nil && c.to.Status == status {
			at = c.at
		}
	}
	return at
}

// event says whether an Event with the reason has been posted after the mark.
func (w *world) event(m mark, kind, reason string) error {
	var others []string
	for _, e := range w.eventsSince(m) {
		if e.Type == kind && e.Reason == reason {
			if e.InvolvedObject.Kind != "Node" || e.InvolvedObject.Name != w.node.Name() || e.Message == "" {
				return fmt.Errorf("the Event is about %s %s: %q", e.InvolvedObject.Kind, e.InvolvedObject.Name, e.Message)
			}
			return nil
		}
		others = append(others, e.Type+" "+e.Reason)
	}
	return errors.New("none; others: " + strings.Join(others, ", "))
}

// invariants are what must hold at any time.
func (w *world) invariants(t *testing.T) {
	t.Helper()
	for _, f := range w.broken() {
		t.Error(f)
	}
	w.memory(t)
}
