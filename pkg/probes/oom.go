package probes

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// OOM checks that the kernel, when memory runs out, kills pods before it kills
// what keeps the node alive, and tells when it has killed.
type OOM struct {
	Common
	// Window is how long a kill is told after it happened.
	Window Duration `json:"window,omitempty"`
}

// DefaultOOM returns the default settings.
func DefaultOOM() OOM { return OOM{Window: Duration(10 * time.Minute)} }

// Name implements [Probe].
func (OOM) Name() string { return "oom" }

// Condition implements [Probe].
func (OOM) Condition() string { return ConditionPrefix + "OOMProblem" }

// Wakes implements [Probe].
func (OOM) Wakes(r Require) Wakes {
	w := Wakes{
		Units: []string{"kubelet.service"},
		// The line after the kernel has counted the kill; "oom-kill:" comes before.
		KernelLog: []string{"Killed process "},
		Processes: []string{"kubelet", "kube-proxy"},
		// A daemon sets its own score a moment after it starts.
		Again: 5 * time.Second,
	}
	for _, slice := range append(kubepodsNames(""), systemSlice) {
		w.WithoutKernelLog = append(w.WithoutKernelLog, followed(cgroupRoot+slice+"/memory.events")...)
	}
	for _, d := range scoredDaemons() {
		w.Units = append(w.Units, d.units...)
		w.Processes = append(w.Processes, d.comm)
	}
	for _, o := range r.OOMScores {
		w.Units = append(w.Units, o.Unit)
	}
	return w
}

// Validate implements [Probe].
func (p OOM) Validate() error { return positive("window", p.Window) }

// Rules implements [Probe].
func (OOM) Rules() []finding.Rule {
	const starting = "a daemon that starts sets its own score after a moment"
	return []finding.Rule{
		{
			Reason: "OOMScoreDrift", Severity: finding.Warning,
			Means:      "A process has another oom_score_adj than it should: the config says so, or the daemon or its unit sets one for itself, or the kubelet's formula gives a container another. When memory runs out the kernel kills the wrong process.",
			Do:         "Restart the unit; when that does not help, set OOMScoreAdjust= in a drop-in of it. For a container restart the pod.",
			HoldBefore: time.Minute, HoldWhy: starting,
		},
		{
			Reason: "ProtectedProcessFirst", Severity: finding.Critical,
			Means:      "By the kernel's own reckoning a daemon that keeps the node alive would be killed before any Burstable or BestEffort pod.",
			Do:         "Give the daemon its oom_score_adj back (see OOMScoreDrift). If it has it, it uses so much memory that the score does not help: restart it.",
			HoldBefore: time.Minute, HoldWhy: starting,
		},
		{
			Reason: "SystemOOMKill", Severity: finding.Warning, NeverReady: true,
			Means: "Within the window (10 minutes by default) the kernel killed a process because the node, all pods together or a service of the host was out of memory.",
			Do:    "Reserve more memory for the host (systemReserved, kubeReserved, evictionHard), or raise MemoryMax= of the unit named. What was killed may need a restart.",
		},
		{
			Reason: "ContainerOOMKills", Severity: finding.Info, NeverReady: true,
			Means: "Within the window (10 minutes by default) the kernel killed a process in a container at the container's or its pod's own memory limit. The node is well.",
			Do:    "Raise the container's memory limit, or find its leak.",
		},
	}
}

// scoredDaemon is a host daemon with the score it should have.
type scoredDaemon struct {
	// name is what people call it; units it may run as; comm is the process's
	// name, for hosts without systemd.
	name  string
	units []string
	comm  string
	// score is what it should have when neither config nor unit says so.
	score int
	// self: the daemon writes the score itself when it starts, over whatever
	// its unit says.
	self bool
	// source says who sets it.
	source string
}

