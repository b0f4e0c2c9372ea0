package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// heard collects what a source tells.
type heard struct {
	mu     sync.Mutex
	said   []string
	partly []error
	err    error
	ended  chan struct{}
	stop   context.CancelFunc
}

// follow runs a source until the test ends and returns once it listens.
func follow(t testing.TB, source func(context.Context, Listener) error) *heard {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	h := &heard{ended: make(chan struct{}), stop: cancel}
	listening := make(chan struct{})
	note := func(what string) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.said = append(h.said, what)
	}
	go func() {
		defer close(h.ended)
		h.err = source(ctx, Listener{
			Listening: func() { close(listening) },
			Happened:  note,
			Lost:      func() { note("lost") },
			Partly: func(err error) {
				h.mu.Lock()
				defer h.mu.Unlock()
				h.partly = append(h.partly, err)
			},
		})
	}()
	t.Cleanup(func() {
		cancel()
		<-h.ended
	})
	select {
	case <-listening:
	case <-h.ended:
		t.Fatalf("the source ended: %v", h.err)
	case <-time.After(10 * time.Second):
		t.Fatal("the source does not listen")
	}
	return h
}

// all returns what was said so far.
func (h *heard) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.said)
}

// hears does something and waits until it is told.
func (h *heard) hears(t testing.TB, what string, do func()) {
	t.Helper()
	before := len(h.all())
	do()
	eventually(t, "hearing of "+what, func() bool { return slices.Contains(h.all()[before:], what) })
}

// hearsNothing does something of which nothing must be told; mark then does what
// is told, so that the silence in between is known to be one.
func (h *heard) hearsNothing(t testing.TB, do func(), marked string, mark func()) {
	t.Helper()
	time.Sleep(2 * eventPause) // what came before is told
	before := len(h.all())
	do()
	time.Sleep(2 * eventPause)
	mark()
	eventually(t, "the mark "+marked, func() bool { return slices.Contains(h.all()[before:], marked) })
	if got := h.all()[before:]; got[0] != marked || slices.ContainsFunc(got, func(s string) bool { return s != marked }) {
		t.Errorf("told %q", got)
	}
}

// A source ends with its context, and so do the descriptors it had open.
func (h *heard) endsWithContext(t testing.TB) {
	t.Helper()
	h.stop()
	select {
	case <-h.ended:
	case <-time.After(10 * time.Second):
		t.Fatal("it goes on after its context has ended")
	}
	if !errors.Is(h.err, context.Canceled) {
		t.Errorf("it ended with %v", h.err)
	}
}

func command(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

func TestFollowMounts(t *testing.T) {
	needsRoot(t)
	// PID 1 of this host is a process in a mount namespace of its own, in which
	// nobody else mounts anything.
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"proc/1/.keep": ""})
	first := helper(t, "init ", &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS})
	pid := strconv.Itoa(first.Pid)
	at := filepath.Join(dir, "proc/1")
	if err := unix.Mount("/proc/"+pid, at, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	h := openDir(t, dir)
	heard := follow(t, h.FollowMounts)
	inside := func(args ...string) func() {
		return func() { command(t, "nsenter", append([]string{"-t", pid, "-m"}, args...)...) }
	}
	const table = "/proc/1/mountinfo"
	heard.hears(t, table, inside("mount", "-t", "tmpfs", "hygiene", "/run/chrony"))
	heard.hears(t, table, inside("mount", "-o", "remount,ro", "/run/chrony"))
	heard.hearsNothing(t, func() {
		command(t, "unshare", "-m", "mount", "-t", "tmpfs", "hygiene", t.TempDir())
	}, table, inside("umount", "/run/chrony"))
	heard.endsWithContext(t)
}

