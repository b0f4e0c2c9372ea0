package host

import (
	"bufio"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestForeignNamespaces(t *testing.T) {
	h := openForeign(t, "")
	ctx := within(t, 20*time.Second)

	for _, name := range []string{"/mnt/only-here", "/mnt/absolute", "/../mnt/absolute"} {
		data, err := h.ReadFile(ctx, name)
		if err != nil || string(data) != "seen\n" {
			t.Errorf("ReadFile(%s) = %q, %v", name, data, err)
		}
	}
	if _, err := os.Stat("/mnt/only-here"); err == nil {
		t.Fatal("the other host's mount is visible here: this test proves nothing")
	}
	if p, err := h.RealPath(ctx, "/mnt/absolute"); p != "/mnt/only-here" || err != nil {
		t.Errorf("RealPath = %q, %v", p, err)
	}

	out, err := h.Run(ctx, Command{argv: []string{"/bin/cat", "/mnt/absolute", "/proc/self/mountinfo"}, timeout: 10 * time.Second})
	if err != nil || out.Code != 0 {
		t.Fatalf("Run: %+v, %v", out, err)
	}
	if text := string(out.Stdout); !strings.HasPrefix(text, "seen\n") || !strings.Contains(text, " /mnt rw,") {
		t.Errorf("the command saw %q", text)
	}
	out, err = h.Run(ctx, Command{argv: []string{"/bin/uname", "-n"}, timeout: 10 * time.Second})
	if err != nil || string(out.Stdout) != "foreign\n" {
		t.Errorf("uname -n = %q, %v", out.Stdout, err)
	}

	for _, tt := range []struct{ network, address string }{
		{"unix", "@host-hygiene-test"},
		{"unix", "/run/stream.sock"},
		{"unix", "/run/../../run/stream.sock"},
		{"udp", "127.0.0.1:323"},
	} {
		c, err := h.Dial(ctx, tt.network, tt.address)
		if err != nil {
			t.Errorf("Dial(%s): %v", tt.address, err)
			continue
		}
		if got := ask(t, c, "hello\n"); got != "hello\n" {
			t.Errorf("%s answered %q", tt.address, got)
		}
		if got := c.RemoteAddr().String(); got != tt.address {
			t.Errorf("RemoteAddr = %s, want %s", got, tt.address)
		}
		c.Close()
	}
	if c, err := net.Dial("unix", "@host-hygiene-test"); err == nil {
		c.Close()
		t.Error("the abstract socket is visible here: this test proves nothing")
	}
}

func ask(t *testing.T, c net.Conn, question string) string {
	t.Helper()
	if _, err := c.Write([]byte(question)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2048)
	n, err := bufio.NewReader(c).Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func TestBoundDatagramClient(t *testing.T) {
	h := openForeign(t, "")
	ctx := within(t, 20*time.Second)
	dir := filepath.Join(h.Path(), "run/chrony")
	clients := func() (names []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != "chronyd.sock" {
				names = append(names, e.Name())
			}
		}
		return names
	}

	c, err := h.Dial(ctx, "unixgram", "/run/chrony/chronyd.sock")
	if err != nil {
		t.Fatal(err)
	}
	mine := clients()
	if len(mine) != 1 {
		t.Fatalf("client sockets: %v", mine)
	}
	// The server sees the name as it is in its own mount namespace.
	if got, want := ask(t, c, "?"), "/run/chrony/"+mine[0]+" -rw-rw-rw-"; got != want {
		t.Errorf("the server sees its client as %q, want %q", got, want)
	}

	// A second client leaves the first alone and sweeps what a killed one left.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	stale := filepath.Join(dir, "host-hygiene-1-1.sock")
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: stale}); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	writeTree(t, dir, map[string]string{"host-hygiene-file.sock": "not ours", "other.sock": "nor this"})
	d, err := h.Dial(ctx, "unixgram", "/run/chrony/chronyd.sock")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(stale); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the stale client socket is still there: %v", err)
	}
	if got := ask(t, c, "?"); !strings.Contains(got, mine[0]) {
		t.Errorf("the first client is gone: %q", got)
	}
	c.Close()
	c.Close()
	d.Close()
	if got := strings.Join(clients(), " "); got != "host-hygiene-file.sock other.sock" {
		t.Errorf("after Close there are %s", got)
	}

	if _, err := h.Dial(ctx, "unixgram", "/run/chrony/"+strings.Repeat("x", 100)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent socket: %v", err)
	}
	if _, err := h.Dial(ctx, "unixgram", "/mnt/only-here"); err == nil {
		t.Error("a regular file was taken for a socket")
	}
}

