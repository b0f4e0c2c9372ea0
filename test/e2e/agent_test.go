//go:build cluster

package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

// The limits of the container's memory. The figures are about the agent and not
// about the machine: an emulated processor makes it slow, not big.
const (
	maxPeak     = 48e6
	maxResident = 36e6
	maxAnon     = 14e6
)

func TestAgent(t *testing.T) {
	w := deploy(t)
	t.Run("defaults", w.defaults)
	w.configure(t, runConfig, w.runConfigInForce)
	w.Spent("config in force")
	t.Run("idle", func(t *testing.T) { w.idle(t, time.Minute) })
	// Before the scenarios: the kubelet's own watches take a while to come
	// back, and the last steps need them.
	t.Run("outage", func(t *testing.T) { w.outage(t, 2*time.Minute, 30) })
	t.Run("scenarios", func(t *testing.T) {
		for _, l := range lanes() {
			t.Run(l.name, func(t *testing.T) {
				t.Parallel()
				for _, s := range l.scenarios {
					t.Run(s.name, func(t *testing.T) { w.play(t, l, s) })
				}
			})
		}
	})
	w.Spent("scenarios")
	t.Run("figures", w.shortFigures)
	w.Spent("figures")
	w.configure(t, runConfig, w.runConfigInForce)
	t.Run("prometheus", w.prometheus)
	w.Spent("prometheus")
	t.Run("soak", w.shortSoak)
	t.Run("killed", w.killed)
	t.Run("config refused", w.configRefused)
	t.Run("chaos", w.shortChaos)
	t.Run("footprint", w.footprint)
	t.Run("kubectl hygiene", w.plugin)
	t.Run("access", w.access)
	t.Run("uninstall", w.uninstall)
	t.Run("observe", w.onlyObserves)
}

// deploy brings up a cluster with the agent on it, as the manifests install it,
// and watches it until the test ends.
func deploy(t *testing.T) *world {
	t.Helper()
	agent := make(chan built, 1)
	tree := "../.."
	if *broken != "" {
		tree = brokenTree(t, *broken)
	}
	go func() { defer close(agent); build(t, tree, agent) }()
	w := start(t)
	w.observe(t)
	t.Cleanup(func() { w.publish(t) })

	w.agent = <-agent
	w.load(t)
	t.Cleanup(func() { w.Guest(t, outfitOff) })
	w.Guest(t, outfit)
	t.Cleanup(func() { w.remove(t) })
	w.remove(t) // what an earlier run left on an attached cluster
	w.Await(t, "the cluster to be seen", w.listed)
	w.Await(t, "a Node without conditions", w.bare)
	w.fresh = w.mark()
	w.install(t)
	return w
}

// runConfigInForce says whether the agent has read the config of the run.
func (w *world) runConfigInForce() error {
	samples, err := w.metrics()
	if err != nil {
		return err
	}
	if samples["hosthygiene_config_last_reload_successful"] != 1 {
		return errors.New("the last config was refused")
	}
	if _, known := samples[`hosthygiene_package_installed{package="`+testPackage+`"}`]; !known {
		return errors.New("its required package has no metric yet")
	}
	return nil
}

// install applies the manifests as they are, twice: the second time must change
// nothing.
func (w *world) install(t *testing.T) {
	t.Helper()
	w.Kubectl(t, "apply", "-f", manifests)
	for line := range strings.Lines(w.Kubectl(t, "apply", "-f", manifests)) {
		if !strings.HasSuffix(strings.TrimSpace(line), " unchanged") {
			t.Errorf("applying the manifests a second time: %s", line)
		}
	}
	w.PodReady(t, 0)
	w.Spent("agent ready")
}

// remove takes everything away without asking the agent.
func (w *world) remove(t *testing.T) {
	t.Helper()
	w.Kubectl(t, "delete", "--ignore-not-found", "-f", manifests)
	if out, err := w.cleanup(t, "--all"); err != nil {
		t.Errorf("agent cleanup --all: %v: %s", err, out)
	}
}

func (w *world) cleanup(t *testing.T, flags ...string) (string, error) {
	args := append([]string{"cleanup", "--kubeconfig", w.ControlPlane.Kubeconfig()}, flags...)
	out, err := exec.CommandContext(w.CleanupContext(t), w.agent.binary, args...).CombinedOutput()
	return string(out), err
}

