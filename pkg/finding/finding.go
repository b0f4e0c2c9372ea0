// Package finding holds the plain data that flows from a probe to every
// reporter: rules, findings with their evidence, and the report of one pass.
// It imports the standard library only, so that both ends can import it.
package finding

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Severity orders findings. Only warning and critical findings make a Problem.
type Severity string

// The severities, from harmless to grave.
const (
	Info     Severity = "info"
	Warning  Severity = "warning"
	Critical Severity = "critical"
)

// Severities lists them in ascending order.
func Severities() []Severity { return []Severity{Info, Warning, Critical} }

// Rank is 0 for info (and for anything unknown), 1 for warning, 2 for critical.
func (s Severity) Rank() int {
	switch s {
	case Critical:
		return 2
	case Warning:
		return 1
	default:
		return 0
	}
}

// Rule declares one reason beside the probe that gives it. docs/reasons.md is
// generated from the rules.
type Rule struct {
	// Reason is the CamelCase word users see and alert on.
	Reason string
	// Severity is what the finding has unless the probe says otherwise.
	Severity Severity
	// Also names further severities the probe may give, e.g. critical above a
	// second threshold or warning while a multipath map still has a path.
	Also []Severity
	// Means says what is the matter, in a sentence.
	Means string
	// Do says what an operator can do about it.
	Do string
	// HoldBefore is how long the problem must last before it is told.
	HoldBefore time.Duration
	// HoldClear is how long it must be gone before it is cleared.
	HoldClear time.Duration
	// HoldWhy gives the reason for both.
	HoldWhy string
	// NeverReady marks what does not count against hosthygiene.io/Ready.
	NeverReady bool
}

// Evidence is one observation behind a finding.
type Evidence struct {
	// Source says where it was read, e.g. "/sys/block/sda/device/state".
	Source string `json:"source"`
	// Observed is what was found there.
	Observed string `json:"observed"`
	// Expected is what would have been right; empty where there is no norm.
	Expected string `json:"expected,omitempty"`
}

// Remedy names what would cure a finding. It is data: nothing in a probe acts.
type Remedy struct {
	// Action is the kind of step, e.g. "install-package".
	Action string `json:"action"`
	// Subject is what it acts on, e.g. "open-iscsi".
	Subject string `json:"subject"`
}

// Mute says that an operator has silenced a finding: it is shown, not counted.
type Mute struct {
	Until   time.Time `json:"until,omitzero"`
	Because string    `json:"because,omitempty"`
}

// Finding is one thing that is wrong, or worth knowing, on this host.
type Finding struct {
	Reason   string   `json:"reason"`
	Severity Severity `json:"severity"`
	// Subject is what it is about: a device, a unit, a package. Together with
	// Reason it identifies the finding from one pass to the next.
	Subject string `json:"subject,omitempty"`
	// Message is one sentence for a person. Numbers in it may move from pass
	// to pass without the finding being another one.
	Message string `json:"message"`
	// Since is when the engine first saw it; zero in a single pass.
	Since    time.Time  `json:"since,omitzero"`
	Evidence []Evidence `json:"evidence,omitempty"`
	Remedy   *Remedy    `json:"remedy,omitempty"`
	Muted    *Mute      `json:"muted,omitempty"`
	// Settled: what was read says that this does not pass by itself, such as a
	// unit that systemd has given up. The rule's HoldBefore, which only waits to
	// see that, is left out then; one of the config's is not.
	Settled bool `json:"-"`
}

// Key identifies a finding across passes.
type Key struct{ Reason, Subject string }

// Key returns the finding's identity.
func (f Finding) Key() Key { return Key{f.Reason, f.Subject} }

// Counts reports whether the finding makes its probe a Problem.
func (f Finding) Counts() bool { return f.Muted == nil && f.Severity.Rank() > 0 }

// Sort puts the worst first: counted before muted, then by severity, reason
// and subject, so that two passes over the same host give the same order.
func Sort(fs []Finding) {
	slices.SortStableFunc(fs, func(a, b Finding) int {
		return cmp.Or(
			muteRank(a)-muteRank(b),
			b.Severity.Rank()-a.Severity.Rank(),
			cmp.Compare(a.Reason, b.Reason),
			cmp.Compare(a.Subject, b.Subject),
		)
	})
}

func muteRank(f Finding) int {
	if f.Muted != nil {
		return 1
	}
	return 0
}

// Status is the outcome of one probe.
type Status string

// The four outcomes.
const (
	OK            Status = "OK"
	Problem       Status = "Problem"
	Unknown       Status = "Unknown"
	NotApplicable Status = "NotApplicable"
)

// Statuses lists them in the order tables show them.
func Statuses() []Status { return []Status{OK, Problem, Unknown, NotApplicable} }

// Sample is one number of a pass that reporters publish as a metric.
type Sample struct {
	// Metric is the full metric name, e.g. "hosthygiene_time_offset_seconds".
	Metric string
	// Labels are alternating names and values; names are fixed per metric.
	Labels []string
	Value  float64
}

// Result is what a probe returns from one pass over the host.
type Result struct {
	Findings []Finding
	// Summary says in one line what was verified; shown when nothing is wrong.
	Summary string
	// NotApplicable: nothing of the kind is here and nothing of it required.
	NotApplicable bool
	Samples       []Sample
	// Follow are files this pass came upon whose change is worth another pass;
	// a name that ends in '/' is a directory with its entries.
	Follow []string
}

// Add appends a finding.
func (r *Result) Add(f Finding) { r.Findings = append(r.Findings, f) }

// Sample appends a number; labels are alternating names and values.
func (r *Result) Sample(metric string, value float64, labels ...string) {
	r.Samples = append(r.Samples, Sample{Metric: metric, Labels: labels, Value: value})
}

// Report is the outcome of one probe as reporters see it.
type Report struct {
	Probe     string
	Condition string
	Status    Status
	Summary   string
	Findings  []Finding
	Samples   []Sample
	// Err is what could not be checked; it may stand beside findings.
	Err error
	// Held is how many findings are held back, because they have not lasted
	// long enough to be told. The summary may speak of what they are about.
	Held int
	// Follow are files whose change is worth another pass.
	Follow []string
	// Required makes Unknown count against hosthygiene.io/Ready.
	Required bool
	Started  time.Time
	Duration time.Duration
}

// StatusOf applies the rule of precedence: a problem that was found counts even
// when something else could not be checked; what could not be checked is never
// shown as healthy.
func StatusOf(r Result, err error) Status {
	if slices.ContainsFunc(r.Findings, Finding.Counts) {
		return Problem
	}
	if err != nil {
		return Unknown
	}
	if r.NotApplicable {
		return NotApplicable
	}
	return OK
}

// Worst returns the first counted finding of a sorted slice, if there is one.
func Worst(fs []Finding) (Finding, bool) {
	i := slices.IndexFunc(fs, Finding.Counts)
	if i < 0 {
		return Finding{}, false
	}
	return fs[i], true
}

// String is the one-line form used in logs.
func (f Finding) String() string {
	if f.Subject == "" {
		return fmt.Sprintf("%s %s: %s", f.Severity, f.Reason, f.Message)
	}
	return fmt.Sprintf("%s %s %s: %s", f.Severity, f.Reason, f.Subject, f.Message)
}
