package probes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hosthygiene/agent/pkg/host"
)

func TestOOM(t *testing.T) { runCases(t, "oom", DefaultOOM) }

func TestOOMValidate(t *testing.T) {
	if err := (OOM{}).Validate(); err == nil {
		t.Error("a window of 0 is refused")
	}
	if err := DefaultOOM().Validate(); err != nil {
		t.Error(err)
	}
}

// TestPodScore holds the formula against GetContainerOOMScoreAdjust's own cases
// and the numbers seen on a real node.
func TestPodScore(t *testing.T) {
	const gi = 1 << 30
	for _, test := range []struct {
		name, pod string
		init      int // index of the init container asked about, -1: container 0
		qos       string
		capacity  int64
		want      int
	}{
		{"half", `{"spec":{"containers":[{"resources":{"requests":{"memory":"8Gi"}}}]}}`, -1, qosBurstable, 16 * gi, 500},
		{"all of it", `{"spec":{"containers":[{"resources":{"requests":{"memory":"16Gi"}}}]}}`, -1, qosBurstable, 16 * gi, 3},
		{"nearly nothing", `{"spec":{"containers":[{"resources":{"requests":{"memory":"1Mi"}}}]}}`, -1, qosBurstable, 16 * gi, 999},
		{"nothing requested", `{"spec":{"containers":[{}]}}`, -1, qosBurstable, 16 * gi, 999},
		{"real node", `{"spec":{"containers":[{"resources":{"requests":{"memory":"256Mi"}}}]}}`, -1, qosBurstable, 2080374784, 871},
		{"best effort", `{"spec":{"containers":[{}]}}`, -1, qosBestEffort, gi, 1000},
		{"guaranteed", `{"spec":{"containers":[{}]}}`, -1, qosGuaranteed, gi, -997},
		{"node-critical", `{"spec":{"containers":[{}],"priority":2000001000,"priorityClassName":"system-node-critical"}}`, -1, qosBestEffort, gi, -997},
		{"class without priority", `{"spec":{"containers":[{}],"priorityClassName":"system-node-critical"}}`, -1, qosBestEffort, gi, 1000},
		{"cluster-critical", `{"spec":{"containers":[{}],"priority":2000000000,"priorityClassName":"system-cluster-critical"}}`, -1, qosBestEffort, gi, 1000},
		{"static and node-critical", `{"metadata":{"annotations":{"kubernetes.io/config.source":"file"}},"spec":{"containers":[{}],"priorityClassName":"system-node-critical"}}`, -1, qosBurstable, gi, -997},
		{"static only", `{"metadata":{"annotations":{"kubernetes.io/config.source":"file"}},"spec":{"containers":[{"resources":{"requests":{"memory":"512Mi"}}}]}}`, -1, qosBurstable, gi, 500},
		// 4Gi for the pod, 1Gi + 1Gi for its containers: 1Gi more for each.
		{"pod-level", `{"spec":{"resources":{"requests":{"memory":"4Gi"}},"containers":[{"resources":{"requests":{"memory":"1Gi"}}},{"resources":{"requests":{"memory":"1Gi"}}}]}}`, -1, qosBurstable, 8 * gi, 750},
		// A sidecar is as safe as the smallest regular container at least.
		{"sidecar", `{"spec":{"containers":[{"resources":{"requests":{"memory":"2Gi"}}},{"resources":{"requests":{"memory":"4Gi"}}}],"initContainers":[{"restartPolicy":"Always","resources":{"requests":{"memory":"1Gi"}}}]}}`, 0, qosBurstable, 8 * gi, 750},
		{"large sidecar", `{"spec":{"containers":[{"resources":{"requests":{"memory":"2Gi"}}}],"initContainers":[{"restartPolicy":"Always","resources":{"requests":{"memory":"4Gi"}}}]}}`, 0, qosBurstable, 8 * gi, 500},
		{"init container", `{"spec":{"containers":[{"resources":{"requests":{"memory":"2Gi"}}}],"initContainers":[{"resources":{"requests":{"memory":"1Gi"}}}]}}`, 0, qosBurstable, 8 * gi, 875},
	} {
		t.Run(test.name, func(t *testing.T) {
			var p kubeletPod
			if err := json.Unmarshal([]byte(test.pod), &p); err != nil {
				t.Fatal(err)
			}
			spec := p.Spec.Containers[0]
			if test.init >= 0 {
				spec = p.Spec.InitContainers[test.init]
			}
			got, err := p.score(spec, test.init >= 0, test.qos, test.capacity)
			if err != nil {
				t.Fatal(err)
			}
			if got.Scores[0] != test.want {
				t.Errorf("got %+v, want %d", got, test.want)
			}
		})
	}
}

