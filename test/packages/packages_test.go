package packages

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/remedy"
)

// pkg is one package of the small repositories.
type pkg struct {
	name, version        string
	depends, conflicts   string
	recommends, postinst string
}

// repository: what plain wants comes along, what is recommended does not; fresh
// needs a library newer than the one installed; rude wants old gone.
func repository() []pkg {
	return []pkg{
		{name: "hyg-plain", version: "1.0"},
		{name: "hyg-lib", version: "1.0"},
		{name: "hyg-lib", version: "2.0"},
		{name: "hyg-user", version: "1.0", depends: "hyg-dep", recommends: "hyg-extra"},
		{name: "hyg-dep", version: "1.0"},
		{name: "hyg-extra", version: "1.0"},
		{name: "hyg-fresh", version: "1.0", depends: "hyg-lib (>= 2.0)"},
		{name: "hyg-rude", version: "1.0", conflicts: "hyg-old"},
		{name: "hyg-old", version: "1.0"},
		{name: "hyg-slow", version: "1.0", postinst: "sleep 300"},
		{name: "hyg-broken", version: "1.0", postinst: "echo it is hopeless >&2; exit 7"},
	}
}

// manager is a package manager and what a test needs of it besides the agent.
type manager struct {
	new       func(t *testing.T) *lab
	installed func(l *lab, name string) bool
	// older installs version 1.0 by the manager's own means.
	older func(l *lab, name string)
	// unknown is what it says of a package that does not exist.
	unknown string
	lock    string
	// pidLock: the lock is a file with a PID.
	pidLock bool
}

func managers() map[string]manager {
	rpmq := func(l *lab, name string) bool {
		return l.command([]string{"/usr/bin/rpm", "-q", name}, nil).Run() == nil
	}
	rpmi := func(l *lab, name string) {
		l.must("/usr/bin/rpm", "--force-debian", "--nodeps", "-i", "/repo/"+name+"-1.0-1.noarch.rpm")
	}
	return map[string]manager{
		"apt": {
			new: newAptLab,
			installed: func(l *lab, name string) bool {
				out, _ := l.command([]string{"/usr/bin/dpkg-query", "-W", "-f", "${db:Status-Abbrev}", name}, nil).Output()
				return strings.HasPrefix(string(out), "ii")
			},
			older:   func(l *lab, name string) { l.must("/usr/bin/dpkg", "-i", "/repo/"+name+"_1.0.deb") },
			unknown: "Unable to locate package no-such-thing",
			lock:    "/var/lib/dpkg/lock-frontend",
		},
		"dnf":    {new: newDnfLab, installed: rpmq, older: rpmi, unknown: "no-such-thing", lock: "/var/lib/dnf/rpmdb_lock.pid", pidLock: true},
		"zypper": {new: newZypperLab, installed: rpmq, older: rpmi, unknown: "no-such-thing", lock: "/run/zypp.pid", pidLock: true},
	}
}

func each(t *testing.T, test func(t *testing.T, m manager, l *lab)) {
	for name, m := range managers() {
		t.Run(name, func(t *testing.T) { test(t, m, m.new(t)) })
	}
}

func TestInstall(t *testing.T) {
	each(t, func(t *testing.T, m manager, l *lab) {
		if res := l.repair("hyg-plain", "hyg-user"); res.Outcome != remedy.Confirmed {
			t.Fatalf("%s: %s\n%s", res.Outcome, res.Message, strings.Join(res.Output, "\n"))
		}
		for name, want := range map[string]bool{"hyg-plain": true, "hyg-user": true, "hyg-dep": true, "hyg-extra": false} {
			if got := m.installed(l, name); got != want {
				t.Errorf("%s installed: %v, want %v", name, got, want)
			}
		}
		if plan, _ := l.plan(requires("hyg-plain", "hyg-user")); len(plan.Steps) != 0 {
			t.Errorf("the second plan is not empty: %+v", plan.Steps)
		}
	})
}