// scoredDaemons is the table of expected scores. The kubelet and kube-proxy,
// which have no unit of a certain name, are dealt with apart.
func scoredDaemons() []scoredDaemon {
	return []scoredDaemon{
		{"containerd", []string{"containerd.service"}, "containerd", -999, false, "containerd's packages set it in the unit"},
		{"crio", []string{"crio.service"}, "crio", -999, false, "CRI-O's packages set it in the unit"},
		{"docker", []string{"docker.service"}, "dockerd", -500, false, "Docker's packages set it in the unit"},
		{"sshd", []string{"ssh.service", "sshd.service"}, "sshd", -1000, true, "sshd sets it itself"},
		// 0: a dead time daemon is restarted and nothing is lost meanwhile.
		{"chronyd", []string{"chrony.service", "chronyd.service"}, "chronyd", 0, false, "chronyd's packages leave it alone"},
		{"iscsid", []string{"iscsid.service"}, "iscsid", -1000, true, "iscsid sets it itself"},
		{"multipathd", []string{"multipathd.service"}, "multipathd", -1000, true, "multipathd sets it itself"},
	}
}

const (
	// KubeletOOMScoreAdj and KubeProxyOOMScoreAdj of kubernetes
	// pkg/kubelet/qos/policy.go; both write it themselves.
	kubeProxyScore = -999
	// unkillable is OOM_SCORE_ADJ_MIN.
	unkillable = -1000
)

// Check implements [Probe].
func (p OOM) Check(ctx context.Context, in Input) (finding.Result, error) {
	c := oomCheck{OOM: p, ctx: ctx, in: in}
	c.run()
	return c.r, errors.Join(c.errs...)
}

// oomCheck is one pass.
type oomCheck struct {
	OOM
	ctx  context.Context
	in   Input
	r    finding.Result
	errs []error

	tree     cgroupTree
	procs    []host.Process
	kubepods string
	daemons  []daemon
	boxes    []container
	// kills is the kernel's count since boot; a process of a group that is
	// killed as a whole may count twice.
	kills int64

	pods       podNames
	podsErr    error
	podsAt     time.Time
	podsLoaded bool
}

func (c *oomCheck) failed(err error) {
	if err != nil {
		c.errs = append(c.errs, err)
	}
}

// daemon is a running process with the score it should have.
type daemon struct {
	// subject is the unit, or the name of what has none.
	subject, name string
	unit          bool
	pid           int
	expected      int
	why           string
	// atMost: less is well too.
	atMost bool
	live   int
}

func (c *oomCheck) run() {
	var err error
	if c.procs, err = c.in.Host.Processes(c.ctx); err != nil {
		c.failed(fmt.Errorf("process table: %w", err))
		return
	}
	if c.tree, err = openCgroups(c.ctx, c.in.Host); err != nil {
		c.failed(fmt.Errorf("control groups: %w", err))
		return
	}
	k, hasKubelet, err := findKubelet(c.ctx, c.in)
	c.failed(err)
	config := c.kubeletConfig(k, hasKubelet)
	if hasKubelet {
		if c.kubepods, err = c.tree.findKubepods(c.ctx, config, func() string { return podProcessCgroup(c.ctx, c.in.Host, c.procs) }); err != nil {
			c.failed(fmt.Errorf("control group of the pods: %w", err))
		}
	}
	c.findDaemons(k, hasKubelet, config)
	c.checkDaemons()
	for _, d := range c.daemons {
		c.r.Follow = append(c.r.Follow, procFile(d.pid, "oom_score_adj"))
	}
	summary := []string{c.scoresSummary()}
	if c.kubepods != "" {
		c.boxes = c.findContainers()
		if s := c.checkContainers(); s != "" {
			summary = append(summary, s)
		}
		if s := c.checkOrder(); s != "" {
			summary = append(summary, s)
		}
	}
	c.checkKills()
	summary = append(summary, fmt.Sprintf("OOM kills since boot: %d", c.kills))
	c.r.Summary = strings.Join(summary, "; ")
}

// kubeletConfig is what the running kubelet was told, as far as it can be seen;
// its files are good enough here, for hardly anybody sets its score.
func (c *oomCheck) kubeletConfig(k Kubelet, ok bool) KubeletConfig {
	config := KubeletConfig{CgroupsPerQOS: true, OOMScoreAdj: -999, Source: "the kubelet's default"}
	if !ok {
		return config
	}
	if read, err := k.configOnRestart(c.ctx, c.in); err == nil {
		return read
	}
	if live, err := k.runningConfig(c.ctx, c.in, 0); err == nil {
		return live
	}
	// That it can not be read is the pids probe's to say.
	return config
}

