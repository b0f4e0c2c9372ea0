//go:build cluster

package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/test/figures"
	"github.com/hosthygiene/agent/test/rig/rigtest"
)

// timed is a fault whose way into the API is timed, from when the host tells of
// it, or, when the host does not, from when it happens.
type timed struct {
	name string
	// by says who tells of the fault, or why nobody does.
	by string
	// The condition that tells it, without the prefix, and its reason: one of
	// these.
	condition string
	reasons   []string
	// says is what the message must name; it may depend on the repetition.
	says func(k int) string

	// script makes the fault in the session, act from outside.
	script func(k int) string
	act    step
	// told finds out when the host told of it, in seconds since it booted.
	told witness

	// repair undoes the fault, undo from outside.
	repair string
	undo   step
	// recovery, if it has a name, is timed as well.
	recovery struct {
		name, by string
		told     witness
	}
	// lingers: the fault is told for a while after it was, so that there is
	// nothing to repair.
	lingers bool
	// shipped: the reasons are held as they are by default, for the hold does
	// not delay this fault: it can not pass by itself.
	shipped bool
	// same: another one would change nothing in the API as long as the last is
	// told.
	same bool

	prepare, restore string
}

// bench is what timing faults needs.
type bench struct {
	w  *world
	s  *session
	ev *uevents
	// quiet is how long the agent has had nothing to do when a fault comes.
	quiet time.Duration
	// config is in force, refreshed so often.
	config    string
	refreshed int
}

// witness finds out when the host told of something. out is what the script of
// the fault printed, before when it began, in seconds since boot. It is asked
// after the agent has told it too, so as not to take the processor away.
type witness func(b *bench, out string, before float64) (float64, error)

// asPrinted: the script prints the time right before what it does, which the
// host tells at once.
func asPrinted(_ *bench, out string, _ float64) (float64, error) { return printedTime(out) }

// inactive is when systemd saw a unit's last process end.
func inactive(unit string) witness {
	return func(b *bench, _ string, _ float64) (float64, error) {
		out, err := b.s.do("systemctl show -P InactiveEnterTimestampMonotonic " + unit)
		if err != nil {
			return 0, err
		}
		us, err := strconv.ParseFloat(out, 64)
		return us / 1e6, err
	}
}

// changed is when a file got its present content by a rename.
func changed(file string) witness {
	return func(b *bench, _ string, _ float64) (float64, error) {
		out, err := b.s.do("stat -c %.6Z " + file + "; echo $EPOCHREALTIME; at")
		if err != nil {
			return 0, err
		}
		fields := strings.Fields(out)
		if len(fields) != 4 {
			return 0, fmt.Errorf("when %s changed: %q", file, out)
		}
		ctime, err1 := strconv.ParseFloat(fields[0], 64)
		now, err2 := strconv.ParseFloat(fields[1], 64)
		up, err3 := printedTime(out)
		return up - (now - ctime), errors.Join(err1, err2, err3)
	}
}

var logLine = regexp.MustCompile(`^\[ *([0-9]+\.[0-9]+)\] (.*)`)

// logged is when the kernel wrote a line to its log. The log's clock is not the
// one of /proc/uptime, so a line of ours is put beside it.
func logged(pattern string) witness {
	want := regexp.MustCompile(pattern)
	return func(b *bench, _ string, before float64) (float64, error) {
		out, err := b.s.do("at; echo e2e-now >/dev/kmsg; dmesg | tail -n 400")
		if err != nil {
			return 0, err
		}
		up, err := printedTime(out)
		if err != nil {
			return 0, err
		}
		var lines [][]string
		behind := 0.0
		for line := range strings.Lines(out) {
			m := logLine.FindStringSubmatch(strings.TrimSpace(line))
			if m == nil {
				continue
			}
			lines = append(lines, m)
			if m[2] == "e2e-now" {
				at, err := strconv.ParseFloat(m[1], 64)
				if err != nil {
					return 0, err
				}
				behind = up - at
			}
		}
		for _, m := range lines {
			at, err := strconv.ParseFloat(m[1], 64)
			if err != nil {
				return 0, err
			}
			// A hundredth: /proc/uptime is cut off.
			if at += behind; at >= before-0.02 && want.MatchString(m[2]) {
				return at, nil
			}
		}
		return 0, fmt.Errorf("the kernel's log has no line like %q after %.2f s", pattern, before)
	}
}

