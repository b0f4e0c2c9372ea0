package probes

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// PIDs checks that the host keeps enough process IDs for itself: every thread
// takes one, and when pods have them all, nobody can even log in to stop them.
type PIDs struct {
	Common
	// WarnAt and CriticalAt are shares of a limit in use.
	WarnAt     Percent `json:"warnAt,omitempty"`
	CriticalAt Percent `json:"criticalAt,omitempty"`
	// MinReserved is how many PIDs must be kept from pods; 0 leaves it to the
	// agent, which goes by what runs on the host.
	MinReserved int64 `json:"minReserved,omitempty"`
}

// DefaultPIDs returns the default settings.
func DefaultPIDs() PIDs { return PIDs{WarnAt: 80, CriticalAt: 95} }

// Name implements [Probe].
func (PIDs) Name() string { return "pids" }

// Condition implements [Probe].
func (PIDs) Condition() string { return ConditionPrefix + "PIDProblem" }

// Wakes implements [Probe]. The groups and limits that are watched are known
// after a look.
func (PIDs) Wakes(Require) Wakes {
	return Wakes{
		Units:     []string{"kubelet.service", "containerd.service", "crio.service", "docker.service"},
		KernelLog: []string{"fork rejected by pids controller"},
		Processes: []string{"kubelet", "containerd", "crio", "dockerd"},
		// The kubelet writes its limits some seconds after it starts.
		Again: 10 * time.Second,
	}
}

// Validate implements [Probe].
func (p PIDs) Validate() error {
	var errs []error
	if p.WarnAt <= 0 {
		errs = append(errs, fieldErr("warnAt", "want more than 0%%, not %s", p.WarnAt))
	}
	if p.CriticalAt < p.WarnAt {
		errs = append(errs, fieldErr("criticalAt", "want at least warnAt (%s), not %s", p.WarnAt, p.CriticalAt))
	}
	if p.MinReserved < 0 {
		errs = append(errs, fieldErr("minReserved", "want 0 (the agent's own advice) or more, not %d", p.MinReserved))
	}
	return errors.Join(errs...)
}

// kubeletRestart is how long a kubelet may be away, or not have written its
// limits yet, when it restarts: 5 s on the slowest node seen, with room.
const kubeletRestart = 2 * time.Minute

// halfWritten is how long a setting has to be missing: what writes a file in place
// empties it first, and the probe is woken by that. Such a moment was told for as
// long as its recovery is held, two minutes.
const (
	halfWritten    = 10 * time.Second
	writtenInPlace = "a file that is written in place is half there for a moment"
)

// Rules implements [Probe].
func (PIDs) Rules() []finding.Rule {
	return []finding.Rule{
		{
			Reason: "PIDsNearLimit", Severity: finding.Warning, Also: []finding.Severity{finding.Critical},
			Means:     "So many threads run that a limit is near: the node's own (the smaller of kernel.pid_max and kernel.threads-max), the one of all pods together, or that of a unit. At the limit nothing new starts, health checks and logins included.",
			Do:        "See in the evidence who has the most threads. Stop what leaks them; raise kernel.pid_max, kernel.threads-max or the unit's TasksMax= if the load is meant to be.",
			HoldClear: 2 * time.Minute, HoldWhy: "a count that swings around the threshold is one problem, and a limit is hit in seconds, so nothing is held back before",
		},
		{
			Reason: "NoPIDReservation", Severity: finding.Warning,
			Means: "Pods may take every process ID of the node: the kubelet reserves none for the host, or does not enforce it. One pod that forks without end stops sshd, the kubelet and the container runtime from working.",
			Do:    "Set systemReserved and kubeReserved with a pid entry in the kubelet's configuration, leave \"pods\" in enforceNodeAllocatable, and restart the kubelet. The evidence has a number.",
			// A restarting kubelet is out of sight for some seconds.
			HoldBefore: halfWritten, HoldClear: kubeletRestart, HoldWhy: writtenInPlace + "; while the kubelet restarts its configuration can not be judged",
		},
		{
			Reason: "PIDReservationTooSmall", Severity: finding.Warning,
			Means:      "What is kept from pods is less than the host and the container runtime use, or will when the node is full of pods: shims run outside the limit of pods.",
			Do:         "Raise the pid entries of systemReserved and kubeReserved to the number in the evidence and restart the kubelet, or set probes.pids.minReserved to what you know to be enough.",
			HoldBefore: 10 * time.Minute, HoldClear: 10 * time.Minute,
			HoldWhy: "a package upgrade or a burst of logins counts as host load for some minutes",
		},
		{
			Reason: "PIDLimitStale", Severity: finding.Warning,
			Means:      "The limit of all pods is not what the kubelet would set if it started now: it reads pid_max, threads-max and its own configuration only when it starts, and one of them has changed since.",
			Do:         "Restart the kubelet (running pods stay).",
			HoldBefore: kubeletRestart, HoldWhy: "a kubelet that starts writes the limit after some seconds",
		},
		{
			Reason: "PodPIDsUnlimited", Severity: finding.Info,
			Means:     "A pod has no limit of its own (podPidsLimit), so that one pod can take the process IDs of all others.",
			Do:        "Set podPidsLimit in the kubelet's configuration, for example 1024, and restart the kubelet; it holds for pods created from then on.",
			HoldClear: kubeletRestart, HoldWhy: "while the kubelet restarts its configuration can not be judged",
		},
		{
			Reason: "ForkFailures", Severity: finding.Warning, Also: []finding.Severity{finding.Info},
			Means: "Within the last ten minutes the kernel refused a new process or thread because a control group was at its pids limit. Information only when it was the limit of a single pod.",
			Do:    "Raise TasksMax= of the unit named, or find what forks too much in it. For the limit of all pods see PIDsNearLimit.",
		},
		{
			Reason: "InotifyNearLimit", Severity: finding.Info,
			Means: "The kubelet and the container runtime alone use most of root's inotify watches or instances. When they run out, following logs and noticing changed files fails with \"no space left on device\" or \"too many open files\". Other processes of root count too and are not looked at, so this is the least that is used.",
			Do:    "Raise fs.inotify.max_user_watches or fs.inotify.max_user_instances.",
		},
	}
}

