//go:build cluster

// Package install applies the manifests to a real API server.
package install

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hosthygiene/agent/test/rig"
	"github.com/hosthygiene/agent/test/rig/rigtest"
)

const (
	manifests = "../../manifests/"
	agent     = "system:serviceaccount:host-hygiene:host-hygiene-agent"
)

// Nodes no kubelet stands behind: a host, and two that have none for us.
const nodes = `
apiVersion: v1
kind: Node
metadata: {name: host, labels: {kubernetes.io/os: linux}}
---
apiVersion: v1
kind: Node
metadata: {name: virtual, labels: {kubernetes.io/os: linux, type: virtual-kubelet}}
---
apiVersion: v1
kind: Node
metadata: {name: fargate, labels: {kubernetes.io/os: linux, eks.amazonaws.com/compute-type: fargate}}
---
apiVersion: v1
kind: Node
metadata: {name: windows, labels: {kubernetes.io/os: windows}}
`

// The Prometheus operator's definitions of its resources come with its module.
const (
	operatorModule = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
	operatorSum    = "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s="
)

func operatorDefinitions(t *testing.T, plural string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", operatorModule)
	cmd.Dir = t.TempDir() // outside of our own module, which does not need it
	out, err := cmd.Output()
	var module struct{ Dir, Sum, Error string }
	if jsonErr := json.Unmarshal(out, &module); err != nil || jsonErr != nil || module.Sum != operatorSum {
		t.Fatalf("%s: %v %v %+v", operatorModule, err, jsonErr, module)
	}
	return filepath.Join(module.Dir, "example", "prometheus-operator-crd", "monitoring.coreos.com_"+plural+".yaml")
}

// charts are renderings of the Helm chart; manifests/chart_test.go compares it with
// the overlays object by object, so what is new here is what they do not have.
func charts(t *testing.T) map[string]string {
	t.Helper()
	values := map[string]map[string]any{
		"defaults": {},
		"everything": {
			"openshift": true, "remedies": map[string]any{"allow": true}, "metrics": map[string]any{"mode": "tls"}, "nfd": true, "readinessGate": true, "prometheusOperator": true,
			"config":       "apiVersion: hosthygiene.io/v1alpha1\nkind: AgentConfig\n",
			"nodeSelector": map[string]any{"pool": "storage"}, "imagePullSecrets": []any{map[string]any{"name": "pull"}}, "maxUnavailable": 1,
		},
	}
	in, err := json.Marshal(values)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.Abs("../../charts/host-hygiene")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "-C", "../../hack/chart", "run", ".", dir)
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("rendering the chart: %v", err)
	}
	var outcomes map[string]struct{ Manifest, Error string }
	if err := json.Unmarshal(out, &outcomes); err != nil {
		t.Fatal(err)
	}
	rendered := map[string]string{}
	for name, o := range outcomes {
		if o.Error != "" {
			t.Errorf("the chart with %s: %s", name, o.Error)
			continue
		}
		rendered[name] = o.Manifest
	}
	return rendered
}

