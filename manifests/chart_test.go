package manifests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

const chart = "../charts/host-hygiene"

// chartFiles are the objects that the chart has no choice about: by file of the
// chart, where they are copied from and which.
var chartFiles = []struct {
	file, from string
	take       func(kind, name string) bool
}{
	{"account", "kustomize/base", func(kind, name string) bool {
		return kind == "ServiceAccount" || kind == "ClusterRole" || kind == "ClusterRoleBinding" || kind == "ResourceQuota" || name == "default/host-hygiene-agent-events"
	}},
	{"leases", "kustomize/base", func(kind, name string) bool {
		return strings.HasPrefix(kind, "Role") && name == "host-hygiene/host-hygiene-agent"
	}},
	{"policies", "kustomize/base", func(kind, _ string) bool { return strings.HasPrefix(kind, "ValidatingAdmissionPolicy") }},
	{"service", "kustomize/base", func(kind, _ string) bool { return kind == "Service" }},
	{"openshift", "kustomize/overlays/openshift", func(_, name string) bool { return name == "host-hygiene/host-hygiene-agent-scc" }},
	{"readiness-gate", "kustomize/overlays/readiness-gate", func(kind, _ string) bool { return kind == "NodeReadinessRule" }},
	{"prometheus-operator", "kustomize/overlays/prometheus-operator", func(kind, _ string) bool { return kind == "PodMonitor" || kind == "PrometheusRule" }},
}

// TestRenderedChartFiles keeps what the chart copies from the manifests current.
func TestRenderedChartFiles(t *testing.T) {
	for _, f := range chartFiles {
		var docs []string
		for _, doc := range strings.Split(string(render(t, f.from)), "\n---\n") {
			var o object
			if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
				t.Fatal(err)
			}
			if f.take(o.Kind, o.name()) {
				docs = append(docs, strings.TrimSpace(doc))
			}
		}
		if len(docs) == 0 {
			t.Errorf("%s has nothing for %s", f.from, f.file)
		}
		want := "# Copied from manifests/" + f.from + " by \"make generate\".\n" + strings.Join(docs, "\n---\n") + "\n"
		file := filepath.Join(chart, "files", f.file+".yaml")
		if *update {
			if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, string(got)); d != "" {
			t.Errorf("run make generate: (-want +got)\n%s", d)
		}
	}
}

