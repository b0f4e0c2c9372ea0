package remedy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/report"
)

// fleetHost is one node of a fake fleet: a host on which things are missing, an
// engine that looks when it is woken, and a worker that repairs.
type fleetHost struct {
	t       *testing.T
	api     *memoryLeases
	control *Controller
	stop    func()

	mu      sync.Mutex
	cfg     *config.Sections
	node    *report.Node
	missing []string        // packages, each the subject of a finding and of a step
	broken  map[string]bool // installing these fails
	useless map[string]bool // installing these helps nothing
	takes   time.Duration   // a step
	past    []Result        // on the host's disk
	job     time.Time       // when a job that outlives the agent ends
	events  []string
	remark  string
	applied []string
	opened  int
	log     bytes.Buffer
}

func newFleetHost(t *testing.T, api *memoryLeases) *fleetHost {
	cfg := config.Default().Sections
	cfg.Remedies.Mode, cfg.Remedies.Allow = config.ModeEnforce, []string{finding.KindPackages}
	n := &report.Node{}
	n.Status.Conditions = []report.NodeCondition{{Type: "Ready", Status: "True"}}
	return &fleetHost{t: t, api: api, cfg: &cfg, node: n, takes: time.Minute, broken: map[string]bool{}, useless: map[string]bool{}}
}

// start runs an agent on it; stop kills it: what it was doing goes on.
func (h *fleetHost) start(name string, allowed bool) {
	o := Options{
		Allowed: allowed,
		Plan:    h.plan,
		Gate:    NewGate(h.api, name, slog.New(slog.DiscardHandler)),
		Node:    func() *report.Node { h.mu.Lock(); defer h.mu.Unlock(); return h.node },
		Tell: func(kind, reason, subject, message string) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.events = append(h.events, fmt.Sprintf("%s %s %s", kind, reason, message))
		},
		Remark: func(text string) { h.mu.Lock(); defer h.mu.Unlock(); h.remark = text },
		Wake: func(context.Context, string) {
			go func() { time.Sleep(time.Second); h.look() }()
		},
		Log: slog.New(slog.NewTextHandler(&h.log, nil)),
	}
	o.Work = func(permit Permit, told func(Result)) (Worker, error) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.opened++
		return &fleetWorker{h, permit, told}, nil
	}
	h.control = NewController(o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); h.control.Run(ctx) }()
	h.stop = func() { cancel(); <-done }
	h.look()
}

// look is a pass of the packages probe.
func (h *fleetHost) look() {
	h.mu.Lock()
	r := finding.Report{Probe: "packages", Status: finding.OK, Started: time.Now()}
	for _, p := range h.missing {
		r.Status = finding.Problem
		r.Findings = append(r.Findings, finding.Finding{Reason: "PackageMissing", Subject: p, Severity: finding.Critical,
			Remedy: &finding.Remedy{Action: finding.InstallPackage, Subject: p}})
	}
	s := engine.Snapshot{Config: h.cfg, Complete: true, Reports: []finding.Report{r}}
	for _, p := range probes.Defaults().List() {
		if p.Name() == "packages" {
			s.Probes = append(s.Probes, p)
		}
	}
	h.mu.Unlock()
	h.control.Report(s)
}

// configure changes a copy of the config.
func (h *fleetHost) configure(change func(*config.Remedies)) {
	h.mu.Lock()
	cfg := *h.cfg
	change(&cfg.Remedies)
	h.cfg = &cfg
	h.mu.Unlock()
	h.look() // the engine publishes at once, and looks again
	time.Sleep(time.Millisecond)
	h.look()
}