// findDaemons lists the running daemons with their expected scores: the config
// first, then what the daemon writes itself or its unit sets, then the table.
func (c *oomCheck) findDaemons(k Kubelet, hasKubelet bool, config KubeletConfig) {
	seen := map[int]bool{}
	add := func(d daemon) {
		if d.pid > 0 && !seen[d.pid] {
			seen[d.pid] = true
			c.daemons = append(c.daemons, d)
		}
	}
	table := scoredDaemons()
	var names []string
	for _, o := range c.in.Require.OOMScores {
		names = append(names, o.Unit)
	}
	for _, d := range table {
		names = append(names, d.units...)
	}
	units, err := c.in.Host.Units(c.ctx, names...)
	switch {
	case errors.Is(err, host.ErrNoSystemd):
		for _, o := range c.in.Require.OOMScores {
			c.failed(fmt.Errorf("require.oomScores: %s: %w", o.Unit, err))
		}
	case err != nil:
		c.failed(fmt.Errorf("units: %w", err))
	}
	if err != nil {
		for _, d := range table {
			add(daemon{subject: d.name, name: d.name, pid: c.named(d.comm), expected: d.score, why: d.source})
		}
	}
	for i, u := range units {
		// A unit that is being restarted has no score to speak of.
		if u.Job || !u.Running() || u.MainPID <= 0 {
			continue
		}
		n := daemon{subject: u.Name, unit: true, pid: u.MainPID, name: strings.TrimSuffix(u.Name, path.Ext(u.Name))}
		if i < len(c.in.Require.OOMScores) {
			n.expected, n.why = c.in.Require.OOMScores[i].Score, "require.oomScores"
			add(n)
			continue
		}
		d := table[slices.IndexFunc(table, func(d scoredDaemon) bool { return slices.Contains(d.units, names[i]) })]
		n.name, n.expected, n.why = d.name, d.score, d.source
		if u.OOMScoreAdjust != 0 && !d.self {
			n.expected, n.why = u.OOMScoreAdjust, "OOMScoreAdjust= of its unit"
		}
		add(n)
	}
	if hasKubelet {
		why := "the kubelet sets it itself"
		if config.OOMScoreAdj != -999 {
			why = "oomScoreAdj in " + config.Source
		}
		add(daemon{subject: "kubelet", name: "the kubelet", pid: k.PID, expected: int(config.OOMScoreAdj), why: why})
	}
	if pid, inPod := c.kubeProxy(); pid > 0 {
		d := daemon{subject: "kube-proxy", name: "kube-proxy", pid: pid, expected: kubeProxyScore, why: "kube-proxy sets it itself"}
		if inPod {
			// Not allowed to lower its score, it keeps that of its pod.
			d.expected, d.atMost, d.why = guaranteedScore, true, "the score of a node-critical pod, or what kube-proxy sets itself"
		}
		add(d)
	}
}

// named finds a daemon by its name where no unit tells its main process: root's,
// outside of containers, and of several the best protected one. Workers and
// sessions have the main process's name and no protection: a second iscsid and
// every sshd session run at 0.
func (c *oomCheck) named(comm string) int {
	best, bestScore := 0, 0
	procs, err := processesNamed(c.ctx, c.in.Host, func(name string) bool { return name == comm }, false)
	c.failed(err)
	for _, p := range procs {
		if p.Kernel || p.State == 'Z' {
			continue
		}
		if st, err := c.in.Host.Stat(c.ctx, "/proc/"+strconv.Itoa(p.PID)); err != nil || st.UID != 0 {
			continue
		}
		data, err := c.in.Host.ReadFile(c.ctx, procFile(p.PID, "cgroup"))
		if group := parseProcCgroup(data); err == nil && (group.pod().UID != "" || containerID(path.Base(group.path)) != "") {
			continue
		}
		score, ok, err := c.readScore(p.PID, "oom_score_adj")
		c.failed(err)
		if err == nil && ok && (best == 0 || score < bestScore) {
			best, bestScore = p.PID, score
		}
	}
	return best
}

