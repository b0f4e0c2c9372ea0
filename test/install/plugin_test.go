//go:build cluster

package install

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/hosthygiene/agent/pkg/cluster"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/fleet"
	"github.com/hosthygiene/agent/test/rig"
)

// fleetNodes are more nodes without a kubelet, in states a kubelet and an agent
// would have written.
const fleetNodes = `
apiVersion: v1
kind: Node
metadata: {name: n-fine, labels: {kubernetes.io/os: linux, fleet: "yes"}}
---
apiVersion: v1
kind: Node
metadata: {name: n-time, labels: {kubernetes.io/os: linux, fleet: "yes"}}
---
apiVersion: v1
kind: Node
metadata: {name: n-disk, labels: {kubernetes.io/os: linux, fleet: "yes"}}
---
apiVersion: v1
kind: Node
metadata: {name: n-dead, labels: {kubernetes.io/os: linux, fleet: "yes"}}
`

// fleetObjects: a namespace that can not end, a volume on a node that is dead,
// and the pod that wants it.
const fleetObjects = `
apiVersion: v1
kind: Namespace
metadata: {name: stuck}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: held, namespace: stuck, finalizers: [example.com/hold]}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: pv-data}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: none
  persistentVolumeReclaimPolicy: Retain
  claimRef: {apiVersion: v1, kind: PersistentVolumeClaim, namespace: default, name: data}
  csi: {driver: csi.example.com, volumeHandle: "1"}
---
apiVersion: storage.k8s.io/v1
kind: VolumeAttachment
metadata: {name: csi-data}
spec: {attacher: csi.example.com, nodeName: n-dead, source: {persistentVolumeName: pv-data}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: db}
---
apiVersion: v1
kind: Pod
metadata: {name: db-2}
spec:
  schedulerName: nobody
  serviceAccountName: db
  automountServiceAccountToken: false
  containers: [{name: db, image: example.invalid/db}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
`

// storedTwice is a custom resource whose storage version has moved: as is how it
// is stored.
func storedTwice(as string) string {
	version := func(name string) string {
		return fmt.Sprintf(`{"name":%q,"served":true,"storage":%t,"schema":{"openAPIV3Schema":{"type":"object"}}}`, name, name == as)
	}
	return `{"apiVersion":"apiextensions.k8s.io/v1","kind":"CustomResourceDefinition","metadata":{"name":"foos.example.com"},
"spec":{"group":"example.com","scope":"Namespaced","names":{"plural":"foos","kind":"Foo","singular":"foo"},"versions":[` + version("v1alpha1") + "," + version("v1") + `]}}`
}

// plugin is kubectl hygiene as a person has it: in the PATH of kubectl.
type plugin struct {
	*rig.ControlPlane
	t    *testing.T
	path string
}

func newPlugin(t *testing.T, cp *rig.ControlPlane) *plugin {
	t.Helper()
	p := &plugin{cp, t, t.TempDir()}
	const source = "../../cmd/kubectl-hygiene"
	build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(p.path, "kubectl-hygiene"), source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	script, err := os.ReadFile(source + "/kubectl_complete-hygiene")
	if err == nil {
		err = os.WriteFile(filepath.Join(p.path, "kubectl_complete-hygiene"), script, 0o755)
	}
	if err == nil {
		err = os.Symlink(cp.KubectlCommand(t.Context()).Path, filepath.Join(p.path, "kubectl"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *plugin) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(p.path, "kubectl"), args...)
	cmd.Env = append(os.Environ(), "PATH="+p.path+":"+os.Getenv("PATH"), "KUBECONFIG="+p.Kubeconfig(), "KUBECACHEDIR="+filepath.Join(p.path, "cache"))
	return cmd
}

// run runs kubectl hygiene and holds its exit code against want.
func (p *plugin) run(want int, args ...string) string {
	p.t.Helper()
	out, err := p.command(p.t.Context(), append([]string{"hygiene"}, args...)...).CombinedOutput()
	code := 0
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		code = exit.ExitCode()
	} else if err != nil {
		p.t.Fatal(err)
	}
	if code != want {
		p.t.Errorf("kubectl hygiene %s exits with %d, want %d:\n%s", strings.Join(args, " "), code, want, out)
	}
	return string(out)
}