// The chart, the agent it installs and the manifests have one version.
func TestChartVersion(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(chart, "Chart.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var meta struct{ Version, AppVersion string }
	if err := yaml.Unmarshal(data, &meta); err != nil {
		t.Fatal(err)
	}
	_, tag, _ := strings.Cut(loadRendered(t).daemonSet.Spec.Template.Spec.Containers[0].Image, ":")
	if meta.AppVersion != tag || "v"+meta.Version != tag {
		t.Errorf("chart %s of the agent %s, the manifests have %s", meta.Version, meta.AppVersion, tag)
	}
}

type object struct {
	Kind     string
	Metadata struct{ Name, Namespace string }
}

func (o object) name() string { return o.Metadata.Namespace + "/" + o.Metadata.Name }

// objects are the documents of a text by kind and name, as JSON would hold them.
func objects(t *testing.T, text []byte) map[string]any {
	t.Helper()
	found := map[string]any{}
	for _, doc := range bytes.Split(text, []byte("\n---\n")) {
		var o object
		var whole map[string]any
		if err := yaml.Unmarshal(doc, &whole); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		if err := yaml.Unmarshal(doc, &o); err != nil {
			t.Fatal(err)
		}
		if whole == nil { // comments only
			continue
		}
		key := o.Kind + " " + o.name()
		if found[key] != nil {
			t.Errorf("%s twice", key)
		}
		found[key] = whole
	}
	return found
}

// outcome is what hack/chart says of one set of values.
type outcome struct {
	Manifest, Error string
	Lint            []string
}

// helm renders and lints the chart with each set of values.
func helm(t *testing.T, cases map[string]map[string]any) map[string]outcome {
	t.Helper()
	in, err := json.Marshal(cases)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.Abs(chart)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "-C", "../hack/chart", "run", ".", dir)
	cmd.Env = append(os.Environ(), "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	var outcomes map[string]outcome
	if err := json.Unmarshal(out, &outcomes); err != nil {
		t.Fatal(err)
	}
	return outcomes
}

// chartOverlays are the values that make of the chart what an overlay is.
var chartOverlays = map[string]map[string]any{
	"before-1.30":         {"admissionPolicies": false},
	"loopback-metrics":    {"metrics": map[string]any{"mode": "loopback"}},
	"metrics-tls":         {"metrics": map[string]any{"mode": "tls"}},
	"nfd":                 {"nfd": true},
	"observe":             {"observe": true},
	"openshift":           {"openshift": true},
	"prometheus-operator": {"prometheusOperator": true},
	"readiness-gate":      {"readinessGate": true},
	"remedies":            {"remedies": map[string]any{"allow": true}},
}

// TestChart: who installs by Helm has the same, object by object, as who installs
// by kubectl.
func TestChart(t *testing.T) {
	const config = "apiVersion: hosthygiene.io/v1alpha1\nkind: AgentConfig\nrequire:\n  sysctls: {kernel.pid_max: \">=4194304\"} # {{ untouched }}\n"
	cases := map[string]map[string]any{
		"defaults": {},
		"all at once": {
			"openshift": true, "remedies": map[string]any{"allow": true}, "metrics": map[string]any{"mode": "tls"}, "nfd": true, "config": config,
			"image":        map[string]any{"repository": "registry.example/agent", "digest": "sha256:" + strings.Repeat("a", 64), "pullPolicy": "Always"},
			"nodeSelector": map[string]any{"pool": "storage"}, "tolerations": []any{map[string]any{"key": "x", "operator": "Exists"}},
			"resources": map[string]any{"limits": map[string]any{"memory": "128Mi"}}, "goMemoryLimit": "102MiB",
			"imagePullSecrets": []any{map[string]any{"name": "pull"}}, "extraArgs": []any{"--log-level=debug"}, "maxUnavailable": 1, "namespace": map[string]any{"create": false},
		},
		"Windows":              {"nodeSelector": map[string]any{"kubernetes.io/os": "windows"}},
		"observe and repair":   {"observe": true, "remedies": map[string]any{"allow": true}},
		"observe and nfd":      {"observe": true, "nfd": true},
		"unreachable":          {"prometheusOperator": true, "metrics": map[string]any{"mode": "loopback"}},
		"misspelt":             {"remedies": map[string]any{"allowed": true}},
		"no such mode":         {"metrics": map[string]any{"mode": "mtls"}},
		"config of other kind": {"config": "kind: ConfigMap"},
		"config of no kind":    {"config": "a: ["},
	}
	for name, values := range chartOverlays {
		cases["overlay "+name] = values
	}
	outcomes := helm(t, cases)

	dirs, err := filepath.Glob("kustomize/overlays/*")
	if err != nil {
		t.Fatal(err)
	}
	same := map[string]string{"defaults": "kustomize/base"}
	for _, dir := range dirs {
		name := "overlay " + filepath.Base(dir)
		if cases[name] == nil {
			t.Errorf("the chart can not do what %s does, or it is not tested", dir)
			continue
		}
		same[name] = dir
	}
	if len(dirs) != len(chartOverlays) {
		t.Errorf("%d overlays, %d of them in the chart", len(dirs), len(chartOverlays))
	}
	for name, dir := range same {
		t.Run(name, func(t *testing.T) {
			o := outcomes[name]
			if o.Error != "" || len(o.Lint) > 0 {
				t.Fatalf("error %q, lint %q", o.Error, o.Lint)
			}
			if d := cmp.Diff(objects(t, render(t, dir)), objects(t, []byte(o.Manifest))); d != "" {
				t.Errorf("(-%s +chart)\n%s", dir, d)
			}
		})
	}

	for name, want := range map[string]string{
		"observe and repair":   "observe and remedies.allow contradict each other",
		"observe and nfd":      "observe and nfd contradict each other",
		"unreachable":          "prometheusOperator and metrics.mode=loopback contradict each other",
		"misspelt":             "additional properties 'allowed' not allowed",
		"no such mode":         "metrics/mode",
		"config of other kind": "with kind: AgentConfig",
		"config of no kind":    "config: ",
	} {
		if o := outcomes[name]; !strings.Contains(o.Error, want) {
			t.Errorf("%s: error %q, want %q", name, o.Error, want)
		}
	}

	o := outcomes["all at once"]
	if o.Error != "" || len(o.Lint) > 0 {
		t.Fatalf("error %q, lint %q", o.Error, o.Lint)
	}
	in := load(t, []byte(o.Manifest))
	pod := in.daemonSet.Spec.Template.Spec
	c := pod.Containers[0]
	got := fmt.Sprintln(c.Image, c.ImagePullPolicy, c.Args[2:], c.Env[2].Value, c.Resources.Limits.Memory(), pod.Tolerations[0].Key, pod.ImagePullSecrets[0].Name,
		in.daemonSet.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable, slices.Sorted(maps.Keys(pod.NodeSelector)), len(pod.Volumes), in.namespace.Name)
	want := "registry.example/agent@sha256:" + strings.Repeat("a", 64) + " Always [--web.config.file=/etc/host-hygiene-metrics/web.yml --allow-remedies " +
		"--nfd-features-file=/etc/kubernetes/node-feature-discovery/features.d/host-hygiene --log-level=debug] 102MiB 128Mi x pull 1 [kubernetes.io/os pool] 4 \n"
	if got != want {
		t.Errorf("got  %swant %s", got, want)
	}
	if got := in.config.Data["config.yaml"]; got != config {
		t.Errorf("the config became %q", got)
	}
	if err := onLinuxOnly([]byte(outcomes["Windows"].Manifest)); err != nil {
		t.Error(err)
	}
}
