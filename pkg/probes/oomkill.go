package probes

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// oomKill is one decision of the kernel to kill for memory, from its log.
type oomKill struct {
	// At is on the log's clock, since boot.
	At time.Duration
	// Global: the machine was out of memory. Otherwise Limit is the control
	// group that was at its own limit.
	Global bool
	Limit  string
	// Cgroup is the victim's.
	Cgroup string
	// Victims are the processes killed, each once: with memory.oom.group the
	// log names the first of them twice.
	Victims []oomVictim
}

type oomVictim struct {
	PID  int
	Comm string
}

// The lines of mm/oom_kill.c and mm/memcontrol.c. A process chooses its comm and
// a container the names of control groups of its own, and either may hold any
// text: so the groups end at the first keyword behind them, the comm at the last.
var (
	// Since Linux 5.0, one line for each decision.
	oomKillLine = regexp.MustCompile(`^oom-kill:constraint=[A-Z_]+,nodemask=[^=]*,cpuset=.*?,mems_allowed=[0-9,-]*,(?:(global_oom)|oom_memcg=(.*?)),task_memcg=(.*?),task=(.*),pid=([0-9]{1,10}),uid=[0-9]+$`)
	// Before, only for control groups.
	taskInLine = regexp.MustCompile(`^Task in (/.*) killed as a result of limit of (/.*)$`)
	// "Killed" since 4.x; some kernels say "Kill process ... or sacrifice child"
	// first and "Killed" then.
	killedLine = regexp.MustCompile(`^(Out of memory|Memory cgroup out of memory)?(?: \([a-z_]+\))?(?:: )?Kill(?:ed)? process ([0-9]{1,10})(?:, UID [0-9]+,)? \((.*)\) (?:total-vm:|score )`)
)

// parseOOMKills finds the kernel's decisions to kill among the records of its
// log.
func parseOOMKills(records []host.KernelRecord) []oomKill {
	var kills []oomKill
	for _, r := range records {
		// Two cheap words before any expression: a log has thousands of lines.
		if !strings.Contains(r.Text, "Kill") && !strings.Contains(r.Text, "kill") {
			continue
		}
		if m := oomKillLine.FindStringSubmatch(r.Text); m != nil {
			k := oomKill{At: r.Time, Global: m[1] != "", Limit: m[2], Cgroup: m[3]}
			k.add(m[5], m[4])
			kills = append(kills, k)
			continue
		}
		if m := taskInLine.FindStringSubmatch(r.Text); m != nil {
			kills = append(kills, oomKill{At: r.Time, Cgroup: m[1], Limit: m[2]})
			continue
		}
		m := killedLine.FindStringSubmatch(r.Text)
		if m == nil {
			continue
		}
		global := m[1] == "Out of memory"
		// A kill belongs to the decision before it. Where none was logged, by
		// old kernels for the whole machine, the kill itself is all there is.
		if n := len(kills); n == 0 || r.Time-kills[n-1].At > time.Minute || global && !kills[n-1].Global {
			if !global {
				continue
			}
			kills = append(kills, oomKill{At: r.Time, Global: true})
		}
		kills[len(kills)-1].add(m[2], m[3])
	}
	return kills
}

func (k *oomKill) add(pid, comm string) {
	n, err := strconv.Atoi(pid)
	if err != nil || slices.ContainsFunc(k.Victims, func(v oomVictim) bool { return v.PID == n }) {
		return
	}
	k.Victims = append(k.Victims, oomVictim{n, comm})
}

// oomLog is what the kernel's log said when the counter of kills stood at Count.
type oomLog struct {
	BootID string
	Count  int64
	Kills  []toldKill
}

// toldKill is a kill as it is told, with the name it had when it was found: a
// pod that is gone has none later.
type toldKill struct {
	reason, subject, message string
	severity                 finding.Severity
	at                       time.Time
	evidence                 finding.Evidence
}