// plan has one step for each package, with the real rules for what has failed.
func (h *fleetHost) plan(_ context.Context, s engine.Snapshot) (Plan, Facts, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	facts := Facts{Systemd: true, Past: slices.Clone(h.past)}
	p := planner{Input: Input{Remedies: s.Config.Remedies, Facts: facts, Now: time.Now()}}
	var plan Plan
	for _, r := range s.Reports {
		for _, f := range r.Findings {
			st := Step{ID: "package-" + f.Subject, Kind: finding.KindPackages, Actions: []string{finding.InstallPackage}, Subjects: []string{f.Subject}, Why: []Why{{"packages", f.Reason, f.Subject, ""}}}
			p.gate(&st)
			plan.Steps = append(plan.Steps, st)
		}
	}
	return plan, facts, nil
}

type fleetWorker struct {
	*fleetHost
	permit Permit
	told   func(Result)
}

func (w *fleetWorker) Resume(ctx context.Context) error {
	w.mu.Lock()
	left := time.Until(w.job)
	w.mu.Unlock()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(max(left, 0)):
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.past {
		if w.past[i].Outcome == Started {
			w.past[i].Outcome, w.past[i].Ended = Applied, time.Now()
			w.missing = slices.DeleteFunc(w.missing, func(p string) bool { return "package-"+p == w.past[i].Step })
		}
	}
	return nil
}

func (w *fleetWorker) Apply(ctx context.Context, plan Plan, _ Facts) (*Record, error) {
	for _, s := range plan.Pending() {
		r := Result{Step: s.ID, Digest: s.Digest(), Kind: s.Kind, Actions: s.Actions, Subjects: s.Subjects, Why: s.Why, Outcome: Started}
		release, err := w.permit(ctx, s, 30*time.Minute)
		if err != nil {
			r.Outcome, r.Message = Skipped, err.Error()
			w.end(r)
			continue
		}
		w.mu.Lock()
		w.applied = append(w.applied, s.ID)
		w.past = append(w.past, r)
		w.job = time.Now().Add(w.takes)
		w.mu.Unlock()
		select {
		case <-ctx.Done():
			release(true)
			return nil, ctx.Err()
		case <-time.After(w.takes):
		}
		w.mu.Lock()
		w.past = w.past[:len(w.past)-1]
		r.Outcome = Applied
		if w.broken[s.Subjects[0]] {
			r.Outcome, r.Message = Failed, "E: Unable to locate package "+s.Subjects[0]
		} else if !w.useless[s.Subjects[0]] {
			w.missing = slices.DeleteFunc(w.missing, func(p string) bool { return p == s.Subjects[0] })
		}
		w.mu.Unlock()
		w.end(r)
		release(false)
	}
	return nil, nil
}

func (w *fleetWorker) end(r Result) {
	r.Ended = time.Now()
	w.mu.Lock()
	w.past = append(w.past, r)
	w.mu.Unlock()
	w.told(r)
}

func (w *fleetWorker) Confirm(_ context.Context, reports []finding.Report) ([]Result, error) {
	w.mu.Lock()
	var judged []Result
	for i := range w.past {
		r := &w.past[i]
		if r.Outcome != Applied || !looked(r, reports) {
			continue
		}
		r.Outcome = Confirmed
		if _, still := stillThere(r.Why, reports); still {
			r.Outcome = RolledBack
		}
		judged = append(judged, *r)
	}
	w.mu.Unlock()
	for _, r := range judged {
		w.told(r)
	}
	return judged, nil
}

func (h *fleetHost) state() (applied, events []string, remark string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.applied), slices.Clone(h.events), h.remark
}

func (h *fleetHost) wantApplied(want ...string) {
	h.t.Helper()
	if got, events, _ := h.state(); !slices.Equal(got, want) {
		h.t.Errorf("applied %q, want %q; events %q\n%s", got, want, events, h.log.String())
	}
}

func bubble(t *testing.T, f func(t *testing.T)) { t.Helper(); synctest.Test(t, f) }

