// Package watch wakes probes early: when the host announces something that may
// change what a probe finds, the probe runs at once instead of at its interval.
// What to listen to stands beside each probe ([probes.Wakes]) and in what it came
// upon in its last pass. A wake-up only wakes: the probe reads the level, so that
// an event that is lost, and a source that is not there, cost time and not truth.
package watch

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// Host announces what happens to it; [host.Host] says how.
type Host interface {
	FollowUnits(ctx context.Context, names []string, l host.Listener) error
	FollowProcesses(ctx context.Context, comms []string, l host.Listener) error
	FollowMounts(ctx context.Context, l host.Listener) error
	FollowUevents(ctx context.Context, subsystems []string, l host.Listener) error
	FollowISCSI(ctx context.Context, l host.Listener) error
	FollowFiles(ctx context.Context, lists <-chan []host.FollowedFile, l host.Listener) error
	FollowKernelLog(ctx context.Context, words []string, l host.Listener) error
	FollowClock(ctx context.Context, l host.Listener) error
}

// Watcher listens to the host as the probes that are on want it.
type Watcher struct {
	host Host
	log  *slog.Logger
	wake func(ctx context.Context, probe string)

	changed chan struct{} // the plan is another one
	listed  chan struct{} // so is its list of files
	iscsi   chan struct{} // an iSCSI device has appeared

	mu     sync.Mutex
	config *config.Sections
	on     []probes.Probe
	follow map[string][]string // what each probe came upon
	not    without
	plan   *plan
	timers map[timer]*time.Timer
	states map[string]string // of the sources: why one is not there, "" when it is
	told   bool              // the line about them
}

// New returns a Watcher that has not started; wake runs a probe soon.
func New(h Host, log *slog.Logger, wake func(ctx context.Context, probe string)) *Watcher {
	return &Watcher{
		host: h, log: log, wake: wake,
		changed: make(chan struct{}, 1), listed: make(chan struct{}, 1), iscsi: make(chan struct{}, 1),
		follow: map[string][]string{}, timers: map[timer]*time.Timer{}, states: map[string]string{},
	}
}

// Report implements [engine.Reporter]: the snapshot says which probes are on, with
// which requirements, and what they came upon.
func (w *Watcher) Report(s engine.Snapshot) {
	w.mu.Lock()
	defer w.mu.Unlock()
	changed := w.config != s.Config
	w.config, w.on = s.Config, s.Probes
	for _, r := range s.Reports {
		if !slices.Equal(w.follow[r.Probe], r.Follow) {
			w.follow[r.Probe] = r.Follow
			changed = true
		}
	}
	if changed {
		w.replan()
	}
}

// replan is called with mu held.
func (w *Watcher) replan() {
	w.plan = newPlan(w.on, w.config.Require, w.follow, w.not)
	poke(w.changed)
}

func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (w *Watcher) current() *plan {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.plan
}

// source is one of the host's.
type source struct {
	name string
	// wants is what of it the probes want to hear; empty when it is not needed.
	wants func(*plan) subjects
	// follow listens until ctx ends.
	follow func(ctx context.Context, names []string, l host.Listener) error
	// named: what it is asked for is worth a number in the log.
	named bool
	// retry is poked when it may be there now.
	retry <-chan struct{}
}

const (
	unitSource      = "units"
	ueventSource    = "uevents"
	kernelLogSource = "kernel log"
	fileSource      = "files"
)

func (w *Watcher) sources() []source {
	all := func(f func(context.Context, host.Listener) error) func(context.Context, []string, host.Listener) error {
		return func(ctx context.Context, _ []string, l host.Listener) error { return f(ctx, l) }
	}
	return []source{
		{name: unitSource, wants: func(p *plan) subjects { return p.units }, follow: w.followUnits, named: true},
		{name: "processes", wants: func(p *plan) subjects { return p.processes }, follow: w.host.FollowProcesses, named: true},
		{name: "mount table", wants: func(p *plan) subjects { return p.mounts }, follow: all(w.host.FollowMounts)},
		{name: ueventSource, wants: func(p *plan) subjects { return p.subsystems }, follow: w.host.FollowUevents},
		{name: "iSCSI errors", wants: func(p *plan) subjects { return p.iscsi }, follow: all(w.host.FollowISCSI), retry: w.iscsi},
		{name: kernelLogSource, wants: func(p *plan) subjects { return p.kernelLog }, follow: w.host.FollowKernelLog},
		{name: "clock steps", wants: func(p *plan) subjects { return p.clock }, follow: all(w.host.FollowClock)},
		{name: fileSource, wants: func(p *plan) subjects { return p.files }, follow: w.followFiles, named: true},
	}
}

func (w *Watcher) followUnits(ctx context.Context, names []string, l host.Listener) error {
	names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == host.UnitFiles })
	return w.host.FollowUnits(ctx, names, l)
}

