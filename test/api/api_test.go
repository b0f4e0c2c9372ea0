//go:build cluster

// Package api proves the reporting on a real kube-apiserver and etcd, with the
// agent's own ServiceAccount and no more than the rights of manifests/.
package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/report"
	"github.com/hosthygiene/agent/test/rig"
	"github.com/hosthygiene/agent/test/rig/rigtest"
)

const (
	node     = "n1"
	timeType = probes.ConditionPrefix + "TimeProblem"
)

type cluster struct {
	*rig.ControlPlane
	t     *testing.T
	agent *rest.Config // with the token of a pod on the node
}

func start(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{ControlPlane: rigtest.ControlPlane(t, rig.ControlPlaneOptions{}), t: t}
	c.kubectl("apply", "-f", filepath.Join("..", "..", "manifests"))
	token := c.podToken(node)
	admin, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	c.agent = rest.AnonymousClientConfig(admin)
	c.agent.BearerToken = token
	return c
}

func (c *cluster) kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.Kubectl(c.t.Context(), args...)
	if err != nil {
		c.t.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
	}
	return out
}

func (c *cluster) apply(text string) {
	c.t.Helper()
	file := filepath.Join(c.t.TempDir(), "object.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.kubectl("apply", "-f", file)
}

func (c *cluster) makeNode(name string) {
	c.t.Helper()
	c.apply("apiVersion: v1\nkind: Node\nmetadata: {name: " + name + ", labels: {pool: storage}}\n")
}

// podToken returns a token bound to a pod of the agent on a node, as the kubelet
// would mount it, and makes both. No kubelet is needed for that. Without a node
// the pod is one that waits for the scheduler.
func (c *cluster) podToken(node string) string {
	c.t.Helper()
	pod, on := "agent-unscheduled", ""
	if node != "" {
		c.makeNode(node)
		pod, on = "agent-"+node, "nodeName: "+node
	}
	c.apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: host-hygiene}
spec:
  %s
  serviceAccountName: host-hygiene-agent
  containers: [{name: agent, image: example.invalid/agent}]
`, pod, on))
	return c.token("--bound-object-kind", "Pod", "--bound-object-name", pod)
}

// token returns one of the agent's ServiceAccount, bound to nothing without flags.
func (c *cluster) token(flags ...string) string {
	c.t.Helper()
	return strings.TrimSpace(c.kubectl(append([]string{"create", "token", "-n", "host-hygiene", "host-hygiene-agent", "--duration", "1h"}, flags...)...))
}

type condition struct {
	Type, Status, Reason, Message         string
	LastHeartbeatTime, LastTransitionTime time.Time
}

func (c *cluster) conditions() map[string]condition {
	c.t.Helper()
	var n struct {
		Status struct{ Conditions []condition }
	}
	if err := json.Unmarshal([]byte(c.kubectl("get", "node", node, "-o", "json")), &n); err != nil {
		c.t.Fatal(err)
	}
	m := map[string]condition{}
	for _, cond := range n.Status.Conditions {
		m[cond.Type] = cond
	}
	return m
}

// eventually polls until want is satisfied; an emulated or busy machine may
// take its time.
func (c *cluster) eventually(what string, want func(map[string]condition) bool) map[string]condition {
	c.t.Helper()
	var last map[string]condition
	for deadline := time.Now().Add(90 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if last = c.conditions(); want(last) {
			return last
		}
	}
	c.t.Fatalf("%s: not within 90s: %+v", what, last)
	return nil
}

// publisher runs one until stop is called.
func (c *cluster) publisher(labels func(map[string]string) bool) (p *report.Publisher, api *report.API, stop func()) {
	c.t.Helper()
	api, err := report.NewAPI(node, c.agent)
	if err != nil {
		c.t.Fatal(err)
	}
	p = report.NewPublisher(api, node, time.Now().Add(-time.Hour), slog.New(slog.NewTextHandler(testWriter{c.t}, nil)), labels)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { p.Run(ctx) })
	var once sync.Once
	stop = func() { once.Do(func() { cancel(); wg.Wait() }) }
	c.t.Cleanup(stop)
	return p, api, stop
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

func snapshot(f *finding.Finding, err error) engine.Snapshot {
	cfg := config.Default().Sections
	r := finding.Report{Probe: "time", Condition: timeType, Summary: "chronyd follows 192.0.2.1", Err: err}
	if f != nil {
		r.Findings = []finding.Finding{*f}
	}
	r.Status = finding.StatusOf(finding.Result{Findings: r.Findings}, err)
	return engine.Snapshot{Config: &cfg, Probes: cfg.Probes.List(), Reports: []finding.Report{r}, Complete: true}
}

var noDaemon = finding.Finding{Reason: "NoTimeDaemon", Severity: finding.Warning, Message: "no time daemon runs: 91% of nothing"}

func is(typ, status, reason string) func(map[string]condition) bool {
	return func(m map[string]condition) bool { return m[typ].Status == status && m[typ].Reason == reason }
}

func TestReporting(t *testing.T) {
	c := start(t)
	labels := make(chan map[string]string, 16)
	p, api, stop := c.publisher(func(l map[string]string) bool { labels <- l; return false })

	if l := <-labels; l["pool"] != "storage" {
		t.Errorf("labels: %v", l)
	}
	p.Report(snapshot(nil, nil))
	healthy := c.eventually("healthy", is(timeType, "False", "NoProblem"))
	if healthy[report.ReadyType].Status != "True" {
		t.Errorf("ready: %+v", healthy[report.ReadyType])
	}
	time.Sleep(1100 * time.Millisecond) // times on the wire have a resolution of a second
	p.Report(snapshot(&noDaemon, nil))
	faulty := c.eventually("faulty", is(timeType, "True", "NoTimeDaemon"))
	if !faulty[timeType].LastTransitionTime.After(healthy[timeType].LastTransitionTime) {
		t.Error("the transition time did not move with the status")
	}
	if faulty[report.ReadyType].LastTransitionTime != healthy[report.ReadyType].LastTransitionTime {
		t.Error("Ready's transition time moved and its status did not")
	}

	t.Run("an event says so, its text as data", func(t *testing.T) {
		var out string
		for range 50 {
			out = c.kubectl("get", "events", "-n", "default", "--field-selector", "involvedObject.name="+node, "-o", "custom-columns=T:.type,R:.reason,M:.message", "--no-headers")
			if out != "" {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		if got := strings.Join(strings.Fields(out), " "); got != "Warning NoTimeDaemon no time daemon runs: 91% of nothing" {
			t.Errorf("got %q", got)
		}
		if out := c.kubectl("describe", "node", node); !strings.Contains(out, "91% of nothing") || !strings.Contains(out, "hosthygiene.io/TimeProblem") {
			t.Errorf("kubectl describe node does not show it:\n%s", out)
		}
	})

	t.Run("nothing is written while nothing changes", func(t *testing.T) {
		before := api.Writes()[[2]string{"nodes/status", "ok"}]
		for i := range 50 {
			s := snapshot(&noDaemon, nil)
			s.Reports[0].Findings[0].Message = fmt.Sprintf("no time daemon runs: %d%% of nothing", i)
			p.Report(s)
			time.Sleep(20 * time.Millisecond)
		}
		if after := api.Writes()[[2]string{"nodes/status", "ok"}]; after != before {
			t.Errorf("%d writes", after-before)
		}
	})

	t.Run("an agent that restarts moves nothing", func(t *testing.T) {
		before := c.conditions()
		stop()
		again, api, _ := c.publisher(nil)
		again.WaitKnown(t.Context())
		if !again.Prior(timeType) {
			t.Error("what was told before is not known")
		}
		again.Report(snapshot(&noDaemon, nil))
		time.Sleep(time.Second)
		if after := c.conditions(); after[timeType] != before[timeType] || after[report.ReadyType] != before[report.ReadyType] {
			t.Errorf("before %+v\nafter %+v", before, after)
		}
		if w := api.Writes(); len(w) > 1 || w[[2]string{"nodes/status", "ok"}] != 0 {
			t.Errorf("writes: %v", w)
		}
		p = again
	})

	t.Run("what others change is restored", func(t *testing.T) {
		c.kubectl("patch", "node", node, "--subresource=status", "-p",
			`{"status":{"conditions":[{"type":"`+timeType+`","status":"False","reason":"Fine","message":"says somebody"},{"type":"Other","status":"True"}]}}`)
		m := c.eventually("restored", is(timeType, "True", "NoTimeDaemon"))
		if m["Other"].Status != "True" {
			t.Error("somebody else's condition is gone")
		}
		c.kubectl("patch", "node", node, "--subresource=status", "-p", `{"status":{"conditions":[{"$patch":"delete","type":"`+timeType+`"}]}}`)
		c.eventually("restored after deletion", is(timeType, "True", "NoTimeDaemon"))
	})

	t.Run("a node that is made again", func(t *testing.T) {
		c.kubectl("delete", "node", node)
		c.makeNode(node)
		c.eventually("told to the new node", is(timeType, "True", "NoTimeDaemon"))
	})

	t.Run("an API server that is away, and one that never answers", func(t *testing.T) {
		if err := c.StopAPIServer(); err != nil {
			t.Fatal(err)
		}
		p.Report(snapshot(nil, errors.New("chronyd is silent")))
		p.Report(snapshot(nil, nil))
		time.Sleep(3 * time.Second)
		if err := c.StartAPIServer(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.eventually("told after the outage", is(timeType, "False", "NoProblem"))
		if err := c.PauseAPIServer(); err != nil {
			t.Fatal(err)
		}
		p.Report(snapshot(&noDaemon, nil))
		time.Sleep(2 * time.Second)
		if err := c.ResumeAPIServer(); err != nil {
			t.Fatal(err)
		}
		c.eventually("told after the pause", is(timeType, "True", "NoTimeDaemon"))
	})

	t.Run("switched off, nothing stays", func(t *testing.T) {
		s := snapshot(&noDaemon, nil)
		s.Config.Report.Conditions = config.Off
		p.Report(s)
		c.eventually("deleted", func(m map[string]condition) bool { return !ours(m) })
	})

	t.Run("cleanup --all takes what a dead agent left", func(t *testing.T) {
		p.Report(snapshot(nil, nil))
		c.eventually("back", is(timeType, "False", "NoProblem"))
		s := snapshot(nil, nil)
		s.Quiet = "so that the publisher does not put them back"
		p.Report(s)
		time.Sleep(500 * time.Millisecond)
		admin, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
		if err != nil {
			t.Fatal(err)
		}
		if left, err := report.CleanupAll(t.Context(), admin, testWriter{t}); err != nil || len(left) > 0 {
			t.Errorf("left on %v: %v", left, err)
		}
		if left, err := report.WaitClean(t.Context(), admin); err != nil || len(left) > 0 {
			t.Errorf("left on %v: %v", left, err)
		}
		if m := c.conditions(); ours(m) || m["Other"].Status != "" && m["Other"].Status != "True" {
			t.Errorf("%+v", m)
		}
	})
}

func ours(m map[string]condition) bool {
	for t := range m {
		if strings.HasPrefix(t, probes.ConditionPrefix) {
			return true
		}
	}
	return false
}
