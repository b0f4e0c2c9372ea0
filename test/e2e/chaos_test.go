//go:build cluster

package e2e

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/figures"
	"github.com/hosthygiene/agent/test/rig/rigtest"
)

var (
	chaosInto = flag.String("chaos", "", "do at length what may go wrong around the agent and write the figures into this `file`")
	kills     = flag.Int("kills", 100, "how often to kill the agent")
	seed      = flag.Uint64("seed", 0, "of what is random in it; 0 for another one each time")
)

// chaosForm is how much of it is done. The short one is part of every run.
type chaosForm struct {
	kills, killsInWrite, killsInReload int
	swaps, rollouts                    int
	away, mood                         time.Duration
}

func shortChaos() chaosForm { return chaosForm{killsInWrite: 2, killsInReload: 1, swaps: 8} }

func longChaos() chaosForm {
	sixth := *kills / 6
	f := chaosForm{kills: *kills - 2*sixth, killsInWrite: sixth, killsInReload: sixth, swaps: 100, rollouts: 3, away: 10 * time.Minute, mood: 45 * time.Second}
	if *hurry {
		f = chaosForm{kills: 6, killsInWrite: 4, killsInReload: 4, swaps: 15, rollouts: 2, away: time.Minute, mood: 20 * time.Second}
	}
	return f
}

// chaos is a run of it.
type chaos struct {
	*world
	chaosForm
	seed uint64
	rnd  *rand.Rand
	s    *session
	rows [][]string
	// spent are the sections and how long they took.
	spent [][]string
}

func newChaos(t *testing.T, w *world, f chaosForm) *chaos {
	c := &chaos{world: w, chaosForm: f, seed: *seed}
	if c.seed == 0 {
		c.seed = rand.Uint64()
	}
	t.Logf("what is random repeats with -seed=%d", c.seed)
	c.rnd = rand.New(rand.NewPCG(c.seed, 0))
	return c
}

// figure adds a row of the table.
func (c *chaos) figure(what, done, measured, promised string, met bool) {
	c.rows = append(c.rows, []string{what, done, measured, promised, verdict(met)})
}

// run runs a section with a shell of its own on the node.
func (c *chaos) run(t *testing.T, name string, section func(*testing.T)) {
	began := time.Now()
	asked := false // -run may leave it out
	t.Run(name, func(t *testing.T) {
		asked = true
		rigtest.OnFailure(t, c.dump)
		c.s = c.session(t)
		c.ready(t)
		c.passes(t, 1)
		c.Await(t, "every condition to be healthy", c.healthy)
		section(t)
	})
	if !asked {
		return
	}
	took := time.Since(began).Round(time.Second)
	c.Spent(fmt.Sprintf("chaos: %s, %s", name, took))
	c.spent = append(c.spent, []string{name, began.UTC().Format(time.DateOnly), version(), strconv.FormatUint(c.seed, 10), took.String()})
	if *chaosInto != "" { // at once: a run of an hour may be ended before its end
		c.write(t, *chaosInto)
	}
}

// TestChaos does at length what may go wrong around an agent, and writes what
// came of it into docs/reliability.md: "make chaos".
func TestChaos(t *testing.T) {
	if *chaosInto == "" {
		t.Skip("takes an hour; make chaos")
	}
	w := deploy(t)
	c := newChaos(t, w, longChaos())
	w.configure(t, runConfig, w.runConfigInForce)
	c.run(t, "API server away, slow, refusing, failing", c.badAPI)
	c.run(t, "somebody else", c.others)
	c.run(t, "two agents", c.twoAgents)
	c.run(t, "SIGKILL", c.sigkill)
	c.run(t, "config under fire", c.underFire)
	c.run(t, "rolling update", c.rollingUpdate)
	// Kills in it are told for 75 s, and with the config of the others for ten
	// minutes: what looks after it would find them anew.
	c.run(t, "clock", c.clockSteps)
	c.run(t, "reboot", c.rebooted)
	c.run(t, "uninstall", c.uninstalled)
}

// shortChaos is what TestAgent does of it.
func (w *world) shortChaos(t *testing.T) {
	c := newChaos(t, w, shortChaos())
	c.run(t, "somebody else", c.others)
	c.run(t, "SIGKILL", c.sigkill)
	c.run(t, "config under fire", c.underFire)
	for _, row := range c.rows {
		t.Log(strings.Join(row, " | "))
	}
}

func (c *chaos) write(t *testing.T, file string) {
	doc, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range []figures.Table{
		{Name: "chaos", Header: []string{"what happens", "how often, how long", "what came of it", "promised", "met"}, Rows: c.rows},
		{Name: "chaos runs", Header: []string{"part", "day", "agent", "seed", "took"}, Rows: c.spent},
	} {
		if doc, err = table.Merge(doc); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s\n%s", table.Name, plain(table))
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		t.Fatal(err)
	}
	machine := fmt.Sprintf("%s Its load at the end of the run, with all else that ran on it, was %s (averages of 1, 5 and 15 minutes).",
		c.machine(t), strings.Join(strings.Fields(string(load))[:3], ", "))
	if doc, err = figures.Replace(doc, "chaos machine", machine); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, doc, 0o644); err != nil {
		t.Fatal(err)
	}
}

