//go:build cluster

package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/test/figures"
	"github.com/hosthygiene/agent/test/rig/rigtest"
	"github.com/hosthygiene/agent/test/soak"
)

var (
	soakFor  = flag.Duration("soak", 0, "soak the node in faults for so long, by its own clock")
	soakSeed = flag.Uint64("soak-seed", 0, "what the faults of a soak are drawn by; 0 for another one each time")
	soakInto = flag.String("soak-figures", "", "write the figures of a soak into this `file`")
	broken   = flag.String("broken", "", "break the agent by testdata/broken/`NAME`.diff first: the soak has to fail")
)

// TestSoak makes faults of all kinds at random, several at a time, and holds what
// the agent tells to the log of them: "make soak".
func TestSoak(t *testing.T) {
	if *soakFor == 0 {
		t.Skip("takes half an hour; make soak")
	}
	w := deploy(t)
	w.Guest(t, upsetOutfit)
	t.Cleanup(func() { w.Guest(t, upsetOutfitOff) })
	w.configure(t, upsetConfig, w.upsetConfigInForce)
	w.Await(t, "every condition to be healthy", w.healthy)
	u := newUpsets(t, w, longUpsets())
	rows := u.run(t, drawnBy(), soak.Pace{Length: *soakFor, Gap: 4 * time.Second, Least: 5 * time.Second, Most: 40 * time.Second, Brief: 3 * time.Second})
	switch {
	case *soakInto == "":
	case *broken == "":
		writeTables(t, *soakInto, rows...)
	default: // of a broken agent only what was wrong
		verdict := rows[0]
		writeTables(t, *soakInto, figures.Table{Name: "soak broken", Header: append([]string{"broken"}, verdict.Header...), Rows: [][]string{append([]string{*broken}, verdict.Rows[0]...)}})
	}
}

func drawnBy() uint64 {
	if *soakSeed != 0 {
		return *soakSeed
	}
	return 1 + rand.Uint64N(1<<32)
}

// brokenTree copies the sources and breaks the copy.
func brokenTree(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	diff, err := filepath.Abs(filepath.Join("testdata/broken", name+".diff"))
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range [][]string{
		{"sh", "-c", `git ls-files -z -co --exclude-standard | tar -c --null --ignore-failed-read -T - | tar -x -C "$0"`, dir},
		{"git", "-C", dir, "apply", diff},
	} {
		cmd := exec.CommandContext(t.Context(), step[0], step[1:]...)
		cmd.Dir = "../.."
		cmd.Env = append(os.Environ(), "GIT_CEILING_DIRECTORIES="+filepath.Dir(dir))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", step[0], err, out)
		}
	}
	return dir
}

// upsetEvery is how often the agent looks while the faults of a soak are made.
const upsetEvery = 10 * time.Second

// upsetConfig is what the faults need: something of every kind that can be
// required, and holds that fit between two faults.
const upsetConfig = `apiVersion: hosthygiene.io/v1alpha1
kind: AgentConfig
interval: 10s
probes:
  packages: {lockHeldFor: 5s}
  oom: {window: 1m}
require:
  devices:
  - {id: /dev/disk/by-id/virtio-SPARE}
  - {id: /dev/disk/by-id/virtio-DATA, mountedAt: /data, fsType: ext4}
  packages: [iscsi, multipath, {name: ` + testPackage + `}]
  modules: [dummy]
  sysctls: {vm.swappiness: "61"}
  units: [{name: e2e-soak.service, enabled: false, active: true}]
  files: [{path: /etc/modules-load.d/e2e-soak.conf, content: "dummy\n"}]
hold:
  TimeSourceUnreachable: {before: 10s}
  TimeDaemonUnresponsive: {before: 5s}
  PathsDegraded: {clear: 3s}
  AllPathsFailed: {clear: 3s}
  QueueingWithoutPaths: {clear: 3s}
  MultipathdDown: {before: 3s}
  MultipathdUnresponsive: {before: 3s}
  MapSuspended: {before: 3s}
  DeviceOffline: {clear: 3s}
  SessionFailed: {before: 3s, clear: 3s}
  IscsidDown: {before: 3s}
  RequiredDeviceMissing: {before: 3s}
  RequiredDeviceNotMounted: {before: 3s}
  RequiredUnitNotActive: {before: 3s}
  MountUnresponsive: {before: 3s}
  PIDsNearLimit: {clear: 3s}
  NoPIDReservation: {clear: 15s}
  FeatureGateRemoved: {clear: 3s}
  SwapEnabled: {clear: 3s}
  OOMScoreDrift: {before: 15s}
`