// Check implements [Probe].
func (p PIDs) Check(ctx context.Context, in Input) (finding.Result, error) {
	c := pidCheck{PIDs: p, ctx: ctx, in: in}
	c.run()
	return c.r, errors.Join(c.errs...)
}

// pidCheck is one pass.
type pidCheck struct {
	PIDs
	ctx  context.Context
	in   Input
	r    finding.Result
	errs []error

	tree  cgroupTree
	procs []host.Process
	// runtimes are the kubelet's and the container runtime's processes; current
	// is read when a limit is near.
	runtimes, current []host.Process
	// node is the capacity as the kubelet computes it, limitedBy the sysctl
	// that decides it, tasks the threads that exist.
	node, tasks int64
	limitedBy   string
}

func (c *pidCheck) failed(err error) {
	if err != nil {
		c.errs = append(c.errs, err)
	}
}

func (c *pidCheck) run() {
	var err error
	if c.procs, err = c.in.Host.Processes(c.ctx); err != nil {
		c.failed(fmt.Errorf("process table: %w", err))
	} else if c.runtimes, err = processesNamed(c.ctx, c.in.Host, func(comm string) bool { return isRuntime(comm) || kubeletProgram(comm) != "" }, false); err != nil {
		c.failed(fmt.Errorf("process table: %w", err))
	} else {
		c.runtimes = ofTheHost(c.ctx, c.in, c.runtimes)
	}
	nodeErr := c.readNode()
	c.failed(nodeErr)
	if nodeErr == nil {
		c.use(limitedScope{name: "node", what: "the node has", used: c.tasks, limit: c.node,
			usedIn: "/proc/loadavg", limitIn: "/proc/sys/kernel/" + c.limitedBy, alone: "nothing new can start, not even a login"})
	}
	if c.tree, err = openCgroups(c.ctx, c.in.Host); err != nil {
		c.failed(fmt.Errorf("control groups: %w", err))
		return
	}
	units := c.checkUnits()
	pods := c.checkPods(nodeErr == nil)
	c.checkForks(units, pods)
	c.checkInotify()
	c.follow(units, pods)

	parts := []string{}
	if nodeErr == nil {
		parts = append(parts, fmt.Sprintf("%d of %d threads in use (limit: kernel.%s)", c.tasks, c.node, c.limitedBy))
	}
	parts = append(parts, pods.summary)
	c.r.Summary = strings.Join(parts, "; ")
}

// readNode reads what the kubelet calls the PID capacity of the node
// (kubernetes pkg/kubelet/stats/pidlimit) and how much of it is in use.
func (c *pidCheck) readNode() error {
	c.node = noLimit
	for _, name := range []string{"pid_max", "threads-max"} {
		file := "/proc/sys/kernel/" + name
		data, err := c.in.Host.ReadFile(c.ctx, file)
		if err != nil {
			return err
		}
		n, err := parseLimit(data)
		if err != nil || n == 0 {
			return fmt.Errorf("%s: %.40q is no limit", file, data)
		}
		if n < c.node {
			c.node, c.limitedBy = n, name
		}
	}
	data, err := c.in.Host.ReadFile(c.ctx, "/proc/loadavg")
	if err != nil {
		return err
	}
	c.tasks, err = parseLoadavgTasks(data)
	return err
}

// parseLoadavgTasks returns how many threads exist: the number behind the slash
// in the fourth field of proc_loadavg(5). sysinfo(2) would cut it off at 65535.
func parseLoadavgTasks(data []byte) (int64, error) {
	fields := bytes.Fields(data)
	if len(fields) >= 4 {
		if _, all, ok := bytes.Cut(fields[3], []byte("/")); ok {
			if n, err := strconv.ParseInt(string(all), 10, 64); err == nil && n >= 0 {
				return n, nil
			}
		}
	}
	return 0, fmt.Errorf("/proc/loadavg: no RUNNING/ALL field in %.60q", data)
}

