// Package distros holds the agent to the distributions it runs on: what each is
// like stands in testdata, a folder each, every fact with its source; the real
// probes and the real planner run over a host made of them, and
// docs/distributions.md is written from what they say.
package distros

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/remedy"
)

var update = flag.Bool("update", false, "rewrite docs/distributions.md and testdata/*/answers.txt")

const page = "../../docs/distributions.md"

// TestDistributions runs the probes on each distribution three times: as it comes,
// with nothing required of it; with a storage node's requirements; and with all
// that was missing installed.
func TestDistributions(t *testing.T) {
	var all []answers
	for _, d := range load(t) {
		t.Run(d.dir, func(t *testing.T) {
			a := d.answers(t)
			d.holds(t, a)
			if d.OtherTime.verified() {
				other := d
				other.Time, other.OtherTime = d.OtherTime, component{}
				other.holds(t, other.answers(t))
			}
			all = append(all, a)
			golden(t, filepath.Join("testdata", d.dir, "answers.txt"), fmt.Sprintf("As it comes, with nothing required of it.\n\n%s\nAs it comes.\n\n%s\nWith what it needs installed.\n\n%s", a.plain, a.bare, a.full))
		})
	}
	if !t.Failed() || *update {
		golden(t, page, document(all))
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (go test ./test/distros -update, and read what changed): -want +got\n%s", name, diff)
	}
}

// answers are a distribution's in each state.
type answers struct {
	distro
	plain, bare, full judged
}

// judged is what the agent says of one host.
type judged struct {
	os      host.OS
	reports []finding.Report
	plan    remedy.Plan
	kubelet probes.Kubelet
	// install is the planner's step for a package called NAME.
	install remedy.Step
	// source is where the kubelet's configuration was read, or why it was not.
	source string
}

func (d distro) answers(t *testing.T) answers {
	return answers{d, d.judge(t, false, probes.Require{}), d.judge(t, false, d.require()), d.judge(t, true, d.require())}
}

func (j judged) report(probe string) finding.Report {
	if i := slices.IndexFunc(j.reports, func(r finding.Report) bool { return r.Probe == probe }); i >= 0 {
		return j.reports[i]
	}
	return finding.Report{}
}

func (j judged) finding(probe, reason, subject string) (finding.Finding, bool) {
	fs := j.report(probe).Findings
	i := slices.IndexFunc(fs, func(f finding.Finding) bool { return f.Reason == reason && f.Subject == subject })
	if i < 0 {
		return finding.Finding{}, false
	}
	return fs[i], true
}

// judge runs every probe and the planner.
func (d distro) judge(t *testing.T, installed bool, require probes.Require) judged {
	t.Helper()
	ctx := context.Background()
	n := d.host(t, installed, len(require.Packages) > 0)
	var j judged
	var err error
	if j.os, err = n.OS(ctx); err != nil {
		t.Error(err)
	}
	in := probes.Input{Host: n, Now: n.Times()[0], Require: require}
	for _, p := range probes.Defaults().List() {
		if !d.asked(p.Name()) {
			continue
		}
		in.Memory = probes.NewMemory()
		in.Memory.Begin()
		r, err := p.Check(ctx, in)
		finding.Sort(r.Findings)
		j.reports = append(j.reports, finding.Report{
			Probe: p.Name(), Condition: p.Condition(), Status: finding.StatusOf(r, err), Summary: r.Summary, Findings: r.Findings, Err: err,
		})
	}
	facts, err := remedy.Observe(ctx, n, in.Require, j.reports)
	if err != nil {
		t.Error(err)
	}
	plan := remedy.Input{
		Reports: j.reports, Require: in.Require, Facts: facts, Now: in.Now,
		Remedies: config.Remedies{Mode: "plan", Allow: []string{finding.KindPackages, finding.KindUnits, finding.KindModules, finding.KindFiles, finding.KindSysctls, finding.KindOOMScores}},
	}
	j.plan = remedy.New(plan)
	plan.Reports = []finding.Report{{Probe: "packages", Findings: []finding.Finding{{Reason: "PackageMissing", Remedy: &finding.Remedy{Action: finding.InstallPackage, Subject: "NAME"}}}}}
	j.install = remedy.New(plan).Steps[0]
	if d.Kubelet.verified() {
		k, ok, err := probes.FindKubelet(ctx, n)
		if err != nil || !ok {
			t.Errorf("the kubelet was not found: %v", err)
		}
		j.kubelet = k
		if c, err := k.ConfigOnRestart(ctx, n); err != nil {
			j.source = err.Error()
		} else {
			j.source = c.Source
		}
	}
	return j
}

// require asks for everything a storage driver might need, as far as its name on
// this distribution is known.
func (d distro) require() probes.Require {
	var r probes.Require
	for _, c := range d.components() {
		if c.capability != "" && c.verified() {
			r.Packages = append(r.Packages, probes.RequiredPackage{Name: c.capability})
		}
	}
	r.Modules = []string{"dm_multipath"}
	r.Sysctls = map[string]string{"vm.max_map_count": ">=262144"}
	return r
}

// asked leaves out the probes whose facts have no source: their answers would be of
// a host made up.
func (d distro) asked(probe string) bool {
	f, ok := map[string]fact{"time": d.Time.fact, "iscsi": d.ISCSI.fact, "multipath": d.Multipath.fact, "updates": d.Updates.fact, "pids": d.Kubelet.fact, "kubelet": d.Kubelet.fact}[probe]
	return !ok || f.verified()
}

