//go:build cluster

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

// change is one difference the API server showed in a condition of ours.
type change struct {
	at       time.Time
	kind     string // the condition's type without the prefix
	from, to *corev1.NodeCondition
}

func (c change) String() string {
	show := func(n *corev1.NodeCondition) string {
		if n == nil {
			return "absent"
		}
		return fmt.Sprintf("%s/%s (since %s)", n.Status, n.Reason, n.LastTransitionTime.UTC().Format(time.TimeOnly))
	}
	s := fmt.Sprintf("%s %s: %s → %s", c.at.UTC().Format("15:04:05.0"), c.kind, show(c.from), show(c.to))
	if !c.statusChange() && c.from.Message != c.to.Message {
		s += fmt.Sprintf(": %q → %q", c.from.Message, c.to.Message)
	}
	return s
}

// statusChange says whether more than the wording is different.
func (c change) statusChange() bool {
	return c.from == nil || c.to == nil || c.from.Status != c.to.Status
}

// observer follows the Node and the agent's Events with watches, so that it
// sees every version of a condition: one that flickers between two polls too.
type observer struct {
	cluster *rigtest.Cluster

	mu         sync.Mutex
	conditions rigtest.Conditions
	changes    []change
	events     map[string]corev1.Event // by name
	faults     []string                // what no condition may ever do
	lists      int                     // how often either was listed
}

func newObserver(c *rigtest.Cluster) *observer {
	return &observer{cluster: c, conditions: rigtest.Conditions{}, events: map[string]corev1.Event{}}
}

func (o *observer) run(ctx context.Context) {
	var running sync.WaitGroup
	running.Go(func() {
		o.follow(ctx, "/api/v1/nodes", "metadata.name="+o.cluster.Node.Name(), o.seeNode)
	})
	running.Go(func() {
		o.follow(ctx, "/api/v1/namespaces/default/events", "involvedObject.name="+o.cluster.Node.Name(), o.seeEvent)
	})
	running.Wait()
}

func (o *observer) seeNode(raw []byte) error {
	var n corev1.Node
	if err := json.Unmarshal(raw, &n); err != nil {
		return err
	}
	now := time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	seen := map[string]bool{}
	for _, c := range n.Status.Conditions {
		kind, ours := strings.CutPrefix(string(c.Type), rigtest.ConditionPrefix)
		if !ours {
			continue
		}
		seen[kind] = true
		var from *corev1.NodeCondition
		if old, had := o.conditions[kind]; had {
			if old == c {
				continue
			}
			from = &old
		}
		o.change(change{now, kind, from, &c})
		o.conditions[kind] = c
	}
	for kind, old := range o.conditions {
		if !seen[kind] {
			o.change(change{now, kind, &old, nil})
			delete(o.conditions, kind)
		}
	}
	return nil
}

// change notes a change and holds it to what is promised of every one.
func (o *observer) change(c change) {
	o.changes = append(o.changes, c)
	if c.from == nil || c.to == nil {
		return
	}
	same := c.from.LastTransitionTime.Equal(&c.to.LastTransitionTime)
	if c.from.Status == c.to.Status && !same {
		o.faults = append(o.faults, "the transition time moved without the status: "+c.String())
	}
	if c.from.Status != c.to.Status && c.to.LastTransitionTime.Before(&c.from.LastTransitionTime) {
		o.faults = append(o.faults, "the transition time went back: "+c.String())
	}
}

func (o *observer) seeEvent(raw []byte) error {
	var e corev1.Event
	if err := json.Unmarshal(raw, &e); err != nil {
		return err
	}
	if e.ReportingController != "hosthygiene.io/agent" {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if old, had := o.events[e.Name]; had && old.Count != e.Count {
		o.faults = append(o.faults, fmt.Sprintf("Event %s was counted up to %d: %s", e.Name, e.Count, e.Message))
	}
	o.events[e.Name] = e
	return nil
}

// follow lists and watches until ctx ends. An API server that is away is no
// error: being away is one of the scenarios.
func (o *observer) follow(ctx context.Context, path, selector string, see func([]byte) error) {
	for ctx.Err() == nil {
		if err := o.once(ctx, path, selector, see); err != nil && ctx.Err() == nil {
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
}

func (o *observer) once(ctx context.Context, path, selector string, see func([]byte) error) error {
	var list struct {
		Metadata struct{ ResourceVersion string }
		Items    []json.RawMessage
	}
	query := url.Values{"fieldSelector": {selector}}
	if err := o.cluster.Get(ctx, path+"?"+query.Encode(), &list); err != nil {
		return err
	}
	for _, item := range list.Items {
		if err := see(item); err != nil {
			return err
		}
	}
	o.mu.Lock()
	o.lists++
	o.mu.Unlock()
	query.Set("watch", "1")
	query.Set("resourceVersion", list.Metadata.ResourceVersion)
	body, err := o.cluster.Open(ctx, path+"?"+query.Encode())
	if err != nil {
		return err
	}
	defer body.Close()
	dec := json.NewDecoder(body)
	for {
		var e struct {
			Type   string
			Object json.RawMessage
		}
		if err := dec.Decode(&e); err != nil {
			return err
		}
		switch e.Type {
		case "ADDED", "MODIFIED":
			if err := see(e.Object); err != nil {
				return err
			}
		case "ERROR":
			return errors.New("the watch expired")
		}
	}
}

// condition returns a condition of ours as it is now.
func (o *observer) condition(kind string) (corev1.NodeCondition, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c, ok := o.conditions[kind]
	return c, ok
}

// listed says whether both the Node and the Events have been seen.
func (o *observer) listed() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.lists < 2 {
		return errors.New("not listed yet")
	}
	return nil
}

// bare says whether the Node has no condition of ours.
func (o *observer) bare() error {
	if left := o.all(); len(left) > 0 {
		return fmt.Errorf("%d conditions are left", len(left))
	}
	return nil
}

// all returns every condition of ours as it is now.
func (o *observer) all() rigtest.Conditions {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := make(rigtest.Conditions, len(o.conditions))
	for kind, c := range o.conditions {
		now[kind] = c
	}
	return now
}

// mark is a place in the history.
type mark struct {
	changes int
	events  map[string]bool
	at      time.Time
}

func (o *observer) mark() mark {
	o.mu.Lock()
	defer o.mu.Unlock()
	m := mark{changes: len(o.changes), events: map[string]bool{}, at: time.Now()}
	for name := range o.events {
		m.events[name] = true
	}
	return m
}

// changesSince returns what changed after the mark.
func (o *observer) changesSince(m mark) []change {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.changes[m.changes:])
}

// eventsSince returns the Events that were posted after the mark, the oldest
// first.
func (o *observer) eventsSince(m mark) []corev1.Event {
	o.mu.Lock()
	defer o.mu.Unlock()
	var evs []corev1.Event
	for name, e := range o.events {
		if !m.events[name] {
			evs = append(evs, e)
		}
	}
	slices.SortFunc(evs, func(a, b corev1.Event) int { return a.LastTimestamp.Compare(b.LastTimestamp.Time) })
	return evs
}

// broken returns what the agent did that it must never do, and forgets it.
func (o *observer) broken() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	f := o.faults
	o.faults = nil
	return f
}
