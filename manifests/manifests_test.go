// Package manifests tests what "kubectl apply -f manifests/" installs.
package manifests

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "render host-hygiene.yaml anew")

const (
	rendered = "host-hygiene.yaml"
	header   = "# Rendered from manifests/kustomize/base by \"go test ./manifests -update\"; change it there.\n"
)

// renderings keeps what was rendered, a second each.
var renderings = map[string][]byte{}

// render is what kubectl kustomize prints for a folder.
func render(t *testing.T, dir string) []byte {
	t.Helper()
	if text, ok := renderings[dir]; ok {
		return text
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "-C", "../hack/render", "run", ".", abs)
	cmd.Env = append(os.Environ(), "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("rendering %s: %v\n%s", dir, err, stderr.String())
	}
	renderings[dir] = out
	return out
}

func TestRenderedFileIsCurrent(t *testing.T) {
	want := append([]byte(header), render(t, "kustomize/base")...)
	if *update {
		if err := os.WriteFile(rendered, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(rendered)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("run go test ./manifests -update: (-want +got)\n%s", d)
	}
}

// kubectl reads every .yaml, .yml and .json file of the folder.
func TestFolderHoldsOneFileForKubectl(t *testing.T) {
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !e.IsDir() && e.Name() != rendered && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(e.Name())) {
			t.Errorf("kubectl apply -f manifests/ would also apply %s", e.Name())
		}
	}
}

// installation is one rendered set of manifests, by type.
type installation struct {
	names        []string // "Kind namespace/name", in order
	namespace    corev1.Namespace
	account      corev1.ServiceAccount
	quota        corev1.ResourceQuota
	daemonSet    appsv1.DaemonSet
	services     []corev1.Service
	clusterRoles []rbacv1.ClusterRole
	roles        []rbacv1.Role
	bindings     []rbacv1.RoleBinding
	clusterBinds []rbacv1.ClusterRoleBinding
	policies     []admissionv1.ValidatingAdmissionPolicy
	policyBinds  []admissionv1.ValidatingAdmissionPolicyBinding
	monitors     []podMonitor
	rules        []readinessRule
	config       corev1.ConfigMap
}

// podMonitor is what is judged of one here; test/install has the API server judge
// all of it by the operator's own definitions.
type podMonitor struct {
	Spec struct {
		JobLabel  string               `json:"jobLabel"`
		Selector  metav1.LabelSelector `json:"selector"`
		Endpoints []struct {
			Port        string `json:"port"`
			Relabelings []struct {
				TargetLabel string `json:"targetLabel"`
			} `json:"relabelings"`
		} `json:"podMetricsEndpoints"`
	} `json:"spec"`
}

func load(t *testing.T, text []byte) installation {
	t.Helper()
	var in installation
	for _, doc := range bytes.Split(text, []byte("\n---\n")) {
		var meta struct {
			Kind     string `json:"kind"`
			Metadata struct{ Name, Namespace string }
		}
		if err := yaml.Unmarshal(doc, &meta); err != nil {
			t.Fatal(err)
		}
		in.names = append(in.names, fmt.Sprintf("%s %s/%s", meta.Kind, meta.Metadata.Namespace, meta.Metadata.Name))
		switch meta.Kind {
		case "Namespace":
			in.namespace = decode[corev1.Namespace](t, doc)
		case "ServiceAccount":
			in.account = decode[corev1.ServiceAccount](t, doc)
		case "ResourceQuota":
			in.quota = decode[corev1.ResourceQuota](t, doc)
		case "DaemonSet":
			in.daemonSet = decode[appsv1.DaemonSet](t, doc)
		case "Service":
			in.services = append(in.services, decode[corev1.Service](t, doc))
		case "ClusterRole":
			in.clusterRoles = append(in.clusterRoles, decode[rbacv1.ClusterRole](t, doc))
		case "ClusterRoleBinding":
			in.clusterBinds = append(in.clusterBinds, decode[rbacv1.ClusterRoleBinding](t, doc))
		case "Role":
			in.roles = append(in.roles, decode[rbacv1.Role](t, doc))
		case "RoleBinding":
			in.bindings = append(in.bindings, decode[rbacv1.RoleBinding](t, doc))
		case "ValidatingAdmissionPolicy":
			in.policies = append(in.policies, decode[admissionv1.ValidatingAdmissionPolicy](t, doc))
		case "ValidatingAdmissionPolicyBinding":
			in.policyBinds = append(in.policyBinds, decode[admissionv1.ValidatingAdmissionPolicyBinding](t, doc))
		case "PodMonitor":
			var m podMonitor
			if err := yaml.Unmarshal(doc, &m); err != nil {
				t.Fatal(err)
			}
			in.monitors = append(in.monitors, m)
		case "ConfigMap": // the chart's only
			in.config = decode[corev1.ConfigMap](t, doc)
		case "NodeReadinessRule":
			in.rules = append(in.rules, decode[readinessRule](t, doc))
		case "PrometheusRule": // test/monitoring compares it with its source
		default:
			t.Errorf("unexpected kind %q", meta.Kind)
		}
	}
	return in
}

