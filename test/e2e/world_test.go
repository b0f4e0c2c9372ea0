//go:build cluster

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hosthygiene/agent/test/rig"
)

const (
	namespace = "host-hygiene"
	daemonSet = "host-hygiene-agent"
	manifests = "../../manifests/"

	// patience is how long anything may take before a run gives up on it. It
	// says nothing about the agent: the node is emulated, and this machine may
	// be busy.
	patience = 5 * time.Minute
	// look is how often a wait looks.
	look = 100 * time.Millisecond
)

// world is the cluster, its node, and what the test knows of the agent there.
type world struct {
	cp       *rig.ControlPlane
	node     *rig.Node
	attached bool
	admin    *rest.Config
	*observer

	agent      built
	auditStart int64
	began      time.Time
	fresh      mark // before the agent was installed

	mu    sync.Mutex
	rows  []row
	notes [][2]string
	peak  int64 // the highest memory.peak of any of the agent's containers
}

// start brings the cluster up, or attaches to one that is.
func start(t *testing.T) *world {
	t.Helper()
	ctx := t.Context()
	w := &world{attached: os.Getenv("HYGIENE_ATTACH") != "", began: time.Now()}
	var err error
	if w.attached {
		w.cp, w.node, err = attach()
	} else {
		w.cp, w.node, err = boot(ctx, t)
	}
	if err != nil {
		t.Fatal(err)
	}
	if w.admin, err = clientcmd.BuildConfigFromFlags("", w.cp.Kubeconfig()); err != nil {
		t.Fatal(err)
	}
	w.admin.QPS = -1
	info, err := os.Stat(w.cp.AuditLog())
	if err != nil {
		t.Fatal(err)
	}
	w.auditStart = info.Size()
	w.spent("cluster up")
	return w
}

// observe follows the node until the test ends.
func (w *world) observe(t *testing.T) {
	t.Helper()
	o, err := newObserver(w.admin, w.node.Name())
	if err != nil {
		t.Fatal(err)
	}
	w.observer = o
	ctx, stop := context.WithCancel(t.Context())
	watching := make(chan struct{})
	go func() { defer close(watching); o.run(ctx) }()
	t.Cleanup(func() { stop(); <-watching })
}

func attach() (*rig.ControlPlane, *rig.Node, error) {
	cache, err := rig.CacheDir()
	if err != nil {
		return nil, nil, err
	}
	name := os.Getenv("CLUSTER")
	if name == "" {
		name = "default"
	}
	return rig.Attach(filepath.Join(cache, "run", name, "cluster.json"))
}

func boot(ctx context.Context, t *testing.T) (*rig.ControlPlane, *rig.Node, error) {
	if err := rig.Prerequisites(ctx); err != nil {
		return nil, nil, err
	}
	tools, err := rig.BuildTools(ctx)
	if err != nil {
		return nil, nil, err
	}
	image, err := rig.BuildNodeImage(ctx, tools)
	if err != nil {
		return nil, nil, err
	}
	cp, err := rig.StartControlPlane(ctx, t.TempDir(), tools, rig.ControlPlaneOptions{Controllers: true})
	if err != nil {
		return nil, nil, err
	}
	t.Cleanup(func() {
		if err := cp.Stop(); err != nil {
			t.Error(err)
		}
	})
	node, err := rig.StartNode(ctx, cp, image, rig.NodeOptions{})
	if err != nil {
		return nil, nil, err
	}
	t.Cleanup(func() {
		if err := node.Stop(); err != nil {
			t.Error(err)
		}
	})
	return cp, node, nil
}

// spent notes where the time of a run goes.
func (w *world) spent(on string) {
	w.note("after "+time.Since(w.began).Round(time.Second).String(), on)
}

func (w *world) note(what, value string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.notes = append(w.notes, [2]string{what, value})
}

// kubectl runs kubectl as the administrator and returns what it printed.
func (w *world) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := w.cp.Kubectl(cleanupContext(t), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// apply applies an object that is not in a file.
func (w *world) apply(t *testing.T, object any) {
	t.Helper()
	data, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	cmd := w.cp.KubectlCommand(cleanupContext(t), "apply", "-f", "-")
	cmd.Stdin = bytes.NewReader(data)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("kubectl apply: %v: %s", err, out)
	}
}

