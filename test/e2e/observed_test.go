package e2e

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/test/figures"
)

var updateObserved = flag.Bool("update", false, "write the tables of docs/observe.md")

// seen is what "agent check" says of a probe.
type seen struct {
	status  string
	reasons []string
	// lacks is in the error, when there is one.
	lacks string
}

// sight is a probe in the faults that the test makes on the node, all at once.
type sight struct {
	// fault is what is done to the node, or asked of it by the config.
	fault string
	// node is what root sees on the node, pod what the overlay's pod does.
	node, pod seen
	// says is in the summary of both.
	says string
}

// sights are what docs/observe.md shows, and what the real node is held to.
func sights() map[string]sight {
	same := func(fault string, s seen) sight { return sight{fault: fault, node: s, pod: s} }
	kubelet := same("a swap file in use, which failSwapOn does not go with", seen{status: "Problem", reasons: []string{"NoPIDEviction", "SwapEnabled"}})
	kubelet.says = "certificate until"
	return map[string]sight{
		"time": {
			fault: "`cmdport 0` in chrony.conf",
			node:  seen{status: "OK"},
			pod:   seen{status: "Unknown", lacks: "/run/chrony/chronyd.sock: a client socket beside it: not done by an agent that only observes"},
		},
		"disks": {
			fault: "an error of an ext4 that goes on; a thin pool of 94 %",
			node:  seen{status: "Problem", reasons: []string{"FilesystemErrors", "ThinPoolNearFull"}},
			pod:   seen{status: "Problem", reasons: []string{"FilesystemErrors"}, lacks: "thin pools: open /dev/mapper/control: operation not permitted"},
		},
		"multipath": {
			fault: "multipathd stopped; a path that only the map has given up",
			node:  seen{status: "Problem", reasons: []string{"MultipathdDown", "PathsDegraded"}},
			pod:   seen{status: "Problem", reasons: []string{"MultipathdDown"}, lacks: "which paths the kernel uses, device-mapper ioctl: open /dev/mapper/control: operation not permitted"},
		},
		"iscsi":    same("iscsid stopped, with a session", seen{status: "Problem", reasons: []string{"IscsidDown"}}),
		"pids":     same("a service at its own limit of tasks", seen{status: "Problem", reasons: []string{"ForkFailures"}}),
		"oom":      same("a service killed at its own limit of memory", seen{status: "Problem", reasons: []string{"SystemOOMKill"}}),
		"packages": same("a required package that is not installed", seen{status: "Problem", reasons: []string{"PackageMissing"}}),
		"units":    same("a required file that is not there", seen{status: "Problem", reasons: []string{"FileMissing"}}),
		"kernel":   same("a required sysctl of another value", seen{status: "Problem", reasons: []string{"SysctlDiffers", "SysctlNotPersisted"}}),
		"updates":  same("a reboot pending for 30 days", seen{status: "Problem", reasons: []string{"RebootPending", "UpdatesNotConfigured"}}),
		"kubelet":  kubelet,
	}
}

// variant is the overlay's pod with one thing changed.
type variant struct {
	name, words string
	change      func(*corev1.SecurityContext)
	// differs are the probes that then say something else; refuses is what the
	// agent says when it does not even start.
	differs map[string]seen
	refuses string
}

