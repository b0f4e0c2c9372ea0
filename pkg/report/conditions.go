// Package report turns the engine's snapshots into the media operators read:
// Node conditions and Events, Prometheus metrics, text and JSON. Each is
// computed from the whole snapshot, so nothing has to be cleared by hand.
package report

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/terminal"
)

// Condition types and reasons that belong to no probe.
const (
	ReadyType = probes.ConditionPrefix + "Ready"

	ReasonNoProblem            = "NoProblem"
	ReasonCheckFailed          = "CheckFailed"
	ReasonFirstPassPending     = "FirstPassPending"
	ReasonConfigInvalid        = "ConfigInvalid"
	ReasonRequiredProbeUnknown = "RequiredProbeUnknown"
	ReasonReady                = "Ready"
)

// maxMessage is the longest condition message, in bytes.
const maxMessage = 512

// Condition is one Node condition as it should be, without its times.
type Condition struct {
	Type    string
	Status  string // "True", "False", "Unknown"
	Reason  string
	Message string
	// Findings are what it was made of, the worst first.
	Findings []finding.Finding
	// Provisional: findings are held back that the message of a healthy probe
	// may speak of ("0 of 1 sessions logged in"); it is worth another write when
	// they are gone. Ready is provisional while any probe's are.
	Provisional bool
}

// Set identifies what the condition says apart from numbers that merely move:
// its status, its reason and the (reason, subject, severity) of its findings.
func (c Condition) Set() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\x00%s", c.Status, c.Reason)
	for _, f := range c.Findings {
		fmt.Fprintf(&b, "\x00%s\x01%s\x01%s", f.Reason, f.Subject, f.Severity)
	}
	if c.Reason == ReasonConfigInvalid {
		// Each config that is refused is told, with its own mistakes.
		b.WriteString("\x00" + c.Message)
	}
	return b.String()
}

// Conditions computes what the Node should say. Probes that do not apply, and
// probes that have not run yet, have none.
func Conditions(s engine.Snapshot) []Condition {
	var out []Condition
	for _, r := range s.Reports {
		switch r.Status {
		case finding.NotApplicable:
		case finding.Problem:
			counted := slices.DeleteFunc(slices.Clone(r.Findings), func(f finding.Finding) bool { return !f.Counts() })
			worst, _ := finding.Worst(r.Findings)
			out = append(out, Condition{Type: r.Condition, Status: "True", Reason: worst.Reason, Message: problemMessage(counted), Findings: counted})
		case finding.Unknown:
			out = append(out, Condition{Type: r.Condition, Status: "Unknown", Reason: ReasonCheckFailed, Message: clip(oneLine(fmt.Sprint(r.Err)), maxMessage)})
		default:
			out = append(out, Condition{Type: r.Condition, Status: "False", Reason: ReasonNoProblem, Message: clip(oneLine(r.Summary), maxMessage), Provisional: r.Held > 0})
		}
	}
	r := ready(s)
	r.Provisional = slices.ContainsFunc(s.Reports, func(r finding.Report) bool { return r.Held > 0 })
	return append(out, r)
}

// ready computes the one positive condition, for readiness gates.
func ready(s engine.Snapshot) Condition {
	never := neverReady(s)
	var against []finding.Finding
	var unknown []string
	for _, r := range s.Reports {
		for _, f := range r.Findings {
			if s.Config.Report.ReadyReasons.Match(f) && !never[f.Reason] {
				against = append(against, f)
			}
		}
		if r.Required && r.Status == finding.Unknown {
			unknown = append(unknown, r.Probe)
		}
	}
	finding.Sort(against)
	switch {
	case len(against) > 0:
		return Condition{Type: ReadyType, Status: "False", Reason: against[0].Reason, Message: problemMessage(against), Findings: against}
	case s.ConfigError != nil:
		return Condition{Type: ReadyType, Status: "Unknown", Reason: ReasonConfigInvalid, Message: clip(oneLine(s.ConfigError.Error()), maxMessage)}
	case !s.Complete:
		return Condition{Type: ReadyType, Status: "Unknown", Reason: ReasonFirstPassPending, Message: "the first pass over this host has not ended yet"}
	case len(unknown) > 0:
		return Condition{Type: ReadyType, Status: "Unknown", Reason: ReasonRequiredProbeUnknown,
			Message: "could not be checked, and is required: " + strings.Join(unknown, ", ")}
	}
	return Condition{Type: ReadyType, Status: "True", Reason: ReasonReady, Message: "nothing critical was found on this host"}
}

func neverReady(s engine.Snapshot) map[string]bool {
	never := map[string]bool{}
	for _, p := range s.Probes {
		for _, r := range p.Rules() {
			never[r.Reason] = r.NeverReady
		}
	}
	return never
}

// problemMessage names the worst first and says how many did not fit.
func problemMessage(fs []finding.Finding) string {
	const reserve = len("… and 9999 more")
	var b strings.Builder
	for i, f := range fs {
		text := oneLine(f.Message)
		if f.Subject != "" && !strings.Contains(f.Message, f.Subject) {
			text = oneLine(f.Subject) + ": " + text
		}
		if i > 0 {
			text = "; " + text
		}
		limit := maxMessage
		if i < len(fs)-1 {
			limit -= reserve
		}
		if b.Len()+len(text) > limit {
			if i == 0 {
				b.WriteString(clip(text, limit))
				i++
			}
			if rest := len(fs) - i; rest > 0 {
				fmt.Fprintf(&b, "… and %d more", rest)
			}
			break
		}
		b.WriteString(text)
	}
	return b.String()
}

// clip cuts at a rune boundary.
func clip(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	cut := limit - len("…")
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}

// oneLine makes text from the host fit to be shown, wherever that is.
func oneLine(s string) string { return terminal.Line(s) }
