package remedy

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// fakeHost has a real tree and a systemd that only notes what it is told.
type fakeHost struct {
	*host.Changer
	*host.Tree
	dir  string
	told []string
	// deny makes writing a path fail.
	deny string
}

func newFakeHost(t *testing.T, files map[string]string) *fakeHost {
	t.Helper()
	h := &fakeHost{dir: t.TempDir()}
	for name, text := range files {
		h.write(t, name, text)
	}
	if err := os.MkdirAll(filepath.Join(h.dir, "var/lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	tree, err := host.OpenTree(h.dir)
	if err != nil {
		t.Fatal(err)
	}
	ch, err := host.OpenForChange(host.Options{Root: h.dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tree.Close(); ch.Close() })
	h.Tree, h.Changer = tree, ch
	return h
}

func (h *fakeHost) write(t *testing.T, name, text string) {
	t.Helper()
	p := filepath.Join(h.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func (h *fakeHost) read(name string) string {
	data, err := os.ReadFile(filepath.Join(h.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return "absent"
	}
	return string(data)
}

func (h *fakeHost) Close() error { return nil }

func (h *fakeHost) Record(context.Context, string, map[string]string) error { return nil }

func (h *fakeHost) tell(what string) error {
	h.told = append(h.told, what)
	return nil
}

func (h *fakeHost) ReloadSystemd(context.Context) error             { return h.tell("daemon-reload") }
func (h *fakeHost) EnableUnit(_ context.Context, name string) error { return h.tell("enable " + name) }
func (h *fakeHost) DisableUnit(_ context.Context, name string) error {
	return h.tell("disable " + name)
}
func (h *fakeHost) StartUnit(_ context.Context, name string) error { return h.tell("start " + name) }
func (h *fakeHost) StopUnit(_ context.Context, name string) error  { return h.tell("stop " + name) }

func (h *fakeHost) Units(_ context.Context, names ...string) ([]host.Unit, error) {
	units := make([]host.Unit, len(names))
	for i, n := range names {
		units[i] = host.Unit{Name: n, Load: "loaded", Active: "inactive"}
	}
	return units, nil
}

func (h *fakeHost) WriteFile(ctx context.Context, name string, f host.FileContent) error {
	if name == h.deny {
		return errors.New("no space left on device")
	}
	return h.Changer.WriteFile(ctx, name, owned(f))
}

func (h *fakeHost) CreateFile(ctx context.Context, name string, f host.FileContent) error {
	if name == h.deny {
		return errors.New("no space left on device")
	}
	return h.Changer.CreateFile(ctx, name, owned(f))
}

// owned by whoever runs the test, who need not be root.
func owned(f host.FileContent) host.FileContent {
	f.UID, f.GID = uint32(os.Getuid()), uint32(os.Getgid())
	return f
}

func (h *fakeHost) applier(t *testing.T) *Applier {
	return &Applier{View: h, Changer: h, Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Poll: time.Millisecond}
}

// plan is of the remedies, on the files as they are.
func (h *fakeHost) plan(t *testing.T, remedies ...string) (Plan, Facts) {
	t.Helper()
	in := input(remedies...)
	in.Now = time.Now()
	observed, err := Observe(context.Background(), h, probes.Require{}, in.Reports)
	if err != nil {
		t.Fatal(err)
	}
	in.Facts.Files, in.Facts.Past, in.Facts.Left = observed.Files, observed.Past, observed.Left
	return New(in), in.Facts
}

const lioFile, xFile = "/etc/multipath/conf.d/50-lio.conf", "/etc/systemd/system/x.service.d/a.conf"

func (h *fakeHost) apply(t *testing.T, remedies ...string) *Record {
	t.Helper()
	plan, facts := h.plan(t, remedies...)
	record, err := h.applier(t).Apply(context.Background(), plan, facts)
	if err != nil {
		t.Fatal(err)
	}
	return record
}

func TestApplyAndRollback(t *testing.T) {
	h := newFakeHost(t, map[string]string{xFile: "[Unit]\n", "/proc/sys/kernel/pid_max": "32768\n"})
	remedies := []string{"write-file " + lioFile, "write-file " + xFile, "enable-unit chrony.service", "start-unit chrony.service", "set-sysctl kernel.pid_max"}
	record := h.apply(t, remedies...)
	for _, res := range record.Results {
		if res.Outcome != Applied {
			t.Errorf("%s: %s %s", res.Step, res.Outcome, res.Message)
		}
	}
	if h.read(xFile) != "[Service]\n" || h.read("/proc/sys/kernel/pid_max")[:6] != "131072" || h.read(sysctlFile) != ownHeader+"kernel.pid_max = 131072\n" {
		t.Errorf("%q %q %q", h.read(xFile), h.read("/proc/sys/kernel/pid_max"), h.read(sysctlFile))
	}
	if want := []string{"daemon-reload", "enable chrony.service", "start chrony.service"}; !slices.Equal(h.told, want) {
		t.Errorf("%q", h.told)
	}
	plan, _ := h.plan(t)
	if len(plan.Left) == 0 {
		t.Error("nothing is listed as left")
	}
	h.told = nil
	undone, stays, err := h.applier(t).Rollback(context.Background(), false)
	if err != nil || len(stays) != 0 || len(undone) == 0 {
		t.Errorf("%q %q %v", undone, stays, err)
	}
	if h.read(xFile) != "[Unit]\n" || h.read(lioFile) != "absent" || h.read("/etc/multipath") != "absent" || h.read(sysctlFile) != "absent" || h.read("/proc/sys/kernel/pid_max")[:5] != "32768" {
		t.Errorf("%q %q %q", h.read(xFile), h.read(lioFile), h.read("/proc/sys/kernel/pid_max"))
	}
	if !slices.Contains(h.told, "disable chrony.service") || !slices.Contains(h.told, "stop chrony.service") {
		t.Errorf("%q", h.told)
	}
	if plan, _ := h.plan(t); len(plan.Left) != 0 {
		t.Errorf("left: %+v", plan.Left)
	}
	if undone, _, _ := h.applier(t).Rollback(context.Background(), true); len(undone) != 0 {
		t.Errorf("it was taken back twice: %q", undone)
	}
}

// What somebody has changed since is not overwritten by a rollback.
func TestRollbackKeepsOthersChanges(t *testing.T) {
	h := newFakeHost(t, map[string]string{xFile: "[Unit]\n"})
	h.apply(t, "write-file "+xFile)
	h.write(t, xFile, "by hand\n")
	_, stays, err := h.applier(t).Rollback(context.Background(), true)
	if err != nil || len(stays) != 1 || h.read(xFile) != "by hand\n" {
		t.Errorf("%q %v %q", stays, err, h.read(xFile))
	}
}

// A file that changed after the plan was made is somebody else's.
func TestApplyLooksAgain(t *testing.T) {
	h := newFakeHost(t, map[string]string{xFile: "[Unit]\n"})
	plan, facts := h.plan(t, "write-file "+xFile, "write-file "+lioFile)
	h.write(t, xFile, "by hand\n")
	h.write(t, lioFile, "by hand too\n")
	record, err := h.applier(t).Apply(context.Background(), plan, facts)
	if err != nil {
		t.Fatal(err)
	}
	for _, res := range record.Results {
		if res.Outcome != Failed || !strings.Contains(res.Message, "since the plan was made") {
			t.Errorf("%s %s", res.Outcome, res.Message)
		}
	}
	if h.read(xFile) != "by hand\n" || h.read(lioFile) != "by hand too\n" {
		t.Error("it was overwritten")
	}
}

// A step that fails puts back what it did and does not stop the others, except
// those that need it.
func TestFailedStep(t *testing.T) {
	h := newFakeHost(t, map[string]string{"/proc/sys/kernel/pid_max": "32768\n"})
	h.deny = lioFile
	record := h.apply(t, "write-file "+lioFile, "install-package multipath-tools", "write-file "+xFile)
	got := map[string]Outcome{}
	for _, res := range record.Results {
		got[res.Step] = res.Outcome
	}
	if got[stepID("file", lioFile)] != Failed || got["packages"] != Skipped || got[stepID("file", xFile)] != Applied {
		t.Errorf("%v", got)
	}
	if h.read("/etc/multipath") != "absent" {
		t.Error("a directory was left behind")
	}
}

// Only the next check says whether a step has helped; a file that has not is
// put back.
func TestConfirm(t *testing.T) {
	h := newFakeHost(t, map[string]string{xFile: "[Unit]\n"})
	h.apply(t, "write-file "+xFile, "write-file "+lioFile)
	a := h.applier(t)
	check := func(status finding.Status, still ...string) []Result {
		t.Helper()
		reports := found(still...)
		reports[0].Started, reports[0].Status = time.Now(), status
		judged, err := a.Confirm(context.Background(), reports)
		if err != nil {
			t.Fatal(err)
		}
		return judged
	}
	if judged := check(finding.Unknown); len(judged) != 0 {
		t.Errorf("a probe that could not look has judged: %+v", judged)
	}
	old := found()
	if judged, err := a.Confirm(context.Background(), old); len(judged) != 0 || err != nil {
		t.Errorf("a check from before the repair has judged: %+v %v", judged, err)
	}
	outcome := map[string]Outcome{}
	for _, res := range check(finding.Problem, "write-file "+xFile) {
		outcome[res.Step] = res.Outcome
	}
	if outcome[stepID("file", xFile)] != RolledBack || outcome[stepID("file", lioFile)] != Confirmed {
		t.Errorf("%v", outcome)
	}
	if h.read(xFile) != "[Unit]\n" || h.read(lioFile) == "absent" {
		t.Errorf("%q %q", h.read(xFile), h.read(lioFile))
	}
	if plan, _ := h.plan(t, "write-file "+xFile); len(plan.Pending()) != 0 || !strings.Contains(plan.Steps[0].Refused, "not tried again before") {
		t.Errorf("%+v", plan.Steps)
	}
}

// An agent that is killed between its record and the change leaves a record of
// what was not done: rolling back must then do no harm.
func TestRollbackOfWhatWasNotDone(t *testing.T) {
	h := newFakeHost(t, map[string]string{xFile: "[Unit]\n"})
	h.deny = xFile
	plan, facts := h.plan(t, "write-file "+xFile)
	if _, err := h.applier(t).Apply(context.Background(), plan, facts); err != nil {
		t.Fatal(err)
	}
	h.deny = ""
	if _, _, err := h.applier(t).Rollback(context.Background(), true); err != nil || h.read(xFile) != "[Unit]\n" {
		t.Errorf("%v %q", err, h.read(xFile))
	}
}

// A permission that is refused skips the step; one that was given is given back.
func TestPermit(t *testing.T) {
	h := newFakeHost(t, map[string]string{xFile: "[Unit]\n"})
	plan, facts := h.plan(t, "write-file "+xFile)
	a := h.applier(t)
	a.Permit = func(context.Context, Step, time.Duration) (func(bool), error) {
		return nil, errors.New("the window is closed")
	}
	record, err := a.Apply(context.Background(), plan, facts)
	if err != nil || record.Results[0].Outcome != Skipped || h.read(xFile) != "[Unit]\n" {
		t.Errorf("%v %+v", err, record)
	}
	released := 0
	a.Permit = func(_ context.Context, s Step, d time.Duration) (func(bool), error) {
		if d < time.Minute || s.ID == "" {
			t.Errorf("%s for %s", s.ID, d)
		}
		return func(running bool) {
			if !running {
				released++
			}
		}, nil
	}
	if record, err = a.Apply(context.Background(), plan, facts); err != nil || record.Results[0].Outcome != Applied || released != 1 {
		t.Errorf("%v %+v %d", err, record, released)
	}
}
