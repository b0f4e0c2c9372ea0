package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/remedy"
	"github.com/hosthygiene/agent/pkg/report"
	"github.com/hosthygiene/agent/test/rig"
)

const (
	namespace = remedy.Namespace
	account   = "host-hygiene-agent"
)

// fleet is a control plane, nodes that exist in it alone, and the reporting half
// of an agent for each.
type fleet struct {
	population
	cp       *rig.ControlPlane
	admin    admin
	address  rest.Config // of the API server, without credentials
	sections *config.Sections
	boot     time.Time
	agents   []*agent
	log      *slog.Logger
	// record is where requests are noted now.
	record atomic.Pointer[record]
}

// population is what a fleet is made of.
type population struct {
	nodes int
	// lived: the nodes carry the conditions of agents that ran before, last
	// refreshed at any time of the 75 minutes in which each is due once. Without,
	// no agent was ever there.
	lived bool
	// pass is how far apart the probes of an agent's first pass come in.
	pass time.Duration
}

// admin is the administrator's client.
type admin struct {
	client *http.Client
	server string
}

// request makes one request and returns the answer; an answer other than 2xx is
// an error.
func (a admin) request(ctx context.Context, method, path, contentType string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, a.server+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("Accept", "application/json")
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: %s: %.300s", method, path, resp.Status, data)
	}
	return data, nil
}

func (a admin) post(ctx context.Context, path string, object any) ([]byte, error) {
	body, err := json.Marshal(object)
	if err != nil {
		return nil, err
	}
	return a.request(ctx, http.MethodPost, path, "application/json", body)
}

// newFleet starts a control plane in dir with the project's manifests and makes
// the nodes, each with a pod of the agent's and a token bound to it.
func newFleet(ctx context.Context, dir string, p population, manifests string, log *slog.Logger) (_ *fleet, err error) {
	if err := allowFiles(p.nodes); err != nil {
		return nil, err
	}
	tools, err := rig.BuildTools(ctx)
	if err != nil {
		return nil, err
	}
	cp, err := rig.StartControlPlane(ctx, dir, tools, rig.ControlPlaneOptions{})
	if err != nil {
		return nil, err
	}
	f := &fleet{population: p, cp: cp, log: log, sections: &config.Default().Sections, boot: time.Now().Add(-24 * time.Hour)}
	f.record.Store(newRecord())
	defer func() {
		if err != nil {
			err = errors.Join(err, f.stop())
		}
	}()
	if _, err := cp.Kubectl(ctx, "apply", "-f", manifests); err != nil {
		return nil, err
	}
	c, err := clientcmd.BuildConfigFromFlags("", cp.Kubeconfig())
	if err != nil {
		return nil, err
	}
	f.address = *rest.AnonymousClientConfig(c)
	if f.admin.client, err = rest.HTTPClientFor(c); err != nil {
		return nil, err
	}
	f.admin.server = cp.Server()
	f.agents = make([]*agent, f.nodes)
	began := time.Now()
	if err := f.populate(ctx); err != nil {
		return nil, fmt.Errorf("making %d nodes, their pods and their tokens: %w", f.nodes, err)
	}
	log.InfoContext(ctx, "nodes, pods and tokens made", "nodes", f.nodes, "took", time.Since(began).Round(time.Second))
	return f, f.waitForPolicies(ctx)
}

// allowFiles sees to it that this process may have a connection for each node,
// and the API server its end of it.
func allowFiles(nodes int) error {
	need := uint64(2*nodes + 1000)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("reading how many files may be open: %w", err)
	}
	if limit.Cur >= need {
		return nil
	}
	raised := unix.Rlimit{Cur: need, Max: max(need, limit.Max)}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &raised); err != nil {
		return fmt.Errorf("%d connections need %d open files and %d are allowed (ulimit -n %d): %w", nodes, need, limit.Max, need, err)
	}
	return nil
}

// stop ends the agents and the control plane.
func (f *fleet) stop() error {
	f.each(func(a *agent) { a.stop() })
	return f.cp.Stop()
}

// each calls do for every agent at once and waits.
func (f *fleet) each(do func(*agent)) {
	var all sync.WaitGroup
	for _, a := range f.agents {
		if a != nil {
			all.Go(func() { do(a) })
		}
	}
	all.Wait()
}

