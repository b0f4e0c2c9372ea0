package rigtest

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hosthygiene/agent/test/rig"
)

// Options say how a test waits.
type Options struct {
	// Patience is how long anything may take before the test gives up on it.
	// It says nothing about the agent: the node is emulated, and this machine
	// may be busy.
	Patience time.Duration
	// Look is how often a wait looks.
	Look time.Duration
}

// Cluster is a cluster with one of its nodes, and what a run notes about them.
type Cluster struct {
	ControlPlane *rig.ControlPlane
	Node         *rig.Node
	// Attached clusters are another process's: nothing in them can be stopped
	// from here, and no node be added.
	Attached bool
	Began    time.Time

	opts   Options
	client *http.Client // the administrator's

	mu    sync.Mutex
	notes [][2]string
}

// Start brings up a cluster that ends with the test. With HYGIENE_ATTACH in the
// environment it uses the one of "go run ./test/cluster up" instead, of several
// the one that CLUSTER names.
func Start(t *testing.T, opts Options) *Cluster {
	t.Helper()
	c := &Cluster{Attached: os.Getenv("HYGIENE_ATTACH") != "", Began: time.Now(), opts: opts}
	if c.Attached {
		c.ControlPlane, c.Node = attach(t)
	} else {
		c.ControlPlane, c.Node = boot(t)
	}
	admin, err := clientcmd.BuildConfigFromFlags("", c.ControlPlane.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	if c.client, err = rest.HTTPClientFor(admin); err != nil {
		t.Fatal(err)
	}
	c.Spent("cluster up")
	return c
}

func attach(t *testing.T) (*rig.ControlPlane, *rig.Node) {
	t.Helper()
	cache, err := rig.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	name := os.Getenv("CLUSTER")
	if name == "" {
		name = "default"
	}
	cp, node, err := rig.Attach(filepath.Join(cache, "run", name, "cluster.json"))
	if err != nil {
		t.Fatal(err)
	}
	return cp, node
}

func boot(t *testing.T) (*rig.ControlPlane, *rig.Node) {
	t.Helper()
	if err := rig.Prerequisites(t.Context()); err != nil {
		t.Fatal(err)
	}
	image := nodeImage(t) // before the control plane, which would wait for it
	cp := ControlPlane(t, rig.ControlPlaneOptions{Controllers: true})
	return cp, startNode(t, cp, image)
}

func nodeImage(t *testing.T) rig.NodeImage {
	t.Helper()
	tools, err := rig.BuildTools(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	image, err := rig.BuildNodeImage(t.Context(), tools)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// ControlPlane starts a control plane that ends with the test, for tests that
// need no node.
func ControlPlane(t *testing.T, opts rig.ControlPlaneOptions) *rig.ControlPlane {
	t.Helper()
	tools, err := rig.BuildTools(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cp, err := rig.StartControlPlane(t.Context(), t.TempDir(), tools, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cp.Stop(); err != nil {
			t.Error(err)
		}
	})
	return cp
}

func startNode(t *testing.T, cp *rig.ControlPlane, image rig.NodeImage) *rig.Node {
	t.Helper()
	node, err := rig.StartNode(t.Context(), cp, image, rig.NodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Stop(); err != nil {
			t.Error(err)
		}
	})
	return node
}

// AddNode boots another node, which ends with the test, and returns the cluster
// with that one as its node and with notes of its own.
func (c *Cluster) AddNode(t *testing.T) *Cluster {
	t.Helper()
	return &Cluster{ControlPlane: c.ControlPlane, Node: startNode(t, c.ControlPlane, nodeImage(t)), Began: c.Began, opts: c.opts, client: c.client}
}

// Note keeps a line for the end of the run: what, and its value.
func (c *Cluster) Note(what, value string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.notes = append(c.notes, [2]string{what, value})
}

// Spent notes where the time of a run goes.
func (c *Cluster) Spent(on string) {
	c.Note("after "+time.Since(c.Began).Round(time.Second).String(), on)
}

// Notes are the lines so far.
func (c *Cluster) Notes() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b strings.Builder
	for _, n := range c.notes {
		fmt.Fprintf(&b, "%-20s %s\n", n[0], n[1])
	}
	return b.String()
}

// CleanupContext also serves in t.Cleanup, when the test's own context has
// ended.
func (c *Cluster) CleanupContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), c.opts.Patience)
	t.Cleanup(cancel)
	return ctx
}

// Await looks until ok returns nil.
func (c *Cluster) Await(t *testing.T, what string, ok func() error) {
	t.Helper()
	c.AwaitFor(t, c.opts.Patience, what, ok)
}

// AwaitFor is Await with another patience.
func (c *Cluster) AwaitFor(t *testing.T, limit time.Duration, what string, ok func() error) {
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
		time.Sleep(c.opts.Look)
	}
}

// OnFailure has a test that failed end with dump.
func OnFailure(t *testing.T, dump func(*testing.T)) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			dump(t)
		}
	})
}
