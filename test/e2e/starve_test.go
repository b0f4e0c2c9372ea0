//go:build cluster

package e2e

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/figures"
	"github.com/hosthygiene/agent/test/rig/rigtest"
)

// TestStarved takes from the node what the agent itself needs, or has it hang in
// what it asks: "make soak".
func TestStarved(t *testing.T) {
	if *soakFor == 0 {
		t.Skip("takes ten minutes; make soak")
	}
	w := deploy(t)
	w.Guest(t, upsetOutfit)
	t.Cleanup(func() { w.Guest(t, upsetOutfitOff) })
	w.configure(t, upsetConfig, w.upsetConfigInForce)
	table := figures.Table{Name: "starved", Header: []string{"what", "told as", "told after", "the other probes: longest time between two runs", "goroutines before, most, after", "threads before, most, after", "descriptors before, most, after"}}
	for _, s := range starvings() {
		var row []string
		if t.Run(s.name, func(t *testing.T) { row = w.starve(t, s) }) && row != nil { // nil: not asked for
			table.Rows = append(table.Rows, row)
		}
	}
	t.Log(plain(table))
	if *soakInto != "" {
		writeTables(t, *soakInto, table)
	}
}

// starving is something the node lacks, or that hangs.
type starving struct {
	name string
	// fault and restore are done in a shell that is there already, for a node
	// without PIDs starts none. restore is of the shell's own commands there.
	prepare, fault, restore string
	// told is what each condition must come to say meanwhile: a reason, and what
	// the message must name.
	told []showing
	// hung are the probes that wait for what hangs; all others keep their pace.
	hung []string
	// lasts is how long it is left so, once it has been told.
	lasts time.Duration
	// clears is how long it is told afterwards.
	clears time.Duration
}

type showing struct {
	condition string
	status    corev1.ConditionStatus
	reasons   []string // of which one, or any if empty
	names     string
}

func (s showing) String() string {
	if s.status == corev1.ConditionUnknown {
		return s.condition + " Unknown, naming " + s.names
	}
	return s.condition + ": " + strings.Join(s.reasons, " or ")
}

// exhaust has a process fork until it is refused, and go on trying, until the
// file /tmp/e2e/enough is there or two minutes are over.
const exhaust = `fork=(perl -e 'my (@all, $end); $end = time + 120;
until (-e "/tmp/e2e/enough" or time > $end) {
  my $p = fork;
  if (!defined $p) { select undef, undef, undef, 0.05; next }
  if (!$p) { sleep 300; exit }
  push @all, $p;
}
kill 9, @all;')
rm -f /tmp/e2e/enough
`

