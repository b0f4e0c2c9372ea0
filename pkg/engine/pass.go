package engine

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// outcome is what one run of a probe left behind.
type outcome struct {
	result   finding.Result
	err      error
	panicked bool
	timedOut bool
	started  time.Time
	took     time.Duration
}

// errStuck wraps what is told about a run that has not come back.
var errStuck = errors.New("did not answer in time")

// run executes one probe with a deadline. The goroutine is not waited for past
// the deadline, nor once nobody wants the answer: a thread in uninterruptible
// sleep can not be ended by anybody, so done is called when, and if, it comes back.
func run(parent context.Context, p probes.Probe, in probes.Input, deadline time.Duration, u *Underway, done func()) outcome {
	started := in.Now
	began := time.Now()
	ctx, cancel := context.WithTimeout(parent, deadline)
	ctx, trace := host.WithTrace(ctx)
	u.begin(p.Name(), trace)
	defer u.end(p.Name())
	result := make(chan outcome, 1)
	go func() {
		defer cancel()
		defer done()
		o := outcome{started: started}
		defer func() {
			if v := recover(); v != nil {
				// One probe's bug must not cost the others.
				o = outcome{started: started, panicked: true,
					err: fmt.Errorf("the %s probe panicked (a bug, please report it): %v\n%s", p.Name(), v, debug.Stack())}
			}
			o.took = time.Since(began)
			result <- o
		}()
		in.Memory.Begin()
		o.result, o.err = p.Check(ctx, in)
	}()
	// A moment of grace lets a probe that honours its context tell what it saw.
	grace := time.NewTimer(deadline + deadline/10)
	defer grace.Stop()
	select {
	case o := <-result:
		if o.err != nil && errors.Is(o.err, context.DeadlineExceeded) {
			o.timedOut = true
		}
		return o
	case <-parent.Done():
		return outcome{started: started, took: time.Since(began), err: parent.Err()}
	case <-grace.C:
		return outcome{started: started, took: time.Since(began), timedOut: true, err: stuck(started, trace)}
	}
}

func stuck(since time.Time, trace *host.Trace) error {
	if last := trace.Last(); last != "" {
		return fmt.Errorf("%w: still waiting for %s since %s", errStuck, last, since.Format(time.RFC3339))
	}
	return fmt.Errorf("%w: still running since %s", errStuck, since.Format(time.RFC3339))
}

// report turns an outcome into what reporters see, severities and mutes applied.
func report(p probes.Probe, cfg *config.Sections, o outcome, now time.Time) finding.Report {
	fs := o.result.Findings
	for i := range fs {
		fs[i].Severity = cfg.SeverityFor(fs[i])
		fs[i].Muted = cfg.Muted(fs[i], now)
	}
	finding.Sort(fs)
	return finding.Report{
		Probe:     p.Name(),
		Condition: p.Condition(),
		Status:    finding.StatusOf(o.result, o.err),
		Summary:   o.result.Summary,
		Findings:  fs,
		Samples:   o.result.Samples,
		Follow:    o.result.Follow,
		Err:       o.err,
		Required:  p.General().Required,
		Started:   o.started,
		Duration:  o.took,
	}
}

// Deadline is how long a run of a probe may take before it is told as Unknown.
const Deadline = 30 * time.Second

// Underway says how far a pass has come, for somebody who waits for it. A new one
// is handed to [Once]; Left may be asked all the while.
type Underway struct {
	mu  sync.Mutex
	all int
	// left are the probes that have not answered.
	left []waiting
}

type waiting struct {
	probe string
	trace *host.Trace
}

// Left says how many probes have not answered and which, each with what it was
// last seen asking the host for.
func (u *Underway) Left() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	names := make([]string, 0, len(u.left))
	for _, w := range u.left {
		name := w.probe
		if last := w.trace.Last(); last != "" {
			name += " (" + last + ")"
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return fmt.Sprintf("%d of %d probes: %s", len(names), u.all, strings.Join(names, ", "))
}

func (u *Underway) begin(probe string, trace *host.Trace) {
	if u == nil {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.all++
	u.left = append(u.left, waiting{probe, trace})
}

func (u *Underway) end(probe string) {
	if u == nil {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.left = slices.DeleteFunc(u.left, func(w waiting) bool { return w.probe == probe })
}

// Once makes one pass of all probes that are switched on, at the same time, and
// returns their reports in order. It is what `agent check` does: nothing is
// held back, for there is no earlier pass to compare with. u, which may be nil, is
// told how far it is.
func Once(ctx context.Context, view host.View, cfg *config.Sections, u *Underway) []finding.Report {
	on := listOn(cfg)
	reports := make([]finding.Report, len(on))
	ready := make(chan int)
	now := time.Now()
	ctx = host.AsOf(ctx, now)
	for i, p := range on {
		go func() {
			in := probes.Input{Host: view, Now: now, Require: cfg.Require, Memory: probes.NewMemory()}
			reports[i] = report(p, cfg, run(ctx, p, in, Deadline, u, func() {}), now)
			ready <- i
		}()
	}
	for range on {
		<-ready
	}
	return reports
}
