// Package fleet says what is the matter with many nodes, for the person at the
// keyboard: what their agents have told the API server, and whether the cluster
// is fit to be upgraded. All of it is computed from objects that were listed;
// nothing here talks to anybody.
package fleet

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/pkg/finding"
)

// APIVersion is that of the reports.
const APIVersion = "hosthygiene.io/v1alpha1"

const (
	prefix    = "hosthygiene.io/"
	readyType = prefix + "Ready"
)

// staleAfter is how old the newest of an agent's conditions may be: twice the
// longest time between two refreshes, which is 75 minutes.
const staleAfter = 150 * time.Minute

// Report is what `kubectl hygiene -o json` has: every node, the worst first.
type Report struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Time       time.Time `json:"time"`
	Nodes      []Node    `json:"nodes"`
	// DuplicateIdentities are names that only one node may have.
	DuplicateIdentities []Duplicate `json:"duplicateIdentities,omitempty"`
	// StuckVolumes are held by nodes that are dead.
	StuckVolumes []StuckVolume `json:"stuckVolumes,omitempty"`
	// NotChecked says what could not be read, and why.
	NotChecked []string `json:"notChecked,omitempty"`
}

// Node is one of them.
type Node struct {
	Name string `json:"name"`
	// Status is Problem when a condition tells of one, Unknown when a condition
	// does, or when there is no agent that would tell, else OK; NotApplicable
	// where none is expected.
	Status finding.Status `json:"status"`
	// Kubelet is the status of the Node's own condition Ready.
	Kubelet string `json:"kubelet"`
	Agent   Agent  `json:"agent"`
	// Ready is hosthygiene.io/Ready, if there is one.
	Ready *Condition `json:"ready,omitempty"`
	// Probes are the other conditions of ours.
	Probes []Condition `json:"probes,omitempty"`
}

// Condition is what a probe has told, or all of them together.
type Condition struct {
	Type string `json:"type"`
	// Probe is the name that `agent explain` takes.
	Probe string `json:"probe"`
	// Status is OK, Problem or Unknown.
	Status  finding.Status `json:"status"`
	Reason  string         `json:"reason"`
	Message string         `json:"message"`
	Since   time.Time      `json:"since,omitzero"`
}

// Agent is the agent of a node.
type Agent struct {
	State AgentState `json:"state"`
	// Detail says more of a state that is not Running.
	Detail  string `json:"detail,omitempty"`
	Pod     string `json:"pod,omitempty"`
	Version string `json:"version,omitempty"`
	// Told is when it last refreshed a condition.
	Told time.Time `json:"told,omitzero"`
}

// AgentState says whether what an agent has told still holds.
type AgentState string

// The states of an agent.
const (
	Running     AgentState = "Running"     // and its conditions are fresh
	NotRunning  AgentState = "NotRunning"  // there is a pod that does not run
	Missing     AgentState = "Missing"     // there is no pod
	Stale       AgentState = "Stale"       // the conditions are older than two refreshes
	NotExpected AgentState = "NotExpected" // no host of ours: Windows, virtual nodes
	Unseen      AgentState = "Unseen"      // the pods could not be listed; the conditions are fresh
)

// Trusted: what its conditions say is from now.
func (a Agent) Trusted() bool { return a.State == Running || a.State == Unseen }

// NewReport makes the report of some nodes. Pods are those of the agent; nil when
// they could not be listed.
func NewReport(nodes []corev1.Node, pods []corev1.Pod, now time.Time) Report {
	r := Report{APIVersion: APIVersion, Kind: "FleetReport", Time: now.UTC().Truncate(time.Second), Nodes: []Node{}}
	on := map[string]*corev1.Pod{}
	for i, p := range pods {
		if was := on[p.Spec.NodeName]; was == nil || better(&p, was) {
			on[p.Spec.NodeName] = &pods[i]
		}
	}
	for i := range nodes {
		r.Nodes = append(r.Nodes, newNode(&nodes[i], on[nodes[i].Name], pods != nil, now))
	}
	slices.SortFunc(r.Nodes, func(a, b Node) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), cmp.Compare(b.problems(), a.problems()), strings.Compare(a.Name, b.Name))
	})
	r.DuplicateIdentities = duplicatesOf(nodes)
	return r
}

