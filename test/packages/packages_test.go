//go:build cluster

// Package packages holds the packages probe against the real dpkg and rpm, each
// with a database of its own in a folder of the test.
package packages

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// machine is a folder that looks like a host, with this machine's kernel and rpm.
type machine struct {
	*host.Tree
	dir     string
	os      host.OS
	self    *host.Tree
	queries int
	memory  *probes.Memory
}

func newMachine(t *testing.T, id string) *machine {
	t.Helper()
	m := &machine{dir: t.TempDir(), os: host.OS{ID: id, Class: host.Mutable, Init: "systemd", BootTime: time.Now().Add(-time.Hour)}, memory: probes.NewMemory()}
	for dir, tree := range map[string]**host.Tree{m.dir: &m.Tree, "/": &m.self} {
		opened, err := host.OpenTree(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { opened.Close() })
		*tree = opened
	}
	return m
}

func (m *machine) OS(context.Context) (host.OS, error) { return m.os, nil }

func (m *machine) Processes(ctx context.Context) ([]host.Process, error) {
	return m.self.Processes(ctx)
}

// LockHolder asks the kernel, as the live host does.
func (m *machine) LockHolder(_ context.Context, name string) (host.Lock, error) {
	f, err := os.Open(filepath.Join(m.dir, name))
	if err != nil {
		return host.Lock{}, err
	}
	defer f.Close()
	lk := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &lk); err != nil {
		return host.Lock{}, err
	}
	return host.Lock{Held: lk.Type != unix.F_UNLCK, PID: int(lk.Pid)}, nil
}

const rpmDB = "/usr/lib/sysimage/rpm"

// Run runs the probe's command with the folder's database.
func (m *machine) Run(ctx context.Context, c host.Command) (host.Output, error) {
	m.queries++
	argv := c.Argv()
	cmd := exec.CommandContext(ctx, "rpm", append([]string{"--dbpath", m.dir + rpmDB}, argv[1:]...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return host.Output{}, err
	}
	return host.Output{Stdout: stdout.Bytes(), Stderr: stderr.Bytes(), Code: cmd.ProcessState.ExitCode()}, nil
}

// check makes a pass and returns "Reason subject" of what it found.
func (m *machine) check(t *testing.T, packages ...string) (finding.Result, []string, error) {
	t.Helper()
	in := probes.Input{Host: m, Now: time.Now(), Memory: m.memory}
	for _, p := range packages {
		in.Require.Packages = append(in.Require.Packages, probes.RequiredPackage{Name: p})
	}
	m.memory.Begin()
	r, err := probes.DefaultPackages().Check(t.Context(), in)
	var told []string
	for _, f := range r.Findings {
		told = append(told, f.Reason+" "+f.Subject)
	}
	return r, told, err
}

func (m *machine) expect(t *testing.T, when, want string, packages ...string) finding.Result {
	t.Helper()
	r, told, err := m.check(t, packages...)
	if err != nil {
		t.Errorf("%s: %v", when, err)
	}
	if got := strings.Join(told, ", "); got != want {
		t.Errorf("%s: found %q, want %q\n%v", when, got, want, r.Findings)
	}
	return r
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}

func write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// waitFor returns once a maintainer script has made the file.
func waitFor(t *testing.T, name string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(name); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s did not appear", name)
		}
	}
}

// deb builds a package whose postinst says that it runs and then waits.
func deb(t *testing.T, name, postinst string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, dir+"/DEBIAN/control", "Package: "+name+"\nVersion: 1.0\nArchitecture: all\nMaintainer: x <x@x>\nProvides: virtual-"+name+"\nDescription: test\n", 0o644)
	write(t, dir+"/DEBIAN/postinst", "#!/bin/sh\n"+postinst+"\n", 0o755)
	out := t.TempDir() + "/" + name + ".deb"
	command(t, "dpkg-deb", "--build", dir, out)
	return out
}