// upsetOutfit puts on the node what upsetConfig requires.
const upsetOutfit = `mountpoint -q /data || mount /data
modprobe dummy; echo dummy >/etc/modules-load.d/e2e-soak.conf
echo 'vm.swappiness = 61' >/etc/sysctl.d/99-e2e-soak.conf; sysctl -q vm.swappiness=61
printf '[Service]\nExecStart=/usr/bin/sleep infinity\n' >/etc/systemd/system/e2e-soak.service
systemctl daemon-reload; systemctl start e2e-soak
cp -p /etc/fstab /etc/iscsi/initiatorname.iscsi /tmp/e2e/
mkdir -p /mnt/e2e-dead
cat >/tmp/e2e/dead.pl <<'EOF'
` + deadFUSE + `EOF
` + startForks

const upsetOutfitOff = `systemctl stop ` + forkUnit + ` e2e-soak; rm -f /etc/systemd/system/e2e-soak.service; systemctl daemon-reload
rm -f /etc/modules-load.d/e2e-soak.conf /etc/sysctl.d/99-e2e-soak.conf; rmmod dummy; sysctl -q vm.swappiness=60; rmdir /mnt/e2e-dead`

// deadFUSE is a file system in user space whose server opens it and never
// answers: mount(2), of which no library is needed (165 on amd64, 40 on arm64).
const deadFUSE = `open(my $f, "+<", "/dev/fuse") or die "fuse: $!"; $^F = 255;
my ($type, $dir, $opts) = ("fuse", $ARGV[0], sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fileno $f));
chomp(my $arch = qx(uname -m));
syscall($arch eq "x86_64" ? 165 : 40, $type, $dir, $type, 0, $opts) == 0 or die "mount: $!";
sleep 1 while 1;
`

// upset is a fault and how it is made on the node.
type upset struct {
	soak.Fault
	make, mend string
	act, undo  step // from outside
}

// slack is for the machine: the node is emulated, beside others.
const slack = 20 * time.Second

// longUpsets are all; shortUpsets those that runConfig and half a minute are
// enough for.
func longUpsets() []upset { return upsets(upsetEvery) }

func shortUpsets() []upset {
	return slices.DeleteFunc(upsets(3*time.Second), func(u upset) bool {
		return !slices.Contains([]string{"chronyd stopped", "a path offline", "iscsid stopped", "file system fails", "a package removed", "fstab names a disk by its kernel name", "a reboot long due"}, u.Name)
	})
}

