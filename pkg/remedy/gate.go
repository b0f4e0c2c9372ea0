package remedy

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hosthygiene/agent/pkg/report"
)

// LeaseAPI is all that the agents of a fleet agree by. Updates are conditional
// on the version that was read; errors are the API's own.
type LeaseAPI interface {
	GetLease(ctx context.Context, namespace, name string) (*report.Lease, error)
	CreateLease(ctx context.Context, l *report.Lease) (*report.Lease, error)
	UpdateLease(ctx context.Context, l *report.Lease) (*report.Lease, error)
}

const (
	// Namespace is where the Leases are.
	Namespace = "host-hygiene"
	// slotPrefix and a number from 0 name the Lease of one slot.
	slotPrefix = "host-hygiene-slot-"

	// leaseMargin is how much longer a slot is held than the work in it may
	// take: for the moment between the renewal and the start of the work, and
	// for what is done in between steps.
	leaseMargin = 2 * time.Minute
	// renewEvery is how often a slot is renewed at least.
	renewEvery = 30 * time.Second
	// undatedLease is how long a Lease without a duration is respected: a
	// person has edited it.
	undatedLease = time.Hour
	// leaseTimeout bounds one exchange with the API server, the wait for its
	// back-off included.
	leaseTimeout = time.Minute
	// slotsAtOnce is how many slots one attempt looks at: thousands of nodes
	// that wait for one of many slots must not flood the API server.
	slotsAtOnce = 3
)

// Gate lets at most as many nodes change at once as there are slots. Each slot
// is a Lease whose holder is a node.
//
// A slot may be taken from a holder that is gone, but never while its work may
// still run. So the holder promises, by leaseDurationSeconds, how long its work
// may last from the renewal on; and another node takes the slot only after it
// has watched the Lease stay the same for that long by its own monotonic clock,
// which began later than the promise did. The times that stand in the Lease are
// for people: comparing them with a clock of one's own would let a node whose
// clock is wrong, which is what this agent is about, break in.
type Gate struct {
	api  LeaseAPI
	node string
	log  *slog.Logger

	mu   sync.Mutex
	seen map[string]sighting // by Lease
	next int                 // the slot to look at first
}

// sighting is a Lease as it was first seen like this. CLOCK_MONOTONIC stands
// still while the machine sleeps, which errs on the safe side.
type sighting struct {
	version, holder string
	at              time.Time
}

// NewGate returns the gate as the named node sees it.
func NewGate(api LeaseAPI, node string, log *slog.Logger) *Gate {
	h := fnv.New32a()
	h.Write([]byte(node)) // spread the nodes of a fleet over the slots
	return &Gate{api: api, node: node, log: log, seen: map[string]sighting{}, next: int(h.Sum32() >> 1)}
}

// BusyError says that every slot that was looked at is held.
type BusyError struct{ Holders []string }

func (e *BusyError) Error() string {
	return "other nodes are being changed: " + strings.Join(e.Holders, ", ")
}

func slotName(i int) string { return fmt.Sprintf("%s%d", slotPrefix, i) }

// Enter takes one of the slots for work that takes no longer than d, or fails
// with a [BusyError]. A slot that this node holds already, from before a
// restart, is taken over first. The Pass is renewed until it is released or
// abandoned.
func (g *Gate) Enter(ctx context.Context, slots int, d time.Duration) (*Pass, error) {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	g.mu.Lock()
	defer g.mu.Unlock()
	var busy BusyError
	first := g.next
	for i := range min(slots, slotsAtOnce) {
		name := slotName((first + i) % slots)
		g.next = (first + i) % slots // where the search goes on, or our slot is
		p, holder, err := g.try(ctx, name, d)
		if err != nil {
			return nil, fmt.Errorf("lease %s: %w", name, err)
		}
		if p != nil {
			return p, nil
		}
		busy.Holders = append(busy.Holders, holder)
	}
	g.next = (g.next + 1) % slots
	return nil, &busy
}