func (p *plugin) apply(text string) {
	p.t.Helper()
	cmd := p.KubectlCommand(p.t.Context(), "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		p.t.Fatalf("%v: %s", err, out)
	}
}

func (p *plugin) kubectl(args ...string) string {
	p.t.Helper()
	out, err := p.Kubectl(p.t.Context(), args...)
	if err != nil {
		p.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (p *plugin) eventually(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !ok(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("waited in vain for %s", what)
		}
	}
}

// status writes the status of a node; what is told of a condition is "status
// reason message", ours first and then the kubelet's Ready.
func (p *plugin) status(node, kubelet string, info map[string]string, conditions map[string]string) {
	p.t.Helper()
	now := time.Now().UTC()
	var list []map[string]any
	add := func(kind, says string, since time.Duration) {
		words := strings.SplitN(says, " ", 3)
		list = append(list, map[string]any{"type": kind, "status": words[0], "reason": words[1], "message": words[2],
			"lastHeartbeatTime": now.Format(time.RFC3339), "lastTransitionTime": now.Add(-since).Format(time.RFC3339)})
	}
	for kind, says := range conditions {
		add("hosthygiene.io/"+kind, says, time.Hour)
	}
	add("Ready", kubelet, 10*time.Minute)
	resources := map[string]string{"cpu": "4", "memory": "8Gi", "pods": "110"}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": list, "nodeInfo": info, "capacity": resources, "allocatable": resources}})
	if err != nil {
		p.t.Fatal(err)
	}
	p.kubectl("patch", "node", node, "--subresource=status", "-p", string(patch))
}

// pluginSees is kubectl hygiene on an API server with real controllers: what it
// shows of the nodes, of a watch, of two names in one, of a stuck volume, and what
// stands in the way of an upgrade.
func pluginSees(t *testing.T, cp *rig.ControlPlane) {
	p := newPlugin(t, cp)
	began := time.Now()
	const up, posts = "v1.36.3", "True KubeletReady kubelet is posting ready status"
	p.apply(storedTwice("v1alpha1"))
	p.apply(fleetNodes)
	p.apply(fleetObjects)
	p.kubectl("delete", "namespace", "stuck", "--wait=false")
	fine := map[string]string{"Ready": "True Ready nothing critical", "TimeProblem": "False NoProblem chronyd follows", "DiskProblem": "False NoProblem 4 disks"}
	p.status("n-fine", posts, map[string]string{"kubeletVersion": up, "machineID": "0123", "systemUUID": "a"}, fine)
	p.status("n-time", posts, map[string]string{"kubeletVersion": "v1.32.9", "machineID": "0123", "systemUUID": "b"},
		map[string]string{"Ready": "True Ready nothing critical", "TimeProblem": "True ClockOffsetHigh 0.8 s \x1b[2J", "DiskProblem": "False NoProblem 4 disks"})
	p.status("n-disk", posts, map[string]string{"kubeletVersion": up, "machineID": "2", "systemUUID": "c"},
		map[string]string{"Ready": "False FilesystemReadOnly sda1", "TimeProblem": "Unknown CheckFailed no answer", "DiskProblem": "True FilesystemReadOnly /dev/sda1 refuses writes"})
	p.status("n-dead", "Unknown NodeStatusUnknown Kubelet stopped posting node status.", map[string]string{"kubeletVersion": up, "machineID": "3", "systemUUID": "d"}, fine)

	// The DaemonSet's pods come by themselves; that they run, only a kubelet says.
	agents := func() map[string]string {
		on := map[string]string{}
		for line := range strings.Lines(p.kubectl("-n", "host-hygiene", "get", "pods", "--no-headers", "-o", "custom-columns=N:.spec.nodeName,P:.metadata.name")) {
			if f := strings.Fields(line); len(f) == 2 {
				on[f[0]] = f[1]
			}
		}
		return on
	}
	p.eventually("the DaemonSet's pods", func() bool {
		on := agents()
		return on["n-fine"] != "" && on["n-time"] != "" && on["n-disk"] != ""
	})
	for node, pod := range agents() {
		if strings.HasPrefix(node, "n-") && node != "n-dead" {
			p.kubectl("-n", "host-hygiene", "patch", "pod", pod, "--subresource=status", "-p", `{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}`)
		}
	}

	table := p.run(1, "-l", "fleet=yes")
	t.Logf("kubectl hygiene -l fleet=yes\n%s", table)
	var rows []string
	for line := range strings.Lines(table) {
		rows = append(rows, strings.Join(strings.Fields(line), " "))
	}
	for i, want := range []string{
		"NODE READY AGENT TIME DISKS",
		"n-disk False ok unknown FilesystemReadOnly",
		"n-time True ok ClockOffsetHigh ok",
	} {
		if rows[i] != want {
			t.Errorf("row %d: %q, want %q", i, rows[i], want)
		}
	}
	for _, want := range []string{
		"machine-id " + fleet.Hash("0123") + " n-fine, n-time",
		"default/data (pv-data) is attached to n-dead, not Ready for 10m; waited for by default/db-2",
		"only then: kubectl taint nodes n-dead node.kubernetes.io/out-of-service=nodeshutdown:NoExecute",
		"4 nodes:",
	} {
		if !strings.Contains(table, want) {
			t.Errorf("the table lacks %q", want)
		}
	}
	if wide := p.run(1, "-o", "wide"); strings.Contains(wide, "\x1b") || !strings.Contains(wide, `TIME ClockOffsetHigh since 60m: 0.8 s \u001b[2J`) || !strings.Contains(wide, "v0.1.0") {
		t.Errorf("wide:\n%q", wide)
	}
	var report fleet.Report
	if err := json.Unmarshal([]byte(p.run(1, "-o", "json")), &report); err != nil {
		t.Fatal(err)
	}
	status := map[string]finding.Status{}
	for _, n := range report.Nodes {
		status[n.Name] = n.Status
	}
	if status["windows"] != finding.NotApplicable || status["virtual"] != finding.NotApplicable || status["n-fine"] != finding.OK || status["n-dead"] != finding.Unknown || status["n-disk"] != finding.Problem {
		t.Errorf("statuses: %v", status)
	}
	if y := p.run(1, "-o", "yaml"); !strings.HasPrefix(y, "apiVersion: hosthygiene.io/v1alpha1\n") {
		t.Errorf("yaml: %.80s", y)
	}
	p.run(2, "-o", "xml")
	p.run(2, "--server", "https://127.0.0.1:1", "--request-timeout", "2s")
	if out := p.run(2, "explain", "n-none", "time"); !strings.Contains(out, `no agent runs on a node "n-none"`) {
		t.Errorf("explain on no node: %s", out)
	}
	if out := p.run(2, "explain", "n-time"); !strings.Contains(out, "executing in the pod host-hygiene/host-hygiene-agent-") {
		t.Errorf("explain on a node without a kubelet: %s", out)
	}

	p.watches()
	p.completes()

	p.apply(storedTwice("v1"))
	p.eventually("what holds the namespace", func() bool {
		return strings.Contains(p.kubectl("get", "namespace", "stuck", "-o", "jsonpath={.status.conditions[?(@.status=='True')].message}"), "example.com/hold")
	})
	upgrade := p.run(1, "upgrade-check", "--stuck-after", "1ms", "-o", "wide")
	t.Logf("kubectl hygiene upgrade-check\n%s", upgrade)
	for _, want := range []string{
		"n-disk: hosthygiene.io/DiskProblem FilesystemReadOnly: /dev/sda1 refuses writes",
		"kubelet v1.32.9: is 4 minors older than the API server (1.36.3), 3 are supported, on n-time",
		"foos.example.com: objects may be stored as v1alpha1 besides the storage version v1",
		"kubectl patch crd foos.example.com --subresource=status --type=merge -p '{\"status\":{\"storedVersions\":[\"v1\"]}}'",
		"stuck: has been Terminating for ", "example.com/hold in 1 resource instances",
		"default/data (pv-data): is attached to n-dead",
		"no condition of the probe kubelet on ",
		"the API server at 10.0.2.2:", "not checkable from here",
	} {
		if !strings.Contains(upgrade, want) {
			t.Errorf("upgrade-check lacks %q", want)
		}
	}
	everything := p.run(1, "upgrade-check", "--stuck-after", "1ms", "--all-resources", "--skip", "api-servers,storage-hashes")
	if !strings.Contains(everything, "configmaps stuck/held: should have been gone for ") {
		t.Errorf("upgrade-check --all-resources:\n%s", everything)
	}
	p.run(2, "upgrade-check", "--to", "next")
	p.run(2, "upgrade-check", "--skip", "nothing")

	p.asksDirectly()
	t.Logf("all of it took %s", time.Since(began).Round(100*time.Millisecond))

	p.kubectl("patch", "configmap", "-n", "stuck", "held", "--type=merge", "-p", `{"metadata":{"finalizers":null}}`)
	p.kubectl("delete", "node", "-l", "fleet=yes")
	p.kubectl("delete", "crd/foos.example.com", "volumeattachment/csi-data", "pv/pv-data", "pod/db-2", "--wait=false")
}

// watches: a condition that changes is shown without being asked for.
func (p *plugin) watches() {
	ctx, stop := context.WithTimeout(p.t.Context(), time.Minute)
	defer stop()
	cmd := p.command(ctx, "hygiene", "-l", "fleet=yes", "--watch")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		p.t.Fatal(err)
	}
	first, told := false, false
	for lines := bufio.NewScanner(out); lines.Scan(); {
		row := strings.Join(strings.Fields(lines.Text()), " ")
		if row == "n-fine True ok ok ok" && !first {
			first = true
			p.kubectl("patch", "node", "n-fine", "--subresource=status", "-p",
				`{"status":{"conditions":[{"type":"hosthygiene.io/TimeProblem","status":"True","reason":"NoTimeDaemon","message":"gone"}]}}`)
		}
		if row == "n-fine True ok NoTimeDaemon ok" && !told {
			told = true
			stop()
		}
	}
	_ = cmd.Wait() // 0, or the signal's
	if !first || !told {
		p.t.Errorf("the watch has shown the table: %t, the change: %t", first, told)
	}
}