// guest runs a shell script on the node as root; the script ends at the first
// command that fails.
func (w *world) guest(ctx context.Context, script string) (string, error) {
	out, err := w.node.Run(ctx, "set -e\n"+script)
	return strings.TrimSpace(out), err
}

func (w *world) mustGuest(t *testing.T, script string) string {
	t.Helper()
	out, err := w.guest(cleanupContext(t), script)
	if err != nil {
		t.Fatalf("on the node: %v\n%s", err, script)
	}
	return out
}

// cleanupContext also serves in t.Cleanup, when the test's own context has
// ended.
func cleanupContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	t.Cleanup(cancel)
	return ctx
}

// await looks until ok returns nil.
func await(t *testing.T, what string, ok func() error) {
	t.Helper()
	awaitFor(t, patience, what, ok)
}

func awaitFor(t *testing.T, limit time.Duration, what string, ok func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s: %v", limit, what, err)
		}
		time.Sleep(look)
	}
}

// is waits until a condition has a status and one of the given reasons, any
// without one.
func (w *world) is(kind string, status corev1.ConditionStatus, reasons ...string) func() error {
	return func() error {
		c, ok := w.condition(kind)
		switch {
		case !ok:
			return fmt.Errorf("there is no %s", kind)
		case c.Status != status || len(reasons) > 0 && !slices.Contains(reasons, c.Reason):
			return fmt.Errorf("%s is %s/%s: %s", kind, c.Status, c.Reason, c.Message)
		}
		return nil
	}
}

// kinds are the conditions of every probe, without the prefix.
func kinds() []string {
	return []string{"TimeProblem", "DiskProblem", "MultipathProblem", "ISCSIProblem", "PIDProblem", "OOMProblem", "PackageProblem"}
}

// healthy says whether every condition is there and tells of no problem.
func (w *world) healthy() error {
	var errs []error
	for _, kind := range kinds() {
		errs = append(errs, w.is(kind, corev1.ConditionFalse)())
	}
	return errors.Join(append(errs, w.is("Ready", corev1.ConditionTrue)())...)
}

// built is the agent as users get it: the image of the Dockerfile, and the
// program beside it.
type built struct{ binary, image string }

// build makes both while the machine boots, and sends where they are.
func build(t *testing.T, to chan<- built) {
	b := built{binary: filepath.Join(t.TempDir(), "agent"), image: filepath.Join(t.TempDir(), "image.tar")}
	image := exec.CommandContext(t.Context(), "../../hack/build-image.sh", b.image)
	if out, err := image.CombinedOutput(); err != nil {
		t.Errorf("building the image: %v\n%s", err, out)
		return
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=e2e",
		"-o", b.binary, "github.com/hosthygiene/agent/cmd/agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("building the agent: %v\n%s", err, out)
		return
	}
	to <- b
}

// load puts the agent on the node, as the image the manifests name: build-image
// takes the name from them.
func (w *world) load(t *testing.T) {
	t.Helper()
	if w.agent.image == "" {
		t.FailNow() // build has said why
	}
	if err := w.node.LoadImage(t.Context(), w.agent.image); err != nil {
		t.Fatal(err)
	}
	// For dumps, and for what a person would run there.
	if err := w.node.Copy(t.Context(), w.agent.binary, guestAgent); err != nil {
		t.Fatal(err)
	}
	w.spent("agent loaded")
}

// guestAgent is the program on the node, apart from the image.
const guestAgent = "/tmp/e2e/agent"

// agentPID is a line of shell that sets pid to the agent's in its container.
const agentPID = `pid=; for p in $(pgrep -x agent); do grep -q kubepods /proc/$p/cgroup && pid=$p; done; test -n "$pid"
`

// pod is the agent's pod as it is now.
func (w *world) pod(ctx context.Context) (corev1.Pod, error) {
	var list corev1.PodList
	err := w.get(ctx, "/api/v1/namespaces/"+namespace+"/pods", &list)
	if err != nil {
		return corev1.Pod{}, err
	}
	list.Items = slices.DeleteFunc(list.Items, func(p corev1.Pod) bool {
		return p.DeletionTimestamp != nil || p.Spec.NodeName != w.node.Name()
	})
	if len(list.Items) != 1 || len(list.Items[0].Status.ContainerStatuses) != 1 {
		return corev1.Pod{}, fmt.Errorf("the DaemonSet has %d running pods on the node", len(list.Items))
	}
	return list.Items[0], nil
}