// Adopt takes over a slot that an earlier agent of this node still holds, for as
// long as that one asked for. Nil without an error says that there is none.
func (g *Gate) Adopt(ctx context.Context, slots int) (*Pass, error) {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range slots {
		name := slotName(i)
		l, err := g.api.GetLease(ctx, Namespace, name)
		if apierrors.IsNotFound(err) || err == nil && l.Spec.HolderIdentity != g.node {
			continue
		}
		var p *Pass
		if err == nil {
			p, _, err = g.take(ctx, l, time.Duration(l.Spec.LeaseDurationSeconds)*time.Second)
		}
		if err != nil {
			return nil, fmt.Errorf("lease %s: %w", name, err)
		}
		if p != nil {
			return p, nil
		}
	}
	return nil, nil
}

// try takes the slot if it may be taken, and names the holder if not.
func (g *Gate) try(ctx context.Context, name string, d time.Duration) (p *Pass, holder string, err error) {
	l, err := g.api.GetLease(ctx, Namespace, name)
	if apierrors.IsNotFound(err) {
		l = newLease(name)
		l.Spec.HolderIdentity = g.node
		return g.take(ctx, l, d)
	}
	if err != nil {
		return nil, "", err
	}
	if h := l.Spec.HolderIdentity; h != "" && h != g.node && !g.expired(l) {
		return nil, fmt.Sprintf("%s (%s)", h, name), nil
	}
	return g.take(ctx, l, d)
}

// expired remembers when the Lease was first seen as it is, and reports whether
// it has stayed so for as long as its holder asked for.
func (g *Gate) expired(l *report.Lease) bool {
	now := time.Now()
	s, ok := g.seen[l.Metadata.Name]
	if !ok || s.version != l.Metadata.ResourceVersion || s.holder != l.Spec.HolderIdentity {
		g.seen[l.Metadata.Name] = sighting{l.Metadata.ResourceVersion, l.Spec.HolderIdentity, now}
		return false
	}
	d := time.Duration(l.Spec.LeaseDurationSeconds) * time.Second
	if d <= 0 {
		d = undatedLease
	}
	return now.Sub(s.at) > d
}

func newLease(name string) *report.Lease {
	return &report.Lease{Metadata: report.LeaseMetadata{
		Name: name, Namespace: Namespace,
		Labels: map[string]string{"app.kubernetes.io/name": "host-hygiene-agent", "app.kubernetes.io/part-of": "host-hygiene"},
	}}
}

// take writes this node into the Lease. Losing the race for it is being busy.
func (g *Gate) take(ctx context.Context, l *report.Lease, d time.Duration) (*Pass, string, error) {
	if old := l.Spec.HolderIdentity; old != "" && old != g.node {
		g.log.Warn("taking a slot over: its holder has not renewed it", "lease", l.Metadata.Name, "holder", old)
	}
	if l.Spec.HolderIdentity != g.node || l.Metadata.ResourceVersion == "" {
		now := metav1.NowMicro()
		l.Spec.HolderIdentity, l.Spec.AcquireTime = g.node, &now
		if l.Metadata.ResourceVersion != "" {
			l.Spec.LeaseTransitions++
		}
	}
	p := &Pass{gate: g, lease: *l, goal: time.Now().Add(d)}
	err := p.write(ctx)
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return nil, "another node (" + l.Metadata.Name + ", a moment ago)", nil
	}
	if err != nil {
		return nil, "", err
	}
	delete(g.seen, l.Metadata.Name)
	// It outlives the attempt it was made in, and is ended by Release or Abandon.
	keeping, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.stop, p.kept = stop, make(chan struct{})
	go p.keep(keeping)
	return p, "", nil
}

// Pass is a slot that this node holds.
type Pass struct {
	gate *Gate
	stop context.CancelFunc
	kept chan struct{} // closed when keep has ended

	mu    sync.Mutex
	lease report.Lease
	// goal is when the work under way is over at the latest; until is up to when
	// no other node can take the slot. Both are read by the monotonic clock.
	goal, until time.Time
	lost        error
}

// Slot is the name of its Lease.
func (p *Pass) Slot() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lease.Metadata.Name
}