func variants() []variant {
	add := func(caps ...corev1.Capability) func(*corev1.SecurityContext) {
		return func(s *corev1.SecurityContext) { s.Capabilities.Add = caps }
	}
	const noLog = "syslog(2): operation not permitted"
	return []variant{
		{name: "as-it-is", words: "nothing changed", change: func(*corev1.SecurityContext) {}},
		{name: "without-ptrace", words: "without CAP_SYS_PTRACE", change: add("SYSLOG"), refuses: "PID 1 may not be looked at from this container"},
		{
			name: "without-syslog", words: "without CAP_SYSLOG", change: add("SYS_PTRACE"),
			differs: map[string]seen{
				"disks": {status: "Problem", reasons: []string{"FilesystemErrors"}, lacks: noLog},
				"pids":  {status: "Unknown", lacks: noLog},
				"oom":   {status: "Unknown", lacks: noLog},
			},
		},
		{name: "with-dac-read", words: "with CAP_DAC_READ_SEARCH", change: add("SYS_PTRACE", "SYSLOG", "DAC_READ_SEARCH")},
		{name: "with-net-admin", words: "with CAP_NET_ADMIN", change: add("SYS_PTRACE", "SYSLOG", "NET_ADMIN")},
		{
			name: "without-seccomp", words: "seccomp Unconfined",
			change: func(s *corev1.SecurityContext) { s.SeccompProfile.Type = corev1.SeccompProfileTypeUnconfined },
		},
	}
}

// sees is what the pod of a variant is to see.
func (v variant) sees() map[string]seen {
	all := map[string]seen{}
	for probe, s := range sights() {
		all[probe] = s.pod
	}
	maps.Copy(all, v.differs)
	return all
}

func (s seen) String() string {
	if len(s.reasons) == 0 {
		return s.status
	}
	return s.status + ": " + strings.Join(s.reasons, ", ")
}

// observedTables are what docs/observe.md shows.
func observedTables() []figures.Table {
	probes := figures.Table{Name: "observe probes", Header: []string{"probe", "the node", "root on the node sees", "the pod sees", "and says beside it"}}
	for _, p := range config.Default().Probes.List() {
		s := sights()[p.Name()]
		pod := s.pod.String()
		if s.node.String() == pod {
			pod = "the same"
		}
		lacks := s.pod.lacks
		if lacks != "" {
			lacks = "`" + lacks + "`"
		}
		probes.Rows = append(probes.Rows, []string{p.Name(), s.fault, s.node.String(), pod, lacks})
	}
	caps := figures.Table{Name: "observe variants", Header: []string{"the pod", "what it then sees"}}
	for _, v := range variants() {
		sees := "the same"
		switch {
		case v.refuses != "":
			sees = "ends at once: `" + v.refuses + "`"
		case len(v.differs) > 0:
			var differs []string
			for _, probe := range slices.Sorted(maps.Keys(v.differs)) {
				differs = append(differs, fmt.Sprintf("%s: %s, `%s`", probe, v.differs[probe], v.differs[probe].lacks))
			}
			sees = strings.Join(differs, "; ")
		}
		caps.Rows = append(caps.Rows, []string{v.words, sees})
	}
	return []figures.Table{probes, caps}
}

