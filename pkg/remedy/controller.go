package remedy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/report"
)

// Worker is what a [Controller] has done by an [Applier].
type Worker interface {
	Resume(ctx context.Context) error
	Apply(ctx context.Context, plan Plan, facts Facts) (*Record, error)
	Confirm(ctx context.Context, reports []finding.Report) ([]Result, error)
}

// Options are what a [Controller] is made of.
type Options struct {
	// Allowed is the flag --allow-remedies: without it nothing is ever applied,
	// whatever the config says.
	Allowed bool
	// Plan computes the plan, and the facts it rests on.
	Plan func(ctx context.Context, s engine.Snapshot) (Plan, Facts, error)
	// Work makes the one who writes. It is called for mode enforce with Allowed,
	// and never otherwise: what plan mode can not do, it does not even hold.
	Work func(permit Permit, told func(Result)) (Worker, error)
	Gate *Gate
	// Node is this node as it was last seen, nil when it is not known.
	Node func() *report.Node
	// Tell posts an Event; Remark adds a sentence to the Ready condition.
	Tell   func(kind, reason, subject, message string)
	Remark func(text string)
	// Wake asks for a run of a probe now.
	Wake func(ctx context.Context, probe string)
	Log  *slog.Logger
}

// The reasons of the Events about remedies.
const (
	EventStarted    = "RemedyStarted"
	EventApplied    = "RemedyApplied"
	EventStaged     = "RemedyStaged"
	EventConfirmed  = "RemedyConfirmed"
	EventFailed     = "RemedyFailed"
	EventStopped    = "RemediesStopped"
	EventNotAllowed = "RemediesNotAllowed"
)

// Planned is the result under which the metric counts a step that a plan has
// for the first time; the others are the [Outcome] of steps.
const Planned = "planned"

const (
	// planAgain is how often a plan is computed while the findings stay: files
	// may have changed without a finding.
	planAgain = 10 * time.Minute
	// settleLimit is how long a probe that hangs may hold back the others.
	settleLimit = 90 * time.Second
	// confirmGrace is how long after a step its findings may still be there: a
	// daemon that was started needs a moment. What a reason's hold adds to that
	// is its own.
	confirmGrace = 45 * time.Second
	// confirmEvery is how often the probes are woken meanwhile.
	confirmEvery = 5 * time.Second
	// blockedAgain is how long to wait before looking again at what is not told
	// by a wake-up: the time of day, the count of failures.
	blockedAgain = 30 * time.Second
	// leaveLimit is how long giving the slot back may hold up the agent's end.
	leaveLimit = 5 * time.Second
	// The wait for a slot grows: thousands of nodes may be waiting.
	firstBusy, longestBusy = 10 * time.Second, 2 * time.Minute
)

// Controller turns snapshots into plans, and in mode enforce plans into changes:
// through the gate of the fleet, in the maintenance window, on a node that is
// fit for it. It is one loop; what it decides rests on the latest snapshot and
// on what is on record on the host, so that a restart forgets nothing.
type Controller struct {
	Options

	mu        sync.Mutex
	snapshot  *engine.Snapshot
	config    *config.Sections
	since     time.Time // when config came into force
	changed   chan struct{}
	counts    map[[2]string]int
	uncounted []Failure // of the fleet's count
	past      []Result  // what became of steps, oldest first

	// What follows belongs to the goroutine of Run.
	last      lastPlan
	worker    Worker
	resumed   bool
	pass      *Pass
	appliedAt time.Time // when a plan was last carried out, until it is confirmed
	ended     time.Time // when a plan was last carried out
	busy      time.Duration
	retryAt   time.Time // when to ask again whether something may begin
	told      map[string]string
}

// lastPlan is what the plan in hand was made from.
type lastPlan struct {
	plan    Plan
	facts   Facts
	key     string
	at      time.Time
	known   map[string]bool // steps the metric has counted as planned
	logged  string
	failure string
}

// NewController returns a Controller that has not started.
func NewController(o Options) *Controller {
	return &Controller{Options: o, changed: make(chan struct{}, 1), counts: map[[2]string]int{}, told: map[string]string{}}
}

// PlanFor computes plans from what a view of the host shows.
func PlanFor(view host.View) func(context.Context, engine.Snapshot) (Plan, Facts, error) {
	return func(ctx context.Context, s engine.Snapshot) (Plan, Facts, error) {
		ctx, cancel := context.WithTimeout(ctx, engine.Deadline)
		defer cancel()
		facts, err := Observe(ctx, view, s.Config.Require, s.Reports)
		if err != nil {
			return Plan{}, facts, err
		}
		return New(Input{Reports: s.Reports, Require: s.Config.Require, Remedies: s.Config.Remedies, Facts: facts, Now: time.Now()}), facts, nil
	}
}

