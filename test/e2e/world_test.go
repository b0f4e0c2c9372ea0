//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

const (
	daemonSet = "host-hygiene-agent"
	manifests = "../../manifests/"
	// guestAgent is the program on the node, apart from the image.
	guestAgent = "/tmp/e2e/agent"

	patience = 5 * time.Minute
	look     = 100 * time.Millisecond
)

// world is the cluster, its node, and what the test knows of the agent there.
type world struct {
	*rigtest.Cluster
	*observer

	agent      built
	auditStart int64
	fresh      mark // before the agent was installed

	mu   sync.Mutex
	rows []row
	peak int64 // the highest memory.peak of any of the agent's containers
}

func start(t *testing.T) *world {
	t.Helper()
	w := &world{Cluster: rigtest.Start(t, rigtest.Options{Patience: patience, Look: look})}
	info, err := os.Stat(w.ControlPlane.AuditLog())
	if err != nil {
		t.Fatal(err)
	}
	w.auditStart = info.Size()
	return w
}

// observe follows the node until the test ends.
func (w *world) observe(t *testing.T) {
	t.Helper()
	w.observer = newObserver(w.Cluster)
	ctx, stop := context.WithCancel(t.Context())
	watching := make(chan struct{})
	go func() { defer close(watching); w.run(ctx) }()
	t.Cleanup(func() { stop(); <-watching })
}

// is says whether a condition has a status and one of the given reasons, any
// without one.
func (w *world) is(kind string, status corev1.ConditionStatus, reasons ...string) func() error {
	return func() error { return w.all().Is(kind, status, reasons...) }
}

// kinds are the conditions of every probe that applies to the node, without the
// prefix.
func kinds() []string {
	return []string{"TimeProblem", "DiskProblem", "MultipathProblem", "ISCSIProblem", "PIDProblem", "OOMProblem", "PackageProblem",
		"ServiceProblem", "UpdateProblem", "KubeletProblem"}
}

// healthy says whether every condition is there and tells of no problem.
func (w *world) healthy() error { return w.all().Healthy(kinds()...) }

// built is the agent as users get it: the image of the Dockerfile, and the
// program beside it.
type built struct{ binary, image string }

// build makes both of the sources in tree while the machine boots, and sends
// where they are.
func build(t *testing.T, tree string, to chan<- built) {
	b := built{binary: filepath.Join(t.TempDir(), "agent"), image: filepath.Join(t.TempDir(), "image.tar")}
	image := exec.CommandContext(t.Context(), filepath.Join(tree, "hack/build-image.sh"), b.image)
	if *broken != "" {
		image.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=0") // a copy has no commit
	}
	if out, err := image.CombinedOutput(); err != nil {
		t.Errorf("building the image: %v\n%s", err, out)
		return
	}
	if err := rigtest.BuildAgent(t.Context(), b.binary, "e2e"); err != nil {
		t.Error(err)
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
	w.Load(t, w.agent.image, w.agent.binary, guestAgent)
	w.Spent("agent loaded")
}

// configure writes the user's ConfigMap and waits until the agent shows that it
// is in force.
func (w *world) configure(t *testing.T, config string, inForce func() error) {
	t.Helper()
	w.WriteConfig(t, config)
	w.AwaitConfig(t, inForce)
}

// metrics are the samples that the node's port 20266 serves, by the metric's
// name and labels as they stand there.
func (w *world) metrics() (map[string]float64, error) {
	// Not compressed, which an emulated node would have to do.
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableCompression: true, DisableKeepAlives: true}}
	resp, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", w.Node.MetricsPort()))
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
	ctx := w.CleanupContext(t)
	show := func(title, out string, err error) {
		if err != nil {
			out += "\n" + err.Error()
		}
		t.Logf("---- %s\n%s", title, out)
	}
	show("conditions", w.all().String(), nil)
	out, err := w.ControlPlane.Kubectl(ctx, "logs", "-n", rigtest.Namespace, "ds/"+daemonSet, "--tail=60")
	show("log", out, err)
	// Its exit code says whether there is a finding, which is no error here.
	out, err = w.TryGuest(ctx, guestAgent+" check -o wide || test $? -ne 2")
	show("check on the node", out, err)
	out, err = w.TryGuest(ctx, "systemctl --no-pager --failed; dmesg | tail -n 15")
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
	return b.String() + "\n" + w.Notes()
}
