// Package engine runs the probes: each on its own jittered interval, with a
// deadline, never overlapping itself, a panic or a timeout turned into Unknown.
// After every run it hands each reporter the whole latest result, so that
// reporters need no memory of what changed and clearing needs no code.
package engine

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// Snapshot is everything there is to report at one moment.
type Snapshot struct {
	// Config is what is in force; Reports are in its probes' order and hold an
	// entry for each probe that is on and has run at least once.
	Config  *config.Sections
	Reports []finding.Report
	// Probes are those that are on, in order.
	Probes []probes.Probe
	// Complete is true once every probe that is on has run since the start.
	Complete bool
	// ConfigError is why the config on disk is not the one in force; nil when
	// it is.
	ConfigError error
	// Quiet names why problems are not told at present ("systemd is starting
	// up"); empty otherwise. Reports are not to be published then.
	Quiet string
	// Runs counts the runs of each probe by how they ended.
	Runs map[RunKey]int
	// LastSuccess is when each probe last ran without an error.
	LastSuccess map[string]time.Time
}

// RunKey is a probe and how a run of it ended: "ok", "error", "timeout", "panic".
type RunKey struct{ Probe, Result string }

// Reporter turns a snapshot into one medium. Report must not block: it is
// called from the engine's only loop. The snapshot is shared and read-only.
type Reporter interface{ Report(Snapshot) }

// Engine runs the probes of one host.
type Engine struct {
	view      host.View
	log       *slog.Logger
	reporters []Reporter
	// prior tells whether a condition already said Problem before this start.
	prior func(condition string) bool
	// Annotate, if set before Run, adds to a finding what is known of it besides:
	// how its remedy failed. It is called from the engine's only loop.
	Annotate func(probe string, f finding.Finding) finding.Finding
	// Cluster, if set before Run, is what probes can know of the cluster.
	Cluster probes.Cluster
	// list is what runs; tests replace it.
	list func(*config.Sections) []probes.Probe

	configs  chan configChange
	finished chan done
	freed    chan string
	wakes    chan string
	quiets   chan string
	pokes    chan struct{}

	made  time.Time
	poked atomic.Int64 // nanoseconds after made; 0: no poke is unanswered
}

type configChange struct {
	cfg *config.Sections
	err error
}

type done struct {
	probe probes.Probe
	gen   int
	outcome
}

// New returns an engine that has not started. prior may be nil.
func New(view host.View, log *slog.Logger, prior func(condition string) bool, reporters ...Reporter) *Engine {
	if prior == nil {
		prior = func(string) bool { return false }
	}
	return &Engine{
		view: view, log: log, reporters: reporters, prior: prior, list: listOn,
		configs: make(chan configChange), finished: make(chan done),
		freed: make(chan string), wakes: make(chan string), quiets: make(chan string),
		pokes: make(chan struct{}, 1), made: time.Now(),
	}
}

func listOn(cfg *config.Sections) []probes.Probe {
	return slices.DeleteFunc(cfg.Probes.List(), func(p probes.Probe) bool { return !p.General().On() })
}

// Configure puts a config into force. With a nil cfg the one in force stays and
// err says why the new one was refused.
func (e *Engine) Configure(ctx context.Context, cfg *config.Sections, err error) {
	select {
	case e.configs <- configChange{cfg, err}:
	case <-ctx.Done():
	}
}

// Wake asks for a run of a probe now instead of at its interval. It is only a
// hint: at most one run a second comes of it, and the probe reads the level.
func (e *Engine) Wake(ctx context.Context, probe string) {
	select {
	case e.wakes <- probe:
	case <-ctx.Done():
	}
}

// Stalled pokes the loop and returns for how long it has left a poke unanswered,
// 0 for a loop that came round since the last call. Liveness is judged by it and
// not by the probes, because restarting the agent frees no stuck thread; and the
// loop of an idle agent has nothing to do but to answer.
func (e *Engine) Stalled() time.Duration {
	now := time.Since(e.made)
	since := time.Duration(e.poked.Load())
	if since == 0 {
		e.poked.Store(int64(max(now, 1)))
	}
	select {
	case e.pokes <- struct{}{}:
	default:
	}
	if since == 0 {
		return 0
	}
	return now - since
}