func upsets(every time.Duration) []upset {
	say := func(probe string, reasons ...string) (all []soak.Saying) {
		for _, r := range reasons {
			all = append(all, soak.Saying{Probe: probe, Reason: r})
		}
		return all
	}
	// Announced faults are told within the hold, and slack; of the others the
	// agent learns when it looks.
	tell := func(probe, names string, within time.Duration, reasons ...string) soak.Tell {
		return soak.Tell{Probe: probe, Reasons: reasons, Names: names, Within: within + slack}
	}
	look := every + every/10
	clears := 15*time.Second + look + slack
	// What a clock says that was lost for a while, or a daemon that comes back.
	clock := say("time", "ClockUnsynchronized", "ClockOffsetHigh", "ClockErrorBoundHigh", "TimeSourceUnreachable", "TimeDaemonUnresponsive", "ClockDisagreesWithHypervisor", "NoTimeDaemon", "TimeDaemonLocalReference")
	one := func(name string, takes []string, t soak.Tell, may []soak.Saying, make, mend string) upset {
		return upset{Fault: soak.Fault{Name: name, Takes: takes, Tells: []soak.Tell{t}, May: may, Clears: clears}, make: make, mend: mend}
	}
	offline := say("disks", "DeviceOffline")
	with := func(u upset, change func(*upset)) upset { change(&u); return u }
	slowClock := func(u *upset) { u.Clears = 2 * time.Minute }
	momentary := func(told time.Duration) func(*upset) {
		return func(u *upset) { u.Momentary, u.Clears = true, told+look+slack }
	}
	kubeletGroup := "/sys/fs/cgroup/system.slice/kubelet.service/"
	return []upset{
		one("chronyd stopped", []string{"time"}, tell("time", "no time daemon", 0, "NoTimeDaemon"), clock,
			"systemctl stop chrony", "systemctl start chrony"),
		with(one("chronyd killed", []string{"time"}, tell("units", "chrony", 0, "UnitFailed"), clock,
			"systemctl kill -s KILL chrony", "systemctl reset-failed chrony; systemctl start chrony"), slowClock),
		with(one("chronyd hangs", []string{"time"}, tell("time", "does not answer", 10*time.Second+look, "TimeDaemonUnresponsive"), clock,
			"systemctl kill --kill-whom=main -s STOP chrony", "systemctl kill --kill-whom=main -s CONT chrony"), slowClock),
		with(one("the clock is set", []string{"time"}, tell("time", "", 15*time.Second, "ClockOffsetHigh", "ClockUnsynchronized", "ClockDisagreesWithHypervisor"), clock,
			"date -s '+30 seconds' >/dev/null", "date -s '-30 seconds' >/dev/null; chronyc -a 'burst 2/4' >/dev/null"), slowClock),

		one("a path offline", []string{"multipath"}, tell("multipath", "mpatha", look, "PathsDegraded"), offline,
			setPaths("offline", "1"), setPaths("running", "9")),
		one("all paths offline", []string{"multipath"}, tell("multipath", "mpatha", look, "AllPathsFailed", "QueueingWithoutPaths"), append(say("multipath", "PathsDegraded", "AllPathsFailed", "QueueingWithoutPaths"), offline...),
			setPaths("offline", "9"), setPaths("running", "9")),
		with(one("a path pulled out", []string{"multipath"}, tell("multipath", "mpatha", 0, "PathsDegraded"), append(say("disks", "LeftoverDevice"), offline...), "", ""),
			func(u *upset) { u.act, u.undo = unplug("path-b"), replug("path-b") }),
		one("multipathd stopped", []string{"multipath"}, tell("multipath", "multipathd does not run", 3*time.Second, "MultipathdDown"), nil,
			"systemctl stop multipathd.socket multipathd.service", "systemctl start multipathd.service"),
		one("multipathd hangs", []string{"multipath"}, tell("multipath", "multipathd", 15*time.Second+2*look, "MultipathdUnresponsive"), nil,
			"systemctl kill --kill-whom=main -s STOP multipathd", "systemctl kill --kill-whom=main -s CONT multipathd"),
		one("a map suspended", []string{"multipath"}, tell("multipath", "mpatha", 3*time.Second+2*look, "MapSuspended"), nil,
			"dmsetup suspend --noflush mpatha", "dmsetup resume mpatha"),

		one("the iSCSI target gone", []string{"iscsi"}, tell("iscsi", "iSCSI session to", 3*time.Second, "SessionFailed"), offline,
			"systemctl kill -s KILL tgt; systemctl stop tgt", "systemctl start tgt rig-iscsi"),
		one("iscsid stopped", []string{"iscsi"}, tell("iscsi", "iscsid does not run", 3*time.Second, "IscsidDown"), nil,
			"systemctl stop iscsid.socket iscsid.service", "systemctl start iscsid.socket iscsid.service"),
		one("the initiator name garbled", []string{"iscsi"}, tell("iscsi", "", look, "InitiatorNameInvalid"), say("iscsi", "InitiatorNameChanged", "InitiatorNameNotGenerated", "InitiatorNameMissing"),
			"echo 'InitiatorName=nonsense name' >/etc/iscsi/initiatorname.iscsi", "cat /tmp/e2e/initiatorname.iscsi >/etc/iscsi/initiatorname.iscsi"),

		with(one("a required disk pulled out", []string{"spare"}, tell("disks", "virtio-SPARE", 3*time.Second, "RequiredDeviceMissing"), nil, "", ""),
			func(u *upset) { u.act, u.undo = unplug("spare"), replug("spare") }),
		one("file system fails", []string{"spare"}, tell("disks", "/spare", 0, "FilesystemReadOnly"), say("disks", "FilesystemErrors"),
			"mountpoint -q /spare || mount /spare\n"+spareDisk+"echo 1 >/sys/fs/ext4/$d/trigger_fs_error", "umount /spare; e2fsck -fy /dev/disk/by-id/virtio-SPARE || test $? -eq 1"),
		one("a required disk unmounted", []string{"data"}, tell("disks", "/data", 3*time.Second, "RequiredDeviceNotMounted"), nil,
			"umount /data", "mountpoint -q /data || mount /data"),
		one("fstab names a disk by its kernel name", []string{"fstab"}, tell("disks", "/dev/vdz9", 0, "UnstableDeviceName"), nil,
			"echo '/dev/vdz9 /mnt ext4 nofail 0 0' >>/etc/fstab", "cat /tmp/e2e/fstab >/etc/fstab"),
		// By a rename, for the file has to be there with the time it is to have.
		one("a reboot long due", []string{"reboot"}, tell("updates", "a reboot is pending", 0, "RebootPending"), nil,
			"touch -d '10 days ago' /run/e2e-reboot; mv /run/e2e-reboot /run/reboot-required", "rm -f /run/reboot-required"),
		// systemd hangs in it when it starts a service that has a mount namespace of
		// its own, as chronyd has.
		with(one("a mount that never answers", []string{"fuse"}, tell("disks", "/mnt/e2e-dead", 15*time.Second+2*look, "MountUnresponsive"), nil,
			"systemd-run --quiet --unit e2e-dead perl /tmp/e2e/dead.pl /mnt/e2e-dead; until grep -q ' /mnt/e2e-dead ' /proc/self/mounts; do sleep 0.1; done", "systemctl stop e2e-dead; umount -l /mnt/e2e-dead"), func(u *upset) { u.Alone = true }),

		with(one("the kubelet reserves no PIDs", []string{"kubelet", "kubelet config"}, tell("pids", "pods may take every process ID", 10*time.Second+look, "NoPIDReservation"), slices.Concat(say("pids", "PIDLimitStale", soak.Unknown), say("oom", "OOMScoreDrift")),
			kubeletConfig(`'/^ *pid: /d'`), kubeletConfigBack), func(u *upset) { u.Clears = 2 * time.Minute }),
		// It is the next start that fails, so none may come meanwhile.
		one("the kubelet has a feature gate that goes", []string{"kubelet config"}, tell("kubelet", "LogarithmicScaleDown", 0, "FeatureGateRemoved"), nil,
			"f=/var/lib/kubelet/config.yaml; cp -p $f $f.gate; cp -p $f $f.old; echo 'featureGates: {LogarithmicScaleDown: true}' >>$f.gate; mv $f.gate $f", "f=/var/lib/kubelet/config.yaml; if test -e $f.old; then mv $f.old $f; fi"),
		one("the host swaps", []string{"kubelet config"}, tell("kubelet", "failSwapOn", look, "SwapEnabled"), nil,
			"dd if=/dev/zero of=/var/tmp/e2e.swap bs=1M count=4 status=none; chmod 600 /var/tmp/e2e.swap; mkswap -q /var/tmp/e2e.swap; swapon /var/tmp/e2e.swap", "swapoff /var/tmp/e2e.swap; rm -f /var/tmp/e2e.swap"),
		// With the sleepers the limit leaves the kubelet eight more: of two it was
		// refused one now and then, which the agent told.
		one("a unit near its limit of processes", []string{"kubelet"}, tell("pids", "kubelet", look, "PIDsNearLimit"), nil,
			"for i in $(seq 36); do sleep 900 </dev/null >/dev/null 2>&1 & echo $! >>/tmp/e2e/sleepers; echo $! >"+kubeletGroup+"cgroup.procs; done; "+
				"cat "+kubeletGroup+"pids.max >/tmp/e2e/pids.max; echo $(($(cat "+kubeletGroup+"pids.current) * 7 / 6)) >"+kubeletGroup+"pids.max",
			"cat /tmp/e2e/pids.max >"+kubeletGroup+"pids.max; if test -e /tmp/e2e/sleepers; then kill $(cat /tmp/e2e/sleepers); rm /tmp/e2e/sleepers; fi"),
		with(one("a fork refused", []string{"forks"}, tell("pids", "the kernel refused", look, "ForkFailures"), nil, refuseFork, ""), momentary(10*time.Minute)),

		one("containerd's OOM score changed", []string{"score"}, tell("oom", "containerd", 15*time.Second+look, "OOMScoreDrift"), nil,
			"echo -500 >/proc/$(systemctl show -P MainPID containerd)/oom_score_adj", "echo -999 >/proc/$(systemctl show -P MainPID containerd)/oom_score_adj"),
		with(one("a process killed for memory", []string{"kill"}, tell("oom", "e2e-hungry", look, "SystemOOMKill"), nil,
			"systemd-run --quiet --wait --collect --unit e2e-hungry -p MemoryMax=20M -p MemorySwapMax=0 -p OOMPolicy=continue tail /dev/zero || true", ""), momentary(time.Minute+30*time.Second)),

		// An installation may take as long as a lock may be held here.
		one("a package removed", []string{"dpkg"}, tell("packages", testPackage, 0, "PackageMissing"), say("packages", "PackageLockHeld"),
			"dpkg --remove "+testPackage, "dpkg -i /tmp/e2e/"+testPackage+".deb"),
		one("the package lock held", []string{"dpkg"}, tell("packages", "dpkg", 5*time.Second+2*look, "PackageLockHeld"), nil,
			"systemd-run --quiet --unit e2e-dpkg dpkg -i /tmp/e2e/hygiene-slow.deb", "touch /tmp/e2e/go-on; while systemctl is-active -q e2e-dpkg; do sleep 0.2; done; rm -f /tmp/e2e/go-on; dpkg --purge hygiene-slow"),

		one("a required unit stopped", []string{"unit"}, tell("units", "e2e-soak", 3*time.Second, "RequiredUnitNotActive"), nil,
			"systemctl stop e2e-soak", "systemctl start e2e-soak"),
		one("a required file changed", []string{"file"}, tell("units", "e2e-soak.conf", look, "FileDiffers"), nil,
			"echo '# mine' >>/etc/modules-load.d/e2e-soak.conf", "echo dummy >/etc/modules-load.d/e2e-soak.conf"),
		one("a required module unloaded", []string{"module"}, tell("kernel", "dummy", look, "ModuleNotLoaded"), nil,
			"rmmod dummy", "modprobe dummy"),
		one("a required sysctl changed", []string{"sysctl"}, tell("kernel", "vm.swappiness", look, "SysctlDiffers"), nil,
			"sysctl -q vm.swappiness=10", "sysctl -q vm.swappiness=61"),
	}
}