// The tables of docs/observe.md are those that the real node is held to (TestAgent,
// TestNightly), and each probe has its row, also in the one of what is lost.
func TestObserveIsDocumented(t *testing.T) {
	const name = "../../docs/observe.md"
	doc, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	want := doc
	for _, table := range observedTables() {
		if want, err = figures.Replace(want, table.Name, ""); err == nil { // no row outlives its probe
			want, err = table.Merge(want)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if *updateObserved {
		if err := os.WriteFile(name, want, 0o644); err != nil {
			t.Fatal(err)
		}
	} else if string(doc) != string(want) {
		t.Errorf("%s is not what the tests hold the node to: run go test ./test/e2e -run %s -update", name, t.Name())
	}
	_, lost, _ := strings.Cut(string(want), "## Probe by probe")
	lost, _, _ = strings.Cut(lost, "<!-- measured")
	var rows []string
	for line := range strings.Lines(lost) {
		if cell, ok := strings.CutPrefix(line, "| "); ok {
			names, _, _ := strings.Cut(cell, " |")
			rows = append(rows, strings.Split(names, ", ")...)
		}
	}
	list := config.Default().Probes.List()
	for _, p := range list {
		if !slices.Contains(rows, p.Name()) {
			t.Errorf("what of the probe %s is lost does not stand in %s", p.Name(), name)
		}
		if _, ok := sights()[p.Name()]; !ok {
			t.Errorf("the probe %s is not measured", p.Name())
		}
	}
	if len(sights()) != len(list) {
		t.Errorf("%d probes are measured, there are %d", len(sights()), len(list))
	}
}

// checked parses "agent check -o json"; the summaries come by themselves.
func checked(out string) (all map[string]seen, summaries map[string]string, err error) {
	var r struct {
		Probes []struct {
			Name, Status, Summary, Error string
			Findings                     []struct{ Reason string }
		}
	}
	// kubectl adds a line about the exit code, which says that there is a finding.
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&r); err != nil {
		return nil, nil, fmt.Errorf("%w: %.300s", err, out)
	}
	all, summaries = map[string]seen{}, map[string]string{}
	for _, p := range r.Probes {
		s := seen{status: p.Status, lacks: p.Error}
		for _, f := range p.Findings {
			s.reasons = append(s.reasons, f.Reason)
		}
		slices.Sort(s.reasons)
		s.reasons = slices.Compact(s.reasons)
		all[p.Name], summaries[p.Name] = s, p.Summary
	}
	return all, summaries, nil
}

// saw compares what was seen with what was to be seen.
func saw(out string, want map[string]seen) error {
	got, summaries, err := checked(out)
	if err != nil {
		return err
	}
	var errs []error
	for name, w := range want {
		g := got[name]
		if g.status != w.status || !slices.Equal(g.reasons, w.reasons) || (g.lacks == "") != (w.lacks == "") || !strings.Contains(g.lacks, w.lacks) {
			errs = append(errs, fmt.Errorf("%s: want %+v, got %+v", name, w, g))
		}
		if says := sights()[name].says; !strings.Contains(summaries[name], says) {
			errs = append(errs, fmt.Errorf("%s: no %q in the summary: %s", name, says, summaries[name]))
		}
	}
	if len(got) != len(want) {
		errs = append(errs, fmt.Errorf("%d probes, want %d", len(got), len(want)))
	}
	return errors.Join(errs...)
}

// A look that differs in anything is no look that was to be: what holds the node
// to the tables can fail.
func TestSaw(t *testing.T) {
	want := map[string]seen{"disks": {status: "Problem", reasons: []string{"A", "B"}, lacks: "control"}}
	for answer, ok := range map[string]bool{
		`{"probes":[{"name":"disks","status":"Problem","error":"open control","findings":[{"reason":"B"},{"reason":"A"},{"reason":"A"}]}]} and more`: true,
		`{"probes":[{"name":"disks","status":"OK","error":"open control","findings":[{"reason":"B"},{"reason":"A"}]}]}`:                              false,
		`{"probes":[{"name":"disks","status":"Problem","error":"open control","findings":[{"reason":"A"}]}]}`:                                        false,
		`{"probes":[{"name":"disks","status":"Problem","findings":[{"reason":"B"},{"reason":"A"}]}]}`:                                                false,
		`{"probes":[{"name":"disks","status":"Problem","error":"another","findings":[{"reason":"B"},{"reason":"A"}]}]}`:                              false,
		`{"probes":[{"name":"disks","status":"Problem","error":"open control","findings":[{"reason":"B"},{"reason":"A"}]},{"name":"x"}]}`:            false,
		`{"probes":[]}`: false,
		`error: no pod`: false,
	} {
		if err := saw(answer, want); (err == nil) != ok {
			t.Errorf("%s: %v", answer, err)
		}
	}
	if err := saw(`{"probes":[{"name":"kubelet","status":"OK","summary":"kubelet v1.36.3"}]}`, map[string]seen{"kubelet": {status: "OK"}}); err == nil {
		t.Error("a summary without the certificate's end")
	}
	// Without an error where one was to be none must do either.
	if err := saw(`{"probes":[{"name":"disks","status":"OK","error":"x"}]}`, map[string]seen{"disks": {status: "OK"}}); err == nil {
		t.Error("an error that was not to be")
	}
}
