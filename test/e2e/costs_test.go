//go:build cluster

package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"regexp"
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

// usedUp is what the agent's process has used since it began.
type usedUp struct {
	up       float64 // when, in seconds since boot
	pid      int
	cgroup   float64 // seconds of processor time of the container
	process  float64 // of the process and the children it waited for
	children float64 // of those alone
	// switches are how often its threads went to sleep, and so were woken;
	// those of threads that ended are lost.
	switches float64
}

func (w *world) used(t *testing.T) usedUp {
	t.Helper()
	out := w.Guest(t, rigtest.AgentPID+`read up _ </proc/uptime
echo $up $pid $(awk '$1 == "usage_usec" {print $2}' /sys/fs/cgroup$(cut -d: -f3 /proc/$pid/cgroup)/cpu.stat) \
  $(awk '{print $14 + $15, $16 + $17}' /proc/$pid/stat) \
  $(cat /proc/$pid/task/*/status | awk '$1 == "voluntary_ctxt_switches:" {n += $2} END {print n}')`)
	var u usedUp
	var usec, ticks, childTicks float64
	if _, err := fmt.Sscan(out, &u.up, &u.pid, &usec, &ticks, &childTicks, &u.switches); err != nil {
		t.Fatalf("reading what the agent used: %v: %q", err, out)
	}
	u.cgroup, u.process, u.children = usec/1e6, (ticks+childTicks)/100, childTicks/100
	return u
}

// The kernel's own tracing counts what the agent does without its help: the
// programs it and its descendants execute, and by what its threads are woken.
const (
	traceStart = rigtest.AgentPID + `t=/sys/kernel/tracing/instances/e2e
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
if test -e $t; then rmdir $t; fi
mkdir $t; cd $t
echo 0 >tracing_on; echo 8192 >buffer_size_kb
echo $(ls /proc/$pid/task) >set_event_pid; echo 1 >options/event-fork
echo sched:sched_waking sched:sched_process_exec sched:sched_process_fork | tr ' ' '\n' >set_event
echo 1 >tracing_on`
	traceStop = `cd /sys/kernel/tracing/instances/e2e; echo 0 >tracing_on
cat per_cpu/*/stats | awk '$1 == "overrun:" {n += $2} END {print "OVERRUN", n}'
grep -v '^#' trace; echo >set_event; cd /; rmdir /sys/kernel/tracing/instances/e2e`
)

// traced is what the kernel saw of the agent.
type traced struct {
	lost int
	// commands are the programs executed by it and its descendants.
	commands []string
	// timers, network and own are wakings of its threads: from an interrupt
	// handler, which is the clock's, from a soft interrupt, which is a
	// packet's, and from another thread.
	timers, network, own int
}

// A line of the trace: the thread, the processor, the flags, of which the third
// is h or H in an interrupt handler and s in a soft interrupt, the time, the
// event. See Documentation/trace/ftrace.rst.
var traceLine = regexp.MustCompile(`^\s*\S.*-\d+\s+\[\d+\]\s+(\S+)\s+[\d.]+: (\w+): (.*)$`)

func parseTrace(out string) (traced, error) {
	var tr traced
	lines := 0
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		if n, ok := strings.CutPrefix(line, "OVERRUN "); ok {
			tr.lost, _ = strconv.Atoi(n)
			continue
		}
		m := traceLine.FindStringSubmatch(line)
		if m == nil || len(m[1]) < 3 {
			return tr, fmt.Errorf("a line of the trace that is not understood: %q", line)
		}
		lines++
		switch flags, event, fields := m[1], m[2], m[3]; event {
		case "sched_process_exec":
			tr.commands = append(tr.commands, fields)
		case "sched_waking":
			if !strings.HasPrefix(fields, "comm=agent ") {
				continue // whom it woke
			}
			switch flags[2] {
			case 'h', 'H':
				tr.timers++
			case 's':
				tr.network++
			default:
				tr.own++
			}
		}
	}
	if lines == 0 {
		return tr, errors.New("the kernel saw nothing of the agent at all")
	}
	return tr, nil
}