// TestNoThreadLeaks enters the other host often and looks at every thread
// afterwards: one that stayed behind would later run anything there.
func TestNoThreadLeaks(t *testing.T) {
	h := openForeign(t, "")
	before := threadNamespaces(t)
	if len(before) != 1 {
		t.Fatalf("before the first entry threads are in %d sets of namespaces: %v", len(before), before)
	}
	seen := map[string]bool{}
	for i := range 1000 {
		err := h.ns.do(allNamespaces, func() error {
			if i%100 != 0 {
				return nil
			}
			for _, kind := range []string{"mnt", "net"} {
				// "self" of the other host's /proc is us all the same.
				link, err := os.Readlink("/proc/thread-self/ns/" + kind)
				if err != nil {
					return err
				}
				seen[link] = true
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range []string{"mnt", "net"} {
		ours, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			t.Fatal(err)
		}
		if seen[ours] {
			t.Errorf("an entry stayed in our own %s namespace", kind)
		}
	}
	if len(seen) != 2 {
		t.Errorf("entries were in %v, want one mount and one network namespace", seen)
	}
	inside := 0
	for set, n := range threadNamespaces(t) {
		if before[set] == 0 {
			inside += n
		}
	}
	if inside != 1 {
		t.Errorf("%d threads are kept inside, want 1", inside)
	}
	h.Close()
	var after map[string]int
	eventually(t, "all threads in our own namespaces", func() bool {
		after = threadNamespaces(t)
		for set := range after {
			if before[set] == 0 {
				return false
			}
		}
		return true
	})
	total := 0
	for _, n := range after {
		total += n
	}
	if total > 100 {
		t.Errorf("%d threads are left after 1,000 entries", total)
	}
}

// threadNamespaces counts this process's threads by the namespaces they are in.
func threadNamespaces(t *testing.T) map[string]int {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for _, task := range tasks {
		set := ""
		for _, kind := range []string{"mnt", "net", "ipc", "uts", "cgroup"} {
			link, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/" + kind)
			if err != nil { // the thread has ended
				set = ""
				break
			}
			set += link + " "
		}
		if set != "" {
			count[set]++
		}
	}
	return count
}

func TestHangingEntryIsGivenUp(t *testing.T) {
	h := openForeign(t, "")
	release := make(chan struct{})
	_, err := bound(within(t, 50*time.Millisecond), &h.calls, "a stuck call", nil, func() (struct{}, error) {
		return struct{}{}, h.ns.do(unix.CLONE_NEWNET, func() error { <-release; return nil })
	})
	if !errors.Is(err, ErrNoReply) || !strings.Contains(err.Error(), "a stuck call") {
		t.Errorf("error = %v", err)
	}
	close(release)
	eventually(t, "the call is accounted as back", func() bool {
		h.calls.mu.Lock()
		defer h.calls.mu.Unlock()
		return h.calls.hanging == 0
	})
}

func TestCommandsLeaveThePodsCgroup(t *testing.T) {
	for _, version := range []string{"unified", "legacy"} {
		t.Run(version, func(t *testing.T) {
			h := openForeign(t, version)
			if unified, err := h.isCgroup2(cgroupMount); err != nil || unified != (version == "unified") {
				if version == "legacy" && err == nil {
					t.Skip("needs a machine that still has cgroup v1")
				}
				t.Fatalf("isCgroup2 = %v, %v", unified, err)
			}
			out, err := h.Run(within(t, 10*time.Second), Command{
				// Under v1 the command is moved just after its birth.
				argv: []string{"/bin/sh", "-c", "sleep 0.3; exec cat /proc/self/cgroup"}, timeout: 10 * time.Second})
			if err != nil {
				t.Fatal(err)
			}
			want := "0::/host-hygiene\n"
			if version == "legacy" {
				want = ":memory:/host-hygiene\n"
			}
			if !strings.Contains(string(out.Stdout), want) {
				t.Errorf("the command ran in\n%swant %s", out.Stdout, want)
			}
			dir := filepath.Join(h.Path(), cgroupMount, cgroupName)
			if version == "legacy" {
				dir = filepath.Join(h.Path(), cgroupMount, "memory", cgroupName)
			}
			if _, err := os.Stat(dir); err != nil {
				t.Error(err)
			}
			h.Close()
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Close left the cgroup: %v", err)
			}
		})
	}
}

func TestOpenWithoutHostPID(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
	// In a pod with a PID namespace of its own PID 1 lives where we live, and
	// without privilege it can not be looked at.
	h, err := Open(Options{})
	if err == nil {
		h.Close()
	}
	if !errors.Is(err, ErrNoHostPID) && !errors.Is(err, fs.ErrPermission) {
		t.Errorf("Open in a pod that sees no host: %v", err)
	}
}

// A thread for each call would be one that the host may refuse, which ends the
// program.
func TestThreadsInNamespacesAreKept(t *testing.T) {
	h := openForeign(t, "")
	thread := func(kinds int) (tid int) {
		t.Helper()
		if err := h.ns.do(kinds, func() error { tid = unix.Gettid(); return nil }); err != nil {
			t.Fatal(err)
		}
		return tid
	}
	net := thread(unix.CLONE_NEWNET)
	if other := thread(unix.CLONE_NEWNS); other == net {
		t.Fatal("one thread is in the network namespace and in the mount namespace")
	}
	for range 20 {
		if again := thread(unix.CLONE_NEWNET); again != net {
			t.Fatalf("thread %d, then %d", net, again)
		}
	}
	// What runs there at the same time needs another, which is not kept besides.
	var second, third int
	if err := h.ns.do(unix.CLONE_NEWNET, func() error {
		second = thread(unix.CLONE_NEWNET)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if third = thread(unix.CLONE_NEWNET); second == net || third != second && third != net {
		t.Errorf("threads %d, %d, %d", net, second, third)
	}
	// A call that panics leaves it usable.
	if err := h.ns.do(unix.CLONE_NEWNET, func() error { panic("here") }); err == nil || !strings.Contains(err.Error(), "here") {
		t.Errorf("a panic: %v", err)
	}
	if again := thread(unix.CLONE_NEWNET); again != third {
		t.Errorf("thread %d after a panic, want %d", again, third)
	}
	before := len(threads(t))
	for range 50 {
		if out, err := h.Run(within(t, 10*time.Second), Command{argv: []string{"/bin/true"}, timeout: 10 * time.Second}); err != nil {
			t.Fatalf("Run: %+v, %v", out, err)
		}
	}
	if after := len(threads(t)); after > before+5 {
		t.Errorf("%d threads after 50 commands, %d before", after, before)
	}
}

func threads(t *testing.T) []os.DirEntry {
	t.Helper()
	list, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	return list
}
