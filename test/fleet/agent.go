package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"

	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/report"
)

const timeProblem = probes.ConditionPrefix + "TimeProblem"

// userAgent tells the agents' requests from those that only prepare for them.
const userAgent = "host-hygiene-agent/fleet"

// agent is an agent without a host: the project's own client and publisher on a
// connection of their own, given snapshots as often as the engine gives them.
type agent struct {
	fleet  *fleet
	name   string
	number int
	token  string

	// life is what ends with the process of a real agent.
	life *life

	mu      sync.Mutex
	faulty  bool
	since   time.Time // when it became so
	pending bool      // and the API server has not said so yet
	changed chan struct{}
}

type life struct {
	publisher *report.Publisher
	began     time.Time
	cancel    context.CancelFunc
	running   sync.WaitGroup
	mu        sync.Mutex
	conns     []net.Conn
}

// start starts an agent as its pod would: what it told before is in the API
// server alone.
func (a *agent) start() {
	l := &life{began: time.Now()}
	a.life = l
	var ctx context.Context
	ctx, l.cancel = context.WithCancel(context.Background())
	c := rest.CopyConfig(&a.fleet.address)
	c.BearerToken = a.token
	c.UserAgent = userAgent
	c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		a.fleet.record.Load().dialed()
		d := net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
		conn, err := d.DialContext(ctx, network, address)
		if err == nil {
			l.mu.Lock()
			l.conns = append(l.conns, conn)
			l.mu.Unlock()
		}
		return conn, err
	}
	c.WrapTransport = func(next http.RoundTripper) http.RoundTripper { return noting{next, a.fleet, ctx} }
	api, err := report.NewAPI(a.name, c)
	if err != nil {
		panic(err) // the address is the rig's own
	}
	l.publisher = report.NewPublisher(acknowledged{api, a}, a.name, a.fleet.boot, slog.New(slog.DiscardHandler), nil)
	l.running.Go(func() { l.publisher.Run(ctx) })
	l.running.Go(func() { a.feed(ctx, l.publisher) })
	l.running.Go(func() {
		select {
		case <-l.publisher.Reported():
			a.fleet.record.Load().reportedAfter(time.Since(l.began))
		case <-ctx.Done():
		}
	})
}

// stop ends the agent as a signal does: the kernel closes its connections.
func (a *agent) stop() {
	if a.life == nil {
		return
	}
	a.life.cancel()
	a.life.running.Wait()
	a.life.mu.Lock()
	defer a.life.mu.Unlock()
	for _, c := range a.life.conns {
		c.Close() // closed already where the client gave it up
	}
	a.life = nil
}

func (a *agent) waitReported(ctx context.Context, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case <-a.life.publisher.Reported():
		return true
	case <-ctx.Done():
		return false
	}
}

// flip makes the node's clock bad, or good again.
func (a *agent) flip() {
	a.mu.Lock()
	a.faulty, a.since, a.pending = !a.faulty, time.Now(), true
	a.mu.Unlock()
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

// feed stands for the engine: a first pass whose probes come in one by one, then
// every probe once a minute, and at once what happens to the clock. Numbers move
// in every snapshot: that the API server hears nothing of it is the publisher's
// doing.
func (a *agent) feed(ctx context.Context, p *report.Publisher) {
	known, giveUp := context.WithTimeout(ctx, 5*time.Second)
	p.WaitKnown(known)
	giveUp()
	for ran := 1; ctx.Err() == nil; ran++ {
		s := a.snapshot(ran)
		p.Report(s)
		interval := time.Duration(a.fleet.sections.Interval) / time.Duration(len(s.Probes))
		if !s.Complete {
			interval = a.fleet.pass
		}
		timer := time.NewTimer(interval*3/4 + rand.N(interval/2+1))
		select {
		case <-timer.C:
		case <-a.changed:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// snapshot is what the engine would report after so many runs of probes.
func (a *agent) snapshot(ran int) engine.Snapshot {
	a.mu.Lock()
	faulty := a.faulty
	a.mu.Unlock()
	list := a.fleet.sections.Probes.List()
	s := engine.Snapshot{Config: a.fleet.sections, Probes: list, Complete: ran >= len(list)}
	for i, p := range list[:min(ran, len(list))] {
		r := finding.Report{Probe: p.Name(), Condition: p.Condition(), Started: time.Now(), Duration: 4 * time.Millisecond,
			Summary: fmt.Sprintf(summaries[i%len(summaries)], (a.number+ran)%97)}
		if faulty && p.Condition() == timeProblem {
			// Critical, so that Ready changes with it: the dearest of patches.
			r.Findings = []finding.Finding{{Reason: "ClockUnsynchronized", Severity: finding.Critical, Subject: "chronyd", Since: a.since,
				Message:  fmt.Sprintf("chronyd is not synchronised, and the kernel's error bound is %d ms", 16000+ran),
				Evidence: []finding.Evidence{{Source: "adjtimex(2)", Observed: "STA_UNSYNC", Expected: "synchronised"}}}}
		}
		r.Status = finding.StatusOf(finding.Result{Findings: r.Findings}, nil)
		s.Reports = append(s.Reports, r)
	}
	return s
}

// summaries are as long as those of the probes on a storage node.
var summaries = []string{
	"chronyd follows 192.0.2.123 (stratum 2), offset 0.%03d ms, error bound 4.2 ms",
	"%d disks and 61 file systems, none read-only, 2 required devices present and mounted",
	"12 maps with 4 of 4 paths each, multipathd answers in %d ms",
	"%d sessions logged in, initiator name set, kernel modules loaded",
	"%d of 131072 process ids used by the node, 2048 reserved",
	"%d protected processes keep their score, no OOM kill in 10m0s",
	"%d required packages installed, the package database is not locked",
	"%d required units active and enabled",
	"%d kernel messages since boot, none of a fault",
}

// acknowledged notes when the API server has said what the agent wants it to.
type acknowledged struct {
	*report.API
	agent *agent
}

func (k acknowledged) PatchConditions(ctx context.Context, patch func() []byte) (*report.Node, error) {
	n, err := k.API.PatchConditions(ctx, patch)
	if err != nil || n == nil {
		return n, err
	}
	a := k.agent
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.pending && statusOf(n, timeProblem) == map[bool]string{true: "True", false: "False"}[a.faulty] {
		a.pending = false
		a.fleet.record.Load().toldAfter(time.Since(a.since))
	}
	return n, nil
}

func statusOf(n *report.Node, condition string) string {
	for _, c := range n.Status.Conditions {
		if c.Type == condition {
			return c.Status
		}
	}
	return ""
}

func denied(err error) bool { return apierrors.IsInvalid(err) || apierrors.IsForbidden(err) }

// noting notes every request as it goes over the wire.
type noting struct {
	next  http.RoundTripper
	fleet *fleet
	life  context.Context
}

func (n noting) RoundTrip(req *http.Request) (*http.Response, error) {
	began := time.Now()
	resp, err := n.next.RoundTrip(req)
	if n.life.Err() != nil && errors.Is(err, context.Canceled) {
		return resp, err // the agent was stopped meanwhile
	}
	code := 0
	if err == nil {
		code = resp.StatusCode
	}
	n.fleet.record.Load().note(kindOf(req), code, time.Since(began))
	return resp, err
}

func kindOf(req *http.Request) string {
	switch {
	case req.Method == http.MethodPatch:
		return "patch"
	case req.Method == http.MethodPost:
		return "event"
	case req.URL.Query().Get("watch") != "":
		return "watch"
	default:
		return "list"
	}
}