// decode refuses fields the API does not know.
func decode[T any](t *testing.T, doc []byte) (v T) {
	t.Helper()
	if err := yaml.UnmarshalStrict(doc, &v); err != nil {
		t.Fatalf("%v in\n%s", err, doc)
	}
	return v
}

func loadRendered(t *testing.T) installation {
	t.Helper()
	text, err := os.ReadFile(rendered)
	if err != nil {
		t.Fatal(err)
	}
	return load(t, text)
}

// The whole of what the agent may do in the cluster; the README promises it.
func TestRBACIsExactlyThis(t *testing.T) {
	in := loadRendered(t)
	var got []string
	for _, r := range in.clusterRoles {
		got = append(got, grants("cluster", r.Rules)...)
	}
	for _, r := range in.roles {
		got = append(got, grants(r.Namespace, r.Rules)...)
	}
	want := []string{
		"cluster: get /nodes", "cluster: list /nodes", "cluster: watch /nodes",
		"cluster: patch /nodes/status",
		"cluster: get /nodes/configz", "cluster: get /nodes/pods",
		"cluster: get storage.k8s.io/volumeattachments", "cluster: get /persistentvolumes",
		"default: create /events", "default: patch /events",
		"host-hygiene: get coordination.k8s.io/leases", "host-hygiene: create coordination.k8s.io/leases", "host-hygiene: update coordination.k8s.io/leases",
	}
	slices.Sort(got)
	slices.Sort(want)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	subject := []rbacv1.Subject{{Kind: "ServiceAccount", Name: "host-hygiene-agent", Namespace: "host-hygiene"}}
	for _, b := range in.clusterBinds {
		if d := cmp.Diff(subject, b.Subjects); d != "" || b.RoleRef.Name != "host-hygiene-agent" {
			t.Errorf("cluster role binding %s to %s: %s", b.Name, b.RoleRef.Name, d)
		}
	}
	for _, b := range in.bindings {
		if d := cmp.Diff(subject, b.Subjects); d != "" || b.RoleRef.Kind != "Role" || b.RoleRef.Name != b.Name {
			t.Errorf("role binding %s/%s to %s %s: %s", b.Namespace, b.Name, b.RoleRef.Kind, b.RoleRef.Name, d)
		}
	}
	if len(in.clusterBinds) != 1 || len(in.bindings) != 2 {
		t.Errorf("%d cluster role bindings and %d role bindings, want 1 and 2", len(in.clusterBinds), len(in.bindings))
	}
}

func grants(scope string, rules []rbacv1.PolicyRule) []string {
	var out []string
	for _, r := range rules {
		for _, g := range r.APIGroups {
			for _, res := range r.Resources {
				for _, v := range r.Verbs {
					out = append(out, fmt.Sprintf("%s: %s %s/%s", scope, v, g, res))
				}
			}
		}
		if len(r.NonResourceURLs) > 0 {
			out = append(out, fmt.Sprint(scope, r.NonResourceURLs))
		}
	}
	return out
}

