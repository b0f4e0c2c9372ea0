package report

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

// memoryAPI is a Node with the API server's semantics as far as they matter
// for time: the same behaviour is proved on a real API server in api_test.go.
type memoryAPI struct {
	mu      sync.Mutex
	node    *Node
	version int
	patches int
	posted  map[string]string // by name
	order   []string          // "Type/Reason: message"
	fail    error
	late    time.Duration // of the first list
	swallow bool          // what fails is done all the same: only the answer is lost
	watch   chan *Node
}

func newMemoryAPI(conditions ...NodeCondition) *memoryAPI {
	n := new(Node)
	n.Metadata.Name, n.Metadata.UID, n.Metadata.ResourceVersion = "n1", "uid-1", "100"
	n.Status.Conditions = conditions
	return &memoryAPI{node: n, version: 100, posted: map[string]string{}, watch: make(chan *Node, 16)}
}

func (a *memoryAPI) Follow(ctx context.Context, seen func(*Node)) {
	time.Sleep(a.late)
	seen(a.copy())
	for {
		select {
		case <-ctx.Done():
			return
		case n := <-a.watch:
			seen(n)
		}
	}
}

func (a *memoryAPI) copy() *Node {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.node == nil {
		return nil
	}
	n := *a.node
	n.Status.Conditions = slices.Clone(n.Status.Conditions)
	return &n
}

// edit changes the node as somebody else would, and the watch tells.
func (a *memoryAPI) edit(change func(n *Node)) {
	a.mu.Lock()
	change(a.node)
	a.version++
	a.node.Metadata.ResourceVersion = strconv.Itoa(a.version)
	a.mu.Unlock()
	a.watch <- a.copy()
}

func (a *memoryAPI) PatchConditions(_ context.Context, make func() []byte) (*Node, error) {
	// The gate of the real client makes its caller wait after a failure.
	a.mu.Lock()
	failing := a.fail != nil
	a.mu.Unlock()
	if failing {
		time.Sleep(time.Second)
	}
	patch := make()
	if patch == nil {
		return nil, nil
	}
	a.mu.Lock()
	if err := a.fail; err != nil && !a.swallow {
		a.mu.Unlock()
		return nil, err
	}
	var p struct {
		Status struct {
			Conditions []struct {
				NodeCondition
				Directive string `json:"$patch"`
			} `json:"conditions"`
		} `json:"status"`
	}
	if err := json.Unmarshal(patch, &p); err != nil {
		a.mu.Unlock()
		return nil, err
	}
	a.patches++
	for _, c := range p.Status.Conditions {
		i := slices.IndexFunc(a.node.Status.Conditions, func(o NodeCondition) bool { return o.Type == c.Type })
		switch {
		case c.Directive == "delete" && i >= 0:
			a.node.Status.Conditions = slices.Delete(a.node.Status.Conditions, i, i+1)
		case c.Directive == "delete":
		case i >= 0:
			a.node.Status.Conditions[i] = c.NodeCondition
		default:
			a.node.Status.Conditions = append(a.node.Status.Conditions, c.NodeCondition)
		}
	}
	a.version++
	a.node.Metadata.ResourceVersion = strconv.Itoa(a.version)
	err := a.fail
	a.mu.Unlock()
	return a.copy(), err
}

func (a *memoryAPI) CreateEvent(_ context.Context, namespace string, event []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var e struct {
		Metadata struct{ Name, Namespace string }
		Type     string
		Reason   string
		Message  string
	}
	if err := json.Unmarshal(event, &e); err != nil {
		return err
	}
	if _, exists := a.posted[e.Metadata.Name]; !exists {
		a.order = append(a.order, e.Type+"/"+e.Reason)
	}
	a.posted[e.Metadata.Name] = e.Message
	return nil
}

func (a *memoryAPI) condition(typ string) (NodeCondition, bool) {
	n := a.copy()
	i := slices.IndexFunc(n.Status.Conditions, func(c NodeCondition) bool { return c.Type == typ })
	if i < 0 {
		return NodeCondition{}, false
	}
	return n.Status.Conditions[i], true
}

type published struct {
	*memoryAPI
	*Publisher
}

