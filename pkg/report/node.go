package report

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

// NodeAPI is what [Publisher] needs of the API server.
type NodeAPI interface {
	PatchConditions(ctx context.Context, patch func() []byte) (*Node, error)
	CreateEvent(ctx context.Context, namespace string, event []byte) error
	Follow(ctx context.Context, seen func(*Node))
}

// Publisher keeps the conditions of one Node as the latest snapshot has them,
// and posts an Event when one changes. It guarantees that
//   - nothing is written while nothing changes, but for one refresh every 60 to
//     75 minutes;
//   - one write is under way at a time, and the newest state wins;
//   - lastTransitionTime moves with the status only, across restarts of the
//     agent and attempts whose answer was lost too;
//   - what somebody else overwrote or deleted is restored, times and all, and
//     what nothing publishes any more is deleted, by type and never by rewriting
//     the list.
type Publisher struct {
	api  NodeAPI
	name string
	log  *slog.Logger
	// boot is when the host booted by the clock of the day as it was at began.
	boot  time.Time
	began time.Time
	// ofDay is the clock of the day; tests step it.
	ofDay func() time.Time

	seeing sync.Mutex // one sighting of the node after the other

	mu       sync.Mutex
	snapshot *engine.Snapshot
	node     *Node
	known    bool // the node was seen, or seen missing, at least once
	labels   func(map[string]string) bool
	since    time.Time     // reports from before are about another config
	first    chan struct{} // closed when known
	changed  chan struct{}
	mistake  string // of the config that was refused last
	notices  []notice
	remark   string

	// What follows belongs to the goroutine of Run.
	met       time.Time // when the Node was seen first
	early     time.Time // when the first snapshot came
	written   map[string]writtenCondition
	attempted map[string]attempt
	step      time.Duration // by how much the clock had been set when we last wrote
	refreshAt time.Time
	holdUntil time.Time // after the server said no
	refused   int       // how often it has, one after the other
	events    []event
	reported  chan struct{}
}

// writtenCondition is what was last written of a type.
type writtenCondition struct {
	status      string
	reason      string
	transition  metav1.Time
	set         string
	message     string
	keys        map[finding.Key]bool
	provisional bool
}

// attempt is a new status of which it is not known whether the API server has
// it: it was sent, or about to be, and nothing came back.
type attempt struct {
	status     string
	transition metav1.Time
}

// NewPublisher returns a Publisher for the named node. boot is when the host
// booted: conditions written before are history. labels is called with the
// node's labels when they change, and says whether another config is in force
// for that; it may be nil.
func NewPublisher(api NodeAPI, node string, boot time.Time, log *slog.Logger, labels func(map[string]string) bool) *Publisher {
	return &Publisher{
		api: api, name: node, boot: boot, log: log, labels: labels,
		began: time.Now(), ofDay: func() time.Time { return time.Now().Round(0) },
		first: make(chan struct{}), changed: make(chan struct{}, 1), reported: make(chan struct{}),
		written: map[string]writtenCondition{},
	}
}

// Report implements [engine.Reporter].
func (p *Publisher) Report(s engine.Snapshot) {
	mistake := ""
	if s.ConfigError != nil {
		mistake = s.ConfigError.Error()
	}
	p.mu.Lock()
	p.snapshot = &s
	another := mistake != "" && mistake != p.mistake
	p.mistake = mistake
	p.mu.Unlock()
	// Ready tells of a config that was refused, and its change is an Event; but
	// not while it is False, for something critical comes first there.
	if another && ready(s).Reason != ReasonConfigInvalid {
		p.Tell("Warning", ReasonConfigInvalid, "config", mistake)
	}
	p.poke()
}

func (p *Publisher) poke() {
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// WaitKnown waits until the node has been seen, or ctx ends.
func (p *Publisher) WaitKnown(ctx context.Context) {
	select {
	case <-p.first:
	case <-ctx.Done():
	}
}

// Reported is closed when the first complete pass has reached the API server.
func (p *Publisher) Reported() <-chan struct{} { return p.reported }

// Node is the Node as it was last seen; nil when it has not been, or is gone. It
// is shared and read-only.
func (p *Publisher) Node() *Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.node
}