// kubeProxy finds the node's kube-proxy, a service of the host or, mostly, a pod
// in the host's network. Any pod may call a process so; that far only those do
// that own the network anyway.
func (c *oomCheck) kubeProxy() (pid int, inPod bool) {
	var first host.Process
	procs, err := processesNamed(c.ctx, c.in.Host, func(comm string) bool { return comm == "kube-proxy" }, false)
	c.failed(err)
	for _, p := range procs {
		if p.Kernel || p.State == 'Z' || first.PID != 0 && p.StartTicks >= first.StartTicks {
			continue
		}
		if st, err := c.in.Host.Stat(c.ctx, "/proc/"+strconv.Itoa(p.PID)); err != nil || st.UID != 0 {
			continue
		}
		if !sharesWithInit(c.ctx, c.in.Host, p.PID, "net") {
			continue
		}
		data, err := c.in.Host.ReadFile(c.ctx, procFile(p.PID, "cgroup"))
		if err != nil {
			continue
		}
		first, inPod = p, parseProcCgroup(data).pod().UID != ""
	}
	return first.PID, inPod
}

// readScore reads oom_score_adj or oom_score; ok is false for a process that
// has ended.
func (c *oomCheck) readScore(pid int, name string) (n int, ok bool, err error) {
	file := procFile(pid, name)
	data, err := c.in.Host.ReadFile(c.ctx, file)
	if err != nil {
		return 0, false, unlessGone(err)
	}
	n, err = strconv.Atoi(string(bytes.TrimSpace(data)))
	if err != nil {
		return 0, false, fmt.Errorf("%s: %.20q is no score", file, data)
	}
	return n, true, nil
}

func (c *oomCheck) checkDaemons() {
	running := c.daemons[:0]
	for _, d := range c.daemons {
		live, ok, err := c.readScore(d.pid, "oom_score_adj")
		c.failed(err)
		if err != nil || !ok {
			continue
		}
		d.live = live
		running = append(running, d)
		if live == d.expected || d.atMost && live < d.expected {
			continue
		}
		result := "it is more likely to be killed than it should be when memory runs out"
		switch {
		case live < d.expected:
			result = "it is spared when memory runs out and something else is killed in its place"
		case live >= 0 && d.expected < 0:
			result = "when memory runs out it can be killed before pods"
		}
		f := finding.Finding{
			Reason: "OOMScoreDrift", Severity: finding.Warning, Subject: d.subject,
			Message:  fmt.Sprintf("%s runs with oom_score_adj %d, expected %d (%s): %s", d.name, live, d.expected, d.why, result),
			Evidence: []finding.Evidence{{Source: procFile(d.pid, "oom_score_adj"), Observed: strconv.Itoa(live), Expected: fmt.Sprintf("%d: %s", d.expected, d.why)}},
		}
		if d.unit {
			f.Remedy = &finding.Remedy{Action: "set-oom-score", Subject: d.subject}
		}
		c.r.Add(f)
	}
	c.daemons = running
}

func (c *oomCheck) scoresSummary() string {
	var list []string
	for _, d := range c.daemons {
		list = append(list, fmt.Sprintf("%s %d", strings.TrimPrefix(d.name, "the "), d.live))
	}
	if len(list) == 0 {
		return "none of the daemons with an expected score runs here"
	}
	return "oom_score_adj: " + strings.Join(list, ", ")
}

// container is a running container of a pod.
type container struct {
	podCgroup
	path string
	// main is the process in it that was started first, 0 without any; start
	// is its starttime, 0 when it is not in the process table.
	main  int
	start uint64
}

// maxContainers is more than any node runs: a pod that makes control groups of
// its own must not make the agent walk them all.
const maxContainers = 20000

// keptPod is a pod's control group as it was when it was listed. While it has as
// many groups in it as then, and in each of them the first process lives, they
// are the same: a container that was started again has another process. That a
// process was moved by hand is seen when the pod is listed again.
type keptPod struct {
	inode, links uint64
	boxes        []container
	until        time.Time
}

// podsKept is where they are remembered.
const podsKept = "control groups of pods"