func starvings() []starving {
	say := func(condition, names string, reasons ...string) showing {
		return showing{condition, corev1.ConditionTrue, reasons, names}
	}
	unknown := func(condition, names string) showing {
		return showing{condition, corev1.ConditionUnknown, nil, names}
	}
	const pods = "/sys/fs/cgroup/kubepods.slice"
	stop := func(unit string) (string, string) {
		return "kill -STOP $(systemctl show -P MainPID " + unit + ")", "kill -CONT $(systemctl show -P MainPID " + unit + ")"
	}
	multipathd, multipathdOn := stop("multipathd")
	chronyd, chronydOn := stop("chrony")
	bus, busOn := stop("dbus")
	return []starving{
		{
			name:    "no PID left for pods",
			prepare: "mkdir -p " + pods + "/e2e.slice; cat " + pods + "/pids.max >/tmp/e2e/pods.max",
			fault: exhaust + `echo $(($(cat ` + pods + `/pids.current) + 60)) >` + pods + `/pids.max
(echo $BASHPID >` + pods + `/e2e.slice/cgroup.procs; exec "${fork[@]}") >/dev/null 2>&1 &`,
			restore: ">/tmp/e2e/enough; wait; read max </tmp/e2e/pods.max; echo $max >" + pods + "/pids.max; rmdir " + pods + "/e2e.slice",
			told:    []showing{say("PIDProblem", "all pods", "PIDsNearLimit")}, lasts: 45 * time.Second, clears: 3 * time.Minute,
		},
		{
			name:    "no PID left on the node",
			prepare: "cat /proc/sys/kernel/threads-max >/tmp/e2e/threads-max",
			fault: exhaust + `read -r _ _ _ tasks _ </proc/loadavg; echo $((${tasks#*/} + 60)) >/proc/sys/kernel/threads-max
"${fork[@]}" >/dev/null 2>&1 &`,
			restore: ">/tmp/e2e/enough; read max </tmp/e2e/threads-max; echo $max >/proc/sys/kernel/threads-max; wait",
			told:    []showing{say("PIDProblem", "the node has", "PIDsNearLimit")}, lasts: 45 * time.Second, clears: 3 * time.Minute,
		},
		{
			// An emulated processor would read programs back in for minutes before the
			// kernel gives up: it is told to do so when what was used within a second
			// does not fit (Documentation/admin-guide/mm/multigen_lru.rst).
			name:    "no memory left on the node",
			prepare: "echo 1000 >/sys/kernel/mm/lru_gen/min_ttl_ms",
			fault:   "systemd-run --quiet --collect --unit e2e-hungry -p OOMPolicy=continue tail /dev/zero",
			restore: "echo 0 >/sys/kernel/mm/lru_gen/min_ttl_ms; systemctl stop e2e-hungry 2>/dev/null || true",
			told:    []showing{say("OOMProblem", "tail", "SystemOOMKill")}, clears: 3 * time.Minute,
		},
		{
			name:    "no space left on the root file system",
			fault:   "fallocate -l $(($(stat -f -c '%f * %S' / | tr -d '\\n') - 4096)) /var/tmp/e2e-full 2>/dev/null || true; dd if=/dev/zero of=/var/tmp/e2e-full bs=1M oflag=append conv=notrunc 2>/dev/null || true; ! echo more >/var/tmp/e2e-more; systemctl stop chrony",
			restore: "rm -f /var/tmp/e2e-full /var/tmp/e2e-more; systemctl start chrony",
			told:    []showing{say("TimeProblem", "", "NoTimeDaemon")}, lasts: 20 * time.Second, clears: 3 * time.Minute,
		},
		{
			name:    "a file system whose server never answers is mounted",
			fault:   "systemd-run --quiet --unit e2e-dead perl /tmp/e2e/dead.pl /mnt/e2e-dead",
			restore: "systemctl stop e2e-dead; umount -l /mnt/e2e-dead",
			told:    []showing{say("DiskProblem", "/mnt/e2e-dead", "MountUnresponsive")}, lasts: 30 * time.Second, clears: 2 * time.Minute,
		},
		{
			name:    "the same over /var/lib/dpkg, below the root it reads",
			fault:   "systemd-run --quiet --unit e2e-dead perl /tmp/e2e/dead.pl /var/lib/dpkg",
			restore: "systemctl stop e2e-dead; umount -l /var/lib/dpkg",
			told:    []showing{unknown("PackageProblem", "/var/lib/dpkg")}, hung: []string{"packages"}, lasts: 30 * time.Second, clears: 2 * time.Minute,
		},
		{
			name: "/var/lib/dpkg on an iSCSI disk whose target is gone",
			prepare: `d=/dev/$(ls /sys/class/iscsi_session/session*/device/target*/*/block | tail -n 1); mkfs.ext4 -q -F -O ^has_journal $d; mkdir -p /tmp/e2e/net
mount $d /tmp/e2e/net; cp -a /var/lib/dpkg/. /tmp/e2e/net/; umount /tmp/e2e/net; mount -o noatime $d /var/lib/dpkg; readlink -f $d >/tmp/e2e/net.disk`,
			fault:   "systemctl kill -s KILL tgt; systemctl stop tgt; echo 3 >/proc/sys/vm/drop_caches; umount -l /nowhere 2>/dev/null || true",
			restore: "systemctl start tgt rig-iscsi; umount -l /var/lib/dpkg; wipefs -qa $(cat /tmp/e2e/net.disk) || true",
			told:    []showing{unknown("PackageProblem", "/var/lib/dpkg"), say("ISCSIProblem", "", "SessionFailed")},
			hung:    []string{"packages"}, lasts: 20 * time.Second, clears: 3 * time.Minute,
		},
		{
			name: "multipathd stopped (SIGSTOP)", fault: multipathd, restore: multipathdOn,
			told: []showing{say("MultipathProblem", "multipathd", "MultipathdUnresponsive")}, hung: []string{"multipath"}, lasts: 30 * time.Second, clears: 2 * time.Minute,
		},
		{
			name: "chronyd stopped (SIGSTOP)", fault: chronyd, restore: chronydOn,
			told: []showing{say("TimeProblem", "chronyd", "TimeDaemonUnresponsive")}, hung: []string{"time"}, lasts: 30 * time.Second, clears: 3 * time.Minute,
		},
		{
			// systemd is asked past it: nothing is told, and nobody waits.
			name: "the system bus stopped (SIGSTOP)", fault: bus, restore: busOn, lasts: time.Minute, clears: 2 * time.Minute,
		},
		{
			name:  "multipathd, chronyd and the bus stopped together",
			fault: bus + "\n" + multipathd + "\n" + chronyd, restore: busOn + "\n" + multipathdOn + "\n" + chronydOn,
			told: []showing{say("MultipathProblem", "multipathd", "MultipathdUnresponsive"), say("TimeProblem", "chronyd", "TimeDaemonUnresponsive")},
			hung: []string{"multipath", "time"}, lasts: 30 * time.Second, clears: 3 * time.Minute,
		},
	}
}

