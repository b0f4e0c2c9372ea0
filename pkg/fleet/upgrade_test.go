package fleet

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// said is what a check answers, in words: its result, and an object and a message
// a line.
func said(c Check) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s: %s\n", c.Name, c.Result, c.Summary)
	for _, f := range c.Findings {
		fmt.Fprintf(&b, "  %s: %s\n", f.Object, f.Message)
	}
	for _, n := range c.NotChecked {
		fmt.Fprintf(&b, "  not checked: %s\n", n)
	}
	return b.String()
}

func expect(t *testing.T, c Check, want string) {
	t.Helper()
	if diff := cmp.Diff(strings.TrimPrefix(want, "\n"), said(c)); diff != "" {
		t.Error(diff)
	}
	for _, f := range c.Findings {
		if len(f.Run) == 0 {
			t.Errorf("%s: nothing to run", f.Object)
		}
	}
}

func TestCheckNodes(t *testing.T) {
	nodes, pods := mixed()
	pressed := node("pressed")
	pressed.Spec.Unschedulable = true
	pressed.Status.Conditions = append(pressed.Status.Conditions, corev1.NodeCondition{Type: corev1.NodeDiskPressure, Status: corev1.ConditionTrue, Message: "kubelet has disk pressure"})
	never := node("never")
	never.Status.Conditions = nil
	nodes = append(nodes, pressed, silent("gone", "Unknown", time.Hour), never)
	pods = append(pods, agentPod("pressed", true), agentPod("gone", false), agentPod("never", true))
	c := CheckNodes(nodes, NewReport(nodes, pods, now))
	expect(t, c, `
nodes Findings: 8 findings
  pressed: DiskPressure: kubelet has disk pressure
  gone: Ready is Unknown: KubeletReady: kubelet is posting ready status
  never: has no condition Ready: no kubelet has ever reported
  critical: hosthygiene.io/DiskProblem FilesystemReadOnly: /dev/sda1 refuses writes
  b-two: hosthygiene.io/TimeProblem ClockOffsetHigh: 0.8 s
  b-two: hosthygiene.io/DiskProblem UnstableDeviceName: /dev/sdb
  c-one: hosthygiene.io/TimeProblem ClockOffsetHigh: 0.8 s
  later: hosthygiene.io/NetworkProblem LinkDown: eth1
  not checked: the host of bare: no agent
  not checked: the host of crash, gone: the agent does not run
  not checked: the host of never, pressed: the agent has told nothing
  not checked: the host of stale: the agent's conditions are stale
  not checked: the host of unknown: a probe could not run
`)
	if diff := cmp.Diff([]string{"cordoned: pressed"}, c.Notes); diff != "" {
		t.Error(diff)
	}
	if run := c.Findings[4].Run; run[0] != "kubectl hygiene explain b-two time" {
		t.Errorf("run %v", run)
	}
	blind := NewReport(nodes[:1], nil, now)
	blind.NotChecked = []string{"listing the agent's pods in host-hygiene: forbidden"}
	expect(t, CheckNodes(nodes[:1], blind), `
nodes NotChecked: 1 node Ready, none under pressure, no problem told by an agent
  not checked: listing the agent's pods in host-hygiene: forbidden
`)
	fine := nodes[:1]
	expect(t, CheckNodes(fine, NewReport(fine, pods, now)), "nodes Fit: 1 node Ready, none under pressure, no problem told by an agent\n")
}

func TestCheckProbe(t *testing.T) {
	nodes := []corev1.Node{
		node("a", cond("KubeletProblem", "False", "NoProblem", "fine")),
		node("b", cond("KubeletProblem", "True", "RemovedFlag", "--experimental-fail-swap-on is gone in 1.37")),
		node("c", cond("KubeletProblem", "Unknown", "CheckFailed", "no permission")),
		node("d"),
	}
	var pods []corev1.Pod
	for _, n := range nodes {
		pods = append(pods, agentPod(n.Name, true))
	}
	expect(t, CheckProbe("kubelet-settings", "kubelet", NewReport(nodes, pods, now)), `
kubelet-settings Findings: 1 finding
  b: RemovedFlag: --experimental-fail-swap-on is gone in 1.37
  not checked: c: no permission
  not checked: no condition of the probe kubelet on d
`)
	expect(t, CheckProbe("kubelet-settings", "kubelet", NewReport(nodes[:1], pods, now)), "kubelet-settings Fit: the probe kubelet finds nothing on 1 node\n")

	updates := []corev1.Node{node("a", cond("UpdateProblem", "False", "NoProblem", "fine")), node("b", cond("UpdateProblem", "True", "RebootPending", "linux-image, since 2 d"))}
	updates[0].Annotations = map[string]string{"weave.works/kured-reboot-in-progress": "2026-11-22T03:55:00Z"}
	expect(t, CheckReboots(updates, NewReport(updates, pods, now)), `
reboots Findings: 2 findings
  b: RebootPending: linux-image, since 2 d
  a: kured has been rebooting it since 2026-11-22T03:55:00Z
`)
}

