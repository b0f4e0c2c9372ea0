package fleet

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/terminal"
)

var now = time.Date(2026, 11, 22, 4, 0, 0, 0, time.UTC)

func ago(d time.Duration) metav1.Time { return metav1.NewTime(now.Add(-d)) }

// cond is one condition of ours, or of the kubelet's.
func cond(kind, status, reason, message string) corev1.NodeCondition {
	if !strings.Contains(kind, "/") && kind != "Ready!" {
		kind = prefix + kind
	}
	return corev1.NodeCondition{Type: corev1.NodeConditionType(strings.TrimSuffix(kind, "!")), Status: corev1.ConditionStatus(status), Reason: reason, Message: message,
		LastTransitionTime: ago(3 * time.Hour), LastHeartbeatTime: ago(20 * time.Minute)}
}

func node(name string, conditions ...corev1.NodeCondition) corev1.Node {
	n := corev1.Node{}
	n.Name = name
	n.Status.NodeInfo.KubeletVersion = "v1.36.3"
	n.Status.Conditions = append(conditions, cond("Ready!", "True", "KubeletReady", "kubelet is posting ready status"))
	return n
}

func agentPod(node string, ready bool) corev1.Pod {
	p := corev1.Pod{}
	p.Namespace, p.Name = "host-hygiene", "host-hygiene-agent-"+node
	p.Spec.NodeName = node
	p.Spec.Containers = []corev1.Container{{Name: "agent", Image: "registry.example:5000/hosthygiene/agent:v0.1.0"}}
	p.Status.Phase = corev1.PodRunning
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: status}}
	return p
}

// mixed is a fleet with one node of every kind.
func mixed() ([]corev1.Node, []corev1.Pod) {
	healthy := []corev1.NodeCondition{cond("Ready", "True", "Ready", "fine"), cond("TimeProblem", "False", "NoProblem", "chronyd follows"), cond("DiskProblem", "False", "NoProblem", "4 disks")}
	old := cond("TimeProblem", "False", "NoProblem", "chronyd follows")
	old.LastHeartbeatTime = ago(4 * time.Hour)
	windows := node("win")
	windows.Labels = map[string]string{corev1.LabelOSStable: "windows"}
	crashing := agentPod("crash", false)
	crashing.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}}}
	nodes := []corev1.Node{
		node("a-fine", healthy...),
		node("b-two", cond("Ready", "True", "Ready", "fine"), cond("TimeProblem", "True", "ClockOffsetHigh", "0.8 s"), cond("DiskProblem", "True", "UnstableDeviceName", "/dev/sdb")),
		node("c-one", cond("Ready", "True", "Ready", "fine"), cond("TimeProblem", "True", "ClockOffsetHigh", "0.8 s"), cond("DiskProblem", "False", "NoProblem", "4 disks")),
		node("critical", cond("Ready", "False", "FilesystemReadOnly", "sda1"), cond("DiskProblem", "True", "FilesystemReadOnly", "/dev/sda1 refuses writes")),
		node("unknown", cond("Ready", "True", "Ready", "fine"), cond("DiskProblem", "Unknown", "CheckFailed", "the deadline is over")),
		node("crash", healthy...),
		node("bare"),
		node("stale", old),
		node("later", cond("NetworkProblem", "True", "LinkDown", "eth1")),
		windows,
	}
	var pods []corev1.Pod
	for _, n := range nodes {
		if n.Name != "bare" && n.Name != "win" && n.Name != "crash" {
			pods = append(pods, agentPod(n.Name, true))
		}
	}
	return nodes, append(pods, crashing)
}