func (w *world) traceWhile(t *testing.T, wait func()) traced {
	t.Helper()
	w.Guest(t, traceStart)
	wait()
	tr, err := parseTrace(w.Guest(t, traceStop))
	if err != nil {
		t.Fatal(err)
	}
	if tr.lost > 0 {
		t.Errorf("the kernel's trace lost %d events", tr.lost)
	}
	return tr
}

// idleFigures: what an agent costs on a node that is well. Processor time is
// taken without the trace, which costs some itself.
func (w *world) idleFigures(t *testing.T, f form, m *measured) {
	rigtest.OnFailure(t, w.dump)
	w.Await(t, "every condition to be healthy", w.healthy)
	if f.idle >= 10*time.Minute {
		w.heartbeatAsDefault(t)
	}
	time.Sleep(f.settle)
	before := w.mark()
	_, offset := w.auditSince(t, w.auditStart)
	began := time.Now()
	w.idleCosts(t, f, m)
	time.Sleep(f.idle - time.Since(began))
	w.idleRequests(t, f, m, offset, time.Since(began))
	changes, events := w.news(before)
	for _, n := range append(changes, events...) {
		t.Errorf("while nothing happened: %s", n)
	}
	w.invariants(t)
}

// heartbeatAsDefault has the kubelet write the Node as often as it does by default,
// every five minutes when nothing of it has changed: where
// nodeStatusUpdateFrequency is set, as in the rig, nodeStatusReportFrequency is the
// same if it is not (SetDefaults_KubeletConfiguration), and each write is sent to
// the agent, which watches the Node.
func (w *world) heartbeatAsDefault(t *testing.T) {
	t.Helper()
	w.Guest(t, "f=/var/lib/kubelet/config.yaml; cp -p $f $f.idle; cp -p $f $f.new; echo 'nodeStatusReportFrequency: 5m' >>$f.new; mv $f.new $f; systemctl restart kubelet")
	t.Cleanup(func() {
		if _, err := w.TryGuest(w.CleanupContext(t), "f=/var/lib/kubelet/config.yaml; mv $f.idle $f; systemctl restart kubelet"); err != nil {
			t.Error(err)
		}
	})
	time.Sleep(time.Minute) // the kubelet of an emulated machine starts in 10 to 20 s
	w.Await(t, "every condition to be healthy", w.healthy)
}

// idleCosts: an agent that has nothing to tell executes no command.
func (w *world) idleCosts(t *testing.T, f form, m *measured) {
	t.Helper()
	first := w.used(t)
	time.Sleep(f.cpu)
	last := w.used(t)
	if first.pid != last.pid {
		t.Fatal("the agent was restarted while it was measured")
	}
	took := last.up - first.up
	perSecond := (last.cgroup - first.cgroup) / took * 1000
	m.figure("processor time while idle and healthy, of the container (cpu.stat)", fmt.Sprintf("%.2f ms per second over %s", perSecond, f.cpu),
		"at most 1.5 ms per second", perSecond <= 1.5)
	own := (last.process - first.process) / took * 1000
	m.figure("the same, of the process and its children (/proc/PID/stat)", fmt.Sprintf("%.2f ms per second, children %.2f", own, (last.children-first.children)/took*1000),
		"at most 1.5 ms per second", own <= 1.5)

	var sleeps [2]usedUp
	tr := w.traceWhile(t, func() {
		sleeps[0] = w.used(t)
		time.Sleep(f.trace)
		sleeps[1] = w.used(t)
	})
	if len(tr.commands) > 0 {
		t.Errorf("the idle agent executed %d commands: %s", len(tr.commands), strings.Join(tr.commands, "; "))
	}
	m.figure("commands executed while idle (sched_process_exec)", fmt.Sprintf("%d in %s", len(tr.commands), f.trace), "0", len(tr.commands) == 0)
	lasted := sleeps[1].up - sleeps[0].up
	timers := float64(tr.timers) / lasted
	m.figure("timer wake-ups while idle, all threads (sched_waking from the clock's interrupt)",
		fmt.Sprintf("%.2f per second; by packets %.2f, by each other %.2f; voluntary switches %.2f", timers, float64(tr.network)/lasted, float64(tr.own)/lasted, (sleeps[1].switches-sleeps[0].switches)/lasted),
		"at most 1 per second", timers <= 1)
}

