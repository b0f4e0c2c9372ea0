package remedy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hosthygiene/agent/pkg/report"
)

// memoryLeases has the API server's optimistic concurrency and nothing else;
// test/api proves the same on a real one.
type memoryLeases struct {
	mu      sync.Mutex
	version int
	leases  map[string]report.Lease
	fail    error
	writes  int
}

var leaseResource = schema.GroupResource{Group: "coordination.k8s.io", Resource: "leases"}

func newLeases() *memoryLeases { return &memoryLeases{leases: map[string]report.Lease{}} }

func (m *memoryLeases) GetLease(_ context.Context, namespace, name string) (*report.Lease, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return nil, m.fail
	}
	l, ok := m.leases[namespace+"/"+name]
	if !ok {
		return nil, apierrors.NewNotFound(leaseResource, name)
	}
	l.Metadata.Annotations = maps.Clone(l.Metadata.Annotations)
	return &l, nil
}

func (m *memoryLeases) write(l *report.Lease, exists bool) (*report.Lease, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return nil, m.fail
	}
	old, ok := m.leases[l.Metadata.Namespace+"/"+l.Metadata.Name]
	switch {
	case ok && !exists:
		return nil, apierrors.NewAlreadyExists(leaseResource, l.Metadata.Name)
	case !ok && exists:
		return nil, apierrors.NewNotFound(leaseResource, l.Metadata.Name)
	case ok && old.Metadata.ResourceVersion != l.Metadata.ResourceVersion:
		return nil, apierrors.NewConflict(leaseResource, l.Metadata.Name, errors.New("it was changed"))
	}
	m.version++
	m.writes++
	after := *l
	after.Metadata.Annotations = maps.Clone(l.Metadata.Annotations)
	after.Metadata.ResourceVersion = strconv.Itoa(m.version)
	m.leases[l.Metadata.Namespace+"/"+l.Metadata.Name] = after
	return &after, nil
}

func (m *memoryLeases) CreateLease(_ context.Context, l *report.Lease) (*report.Lease, error) {
	return m.write(l, false)
}

func (m *memoryLeases) UpdateLease(_ context.Context, l *report.Lease) (*report.Lease, error) {
	return m.write(l, true)
}

func (m *memoryLeases) setFail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

func (m *memoryLeases) get(name string) report.Lease {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.leases[Namespace+"/"+name]
}

func gateOf(api LeaseAPI, node string) *Gate {
	return NewGate(api, node, slog.New(slog.DiscardHandler))
}

func enter(t *testing.T, g *Gate, slots int, d time.Duration) *Pass {
	t.Helper()
	p, err := g.Enter(t.Context(), slots, d)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func isBusy(err error) bool {
	var busy *BusyError
	return errors.As(err, &busy)
}

// mustBeBusy also lets the node watch the Lease.
func mustBeBusy(t *testing.T, g *Gate) {
	t.Helper()
	if p, err := g.Enter(t.Context(), 1, time.Minute); !isBusy(err) {
		t.Fatalf("pass %v, error %v: want the slot to be held", p, err)
	}
}

func TestGateOneAfterTheOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newLeases()
		n1, n2 := gateOf(api, "n1"), gateOf(api, "n2")
		p := enter(t, n1, 1, 10*time.Minute)
		l := api.get(p.Slot())
		if l.Metadata.Name != "host-hygiene-slot-0" || l.Spec.HolderIdentity != "n1" || l.Spec.AcquireTime == nil {
			t.Errorf("%+v", l)
		}
		if d := time.Duration(l.Spec.LeaseDurationSeconds) * time.Second; d < 10*time.Minute {
			t.Errorf("held for %s: less than the work may take", d)
		}
		_, err := n2.Enter(t.Context(), 1, time.Minute)
		if !isBusy(err) || !strings.Contains(err.Error(), "n1") {
			t.Errorf("want to be told who holds it: %v", err)
		}
		if err := p.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		q := enter(t, n2, 1, time.Minute)
		if l := api.get(q.Slot()); l.Spec.HolderIdentity != "n2" || l.Spec.LeaseTransitions != 1 {
			t.Errorf("%+v", l)
		}
		q.Abandon()
	})
}