// limitedScope is something with a number of threads and a limit on it.
type limitedScope struct {
	// name is the label and the subject, what begins the sentence.
	name, what      string
	used, limit     int64
	usedIn, limitIn string
	// alone is what the limit, once reached, means.
	alone string
}

// use reports a scope's numbers and whether it is near its limit.
func (c *pidCheck) use(s limitedScope) {
	c.r.Sample("hosthygiene_pids", float64(s.used), "scope", s.name, "kind", "used")
	if s.limit == noLimit {
		return
	}
	c.r.Sample("hosthygiene_pids", float64(s.limit), "scope", s.name, "kind", "limit")
	severity, at := finding.Warning, c.WarnAt
	if float64(s.used) >= c.CriticalAt.Of(float64(s.limit)) {
		severity, at = finding.Critical, c.CriticalAt
	}
	if float64(s.used) < at.Of(float64(s.limit)) {
		return
	}
	f := finding.Finding{
		Reason: "PIDsNearLimit", Severity: severity, Subject: s.name,
		Message: fmt.Sprintf("%s %d threads of at most %d (%.0f%%): at the limit %s", s.what, s.used, s.limit, 100*float64(s.used)/float64(max(s.limit, 1)), s.alone),
		Evidence: []finding.Evidence{
			{Source: s.usedIn, Observed: fmt.Sprintf("%d threads", s.used), Expected: fmt.Sprintf("below %s of %d", at, s.limit)},
			{Source: s.limitIn, Observed: strconv.FormatInt(s.limit, 10)},
		},
	}
	if most := mostThreads(c.threadsNow()); most != "" {
		f.Evidence = append(f.Evidence, finding.Evidence{Source: "process table of the node", Observed: "most threads: " + most})
	}
	c.r.Add(f)
}

// threadsNow is the process table with the threads there are now: the one the
// probes share may count those of some minutes ago.
func (c *pidCheck) threadsNow() []host.Process {
	if c.current == nil {
		var err error
		if c.current, err = c.in.Host.ProcessesNow(c.ctx); err != nil {
			c.failed(fmt.Errorf("process table: %w", err))
			c.current = c.procs
		}
	}
	return c.current
}

// mostThreads names the three programs with the most threads on the node.
func mostThreads(procs []host.Process) string {
	type program struct {
		comm             string
		threads, running int
	}
	byComm := map[string]*program{}
	for _, p := range procs {
		if p.Kernel {
			continue
		}
		if byComm[p.Comm] == nil {
			byComm[p.Comm] = &program{comm: p.Comm}
		}
		byComm[p.Comm].threads += p.Threads
		byComm[p.Comm].running++
	}
	list := make([]*program, 0, len(byComm))
	for _, p := range byComm {
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b *program) int {
		return cmp.Or(b.threads-a.threads, cmp.Compare(a.comm, b.comm))
	})
	var out []string
	for _, p := range list[:min(3, len(list))] {
		out = append(out, fmt.Sprintf("%q %d in %d processes", p.comm, p.threads, p.running))
	}
	return strings.Join(out, ", ")
}

// isRuntime tells the daemons that start every container. The shims below them
// are theirs to count: they run in the same unit.
func isRuntime(comm string) bool {
	switch comm {
	case "containerd", "crio", "dockerd", "cri-dockerd":
		return true
	}
	return false
}

// checkUnits looks at the control groups of the kubelet and the container
// runtime and at the slices above them, and returns their paths. The processes
// lead there, whatever the units are called on this distribution; what counts is
// the pids.max of the running unit: systemd computes its TasksMax property anew
// when threads-max changes, the limit in force stays until the unit restarts.
func (c *pidCheck) checkUnits() []string {
	seen := map[string]bool{}
	var paths []string
	for _, p := range c.runtimes {
		if p.Kernel || p.State == 'Z' {
			continue
		}
		data, err := c.in.Host.ReadFile(c.ctx, procFile(p.PID, "cgroup"))
		if err != nil {
			if !isGone(err) {
				c.failed(err)
			}
			continue
		}
		name := path.Clean("/" + parseProcCgroup(data).pids)
		// A pod or a Docker container may hold a cluster of its own, and a
		// user may give any name to a process.
		if parsePodCgroup(name).UID != "" || containerID(path.Base(name)) != "" || strings.HasPrefix(name, "/user.slice/") {
			continue
		}
		for ; name != "/" && !seen[name]; name = path.Dir(name) {
			seen[name] = true
			paths = append(paths, name)
		}
	}
	slices.Sort(paths)
	for _, name := range paths {
		used, ok, err := c.tree.number(c.ctx, name, "pids.current")
		c.failed(err)
		if err != nil || !ok {
			continue
		}
		limit, ok, err := c.tree.number(c.ctx, name, "pids.max")
		c.failed(err)
		if err != nil || !ok {
			continue
		}
		unit := path.Base(name)
		if strings.HasSuffix(unit, ".slice") && limit == noLimit {
			continue // a slice is of interest only where somebody limits it
		}
		c.use(limitedScope{name: unit, what: unit + " has", used: used, limit: limit,
			usedIn: c.tree.file(name, "pids.current"), limitIn: c.tree.file(name, "pids.max"),
			alone: "it can not start a thread, and neither containers nor health checks start"})
	}
	return paths
}