// Report implements [engine.Reporter].
func (c *Controller) Report(s engine.Snapshot) {
	c.mu.Lock()
	if s.Config != c.config {
		c.config, c.since = s.Config, time.Now()
	}
	c.snapshot = &s
	c.mu.Unlock()
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// Counts are the remedies by action and result, for the metric.
func (c *Controller) Counts() map[[2]string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.counts)
}

// Attempt tells beside a finding how the last attempt to cure it failed.
func (c *Controller) Attempt(probe string, f finding.Finding) finding.Finding {
	c.mu.Lock()
	defer c.mu.Unlock()
	return withAttempt(c.past, probe, f)
}

func (c *Controller) count(actions []string, result string, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range actions {
		c.counts[[2]string{a, result}] += n
	}
}

func (c *Controller) latest() (*engine.Snapshot, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.snapshot, c.since
}

// Run works until ctx ends. A job that runs then goes on, its slot with it.
func (c *Controller) Run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			c.leave(ctx)
			return
		case <-c.changed:
		case <-timer.C:
		}
		timer.Reset(max(c.turn(ctx), 10*time.Millisecond))
	}
}

// leave gives the slot back, unless this node may still be changing.
func (c *Controller) leave(ctx context.Context) {
	if c.pass == nil {
		return
	}
	defer func() { c.pass = nil }()
	if ctx.Err() != nil {
		if !c.appliedAt.IsZero() {
			c.pass.Abandon()
			return
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), leaveLimit)
		defer cancel()
	}
	if err := c.pass.Release(ctx); err != nil {
		c.Log.Warn("remedies: the slot was not given back", "error", err)
	}
}

// turn does what there is to do now, and returns when to look again if nothing
// happens before.
func (c *Controller) turn(ctx context.Context) time.Duration {
	const never = time.Hour
	s, since := c.latest()
	if s == nil {
		return never
	}
	mode := s.Config.Remedies.Mode
	if mode == config.ModeEnforce {
		if !c.Allowed {
			const why = "remedies.mode is enforce, but the agent was started without --allow-remedies: nothing is changed"
			if c.say("mode", why) {
				c.Log.Error("remedies: " + why)
				c.Tell("Warning", EventNotAllowed, "remedies", why)
			}
		} else if wait, ready := c.prepare(ctx, s); !ready {
			return wait
		}
	}
	if mode != config.ModeEnforce || c.Allowed {
		c.say("mode", "")
	}
	enforce := mode == config.ModeEnforce && c.Allowed
	if !enforce {
		c.leave(ctx)
		c.say("stop", "")
	}
	if mode == config.ModeOff {
		c.last = lastPlan{}
		c.say("failure", "")
		return never
	}
	if !s.Complete || s.Quiet != "" {
		return never
	}
	if c.ended.After(since) {
		since = c.ended
	}
	if wait := unsettled(s, since); wait > 0 {
		return wait
	}
	if enforce && !c.appliedAt.IsZero() {
		if wait := c.confirm(ctx, s); wait > 0 {
			return wait
		}
	}
	if enforce {
		if err := c.countFailures(ctx); err != nil {
			c.wait(err.Error())
			return blockedAgain
		}
	}
	c.plan(ctx, s, enforce)
	if !enforce || len(c.last.plan.Pending()) == 0 {
		c.leave(ctx)
		if len(c.last.plan.Steps) > 0 {
			return planAgain
		}
		return never
	}
	return c.apply(ctx, s)
}

// say keeps what holds remedies up and shows it in the Ready condition; it
// reports whether it is news. The kinds are "mode", "stop" and "failure".
func (c *Controller) say(kind, text string) bool {
	if c.told[kind] == text {
		return false
	}
	c.told[kind] = text
	var all []string
	for _, k := range []string{"mode", "stop", "failure"} {
		if c.told[k] != "" {
			all = append(all, c.told[k])
		}
	}
	c.Remark(strings.Join(all, "; "))
	return text != ""
}

// wait logs once why nothing is begun for now.
func (c *Controller) wait(why string) {
	if c.told["wait"] != why {
		c.told["wait"] = why
		if why != "" {
			c.Log.Info("remedies wait", "because", why)
		}
	}
}

