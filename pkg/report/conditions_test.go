package report

import (
	"errors"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

func snapshot(reports ...finding.Report) engine.Snapshot {
	cfg := config.Default().Sections
	for i := range reports {
		finding.Sort(reports[i].Findings)
		if reports[i].Condition == "" {
			reports[i].Condition = probes.ConditionPrefix + reports[i].Probe
		}
		if reports[i].Status == "" {
			reports[i].Status = finding.StatusOf(finding.Result{Findings: reports[i].Findings}, reports[i].Err)
		}
	}
	return engine.Snapshot{Config: &cfg, Probes: cfg.Probes.List(), Reports: reports, Complete: true}
}

func find(t *testing.T, cs []Condition, typ string) Condition {
	t.Helper()
	for _, c := range cs {
		if c.Type == probes.ConditionPrefix+typ {
			return c
		}
	}
	t.Fatalf("no condition %s in %+v", typ, cs)
	return Condition{}
}

var (
	degraded = finding.Finding{Reason: "PathsDegraded", Severity: finding.Warning, Subject: "mpatha", Message: "mpatha has 1 of 2 paths"}
	failed   = finding.Finding{Reason: "AllPathsFailed", Severity: finding.Critical, Subject: "mpathb", Message: "every path failed"}
	muted    = finding.Finding{Reason: "AllPathsFailed", Severity: finding.Critical, Subject: "mpathc", Message: "m", Muted: &finding.Mute{}}
	note     = finding.Finding{Reason: "AutomaticLogin", Severity: finding.Info, Subject: "x", Message: "i"}
)

func TestConditions(t *testing.T) {
	cs := Conditions(snapshot(
		finding.Report{Probe: "mp", Findings: []finding.Finding{degraded, note, muted, failed}},
		finding.Report{Probe: "fine", Summary: "2 of 2 paths"},
		finding.Report{Probe: "torn", Err: errors.New("no answer")},
		finding.Report{Probe: "none", Status: finding.NotApplicable},
		finding.Report{Probe: "told", Findings: []finding.Finding{note}, Summary: "s"},
	))
	for typ, want := range map[string][3]string{
		// The worst first; muted and informational ones do not count.
		"mp":    {"True", "AllPathsFailed", "mpathb: every path failed; mpatha has 1 of 2 paths"},
		"fine":  {"False", "NoProblem", "2 of 2 paths"},
		"torn":  {"Unknown", "CheckFailed", "no answer"},
		"told":  {"False", "NoProblem", "s"},
		"Ready": {"False", "AllPathsFailed", "mpathb: every path failed"},
	} {
		c := find(t, cs, typ)
		if got := [3]string{c.Status, c.Reason, c.Message}; got != want {
			t.Errorf("%s: got %q, want %q", typ, got, want)
		}
	}
	if len(cs) != 5 {
		t.Errorf("%d conditions, want 5: what does not apply has none", len(cs))
	}
}

func TestReady(t *testing.T) {
	warn := snapshot(finding.Report{Probe: "mp", Findings: []finding.Finding{degraded}})
	byReason := warn
	cfg := *warn.Config
	cfg.Report.ReadyReasons = config.ReadyReasons{"PathsDegraded"}
	byReason.Config = &cfg
	invalid := snapshot()
	invalid.ConfigError = errors.New("config.yaml:3: no")
	pending := snapshot()
	pending.Complete = false
	required := snapshot(finding.Report{Probe: "time", Err: errors.New("x"), Required: true})
	optional := snapshot(finding.Report{Probe: "time", Err: errors.New("x")})
	kill := snapshot(finding.Report{Probe: "oom", Findings: []finding.Finding{{Reason: "SystemOOMKill", Severity: finding.Critical, Message: "m"}}})
	for name, c := range map[string]struct {
		snap           engine.Snapshot
		status, reason string
	}{
		"a warning leaves it True":                 {warn, "True", "Ready"},
		"unless its reason is listed":              {byReason, "False", "PathsDegraded"},
		"an invalid config":                        {invalid, "Unknown", "ConfigInvalid"},
		"before the first pass":                    {pending, "Unknown", "FirstPassPending"},
		"a required probe that could not run":      {required, "Unknown", "RequiredProbeUnknown"},
		"another one does not matter":              {optional, "True", "Ready"},
		"an OOM kill is never a reason, see rules": {kill, "True", "Ready"},
	} {
		got := find(t, Conditions(c.snap), "Ready")
		if got.Status != c.status || got.Reason != c.reason {
			t.Errorf("%s: got %s %s, want %s %s", name, got.Status, got.Reason, c.status, c.reason)
		}
	}
}

func TestMessageIsBoundedAndCutAtARune(t *testing.T) {
	var many []finding.Finding
	for range 100 {
		many = append(many, finding.Finding{Reason: "A", Severity: finding.Warning, Subject: "größe", Message: "überfüllt — zu groß"})
	}
	got := problemMessage(many)
	if len(got) > maxMessage || !utf8.ValidString(got) || !strings.Contains(got, "… and ") || !strings.HasSuffix(got, " more") {
		t.Errorf("%d bytes: %q", len(got), got)
	}
	one := problemMessage([]finding.Finding{{Message: strings.Repeat("ü", 2000)}})
	if len(one) > maxMessage || !utf8.ValidString(one) {
		t.Errorf("%d bytes", len(one))
	}
}

func TestOneLineDefusesTerminals(t *testing.T) {
	for in, want := range map[string]string{
		"plain text, 91% full":  "plain text, 91% full",
		"a\nb\tc":               "a b c",
		"\x1b[31mred\x1b[0m":    `\u001b[31mred\u001b[0m`,
		"bad \xff byte":         `bad \xff byte`,
		"right\u202eto left":    `right\u202eto left`,
		"zero\u200bwidth":       `zero\u200bwidth`,
		"bell\x07 and del\x7f":  `bell\u0007 and del\u007f`,
		"c1 csi\u009b31m":       `c1 csi\u009b31m`,
		"a legal \ufffd itself": `a legal \xef itself`,
	} {
		if got := oneLine(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func FuzzOneLine(f *testing.F) {
	f.Add("x\x1b]0;title\x07")
	f.Add(strings.Repeat("€", 30))
	f.Fuzz(func(t *testing.T, s string) {
		got := clip(oneLine(s), 64)
		if len(got) > 64 || !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q", got)
		}
	})
}

func TestSetIgnoresNumbersThatMove(t *testing.T) {
	a, b := degraded, degraded
	b.Message = "mpatha has 1 of 4 paths"
	one := Condition{Status: "True", Reason: "PathsDegraded", Message: a.Message, Findings: []finding.Finding{a}}
	two := Condition{Status: "True", Reason: "PathsDegraded", Message: b.Message, Findings: []finding.Finding{b}}
	if one.Set() != two.Set() {
		t.Error("a number that moves must be no change")
	}
	two.Findings[0].Severity = finding.Critical
	if one.Set() == two.Set() {
		t.Error("another severity must be a change")
	}
}
