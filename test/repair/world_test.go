//go:build cluster

package repair

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	coordination "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hosthygiene/agent/test/rig"
)

const (
	namespace = "host-hygiene"
	prefix    = "hosthygiene.io/"
	manifests = "../../manifests/"
	overlay   = manifests + "kustomize/overlays/remedies"

	// guestAgent is the program on the node, apart from the image; /run does not let
	// programs be run.
	guestAgent = "/opt/repair/agent"

	// patience is how long anything may take before the test gives up on it. It
	// says nothing about the agent: the node is emulated, and this machine may
	// be busy.
	patience = 2 * time.Minute
	look     = 300 * time.Millisecond
)

// world is the cluster, its node, and how to ask both.
type world struct {
	cp     *rig.ControlPlane
	node   *rig.Node
	client *http.Client
	server string
	began  time.Time
	notes  []string
}

func start(t *testing.T) *world {
	t.Helper()
	w := &world{began: time.Now()}
	var err error
	if os.Getenv("HYGIENE_ATTACH") != "" {
		w.cp, w.node, err = attach()
	} else {
		w.cp, w.node, err = boot(t)
	}
	if err != nil {
		t.Fatal(err)
	}
	admin, err := clientcmd.BuildConfigFromFlags("", w.cp.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	admin.QPS = -1
	if w.client, err = rest.HTTPClientFor(admin); err != nil {
		t.Fatal(err)
	}
	w.server = admin.Host
	t.Cleanup(func() { t.Logf("\n%s", strings.Join(w.notes, "\n")) })
	w.spent("cluster up")
	return w
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

func boot(t *testing.T) (*rig.ControlPlane, *rig.Node, error) {
	ctx := t.Context()
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
	w.notes = append(w.notes, fmt.Sprintf("after %4s  %s", time.Since(w.began).Round(time.Second), on))
}

// cleanupContext also serves in t.Cleanup, when the test's own context has
// ended.
func cleanupContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	t.Cleanup(cancel)
	return ctx
}

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
func (w *world) guest(t *testing.T, script string) string {
	t.Helper()
	out, err := w.node.Run(cleanupContext(t), "set -e\n"+script)
	if err != nil {
		t.Fatalf("on the node: %v\n%s\n%s", err, script, out[max(0, len(out)-2000):])
	}
	return strings.TrimSpace(out)
}

// await looks until ok returns nil.
func await(t *testing.T, what string, ok func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s: %v", patience, what, err)
		}
		time.Sleep(look)
	}
}

func (w *world) read(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.server+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := w.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %.300s", path, resp.Status, body)
	}
	return body, err
}

func (w *world) get(ctx context.Context, path string, into any) error {
	body, err := w.read(ctx, path)
	if err != nil {
		return err
	}
	return json.Unmarshal(body, into)
}

// conditions are those of ours, by their type without the prefix.
func (w *world) conditions(ctx context.Context) (map[string]corev1.NodeCondition, error) {
	var n corev1.Node
	if err := w.get(ctx, "/api/v1/nodes/"+w.node.Name(), &n); err != nil {
		return nil, err
	}
	all := map[string]corev1.NodeCondition{}
	for _, c := range n.Status.Conditions {
		if kind, ours := strings.CutPrefix(string(c.Type), prefix); ours {
			all[kind] = c
		}
	}
	return all, nil
}

// is waits until a condition has a status and the given reason, any without one.
func (w *world) is(t *testing.T, kind string, status corev1.ConditionStatus, reason string) func() error {
	return func() error {
		all, err := w.conditions(t.Context())
		if err != nil {
			return err
		}
		if c := all[kind]; c.Status != status || reason != "" && c.Reason != reason {
			return fmt.Errorf("%s is %s/%s: %s", kind, c.Status, c.Reason, c.Message)
		}
		return nil
	}
}

