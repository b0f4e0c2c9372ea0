package watch

import (
	"context"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/host"
)

// A pass over this very machine, with all that can be listened to here: what the
// probes do to find out must wake none of them. The machine has a life of its
// own, so that one quiet pass out of some is asked for; a query that wakes itself
// lets none be quiet.
func TestAPassWakesNobody(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to hear of everything")
	}
	h, err := host.Open(host.Options{})
	if err != nil {
		t.Skip(err)
	}
	defer h.Close()
	cfg := &config.Default().Sections
	cfg.Require.Sysctls = map[string]string{"kernel.pid_max": ">=1"}
	var mu sync.Mutex
	var woken []string
	w := New(h, slog.New(slog.DiscardHandler), func(_ context.Context, probe string) {
		mu.Lock()
		defer mu.Unlock()
		woken = append(woken, probe)
	})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { w.Run(ctx) })
	defer running.Wait()
	defer cancel()
	pass := func() []string {
		snap := engine.Snapshot{Config: cfg, Probes: cfg.Probes.List(), Reports: engine.Once(ctx, h, cfg, nil)}
		w.Report(snap)
		time.Sleep(500 * time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		got := woken
		woken = nil
		return got
	}
	pass() // the first says what is to be followed
	time.Sleep(time.Second)
	var all [][]string
	for range 10 {
		pass()
		if got := pass(); len(got) == 0 {
			w.heardOf(t, cfg)
			return
		} else {
			slices.Sort(got)
			all = append(all, slices.Compact(got))
		}
	}
	t.Errorf("each of %d passes woke somebody: %q", len(all), all)
}

// heardOf: the silence was not that of a source that does not work.
func (w *Watcher) heardOf(t *testing.T, cfg *config.Sections) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range []string{"mount table", ueventSource, kernelLogSource, "clock steps", fileSource} {
		if why, known := w.states[name]; !known || why != "" {
			t.Errorf("%s: %s", name, why)
		}
	}
	if !slices.ContainsFunc(w.plan.list, func(f host.FollowedFile) bool { return strings.HasPrefix(f.Name, "/proc/sys/kernel/pid_max") }) {
		t.Errorf("what the probes came upon is not followed: %v", w.plan.list)
	}
}
