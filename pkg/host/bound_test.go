package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestShareJoinsTheSameCall(t *testing.T) {
	var fl flights
	var calls atomic.Int32
	release := make(chan struct{})
	question := func(ctx context.Context) (int, error) {
		v, _, err := share(ctx, &fl, "x", func() (int, error) {
			calls.Add(1)
			<-release
			return 42, nil
		})
		return v, err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if v, err := question(context.Background()); v != 42 || err != nil {
			t.Errorf("share = %d, %v", v, err)
		}
	})
	eventually(t, "the call has begun", func() bool { return calls.Load() == 1 })
	for range 5 { // each joins it, waits as long as it may, and leaves
		if _, err := question(within(t, 50*time.Millisecond)); !errors.Is(err, ErrNoReply) {
			t.Errorf("a caller who joined: %v", err)
		}
	}
	close(release)
	wg.Wait()
	if n := calls.Load(); n != 1 {
		t.Errorf("%d calls were made for one question", n)
	}
	if v, err := question(context.Background()); v != 42 || err != nil || calls.Load() != 2 {
		t.Errorf("afterwards: %d, %v, %d calls", v, err, calls.Load())
	}
}

func TestHangingCalls(t *testing.T) {
	var fl flights
	release := make(chan struct{})
	var dropped atomic.Int32
	hang := func() (int, error) { <-release; return 1, nil }
	short := func() context.Context { return within(t, 10*time.Millisecond) }

	_, since, err := share(short(), &fl, "mount /a", hang)
	if !errors.Is(err, ErrNoReply) || since.IsZero() || !strings.Contains(err.Error(), "mount /a") {
		t.Fatalf("error = %v, since %v", err, since)
	}
	// What was given up long enough ago is refused at once, with its beginning.
	fl.mu.Lock()
	fl.calls["mount /a"].since = since.Add(-time.Hour)
	fl.mu.Unlock()
	_, again, err := share(context.Background(), &fl, "mount /a", hang)
	if !errors.Is(err, ErrNoReply) || !again.Equal(since.Add(-time.Hour)) {
		t.Errorf("second caller: %v, since %v", err, again)
	}
	for hanging := 1; hanging < maxHanging; {
		_, err := bound(short(), &fl, "call", func(int) { dropped.Add(1) }, hang)
		switch {
		case errors.Is(err, ErrNoReply):
			hanging++
		case errors.Is(err, context.DeadlineExceeded): // a slow machine: over before it began
		default:
			t.Fatalf("call %d: %v", hanging, err)
		}
	}
	if _, err := bound(context.Background(), &fl, "one more", nil, hang); !errors.Is(err, ErrTooManyHanging) || errors.Is(err, ErrNoReply) {
		t.Errorf("beyond the limit: %v", err)
	}
	close(release)
	eventually(t, "values that came too late are disposed of", func() bool { return dropped.Load() == maxHanging-1 })
	if v, err := bound(context.Background(), &fl, "afterwards", nil, hang); v != 1 || err != nil {
		t.Errorf("after all came back: %d, %v", v, err)
	}
}

func TestCancelledCallIsNoSilence(t *testing.T) {
	var fl flights
	release := make(chan struct{})
	defer close(release)
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(10*time.Millisecond, cancel)
	_, err := bound(ctx, &fl, "x", nil, func() (int, error) { <-release; return 0, nil })
	if !errors.Is(err, context.Canceled) || errors.Is(err, ErrNoReply) {
		t.Errorf("error = %v", err)
	}
}

func TestPanicBecomesError(t *testing.T) {
	var fl flights
	_, err := bound(context.Background(), &fl, "x", nil, func() (int, error) { panic("oh") })
	if err == nil || !strings.Contains(err.Error(), "oh") {
		t.Errorf("error = %v", err)
	}
}

