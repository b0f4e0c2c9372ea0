//go:build cluster

package e2e

import (
	"os"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

// TestNightly is what takes too long for every change.
func TestNightly(t *testing.T) {
	if os.Getenv("HYGIENE_NIGHTLY") == "" {
		t.Skip("takes half an hour; set HYGIENE_NIGHTLY=1")
	}
	w := deploy(t)
	t.Run("ten minutes", func(t *testing.T) {
		// With the defaults, as most agents run.
		w.idle(t, 10*time.Minute)
		w.footprint(t)
	})
	w.configure(t, runConfig, w.runConfigInForce)
	t.Run("outage of ten minutes", func(t *testing.T) { w.outage(t, 10*time.Minute, 60) })
	t.Run("reboot", w.reboot)
	t.Run("second node", w.secondNode)
	t.Run("volumes", w.volumes)
	t.Run("runbooks", w.runbooks)
	t.Run("access", w.access)
	w.remove(t)
	t.Run("capabilities", w.capabilities)
	t.Run("metrics over TLS", w.metricsForCertificates)
}

// reboot: what was a problem before the machine booted is not told as one
// afterwards, when it is none.
func (w *world) reboot(t *testing.T) {
	rigtest.OnFailure(t, w.dump)
	w.Await(t, "every condition to be healthy", w.healthy)
	before := w.mark()
	w.Guest(t, "systemctl stop chrony")
	w.Await(t, "NoTimeDaemon", w.is("TimeProblem", corev1.ConditionTrue, "NoTimeDaemon"))
	w.Await(t, "the Event", func() error { return w.event(before, corev1.EventTypeWarning, "NoTimeDaemon") })
	// The daemon is enabled and starts with the machine.
	before = w.mark()
	w.restartMachine(t)
	w.Await(t, "every condition to be healthy", w.healthy)
	seconds, err := strconv.ParseInt(w.Guest(t, "awk '$1 == \"btime\" {print $2}' /proc/stat"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	booted := time.Unix(seconds, 0)
	for _, c := range w.changesSince(before) {
		t.Log(c)
		if c.to != nil && c.to.Status == corev1.ConditionTrue && c.kind != "Ready" && c.to.LastHeartbeatTime.After(booted) {
			t.Errorf("a problem after the boot: %s: %s", c, c.to.Message)
		}
	}
	for _, e := range w.eventsSince(before) {
		if e.Type == corev1.EventTypeWarning && e.LastTimestamp.After(booted) {
			t.Errorf("an Event after the boot: %s: %s", e.Reason, e.Message)
		}
	}
	w.invariants(t)
	w.Spent("rebooted")
}

// secondNode: an agent on another node speaks of that node only.
func (w *world) secondNode(t *testing.T) {
	if w.Attached {
		t.Skip("the control plane is another process's, and takes no node from here")
	}
	other := &world{Cluster: w.AddNode(t), agent: w.agent}
	other.observe(t)
	rigtest.OnFailure(t, other.dump)
	other.load(t)
	other.Guest(t, outfit) // the config requires its package
	w.Await(t, "the other node to be healthy", other.healthy)

	here, there := w.mark(), other.mark()
	other.Guest(t, "systemctl stop chrony")
	w.Await(t, "NoTimeDaemon", other.is("TimeProblem", corev1.ConditionTrue, "NoTimeDaemon"))
	w.Await(t, "the Event", func() error { return other.event(there, corev1.EventTypeWarning, "NoTimeDaemon") })
	w.passes(t, 2)
	for _, c := range w.changesSince(here) {
		t.Errorf("the other node's fault changed this one: %s", c)
	}
	other.invariants(t)
	w.Spent("second node")
}