// ueventOf writes to a uevent file, upon which the kernel sends the event again.
func ueventOf(t testing.TB, device string) func() {
	return func() {
		t.Helper()
		if err := os.WriteFile("/sys/class/"+device+"/uevent", []byte("change"), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// aBlockDevice names one that has a uevent file, as "block/NAME".
func aBlockDevice(t testing.TB) string {
	t.Helper()
	found, _ := filepath.Glob("/sys/class/block/*/uevent")
	if len(found) == 0 {
		t.Skip("no block device here")
	}
	// A loop device that is not in use: a change of it means nothing to anybody.
	i := max(0, slices.IndexFunc(found, func(s string) bool { return strings.Contains(s, "/loop") }))
	return "block/" + filepath.Base(filepath.Dir(found[i]))
}

func openSelf(t testing.TB) *Host {
	t.Helper()
	needsRoot(t)
	return openDir(t, "/")
}

func TestFollowUevents(t *testing.T) {
	h := openSelf(t)
	block := aBlockDevice(t)
	heard := follow(t, func(ctx context.Context, l Listener) error {
		return h.FollowUevents(ctx, []string{"block", "iscsi_session"}, l)
	})
	heard.hears(t, "block", ueventOf(t, block))
	heard.hearsNothing(t, ueventOf(t, "net/lo"), "block", ueventOf(t, block))
	heard.endsWithContext(t)
}

// What a pod's network card makes of events does not even reach the agent, and
// nothing is dropped that could be of interest.
func TestUeventFilter(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	filter := ueventFilter([]string{"block", "iscsi_session"})
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.SetsockoptSockFprog(pair[1], unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program); err != nil {
		t.Fatal(err)
	}
	passes := func(message string) bool {
		t.Helper()
		if err := unix.Send(pair[0], []byte(message), 0); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, ueventMax)
		n, err := unix.Read(pair[1], buf)
		if err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
		if err == nil && string(buf[:n]) != message {
			t.Fatalf("cut to %d bytes", n)
		}
		return err == nil
	}
	for _, action := range []string{"add", "remove", "change", "move", "online", "offline", "bind", "unbind"} {
		for path, want := range map[string]bool{
			"/devices/virtual/net/veth12ab":                    false,
			"/devices/virtual/net/veth12ab/queues/rx-0":        false,
			"/devices/virtual/bdi/0:123":                       false,
			"/devices/virtual/block/dm-3":                      true,
			"/devices/platform/host4/session2/iscsi_session/s": true,
			"/devices/pci0000:00/0000:00:03.0/virtio0/net/e0":  true,
			"/module/iscsi_tcp":                                true,
		} {
			message := action + "@" + path + "\x00ACTION=" + action + "\x00DEVPATH=" + path + "\x00SUBSYSTEM=x\x00SEQNUM=7\x00"
			if got := passes(message); got != want {
				t.Errorf("%s of %s passes: %t, want %t", action, path, got, want)
			}
		}
	}
	if !passes("a-new-action@/devices/virtual/net/lo\x00SUBSYSTEM=net\x00") {
		t.Error("an action that is not known is dropped")
	}
	for subsystem, want := range map[string]bool{"block": true, "iscsi_session": true, "net": false, "queues": false} {
		if got := passes(string(udevMessage(subsystem))); got != want {
			t.Errorf("udev's event of %s passes: %t, want %t", subsystem, got, want)
		}
	}
}

// udevMessage is what udev sends (device-monitor.c, monitor_netlink_header).
func udevMessage(subsystem string) []byte {
	properties := "ACTION=add\x00DEVPATH=/devices/x\x00SUBSYSTEM=" + subsystem + "\x00ID_MODEL=SUBSYSTEM=net\x00"
	m := []byte("libudev\x00")
	m = append(m, 0xfe, 0xed, 0xca, 0xfe)
	for _, n := range []uint32{40, 40, uint32(len(properties))} {
		m = append(m, byte(n), byte(n>>8), byte(n>>16), byte(n>>24))
	}
	hash := murmurHash2(subsystem)
	m = append(m, byte(hash>>24), byte(hash>>16), byte(hash>>8), byte(hash))
	m = append(m, make([]byte, 12)...)
	return append(m, properties...)
}

// The hashes are those libudev 252 puts into its own filter.
func TestMurmurHash2(t *testing.T) {
	for s, want := range map[string]uint32{"block": 0xf0031db7, "iscsi_session": 0xde698179, "net": 0xa74d3cc8, "nvme": 0x51cb194e} {
		if got := murmurHash2(s); got != want {
			t.Errorf("%s: %#x, want %#x", s, got, want)
		}
	}
}

func FuzzParseUevent(f *testing.F) {
	f.Add(udevMessage("block"))
	f.Add([]byte("change@/devices/virtual/block/dm-0\x00ACTION=change\x00DEVPATH=/devices/virtual/block/dm-0\x00SUBSYSTEM=block\x00DM_ACTION=PATH_FAILED\x00"))
	f.Add([]byte("libudev\x00\xfe\xed\xca\xfe"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s := parseUevent(data); strings.ContainsRune(s, 0) {
			t.Errorf("%q", s)
		}
	})
}

func TestParseUevent(t *testing.T) {
	for data, want := range map[string]string{
		string(udevMessage("block")): "block",
		"change@/devices/virtual/block/dm-0\x00ACTION=change\x00SUBSYSTEM=block\x00DM_ACTION=PATH_FAILED\x00": "block",
		"SUBSYSTEM=block\x00":                            "", // no event of the kernel's
		string(udevMessage("block")[:50]):                "",
		"libudev\x00\x00\x00\x00\x00SUBSYSTEM=block\x00": "",
	} {
		if got := parseUevent([]byte(data)); got != want {
			t.Errorf("%.40q: %q, want %q", data, got, want)
		}
	}
}

// An overflow of the socket's buffer is told, and what follows is heard again.
func TestUeventOverflow(t *testing.T) {
	h := openSelf(t)
	block := aBlockDevice(t)
	s, err := h.netlink(t.Context(), unix.NETLINK_KOBJECT_UEVENT, kernelUevents, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for range 200 {
		ueventOf(t, block)()
	}
	heard := follow(t, func(ctx context.Context, l Listener) error {
		l.Listening()
		return s.follow(ctx, l, func(m netlinkMessage) string { return parseUevent(m.data) })
	})
	eventually(t, "the loss", func() bool { return slices.Contains(heard.all(), "lost") })
	heard.hears(t, "block", ueventOf(t, block))
	s.Close()
	<-heard.ended
}

// A process that is not root's may not make us believe in events.
func TestFollowUeventsChecksTheSender(t *testing.T) {
	for _, c := range []struct {
		m    netlinkMessage
		want bool
	}{
		{netlinkMessage{groups: kernelUevents}, true},
		{netlinkMessage{groups: udevUevents, sender: 7}, true},
		{netlinkMessage{groups: udevUevents, sender: 7, uid: 1000}, false},
		{netlinkMessage{groups: kernelUevents, sender: 7}, false},
		{netlinkMessage{groups: udevUevents}, false},
	} {
		if got := c.m.genuineUevent(); got != c.want {
			t.Errorf("%+v: %t", c.m, got)
		}
	}
}

func TestFollowISCSIDoesNotLoadTheModule(t *testing.T) {
	if _, err := os.Stat("/sys/class/iscsi_transport"); err == nil {
		t.Skip("the module is loaded here")
	}
	h := openSelf(t)
	if err := h.FollowISCSI(t.Context(), Listener{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat("/sys/class/iscsi_transport"); err == nil {
		t.Error("asking has loaded the module")
	}
}

func TestFollowKernelLog(t *testing.T) {
	h := openSelf(t)
	if _, err := os.Stat("/dev/kmsg"); err != nil {
		t.Skip(err)
	}
	write := func(text string) func() {
		return func() {
			t.Helper()
			if err := os.WriteFile("/dev/kmsg", []byte("<6>"+text+"\n"), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	write("host-hygiene test: oom-kill: before anybody listens")()
	heard := follow(t, func(ctx context.Context, l Listener) error {
		return h.FollowKernelLog(ctx, []string{"hygiene test: oom-kill:", "hygiene test: EXT4-fs"}, l)
	})
	heard.hears(t, "hygiene test: EXT4-fs", write("host-hygiene test: EXT4-fs error (device none)"))
	heard.hearsNothing(t, write("host-hygiene test: a link is up"), "hygiene test: oom-kill:", write("host-hygiene test: oom-kill:"))
	heard.endsWithContext(t)
}

// The machine's clock is not stepped for a test: that is done on the rig's node.
func TestFollowClock(t *testing.T) {
	h := openDir(t, t.TempDir())
	heard := follow(t, h.FollowClock)
	time.Sleep(2 * eventPause)
	if got := heard.all(); len(got) != 0 {
		t.Errorf("told %q of a clock that goes on", got)
	}
	heard.endsWithContext(t)
}

func TestFollowProcesses(t *testing.T) {
	h := openSelf(t)
	// A name of its own, so that nobody else's processes are followed.
	name := filepath.Join(t.TempDir(), "hygienesleeper")
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip(err)
	}
	data, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, data, 0o755); err != nil {
		t.Fatal(err)
	}
	start := func() *exec.Cmd {
		c := exec.Command(name, "600")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Process.Kill(); c.Wait() })
		return c
	}
	first := start()
	eventually(t, "its name", func() bool {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", first.Process.Pid))
		return strings.TrimSpace(string(comm)) == "hygienesleeper"
	})
	heard := follow(t, func(ctx context.Context, l Listener) error {
		return h.FollowProcesses(ctx, []string{"hygienesleeper"}, l)
	})
	heard.hears(t, "hygienesleeper", func() { first.Process.Kill() })
	first.Wait()
	// The one that is started in its place is followed soon after.
	second := start()
	time.Sleep(lookSoon + time.Second)
	heard.hears(t, "hygienesleeper", func() { second.Process.Kill() })
	heard.endsWithContext(t)
}

// A number that another process has by now does not pass for the process meant.
func TestAwaitExitComparesTheStart(t *testing.T) {
	h := openSelf(t)
	self, err := h.process(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	self.StartTicks--
	if _, err := h.awaitExit(t.Context(), self); !errors.Is(err, errGone) {
		t.Errorf("got %v", err)
	}
}

// BenchmarkUevents is what a storm costs: a thousand events of the kernel, sent
// by another process within a second, read and told.
func BenchmarkUevents(b *testing.B) {
	h := openSelf(b)
	block := aBlockDevice(b)
	heard := follow(b, func(ctx context.Context, l Listener) error { return h.FollowUevents(ctx, []string{"block"}, l) })
	b.ReportAllocs()
	var spent time.Duration
	for b.Loop() {
		storm := exec.Command("/proc/self/exe")
		storm.Env = append(os.Environ(), helperVariable+"=storm /sys/class/"+block+"/uevent")
		var before, after unix.Rusage
		unix.Getrusage(unix.RUSAGE_SELF, &before)
		if out, err := storm.CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		unix.Getrusage(unix.RUSAGE_SELF, &after)
		spent += time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	}
	b.ReportMetric(spent.Seconds()*1e3/float64(b.N), "ms-cpu/1000-events")
	b.ReportMetric(float64(len(heard.all()))/float64(b.N), "told/1000-events")
}

func playStorm(name string) error {
	began := time.Now()
	for i := range 1000 {
		if err := os.WriteFile(name, []byte("change"), 0); err != nil {
			return err
		}
		time.Sleep(time.Until(began.Add(time.Duration(i) * time.Millisecond)))
	}
	return nil
}