// TestDeadFileSystem puts a file system that never answers into the tree: what
// touches it ends with its context, everything else goes on, and all is well
// again once it comes back.
func TestDeadFileSystem(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"etc/hostname": "n1\n"})
	dead := filepath.Join(dir, "data")
	if err := os.Mkdir(dead, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/data/x", filepath.Join(dir, "etc/x")); err != nil {
		t.Fatal(err)
	}
	h := openDir(t, dir)
	revive := deadMount(t, dead)
	short := func() context.Context { return within(t, 50*time.Millisecond) }

	_, err1 := h.ReadFile(short(), "/etc/x")
	_, err2 := h.ReadDir(short(), "/data")
	_, err3 := h.Stat(short(), "/data/x")
	_, err4 := h.Lstat(short(), "/data/x")
	_, err5 := h.RealPath(short(), "/etc/x")
	_, err6 := h.LockHolder(short(), "/data/x")
	_, err7 := h.Dial(short(), "unix", "/data/x")
	for i, err := range []error{err1, err2, err3, err4, err5, err6, err7} {
		if !errors.Is(err, ErrNoReply) {
			t.Errorf("call %d: %v, want ErrNoReply", i+1, err)
		}
	}
	st, err := h.StatMount(short(), "/data")
	if !errors.Is(err, ErrNoReply) || time.Since(st.Pending) > time.Minute {
		t.Errorf("StatMount = %+v, %v", st, err)
	}
	first := st.Pending
	time.Sleep(hangsAfter + 100*time.Millisecond)
	// Whoever waited now would wait until the mount is revived.
	st, err = h.StatMount(context.Background(), "/data")
	if !errors.Is(err, ErrNoReply) || !st.Pending.Equal(first) {
		t.Errorf("second StatMount = %+v, %v, want what began at %v", st, err, first)
	}
	if _, err := h.ReadFile(context.Background(), "/etc/x"); !errors.Is(err, ErrNoReply) {
		t.Errorf("second ReadFile: %v", err)
	}
	if data, err := h.ReadFile(short(), "/etc/hostname"); string(data) != "n1\n" || err != nil {
		t.Errorf("another file: %q, %v", data, err)
	}

	revive()
	eventually(t, "all calls are back", func() bool {
		h.calls.mu.Lock()
		defer h.calls.mu.Unlock()
		h.mounts.mu.Lock()
		defer h.mounts.mu.Unlock()
		h.files.mu.Lock()
		defer h.files.mu.Unlock()
		return h.calls.hanging == 0 && h.mounts.hanging == 0 && len(h.files.hung) == 0 && h.files.active == 0
	})
	if _, err := h.StatMount(short(), "/data"); err == nil || errors.Is(err, ErrNoReply) {
		t.Errorf("StatMount of a broken mount: %v", err)
	}
}

// TestDeadProcfs: who asks second does not queue behind the first.
func TestDeadProcfs(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "proc"), 0o755); err != nil {
		t.Fatal(err)
	}
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	deadMount(t, filepath.Join(dir, "proc"))
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			began := time.Now()
			if _, err := tree.Processes(within(t, 50*time.Millisecond)); !errors.Is(err, ErrNoReply) {
				t.Errorf("Processes: %v", err)
			}
			if d := time.Since(began); d > 2*time.Second {
				t.Errorf("it took %v", d)
			}
		})
	}
	wg.Wait()
}

func TestClosedRoot(t *testing.T) {
	r, err := OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	r.Stat(context.Background(), "/")
	for range 2 {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.Stat(context.Background(), "/"); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestTraceNamesTheLastCall(t *testing.T) {
	dir := t.TempDir()
	h := openDir(t, dir)
	ctx, tr := WithTrace(context.Background())
	for _, tt := range []struct {
		want string
		call func()
	}{
		{"/etc/fstab", func() { h.ReadFile(ctx, "/etc/fstab") }},
		{"adjtimex", func() { h.Adjtimex(ctx) }},
		{"unix @x", func() { h.Dial(ctx, "unix", "@x") }},
		{"/bin/true", func() { h.Run(ctx, Command{argv: []string{"/bin/true"}, timeout: time.Second}) }},
		{"/data", func() { h.StatMount(ctx, "/data") }},
	} {
		tt.call()
		if got := tr.Last(); got != tt.want {
			t.Errorf("Last = %q, want %q", got, tt.want)
		}
	}
}

func BenchmarkReadFile(b *testing.B) {
	dir := b.TempDir()
	writeTree(b, dir, map[string]string{"sys/block/sda/device/state": "running\n"})
	r, err := OpenRoot(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.ReadFile(ctx, "/sys/block/sda/device/state"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRealPath(b *testing.B) {
	r, err := OpenRoot("/")
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.RealPath(ctx, "/sys/class/net/lo"); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkProcesses reads a table of 10,000 processes.
func BenchmarkProcesses(b *testing.B) {
	dir := b.TempDir()
	files := map[string]string{}
	for pid := 1; pid <= 10000; pid++ {
		files[fmt.Sprintf("proc/%d/stat", pid)] = fmt.Sprintf("%d (worker-%d) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 100 0 0 0 "+
			"18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 0\n", pid, pid%100)
	}
	writeTree(b, dir, files)
	r, err := OpenRoot(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	b.ReportAllocs()
	for b.Loop() {
		procs, _, err := r.readProcesses(nil, nil, 0)
		if err != nil || len(procs) != 10000 {
			b.Fatal(len(procs), err)
		}
	}
}