func publish(t *testing.T, api *memoryAPI, boot time.Time) published {
	p := NewPublisher(api, "n1", boot, slog.New(slog.DiscardHandler), nil)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { p.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	synctest.Wait()
	return published{api, p}
}

func (p published) report(s engine.Snapshot) {
	p.Publisher.Report(s)
	synctest.Wait()
}

const mp = probes.ConditionPrefix + "mp"

func bad() engine.Snapshot {
	return snapshot(finding.Report{Probe: "mp", Findings: []finding.Finding{degraded}})
}

func good() engine.Snapshot { return snapshot(finding.Report{Probe: "mp", Summary: "2 of 2 paths"}) }

func TestPublisherWritesChangesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(good())
		if c, _ := p.condition(mp); c.Status != "False" || p.writes() != 1 {
			t.Fatalf("%+v after %d patches", c, p.writes())
		}
		healthy, _ := p.condition(mp)
		for range 100 {
			time.Sleep(10 * time.Second)
			moved := good()
			moved.Reports[0].Summary = "3 of 3 paths" // a number that moves
			p.report(moved)
		}
		if p.writes() != 1 {
			t.Errorf("%d patches while nothing changed", p.writes())
		}
		p.report(bad())
		c, _ := p.condition(mp)
		if c.Status != "True" || c.Reason != "PathsDegraded" || !c.LastTransitionTime.After(healthy.LastTransitionTime.Time) {
			t.Errorf("%+v", c)
		}
		time.Sleep(time.Minute)
		p.report(good())
		if !slices.Equal(p.order, []string{"Warning/PathsDegraded", "Normal/NoProblem"}) {
			t.Errorf("events: %v", p.order)
		}
	})
}

// A session that is being restored when its daemon comes back is too young a
// finding to be told, but the summary counts it: "0 of 1 sessions" must not stay
// on a healthy node until the hourly refresh.
func TestPublisherCorrectsASummaryOfWhatWasHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(bad())
		p.report(snapshot(finding.Report{Probe: "mp", Summary: "0 of 2 paths", Held: 1}))
		p.report(snapshot(finding.Report{Probe: "mp", Summary: "1 of 2 paths", Held: 1}))
		if c, _ := p.condition(mp); c.Message != "0 of 2 paths" || p.writes() != 2 {
			t.Errorf("while it is held back: %q after %d patches", c.Message, p.writes())
		}
		time.Sleep(time.Minute)
		before, _ := p.condition(mp)
		p.report(good())
		c, _ := p.condition(mp)
		if c.Message != "2 of 2 paths" || p.writes() != 3 || !c.LastTransitionTime.Equal(&before.LastTransitionTime) {
			t.Errorf("afterwards: %q after %d patches, since %s", c.Message, p.writes(), c.LastTransitionTime)
		}
		p.report(snapshot(finding.Report{Probe: "mp", Summary: "3 of 3 paths"}))
		if p.writes() != 3 {
			t.Errorf("a number that moves was written")
		}
	})
}

func TestPublisherRefreshesOnceAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(good())
		before, _ := p.condition(mp)
		time.Sleep(59 * time.Minute)
		synctest.Wait()
		if p.writes() != 1 {
			t.Errorf("%d patches within the hour", p.writes())
		}
		time.Sleep(17 * time.Minute)
		synctest.Wait()
		after, _ := p.condition(mp)
		if p.writes() != 2 || after.LastHeartbeatTime.Equal(&before.LastHeartbeatTime) || !after.LastTransitionTime.Equal(&before.LastTransitionTime) {
			t.Errorf("%d patches, %+v", p.writes(), after)
		}
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if p.writes() > 2+24 {
			t.Errorf("%d patches in a day", p.writes())
		}
	})
}

