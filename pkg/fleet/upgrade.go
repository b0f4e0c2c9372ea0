package fleet

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/terminal"
)

// UpgradeReport is what `kubectl hygiene upgrade-check -o json` has.
type UpgradeReport struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Time       time.Time `json:"time"`
	// Server is the version of the API server that was asked, Target the minor
	// that the questions are about.
	Server string  `json:"server"`
	Target string  `json:"target"`
	Checks []Check `json:"checks"`
}

// Check is one question and its answer.
type Check struct {
	Name   string `json:"name"`
	Result Result `json:"result"`
	// Summary says in one line what was verified, or what is the matter.
	Summary  string    `json:"summary"`
	Findings []Finding `json:"findings,omitempty"`
	// Notes are worth knowing and no reason against an upgrade.
	Notes []string `json:"notes,omitempty"`
	// NotChecked says what could not be read, and why.
	NotChecked []string `json:"notChecked,omitempty"`
}

// Result of a check. Findings outweigh what could not be checked.
type Result string

// The results.
const (
	Fit        Result = "Fit"
	Finds      Result = "Findings"
	NotChecked Result = "NotChecked"
	Skipped    Result = "Skipped"
)

// Finding is one thing to mend before an upgrade, or to know of.
type Finding struct {
	Object  string `json:"object"`
	Message string `json:"message"`
	// Run is what to run, line by line: kubectl commands, and words where only a
	// person can act.
	Run []string `json:"run,omitempty"`
}

// Failed is the answer to a question whose objects could not be listed.
func Failed(name string, err error) Check {
	return Check{Name: name, NotChecked: []string{err.Error()}}.done("")
}

// Skip is the answer to a question that was not asked.
func Skip(name string) Check { return Check{Name: name, Result: Skipped, Summary: "not asked for"} }

func (c *Check) find(object, message string, run ...string) {
	c.Findings = append(c.Findings, Finding{object, message, run})
}

// done sets the result. The summary is that of a check without a finding.
func (c Check) done(verified string) Check {
	switch {
	case len(c.Findings) > 0:
		c.Result, c.Summary = Finds, count(len(c.Findings), "finding")
	case len(c.NotChecked) > 0:
		c.Result, c.Summary = NotChecked, cmp.Or(verified, "not checkable")
	default:
		c.Result, c.Summary = Fit, verified
	}
	return c
}

// ExitCode is 0 when the cluster is fit, 1 with a finding, 3 without one when not
// everything could be checked.
func (r UpgradeReport) ExitCode() int {
	code := 0
	for _, c := range r.Checks {
		switch c.Result {
		case Finds:
			return 1
		case NotChecked:
			code = 3
		}
		if len(c.NotChecked) > 0 {
			code = 3
		}
	}
	return code
}

// WriteTable writes the report for a person: a row a check, with what is the
// matter under it and what to run.
func (r UpgradeReport) WriteTable(w io.Writer, s Style) error {
	var b strings.Builder
	fmt.Fprintf(&b, "API server %s, questions for an upgrade to %s\n\n", s.paint(terminal.Bold, r.Server), s.paint(terminal.Bold, r.Target))
	fmt.Fprintf(&b, "%-18s %-13s %s\n", "CHECK", "RESULT", "SUMMARY")
	findings, open := 0, 0
	for _, c := range r.Checks {
		text, colour := "fit", terminal.Green
		switch c.Result {
		case Finds:
			text, colour = "findings", terminal.Red
		case NotChecked:
			text, colour = "not checkable", terminal.Yellow
		case Skipped:
			text, colour = "skipped", terminal.Grey
		}
		s.line(&b, fmt.Sprintf("%-18s %s%s %s", c.Name, s.paint(colour, text), strings.Repeat(" ", 13-len(text)), terminal.Line(c.Summary)), 33)
		for i, f := range c.Findings {
			if i == mostLines && !s.Wide {
				fmt.Fprintf(&b, "  and %d more, see -o wide\n", len(c.Findings)-i)
				break
			}
			s.line(&b, "  "+s.paint(terminal.Bold, f.Object)+": "+terminal.Line(f.Message), 4)
			for _, line := range f.Run {
				fmt.Fprintf(&b, "      %s %s\n", s.paint(terminal.Grey, "→"), terminal.Line(line))
			}
		}
		for i, what := range c.NotChecked {
			if i == mostLines && !s.Wide {
				fmt.Fprintf(&b, "  and %d more, see -o wide\n", len(c.NotChecked)-i)
				break
			}
			s.line(&b, "  "+s.paint(terminal.Yellow, "could not check:")+" "+terminal.Line(what), 4)
		}
		for _, note := range c.Notes {
			s.line(&b, "  "+s.paint(terminal.Grey, "note: "+note), 4)
		}
		findings += len(c.Findings)
		if len(c.NotChecked) > 0 {
			open++
		}
	}
	b.WriteByte('\n')
	switch {
	case findings > 0:
		b.WriteString(s.paint(terminal.Red, fmt.Sprintf("Not fit for %s: %s.", r.Target, count(findings, "finding"))))
	case open > 0:
		b.WriteString(s.paint(terminal.Yellow, fmt.Sprintf("No finding against %s, but %s could not be made in full.", r.Target, count(open, "check"))))
	default:
		b.WriteString(s.paint(terminal.Green, fmt.Sprintf("Fit for %s, as far as these checks see.", r.Target)))
	}
	b.WriteByte('\n')
	_, err := io.WriteString(w, b.String())
	return err
}

