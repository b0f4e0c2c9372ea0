//go:build cluster

package e2e

import (
	"errors"
	"os"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/rig"
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
	t.Run("access", w.access)
}

// reboot: what was a problem before the machine booted is not told as one
// afterwards, when it is none.
func (w *world) reboot(t *testing.T) {
	t.Cleanup(func() {
		if t.Failed() {
			w.dump(t)
		}
	})
	await(t, "every condition to be healthy", w.healthy)
	before := w.mark()
	w.mustGuest(t, "systemctl stop chrony")
	await(t, "NoTimeDaemon", w.is("TimeProblem", corev1.ConditionTrue, "NoTimeDaemon"))
	await(t, "the Event", func() error { return w.event(before, corev1.EventTypeWarning, "NoTimeDaemon") })
	// The daemon is enabled and starts with the machine.
	before = w.mark()
	boot := w.mustGuest(t, "cat /proc/sys/kernel/random/boot_id; systemd-run --quiet --on-active=1 systemctl reboot")
	// It goes down in order first, and waits for what does not stop.
	awaitFor(t, 3*patience, "the machine to boot again", func() error {
		now, err := w.guest(t.Context(), "cat /proc/sys/kernel/random/boot_id")
		if err == nil && now == boot {
			return errors.New("it has not gone down yet")
		}
		return err
	})
	if err := w.node.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, "every condition to be healthy", w.healthy)
	seconds, err := strconv.ParseInt(w.mustGuest(t, "awk '$1 == \"btime\" {print $2}' /proc/stat"), 10, 64)
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
	w.spent("rebooted")
}

// secondNode: an agent on another node speaks of that node only.
func (w *world) secondNode(t *testing.T) {
	if w.attached {
		t.Skip("the control plane is another process's, and takes no node from here")
	}
	tools, err := rig.BuildTools(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	image, err := rig.BuildNodeImage(t.Context(), tools)
	if err != nil {
		t.Fatal(err)
	}
	node, err := rig.StartNode(t.Context(), w.cp, image, rig.NodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Stop(); err != nil {
			t.Error(err)
		}
	})
	other := &world{cp: w.cp, node: node, admin: w.admin, began: w.began, agent: w.agent}
	other.observe(t)
	t.Cleanup(func() {
		if t.Failed() {
			other.dump(t)
		}
	})
	other.load(t)
	other.mustGuest(t, outfit) // the config requires its package
	await(t, "the other node to be healthy", other.healthy)

	here, there := w.mark(), other.mark()
	other.mustGuest(t, "systemctl stop chrony")
	await(t, "NoTimeDaemon", other.is("TimeProblem", corev1.ConditionTrue, "NoTimeDaemon"))
	await(t, "the Event", func() error { return other.event(there, corev1.EventTypeWarning, "NoTimeDaemon") })
	w.passes(t, 2)
	for _, c := range w.changesSince(here) {
		t.Errorf("the other node's fault changed this one: %s", c)
	}
	other.invariants(t)
	w.spent("second node")
}