// idleRequests counts what the agent asked of the API server.
func (w *world) idleRequests(t *testing.T, f form, m *measured, offset int64, length time.Duration) {
	t.Helper()
	requests, _ := w.auditSince(t, offset)
	var writes, reads, watches int
	for _, r := range requests {
		switch {
		case r.write():
			writes++
		case r.Verb == "watch":
			if r.Stage == "ResponseStarted" {
				watches++
			}
		default:
			reads++
			t.Errorf("a read that is no watch, while nothing happened: %s", r)
		}
	}
	// One refresh of the conditions every 60 to 75 minutes.
	if allowed := 1; writes > allowed {
		t.Errorf("%d writes while nothing happened, want at most %d", writes, allowed)
	}
	m.figure("API requests of an idle "+strings.TrimSuffix(f.idle.String(), "0m0s")+" (audit log)", fmt.Sprintf("%d writes, %d reads, %d watches begun", writes, reads, watches),
		"at most 1 write, 0 reads", writes <= 1 && reads == 0)
	m.figure("reviews of the agent's token and rights that the kubelet asked for meanwhile", fmt.Sprintf("%d in %s", w.reviews(t, offset), length.Round(time.Second)),
		"none set; the kubelet remembers them for 5 s here, for minutes by default", true)
}

// reviews counts what the kubelet asked the API server in order to answer those
// who ask it: the agent, on an idle node.
func (w *world) reviews(t *testing.T, offset int64) int {
	t.Helper()
	f, err := os.Open(w.ControlPlane.AuditLog())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	n := 0
	for lines := bufio.NewReader(f); ; {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return n
		}
		var r request
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("audit log: %v: %.200s", err, line)
		}
		if r.User.Username == "system:node:"+w.Node.Name() && slices.Contains([]string{"tokenreviews", "subjectaccessreviews"}, r.ObjectRef.Resource) {
			n++
		}
	}
}

// soakConfig is what the faults of the soak need.
const soakConfig = `apiVersion: hosthygiene.io/v1alpha1
kind: AgentConfig
probes:
  oom: {window: 1m}
require:
  devices: [{id: /dev/disk/by-id/virtio-SPARE}]
  packages: [` + testPackage + `, {name: ` + marker + `, names: {debian: bash}}]
`

// soakFaults are made and undone in turn.
func soakFaults() [][2]string {
	return [][2]string{
		{"systemctl stop chrony", "systemctl start chrony"},
		{setPaths("offline", "1"), setPaths("running", "9")},
		{"dpkg --remove " + testPackage, "dpkg -i /tmp/e2e/" + testPackage + ".deb"},
		{"cp -p /etc/fstab /tmp/e2e/fstab; echo '/dev/vdz9 /mnt ext4 nofail 0 0' >>/etc/fstab", "cat /tmp/e2e/fstab >/etc/fstab"},
		{"mountpoint -q /spare || mount /spare\n" + spareDisk + "echo 1 >/sys/fs/ext4/$d/trigger_fs_error", "umount /spare; e2fsck -fy /dev/disk/by-id/virtio-SPARE || test $? -eq 1"},
		{"systemd-run --quiet --wait --collect -p MemoryMax=20M -p MemorySwapMax=0 -p OOMPolicy=continue tail /dev/zero || true", "true"},
		{"systemctl stop multipathd.socket multipathd.service", "systemctl start multipathd.service"},
		{"systemctl kill -s KILL tgt; systemctl stop tgt", "systemctl start tgt rig-iscsi"},
	}
}