func (w *world) upsetConfigInForce() error {
	samples, err := w.metrics()
	if err != nil {
		return err
	}
	if _, known := samples[`hosthygiene_problem{probe="kernel",reason="SysctlDiffers",severity="warning"}`]; !known || samples["hosthygiene_config_last_reload_successful"] != 1 {
		return errors.New("the kernel probe has no metrics yet")
	}
	return w.is("KernelProblem", corev1.ConditionFalse)()
}

// soaking is a run.
type soaking struct {
	w     *world
	s     *session
	list  []upset
	probe map[string]string // by the condition that tells of it

	mu      sync.Mutex
	metrics []soak.Span
	open    map[soak.Saying]int // indexes of metrics
	vitals  []vitals
	faults  []string // of watching
}

// vitals are what the agent uses at one moment.
type vitals struct {
	at                                         time.Time
	goroutines, threads, files, resident, anon float64
	others                                     float64 // files that are not of procfs or sysfs
}

func newUpsets(t *testing.T, w *world, list []upset) *soaking {
	t.Helper()
	u := &soaking{w: w, s: w.session(t), list: list, probe: map[string]string{}, open: map[soak.Saying]int{}}
	for _, p := range probes.Defaults().List() {
		u.probe[strings.TrimPrefix(p.Condition(), rigtest.ConditionPrefix)] = p.Name()
	}
	return u
}