// healthy says whether every condition is there and tells of no problem.
func (w *world) healthy(t *testing.T) func() error {
	kinds := []string{"TimeProblem", "DiskProblem", "MultipathProblem", "ISCSIProblem", "PIDProblem", "OOMProblem", "PackageProblem", "ServiceProblem", "KernelProblem"}
	return func() error {
		all, err := w.conditions(t.Context())
		errs := []error{err}
		for _, kind := range kinds {
			if c := all[kind]; c.Status != corev1.ConditionFalse {
				errs = append(errs, fmt.Errorf("%s is %s/%s: %s", kind, c.Status, c.Reason, c.Message))
			}
		}
		if c := all["Ready"]; c.Status != corev1.ConditionTrue {
			errs = append(errs, fmt.Errorf("Ready is %s/%s: %s", c.Status, c.Reason, c.Message))
		}
		return errors.Join(errs...)
	}
}

// events are those of the agent with a reason, as "Type message".
func (w *world) events(t *testing.T, reason string) []string {
	t.Helper()
	var list corev1.EventList
	query := url.Values{"fieldSelector": {"involvedObject.name=" + w.node.Name() + ",reason=" + reason}}
	if err := w.get(t.Context(), "/api/v1/namespaces/default/events?"+query.Encode(), &list); err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range list.Items {
		if e.ReportingController == "hosthygiene.io/agent" && e.LastTimestamp.After(w.began.Add(-time.Second)) {
			all = append(all, e.Type+" "+e.Message)
		}
	}
	return all
}

// awaitEvent waits for an Event of a reason that has all of the texts.
func (w *world) awaitEvent(t *testing.T, reason string, texts ...string) string {
	t.Helper()
	var found string
	await(t, "an Event "+reason+" with "+strings.Join(texts, ", "), func() error {
		all := w.events(t, reason)
		i := slices.IndexFunc(all, func(e string) bool {
			return !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(e, text) })
		})
		if i < 0 {
			return fmt.Errorf("those there are: %q", all)
		}
		found = all[i]
		return nil
	})
	return found
}

// pod is the agent's pod as it is now.
func (w *world) pod(ctx context.Context) (corev1.Pod, error) {
	var list corev1.PodList
	if err := w.get(ctx, "/api/v1/namespaces/"+namespace+"/pods", &list); err != nil {
		return corev1.Pod{}, err
	}
	list.Items = slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	if len(list.Items) != 1 || len(list.Items[0].Status.ContainerStatuses) != 1 {
		return corev1.Pod{}, fmt.Errorf("the DaemonSet has %d running pods", len(list.Items))
	}
	return list.Items[0], nil
}

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

// log is what the agent has written since its container started.
func (w *world) log(ctx context.Context) (string, error) {
	p, err := w.pod(ctx)
	if err != nil {
		return "", err
	}
	body, err := w.read(ctx, "/api/v1/namespaces/"+namespace+"/pods/"+p.Name+"/log")
	return string(body), err
}

// logged waits until the agent has written a line with all of the texts.
func (w *world) logged(t *testing.T, texts ...string) {
	t.Helper()
	await(t, "a line of the log with "+strings.Join(texts, ", "), func() error {
		log, err := w.log(t.Context())
		if err != nil {
			return err
		}
		for line := range strings.Lines(log) {
			if !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(line, text) }) {
				return nil
			}
		}
		return errors.New("none")
	})
}

// configure writes the user's ConfigMap and waits until the agent has read it.
// By itself the kubelet brings a changed ConfigMap only with its next round, a
// minute or more later; a changed pod it looks at now.
func (w *world) configure(t *testing.T, config string) {
	t.Helper()
	const read = `msg="config read"`
	before, err := w.log(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.writeConfig(t, config)
	var looked time.Time
	await(t, "the config to be read", func() error {
		if time.Since(looked) > 20*time.Second {
			looked = time.Now()
			p, err := w.pod(t.Context())
			if err != nil {
				return err
			}
			w.kubectl(t, "annotate", "--overwrite", "-n", namespace, "pod", p.Name, fmt.Sprintf("repair/look=%d", looked.UnixNano()))
		}
		log, err := w.log(t.Context())
		if err == nil && strings.Count(log, read) <= strings.Count(before, read) {
			err = errors.New("not yet")
		}
		return err
	})
}

func (w *world) writeConfig(t *testing.T, config string) {
	t.Helper()
	w.apply(t, map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": map[string]any{"name": "host-hygiene-config", "namespace": namespace},
		"data":     map[string]string{"config.yaml": config},
	})
	if err := w.node.Write(cleanupContext(t), "/run/repair/config.yaml", 0o644, strings.NewReader(config)); err != nil {
		t.Fatal(err)
	}
}

