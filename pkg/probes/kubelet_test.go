package probes

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

// TestKubelet runs testdata/kubelet: which process is the kubelet, and what it
// was told.
func TestKubelet(t *testing.T) {
	files, err := filepath.Glob("testdata/kubelet/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases (%v)", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			h := hosttest.New(t, ar)
			got := describeKubelet(t.Context(), h)
			want, _ := h.Section("want")
			if *update && got != want {
				setSection(ar, "want", got)
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func describeKubelet(ctx context.Context, h *hosttest.Host) string {
	var b strings.Builder
	k, ok, err := FindKubelet(ctx, h)
	if err != nil {
		fmt.Fprintf(&b, "error: %v\n", err)
	}
	if !ok {
		return b.String() + "no kubelet\n"
	}
	fmt.Fprintf(&b, "%s, PID %d, root %s, own mounts %v, own root %v\n", k.Program, k.PID, k.RootDir, k.OwnMounts, k.OwnRoot)
	if k.FlagsUnseen != "" {
		fmt.Fprintf(&b, "flags unseen: %s\n", k.FlagsUnseen)
	}
	if c, err := k.ConfigOnRestart(ctx, h); err != nil {
		fmt.Fprintf(&b, "on restart: error: %v\n", err)
	} else {
		fmt.Fprintf(&b, "on restart: %+v\n", c)
	}
	if c, err := LiveKubeletConfig(ctx, h); err != nil {
		fmt.Fprintf(&b, "running: error: %v\n", err)
	} else {
		fmt.Fprintf(&b, "running: %+v\n", c)
	}
	return b.String()
}

func TestKubeletFlags(t *testing.T) {
	for _, test := range []struct {
		argv []string
		want KubeletFlags
	}{
		{nil, KubeletFlags{}},
		{[]string{"kubelet"}, KubeletFlags{}},
		{[]string{"kubelet", "--a=1", "--b", "2", "--c", "--d=x=y"}, KubeletFlags{"a": {"1"}, "b": {"2"}, "c": {"true"}, "d": {"x=y"}}},
		{[]string{"kubelet", "--oom_score_adj", "-999", "--pod-max-pids", "-1"}, KubeletFlags{"oom-score-adj": {"-999"}, "pod-max-pids": {"-1"}}},
		{[]string{"hyperkube", "kubelet", "--root-dir", "/x", "-v", "2"}, KubeletFlags{"root-dir": {"/x"}}},
		{[]string{"kubelet", "--config="}, KubeletFlags{"config": {""}}},
		{[]string{"kubelet", "--config"}, KubeletFlags{"config": {"true"}}},
		{[]string{"kubelet", "--system-reserved=pid=1", "--system-reserved", "cpu=1"}, KubeletFlags{"system-reserved": {"pid=1", "cpu=1"}}},
		{[]string{"kubelet", "--", "--config=x"}, KubeletFlags{}},
		{[]string{"kubelet", "--cgroups-per-qos=false", "---x"}, KubeletFlags{"cgroups-per-qos": {"false"}, "-x": {"true"}}},
	} {
		if d := cmp.Diff(test.want, parseKubeletFlags(test.argv)); d != "" {
			t.Errorf("%q (-want +got)\n%s", test.argv, d)
		}
	}
}

// TestMergeKubeletConfig follows RFC 7386, appendix A, where it matters here.
func TestMergeKubeletConfig(t *testing.T) {
	for _, test := range []struct{ base, file, want string }{
		{`{}`, "", `{}`},
		{`{"a":1}`, "# nothing\n", `{"a":1}`},
		{`{"systemReserved":{"cpu":"1","pid":"1"}}`, `systemReserved: {pid: "2"}`, `{"systemReserved":{"cpu":"1","pid":"2"}}`},
		{`{"systemReserved":{"cpu":"1","pid":"1"}}`, `systemReserved: {pid: null}`, `{"systemReserved":{"cpu":"1"}}`},
		{`{"enforceNodeAllocatable":["pods","system-reserved"]}`, `enforceNodeAllocatable: [none]`, `{"enforceNodeAllocatable":["none"]}`},
		{`{"maxPods":1}`, `{"maxPods":null}`, `{}`},
	} {
		got, err := mergeKubeletConfig([]byte(test.base), []byte(test.file))
		if err != nil {
			t.Errorf("%s + %s: %v", test.base, test.file, err)
			continue
		}
		if d := cmp.Diff(canonical(t, test.want), canonical(t, string(got))); d != "" {
			t.Errorf("%s + %s (-want +got)\n%s", test.base, test.file, d)
		}
	}
	for _, file := range []string{"- a\n", "text", "\x00", "a: [", "a: 1\na: {"} {
		if got, err := mergeKubeletConfig([]byte("{}"), []byte(file)); err == nil {
			t.Errorf("%q: want an error, got %s", file, got)
		}
	}
}

func canonical(t *testing.T, text string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestConfigErrorsHideContent: a message about a broken file goes to the API
// server, the file's text must not.
func TestConfigErrorsHideContent(t *testing.T) {
	const secret = "hunter2hunter2"
	for _, file := range []string{
		"staticPodURLHeader: {Authorization: [" + secret, secret, "maxPods: " + secret, "systemReserved: {pid: {" + secret + ": 1}}",
		"cgroupsPerQOS: \"" + secret + "\"", "enforceNodeAllocatable: " + secret,
	} {
		merged, err := mergeKubeletConfig([]byte("{}"), []byte(file))
		if err == nil {
			_, err = decodeKubeletConfig(merged)
		}
		if err == nil {
			t.Errorf("%q: want an error", file)
		} else if strings.Contains(err.Error(), secret) {
			t.Errorf("%q: the error shows the file's text: %v", file, err)
		}
	}
}

func FuzzKubeletFlags(f *testing.F) {
	f.Add([]byte("/usr/bin/kubelet\x00--config\x00/var/lib/kubelet/config.yaml\x00--kubeconfig\x00/etc/kubernetes/kubelet.conf\x00--node-ip\x0010.0.2.15\x00"))
	f.Add([]byte("kubelet\x00--system-reserved=pid=1k,cpu=1\x00--oom-score-adj\x00-999\x00--enforce-node-allocatable\x00pods\x00--cgroups-per-qos=maybe\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		argv := splitCmdline(data)
		flags := parseKubeletFlags(argv)
		for name, values := range flags {
			if len(values) == 0 || strings.Contains(name, "_") {
				t.Fatalf("%q: %q", name, values)
			}
		}
		c, err := decodeKubeletConfig([]byte("{}"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.override(flags); err == nil && c.ReservedPIDs() < 0 {
			t.Fatalf("negative reservation %d", c.ReservedPIDs())
		}
	})
}

func FuzzKubeletConfig(f *testing.F) {
	f.Add([]byte("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nsystemReserved: {pid: \"1000\"}\n"), []byte(`{"kubeReserved":{"pid":2000},"enforceNodeAllocatable":["pods"]}`))
	f.Add([]byte("a: &a [x]\nb: [*a, *a]\n"), []byte("maxPods: null\n"))
	f.Fuzz(func(t *testing.T, file, dropIn []byte) {
		merged := []byte("{}")
		for _, part := range [][]byte{file, dropIn} {
			next, err := mergeKubeletConfig(merged, part)
			if err != nil {
				return
			}
			if !json.Valid(next) {
				t.Fatalf("merging made %q", next)
			}
			merged = next
		}
		c, err := decodeKubeletConfig(merged)
		if err == nil && (c.ReservedPIDs() < 0 || podLimit(1, c) < 1) {
			t.Fatalf("%+v", c)
		}
	})
}

func FuzzConfigz(f *testing.F) {
	f.Add([]byte(`{"kubeletconfig":{"kind":"KubeletConfiguration","podPidsLimit":1024,"systemReserved":{"pid":"1000"}}}`))
	f.Add([]byte(`{"kubeletconfig":null}`))
	f.Add([]byte(`{"kubeletconfig":{"systemReserved":{"pid":"-1000"},"kubeReserved":{"pid":-1}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if c, err := parseConfigz(data); err == nil && c.ReservedPIDs() < 0 {
			t.Fatalf("%+v", c)
		}
	})
}

func TestKubepodsNames(t *testing.T) {
	for root, want := range map[string][]string{
		"":          {"/kubepods.slice", "/kubepods"},
		"/":         {"/kubepods.slice", "/kubepods"},
		"/kubelet":  {"/kubelet.slice/kubelet-kubepods.slice", "/kubelet/kubepods"},
		"/a-b/c":    {"/a_b.slice/a_b-c.slice/a_b-c-kubepods.slice", "/a-b/c/kubepods"},
		"/../../x/": {"/...slice/..-...slice/..-..-x.slice/..-..-x-kubepods.slice", "/x/kubepods"},
	} {
		if d := cmp.Diff(want, kubepodsNames(root)); d != "" {
			t.Errorf("%q (-want +got)\n%s", root, d)
		}
	}
}

func TestPodCgroup(t *testing.T) {
	const id = "caf3f963e410cb4d9424b6f516999253fbae3aeb6edf999de0bb5cb4acaabf55"
	const uid = "a4280610-1185-4085-9683-9871aaea16b3"
	und := strings.ReplaceAll(uid, "-", "_")
	for name, want := range map[string]podCgroup{
		"/":                                {},
		"/system.slice/containerd.service": {},
		"/kubepods.slice":                  {},
		"/kubepods.slice/kubepods-burstable.slice":                                                                                                                 {},
		"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + und + ".slice":                                                                         {uid, qosBurstable, ""},
		"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + und + ".slice/cri-containerd-" + id + ".scope":                                         {uid, qosBurstable, id},
		"/kubepods.slice/kubepods-pod" + und + ".slice/crio-" + id + ".scope":                                                                                      {uid, qosGuaranteed, id},
		"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + und + ".slice/crio-" + id + ".scope/container/init":                                  {uid, qosBestEffort, id},
		"/kubepods.slice/kubepods-pod" + und + ".slice/crio-conmon-" + id + ".scope":                                                                               {uid, qosGuaranteed, ""},
		"/kubepods/besteffort/pod" + uid + "/" + id:                                                                                                                {uid, qosBestEffort, id},
		"/kubepods/burstable/pod" + uid + "/" + id:                                                                                                                 {uid, qosBurstable, id},
		"/kubepods/pod" + uid + "/" + id:                                                                                                                           {uid, qosGuaranteed, id},
		"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + und + ".slice/cri-containerd-" + id + ".scope": {uid, qosBestEffort, id},
		"/system.slice/containerd.service/kubepods-burstable-pod" + und + ".slice:cri-containerd:" + id:                                                            {uid, qosBurstable, id},
		"/kubepods/burstable/podd6e2a5c1f0b94b3ea2d5c1f0b94b3ea2/" + id:                                                                                            {"d6e2a5c1f0b94b3ea2d5c1f0b94b3ea2", qosBurstable, id},
		"/kubepods/pod":              {},
		"/user.slice/podman-1.scope": {},
	} {
		if got := parsePodCgroup(name); got != want {
			t.Errorf("%s:\n got %+v\nwant %+v", name, got, want)
		}
	}
}

func TestProcCgroup(t *testing.T) {
	for text, want := range map[string]procCgroup{
		"":                                   {},
		"0::/system.slice/kubelet.service\n": {"/system.slice/kubelet.service", "/system.slice/kubelet.service"},
		"12:pids:/p\n5:memory:/m\n1:name=systemd:/s\n0::/u\n": {"/m", "/p"},
		"4:cpu,memory:/both\n1:name=systemd:/s\n":             {"/both", "/s"},
		"0::/a:b:c\n":     {"/a:b:c", "/a:b:c"},
		"0::relative\n::": {},
	} {
		if got := parseProcCgroup([]byte(text)); got != want {
			t.Errorf("%q: got %+v, want %+v", text, got, want)
		}
	}
}

func FuzzProcCgroup(f *testing.F) {
	f.Add([]byte("0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda4280610_1185_4085_9683_9871aaea16b3.slice/cri-containerd-caf3f963e410cb4d9424b6f516999253fbae3aeb6edf999de0bb5cb4acaabf55.scope\n"))
	f.Add([]byte("12:pids:/kubepods/besteffort/pod8dbb12ff-f4e9-40b8-834a-6898fb5f8f17/106df407fd9c6976c6a1aba95224d530b15027f853488ef61cb15e226c28cd7e\n1:name=systemd:/x\n0::/\n"))
	f.Add([]byte("0::/system.slice/containerd.service/kubepods-burstable-poda4280610.slice:cri-containerd:caf3f963e410cb4d\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := parseProcCgroup(data)
		pod := c.pod()
		if pod.UID == "" && pod.Container != "" {
			t.Fatalf("a container without a pod: %+v", pod)
		}
		if strings.Trim(pod.Container, "0123456789abcdef") != "" {
			t.Fatalf("no container ID: %q", pod.Container)
		}
		kubepodsAbove(c.path)
	})
}

func FuzzCounters(f *testing.F) {
	f.Add([]byte("max 7\n"), "max")
	f.Add([]byte("low 0\nhigh 0\nmax 63\noom 3\noom_kill 6\noom_group_kill 1\n"), "oom_kill")
	f.Add([]byte("oom_kill"), "oom_kill")
	f.Add([]byte("-7\n"), "-7")
	f.Add([]byte("max -7\n"), "max")
	f.Fuzz(func(t *testing.T, data []byte, key string) {
		n, ok, err := parseCounter(data, key)
		if n < 0 || err != nil && ok {
			t.Fatal(n, ok, err)
		}
		if ok && !bytes.Contains(data, []byte(key)) {
			t.Fatalf("found %q in %q", key, data)
		}
		if n, err := parseLimit(data); n < 0 || err != nil && n != 0 {
			t.Fatal(n, err)
		}
	})
}

func TestDropInOrder(t *testing.T) {
	h := hosttest.Parse(t, `-- tree/d/b.conf --
-- tree/d/a/z.conf --
-- tree/d/a.conf --
-- tree/d/a/deep/x.conf --
-- tree/d/readme --
-- tree/d/c.conf.bak --
-- links --
/link -> /d
/d/w.conf -> /d/readme
`)
	got, err := dropIns(t.Context(), h, "/d")
	if err != nil {
		t.Fatal(err)
	}
	// filepath.WalkDir: lexical within each directory, files of a directory
	// where its name stands.
	want := []string{"/d/a/deep/x.conf", "/d/a/z.conf", "/d/a.conf", "/d/b.conf", "/d/w.conf"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if !slices.IsSortedFunc(want[2:], strings.Compare) {
		t.Error("the case itself is out of order")
	}
	if got, err := dropIns(t.Context(), h, "/link"); err != nil || len(got) != 0 {
		t.Errorf("a symlink to a directory: %q, %v; the kubelet does not follow it", got, err)
	}
}

// TestKubeletThatIsBeingExecuted has its name and no arguments yet: taken for the
// kubelet, it had every setting's default, and that was remembered.
func TestKubeletThatIsBeingExecuted(t *testing.T) {
	const procs = "-- procs --\n1 systemd\n640 kubelet start=900\n-- treebin/proc/640/cmdline --\n"
	for text, want := range map[string]bool{procs: false, procs + "/usr/bin/kubelet\\x00\n": true} {
		if k, ok, err := FindKubelet(t.Context(), hosttest.Parse(t, text)); ok != want || err != nil {
			t.Errorf("%q: %+v, %t, %v", text, k, ok, err)
		}
	}
}
