package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
	"github.com/hosthygiene/agent/pkg/probes"
)

// fake is a probe whose answer the test decides.
type fake struct {
	probes.Common
	name  string
	rule  finding.Rule
	more  []finding.Rule
	check func(ctx context.Context, in probes.Input) (finding.Result, error)
}

func (f fake) Name() string          { return f.name }
func (f fake) Condition() string     { return probes.ConditionPrefix + f.name }
func (f fake) Rules() []finding.Rule { return append(f.more, f.rule) }
func (f fake) Validate() error       { return nil }

func (f fake) Wakes(probes.Require) probes.Wakes { return probes.Wakes{} }
func (f fake) Check(ctx context.Context, in probes.Input) (finding.Result, error) {
	return f.check(ctx, in)
}

// recorder keeps every snapshot.
type recorder struct {
	mu    sync.Mutex
	snaps []Snapshot
}

func (r *recorder) Report(s Snapshot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.snaps = append(r.snaps, s)
}

func (r *recorder) last(probe string) (finding.Report, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.snaps) == 0 {
		return finding.Report{}, false
	}
	for _, rep := range r.snaps[len(r.snaps)-1].Reports {
		if rep.Probe == probe {
			return rep, true
		}
	}
	return finding.Report{}, false
}

// changes lists the statuses a probe was reported with, repeats left out.
func (r *recorder) changes(probe string) (out []finding.Status) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.snaps {
		for _, rep := range s.Reports {
			if rep.Probe == probe {
				out = append(out, rep.Status)
			}
		}
	}
	return slices.Compact(out)
}

type rig struct {
	*recorder
	eng *Engine
	cfg *config.Sections
}

// start runs an engine with fakes inside a synctest bubble.
func start(t *testing.T, view host.View, prior func(string) bool, list ...probes.Probe) rig {
	rec := new(recorder)
	eng := New(view, slog.New(slog.DiscardHandler), prior, rec)
	eng.list = func(*config.Sections) []probes.Probe { return list }
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { eng.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	cfg := &config.Default().Sections
	eng.Configure(ctx, cfg, nil)
	synctest.Wait()
	return rig{rec, eng, cfg}
}

// bare is a host of which only systemd's state is asked.
type bare struct {
	host.View
	state atomic.Value
	boot  time.Time
}

func (b *bare) SystemState(context.Context) (string, error) {
	if s, _ := b.state.Load().(string); s != "" {
		return s, nil
	}
	return "", host.ErrNoSystemd
}

func (b *bare) OS(context.Context) (host.OS, error) { return host.OS{BootTime: b.boot}, nil }

func noSystemd(*testing.T) host.View { return new(bare) }

func healthy(context.Context, probes.Input) (finding.Result, error) {
	return finding.Result{Summary: "fine"}, nil
}

func problem(reason string) finding.Result {
	return finding.Result{Findings: []finding.Finding{{Reason: reason, Severity: finding.Warning, Subject: "x", Message: "m"}}}
}

func TestPanicIsUnknownAndCostsNobodyElse(t *testing.T) {
	view := noSystemd(t)
	synctest.Test(t, func(t *testing.T) {
		r := start(t, view, nil,
			fake{name: "bad", check: func(context.Context, probes.Input) (finding.Result, error) { panic("boom") }},
			fake{name: "good", check: healthy})
		bad, _ := r.last("bad")
		if bad.Status != finding.Unknown || !strings.Contains(bad.Err.Error(), "panicked (a bug, please report it): boom") {
			t.Errorf("bad: %s %v", bad.Status, bad.Err)
		}
		if good, ok := r.last("good"); !ok || good.Status != finding.OK {
			t.Errorf("good: %+v", good)
		}
	})
}

func TestStuckProbeDelaysNobodyAndIsNotStartedAgain(t *testing.T) {
	view := noSystemd(t)
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var stuckRuns, goodRuns int
		r := start(t, view, nil,
			fake{name: "stuck", check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
				stuckRuns++
				<-release // as a read of a dead mount: no context ends it
				return finding.Result{Summary: "back"}, nil
			}},
			fake{name: "good", check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
				goodRuns++
				return healthy(ctx, in)
			}})
		time.Sleep(10*time.Minute + time.Second)
		synctest.Wait()
		stuck, _ := r.last("stuck")
		if stuck.Status != finding.Unknown || !strings.Contains(stuck.Err.Error(), "did not answer in time: still running since") {
			t.Errorf("stuck: %s %v", stuck.Status, stuck.Err)
		}
		if stuckRuns != 1 {
			t.Errorf("the stuck probe was started %d times", stuckRuns)
		}
		if goodRuns < 10 || goodRuns > 12 {
			t.Errorf("the good probe ran %d times in ten minutes at 60s", goodRuns)
		}
		close(release)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if stuck, _ := r.last("stuck"); stuck.Status != finding.OK || stuckRuns < 2 {
			t.Errorf("after it came back: %s %v, %d runs", stuck.Status, stuck.Err, stuckRuns)
		}
	})
}

