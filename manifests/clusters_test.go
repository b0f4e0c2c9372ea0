package manifests

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/report"
)

// readinessRule is a NodeReadinessRule of the node-readiness-controller,
// readiness.node.x-k8s.io/v1alpha1, whole.
type readinessRule struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		EnforcementMode string `json:"enforcementMode"`
		Conditions      []struct {
			Type           string `json:"type"`
			RequiredStatus string `json:"requiredStatus"`
		} `json:"conditions"`
		Taint        corev1.Taint         `json:"taint"`
		NodeSelector metav1.LabelSelector `json:"nodeSelector"`
	} `json:"spec"`
}

// gatesOnce: the gate opens once for each node, by our condition, and is held on
// just those nodes that have an agent to open it.
func gatesOnce(base, in installation) error {
	if d := cmp.Diff(base.daemonSet, in.daemonSet); d != "" {
		return fmt.Errorf("the agent differs: %s", d)
	}
	if len(in.rules) != 1 {
		return fmt.Errorf("%d rules", len(in.rules))
	}
	r := in.rules[0].Spec
	if r.EnforcementMode != "bootstrap-only" {
		return fmt.Errorf("mode %q: one outage of a time server would put the taint on every node", r.EnforcementMode)
	}
	if len(r.Conditions) != 1 || r.Conditions[0].Type != report.ReadyType || r.Conditions[0].RequiredStatus != "True" {
		return fmt.Errorf("it waits for %+v", r.Conditions)
	}
	if !strings.HasPrefix(r.Taint.Key, "readiness.k8s.io/") || r.Taint.Effect != corev1.TaintEffectNoSchedule {
		return fmt.Errorf("taint %+v", r.Taint)
	}
	comment, err := os.ReadFile("kustomize/overlays/readiness-gate/kustomization.yaml")
	if flag := "--register-with-taints=" + r.Taint.ToString(); err != nil || !bytes.Contains(comment, []byte(flag)) {
		return fmt.Errorf("the kubelet is not told %s: %v", flag, err)
	}
	pod := in.daemonSet.Spec.Template.Spec
	if d := cmp.Diff(pod.NodeSelector, r.NodeSelector.MatchLabels); d != "" {
		return fmt.Errorf("it is for other nodes than the DaemonSet: %s", d)
	}
	var terms []metav1.LabelSelectorRequirement
	for _, t := range pod.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0].MatchExpressions {
		terms = append(terms, metav1.LabelSelectorRequirement{Key: t.Key, Operator: metav1.LabelSelectorOperator(t.Operator), Values: t.Values})
	}
	if d := cmp.Diff(terms, r.NodeSelector.MatchExpressions); d != "" {
		return fmt.Errorf("it is for other nodes than the DaemonSet: %s", d)
	}
	return nil
}

// tellsNFD: the agent writes into the one folder that NFD's worker reads, which is
// all the overlay adds.
func tellsNFD(base, in installation) error {
	const dir = "/etc/kubernetes/node-feature-discovery/features.d" // source/local of NFD
	pod := &in.daemonSet.Spec.Template.Spec
	c := &pod.Containers[0]
	mount, volume := c.VolumeMounts[len(c.VolumeMounts)-1], pod.Volumes[len(pod.Volumes)-1]
	file, ok := strings.CutPrefix(c.Args[len(c.Args)-1], "--nfd-features-file="+dir+"/")
	if !ok || strings.HasPrefix(file, ".") || strings.Contains(file, "/") {
		return fmt.Errorf("it writes %s", c.Args[len(c.Args)-1])
	}
	if mount.Name != volume.Name || mount.MountPath != dir || volume.HostPath == nil || volume.HostPath.Path != dir {
		return fmt.Errorf("mount %+v of %+v", mount, volume)
	}
	c.Args, c.VolumeMounts, pod.Volumes = c.Args[:len(c.Args)-1], c.VolumeMounts[:len(c.VolumeMounts)-1], pod.Volumes[:len(pod.Volumes)-1]
	if d := cmp.Diff(base.daemonSet, in.daemonSet); d != "" {
		return fmt.Errorf("it changes more: %s", d)
	}
	return nil
}

// onLinuxOnly finds every pod in a set of manifests, of whatever kind of workload:
// a Windows node in a mixed cluster is left alone.
func onLinuxOnly(text []byte) error {
	pods := 0
	var errs []error
	for _, doc := range bytes.Split(text, []byte("\n---\n")) {
		var object map[string]any
		if err := yaml.Unmarshal(doc, &object); err != nil {
			return err
		}
		for _, spec := range podSpecs(object) {
			pods++
			selector, _ := spec["nodeSelector"].(map[string]any)
			if selector["kubernetes.io/os"] != "linux" {
				errs = append(errs, fmt.Errorf("pods of %s %v may run on Windows: nodeSelector %v", object["kind"], object["metadata"], selector))
			}
		}
	}
	if pods == 0 {
		errs = append(errs, errors.New("no pods found"))
	}
	return errors.Join(errs...)
}

// podSpecs are the maps that hold containers, wherever they stand.
func podSpecs(v any) (found []map[string]any) {
	switch v := v.(type) {
	case map[string]any:
		if _, ok := v["containers"]; ok {
			return []map[string]any{v}
		}
		for _, child := range v {
			found = append(found, podSpecs(child)...)
		}
	case []any:
		for _, child := range v {
			found = append(found, podSpecs(child)...)
		}
	}
	return found
}

