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
	PatchConditions(ctx context.Context, patch []byte) (*Node, error)
	CreateEvent(ctx context.Context, namespace string, event []byte) error
	Follow(ctx context.Context, seen func(*Node))
}

// Publisher keeps the conditions of one Node as the latest snapshot has them,
// and posts an Event when one changes. It guarantees that
//   - nothing is written while nothing changes, but for one refresh every 60 to
//     75 minutes;
//   - one write is under way at a time, and the newest state wins;
//   - lastTransitionTime moves with the status only, across restarts of the
//     agent too;
//   - what somebody else overwrote or deleted is restored, and what nothing
//     publishes any more is deleted, by type and never by rewriting the list.
type Publisher struct {
	api  NodeAPI
	name string
	log  *slog.Logger
	boot time.Time

	mu       sync.Mutex
	snapshot *engine.Snapshot
	node     *Node
	known    bool // the node was seen, or seen missing, at least once
	labels   func(map[string]string)
	first    chan struct{} // closed when known
	changed  chan struct{}
	notices  []notice
	remark   string

	// What follows belongs to the goroutine of Run.
	began     time.Time // of the first snapshot
	written   map[string]writtenCondition
	refreshAt time.Time
	holdUntil time.Time // after the server said no
	refused   int       // how often it has, one after the other
	events    []event
	reported  chan struct{}
}

// writtenCondition is what was last written of a type.
type writtenCondition struct {
	set         string
	message     string
	keys        map[finding.Key]bool
	provisional bool
}

// NewPublisher returns a Publisher for the named node. boot is when the host
// booted: conditions written before are history. labels is called with the
// node's labels when they change; it may be nil.
func NewPublisher(api NodeAPI, node string, boot time.Time, log *slog.Logger, labels func(map[string]string)) *Publisher {
	return &Publisher{
		api: api, name: node, boot: boot, log: log, labels: labels,
		first: make(chan struct{}), changed: make(chan struct{}, 1), reported: make(chan struct{}),
		written: map[string]writtenCondition{},
	}
}