func TestDeadlineReachesTheProbe(t *testing.T) {
	view := noSystemd(t)
	synctest.Test(t, func(t *testing.T) {
		r := start(t, view, nil, fake{name: "slow", check: func(ctx context.Context, _ probes.Input) (finding.Result, error) {
			<-ctx.Done()
			return problem("A"), ctx.Err()
		}})
		time.Sleep(Deadline + time.Second)
		synctest.Wait()
		slow, _ := r.last("slow")
		if slow.Status != finding.Problem || !errors.Is(slow.Err, context.DeadlineExceeded) {
			t.Errorf("what was found before the deadline is lost: %s %v", slow.Status, slow.Err)
		}
		r.mu.Lock()
		runs := r.snaps[len(r.snaps)-1].Runs
		r.mu.Unlock()
		if runs[RunKey{"slow", "timeout"}] != 1 {
			t.Errorf("runs: %v", runs)
		}
	})
}

func TestHolds(t *testing.T) {
	rule := finding.Rule{Reason: "A", Severity: finding.Warning, HoldBefore: 2 * time.Minute, HoldClear: time.Minute}
	view := noSystemd(t)

	t.Run("a short problem is never told", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			r := start(t, view, nil, fake{name: "p", rule: rule, check: func(context.Context, probes.Input) (finding.Result, error) {
				if time.Since(began) < 90*time.Second {
					return problem("A"), nil
				}
				return finding.Result{}, nil
			}})
			time.Sleep(time.Minute)
			if p, _ := r.last("p"); p.Held != 1 {
				t.Errorf("while it lasts %d are said to be held back, want 1", p.Held)
			}
			time.Sleep(9 * time.Minute)
			if p, _ := r.last("p"); p.Held != 0 {
				t.Errorf("afterwards %d are said to be held back, want 0", p.Held)
			}
			if got := r.changes("p"); !slices.Equal(got, []finding.Status{finding.OK}) {
				t.Errorf("got %v", got)
			}
		})
	})

	t.Run("a lasting one is told on time and cleared on time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			var until time.Duration = 10 * time.Minute
			r := start(t, view, nil, fake{name: "p", rule: rule, check: func(context.Context, probes.Input) (finding.Result, error) {
				if time.Since(began) < until {
					return problem("A"), nil
				}
				return finding.Result{}, nil
			}})
			time.Sleep(rule.HoldBefore + minGap + time.Second)
			synctest.Wait()
			got, _ := r.last("p")
			if got.Status != finding.Problem || !got.Findings[0].Since.Equal(began) {
				t.Fatalf("not told after its hold: %+v", got)
			}
			time.Sleep(until + 70*time.Second + rule.HoldClear - time.Since(began))
			synctest.Wait()
			if got := r.changes("p"); !slices.Equal(got, []finding.Status{finding.OK, finding.Problem, finding.OK}) {
				t.Errorf("got %v", got)
			}
		})
	})

	t.Run("a flapping one is one change", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := 0
			flap := rule
			flap.HoldBefore = 0
			r := start(t, view, nil, fake{name: "p", rule: flap, Common: probes.Common{Interval: probes.Duration(10 * time.Second)},
				check: func(context.Context, probes.Input) (finding.Result, error) {
					if n++; n%2 == 0 {
						return finding.Result{}, nil
					}
					return problem("A"), nil
				}})
			time.Sleep(10 * time.Minute)
			if got := r.changes("p"); !slices.Equal(got, []finding.Status{finding.Problem}) {
				t.Errorf("got %v after %d runs", got, n)
			}
			got, _ := r.last("p")
			want := finding.Evidence{Source: "passes since " + got.Findings[0].Since.UTC().Format(time.RFC3339), Observed: fmt.Sprintf("it was gone and came back %d times", (n-1)/2)}
			if !slices.Contains(got.Findings[0].Evidence, want) {
				t.Errorf("after %d runs the evidence is %+v", n, got.Findings[0].Evidence)
			}
		})
	})

	t.Run("a condition does not clear between a finding and its successor", func(t *testing.T) {
		for name, lasts := range map[string]time.Duration{"told": time.Hour, "gone before it is told": 5 * time.Second} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					began := time.Now()
					const gone = time.Minute
					r := start(t, view, nil, fake{name: "p", rule: finding.Rule{Reason: "A"}, more: []finding.Rule{{Reason: "B", HoldBefore: 10 * time.Second}},
						Common: probes.Common{Interval: probes.Duration(time.Second)},
						check: func(context.Context, probes.Input) (finding.Result, error) {
							switch since := time.Since(began); {
							case since < gone:
								return problem("A"), nil
							case since < gone+lasts:
								return problem("B"), nil
							}
							return finding.Result{}, nil
						}})
					time.Sleep(gone + 3*time.Second)
					if got, _ := r.last("p"); len(got.Findings) != 1 || got.Findings[0].Reason != "A" {
						t.Errorf("while the second is held back: %+v", got.Findings)
					}
					time.Sleep(10 * time.Second)
					got, _ := r.last("p")
					want := []finding.Status{finding.Problem}
					if lasts > time.Minute {
						if len(got.Findings) != 1 || got.Findings[0].Reason != "B" {
							t.Errorf("after its hold: %+v", got.Findings)
						}
					} else {
						want = append(want, finding.OK)
					}
					if got := r.changes("p"); !slices.Equal(got, want) {
						t.Errorf("got %v, want %v", got, want)
					}
				})
			})
		}
	})

	t.Run("what comes later does not keep a finding that is gone", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			r := start(t, view, nil, fake{name: "p", rule: finding.Rule{Reason: "A"}, more: []finding.Rule{{Reason: "B", HoldBefore: 10 * time.Second}, {Reason: "C", HoldBefore: 10 * time.Second}},
				Common: probes.Common{Interval: probes.Duration(time.Second)},
				check: func(context.Context, probes.Input) (finding.Result, error) {
					// B and C take turns and neither is ever told.
					switch n := int(time.Since(began).Seconds()); {
					case n < 60:
						return problem("A"), nil
					case n%8 < 4:
						return problem("B"), nil
					default:
						return problem("C"), nil
					}
				}})
			time.Sleep(80 * time.Second)
			if got := r.changes("p"); !slices.Equal(got, []finding.Status{finding.Problem, finding.OK}) {
				t.Errorf("got %v", got)
			}
		})
	})

	t.Run("what does not pass by itself is told at once, unless the config says otherwise", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := start(t, view, nil, fake{name: "p", rule: rule, check: func(context.Context, probes.Input) (finding.Result, error) {
				res := problem("A")
				res.Findings[0].Settled = true
				return res, nil
			}})
			if got := r.changes("p"); !slices.Equal(got, []finding.Status{finding.Problem}) {
				t.Errorf("got %v", got)
			}
		})
		synctest.Test(t, func(t *testing.T) {
			var broken atomic.Bool
			r := start(t, view, nil, fake{name: "p", rule: rule, check: func(context.Context, probes.Input) (finding.Result, error) {
				if !broken.Load() {
					return finding.Result{}, nil
				}
				res := problem("A")
				res.Findings[0].Settled = true
				return res, nil
			}})
			cfg := *r.cfg
			before := probes.Duration(time.Minute)
			cfg.Hold = map[string]config.Hold{"A": {Before: &before}}
			broken.Store(true)
			r.eng.Configure(t.Context(), &cfg, nil)
			time.Sleep(30 * time.Second)
			if got := r.changes("p"); !slices.Equal(got, []finding.Status{finding.OK}) {
				t.Errorf("within the config's hold: %v", got)
			}
			time.Sleep(time.Minute)
			if got := r.changes("p"); !slices.Equal(got, []finding.Status{finding.OK, finding.Problem}) {
				t.Errorf("after the config's hold: %v", got)
			}
		})
	})

	t.Run("after a restart the old problem does not clear and come again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			prior := func(c string) bool { return c == probes.ConditionPrefix+"p" }
			r := start(t, view, prior, fake{name: "p", rule: rule, check: func(context.Context, probes.Input) (finding.Result, error) {
				return problem("A"), nil
			}})
			if got := r.changes("p"); !slices.Equal(got, []finding.Status{finding.Problem}) {
				t.Errorf("got %v", got)
			}
		})
	})

	t.Run("the config's hold wins, and information is never held", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			info := func(context.Context, probes.Input) (finding.Result, error) {
				res := problem("A")
				res.Findings[0].Severity = finding.Info
				return res, nil
			}
			r := start(t, view, nil,
				fake{name: "p", rule: rule, check: func(context.Context, probes.Input) (finding.Result, error) { return problem("A"), nil }},
				fake{name: "i", rule: rule, check: info})
			if got, _ := r.last("i"); len(got.Findings) != 1 || got.Status != finding.OK {
				t.Errorf("information: %+v", got)
			}
			cfg := *r.cfg
			zero := probes.Duration(0)
			cfg.Hold = map[string]config.Hold{"A": {Before: &zero}}
			r.eng.Configure(t.Context(), &cfg, nil)
			synctest.Wait()
			if got, _ := r.last("p"); got.Status != finding.Problem {
				t.Errorf("held although the config says 0s: %+v", got)
			}
		})
	})
}