// buildAgent compiles the agent and loads its image on the node under the name
// the manifests have.
func (w *world) buildAgent(t *testing.T) {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "agent")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=repair",
		"-o", binary, "github.com/hosthygiene/agent/cmd/agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the agent: %v\n%s", err, out)
	}
	rendered, err := os.ReadFile(manifests + "host-hygiene.yaml")
	if err != nil {
		t.Fatal(err)
	}
	image := regexp.MustCompile(`(?m)^\s+image: (\S+)$`).FindSubmatch(rendered)
	if image == nil {
		t.Fatal("the manifests name no image")
	}
	archive := filepath.Join(t.TempDir(), "agent.tar")
	if err := rig.ImageArchive(archive, string(image[1]), binary); err != nil {
		t.Fatal(err)
	}
	if err := w.node.LoadImage(t.Context(), archive); err != nil {
		t.Fatal(err)
	}
	if err := w.node.Copy(t.Context(), binary, guestAgent); err != nil {
		t.Fatal(err)
	}
	w.spent("agent built and loaded")
}

// remove takes the agent away.
func (w *world) remove(t *testing.T) {
	t.Helper()
	w.kubectl(t, "delete", "--ignore-not-found", "--wait=false", "-k", overlay)
	await(t, "the namespace to go", func() error {
		_, err := w.read(cleanupContext(t), "/api/v1/namespaces/"+namespace)
		if err == nil {
			return errors.New("it is still there")
		}
		if strings.Contains(err.Error(), "404") {
			return nil
		}
		return err
	})
}

// slot returns the Lease of the fleet's only slot, nil when there is none.
func (w *world) slot(ctx context.Context) (*coordination.Lease, error) {
	var l coordination.Lease
	err := w.get(ctx, "/apis/coordination.k8s.io/v1/namespaces/"+namespace+"/leases/host-hygiene-slot-0", &l)
	if err != nil && strings.Contains(err.Error(), "404") {
		return nil, nil
	}
	return &l, err
}

func holder(l *coordination.Lease) string {
	if l == nil || l.Spec.HolderIdentity == nil {
		return ""
	}
	return *l.Spec.HolderIdentity
}

// holdSlot makes somebody the holder of the slot, nobody with "".
func (w *world) holdSlot(t *testing.T, by string) {
	t.Helper()
	w.apply(t, map[string]any{
		"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
		"metadata": map[string]any{"name": "host-hygiene-slot-0", "namespace": namespace},
		"spec":     map[string]any{"holderIdentity": by, "leaseDurationSeconds": 3600},
	})
}

// dump shows what a person would ask for first.
func (w *world) dump(t *testing.T) {
	ctx := cleanupContext(t)
	all, err := w.conditions(ctx)
	t.Logf("conditions: %v", err)
	for kind, c := range all {
		t.Logf("  %s %s/%s: %s", kind, c.Status, c.Reason, c.Message)
	}
	log, err := w.log(ctx)
	t.Logf("log: %v\n%s", err, log[max(0, len(log)-12000):])
	out, err := w.node.Run(ctx, guestAgent+" plan --config /run/repair/config.yaml; systemctl --no-pager --failed; systemctl --no-pager list-units 'host-hygiene*'; journalctl --no-pager -n 60 -u 'host-hygiene*' -t host-hygiene")
	t.Logf("node: %v\n%s", err, out)
}