// soak: the agent stays as small as it is, whatever happens.
func (w *world) soak(t *testing.T, f form, m *measured) {
	rigtest.OnFailure(t, w.dump)
	b := &bench{w: w}
	b.configure(t, soakConfig)
	w.Await(t, "every condition to be healthy", w.healthy)
	t.Cleanup(func() {
		for _, fault := range soakFaults() {
			if _, err := w.TryGuest(w.CleanupContext(t), "{ "+fault[1]+"; } || true"); err != nil {
				t.Error(err)
			}
		}
	})
	pod, err := w.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// Resident and anonymous memory, in MB, at the end of each quarter.
	var resident, anonymous [5]float64
	var top [2]float64
	sample := func(quarter int) {
		out := w.Guest(t, rigtest.AgentPID+`awk '$1 == "Rss:" {r = $2} $1 == "Anonymous:" {a = $2} END {print r * 1.024e-3, a * 1.024e-3}' /proc/$pid/smaps_rollup`)
		var r, a float64
		if _, err := fmt.Sscan(out, &r, &a); err != nil {
			t.Fatalf("reading the agent's memory: %v: %q", err, out)
		}
		resident[quarter], anonymous[quarter] = r, a
		top[0], top[1] = max(top[0], r), max(top[1], a)
	}
	sample(0)
	faults := soakFaults()
	began, made := time.Now(), 0
	for quarter := 1; quarter <= 4; quarter++ {
		for time.Since(began) < f.soak*time.Duration(quarter)/4 {
			fault := faults[made%len(faults)]
			next := began.Add(time.Duration(made) * f.every)
			time.Sleep(time.Until(next))
			w.Guest(t, fault[0])
			time.Sleep(time.Until(next.Add(f.every / 2)))
			w.Guest(t, fault[1])
			made++
			if made%6 == 0 {
				sample(quarter)
			}
		}
		sample(quarter)
	}
	w.memory(t)
	if now, err := w.Pod(t.Context()); err != nil || now.Status.ContainerStatuses[0].RestartCount != pod.Status.ContainerStatuses[0].RestartCount {
		t.Errorf("the agent was restarted: %v", err)
	}
	b.forget(t)
	quarters := func(v [5]float64) string {
		return fmt.Sprintf("%.1f, %.1f, %.1f, %.1f", v[1], v[2], v[3], v[4])
	}
	length := strings.TrimSuffix(f.soak.String(), "0m0s") + fmt.Sprintf(" with %d faults", made)
	m.figure("resident memory after each quarter of "+length+" (smaps_rollup)", quarters(resident)+fmt.Sprintf(" MB; before %.1f, most %.1f", resident[0], top[0]),
		"at most 32 MB, flat", top[0] <= 32 && resident[4] <= resident[2]*1.05)
	m.figure("anonymous memory after each quarter of "+length, quarters(anonymous)+fmt.Sprintf(" MB; before %.1f, most %.1f", anonymous[0], top[1]),
		"at most 12 MB, flat", top[1] <= 12 && anonymous[4] <= anonymous[2]*1.05)
	w.invariants(t)
}

// front stands in front of the API server and counts who connects. While the
// API server is away to it, it closes what is open, and takes and closes what
// comes, as a load balancer without a server behind it does.
type front struct {
	listener net.Listener
	to       string

	mu    sync.Mutex
	away  bool
	tried []time.Time // of connections, while it is away
	all   int
	open  map[net.Conn]bool
}

func startFront(t *testing.T, to string) *front {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &front{listener: l, to: to, open: map[net.Conn]bool{}}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { f.serve(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		f.setAway(true)
		serving.Wait()
	})
	return f
}

func (f *front) port() int { return f.listener.Addr().(*net.TCPAddr).Port }

// track keeps a connection to be closed with the others; false when the API
// server is away.
func (f *front) track(conn net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.away {
		return false
	}
	f.open[conn] = true
	return true
}

func (f *front) serve(client net.Conn) {
	defer client.Close()
	f.mu.Lock()
	f.all++
	if f.away {
		f.tried = append(f.tried, time.Now())
	}
	f.mu.Unlock()
	if !f.track(client) {
		return
	}
	server, err := net.Dial("tcp", f.to)
	if err != nil {
		return
	}
	defer server.Close()
	if !f.track(server) {
		return
	}
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.open, client)
		delete(f.open, server)
	}()
	// Either end's close ends both.
	done := make(chan struct{}, 2)
	go func() { io.Copy(server, client); done <- struct{}{} }()
	go func() { io.Copy(client, server); done <- struct{}{} }()
	<-done
}