// notice is an Event that belongs to no condition.
type notice struct {
	kind, reason, subject, message string
	at                             time.Time
}

// Tell posts an Event about the Node that belongs to no condition, such as what
// a remedy does. kind is Normal or Warning.
func (p *Publisher) Tell(kind, reason, subject, message string) {
	p.mu.Lock()
	p.notices = append(p.notices, notice{kind, reason, subject, message, time.Now()})
	p.notices = p.notices[max(0, len(p.notices)-maxEvents):]
	p.mu.Unlock()
	p.poke()
}

// Remark adds a sentence to the message of the Ready condition, such as why
// remedies that were asked for are not done; empty takes it back.
func (p *Publisher) Remark(text string) {
	p.mu.Lock()
	changed := p.remark != text
	p.remark = text
	p.mu.Unlock()
	if changed {
		p.poke()
	}
}

// Prior reports whether a condition of ours said Problem when this agent
// started, and was written since the host booted.
func (p *Publisher) Prior(condition string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.node == nil {
		return false
	}
	i := slices.IndexFunc(p.node.Status.Conditions, func(c NodeCondition) bool { return c.Type == condition })
	return i >= 0 && p.node.Status.Conditions[i].Status == "True" && p.sinceBoot(p.node.Status.Conditions[i])
}

// sinceBoot says whether a condition was written since the host booted, by the
// times in it. When the clock is set, the boot moves with it (btime in
// proc_stat(5)), and what was written before does not; so what a running agent
// has written is written anew then. A time that is yet to come is of no boot
// that is known.
func (p *Publisher) sinceBoot(c NodeCondition) bool {
	const ahead = time.Minute
	at := c.LastHeartbeatTime.Time
	// Times on the wire have a resolution of a second.
	return !at.Before(p.boot.Add(p.stepped()).Truncate(time.Second)) && !at.After(p.ofDay().Add(ahead))
}

// stepped is by how much the clock of the day was set since the start, to the
// second: what it has gone beyond the clock that nobody can set.
func (p *Publisher) stepped() time.Duration {
	return (p.ofDay().Sub(p.began.Round(0)) - time.Since(p.began)).Round(time.Second)
}

func (p *Publisher) seen(n *Node) {
	p.seeing.Lock()
	defer p.seeing.Unlock()
	p.mu.Lock()
	old := p.node
	p.mu.Unlock()
	if n != nil && old != nil && older(n, old) {
		return // a watch event from before our own last write
	}
	// Before the node is known, or what was found without its labels would be
	// written to it.
	another := n != nil && p.labels != nil && (old == nil || !maps.Equal(old.Metadata.Labels, n.Metadata.Labels)) && p.labels(n.Metadata.Labels)
	p.mu.Lock()
	if another {
		p.since = time.Now()
	}
	p.node = n
	if !p.known {
		p.known = true
		close(p.first)
	}
	p.mu.Unlock()
	p.poke()
}

// settleLimit is how long a probe that hangs may keep back what others find
// under another config.
const settleLimit = 90 * time.Second

// current is what is to be told, and of which node. What was found before the
// config in force was known is left out.
func (p *Publisher) current() (snap *engine.Snapshot, node *Node, remark string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := func(r finding.Report) bool { return r.Started.Before(p.since) }
	snap = p.snapshot
	if snap != nil && time.Since(p.since) < settleLimit && slices.ContainsFunc(snap.Reports, old) {
		part := *snap
		part.Reports = slices.DeleteFunc(slices.Clone(snap.Reports), old)
		part.Complete = false
		snap = &part
	}
	return snap, p.node, p.remark
}

// older compares resource versions of the same object, which are integers of
// one sequence (the API promises it since 1.35, and etcd has always done so).
func older(a, b *Node) bool {
	if a.Metadata.UID != b.Metadata.UID {
		return false
	}
	x, y := a.Metadata.ResourceVersion, b.Metadata.ResourceVersion
	return len(x) < len(y) || len(x) == len(y) && x < y
}

// Run publishes until ctx ends.
func (p *Publisher) Run(ctx context.Context) {
	go p.api.Follow(ctx, p.seen)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.changed:
		case <-timer.C:
		}
		timer.Reset(p.reconcile(ctx))
	}
}