func TestInstallAndRemove(t *testing.T) {
	ctx := t.Context()
	cp := rigtest.ControlPlane(t, rig.ControlPlaneOptions{Controllers: true})
	kubectl := func(args ...string) string {
		t.Helper()
		out, err := cp.Kubectl(ctx, args...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	eventually := func(want string, args ...string) {
		t.Helper()
		got := ""
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
			if got = kubectl(args...); got == want {
				return
			}
		}
		t.Errorf("kubectl %s: got %q, want %q", strings.Join(args, " "), got, want)
	}
	cmd := cp.KubectlCommand(ctx, "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(nodes)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}

	kubectl("apply", "--validate=strict", "-f", manifests)
	for line := range strings.Lines(kubectl("apply", "-f", manifests)) {
		if !strings.HasSuffix(strings.TrimSpace(line), " unchanged") {
			t.Errorf("a second apply changes something: %s", line)
		}
	}

	// Namespace labels, quota and priority class let the pods in, on hosts only.
	eventually("1", "-n", "host-hygiene", "get", "daemonset", "host-hygiene-agent", "-o", "jsonpath={.status.desiredNumberScheduled}")
	eventually("host", "-n", "host-hygiene", "get", "pods", "-o",
		"jsonpath={.items[*].spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[*].matchFields[*].values[*]}")

	for _, tt := range []struct{ want, may string }{
		{"yes", "get nodes"}, {"yes", "list nodes"}, {"yes", "watch nodes"}, {"no", "patch nodes"}, {"no", "update nodes"}, {"no", "delete nodes"},
		{"yes", "patch nodes --subresource=status"}, {"no", "update nodes --subresource=status"},
		{"yes", "get nodes --subresource=configz"}, {"yes", "get nodes --subresource=pods"},
		{"no", "get nodes --subresource=proxy"}, {"no", "create nodes --subresource=proxy"}, {"no", "get nodes --subresource=log"},
		{"yes", "get volumeattachments"}, {"no", "list volumeattachments"}, {"no", "delete volumeattachments"}, {"no", "watch volumeattachments"},
		{"yes", "get persistentvolumes"}, {"no", "list persistentvolumes"}, {"no", "watch persistentvolumes"}, {"no", "patch persistentvolumes"}, {"no", "get persistentvolumeclaims -A"},
		{"yes", "create events -n default"}, {"yes", "patch events -n default"}, {"no", "create events -n kube-system"}, {"no", "list events -n default"},
		{"yes", "get leases -n host-hygiene"}, {"yes", "create leases -n host-hygiene"}, {"yes", "update leases -n host-hygiene"},
		{"no", "delete leases -n host-hygiene"}, {"no", "get leases -n kube-node-lease"},
		{"no", "get secrets -n host-hygiene"}, {"no", "list pods -A"}, {"no", "create pods --subresource=exec -n host-hygiene"}, {"no", "get configmaps -n host-hygiene"},
	} {
		// It exits with 1 for "no".
		out, _ := cp.KubectlCommand(ctx, append(append([]string{"auth", "can-i"}, strings.Fields(tt.may)...), "--as", agent)...).Output()
		if got := strings.TrimSpace(string(out)); got != tt.want {
			t.Errorf("may the agent %s: got %q, want %q", tt.may, got, tt.want)
		}
	}

	kubectl("apply", "--server-side", "-f", operatorDefinitions(t, "podmonitors"), "-f", operatorDefinitions(t, "prometheusrules"), "-f", "testdata/nodereadinessrules.yaml")
	kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd/podmonitors.monitoring.coreos.com", "crd/prometheusrules.monitoring.coreos.com",
		"crd/nodereadinessrules.readiness.node.x-k8s.io")
	overlays, err := filepath.Glob(manifests + "kustomize/overlays/*")
	if err != nil || len(overlays) < 9 {
		t.Fatalf("overlays %q, %v", overlays, err)
	}
	for _, overlay := range overlays {
		kubectl("apply", "--dry-run=server", "--validate=strict", "-k", overlay)
	}
	for name, text := range charts(t) {
		cmd := cp.KubectlCommand(ctx, "apply", "--dry-run=server", "--validate=strict", "-f", "-")
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "daemonset.apps/host-hygiene-agent") {
			t.Errorf("the chart with %s: %v: %s", name, err, out)
		}
	}

	t.Run("volumes", func(t *testing.T) { volumesAreCompared(t, cp) })

	t.Run("kubectl hygiene", func(t *testing.T) { pluginSees(t, cp) })

	// The node has no kubelet that would end the agent's pod: the namespace waits
	// for the collector of orphaned pods, which takes most of a minute.
	kubectl("delete", "--timeout=3m", "-f", manifests)
	if left := kubectl("get", "clusterroles,clusterrolebindings,roles,rolebindings,namespaces", "-A", "-l", "app.kubernetes.io/part-of=host-hygiene", "-o", "name"); left != "" {
		t.Errorf("left behind: %s", left)
	}
}