// NextMinor is the minor after that of a version: "1.37" after "v1.36.3".
func NextMinor(server string) (string, error) {
	v, err := version.ParseGeneric(server)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d.%d", v.Major(), v.Minor()+1), nil
}

// CheckNodes: every kubelet is ready and under no pressure, and no probe tells of
// a problem. What the probes kubelet and updates tell is left to checks of
// their own.
func CheckNodes(nodes []corev1.Node, report Report) Check {
	c := Check{Name: "nodes", NotChecked: slices.Clone(report.NotChecked)}
	var cordoned []string
	for _, n := range nodes {
		describe := "kubectl describe node " + n.Name
		if n.Spec.Unschedulable {
			cordoned = append(cordoned, n.Name)
		}
		ready := false
		for _, cond := range n.Status.Conditions {
			switch cond.Type {
			case corev1.NodeReady:
				ready = cond.Status == corev1.ConditionTrue
				if !ready {
					c.find(n.Name, fmt.Sprintf("Ready is %s: %s: %s", cond.Status, cond.Reason, cond.Message), describe)
					ready = true // told
				}
			case corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure, corev1.NodeNetworkUnavailable:
				if cond.Status == corev1.ConditionTrue {
					c.find(n.Name, fmt.Sprintf("%s: %s", cond.Type, cond.Message), describe)
				}
			}
		}
		if !ready {
			c.find(n.Name, "has no condition Ready: no kubelet has ever reported", describe)
		}
	}
	for _, n := range report.Nodes {
		told := false
		for _, p := range n.Probes {
			if p.Status == finding.Problem && p.Probe != "kubelet" && p.Probe != "updates" {
				c.find(n.Name, fmt.Sprintf("%s %s: %s", p.Type, p.Reason, p.Message), "kubectl hygiene explain "+n.Name+" "+p.Probe)
				told = true
			}
		}
		if n.Ready != nil && n.Ready.Status == finding.Problem && !told {
			c.find(n.Name, fmt.Sprintf("%s is False: %s: %s", readyType, n.Ready.Reason, n.Ready.Message), "kubectl hygiene explain "+n.Name)
		}
	}
	c.NotChecked = append(c.NotChecked, unseenNodes(report)...)
	if len(cordoned) > 0 {
		c.Notes = append(c.Notes, "cordoned: "+few(cordoned, 10))
	}
	return c.done(fmt.Sprintf("%s Ready, none under pressure, no problem told by an agent", count(len(nodes), "node")))
}

// unseenNodes names the nodes whose hosts nobody vouches for, by why.
func unseenNodes(report Report) []string {
	by := map[string][]string{}
	for _, n := range report.Nodes {
		var why string
		switch {
		case n.Agent.State == NotExpected || n.Status == finding.Problem && n.Agent.Trusted():
			continue
		case n.Agent.State == Missing:
			why = "no agent"
		case n.Agent.State == NotRunning:
			why = "the agent does not run"
		case n.Agent.State == Stale:
			why = "the agent's conditions are stale"
		case n.Ready == nil && len(n.Probes) == 0:
			why = "the agent has told nothing"
		case n.Status == finding.Unknown:
			why = "a probe could not run"
		default:
			continue
		}
		by[why] = append(by[why], n.Name)
	}
	var out []string
	for why, names := range by {
		out = append(out, fmt.Sprintf("the host of %s: %s", few(names, 10), why))
	}
	slices.Sort(out)
	return out
}

// CheckProbe asks what one probe tells about upgrades: kubelet or updates. Where
// no node has its condition, nothing is known of it.
func CheckProbe(name, probe string, report Report) Check {
	c := Check{Name: name}
	var seen int
	var missing []string
	for _, n := range report.Nodes {
		i := slices.IndexFunc(n.Probes, func(p Condition) bool { return p.Probe == probe })
		if i < 0 {
			if n.Agent.State != NotExpected {
				missing = append(missing, n.Name)
			}
			continue
		}
		p := n.Probes[i]
		switch p.Status {
		case finding.Problem:
			c.find(n.Name, p.Reason+": "+p.Message, "kubectl hygiene explain "+n.Name+" "+probe)
		case finding.Unknown:
			c.NotChecked = append(c.NotChecked, n.Name+": "+p.Message)
		default:
			seen++
		}
	}
	if len(missing) > 0 {
		c.NotChecked = append(c.NotChecked, fmt.Sprintf("no condition of the probe %s on %s", probe, few(missing, 10)))
	}
	if seen == 0 {
		return c.done("")
	}
	return c.done(fmt.Sprintf("the probe %s finds nothing on %s", probe, count(seen, "node")))
}

// CheckReboots is CheckProbe for updates, with the nodes that kured is rebooting
// just now.
func CheckReboots(nodes []corev1.Node, report Report) Check {
	c := CheckProbe("reboots", "updates", report)
	verified := c.Summary
	for _, n := range nodes {
		if since, ok := n.Annotations["weave.works/kured-reboot-in-progress"]; ok {
			c.find(n.Name, "kured has been rebooting it since "+since, "kubectl describe node "+n.Name)
		}
	}
	return c.done(verified)
}

// CheckVolumes: draining a node moves volumes, which does not work while one is
// stuck.
func CheckVolumes(stuck []StuckVolume, now time.Time) Check {
	c := Check{Name: "volumes"}
	for _, s := range stuck {
		c.find(s.Claim+" ("+s.Volume+")", s.Says(now), s.WayOut()...)
	}
	return c.done("no ReadWriteOnce volume is stuck on a silent node")
}