// What the policies' expressions do is proved on a real API server in test/api;
// here, that they are in force and fail closed.
func TestPoliciesAreInForce(t *testing.T) {
	in := loadRendered(t)
	var names []string
	for _, p := range in.policies {
		names = append(names, p.Name)
		if *p.Spec.FailurePolicy != admissionv1.Fail {
			t.Errorf("%s: failure policy %s", p.Name, *p.Spec.FailurePolicy)
		}
		want := "request.userInfo.username == 'system:serviceaccount:" + in.account.Namespace + ":" + in.account.Name + "'"
		if c := p.Spec.MatchConditions; len(c) != 1 || c[0].Expression != want {
			t.Errorf("%s is about %+v", p.Name, c)
		}
		bound := func(b admissionv1.ValidatingAdmissionPolicyBinding) bool {
			return b.Spec.PolicyName == p.Name && b.Spec.MatchResources == nil &&
				slices.Equal(b.Spec.ValidationActions, []admissionv1.ValidationAction{admissionv1.Deny})
		}
		if !slices.ContainsFunc(in.policyBinds, bound) {
			t.Errorf("nothing puts %s in force: %+v", p.Name, in.policyBinds)
		}
	}
	if want := []string{"host-hygiene-agent-leases", "host-hygiene-agent-nodes"}; !slices.Equal(names, want) || len(in.policyBinds) != len(want) {
		t.Errorf("policies %q and %d bindings, want %q", names, len(in.policyBinds), want)
	}
}

func TestDaemonSet(t *testing.T) {
	in := loadRendered(t)
	ds := in.daemonSet
	if ds.Namespace+"/"+ds.Name != "host-hygiene/host-hygiene-agent" {
		t.Errorf("it is %s/%s", ds.Namespace, ds.Name)
	}
	if got := ds.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable.String(); got != "10%" {
		t.Errorf("maxUnavailable %s", got)
	}
	pod := ds.Spec.Template.Spec
	if !pod.HostPID || !pod.HostNetwork || pod.HostIPC {
		t.Errorf("host namespaces: pid %t, network %t, ipc %t", pod.HostPID, pod.HostNetwork, pod.HostIPC)
	}
	if pod.PriorityClassName != "system-node-critical" || pod.ServiceAccountName != "host-hygiene-agent" {
		t.Errorf("priority class %s, service account %s", pod.PriorityClassName, pod.ServiceAccountName)
	}
	if *in.account.AutomountServiceAccountToken || !*pod.AutomountServiceAccountToken {
		t.Error("the token belongs into the agent's pods and nowhere else")
	}
	if d := cmp.Diff([]corev1.Toleration{{Operator: corev1.TolerationOpExists}}, pod.Tolerations); d != "" {
		t.Errorf("it must tolerate everything: %s", d)
	}
	c := pod.Containers[0]
	if len(pod.Containers) != 1 || len(pod.InitContainers) != 0 {
		t.Error("one container is all there is")
	}
	if !strings.HasPrefix(c.Image, "ghcr.io/hosthygiene/agent:v") {
		t.Errorf("image %s", c.Image)
	}
	if s := c.SecurityContext; !*s.Privileged || !*s.ReadOnlyRootFilesystem {
		t.Error("want privileged with a read-only root")
	}
	if d := cmp.Diff([]string{"run", "--config=/etc/host-hygiene/config.yaml"}, c.Args); d != "" {
		t.Errorf("arguments: %s", d)
	}
	var paths []string
	for _, v := range pod.Volumes {
		if v.HostPath != nil {
			paths = append(paths, v.HostPath.Path)
		}
		if v.ConfigMap != nil && !*v.ConfigMap.Optional {
			t.Error("the ConfigMap is the user's and must be optional")
		}
	}
	if d := cmp.Diff([]string{"/var/lib/host-hygiene"}, paths); d != "" {
		t.Errorf("host paths: %s", d)
	}
}

