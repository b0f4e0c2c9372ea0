//go:build cluster

package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hosthygiene/agent/pkg/remedy"
	"github.com/hosthygiene/agent/pkg/report"
)

func (c *cluster) apiWith(node, token string) *report.API {
	c.t.Helper()
	config := rest.CopyConfig(c.agent)
	config.BearerToken = token
	api, err := report.NewAPI(node, config)
	if err != nil {
		c.t.Fatal(err)
	}
	return api
}

func (c *cluster) admin() *report.API {
	c.t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		c.t.Fatal(err)
	}
	api, err := report.NewAPI("", config)
	if err != nil {
		c.t.Fatal(err)
	}
	return api
}

// holder is who holds a slot, read by kubectl and not by our own client.
func (c *cluster) holder(slot string) string {
	c.t.Helper()
	return c.kubectl("get", "lease", "-n", "host-hygiene", slot, "-o", "jsonpath={.spec.holderIdentity}")
}

func denied(err error) bool {
	return apierrors.IsInvalid(err) || apierrors.IsForbidden(err)
}

// waitForPolicy: a policy is in force some moments after it was applied.
func (c *cluster) waitForPolicy(api *report.API) {
	c.t.Helper()
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		probe := &report.Lease{Metadata: report.LeaseMetadata{Namespace: remedy.Namespace, Name: fmt.Sprintf("probe-%d", time.Now().UnixNano())}}
		if _, err := api.CreateLease(c.t.Context(), probe); denied(err) {
			return
		}
	}
	c.t.Fatal("the admission policy is not in force after 60s")
}