func TestPublisherAdoptsWhatWasWrittenSinceBoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := metav1.NewTime(time.Now().Add(-20 * time.Minute).Truncate(time.Second))
		api := newMemoryAPI(
			NodeCondition{Type: mp, Status: "True", Reason: "PathsDegraded", Message: "mpatha has 1 of 2 paths", LastHeartbeatTime: at, LastTransitionTime: at},
			NodeCondition{Type: ReadyType, Status: "True", Reason: ReasonReady, Message: "nothing critical was found on this host", LastHeartbeatTime: at, LastTransitionTime: at},
			NodeCondition{Type: "Ready", Status: "True", LastHeartbeatTime: at})
		p := publish(t, api, time.Now().Add(-time.Hour))
		if !p.Prior(mp) || p.Prior(ReadyType+"x") {
			t.Error("what was told before is not known")
		}
		p.report(bad())
		if p.writes() != 0 || len(p.order) != 0 {
			t.Errorf("%d patches, events %v after a restart with nothing new", p.writes(), p.order)
		}
		p.report(good())
		if c, _ := p.condition(mp); c.Status != "False" || len(p.order) != 1 {
			t.Errorf("%+v %v", c, p.order)
		}
	})
}

// The probes of a first pass come in one by one; nothing flickers meanwhile.
func TestPublisherWaitsForTheFirstPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		half := bad()
		half.Complete = false
		p.report(half)
		time.Sleep(firstPassGrace / 2)
		p.report(bad())
		ready, _ := p.condition(ReadyType)
		if p.writes() != 1 || ready.Status != "True" {
			t.Fatalf("%d writes, %+v", p.writes(), ready)
		}
		time.Sleep(10 * time.Second)
		again := publish(t, p.memoryAPI, time.Now().Add(-time.Hour))
		again.report(half)
		time.Sleep(firstPassGrace + time.Second) // one probe hangs
		synctest.Wait()
		if after, _ := p.condition(ReadyType); after != ready || p.writes() != 1 {
			t.Errorf("before %+v, after a restart %+v, %d writes", ready, after, p.writes())
		}
	})
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		half := bad()
		half.Complete = false
		p.report(half)
		time.Sleep(firstPassGrace + time.Second)
		synctest.Wait()
		told, _ := p.condition(mp)
		ready, _ := p.condition(ReadyType)
		if told.Status != "True" || ready.Reason != ReasonFirstPassPending {
			t.Errorf("one probe hangs: the others say %+v, Ready %+v", told, ready)
		}
	})
}

func TestPublisherAdoptsAHealthyConditionWhateverItSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := metav1.NewTime(time.Now().Add(-20 * time.Minute).Truncate(time.Second))
		p := publish(t, newMemoryAPI(
			NodeCondition{Type: mp, Status: "False", Reason: ReasonNoProblem, Message: "1 of 1 paths, before a map was added", LastHeartbeatTime: at, LastTransitionTime: at},
			NodeCondition{Type: ReadyType, Status: "True", Reason: ReasonReady, Message: "nothing critical was found on this host", LastHeartbeatTime: at, LastTransitionTime: at}),
			time.Now().Add(-time.Hour))
		p.report(good())
		if p.writes() != 0 {
			t.Errorf("%d patches after a restart on a healthy host", p.writes())
		}
		time.Sleep(time.Hour)
		p.report(good())
		if c, _ := p.condition(mp); p.writes() != 1 || c.Message != "2 of 2 paths" {
			t.Errorf("the refresh: %d patches, %q", p.writes(), c.Message)
		}
	})
}

func TestPublisherMakesGoodAnEventLostInACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(bad())
		if len(p.posted) != 1 {
			t.Fatalf("events: %v", p.order)
		}
		time.Sleep(5 * time.Second)
		again := publish(t, p.memoryAPI, time.Now().Add(-time.Hour))
		again.report(bad())
		if len(again.posted) != 1 {
			t.Errorf("the event was doubled: %v", again.order)
		}
		for _, what := range []string{"before it", "before it, and something else is to be written too"} {
			clear(again.posted) // as if the crash had come there
			third := publish(t, p.memoryAPI, time.Now().Add(-time.Hour))
			third.report(bad())
			if len(third.posted) != 1 {
				t.Errorf("a crash %s: the event is lost: %v", what, third.order)
			}
			p.locked(func() {
				n := p.memoryAPI.node
				n.Status.Conditions = slices.DeleteFunc(n.Status.Conditions, func(c NodeCondition) bool { return c.Type == ReadyType })
			})
		}
	})
}

