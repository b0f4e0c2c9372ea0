package host

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func changeDir(t *testing.T, dir string) *Changer {
	t.Helper()
	return &Changer{openDir(t, dir)}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"etc/a.conf": "old\n", "etc/.a.conf" + tempSuffix: "what a killed agent left\n"})
	c, ctx := changeDir(t, dir), within(t, 20*time.Second)
	want := FileContent{Data: []byte("new\n"), Mode: 0o640, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	if err := c.WriteFile(ctx, "/etc/a.conf", want); err != nil {
		t.Fatal(err)
	}
	got, err := c.Snapshot(ctx, "/etc/a.conf")
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v\n%s", err, diff)
	}
	names, err := os.ReadDir(filepath.Join(dir, "etc"))
	if len(names) != 1 || err != nil {
		t.Errorf("beside it lies %v, %v", names, err)
	}
	if err := c.CreateFile(ctx, "/etc/a.conf", want); !errors.Is(err, fs.ErrExist) {
		t.Errorf("CreateFile over a file: %v", err)
	}
	if err := c.WriteFile(ctx, "/nowhere/a.conf", want); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("WriteFile without a directory: %v", err)
	}
}

// A kernel without SELinux keeps the label of a file all the same, when root sets
// it. The file written in place of another has that one's.
func TestWriteFileKeepsTheLabel(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"etc/a.conf": "old\n"})
	const label = "system_u:object_r:etc_t:s0"
	if err := unix.Setxattr(filepath.Join(dir, "etc/a.conf"), selinuxLabel, []byte(label+"\x00"), 0); errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("labels can not be set here:", err)
	} else if err != nil {
		t.Fatal(err)
	}
	c, ctx := changeDir(t, dir), within(t, 20*time.Second)
	f, err := c.Snapshot(ctx, "/etc/a.conf")
	if err != nil || f.Label != label {
		t.Fatalf("label %q, %v", f.Label, err)
	}
	f.Data = []byte("new\n")
	if err := c.WriteFile(ctx, "/etc/a.conf", f); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Snapshot(ctx, "/etc/a.conf"); got.Label != label || string(got.Data) != "new\n" || err != nil {
		t.Errorf("afterwards label %q, content %q, %v", got.Label, got.Data, err)
	}
}

// A link that leads out of the tree is followed inside it, as a process of the
// host would, and one in the place of the file is not written through.
func TestWriteFileIsConfined(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	writeTree(t, outside, map[string]string{"victim": "safe\n"})
	writeTree(t, dir, map[string]string{"etc/.keep": ""})
	c, ctx := changeDir(t, dir), within(t, 20*time.Second)
	for name, target := range map[string]string{"etc/out": outside, "etc/up": "../../../../../../" + outside, "etc/file": filepath.Join(outside, "victim")} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"/etc/out/victim", "/etc/up/victim", "/../../victim"} {
		err := c.WriteFile(ctx, name, FileContent{Data: []byte("bad\n"), Mode: 0o644, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())})
		if err == nil && !strings.HasPrefix(name, "/..") {
			t.Errorf("%s was written", name)
		}
	}
	if err := c.WriteFile(ctx, "/etc/file", FileContent{Data: []byte("bad\n")}); !errors.Is(err, ErrNotRegular) {
		t.Errorf("WriteFile in the place of a link: %v", err)
	}
	if _, err := c.Snapshot(ctx, "/etc/file"); err == nil {
		t.Error("Snapshot followed a link")
	}
	if data, err := os.ReadFile(filepath.Join(outside, "victim")); string(data) != "safe\n" {
		t.Errorf("what lies outside is now %q, %v", data, err)
	}
}