// watch polls the metrics until ctx ends.
func (u *soaking) watch(ctx context.Context) {
	for every := time.NewTicker(2 * time.Second); ; {
		select {
		case <-ctx.Done():
			every.Stop()
			return
		case <-every.C:
		}
		samples, err := u.w.metrics()
		at := time.Now()
		u.mu.Lock()
		if err != nil {
			u.faults = append(u.faults, fmt.Sprintf("%s metrics: %v", at.UTC().Format(time.TimeOnly), err))
		} else {
			u.sample(at, samples)
		}
		u.mu.Unlock()
	}
}

// plainLabels makes of labels what Sscanf reads.
var plainLabels = strings.NewReplacer(",", " ", "}", "")

// sample takes what the metrics say; u.mu is held.
func (u *soaking) sample(at time.Time, samples map[string]float64) {
	said := map[soak.Saying]bool{}
	for name, v := range samples {
		var s soak.Saying
		var severity string
		if labels, ok := strings.CutPrefix(name, "hosthygiene_problem{"); ok && v == 1 {
			if _, err := fmt.Sscanf(plainLabels.Replace(labels), "probe=%q reason=%q severity=%q", &s.Probe, &s.Reason, &severity); err == nil && severity != "info" {
				said[s] = true
			}
		}
		if labels, ok := strings.CutPrefix(name, "hosthygiene_probe_status{"); ok && v == 1 {
			if _, err := fmt.Sscanf(plainLabels.Replace(labels), "probe=%q status=%q", &s.Probe, &s.Reason); err == nil && s.Reason == soak.Unknown {
				said[s] = true
			}
		}
	}
	for s := range said {
		i, open := u.open[s]
		if !open {
			i = len(u.metrics)
			u.metrics = append(u.metrics, soak.Span{Saying: s, From: at, Via: "metrics"})
			u.open[s] = i
		}
		u.metrics[i].To = at
	}
	for s := range u.open {
		if !said[s] {
			delete(u.open, s)
		}
	}
	u.vitals = append(u.vitals, vitals{at: at, goroutines: samples["go_goroutines"], threads: samples["go_threads"], files: samples["process_open_fds"], resident: samples["process_resident_memory_bytes"]})
}