// pace watches how often probes run, and what the agent uses.
type pace struct {
	mu      sync.Mutex
	runs    map[string]float64
	at      map[string]time.Time
	longest map[string]time.Duration
	most    vitals
	lost    int
}

func (w *world) paceUntil(stop <-chan struct{}, p *pace) {
	for every := time.NewTicker(time.Second); ; {
		select {
		case <-stop:
			every.Stop()
			return
		case <-every.C:
		}
		samples, err := w.metrics()
		now := time.Now()
		p.mu.Lock()
		if err != nil {
			p.lost++
		} else {
			p.take(now, samples)
		}
		p.mu.Unlock()
	}
}

func (p *pace) take(now time.Time, samples map[string]float64) {
	if p.runs == nil {
		p.runs, p.at, p.longest = map[string]float64{}, map[string]time.Time{}, map[string]time.Duration{}
	}
	for probe, n := range probeRuns(samples) {
		if p.at[probe].IsZero() || n > p.runs[probe] {
			p.runs[probe], p.at[probe] = n, now
		}
		p.longest[probe] = max(p.longest[probe], now.Sub(p.at[probe]))
	}
	p.most.goroutines = max(p.most.goroutines, samples["go_goroutines"])
	p.most.threads = max(p.most.threads, samples["go_threads"])
	p.most.files = max(p.most.files, samples["process_open_fds"])
}

// rest is what the agent has when it does nothing: the least of some samples.
func (w *world) rest(t *testing.T) vitals {
	t.Helper()
	var least vitals
	for k := 0; k < 8; k++ {
		samples, err := w.metrics()
		if err != nil {
			t.Fatal(err)
		}
		v := vitals{goroutines: samples["go_goroutines"], threads: samples["go_threads"], files: samples["process_open_fds"]}
		if k == 0 {
			least = v
		}
		least.goroutines, least.threads, least.files = min(least.goroutines, v.goroutines), min(least.threads, v.threads), min(least.files, v.files)
		time.Sleep(700 * time.Millisecond)
	}
	// What the agent reads again and again of procfs and sysfs it keeps open: more
	// after its second pass than after its first, and other files of a node that has
	// been through something. So the rest is counted, and at one moment.
	others, err := strconv.Atoi(w.Guest(t, rigtest.AgentPID+"find /proc/$pid/fd -type l ! -lname '/proc/*' ! -lname '/sys/*' | wc -l"))
	if err != nil {
		t.Fatal(err)
	}
	least.others = float64(others)
	return least
}

// patienceOfProbes is how much longer than its interval a probe that does not
// wait for what hangs may stay away: the node is emulated.
const patienceOfProbes = 3 * upsetEvery