// better: during a rollout a node has two pods for a moment.
func better(a, b *corev1.Pod) bool {
	weight := func(p *corev1.Pod) int {
		switch {
		case p.DeletionTimestamp != nil:
			return 0
		case podReady(p):
			return 2
		}
		return 1
	}
	return weight(a) > weight(b)
}

func newNode(n *corev1.Node, pod *corev1.Pod, listed bool, now time.Time) Node {
	out := Node{Name: n.Name, Kubelet: string(corev1.ConditionUnknown)}
	var told time.Time
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			out.Kubelet = string(c.Status)
		}
		if !strings.HasPrefix(string(c.Type), prefix) {
			continue
		}
		if c.LastHeartbeatTime.After(told) {
			told = c.LastHeartbeatTime.Time
		}
		if c.Type == readyType {
			ready := newCondition(c)
			out.Ready = &ready
			continue
		}
		out.Probes = append(out.Probes, newCondition(c))
	}
	slices.SortFunc(out.Probes, func(a, b Condition) int { return compareProbes(a.Probe, b.Probe) })
	out.Agent = agentOf(n, pod, listed, told, now)
	out.Status = out.status()
	return out
}

func newCondition(c corev1.NodeCondition) Condition {
	out := Condition{Type: string(c.Type), Probe: probeOf(string(c.Type)), Reason: c.Reason, Message: c.Message,
		Since: c.LastTransitionTime.UTC(), Status: finding.Unknown}
	bad := corev1.ConditionTrue
	if c.Type == readyType {
		bad = corev1.ConditionFalse
	}
	switch c.Status {
	case bad:
		out.Status = finding.Problem
	case corev1.ConditionTrue, corev1.ConditionFalse:
		out.Status = finding.OK
	}
	return out
}

func agentOf(n *corev1.Node, pod *corev1.Pod, listed bool, told, now time.Time) Agent {
	a := Agent{State: Running, Told: told.UTC()}
	if told.IsZero() {
		a.Told = time.Time{}
	}
	if pod != nil {
		a.Pod, a.Version = pod.Name, imageTag(pod)
	}
	old := !told.IsZero() && now.Sub(told) > staleAfter
	switch {
	case pod == nil && told.IsZero() && !expected(n):
		a.State = NotExpected
	case listed && pod == nil:
		a.State = Missing
	case pod != nil && !podReady(pod):
		a.State, a.Detail = NotRunning, whyNot(pod)
	case old:
		a.State = Stale
	case !listed && told.IsZero():
		a.State, a.Detail = Missing, "no condition of ours, and its pods could not be listed"
	case !listed:
		a.State = Unseen
	}
	return a
}

// expected says whether the DaemonSet of the manifests puts a pod on the node.
func expected(n *corev1.Node) bool {
	system := cmp.Or(n.Labels[corev1.LabelOSStable], n.Status.NodeInfo.OperatingSystem, "linux")
	return system == "linux" && n.Labels["type"] != "virtual-kubelet" && n.Labels["eks.amazonaws.com/compute-type"] != "fargate"
}

func podReady(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

func whyNot(p *corev1.Pod) string {
	if p.DeletionTimestamp != nil {
		return "Terminating"
	}
	for _, s := range p.Status.ContainerStatuses {
		if s.State.Waiting != nil && s.State.Waiting.Reason != "" {
			return s.State.Waiting.Reason
		}
		if s.State.Terminated != nil && s.State.Terminated.Reason != "" {
			return s.State.Terminated.Reason
		}
	}
	// The kubelet of a dead node can not say that the pod is gone; the node
	// controller says that it is not ready.
	if p.Status.Phase == corev1.PodRunning {
		return "not ready"
	}
	return string(cmp.Or(p.Status.Phase, corev1.PodPending))
}

// imageTag is the tag of the image, or as much of the digest as tells it apart.
func imageTag(p *corev1.Pod) string {
	for _, c := range p.Spec.Containers {
		if len(p.Spec.Containers) > 1 && c.Name != "agent" {
			continue
		}
		image, digest, _ := strings.Cut(c.Image, "@")
		if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
			return image[i+1:]
		}
		if _, hex, ok := strings.Cut(digest, ":"); ok {
			return hex[:min(len(hex), 12)]
		}
		return "latest"
	}
	return ""
}

