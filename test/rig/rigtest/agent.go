package rigtest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Namespace is where the manifests put the agent.
const Namespace = "host-hygiene"

// AgentPID is a line of shell that sets pid to the agent's in its container.
const AgentPID = `pid=; for p in $(pgrep -x agent); do grep -q kubepods /proc/$p/cgroup && pid=$p; done; test -n "$pid"
`

// BuildAgent compiles the agent as the file program.
func BuildAgent(ctx context.Context, program, version string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X main.version="+version,
		"-o", program, "github.com/hosthygiene/agent/cmd/agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the agent: %w\n%s", err, out)
	}
	return nil
}

// Load puts the agent on the node: an image archive that has the name in the
// manifests, and the program itself under a path there, for what a person would
// run.
func (c *Cluster) Load(t *testing.T, image, program, path string) {
	t.Helper()
	if err := c.Node.LoadImage(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	if err := c.Node.Copy(t.Context(), program, path); err != nil {
		t.Fatal(err)
	}
}

// Pod is the agent's pod on the node as it is now, with one container.
func (c *Cluster) Pod(ctx context.Context) (corev1.Pod, error) {
	var list corev1.PodList
	if err := c.Get(ctx, "/api/v1/namespaces/"+Namespace+"/pods", &list); err != nil {
		return corev1.Pod{}, err
	}
	list.Items = slices.DeleteFunc(list.Items, func(p corev1.Pod) bool {
		return p.DeletionTimestamp != nil || p.Spec.NodeName != c.Node.Name()
	})
	if len(list.Items) != 1 || len(list.Items[0].Status.ContainerStatuses) != 1 {
		return corev1.Pod{}, fmt.Errorf("the DaemonSet has %d running pods on the node", len(list.Items))
	}
	return list.Items[0], nil
}

// PodReady waits until the agent's container has been started again as often as
// given, and is ready.
func (c *Cluster) PodReady(t *testing.T, restarts int32) {
	t.Helper()
	c.Await(t, "the agent's pod", func() error {
		p, err := c.Pod(t.Context())
		if err != nil {
			return err
		}
		if s := p.Status.ContainerStatuses[0]; !s.Ready || s.RestartCount != restarts {
			return fmt.Errorf("ready: %t, restarts: %d, want %d; state %+v", s.Ready, s.RestartCount, restarts, s.State)
		}
		return nil
	})
}

// WriteConfig writes the user's ConfigMap.
func (c *Cluster) WriteConfig(t *testing.T, config string) {
	t.Helper()
	c.Apply(t, map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": map[string]any{"name": "host-hygiene-config", "namespace": Namespace},
		"data":     map[string]string{"config.yaml": config},
	})
}

// AwaitConfig waits until the agent shows that the config just written is in
// force. By itself the kubelet brings a changed ConfigMap only with its next
// round, a minute or more later; a changed pod it looks at now.
func (c *Cluster) AwaitConfig(t *testing.T, inForce func() error) {
	t.Helper()
	var looked time.Time
	c.Await(t, "the config to be in force", func() error {
		if time.Since(looked) > 10*time.Second {
			looked = time.Now()
			p, err := c.Pod(t.Context())
			if err != nil {
				return err
			}
			c.Kubectl(t, "annotate", "--overwrite", "-n", Namespace, "pod", p.Name, "rig/look="+strconv.FormatInt(looked.UnixNano(), 10))
		}
		return inForce()
	})
}
