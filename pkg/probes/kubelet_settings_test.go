package probes

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestKubeletSettings(t *testing.T) { runCases(t, "kubelet-settings", DefaultKubeletSettings) }

// TestKubeletVersions holds the table to facts of kubernetes' history, and to its
// own shape: a row that can not be read would never be told of.
func TestKubeletVersions(t *testing.T) {
	for name, want := range map[string]kubeletFlag{
		"containerized":               {14, 16, ""},
		"experimental-fail-swap-on":   {14, 14, ""},
		"network-plugin":              {21, 24, ""},
		"container-runtime":           {24, 27, ""},
		"pod-infra-container-image":   {24, 35, ""},
		"logtostderr":                 {23, 26, ""},
		"keep-terminated-pod-volumes": {14, 31, ""},
		"maximum-dead-containers":     {14, 0, ""},
	} {
		got, ok := flagHistory(name)
		got.says = ""
		if !ok || got != want {
			t.Errorf("--%s: %+v, %v; want %+v", name, got, ok, want)
		}
	}
	for name, want := range map[string]kubeletGate{
		"SupportNodePidsLimit":    {locked: 20, lockedTo: true, removed: 23},
		"DynamicKubeletConfig":    {removed: 26},
		"KubeletFineGrainedAuthz": {locked: 36, lockedTo: true},
		"SidecarContainers":       {locked: 33, lockedTo: true, removed: 37},
	} {
		if got, ok := gateHistory(name); !ok || got != want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, ok, want)
		}
	}
	for _, name := range []string{"config", "v", "logging-format", "housekeeping-interval", "", "a\tb", "known"} {
		if got, ok := flagHistory(name); ok {
			t.Errorf("--%s: %+v, want nothing told of it", name, got)
		}
	}
	newest := newestKubelet()
	if newest < 37 {
		t.Errorf("the newest version known is 1.%d", newest)
	}
	for i, line := range strings.Split(strings.TrimSuffix(kubeletVersions, "\n"), "\n") {
		f := strings.Split(line, "\t")
		switch {
		case strings.HasPrefix(line, "#"), f[0] == "known" && len(f) == 3:
		case f[0] == "flag" && len(f) == 5:
			if h, ok := flagHistory(f[1]); !ok || h.removed == 0 && h.deprecated == 0 || max(h.removed, h.deprecated) > newest {
				t.Errorf("line %d: %+v", i+1, h)
			}
		case f[0] == "gate" && len(f) == 6:
			if h, ok := gateHistory(f[1]); !ok || h.removed == 0 && h.locked == 0 || max(h.removed, h.locked) > newest {
				t.Errorf("line %d: %+v", i+1, h)
			}
		default:
			t.Errorf("line %d: %q", i+1, line)
		}
	}
}

func TestMinorVersion(t *testing.T) {
	for version, want := range map[string]int{
		"v1.36.3": 36, "1.30.5-gke.1014000": 30, "v1.29.4+k3s1": 29, "v1.24": 24,
		"": 0, "v2.1": 0, "v1.": 0, "v1.x": 0, "v1.99999999999": 0,
	} {
		if got := minorVersion(version); got != want {
			t.Errorf("%q: %d, want %d", version, got, want)
		}
	}
}

func TestFlagWords(t *testing.T) {
	for text, want := range map[string][]string{
		"KUBELET_KUBEADM_ARGS=\"--container-runtime=remote --pod-infra-container-image=x\"\n":                             {"--container-runtime=remote", "--pod-infra-container-image=x"},
		"KUBELET_EXTRA_ARGS=--node-ip 10.0.0.1\n":                                                                         {"--node-ip", "10.0.0.1"},
		"# --gone\n; --gone\n\n[Service]\nExecStart=\nExecStart=/usr/bin/kubelet $KUBELET_ARGS --config /x \\\n  --v=2\n": {"--config", "/x", "--v=2"},
		"ExecStart=/usr/bin/kubelet --kubeconfig $X\n":                                                                    {"--kubeconfig"},
		"A=b-- c\n": nil,
	} {
		if d := cmp.Diff(want, flagWords([]byte(text))); d != "" {
			t.Errorf("%q (-want +got)\n%s", text, d)
		}
	}
}

func TestParseSelectors(t *testing.T) {
	const pods = `{"kind":"PodList","items":[
{"metadata":{"name":"b","namespace":"x"},"spec":{"nodeSelector":{"beta.kubernetes.io/os":"linux","disk":"ssd"}}},
{"metadata":{"name":"a","namespace":"x"},"spec":{"nodeSelector":{"beta.kubernetes.io/os":"linux"},"affinity":{"nodeAffinity":{
 "requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"beta.kubernetes.io/os","operator":"In","values":["linux"]}]}]},
 "preferredDuringSchedulingIgnoredDuringExecution":[{"weight":1,"preference":{"matchExpressions":[{"key":"failure-domain.beta.kubernetes.io/zone","operator":"Exists"}]}}]}}}},
{"metadata":{"name":"annotated","annotations":{"x":"beta.kubernetes.io/os"}},"spec":{}}]}`
	got, err := parseSelectors(strings.NewReader(pods))
	want := map[string][]string{"beta.kubernetes.io/os": {"x/a", "x/b"}, "failure-domain.beta.kubernetes.io/zone": {"x/a"}}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("%v (-want +got)\n%s", err, d)
	}
	if got, err := parseSelectors(strings.NewReader(`{"items":[{"metadata":{"name":"a"}}]}`)); got != nil || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "<html>", `{"items":[{"spec":{"nodeSelector":{"beta.kubernetes.io/os"`, `{"items":"beta.kubernetes.io/"}`} {
		if _, err := parseSelectors(strings.NewReader(bad)); err == nil {
			t.Errorf("%q: want an error", bad)
		}
	}
}

func TestParseSwaps(t *testing.T) {
	const head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
	for text, want := range map[string][]string{
		"":   nil,
		head: nil,
		head + "/dev/zram0 partition\t8388604 0 100\n/swap.img file 2097148 0 -2\n": {"/dev/zram0", "/swap.img"},
	} {
		if d := cmp.Diff(want, parseSwaps([]byte(text))); d != "" {
			t.Errorf("%q (-want +got)\n%s", text, d)
		}
	}
}

func FuzzFlagWords(f *testing.F) {
	f.Add([]byte("KUBELET_ARGS=\"--a=b --c d\"\nExecStart=/x --e 'f g'\n"))
	f.Add([]byte("--\n---x\n=--\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for name := range parseKubeletFlags(append([]string{"kubelet"}, flagWords(data)...)) {
			flagHistory(name)
			gateHistory(name)
		}
	})
}

func FuzzParseSelectors(f *testing.F) {
	f.Add([]byte(`{"items":[{"metadata":{"name":"a"},"spec":{"nodeSelector":{"beta.kubernetes.io/os":"linux"}}}]}`))
	f.Add([]byte(`{"items":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		users, err := parseSelectors(bytes.NewReader(data))
		if err != nil && users != nil {
			t.Error("an error, and pods")
		}
		for label, pods := range users {
			if _, old := oldLabels[label]; !old || len(pods) == 0 {
				t.Errorf("%q: %d pods", label, len(pods))
			}
		}
		parseSwaps(data)
	})
}

func FuzzMinorVersion(f *testing.F) {
	f.Add("v1.36.3")
	f.Add("1.999999999999")
	f.Fuzz(func(t *testing.T, version string) {
		if n := minorVersion(version); n < 0 || n > 10000 {
			t.Error(n)
		}
	})
}