// findContainers walks the pods' control groups: classes, pods, containers.
func (c *oomCheck) findContainers() []container {
	kept, _ := Kept[map[string]keptPod](c.in.Memory, podsKept)
	next := make(map[string]keptPod, len(kept))
	var found []container
	add := func(pod string) {
		if len(found) >= maxContainers {
			return
		}
		p, ok := kept[pod]
		st, err := c.in.Host.Stat(c.ctx, c.groupDir(pod))
		if !ok || err != nil || st.Inode != p.inode || st.Links != p.links || !c.in.Now.Before(p.until) || p.until.Sub(c.in.Now) > 2*settledFor || !c.allLive(p.boxes) {
			var names int
			p = keptPod{inode: st.Inode, links: st.Links}
			p.boxes, names = c.containersIn(pod)
			// Only a list that agrees with the count tells later that nothing came.
			if err != nil || uint64(names) != p.links-2 || !c.allLive(p.boxes) {
				found = append(found, p.boxes...)
				return
			}
			p.until = c.in.Now.Add(settledFor + time.Duration(p.inode*2654435769%uint64(settledFor)))
		}
		next[pod] = p
		found = append(found, p.boxes...)
	}
	for _, name := range c.children(c.kubepods) {
		group := c.kubepods + "/" + name
		if _, ok := kept[group]; ok || parsePodCgroup(group).UID != "" { // Guaranteed pods have no class above them
			add(group)
			continue
		}
		for _, pod := range c.children(group) {
			pod := group + "/" + pod
			if _, ok := kept[pod]; ok || parsePodCgroup(pod).UID != "" {
				add(pod)
			}
		}
	}
	c.in.Memory.Keep(podsKept, next)
	return found[:min(len(found), maxContainers)]
}

// containersIn lists a pod's containers, and tells how many groups it has.
func (c *oomCheck) containersIn(pod string) (boxes []container, groups int) {
	names := c.children(pod)
	boxes = make([]container, 0, len(names))
	for _, name := range names[:min(len(names), maxContainers)] {
		box := container{path: pod + "/" + name}
		if box.podCgroup = parsePodCgroup(box.path); box.Container == "" {
			continue
		}
		if pids := c.processesIn(box.path, 3); len(pids) > 0 {
			box.main = slices.MinFunc(pids, func(a, b int) int { return cmp.Compare(c.startOf(a), c.startOf(b)) })
			box.start = c.startOf(box.main)
		}
		boxes = append(boxes, box)
	}
	return boxes, len(names)
}

// allLive reports whether the main process of each container still is.
func (c *oomCheck) allLive(boxes []container) bool {
	return !slices.ContainsFunc(boxes, func(b container) bool { return b.start == 0 || c.startOf(b.main) != b.start })
}

// startOf is the starttime of a process, 0 of one that is not in the table.
func (c *oomCheck) startOf(pid int) uint64 {
	i, ok := slices.BinarySearchFunc(c.procs, pid, func(p host.Process, pid int) int { return cmp.Compare(p.PID, pid) })
	if !ok {
		return 0
	}
	return c.procs[i].StartTicks
}

// groupDir is the directory of a control group.
func (c *oomCheck) groupDir(group string) string {
	return path.Dir(c.tree.file(group, "memory.events"))
}

// children lists the control groups in one; with both versions attributes have
// a controller's name and a dot in front.
func (c *oomCheck) children(group string) []string {
	names, err := c.in.Host.ReadDir(c.ctx, c.groupDir(group))
	if err != nil {
		if !isGone(err) {
			c.failed(err)
		}
		return nil
	}
	return slices.DeleteFunc(names, func(name string) bool {
		switch path.Ext(name) {
		case ".slice", ".scope", ".service":
			return false
		case "":
			return name == "tasks" || name == "notify_on_release" || name == "release_agent"
		}
		return true
	})
}

// processesIn lists the processes of a container, also where it keeps them in
// control groups of its own, as an init system in a container does.
func (c *oomCheck) processesIn(group string, depth int) []int {
	file := c.groupDir(group) + "/cgroup.procs"
	data, err := c.in.Host.ReadFile(c.ctx, file)
	if err != nil && !isGone(err) && !errors.Is(err, syscall.ENOTSUP) { // a threaded group
		c.failed(err)
		return nil
	}
	pids := parsePIDs(data)
	if len(pids) > 0 || depth == 0 {
		return pids
	}
	for _, name := range c.children(group) {
		pids = append(pids, c.processesIn(path.Join(group, name), depth-1)...)
	}
	return pids
}