func TestSeverityAndMute(t *testing.T) {
	view := noSystemd(t)
	synctest.Test(t, func(t *testing.T) {
		r := start(t, view, nil, fake{name: "p", rule: finding.Rule{Reason: "A"}, check: func(context.Context, probes.Input) (finding.Result, error) {
			return problem("A"), nil
		}})
		cfg := *r.cfg
		cfg.Severity = map[string]finding.Severity{"A": finding.Critical}
		r.eng.Configure(t.Context(), &cfg, nil)
		synctest.Wait()
		if got, _ := r.last("p"); got.Findings[0].Severity != finding.Critical {
			t.Errorf("severity: %+v", got.Findings[0])
		}
		cfg.Mute = []config.Mute{{Reason: "A", Until: time.Now().Add(5 * time.Minute), Because: "array maintenance"}}
		r.eng.Configure(t.Context(), &cfg, nil)
		synctest.Wait()
		if got, _ := r.last("p"); got.Status != finding.OK || len(got.Findings) != 1 || got.Findings[0].Muted.Because != "array maintenance" {
			t.Errorf("muted: %+v", got)
		}
		time.Sleep(7 * time.Minute)
		synctest.Wait()
		if got, _ := r.last("p"); got.Status != finding.Problem {
			t.Errorf("the mute has expired: %+v", got)
		}
	})
}