// TestWriteThroughOthersLinks: the host's own links are followed (/var/run), those
// of a user are not, also when he puts one in the place of his directory while it
// is being written.
func TestWriteThroughOthersLinks(t *testing.T) {
	needsRoot(t)
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"etc/.keep": "", "run/.keep": "", "srv/user/dir/.keep": "", "srv/user/deep/a/b/.keep": ""})
	at := func(name string) string { return filepath.Join(dir, name) }
	link := func(target, name string, uid int) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(at(name)), 0o755), os.Symlink(target, at(name)), os.Lchown(at(name), uid, uid)); err != nil {
			t.Fatal(err)
		}
	}
	link("/run", "var/run", 0)
	link("../../run/../run", "var/spool/again", 0)
	link("loop", "var/loop", 0)
	link("/etc", "srv/user/out", 1000)
	link("../../etc", "srv/user/up", 1000)
	link("/srv/user/out", "var/chain", 0)
	c, ctx := changeDir(t, dir), within(t, time.Minute)
	f := FileContent{Data: []byte("x\n"), Mode: 0o644}
	for name, ok := range map[string]bool{
		"/run/plain": true, "/var/run/through": true, "/var/spool/again/through": true, "/srv/user/deep/a/b/c": true,
		"/srv/user/out/a.conf": false, "/srv/user/up/a.conf": false, "/var/chain/a.conf": false, "/var/loop/a": false, "/etc/.keep/a": false, "/run/none/a": false,
	} {
		err := c.WriteFile(ctx, name, f)
		if (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	if made, err := c.MakeDirs(ctx, "/srv/user/out/new", 0o755); err == nil {
		t.Errorf("made %v", made)
	}
	for _, name := range []string{"run/plain", "run/through"} {
		if _, err := os.Stat(at(name)); err != nil {
			t.Error(err)
		}
	}

	// His directory and his link change places all the time.
	link("/etc", "srv/user/swap", 1000)
	stop := make(chan struct{})
	var swapping sync.WaitGroup
	swapping.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				unix.Renameat2(unix.AT_FDCWD, at("srv/user/dir"), unix.AT_FDCWD, at("srv/user/swap"), unix.RENAME_EXCHANGE)
			}
		}
	})
	written, refused := 0, 0
	for range 3000 {
		if err := c.WriteFile(ctx, "/srv/user/dir/a.conf", f); err == nil {
			written++
		} else {
			refused++
		}
		c.RemoveFile(ctx, "/srv/user/dir/.keep")
	}
	close(stop)
	swapping.Wait()
	t.Logf("%d written, %d refused", written, refused)
	if written == 0 || refused == 0 {
		t.Log("the race was not run this time")
	}
	names, err := os.ReadDir(at("etc"))
	if len(names) != 1 || names[0].Name() != ".keep" || err != nil {
		t.Errorf("/etc holds %v, %v", names, err)
	}
}

func TestMakeDirs(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"etc/.keep": ""})
	c, ctx := changeDir(t, dir), within(t, 20*time.Second)
	made, err := c.MakeDirs(ctx, "/etc/multipath/conf.d", 0o755)
	if diff := cmp.Diff([]string{"/etc/multipath", "/etc/multipath/conf.d"}, made); diff != "" || err != nil {
		t.Fatal(err, diff)
	}
	if again, err := c.MakeDirs(ctx, "/etc/multipath/conf.d", 0o755); len(again) != 0 || err != nil {
		t.Error(again, err)
	}
	if err := c.RemoveDir(ctx, "/etc/multipath"); err == nil {
		t.Error("a directory that is not empty was removed")
	}
	if err := errors.Join(c.RemoveDir(ctx, "/etc/multipath/conf.d"), c.RemoveDir(ctx, "/etc/multipath"), c.RemoveDir(ctx, "/etc/multipath"), c.RemoveFile(ctx, "/etc/no/such")); err != nil {
		t.Error(err)
	}
}