// wellAgain is healthy, but for the forks that were refused, of which is told for
// ten minutes.
func (w *world) wellAgain() error {
	all := w.all()
	if c := all["PIDProblem"]; c.Reason == "ForkFailures" {
		delete(all, "PIDProblem")
		return all.Healthy(slices.DeleteFunc(kinds(), func(kind string) bool { return kind == "PIDProblem" })...)
	}
	return all.Healthy(kinds()...)
}

func (w *world) starve(t *testing.T, s starving) []string {
	rigtest.OnFailure(t, w.dump)
	ses := w.session(t)
	w.Await(t, "every condition to be healthy", w.wellAgain)
	pod, err := w.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before := w.rest(t)
	if s.prepare != "" {
		w.Guest(t, s.prepare)
		w.Await(t, "every condition to be healthy", w.wellAgain)
	}
	var p pace
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { defer close(stopped); w.paceUntil(stop, &p) }()
	restored := false
	restore := func() {
		if !restored && s.restore != "" {
			restored = true
			if out, err := ses.raw(s.restore); err != nil {
				t.Logf("restore: %v: %s", err, out)
			}
		}
	}
	t.Cleanup(restore)

	m := w.mark()
	began := time.Now()
	// In the shell itself, whose children are to be waited for.
	if out, err := ses.raw(s.fault); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var told time.Duration
	w.AwaitFor(t, patience, "it to be told", func() error {
		for _, want := range s.told {
			c, _ := w.condition(want.condition)
			if c.Status != want.status || len(want.reasons) > 0 && !slices.Contains(want.reasons, c.Reason) || !strings.Contains(c.Message, want.names) {
				return fmt.Errorf("%s is %s/%s: %s", want.condition, c.Status, c.Reason, c.Message)
			}
		}
		return nil
	})
	if len(s.told) > 0 {
		told = time.Since(began)
	}
	time.Sleep(s.lasts)
	close(stop)
	<-stopped
	restore()

	as := "nothing, as it should"
	if len(s.told) > 0 {
		var all []string
		for _, want := range s.told {
			all = append(all, want.String())
			c, _ := w.condition(want.condition)
			t.Logf("%s: %s/%s: %s", want.condition, c.Status, c.Reason, c.Message)
		}
		as = strings.Join(all, "; ")
	} else {
		for _, c := range w.changesSince(m) {
			if c.from != nil && c.from.Reason == "ForkFailures" && c.to != nil && c.to.Status == corev1.ConditionFalse {
				continue // ten minutes after the PIDs of an earlier one
			}
			t.Errorf("a change while nothing is to be told: %s: %s", c, c.to.Message)
		}
	}
	longest := time.Duration(0)
	for _, probe := range slices.Sorted(maps.Keys(p.longest)) {
		if slices.Contains(s.hung, probe) {
			continue
		}
		longest = max(longest, p.longest[probe])
		if p.longest[probe] > upsetEvery+patienceOfProbes {
			t.Errorf("%s did not run for %s", probe, p.longest[probe].Round(time.Second))
		}
	}
	if len(p.longest) < len(kinds()) {
		t.Errorf("only %d probes were seen to run; metrics were not to be had %d times", len(p.longest), p.lost)
	}
	w.AwaitFor(t, s.clears+patience, "every condition to be healthy", w.wellAgain)
	w.sameContainer(t, pod)
	var after vitals
	w.Await(t, "what it used to be given back", func() error {
		after = w.rest(t)
		if after.goroutines > before.goroutines+3 || after.threads > before.threads+3 || after.others > before.others+3 {
			return fmt.Errorf("before %+v, after %+v", before, after)
		}
		return nil
	})
	w.invariants(t)
	three := func(of func(vitals) float64) string {
		return fmt.Sprintf("%.0f, %.0f, %.0f", of(before), of(p.most), of(after))
	}
	toldAfter := "–"
	if told > 0 {
		toldAfter = figures.Seconds(told)
	}
	return []string{s.name, as, toldAfter, fmt.Sprintf("%.1f s, of %s", longest.Seconds(), upsetEvery),
		three(func(v vitals) float64 { return v.goroutines }), three(func(v vitals) float64 { return v.threads }), three(func(v vitals) float64 { return v.files })}
}