// slot is the state of one probe in the loop.
type slot struct {
	probe   probes.Probe
	memory  *probes.Memory
	holds   *holds
	next    time.Time
	woken   bool      // next is because of an event or a hold, and not of the interval
	last    time.Time // when the latest run began
	debt    debt      // of time, for having run because of that
	owes    bool      // the latest run adds to it
	gen     int       // of the run that is awaited
	running bool      // its goroutine has not come back
	stuck   bool      // and its deadline has passed
	report  *finding.Report
	raw     outcome
}

const (
	// idle is how long the loop sleeps when nothing is due.
	idle = time.Hour
	// minGap is the least time between two runs of one probe.
	minGap = time.Second
	// bootGrace ends the quiet of a start-up that never finishes because one
	// unit hangs.
	bootGrace = 10 * time.Minute
)

// debt keeps what wakes a probe all the time from taking the host's processor: a
// run costs share times its duration, the passing of time pays that off, and
// while more than credit is owed a probe that is woken waits. The first runs
// after a quiet time are thus a second apart, until they have taken three seconds
// together, and those of a storm that lasts take a twentieth of one processor, on
// a host however large. The time is the clock's, for most of a run may be work
// that systemd or multipathd does for it; so a host that is slow at the moment
// needs the credit for a few runs: one fault announces itself several times.
// Runs at the interval, which is the user's choice, cost nothing here.
type debt struct {
	owed time.Duration
	at   time.Time
}

const (
	share  = 20
	credit = time.Minute
	// maxGap keeps a probe that waits long, for a daemon that does not answer,
	// from being taken for one that works long.
	maxGap = 10 * time.Second
)

func (d *debt) add(took time.Duration, now time.Time) {
	d.owed = max(d.owed-now.Sub(d.at), 0) + share*min(took, time.Minute)
	d.owed = min(d.owed, credit+maxGap)
	d.at = now
}

// gap is how long after the last run the next one may begin.
func (d *debt) gap() time.Duration { return max(minGap, d.owed-credit) }

type loop struct {
	*Engine
	ctx         context.Context
	cfg         *config.Sections
	configErr   error
	slots       map[string]*slot
	runs        map[RunKey]int
	lastSuccess map[string]time.Time
	quiet       string
	asking      bool
	askAgain    bool      // what is asked was asked too early
	askedAt     time.Time // when last
	unpublished time.Time // since when a change waits for the answer; zero for none
	unchanged   time.Time // since when results that change nothing wait for others; zero for none
}

// Run runs until ctx ends. The first thing it needs is a config from Configure.
func (e *Engine) Run(ctx context.Context) {
	l := &loop{
		Engine: e, ctx: ctx, slots: map[string]*slot{},
		runs: map[RunKey]int{}, lastSuccess: map[string]time.Time{},
		quiet: "systemd has not been asked yet",
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	l.ask()
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.pokes:
			e.poked.Store(0)
		case c := <-e.configs:
			l.configure(c)
		case d := <-e.finished:
			l.finish(d)
		case name := <-e.freed:
			if s := l.slots[name]; s != nil {
				s.running, s.stuck = false, false
			}
		case name := <-e.wakes:
			if s := l.slots[name]; s != nil {
				if at := later(time.Now(), s.last.Add(s.debt.gap())); at.Before(s.next) {
					s.next, s.woken = at, true
				}
			}
		case quiet := <-e.quiets:
			l.answered(quiet)
		case <-timer.C:
		}
		if l.quiet != "" && time.Since(l.askedAt) >= minGap {
			l.ask()
		}
		wait := l.startDue()
		if !l.unchanged.IsZero() {
			if left := togetherFor - time.Since(l.unchanged); left > 0 && l.underway() {
				wait = min(wait, left)
			} else {
				l.publish()
			}
		}
		timer.Reset(wait)
	}
}

// togetherFor is how long a result that changes nothing waits for those of the
// same pass, so that reporters are given one snapshot and not eleven.
const togetherFor = time.Second

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (l *loop) configure(c configChange) {
	l.configErr = c.err
	if c.cfg != nil {
		l.cfg = c.cfg
		on := map[string]bool{}
		for _, p := range l.list(c.cfg) {
			on[p.Name()] = true
			s := l.slots[p.Name()]
			if s == nil {
				s = &slot{memory: probes.NewMemory(), holds: newHolds(p)}
				l.slots[p.Name()] = s
			}
			s.probe = p
			// New settings may change any answer: look again now, all at once
			// being fine for one node.
			s.next = time.Now()
		}
		for name, s := range l.slots {
			if !on[name] {
				delete(l.slots, name)
				s.gen++
			}
		}
	}
	l.publish()
}