func TestControllerRepairs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h := newFleetHost(t, newLeases())
		h.missing = []string{"lsscsi", "multipath-tools"}
		h.start("n1", true)
		time.Sleep(90 * time.Second)
		if l := h.api.get("host-hygiene-slot-0"); l.Spec.HolderIdentity != "n1" || l.Spec.LeaseDurationSeconds < 28*60 {
			t.Errorf("in the middle of a step that may take 30 minutes: %+v", l.Spec)
		}
		time.Sleep(10 * time.Minute)
		h.wantApplied("package-lsscsi", "package-multipath-tools")
		_, events, remark := h.state()
		want := []string{
			"Normal RemedyStarted install-package: lsscsi",
			"Normal RemedyApplied install-package: lsscsi is done; the next check says whether it helps",
			"Normal RemedyStarted install-package: multipath-tools",
			"Normal RemedyApplied install-package: multipath-tools is done; the next check says whether it helps",
			"Normal RemedyConfirmed install-package: lsscsi has helped, says the check",
			"Normal RemedyConfirmed install-package: multipath-tools has helped, says the check",
		}
		if !slices.Equal(events, want) || remark != "" {
			t.Errorf("events %q, remark %q", events, remark)
		}
		counts := h.control.Counts()
		for _, result := range []string{Planned, "started", "applied", "confirmed"} {
			if n := counts[[2]string{finding.InstallPackage, result}]; n != 2 {
				t.Errorf("%s: %d", result, n)
			}
		}
		if l := h.api.get("host-hygiene-slot-0"); l.Spec.HolderIdentity != "" {
			t.Errorf("the slot is still held by %q", l.Spec.HolderIdentity)
		}
		h.stop()
	})
}

// Whatever the config says, and however long: without the flag, and in any mode
// but enforce, what could write is not even made.
func TestControllerWithoutLeave(t *testing.T) {
	for _, tc := range []struct {
		mode    config.Mode
		allowed bool
		remark  string
	}{
		{config.ModeOff, true, ""}, {config.ModePlan, true, ""}, {config.ModePlan, false, ""},
		{config.ModeEnforce, false, "--allow-remedies"},
	} {
		t.Run(fmt.Sprint(tc.mode, tc.allowed), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				h := newFleetHost(t, newLeases())
				h.missing = []string{"lsscsi"}
				h.cfg.Remedies.Mode = tc.mode
				h.start("n1", tc.allowed)
				for range 20 {
					time.Sleep(5 * time.Minute)
					h.look()
				}
				h.wantApplied()
				_, events, remark := h.state()
				if h.opened != 0 || h.api.writes != 0 {
					t.Errorf("opened %d times for change, %d leases written", h.opened, h.api.writes)
				}
				if !strings.Contains(remark, tc.remark) || (tc.remark == "") != (len(events) == 0) || len(events) > 1 {
					t.Errorf("remark %q, events %q", remark, events)
				}
				planned := 1
				if tc.mode == config.ModeOff {
					planned = 0
				}
				if n := h.control.Counts()[[2]string{finding.InstallPackage, Planned}]; n != planned {
					t.Errorf("planned %d, want %d", n, planned)
				}
				if n := strings.Count(h.log.String(), "remedy planned"); n != planned {
					t.Errorf("told %d times", n)
				}
				h.stop()
			})
		})
	}
}

// A second node waits while the first works, and then has its turn.
func TestControllerTwoNodes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		api := newLeases()
		a, b := newFleetHost(t, api), newFleetHost(t, api)
		for _, h := range []*fleetHost{a, b} {
			h.missing, h.takes = []string{"lsscsi"}, 20*time.Minute
		}
		a.start("n1", true)
		time.Sleep(time.Second)
		b.start("n2", true)
		time.Sleep(15 * time.Minute)
		a.wantApplied("package-lsscsi")
		b.wantApplied()
		if !strings.Contains(b.log.String(), "n1 (host-hygiene-slot-0)") {
			t.Errorf("it does not say whom it waits for:\n%s", b.log.String())
		}
		time.Sleep(30 * time.Minute)
		b.wantApplied("package-lsscsi")
		a.stop()
		b.stop()
	})
}