// firstPassGrace is how long the first write waits for the last probe: on most
// machines all are done by then, and where they are not nobody should wait for
// what others have found.
const firstPassGrace = 500 * time.Millisecond

// bootGrace is how long a healthy condition from before the boot stands for the
// first look to find the same: that it was Unknown for the second between is no
// news of a node that boots as it should. On a crowded machine one first look of
// twenty took eleven seconds.
const bootGrace = 20 * time.Second

// reconcile makes the node say what it should, and returns when to look again
// if nothing happens before.
func (p *Publisher) reconcile(ctx context.Context) time.Duration {
	if wait := time.Until(p.holdUntil); wait > 0 {
		return wait
	}
	snap, node, remark := p.current()
	if node == nil {
		return time.Hour
	}
	if p.met.IsZero() {
		p.met = time.Now()
	}
	// The probes of a first pass come in one by one; one write tells them all,
	// unless one of them hangs.
	var early time.Duration
	if snap != nil {
		if p.early.IsZero() {
			p.early = time.Now()
		}
		if early = firstPassGrace - time.Since(p.early); snap.Complete || early < 0 {
			early = 0
		}
	}
	step := p.stepped()
	plan := p.plan(snap, node, remark, early > 0)
	p.attempted = plan.attempts
	if len(plan.patch) > 0 {
		after, err := p.api.PatchConditions(ctx, func() []byte {
			// An outage may have passed at the gate, and what was true before it
			// must not be told after it.
			step = p.stepped()
			if snap, node, remark = p.current(); node == nil {
				return nil
			}
			plan = p.plan(snap, node, remark, early > 0)
			p.attempted = plan.attempts
			if len(plan.patch) == 0 {
				return nil
			}
			body, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": plan.patch}})
			if err != nil {
				p.log.Error("encoding conditions", "error", err)
				return nil
			}
			return body
		})
		if err != nil {
			if ctx.Err() != nil {
				return time.Hour
			}
			p.log.Warn("conditions not written", "error", err)
			if !retryable(err) {
				// Forbidden, or the node is gone: asking again at once will
				// not help.
				p.holdUntil = time.Now().Add(backOff(p.refused, longestRefused))
				p.refused++
			}
			return time.Millisecond // the gate makes us wait
		}
		if after == nil {
			return time.Millisecond // it was not worth it any more
		}
		p.refused = 0
		for _, t := range plan.deleted {
			delete(p.written, t)
		}
		for _, r := range plan.restored {
			p.log.Warn("a condition that somebody else changed is restored", "type", r.kind, "theirs", r.theirs, "ours", r.ours)
		}
		p.attempted = nil
		p.step = step
		p.refreshAt = time.Now().Add(time.Hour + rand.N(15*time.Minute))
		p.seen(after)
	}
	maps.Copy(p.written, plan.adopted)
	maps.Copy(p.written, plan.written)
	if p.refreshAt.IsZero() {
		p.refreshAt = plan.refreshAt
	}
	if snap != nil && bool(snap.Config.Report.Events) {
		p.events = append(p.events, plan.events...)
		p.events = append(p.events, p.noticed(node)...)
		// An outage must not grow memory: the newest are worth most.
		p.events = p.events[max(0, len(p.events)-maxEvents):]
	}
	p.postEvents(ctx)
	if snap != nil && snap.Complete && snap.Quiet == "" {
		select {
		case <-p.reported:
		default:
			close(p.reported)
		}
	}
	if len(p.events) > 0 {
		return time.Second
	}
	if early > 0 {
		return early
	}
	if plan.again > 0 {
		return plan.again
	}
	if p.refreshAt.IsZero() {
		return time.Hour
	}
	return max(time.Until(p.refreshAt), time.Second)
}

// plan is one patch and what follows from it. Making one changes nothing.
type plan struct {
	patch   []map[string]any
	written map[string]writtenCondition
	deleted []string
	events  []event
	// attempts are the new statuses in the patch.
	attempts map[string]attempt
	// adopted is what is on the node already, and refreshAt when that is due to
	// be written again, if that was not known.
	adopted   map[string]writtenCondition
	refreshAt time.Time
	restored  []restored
	// again is when to plan anew if nothing happens before, 0 for never.
	again time.Duration
}

// restored is a condition of ours that somebody else had changed.
type restored struct{ kind, theirs, ours string }