// A holder that renews is never taken over, however long its work takes.
func TestGateRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newLeases()
		p := enter(t, gateOf(api, "n1"), 1, 5*time.Minute)
		n2 := gateOf(api, "n2")
		for range 200 {
			time.Sleep(17 * time.Second)
			mustBeBusy(t, n2)
		}
		if err := p.Lost(); err != nil {
			t.Error(err)
		}
		// What is promised shrinks with what is left to do.
		if d := api.get(p.Slot()).Spec.LeaseDurationSeconds; d != int32(leaseMargin/time.Second) {
			t.Errorf("long after its deadline the slot is held for %d s", d)
		}
		p.Abandon()
	})
}

// The work of an agent that is dead still runs: the slot is free only when its
// hard deadline has passed, and by the watcher's own clock.
func TestGateTakeOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newLeases()
		began := time.Now()
		p := enter(t, gateOf(api, "n1"), 1, 10*time.Minute)
		p.Abandon() // as SIGKILL does
		n2 := gateOf(api, "n2")
		for {
			q, err := n2.Enter(t.Context(), 1, time.Minute)
			if err == nil {
				took := time.Since(began)
				if took < 10*time.Minute || took > 13*time.Minute {
					t.Errorf("taken over after %s", took)
				}
				if l := api.get(q.Slot()); l.Spec.HolderIdentity != "n2" || l.Spec.LeaseTransitions != 1 {
					t.Errorf("%+v", l)
				}
				q.Abandon()
				return
			}
			if !isBusy(err) {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Second)
		}
	})
}

// What the times in the Lease say does not matter: the holder's clock may be
// years behind, or the watcher's.
func TestGateComparesNoClocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newLeases()
		enter(t, gateOf(api, "n1"), 1, 10*time.Minute).Abandon()
		api.mu.Lock()
		l := api.leases[Namespace+"/host-hygiene-slot-0"]
		old := *l.Spec.RenewTime
		old.Time = old.AddDate(-3, 0, 0)
		l.Spec.RenewTime, l.Spec.AcquireTime = &old, &old
		api.leases[Namespace+"/host-hygiene-slot-0"] = l
		api.mu.Unlock()
		n2 := gateOf(api, "n2")
		mustBeBusy(t, n2)
		time.Sleep(11 * time.Minute)
		mustBeBusy(t, n2)
		time.Sleep(2 * time.Minute)
		enter(t, n2, 1, time.Minute).Abandon()
	})
}

// Looking once, an hour after the last renewal, proves nothing: the one before
// may be renewed in the next second.
func TestGateFirstSightIsNoExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newLeases()
		enter(t, gateOf(api, "n1"), 1, time.Minute).Abandon()
		time.Sleep(time.Hour)
		mustBeBusy(t, gateOf(api, "n2"))
	})
}

// A renewal between two looks starts the wait anew.
func TestGateRenewalSeenLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newLeases()
		n1, n2 := gateOf(api, "n1"), gateOf(api, "n2")
		p := enter(t, n1, 1, 0)
		mustBeBusy(t, n2)
		time.Sleep(leaseMargin - time.Second)
		p.Abandon()
		time.Sleep(10 * time.Second)
		mustBeBusy(t, n2)
		time.Sleep(leaseMargin)
		mustBeBusy(t, n2) // exactly as long is not longer
		time.Sleep(time.Second)
		enter(t, n2, 1, 0).Abandon()
	})
}