func TestLeases(t *testing.T) {
	c := start(t)
	ctx := t.Context()
	n1, n2 := c.apiWith("n1", c.podToken("n1")), c.apiWith("n2", c.podToken("n2"))
	admin := c.admin()
	c.waitForPolicy(n1)
	log := slog.New(slog.NewTextHandler(testWriter{t}, nil))

	t.Run("the gate with the agent's own rights", func(t *testing.T) {
		g1, g2 := remedy.NewGate(n1, "n1", log), remedy.NewGate(n2, "n2", log)
		p, err := g1.Enter(ctx, 1, 10*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if h := c.holder(p.Slot()); h != "n1" {
			t.Errorf("held by %q", h)
		}
		var busy *remedy.BusyError
		if _, err := g2.Enter(ctx, 1, time.Minute); !errors.As(err, &busy) {
			t.Errorf("want the slot to be held: %v", err)
		}
		if err := p.Cover(ctx, 20*time.Minute); err != nil {
			t.Error(err)
		}
		if s := c.kubectl("get", "lease", "-n", "host-hygiene", p.Slot(), "-o", "jsonpath={.spec.leaseDurationSeconds}"); s != "1320" {
			t.Errorf("held for %s s, want 20 minutes and the margin", s)
		}
		if err := p.Release(ctx); err != nil {
			t.Error(err)
		}
		if h := c.holder(p.Slot()); h != "" {
			t.Errorf("still held by %q", h)
		}
		p, err = g2.Enter(ctx, 1, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		p.Abandon()
		if p, err = remedy.NewGate(n2, "n2", log).Adopt(ctx, 1); err != nil || p == nil {
			t.Fatalf("a restarted agent does not find its slot: %v", err)
		}
		if err := p.Release(ctx); err != nil {
			t.Error(err)
		}
	})

	t.Run("an expired slot is taken over", func(t *testing.T) {
		p, err := remedy.NewGate(n1, "n1", log).Enter(ctx, 1, 0)
		if err != nil {
			t.Fatal(err)
		}
		p.Abandon()
		// A person shortens it, so that the test need not wait for the margin.
		l, err := admin.GetLease(ctx, remedy.Namespace, p.Slot())
		if err != nil {
			t.Fatal(err)
		}
		l.Spec.LeaseDurationSeconds = 3
		if _, err := admin.UpdateLease(ctx, l); err != nil {
			t.Fatal(err)
		}
		g2 := remedy.NewGate(n2, "n2", log)
		began := time.Now()
		for {
			q, err := g2.Enter(ctx, 1, 0)
			if err == nil {
				if took := time.Since(began); took < 3*time.Second {
					t.Errorf("taken over after %s", took)
				}
				if err := q.Release(ctx); err != nil {
					t.Error(err)
				}
				return
			}
			if time.Since(began) > time.Minute {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
	})

	t.Run("two holders race", func(t *testing.T) {
		for range 10 {
			gates := []*remedy.Gate{remedy.NewGate(n1, "n1", log), remedy.NewGate(n2, "n2", log)}
			passes := make([]*remedy.Pass, len(gates))
			var both sync.WaitGroup
			for i, g := range gates {
				both.Go(func() {
					p, err := g.Enter(ctx, 1, time.Minute)
					var busy *remedy.BusyError
					if err != nil && !errors.As(err, &busy) {
						t.Error(err)
					}
					passes[i] = p
				})
			}
			both.Wait()
			if (passes[0] == nil) == (passes[1] == nil) {
				t.Fatalf("want exactly one to come in: %v", passes)
			}
			for _, p := range passes {
				if p != nil {
					if err := p.Release(ctx); err != nil {
						t.Error(err)
					}
				}
			}
		}
	})

	t.Run("failures and resume", func(t *testing.T) {
		g1, g2 := remedy.NewGate(n1, "n1", log), remedy.NewGate(n2, "n2", log)
		for _, g := range []*remedy.Gate{g1, g2, g2} {
			if err := g.CountFailure(ctx, remedy.Failure{Step: "install lsscsi", Time: time.Now(), Message: "E: Unable to locate package"}); err != nil {
				t.Fatal(err)
			}
		}
		if f, err := g1.Failures(ctx); err != nil || f.Count != 2 {
			t.Errorf("%+v, %v", f, err)
		}
		if _, _, err := remedy.Resume(ctx, n1); !denied(err) {
			t.Errorf("an agent clears the failures: %v", err)
		}
		if were, _, err := remedy.Resume(ctx, admin); err != nil || were.Count != 2 {
			t.Errorf("%+v, %v", were, err)
		}
		if f, err := g1.Failures(ctx); err != nil || f.Count != 0 {
			t.Errorf("%+v, %v", f, err)
		}
	})
}

// What an agent that somebody has taken over can not do.
func TestLeaseAdmission(t *testing.T) {
	c := start(t)
	n1, n2 := c.apiWith("n1", c.podToken("n1")), c.apiWith("n2", c.podToken("n2"))
	unbound := c.apiWith("n1", c.token())
	admin := c.admin()
	c.waitForPolicy(n1)

	// held says who holds it before; "-" that there is no such Lease.
	for i, tc := range []struct {
		name         string
		as           *report.API
		lease        string
		held, holder string
		count, was   string // annotation of failures, after and before
		denied       bool
	}{
		{name: "creates a slot in its own name", as: n1, lease: "host-hygiene-slot-1", held: "-", holder: "n1"},
		{name: "creates a slot in another's name", as: n1, lease: "host-hygiene-slot-2", held: "-", holder: "n2", denied: true},
		{name: "creates a free slot", as: n1, lease: "host-hygiene-slot-3", held: "-", holder: ""},
		{name: "takes a free slot", as: n1, lease: "host-hygiene-slot-4", held: "", holder: "n1"},
		{name: "gives a free slot to another", as: n1, lease: "host-hygiene-slot-5", held: "", holder: "n2", denied: true},
		{name: "renews its own", as: n1, lease: "host-hygiene-slot-6", held: "n1", holder: "n1"},
		{name: "gives its own back", as: n1, lease: "host-hygiene-slot-7", held: "n1", holder: ""},
		{name: "gives its own to another", as: n1, lease: "host-hygiene-slot-8", held: "n1", holder: "n2", denied: true},
		{name: "takes over, as it must after an expiry", as: n1, lease: "host-hygiene-slot-9", held: "n2", holder: "n1"},
		{name: "frees another's", as: n1, lease: "host-hygiene-slot-10", held: "n2", holder: "", denied: true},
		{name: "renews another's", as: n1, lease: "host-hygiene-slot-11", held: "n2", holder: "n2", denied: true},
		{name: "touches a free one", as: n1, lease: "host-hygiene-slot-12", held: "", holder: ""},
		{name: "a token of another node's pod", as: n2, lease: "host-hygiene-slot-13", held: "-", holder: "n1", denied: true},
		{name: "a token that is bound to no pod", as: unbound, lease: "host-hygiene-slot-14", held: "-", holder: "n1", denied: true},
		{name: "a token that is bound to no pod, and no holder", as: unbound, lease: "host-hygiene-slot-15", held: "", holder: "", denied: true},
		{name: "another Lease", as: n1, lease: "host-hygiene-leader", held: "-", holder: "n1", denied: true},
		{name: "almost a slot", as: n1, lease: "host-hygiene-slot-1x", held: "-", holder: "n1", denied: true},
		{name: "a slot with a zero before it", as: n1, lease: "host-hygiene-slot-01", held: "-", holder: "n1", denied: true},
		{name: "an administrator gives a slot away", as: admin, lease: "host-hygiene-slot-16", held: "n1", holder: "n2"},

		{name: "counts the first failure", as: n1, lease: "host-hygiene-failures", held: "-", count: "1"},
		{name: "counts one more", as: n1, lease: "host-hygiene-failures", was: "2", count: "3"},
		{name: "counts beyond nine", as: n1, lease: "host-hygiene-failures", was: "9", count: "10"},
		{name: "counts as many", as: n1, lease: "host-hygiene-failures", was: "3", count: "3"},
		{name: "counts fewer", as: n1, lease: "host-hygiene-failures", was: "3", count: "2", denied: true},
		{name: "drops the count", as: n1, lease: "host-hygiene-failures", was: "3", denied: true},
		{name: "writes no count", as: n1, lease: "host-hygiene-failures", was: "3", count: "many", denied: true},
		{name: "holds the count", as: n1, lease: "host-hygiene-failures", was: "3", count: "3", holder: "n1", denied: true},
		{name: "a count that can not be read stays", as: n1, lease: "host-hygiene-failures", was: "many", count: "1", denied: true},
		{name: "an unbound token counts", as: unbound, lease: "host-hygiene-failures", was: "1", count: "2", denied: true},
		{name: "an administrator clears the count", as: admin, lease: "host-hygiene-failures", was: "3", count: "0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := t.Context()
			c := *c
			c.t = t
			l := &report.Lease{Metadata: report.LeaseMetadata{Namespace: remedy.Namespace, Name: tc.lease}}
			annotate := func(count string) {
				l.Metadata.Annotations = nil
				if count != "" {
					l.Metadata.Annotations = map[string]string{remedy.AnnotationFailures: count}
				}
			}
			c.kubectl("delete", "lease", "-n", remedy.Namespace, tc.lease, "--ignore-not-found")
			if tc.held != "-" {
				l.Spec.HolderIdentity, l.Spec.LeaseDurationSeconds = tc.held, 60
				annotate(tc.was)
				var err error
				if l, err = admin.CreateLease(ctx, l); err != nil {
					t.Fatal(err)
				}
			}
			l.Spec.HolderIdentity, l.Spec.LeaseDurationSeconds = tc.holder, int32(100+i)
			annotate(tc.count)
			write := tc.as.UpdateLease
			if tc.held == "-" {
				write = tc.as.CreateLease
			}
			_, err := write(ctx, l)
			if tc.denied {
				if !denied(err) || !strings.Contains(err.Error(), "host-hygiene-agent-leases") {
					t.Errorf("want the policy to deny it: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var after report.Lease
			if err := json.Unmarshal([]byte(c.kubectl("get", "lease", "-n", remedy.Namespace, tc.lease, "-o", "json")), &after); err != nil {
				t.Fatal(err)
			}
			if after.Spec.HolderIdentity != tc.holder || after.Spec.LeaseDurationSeconds != int32(100+i) || after.Metadata.Annotations[remedy.AnnotationFailures] != tc.count {
				t.Errorf("%+v", after)
			}
		})
	}
}

// RBAC has get, create and update of Leases in our namespace, and no more.
func TestLeaseRBAC(t *testing.T) {
	c := start(t)
	api := c.apiWith("n1", c.podToken("n1"))
	if _, err := api.GetLease(t.Context(), "kube-system", "kube-scheduler"); !apierrors.IsForbidden(err) {
		t.Errorf("another namespace: %v", err)
	}
	for _, verb := range []string{"list", "watch", "patch", "delete", "deletecollection"} {
		out, err := c.Kubectl(t.Context(), "auth", "can-i", verb, "leases", "-n", "host-hygiene",
			"--as", "system:serviceaccount:host-hygiene:host-hygiene-agent")
		if err == nil {
			t.Errorf("may %s: %s", verb, out)
		}
	}
}

// What the agent is told of its own Node is what keeps remedies off it.
func TestNodeFacts(t *testing.T) {
	c := start(t)
	p, _, _ := c.publisher(nil)
	eventually := func(what string, want func(*report.Node) bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			if want(p.Node()) {
				return
			}
		}
		t.Errorf("%s: %+v", what, p.Node())
	}
	eventually("fit", func(n *report.Node) bool {
		return n != nil && !n.Spec.Unschedulable && n.Metadata.Annotations.Rebooting == ""
	})
	c.kubectl("cordon", node)
	eventually("cordoned", func(n *report.Node) bool { return n != nil && n.Spec.Unschedulable })
	c.kubectl("uncordon", node)
	c.kubectl("annotate", "node", node, "weave.works/kured-reboot-in-progress=2026-11-21T02:00:00Z", "example.com/other=x")
	eventually("rebooting", func(n *report.Node) bool {
		return n != nil && !n.Spec.Unschedulable && n.Metadata.Annotations.Rebooting == "2026-11-21T02:00:00Z"
	})
	c.kubectl("delete", "node", node)
	eventually("deleted", func(n *report.Node) bool { return n == nil })
}