// followFiles follows the files of whatever plan is in force.
func (w *Watcher) followFiles(ctx context.Context, _ []string, l host.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	lists := make(chan []host.FollowedFile)
	go func() {
		var sent []host.FollowedFile
		for {
			if list := w.current().list; sent == nil || !slices.Equal(list, sent) {
				select {
				case lists <- list:
					sent = list
				case <-ctx.Done():
					return
				}
			}
			select {
			case <-w.listed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return w.host.FollowFiles(ctx, lists, l)
}

// Run listens until ctx ends.
func (w *Watcher) Run(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer w.stopTimers()
	type active struct {
		names []string
		stop  context.CancelFunc
	}
	now := map[string]active{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.changed:
		}
		p := w.current()
		var start []func()
		for _, s := range w.sources() {
			names := s.wants(p).names()
			was, on := now[s.name]
			switch {
			case on && slices.Equal(was.names, names):
				continue
			case on && s.name == fileSource && len(names) > 0:
				continue // it is given another list
			case on:
				was.stop()
				delete(now, s.name)
				w.forgetState(s.name)
			}
			if len(names) == 0 {
				continue
			}
			own, stop := context.WithCancel(ctx)
			now[s.name] = active{names, stop}
			w.state(s, pending)
			// From one list to the next something may have been missed.
			start = append(start, func() { w.listen(ctx, own, s, names, on) })
		}
		for _, f := range start {
			running.Go(f)
		}
		poke(w.listed)
	}
}

const (
	// A source that ended, such as a bus that is restarted, is soon back; one
	// that the host does not have may come with a module or a package.
	firstRetry, lastRetry = time.Second, 10 * time.Minute
)

// listen keeps one source going until its context ends, and wakes under the
// longer-lived one of all. missed: there were events that nobody heard.
func (w *Watcher) listen(all, ctx context.Context, s source, names []string, missed bool) {
	wait := firstRetry
	for {
		began := time.Now()
		err := s.follow(ctx, names, host.Listener{
			Listening: func() {
				w.state(s, "")
				if missed {
					w.wakeAll(all, s.wants(w.current()).probes())
				}
			},
			Happened: func(what string) { w.happened(all, s, what) },
			Lost: func() {
				w.log.Info("events were lost, so that every probe looks", "source", s.name)
				w.wakeAll(all, w.current().all)
			},
			Partly: func(err error) {
				w.log.Warn("not all can be followed, the rest is seen at the interval", "source", s.name, "error", err)
			},
		})
		if ctx.Err() != nil {
			return
		}
		missed = true
		w.lost(s, err)
		switch {
		case notThere(err):
			wait = lastRetry
		case time.Since(began) > lastRetry:
			wait = firstRetry
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-s.retry:
		case <-ctx.Done():
			t.Stop()
			return
		}
		t.Stop()
		wait = min(2*wait, lastRetry)
	}
}

// notThere: the host has no such source, or does not let us have it.
func notThere(err error) bool {
	return errors.Is(err, host.ErrNoSystemd) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
}

// lost takes note of a source that ended, and lets another stand in.
func (w *Watcher) lost(s source, err error) {
	w.state(s, err.Error())
	w.mu.Lock()
	defer w.mu.Unlock()
	not := w.not
	not.systemd = not.systemd || s.name == unitSource && errors.Is(err, host.ErrNoSystemd)
	not.kernelLog = not.kernelLog || s.name == kernelLogSource
	if not != w.not {
		w.not = not
		w.replan()
	}
}

// happened wakes the probes that want to know.
func (w *Watcher) happened(ctx context.Context, s source, what string) {
	if s.name == ueventSource && strings.HasPrefix(what, "iscsi") {
		poke(w.iscsi)
	}
	p := w.current()
	names := s.wants(p).wakes(what)
	if len(names) == 0 {
		return
	}
	w.log.Debug("woken", "source", s.name, "by", what, "probes", strings.Join(names, ","))
	var now []string
	w.mu.Lock()
	for _, name := range names {
		if after := p.after[name]; after == 0 {
			now = append(now, name)
		} else if w.timers[timer{name, "after"}] == nil {
			// Not pushed back by further events, or a storm would for ever.
			w.timers[timer{name, "after"}] = time.AfterFunc(after, func() {
				w.mu.Lock()
				delete(w.timers, timer{name, "after"})
				w.mu.Unlock()
				w.wakeAll(ctx, []string{name})
			})
		}
		if again := p.again[name]; again > 0 {
			if t := w.timers[timer{name, "again"}]; t != nil {
				t.Reset(again)
			} else {
				w.timers[timer{name, "again"}] = time.AfterFunc(again, func() { w.wakeAll(ctx, []string{name}) })
			}
		}
	}
	w.mu.Unlock()
	if len(now) > 0 {
		w.wakeAll(ctx, now)
	}
}

// timer is a wake-up that is still to come: the first look after an event, or the
// one once more.
type timer struct{ probe, what string }

func (w *Watcher) stopTimers() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, t := range w.timers {
		t.Stop()
	}
}

func (w *Watcher) wakeAll(ctx context.Context, names []string) {
	for _, name := range names {
		w.wake(ctx, name)
	}
}

// state notes why a source is not there, "" when it is, and says in one line at
// the start what wakes probes early, and later what has changed of that.
func (w *Watcher) state(s source, why string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before, known := w.states[s.name]
	w.states[s.name] = why
	switch {
	case why == pending || known && before == why:
	case w.told && why == "":
		w.log.Info("followed", "source", s.name)
	case w.told && why != "":
		w.log.Warn("not followed: what happens there is seen at the interval", "source", s.name, "error", why)
	}
	if w.told || why == pending {
		return
	}
	var by, not []string
	for _, s := range w.sources() {
		switch why, known := w.states[s.name]; {
		case !known:
		case why == pending:
			return
		case why != "":
			not = append(not, s.name+": "+why)
		case s.named:
			by = append(by, fmt.Sprintf("%s (%d)", s.name, len(s.wants(w.plan))))
		default:
			by = append(by, s.name)
		}
	}
	w.told = true
	attrs := []any{"by", strings.Join(by, ", ")}
	if len(not) > 0 {
		attrs = append(attrs, "not", strings.Join(not, "; "))
	}
	w.log.Info("probes are woken early", attrs...)
}

// pending is the state of a source that has not answered yet.
const pending = "has not answered yet"

func (w *Watcher) forgetState(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.states, name)
}