func TestGateAdopt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newLeases()
		enter(t, gateOf(api, "n1"), 3, 10*time.Minute).Abandon()
		again := gateOf(api, "n1")
		p, err := again.Adopt(t.Context(), 3)
		if err != nil || p == nil {
			t.Fatalf("pass %v, error %v", p, err)
		}
		if l := api.get(p.Slot()); l.Spec.LeaseTransitions != 0 {
			t.Errorf("keeping the slot is no transition: %+v", l)
		}
		if d := api.get(p.Slot()).Spec.LeaseDurationSeconds; d < 10*60 {
			t.Errorf("adopted for %d s: less than what was begun may take", d)
		}
		p.Abandon()
		if p, err := gateOf(api, "n2").Adopt(t.Context(), 3); p != nil || err != nil {
			t.Errorf("another's slot was adopted: %v, %v", p, err)
		}
	})
}

// A step begins only when the API server has heard how long it may take.
func TestGateCover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newLeases()
		n2 := gateOf(api, "n2")
		p := enter(t, gateOf(api, "n1"), 1, time.Minute)
		if err := p.Cover(t.Context(), 30*time.Minute); err != nil {
			t.Fatal(err)
		}
		if d := api.get(p.Slot()).Spec.LeaseDurationSeconds; d < 30*60 {
			t.Errorf("covers %d s", d)
		}
		api.setFail(errors.New("connection refused"))
		if err := p.Cover(t.Context(), 30*time.Minute); err == nil {
			t.Error("covered in an outage")
		}
		// An outage of any length loses nothing by itself.
		time.Sleep(20 * time.Minute)
		api.setFail(nil)
		mustBeBusy(t, n2)
		if err := p.Cover(t.Context(), time.Minute); err != nil {
			t.Error(err)
		}
		// Somebody who edits the Lease and leaves the holder takes nothing.
		api.mu.Lock()
		l := api.leases[Namespace+"/"+"host-hygiene-slot-0"]
		api.version++
		l.Metadata.ResourceVersion = strconv.Itoa(api.version)
		api.leases[Namespace+"/"+"host-hygiene-slot-0"] = l
		api.mu.Unlock()
		if err := p.Cover(t.Context(), time.Minute); err != nil {
			t.Error(err)
		}
		// Nor does somebody who frees or deletes it: the work goes on.
		l = api.get(p.Slot())
		l.Spec.HolderIdentity = ""
		if _, err := api.UpdateLease(t.Context(), &l); err != nil {
			t.Fatal(err)
		}
		time.Sleep(renewEvery)
		synctest.Wait()
		mustBeBusy(t, n2)
		api.mu.Lock()
		delete(api.leases, Namespace+"/host-hygiene-slot-0")
		api.mu.Unlock()
		time.Sleep(renewEvery)
		synctest.Wait()
		mustBeBusy(t, n2)
		if err := p.Cover(t.Context(), time.Minute); err != nil {
			t.Error(err)
		}
		// A person gave it away.
		l = api.get(p.Slot())
		l.Spec.HolderIdentity = "n3"
		if _, err := api.UpdateLease(t.Context(), &l); err != nil {
			t.Fatal(err)
		}
		if err := p.Cover(t.Context(), time.Minute); !errors.Is(err, errLost) {
			t.Errorf("want to be told that it is lost: %v", err)
		}
		if err := p.Release(t.Context()); !errors.Is(err, errLost) {
			t.Errorf("what is lost can not be given back: %v", err)
		}
		if h := api.get(p.Slot()).Spec.HolderIdentity; h != "n3" {
			t.Errorf("held by %q", h)
		}
	})
}

// Many nodes at once: never more of them inside than there are slots, and all
// of them come in.
func TestGateRace(t *testing.T) {
	for _, slots := range []int{1, 2, 5} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				api := newLeases()
				var mu sync.Mutex
				inside, most := 0, 0
				var all sync.WaitGroup
				for n := range 20 {
					g := gateOf(api, fmt.Sprint("n", n))
					all.Go(func() {
						for {
							p, err := g.Enter(t.Context(), slots, time.Minute)
							if isBusy(err) {
								time.Sleep(time.Second)
								continue
							}
							if err != nil {
								t.Error(err)
								return
							}
							mu.Lock()
							inside++
							most = max(most, inside)
							mu.Unlock()
							time.Sleep(90 * time.Second)
							mu.Lock()
							inside--
							mu.Unlock()
							if err := p.Release(t.Context()); err != nil {
								t.Error(err)
							}
							return
						}
					})
				}
				all.Wait()
				if most != slots {
					t.Errorf("%d nodes at once in %d slots", most, slots)
				}
			})
		})
	}
}