// The agent is killed in the middle: its slot stays its node's for as long as
// the work may run, and the next agent follows the work before anything else.
func TestControllerKilled(t *testing.T) {
	bubble(t, func(t *testing.T) {
		api := newLeases()
		a, b := newFleetHost(t, api), newFleetHost(t, api)
		a.missing, a.takes = []string{"lsscsi", "multipath-tools"}, 20*time.Minute
		b.missing = []string{"lsscsi"}
		a.start("n1", true)
		time.Sleep(5 * time.Minute)
		a.stop()
		b.start("n2", true)
		time.Sleep(14 * time.Minute)
		b.wantApplied()
		a.start("n1", true)
		time.Sleep(30 * time.Second)
		a.wantApplied("package-lsscsi") // still followed, nothing else begun
		if l := api.get("host-hygiene-slot-0"); l.Spec.HolderIdentity != "n1" || l.Spec.LeaseTransitions != 0 {
			t.Errorf("%+v", l.Spec)
		}
		time.Sleep(2 * time.Minute)
		a.look()
		time.Sleep(40 * time.Minute)
		a.wantApplied("package-lsscsi", "package-multipath-tools")
		b.wantApplied("package-lsscsi")
		if _, events, _ := a.state(); !slices.Contains(events, "Normal RemedyConfirmed install-package: lsscsi has helped, says the check") {
			t.Errorf("what the first agent began was not confirmed: %q", events)
		}
		a.stop()
		b.stop()
	})
}

// A step that fails is not tried again before its time, by another agent of the
// same host neither; the rest goes on.
func TestControllerCooldown(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h := newFleetHost(t, newLeases())
		h.missing, h.broken = []string{"lsscsi", "nosuch"}, map[string]bool{"nosuch": true}
		h.cfg.Remedies.FailureBudget = 100
		h.start("n1", true)
		for range 20 {
			time.Sleep(time.Minute)
			h.look()
		}
		h.wantApplied("package-lsscsi", "package-nosuch")
		if _, events, remark := h.state(); !slices.Contains(events, "Warning RemedyFailed install-package: nosuch failed: E: Unable to locate package nosuch") || !strings.Contains(remark, "E: Unable to locate package nosuch") {
			t.Errorf("events %q, remark %q", events, remark)
		}
		told := func() string {
			h.look()
			synctest.Wait()
			f := h.control.Attempt("packages", finding.Finding{Reason: "PackageMissing", Subject: "nosuch", Message: "nosuch is missing"})
			return f.Message
		}
		const failed = "nosuch is missing; its remedy failed: E: Unable to locate package nosuch"
		if got := told(); got != failed {
			t.Errorf("the finding says %q", got)
		}
		h.stop()
		h.start("n1", true)
		for range 5 {
			time.Sleep(time.Minute)
			h.look()
		}
		h.wantApplied("package-lsscsi", "package-nosuch")
		if got := told(); got != failed {
			t.Errorf("the finding says %q to the agent after it", got)
		}
		for range 20 {
			time.Sleep(time.Minute)
			h.look()
		}
		h.wantApplied("package-lsscsi", "package-nosuch", "package-nosuch")
		h.stop()
	})
}

// A step that was done and has not helped is a failure too.
func TestControllerUseless(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h := newFleetHost(t, newLeases())
		h.missing, h.useless = []string{"lsscsi"}, map[string]bool{"lsscsi": true}
		h.start("n1", true)
		time.Sleep(80 * time.Second) // it has ended, and a pass has seen it fail
		if _, events, _ := h.state(); len(events) != 2 {
			t.Errorf("it gets a moment to take effect: %q", events)
		}
		time.Sleep(5 * time.Minute)
		if _, events, _ := h.state(); len(events) != 3 || !strings.HasPrefix(events[2], "Warning RemedyFailed install-package: lsscsi was taken back") {
			t.Errorf("%q", events)
		}
		h.wantApplied("package-lsscsi")
		h.stop()
	})
}

