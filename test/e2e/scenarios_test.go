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

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

//go:embed testdata/config.yaml
var runConfig string

// step does something to the node.
type step func(ctx context.Context, w *world) error

// sh is a step that runs a shell script on the node.
func sh(script string) step {
	return func(ctx context.Context, w *world) error {
		_, err := w.TryGuest(ctx, script)
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
	return func(ctx context.Context, w *world) error { return w.Node.Unplug(ctx, id) }
}

func replug(id string) step {
	return func(ctx context.Context, w *world) error { return w.Node.Replug(ctx, id) }
}

// scenario is a fault, what the Node has to say of it, and its repair.
type scenario struct {
	name      string
	condition string // without the prefix
	reason    string
	// says is what the condition's message must name: the thing and not only
	// the kind of trouble.
	says string
	// well is what the message must say when all is well again.
	well string
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

// lane is a list of scenarios, played one after the other beside the other
// lanes.
type lane struct {
	name string
	// kinds are the conditions that only this lane's faults change.
	kinds     []string
	scenarios []scenario
}

// lanes are the faults, in an order in which neighbours disturb each other
// least.
func lanes() []lane {
	return []lane{
		{"storage", []string{"MultipathProblem", "ISCSIProblem", "DiskProblem"}, []scenario{
			{
				name: "a multipath path offline", condition: "MultipathProblem", reason: "PathsDegraded", says: "mpatha", well: "2 of 2",
				affects: []string{"DiskProblem"},
				fault:   sh(setPaths("offline", "1")), repair: sh(setPaths("running", "9")),
			},
			{
				name: "all multipath paths offline", condition: "MultipathProblem", reason: "AllPathsFailed", says: "mpatha", well: "2 of 2", critical: true,
				passing: []string{"PathsDegraded"}, affects: []string{"DiskProblem"},
				fault: sh(setPaths("offline", "9")), repair: sh(setPaths("running", "9")),
			},
			{
				name: "a multipath path pulled out", condition: "MultipathProblem", reason: "PathsDegraded", says: "mpatha", well: "2 of 2",
				fault: unplug("path-b"), repair: replug("path-b"),
			},
			{
				name: "multipathd stopped with a map live", condition: "MultipathProblem", reason: "MultipathdDown", critical: true,
				fault:  sh("systemctl stop multipathd.socket multipathd.service"),
				repair: sh("systemctl start multipathd.service"),
			},
			{
				name: "iSCSI target gone", condition: "ISCSIProblem", reason: "SessionFailed", well: "1 of 1", critical: true,
				affects: []string{"DiskProblem"},
				// Killed, for its orderly stop takes ten seconds; the stop keeps
				// systemd from starting it again.
				fault: sh("systemctl kill -s KILL tgt; systemctl stop tgt"), repair: sh("systemctl start tgt rig-iscsi"),
			},
			{
				name: "iscsid stopped with a session", condition: "ISCSIProblem", reason: "IscsidDown", well: "1 of 1", critical: true,
				fault: sh("systemctl stop iscsid.socket iscsid.service"), repair: sh("systemctl start iscsid.socket iscsid.service"),
			},
			{
				name: "required disk pulled out", condition: "DiskProblem", reason: "RequiredDeviceMissing", says: "virtio-SPARE", critical: true,
				fault: unplug("spare"), repair: replug("spare"),
			},
			{
				name: "required disk pulled out while in use", condition: "DiskProblem", reason: "MountedDeviceGone", says: "/data", critical: true,
				passing: []string{"RequiredDeviceMissing", "RequiredDeviceNotMounted"},
				// systemd unmounts what is not in use when its disk is gone.
				prepare: sh(`systemd-run --quiet --unit e2e-busy sh -c 'cd /data; exec sleep infinity'
until test "$(readlink /proc/$(systemctl show -P MainPID e2e-busy)/cwd)" = /data; do sleep 0.1; done`),
				fault: unplug("data"),
				repair: steps(sh("systemctl stop e2e-busy; umount -l /data || true"), replug("data"),
					sh("for i in $(seq 100); do test -e /dev/disk/by-id/virtio-DATA && break; sleep 0.2; done; mountpoint -q /data || mount /data")),
			},
			{
				name: "file system fails by error", condition: "DiskProblem", reason: "FilesystemReadOnly", says: "/spare", critical: true,
				prepare: sh("mountpoint -q /spare || mount /spare"),
				fault:   sh(spareDisk + "echo 1 >/sys/fs/ext4/$d/trigger_fs_error"),
				repair:  sh("umount /spare; e2fsck -fy /dev/disk/by-id/virtio-SPARE || test $? -eq 1; mount /spare"),
				restore: sh("umount /spare"),
			},
		}},
		{"host", []string{"TimeProblem", "PIDProblem", "OOMProblem", "PackageProblem"}, []scenario{
			{
				name: "chronyd stopped", condition: "TimeProblem", reason: "NoTimeDaemon",
				fault: sh("systemctl stop chrony"), repair: sh("systemctl start chrony"),
			},
			{
				name: "chronyd without a reachable source", condition: "TimeProblem", reason: "TimeSourceUnreachable", says: "no time source answers",
				fault: sh(`port=$(awk '/^server/ {print $4}' /etc/chrony/sources.d/rig.sources)
iptables -I OUTPUT -p udp --dport $port -m comment --comment e2e-clock -j DROP`),
				repair: sh(`iptables -S OUTPUT | sed -n '/e2e-clock/ s/^-A/-D/p' | xargs -r iptables`),
			},
			{
				name: "chronyd hangs", condition: "TimeProblem", reason: "TimeDaemonUnresponsive",
				// When it comes to, it trusts no measurement from before.
				passing: []string{"TimeSourceUnreachable"}, well: "chronyd follows",
				fault:  sh("systemctl kill --kill-whom=main -s STOP chrony"),
				repair: sh("systemctl kill --kill-whom=main -s CONT chrony"),
			},
			{
				name: "kubelet without PID reservation", condition: "PIDProblem", reason: "NoPIDReservation",
				fault: sh(kubeletConfig(`'/^ *pid: /d'`)), repair: sh(kubeletConfigBack),
			},
			{
				name: "containerd's OOM score changed", condition: "OOMProblem", reason: "OOMScoreDrift", says: "containerd",
				fault:  sh("echo -500 >/proc/$(systemctl show -P MainPID containerd)/oom_score_adj"),
				repair: sh("echo -999 >/proc/$(systemctl show -P MainPID containerd)/oom_score_adj"),
			},
			{
				name: "required package removed", condition: "PackageProblem", reason: "PackageMissing", says: testPackage, critical: true,
				fault: sh("dpkg --remove " + testPackage), repair: sh("dpkg -i /tmp/e2e/" + testPackage + ".deb"),
			},
			{
				name: "package lock held", condition: "PackageProblem", reason: "PackageLockHeld", says: "dpkg",
				// A maintainer script that does not come to its end, as happens.
				fault:   sh("systemd-run --quiet --unit e2e-dpkg dpkg -i /tmp/e2e/hygiene-slow.deb"),
				repair:  sh("touch /tmp/e2e/go-on; while systemctl is-active -q e2e-dpkg; do sleep 0.2; done"),
				restore: sh("rm -f /tmp/e2e/go-on; dpkg --purge hygiene-slow"),
			},
		}},
	}
}

// testPackage is a package that is there to be removed.
const testPackage = "hygiene-e2e"

// outfit puts the packages on the node that scenarios need, and mounts the data
// disk where the boot was too slow for the time fstab gives it.
const outfit = `mountpoint -q /data || mount /data
mkdir -p /tmp/e2e && cd /tmp/e2e
for p in hygiene-e2e hygiene-slow; do
  mkdir -p $p/DEBIAN
  printf 'Package: %s\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: for a test\n' $p >$p/DEBIAN/control
done
printf '#!/bin/sh\nwhile ! test -e /tmp/e2e/go-on; do sleep 0.2; done\n' >hygiene-slow/DEBIAN/preinst
chmod 755 hygiene-slow/DEBIAN/preinst
for p in hygiene-e2e hygiene-slow; do dpkg-deb --build $p $p.deb >/dev/null; done
dpkg -i hygiene-e2e.deb >/dev/null`

const outfitOff = `dpkg --purge hygiene-e2e; rm -rf /tmp/e2e`

// play goes through one scenario.
func (w *world) play(t *testing.T, l lane, s scenario) {
	ctx := w.CleanupContext(t)
	do := func(what string, do step) {
		t.Helper()
		if do == nil {
			return
		}
		if err := do(ctx, w); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	calm := func() error {
		var errs []error
		for _, kind := range l.kinds {
			errs = append(errs, w.is(kind, corev1.ConditionFalse, "NoProblem")())
		}
		if c, _ := w.condition("Ready"); c.Reason == s.reason {
			errs = append(errs, fmt.Errorf("Ready is %s/%s", c.Status, c.Reason))
		}
		return errors.Join(errs...)
	}
	w.Await(t, "calm", calm)
	repaired := false
	t.Cleanup(func() {
		ctx := w.CleanupContext(t)
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
	rigtest.OnFailure(t, w.dump)
	do("prepare", s.prepare)

	before := w.mark()
	do("fault", s.fault)
	w.Await(t, s.reason, func() error {
		if c, _ := w.condition(s.condition); !strings.Contains(c.Message, s.says) {
			return fmt.Errorf("the message does not name %s: %s", s.says, c.Message)
		}
		return w.is(s.condition, corev1.ConditionTrue, s.reason)()
	})
	told := w.when(before, s.condition, corev1.ConditionTrue)
	w.Await(t, "the Event", func() error { return w.event(before, corev1.EventTypeWarning, s.reason) })
	if s.critical {
		w.Await(t, "Ready to name it", func() error {
			if c, _ := w.condition("Ready"); c.Status != corev1.ConditionFalse || !strings.Contains(c.Message, s.says) {
				return fmt.Errorf("Ready is %s/%s: %s", c.Status, c.Reason, c.Message)
			}
			return nil
		})
	}
	c, _ := w.condition(s.condition)
	t.Logf("told after %s: %s", told.Sub(before.at).Round(100*time.Millisecond), c.Message)

	fixed := time.Now()
	do("repair", s.repair)
	repaired = true
	w.Await(t, "the condition to clear", func() error {
		if c, _ := w.condition(s.condition); !strings.Contains(c.Message, s.well) {
			return fmt.Errorf("the message does not say %s: %s", s.well, c.Message)
		}
		return w.is(s.condition, corev1.ConditionFalse, "NoProblem")()
	})
	cleared := w.when(before, s.condition, corev1.ConditionFalse)
	w.Await(t, "calm", calm)
	w.Await(t, "the Event that it is over", func() error { return w.event(before, corev1.EventTypeNormal, "NoProblem") })
	w.mu.Lock()
	w.rows = append(w.rows, row{s.name, s.reason, told.Sub(before.at), cleared.Sub(fixed)})
	w.mu.Unlock()
	w.straight(t, l, s, before)
	w.invariants(t)
}

// straight holds the history of a scenario to the shortest: the condition went
// True once and False once, for no other reason than the fault's, and no other
// condition moved.
func (w *world) straight(t *testing.T, l lane, s scenario, since mark) {
	t.Helper()
	turns := map[string][]string{}
	for _, c := range w.changesSince(since) {
		switch {
		case c.to == nil:
			turns[c.kind] = append(turns[c.kind], "absent")
		case c.statusChange():
			turns[c.kind] = append(turns[c.kind], string(c.to.Status))
		}
		if c.to == nil || c.to.Status == corev1.ConditionFalse && c.kind != "Ready" {
			continue
		}
		if c.kind == s.condition && c.to.Reason != s.reason && !slices.Contains(s.passing, c.to.Reason) {
			t.Errorf("another reason on the way: %s: %s", c, c.to.Message)
		}
		if c.kind == "Ready" && c.to.Reason == s.reason && !s.critical {
			t.Errorf("it counted against Ready: %s", c)
		}
	}
	for _, kind := range l.kinds {
		var want []string
		if kind == s.condition {
			want = []string{"True", "False"}
		}
		if !slices.Equal(turns[kind], want) && !slices.Contains(s.affects, kind) {
			t.Errorf("%s went %v, want %v", kind, turns[kind], want)
		}
	}
	if t.Failed() {
		for _, c := range w.changesSince(since) {
			t.Log(c)
		}
	}
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
			if e.InvolvedObject.Kind != "Node" || e.InvolvedObject.Name != w.Node.Name() || e.Message == "" {
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