func (p *Publisher) plan(snap *engine.Snapshot, node *Node, remark string, early bool) plan {
	pl := plan{written: map[string]writtenCondition{}, adopted: map[string]writtenCondition{}, attempts: map[string]attempt{}}
	now := time.Now()
	today := metav1.NewTime(p.ofDay().Truncate(time.Second)) // as it is on the wire
	have := map[string]NodeCondition{}
	for _, c := range node.Status.Conditions {
		if strings.HasPrefix(c.Type, probes.ConditionPrefix) {
			have[c.Type] = c
		}
	}
	var want []Condition
	keep := map[string]bool{}
	switch {
	case snap == nil || snap.Quiet != "" || early:
		// Nothing is known yet, or what is seen follows from a start or a
		// shutdown: leave what was said since this boot as it is.
		for t := range have {
			keep[t] = true
		}
	case bool(snap.Config.Report.Conditions):
		want = Conditions(*snap)
		if remark != "" { // Ready is the last of them
			ready := &want[len(want)-1]
			ready.Message = clip(ready.Message+"; "+oneLine(remark), maxMessage)
		}
		if !snap.Complete {
			for _, pr := range snap.Probes {
				keep[pr.Condition()] = true
			}
			// A restart of the agent is no news about the host.
			if c, ok := have[ReadyType]; ok && p.valid(c) {
				keep[ReadyType] = true
				want = slices.DeleteFunc(want, func(w Condition) bool { return w.Type == ReadyType && w.Reason == ReasonFirstPassPending })
			}
		}
	}
	for t, c := range have {
		isWanted := slices.ContainsFunc(want, func(w Condition) bool { return w.Type == t })
		if !isWanted && keep[t] && !p.valid(c) && c.Reason != ReasonFirstPassPending {
			if wait := bootGrace - now.Sub(p.met); c.Status == "False" && t != ReadyType && wait > 0 {
				pl.again = wait
				continue
			}
			want = append(want, Condition{Type: t, Status: "Unknown", Reason: ReasonFirstPassPending,
				Message: "this was last checked before the node's last boot"})
		}
	}
	refresh := !p.refreshAt.IsZero() && !now.Before(p.refreshAt)
	clockSet := p.stepped() != p.step
	var changes []map[string]any
	for _, w := range want {
		c, exists := have[w.Type]
		last, wrote := p.written[w.Type]
		set := w.Set()
		if w.Type == ReadyType {
			set += "\x00" + remark
		}
		delete(have, w.Type)
		stale := exists && !p.valid(c) && w.Reason != ReasonFirstPassPending
		if stale && (c.Status != "False" || w.Status != "False" || w.Type == ReadyType) {
			// What it said was over with the boot, also where nobody has come to
			// say so. What was healthy and is has stood for it, and was not
			// anything else in between.
			c = NodeCondition{Type: w.Type, Status: "Unknown", Reason: ReasonFirstPassPending, LastTransitionTime: c.LastTransitionTime}
		}
		if exists && !wrote && w.Provisional && tellsProblem(c) && !tellsProblem(NodeCondition{Type: w.Type, Status: w.Status}) {
			// An agent that started while the API server was away did not know
			// what was told, and holds it back as if it were new.
			continue
		}
		same := exists && c.Status == w.Status && c.Reason == w.Reason
		switch {
		case same && wrote:
			// Somebody else's message is restored; a number of ours that merely
			// moved is not a change.
			same = last.set == set && c.Message == last.message && c.LastTransitionTime.Equal(&last.transition)
			if same && last.provisional && !w.Provisional {
				if same = c.Message == w.Message; same {
					pl.adopted[w.Type] = remember(w, set, c.Message, c.LastTransitionTime)
				}
			}
		case same:
			// Adopted from the agent before: only its text is known. What a
			// healthy probe verified is no reason to write.
			same = w.Status == "False" && len(w.Findings) == 0 || sameButNumbers(c.Message, w.Message)
			if same {
				pl.adopted[w.Type] = remember(w, set, c.Message, c.LastTransitionTime)
				if p.refreshAt.IsZero() && pl.refreshAt.IsZero() {
					due := c.LastHeartbeatTime.Add(time.Hour + rand.N(15*time.Minute)).Sub(today.Time)
					pl.refreshAt = now.Add(min(max(due, 0), 75*time.Minute))
				}
				pl.events = append(pl.events, p.repeat(node, w, c, today)...)
			}
		}
		// The agent after this one would take it for older than the boot.
		outdated := stale || clockSet && exists && !p.sinceBoot(c)
		if same && !refresh && !outdated {
			continue
		}
		transition, moved := today, true
		switch tried, ok := p.attempted[w.Type]; {
		case wrote && last.status == w.Status:
			transition, moved = last.transition, false
			if !exists || c.Status != w.Status || !c.LastTransitionTime.Equal(&transition) {
				// Nothing has happened on this host that was not told.
				theirs := "deleted"
				if exists {
					theirs = c.Status + "/" + c.Reason
				}
				pl.restored = append(pl.restored, restored{w.Type, theirs, w.Status + "/" + w.Reason})
				exists, c = true, NodeCondition{Type: w.Type, Status: last.status, Reason: last.reason, Message: last.message}
			}
		case exists && c.Status == w.Status:
			transition = c.LastTransitionTime
			if moved = wrote; moved {
				// Our own write has arrived whose answer was lost.
				c.Status, c.Reason = last.status, last.reason
			}
		case ok && tried.status == w.Status:
			transition = tried.transition
		}
		if moved {
			pl.attempts[w.Type] = attempt{w.Status, transition}
		}
		changes = append(changes, map[string]any{
			"type": w.Type, "status": w.Status, "reason": w.Reason, "message": w.Message,
			"lastHeartbeatTime": today, "lastTransitionTime": transition,
		})
		pl.written[w.Type] = remember(w, set, w.Message, transition)
		if !same {
			pl.events = append(pl.events, p.eventsFor(node, w, c, exists, last, wrote, moved, transition.Time, today.Time)...)
		}
	}
	pl.patch = changes
	for t := range have {
		if !keep[t] {
			pl.patch = append(pl.patch, map[string]any{"$patch": "delete", "type": t})
			pl.deleted = append(pl.deleted, t)
		}
	}
	return pl
}