func TestPartlyInstalled(t *testing.T) {
	each(t, func(t *testing.T, m manager, l *lab) {
		m.older(l, "hyg-lib") // 2.0 is there too, and must not come
		if res := l.repair("hyg-lib", "hyg-plain"); res.Outcome != remedy.Confirmed {
			t.Fatalf("%s: %s\n%s", res.Outcome, res.Message, strings.Join(res.Output, "\n"))
		}
		if !m.installed(l, "hyg-plain") {
			t.Error("what was missing was not installed")
		}
		for _, argv := range l.ran {
			if strings.Contains(argv, "hyg-lib") {
				t.Errorf("what is installed was asked for again: %s", argv)
			}
		}
		version := l.command([]string{"/bin/sh", "-c", "dpkg-query -W -f '${Version}' hyg-lib || rpm -q --qf '%{VERSION}' hyg-lib"}, nil)
		if out, _ := version.Output(); !strings.HasPrefix(string(out), "1.0") {
			t.Errorf("hyg-lib is %s now: it was upgraded", out)
		}
	})
}

func TestUnknownPackage(t *testing.T) {
	each(t, func(t *testing.T, m manager, l *lab) {
		res := l.repair("no-such-thing")
		if res.Outcome != remedy.Failed || !strings.Contains(res.Message, m.unknown) || len(res.Output) == 0 {
			t.Fatalf("%s: %s\n%s", res.Outcome, res.Message, strings.Join(res.Output, "\n"))
		}
		again := l.repair("no-such-thing")
		if again.Outcome != remedy.Skipped || !strings.Contains(again.Message, "is not tried again before") {
			t.Errorf("it is tried again at once: %s: %s", again.Outcome, again.Message)
		}
	})
}

func TestRefusesUpgrade(t *testing.T) {
	each(t, func(t *testing.T, m manager, l *lab) {
		m.older(l, "hyg-lib")
		res := l.repair("hyg-fresh")
		if res.Outcome != remedy.Failed || !strings.Contains(res.Message, "not only add packages") || !strings.Contains(res.Message, "hyg-lib") {
			t.Fatalf("%s: %s\n%s", res.Outcome, res.Message, strings.Join(res.Output, "\n"))
		}
		if m.installed(l, "hyg-fresh") {
			t.Error("it was installed all the same")
		}
	})
}

func TestRefusesRemoval(t *testing.T) {
	each(t, func(t *testing.T, m manager, l *lab) {
		m.older(l, "hyg-old")
		res := l.repair("hyg-rude")
		if res.Outcome != remedy.Failed {
			t.Fatalf("%s: %s\n%s", res.Outcome, res.Message, strings.Join(res.Output, "\n"))
		}
		if !m.installed(l, "hyg-old") || m.installed(l, "hyg-rude") {
			t.Error("hyg-old was removed for it")
		}
		t.Log(res.Message)
	})
}

func TestLockHeld(t *testing.T) {
	each(t, func(t *testing.T, m manager, l *lab) {
		l.must("/bin/mkdir", "-p", filepath.Dir(m.lock))
		release := holdLock(t, l, m)
		go func() {
			time.Sleep(3 * time.Second)
			release()
		}()
		began := time.Now()
		if res := l.repair("hyg-plain"); res.Outcome != remedy.Confirmed {
			t.Fatalf("%s: %s\n%s", res.Outcome, res.Message, strings.Join(res.Output, "\n"))
		}
		if waited := time.Since(began); waited < 2*time.Second {
			t.Errorf("it did not wait for the lock: %s", waited)
		}
	})
}