func TestScoreFits(t *testing.T) {
	for _, test := range []struct {
		live int
		want []int
		fits bool
	}{
		{-997, []int{-997}, true},
		{-998, []int{-997}, false},
		{1000, []int{1000}, true},
		{999, []int{1000}, false},
		{871, []int{871, 871}, true},
		{865, []int{871}, true}, // a memory balloon
		{480, []int{871}, false},
		{750, []int{500, 750}, true},
		{1000, []int{999}, false}, // BestEffort's
		{0, []int{3}, false},
	} {
		if got := scoreFits(test.live, test.want); got != test.fits {
			t.Errorf("%d against %v: %v", test.live, test.want, got)
		}
	}
}

func TestParseOOMKills(t *testing.T) {
	record := func(at time.Duration, text string) host.KernelRecord {
		return host.KernelRecord{Time: at, Text: text}
	}
	const pod = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod8dbb12ff_f4e9_40b8_834a_6898fb5f8f17.slice"
	for _, test := range []struct {
		name    string
		records []host.KernelRecord
		want    []oomKill
	}{
		{"hostile comm", []host.KernelRecord{record(1, "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/system.slice/capglobal.service,task=a b,pid=1,u)d,pid=8275,uid=0")},
			[]oomKill{{At: 1, Global: true, Cgroup: "/system.slice/capglobal.service", Victims: []oomVictim{{8275, "a b,pid=1,u)d"}}}}},
		// A container names a group of its own so as to look like the machine.
		{"hostile group", []host.KernelRecord{record(1, "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0-1,3,oom_memcg="+pod+"/x,global_oom,task_memcg=/system.slice/sshd.service,task_memcg="+pod+"/x,task=y,pid=7,uid=0")},
			[]oomKill{{At: 1, Limit: pod + "/x,global_oom", Cgroup: "/system.slice/sshd.service,task_memcg=" + pod + "/x", Victims: []oomVictim{{7, "y"}}}}},
		{"nodes", []host.KernelRecord{record(1, "oom-kill:constraint=CONSTRAINT_CPUSET,nodemask=0-1,cpuset=set,a,mems_allowed=0-1,global_oom,task_memcg=/,task=x,pid=9,uid=4294967294")},
			[]oomKill{{At: 1, Global: true, Cgroup: "/", Victims: []oomVictim{{9, "x"}}}}},
		{"a group twice", []host.KernelRecord{
			record(1, "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=s,mems_allowed=0,oom_memcg=/a,task_memcg=/a/b,task=p,pid=5209,uid=0"),
			record(2, "Memory cgroup out of memory: Killed process 5209 (p) total-vm:52432kB, anon-rss:40160kB, file-rss:5776kB, shmem-rss:0kB, UID:0 pgtables:140kB oom_score_adj:0"),
			record(3, "Tasks in /a/b are going to be killed due to memory.oom.group set"),
			record(4, "Memory cgroup out of memory: Killed process 5207 (q) r) total-vm:4488kB, anon-rss:256kB, file-rss:2944kB, shmem-rss:0kB, UID:0 pgtables:44kB oom_score_adj:0"),
			record(5, "Memory cgroup out of memory: Killed process 5209 (p) total-vm:52432kB, anon-rss:40160kB, file-rss:5776kB, shmem-rss:0kB, UID:0 pgtables:140kB oom_score_adj:0"),
		}, []oomKill{{At: 1, Limit: "/a", Cgroup: "/a/b", Victims: []oomVictim{{5209, "p"}, {5207, "q) r"}}}}},
		{"the beginning is overwritten", []host.KernelRecord{
			record(1, "Memory cgroup out of memory: Killed process 1 (x) total-vm:1kB, anon-rss:0kB"),
			record(2, "Out of memory: Killed process 2 (y) total-vm:1kB, anon-rss:0kB"),
		}, []oomKill{{At: 2, Global: true, Victims: []oomVictim{{2, "y"}}}}},
		{"much later is another", []host.KernelRecord{
			record(1, "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/,task=x,pid=9,uid=0"),
			record(time.Hour, "Out of memory: Killed process 10 (y) total-vm:1kB, anon-rss:0kB"),
		}, []oomKill{{At: 1, Global: true, Cgroup: "/", Victims: []oomVictim{{9, "x"}}}, {At: time.Hour, Global: true, Victims: []oomVictim{{10, "y"}}}}},
		{"others", []host.KernelRecord{record(1, "oom-kill:"), record(1, "killed"), record(1, "init: Killed process 3 (x) by hand"),
			record(1, "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/,task=x,pid=9")}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			if d := cmp.Diff(test.want, parseOOMKills(test.records)); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func FuzzOOMKills(f *testing.F) {
	f.Add("oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=capoom-kill.service,mems_allowed=0,oom_memcg=/system.slice/capoom-kill.service,task_memcg=/system.slice/capoom-kill.service,task=python3,pid=5209,uid=0")
	f.Add("oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/system.slice/capglobal.service,task=a b,pid=1,u)d,pid=8275,uid=0")
	f.Add("Memory cgroup out of memory: Killed process 5208 (sleep) total-vm:3012kB, anon-rss:0kB, file-rss:1852kB, shmem-rss:0kB, UID:0 pgtables:40kB oom_score_adj:0")
	f.Add("Task in /kubepods/besteffort/podx killed as a result of limit of /kubepods/besteffort/podx")
	f.Add("Out of memory: Kill process 77 (x) y) score 900 or sacrifice child")
	f.Add("oom-kill:constraint=A,nodemask=,cpuset=,mems_allowed=,oom_memcg=\x00,task_memcg=,task=,pid=0,uid=0")
	f.Fuzz(func(t *testing.T, text string) {
		records := []host.KernelRecord{{Text: text}, {Text: text}}
		for _, k := range parseOOMKills(records) {
			if k.Global && k.Limit != "" {
				t.Fatalf("both global and limited: %+v", k)
			}
			seen := map[int]bool{}
			for _, v := range k.Victims {
				if seen[v.PID] {
					t.Fatalf("PID %d twice: %+v", v.PID, k)
				}
				seen[v.PID] = true
			}
			told := tellKill(k, time.Unix(0, 0), podNames{})
			if told.subject == "" || strings.ContainsAny(told.message, "\x00\x1b") {
				t.Fatalf("%+v", told)
			}
		}
		if group, ok := parseForkRejected(text); ok && !strings.HasPrefix(group, "/") {
			t.Fatal(group)
		}
	})
}

func TestParseKubeletPods(t *testing.T) {
	for text, want := range map[string]int{
		`{"kind":"PodList","metadata":{"x":[1,{"items":[]}]},"items":[{"metadata":{"name":"a"}},{"metadata":{"name":"b"}}],"x":1}`: 2,
		`{"items":null}`: 0,
		`{"items":[]}`:   0,
		`{}`:             0,
	} {
		pods, err := parseKubeletPods(strings.NewReader(text))
		if err != nil || len(pods) != want {
			t.Errorf("%s: %d pods, %v", text, len(pods), err)
		}
	}
	for _, text := range []string{"", "[]", "<html>", `{"items":{}}`, `{"items":[1]}`, `{"items":[{"metadata":`, `{"items":[{}`, `{"a"`} {
		if pods, err := parseKubeletPods(strings.NewReader(text)); err == nil {
			t.Errorf("%s: want an error, got %d pods", text, len(pods))
		}
	}
}

func FuzzKubeletPods(f *testing.F) {
	f.Add([]byte(`{"items":[{"metadata":{"name":"bu","namespace":"default","uid":"a"},"spec":{"containers":[{"name":"c","resources":{"requests":{"memory":"256Mi"}}}]},"status":{"containerStatuses":[{"name":"c","containerID":"containerd://caf3"}]}}]}`))
	f.Add([]byte(`{"items":[{"spec":{"resources":{"requests":{"memory":"1Ei"}},"containers":[{"resources":{"requests":{"memory":1e30}}}],"initContainers":[{"restartPolicy":"Always"}]}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		pods, err := parseKubeletPods(bytes.NewReader(data))
		if err != nil {
			return
		}
		names := indexPods(pods)
		for id := range names.containers {
			names.container(podCgroup{Container: id})
		}
		for _, p := range pods {
			for _, c := range p.Spec.Containers {
				s, err := p.score(c, false, qosBurstable, 1<<30)
				if err == nil && s.Scores[0] != guaranteedScore && (s.Scores[0] < 3 || s.Scores[0] > 1999) {
					t.Fatalf("%+v", s)
				}
			}
		}
	})
}

// benchHost is a node with n processes, half of them in pods of ten containers'
// worth, as text for hosttest.
func benchHost(n int) string {
	var b, procs, trees strings.Builder
	fmt.Fprintf(&procs, "1 systemd ppid=0\n2 kubelet threads=30\n3 containerd threads=40\n4 sshd\n")
	file := func(name, text string) { fmt.Fprintf(&trees, "-- tree%s --\n%s\n", name, text) }
	for pid, unit := range map[int]string{2: "kubelet.service", 3: "containerd.service", 4: "ssh.service"} {
		file(fmt.Sprintf("/proc/%d/cgroup", pid), "0::/system.slice/"+unit)
		file(fmt.Sprintf("/proc/%d/oom_score_adj", pid), map[int]string{2: "-999", 3: "-999", 4: "-1000"}[pid])
		file(fmt.Sprintf("/proc/%d/oom_score", pid), "1")
		for name, text := range map[string]string{"pids.current": "30", "pids.max": "max", "pids.events": "max 0", "pids.events.local": "max 0"} {
			file("/sys/fs/cgroup/system.slice/"+unit+"/"+name, text)
		}
	}
	for name, text := range map[string]string{"pids.current": "5000", "pids.max": "30000", "pids.events": "max 0", "pids.events.local": "max 0", "memory.events": "oom_kill 0"} {
		file("/sys/fs/cgroup/kubepods.slice/"+name, text)
		file("/sys/fs/cgroup/system.slice/"+name, text)
	}
	file("/sys/fs/cgroup/cgroup.controllers", "memory pids")
	file("/proc/sys/kernel/pid_max", "4194304")
	file("/proc/sys/kernel/threads-max", "500000")
	file("/proc/sys/fs/inotify/max_user_watches", "100000")
	file("/proc/sys/fs/inotify/max_user_instances", "8192")
	file("/proc/loadavg", fmt.Sprintf("1.0 1.0 1.0 1/%d 4", n))
	file("/proc/vmstat", "oom_kill 0")
	file("/proc/meminfo", "MemTotal: 16777216 kB")
	file("/var/lib/kubelet/config.yaml", "podPidsLimit: 1024\nsystemReserved: {pid: \"470000\"}")
	fmt.Fprintf(&trees, "-- treebin/proc/2/cmdline --\nkubelet\\x00--config=/var/lib/kubelet/config.yaml\\x00\n")
	pod := 0
	for pid := 10; pid < n+10; pid++ {
		if pid%2 == 1 {
			fmt.Fprintf(&procs, "%d worker%d start=%d threads=3\n", pid, pid%50, pid)
			continue
		}
		fmt.Fprintf(&procs, "%d app start=%d threads=8\n", pid, pid)
		file(fmt.Sprintf("/proc/%d/oom_score_adj", pid), "1000")
		file(fmt.Sprintf("/proc/%d/oom_score", pid), "1333")
		if pid%20 == 0 { // ten processes a container, one container a pod
			pod = pid
			var list strings.Builder
			for p := pid; p < pid+20 && p < n+10; p += 2 {
				fmt.Fprintln(&list, p)
			}
			file(fmt.Sprintf("/sys/fs/cgroup/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod%08x_0000_0000_0000_000000000000.slice/cri-containerd-%064x.scope/cgroup.procs", pod, pod), strings.TrimSuffix(list.String(), "\n"))
		}
	}
	b.WriteString("-- procs --\n" + procs.String() + trees.String() + "-- units --\ncontainerd.service mainpid=3 oom=-999\nssh.service mainpid=4\n*\n-- dirs --\n/proc/2/fd\n/proc/3/fd\n")
	return b.String()
}

// podsAsked counts the questions for the kubelet's pods.
type podsAsked struct {
	host.View
	n   int
	err error
}

func (p *podsAsked) KubeletAPI(_ context.Context, _ string, read func(io.Reader) error) error {
	p.n++
	if p.err != nil {
		return p.err
	}
	return read(strings.NewReader(`{"items": []}`))
}

// The list of pods says nothing new of the containers it was asked about twice.
func TestKubeletIsAskedForPods(t *testing.T) {
	view, memory, start := &podsAsked{}, &Memory{}, time.Now()
	one, two := []container{{path: "/a/1"}, {path: "/a/2"}}, []container{{path: "/a/2"}, {path: "/a/3"}}
	turned := []container{one[1], one[0]}
	for _, step := range []struct {
		after time.Duration
		boxes []container
		kill  bool
		err   error
		want  int
	}{
		{0, one, false, nil, 1},
		{4 * time.Minute, one, false, nil, 1},
		{6 * time.Minute, turned, false, nil, 2},
		{12 * time.Minute, one, false, nil, 2},
		{64 * time.Minute, turned, false, nil, 2},
		{64 * time.Minute, one, true, nil, 3}, // who was killed may have come after the list
		{65 * time.Minute, one, true, nil, 3},
		{80 * time.Minute, one, false, nil, 3},
		{81 * time.Minute, two, false, nil, 4},
		{82 * time.Minute, one, false, nil, 4},
		{87 * time.Minute, two, false, nil, 5},
		{100 * time.Minute, two, false, nil, 5},
		{100 * time.Minute, nil, false, errors.New("away"), 6},
		{101 * time.Minute, two, true, errors.New("away"), 7},
		{102 * time.Minute, two, false, nil, 8},
		{110 * time.Minute, two, false, nil, 9},
		{169 * time.Minute, two, false, nil, 9},
		{170 * time.Minute, two, false, nil, 10},
		{99 * time.Minute, two, false, nil, 11}, // the clock was set back
	} {
		view.err = step.err
		c := oomCheck{ctx: t.Context(), in: Input{Host: view, Memory: memory, Now: start.Add(step.after)}, boxes: step.boxes}
		c.loadPods(podsSettledAge)
		if step.kill {
			c.podNames()
		}
		if view.n != step.want || (c.podsErr == nil) != (step.err == nil) {
			t.Errorf("after %s: asked %d times, want %d; %v", step.after, view.n, step.want, c.podsErr)
		}
	}
}