// valid says whether a condition on the node is of this boot. What this agent
// wrote is, whatever the clock was set to since.
func (p *Publisher) valid(c NodeCondition) bool {
	_, wrote := p.written[c.Type]
	return wrote || p.sinceBoot(c)
}

// tellsProblem says whether a condition tells of something wrong; Ready is the
// one that does by being False.
func tellsProblem(c NodeCondition) bool {
	if c.Type == ReadyType {
		return c.Status == "False"
	}
	return c.Status == "True"
}

func remember(c Condition, set, message string, transition metav1.Time) writtenCondition {
	keys := map[finding.Key]bool{}
	for _, f := range c.Findings {
		keys[f.Key()] = true
	}
	return writtenCondition{c.Status, c.Reason, transition, set, message, keys, c.Provisional}
}

// sameButNumbers compares two messages with their digits left out.
func sameButNumbers(a, b string) bool {
	strip := func(r rune) rune {
		if r >= '0' && r <= '9' || r == '.' || r == 'n' || r == 'µ' || r == 'm' || r == 's' {
			return -1 // digits, and the units of durations that change with them
		}
		return r
	}
	return strings.Map(strip, a) == strings.Map(strip, b)
}

// event is an Event that has still to be posted.
type event struct {
	name string
	body []byte
}