// The reason of a problem that was told changes, and the agent is killed.
func TestPublisherDoublesNoEventOfAnotherReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(bad())
		time.Sleep(5 * time.Second)
		worse := func() engine.Snapshot {
			failed := degraded
			failed.Reason = "AllPathsFailed"
			return snapshot(finding.Report{Probe: "mp", Findings: []finding.Finding{failed, degraded}})
		}
		p.report(worse())
		if len(p.posted) != 2 {
			t.Fatalf("events: %v", p.order)
		}
		again := publish(t, p.memoryAPI, time.Now().Add(-time.Hour))
		again.report(worse())
		if len(again.posted) != 2 {
			t.Errorf("the event was doubled: %v", again.order)
		}
	})
}

// TestPublisherLeavesWhatIsHealthyAtABoot: what was well before a boot stands for
// the first look, but not for long, and Ready does not.
func TestPublisherLeavesWhatIsHealthyAtABoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := metav1.NewTime(time.Now().Add(-2 * time.Hour))
		before := []NodeCondition{
			{Type: mp, Status: "False", Reason: "NoProblem", LastHeartbeatTime: at, LastTransitionTime: at},
			{Type: ReadyType, Status: "True", Reason: "NoProblem", LastHeartbeatTime: at, LastTransitionTime: at},
		}
		boots := func(wait time.Duration) (p published, c, ready NodeCondition) {
			p = publish(t, newMemoryAPI(slices.Clone(before)...), time.Now().Add(-time.Minute))
			time.Sleep(wait)
			c, _ = p.condition(mp)
			ready, _ = p.condition(ReadyType)
			return p, c, ready
		}
		p, c, ready := boots(2 * time.Second)
		if c.Status != "False" || ready.Status != "Unknown" || ready.Reason != ReasonFirstPassPending {
			t.Errorf("before the first pass: %+v, %+v", c, ready)
		}
		p.report(good())
		if c, _ = p.condition(mp); c.Status != "False" || !c.LastTransitionTime.Equal(&at) || c.LastHeartbeatTime.Equal(&at) || len(p.order) != 0 {
			t.Errorf("after it: %+v, Events %v", c, p.order)
		}
		if _, c, _ := boots(bootGrace + time.Second); c.Status != "Unknown" || c.Reason != ReasonFirstPassPending {
			t.Errorf("without a first pass: %+v", c)
		}
	})
}

func TestPublisherForgetsWhatIsOlderThanTheBoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := metav1.NewTime(time.Now().Add(-2 * time.Hour))
		p := publish(t, newMemoryAPI(NodeCondition{Type: mp, Status: "True", Reason: "PathsDegraded", LastHeartbeatTime: at, LastTransitionTime: at}), time.Now().Add(-time.Minute))
		c, _ := p.condition(mp)
		if c.Status != "Unknown" || c.Reason != ReasonFirstPassPending || p.Prior(mp) {
			t.Errorf("before the first pass: %+v", c)
		}
		quiet := good()
		quiet.Quiet = "systemd is starting up"
		p.report(quiet)
		if c, _ := p.condition(mp); c.Reason != ReasonFirstPassPending {
			t.Errorf("while systemd starts: %+v", c)
		}
		p.report(good())
		if c, _ := p.condition(mp); c.Status != "False" || len(p.order) != 0 {
			t.Errorf("after it: %+v, events %v", c, p.order)
		}
	})
}

func TestPublisherRestoresWhatOthersChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(bad())
		told, _ := p.condition(mp)
		restored := func(what string) {
			t.Helper()
			synctest.Wait()
			c, ok := p.condition(mp)
			if !ok || c.Status != "True" || c.Message != told.Message || !c.LastTransitionTime.Equal(&told.LastTransitionTime) {
				t.Errorf("%s: %+v, was %+v", what, c, told)
			}
			if len(p.order) != 1 {
				t.Errorf("%s: events %v", what, p.order)
			}
			time.Sleep(time.Minute)
		}
		time.Sleep(time.Minute)
		p.edit(func(n *Node) {
			c := &n.Status.Conditions[0]
			c.Status, c.Message, c.LastTransitionTime = "False", "all is well", metav1.Now()
		})
		restored("overwritten")
		p.edit(func(n *Node) { n.Status.Conditions[0].LastTransitionTime = metav1.Now() })
		restored("another transition time")
		p.edit(func(n *Node) { n.Status.Conditions = nil })
		restored("deleted")
		patches := p.writes()
		p.edit(func(n *Node) { n.Metadata.Labels = map[string]string{"x": "y"} })
		synctest.Wait()
		if p.writes() != patches {
			t.Error("a change that is not ours was answered with a write")
		}
		p.report(good())
		told, _ = p.condition(mp)
		p.edit(func(n *Node) {
			n.Status.Conditions[0].Status, n.Status.Conditions[0].LastTransitionTime = "True", metav1.Now()
		})
		synctest.Wait()
		if c, _ := p.condition(mp); c != told || len(p.order) != 2 {
			t.Errorf("a problem that somebody else claimed: %+v, was %+v, events %v", c, told, p.order)
		}
	})
}