// prepare makes the worker, and follows what an agent before this one began,
// before anything else and with its slot.
func (c *Controller) prepare(ctx context.Context, s *engine.Snapshot) (wait time.Duration, ready bool) {
	if c.worker == nil {
		w, err := c.Work(c.permit, c.outcome)
		if err != nil {
			c.Log.Error("remedies: the host can not be changed", "error", err)
			return time.Minute, false
		}
		c.worker = w
	}
	if c.resumed {
		return 0, true
	}
	if c.pass == nil {
		pass, err := c.Gate.Adopt(ctx, s.Config.Remedies.MaxConcurrentNodes)
		if err != nil {
			// What runs must be followed all the same; the slot is ours until it
			// expires, and is found again later.
			c.Log.Warn("remedies: whether this node holds a slot is not known", "error", err)
		}
		c.pass = pass
	}
	// Until it is known that nothing runs the slot is not given back.
	c.appliedAt = time.Now()
	if err := c.worker.Resume(ctx); err != nil {
		if ctx.Err() == nil {
			c.Log.Error("remedies: what was begun before can not be followed", "error", err)
		}
		return time.Minute, false
	}
	c.appliedAt = time.Now()
	c.resumed = true
	return 0, true
}

// unsettled is how long to wait for probes that have not run since the config
// came into force or something was changed: half of what is required must not be
// met before the other half is known, such as a package before the file that
// must be there first.
func unsettled(s *engine.Snapshot, since time.Time) time.Duration {
	left := time.Until(since.Add(settleLimit))
	if left > 0 && slices.ContainsFunc(s.Reports, func(r finding.Report) bool { return r.Started.Before(since) }) {
		return left
	}
	return 0
}

// confirm waits for the check after a plan was carried out: until everything it
// was to cure is gone, or what is not has had its time.
func (c *Controller) confirm(ctx context.Context, s *engine.Snapshot) time.Duration {
	_, facts, err := c.Plan(ctx, *s)
	if err != nil {
		c.Log.Warn("remedies: what was done before is not known", "error", err)
		if left := time.Until(c.appliedAt.Add(confirmGrace)); left > 0 {
			return min(left, confirmEvery)
		}
	}
	waiting := slices.DeleteFunc(slices.Clone(facts.Past), func(r Result) bool { return r.Outcome != Applied })
	grace := confirmGrace
	cured := true
	for _, r := range waiting {
		for _, w := range r.Why {
			_, clear := s.Config.HoldFor(ruleOf(s, w))
			grace = max(grace, clear+confirmGrace)
		}
		_, still := stillThere(r.Why, s.Reports)
		cured = cured && !still && looked(&r, s.Reports)
	}
	if left := time.Until(c.appliedAt.Add(grace)); !cured && left > 0 {
		for _, p := range s.Probes {
			if slices.ContainsFunc(waiting, func(r Result) bool {
				return slices.ContainsFunc(r.Why, func(w Why) bool { return w.Probe == p.Name() })
			}) {
				c.Wake(ctx, p.Name())
			}
		}
		return min(left, confirmEvery)
	}
	if _, err := c.worker.Confirm(ctx, s.Reports); err != nil {
		c.Log.Error("remedies: whether they have helped is not on record", "error", err)
	}
	if ctx.Err() == nil {
		c.appliedAt = time.Time{}
		c.last.at = time.Time{} // what is left to do is another plan
	}
	return 0
}

func ruleOf(s *engine.Snapshot, w Why) finding.Rule {
	for _, p := range s.Probes {
		for _, r := range p.Rules() {
			if p.Name() == w.Probe && r.Reason == w.Reason {
				return r
			}
		}
	}
	return finding.Rule{Reason: w.Reason}
}

// plan computes the plan when something it rests on has changed, and tells it
// once. A host on which nothing is to be repaired costs nothing.
func (c *Controller) plan(ctx context.Context, s *engine.Snapshot, enforce bool) {
	key := planKey(s)
	if key == "" {
		c.last = lastPlan{}
		c.say("failure", "")
		return
	}
	if c.last.key != key {
		c.retryAt = time.Time{}
	}
	// What is about to be done must not rest on what was.
	begin := enforce && c.pass != nil
	if c.last.key == key && time.Since(c.last.at) < planAgain && !begin {
		return
	}
	plan, facts, err := c.Plan(ctx, *s)
	if err != nil {
		if c.last.failure != err.Error() {
			c.Log.Warn("remedies: no plan can be made", "error", err)
		}
		c.last = lastPlan{failure: err.Error(), known: c.last.known, key: key, at: time.Now().Add(blockedAgain - planAgain)}
		return
	}
	known, logged := map[string]bool{}, ""
	for _, st := range plan.Steps {
		id := st.ID + " " + st.Digest()
		logged += id + " " + st.Refused + "\n"
		if st.Refused == "" && !c.last.known[id] {
			c.count(st.Actions, Planned, 1)
			for _, o := range []Outcome{Confirmed, Failed, RolledBack} {
				c.count(st.Actions, string(o), 0) // so that the first one is an increase
			}
		}
		known[id] = known[id] || st.Refused == "" || c.last.known[id]
	}
	if logged != c.last.logged {
		for _, st := range plan.Steps {
			c.Log.Info("remedy planned", "step", st.ID, "actions", st.Actions, "subjects", st.Subjects, "refused", st.Refused)
		}
	}
	c.last = lastPlan{plan: plan, facts: facts, key: key, at: time.Now(), known: known, logged: logged}
	c.mu.Lock()
	c.past = facts.Past
	c.mu.Unlock()
	c.say("failure", failing(plan, facts.Past))
}