// follow names what was read that somebody may write, and where the kernel tells
// of refused forks (cgroup v2).
func (c *pidCheck) follow(units []string, pods podsPIDs) {
	c.r.Follow = append(c.r.Follow, "/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max")
	groups := append(slices.Clone(units), systemSlice)
	if pods.path != "" {
		groups = append(groups, pods.path)
	}
	slices.Sort(groups)
	for _, name := range slices.Compact(groups) {
		c.r.Follow = append(c.r.Follow, c.tree.file(name, "pids.max"))
		if c.tree.unified {
			c.r.Follow = append(c.r.Follow, c.tree.file(name, "pids.events"))
		}
	}
	c.r.Follow = append(c.r.Follow, pods.configFiles...)
}

// podsPIDs is what checkPods found out about the pods' control group.
type podsPIDs struct {
	// path of kubepods; "" when there is none.
	path    string
	nearly  bool // it is at its limit or close to it
	summary string
	// configFiles are where the kubelet's configuration lies.
	configFiles []string
}

func (c *pidCheck) checkPods(capacityKnown bool) podsPIDs {
	k, ok, err := findKubelet(c.ctx, c.in)
	c.failed(err)
	if !ok {
		if err != nil {
			return podsPIDs{summary: "whether a kubelet runs here could not be seen"}
		}
		return podsPIDs{summary: "no kubelet runs here"}
	}
	restart, fileErr := k.configOnRestart(c.ctx, c.in)
	live, liveErr := k.runningConfig(c.ctx, c.in, 0)
	running := live
	switch {
	case fileErr != nil && liveErr != nil:
		c.failed(fileErr)
		if !errors.Is(liveErr, host.ErrNotConfigured) {
			c.failed(liveErr)
		}
		running = KubeletConfig{CgroupsPerQOS: true, MaxPods: 110}
	case fileErr != nil:
		restart = live
	case liveErr != nil:
		running = restart
	}
	known := fileErr == nil || liveErr == nil

	pods := podsPIDs{configFiles: k.configFiles(c.ctx, c.in.Host)}
	pods.path, err = c.tree.findKubepods(c.ctx, running, func() string { return podProcessCgroup(c.ctx, c.in.Host, c.procs) })
	if err != nil {
		c.failed(fmt.Errorf("control group of the pods: %w", err))
		pods.summary = "the pods' limit could not be read"
		return pods
	}
	if pods.path == "" {
		pods.summary = "the kubelet keeps no control group for all pods (cgroupsPerQOS is off)"
		if running.CgroupsPerQOS {
			c.failed(errors.New("the kubelet runs, but there is no control group kubepods: the limit of the pods could not be checked"))
			pods.summary = "the pods' limit could not be found"
		}
		return pods
	}
	used, _, err := c.tree.number(c.ctx, pods.path, "pids.current")
	limit, ok, err2 := c.tree.number(c.ctx, pods.path, "pids.max")
	if err = errors.Join(err, err2); err != nil || !ok {
		c.failed(err)
		pods.summary = "the pods' limit could not be read"
		return pods
	}
	limitFile := c.tree.file(pods.path, "pids.max")
	c.use(limitedScope{name: "kubepods", what: "all pods together have", used: used, limit: limit,
		usedIn: c.tree.file(pods.path, "pids.current"), limitIn: limitFile,
		alone: "no pod can start a thread and containers fail"})
	pods.nearly = limit != noLimit && float64(used) >= c.CriticalAt.Of(float64(limit))

	if known {
		if running.PodPIDsLimit <= 0 {
			c.r.Add(finding.Finding{Reason: "PodPIDsUnlimited", Severity: finding.Info, Subject: "kubelet",
				Message:  "the kubelet sets no limit of process IDs for a single pod: one pod can take those of all others",
				Evidence: []finding.Evidence{{Source: running.Source, Observed: fmt.Sprintf("podPidsLimit %d", running.PodPIDsLimit), Expected: "more than 0, for example 1024"}}})
		}
	}
	if !capacityKnown {
		pods.summary = "what is reserved for the host could not be checked"
		return pods
	}
	c.checkReservation(reservation{
		file: limitFile, limit: limit, used: used,
		known: known, restart: restart, running: running, both: fileErr == nil && liveErr == nil,
	}, &pods)
	if liveErr != nil && known && !errors.Is(liveErr, host.ErrNotConfigured) {
		pods.summary += " (read from its files: it did not answer /configz)"
	}
	return pods
}

// podProcessCgroup is the control group of some pod: that of a sandbox, for its
// process is called "pause" with every runtime.
func podProcessCgroup(ctx context.Context, v host.Files, procs []host.Process) string {
	for _, p := range procs {
		if p.Comm != "pause" {
			continue
		}
		if data, err := v.ReadFile(ctx, procFile(p.PID, "cgroup")); err == nil {
			if name := parseProcCgroup(data).pids; parsePodCgroup(name).UID != "" {
				return name
			}
		}
	}
	return ""
}