// holds compares what the agent says with the facts, without the golden files:
// class, daemons, names and the way a missing program is to come.
func (d distro) holds(t *testing.T, a answers) {
	t.Helper()
	bare, full := a.bare, a.full
	// With nothing required, a probe that has nothing to look at says so, and none
	// is left without an answer.
	for _, r := range a.plain.reports {
		none := map[string]bool{
			"iscsi": true, "multipath": true, "kernel": true, "units": d.System.Init != "systemd",
			"packages": d.Packages.Database == "none", "updates": d.Updates.None, "kubelet": !d.Kubelet.verified(),
		}[r.Probe]
		if want := map[bool]finding.Status{true: finding.NotApplicable, false: finding.OK}[none]; r.Status != want {
			t.Errorf("%s, nothing required: %s (%s, %v), want %s", r.Probe, r.Status, r.Summary, r.Err, want)
		}
	}
	if full.os.Class != d.System.Class || full.os.Init != d.System.Init {
		t.Errorf("class %s, init %s; want %s, %s (%s)", full.os.Class, full.os.Init, d.System.Class, d.System.Init, full.os.Why)
	}
	takes := d.Packages.Manager != ""
	for _, c := range d.components() {
		if c.capability == "" || !c.verified() {
			continue
		}
		f, missing := bare.finding("packages", "PackageMissing", c.capability)
		there := c.Shipped || c.BuiltIn != "" || c.capability == "time"
		switch {
		case there && missing:
			t.Errorf("%s comes with it and is told to be missing: %s", c.capability, f.Message)
		case !there && !missing:
			t.Errorf("%s is not there and nothing is told", c.capability)
		case missing && takes && (!strings.Contains(f.Message, c.Package) || f.Remedy == nil || f.Remedy.Subject != c.Package):
			t.Errorf("%s: the package here is %s; told is %q, %+v", c.capability, c.Package, f.Message, f.Remedy)
		case missing && !takes && (strings.Contains(f.Message, "(package ") || strings.Contains(f.Message, "not installed")):
			t.Errorf("%s: nothing is installed here, and told is %q", c.capability, f.Message)
		}
		if f, missing := full.finding("packages", "PackageMissing", c.capability); missing && !c.None {
			t.Errorf("%s is there and told to be missing: %s\n%v", c.capability, f.Message, f.Evidence)
		}
	}
	for _, j := range []judged{bare, full} {
		switch s := j.install; {
		case takes && (s.Refused != "" || s.Commands[len(s.Commands)-1].Argv[0] != d.Packages.Manager):
			t.Errorf("packages are installed by %s; planned is %v, refused %q", d.Packages.Manager, s.Commands, s.Refused)
		case !takes && (s.Refused == "" || len(s.Commands) > 0):
			t.Errorf("a package would be installed where none can be: %v", s.Commands)
		case !takes && !strings.Contains(s.Refused, d.Packages.Instead):
			t.Errorf("what is missing comes by %q here, and the advice is %q", d.Packages.Instead, s.Refused)
		}
	}
	for _, j := range []judged{bare, full} {
		for _, s := range j.plan.Pending() {
			if !takes && s.Kind == finding.KindPackages {
				t.Errorf("step %s is planned", s.ID)
			}
			for _, f := range s.Files {
				if !persistent(d, f.Path) {
					t.Errorf("%s would be written, and does not outlive a reboot here", f.Path)
				}
			}
		}
		if d.Time.verified() {
			if _, none := j.finding("time", "NoTimeDaemon", ""); none {
				t.Errorf("%s keeps the time and is not seen", d.Time.Process)
			}
		}
		if r := j.report("time"); d.Time.verified() && r.Status != finding.OK {
			t.Errorf("time: %s: %s, %v", r.Status, r.Summary, r.Err)
		}
	}
	for _, r := range full.reports {
		for _, f := range r.Findings {
			if f.Severity != finding.Info && !d.lacks(f.Subject) {
				t.Errorf("%s is told of a host that is well: %s", f.Reason, f.Message)
			}
		}
	}
	if d.ISCSI.verified() && !d.ISCSI.None {
		if r := full.report("iscsi"); r.Status != finding.OK {
			t.Errorf("iscsi: %s: %s, %v, %v", r.Status, r.Summary, r.Findings, r.Err)
		}
	}
	if k := d.Kubelet; k.verified() {
		if full.kubelet.RootDir != k.RootDir {
			t.Errorf("the kubelet's root is %s, want %s", full.kubelet.RootDir, k.RootDir)
		}
		if got := full.kubelet.Flags.Last("config"); got != k.Config {
			t.Errorf("the kubelet's configuration is %s, want %s", got, k.Config)
		}
		// Across a container's edge a file is not read: the kubelet is asked
		// through the API server then.
		if k.Container != strings.Contains(full.source, "root file system of its own") || !k.Container && !strings.Contains(full.source, k.Config) {
			t.Errorf("the kubelet's configuration in %s was not read: %s", k.Config, full.source)
		}
	}
}

// lacks reports whether the system has nothing of what a finding is about, at all.
func (d distro) lacks(subject string) bool {
	for _, c := range d.components() {
		if c.None && (subject == c.capability || c.capability == "iscsi" && strings.Contains(subject, "iscsi")) {
			return true
		}
	}
	return false
}

// persistent reports whether a file written now is still there after a boot:
// Bottlerocket's /etc is made anew, Talos' is part of the image.
func persistent(d distro, name string) bool {
	return !slices.Contains([]string{"bottlerocket", "talos"}, d.dir) || !strings.HasPrefix(name, "/etc/")
}