// byUevent is when the kernel sent an event about a block device.
func byUevent(action, device string, properties ...string) witness {
	path := regexp.MustCompile(device)
	return func(b *bench, _ string, before float64) (float64, error) {
		e, err := b.ev.first(before-0.02, func(e uevent) bool {
			if e.action != action || !path.MatchString(e.path) {
				return false
			}
			for _, p := range properties {
				key, value, _ := strings.Cut(p, "=")
				if e.properties[key] != value {
					return false
				}
			}
			return true
		})
		return e.at, err
	}
}

func always(text string) func(int) string { return func(int) string { return text } }

// forkUnit is a service that may have one process.
const forkUnit = "e2e-forks.service"

// announced are faults that the kernel or systemd tells of.
func announced() []timed {
	stopped := timed{
		name: "unit stopped", by: "systemd: the unit is inactive",
		condition: "TimeProblem", reasons: []string{"NoTimeDaemon"},
		script: always("systemctl stop chrony"), told: inactive("chrony.service"), repair: "systemctl start chrony",
	}
	killed := timed{
		name: "unit killed", by: "systemd: the unit has failed",
		condition: "ServiceProblem", reasons: []string{"UnitFailed"}, says: always("chrony"),
		script: always("systemctl kill -s KILL chrony"), told: inactive("chrony.service"),
		repair: "systemctl reset-failed chrony; systemctl start chrony",
	}
	unplugged := timed{
		name: "disk unplugged", by: "uevent: remove",
		condition: "DiskProblem", reasons: []string{"RequiredDeviceMissing"}, says: always("virtio-SPARE"),
		act: unplug("spare"), told: byUevent("remove", `/block/vd[a-z]+$`), undo: replug("spare"),
		shipped: true,
	}
	failed := timed{
		name: "file system failed", by: "kernel log, fanotify",
		condition: "DiskProblem", reasons: []string{"FilesystemReadOnly"}, says: always("/spare"),
		prepare: "mountpoint -q /spare || mount /spare",
		script:  always(spareDisk + "at; echo 1 >/sys/fs/ext4/$d/trigger_fs_error"), told: asPrinted,
		repair:  "umount /spare; e2fsck -fy /dev/disk/by-id/virtio-SPARE || test $? -eq 1; mount /spare",
		restore: "umount /spare",
	}
	removed := timed{
		name: "package removed", by: "inotify: dpkg's status file",
		condition: "PackageProblem", reasons: []string{"PackageMissing"}, says: always(testPackage),
		script: always("dpkg --remove " + testPackage), told: changed("/var/lib/dpkg/status"),
		repair: "dpkg -i /tmp/e2e/" + testPackage + ".deb",
	}
	removed.recovery.name, removed.recovery.by, removed.recovery.told = "package installed", removed.by, removed.told
	edited := timed{
		name: "config file changed", by: "inotify: /etc/fstab, written over and renamed over in turn",
		condition: "DiskProblem", reasons: []string{"UnstableDeviceName"}, says: always("/dev/vdz9"),
		prepare: "cp -p /etc/fstab /tmp/e2e/fstab; cp -p /etc/fstab /tmp/e2e/fstab.bad; echo '/dev/vdz9 /mnt ext4 nofail 0 0' >>/tmp/e2e/fstab.bad",
		script: func(k int) string {
			if k%2 == 0 {
				return "at; cat /tmp/e2e/fstab.bad >/etc/fstab"
			}
			return "cp -p /tmp/e2e/fstab.bad /etc/fstab.new; at; mv /etc/fstab.new /etc/fstab"
		},
		told: asPrinted, repair: "cat /tmp/e2e/fstab >/etc/fstab",
	}
	stepped := timed{
		name: "clock stepped", by: "timerfd: cancelled, the clock was set",
		condition: "TimeProblem", reasons: []string{"ClockOffsetHigh", "ClockUnsynchronized", "ClockDisagreesWithHypervisor"},
		script: always("at; date -s '+30 seconds' >/dev/null"), told: asPrinted,
		repair:  "date -s '-30 seconds' >/dev/null; chronyc -a 'burst 2/4' >/dev/null",
		shipped: true,
	}
	oom := timed{
		name: "OOM kill", by: "memory.events, kernel log",
		condition: "OOMProblem", reasons: []string{"SystemOOMKill"},
		// The latest is the first in the message.
		says: func(k int) string { return fmt.Sprintf("e2e-oom-%02d.service", 99-k) },
		script: func(k int) string {
			return fmt.Sprintf(`systemd-run --quiet --wait --unit e2e-oom-%02d -p MemoryMax=20M -p MemorySwapMax=0 -p OOMPolicy=continue tail /dev/zero || true
systemctl reset-failed e2e-oom-%[1]d || true`, 99-k)
		},
		told: logged(`^oom-kill:.*e2e-oom-`), lingers: true,
	}
	forks := timed{
		name: "fork refused", by: "pids.events",
		condition: "PIDProblem", reasons: []string{"ForkFailures"},
		script: always(refuseFork), told: asPrinted, lingers: true, same: true,
		prepare: startForks, restore: "systemctl stop " + forkUnit,
	}
	session := timed{
		name: "iSCSI session failed", by: "netlink: connection error",
		condition: "ISCSIProblem", reasons: []string{"SessionFailed"},
		script: always("systemctl kill -s KILL tgt; systemctl stop tgt"), told: logged(`detected conn error`),
		repair:  "systemctl start tgt rig-iscsi",
		shipped: true,
	}
	path := timed{
		name: "multipath path failed", by: "uevent: DM_ACTION=PATH_FAILED",
		condition: "MultipathProblem", reasons: []string{"PathsDegraded"}, says: always("mpatha"),
		// Where only the kernel knows of it until multipathd's checker finds it:
		// inotify would tell of it before the uevent.
		script: always(pathOffline + elsewhere), told: byUevent("change", `/block/dm-`, "DM_ACTION=PATH_FAILED"),
		repair: setPaths("running", "9"),
	}
	// The clock last, for chronyd takes a while to trust it again.
	return []timed{stopped, killed, unplugged, failed, removed, edited, oom, session, path, forks, stepped}
}