// reservation is what is known about the process IDs kept from pods.
type reservation struct {
	file        string
	limit, used int64
	// known: the kubelet's configuration could be read at all; both: from its
	// files and from itself.
	known, both      bool
	restart, running KubeletConfig
}

// podLimit is the pids.max the kubelet gives all pods together when it starts
// (getNodeAllocatableAbsolute of kubernetes pkg/kubelet/cm; the cgroup library
// writes 1 for 0). Eviction thresholds are not subtracted.
func podLimit(capacity int64, c KubeletConfig) int64 {
	if !c.EnforcePods {
		return capacity
	}
	return max(1, capacity-c.ReservedPIDs())
}

func (c *pidCheck) checkReservation(r reservation, pods *podsPIDs) {
	limitText := "max"
	if r.limit != noLimit {
		limitText = strconv.FormatInt(r.limit, 10)
	}
	reserved := max(0, c.node-r.limit)
	if r.known {
		reserved = c.node - podLimit(c.node, r.restart)
		if want := podLimit(c.node, r.restart); r.limit != want {
			ev := []finding.Evidence{
				{Source: r.file, Observed: limitText, Expected: strconv.FormatInt(want, 10)},
				{Source: "/proc/sys/kernel/" + c.limitedBy, Observed: strconv.FormatInt(c.node, 10)},
				{Source: r.restart.Source, Observed: reservedText(r.restart)},
			}
			if r.both {
				ev = append(ev, finding.Evidence{Source: r.running.Source, Observed: reservedText(r.running)})
			}
			c.r.Add(finding.Finding{Reason: "PIDLimitStale", Severity: finding.Warning, Subject: "kubepods",
				Message:  fmt.Sprintf("all pods together may have %s process IDs, but the kubelet would allow them %d if it started now: what it was computed from has changed since", limitText, want),
				Evidence: ev})
		}
	}
	c.r.Sample("hosthygiene_pids", float64(reserved), "scope", "node", "kind", "reserved")

	advice := c.advise(r.running.MaxPods, r.used)
	source, observed := r.file, fmt.Sprintf("%s of %d", limitText, c.node)
	if r.known {
		source, observed = r.restart.Source, reservedText(r.restart)
	}
	switch {
	case reserved == 0:
		message := "pods may take every process ID of the node: none is reserved for the host, and nobody can log in when they are gone"
		if r.known && r.restart.ReservedPIDs() > 0 {
			message = "pods may take every process ID of the node: the kubelet reserves some for the host but is told not to enforce it (enforceNodeAllocatable)"
		}
		c.r.Add(finding.Finding{Reason: "NoPIDReservation", Severity: finding.Warning, Subject: "kubepods", Message: message,
			Evidence: []finding.Evidence{
				{Source: r.file, Observed: limitText, Expected: fmt.Sprintf("at most %d, the node's capacity of %d less what is reserved", max(1, c.node-advice.number), c.node)},
				advice.evidence(),
			}})
		if r.known {
			f := &c.r.Findings[len(c.r.Findings)-1]
			f.Evidence = append(f.Evidence, finding.Evidence{Source: source, Observed: observed, Expected: fmt.Sprintf("at least %d reserved, and enforced for pods", advice.number)})
		}
		pods.summary = "nothing reserved for the host"
	case c.tooSmall(reserved, advice):
		c.r.Add(finding.Finding{Reason: "PIDReservationTooSmall", Severity: finding.Warning, Subject: "kubepods",
			Message: fmt.Sprintf("%d process IDs are kept from pods, %d should be: the host and the container runtime may run out before the pods do", reserved, advice.number),
			Evidence: []finding.Evidence{
				{Source: source, Observed: observed, Expected: fmt.Sprintf("at least %d", advice.number)},
				advice.evidence(),
			}})
		pods.summary = fmt.Sprintf("%d reserved for the host", reserved)
	default:
		pods.summary = fmt.Sprintf("%d reserved for the host, pods limited to %s", reserved, limitText)
	}
}

func reservedText(c KubeletConfig) string {
	text := fmt.Sprintf("systemReserved pid %d, kubeReserved pid %d", c.SystemReservedPIDs, c.KubeReservedPIDs)
	if !c.EnforcePods {
		text += ", not enforced for pods"
	}
	return text
}

// shimThreads is how many threads a container runtime's shim has per pod when
// the pod is running: 10 to 12 with containerd 1.7 and 2.x. Shims run outside
// the limit of pods, in the runtime's unit.
const shimThreads = 12

// leastReserved is the example of the Kubernetes documentation on PID limits,
// below which no advice goes.
const leastReserved = 1000

// pidAdvice is how many process IDs should be kept from pods, and why.
type pidAdvice struct {
	number int64
	// enough is what passes without complaint.
	enough int64
	why    string
}

func (a pidAdvice) evidence() finding.Evidence {
	return finding.Evidence{Source: "recommended reservation", Observed: fmt.Sprintf("%d = %s", a.number, a.why)}
}

