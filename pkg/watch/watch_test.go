package watch

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// announcer is a host whose events the test makes. The sources themselves are
// tested where they are, with the kernel's and a bus's own events.
type announcer struct {
	mu sync.Mutex
	// listeners by source, names what it was last asked for.
	listeners map[string]host.Listener
	names     map[string][]string
	end       map[string]chan error
	asked     map[string]int
	// absent are the errors of sources that are not there.
	absent map[string]error
}

func newAnnouncer() *announcer {
	return &announcer{listeners: map[string]host.Listener{}, names: map[string][]string{}, end: map[string]chan error{},
		asked: map[string]int{}, absent: map[string]error{"iscsi": fs.ErrNotExist}}
}

func (a *announcer) follow(ctx context.Context, source string, names []string, l host.Listener) error {
	a.mu.Lock()
	a.asked[source]++
	if err := a.absent[source]; err != nil {
		a.mu.Unlock()
		return err
	}
	end := make(chan error)
	a.listeners[source], a.names[source], a.end[source] = l, names, end
	a.mu.Unlock()
	l.Listening()
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.end[source] == end {
			delete(a.listeners, source)
		}
	}()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-end:
		return err
	}
}

func (a *announcer) FollowUnits(ctx context.Context, names []string, l host.Listener) error {
	return a.follow(ctx, "units", names, l)
}
func (a *announcer) FollowProcesses(ctx context.Context, comms []string, l host.Listener) error {
	return a.follow(ctx, "processes", comms, l)
}
func (a *announcer) FollowMounts(ctx context.Context, l host.Listener) error {
	return a.follow(ctx, "mounts", nil, l)
}
func (a *announcer) FollowUevents(ctx context.Context, subsystems []string, l host.Listener) error {
	return a.follow(ctx, "uevents", subsystems, l)
}
func (a *announcer) FollowISCSI(ctx context.Context, l host.Listener) error {
	return a.follow(ctx, "iscsi", nil, l)
}
func (a *announcer) FollowKernelLog(ctx context.Context, words []string, l host.Listener) error {
	return a.follow(ctx, "log", words, l)
}
func (a *announcer) FollowClock(ctx context.Context, l host.Listener) error {
	return a.follow(ctx, "clock", nil, l)
}

func (a *announcer) FollowFiles(ctx context.Context, lists <-chan []host.FollowedFile, l host.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		for {
			select {
			case list := <-lists:
				a.mu.Lock()
				a.names["files"] = nil
				for _, f := range list {
					a.names["files"] = append(a.names["files"], f.Name)
				}
				a.mu.Unlock()
			case <-ctx.Done():
				return
			}
		}
	}()
	return a.follow(ctx, "files", nil, l)
}

func (a *announcer) listener(t *testing.T, source string) host.Listener {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	l, ok := a.listeners[source]
	if !ok {
		t.Fatalf("nobody listens to %s", source)
	}
	return l
}

func (a *announcer) says(t *testing.T, source, what string) {
	t.Helper()
	a.listener(t, source).Happened(what)
	synctest.Wait()
}

func (a *announcer) ends(source string, err error) {
	a.mu.Lock()
	end := a.end[source]
	a.mu.Unlock()
	end <- err
	synctest.Wait()
}

func (a *announcer) askedTimes(source string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked[source]
}

func (a *announcer) askedFor(source string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.names[source])
}

// fake is a probe of the test's.
type fake struct {
	probes.Common
	name  string
	wakes probes.Wakes
}

func (f fake) Name() string                      { return f.name }
func (f fake) Condition() string                 { return probes.ConditionPrefix + f.name }
func (f fake) Rules() []finding.Rule             { return nil }
func (f fake) Validate() error                   { return nil }
func (f fake) Wakes(probes.Require) probes.Wakes { return f.wakes }
func (f fake) Check(context.Context, probes.Input) (finding.Result, error) {
	return finding.Result{}, nil
}

// rig is a Watcher in a bubble, with what it woke.
type rig struct {
	*Watcher
	host *announcer
	log  *bytes.Buffer

	mu    sync.Mutex
	woken []string
}

func start(t *testing.T, h *announcer, on ...probes.Probe) *rig {
	t.Helper()
	r := &rig{host: h, log: new(bytes.Buffer)}
	r.Watcher = New(h, slog.New(slog.NewTextHandler(r.log, nil)), func(_ context.Context, probe string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.woken = append(r.woken, probe)
	})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	r.Report(engine.Snapshot{Config: &config.Default().Sections, Probes: on})
	synctest.Wait()
	return r
}

// took returns what was woken since it was last asked.
func (r *rig) took() string {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	slices.Sort(r.woken)
	s := strings.Join(r.woken, " ")
	r.woken = nil
	return s
}