func TestRefusedConfigKeepsTheOldOneAndIsTold(t *testing.T) {
	view := noSystemd(t)
	synctest.Test(t, func(t *testing.T) {
		r := start(t, view, nil, fake{name: "p", check: healthy})
		r.eng.Configure(t.Context(), nil, errors.New("config.yaml:3: nonsense"))
		synctest.Wait()
		last := r.snaps[len(r.snaps)-1]
		if last.ConfigError == nil || last.Config != r.cfg || len(last.Reports) != 1 {
			t.Errorf("%+v", last)
		}
	})
}

func TestQuietWhileSystemdStarts(t *testing.T) {
	quiet := func(r rig) string {
		synctest.Wait()
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.snaps[len(r.snaps)-1].Quiet
	}
	synctest.Test(t, func(t *testing.T) {
		view := &bare{boot: time.Now()}
		view.state.Store("starting")
		r := start(t, view, nil, fake{name: "p", check: healthy})
		if got := quiet(r); got != "systemd is starting up" {
			t.Errorf("quiet: %q", got)
		}
		time.Sleep(30 * time.Second)
		view.state.Store("running")
		time.Sleep(2 * minGap)
		if got := quiet(r); got != "" {
			t.Errorf("quiet: %q", got)
		}
	})
	synctest.Test(t, func(t *testing.T) { // one hung unit does not silence us for ever
		view := &bare{boot: time.Now()}
		view.state.Store("starting")
		r := start(t, view, nil, fake{name: "p", check: healthy})
		time.Sleep(bootGrace + 2*minGap)
		if got := quiet(r); got != "" {
			t.Errorf("quiet: %q", got)
		}
	})
}