// advise recommends a reservation: half as much again as the host itself runs
// now, and the shims of a node full of pods. Shims that exist are taken out of
// the first term so that they do not count twice; the number then does not
// depend on how many pods happen to run.
func (c *pidCheck) advise(maxPods, inPods int64) pidAdvice {
	if c.MinReserved > 0 {
		return pidAdvice{number: c.MinReserved, enough: c.MinReserved, why: "probes.pids.minReserved"}
	}
	var shims int64
	for _, p := range c.shims() {
		shims += int64(p.Threads)
	}
	maxPods = min(max(maxPods, 0), 1<<20)
	own := max(0, c.tasks-inPods-shims)
	need := func(factor float64) int64 {
		return max(leastReserved, int64(math.Ceil(factor*float64(own)))+shimThreads*maxPods)
	}
	return pidAdvice{
		number: need(1.5), enough: need(1.25),
		why: fmt.Sprintf("1.5 x %d threads of the host + %d x %d pods (maxPods), at least %d", own, shimThreads, maxPods, leastReserved),
	}
}

// shims are the processes that go by the name of a runtime's shim, and have
// none above them: a pod's process may take that name, and is a child of a real
// one.
func (c *pidCheck) shims() []host.Process {
	// 15 bytes of "containerd-shim-runc-v2" and of "conmon".
	named := func(p host.Process) bool {
		return strings.HasPrefix(p.Comm, "containerd-shim") || p.Comm == "conmon" || p.Comm == "conmonrs"
	}
	var shims []host.Process
	for _, p := range c.procs {
		if !named(p) {
			continue
		}
		below := false
		// No shim is that deep, and a table that was read while processes ended
		// may hold a circle.
		for at, steps := p, 0; at.PPID > 1 && !below; steps++ {
			if below = steps > 256; below {
				break
			}
			i, ok := slices.BinarySearchFunc(c.procs, at.PPID, func(p host.Process, pid int) int { return cmp.Compare(p.PID, pid) })
			if !ok {
				break
			}
			at = c.procs[i]
			below = named(at)
		}
		if !below {
			shims = append(shims, p)
		}
	}
	return shims
}

// tooSmall has some play: the host's threads come and go, so a reservation is
// found too small below 1.25 times of them and large enough again only from the
// recommended 1.5 times on.
func (c *pidCheck) tooSmall(reserved int64, a pidAdvice) bool {
	const key = "reservation too small"
	told := c.in.Memory.Best(key, 0) > 0
	small := reserved < a.enough || told && reserved < a.number
	if small {
		c.in.Memory.Best(key, 1)
	} else {
		c.in.Memory.Forget(key)
	}
	return small
}

// forkWindow is how long a refused fork is told after it happened.
const forkWindow = 10 * time.Minute

// checkForks finds control groups in which the kernel refused a fork lately.
// The kernel counts them (pids.events "max") without saying when, so growth
// since the last pass tells; on a first pass the kernel's log does, which has
// one line for the first refusal in each group.
func (c *pidCheck) checkForks(units []string, pods podsPIDs) {
	units = slices.DeleteFunc(slices.Clone(units), func(name string) bool { return name == systemSlice })
	paths := append(slices.Clone(units), systemSlice)
	if pods.path != "" {
		paths = append(paths, pods.path)
	}
	log := sync.OnceValue(func() []rejectedFork {
		lines, err := c.rejectedForks()
		if err != nil {
			c.failed(fmt.Errorf("when the kernel refused new processes could not be seen: %w", err))
		}
		return lines
	})
	var ofUnits int64 // new refusals in system.slice that are told about a unit of ours
	for _, name := range paths {
		count, err := c.forkCount(name, name == pods.path)
		if err != nil {
			c.failed(err)
			continue
		}
		own, ownFirst := grown(c.in.Memory, "forks own "+name, count.own)
		below, belowFirst := grown(c.in.Memory, "forks below "+name, count.below)
		scope := path.Base(name)
		switch {
		case name == pods.path:
			scope = "kubepods"
		case name == systemSlice:
			below -= ofUnits
		case path.Dir(name) == systemSlice:
			ofUnits += own + below
		}
		for _, part := range []struct {
			what  string
			grown int64
			first bool
			count int64
		}{{"own", own, ownFirst, count.own}, {"below", below, belowFirst, count.below}} {
			if part.what == "below" && name != pods.path && name != systemSlice {
				continue // what is below a unit of ours is its own business
			}
			at := "forks at " + part.what + " " + name
			// Kept with the reading of the monotonic clock, for the other may be
			// set meanwhile.
			last, refused := Kept[time.Time](c.in.Memory, at)
			note := func(t time.Time) {
				if !refused || t.After(last) {
					last, refused = t, true
					c.in.Memory.Keep(at, t)
				}
			}
			switch {
			case part.first && part.count > 0:
				for _, l := range log() {
					if l.cgroup == name && part.what == "own" ||
						strings.HasPrefix(l.cgroup, name+"/") && part.what == "below" && !slices.Contains(units, l.cgroup) {
						note(c.in.Now.Add(l.at.Sub(c.in.Now)))
					}
				}
			case !part.first && part.grown > 0:
				note(c.in.Now)
			}
			if ago := c.in.Now.Sub(last); !refused || ago < 0 || ago > forkWindow {
				continue
			}
			where := count.where
			if part.what == "below" && where == nil {
				// Only where to look: what can not be read is left out.
				_, where, _ = c.forksBelow(name, 4)
			}
			where = slices.DeleteFunc(where, func(f forkedIn) bool { return slices.Contains(units, f.cgroup) })
			c.tellForks(scope, part.what, name, part.count, where, pods)
		}
	}
}