func TestCheckSkew(t *testing.T) {
	for _, tt := range []struct {
		name, kubelet, target string
		servers               []string
		want                  string
	}{
		{"same", "v1.36.3", "1.37", []string{"v1.36.3"}, "Fit"},
		{"a vendor's suffix", "v1.36.1-eks-113cf36", "1.37", []string{"v1.36.3-gke.100"}, "Fit"},
		{"three behind after it", "v1.34.0", "1.37", []string{"v1.36.3"}, "Fit"},
		{"four behind after it", "v1.33.9", "1.37", []string{"v1.36.3"}, "would be 4 minors older than an API server of 1.37, 3 are supported"},
		{"three behind, patch only", "v1.33.9", "1.36", []string{"v1.36.3"}, "Fit"},
		{"four behind now", "v1.32.4", "1.37", []string{"v1.36.3"}, "is 4 minors older than the API server (1.36.3), 3 are supported"},
		{"newer", "v1.37.0", "1.37", []string{"v1.36.3"}, "is newer than an API server (1.36.3), which is not supported"},
		{"newer than one of two", "v1.36.0", "1.37", []string{"v1.36.3", "v1.35.1"}, "is newer than an API server (1.35.1)"},
		{"newer patch", "v1.36.9", "1.37", []string{"v1.36.3"}, "Fit"},
		{"before 1.25", "v1.24.0", "1.27", []string{"v1.26.0"}, "would be 3 minors older than an API server of 1.27, 2 are supported"},
		{"two minors at once", "v1.36.3", "1.38", []string{"v1.36.3"}, "API servers of 1.36.3 can be upgraded one minor at a time"},
		{"backwards", "v1.36.3", "1.35", []string{"v1.36.3"}, "one minor at a time"},
		{"no version", "", "1.37", []string{"v1.36.3"}, "not checked: the kubelet's version"},
		{"no server's version", "v1.36.3", "1.37", []string{"?"}, "not checked: the API server's version"},
	} {
		n := node("n1")
		n.Status.NodeInfo.KubeletVersion = tt.kubelet
		c, err := CheckSkew([]corev1.Node{n}, tt.servers, tt.target)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if !strings.Contains(said(c), tt.want) || tt.want != "Fit" && c.Result == Fit {
			t.Errorf("%s: got %s want %s", tt.name, said(c), tt.want)
		}
	}
	if _, err := CheckSkew(nil, []string{"v1.36.3"}, "next"); err == nil {
		t.Error("a target that is no version is taken")
	}
	if got, err := NextMinor("v1.36.3-rc.1+abc"); err != nil || got != "1.37" {
		t.Errorf("next minor %q, %v", got, err)
	}
	many := make([]corev1.Node, 30)
	for i := range many {
		many[i] = node(fmt.Sprintf("n%02d", i))
		many[i].Status.NodeInfo.KubeletVersion = "v1.30.0"
	}
	c, _ := CheckSkew(many, []string{"v1.36.3"}, "1.37")
	if len(c.Findings) != 1 || !strings.HasSuffix(c.Findings[0].Message, "n09 and 20 more") {
		t.Errorf("30 nodes of one version: %s", said(c))
	}
}

func TestCheckAPIServers(t *testing.T) {
	a := APIServer{Address: "10.0.0.1:6443", Version: "v1.36.3", Hashes: map[string]string{"pods": "xyz", "apps/deployments": "8aSe"}}
	b := APIServer{Address: "10.0.0.2:6443", Version: "v1.36.3", Hashes: map[string]string{"pods": "xyz", "apps/deployments": "8aSe"}}
	newer := APIServer{Address: "10.0.0.3:6443", Version: "v1.37.0", Hashes: map[string]string{"pods": "xyz", "apps/deployments": "other", "new/things": "n"}}
	away := APIServer{Address: "10.0.0.4:6443", Err: errors.New("not checkable from here: connection refused")}

	expect(t, CheckAPIServers([]APIServer{a, b}, "v1.36.3"), "api-servers Fit: 2 of 2 asked directly, v1.36.3\n")
	expect(t, CheckAPIServers([]APIServer{a, b, newer}, "v1.36.3"), `
api-servers Findings: 1 finding
  kube-apiserver: versions are mixed: v1.36.3 (the kubeconfig's address, 10.0.0.1:6443, 10.0.0.2:6443); v1.37.0 (10.0.0.3:6443)
`)
	expect(t, CheckAPIServers([]APIServer{a, away}, "v1.36.3"), `
api-servers NotChecked: 1 of 2 asked directly, v1.36.3
  not checked: the API server at 10.0.0.4:6443: not checkable from here: connection refused
`)
	expect(t, CheckAPIServers(nil, "v1.36.3"), `
api-servers NotChecked: 0 of 0 asked directly, v1.36.3
  not checked: the EndpointSlice default/kubernetes names no API server
`)

	expect(t, CheckStorageHashes([]APIServer{a, b}), "storage-hashes Fit: 2 resources have the same hash at 2 API servers\n")
	expect(t, CheckStorageHashes([]APIServer{a}), "storage-hashes Fit: one API server: nothing to compare\n")
	expect(t, CheckStorageHashes([]APIServer{a, away}), `
storage-hashes NotChecked: only one API server answered: nothing to compare
  not checked: the API server at 10.0.0.4:6443: not checkable from here: connection refused
`)
	c := CheckStorageHashes([]APIServer{a, b, newer})
	expect(t, c, `
storage-hashes Findings: 1 finding
  apps/deployments: API servers write it in different versions: 8aSe at 10.0.0.1:6443, 10.0.0.2:6443, other at 10.0.0.3:6443
`)
	if !slices.Contains(c.Notes, hashNote) {
		t.Error("the output pretends to know what is stored")
	}
}