// dpkg runs on the folder; its scripts run outside, as there is no shell inside.
func (m *machine) dpkg(args ...string) *exec.Cmd {
	cmd := exec.Command("dpkg", append([]string{"--root=" + m.dir, "--force-script-chrootless", "--log=/dev/null"}, args...)...)
	// A killed dpkg must take its script with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

func TestDpkg(t *testing.T) {
	m := newMachine(t, "debian")
	write(t, m.dir+"/var/lib/dpkg/status", "", 0o644)
	for _, d := range []string{"info", "updates", "triggers"} {
		if err := os.MkdirAll(m.dir+"/var/lib/dpkg/"+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := m.dpkg("-i", deb(t, "quick", "true")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m.expect(t, "installed", "", "quick", "virtual-quick")
	m.expect(t, "another is required", "PackageMissing slow", "quick", "slow")

	started := filepath.Join(t.TempDir(), "started")
	run := m.dpkg("-i", deb(t, "slow", fmt.Sprintf("touch %s; sleep 600", started)))
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	killed := false
	kill := func() {
		if !killed {
			killed = true
			syscall.Kill(-run.Process.Pid, syscall.SIGKILL)
			run.Wait()
		}
	}
	t.Cleanup(kill)
	waitFor(t, started)
	if r := m.expect(t, "dpkg is at work", "", "quick", "slow"); !strings.Contains(r.Summary, "dpkg is at work") {
		t.Errorf("the summary does not say so: %s", r.Summary)
	}
	p := probes.DefaultPackages()
	p.LockHeldFor = 1
	r, err := p.Check(t.Context(), probes.Input{Host: m, Now: time.Now().Add(time.Second), Memory: m.memory})
	if err != nil || len(r.Findings) != 1 || !strings.Contains(r.Findings[0].Message, fmt.Sprintf("dpkg (PID %d)", run.Process.Pid)) {
		t.Errorf("who holds the lock: %v, %v", r.Findings, err)
	}

	kill()
	m.expect(t, "dpkg was killed", "PackageManagerBroken dpkg, PackageMissing slow", "quick", "slow")
	// dpkg reads and folds its journal as it starts, then removes what is half there.
	if out, err := m.dpkg("--purge", "--force-remove-reinstreq", "slow").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m.expect(t, "put right", "", "quick")
}

func TestRPM(t *testing.T) {
	m := newMachine(t, "rocky")
	db := m.dir + rpmDB
	if err := os.MkdirAll(db, 0o755); err != nil {
		t.Fatal(err)
	}
	rpm := func(args ...string) *exec.Cmd {
		return exec.Command("rpm", append([]string{"--dbpath", db, "--nodeps"}, args...)...)
	}
	if out, err := exec.Command("rpm", "--dbpath", db, "--initdb").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	started := filepath.Join(t.TempDir(), "started")
	proceed := filepath.Join(t.TempDir(), "proceed")
	top := t.TempDir()
	write(t, top+"/nfs.spec", fmt.Sprintf(`Name: nfs-utils
Version: 1.0
Release: 1
Summary: t
License: x
BuildArch: noarch
Provides: an-nfs-client
%%description
t
%%post
touch %s
while [ ! -e %s ]; do sleep 0.1; done
%%files
`, started, proceed), 0o644)
	command(t, "rpmbuild", "--define", "_topdir "+top, "-bb", top+"/nfs.spec")

	m.expect(t, "an empty database", "PackageMissing nfs, PackageMissing an-nfs-client", "nfs", "an-nfs-client")
	before := m.queries
	m.expect(t, "the same again", "PackageMissing nfs, PackageMissing an-nfs-client", "nfs", "an-nfs-client")
	if m.queries != before {
		t.Errorf("an unchanged database cost %d commands", m.queries-before)
	}

	install := rpm("-i", top+"/RPMS/noarch/nfs-utils-1.0-1.noarch.rpm")
	if err := install.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { install.Process.Kill() })
	waitFor(t, started)
	r, _, err := m.check(t, "nfs", "an-nfs-client")
	if err != nil || !strings.Contains(r.Summary, "rpm is at work") {
		t.Errorf("in a transaction: %q, %v", r.Summary, err)
	}
	write(t, proceed, "", 0o644)
	if err := install.Wait(); err != nil {
		t.Fatal(err)
	}
	m.expect(t, "installed", "", "nfs", "an-nfs-client")
	before = m.queries
	m.expect(t, "still installed", "", "nfs", "an-nfs-client")
	if m.queries != before {
		t.Errorf("an unchanged database cost %d commands: a query changes what is compared", m.queries-before)
	}

	for _, f := range []string{"-wal", "-shm"} {
		if err := os.Remove(db + "/rpmdb.sqlite" + f); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	write(t, db+"/rpmdb.sqlite", strings.Repeat("not a database ", 1000), 0o644)
	if _, told, err := m.check(t, "nfs", "an-nfs-client"); err == nil || strings.Join(told, ", ") != "PackageManagerBroken rpm" {
		t.Errorf("a damaged database: found %q, error %v", told, err)
	}
}