// grown returns by how much a count has grown since the last pass, and whether
// this is the first look at it, when nobody knows. A count that is lower than it
// was belongs to a group made anew, or lacks groups that are gone.
func grown(m *Memory, key string, n int64) (by int64, first bool) {
	before := m.Best(key, 0) - 1 // stored one higher: 0 is "never seen"
	if n < before {
		m.Forget(key)
	}
	m.Best(key, n+1)
	return max(0, n-max(0, before)), before < 0
}

func (c *pidCheck) tellForks(scope, what, name string, count int64, where []forkedIn, pods podsPIDs) {
	f := finding.Finding{Reason: "ForkFailures", Severity: finding.Warning, Subject: scope,
		Message: fmt.Sprintf("the kernel refused %s a new process or thread within the last 10 minutes: it is at its limit", scope)}
	if what == "below" {
		f.Message = "the kernel refused a service in " + scope + " a new process or thread within the last 10 minutes: the service is at its limit"
		if scope == "kubepods" {
			f.Subject = "pods"
			f.Message = "the kernel refused a pod a new process or thread within the last 10 minutes: the pod is at its own limit"
			if !pods.nearly {
				f.Severity = finding.Info
			}
		}
	}
	f.Evidence = []finding.Evidence{{Source: c.tree.file(name, "pids.events"), Observed: fmt.Sprintf("%d refused so far", count), Expected: "no more than before"}}
	if what == "below" {
		for _, w := range where[:min(3, len(where))] {
			f.Evidence = append(f.Evidence, finding.Evidence{Source: c.tree.file(w.cgroup, "pids.events"), Observed: fmt.Sprintf("%d refused so far", w.count)})
		}
	}
	c.r.Add(f)
}

// forkCount is how many forks were refused in a control group.
type forkCount struct {
	// own are those its own limit refused, below those of the groups in it.
	own, below int64
	// where names groups with refusals; nil when they were not looked up.
	where []forkedIn
}

// forkedIn is a control group in which forks were refused.
type forkedIn struct {
	cgroup string
	count  int64
}

// systemSlice holds the services of a systemd host.
const systemSlice = "/system.slice"

// forkCount reads a group's count. Since Linux 6.11 pids.events counts up the
// tree and pids.events.local is the group's own. Before, and with cgroup v1, each
// group counts the forks its own tasks were refused, whoever's limit it was, and
// the groups below have to be visited.
func (c *pidCheck) forkCount(name string, pods bool) (forkCount, error) {
	all, ok, err := c.tree.counter(c.ctx, name, "pids.events", "max")
	if err != nil || !ok {
		return forkCount{}, err
	}
	own, ok, err := c.tree.counter(c.ctx, name, "pids.events.local", "max")
	if err != nil {
		return forkCount{}, err
	}
	if ok {
		return forkCount{own: own, below: max(0, all-own)}, nil
	}
	count := forkCount{own: all}
	if pods || name == systemSlice {
		depth := 1
		if pods {
			depth = 3 // class, pod, container
		}
		count.below, count.where, err = c.forksBelow(name, depth)
	}
	return count, err
}

// forksBelow sums the refusals of the groups below one, and names those with
// any. A group that goes away meanwhile is left out.
func (c *pidCheck) forksBelow(name string, depth int) (sum int64, where []forkedIn, err error) {
	where = []forkedIn{}
	entries, err := c.in.Host.ReadDir(c.ctx, path.Dir(c.tree.file(name, "pids.events")))
	if err != nil {
		return 0, where, unlessGone(err)
	}
	for _, entry := range entries {
		// Attributes are called CONTROLLER.NAME, all but three of v1's.
		switch path.Ext(entry) {
		case "", ".slice", ".service", ".scope":
		default:
			continue
		}
		group := path.Join(name, entry)
		n, ok, err := c.tree.counter(c.ctx, group, "pids.events.local", "max")
		if err == nil && !ok {
			n, ok, err = c.tree.counter(c.ctx, group, "pids.events", "max")
		}
		if err != nil {
			return sum, where, err
		}
		if !ok {
			continue
		}
		if n > 0 {
			where = append(where, forkedIn{group, n})
		}
		sum += n
		if depth > 1 {
			n, w, err := c.forksBelow(group, depth-1)
			if err != nil {
				return sum, where, err
			}
			sum, where = sum+n, append(where, w...)
		}
	}
	return sum, where, nil
}

// rejectedFork is a line of the kernel's log.
type rejectedFork struct {
	cgroup string
	at     time.Time
}