// A failure is told to the fleet at once, not when this node has more to do.
func TestControllerCountsItsOnlyFailure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h := newFleetHost(t, newLeases())
		h.missing, h.broken = []string{"nosuch"}, map[string]bool{"nosuch": true}
		h.start("n1", true)
		time.Sleep(90 * time.Second)
		h.api.setFail(errors.New("connection refused"))
		time.Sleep(10 * time.Minute)
		h.api.setFail(nil)
		h.look()
		time.Sleep(time.Minute)
		f, err := gateOf(h.api, "n2").Failures(t.Context())
		if err != nil || f.Count != 1 || f.Latest[0].Node != "n1" || f.Latest[0].Step != "package-nosuch" {
			t.Errorf("%+v, %v", f, err)
		}
		h.stop()
	})
}

// At the budget every node stops, in the middle of a plan too, until a person
// clears it.
func TestControllerFailureBudget(t *testing.T) {
	bubble(t, func(t *testing.T) {
		api := newLeases()
		a, b := newFleetHost(t, api), newFleetHost(t, api)
		a.missing = []string{"x1", "x2", "x3", "y"}
		a.broken = map[string]bool{"x1": true, "x2": true, "x3": true}
		a.cfg.Remedies.FailureBudget, b.cfg.Remedies.FailureBudget = 2, 2
		a.cfg.Remedies.Cooldown = probes.Duration(24 * time.Hour)
		b.missing = []string{"lsscsi"}
		a.start("n1", true)
		time.Sleep(20 * time.Minute)
		a.wantApplied("package-x1", "package-x2")
		b.start("n2", true)
		time.Sleep(20 * time.Minute)
		b.wantApplied()
		for _, h := range []*fleetHost{a, b} {
			_, events, remark := h.state()
			if !strings.Contains(remark, "agent resume") || !slices.ContainsFunc(events, func(e string) bool { return strings.HasPrefix(e, "Warning RemediesStopped") }) {
				t.Errorf("remark %q, events %q", remark, events)
			}
		}
		b.stop()
		b.start("n2", true) // a restart does not help
		time.Sleep(10 * time.Minute)
		b.wantApplied()
		if _, cleared, err := Resume(t.Context(), api); err != nil || !cleared {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Minute)
		b.wantApplied("package-lsscsi")
		a.wantApplied("package-x1", "package-x2", "package-x3", "package-y")
		if _, _, remark := b.state(); remark != "" {
			t.Errorf("remark %q", remark)
		}
		a.stop()
		b.stop()
	})
}