// startDue starts what is due and returns how long to sleep.
func (l *loop) startDue() time.Duration {
	wait := idle
	if l.quiet != "" {
		wait = minGap // to ask again
	}
	now := time.Now()
	due := func(s *slot) time.Duration { return s.next.Sub(now) } // monotonic: a stepped clock moves nothing
	// The passes are those of the probes that look most often.
	shortest := time.Duration(math.MaxInt64)
	for _, s := range l.slots {
		shortest = min(shortest, l.every(s))
	}
	pass := false
	for _, s := range l.slots {
		pass = pass || !s.running && !s.woken && due(s) <= 0 && l.every(s) < 2*shortest
	}
	for _, s := range l.slots {
		if s.running {
			continue
		}
		d := due(s)
		switch {
		case s.woken: // goes alone, for it is in a hurry
		case pass:
			// Those that would follow go with it: together they read the process
			// table once, and wake the processor once.
			d -= shortest / 2
		case l.every(s) >= 2*shortest:
			d += shortest // one that looks rarely goes with the pass that follows
		}
		if d > 0 {
			wait = min(wait, d)
			continue
		}
		l.start(s, now)
	}
	return wait
}

// every is how often a probe is to look. One that looks rarely does so while all is
// well: what ends a problem, or lets it see again, need not be announced as what
// began it was.
func (l *loop) every(s *slot) time.Duration {
	if s.report != nil && (s.report.Err != nil || s.report.Status == finding.Problem) && s.probe.General().Interval == 0 {
		return l.cfg.Interval.D()
	}
	return l.cfg.IntervalFor(s.probe)
}

// jittered is an interval with 10 % of jitter, which keeps the probes of one node, and
// the nodes of a fleet whose agents started together, apart.
func jittered(every time.Duration) time.Duration {
	return every - every/20 + rand.N(max(every/10, 1))
}

func (l *loop) start(s *slot, now time.Time) {
	every := l.every(s)
	s.next = now.Add(jittered(every))
	if s.woken {
		// Back into the pass of the others, and not into one of its own.
		for _, o := range l.slots {
			if o != s && !o.woken && !o.running && o.next.After(now) && o.next.Before(s.next) && l.every(o) == every {
				s.next = o.next
			}
		}
	}
	s.last, s.owes, s.woken = now, s.woken, false
	s.running = true
	s.gen++
	in := probes.Input{Host: l.view, Now: now, Require: l.cfg.Require, Cluster: l.Cluster, Memory: s.memory}
	p, gen, ctx := s.probe, s.gen, l.ctx
	asOf := host.AsOf(ctx, now)
	go func() {
		send := func(d done) {
			select {
			case l.finished <- d:
			case <-ctx.Done():
			}
		}
		back := make(chan struct{})
		o := run(asOf, p, in, Deadline, nil, func() { close(back) })
		send(done{p, gen, o})
		select {
		case <-back:
		case <-ctx.Done():
			return
		}
		select {
		case l.freed <- p.Name():
		case <-ctx.Done():
		}
	}()
}

func (l *loop) finish(d done) {
	s := l.slots[d.probe.Name()]
	if s == nil || s.gen != d.gen {
		return // switched off meanwhile
	}
	result := "ok"
	switch {
	case d.panicked:
		result = "panic"
	case d.timedOut:
		result = "timeout"
	case d.err != nil:
		result = "error"
	}
	l.runs[RunKey{d.probe.Name(), result}]++
	if d.err == nil {
		l.lastSuccess[d.probe.Name()] = time.Now()
	}
	s.stuck = errors.Is(d.err, errStuck)
	s.raw = d.outcome
	if s.owes {
		s.debt.add(d.took, time.Now())
	}
	before := l.every(s)
	changed := l.judge(s)
	if every := l.every(s); every < before {
		if at := s.last.Add(jittered(every)); at.Before(s.next) {
			s.next = at
		}
	}
	if changed || l.quiet != "" {
		// Whether it may be told must be known as of now: at a shutdown systemd
		// says that it stops before it stops the first unit.
		if l.unpublished.IsZero() {
			l.unpublished = time.Now()
		}
		l.ask()
		return
	}
	if l.unchanged.IsZero() {
		l.unchanged = time.Now()
	}
}