func (n Node) status() finding.Status {
	status := finding.OK
	for _, c := range n.all() {
		switch {
		case c.Status == finding.Problem:
			return finding.Problem
		case c.Status == finding.Unknown:
			status = finding.Unknown
		}
	}
	switch {
	case n.Agent.State == NotExpected:
		return finding.NotApplicable
	case !n.Agent.Trusted(), n.Ready == nil && len(n.Probes) == 0:
		return finding.Unknown
	}
	return status
}

func (n Node) all() []Condition {
	if n.Ready == nil {
		return n.Probes
	}
	return append([]Condition{*n.Ready}, n.Probes...)
}

// rank puts the worst first.
func (n Node) rank() int {
	unknown := func(c Condition) bool { return c.Status == finding.Unknown }
	switch {
	case n.Ready != nil && n.Ready.Status == finding.Problem:
		return 0
	case n.Status == finding.Problem:
		return 1
	case slices.ContainsFunc(n.all(), unknown):
		return 2
	case n.Status == finding.Unknown:
		return 3
	case n.Status == finding.OK:
		return 4
	}
	return 5
}

func (n Node) problems() (count int) {
	for _, c := range n.Probes {
		if c.Status == finding.Problem {
			count++
		}
	}
	return count
}

// Worst is the condition to look at first; false when all is well.
func (n Node) Worst() (Condition, bool) {
	for _, want := range []finding.Status{finding.Problem, finding.Unknown} {
		for _, list := range [][]Condition{n.Probes, n.all()} {
			for _, c := range list {
				if c.Status == want {
					return c, true
				}
			}
		}
	}
	return Condition{}, false
}

// ExitCode is 0 when nothing is wrong, 1 with a problem, a duplicate identity or
// a stuck volume, 3 when none is known but something could not be seen.
func (r Report) ExitCode() int {
	code := 0
	if len(r.NotChecked) > 0 {
		code = 3
	}
	for _, n := range r.Nodes {
		switch n.Status {
		case finding.Problem:
			return 1
		case finding.Unknown:
			code = 3
		}
	}
	if len(r.DuplicateIdentities) > 0 || len(r.StuckVolumes) > 0 {
		return 1
	}
	return code
}

// probeNames are the probes by the type of their conditions, in the order of
// their columns. A type that is not here shows under its own name.
var probeNames = [][2]string{
	{"Time", "time"}, {"Disk", "disks"}, {"Multipath", "multipath"}, {"ISCSI", "iscsi"}, {"PID", "pids"}, {"OOM", "oom"},
	{"Package", "packages"}, {"Service", "units"}, {"Kernel", "kernel"}, {"Update", "updates"}, {"Kubelet", "kubelet"},
}

// probeOf is the name under which a condition's probe can be explained.
func probeOf(conditionType string) string {
	short := strings.TrimSuffix(strings.TrimPrefix(conditionType, prefix), "Problem")
	for _, p := range probeNames {
		if p[0] == short {
			return p[1]
		}
	}
	return strings.ToLower(short)
}

func compareProbes(a, b string) int {
	place := func(name string) int {
		i := slices.IndexFunc(probeNames, func(p [2]string) bool { return p[1] == name })
		if i < 0 {
			return len(probeNames)
		}
		return i
	}
	return cmp.Or(cmp.Compare(place(a), place(b)), strings.Compare(a, b))
}

// few names some things and says how many more there are.
func few(names []string, most int) string {
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// count is a number of things.
func count(n int, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}