// noNews fails for every change of a status or reason since a mark, every Event
// and every transition time that is wrong, but for those that are expected, and
// returns how many there were.
func (c *chaos) noNews(t *testing.T, since mark, what string, expected ...string) int {
	t.Helper()
	n := 0
	changes, events := c.news(since)
	for _, s := range slices.Concat(changes, events, c.broken()) {
		if slices.ContainsFunc(expected, func(e string) bool { return strings.Contains(s, e) }) {
			continue
		}
		n++
		t.Errorf("%s: %s", what, s)
	}
	return n
}

// agentMemory is the resident and anonymous memory of the agent, in MB, and its
// goroutines.
func (c *chaos) agentMemory(t *testing.T) (resident, anonymous, goroutines float64) {
	t.Helper()
	out, err := c.s.do(rigtest.AgentPID + `awk '$1 == "Rss:" {r = $2} $1 == "Anonymous:" {a = $2} END {print r * 1.024e-3, a * 1.024e-3}' /proc/$pid/smaps_rollup`)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(out, &resident, &anonymous); err != nil {
		t.Fatalf("reading the agent's memory: %v: %q", err, out)
	}
	samples, err := c.metrics()
	if err != nil {
		t.Fatal(err)
	}
	return resident, anonymous, samples["go_goroutines"]
}