// underway reports whether a run is to come to its end soon.
func (l *loop) underway() bool {
	for _, s := range l.slots {
		if s.running && !s.stuck {
			return true
		}
	}
	return false
}

// judge applies severities, mutes and holds to the latest outcome of a probe, and
// reports whether there is something new to tell.
func (l *loop) judge(s *slot) (changed bool) {
	now := time.Now()
	r := report(s.probe, l.cfg, s.raw, now)
	prior := s.report == nil && l.prior(s.probe.Condition())
	told, again := s.holds.filter(l.cfg, r.Findings, now, prior)
	for _, f := range r.Findings {
		if !slices.ContainsFunc(told, func(t finding.Finding) bool { return t.Key() == f.Key() }) {
			r.Held++
		}
	}
	if l.Annotate != nil {
		for i, f := range told {
			told[i] = l.Annotate(r.Probe, f)
		}
	}
	r.Findings = told
	r.Status = finding.StatusOf(finding.Result{Findings: told, NotApplicable: s.raw.result.NotApplicable}, s.raw.err)
	before := s.report
	if before == nil || before.Status != r.Status {
		attrs := []any{"probe", r.Probe, "status", string(r.Status), "summary", r.Summary}
		if worst, ok := finding.Worst(told); ok {
			attrs = append(attrs, "worst", worst.String())
		}
		if r.Err != nil {
			attrs = append(attrs, "error", r.Err)
		}
		l.log.Info("status", attrs...)
	}
	s.report = &r
	if again > 0 {
		if at := now.Add(max(again, minGap)); at.Before(s.next) {
			s.next, s.woken = at, true
		}
	}
	return before == nil || before.Status != r.Status || !slices.EqualFunc(before.Findings, r.Findings, func(a, b finding.Finding) bool {
		return a.Key() == b.Key() && a.Severity == b.Severity && a.Counts() == b.Counts()
	})
}

// publish hands every reporter the whole state.
func (l *loop) publish() {
	if l.cfg == nil {
		return
	}
	snap := Snapshot{
		Config: l.cfg, ConfigError: l.configErr, Complete: true, Quiet: l.quiet,
		Runs: map[RunKey]int{}, LastSuccess: map[string]time.Time{},
	}
	for _, p := range l.list(l.cfg) {
		snap.Probes = append(snap.Probes, p)
		s := l.slots[p.Name()]
		if s.report == nil {
			snap.Complete = false
			continue
		}
		r := *s.report
		r.Findings = slices.Clone(r.Findings)
		snap.Reports = append(snap.Reports, r)
	}
	for k, n := range l.runs {
		snap.Runs[k] = n
	}
	for k, t := range l.lastSuccess {
		snap.LastSuccess[k] = t
	}
	l.unpublished, l.unchanged = time.Time{}, time.Time{}
	for _, r := range l.reporters {
		r.Report(snap)
	}
}

// ask asks systemd whether it is starting up or shutting down: what follows from
// that is not a finding. It never waits: a stopped bus must not hold up the loop,
// and the answer comes back as an event of its own. It is asked when there is
// something to tell, and each second while it is not to be told.
func (l *loop) ask() {
	if l.asking {
		l.askAgain = true
		return
	}
	l.asking, l.askAgain, l.askedAt = true, false, time.Now()
	go func() {
		quiet := quietReason(l.ctx, l.view)
		select {
		case l.quiets <- quiet:
		case <-l.ctx.Done():
		}
	}()
}

func (l *loop) answered(quiet string) {
	l.asking = false
	// A systemd that answers slower than things change must not keep them back.
	if l.askAgain && time.Since(l.unpublished) < askLimit {
		l.ask()
		return
	}
	changed := quiet != l.quiet
	if changed && quiet != "" {
		l.log.Info("what is found now is not told", "because", quiet)
	}
	l.quiet = quiet
	if changed || !l.unpublished.IsZero() {
		l.publish()
	}
}

// askLimit is how long systemd may take to answer.
const askLimit = 2 * time.Second

func quietReason(ctx context.Context, view host.View) string {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	state, err := view.SystemState(ctx)
	if err != nil {
		return "" // no systemd, or no way to ask: tell what is found
	}
	switch state {
	case "stopping":
		return "systemd is shutting down"
	case "starting", "initializing":
		if o, err := view.OS(ctx); err == nil && time.Since(o.BootTime) < bootGrace {
			return "systemd is starting up"
		}
	}
	return ""
}