// The whole fleet stops at the budget, until a person clears it.
func TestFailures(t *testing.T) {
	api := newLeases()
	ctx := t.Context()
	n1, n2 := gateOf(api, "n1"), gateOf(api, "n2")
	if f, err := n1.Failures(ctx); err != nil || f.Count != 0 {
		t.Fatalf("%+v, %v", f, err)
	}
	for _, step := range []string{"packages-1", "packages-1", "modules-2"} {
		if err := n1.CountFailure(ctx, Failure{Step: step, Message: "exit 100:\n\tE: Unable to locate package " + strings.Repeat("é", 300)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := n2.CountFailure(ctx, Failure{Step: "packages-1"}); err != nil {
		t.Fatal(err)
	}
	f, err := n2.Failures(ctx)
	if err != nil || f.Count != 3 || len(f.Latest) != 3 {
		t.Fatalf("one step that fails twice on one node counts once: %+v, %v", f, err)
	}
	if last := f.Latest[2]; last.Node != "n2" || last.Step != "packages-1" {
		t.Errorf("%+v", last)
	}
	if m := f.Latest[0].Message; len(m) > failureText || !strings.HasPrefix(m, "exit 100: E: Unable") || strings.ToValidUTF8(m, "?") != m {
		t.Errorf("message %q", m)
	}
	were, cleared, err := Resume(ctx, api)
	if err != nil || were.Count != 3 || !cleared {
		t.Errorf("cleared %+v, %v", were, err)
	}
	if f, err := n1.Failures(ctx); err != nil || f.Count != 0 || len(f.Latest) != 0 {
		t.Errorf("%+v, %v", f, err)
	}
	writes := api.writes
	if were, cleared, err := Resume(ctx, api); err != nil || cleared || were.Count != 0 || api.writes != writes {
		t.Errorf("clearing nothing: %+v, %v, %d writes", were, err, api.writes-writes)
	}
}

func TestFailuresFromManyNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newLeases()
		var all sync.WaitGroup
		for n := range 50 {
			all.Go(func() {
				if err := gateOf(api, fmt.Sprint("n", n)).CountFailure(t.Context(), Failure{Step: "packages-1"}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		f, err := gateOf(api, "n0").Failures(t.Context())
		if err != nil || f.Count != 50 || len(f.Latest) != failuresKept {
			t.Errorf("count %d, %d kept, %v", f.Count, len(f.Latest), err)
		}
	})
}

// A count that can not be read is not zero.
func TestFailuresUnreadable(t *testing.T) {
	api := newLeases()
	l := newLease(failuresLease)
	l.Metadata.Annotations = map[string]string{AnnotationFailures: "many"}
	if _, err := api.CreateLease(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	g := gateOf(api, "n1")
	if f, err := g.Failures(t.Context()); err == nil {
		t.Errorf("read as %+v", f)
	}
	if err := g.CountFailure(t.Context(), Failure{Step: "x"}); err == nil {
		t.Error("counted on top of what can not be read")
	}
	if _, cleared, err := Resume(t.Context(), api); err != nil || !cleared {
		t.Error(err)
	}
	if f, err := g.Failures(t.Context()); err != nil || f.Count != 0 {
		t.Errorf("%+v, %v", f, err)
	}
	api.setFail(errors.New("connection refused"))
	if f, err := g.Failures(t.Context()); err == nil {
		t.Errorf("in an outage: %+v", f)
	}
}