// defaults: with no config at all a healthy node is said to be healthy, and
// nothing else happens.
func (w *world) defaults(t *testing.T) {
	rigtest.OnFailure(t, w.dump)
	w.Await(t, "every condition to be healthy", w.healthy)
	for kind, c := range w.all() {
		if c.Message == "" {
			t.Errorf("%s says nothing of what was verified", kind)
		}
	}
	for _, c := range w.changesSince(w.fresh) {
		if c.to != nil && c.to.Status == corev1.ConditionTrue && c.kind != "Ready" {
			t.Errorf("a problem on a healthy node: %s: %s", c, c.to.Message)
		}
	}
	for _, e := range w.eventsSince(w.fresh) {
		t.Errorf("an Event on a healthy node: %s %s: %s", e.Type, e.Reason, e.Message)
	}
	w.invariants(t)
}

// idle: a healthy node that stays so costs no write and no Event.
func (w *world) idle(t *testing.T, length time.Duration) {
	w.Await(t, "every condition to be healthy", w.healthy)
	before := w.mark()
	_, offset := w.auditSince(t, w.auditStart)
	began := time.Now()
	// How much it costs is another matter: here the agent looks every 3 s.
	w.idleCosts(t, short(), &measured{})
	time.Sleep(length - time.Since(began))
	requests, _ := w.auditSince(t, offset)
	for _, r := range requests {
		if r.write() {
			t.Errorf("a write while nothing changed: %s", r)
		}
	}
	for _, c := range w.changesSince(before) {
		t.Errorf("a change while nothing changed: %s", c)
	}
	for _, e := range w.eventsSince(before) {
		t.Errorf("an Event while nothing changed: %s %s", e.Reason, e.Message)
	}
	if p, err := w.Pod(t.Context()); err != nil || p.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("the agent was restarted: %v", err)
	}
	w.invariants(t)
	w.Spent("idle for " + length.String())
}

// kill ends the agent without warning and waits until it is ready again.
func (w *world) kill(t *testing.T) {
	t.Helper()
	w.memory(t) // the container and its figures end with it
	p, err := w.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.Guest(t, rigtest.AgentPID+"kill -9 $pid")
	w.PodReady(t, p.Status.ContainerStatuses[0].RestartCount+1)
}

// killed: an agent that dies and comes back changes nothing that was true, with
// a problem told and without one, and sees what was repaired while it was dead.
func (w *world) killed(t *testing.T) {
	t.Cleanup(func() {
		if _, err := w.TryGuest(w.CleanupContext(t), "systemctl start chrony"); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			w.dump(t)
		}
	})
	w.Await(t, "every condition to be healthy", w.healthy)
	before := w.mark()
	w.Guest(t, "systemctl stop chrony")
	w.Await(t, "NoTimeDaemon", w.is("TimeProblem", corev1.ConditionTrue, "NoTimeDaemon"))
	w.Await(t, "the Event", func() error { return w.event(before, corev1.EventTypeWarning, "NoTimeDaemon") })
	before = w.mark()
	w.kill(t)
	w.Note("killed", "ready again after "+time.Since(before.at).Round(time.Second).String())
	w.passes(t, 2)
	for _, c := range w.changesSince(before) {
		t.Errorf("the restart changed a condition: %s", c)
	}
	for _, e := range w.eventsSince(before) {
		t.Errorf("the restart posted an Event: %s %s: %s", e.Type, e.Reason, e.Message)
	}

	fixed := time.Now()
	w.Guest(t, rigtest.AgentPID+"systemctl start chrony; kill -9 $pid")
	w.Await(t, "TimeProblem to clear", w.is("TimeProblem", corev1.ConditionFalse, "NoProblem"))
	w.Spent(fmt.Sprintf("repaired while the agent was dead: cleared after %s", time.Since(fixed).Round(100*time.Millisecond)))
	w.Await(t, "every condition to be healthy", w.healthy)
	w.invariants(t)
	w.Spent("killed twice")
}

// passes waits until every probe has run so often again.
func (w *world) passes(t *testing.T, n float64) {
	t.Helper()
	want := map[string]float64{}
	w.Await(t, "more passes", func() error {
		samples, err := w.metrics()
		if err != nil {
			return err
		}
		runs := probeRuns(samples)
		for probe, v := range runs {
			if want[probe] == 0 {
				want[probe] = v + n
			}
		}
		for probe, v := range want {
			if runs[probe] < v {
				return fmt.Errorf("%s has run %v times, want %v", probe, runs[probe], v)
			}
		}
		if len(want) < len(kinds()) {
			return fmt.Errorf("only %d probes run", len(want))
		}
		return nil
	})
}

// probeRuns are how often each probe has run.
func probeRuns(samples map[string]float64) map[string]float64 {
	runs := map[string]float64{}
	for sample, v := range samples {
		if _, labels, ok := strings.Cut(sample, `hosthygiene_probe_runs_total{probe="`); ok {
			probe, _, _ := strings.Cut(labels, `"`)
			runs[probe] += v
		}
	}
	return runs
}