func TestLockNeverFree(t *testing.T) {
	each(t, func(t *testing.T, m manager, l *lab) {
		l.must("/bin/mkdir", "-p", filepath.Dir(m.lock))
		defer holdLock(t, l, m)()
		require := requires("hyg-plain")
		plan, facts := l.plan(require)
		a := l.applier()
		a.LockWait = time.Second
		record, err := a.Apply(context.Background(), plan, facts)
		if err != nil {
			t.Fatal(err)
		}
		res := record.Results[0]
		if res.Outcome != remedy.Failed || !strings.Contains(res.Message, `"sleep" (PID `) || !strings.Contains(res.Message, m.lock) {
			t.Errorf("%s: %s", res.Outcome, res.Message)
		}
		if len(l.ran) != 0 {
			t.Errorf("it ran %q all the same", l.ran)
		}
	})
}

// holdLock has a sleep(1) hold the manager's lock: the lock of an open file
// passes from the test to it through a PID file, or it is a record lock that the
// test binary, which plays the holder, takes before it becomes sleep.
func holdLock(t *testing.T, l *lab, m manager) (release func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "HOLD="+l.path(m.lock))
	if m.pidLock {
		cmd = exec.Command("sleep", "60")
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if m.pidLock {
		l.write(m.lock, fmt.Sprintln(cmd.Process.Pid), 0o644)
	} else {
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			held, err := l.LockHolder(context.Background(), m.lock)
			comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
			if err == nil && held.Held && string(comm) == "sleep\n" {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the lock is not held", err)
			}
		}
	}
	done := make(chan struct{})
	return func() {
		select {
		case <-done:
			return
		default:
			close(done)
		}
		cmd.Process.Kill()
		cmd.Wait()
	}
}

func TestMain(m *testing.M) {
	if name := os.Getenv("HOLD"); name != "" {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o640)
		if err != nil {
			panic(err)
		}
		if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
			panic(err)
		}
		// A record lock belongs to the process and outlives execve(2), as long
		// as its file stays open.
		unix.FcntlInt(f.Fd(), unix.F_SETFD, 0)
		sleep, err := exec.LookPath("sleep")
		if err == nil {
			err = syscall.Exec(sleep, []string{"sleep", "60"}, nil)
		}
		panic(err)
	}
	os.Exit(m.Run())
}

// TestInterrupted kills apt and dpkg in the middle of a configuration: the next
// plan has dpkg finish first, and only where packages may be changed.
func TestInterrupted(t *testing.T) {
	l := newAptLab(t)
	a := l.applier()
	ctx, cancel := context.WithCancel(context.Background())
	plan, facts := l.plan(requires("hyg-slow"))
	done := make(chan *remedy.Record, 1)
	go func() {
		record, _ := a.Apply(ctx, plan, facts)
		done <- record
	}()
	var pid int
	for deadline := time.Now().Add(60 * time.Second); pid == 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the package's script never ran")
		}
		l.mu.Lock()
		if j := l.jobs["host-hygiene-packages"]; j != nil && strings.Contains(j.out.String(), "Setting up hyg-slow") {
			pid = j.cmd.Process.Pid
		}
		l.mu.Unlock()
	}
	time.Sleep(200 * time.Millisecond)
	// The agent ends first; the job goes on.
	cancel()
	if record := <-done; record == nil || record.Results[0].Outcome != remedy.Started {
		t.Fatalf("an agent that is stopped while a job runs notes %+v", record)
	}
	if j, _ := a.Changer.Job(context.Background(), "host-hygiene-packages"); !j.Running {
		t.Fatal("the job ended with the agent")
	}
	unix.Kill(-pid, unix.SIGKILL)
	// The next agent notes what came of it.
	if err := a.Resume(context.Background()); err != nil {
		t.Fatal(err)
	}
	_, facts = l.plan(requires("hyg-slow"))
	if last := facts.Past[len(facts.Past)-1]; last.Outcome != remedy.Failed || !strings.Contains(strings.Join(last.Output, "\n"), "Setting up hyg-slow") {
		t.Errorf("the end of the job was noted as %s: %s\n%q", last.Outcome, last.Message, last.Output)
	}
	// It sleeps no more.
	l.write("/var/lib/dpkg/info/hyg-slow.postinst", "#!/bin/sh\nexit 0\n", 0o755)
	report := l.check(requires("hyg-plain"))
	for _, f := range report.Findings {
		t.Log(f)
	}
	if res := l.repair("hyg-plain"); res.Outcome != remedy.Confirmed {
		t.Fatalf("%s: %s\n%s", res.Outcome, res.Message, strings.Join(res.Output, "\n"))
	}
	if out := l.must("/usr/bin/dpkg", "--audit"); strings.Contains(out, "hyg-slow") {
		t.Errorf("dpkg was not finished:\n%s", out)
	}
}