func TestSetOOMScore(t *testing.T) {
	sleep := exec.Command("sleep", "60")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { sleep.Process.Kill(); sleep.Wait() }()
	c, ctx := changeDir(t, "/"), within(t, 20*time.Second)
	procs, err := c.h.Processes(ctx)
	if err != nil && len(procs) == 0 {
		t.Fatal(err)
	}
	var p Process
	for _, q := range procs {
		if q.PID == sleep.Process.Pid {
			p = q
		}
	}
	before, err := c.SetOOMScore(ctx, p.PID, p.StartTicks, 900)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := c.SetOOMScore(ctx, p.PID, p.StartTicks, 901); again != 900 || err != nil {
		t.Errorf("it was %d before, %v (and %d before that)", again, err, before)
	}
	if _, err := c.SetOOMScore(ctx, p.PID, p.StartTicks+1, 902); !errors.Is(err, ErrOtherProcess) {
		t.Errorf("another process of the same number: %v", err)
	}
	if _, err := c.SetOOMScore(ctx, 1, 0, 0); !errors.Is(err, ErrProtectedProcess) {
		t.Errorf("PID 1: %v", err)
	}
	sleep.Process.Kill()
	sleep.Wait()
	if _, err := c.SetOOMScore(ctx, p.PID, p.StartTicks, 903); !errors.Is(err, ErrOtherProcess) {
		t.Errorf("a process that has ended: %v", err)
	}
}

func TestProtectedProcesses(t *testing.T) {
	dir := t.TempDir()
	stat := func(flags string) string {
		return "7 (x) S 1 7 7 0 -1 " + flags + " 0 0 0 0 0 0 0 0 20 0 1 0 100 0 0 0\n"
	}
	writeTree(t, dir, map[string]string{
		"proc/7/stat": stat("4194304"), "proc/7/cgroup": "0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-1.scope\n", "proc/7/oom_score_adj": "0\n",
		"proc/8/stat": strings.Replace(stat("2129984"), "7 (x)", "8 (kworker)", 1), "proc/8/cgroup": "0::/\n", "proc/8/oom_score_adj": "0\n",
	})
	c, ctx := changeDir(t, dir), within(t, 20*time.Second)
	for pid, what := range map[int]string{7: "pod", 8: "kernel thread"} {
		if _, err := c.SetOOMScore(ctx, pid, 100, -1000); !errors.Is(err, ErrProtectedProcess) || !strings.Contains(err.Error(), what) {
			t.Errorf("%d: %v", pid, err)
		}
	}
}

func TestSetSysctl(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"proc/sys/kernel/pid_max": "32768\n", "proc/sys/net/ipv4/conf/eth0.1/forwarding": "0\n", "etc/passwd": "root\n"})
	c, ctx := changeDir(t, dir), within(t, 20*time.Second)
	for _, test := range []struct{ key, value, before string }{
		{"kernel.pid_max", "131072", "32768"},
		{"net/ipv4/conf/eth0.1/forwarding", "1", "0"},
		{"net.ipv4.conf.eth0/1.forwarding", "2", "1"},
	} {
		before, err := c.SetSysctl(ctx, test.key, test.value)
		if before != test.before && !strings.HasPrefix(before, test.before) || err != nil {
			t.Errorf("%s was %q, %v", test.key, before, err)
		}
	}
	for _, key := range []string{"../../etc/passwd", "kernel.no_such", "", "//../../etc/passwd"} {
		if _, err := c.SetSysctl(ctx, key, "x"); err == nil {
			t.Errorf("%q was set", key)
		}
	}
}

func TestJournalEntry(t *testing.T) {
	got := string(journalEntry("a\nPRIORITY=0", map[string]string{"STEP": "x\ny", "AFTER": "1"}))
	want := "MESSAGE=a | PRIORITY=0\nPRIORITY=5\nSYSLOG_IDENTIFIER=host-hygiene\nHYGIENE_AFTER=1\nHYGIENE_STEP=x | y\n"
	if got != want {
		t.Errorf("%q", got)
	}
}

// transientManager takes a transient unit as systemd's own signature demands.
type transientManager struct {
	*fakeManager
	mu         sync.Mutex // calls come on the connection's goroutine
	name, mode string
	props      map[string]dbus.Variant
	exists     bool
}