func TestOnLinuxOnlySees(t *testing.T) {
	for text, want := range map[string]bool{
		"kind: Pod\nspec: {containers: [], nodeSelector: {kubernetes.io/os: linux}}":                              true,
		"kind: Pod\nspec: {containers: []}":                                                                       false,
		"kind: CronJob\nspec: {jobTemplate: {spec: {template: {spec: {containers: []}}}}}":                        false,
		"kind: List\nitems: [{kind: Pod, spec: {containers: [], nodeSelector: {kubernetes.io/os: windows}}}]":     false,
		"kind: Pod\nspec: {containers: [], nodeSelector: {kubernetes.io/os: linux}}\n---\nspec: {containers: []}": false,
		"kind: ConfigMap": false,
	} {
		if err := onLinuxOnly([]byte(text)); (err == nil) != want {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// repairers are the systems that replace, reboot, drain or taint a node for what
// its conditions say, and the types that each knows by itself. docs/clusters.md has
// this table with what they do, and the sources.
var repairers = []struct {
	name   string
	source string
	types  []string
}{
	{"Kubernetes: the kubelet, the node lifecycle controller, cloud providers' routes",
		"https://kubernetes.io/docs/reference/node/node-status/#condition",
		[]string{"Ready", "DiskPressure", "MemoryPressure", "PIDPressure", "NetworkUnavailable"}},
	{"EKS node auto repair, EKS Auto Mode, Karpenter for AWS",
		"https://docs.aws.amazon.com/eks/latest/userguide/node-repair.html",
		[]string{"Ready", "AcceleratedHardwareReady", "ContainerRuntimeReady", "KernelReady", "NetworkingReady", "StorageReady", "DiskPressure", "MemoryPressure"}},
	{"AKS node auto-repair",
		"https://learn.microsoft.com/en-us/azure/aks/node-auto-repair",
		[]string{"Ready"}},
	{"node-problem-detector in AKS nodes",
		"https://learn.microsoft.com/en-us/azure/aks/node-problem-detector",
		[]string{"FilesystemCorruptionProblem", "KubeletProblem", "ContainerRuntimeProblem", "VMEventScheduled", "FrequentUnregisterNetDevice",
			"FrequentKubeletRestart", "FrequentContainerdRestart", "FrequentDockerRestart", "KernelDeadlock", "ReadonlyFilesystem", "GPUMissing"}},
	{"GKE node auto-repair",
		"https://cloud.google.com/kubernetes-engine/docs/how-to/node-auto-repair",
		[]string{"Ready", "DiskPressure"}},
	{"Karpenter for Azure",
		"https://github.com/Azure/karpenter-provider-azure/blob/main/pkg/cloudprovider/cloudprovider.go",
		[]string{"Ready"}},
	{"Karpenter for GCP",
		"https://github.com/cloudpilot-ai/karpenter-provider-gcp/pull/266",
		[]string{"Ready", "KernelDeadlock", "ReadonlyFilesystem", "FrequentKubeletRestart", "FrequentContainerdRestart"}},
	{"Cluster API and OpenShift MachineHealthCheck, by the examples of their documents",
		"https://cluster-api.sigs.k8s.io/tasks/automated-machine-management/healthchecking",
		[]string{"Ready"}},
	{"draino, which writes one itself and acts on those it is told",
		"https://github.com/planetlabs/draino",
		[]string{"DrainScheduled"}},
	{"node-problem-detector, by its own configuration files",
		"https://github.com/kubernetes/node-problem-detector/tree/master/config",
		[]string{"KernelDeadlock", "ReadonlyFilesystem", "CorruptDockerOverlay2", "DiskBadBlock", "FrequentUnregisterNetDevice", "FrequentKubeletRestart",
			"FrequentDockerRestart", "FrequentContainerdRestart", "KubeletUnhealthy", "ContainerRuntimeUnhealthy", "KubeProxyUnhealthy", "NTPProblem"}},
}

// TestConditionsOfOthers: none of these systems takes a condition of ours for one
// it acts on.
func TestConditionsOfOthers(t *testing.T) {
	ours := []string{report.ReadyType}
	for _, p := range config.Default().Probes.List() {
		ours = append(ours, p.Condition())
	}
	if len(ours) < 12 {
		t.Fatalf("only %q", ours)
	}
	doc, err := os.ReadFile("../docs/clusters.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range repairers {
		for _, typ := range r.types {
			// Not even when somebody compares without regard to case.
			if i := slices.IndexFunc(ours, func(o string) bool { return strings.EqualFold(o, typ) }); i >= 0 {
				t.Errorf("%s acts on %s, which we publish (%s)", r.name, typ, r.source)
			}
			if !bytes.Contains(doc, []byte("`"+typ+"`")) {
				t.Errorf("docs/clusters.md does not name %s of %s", typ, r.name)
			}
		}
		if !bytes.Contains(doc, []byte(r.source)) {
			t.Errorf("docs/clusters.md does not name the source %s", r.source)
		}
	}
	for _, o := range ours {
		if prefix, name, ok := strings.Cut(o, "/"); !ok || prefix != "hosthygiene.io" || name == "" {
			t.Errorf("%s lacks the prefix that keeps it apart from others", o)
		}
	}
}