// TestFailingScript: what the package's own script says is in the result.
func TestFailingScript(t *testing.T) {
	l := newAptLab(t)
	res := l.repair("hyg-broken")
	if res.Outcome != remedy.Failed || !strings.Contains(strings.Join(res.Output, "\n"), "it is hopeless") {
		t.Errorf("%s: %s\n%q", res.Outcome, res.Message, res.Output)
	}
}

// TestPlanWritesNothing: not a byte of the tree changes, the dry run included.
func TestPlanWritesNothing(t *testing.T) {
	each(t, func(t *testing.T, m manager, l *lab) {
		// Who looks at repositories for the first time may fetch their lists.
		first, _ := l.plan(requires("hyg-plain"))
		simulate(t, l, first)
		before := l.hash()
		plan, _ := l.plan(requires("hyg-plain", "hyg-user"))
		simulate(t, l, plan)
		if len(plan.Pending()) == 0 {
			t.Fatal("nothing was planned")
		}
		for name, sum := range l.hash() {
			// dnf writes its log whatever it is told; it is the dry run's own.
			if strings.HasPrefix(name, "/var/log/dnf") || strings.HasPrefix(name, "/var/log/hawkey") {
				delete(before, name)
				continue
			}
			if before[name] != sum {
				t.Errorf("plan changed %s", name)
			}
			delete(before, name)
		}
		for name := range before {
			t.Errorf("plan removed %s", name)
		}
	})
}

func simulate(t *testing.T, l *lab, plan remedy.Plan) {
	t.Helper()
	for i := range plan.Steps {
		if err := plan.Steps[i].Simulate(context.Background(), l); err != nil {
			t.Fatal(err)
		}
	}
}