// busiest is the most requests within a span.
func busiest(times []time.Time, span time.Duration) (most int) {
	for i, at := range times {
		n := 0
		for _, other := range times[i:] {
			if other.Sub(at) < span {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}

// badAPI: the API server is away, then slow, then turns away, then fails, then is
// itself again. What holds is told, what came and went is not, and nobody is
// hammered.
func (c *chaos) badAPI(t *testing.T) {
	t.Cleanup(func() {
		if _, err := c.TryGuest(c.CleanupContext(t), "systemctl start chrony iscsid.socket iscsid.service\n"+setPaths("running", "9")+"\n"+packageBack); err != nil {
			t.Error(err)
		}
	})
	m := startMoody(t, c.world)
	m.lead(t, c.world)
	c.Await(t, "every condition to be healthy", c.healthy)
	c.passes(t, 3)
	before := c.mark()
	restarts := c.restartsOf(t)
	r0, a0, g0 := c.agentMemory(t)

	m.setAway(true)
	gone := time.Now()
	c.Guest(t, chronyOff)
	time.Sleep(c.away / 4)
	c.Guest(t, "dpkg --remove "+testPackage) // and comes again before anybody can be told
	time.Sleep(c.away / 4)
	r1, a1, g1 := c.agentMemory(t)
	c.Guest(t, "dpkg -i /tmp/e2e/"+testPackage+".deb")
	time.Sleep(c.away*9/10 - time.Since(gone))
	c.Guest(t, setPaths("offline", "1"))
	time.Sleep(c.away - time.Since(gone))
	tried, _ := m.attempts()
	r2, a2, g2 := c.agentMemory(t)

	// Back, and slow.
	m.be(mood{delay: 5 * time.Second})
	m.setAway(false)
	back := time.Now()
	c.Await(t, "chronyd's fault", c.is("TimeProblem", corev1.ConditionTrue, "NoTimeDaemon"))
	c.Await(t, "the path's fault", c.is("MultipathProblem", corev1.ConditionTrue, "PathsDegraded"))
	c.Await(t, "the Event", func() error { return c.event(before, corev1.EventTypeWarning, "NoTimeDaemon") })
	c.Await(t, "the Event", func() error { return c.event(before, corev1.EventTypeWarning, "PathsDegraded") })
	told := max(c.when(before, "TimeProblem", corev1.ConditionTrue).Sub(back), c.when(before, "MultipathProblem", corev1.ConditionTrue).Sub(back))
	for _, ch := range c.changesSince(before) {
		if ch.kind == "TimeProblem" && ch.to != nil && ch.to.Status == corev1.ConditionTrue && ch.to.LastTransitionTime.Sub(gone).Abs() > time.Minute {
			t.Errorf("chronyd was stopped at %s: %s", gone.UTC().Format(time.TimeOnly), ch)
		}
	}
	c.Guest(t, "systemctl start chrony")
	fixed := time.Now()
	c.Await(t, "chronyd's fault to be over", c.is("TimeProblem", corev1.ConditionFalse))
	slow := c.when(before, "TimeProblem", corev1.ConditionFalse).Sub(fixed)
	time.Sleep(c.mood - time.Since(fixed))
	slowRequests := m.requests()

	// A fault falls into each of the others, and holds until it is over.
	worst := func(code int, fault string, told func() error) (requests []time.Time, after time.Duration) {
		m.be(mood{code: code})
		m.cut() // or the watch goes on as if nothing were
		began := time.Now()
		c.Guest(t, fault)
		time.Sleep(c.mood - time.Since(began))
		requests = m.requests()
		m.be(mood{})
		over := time.Now()
		c.Await(t, "what happened meanwhile", told)
		return requests, time.Since(over)
	}
	turnedAway, after429 := worst(http.StatusTooManyRequests, setPaths("running", "9"), c.is("MultipathProblem", corev1.ConditionFalse))
	failed, after500 := worst(http.StatusInternalServerError, "systemctl stop iscsid.socket iscsid.service", c.is("ISCSIProblem", corev1.ConditionTrue, "IscsidDown"))
	c.Await(t, "the Event", func() error { return c.event(before, corev1.EventTypeWarning, "IscsidDown") })
	c.Guest(t, "systemctl start iscsid.socket iscsid.service")
	c.Await(t, "every condition to be healthy", c.healthy)
	time.Sleep(5 * time.Second)
	r3, a3, g3 := c.agentMemory(t)

	turns := map[string][]string{}
	for _, ch := range c.changesSince(before) {
		if ch.statusChange() {
			turns[ch.kind] = append(turns[ch.kind], fmt.Sprint(ch.to != nil && ch.to.Status == corev1.ConditionTrue))
		}
	}
	straight := true
	for kind, want := range map[string][]string{
		"TimeProblem": {"true", "false"}, "MultipathProblem": {"true", "false"}, "ISCSIProblem": {"true", "false"},
		"Ready":       {"false", "true"}, // for iscsid
		"DiskProblem": {"true", "false"}, // a path is a disk
	} {
		if !slices.Equal(turns[kind], want) {
			straight = false
			t.Errorf("%s went %v, want %v", kind, turns[kind], want)
		}
		delete(turns, kind)
	}
	for kind, went := range turns {
		straight = false
		t.Errorf("%s went %v, and nothing happened that lasted", kind, went)
	}
	if n := c.restartsOf(t) - restarts; n != 0 {
		t.Errorf("the agent was restarted %d times", n)
	}
	const limit = 40 // waits grow up to a minute, with full jitter: 26 are likely in ten minutes
	if len(tried) < 2 || len(tried) > limit {
		t.Errorf("%d connections in %s", len(tried), c.away)
	}
	c.figure("the API server is away, with four transitions, two of which are over before it is back", c.away.String(),
		fmt.Sprintf("%d connections tried, at most %d in 10 s; both that hold told within %s (of which 5 s a call), since when they do; the others not at all", len(tried), busiest(tried, 10*time.Second), figures.Seconds(told)),
		fmt.Sprintf("at most %d connections; told within 75 s; no transition that is over", limit), len(tried) <= limit && told < 75*time.Second && straight)
	c.figure("then it takes 5 s for each call", c.mood.String(), fmt.Sprintf("a recovery told after %s; %d requests, at most %d in 10 s", figures.Seconds(slow), len(slowRequests), busiest(slowRequests, 10*time.Second)),
		"told within 60 s, with what chronyd takes to measure", slow < time.Minute)
	c.figure("then it answers 429, Retry-After 1 s", c.mood.String(), fmt.Sprintf("%d requests, at most %d in 10 s; what happened meanwhile told %s after it", len(turnedAway), busiest(turnedAway, 10*time.Second), figures.Seconds(after429)),
		"at most 30 requests a minute; told within 75 s", float64(len(turnedAway)) <= 30*max(1, c.mood.Minutes()) && after429 < 75*time.Second)
	c.figure("then it answers 500", c.mood.String(), fmt.Sprintf("%d requests, at most %d in 10 s; what happened meanwhile told %s after it", len(failed), busiest(failed, 10*time.Second), figures.Seconds(after500)),
		"at most 30 requests a minute; told within 75 s", float64(len(failed)) <= 30*max(1, c.mood.Minutes()) && after500 < 75*time.Second)
	flat := max(r1, r2, r3) <= r0*1.15+1 && g3 <= g0+3
	if !flat {
		t.Errorf("memory or goroutines grew: resident %.1f, %.1f, %.1f, %.1f MB, goroutines %.0f, %.0f, %.0f, %.0f", r0, r1, r2, r3, g0, g1, g2, g3)
	}
	c.figure("memory before, in the middle and at the end of it being away, and after all", "", fmt.Sprintf("resident %.1f, %.1f, %.1f, %.1f MB; anonymous %.1f, %.1f, %.1f, %.1f MB; goroutines %.0f, %.0f, %.0f, %.0f", r0, r1, r2, r3, a0, a1, a2, a3, g0, g1, g2, g3),
		"flat", flat)
	c.invariants(t)
}

// restartsOf is how often the agent's container was started again so far.
func (c *chaos) restartsOf(t *testing.T) int32 {
	t.Helper()
	p, err := c.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p.Status.ContainerStatuses[0].RestartCount
}

// others: what somebody else does to our conditions and to the Node is put right
// by what the watch tells, within an interval and without a read.
func (c *chaos) others(t *testing.T) {
	t.Cleanup(func() {
		if _, err := c.TryGuest(c.CleanupContext(t), "systemctl start chrony"); err != nil {
			t.Error(err)
		}
	})
	c.stopChrony(t)
	c.passes(t, 1)
	was := c.all()
	_, offset := c.auditSince(t, c.auditStart)
	before := c.mark()
	// As it was, whole: also since when.
	same := func() error {
		for kind, old := range was {
			now, ok := c.condition(kind)
			if !ok || now.Status != old.Status || now.Reason != old.Reason || !now.LastTransitionTime.Equal(&old.LastTransitionTime) {
				return fmt.Errorf("%s is %s/%s since %s, was %s/%s since %s", kind, now.Status, now.Reason, now.LastTransitionTime, old.Status, old.Reason, old.LastTransitionTime)
			}
		}
		return nil
	}
	restored := func(what string, do func()) time.Duration {
		here := c.mark()
		do()
		began := time.Now()
		c.Await(t, what+" to be seen", func() error {
			if len(c.changesSince(here)) == 0 {
				return errors.New("no change")
			}
			return nil
		})
		c.Await(t, what+" to be put right", same)
		return time.Since(began)
	}
	patch := func(body string) {
		c.Kubectl(t, "patch", "node", c.Node.Name(), "--subresource=status", "--type=strategic", "-p", body)
	}
	prefix := rigtest.ConditionPrefix
	overwritten := restored("a condition overwritten", func() {
		patch(fmt.Sprintf(`{"status":{"conditions":[{"type":"%sTimeProblem","status":"False","reason":"NoProblem","message":"all is well","lastTransitionTime":%q}]}}`, prefix, time.Now().UTC().Format(time.RFC3339)))
	})
	deleted := restored("conditions deleted", func() {
		patch(fmt.Sprintf(`{"status":{"conditions":[{"$patch":"delete","type":"%sTimeProblem"},{"$patch":"delete","type":"%sReady"}]}}`, prefix, prefix))
	})
	again := restored("the Node deleted and made again", func() { c.remakeNode(t) })
	c.broken() // what the observer holds against transition times was somebody else's
	events := c.eventsSince(before)
	for _, e := range events {
		t.Errorf("nothing happened on the host, and an Event says %s: %s", e.Reason, e.Message)
	}
	requests, _ := c.auditSince(t, offset)
	var writes, reads int
	for _, r := range requests {
		switch {
		case r.write():
			writes++
		case r.Verb != "watch":
			reads++
			t.Errorf("a read that is no watch: %s", r)
		}
	}
	const interval = 3 * time.Second
	longest := max(overwritten, deleted, again)
	c.figure("a condition is overwritten; two are deleted; the Node is deleted and made again", "once each",
		fmt.Sprintf("put right after %s, %s, %s, since when they held; %d writes, %d reads, %d Events", figures.Seconds(overwritten), figures.Seconds(deleted), figures.Seconds(again), writes, reads, len(events)),
		"within the interval (3 s), 0 reads, 0 Events", longest <= interval && reads == 0 && len(events) == 0)
	c.Guest(t, "systemctl start chrony")
	c.Await(t, "every condition to be healthy", c.healthy)
}

// remakeNode deletes the Node and makes it again, as whoever repairs a cluster by
// hand does, without our conditions.
func (c *chaos) remakeNode(t *testing.T) {
	t.Helper()
	var node map[string]any
	if err := json.Unmarshal([]byte(c.Kubectl(t, "get", "node", c.Node.Name(), "-o", "json")), &node); err != nil {
		t.Fatal(err)
	}
	meta := node["metadata"].(map[string]any)
	node["metadata"] = map[string]any{"name": meta["name"], "labels": meta["labels"], "annotations": meta["annotations"]}
	status := node["status"].(map[string]any)
	status["conditions"] = slices.DeleteFunc(status["conditions"].([]any), func(v any) bool {
		return strings.HasPrefix(v.(map[string]any)["type"].(string), rigtest.ConditionPrefix)
	})
	data, err := json.Marshal(node)
	if err != nil {
		t.Fatal(err)
	}
	c.Kubectl(t, "delete", "node", c.Node.Name())
	cmd := c.ControlPlane.KubectlCommand(c.CleanupContext(t), "create", "-f", "-")
	cmd.Stdin = strings.NewReader(string(data))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("making the Node again: %v: %s", err, out)
	}
}

// secondAgent starts another agent on the node beside the pod, with the pod's
// files and rights, on other ports.
const secondAgent = rigtest.AgentPID + `set --; while IFS= read -r -d '' v; do set -- "$@" "$v"; done </proc/$pid/environ
systemd-run --quiet --collect --unit e2e-second env -i "$@" nsenter -t $pid -m /agent run --config=/etc/host-hygiene/config.yaml \
  --metrics-address 127.0.0.1:20366 --health-address 127.0.0.1:20367 --socket ''`

// twoAgents: a second agent on a node says so and keeps still, and takes over as
// soon as the first has ended.
func (c *chaos) twoAgents(t *testing.T) {
	t.Cleanup(func() {
		if _, err := c.TryGuest(c.CleanupContext(t), "systemctl stop e2e-second 2>/dev/null || true; systemctl start chrony"); err != nil {
			t.Error(err)
		}
	})
	ready := func() (string, error) {
		return c.s.do(`exec 3<>/dev/tcp/127.0.0.1/20367; printf 'GET /readyz HTTP/1.0\r\n\r\n' >&3; cat <&3`)
	}
	before := c.mark()
	started := c.Guest(t, "date +%s\n"+secondAgent) // an earlier run's is in the journal too
	c.Await(t, "the second agent to yield", func() error {
		out, err := ready()
		if err == nil && !strings.Contains(out, "503") || !strings.Contains(out, "another agent runs on this node") {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
	asked := func() (n int) {
		out := c.Guest(t, "journalctl -u e2e-second --since=@"+started+" --no-pager -o cat | grep -c 'another agent runs on this node' || true")
		n, _ = strconv.Atoi(out)
		return n
	}
	c.passes(t, 3)
	unchanged := c.noNews(t, before, "a second agent")
	c.Guest(t, chronyOff)
	c.Await(t, "NoTimeDaemon", c.is("TimeProblem", corev1.ConditionTrue, "NoTimeDaemon"))
	c.Await(t, "the Event", func() error { return c.event(before, corev1.EventTypeWarning, "NoTimeDaemon") })
	if n := len(c.eventsSince(before)); n != 1 {
		t.Errorf("%d Events for one fault", n)
	}
	said := asked()
	if said != 1 {
		t.Errorf("it said %d times that it yields", said)
	}
	// The first dies; its container comes again and finds the second.
	before = c.mark()
	c.Guest(t, rigtest.AgentPID+"kill -9 $pid")
	killed := time.Now()
	c.Await(t, "the second agent to take over", func() error {
		out, err := ready()
		if err == nil && !strings.Contains(out, "200 OK") {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
	took := time.Since(killed)
	time.Sleep(20 * time.Second) // several intervals, of which nobody's metrics tell here
	unchanged += c.noNews(t, before, "the first agent's end")
	c.Guest(t, "systemctl stop e2e-second")
	c.Await(t, "the pod to take over again", func() error {
		p, err := c.Pod(t.Context())
		if err == nil && !p.Status.ContainerStatuses[0].Ready {
			err = errors.New("not ready")
		}
		return err
	})
	c.passes(t, 2)
	unchanged += c.noNews(t, before, "the second agent's end")
	c.Guest(t, "systemctl start chrony")
	c.Await(t, "every condition to be healthy", c.healthy)
	c.figure("a second agent is started on the node; the first dies; then the second", "once",
		fmt.Sprintf("it says once that it waits, and for whom, and is not ready; %d condition changes and Events; first report of the one that takes over after %s", unchanged, figures.Seconds(took)),
		"one yields and says so; 0 changes", unchanged == 0 && said == 1)
}

// pid is the agent's, or an error while it is none.
func (c *chaos) pid() (int, error) {
	out, err := c.s.do(rigtest.AgentPID + "echo $pid")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(out)
}

// shoot kills the agent and waits until another process is there.
func (c *chaos) shoot(t *testing.T) {
	t.Helper()
	out, err := c.s.do(rigtest.AgentPID + "kill -9 $pid; echo $pid")
	if err != nil {
		t.Fatal(err)
	}
	old, err := strconv.Atoi(out)
	if err != nil {
		t.Fatal(err)
	}
	c.Await(t, "another agent", func() error {
		now, err := c.pid()
		if err == nil && now == old {
			err = errors.New("the old one is still there")
		}
		return err
	})
}

// sigkill: an agent that is killed at any moment changes nothing that is true,
// and what changes meanwhile is told once.
func (c *chaos) sigkill(t *testing.T) {
	t.Cleanup(func() {
		if _, err := c.TryGuest(c.CleanupContext(t), "systemctl start chrony"); err != nil {
			t.Error(err)
		}
	})
	m := startMoody(t, c.world)
	c.stopChrony(t)
	calm := c.mark()
	m.lead(t, c.world) // kills it too
	for range c.kills {
		c.shoot(t)
		time.Sleep(time.Duration(c.rnd.Int64N(int64(3 * time.Second))))
	}
	dir := c.configDir(t)
	for k := range c.killsInReload {
		if _, err := c.s.do(dir + swapped(runConfig+fmt.Sprintf("# %d\n", k))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(c.rnd.Int64N(int64(500 * time.Millisecond))))
		c.shoot(t)
	}
	c.ready(t)
	c.passes(t, 2)
	quiet := c.noNews(t, calm, "killed")

	// Each toggles the problem, and dies with the write of it at the door: not
	// yet passed on, or done and not yet answered.
	during := c.mark()
	stopped := true
	wrong := 0
	for k := range c.killsInWrite {
		want, act := corev1.ConditionTrue, "systemctl stop chrony"
		if stopped {
			want, act = corev1.ConditionFalse, "systemctl start chrony"
		} else {
			c.Guest(t, clockSettled)
		}
		stopped = !stopped
		here := c.mark()
		h := m.hold((k+k/2)%2 == 1) // of either kind, problems and recoveries
		since := time.Now()
		c.Guest(t, act)
		h.wait(t)
		c.shoot(t)
		h.letGo()
		c.Await(t, "TimeProblem "+string(want), c.is("TimeProblem", want))
		now, _ := c.condition("TimeProblem")
		if at := now.LastTransitionTime.Time; at.Before(since.Add(-5*time.Second)) || at.After(time.Now().Add(5*time.Second)) {
			wrong++
			t.Errorf("TimeProblem is %s since %s, changed after %s", want, at, since)
		}
		if want == corev1.ConditionTrue {
			c.Await(t, "the Event", func() error { return c.event(here, corev1.EventTypeWarning, "NoTimeDaemon") })
		}
	}
	c.ready(t)
	c.passes(t, 2)
	turns, problems := 0, 0
	for _, ch := range c.changesSince(during) {
		if !ch.statusChange() {
			continue
		}
		if ch.kind != "TimeProblem" {
			wrong++
			t.Errorf("killed while it wrote: %s", ch)
			continue
		}
		turns++
		if ch.to != nil && ch.to.Status == corev1.ConditionTrue {
			problems++
		}
	}
	told := map[string]int{}
	for _, e := range c.eventsSince(during) {
		told[e.Type+" "+e.Reason]++
	}
	if turns != c.killsInWrite {
		wrong++
		t.Errorf("TimeProblem turned %d times, want %d", turns, c.killsInWrite)
	}
	if n := told["Warning NoTimeDaemon"]; n != problems {
		wrong++
		t.Errorf("%d Events of %d problems", n, problems)
	}
	for _, f := range c.broken() {
		wrong++
		t.Error(f)
	}
	c.figure("SIGKILL at a random moment, up to 3 s after the start, with a problem told", fmt.Sprintf("%d, and %d within 0.5 s after a new config", c.kills, c.killsInReload),
		fmt.Sprintf("%d condition changes, Events and wrong times", quiet), "0", quiet == 0)
	c.figure("SIGKILL while a status is written", fmt.Sprintf("%d, half of them with the write done and its answer not there", c.killsInWrite),
		fmt.Sprintf("%d changes of status for %d; %d Events for %d problems, %d for %d recoveries; %d wrong times and others", turns, c.killsInWrite, told["Warning NoTimeDaemon"], problems, told["Normal NoProblem"], turns-problems, wrong),
		"each change once, an Event for each problem, 0 wrong", wrong == 0)
	c.Guest(t, "systemctl start chrony")
	c.Await(t, "every condition to be healthy", c.healthy)
}

// chronyOff stops chronyd when it has set the clock: one that has just started
// leaves a kernel behind that says it is not synchronised, which is a problem of
// its own after a while.
const (
	clockSettled = "chronyc waitsync 240 0 0 0.5 >/dev/null"
	chronyOff    = clockSettled + "\nsystemctl stop chrony"
)

// stopChrony makes a problem and waits until all is told of it.
func (c *chaos) stopChrony(t *testing.T) {
	t.Helper()
	before := c.mark()
	c.Guest(t, chronyOff)
	c.Await(t, "NoTimeDaemon", c.is("TimeProblem", corev1.ConditionTrue, "NoTimeDaemon"))
	c.Await(t, "the Event", func() error { return c.event(before, corev1.EventTypeWarning, "NoTimeDaemon") })
}

// ready waits until the container is ready, however often it was started, and
// the API server speaks of the one that runs.
func (c *chaos) ready(t *testing.T) {
	t.Helper()
	c.Await(t, "the agent to be ready", func() error {
		p, err := c.Pod(t.Context())
		if err != nil {
			return err
		}
		s := p.Status.ContainerStatuses[0]
		if !s.Ready {
			return errors.New("not ready")
		}
		runs, err := c.s.do(rigtest.AgentPID + "cut -d: -f3 /proc/$pid/cgroup")
		if _, id, _ := strings.Cut(s.ContainerID, "://"); err == nil && !strings.Contains(runs, id) {
			err = fmt.Errorf("%s runs, and the pod's status is of %s", runs, id)
		}
		return err
	})
}

// configDir is a line of shell that sets d to where the kubelet keeps the
// agent's config on the node.
func (c *chaos) configDir(t *testing.T) string {
	t.Helper()
	p, err := c.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("d=/var/lib/kubelet/pods/%s/volumes/kubernetes.io~configmap/config\n", p.UID)
}

// swapped puts a config in place as the kubelet does, by a symlink that is
// renamed, and sooner.
func swapped(content string) string {
	var octal strings.Builder
	for _, b := range []byte(content) {
		fmt.Fprintf(&octal, `\%03o`, b)
	}
	return `n=$(mktemp -d "$d/..e2e.XXXXXX"); chmod 755 "$n"; printf '` + octal.String() + `' >"$n/config.yaml"
old=$(readlink "$d/..data"); ln -sfn "$(basename "$n")" "$d/..data_e2e"; mv -T "$d/..data_e2e" "$d/..data"
case "$old" in ..e2e.*) rm -rf "$d/$old";; esac`
}

// underFire: whatever the file holds, the last good config stays in force, and
// each mistake is told once.
func (c *chaos) underFire(t *testing.T) {
	dir := c.configDir(t)
	t.Cleanup(func() {
		// What the ConfigMap holds, for the kubelet to find as it left it.
		if _, err := c.TryGuest(c.CleanupContext(t), dir+swapped(runConfig)); err != nil {
			t.Error(err)
		}
	})
	put := func(content string) {
		t.Helper()
		if _, err := c.s.do(dir + swapped(content)); err != nil {
			t.Fatal(err)
		}
	}
	logged := func() int {
		out := c.Kubectl(t, "logs", "-n", rigtest.Namespace, "ds/"+daemonSet)
		return strings.Count(out, "config refused")
	}
	start := c.mark()
	refusedBefore := logged()
	var bad []string
	swaps := 0
	for k := 0; swaps < c.swaps; k++ {
		if k%4 == 3 { // several within a moment
			for range min(5, c.swaps-swaps) {
				put(runConfig + fmt.Sprintf("# %d\ninterval: %d\n", k, c.rnd.IntN(100)))
				swaps++
			}
		} else {
			// The kubelet may put its own back at any time, which is no mistake to
			// be told; then another one is made.
			told := false
			for try := 0; !told && try < 5; try++ {
				content, says := mistake(k%4, fmt.Sprintf("wrong%dx%d", k, try), c.rnd)
				here := c.mark()
				put(content)
				swaps++
				if told = c.toldWithin(15*time.Second, here, says); told {
					bad = append(bad, says)
				}
			}
			if !told {
				t.Fatal("five mistakes in turn were not told")
			}
			if k%4 == 1 {
				continue // the next mistake follows without a good one between
			}
		}
		put(runConfig + fmt.Sprintf("# good %d\n", k))
		swaps++
		c.Await(t, "the good one to be in force", c.is("Ready", corev1.ConditionTrue))
	}
	put(runConfig)
	c.Await(t, "every condition to be healthy", c.healthy)
	c.passes(t, 1)
	other := 0
	for _, ch := range c.changesSince(start) {
		if ch.kind != "Ready" && ch.statusChange() {
			other++
			t.Errorf("a config that was refused changed a condition: %s", ch)
		}
	}
	told := 0
	for _, says := range bad {
		n := 0
		for _, e := range c.eventsSince(start) {
			if e.Reason == "ConfigInvalid" && says != "" && strings.Contains(e.Message, says) {
				n++
			}
		}
		if says != "" && n != 1 {
			t.Errorf("%d Events say %q, want one", n, says)
		}
		if says == "" || n == 1 {
			told++
		}
	}
	refused := logged() - refusedBefore
	events := 0
	for _, e := range c.eventsSince(start) {
		if e.Reason == "ConfigInvalid" {
			events++
		}
	}
	if events < len(bad) || events > refused {
		t.Errorf("%d mistakes that stayed, %d Events and %d refusals in the log", len(bad), events, refused)
	}
	c.figure("the config is swapped: good, with an unknown key, torn, binary, five within a moment", fmt.Sprintf("%d, of which %d bad ones that stayed", swaps, len(bad)),
		fmt.Sprintf("%d told in Ready and once as an Event; with those of a moment %d Events and %d lines in the log; %d other conditions changed", told, events, refused, other), "each once, 0 others", told == len(bad) && events >= len(bad) && events <= refused && other == 0)
	c.invariants(t)
}

// mistake is a config that is refused: with an unknown key, as a write that was
// torn leaves it, or no text at all. says is what its refusal must name.
func mistake(kind int, name string, rnd *rand.Rand) (content, says string) {
	switch kind {
	case 0:
		return runConfig + name + ": 1\n", name
	case 1:
		return runConfig[:len(runConfig)/2] + "\n" + name + ": [1, {", ""
	}
	raw := make([]byte, 300)
	for i := range raw {
		raw[i] = byte(rnd.UintN(256))
	}
	return string(raw), ""
}

// toldWithin waits until Ready has said that the config is refused, and why.
func (c *chaos) toldWithin(limit time.Duration, since mark, says string) bool {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(look) {
		for _, ch := range c.changesSince(since) {
			if ch.kind == "Ready" && ch.to != nil && ch.to.Reason == "ConfigInvalid" && strings.Contains(ch.to.Message, says) {
				return true
			}
		}
	}
	return false
}

// clockConfig holds long enough for the clock to be set meanwhile.
const clockConfig = `apiVersion: hosthygiene.io/v1alpha1
kind: AgentConfig
interval: 3s
probes:
  oom: {window: 75s}
require:
  packages: [` + testPackage + `]
hold: {PackageMissing: {before: 20s, clear: 20s}}
severity: {ClockUnsynchronized: warning} # or Ready would tell of it
`

const packageBack = "dpkg -s " + testPackage + " >/dev/null 2>&1 || dpkg -i /tmp/e2e/" + testPackage + ".deb"

// clockSteps: the clock is set by an hour and back. What is to last a while lasts
// it, and what was told stays told.
func (c *chaos) clockSteps(t *testing.T) {
	t.Cleanup(func() {
		if _, err := c.TryGuest(c.CleanupContext(t), packageBack+"\nsystemctl start chrony; sleep 2; chronyc makestep >/dev/null"); err != nil {
			t.Error(err)
		}
		c.configure(t, runConfig, c.runConfigInForce)
	})
	c.configure(t, clockConfig, func() error {
		samples, err := c.metrics()
		if err != nil {
			return err
		}
		if _, old := samples[`hosthygiene_package_installed{package="iscsi"}`]; old {
			return errors.New("the old one is")
		}
		return c.healthy()
	})
	// Somebody else's hand on the clock is what chronyd is there against. It is
	// not synchronised then, and that is told.
	c.stopChrony(t)
	for _, step := range []string{"+1 hour", "-1 hour"} {
		expected := []string{"PackageProblem", "PackageMissing", "OOMProblem", "SystemOOMKill", "ClockUnsynchronized"}
		if step[0] == '-' {
			// It does, by the node's clock, whose times they are.
			expected = append(expected, "the transition time went back")
		}
		c.Guest(t, "systemd-run --quiet --wait --collect -p MemoryMax=20M -p MemorySwapMax=0 -p OOMPolicy=continue tail /dev/zero || true")
		c.Await(t, "SystemOOMKill", c.is("OOMProblem", corev1.ConditionTrue, "SystemOOMKill"))
		killed := time.Now()
		before := c.mark()
		samples, err := c.metrics()
		if err != nil {
			t.Fatal(err)
		}
		runs := probeRuns(samples)
		c.Guest(t, "dpkg --remove "+testPackage)
		fault := time.Now()
		time.Sleep(5 * time.Second)
		c.Guest(t, "date -s '"+step+"' >/dev/null")
		c.Await(t, "the package to be missed", c.is("PackageProblem", corev1.ConditionTrue, "PackageMissing"))
		held := c.when(before, "PackageProblem", corev1.ConditionTrue).Sub(fault)
		c.Await(t, "the Event", func() error { return c.event(before, corev1.EventTypeWarning, "PackageMissing") })
		now, err := strconv.ParseInt(c.Guest(t, "date +%s"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range c.eventsSince(before) {
			if off := time.Unix(now, 0).Sub(e.LastTimestamp.Time); e.Reason == "PackageMissing" && (off < -2*time.Second || off > 30*time.Second) {
				t.Errorf("%s: the Event is %s old", step, off)
			}
		}
		if samples, err = c.metrics(); err != nil {
			t.Fatal(err)
		}
		looked := probeRuns(samples)["packages"] - runs["packages"]
		// The agent after this one must not take what was told for older than
		// the boot, whose time has moved with the clock. It gets a pod of its
		// own: of two containers in one pod the kubelet takes that for the newer
		// which was created later by the clock.
		old, err := c.Pod(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		c.Kubectl(t, "delete", "pod", "-n", rigtest.Namespace, old.Name)
		c.PodReady(t, 0)
		c.passes(t, 2)
		others := c.noNews(t, before, "clock set by "+step, expected...)
		c.Guest(t, packageBack)
		c.Await(t, "the package to be there", c.is("PackageProblem", corev1.ConditionFalse))
		c.Await(t, "Ready", c.is("Ready", corev1.ConditionTrue))
		c.Await(t, "the kill to be old", c.is("OOMProblem", corev1.ConditionFalse))
		window := c.when(before, "OOMProblem", corev1.ConditionFalse).Sub(killed)
		others += c.noNews(t, before, "clock set by "+step, expected...)
		turns := 0
		for _, ch := range c.changesSince(before) {
			if ch.statusChange() {
				turns++
			}
		}
		ok := held > 18*time.Second && held < 40*time.Second && window > 65*time.Second && window < 105*time.Second && turns == 5 && others == 0 && looked > 3
		if !ok {
			t.Errorf("%s: a hold of 20 s took %s, a window of 75 s %s; %d changes, want 5; %v looks", step, held, window, turns, looked)
		}
		c.figure("the clock is set by "+step+" while the agent runs, then its pod is replaced", "once",
			fmt.Sprintf("a hold of 20 s that had begun took %s; a kill with a window of 75 s was told for %s; %d changes of a status for 5 that are due; %.0f looks in %s", figures.Seconds(held), figures.Seconds(window), turns, looked, held.Round(time.Second)),
			"holds, windows and intervals as before, no other change", ok)
	}
	c.invariants(t)
}

// rollingUpdate: another version of the pod changes no condition.
func (c *chaos) rollingUpdate(t *testing.T) {
	t.Cleanup(func() {
		if _, err := c.TryGuest(c.CleanupContext(t), "systemctl start chrony"); err != nil {
			t.Error(err)
		}
	})
	c.stopChrony(t)
	before := c.mark()
	var took figures.Times
	for range c.rollouts {
		began := time.Now()
		c.Kubectl(t, "rollout", "restart", "-n", rigtest.Namespace, "ds/"+daemonSet)
		c.Kubectl(t, "rollout", "status", "-n", rigtest.Namespace, "ds/"+daemonSet, "--timeout=5m")
		took = append(took, time.Since(began))
	}
	c.passes(t, 1)
	n := c.noNews(t, before, "a rolling update")
	c.figure("a rolling update of the DaemonSet, with a problem told", fmt.Sprintf("%d times, %s each", c.rollouts, figures.Seconds(took.Median())),
		fmt.Sprintf("%d condition changes and Events", n), "0", n == 0)
	c.Guest(t, "systemctl start chrony")
	c.Await(t, "every condition to be healthy", c.healthy)
}

// rebooted: what was told before a boot is not told as true after it.
func (c *chaos) rebooted(t *testing.T) {
	before := c.mark()
	c.reboot(t)
	unknown := 0
	for _, ch := range c.changesSince(before) {
		if ch.to != nil && ch.to.Reason == "FirstPassPending" {
			unknown++
		}
	}
	c.figure("the node reboots with a problem told, which is over with the boot", "once",
		fmt.Sprintf("%d conditions went Unknown/FirstPassPending, none told the problem after the boot", unknown), "nothing from before the boot told as true", !t.Failed() && unknown > 0)
}

// uninstalled: as documented, hastily, and with a Node whose machine is gone.
func (c *chaos) uninstalled(t *testing.T) {
	dead := "dead-1"
	t.Cleanup(func() {
		if _, err := c.ControlPlane.Kubectl(c.CleanupContext(t), "delete", "--ignore-not-found", "node", dead); err != nil {
			t.Error(err)
		}
	})
	c.uninstall(t)
	c.install(t)
	c.Await(t, "every condition to be healthy", c.healthy)
	c.Apply(t, map[string]any{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": dead}})
	c.Kubectl(t, "patch", "node", dead, "--subresource=status", "--type=strategic", "-p",
		`{"status":{"conditions":[{"type":"hosthygiene.io/TimeProblem","status":"True","reason":"NoTimeDaemon"},{"type":"hosthygiene.io/Ready","status":"False","reason":"X"},{"type":"KernelDeadlock","status":"False","reason":"Y"}]}}`)
	c.Kubectl(t, "delete", "-f", manifests)
	out, err := c.cleanup(t, "--all")
	if err != nil {
		t.Errorf("agent cleanup --all: %v: %s", err, out)
	}
	c.Await(t, "the conditions to go", c.bare)
	left := c.Kubectl(t, "get", "nodes", "-o", `jsonpath={range .items[*].status.conditions[*]}{.type}{"\n"}{end}`)
	ours := 0
	for line := range strings.Lines(left) {
		if strings.HasPrefix(line, rigtest.ConditionPrefix) {
			ours++
			t.Errorf("left: %s", line)
		}
	}
	if !strings.Contains(left, "KernelDeadlock") {
		t.Error("the dead Node lost somebody else's condition")
	}
	c.nothingLeft(t)
	c.figure("the agent is uninstalled: as documented, hastily, and with a Node whose machine is gone", "once each", fmt.Sprintf("%d conditions left", ours), "0", ours == 0 && !t.Failed())
}