// parsePIDs parses cgroup.procs; 0 stands for a process of another namespace.
func parsePIDs(data []byte) []int {
	var pids []int
	for len(data) > 0 {
		var line []byte
		line, data, _ = bytes.Cut(data, []byte("\n"))
		if n, err := strconv.Atoi(string(line)); err == nil && n > 0 {
			pids = append(pids, n)
		}
	}
	return pids
}

// checkContainers compares the main process of every container with what the
// kubelet's formula gives it.
func (c *oomCheck) checkContainers() (summary string) {
	if len(c.boxes) == 0 {
		return ""
	}
	c.loadPods(podsSettledAge)
	if c.podsErr != nil {
		if errors.Is(c.podsErr, host.ErrNotConfigured) {
			return "pods' scores not compared: only the kubelet's /pods tells what they request"
		}
		return fmt.Sprintf("pods' scores not compared: the kubelet did not answer /pods: %v", c.podsErr)
	}
	capacity, err := c.memoryCapacity()
	if err != nil {
		c.failed(err)
		return ""
	}
	compared, fitting := 0, 0
	kept, _ := Kept[map[string]keptPod](c.in.Memory, podsKept)
	for _, box := range c.boxes {
		who, ok := c.pods.container(box.podCgroup)
		pid := box.main
		if !ok || pid == 0 {
			continue
		}
		live, ok, err := c.readScore(pid, "oom_score_adj")
		c.failed(err)
		if err != nil || !ok || live == sandboxScore {
			continue
		}
		want, err := who.pod.score(*who.spec, who.init, box.QOS, capacity)
		if err != nil {
			c.failed(fmt.Errorf("pod %s: %w", who, err))
			continue
		}
		compared++
		// After a resize in place the score stays what it was at the start.
		resized := who.pod.Metadata.Generation > 1 && box.QOS == qosBurstable
		if resized || scoreFits(live, want.Scores) {
			fitting++
			continue
		}
		delete(kept, path.Dir(box.path)) // what is wrong is looked at in every pass
		c.r.Add(finding.Finding{
			Reason: "OOMScoreDrift", Severity: finding.Warning, Subject: who.String(),
			Message: fmt.Sprintf("container %s runs with oom_score_adj %d, expected %d (%s): the kernel's kill order is not the one the kubelet means", who, live, want.Scores[0], want.Why),
			Evidence: []finding.Evidence{
				{Source: procFile(pid, "oom_score_adj"), Observed: strconv.Itoa(live), Expected: fmt.Sprintf("%d = %s", want.Scores[0], want.Why)},
				{Source: "control group", Observed: box.path},
			},
		})
	}
	return fmt.Sprintf("%d of %d containers compared have the kubelet's scores", fitting, compared)
}

// scoreFits leaves a Burstable container some play: a memory balloon changes
// what the formula divides by, and the score is that of the container's start.
func scoreFits(live int, want []int) bool {
	return slices.ContainsFunc(want, func(n int) bool {
		if n <= 0 || n == bestEffortScore {
			return live == n
		}
		play := max(2, (1000-n)/10)
		return live >= max(1000+guaranteedScore, n-play) && live <= min(bestEffortScore-1, n+play)
	})
}

// The kubelet's pods are remembered, for the list of a full node is megabytes, and
// a container's score does not change while it runs.
const (
	// podsAge is for a node on which containers come and go; those started since
	// are compared then.
	podsAge = 5 * time.Minute
	// podsSettledAge is for one on which the same run as when the kubelet was last
	// asked and the time before: the list can say nothing new of them.
	podsSettledAge = time.Hour
)

type rememberedPods struct {
	names podNames
	err   error
	at    time.Time
	// running is a sum of the containers that ran, settled when it was the same the
	// time before.
	running uint64
	settled bool
	seed    maphash.Seed
}

// loadPods asks the kubelet for its pods unless what it last said is younger than
// podsAge, or than settled on a node whose containers are the same.
func (c *oomCheck) loadPods(settled time.Duration) {
	if c.podsLoaded && (c.podsErr != nil || !elapsed(c.in.Now, c.podsAt, settled)) {
		return
	}
	c.podsLoaded = true
	old, ok := Kept[rememberedPods](c.in.Memory, "kubelet pods")
	if !ok {
		old.seed = maphash.MakeSeed()
	}
	var running uint64
	for _, box := range c.boxes { // in any order
		running += maphash.String(old.seed, box.path)
	}
	same := ok && old.err == nil && old.running == running
	age := podsAge
	if same && old.settled {
		age = settled
	}
	if ok && old.err == nil && !elapsed(c.in.Now, old.at, age) {
		c.pods, c.podsAt = old.names, old.at
		return
	}
	pods, err := readKubeletPods(c.ctx, c.in.Host)
	c.pods, c.podsErr, c.podsAt = indexPods(pods), err, c.in.Now
	c.in.Memory.Keep("kubelet pods", rememberedPods{c.pods, err, c.podsAt, running, same && err == nil, old.seed})
}

