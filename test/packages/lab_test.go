// Package packages proves repairs with the real package managers: apt, dnf and
// zypper run the very commands of a plan on a copy-on-write image of this
// machine's own tree, with a small repository made on the spot. No network is
// asked.
package packages

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/remedy"
)

// lab is a host of which only the tree is real: its commands run in a chroot,
// and its jobs are processes of the test. What systemd does with them is proven
// on the real node.
type lab struct {
	*host.Tree
	t    *testing.T
	root string
	os   host.OS

	mu   sync.Mutex
	jobs map[string]*labJob
	ran  []string // the argv of every job
}

type labJob struct {
	host.JobState
	out  bytes.Buffer
	cmd  *exec.Cmd
	done chan struct{}
}

// newLab mounts the image. programs must be on this machine.
func newLab(t *testing.T, programs ...string) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount and chroot")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: hack/setup.sh installs it", p)
		}
	}
	dir := t.TempDir()
	mount := func(source, target, kind string, flags uintptr, data string) {
		t.Helper()
		if err := os.MkdirAll(target, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(source, target, kind, flags, data); err != nil {
			t.Skipf("needs a kernel that mounts %s here: %v", kind, err)
		}
		t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
	}
	mount("lab", dir, "tmpfs", 0, "")
	for _, sub := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root := filepath.Join(dir, "root")
	mount("lab", root, "overlay", 0, fmt.Sprintf("lowerdir=/,upperdir=%s/upper,workdir=%s/work", dir, dir))
	mount("proc", filepath.Join(root, "proc"), "proc", 0, "")
	mount("/dev", filepath.Join(root, "dev"), "", unix.MS_BIND, "")
	mount("lab", filepath.Join(root, "run"), "tmpfs", 0, "")
	mount("lab", filepath.Join(root, "tmp"), "tmpfs", 0, "mode=1777")

	l := &lab{t: t, root: root, jobs: map[string]*labJob{}}
	tree, err := host.OpenTree(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tree.Close() })
	l.Tree = tree
	// No maintainer script may start anything.
	l.write("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)
	return l
}

func (l *lab) path(name string) string { return filepath.Join(l.root, name) }

func (l *lab) write(name, text string, mode fs.FileMode) {
	l.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(l.path(name)), 0o755), os.WriteFile(l.path(name), []byte(text), mode), os.Chmod(l.path(name), mode)); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) command(argv, env []string) *exec.Cmd {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: l.root, Setpgid: true}
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C"}, env...)
	return cmd
}

// must runs a command of the test's own in the lab.
func (l *lab) must(argv ...string) string {
	l.t.Helper()
	out, err := l.command(argv, nil).CombinedOutput()
	if err != nil {
		l.t.Fatalf("%q: %v\n%s", argv, err, out)
	}
	return string(out)
}

// OS is what the lab says of itself.
func (l *lab) OS(context.Context) (host.OS, error) { return l.os, nil }

// Units knows of none.
func (l *lab) Units(_ context.Context, names ...string) ([]host.Unit, error) {
	units := make([]host.Unit, len(names))
	for i, n := range names {
		units[i] = host.Unit{Name: n, ID: n, Load: "not-found", Active: "inactive"}
	}
	return units, nil
}

// LockHolder asks the kernel.
func (l *lab) LockHolder(_ context.Context, name string) (host.Lock, error) {
	f, err := os.Open(l.path(name))
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

// Run executes in the lab; the journal is the jobs' output.
func (l *lab) Run(ctx context.Context, c host.Command) (host.Output, error) {
	argv := c.Argv()
	if argv[0] == "/usr/bin/journalctl" {
		unit := argv[len(argv)-1]
		l.mu.Lock()
		defer l.mu.Unlock()
		if j := l.jobs[strings.TrimSuffix(strings.TrimPrefix(unit, "_SYSTEMD_UNIT="), ".service")]; j != nil {
			return host.Output{Stdout: bytes.Clone(j.out.Bytes())}, nil
		}
		return host.Output{}, nil
	}
	cmd := l.command(argv, c.Env())
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return host.Output{Stdout: out.Bytes(), Stderr: errs.Bytes(), Code: exit.ExitCode()}, nil
	}
	return host.Output{Stdout: out.Bytes(), Stderr: errs.Bytes()}, err
}

// changer writes files for real, and runs jobs as processes.
type changer struct {
	*host.Changer
	*lab
}

func (l *lab) changer() changer {
	l.t.Helper()
	ch, err := host.OpenForChange(host.Options{Root: l.root})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { ch.Close() })
	return changer{ch, l}
}