func (f *fleet) populate(ctx context.Context) error {
	// As many at a time as keep two processors busy: what is measured comes later.
	const workers = 32
	var all sync.WaitGroup
	var next atomic.Int64
	errs := make([]error, workers)
	for w := range workers {
		all.Go(func() {
			for errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= len(f.agents) {
					return
				}
				f.agents[i], errs[w] = f.makeNode(ctx, i)
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

func (f *fleet) makeNode(ctx context.Context, i int) (*agent, error) {
	a := &agent{fleet: f, name: fmt.Sprintf("node-%05d", i), number: i, changed: make(chan struct{}, 1)}
	age := 75 * time.Minute * time.Duration(i) / time.Duration(len(f.agents))
	if _, err := f.admin.post(ctx, "/api/v1/nodes", a.object(f.lived, time.Now().Add(-age))); err != nil {
		return nil, err
	}
	raw, err := f.admin.post(ctx, "/api/v1/namespaces/"+namespace+"/pods", a.pod())
	if err != nil {
		return nil, err
	}
	var pod struct{ Metadata struct{ UID string } }
	if err := json.Unmarshal(raw, &pod); err != nil {
		return nil, err
	}
	raw, err = f.admin.post(ctx, "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+account+"/token", map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
		"spec": map[string]any{"expirationSeconds": 4 * 3600, "boundObjectRef": map[string]any{
			"apiVersion": "v1", "kind": "Pod", "name": a.podName(), "uid": pod.Metadata.UID}},
	})
	if err != nil {
		return nil, err
	}
	var token struct{ Status struct{ Token string } }
	if err := json.Unmarshal(raw, &token); err != nil {
		return nil, err
	}
	a.token = token.Status.Token
	return a, nil
}

// waitForPolicies waits until the admission policies of the manifests are in
// force, which takes some moments: until an agent's token may neither write a
// Lease of a name that is no slot's nor the status of another's node.
func (f *fleet) waitForPolicies(ctx context.Context) error {
	if len(f.agents) < 2 {
		return errors.New("a fleet has two nodes at least")
	}
	c := rest.CopyConfig(&f.address)
	c.BearerToken = f.agents[0].token
	c.UserAgent = "fleet-trespasser"
	api, err := report.NewAPI(f.agents[1].name, c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for i := 0; ; i++ {
		_, lease := api.CreateLease(ctx, &report.Lease{Metadata: report.LeaseMetadata{Namespace: namespace, Name: fmt.Sprintf("fleet-%d", i)}})
		_, node := api.PatchConditions(ctx, func() []byte { return []byte(`{"status":{"conditions":[]}}`) })
		if denied(lease) && denied(node) {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the admission policies are not in force after a minute: %w", errors.Join(lease, node))
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// policies are the names of the admission policies in force.
func (f *fleet) policies(ctx context.Context) ([]string, error) {
	raw, err := f.admin.request(ctx, http.MethodGet, "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings", "", nil)
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct{ Spec struct{ PolicyName string } }
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, err
	}
	var names []string
	for _, b := range list.Items {
		names = append(names, b.Spec.PolicyName)
	}
	return names, nil
}

// saying counts the nodes whose TimeProblem has a status, read by the
// administrator from etcd, not by an agent.
func (f *fleet) saying(ctx context.Context, status string) (int, error) {
	n, next := 0, ""
	for {
		raw, err := f.admin.request(ctx, http.MethodGet, "/api/v1/nodes?limit=500&continue="+next, "", nil)
		if err != nil {
			return 0, err
		}
		var list struct {
			Metadata struct{ Continue string }
			Items    []report.Node
		}
		if err := json.Unmarshal(raw, &list); err != nil {
			return 0, err
		}
		for _, node := range list.Items {
			if statusOf(&node, timeProblem) == status {
				n++
			}
		}
		if next = list.Metadata.Continue; next == "" {
			return n, nil
		}
	}
}

// kubelets updates the nodes' status as their kubelets do while nothing changes,
// each every five minutes: every update is also sent to the agent that watches
// its node. A kubelet's Lease, every ten seconds, has no part in it.
func (f *fleet) kubelets(ctx context.Context) {
	ticks := time.NewTicker(5 * time.Minute / time.Duration(len(f.agents)))
	defer ticks.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-ticks.C:
		}
		a := f.agents[i%len(f.agents)]
		body := fmt.Sprintf(`{"status":{"conditions":[{"type":"Ready","lastHeartbeatTime":%q}]}}`, time.Now().UTC().Format(time.RFC3339))
		path := "/api/v1/nodes/" + a.name + "/status"
		if _, err := f.admin.request(ctx, http.MethodPatch, path, "application/strategic-merge-patch+json", []byte(body)); err != nil && ctx.Err() == nil {
			f.log.WarnContext(ctx, "a kubelet's update", "error", err)
		}
	}
}

// start starts the agents, evenly over some time, and waits until each has
// reported and watches its node.
func (f *fleet) start(ctx context.Context, over time.Duration) error {
	f.evenly(ctx, len(f.agents), over, func(a *agent) { a.start() })
	return f.until(ctx, func(r *record) bool { return r.reported() >= len(f.agents) && r.count("watch", ok) >= len(f.agents) })
}

// flip makes the clocks of the first n nodes bad, or good again, evenly over some
// time, and waits until the API server has said so of each and has taken an
// Event of each.
func (f *fleet) flip(ctx context.Context, n int, over time.Duration) error {
	f.evenly(ctx, n, over, func(a *agent) { a.flip() })
	return f.until(ctx, func(r *record) bool { return r.toldCount() >= n && r.count("event", ok) >= n })
}

// evenly calls do for the first n agents, evenly over some time.
func (f *fleet) evenly(ctx context.Context, n int, over time.Duration, do func(*agent)) {
	began := time.Now()
	for i, a := range f.agents[:n] {
		if wait := time.Until(began.Add(over * time.Duration(i) / time.Duration(n))); wait > 0 {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return
			}
		}
		do(a)
	}
}

// errNotAll says that the fleet did not arrive where it was sent.
var errNotAll = errors.New("not all nodes came through within five minutes")

func (f *fleet) until(ctx context.Context, done func(*record) bool) error {
	for deadline := time.Now().Add(5 * time.Minute); time.Now().Before(deadline); {
		if done(f.record.Load()) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return fmt.Errorf("%w: %s", errNotAll, f.record.Load())
}

// rollout restarts every agent as the DaemonSet of the manifests does: at most a
// tenth is away at a time, and an agent counts as back minReady after it has
// reported. A new one starts the moment the old one ended, where a kubelet needs
// seconds; and the DaemonSet controller, held to 20 requests a second, would
// never replace a tenth of a large fleet at once.
func (f *fleet) rollout(ctx context.Context, minReady time.Duration) error {
	away := make(chan struct{}, int(math.Ceil(float64(len(f.agents))/10)))
	var all sync.WaitGroup
	var failed atomic.Int64
	for _, a := range f.agents {
		select {
		case away <- struct{}{}:
		case <-ctx.Done():
		}
		all.Go(func() {
			defer func() { <-away }()
			a.stop()
			a.start()
			if !a.waitReported(ctx, 5*time.Minute) {
				failed.Add(1)
				return
			}
			select {
			case <-time.After(minReady):
			case <-ctx.Done():
			}
		})
	}
	all.Wait()
	if n := failed.Load(); n > 0 && ctx.Err() == nil {
		return fmt.Errorf("%w: %d agents did not report", errNotAll, n)
	}
	return ctx.Err()
}

// outage takes the API server away for some time, and waits until every agent
// watches its node again.
func (f *fleet) outage(ctx context.Context, length time.Duration) error {
	if err := f.cp.StopAPIServer(); err != nil {
		return err
	}
	select {
	case <-time.After(length):
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := f.cp.StartAPIServer(ctx); err != nil {
		return err
	}
	return f.until(ctx, func(r *record) bool { return r.count("watch", ok) >= len(f.agents) })
}

// manifestsDir is where the project's manifests are, from the folder of go test
// and from the repository's.
func manifestsDir() (string, error) {
	for _, dir := range []string{"manifests", filepath.Join("..", "..", "manifests")} {
		if _, err := os.Stat(filepath.Join(dir, "host-hygiene.yaml")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("manifests/host-hygiene.yaml is not here: run this from the repository's root")
}