// What the kubelet asks is a wake-up of an idle agent each time. Only /healthz may
// end it: /readyz says no for as long as the API server is away.
func TestProbes(t *testing.T) {
	c := loadRendered(t).daemonSet.Spec.Template.Spec.Containers[0]
	for name, want := range map[string]struct {
		probe *corev1.Probe
		path  string
	}{"startup": {c.StartupProbe, "/healthz"}, "liveness": {c.LivenessProbe, "/healthz"}, "readiness": {c.ReadinessProbe, "/readyz"}} {
		if g := want.probe.HTTPGet; g.Host != "127.0.0.1" || g.Port.IntValue() != 20267 || g.Path != want.path {
			t.Errorf("the %s probe asks %+v", name, g)
		}
	}
	if n := 60/float64(c.LivenessProbe.PeriodSeconds) + 60/float64(c.ReadinessProbe.PeriodSeconds); n > 3 {
		t.Errorf("%.1f questions a minute, want at most 3", n)
	}
	if s := c.StartupProbe; s.PeriodSeconds*s.FailureThreshold < 60 || s.PeriodSeconds > 2 {
		t.Errorf("%+v: want a minute for a busy node, and an answer seen at once", s)
	}
}

// The Go runtime must start to collect before the kernel starts to kill.
func TestMemoryLimits(t *testing.T) {
	c := loadRendered(t).daemonSet.Spec.Template.Spec.Containers[0]
	if got := c.Resources.Requests.Cpu().String() + " " + c.Resources.Requests.Memory().String(); got != "10m 32Mi" {
		t.Errorf("requests %s", got)
	}
	limit := c.Resources.Limits.Memory()
	if limit.String() != "64Mi" || !c.Resources.Limits.Cpu().IsZero() {
		t.Errorf("limits %v: want 64Mi and no CPU limit, which would only delay the report", c.Resources.Limits)
	}
	i := slices.IndexFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "GOMEMLIMIT" })
	if i < 0 {
		t.Fatal("no GOMEMLIMIT")
	}
	mib, ok := strings.CutSuffix(c.Env[i].Value, "MiB")
	n, err := strconv.Atoi(mib)
	if !ok || err != nil || c.Env[i].ValueFrom != nil {
		t.Fatalf("GOMEMLIMIT %+v: want a literal in MiB", c.Env[i])
	}
	if share := float64(n<<20) / float64(limit.Value()); share < 0.77 || share > 0.83 {
		t.Errorf("GOMEMLIMIT is %.0f %% of the limit, want about 80 %%", 100*share)
	}
}

// Linux hosts only: a virtual kubelet or Fargate has none.
func TestNodes(t *testing.T) {
	pod := loadRendered(t).daemonSet.Spec.Template.Spec
	text, err := os.ReadFile(rendered)
	if err != nil {
		t.Fatal(err)
	}
	if err := onLinuxOnly(text); err != nil {
		t.Error(err)
	}
	terms := pod.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	if len(terms) != 1 { // terms are alternatives: a second one would let nodes in
		t.Fatalf("%d terms", len(terms))
	}
	want := []corev1.NodeSelectorRequirement{
		{Key: "type", Operator: corev1.NodeSelectorOpNotIn, Values: []string{"virtual-kubelet"}},
		{Key: "eks.amazonaws.com/compute-type", Operator: corev1.NodeSelectorOpNotIn, Values: []string{"fargate"}},
	}
	if d := cmp.Diff(want, terms[0].MatchExpressions); d != "" {
		t.Error(d)
	}
}

func TestNamespaceAllowsThePod(t *testing.T) {
	in := loadRendered(t)
	for _, mode := range []string{"enforce", "audit", "warn"} {
		if got := in.namespace.Labels["pod-security.kubernetes.io/"+mode]; got != "privileged" {
			t.Errorf("%s is %q", mode, got)
		}
	}
	scope := in.quota.Spec.ScopeSelector.MatchExpressions[0]
	if scope.ScopeName != corev1.ResourceQuotaScopePriorityClass || !slices.Contains(scope.Values, "system-node-critical") {
		t.Errorf("the quota is for %+v", scope)
	}
	quota, workload := slices.Index(in.names, "ResourceQuota host-hygiene/host-hygiene-critical-pods"), slices.Index(in.names, "DaemonSet host-hygiene/host-hygiene-agent")
	if in.names[0] != "Namespace /host-hygiene" || quota < 0 || quota > workload {
		t.Errorf("kubectl applies in this order: %q", in.names)
	}
}