func (f *front) setAway(away bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away = away
	if away {
		f.tried = nil
		f.cutLocked()
	}
}

// cut ends what is connected.
func (f *front) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cutLocked()
}

func (f *front) cutLocked() {
	for conn := range f.open {
		conn.Close()
	}
}

func (f *front) attempts() (tried []time.Time, all int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.tried), f.all
}

// The agent's pod, and only it, is led to the front instead of to the API
// server, whichever way it takes there.
const toFront = rigtest.AgentPID + `p=$(dirname "$(cut -d: -f3 /proc/$pid/cgroup)")
for d in "10.96.0.1 443" "10.0.2.2 %d"; do set -- $d
iptables -t nat -I OUTPUT -p tcp -d $1 --dport $2 -m cgroup --path "$p" -m comment --comment e2e-front -j DNAT --to-destination 10.0.2.2:%d
done`

const noFront = `iptables -t nat -S OUTPUT | sed -n '/e2e-front/ s/^-A/-t nat -D/p' | while read -r rule; do eval "iptables $rule"; done`

// outageFigures: an agent that can not reach the API server tries seldom, and
// tells the truth soon after it can again.
func (w *world) outageFigures(t *testing.T, f form, m *measured) {
	t.Cleanup(func() {
		if _, err := w.TryGuest(w.CleanupContext(t), "systemctl start chrony\n"+noFront); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			w.dump(t)
		}
	})
	w.Await(t, "every condition to be healthy", w.healthy)
	api, err := strconv.Atoi(path.Base(strings.ReplaceAll(w.ControlPlane.Server(), ":", "/")))
	if err != nil {
		t.Fatal(err)
	}
	front := startFront(t, fmt.Sprintf("127.0.0.1:%d", api))
	w.Guest(t, fmt.Sprintf(toFront, api, front.port()))
	// What is connected stays connected, so the agent starts anew.
	w.kill(t)
	if _, all := front.attempts(); all == 0 {
		t.Fatal("the agent went past the proxy")
	}
	w.Await(t, "every condition to be healthy", w.healthy)
	before := w.mark()
	front.setAway(true)
	gone := time.Now()
	w.Guest(t, "systemctl stop chrony")
	time.Sleep(f.outage - time.Since(gone))
	tried, _ := front.attempts()
	front.setAway(false)
	back := time.Now()
	w.Await(t, "the fault to be told", w.is("TimeProblem", corev1.ConditionTrue, "NoTimeDaemon"))
	told := w.when(before, "TimeProblem", corev1.ConditionTrue).Sub(back)
	w.Await(t, "the Event", func() error { return w.event(before, corev1.EventTypeWarning, "NoTimeDaemon") })
	if len(tried) < 2 || len(tried) > f.attempts {
		t.Errorf("the agent tried to connect %d times in %s, want 2 to %d", len(tried), f.outage, f.attempts)
	}
	var gaps figures.Times
	for i, at := range tried[min(1, len(tried)):] {
		gaps = append(gaps, at.Sub(tried[i]))
	}
	m.figure(fmt.Sprintf("connections tried in an outage of %s (TCP proxy)", f.outage), fmt.Sprintf("%d; between two median %s, longest %s", len(tried), figures.Seconds(gaps.Median()), figures.Seconds(gaps.Max())),
		fmt.Sprintf("at most %d", f.attempts), len(tried) <= f.attempts)
	m.figure("end of the outage to the truth in the API", figures.Seconds(told), "within 60 s", told <= time.Minute)
	w.Guest(t, "systemctl start chrony")
	w.Await(t, "every condition to be healthy", w.healthy)
	for _, c := range w.changesSince(before) {
		if c.statusChange() && c.kind != "TimeProblem" {
			t.Errorf("the outage changed another condition: %s", c)
		}
	}
	w.Guest(t, noFront)
	w.kill(t) // and to the API server itself again
	w.invariants(t)
}