// What a stuck probe hangs on is told.
func TestStuckNamesTheFile(t *testing.T) {
	h := hosttest.Parse(t, "-- tree/etc/fstab --\n")
	release := make(chan struct{})
	p := fake{name: "p", check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
		_, _ = in.Host.ReadFile(ctx, "/etc/fstab")
		<-release
		return finding.Result{}, nil
	}}
	back := make(chan struct{})
	o := run(t.Context(), p, probes.Input{Host: h, Memory: probes.NewMemory()}, 20*time.Millisecond, nil, func() { close(back) })
	if !o.timedOut || !strings.Contains(o.err.Error(), "still waiting for /etc/fstab since") {
		t.Errorf("%+v", o)
	}
	close(release)
	<-back
}

// Who waits for a pass is told what for, and need not wait once it is given up.
func TestUnderway(t *testing.T) {
	h := hosttest.Parse(t, "-- tree/etc/fstab --\n")
	fstab := traced(t, h, "/etc/fstab")
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		var u Underway
		hang := make(chan struct{})
		ended := make(chan outcome, 2)
		for _, p := range []fake{
			{name: "slow", check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
				<-hang // and hears of no context
				return finding.Result{}, nil
			}},
			{name: "quick", check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
				time.Sleep(time.Second)
				return finding.Result{}, nil
			}},
		} {
			go func() {
				ended <- run(ctx, p, probes.Input{Host: h, Memory: probes.NewMemory()}, Deadline, &u, func() {})
			}()
		}
		synctest.Wait()
		if got, want := u.Left(), "2 of 2 probes: quick, slow"; got != want {
			t.Errorf("at first %q, want %q", got, want)
		}
		u.mu.Lock()
		u.left[0].trace, u.left[1].trace = fstab, fstab
		u.mu.Unlock()
		time.Sleep(2 * time.Second)
		if got, want := u.Left(), "1 of 2 probes: slow (/etc/fstab)"; got != want {
			t.Errorf("then %q, want %q", got, want)
		}
		if o := <-ended; o.err != nil {
			t.Error(o.err)
		}
		stop()
		synctest.Wait()
		select {
		case o := <-ended:
			if !errors.Is(o.err, context.Canceled) || o.timedOut {
				t.Errorf("%+v", o)
			}
		default:
			t.Error("a pass that nobody wants is still waited for")
		}
		close(hang)
	})
}

// traced is the trace of having read a file.
func traced(t *testing.T, h *hosttest.Host, name string) *host.Trace {
	ctx, trace := host.WithTrace(t.Context())
	if _, err := h.ReadFile(ctx, name); err != nil {
		t.Fatal(err)
	}
	return trace
}

func TestWakeRunsAtOnceButNotTwiceASecond(t *testing.T) {
	view := noSystemd(t)
	synctest.Test(t, func(t *testing.T) {
		runs := 0
		r := start(t, view, nil, fake{name: "p", check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
			runs++
			return healthy(ctx, in)
		}})
		time.Sleep(5 * time.Second)
		for range 1000 {
			r.eng.Wake(t.Context(), "p")
		}
		synctest.Wait()
		if runs != 2 {
			t.Errorf("%d runs at once, want 2", runs)
		}
		for range 1000 {
			r.eng.Wake(t.Context(), "p")
		}
		time.Sleep(minGap)
		synctest.Wait()
		if runs != 3 {
			t.Errorf("%d runs after another second, want 3", runs)
		}
	})
}

func TestOnce(t *testing.T) {
	cfg := config.Default().Sections
	off := false
	cfg.Probes.Time.Enabled = &off
	tree := t.TempDir()
	view, err := host.OpenTree(tree)
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	reports := Once(t.Context(), view, &cfg, nil)
	if len(reports) != len(cfg.Probes.List())-1 {
		t.Fatalf("%d reports", len(reports))
	}
	for _, r := range reports {
		// An empty tree is no healthy host: nothing could be checked.
		if r.Status == finding.OK {
			t.Errorf("%s: %s %q", r.Probe, r.Status, r.Summary)
		}
	}
}