func TestService(t *testing.T) {
	in := loadRendered(t)
	s := in.services[0]
	if s.Spec.ClusterIP != corev1.ClusterIPNone || s.Spec.Ports[0].Port != 20266 {
		t.Errorf("want a headless service on 20266, got %+v", s.Spec)
	}
	for k, v := range s.Spec.Selector {
		if in.daemonSet.Spec.Template.Labels[k] != v {
			t.Errorf("it selects %s=%s, the pods have %q", k, v, in.daemonSet.Spec.Template.Labels[k])
		}
	}
}

// observes holds the least privilege that docs/observe.md gives the reasons for:
// what is added here is added there.
func observes(base, in installation) error {
	pod, was := in.daemonSet.Spec.Template.Spec, base.daemonSet.Spec.Template.Spec
	c := pod.Containers[0]
	want := &corev1.SecurityContext{
		Privileged: new(bool), AllowPrivilegeEscalation: new(bool), ReadOnlyRootFilesystem: was.Containers[0].SecurityContext.ReadOnlyRootFilesystem,
		RunAsUser: new(int64), RunAsGroup: new(int64),
		Capabilities:    &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"SYS_PTRACE", "SYSLOG"}},
		SeccompProfile:  &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		AppArmorProfile: &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeUnconfined},
	}
	var errs []error
	if d := cmp.Diff(want, c.SecurityContext); d != "" {
		errs = append(errs, fmt.Errorf("security context (-want +got): %s", d))
	}
	if !slices.Contains(c.Env, corev1.EnvVar{Name: "HOST_HYGIENE_OBSERVE", Value: "true"}) {
		errs = append(errs, fmt.Errorf("environment %v", c.Env))
	}
	if d := cmp.Diff(was.Containers[0].Args, c.Args); d != "" {
		errs = append(errs, fmt.Errorf("arguments: %s", d))
	}
	for _, v := range pod.Volumes {
		if v.HostPath != nil {
			errs = append(errs, fmt.Errorf("it mounts %s of the host", v.HostPath.Path))
		}
	}
	for _, r := range in.roles {
		for _, rule := range r.Rules {
			if slices.Contains(rule.Resources, "leases") {
				errs = append(errs, fmt.Errorf("role %s still gives it Leases", r.Name))
			}
		}
	}
	if len(in.roles) != len(base.roles)-1 || len(in.bindings) != len(base.bindings)-1 {
		errs = append(errs, fmt.Errorf("%d roles and %d bindings", len(in.roles), len(in.bindings)))
	}
	return errors.Join(errs...)
}