// conditions are what the API server showed since a mark, as spans.
func (u *soaking) conditions(since mark, end time.Time) []soak.Span {
	var spans []soak.Span
	last := map[string]int{} // the open span of a condition
	for _, c := range u.w.changesSince(since) {
		if i, open := last[c.kind]; open {
			spans[i].To = c.at
			delete(last, c.kind)
		}
		if c.to == nil || c.to.Status == corev1.ConditionFalse && c.kind != "Ready" || c.kind == "Ready" && c.to.Status == corev1.ConditionTrue {
			continue
		}
		s := soak.Span{Saying: soak.Saying{Probe: u.probe[c.kind], Reason: c.to.Reason}, From: c.at, To: end, Message: c.to.Message, Via: c.kind}
		if c.kind != "Ready" && c.to.Status == corev1.ConditionUnknown {
			s.Reason = soak.Unknown
		}
		if c.kind == "Ready" {
			s.Probe, s.Sums = u.whose(c.to.Reason), true
		}
		last[c.kind] = len(spans)
		spans = append(spans, s)
	}
	return spans
}

// whose finds the probe that has a reason: Ready names one of any.
func (u *soaking) whose(reason string) string {
	for _, p := range probes.Defaults().List() {
		for _, r := range p.Rules() {
			if r.Reason == reason {
				return p.Name()
			}
		}
	}
	return "Ready"
}

// run makes the faults of a seed and judges what was told.
func (u *soaking) run(t *testing.T, seed uint64, pace soak.Pace) []figures.Table {
	w := u.w
	t.Logf("seed %d: make soak SEED=%d makes the same faults", seed, seed)
	faults := make([]soak.Fault, len(u.list))
	for i, f := range u.list {
		faults[i] = f.Fault
	}
	plan := soak.Plan(seed, faults, pace)
	t.Cleanup(func() {
		ctx := w.CleanupContext(t)
		for _, f := range u.list {
			if err := f.repair(ctx, u, true); err != nil {
				t.Logf("%s: %v", f.Name, err)
			}
		}
	})
	rigtest.OnFailure(t, w.dump)
	pod, err := w.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	watching := make(chan struct{})
	go func() { defer close(watching); u.watch(ctx) }()
	defer stop()
	before := w.mark()
	up := u.uptime(t)

	made := make([]soak.Made, len(plan))
	began := time.Now()
	var memory []vitals
	measured := time.Time{}
	note := func() {
		if time.Since(measured) > 30*time.Second {
			measured = time.Now()
			memory = append(memory, u.memory(t))
		}
	}
	for _, step := range soak.Steps(plan) {
		for wait := time.Until(began.Add(step.At)); wait > 0; wait = time.Until(began.Add(step.At)) {
			note()
			time.Sleep(min(wait, 5*time.Second))
		}
		f, m := u.list[plan[step.Planned].Fault], &made[step.Planned]
		// What a slow machine did not come to in time is left out.
		if step.Begins && time.Since(began) > pace.Length || !step.Begins && m.From.IsZero() {
			continue
		}
		if step.Begins {
			u.awaitUntold(f.Fault, made)
			m.Fault, m.Brief, m.From = f.Fault, plan[step.Planned].Brief, time.Now()
			err = f.fault(w.CleanupContext(t), u)
			m.Begun = time.Now()
		} else {
			// It lasts as long as planned, also where making it took long.
			time.Sleep(time.Until(m.Begun.Add(plan[step.Planned].For)))
			for !m.Brief && !u.told(m) {
				time.Sleep(look)
			}
			m.Mended = time.Now()
			err = f.repair(w.CleanupContext(t), u, false)
			m.To = time.Now()
		}
		if err != nil {
			t.Errorf("%s: %v", f.Name, err) // the end of the faults, but not of judging
			break
		}
	}
	t.Logf("all is mended after %s", time.Since(began).Round(time.Second))
	// What remains is told for as long as it may be, and then not any more.
	var log []soak.Made
	last := time.Now()
	for _, m := range made {
		if m.From.IsZero() {
			continue
		}
		if m.To.IsZero() { // of a run that was broken off
			m.Mended, m.To = time.Now(), time.Now().Add(24*time.Hour)
		} else if end := m.To.Add(m.Fault.Clears); end.After(last) {
			last = end
		}
		log = append(log, m)
	}
	for err = u.well(); err != nil && time.Until(last)+slack > 0; err = u.well() {
		note()
		time.Sleep(look)
	}
	if err != nil {
		t.Errorf("not well again: %v", err)
	}
	guest := u.uptime(t) - up
	time.Sleep(4 * time.Second) // the metrics once more
	stop()
	<-watching
	u.mu.Lock()
	defer u.mu.Unlock()

	v := soak.Judge(log, u.metrics, u.conditions(before, time.Now()))
	// The node is emulated: it may be too busy to answer now and then.
	for _, f := range u.faults {
		t.Log(f)
	}
	if len(u.faults) > 2+len(u.vitals)/50 {
		t.Errorf("the metrics were not to be had %d times of %d", len(u.faults), len(u.faults)+len(u.vitals))
	}
	w.sameContainer(t, pod)
	if !v.Clean() {
		for _, m := range log {
			t.Log(m)
		}
		t.Errorf("seed %d: %s", seed, v)
	}
	return append(u.tables(t, seed, guest, log, v), u.vitalsTable(t, pace.Length, memory))
}