func TestControllerObstacles(t *testing.T) {
	node := func(change func(*report.Node)) *report.Node {
		n := &report.Node{}
		n.Status.Conditions = []report.NodeCondition{{Type: "Ready", Status: "True"}}
		change(n)
		return n
	}
	for _, tc := range []struct {
		name    string
		node    *report.Node
		require bool
		want    string
	}{
		{"fit", node(func(*report.Node) {}), true, ""},
		{"not known", nil, true, "not known"},
		{"cordoned", node(func(n *report.Node) { n.Spec.Unschedulable = true }), false, "cordoned"},
		{"rebooting", node(func(n *report.Node) { n.Metadata.Annotations.Rebooting = "2026-11-21T02:00:00Z" }), false, "kured"},
		{"not Ready", node(func(n *report.Node) {
			n.Status.Conditions[0].Status, n.Status.Conditions[0].Reason = "False", "KubeletNotReady"
		}), true, "KubeletNotReady"},
		{"not Ready, and that is no matter", node(func(n *report.Node) { n.Status.Conditions[0].Status = "False" }), false, ""},
		{"the kubelet is silent", node(func(n *report.Node) {
			n.Status.Conditions[0].Status, n.Status.Conditions[0].Reason = "Unknown", "NodeStatusUnknown"
		}), true, "NodeStatusUnknown"},
		{"no kubelet yet", node(func(n *report.Node) { n.Status.Conditions = nil }), true, "kubelet has not reported"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := nodeObstacle(tc.node, tc.require); (got == "") != (tc.want == "") || !strings.Contains(got, tc.want) {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
	t.Run("nothing begins until it is out of the way", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			h := newFleetHost(t, newLeases())
			h.missing = []string{"lsscsi"}
			h.node = node(func(n *report.Node) { n.Spec.Unschedulable = true })
			h.start("n1", true)
			time.Sleep(time.Hour)
			h.wantApplied()
			if h.api.writes != 0 {
				t.Errorf("a node that may not begin took a slot: %d writes", h.api.writes)
			}
			h.mu.Lock()
			h.node = node(func(*report.Node) {})
			h.mu.Unlock()
			time.Sleep(5 * time.Minute)
			h.wantApplied("package-lsscsi")
			h.stop()
		})
	})
	t.Run("a window that closes in the middle of a plan", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			// Synthetic time begins at 2000-01-01 00:00 UTC, a Saturday.
			h := newFleetHost(t, newLeases())
			h.missing, h.takes = []string{"a", "b", "c"}, 10*time.Minute
			h.cfg.Remedies.MaintenanceWindow = &config.MaintenanceWindow{Days: []string{"Sat"}, From: "02:00", To: "02:15"}
			h.start("n1", true)
			time.Sleep(time.Hour + 59*time.Minute)
			h.wantApplied()
			time.Sleep(12 * time.Hour)
			h.wantApplied("package-a", "package-b")
			h.configure(func(r *config.Remedies) { r.MaintenanceWindow = nil })
			time.Sleep(30 * time.Minute)
			h.wantApplied("package-a", "package-b", "package-c")
			h.stop()
		})
	})
	t.Run("a mode that is changed in the middle of a plan", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			h := newFleetHost(t, newLeases())
			h.missing, h.takes = []string{"a", "b", "c"}, 10*time.Minute
			h.start("n1", true)
			time.Sleep(5 * time.Minute)
			h.configure(func(r *config.Remedies) { r.Mode = config.ModePlan })
			time.Sleep(time.Hour)
			h.wantApplied("package-a")
			if l := h.api.get("host-hygiene-slot-0"); l.Spec.HolderIdentity != "" {
				t.Errorf("the slot is still held by %q", l.Spec.HolderIdentity)
			}
			h.stop()
		})
	})
	t.Run("an API server that is away", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			h := newFleetHost(t, newLeases())
			h.missing = []string{"a"}
			h.api.setFail(errors.New("connection refused"))
			h.start("n1", true)
			time.Sleep(time.Hour)
			h.wantApplied()
			h.api.setFail(nil)
			time.Sleep(5 * time.Minute)
			h.wantApplied("package-a")
			h.stop()
		})
	})
}

// Under a new config nothing begins before every probe has looked with it.
func TestControllerWaitsForAllProbes(t *testing.T) {
	now := time.Now()
	s := &engine.Snapshot{Reports: []finding.Report{{Started: now.Add(time.Second)}, {Started: now.Add(-time.Second)}}}
	if unsettled(s, now) <= 0 {
		t.Error("a probe has not looked since the config came into force")
	}
	s.Reports[1].Started = now
	if d := unsettled(s, now); d != 0 {
		t.Errorf("all have looked: wait %s", d)
	}
	s.Reports[1].Started = now.Add(-time.Hour)
	if d := unsettled(s, now.Add(-2*settleLimit)); d != 0 {
		t.Errorf("a probe that hangs holds the others back: wait %s", d)
	}
}

func TestNoInitiatorNamesInEvents(t *testing.T) {
	got := withoutNames(`iscsid: cannot log in to iqn.2003-01.org.linux-iscsi:sn.42, as "iqn.1993-08.org.debian:01:ab"`)
	if strings.Contains(got, "linux-iscsi") || strings.Contains(got, "debian") || !strings.Contains(got, "iqn.2003-01.…") {
		t.Error(got)
	}
}