// outage: the API server is away. A fault that happens meanwhile is told when it
// is back, nothing else changes, and the agent does not hammer.
func (w *world) outage(t *testing.T, length time.Duration, maxAttempts int) {
	if w.Attached {
		t.Skip("the API server is another process's, and can not be stopped from here")
	}
	t.Cleanup(func() {
		if _, err := w.TryGuest(w.CleanupContext(t), "systemctl start chrony"+uncountAttempts); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			w.dump(t)
		}
	})
	w.Await(t, "every condition to be healthy", w.healthy)
	before := w.mark()
	w.Guest(t, rigtest.AgentPID+countAttempts)
	if err := w.ControlPlane.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	gone := time.Now()
	w.Guest(t, "systemctl stop chrony")
	time.Sleep(length - time.Since(gone))
	attempts, err := strconv.Atoi(w.Guest(t, attemptsSoFar))
	if err != nil {
		t.Fatal(err)
	}
	if attempts < 2 || attempts > maxAttempts {
		t.Errorf("the agent tried to connect %d times in %s, want 2 to %d", attempts, length, maxAttempts)
	}
	if err := w.ControlPlane.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	w.Await(t, "the fault to be told", w.is("TimeProblem", corev1.ConditionTrue, "NoTimeDaemon"))
	told := time.Since(back)
	w.Await(t, "the Event", func() error { return w.event(before, corev1.EventTypeWarning, "NoTimeDaemon") })
	w.Note("outage of "+length.String(), fmt.Sprintf("%d attempts to connect; told %.1f s after the API server was back", attempts, told.Seconds()))
	w.Guest(t, "systemctl start chrony")
	w.Await(t, "TimeProblem to clear", w.is("TimeProblem", corev1.ConditionFalse))
	for _, c := range w.changesSince(before) {
		if c.statusChange() && c.kind != "TimeProblem" {
			t.Errorf("the outage changed another condition: %s", c)
		}
	}
	if p, err := w.Pod(t.Context()); err != nil {
		t.Error(err)
	} else if s := p.Status.ContainerStatuses[0]; s.LastTerminationState.Terminated != nil && s.LastTerminationState.Terminated.FinishedAt.After(gone) {
		t.Errorf("the agent ended during the outage: %+v", s.LastTerminationState.Terminated)
	}
	w.invariants(t)
	w.Spent("outage")
}

// Connections that the agent's container tries to open are counted where they
// leave the node, by its control group: what it says of itself in metrics would
// have to be believed.
const (
	countAttempts   = `iptables -I OUTPUT -p tcp --syn ! -o lo -m cgroup --path "$(cut -d: -f3 /proc/$pid/cgroup)" -m comment --comment e2e-attempts` + "\n"
	attemptsSoFar   = `iptables -nvxL OUTPUT | awk '/e2e-attempts/ {print $1}'`
	uncountAttempts = "\n" + `iptables -S OUTPUT | sed -n '/e2e-attempts/ s/^-A/-D/p' | xargs -r iptables`
)

// configRefused: a config with a mistake changes nothing but is told, and the
// next good one is taken.
func (w *world) configRefused(t *testing.T) {
	rigtest.OnFailure(t, w.dump)
	w.Await(t, "every condition to be healthy", w.healthy)
	before := w.mark()
	w.configure(t, runConfig+"maxOffset: 50\n", w.is("Ready", corev1.ConditionUnknown, "ConfigInvalid"))
	if c, _ := w.condition("Ready"); !strings.Contains(c.Message, "maxOffset") {
		t.Errorf("the message does not name the mistake: %s", c.Message)
	}
	w.Await(t, "the Event", func() error { return w.event(before, corev1.EventTypeWarning, "ConfigInvalid") })
	samples, err := w.metrics()
	if err != nil {
		t.Fatal(err)
	}
	if v := samples["hosthygiene_config_last_reload_successful"]; v != 0 {
		t.Errorf("hosthygiene_config_last_reload_successful is %v", v)
	}
	w.configure(t, runConfig, w.healthy)
	for _, c := range w.changesSince(before) {
		if c.statusChange() && c.kind != "Ready" {
			t.Errorf("a refused config changed a condition: %s", c)
		}
	}
	w.invariants(t)
	w.Spent("config refused")
}

// usage is the memory of the agent's container.
type usage struct {
	peak, current, anon, resident, residentAnon, killed int64
}