// sameContainer holds the agent to have run since its pod was looked at.
func (w *world) sameContainer(t *testing.T, before corev1.Pod) {
	t.Helper()
	now, err := w.Pod(t.Context())
	if err != nil {
		t.Error(err)
		return
	}
	if s := now.Status.ContainerStatuses[0]; now.Name != before.Name || s.RestartCount != before.Status.ContainerStatuses[0].RestartCount {
		last, err := w.ControlPlane.Kubectl(t.Context(), "logs", "-n", rigtest.Namespace, now.Name, "--previous", "--tail=40")
		t.Errorf("the agent was restarted: %+v\n%s %v", s.LastTerminationState.Terminated, last, err)
	}
}

// well says whether every condition there is tells of no problem.
func (u *soaking) well() error {
	all := u.w.all()
	return all.Healthy(slices.DeleteFunc(slices.Collect(maps.Keys(all)), func(kind string) bool { return kind == "Ready" })...)
}

// awaitUntold waits while that is told of an earlier fault by which this one will
// have to be told: else nobody could say which of them it is of.
func (u *soaking) awaitUntold(f soak.Fault, made []soak.Made) {
	var until time.Time
	for _, m := range made {
		if end := m.To.Add(m.Fault.Clears); !m.To.IsZero() && end.After(until) && slices.ContainsFunc(f.Takes, func(what string) bool { return slices.Contains(m.Fault.Takes, what) }) {
			until = end
		}
	}
	for time.Now().Before(until) && slices.ContainsFunc(f.Tells, u.says) {
		time.Sleep(look)
	}
}

// says whether a probe gives one of the reasons now, in the metrics or as the one
// of its condition.
func (u *soaking) says(tell soak.Tell) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	for kind, c := range u.w.all() {
		if u.probe[kind] == tell.Probe && c.Status == corev1.ConditionTrue && slices.Contains(tell.Reasons, c.Reason) {
			return true
		}
	}
	return slices.ContainsFunc(tell.Reasons, func(r string) bool { _, said := u.open[soak.Saying{Probe: tell.Probe, Reason: r}]; return said })
}

// told says whether a fault has been told, or is too late now.
func (u *soaking) told(m *soak.Made) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, tell := range m.Fault.Tells {
		if time.Since(m.Begun) > tell.Within {
			continue
		}
		in := false
		for kind, c := range u.w.all() {
			in = in || u.probe[kind] == tell.Probe && c.Status == corev1.ConditionTrue && tell.Told(c.Reason, c.Message)
		}
		if !in || !slices.ContainsFunc(tell.Reasons, func(r string) bool { _, said := u.open[soak.Saying{Probe: tell.Probe, Reason: r}]; return said }) {
			return false
		}
	}
	return true
}

func (f upset) fault(ctx context.Context, u *soaking) error {
	if f.act != nil {
		return f.act(ctx, u.w)
	}
	_, err := u.s.do(f.make)
	return err
}

// repair mends what a fault did; after a failure also what it may not have done.
func (f upset) repair(ctx context.Context, u *soaking, blindly bool) error {
	switch {
	case f.undo != nil && blindly:
		return nil // a disk that is there can not be put back; the next run says so
	case f.undo != nil:
		return f.undo(ctx, u.w)
	case f.mend == "" || blindly && f.Name == "the clock is set":
		return nil
	case blindly:
		_, err := u.w.TryGuest(ctx, "set +e\n"+f.mend+"\ntrue")
		return err
	}
	_, err := u.s.do(f.mend)
	return err
}

func (u *soaking) uptime(t *testing.T) time.Duration {
	t.Helper()
	out, err := u.s.raw("at")
	if err != nil {
		t.Fatal(err)
	}
	up, err := printedTime(out)
	if err != nil {
		t.Fatal(err)
	}
	return seconds(up)
}

// memory is what the agent's process has for itself, in bytes.
func (u *soaking) memory(t *testing.T) vitals {
	t.Helper()
	out, err := u.s.do(rigtest.AgentPID + `awk '$1 == "Rss:" {r = $2} $1 == "Anonymous:" {a = $2} END {print r * 1024, a * 1024}' /proc/$pid/smaps_rollup; ls /proc/$pid/fd | wc -l; ls /proc/$pid/task | wc -l`)
	v := vitals{at: time.Now()}
	if err == nil {
		_, err = fmt.Sscan(out, &v.resident, &v.anon, &v.files, &v.threads)
	}
	if err != nil {
		t.Fatalf("reading the agent's memory: %v: %q", err, out)
	}
	return v
}