// answering is a host whose systemd can be asked, and counts how often it is.
type answering struct {
	host.View
	mu    sync.Mutex
	state string
	delay time.Duration
	asked int
}

func (a *answering) SystemState(ctx context.Context) (string, error) {
	a.mu.Lock()
	a.asked++
	state, delay := a.state, a.delay
	a.mu.Unlock()
	select {
	case <-time.After(delay):
		return state, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

func (a *answering) OS(context.Context) (host.OS, error) { return host.OS{}, nil }

func (a *answering) says(state string, delay time.Duration) (asked int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state, a.delay = state, delay
	asked, a.asked = a.asked, 0
	return asked
}

// A unit that stops because the host shuts down is no news: systemd says that it
// stops before it stops the first unit, and is asked before anything is told.
func TestWhatAShutdownBringsIsNotTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		view := &answering{state: "running", delay: 5 * time.Millisecond}
		var down atomic.Bool
		r := start(t, view, nil, fake{name: "p", check: func(context.Context, probes.Input) (finding.Result, error) {
			if down.Load() {
				return problem("A"), nil
			}
			return finding.Result{}, nil
		}})
		time.Sleep(time.Minute * 10)
		synctest.Wait()
		if n := view.says("stopping", 5*time.Millisecond); n > 3 {
			t.Errorf("systemd was asked %d times in ten minutes in which nothing changed", n)
		}
		down.Store(true)
		r.eng.Wake(t.Context(), "p")
		time.Sleep(time.Second)
		synctest.Wait()
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, s := range r.snaps {
			if s.Quiet == "" && slices.ContainsFunc(s.Reports, func(r finding.Report) bool { return r.Status == finding.Problem }) {
				t.Fatal("it was told")
			}
		}
		if last := r.snaps[len(r.snaps)-1]; last.Quiet != "systemd is shutting down" {
			t.Errorf("quiet: %q", last.Quiet)
		}
	})
}

// A systemd that takes its time delays what is told, and does not keep it back,
// however often something else changes meanwhile.
func TestASlowSystemdDelaysAndNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		view := &answering{state: "running"}
		n := 0
		r := start(t, view, nil, fake{name: "p", check: func(context.Context, probes.Input) (finding.Result, error) {
			n++
			res := problem("A")
			res.Findings[0].Subject = string(rune('a' + n%26))
			return res, nil
		}})
		view.says("running", time.Second+300*time.Millisecond)
		r.mu.Lock()
		before := len(r.snaps)
		r.mu.Unlock()
		for range 20 {
			r.eng.Wake(t.Context(), "p")
			time.Sleep(time.Second)
		}
		view.says("running", 0)
		r.mu.Lock()
		defer r.mu.Unlock()
		if told := len(r.snaps) - before; told < 4 {
			t.Errorf("told %d times in 20 s of change", told)
		}
	})
}

func TestAChangeIsToldAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		view := &answering{state: "running"}
		var down atomic.Bool
		r := start(t, view, nil, fake{name: "p", check: func(context.Context, probes.Input) (finding.Result, error) {
			if down.Load() {
				return problem("A"), nil
			}
			return finding.Result{}, nil
		}})
		time.Sleep(10 * time.Second)
		down.Store(true)
		r.eng.Wake(t.Context(), "p")
		synctest.Wait() // no time passes
		if got, _ := r.last("p"); got.Status != finding.Problem {
			t.Errorf("right after the event: %s", got.Status)
		}
	})
}

func TestStalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		block := make(chan struct{})
		r := start(t, noSystemd(t), nil, fake{name: "p", check: healthy})
		for range 5 {
			if d := r.eng.Stalled(); d != 0 {
				t.Errorf("a loop that comes round has stalled for %s", d)
			}
			time.Sleep(20 * time.Second)
			synctest.Wait()
		}
		stuck := New(noSystemd(t), slog.New(slog.DiscardHandler), nil, reporterFunc(func(Snapshot) { <-block }))
		stuck.list = r.eng.list
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { stuck.Run(ctx) })
		stuck.Configure(ctx, r.cfg, nil)
		synctest.Wait()
		stuck.Stalled()
		time.Sleep(90 * time.Second)
		if d := stuck.Stalled().Round(time.Second); d != 90*time.Second {
			t.Errorf("a stuck loop has stalled for %s", d)
		}
		close(block)
		synctest.Wait()
		stuck.Stalled()
		synctest.Wait()
		if d := stuck.Stalled(); d != 0 {
			t.Errorf("when it goes on: %s", d)
		}
		cancel()
		wg.Wait()
	})
}