func (c changer) Close() error { return c.Changer.Close() }

// Record has no journal to go to.
func (c changer) Record(context.Context, string, map[string]string) error { return nil }

func (c changer) StartJob(_ context.Context, j host.Job) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.jobs[j.Name] != nil {
		return host.ErrJobExists
	}
	cmd := c.lab.command(j.Argv, j.Env)
	job := &labJob{JobState: host.JobState{Name: j.Name, Found: true, Running: true, Argv: j.Argv, Started: time.Now()}, cmd: cmd, done: make(chan struct{})}
	out, in := io.Pipe()
	cmd.Stdout, cmd.Stderr = in, in
	if err := cmd.Start(); err != nil {
		return err
	}
	c.jobs[j.Name] = job
	c.ran = append(c.ran, strings.Join(j.Argv, " "))
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		buf := make([]byte, 4096)
		for {
			n, err := out.Read(buf)
			c.mu.Lock()
			job.out.Write(buf[:n])
			c.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	go func() {
		err := cmd.Wait()
		in.Close()
		<-copied
		c.mu.Lock()
		defer c.mu.Unlock()
		job.Running, job.Ended, job.Result = false, time.Now(), "success"
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			job.Result, job.Code = "exit-code", exit.ExitCode()
			if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
				job.Result, job.Code = "signal", int(ws.Signal())
			}
		}
		close(job.done)
	}()
	return nil
}

func (c changer) Job(_ context.Context, name string) (host.JobState, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if j := c.jobs[name]; j != nil {
		return j.JobState, nil
	}
	return host.JobState{Name: name}, nil
}

func (c changer) Jobs(context.Context) ([]host.JobState, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []host.JobState
	for _, j := range c.jobs {
		list = append(list, j.JobState)
	}
	return list, nil
}

func (c changer) CollectJob(_ context.Context, name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.jobs, name)
	return nil
}

// check asks the packages probe.
func (l *lab) check(require probes.Require) finding.Report {
	l.t.Helper()
	started := time.Now()
	p := probes.DefaultPackages()
	res, err := p.Check(context.Background(), probes.Input{Host: l, Now: started, Require: require, Memory: probes.NewMemory()})
	if err != nil {
		l.t.Logf("the probe: %v", err)
	}
	return finding.Report{Probe: "packages", Status: finding.StatusOf(res, err), Findings: res.Findings, Err: err, Started: started}
}

func requires(names ...string) probes.Require {
	var r probes.Require
	for _, n := range names {
		r.Packages = append(r.Packages, probes.RequiredPackage{Name: n})
	}
	return r
}

// plan makes a plan of what is missing.
func (l *lab) plan(require probes.Require) (remedy.Plan, remedy.Facts) {
	l.t.Helper()
	reports := []finding.Report{l.check(require)}
	facts, err := remedy.Observe(context.Background(), l, require, reports)
	if err != nil {
		l.t.Fatal(err)
	}
	cfg := config.Default().Remedies
	cfg.Allow = []string{finding.KindPackages}
	return remedy.New(remedy.Input{Reports: reports, Require: require, Remedies: cfg, Facts: facts, Now: time.Now()}), facts
}

// repair plans, applies and checks, as the daemon does, and returns what became
// of the packages.
func (l *lab) repair(names ...string) remedy.Result {
	l.t.Helper()
	require := requires(names...)
	plan, facts := l.plan(require)
	if len(plan.Pending()) == 0 {
		if len(plan.Steps) > 0 {
			return remedy.Result{Step: "packages", Outcome: remedy.Skipped, Message: plan.Steps[0].Refused}
		}
		return remedy.Result{}
	}
	a := l.applier()
	record, err := a.Apply(context.Background(), plan, facts)
	if err != nil {
		l.t.Fatal(err)
	}
	res := record.Results[slices.IndexFunc(record.Results, func(r remedy.Result) bool { return r.Step == "packages" })]
	if res.Outcome != remedy.Applied {
		return res
	}
	judged, err := a.Confirm(context.Background(), []finding.Report{l.check(require)})
	if err != nil || len(judged) == 0 {
		l.t.Fatal("nothing was judged", err)
	}
	return judged[len(judged)-1]
}

func (l *lab) applier() *remedy.Applier {
	return &remedy.Applier{View: l, Changer: l.changer(), Log: slog.New(slog.NewTextHandler(l.t.Output(), nil)), Poll: 20 * time.Millisecond, LockWait: 20 * time.Second}
}