func TestTable(t *testing.T) {
	nodes, pods := mixed()
	r := NewReport(nodes, pods, now)
	var b strings.Builder
	if err := r.WriteTable(&b, Style{}); err != nil {
		t.Fatal(err)
	}
	const want = `NODE      READY  AGENT             TIME             DISKS               NETWORK
critical  False  ok                -                FilesystemReadOnly  -
b-two     True   ok                ClockOffsetHigh  UnstableDeviceName  -
c-one     True   ok                ClockOffsetHigh  ok                  -
later     -      ok                -                -                   LinkDown
unknown   True   ok                -                unknown             -
bare      -      no agent          -                -                   -
crash     True?  CrashLoopBackOff  ok?              ok?                 -
stale     -      stale 4h          ok?              -                   -
a-fine    True   ok                ok               ok                  -
win       -      -                 -                -                   -

10 nodes: 4 with problems, 4 unknown, 1 ok, 1 without a host of ours; on 3 no agent vouches for what it told (marked ?)
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	if code := r.ExitCode(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	b.Reset()
	if err := r.WriteTable(&b, Style{Wide: true}); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"critical  False  ok                v0.1.0   20m ago  Ready    -                FilesystemReadOnly  -\n    READY FilesystemReadOnly since 3h: sda1\n    DISKS FilesystemReadOnly since 3h: /dev/sda1 refuses writes\n",
		"unknown   True   ok                v0.1.0   20m ago  Ready    -                unknown             -\n    DISKS CheckFailed since 3h: the deadline is over\n",
		"stale     -      stale 4h          v0.1.0   4h ago   Ready    ok?",
	} {
		if !strings.Contains(b.String(), line) {
			t.Errorf("wide lacks %q:\n%s", line, b.String())
		}
	}
}

// TestNarrowTable: where a column a probe has no room, what is wrong is listed.
func TestNarrowTable(t *testing.T) {
	nodes, pods := mixed()
	r := NewReport(nodes, pods, now)
	for columns, want := range map[int]string{
		80: `NODE      READY  AGENT             TIME             DISKS               NETWORK
`, 60: `NODE      READY  AGENT             WHAT IS WRONG
critical  False  ok                disks FilesystemReadOnly
b-two     True   ok                time ClockOffsetHigh,
                                   disks UnstableDeviceName
c-one     True   ok                time ClockOffsetHigh
later     -      ok                network LinkDown
unknown   True   ok                disks unknown
bare      -      no agent          -
crash     True?  CrashLoopBackOff  ok?
stale     -      stale 4h          ok?
a-fine    True   ok                ok
win       -      -                 -

10 nodes: 4 with problems, 4 unknown, 1 ok, 1 without a host
  of ours; on 3 no agent vouches for what it told (marked ?)
`} {
		var b strings.Builder
		if err := r.WriteTable(&b, Style{Look: terminal.Look{Columns: columns}}); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(b.String(), want) {
			t.Errorf("%d columns:\n%s", columns, cmp.Diff(want, b.String()))
		}
	}
}

func TestPodsThatCouldNotBeListed(t *testing.T) {
	nodes, _ := mixed()
	r := NewReport(nodes, nil, now)
	states := map[string]AgentState{}
	for _, n := range r.Nodes {
		states[n.Name] = n.Agent.State
	}
	want := map[string]AgentState{"a-fine": Unseen, "b-two": Unseen, "c-one": Unseen, "critical": Unseen, "unknown": Unseen,
		"crash": Unseen, "bare": Missing, "stale": Stale, "later": Unseen, "win": NotExpected}
	if diff := cmp.Diff(want, states); diff != "" {
		t.Error(diff)
	}
}

// TestExitCodes: silence is not health.
func TestExitCodes(t *testing.T) {
	nodes, pods := mixed()
	one := func(name string) []corev1.Node {
		for _, n := range nodes {
			if n.Name == name {
				return []corev1.Node{n}
			}
		}
		t.Fatal(name)
		return nil
	}
	for name, want := range map[string]int{"a-fine": 0, "b-two": 1, "critical": 1, "unknown": 3, "crash": 3, "bare": 3, "stale": 3, "win": 0} {
		if got := NewReport(one(name), pods, now).ExitCode(); got != want {
			t.Errorf("%s: %d, want %d", name, got, want)
		}
	}
	twins := append(one("a-fine"), one("a-fine")...)
	twins[1].Name = "b-fine"
	for i := range twins {
		twins[i].Status.NodeInfo.MachineID = "0123"
	}
	r := NewReport(twins, append(pods, agentPod("b-fine", true)), now)
	if r.ExitCode() != 1 || len(r.DuplicateIdentities) != 1 {
		t.Errorf("a machine-id twice: %d, %v", r.ExitCode(), r.DuplicateIdentities)
	}
}

// TestRollout: a node with two pods is judged by the one that is ready.
func TestRollout(t *testing.T) {
	nodes, _ := mixed()
	going := agentPod("a-fine", true)
	gone := ago(time.Minute)
	going.DeletionTimestamp = &gone
	for _, pods := range [][]corev1.Pod{{going, agentPod("a-fine", false), agentPod("a-fine", true)}, {agentPod("a-fine", true), agentPod("a-fine", false), going}} {
		if a := NewReport(nodes[:1], pods, now).Nodes[0].Agent; a.State != Running {
			t.Errorf("%+v", a)
		}
	}
}

func TestImageTag(t *testing.T) {
	for image, want := range map[string]string{
		"ghcr.io/hosthygiene/agent:v0.1.0":                       "v0.1.0",
		"registry:5000/agent":                                    "latest",
		"registry:5000/agent:1@sha256:0123456789abcdef":          "1",
		"registry:5000/agent@sha256:0123456789abcdef0123456789a": "0123456789ab",
		"": "latest",
	} {
		p := agentPod("n", true)
		p.Spec.Containers[0].Image = image
		if got := imageTag(&p); got != want {
			t.Errorf("%q: %q, want %q", image, got, want)
		}
	}
}

// TestProbeNames: what stands above a column is what `agent explain` takes.
func TestProbeNames(t *testing.T) {
	for _, p := range config.Default().Probes.List() {
		if got := probeOf(p.Condition()); got != p.Name() {
			t.Errorf("%s is the condition of the probe %s, and the column says %s: see probeNames", p.Condition(), p.Name(), got)
		}
	}
}

// TestShape is the documented shape of -o json.
func TestShape(t *testing.T) {
	nodes, pods := mixed()
	var b strings.Builder
	if err := WriteJSON(&b, NewReport(nodes[3:4], pods, now)); err != nil {
		t.Fatal(err)
	}
	const want = `{
  "apiVersion": "hosthygiene.io/v1alpha1",
  "kind": "FleetReport",
  "time": "2026-11-22T04:00:00Z",
  "nodes": [
    {
      "name": "critical",
      "status": "Problem",
      "kubelet": "True",
      "agent": {
        "state": "Running",
        "pod": "host-hygiene-agent-critical",
        "version": "v0.1.0",
        "told": "2026-11-22T03:40:00Z"
      },
      "ready": {
        "type": "hosthygiene.io/Ready",
        "probe": "ready",
        "status": "Problem",
        "reason": "FilesystemReadOnly",
        "message": "sda1",
        "since": "2026-11-22T01:00:00Z"
      },
      "probes": [
        {
          "type": "hosthygiene.io/DiskProblem",
          "probe": "disks",
          "status": "Problem",
          "reason": "FilesystemReadOnly",
          "message": "/dev/sda1 refuses writes",
          "since": "2026-11-22T01:00:00Z"
        }
      ]
    }
  ]
}
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	b.Reset()
	if err := WriteYAML(&b, NewReport(nil, nil, now)); err != nil {
		t.Fatal(err)
	}
	if want := "apiVersion: hosthygiene.io/v1alpha1\nkind: FleetReport\nnodes: []\ntime: \"2026-11-22T04:00:00Z\"\n"; b.String() != want {
		t.Errorf("got %s", b.String())
	}
}