// A write may reach the API server and its answer not the agent. The status has
// moved once, and the second attempt says when.
func TestPublisherWhoseAnswerIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(good())
		time.Sleep(time.Minute)
		p.locked(func() { p.fail, p.swallow = errors.New("connection reset"), true })
		p.report(bad())
		time.Sleep(1500 * time.Millisecond)
		first, _ := p.condition(mp)
		if first.Status != "True" {
			t.Fatalf("%+v", first)
		}
		time.Sleep(30 * time.Second)
		p.locked(func() { p.fail = nil })
		time.Sleep(time.Minute)
		synctest.Wait()
		if c, _ := p.condition(mp); !c.LastTransitionTime.Equal(&first.LastTransitionTime) {
			t.Errorf("since %s, then since %s", first.LastTransitionTime, c.LastTransitionTime)
		}
		again := publish(t, p.memoryAPI, time.Now().Add(-time.Hour)) // killed
		again.report(bad())
		if len(p.posted) != 1 {
			t.Errorf("events: %v", p.order)
		}
	})
}

// The same, and the watch tells before the next attempt.
func TestPublisherWhoseAnswerComesByTheWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(bad())
		time.Sleep(time.Minute)
		p.locked(func() { p.fail, p.swallow = errors.New("connection reset"), true })
		p.report(good())
		time.Sleep(10 * time.Second)
		p.locked(func() { p.fail = nil })
		p.edit(func(*Node) {})
		time.Sleep(time.Minute)
		synctest.Wait()
		if !slices.Equal(p.order, []string{"Warning/PathsDegraded", "Normal/NoProblem"}) {
			t.Errorf("events: %v", p.order)
		}
	})
}

// What came and went while the API server was away is not told when it is back,
// not even for the moment between two writes.
func TestPublisherTellsNothingOldAfterAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(good())
		p.locked(func() { p.fail = errors.New("away") })
		p.report(bad())
		time.Sleep(5 * time.Second)
		p.locked(func() { p.fail = nil })
		p.report(good()) // and the next attempt waits at the gate
		time.Sleep(time.Minute)
		synctest.Wait()
		if c, _ := p.condition(mp); c.Status != "False" || p.writes() != 1 || len(p.order) != 0 {
			t.Errorf("%+v after %d patches, events %v", c, p.writes(), p.order)
		}
	})
}

// An agent that starts while the API server is slow learns late what was told.
// A problem that it holds back as new is none.
func TestPublisherThatLearnsLateWhatWasTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		critical := degraded
		critical.Severity = finding.Critical
		told := snapshot(finding.Report{Probe: "mp", Findings: []finding.Finding{critical}})
		p.report(told)
		time.Sleep(time.Minute)
		before := p.copy().Status.Conditions

		late := &memoryAPI{node: p.copy(), version: 200, posted: map[string]string{}, watch: make(chan *Node, 1), late: 20 * time.Second}
		again := publish(t, late, time.Now().Add(-time.Hour))
		again.report(snapshot(finding.Report{Probe: "mp", Summary: "1 of 2 paths", Held: 1}))
		time.Sleep(time.Minute)
		again.report(snapshot(finding.Report{Probe: "mp", Summary: "1 of 2 paths", Held: 1}))
		again.report(told)
		if !slices.Equal(again.copy().Status.Conditions, before) || again.writes() != 0 {
			t.Errorf("%+v\nwas %+v", again.copy().Status.Conditions, before)
		}
		again.report(good())
		if c, _ := again.condition(mp); c.Status != "False" {
			t.Errorf("over: %+v", c)
		}
	})
}