// elsewhere sets a path of mpatha offline by another sysfs than the host's, which
// inotify takes for another file: sysfs is one for each network namespace.
const (
	pathOffline = `dm=$(basename "$(readlink -f /dev/mapper/mpatha)"); d=$(ls /sys/block/$dm/slaves | head -n 1)
`
	elsewhere = `unshare --net --mount sh -c 'mount -t sysfs sysfs /mnt; echo offline >/mnt/block/'$d'/device/state'`
)

const startForks = `systemctl is-active -q ` + forkUnit + ` || systemd-run --quiet --unit ` + forkUnit + ` -p TasksMax=1 sleep infinity`

// refuseFork has a process try to fork in a full control group. It gets there
// by itself: joining is not limited.
const refuseFork = `sh -c 'echo $$ >/sys/fs/cgroup/system.slice/` + forkUnit + `/cgroup.procs; read up _ </proc/uptime; echo "AT $up"; (:)' 2>/dev/null || true`

// unannounced are faults that the host tells nobody of. Where a program makes
// them through the host's own kernel files, inotify can tell, which is cheaper
// than to look more often; through another mount of the same it can not.
func unannounced() []timed {
	const (
		kubelet = "/sys/fs/cgroup/system.slice/kubelet.service/"
		score   = "/$(systemctl show -P MainPID containerd)/oom_score_adj"
	)
	path := timed{
		name:      "path set offline in the host's sysfs, before multipathd's checker sees it",
		by:        "no uevent; inotify sees the program that writes it",
		condition: "MultipathProblem", reasons: []string{"PathsDegraded"}, says: always("mpatha"),
		// The checker of the test's machine looks every 2 to 4 s.
		prepare: `sed 's/polling_interval [0-9]*/polling_interval 60/' /etc/multipath.conf >/tmp/e2e/multipath.conf.slow
cp -p /etc/multipath.conf /tmp/e2e/multipath.conf; cat /tmp/e2e/multipath.conf.slow >/etc/multipath.conf; multipathd reconfigure`,
		script: always("at\n" + setPaths("offline", "1")), told: asPrinted, repair: setPaths("running", "9"),
		restore: "cat /tmp/e2e/multipath.conf >/etc/multipath.conf; multipathd reconfigure",
	}
	unseenPath := path
	unseenPath.name = "the same where only the kernel knows (here by another sysfs)"
	unseenPath.by = "no uevent, nobody writes; multipathd's checker, in practice every 5 to 20 s, or the first I/O, makes one"
	unseenPath.script = always(pathOffline + "at; " + elsewhere)
	oom := timed{
		name:      "oom_score_adj rewritten in the host's /proc",
		by:        "the kernel tells nobody; inotify sees the program that writes it",
		condition: "OOMProblem", reasons: []string{"OOMScoreDrift"}, says: always("containerd"),
		script: always("f=/proc" + score + "; at; echo -500 >$f"), told: asPrinted,
		repair: "echo -999 >/proc" + score,
	}
	unseenOOM := oom
	unseenOOM.name = "the same by another /proc, as from a container"
	unseenOOM.by = "the kernel tells nobody, and the file is another to inotify"
	unseenOOM.prepare = "mkdir -p /tmp/e2e/proc; mount -t proc proc /tmp/e2e/proc"
	unseenOOM.script = always("f=/tmp/e2e/proc" + score + "; at; echo -500 >$f")
	unseenOOM.restore = "umount /tmp/e2e/proc"
	limit := timed{
		name:      "limit of processes lowered",
		by:        "a control group tells of what it refused, not of its limit; inotify sees the program that writes it",
		condition: "PIDProblem", reasons: []string{"PIDsNearLimit"}, says: always("kubelet"),
		prepare: "cat " + kubelet + "pids.max >/tmp/e2e/pids.max",
		script:  always("n=$(cat " + kubelet + "pids.current); at; echo $((n * 10 / 9)) >" + kubelet + "pids.max"), told: asPrinted,
		repair:  "cat /tmp/e2e/pids.max >" + kubelet + "pids.max",
		restore: "cat /tmp/e2e/pids.max >" + kubelet + "pids.max",
	}
	return []timed{path, unseenPath, oom, unseenOOM, limit}
}