func crd(t *testing.T, text string) CRD {
	t.Helper()
	var c CRD
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCheckStoredVersions(t *testing.T) {
	const spec = `{"metadata":{"name":"foos.example.com"},"spec":{"group":"example.com","names":{"plural":"foos"},"versions":[{"name":"v1alpha1","served":true},{"name":"v1","served":true,"storage":true}]},"status":{"storedVersions":[%s]}}`
	clean := crd(t, fmt.Sprintf(spec, `"v1"`))
	old := crd(t, fmt.Sprintf(spec, `"v1alpha1","v1"`))
	dropped := crd(t, fmt.Sprintf(spec, `"v1beta1","v1"`))
	expect(t, CheckStoredVersions([]CRD{clean}, ""), "stored-versions Fit: 1 CustomResourceDefinition, each stored in its storage version only\n")
	c := CheckStoredVersions([]CRD{clean, old, dropped}, "")
	expect(t, c, `
stored-versions Findings: 2 findings
  foos.example.com: objects may be stored as v1alpha1 besides the storage version v1
  foos.example.com: objects may be stored as v1beta1 besides the storage version v1; v1beta1 is no version of it any more, so such objects can not be read
`)
	want := []string{
		"kubectl get foos.example.com -A -o json | kubectl replace -f -   # writes every object as v1",
		`kubectl patch crd foos.example.com --subresource=status --type=merge -p '{"status":{"storedVersions":["v1"]}}'   # only when every object has been written again`,
	}
	if diff := cmp.Diff(want, c.Findings[0].Run); diff != "" {
		t.Error(diff)
	}
	run := CheckStoredVersions([]CRD{old}, "v1beta1").Findings[0].Run[0]
	if want := `kubectl create -f - <<< '{"apiVersion":"storagemigration.k8s.io/v1beta1","kind":"StorageVersionMigration","metadata":{"name":"foos.example.com"},"spec":{"resource":{"group":"example.com","resource":"foos"}}}'   # then wait for its condition Succeeded`; run != want {
		t.Errorf("got %s", run)
	}
}

func TestCheckMigrations(t *testing.T) {
	with := func(name string, conditions ...metav1.Condition) (m Migration) {
		m.Metadata.Name = name
		m.Status.Conditions = conditions
		return m
	}
	list := []Migration{
		with("done", metav1.Condition{Type: "Running", Status: "False"}, metav1.Condition{Type: "Succeeded", Status: "True"}),
		with("runs", metav1.Condition{Type: "Running", Status: "True"}),
		with("failed", metav1.Condition{Type: "Failed", Status: "True", Message: "no such resource"}),
		with("new"),
	}
	expect(t, CheckMigrations("v1beta1", list), `
migrations Findings: 3 findings
  runs: is still running
  failed: failed: no such resource
  new: has not begun
`)
	expect(t, CheckMigrations("v1beta1", list[:1]), "migrations Fit: 1 StorageVersionMigration, none open\n")
	expect(t, CheckMigrations("", nil), "migrations Fit: storagemigration.k8s.io is not served here\n")
}

func TestCheckTerminating(t *testing.T) {
	ns := func(name string, deleted time.Duration) (n corev1.Namespace) {
		n.Name = name
		if deleted > 0 {
			at := ago(deleted)
			n.DeletionTimestamp = &at
		}
		n.Status.Conditions = []corev1.NamespaceCondition{
			{Type: corev1.NamespaceFinalizersRemaining, Status: corev1.ConditionTrue, Message: "Some content in the namespace has finalizers remaining: example.com/hold in 1 resource instances"},
			{Type: corev1.NamespaceContentRemaining, Status: corev1.ConditionTrue, Message: "Some resources are remaining: configmaps. has 1 resource instances"},
			{Type: corev1.NamespaceDeletionContentFailure, Status: corev1.ConditionFalse, Message: "All content successfully deleted"},
		}
		return n
	}
	expect(t, CheckNamespaces([]corev1.Namespace{ns("lives", 0), ns("goes", time.Minute), ns("stuck", 2*time.Hour)}, 5*time.Minute, now), `
namespaces Findings: 1 finding
  stuck: has been Terminating for 120m: Some content in the namespace has finalizers remaining: example.com/hold in 1 resource instances; Some resources are remaining: configmaps. has 1 resource instances
`)
	expect(t, CheckTerminating([]Dying{
		{Resource: "pods", Namespace: "db", Name: "set-0", Deleted: now.Add(-time.Hour)},
		{Resource: "pods", Namespace: "db", Name: "set-1", Deleted: now.Add(20 * time.Second)}, // its grace is not over
		{Resource: "persistentvolumeclaims", Namespace: "db", Name: "data", Deleted: now.Add(-time.Hour), Finalizers: []string{"kubernetes.io/pvc-protection"}},
		{Resource: "persistentvolumes", Name: "pv-1", Deleted: now.Add(-4 * time.Minute), Finalizers: []string{"x"}},
	}, []string{"pods"}, []string{"listing things: forbidden"}, 5*time.Minute, now), `
terminating Findings: 2 findings
  pods db/set-0: should have been gone for 60m; the kubelet of its node has not ended it
  persistentvolumeclaims db/data: should have been gone for 60m; waits for kubernetes.io/pvc-protection
  not checked: listing things: forbidden
`)
}

const deprecatedPage = `# HELP apiserver_requested_deprecated_apis [STABLE] Gauge of deprecated APIs that have been requested
# TYPE apiserver_requested_deprecated_apis gauge
apiserver_requested_deprecated_apis{group="flowcontrol.apiserver.k8s.io",removed_release="1.32",resource="flowschemas",subresource="status",version="v1beta3"} 1
apiserver_requested_deprecated_apis{group="",removed_release="",resource="componentstatuses",subresource="",version="v1"} 1
apiserver_requested_deprecated_apis{group="example.k8s.io",removed_release="1.40",resource="things",subresource="",version="v1beta1"} 1
apiserver_request_total{code="200"} 17
`

func TestCheckDeprecated(t *testing.T) {
	apis, err := DeprecatedAPIs(strings.NewReader(deprecatedPage))
	if err != nil {
		t.Fatal(err)
	}
	pages := []Metrics{{Address: "a", APIs: apis}, {Address: "b", APIs: apis}, {Address: "c", Err: errors.New("forbidden")}}
	c := CheckDeprecated(pages, "1.32")
	expect(t, c, `
deprecated-apis Findings: 1 finding
  flowcontrol.apiserver.k8s.io/v1beta3 flowschemas/status: is asked for by some client, and gone in 1.32
  not checked: /metrics of c: forbidden
`)
	if notes := strings.Join(c.Notes, "\n"); !strings.Contains(notes, "v1 componentstatuses is asked for by some client; no release without it is decided") ||
		!strings.Contains(notes, "example.k8s.io/v1beta1 things is asked for by some client; gone in 1.40") {
		t.Error(notes)
	}
	expect(t, CheckDeprecated(pages[:1], "1.31"), "deprecated-apis Fit: no client asks for what 1.31 does not serve\n")
}

func TestUpgradeReport(t *testing.T) {
	fit, open, bad := Check{Name: "nodes"}.done("3 nodes Ready"), Failed("api-servers", errors.New("forbidden: \x1b[2J")), Check{Name: "volumes"}
	bad.find("db/data", "is stuck", "do this", "then that")
	bad = bad.done("")
	r := UpgradeReport{Server: "v1.36.3", Target: "1.37", Checks: []Check{fit, Skip("reboots")}}
	if code := r.ExitCode(); code != 0 {
		t.Errorf("fit: %d", code)
	}
	r.Checks = append(r.Checks, open)
	if code := r.ExitCode(); code != 3 {
		t.Errorf("open: %d", code)
	}
	r.Checks = append(r.Checks, bad)
	if code := r.ExitCode(); code != 1 {
		t.Errorf("bad: %d", code)
	}
	var b strings.Builder
	if err := r.WriteTable(&b, Style{}); err != nil {
		t.Fatal(err)
	}
	const want = `API server v1.36.3, questions for an upgrade to 1.37

CHECK              RESULT        SUMMARY
nodes              fit           3 nodes Ready
reboots            skipped       not asked for
api-servers        not checkable not checkable
  could not check: forbidden: \u001b[2J
volumes            findings      1 finding
  db/data: is stuck
      → do this
      → then that

Not fit for 1.37: 1 finding.
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}