// checkKills tells the kills within the window. The kernel's log is read only
// when its counter of kills has moved since it was read last.
func (c *oomCheck) checkKills() {
	data, err := c.in.Host.ReadFile(c.ctx, "/proc/vmstat")
	if err != nil {
		c.failed(err)
		return
	}
	count, ok, err := parseCounter(data, "oom_kill")
	if err != nil {
		c.failed(fmt.Errorf("/proc/vmstat: %w", err))
		return
	}
	if !ok { // before Linux 4.13
		c.failed(fmt.Errorf("/proc/vmstat: this kernel does not count OOM kills"))
		return
	}
	c.kills = count
	c.r.Sample("hosthygiene_oom_kills_total", float64(count), "scope", "node")
	inPods := c.scopeKills("kubepods", c.kubepods)
	c.scopeKills("system", systemSlice)

	podsGrew, podsFirst := grown(c.in.Memory, "oom kills in kubepods", inPods)
	nodeGrew, first := grown(c.in.Memory, "oom kills", count)
	if count == 0 {
		return
	}
	os, err := c.in.Host.OS(c.ctx)
	if err != nil {
		c.failed(fmt.Errorf("when the last OOM kill was: %w", err))
		return
	}
	log, known := Kept[oomLog](c.in.Memory, "oom log")
	if !known || log.Count != count || log.BootID != os.BootID {
		records, err := c.in.Host.KernelLog(c.ctx)
		if err != nil {
			c.failed(fmt.Errorf("kernel log: %w; /proc/vmstat counts %d OOM kills since boot, when and of what is told only as far as the counters move", err, count))
			if !first && !podsFirst {
				c.countedKills(nodeGrew, podsGrew)
			}
			c.tell(c.counted())
			return
		}
		log = oomLog{BootID: os.BootID, Count: count}
		names := c.podNames()
		for _, k := range parseOOMKills(records) {
			if at := os.BootTime.Add(k.At); c.in.Now.Sub(at) <= c.Window.D() {
				// From now on by the clock that nobody can set.
				at = c.in.Now.Add(at.Sub(c.in.Now))
				log.Kills = append(log.Kills, tellKill(k, at, names))
			}
		}
		c.in.Memory.Keep("oom log", log)
	}
	c.tell(log.Kills)
}

// scopeKills samples the kills in a control group and all below it.
func (c *oomCheck) scopeKills(scope, cgroup string) int64 {
	if cgroup == "" || !c.tree.unified { // v1 does not count up the tree
		return 0
	}
	n, ok, err := c.tree.counter(c.ctx, cgroup, "memory.events", "oom_kill")
	c.failed(err)
	if err == nil && ok {
		c.r.Sample("hosthygiene_oom_kills_total", float64(n), "scope", scope)
	}
	return n
}

// countedKills notes kills of which only the counters tell. They count a victim
// twice where a whole group is killed, so how many there were is not said.
func (c *oomCheck) countedKills(node, pods int64) {
	note := func(reason, subject, message, source string, severity finding.Severity) {
		list := slices.DeleteFunc(c.counted(), func(k toldKill) bool { return k.reason == reason })
		c.in.Memory.Keep("oom counted", append(list, toldKill{reason: reason, subject: subject, severity: severity, at: c.in.Now, message: message,
			evidence: finding.Evidence{Source: source, Observed: "oom_kill has grown since the last pass"}}))
	}
	if pods > 0 {
		note("ContainerOOMKills", "kubepods", "the kernel killed a process of some pod for memory; the kernel log, which says of which, can not be read",
			c.tree.file(c.kubepods, "memory.events"), finding.Info)
	}
	if node > pods {
		note("SystemOOMKill", "node", "the kernel killed a process outside pods for memory; the kernel log, which says which, can not be read",
			"/proc/vmstat", finding.Warning)
	}
}

func (c *oomCheck) counted() []toldKill {
	list, _ := Kept[[]toldKill](c.in.Memory, "oom counted")
	return slices.Clone(list)
}