// memory reads the figures of the container and holds them to its limit.
func (w *world) memory(t *testing.T) usage {
	t.Helper()
	out := w.Guest(t, rigtest.AgentPID+`c=/sys/fs/cgroup$(cut -d: -f3 /proc/$pid/cgroup)
cat $c/memory.peak $c/memory.current
awk '$1 == "anon" {print $2}' $c/memory.stat
awk '$1 == "VmRSS:" {print $2 * 1024}' /proc/$pid/status
awk '$1 == "RssAnon:" {print $2 * 1024}' /proc/$pid/status
awk '$1 == "oom_kill" || $1 == "max" {n += $2} END {print n}' $c/memory.events`)
	var u usage
	fields := strings.Fields(out)
	for i, into := range []*int64{&u.peak, &u.current, &u.anon, &u.resident, &u.residentAnon, &u.killed} {
		if i >= len(fields) {
			t.Fatalf("reading the agent's memory: %q", out)
		}
		v, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		*into = v
	}
	w.mu.Lock()
	w.peak = max(w.peak, u.peak)
	w.mu.Unlock()
	if u.peak >= maxPeak {
		t.Errorf("the container's memory.peak is %d, want less than %d", u.peak, int64(maxPeak))
	}
	if u.killed > 0 {
		t.Errorf("the container met its memory limit %d times", u.killed)
	}
	return u
}

// footprint: after all of that the agent is as small as it is to be.
func (w *world) footprint(t *testing.T) {
	u := w.memory(t)
	if u.resident > maxResident || u.residentAnon > maxAnon {
		t.Errorf("resident memory is %d, of which anonymous %d; want at most %d and %d", u.resident, u.residentAnon, int64(maxResident), int64(maxAnon))
	}
	w.Note("memory", fmt.Sprintf("resident %.1f MB, anonymous %.1f MB; container now %.1f MB, peak of all %.1f MB",
		float64(u.resident)/1e6, float64(u.residentAnon)/1e6, float64(u.current)/1e6, float64(w.peak)/1e6))
	// What it was refused outside the API server it would say.
	logs := w.Kubectl(t, "logs", "-n", rigtest.Namespace, "ds/"+daemonSet)
	for line := range strings.Lines(logs) {
		lower := strings.ToLower(line)
		if strings.Contains(lower, "forbidden") || strings.Contains(lower, "panic") {
			t.Errorf("the agent's log: %s", line)
		}
	}
}

// uninstall: as documented, and then the hasty way.
func (w *world) uninstall(t *testing.T) {
	rigtest.OnFailure(t, w.dump)
	w.configure(t, strings.Replace(runConfig, "interval: 3s\n", "interval: 3s\nreport: {conditions: \"off\"}\n", 1), w.bare)
	if out, err := w.cleanup(t, "--wait"); err != nil {
		t.Errorf("agent cleanup --wait: %v: %s", err, out)
	}
	w.Kubectl(t, "delete", "-f", manifests)
	w.nothingLeft(t)
	w.Spent("uninstalled")

	w.install(t)
	w.Await(t, "every condition to be healthy", w.healthy)
	w.Kubectl(t, "delete", "-f", manifests)
	if len(w.all()) == 0 {
		t.Error("the conditions went with the manifests, so that nothing is left for cleanup --all to prove")
	}
	out, err := w.cleanup(t, "--all")
	if err != nil {
		t.Errorf("agent cleanup --all: %v: %s", err, out)
	}
	w.Await(t, "the conditions to go", w.bare)
	w.nothingLeft(t)
	w.Spent("uninstalled hastily")
}

// nothingLeft holds the cluster and the node to what an uninstall promises.
func (w *world) nothingLeft(t *testing.T) {
	t.Helper()
	left := w.Kubectl(t, "get", "-A", "-o", "name", "-l", "app.kubernetes.io/part-of=host-hygiene",
		"namespaces,serviceaccounts,resourcequotas,services,daemonsets,pods,clusterroles,clusterrolebindings,roles,rolebindings")
	if left != "" {
		t.Errorf("left in the cluster: %s", left)
	}
	if left := w.Guest(t, "for p in $(pgrep -x agent); do grep kubepods /proc/$p/cgroup; done; true"); left != "" {
		t.Errorf("still running on the node: %s", left)
	}
	// The folder is the kubelet's doing (DirectoryOrCreate) and stays, empty.
	files := strings.Fields(w.Guest(t, "find /var/lib/host-hygiene -mindepth 1"))
	if len(files) > 0 {
		t.Errorf("left on the node: %v", files)
	}
}

// publish shows the table at the end, also of a run that failed.
func (w *world) publish(t *testing.T) {
	table := w.table()
	t.Logf("\n%s", table)
	if file := os.Getenv("HYGIENE_E2E_TABLE"); file != "" {
		if err := os.WriteFile(file, []byte(table), 0o644); err != nil {
			t.Error(err)
		}
	}
}