func (u *soaking) tables(t *testing.T, seed uint64, guest time.Duration, log []soak.Made, v soak.Verdict) []figures.Table {
	brief, together, most := 0, 0, 0
	for i, m := range log {
		if m.Brief {
			brief++
		}
		together = 1
		for _, other := range log[:i] {
			if other.To.After(m.From) {
				together++
			}
		}
		most = max(most, together)
	}
	verdict := figures.Table{Name: "soak", Header: []string{"seed", "guest time", "faults", "of which brief", "most at a time", "missed", "false", "stuck", "day", "agent"}, Rows: [][]string{{
		fmt.Sprint(seed), guest.Round(time.Second).String(), fmt.Sprint(len(log)), fmt.Sprint(brief), fmt.Sprint(most),
		fmt.Sprint(len(v.Missed)), fmt.Sprint(len(v.False)), fmt.Sprint(len(v.Stuck)), time.Now().UTC().Format(time.DateOnly), version(),
	}}}
	t.Log(plain(verdict))
	kinds := figures.Table{Name: "soak faults", Header: []string{"fault", "told as", "made", "told in time", "median", "longest", "allowed"}}
	for _, f := range u.list {
		made := 0
		for _, m := range log {
			if m.Fault.Name == f.Name && !m.Brief {
				made++
			}
		}
		if made == 0 {
			continue
		}
		told := figures.Times(v.Told[f.Name])
		tell := f.Tells[0]
		kinds.Rows = append(kinds.Rows, []string{f.Name, tell.Probe + ": " + strings.Join(tell.Reasons, " or "), fmt.Sprint(made), fmt.Sprint(len(told)),
			figures.Seconds(told.Median()), figures.Seconds(told.Max()), figures.Seconds(tell.Within)})
	}
	t.Log(plain(kinds))
	return []figures.Table{verdict, kinds}
}

// flat is by how much more the agent may use in the last third of a soak than in
// the second.
const flat = 1.1

// vitalsTable shows whether the agent grew: the least of each third, which is
// what it has when it does nothing, and for memory the median.
func (u *soaking) vitalsTable(t *testing.T, length time.Duration, memory []vitals) figures.Table {
	table := figures.Table{Name: "soak vitals", Header: []string{"what", "first third", "second", "last", "most"}}
	row := func(what string, all []vitals, of func(vitals) float64, rank func([]float64) float64, show string) {
		if len(all) < 3 {
			return
		}
		var thirds [3]float64
		var top float64
		for i := range thirds {
			var values []float64
			for _, v := range all[i*len(all)/3 : (i+1)*len(all)/3] {
				values = append(values, of(v))
				top = max(top, of(v))
			}
			slices.Sort(values)
			thirds[i] = rank(values)
		}
		table.Rows = append(table.Rows, []string{what, fmt.Sprintf(show, thirds[0]), fmt.Sprintf(show, thirds[1]), fmt.Sprintf(show, thirds[2]), fmt.Sprintf(show, top)})
		// A short run is not over its beginning in its second third.
		if length >= 10*time.Minute && thirds[2] > thirds[1]*flat+2 {
			t.Errorf("%s grew: %v", what, thirds)
		}
	}
	least := func(sorted []float64) float64 { return sorted[0] }
	median := func(sorted []float64) float64 { return sorted[len(sorted)/2] }
	row("goroutines, least", u.vitals, func(v vitals) float64 { return v.goroutines }, least, "%.0f")
	row("threads, least", u.vitals, func(v vitals) float64 { return v.threads }, least, "%.0f")
	row("descriptors, least", u.vitals, func(v vitals) float64 { return v.files }, least, "%.0f")
	row("resident memory, median", memory, func(v vitals) float64 { return v.resident / 1e6 }, median, "%.1f MB")
	row("anonymous memory, median", memory, func(v vitals) float64 { return v.anon / 1e6 }, median, "%.1f MB")
	t.Log(plain(table))
	return table
}

// writeTables puts tables into a document.
func writeTables(t *testing.T, file string, tables ...figures.Table) {
	t.Helper()
	doc, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		if doc, err = table.Merge(doc); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, doc, 0o644); err != nil {
		t.Fatal(err)
	}
}

// shortSoak is what TestAgent has of it.
func (w *world) shortSoak(t *testing.T) {
	w.Guest(t, "cp -p /etc/fstab /tmp/e2e/")
	w.Await(t, "every condition to be healthy", w.healthy)
	newUpsets(t, w, shortUpsets()).run(t, drawnBy(), soak.Pace{Length: 20 * time.Second, Gap: time.Second, Least: 3 * time.Second, Most: 8 * time.Second, Brief: time.Second})
	w.invariants(t)
	w.Spent("short soak")
}
