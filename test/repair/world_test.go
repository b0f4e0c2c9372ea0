//go:build cluster

package repair

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	coordination "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/rig"
	"github.com/hosthygiene/agent/test/rig/rigtest"
)

const (
	manifests = "../../manifests/"
	overlay   = manifests + "kustomize/overlays/remedies"

	// guestAgent is the program on the node, apart from the image; /run does not let
	// programs be run.
	guestAgent = "/opt/repair/agent"

	patience = 5 * time.Minute
	look     = 300 * time.Millisecond
)

// world is the cluster, its node, and what this test asks of both.
type world struct{ *rigtest.Cluster }

func start(t *testing.T) *world {
	t.Helper()
	w := &world{rigtest.Start(t, rigtest.Options{Patience: patience, Look: look})}
	t.Cleanup(func() { t.Logf("\n%s", w.Notes()) })
	return w
}

// conditions are those of ours.
func (w *world) conditions(ctx context.Context) (rigtest.Conditions, error) {
	var n corev1.Node
	if err := w.Get(ctx, "/api/v1/nodes/"+w.Node.Name(), &n); err != nil {
		return nil, err
	}
	all := rigtest.Conditions{}
	for _, c := range n.Status.Conditions {
		if kind, ours := strings.CutPrefix(string(c.Type), rigtest.ConditionPrefix); ours {
			all[kind] = c
		}
	}
	return all, nil
}

// is says whether a condition has a status and a reason.
func (w *world) is(t *testing.T, kind string, status corev1.ConditionStatus, reason string) func() error {
	return func() error {
		all, err := w.conditions(t.Context())
		if err != nil {
			return err
		}
		return all.Is(kind, status, reason)
	}
}

// healthy says whether every condition is there and tells of no problem.
func (w *world) healthy(t *testing.T) func() error {
	return func() error {
		all, err := w.conditions(t.Context())
		if err != nil {
			return err
		}
		return all.Healthy("TimeProblem", "DiskProblem", "MultipathProblem", "ISCSIProblem", "PIDProblem", "OOMProblem", "PackageProblem", "ServiceProblem", "KernelProblem")
	}
}

// events are those of the agent with a reason, as "Type message".
func (w *world) events(t *testing.T, reason string) []string {
	t.Helper()
	var list corev1.EventList
	query := url.Values{"fieldSelector": {"involvedObject.name=" + w.Node.Name() + ",reason=" + reason}}
	if err := w.Get(t.Context(), "/api/v1/namespaces/default/events?"+query.Encode(), &list); err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range list.Items {
		if e.ReportingController == "hosthygiene.io/agent" && e.LastTimestamp.After(w.Began.Add(-time.Second)) {
			all = append(all, e.Type+" "+e.Message)
		}
	}
	return all
}

// awaitEvent waits for an Event of a reason that has all of the texts.
func (w *world) awaitEvent(t *testing.T, reason string, texts ...string) string {
	t.Helper()
	var found string
	w.Await(t, "an Event "+reason+" with "+strings.Join(texts, ", "), func() error {
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

// log is what the agent has written since its container started.
func (w *world) log(ctx context.Context) (string, error) {
	p, err := w.Pod(ctx)
	if err != nil {
		return "", err
	}
	body, err := w.Read(ctx, "/api/v1/namespaces/"+rigtest.Namespace+"/pods/"+p.Name+"/log")
	return string(body), err
}

// logged waits until the agent has written a line with all of the texts.
func (w *world) logged(t *testing.T, texts ...string) {
	t.Helper()
	w.Await(t, "a line of the log with "+strings.Join(texts, ", "), func() error {
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
func (w *world) configure(t *testing.T, config string) {
	t.Helper()
	const read = `msg="config read"`
	before, err := w.log(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.writeConfig(t, config)
	w.AwaitConfig(t, func() error {
		log, err := w.log(t.Context())
		if err == nil && strings.Count(log, read) <= strings.Count(before, read) {
			err = errors.New("not yet")
		}
		return err
	})
}

// writeConfig writes the user's ConfigMap, and the same to the node for agent
// plan.
func (w *world) writeConfig(t *testing.T, config string) {
	t.Helper()
	w.WriteConfig(t, config)
	if err := w.Node.Write(w.CleanupContext(t), "/run/repair/config.yaml", 0o644, strings.NewReader(config)); err != nil {
		t.Fatal(err)
	}
}

// buildAgent compiles the agent and loads its image on the node under the name
// the manifests have.
func (w *world) buildAgent(t *testing.T) {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "agent")
	if err := rigtest.BuildAgent(t.Context(), binary, "repair"); err != nil {
		t.Fatal(err)
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
	w.Load(t, archive, binary, guestAgent)
	w.Spent("agent built and loaded")
}

// remove takes the agent away.
func (w *world) remove(t *testing.T) {
	t.Helper()
	w.Kubectl(t, "delete", "--ignore-not-found", "--wait=false", "-k", overlay)
	w.Await(t, "the namespace to go", func() error {
		_, err := w.Read(w.CleanupContext(t), "/api/v1/namespaces/"+rigtest.Namespace)
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
	err := w.Get(ctx, "/apis/coordination.k8s.io/v1/namespaces/"+rigtest.Namespace+"/leases/host-hygiene-slot-0", &l)
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
	w.Apply(t, map[string]any{
		"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
		"metadata": map[string]any{"name": "host-hygiene-slot-0", "namespace": rigtest.Namespace},
		"spec":     map[string]any{"holderIdentity": by, "leaseDurationSeconds": 3600},
	})
}

// dump shows what a person would ask for first.
func (w *world) dump(t *testing.T) {
	ctx := w.CleanupContext(t)
	all, err := w.conditions(ctx)
	t.Logf("conditions: %v\n%s", err, all)
	log, err := w.log(ctx)
	t.Logf("log: %v\n%s", err, log[max(0, len(log)-12000):])
	out, err := w.Node.Run(ctx, guestAgent+" plan --config /run/repair/config.yaml; systemctl --no-pager --failed; systemctl --no-pager list-units 'host-hygiene*'; journalctl --no-pager -n 60 -u 'host-hygiene*' -t host-hygiene")
	t.Logf("node: %v\n%s", err, out)
}