type reporterFunc func(Snapshot)

func (f reporterFunc) Report(s Snapshot) { f(s) }

// Looking often by itself does not make a probe slow to be woken.
func TestTheIntervalOwesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var runs atomic.Int32
		r := start(t, noSystemd(t), nil, fake{name: "p", check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
			runs.Add(1)
			time.Sleep(5 * time.Second)
			return healthy(ctx, in)
		}})
		time.Sleep(20 * time.Minute)
		// Until it has just come back from a run at the interval.
		for before := runs.Load(); runs.Load() == before; {
			time.Sleep(time.Second)
		}
		time.Sleep(7 * time.Second)
		before := runs.Load()
		r.eng.Wake(t.Context(), "p")
		synctest.Wait()
		if runs := runs.Load() - before; runs != 1 {
			t.Errorf("%d runs at once", runs)
		}
		time.Sleep(10 * time.Second) // for it to end
	})
}

// A probe that works long may not take more than its share when it is woken all
// the time; on a quiet host it runs at once however long it works.
func TestAStormTakesItsShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var runs atomic.Int32
		r := start(t, noSystemd(t), nil, fake{name: "p", check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
			runs.Add(1)
			time.Sleep(200 * time.Millisecond)
			return healthy(ctx, in)
		}})
		time.Sleep(30 * time.Second)
		runs.Store(0)
		for range 10_000 {
			r.eng.Wake(t.Context(), "p")
			time.Sleep(10 * time.Millisecond)
		}
		// 100 s: the first twenty a second apart, then one in four.
		if runs := runs.Load(); runs < 35 || runs > 45 {
			t.Errorf("%d runs of 200 ms in 100 s, want a twentieth of the time and some credit", runs)
		}
		time.Sleep(30 * time.Second)
		runs.Store(0)
		r.eng.Wake(t.Context(), "p")
		synctest.Wait()
		if runs := runs.Load(); runs != 1 {
			t.Errorf("%d runs at once after a quiet time", runs)
		}
		time.Sleep(time.Second) // it comes back
	})
}

// What nothing wakes comes in one pass a minute, whenever each probe was woken
// last: an idle agent wakes the processor once a minute.
func TestProbesFallIntoOnePass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var at []time.Time
		var list []probes.Probe
		for _, name := range []string{"a", "b", "c", "d"} {
			list = append(list, fake{name: name, check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
				mu.Lock()
				defer mu.Unlock()
				at = append(at, in.Now)
				return healthy(ctx, in)
			}})
		}
		r := start(t, noSystemd(t), nil, list...)
		for _, name := range []string{"a", "b", "c"} {
			time.Sleep(17 * time.Second)
			r.eng.Wake(t.Context(), name)
		}
		time.Sleep(2 * time.Minute)
		mu.Lock()
		at = nil
		mu.Unlock()
		time.Sleep(time.Hour)
		mu.Lock()
		defer mu.Unlock()
		times := slices.CompactFunc(at, time.Time.Equal)
		if passes := len(times); passes > 64 || len(at) != 4*passes {
			t.Errorf("%d runs of 4 probes at %d times in an hour", len(at), passes)
		}
	})
}