// planKey identifies what a plan is made from; "" when there is nothing to plan.
func planKey(s *engine.Snapshot) string {
	var b strings.Builder
	for _, r := range s.Reports {
		for _, f := range r.Findings {
			if f.Remedy != nil && f.Muted == nil {
				fmt.Fprintf(&b, "%s\x00%s\x00%s\x00%s\x00", f.Reason, f.Subject, f.Remedy.Action, f.Remedy.Subject)
			}
		}
	}
	if b.Len() == 0 {
		return ""
	}
	fmt.Fprintf(&b, "%p", s.Config)
	return b.String()
}

// failing names a step that is still to be done and whose last attempt failed.
func failing(plan Plan, past []Result) string {
	for _, st := range plan.Steps {
		for _, r := range slices.Backward(past) {
			if r.Step != st.ID || r.Digest != st.Digest() || r.Outcome == Skipped {
				continue
			}
			if r.Outcome == Failed || r.Outcome == RolledBack {
				return fmt.Sprintf("the remedy %s failed at %s: %s", r.Step, r.Ended.UTC().Format(time.RFC3339), withoutNames(r.Message))
			}
			break
		}
	}
	return ""
}

// apply carries out the plan in hand if everything that must be asked agrees.
func (c *Controller) apply(ctx context.Context, s *engine.Snapshot) time.Duration {
	if left := time.Until(c.retryAt); left > 0 {
		return left
	}
	later := func(why string, d time.Duration) time.Duration {
		c.wait(why)
		c.leave(ctx)
		d += rand.N(d / 2)
		c.retryAt = time.Now().Add(d)
		return d
	}
	r := s.Config.Remedies
	if why := c.obstacle(s); why != "" {
		return later(why, blockedAgain)
	}
	if why := c.stopped(ctx, r); why != "" {
		return later(why, blockedAgain)
	}
	if c.pass != nil && c.pass.Lost() != nil {
		c.pass.Abandon()
		c.pass = nil
	}
	if c.pass == nil {
		pass, err := c.Gate.Enter(ctx, r.MaxConcurrentNodes, 0)
		if err != nil {
			c.busy = min(max(c.busy*3/2, firstBusy), longestBusy)
			return later(err.Error(), c.busy)
		}
		c.pass, c.busy = pass, 0
		// While this node waited, what it waited for may have changed.
		return 0
	}
	c.wait("")
	c.appliedAt = time.Now() // from here on something may run
	_, err := c.worker.Apply(ctx, c.last.plan, c.last.facts)
	if ctx.Err() != nil {
		return time.Hour // what runs goes on; the slot is left to it
	}
	c.appliedAt, c.ended = time.Now(), time.Now()
	if err != nil {
		c.Log.Error("remedies: the plan could not be carried out", "error", err)
		c.retryAt = time.Now().Add(blockedAgain)
	}
	for _, p := range s.Probes {
		c.Wake(ctx, p.Name())
	}
	return confirmEvery
}

// permit is asked before each step.
func (c *Controller) permit(ctx context.Context, step Step, deadline time.Duration) (func(running bool), error) {
	s, _ := c.latest() // a person may have changed the config meanwhile
	r := s.Config.Remedies
	if r.Mode != config.ModeEnforce {
		return nil, fmt.Errorf("remedies.mode is %s now", r.Mode)
	}
	if !slices.Contains(r.Allow, step.Kind) {
		return nil, fmt.Errorf("remedies.allow does not list %s any more", step.Kind)
	}
	if why := c.obstacle(s); why != "" {
		return nil, errors.New(why)
	}
	if why := c.stopped(ctx, r); why != "" {
		return nil, errors.New(why)
	}
	if c.pass == nil {
		return nil, errLost
	}
	if err := c.pass.Cover(ctx, deadline); err != nil {
		return nil, err
	}
	c.count(step.Actions, string(Started), 1)
	c.Tell("Normal", EventStarted, step.ID, fmt.Sprintf("%s: %s", strings.Join(step.Actions, " and "), strings.Join(step.Subjects, ", ")))
	// The slot is held beyond the step: what it was for is known by the check.
	return func(bool) {}, nil
}