// hash of everything that differs from this machine's own tree.
func (l *lab) hash() map[string]string {
	l.t.Helper()
	sums := map[string]string{}
	upper := filepath.Join(filepath.Dir(l.root), "upper")
	err := filepath.WalkDir(upper, func(name string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(name, upper)
		info, err := d.Info()
		if err != nil {
			return err
		}
		sum := fmt.Sprint(info.Mode())
		if d.Type().IsRegular() {
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			sum += fmt.Sprintf(" %x", sha256.Sum256(data))
		}
		sums[rel] = sum
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return sums
}

func newAptLab(t *testing.T) *lab {
	l := newLab(t, "apt-get", "dpkg-deb")
	l.os = host.OS{ID: "debian", Class: host.Mutable, Init: "systemd", BootID: "lab"}
	l.must("/bin/sh", "-c", "rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/* /var/lib/apt/lists/* /etc/apt/apt.conf.d/*proxy*")
	var index strings.Builder
	for _, p := range repository() {
		dir := "/build/" + p.name
		control := fmt.Sprintf("Package: %s\nVersion: %s\nArchitecture: all\nMaintainer: Lab <lab@example.org>\nDescription: of a test\n", p.name, p.version)
		for field, value := range map[string]string{"Depends": p.depends, "Conflicts": p.conflicts, "Recommends": p.recommends} {
			if value != "" {
				control += field + ": " + value + "\n"
			}
		}
		l.write(dir+"/DEBIAN/control", control, 0o644)
		if p.postinst != "" {
			l.write(dir+"/DEBIAN/postinst", "#!/bin/sh\n"+p.postinst+"\n", 0o755)
		}
		file := fmt.Sprintf("/repo/%s_%s.deb", p.name, p.version)
		l.must("/bin/mkdir", "-p", "/repo")
		l.must("/usr/bin/dpkg-deb", "--root-owner-group", "--build", dir, file)
		data, err := os.ReadFile(l.path(file))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&index, "%sFilename: .%s\nSize: %d\nSHA256: %x\n\n", control, strings.TrimPrefix(file, "/repo"), len(data), sha256.Sum256(data))
		l.must("/bin/rm", "-r", dir)
	}
	l.write("/repo/Packages", index.String(), 0o644)
	l.write("/etc/apt/sources.list", "deb [trusted=yes] file:/repo ./\n", 0o644)
	// The lab's _apt user may not be able to read the repository.
	l.write("/etc/apt/apt.conf.d/99lab", `APT::Sandbox::User "root";`+"\n", 0o644)
	l.must("/usr/bin/apt-get", "update")
	return l
}

// newRPMRepository builds the packages with rpmbuild.
func newRPMRepository(t *testing.T, l *lab) {
	t.Helper()
	// Debian keeps rpm's database in the home of whoever asks, and says so with
	// each package that comes.
	l.write("/etc/rpm/macros.lab", "%_dbpath /var/lib/rpm\n", 0o644)
	l.must("/bin/sh", "-c", "rm -rf /var/lib/rpm/* /usr/lib/sysimage/rpm; mkdir -p /repo /var/lib/rpm; rpm --initdb")
	for _, p := range repository() {
		spec := fmt.Sprintf("Name: %s\nVersion: %s\nRelease: 1\nSummary: of a test\nLicense: none\nBuildArch: noarch\n", p.name, p.version)
		if p.depends != "" {
			spec += "Requires: " + strings.NewReplacer("(", "", ")", "").Replace(p.depends) + "\n"
		}
		if p.conflicts != "" {
			// To rpm, a conflict is an error; what obsoletes is what removes.
			spec += "Obsoletes: " + p.conflicts + "\n"
		}
		if p.recommends != "" {
			spec += "Recommends: " + p.recommends + "\n"
		}
		spec += "%description\nof a test\n%files\n"
		if p.postinst != "" {
			spec += "%post\n" + p.postinst + "\n"
		}
		l.write("/build/p.spec", spec, 0o644)
		l.must("/usr/bin/rpmbuild", "-bb", "--define", "_rpmdir /repo", "--define", "_rpmfilename %{NAME}-%{VERSION}-%{RELEASE}.noarch.rpm", "/build/p.spec")
	}
	l.must("/usr/bin/createrepo_c", "--no-database", "/repo")
}

func newDnfLab(t *testing.T) *lab {
	l := newLab(t, "dnf", "rpmbuild", "createrepo_c")
	l.os = host.OS{ID: "fedora", VersionID: "42", Class: host.Mutable, Init: "systemd", BootID: "lab"}
	newRPMRepository(t, l)
	l.must("/bin/sh", "-c", "rm -rf /etc/yum.repos.d /etc/dnf/repos.d /var/cache/dnf")
	l.write("/etc/yum.repos.d/lab.repo", "[lab]\nname=lab\nbaseurl=file:///repo\ngpgcheck=0\nenabled=1\nmetadata_expire=never\n", 0o644)
	return l
}

func newZypperLab(t *testing.T) *lab {
	l := newLab(t, "zypper", "rpmbuild", "createrepo_c")
	l.os = host.OS{ID: "opensuse-leap", VersionID: "15.6", Class: host.Mutable, Init: "systemd", BootID: "lab"}
	newRPMRepository(t, l)
	l.must("/bin/sh", "-c", "rm -rf /etc/zypp/repos.d /var/cache/zypp")
	l.write("/etc/zypp/repos.d/lab.repo", "[lab]\nname=lab\nbaseurl=file:///repo\ngpgcheck=0\nenabled=1\nautorefresh=0\n", 0o644)
	return l
}