// Labels that come late select overrides: what was found without them is about
// another config.
func TestPublisherThatLearnsItsLabelsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const multipath = probes.ConditionPrefix + "MultipathProblem"
		found := func(s engine.Snapshot) engine.Snapshot {
			s.Reports[0].Condition, s.Reports[0].Started = multipath, time.Now()
			return s
		}
		first := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		first.report(found(bad()))
		late := &memoryAPI{node: first.copy(), version: 200, posted: map[string]string{}, watch: make(chan *Node, 1), late: 20 * time.Second}
		p := NewPublisher(late, "n1", time.Now().Add(-time.Hour), slog.New(slog.DiscardHandler), func(map[string]string) bool { return true })
		late.node.Metadata.Labels = map[string]string{"pool": "storage"}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { p.Run(ctx) })
		without := found(good())
		p.Report(without)
		time.Sleep(25 * time.Second)
		p.Report(without) // the engine tells what it has when a config comes into force
		synctest.Wait()
		if c, _ := late.condition(multipath); c.Status != "True" || late.writes() != 0 {
			t.Errorf("before a look with the labels: %+v", c)
		}
		p.Report(found(bad()))
		synctest.Wait()
		if late.writes() != 0 {
			t.Errorf("%d patches", late.writes())
		}
		time.Sleep(2 * time.Minute) // one that hangs is told all the same
		p.Report(without)
		synctest.Wait()
		if c, _ := late.condition(multipath); c.Status != "False" {
			t.Errorf("after a while: %+v", c)
		}
		cancel()
		wg.Wait()
	})
}

// Each config that is refused is told, once, and its mistake stands in Ready.
func TestPublisherTellsEachMistake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(good())
		for i, mistake := range []string{"config.yaml:5: unknown key maxOfset", "config.yaml:7: unknown key intervall", "config.yaml: not text"} {
			refused := good()
			refused.ConfigError = errors.New(mistake)
			p.report(refused)
			p.report(refused)
			if c, _ := p.condition(ReadyType); c.Status != "Unknown" || c.Message != mistake {
				t.Errorf("%+v", c)
			}
			if len(p.posted) != i+1 {
				t.Errorf("events after %q: %v", mistake, p.posted)
			}
		}
	})
}

// The clock is set by an hour, and the time of the boot with it. What this agent
// wrote stays of this boot, for itself and for the agent after it, and what is
// due after a while is due after a while.
func TestPublisherWhileTheClockIsSet(t *testing.T) {
	for _, by := range []time.Duration{time.Hour, -time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			boot := time.Now().Add(-30 * time.Minute)
			p := publish(t, newMemoryAPI(), boot)
			p.report(bad())
			before := p.copy().Status.Conditions
			time.Sleep(10 * time.Minute)

			p.Publisher.mu.Lock()
			p.ofDay = func() time.Time { return time.Now().Round(0).Add(by) }
			p.Publisher.mu.Unlock()
			p.report(bad())
			after := p.copy().Status.Conditions
			if p.writes() != 2 {
				t.Errorf("%s: %d patches, want one to say that it is of this boot", by, p.writes())
			}
			for i, c := range after {
				if c.Status != before[i].Status || !c.LastTransitionTime.Equal(&before[i].LastTransitionTime) {
					t.Errorf("%s: %+v, was %+v", by, c, before[i])
				}
			}
			quiet := bad()
			quiet.Quiet = "systemd is shutting down"
			p.report(quiet)
			p.report(bad())

			// Its boot is what the clock says now; here that is the step too.
			again := NewPublisher(p.memoryAPI, "n1", boot, slog.New(slog.DiscardHandler), nil)
			again.ofDay = p.ofDay
			again.node = p.copy()
			if !again.Prior(mp) {
				t.Errorf("%s: to the next agent it is older than the boot", by)
			}
			time.Sleep(59 * time.Minute)
			synctest.Wait()
			if p.writes() != 2 || len(p.order) != 1 {
				t.Errorf("%s: %d patches, events %v", by, p.writes(), p.order)
			}
			time.Sleep(17 * time.Minute)
			synctest.Wait()
			if p.writes() != 3 {
				t.Errorf("%s: %d patches: the hourly refresh is late", by, p.writes())
			}
		})
	}
}

func TestPublisherNodeDeletedAndMadeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(bad())
		p.watch <- nil
		time.Sleep(time.Minute)
		synctest.Wait()
		patches := p.writes()
		p.edit(func(n *Node) { n.Metadata.UID, n.Status.Conditions = "uid-2", nil })
		synctest.Wait()
		if c, ok := p.condition(mp); !ok || c.Status != "True" || p.writes() != patches+1 {
			t.Errorf("%+v after %d patches", c, p.writes()-patches)
		}
	})
}

func TestPublisherDeletesWhatNothingPublishes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := metav1.Now()
		p := publish(t, newMemoryAPI(
			NodeCondition{Type: probes.ConditionPrefix + "OfAnOldVersion", Status: "True", LastHeartbeatTime: now},
			NodeCondition{Type: "KernelDeadlock", Status: "False", LastHeartbeatTime: now}), time.Now().Add(-time.Hour))
		p.report(good())
		if _, ok := p.condition(probes.ConditionPrefix + "OfAnOldVersion"); ok {
			t.Error("ours, and published by nothing")
		}
		if _, ok := p.condition("KernelDeadlock"); !ok {
			t.Error("somebody else's was deleted")
		}
		off := good()
		cfg := *off.Config
		cfg.Report.Conditions = config.Off
		off.Config = &cfg
		p.report(off)
		for _, c := range p.copy().Status.Conditions {
			if strings.HasPrefix(c.Type, probes.ConditionPrefix) {
				t.Errorf("report.conditions is off, and %s stays", c.Type)
			}
		}
	})
}

func TestPublisherThroughAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(good())
		down := apierrors.NewGenericServerResponse(http.StatusServiceUnavailable, "patch", metav1.SchemeGroupVersion.WithResource("nodes").GroupResource(), "n1", "", 0, true)
		p.locked(func() { p.fail = down })
		p.report(bad())
		p.report(good())
		p.report(bad())
		time.Sleep(10 * time.Minute)
		if c, _ := p.condition(mp); c.Status != "False" {
			t.Fatalf("%+v", c)
		}
		p.locked(func() { p.fail = nil })
		time.Sleep(time.Minute)
		synctest.Wait()
		if c, _ := p.condition(mp); c.Status != "True" || p.writes() != 2 {
			t.Errorf("%+v after %d patches: the newest state wins", c, p.writes())
		}
		if !slices.Equal(p.order, []string{"Warning/PathsDegraded"}) {
			t.Errorf("events: %v", p.order)
		}
	})
}

func (a *memoryAPI) locked(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

func TestPublisherAfterANoDoesNotHammer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newMemoryAPI()
		api.fail = apierrors.NewForbidden(metav1.SchemeGroupVersion.WithResource("nodes").GroupResource(), "n1", nil)
		var attempts atomic.Int32
		p := NewPublisher(counted{api, &attempts}, "n1", time.Now().Add(-time.Hour), slog.New(slog.DiscardHandler), nil)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { p.Run(ctx) })
		p.Report(bad())
		time.Sleep(10 * time.Minute)
		if n := attempts.Load(); n < 5 || n > 35 {
			t.Errorf("%d attempts in ten minutes", n)
		}
		cancel()
		wg.Wait()
	})
}

// An API server says no to everybody until it has read who may do what.
func TestPublisherAfterAShortNo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newMemoryAPI()
		api.fail = apierrors.NewForbidden(metav1.SchemeGroupVersion.WithResource("nodes").GroupResource(), "n1", nil)
		p := publish(t, api, time.Now().Add(-time.Hour))
		p.report(bad())
		time.Sleep(2 * time.Second)
		p.locked(func() { p.fail = nil })
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if c, _ := p.condition(mp); c.Status != "True" {
			t.Errorf("20 seconds after the refusals ended: %+v", c)
		}
	})
}

type counted struct {
	*memoryAPI
	n *atomic.Int32
}