// memoryCapacity is MemTotal in bytes, which the kubelet divides by (machine.go
// of cAdvisor).
func (c *oomCheck) memoryCapacity() (int64, error) {
	data, err := c.in.Host.ReadFile(c.ctx, "/proc/meminfo")
	if err != nil {
		return 0, err
	}
	return parseMemTotal(data)
}

func parseMemTotal(data []byte) (int64, error) {
	for line := range strings.Lines(string(data)) {
		rest, ok := strings.CutPrefix(line, "MemTotal:")
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
		if err != nil || n <= 0 || n > 1<<50 {
			break
		}
		return n << 10, nil
	}
	return 0, errors.New("/proc/meminfo: no MemTotal")
}

// ranked is a process in the kernel's kill order.
type ranked struct {
	who   string
	pid   int
	score int
}

// checkOrder computes whom the kernel would kill first: the process with the
// highest oom_score (oom_badness of mm/oom_kill.c: memory use and
// oom_score_adj). Only the protected daemons and the pods' processes matter, and
// of the pods' only as many as it takes to find one that stands before the
// daemons, so that a healthy node costs a handful of reads.
func (c *oomCheck) checkOrder() (summary string) {
	var protected []ranked
	subjects := map[int]daemon{}
	for _, d := range c.daemons {
		if d.expected >= 0 || d.live == unkillable {
			continue
		}
		score, ok, err := c.readScore(d.pid, "oom_score")
		c.failed(err)
		if err == nil && ok && score > 0 {
			protected = append(protected, ranked{d.name, d.pid, score})
			subjects[d.pid] = d
		}
	}
	slices.SortFunc(protected, func(a, b ranked) int { return cmp.Or(b.score-a.score, cmp.Compare(a.who, b.who)) })
	top := ranked{score: -1}
	for _, box := range c.boxes {
		if box.QOS == qosGuaranteed {
			continue
		}
		for _, pid := range c.processesIn(box.path, 3) {
			score, ok, err := c.readScore(pid, "oom_score")
			c.failed(err)
			if err == nil && ok && score > top.score {
				top = ranked{c.pods.name(box.podCgroup), pid, score}
			}
			if len(protected) == 0 || top.score >= protected[0].score {
				return "in the kernel's kill order pods come before every protected daemon"
			}
		}
	}
	if top.pid == 0 || len(protected) == 0 {
		return ""
	}
	// Pods of Burstable or BestEffort class may be node-critical, with the
	// score of Guaranteed ones: where all are, nothing could come first.
	adj, ok, err := c.readScore(top.pid, "oom_score_adj")
	c.failed(err)
	if err != nil || !ok || adj <= 0 {
		return ""
	}
	var order []string
	for _, p := range protected {
		if p.score > top.score {
			order = append(order, fmt.Sprintf("%s %d", p.who, p.score))
		}
	}
	order = append(order, fmt.Sprintf("%s %d", top.who, top.score))
	for _, p := range protected {
		if p.score <= top.score {
			break
		}
		d := subjects[p.pid]
		c.r.Add(finding.Finding{
			Reason: "ProtectedProcessFirst", Severity: finding.Critical, Subject: d.subject,
			Message: fmt.Sprintf("when memory runs out the kernel would kill %s before any Burstable or BestEffort pod", d.name),
			Evidence: []finding.Evidence{
				{Source: procFile(p.pid, "oom_score"), Observed: strconv.Itoa(p.score), Expected: fmt.Sprintf("at most %d, the highest of a pod's processes (%s, PID %d)", top.score, top.who, top.pid)},
				{Source: "kill order by oom_score", Observed: strings.Join(order, ", then ")},
			},
		})
	}
	return ""
}