// Every overlay says what it is for; what it does is held here.
func TestOverlays(t *testing.T) {
	base := load(t, render(t, "kustomize/base"))
	dirs, err := filepath.Glob("kustomize/overlays/*")
	if err != nil {
		t.Fatal(err)
	}
	check := map[string]func(installation) error{
		"openshift": func(in installation) error {
			b := in.bindings[slices.IndexFunc(in.bindings, func(b rbacv1.RoleBinding) bool { return b.Name == "host-hygiene-agent-scc" })]
			if b.RoleRef.Name != "system:openshift:scc:privileged" || in.daemonSet.Spec.Template.Annotations["openshift.io/required-scc"] != "privileged" {
				return errors.New("not admitted by the privileged SCC")
			}
			if v, ok := in.namespace.Annotations["openshift.io/node-selector"]; !ok || v != "" {
				return errors.New("the project's node selector would keep it off nodes")
			}
			return nil
		},
		"loopback-metrics": func(in installation) error {
			c := in.daemonSet.Spec.Template.Spec.Containers[0]
			if !slices.Contains(c.Args, "--metrics-address=127.0.0.1:20266") || len(c.Ports) != 0 || len(in.services) != 0 {
				return fmt.Errorf("arguments %q, %d ports, %d services", c.Args, len(c.Ports), len(in.services))
			}
			return nil
		},
		"metrics-tls": func(in installation) error {
			// Rendered without what it adds, it is the base.
			pod := &in.daemonSet.Spec.Template.Spec
			c := &pod.Containers[0]
			last := len(pod.Volumes) - 1
			source := pod.Volumes[last].Projected
			if !slices.Contains(c.Args, "--web.config.file=/etc/host-hygiene-metrics/web.yml") || c.VolumeMounts[len(c.VolumeMounts)-1].MountPath != "/etc/host-hygiene-metrics" {
				return fmt.Errorf("arguments %q, mounts %v", c.Args, c.VolumeMounts)
			}
			if source == nil || len(source.Sources) != 2 || *source.DefaultMode != 0o400 {
				return fmt.Errorf("volume %+v", pod.Volumes[last])
			}
			for _, s := range source.Sources {
				if s.Secret == nil || s.Secret.Optional == nil || !*s.Secret.Optional {
					return fmt.Errorf("a node would not be checked while %+v is missing", s)
				}
			}
			c.Args, c.VolumeMounts, pod.Volumes = c.Args[:len(c.Args)-1], c.VolumeMounts[:len(c.VolumeMounts)-1], pod.Volumes[:last]
			if d := cmp.Diff(base.daemonSet, in.daemonSet); d != "" {
				return fmt.Errorf("it changes more: %s", d)
			}
			return nil
		},
		"before-1.30": func(in installation) error {
			if len(in.policies)+len(in.policyBinds) > 0 {
				return fmt.Errorf("%d policies and %d bindings, which the API server does not know", len(in.policies), len(in.policyBinds))
			}
			if want := slices.DeleteFunc(slices.Clone(base.names), func(n string) bool { return strings.HasPrefix(n, "ValidatingAdmissionPolicy") }); !slices.Equal(want, in.names) {
				return fmt.Errorf("it installs %q", in.names)
			}
			return nil
		},
		"nfd":            func(in installation) error { return tellsNFD(base, in) },
		"observe":        func(in installation) error { return observes(base, in) },
		"readiness-gate": func(in installation) error { return gatesOnce(base, in) },
		// The alerts go by job="host-hygiene-agent" and by the label node.
		"prometheus-operator": func(in installation) error {
			want := append(slices.Clone(base.names), "PodMonitor host-hygiene/host-hygiene-agent", "PrometheusRule host-hygiene/host-hygiene-agent")
			if !slices.Equal(want, in.names) {
				return fmt.Errorf("it installs %q", in.names)
			}
			pod := in.daemonSet.Spec.Template
			m := in.monitors[0].Spec
			for k, v := range m.Selector.MatchLabels {
				if pod.Labels[k] != v {
					return fmt.Errorf("it selects %s=%s, the pods have %q", k, v, pod.Labels[k])
				}
			}
			if got := pod.Labels[m.JobLabel]; got != "host-hygiene-agent" {
				return fmt.Errorf("the job is %q", got)
			}
			if e := m.Endpoints[0]; e.Port != pod.Spec.Containers[0].Ports[0].Name || e.Relabelings[0].TargetLabel != "node" {
				return fmt.Errorf("it scrapes %+v", e)
			}
			return nil
		},
		"remedies": func(in installation) error {
			was, is := base.daemonSet.Spec.Template.Spec.Containers[0].Args, in.daemonSet.Spec.Template.Spec.Containers[0].Args
			if slices.Contains(was, "--allow-remedies") || !slices.Equal(is, append(slices.Clone(was), "--allow-remedies")) {
				return fmt.Errorf("arguments %q", is)
			}
			return nil
		},
	}
	if len(dirs) != len(check) {
		t.Errorf("%d overlays, %d of them tested", len(dirs), len(check))
	}
	for _, dir := range dirs {
		name := filepath.Base(dir)
		t.Run(name, func(t *testing.T) {
			text := render(t, dir)
			in := load(t, text)
			if err := onLinuxOnly(text); err != nil {
				t.Error(err)
			}
			if check[name] == nil {
				t.Fatal("what it does is not tested")
			}
			if err := check[name](in); err != nil {
				t.Error(err)
			}
			if d := cmp.Diff(base.clusterRoles, in.clusterRoles); d != "" {
				t.Errorf("an overlay changes what the agent may do: %s", d)
			}
		})
	}
}