// obstacle says why nothing may begin on this node now; "" when it may.
func (c *Controller) obstacle(s *engine.Snapshot) string {
	if s.Quiet != "" {
		return s.Quiet
	}
	if why := nodeObstacle(c.Node(), s.Config.Remedies.RequireNodeReady); why != "" {
		return why
	}
	w := s.Config.Remedies.MaintenanceWindow
	open, err := WindowOpen(w, time.Now())
	switch {
	case err != nil:
		return err.Error()
	case !open:
		return "the maintenance window is closed (" + windowText(w) + ")"
	}
	return ""
}

// nodeObstacle says why a node is left alone: whoever cordoned it or reboots it
// is at work on it, and one that is NotReady has troubles of its own.
func nodeObstacle(n *report.Node, requireReady bool) string {
	switch {
	case n == nil:
		return "this Node is not known to the API server"
	case n.Spec.Unschedulable:
		return "this node is cordoned: somebody is at work on it"
	case n.Metadata.Annotations.Rebooting != "":
		return "kured is rebooting this node"
	case !requireReady:
		return ""
	}
	i := slices.IndexFunc(n.Status.Conditions, func(c report.NodeCondition) bool { return c.Type == "Ready" })
	if i < 0 {
		return "the kubelet has not reported yet whether this node is Ready"
	}
	if ready := n.Status.Conditions[i]; ready.Status != "True" {
		return "this node is not Ready (" + ready.Reason + "), and remedies.requireNodeReady is on"
	}
	return ""
}

// countFailures adds what has failed here to the fleet's failures. Nothing else is
// begun before they are counted.
func (c *Controller) countFailures(ctx context.Context) error {
	for {
		c.mu.Lock()
		if len(c.uncounted) == 0 {
			c.mu.Unlock()
			return nil
		}
		f := c.uncounted[0]
		c.mu.Unlock()
		if err := c.Gate.CountFailure(ctx, f); err != nil {
			return err
		}
		c.mu.Lock()
		c.uncounted = c.uncounted[1:]
		c.mu.Unlock()
	}
}

// stopped says why the whole fleet stops; "" when it does not.
func (c *Controller) stopped(ctx context.Context, r config.Remedies) string {
	if err := c.countFailures(ctx); err != nil {
		return err.Error()
	}
	f, err := c.Gate.Failures(ctx)
	if err != nil {
		return err.Error()
	}
	if f.Count < r.FailureBudget {
		c.say("stop", "")
		return ""
	}
	why := fmt.Sprintf("remedies have stopped on all nodes: %d steps failed, the budget is %d; look at them, then run agent resume", f.Count, r.FailureBudget)
	if c.say("stop", why) {
		c.Log.Error(why, "latest", f.Latest)
		c.Tell("Warning", EventStopped, "remedies", why)
	}
	return why
}

// outcome is told what became of a step, by Apply, by Confirm and by Resume.
func (c *Controller) outcome(r Result) {
	c.count(r.Actions, string(r.Outcome), 1)
	c.mu.Lock()
	c.past = append(slices.Clip(c.past), r)
	c.mu.Unlock()
	text := fmt.Sprintf("%s: %s", strings.Join(r.Actions, " and "), strings.Join(r.Subjects, ", "))
	switch r.Outcome {
	case Applied:
		c.Tell("Normal", EventApplied, r.Step, text+" is done; the next check says whether it helps")
	case Staged:
		c.Tell("Normal", EventStaged, r.Step, text+" is done and takes effect with the next reboot")
	case Confirmed:
		c.Tell("Normal", EventConfirmed, r.Step, text+" has helped, says the check")
	case Failed, RolledBack:
		if r.Outcome == RolledBack {
			text += " was taken back"
		} else {
			text += " failed"
		}
		message := withoutNames(r.Message)
		c.Tell("Warning", EventFailed, r.Step, text+": "+message)
		c.mu.Lock()
		c.uncounted = append(c.uncounted, Failure{Step: r.Step, Time: r.Ended.UTC(), Message: message})
		c.mu.Unlock()
	}
}

// initiatorName as programs print it; what goes to the API must not hold one.
var initiatorNames = regexp.MustCompile(`\b(iqn\.[0-9]{4}-[0-9]{2}|eui|naa)\.[^\s"',;]+`)

func withoutNames(s string) string { return initiatorNames.ReplaceAllString(s, "$1.…") }