func (c *pidCheck) rejectedForks() ([]rejectedFork, error) {
	os, err := c.in.Host.OS(c.ctx)
	if err != nil {
		return nil, err
	}
	records, err := c.in.Host.KernelLog(c.ctx)
	if err != nil {
		return nil, fmt.Errorf("kernel log: %w", err)
	}
	var out []rejectedFork
	for _, r := range records {
		if name, ok := parseForkRejected(r.Text); ok {
			out = append(out, rejectedFork{name, os.BootTime.Add(r.Time)})
		}
	}
	return out, nil
}

// parseForkRejected recognises pids_event of kernel/cgroup/pids.c.
func parseForkRejected(text string) (cgroup string, ok bool) {
	cgroup, ok = strings.CutPrefix(text, "cgroup: fork rejected by pids controller in ")
	return cgroup, ok && strings.HasPrefix(cgroup, "/")
}

// maxInotifyFDs bounds how many descriptors of one daemon are looked at: a
// readlink each, about 2 microseconds.
const maxInotifyFDs = 4096

// checkInotify counts the inotify instances and watches of the kubelet and the
// container runtime, the largest users on a node (cAdvisor watches every control
// group, the runtime every container's). The kernel does not tell how many a
// user has, and looking into every process would cost more than all the rest of
// the pass; so this is a lower bound, and information only.
func (c *pidCheck) checkInotify() {
	limits := map[string]int64{}
	for _, what := range []string{"watches", "instances"} {
		file := "/proc/sys/fs/inotify/max_user_" + what
		data, err := c.in.Host.ReadFile(c.ctx, file)
		if isGone(err) { // built without CONFIG_INOTIFY_USER
			return
		}
		if err == nil {
			limits[what], err = parseLimit(data)
		}
		if err != nil {
			c.failed(fmt.Errorf("%s: %w", file, err))
			return
		}
	}
	used, by := c.inotifyUse()
	for what, limit := range limits {
		if limit <= 0 || float64(used[what]) < c.WarnAt.Of(float64(limit)) {
			continue
		}
		c.r.Add(finding.Finding{Reason: "InotifyNearLimit", Severity: finding.Info, Subject: what,
			Message: fmt.Sprintf("the kubelet and the container runtime alone use %d of root's %d inotify %s: following logs and noticing changed files fails when they run out", used[what], limit, what),
			Evidence: []finding.Evidence{
				{Source: "/proc/sys/fs/inotify/max_user_" + what, Observed: strconv.FormatInt(limit, 10)},
				{Source: "/proc/PID/fdinfo", Observed: strings.Join(by, "; "), Expected: fmt.Sprintf("below %s of the limit", c.WarnAt)},
			}})
	}
}

// inotifyUse is what the kubelet and the container runtime have of root's, by kind,
// and who has it. To count it takes a look at each of their descriptors.
func (c *pidCheck) inotifyUse() (used map[string]int64, by []string) {
	type use struct {
		used map[string]int64
		by   []string
		at   time.Time
	}
	const key = "inotify"
	if kept, ok := Kept[use](c.in.Memory, key); ok && !elapsed(c.in.Now, kept.at, seldomFor) {
		return kept.used, kept.by
	}
	u, whole := use{used: map[string]int64{}, at: c.in.Now}, true
	for _, p := range c.runtimes {
		if p.Kernel || p.State == 'Z' {
			continue
		}
		// The limit is per user: only root's processes share root's.
		if st, err := c.in.Host.Stat(c.ctx, "/proc/"+strconv.Itoa(p.PID)); err != nil || st.UID != 0 {
			continue
		}
		instances, watches, err := c.inotifyOf(p.PID)
		if err != nil {
			c.failed(fmt.Errorf("inotify use of %q: %w", p.Comm, err))
			whole = false
			continue
		}
		u.used["instances"] += instances
		u.used["watches"] += watches
		u.by = append(u.by, fmt.Sprintf("%q (PID %d): %d instances, %d watches", p.Comm, p.PID, instances, watches))
	}
	if whole {
		c.in.Memory.Keep(key, u)
	}
	return u.used, u.by
}

func (c *pidCheck) inotifyOf(pid int) (instances, watches int64, err error) {
	fds, err := c.in.Host.ReadDir(c.ctx, procFile(pid, "fd"))
	if err != nil {
		return 0, 0, unlessGone(err)
	}
	for _, fd := range fds[:min(len(fds), maxInotifyFDs)] {
		target, err := c.in.Host.ReadLink(c.ctx, procFile(pid, "fd/"+fd))
		if err != nil {
			if isGone(err) {
				continue
			}
			return 0, 0, err
		}
		if target != "anon_inode:inotify" && target != "anon_inode:[inotify]" {
			continue
		}
		instances++
		data, err := c.in.Host.ReadFile(c.ctx, procFile(pid, "fdinfo/"+fd))
		if err != nil {
			if isGone(err) {
				continue
			}
			return 0, 0, err
		}
		// proc_pid_fdinfo(5): one "inotify wd:..." line for each watch.
		watches += int64(bytes.Count(data, []byte("inotify wd:")))
	}
	return instances, watches, nil
}