// completes: kubectl asks the plugin by the script that is shipped with it.
func (p *plugin) completes() {
	out, err := p.command(p.t.Context(), "__complete", "hygiene", "explain", "n-").Output()
	if err != nil || !strings.Contains(string(out), "n-disk\n") {
		p.t.Errorf("completing a node: %v: %s", err, out)
	}
	out, err = p.command(p.t.Context(), "__complete", "hygiene", "explain", "n-disk", "").Output()
	if err != nil || !strings.Contains(string(out), "disks\tFilesystemReadOnly\n") {
		p.t.Errorf("completing a probe: %v: %s", err, out)
	}
}

// asksDirectly: the API server under the address it announces, which leads to it
// from a guest only.
func (p *plugin) asksDirectly() {
	config, err := clientcmd.BuildConfigFromFlags("", p.Kubeconfig())
	if err != nil {
		p.t.Fatal(err)
	}
	config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, strings.Replace(address, "10.0.2.2:", "127.0.0.1:", 1))
	}
	client, err := cluster.New(config)
	if err != nil {
		p.t.Fatal(err)
	}
	servers, pages, err := client.APIServers(p.t.Context())
	if err != nil || len(servers) != 1 || servers[0].Err != nil || len(servers[0].Hashes) < 30 || servers[0].Hashes["pods"] == "" {
		p.t.Errorf("the API server itself: %+v, %v", servers, err)
	}
	if len(pages) != 1 || pages[0].Err != nil {
		p.t.Errorf("its metrics: %+v", pages)
	}
}