func TestEachEventWakesWhomItConcerns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, newAnnouncer(),
			fake{name: "disks", wakes: probes.Wakes{Mounts: true, Subsystems: []string{"block"}, KernelLog: []string{"EXT4-fs"}, Files: []host.FollowedFile{{Name: "/etc/fstab"}}}},
			fake{name: "paths", wakes: probes.Wakes{Units: []string{"multipathd.service"}, Subsystems: []string{"block"}}},
			fake{name: "units", wakes: probes.Wakes{Units: []string{"multipathd.service", "chrony.service"}, UnitFiles: true}},
			fake{name: "time", wakes: probes.Wakes{Clock: true, Units: []string{"chrony.service"}, Processes: []string{"chronyd"}}})
		if got := r.took(); got != "" {
			t.Errorf("the start woke %s", got)
		}
		for _, c := range []struct{ source, what, want string }{
			{"units", "multipathd.service", "paths units"},
			{"units", "chrony.service", "time units"},
			{"units", host.UnitFiles, "units"},
			{"mounts", "/proc/1/mountinfo", "disks"},
			{"uevents", "block", "disks paths"},
			{"log", "EXT4-fs", "disks"},
			{"clock", "the clock", "time"},
			{"files", "/etc/fstab", "disks"},
			{"files", "/etc/other", ""},
		} {
			r.host.says(t, c.source, c.what)
			if got := r.took(); got != c.want {
				t.Errorf("%s %s woke %q, want %q", c.source, c.what, got, c.want)
			}
		}
		if got := r.host.askedFor("units"); !slices.Equal(got, []string{"chrony.service", "multipathd.service"}) {
			t.Errorf("units asked for: %q", got)
		}
		if r.host.askedTimes("processes") != 0 {
			t.Error("processes are followed where units tell of them")
		}
		if got := r.log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `by="units (3), mount table, uevents, kernel log, clock steps, files (1)"`) {
			t.Errorf("the log says:\n%s", got)
		}
	})
}

func TestWhatAProbeCameUponIsFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := fake{name: "oom", wakes: probes.Wakes{Files: []host.FollowedFile{{Name: "/a"}}}}
		r := start(t, newAnnouncer(), p)
		snap := engine.Snapshot{Config: r.config, Probes: []probes.Probe{p}}
		report := func(follow ...string) {
			snap.Reports = []finding.Report{{Probe: "oom", Follow: follow}}
			r.Report(snap)
			synctest.Wait()
		}
		report("/proc/7/oom_score_adj")
		if got := r.host.askedFor("files"); !slices.Equal(got, []string{"/a", "/proc/7/oom_score_adj"}) {
			t.Errorf("followed: %q", got)
		}
		r.host.says(t, "files", "/proc/7/oom_score_adj")
		if got := r.took(); got != "oom" {
			t.Errorf("woke %q", got)
		}
		report("/proc/8/oom_score_adj")
		if got := r.host.askedFor("files"); !slices.Equal(got, []string{"/a", "/proc/8/oom_score_adj"}) {
			t.Errorf("followed: %q", got)
		}
		if got := r.host.askedTimes("files"); got != 1 {
			t.Errorf("the files were followed anew %d times for a change of the list", got-1)
		}
		if got := r.took(); got != "" {
			t.Errorf("another list woke %q: a pass would bring about the next", got)
		}
	})
}

func TestConfigIsFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, newAnnouncer(), fake{name: "units", wakes: probes.Wakes{Units: []string{"a.service"}, Clock: true}})
		cfg := *r.config
		p := fake{name: "units", wakes: probes.Wakes{Units: []string{"a.service", "b.service"}}}
		r.Report(engine.Snapshot{Config: &cfg, Probes: []probes.Probe{p}})
		synctest.Wait()
		if got := r.host.askedFor("units"); !slices.Equal(got, []string{"a.service", "b.service"}) {
			t.Errorf("units asked for: %q", got)
		}
		r.host.mu.Lock()
		_, clock := r.host.listeners["clock"]
		r.host.mu.Unlock()
		if clock {
			t.Error("the clock is still listened to, which nobody wants any more")
		}
		// What happened between the two lists is looked at.
		if got := r.took(); got != "units" {
			t.Errorf("woke %q", got)
		}
	})
}

// A bus that is restarted, a queue that overflows.
func TestLostEventsWake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, newAnnouncer(), fake{name: "a", wakes: probes.Wakes{Units: []string{"a.service"}}}, fake{name: "b", wakes: probes.Wakes{Mounts: true}})
		r.host.ends("units", errors.New("the bus went away"))
		if got := r.took(); got != "" {
			t.Errorf("the end of a source woke %q", got)
		}
		time.Sleep(2 * firstRetry)
		if got := r.took(); got != "a" {
			t.Errorf("its return woke %q", got)
		}
		r.host.says(t, "units", "a.service")
		if got := r.took(); got != "a" {
			t.Errorf("after its return %q", got)
		}
		r.host.listener(t, "mounts").Lost()
		if got := r.took(); got != "a b" {
			t.Errorf("lost events woke %q", got)
		}
		said := r.log.String()
		for _, want := range []string{`level=WARN msg="not followed: what happens there is seen at the interval" source=units error="the bus went away"`, `msg=followed source=units`} {
			if strings.Count(said, want) != 1 {
				t.Errorf("the log lacks %s:\n%s", want, said)
			}
		}
	})
}

func TestSourcesThatAreNotThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newAnnouncer()
		h.absent["units"], h.absent["log"] = host.ErrNoSystemd, fs.ErrPermission
		r := start(t, h, fake{name: "oom", wakes: probes.Wakes{
			Units: []string{"a.service"}, Processes: []string{"chronyd"}, KernelLog: []string{"oom-kill:"},
			WithoutKernelLog: []host.FollowedFile{{Name: "/sys/fs/cgroup/system.slice/memory.events"}},
		}})
		// Others stand in for them.
		r.host.says(t, "processes", "chronyd")
		r.host.says(t, "files", "/sys/fs/cgroup/system.slice/memory.events")
		if got := r.took(); got != "oom oom" {
			t.Errorf("woke %q", got)
		}
		time.Sleep(6 * time.Hour)
		if n := h.askedTimes("units"); n > 6*6+1 {
			t.Errorf("a source that is not there was asked for %d times in six hours", n)
		}
		if said := r.log.String(); strings.Count(said, "systemd is not the init") != 1 {
			t.Errorf("the log says:\n%s", said)
		}
	})
}

// The kernel's iSCSI is loaded with the first session.
func TestISCSIAppears(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newAnnouncer()
		r := start(t, h, fake{name: "iscsi", wakes: probes.Wakes{ISCSI: true, Subsystems: []string{"iscsi_session"}, After: 500 * time.Millisecond, Again: 2 * time.Second}})
		h.mu.Lock()
		delete(h.absent, "iscsi")
		h.mu.Unlock()
		h.says(t, "uevents", "iscsi_session")
		time.Sleep(10 * time.Second)
		r.took()
		// What is announced comes about a moment later.
		for range 4 {
			h.says(t, "iscsi", host.ISCSIErrors)
			time.Sleep(100 * time.Millisecond)
		}
		if got := r.took(); got != "" {
			t.Errorf("woke %q at once", got)
		}
		time.Sleep(101 * time.Millisecond)
		if got := r.took(); got != "iscsi" {
			t.Errorf("woke %q", got)
		}
		// And once more.
		time.Sleep(3 * time.Second)
		if got := r.took(); got != "iscsi" {
			t.Errorf("later woke %q", got)
		}
		time.Sleep(time.Minute)
		if got := r.took(); got != "" {
			t.Errorf("it goes on waking %q", got)
		}
	})
}

// runs notes when each run of the time probe ended.
type runs struct {
	mu sync.Mutex
	n  int
	at []time.Time
}

func (r *runs) Report(s engine.Snapshot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := s.Runs[engine.RunKey{Probe: "time", Result: "error"}]; n > r.n {
		r.n, r.at = n, append(r.at, time.Now())
	}
}

// noClock is a host that can not even tell the time.
type noClock struct{ host.View }

func (noClock) Adjtimex(context.Context) (host.Timex, error) {
	return host.Timex{}, errors.New("no clock")
}
func (noClock) SystemState(context.Context) (string, error) { return "", host.ErrNoSystemd }

// A thousand events a second, for a minute: one run a second comes of it, the
// first one at once, and the last event is followed by a run.
func TestStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := config.Default().Sections
		off := false
		for _, common := range []*probes.Common{&cfg.Probes.Disks.Common, &cfg.Probes.Multipath.Common, &cfg.Probes.ISCSI.Common, &cfg.Probes.PIDs.Common,
			&cfg.Probes.OOM.Common, &cfg.Probes.Packages.Common, &cfg.Probes.Units.Common, &cfg.Probes.Kernel.Common} {
			common.Enabled = &off
		}
		h := newAnnouncer()
		log := slog.New(slog.DiscardHandler)
		var eng *engine.Engine
		var seen runs
		w := New(h, log, func(ctx context.Context, probe string) { eng.Wake(ctx, probe) })
		eng = engine.New(noClock{}, log, nil, &seen, w)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		defer running.Wait()
		defer cancel()
		running.Go(func() { eng.Run(ctx) })
		running.Go(func() { w.Run(ctx) })
		eng.Configure(ctx, &cfg, nil)
		time.Sleep(5 * time.Second)
		seen.mu.Lock()
		seen.at = nil
		seen.mu.Unlock()
		clock := h.listener(t, "clock")
		began := time.Now()
		var last time.Time
		for range 60_000 {
			clock.Happened("the clock")
			last = time.Now()
			time.Sleep(time.Millisecond)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		seen.mu.Lock()
		defer seen.mu.Unlock()
		if n := len(seen.at); n < 59 || n > 62 {
			t.Errorf("%d runs in a minute's storm", n)
		}
		if d := seen.at[0].Sub(began); d > 0 {
			t.Errorf("the first event was followed by a run after %s", d)
		}
		if !seen.at[len(seen.at)-1].After(last) {
			t.Error("no run has followed the last event")
		}
	})
}