// FuzzTables: whatever the API says, no table gives a terminal orders, and no
// check panics.
func FuzzTables(f *testing.F) {
	nodes, pods := mixed()
	seed, err := json.Marshal(objects{Nodes: nodes, Pods: pods, Servers: []APIServer{{Address: "a", Version: "v1.36.3", Hashes: map[string]string{"pods": "x"}}}, Target: "1.37"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(`{"Nodes":[{"metadata":{"name":"\u001b[2J"},"status":{"conditions":[{"type":"hosthygiene.io/\u009bProblem","status":"True","reason":"\u202e","message":"\u0007\n"}],"nodeInfo":{"kubeletVersion":"v1.\u001b"}}}],"CRDs":[{"status":{"storedVersions":["\u001b"]}}],"Target":"1.37"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var o objects
		if json.Unmarshal(data, &o) != nil {
			return
		}
		r := NewReport(o.Nodes, o.Pods, now)
		r.StuckVolumes = StuckVolumes(o.Nodes, o.Attachments, o.Volumes, o.Pods, now)
		u := UpgradeReport{Server: o.Target, Target: o.Target, Checks: []Check{
			CheckNodes(o.Nodes, r), CheckProbe("kubelet-settings", "kubelet", r), CheckReboots(o.Nodes, r), CheckVolumes(r.StuckVolumes, now),
			CheckAPIServers(o.Servers, o.Target), CheckStorageHashes(o.Servers), CheckStoredVersions(o.CRDs, o.Target), CheckMigrations("v1beta1", o.Migrations),
			CheckNamespaces(o.Namespaces, 0, now), CheckTerminating(o.Dying, nil, nil, 0, now), CheckDeprecated([]Metrics{{APIs: o.Deprecated}}, o.Target),
		}}
		if c, err := CheckSkew(o.Nodes, []string{o.Target}, o.Target); err == nil {
			u.Checks = append(u.Checks, c)
		}
		for _, wide := range []bool{false, true} {
			var b strings.Builder
			if err := r.WriteTable(&b, Style{Wide: wide}); err != nil {
				t.Fatal(err)
			}
			if err := u.WriteTable(&b, Style{Wide: wide}); err != nil {
				t.Fatal(err)
			}
			if i := strings.IndexFunc(b.String(), func(r rune) bool { return r != '\n' && r != unicode.ReplacementChar && !unicode.IsPrint(r) }); i >= 0 {
				t.Errorf("%q reaches the terminal", b.String()[i:min(i+20, b.Len())])
			}
		}
		for _, n := range r.Nodes {
			if c, ok := n.Worst(); ok && c.Status == finding.OK {
				t.Errorf("the worst of %s is fine", n.Name)
			}
		}
	})
}

// BenchmarkFleet is the table of 5,000 nodes, as often as a watch may show it.
func BenchmarkFleet(b *testing.B) {
	var nodes []corev1.Node
	var pods []corev1.Pod
	for i := range 5000 {
		name := fmt.Sprintf("node-%04d", i)
		status := "False"
		if i%50 == 0 {
			status = "True"
		}
		var conditions []corev1.NodeCondition
		for _, p := range probeNames {
			conditions = append(conditions, cond(p[0]+"Problem", status, "SomeReason", "a message of some length about what was verified there"))
		}
		nodes = append(nodes, node(name, append(conditions, cond("Ready", "True", "Ready", "fine"))...))
		nodes[i].Status.NodeInfo.MachineID = name
		pods = append(pods, agentPod(name, true))
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := NewReport(nodes, pods, now).WriteTable(io.Discard, Style{Look: terminal.Look{Colour: true}}); err != nil {
			b.Fatal(err)
		}
	}
}