// tell adds one finding for each reason and subject among the kills within the
// window, the last kill first in its evidence.
func (c *oomCheck) tell(kills []toldKill) {
	byKey := map[finding.Key]*finding.Finding{}
	var order []finding.Key
	for _, k := range slices.Backward(kills) {
		if ago := c.in.Now.Sub(k.at); ago > c.Window.D() || ago < -time.Minute {
			continue
		}
		key := finding.Key{Reason: k.reason, Subject: k.subject}
		f := byKey[key]
		if f == nil {
			f = &finding.Finding{Reason: k.reason, Severity: k.severity, Subject: k.subject, Message: k.message}
			byKey[key] = f
			order = append(order, key)
		}
		if len(f.Evidence) < 5 {
			f.Evidence = append(f.Evidence, k.evidence)
		}
	}
	for _, key := range order {
		c.r.Add(*byKey[key])
	}
}

// tellKill says what a kill means: the machine was out of memory, all pods
// together were, a service was at its own limit (SystemOOMKill), or a container
// or its pod was (ContainerOOMKills).
func tellKill(k oomKill, at time.Time, names podNames) toldKill {
	t := toldKill{reason: "SystemOOMKill", severity: finding.Warning, at: at, evidence: finding.Evidence{
		Source:   "kernel log, " + at.UTC().Format(time.RFC3339),
		Observed: k.describe(names),
	}}
	pod := parsePodCgroup(k.Limit)
	// The kernel escapes what it logs; a subject goes to the API server and
	// must be text whoever wrote the record.
	unit := strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return '?'
		}
		return c
	}, path.Base(k.Limit))
	switch {
	case k.Global:
		t.subject = "node"
		t.message = "the node ran out of memory and the kernel killed " + k.victims()
	case pod.UID != "":
		// The limit that was hit is the pod's, the victim in a container.
		if in := parsePodCgroup(k.Cgroup); in.UID == pod.UID {
			pod = in
		}
		t.reason, t.severity = "ContainerOOMKills", finding.Info
		t.subject = names.name(pod)
		t.message = fmt.Sprintf("the kernel killed %s in %s at its own memory limit", k.victims(), t.subject)
	case kubepodsAbove(k.Limit) != "":
		t.subject = "kubepods"
		t.message = "all pods together reached their memory limit and the kernel killed " + k.victims()
	case containerID(unit) != "": // a container of Docker's or Podman's
		t.reason, t.severity = "ContainerOOMKills", finding.Info
		t.subject = "container " + shortID(containerID(unit))
		t.message = fmt.Sprintf("the kernel killed %s in %s at its own memory limit", k.victims(), t.subject)
	default:
		t.subject = unit
		t.message = fmt.Sprintf("%s reached its own memory limit and the kernel killed %s in it", unit, k.victims())
	}
	return t
}

// victims names the processes, quoted: a name is the process's own choice.
func (k oomKill) victims() string {
	switch len(k.Victims) {
	case 0:
		return "a process"
	case 1:
		return strconv.Quote(k.Victims[0].Comm)
	}
	return fmt.Sprintf("%q and %d more", k.Victims[0].Comm, len(k.Victims)-1)
}

func (k oomKill) describe(names podNames) string {
	var list []string
	for _, v := range k.Victims[:min(5, len(k.Victims))] {
		list = append(list, fmt.Sprintf("%q (PID %d)", v.Comm, v.PID))
	}
	scope := "limit of " + k.Limit
	if k.Global {
		scope = "the whole machine"
	}
	text := scope + ": killed " + strings.Join(list, ", ")
	if k.Cgroup != "" {
		text += " in " + k.Cgroup
	}
	if pod := parsePodCgroup(k.Cgroup); pod.UID != "" {
		text += " (" + names.name(pod) + ")"
	}
	return text
}

// name is namespace/pod/container where the kubelet told it, else what the
// control group says.
func (n podNames) name(c podCgroup) string {
	if found, ok := n.container(c); ok && c.Container != "" {
		return found.String()
	}
	if p := n.pods[c.UID]; p != nil {
		return p.String()
	}
	if c.Container != "" {
		return "pod " + c.UID + " container " + shortID(c.Container)
	}
	return "pod " + c.UID
}

func shortID(id string) string { return id[:min(12, len(id))] }

// podNames asks the kubelet for the names of pods, of which one may have come and
// gone since the list was new for those that run.
func (c *oomCheck) podNames() podNames {
	c.loadPods(podsAge)
	return c.pods
}