// Cover makes sure, on the API server, that no other node takes the slot before
// work that starts now and takes no longer than d is over.
func (p *Pass) Cover(ctx context.Context, d time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lost != nil {
		return p.lost
	}
	p.goal = time.Now().Add(d)
	if err := p.renew(ctx); err != nil {
		return fmt.Errorf("lease %s: %w", p.lease.Metadata.Name, err)
	}
	// Waiting for the API server takes time too.
	p.goal = time.Now().Add(d)
	if left := time.Until(p.until); left < d {
		return fmt.Errorf("lease %s: it took too long to renew: it covers %s and the step may take %s", p.lease.Metadata.Name, left.Round(time.Second), d)
	}
	return nil
}

// Lost says why the slot is not ours any more; nil while it is. What runs is
// not stopped by it: half an installation is worse than two at once.
func (p *Pass) Lost() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost
}

// Abandon stops renewing and leaves the Lease as it is: work of this node goes
// on without the agent, which is about to end.
func (p *Pass) Abandon() {
	p.stop()
	<-p.kept
}

// Release gives the slot back. Should that fail, it expires by itself.
func (p *Pass) Release(ctx context.Context) error {
	p.Abandon()
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lost != nil {
		return p.lost
	}
	p.lease.Spec.HolderIdentity = ""
	p.lease.Spec.LeaseDurationSeconds = 1
	now := metav1.NowMicro()
	p.lease.Spec.RenewTime = &now
	if _, err := p.gate.api.UpdateLease(ctx, &p.lease); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("lease %s is not given back and expires by itself: %w", p.lease.Metadata.Name, err)
	}
	return nil
}

// keep renews until it is stopped.
func (p *Pass) keep(ctx context.Context) {
	defer close(p.kept)
	for {
		timer := time.NewTimer(renewEvery - rand.N(renewEvery/5))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		once, cancel := context.WithTimeout(ctx, leaseTimeout)
		p.mu.Lock()
		err := p.renew(once)
		lost := p.lost
		p.mu.Unlock()
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case lost != nil:
			p.gate.log.Error("the slot is lost: no further step is begun", "error", lost)
			return
		case err != nil:
			p.gate.log.Warn("the slot is not renewed", "lease", p.Slot(), "error", err)
		}
	}
}

// errLost wraps why a slot is not ours any more.
var errLost = errors.New("the slot is another's now")

// renew writes the Lease anew. When somebody else has written it meanwhile it is
// read again: one that another node has taken is lost; one that was freed or
// deleted is taken back, for the work that it stands for goes on.
func (p *Pass) renew(ctx context.Context) error {
	err := p.write(ctx)
	for range 3 {
		if !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) && !apierrors.IsAlreadyExists(err) {
			return err
		}
		name := p.lease.Metadata.Name
		l, getErr := p.gate.api.GetLease(ctx, Namespace, name)
		if apierrors.IsNotFound(getErr) {
			l, getErr = newLease(name), nil
			l.Spec.AcquireTime = p.lease.Spec.AcquireTime
		}
		if getErr != nil {
			return getErr
		}
		if h := l.Spec.HolderIdentity; h != "" && h != p.gate.node {
			p.lost = fmt.Errorf("%w: lease %s is held by %q", errLost, name, h)
			return p.lost
		}
		l.Spec.HolderIdentity = p.gate.node
		p.lease = *l
		err = p.write(ctx)
	}
	return err
}

// write asks for as long as the work may still take, and the margin.
func (p *Pass) write(ctx context.Context) error {
	now := time.Now()
	wall := metav1.NewMicroTime(now)
	l := p.lease
	d := max(p.goal.Sub(now), 0) + leaseMargin
	l.Spec.LeaseDurationSeconds = int32((d + time.Second - 1) / time.Second)
	l.Spec.RenewTime = &wall
	write := p.gate.api.UpdateLease
	if l.Metadata.ResourceVersion == "" {
		write = p.gate.api.CreateLease
	}
	after, err := write(ctx, &l)
	if err != nil {
		return err
	}
	p.lease = *after
	// The others count from when they see this, which is later than now.
	p.until = now.Add(time.Duration(l.Spec.LeaseDurationSeconds) * time.Second)
	return nil
}
