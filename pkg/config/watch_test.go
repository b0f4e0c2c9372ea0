package config

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/hosthygiene/agent/pkg/probes"
)

// watched is one call of onChange.
type watched struct {
	c   *Config
	err error
}

// interval is what the call was about, in one word.
func (w watched) interval(t *testing.T) string {
	t.Helper()
	switch {
	case w.err != nil && w.c == nil:
		return "error"
	case w.err != nil || w.c == nil:
		t.Fatalf("want a config or an error, not %v, %v", w.c, w.err)
	case w.c.Sum == "":
		return "defaults"
	}
	return forNode(t, w.c, nil).Interval.String()
}

// start runs a watcher until the test ends and checks that it ended with it.
func start(t *testing.T, w watcher) (calls chan watched, stop func()) {
	t.Helper()
	calls = make(chan watched, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.run(ctx, func(c *Config, err error) { calls <- watched{c, err} })
	}()
	stop = func() {
		cancel()
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			t.Fatal("the watch goes on after its end")
		}
	}
	t.Cleanup(stop)
	return calls, stop
}

func byEvents(file string) watcher {
	return watcher{file: file, poll: time.Hour, settle: 5 * time.Millisecond, listen: fsnotify.NewWatcher}
}

func byPolling(file string) watcher {
	return watcher{file: file, poll: 5 * time.Millisecond, settle: time.Millisecond, listen: func() (*fsnotify.Watcher, error) {
		return nil, errors.New("too many open files")
	}}
}

func expect(t *testing.T, calls chan watched, want string) {
	t.Helper()
	select {
	case w := <-calls:
		if got := w.interval(t); got != want {
			t.Fatalf("told of %s, want %s (%v)", got, want, w.err)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("never told of %s", want)
	}
}

func quiet(t *testing.T, calls chan watched) {
	t.Helper()
	select {
	case w := <-calls:
		t.Fatalf("told of %s, though nothing changed", w.interval(t))
	case <-time.After(100 * time.Millisecond):
	}
}

func withInterval(d string) []byte {
	return []byte("apiVersion: " + APIVersion + "\nkind: " + Kind + "\ninterval: " + d + "\n")
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// configMap changes a directory the way the kubelet does: a new directory named
// for the time, a symlink ..data_tmp to it renamed onto ..data, the old
// directory removed (kubernetes/pkg/volume/util/atomic_writer.go).
type configMap struct {
	dir string
	n   int
}

func (m *configMap) set(t *testing.T, data []byte) {
	t.Helper()
	old, _ := os.Readlink(filepath.Join(m.dir, "..data"))
	m.n++
	fresh := fmt.Sprintf("..2026_11_21_22_00_00.%d", m.n)
	must(t, os.Mkdir(filepath.Join(m.dir, fresh), 0o755))
	if data != nil {
		must(t, os.WriteFile(filepath.Join(m.dir, fresh, "config.yaml"), data, 0o644))
	}
	must(t, os.Symlink(fresh, filepath.Join(m.dir, "..data_tmp")))
	must(t, os.Rename(filepath.Join(m.dir, "..data_tmp"), filepath.Join(m.dir, "..data")))
	user := filepath.Join(m.dir, "config.yaml")
	if _, err := os.Lstat(user); err != nil && data != nil {
		must(t, os.Symlink(filepath.Join("..data", "config.yaml"), user))
	} else if err == nil && data == nil {
		must(t, os.Remove(user))
	}
	if old != "" {
		must(t, os.RemoveAll(filepath.Join(m.dir, old)))
	}
}

func TestWatchConfigMap(t *testing.T) {
	m := &configMap{dir: t.TempDir()}
	calls, _ := start(t, byEvents(filepath.Join(m.dir, "config.yaml")))
	expect(t, calls, "defaults") // the mount is optional: an empty directory
	m.set(t, withInterval("1s"))
	expect(t, calls, "1s")
	for i := 2; i <= 100; i++ {
		m.set(t, withInterval(fmt.Sprintf("%ds", i)))
		expect(t, calls, probes.Duration(time.Duration(i)*time.Second).String())
	}
	m.set(t, withInterval("100s")) // swapped, with the same content
	quiet(t, calls)
	m.set(t, []byte("interval: 60\n"))
	expect(t, calls, "error")
	m.set(t, withInterval("100s"))
	expect(t, calls, "1m40s")
	m.set(t, nil)
	expect(t, calls, "defaults")
}

// TestWatchBurst: a hundred swaps without a pause may be told as fewer, but the
// last one is told.
func TestWatchBurst(t *testing.T) {
	m := &configMap{dir: t.TempDir()}
	m.set(t, withInterval("1s"))
	calls, _ := start(t, byEvents(filepath.Join(m.dir, "config.yaml")))
	expect(t, calls, "1s")
	for i := 2; i <= 100; i++ {
		m.set(t, withInterval(fmt.Sprintf("%ds", i)))
	}
	for last := ""; last != "1m40s"; {
		select {
		case w := <-calls:
			last = w.interval(t)
		case <-time.After(10 * time.Second):
			t.Fatalf("the last thing told is %q", last)
		}
	}
	quiet(t, calls)
}

func TestWatchPlainFile(t *testing.T) {
	for name, with := range map[string]func(string) watcher{"events": byEvents, "polling": byPolling} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "config.yaml")
			calls, _ := start(t, with(file))
			expect(t, calls, "defaults")
			replace := func(data []byte) { // as editors save
				must(t, os.WriteFile(filepath.Join(dir, ".config.yaml.swp"), data, 0o644))
				must(t, os.Rename(filepath.Join(dir, ".config.yaml.swp"), file))
			}
			replace(withInterval("5s"))
			expect(t, calls, "5s")
			replace([]byte("nonsense"))
			expect(t, calls, "error")
			replace(withInterval("7s"))
			expect(t, calls, "7s")
			must(t, os.Remove(file))
			expect(t, calls, "defaults")
			must(t, os.Mkdir(file, 0o755))
			expect(t, calls, "error")
			must(t, os.Remove(file))
			expect(t, calls, "defaults")
		})
	}
}

// TestWatchDirectoryReplaced: inotify follows the directory that was there; the
// poll finds the one that took its place, and listens to that.
func TestWatchDirectoryReplaced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc")
	file := filepath.Join(dir, "config.yaml")
	w := byEvents(file)
	w.poll = 20 * time.Millisecond
	calls, _ := start(t, w)
	expect(t, calls, "defaults")
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.WriteFile(file, withInterval("5s"), 0o644))
	for last := ""; last != "5s"; { // a half written file may be told before
		last = (<-calls).interval(t)
	}
	must(t, os.RemoveAll(dir))
	expect(t, calls, "defaults")
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "new"), withInterval("6s"), 0o644))
	must(t, os.Rename(filepath.Join(dir, "new"), file))
	expect(t, calls, "6s")
}

// TestWatchLeaksNothing: neither goroutines nor inotify instances.
func TestWatchLeaksNothing(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.yaml")
	before, files := runtime.NumGoroutine(), openFiles(t)
	for range 50 {
		calls, stop := start(t, byEvents(file))
		expect(t, calls, "defaults")
		stop()
	}
	deadline := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > before || openFiles(t) > files {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, before %d; %d open files, before %d", runtime.NumGoroutine(), before, openFiles(t), files)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}