func (c counted) PatchConditions(ctx context.Context, patch func() []byte) (*Node, error) {
	c.n.Add(1)
	return c.memoryAPI.PatchConditions(ctx, patch)
}

func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		down := apierrors.NewServiceUnavailable("x")
		attempts := 0
		for began := time.Now(); time.Since(began) < 10*time.Minute; attempts++ {
			if err := g.enter(t.Context()); err != nil {
				t.Fatal(err)
			}
			g.leave(down, false)
		}
		if attempts > 60 || attempts < 10 {
			t.Errorf("%d attempts in a ten-minute outage", attempts)
		}
		g.enter(t.Context())
		g.leave(nil, false)
		began := time.Now()
		g.enter(t.Context())
		if time.Since(began) != 0 {
			t.Error("after a success nobody waits")
		}
		g.leave(apierrors.NewTooManyRequests("slow down", 120), false)
		began = time.Now()
		g.enter(t.Context())
		if time.Since(began) < 2*time.Minute {
			t.Errorf("Retry-After 120 s, waited %s", time.Since(began))
		}
		g.leave(nil, false)
	})
}

func (a *memoryAPI) writes() (n int) {
	a.locked(func() { n = a.patches })
	return n
}

// What belongs to no condition is told as an Event of its own, once, as data.
func TestPublisherTells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.Tell("Warning", "RemedyFailed", "packages", "told before the first pass, 100% \x1b[31mred")
		synctest.Wait()
		p.report(good())
		p.Tell("Normal", "RemedyStarted", "packages", "install-package: lsscsi")
		synctest.Wait()
		if !slices.Equal(p.order, []string{"Warning/RemedyFailed", "Normal/RemedyStarted"}) {
			t.Errorf("events: %v", p.order)
		}
		for _, body := range p.posted {
			if strings.Contains(body, "\x1b") {
				t.Errorf("a terminal would obey it: %s", body)
			}
		}
		quiet := good()
		quiet.Config.Report.Events = config.Off
		p.report(quiet)
		p.Tell("Normal", "RemedyStarted", "packages", "again")
		synctest.Wait()
		if len(p.order) != 2 {
			t.Errorf("events are off: %v", p.order)
		}
	})
}

// A remark stands in Ready's message and moves no transition time.
func TestPublisherRemarks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		p.report(good())
		before, _ := p.condition(ReadyType)
		time.Sleep(time.Minute)
		for range 3 {
			p.Remark("remedies have stopped")
			synctest.Wait()
		}
		c, _ := p.condition(ReadyType)
		if !strings.HasSuffix(c.Message, "; remedies have stopped") || c.Status != "True" || c.LastTransitionTime != before.LastTransitionTime || p.writes() != 2 {
			t.Errorf("%+v after %d patches", c, p.writes())
		}
		p.Remark("")
		synctest.Wait()
		if c, _ := p.condition(ReadyType); c.Message != before.Message || p.writes() != 3 {
			t.Errorf("%+v after %d patches", c, p.writes())
		}
		if len(p.order) != 0 {
			t.Errorf("events: %v", p.order)
		}
	})
}

// A config that was refused is told of also while Ready has something worse to
// tell, and once.
func TestPublisherTellsOfAConfigBesideACriticalFinding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := publish(t, newMemoryAPI(), time.Now().Add(-time.Hour))
		worse := degraded
		worse.Severity = finding.Critical
		critical := func(mistake string) engine.Snapshot {
			s := snapshot(finding.Report{Probe: "mp", Findings: []finding.Finding{worse}})
			if mistake != "" {
				s.ConfigError = errors.New(mistake)
			}
			return s
		}
		p.report(critical(""))
		for _, mistake := range []string{"no such key", "no such key", "no such unit", "", "no such unit"} {
			p.report(critical(mistake))
			time.Sleep(5 * time.Second)
		}
		synctest.Wait()
		ready, _ := p.condition(ReadyType)
		want := []string{"Warning/PathsDegraded", "Warning/ConfigInvalid", "Warning/ConfigInvalid", "Warning/ConfigInvalid"}
		if ready.Status != "False" || !slices.Equal(p.order, want) {
			t.Errorf("Ready %+v, events %q", ready, p.order)
		}
	})
}