// podReady waits until the agent's container has been started again as often as
// given, and is ready.
func (w *world) podReady(t *testing.T, restarts int32) {
	t.Helper()
	await(t, "the agent's pod", func() error {
		p, err := w.pod(t.Context())
		if err != nil {
			return err
		}
		if s := p.Status.ContainerStatuses[0]; !s.Ready || s.RestartCount != restarts {
			return fmt.Errorf("ready: %t, restarts: %d, want %d; state %+v", s.Ready, s.RestartCount, restarts, s.State)
		}
		return nil
	})
}

// configure writes the user's ConfigMap and waits until the agent shows that it
// is in force.
func (w *world) configure(t *testing.T, config string, inForce func() error) {
	t.Helper()
	w.apply(t, map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": map[string]any{"name": "host-hygiene-config", "namespace": namespace},
		"data":     map[string]string{"config.yaml": config},
	})
	var looked time.Time
	await(t, "the config to be in force", func() error {
		// By itself the kubelet brings a changed ConfigMap only with its next
		// round, a minute or more later; a changed pod it looks at now.
		if time.Since(looked) > 10*time.Second {
			looked = time.Now()
			p, err := w.pod(t.Context())
			if err != nil {
				return err
			}
			w.kubectl(t, "annotate", "--overwrite", "-n", namespace, "pod", p.Name, "e2e/look="+strconv.FormatInt(looked.UnixNano(), 10))
		}
		return inForce()
	})
}

// metrics are the samples that the node's port 20266 serves, by the metric's
// name and labels as they stand there.
func (w *world) metrics() (map[string]float64, error) {
	// Not compressed, which an emulated node would have to do.
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableCompression: true, DisableKeepAlives: true}}
	resp, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", w.node.MetricsPort()))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	samples := map[string]float64{}
	for line := range strings.Lines(string(body)) {
		line = strings.TrimSpace(line)
		space := strings.LastIndexByte(line, ' ')
		if space < 0 || line[0] == '#' {
			continue
		}
		if samples[line[:space]], err = strconv.ParseFloat(line[space+1:], 64); err != nil {
			return nil, err
		}
	}
	return samples, nil
}

// dump shows what a person would ask for first.
func (w *world) dump(t *testing.T) {
	ctx := cleanupContext(t)
	show := func(title, out string, err error) {
		if err != nil {
			out += "\n" + err.Error()
		}
		t.Logf("---- %s\n%s", title, out)
	}
	var lines strings.Builder
	for kind, c := range w.all() {
		fmt.Fprintf(&lines, "%s %s/%s since %s: %s\n", kind, c.Status, c.Reason, c.LastTransitionTime.UTC().Format(time.TimeOnly), c.Message)
	}
	show("conditions", lines.String(), nil)
	out, err := w.cp.Kubectl(ctx, "logs", "-n", namespace, "ds/"+daemonSet, "--tail=60")
	show("log", out, err)
	// Its exit code says whether there is a finding, which is no error here.
	out, err = w.guest(ctx, guestAgent+" check -o wide || test $? -ne 2")
	show("check on the node", out, err)
	out, err = w.guest(ctx, "systemctl --no-pager --failed; dmesg | tail -n 15")
	show("node", out, err)
}

// row is a line of the table.
type row struct {
	scenario, reason string
	told, cleared    time.Duration
}

// table shows how long everything took.
func (w *world) table() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "%-44s %-24s %12s %12s\n", "SCENARIO", "REASON", "FAULT→TOLD", "REPAIR→CLEAR")
	for _, r := range w.rows {
		fmt.Fprintf(&b, "%-44s %-24s %10.1f s %10.1f s\n", r.scenario, r.reason, r.told.Seconds(), r.cleared.Seconds())
	}
	b.WriteString("\n")
	for _, n := range w.notes {
		fmt.Fprintf(&b, "%-20s %s\n", n[0], n[1])
	}
	return b.String()
}