// Report implements [engine.Reporter].
func (p *Publisher) Report(s engine.Snapshot) {
	p.mu.Lock()
	p.snapshot = &s
	p.mu.Unlock()
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

// sinceBoot: times on the wire have a resolution of a second.
func (p *Publisher) sinceBoot(c NodeCondition) bool {
	return !c.LastHeartbeatTime.Time.Before(p.boot.Truncate(time.Second))
}

func (p *Publisher) seen(n *Node) {
	p.mu.Lock()
	old := p.node
	if n != nil && old != nil && older(n, old) {
		p.mu.Unlock()
		return // a watch event from before our own last write
	}
	p.node = n
	if !p.known {
		p.known = true
		close(p.first)
	}
	p.mu.Unlock()
	if n != nil && p.labels != nil && (old == nil || !maps.Equal(old.Metadata.Labels, n.Metadata.Labels)) {
		p.labels(n.Metadata.Labels)
	}
	p.poke()
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

// firstPassGrace is how long the first write waits for the last probe.
const firstPassGrace = 3 * time.Second

// reconcile makes the node say what it should, and returns when to look again
// if nothing happens before.
func (p *Publisher) reconcile(ctx context.Context) time.Duration {
	p.mu.Lock()
	snap, node, remark := p.snapshot, p.node, p.remark
	p.mu.Unlock()
	now := time.Now()
	if wait := p.holdUntil.Sub(now); wait > 0 {
		return wait
	}
	if node == nil {
		return time.Hour
	}
	// The probes of a first pass come in one by one; one write tells them all,
	// unless one of them hangs.
	var early time.Duration
	if snap != nil {
		if p.began.IsZero() {
			p.began = now
		}
		if early = firstPassGrace - now.Sub(p.began); snap.Complete || early < 0 {
			early = 0
		}
	}
	plan := p.plan(snap, node, remark, now, early > 0)
	if len(plan.patch) > 0 {
		body, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": plan.patch}})
		if err != nil {
			p.log.Error("encoding conditions", "error", err)
			return time.Minute
		}
		after, err := p.api.PatchConditions(ctx, body)
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
		p.refused = 0
		for t, w := range plan.written {
			p.written[t] = w
		}
		for _, t := range plan.deleted {
			delete(p.written, t)
		}
		p.refreshAt = now.Add(time.Hour + rand.N(15*time.Minute))
		p.seen(after)
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
	if p.refreshAt.IsZero() {
		return time.Hour
	}
	return max(time.Until(p.refreshAt), time.Second)
}

// plan is one patch and what follows from it.
type plan struct {
	patch   []map[string]any
	written map[string]writtenCondition
	deleted []string
	events  []event
}

func (p *Publisher) plan(snap *engine.Snapshot, node *Node, remark string, now time.Time, early bool) plan {
	pl := plan{written: map[string]writtenCondition{}}
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
			if c, ok := have[ReadyType]; ok && p.sinceBoot(c) {
				keep[ReadyType] = true
				want = slices.DeleteFunc(want, func(w Condition) bool { return w.Type == ReadyType && w.Reason == ReasonFirstPassPending })
			}
		}
	}
	for t, c := range have {
		isWanted := slices.ContainsFunc(want, func(w Condition) bool { return w.Type == t })
		if !isWanted && keep[t] && !p.sinceBoot(c) && c.Reason != ReasonFirstPassPending {
			want = append(want, Condition{Type: t, Status: "Unknown", Reason: ReasonFirstPassPending,
				Message: "this was last checked before the node's last boot"})
		}
	}
	refresh := !p.refreshAt.IsZero() && !now.Before(p.refreshAt)
	var changes []map[string]any
	for _, w := range want {
		c, exists := have[w.Type]
		last, wrote := p.written[w.Type]
		set := w.Set()
		if w.Type == ReadyType {
			set += "\x00" + remark
		}
		delete(have, w.Type)
		same := exists && c.Status == w.Status && c.Reason == w.Reason
		switch {
		case same && wrote:
			// Somebody else's message is restored; a number of ours that merely
			// moved is not a change.
			same = last.set == set && c.Message == last.message
			if same && last.provisional && !w.Provisional {
				if same = c.Message == w.Message; same {
					p.written[w.Type] = remember(w, set, c.Message)
				}
			}
		case same:
			// Adopted from the agent before: only its text is known. What a
			// healthy probe verified is no reason to write.
			same = w.Status == "False" && len(w.Findings) == 0 || sameButNumbers(c.Message, w.Message)
			if same {
				p.written[w.Type] = remember(w, set, c.Message)
				if p.refreshAt.IsZero() {
					p.refreshAt = c.LastHeartbeatTime.Add(time.Hour + rand.N(15*time.Minute))
				}
				pl.events = append(pl.events, p.repeat(node, w, c, now)...)
			}
		}
		if same && !refresh {
			continue
		}
		transition := metav1.NewTime(now)
		if exists && c.Status == w.Status {
			transition = c.LastTransitionTime
		}
		changes = append(changes, map[string]any{
			"type": w.Type, "status": w.Status, "reason": w.Reason, "message": w.Message,
			"lastHeartbeatTime": metav1.NewTime(now), "lastTransitionTime": transition,
		})
		pl.written[w.Type] = remember(w, set, w.Message)
		if !same {
			pl.events = append(pl.events, p.eventsFor(node, w, c, exists, last, wrote, transition.Time, now)...)
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

func remember(c Condition, set, message string) writtenCondition {
	keys := map[finding.Key]bool{}
	for _, f := range c.Findings {
		keys[f.Key()] = true
	}
	return writtenCondition{set, message, keys, c.Provisional}
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
// the end of a problem.
func (p *Publisher) eventsFor(node *Node, w Condition, c NodeCondition, existed bool, last writtenCondition, wrote bool, transition, now time.Time) []event {
	quiet := func(reason string) bool { return reason == ReasonFirstPassPending || reason == "" }
	if w.Type == ReadyType && w.Reason != ReasonConfigInvalid && w.Reason != ReasonRequiredProbeUnknown {
		return nil // the probe's own condition tells
	}
	moved := transition.Equal(now)
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
		if quiet(w.Reason) || existed && c.Status == "Unknown" && c.Reason == w.Reason {
			return nil
		}
		return []event{p.event(node, w.Type, w.Reason, w.Type, "Warning", w.Message, transition)}
	}
}

// repeat posts once more what an agent that died between the condition and the
// Event would have posted; the name makes it the same Event.
func (p *Publisher) repeat(node *Node, w Condition, c NodeCondition, now time.Time) []event {
	const recent = 2 * time.Minute
	if len(w.Findings) == 0 || w.Type == ReadyType || now.Sub(c.LastTransitionTime.Time) > recent {
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