// rules are all the agent's, by reason.
func rules() map[string]finding.Rule {
	all := map[string]finding.Rule{}
	for _, p := range probes.Defaults().List() {
		for _, r := range p.Rules() {
			all[r.Reason] = r
		}
	}
	return all
}

// benchConfig is the config under which faults are timed: their reasons are not
// held, which is said beside each figure, and between two looks is the interval.
// A recovery is never held, so that the next repetition can follow.
func benchConfig(interval time.Duration, faults ...timed) string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: hosthygiene.io/v1alpha1
kind: AgentConfig
interval: %s
require:
  devices: [{id: /dev/disk/by-id/virtio-SPARE}]
  packages: [%s, {name: %s, names: {debian: bash}}]
hold:
  # Another way to say the same of the same disk.
  DeviceOffline: {clear: 0s}
`, interval, testPackage, marker)
	held := map[string]bool{}
	for _, f := range faults {
		for _, reason := range f.reasons {
			r := rules()[reason]
			if held[reason] || r.HoldBefore == 0 && r.HoldClear == 0 {
				continue
			}
			held[reason] = true
			if f.shipped {
				fmt.Fprintf(&b, "  %s: {clear: 0s}\n", reason)
			} else {
				fmt.Fprintf(&b, "  %s: {before: 0s, clear: 0s}\n", reason)
			}
		}
	}
	return b.String()
}

// timeFaults repeats each fault and returns what there is to say of it.
func (w *world) timeFaults(t *testing.T, f form, interval time.Duration, faults []timed) (told, cleared map[string]*timing) {
	b := &bench{w: w, s: w.session(t), ev: w.uevents(t), quiet: f.quiet}
	told, cleared = map[string]*timing{}, map[string]*timing{}
	t.Cleanup(func() {
		ctx := w.CleanupContext(t)
		if _, err := w.TryGuest(ctx, "systemctl stop "+forkUnit+" 2>/dev/null || true"); err != nil {
			t.Error(err)
		}
	})
	for _, fault := range faults {
		t.Run(fault.name, func(t *testing.T) {
			rigtest.OnFailure(t, w.dump)
			b.configure(t, benchConfig(interval, fault))
			if fault.prepare != "" {
				w.Guest(t, fault.prepare)
			}
			if fault.restore != "" {
				t.Cleanup(func() { w.Guest(t, fault.restore) })
			}
			told[fault.name], cleared[fault.name] = &timing{}, &timing{}
			for k := range f.repetitions {
				b.once(t, fault, k, told[fault.name], cleared[fault.name])
			}
			if fault.lingers {
				b.forget(t)
			}
			w.Await(t, "calm", b.calm(fault))
			t.Logf("%s: %s; recovery: %s", fault.name, told[fault.name], cleared[fault.name])
		})
	}
	return told, cleared
}

// timing is how long the repetitions of something took.
type timing struct {
	times figures.Times
	// within is how far off the worst may be.
	within time.Duration
	// refreshed is how often the agent did not see it by itself.
	refreshed int
	reasons   []string
}

func (t *timing) String() string {
	return fmt.Sprintf("%d times, median %s, 95 %% %s, longest %s (± %s), %d not seen without a new config; %s", len(t.times),
		figures.Seconds(t.times.Median()), figures.Seconds(t.times.P95()), figures.Seconds(t.times.Max()), t.within.Round(time.Millisecond), t.refreshed, strings.Join(t.reasons, ", "))
}

func (t *timing) add(d time.Duration, c clock, reason string) {
	t.times = append(t.times, d)
	t.within = max(t.within, c.within)
	if !slices.Contains(t.reasons, reason) {
		t.reasons = append(t.reasons, reason)
	}
}

// once makes a fault, waits for it to be told, and undoes it.
func (b *bench) once(t *testing.T, f timed, k int, told, cleared *timing) {
	t.Helper()
	ctx := b.w.CleanupContext(t)
	repaired := f.lingers
	t.Cleanup(func() {
		if !repaired {
			if err := f.undone(ctx, b.w); err != nil {
				t.Errorf("repair: %v", err)
			}
		}
	})
	if !f.lingers {
		b.w.Await(t, "calm", b.calm(f))
	}
	if f.same && k > 0 {
		b.forget(t)
	}
	b.breathe()

	says := ""
	if f.says != nil {
		says = f.says(k)
	}
	m := b.w.mark()
	out, before, c := b.make(t, ctx, f.act, func() string { return f.script(k) })
	var seen change
	b.w.Await(t, strings.Join(f.reasons, " or "), func() (err error) {
		seen, err = b.shown(m, f.condition, corev1.ConditionTrue, says, f.reasons...)
		return err
	})
	when := b.witnessed(t, f.told, out, before)
	told.add(seen.at.Sub(c.here(when)), c, seen.to.Reason)
	if f.lingers {
		return
	}

	b.breathe()
	fixed := b.w.mark()
	out, before, c = b.make(t, ctx, f.undo, func() string { return f.repair })
	repaired = true
	gone := func() (err error) {
		seen, err = b.shown(fixed, f.condition, corev1.ConditionFalse, "", "NoProblem")
		return err
	}
	// Not every recovery is announced: a new config has the agent look.
	if !b.soon(gone) {
		cleared.refreshed++
		b.refresh(t)
	}
	b.w.Await(t, "the condition to clear", gone)
	when = before
	if f.recovery.told != nil {
		when = b.witnessed(t, f.recovery.told, out, before)
	}
	cleared.add(seen.at.Sub(c.here(when)), c, seen.to.Reason)

	var turns []string
	for _, c := range b.w.changesSince(m) {
		if c.kind == f.condition && c.statusChange() && c.to != nil {
			turns = append(turns, string(c.to.Status))
		}
	}
	if !slices.Equal(turns, []string{"True", "False"}) {
		t.Errorf("repetition %d: %s went %v, want True and False", k, f.condition, turns)
	}
}

func (f timed) undone(ctx context.Context, w *world) error {
	if f.undo != nil {
		return f.undo(ctx, w)
	}
	return sh(f.repair)(ctx, w)
}

// make does something to the node, from outside or by a script, and says when it
// began, by which clock.
func (b *bench) make(t *testing.T, ctx context.Context, act step, script func() string) (out string, before float64, c clock) {
	t.Helper()
	c, err := b.s.clock()
	if err != nil {
		t.Fatal(err)
	}
	now, err := b.s.raw("at")
	if err != nil {
		t.Fatal(err)
	}
	if before, err = printedTime(now); err != nil {
		t.Fatal(err)
	}
	if act != nil {
		err = act(ctx, b.w)
	} else {
		out, err = b.s.do(script())
	}
	if err != nil {
		t.Fatal(err)
	}
	return out, before, c
}

// witnessed waits for the witness, whose word may come after the agent's.
func (b *bench) witnessed(t *testing.T, told witness, out string, before float64) (when float64) {
	t.Helper()
	b.w.Await(t, "the host's own word", func() (err error) {
		when, err = told(b, out, before)
		return err
	})
	return when
}

// shown finds the first time since a mark that the API server showed a condition
// so.
func (b *bench) shown(m mark, kind string, status corev1.ConditionStatus, says string, reasons ...string) (change, error) {
	for _, c := range b.w.changesSince(m) {
		if c.kind == kind && c.to != nil && c.to.Status == status && slices.Contains(reasons, c.to.Reason) && strings.Contains(c.to.Message, says) {
			return c, nil
		}
	}
	c, _ := b.w.condition(kind)
	return change{}, fmt.Errorf("%s is %s/%s: %s", kind, c.Status, c.Reason, c.Message)
}

// soon gives something half a minute.
func (b *bench) soon(ok func() error) bool {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(look) {
		if ok() == nil {
			return true
		}
	}
	return false
}

// breathe leaves the agent time to be idle: a probe that has just run does not
// run again for a second, one that ran often waits longer, and faults come on
// hosts that were well for a while.
func (b *bench) breathe() { time.Sleep(b.quiet + rand.N(time.Second)) }

func (b *bench) calm(f timed) func() error {
	return b.w.is(f.condition, corev1.ConditionFalse, "NoProblem")
}

// configure puts a config into force.
func (b *bench) configure(t *testing.T, config string) {
	t.Helper()
	b.config = config
	b.refresh(t)
}

// refresh makes the config new, which has the agent look at everything.
func (b *bench) refresh(t *testing.T) {
	t.Helper()
	b.put(t, b.config)
}

// marker is the name under which benchConfig requires a package that is there:
// the agent has a metric of it once it has looked under the config.
const marker = "e2e-marker"

// put writes a config and waits until the agent has looked under it.
func (b *bench) put(t *testing.T, config string) {
	t.Helper()
	b.refreshed++
	name := fmt.Sprintf("%s-%d", marker, b.refreshed)
	before, err := b.w.metrics()
	if err != nil {
		t.Fatal(err)
	}
	b.w.configure(t, strings.ReplaceAll(config, marker, name), func() error {
		now, err := b.w.metrics()
		if err != nil {
			return err
		}
		if _, there := now[fmt.Sprintf("hosthygiene_package_installed{package=%q}", name)]; !there {
			return errors.New("its marker is not there yet")
		}
		was, is := probeRuns(before), probeRuns(now)
		for _, probe := range []string{"time", "disks", "multipath", "iscsi", "packages", "units"} {
			if is[probe] == was[probe] {
				return fmt.Errorf("%s has not run since", probe)
			}
		}
		return nil
	})
}

// pushOut fills the kernel's log until what it said of refused forks and OOM
// kills is gone. Level 7, for the serial console is slow.
const pushOut = `sysctl -q kernel.printk_devkmsg=on
line=$(printf '<7>e2e %0900d' 0)
while dmesg | grep -q -e 'fork rejected' -e 'oom-kill:'; do
  for i in $(seq 100); do echo "$line" >/dev/kmsg; done
done
sysctl -q kernel.printk_devkmsg=ratelimit`

// forget has the agent forget refused forks and OOM kills, which it tells for a
// while, so that one more would change nothing: by another pod, because it keeps
// what it has read of the kernel's log, with nothing left there for it to read.
func (b *bench) forget(t *testing.T) {
	t.Helper()
	b.w.Guest(t, pushOut)
	pod, err := b.w.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.w.memory(t) // the container and its figures end with it
	b.w.Kubectl(t, "delete", "pod", "-n", rigtest.Namespace, pod.Name)
	b.w.PodReady(t, 0)
	b.refresh(t)
	for _, kind := range []string{"PIDProblem", "OOMProblem"} {
		b.w.Await(t, "neither forks nor kills to be told", b.w.is(kind, corev1.ConditionFalse, "NoProblem"))
	}
}