// eventsFor tells of a change of one condition: each finding that is new, and
// the end of a problem. moved: the status is a new one, since transition.
func (p *Publisher) eventsFor(node *Node, w Condition, c NodeCondition, existed bool, last writtenCondition, wrote, moved bool, transition, now time.Time) []event {
	quiet := func(reason string) bool { return reason == ReasonFirstPassPending || reason == "" }
	if w.Type == ReadyType && w.Reason != ReasonConfigInvalid && w.Reason != ReasonRequiredProbeUnknown {
		return nil // the probe's own condition tells
	}
	switch w.Status {
	case "False", "True":
		if len(w.Findings) == 0 {
			if !existed || c.Status == w.Status || quiet(c.Reason) {
				return nil // healthy from the start
			}
			return []event{p.event(node, w.Type, w.Reason, w.Type, "Normal",
				fmt.Sprintf("%s is over (was %s): %s", w.Type, c.Reason, w.Message), transition)}
		}
		var evs []event
		for i, f := range w.Findings {
			if wrote && last.keys[f.Key()] {
				continue
			}
			if !wrote && !moved && i > 0 {
				continue // adopted: only the worst is known to be new or old
			}
			// The worst finding of a status change is named by the transition
			// time that the condition keeps, so that a crash between the two
			// writes can be made good without doubling it.
			at := now
			if i == 0 && moved {
				at = transition
			}
			evs = append(evs, p.event(node, w.Type, f.Reason, f.Subject, "Warning", eventMessage(f), at))
		}
		return evs
	default:
		again := existed && c.Status == "Unknown" && c.Reason == w.Reason
		switch {
		case quiet(w.Reason):
			return nil
		case w.Reason == ReasonConfigInvalid && again && c.Message != w.Message:
			// Another mistake, which is news; named by its text too, for two of
			// them may come in one second.
			return []event{p.event(node, w.Type, w.Reason, w.Message, "Warning", w.Message, now)}
		case again:
			return nil
		}
		return []event{p.event(node, w.Type, w.Reason, w.Type, "Warning", w.Message, transition)}
	}
}

// repeat posts once more what an agent that died between the condition and the
// Event would have posted; the name makes it the same Event. Once the condition
// has been written again, for another reason or finding, it does not tell any more
// which Event was posted with which time.
func (p *Publisher) repeat(node *Node, w Condition, c NodeCondition, today metav1.Time) []event {
	const recent = 2 * time.Minute
	if len(w.Findings) == 0 || w.Type == ReadyType || today.Sub(c.LastTransitionTime.Time).Abs() > recent ||
		!c.LastHeartbeatTime.Equal(&c.LastTransitionTime) {
		return nil
	}
	f := w.Findings[0]
	return []event{p.event(node, w.Type, f.Reason, f.Subject, "Warning", eventMessage(f), c.LastTransitionTime.Time)}
}

func eventMessage(f finding.Finding) string {
	text := f.Message
	if f.Subject != "" && !strings.Contains(text, f.Subject) {
		text = f.Subject + ": " + text
	}
	return clip(oneLine(text), 1024)
}

// eventNamespace is where Events about cluster-scoped objects live.
const eventNamespace = "default"

func (p *Publisher) event(node *Node, condition, reason, subject, kind, message string, at time.Time) event {
	sum := sha256.Sum256([]byte(strings.Join([]string{string(node.Metadata.UID), condition, reason, subject, at.UTC().Format(time.RFC3339)}, "\x00")))
	name := p.name + "." + hex.EncodeToString(sum[:8])
	when := metav1.NewTime(at)
	body, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Event",
		"metadata": map[string]any{"name": name, "namespace": eventNamespace},
		"involvedObject": map[string]any{
			"kind": "Node", "apiVersion": "v1", "name": p.name, "uid": node.Metadata.UID,
		},
		"reason": reason, "message": message, "type": kind, "count": 1,
		"firstTimestamp": when, "lastTimestamp": when,
		"source":             map[string]any{"component": "host-hygiene-agent", "host": p.name},
		"reportingComponent": "hosthygiene.io/agent", "reportingInstance": p.name,
	})
	if err != nil {
		p.log.Error("encoding an event", "error", err)
	}
	return event{name, body}
}

// maxEvents are kept while the API server can not be reached.
const maxEvents = 64

func (p *Publisher) noticed(node *Node) []event {
	p.mu.Lock()
	notices := p.notices
	p.notices = nil
	p.mu.Unlock()
	var evs []event
	for _, n := range notices {
		evs = append(evs, p.event(node, n.kind, n.reason, n.subject, n.kind, clip(oneLine(n.message), 1024), n.at))
	}
	return evs
}

func (p *Publisher) postEvents(ctx context.Context) {
	for len(p.events) > 0 {
		err := p.api.CreateEvent(ctx, eventNamespace, p.events[0].body)
		if err != nil && (ctx.Err() != nil || retryable(err)) {
			return
		}
		if err != nil {
			p.log.Warn("event not posted", "error", err)
		}
		p.events = p.events[1:]
	}
}