func (m *transientManager) StartTransientUnit(name, mode string, props []unitProperty, aux []auxUnit) (dbus.ObjectPath, *dbus.Error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.exists {
		return "/", dbus.NewError("org.freedesktop.systemd1.UnitExists", []any{"Unit " + name + " was already loaded"})
	}
	m.name, m.mode, m.props = name, mode, map[string]dbus.Variant{}
	for _, p := range props {
		m.props[p.Name] = p.Value
	}
	return "/org/freedesktop/systemd1/job/1", nil
}

func (m *transientManager) EnableUnitFiles(names []string, runtime, force bool) (bool, []struct{ Type, File, Destination string }, *dbus.Error) {
	return false, nil, nil
}

func TestJobs(t *testing.T) {
	b := newBusHost(t)
	m := &transientManager{}
	b.serve(t, systemdName, func(c *dbus.Conn) {
		m.fakeManager = exportManager(c)
		if err := c.Export(m, systemdPath, systemdManager); err != nil {
			t.Fatal(err)
		}
	})
	c, ctx := &Changer{b.Host}, within(t, 20*time.Second)
	job := Job{Name: JobPrefix + "packages", Description: "d", Argv: []string{"/usr/bin/apt-get", "install", "x"}, Env: []string{"A=b"}, Limit: time.Minute}
	if err := c.StartJob(ctx, job); err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	if m.name != "host-hygiene-packages.service" || m.mode != "fail" {
		t.Errorf("%s, %s", m.name, m.mode)
	}
	for name, want := range map[string]string{
		"Type": `"exec"`, "RemainAfterExit": "true", "RuntimeMaxUSec": "@t 60000000", "StandardOutput": `"journal"`, "Environment": `["A=b"]`,
		"ExecStart": `[["/usr/bin/apt-get", ["/usr/bin/apt-get", "install", "x"], false]]`,
	} {
		if got := m.props[name].String(); got != want {
			t.Errorf("%s = %s, want %s", name, got, want)
		}
	}
	if sig := m.props["ExecStart"].Signature().String(); sig != "a(sasb)" {
		t.Errorf("ExecStart has the type %s", sig)
	}
	m.exists = true
	m.mu.Unlock()
	if err := c.StartJob(ctx, job); !errors.Is(err, ErrJobExists) {
		t.Errorf("a second job of the name: %v", err)
	}
	if j, err := c.Job(ctx, JobPrefix+"packages"); j.Found || err != nil {
		t.Errorf("%+v, %v", j, err)
	}
	for _, bad := range []Job{{Name: "ssh", Argv: job.Argv, Limit: 1}, {Name: job.Name, Argv: []string{"apt"}, Limit: 1}, {Name: job.Name, Argv: job.Argv}} {
		if err := c.StartJob(ctx, bad); err == nil {
			t.Errorf("%+v was started", bad)
		}
	}
	if err := c.EnableUnit(ctx, "static.service"); err == nil || !strings.Contains(err.Error(), "[Install]") {
		t.Errorf("a unit without [Install]: %v", err)
	}
	if err := c.StartUnit(ctx, "-x"); err == nil {
		t.Error("a name that is none was started")
	}
}

func TestDryRunOnly(t *testing.T) {
	for _, argv := range [][]string{
		nil, {"/usr/bin/apt-get"}, {"/usr/bin/apt-get", "install", "x"}, {"/usr/bin/dnf", "install", "--simulate"}, {"/bin/rm", "--dry-run"}, {"zypper", "--dry-run"},
	} {
		if _, err := DryRun(argv, nil); err == nil {
			t.Errorf("%q is let through", argv)
		}
	}
	if _, err := DryRun([]string{"/usr/bin/apt-get", "install", "--simulate", "x"}, nil); err != nil {
		t.Error(err)
	}
}