// TestOnePassOneSnapshot: what changes nothing is handed on once for all probes of
// a pass, within a second where one of them takes its time; what does, at once.
func TestOnePassOneSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var slow, broken, failed atomic.Bool
		var list []probes.Probe
		for i, name := range []string{"a", "b", "c", "d"} {
			list = append(list, fake{name: name, check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
				time.Sleep(time.Duration(10*i) * time.Millisecond)
				if name == "d" && slow.Load() {
					time.Sleep(5 * time.Second)
				}
				if name == "a" && broken.Load() {
					failed.Store(true)
					return finding.Result{}, errors.New("no answer")
				}
				return healthy(ctx, in)
			}})
		}
		r := start(t, noSystemd(t), nil, list...)
		given := func(d time.Duration) int {
			r.mu.Lock()
			before := len(r.snaps)
			r.mu.Unlock()
			time.Sleep(d)
			r.mu.Lock()
			defer r.mu.Unlock()
			return len(r.snaps) - before
		}
		time.Sleep(10 * time.Second)
		if n := given(10 * time.Minute); n < 9 || n > 11 {
			t.Errorf("%d snapshots in ten passes", n)
		}
		slow.Store(true)
		if n := given(10 * time.Minute); n < 18 || n > 22 {
			t.Errorf("%d snapshots in ten passes of which one probe takes five seconds", n)
		}
		broken.Store(true)
		r.eng.Wake(t.Context(), "d")
		r.eng.Wake(t.Context(), "a")
		for !failed.Load() { // it may have looked within the last second
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Millisecond)
		if report, _ := r.last("a"); report.Status != finding.Unknown {
			t.Errorf("while another probe runs, what has changed is not told: %s", report.Status)
		}
		slow.Store(false)
		time.Sleep(time.Minute) // all come back
	})
}

// TestRarelyWhileWell: a probe that looks rarely does so while all is well; a problem,
// and what it could not see, it looks at again as soon as the others.
func TestRarelyWhileWell(t *testing.T) {
	for _, wrong := range []string{"a problem", "an error", "information"} {
		t.Run(wrong, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var looks, cured atomic.Int64
				r := start(t, noSystemd(t), nil, rare{fake{name: "a", rule: finding.Rule{Reason: "A", Severity: finding.Warning, Also: []finding.Severity{finding.Info}}, check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
					looks.Add(1)
					var res finding.Result
					switch {
					case cured.Load() > 0:
					case wrong == "an error":
						return res, errors.New("not to be seen")
					case wrong == "information":
						res.Add(finding.Finding{Reason: "A", Severity: finding.Info})
					default:
						res.Add(finding.Finding{Reason: "A", Severity: finding.Warning})
					}
					return res, nil
				}}})
				time.Sleep(time.Hour)
				ill := looks.Load()
				cured.Add(1)
				time.Sleep(70 * time.Second)
				rep, _ := r.last("a")
				looks.Store(0)
				time.Sleep(time.Hour)
				well := looks.Load()
				if wrong == "information" {
					if ill > 6 {
						t.Errorf("%d looks in an hour", ill)
					}
				} else if ill < 55 || rep.Status != finding.OK {
					t.Errorf("%d looks in an hour; cured it was %s", ill, rep.Status)
				}
				if well < 3 || well > 5 {
					t.Errorf("all being well: %d looks in an hour", well)
				}
			})
		})
	}
}

// rare is a fake that looks rarely.
type rare struct{ fake }

func (rare) Rarely() bool { return true }

// TestRarelyGoesWithAPass: a probe that looks every five minutes goes with a pass of
// those that look every minute, and makes none of its own.
func TestRarelyGoesWithAPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		at := map[string][]time.Time{}
		note := func(name string, interval time.Duration) probes.Probe {
			return fake{name: name, Common: probes.Common{Interval: probes.Duration(interval)}, check: func(ctx context.Context, in probes.Input) (finding.Result, error) {
				mu.Lock()
				defer mu.Unlock()
				at[name] = append(at[name], in.Now)
				return healthy(ctx, in)
			}}
		}
		r := start(t, noSystemd(t), nil, note("a", 0), note("b", 0), note("rare", 5*time.Minute))
		time.Sleep(100 * time.Second)
		r.eng.Wake(t.Context(), "rare")
		time.Sleep(10 * time.Hour)
		mu.Lock()
		defer mu.Unlock()
		alone := 0
		for _, when := range at["rare"] {
			if !slices.ContainsFunc(at["a"], when.Equal) {
				alone++
			}
		}
		if n := len(at["rare"]); alone != 1 || n < 100 || n > 135 {
			t.Errorf("%d looks in ten hours, %d of them alone; it was woken once", n, alone)
		}
		if n := len(at["a"]); n < 570 || n > 640 {
			t.Errorf("%d passes in ten hours", n)
		}
	})
}
